"""A separator of the whole band beside one at 11 kHz: the same network, phrases, pictures and number of updates.

    python -m avsep.benchmarks.full_band work

Makes version 2 of the offline benchmark at both rates, trains a preset on each, and separates the test pairs at
44.1 kHz with both, in mono and in stereo. What a separator at 11 kHz gives ends at 5.5 kHz, so its sources have nothing
above; the numbers say what that costs, in the whole band, below 5.5 kHz and above.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avsep.benchmarks.separators import run_presets
from avsep.data.store import Clip, Store, timelines_of
from avsep.data.synth.synthesis import synthesise
from avsep.environment import commit, device_name
from avsep.errors import AvsepError, ConfigError
from avsep.evaluation.bss import LIMIT_DB, sdr_alone
from avsep.evaluation.continual import paired_bootstrap
from avsep.files import write_json
from avsep.inference.recordings import separate_audio
from avsep.media.audio import resample
from avsep.runs.folder import RunFolder
from avsep.separator import Separator, load_separator
from avsep.spec import load_preset

__all__ = ["PRESETS", "main", "measure", "pairs", "panned", "score"]

PRESETS = ("aligned", "aligned_44k")
LOW_HZ, HIGH_HZ = 11025, 44100

Audio = NDArray[np.float32]


def pairs(store: Store) -> list[tuple[Clip, Clip]]:
    """Each test clip with one of another class. Raises :class:`ConfigError` where two classes do not have some."""
    of_class = [clips for name in store.classes if (clips := store.select(classes=[name], split="test"))]
    if len(of_class) < 2:
        raise ConfigError(f"{store.path} has no test clips of two classes: give one that has")
    found = []
    for number, own in enumerate(of_class):
        for take, clip in enumerate(own):
            other = of_class[(number + 1 + take % (len(of_class) - 1)) % len(of_class)]
            found.append((clip, other[take % len(other)]))
    return found


def panned(sources: Audio) -> Audio:
    """Sources [2, L] to [2, 2, L]: the first half left, the second half right, of constant power."""
    angles = np.array([np.pi / 8, 3 * np.pi / 8])
    gains = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return np.multiply(sources[:, None], gains[:, :, None], dtype=np.float32)


def _above(signals: torch.Tensor, edge_hz: float, rate_hz: int) -> torch.Tensor:
    """What lies above a frequency."""
    spectrum = torch.fft.rfft(signals)
    spectrum[..., torch.fft.rfftfreq(signals.shape[-1], 1 / rate_hz) < edge_hz] = 0
    kept: torch.Tensor = torch.fft.irfft(spectrum, signals.shape[-1])
    return kept


def score(references: Audio, estimates: Audio, mixture: Audio, rate_hz: int) -> dict[str, NDArray[np.float64]]:
    """Scores in dB, one a source, of estimates [N, L] at ``rate_hz`` with the mixture [L].

    ``sdr``: improvement of SDR over the mixture, in the whole band; ``sdr_below``: of all three brought down to
    11,025 Hz; ``snr_above``: of what lies above 5.5 kHz, the reference's power over the error's, 0 dB of an estimate
    that has nothing there, NaN of a source that has next to nothing itself (60 dB below the whole).
    """
    found: dict[str, NDArray[np.float64]] = {}
    given = references, estimates, np.broadcast_to(mixture, references.shape)
    for name, signals in (("sdr", given), ("sdr_below", tuple(resample(x, rate_hz, LOW_HZ) for x in given))):
        reference, *sets = (torch.from_numpy(np.ascontiguousarray(x)) for x in signals)
        separated, mixed = sdr_alone(reference[None], torch.stack(sets)[None])[0]
        found[name] = (separated - mixed).numpy()
    above = [_above(torch.tensor(x).double(), LOW_HZ / 2, rate_hz) for x in given[:2]]
    power, error = (x.square().sum(-1) for x in (above[0], above[0] - above[1]))
    there = power > 1e-6 * torch.from_numpy(references).double().square().sum(-1)
    found["snr_above"] = torch.where(there, 10 * torch.log10(power / error), torch.nan).clamp(max=LIMIT_DB).numpy()
    return found


def measure(separator: Separator, store: Store, *, stereo: bool) -> list[dict[str, Any]]:
    """A row for each source of each test pair of a store at 44.1 kHz, with half of the pair's ``seconds`` of processor
    time."""
    rate_hz = separator.spec.front_end.sample_rate_hz
    rows = []
    for clips in pairs(store):
        length = min(clip.samples for clip in clips)
        sources = np.stack([store.read_audio(clip, 0, length) for clip in clips]) / np.float32(2)
        parts: Audio = panned(sources) if stereo else sources[:, None]  # [2, C, L]
        mixture = parts.sum(axis=0)
        shown = timelines_of(store, [clip.id for clip in clips])
        names = [clip.class_name for clip in clips]
        begun = time.process_time()
        given = resample(mixture, store.sample_rate_hz, rate_hz)
        found = separate_audio(separator, given if stereo else given[0], shown, names)
        back = resample(found.reshape(-1, found.shape[-1]), rate_hz, store.sample_rate_hz)
        seconds = time.process_time() - begun
        estimates = np.zeros((len(parts) * mixture.shape[0], length), np.float32)
        estimates[:, : back.shape[1]] = back[:, :length]
        channels = [
            score(parts[:, c], estimates.reshape(parts.shape)[:, c], mixture[c], store.sample_rate_hz)
            for c in range(mixture.shape[0])
        ]
        for n, clip in enumerate(clips):
            gains = {name: float(np.mean([channel[name][n] for channel in channels])) for name in channels[0]}
            rows.append({"clip": clip.id, "class": clip.class_name, "seconds": seconds / 2, **gains})
    return rows


def _summary(rows: Sequence[Sequence[dict[str, Any]]], name: str) -> dict[str, Any]:
    """The mean over seeds and sources, with an interval over the clips."""
    table = np.array([[row[name] for row in of_seed] for of_seed in rows]).mean(axis=0)
    there = np.isfinite(table)
    clips = [row["clip"] for row, one in zip(rows[0], there, strict=True) if one]
    gain = paired_bootstrap(table[there].tolist(), groups=clips)
    return {"mean": gain.mean, "low": gain.low, "high": gain.high, "sources": int(there.sum())}


def main(argv: Sequence[str] | None = None, make: Callable[..., Store] = synthesise) -> None:
    parser = argparse.ArgumentParser(description="A separator of the whole band beside one at 11 kHz.")
    parser.add_argument("folder", type=Path, help="Folder to work in; the same command goes on.")
    parser.add_argument("--seeds", type=int, default=1, help="Trainings of each preset.")
    parser.add_argument("--size", default="tiny", help="Of the benchmark.")
    parser.add_argument("--preset", action="append", default=[], help="Name or file (repeatable) [default: both].")
    parser.add_argument("--set", action="append", default=[], help="A setting of all trainings (repeatable).")
    arguments = parser.parse_args(argv)
    chosen = arguments.preset or PRESETS
    folder: Path = arguments.folder
    try:
        rates = {name: load_preset(name)["separator"]["front_end"]["sample_rate_hz"] for name in chosen}
    except AvsepError as error:
        parser.error(str(error))
    for name, rate in rates.items():
        if rate not in (LOW_HZ, HIGH_HZ):
            parser.error(f"{name} is at {rate} Hz: compared are presets at {LOW_HZ} and {HIGH_HZ} Hz")
    stores = {
        rate: make(folder / f"store-{rate}", version=2, size=arguments.size, sample_rate_hz=rate)
        for rate in (LOW_HZ, HIGH_HZ)
    }
    seeds = range(1234, 1234 + arguments.seeds)
    found: dict[str, Any] = {}
    for preset, rate in rates.items():
        run_presets(
            stores[rate], folder / "runs", [preset], seeds, settings=arguments.set, dependence=0, accelerator="cpu"
        )
        name = Path(preset).stem
        runs = [RunFolder(folder / "runs" / f"{name}-{seed}") for seed in seeds]
        validation = [run.task(run.finished_tasks()[-1]).record()["validation_sdr_db"] for run in runs]
        for kind in ("mono", "stereo"):
            rows = [measure(load_separator(run), stores[HIGH_HZ], stereo=kind == "stereo") for run in runs]
            numbers = {column: _summary(rows, column) for column in ("sdr", "sdr_below", "snr_above")}
            seconds = sum(row["seconds"] for of_seed in rows for row in of_seed)
            sound = sum(stores[HIGH_HZ].clip(row["clip"]).samples for of_seed in rows for row in of_seed) / 2 / HIGH_HZ
            found[f"{name}, {kind}"] = {
                "validation_sdr_db": float(np.mean(validation)),
                **numbers,
                "real_time_factor": seconds / sound,
            }
            print(name, kind, json.dumps(found[f"{name}, {kind}"]), flush=True)
    about = {
        "seeds": arguments.seeds,
        "settings": arguments.set,
        "classes": len(stores[HIGH_HZ].classes),
        "commit": commit(),
        "device": device_name(torch.device("cpu")),
    }
    write_json(folder / "full_band.json", {**about, "rows": found})


if __name__ == "__main__":
    main()

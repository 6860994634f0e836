"""Teach the separator that comes with avsep instruments that it does not know, one after the other.

    python -m avsep.benchmarks.teaching work --bank FluidR3_GM.sf2 --holdout-bank TimGM6mb.sf2

Of each instrument ``avsep learn`` gets a folder of eight recordings, sounds alone, played by ``--bank``. What it then
reaches is measured on phrases of ``--holdout-bank``, by name alone: of pairs of the new instrument and an old one, and
of the old classes, before and after. From the second instrument on nothing but the run is at hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from avsep.data.protocol import TestMixture
from avsep.data.store import Store, StoreWriter
from avsep.data.synth.phrases import INSTRUMENTS, Instrument
from avsep.data.synth.phrases_v2 import INSTRUMENTS_V2, compose_v2
from avsep.data.synth.soundfont import SoundFont
from avsep.data.synth.synthesis import SAMPLE_RATE_HZ, finish_audio, preset_of
from avsep.evaluation.continual import paired_bootstrap
from avsep.evaluation.scores import evaluate_separator, rows_of
from avsep.files import write_json
from avsep.media.audio import write_audio
from avsep.models import Model, find_model
from avsep.separator import load_separator

__all__ = ["NEW", "main", "measure", "render"]

NEW = {"oboe": ((0, 68), "flute"), "marimba": ((0, 12), "xylophone"), "trombone": ((0, 57), "saxophone")}
"""Instruments to teach: their General MIDI bank and program, and the class whose phrases they play."""

RECORDINGS = 8
TEST_CLIPS = 10
_SECONDS = 10.0
_LEVEL_DB = -22.0


def render(player: Instrument, bank: SoundFont, seed: tuple[int, ...]) -> np.ndarray:
    """A phrase as version 2 of the offline benchmark has them: int16 [L] at its rate."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    notes = compose_v2(player, _SECONDS, rng)
    number, program = preset_of(player, bank)
    samples = round(_SECONDS * 2 * SAMPLE_RATE_HZ)
    rate_hz = 2 * SAMPLE_RATE_HZ
    sound = bank.render_low(notes, bank=number, program=program, samples=samples, sample_rate_hz=rate_hz)
    return finish_audio(sound, rate_hz, SAMPLE_RATE_HZ, _SECONDS, _LEVEL_DB, active=True)


def _player(name: str) -> Instrument:
    known = {one.name: one for one in INSTRUMENTS_V2}
    if name in known:
        return known[name]
    preset, like = NEW[name]
    return replace(known[like], name=name, presets=(preset,))


def _record(folder: Path, bank: SoundFont, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        for take in range(RECORDINGS):
            file = folder / name / f"{name}-{take}.wav"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                sound = render(_player(name), bank, (1, number, take)) / np.float32(32768)
                write_audio(file, sound.astype(np.float32), SAMPLE_RATE_HZ)


def _tests(path: Path, bank: SoundFont, names: Sequence[str]) -> Store:
    with StoreWriter(path, classes=names, sample_rate_hz=SAMPLE_RATE_HZ, origin={"bank": bank.path.name}) as writer:
        if writer.finished:
            return Store.open(path)
        ids = []
        for number, name in enumerate(names):
            for take in range(TEST_CLIPS):
                ids.append(f"{name}-{take}")
                writer.write_clip(ids[-1], name, "test", render(_player(name), bank, (2, number, take)))
        return writer.finish(ids)


def _pairs(store: Store, one: str, others: Sequence[str], length: int) -> list[TestMixture]:
    """Each clip of a class with clips of two other classes, all asked for by name alone."""
    found = []
    own = store.select(classes=[one])
    for take, clip in enumerate(own):
        for step in range(2):
            name = others[(2 * take + step) % len(others)]
            other = store.select(classes=[name])[take]
            starts = tuple((c.samples - length) // 2 for c in (clip, other))
            found.append(
                TestMixture(
                    clips=(clip.id, other.id),
                    classes=(one, name),
                    starts=starts,
                    task=0,
                    list_name="task-0",
                    degenerate="",
                    roles=("unseen_source", "unseen_source"),
                )
            )
    return found


def measure(run: Path, store: Store, old: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """SDR improvements in dB over the mixture after the run's last task: ``old`` among each other, by class, and of the
    new classes ``names`` against the old ones."""
    separator = load_separator(run)
    length = separator.spec.front_end.clip_samples
    found: dict[str, Any] = {"old": {}, "new": {}}
    for name in (*old, *names):
        others = [other for other in old if other != name]
        rows = rows_of(evaluate_separator(separator, store, _pairs(store, name, others, length), interference=False))
        own = [row for row in rows if row["class"] == name and row["sdri"] is not None]
        gain = paired_bootstrap([r["sdri"] for r in own], groups=[r["clip"] for r in own])
        kind = "old" if name in old else "new"
        found[kind][name] = {"sdri": gain.mean, "low": gain.low, "high": gain.high, "mixtures": len(own)}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Teach the separator that comes with avsep new instruments.")
    parser.add_argument("folder", type=Path, help="Folder to work in.")
    parser.add_argument("--bank", type=Path, required=True, help="SoundFont that plays what is taught.")
    parser.add_argument("--holdout-bank", type=Path, required=True, help="SoundFont that plays the tests.")
    parser.add_argument("--model", default=None, help="The model to begin with [default: the one that comes along].")
    parser.add_argument("--set", action="append", default=[], help="A setting of avsep learn (repeatable).")
    parser.add_argument("--instruments", default=",".join(NEW), help="Those to teach, in order.")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    model: Model = find_model(arguments.model)
    names = arguments.instruments.split(",")
    _record(folder / "recordings", SoundFont(arguments.bank), names)
    known = {one.name for one in INSTRUMENTS}
    old = [name for name in model.classes if name in known]
    store = _tests(folder / "tests", SoundFont(arguments.holdout_bank), [*old, *NEW])
    run = folder / "run"
    settings = [word for text in arguments.set for word in ("--set", text)]
    shutil.rmtree(run, ignore_errors=True)
    steps: list[dict[str, Any]] = [{"learned": None, **measure(model.separator, store, old, [])}]
    for number, name in enumerate(names):
        recordings = folder / f"given-{number}"  # what one instrument is learned from is gone before the next
        shutil.rmtree(recordings, ignore_errors=True)
        shutil.copytree(folder / "recordings" / name, recordings / name)
        begun = ["learn", model.name, "--out", str(run)] if number == 0 else ["learn", str(run)]
        started = time.perf_counter()
        command = [sys.executable, "-m", "avsep", *begun, "--from", str(recordings), "--classes", name, *settings]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        shutil.rmtree(recordings)
        found = measure(run, store, old, names[: number + 1])
        steps.append({"learned": name, "seconds": seconds, **found})
        first = steps[0]["old"]
        worst = min(old, key=lambda n: found["old"][n]["sdri"] - first[n]["sdri"])
        lost = found["old"][worst]["sdri"] - first[worst]["sdri"]
        gains = ", ".join(
            f"{n} {v['sdri']:+.2f} [{v['low']:+.2f}, {v['high']:+.2f}] dB" for n, v in found["new"].items()
        )
        print(f"{name}: {seconds:.0f} s; {gains}; of the old classes {worst} changed most, {lost:+.2f} dB", flush=True)
        write_json(folder / "teaching.json", {"model": model.name, "settings": arguments.set, "steps": steps})
    print(json.dumps(steps[-1], indent=1))


if __name__ == "__main__":
    main()

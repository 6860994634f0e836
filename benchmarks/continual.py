"""Two tasks learned one after the other, with and without memory: what ``avsep demo`` shows, where its sounds are not.

The store is the demo's with other sounds: the same phrases and drawn players, played by a few partials each instead of
sampled instruments, so that it needs no bank and is made in seconds. Fine-tuning forgets the first task, and ContAV-Sep
with one remembered clip a class keeps most of it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avsep.benchmarks.measure import append_rows, check_results, environment, system_load
from avsep.data.store import SPLITS, Store, StoreWriter
from avsep.data.synth.phrases import CLASSES, Instrument
from avsep.data.synth.phrases_v2 import INSTRUMENTS_V2, compose_v2
from avsep.data.synth.pictures import look_of, motion_frames, object_frames
from avsep.data.synth.soundfont import Note
from avsep.data.synth.synthesis import LEVEL_V2_DB, MOTION_RATES_HZ, OBJECT_RATE_HZ, SAMPLE_RATE_HZ, finish_audio
from avsep.environment import die_with_parent, keep_memory, pick_device
from avsep.errors import AvsepError, ConfigError, UnknownNameError
from avsep.spec import RunSpec, apply_settings, load_preset, validated

__all__ = ["COLUMNS", "RUNS", "made_up_store", "run"]

RUNS = {"finetune": "none", "contavsep": "random_per_class"}  # strategy -> memory, as in the demo
COLUMNS = (
    "strategy",
    "memory",
    "seed",
    "task",
    "classes",
    "learned_sdr_db",
    "final_sdr_db",
    "mixture_sdr_db",
    "steps",
    "train_s",
    "run_s",
    "settings",
    "precision",
    "device",
    "threads",
    "load",
    "python",
    "torch",
    "numpy",
    "avsep",
    "commit",
    "date",
)
"""Of the CSV file: a row a task of each run. ``learned_sdr_db`` is the mean SDR of the task's held-out mixtures right
after it was learned, ``final_sdr_db`` after the last task, ``mixture_sdr_db`` that of the mixture as it is; ``train_s``
the seconds of training the task (with its validation), ``run_s`` those of the whole run with its evaluation."""

_RATE_HZ = 2 * SAMPLE_RATE_HZ
_ATTACK_S = 0.01


@dataclass(frozen=True)
class _Timbre:
    """(ratio to the pitch, amplitude) of the partials, noise where there is none; ``decay_s``: to 1/e, while held."""

    partials: tuple[tuple[float, float], ...]
    decay_s: float = float("inf")


def _harmonics(*amplitudes: float) -> tuple[tuple[float, float], ...]:
    return tuple((float(number), amplitude) for number, amplitude in enumerate(amplitudes, 1))


_TIMBRES = {  # the demo's six classes, in the order in which they are learned
    "accordion": _Timbre(_harmonics(1.0, 0.7, 0.6, 0.7, 0.5, 0.5, 0.4, 0.3)),
    "bassoon": _Timbre(_harmonics(0.4, 1.0, 0.9, 0.6, 0.3, 0.15)),
    "drum": _Timbre((), 0.08),
    "flute": _Timbre(_harmonics(1.0, 0.25, 0.05)),
    "piano": _Timbre(_harmonics(1.0, 0.5, 0.35, 0.2, 0.15, 0.1), 0.6),
    "xylophone": _Timbre(((1.0, 1.0), (3.0, 0.4), (6.3, 0.15)), 0.15),
}


def made_up_store(
    out: str | Path,
    *,
    classes: Sequence[str] = tuple(_TIMBRES),
    seed: int = 0,
    clips: tuple[int, int, int] = (24, 4, 4),
    clip_s: float = 6.0,
) -> Store:
    """A store of the demo's six classes, ``clips`` (train, val, test) of each, played by a few partials. Needs Pillow.

    Each clip depends on (seed, class, split, number) alone. One that is there, made alike, is opened as it is.

    Raises:
        UnknownNameError: a class that is none of the six.
        DataError: ``out`` holds something else.
    """
    for name in classes:
        if name not in _TIMBRES:
            raise UnknownNameError(f"no made-up sound of '{name}': known are {', '.join(_TIMBRES)}")
    origin = {"generator": "avsep bench continual", "seed": seed, "clips": list(clips), "clip_s": clip_s}
    order = []
    with StoreWriter(
        out,
        classes=list(classes),
        sample_rate_hz=SAMPLE_RATE_HZ,
        object_rate_hz=OBJECT_RATE_HZ,
        motion_rate_hz=MOTION_RATES_HZ[2],
        origin=origin,
        licence="Generated, no rights claimed.",
    ) as writer:
        if writer.finished:
            return Store.open(out)
        for name in classes:
            number, timbre = CLASSES.index(name), _TIMBRES[name]
            for split, count in zip(SPLITS, clips, strict=True):
                for k in range(count):
                    rng = np.random.default_rng([seed, number, SPLITS.index(split), k])
                    order.append(f"{name}-{split}-{k:03d}")
                    _write_clip(writer, order[-1], INSTRUMENTS_V2[number], timbre, split, clip_s, rng)
        return writer.finish(order)


def _write_clip(
    writer: StoreWriter,
    clip_id: str,
    player: Instrument,
    timbre: _Timbre,
    split: str,
    clip_s: float,
    rng: np.random.Generator,
) -> None:
    notes = compose_v2(player, clip_s, rng)
    look = look_of(player, rng)
    sound = _play(timbre, notes, clip_s, rng)
    writer.write_clip(
        clip_id,
        player.name,
        split,
        finish_audio(sound, _RATE_HZ, SAMPLE_RATE_HZ, clip_s, LEVEL_V2_DB, active=True),
        object_frames=object_frames(player, look, notes, clip_s, OBJECT_RATE_HZ, version=2),
        motion_frames=motion_frames(player, look, notes, clip_s, MOTION_RATES_HZ[2], version=2),
    )


def _play(timbre: _Timbre, notes: Sequence[Note], clip_s: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """[L] at ``_RATE_HZ``."""
    sound = np.zeros(round(clip_s * _RATE_HZ))
    for note in notes:
        begin = round(note.onset_s * _RATE_HZ)
        count = min(round(note.duration_s * _RATE_HZ), len(sound) - begin)
        if count < 1:
            continue
        at = np.arange(count) / _RATE_HZ
        shape = np.minimum(1, at / _ATTACK_S) * np.minimum(1, at[::-1] / _ATTACK_S) * np.exp(-at / timbre.decay_s)
        pitch_hz = 440 * 2 ** ((note.key - 69) / 12)
        if timbre.partials:
            phases = rng.uniform(0, 2 * np.pi, len(timbre.partials))
            waves = [
                amplitude * np.sin(2 * np.pi * ratio * pitch_hz * at + phase)
                for (ratio, amplitude), phase in zip(timbre.partials, phases, strict=True)
                if ratio * pitch_hz < _RATE_HZ / 2
            ]
            wave = np.sum(waves, axis=0)
        else:
            wave = rng.standard_normal(count)
        sound[begin : begin + count] += note.velocity / 127 * shape * wave
    return sound


# --- the runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    strategy: str
    seed: int
    store: str
    folder: str
    preset: str
    settings: tuple[str, ...]
    device: str
    threads: int


def run(
    store: Store | str | Path,
    folder: str | Path,
    *,
    preset: str = "aligned_small",
    seeds: Sequence[int] = (0, 1),
    settings: Sequence[str] = (),
    device: str = "cpu",
    jobs: int = 1,
    out: str | Path | None = None,
    write: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train and evaluate both strategies with each seed on two tasks, half of the store's classes each.

    A run's rows, one a task with the keys of :data:`COLUMNS`, are printed and kept as soon as it is done. The first
    seed's runs come first.

    Args:
        folder: of the runs; they must not be there yet.
        settings: of ``--set``, for all of the runs.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        jobs: runs at a time, each in a process of its own where they are several; their seconds are then longer.
        out: CSV file to append to.

    Raises:
        ConfigError: for settings that do not exist, a store of fewer than four classes, or another kind of file as
            ``out``.
    """
    if out is not None:
        check_results(out, COLUMNS)
    if jobs < 1:
        raise ConfigError(f"jobs = {jobs}: give 1 or more")
    opened = store if isinstance(store, Store) else Store.open(store)
    if len(opened.classes) < 4:
        raise ConfigError(f"{opened.path} has {len(opened.classes)} classes, and two tasks need two each")
    kind = str(pick_device(device))
    place, settings = Path(folder), tuple(settings)
    threads = torch.get_num_threads() if jobs == 1 else max(1, torch.get_num_threads() // jobs)
    todo = [
        _Job(strategy, seed, str(opened.path), str(place / f"{strategy}-{seed}"), preset, settings, kind, threads)
        for seed in seeds
        for strategy in RUNS
    ]
    _spec(todo[0], opened)  # a mistake is said before anything is trained
    rows = []
    for found in _in_turn(todo, jobs):
        if out is not None:
            append_rows(out, found, COLUMNS)
        rows += found
        write(_said(found))
    return rows


def _in_turn(todo: Sequence[_Job], jobs: int) -> Iterator[list[dict[str, Any]]]:
    if jobs == 1:
        yield from map(_one, todo)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would share what this process has of the GPU
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin) as pool:
        futures = [pool.submit(_one, job) for job in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise AvsepError("a process that was training died: if memory is short, lower --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    die_with_parent()
    keep_memory()


def _one(job: _Job) -> list[dict[str, Any]]:
    from avsep.data.tasks import task_stream
    from avsep.evaluation.evaluate import evaluate_run
    from avsep.evaluation.yardsticks import sdr_by_task
    from avsep.training.learner import ContinualLearner

    started = time.perf_counter()
    load = system_load()
    torch.set_num_threads(job.threads)
    store = Store.open(job.store)
    spec = _spec(job, store)
    front_end = spec.separator.front_end
    stream = task_stream(store, spec.tasks, protocol=spec.protocol, clip_samples=front_end.clip_samples)
    learner = ContinualLearner.from_spec(spec, accelerator=job.device, loggers=())
    records = learner.fit(stream, job.folder, progress=False, preset=job.preset)
    evaluation = evaluate_run(job.folder, store, device=job.device)
    mixture = sdr_by_task(evaluation)["mixture"]
    matrix = evaluation["matrix"]
    seconds = time.perf_counter() - started
    return [
        {
            "strategy": job.strategy,
            "memory": RUNS[job.strategy],
            "seed": job.seed,
            "task": task,
            "classes": " ".join(record["classes"]),
            "learned_sdr_db": round(matrix[task][task], 3),
            "final_sdr_db": round(matrix[-1][task], 3),
            "mixture_sdr_db": round(float(mixture[task] or 0.0), 3),
            "steps": record["steps"],
            "train_s": record["seconds"],
            "run_s": round(seconds, 1),
            "settings": " ".join((Path(job.preset).stem, *job.settings)),
            "precision": learner.fabric.strategy.precision.precision,
            "load": load,
            **environment(job.device),
        }
        for task, record in enumerate(records)
    ]


def _spec(job: _Job, store: Store) -> RunSpec:
    preset, half = load_preset(job.preset), len(store.classes) // 2
    data: dict[str, Any] = {
        "separator": preset["separator"],
        "train": {**preset.get("train", {}), "seed": job.seed},
        "strategy": job.strategy,
        "memory": RUNS[job.strategy],
        "tasks": [list(store.classes[:half]), list(store.classes[half:])],
        "preset": job.preset,
    }
    apply_settings(data, list(job.settings))
    spec = validated(RunSpec, data, "bench continual")
    spec.check()
    return spec


def _said(rows: Sequence[dict[str, Any]]) -> str:
    old, new = rows
    return (
        f"{old['strategy']}, memory {old['memory']}, seed {old['seed']}: task 0 {old['learned_sdr_db']:.2f} dB when "
        f"learned and {old['final_sdr_db']:.2f} at the end, task 1 {new['final_sdr_db']:.2f}; {old['run_s']:.0f} s"
    )

"""One cell, or one shared first task, in a process of its own.

All it is told is a file, and all it tells are files in the same folder, so that it may run on another machine that sees
the same folders: ``progress.json`` while it works, ``failed.json`` when it cannot, and for a cell its result.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from avsep.errors import AvsepError, RunError
from avsep.files import FolderLock, read_json, write_json
from avsep.progress import Progress
from avsep.runs.folder import RunFolder

__all__ = ["FAILED", "KEPT", "PROGRESS", "first_task_done", "run_unit"]

PROGRESS, FAILED = "progress.json", "failed.json"
KEPT = "kept"  # in the folder of a cell that was finished under --keep, which later commands leave alone
_COMMITS = "commits.json"
_ARITHMETIC = "arithmetic.json"
_NOTES = (_COMMITS, _ARITHMETIC)
_LOCK_WAIT_S = 20.0  # a worker whose parent was just killed needs a moment to die
_REPORT_S = 0.5


class _FileProgress(Progress):
    """Writes how far the unit is, in steps, into a small file now and then."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._last = 0.0
        self._state: dict[str, Any] = {"task": 0, "trains": False, "label": "", "done": 0, "total": 0, "note": ""}

    def add(self, label: str, total: int | None, done: int = 0) -> int:
        task = re.search(r" task (\d+) \(0 to \d+\)$", label)  # the task's steps; anything else is a side job
        self._state |= {"done": done, "total": total or 0, "label": task[0].strip() if task else label}
        self._state |= {"trains": bool(task), "task": int(task[1]) if task else self._state["task"]}
        self._write()
        return 0

    def advance(self, bar: int, amount: int = 1, note: str | None = None) -> None:
        self._state["done"] += amount
        if note is not None:
            self._state["note"] = note
        if time.monotonic() - self._last > _REPORT_S:
            self._write()

    def update(self, bar: int, done: int, total: int) -> None:
        self._state |= {"done": done, "total": total}
        if time.monotonic() - self._last > _REPORT_S:
            self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._state), encoding="utf-8")  # not synced: it may be lost
        os.replace(temporary, self._path)


def first_task_done(run: Path) -> bool:
    return RunFolder(run).task(0).record_file.is_file()


def run_unit(file: str | Path) -> bool:
    """Do what a unit's file says; False, with the reason in ``failed.json``, when it cannot be done."""
    file = Path(file)
    folder = file.parent
    unit = read_json(file)
    (folder / FAILED).unlink(missing_ok=True)
    try:
        _run(unit, folder)
    except AvsepError as error:
        write_json(folder / FAILED, {"error": " ".join(str(error).split())})
        return False
    except Exception as error:
        traceback.print_exc()
        write_json(folder / FAILED, {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        return False
    return True


def _run(unit: dict[str, Any], folder: Path) -> None:
    import torch

    from avsep.data.tasks import task_stream
    from avsep.environment import code_hash, keep_memory, pick_device
    from avsep.spec import RunSpec, validated
    from avsep.training.learner import ContinualLearner

    for package in unit.get("packages", ()):
        importlib.import_module(package)
    if code_hash() != unit["code"]:
        raise RunError("the library's source has changed since the command began: start it again")
    device = pick_device(unit["device"])  # here: the command may run on a machine with others
    torch.set_num_threads(unit["threads"])
    keep_memory()
    spec = _in_full_precision(validated(RunSpec, unit["spec"], "cell"), device)
    run = folder / "run"
    stream = task_stream(
        unit["store"],
        spec.tasks,
        protocol=spec.protocol,
        validation_protocol=spec.validation_protocol,
        clip_samples=spec.separator.front_end.clip_samples,
    )
    if stream.store.content_hash != spec.store_hash:
        raise RunError(f"{unit['store']} is not the store that the command began with: it has been changed")
    _wait_for(run)
    resume = RunFolder(run).is_run
    if not resume:  # what a kill may have left of its making
        shutil.rmtree(run, ignore_errors=True)
    progress = _FileProgress(folder / PROGRESS)
    learner = ContinualLearner.from_spec(spec, accelerator=device.type)
    _note(folder, device)
    first = None if first_task_done(run) else unit["first"]
    learner.fit(stream, run, resume=resume, progress=progress, preset=unit["preset"], first_task=first)
    if unit["kind"] == "first":
        shutil.rmtree(RunFolder(run).state, ignore_errors=True)
        return
    if unit["keep"]:
        (folder / KEPT).touch()  # before the result, so that no kill comes between; a new start takes it away
    _finish(unit, spec, stream, run, progress, device)
    if not unit["keep"]:
        shutil.rmtree(run, ignore_errors=True)


def _in_full_precision(spec: Any, device: Any) -> Any:
    """What a CPU's ``train.precision=auto`` means in a grid: full precision, whatever its instructions, for cells of
    several processors are held against one another."""
    if device.type != "cpu" or spec.train.precision != "auto":
        return spec
    return spec.model_copy(update={"train": spec.train.model_copy(update={"precision": "32-true"})})


def _wait_for(run: Path) -> None:
    """Wait until a worker that has lost its parent is gone."""
    end = time.monotonic() + _LOCK_WAIT_S
    while run.is_dir():
        try:
            with FolderLock(run):
                return
        except RunError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _note(folder: Path, device: Any) -> None:
    """Add the present commit, and what computes here, to those that have worked on a unit."""
    from avsep.environment import arithmetic, commit

    for name, now in ((_COMMITS, commit()), (_ARITHMETIC, arithmetic(device))):
        write_json(folder / name, list(dict.fromkeys([*_noted(folder, name), now])))


def _noted(folder: Path, name: str) -> list[str]:
    path = folder / name
    return read_json(path) if path.is_file() else []  # none of a unit that an earlier version began


def _finish(unit: dict[str, Any], spec: Any, stream: Any, run: Path, progress: Progress, device: Any) -> None:
    """Score the run and write the cell's result."""
    from avsep.evaluation.budget import budget_of
    from avsep.evaluation.evaluate import evaluate_run
    from avsep.reproduce.results import cell_record, write_cell

    progress.add("scoring", total=None)
    started = time.perf_counter()
    evaluation = None
    if unit.get("tested", True):
        evaluation = evaluate_run(
            run,
            unit["store"],
            device=device,
            yardsticks=False,  # a cell's result holds the method's scores alone
            dependence=unit.get("dependence", 0),
            progress=lambda _task, done, total: progress.update(0, done, total),
        )
    scoring_s = time.perf_counter() - started
    records = [read_json(p) for p in sorted(run.glob("tasks/*/task.json"))]
    seconds = [r["seconds"] for r in records]
    places = [Path(unit["first"]), run] if unit["first"] else [run]
    after = sum(r["seconds_after"] for r in records)  # of the first task too, which each cell computes for itself
    write_cell(
        Path(unit["result"]),
        cell_record(
            unit["cell"],
            evaluation,
            tasks=[
                {k: r[k] for k in ("steps", "best_epoch", "best_step", "validation_sdr_db", "parameters")}
                for r in records
            ],
            validation_sdr_db=_validated(spec, stream, run, device),
            exemplars=records[-1]["exemplars"],
            memory=budget_of(run, store=unit["store"]).plain(),
            seconds={
                "first_task": seconds[0],
                "tasks": round(sum(seconds[1:]) + after, 1),
                "scoring": round(scoring_s, 1),
            },
            **_provenance(
                unit,
                device,
                *([note for place in places for note in _noted(place.parent, name)] for name in _NOTES),
            ),
        ),
    )


def _validated(spec: Any, stream: Any, run: Path, device: Any) -> float:
    """The mean SDR of the stored separator on all validation mixtures of its classes, in dB: what settings and rows are
    chosen by. The task's own record has that of the weights before the strategy has joined them with others."""
    from avsep.separator.weights import load_separator
    from avsep.training.validation import Validation

    task = stream.tasks[-1]
    everything = spec.train.model_copy(update={"validation_pairs": None})
    separator = load_separator(run, task=task.index).to(device)
    return Validation(stream, task, everything, device=device).score(separator)[0]


def _provenance(unit: dict[str, Any], device: Any, commits: list[str], arithmetics: list[str]) -> dict[str, Any]:
    """``commit`` is the one that finished the cell, ``commits`` all that worked on it or on its first task, and
    ``arithmetic`` what they computed on (:func:`avsep.environment.arithmetic`)."""
    import platform
    from datetime import datetime, timezone

    import torch

    import avsep
    from avsep.environment import commit, device_name, version_of

    return {
        "commit": commit(),
        "commits": list(dict.fromkeys(commits)),
        "code": unit["code"],
        "preset": unit["preset"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_name(device),
        "arithmetic": list(dict.fromkeys(arithmetics)),
        "device_kind": device.type,
        "threads": torch.get_num_threads(),
        "software": {
            "avsep": avsep.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": version_of("numpy"),
        },
    }


def _die_with_standard_input() -> None:
    """End when the process that holds the other end of standard input is gone, however it went."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """A worker process; its argument is a unit's file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that draws ends this one
    _die_with_standard_input()
    sys.exit(0 if run_unit(sys.argv[1]) else 1)

"""Runs the cells of a grid, several at a time, each in a process of its own, and goes on where a killed run was.

What is done is what files say: a cell is finished when its result is there, a first task when its ``task.json`` is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from avsep.environment import code_hash, commit, python_command, torch_threads
from avsep.errors import AvsepError, ConfigError, MissingExtraError, RunError
from avsep.files import FolderLock, entries, read_json, refuse_file, write_json
from avsep.progress import Progress, progress_bar
from avsep.reproduce.grid import Cell, Grid, identity_key
from avsep.reproduce.preset import PresetModel
from avsep.reproduce.results import ResultStore
from avsep.reproduce.worker import FAILED, KEPT, PROGRESS, first_task_done, run_unit
from avsep.runs.folder import RunFolder

__all__ = [
    "LAUNCHERS",
    "InlineJob",
    "Job",
    "Launcher",
    "LocalJob",
    "Outcome",
    "SubmititLauncher",
    "check_folder",
    "claim",
    "cores",
    "run_grid",
]

MARK = "reproduce.json"
JOB = "job.json"  # in the folder of a unit that a cluster runs
_POLL_S = 0.2


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


# --- launchers --------------------------------------------------------------------------------------------------------


class Job(Protocol):
    """A unit that was started, with the methods of submitit's jobs."""

    def done(self) -> bool: ...

    def result(self) -> Any:
        """Raise where the job ended without having come to the unit's end."""

    def cancel(self, check: bool = True) -> None:
        """End the job; the unit can be gone on with later."""


Launcher = Callable[[Path, int], Job]
"""Starts the worker on a unit's file, with a number of threads."""


class LocalJob:
    """A process on this machine, which ends with this one.

    submitit has jobs of this kind too, but they outlive a command that is killed, find no GPU (their
    CUDA_VISIBLE_DEVICES is empty unless GPUs are requested by number), end at a time limit, and need a POSIX system.
    """

    def __init__(self, unit: Path, threads: int) -> None:
        environment = {
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")},
        }
        with open(unit.with_name("log.txt"), "ab") as log:
            self.process = subprocess.Popen(
                python_command("from avsep.reproduce.worker import main; main()", str(unit)),
                stdin=subprocess.PIPE,  # never written: it closes when this process is gone, and the worker ends
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def done(self) -> bool:
        return self.process.poll() is not None

    def result(self) -> None:
        code = self.process.wait()
        if code not in (0, 1):
            raise RunError(f"its process died (exit code {code}); is memory short?")

    def cancel(self, check: bool = True) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()  # does nothing to one that has ended
        self.process.wait()


class InlineJob:
    """A unit that is run in this process, before anything else goes on: for a debugger."""

    def __init__(self, unit: Path, threads: int) -> None:
        with torch_threads(threads):
            run_unit(unit)

    def done(self) -> bool:
        return True

    def result(self) -> None:
        pass

    def cancel(self, check: bool = True) -> None:
        pass


class SubmititLauncher:
    """Jobs of a cluster (Slurm) through submitit; the folders must be seen from its machines.

    ``cluster`` is submitit's: None for what it finds, ``slurm``, ``local`` or ``debug``; ``parameters`` are its
    executor's (``timeout_min``, ``slurm_partition``, ...).
    """

    def __init__(self, folder: Path, cluster: str | None = None, parameters: dict[str, Any] | None = None) -> None:
        try:
            import submitit
        except ImportError:
            raise MissingExtraError("submitit", "cluster", "the launcher submitit") from None
        try:
            self._executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster)
            self._executor.update_parameters(**{"timeout_min": 24 * 60, **(parameters or {})})
        except Exception as error:  # submitit's own, of many kinds
            raise ConfigError(f"submitit: {error}") from None

    def __call__(self, unit: Path, threads: int) -> Job:
        """Submit a job, or take over that of a command that was killed, which its jobs outlive."""
        job: Job | None = self._still_running(unit.with_name(JOB))
        if job is None:
            self._executor.update_parameters(cpus_per_task=threads)
            submitted = self._executor.submit(run_unit, str(unit))
            write_json(unit.with_name(JOB), {"job": str(submitted.job_id)})
            job = submitted
        return job

    def _still_running(self, file: Path) -> Any | None:
        if not file.is_file() or self._executor.cluster != "slurm":  # the others give no job by its number
            return None
        import submitit

        job: Any = submitit.SlurmJob(folder=self._executor.folder, job_id=read_json(file)["job"])
        # Slurm forgets old jobs, and one that it does not know would never end
        return None if job.done(force_check=True) or job.state.upper() == "UNKNOWN" else job


LAUNCHERS = ("local", "inline", "submitit")


def _failure(job: Any) -> str:
    """Why a job that is done did not come to its unit's end; empty where it did."""
    try:
        job.result()
    except RunError as error:
        return str(error)
    except Exception as error:  # submitit's own, and what the job raised
        return f"its job {job.job_id} failed: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
    return ""


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """A cell, or a first task that cells share; ``cells`` are those it is for."""

    kind: Literal["cell", "first"]
    key: str
    label: str
    spec: dict[str, Any]
    steps: int
    folder: Path
    cells: tuple[Cell, ...]

    @property
    def first(self) -> bool:
        return self.kind == "first"


@dataclass
class _Running:
    job: Job
    unit: _Unit
    bar: int


@dataclass(frozen=True)
class Outcome:
    """What came of a grid: keys of the cells that were finished now or before, and why others were not."""

    finished: tuple[str, ...]
    failed: dict[str, str] = field(default_factory=dict)
    ran: int = 0
    seconds: float = 0.0


def run_grid(
    grid: Grid,
    out: Path,
    *,
    results: ResultStore,
    jobs: int,
    device: str = "auto",
    launcher: Launcher | None = None,
    keep: bool = False,
    progress: bool = True,
    title: str = "cells",
    preset: str = "",
    finished: Callable[[Cell], str] | None = None,
    packages: Sequence[str] = (),
) -> Outcome:
    """Run the cells that ``results`` does not have.

    ``device`` is resolved where a cell runs. ``keep`` leaves the run folders of finished cells in ``out/work``, and
    those that an earlier grid kept are left there in any case; ``finished`` gives the line that is shown when a
    cell is; ``packages`` are imported by the workers, since they register components. A cell that fails is reported in
    the outcome, and the others go on.

    Raises:
        RunError: another process is at work in ``out``.
    """
    started = time.perf_counter()
    with FolderLock(out):
        loop = _Loop(grid, out, results, jobs, device, launcher or LocalJob, keep, title, preset, finished, packages)
        with progress_bar(progress) as bars:
            return loop.run(bars, started)


class _Loop:
    def __init__(
        self,
        grid: Grid,
        out: Path,
        results: ResultStore,
        jobs: int,
        device: str,
        launcher: Launcher,
        keep: bool,
        title: str,
        preset: str,
        finished: Callable[[Cell], str] | None,
        packages: Sequence[str],
    ) -> None:
        self.grid = grid
        self.out = out
        self.results = results
        self.jobs = jobs
        self.device = device
        self.launcher = launcher
        self.keep = keep
        self.title = title
        self.preset = preset
        self.finished = finished
        self.packages = list(packages)
        self.failed: dict[str, str] = {}
        self.running: list[_Running] = []

    # ------------------------------------------------------------------ what there is to do

    def _cell_folder(self, cell: Cell) -> Path:
        return self.out / "work" / cell.key

    def _first_folder(self, cell: Cell) -> Path:
        return self.out / "work" / f"first-{cell.first_key}"

    def _units(self) -> tuple[list[_Unit], list[_Unit]]:
        """First tasks and cells that are still to be run, seed by seed and of each the longest first."""
        todo = []
        for cell in self.grid.cells.values():
            if cell.key in self.results:
                self._tidy(self._cell_folder(cell))  # of a kill after it was finished
            elif cell.problem:
                self.failed[cell.key] = cell.problem
            else:
                todo.append(cell)
        units = [
            _Unit(
                "cell",
                cell.key,
                cell.name,
                cell.spec.model_dump(mode="json"),
                cell.steps,
                self._cell_folder(cell),
                (cell,),
            )
            for cell in todo
        ]
        return self._firsts(todo), sorted(units, key=_in_order)

    def _tidy(self, folder: Path) -> None:
        """Remove what a finished cell leaves, where nobody has asked to keep it."""
        if not self.keep and not (folder / KEPT).is_file():
            shutil.rmtree(folder, ignore_errors=True)

    def _firsts(self, todo: Sequence[Cell]) -> list[_Unit]:
        """The first tasks that must be run before ``todo``."""
        groups: dict[str, list[Cell]] = {}
        for cell in todo:
            if cell.shares_first and not first_task_done(self._cell_folder(cell) / "run"):
                groups.setdefault(cell.first_key, []).append(cell)
        firsts = []
        for cells in groups.values():
            folder = self._first_folder(cells[0])
            if not first_task_done(folder / "run"):
                label = f"{cells[0].base} first task s{cells[0].seed}"
                spec = self._first_spec(cells[0], folder)
                firsts.append(
                    _Unit("first", cells[0].first_key, label, spec, cells[0].first_steps, folder, tuple(cells))
                )
        return sorted(firsts, key=_in_order)

    def _first_spec(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """A run of the first task alone. Several strategies may share it: one that was begun stays as it is."""
        if (folder / "unit.json").is_file() and RunFolder(folder / "run").is_run:
            begun: dict[str, Any] = read_json(folder / "unit.json")["spec"]
            return begun
        spec = cell.spec.model_dump(mode="json")
        return {**spec, "tasks": spec["tasks"][:1], "protocol": "fixed"}

    # ------------------------------------------------------------------ the loop

    def run(self, bars: Progress, started: float) -> Outcome:
        firsts, cells = self._units()
        waiting = [*firsts, *cells]
        total = sum(unit.steps for unit in waiting)
        count = len(cells)
        if not waiting:
            return self._outcome(0, started)
        overall = bars.add(self.title, total=total)
        done_steps, ran = 0, 0
        try:
            while waiting or self.running:
                while len(self.running) < self.jobs and (unit := self._next(waiting)) is not None:
                    waiting.remove(unit)
                    self._start(unit, bars)
                shares = [self._share(r, bars) for r in self.running]
                partial = sum(s * r.unit.steps for s, r in zip(shares, self.running, strict=True))
                bars.update(overall, int(done_steps + partial), total)
                bars.advance(overall, 0, note=f"{ran}/{count} cells")
                for one in list(self.running):
                    if not one.job.done():
                        continue
                    how = _failure(one.job)
                    self._forget(one)
                    bars.remove(one.bar)
                    done_steps += one.unit.steps
                    if self._settle(one.unit, how, waiting, bars) and not one.unit.first:
                        ran += 1
                if self.running:
                    time.sleep(_POLL_S)
                elif waiting and self._next(waiting) is None:  # a finished first task has been removed meanwhile
                    again = self._firsts([cell for unit in waiting for cell in unit.cells])
                    total += sum(unit.steps for unit in again)
                    waiting[:0] = again
                    time.sleep(_POLL_S)
            bars.update(overall, total, total)
            bars.advance(overall, 0, note=f"{ran}/{count} cells")
        finally:
            for one in list(self.running):
                one.job.cancel(check=False)
                self._forget(one)
        return self._outcome(ran, started)

    def _forget(self, one: _Running) -> None:
        self.running.remove(one)
        (one.unit.folder / JOB).unlink(missing_ok=True)

    def _outcome(self, ran: int, started: float) -> Outcome:
        finished = tuple(key for key in self.grid.cells if key in self.results)
        return Outcome(finished, self.failed, ran, time.perf_counter() - started)

    def _next(self, waiting: list[_Unit]) -> _Unit | None:
        """The first unit that can start: a cell whose first task is there, or a first task, of the earliest seed.

        So a grid that is not finished has all rows of its first seeds, which pair.
        """
        ready = [unit for unit in waiting if unit.first or self._can_start(unit)]
        return min(ready, key=lambda unit: (unit.cells[0].seed, not unit.first), default=None)

    def _can_start(self, unit: _Unit) -> bool:
        cell = unit.cells[0]
        places = (self._first_folder(cell) / "run", unit.folder / "run")
        return not cell.shares_first or any(map(first_task_done, places))

    def _start(self, unit: _Unit, bars: Progress) -> None:
        unit.folder.mkdir(parents=True, exist_ok=True)
        for name in (PROGRESS, FAILED, KEPT):
            (unit.folder / name).unlink(missing_ok=True)
        cell = unit.cells[0]
        file = unit.folder / "unit.json"
        write_json(
            file,
            {
                "kind": unit.kind,
                "spec": unit.spec,
                "store": str(Path(self.grid.store.path).resolve()),
                "first": None
                if unit.first or not cell.shares_first
                else str((self._first_folder(cell) / "run").resolve()),
                "result": None if unit.first else str(self.results.path(cell).resolve()),
                "cell": None
                if unit.first
                else {
                    "key": cell.key,
                    "identity": cell.identity,
                    "base": cell.base,
                    "row": cell.row.name,
                    "seed": cell.seed,
                },
                "tested": cell.tested,
                "dependence": self.grid.preset.dependence,
                "threads": self.grid.preset.threads,
                "device": self.device,
                "preset": self.preset,
                "code": code_hash(),
                "keep": self.keep,
                "packages": self.packages,
            },
        )
        job = self.launcher(file.resolve(), self.grid.preset.threads)
        self.running.append(_Running(job, unit, bars.add(unit.label, total=None)))

    def _share(self, one: _Running, bars: Progress) -> float:
        """How much of a running unit is done, as its worker says."""
        try:
            state = read_json(one.unit.folder / PROGRESS)
            done, total = int(state["done"]), int(state["total"])
            bars.update(one.bar, done, total)
            bars.advance(one.bar, 0, note=f"{state['label']} {state['note']}".strip())
            within = done / total if state["trains"] else 1.0
            if one.unit.first:
                return min(1.0, within)
            # a first task that is shared does not count
            shared = int(one.unit.cells[0].shares_first)
            share = (int(state["task"]) - shared + within) / max(1, len(one.unit.spec["tasks"]) - shared)
            return max(0.0, min(1.0, share))
        except (AvsepError, KeyError, TypeError, ValueError, ZeroDivisionError, OSError):
            return 0.0

    def _settle(self, unit: _Unit, how: str, waiting: list[_Unit], bars: Progress) -> bool:
        """Take note of what became of a unit; whether it was finished."""
        self.results.refresh()
        done = first_task_done(unit.folder / "run") if unit.first else unit.key in self.results
        if done:  # whatever went wrong afterwards
            if not unit.first:
                self.failed.pop(unit.key, None)
                bars.say(self.finished(unit.cells[0]) if self.finished else f"finished {unit.label}")
                self._tidy(unit.folder)
            return True
        reason = how or "it ended without a result and without a reason"
        with contextlib.suppress(AvsepError, KeyError, TypeError):
            reason = str(read_json(unit.folder / FAILED)["error"])
        for cell in unit.cells:
            self.failed[cell.key] = f"its first task: {reason}" if unit.first else reason
        if unit.first:
            waiting[:] = [u for u in waiting if u.first or u.key not in self.failed]
        bars.say(f"failed {unit.label}: {reason} (log: {unit.folder / 'log.txt'})")
        return False


def _in_order(unit: _Unit) -> tuple[int, int, str]:
    return unit.cells[0].seed, -unit.steps, unit.label


def is_grid(folder: Path) -> bool:
    """Whether a grid was begun there."""
    return (folder / MARK).is_file()


def check_folder(out: Path, resume: bool, *, preset: str, given: PresetModel, tuning: bool) -> None:
    """Refuse a folder that holds something else, a grid that was not asked to be gone on with, or one of another preset
    than ``given``: that must show before its data set is opened, to which a preset may add features."""
    refuse_file(out)
    if is_grid(out):
        if not resume:
            raise RunError(f"{out} holds a grid already: go on with --resume, or choose another --out")
        found = read_json(out / MARK)
        # tune's own preset depends on the data, and a mark of an earlier version has no other
        then = found.get("given_hash") or (None if tuning else found.get("preset_hash"))
        if then not in (None, _preset_hash(given)):
            raise _other_preset(out, found, preset)
        return
    foreign = [name for name in entries(out) if not name.startswith(".")]
    if resume and not foreign:
        raise RunError(f"nothing to resume in {out}: start it without --resume")
    if set(foreign) - {"store"}:  # a store is made before the folder is marked
        raise RunError(f"{out} is not empty and not a grid's folder (it has {foreign[0]}): choose another --out")


def _preset_hash(preset: PresetModel) -> str:
    """Of what decides the cells: how many there are, and which, may change while a grid goes on."""
    left_out = {"summary", "source", "measured", "seconds_per_step", "seeds", "tuning"}
    # of a board
    left_out |= {"entries", "settings", "budgets", "control", "screening", "share", "hypotheses"}
    left_out |= {"tuning_tasks", "tuning_seeds"}
    return identity_key(preset.model_dump(mode="json", exclude=left_out, exclude_defaults=True))


def _other_preset(out: Path, found: dict[str, Any], preset: str) -> RunError:
    return RunError(
        f"{out} was begun with other settings (preset '{found.get('preset')}') than those of '{preset}' now: choose "
        "another --out"
    )


def claim(out: Path, grid: Grid, *, preset: str, given: PresetModel, device: str, any_code: bool = False) -> None:
    """Take a folder for a grid, or go on in one of the same preset, store, device and code.

    Raises :class:`RunError` for one of others. ``given`` is the preset as it was given, of which tuning takes a part;
    ``device`` the kind of device, since each computes in its own precision, or the name to be resolved on the machines
    of a cluster.
    """
    mine = {
        "preset": preset,
        "preset_hash": _preset_hash(grid.preset),
        "given_hash": _preset_hash(given),
        "device": device,
        "store_hash": grid.store.content_hash,
        "code": code_hash(),
        "commit": commit(),
    }
    path = out / MARK
    if not path.is_file():
        write_json(path, mine)
        return
    found = read_json(path)
    if found.get("preset_hash") != mine["preset_hash"]:
        raise _other_preset(out, found, preset)
    if found.get("store_hash") != mine["store_hash"]:
        raise RunError(
            f"{out} was made from another data set (hash {str(found.get('store_hash'))[:12]}, now "
            f"{mine['store_hash'][:12]}): choose another --out"
        )
    if found.get("device", device) != device:
        raise RunError(
            f"{out} was begun with --device {found['device']}, not {device}, whose numbers are others: go on with "
            f"--device {found['device']}, or choose another --out"
        )
    if found.get("code") != mine["code"] and not any_code:
        raise RunError(
            f"{out} was made by another version of the library (commit {found.get('commit')}, now {mine['commit']}): "
            "go back to it, choose another --out, or mix the two with --any-code"
        )
    if added := {name: mine[name] for name in ("given_hash", "device") if name not in found}:
        write_json(path, {**found, **added})  # of a mark that an earlier version made

"""Run folders: every path and file name of a run, in one class.

Layout::

    run.yaml                          the run's spec (:class:`avsep.spec.RunSpec`)
    protocol.json                     the test mixtures
    tasks/TT/separator                the separator after task TT
    tasks/TT/strategy.safetensors     what the strategy keeps for the next task, where it keeps something
    tasks/TT/task.json                the task's record with the SHA-256 of its files, written last: a task without
                                      one is not finished
    state/                            the checkpoint that a resume goes on from
    memory/                           a store of the exemplars, and of the recordings to validate and test on, where the
                                      run carries them itself
    logs/                             train.csv, validation.csv and the loggers' own
    evaluation.json, report.html      once evaluated and reported
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from avsep.errors import CheckpointError, ConfigError, RunError
from avsep.files import entries, read_json, read_yaml, sha256_file, sweep, write_json, write_yaml
from avsep.spec import RunSpec, validated

__all__ = ["RunFolder", "TaskFolder"]


class TaskFolder:
    """The folder of one task of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.separator = path / "separator"
        self.strategy_file = path / "strategy.safetensors"
        self.record_file = path / "task.json"

    @property
    def is_finished(self) -> bool:
        """Whether the task has its record. What it lists may be lost or damaged: :meth:`check_files` finds out."""
        return self.record_file.is_file()

    def record(self) -> dict[str, Any]:
        """The task's record.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            found = read_json(self.record_file)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.record_file} is damaged: it is no record of a task; train the task again")
        return found

    def write_record(self, record: dict[str, Any]) -> None:
        """Write the record, with the SHA-256 of each file that the task has by now."""
        files = [p for p in (*sorted(self.separator.glob("[!.]*")), self.strategy_file) if p.is_file()]
        hashes = {p.relative_to(self.path).as_posix(): sha256_file(p) for p in files}
        write_json(self.record_file, {**record, "files": hashes})

    def check_files(self) -> None:
        """Hold the task's files against the hashes in its record; records of version 0.1 have none.

        Raises:
            CheckpointError: a file is missing or was changed since the task was finished.
        """
        hashes = self.record().get("files", {})
        if not isinstance(hashes, dict):
            raise CheckpointError(f"{self.record_file} is damaged: its files are no table; train the task again")
        for name, stated in hashes.items():
            file = self.path / name
            parts = Path(name).parts
            if "\0" in name or ".." in parts or Path(name).is_absolute() or len(name) > 200:
                raise CheckpointError(f"{self.record_file} is damaged: it lists {name[:60]!r}, which is no file of it")
            way_out = f"restore it from a copy, or remove {self.path} to learn that task again (avsep train --resume)"
            if not file.is_file():
                raise CheckpointError(f"a file of a finished task is missing: {file}; {way_out}")
            if sha256_file(file) != stated:
                raise CheckpointError(f"a file of a finished task is damaged: {file}; {way_out}")

    def remove_leftovers(self) -> None:
        """Remove what a kill left while the task was being written, by version 0.1 too."""
        for leftover in (*self.path.glob(".separator-*"), *self.path.glob(".strategy-*"), *self.path.glob(".task-*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        sweep(self.path)
        sweep(self.separator)


class RunFolder:
    """A run's folder, which need not be there yet."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.spec_file = self.path / "run.yaml"
        self.protocol_file = self.path / "protocol.json"
        self.evaluation_file = self.path / "evaluation.json"
        self.report_file = self.path / "report.html"
        self.state = self.path / "state"
        self.memory = self.path / "memory"
        self.logs = self.path / "logs"
        self.tasks = self.path / "tasks"

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_run(self) -> bool:
        """Whether there is a run."""
        return self.spec_file.is_file()

    def task(self, index: int) -> TaskFolder:
        return TaskFolder(self.tasks / f"{index:02d}")

    def require(self) -> None:
        """Raise :class:`RunError` where there is no run."""
        if not self.is_run:
            raise RunError(f"{self} is not a run folder: it has no run.yaml (see: avsep train --help)")

    def spec(self) -> RunSpec:
        """The run's spec.

        Raises:
            RunError: there is no run, or its spec is damaged.
        """
        self.require()
        try:
            return validated(RunSpec, read_yaml(self.spec_file), str(self.spec_file))
        except ConfigError as error:
            raise RunError(f"{error}; restore the file, or start another run") from None

    def store(self, spec: RunSpec | None = None) -> Path | None:
        """Where the run's store lies: in the run itself, where it carries its memory."""
        named = (self.spec() if spec is None else spec).store
        if named == self.memory.name:
            return self.memory
        return Path(named) if named else None

    def write_spec(self, spec: RunSpec) -> None:
        write_yaml(self.spec_file, spec.model_dump(mode="json"))

    def finished_tasks(self) -> list[int]:
        """Indices of the finished tasks, in order.

        Raises:
            RunError: there is no run, or none of its tasks is finished.
        """
        self.require()
        found = sorted(i for i, folder in self._task_folders() if folder.is_finished)
        if not found:
            raise RunError(f"{self} has no finished task yet: let avsep train go on (--resume)")
        return found

    def _task_folders(self) -> list[tuple[int, TaskFolder]]:
        return [(int(p.name), TaskFolder(p)) for p in self.tasks.glob("*") if p.name.isdigit()]

    def begun_tasks(self) -> int:
        """The number of tasks from the first on whose record is there."""
        count = 0
        while self.task(count).record_file.is_file():
            count += 1
        return count

    def remove_leftovers(self) -> None:
        """Remove what a kill left while a task was being written."""
        for place in (self.path, self.state, self.logs):
            sweep(place)
        for _, folder in self._task_folders():
            folder.remove_leftovers()

    def foreign_entry(self) -> str | None:
        """The name of something in the folder that is not this library's; None for an empty or missing folder."""
        return next(iter(entries(self.path)), None)

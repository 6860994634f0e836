"""Run folders: every path and file name of a run, in one class.

Layout::

    run.yaml                          the run's spec (:class:`avsep.spec.RunSpec`)
    protocol.json                     the test mixtures
    tasks/TT/separator                the separator after task TT
    tasks/TT/strategy.safetensors     what the strategy keeps for the next task, where it keeps something
    tasks/TT/task.json                the task's record, written last: a task without one is not finished
    state/                            the checkpoint that a resume goes on from
    logs/                             train.csv, validation.csv and the loggers' own
    evaluation.json, report.html      once evaluated and reported
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from avsep.errors import CheckpointError, ConfigError, RunError
from avsep.files import read_json, read_yaml, write_json, write_yaml
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
        return self.record_file.is_file() and self.separator.is_dir()

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
        write_json(self.record_file, record)

    def remove_leftovers(self) -> None:
        """Remove what a kill left while the task was being written."""
        for leftover in self.path.glob(".separator-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.path.glob(".strategy-*"):
            leftover.unlink()


class RunFolder:
    """A run's folder, which need not be there yet."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.spec_file = self.path / "run.yaml"
        self.protocol_file = self.path / "protocol.json"
        self.evaluation_file = self.path / "evaluation.json"
        self.report_file = self.path / "report.html"
        self.state = self.path / "state"
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
        for _, folder in self._task_folders():
            folder.remove_leftovers()

    def foreign_entry(self) -> str | None:
        """The name of something in the folder that is not this library's; None for an empty or missing folder."""
        found = sorted(p.name for p in self.path.iterdir() if p.name != ".lock") if self.path.is_dir() else []
        return found[0] if found else None

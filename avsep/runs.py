"""Run folders: what is in one, whoever asks."""

from __future__ import annotations

import os
from pathlib import Path

from avsep.errors import ConfigError, RunError
from avsep.io import read_yaml
from avsep.spec import RunSpec, validated

__all__ = ["finished_tasks", "read_run_spec", "separator_folder"]


def read_run_spec(run: str | Path) -> RunSpec:
    """The spec of a run folder; raises :class:`RunError` where the folder is not one."""
    path = Path(run) / "run.yaml"
    if not path.is_file():
        raise RunError(f"{run} is not a run folder: it has no run.yaml (see: avsep train --help)")
    try:
        return validated(RunSpec, read_yaml(path), str(path))
    except ConfigError as error:
        raise RunError(f"{error}; restore the file, or start another run") from None


def separator_folder(run: str | Path, task: int) -> Path:
    """Where the separator of a finished task lies."""
    return Path(run) / "tasks" / f"{task:02d}" / "separator"


def finished_tasks(run: str | os.PathLike[str]) -> list[int]:
    """Indices of a run's finished tasks, in order.

    Raises:
        RunError: the folder is not a run, or none of its tasks is finished.
    """
    folder = Path(run)
    if not (folder / "run.yaml").is_file():
        raise RunError(f"{run} is not a run folder: it has no run.yaml (see: avsep train --help)")
    found = sorted(
        int(p.parent.name)
        for p in folder.glob("tasks/*/task.json")
        if p.parent.name.isdigit() and (p.parent / "separator").is_dir()
    )
    if not found:
        raise RunError(f"{run} has no finished task yet: let avsep train go on (--resume)")
    return found

"""Run folders: what is in one, whoever asks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from avsep.data.protocol import Protocol
from avsep.data.store.files import Store
from avsep.errors import CheckpointError, ConfigError, DataError, RunError
from avsep.files import read_json, read_yaml
from avsep.spec import RunSpec, validated

if TYPE_CHECKING:
    from avsep.memory.base import Memory

__all__ = ["STRATEGY_FILE", "finished_tasks", "open_run_store", "read_exemplars", "read_run_spec", "separator_folder"]

STRATEGY_FILE = "strategy.safetensors"  # beside task.json, where the strategy keeps something for the next task


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


def read_exemplars(run: str | Path, task: int) -> Memory:
    """The memory after a finished task, by class.

    Raises:
        CheckpointError: the task's record is missing or damaged.
    """
    from avsep.memory.base import exemplars_from_plain

    path = separator_folder(run, task).with_name("task.json")
    try:
        record = read_json(path)
        return exemplars_from_plain(record["exemplars"] if isinstance(record, dict) else record, str(path))
    except KeyError:
        raise CheckpointError(f"{path} names no exemplars: it is damaged; train the task again") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


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


def open_run_store(run: Path, store: Store | str | Path | None, protocol: Protocol) -> Store:
    """The run's store, or ``store`` in its place; raises :class:`DataError` when it is not the one trained on."""
    spec = read_run_spec(run)
    if not isinstance(store, Store):
        where = store or spec.store
        if not where:
            raise RunError(f"{run} does not name its store: give it with --store")
        try:
            store = Store.open(where)
        except DataError as error:
            hint = "" if store else " (the run's own store; give another place with --store)"
            raise DataError(f"{error}{hint}") from None
    wanted = spec.store_hash or protocol.store_hash
    if store.content_hash != wanted:
        raise DataError(
            f"{store.path} is not the store {run} was trained on: its hash is {store.content_hash[:12]}, the run's "
            f"{wanted[:12]}; give the right one with --store"
        )
    return store

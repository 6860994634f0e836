"""What a run refers to: its store, and the exemplars that its memory kept."""

from __future__ import annotations

from pathlib import Path

from avsep.data.protocol import Protocol
from avsep.data.store.files import Store
from avsep.errors import CheckpointError, ConfigError, DataError, RunError
from avsep.memory.base import Memory, exemplars_from_plain
from avsep.runs.folder import RunFolder

__all__ = ["open_run_store", "read_exemplars"]


def read_exemplars(run: str | Path | RunFolder, task: int) -> Memory:
    """The memory after a finished task, by class.

    Raises:
        CheckpointError: the task's record is missing or damaged.
    """
    folder = RunFolder(run).task(task)
    try:
        return exemplars_from_plain(folder.record()["exemplars"], str(folder.record_file))
    except KeyError:
        raise CheckpointError(f"{folder.record_file} names no exemplars: it is damaged; train the task again") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def open_run_store(
    run: str | Path | RunFolder, store: Store | str | Path | None = None, protocol: Protocol | None = None
) -> Store:
    """The run's store, or ``store`` in its place.

    Raises:
        DataError: it is not the store that the run was trained on, or cannot be opened.
        RunError: the run names no store, and none is given.
    """
    folder = RunFolder(run)
    spec = folder.spec()
    if not isinstance(store, Store):
        where = store or spec.store
        if not where:
            raise RunError(f"{run} does not name its store: give it with --store")
        try:
            store = Store.open(where)
        except DataError as error:
            hint = "" if store else " (the run's own store; give another place with --store)"
            raise DataError(f"{error}{hint}") from None
    wanted = spec.store_hash or (protocol or Protocol.load(folder.protocol_file)).store_hash
    if store.content_hash != wanted:
        raise DataError(
            f"{store.path} is not the store {run} was trained on: its hash is {store.content_hash[:12]}, the run's "
            f"{wanted[:12]}; give the right one with --store"
        )
    return store

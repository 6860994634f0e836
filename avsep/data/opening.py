"""The store that a run was trained on."""

from __future__ import annotations

from pathlib import Path

from avsep.data.protocol import Protocol
from avsep.data.store.files import Store
from avsep.errors import DataError, RunError
from avsep.runs.folder import RunFolder

__all__ = ["open_run_store"]


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
        where = store or folder.store(spec)
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

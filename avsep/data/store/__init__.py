"""Stores: clips with their audio, frames and features, as files or in shards."""

from avsep.data.store.files import (
    SPLITS,
    Clip,
    OtherStoreError,
    Store,
    StoreWriter,
    add_features,
    remove_store,
    source_names,
    timelines_of,
)

__all__ = [
    "SPLITS",
    "Clip",
    "OtherStoreError",
    "Store",
    "StoreWriter",
    "add_features",
    "remove_store",
    "source_names",
    "timelines_of",
]

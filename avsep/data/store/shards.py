"""Shards: a store's files in a few plain tar files, for data sets that outgrow one disk or one folder.

Layout of a sharded store::

    manifest.json                the store's, in which each file's record has its ``shard`` and ``offset`` too, with
                                 ``shards`` (name, bytes, SHA-256) and ``shard_folders``, where to look for them
    shards/SPLIT-000000.tar      ID.audio.wav, ID.object.npy, ID.motion.npy, ID.features.NAME.npy and ID.json

Each shard is a WebDataset: members of one clip follow each other and share what stands before the first dot (a dot or
a percent sign of an id is written %2E and %25). Tars are not compressed, so :class:`~avsep.data.store.Store` reads any
crop by its offset from a memory map and needs no other package; ``webdataset`` streams them. Within a split, clips are
ordered by the SHA-256 of their ids, so that a stream meets the classes mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avsep.errors import DataError

__all__ = ["check_shards", "find_shards"]


def find_shards(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The shards' paths: each in the first of the folders that has it, or in the first one where none has."""
    folders = [path / folder for folder in manifest.get("shard_folders", ())]
    found = []
    for shard in manifest.get("shards", ()):
        places = [folder / shard["name"] for folder in folders]
        found.append(str(next((p for p in places if p.is_file()), places[0])))
    return found


def check_shards(where: Path, manifest: Mapping[str, Any]) -> None:
    """Raise :class:`DataError` where the manifest's list of shards, or a place in them, makes no sense."""
    shards, folders = manifest.get("shards", []), manifest.get("shard_folders", [])
    if not isinstance(folders, list) or not all(isinstance(f, str) and f for f in folders) or (shards and not folders):
        raise DataError(f"{where}: shard_folders must be a list of folders, not {folders!r}")
    if not isinstance(shards, list):
        raise DataError(f"{where}: shards must be a list, not {str(shards)[:60]!r}; make the store again")
    for shard in shards:
        name = shard["name"]
        if (
            not name.isprintable()
            or not name
            or Path(name).name != name
            or not _is_place(shard["bytes"])
            or not isinstance(shard["sha256"], str)
        ):
            raise DataError(f"{where}: damaged record of shard {name!r}; make the store again")
    for entry in manifest["clips"]:
        for kind, record in entry["files"].items():
            if "shard" not in record:
                continue
            number, offset = record["shard"], record["offset"]
            whole = _is_place(number) and _is_place(offset) and number < len(shards)
            if not whole or offset + record["bytes"] > shards[number]["bytes"]:
                raise DataError(
                    f"{where}: clip '{entry['id']}': its {kind} is said to lie at {offset!r} of shard {number!r}, "
                    f"where there is nothing; make the store again"
                )


def _is_place(value: object) -> bool:
    """Whether it can count shards or bytes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48

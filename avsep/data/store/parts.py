"""Clips of which only parts are kept: the crops of an exemplar, in the places that they have in the recording.

Such a clip has in the manifest its ``samples`` as ever, under ``parts`` by kind of file the ``[first, count]`` of the
samples or rows that are kept, one run after the other, and under ``rows`` by kind how many the whole has. It is read as
any other clip, where it is there; so a run that is trained on crops draws and reads the same, whether the whole
recording is at hand or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from avsep.errors import DataError

__all__ = ["ArrayInParts", "check_parts", "joined_parts", "place_in_parts"]


def joined_parts(parts: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Runs ``[first, count]`` in order, those that touch or overlap as one."""
    found: list[list[int]] = []
    for first, count in sorted(parts):
        if found and first <= sum(found[-1]):
            found[-1][1] = max(found[-1][1], first + count - found[-1][0])
        else:
            found.append([first, count])
    return found


def place_in_parts(parts: Sequence[Sequence[int]], first: int, count: int, otherwise: str) -> int:
    """Where in the file the ``count`` samples or rows from ``first`` on begin.

    Raises:
        DataError: they are not kept; with the text ``otherwise``.
    """
    before = 0
    for begin, length in parts:
        if begin <= first and first + count <= begin + length:
            return before + first - begin
        before += length
    if count == 0:
        return 0
    raise DataError(otherwise)


class ArrayInParts:
    """An array [rows, ...] of which some runs of rows are kept, one after the other in ``kept``."""

    def __init__(self, kept: Any, parts: Sequence[Sequence[int]], rows: int, otherwise: str) -> None:
        if len(kept) != sum(count for _, count in parts):
            raise ValueError(f"it has {len(kept)} rows, and its parts {sum(count for _, count in parts)}")
        self.kept = kept
        self._parts = parts
        self._otherwise = otherwise
        self.dtype = kept.dtype
        self.shape: tuple[int, ...] = (rows, *kept.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise DataError(self._otherwise)

    def __getitem__(self, rows: slice) -> np.ndarray:
        if not isinstance(rows, slice):
            raise DataError(self._otherwise)
        first, last, _ = rows.indices(len(self))
        place = place_in_parts(self._parts, first, last - first, self._otherwise)
        return np.asarray(self.kept[place : place + last - first])


def check_parts(where: str, entry: Mapping[str, Any]) -> None:
    """Raise :class:`DataError` where a clip's ``parts`` and ``rows`` are not what this module says."""
    if "parts" not in entry:
        return
    parts, rows = entry["parts"], entry.get("rows", {})
    whole = isinstance(parts, dict) and isinstance(rows, dict)
    for kind, runs in parts.items() if whole else ():
        size = entry["samples"] if kind == "audio" else rows.get(kind)
        whole = whole and kind in entry["files"] and _is_number(size) and isinstance(runs, list) and bool(runs)
        end = -1
        for run in runs if whole else ():
            pair = isinstance(run, list) and len(run) == 2 and all(map(_is_number, run))
            whole = whole and pair and run[0] > end and run[1] > 0 and sum(run) <= size
            end = sum(run) if pair else end
    if not whole:
        raise DataError(f"{where} has damaged parts: make the store again")


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

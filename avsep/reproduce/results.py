"""What is kept of a finished cell: one small JSON file, a line for each of its parts."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avsep.errors import ConfigError, DataError
from avsep.evaluation import comparison
from avsep.evaluation.evaluate import METRICS
from avsep.files import read_json, write_text
from avsep.reproduce.grid import Cell, identity_key

__all__ = ["CellResult", "ResultStore", "cell_record", "read_cell", "write_cell"]

_FORMAT = "avsep-cell"
_VERSION = 1
_DIGITS = 3  # of a score in dB


@dataclass(frozen=True)
class CellResult:
    """A finished cell: ``data`` as its file holds it (:func:`cell_record`), and where that is."""

    path: Path
    data: dict[str, Any]

    def final(self, metric: str) -> float | None:
        """The mean of a metric over the scored test mixtures of all tasks after the last one, in dB."""
        mean: float | None = self.data["final"][metric]
        return mean

    @property
    def validation(self) -> float:
        """The mean SDR of the last task's separator, as it is stored, on all validation mixtures, in dB."""
        return float(self.data["validation_sdr_db"])

    @property
    def seed(self) -> int:
        return int(self.data["seed"])

    @property
    def updates(self) -> int:
        """Optimisation steps of all tasks."""
        return sum(int(task["steps"]) for task in self.data["tasks"])

    @property
    def seconds(self) -> float:
        """What the cell cost, its share of a first task left out."""
        seconds = self.data["seconds"]
        return float(seconds["tasks"] + seconds["scoring"])

    @property
    def commits(self) -> tuple[str, ...]:
        """Every commit of the library that worked on the cell or on its first task."""
        return tuple(self.data.get("commits") or [str(self.data.get("commit", "unknown"))])

    @property
    def arithmetic(self) -> str:
        """What computed the cell, its software included: scores of other ones differ beyond the last digits, and are
        not set beside each other."""
        on = self.data.get("arithmetic") or [str(self.data.get("device", "unknown"))]
        return f"{' and '.join(on)}, torch {(self.data.get('software') or {}).get('torch', 'unknown')}"

    def scores(self) -> dict[str, Any]:
        """As :func:`avsep.evaluation.comparison.compact_evaluation` gives them."""
        packed = self.data["scores"]
        after = [{**step, "columns": _unpacked(step["columns"])} for step in packed["after"]]
        return {**packed, "after": after}

    def compared(self, method: str) -> comparison.Cell:
        """For :func:`avsep.evaluation.comparison.compare`."""
        return comparison.Cell(
            method=method,
            seed=int(self.data["seed"]),
            evaluation=self.scores(),
            memory_bytes=(self.data.get("memory") or {}).get("total"),
            seconds=self.seconds,
            name=str(self.path),
        )


def cell_record(cell: Mapping[str, Any], evaluation: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    """The content of a cell's file.

    ``key`` and ``identity`` (all that decides the result; the key is its hash), ``base``, ``row``, ``seed``;
    ``final``, the means over the scored test mixtures after the last task, and ``counts`` of mixtures then;
    ``scores``, every source's after every task (:func:`avsep.evaluation.comparison.compact_evaluation`, its columns
    packed); and ``more``: bytes of memory, seconds, commit, versions, machine. Without an ``evaluation``, of a cell
    that is not tested, there are no scores.
    """
    known = {"format": _FORMAT, "version": _VERSION, **cell}
    if evaluation is None:
        return {**known, "final": dict.fromkeys(METRICS), "counts": {}, **more, "scores": {"after": []}}
    last = evaluation["after"][-1]["all"]
    scores = _rounded(comparison.compact_evaluation(evaluation))
    for step in scores["after"]:
        step["columns"] = _packed(step["columns"])
    return {
        **known,
        "final": _rounded(last["mean"]),
        "counts": {k: last[k] for k in ("mixtures", "scored", "skipped", "silent_estimates", "degenerate")},
        **more,
        "scores": scores,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _packed(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Columns whose values repeat as pairs of value and count; the scores as they are."""
    runs = {name: [[v, len(list(same))] for v, same in itertools.groupby(values)] for name, values in columns.items()}
    # the mixtures are numbered in order: how many sources each has says it all
    runs["mixture"] = [[c, len(list(same))] for c, same in itertools.groupby(count for _, count in runs["mixture"])]
    return {name: list(values) if name in METRICS else runs[name] for name, values in columns.items()}


def _unpacked(columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    out = {
        name: values if name in METRICS else [v for v, count in values for _ in range(count)]
        for name, values in columns.items()
    }
    sizes = [size for size, count in columns["mixture"] for _ in range(count)]
    out["mixture"] = [number for number, size in enumerate(sizes) for _ in range(size)]
    return out


def write_cell(path: Path, record: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def cell_file(folder: Path, cell: Cell) -> Path:
    """Where a cell's result goes; the key alone decides, the rest is for people."""
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", cell.name)
    return folder / f"{name}-{cell.key}.json"


class ResultStore:
    """Finished cells of one or more folders, the first of which is written to. Files are read when asked for."""

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._read: dict[str, CellResult] = {}
        self._places = [folder, *(p / "cells" if (p / "cells").is_dir() else p for p in others)]
        for place in self._places[1:]:
            if not place.is_dir():
                raise DataError(f"there is no folder of results {place}: give one that avsep reproduce has written")
        self.refresh()

    def refresh(self) -> None:
        """Look again which files are there."""
        for place in reversed(self._places):
            for path in sorted(place.glob("*.json")) if place.is_dir() else ():
                stem, _, key = path.stem.rpartition("-")
                if stem and re.fullmatch("[0-9a-f]{16}", key):
                    self._paths[key] = path

    def __contains__(self, key: object) -> bool:
        return key in self._paths

    def get(self, key: str) -> CellResult | None:
        """A cell's result; None where there is none.

        Raises :class:`DataError` for a file that is damaged, or of another cell than it says.
        """
        if key not in self._paths:
            return None
        if key not in self._read:
            self._read[key] = read_cell(self._paths[key])
        return self._read[key]

    def passed_over(self, cells: Iterable[Cell]) -> list[Path]:
        """Results in the other folders that have the name of a cell that is not there, and another key: they are of
        other settings, data or version."""
        names = {self.path(cell).stem.rpartition("-")[0] for cell in cells if cell.key not in self}
        files = (path for place in self._places[1:] for path in sorted(place.glob("*.json")))
        return [path for path in files if path.stem.rpartition("-")[0] in names]

    def path(self, cell: Cell) -> Path:
        return cell_file(self.folder, cell)


def read_cell(path: Path) -> CellResult:
    """Read and check one file."""
    again = "remove it, and the cell is run again"
    try:
        data = read_json(path)
    except ConfigError as error:
        raise DataError(f"{error} ({again})") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise DataError(f"{path} is not the result of a cell ({again})")
    if data.get("version") != _VERSION:
        raise DataError(f"{path}: version {data.get('version')!r} is not {_VERSION}, the one known here ({again})")
    key = path.stem.rpartition("-")[2]
    if data.get("key") != key or identity_key(data.get("identity")) != key:
        raise DataError(f"{path} is the result of another spec than its name says: it was edited or renamed ({again})")
    try:
        result = CellResult(path, data)
        result.final("sdr"), result.scores(), result.seconds, result.validation
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged, {type(error).__name__} {error} ({again})") from None
    return result

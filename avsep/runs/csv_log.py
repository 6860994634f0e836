"""A CSV log that survives a kill and a resume."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from avsep.files import write_text

__all__ = ["CsvLog"]


class CsvLog:
    """Rows with ``task`` and ``step`` columns, appended and flushed one by one.

    Opening drops rows beyond ``until`` = (task, step), which a run wrote after the checkpoint it now resumes from, and
    a last line that a kill cut short. A new column rewrites the file with empty cells before it. ``found`` is the last
    (task, step) that stood there, (-1, -1) where nothing did.
    """

    def __init__(self, path: Path, until: tuple[int, int]) -> None:
        self.path = path
        self.columns: list[str] = []
        rows = []
        self.found = (-1, -1)
        if path.exists():
            # a damaged byte costs its row, and no run
            with open(path, encoding="utf-8", errors="replace", newline="") as file:
                reader = csv.DictReader(line.replace("\0", "") for line in file)
                self.columns = list(reader.fieldnames or [])
                whole = [r for r in reader if _whole(r, self.columns)]
            self.found = max([self.found, *((int(r["task"]), int(r["step"])) for r in whole)])
            rows = [r for r in whole if (int(r["task"]), int(r["step"])) <= until]
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, restval="", lineterminator="\n")
        if self.columns:
            writer.writeheader()
            writer.writerows(rows)
        write_text(self.path, buffer.getvalue())

    def write(self, row: dict[str, Any]) -> None:
        if new := [c for c in row if c not in self.columns]:
            with open(self.path, encoding="utf-8", errors="replace", newline="") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(
                {k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()}
            )


def _whole(row: dict[str, Any], columns: list[str]) -> bool:
    if len(row) != len(columns) or None in row.values() or any("\ufffd" in text for text in row.values()):
        return False
    return all(str(row.get(key, "")).isdecimal() and len(row[key]) < 19 for key in ("task", "step"))

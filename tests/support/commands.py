"""The command line, called from within."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from avsep.cli import main
from support.tones import TINY_TASKS

TASKS = ";".join(",".join(names) for names in TINY_TASKS)


def run(*argv: object) -> int:
    """The exit code of ``avsep ARGV``, in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return int(stop.value.code or 0)


def csv_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table, whose columns must be these."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == list(columns)
        return list(reader)

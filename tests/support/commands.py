"""The command line, called from within."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

from avsep.cli import main
from avsep.cli.app import build_app
from support.tones import TINY_TASKS

TASKS = ";".join(",".join(names) for names in TINY_TASKS)


def run(*argv: object) -> int:
    """The exit code of ``avsep ARGV``, in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return int(stop.value.code or 0)


def parse(*words: str) -> None:
    """Let the command line take ``avsep WORDS`` apart as it does before a command runs, and run nothing.

    Raises the command line's own error where a command or an option does not exist, or a value is missing or wrong.
    """
    command, name, parent = typer.main.get_command(build_app(words)), "avsep", None
    rest = list(words)
    while True:
        context = command.make_context(name, rest, parent=parent)
        if not hasattr(command, "commands"):
            return
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parent = context


def csv_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table, whose columns must be these."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == list(columns)
        return list(reader)

"""What commands say, in one way: ``--json``, ``--quiet`` and ``--verbose``.

Results go to standard output, everything else to standard error. Light: rich is loaded by what draws.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from avsep.progress import Progress

__all__ = ["Json", "Output", "Quiet", "Verbose", "link", "next_command", "tracebacks"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, and no tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what is wrong (with --json: and the result).")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say more, and of a mistake where in the code it was found.")
]

_verbose = False


class Output:
    """What a command has to say, and to whom.

    Raises:
        ConfigError: ``quiet`` and ``verbose``.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        from avsep.errors import ConfigError

        if quiet and verbose:
            raise ConfigError("--quiet and --verbose ask for opposite things: leave one out")
        global _verbose
        _verbose = verbose
        self.json = json
        self.quiet = quiet
        self.verbose = verbose

    @property
    def tells(self) -> bool:
        """Whether a person is to read the result."""
        return not (self.json or self.quiet)

    def say(self, text: str) -> None:
        """A line of the result, as a person reads it."""
        if self.tells:
            typer.echo(text)

    def show(self, table: Any) -> None:
        """A part of the result that rich draws."""
        if self.tells:
            self.console().print(table)

    def console(self, **options: Any) -> Console:
        """A console for the result, on which nothing is seen where no person is to read it."""
        from avsep.progress import terminal

        return terminal(quiet=not self.tells, **options)

    def note(self, text: str) -> None:
        """A line on what is good to know, on standard error."""
        if not self.quiet:
            typer.echo(text, err=True)

    def detail(self, text: str) -> None:
        """A line that ``--verbose`` asks for, on standard error."""
        if self.verbose:
            typer.echo(text, err=True)

    def wrong(self, text: str) -> None:
        """A line on what went wrong, though the command goes on; as the one line of a command that ends."""
        from avsep.progress import printable

        typer.echo(printable(f"avsep: {' '.join(text.split())}"), err=True)

    def result(self, value: Mapping[str, Any], *, in_a_line: bool = False) -> None:
        """The result as ``--json`` prints it: strict JSON, with null for what is no number."""
        if self.json:
            import json

            indent = None if in_a_line else 1
            typer.echo(json.dumps(_plain(value), indent=indent, allow_nan=False, default=str))

    def bars(self) -> AbstractContextManager[Progress]:
        """Progress bars, where they are wanted."""
        from avsep.progress import progress_bar

        return progress_bar(enabled=not self.quiet)


def tracebacks(wanted: bool | None = None) -> bool:
    """Whether ``--verbose`` was given; with ``wanted`` that is set."""
    global _verbose
    if wanted is not None:
        _verbose = wanted
    return _verbose


def link(path: str | os.PathLike[str]) -> str:
    """A path as it is printed: on a terminal one that can be clicked (OSC 8), elsewhere the text alone."""
    import sys

    from avsep.progress import printable

    text = printable(str(path))
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b]8;;{Path(path).absolute().as_uri()}\x1b\\{text}\x1b]8;;\x1b\\"


def next_command(*words: str | os.PathLike[str]) -> str:
    """``next: avsep evaluate runs/a``, to be copied into a shell: names with spaces stand in quotes."""
    import shlex

    from avsep.progress import printable

    return printable(f"next: avsep {shlex.join(map(str, words))}")


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and not hasattr(value, "__len__"):  # a number of NumPy's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

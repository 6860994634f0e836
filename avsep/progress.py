"""Progress bars: one look for every long command."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["Progress", "printable", "progress_bar", "terminal"]

# What makes a terminal do something, and what is no text: a name of a file or a class may hold any of it.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text as a terminal may have it: control characters and bytes that are no text stand as escapes."""
    return _UNPRINTABLE.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


def terminal(**options: Any) -> Console:
    """A console on which a text is what it says: brackets are no markup, colons no pictures, nothing is an escape."""
    from rich.console import Console

    class Terminal(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(printable(text), **how)

    return Terminal(**{"markup": False, "emoji": False, **options})


class Progress:
    """Bars of one long piece of work. Does nothing when made without a display (rich's)."""

    def __init__(self, display: Any = None) -> None:
        self._display = display

    @property
    def shown(self) -> bool:
        return self._display is not None

    def add(self, label: str, total: int | None, done: int = 0) -> int:
        if self._display is None:
            return 0
        self._display.start()  # does nothing the second time
        return int(self._display.add_task(printable(label), total=total, completed=done, note=""))

    def advance(self, bar: int, amount: int = 1, note: str | None = None) -> None:
        if self._display is not None:
            fields = {} if note is None else {"note": printable(note)}
            self._display.update(bar, advance=amount, **fields)

    def update(self, bar: int, done: int, total: int) -> None:
        """Set how far a bar is, for work that counts for itself."""
        if self._display is not None:
            self._display.update(bar, completed=done, total=total)

    def remove(self, bar: int) -> None:
        """Take a bar away."""
        if self._display is not None:
            self._display.remove_task(bar)

    def say(self, text: str) -> None:
        """A line of text above the bars."""
        if self._display is not None:
            self._display.console.print(text, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Progress]:
    """A live display on standard error with elapsed and remaining time; plain silence when not ``enabled``.

    It appears with the first bar and goes when there is an error, so that a mistake is one line alone.
    """
    if not enabled:
        yield Progress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    display = Display(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=18),  # all columns together fit into 80 characters
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=terminal(stderr=True),
    )
    try:
        yield Progress(display)
    except BaseException:
        display.live.transient = True
        raise
    finally:
        if display.live.is_started:
            display.stop()

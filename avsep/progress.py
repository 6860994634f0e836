"""Progress bars: one look for every long command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["Progress", "progress_bar"]


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
        return int(self._display.add_task(label, total=total, completed=done, note=""))

    def advance(self, bar: int, amount: int = 1, note: str | None = None) -> None:
        if self._display is not None:
            fields = {} if note is None else {"note": note}
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
            self._display.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Progress]:
    """A live display on standard error with elapsed and remaining time; plain silence when not ``enabled``.

    It appears with the first bar and goes when there is an error, so that a mistake is one line alone.
    """
    if not enabled:
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    display = Display(
        TextColumn("{task.description}"),
        BarColumn(bar_width=18),  # all columns together fit into 80 characters
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
    try:
        yield Progress(display)
    except BaseException:
        display.live.transient = True
        raise
    finally:
        if display.live.is_started:
            display.stop()

"""What is shown on a terminal is the text itself, whatever it holds."""

from __future__ import annotations

import io

import pytest

from avsep.progress import printable, terminal


@pytest.mark.parametrize("text", ["[/x]y", "[bold]", "a[link=http://x]b", ":smile:", "[0]", "\\[x]"])
def test_brackets_and_colons_are_text(text):
    from rich.table import Table

    out = io.StringIO()
    console = terminal(file=out, width=100)
    table = Table("class", title=f"of {text}")
    table.add_row(text)
    console.print(text)
    console.print(table)
    assert out.getvalue().count(text) == 3


def test_what_steers_a_terminal_is_shown_as_an_escape():
    text = "a\x1b]0;title\x07b\x9b2J\u202ec\udcff"
    assert printable(text) == "a\\x1b]0;title\\x07b\\x9b2J\\u202ec\\udcff"
    out = io.StringIO()
    terminal(file=out, width=200).print(text)
    assert out.getvalue() == printable(text) + "\n"
    assert printable("flûte 長笛\tx\ny") == "flûte 長笛\tx\ny"


def test_labels_of_bars_are_text(capsys):
    from avsep.progress import progress_bar

    with progress_bar() as bars:
        bar = bars.add("[/x]y", total=1)
        bars.advance(bar, note="[red]")
        bars.say("[/]")
    shown = capsys.readouterr().err
    assert "[/x]y" in shown
    assert "[red]" in shown

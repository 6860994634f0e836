"""Run cases, show what came out, and keep it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avsep.benchmarks.measure import Case, CheckFailed, append_rows, check_results, measure_case
from avsep.benchmarks.plot import plot_rows, require_matplotlib
from avsep.progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_rows", "run_cases"]


def run_cases(
    cases: Iterable[Case],
    *,
    repeats: int,
    out: str | Path,
    plot: str | Path | None = None,
    console: Console | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure the cases one after another; each case's rows are printed and appended to ``out`` when it is done.

    Args:
        repeats: of each variant.
        out: a CSV file; made where it is missing.
        plot: a picture to draw of these cases.

    Raises:
        ConfigError: ``out`` is another kind of file; said before anything is measured.
        MissingExtraError: ``plot`` is asked for and matplotlib is not installed; likewise.
        CheckFailed: after the last case, when variants of any did not agree; no speed of those is shown or kept.
    """
    from rich.text import Text

    from avsep.progress import printable, terminal

    console = console or terminal()
    check_results(out)
    if plot is not None:
        require_matplotlib()
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    with progress_bar(progress) as bars:
        for case in cases:
            try:
                found = measure_case(case, repeats, bars)
            except CheckFailed as error:
                refused.append(str(error))
                console.print(Text.assemble(("refused", "red"), f": {printable(str(error))}"))
                continue
            append_rows(out, found)
            rows += found
            print_rows(console, case.title, found)
    if rows and plot is not None:
        plot_rows(rows, plot)
    if refused:
        raise CheckFailed("; ".join(refused))
    return rows


def print_rows(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One case as a table, with what was run, and where, above and below it."""
    from rich import box
    from rich.table import Table

    first = rows[0]
    console.print(f"\n{first['case']}: {title}", highlight=False, style="bold")
    console.print(f"{first['settings']}; {first['repeats']} repeats", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
    for heading in ("variant", "median ms", "20 %", "80 %", f"{first['item']}s/s", "peak MB", "ratio"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        peak = row["peak_memory_mb"]
        times = [f"{row[key]:,.1f}" for key in ("median_ms", "p20_ms", "p80_ms")]
        speed, ratio = f"{row['per_second']:,.4g}", f"{row['ratio']:.2f}x"
        table.add_row(row["variant"], *times, speed, "" if peak == "" else f"{peak:,.0f}", ratio)
    console.print(table)
    where = f"{first['device']}, {first['threads']} threads"
    if first["load"] != "":
        where += f", load {first['load']}"
    console.print(f"checked: {first['check']}\n{where}", highlight=False)

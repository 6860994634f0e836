"""``avsep compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, link

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from avsep.evaluation.comparison import Cell, Comparison, Estimate


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Evaluated run folders; those that differ by the seed alone are one method."
        ),
    ],
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Method the others' differences are to, as the table calls it.")
    ] = None,
    joint: Annotated[
        list[Path] | None,
        typer.Option(
            "--joint", help="Run of joint training, for intransigence; again for every seed [default: those among RUN]."
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write all numbers as CSV.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the tables and the picture.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw averages and curves (.png, .svg, .pdf).")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare evaluated runs: means over seeds, 95 % intervals, differences to a baseline, and the settings in which
    the runs differ. Where there are too few test mixtures there are no intervals."""
    from avsep.evaluation.comparison import cells_of_runs, compare, differing_settings, with_enough_mixtures
    from avsep.evaluation.comparison_page import csv_text, draw, require_dependencies, write_page
    from avsep.files import write_text
    from avsep.progress import terminal

    output = Output(json=json, quiet=quiet, verbose=verbose)
    require_dependencies(plot, html)
    cells = cells_of_runs(runs)
    result = with_enough_mixtures(compare(cells, baseline=baseline, joint=_bounds(runs, joint, cells)))
    settings = differing_settings(runs)
    output.result({**result.as_dict(), "differing_settings": settings})
    if output.tells:
        print_comparison(terminal(), result)
        _print_settings(terminal(), settings)
    if csv is not None:
        write_text(csv, csv_text(result))
    if plot is not None:
        draw(result, plot)
    if html is not None:
        write_page(result, html)
    for path in (csv, plot, html):
        if path is not None:
            output.say(f"written: {link(path)}")


def _print_settings(console: Console, settings: dict[str, dict[str, str]]) -> None:
    """What else the methods differ in, a line a setting."""
    if not settings:
        return
    console.print("beside their strategies the runs differ in:")
    for key, by_method in settings.items():
        if len(set(by_method.values())) == 1:
            told = f"{next(iter(by_method.values()))}, among the runs of one method"
        else:
            told = "; ".join(f"{value} ({method})" for method, value in by_method.items())
        console.print(f"  {key}: {told}")


def _bounds(runs: list[Path], joint: list[Path] | None, cells: list[Cell]) -> list[Cell]:
    """The runs of joint training: those that are named, else those among the runs, where all have one separator."""
    from avsep.errors import RunError
    from avsep.evaluation.comparison import cells_of_runs
    from avsep.runs.folder import RunFolder

    def separator(run: Path) -> dict[str, object]:
        return RunFolder(run).spec().separator.model_dump(exclude={"num_classes", "classes"})

    if joint is None:
        if any(separator(run) != separator(runs[0]) for run in runs[1:]):
            return []
        return [c for run, c in zip(runs, cells, strict=True) if RunFolder(run).spec().strategy_name == "joint"]
    for bound in joint:
        for run in runs:
            if separator(bound) != separator(run):
                raise RunError(
                    f"{bound} trained another separator than {run}, so it is no upper bound of it: compare the runs of "
                    f"one separator at a time"
                )
    return cells_of_runs(joint)


def print_comparison(console: Console, result: Comparison) -> None:
    """The comparison as tables."""
    from avsep.evaluation.comparison_page import NAMES, bytes_text, caption, interval_text, minutes_text

    console.print(caption(result))
    table = _table("SDR in dB after the last task: average over tasks")
    for heading in ("method", "seeds", f"average [{result.confidence:.0%}]"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    if result.baseline is not None:
        table.add_column(f"less {result.baseline}", justify="right")
    table.add_column("memory", justify="right")
    table.add_column("minutes", justify="right")
    for method in result.methods:
        cells = [method.method, str(len(method.seeds)), interval_text(method.values.get("average"))]
        if result.baseline is not None:
            cells.append(interval_text(method.differences.get("average"), signed=True))
        table.add_row(*cells, bytes_text(method.memory_bytes), minutes_text(method.seconds))
    table.add_section()
    for method in result.yardsticks:
        cells = [method.method, "", interval_text(method.values.get("average"))]
        if result.baseline is not None:
            cells.append(interval_text(method.differences.get("average"), signed=True))
        table.add_row(*cells, "", "")
    console.print(table)

    measures = ("forgetting", "bwt", "intransigence", "staleness", "fwt")
    shown = [n for n in measures if any(n in m.values for m in result.methods)]
    tasks = [f"task-{j}" for j in range(len(result.tasks))]
    table = _table("SDR in dB on each task's test mixtures after the last task")
    table.add_column("method")
    for name in (*shown, *tasks):
        table.add_column(NAMES.get(name, name.replace("-", " ")), justify="right")
    for method in result.methods:
        table.add_row(method.method, *(_number(method.values.get(n)) for n in (*shown, *tasks)))
    table.add_section()
    for method in result.yardsticks:
        table.add_row(method.method, *(_number(method.values.get(n)) for n in (*shown, *tasks)))
    console.print(table)

    table = _table("dB over the sources of all test mixtures after the last task")
    table.add_column("method")
    metrics = [n for n in NAMES if any(n in m.values for m in result.methods) and n not in ("average", *shown)]
    counts = {"scored": "scored", "skipped": "skipped", "degenerate": "degen."}
    for heading in (*(NAMES[n] for n in metrics), *counts.values()):
        table.add_column(heading, justify="right")
    for method in result.methods:
        numbers = [_number(method.values.get(n)) for n in metrics]
        table.add_row(method.method, *numbers, *(f"{method.counts[n]:.4g}" for n in counts))
    table.add_section()
    for method in result.yardsticks:
        table.add_row(method.method, *(_number(method.values.get(n)) for n in metrics), "", "", "")
    console.print(table)
    _print_lists(console, result)
    _print_dependence(console, result)


def _print_lists(console: Console, result: Comparison) -> None:
    """SDR on the lists apart; they are many, so that they are the rows."""
    from avsep.evaluation.comparison_page import lists_apart

    names = lists_apart(result)
    if not names:
        return
    shown = (*result.methods, *result.yardsticks)
    table = _table("SDR in dB on the lists apart, after the last task")
    for heading in ("method", *(str(number) for number in range(1, len(names) + 1))):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in shown:
        table.add_row(method.method, *(_number(method.values.get(f"list:{name}")) for name in names))
    console.print(table)
    console.print("; ".join(f"{number}: {name}" for number, name in enumerate(names, start=1)))


def _print_dependence(console: Console, result: Comparison) -> None:
    from avsep.evaluation.visual_dependence import HEADINGS

    if not any(method.dependence for method in result.methods):
        return
    table = _table("Change of SDR in dB when the pictures are other ones, after the last task")
    for heading in ("method", "list", *HEADINGS.values()):
        table.add_column(heading, justify="left" if heading in ("method", "list") else "right")
    for method in result.methods:
        for place, (name, changes) in enumerate(method.dependence.items()):
            cells = [f"{round(changes[key], 2) + 0.0:+.2f}" if key in changes else "" for key in HEADINGS]
            table.add_row("" if place else method.method, name, *cells)
    console.print(table)


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _number(value: Estimate | None) -> str:
    return "" if value is None else f"{round(value.mean, 2) + 0.0:.2f}"  # + 0.0: no minus before a zero

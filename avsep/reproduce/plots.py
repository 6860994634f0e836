"""Pictures of tables: dots with intervals, and curves over tasks or exemplars."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from avsep.evaluation.comparison import Estimate
from avsep.files import atomic_path, write_text
from avsep.reproduce.grid import BASE_TITLES
from avsep.reproduce.tables import Line, Table, csv_rows, markdown, published

__all__ = ["plot_table", "write_table"]

_OURS, _PAPER = "tab:blue", "0.55"


def write_table(table: Table, folder: Path, *, plot: bool = True) -> list[Path]:
    """Write ``NAME.csv``, ``NAME.md`` and, where matplotlib is installed, ``NAME.png``; returns what was written."""
    rows = csv_rows(table)
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["table"]  # lists apart are of some rows
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    written = [folder / f"{table.name}.csv", folder / f"{table.name}.md"]
    write_text(written[0], buffer.getvalue())
    write_text(written[1], markdown(table))
    if plot and any(line.ours for lines in table.lines.values() for line in lines):
        written.append(folder / f"{table.name}.png")
        plot_table(table, written[-1])
    return written


def plot_table(table: Table, path: Path) -> None:
    """Draw a table or figure; needs matplotlib. The paper's numbers, of other data, stand in panels of their own."""
    from matplotlib.figure import Figure

    bases = list(table.lines)
    with_paper = any(line.paper for lines in table.lines.values() for line in lines)
    if table.steps:
        figure, shown = _curves(Figure, table, bases), ""
    elif table.name in ("figure4", "table3"):
        figure, shown = _sizes(Figure, table, bases, with_paper), "; band: 95% interval"
    else:
        figure, shown = _dots(Figure, table, bases, with_paper), "; lines: 95% intervals, strokes: seeds"
    figure.suptitle(f"{table.title}\nours: {table.heading}{shown}", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Software": None})  # the same bytes from the same numbers


def _titles(base: str) -> tuple[str, str]:
    name = BASE_TITLES.get(base, base)
    return f"{name}, ours", f"{name}, paper ({published()['data_set']})"


def _dots(figure_class: Any, table: Table, bases: list[str], with_paper: bool) -> Any:
    control = next((x.label for lines in table.lines.values() for x in lines if x.row == table.control), "")
    columns = 1 + bool(control) + with_paper
    rows = max(len(lines) for lines in table.lines.values())
    width = max(3.6 * columns + 2, 7.2)  # of one panel: as wide as the title
    figure = figure_class(figsize=(width, (0.28 * rows + 0.9) * len(bases) + 0.6), layout="constrained")
    panels = figure.subplots(len(bases), columns, squeeze=False, sharey="row")
    for base, line_of_panels in zip(bases, panels, strict=True):
        lines = table.lines[base]
        twice = {x.label for x in lines if sum(x.label == other.label for other in lines) > 1}
        labels = [_label(x) if x.label in twice else x.label for x in lines]
        ours = line_of_panels[0]
        name, paper = _titles(base)
        titles = {0: (name, "SDR, dB")}
        for place, line in enumerate(lines):
            if line.ours is not None and "sdr" in line.ours.values:
                _dot(ours, place, line.ours.values["sdr"])
        if control:
            titles[1] = (f"less {control}, by seed and mixture", "difference of SDR, dB")
            line_of_panels[1].axvline(0, color="0.5", lw=0.8)
            for place, line in enumerate(lines):
                if line.ours is not None and "sdr" in line.ours.differences:
                    _dot(line_of_panels[1], place, line.ours.differences["sdr"])
        if with_paper:
            titles[columns - 1] = (paper, "SDR, dB")
            for place, line in enumerate(lines):
                if line.paper:
                    line_of_panels[-1].plot([line.paper[0]], [place], "s", color=_PAPER, ms=5)
        for number, (title, unit) in titles.items():
            panel = line_of_panels[number]
            panel.set_title(title, fontsize=9, loc="left")
            panel.set_xlabel(unit, fontsize=8)
            panel.set_yticks(range(len(lines)), labels, fontsize=8)
            panel.grid(axis="x", lw=0.4, alpha=0.6)
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
        ours.invert_yaxis()
    return figure


def _dot(panel: Any, place: int, value: Estimate) -> None:
    panel.plot([value.low, value.high], [place, place], color=_OURS, lw=1.5)
    panel.plot(value.per_seed, [place] * len(value.per_seed), "|", color="0.3", ms=5)
    panel.plot([value.mean], [place], "o", color=_OURS, ms=5)


def _curves(figure_class: Any, table: Table, bases: list[str]) -> Any:
    metrics = (("sdr", "SDR"), ("sir", "SIR"), ("sar", "SAR"))
    colours: dict[str, str] = {}  # one a strategy, with memory or without
    figure = figure_class(figsize=(11, 3.4 * len(bases) + 0.5), layout="constrained")
    panels = figure.subplots(len(bases), 3, squeeze=False)
    for base, row in zip(bases, panels, strict=True):
        for panel, (metric, title) in zip(row, metrics, strict=True):
            for line in table.lines[base]:
                if line.ours is None or metric not in line.ours.curves:
                    continue
                curve = line.ours.curves[metric]
                steps = range(1, len(curve) + 1)
                style = "-" if _has_memory(line) else ":" if line.row != "joint" else "--"
                colour = colours.setdefault(line.row.partition("+")[0], f"C{len(colours) % 10}")
                panel.plot(
                    steps, [v.mean for v in curve], style, marker="o", ms=3, lw=1.4, color=colour, label=_label(line)
                )
            panel.set_title(f"{BASE_TITLES.get(base, base)}, {title}", fontsize=9, loc="left")
            panel.set_xlabel("tasks learned", fontsize=8)
            panel.set_ylabel("dB, all classes seen", fontsize=8)
            panel.set_xticks(range(1, len(table.tasks) + 1))
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
        handles, labels = row[-1].get_legend_handles_labels()
        if handles:
            row[-1].legend(handles, labels, fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _sizes(figure_class: Any, table: Table, bases: list[str], with_paper: bool) -> Any:
    control = next((x.label for lines in table.lines.values() for x in lines if x.row == table.control), "")
    columns = 1 + bool(control) + with_paper
    figure = figure_class(figsize=(4.4 * columns + 0.6, 3.2 * len(bases) + 0.5), layout="constrained")
    panels = figure.subplots(len(bases), columns, squeeze=False)
    for base, row in zip(bases, panels, strict=True):
        with_scores = [x for x in table.lines[base] if x.ours is not None and "sdr" in x.ours.values]
        sizes = [_size(x) for x in with_scores]
        _band(row[0], [(_size(x), x.ours.values["sdr"]) for x in with_scores if x.ours is not None])
        name, paper = _titles(base)
        titles = [name]
        if control:
            # what seeds have in common is in the first panel's band, and not in this one's
            paired = [
                (_size(x), x.ours.differences["sdr"]) for x in with_scores if x.ours and "sdr" in x.ours.differences
            ]
            row[1].axhline(0, color="0.5", lw=0.8)
            _band(row[1], paired)
            titles.append(f"less {control}, by seed and mixture")
        if with_paper:
            printed = [(k, v[0]) for k, v in ((_number(name), v) for name, v in _printed(base).items())]
            row[-1].plot([k for k, _ in printed], [v for _, v in printed], "s-", color=_PAPER, ms=4)
            titles.append(paper)
        for panel, title in zip(row, titles, strict=True):
            panel.set_title(title, fontsize=9, loc="left")
            panel.set_xlabel("exemplars a class, K", fontsize=8)
            panel.set_ylabel("difference of SDR, dB" if title.startswith("less ") else "SDR, dB", fontsize=8)
            panel.set_xscale("log")
            ticks = [_number(name) for name in _printed(base)] if panel is row[-1] and with_paper else sizes
            panel.set_xticks(ticks, [str(k) for k in ticks])
            panel.minorticks_off()
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
    return figure


def _band(panel: Any, values: list[tuple[int, Any]]) -> None:
    sizes = [k for k, _ in values]
    panel.plot(sizes, [v.mean for _, v in values], "o-", color=_OURS, ms=4)
    panel.fill_between(sizes, [v.low for _, v in values], [v.high for _, v in values], color=_OURS, alpha=0.2)


def _has_memory(line: Line) -> bool:
    return line.memory not in ("", "none")


def _label(line: Line) -> str:
    return line.label + (", memory" if _has_memory(line) else "")


def _printed(base: str) -> dict[str, Any]:
    printed: dict[str, Any] = published()["table3"].get(base, {})
    return printed


def _number(row: str) -> int:
    return int(row.removeprefix("K="))


def _size(line: Line) -> int:
    return _number(line.row)

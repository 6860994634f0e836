"""A comparison of methods as CSV, as a picture and as an HTML page."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from avsep.data.protocol import APART
from avsep.errors import ConfigError, MissingExtraError
from avsep.evaluation.comparison import Comparison, Difference, Estimate, MethodResult
from avsep.evaluation.visual_dependence import CHANGES, HEADINGS
from avsep.files import atomic_path, csv_cell, write_text

__all__ = [
    "NAMES",
    "bytes_text",
    "caption",
    "csv_text",
    "draw",
    "interval_text",
    "lists_apart",
    "minutes_text",
    "render_page",
    "require_dependencies",
    "write_page",
]

NAMES = {
    "average": "average",
    "forgetting": "forgetting",
    "bwt": "backward",
    "intransigence": "intransig.",
    "staleness": "staleness",
    "fwt": "forward",
    "sdr": "SDR",
    "sir": "SIR",
    "sar": "SAR",
    "sdri": "SDRi",
    "si_sdr": "SI-SDR",
    "released_sdr": "SDR+d",
    "released_sir": "SIR+d",
    "released_sar": "SAR+d",
}
"""Headings; ``+d``: with the degenerate mixtures, as the published numbers are made."""

_FORMATS = (".png", ".svg", ".pdf")


def require_dependencies(plot: Path | None, page: Path | None = None) -> None:
    """Say before anything is computed what a picture or a page lacks."""
    if plot is not None and plot.suffix.lower() not in _FORMATS:
        raise ConfigError(f"cannot draw {plot}: name it {', '.join(plot.stem + suffix for suffix in _FORMATS)}")
    for package, wanted in (("matplotlib", plot or page), ("jinja2", page)):
        if wanted is not None:
            try:
                __import__(package)
            except ImportError:
                raise MissingExtraError(package, "report", "the picture" if page is None else "the page") from None


# --- numbers as text --------------------------------------------------------------------------------------------------


def caption(comparison: Comparison) -> str:
    """What was compared, on what, in a sentence or two."""
    seeds = sorted({len(m.seeds) for m in comparison.methods})
    text = (
        f"Protocol {comparison.protocol} version {comparison.protocol_version} ({comparison.protocol_hash[:12]}), "
        f"store {comparison.store_hash[:12]}, {len(comparison.tasks)} tasks, counted from 0. "
    )
    if not _has_intervals(comparison):
        scored = min(method.counts["scored"] for method in comparison.methods)
        return f"{text}No intervals: {scored:.4g} scored test mixtures are too few for them."
    text += f"Intervals: {comparison.confidence:.0%}, bootstrap over test clips, with Student's t for the seeds"
    if seeds[0] == 1:
        text += "; with one seed they cover the choice of test clips alone"
    if comparison.baseline is not None:
        text += f". *: the interval of the difference to {comparison.baseline} leaves out 0"
    return text + "."


def _has_intervals(comparison: Comparison) -> bool:
    return all(math.isfinite(method.values["average"].low) for method in comparison.methods)


def interval_text(value: Estimate | None, *, signed: bool = False) -> str:
    """``7.33 [7.02, 7.61]``; a difference that is significant gets a star. Without an interval the mean alone."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    if not math.isfinite(value.low):
        return f"{round(value.mean, 2) + 0.0:{sign}.2f}"
    mean, low, high = (f"{round(v, 2) + 0.0:{sign}.2f}" for v in (value.mean, value.low, value.high))
    star = " *" if isinstance(value, Difference) and value.significant else ""
    return f"{mean} [{low}, {high}]{star}"


def lists_apart(comparison: Comparison) -> list[str]:
    """The lists of test mixtures that are in no mean over all, where any run was scored on such."""
    return [name for name in APART if any(f"list:{name}" in m.values for m in comparison.methods)]


def bytes_text(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f} MB"


def minutes_text(value: float | None) -> str:
    return "" if value is None else f"{value / 60:.1f}"


def csv_text(comparison: Comparison) -> str:
    """One line a method and measure: seeds, mean, interval, and the difference to the baseline with its own.

    Measures by step are called ``sdr@0`` and so on, the changes of SDR with other pictures ``pictures:headline:still``
    and so on; these, bytes, seconds (their median) and counts have a mean alone.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    difference = ("difference", "difference_low", "difference_high", "significant")
    writer.writerow(("method", "measure", "seeds", "mean", "low", "high", *difference))
    for method in (*comparison.methods, *comparison.yardsticks):
        values = dict(method.values)
        for name, curve in method.curves.items():
            values |= {f"{name}@{t}": value for t, value in enumerate(curve)}
        for name, value in values.items():
            row = [
                csv_cell(method.method),
                name,
                len(value.per_seed),
                *map(_digits, (value.mean, value.low, value.high)),
            ]
            if other := method.differences.get(name):
                known = math.isfinite(other.low)
                row += [*map(_digits, (other.mean, other.low, other.high)), str(other.significant).lower() * known]
            writer.writerow(row + [""] * (10 - len(row)))
        for name, number in (
            ("memory_bytes", method.memory_bytes),
            ("seconds", method.seconds),
            *method.counts.items(),
            *((f"pictures:{of}:{key}", value) for of, line in method.dependence.items() for key, value in line.items()),
        ):
            if number is not None:
                writer.writerow([csv_cell(method.method), name, len(method.seeds), f"{number:.10g}", *[""] * 6])
    return buffer.getvalue()


def _digits(value: float) -> str:
    return f"{value:.6f}" if math.isfinite(value) else ""


# --- the picture ------------------------------------------------------------------------------------------------------

_COLOURS = ("#2456c7", "#c8501e", "#1a8768", "#9a3fa5", "#8a6700", "#5d6066", "#0b7285", "#b23a6a")
_ON_DARK = ("#7ea6ff", "#ff9466", "#58c9a5", "#d890e2", "#dcb64a", "#a3a7ae", "#5cc8de", "#f08cb4")
_MARKERS = "os^Dv"
# The grounds and greys of parts.html.
_DARK = {"back": "#1b1d20", "text": "#ecebe8", "soft": "#a3a7ae", "line": "#33363b"}


def _style(number: int, dark: bool = False) -> tuple[str, str]:
    """Colour and marker of a method: together they differ for as many as are ever compared."""
    colours = _ON_DARK if dark else _COLOURS
    return colours[number % len(colours)], _MARKERS[number // len(colours) % len(_MARKERS)]


def _settings(dark: bool) -> dict[Any, Any]:
    """matplotlib's, for a dark ground."""
    if not dark:
        return {}
    grounds = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), _DARK["back"])
    texts = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _DARK["text"])
    return {**grounds, **texts, "axes.edgecolor": _DARK["soft"], "grid.color": _DARK["line"]}


def draw(comparison: Comparison, target: Path | IO[bytes], *, dark: bool = False, narrow: bool = False) -> None:
    """Averages with their intervals, a line a method, beside the average after every task; ``narrow``: above it."""
    import matplotlib

    with matplotlib.rc_context(_settings(dark)):
        _draw(comparison, target, dark, narrow)


def _draw(comparison: Comparison, target: Path | IO[bytes], dark: bool, narrow: bool) -> None:
    from matplotlib.figure import Figure

    methods = comparison.methods
    steps = len(comparison.tasks)
    height = max(3.6, 1.6 + 0.42 * len(methods))
    soft = _DARK["soft"] if dark else "0.4"
    figure = Figure(figsize=(5, height + 3.6) if narrow else (11, height), layout="constrained")
    if narrow:
        dots, curves = figure.subplots(2, 1, height_ratios=(height, 3.6))
    else:
        dots, curves = figure.subplots(1, 2, width_ratios=(1, 1))
    for number, method in enumerate(methods):
        colour, marker = _style(number, dark)
        value = method.values["average"]
        dots.plot([value.low, value.high], [number, number], color=colour, lw=2, solid_capstyle="butt")
        dots.plot(value.per_seed, [number] * len(value.per_seed), "|", color=colour, ms=9, mew=1, alpha=0.6)
        dots.plot([value.mean], [number], marker, color=colour, ms=7)
        curve = method.curves["average"]
        places = [t + _offset(number, len(methods)) for t in range(len(curve))]
        curves.plot(places, [v.mean for v in curve], color=colour, marker=marker, ms=5, lw=1.5)
        curves.vlines(places, [v.low for v in curve], [v.high for v in curve], color=colour, lw=1, alpha=0.7)
    for yardstick in comparison.yardsticks[:2]:  # the ideal mask is far away
        dots.axvline(yardstick.values["average"].mean, color="0.5", lw=1, ls=":")
        dots.annotate(
            yardstick.method,
            (yardstick.values["average"].mean, 0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 3),
            textcoords="offset points",
            rotation=90,
            fontsize=7,
            color=soft,
        )
    dots.set_yticks(range(len(methods)), [""] * len(methods) if narrow else [m.method for m in methods])
    for label, number in zip(dots.get_yticklabels(), range(len(methods)), strict=True):
        label.set_color(_style(number, dark)[0])
    for number, method in enumerate(methods) if narrow else ():  # above its line, where there is no room beside it
        name = textwrap.shorten(method.method, 56, placeholder=" …")
        where = {"xycoords": ("axes fraction", "data"), "va": "bottom", "annotation_clip": False}
        dots.annotate(name, (0.02, number - 0.2), color=_style(number, dark)[0], fontsize=9, **where)
    dots.set_ylim(len(methods) - 0.5, -0.8 if narrow else -0.5)
    dots.set_xlabel("SDR in dB")
    dots.set_title("Average over tasks, after the last one", loc="left", fontsize=11)
    curves.set_xticks(range(steps))
    curves.set_xlim(-0.4, steps - 0.6)
    curves.set_xlabel("after task")
    curves.set_ylabel("SDR in dB, average so far")
    curves.set_title("Task after task", loc="left", fontsize=11)
    for panel, axis in ((dots, "x"), (curves, "y")):
        panel.grid(axis=axis, lw=0.5, alpha=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    seeds = {len(m.seeds) for m in methods}
    count = (
        f"{min(seeds)} seed{'s' if max(seeds) > 1 else ''}"
        if len(seeds) == 1
        else f"{min(seeds)} to {max(seeds)} seeds"
    )
    figure.supxlabel(
        f"{count} (strokes), bars: {comparison.confidence:.0%} intervals;{chr(10) if narrow else ' '}"
        f"protocol {comparison.protocol} version {comparison.protocol_version} ({comparison.protocol_hash[:12]})",
        fontsize=8,
        color=soft,
    )
    if isinstance(target, Path):
        with atomic_path(target) as temporary:
            figure.savefig(temporary, dpi=150)
    else:
        figure.savefig(target, dpi=150, format="png")


def _offset(number: int, count: int) -> float:
    """A small step aside, so that the intervals of several methods do not cover one another."""
    return min(0.03, 0.3 / count) * (number - (count - 1) / 2)


# --- the page ---------------------------------------------------------------------------------------------------------


_MOST_COLUMNS = 6  # of numbers side by side; a table of more is written as several


def render_page(comparison: Comparison) -> str:
    """One HTML text that needs no network. Raises MissingExtraError without Jinja2 or matplotlib."""
    require_dependencies(None, Path("page"))
    import avsep
    from avsep.evaluation.drawing import template_environment

    names = [n for n in NAMES if any(n in m.values for m in comparison.methods)]
    return str(
        template_environment()
        .get_template("comparison.html")
        .render(
            comparison=comparison,
            caption=caption(comparison),
            picture=lambda **how: _picture(comparison, **how),
            names={n: NAMES[n] for n in names},
            lists=lists_apart(comparison),
            changes=CHANGES,
            headings=HEADINGS,
            colours=_COLOURS,
            on_dark=_ON_DARK,
            apart=_apart,
            interval=interval_text,
            difference=_difference,
            bytes_text=bytes_text,
            minutes=minutes_text,
            version=avsep.__version__,
        )
    )


def _picture(comparison: Comparison, **how: bool) -> str:
    picture = io.BytesIO()
    draw(comparison, picture, **how)
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode('ascii')}"


def _apart(columns: Mapping[str, str]) -> list[dict[str, str]]:
    """Columns by key in as few groups as need be, of about one size."""
    count = max(1, math.ceil(len(columns) / _MOST_COLUMNS))
    edges = [round(k * len(columns) / count) for k in range(count + 1)]
    return [dict(itertools.islice(columns.items(), low, high)) for low, high in itertools.pairwise(edges)]


def _difference(method: MethodResult, name: str) -> str:
    return interval_text(method.differences.get(name), signed=True)


def write_page(comparison: Comparison, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name the page, for example {path / 'comparison.html'}")
    write_text(path, render_page(comparison))

"""Pictures of benchmark rows."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avsep.errors import MissingExtraError
from avsep.files import atomic_path

if TYPE_CHECKING:
    from avsep.benchmarks.separators import Found

__all__ = ["plot_presets", "plot_rows", "require_matplotlib"]


def require_matplotlib() -> None:
    """Raise :class:`MissingExtraError` where matplotlib is missing, before minutes of measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "the plot") from None


def plot_rows(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """One panel a case: a bar a variant, as long as its median, with the 20 and 80 percentiles; needs matplotlib."""
    from matplotlib.figure import Figure

    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    bars = [len(variants) for variants in cases.values()]
    figure = Figure(figsize=(8, 0.9 * len(cases) + 0.42 * sum(bars) + 0.4), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=[n + 1.2 for n in bars])[:, 0]
    for panel, (name, variants) in zip(panels, cases.items(), strict=True):
        medians = [float(v["median_ms"]) for v in variants]
        below = [float(v["median_ms"]) - float(v["p20_ms"]) for v in variants]
        above = [float(v["p80_ms"]) - float(v["median_ms"]) for v in variants]
        places = range(len(variants))
        panel.barh(places, medians, xerr=[below, above], color=["0.7"] + ["tab:blue"] * (len(variants) - 1), capsize=3)
        reach = max(m + a for m, a in zip(medians, above, strict=True))
        for place, variant, end in zip(
            places, variants, (m + a for m, a in zip(medians, above, strict=True)), strict=True
        ):
            median = float(variant["median_ms"])
            label = f"{median:,.1f} ms" if median >= 10 else f"{median:.3g} ms"
            label += f", {float(variant['ratio']):.2f}x"
            panel.text(end + 0.015 * reach, place, label, va="center", fontsize=8)
        panel.set_yticks(list(places), [v["variant"] for v in variants])
        panel.invert_yaxis()
        panel.set_xlim(0, 1.3 * reach)
        title = textwrap.fill(f"{name} ({variants[0]['settings']})", 100)
        panel.set_title(title, fontsize=8, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms, median with 20 and 80 percentiles")
    first = rows[0]
    figure.suptitle(f"{first['device']}, {first['threads']} threads, torch {first['torch']}", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_presets(found: Sequence[Found], path: str | Path) -> None:
    """A line a measure in dB, on it a dot a preset with its interval; needs matplotlib."""
    from matplotlib.figure import Figure

    shown = [one for one in found if one.unit == "dB"]
    measures = list(dict.fromkeys(one.measure for one in shown))
    presets = list(dict.fromkeys(one.preset for one in shown))
    figure = Figure(figsize=(9, 0.3 * len(measures) + 1.2), layout="constrained")
    panel = figure.subplots()
    for number, preset in enumerate(presets):
        mine = [one for one in shown if one.preset == preset]
        places = [measures.index(one.measure) + 0.6 * ((number + 0.5) / len(presets) - 0.5) for one in mine]
        means = [one.value.mean for one in mine]
        errors = [
            [mean - one.value.low for mean, one in zip(means, mine, strict=True)],
            [one.value.high - mean for mean, one in zip(means, mine, strict=True)],
        ]
        panel.errorbar(means, places, xerr=errors, fmt="o", markersize=4, capsize=2, label=preset)
    panel.axvline(0, color="0.6", linewidth=0.8)
    panel.set_yticks(range(len(measures)), measures, fontsize=8)
    panel.set_ylim(len(measures) - 0.5, -0.5)
    panel.grid(axis="y", color="0.92")
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.set_xlabel("dB; SDR over the mixture where nothing else is said")
    figure.legend(loc="outside upper left", ncols=len(presets), frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)

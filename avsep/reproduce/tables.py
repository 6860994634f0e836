"""What came out of a grid beside what the paper printed: CSV, Markdown, and a place in a page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from avsep.errors import ConfigError
from avsep.evaluation.comparison import (
    Comparison,
    Difference,
    Estimate,
    MethodResult,
    clips_of_protocol,
    compare,
    holm,
)
from avsep.evaluation.continual import area_under_memory_curve
from avsep.evaluation.visual_dependence import CHANGES, HEADINGS
from avsep.files import read_yaml, write_text
from avsep.reproduce.dataset import BENCHMARK
from avsep.reproduce.grid import BASE_TITLES, CROSSSDC, HYPOTHESES, Grid
from avsep.reproduce.preset import Hypothesis
from avsep.reproduce.results import CellResult, ResultStore

__all__ = [
    "Line",
    "Table",
    "build_table",
    "cells_beside",
    "markdown",
    "places_in",
    "published",
    "render_into",
    "stars",
    "table_rows",
]

TITLES = {
    "table1": "Table 1: methods",
    "table2": "Table 2: ContAV-Sep's terms",
    "table3": "Table 3: exemplars a class",
    "figure3": "Figure 3: methods after every task",
    "figure4": "Figure 4: exemplars a class",
    "budget": "Methods at one budget of bytes",
    CROSSSDC: "Why CrossSDC costs or helps",
}
_PAPER_TABLE = {"figure3": "table1", "figure4": "table3"}
_LEVEL = 0.05
_SHOWN = ("sdr", "sir", "sar")
_CONTINUAL = ("average", "forgetting", "bwt", "intransigence", "staleness", "fwt")
_RELEASED = ("released_sdr", "released_sir", "released_sar")  # with degenerate pairs, where the protocol has such
CONTROL = {
    "table1": "finetune+memory",
    "table2": "mask",
    "table3": "K=1",
    "figure3": "finetune+memory",
    "figure4": "K=1",
    "budget": "finetune+bytes",
    CROSSSDC: "mask",
}
"""The row that the others' differences are to: in table 1 plain replay, which the paper leaves out."""


@cache
def published() -> dict[str, Any]:
    """The paper's numbers with their source."""
    data: dict[str, Any] = read_yaml(Path(__file__).with_name("published.yaml"))
    return data


@dataclass(frozen=True)
class Line:
    """One method on one base separator: ``ours`` over the seeds that are finished, ``paper`` SDR, SIR and SAR.

    ``updates`` are the optimisation steps of a run; ``p_holm`` is the p value of the difference in SDR, corrected for
    all differences that the table shows on this base.
    """

    row: str
    label: str
    memory: str
    ours: MethodResult | None
    paper: tuple[float, float, float] | None
    missing: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    updates: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Table:
    """A finished or partly finished table; ``seeds`` and ``lines`` by base separator, ``notes`` what must be said of
    it; ``screened`` where not every row is to have all seeds."""

    name: str
    title: str
    data_set: str
    preset: str
    seeds: dict[str, tuple[int, ...]]
    lines: dict[str, tuple[Line, ...]]
    control: str
    protocol: str
    notes: tuple[str, ...] = ()
    tasks: tuple[tuple[str, ...], ...] = field(default=())
    screened: bool = False

    @property
    def steps(self) -> bool:
        """Whether it shows every step, instead of the last one."""
        return self.name == "figure3"

    @property
    def most_seeds(self) -> int:
        return max(map(len, self.seeds.values()), default=0)

    @property
    def commits(self) -> tuple[str, ...]:
        """Of the code that made the cells."""
        return tuple(dict.fromkeys(c for lines in self.lines.values() for line in lines for c in line.commits))

    @property
    def heading(self) -> str:
        """What keeps these numbers from being taken for the paper's."""
        counts = {base: len(seeds) for base, seeds in self.seeds.items()}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{BASE_TITLES.get(base, base)} {_seeds(count)}" for base, count in counts.items())
        else:
            said = _seeds(self.most_seeds)
        return f"{self.data_set}, preset {self.preset}, {said}"


def build_table(
    grid: Grid,
    name: str,
    results: ResultStore,
    *,
    data_set: str,
    preset: str,
    failed: Mapping[str, str] | None = None,
    resamples: int = 10_000,
    title: str = "",
    control: str = "",
    hypotheses: Sequence[Hypothesis] = (),
) -> Table:
    """Gather a table from the finished cells; ``failed`` says by key why others are not. ``title``, ``control`` and
    ``hypotheses`` are of a table that is not the paper's."""
    control = control or CONTROL[name]
    failed = failed or {}
    printed = published().get(_PAPER_TABLE.get(name, name), {})
    lines: dict[str, tuple[Line, ...]] = {}
    alone = []
    clips = {stream.protocol.hash: clips_of_protocol(stream.protocol) for stream in grid.streams.values()}
    for base, rows in grid.rows[name].items():
        found, missing = cells_beside(grid, name, base, results, failed)
        comparison = _compared(found, control, clips, resamples)
        if found and control not in found and name != "figure3":
            alone.append(
                f"{BASE_TITLES.get(base, base)}: no differences, as no cell of the control, {control}, is there."
            )
        made = []
        tested = {
            row.name: comparison[row.name].differences["sdr"].p
            for row in rows
            if comparison is not None and row.name in found and "sdr" in comparison[row.name].differences
        }
        corrected = holm(tested)
        for row in rows:
            numbers = printed.get(base, {}).get(row.name)
            made.append(
                Line(
                    row=row.name,
                    label=row.label,
                    memory=_memory(row.memory),
                    ours=comparison[row.name] if comparison is not None and row.name in found else None,
                    paper=None if numbers is None else tuple(numbers),
                    missing=tuple(missing.get(row.name, ())),
                    commits=tuple(dict.fromkeys(c for r in found.get(row.name, ()) for c in r.commits)),
                    updates=_mean([r.updates for r in found.get(row.name, ())]),
                    p_holm=corrected.get(row.name),
                )
            )
        lines[base] = tuple(made)
    return Table(
        name=name,
        title=title or TITLES[name],
        data_set=data_set,
        preset=preset,
        seeds={base: _seeds_of(grid, name, base) for base in lines},
        lines=lines,
        control=control,
        protocol=f"{grid.stream.protocol.name} version {grid.stream.protocol.version}",
        notes=(
            *grid.notes.get(name, ()),
            *alone,
            *(_over_memory(lines) if name in ("table3", "figure4") else ()),
            *_found(grid, name, HYPOTHESES if name == CROSSSDC else hypotheses, results, clips, resamples),
        ),
        tasks=tuple(t.classes for t in grid.stream.tasks),
    )


def _seeds_of(grid: Grid, name: str, base: str) -> tuple[int, ...]:
    keys = [key for row in grid.rows[name][base] for key in grid.keys(name, base, row.name)]
    return tuple(dict.fromkeys(grid.cells[key].seed for key in keys))


def cells_beside(
    grid: Grid, name: str, base: str, results: ResultStore, failed: Mapping[str, str] | None = None
) -> tuple[dict[str, list[CellResult]], dict[str, list[str]]]:
    """By row the cells that may be set beside each other, and why others are missing: not run, or computed on
    something else than most of their seed."""
    found: dict[str, list[CellResult]] = {}
    missing: dict[str, list[str]] = {}
    chosen = _arithmetic_of_seeds(grid, name, base, results)
    for row in grid.rows[name][base]:
        for key in grid.keys(name, base, row.name):
            result, seed = results.get(key), grid.cells[key].seed
            if result is None:
                missing.setdefault(row.name, []).append(f"seed {seed}: {(failed or {}).get(key, 'not run')}")
            elif result.arithmetic != chosen[seed]:
                missing.setdefault(row.name, []).append(
                    f"seed {seed}: it is of {result.arithmetic}, and the seed's others of {chosen[seed]}"
                )
            else:
                found.setdefault(row.name, []).append(result)
    return found, missing


def _arithmetic_of_seeds(grid: Grid, name: str, base: str, results: ResultStore) -> dict[int, str]:
    """On what most cells of each seed were computed: differences between methods are taken within it alone."""
    found: dict[int, Counter[str]] = {}
    for row in grid.rows[name][base]:
        for key in grid.keys(name, base, row.name):
            if (result := results.get(key)) is not None:
                found.setdefault(grid.cells[key].seed, Counter())[result.arithmetic] += 1
    return {seed: counts.most_common(1)[0][0] for seed, counts in found.items()}


def _over_memory(lines: Mapping[str, Sequence[Line]]) -> list[str]:
    """What the sizes of memory come to together, by base separator; nothing before two of them are finished."""
    notes = []
    for base, of_base in lines.items():
        done = [m for line in of_base if (m := line.ours) is not None and m.memory_bytes and "sdr" in m.values]
        kept = [m.memory_bytes or 0.0 for m in done]
        if len(set(kept)) > 1:
            area = area_under_memory_curve(kept, [m.values["sdr"].mean for m in done])
            notes.append(
                f"{BASE_TITLES.get(base, base)}: the mean of the SDR over the logarithm of the bytes kept, from "
                f"{min(kept) / 1e6:.2f} to {max(kept) / 1e6:.2f} MB, is {area:.2f} dB (area under the memory curve)."
            )
    return notes


def _compared(
    found: Mapping[str, Sequence[CellResult]], control: str, clips: dict[str, Any], resamples: int
) -> Comparison | None:
    cells = [result.compared(name) for name, members in found.items() for result in members]
    if not cells:
        return None
    joint = [c for c in cells if c.method == "joint"]
    baseline = control if control in found else None
    return compare(cells, baseline=baseline, joint=joint, clips=clips, orders=len(clips) > 1, resamples=resamples)


def _found(
    grid: Grid,
    table: str,
    hypotheses: Sequence[Hypothesis],
    results: ResultStore,
    clips: dict[str, Any],
    resamples: int,
) -> list[str]:
    """A line for each hypothesis: what was predicted, and what was found, after the first task and at the end."""
    said = []
    for base in grid.rows[table]:
        cells, _ = cells_beside(grid, table, base, results)
        differences: dict[str, tuple[Difference, Difference]] = {}
        for one in hypotheses:
            pair = {key: cells[key] for key in (one.row, one.against) if key in cells}
            if len(pair) == 2:
                made = _compared(pair, one.against, clips, resamples)
                found = made[one.row].differences if made is not None else {}
                if "sdr" in found:
                    differences[one.name] = (found["first"], found["sdr"])
        # over all of them, whether they have been run or not
        corrected = holm({h.name: differences[h.name][1].p if h.name in differences else 1.0 for h in hypotheses})
        for one in hypotheses:
            line = (
                f"{BASE_TITLES.get(base, base)}, {one.name}, {one.row} against {one.against}: predicted "
                f"{one.predicted} ({one.why}); "
            )
            if one.name not in differences:
                said.append(line + "not run.")
                continue
            start, end = differences[one.name]
            verdict = "not told from 0"
            if end.significant:
                sign = "+" if end.mean > 0 else "-"
                opposite = "not as predicted" if one.predicted == "0" else "the opposite"
                verdict = "as predicted" if sign == one.predicted else opposite
                verdict += "" if corrected[one.name] < _LEVEL else ", but not after Holm's correction"
            said.append(
                line + f"found {end.mean:+.2f} dB [{end.low:+.2f}, {end.high:+.2f}] at the end and {start.mean:+.2f} "
                f"[{start.low:+.2f}, {start.high:+.2f}] after the first task, {len(end.per_seed)} seeds: {verdict}."
            )
    return said


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _memory(memory: Any) -> str:
    if memory is None:
        return ""
    params = memory.params
    size = f"{params['per_class']} a class" if "per_class" in params else str(params.get("total", ""))
    size += " crops" if params.get("keep") == "clip" else ""
    how = "" if memory.name in ("random_per_class", "none") else memory.name.replace("_", " ")
    return ", ".join(part for part in (size.strip(), how) if part) or "none"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """The table as Markdown, one block a base separator, with a heading that says what data it is of."""
    counts = {base: len(seeds) for base, seeds in table.seeds.items()}
    ours = f"Ours: {table.heading}."
    if any(line.paper for lines in table.lines.values() for line in lines) and not table.steps:
        ours += f" Paper: {published()['data_set']}, one seed."
        if table.data_set == BENCHMARK:
            ours += " The two are of different data and sizes: set only the order of the methods side by side."
    out = [f"**{table.title}.** {ours}"]
    for base, lines in table.lines.items():
        out += ["", f"*{BASE_TITLES.get(base, base)}*", ""]
        out += (_steps_block if table.steps else _block)(table, base)
        out += [] if table.steps else _more_block(lines)
    control = next((x.label for lines in table.lines.values() for x in lines if x.row == table.control), "")
    what = "after the last task, " if not table.steps else ""
    single = [BASE_TITLES.get(base, base) for base, count in counts.items() if count == 1]
    covers = "choice of test clips and seeds"
    if single:
        of_some = f", on {' and '.join(single)}" if len(single) < len(counts) else ""
        covers = f"{covers + of_some + ' ' if of_some else ''}choice of test clips alone, not of the seed"
    legend = (
        f"dB {what}mean over seeds and the sources of all test mixtures of the classes seen, [95% interval: {covers}]"
    )
    if control and not table.steps:
        legend += (
            f"; difference: SDR less that of {control}, paired by seed and mixture, [95% interval], * where that "
            "leaves out 0, ** where it does so after Holm's correction for the number of differences"
        )
    if not table.steps:
        legend += "; kept: what persists from task to task, in 10^6 bytes"
        shown = [line.ours for lines in table.lines.values() for line in lines if line.ours]
        if any(key.startswith("list:") for ours in shown for key in ours.values):
            legend += "; same class, three, background: SDR of separate lists of mixtures, which are not in the mean"
        if any(ours.dependence.get("headline") for ours in shown):
            legend += "; pictures: the change of SDR with such pictures in place of the right ones"
        legend += "; core s: of a run beyond its first task, with scoring, the median over seeds"
    if any(_silent(line) for lines in table.lines.values() for line in lines):
        legend += "; silent: mixtures, on average over seeds, that are left out because an estimate is silent"
    out += ["", f"{legend}. Protocol {table.protocol}."]
    out += table.notes
    for base, lines in table.lines.items():
        for line in lines:
            reasons = [reason for reason in line.missing if not (table.screened and reason.endswith(": not run"))]
            out += [f"Missing: {BASE_TITLES.get(base, base)}, {line.label}, {reason}" for reason in reasons]
    out.append(f"Commit {', '.join(table.commits) or 'none'}.")
    return "\n".join(out) + "\n"


def _header(names: Sequence[str]) -> list[str]:
    return [
        "| " + " | ".join(names) + " |",
        "|" + "|".join("---" if n in ("method", "memory") else "---:" for n in names) + "|",
    ]


def _block(table: Table, base: str) -> list[str]:
    lines = table.lines[base]
    memories = len({line.memory for line in lines}) > 1
    printed = any(line.paper for line in lines)
    steps = len({line.updates for line in lines}) > 1
    names = ["method", *(["memory"] if memories else []), "kept, MB", *(["updates"] if steps else [])]
    names += ["SDR", "difference", "SIR", "SAR", "forgetting"]
    out = _header([*names, *(["paper SDR", "paper SIR", "paper SAR"] if printed else [])])
    for line in lines:
        cells = [line.label, *([line.memory] if memories else [])]
        if line.ours is None:
            cells += [""] * (6 + steps)
        else:
            values, difference = line.ours.values, line.ours.differences.get("sdr")
            kept = line.ours.memory_bytes
            cells.append("" if kept is None else f"{kept / 1e6:.2f}")
            cells += [f"{line.updates:g}"] if steps else []
            cells.append(_interval(values.get("sdr")) + _partly(table.seeds[base], line) + _silent(line))
            cells.append(_difference(difference, len(line.ours.seeds), line.p_holm))
            cells += [_number(values.get(k)) for k in ("sir", "sar", "forgetting")]
        if printed:
            cells += [f"{v:.2f}" for v in line.paper] if line.paper else [""] * 3
        out.append("| " + " | ".join(cells) + " |")
    return out


def _more_block(lines: Sequence[Line]) -> list[str]:
    """What else is known of each row: what was learned later, before and beside, lists apart, other pictures, costs."""
    values: dict[str, list[float | None]] = {}
    for key, heading in _MORE.items():
        found = [None if x.ours is None else x.ours.values.get(key) for x in lines]
        values[heading] = [None if v is None else v.mean for v in found]
    for key in CHANGES:
        of_lines = [{} if x.ours is None else x.ours.dependence.get("headline", {}) for x in lines]
        values[f"{HEADINGS[key]} pictures"] = [of.get(key) for of in of_lines]
    values["core s"] = [None if x.ours is None else x.ours.seconds for x in lines]
    shown = [heading for heading, column in values.items() if any(v is not None for v in column)]
    if not shown:
        return []
    out = ["", *_header(["method", *shown])]
    for number, line in enumerate(lines):
        cells = [values[heading][number] for heading in shown]
        texts = [
            "" if v is None else f"{_plain(v):.0f}" if h == "core s" else f"{_plain(v):.2f}"
            for h, v in zip(shown, cells, strict=True)
        ]
        out.append("| " + " | ".join([line.label, *texts]) + " |")
    return out


_MORE = {
    "intransigence": "intransigence",
    "staleness": "staleness",
    "fwt": "forward transfer",
    "list:same-class": "same class",
    "list:three": "three",
    "list:background": "background",
}


def _steps_block(table: Table, base: str) -> list[str]:
    """SDR after every task; SIR and SAR stand in the CSV file."""
    out = _header(["method", "memory", *(f"SDR after task {t}" for t in range(len(table.tasks)))])
    for line in table.lines[base]:
        curve = line.ours.curves.get("sdr", ()) if line.ours else ()
        cells = [_number(v) for v in curve[:-1]] + [_interval(v) + _partly(table.seeds[base], line) for v in curve[-1:]]
        out.append("| " + " | ".join([line.label, line.memory, *(cells or [""] * len(table.tasks))]) + " |")
    return out


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def _partly(seeds: Sequence[int], line: Line) -> str:
    return f" ({len(line.ours.seeds)} of {_seeds(len(seeds))})" if line.ours and line.missing else ""


def _silent(line: Line) -> str:
    count = line.ours.counts.get("silent_estimates", 0) if line.ours else 0
    return f" ({count:g} silent)" if count else ""


def _difference(value: Difference | None, seeds: int, p_holm: float | None) -> str:
    if value is None:
        return ""
    both = len(value.per_seed)
    partly = f" ({both} of {seeds} seeds)" if both < seeds else ""
    return (
        f"{_plain(value.mean):+.2f} [{_plain(value.low):.2f}, {_plain(value.high):.2f}]{stars(value, p_holm)}{partly}"
    )


def stars(value: Difference, p_holm: float | None) -> str:
    """One where the interval leaves out 0, two where it does so after Holm's correction."""
    return "*" * (value.significant + (value.significant and p_holm is not None and p_holm < _LEVEL))


def _number(value: Estimate | None) -> str:
    return "" if value is None else f"{_plain(value.mean):.2f}"


def _interval(value: Estimate | None) -> str:
    return "" if value is None else f"{_plain(value.mean):.2f} [{_plain(value.low):.2f}, {_plain(value.high):.2f}]"


def _plain(value: float) -> float:
    return round(value, 2) + 0.0  # no minus before a zero


# --- files ------------------------------------------------------------------------------------------------------------


def csv_rows(table: Table) -> list[dict[str, Any]]:
    """One row a method and base: every measure with its interval, its difference to the control, and the paper's."""
    rows = []
    for base, lines in table.lines.items():
        for line in lines:
            row: dict[str, Any] = {
                "table": table.name,
                "data_set": table.data_set,
                "preset": table.preset,
                "base": base,
                "row": line.row,
                "method": line.label,
                "memory": line.memory,
                "seeds": len(line.ours.seeds) if line.ours else 0,
                "protocol": table.protocol,
                "commit": " ".join(line.commits),
            }
            for metric in (*_SHOWN, "sdri", "si_sdr", *_CONTINUAL, *_RELEASED):
                value = line.ours.values.get(metric) if line.ours else None
                parts = (None, None, None) if value is None else (value.mean, value.low, value.high)
                row |= {f"{metric}{end}": _text(v) for end, v in zip(("", "_low", "_high"), parts, strict=True)}
            for metric in _SHOWN:
                difference = line.ours.differences.get(metric) if line.ours else None
                parts = (None, None, None)
                if difference is not None:
                    parts = (difference.mean, difference.low, difference.high)
                row |= {
                    f"{metric}_difference{end}": _text(v) for end, v in zip(("", "_low", "_high"), parts, strict=True)
                }
            for step in range(len(table.tasks)):
                for metric in _SHOWN:
                    curve = line.ours.curves.get(metric) if line.ours else None
                    row[f"{metric}_after_task_{step}"] = _text(curve[step].mean if curve else None)
            apart = {} if line.ours is None else {k: v for k, v in line.ours.values.items() if k.startswith("list:")}
            row |= {k.replace("list:", "sdr_of_"): _text(v.mean) for k, v in apart.items()}
            changed = {} if line.ours is None else line.ours.dependence
            row |= {f"{key}_pictures_{where}": _text(v) for where, of in changed.items() for key, v in of.items()}
            counts = line.ours.counts if line.ours else {}
            row |= {k: counts.get(k, "") for k in ("scored", "skipped", "silent_estimates", "degenerate")}
            sdr = line.ours.differences.get("sdr") if line.ours else None
            row |= {"sdr_difference_p": _text(sdr.p if sdr else None), "sdr_difference_p_holm": _text(line.p_holm)}
            row |= {"updates": "" if line.updates is None else f"{line.updates:g}"}
            row |= {"core_seconds": _text(line.ours.seconds if line.ours else None)}
            row["memory_bytes"] = (line.ours.memory_bytes if line.ours else None) or ""
            row |= dict(zip((f"paper_{m}" for m in _SHOWN), line.paper or ("", "", ""), strict=True))
            rows.append(row)
    return rows


_WORDS = ("table", "data_set", "preset", "base", "row", "method", "memory", "protocol", "commit")


def table_rows(table: Table) -> list[dict[str, Any]]:
    """:func:`csv_rows` with numbers that are numbers, and None where there is none."""
    return [
        {
            key: value if key in _WORDS else None if value == "" else float(value) if isinstance(value, str) else value
            for key, value in row.items()
        }
        for row in csv_rows(table)
    ]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def places_in(page: Path, names: Sequence[str]) -> list[str]:
    """Which of the tables have a place in a Markdown page: between the lines ``<!-- reproduce:NAME -->`` and
    ``<!-- /reproduce:NAME -->``.

    Raises :class:`ConfigError` where the page cannot be read or has a place for none of them.
    """
    text = _page(page)
    found = [name for name in names if _place(name).search(text)]
    if not found:
        raise ConfigError(
            f"{page} has no place for {' or '.join(names)}: put the lines <!-- reproduce:{names[0]} --> and "
            f"<!-- /reproduce:{names[0]} --> where the table shall stand"
        )
    return found


def render_into(page: Path, table: Table) -> None:
    """Put a table into its place in a Markdown page (:func:`places_in`)."""
    begin, end = f"<!-- reproduce:{table.name} -->", f"<!-- /reproduce:{table.name} -->"
    write_text(page, _place(table.name).sub(lambda _: f"{begin}\n{markdown(table)}{end}", _page(page)))


def _place(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- reproduce:{name} -->.*?<!-- /reproduce:{name} -->", re.DOTALL)


def _page(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {page}: {error}") from None

"""Several methods, each trained with several seeds, side by side: means, intervals and paired differences.

:func:`compare` takes plain data, one :class:`Cell` a run::

    compact_evaluation(evaluation) -> dict           # of evaluation.json; smaller, and enough for all below
    Cell(method, seed, evaluation, memory_bytes=None, seconds=None, name="")  # evaluation: whole or compact
    cells_of_runs(folders) -> list[Cell]             # of evaluated run folders; methods named after what they differ in
    clips_of_protocol(protocol) -> dict              # which clips are in each mixture, for compact evaluations
    compare(cells, *, baseline=None, joint=(), clips=None, orders=False, ...) -> Comparison
    Comparison.methods: tuple[MethodResult, ...]     # in the order of the cells; as_dict() is JSON
    MethodResult.values["average" | "forgetting" | "bwt" | "sdr" | "task-0" | ...] -> Estimate (mean, low, high)
    MethodResult.differences[...] -> Difference (mean, low, high, p, significant), to the baseline
    holm({name: p}) -> {name: p}                     # corrected for their number
    Comparison.yardsticks: tuple[MethodResult]   # the mixture, the static filter, the ideal mask, like methods

Intervals are percentile intervals of a paired bootstrap over test clips, widened by what seeds change. The test
mixtures are the same frozen lists for every seed and method, and a clip is in several of them: mixtures drawn as if
they were independent would make the intervals too narrow. So a resample draws the clips of each class anew, once for
all methods and seeds, and a mixture counts as often as its clips were drawn, their numbers multiplied (Owen, The
pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007; on the wide side, as is shown there). Where the clips are
not known, mixtures are drawn within their lists.

Three seeds are too few to resample: in one of 27 resamples it is the lowest alone. Of S seeds with the standard
deviation s, to each resample is added s / sqrt(S) times Student's t with S - 1 degrees of freedom, as the mean of few
normal numbers differs from its expectation. Differences are paired by seed and mixture. With one seed the interval
covers the choice of test clips alone. Where every seed has a class order of its own (``orders=True``), what the order
changes is in the seeds' deviation: an interval then covers it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from avsep.data.protocol import APART, Protocol
from avsep.errors import RunError, UnknownNameError, near_matches
from avsep.evaluation.continual import (
    Interval,
    average,
    backward_transfer_per_task,
    forgetting_per_task,
    intransigence,
    percentile_interval,
    resampling_weights,
    staleness,
)
from avsep.evaluation.evaluate import current_evaluation
from avsep.evaluation.scores import METRICS, beside_tasks, is_counted, is_headline, rows_of_task, summarise
from avsep.evaluation.visual_dependence import CHANGES
from avsep.evaluation.yardsticks import YARDSTICKS, rows_of_yardstick
from avsep.registry import MEMORIES, STRATEGIES, Registry
from avsep.runs.folder import RunFolder
from avsep.spec import ComponentRef, RunSpec

__all__ = [
    "Cell",
    "Comparison",
    "Difference",
    "Estimate",
    "MethodResult",
    "cells_of_runs",
    "clips_of_protocol",
    "compact_evaluation",
    "compare",
    "differing_settings",
    "holm",
    "with_enough_mixtures",
]

_Array = NDArray[np.float64]
_Clips = Mapping[tuple[str, int], tuple[tuple[str, str], ...]]
_COLUMNS = ("list", "mixture", "task", "status", "degenerate", "ill_conditioned", *METRICS)
_KNOTS = 500
_HALVINGS = 40
_COUNTS = ("scored", "skipped", "silent_estimates", "degenerate")
_IDENTITY = ("protocol", "protocol_version", "protocol_hash", "store_hash", "tasks")


def compact_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`compare` reads of an ``evaluation.json``, as plain data.

    The protocol's and the store's identity, ``tasks``, ``matrices``, ``continual`` and ``visual_dependence`` as they
    are, and in ``after`` for each step its ``task``, the ``counts`` of mixtures and the sources' scores as ``columns``,
    likewise in ``forward_transfer``, where it was measured. Yardsticks are left out.
    """
    before = {task: {"columns": _columns(of["rows"])} for task, of in evaluation.get("forward_transfer", {}).items()}
    return {
        "format": "avsep-scores",
        **{
            key: evaluation[key]
            for key in (*_IDENTITY, "matrices", "continual", "visual_dependence")
            if key in evaluation
        },
        "after": [
            {
                "task": step["task"],
                "counts": {k: step["all"][k] for k in ("mixtures", *_COUNTS)},
                "columns": _columns(step["rows"]),
            }
            for step in evaluation["after"]
        ],
        **({"forward_transfer": before} if before else {}),
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in _COLUMNS}


def _rows(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "rows" in step:
        return list(step["rows"])
    columns = step["columns"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Cell:
    """One run: ``method`` trained with ``seed``, and its scores after every task.

    ``evaluation`` is the content of ``evaluation.json`` or its :func:`compact_evaluation`; ``memory_bytes`` what
    persists between tasks, ``seconds`` the training's wall time, None where unknown; ``name`` what errors call it.
    """

    method: str
    seed: int
    evaluation: Mapping[str, Any]
    memory_bytes: float | None = None
    seconds: float | None = None
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"{self.method} with seed {self.seed}"


@dataclass(frozen=True)
class Estimate(Interval):
    """A mean over seeds and test mixtures with its interval, and the mean of each seed."""

    per_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Difference(Estimate):
    """A method less the baseline, over the seeds and mixtures that both have.

    ``p``: two-sided, of the same distribution as the interval, whose ends are accurate to some thousandths of its
    length: but for these it is below .05 where the 95% interval leaves out zero. It is never below two of the
    resamples, 0.0002 of 10,000; what is as small may be smaller.
    """

    p: float = 1.0

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


_E = TypeVar("_E", bound=Estimate)


@dataclass(frozen=True)
class MethodResult:
    """One method over its seeds; dB, after the last task unless said otherwise.

    ``values`` by name: ``average`` (A_T of the SDR matrix, each task counting alike), ``task-0`` ... (its last row),
    ``first`` (the first task as it was learned), ``forgetting``, ``bwt``, ``intransigence`` (mean over tasks, over the
    seeds that have a joint run), ``staleness`` (:func:`avsep.evaluation.continual.staleness`), ``fwt`` (the SDRi on
    each task but the first before it was learned, where it was measured with all seeds), and ``sdr``, ``sir``, ``sar``,
    ``sdri``, ``si_sdr`` over the sources of all scored mixtures; ``released_sdr`` ... with the degenerate mixtures,
    where the protocol has such; ``list:three`` ... the SDR on each list apart. What is undefined (forgetting after one
    task) is left out.
    ``differences``: the same names, to the baseline; empty for the baseline itself. ``curves``: ``average`` (A_t) and
    the metrics by step. ``matrix``: R[t][j], mean over seeds. ``counts`` of mixtures after the last task, likewise.
    ``dependence``: by list the mean changes of SDR with other pictures (:mod:`avsep.evaluation.visual_dependence`), of
    the seeds that were measured.
    """

    method: str
    seeds: tuple[int, ...]
    values: dict[str, Estimate]
    differences: dict[str, Difference]
    curves: dict[str, tuple[Estimate, ...]]
    matrix: tuple[tuple[float | None, ...], ...]
    counts: dict[str, float]
    memory_bytes: float | None = None
    seconds: float | None = None  # the median: one run on a busy machine says nothing of the method
    dependence: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``protocol`` to ``tasks`` are what all runs have in common.

    ``yardsticks``: :data:`avsep.evaluation.yardsticks.YARDSTICKS` as methods that learn nothing, with the seeds of the
    baseline, so that differences pair; of one of the runs whose evaluations have them.
    """

    methods: tuple[MethodResult, ...]
    baseline: str | None
    confidence: float
    resamples: int
    protocol: str
    protocol_version: int | None
    protocol_hash: str
    store_hash: str
    tasks: tuple[tuple[str, ...], ...] = field(default=())
    yardsticks: tuple[MethodResult, ...] = ()

    def __getitem__(self, method: str) -> MethodResult:
        for result in (*self.methods, *self.yardsticks):
            if result.method == method:
                return result
        raise KeyError(method)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        plain: dict[str, Any] = _plain(self)
        return plain


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """The p values of several comparisons, corrected for their number.

    Those below a level are true of all that are called so at once, with that chance of being wrong in any (Holm, A
    simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979).
    """
    made: dict[str, float] = {}
    highest = 0.0
    for number, name in enumerate(sorted(p, key=lambda key: p[key])):
        highest = max(highest, min(1.0, (len(p) - number) * p[name]))
        made[name] = highest
    return {name: made[name] for name in p}


FEWEST_MIXTURES = 10
"""Scored test mixtures from which an interval says something: the bootstrap of fewer is far too narrow (at five a 95 %
interval holds the truth about four times of five)."""


def with_enough_mixtures(comparison: Comparison, fewest: int = FEWEST_MIXTURES) -> Comparison:
    """The comparison itself or, where a method has fewer scored test mixtures than ``fewest``, one whose intervals and
    p values are NaN, so that no difference is significant."""
    if all(method.counts["scored"] >= fewest for method in comparison.methods):
        return comparison

    def bare(value: _E) -> _E:
        changes: dict[str, Any] = {"low": math.nan, "high": math.nan}
        changes |= {"p": math.nan} if isinstance(value, Difference) else {}
        return replace(value, **changes)

    def without(method: MethodResult) -> MethodResult:
        return replace(
            method,
            values={name: bare(value) for name, value in method.values.items()},
            differences={name: bare(value) for name, value in method.differences.items()},
            curves={name: tuple(map(bare, curve)) for name, curve in method.curves.items()},
        )

    methods, yardsticks = (tuple(map(without, of)) for of in (comparison.methods, comparison.yardsticks))
    return replace(comparison, methods=methods, yardsticks=yardsticks)


def _plain(value: Any) -> Any:
    if isinstance(value, Difference):
        return {**{k: _plain(v) for k, v in vars(value).items()}, "significant": value.significant}
    if isinstance(value, (Comparison, MethodResult, Estimate)):
        return {k: _plain(v) for k, v in vars(value).items()}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    cells: Iterable[Cell],
    *,
    baseline: str | None = None,
    joint: Iterable[Cell] = (),
    clips: Mapping[str, _Clips] | None = None,
    orders: bool = False,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare the methods of ``cells``; deterministic.

    ``baseline`` names the method that the others' differences are to; ``joint`` are runs of joint training, by whose
    seeds intransigence is measured (they may be among ``cells`` too). ``clips`` tells of each mixture, by the hash of
    its protocol and then by its list and number, the class and id of its clips (:func:`clips_of_protocol`); left out,
    the evaluations' rows do, if they are whole. ``orders``: every seed may have a class order of its own, with its own
    test mixtures of the same clips; all runs of a seed must agree in it.

    Raises:
        RunError: no cell; a method has a seed twice; a run is not scored after every task; or the runs were tested on
            another store, class order or protocol.
        UnknownNameError: no method is called ``baseline``.
    """
    chosen, uppers = list(cells), list(joint)
    if not chosen:
        raise RunError("nothing to compare: give at least one evaluated run")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    alike: dict[int, Cell] = {}
    for other in (*chosen, *uppers):
        _check_same(chosen[0], other, but=_OF_AN_ORDER if orders else ())
        _check_same(alike.setdefault(other.seed, other), other)
    for cell in (*chosen, *uppers):
        _check_complete(cell)
    methods = _by_method(chosen)
    if baseline is not None and baseline not in methods:
        raise UnknownNameError(f"no method '{baseline}' to compare with: {near_matches(baseline, methods)}")

    first = chosen[0].evaluation
    steps = len(first["tasks"])
    layouts = _layouts((*chosen, *uppers))

    def layout_of(cell: Cell) -> _Layout:
        return layouts[cell.evaluation["protocol_hash"]]

    tables = {name: {c.seed: _Table(layout_of(c), c) for c in members} for name, members in methods.items()}
    paired = [c.seed for c in methods[baseline if baseline is not None else next(iter(methods))]]
    # yardsticks are of one order: with several there are none
    beside = {
        name: _Table(layout_of(chosen[0]), cell)
        for name, cell in (_yardstick_cells(chosen) if len(layouts) == 1 else {}).items()
    }
    tables |= {name: dict.fromkeys(paired, table) for name, table in beside.items()}
    upper: dict[int, _Table] = {}
    for cell in uppers:
        if cell.seed in upper:
            raise RunError(f"{cell} is another run of joint training with seed {cell.seed}: give one for every seed")
        upper[cell.seed] = _Table(layout_of(cell), cell)

    def measure(drawn: Callable[[_Layout], _Array]) -> dict[tuple[str, str, str], _Array]:
        """(method, values or differences, name) -> [r, seeds]; ``drawn`` gives a layout's weights [r, mixtures]."""
        of_layout = {id(layout): drawn(layout) for layout in layouts.values()}

        def weights(table: _Table) -> _Array:
            return of_layout[id(table.layout)]

        bounds = {number: table.matrix(weights(table)) for number, table in upper.items()}
        known: dict[_Table, dict[str, _Array]] = {}

        def of(table: _Table, number: int) -> dict[str, _Array]:
            if table not in known:
                bound = None if any(table is other for other in beside.values()) else bounds.get(number)
                known[table] = table.measures(weights(table), bound)
            return known[table]

        found: dict[tuple[str, str, str], list[_Array]] = {}
        for name, members in tables.items():
            for number, table in members.items():
                for key, value in of(table, number).items():
                    found.setdefault((name, "values", key), []).append(value)
                other = None if baseline in (None, name) else tables[str(baseline)].get(number)
                if other is not None:
                    mine, theirs = (of(t, number) for t in table.beside(other))
                    for key, value in mine.items():
                        found.setdefault((name, "differences", key), []).append(value - theirs[key])
        return {key: np.stack(values, axis=1) for key, values in found.items()}

    once = measure(lambda layout: np.ones((1, layout.mixtures)))
    points = {key: value[0] for key, value in once.items() if np.isfinite(value).all()}
    resampled: dict[tuple[str, str, str], list[_Array]] = {key: [] for key in points}
    for drawn in _resamples(layouts, clips, resamples=resamples, seed=seed):
        measured = measure(drawn)
        for key, parts in resampled.items():
            parts.append(measured[key].mean(axis=1))

    def estimates(name: str, what: str, kind: type[_E]) -> dict[str, _E]:
        made = {}
        for (owner, part, key), value in points.items():
            if (owner, part) == (name, what):
                spread = _Spread(np.concatenate(resampled[owner, part, key]), value)
                low, high = spread.interval(confidence)
                more = {"p": spread.p_value()} if issubclass(kind, Difference) else {}
                made[key] = kind(float(value.mean()), low, high, per_seed=tuple(value.tolist()), **more)
        return made

    def result(name: str, members: Sequence[Cell]) -> MethodResult:
        values = estimates(name, "values", Estimate)
        counts = [_counts(c.evaluation["after"][-1]) for c in members]
        return MethodResult(
            method=name,
            seeds=tuple(c.seed for c in members),
            values={k: v for k, v in values.items() if "@" not in k},
            differences={k: v for k, v in estimates(name, "differences", Difference).items() if "@" not in k},
            curves={
                key: tuple(values[f"{key}@{t}"] for t in range(steps))
                for key in ("average", *METRICS)
                if all(f"{key}@{t}" in values for t in range(steps))
            },
            matrix=_mean_matrix([t.matrix(np.ones((1, t.layout.mixtures)))[0] for t in tables[name].values()]),
            counts={key: float(np.mean([c[key] for c in counts])) for key in counts[0]},
            memory_bytes=_mean([c.memory_bytes for c in members]),
            seconds=_middle([c.seconds for c in members]),
            dependence=_dependence(members),
        )

    learned = ("forgetting", "bwt", "intransigence")  # of what does not learn there are none
    yardsticks = []
    for name, cell in _yardstick_cells(chosen).items() if beside else ():
        made = result(name, [replace(cell, seed=number) for number in paired])
        values = {k: v for k, v in made.values.items() if k not in learned}
        differences = {k: v for k, v in made.differences.items() if k not in learned}
        yardsticks.append(replace(made, values=values, differences=differences))
    results = [result(name, members) for name, members in methods.items()]
    return Comparison(
        methods=tuple(results),
        baseline=baseline,
        confidence=confidence,
        resamples=resamples,
        protocol=first["protocol"],
        protocol_version=first.get("protocol_version"),
        protocol_hash=first["protocol_hash"],
        store_hash=first["store_hash"],
        tasks=tuple(tuple(names) for names in first["tasks"]),
        yardsticks=tuple(yardsticks),
    )


def _layouts(cells: Sequence[Cell]) -> dict[str, _Layout]:
    """By the protocol's hash, of which there is one for every class order."""
    largest: dict[str, Mapping[str, Any]] = {}
    for cell in cells:
        key = cell.evaluation["protocol_hash"]
        # the one with most: what a separator cannot be asked for is left out of its scores
        largest[key] = max(largest.get(key, cell.evaluation), cell.evaluation, key=_size)
    return {key: _Layout(evaluation) for key, evaluation in largest.items()}


class _Spread:
    """What a mean over seeds may be: by the choice of clips, ``drawn`` [r] of its resamples, and by that of seeds,
    ``of_seeds`` [s], whose part is Student's t.

    The part of the seeds is integrated and not drawn: the probability of being below x is the mean over the resamples
    of that of a t. So small probabilities are not those of a few draws, of which Holm's correction of many differences
    would be made, and a difference taken the other way round has the same numbers.
    """

    def __init__(self, drawn: _Array, of_seeds: _Array) -> None:
        self.drawn = drawn[np.isfinite(drawn)]
        self.freedom = len(of_seeds) - 1
        # of equal numbers rounding would make some width
        varies = bool(np.ptp(of_seeds))
        self.width = float(of_seeds.std(ddof=1)) / math.sqrt(len(of_seeds)) if varies else 0.0

    def interval(self, confidence: float) -> tuple[float, float]:
        tail = (1 - confidence) / 2
        if not len(self.drawn):
            return math.nan, math.nan
        if not self.width:
            alone = percentile_interval(math.nan, self.drawn, confidence)
            return alone.low, alone.high
        # all resamples would move an end by a thousandth of the interval, by seven where the clips' part is skewed
        at = (np.arange(_KNOTS) + 0.5) / _KNOTS
        knots = np.quantile(self.drawn, at) if len(self.drawn) > _KNOTS else self.drawn
        sought = np.array([[tail], [1 - tail]])
        reach = self.width
        while self._below(knots.min() - reach, knots) > tail or self._below(knots.max() + reach, knots) < 1 - tail:
            reach *= 2
        low, high = np.full((2, 1), knots.min() - reach), np.full((2, 1), knots.max() + reach)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            under = self._below(middle, knots) < sought
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        ends = (low + high) / 2
        return float(ends[0, 0]), float(ends[1, 0])

    def p_value(self) -> float:
        """Twice the smaller probability of a side of zero, which is never below one resample."""
        if not len(self.drawn):
            return 1.0
        if self.width:
            below = float(self._below(0.0, self.drawn))
            beyond = min(below, 1 - below)
        else:
            beyond = min(float(np.mean(self.drawn <= 0)), float(np.mean(self.drawn >= 0)))
        return float(min(1.0, 2 * max(beyond, 1 / len(self.drawn))))

    def _below(self, x: float | _Array, drawn: _Array) -> _Array:
        below = _student((x - drawn) / self.width, self.freedom).mean(axis=-1, keepdims=np.ndim(x) > 0)
        return np.asarray(below, dtype=np.float64)


def _student(x: _Array, freedom: int) -> _Array:
    """The distribution function of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4). SciPy's, against which it is tested, is not among the
    packages that a comparison needs."""
    angle = np.arctan(x / math.sqrt(freedom))
    cosine = np.cos(angle)
    odd = freedom % 2
    term = cosine if odd else np.ones_like(cosine)
    total = np.zeros_like(cosine) if freedom == 1 else term
    for k in range(1 + odd, freedom - 1, 2):
        term = term * cosine**2 * (k / (k + 1))
        total = total + term
    inside = np.sin(angle) * total
    return np.asarray(0.5 + (angle + inside) / math.pi if odd else 0.5 + inside / 2)


def _size(evaluation: Mapping[str, Any]) -> int:
    return sum(len(_rows(step)) for step in evaluation["after"])


def _yardstick_cells(cells: Sequence[Cell]) -> dict[str, Cell]:
    """The yardsticks as runs, from the evaluation that holds them and has most lists; none where none does."""
    holders = [c.evaluation for c in cells if c.evaluation.get("yardsticks")]
    if not holders:
        return {}
    holder = max(holders, key=_size)
    found = {}
    for name in YARDSTICKS:
        steps = [{"task": s["task"], "rows": rows_of_yardstick(holder, name, s)} for s in holder["after"]]
        if steps[-1]["rows"]:
            found[name] = Cell(name, 0, {"after": steps})
    return found


def _dependence(cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """Mean change of SDR by list and kind of pictures, over the runs in which it was measured after the last task."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        last = str(cell.evaluation["after"][-1]["task"])
        lists = (cell.evaluation.get("visual_dependence") or {}).get(last, {}).get("lists", {})
        for name, line in lists.items():
            for key in CHANGES:
                if line["changes"].get(key) is not None:
                    found.setdefault(name, {}).setdefault(key, []).append(line["changes"][key])
    return {name: {key: float(np.mean(v)) for key, v in of.items()} for name, of in found.items()}


def clips_of_protocol(protocol: Protocol) -> dict[tuple[str, int], tuple[tuple[str, str], ...]]:
    """Class and id of the clips of every test mixture, by its list and its number among those of a step."""
    return {
        (mixture.list_name, number): tuple(zip(mixture.classes, mixture.clips, strict=True))
        for task in range(len(protocol.tasks))
        for number, mixture in enumerate(protocol.at(task))
    }


# --- runs -------------------------------------------------------------------------------------------------------------


def cells_of_runs(folders: Sequence[str | Path]) -> list[Cell]:
    """One cell a run folder. Runs whose specs differ by the seed alone are one method.

    A method is called by its strategy and memory, and where several share these by the settings they differ in.

    Raises:
        RunError: a folder is not a run, or has no scores of its separators as they are now.
    """
    specs = [RunFolder(folder).spec() for folder in folders]
    cells = []
    for folder, spec, method in zip(folders, specs, _method_names(specs), strict=True):
        evaluation = current_evaluation(folder)
        if evaluation is None:
            raise RunError(f"{folder} has no scores of its last task as it is now: run avsep evaluate {folder}")
        steps = evaluation["after"]
        if len(steps) < len(spec.tasks):
            raise RunError(
                f"{folder} is scored after {len(steps)} of its {len(spec.tasks)} tasks: train and evaluate it to the "
                f"end first"
            )
        cells.append(
            Cell(
                method=method,
                seed=spec.train.seed,
                evaluation=evaluation,
                # what the last task began with: nothing follows the last one
                memory_bytes=steps[max(len(spec.tasks) - 2, 0)].get("memory", {}).get("total"),
                seconds=sum(step.get("seconds", math.nan) for step in steps),
                name=str(folder),
            )
        )
    return cells


def differing_settings(folders: Sequence[str | Path]) -> dict[str, dict[str, str]]:
    """The settings in which runs differ, beside the strategy, which names a method: setting -> method -> its value.

    ``steps`` are those that were trained, in all tasks together; ``-`` stands for a setting that a method has not.
    """
    specs = [RunFolder(folder).spec() for folder in folders]
    methods = _method_names(specs)
    facts = []
    for folder, spec in zip(folders, specs, strict=True):
        of_run = {key: value for key, value in _facts(spec).items() if not key.startswith(("strategy", "preset"))}
        records = [RunFolder(folder).task(number).record() for number in RunFolder(folder).finished_tasks()]
        facts.append({"steps": str(sum(record["steps"] for record in records)), **of_run})
    found = {}
    for key in dict.fromkeys(key for of_run in facts for key in of_run):
        if ".params." in key and any(key not in of_run for of_run in facts):
            continue  # of a component that only some have, which is told by its name
        if len({of_run.get(key) for of_run in facts}) > 1:
            by_method: dict[str, list[str]] = {}
            for method, of_run in zip(methods, facts, strict=True):
                by_method.setdefault(method, []).append(of_run.get(key, "-"))
            found[key] = {method: " or ".join(dict.fromkeys(values)) for method, values in by_method.items()}
    return found


# what tells no method from another: the seed, where things lie, what is checked when runs are compared, the classes
_NOT_METHOD = (
    "train.seed",
    "train.checkpoint_every",
    "store",
    "protocol",
    "tasks",
    "blurry.tasks",
    "separator.classes",
    "separator.num",
)


def _method_names(specs: Sequence[RunSpec]) -> list[str]:
    facts = [_facts(spec) for spec in specs]
    plain = [spec.strategy_name + ("" if spec.memory.name == "none" else f" + {spec.memory.name}") for spec in specs]
    names = []
    for mine, name in zip(facts, plain, strict=True):
        alike = [f for f, other in zip(facts, plain, strict=True) if other == name]
        differing = [key for key in dict.fromkeys(k for f in alike for k in f) if len({f.get(key) for f in alike}) > 1]
        presets = {f["preset"] for f in alike}
        if "preset" in differing and len(presets) == len({tuple(f.items()) for f in alike}):
            differing = ["preset"]
        said = ", ".join(f"{key.rpartition('.')[2]} {mine[key]}" for key in differing if key in mine)
        names.append(f"{name} ({said})" if said else name)
    return names


def _facts(spec: RunSpec) -> dict[str, str]:
    """Everything that makes a method, flat, with the parameters that were left at their defaults."""
    data = spec.model_dump(mode="json")
    data["memory"]["params"] = _filled(spec.memory, MEMORIES)
    if isinstance(spec.strategy, tuple):
        data["strategy"] = {ref.name: _filled(ref, STRATEGIES) for ref in spec.strategy}
    else:
        data["strategy"]["params"] = _filled(spec.strategy, STRATEGIES)
    return {key: str(v) for key, v in _flat(data).items() if not key.startswith(_NOT_METHOD)}


def _filled(ref: ComponentRef, registry: Registry[Any]) -> dict[str, Any]:
    try:
        settings = registry.get(ref.name).settings
    except UnknownNameError:  # of a package that is not installed here
        return ref.params
    return {**{p.name: p.default for p in settings if not p.required}, **ref.params}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{path}.{name}" if path else name).items()}


# --- what may be compared ---------------------------------------------------------------------------------------------


_OF_AN_ORDER = ("tasks", "protocol_hash")


def _check_same(one: Cell, other: Cell, but: tuple[str, ...] = ()) -> None:
    """Raise RunError, with the reason, where two runs were not tested on the same thing, ``but`` for some of it."""
    a, b = one.evaluation, other.evaluation
    reasons: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("store_hash", "were trained on different stores", lambda e: str(e.get("store_hash"))[:12]),
        ("tasks", "learned different classes, or in another order", lambda e: _order(e.get("tasks", ()))),
        ("protocol", "were tested under different protocols", lambda e: str(e.get("protocol"))),
        (
            "protocol_version",
            "were tested under different versions of the protocol (avsep evaluate scores a run again)",
            lambda e: str(e.get("protocol_version")),
        ),
        ("protocol_hash", "were tested on different mixtures", lambda e: str(e.get("protocol_hash"))[:12]),
    )
    if but and sorted(map(len, a["tasks"])) != sorted(map(len, b["tasks"])):
        raise RunError(f"{one} and {other} cannot be compared: their tasks have other numbers of classes")
    for key, reason, shown in reasons:
        if key not in but and _same(a.get(key)) != _same(b.get(key)):
            raise RunError(f"{one} and {other} cannot be compared: they {reason} ({shown(a)} and {shown(b)})")


def _same(value: Any) -> Any:
    return [list(names) for names in value] if isinstance(value, (list, tuple)) else value


def _order(tasks: Iterable[Iterable[str]]) -> str:
    return "; ".join(", ".join(names) for names in tasks)


def _check_complete(cell: Cell) -> None:
    wanted = list(range(len(cell.evaluation["tasks"])))
    scored = [step["task"] for step in cell.evaluation["after"]]
    if scored != wanted:
        raise RunError(
            f"{cell} is scored after {len(scored)} of its {len(wanted)} tasks: train and evaluate it to the end first"
        )


def _by_method(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    methods: dict[str, list[Cell]] = {}
    for cell in cells:
        members = methods.setdefault(cell.method, [])
        for other in members:
            if other.seed == cell.seed:
                raise RunError(
                    f"{other} and {cell} are both method '{cell.method}' with seed {cell.seed}: give one of them"
                )
        members.append(cell)
    return {name: sorted(members, key=lambda c: c.seed) for name, members in methods.items()}


# --- the arithmetic ---------------------------------------------------------------------------------------------------


class _Layout:
    """Where every test mixture and every mean stands: mixtures are rows, grouped by list; means are columns."""

    def __init__(self, evaluation: Mapping[str, Any]) -> None:
        rows = [_rows(step) for step in evaluation["after"]]
        self.steps = len(rows)
        keys = sorted({(r["list"], r["mixture"]) for step in rows for r in step})
        self.row = {key: number for number, key in enumerate(keys)}
        lists = [name for name, _ in keys]
        self.sizes = [lists.count(name) for name in dict.fromkeys(lists)]
        self.mixtures = len(keys)
        self._clips: dict[tuple[str, int], dict[str, str]] = {key: {} for key in keys}
        for r in (r for step in rows for r in step if "clip" in r):
            self._clips[r["list"], r["mixture"]][r["clip"]] = r["class"]
        kinds = [
            "all",
            *(["released"] if any(r["degenerate"] and is_headline(r) for step in rows for r in step) else []),
        ]
        steps = range(self.steps)
        columns = [
            *(("matrix", t, str(j)) for t in steps for j in range(t + 1)),
            *((kind, t, metric) for kind in kinds for t in steps for metric in METRICS),
            *(("list", self.steps - 1, name) for name in APART if name in lists),
            *(("before", self.steps - 1, str(j)) for j in steps[1:]),
            *(("beside", self.steps - 1, f"{j} {k}") for j in steps for k in steps),
        ]
        self.column = {key: number for number, key in enumerate(columns)}

    def members(self, clips: _Clips | None) -> list[dict[str, str]]:
        """Of each mixture the classes of its clips, by the clips' ids; empty where they are not known."""
        return [
            {clip: name for name, clip in clips[key]} if clips is not None else self._clips[key] for key in self.row
        ]


def _resamples(
    layouts: Mapping[str, _Layout], clips: Mapping[str, _Clips] | None, *, resamples: int, seed: int
) -> Iterator[Callable[[_Layout], _Array]]:
    """Blocks of r draws: how often each mixture of a layout counts, [r, mixtures]. The clips are drawn once for all."""
    members = {id(one): one.members(None if clips is None else clips[key]) for key, one in layouts.items()}
    if not all(member for of_layout in members.values() for member in of_layout):
        if len(layouts) > 1:
            raise RunError("seeds with other class orders are compared by the clips of their mixtures: give clips")
        (only,) = layouts.values()
        for block in resampling_weights(only.sizes, resamples=resamples, seed=seed):

            def same(_: _Layout, block: _Array = block) -> _Array:
                return block

            yield same
        return
    groups: dict[str, dict[str, None]] = {}
    for clip, name in sorted({pair for known in members.values() for one in known for pair in one.items()}):
        groups.setdefault(name, {})[clip] = None
    # a class with one clip cannot be resampled by itself
    alone = [clip for found in groups.values() if len(found) == 1 for clip in found]
    strata = [*([alone] if alone else []), *(list(found) for found in groups.values() if len(found) > 1)]
    place = {clip: number for number, clip in enumerate(clip for stratum in strata for clip in stratum)}
    inside = {}
    for key, known in members.items():
        inside[key] = np.zeros((len(place), len(known)), dtype=bool)
        for number, one in enumerate(known):
            inside[key][[place[clip] for clip in one], number] = True

    for drawn in resampling_weights([len(stratum) for stratum in strata], resamples=resamples, seed=seed):

        def weights(layout: _Layout, drawn: _Array = drawn) -> _Array:
            made = np.ones((len(drawn), layout.mixtures))
            for column, where in enumerate(inside[id(layout)]):
                made[:, where] *= drawn[:, column, None]
            return made

        yield weights


class _Table:
    """The sums and counts of one run's scores by mixture and mean, both [mixtures, means]."""

    def __init__(self, layout: _Layout, cell: Cell) -> None:
        self.layout = layout
        self.sums = np.zeros((layout.mixtures, len(layout.column)))
        self.counts = np.zeros_like(self.sums)
        for t, step in enumerate(cell.evaluation["after"]):
            rows = _rows(step)
            for j in range(t + 1):
                self._add(("matrix", t, str(j)), rows_of_task(rows, j), "sdr")
            for metric in METRICS:
                audible = [
                    r for r in rows if r[metric] is not None and not r["status"].startswith("silent") and is_headline(r)
                ]
                self._add(("all", t, metric), [r for r in audible if is_counted(r)], metric)
                if ("released", t, metric) in layout.column:
                    self._add(("released", t, metric), audible, metric)
            beside = beside_tasks(rows) if t == layout.steps - 1 else {}
            for (j, k), members in beside.items():
                self._add(("beside", t, f"{j} {k}"), members, "sdr")
            for kind, of_step, name in layout.column:
                if (kind, of_step) == ("list", t):
                    scored = [r for r in rows if r["list"] == name and is_counted(r) and r["sdr"] is not None]
                    self._add((kind, t, name), scored, "sdr")
        for j, of in (cell.evaluation.get("forward_transfer") or {}).items():
            scored = [r for r in _rows(of) if is_counted(r) and r["sdri"] is not None]
            self._add(("before", layout.steps - 1, j), scored, "sdri")

    def _add(self, key: tuple[str, int, str], rows: Iterable[Mapping[str, Any]], metric: str) -> None:
        column = self.layout.column[key]
        for r in rows:
            row = self.layout.row[r["list"], r["mixture"]]
            self.sums[row, column] += r[metric]
            self.counts[row, column] += 1

    def beside(self, other: _Table) -> tuple[_Table, _Table]:
        """This and ``other``, without what only one of them has a score of."""
        both = (self.counts > 0) & (other.counts > 0)
        return self._only(both), other._only(both)

    def _only(self, kept: NDArray[np.bool_]) -> _Table:
        if not (self.counts[~kept] > 0).any():
            return self
        part = object.__new__(_Table)
        part.layout, part.sums, part.counts = self.layout, self.sums * kept, self.counts * kept
        return part

    def means(self, weights: _Array) -> _Array:
        """[r, means] for how often each mixture counts, [r, mixtures]; NaN where nothing was scored."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ self.sums) / (weights @ self.counts)

    def matrix(self, weights: _Array) -> _Array:
        """[r, T, T], NaN above the diagonal."""
        return self._matrix(self.means(weights))

    def _matrix(self, means: _Array) -> _Array:
        steps = self.layout.steps
        made = np.full((len(means), steps, steps), math.nan)
        for (kind, t, j), column in self.layout.column.items():
            if kind == "matrix":
                made[:, t, int(j)] = means[:, column]
        return made

    def _interference(self, means: _Array) -> _Array:
        """[r, T, T], NaN where two tasks do not meet."""
        steps = self.layout.steps
        made = np.full((len(means), steps, steps), math.nan)
        for (kind, _, pair), column in self.layout.column.items():
            if kind == "beside":
                j, k = map(int, pair.split())
                made[:, j, k] = means[:, column]
        return made

    def measures(self, weights: _Array, upper: _Array | None) -> dict[str, _Array]:
        """Every measure [r] by name, ``name@t`` that of step t; ``upper`` [r, T, T] is joint training's matrix."""
        means = self.means(weights)
        matrix = self._matrix(means)
        last = self.layout.steps - 1
        steps = average(matrix)
        found = {"average": steps[:, -1]}
        if last:
            found["forgetting"] = forgetting_per_task(matrix).mean(axis=-1)
            found["bwt"] = backward_transfer_per_task(matrix).mean(axis=-1)
            found["staleness"] = staleness(self._interference(means))
            before = [c for (kind, _, _), c in self.layout.column.items() if kind == "before"]
            found["fwt"] = means[:, before].mean(axis=-1)
        if upper is not None:
            found["intransigence"] = intransigence(matrix, upper).mean(axis=-1)
        found["first"] = matrix[:, 0, 0]
        found |= {f"task-{j}": matrix[:, last, j] for j in range(last + 1)}
        found |= {f"average@{t}": steps[:, t] for t in range(last + 1)}
        for (kind, t, metric), column in self.layout.column.items():
            if kind == "all":
                found[f"{metric}@{t}"] = means[:, column]
            if kind == "list":
                found[f"list:{metric}"] = means[:, column]
            elif kind in ("all", "released") and t == last:
                found[metric if kind == "all" else f"released_{metric}"] = means[:, column]
        return found


def _counts(step: Mapping[str, Any]) -> dict[str, int]:
    found = step["counts"] if "counts" in step else summarise([r for r in step["rows"] if is_headline(r)])
    return {key: found[key] for key in _COUNTS}


def _mean_matrix(matrices: Sequence[_Array]) -> tuple[tuple[float | None, ...], ...]:
    mean = np.mean(matrices, axis=0)
    return tuple(tuple(v if math.isfinite(v) else None for v in line) for line in mean.tolist())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _middle(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if len(known) == len(values) else None

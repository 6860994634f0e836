"""Choosing each method's settings on validation pairs of the first two tasks, before a grid is run.

As the paper gives no weight of any baseline, every row gets the same care, for each base separator by itself and with
the memory that it will have: each candidate of its ``tuning`` in the preset learns the first two tasks of each seed,
and the one with the best mean SDR on the validation mixtures of both is chosen. Test mixtures have no part in it, and
the seeds are others than those of the tables. A board's preset may ask for more tasks (``tuning_tasks``).

Seeds are spent where candidates are close. All have :data:`FIRST` seeds; then a candidate is given up where it lies
behind the best so far by more than :data:`MARGIN_DB` and by more than two standard errors of their difference, which is
paired by seed (three, while there are fewer than :data:`LEAST` seeds); the others get one seed more, until one is left
or all seeds are spent. What is chosen among several has at least :data:`LEAST`. A general optimiser would not pair
seeds, whose differences are far larger than those of candidates, and there are few candidates, each of them known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from avsep.data.store import Store
from avsep.errors import ConfigError, UnknownNameError, near_matches
from avsep.registry import STRATEGIES
from avsep.reproduce.grid import BASES, Grid, Row, assemble, table1_rows
from avsep.reproduce.preset import GridPreset
from avsep.reproduce.results import ResultStore

__all__ = [
    "FIRST",
    "LEAST",
    "MARGIN_DB",
    "SEEDS",
    "TUNE",
    "Choice",
    "build_tuning",
    "candidates_of",
    "choices",
    "next_round",
    "tuning_grid",
]

TUNE = "tune"
FIRST = 3  # seeds of every candidate
LEAST = 5  # seeds of what is chosen among several
SEEDS = 8  # the most
MARGIN_DB = 0.2
_SEEDS_APART = 100_000  # added to the preset's seed


@dataclass(frozen=True)
class Choice:
    """What became of one row on one base: by candidate, in the preset's order, its settings, the mean SDR in dB over
    its seeds (None: a seed is missing), and how many those are. ``best`` is the chosen one's settings, None while a
    seed is missing; ``open`` the numbers of those that are not given up."""

    base: str
    row: str
    candidates: tuple[tuple[dict[str, Any], float | None, int], ...]
    best: dict[str, Any] | None
    open: tuple[int, ...]


def build_tuning(
    preset: GridPreset,
    store: Store,
    *,
    seeds: int = SEEDS,
    bases: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
) -> Grid:
    """A grid whose cells learn the first two tasks, one for each candidate, seed and base; ``rows``: of these alone.

    Raises:
        ConfigError: the preset has nothing to tune, or the store no second task.
        UnknownNameError: a base or row that the preset does not have.
    """
    preset.check_bases(bases or ())
    if not preset.tuning:
        raise ConfigError("the preset has nothing to tune: give it 'tuning', such as {lwf: {weight_mask: [0.1, 1]}}")
    wanted = list(bases or [b for b in BASES if b in preset.bases] or preset.bases)
    known = {row.name: row for row in table1_rows(wanted[0], preset)}
    for name in (*preset.tuning, *(rows or ())):
        if name not in known:
            raise UnknownNameError(f"no row named '{name}' to tune: {near_matches(name, known)}")
    lines = [
        candidate
        for name in preset.tuning
        if not rows or name in rows
        for candidate in candidates_of(known[name], preset.candidates(name))
    ]
    grid = tuning_grid(dict.fromkeys(wanted, lines), preset, store, seeds=seeds)
    if wrong := next((cell for cell in grid.cells.values() if cell.problem), None):
        raise ConfigError(f"'tuning' of the preset has what cannot be run, {wrong.name}: {wrong.problem}")
    return grid


def tuning_grid(
    rows: dict[str, list[Row]], preset: GridPreset, store: Store, *, seeds: int = SEEDS, tasks: int = 2
) -> Grid:
    """A grid of candidates by base (:func:`candidates_of`), which learn the first ``tasks`` tasks. Raises
    :class:`ConfigError` where there is no second task."""
    # every validation mixture counts here, since nothing else decides
    short = preset.model_copy(
        update={"train": {**preset.train, "validation_pairs": None}, "seed": preset.seed + _SEEDS_APART}
    )
    grid = assemble({TUNE: rows}, {TUNE: []}, short, store, seeds=seeds, most_tasks=tasks, tested=False)
    if len(grid.stream) < 2:
        raise ConfigError("tuning compares what two tasks leave, and the preset has one")
    return grid


def candidates_of(row: Row, settings: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row with each of several settings in place of its own."""
    found = []
    for one in settings:
        said = ",".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in one.items()
        )
        name = f"{row.name}:{said}"
        found.append(replace(row, name=name, label=name, params=_of_their_kinds(row.strategy, one)))
    return found


def _of_their_kinds(strategy: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers as such where a strategy counts: a preset's candidates are read as floats."""
    if strategy not in STRATEGIES:
        return dict(settings)
    counts = {p.name for p in STRATEGIES.get(strategy).settings if p.annotation == "int"}
    return {key: int(v) if key in counts and float(v).is_integer() else v for key, v in settings.items()}


def next_round(grid: Grid, results: ResultStore, failed: Collection[str] = (), first: int = FIRST) -> Grid | None:
    """What is to be run next, as a part of ``grid``: the candidates that are still open, with as many seeds as it takes
    now; every candidate has ``first``. None where everything is decided. ``failed`` are keys of cells that cannot be
    had: their candidates are given up."""
    wanted: set[str] = set()
    for choice in choices(grid, results, failed):
        if not choice.open:
            continue
        names = [row.name for row in grid.rows[TUNE][choice.base] if row.name.partition(":")[0] == choice.row]
        least = min(choice.candidates[number][2] for number in choice.open)
        seeds = first if least < first else least + (len(choice.open) > 1)  # one more where there is a choice left
        for number in choice.open:
            wanted |= set(grid.keys(TUNE, choice.base, names[number])[: min(seeds, len(grid.seeds))])
    wanted = {key for key in wanted if key not in results}
    return replace(grid, cells={key: cell for key, cell in grid.cells.items() if key in wanted}) if wanted else None


def choices(grid: Grid, results: ResultStore, failed: Collection[str] = ()) -> list[Choice]:
    """What is chosen of every row on every base, from the cells that are finished; a candidate with a ``failed`` one is
    given up."""
    found = []
    for base, rows in grid.rows[TUNE].items():
        named: dict[str, list[Row]] = {}
        for row in rows:
            named.setdefault(row.name.partition(":")[0], []).append(row)
        for name, of_row in named.items():
            scores = [_scores(grid, base, row.name, results) for row in of_row]
            lost = {i for i, row in enumerate(of_row) if not set(grid.keys(TUNE, base, row.name)).isdisjoint(failed)}
            left = _open(scores, [i for i in range(len(scores)) if i not in lost])
            settings = [row.params for row in of_row]
            lines = tuple((settings[i], float(np.mean(s)) if s else None, len(s)) for i, s in enumerate(scores))
            best = None
            enough = all(len(scores[i]) >= min(LEAST, len(grid.seeds)) for i in left) or len(left) == 1
            tried = all(len(s) >= min(FIRST, len(grid.seeds)) for i, s in enumerate(scores) if i not in lost)
            if left and enough and tried:
                common = min(len(scores[i]) for i in left)  # seeds differ more than candidates do
                best = settings[max(left, key=lambda i: (np.mean(scores[i][:common]), -i))]
            found.append(Choice(base, name, lines, best, left))
    return found


def _scores(grid: Grid, base: str, row: str, results: ResultStore) -> list[float]:
    """Of the first seeds, up to one that is missing: validation SDR after the last task, in dB."""
    scores: list[float] = []
    for key in grid.keys(TUNE, base, row):
        result = results.get(key)
        if result is None:
            break
        scores.append(result.validation)
    return scores


def _open(scores: Sequence[Sequence[float]], left: list[int]) -> tuple[int, ...]:
    """Of the candidates ``left`` those that may still be the best."""
    if min((len(scores[i]) for i in left), default=0) < FIRST:
        return tuple(left)
    for count in range(FIRST, max(map(len, scores)) + 1):
        if any(len(scores[i]) < count for i in left):
            break  # its seed is still to be run
        best = max(left, key=lambda i: float(np.mean(scores[i][:count])))
        left = [i for i in left if not _behind(scores[i][:count], scores[best][:count])]
    return tuple(left)


def _behind(scores: Sequence[float], best: Sequence[float]) -> bool:
    lost = np.asarray(best) - np.asarray(scores)
    errors = 2 if len(lost) >= LEAST else 3
    return bool(lost.mean() > max(MARGIN_DB, errors * lost.std(ddof=1) / math.sqrt(len(lost))))

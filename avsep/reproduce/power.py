"""How many seeds a difference takes to be seen, from the cells so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avsep.errors import MissingExtraError
from avsep.reproduce.grid import Cell, Grid
from avsep.reproduce.results import ResultStore
from avsep.reproduce.tables import CONTROL, cells_beside

__all__ = ["Need", "hours_left", "needs", "seeds_needed"]

LEAST = 3  # paired seeds from which a deviation can be told
_MOST = 10_000


@dataclass(frozen=True)
class Need:
    """What a row's difference to the control takes: ``seeds`` in all, None while fewer than :data:`LEAST` pair.

    ``have`` are those that pair so far, ``mean`` and ``deviation`` their differences' in dB, ``hours`` of a core what
    is left to run of the row, by what its cells have taken; the control's cells and first tasks are not counted.
    """

    base: str
    row: str
    label: str
    have: int
    mean: float | None
    deviation: float | None
    seeds: int | None
    hours: float | None


def seeds_needed(deviation: float, difference: float, *, power: float = 0.8, level: float = 0.05) -> int:
    """The least number of paired seeds by which a two-sided t test finds a true ``difference`` with this ``power``.

    Of seeds alone: what the choice of test clips adds to an interval does not shrink with them.

    ``deviation`` is the standard deviation of the differences between seeds, in the unit of ``difference``. Source:
    the noncentral t distribution, as in any textbook of power analysis.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtraError("scipy", "reproduce", "how many seeds a difference takes") from None
    if not difference > 0:
        raise ValueError(f"difference must be above 0, got {difference}")
    if deviation <= 0:
        return 2
    for count in range(2, _MOST):
        shift = difference / deviation * math.sqrt(count)
        bound = stats.t.ppf(1 - level / 2, count - 1)
        found = stats.nct.sf(bound, count - 1, shift) + stats.nct.cdf(-bound, count - 1, shift)
        if found >= power or (math.isnan(found) and shift > 2 * bound):  # beyond what scipy computes
            return count
    return _MOST


def needs(grid: Grid, table: str, results: ResultStore, difference: float) -> list[Need]:
    """For every row of a table what it takes to tell it from the control by ``difference`` dB."""
    found = []
    for base, rows in grid.rows[table].items():
        cells = cells_beside(grid, table, base, results)[0]
        control = {c.seed: c for c in cells.get(CONTROL[table], ())}
        for row in rows:
            if row.name == CONTROL[table]:
                continue
            own = cells.get(row.name, [])
            pairs = [(c.final("sdr"), control[c.seed].final("sdr")) for c in own if c.seed in control]
            gained = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
            mean = float(np.mean(gained)) if gained else None
            deviation = float(np.std(gained, ddof=1)) if len(gained) >= LEAST else None
            seeds = None if deviation is None else seeds_needed(deviation, difference)
            each = float(np.median([c.seconds for c in own])) if own else None
            hours = None if seeds is None or each is None else max(0, seeds - len(own)) * each / 3600
            found.append(Need(base, row.name, row.label, len(gained), mean, deviation, seeds, hours))
    return found


def hours_left(
    cells: Sequence[Cell], results: ResultStore, known: Iterable[Cell], measured: Mapping[str, float] | None = None
) -> float | None:
    """Core hours that ``cells`` take, by the seconds a step that finished ones of ``known`` have taken on their base,
    or else were ``measured``; None where neither is there."""
    per_step: dict[str, list[float]] = {}
    for cell in known:
        if (result := results.get(cell.key)) is not None:
            per_step.setdefault(cell.base, []).append(result.seconds / cell.steps)
    for base, seconds in (measured or {}).items():
        per_step.setdefault(base, [seconds])
    if any(cell.base not in per_step for cell in cells):
        return None
    return sum(cell.steps * float(np.median(per_step[cell.base])) for cell in cells) / 3600

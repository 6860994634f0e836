"""Choosing each method's weight once, on validation pairs of the first two tasks, before a grid is run.

As the paper gives no weight of any baseline, every method gets the same care: each value of its ``tuning`` list in the
preset learns the first two tasks, and the one with the best mean SDR on the validation mixtures of both is used for all
tasks, bases and seeds. Test mixtures have no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from avsep.data.store import Store
from avsep.data.tasks import task_stream
from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.reproduce.grid import Grid, Row, assemble
from avsep.reproduce.preset import GridPreset
from avsep.reproduce.results import ResultStore

__all__ = ["Choice", "build_tuning", "choices"]

TUNE = "tune"


@dataclass(frozen=True)
class Choice:
    """What became of one strategy: ``scores`` are mean SDR in dB over bases and seeds, by value; ``best`` the chosen
    value, None while one is missing."""

    strategy: str
    parameter: str
    scores: dict[Any, float | None]
    best: Any


def build_tuning(preset: GridPreset, store: Store, *, seeds: int = 1, bases: Sequence[str] | None = None) -> Grid:
    """A grid whose cells learn the first two tasks, one for each value to choose from.

    Strategies that need a memory have the preset's, the others none. Raises :class:`ConfigError` where the preset has
    nothing to tune or the store no second task, :class:`UnknownNameError` for a base that it does not have.
    """
    preset.check_bases(bases or ())
    if not preset.tuning:
        raise ConfigError("the preset has nothing to tune: give it 'tuning', such as {lwf: {weight_mask: [0.1, 1]}}")
    tasks: Any = preset.tasks
    wanted = list(bases or list(preset.bases)[:1])
    clip_samples = preset.separator(wanted[0]).front_end.clip_samples
    lists = [task.classes for task in task_stream(store, tasks, clip_samples=clip_samples).tasks[:2]]
    if len(lists) < 2:
        raise ConfigError("tuning compares what two tasks leave, and the preset has one")
    # every validation mixture counts here, since nothing else decides
    short = preset.model_copy(update={"tasks": tuple(lists), "train": {**preset.train, "validation_pairs": None}})
    return assemble({TUNE: {base: _rows(preset) for base in wanted}}, {TUNE: []}, short, store, seeds=seeds)


def _rows(preset: GridPreset) -> list[Row]:
    rows = []
    for strategy, grids in preset.tuning.items():
        needs_memory = STRATEGIES.get(strategy).factory.needs_memory
        for parameter, values in grids.items():
            for value in values:
                name = f"{strategy}-{parameter}={value}"
                params = {**preset.strategies.get(strategy, {}), parameter: value}
                memory = preset.memory if needs_memory else None
                rows.append(Row(name, name, strategy, params, memory))
    return rows


def choices(grid: Grid, preset: GridPreset, results: ResultStore) -> list[Choice]:
    """The best value of every strategy's parameter, by the validation SDR after the second task."""
    found = []
    for strategy, grids in preset.tuning.items():
        for parameter, values in grids.items():
            scores = {value: _score(grid, f"{strategy}-{parameter}={value}", results) for value in values}
            known = {value: score for value, score in scores.items() if score is not None}
            best = max(known, key=lambda value: known[value]) if len(known) == len(values) else None
            found.append(Choice(strategy, parameter, scores, best))
    return found


def _score(grid: Grid, row: str, results: ResultStore) -> float | None:
    scores = []
    for base in grid.rows[TUNE]:
        for key in grid.keys(TUNE, base, row):
            result = results.get(key)
            if result is None:
                return None
            scores.append(float(result.data["tasks"][1]["validation_sdr_db"]))
    return sum(scores) / len(scores)

"""Many methods side by side at equal bytes and equal updates: all with a few seeds, the best of them with many.

A board's ``entries`` are strategies, alone or combined, with a memory, a mixer or another separator where they have
one. Each entry is given the budget's bytes beside the base separator: what its own state and its own weights leave of
them is filled with exemplars (:func:`avsep.evaluation.budget.align`). All entries run the screening seeds; the best
``share`` of them on validation pairs, the control and the references run all seeds.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from avsep.data.store import Store
from avsep.data.tasks import TaskStream
from avsep.errors import AvsepError, ConfigError, UnknownNameError, near_matches
from avsep.evaluation.budget import align, estimate
from avsep.registry import MEMORIES, STRATEGIES
from avsep.reproduce.grid import Grid, Row, assemble, base_separators, spec_of_row
from avsep.reproduce.preset import GridPreset, Hypothesis, PresetModel, load_grid_preset, presets_in, read_preset
from avsep.reproduce.results import ResultStore
from avsep.reproduce.tables import Line, Table, build_table
from avsep.reproduce.tuning import FIRST as TUNING_FIRST
from avsep.reproduce.tuning import SEEDS as TUNING_SEEDS
from avsep.reproduce.tuning import candidates_of, tuning_grid
from avsep.separator.build import build_from_spec
from avsep.spec import PRESETS, ComponentRef, RunSpec, TrainSpec, apply_settings, load_preset, validated
from avsep.strategies import build_strategy

__all__ = [
    "BoardPreset",
    "Entry",
    "board_tuning",
    "build_board",
    "list_board_presets",
    "load_board_preset",
    "load_package",
    "next_round",
    "parse_component",
    "sweep_of",
    "tables_of",
]

_FOLDER = PRESETS / "leaderboard"


class Entry(PresetModel):
    """One line of a board. ``memory``: ``board``, the board's; ``none``; or one of its own. ``reference``: no
    competitor, such as the upper bound: it may keep what it wants, and runs all seeds. ``tuning``: the settings of the
    first strategy among which ``avsep leaderboard --tune`` chooses."""

    name: str
    label: str = ""
    strategies: tuple[ComponentRef, ...] = Field(min_length=1)
    memory: Literal["board", "none"] | ComponentRef = "board"
    train: dict[str, Any] = Field(default_factory=dict)
    separator: dict[str, Any] = Field(default_factory=dict)
    reference: bool = False
    tuning: tuple[dict[str, Any], ...] = ()

    def row(self, memory: ComponentRef | None, *, shared: bool, settings: Mapping[str, Any] | None = None) -> Row:
        """The grid's row with that memory; ``shared``: exemplars are seen as often as one a class would be;
        ``settings`` go over the first strategy's own."""
        first, *beside = self.strategies
        return Row(
            name=self.name,
            label=self.label or self.name,
            strategy=first.name,
            params={**first.params, **(settings or {})},
            memory=memory,
            train={**({"memory_share": "constant"} if shared else {}), **self.train},
            separator=dict(self.separator),
            beside=tuple(beside),
        )


class BoardPreset(PresetModel):
    """What stands on a board. ``grid``: the preset of ``avsep reproduce`` that has data, tasks and bases; ``budgets``
    by name: bytes beside the separator, or ``model``, as many as the separator itself has."""

    summary: str = ""
    source: str = ""
    measured: str = ""
    grid: str = "small"
    bases: tuple[str, ...] = ("iquery",)
    memory: ComponentRef = Field(
        default_factory=lambda: ComponentRef(name="class_balanced", params={"keep": "clip"}),
        description="of entries without one of their own; a budget sets its size",
    )
    budgets: dict[str, int | Literal["model"]] = Field(default_factory=dict)
    entries: tuple[Entry, ...] = Field(min_length=1)
    settings: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="of entries' first strategies, by base and entry: what --tune has chosen"
    )
    control: str = Field(description="the entry that the others' differences are to")
    screening: int = Field(6, ge=1, description="seeds of every entry")
    seeds: int = Field(20, ge=1, description="seeds of the best")
    tuning_tasks: int = Field(2, ge=2, description="that --tune learns")
    tuning_seeds: int = Field(
        TUNING_FIRST, ge=TUNING_FIRST, description="of every candidate of --tune; open ones get more"
    )
    hypotheses: tuple[Hypothesis, ...] = Field(
        default=(), description="what was predicted of its rows, before they were run"
    )
    share: float = Field(1 / 3, gt=0, le=1, description="of the entries that run all seeds")

    def check(self) -> None:
        """Raise where two entries share a name or there is no control."""
        names = [entry.name for entry in self.entries]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two entries are called '{name}': give each a name of its own")
        for base, of_base in self.settings.items():
            if base not in self.bases:
                raise UnknownNameError(
                    f"settings of '{base}', which is no base of the board: {near_matches(base, self.bases)}"
                )
            for name in of_base:
                if name not in names:
                    raise UnknownNameError(f"settings of '{name}', which is no entry: {near_matches(name, names)}")
        for one in self.hypotheses:
            for name in (one.row, one.against):
                if name not in names:
                    raise UnknownNameError(
                        f"hypothesis '{one.name}' is of '{name}', which is no entry: {near_matches(name, names)}"
                    )
        if self.control not in names:
            raise UnknownNameError(
                f"no entry named '{self.control}' to compare with: {near_matches(self.control, names)}"
            )

    def check_entries(self, chosen: Sequence[str]) -> None:
        """Raise where one of these is no entry."""
        known = [entry.name for entry in self.entries]
        for name in chosen:
            if name not in known:
                raise UnknownNameError(f"no entry named '{name}': {near_matches(name, known)}")


def list_board_presets() -> dict[str, str]:
    """Names and summaries of the presets of ``avsep leaderboard``."""
    return presets_in(_FOLDER)


def load_board_preset(name: str) -> BoardPreset:
    """A board's preset by name, or from a YAML file.

    Raises:
        UnknownNameError: no such preset.
        ConfigError: the file is not one.
    """
    made = read_preset(name, _FOLDER, BoardPreset, needs="entries", command="avsep leaderboard")
    made.check()
    return made


def load_package(name: str) -> list[Entry]:
    """Import a package that registers strategies of its own; an entry for each of them, with its defaults.

    Raises:
        ConfigError: it cannot be imported, or registers none.
    """
    before = set(STRATEGIES.names())
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever somebody's module does when it is imported
        said = str(error) or type(error).__name__
        raise ConfigError(f"--with {name}: it cannot be imported ({type(error).__name__}: {said})") from None
    brought = [
        spec
        for spec in STRATEGIES
        if spec.name not in before or spec.factory.__module__.partition(".")[0] == module.__name__.partition(".")[0]
    ]
    if not brought:
        raise ConfigError(f"--with {name}: it registers no strategy (CONTRIBUTING.md has an example)")
    return [
        Entry(name=spec.name, label=f"{spec.name} [{name}]", strategies=(ComponentRef(name=spec.name),))
        for spec in brought
    ]


# --- the grid ---------------------------------------------------------------------------------------------------------


def build_board(
    board: BoardPreset,
    store: Store,
    *,
    grid: GridPreset | None = None,
    bases: Sequence[str] | None = None,
    entries: Sequence[str] | None = None,
) -> Grid:
    """All cells of a board, of all seeds; its tables are the budgets, or one that is called ``board``.

    ``grid`` stands for the preset that the board names, ``entries`` are a choice by name, beside the control. An entry
    that a base cannot run, or that does not fit into a budget, is left out with a note.

    Raises:
        UnknownNameError, ConfigError: a name that is not there.
    """
    board.check()
    preset = grid if grid is not None else load_grid_preset(board.grid)
    wanted = tuple(bases or board.bases)
    preset.check_bases(wanted)
    board.check_entries(entries or ())
    chosen = [e for e in board.entries if not entries or e.name in entries or e.name == board.control]
    _, streams = base_separators(preset, store, seeds=1)
    stream = streams[preset.seed]
    rows: dict[str, dict[str, list[Row]]] = {}
    notes: dict[str, list[str]] = {}
    budgets: dict[str, int | Literal["model"] | None] = {**board.budgets} or {"board": None}
    for table, size in budgets.items():
        rows[table], notes[table] = {}, []
        for base in wanted:
            make = _Rows(board, preset, base, stream, size)
            rows[table][base] = [row for entry in chosen if (row := make.row(entry, notes[table])) is not None]
            if board.control not in {row.name for row in rows[table][base]}:
                label = next(e.label or e.name for e in chosen if e.name == board.control)
                why = next(note for note in notes[table] if note.startswith(f"{label} is left out"))
                raise ConfigError(f"the control '{board.control}' cannot be run: {why}")
            notes[table] += make.said
    return assemble(rows, notes, preset, store, seeds=board.seeds)


class _Rows:
    """Rows of one base at one budget."""

    def __init__(
        self, board: BoardPreset, preset: GridPreset, base: str, stream: TaskStream, size: int | Literal["model"] | None
    ) -> None:
        self.board, self.preset, self.base, self.stream = board, preset, base, stream
        self.said: list[str] = []
        self.limit: int | None = None
        if size is not None:
            plain = Entry(name="plain", strategies=(ComponentRef(name="finetune"),), memory="none")
            model = estimate(self._spec(plain.row(None, shared=False)), stream.store).total
            more = model if size == "model" else int(size)
            self.limit = model + more
            self.said.append(
                f"{base}: {more / 1e6:.2f} MB beside the separator's {model / 1e6:.2f} MB may go from task to task."
            )

    def _spec(self, row: Row) -> RunSpec:
        separator = self.preset.separator(self.base, row.separator)
        return spec_of_row(row, self.preset.train_spec(self.base, row.train), separator, self.stream)

    def row(self, entry: Entry, notes: list[str], settings: Mapping[str, Any] | None = None) -> Row | None:
        """The entry's row, or None with a note that says why there is none; ``settings`` in place of those chosen."""
        own = self.board.memory if entry.memory == "board" else entry.memory
        memory = own if isinstance(own, ComponentRef) and own.name != "none" else None
        chosen = settings or self.board.settings.get(self.base, {}).get(entry.name)
        row = entry.row(memory, shared=self.limit is not None, settings=chosen)
        try:
            spec = self._spec(row)
            spec.check()
            strategy = build_strategy(spec.strategies)
            strategy.check(build_from_spec(spec.separator.of_classes(spec.tasks[0])))
            strategy.check_classes([name for task in spec.tasks for name in task])
            if strategy.uses_all_data:
                if self.limit is not None and not entry.reference:
                    raise ConfigError("it keeps all data, which no budget bounds: make it a reference")
                return replace(row, memory=None)
            if self.limit is None or entry.reference:
                return row
            if memory is None:
                kept = estimate(spec, self.stream.store).total
                if kept > self.limit:
                    raise ConfigError(f"it keeps {kept / 1e6:.2f} MB, more than the {self.limit / 1e6:.2f} MB")
                return row
            aligned = align({row.label: spec}, self.stream.store, budget=self.limit)[row.label]
        except UnknownNameError as error:  # a slip of the preset's, on every base
            raise ConfigError(f"entry '{entry.name}' of the board: {error}") from error
        except AvsepError as error:
            why = str(error).removeprefix(f"{row.label} ").rstrip(".")
            notes.append(
                f"{row.label} is left out on {self.base}: it {why}."
                if why[:6] == "keeps "
                else f"{row.label} is left out on {self.base}: {why}."
            )
            return None
        return replace(row, memory=None if aligned.memory.name == "none" else aligned.memory)


def next_round(board: BoardPreset, grid: Grid, results: ResultStore, failed: Collection[str] = ()) -> Grid | None:
    """What is to be run next, as a part of ``grid``; None where the board is finished. ``failed`` are keys of cells
    that cannot be had: their rows are judged by what there is."""
    wanted: set[str] = set()
    for table, of_base in grid.rows.items():
        for base, rows in of_base.items():
            keys = {row.name: grid.keys(table, base, row.name) for row in rows}
            screened = min(board.screening, len(grid.seeds))
            missing = {key for of_row in keys.values() for key in of_row[:screened] if key not in results}
            missing.difference_update(failed)
            if missing:
                wanted |= missing
                continue
            for name in _best(board, grid, table, base, results):
                wanted |= {key for key in keys[name] if key not in results and key not in failed}
    return replace(grid, cells={key: cell for key, cell in grid.cells.items() if key in wanted}) if wanted else None


def _best(board: BoardPreset, grid: Grid, table: str, base: str, results: ResultStore) -> list[str]:
    """The rows that run all seeds: the best of the screening seeds on validation pairs, so that the choice does not
    favour them in the test; the control; and the references."""
    references = {entry.name for entry in board.entries if entry.reference}
    scores: dict[str, float] = {}
    for row in grid.rows[table][base]:
        if row.name in references:
            continue
        found = [results.get(key) for key in grid.keys(table, base, row.name)[: board.screening]]
        known = [one.validation for one in found if one is not None]
        scores[row.name] = float(np.mean(known)) if known else -math.inf
    count = math.ceil(len(scores) * board.share)
    best = sorted(scores, key=lambda name: -scores[name])[:count]
    more = [row.name for row in grid.rows[table][base] if row.name in references or row.name == board.control]
    return list(dict.fromkeys([*best, *more]))


def tables_of(
    board: BoardPreset,
    grid: Grid,
    results: ResultStore,
    *,
    data_set: str,
    preset: str,
    title: Callable[[str], str],
    failed: Mapping[str, str] | None = None,
) -> list[Table]:
    """A table for each budget, ``title`` its name; its rows in the order of their difference to the control, which is
    of the same seeds, where rows have other numbers of them."""
    made = []
    for name in grid.rows:
        table = build_table(
            grid,
            name,
            results,
            data_set=data_set,
            preset=preset,
            failed=failed,
            title=title(name),
            control=board.control,
            hypotheses=board.hypotheses,
        )
        lines = {base: tuple(sorted(of_base, key=lambda line: -rank(line))) for base, of_base in table.lines.items()}
        # what is shown before the board is finished says of each row what is missing
        own = replace(grid, rows={name: grid.rows[name]})
        screened = board.screening < table.most_seeds and next_round(board, own, results, failed or ()) is None
        note = (
            f"All rows have {board.screening} seeds; the best {board.share:.0%} of them on validation pairs, the "
            f"control and the references have {table.most_seeds}. Rows stand in the order of their difference to the "
            "control."
        )
        made.append(replace(table, lines=lines, screened=screened, notes=(*table.notes, *([note] if screened else []))))
    return made


def board_tuning(
    board: BoardPreset,
    store: Store,
    *,
    grid: GridPreset | None = None,
    bases: Sequence[str] | None = None,
    entries: Sequence[str] | None = None,
    seeds: int = TUNING_SEEDS,
) -> Grid:
    """A grid of the candidates of all entries that have some, at the board's first budget
    (:mod:`avsep.reproduce.tuning`).

    Raises:
        ConfigError: no entry has any.
    """
    preset = grid if grid is not None else load_grid_preset(board.grid)
    whole = build_board(board, store, grid=preset, bases=bases, entries=entries)
    table = next(iter(whole.rows))
    tunings = {entry.name: entry for entry in board.entries if entry.tuning}
    size = next(iter(board.budgets.values()), None)
    rows: dict[str, list[Row]] = {}
    for base, of_base in whole.rows[table].items():
        make = _Rows(board, preset, base, whole.stream, size)
        rows[base] = []
        for name in (row.name for row in of_base if row.name in tunings):
            for settings in tunings[name].tuning:  # each with what its own state leaves of the budget
                if (row := make.row(tunings[name], [], settings)) is not None:
                    rows[base] += candidates_of(row, [row.params])
    if not any(rows.values()):
        raise ConfigError("no entry of the board has 'tuning', such as [{weight: 0.1}, {weight: 1}]: nothing to tune")
    tuning = tuning_grid(rows, preset, store, seeds=seeds, tasks=board.tuning_tasks)
    return replace(tuning, notes={name: whole.notes.get(table, []) for name in tuning.rows})


def rank(line: Line) -> float:
    """By what a row is placed: its difference in SDR to the control, 0 of the control itself, in dB."""
    if line.ours is None:
        return -math.inf
    difference = line.ours.differences.get("sdr")
    return 0.0 if difference is None else difference.mean


# --- a sweep ----------------------------------------------------------------------------------------------------------

_METHOD = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)(?:\((.*)\))?")


def parse_component(text: str) -> ComponentRef:
    """``name`` or ``name(key=value, key=value)``; values are YAML.

    Raises:
        ConfigError: it is neither.
    """
    found = _METHOD.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"'{text}' is no component: write NAME or NAME(KEY=VALUE, ...), such as lwf(weight_mask=0.1)")
    name, inside = found.groups()
    settings = [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", inside)] if inside else []
    return ComponentRef(name=name, params=apply_settings({}, settings))


def sweep_of(
    methods: Sequence[str],
    memories: Sequence[str],
    *,
    preset: str,
    tasks: int | None = None,
    seeds: int = 3,
    orders: str = "rotated",
    updates: int | None = None,
    threads: int = 1,
    changes: Mapping[str, Any] | None = None,
) -> tuple[BoardPreset, GridPreset]:
    """A board of every method with every memory, and the grid it stands on, which has one base: ``preset``.

    ``methods`` are strategies as :func:`parse_component` reads them, combined with ``+``; the first is the control.
    Those that need a memory are left out beside ``none``.

    Raises:
        ConfigError, UnknownNameError: a text that cannot be read, or a name that is not there.
    """
    entries: list[Entry] = []
    for memory in map(parse_component, memories):
        memory.check(MEMORIES)
        for text in methods:
            refs = tuple(parse_component(part) for part in re.split(r"\+(?![^(]*\))", text))
            strategy = build_strategy(refs)
            if memory.name == "none" and strategy.needs_memory:
                if text == methods[0] and not entries:
                    raise ConfigError(
                        f"the first method, '{text}', is what the others are held against and needs a memory: begin "
                        "with another, or with another --memory than none"
                    )
                continue
            name = text.replace(" ", "")
            if len(memories) > 1 and not strategy.uses_all_data:
                name += f", {_short(memory)}"
            if all(entry.name != name for entry in entries):  # joint training has no memory, and is run once
                kept: Literal["none"] | ComponentRef = "none" if strategy.uses_all_data else memory
                entries.append(Entry(name=name, strategies=refs, memory=kept))
    if not entries:
        raise ConfigError("nothing to compare: every method needs a memory, and --memory none gives none")
    base = Path(preset).stem
    grid = validated(
        GridPreset,
        {
            "bases": {base: {"preset": preset, **(changes or {})}},
            "orders": orders,
            "updates": updates,
            "seeds": seeds,
            "threads": threads,
            "seed": int(load_preset(preset).get("train", {}).get("seed", TrainSpec().seed)),
            **({} if tasks is None else {"tasks": tasks}),
        },
        "sweep",
    )
    board = BoardPreset(
        grid="", bases=(base,), entries=tuple(entries), control=entries[0].name, screening=seeds, seeds=seeds
    )
    board.check()
    return board, grid


def _short(memory: ComponentRef) -> str:
    inside = ",".join(f"{key}={value}" for key, value in memory.params.items())
    return f"{memory.name}({inside})" if inside else memory.name

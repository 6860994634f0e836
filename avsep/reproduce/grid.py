"""Grids as plain data: which runs stand behind which row of which table.

Rows as in tables 1 to 3 and figures 3 and 4 of Pian et al., NeurIPS 2024, with fine-tuning with memory (plain replay)
beside them, the control that the paper leaves out. Beyond the paper's: ContAV-Sep with the published weights where the
preset has others, and joint training for longer than the others where the preset says so.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

from avsep.data.protocol import PROTOCOLS
from avsep.data.store import Store
from avsep.data.tasks import TaskStream, task_stream
from avsep.errors import AvsepError, ConfigError, UnknownNameError, near_matches
from avsep.evaluation.evaluate import EVALUATION_VERSION
from avsep.files import sha256_file
from avsep.mixers.mixtures import epoch_steps
from avsep.registry import (
    ADAPTERS,
    AUDIO_ENCODERS,
    MASK_DECODERS,
    MEMORIES,
    MIXERS,
    STRATEGIES,
    VISUAL_ENCODERS,
    Registry,
)
from avsep.reproduce.preset import GridPreset, Hypothesis
from avsep.spec import ComponentRef, RunSpec, SeparatorSpec, TrainSpec
from avsep.strategies import build_strategy

__all__ = [
    "BASES",
    "BASE_TITLES",
    "TABLES",
    "Cell",
    "Grid",
    "Row",
    "assemble",
    "base_separators",
    "build_grid",
    "finished_part",
    "identity_key",
    "selection",
    "spec_of_row",
    "table1_rows",
]

# Raise it when a cell's result changes though nothing of its identity does. 2: AV-CIL's first task is plain, and no
# result goes without the processor that it was computed on.
GRID_VERSION = 2

BASES = ("iquery", "coseparation")
BASE_TITLES = {"iquery": "iQuery", "coseparation": "Co-Separation"}
TABLES = ("table1", "table2", "table3", "figure3", "figure4", "budget")
"""Of the paper, and the comparison at equal bytes."""

CROSSSDC = "crosssdc"
"""Why CrossSDC costs or helps: the table behind docs/hypotheses.md, on bases whose decoder may detach f_a."""

# table -> the bases it has in the paper
_BASES_OF = {name: BASES if name in ("table1", "figure3") else BASES[:1] for name in (*TABLES, CROSSSDC)}


def needs_data(tables: Sequence[str]) -> bool:
    """Whether some of the tables cannot be planned without the data: memories at equal bytes are sized by the clips."""
    return "budget" in tables


@dataclass(frozen=True)
class Row:
    """One line of a table: a method. ``train`` and ``separator`` change the training and the base separator, ``memory``
    None means without; ``beside`` are strategies that ``strategy`` is combined with."""

    name: str
    label: str
    strategy: str
    params: dict[str, Any] = field(default_factory=dict)
    memory: ComponentRef | None = None
    train: dict[str, Any] = field(default_factory=dict)
    separator: dict[str, Any] = field(default_factory=dict)
    beside: tuple[ComponentRef, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    ``identity`` is everything that decides its result, ``key`` a hash of it; ``first_identity`` and ``first_key``
    likewise of its first task, which cells that agree in it share. ``steps`` is about how many optimisation steps it
    takes beyond the first task. ``problem`` says why it cannot be run, if so. ``tested``: it is scored on test
    mixtures; what chooses settings is not, and has the validation scores of its tasks alone. ``shares_first``: its
    first task may be another's; where its strategy does not say so, the cell learns it by itself.
    """

    base: str
    row: Row
    seed: int
    spec: RunSpec
    key: str
    identity: dict[str, Any]
    first_key: str
    steps: int
    first_steps: int
    problem: str = ""
    tested: bool = True
    shares_first: bool = True

    @property
    def name(self) -> str:
        """For file names and messages."""
        return f"{self.base}-{self.row.name}-s{self.seed}"


@dataclass(frozen=True)
class Grid:
    """Cells by key; ``rows`` of each table by base, ``notes`` on it, and the cells of a row in the order of the seeds.

    ``rows``: {table: {base: [Row, ...]}}; ``places``: {(table, base, row): keys}; ``streams``: the tasks of each seed.
    """

    preset: GridPreset
    streams: dict[int, TaskStream]
    seeds: tuple[int, ...]
    rows: dict[str, dict[str, list[Row]]]
    notes: dict[str, list[str]]
    cells: dict[str, Cell]
    places: dict[tuple[str, str, str], tuple[str, ...]]

    @property
    def stream(self) -> TaskStream:
        """The first seed's; all are of one store, protocol and number of tasks."""
        return self.streams[self.seeds[0]]

    @property
    def store(self) -> Store:
        return self.stream.store

    def keys(self, table: str, base: str, row: str) -> tuple[str, ...]:
        return self.places[table, base, row]


def identity_key(identity: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


# --- rows -------------------------------------------------------------------------------------------------------------


PUBLISHED = "contavsep-published+memory"
JOINT_LONG = "joint-long"


def table1_rows(base: str, preset: GridPreset) -> list[Row]:
    def row(strategy: str, label: str, memory: bool) -> Row:
        name = f"{strategy}+memory" if memory else strategy
        return Row(
            name=name,
            label=label,
            strategy=strategy,
            params=preset.params(base, name, strategy),
            memory=preset.memory if memory else None,
        )

    named = (("finetune", "fine-tuning"), ("lwf", "LwF"), ("ewc", "EWC"), ("plop", "PLOP"), ("ewf", "EWF"))
    without = [row(strategy, label, False) for strategy, label in named]
    more = (("avcil", "AV-CIL"), ("contavsep", "ContAV-Sep"))
    replay = [row("finetune", "plain replay", True)]
    with_memory = replay + [row(strategy, label, True) for strategy, label in (*named[1:], *more)]
    rows = [*without, *with_memory]
    if rows[-1].params:
        rows.append(Row(PUBLISHED, "ContAV-Sep, published weights", "contavsep", {}, preset.memory))
    rows.append(row("joint", "joint (upper bound)", False))
    if JOINT_LONG in preset.strategy_train:
        rows.append(replace(rows[-1], name=JOINT_LONG, label="joint, longer"))
    return rows


def _table2(preset: GridPreset) -> list[Row]:
    """ContAV-Sep's terms with the published weights, whatever others a preset has chosen: one of those may be 0."""
    parts: tuple[tuple[str, str, dict[str, float]], ...] = (
        ("mask", "L_dist", {"weight_instance": 0.0, "weight_class": 0.0}),
        ("mask+instance", "L_dist + L_inst", {"weight_class": 0.0}),
        ("mask+class", "L_dist + L_cls", {"weight_instance": 0.0}),
        ("mask+instance+class", "L_dist + L_inst + L_cls", {}),
    )
    return [Row(name, label, "contavsep", dict(off), preset.memory) for name, label, off in parts]


def _crosssdc(preset: GridPreset, train: TrainSpec) -> list[Row]:
    """ContAV-Sep with the contrast in several weights and forms, all with the published weight of its masks; without
    contrast, for longer, and in larger batches too."""
    published = {name: float(p.default) for p in STRATEGIES.get("contavsep").settings if (name := p.name) in _CONTRAST}

    def row(name: str, label: str, share: float, train: dict[str, Any], how: str = "shared") -> Row:
        params = {key: share * value for key, value in published.items()}
        changes = {} if how == "shared" else {"mask_decoder": {"params": {"contrast_embedding": how}}}
        return Row(name, label, "contavsep", params, preset.memory, train, changes)

    longer = {"epochs": 3 * train.epochs, "validate_every": 3 * train.validate_every}
    larger = {"batch_size": 4 * train.batch_size}
    return [
        row("mask", "L_dist alone", 0.0, {}),
        row("published", "published weights", 1.0, {}),
        row("x0.3", "weights x 0.3", 0.3, {}),
        row("x0.1", "weights x 0.1", 0.1, {}),
        row("detached", "published, f_a detached", 1.0, {}, "detached"),
        row("projected", "published, f_a projected", 1.0, {}, "projected"),
        row("mask-longer", "L_dist alone, 3 x updates", 0.0, longer),
        row("published-longer", "published, 3 x updates", 1.0, longer),
        row("mask-batch", "L_dist alone, 4 x batch", 0.0, larger),
        row("published-batch", "published, 4 x batch", 1.0, larger),
    ]


HYPOTHESES = (
    Hypothesis(
        name="H1",
        row="published",
        against="mask",
        predicted="-",
        why="the published contrast costs SDR at this length of training",
    ),
    Hypothesis(
        name="H2",
        row="x0.1",
        against="published",
        predicted="+",
        why="a tenth of its weight costs less",
    ),
    Hypothesis(
        name="H3",
        row="x0.1",
        against="mask",
        predicted="+",
        why="a tenth of its weight helps",
    ),
    Hypothesis(
        name="H4",
        row="detached",
        against="published",
        predicted="+",
        why="it costs through its gradient to f_a, the vector that masks are made from",
    ),
    Hypothesis(
        name="H5",
        row="projected",
        against="published",
        predicted="+",
        why="a projection head on f_a takes most of the cost away",
    ),
    Hypothesis(
        name="H6",
        row="projected",
        against="detached",
        predicted="+",
        why="what it teaches the audio side through the head is worth something",
    ),
    Hypothesis(
        name="H7",
        row="published-longer",
        against="mask-longer",
        predicted="-",
        why="three times the updates do not take the cost away",
    ),
    Hypothesis(
        name="H8",
        row="published-batch",
        against="mask-batch",
        predicted="-",
        why="four times the batch, with more to contrast, does not take it away",
    ),
)
"""Name, row, the row it is held against, the sign that is predicted of the difference in SDR, and why."""

_CONTRAST = ("weight_instance", "weight_class")


def _table3(base: str, preset: GridPreset, stream: TaskStream) -> tuple[list[Row], list[str]]:
    counts = {
        name: len(stream.store.select(classes=[name], split="train"))
        for task in (stream.tasks[:-1] if preset.orders == "store" else stream.tasks)
        for name in task.classes
    }
    if len(stream) < 2:
        return [], ["Nothing to compare: with one task no class is of an earlier one, and no exemplar is replayed."]
    smallest = min(counts, key=lambda name: counts[name])
    rows, notes = [], []
    for k in preset.memory_sizes:
        if k > max(counts.values()):
            continue
        params = {**preset.memory.params, "per_class": k}
        if k > counts[smallest]:  # as the published code does
            params["short_class"] = "all"
            notes.append(
                f"K = {k}: a class with fewer clips (such as '{smallest}', {counts[smallest]}) keeps all it has."
            )
        memory = ComponentRef(name=preset.memory.name, params=params)
        # a larger memory holds more, and is not seen more often
        train = {"memory_share": "constant"} if k > 1 else {}
        params = preset.params(base, "contavsep+memory", "contavsep")
        rows.append(Row(f"K={k}", f"K = {k}", "contavsep", params, memory, train))
    if left := [k for k in preset.memory_sizes if k > max(counts.values())]:
        notes.append(
            f"K = {', '.join(map(str, left))} left out: no class of an earlier task has more than "
            f"{max(counts.values())} training clips."
        )
    return rows, notes


def _budget(base: str, preset: GridPreset, separator: SeparatorSpec, stream: TaskStream) -> tuple[list[Row], list[str]]:
    """Every method with the bytes that EWC without memory keeps: what its Fisher information takes, the others turn
    into exemplars."""
    from avsep.evaluation.budget import align, estimate

    rows = {row.name: row for row in table1_rows(base, preset) if row.name != PUBLISHED}
    ewc = rows["ewc"]
    limit = estimate(spec_of_row(ewc, preset.train_spec(base), separator, stream), stream.store).total
    title, found, full, notes = BASE_TITLES.get(base, base), [ewc], [], []
    for row in rows.values():
        if row.memory is None or row.strategy == "ewc":
            continue
        spec = spec_of_row(replace(row, memory=preset.budget_memory), preset.train_spec(base), separator, stream)
        try:
            aligned = align({row.label: spec}, stream.store, budget=limit)[row.label]
        except AvsepError as error:
            notes.append(f"{title}: {error}.")
            continue
        train = {"memory_share": "constant"}  # as many bytes, and as many steps
        found.append(replace(row, name=f"{row.strategy}+bytes", memory=aligned.memory, train=train))
        full += [row.label] if aligned.full else []
    notes.insert(
        0,
        f"{title}: every method may carry the {limit / 1e6:.2f} MB from task to task that EWC's weights and Fisher "
        "information take.",
    )
    if full:
        notes.append(f"{title}: {', '.join(full)} hold every clip there is, and have bytes to spare.")
    return found, notes


# --- cells ------------------------------------------------------------------------------------------------------------


def build_grid(
    tables: Sequence[str],
    preset: GridPreset,
    store: Store,
    *,
    seeds: int = 3,
    bases: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
) -> Grid:
    """The cells of ``tables`` on ``store``.

    ``bases`` are names of the preset's base separators (default: those of the paper's table), ``rows`` a choice of rows
    by name. A cell that cannot be run says so in ``problem``.

    Raises:
        UnknownNameError: a table, base or row that does not exist.
        DataError, ConfigError: the store or the preset does not fit.
    """
    if seeds < 1:
        raise ConfigError(f"seeds = {seeds}: give 1 or more")
    for table in tables:
        if table not in _BASES_OF:
            raise UnknownNameError(f"no table named '{table}': {near_matches(table, _BASES_OF)}")
    preset.check_bases(bases or ())
    specs, streams = base_separators(preset, store, seeds=1)
    stream = streams[preset.seed]

    made: dict[str, dict[str, list[Row]]] = {}
    notes: dict[str, list[str]] = {}
    for table in tables:
        wanted = bases or [b for b in _BASES_OF[table] if b in preset.bases] or list(preset.bases)
        made[table], notes[table] = {}, []
        for base in wanted:
            lines, said = _rows(table, base, preset, specs[base], stream)
            made[table][base] = lines
            notes[table] += [note for note in said if note not in notes[table]]
    if rows:
        known = {row.name for of_base in made.values() for lines in of_base.values() for row in lines}
        for name in rows:
            if name not in known:
                raise UnknownNameError(f"no row named '{name}' in {', '.join(tables)}: {near_matches(name, known)}")
        for of_base in made.values():
            for base, lines in of_base.items():
                of_base[base] = [row for row in lines if row.name in rows]

    return assemble(made, notes, preset, store, seeds=seeds)


def selection(grid: Grid, wanted: Callable[[Row, Sequence[str]], bool]) -> Grid:
    """The grid with those rows alone that are wanted, told by themselves and the keys of their cells. Bases and tables
    that are left without rows are taken out."""
    rows: dict[str, dict[str, list[Row]]] = {}
    for table, of_base in grid.rows.items():
        for base, lines in of_base.items():
            if kept := [row for row in lines if wanted(row, grid.keys(table, base, row.name))]:
                rows.setdefault(table, {})[base] = kept
    return replace(grid, rows=rows)


def finished_part(grid: Grid, results: Container[str]) -> Grid:
    """The grid with those rows, and on every base those seeds, alone that some finished cell is of; its notes say what
    is left out. ``results`` are the keys of finished cells."""
    part = selection(grid, lambda row, keys: _any_in(keys, results))
    places: dict[tuple[str, str, str], tuple[str, ...]] = {}
    notes = {table: list(said) for table, said in grid.notes.items()}
    for table, of_base in part.rows.items():
        gone = [BASE_TITLES.get(base, base) for base in grid.rows[table] if base not in of_base]
        notes[table] += [f"{title} is left out, with no cell finished." for title in gone]
        for base, lines in of_base.items():
            keys = {row.name: grid.keys(table, base, row.name) for row in lines}
            begun = [_any_in(of_seed, results) for of_seed in zip(*keys.values(), strict=True)]
            places |= {(table, base, name): tuple(compress(of_row, begun)) for name, of_row in keys.items()}
            notes[table] += _left_out(base, grid.rows[table][base], lines, len(begun), sum(begun))
    shown = {key for keys in places.values() for key in keys}
    cells = {key: cell for key, cell in grid.cells.items() if key in shown}
    seeds = tuple(seed for seed in grid.seeds if seed in {cell.seed for cell in cells.values()})
    return replace(part, seeds=seeds, places=places, cells=cells, notes=notes)


def _left_out(base: str, rows: Sequence[Row], shown: Sequence[Row], seeds: int, begun: int) -> list[str]:
    title, kept = BASE_TITLES.get(base, base), {row.name for row in shown}
    said = []
    if names := [row.name for row in rows if row.name not in kept]:
        said.append(f"{title}: left out, with no cell finished: {', '.join(names)}.")
    if begun < seeds:
        said.append(f"{title}: {begun} of {seeds} seeds, no cell of the others is finished.")
    return said


def _any_in(keys: Sequence[str], results: Container[str]) -> bool:
    return any(key in results for key in keys)


def rotated(tasks: Sequence[Sequence[str]], number: int) -> list[list[str]]:
    """The class order of seed ``number``, counted from 0, with tasks of the same sizes (:class:`GridPreset`)."""
    block, moved = divmod(number, len(tasks))
    names = [name for names in tasks for name in names]
    if block:
        random.Random(f"order {block}").shuffle(names)
    left = iter(names)
    made = [[next(left) for _ in task] for task in tasks]
    return made[moved:] + made[:moved]


def base_separators(
    preset: GridPreset, store: Store, *, seeds: int, most_tasks: int | None = None
) -> tuple[dict[str, SeparatorSpec], dict[int, TaskStream]]:
    """The base separators, and by seed the tasks that all of them learn; of ``most_tasks`` the first."""
    specs = {base: preset.separator(base) for base in preset.bases}
    lengths = {spec.front_end.clip_samples for spec in specs.values()}
    if len(lengths) > 1:
        raise ConfigError(
            f"the preset's base separators have clips of {' and '.join(map(str, sorted(lengths)))} samples: give all "
            "the same front_end.clip_samples, so that they are tested on the same mixtures"
        )
    tasks: Any = preset.tasks
    length = lengths.pop()
    whole = task_stream(store, tasks, protocol=preset.protocol, clip_samples=length)
    lists = [list(task.classes) for task in whole.tasks]
    made: dict[int, TaskStream] = {}
    known: dict[str, TaskStream] = {} if most_tasks else {str(lists): whole}
    for number in range(seeds):
        order = (rotated(lists, number) if preset.orders == "rotated" else lists)[:most_tasks]
        if str(order) not in known:
            known[str(order)] = task_stream(store, order, protocol=preset.protocol, clip_samples=length)
        made[preset.seed + number] = known[str(order)]
    return specs, made


def assemble(
    rows: dict[str, dict[str, list[Row]]],
    notes: dict[str, list[str]],
    preset: GridPreset,
    store: Store,
    *,
    seeds: int,
    most_tasks: int | None = None,
    tested: bool = True,
) -> Grid:
    """The grid of given rows, by table and base; cells that several tables share are one. ``most_tasks``: as many of
    the stream's first ones alone; ``tested``: see :class:`Cell`."""
    specs, streams = base_separators(preset, store, seeds=seeds, most_tasks=most_tasks)
    numbers = tuple(streams)
    cells: dict[str, Cell] = {}
    places: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for table, of_base in rows.items():
        for base, lines in of_base.items():
            for row in lines:
                separator = preset.separator(base, row.separator) if row.separator else specs[base]
                own = [_cell(base, row, seed, preset, separator, streams[seed], tested) for seed in numbers]
                places[table, base, row.name] = tuple(cell.key for cell in own)
                for cell in own:
                    cells.setdefault(cell.key, cell)
    return Grid(preset, streams, numbers, rows, notes, cells, places)


def _rows(
    table: str, base: str, preset: GridPreset, separator: SeparatorSpec, stream: TaskStream
) -> tuple[list[Row], list[str]]:
    """The rows of a table on one base separator, and what must be said of them."""
    if table in ("table3", "figure4"):
        return _table3(base, preset, stream)
    if table == "budget":
        return _budget(base, preset, separator, stream)
    if table == CROSSSDC:
        return _crosssdc(preset, preset.train_spec(base)), []
    return (_table2(preset) if table == "table2" else table1_rows(base, preset)), []


def spec_of_row(row: Row, train: TrainSpec, separator: SeparatorSpec, stream: TaskStream) -> RunSpec:
    return RunSpec(
        separator=separator,
        strategy=_strategy(row),
        memory=row.memory or ComponentRef(name="none"),
        train=train,
        tasks=tuple(t.classes for t in stream.tasks),
        protocol=stream.protocol.name,
        validation_protocol=stream.validation.name,
        store_hash=stream.store.content_hash,
    )


_SWITCHED_OFF = ("lwf", "ewc", "plop", "avcil", "contavsep")  # with every weight at 0 these are fine-tuning


def _strategy(row: Row) -> ComponentRef | tuple[ComponentRef, ...]:
    """The row's strategy; fine-tuning where all of its weights are 0, so that it is the same cell."""
    if row.beside:
        return (ComponentRef(name=row.strategy, params=row.params), *row.beside)
    if row.strategy in _SWITCHED_OFF:
        settings = {p.name: p.default for p in STRATEGIES.get(row.strategy).settings} | row.params
        if not any(value for name, value in settings.items() if name.startswith("weight")):
            return ComponentRef(name="finetune")
    return ComponentRef(name=row.strategy, params=row.params)


def _cell(
    base: str, row: Row, seed: int, preset: GridPreset, separator: SeparatorSpec, stream: TaskStream, tested: bool
) -> Cell:
    changes = preset.strategy_train.get(row.name, preset.strategy_train.get(row.strategy, {}))
    train = preset.train_spec(base, changes, row.train, {"seed": seed})
    spec = spec_of_row(row, train, separator, stream)
    common = {
        "store_hash": spec.store_hash,
        "features": _features(separator, stream.store),
        "threads": preset.threads,
        **({"packages": packages} if (packages := _packages(spec)) else {}),
        "versions": {
            "grid": GRID_VERSION,
            "evaluation": EVALUATION_VERSION,
            "protocol": PROTOCOLS[spec.protocol].version,
            "validation_protocol": PROTOCOLS[spec.validation_protocol].version,
        },
    }
    data = spec.model_dump(mode="json", exclude={"store", "preset", "store_hash"})
    identity = {"spec": data, **common, **({} if tested else {"tested": False})}
    if tested and preset.dependence:
        identity["dependence"] = preset.dependence
    problem = ""
    first: dict[str, Any] | None = {}
    try:
        spec.check()
        first = build_strategy(spec.strategies).first_task()
    except AvsepError as error:
        problem = str(error)
    trained = train.model_dump(mode="json", exclude={"memory_repeats", "memory_share"})  # there are no exemplars yet
    items = len(stream.train_clips(stream.tasks[0])) * train.current_repeats
    trained["steps_per_epoch"] = epoch_steps(items, train)  # a limit above the list's is none
    first_identity = {
        "separator": data["separator"],
        "train": trained,
        "classes": list(stream.tasks[0].classes),
        # a first task that is not to be shared is this row's own
        "strategy": {"not_shared": data["strategy"]} if first is None else first,
        **common,
    }
    first_steps, steps = _steps(spec, train, stream)
    return Cell(
        base=base,
        row=row,
        seed=seed,
        spec=spec,
        key=identity_key(identity),
        identity=identity,
        first_key=identity_key(first_identity),
        steps=steps,
        first_steps=first_steps,
        problem=problem,
        tested=tested,
        shares_first=first is not None,
    )


def _packages(spec: RunSpec) -> dict[str, str]:
    """Hashes of the files of other packages whose components a run has: their code decides its result too."""
    parts = spec.separator
    named: list[tuple[Registry[Any], ComponentRef | None]] = [
        *((STRATEGIES, ref) for ref in spec.strategies),
        (MEMORIES, spec.memory),
        (MIXERS, spec.train.mixer),
        (AUDIO_ENCODERS, parts.audio_encoder),
        (MASK_DECODERS, parts.mask_decoder),
        (VISUAL_ENCODERS, parts.object_encoder),
        (VISUAL_ENCODERS, parts.motion_encoder),
        (ADAPTERS, parts.adapter),
    ]
    found = {}
    for registry, ref in named:
        if ref is not None and ref.name in registry.names():
            factory = registry.get(ref.name).factory
            if factory.__module__.partition(".")[0] != "avsep" and (file := inspect.getsourcefile(factory)):
                found[factory.__module__] = sha256_file(Path(file))
    return found


def _features(separator: SeparatorSpec, store: Store) -> dict[str, str]:
    """Hashes of the stored features that the separator reads; raises where the store has none of that name."""
    refs = (separator.object_encoder, separator.motion_encoder)
    names = [str(ref.params["features"]) for ref in refs if ref is not None and "features" in ref.params]
    return {name: store.feature_hash(name) for name in names}


def _steps(spec: RunSpec, train: TrainSpec, stream: TaskStream) -> tuple[int, int]:
    """About how many steps the first task takes, and the others together; for progress and for the order of work."""
    joint = spec.strategy_name == "joint"
    kept = int(spec.memory.params.get("per_class", 1)) if spec.memory.name != "none" and not joint else 0
    counts = []
    for task in stream.tasks:
        items = len(stream.train_clips(task, all_seen=joint)) * train.current_repeats
        each = train.memory_repeats if train.memory_share == "grow" else max(1, train.memory_repeats // max(1, kept))
        items += kept * len(task.old) * each
        counts.append(epoch_steps(items, train) * train.epochs)
    return max(1, counts[0]), max(1, sum(counts[1:]))

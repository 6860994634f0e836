"""The bytes that a method carries from one task to the next, and how to give every method the same.

Continual methods are only comparable when what they keep is counted: a Fisher diagonal is worth as many bytes as some
number of exemplars (Zhou et al., Class-Incremental Learning: A Survey, TPAMI 2024: count the model and the exemplars in
bytes, and turn what a method has to spare into exemplars). Counted are

- the model: its parameters and buffers as they are stored. The teacher and EWF's other endpoint are the stored model
  and cost nothing that persists; the copy of it in use while the next task is trained is given apart (``peak_extra``);
- what the strategy keeps beside the model, such as EWC's Fisher information;
- exemplars: audio as 16-bit integers, or as the memory's codec writes it; object and motion features in half
  precision, or the uint8 frames, as the store holds them, of a separator with frame encoders. Of a whole recording all
  of it; of a clip one crop, the ``frames`` consecutive object frames or vectors of its middle, and its motion frames
  (stored motion features are one sequence a video and come whole, once for all its crops). Exemplars that are ids into
  a store that stays cost nothing. Ids, classes and crop starts are not counted.

Encoders that are never trained are the same for every method: their bytes are given apart (``frozen``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from avsep.data.codecs import Codec, CodedCrops, PictureCodec, encode_frames
from avsep.data.mixing import collate, load_source
from avsep.data.opening import open_run_store
from avsep.data.store import Clip, Store
from avsep.data.tasks import make_tasks
from avsep.environment import seeded
from avsep.errors import CheckpointError, ConfigError
from avsep.memory import RandomPerClass
from avsep.memory.base import Candidates, Exemplar, Keep, Memory, MemoryPolicy, memory_rng, read_exemplars
from avsep.registry import MEMORIES
from avsep.runs.folder import RunFolder
from avsep.separator import Separator, build_from_spec, load_separator
from avsep.spec import ComponentRef, FrontEndSpec, RunSpec, SeparatorSpec
from avsep.strategies import build_strategy
from avsep.strategies.base import Strategy, TaskContext
from avsep.types import Batch, Task, VisualSource

__all__ = ["Aligned", "Budget", "ExemplarBytes", "ExemplarScale", "align", "budget_of", "estimate", "exemplar_bytes"]

_AUDIO_BYTES = 2  # int16
_FEATURE_BYTES = 2  # float16

Sizes = Literal["largest", "mean"]
"""What an estimate takes for the exemplars, which are not drawn yet: the ``largest`` clips that they could be, so that
no draw exceeds it, or clips of their class's ``mean`` size, which random exemplars have on average."""


@dataclass(frozen=True)
class ExemplarBytes:
    """The bytes of one or of many exemplars."""

    audio: float = 0
    object: float = 0
    motion: float = 0

    @property
    def total(self) -> float:
        return self.audio + self.object + self.motion

    def __add__(self, other: ExemplarBytes) -> ExemplarBytes:
        return ExemplarBytes(self.audio + other.audio, self.object + other.object, self.motion + other.motion)

    def __mul__(self, count: float) -> ExemplarBytes:
        return ExemplarBytes(self.audio * count, self.object * count, self.motion * count)


@dataclass(frozen=True)
class Budget:
    """Bytes that persist after task ``task``, for the next one to start from.

    ``basis`` says where the exemplars' bytes come from: a ``run``, or an estimate by the ``largest`` or ``mean`` clips.
    """

    task: int
    parameters: int
    buffers: int
    strategy_state: int
    exemplars: int
    audio: int
    object: int
    motion: int
    frozen: int = 0
    peak_extra: int = 0
    basis: str = "run"

    @property
    def model(self) -> int:
        return self.parameters + self.buffers

    @property
    def exemplar_bytes(self) -> int:
        return self.audio + self.object + self.motion

    @property
    def total(self) -> int:
        """All that persists; without ``frozen`` and ``peak_extra``."""
        return self.model + self.strategy_state + self.exemplar_bytes

    def plain(self) -> dict[str, Any]:
        """Plain data for JSON, with the sums."""
        return {**asdict(self), "model": self.model, "exemplar_bytes": self.exemplar_bytes, "total": self.total}


@dataclass(frozen=True)
class Aligned:
    """A method brought to a common budget: its ``memory``, what it then keeps, and the bytes left over (``spare``).

    ``full``: no larger memory could be filled, whatever the budget.
    """

    memory: ComponentRef
    budget: Budget
    spare: int
    full: bool


def exemplar_bytes(
    store: Store,
    clip: Clip,
    sources: Sequence[VisualSource],
    front_end: FrontEndSpec,
    *,
    keep: Keep = "recording",
    audio: int | None = None,
    frames: Mapping[str, int] | None = None,
    again: bool = False,
) -> ExemplarBytes:
    """The bytes of one clip as an exemplar of a separator with these visual ``sources``.

    ``audio``: those of its sound, where it is not kept as 16-bit integers; ``frames``: those of its frames by role,
    where they are not kept as they are. ``again``: it is a further crop of a clip, whose stored motion features, which
    come whole, have been counted.

    Raises:
        DataError: the store lacks what a source asks for.
    """
    if keep == "id":
        return ExemplarBytes()
    crop = keep == "clip"
    if not store.has_pictures(clip):
        sources = ()
    sizes = {"object": 0, "motion": 0}
    for source in sources:
        shape = _shape(store, clip, source)
        rows, *rest = shape
        if crop and source.role == "object":
            rows = min(rows, max(1, source.frames))
        elif crop and source.kind == "frames":
            rows = min(rows, max(1, math.floor(front_end.clip_s * store.motion_rate_hz + 0.5)))
        elif again:
            rows = 0
        if source.kind == "frames" and frames is not None:
            sizes[source.role] += frames[source.role]
        else:
            sizes[source.role] += rows * math.prod(rest) * (1 if source.kind == "frames" else _FEATURE_BYTES)
    samples = min(clip.samples, front_end.clip_samples) if crop else clip.samples
    return ExemplarBytes(_AUDIO_BYTES * samples if audio is None else audio, sizes["object"], sizes["motion"])


class ExemplarScale:
    """Weighs exemplars of a separator with these visual ``sources``, as :class:`avsep.memory.base.Weigh` says."""

    def __init__(self, store: Store, sources: Sequence[VisualSource], front_end: FrontEndSpec) -> None:
        self._store = store
        self._sources = tuple(sources)
        self._front_end = front_end
        self._coded: dict[Codec, CodedCrops] = {}
        self._frames: dict[tuple[str, int, PictureCodec], dict[str, int]] = {}
        self._clips = {clip.id: clip for clip in store.clips}

    def __call__(self, exemplar: Exemplar, **how: Any) -> int:
        """The bytes, rounded up; ``how`` as :meth:`bytes_of` takes it."""
        return math.ceil(self.bytes_of(exemplar, **how).total)

    def bytes_of(
        self,
        exemplar: Exemplar,
        *,
        keep: Keep,
        codec: Codec = "int16",
        pictures: PictureCodec = "raw",
        again: bool = False,
    ) -> ExemplarBytes:
        """The bytes by kind; the parameters are those of :class:`avsep.memory.base.Weigh`."""
        clip, audio, frames = self._clips[exemplar.id], None, None
        if keep == "clip" and exemplar.start is None:  # chosen by another policy, and kept whole
            keep = "recording"
        if codec != "int16" and exemplar.start is not None:
            if codec not in self._coded:
                self._coded[codec] = CodedCrops(self._store, codec, self._front_end.clip_samples)
            audio = self._coded[codec].size(clip, exemplar.start)
        if pictures != "raw" and exemplar.start is not None:
            frames = self._of_frames(clip, exemplar.start, pictures)
        return exemplar_bytes(
            self._store, clip, self._sources, self._front_end, keep=keep, audio=audio, frames=frames, again=again
        )

    def _of_frames(self, clip: Clip, start: int, codec: PictureCodec) -> dict[str, int]:
        """By role the bytes of the frames of a crop, those that training sees beside it."""
        key = (clip.id, start, codec)
        if key not in self._frames:
            centre_s = (start + self._front_end.clip_samples // 2) / self._front_end.sample_rate_hz
            found: dict[str, int] = {}
            for source in self._sources if self._store.has_pictures(clip) else ():
                if source.kind == "frames":
                    array = self._store.read_visual(
                        clip, source, centre_s=centre_s, duration_s=self._front_end.clip_s, copy=False
                    )
                    found[source.role] = len(encode_frames(array, codec))
            self._frames[key] = found
        return self._frames[key]

    def of_all(self, memory: Memory, policy: MemoryPolicy) -> ExemplarBytes:
        """The bytes of all exemplars."""
        weight, ids = ExemplarBytes(), set()
        for exemplar in (e for kept in memory.values() for e in kept):
            weight += self.bytes_of(
                exemplar,
                keep=policy.keep,
                codec=policy.codec,
                pictures=policy.pictures,
                again=exemplar.id in ids,
            )
            ids.add(exemplar.id)
        return weight


def _shape(store: Store, clip: Clip, source: VisualSource) -> tuple[int, ...]:
    timeline = store.timeline(clip)
    frames = {"object": timeline.object, "motion": timeline.motion}
    array = frames.get(source.role) if source.kind == "frames" else timeline.features.get(source.name)
    if array is None:
        store.read_visual(clip, source, centre_s=0.0, duration_s=1.0)  # raises, naming what there is
        raise AssertionError(source)
    return array.shape


# ---------------------------------------------------------------------------------------------------------------- a run


def budget_of(run: str | Path, task: int | None = None, *, store: Store | str | Path | None = None) -> Budget:
    """What a run keeps after a finished task: by default the last that another one follows, or has been finished.

    ``store`` stands for the run's own; it is opened where exemplars are to be weighed. A strategy with
    ``uses_all_data`` keeps every training recording of the classes seen.

    Raises:
        RunError, CheckpointError, DataError: the folder is not a run, the task is not finished, or a file is missing
            or damaged.
    """

    folder = RunFolder(run)
    spec = folder.spec()
    finished = folder.finished_tasks()
    if task is None:
        task = min(finished[-1], max(len(spec.tasks) - 2, 0))
    if task not in finished:
        raise CheckpointError(f"{run} has no finished task {task}: it has {', '.join(str(t) for t in finished)}")
    separator = load_separator(run, task)
    strategy = build_strategy(spec.strategies)
    memory: MemoryPolicy = MEMORIES.create(spec.memory.name, spec.memory.params)
    kept = read_exemplars(run, task)
    weight = ExemplarBytes()
    weighed = folder.task(task).record().get("exemplar_bytes")  # of tasks whose exemplars need not be at hand
    if isinstance(weighed, dict):
        weight = ExemplarBytes(**weighed)
    elif kept or strategy.uses_all_data:
        opened = open_run_store(folder, store)
        if strategy.uses_all_data:
            memory = RandomPerClass()  # whole recordings
            kept = {c: [Exemplar(i.id) for i in opened.select(classes=[c], split="train")] for c in separator.classes}
        opened.clips_by_id([e.id for of in kept.values() for e in of])  # names one that is not there
        scale = ExemplarScale(opened, separator.visual_sources(), separator.spec.front_end)
        weight = scale.of_all(kept, memory)
    count = sum(len(of) for of in kept.values())
    state = folder.task(task).strategy_file
    return _budget(separator, strategy, task, _file_bytes(state) if state.is_file() else 0, count, weight, basis="run")


def _file_bytes(path: Path) -> int:
    from avsep.runs.checkpoint import load_tensors

    return sum(v.numel() * v.element_size() for v in load_tensors(path).values())


def _budget(
    separator: Separator,
    strategy: Strategy,
    task: int,
    state: int,
    count: int,
    weight: ExemplarBytes,
    *,
    basis: str,
) -> Budget:
    encoders = {
        "audio_encoder.": separator.audio_encoder,
        "object_encoder.": separator.object_encoder,
        "motion_encoder.": separator.motion_encoder,
    }
    frozen = tuple(prefix for prefix, encoder in encoders.items() if encoder is not None and encoder.frozen)
    parameters = {name for name, _ in separator.named_parameters()}
    sizes = {"parameters": 0, "buffers": 0, "frozen": 0}
    for name, value in separator.state_dict().items():
        kind = "frozen" if name.startswith(frozen) else "parameters" if name in parameters else "buffers"
        sizes[kind] += value.numel() * value.element_size()
    return Budget(
        task=task,
        strategy_state=state,
        exemplars=count,
        audio=math.ceil(weight.audio),
        object=math.ceil(weight.object),
        motion=math.ceil(weight.motion),
        peak_extra=sum(sizes.values()) if strategy.needs_teacher else 0,
        basis=basis,
        **sizes,
    )


# ------------------------------------------------------------------------------------------------------------ estimates


def estimate(spec: RunSpec, store: Store | str | Path, *, task: int | None = None, sizes: Sizes = "largest") -> Budget:
    """What a run of ``spec`` will keep after ``task`` (by default the last that another one follows), untrained.

    Model and strategy state are exact (a strategy that keeps something is asked once, with one mixture, for the size of
    what it keeps after a first task of as many classes). The exemplars are as many as the policy will keep, weighed by
    ``sizes``.

    Raises:
        ConfigError: the spec names no tasks, the task is not one of them, or the memory cannot be filled.
    """
    return _Estimator(store, task, sizes).estimate("the run", spec, spec.memory)


class _Estimator:
    """Estimates over one store that share what is slow: shapes, clip sizes, strategies' states."""

    def __init__(self, store: Store | str | Path, task: int | None, sizes: Sizes) -> None:
        if sizes not in ("largest", "mean"):
            raise ConfigError(f"sizes must be 'largest' or 'mean', got {sizes!r}")
        self.store = store if isinstance(store, Store) else Store.open(store)
        self.task = task
        self.sizes = sizes
        self._separators: dict[str, Separator] = {}
        self._states: dict[tuple[str, str], int] = {}
        self._weights: dict[tuple[Any, ...], ExemplarBytes] = {}

    def stream(self, name: str, spec: RunSpec) -> tuple[tuple[Task, ...], int]:
        """The spec's tasks, and the index of the one that is asked about."""
        if not spec.tasks:
            raise ConfigError(f"the spec of {name} names no tasks: give it lists of classes")
        tasks = make_tasks(spec.tested)
        index = max(len(tasks) - 2, 0) if self.task is None else self.task
        if not 0 <= index < len(tasks):
            raise ConfigError(f"{name} has {len(tasks)} tasks and no task {index}: count from 0")
        return tasks, index

    def estimate(self, name: str, spec: RunSpec, memory: ComponentRef) -> Budget:
        tasks, index = self.stream(name, spec)
        strategy = build_strategy(spec.strategies)
        separator = self._separator(_of_tasks(spec.separator, tasks[: index + 1], restarts=strategy.restarts))
        count, weight = self._exemplars(spec, strategy, memory, separator, tasks, index)
        return _budget(
            separator, strategy, index, self._state(spec, strategy, tasks[index]), count, weight, basis=self.sizes
        )

    def _separator(self, full: SeparatorSpec) -> Separator:
        """One without weights where that is possible: only shapes are asked for."""
        key = full.model_dump_json()
        if key not in self._separators:
            try:
                with seeded(0), torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of weights from a file that are not copied
                    self._separators[key] = build_from_spec(full)
            except Exception:  # a component that cannot be built so; what is wrong with the spec shows again here
                with seeded(0):
                    self._separators[key] = build_from_spec(full)
        return self._separators[key]

    def _state(self, spec: RunSpec, strategy: Strategy, task: Task) -> int:
        if not strategy.keeps_state:
            return 0
        full = spec.separator.of_classes(task.seen)
        key = (full.model_dump_json(), str([ref.model_dump_json() for ref in spec.strategies]))
        if key not in self._states:
            with seeded(0):
                separator = build_from_spec(full).eval()
                first = Task(index=0, classes=task.seen, seen=task.seen)
                ctx = TaskContext(first, separator, None, _OneMixture(self.store, separator))
                strategy.begin_task(ctx)
                strategy.after_task(ctx)
            self._states[key] = sum(_tensor_bytes(strategy.state_dict()))
        return self._states[key]

    def _exemplars(
        self,
        spec: RunSpec,
        strategy: Strategy,
        memory: ComponentRef,
        separator: Separator,
        tasks: Sequence[Task],
        index: int,
    ) -> tuple[int, ExemplarBytes]:
        clips = {name: self._train(name) for name in tasks[index].seen}
        weigh = self._weigh(separator)
        if strategy.uses_all_data:
            everything = [c for members in clips.values() for c in members]
            return len(everything), sum((weigh(c, "recording") for c in everything), ExemplarBytes())
        policy: MemoryPolicy = MEMORIES.create(memory.name, memory.params)
        policy.check({name: len(self._train(name)) for name in tasks[-1].old})
        held: Memory = {}
        scale = ExemplarScale(self.store, separator.visual_sources(), separator.spec.front_end)
        last = len(tasks) - (not strategy.memory_only)  # nothing else adds to it after the last one
        for task in tasks[: min(index + 1, last)]:
            candidates = Candidates(
                {name: clips[name] for name in task.classes},
                spec.separator.front_end,
                earlier={name: len(clips[name]) for name in task.old},
                weigh=scale,
            )
            held = policy.update(held, candidates, memory_rng(spec.train.seed, task.index))
        counts = {name: len(kept) for name, kept in held.items()}
        if policy.by_bytes:
            return sum(counts.values()), scale.of_all(held, policy)
        pools = (
            [(count, clips[name]) for name, count in counts.items()]
            if policy.by_class
            else [(sum(counts.values()), [c for name in tasks[index].seen for c in clips[name]])]
        )
        weight = ExemplarBytes()
        for count, pool in pools:
            if count:
                weights = sorted((weigh(c, policy.keep) for c in pool), key=lambda w: w.total, reverse=True)
                if self.sizes == "mean":
                    weight += sum(weights, ExemplarBytes()) * (count / len(weights))
                else:
                    weight += sum(weights[:count], ExemplarBytes())
        return sum(counts.values()), weight

    def _train(self, name: str) -> list[Clip]:
        return self.store.select(classes=[name], split="train")

    def _weigh(self, separator: Separator) -> Callable[[Clip, Keep], ExemplarBytes]:
        sources, front_end = separator.visual_sources(), separator.spec.front_end

        def weigh(clip: Clip, keep: Keep) -> ExemplarBytes:
            key = (clip.id, keep, sources, front_end.clip_samples, front_end.sample_rate_hz)
            if key not in self._weights:
                self._weights[key] = exemplar_bytes(self.store, clip, sources, front_end, keep=keep)
            return self._weights[key]

        return weigh


def _of_tasks(spec: SeparatorSpec, tasks: Sequence[Task], *, restarts: bool) -> SeparatorSpec:
    """The spec of the separator that the last of these tasks leaves."""
    first, *later = tasks[-1:] if restarts else tasks
    spec = spec.of_classes(first.seen)
    for task in later:
        spec = spec.grown(len(task.seen), task.seen)
    return spec


class _OneMixture:
    """:class:`~avsep.strategies.TaskData` that gives one mixture, however many are asked for."""

    def __init__(self, store: Store, separator: Separator) -> None:
        self.store = store
        self.separator = separator

    def batches(self, count: int, *, batch_size: int = 1) -> Iterator[Batch]:
        separator, names = self.separator, self.separator.classes
        sources = [
            load_source(
                self.store,
                self.store.select(classes=[name], split="train")[0],
                0,
                separator.spec.front_end,
                separator.visual_sources(),
                names.index(name),
            )
            for name in (names[0], names[-1])
        ]
        yield collate([sources])


def _tensor_bytes(state: Any) -> Iterable[int]:
    from avsep.runs.checkpoint import flatten_state

    return (v.numel() * v.element_size() for v in flatten_state(state)[0].values())


# ------------------------------------------------------------------------------------------------------------ alignment


def align(
    methods: Mapping[str, RunSpec],
    store: Store | str | Path,
    *,
    budget: int | None = None,
    task: int | None = None,
    sizes: Sizes = "largest",
    memory: ComponentRef | str = "random_per_class",
) -> dict[str, Aligned]:
    """Turn what each method has to spare into exemplars, so that all meet one budget of persistent bytes.

    Args:
        methods: specs by name, of runs over ``store``.
        budget: bytes; by default those of the method that keeps the most with its own memory.
        task: after which they are counted; by default the last that another one follows.
        sizes: ``largest`` (no draw of exemplars will exceed the budget) or ``mean`` (random ones meet it on average).
        memory: the policy of methods that have none; the others' own is resized (its ``per_class``, ``total`` or
            ``budget_bytes``).

    Returns:
        By name the resized memory (``none`` where not even the smallest fits) and the bytes left over.

    Raises:
        ConfigError: the budget is below what a method keeps without exemplars, or the memory cannot be resized
            (exemplars as ids cost nothing; a policy without ``per_class`` or ``total``; a method that keeps all data).
    """
    if not methods:
        raise ConfigError("there is no method to align: give at least one")
    if budget is not None and budget < 1:
        raise ConfigError(f"a budget of {budget} bytes is none: give the bytes that may persist")
    estimator = _Estimator(store, task, sizes)
    fallback = memory if isinstance(memory, ComponentRef) else ComponentRef(name=memory)
    fallback.check(MEMORIES)
    for name, spec in methods.items():
        if build_strategy(spec.strategies).uses_all_data:
            raise ConfigError(f"{name} ('{spec.strategy_name}') keeps all data, which no budget bounds: leave it out")
    if budget is None:
        budget = max(estimator.estimate(name, spec, spec.memory).total for name, spec in methods.items())
    return {name: _aligned(estimator, name, spec, budget, fallback) for name, spec in methods.items()}


def _aligned(estimator: _Estimator, name: str, spec: RunSpec, budget: int, fallback: ComponentRef) -> Aligned:
    bare = estimator.estimate(name, spec, ComponentRef(name="none"))
    if bare.total > budget:
        raise ConfigError(
            f"{name} keeps {bare.total:,} bytes without any exemplar, more than the budget of {budget:,}: raise the "
            f"budget to {bare.total:,} or leave it out"
        )
    ref = fallback if spec.memory.name == "none" else spec.memory
    settings = {p.name for p in MEMORIES.get(ref.name).settings}
    if "budget_bytes" in settings:
        return _filled(estimator, name, spec, budget, ref, bare)
    number = next((n for n in ("per_class", "total") if n in settings), None)
    if number is None:
        raise ConfigError(f"{name}: memory policy '{ref.name}' has neither per_class nor total: it cannot be resized")
    if ref.params.get("keep") == "id":
        raise ConfigError(
            f"{name}: exemplars kept as ids cost no bytes and meet any budget: use keep=recording or clip"
        )

    def sized(count: int) -> ComponentRef:
        return ComponentRef(name=ref.name, params={**ref.params, number: count})

    def fillable(count: int) -> bool:
        try:
            MEMORIES.create(ref.name, sized(count).params).check(clips)
        except ConfigError:
            return False
        return True

    tasks, _ = estimator.stream(name, spec)
    clips = {c: len(estimator.store.select(classes=[c], split="train")) for c in tasks[-1].old}
    if not clips:
        raise ConfigError(f"{name} has one task alone, which nothing is remembered for: there is nothing to align")
    most = sum(clips.values()) if number == "total" else max(clips.values())
    least = next((n for n in range(1, most + 1) if fillable(n)), None)
    if least is None:
        raise ConfigError(f"{name}: no size of memory '{ref.name}' can be filled with the clips of earlier tasks")
    most = _last(least, most, fillable)
    bounded = estimator.estimate(name, spec, sized(least)).total <= budget
    if not bounded:
        strategy = build_strategy(spec.strategies)
        if strategy.needs_memory:
            raise ConfigError(
                f"{name} needs a memory, and {number}={least} takes it beyond the budget of {budget:,} bytes: raise "
                f"the budget or leave it out"
            )
        return Aligned(ComponentRef(name="none"), bare, budget - bare.total, False)
    best = _last(least, most, lambda n: estimator.estimate(name, spec, sized(n)).total <= budget)
    found = estimator.estimate(name, spec, sized(best))
    return Aligned(sized(best), found, budget - found.total, best == most)


def _filled(estimator: _Estimator, name: str, spec: RunSpec, budget: int, ref: ComponentRef, bare: Budget) -> Aligned:
    """A memory that is itself bounded in bytes gets what the method has to spare."""
    spare = budget - bare.total
    sized = ComponentRef(name=ref.name, params={**ref.params, "budget_bytes": max(spare, 1)})
    try:
        found = estimator.estimate(name, spec, sized)
    except ConfigError as error:  # not one exemplar of each class
        if build_strategy(spec.strategies).needs_memory:
            raise ConfigError(f"{name} needs a memory: {error}") from None
        return Aligned(ComponentRef(name="none"), bare, spare, False)
    return Aligned(sized, found, budget - found.total, False)


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to ``high`` for which ``holds``, which does so for ``low`` and, once false, stays false."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low

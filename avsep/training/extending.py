"""A finished run learns more: a task is added to it, and its memory is carried in its own folder.

Everything is made in a folder beside the run, ``.RUN.learning``, and takes the run's place at the end in one step. So
the run can be used at every moment, a kill leaves it as it was, and the same call goes on where the killed one stood.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from avsep.data.opening import open_run_store
from avsep.data.protocol import Protocol
from avsep.data.store import Store
from avsep.data.store.selection import Selected, sizes_of, write_selection
from avsep.data.tasks import TaskStream, task_stream, training_clips
from avsep.errors import AvsepError, CheckpointError, ConfigError, DataError, RunError
from avsep.evaluation.budget import ExemplarScale
from avsep.evaluation.evaluate import evaluate_run
from avsep.evaluation.scores import is_counted, is_headline
from avsep.files import FolderLock, entries, exchange, link_or_copy, read_json, sha256_file, staging_folder, write_json
from avsep.memory.base import Memory, MemoryPolicy, exemplars_to_plain, read_exemplars
from avsep.progress import Progress
from avsep.registry import MEMORIES
from avsep.runs.folder import RunFolder
from avsep.separator import Separator, load_separator, save_separator
from avsep.spec import RunSpec, TrainSpec, apply_settings, validated
from avsep.strategies import build_strategy
from avsep.training.learner import ContinualLearner
from avsep.types import VisualSource

__all__ = ["ClassChange", "Extension", "Kept", "begin", "carry", "extend", "forget", "kept_exemplars"]

_GENERATOR = "avsep learn"
_FEWEST = 4  # recordings of a class: one to validate on, one to test on, two to learn from


@dataclass(frozen=True)
class ClassChange:
    """The mean improvement of SDR of a class over the mixture, in dB: ``before`` the new task and ``after`` it, on the
    same test mixtures; None where the class was new, or nothing could be scored."""

    class_name: str
    before: float | None
    after: float | None

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Extension:
    """What became of :func:`extend`: the index of the new ``task``, and the ``changes`` class by class, old ones first.

    ``lost``: the old classes that lost more than was allowed; where there are any, the run is as it was.
    """

    task: int
    changes: tuple[ClassChange, ...]
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Kept:
    """The exemplars of a class that a run keeps: how many, the ids of their recordings, the seconds that are kept of
    these, and the bytes of their samples, frames and features."""

    class_name: str
    count: int
    ids: tuple[str, ...]
    seconds: float
    bytes: int


# ------------------------------------------------------------------------------------------------------------- learn


def extend(
    run: str | Path,
    source: str | Path,
    classes: Sequence[str],
    *,
    strategy: str | None = None,
    memory: str | None = None,
    store: str | Path | None = None,
    max_loss_db: float | None = 0.5,
    settings: Sequence[str] = (),
    device: str = "auto",
    workers: int | None = None,
    jobs: int = 0,
    progress: bool | Progress = True,
) -> Extension:
    """Add a task to a finished run, learned with its strategy and memory.

    The result is that of a run that knew all tasks from the start, on the CPU bit by bit, where the recordings are the
    same. The run then carries its memory itself (:func:`carry`): no store that it was trained on is needed any more.
    The old classes are validated and tested on their own recordings, which are carried with them.

    Args:
        source: a store, or a folder with recordings, sounds or videos, in a folder a class.
        classes: those to learn, in order; none of them known to the run.
        strategy: another than the run's, from here on. One that is new to the run begins with what it would keep after
            a first task of all the classes that are known, as far as their recordings are at hand.
        memory: another than the run's, from here on.
        store: where the run's own store lies now, if the run does not carry its memory yet.
        jobs: of :func:`avsep.data.prepare.prepare`, where recordings are prepared.
        max_loss_db: the run is left as it was where an old class's mean improvement of SDR falls by more. What was
            learned is kept beside the run, so that the same call with a larger value takes it. None: any loss.
        settings: such as ``train.epochs=10`` or ``memory.params.per_class=2``, from here on.

    Raises:
        RunError: the run is not finished, or another call of this kind was begun.
        ConfigError: a class is known already, or the settings, the memory or the tasks do not allow it.
        DataError: the recordings lack a class, have another rate, or are too few; the run's own store is not at hand.
        CheckpointError: the run's last checkpoint is gone, from which the strategy goes on.
    """
    folder = RunFolder(run)
    names = tuple(classes)
    work = _Work(folder)
    plan = {
        "command": "learn",
        "classes": list(names),
        "from": str(Path(source).resolve()),
        "settings": list(settings),
        "strategy": strategy,
        "memory": memory,
    }
    if (found := work.moved_in(plan)) is not None:
        return found
    spec = _finished_spec(folder)
    known = [name for of in spec.tasks for name in of]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"give the classes to learn, each once: not {', '.join(names) or 'none'}")
    if again := [name for name in names if name in known]:
        raise ConfigError(f"{run} knows '{again[0]}' already: it has learned {', '.join(known)}")
    extended = _extended_spec(spec, names, strategy, memory, settings)
    with FolderLock(folder), work.begun(plan, keeps=lambda: work.has_learned(len(extended.tasks))):
        given = _given(Path(source), names, spec, folder, work, store, device, jobs, progress)
        if len(work.spec_tasks()) == len(spec.tasks):
            own = _open_last_task(folder, work, spec, store, device, workers, progress, then=extended)
            _begin_task(work, extended.model_copy(update={"tasks": spec.tasks}), extended, own, given, names)
        if work.new.begun_tasks() < len(extended.tasks):
            trained = Store.open(work.data)
            learner = ContinualLearner.from_spec(extended, accelerator=device, workers=workers, loggers=["none"])
            learner.fit(_stream(extended, trained), work.new.path, resume=True, progress=progress, open_ended=True)
        task = len(extended.tasks) - 1
        if work.spec().store != work.new.memory.name:
            _carry_memory(work, extended, Store.open(work.data))
        changes = _changes(work.new, task, progress)
        lost = tuple(
            c.class_name
            for c in changes
            if max_loss_db is not None and c.change is not None and -c.change > max_loss_db
        )
        result = Extension(task, changes, lost)
        if lost:
            work.keep()
        else:
            write_json(work.new.path / "learned.json", {**plan, "from": Path(source).name, **_plain(result)})
            work.move_in()
        return result


def begin(
    separator: Separator | str | Path,
    store: Store | str | Path,
    out: str | Path,
    *,
    train: TrainSpec | Mapping[str, Any],
    strategy: str | Sequence[Any] = "contavsep",
    memory: Any = "random_per_class",
    device: str = "auto",
    workers: int | None = None,
    progress: bool | Progress = True,
) -> RunFolder:
    """Make ``out`` a finished run of a separator that was trained elsewhere, so that it can be extended.

    Its classes are the first task. ``store`` has recordings of all of them, to choose exemplars from, and to validate
    and test on; the strategy begins with what it would keep after that task. It appears whole or not at all.

    Args:
        train: settings of the training of later tasks (:class:`avsep.spec.TrainSpec`).

    Raises:
        ConfigError: ``out`` holds something already, or the settings do not go together.
        DataError: the store lacks a class or a split, or has another rate.
        CheckpointError: the separator is damaged.
    """
    target = Path(out)
    if target.is_file() or (target.is_dir() and entries(target)):
        raise ConfigError(f"{target} holds something already: choose another folder")
    loaded = separator if isinstance(separator, Separator) else load_separator(separator)
    opened = store if isinstance(store, Store) else Store.open(store)
    if absent := [name for name in loaded.classes if name not in opened.classes]:
        raise DataError(
            f"{opened.path} has no recordings of '{absent[0]}', which the separator knows: give a store with all of "
            f"{', '.join(loaded.classes)}, from which exemplars are chosen"
        )
    data = {
        "separator": loaded.spec.model_dump(mode="json"),
        "strategy": strategy,
        "memory": memory,
        "train": train.model_dump(mode="json") if isinstance(train, TrainSpec) else dict(train),
        "tasks": [list(loaded.classes)],
        "store": str(opened.path.resolve()),
        "store_hash": opened.content_hash,
    }
    spec: RunSpec = validated(RunSpec, data, "run")
    spec.check()
    opened.require_rate(spec.separator.front_end.sample_rate_hz)
    stream = _stream(spec, opened)
    learner = ContinualLearner.from_spec(spec, accelerator=device, workers=workers, loggers=["none"])
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(target) as staging:
        run = RunFolder(staging)
        run.write_spec(spec)
        stream.protocol.save(run.protocol_file)
        save_separator(loaded, run.task(0).separator)
        run.task(0).write_record(
            {
                "index": 0,
                "classes": list(loaded.classes),
                "seen": list(loaded.classes),
                "strategy": spec.strategy_name,
                "steps": 0,
                "best_epoch": 0,
                "best_step": 0,
                "validation_sdr_db": None,
                "exemplars": {},
                "parameters": sum(p.numel() for p in loaded.parameters()),
                "seconds": 0.0,
                "seconds_after": 0.0,
                "strategy_state": None,
            }
        )
        learner.take_over(stream, run.path, progress=progress)
        if target.is_dir():
            target.rmdir()
        os.replace(staging, target)
    return RunFolder(target)


def _extended_spec(
    spec: RunSpec, names: Sequence[str], strategy: str | None, memory: str | None, settings: Sequence[str]
) -> RunSpec:
    data = spec.model_dump(mode="json")
    if strategy is not None:
        data["strategy"] = strategy.split("+") if "+" in strategy else strategy
    if memory is not None:
        data["memory"] = memory
    for setting in settings:
        key = setting.partition("=")[0]
        if key.partition(".")[0] not in ("train", "strategy", "memory") or key == "train.seed":
            raise ConfigError(
                f"--set {setting}: of a run that learns more only train.*, strategy.* and memory.* can be set, and not "
                "the seed"
            )
    apply_settings(data, list(settings))
    data["tasks"] = [*data["tasks"], list(names)]
    found = validated(RunSpec, data, "run")
    found.check()
    return found


def _open_last_task(
    folder: RunFolder,
    work: _Work,
    spec: RunSpec,
    store: str | Path | None,
    device: str,
    workers: int | None,
    progress: bool | Progress,
    *,
    then: RunSpec | None = None,
) -> Store:
    """Do after the last task what strategy and memory left out because nothing followed; returns the run's store.

    They start from the task's last checkpoint, as after a kill at its end; or, where ``then`` another strategy goes on,
    from the separator.
    """
    own = open_run_store(folder, store)
    last = len(spec.tasks) - 1
    if then is not None and (then.strategies, then.memory) != (spec.strategies, spec.memory):
        other = then.strategies != spec.strategies
        if other and build_strategy(then.strategies).uses_all_data and training_clips(own):
            raise ConfigError(
                f"strategy '{then.strategy_name}' learns from all recordings, and {folder} has its exemplars alone"
            )
        _weigh(work.new, spec, own, load_separator(folder, task=last), tasks=last)
        spec = spec.model_copy(update={"strategy": then.strategy, "memory": then.memory})
        if other and work.spec().strategies != spec.strategies:
            learner = ContinualLearner.from_spec(spec, accelerator=device, workers=workers, loggers=["none"])
            learner.take_over(_stream(spec, own), work.new.path, progress=progress)
        work.new.write_spec(spec)
    if not work.new.task(last).record().get("open"):
        if not (work.new.state / "latest.json").is_file():
            raise CheckpointError(
                f"{folder.state} is gone, from which the last task's strategy and memory go on: remove "
                f"{folder.task(last).path} and learn that task again (avsep train --resume)"
            )
        learner = ContinualLearner.from_spec(spec, accelerator=device, workers=workers, loggers=["none"])
        learner.fit(_stream(spec, own), work.new.path, resume=True, progress=progress, open_ended=True)
    return own


def _stream(spec: RunSpec, store: Store) -> TaskStream:
    return task_stream(
        store,
        spec.tasks,
        protocol=spec.protocol,
        validation_protocol=spec.validation_protocol,
        clip_samples=spec.separator.front_end.clip_samples,
    )


def _begin_task(work: _Work, spec: RunSpec, extended: RunSpec, own: Store, given: Store, names: Sequence[str]) -> None:
    """Make the store that the task is learned from, the exemplars of the old classes and the clips of the new, and let
    the staged run name it."""
    task = len(spec.tasks)
    separator = load_separator(work.new, task=task - 1)
    sources = separator.visual_sources()
    old = [name for of in spec.tasks for name in of]
    selected, gone = _kept(work.new, spec, own, task - 1)
    ids = {one.id for one in selected}
    for clip in given.select(classes=names):
        selected.append(Selected(given, clip, clip.id if clip.id not in ids else f"{task:02d}-{clip.id}"))
    store = write_selection(
        work.data,
        selected,
        classes=[*old, *names],
        sources=sources,
        front_end=spec.separator.front_end,
        origin=_origin(own, gone),
        licence=_licence(own, given),
    )
    _stream(extended, store)  # every class has clips of every split
    _weigh(work.new, spec, own, separator)
    shutil.rmtree(work.new.state, ignore_errors=True)  # of the task before, which is finished
    work.new.write_spec(
        extended.model_copy(update={"store": str(store.path.resolve()), "store_hash": store.content_hash})
    )


def _kept(run: RunFolder, spec: RunSpec, store: Store, task: int) -> tuple[list[Selected], dict[str, int]]:
    """What a run keeps of its store after a task: the exemplars, and what is validated and tested on; and how many
    training clips there were of each class."""
    strategy = build_strategy(spec.strategies)
    exemplars = read_exemplars(run, task)
    seen = [name for of in spec.tasks[: task + 1] for name in of]
    starts: dict[str, list[int] | None] = {}
    for one in (e for of in exemplars.values() for e in of):
        if one.start is None:
            starts[one.id] = None
        else:
            starts.setdefault(one.id, [])
            if (of_clip := starts[one.id]) is not None:
                of_clip.append(one.start)
    store.clips_by_id(list(starts))
    found = []
    for clip in store.select(classes=seen):
        if clip.split != "train" or strategy.uses_all_data:
            found.append(Selected(store, clip, clip.id))
        elif clip.id in starts:
            crops = starts[clip.id]
            found.append(Selected(store, clip, clip.id, None if crops is None else tuple(crops)))
    stream = _stream(spec.model_copy(update={"tasks": spec.tasks[: task + 1]}), store)
    return found, {} if strategy.uses_all_data else stream.counts(stream.tasks)


def _origin(store: Store, gone: Mapping[str, int]) -> dict[str, Any]:
    detector = store.manifest.get("origin", {}).get("detector")
    found: dict[str, Any] = {"generator": _GENERATOR, "training_clips": dict(gone)}
    return found if detector is None else {**found, "detector": detector}


def _licence(*stores: Store) -> str:
    return "; ".join(dict.fromkeys(text for s in stores if (text := str(s.manifest.get("licence", "")))))


def _weigh(run: RunFolder, spec: RunSpec, store: Store, separator: Separator, *, tasks: int | None = None) -> None:
    """Note in the records what the exemplars of finished tasks took: not all of them are carried on."""
    if build_strategy(spec.strategies).uses_all_data:
        return
    scale = ExemplarScale(store, separator.visual_sources(), spec.separator.front_end)
    for task in range(len(spec.tasks) if tasks is None else tasks):
        folder = run.task(task)
        record = folder.record()
        if "exemplar_bytes" not in record:
            weight = scale.of_all(read_exemplars(run, task), _policy(spec))
            folder.write_record({**record, "exemplar_bytes": dataclasses.asdict(weight)})


def _policy(spec: RunSpec) -> MemoryPolicy:
    policy: MemoryPolicy = MEMORIES.create(spec.memory.name, spec.memory.params)
    return policy


def _carry_memory(work: _Work, spec: RunSpec, store: Store) -> None:
    """Let the staged run carry its memory in its own folder."""
    task = len(spec.tasks) - 1
    separator = load_separator(work.new, task=task)
    selected, gone = _kept(work.new, spec, store, task)
    carried = write_selection(
        work.new.memory,
        selected,
        classes=[name for of in spec.tasks for name in of],
        sources=separator.visual_sources(),
        front_end=spec.separator.front_end,
        origin=_origin(store, gone),
        licence=_licence(store),
    )
    _weigh(work.new, spec, store, separator)
    _stream(spec, carried).protocol.save(work.new.protocol_file)
    shutil.rmtree(work.new.state, ignore_errors=True)
    work.new.write_spec(spec.model_copy(update={"store": work.new.memory.name, "store_hash": carried.content_hash}))


def _changes(run: RunFolder, task: int, progress: bool | Progress) -> tuple[ClassChange, ...]:
    found = evaluate_run(run.path, tasks=[task - 1, task], yardsticks=False)
    rows = {step["task"]: step["rows"] for step in found["after"]}
    protocol = Protocol.load(run.protocol_file)
    mixtures, earlier = protocol.at(task), set(protocol.at(task - 1))
    same = {number for number, mixture in enumerate(mixtures) if mixture in earlier}

    def mean(of: Sequence[Mapping[str, Any]], name: str, among: set[int] | None) -> float | None:
        values = [
            r["sdri"]
            for r in of
            if r["class"] == name and is_headline(r) and is_counted(r) and r["sdri"] is not None
            if not among or r["mixture"] in among
        ]
        return float(np.mean(values)) if values else None

    old = [name for of in protocol.tasks[:task] for name in of]
    return (
        *(ClassChange(n, mean(rows[task - 1], n, None), mean(rows[task], n, same)) for n in old),
        *(ClassChange(n, None, mean(rows[task], n, None)) for n in protocol.tasks[task]),
    )


# ---------------------------------------------------------------------------------------------------------- recordings


def _given(
    source: Path,
    names: Sequence[str],
    spec: RunSpec,
    folder: RunFolder,
    work: _Work,
    own: str | Path | None,
    device: str,
    jobs: int,
    progress: bool | Progress,
) -> Store:
    """The store with the new classes; of a folder with recordings it is made first."""
    if (source / "manifest.json").is_file() or (source / ".journal").is_dir():
        store = Store.open(source)
    elif source.is_dir():
        store = _prepared(source, names, spec, folder, work, own, device, jobs, progress)
    else:
        raise DataError(f"there is no store or folder {source}: give a store, or a folder with one folder a class")
    store.require_rate(spec.separator.front_end.sample_rate_hz)
    for name in names:
        clips = store.select(classes=[name])
        splits = {split: sum(c.split == split for c in clips) for split in ("train", "val", "test")}
        if not all(splits.values()):
            raise DataError(
                f"class '{name}' in {store.path} has {splits['train']} clips to learn from, {splits['val']} to "
                f"validate and {splits['test']} to test on: give at least one of each"
            )
    return store


def _prepared(
    source: Path,
    names: Sequence[str],
    spec: RunSpec,
    folder: RunFolder,
    work: _Work,
    own: str | Path | None,
    device: str,
    jobs: int,
    progress: bool | Progress,
) -> Store:
    from avsep.data.prepare.listings import is_video, list_folder
    from avsep.data.prepare.videos import make_recipe, prepare

    for name in names:
        if not any(p.is_dir() for p in (source / name, *(source / s / name for s in ("train", "val", "test")))):
            there = sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
            raise DataError(
                f"{source} has no folder '{name}' with recordings: give a store, or a folder with one folder a class "
                f"(it has {', '.join(there) or 'none'})"
            )
    listing = list_folder(source, classes=names)
    if listing.origin.get("splits", {}).get("by", "").startswith("hash"):
        videos = []
        for name in names:
            of_class = sorted((v for v in listing.videos if v.class_name == name), key=lambda v: v.id)
            if len(of_class) < _FEWEST:
                raise DataError(
                    f"class '{name}' has too few recordings in {source}, {len(of_class)}: give {_FEWEST} or more, "
                    "of which one is to validate on and one to test on"
                )
            apart = max(1, len(of_class) // 8)
            for number, video in enumerate(of_class):
                split = "test" if number < apart else "val" if number < 2 * apart else "train"
                videos.append(dataclasses.replace(video, split=split))
        listing = dataclasses.replace(
            listing, videos=tuple(videos), origin={**listing.origin, "splits": {"by": "order of the names"}}
        )
    separator = load_separator(folder, task=len(spec.tasks) - 1)
    sources = separator.visual_sources()
    more: dict[str, Any] = {}
    if sources and separator.mask_decoder.takes_unseen:
        more["sounds"] = True
        if not any(is_video(video.file) for video in listing.videos):
            sources = ()  # no weights of a detector are needed to look at nothing
    named = {s.role: s.name for s in sources if s.kind == "features"}
    looks = any(s.kind == "frames" for s in sources)
    if sources:
        store = open_run_store(folder, own)
        more["detector"] = store.manifest.get("origin", {}).get("detector")
        if looks and store.manifest.get("object_shape"):
            more["frame_size"] = store.manifest["object_shape"][1]
        if looks:
            more["motion_rate_hz"] = store.motion_rate_hz
    recipe = make_recipe(
        rate_hz=spec.separator.front_end.sample_rate_hz,
        object=named.get("object"),
        motion=named.get("motion"),
        frames=looks,
        device="cpu" if device == "auto" else device,
        **{"detector": None, **more},
    )
    return prepare(listing, work.prepared, recipe, jobs=jobs, progress=progress).store


def _sources(folder: RunFolder) -> tuple[VisualSource, ...]:
    return tuple(load_separator(folder).visual_sources())


# ------------------------------------------------------------------------------------------------------ a run's memory


def carry(
    run: str | Path,
    *,
    store: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: bool | Progress = True,
) -> None:
    """Let a finished run carry its memory: its exemplars, and the recordings that it is validated and tested on, are
    copied into its own folder, so that its store may go. Of a kept crop nothing else of its recording is copied.

    Raises:
        RunError, ConfigError, DataError, CheckpointError: as :func:`extend`.
    """
    folder = RunFolder(run)
    work = _Work(folder)
    plan = {"command": "carry"}
    work.moved_in(plan)
    spec = _finished_spec(folder)
    if spec.store == folder.memory.name:
        return
    with FolderLock(folder), work.begun(plan):
        if work.spec().store != work.new.memory.name:
            own = _open_last_task(folder, work, spec, store, device, workers, progress)
            _carry_memory(work, spec, own)
        work.move_in()


def kept_exemplars(run: str | Path, store: str | Path | None = None) -> tuple[Store, list[Kept]]:
    """The store that a run's exemplars lie in, its own memory where it carries one, and the exemplars after its last
    task, by class: of every class, and none where it has no exemplars.

    Raises:
        RunError: the run has no finished task.
        DataError: it does not carry its memory (:func:`carry`), and its store is not at hand.
    """
    folder = RunFolder(run)
    spec = folder.spec()
    carries = spec.store == folder.memory.name
    opened = Store.open(folder.memory) if carries else open_run_store(folder, store)
    exemplars = read_exemplars(folder, folder.finished_tasks()[-1])
    scale = ExemplarScale(opened, _sources(folder), spec.separator.front_end)
    found = []
    for name in (n for of in spec.tasks for n in of):
        own = exemplars.get(name, [])
        ids = tuple(dict.fromkeys(e.id for e in own))
        clips = {clip.id: clip for clip in opened.clips_by_id(ids)}
        if carries:
            samples = sum(count for clip in clips.values() for _, count in opened.kept_samples(clip))
            size = sizes_of(opened, clips.values())
        else:
            length = spec.separator.front_end.clip_samples
            kept = ((clips[e.id].samples, e.start) for e in own)
            samples = sum(count if start is None else min(count, length) for count, start in kept)
            size = math.ceil(scale.of_all({name: own}, _policy(spec)).total)
        found.append(Kept(name, len(own), ids, samples / opened.sample_rate_hz, size))
    return opened, found


def forget(run: str | Path, class_name: str) -> int:
    """Remove a class's exemplars from the memory that a run carries; returns how many there were.

    The separator still knows the class, and what the strategy keeps is not changed; later tasks are learned without its
    recordings. Those that the class is validated and tested on stay.

    Raises:
        RunError: the run does not carry its memory.
        ConfigError: it does not know the class.
    """
    folder = RunFolder(run)
    work = _Work(folder)
    plan = {"command": "forget", "class": class_name}
    if work.moved_in(plan) is not None:
        return 0
    folder, spec = _carrying(run)
    if class_name not in (known := [n for of in spec.tasks for n in of]):
        raise ConfigError(f"{run} knows no class '{class_name}': it has learned {', '.join(known)}")
    last = len(spec.tasks) - 1
    with FolderLock(folder), work.begun(plan):
        own = Store.open(folder.memory)
        memory = read_exemplars(folder, last)
        count = len(memory.get(class_name, ()))
        without: Memory = {name: of for name, of in memory.items() if name != class_name}
        record = work.new.task(last).record()
        scale = ExemplarScale(own, _sources(folder), spec.separator.front_end)
        weight = dataclasses.asdict(scale.of_all(without, _policy(spec)))
        work.new.task(last).write_record({**record, "exemplars": exemplars_to_plain(without), "exemplar_bytes": weight})
        _carry_memory(work, spec, own)
        work.move_in()
    return count


def _carrying(run: str | Path) -> tuple[RunFolder, RunSpec]:
    folder = RunFolder(run)
    spec = folder.spec()
    if spec.store != folder.memory.name:
        raise RunError(
            f"{run} does not carry its memory, which lies in {spec.store}: avsep memory {run} --carry copies it"
        )
    return folder, spec


# ------------------------------------------------------------------------------------------------------------- staging


def _finished_spec(folder: RunFolder) -> RunSpec:
    spec = folder.spec()
    done = folder.begun_tasks()
    if not spec.tasks or done < len(spec.tasks):
        raise RunError(
            f"{folder} has finished {done} of its {len(spec.tasks)} tasks: let it end first (avsep train --out "
            f"{folder} --resume)"
        )
    if spec.blurry is not None:
        raise ConfigError(f"the tasks of {folder} overlap (blurry): such a run cannot be extended")
    if _policy(spec).keep == "id":
        raise ConfigError(
            f"the memory of {folder} keeps references into a store that stays at hand (keep=id): there is nothing to "
            "carry"
        )
    for task in range(done):
        folder.task(task).check_files()
    return spec


class _Work:
    """The folder beside a run in which what is to take its place is made."""

    def __init__(self, run: RunFolder) -> None:
        place = Path(os.path.realpath(run.path))  # of a link what it leads to
        self.run = RunFolder(place)
        self.path = place.parent / f".{place.name}.learning"
        self.plan_file = self.path / "plan.json"
        self.new = RunFolder(self.path / "new")
        self.data = self.path / "data"
        self.prepared = self.path / "prepared"
        self._old = self.path / "old"
        self._stays = False

    def spec(self) -> RunSpec:
        return self.new.spec()

    def spec_tasks(self) -> tuple[tuple[str, ...], ...]:
        return self.spec().tasks

    def has_learned(self, tasks: int) -> bool:
        """Whether there is something of the last of so many tasks that would be lost."""
        if not self.new.is_run or len(self.spec_tasks()) < tasks:
            return False
        return self.new.begun_tasks() == tasks or (self.new.state / "latest.json").is_file()

    def begun(self, plan: Mapping[str, Any], keeps: Callable[[], bool] = lambda: False) -> _Begun:
        return _Begun(self, plan, keeps)

    def moved_in(self, plan: Mapping[str, Any]) -> Extension | None:
        """What a call that was killed after the run had taken its place has come to; else None. Puts the run back where
        a kill left none."""
        if self._old.is_dir() and not self.run.path.exists():
            os.rename(self._old, self.run.path)
        done = self.path / "done.json"
        if not done.is_file() or not self.run.is_run:
            return None
        noted = read_json(done)
        took = noted["run"] == _identity(self.run)
        if took:
            shutil.rmtree(self.path)
            if noted["plan"] == dict(plan):
                return (
                    _from_plain(read_json(self.run.path / "learned.json"))
                    if plan["command"] == "learn"
                    else Extension(0, ())
                )
        return None

    def stage(self, plan: Mapping[str, Any]) -> None:
        """Copy the run, unless that is done; files that are never changed in place are linked."""
        whole = {"plan": dict(plan), "run": _identity(self.run)}
        if self.plan_file.is_file():
            there = read_json(self.plan_file)
            if {**there, "refused": False} == {**whole, "refused": False} and self.new.is_run:
                return
            if there["run"] == whole["run"] and there["plan"] != whole["plan"] and not there.get("refused"):
                raise RunError(
                    f"{self.path} holds what another avsep {there['plan']['command']} has begun: run that again to let "
                    "it end, or remove the folder"
                )
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        write_json(self.plan_file, {**whole, "refused": False})
        part = RunFolder(self.path / "part")
        part.path.mkdir()
        left = (self.run.memory, self.run.evaluation_file, self.run.report_file)  # which are made anew
        for name in entries(self.run.path):  # what somebody else has put there, too
            place = self.run.path / name
            if place in left:
                continue
            if place.is_dir():
                copy = shutil.copy2 if place == self.run.logs else link_or_copy
                shutil.copytree(place, part.path / name, copy_function=copy, symlinks=True)
            else:
                shutil.copy2(place, part.path / name, follow_symlinks=False)
        part.remove_leftovers()
        os.rename(part.path, self.new.path)

    def keep(self) -> None:
        """Leave what was made, for another call."""
        write_json(self.plan_file, {**read_json(self.plan_file), "refused": True})
        self._stays = True

    def move_in(self) -> None:
        """Let the new run take the old one's place."""
        write_json(self.path / "done.json", {"plan": read_json(self.plan_file)["plan"], "run": _identity(self.new)})
        if not exchange(self.new.path, self.run.path):
            os.rename(self.run.path, self._old)
            os.rename(self.new.path, self.run.path)
        self.clean()

    def clean(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def remove(self) -> None:
        if not self._stays:
            shutil.rmtree(self.path, ignore_errors=True)


class _Begun:
    """Stage the run; where an error ends the block before anything was learned, nothing stays of it."""

    def __init__(self, work: _Work, plan: Mapping[str, Any], keeps: Callable[[], bool]) -> None:
        self._work, self._plan, self._keeps = work, plan, keeps

    def __enter__(self) -> None:
        self._work.stage(self._plan)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (AvsepError, OSError)) and not self._keeps():
            self._work.remove()


def _identity(run: RunFolder) -> str:
    """What a run is told from its successor by: its spec and its last record."""
    return sha256_file(run.spec_file) + sha256_file(run.task(len(run.spec().tasks) - 1).record_file)


def _plain(result: Extension) -> dict[str, Any]:
    return {
        "task": result.task,
        "sdri_db": {c.class_name: {"before": c.before, "after": c.after} for c in result.changes},
        "old_classes": "validated and tested on their own recordings, which the run carries",
    }


def _from_plain(data: Mapping[str, Any]) -> Extension:
    changes = (ClassChange(name, of["before"], of["after"]) for name, of in data["sdri_db"].items())
    return Extension(data["task"], tuple(changes))

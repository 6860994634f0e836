"""Task streams: which classes are learned in which order, from which store, tested on which frozen mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avsep.data.blurry import blurry_shares, check_shares, first_seen
from avsep.data.class_order import class_order
from avsep.data.protocol import Protocol, build_protocol
from avsep.data.store import Clip, Store
from avsep.errors import ConfigError, DataError
from avsep.spec import BlurrySpec
from avsep.types import Task

__all__ = ["TaskStream", "make_tasks", "split_classes", "task_stream", "training_clips"]


def make_tasks(lists: Sequence[Sequence[str]]) -> tuple[Task, ...]:
    """Tasks from lists of class names. Raises :class:`ConfigError` when a task is empty or a class comes twice."""
    if not lists:
        raise ConfigError("no tasks: give at least one list of classes")
    seen: list[str] = []
    tasks = []
    for index, names in enumerate(lists):
        if isinstance(names, str):
            raise ConfigError(f"task {index} is the text {names!r}: a task is a list of class names")
        if not names:
            raise ConfigError(f"task {index} has no classes: give each task at least one")
        for name in names:
            if name in seen or list(names).count(name) > 1:
                raise ConfigError(f"task {index} repeats class '{name}': every class is learned in one task only")
        seen.extend(names)
        tasks.append(Task(index=index, classes=tuple(names), seen=tuple(seen)))
    return tuple(tasks)


def split_classes(classes: Sequence[str], per_task: int) -> list[list[str]]:
    """Cut classes, in their order, into tasks of ``per_task``; a remainder that does not fill a task is refused."""
    if per_task < 1 or len(classes) % per_task:
        raise ConfigError(
            f"{len(classes)} classes do not divide into tasks of {per_task}: choose another size, or name each task's "
            f"classes"
        )
    return [list(classes[i : i + per_task]) for i in range(0, len(classes), per_task)]


@dataclass(frozen=True)
class TaskStream:
    """A store, its tasks, and the frozen test and validation mixtures. Made by :func:`task_stream`.

    Where tasks overlap (``blurry``), ``shares`` are the ids of each one's training clips. Its ``classes`` are then
    those that no task before it had a clip of; its own, which most of its clips are of and which it is tested on, are
    the protocol's.
    """

    store: Store
    tasks: tuple[Task, ...]
    protocol: Protocol
    validation: Protocol
    blurry: BlurrySpec | None = None
    shares: tuple[frozenset[str], ...] = ()

    def train_clips(self, task: Task, *, all_seen: bool = False) -> list[Clip]:
        """The training clips of a task; with ``all_seen`` of all up to it."""
        if not self.shares:
            return self.store.select(classes=list(task.seen if all_seen else task.classes), split="train")
        here = frozenset().union(*self.shares[0 if all_seen else task.index : task.index + 1])
        return [c for c in self.store.select(classes=list(task.seen), split="train") if c.id in here]

    def candidates(self, task: Task) -> dict[str, list[Clip]]:
        """The training clips that exemplars are chosen from after a task, by class: every class in one task."""
        names = self.protocol.tasks[task.index]
        clips = {name: self.store.select(classes=[name], split="train") for name in names}
        if not self.shares:
            return clips
        return {name: [c for c in members if c.id in self.shares[task.index]] for name, members in clips.items()}

    def counts(self, tasks: Sequence[Task]) -> dict[str, int]:
        """How many clips of each class the exemplars of these tasks are, or were, chosen from."""
        gone = training_clips(self.store)
        return {name: gone.get(name, len(clips)) for task in tasks for name, clips in self.candidates(task).items()}

    @property
    def carried(self) -> int:
        """The number of tasks, from the first on, of whose training clips the store has the exemplars alone."""
        gone = training_clips(self.store)
        return next((t.index for t in self.tasks if not set(t.classes) <= set(gone)), len(self.tasks))

    def __len__(self) -> int:
        return len(self.tasks)


def training_clips(store: Store) -> dict[str, int]:
    """How many training clips there were of those classes of which the store has the exemplars of a memory alone."""
    found = store.manifest.get("origin", {}).get("training_clips", {})
    return dict(found) if isinstance(found, dict) else {}


def task_stream(
    store: Store | str | Path,
    tasks: Sequence[Sequence[str]] | int | None = None,
    *,
    protocol: str = "fixed",
    validation_protocol: str = "fixed",
    clip_samples: int = 65535,
    order: str = "store",
    blurry: BlurrySpec | None = None,
) -> TaskStream:
    """A stream over a store.

    ``tasks`` is a list of lists of class names, a number of classes a task, or None for the paper's five (or, where
    the store's classes do not divide by five, halves). ``protocol`` makes the test mixtures, ``validation_protocol``
    those that models are selected by (:data:`~avsep.data.protocol.PROTOCOLS`). ``clip_samples`` is the length of a test
    mixture, the front end's. ``order`` is that of the classes where the tasks are cut from them
    (:data:`avsep.data.class_order.ORDERS`). With ``blurry`` the training clips of tasks overlap
    (:mod:`avsep.data.blurry`); the test and validation mixtures stay those of the tasks as they are given.
    """
    store = store if isinstance(store, Store) else Store.open(store)
    if tasks is None:
        tasks = 5 if len(store.classes) % 5 == 0 else max(1, (len(store.classes) + 1) // 2)
    if isinstance(tasks, int):
        lists = split_classes(class_order(store, order), tasks)
    elif order != "store":
        raise ConfigError(
            f"order '{order}' applies only where tasks are given as a number of classes, and these are named: leave "
            "order out, or give a number"
        )
    else:
        lists = [list(t) for t in tasks]
    made = make_tasks(lists)
    for task in made:
        for name in task.classes:
            for split in ("train", "val", "test"):
                if split == "train" and name in training_clips(store):
                    continue  # of which nothing need be left
                if not store.select(classes=[name], split=split):
                    raise DataError(
                        f"class '{name}' has no {split} clip in {store.path}: leave it out of the tasks or add some"
                    )
    shares: tuple[frozenset[str], ...] = ()
    learned = made
    if blurry is not None:
        clips = [{n: [c.id for c in store.select(classes=[n], split="train")] for n in task.classes} for task in made]
        shares = blurry_shares(clips, disjoint=blurry.disjoint, blurry=blurry.blurry, seed=blurry.seed)
        check_shares(clips, shares)
        learned = make_tasks(first_seen(clips, shares))
        blurry = blurry.model_copy(update={"tasks": tuple(task.classes for task in made)})
    return TaskStream(
        store=store,
        tasks=learned,
        blurry=blurry,
        shares=shares,
        protocol=build_protocol(protocol, store, made, split="test", clip_samples=clip_samples),
        validation=build_protocol(validation_protocol, store, made, split="val", clip_samples=clip_samples),
    )

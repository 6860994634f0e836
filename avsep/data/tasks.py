"""Task streams: which classes are learned in which order, from which store, tested on which frozen mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avsep.data.class_order import class_order
from avsep.data.protocol import Protocol, build_protocol
from avsep.data.store import Clip, Store
from avsep.errors import ConfigError, DataError
from avsep.types import Task

__all__ = ["TaskStream", "make_tasks", "split_classes", "task_stream"]


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
    """A store, its tasks, and the frozen test and validation mixtures. Made by :func:`task_stream`."""

    store: Store
    tasks: tuple[Task, ...]
    protocol: Protocol
    validation: Protocol

    def train_clips(self, task: Task, *, all_seen: bool = False) -> list[Clip]:
        return self.store.select(classes=list(task.seen if all_seen else task.classes), split="train")

    def __len__(self) -> int:
        return len(self.tasks)


def task_stream(
    store: Store | str | Path,
    tasks: Sequence[Sequence[str]] | int | None = None,
    *,
    protocol: str = "fixed",
    validation_protocol: str = "fixed",
    clip_samples: int = 65535,
    order: str = "store",
) -> TaskStream:
    """A stream over a store.

    ``tasks`` is a list of lists of class names, a number of classes a task, or None for the paper's five (or, where
    the store's classes do not divide by five, halves). ``protocol`` makes the test mixtures, ``validation_protocol``
    those that models are selected by (:data:`~avsep.data.protocol.PROTOCOLS`). ``clip_samples`` is the length of a test
    mixture, the front end's. ``order`` is that of the classes where the tasks are cut from them
    (:data:`avsep.data.class_order.ORDERS`).
    """
    store = store if isinstance(store, Store) else Store.open(store)
    if tasks is None:
        tasks = 5 if len(store.classes) % 5 == 0 else max(1, (len(store.classes) + 1) // 2)
    if isinstance(tasks, int):
        lists = split_classes(class_order(store, order), tasks)
    elif order != "store":
        raise ConfigError(f"order '{order}' is of tasks that are cut from the store's classes, and these are named")
    else:
        lists = [list(t) for t in tasks]
    made = make_tasks(lists)
    for task in made:
        for name in task.classes:
            for split in ("train", "val", "test"):
                if not store.select(classes=[name], split=split):
                    raise DataError(
                        f"class '{name}' has no {split} clip in {store.path}: leave it out of the tasks or add some"
                    )
    return TaskStream(
        store=store,
        tasks=made,
        protocol=build_protocol(protocol, store, made, split="test", clip_samples=clip_samples),
        validation=build_protocol(validation_protocol, store, made, split="val", clip_samples=clip_samples),
    )

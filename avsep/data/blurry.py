"""A stream whose tasks overlap: some classes come in one task alone, of the others a share of the clips in any task.

Source: the Si-Blurry set-up of Moon et al., Online Class Incremental Learning on Stochastic Blurry Task Boundary via
Mask and Visual Prompt Tuning, ICCV 2023. Its released code moves the first clips of every task and drops those that do
not divide among the tasks; here they are random ones, and none is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avsep.errors import ConfigError

__all__ = ["blurry_shares", "check_shares", "first_seen"]


def blurry_shares(
    clips: Sequence[Mapping[str, Sequence[str]]], *, disjoint: int, blurry: int, seed: int
) -> tuple[frozenset[str], ...]:
    """Which clips each task has.

    Args:
        clips: of each task its own classes, and of each class its clips' ids.
        disjoint: percent of all classes whose clips all come in their own task: rounded down to a multiple of the
            number of tasks, as many of each task, chosen at random. The others are blurry.
        blurry: percent of each task's clips of blurry classes, rounded down, that are taken out at random, shuffled
            together, and dealt to all tasks in turn.

    Raises:
        ConfigError: the percentages are none, or a task has fewer classes than are to be disjoint.
    """
    for what, value in (("disjoint", disjoint), ("blurry", blurry)):
        if not 0 <= value <= 100:
            raise ConfigError(f"{what} must be 0 to 100 percent, got {value}")
    count = sum(map(len, clips)) * disjoint // 100 // len(clips)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(clips)])))
    stay: list[list[str]] = []
    pool: list[str] = []
    for task, of_class in enumerate(clips):
        if len(of_class) < count:
            raise ConfigError(f"{count} classes of every task are to be disjoint, and task {task} has {len(of_class)}")
        names = [list(of_class)[number] for number in rng.permutation(len(of_class))]
        mixed = [clip for name in of_class if name in names[count:] for clip in of_class[name]]
        moved = [mixed[number] for number in rng.permutation(len(mixed))[: len(mixed) * blurry // 100]]
        taken = set(moved)
        stay.append([clip for members in of_class.values() for clip in members if clip not in taken])
        pool += moved
    pool = [pool[number] for number in rng.permutation(len(pool))]
    return tuple(frozenset((*own, *pool[task :: len(clips)])) for task, own in enumerate(stay))


def check_shares(clips: Sequence[Mapping[str, Sequence[str]]], shares: Sequence[frozenset[str]]) -> None:
    """Raise :class:`ConfigError` where a task has no clip of a class of its own: it would be tested on what is not yet
    learned, or be without candidates for its exemplars."""
    for task, (own, share) in enumerate(zip(clips, shares, strict=True)):
        for name, ids in own.items():
            if share.isdisjoint(ids):
                raise ConfigError(
                    f"all {len(ids)} training clips of class '{name}' come in other tasks than its own, {task}, which "
                    "is tested on it: make fewer percent blurry or more of the classes disjoint, or take another seed"
                )


def first_seen(clips: Sequence[Mapping[str, Sequence[str]]], shares: Sequence[frozenset[str]]) -> list[list[str]]:
    """The classes that each task brings: those of which no task before it had a clip, its own ones first.

    Raises:
        ConfigError: a task brings none.
    """
    known: list[str] = []
    lists = []
    for task, share in enumerate(shares):
        order = (clips[task], *(of_class for number, of_class in enumerate(clips) if number != task))
        here = [n for of in order for n in of if n not in known and not share.isdisjoint(of[n])]
        if not here:
            raise ConfigError(
                f"task {task} brings no new class: all of its own have come before; make more of them disjoint"
            )
        lists.append(here)
        known += here
    return lists

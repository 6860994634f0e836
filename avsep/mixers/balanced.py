"""A balanced mixer: fixed shares of new and old sources, whatever the number of exemplars and of tasks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from avsep.errors import ConfigError
from avsep.mixers.base import Draw, Mixer, Pool
from avsep.registry import MIXERS

__all__ = ["Balanced"]


@MIXERS.register("balanced", source="this library")
class Balanced(Mixer):
    """Mixtures of new, of new and old, and of old classes in fixed shares; partners are always of other classes.

    A mixture is ``new_old`` times of 1 one of new and old classes, ``old_old`` times one of old classes, else one of
    new classes: with two sources, an exemplar is a source ``new_old`` / 2 + ``old_old`` of the times (.3125 by
    default). Kinds that are impossible, with no memory or one class, give their share to the others. Each source is of
    a class drawn uniformly, then of a clip of it. An epoch has ``train.current_repeats`` mixtures a current clip;
    ``train.memory_repeats``, ``memory_share`` and ``partner`` play no part. The published sampler gives old sources a
    larger share with every task (.6 at the fourth of MUSIC-21).
    """

    _called = "balanced"

    def __init__(self, *, new_old: float = 0.375, old_old: float = 0.125) -> None:
        if not (new_old >= 0 and old_old >= 0 and new_old + old_old <= 1):
            raise ValueError(f"new_old and old_old must be shares of 1, got {new_old} and {old_old}")
        self.new_old = new_old
        self.old_old = old_old

    def begin_epoch(self, pool: Pool, rng: np.random.Generator) -> int:
        self._new, self._old = (
            _by_class(pool, numbers) for numbers in (range(len(pool.clips)), range(len(pool.clips), len(pool)))
        )
        sources, new, old = pool.train.sources, len(self._new), len(self._old)
        possible = (new >= sources, bool(new and old) and new + old >= sources > 1, old >= sources)
        shares = np.array([1 - self.new_old - self.old_old, self.new_old, self.old_old]) * possible
        if not shares.sum() > 0:
            raise ConfigError(
                f"mixer '{self._called}' mixes {sources} sources of different classes, and task {pool.task} trains on "
                f"{new} new and {old} old ones: give tasks more classes, or use mixer as_published"
            )
        self._shares = np.cumsum(shares / shares.sum())
        return pool.items

    def draw(self, rng: np.random.Generator, item: int, pool: Pool) -> list[Draw]:
        sources = pool.train.sources
        kind = int(np.searchsorted(self._shares, rng.random(), side="right"))
        if kind == 1:  # at least one of each
            fewest, most = max(1, sources - len(self._new)), min(sources - 1, len(self._old))
            from_old = int(rng.integers(fewest, most + 1))
        else:
            from_old = 0 if kind == 0 else sources
        chosen = []
        names: list[str] = []
        for groups, count in ((self._new, sources - from_old), (self._old, from_old)):
            names += (added := self._names(rng, groups, count, names, pool))
            for name in added:
                members = groups[name]
                chosen.append(members[int(rng.integers(len(members)))])
        return [pool.draw(chosen[place], rng) for place in rng.permutation(sources)]

    def _names(
        self, rng: np.random.Generator, groups: Mapping[str, list[int]], count: int, beside: list[str], pool: Pool
    ) -> list[str]:
        """``count`` of the classes in ``groups``, to stand in a mixture ``beside`` others."""
        return [str(name) for name in rng.permutation(sorted(groups))[:count]]


def _by_class(pool: Pool, numbers: range) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number in numbers:
        found.setdefault(pool[number].class_name, []).append(number)
    return found

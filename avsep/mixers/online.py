"""One pass over a task's clips: each is trained with in its turn, and not again."""

from __future__ import annotations

import numpy as np

from avsep.errors import ConfigError
from avsep.mixers.base import Draw, Mixer, Pool
from avsep.registry import MIXERS

__all__ = ["Online"]


@MIXERS.register(
    "online",
    source="this library, after online continual learning as in Moon et al., ICCV 2023",
    example={"window": 2},
)
class Online(Mixer):
    """The clips arrive in a random order, ``window`` at a time; mixtures are of those that are there and of exemplars.

    Each clip of a window is the first source of ``train.current_repeats`` mixtures. Its partners are drawn uniformly
    from the window's other clips and the exemplars, of other classes as far as there are any. A clip is in no mixture
    after its window: with ``train.epochs=1`` it is never seen again, and more epochs are as many passes. What a
    strategy draws from the task once it is learned (such as EWC for its Fisher information) is drawn in the same way.
    A window that would be incomplete is shared among the others; ``train.memory_repeats``, ``memory_share`` and
    ``partner`` play no part.
    """

    def __init__(self, *, window: int = 16) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window

    def begin_epoch(self, pool: Pool, rng: np.random.Generator) -> int:
        count, exemplars = len(pool.clips), len(pool) - len(pool.clips)
        if count == 0:
            raise ConfigError(
                f"mixer 'online' goes once through the clips of a task, and task {pool.task} is trained on exemplars "
                "alone: take another mixer, or a strategy that trains on the task's clips"
            )
        self._windows = np.array_split(rng.permutation(count), max(1, count // self.window))
        fewest = min(len(members) for members in self._windows) + exemplars
        if fewest < pool.train.sources:
            raise ConfigError(
                f"mixer 'online' has {fewest} clips at hand at a time in task {pool.task}, and a mixture takes "
                f"{pool.train.sources}: set a larger window"
            )
        repeats = pool.train.current_repeats
        self._firsts = np.concatenate(
            [rng.permutation(np.tile(members, repeats)) for members in self._windows]  # each clip so many times
        )
        self._window_of = np.repeat(np.arange(len(self._windows)), [len(w) * repeats for w in self._windows])
        return len(self._firsts)

    def draw(self, rng: np.random.Generator, item: int, pool: Pool) -> list[Draw]:
        chosen = [int(self._firsts[item])]
        at_hand = [*map(int, self._windows[self._window_of[item]]), *range(len(pool.clips), len(pool))]
        while len(chosen) < pool.train.sources:
            classes = {pool[number].class_name for number in chosen}
            left = [number for number in at_hand if number not in chosen]
            left = [number for number in left if pool[number].class_name not in classes] or left
            chosen.append(left[int(rng.integers(len(left)))])
        return [pool.draw(number, rng) for number in chosen]

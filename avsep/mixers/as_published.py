"""The published sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from avsep.data.store import Clip
from avsep.errors import ConfigError
from avsep.mixers.base import Draw, Mixer, Pool
from avsep.registry import MIXERS
from avsep.spec import TrainSpec

__all__ = ["AsPublished"]


@MIXERS.register("as_published", source="Pian et al., ContAV-Sep, NeurIPS 2024, published code")
class AsPublished(Mixer):
    """Every clip in turn, with partners drawn from the same list, in which exemplars stand many times.

    The epoch's list holds each current clip ``train.current_repeats`` times and each exemplar ``train.memory_repeats``
    times (``train.memory_share=constant``: divided by the number of its class's exemplars), in a shuffled order; a
    mixture is the list's clip with N - 1 partners drawn uniformly from the same list (``train.partner``:
    ``different_class`` and ``different_video`` redraw until the classes or the clips differ).
    """

    def begin_epoch(self, pool: Pool, rng: np.random.Generator) -> int:
        train = pool.train
        repeats = [train.current_repeats] * len(pool.clips) + _memory_repeats(train, pool.exemplars)
        self.entries = np.repeat(np.arange(len(pool)), repeats)
        classes = {pool[number].class_name for number in range(len(pool))}
        if train.partner == "different_class" and len(classes) < train.sources:
            raise ConfigError(
                f"partner=different_class needs {train.sources} classes, but task {pool.task} trains on "
                f"{len(classes)}: use partner=any or more classes"
            )
        if train.partner == "different_video" and len(pool) < train.sources:
            raise ConfigError(
                f"partner=different_video needs {train.sources} clips, but task {pool.task} trains on {len(pool)}: use "
                "partner=any or more clips"
            )
        self.order = rng.permutation(len(self.entries))
        return len(self.entries)

    def draw(self, rng: np.random.Generator, item: int, pool: Pool) -> list[Draw]:
        train = pool.train
        chosen = [int(self.entries[self.order[item]])]
        while len(chosen) < train.sources:
            candidate = int(self.entries[rng.integers(len(self.entries))])
            if train.partner == "different_video" and candidate in chosen:
                continue
            if train.partner == "different_class" and pool[candidate].class_name in {
                pool[c].class_name for c in chosen
            }:
                continue
            chosen.append(candidate)
        return [pool.draw(number, rng) for number in chosen]


def _memory_repeats(train: TrainSpec, exemplars: Sequence[Clip]) -> list[int]:
    """Times that each exemplar stands in the list."""
    if train.memory_share == "grow":
        return [train.memory_repeats] * len(exemplars)
    of_class = Counter(clip.class_name for clip in exemplars)
    return [max(1, train.memory_repeats // of_class[clip.class_name]) for clip in exemplars]

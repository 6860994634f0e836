"""A fixed number of random exemplars per class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avsep.memory.base import Candidates, PerClass
from avsep.registry import MEMORIES

__all__ = ["RandomPerClass"]


@MEMORIES.register("random_per_class", source="Pian et al., NeurIPS 2024, section 4.1: one sample per old class")
class RandomPerClass(PerClass):
    """Keep ``per_class`` random recordings of every old class, drawn once and then fixed.

    ``keep``: ``recording``, ``clip`` (a random crop of each) or ``id``.
    """

    def choose(self, ids: Sequence[str], count: int, candidates: Candidates, rng: np.random.Generator) -> list[str]:
        """Drawn without replacement, in the order of drawing."""
        return [str(i) for i in rng.choice(np.asarray(ids), size=count, replace=False)]

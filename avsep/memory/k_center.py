"""Farthest points: exemplars that cover a class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avsep.memory.base import Candidates, PerClass
from avsep.registry import MEMORIES

__all__ = ["KCenter"]


@MEMORIES.register(
    "k_center", source="Sener and Savarese, ICLR 2018, algorithm 1 (greedy k-center, after Gonzalez, TCS 1985)"
)
class KCenter(PerClass):
    """Keep ``per_class`` clips of every old class, each the one farthest in feature from those already kept.

    The k-th exemplar is argmax_x min_{j<k} |f(x) - f(p_j)|, the first of equals in the order of the store; the first
    exemplar is the clip nearest to the class's mean. The radius within which every clip has an exemplar is at most
    twice the smallest that so many exemplars can have.

    ``keep``: ``recording``, ``clip`` (the centre crop, whose feature was looked at) or ``id``.
    """

    uses_separator = True

    def choose(self, ids: Sequence[str], count: int, candidates: Candidates, rng: np.random.Generator) -> list[str]:
        features = candidates.features(ids).astype(np.float64)  # [n, D]
        chosen = [int(np.argmin(np.linalg.norm(features - features.mean(axis=0), axis=1)))]
        nearest = np.full(len(ids), np.inf)  # of each clip to an exemplar
        while len(chosen) < count:
            nearest = np.minimum(nearest, np.linalg.norm(features - features[chosen[-1]], axis=1))
            nearest[chosen] = -1.0  # never twice, even where features are equal
            chosen.append(int(np.argmax(nearest)))
        return [ids[i] for i in chosen]

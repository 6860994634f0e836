"""Herding: the exemplars whose mean feature is nearest to the class's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avsep.memory.base import Candidates, PerClass
from avsep.registry import MEMORIES

__all__ = ["Herding", "herd"]


@MEMORIES.register("herding", source="Rebuffi et al., iCaRL, CVPR 2017, algorithm 4 (after Welling, ICML 2009)")
class Herding(PerClass):
    """Keep ``per_class`` clips of every old class, chosen one by one so that their mean feature is the class's mean.

    With the features f of length 1 and their mean m over the class, the k-th exemplar is
    argmin_x |m - (f(x) + sum_{j<k} f(p_j)) / k|, without repetition; the first of equals in the order of the store. Any
    first few of the exemplars are themselves a herd.

    ``keep``: ``recording``, ``clip`` (the centre crop, whose feature was looked at) or ``id``.
    """

    uses_separator = True

    def choose(self, ids: Sequence[str], count: int, candidates: Candidates, rng: np.random.Generator) -> list[str]:
        return [ids[i] for i in herd(candidates.features(ids), count)]


def herd(features: np.ndarray, count: int) -> list[int]:
    """The rows of ``features`` [n, D] that herding chooses, in its order."""
    features = features.astype(np.float64)
    mean, chosen_sum = features.mean(axis=0), np.zeros(features.shape[1])
    chosen: list[int] = []
    for k in range(1, count + 1):
        distance = np.linalg.norm(mean - (features + chosen_sum) / k, axis=1)  # [n]
        distance[chosen] = np.inf
        chosen.append(int(np.argmin(distance)))
        chosen_sum += features[chosen[-1]]
    return chosen

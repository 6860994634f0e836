"""Reconstruction: exemplars that the other clips of the class can be written as sums of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avsep.memory.base import Candidates, PerClass
from avsep.registry import MEMORIES

__all__ = ["Reconstruction", "reconstruct"]


@MEMORIES.register(
    "reconstruction",
    source="Farahat, Ghodsi and Kamel, An Efficient Greedy Method for Unsupervised Feature Selection, ICDM 2011",
)
class Reconstruction(PerClass):
    """Keep ``per_class`` clips of every old class whose features the class's other features are best written as.

    With the features f of length 1, every f(x) is approximated by the nearest weighted sum of those of the exemplars,
    and the k-th exemplar is the one that makes the sum of the squared distances over the class smallest; the first of
    equals in the order of the store. Any first few of the exemplars were chosen alike. Unlike herding it takes clips
    that lie in directions of their own, and unlike k-center it does not mind whether a single clip stays far away.

    ``keep``: ``recording``, ``clip`` (the centre crop, whose feature was looked at) or ``id``.
    """

    uses_separator = True
    differs = (
        "The paper chooses columns, the features of all samples; here rows are chosen, as RMSCL chooses exemplars."
    )

    def choose(self, ids: Sequence[str], count: int, candidates: Candidates, rng: np.random.Generator) -> list[str]:
        return [ids[i] for i in reconstruct(candidates.features(ids), count)]


def reconstruct(features: np.ndarray, count: int) -> list[int]:
    """The rows of ``features`` [n, D] that reconstruction chooses, in its order.

    Taking row j lowers the sum of the squared distances by sum_i (r_i . r_j)^2 / |r_j|^2, r being what the rows chosen
    before leave of each.
    """
    rest = features.astype(np.float64)
    least = 1e-12 * float(np.square(rest).sum())  # below it a row is a sum of the chosen, but for rounding
    chosen: list[int] = []
    while len(chosen) < count:
        length = np.square(rest).sum(axis=1)
        gain = np.square(rest @ rest.T).sum(axis=1)
        gain = np.divide(gain, length, out=np.zeros_like(gain), where=length > least)
        gain[chosen] = -1.0  # never twice, also where nothing is left to gain
        chosen.append(int(np.argmax(gain)))
        if length[chosen[-1]] > least:
            direction = rest[chosen[-1]] / np.sqrt(length[chosen[-1]])
            rest = rest - np.outer(rest @ direction, direction)
    return chosen

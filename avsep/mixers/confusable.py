"""A mixer that lets classes meet that the separator does not tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avsep.mixers.balanced import Balanced
from avsep.mixers.base import Pool
from avsep.registry import MIXERS

__all__ = ["Confusable"]


@MIXERS.register(
    "confusable",
    source="after Hong et al., Taming Modality Entanglement in Continual Audio-Visual Segmentation, 2025: rehearsal by "
    "collision",
)
class Confusable(Balanced):
    """As ``balanced``, but classes that were badly separated from each other in the last validation meet more often.

    The first class of a mixture is drawn uniformly. Beside classes A, a class b is drawn with the probability

        ``uniform`` / n + (1 - ``uniform``) softmax_b(-s_b / ``scale_db``)

    over the n classes that may come, s_b being the mean over a in A of how much the SDR of a and b was improved in
    mixtures of the two. Pairs that were not validated count as the mean of all that were. All is uniform until a task
    is first validated.
    """

    uses_scores = True
    _called = "confusable"
    differs = (
        "The paper repeats exemplars of classes that the old model's segmentation takes for new ones. A separator is "
        "told the class, and mixes up pairs: so it is the pairs that are repeated, by their validation scores. "
        "Validation recordings are not trained on, but they decide which pairs are."
    )

    def __init__(
        self, *, new_old: float = 0.375, old_old: float = 0.125, scale_db: float = 3.0, uniform: float = 0.5
    ) -> None:
        super().__init__(new_old=new_old, old_old=old_old)
        if not scale_db > 0:
            raise ValueError(f"scale_db must be above 0, got {scale_db}")
        if not 0 <= uniform <= 1:
            raise ValueError(f"uniform must be between 0 and 1, got {uniform}")
        self.scale_db = scale_db
        self.uniform = uniform

    def _names(
        self, rng: np.random.Generator, groups: Mapping[str, list[int]], count: int, beside: list[str], pool: Pool
    ) -> list[str]:
        names: list[str] = []
        while len(names) < count:
            left = sorted(groups.keys() - names)
            shares = self.shares([*beside, *names], left, pool.scores)
            names.append(left[int(rng.choice(len(left), p=shares))])
        return names

    def shares(
        self, beside: Sequence[str], names: Sequence[str], scores: Mapping[tuple[str, str], float]
    ) -> np.ndarray:
        """The probabilities [n] that classes ``names`` come next ``beside`` others."""
        even = np.full(len(names), 1 / len(names))
        if not (beside and scores):
            return even
        mean = sum(scores.values()) / len(scores)
        known = [[scores.get((min(a, b), max(a, b)), mean) for a in beside] for b in names]  # [n, |A|]
        level = -np.mean(known, axis=1) / self.scale_db
        weight = np.exp(level - level.max())
        shares: np.ndarray = self.uniform * even + (1 - self.uniform) * weight / weight.sum()
        return shares

"""The clips that the separator got most wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avsep.memory.base import Candidates, PerClass
from avsep.registry import MEMORIES

__all__ = ["Hardest"]


@MEMORIES.register(
    "hardest", source="this library; hard examples by loss, after Shrivastava et al., OHEM, CVPR 2016, for masks"
)
class Hardest(PerClass):
    """Keep the ``per_class`` clips of every old class with the largest mask error when their task ends.

    The error is the separation loss of the clip's centre crop in a fixed mixture; the first of equals in the order of
    the store.

    ``keep``: ``recording``, ``clip`` (the centre crop, whose error was measured) or ``id``.
    """

    uses_separator = True

    def choose(self, ids: Sequence[str], count: int, candidates: Candidates, rng: np.random.Generator) -> list[str]:
        order = np.argsort(-candidates.mask_error(ids), kind="stable")
        return [ids[i] for i in order[:count]]

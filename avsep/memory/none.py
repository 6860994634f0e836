"""No memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avsep.memory.base import Candidates, Exemplar, Memory, MemoryPolicy
from avsep.registry import MEMORIES

__all__ = ["NoMemory"]


@MEMORIES.register("none", source="the memory-free rows of Table 1, Pian et al., NeurIPS 2024")
class NoMemory(MemoryPolicy):
    """Keep nothing: every task is learned from its own clips alone."""

    def __init__(self) -> None:
        super().__init__()

    def update(
        self, held: Mapping[str, Sequence[Exemplar]], candidates: Candidates, rng: np.random.Generator
    ) -> Memory:
        return {}

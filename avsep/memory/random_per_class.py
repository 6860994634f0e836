"""A fixed number of random exemplars per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avsep.errors import ConfigError
from avsep.memory.base import MemoryPolicy
from avsep.registry import MEMORIES

__all__ = ["RandomPerClass"]


@MEMORIES.register("random_per_class", source="Pian et al., NeurIPS 2024, section 4.1: one sample per old class")
class RandomPerClass(MemoryPolicy):
    """Keep ``per_class`` random recordings of every old class, drawn once and then fixed."""

    def __init__(self, *, per_class: int = 1) -> None:
        if per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {per_class}; for no memory use the policy 'none'")
        self.per_class = per_class

    def check(self, candidates: Mapping[str, int]) -> None:
        for name, count in candidates.items():
            if count < self.per_class:
                raise ConfigError(
                    f"memory of {self.per_class} clips per class is larger than class '{name}', which has {count} "
                    f"training clips: lower per_class to {count} or less"
                )

    def select(self, candidates: Mapping[str, Sequence[str]], rng: np.random.Generator) -> dict[str, list[str]]:
        """Drawn without replacement, in the order of drawing."""
        return {
            name: [str(i) for i in rng.choice(np.asarray(ids), size=self.per_class, replace=False)]
            for name, ids in candidates.items()
        }

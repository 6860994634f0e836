"""What a memory policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["MemoryPolicy"]


class MemoryPolicy(ABC):
    """Chooses exemplars. Subclasses override :meth:`select`, and :meth:`check` where a budget can be unfillable."""

    def check(self, candidates: Mapping[str, int]) -> None:  # noqa: B027  (nothing to refuse, unless a policy says so)
        """Raise :class:`~avsep.errors.ConfigError` if the budget cannot be filled. ``candidates``: clips per class.

        Called before anything is trained, with the classes of every task but the last.
        """

    @abstractmethod
    def select(self, candidates: Mapping[str, Sequence[str]], rng: np.random.Generator) -> dict[str, list[str]]:
        """Exemplar ids for each of a finished task's classes, from all of its training clip ids."""

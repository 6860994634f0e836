"""Joint training, the upper bound."""

from __future__ import annotations

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy

__all__ = ["Joint"]


@STRATEGIES.register("joint", source="upper bound of Table 1, Pian et al., NeurIPS 2024")
class Joint(Strategy):
    """Train from scratch at every task on all training clips of all classes seen so far; ignores the memory."""

    uses_all_data = True
    restarts = True
    across_ranks = True

"""Joint training, the upper bound."""

from __future__ import annotations

from typing import Any

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy

__all__ = ["Joint"]


@STRATEGIES.register("joint", source="upper bound of Table 1, Pian et al., NeurIPS 2024")
class Joint(Strategy):
    """Train at every task on all training clips of all classes seen so far; ignores the memory.

    ``from_scratch`` begins every task with fresh weights. Where a task's training is too short for that, turned off it
    goes on from the task before, as every other method does, and differs from them in the data alone.
    """

    uses_all_data = True
    across_ranks = True

    def __init__(self, *, from_scratch: bool = True) -> None:
        self.restarts = from_scratch

    def first_task(self) -> dict[str, Any]:
        return {}

"""Fine-tuning."""

from __future__ import annotations

from typing import Any

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy

__all__ = ["FineTune"]


@STRATEGIES.register("finetune", source="lower bound of Table 1, Pian et al., NeurIPS 2024")
class FineTune(Strategy):
    """Train on from the previous task's weights with the separation loss alone; with a memory this is plain replay."""

    across_ranks = True

    def first_task(self) -> dict[str, Any]:
        return {}

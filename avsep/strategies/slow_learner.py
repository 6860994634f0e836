"""Slow learner: what earlier tasks have learned goes on learning at a small part of the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import rows_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["SlowLearner"]


@STRATEGIES.register(
    "slow_learner", source="Zhang et al., SLCA: Slow Learner with Classifier Alignment, ICCV 2023: the slow learner"
)
class SlowLearner(Strategy):
    """From the second task on, new rows and adapters learn at the full rate, all else at ``factor`` times it.

    New is what the task's classes brought: their queries, or their rows of a classifier. The encoders, the shared
    layers of the decoder and the rows of old classes are slow. Schedules go on as they are. Combine it with any method.
    """

    differs = (
        "The second half of the paper, the alignment of a classifier by samples of its features, has no counterpart "
        "where the class is given. Its factor for pre-trained networks is 0.01."
    )
    across_ranks = True

    def __init__(self, *, factor: float = 0.1) -> None:
        if not 0 < factor <= 1:
            raise ValueError(f"factor must be above 0 and at most 1, got {factor}")
        self.factor = factor
        self._slow: frozenset[str] = frozenset()
        self._grown: list[tuple[nn.Parameter, tuple[slice, ...]]] = []
        self._old_rows: list[Tensor] = []  # of those that grew, as they were before the step

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        slow, self._grown = set(), []
        for name, parameter in ctx.student.named_parameters():
            old = ctx.old_shapes.get(name)
            if old == tuple(parameter.shape):
                slow.add(name)
            elif old is not None:
                self._grown.append((parameter, rows_of(old)))
        self._slow = frozenset(slow)
        self._old_rows = [parameter[rows].detach().clone() for parameter, rows in self._grown]

    def learning_rate(self, name: str) -> float:
        return self.factor if name in self._slow else 1.0

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """A tensor has one learning rate: of a step of its old rows, which is proportional to it, the part is taken."""
        for (parameter, rows), before in zip(self._grown, self._old_rows, strict=True):
            slow = torch.lerp(before, parameter[rows], self.factor)
            parameter[rows] = slow
            before.copy_(slow)

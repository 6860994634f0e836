"""Shrink and perturb: every task begins between the weights of the one before and fresh ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.separator import build_from_spec
from avsep.strategies.base import Strategy, TaskContext

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["ShrinkAndPerturb"]


@STRATEGIES.register(
    "shrink_and_perturb",
    source="Ash and Adams, On Warm-Starting Neural Network Training, NeurIPS 2020; when a network grows: Deng et al., "
    "GrowCLIP, ICCV 2023, parameter inheriting with momentum",
)
class ShrinkAndPerturb(Strategy):
    """Begin every task from ``inherited`` times the weights of the one before, and the rest of fresh ones.

    theta <- ``inherited`` theta_{t-1} + (1 - ``inherited``) fresh, of all weights that are trained, new rows excepted.
    It is ``weight_fusion`` with a network that knows nothing, before the task in place of after it: what is inherited
    is near what was known, and can still learn as well as a network that begins. Combine it with any method that does
    not freeze what was learned.
    """

    differs = (
        "Ash and Adams add noise of a scale of its own, set beside the shrinking; here it is (1 - inherited) times a "
        "fresh initialisation. Nothing but the rows of classes grows; GrowCLIP also searches how deep and wide the "
        "network becomes."
    )
    across_ranks = True
    sets_weights = ("begin_task",)
    unlearns = True

    def __init__(self, *, inherited: float = 0.9) -> None:
        if not 0 <= inherited <= 1:
            raise ValueError(f"inherited must be between 0 and 1, got {inherited}")
        self.inherited = inherited

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        if ctx.task.index > 0 and not ctx.resumed:
            _mix(ctx.student, build_from_spec(ctx.student.spec), self.inherited, ctx)


@torch.no_grad()
def _mix(student: Separator, fresh: Separator, share: float, ctx: TaskContext) -> None:
    others = dict(fresh.named_parameters())
    for name, p in student.named_parameters():
        old = ctx.old_shapes.get(name)
        if p.requires_grad and old is not None:
            rows = tuple(slice(n) for n in old)
            p[rows] = share * p[rows] + (1 - share) * others[name].to(p)[rows]

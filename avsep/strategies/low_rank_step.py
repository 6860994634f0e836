"""Low-rank step: of what a task did to a matrix only its strongest directions stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy, TaskContext
from avsep.strategies.teaching import reestimate_batch_norm, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["LowRankStep", "truncated"]


@STRATEGIES.register(
    "low_rank_step",
    source="this library; the truncation is Eckart and Young's, Psychometrika 1936",
    example={"rank": 2, "batch_norm_mixtures": 2},
)
class LowRankStep(Strategy):
    """Cut what a task did to each matrix to its ``rank`` strongest directions; combine it with any method.

    After each task but the first, W <- W' + truncated(W - W'), W' being the weights after the task before. A tensor
    counts as one matrix, its first dimension by all others: outputs x (inputs x taps) of a convolution, inputs x
    (outputs x taps) of a transposed one, all of query, key and value together in a packed attention; the queries of old
    classes are one too. What moved in few directions stays, and the many small changes, which disturb old classes too,
    go. Vectors and rows of new classes stay as learned. Running statistics are estimated anew on
    ``batch_norm_mixtures`` training mixtures (0: they stay).
    """

    across_ranks = True
    sets_weights = ("after_task",)
    needs_teacher = True

    def __init__(self, *, rank: int = 8, batch_norm_mixtures: int = 200) -> None:
        if rank < 0:
            raise ValueError(f"rank must be 0 or more, got {rank}")
        if batch_norm_mixtures < 0:
            raise ValueError(f"batch_norm_mixtures must be 0 or more, got {batch_norm_mixtures}")
        self.rank = rank
        self.batch_norm_mixtures = batch_norm_mixtures

    def first_task(self) -> dict[str, Any]:
        return {}

    def after_task(self, ctx: TaskContext) -> None:
        if ctx.teacher is None:
            return
        _truncate(ctx.student, ctx.teacher, self.rank)
        if self.batch_norm_mixtures:
            reestimate_batch_norm(ctx.student, ctx.data, self.batch_norm_mixtures)


@torch.no_grad()
def _truncate(student: Separator, teacher: Separator, rank: int) -> None:
    before = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        if name in before and p.ndim > 1 and p.requires_grad and min(before[name].flatten(1).shape) > rank:
            rows = rows_of(tuple(before[name].shape))
            step = (p[rows] - before[name]).flatten(1)
            p[rows] = before[name] + truncated(step, rank).reshape(before[name].shape)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The matrix of this ``rank`` that is closest to ``matrix`` [m, n] in the sum of squares."""
    left, values, right = torch.linalg.svd(matrix.cpu().double(), full_matrices=False)
    closest: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return closest.to(matrix)

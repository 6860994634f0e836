"""Weight fusion: after each task the new weights are averaged with the old ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy, TaskContext
from avsep.strategies.teaching import reestimate_batch_norm, rows_of

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["WeightFusion", "fuse", "fusion_factor"]


@STRATEGIES.register("weight_fusion", source="Xiao et al., Endpoints Weight Fusion, CVPR 2023")
class WeightFusion(Strategy):
    """Average the weights with the previous task's after each task; combine it with a method that keeps the two close.

    After the task's best epoch has been chosen,

        theta <- (1 - a) theta_{t-1} + a theta_t,    a = sqrt(n_new / (n_new + n_old)),

    with the numbers of new and old classes: .7071, .5774, .5 in tasks of equal size. Fused are all floating tensors of
    the old state, running statistics of batch normalisation among them; of a tensor that grew the old rows, while new
    rows stay as learned. The fused model is what is kept, evaluated and learned from on.

    ``reestimate_batch_norm`` afterwards estimates the running statistics anew on 256 training mixtures, since averaged
    statistics are not those of averaged weights: a diagnostic that the original does not have.
    """

    differs = "The paper fuses segmentation networks, trained with MiB's or PLOP's losses. The fusion is unchanged."

    needs_teacher = True
    across_ranks = True
    sets_weights = ("after_task",)

    def __init__(self, *, reestimate_batch_norm: bool = False) -> None:
        self.reestimate_batch_norm = reestimate_batch_norm

    def first_task(self) -> dict[str, Any]:
        return {}

    def after_task(self, ctx: TaskContext) -> None:
        if ctx.teacher is None:
            return
        fuse(ctx.student, ctx.teacher, fusion_factor(len(ctx.task.classes), len(ctx.task.old)))
        if self.reestimate_batch_norm:
            reestimate_batch_norm(ctx.student, ctx.data)


def fusion_factor(num_new: int, num_old: int) -> float:
    """a = sqrt(n_new / (n_new + n_old)): how much of the fused weights is the new model's."""
    return math.sqrt(num_new / (num_new + num_old))


@torch.no_grad()
def fuse(student: Separator, teacher: Separator, factor: float) -> None:
    """Replace the student's weights in place by (1 - factor) teacher + factor student, wherever the teacher has any."""
    new = student.state_dict()  # shares the memory of the student's tensors
    for name, old in teacher.state_dict().items():
        if old.is_floating_point():
            shared = new[name][rows_of(old.shape)]
            shared.copy_((1 - factor) * old + factor * shared)

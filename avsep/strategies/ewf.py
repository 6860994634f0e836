"""Endpoints Weight Fusion: the new weights are pulled back towards the old ones after each task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskData
from avsep.strategies.lwf import LwF
from avsep.strategies.teaching import check_weights

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator
    from avsep.types import Task

__all__ = ["EWF", "fuse", "fusion_factor", "reestimate_batch_norm"]

_MIXTURES, _BATCH = 256, 16  # of the re-estimation


@STRATEGIES.register(
    "ewf",
    source="Xiao et al., Endpoints Weight Fusion, CVPR 2023; a row of ContAV-Sep's Table 1, there without details",
)
class EWF(Strategy):
    """Train with LwF's loss, then average the weights with the previous task's.

    L = L_sep + ``distillation`` L_mask as in ``lwf`` (it keeps the two endpoints close; the original combines the
    fusion with MiB's or PLOP's losses). After the task's best epoch has been chosen,

        theta <- (1 - a) theta_{t-1} + a theta_t,    a = sqrt(n_new / (n_new + n_old)),

    with the numbers of new and old classes: .7071, .5774, .5 in tasks of equal size. Fused are all floating tensors of
    the old state, running statistics of batch normalisation among them; of a tensor that grew the old rows, while new
    rows stay as learned. The fused model is what is kept, evaluated and learned from on. ``distillation=0`` is
    fine-tuning with fusion.

    ``reestimate_batch_norm`` afterwards estimates the running statistics anew on 256 training mixtures, since averaged
    statistics are not those of averaged weights: a diagnostic that the original does not have.
    """

    needs_teacher = True
    across_ranks = True

    def __init__(self, *, distillation: float = 0.3, reestimate_batch_norm: bool = False) -> None:
        check_weights(distillation=distillation)
        self.distillation = distillation
        self.reestimate_batch_norm = reestimate_batch_norm
        self._lwf = LwF(weight_mask=distillation)

    def loss(self, student: Separator, teacher: Separator | None, step: Step) -> dict[str, Tensor]:
        return self._lwf.loss(student, teacher, step)

    def after_task(self, student: Separator, teacher: Separator | None, task: Task, data: TaskData) -> None:
        if teacher is None:
            return
        fuse(student, teacher, fusion_factor(len(task.classes), len(task.old)))
        if self.reestimate_batch_norm:
            reestimate_batch_norm(student, data)


def fusion_factor(num_new: int, num_old: int) -> float:
    """a = sqrt(n_new / (n_new + n_old)): how much of the fused weights is the new model's."""
    return math.sqrt(num_new / (num_new + num_old))


@torch.no_grad()
def fuse(student: Separator, teacher: Separator, factor: float) -> None:
    """Replace the student's weights in place by (1 - factor) teacher + factor student, wherever the teacher has any."""
    new = student.state_dict()  # shares the memory of the student's tensors
    for name, old in teacher.state_dict().items():
        if old.is_floating_point():
            shared = new[name][tuple(slice(size) for size in old.shape)]
            shared.copy_((1 - factor) * old + factor * shared)


@torch.no_grad()
def reestimate_batch_norm(student: Separator, data: TaskData) -> None:
    """Set the running statistics of batch normalisation to the mean over 16 batches of training mixtures, in place.

    Encoders that are frozen and parts that masks do not need (a classifier) keep theirs, and everything but batch
    normalisation is in evaluation mode meanwhile.
    """
    student.train()
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    student.eval()
    before = [(norm.momentum, {k: v.clone() for k, v in norm.named_buffers()}) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    for batch in data.batches(_MIXTURES, batch_size=_BATCH):
        student.predict(batch)
    for norm, (momentum, buffers) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if not norm.num_batches_tracked:
            norm.load_state_dict(buffers, strict=False)
    student.eval()

"""Gated mask distillation: a teacher is imitated only where it separates better than its student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.losses import mask_losses, source_errors
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy
from avsep.strategies.teaching import check_weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GatedDistillation", "open_gates"]


@STRATEGIES.register(
    "gated_distillation", source="this library; mask distillation as in Pian et al., ContAV-Sep, NeurIPS 2024"
)
class GatedDistillation(Strategy):
    """Distil the teacher's masks of the old sources that it separates better than the student; needs a memory.

    L = L_sep + (``weight`` / \\|O\\|) sum over old sources i of g_i D_i, where D_i is the mean w |M - M'| between the
    student's masks M and the teacher's M', O the old sources of the batch, and the gate g_i is 1 where the teacher's
    error against the true mask is below the student's (:func:`open_gates`), else 0.

    Of an exemplar the true mask is known. Where it sounds together with an instrument that the teacher never heard, the
    teacher's mask may let through just what is to be learned: there the gate closes. The sum is divided by the number
    of all old sources, so the term fades as the student becomes the better of the two. ``gate=False`` distils all old
    sources, which is ContAV-Sep's L_dist.
    """

    needs_memory = True
    across_ranks = True
    differs = (
        "Of ContAV-Sep's losses it has the mask distillation alone, to which it adds the gate; contavsep with "
        "weight_mask=0 beside it brings the contrastive ones."
    )

    def __init__(self, *, weight: float = 0.3, gate: bool = True) -> None:
        check_weights(weight=weight)
        self.weight = weight
        self.gate = gate
        self.needs_teacher = weight > 0

    def first_task(self) -> dict[str, Any]:
        return {}

    def loss(self, step: Step) -> dict[str, Tensor]:
        if step.teacher is None or not self.needs_teacher or not step.any_old:
            return super().loss(step)
        if not len(step.old_mixtures):  # another rank has some
            return {"separation": step.separation, "mask": torch.zeros_like(step.separation)}
        rows = step.old_mixtures
        teacher_output = step.teacher_output(old_mixtures=True).output
        counted, share = step.is_old, torch.ones_like(step.separation)
        if self.gate:
            spectrograms = step.spectrograms[rows]
            own, theirs = _masks(step.output.logits.detach()[rows]), _masks(teacher_output.logits)
            gates = torch.zeros_like(step.is_old)
            gates[rows] = open_gates(own, theirs, spectrograms.ratio, spectrograms.weight)
            counted = step.is_old & gates
            share = counted.sum() / step.is_old.sum()
        losses = mask_losses(
            step.output, step.spectrograms, teacher_output=teacher_output, mixtures=rows, counted=counted
        )
        mean = share * losses.distillation  # over all old sources, 0 where the gate is closed
        return {"separation": losses.separation, "mask": self.weight * step.mean_over(step.is_old, mean)}


def open_gates(masks: Tensor, teacher_masks: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """[B, N] bool: the sources whose teacher has the smaller error; not those where both have the same.

    The error is the mean w |mask - target| of each source (:func:`avsep.losses.source_errors`).

    Args:
        masks: the student's, [B, N, F, T].
        teacher_masks: the teacher's, of the same shape.
        targets: the ratio masks, of the same shape.
        weight: [B, 1, F, T].
    """
    return source_errors(teacher_masks, targets, weight) < source_errors(masks, targets, weight)


def _masks(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()

"""Weighted L1 between masks: against the ratio masks (separation), and against a teacher's masks (distillation).

Each function takes what a mask decoder gave. Where that is the factors of the logits and the kernel takes them, the
losses are computed from those in one pass; else from ``output.logits``, which both losses share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avsep.kernels import MaskLosses, MaskTeacher, mask_head_losses, mask_l1
from avsep.kernels.mask_head.op import runs_fused
from avsep.types import MaskOutput, Spectrograms

__all__ = ["mask_cross_entropy", "mask_distillation", "mask_losses", "separation_loss", "source_errors"]


def mask_losses(
    output: MaskOutput,
    spectrograms: Spectrograms,
    *,
    teacher_output: MaskOutput | None = None,
    mixtures: Tensor | None = None,
    counted: Tensor | None = None,
) -> MaskLosses:
    """:func:`separation_loss` and :func:`mask_distillation` from one pass over the mask features.

    Args:
        output: the student's masks of B mixtures with N sources.
        spectrograms: the mixtures' analysis.
        teacher_output: the teacher's masks; without them the distillation is 0.
        mixtures: int64 [M], the mixtures that ``teacher_output`` is of, each at most once; all of the batch when None.
        counted: [B, N] bool, the sources that count in the distillation (those of earlier tasks); all sources of
            ``mixtures`` when None.

    Returns:
        ``(separation, distillation)``, scalars. The teacher gets no gradient.
    """
    student = _factors(output)
    teacher = None if teacher_output is None else _factors(teacher_output)
    whole = teacher_output is None or teacher is not None
    if student is None or not whole or not runs_fused(*student, *(teacher or ())):
        separation = mask_l1(output.logits, spectrograms.ratio, spectrograms.weight)
        if teacher_output is None:
            return MaskLosses(separation, torch.zeros_like(separation))
        return MaskLosses(
            separation, mask_distillation(output, teacher_output, spectrograms, mixtures=mixtures, counted=counted)
        )
    target = None
    if teacher is not None:
        rows = torch.arange(len(teacher[0]), device=teacher[0].device) if mixtures is None else mixtures
        target = MaskTeacher(*teacher, rows)
    return mask_head_losses(*student, spectrograms.ratio, spectrograms.weight, teacher=target, counted=counted)


def separation_loss(output: MaskOutput, spectrograms: Spectrograms, *, counted: Tensor | None = None) -> Tensor:
    """L_sep = (1/N) sum_n mean(w |sigmoid(logits_n) - M_n|).

    Args:
        output: the masks of B mixtures with N sources.
        spectrograms: the mixtures' analysis: ratio masks M and weight w.
        counted: [B, N] bool, the sources that count; all when None.

    References:
        Zhao et al., The Sound of Pixels, ECCV 2018; Pian et al., ContAV-Sep, NeurIPS 2024 (half the sum for N = 2).
    """
    if counted is None:
        return mask_losses(output, spectrograms).separation
    return mask_l1(output.logits, spectrograms.ratio, spectrograms.weight, counted=counted)


def mask_distillation(
    output: MaskOutput,
    teacher_output: MaskOutput,
    spectrograms: Spectrograms,
    *,
    mixtures: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """L_dist: the mean over the chosen sources and their pixels of w |student's mask - teacher's mask|.

    The teacher gets no gradient. With no source chosen it is 0. With :func:`separation_loss` beside it,
    :func:`mask_losses` gives both for the price of one.

    Args:
        output: the student's masks of B mixtures with N sources.
        teacher_output: the teacher's masks.
        spectrograms: the mixtures' analysis: weight w.
        mixtures: int64 [M], the mixtures that ``teacher_output`` is of, each at most once; all of the batch when None.
        counted: [B, N] bool, the sources that count (those of earlier tasks); all sources of ``mixtures`` when None.

    References:
        Pian et al., ContAV-Sep, NeurIPS 2024; normalised by the number of memory sources.
    """
    logits, weight = output.logits, spectrograms.weight
    if mixtures is not None:
        logits, weight = logits[mixtures], weight[mixtures]
        counted = None if counted is None else counted[mixtures]
    return mask_l1(logits, teacher_output.logits.detach(), weight, counted=counted, target_is_logits=True)


@torch.no_grad()
def source_errors(masks: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """The mean over its pixels of w |mask - target| of each source, [B, N]: what :func:`mask_losses` averages, to
    compare sources by. Without a gradient, in float32 (float64 of such masks).

    Args:
        masks: [B, N, F, T], between 0 and 1.
        targets: [B, N, F, T], ratio masks or another model's masks.
        weight: [B, 1, F, T].
    """
    dtype = torch.promote_types(masks.dtype, torch.float32)
    found: Tensor = (weight.to(dtype) * (masks.to(dtype) - targets.to(dtype)).abs()).mean(dim=(2, 3))
    return found


def _factors(output: MaskOutput) -> tuple[Tensor, Tensor] | None:
    """Embedding [B, N, C] and mask features [B, C, F, T] of one type, where the decoder gave them."""
    if output.embedding is None or output.mask_features is None:
        return None
    return output.embedding, output.mask_features.to(output.embedding.dtype)


def mask_cross_entropy(output: MaskOutput, spectrograms: Spectrograms, mean_weight: Tensor | None = None) -> Tensor:
    """The mean over sources and pixels of w BCE(mask, ratio mask), a scalar, with w the loss weight over its mean
    (``mean_weight``, of the whole batch where this is a part of it).

    The gradient of an L1 distance between masks all but ends where a mask is near 0 or 1 already, on the wrong side
    too; this one's does not.

    Shapes:
        logits and ratio masks [B, N, F, T], weight [B, 1, F, T].
    """
    weight = spectrograms.weight / (spectrograms.weight.mean() if mean_weight is None else mean_weight)
    target = spectrograms.ratio.clamp(0.0, 1.0)
    loss = F.binary_cross_entropy_with_logits(output.logits.float(), target, reduction="none")
    return (weight * loss).mean()

"""Attention distillation: the student goes on looking where the teacher looked."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_distillation"]


def attention_distillation(attention: Tensor, teacher: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """KL(teacher || attention) = sum_t teacher_t (log teacher_t - log attention_t), mean over the chosen sources.

    A step to which the teacher gives no weight (padding, say) adds nothing. With no source chosen the result is 0.

    Args:
        attention: the student's weights [B, N, T], rows of sum 1.
        teacher: the teacher's, likewise; they get no gradient.
        counted: [B, N] bool, the sources that count (those of earlier tasks); all when None.

    References:
        Pian et al., Audio-Visual Class-Incremental Learning, ICCV 2023 (visual attention distillation).
    """
    teacher = teacher.detach().float()
    # where a weight has underflown to 0 the logarithm is cut off, or 0 times infinity would be NaN
    logarithm = torch.log(attention.float().clamp_min(torch.finfo(torch.float32).tiny))
    divergence: Tensor = (torch.special.xlogy(teacher, teacher) - teacher * logarithm).sum(dim=2)  # [B, N]
    if counted is None:
        return divergence.mean()
    return (divergence * counted).sum() / counted.sum().clamp_min(1)

"""Weighted L1 between masks: against the ratio masks (separation), and against a teacher's masks (distillation)."""

from __future__ import annotations

from torch import Tensor

from avsep.kernels import mask_l1

__all__ = ["mask_distillation", "separation_loss"]


def separation_loss(
    logits: Tensor, ratio: Tensor, weight: Tensor, *, slots: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """L_sep = (1/N) sum_n mean(w |sigmoid(logits_n) - M_n|).

    Args:
        logits: [B, N, F, T].
        ratio: [B, N, F, T], ratio masks.
        weight: [B, 1, F, T].
        slots: [B, N] bool, the slots that count; all when None.
        backend: of the kernel.

    References:
        Zhao et al., The Sound of Pixels, ECCV 2018; Pian et al., ContAV-Sep, NeurIPS 2024 (half the sum for N = 2).
    """
    return mask_l1(logits, ratio, weight, slots=slots, backend=backend)


def mask_distillation(
    logits: Tensor, teacher_logits: Tensor, weight: Tensor, *, slots: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """L_dist: the mean over the chosen slots and their pixels of w |student's mask - teacher's mask|.

    The teacher gets no gradient. With no slot chosen it is 0.

    Args:
        logits: [B, N, F, T], the student's.
        teacher_logits: [B, N, F, T].
        weight: [B, 1, F, T].
        slots: [B, N] bool, the slots that count (those of earlier tasks); all when None.
        backend: of the kernel.

    References:
        Pian et al., ContAV-Sep, NeurIPS 2024; normalised by the number of memory slots.
    """
    return mask_l1(logits, teacher_logits.detach(), weight, slots=slots, target_is_logits=True, backend=backend)

"""The mask head (iQuery) and the weighted L1 between masks (Sound of Pixels), written as the equations say."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mask_head_losses_reference", "mask_head_reference", "mask_l1_reference"]


def mask_head_reference(embedding: Tensor, mask_features: Tensor) -> Tensor:
    """logit_n(f, t) = sum_c embedding_nc features_c(f, t): [B, N, C], [B, C, F, T] -> [B, N, F, T]."""
    return torch.einsum("bnc,bcft->bnft", embedding, mask_features)


def mask_l1_reference(
    logits: Tensor, target: Tensor, weight: Tensor, *, counted: Tensor | None = None, target_is_logits: bool = False
) -> Tensor:
    """Mean of w |sigmoid(logits) - target| over the pixels of the chosen sources, one source at a time."""
    losses = []
    for b in range(logits.shape[0]):
        for n in range(logits.shape[1]):
            if counted is None or counted[b, n]:
                wanted = torch.sigmoid(target[b, n]) if target_is_logits else target[b, n]
                losses.append((weight[b, 0] * (torch.sigmoid(logits[b, n]) - wanted).abs()).mean())
    return torch.stack(losses).mean() if losses else logits.sum() * 0.0


def mask_head_losses_reference(
    embedding: Tensor,
    mask_features: Tensor,
    ratio: Tensor,
    weight: Tensor,
    *,
    teacher: tuple[Tensor, Tensor, Tensor] | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(separation, distillation) through logits and masks; ``teacher`` is (embedding, mask_features, mixtures)."""
    logits = mask_head_reference(embedding, mask_features)
    separation = mask_l1_reference(logits, ratio, weight)
    if teacher is None:
        return separation, torch.zeros_like(separation)
    target = mask_head_reference(teacher[0].detach(), teacher[1].detach())
    rows = teacher[2]
    distillation = mask_l1_reference(
        logits[rows], target, weight[rows], counted=None if counted is None else counted[rows], target_is_logits=True
    )
    return separation, distillation

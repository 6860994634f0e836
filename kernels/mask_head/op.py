"""Masks from class-slot vectors and mask features, and the weighted L1 between masks."""

from __future__ import annotations

import torch
from torch import Tensor

from avsep.kernels._backend import choose_backend

__all__ = ["mask_head", "mask_l1"]


def mask_head(embedding: Tensor, mask_features: Tensor, *, backend: str = "auto") -> Tensor:
    """Mask logits of N sources: logit_n(f, t) = sum_c embedding_nc features_c(f, t).

    One batched product, so that the features are read once for all sources. Under autocast it runs in the autocast
    type, as a matrix product does.

    Args:
        embedding: [B, N, C].
        mask_features: [B, C, F, T].
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        Logits [B, N, F, T].

    Raises:
        ValueError: for shapes that do not fit together.
        ConfigError: for a backend that does not exist.

    References:
        Chen et al., iQuery, CVPR 2023.
    """
    if (
        embedding.ndim != 3
        or mask_features.ndim != 4
        or embedding.shape[0] != mask_features.shape[0]
        or embedding.shape[2] != mask_features.shape[1]
    ):
        raise ValueError(
            "mask_head takes embedding [B, N, C] and mask_features [B, C, F, T], got "
            f"{list(embedding.shape)} and {list(mask_features.shape)}"
        )
    choose_backend(backend, "mask_head", mask_features.numel())
    # [B, N, C] x [B, C, F*T] -> [B, N, F*T] -> [B, N, F, T]
    return torch.bmm(embedding, mask_features.flatten(2)).unflatten(2, tuple(mask_features.shape[2:]))


def mask_l1(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    slots: Tensor | None = None,
    target_is_logits: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Weighted L1 between sigmoid masks and their targets: the mean of w |sigmoid(logits) - target|.

    Without ``slots`` it is (1/N) sum_n mean(w |M^_n - M_n|), which is half the sum for the published N = 2. With them
    it is the mean over the chosen slots and their pixels, 0 when none is chosen. Computed in fp32 (float64 for float64
    logits), also under autocast.

    Args:
        logits: [B, N, F, T].
        target: [B, N, F, T], masks, or logits of masks if ``target_is_logits``.
        weight: [B, 1, F, T], shared by the sources of a mixture.
        slots: [B, N] bool, the slots that count; all when None.
        target_is_logits: True where the target is another model's logits (mask distillation).
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit together, or an empty batch.
        ConfigError: for a backend that does not exist.
    """
    _check(logits, target, weight, slots)
    choose_backend(backend, "mask_head", logits.numel())
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    with torch.autocast(logits.device.type, enabled=False):
        wanted = target.to(dtype)
        if target_is_logits:
            wanted = torch.sigmoid(wanted)
        error = (torch.sigmoid(logits.to(dtype)) - wanted).abs() * weight.to(dtype)  # [B, N, F, T]
        if slots is None:
            return error.mean()
        per_slot = error.mean(dim=(2, 3))  # [B, N]
        return torch.where(slots, per_slot, 0.0).sum() / slots.sum().clamp_min(1)


def _check(logits: Tensor, target: Tensor, weight: Tensor, slots: Tensor | None) -> None:
    if logits.ndim != 4 or logits.shape != target.shape:
        raise ValueError(
            f"mask_l1 takes logits and target [B, N, F, T], got {list(logits.shape)} and {list(target.shape)}"
        )
    batch, sources, rows, frames = logits.shape
    if logits.numel() == 0:
        raise ValueError(f"mask_l1 got empty masks {list(logits.shape)}")
    if weight.shape != (batch, 1, rows, frames):
        raise ValueError(f"weight must have the shape [{batch}, 1, {rows}, {frames}], got {list(weight.shape)}")
    if slots is not None and (slots.shape != (batch, sources) or slots.dtype != torch.bool):
        raise ValueError(f"slots must be bool of shape [{batch}, {sources}], got {slots.dtype} {list(slots.shape)}")

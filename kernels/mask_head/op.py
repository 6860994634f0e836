"""Masks from class vectors and mask features, and the weighted L1 between masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from avsep.kernels._backend import choose_backend

__all__ = ["MaskLosses", "MaskTeacher", "mask_head", "mask_head_losses", "mask_l1", "runs_fused"]

_MOST_SOURCES, _MOST_CHANNELS = 8, 128  # of the Triton kernels; beyond them everything runs in PyTorch
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class MaskLosses(NamedTuple):
    """Both mask losses, scalars: against the ratio masks, and against a teacher's masks (0 without a teacher)."""

    separation: Tensor
    distillation: Tensor


class MaskTeacher(NamedTuple):
    """What another model made of M <= B of the mixtures.

    ``embedding`` [M, N, C]; ``mask_features`` [M, C, F, T]; ``mixtures`` int64 [M], their places in the batch, each at
    most once.
    """

    embedding: Tensor
    mask_features: Tensor
    mixtures: Tensor


def mask_head(embedding: Tensor, mask_features: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute the mask logits of N sources from their class vectors and the mixture's mask features.

    logit_n(f, t) = sum_c embedding_nc features_c(f, t). The features are read once for all sources. Under autocast both
    are cast to the autocast type, as a matrix product casts them.

    Args:
        embedding: [B, N, C].
        mask_features: [B, C, F, T], of the same type; contiguous or channels last (others are copied by the kernel).
        backend: ``auto``, ``torch`` or ``triton``. With more than 8 sources or 128 channels PyTorch runs on each.

    Returns:
        Logits [B, N, F, T].

    Raises:
        ValueError: for shapes, types or devices that do not fit together.
        ConfigError: for a backend that does not exist or cannot run here, or float64 in Triton.

    References:
        Chen et al., iQuery, CVPR 2023.
    """
    _check_head(embedding, mask_features)
    if runs_fused(embedding, mask_features, backend=backend):
        logits: Tensor = torch.ops.avsep.mask_head(*_autocast(embedding, mask_features))
    else:
        logits = _product(*_autocast(embedding, mask_features))
    return logits


def _product(embedding: Tensor, mask_features: Tensor) -> Tensor:
    """[B, N, C] x [B, C, F*T] -> [B, N, F*T] -> [B, N, F, T]"""
    places = tuple(mask_features.shape[2:])
    channels_last = mask_features.is_contiguous(memory_format=torch.channels_last)
    if channels_last and mask_features.device.type == "cpu" and not torch.compiler.is_compiling():
        logits: Tensor = _ChannelsLast.apply(embedding, mask_features.flatten(2))  # type: ignore[no-untyped-call]
    else:
        logits = torch.bmm(embedding, mask_features.flatten(2))
    return logits.reshape(*logits.shape[:2], *places)


class _ChannelsLast(torch.autograd.Function):
    """A batched matrix product whose second gradient lies in memory as the second factor does. PyTorch's would have to
    be turned around for the convolution below, which on CPUs costs more than both products."""

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(embedding, features)
        return torch.bmm(embedding, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        embedding, features = ctx.saved_tensors
        needs_embedding, needs_features = ctx.needs_input_grad
        return (
            torch.bmm(gradient, features.transpose(1, 2)) if needs_embedding else None,
            torch.bmm(gradient.transpose(1, 2), embedding).transpose(1, 2) if needs_features else None,
        )


def mask_head_losses(
    embedding: Tensor,
    mask_features: Tensor,
    ratio: Tensor,
    weight: Tensor,
    *,
    teacher: MaskTeacher | None = None,
    counted: Tensor | None = None,
    backend: str = "auto",
) -> MaskLosses:
    """Compute both mask losses, against the ratio masks and against a teacher's masks, from the mask head's factors.

    They are :func:`mask_l1` of :func:`mask_head`, once for each target. In Triton logits and masks never exist in
    memory, and gradients are formed by recomputing them. The losses are computed in fp32 (float64 for float64
    features), also under autocast. Only ``embedding`` and ``mask_features`` get a gradient.

    Args:
        embedding: [B, N, C].
        mask_features: [B, C, F, T], of the same type; contiguous or channels last (others are copied by the kernel).
        ratio: [B, N, F, T], ratio masks.
        weight: [B, 1, F, T], shared by the sources of a mixture.
        teacher: what another model made of some of the mixtures; its masks are the target of the distillation.
        counted: [B, N] bool, which sources of the teacher's mixtures count in the distillation; all when None.
        backend: ``auto``, ``torch`` or ``triton``. With more than 8 sources or 128 channels PyTorch runs on each.

    Returns:
        ``separation``, the mean of w |mask - ratio|, and ``distillation``, the mean of w |mask - teacher's mask| over
        the chosen sources and their pixels, 0 when none is chosen.

    Raises:
        ValueError: for shapes, types or devices that do not fit together, or an empty batch.
        ConfigError: for a backend that does not exist or cannot run here, or float64 in Triton.

    References:
        Zhao et al., The Sound of Pixels, ECCV 2018 (separation); Pian et al., Continual Audio-Visual Sound Separation,
        NeurIPS 2024 (distillation).
    """
    _check_head(embedding, mask_features)
    _check_masks(embedding, mask_features, ratio, weight, counted)
    if teacher is not None:
        teacher = MaskTeacher(*teacher)
        _check_teacher(embedding, mask_features, teacher)
        if len(teacher.mixtures) == 0:
            teacher = None
    ratio, weight = ratio.detach(), weight.detach()
    parts = (embedding, mask_features, *(() if teacher is None else teacher[:2]))
    if runs_fused(*parts, backend=backend):
        embedding, mask_features = _autocast(embedding, mask_features)
        teacher_parts: tuple[Tensor | None, ...] = (None, None, None)
        if teacher is not None:
            teacher_parts = (*_autocast(teacher.embedding.detach(), teacher.mask_features.detach()), teacher.mixtures)
        losses = torch.ops.avsep.mask_head_losses(embedding, mask_features, ratio, weight, *teacher_parts, counted)
        return MaskLosses(losses[0], losses[1])
    logits = mask_head(embedding, mask_features, backend="torch")
    separation = mask_l1(logits, ratio, weight)
    if teacher is None:
        return MaskLosses(separation, torch.zeros_like(separation))
    rows = teacher.mixtures
    target = mask_head(teacher.embedding.detach(), teacher.mask_features.detach(), backend="torch")
    chosen = None if counted is None else counted[rows]
    return MaskLosses(separation, mask_l1(logits[rows], target, weight[rows], counted=chosen, target_is_logits=True))


def mask_l1(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    counted: Tensor | None = None,
    target_is_logits: bool = False,
) -> Tensor:
    """Compute the weighted L1 distance between sigmoid masks and their targets.

    It is the mean of w |sigmoid(logits) - target|. Without ``counted`` it is (1/N) sum_n mean(w |M^_n - M_n|), which is
    half the sum for the published N = 2. With it, it is the mean over the chosen sources and their pixels, 0 when none
    is chosen. Computed in fp32 (float64 for float64 logits), also under autocast.

    Args:
        logits: [B, N, F, T].
        target: [B, N, F, T], masks, or logits of masks if ``target_is_logits``.
        weight: [B, 1, F, T], shared by the sources of a mixture.
        counted: [B, N] bool, the sources that count; all when None.
        target_is_logits: True where the target is another model's logits (mask distillation).

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit together, or an empty batch.

    References:
        Zhao et al., The Sound of Pixels, ECCV 2018.
    """
    _check_l1(logits, target, weight, counted)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    with torch.autocast(logits.device.type, enabled=False):
        wanted = target.to(dtype)
        if target_is_logits:
            wanted = torch.sigmoid(wanted)
        error = (torch.sigmoid(logits.to(dtype)) - wanted).abs() * weight.to(dtype)  # [B, N, F, T]
        if counted is None:
            return error.mean()
        per_source = error.mean(dim=(2, 3))  # [B, N]
        return torch.where(counted, per_source, 0.0).sum() / counted.sum().clamp_min(1)


def runs_fused(embedding: Tensor, mask_features: Tensor, *teacher: Tensor, backend: str = "auto") -> bool:
    """True where these tensors go to the Triton kernels.

    Raises:
        ConfigError: for a backend that does not exist or cannot run here, or float64 where Triton was asked for.
    """
    obstacle = ""
    for tensor in (embedding, mask_features, *teacher):
        if tensor.dtype not in _TRITON_DTYPES:
            obstacle = f"takes float32, float16 and bfloat16, got {tensor.dtype}"
    size, device = mask_features.numel(), mask_features.device
    if choose_backend(backend, "mask_head", size, device, obstacle=obstacle) == "torch":
        return False
    if embedding.ndim != 3 or mask_features.ndim != 4:
        return False  # the checks of the PyTorch path say what is wrong
    if torch.compiler.is_exporting() or size == 0 or embedding.numel() == 0:
        return False
    channels, rows, frames = mask_features.shape[1:]
    sources = embedding.shape[1]
    return sources <= _MOST_SOURCES and channels <= _MOST_CHANNELS and max(channels, sources) * rows * frames < 2**31


def _autocast(embedding: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
    """Cast as autocast would for a matrix product; nothing to do where the layers before ran under it."""
    kind = mask_features.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return embedding.to(dtype), mask_features.to(dtype)
    return embedding, mask_features


def _check_head(embedding: Tensor, mask_features: Tensor) -> None:
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
    kind = mask_features.device.type
    if not (embedding.dtype == mask_features.dtype or torch.is_autocast_enabled(kind)):
        raise ValueError(
            f"mask_head takes embedding and mask_features of one type, got {embedding.dtype} and {mask_features.dtype}"
        )
    if not (embedding.is_floating_point() and mask_features.is_floating_point()):
        raise ValueError(f"mask_head takes floating point tensors, got {embedding.dtype} and {mask_features.dtype}")
    _check_devices(mask_features, embedding=embedding)


def _check_devices(features: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != features.device:
            raise ValueError(f"mask_features are on {features.device} and {name} on {tensor.device}: move one of them")


def _check_masks(
    embedding: Tensor, mask_features: Tensor, ratio: Tensor, weight: Tensor, counted: Tensor | None
) -> None:
    batch, sources, rows, frames = embedding.shape[0], embedding.shape[1], *mask_features.shape[2:]
    if batch * sources * rows * frames == 0 or embedding.shape[2] == 0:
        raise ValueError(
            f"mask_head_losses got an empty batch: embedding {list(embedding.shape)}, mask_features "
            f"{list(mask_features.shape)}"
        )
    if ratio.shape != (batch, sources, rows, frames):
        raise ValueError(f"ratio must have the shape [{batch}, {sources}, {rows}, {frames}], got {list(ratio.shape)}")
    _check_weight(weight, batch, rows, frames)
    _check_counted(counted, batch, sources)
    _check_devices(mask_features, ratio=ratio, weight=weight, counted=counted)


def _check_weight(weight: Tensor, batch: int, rows: int, frames: int) -> None:
    if weight.shape != (batch, 1, rows, frames):
        raise ValueError(f"weight must have the shape [{batch}, 1, {rows}, {frames}], got {list(weight.shape)}")


def _check_counted(counted: Tensor | None, batch: int, sources: int) -> None:
    if counted is not None and (counted.shape != (batch, sources) or counted.dtype != torch.bool):
        raise ValueError(
            f"counted must be bool of shape [{batch}, {sources}], got {counted.dtype} {list(counted.shape)}"
        )


def _check_teacher(embedding: Tensor, mask_features: Tensor, teacher: MaskTeacher) -> None:
    teacher_mixtures = len(teacher.mixtures)
    if (
        teacher.mixtures.ndim != 1
        or teacher.embedding.shape != (teacher_mixtures, *embedding.shape[1:])
        or teacher.mask_features.shape != (teacher_mixtures, *mask_features.shape[1:])
    ):
        raise ValueError(
            f"a teacher of M mixtures has embedding [M, {embedding.shape[1]}, {embedding.shape[2]}], mask_features "
            f"[M, {', '.join(map(str, mask_features.shape[1:]))}] and mixtures [M], got "
            f"{list(teacher.embedding.shape)}, {list(teacher.mask_features.shape)} and {list(teacher.mixtures.shape)}"
        )
    if teacher.mixtures.dtype != torch.int64:
        raise ValueError(f"the teacher's mixtures must be int64, got {teacher.mixtures.dtype}")
    if teacher_mixtures:
        _check_head(teacher.embedding, teacher.mask_features)
        _check_devices(mask_features, teacher=teacher.mask_features, mixtures=teacher.mixtures)
    # Values are looked at where it costs nothing.
    if teacher_mixtures > len(embedding):
        raise ValueError(f"a teacher of {teacher_mixtures} mixtures knows more than the batch's {len(embedding)}")
    if teacher_mixtures and teacher.mixtures.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(teacher.mixtures.min()), int(teacher.mixtures.max())
        if low < 0 or high >= len(embedding):
            raise ValueError(
                f"the teacher's mixture {low if low < 0 else high} is none of the batch's {len(embedding)} (from 0)"
            )
        if len(torch.unique(teacher.mixtures)) < teacher_mixtures:
            raise ValueError(f"the teacher's mixtures {teacher.mixtures.tolist()} name one twice: each counts once")


def _check_l1(logits: Tensor, target: Tensor, weight: Tensor, counted: Tensor | None) -> None:
    if logits.ndim != 4 or logits.shape != target.shape:
        raise ValueError(
            f"mask_l1 takes logits and target [B, N, F, T], got {list(logits.shape)} and {list(target.shape)}"
        )
    batch, sources, rows, frames = logits.shape
    if logits.numel() == 0:
        raise ValueError(f"mask_l1 got empty masks {list(logits.shape)}")
    _check_weight(weight, batch, rows, frames)
    _check_counted(counted, batch, sources)


# The Triton path as operators of PyTorch: forward, backward, and what shapes they give.


def _dense(features: Tensor) -> Tensor:
    """As it is where contiguous or channels last, which the kernels read as they lie; else a contiguous copy."""
    if features.is_contiguous() or features.is_contiguous(memory_format=torch.channels_last):
        return features
    return features.contiguous()


@torch.library.custom_op(
    "avsep::mask_head", mutates_args=(), schema="(Tensor embedding, Tensor mask_features) -> Tensor"
)
def _head(embedding: Tensor, mask_features: Tensor) -> Tensor:
    from avsep.kernels.mask_head import triton_kernel

    return triton_kernel.head(embedding.contiguous(), _dense(mask_features))


@_head.register_fake
def _(embedding: Tensor, mask_features: Tensor) -> Tensor:
    return embedding.new_empty((*embedding.shape[:2], *mask_features.shape[2:]))


@torch.library.custom_op(
    "avsep::mask_head_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor embedding, Tensor mask_features, bool with_features) -> (Tensor, Tensor)",
)
def _head_backward(
    upstream: Tensor, embedding: Tensor, mask_features: Tensor, with_features: bool
) -> tuple[Tensor, Tensor]:
    from avsep.kernels.mask_head import triton_kernel

    return triton_kernel.head_backward(
        upstream.contiguous(), embedding.contiguous(), _dense(mask_features), with_features
    )


def _fake_gradients(embedding: Tensor, mask_features: Tensor, with_features: bool) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(_dense(mask_features)) if with_features else mask_features.new_empty(0)
    return torch.empty_like(embedding, memory_format=torch.contiguous_format), gradient


@_head_backward.register_fake
def _(upstream: Tensor, embedding: Tensor, mask_features: Tensor, with_features: bool) -> tuple[Tensor, Tensor]:
    return _fake_gradients(embedding, mask_features, with_features)


def _keep_head(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_head(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
    with_features = ctx.needs_input_grad[1]
    embedding, features = torch.ops.avsep.mask_head_backward(upstream, *ctx.saved_tensors, with_features)
    return embedding, features if with_features else None


_head.register_autograd(_differentiate_head, setup_context=_keep_head)


@torch.library.custom_op(
    "avsep::mask_head_losses",
    mutates_args=(),
    schema="(Tensor embedding, Tensor mask_features, Tensor ratio, Tensor weight, Tensor? teacher_embedding, "
    "Tensor? teacher_features, Tensor? mixtures, Tensor? counted) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _losses(
    embedding: Tensor,
    mask_features: Tensor,
    ratio: Tensor,
    weight: Tensor,
    teacher_embedding: Tensor | None,
    teacher_features: Tensor | None,
    mixtures: Tensor | None,
    counted: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from avsep.kernels.mask_head import triton_kernel

    return triton_kernel.losses(
        embedding.contiguous(),
        _dense(mask_features),
        ratio.contiguous(),
        weight.contiguous(),
        None if teacher_embedding is None else teacher_embedding.contiguous(),
        None if teacher_features is None else _dense(teacher_features),
        None if mixtures is None else mixtures.contiguous(),
        None if counted is None or mixtures is None else counted.contiguous(),
    )


@_losses.register_fake
def _(
    embedding: Tensor,
    mask_features: Tensor,
    ratio: Tensor,
    weight: Tensor,
    teacher_embedding: Tensor | None,
    teacher_features: Tensor | None,
    mixtures: Tensor | None,
    counted: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, two, three = (mask_features.new_empty((), dtype=torch.float32) for _ in range(3))
    teacher_mixtures = 0 if mixtures is None else mixtures.shape[0]
    return one, two, three, ratio.new_empty((teacher_mixtures, *ratio.shape[1:]), dtype=torch.int8)


@torch.library.custom_op(
    "avsep::mask_head_losses_backward",
    mutates_args=(),
    schema="(Tensor? separation_gradient, Tensor? distillation_gradient, Tensor embedding, Tensor mask_features, "
    "Tensor ratio, Tensor weight, Tensor? mixtures, Tensor distillation_scale, Tensor signs, bool with_features) "
    "-> (Tensor, Tensor)",
)
def _losses_backward(
    separation_gradient: Tensor | None,
    distillation_gradient: Tensor | None,
    embedding: Tensor,
    mask_features: Tensor,
    ratio: Tensor,
    weight: Tensor,
    mixtures: Tensor | None,
    distillation_scale: Tensor,
    signs: Tensor,
    with_features: bool,
) -> tuple[Tensor, Tensor]:
    from avsep.kernels.mask_head import triton_kernel

    return triton_kernel.losses_backward(
        separation_gradient,
        distillation_gradient,
        embedding.contiguous(),
        _dense(mask_features),
        ratio.contiguous(),
        weight.contiguous(),
        None if mixtures is None else mixtures.contiguous(),
        distillation_scale,
        signs,
        with_features,
    )


@_losses_backward.register_fake
def _(
    separation_gradient: Tensor | None,
    distillation_gradient: Tensor | None,
    embedding: Tensor,
    mask_features: Tensor,
    ratio: Tensor,
    weight: Tensor,
    mixtures: Tensor | None,
    distillation_scale: Tensor,
    signs: Tensor,
    with_features: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_gradients(embedding, mask_features, with_features)


def _keep_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    embedding, features, ratio, weight, _, _, mixtures, _ = inputs
    ctx.save_for_backward(embedding, features, ratio, weight, mixtures, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate_losses(
    ctx: Any, separation: Tensor | None, distillation: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if separation is None and distillation is None:
        return (None,) * 8
    with_features = ctx.needs_input_grad[1]
    embedding, features = torch.ops.avsep.mask_head_losses_backward(
        separation, distillation, *ctx.saved_tensors, with_features
    )
    return embedding, features if with_features else None, *(None,) * 6


_losses.register_autograd(_differentiate_losses, setup_context=_keep_losses)

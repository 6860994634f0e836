"""Cross-modal similarity distillation without an n x n mask; the maths are in this folder's README."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avsep.kernels._backend import choose_backend

__all__ = ["SimilarityDistillation", "similarity_distillation"]

# Up to here the scores are kept for the backward pass (12 MiB for three pairs in fp32); beyond, they are recomputed
# in blocks of rows.
_DENSE_ROWS = 1024
_BLOCK_ELEMENTS = 1 << 22
# Stands for minus infinity on an excluded diagonal; finite, so that a row of which nothing is left stays free of NaN.
_EXCLUDED = -1e30


class SimilarityDistillation(NamedTuple):
    """The instance term and the class term, scalars."""

    instance: Tensor
    class_: Tensor


def similarity_distillation(
    modalities: Sequence[Tensor],
    instance_ids: Tensor,
    class_ids: Tensor,
    *,
    temperature: float = 0.05,
    teacher_rows: Tensor | None = None,
    symmetric: bool = True,
    average_class: bool = True,
    unimodal: bool = False,
    backend: str = "auto",
) -> SimilarityDistillation:
    """Compute CrossSDC's instance and class terms over n rows.

    For every pair of modalities the scores are S = U V^T / temperature with rows of U and V at length 1, and a term is
    the mean over both directions of CE(S, E) = -1/n sum_p [sum_q E_pq log softmax_q(S_p.)] / sum_q E_pq, with E_pq = 1
    where two rows share the instance (or class) id; then the mean over the pairs. Everything is computed in fp32
    (float64 for float64 input), also under autocast. A row of zeros stays zero and gets no gradient.

    Args:
        modalities: two or more of [n, D], not normalised, in any floating type; one or more if ``unimodal``, which may
            then differ in D.
        instance_ids: [n] integers; rows with equal ids are of one instance (video).
        class_ids: [n] integers, likewise for classes.
        temperature: above 0.
        teacher_rows: [n] bool, rows that carry no gradient.
        symmetric: False keeps the direction from the earlier to the later modality only.
        average_class: False replaces the class term's division by the number of positives and by n with one by n^2
            (the unnormalised term of AV-CIL's released code).
        unimodal: compare each modality with itself rather than with the others. No row is then compared with itself:
            p = q is taken out of positives and softmax, and a term is the mean over the rows that have a positive left
            (0 if none has).
        backend: ``auto``, ``torch`` or ``triton``. Triton does not run inside ``torch.compile``: ``auto`` takes PyTorch
            there.

    Raises:
        ValueError: for wrong shapes, types, devices, an empty batch, too few modalities or a temperature not above 0.
        ConfigError: for a backend that does not exist or cannot run here, or float64 in Triton.

    References:
        Pian et al., Continual Audio-Visual Sound Separation, NeurIPS 2024. Pian et al., Audio-Visual Class-Incremental
        Learning, ICCV 2023 (``symmetric=False``, ``average_class=False``).
    """
    _check(modalities, instance_ids, class_ids, temperature, teacher_rows, unimodal)
    if _takes_triton(backend, modalities):
        options = (temperature, symmetric, average_class, unimodal)
        apply: Callable[..., tuple[Tensor, Tensor]] = _Triton.apply
        return SimilarityDistillation(*apply(instance_ids, class_ids, teacher_rows, options, *modalities))
    with torch.autocast(modalities[0].device.type, enabled=False):
        return _terms(
            _stack_rows(modalities, teacher_rows),
            instance_ids,
            class_ids,
            scale=1.0 / temperature,
            symmetric=symmetric,
            average_class=average_class,
            unimodal=unimodal,
        )


def _stack_rows(modalities: Sequence[Tensor], teacher_rows: Tensor | None) -> Tensor:
    """Rows at length 1 in fp32 or float64: [M, n, D]; a narrower modality is filled up with zeros."""
    dtype = torch.float64 if any(m.dtype == torch.float64 for m in modalities) else torch.float32
    width = max(m.shape[1] for m in modalities)
    x = torch.stack([F.pad(m.to(dtype), (0, width - m.shape[1])) for m in modalities])
    if teacher_rows is not None:
        x = torch.where(teacher_rows[None, :, None], x.detach(), x)
    length: Tensor = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    return x / length.clamp_min(1e-12) * (length > 1e-12)


def _terms(
    x: Tensor,
    instance_ids: Tensor,
    class_ids: Tensor,
    *,
    scale: float,
    symmetric: bool,
    average_class: bool,
    unimodal: bool,
) -> SimilarityDistillation:
    """x [M, n, D], rows at length 1 -> instance and class term."""
    count, n = x.shape[:2]
    if unimodal:
        first = second = list(range(count))
    else:
        first = [i for i in range(count) for _ in range(i + 1, count)]
        second = [j for i in range(count) for j in range(i + 1, count)]
    u, v = (x if unimodal else x[first]), (x if unimodal else x[second])  # [P, n, D]
    rows, columns = _log_sum_exps(u * scale, v, unimodal)
    lse = ((rows + columns) / 2 if symmetric else rows).mean(dim=0)  # [n], shared by both terms
    own = (u * v).sum(dim=2).mean(dim=0) if unimodal else None  # [n], the scores p = q before scaling
    terms = []
    for ids, average in ((instance_ids, True), (class_ids, average_class)):
        group = _group_index(ids)  # [n], values below n
        size = torch.zeros(n, dtype=x.dtype, device=x.device).index_add(0, group, torch.ones_like(lse))  # of each group
        sums = torch.zeros_like(x).index_add(1, group, x)  # [M, n, D], zero where there is no such group
        products = (sums[first] * sums[second]).sum(dim=2).mean(dim=0)  # [n]: sum of S_pq over p, q of each group
        if own is not None:
            products = products - torch.zeros_like(lse).index_add(0, group, own)
        positives = size - 1 if unimodal else size
        per_row = positives[group]  # [n]
        if average:
            kept = (per_row > 0).to(x.dtype)
            rows_kept = kept.sum().clamp_min(1)
            row_weight = kept / rows_kept
            group_weight = (positives > 0) / (positives.clamp_min(1) * rows_kept)
        else:
            row_weight = per_row / n**2
            group_weight = torch.full_like(size, 1 / n**2)
        terms.append((row_weight * lse).sum() - scale * (group_weight * products).sum())
    return SimilarityDistillation(*terms)


def _group_index(ids: Tensor) -> Tensor:
    """Arbitrary integers [n] -> group numbers [n] below n; by sorting, since its shapes do not depend on the values."""
    ordered, order = ids.sort()
    number = F.pad((ordered[1:] != ordered[:-1]).long(), (1, 0)).cumsum(0)
    return torch.empty_like(number).scatter(0, order, number)


def _log_sum_exps(u: Tensor, v: Tensor, unimodal: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the rows and of the columns of U V^T, without its diagonal if ``unimodal``: [P, n, D] twice ->
    [P, n] twice."""
    n = u.shape[1]
    if n <= _DENSE_ROWS:
        scores = u @ v.transpose(1, 2)  # [P, n, n]
        if unimodal:
            scores = scores.masked_fill(torch.eye(n, dtype=torch.bool, device=u.device), _EXCLUDED)
        return scores.logsumexp(dim=2), scores.logsumexp(dim=1)
    apply: Callable[..., tuple[Tensor, Tensor]] = _BlockLogSumExps.apply
    return apply(u, v, unimodal)


class _BlockLogSumExps(torch.autograd.Function):
    """The same in blocks of rows; backward recomputes them, so that memory is O(n D) and one block."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, unimodal: bool) -> tuple[Tensor, Tensor]:
        pairs, n, _ = u.shape
        rows = u.new_empty(pairs, n)
        columns = u.new_full((pairs, n), -math.inf)
        for begin, end in _blocks(pairs, n):
            scores = _block_scores(u, v, begin, end, unimodal)  # [P, r, n]
            rows[:, begin:end] = scores.logsumexp(dim=2)
            columns = torch.logaddexp(columns, scores.logsumexp(dim=1))
        ctx.save_for_backward(u, v, rows, columns)
        ctx.unimodal = unimodal
        return rows, columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor, Tensor, None]:
        u, v, rows, columns = ctx.saved_tensors
        pairs, n, _ = u.shape
        grad_u, grad_v = torch.empty_like(u), torch.zeros_like(v)
        for begin, end in _blocks(pairs, n):
            scores = _block_scores(u, v, begin, end, ctx.unimodal)
            grad = (scores - columns[:, None, :]).exp_().mul_(grad_columns[:, None, :])
            grad += scores.sub_(rows[:, begin:end, None]).exp_().mul_(grad_rows[:, begin:end, None])  # [P, r, n]
            grad_u[:, begin:end] = grad @ v
            grad_v.baddbmm_(grad.transpose(1, 2), u[:, begin:end])
        return grad_u, grad_v, None


def _blocks(pairs: int, n: int) -> list[tuple[int, int]]:
    rows = max(16, _BLOCK_ELEMENTS // (pairs * n))
    return [(begin, min(begin + rows, n)) for begin in range(0, n, rows)]


def _block_scores(u: Tensor, v: Tensor, begin: int, end: int, unimodal: bool) -> Tensor:
    scores = u[:, begin:end] @ v.transpose(1, 2)
    if unimodal:
        scores.diagonal(begin, 1, 2).fill_(_EXCLUDED)
    return scores


def _check(
    modalities: Sequence[Tensor],
    instance_ids: Tensor,
    class_ids: Tensor,
    temperature: float,
    teacher_rows: Tensor | None,
    unimodal: bool,
) -> None:
    if len(modalities) < (1 if unimodal else 2):
        raise ValueError(
            f"similarity_distillation compares modalities and got {len(modalities)}: give two or more"
            + ("" if unimodal or not modalities else ", or unimodal=True")
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    first = modalities[0]
    for m in modalities:
        if m.ndim != 2 or m.shape[0] != first.shape[0] or (m.shape[1] != first.shape[1] and not unimodal):
            shapes = ", ".join(str(list(x.shape)) for x in modalities)
            raise ValueError(f"modalities must be [n, D] of equal n and D, got {shapes}")
        if not m.is_floating_point():
            raise ValueError(f"modalities must be floating point, got {m.dtype}")
        if m.device != first.device:
            raise ValueError(f"modalities must be on one device, got {first.device} and {m.device}")
    n = first.shape[0]
    if n == 0:
        raise ValueError("similarity_distillation got an empty batch: at least one row is needed")
    for name, ids in (("instance_ids", instance_ids), ("class_ids", class_ids)):
        if ids.shape != (n,):
            raise ValueError(f"{name} must have the shape [{n}], got {list(ids.shape)}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
        if ids.device != first.device:
            raise ValueError(f"{name} must be on {first.device}, got {ids.device}")
    if teacher_rows is not None:
        if teacher_rows.shape != (n,) or teacher_rows.dtype != torch.bool:
            raise ValueError(
                f"teacher_rows must be bool of shape [{n}], got {teacher_rows.dtype} {list(teacher_rows.shape)}"
            )
        if teacher_rows.device != first.device:
            raise ValueError(f"teacher_rows must be on {first.device}, got {teacher_rows.device}")


# The Triton path: an autograd function rather than a registered operator, whose own machinery costs twice as much as
# this one on the CPU, which at the paper's size is what a call takes.

_TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def _takes_triton(backend: str, modalities: Sequence[Tensor]) -> bool:
    obstacle = "does not run inside torch.compile" if torch.compiler.is_compiling() else ""
    for m in modalities:
        if m.dtype not in _TRITON_TYPES:
            obstacle = f"takes float32, float16 and bfloat16, got {m.dtype}"
    size, device = modalities[0].shape[0], modalities[0].device
    return choose_backend(backend, "similarity_distillation", size, device, obstacle=obstacle) == "triton"


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        instance_ids: Tensor,
        class_ids: Tensor,
        teacher_rows: Tensor | None,
        options: tuple[float, bool, bool, bool],
        *modalities: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from avsep.kernels.similarity_distillation import triton_kernel

        instance, class_, *kept = triton_kernel.forward(
            modalities, instance_ids, class_ids, triton_kernel.Options(*options)
        )
        ctx.save_for_backward(instance_ids, class_ids, teacher_rows, *kept, *modalities)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return instance, class_

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from avsep.kernels.similarity_distillation import triton_kernel

        instance_ids, class_ids, teacher_rows, codes, stats, *modalities = ctx.saved_tensors
        found = triton_kernel.backward(
            [torch.zeros((), device=stats.device) if g is None else g for g in gradients],
            modalities,
            instance_ids,
            class_ids,
            teacher_rows,
            codes,
            stats,
            triton_kernel.Options(*ctx.options),
        )
        return (None, None, None, None, *found)

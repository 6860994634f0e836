"""The mask head and its weighted L1 losses in Triton: jit functions and their launchers.

A program owns a run of pixels of one mixture and goes through it tile by tile: it reads the C features of a tile once,
into registers, and forms the logits of all N sources from them. Tiles are [C, P]; everything per source and pixel is
[N, P]; products over all three are [N, C, P] and are summed at once, so that they never exist as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from avsep.kernels._triton import AotCase, launch, next_power_of_2, torch_to_triton

__all__ = ["aot_cases", "head", "head_backward", "losses", "losses_backward"]


@triton.jit
def _read_embedding(embedding, row, N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_N, BLOCK_C] of the mixture ``row``, fp32; zeros beyond N and C."""
    n = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    return tl.load(embedding + (row * N + n) * C + c, mask=(n < N) & (c < C), other=0.0).to(tl.float32)


@triton.jit
def _pixels(first, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """[BLOCK_P] from ``first`` on.

    Four to a thread where it reads neighbouring pixels: with eight, which a thread reads at once of 16-bit types, so
    few threads would share out the pixels that most of the work on masks would be done many times over.
    """
    p = first + tl.arange(0, BLOCK_P)
    if CHANNELS_LAST:
        return p
    return tl.max_contiguous(p, 4)


@triton.jit
def _feature_offsets(c, p, pixels, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where the features [1, C, P] of one mixture lie, from its first."""
    if CHANNELS_LAST:
        return p[None, None, :] * C + c[None, :, None]
    return c[None, :, None] * pixels + p[None, None, :]


@triton.jit
def _logits(embedding, features):
    """[N, C], [1, C, P] -> [N, P]"""
    return tl.sum(embedding[:, :, None] * features, axis=1)


@triton.jit
def _spread(embedding, gradient):
    """The gradient of the features: [N, C], [N, P] -> [1, C, P]"""
    return tl.sum(embedding[:, :, None] * gradient[:, None, :], axis=0, keep_dims=True)


@triton.jit
def _write_embedding_partials(
    partials, program, total, N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    n = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    tl.store(partials + (program.to(tl.int64) * N + n) * C + c, tl.sum(total, axis=2), mask=(n < N) & (c < C))


@triton.jit
def _sign(x):
    """-1, 0 or 1; 0 for NaN, as PyTorch's."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit(do_not_specialize=["tiles", "splits"])
def _head_kernel(
    embedding,
    features,
    logits,
    pixels,
    tiles,
    splits,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Logits [B, N, P]."""
    program = tl.program_id(0)
    b = (program // splits).to(tl.int64)
    first = (program % splits) * tiles * BLOCK_P
    n = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_C)
    e = _read_embedding(embedding, b, N, C, BLOCK_N, BLOCK_C)
    features += b * C * pixels
    logits += b * N * pixels
    for tile in range(tiles):
        p = _pixels(first + tile * BLOCK_P, BLOCK_P, CHANNELS_LAST)
        inside = (c[None, :, None] < C) & (p[None, None, :] < pixels)
        f = tl.load(features + _feature_offsets(c, p, pixels, C, CHANNELS_LAST), mask=inside, other=0.0)
        x = _logits(e, f.to(tl.float32))
        tl.store(logits + n * pixels + p[None, :], x, mask=(n < N) & (p[None, :] < pixels))


@triton.jit(do_not_specialize=["tiles", "splits"])
def _head_backward_kernel(
    upstream,
    embedding,
    features,
    features_gradient,
    partials,
    pixels,
    tiles,
    splits,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradient of the features, and of the embedding as one partial sum [N, C] a program."""
    program = tl.program_id(0)
    b = (program // splits).to(tl.int64)
    first = (program % splits) * tiles * BLOCK_P
    n = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_C)
    e = _read_embedding(embedding, b, N, C, BLOCK_N, BLOCK_C)
    features += b * C * pixels
    upstream += b * N * pixels
    if FEATURES:
        features_gradient += b * C * pixels
    total = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_P], tl.float32)
    for tile in range(tiles):
        p = _pixels(first + tile * BLOCK_P, BLOCK_P, CHANNELS_LAST)
        inside = (c[None, :, None] < C) & (p[None, None, :] < pixels)
        offsets = _feature_offsets(c, p, pixels, C, CHANNELS_LAST)
        f = tl.load(features + offsets, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(upstream + n * pixels + p[None, :], mask=(n < N) & (p[None, :] < pixels), other=0.0)
        k = k.to(tl.float32)
        total += k[:, None, :] * f
        if FEATURES:
            tl.store(features_gradient + offsets, _spread(e, k), mask=inside)
    _write_embedding_partials(partials, program, total, N, C, BLOCK_N, BLOCK_C)


@triton.jit(do_not_specialize=["splits"])
def _embedding_kernel(partials, gradient, splits, NC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the partial sums of a mixture's embedding gradient, in a fixed order: [B, splits, NC] -> [B, NC]."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    s = tl.arange(0, BLOCK_S)[:, None]
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    for start in range(0, splits, BLOCK_S):
        row = b * splits + start + s
        total += tl.load(partials + row * NC + i, mask=(start + s < splits) & (i < NC), other=0.0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(gradient + b * NC + i, tl.sum(total, axis=0), mask=i < NC)


@triton.jit
def _teacher_rows(index, b, teacher_mixtures, BLOCK_M: tl.constexpr):
    """The teacher's row for the mixture ``b``, -1 where it has none."""
    m = tl.arange(0, BLOCK_M)
    mixture = tl.load(index + m, mask=m < teacher_mixtures, other=-1)
    return tl.max(tl.where(mixture == b, m, -1), axis=0).to(tl.int64)


@triton.jit
def _chosen(counted, b, m, N: tl.constexpr, BLOCK_N: tl.constexpr, COUNTED: tl.constexpr):
    """[BLOCK_N] bool: the sources that count of a mixture the teacher gives."""
    n = tl.arange(0, BLOCK_N)
    chosen = n < tl.where(m >= 0, N, 0)
    if COUNTED:
        chosen = chosen & (tl.load(counted + b * N + n, mask=n < N, other=0) != 0)
    return chosen


@triton.jit(do_not_specialize=["tiles", "splits", "teacher_mixtures"])
def _losses_kernel(
    embedding,
    features,
    ratio,
    weight,
    teacher_embedding,
    teacher_features,
    index,
    counted,
    signs,
    partials,
    pixels,
    tiles,
    splits,
    teacher_mixtures,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TEACHER: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One partial sum a program of both losses and of the number of sources: [3, programs].

    Of the teacher's masks it leaves behind the sign of their distance (-1, 0 or 1), a byte a pixel, so that
    the backward pass needs neither them nor the teacher's features.
    """
    program = tl.program_id(0)
    b = (program // splits).to(tl.int64)
    split = program % splits
    n = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_C)
    e = _read_embedding(embedding, b, N, C, BLOCK_N, BLOCK_C)
    features += b * C * pixels
    ratio += b * N * pixels
    weight += b * pixels
    if TEACHER:
        m = _teacher_rows(index, b, teacher_mixtures, BLOCK_M)
        taught_pixels = tl.where(m >= 0, pixels, 0)  # none where the mixture has no teacher
        chosen = _chosen(counted, b, m, N, BLOCK_N, COUNTED)
        m = tl.maximum(m, 0)
        teacher_e = _read_embedding(teacher_embedding, m, N, C, BLOCK_N, BLOCK_C)
        teacher_features += m * C * pixels
        signs += m * N * pixels
        distillation = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    separation = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for tile in range(tiles):
        p = _pixels((split * tiles + tile) * BLOCK_P, BLOCK_P, CHANNELS_LAST)
        inside = p[None, :] < pixels
        f = tl.load(
            features + _feature_offsets(c, p, pixels, C, CHANNELS_LAST),
            mask=(c[None, :, None] < C) & inside[:, None, :],
            other=0.0,
        )
        if TEACHER:
            teacher_f = tl.load(
                teacher_features + _feature_offsets(c, p, pixels, C, TEACHER_CHANNELS_LAST),
                mask=(c[None, :, None] < C) & (p[None, None, :] < taught_pixels),
                other=0.0,
            )
        valid = (n < N) & inside
        w = tl.load(weight + p, mask=p < pixels, other=0.0).to(tl.float32)[None, :]
        r = tl.load(ratio + n * pixels + p[None, :], mask=valid, other=0.0).to(tl.float32)
        mask = tl.sigmoid(_logits(e, f.to(tl.float32)))
        separation += tl.where(valid, tl.abs(mask - r) * w, 0.0)
        if TEACHER:
            distance = mask - tl.sigmoid(_logits(teacher_e, teacher_f.to(tl.float32)))
            counts = chosen[:, None] & inside
            distillation += tl.where(counts, tl.abs(distance) * w, 0.0)
            sign = tl.where(counts, _sign(distance), 0.0).to(tl.int8)
            tl.store(
                signs + n * pixels + p[None, :],
                sign,
                mask=(n < N) & (p[None, :] < taught_pixels),
            )
    programs = tl.num_programs(0)
    tl.store(partials + program, tl.sum(tl.sum(separation, axis=1), axis=0))
    if TEACHER:
        tl.store(partials + programs + program, tl.sum(tl.sum(distillation, axis=1), axis=0))
        count = tl.sum(chosen.to(tl.float32), axis=0)
        tl.store(partials + 2 * programs + program, tl.where(split == 0, count, 0.0))


@triton.jit(do_not_specialize=["programs", "scale", "pixels"])
def _sum_kernel(
    partials,
    separation,
    distillation,
    distillation_scale,
    programs,
    scale,
    pixels,
    BLOCK: tl.constexpr,
    TEACHER: tl.constexpr,
):
    """Add up the partial sums, in a fixed order; ``distillation_scale`` is 1 / (chosen sources x pixels)."""
    i = tl.arange(0, BLOCK)
    s = tl.zeros([BLOCK], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    k = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, BLOCK):
        at = start + i
        s += tl.load(partials + at, mask=at < programs, other=0.0)
        if TEACHER:
            d += tl.load(partials + programs + at, mask=at < programs, other=0.0)
            k += tl.load(partials + 2 * programs + at, mask=at < programs, other=0.0)
    tl.store(separation, tl.sum(s, axis=0) * scale)
    per_pixel = 1.0 / (tl.maximum(tl.sum(k, axis=0), 1.0) * pixels)
    tl.store(distillation, tl.sum(d, axis=0) * per_pixel)
    tl.store(distillation_scale, per_pixel)


@triton.jit(
    do_not_specialize=["scale", "tiles", "splits", "teacher_mixtures"],
    # upstream gradients may be any element of a larger tensor
    do_not_specialize_on_alignment=["separation_gradient", "distillation_gradient"],
)
def _losses_backward_kernel(
    separation_gradient,
    distillation_gradient,
    distillation_scale,
    embedding,
    features,
    ratio,
    weight,
    index,
    signs,
    features_gradient,
    partials,
    scale,
    pixels,
    tiles,
    splits,
    teacher_mixtures,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SEPARATION: tl.constexpr,
    TEACHER: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """As :func:`_head_backward_kernel`, with the gradient of the logits formed from both losses'."""
    program = tl.program_id(0)
    b = (program // splits).to(tl.int64)
    first = (program % splits) * tiles * BLOCK_P
    n = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_C)
    e = _read_embedding(embedding, b, N, C, BLOCK_N, BLOCK_C)
    features += b * C * pixels
    ratio += b * N * pixels
    weight += b * pixels
    if FEATURES:
        features_gradient += b * C * pixels
    if SEPARATION:
        of_separation = tl.load(separation_gradient).to(tl.float32) * scale
    if TEACHER:
        m = _teacher_rows(index, b, teacher_mixtures, BLOCK_M)
        taught_pixels = tl.where(m >= 0, pixels, 0)  # none where the mixture has no teacher
        signs += tl.maximum(m, 0) * N * pixels
        of_distillation = tl.load(distillation_gradient).to(tl.float32) * tl.load(distillation_scale)
    total = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_P], tl.float32)
    for tile in range(tiles):
        p = _pixels(first + tile * BLOCK_P, BLOCK_P, CHANNELS_LAST)
        inside = (c[None, :, None] < C) & (p[None, None, :] < pixels)
        offsets = _feature_offsets(c, p, pixels, C, CHANNELS_LAST)
        f = tl.load(features + offsets, mask=inside, other=0.0).to(tl.float32)
        valid = (n < N) & (p[None, :] < pixels)
        w = tl.load(weight + p, mask=p < pixels, other=0.0).to(tl.float32)[None, :]
        mask = tl.sigmoid(_logits(e, f))
        k = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        if SEPARATION:
            r = tl.load(ratio + n * pixels + p[None, :], mask=valid, other=0.0).to(tl.float32)
            k += of_separation * _sign(mask - r)
        if TEACHER:
            sign = tl.load(signs + n * pixels + p[None, :], mask=(n < N) & (p[None, :] < taught_pixels), other=0).to(
                tl.float32
            )
            k += of_distillation * sign
        k = tl.where(valid, k * w * mask * (1.0 - mask), 0.0)
        total += k[:, None, :] * f
        if FEATURES:
            tl.store(features_gradient + offsets, _spread(e, k), mask=inside)
    _write_embedding_partials(partials, program, total, N, C, BLOCK_N, BLOCK_C)


@dataclass(frozen=True)
class _Blocks:
    """A kernel's tile: ``n`` sources, ``c`` channels, ``p`` pixels; ``warps`` of the program."""

    n: int
    c: int
    p: int
    warps: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_N": self.n, "BLOCK_C": self.c, "BLOCK_P": self.p}


def _blocks(sources: int, channels: int, *, heavy: bool) -> _Blocks:
    """``heavy``: the kernel holds more than the features: the teacher's, or N sums for each of them.

    A thread holds as many features as leave room for four programs a multiprocessor at the published size.
    """
    n, c = next_power_of_2(sources), max(4, next_power_of_2(channels))
    each = (32 if heavy else 64) // max(2, n)
    warps = 4 if c <= 32 else 8
    return _Blocks(n, c, p=each * 32 * warps // c, warps=warps)


_PROGRAMS = 2048  # enough for several rounds on the largest GPU, few enough for their partial sums to cost nothing


def _programs(batch: int, pixels: int, block: int) -> tuple[int, int]:
    """(tiles a program, programs a mixture): about 2,048 programs in all, of 1 to 16 tiles each."""
    tiles = triton.cdiv(pixels, block)
    each = min(16, max(1, batch * tiles // _PROGRAMS))
    return each, triton.cdiv(tiles, each)


def _channels_last(features: Tensor) -> bool:
    return not features.is_contiguous()


def head(embedding: Tensor, features: Tensor) -> Tensor:
    """Logits [B, N, F, T] of embedding [B, N, C] and dense features [B, C, F, T], in the embedding's dtype."""
    batch, sources, channels = embedding.shape
    pixels = features.shape[2] * features.shape[3]
    last = _channels_last(features)
    blocks = _blocks(sources, channels, heavy=False)
    tiles, splits = _programs(batch, pixels, blocks.p)
    logits = torch.empty((batch, sources, *features.shape[2:]), dtype=embedding.dtype, device=features.device)
    launch(
        _head_kernel,
        (batch * splits,),
        embedding,
        features,
        logits,
        pixels,
        tiles,
        splits,
        N=sources,
        C=channels,
        **blocks.constants(),
        CHANNELS_LAST=last,
        num_warps=blocks.warps,
        num_stages=1,
    )
    return logits


def head_backward(upstream: Tensor, embedding: Tensor, features: Tensor, with_features: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the embedding and of the features (empty unless ``with_features``)."""
    batch, sources, channels = embedding.shape
    pixels = features.shape[2] * features.shape[3]
    last = _channels_last(features)
    blocks = _blocks(sources, channels, heavy=True)
    tiles, splits = _programs(batch, pixels, blocks.p)
    gradient = torch.empty_like(features) if with_features else features.new_empty(0)
    partials = torch.empty((batch, splits, sources, channels), dtype=torch.float32, device=features.device)
    launch(
        _head_backward_kernel,
        (batch * splits,),
        upstream,
        embedding,
        features,
        gradient,
        partials,
        pixels,
        tiles,
        splits,
        N=sources,
        C=channels,
        **blocks.constants(),
        CHANNELS_LAST=last,
        FEATURES=with_features,
        num_warps=blocks.warps,
        num_stages=1,
    )
    return _embedding_gradient(partials, embedding), gradient


_SUM_BLOCK = 1024  # partial sums of the losses added at once
_EMBEDDING_BLOCKS = (32, 32)  # partial sums, and elements, of the embedding's gradient


def _embedding_gradient(partials: Tensor, embedding: Tensor) -> Tensor:
    batch, splits, sources, channels = partials.shape
    gradient = torch.empty_like(embedding)
    rows, columns = _EMBEDDING_BLOCKS
    launch(
        _embedding_kernel,
        (batch, triton.cdiv(sources * channels, columns)),
        partials,
        gradient,
        splits,
        NC=sources * channels,
        BLOCK_S=rows,
        BLOCK=columns,
        num_warps=4,
        num_stages=1,
    )
    return gradient


def losses(
    embedding: Tensor,
    features: Tensor,
    ratio: Tensor,
    weight: Tensor,
    teacher_embedding: Tensor | None,
    teacher_features: Tensor | None,
    index: Tensor | None,
    counted: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses; 1 / (chosen sources x pixels); and the signs int8 [M, N, F, T] of student's minus teacher's masks.

    All tensors contiguous, the features dense.
    """
    batch, sources, channels = embedding.shape
    pixels = features.shape[2] * features.shape[3]
    last = _channels_last(features)
    teacher_mixtures = 0 if teacher_features is None else len(teacher_features)
    blocks = _blocks(sources, channels, heavy=teacher_mixtures > 0)
    tiles, splits = _programs(batch, pixels, blocks.p)
    programs = batch * splits
    separation, distillation, distillation_scale = (
        torch.empty((), dtype=torch.float32, device=features.device) for _ in range(3)
    )
    signs = torch.empty((teacher_mixtures, *ratio.shape[1:]), dtype=torch.int8, device=features.device)
    partials = torch.empty((3, programs), dtype=torch.float32, device=features.device)
    launch(
        _losses_kernel,
        (programs,),
        embedding,
        features,
        ratio,
        weight,
        teacher_embedding,
        teacher_features,
        index,
        counted,
        signs if teacher_mixtures else None,
        partials,
        pixels,
        tiles,
        splits,
        teacher_mixtures,
        N=sources,
        C=channels,
        **blocks.constants(),
        BLOCK_M=next_power_of_2(batch),
        CHANNELS_LAST=last,
        TEACHER=teacher_mixtures > 0,
        TEACHER_CHANNELS_LAST=teacher_features is not None and _channels_last(teacher_features),
        COUNTED=counted is not None,
        num_warps=blocks.warps,
        num_stages=1,
    )
    launch(
        _sum_kernel,
        (1,),
        partials,
        separation,
        distillation,
        distillation_scale,
        programs,
        1.0 / (batch * sources * pixels),
        pixels,
        BLOCK=_SUM_BLOCK,
        TEACHER=teacher_mixtures > 0,
        num_warps=4,
        num_stages=1,
    )
    return separation, distillation, distillation_scale, signs


def losses_backward(
    separation_gradient: Tensor | None,
    distillation_gradient: Tensor | None,
    embedding: Tensor,
    features: Tensor,
    ratio: Tensor,
    weight: Tensor,
    index: Tensor | None,
    distillation_scale: Tensor,
    signs: Tensor,
    with_features: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the embedding and of the features (empty unless ``with_features``)."""
    batch, sources, channels = embedding.shape
    pixels = features.shape[2] * features.shape[3]
    last = _channels_last(features)
    blocks = _blocks(sources, channels, heavy=True)
    tiles, splits = _programs(batch, pixels, blocks.p)
    teacher_mixtures = 0 if distillation_gradient is None else len(signs)
    gradient = torch.empty_like(features) if with_features else features.new_empty(0)
    partials = torch.empty((batch, splits, sources, channels), dtype=torch.float32, device=features.device)
    launch(
        _losses_backward_kernel,
        (batch * splits,),
        separation_gradient,
        distillation_gradient if teacher_mixtures else None,
        distillation_scale,
        embedding,
        features,
        ratio,
        weight,
        index if teacher_mixtures else None,
        signs if teacher_mixtures else None,
        gradient,
        partials,
        1.0 / (batch * sources * pixels),
        pixels,
        tiles,
        splits,
        teacher_mixtures,
        N=sources,
        C=channels,
        **blocks.constants(),
        BLOCK_M=next_power_of_2(batch),
        CHANNELS_LAST=last,
        SEPARATION=separation_gradient is not None,
        TEACHER=teacher_mixtures > 0,
        FEATURES=with_features,
        num_warps=blocks.warps,
        num_stages=1,
    )
    return _embedding_gradient(partials, embedding), gradient


def aot_cases() -> list[AotCase]:
    """The kernels as training launches them: the published sizes and larger ones, each dtype, both layouts.

    Left out is what only makes code shorter: no gradient of the features, no separation, no choice of sources.
    """
    cases: list[AotCase] = []
    for sources, channels in ((2, 32), (3, 24), (8, 128)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for last in (False, True):
                if (sources, channels) != (2, 32) and dtype == torch.float16:
                    continue  # as bfloat16
                cases += _cases(32, sources, channels, dtype, last)
    return cases


def _cases(batch: int, sources: int, channels: int, dtype: torch.dtype, last: bool) -> list[AotCase]:
    kind = torch_to_triton(dtype)
    settings = f"N={sources} C={channels} {kind}{' channels_last' if last else ''}"
    sizes = {"pixels": "i32", "tiles": "i32", "splits": "i32"}
    parts = {"embedding": f"*{kind}", "features": f"*{kind}"}
    masks = {"ratio": "*fp32", "weight": "*fp32"}

    def case(
        name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], *, warps: int, note: str = ""
    ) -> AotCase:
        scalars = ("separation_gradient", "distillation_gradient")
        aligned = tuple(k for k, v in signature.items() if (v[0] == "*" and k not in scalars) or k == "pixels")
        return AotCase(
            name, kernel, signature, constants, aligned=aligned, num_warps=warps, num_stages=1, settings=settings + note
        )

    def shape(heavy: bool) -> tuple[dict[str, Any], int]:
        blocks = _blocks(sources, channels, heavy=heavy)
        return {"N": sources, "C": channels, "CHANNELS_LAST": last, **blocks.constants()}, blocks.warps

    found = []
    constants, warps = shape(False)
    signature = {**parts, "logits": f"*{kind}", **sizes}
    found.append(case("mask_head", _head_kernel, signature, constants, warps=warps))
    constants, warps = shape(True)
    signature = {"upstream": f"*{kind}", **parts, "features_gradient": f"*{kind}", "partials": "*fp32", **sizes}
    constants["FEATURES"] = True
    found.append(case("mask_head backward", _head_backward_kernel, signature, constants, warps=warps))
    for teacher in (False, True):
        note = " with teacher" if teacher else ""
        choice = {"TEACHER": teacher, "BLOCK_M": next_power_of_2(batch)}
        names = ("teacher_embedding", "teacher_features", "index", "counted", "signs")
        teacher_mixtures = (
            dict(zip(names, (f"*{kind}", f"*{kind}", "*i64", "*i1", "*i8"), strict=True)) if teacher else {}
        )
        constants, warps = shape(teacher)
        constants |= {} if teacher else dict.fromkeys(names)
        constants |= {**choice, "TEACHER_CHANNELS_LAST": teacher and last, "COUNTED": teacher}
        signature = {**parts, **masks, **teacher_mixtures, "partials": "*fp32", **sizes, "teacher_mixtures": "i32"}
        found.append(case("mask_head_losses", _losses_kernel, signature, constants, warps=warps, note=note))
        teacher_mixtures = {"distillation_gradient": "*fp32", "index": "*i64", "signs": "*i8"} if teacher else {}
        constants, warps = shape(True)
        constants |= {} if teacher else dict.fromkeys(("distillation_gradient", "index", "signs"))
        constants |= {**choice, "SEPARATION": True, "FEATURES": True}
        signature = {
            "separation_gradient": "*fp32",
            **teacher_mixtures,
            "distillation_scale": "*fp32",
            **parts,
            **masks,
            "features_gradient": f"*{kind}",
            "partials": "*fp32",
            "scale": "fp32",
            **sizes,
            "teacher_mixtures": "i32",
        }
        name = "mask_head_losses backward"
        found.append(case(name, _losses_backward_kernel, signature, constants, warps=warps, note=note))
    if not last:
        rows, columns = _EMBEDDING_BLOCKS
        signature = {"partials": "*fp32", "gradient": f"*{kind}", "splits": "i32"}
        constants = {"NC": sources * channels, "BLOCK_S": rows, "BLOCK": columns}
        found.append(case("mask_head embedding gradient", _embedding_kernel, signature, constants, warps=4))
    if dtype == torch.float32 and not last:
        scalars = dict.fromkeys(("separation", "distillation", "distillation_scale"), "*fp32")
        signature = {"partials": "*fp32", **scalars, "programs": "i32", "scale": "fp32", "pixels": "i32"}
        for teacher in (False, True):
            constants = {"BLOCK": _SUM_BLOCK, "TEACHER": teacher}
            note = " with teacher" if teacher else ""
            found.append(case("mask_head_losses sum", _sum_kernel, signature, constants, warps=4, note=note))
    return found

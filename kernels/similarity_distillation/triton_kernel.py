"""Cross-modal similarity distillation in Triton: jit functions and their launchers.

A score is never kept: a program owns a block of rows of one modality, walks over the rows of another and forms the
scores of one tile at a time. Products run on the tensor cores in half precision without losing fp32's accuracy. An
fp32 row is brought to the length 1024 and split into two halves, hi + lo, which hold 22 bits of each value; of the four
products of two such rows the smallest, lo lo, is left out. A row in half precision is scaled by a power of two, which
is exact, to a length in (512, 1024]; what is left of its length is a factor r in fp32: normalised row = hi r.

Few rows (``direct``) are scaled and split by every program that reads them, which saves launches; many rows
(``prepared``), and any number before sm_80, once, by a kernel of their own, into padded memory that needs no masks.

All scores are held in units of log 2, so that exp2 takes them as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from avsep.kernels._triton import AotCase, launch, next_power_of_2, torch_to_triton

__all__ = ["aot_cases", "backward", "forward"]

# ``stats``, which forward leaves for backward, has rows [n]: the log-sum-exps of every direction; the number of
# positives of every row, by instance and by class; the sums of the positives' scores of every pair of modalities, by
# instance and by class. Behind them, how many rows have a positive by instance and by class.


@triton.jit
def _inverse_length(square):
    """1 / length of rows from their squared length; 0 for a length up to 1e-12, which counts as zero as in PyTorch."""
    known = square > 1e-24
    return tl.where(known, tl.div_rn(1.0, tl.sqrt_rn(tl.where(known, square, 1.0))), 0.0)


@triton.jit
def _scaling(inverse, LOW: tl.constexpr):
    """Inverse lengths -> what rows are multiplied with before they are rounded to halves, and the factor r that makes
    them rows of length 1 (not read if LOW)."""
    if LOW:
        return inverse * 1024.0, inverse
    power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 1024.0
    known = power > 0.0
    return power, tl.where(known, tl.div_rn(inverse, tl.where(known, power, 1.0)), 0.0)


@triton.jit
def _halves(x, LOW: tl.constexpr):
    """Rows [R, D] in fp32 -> hi, lo [R, D] fp16, r [R], which is 0 for a row of zeros."""
    multiplier, factor = _scaling(_inverse_length(tl.sum(x * x, axis=1)), LOW)
    scaled = x * multiplier[:, None]
    hi = scaled.to(tl.float16)
    if LOW:
        lo = (scaled - hi.to(tl.float32)).to(tl.float16)
    else:
        lo = hi  # not read
    return hi, lo, factor


@triton.jit
def _scores(products, factor, v_factor, scale, LOW: tl.constexpr):
    """Products of halves -> (scores but for the factors of the columns, scores), in units of log 2."""
    if LOW:
        scores = products * (scale / 1048576.0)
        return scores, scores
    products = products * (factor * scale)[:, None]
    return products, products * v_factor[None, :]


@triton.jit
def _product(a, a_low, b, b_low, accumulator, LOW_A: tl.constexpr, LOW_B: tl.constexpr):
    """accumulator + a b, in an order in which b and b_low need not be in registers at the same time."""
    if LOW_A:
        accumulator = tl.dot(a_low, b, accumulator)
    accumulator = tl.dot(a, b, accumulator)
    if LOW_B:
        accumulator = tl.dot(a, b_low, accumulator)
    return accumulator


@triton.jit
def _choose(i, a, b, c):
    """The i-th of three."""
    chosen = a
    if i == 1:
        chosen = b
    if i == 2:
        chosen = c
    return chosen


@triton.jit
def _read_ids(instance_ids, class_ids, rows, n, PREPARED: tl.constexpr):
    """Ids of rows: instance and class, or, prepared, the code of both (twice)."""
    instance = tl.load(instance_ids + rows, mask=rows < n, other=0)
    if PREPARED:
        class_ = instance
    else:
        class_ = tl.load(class_ids + rows, mask=rows < n, other=0)
    return instance, class_


@triton.jit
def _same(instance, class_, other_instance, other_class, PREPARED: tl.constexpr):
    """Ids of rows [R] and of columns [C] -> whether they are of one instance, of one class [R, C]."""
    if PREPARED:
        half: tl.constexpr = instance.dtype.primitive_bitwidth // 2
        mask: tl.constexpr = (1 << half) - 1
        difference = instance[:, None] ^ other_instance[None, :]
        same_instance = (difference >> half) == 0
        same_class = (difference & mask) == 0
    else:
        same_instance = instance[:, None] == other_instance[None, :]
        same_class = class_[:, None] == other_class[None, :]
    return same_instance, same_class


@triton.jit
def _compared(direction, M: tl.constexpr, UNIMODAL: tl.constexpr):
    """Direction -> (modality of the rows, modality of the columns): first all pairs i < j, then the same the other way
    round; (i, i) if unimodal."""
    if UNIMODAL:
        i = direction
        j = direction
    else:
        pairs: tl.constexpr = M * (M - 1) // 2
        turned = direction >= pairs
        pair = tl.where(turned, direction - pairs, direction)
        low = pair * 0
        for k in tl.static_range(1, M):
            low = tl.where(pair >= k * (2 * M - k - 1) // 2, k, low)
        high = pair - low * (2 * M - low - 1) // 2 + low + 1
        i = tl.where(turned, high, low)
        j = tl.where(turned, low, high)
    return i, j


@triton.jit
def _read_rows(x, stride, start, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [BLOCK, BLOCK_D] in fp32, the first of which is row ``start`` and lies at x; zeros beyond n and D."""
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    return tl.load(
        x + (r[:, None] * stride + d[None, :]), mask=(start + r < n)[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def _modality(
    i,
    x0,
    x1,
    x2,
    stride0,
    stride1,
    stride2,
    padded,
    WIDTH: tl.constexpr,
    PREPARED: tl.constexpr,
    LOW: tl.constexpr,
):
    """Where the rows of modality ``i`` begin, and how far apart they are."""
    if PREPARED:
        x = x0 + i * (padded.to(tl.int64) * WIDTH * (2 if LOW else 1))
        stride = WIDTH
    else:
        x = _choose(i, x0, x1, x2)
        stride = _choose(i, stride0, stride1, stride2)
    return x, stride


@triton.jit
def _own_rows(
    u,
    u_stride,
    u_scales,
    first_row,
    n,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PREPARED: tl.constexpr,
    LOW: tl.constexpr,
):
    """A program's own rows, which lie at u: hi, lo (not read if PREPARED: ``_tile_scores`` loads them), factors r."""
    if PREPARED:
        factor = tl.load(u_scales + (first_row + tl.arange(0, BLOCK)))
        hi = factor
        lo = factor
    else:
        hi, lo, factor = _halves(_read_rows(u, u_stride, first_row, n, D, BLOCK, BLOCK_D), LOW)
    return hi, lo, factor


@triton.jit
def _prepared_products(
    u,
    v,
    low_plane,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
):
    """Products [BLOCK_M, BLOCK_N] of the prepared rows at u and v, BLOCK_K of ``width`` features at a time."""
    k = tl.arange(0, BLOCK_K)
    u_tile = tl.arange(0, BLOCK_M)[:, None] * WIDTH + k[None, :]
    v_tile = tl.arange(0, BLOCK_N)[:, None] * WIDTH + k[None, :]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, width, BLOCK_K):
        uh = tl.load(u + step + u_tile)
        vh = tl.load(v + step + v_tile)
        if LOW:
            ul = tl.load(u + low_plane + step + u_tile)
            vl = tl.load(v + low_plane + step + v_tile)
            products = _product(uh, ul, tl.trans(vh), tl.trans(vl), products, LOW, LOW)
        else:
            products = tl.dot(uh, tl.trans(vh), products)
    return products


@triton.jit
def _tile_scores(
    u,
    uh,
    ul,
    factor,
    v,
    v_stride,
    v_scales,
    start,
    n,
    padded,
    width,  # WIDTH, in backward not as a constant
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    PREPARED: tl.constexpr,
    LOW: tl.constexpr,
):
    """Own rows against the rows at v, the first of which is row ``start`` -> (scores but for the factors of the
    columns, scores), in units of log 2; of the rows at v the factors, hi and lo (not read if PREPARED)."""
    if PREPARED:
        low_plane = padded.to(tl.int64) * WIDTH
        products = _prepared_products(u, v, low_plane, width, BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, LOW)
        v_factor = tl.load(v_scales + (start + tl.arange(0, BLOCK_N)))
        vh = v_factor
        vl = v_factor
    else:
        vh, vl, v_factor = _halves(_read_rows(v, v_stride, start, n, D, BLOCK_N, WIDTH), LOW)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        products = _product(uh, ul, tl.trans(vh), tl.trans(vl), products, LOW, LOW)
    products, scores = _scores(products, factor, v_factor, scale, LOW)
    return products, scores, v_factor, vh, vl


@triton.jit(do_not_specialize=["n", "padded"])
def _prepare_kernel(
    x,  # [n, D], rows ``stride`` apart
    halves,  # [1 or 2, padded, WIDTH] fp16: hi, lo
    scales,  # [2, padded] fp32: r, 1 / length
    n,
    stride,
    padded,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOW: tl.constexpr,
):
    """Scale and split the rows of one modality; what lies beyond n and D becomes zero."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    square = tl.zeros((BLOCK,), tl.float32)
    x += rows.to(tl.int64)[:, None] * stride
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(x + d[None, :], mask=(rows < n)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(value * value, axis=1)
    inverse = _inverse_length(square)
    multiplier, factor = _scaling(inverse, LOW)
    tl.store(scales + rows, factor)
    tl.store(scales + padded + rows, inverse)
    halves += rows.to(tl.int64)[:, None] * WIDTH
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(x + d[None, :], mask=(rows < n)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        scaled = value * multiplier[:, None]
        hi = scaled.to(tl.float16)
        tl.store(halves + d[None, :], hi)
        if LOW:
            low_plane = halves + padded.to(tl.int64) * WIDTH
            tl.store(low_plane + d[None, :], (scaled - hi.to(tl.float32)).to(tl.float16))


@triton.jit
def _count_pass(instance_ids, class_ids, counts, rows, n, BLOCK_N: tl.constexpr, UNIMODAL: tl.constexpr):
    """The number of positives of every row, by instance and by class."""
    instance = tl.load(instance_ids + rows, mask=rows < n, other=0)
    class_ = tl.load(class_ids + rows, mask=rows < n, other=0)
    same_instance = tl.zeros_like(rows)
    same_class = tl.zeros_like(rows)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        allowed = (columns < n)[None, :]
        if UNIMODAL:
            allowed = allowed & (rows[:, None] != columns[None, :])
        other_instance = tl.load(instance_ids + columns, mask=columns < n, other=0)
        other_class = tl.load(class_ids + columns, mask=columns < n, other=0)
        same_instance += tl.sum((allowed & (instance[:, None] == other_instance[None, :])).to(tl.int32), axis=1)
        same_class += tl.sum((allowed & (class_[:, None] == other_class[None, :])).to(tl.int32), axis=1)
    tl.store(counts + rows, same_instance.to(tl.float32), mask=rows < n)
    tl.store(counts + n + rows, same_class.to(tl.float32), mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def _identify_kernel(
    instance_ids,
    class_ids,
    codes,  # [n] int32 or int64, written
    counts,  # [2, n] fp32, written
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIMODAL: tl.constexpr,
):
    """The number of positives of every row, and its ids in one number that is cheap to compare: the first row of the
    same instance in the upper half of the bits and the first of the same class in the lower."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    _count_pass(instance_ids, class_ids, counts, rows, n, BLOCK_N, UNIMODAL)
    instance = tl.load(instance_ids + rows, mask=rows < n, other=0)
    class_ = tl.load(class_ids + rows, mask=rows < n, other=0)
    first_instance = rows
    first_class = rows
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        other_instance = tl.load(instance_ids + columns, mask=columns < n, other=0)
        other_class = tl.load(class_ids + columns, mask=columns < n, other=0)
        inside = (columns < n)[None, :]
        found = tl.where(inside & (instance[:, None] == other_instance[None, :]), columns[None, :], rows[:, None])
        first_instance = tl.minimum(first_instance, tl.min(found, axis=1))
        found = tl.where(inside & (class_[:, None] == other_class[None, :]), columns[None, :], rows[:, None])
        first_class = tl.minimum(first_class, tl.min(found, axis=1))
    half: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth // 2
    code = (first_instance.to(codes.dtype.element_ty) << half) | first_class.to(codes.dtype.element_ty)
    tl.store(codes + rows, code, mask=rows < n)


@triton.jit
def _add_exponentials(total, top, scores, rows, columns, n, bound, ONLINE: tl.constexpr, UNIMODAL: tl.constexpr):
    """The sums of a tile's exponentials go to ``total``; if ONLINE, ``top`` is the running maximum taken off them."""
    # columns beyond n have scores of 0; what is taken off them lets nothing through the exponential
    outside = tl.where(columns < n, 0.0, float("inf"))
    if ONLINE:
        allowed = scores - outside[None, :]
        if UNIMODAL:
            allowed = tl.where(rows[:, None] == columns[None, :], -float("inf"), allowed)
        higher = tl.maximum(top, tl.max(allowed, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(allowed - higher[:, None]), axis=1)
        top = higher
    else:
        # no score exceeds the bound, and none is so far below it that its exponential would vanish
        value = tl.exp2(scores - (bound + outside)[None, :])
        if UNIMODAL:
            value = tl.where(rows[:, None] == columns[None, :], 0.0, value)
        total += tl.sum(value, axis=1)
    return total, top


@triton.jit
def _add_positives(
    sum_instance,
    sum_class,
    scores,
    instance,
    class_,
    instance_ids,
    class_ids,
    rows,
    columns,
    n,
    PREPARED: tl.constexpr,
    UNIMODAL: tl.constexpr,
):
    """The scores of a tile's positives go to the sums of their rows."""
    other_instance, other_class = _read_ids(instance_ids, class_ids, columns, n, PREPARED)
    same_instance, same_class = _same(instance, class_, other_instance, other_class, PREPARED)
    if UNIMODAL:
        scores = tl.where(rows[:, None] == columns[None, :], 0.0, scores)
    sum_instance += tl.sum(tl.where(same_instance, scores, 0.0), axis=1)
    sum_class += tl.sum(tl.where(same_class, scores, 0.0), axis=1)
    return sum_instance, sum_class


@triton.jit
def _rows_pass(
    u,
    v,
    u_stride,
    v_stride,
    u_scales,
    v_scales,
    instance_ids,
    class_ids,
    lse,
    positives_instance,
    positives_class,
    first_row,
    n,
    padded,
    scale,
    bound,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    PREPARED: tl.constexpr,
    LOW: tl.constexpr,
    ONLINE: tl.constexpr,
    UNIMODAL: tl.constexpr,
    POSITIVES: tl.constexpr,
):
    """One direction: the log-sum-exp of every row, and, if POSITIVES, the sums of its positives' scores."""
    rows = first_row + tl.arange(0, BLOCK_M)
    u += first_row.to(tl.int64) * u_stride
    uh, ul, factor = _own_rows(u, u_stride, u_scales, first_row, n, D, BLOCK_M, WIDTH, PREPARED, LOW)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    if POSITIVES:
        instance, class_ = _read_ids(instance_ids, class_ids, rows, n, PREPARED)
        sum_instance = tl.zeros((BLOCK_M,), tl.float32)
        sum_class = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = _tile_scores(
            u, uh, ul, factor, v, v_stride, v_scales, start, n, padded, WIDTH, scale,
            D, BLOCK_M, BLOCK_N, BLOCK_D, WIDTH, PREPARED, LOW,
        )[1]  # fmt: skip
        v += BLOCK_N * v_stride
        total, top = _add_exponentials(total, top, scores, rows, columns, n, bound, ONLINE, UNIMODAL)
        if POSITIVES:
            sum_instance, sum_class = _add_positives(
                sum_instance, sum_class, scores, instance, class_, instance_ids, class_ids, rows, columns, n,
                PREPARED, UNIMODAL,
            )  # fmt: skip
    if not ONLINE:
        top = tl.zeros((BLOCK_M,), tl.float32) + bound
    # a row of which nothing is left (n = 1 without itself) has no weight; NaN goes on
    tl.store(lse + rows, tl.where(total == 0.0, 0.0, top + tl.log2(total)), mask=rows < n)
    if POSITIVES:
        tl.store(positives_instance + rows, sum_instance, mask=rows < n)
        tl.store(positives_class + rows, sum_class, mask=rows < n)


@triton.jit(do_not_specialize=["n", "padded"])
def _forward_kernel(
    x0,  # direct: up to three modalities [n, D], rows ``stride`` apart; prepared: x0 holds the halves of all
    x1,
    x2,
    stride0,
    stride1,
    stride2,
    scales,  # prepared: [M, 2, padded] fp32
    instance_ids,  # [n]
    class_ids,  # [n]
    stats,  # fp32, written: all but the last two numbers
    n,
    padded,
    scale,  # log2(e) / temperature
    bound,  # no score is above it
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    PREPARED: tl.constexpr,
    LOW: tl.constexpr,
    ONLINE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    UNIMODAL: tl.constexpr,
):
    """Grid (blocks of rows, directions), and, direct, one more: programs that count positives."""
    pairs: tl.constexpr = M if UNIMODAL else M * (M - 1) // 2
    directions: tl.constexpr = 2 * pairs if SYMMETRIC and not UNIMODAL else pairs
    first_row = tl.program_id(0) * BLOCK_M
    direction = tl.program_id(1)
    counts = stats + directions * n
    if direction == directions:
        if not PREPARED:
            rows = first_row + tl.arange(0, BLOCK_M)
            _count_pass(instance_ids, class_ids, counts, rows, n, BLOCK_N, UNIMODAL)
    else:
        i, j = _compared(direction, M, UNIMODAL)
        u, u_stride = _modality(i, x0, x1, x2, stride0, stride1, stride2, padded, WIDTH, PREPARED, LOW)
        v, v_stride = _modality(j, x0, x1, x2, stride0, stride1, stride2, padded, WIDTH, PREPARED, LOW)
        u_scales = scales + i * 2 * padded
        v_scales = scales + j * 2 * padded
        lse = stats + direction * n
        sums = counts + (2 + direction) * n
        # the sums of S and of its transpose are the same: the first direction of a pair forms them
        if direction < pairs:
            _rows_pass(
                u, v, u_stride, v_stride, u_scales, v_scales, instance_ids, class_ids, lse, sums, sums + pairs * n,
                first_row, n, padded, scale, bound,
                D, BLOCK_M, BLOCK_N, BLOCK_D, WIDTH, PREPARED, LOW, ONLINE, UNIMODAL, True,
            )  # fmt: skip
        else:
            _rows_pass(
                u, v, u_stride, v_stride, u_scales, v_scales, instance_ids, class_ids, lse, sums, sums,
                first_row, n, padded, scale, bound,
                D, BLOCK_M, BLOCK_N, BLOCK_D, WIDTH, PREPARED, LOW, ONLINE, UNIMODAL, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def _reduce_kernel(
    stats,
    instance_out,
    class_out,
    n,
    PAIRS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The two terms, by one program, so that the order of their sums is always the same."""
    lane = tl.arange(0, BLOCK)
    counts = stats + DIRECTIONS * n
    sums = counts + 2 * n
    sum_instance = tl.zeros((BLOCK,), tl.float32)
    sum_class = tl.zeros((BLOCK,), tl.float32)
    kept_instance = tl.zeros((BLOCK,), tl.float32)
    kept_class = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        rows = start + lane
        inside = rows < n
        count_instance = tl.load(counts + rows, mask=inside, other=0.0)
        count_class = tl.load(counts + n + rows, mask=inside, other=0.0)
        lse = tl.zeros((BLOCK,), tl.float32)
        for d in tl.static_range(DIRECTIONS):
            lse += tl.load(stats + d * n + rows, mask=inside, other=0.0)
        score_instance = tl.zeros((BLOCK,), tl.float32)
        score_class = tl.zeros((BLOCK,), tl.float32)
        for p in tl.static_range(PAIRS):
            score_instance += tl.load(sums + p * n + rows, mask=inside, other=0.0)
            score_class += tl.load(sums + (PAIRS + p) * n + rows, mask=inside, other=0.0)
        lse = lse / DIRECTIONS
        score_instance = score_instance / PAIRS
        score_class = score_class / PAIRS
        has = count_instance > 0.0
        kept_instance += tl.where(has, 1.0, 0.0)
        sum_instance += tl.where(has, lse - score_instance / tl.maximum(count_instance, 1.0), 0.0)
        has = count_class > 0.0
        kept_class += tl.where(has, 1.0, 0.0)
        if AVERAGE:
            sum_class += tl.where(has, lse - score_class / tl.maximum(count_class, 1.0), 0.0)
        else:
            sum_class += count_class * lse - score_class
    rows_instance = tl.sum(kept_instance, axis=0)
    rows_class = tl.sum(kept_class, axis=0)
    rest = counts + (2 + 2 * PAIRS) * n
    tl.store(rest, rows_instance)
    tl.store(rest + 1, rows_class)
    ln2: tl.constexpr = 0.6931471805599453
    instance = ln2 * tl.sum(sum_instance, axis=0) / tl.maximum(rows_instance, 1.0)
    class_ = ln2 * tl.sum(sum_class, axis=0)
    if AVERAGE:
        class_ = class_ / tl.maximum(rows_class, 1.0)
    else:
        size = n.to(tl.float32)
        class_ = class_ / size / size
    tl.store(instance_out, instance)
    tl.store(class_out, class_)


@triton.jit
def _weights(count, rows_with_positives, n, AVERAGE: tl.constexpr):
    """Of a row's log-sum-exp and of one of its positives in a term: [R] twice."""
    if AVERAGE:
        of_row = tl.where(count > 0.0, 1.0 / tl.maximum(rows_with_positives, 1.0), 0.0)
        of_positive = of_row / tl.maximum(count, 1.0)
    else:
        of_positive = count * 0.0 + 1.0 / n / n
        of_row = count * of_positive
    return of_row, of_positive


@triton.jit
def _upstream(
    instance_gradient,
    class_gradient,
    rows_instance,
    rows_class,
    size,
    directions,
    AVERAGE: tl.constexpr,
):
    """The gradients of the two terms, for one direction, and a bound on what they make of the gradient of a score."""
    of_instance = tl.load(instance_gradient) / directions
    of_class = tl.load(class_gradient) / directions
    largest = tl.abs(of_instance) / tl.maximum(rows_instance, 1.0)
    if AVERAGE:
        largest += tl.abs(of_class) / tl.maximum(rows_class, 1.0)
    else:
        largest += tl.abs(of_class) / size
    return of_instance, of_class, tl.maximum(largest, 1e-30)


@triton.jit
def _weights_of_rows(
    counts,
    rows,
    n,
    rows_instance,
    rows_class,
    gradient_instance,
    gradient_class,
    size,
    AVERAGE: tl.constexpr,
):
    """Of rows' log-sum-exps, and of one of their positives by instance and by class: [R] thrice, with the gradients of
    the terms in them."""
    count_instance = tl.load(counts + rows, mask=rows < n, other=0.0)
    count_class = tl.load(counts + n + rows, mask=rows < n, other=0.0)
    row_instance, positive_instance = _weights(count_instance, rows_instance, size, True)
    row_class, positive_class = _weights(count_class, rows_class, size, AVERAGE)
    of_rows = gradient_instance * row_instance + gradient_class * row_class
    return of_rows, positive_instance * gradient_instance, positive_class * gradient_class


@triton.jit
def _partner(i, number, n, M: tl.constexpr, SYMMETRIC: tl.constexpr, UNIMODAL: tl.constexpr):
    """The modality that ``i`` is compared with as its ``number``-th; the directions from ``i`` to it and back; up to
    which row each of these exists (n or 0)."""
    row_end = n
    column_end = n
    if UNIMODAL:
        j = i
        row_direction = i
        column_direction = i
    else:
        pairs: tl.constexpr = M * (M - 1) // 2
        j = number + (number >= i).to(tl.int32)
        low = tl.minimum(i, j)
        pair = low * (2 * M - low - 1) // 2 + tl.maximum(i, j) - low - 1
        if SYMMETRIC:
            row_direction = tl.where(i < j, pair, pair + pairs)
            column_direction = tl.where(i < j, pair + pairs, pair)
        else:
            row_direction = pair
            column_direction = pair
            row_end = tl.where(i < j, n, 0)
            column_end = n - row_end
    return j, row_direction, column_direction, row_end, column_end


@triton.jit
def _through_lse(
    scores,
    row_lse,
    column_lse,
    row_weight,
    counts,
    columns,
    n,
    rows_instance,
    rows_class,
    gradient_instance,
    gradient_class,
    size,
    AVERAGE: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """The gradient of a tile's scores from the log-sum-exps of its rows and columns, which all have the weight
    ``row_weight`` if UNIFORM."""
    change = tl.exp2(scores - row_lse[:, None])
    from_columns = tl.exp2(scores - column_lse[None, :])
    if UNIFORM:
        change = (change + from_columns) * row_weight
    else:
        # after the exponentials, since ptxas otherwise needs more registers
        column_weight = _weights_of_rows(
            counts, columns, n, rows_instance, rows_class, gradient_instance, gradient_class, size, AVERAGE
        )[0]
        change = change * row_weight[:, None] + from_columns * column_weight[None, :]
    return change


@triton.jit
def _less_positives(
    change,
    instance,
    class_,
    positive_instance,
    positive_class,
    instance_ids,
    class_ids,
    columns,
    n,
    PREPARED: tl.constexpr,
):
    """``change`` with what the positives take from it."""
    other_instance, other_class = _read_ids(instance_ids, class_ids, columns, n, PREPARED)
    same_instance, same_class = _same(instance, class_, other_instance, other_class, PREPARED)
    change -= tl.where(same_instance, positive_instance[:, None], 0.0)
    change -= tl.where(same_class, positive_class[:, None], 0.0)
    return change


@triton.jit
def _split_gradient(change, rows, columns, v_factor, n, GAIN: tl.constexpr, LOW: tl.constexpr, UNIMODAL: tl.constexpr):
    """The gradient of a tile's scores -> halves hi, lo for the product with the columns; 0 where no score counts."""
    allowed = (columns < n)[None, :]
    if UNIMODAL:
        allowed = allowed & (rows[:, None] != columns[None, :])
    change = tl.where(allowed, change, 0.0)
    if LOW:
        change = change * GAIN
    else:
        change = change * (v_factor * (1024.0 * GAIN))[None, :]
    hi = change.to(tl.float16)
    lo = (change - hi.to(tl.float32)).to(tl.float16)
    return hi, lo


@triton.jit
def _read_span(v, low_plane, span, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """Halves [BLOCK, BLOCK_D] of the prepared rows at v: hi, lo (not read unless LOW) from feature ``span`` on."""
    part = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, BLOCK_D)[None, :]
    hi = tl.load(v + span + part)
    if LOW:
        lo = tl.load(v + low_plane + span + part)
    else:
        lo = hi
    return hi, lo


@triton.jit
def _through_normalisation(
    gradient,
    projection,
    gain,
    u,
    u_stride,
    u_scales,
    first_row,
    span,
    n,
    padded,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    PREPARED: tl.constexpr,
    LOW: tl.constexpr,
):
    """The gradient of rows of length 1 (times 1 / ``gain``), of which ``projection`` is the part along the row ->
    that of the rows as they are."""
    if PREPARED:
        rows = first_row + tl.arange(0, BLOCK)
        inverse = tl.load(u_scales + padded + rows)
        hi, lo = _read_span(u, padded.to(tl.int64) * WIDTH, span, BLOCK, BLOCK_D, WIDTH, LOW)
        unit = hi.to(tl.float32)
        if LOW:
            unit = (unit + lo.to(tl.float32)) * (1.0 / 1024.0)
        else:
            unit = unit * tl.load(u_scales + rows)[:, None]
    else:
        unit = _read_rows(u, u_stride, first_row, n, D, BLOCK, BLOCK_D)
        inverse = _inverse_length(tl.sum(unit * unit, axis=1))
        unit = unit * inverse[:, None]
    # (g - (g x^) x^) / |x|
    return (gradient - projection[:, None] * unit) * (inverse * gain)[:, None]


@triton.jit(do_not_specialize=["n", "padded", "width", "first"])
def _backward_kernel(
    x0,  # as in forward
    x1,
    x2,
    stride0,
    stride1,
    stride2,
    scales,
    instance_ids,
    class_ids,
    teacher_rows,  # [n], not 0 for a teacher's row; read if TEACHER
    stats,
    instance_gradient,  # upstream, scalars in fp32
    class_gradient,
    out0,  # gradients [n, D] of the modalities ``first``, ``first`` + 1 and ``first`` + 2
    out1,
    out2,
    n,
    padded,
    width,  # WIDTH: as a constant the loop over it would be unrolled, its addresses kept in registers
    first,
    scale,
    inverse_temperature,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    PREPARED: tl.constexpr,
    LOW: tl.constexpr,
    TEACHER: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    AVERAGE: tl.constexpr,
    UNIMODAL: tl.constexpr,
):
    """Grid (blocks of rows, modalities, spans of BLOCK_D features): the gradient of a block of rows of one modality."""
    pairs: tl.constexpr = M if UNIMODAL else M * (M - 1) // 2
    directions: tl.constexpr = 2 * pairs if SYMMETRIC and not UNIMODAL else pairs
    # of the gradients of the scores, so that they fill the range of fp16
    GAIN: tl.constexpr = 4096.0
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    i = first + tl.program_id(1)
    span = tl.program_id(2) * BLOCK_D
    size = n.to(tl.float32)
    low_plane = padded.to(tl.int64) * WIDTH
    u, u_stride = _modality(i, x0, x1, x2, stride0, stride1, stride2, padded, WIDTH, PREPARED, LOW)
    u += first_row.to(tl.int64) * u_stride
    u_scales = scales + i * 2 * padded
    uh, ul, factor = _own_rows(u, u_stride, u_scales, first_row, n, D, BLOCK_M, BLOCK_D, PREPARED, LOW)

    # the gradients of the two terms; a common factor is taken out of everything and put back at the end
    counts = stats + directions * n
    rest = counts + (2 + 2 * pairs) * n
    rows_instance = tl.load(rest)
    rows_class = tl.load(rest + 1)
    gradient_instance, gradient_class, largest = _upstream(
        instance_gradient, class_gradient, rows_instance, rows_class, size, directions, AVERAGE
    )
    gradient_instance = gradient_instance / largest
    gradient_class = gradient_class / largest

    row_weight, positive_instance, positive_class = _weights_of_rows(
        counts, rows, n, rows_instance, rows_class, gradient_instance, gradient_class, size, AVERAGE
    )
    both: tl.constexpr = 2.0 if SYMMETRIC or UNIMODAL else 1.0
    positive_instance = positive_instance * both
    positive_class = positive_class * both
    uniform: tl.constexpr = AVERAGE and not UNIMODAL  # whether all rows' log-sum-exps have the same weight
    if uniform:
        row_weight = (gradient_instance + gradient_class) / size
    instance, class_ = _read_ids(instance_ids, class_ids, rows, n, PREPARED)

    end = n
    if TEACHER:
        teacher = tl.load(teacher_rows + rows, mask=rows < n, other=1)
        if tl.sum((teacher == 0).to(tl.int32), axis=0) == 0:
            end = n * 0  # nothing here has a gradient

    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)  # the part of the gradient along the row itself
    for number in range(1 if UNIMODAL else M - 1):
        j, row_direction, column_direction, row_end, column_end = _partner(i, number, n, M, SYMMETRIC, UNIMODAL)
        # a direction that does not exist has an infinite log-sum-exp: nothing comes through the exponential
        row_lse = tl.load(stats + row_direction * n + rows, mask=rows < row_end, other=float("inf"))
        v, v_stride = _modality(j, x0, x1, x2, stride0, stride1, stride2, padded, WIDTH, PREPARED, LOW)
        v_scales = scales + j * 2 * padded
        for start in range(0, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            products, scores, v_factor, vh, vl = _tile_scores(
                u, uh, ul, factor, v, v_stride, v_scales, start, n, padded, width, scale,
                D, BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, PREPARED, LOW,
            )  # fmt: skip
            column_lse = tl.load(stats + column_direction * n + columns, mask=columns < column_end, other=float("inf"))
            change = _through_lse(
                scores, row_lse, column_lse, row_weight, counts, columns, n, rows_instance, rows_class,
                gradient_instance, gradient_class, size, AVERAGE, uniform,
            )  # fmt: skip
            change = _less_positives(
                change, instance, class_, positive_instance, positive_class, instance_ids, class_ids, columns, n,
                PREPARED,
            )  # fmt: skip
            hi, lo = _split_gradient(change, rows, columns, v_factor, n, GAIN, LOW, UNIMODAL)
            # from the halves, since ptxas then needs fewer registers
            along += tl.sum((hi.to(tl.float32) + lo.to(tl.float32)) * products, axis=1)
            # Tensor cores round sums towards zero, which over thousands of tiles would add up: a tile's product is
            # formed on its own. (Were it one dot and not two or three, Triton would fold the addition into it.)
            if PREPARED:
                vh, vl = _read_span(v, low_plane, span, BLOCK_N, BLOCK_D, WIDTH, LOW)
            v += BLOCK_N * v_stride
            gradient += _product(hi, lo, vh, vl, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), True, LOW)

    gain = inverse_temperature / (1024.0 * GAIN)
    projection = along * (0.6931471805599453 / gain / GAIN)  # scores are in units of log 2
    if not LOW:
        projection = projection * (1.0 / 1024.0)
    gradient = _through_normalisation(
        gradient, projection, largest * gain, u, u_stride, u_scales, first_row, span, n, padded,
        D, BLOCK_M, BLOCK_D, WIDTH, PREPARED, LOW,
    )  # fmt: skip
    if TEACHER:
        teacher = tl.load(teacher_rows + rows, mask=rows < n, other=1) != 0
        gradient = tl.where(teacher[:, None], 0.0, gradient)
    d = tl.arange(0, BLOCK_D)
    out = _choose(i - first, out0, out1, out2) + (first_row.to(tl.int64) * D + span)
    tl.store(
        out + (tl.arange(0, BLOCK_M)[:, None] * D + d[None, :]),
        gradient.to(out0.dtype.element_ty),
        mask=(rows < n)[:, None] & (span + d < D)[None, :],
    )


class Options(NamedTuple):
    """The operation's own arguments, the same in forward and backward."""

    temperature: float
    symmetric: bool
    average_class: bool
    unimodal: bool


class Tiles(NamedTuple):
    """A kernel's blocks: ``rows`` of one modality against ``columns`` rows of the other, ``step`` features at a time;
    in backward a program owns the gradient of ``span`` features."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int
    span: int = 0


class Plan(NamedTuple):
    """What follows from sizes, types and GPU alone."""

    prepared: bool
    low: bool  # whether rows are split into two halves
    width: int  # D filled up
    forward: Tiles
    backward: Tiles


# Up to here a launch saved is worth more than the work that programs do over again.
_DIRECT_ROWS = 512
_DIRECT_WIDTH = 256
_DIRECT_MODALITIES = 3
_SHORT_CODE_ROWS = 1 << 16
_PADDING = 128  # prepared memory has a multiple of as many rows
_PREPARE_ROWS = 16
_IDENTIFY = (64, 32)
_REDUCE_ROWS = 1024
# Up to here scores stay far enough above their bound for their exponentials to be summed without a running maximum.
_LARGEST_INVERSE_TEMPERATURE = 40.0


@functools.lru_cache(maxsize=64)
def plan(prepared: bool, width: int, low: bool, capability: int) -> Plan:
    """Blocks for modalities of up to ``width`` features on a GPU of this compute capability (90 for 9.0). Before 80
    rows are prepared in any case. With these blocks no kernel spills registers."""
    # before sm_80 operands of 256 features do not fit into registers, however small the tile is
    if not prepared and capability >= 80:
        width = max(16, next_power_of_2(width))
        return Plan(False, low, width, Tiles(16, 32, width, 4, 1), Tiles(16, 32, width, 8, 1, width))
    width = 64 if width <= 64 else 128 * -(-width // 128)
    if capability < 80:  # no asynchronous copies
        return Plan(True, low, width, Tiles(64, 64, 32, 8, 1), Tiles(64, 32, 32, 8, 1, 64))
    # Hopper's and Blackwell's tensor cores read their operands from shared memory, of which there are 227 KiB, others
    # from registers, and have 99 KiB or more.
    if 90 <= capability < 100:
        return Plan(True, low, width, Tiles(128, 128, 64, 8, 3), Tiles(128, 64, 64, 8, 3, min(128, width)))
    if 100 <= capability < 120:
        # 64 columns in backward want more tensor memory than there is, for which Triton 3.6 leaves nothing but a trap
        return Plan(True, low, width, Tiles(128, 64, 64, 8, 3), Tiles(128, 32, 64, 8, 3, min(128, width)))
    return Plan(True, low, width, Tiles(128, 128, 32 if low else 64, 8, 3), Tiles(128, 64, 32, 8, 3, 64))


@functools.lru_cache(maxsize=16)
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _plan(modalities: Sequence[Tensor]) -> Plan:
    first = modalities[0]
    alike = all(m.shape[1] == first.shape[1] and m.dtype == first.dtype for m in modalities)
    few = first.shape[0] <= _DIRECT_ROWS and len(modalities) <= _DIRECT_MODALITIES
    # at width 1 Triton would make constants of the strides
    direct = alike and few and 1 < first.shape[1] <= _DIRECT_WIDTH
    width = max([m.shape[1] for m in modalities])
    low = torch.float32 in [m.dtype for m in modalities]
    return plan(not direct, width, low, _capability(first.device))


def _pairs(count: int, options: Options) -> tuple[int, int]:
    """Pairs of modalities, and directions."""
    pairs = count if options.unimodal else count * (count - 1) // 2
    return pairs, 2 * pairs if options.symmetric and not options.unimodal else pairs


def _prepare(modalities: Sequence[Tensor], chosen: Plan) -> tuple[Tensor, Tensor, int]:
    """Scaled and split rows [M, 1 or 2, padded, width] fp16, their factors and inverse lengths [M, 2, padded] fp32."""
    first = modalities[0]
    n, count = first.shape[0], len(modalities)
    padded = -(-n // _PADDING) * _PADDING
    halves = torch.empty(
        (count, 2 if chosen.low else 1, padded, chosen.width), dtype=torch.float16, device=first.device
    )
    scales = torch.empty((count, 2, padded), dtype=torch.float32, device=first.device)
    for i, m in enumerate(modalities):
        launch(
            _prepare_kernel,
            (padded // _PREPARE_ROWS,),
            m,
            halves[i],
            scales[i],
            n,
            m.stride(0),
            padded,
            D=m.shape[1],
            WIDTH=chosen.width,
            BLOCK=_PREPARE_ROWS,
            BLOCK_D=min(128, chosen.width),
            LOW=chosen.low,
            num_warps=4,
            num_stages=1,
        )
    return halves, scales, padded


def _sources(modalities: Sequence[Tensor], chosen: Plan) -> tuple[tuple[Any, ...], Tensor, int]:
    """What the kernels read the rows from: three tensors and their strides, factors, and rows in padded memory."""
    if chosen.prepared:
        halves, scales, padded = _prepare(modalities, chosen)
        return (halves, halves, halves, 0, 0, 0), scales, padded
    a, b, c = modalities[0], modalities[min(1, len(modalities) - 1)], modalities[-1]
    return (a, b, c, a.stride(0), b.stride(0), c.stride(0)), a, 0


def _rows_contiguous(x: Tensor) -> Tensor:
    """As it is where a row's values lie side by side, however far apart rows are; else a contiguous copy."""
    return x if x.stride(1) == 1 and x.stride(0) != 1 else x.contiguous()


def forward(
    modalities: Sequence[Tensor], instance_ids: Tensor, class_ids: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Instance term and class term (fp32 scalars), and what backward needs: the codes of the rows' ids where rows are
    prepared, and the statistics."""
    modalities = [_rows_contiguous(m) for m in modalities]
    instance_ids, class_ids = instance_ids.contiguous(), class_ids.contiguous()
    first = modalities[0]
    n, count, device = first.shape[0], len(modalities), first.device
    chosen = _plan(modalities)
    pairs, directions = _pairs(count, options)
    stats = torch.empty((directions + 2 + 2 * pairs) * n + 2, dtype=torch.float32, device=device)
    sources, scales, padded = _sources(modalities, chosen)
    codes = None
    if chosen.prepared:
        codes = torch.empty(n, dtype=torch.int32 if n <= _SHORT_CODE_ROWS else torch.int64, device=device)
        launch(
            _identify_kernel,
            (triton.cdiv(n, _IDENTIFY[0]),),
            instance_ids,
            class_ids,
            codes,
            stats[directions * n :],
            n,
            BLOCK_M=_IDENTIFY[0],
            BLOCK_N=_IDENTIFY[1],
            UNIMODAL=options.unimodal,
            num_warps=4,
            num_stages=1,
        )
        instance_ids = class_ids = codes
    tiles = chosen.forward
    launch(
        _forward_kernel,
        (triton.cdiv(n, tiles.rows), directions + (0 if chosen.prepared else 1)),
        *sources,
        scales,
        instance_ids,
        class_ids,
        stats,
        n,
        padded,
        1.4426950408889634 / options.temperature,
        1.4426950408889634 / options.temperature * (1 + 1e-5),
        M=count,
        D=first.shape[1],
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_D=tiles.step,
        WIDTH=chosen.width,
        PREPARED=chosen.prepared,
        LOW=chosen.low,
        ONLINE=1 / options.temperature > _LARGEST_INVERSE_TEMPERATURE,
        SYMMETRIC=options.symmetric,
        UNIMODAL=options.unimodal,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    instance = torch.empty((), dtype=torch.float32, device=device)
    class_ = torch.empty((), dtype=torch.float32, device=device)
    launch(
        _reduce_kernel,
        (1,),
        stats,
        instance,
        class_,
        n,
        PAIRS=pairs,
        DIRECTIONS=directions,
        AVERAGE=options.average_class,
        BLOCK=_REDUCE_ROWS if n > 256 else 256,
        num_warps=4,
        num_stages=1,
    )
    return instance, class_, codes, stats


def backward(
    gradients: Sequence[Tensor],
    modalities: Sequence[Tensor],
    instance_ids: Tensor,
    class_ids: Tensor,
    teacher_rows: Tensor | None,
    codes: Tensor | None,
    stats: Tensor,
    options: Options,
) -> list[Tensor]:
    """Gradients of the modalities from those of the two terms."""
    out = [torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in modalities]
    modalities = [_rows_contiguous(m) for m in modalities]
    instance_ids, class_ids = (instance_ids.contiguous(), class_ids.contiguous()) if codes is None else (codes, codes)
    n, count = modalities[0].shape[0], len(modalities)
    chosen = _plan(modalities)
    sources, scales, padded = _sources(modalities, chosen)
    tiles = chosen.backward
    # one launch, unless the modalities' gradients cannot be told apart by three pointers of one type
    alike = len({(m.dtype, m.shape[1]) for m in modalities}) == 1
    group = count if alike and count <= 3 else 1
    for first in range(0, count, group):
        last = min(first + group, count) - 1
        launch(
            _backward_kernel,
            (
                triton.cdiv(n, tiles.rows),
                group,
                triton.cdiv(modalities[first].shape[1], tiles.span) or 1,
            ),
            *sources,
            scales,
            instance_ids,
            class_ids,
            instance_ids if teacher_rows is None else teacher_rows.contiguous(),
            stats,
            *gradients,
            out[first],
            out[min(first + 1, last)],
            out[last],
            n,
            padded,
            chosen.width,
            first,
            1.4426950408889634 / options.temperature,
            1.0 / options.temperature,
            M=count,
            D=modalities[first].shape[1],
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.columns,
            BLOCK_K=tiles.step,
            BLOCK_D=tiles.span,
            WIDTH=chosen.width,
            PREPARED=chosen.prepared,
            LOW=chosen.low,
            TEACHER=teacher_rows is not None,
            SYMMETRIC=options.symmetric,
            AVERAGE=options.average_class,
            UNIMODAL=options.unimodal,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out


_ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
_POINTERS = {"scales": "*fp32", "instance_ids": "*i64", "class_ids": "*i64", "stats": "*fp32"}


def aot_cases() -> list[AotCase]:
    """Every kernel as it is launched at the paper's size and at large ones, for each GPU's own blocks."""
    cases: list[AotCase] = []
    shared = {"SYMMETRIC": True, "UNIMODAL": False}
    variants: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        (" one way", {"SYMMETRIC": False, "AVERAGE": False}),
        (" unimodal", {"UNIMODAL": True}),
        (" cold", {"ONLINE": True}),
    ]
    for n, width, count, dtypes in (
        (128, 256, 3, (torch.float32, torch.float16, torch.bfloat16)),
        (128, 64, 2, (torch.float32,)),
        (32768, 64, 3, (torch.float32,)),
        (32768, 256, 3, (torch.float32, torch.float16, torch.bfloat16)),
        (32768, 512, 3, (torch.float32,)),
    ):
        for dtype in dtypes:
            plans: dict[Plan, list[int]] = {}
            for architecture in _ARCHITECTURES:
                found = plan(n > _DIRECT_ROWS, width, dtype == torch.float32, architecture)
                if found.prepared == (n > _DIRECT_ROWS):  # else few rows take what many do
                    plans.setdefault(found, []).append(architecture)
            for chosen, architectures in plans.items():
                for name, changes in variants if width == 256 and dtype == torch.float32 else variants[:1]:
                    settings = f"n {n}, D {width}, M {count}, {torch_to_triton(dtype)}{name}"
                    constants = {**shared, "M": count, "D": width, **changes}
                    cases += _main_cases(chosen, dtype, constants, settings, tuple(architectures))
            if chosen.prepared:
                cases.append(_prepare_case(width, dtype, chosen))
    cases += _small_cases()
    return cases


def _main_cases(
    chosen: Plan, dtype: torch.dtype, constants: dict[str, Any], settings: str, architectures: tuple[int, ...]
) -> list[AotCase]:
    """The forward and the backward kernel."""
    kind = "fp16" if chosen.prepared else torch_to_triton(dtype)
    sources = {f"x{i}": f"*{kind}" for i in range(3)}
    strides = {f"stride{i}": "i32" for i in range(3)}
    pointers = dict(_POINTERS)
    if chosen.prepared:
        pointers |= {"instance_ids": "*i32", "class_ids": "*i32"}
    average, online = constants.pop("AVERAGE", True), constants.pop("ONLINE", False)
    aligned = (*sources, *strides, *_POINTERS)
    common = {**constants, "WIDTH": chosen.width, "PREPARED": chosen.prepared, "LOW": chosen.low}
    if len(architectures) < len(_ARCHITECTURES):
        settings += ", sm " + " ".join(map(str, architectures))
    f, b = chosen.forward, chosen.backward
    return [
        AotCase(
            "forward",
            _forward_kernel,
            {**sources, **strides, **pointers, "n": "i32", "padded": "i32", "scale": "fp32", "bound": "fp32"},
            {**common, "BLOCK_M": f.rows, "BLOCK_N": f.columns, "BLOCK_D": f.step, "ONLINE": online},
            aligned,
            f.num_warps,
            f.num_stages,
            settings,
            architectures,
        ),
        AotCase(
            "backward",
            _backward_kernel,
            {
                **sources,
                **strides,
                **pointers,
                "teacher_rows": "*i1",
                **{f"{name}_gradient": "*fp32" for name in ("instance", "class")},
                **{f"out{i}": f"*{torch_to_triton(dtype)}" for i in range(3)},
                **dict.fromkeys(("n", "padded", "width", "first"), "i32"),
                **dict.fromkeys(("scale", "inverse_temperature"), "fp32"),
            },
            {
                **common,
                "BLOCK_M": b.rows,
                "BLOCK_N": b.columns,
                "BLOCK_K": b.step,
                "BLOCK_D": b.span,
                "TEACHER": True,
                "AVERAGE": average,
            },
            (*aligned, "teacher_rows", "out0", "out1", "out2"),
            b.num_warps,
            b.num_stages,
            settings,
            architectures,
        ),
    ]


def _prepare_case(width: int, dtype: torch.dtype, chosen: Plan) -> AotCase:
    return AotCase(
        "prepare",
        _prepare_kernel,
        {
            "x": f"*{torch_to_triton(dtype)}",
            "halves": "*fp16",
            "scales": "*fp32",
            **dict.fromkeys(("n", "stride", "padded"), "i32"),
        },
        {
            "D": width,
            "WIDTH": chosen.width,
            "BLOCK": _PREPARE_ROWS,
            "BLOCK_D": min(128, chosen.width),
            "LOW": chosen.low,
        },
        ("x", "halves", "scales", "stride"),
        4,
        1,
        f"D {width}, {torch_to_triton(dtype)}",
    )


def _small_cases() -> list[AotCase]:
    """The kernels that see ids and statistics alone."""
    cases = [
        AotCase(
            "identify",
            _identify_kernel,
            {"instance_ids": "*i64", "class_ids": "*i64", "codes": code, "counts": "*fp32", "n": "i32"},
            {"BLOCK_M": _IDENTIFY[0], "BLOCK_N": _IDENTIFY[1], "UNIMODAL": unimodal},
            ("instance_ids", "class_ids", "codes"),
            4,
            1,
            f"{code[1:]} codes" + (" unimodal" if unimodal else ""),
        )
        for code, unimodal in (("*i32", False), ("*i64", True))
    ]
    for pairs, directions, average, block in ((3, 6, True, 256), (3, 6, True, _REDUCE_ROWS), (1, 1, False, 256)):
        cases.append(
            AotCase(
                "reduce",
                _reduce_kernel,
                {
                    "stats": "*fp32",
                    **{f"{name}_out": "*fp32" for name in ("instance", "class")},
                    "n": "i32",
                },
                {"PAIRS": pairs, "DIRECTIONS": directions, "AVERAGE": average, "BLOCK": block},
                ("stats",),
                4,
                1,
                f"{directions} directions, blocks of {block}" + ("" if average else ", unnormalised"),
            )
        )
    return cases

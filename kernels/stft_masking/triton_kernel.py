"""Triton kernels of the STFT masking path, and what launches them. README.md tells the maths.

Shapes: B mixtures, N sources, L samples, T frames, F log-frequency rows, ``bins`` = n_fft/2 + 1. Spectra lie frame by
frame, [.., T, bins], as the FFT leaves them, and are read as pairs of reals. The launchers trust their input: ``op.py``
checks it.

``taps`` is one int32 vector that says how R rows are read from S rows: ``[low (R) | fraction, fp32 bits (R) |
first (S + 1)]``. Row r is (1 - fraction) x[low] + fraction x[low + 1], where rows outside 0..S-1 are zeros, and
``first[s]`` counts the rows with ``low < s``: the rows that read from a range of s are a range as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from avsep.kernels._triton import AotCase, launch, next_power_of_2, torch_to_triton

__all__ = [
    "aot_cases",
    "configuration",
    "frame",
    "fused_analysis",
    "fused_masking",
    "logits_gradient",
    "overlap_add",
    "overlap_add_backward",
]


class Configuration(NamedTuple):
    """How one kernel is built: its constants (sizes, options, tiles), its warps and its pipeline stages."""

    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


def configuration(
    kernel: str, *, n_fft: int, hop: int = 0, sources: int = 1, align_corners: bool = True, **options: bool
) -> Configuration:
    """The configuration of ``frame``, ``analysis``, ``masking``, ``overlap_add`` or ``logits_gradient``.

    Tiles of 32 frames make full cache lines (128 bytes) of what is laid out along time, and 64 bins (256 or 512 bytes)
    of what is laid out along frequency.
    """
    if kernel == "frame":
        tile = {"TT": 2 if options["NORMALISE"] else 4, "KB": min(1024, next_power_of_2(n_fft))}
        return Configuration({"N_FFT": n_fft, "HOP": hop, **options, **tile})
    if kernel == "overlap_add":
        return Configuration({"N_FFT": n_fft, "HOP": hop, "SB": 1024}, num_warps=8)
    common = {"N": sources, "BINS": n_fft // 2 + 1, "ALIGNED": align_corners}
    together = next_power_of_2(sources)
    if kernel == "analysis":
        tile = {"TT": 32 if together < 8 else 16, "CB": 64, "RB": 16 if together <= 2 else 8}
        return Configuration({**common, "NB": together, **tile})
    if kernel == "logits_gradient":
        kept = min(together, 8)  # in registers
        tile = {"TT": 32, "RB": 16 if kept <= 2 else 8}
        return Configuration({**common, "NB": kept, **tile}, num_warps=4 if kept < 8 else 8)
    # as released, four values are read for one, and need more registers
    return Configuration({**common, "UNROLL": sources <= 2, "TT": 32, "KB": 32}, num_warps=4 if align_corners else 8)


# ---------------------------------------------------------------- pieces


@triton.jit
def _time_tap(t, frames):
    """Where frame t reads time as released: the frame t0 = t or t - 1, and the fraction of t0 + 1.

    Position t T / (T - 1) - 1/2, in a form that is exact however long the signal is.
    """
    later = 2 * t > frames - 1
    u = t.to(tl.float32) / tl.maximum(frames - 1.0, 1.0)
    return tl.where(later, t, t - 1), tl.where(later, u - 0.5, u + 0.5)


@triton.jit
def _log1p(x):
    """Accurate at both ends: for large x, log(1 + x); else with the rounding of 1 + x made good."""
    u = 1.0 + x
    lost = x - (u - 1.0)
    return tl.where(u - 1.0 == x, tl.log(u), tl.log(u) + lost / u)


@triton.jit
def _mask(logits, taps, k, t, rows, frames, inside, BINS: tl.constexpr, ALIGNED: tl.constexpr):
    """sigmoid(logits), back on linear frequency: one source's logits [rows, frames] -> [TT, KB] at frames t, bins k.

    ``inside`` is [KB, TT]: made with time last, along which the logits lie, and turned at the end.
    """
    low = tl.load(taps + k, mask=k < BINS, other=0)
    fraction = tl.load(taps + BINS + k, mask=k < BINS, other=0).to(tl.float32, bitcast=True)
    t0 = t
    if not ALIGNED:
        t0, time_fraction = _time_tap(t, frames)
    mask = tl.zeros(inside.shape, tl.float32)
    for tap in tl.static_range(2 if ALIGNED else 4):
        row = low + (tap % 2)
        weight = (fraction if tap % 2 == 1 else 1.0 - fraction)[:, None]
        known = inside & ((row >= 0) & (row < rows))[:, None]
        at = t0
        if not ALIGNED:
            at = t0 + (tap // 2)
            known = known & ((at >= 0) & (at < frames))[None, :]
            weight = weight * (time_fraction if tap // 2 == 1 else 1.0 - time_fraction)[None, :]
        x = tl.load(logits + (row[:, None] * frames + at[None, :]), mask=known, other=0.0).to(tl.float32)
        mask += tl.where(known, weight / (1.0 + tl.exp(-x)), 0.0)
    return tl.trans(mask)


# ---------------------------------------------------------------- waveforms to frames


@triton.jit
def _frame_kernel(
    signal,  # [B, N, samples] with strides
    window,  # [N_FFT]
    out,  # [B, N, T, N_FFT]
    stride_b,
    stride_n,
    stride_l,
    sources,
    samples,
    frames,
    time_tiles,
    N_FFT: tl.constexpr,
    HOP: tl.constexpr,
    REFLECT: tl.constexpr,
    NORMALISE: tl.constexpr,  # divide each sample by the sum of the squared windows over it
    TT: tl.constexpr,
    KB: tl.constexpr,
):
    column_tiles: tl.constexpr = (N_FFT + KB - 1) // KB
    pid = tl.program_id(0)
    columns = pid % column_tiles
    pid = pid // column_tiles
    tile = pid % time_tiles
    m = (pid // time_tiles).to(tl.int64)
    t = tile * TT + tl.arange(0, TT)  # [TT]
    k = columns * KB + tl.arange(0, KB)  # [KB]
    w = tl.load(window + k, mask=k < N_FFT, other=0.0)
    j = (t * HOP)[:, None] + k[None, :] - N_FFT // 2  # [TT, KB] sample
    inside = (t < frames)[:, None] & (k < N_FFT)[None, :]
    source = signal + (m // sources) * stride_b + (m % sources) * stride_n
    if REFLECT:
        at = tl.where(j < 0, -j, j)
        at = tl.where(at >= samples, 2 * (samples - 1) - at, at)
        x = tl.load(source + at.to(tl.int64) * stride_l, mask=inside, other=0.0).to(tl.float32)
    else:
        known = inside & (j >= 0) & (j < samples)
        x = tl.load(source + j.to(tl.int64) * stride_l, mask=known, other=0.0).to(tl.float32)
    if NORMALISE:
        # Frame t + k // HOP - r covers this sample too, at its own sample k % HOP + r HOP.
        total = tl.zeros((TT, KB), tl.float32)
        for r in tl.static_range((N_FFT + HOP - 1) // HOP):
            other = k % HOP + r * HOP
            v = tl.load(window + other, mask=other < N_FFT, other=0.0)
            covers = t[:, None] + (k // HOP - r)[None, :]
            total += tl.where((covers >= 0) & (covers < frames), (v * v)[None, :], 0.0)
        x = tl.where(total > 1e-11, x / total, 0.0)
    first = out + (m * frames + tile * TT) * N_FFT
    offset = tl.arange(0, TT)[:, None] * N_FFT + k[None, :]
    tl.store(first + offset, x * w[None, :], mask=inside)


# ---------------------------------------------------------------- spectra to everything training needs


@triton.jit
def _read_at(
    tap: tl.constexpr,
    low,  # [RB]
    fraction,  # [RB]
    inside_r,  # [RB]
    t0,  # [TT]
    time_fraction,  # [TT]
    inside_t,  # [TT]
    start,
    frames,
    BINS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The offset of tap 0 or 1 (or as released, of 0 to 3) from the tile's first frame, and its weight; [TT, RB]."""
    bin_ = low + (tap % 2)
    weight = (fraction if tap % 2 == 1 else 1.0 - fraction)[None, :]
    known = inside_t[:, None] & (inside_r & (bin_ >= 0) & (bin_ < BINS))[None, :]
    at = t0
    if not ALIGNED:
        at = t0 + (tap // 2)
        known = known & ((at >= 0) & (at < frames))[:, None]
        weight = weight * (time_fraction if tap // 2 == 1 else 1.0 - time_fraction)[:, None]
    offset = (at - start)[:, None] * (2 * BINS) + bin_[None, :] * 2
    return offset, tl.where(known, weight, 0.0), known


@triton.jit
def _analysis_kernel(
    spectra,  # [B, N, T, BINS, 2]
    taps,  # linear to log frequency: [2 rows + BINS + 1]
    network_input,  # [B, 1, rows, T]
    weight,  # [B, 1, rows, T]
    ratio,  # [B, N, rows, T]
    mixture,  # [B, T, BINS, 2]
    rows,
    frames,
    time_tiles,
    N: tl.constexpr,
    NB: tl.constexpr,  # sources in a tile: N, rounded up to a power of two
    BINS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TT: tl.constexpr,
    CB: tl.constexpr,
    RB: tl.constexpr,
):
    chunks: tl.constexpr = (BINS + CB - 1) // CB
    pid = tl.program_id(0)
    chunk = pid % chunks
    pid = pid // chunks
    tile = pid % time_tiles
    b = (pid // time_tiles).to(tl.int64)
    start = tile * TT
    frame = tl.arange(0, TT)  # [TT], relative to the tile
    t = start + frame
    inside_t = t < frames
    stride = tl.full((), 2 * BINS, tl.int64) * frames  # of a source
    plane = tl.full((), 1, tl.int64) * rows * frames
    here = spectra + b * N * stride + start.to(tl.int64) * (2 * BINS)

    # The mixture's spectrum is the sum of the sources'.
    c = chunk * (2 * CB) + tl.arange(0, 2 * CB)  # [2 CB] reals
    block = frame[:, None] * (2 * BINS) + c[None, :]
    inside_block = inside_t[:, None] & (c < 2 * BINS)[None, :]
    total = tl.load(here + block, mask=inside_block, other=0.0)
    for n in tl.static_range(1, N):
        total += tl.load(here + n * stride + block, mask=inside_block, other=0.0)
    tl.store(mixture + (b * frames + start) * (2 * BINS) + block, total, mask=inside_block)

    # The rows that start in these bins: what they read is in the L1 cache by now.
    first = taps + 2 * rows
    row_start = tl.load(first + chunk * CB, mask=chunk > 0, other=0)
    row_end = tl.load(first + tl.minimum((chunk + 1) * CB, BINS))
    t0 = t
    time_fraction = tl.zeros((TT,), tl.float32)
    if not ALIGNED:
        t0, time_fraction = _time_tap(t, frames)
    pair = tl.arange(0, 2)
    for r in range(row_start, row_end, RB):
        row = r + tl.arange(0, RB)  # [RB]
        inside_r = row < row_end
        inside = inside_t[:, None] & inside_r[None, :]
        low = tl.load(taps + row, mask=inside_r, other=0)
        fraction = tl.load(taps + rows + row, mask=inside_r, other=0).to(tl.float32, bitcast=True)
        out = row[None, :] * frames + t[:, None]  # [TT, RB]
        x = tl.zeros((TT, RB), tl.float32)
        source = tl.arange(0, NB)
        inside_n = (source < N)[:, None, None]
        at_n = here + (source.to(tl.int64) * stride)[:, None, None, None]
        s = tl.zeros((NB, TT, RB), tl.float32)
        for tap in tl.static_range(2 if ALIGNED else 4):
            offset, w, known = _read_at(
                tap, low, fraction, inside_r, t0, time_fraction, inside_t, start, frames, BINS, ALIGNED
            )
            both = tl.load(
                at_n + (offset[None, :, :, None] + pair[None, None, None, :]),
                mask=(inside_n & known[None, :, :])[:, :, :, None],
                other=0.0,
            )  # [NB, TT, RB, 2]
            re, im = tl.split(both)
            s += w[None, :, :] * tl.sqrt(re * re + im * im)
            mix_re = tl.sum(re, axis=0)
            mix_im = tl.sum(im, axis=0)
            x += w * (tl.sqrt(mix_re * mix_re + mix_im * mix_im) + 1e-10)
        q = s / x[None, :, :]
        q = tl.where(q > 5.0, 5.0, q)  # keeps NaN; never below zero
        ratio_n = ratio + ((b * N + source) * plane)[:, None, None]
        tl.store(ratio_n + out[None, :, :], q, mask=inside_n & inside[None, :, :])
        value = _log1p(x)
        level = tl.where(value < 1e-3, 1e-3, tl.where(value > 10.0, 10.0, value))  # keeps NaN
        tl.store(network_input + b * plane + out, value, mask=inside)
        tl.store(weight + b * plane + out, level, mask=inside)


# ---------------------------------------------------------------- logits to estimates, and the way back


@triton.jit
def _masking_kernel(
    logits,  # [B, N, rows, T]
    mixture,  # complex [B, BINS, T] as pairs, with strides in complex numbers
    taps,  # log to linear frequency: [2 BINS + rows + 1]
    hartley,  # [B, N, T, 2 (BINS - 1)]
    stride_b,
    stride_k,
    stride_t,
    rows,
    frames,
    time_tiles,
    N: tl.constexpr,
    BINS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
    TT: tl.constexpr,
    KB: tl.constexpr,
):
    chunks: tl.constexpr = (BINS + KB - 1) // KB
    pid = tl.program_id(0)
    chunk = pid % chunks
    pid = pid // chunks
    tile = pid % time_tiles
    b = (pid // time_tiles).to(tl.int64)
    t = tile * TT + tl.arange(0, TT)  # [TT]
    k = chunk * KB + tl.arange(0, KB)  # [KB]
    inside = (t < frames)[:, None] & (k < BINS)[None, :]
    at = mixture + 2 * (b * stride_b + (tile * TT).to(tl.int64) * stride_t)
    offset = 2 * (tl.arange(0, TT)[:, None] * stride_t + k[None, :] * stride_k)
    pairs = tl.load(
        at + (offset[:, :, None] + tl.arange(0, 2)[None, None, :]), mask=inside[:, :, None], other=0.0
    )  # [TT, KB, 2]
    re, im = tl.split(pairs)
    inner = (k > 0) & (k < BINS - 1)
    im = tl.where(inner[None, :], im, 0.0)  # a real signal has no imaginary part there: irfft ignores it
    forward = re - im
    backward = re + im
    plane = tl.full((), 1, tl.int64) * rows * frames
    width: tl.constexpr = 2 * (BINS - 1)
    source = tl.full((), width, tl.int64) * frames  # from one source to the next
    out = tl.arange(0, TT)[:, None] * width + k[None, :]
    mirrored = tl.arange(0, TT)[:, None] * width + (width - k)[None, :]
    here = hartley + (b * N * frames + tile * TT) * width
    inside_mask = (k < BINS)[:, None] & (t < frames)[None, :]  # [KB, TT]
    if UNROLL:
        for n in tl.static_range(N):
            mask = _mask(logits + (b * N + n) * plane, taps, k, t, rows, frames, inside_mask, BINS, ALIGNED)
            tl.store(here + n * source + out, mask * forward, mask=inside)
            tl.store(here + n * source + mirrored, mask * backward, mask=inside & inner[None, :])
    else:
        for n in range(N):
            mask = _mask(logits + (b * N + n) * plane, taps, k, t, rows, frames, inside_mask, BINS, ALIGNED)
            tl.store(here + n * source + out, mask * forward, mask=inside)
            tl.store(here + n * source + mirrored, mask * backward, mask=inside & inner[None, :])


# Were the length known to divide by 16, the stores would take four samples a thread, and their layout, in which the
# window is read with gaps, would spread over the whole kernel.
@triton.jit(do_not_specialize=["length"])
def _overlap_add_kernel(
    spectra,  # [M, T, N_FFT/2+1, 2]: rfft of what the masking kernel wrote
    window,  # [N_FFT]
    out,  # [M, length]
    length,
    frames,
    tiles,
    N_FFT: tl.constexpr,
    HOP: tl.constexpr,
    SB: tl.constexpr,
):
    bins: tl.constexpr = N_FFT // 2 + 1
    reach: tl.constexpr = (N_FFT + HOP - 1) // HOP  # frames over one sample, at most
    pid = tl.program_id(0)
    tile = pid % tiles
    m = (pid // tiles).to(tl.int64)
    j = tile * SB + tl.arange(0, SB)  # [SB] sample
    p = j + N_FFT // 2  # in the padded signal, where frame t starts at t HOP
    last = p // HOP
    # frames counted from the first that this tile can touch, so that offsets stay small
    origin = (tile * SB + N_FFT // 2) // HOP - (reach - 1)
    here = spectra + (m * frames + origin) * (2 * bins)
    pair = tl.arange(0, 2)
    value = tl.zeros((SB,), tl.float32)
    envelope = tl.zeros((SB,), tl.float32)
    for r in tl.static_range(reach):
        t = last - r
        k = p - t * HOP
        known = (j < length) & (t >= 0) & (t < frames) & (k < N_FFT)
        mirrored = k > N_FFT // 2
        q = tl.where(mirrored, N_FFT - k, k)
        offset = (t - origin) * (2 * bins) + 2 * q
        both = tl.load(here + (offset[:, None] + pair[None, :]), mask=known[:, None], other=0.0)  # [SB, 2]
        re, im = tl.split(both)
        w = tl.load(window + k, mask=known, other=0.0)
        value += w * tl.where(mirrored, re + im, re - im)
        envelope += w * w
    # beyond the last frame there is nothing to divide
    tl.store(out + m * length + j, tl.where(envelope > 1e-11, value / envelope * (1.0 / N_FFT), 0.0), mask=j < length)


@triton.jit
def _logits_gradient_kernel(
    spectra,  # [B, N, T, BINS, 2]: rfft of the windowed gradient frames
    mixture,  # complex [B, BINS, T] as pairs, with strides in complex numbers
    logits,  # [B, N, rows, T]
    taps,  # log to linear frequency: [2 BINS + rows + 1]
    out,  # [B, N, rows, T]
    stride_b,
    stride_k,
    stride_t,
    rows,
    frames,
    time_tiles,
    row_tiles,
    N: tl.constexpr,
    NB: tl.constexpr,
    BINS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TT: tl.constexpr,
    RB: tl.constexpr,
):
    groups: tl.constexpr = (N + NB - 1) // NB
    pid = tl.program_id(0)
    group = pid % groups
    pid = pid // groups
    row_tile = pid % row_tiles
    pid = pid // row_tiles
    tile = pid % time_tiles
    b = (pid // time_tiles).to(tl.int64)
    start = tile * TT
    t = start + tl.arange(0, TT)  # [TT]
    row = row_tile * RB + tl.arange(0, RB)  # [RB]
    n = group * NB + tl.arange(0, NB)  # [NB]
    inside_r = row < rows
    # The bins with low == row - 1 and low == row read this row: one range.
    first = taps + 2 * BINS
    bin_start = tl.load(first + row - 1, mask=inside_r & (row > 0), other=0)
    bin_end = tl.load(first + row + 1, mask=inside_r, other=0)
    bin_start = tl.where(inside_r, bin_start, 0)
    longest = tl.max(bin_end - bin_start, axis=0)
    stride = tl.full((), 2 * BINS, tl.int64) * frames
    here = spectra + b * N * stride + start.to(tl.int64) * (2 * BINS)
    here_n = here + (n.to(tl.int64) * stride)[:, None, None, None]
    here_m = mixture + 2 * (b * stride_b + start.to(tl.int64) * stride_t)
    pair = tl.arange(0, 2)
    gradient = tl.zeros((NB, TT, RB), tl.float32)
    for i in range(longest):
        k = bin_start + i
        reads = inside_r & (k < bin_end)
        low = tl.load(taps + k, mask=reads, other=0)
        fraction = tl.load(taps + BINS + k, mask=reads, other=0).to(tl.float32, bitcast=True)
        inner = (k > 0) & (k < BINS - 1)
        # d waveform / d spectrum counts a bin twice, itself and its mirror image, but for the first and the last
        share = tl.where(low == row, 1.0 - fraction, fraction) * tl.where(
            inner, 2.0 / (2 * BINS - 2), 1.0 / (2 * BINS - 2)
        )
        for step in tl.static_range(1 if ALIGNED else 3):
            if ALIGNED:
                at = t
                share_t = tl.where(t < frames, 1.0, 0.0)
                known_t = t < frames
            else:
                # Which frames read frame t, in time as released: t - 1, t and t + 1 may.
                at = t + (step - 1)
                t0, time_fraction = _time_tap(at, frames)
                share_t = tl.where(t0 == t, 1.0 - time_fraction, 0.0) + tl.where(t0 + 1 == t, time_fraction, 0.0)
                known_t = (t < frames) & (at >= 0) & (at < frames) & ((t0 == t) | (t0 + 1 == t))
            known = known_t[:, None] & reads[None, :]  # [TT, RB]
            offset = (at - start)[:, None] * (2 * BINS) + 2 * k[None, :]
            g = tl.load(
                here_n + (offset[None, :, :, None] + pair[None, None, None, :]),
                mask=(n < N)[:, None, None, None] & known[None, :, :, None],
                other=0.0,
            )  # [NB, TT, RB, 2]
            offset_m = 2 * ((at - start)[:, None] * stride_t + k[None, :] * stride_k)
            m = tl.load(here_m + (offset_m[:, :, None] + pair[None, None, :]), mask=known[:, :, None], other=0.0)
            g_re, g_im = tl.split(g)
            m_re, m_im = tl.split(m)
            m_im = tl.where(inner[None, :], m_im, 0.0)
            factor = tl.where(known, share_t[:, None] * share[None, :], 0.0)
            gradient += (g_re * m_re[None, :, :] + g_im * m_im[None, :, :]) * factor[None, :, :]
    inside = (n < N)[:, None, None] & ((t < frames)[:, None] & inside_r[None, :])[None, :, :]
    plane = tl.full((), 1, tl.int64) * rows * frames
    offset = ((b * N + n) * plane)[:, None, None] + (row[None, :] * frames + t[:, None])[None, :, :]
    s = 1.0 / (1.0 + tl.exp(-tl.load(logits + offset, mask=inside, other=0.0).to(tl.float32)))
    tl.store(out + offset, (gradient * s * (1.0 - s)).to(out.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- launchers


def _launch(kernel: Any, programs: int, config: Configuration, *arguments: Any) -> None:
    launch(
        kernel, (programs,), *arguments, num_warps=config.num_warps, num_stages=config.num_stages, **config.constants
    )


def frame(signal: Tensor, window: Tensor, *, hop: int, frames: int, reflect: bool = False) -> Tensor:
    """Centred, padded, windowed frames: [B, N, L] of any strides and float type -> fp32 [B, N, T, n_fft]."""
    return _frame(signal, window, hop, frames, reflect=reflect, normalise=False)


def overlap_add_backward(gradient: Tensor, window: Tensor, *, hop: int, frames: int) -> Tensor:
    """:func:`overlap_add` transposed, up to the FFT and 1/n_fft: [B, N, length] -> frames [B, N, T, n_fft]."""
    return _frame(gradient, window, hop, frames, reflect=False, normalise=True)


def _frame(signal: Tensor, window: Tensor, hop: int, frames: int, *, reflect: bool, normalise: bool) -> Tensor:
    batch, sources, samples = signal.shape
    n_fft = window.shape[0]
    config = configuration("frame", n_fft=n_fft, hop=hop, REFLECT=reflect, NORMALISE=normalise)
    out = torch.empty((batch, sources, frames, n_fft), dtype=torch.float32, device=signal.device)
    time_tiles = triton.cdiv(frames, config.constants["TT"])
    programs = batch * sources * time_tiles * triton.cdiv(n_fft, config.constants["KB"])
    _launch(
        _frame_kernel, programs, config, signal, window, out, *signal.stride(), sources, samples, frames, time_tiles
    )
    return out


def fused_analysis(
    spectra: Tensor, taps: Tensor, *, log_rows: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the sources' spectra, complex64 [B, N, T, bins], contiguous.

    Returns:
        Network input [B, 1, F, T], weight [B, 1, F, T], ratio [B, N, F, T], the mixture's STFT complex [B, T, bins].
    """
    batch, sources, frames, bins = spectra.shape
    config = configuration("analysis", n_fft=2 * (bins - 1), sources=sources, align_corners=align_corners)
    network_input = torch.empty((batch, 1, log_rows, frames), dtype=torch.float32, device=spectra.device)
    weight = torch.empty((batch, 1, log_rows, frames), dtype=torch.float32, device=spectra.device)
    ratio = torch.empty((batch, sources, log_rows, frames), dtype=torch.float32, device=spectra.device)
    mixture = torch.empty((batch, frames, bins, 2), dtype=torch.float32, device=spectra.device)
    time_tiles = triton.cdiv(frames, config.constants["TT"])
    programs = batch * time_tiles * triton.cdiv(bins, config.constants["CB"])
    pairs = torch.view_as_real(spectra)
    outputs = (network_input, weight, ratio, mixture)
    _launch(_analysis_kernel, programs, config, pairs, taps, *outputs, log_rows, frames, time_tiles)
    return network_input, weight, ratio, torch.view_as_complex(mixture)


def fused_masking(logits: Tensor, mixture: Tensor, taps: Tensor, *, align_corners: bool) -> Tensor:
    """Logits [B, N, F, T], contiguous, and a mixture's STFT, complex64 [B, bins, T] of any strides, to the estimates.

    Returns:
        [B, N, T, n_fft] real: with E the estimate's spectrum, Re E - Im E of all n_fft bins, whose discrete Hartley
        transform is n_fft times the estimate's frames (README.md).
    """
    batch, sources, rows, frames = logits.shape
    n_fft = 2 * (mixture.shape[1] - 1)
    config = configuration("masking", n_fft=n_fft, sources=sources, align_corners=align_corners)
    hartley = torch.empty((batch, sources, frames, n_fft), dtype=torch.float32, device=logits.device)
    time_tiles = triton.cdiv(frames, config.constants["TT"])
    programs = batch * time_tiles * triton.cdiv(mixture.shape[1], config.constants["KB"])
    pairs = torch.view_as_real(mixture)
    _launch(
        _masking_kernel, programs, config, logits, pairs, taps, hartley, *mixture.stride(), rows, frames, time_tiles
    )
    return hartley


def overlap_add(spectra: Tensor, window: Tensor, *, hop: int, length: int) -> Tensor:
    """``rfft`` of what :func:`fused_masking` gives, complex64 [B, N, T, bins], contiguous, to [B, N, length]."""
    batch, sources, frames, _ = spectra.shape
    config = configuration("overlap_add", n_fft=window.shape[0], hop=hop)
    out = torch.empty((batch, sources, length), dtype=torch.float32, device=spectra.device)
    tiles = triton.cdiv(length, config.constants["SB"])
    pairs = torch.view_as_real(spectra)
    _launch(_overlap_add_kernel, batch * sources * tiles, config, pairs, window, out, length, frames, tiles)
    return out


def logits_gradient(spectra: Tensor, mixture: Tensor, logits: Tensor, taps: Tensor, *, align_corners: bool) -> Tensor:
    """Gradient [B, N, F, T] from the ``rfft`` [B, N, T, bins] of :func:`overlap_add_backward`, in the logits' type."""
    batch, sources, rows, frames = logits.shape
    n_fft = 2 * (mixture.shape[1] - 1)
    config = configuration("logits_gradient", n_fft=n_fft, sources=sources, align_corners=align_corners)
    out = torch.empty((batch, sources, rows, frames), dtype=logits.dtype, device=logits.device)
    time_tiles = triton.cdiv(frames, config.constants["TT"])
    row_tiles = triton.cdiv(rows, config.constants["RB"])
    programs = batch * time_tiles * row_tiles * triton.cdiv(sources, config.constants["NB"])
    tensors = (torch.view_as_real(spectra), torch.view_as_real(mixture), logits, taps, out)
    sizes = (*mixture.stride(), rows, frames, time_tiles, row_tiles)
    _launch(_logits_gradient_kernel, programs, config, *tensors, *sizes)
    return out


# ---------------------------------------------------------------- ahead of time

_POINTERS = {
    "frame": ("signal", "window", "out"),
    "analysis": ("spectra", "taps", "network_input", "weight", "ratio", "mixture"),
    "masking": ("logits", "mixture", "taps", "hartley"),
    "overlap_add": ("spectra", "window", "out"),
    "logits_gradient": ("spectra", "mixture", "logits", "taps", "out"),
}
_STRIDES = ("stride_b", "stride_k", "stride_t")
_SIZES = {
    "frame": ("stride_b", "stride_n", "stride_l", "sources", "samples", "frames", "time_tiles"),
    "analysis": ("rows", "frames", "time_tiles"),
    "masking": (*_STRIDES, "rows", "frames", "time_tiles"),
    "overlap_add": ("length", "frames", "tiles"),
    "logits_gradient": (*_STRIDES, "rows", "frames", "time_tiles", "row_tiles"),
}
_KERNELS = {
    "frame": _frame_kernel,
    "analysis": _analysis_kernel,
    "masking": _masking_kernel,
    "overlap_add": _overlap_add_kernel,
    "logits_gradient": _logits_gradient_kernel,
}


def _aot_case(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    n_fft: int = 1022,
    hop: int = 256,
    frames: int = 256,
    log_rows: int = 256,
    frame_major: bool = True,
    note: str = "",
    **options: Any,
) -> AotCase:
    """One kernel at one size; ``dtype`` is that of the input that may have several."""
    config = configuration(name, n_fft=n_fft, hop=hop, **options)
    pointers = {p: "*i32" if p == "taps" else "*fp32" for p in _POINTERS[name]}
    varying = ("signal",) if name == "frame" else ("logits", "out") if name == "logits_gradient" else ("logits",)
    pointers.update({p: f"*{torch_to_triton(dtype)}" for p in varying if p in pointers})
    bins = n_fft // 2 + 1
    # what is known of the sizes when the launcher runs: which are divisible by 16, and which are 1, a constant then
    values = {"frames": frames, "rows": log_rows, "stride_l": 1, "samples": 65535}
    values.update(zip(_STRIDES, (frames * bins, 1, bins) if frame_major else (frames * bins, frames, 1), strict=True))
    sizes = _SIZES[name]
    ones = {p: 1 for p in sizes if values.get(p) == 1}
    aligned = [p for p in sizes if p in values and p not in ones and values[p] % 16 == 0]
    return AotCase(
        name=f"stft {name}".replace("_", " "),
        kernel=_KERNELS[name],
        signature={**pointers, **{p: "i32" for p in sizes if p not in ones}},
        constants={**config.constants, **ones},
        aligned=(*pointers, *aligned),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        settings=", ".join(
            (
                f"{torch_to_triton(dtype)} {n_fft}/{hop} T={frames} F={log_rows}",
                *(f"{k.lower()}={v}" for k, v in options.items()),
                *([note] if note else []),
            )
        ),
    )


def aot_cases() -> list[AotCase]:
    """Every kernel as it runs at the paper's size, in all types and options, and at sizes that change its code."""
    half = (torch.float16, torch.bfloat16)
    floats = (torch.float32, *half)
    other: dict[str, Any] = {"n_fft": 510, "hop": 100, "frames": 131, "log_rows": 96}  # nothing divides by 16
    single: dict[str, Any] = {"frames": 1}
    large: dict[str, Any] = {"n_fft": 4096, "hop": 512, "frames": 512, "log_rows": 512}
    plain: dict[str, Any] = {"REFLECT": False, "NORMALISE": False}
    cases = [_aot_case("frame", dtype, **plain) for dtype in floats]
    cases += [_aot_case("frame", **{**plain, "REFLECT": True}), _aot_case("frame", **{**plain, "NORMALISE": True})]
    for size in (other, single, large):
        cases += [_aot_case("frame", **plain, **size), _aot_case("frame", REFLECT=False, NORMALISE=True, **size)]
    cases += [_aot_case("overlap_add", **size) for size in ({}, other, single, large)]
    for aligned in (True, False):
        for sources in (2, 1, 4, 8, 9):
            both: dict[str, Any] = {"sources": sources, "align_corners": aligned}
            cases += [_aot_case(name, **both) for name in ("masking", "logits_gradient")]
            if sources <= 8:
                cases.append(_aot_case("analysis", **both))
        both = {"sources": 2, "align_corners": aligned}
        for size in (other, single, large):
            cases += [_aot_case(name, **both, **size) for name in ("analysis", "masking", "logits_gradient")]
        for name in ("masking", "logits_gradient"):
            cases += [_aot_case(name, dtype, **both) for dtype in half]
            cases.append(_aot_case(name, **both, frame_major=False, note="mixture [B, bins, T]"))
    return cases

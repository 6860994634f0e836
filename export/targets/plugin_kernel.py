"""The Triton kernel of the TensorRT plugin; imported by :mod:`avsep.export.targets.plugin` when one is compiled."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["avsep_mask_spectrum"]


@triton.jit
def avsep_mask_spectrum(
    logits,  # [B, N, ROWS, frames]
    spectrum,  # [B, 2 BINS, frames], real parts, then imaginary parts
    row_low,  # int32 [BINS]
    row_share,  # [2, BINS]
    time_low,  # int32 [frames]
    time_share,  # [2, frames]
    frames,
    estimate,  # [B, N, 2 BINS, frames]
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    TIME: tl.constexpr,
    KB: tl.constexpr,
    TT: tl.constexpr,
):
    """sigmoid(logits) on linear frequency, times the mixture's spectrum. Argument order: inputs, scalars, outputs.

    Bin k reads the row ``row_low[k]`` and the next one with the shares ``row_share[:, k]`` (0 beyond the border); with
    TIME, frame t reads ``time_low[t]`` and the next one likewise.
    """
    t = tl.program_id(0) * TT + tl.arange(0, TT)
    k = tl.program_id(1) * KB + tl.arange(0, KB)
    source = tl.program_id(2).to(tl.int64)
    t_in, k_in = t < frames, k < BINS
    inside = k_in[:, None] & t_in[None, :]
    low = tl.load(row_low + k, mask=k_in, other=0)
    t_low = t
    if TIME:
        t_low = tl.load(time_low + t, mask=t_in, other=0)
    base = logits + source * ROWS * frames
    mask = tl.full((KB, TT), 0.0, tl.float32)
    for tap in tl.static_range(4 if TIME else 2):
        row, at = low + tap % 2, t_low + tap // 2
        share = tl.load(row_share + (tap % 2) * BINS + k, mask=k_in, other=0.0)[:, None]
        if TIME:
            share = share * tl.load(time_share + (tap // 2) * frames + t, mask=t_in, other=0.0)[None, :]
        known = inside & (row < ROWS)[:, None] & ((at >= 0) & (at < frames))[None, :]
        x = tl.load(base + row[:, None] * frames + at[None, :], mask=known, other=0.0).to(tl.float32)
        mask += tl.where(known, share / (1.0 + tl.exp(-x)), 0.0)
    place = k[:, None] * frames + t[None, :]
    mixture = spectrum + source // N * (2 * BINS) * frames
    target = estimate + source * (2 * BINS) * frames
    for part in tl.static_range(2):
        value = tl.load(mixture + part * BINS * frames + place, mask=inside, other=0.0)
        tl.store(target + part * BINS * frames + place, mask * value, mask=inside)

"""From source waveforms to everything training needs, and from mask logits back to waveforms."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avsep.kernels._backend import choose_backend
from avsep.kernels.stft_masking.reference import hann_window, linear_frequency_grid, log_frequency_grid

__all__ = [
    "Analysis",
    "Interpolation",
    "StftTables",
    "analyse",
    "istft",
    "make_tables",
    "stft",
    "synthesise",
    "unwarp",
    "warp",
]

_PADDINGS = {"zeros": "constant", "reflect": "reflect"}


class Interpolation(NamedTuple):
    """Linear interpolation of rows: out = x[low] + fraction (x[high] - x[low]); each [R], low and high int64."""

    low: Tensor
    high: Tensor
    fraction: Tensor


class StftTables(NamedTuple):
    """Constants of one front end: ``window`` [n_fft]; the warp to log frequency and back.

    The interpolations serve ``align_corners=True``; the normalised row coordinates ``log_grid`` [log_rows] and
    ``linear_grid`` [n_fft/2+1] the published ``False``.
    """

    window: Tensor
    to_log: Interpolation
    to_linear: Interpolation
    log_grid: Tensor
    linear_grid: Tensor


class Analysis(NamedTuple):
    """``network_input`` and ``weight`` [B, 1, F, T], ``ratio`` [B, N, F, T], ``mixture_stft`` [B, n_fft/2+1, T]."""

    network_input: Tensor
    weight: Tensor
    ratio: Tensor
    mixture_stft: Tensor


def make_tables(
    n_fft: int = 1022,
    log_rows: int = 256,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> StftTables:
    """Compute a front end's constants in float64 and store them as ``dtype``.

    Raises:
        ValueError: for an odd or non-positive ``n_fft``, or ``log_rows`` below 1.
    """
    if n_fft < 2 or n_fft % 2 or log_rows < 1:
        raise ValueError(f"n_fft must be even and positive and log_rows positive, got {n_fft} and {log_rows}")
    bins = n_fft // 2 + 1
    window = hann_window(n_fft)
    log_grid, linear_grid = log_frequency_grid(log_rows), linear_frequency_grid(bins)
    to_log = _interpolation(log_grid, bins)
    to_linear = _interpolation(linear_grid, log_rows)
    return StftTables(
        window.to(device, dtype),
        Interpolation(to_log.low.to(device), to_log.high.to(device), to_log.fraction.to(device, dtype)),
        Interpolation(to_linear.low.to(device), to_linear.high.to(device), to_linear.fraction.to(device, dtype)),
        log_grid.to(device, dtype),
        linear_grid.to(device, dtype),
    )


def _interpolation(grid: Tensor, size: int) -> Interpolation:
    """Normalised coordinates [R] over ``size`` rows, corners aligned, clamped to the border."""
    position = ((grid + 1) / 2 * (size - 1)).clamp(0, size - 1)
    low = position.floor().clamp(max=max(size - 2, 0)).long()
    return Interpolation(low, (low + 1).clamp(max=size - 1), position - low)


def stft(signal: Tensor, *, hop: int, window: Tensor, padding: str = "zeros") -> Tensor:
    """Centred STFT: [..., L] -> complex [..., n_fft/2+1, 1 + L // hop]; n_fft is the window's length.

    Raises:
        ValueError: for an unknown padding, or a signal too short to be reflected.
    """
    n_fft = window.shape[0]
    if padding not in _PADDINGS:
        raise ValueError(f"padding must be 'zeros' or 'reflect', got {padding!r}")
    samples = signal.shape[-1]
    if samples < 1 or (padding == "reflect" and samples <= n_fft // 2):
        raise ValueError(
            f"a signal of {samples} samples is too short for n_fft {n_fft} with padding {padding!r}: at least "
            f"{n_fft // 2 + 1 if padding == 'reflect' else 1} are needed"
        )
    spectrum = torch.stft(
        signal.reshape(-1, samples),
        n_fft,
        hop,
        window=window,
        center=True,
        pad_mode=_PADDINGS[padding],
        return_complex=True,
    )
    return spectrum.reshape(*signal.shape[:-1], *spectrum.shape[1:])  # [..., n_fft/2+1, T]


def istft(spectrum: Tensor, *, hop: int, window: Tensor, length: int | None = None) -> Tensor:
    """Inverse of :func:`stft`: complex [..., n_fft/2+1, T] -> [..., length], by default (T - 1) hop samples.

    Raises:
        ValueError: for a length that a signal of T frames cannot have (1 to T hop - 1).
    """
    frames = spectrum.shape[-1]
    if length is None:
        length = (frames - 1) * hop
    if not 1 <= length < frames * hop:
        raise ValueError(f"length {length} does not fit {frames} frames at hop {hop}: choose 1 to {frames * hop - 1}")
    n_fft = window.shape[0]
    flat = spectrum.reshape(-1, *spectrum.shape[-2:])
    signal = torch.istft(flat, n_fft, hop, window=window, center=True, length=length)
    return signal.reshape(*spectrum.shape[:-2], length)


def warp(x: Tensor, tables: StftTables, *, align_corners: bool = True) -> Tensor:
    """Linear to log frequency: [B, N, n_fft/2+1, T] -> [B, N, log_rows, T]."""
    return _resample(x, tables.to_log, tables.log_grid, align_corners)


def unwarp(x: Tensor, tables: StftTables, *, align_corners: bool = True) -> Tensor:
    """Log to linear frequency: [B, N, log_rows, T] -> [B, N, n_fft/2+1, T]."""
    return _resample(x, tables.to_linear, tables.linear_grid, align_corners)


def _resample(x: Tensor, rows: Interpolation, grid: Tensor, align_corners: bool) -> Tensor:
    if align_corners:
        # With corners aligned the time axis maps onto itself, and what is left is a fixed mixture of two rows.
        low = x.index_select(2, rows.low)
        return torch.lerp(low, x.index_select(2, rows.high), rows.fraction.to(x.dtype)[:, None])
    time = torch.linspace(-1, 1, x.shape[3], dtype=x.dtype, device=x.device)
    y = grid.to(x.dtype)
    full = torch.stack((time.expand(len(y), -1), y[:, None].expand(-1, len(time))), dim=2)  # [R, T, 2]
    return F.grid_sample(x, full.expand(x.shape[0], -1, -1, -1), padding_mode="zeros", align_corners=False)


def _sum_sources(spectra: Tensor) -> Tensor:
    """Complex [B, N, bins, T] -> [B, bins, T]; as pairs of reals and in the order in which ``torch.stft`` lays them
    out, frame by frame, which on the CPU is twenty times faster than a plain sum."""
    pairs = torch.view_as_real(spectra.transpose(2, 3))  # [B, N, T, bins, 2]
    return torch.view_as_complex(pairs.sum(dim=1)).transpose(1, 2)


def _magnitude(spectrum: Tensor) -> Tensor:
    if spectrum.requires_grad:
        return spectrum.abs()  # whose derivative at 0 is 0, where that of the root below is not finite
    # abs() guards against overflow element by element, which no audio needs and which costs several times as much.
    return (spectrum.real * spectrum.real).addcmul_(spectrum.imag, spectrum.imag).sqrt_()


def analyse(
    sources: Tensor,
    *,
    n_fft: int = 1022,
    hop: int = 256,
    log_rows: int = 256,
    align_corners: bool = True,
    padding: str = "zeros",
    tables: StftTables | None = None,
    backend: str = "auto",
) -> Analysis:
    """Network input, loss weight, ratio masks and the mixture's STFT of N sources.

    The mixture is the sum of the sources, and so is its STFT: N signals are transformed, not N + 1. With X the
    mixture's magnitude plus 1e-10 and S_n that of source n, both on the log-frequency grid: network input log1p(X),
    weight clamp(log1p(X), 1e-3, 10), ratio masks clamp(S_n / X, 0, 5). Computed in fp32 (float64 for float64 sources),
    also under autocast.

    Args:
        sources: [B, N, L].
        n_fft: length of window and transform, even.
        hop: samples between frames; T = 1 + L // hop.
        log_rows: rows F of the log-frequency grid.
        align_corners: False reproduces the published code's warp, which also resamples time and fades at the borders.
        padding: what lies beyond the ends, ``zeros`` or ``reflect``.
        tables: constants made by :func:`make_tables`; they then decide ``n_fft`` and ``log_rows``.
        backend: ``auto``, ``torch`` or ``triton``.

    Raises:
        ValueError: for a wrong shape, an empty batch, or a signal too short.
        ConfigError: for a backend that does not exist.

    References:
        Zhao et al., The Sound of Pixels, ECCV 2018; Chen et al., iQuery, CVPR 2023.
    """
    if sources.ndim != 3 or sources.shape[0] == 0 or sources.shape[1] == 0:
        raise ValueError(f"analyse takes sources [B, N, L] with B and N at least 1, got {list(sources.shape)}")
    if not sources.is_floating_point():
        raise ValueError(f"sources must be floating point, got {sources.dtype}")
    choose_backend(backend, "stft_masking", sources.numel())
    dtype = torch.float64 if sources.dtype == torch.float64 else torch.float32
    if tables is None:
        tables = make_tables(n_fft, log_rows, device=sources.device, dtype=dtype)
    with torch.autocast(sources.device.type, enabled=False):
        spectra = stft(sources.to(dtype), hop=hop, window=tables.window.to(dtype), padding=padding)
        mixture = _sum_sources(spectra)
        magnitudes = torch.cat(
            ((_magnitude(mixture) + 1e-10)[:, None], _magnitude(spectra)), dim=1
        )  # [B, 1+N, bins, T]
        warped = warp(magnitudes, tables, align_corners=align_corners)
        network_input = torch.log1p(warped[:, :1])
        ratio = (warped[:, 1:] / warped[:, :1]).clamp(0, 5)
        return Analysis(network_input, network_input.clamp(1e-3, 10), ratio, mixture)


def synthesise(
    logits: Tensor,
    mixture_stft: Tensor,
    *,
    n_fft: int = 1022,
    hop: int = 256,
    length: int | None = None,
    align_corners: bool = True,
    tables: StftTables | None = None,
    backend: str = "auto",
) -> Tensor:
    """Waveforms of N masks: sigmoid, back to linear frequency, times the mixture's STFT, inverse STFT.

    Differentiable, and not clipped. Computed in fp32 (float64 for a complex128 STFT), also under autocast.

    Args:
        logits: [B, N, F, T] on the log-frequency grid.
        mixture_stft: complex [B, n_fft/2+1, T], as :func:`analyse` gives it.
        n_fft: length of window and transform.
        hop: samples between frames.
        length: samples of the result, 1 to T hop - 1; (T - 1) hop when None.
        align_corners: as in :func:`analyse`.
        tables: constants made by :func:`make_tables`; they then decide ``n_fft``.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        [B, N, length].

    Raises:
        ValueError: for shapes that do not fit together, an empty batch, or a length that T frames cannot give.
        ConfigError: for a backend that does not exist.
    """
    bins = n_fft // 2 + 1 if tables is None else tables.linear_grid.shape[0]
    if logits.ndim != 4 or logits.numel() == 0:
        raise ValueError(f"synthesise takes logits [B, N, F, T], none of them 0, got {list(logits.shape)}")
    expected = (logits.shape[0], bins, logits.shape[3])
    if not mixture_stft.is_complex() or mixture_stft.shape != expected:
        raise ValueError(
            f"mixture_stft must be complex of shape {list(expected)}, got {mixture_stft.dtype} "
            f"{list(mixture_stft.shape)}"
        )
    if tables is not None and tables.log_grid.shape[0] != logits.shape[2]:
        raise ValueError(f"logits have {logits.shape[2]} rows, the tables {tables.log_grid.shape[0]}")
    choose_backend(backend, "stft_masking", logits.numel())
    dtype = torch.float64 if mixture_stft.dtype == torch.complex128 else torch.float32
    if tables is None:
        tables = make_tables(n_fft, logits.shape[2], device=logits.device, dtype=dtype)
    with torch.autocast(logits.device.type, enabled=False):
        masks = unwarp(torch.sigmoid(logits.to(dtype)), tables, align_corners=align_corners)  # [B, N, bins, T]
        # Frame by frame, the order in which the inverse FFT reads: [B, N, T, bins]
        estimate = masks.transpose(2, 3).contiguous() * mixture_stft.transpose(1, 2)[:, None]
        return istft(estimate.transpose(2, 3), hop=hop, window=tables.window.to(dtype), length=length)

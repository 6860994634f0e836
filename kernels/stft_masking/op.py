"""From source waveforms to everything training needs, and from mask logits back to waveforms."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avsep.kernels._backend import choose_backend
from avsep.kernels.stft_masking.reference import hann_window, linear_frequency_grid, log_frequency_grid, loss_weight

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
# Of the Triton kernels. With more sources the analysis runs in PyTorch; with more frames over one sample the
# overlap-add, which unrolls over them, would take minutes to compile.
_TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)
_MOST_SOURCES, _MOST_OVERLAP = 8, 16


class Interpolation(NamedTuple):
    """Linear interpolation of rows: out = x[low] + fraction (x[high] - x[low]); each [R], low and high int64."""

    low: Tensor
    high: Tensor
    fraction: Tensor


class StftTables(NamedTuple):
    """Constants of one front end: ``window`` [n_fft]; the warp to log frequency and back.

    The interpolations serve ``align_corners=True``; the normalised row coordinates ``log_grid`` [log_rows] and
    ``linear_grid`` [n_fft/2+1] the published ``False``. ``log_taps`` and ``linear_taps`` hold the same for the Triton
    kernels, as :func:`make_taps` packs it: int32 [2, ..], first as published, then with corners aligned (at the index
    ``int(align_corners)``).
    """

    window: Tensor
    to_log: Interpolation
    to_linear: Interpolation
    log_grid: Tensor
    linear_grid: Tensor
    log_taps: Tensor
    linear_taps: Tensor


class Analysis(NamedTuple):
    """What :func:`analyse` gives.

    ``network_input`` and ``weight`` [B, 1, F, T], ``ratio`` [B, N, F, T], ``mixture_stft`` complex [B, n_fft/2+1, T].
    """

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
        make_taps(log_grid, bins).to(device),
        make_taps(linear_grid, log_rows).to(device),
    )


def make_taps(grid: Tensor, size: int) -> Tensor:
    """How R rows are read from ``size`` rows at the normalised coordinates ``grid`` [R], float64 and not decreasing.

    Returns:
        int32 [2, 2 R + size + 1 and up to three zeros]: for ``align_corners`` False and True the vector ``[low (R) |
        fraction, fp32 bits (R) | first (size + 1)]``; the zeros make both begin at a multiple of 16 bytes. Row r is
        (1 - fraction) x[low] + fraction x[low + 1], rows outside 0..size-1 being zeros; ``first[s]`` counts the rows
        with low < s.
    """
    taps: list[Tensor] = []
    for position in (((grid + 1) * size - 1) / 2, ((grid + 1) / 2 * (size - 1)).clamp(0, size - 1)):
        low = position.floor()
        if len(taps) == 1:
            low = low.clamp(max=max(size - 2, 0))
        fraction = (position - low).float().view(torch.int32)
        first = torch.searchsorted(low, torch.arange(size + 1, dtype=low.dtype, device=low.device))
        filled = low.new_zeros(-(2 * len(low) + size + 1) % 4, dtype=torch.int32)
        taps.append(torch.cat((low.int(), fraction, first.int(), filled)))
    return torch.stack(taps)


@functools.lru_cache(maxsize=16)
def _tables_once(n_fft: int, log_rows: int, device: torch.device, dtype: torch.dtype) -> StftTables:
    with torch.inference_mode(False):  # tables made in inference mode could not serve a gradient later
        return make_tables(n_fft, log_rows, device=device, dtype=dtype)


def _tables_for(like: Tensor, n_fft: int, log_rows: int, dtype: torch.dtype) -> StftTables:
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return make_tables(n_fft, log_rows, device=like.device, dtype=dtype)  # part of the graph, or fake
    return _tables_once(n_fft, log_rows, like.device, dtype)


def _interpolation(grid: Tensor, size: int) -> Interpolation:
    """Normalised coordinates [R] over ``size`` rows, corners aligned, clamped to the border."""
    position = ((grid + 1) / 2 * (size - 1)).clamp(0, size - 1)
    low = position.floor().clamp(max=max(size - 2, 0)).long()
    return Interpolation(low, (low + 1).clamp(max=size - 1), position - low)


def stft(signal: Tensor, *, hop: int, window: Tensor, padding: str = "zeros") -> Tensor:
    """Compute the centred STFT: [..., L] -> complex [..., n_fft/2+1, 1 + L // hop]; n_fft is the window's length.

    Raises:
        ValueError: for an unknown padding, or a signal too short to be reflected.
    """
    n_fft = window.shape[0]
    samples = signal.shape[-1]
    _check_signal(samples, n_fft, hop, padding)
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


def _check_signal(samples: int, n_fft: int, hop: int, padding: str) -> None:
    if padding not in _PADDINGS:
        raise ValueError(f"padding must be 'zeros' or 'reflect', got {padding!r}")
    if hop < 1:
        raise ValueError(f"hop must be at least 1, got {hop}")
    if samples < 1 or (padding == "reflect" and samples <= n_fft // 2):
        raise ValueError(
            f"a signal of {samples} samples is too short for n_fft {n_fft} with padding {padding!r}: at least "
            f"{n_fft // 2 + 1 if padding == 'reflect' else 1} are needed"
        )


def istft(spectrum: Tensor, *, hop: int, window: Tensor, length: int | None = None) -> Tensor:
    """Invert :func:`stft`: complex [..., n_fft/2+1, T] -> [..., length], by default (T - 1) hop samples.

    Raises:
        ValueError: for a length that a signal of T frames cannot have (1 to T hop - 1), or a hop whose frames do not
            overlap enough to be inverted.
    """
    n_fft = window.shape[0]
    length = _check_length(length, spectrum.shape[-1], n_fft, hop)
    flat = spectrum.reshape(-1, *spectrum.shape[-2:])
    signal = torch.istft(flat, n_fft, hop, window=window, center=True, length=length)
    return signal.reshape(*spectrum.shape[:-2], length)


def _check_length(length: int | None, frames: int, n_fft: int, hop: int) -> int:
    if hop < 1 or (2 * hop > n_fft and _smallest_envelope(n_fft, hop) <= 1e-11):
        raise ValueError(
            f"hop {hop} does not suit n_fft {n_fft}: between two frames the squared windows add up to nothing; "
            f"choose 1 to {n_fft // 2}"
        )
    if length is None:
        length = (frames - 1) * hop
    if not 1 <= length < frames * hop:
        raise ValueError(f"length {length} does not fit {frames} frames at hop {hop}: choose 1 to {frames * hop - 1}")
    return length


@functools.lru_cache(maxsize=64)
def _smallest_envelope(n_fft: int, hop: int) -> float:
    """Smallest sum of squared Hann windows over a sample, for a hop of more than half a window."""
    squares = [math.sin(math.pi * k / n_fft) ** 4 for k in range(n_fft)] + [0.0] * hop
    return min(squares[k] + squares[k + hop] for k in range(min(hop, n_fft)))


def warp(x: Tensor, tables: StftTables, *, align_corners: bool = True) -> Tensor:
    """Resample from linear to log frequency: [B, N, n_fft/2+1, T] -> [B, N, log_rows, T]."""
    return _resample(x, tables.to_log, tables.log_grid, align_corners)


def unwarp(x: Tensor, tables: StftTables, *, align_corners: bool = True) -> Tensor:
    """Resample from log to linear frequency: [B, N, log_rows, T] -> [B, N, n_fft/2+1, T]."""
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


def _no_gradient_of(x: Tensor, name: str) -> str:
    return f"gives no gradient of {name}: detach it" if x.requires_grad and torch.is_grad_enabled() else ""


def _wrong_types(*dtypes: torch.dtype) -> str:
    if all(dtype in _TRITON_TYPES for dtype in dtypes):
        return ""
    got = " and ".join(map(str, dtypes))
    return f"computes in fp32, from fp32, fp16, bf16 and complex64, got {got}: convert the input"


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
    targets: bool = True,
    backend: str = "auto",
) -> Analysis:
    """Compute the network input, the loss weight, the ratio masks and the mixture's STFT of N sources.

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
        targets: False leaves out the ratio masks, which only training needs: they are then [B, 0, F, T].
        backend: ``auto``, ``torch`` or ``triton``. With more than 8 sources PyTorch runs on each.

    Returns:
        The four tensors of :class:`Analysis`.

    Raises:
        ValueError: for a wrong shape, type or device, an empty batch, or a signal too short.
        ConfigError: for a backend that does not exist or cannot run, or with ``triton`` for float64 sources or sources
            that require a gradient.

    References:
        Zhao et al., The Sound of Pixels, ECCV 2018; Chen et al., iQuery, CVPR 2023.
    """
    if sources.ndim != 3 or sources.shape[0] == 0 or sources.shape[1] == 0:
        raise ValueError(f"analyse takes sources [B, N, L] with B and N at least 1, got {list(sources.shape)}")
    if not sources.is_floating_point():
        raise ValueError(f"sources must be floating point, got {sources.dtype}")
    obstacle = _wrong_types(sources.dtype) or _no_gradient_of(sources, "the sources")
    chosen = choose_backend(backend, "stft_masking", sources.numel(), sources.device, obstacle=obstacle)
    dtype = torch.float64 if sources.dtype == torch.float64 else torch.float32
    if tables is None:
        tables = _tables_for(sources, n_fft, log_rows, dtype)
    _check_device("sources", sources, tables)
    _check_signal(sources.shape[2], tables.window.shape[0], hop, padding)
    if chosen == "triton" and sources.shape[1] <= _MOST_SOURCES:
        taps, rows = tables.log_taps[int(align_corners)], tables.log_grid.shape[0]
        window = tables.window.to(torch.float32)
        made = Analysis(*_triton_analyse(sources, window, taps, hop, rows, align_corners, padding == "reflect"))
        return made if targets else made._replace(ratio=made.ratio[:, :0])
    with torch.autocast(sources.device.type, enabled=False):
        spectra = stft(sources.to(dtype), hop=hop, window=tables.window.to(dtype), padding=padding)
        mixture = _sum_sources(spectra)
        magnitudes = (_magnitude(mixture) + 1e-10)[:, None]
        if targets:
            magnitudes = torch.cat((magnitudes, _magnitude(spectra)), dim=1)  # [B, 1+N, bins, T]
        warped = warp(magnitudes, tables, align_corners=align_corners)
        network_input = torch.log1p(warped[:, :1])
        ratio = (warped[:, 1:] / warped[:, :1]).clamp(0, 5)
        return Analysis(network_input, loss_weight(network_input), ratio, mixture)


def _check_device(name: str, x: Tensor, tables: StftTables) -> None:
    if x.device != tables.window.device:
        raise ValueError(f"{name} are on {x.device} and the tables on {tables.window.device}: move one to the other")


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
    """Turn the mask logits of N sources into their waveforms, with the phase of the mixture.

    Sigmoid, back to linear frequency, times the mixture's STFT, inverse STFT. Differentiable, and not clipped. Computed
    in fp32 (float64 for a complex128 STFT), also under autocast.

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
        ValueError: for shapes, types or devices that do not fit together, an empty batch, a hop that cannot be
            inverted, or a length that T frames cannot give.
        ConfigError: for a backend that does not exist or cannot run, or with ``triton`` for double precision, a
            mixture that requires a gradient, or more than 16 frames over one sample.

    References:
        Zhao et al., The Sound of Pixels, ECCV 2018.
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
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if logits.device != mixture_stft.device:
        raise ValueError(f"logits are on {logits.device} and mixture_stft on {mixture_stft.device}: move one")
    obstacle = _wrong_types(logits.dtype, mixture_stft.dtype) or _no_gradient_of(mixture_stft, "the mixture's STFT")
    if (overlap := -(-2 * (bins - 1) // max(hop, 1))) > _MOST_OVERLAP:
        obstacle = (
            f"adds up to {_MOST_OVERLAP} frames over one sample, but n_fft / hop is {overlap}: choose a longer hop"
        )
    chosen = choose_backend(backend, "stft_masking", logits.numel(), logits.device, obstacle=obstacle)
    dtype = torch.float64 if mixture_stft.dtype == torch.complex128 else torch.float32
    if tables is None:
        tables = _tables_for(logits, n_fft, logits.shape[2], dtype)
    _check_device("logits", logits, tables)
    length = _check_length(length, logits.shape[3], tables.window.shape[0], hop)
    if chosen == "triton":
        taps, window = tables.linear_taps[int(align_corners)], tables.window.to(torch.float32)
        waveforms: Tensor = _triton_synthesise(logits, mixture_stft, window, taps, hop, length, align_corners)
        return waveforms
    with torch.autocast(logits.device.type, enabled=False):
        masks = unwarp(torch.sigmoid(logits.to(dtype)), tables, align_corners=align_corners)  # [B, N, bins, T]
        # Frame by frame, the order in which the inverse FFT reads: [B, N, T, bins]
        estimate = masks.transpose(2, 3).contiguous() * mixture_stft.transpose(1, 2)[:, None]
        return istft(estimate.transpose(2, 3), hop=hop, window=tables.window.to(dtype), length=length)


# ---------------------------------------------------------------- the Triton path as operators


@torch.library.custom_op("avsep::stft_analyse", mutates_args=())
def _triton_analyse(
    sources: Tensor, window: Tensor, taps: Tensor, hop: int, log_rows: int, align_corners: bool, reflect: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from avsep.kernels.stft_masking import triton_kernel

    frames = 1 + sources.shape[2] // hop
    pieces = triton_kernel.frame(sources, window, hop=hop, frames=frames, reflect=reflect)
    network_input, weight, ratio, mixture = triton_kernel.fused_analysis(
        torch.fft.rfft(pieces), taps, log_rows=log_rows, align_corners=align_corners
    )
    return network_input, weight, ratio, mixture.transpose(1, 2)


@_triton_analyse.register_fake
def _(
    sources: Tensor, window: Tensor, taps: Tensor, hop: int, log_rows: int, align_corners: bool, reflect: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, count, samples = sources.shape
    frames = 1 + samples // hop
    planes = [sources.new_empty((batch, n, log_rows, frames), dtype=torch.float32) for n in (1, 1, count)]
    mixture = sources.new_empty((batch, frames, window.shape[0] // 2 + 1), dtype=torch.complex64)
    return planes[0], planes[1], planes[2], mixture.transpose(1, 2)


@torch.library.custom_op("avsep::stft_synthesise", mutates_args=())
def _triton_synthesise(
    logits: Tensor, mixture_stft: Tensor, window: Tensor, taps: Tensor, hop: int, length: int, align_corners: bool
) -> Tensor:
    from avsep.kernels.stft_masking import triton_kernel

    hartley = triton_kernel.fused_masking(logits.contiguous(), mixture_stft, taps, align_corners=align_corners)
    return triton_kernel.overlap_add(torch.fft.rfft(hartley), window, hop=hop, length=length)


@_triton_synthesise.register_fake
def _(
    logits: Tensor, mixture_stft: Tensor, window: Tensor, taps: Tensor, hop: int, length: int, align_corners: bool
) -> Tensor:
    return logits.new_empty((logits.shape[0], logits.shape[1], length), dtype=torch.float32)


@torch.library.custom_op("avsep::stft_synthesise_backward", mutates_args=())
def _triton_synthesise_backward(
    gradient: Tensor,
    logits: Tensor,
    mixture_stft: Tensor,
    window: Tensor,
    taps: Tensor,
    hop: int,
    align_corners: bool,
) -> Tensor:
    """The gradient of the logits; that of the mixture's STFT, which no loss needs, has no kernels."""
    from avsep.kernels.stft_masking import triton_kernel

    pieces = triton_kernel.overlap_add_backward(gradient, window, hop=hop, frames=logits.shape[3])
    spectra = torch.fft.rfft(pieces)
    return triton_kernel.logits_gradient(spectra, mixture_stft, logits.contiguous(), taps, align_corners=align_corners)


@_triton_synthesise_backward.register_fake
def _(
    gradient: Tensor,
    logits: Tensor,
    mixture_stft: Tensor,
    window: Tensor,
    taps: Tensor,
    hop: int,
    align_corners: bool,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _synthesise_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, mixture_stft, window, taps, ctx.hop, _, ctx.align_corners = inputs
    ctx.save_for_backward(logits, mixture_stft, window, taps)


def _synthesise_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _triton_synthesise_backward(gradient, *ctx.saved_tensors, ctx.hop, ctx.align_corners), *(None,) * 6


_triton_synthesise.register_autograd(_synthesise_backward, setup_context=_synthesise_context)

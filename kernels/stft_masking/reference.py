"""The STFT masking path, step by step with ``grid_sample`` as published (Sound of Pixels, iQuery, ContAV-Sep).

The oracle of the tests; use it in float64. It transforms the mixture itself rather than adding up its sources.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "analyse_reference",
    "istft_reference",
    "stft_reference",
    "synthesise_reference",
    "unwarp_reference",
    "warp_reference",
]


def _sample(x: Tensor, y: Tensor, align_corners: bool) -> Tensor:
    """x [B, N, R, T] at the normalised rows y [R'] and the time coordinates linspace(-1, 1, T) -> [B, N, R', T]."""
    time = torch.linspace(-1, 1, x.shape[3], dtype=x.dtype, device=x.device)
    grid = torch.stack((time.expand(len(y), -1), y[:, None].expand(-1, len(time))), dim=2)  # [R', T, (x, y)]
    return F.grid_sample(
        x,
        grid.expand(x.shape[0], -1, -1, -1),
        mode="bilinear",
        padding_mode="border" if align_corners else "zeros",
        align_corners=align_corners,
    )


def log_frequency_grid(log_rows: int, *, dtype: torch.dtype = torch.float64, device: Any = None) -> Tensor:
    """g(y) = (21^((y+1)/2) - 11) / 10 at linspace(-1, 1, log_rows): where each log-frequency row reads the spectrum."""
    y = torch.linspace(-1, 1, log_rows, dtype=dtype, device=device)
    return (21 ** ((y + 1) / 2) - 11) / 10


def linear_frequency_grid(bins: int, *, dtype: torch.dtype = torch.float64, device: Any = None) -> Tensor:
    """The inverse, 2 log_21(10 y + 11) - 1 at linspace(-1, 1, bins): where each bin reads the log-frequency rows."""
    y = torch.linspace(-1, 1, bins, dtype=dtype, device=device)
    return 2 * torch.log(10 * y + 11) / math.log(21) - 1


def hann_window(n_fft: int, *, dtype: torch.dtype = torch.float64, device: Any = None) -> Tensor:
    """The periodic Hann window [n_fft]."""
    return 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(n_fft, dtype=dtype, device=device) / n_fft)


def warp_reference(x: Tensor, log_rows: int, align_corners: bool = True) -> Tensor:
    """Linear to log frequency: x [B, N, bins, T] read at :func:`log_frequency_grid`."""
    return _sample(x, log_frequency_grid(log_rows, dtype=x.dtype, device=x.device), align_corners)


def unwarp_reference(x: Tensor, bins: int, align_corners: bool = True) -> Tensor:
    """Log to linear frequency: x [B, N, log_rows, T] read at :func:`linear_frequency_grid`."""
    return _sample(x, linear_frequency_grid(bins, dtype=x.dtype, device=x.device), align_corners)


def stft_reference(signal: Tensor, n_fft: int, hop: int, padding: str = "zeros") -> Tensor:
    """Centred STFT with a periodic Hann window by definition: [..., L] -> [..., n_fft/2+1, 1 + L // hop]."""
    leading, samples = signal.shape[:-1], signal.shape[-1]
    flat = signal.reshape(1, -1, samples)
    flat = F.pad(flat, (n_fft // 2, n_fft // 2), mode="reflect" if padding == "reflect" else "constant")
    window = hann_window(n_fft, dtype=signal.dtype)
    frames = flat.unfold(2, n_fft, hop)[0] * window  # [M, T, n_fft]
    spectrum: Tensor = torch.fft.rfft(frames)
    return spectrum.transpose(1, 2).reshape(*leading, n_fft // 2 + 1, -1)


def istft_reference(spectrum: Tensor, n_fft: int, hop: int, length: int) -> Tensor:
    """Windowed overlap-add divided by the sum of the squared windows: [..., n_fft/2+1, T] -> [..., length]."""
    window = hann_window(n_fft, dtype=spectrum.real.dtype)
    pieces: Tensor = torch.fft.irfft(spectrum.transpose(-1, -2), n=n_fft) * window  # [..., T, n_fft]
    frames = pieces.shape[-2]
    total = pieces.new_zeros(*pieces.shape[:-2], n_fft + hop * (frames - 1))
    envelope = pieces.new_zeros(n_fft + hop * (frames - 1))
    for t in range(frames):
        total[..., t * hop : t * hop + n_fft] += pieces[..., t, :]
        envelope[t * hop : t * hop + n_fft] += window**2
    kept = slice(n_fft // 2, n_fft // 2 + length)
    return total[..., kept] / envelope[kept]


def loss_weight(network_input: Tensor) -> Tensor:
    """What a pixel counts in the loss of masks, from the log1p of its magnitude."""
    return network_input.clamp(1e-3, 10)


def analyse_reference(
    sources: Tensor,
    *,
    n_fft: int = 1022,
    hop: int = 256,
    log_rows: int = 256,
    align_corners: bool = True,
    padding: str = "zeros",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Network input [B, 1, F, T], weight [B, 1, F, T], ratio [B, N, F, T] and the mixture's STFT [B, n_fft/2+1, T]."""
    mixture = stft_reference(sources.sum(dim=1), n_fft, hop, padding)
    mixture_magnitude = warp_reference((mixture.abs() + 1e-10)[:, None], log_rows, align_corners)
    magnitudes = warp_reference(stft_reference(sources, n_fft, hop, padding).abs(), log_rows, align_corners)
    network_input = torch.log1p(mixture_magnitude)
    ratio = (magnitudes / mixture_magnitude).clamp(0, 5)
    return network_input, loss_weight(network_input), ratio, mixture


def synthesise_reference(
    logits: Tensor,
    mixture_stft: Tensor,
    *,
    n_fft: int = 1022,
    hop: int = 256,
    length: int | None = None,
    align_corners: bool = True,
) -> Tensor:
    """Waveforms [B, N, length] of the masks sigmoid(logits) [B, N, F, T] with the mixture's phase."""
    masks = unwarp_reference(torch.sigmoid(logits), n_fft // 2 + 1, align_corners)
    mixture = mixture_stft[:, None]
    estimate = torch.polar(masks * mixture.abs(), mixture.angle().expand_as(masks))
    return istft_reference(estimate, n_fft, hop, (logits.shape[3] - 1) * hop if length is None else length)

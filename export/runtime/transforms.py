"""STFT and its inverse in NumPy, for graphs that leave the transforms out. Equal to ``torch.stft`` and ``torch.istft``.

Spectra are pairs of reals, [..., 2, bins, T]: the real part, then the imaginary one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError

__all__ = ["istft", "stft"]

Array = NDArray[Any]


def _window(n_fft: int) -> NDArray[np.float64]:
    """Periodic Hann window."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def stft(signal: Array, *, n_fft: int, hop: int, padding: str = "zeros") -> NDArray[np.float32]:
    """Centred STFT: [..., L] -> [..., 2, n_fft/2+1, 1 + L // hop]; computed in float64.

    Raises:
        ConfigError: an unknown padding, or a signal too short to be reflected.
    """
    if padding not in ("zeros", "reflect"):
        raise ConfigError(f"padding must be 'zeros' or 'reflect', got {padding!r}")
    samples, half = signal.shape[-1], n_fft // 2
    if samples < 1 or (padding == "reflect" and samples <= half):
        raise ConfigError(
            f"a signal of {samples} samples is too short for n_fft {n_fft} with padding '{padding}': at least "
            f"{half + 1 if padding == 'reflect' else 1} are needed"
        )
    around = [(0, 0)] * (signal.ndim - 1) + [(half, half)]
    padded = np.pad(signal.astype(np.float64), around, mode="reflect" if padding == "reflect" else "constant")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=-1)[..., ::hop, :]  # [..., T, n_fft]
    spectrum = np.swapaxes(np.fft.rfft(frames * _window(n_fft), axis=-1), -1, -2)  # [..., bins, T]
    return np.stack((spectrum.real, spectrum.imag), axis=-3).astype(np.float32)


def istft(spectrum: Array, *, hop: int, length: int) -> NDArray[np.float32]:
    """Windowed overlap-add over the sum of the squared windows: [..., 2, n_fft/2+1, T] -> [..., length].

    Raises:
        ConfigError: a length that T frames cannot give.
    """
    bins, frames = spectrum.shape[-2:]
    n_fft = 2 * (bins - 1)
    if not 1 <= length < frames * hop:
        raise ConfigError(f"length {length} does not fit {frames} frames at hop {hop}: choose 1 to {frames * hop - 1}")
    window = _window(n_fft)
    both = spectrum.astype(np.float64)
    whole = np.swapaxes(both[..., 0, :, :] + 1j * both[..., 1, :, :], -1, -2)  # [..., T, bins]
    pieces = np.fft.irfft(whole, n=n_fft, axis=-1) * window  # [..., T, n_fft]
    total = np.zeros((*pieces.shape[:-2], n_fft + hop * (frames - 1)))
    envelope = np.zeros(total.shape[-1])
    for frame in range(frames):
        total[..., frame * hop : frame * hop + n_fft] += pieces[..., frame, :]
        envelope[frame * hop : frame * hop + n_fft] += window**2
    kept = slice(n_fft // 2, n_fft // 2 + length)
    return (total[..., kept] / np.maximum(envelope[kept], 1e-11)).astype(np.float32)

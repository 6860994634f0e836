"""The front end: STFT, log-frequency warp, ratio masks and their inverses, as one module built from a spec."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from avsep.errors import ConfigError
from avsep.kernels import Interpolation, StftTables, analyse, istft, make_tables, stft, synthesise, unwarp, warp
from avsep.kernels.stft_masking.reference import loss_weight
from avsep.spec import FrontEndSpec
from avsep.types import Spectrograms

__all__ = ["FrontEnd", "log_magnitude", "magnitude", "reference_gain"]

_MOST_GAIN = 1000.0  # 60 dB: what is quieter than that is left quiet


def magnitude(network_input: Tensor) -> Tensor:
    """X = e^z - 1, the warped magnitude, from the front end's z = log1p(X); of any shape.

    Computed as 2 e^(z/2) sinh(z/2), which keeps the digits of small magnitudes where ONNX, which has no expm1, would
    lose them. In single precision at least, whatever the autocast.
    """
    half = 0.5 * (network_input.float() if network_input.dtype in (torch.float16, torch.bfloat16) else network_input)
    return 2.0 * half.exp() * half.sinh()


def log_magnitude(network_input: Tensor, floor: float = 1e-10) -> Tensor:
    """log(max(X, floor)) from the front end's log1p(X): what Sound of Pixels and Co-Separation look at.

    They take the logarithm of X, to which the front end has added 1e-10 before the warp as they do. A maximum, and no
    second sum: ONNX's optimiser strikes out sums with so small a constant.
    """
    return magnitude(network_input).clamp(min=floor).log()


def reference_gain(power: Tensor, window: Tensor, level_db: float) -> Tensor:
    r"""The factor that brings mixtures to ``level_db`` (RMS, dB of full scale), at most 60 dB.

    Args:
        power: [B], the mean of \|X\|^2 over the bins and frames of each mixture's STFT. A signal of RMS s has
            s^2 sum(w^2) (Parseval), so that graphs without the waveform find the same factor.
        window: w [n_fft].
        level_db: the level to reach.

    Returns:
        [B].
    """
    root = (power / (window.to(power.dtype) ** 2).sum()).sqrt()
    level: float = 10.0 ** (level_db / 20)
    gain: Tensor = level / root.clamp(min=1e-12)
    return gain.clamp(max=_MOST_GAIN)


class FrontEnd(nn.Module):
    """Waveforms to spectrograms and mask logits to waveforms, with the settings of a :class:`FrontEndSpec`.

    It has no parameters and nothing of it is stored in a checkpoint; its constants move with the module. Dimensions:
    B mixtures, N sources, L samples, F log-frequency rows, T frames, ``bins`` = n_fft/2 + 1.

    References:
        Zhao et al., The Sound of Pixels, ECCV 2018; Chen et al., iQuery, CVPR 2023.
    """

    window: Tensor
    log_low: Tensor
    log_high: Tensor
    log_fraction: Tensor
    linear_low: Tensor
    linear_high: Tensor
    linear_fraction: Tensor
    log_grid: Tensor
    linear_grid: Tensor
    log_taps: Tensor
    linear_taps: Tensor

    def __init__(self, spec: FrontEndSpec) -> None:
        super().__init__()
        self.spec = spec
        tables = make_tables(spec.n_fft, spec.log_rows)
        constants = {
            "window": tables.window,
            "log_low": tables.to_log.low,
            "log_high": tables.to_log.high,
            "log_fraction": tables.to_log.fraction,
            "linear_low": tables.to_linear.low,
            "linear_high": tables.to_linear.high,
            "linear_fraction": tables.to_linear.fraction,
            "log_grid": tables.log_grid,
            "linear_grid": tables.linear_grid,
            "log_taps": tables.log_taps,
            "linear_taps": tables.linear_taps,
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def tables(self) -> StftTables:
        return StftTables(
            self.window,
            Interpolation(self.log_low, self.log_high, self.log_fraction),
            Interpolation(self.linear_low, self.linear_high, self.linear_fraction),
            self.log_grid,
            self.linear_grid,
            self.log_taps,
            self.linear_taps,
        )

    @torch.no_grad()
    def analyse(self, sources: Tensor, *, targets: bool = True, backend: str = "auto") -> Spectrograms:
        """Everything training needs of N sources, whose sum is the mixture; no gradient.

        Args:
            sources: [B, N, L], N = 1 for a mixture alone; any L that is long enough for one frame.
            targets: False leaves out the ratio masks, for separating alone.
            backend: of the kernels, ``auto``, ``torch`` or ``triton``.

        Raises:
            ConfigError: for a wrong shape or type, or signals too short.
        """
        try:
            network_input, weight, ratio, mixture = analyse(
                sources,
                hop=self.spec.hop,
                align_corners=self.spec.align_corners,
                padding=self.spec.padding,
                tables=self.tables,
                targets=targets,
                backend=backend,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.spec.level_db is not None:
            # of the mixture alone: ratio masks do not know a level, and the masks go on the mixture as it came
            power = (mixture.real.square() + mixture.imag.square()).mean(dim=(1, 2))  # [B]
            gain = reference_gain(power, self.window, self.spec.level_db)[:, None, None, None]
            network_input = torch.log1p(gain * magnitude(network_input))
            weight = loss_weight(network_input) if targets else weight
        return Spectrograms(network_input=network_input, weight=weight, ratio=ratio, mixture=mixture)

    def synthesise(
        self,
        logits: Tensor,
        mixture_stft: Tensor,
        length: int | None = None,
        *,
        clip: bool = True,
        backend: str = "auto",
    ) -> Tensor:
        """Waveforms of N masks with the mixture's phase.

        Args:
            logits: [B, N, F, T], before the sigmoid.
            mixture_stft: complex [B, bins, T], as :meth:`analyse` gives it.
            length: samples of the result, at most T hop - 1; (T - 1) hop when None (65,280 for the published 256
                frames).
            clip: limit the result to ±1, as published. Switch it off for losses on waveforms.
            backend: of the kernels, ``auto``, ``torch`` or ``triton``.

        Returns:
            [B, N, length].

        Raises:
            ConfigError: for shapes or a length that do not fit.
        """
        try:
            waveforms = synthesise(
                logits,
                mixture_stft,
                hop=self.spec.hop,
                length=length,
                align_corners=self.spec.align_corners,
                tables=self.tables,
                backend=backend,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return waveforms.clamp(-1.0, 1.0) if clip else waveforms

    def stft(self, signal: Tensor) -> Tensor:
        """[..., L] -> complex [..., bins, T], T = 1 + L // hop."""
        return stft(signal, hop=self.spec.hop, window=self.window.to(signal.dtype), padding=self.spec.padding)

    def istft(self, spectrum: Tensor, length: int | None = None) -> Tensor:
        """Complex [..., bins, T] -> [..., length], by default (T - 1) hop samples."""
        window = self.window.to(spectrum.real.dtype)
        return istft(spectrum, hop=self.spec.hop, window=window, length=length)

    def warp(self, x: Tensor) -> Tensor:
        """Linear to log frequency: [..., bins, T] -> [..., F, T]."""
        return self._reshaped(warp, x)

    def unwarp(self, x: Tensor) -> Tensor:
        """Log to linear frequency: [..., F, T] -> [..., bins, T]."""
        return self._reshaped(unwarp, x)

    def _reshaped(self, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        flat = x.reshape(1, -1, *x.shape[-2:])  # [1, M, rows, T]
        out = function(flat, self.tables, align_corners=self.spec.align_corners)
        return out.reshape(*x.shape[:-2], *out.shape[-2:])

"""What the seven-level audio encoders share."""

from __future__ import annotations

from torch import Tensor

from avsep.errors import ConfigError

__all__ = ["check_size"]


def check_size(spectrogram: Tensor, multiple: int, name: str) -> None:
    """Raise unless ``spectrogram`` [B, 1, F, T] can be halved seven times."""
    rows, frames = spectrogram.shape[-2:]
    if rows % multiple or frames % multiple:
        raise ConfigError(
            f"{name} halves its input seven times and needs F and T in multiples of {multiple}, got {rows} x {frames}: "
            "change the front end's log_rows or clip_samples"
        )

"""What the frame encoders share: uint8 to float, resizing, normalised convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.errors import ConfigError

__all__ = ["ConvNormReLU", "check_frames", "to_float"]


def check_frames(frames: Tensor, channels: int, name: str) -> None:
    """Raise unless ``frames`` is [B, K, channels, H, W] with at least one frame."""
    if frames.ndim != 5 or frames.shape[2] != channels or 0 in frames.shape[1:]:
        raise ConfigError(f"{name} takes frames [B, K, {channels}, H, W], got {list(frames.shape)}")


def to_float(frames: Tensor, size: int) -> Tensor:
    """Frames [B, c, H, W] (uint8 of 0..255, or float of 0..1) as float of -0.5..0.5, [B, c, size, size].

    Other sizes are resized by area, which keeps what a small frame can show of a large one.
    """
    scale = 1.0 if frames.is_floating_point() else 1.0 / 255.0
    x = (frames if frames.is_floating_point() else frames.to(torch.get_default_dtype())) * scale - 0.5
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="area")
    return x


class ConvNormReLU(nn.Sequential):
    """Convolution, group normalisation, ReLU. Group, not batch: teacher and student then see the same statistics."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=(kernel - 1) // 2, bias=False),
            nn.GroupNorm(min(4, out_channels), out_channels),
            nn.ReLU(),
        )

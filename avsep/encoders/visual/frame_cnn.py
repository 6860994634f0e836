"""A small trainable frame encoder for objects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avsep.encoders.base import VisualEncoder
from avsep.encoders.visual._frames import ConvNormReLU, check_frames, to_float
from avsep.registry import VISUAL_ENCODERS
from avsep.types import VisualSource

__all__ = ["FrameCNN"]


@VISUAL_ENCODERS.register(
    "frame_cnn",
    source="this library; sized for two CPU cores",
    example={"dim": 16, "size": 16, "channels": 4},
)
class FrameCNN(VisualEncoder):
    """Small trainable CNN on K colour frames; the maximum over frames is the object feature.

    ``dim`` is the feature width, ``frames`` K, ``size`` the side in pixels that frames of any size are brought to,
    ``channels`` the width of the first convolution.

    Shapes:
        frames [B, K, 3, H, W], uint8 0..255 or float 0..1 -> [B, dim].
    """

    provides = ("object",)
    size: int

    def __init__(self, *, dim: int = 64, frames: int = 3, size: int = 56, channels: int = 16) -> None:
        super().__init__()
        if min(dim, frames, channels) < 1 or size < 16 or channels % 4:
            raise ValueError(
                f"dim and frames must be positive, size at least 16, channels a multiple of 4: got dim {dim}, frames "
                f"{frames}, size {size}, channels {channels}"
            )
        self.dim = dim
        self.frames = frames
        self.size = size
        self.body = nn.Sequential(
            ConvNormReLU(3, channels, 5, 2),
            ConvNormReLU(channels, 2 * channels, 3, 2),
            ConvNormReLU(2 * channels, 4 * channels, 3, 2),
        )
        self.head = nn.Linear(8 * channels, dim)

    def source(self) -> VisualSource:
        return VisualSource(role="object", kind="frames", frames=self.frames)

    def forward(self, frames: Tensor) -> Tensor:
        check_frames(frames, 3, "frame_cnn")
        batch, count = frames.shape[:2]
        x = self.body(to_float(frames.flatten(0, 1), self.size))  # [B*K, 4c, h, w]
        pooled = torch.cat((x.mean(dim=(2, 3)), x.amax(dim=(2, 3))), dim=1)  # [B*K, 8c]
        features: Tensor = self.head(pooled)
        return features.reshape(batch, count, self.dim).amax(dim=1)

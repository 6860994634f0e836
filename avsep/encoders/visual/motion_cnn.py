"""A small trainable encoder of movement: frames and their differences, pooled in space, convolved in time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.encoders.base import VisualEncoder
from avsep.encoders.visual._frames import ConvNormReLU, check_frames, to_float
from avsep.registry import VISUAL_ENCODERS
from avsep.types import VisualSource

__all__ = ["MotionCNN"]


@VISUAL_ENCODERS.register(
    "motion_cnn",
    source="this library; sized for two CPU cores",
    example={"dim": 16, "steps": 3, "size": 16, "channels": 4},
)
class MotionCNN(VisualEncoder):
    """Small trainable CNN on grey frames and their differences, pooled to a few steps in time.

    ``dim`` is the feature width, ``steps`` the number Tm of time steps given out, ``size`` the side in pixels that
    frames of any size are brought to, ``channels`` the width of the first convolution. With ``grid`` above 0 it also
    looks where something is: at the means in ``grid`` x ``grid`` parts of the picture, besides the mean and the maximum
    over all of it. ``rate_hz`` is how many frames a
    second it is given, from stores and videos of any rate; 0: as many as a store has (videos: 8).

    Shapes:
        frames [B, M, 1, H, W], uint8 0..255 or float 0..1, in order of time -> [B, dim, steps].
    """

    provides = ("motion",)
    size: int
    steps: int

    def __init__(
        self, *, dim: int = 64, steps: int = 12, size: int = 48, channels: int = 8, grid: int = 0, rate_hz: float = 0.0
    ) -> None:
        super().__init__()
        if min(dim, steps, channels) < 1 or size < 16 or channels % 4:
            raise ValueError(
                f"dim and steps must be positive, size at least 16, channels a multiple of 4: got dim {dim}, steps "
                f"{steps}, size {size}, channels {channels}"
            )
        if not 0 <= rate_hz <= 1000:
            raise ValueError(f"rate_hz must lie between 0 and 1000, got {rate_hz}")
        if not 0 <= grid <= size // 8:
            raise ValueError(f"grid must lie between 0 and {size // 8}, an eighth of the size, got {grid}")
        self.dim = dim
        self.grid = grid
        self.rate_hz = rate_hz
        self.steps = steps
        self.size = size
        self.body = nn.Sequential(ConvNormReLU(3, channels, 5, 4), ConvNormReLU(channels, 2 * channels, 3, 2))
        self.temporal = nn.Conv1d((4 + 2 * grid**2) * channels, dim, 5, padding=2)
        self.head = nn.Conv1d(dim, dim, 1)

    def source(self) -> VisualSource:
        return VisualSource(role="motion", kind="frames", rate_hz=self.rate_hz)

    def forward(self, frames: Tensor) -> Tensor:
        check_frames(frames, 1, "motion_cnn")
        batch, count = frames.shape[:2]
        x = torch.unflatten(to_float(frames.flatten(0, 1), self.size), 0, (batch, count))  # [B, M, 1, s, s]
        # Differences are small next to the frames; signed and absolute, so that neither direction nor amount is lost.
        difference = 4.0 * F.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))  # the first frame has none
        x = torch.cat((x, difference, difference.abs()), dim=2).flatten(0, 1)  # [B*M, 3, s, s]
        x = self.body(x)  # [B*M, 2c, s/8, s/8]
        pooled = [x.mean(dim=(2, 3)), x.amax(dim=(2, 3))]
        if self.grid:
            pooled.append(F.adaptive_avg_pool2d(x, self.grid).flatten(1))
        joined = torch.cat(pooled, dim=1)  # [B*M, 4c + 2c g^2]
        sequence = torch.unflatten(joined, 0, (batch, count)).transpose(1, 2)  # [B, ., M]
        sequence = F.relu(self.temporal(sequence))  # [B, dim, M]
        features: Tensor = self.head(F.adaptive_avg_pool1d(sequence, self.steps))
        return features

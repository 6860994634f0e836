"""The visual stream of Co-Separation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.encoders._resnet import ResNet18
from avsep.encoders.base import VisualEncoder
from avsep.encoders.visual._frames import check_frames
from avsep.registry import VISUAL_ENCODERS
from avsep.types import VisualSource

__all__ = ["ResNet18Map"]

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, by which its weights were trained
_STD = (0.229, 0.224, 0.225)


@VISUAL_ENCODERS.register(
    "resnet18_map",
    source="Gao and Grauman, Co-Separating Sounds of Visual Objects, ICCV 2019",
    example={"dim": 16, "size": 32, "width": 8, "channels": 4},
)
class ResNet18Map(VisualEncoder, ResNet18):
    """Trainable ResNet-18 on K colour frames, its last map reduced to a vector; maximum over frames.

    The map is reduced by a 1x1 convolution to ``channels`` channels (with normalisation and ReLU) and a linear map to
    ``dim``, so that places in the frame count. ``frames`` is K, ``size`` the side in pixels that frames are resized
    to, ``width`` that of the first level. At the defaults it has 14,454,208 parameters. It starts from random weights;
    the published one starts from ImageNet's, whose names it shares.

    Shapes:
        frames [B, K, 3, H, W], uint8 0..255 or float 0..1 -> [B, dim].
    """

    provides = ("object",)
    size: int

    def __init__(
        self, *, dim: int = 512, frames: int = 1, size: int = 224, width: int = 64, channels: int = 128
    ) -> None:
        if min(dim, frames, channels) < 1 or size < 32 or size % 32:
            raise ValueError(
                f"dim, frames and channels must be positive, size a multiple of 32: got dim {dim}, frames {frames}, "
                f"channels {channels}, size {size}"
            )
        super().__init__(in_channels=3, width=width)
        self.dim = dim
        self.frames = frames
        self.size = size
        self.conv1x1 = nn.Sequential(nn.Conv2d(self.channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.fc = nn.Linear(channels * (size // 32) ** 2, dim)
        for layer in (self.conv1x1[0], self.fc):
            nn.init.normal_(layer.weight, 0.0, 0.02)  # type: ignore[arg-type]

    def source(self) -> VisualSource:
        return VisualSource(role="object", kind="frames", frames=self.frames)

    def forward(self, frames: Tensor) -> Tensor:
        check_frames(frames, 3, "resnet18_map")
        batch, count = frames.shape[:2]
        x = frames.flatten(0, 1)  # [B*K, 3, H, W]
        x = x if x.is_floating_point() else x.to(self.fc.weight.dtype) / 255.0
        if x.shape[-2:] != (self.size, self.size):
            larger = min(x.shape[-2:]) > self.size
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=larger)
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (_MEAN, _STD))
        x = self.conv1x1(self.features((x - mean) / std))  # [B*K, channels, size/32, size/32]
        features: Tensor = self.fc(x.flatten(1))
        return features.reshape(batch, count, self.dim).amax(dim=1)

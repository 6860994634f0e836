"""ResNet-18, the frame encoder of Sound of Pixels and Co-Separation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from avsep.encoders.hub import HubModel
from avsep.encoders.visual._pretrained import FrozenFrameEncoder
from avsep.registry import VISUAL_ENCODERS

__all__ = ["ResNet18"]


@VISUAL_ENCODERS.register(
    "resnet18", source="He et al., CVPR 2016; as used by Sound of Pixels (ECCV 2018) and Co-Separation (ICCV 2019)"
)
class ResNet18(FrozenFrameEncoder):
    """Frozen ImageNet features (512-d) of K frames, maximum over places and frames; needs the extra ``vision``.

    Parameters, shapes and errors as :class:`~avsep.encoders.visual.clip.ClipViTB32`.
    """

    hub = HubModel("microsoft/resnet-18", "65a5785d9156231087c481e0c7dd33a5ff6f7e3e", "Apache-2.0")
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    resized = 256

    def _kind(self, transformers: Any, folder: Path | None) -> tuple[Any, Any]:
        config = transformers.ResNetConfig
        if folder is not None:
            return transformers.ResNetModel, config.from_pretrained(folder)
        sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
        return transformers.ResNetModel, config(**sizes)

    def _set_sizes(self, config: Any) -> None:
        self.dim, self.size = int(config.hidden_sizes[-1]), 224

    def _features(self, frames: Tensor) -> Tensor:
        maps: Tensor = self.model(pixel_values=frames).last_hidden_state
        return maps.amax(dim=(2, 3))

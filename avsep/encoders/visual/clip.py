"""Image encoders trained with language: CLIP, which the paper uses, and SigLIP 2, a stronger one of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from avsep.encoders.hub import HubModel
from avsep.encoders.visual._pretrained import FrozenFrameEncoder
from avsep.registry import VISUAL_ENCODERS

__all__ = ["ClipViTB32", "SigLIP2Base"]


@VISUAL_ENCODERS.register(
    "clip_vit_b32", source="Radford et al., CLIP, ICML 2021; as used by ContAV-Sep (NeurIPS 2024)"
)
class ClipViTB32(FrozenFrameEncoder):
    """Frozen CLIP ViT-B/32 image embeddings (512-d) of K frames, maximum over them; needs the extra ``vision``.

    ``frames`` is K, ``weights`` a folder of them or ``auto`` (``AVSEP_WEIGHTS``, the hub's cache, a download),
    ``batch`` the frames encoded at once.

    Shapes:
        frames [B, K, 3, H, W], uint8 0..255 or float 0..1 -> [B, 512].

    Raises:
        MissingExtraError: without the ``transformers`` library.
        MissingWeightsError: where the weights are not here and cannot be downloaded.
    """

    hub = HubModel("openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268", "MIT")
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def _kind(self, transformers: Any, folder: Path | None) -> tuple[Any, Any]:
        config = transformers.CLIPVisionConfig  # its defaults are ViT-B/32
        return transformers.CLIPVisionModelWithProjection, config() if folder is None else config.from_pretrained(
            folder
        )

    def _set_sizes(self, config: Any) -> None:
        self.dim, self.size = int(config.projection_dim), int(config.image_size)

    def _features(self, frames: Tensor) -> Tensor:
        features: Tensor = self.model(pixel_values=frames).image_embeds
        return features


@VISUAL_ENCODERS.register("siglip2_base", source="Tschannen et al., SigLIP 2, arXiv 2502.14786, 2025")
class SigLIP2Base(FrozenFrameEncoder):
    """Frozen SigLIP 2 base (patch 16, 224 pixels) image embeddings (768-d) of K frames, maximum over them.

    Parameters, shapes and errors as :class:`ClipViTB32`.
    """

    hub = HubModel("google/siglip2-base-patch16-224", "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2", "Apache-2.0")
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    square = True
    mode = "bilinear"

    def _kind(self, transformers: Any, folder: Path | None) -> tuple[Any, Any]:
        config = transformers.SiglipVisionConfig  # its defaults are base, patch 16, 224 pixels
        return transformers.SiglipVisionModel, config() if folder is None else config.from_pretrained(folder)

    def _set_sizes(self, config: Any) -> None:
        self.dim, self.size = int(config.hidden_size), int(config.image_size)

    def _features(self, frames: Tensor) -> Tensor:
        features: Tensor = self.model(pixel_values=frames).pooler_output
        return features

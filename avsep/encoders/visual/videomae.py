"""VideoMAE, the paper's motion encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avsep.encoders.hub import HubModel
from avsep.encoders.visual._frames import check_frames
from avsep.encoders.visual._pretrained import FrozenPretrained, prepare_frames
from avsep.errors import ConfigError
from avsep.registry import VISUAL_ENCODERS
from avsep.types import VisualSource

__all__ = ["VideoMAEBase", "spread_frames"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def spread_frames(count: int, wanted: int) -> Tensor:
    """Which of ``count`` frames are taken: ``wanted`` of them spread over the whole video, int64 [min(count, wanted)].

    The first and the last are among them.
    """
    if count <= wanted:
        return torch.arange(count)
    return torch.linspace(0, count - 1, wanted).round().long()


@VISUAL_ENCODERS.register(
    "videomae_base", source="Tong et al., VideoMAE, NeurIPS 2022; as used by ContAV-Sep (NeurIPS 2024)"
)
class VideoMAEBase(FrozenPretrained):
    """Frozen VideoMAE-base motion features (768 x 8) of a whole video; needs the extra ``vision``.

    16 frames spread over the video (zeros where it has fewer) become 8 x 14 x 14 tokens, of which the maximum over the
    places is kept. ``weights`` is a folder of them or ``auto`` (``AVSEP_WEIGHTS``, the hub's cache, a download). The
    published weights are licensed CC BY-NC 4.0.

    Shapes:
        frames [B, M, 3 or 1, H, W], uint8 0..255 or float 0..1, in order of time -> [B, 768, 8].

    Raises:
        MissingExtraError: without the ``transformers`` library.
        MissingWeightsError: where the weights are not here and cannot be downloaded.
    """

    provides = ("motion",)
    extracts = ("motion",)
    size: int
    steps: int
    hub = HubModel("MCG-NJU/videomae-base", "dc740ceda42fce44faed2ea03c6d447db72f6af9", "CC-BY-NC-4.0")

    def __init__(self, *, weights: str = "auto") -> None:
        super().__init__()
        self._load(weights)

    def _kind(self, transformers: Any, folder: Path | None) -> tuple[Any, Any]:
        config = transformers.VideoMAEConfig
        if folder is not None:
            return transformers.VideoMAEModel, config.from_pretrained(folder)
        return transformers.VideoMAEModel, config(use_mean_pooling=False)  # as pretrained, with the last normalisation

    def _set_sizes(self, config: Any) -> None:
        self.dim, self.size, self.frames = int(config.hidden_size), int(config.image_size), int(config.num_frames)
        self.steps = self.frames // int(config.tubelet_size)

    def source(self) -> VisualSource:
        return VisualSource(role="motion", kind="frames")

    def forward(self, frames: Tensor) -> Tensor:
        if frames.ndim == 5 and frames.shape[2] == 1:
            frames = frames.expand(-1, -1, 3, -1, -1)  # grey frames
        elif frames.ndim != 5 or frames.shape[2] != 3 or 0 in frames.shape[1:]:
            raise ConfigError(f"videomae_base takes frames [B, M, 3 or 1, H, W], got {list(frames.shape)}")
        check_frames(frames, 3, "videomae_base")
        frames = frames[:, spread_frames(frames.shape[1], self.frames).to(frames.device)]
        x = prepare_frames(frames.flatten(0, 1), self.size, _MEAN, _STD, mode="bilinear")
        x = torch.unflatten(x, 0, frames.shape[:2])
        if missing := self.frames - x.shape[1]:
            x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)
        tokens: Tensor = self.model(pixel_values=x).last_hidden_state  # [B, steps * places, D]
        return torch.unflatten(tokens, 1, (self.steps, -1)).amax(dim=2).transpose(1, 2)  # [B, D, steps]

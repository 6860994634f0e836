"""Stored features (CLIP, VideoMAE or any others) passed through."""

from __future__ import annotations

from torch import Tensor

from avsep.encoders.base import VisualEncoder
from avsep.errors import ConfigError
from avsep.registry import VISUAL_ENCODERS
from avsep.types import VisualSource

__all__ = ["Precomputed"]


@VISUAL_ENCODERS.register(
    "precomputed",
    source="Pian et al., ContAV-Sep, NeurIPS 2024: frozen CLIP and VideoMAE features",
    example={"features": "stored", "dim": 8},
)
class Precomputed(VisualEncoder):
    """Features stored with the clips: objects by maximum over consecutive frames, motion as it is.

    ``features`` is their name in the store, ``dim`` their width, ``frames`` the K consecutive object vectors taken
    around the crop's centre. ``role`` (object or motion) is set by the composer.

    Shapes:
        object [B, K, dim] -> [B, dim]; motion [B, dim, Tm] -> [B, dim, Tm].
    """

    provides = ("object", "motion")
    frozen = True

    def __init__(self, *, features: str, dim: int, frames: int = 3, role: str = "object") -> None:
        super().__init__()
        if dim < 1 or frames < 1:
            raise ValueError(f"dim and frames must be positive, got {dim} and {frames}")
        self.features = features
        self.dim = dim
        self.frames = frames
        self.role = role

    def source(self) -> VisualSource:
        frames = self.frames if self.role == "object" else 0
        return VisualSource(role=self.role, kind="features", name=self.features, dim=self.dim, frames=frames)

    def forward(self, features: Tensor) -> Tensor:
        axis = 2 if self.role == "object" else 1
        if features.ndim != 3 or features.shape[axis] != self.dim:
            layout = f"[B, K, {self.dim}]" if self.role == "object" else f"[B, {self.dim}, Tm]"
            raise ConfigError(
                f"{self.role} features '{self.features}' have the shape {list(features.shape)}, but the separator "
                f"takes {layout}: use features of width {self.dim}, or set the encoder's dim"
            )
        return features.amax(dim=1) if self.role == "object" else features

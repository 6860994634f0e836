"""Projections of features back to those of the task before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from avsep.adapters.base import FeatureAdapter
from avsep.registry import ADAPTERS
from avsep.types import AdapterPlace, AudioFeatures

__all__ = ["Projection"]


class _Projections(nn.ModuleDict):
    """The projections of one task, by the name of the map [B, C, H, W]: x + D x + b at every point.

    As a change D [C, C, 1, 1] of the identity, so that 0 leaves every bit as it is and weight decay leads back there.
    """

    def __init__(self, places: Sequence[AdapterPlace]) -> None:
        super().__init__({place.parameter: nn.Conv2d(place.shape[0], place.shape[0], 1) for place in places})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, audio: AudioFeatures) -> AudioFeatures:
        found: dict[str, Any] = {}
        for name, change in self.items():
            maps = getattr(audio, name)
            found[name] = maps + change(maps)
        return replace(audio, **found)


@ADAPTERS.register(
    "projection",
    source="Cotogni et al., Gated Class-Attention and Cascaded Feature Drift Compensation, IJCV 2025",
)
class Projection(FeatureAdapter):
    """The audio features of task t become those of task t - 1 by one affine map of channels each; the newest stay.

    Those of an older task go through the projections of all later ones, newest first. Projected are, of the mask
    features and the latent, those that the mask decoder reads; a decoder that reads other maps, such as skips, is
    refused, and methods that compare maps get all maps as they are. A projection begins as the identity, and is
    trained by the strategy ``drift_compensation``. With C channels it costs C (C + 1) parameters a task: 65,792 of the
    published latent and 1,056 of the mask features. The audio encoder runs once, however many tasks are in a batch.
    """

    differs = (
        "Maps of a U-Net stand for tokens of a transformer. That a projection is one affine map is this library's "
        "choice."
    )

    def __init__(self, *, places: Sequence[AdapterPlace]) -> None:
        super().__init__(places)

    def new_task(self) -> nn.Module:
        return _Projections(self.places)

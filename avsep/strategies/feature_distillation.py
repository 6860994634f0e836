"""Feature distillation: the audio encoder goes on giving the features of the previous task's separator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy
from avsep.strategies.teaching import check_weights

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.types import AudioFeatures

__all__ = ["FeatureDistillation"]


@STRATEGIES.register(
    "feature_distillation",
    source="Smith et al., A Closer Look at Rehearsal-Free Continual Learning, CVPRW 2023",
)
class FeatureDistillation(Strategy):
    """Keep the audio features of all mixtures close to the previous task's; combine it with any method.

    L = L_sep + ``weight`` mean (F - F')^2, F the mask features of the student and F' of the teacher, mean over
    mixtures, channels and pixels. Where the way up is the mask decoder's, which leaves the encoder without mask
    features, its latent takes their place. PLOP compares statistics of many maps; this pins one map at every point.
    """

    across_ranks = True
    differs = "The features are those that masks are made of; the source has the last layer before a classifier."

    def __init__(self, *, weight: float = 1.0) -> None:
        check_weights(weight=weight)
        self.weight = weight
        self.needs_teacher = weight > 0

    def first_task(self) -> dict[str, Any]:
        return {}

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.teacher is not None and self.weight > 0:
            distance = _features(step.audio) - _features(step.teacher_output().audio)
            terms["audio_features"] = self.weight * distance.square().mean()
        return terms


def _features(audio: AudioFeatures) -> Tensor:
    """At least in float32: squares of 16-bit floats would not do."""
    features = audio.latent if audio.mask_features is None else audio.mask_features
    return features.to(torch.promote_types(features.dtype, torch.float32))

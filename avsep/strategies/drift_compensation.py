"""Drift compensation: the audio encoder goes on learning, and projections lead its features back to old decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.adapters import FeatureAdapter
from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import NewRows, check_weights

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator
    from avsep.types import AudioFeatures

__all__ = ["DriftCompensation"]


@STRATEGIES.register(
    "drift_compensation",
    source="Cotogni et al., Gated Class-Attention and Cascaded Feature Drift Compensation, IJCV 2025: the compensation",
)
class DriftCompensation(Strategy):
    """Train the audio encoder on, with projections of its features to those of the task before; asks for no exemplars.

    L = L_sep + ``weight`` times the sum, over the maps that are projected, of mean ||P_t(x) - x'||_2: x is a map of the
    student and x' the teacher's of the same mixtures, each as its own encoder gives it, the norm is over channels and
    the mean over mixtures and points. The gradient reaches the encoder too, which may drift where P_t can follow.
    With ``weight`` 0 nothing but exemplars, whose sources go through P_t, trains it: without any it stays the identity.

    Needs a separator with projections (``separator.adapter=projection``), which decodes a source of a class that came
    with task j from P_(j+1)(... P_t(x)). From the second task on the audio encoder, P_t and the new classes' rows learn
    alone: visual encoders, mask decoder and old rows keep their values to the last bit, as do running statistics, so
    that projections are trained on the features that they are used with. Projections of earlier tasks are not touched.
    """

    across_ranks = True
    freezes = True
    fits_weights = True  # projections are of the encoder that they were trained beside
    differs = (
        "The gated class-attention and the sparsity of its gates are left out (a task's own parameters are "
        "task_adapters): the mask decoder is frozen in its place. The class says how far back a source's features "
        "go. Features are compared point by point of each map; running statistics, which a transformer does not have, "
        "stay those of the first task."
    )

    def __init__(self, *, weight: float = 0.001) -> None:
        check_weights(weight=weight)
        self.weight = weight
        self.needs_teacher = weight > 0
        self._rows: list[NewRows] = []

    def check(self, separator: Separator) -> None:
        if not any(isinstance(adapter, FeatureAdapter) for adapter in separator.adapters()):
            raise ConfigError(
                "strategy 'drift_compensation' trains projections of features, and the separator has none: set "
                "separator.adapter=projection"
            )

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._rows = []
        if ctx.task.index == 0:
            return
        student = ctx.student
        # not where a method beside this one holds them, nor projections of earlier tasks
        learning = {name: p for name, p in student.named_parameters() if p.requires_grad}
        student.freeze()
        for name, parameter in learning.items():
            old = ctx.old_shapes.get(name)
            if name.startswith("audio_encoder."):
                parameter.requires_grad_(True)
            elif name.startswith("mask_decoder.") and old is not None and old != tuple(parameter.shape):
                self._rows.append(NewRows(parameter, old[0]))

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.teacher is None or not self.needs_teacher:
            return terms
        adapter = next(a for a in step.student.adapters() if isinstance(a, FeatureAdapter))
        found, before = adapter.tasks[-1](step.audio), step.teacher_output().audio
        distances = [_distance(found, before, place.parameter) for place in adapter.places]
        terms["drift_compensation"] = self.weight * torch.stack(distances).sum()
        return terms

    def after_step(self, step: Step) -> None:
        for rows in self._rows:
            rows.restore()


def _distance(found: AudioFeatures, before: AudioFeatures, name: str) -> Tensor:
    """The norm over channels of a map's difference [B, C, H, W], mean over B, H and W; at least in float32."""
    difference = getattr(found, name) - getattr(before, name)
    precise = difference.to(torch.promote_types(difference.dtype, torch.float32))
    distance: Tensor = torch.linalg.vector_norm(precise, dim=1).mean()
    return distance

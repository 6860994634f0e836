"""Topology preservation: how the sources of a batch resemble each other stays what it was for the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.losses import relation_divergence
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy
from avsep.strategies.teaching import check_objects, check_temperature, check_weights, taught_embeddings

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["Topology"]


@STRATEGIES.register("topology", source="Zhu et al., CTP, ICCV 2023: topology preservation")
class Topology(Strategy):
    """Keep the teacher's similarities between the motion and object embeddings of a batch's sources.

    L = L_sep + ``weight`` (K_mo + K_om) / 2 + ``weight`` (K_mm + K_oo) / 2, where K_xy is the divergence of the
    student's similarities between embeddings x and y of all sources, new ones too, from the teacher's, at
    ``temperature`` (:func:`avsep.losses.relation_divergence`); no source is compared with itself within a modality.
    Without a motion encoder the term is ``weight`` K_oo.

    The projections that it holds know no class, so it needs no exemplars. A rotation of all embeddings together costs
    nothing, though what reads them does not turn with them: it goes beside another method.
    """

    across_ranks = True
    differs = (
        "The similarities of motion and object stand for those of image and text. CTP's momentum model, which its "
        "contrastive loss needs, and its distillation of masked words are left out."
    )

    def __init__(self, *, weight: float = 1.0, temperature: float = 0.07) -> None:
        check_weights(weight=weight)
        check_temperature(temperature)
        self.weight = weight
        self.temperature = temperature
        self.needs_teacher = weight > 0

    def check(self, separator: Separator) -> None:
        check_objects(separator, "topology", "compares embeddings of objects")

    def first_task(self) -> dict[str, Any]:
        return {}

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.teacher is None or not self.needs_teacher:
            return terms
        own, theirs = taught_embeddings(step)

        def divergence(x: str, y: str) -> Tensor:
            return relation_divergence(
                own[x], own[y], theirs[x], theirs[y], temperature=self.temperature, include_self=x != y
            )

        kinds = [[(x, x) for x in own], [(x, y) for x in own for y in own if x != y]]
        means = [torch.stack([divergence(x, y) for x, y in pairs]).mean() for pairs in kinds if pairs]
        terms["topology"] = self.weight * torch.stack(means).sum()
        return terms

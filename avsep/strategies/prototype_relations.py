"""Prototype-sample relation distillation: which sources resemble an old class more than others stays what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from avsep.losses import relation_divergence
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import (
    check_objects,
    check_temperature,
    check_weights,
    taught_embeddings,
    visual_embeddings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["PrototypeRelations"]


@STRATEGIES.register(
    "prototype_relations",
    source="Asadi et al., Prototype-Sample Relation Distillation, ICML 2023",
    example={"mixtures": 16},
)
class PrototypeRelations(Strategy):
    """Keep how each old class's prototype ranks the sources of a batch; needs no exemplars.

    L = L_sep + ``weight`` K, where K is the divergence between the student's and the teacher's softmax, over all
    sources of the batch, of the cosines with each old class's prototype at ``temperature``
    (:func:`avsep.losses.relation_divergence`); the mean over old classes, and over the object and the motion embedding.

    The prototype of a class is the mean of its sources' embeddings at length 1, over ``mixtures`` training mixtures, by
    the separator that its task left. Unlike topology, which compares sources with each other, it holds the embeddings
    to fixed directions: they cannot turn together.
    """

    across_ranks = True
    keeps = "Of every old class a mean embedding of the object and of the motion, 4 bytes a number (2 kB at width 256)"
    differs = (
        "The original learns its prototypes, by a loss whose minimum is the mean direction that is taken here, and "
        "lets old ones follow the distillation; here they are fixed. Its contrastive loss is left out."
    )

    def __init__(self, *, weight: float = 1.0, temperature: float = 0.07, mixtures: int = 256) -> None:
        check_weights(weight=weight)
        check_temperature(temperature)
        if mixtures < 1:
            raise ValueError(f"mixtures must be at least 1, got {mixtures}")
        self.weight = weight
        self.temperature = temperature
        self.mixtures = mixtures
        self.needs_teacher = weight > 0
        self._prototypes: dict[str, Tensor] = {}  # [Q, D] of each modality; 0 of a class that was not met

    def check(self, separator: Separator) -> None:
        check_objects(separator, "prototype_relations", "compares embeddings of objects")

    def first_task(self) -> dict[str, Any]:
        return {}

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.teacher is None or not self.needs_teacher:
            return terms
        own, theirs = taught_embeddings(step)
        divergences = []
        for name, prototypes in self._prototypes.items():
            rows = prototypes.to(own[name].device)
            divergences.append(relation_divergence(rows, own[name], rows, theirs[name], temperature=self.temperature))
        terms["relations"] = self.weight * torch.stack(divergences).mean()
        return terms

    @torch.no_grad()
    def after_task(self, ctx: TaskContext) -> None:
        if ctx.is_last or self.weight == 0:
            self._prototypes = {}
            return
        first, last = len(ctx.task.old), len(ctx.task.seen)
        sums: dict[str, Tensor] = {}
        for batch in ctx.data.batches(self.mixtures, batch_size=16):
            is_new = batch.class_ids >= first
            for name, value in visual_embeddings(ctx.student.predict(batch).output).items():
                units = F.normalize(value[is_new].double(), dim=1).cpu()
                total = sums.setdefault(name, units.new_zeros(last - first, units.shape[1]))
                total.index_add_(0, (batch.class_ids[is_new] - first).cpu(), units)
        new = {name: F.normalize(total, dim=1).float() for name, total in sums.items()}
        old = self._prototypes
        self._prototypes = {name: torch.cat((old[name], rows)) if old else rows for name, rows in new.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._prototypes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prototypes = dict(state)

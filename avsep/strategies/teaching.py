"""What strategies with a teacher share: which mixtures it is asked about, what it answers, and checks of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator
    from avsep.strategies.base import Step
    from avsep.types import MaskOutput, VisualFeatures

__all__ = ["ask", "check_weights", "embeddings", "gathered", "known_class_ids", "old_mixtures"]


def old_mixtures(step: Step) -> Tensor:
    """int64 [M]: the mixtures that own a slot of an earlier task's class."""
    return torch.nonzero(step.is_old.any(dim=1)).squeeze(1)


def known_class_ids(step: Step) -> Tensor:
    """[B, N]: the class ids where the teacher knows them, elsewhere 0, since it has no slot for a new class."""
    return step.batch.class_ids.where(step.is_old, 0)


@torch.no_grad()
def ask(
    teacher: Separator, step: Step, class_ids: Tensor, mixtures: Tensor | None = None
) -> tuple[MaskOutput, VisualFeatures]:
    """The teacher's masks and visual features for the mixtures of a step.

    Args:
        class_ids: [B, N], what is asked of each slot; each below the teacher's ``num_classes``.
        mixtures: int64 [M], the mixtures that are asked about; all B when None.
    """
    found = teacher.predict(step.batch, class_ids=class_ids, spectrograms=step.spectrograms, mixtures=mixtures)
    return found.output, found.visual


def embeddings(output: MaskOutput) -> dict[str, Tensor]:
    """Audio, motion and object embeddings as [B N, D]; a modality the decoder does not have is left out."""
    named = {"audio": output.audio, "motion": output.motion, "object": output.object}
    return {name: value.flatten(0, 1) for name, value in named.items() if value is not None}


def gathered(step: Step, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows [n, D] by name, followed through by those of all ranks: [world n, D]."""
    return {name: step.ranks.gather(value) for name, value in rows.items()}


def check_weights(**weights: float) -> None:
    """Raise ValueError for a weight that is negative or no number."""
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")

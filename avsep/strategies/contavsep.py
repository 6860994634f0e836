"""ContAV-Sep: cross-modal similarity distillation (CrossSDC) and mask distillation.

Pian et al., Continual Audio-Visual Sound Separation, NeurIPS 2024, equations 6 to 13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from avsep.losses import cross_sdc, mask_losses
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy
from avsep.types import MaskOutput

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["ContAVSep"]


@STRATEGIES.register("contavsep", source="Pian et al., ContAV-Sep, NeurIPS 2024, eqs. 6-13")
class ContAVSep(Strategy):
    """CrossSDC and mask distillation against the previous task's separator.

    L = L_sep + ``weight_instance`` L_ins + ``weight_class`` L_cls + ``weight_mask`` L_dist, with

    - L_ins, L_cls: symmetric contrastive losses between every two of the audio, object and motion embeddings of the
      rows [new slots by the student; old slots by the student; old slots by the teacher], positives being the rows of
      the same video or of the same class, at ``temperature``. On the first task and in batches without an old slot
      they run over the student's slots alone;
    - L_dist: weighted L1 between the student's and the teacher's masks of the old slots.

    A weight of 0 switches its term off (and saves its work). ``teacher_batch_norm="train"`` reproduces the published
    code, whose teacher runs with batch statistics over the whole batch; the default keeps it frozen.
    """

    needs_teacher = True

    def __init__(
        self,
        *,
        weight_instance: float = 0.1,
        weight_class: float = 0.3,
        weight_mask: float = 0.3,
        temperature: float = 0.05,
        teacher_batch_norm: Literal["eval", "train"] = "eval",
    ) -> None:
        for name, value in (
            ("weight_instance", weight_instance),
            ("weight_class", weight_class),
            ("weight_mask", weight_mask),
        ):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if teacher_batch_norm not in ("eval", "train"):
            raise ValueError(f"teacher_batch_norm must be 'eval' or 'train', got {teacher_batch_norm!r}")
        self.weight_instance = weight_instance
        self.weight_class = weight_class
        self.weight_mask = weight_mask
        self.temperature = temperature
        self.teacher_batch_norm = teacher_batch_norm

    def first_task(self) -> dict[str, Any]:
        weights = {"weight_instance": self.weight_instance, "weight_class": self.weight_class}
        return {**weights, "temperature": self.temperature} if any(weights.values()) else {}

    def loss(self, student: Separator, teacher: Separator | None, step: Step) -> dict[str, Tensor]:
        contrast = self.weight_instance > 0 or self.weight_class > 0
        taught: MaskOutput | None = None
        mixtures: Tensor | None = None
        if teacher is not None and (contrast or self.weight_mask > 0):
            mixtures = torch.nonzero(step.is_old.any(dim=1)).squeeze(1)  # those that own an old slot
            if len(mixtures):
                taught, mixtures = self._teach(teacher, step, mixtures)
        losses = mask_losses(
            step.output,
            step.spectrograms,
            taught=taught if self.weight_mask > 0 else None,
            mixtures=mixtures,
            slots=step.is_old,
        )
        terms = {"separation": losses.separation}
        if contrast:
            instance, class_ = self._contrast(step, taught, mixtures)
            if self.weight_instance > 0:
                terms["instance"] = self.weight_instance * instance
            if self.weight_class > 0:
                terms["class"] = self.weight_class * class_
        if taught is not None and self.weight_mask > 0:
            terms["mask"] = self.weight_mask * losses.distillation
        return terms

    @torch.no_grad()
    def _teach(self, teacher: Separator, step: Step, mixtures: Tensor) -> tuple[MaskOutput, Tensor]:
        """The teacher's output for the mixtures that own an old slot. Its new slots mean nothing: never read them."""
        if self.teacher_batch_norm == "train":
            teacher.train()
            mixtures = torch.arange(len(step.is_old), device=mixtures.device)
        else:
            teacher.eval()
        batch = step.batch
        visual = teacher.encode_visual(
            None if batch.object is None else batch.object[mixtures],
            None if batch.motion is None else batch.motion[mixtures],
            None if batch.motion_mask is None else batch.motion_mask[mixtures],
        )
        # the teacher has no slot for a new class: any slot will do, since only old slots are read
        class_ids = batch.class_ids[mixtures].where(step.is_old[mixtures], 0)
        return teacher(step.spectrograms.network_input[mixtures], visual, class_ids), mixtures

    def _contrast(self, step: Step, taught: MaskOutput | None, mixtures: Tensor | None) -> tuple[Tensor, Tensor]:
        student = _embeddings(step.output)  # [B N, D] each
        teacher_embeddings, rows = None, None
        if taught is not None and mixtures is not None:
            n = step.is_old.shape[1]
            slots = torch.nonzero(step.is_old[mixtures].flatten()).squeeze(1)  # old slots among the taught ones
            teacher_embeddings = {name: value[slots] for name, value in _embeddings(taught).items()}
            rows = mixtures[slots // n] * n + slots % n  # the same slots among all of the batch
        return cross_sdc(
            student,
            step.batch.class_ids.flatten(),
            step.batch.video_ids.flatten(),
            teacher=teacher_embeddings,
            teacher_rows_index=rows,
            temperature=self.temperature,
        )


def _embeddings(output: MaskOutput) -> dict[str, Tensor]:
    """Audio, motion and object embeddings as [B N, D]; a modality the decoder does not have is left out."""
    named = {"audio": output.audio, "motion": output.motion, "object": output.object}
    return {name: value.flatten(0, 1) for name, value in named.items() if value is not None}

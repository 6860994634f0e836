"""ContAV-Sep: cross-modal similarity distillation (CrossSDC) and mask distillation.

Pian et al., Continual Audio-Visual Sound Separation, NeurIPS 2024, equations 6 to 13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from avsep.errors import ConfigError
from avsep.losses import cross_sdc, mask_losses
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TeacherOutput
from avsep.strategies.teaching import check_objects, check_temperature, check_weights, embeddings

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["ContAVSep"]


@STRATEGIES.register("contavsep", source="Pian et al., ContAV-Sep, NeurIPS 2024, eqs. 6-13")
class ContAVSep(Strategy):
    """CrossSDC and mask distillation against the previous task's separator.

    L = L_sep + ``weight_instance`` L_ins + ``weight_class`` L_cls + ``weight_mask`` L_dist, with

    - L_ins, L_cls: symmetric contrastive losses between every two of the audio, object and motion embeddings of the
      rows [the student's new sources; the student's old sources; the teacher's old sources], positives being the rows
      of the same video or of the same class, at ``temperature``. On the first task and in batches without an old source
      they run over the student's sources alone. A decoder without a modality drops its pairs, and the mean is over the
      others;
    - L_dist: weighted L1 between the student's and the teacher's masks of the old sources.

    A weight of 0 switches its term off (and saves its work). ``teacher_batch_norm="train"`` reproduces the published
    code, whose teacher runs with batch statistics over the whole batch; the default keeps it frozen. So does
    ``instance="features"``, where two sources are of one video when their projected motion features are equal bit by
    bit (new sources by the student, old ones by the teacher); motion that is read from the crop then tells crops apart.
    ``modality_pairs="within"`` is the uni-modal variant: each modality against itself, no row against itself.
    """

    across_ranks = True

    def __init__(
        self,
        *,
        weight_instance: float = 0.1,
        weight_class: float = 0.3,
        weight_mask: float = 0.3,
        temperature: float = 0.05,
        instance: Literal["id", "features"] = "id",
        modality_pairs: Literal["cross", "within"] = "cross",
        teacher_batch_norm: Literal["eval", "train"] = "eval",
    ) -> None:
        check_weights(weight_instance=weight_instance, weight_class=weight_class, weight_mask=weight_mask)
        check_temperature(temperature)
        if instance not in ("id", "features"):
            raise ValueError(f"instance must be 'id' or 'features', got {instance!r}")
        if modality_pairs not in ("cross", "within"):
            raise ValueError(f"modality_pairs must be 'cross' or 'within', got {modality_pairs!r}")
        if teacher_batch_norm not in ("eval", "train"):
            raise ValueError(f"teacher_batch_norm must be 'eval' or 'train', got {teacher_batch_norm!r}")
        self.weight_instance = weight_instance
        self.weight_class = weight_class
        self.weight_mask = weight_mask
        self.temperature = temperature
        self.instance = instance
        self.modality_pairs = modality_pairs
        self.teacher_batch_norm = teacher_batch_norm
        self.needs_teacher = weight_instance > 0 or weight_class > 0 or weight_mask > 0

    def check(self, separator: Separator) -> None:
        if self.modality_pairs == "cross" and (self.weight_instance > 0 or self.weight_class > 0):
            otherwise = "set modality_pairs=within, or weight_instance and weight_class to 0"
            check_objects(separator, "contavsep", "compares what is heard with what is seen", otherwise)
        if self.instance == "features" and self.weight_instance > 0 and separator.motion_encoder is None:
            raise ConfigError(
                "strategy 'contavsep' with instance=features compares motion features, and this separator has no "
                "motion encoder: use instance=id"
            )

    def first_task(self) -> dict[str, Any]:
        weights = {"weight_instance": self.weight_instance, "weight_class": self.weight_class}
        used: dict[str, Any] = {name: value for name, value in weights.items() if value > 0}
        if "weight_instance" in used:
            used["instance"] = self.instance
        if not used:
            return {}
        return {**used, "temperature": self.temperature, "contrast": self.modality_pairs}

    def loss(self, step: Step) -> dict[str, Tensor]:
        teacher_output: TeacherOutput | None = None
        distils = step.teacher is not None and self.needs_teacher and step.any_old
        faithful = self.teacher_batch_norm == "train"
        if distils and (faithful or len(step.old_mixtures)):
            teacher_output = step.teacher_output(old_mixtures=not faithful, batch_statistics=faithful)
        losses = mask_losses(
            step.output,
            step.spectrograms,
            teacher_output=teacher_output.output if teacher_output is not None and self.weight_mask > 0 else None,
            mixtures=None if teacher_output is None else teacher_output.mixtures,
            counted=step.is_old,
        )
        terms = {"separation": losses.separation}
        if self.weight_instance > 0 or self.weight_class > 0:
            instance, class_ = self._contrast(step, teacher_output, distils)
            if self.weight_instance > 0:
                terms["instance"] = self.weight_instance * instance
            if self.weight_class > 0:
                terms["class"] = self.weight_class * class_
        if distils and self.weight_mask > 0:
            terms["mask"] = self.weight_mask * step.mean_over(step.is_old, losses.distillation)
        return terms

    def _contrast(self, step: Step, teacher_output: TeacherOutput | None, distils: bool) -> tuple[Tensor, Tensor]:
        own = embeddings(step.output)  # [B, N, D] each
        student = {name: step.gather(value).flatten(0, 1) for name, value in own.items()}
        teacher, rows = None, None
        if distils:
            theirs = {name: torch.zeros_like(value, requires_grad=False) for name, value in own.items()}
            if teacher_output is not None:
                found = embeddings(teacher_output.output)
                theirs = {name: teacher_output.spread(found[name]).to(value.dtype) for name, value in own.items()}
            rows = torch.nonzero(step.all_old.flatten()).squeeze(1)  # the sources of earlier tasks among all
            teacher = {name: step.gather(value).flatten(0, 1)[rows] for name, value in theirs.items()}
        return cross_sdc(
            student,
            step.gather(step.batch.class_ids).flatten(),
            self._instances(step, student, teacher, rows),
            teacher=teacher,
            teacher_rows_index=rows,
            temperature=self.temperature,
            modality_pairs=self.modality_pairs,
        )

    def _instances(
        self, step: Step, student: dict[str, Tensor], teacher: dict[str, Tensor] | None, rows: Tensor | None
    ) -> Tensor:
        """[B N]: equal where two sources are of one video."""
        if self.instance == "id" or self.weight_instance == 0:
            return step.gather(step.batch.video_ids).flatten()
        if "motion" not in student:
            raise ConfigError("instance=features compares motion features, and the mask decoder gives none: use id")
        features = student["motion"].detach().clone()
        if teacher is not None and rows is not None:
            features[rows] = teacher["motion"].to(features.dtype)
        equal: Tensor = torch.unique(features, dim=0, return_inverse=True)[1]
        return 2 * equal + step.all_old.flatten()  # an old source and a new one are never of one video

"""AV-CIL, brought from classification to separation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avsep.losses import attention_distillation, audio_visual_contrast, mask_losses
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy
from avsep.strategies.teaching import check_objects, check_temperature, check_weights, embeddings

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["AVCIL"]


@STRATEGIES.register(
    "avcil", source="Pian et al., Audio-Visual Class-Incremental Learning, ICCV 2023; a row of ContAV-Sep's Table 1"
)
class AVCIL(Strategy):
    """Audio-visual similarity, mask distillation and attention distillation on exemplars; needs a memory.

    L = L_sep + ``weight_mask`` L_dist + ``weight_instance`` L_I + ``weight_class`` L_C + ``weight_attention`` L_att:

    - L_dist: weighted L1 between the student's and the teacher's masks of old sources (masks in place of class scores);
    - L_I, L_C: audio picks its visual partner, one direction, among the student's sources, from the second task on
      (``contrast_first``: from the first one), as the original's (:func:`avsep.losses.audio_visual_contrast`).
      Positives are sources of the same video or class; L_C is divided by n^2 and not by the number of positives, as in
      the released code. Mean over object and motion;
    - L_att: KL(teacher || student) of an old class's attention to its source's motion (query transformer, decoder
      layer 0, mean over heads), mean over old sources. Pooled visual features leave nothing of the original's spatial
      attention, and where there is no motion attention the term is left out.

    Against ContAV-Sep: no old features among the candidates, one direction instead of two, and attention. A weight of 0
    switches its term off. The defaults are the original's for its data sets beyond AVE, and .3 for masks.
    """

    differs = (
        "Masks take the place of class scores, and attention to a source's motion that of spatial attention. The "
        "contrast is of the student's sources alone."
    )

    needs_memory = True
    across_ranks = True

    def __init__(
        self,
        *,
        weight_mask: float = 0.3,
        weight_instance: float = 0.1,
        weight_class: float = 1.0,
        weight_attention: float = 0.5,
        temperature: float = 0.05,
        contrast_first: bool = False,
    ) -> None:
        check_weights(
            weight_mask=weight_mask,
            weight_instance=weight_instance,
            weight_class=weight_class,
            weight_attention=weight_attention,
        )
        check_temperature(temperature)
        self.weight_mask = weight_mask
        self.weight_instance = weight_instance
        self.weight_class = weight_class
        self.weight_attention = weight_attention
        self.temperature = temperature
        self.contrast_first = contrast_first
        self.needs_teacher = weight_mask > 0 or weight_attention > 0

    def check(self, separator: Separator) -> None:
        if self.weight_instance > 0 or self.weight_class > 0:
            otherwise = "set weight_instance and weight_class to 0"
            check_objects(separator, "avcil", "compares what is heard with what is seen", otherwise)

    def first_task(self) -> dict[str, Any]:
        weights = {"weight_instance": self.weight_instance, "weight_class": self.weight_class}
        used = {name: value for name, value in weights.items() if value > 0 and self.contrast_first}
        return {**used, "temperature": self.temperature, "contrast": "avcil"} if used else {}

    def loss(self, step: Step) -> dict[str, Tensor]:
        distils = step.teacher is not None and self.needs_teacher and step.any_old
        teacher_output = step.teacher_output(old_mixtures=True) if distils and len(step.old_mixtures) else None
        losses = mask_losses(
            step.output,
            step.spectrograms,
            teacher_output=teacher_output.output if teacher_output is not None and self.weight_mask > 0 else None,
            mixtures=None if teacher_output is None else teacher_output.mixtures,
            counted=step.is_old,
        )
        terms = {"separation": losses.separation}
        contrasts = step.num_old > 0 or self.contrast_first
        if contrasts and (self.weight_instance > 0 or self.weight_class > 0):
            instance, class_ = audio_visual_contrast(
                {name: step.gather(value).flatten(0, 1) for name, value in embeddings(step.output).items()},
                step.gather(step.batch.class_ids).flatten(),
                step.gather(step.batch.video_ids).flatten(),
                temperature=self.temperature,
            )
            if self.weight_instance > 0:
                terms["instance"] = self.weight_instance * instance
            if self.weight_class > 0:
                terms["class"] = self.weight_class * class_
        if distils and self.weight_mask > 0:
            terms["mask"] = self.weight_mask * step.mean_over(step.is_old, losses.distillation)
        if distils and self.weight_attention > 0:
            own = step.student.mask_decoder.motion_attention(step.visual, step.batch.class_ids)
            if own is not None:
                kept = own.new_zeros(())
                if teacher_output is not None and step.teacher is not None:
                    mixtures = step.old_mixtures
                    ids = step.known_class_ids[mixtures]
                    theirs = step.teacher.mask_decoder.motion_attention(teacher_output.visual, ids)
                    assert theirs is not None
                    kept = attention_distillation(own[mixtures], theirs, counted=step.is_old[mixtures])
                terms["attention"] = self.weight_attention * step.mean_over(step.is_old, kept)
        return terms

"""PLOP: feature maps whose statistics along rows and columns stay those of the previous task's separator.

Douillard et al., PLOP: Learning without Forgetting for Continual Semantic Segmentation, CVPR 2021.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from avsep.errors import ConfigError
from avsep.losses import pod_distance
from avsep.registry import AUDIO_ENCODERS, STRATEGIES
from avsep.strategies.base import Step, Strategy
from avsep.strategies.teaching import check_weights

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["PLOP"]


@STRATEGIES.register("plop", source="Douillard et al., PLOP, CVPR 2021, eqs. 3-5 and the released weights")
class PLOP(Strategy):
    """Local POD between the student's and the teacher's maps, of all mixtures.

    L = L_sep + (1/L) sqrt(|C_0:t| / |C_t|) sum_l factor_l POD_l, with |C_0:t| classes seen and |C_t| of them new, and
    POD_l = :func:`~avsep.losses.pod_distance` between

    - the separator's maps, before their activations (:meth:`~avsep.separator.Separator.taps`: e3, e4, e5, d4, d2 and
      the mask features of a U-Net; where its way up is the mask decoder's, every source's d4 and d2, and no mask
      features), factor ``weight_features``;
    - the masks' logits, a map of one channel a source, factor ``weight_logits``: of old sources, or of all where the
      masks do not depend on the class, so that the teacher answers for new classes too.

    L is the number of these maps and the logits together, also in batches without a source to compare.

    The paper's pseudo-labels and the adaptive weight of its classification loss are dropped: they mend that old classes
    are labelled as background in new pictures, and masks of asked classes know no background.
    """

    differs = (
        "Masks' logits take the place of a segmentation's; its pseudo-labels have no counterpart where the class is "
        "given."
    )

    across_ranks = True

    def __init__(self, *, weight_features: float = 0.01, weight_logits: float = 0.0005) -> None:
        check_weights(weight_features=weight_features, weight_logits=weight_logits)
        self.weight_features = weight_features
        self.weight_logits = weight_logits
        self.needs_teacher = weight_features > 0 or weight_logits > 0

    def check(self, separator: Separator) -> None:
        if not separator.has_taps:
            name = separator.spec.audio_encoder.name
            having = ", ".join(spec.name for spec in AUDIO_ENCODERS if spec.factory.tap_names)
            raise ConfigError(
                f"strategy 'plop' compares feature maps, and audio encoder '{name}' has no taps, which give them: "
                f"choose another strategy, or an audio encoder with taps ({having})"
            )

    def first_task(self) -> dict[str, Any]:
        return {}

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.teacher is None or not self.needs_teacher:
            return terms
        student, agnostic = step.student, step.student.mask_decoder.class_agnostic
        sources = torch.ones_like(step.is_old) if agnostic else step.is_old
        teacher_output = step.teacher_output()
        # a new class's masks are read only where the class does not matter
        output = teacher_output.output if bool(sources.any()) else None
        maps, theirs = student.taps(step.audio, step.output), step.teacher.taps(teacher_output.audio, output)
        scale = math.sqrt(student.num_classes / (student.num_classes - step.num_old)) / (len(maps) + 1)
        if self.weight_features > 0:
            distances = [pod_distance(maps[name], theirs[name]) for name in maps]
            terms["features"] = scale * self.weight_features * torch.stack(distances).sum()
        if self.weight_logits > 0 and (agnostic or step.any_old):
            distance = step.output.logits.new_zeros((), dtype=torch.float32)
            if output is not None:
                # [sources, 1, F, T]
                distance = pod_distance(step.output.logits[sources][:, None], output.logits[sources][:, None])
            weighted = distance if agnostic else step.mean_over(step.is_old, distance)
            terms["logits"] = scale * self.weight_logits * weighted
        return terms

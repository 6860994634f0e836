"""Endpoints Weight Fusion: mask distillation, and the new weights pulled back towards the old ones after each task."""

from __future__ import annotations

from avsep.registry import STRATEGIES
from avsep.strategies.composition import Composition
from avsep.strategies.lwf import LwF
from avsep.strategies.weight_fusion import WeightFusion

__all__ = ["EWF"]


@STRATEGIES.register(
    "ewf",
    source="Xiao et al., Endpoints Weight Fusion, CVPR 2023; a row of ContAV-Sep's Table 1, there without details",
)
class EWF(Composition):
    """Train with LwF's loss, then average the weights with the previous task's: ``lwf`` and ``weight_fusion`` as one.

    ``distillation`` is LwF's weight: it keeps the two endpoints close (the original combines the fusion with MiB's or
    PLOP's losses); 0 is fine-tuning with fusion. ``reestimate_batch_norm`` as in ``weight_fusion``.
    """

    differs = "The paper is of segmentation and adds MiB's or PLOP's losses; here LwF's keeps the endpoints close."

    def __init__(self, *, distillation: float = 0.3, reestimate_batch_norm: bool = False) -> None:
        if not distillation >= 0:
            raise ValueError(f"distillation must be 0 or more, got {distillation}")
        lwf, fusion = LwF(weight_mask=distillation), WeightFusion(reestimate_batch_norm=reestimate_batch_norm)
        super().__init__({"lwf": lwf, "weight_fusion": fusion})

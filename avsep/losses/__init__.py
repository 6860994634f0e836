"""Losses: thin forms over ``avsep.kernels`` that speak of slots, students and teachers; and local POD."""

from avsep.losses.mask import mask_distillation, mask_losses, separation_loss
from avsep.losses.pod import pod_distance, pod_embedding
from avsep.losses.similarity import CrossSDC, cross_sdc

__all__ = [
    "CrossSDC",
    "cross_sdc",
    "mask_distillation",
    "mask_losses",
    "pod_distance",
    "pod_embedding",
    "separation_loss",
]

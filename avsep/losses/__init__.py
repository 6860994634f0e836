"""Losses: thin forms over ``avsep.kernels`` that speak of slots, students and teachers."""

from avsep.losses.mask import mask_distillation, mask_losses, separation_loss
from avsep.losses.similarity import CrossSDC, cross_sdc

__all__ = ["CrossSDC", "cross_sdc", "mask_distillation", "mask_losses", "separation_loss"]

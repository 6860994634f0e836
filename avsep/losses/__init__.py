"""Losses: of masks and embeddings of a student and its teacher, by way of ``avsep.kernels``; local POD; attention."""

from avsep.losses.attention import attention_distillation
from avsep.losses.mask import mask_cross_entropy, mask_distillation, mask_losses, separation_loss, source_errors
from avsep.losses.pod import pod_distance, pod_embedding
from avsep.losses.similarity import audio_visual_contrast, cross_sdc

__all__ = [
    "attention_distillation",
    "audio_visual_contrast",
    "cross_sdc",
    "mask_cross_entropy",
    "mask_distillation",
    "mask_losses",
    "pod_distance",
    "pod_embedding",
    "separation_loss",
    "source_errors",
]

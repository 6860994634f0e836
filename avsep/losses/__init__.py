"""Losses of masks, embeddings, maps and attention, of a student and its teacher, by way of ``avsep.kernels``."""

from avsep.losses.attention import attention_distillation
from avsep.losses.mask import mask_cross_entropy, mask_distillation, mask_losses, separation_loss, source_errors
from avsep.losses.pod import pod_distance, pod_embedding
from avsep.losses.relation import relation_divergence
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
    "relation_divergence",
    "separation_loss",
    "source_errors",
]

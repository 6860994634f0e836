"""Operations with one formula each: a literal reference, a fast form, and one public keyword function.

``similarity_distillation``, ``analyse``, ``synthesise``, ``mask_head`` and ``mask_head_losses`` take
``backend="auto"``, ``"torch"`` or ``"triton"``; the environment variable ``AVSEP_KERNELS`` decides where the argument
says ``"auto"``. ``mask_l1`` always runs in PyTorch. Each folder holds ``reference.py`` (the oracle of every test),
``op.py`` (what people call) and ``README.md`` (maths).
"""

from avsep.kernels.mask_head.op import MaskLosses, MaskTeacher, mask_head, mask_head_losses, mask_l1
from avsep.kernels.similarity_distillation.op import SimilarityDistillation, similarity_distillation
from avsep.kernels.stft_masking.op import (
    Analysis,
    Interpolation,
    StftTables,
    analyse,
    istft,
    make_tables,
    stft,
    synthesise,
    unwarp,
    warp,
)

__all__ = [
    "Analysis",
    "Interpolation",
    "MaskLosses",
    "MaskTeacher",
    "SimilarityDistillation",
    "StftTables",
    "analyse",
    "istft",
    "make_tables",
    "mask_head",
    "mask_head_losses",
    "mask_l1",
    "similarity_distillation",
    "stft",
    "synthesise",
    "unwarp",
    "warp",
]

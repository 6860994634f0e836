"""Contrastive losses between the modalities of sources: CrossSDC, with the teacher's old sources, and AV-CIL's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from avsep.errors import ConfigError
from avsep.kernels import similarity_distillation

__all__ = ["ModalityPairs", "audio_visual_contrast", "cross_sdc"]

MODALITIES = ("audio", "motion", "object")
ModalityPairs = Literal["cross", "within"]


def cross_sdc(
    student: Mapping[str, Tensor],
    class_ids: Tensor,
    instance_ids: Tensor,
    *,
    teacher: Mapping[str, Tensor] | None = None,
    teacher_rows_index: Tensor | None = None,
    temperature: float = 0.05,
    modality_pairs: ModalityPairs = "cross",
) -> tuple[Tensor, Tensor]:
    """CrossSDC's instance and class term, not weighted.

    The rows are all n sources by the student, followed by the old sources by the teacher. Without a teacher, or with no
    old source, they are the student's alone. A term is the mean over the pairs of modalities: three, or the one of
    audio and object or motion where the other is missing.

    Args:
        student: embeddings [n, D] of ``audio`` and of ``motion``, ``object`` or both.
        class_ids: [n] int64.
        instance_ids: [n] int64, equal where two sources come from the same video.
        teacher: embeddings [m, D] of the old sources, of the same modalities; they get no gradient.
        teacher_rows_index: [m] int64, which of the n sources those are.
        temperature: above 0.
        modality_pairs: ``cross`` compares every two modalities; ``within`` each with itself (the uni-modal variant),
            where no row is compared with itself and a row without a positive does not count.

    Returns:
        (instance term, class term), scalars.

    Raises:
        ConfigError: for fewer than two modalities, or a teacher that does not fit the student.

    References:
        Pian et al., Continual Audio-Visual Sound Separation, NeurIPS 2024.
    """
    names = [name for name in MODALITIES if name in student]
    if unknown := sorted(set(student) - set(names)):
        raise ConfigError(f"CrossSDC knows no modality '{unknown[0]}': {', '.join(MODALITIES)}")
    within = modality_pairs == "within"
    if len(names) < (1 if within else 2):
        raise ConfigError(
            f"CrossSDC compares modalities and needs two or more, got {', '.join(names) or 'none'}: add a visual "
            "encoder, or set weight_instance and weight_class to 0"
        )
    rows = [student[name] for name in names]
    teacher_rows = None
    if teacher is not None:
        rows, teacher_rows = _append(rows, names, teacher, teacher_rows_index)
        index = teacher_rows_index
        class_ids = torch.cat((class_ids, class_ids[index]))
        instance_ids = torch.cat((instance_ids, instance_ids[index]))
    result = similarity_distillation(
        rows,
        instance_ids,
        class_ids,
        temperature=temperature,
        teacher_rows=teacher_rows,
        unimodal=within,
    )
    return result.instance, result.class_


def audio_visual_contrast(
    embeddings: Mapping[str, Tensor],
    class_ids: Tensor,
    instance_ids: Tensor,
    *,
    temperature: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """AV-CIL's instance and class term, not weighted: audio picks its visual partner among those of all n sources.

    With S = A V^T / temperature, rows at length 1, V the object or the motion embeddings and the mean over those there
    are, the instance term is -1/n sum_p [sum_q I_pq log softmax_q(S_p.)] / sum_q I_pq and the class term, not divided
    by the number of positives, -1/n^2 sum_pq C_pq log softmax_q(S_p.).

    Args:
        embeddings: [n, D] of ``audio`` and of ``motion``, ``object`` or both.
        class_ids: [n] int64; C marks equal ones.
        instance_ids: [n] int64, equal where two sources come from the same video; I marks equal ones.
        temperature: above 0.

    Returns:
        (instance term, class term), scalars.

    Raises:
        ConfigError: when there is no visual embedding.

    References:
        Pian et al., Audio-Visual Class-Incremental Learning, ICCV 2023, whose instance term has the diagonal alone as
        positives; the class term is as in its released code.
    """
    partners = [name for name in MODALITIES[1:] if name in embeddings]
    if not partners:
        raise ConfigError("AV-CIL compares audio with frames, and the mask decoder gives no motion or object embedding")
    terms = [
        similarity_distillation(
            [embeddings["audio"], embeddings[name]],
            instance_ids,
            class_ids,
            temperature=temperature,
            symmetric=False,
            average_class=False,
        )
        for name in partners
    ]
    instance, class_ = (torch.stack(term).mean() for term in zip(*((t.instance, t.class_) for t in terms), strict=True))
    return instance, class_


def _append(
    rows: list[Tensor], names: list[str], teacher: Mapping[str, Tensor], index: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The student's rows followed by the teacher's, and which of them are the teacher's."""
    if set(teacher) != set(names):
        raise ConfigError(
            f"the teacher has the modalities {', '.join(sorted(teacher)) or '(none)'}, the student "
            f"{', '.join(sorted(names))}: they must be the same"
        )
    if index is None:
        raise ConfigError("CrossSDC got teacher embeddings without teacher_rows_index, which says whose they are")
    n = rows[0].shape[0]
    for name in names:
        if teacher[name].shape[0] != index.shape[0]:
            raise ConfigError(
                f"the teacher's {name} embeddings have {teacher[name].shape[0]} rows for {index.shape[0]} indices"
            )
    joined = [torch.cat((row, teacher[name].detach())) for row, name in zip(rows, names, strict=True)]
    return joined, torch.arange(n + index.shape[0], device=index.device) >= n

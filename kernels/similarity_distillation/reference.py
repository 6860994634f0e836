"""Cross-modal similarity distillation, written as the equation says: n x n matrices, one cross entropy at a time.

Source: Pian et al., Continual Audio-Visual Sound Separation, NeurIPS 2024 (CrossSDC), in the form of its released code:
both directions averaged, and averaged over the pairs of modalities. The oracle of the tests; use it in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cross_entropy", "normalise", "similarity_distillation_reference"]


def normalise(x: Tensor) -> Tensor:
    """Rows of [n, D] at length 1; a row of zeros stays zero and gets no gradient."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12) * (length > 1e-12)


def cross_entropy(scores: Tensor, positives: Tensor, *, include_self: bool = True, average: bool = True) -> Tensor:
    """CE(S, E) = -1/n sum_p [sum_q E_pq log softmax_q(S_p.)] / sum_q E_pq.

    Args:
        scores: S [n, n].
        positives: E [n, n] bool.
        include_self: False takes the diagonal out of positives and softmax, and averages over the rows that have a
            positive left (0 if there is none).
        average: False leaves the sum over positives undivided and divides by n^2 instead (AV-CIL).
    """
    n = scores.shape[0]
    allowed = torch.ones_like(positives) if include_self else ~torch.eye(n, dtype=torch.bool, device=scores.device)
    positives = positives & allowed
    kept = positives.any(dim=1)
    if not kept.any():
        return scores.sum() * 0.0
    log_softmax = scores - scores.masked_fill(~allowed, -torch.inf).logsumexp(dim=1, keepdim=True)
    summed = torch.where(positives, log_softmax, 0.0).sum(dim=1)
    if not average:
        return -summed.sum() / n**2
    return -(summed[kept] / positives.sum(dim=1)[kept]).mean()


def similarity_distillation_reference(
    modalities: Sequence[Tensor],
    instance_ids: Tensor,
    class_ids: Tensor,
    *,
    temperature: float = 0.05,
    teacher_rows: Tensor | None = None,
    symmetric: bool = True,
    average_class: bool = True,
    unimodal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Instance term and class term, scalars; arguments as those of ``similarity_distillation``."""
    if teacher_rows is not None:
        modalities = [torch.where(teacher_rows[:, None], m.detach(), m) for m in modalities]
    rows = [normalise(m) for m in modalities]
    count = len(rows)
    pairs = [(i, i) for i in range(count)] if unimodal else [(i, j) for i in range(count) for j in range(i + 1, count)]
    terms = []
    for ids, average in ((instance_ids, True), (class_ids, average_class)):
        positives = ids[:, None] == ids[None, :]
        losses = []
        for i, j in pairs:
            scores = rows[i] @ rows[j].T / temperature
            loss = cross_entropy(scores, positives, include_self=not unimodal, average=average)
            if symmetric:
                back = cross_entropy(scores.T, positives, include_self=not unimodal, average=average)
                loss = (loss + back) / 2
            losses.append(loss)
        terms.append(torch.stack(losses).mean())
    return terms[0], terms[1]

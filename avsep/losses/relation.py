"""How things stand to each other: the divergence between two models' similarities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["relation_divergence"]


def relation_divergence(
    rows: Tensor,
    columns: Tensor,
    teacher_rows: Tensor,
    teacher_columns: Tensor,
    *,
    temperature: float = 0.07,
    include_self: bool = True,
) -> Tensor:
    """The mean over rows p of KL(softmax_q T_pq || softmax_q S_pq), with cosine similarities over the temperature.

    S_pq = cos(row p, column q) / temperature by the student, T_pq likewise by the teacher, which gets no gradient. It
    does not change when one rotation turns the student's rows and columns. Computed in float32 (float64 of such
    vectors), also under autocast.

    Args:
        rows: [n, D].
        columns: [m, D].
        teacher_rows: [n, D'].
        teacher_columns: [m, D'].
        temperature: above 0.
        include_self: False leaves out column p of row p, where rows and columns are the same things.

    Returns:
        A scalar; 0 where a row has no more than one column.

    References:
        Zhu et al., CTP, ICCV 2023 (topology preservation, one direction).
    """
    with torch.autocast(rows.device.type, enabled=False):
        own = _cosines(rows, columns) / temperature
        theirs = _cosines(teacher_rows.detach(), teacher_columns.detach()).to(own.dtype) / temperature
        if not include_self:
            own, theirs = _without_diagonal(own), _without_diagonal(theirs)
        if own.shape[1] < 2:
            return own.sum() * 0.0
        log_shares = theirs.log_softmax(dim=1)
        return (log_shares.exp() * (log_shares - own.log_softmax(dim=1))).sum(dim=1).mean()


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    return F.normalize(rows.to(dtype), dim=1) @ F.normalize(columns.to(dtype), dim=1).T


def _without_diagonal(square: Tensor) -> Tensor:
    """[n, n] -> [n, n - 1]"""
    n = len(square)
    return square[~torch.eye(n, dtype=torch.bool, device=square.device)].reshape(n, n - 1)

"""MagMax: of the weights that each task ended with, every element keeps the one that went farthest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy, TaskContext
from avsep.strategies.teaching import reestimate_batch_norm, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["MagMax", "farthest"]


@STRATEGIES.register("magmax", source="Marczak et al., MagMax, ECCV 2024", example={"batch_norm_mixtures": 2})
class MagMax(Strategy):
    """Of the values that a weight had at the ends of all tasks, keep the one farthest from where it began.

    Tasks are learned one from another's own end, as in fine-tuning, and not from what is kept. After each,

        theta = theta_0 + tau_k,    k = argmax_i |tau_i|,    tau_i = theta_i - theta_0,

    element by element (:func:`farthest`), is what is stored and tested; validation and selection saw the task's own
    end. Rows of new classes have their own beginning. Running statistics are estimated anew on ``batch_norm_mixtures``
    training mixtures (0: those of the last task's end). Combine it with any method.
    """

    keeps = "the first weights and the last task's own, 8 bytes a weight"
    differs = (
        "theta_0 are the random weights before the first task, which counts as one: there is no pre-trained network. "
        "So there is no factor on tau either, which would shrink what was learned towards random weights."
    )
    across_ranks = True
    sets_weights = ("begin_task", "after_task")
    needs_teacher = True

    def __init__(self, *, batch_norm_mixtures: int = 200) -> None:
        if batch_norm_mixtures < 0:
            raise ValueError(f"batch_norm_mixtures must be 0 or more, got {batch_norm_mixtures}")
        self.batch_norm_mixtures = batch_norm_mixtures
        self._first: dict[str, Tensor] = {}
        self._end: dict[str, Tensor] = {}  # of the last task, running statistics included

    def begin_task(self, ctx: TaskContext) -> None:
        if ctx.resumed:  # the student goes on, and the first weights are in the state
            return
        first = {name: p.detach().clone() for name, p in ctx.student.named_parameters() if p.requires_grad}
        for name, value in self._first.items():
            if name in first:
                first[name][rows_of(tuple(value.shape))] = value.to(first[name].device)
        own = ctx.student.state_dict()  # shares the memory of the student's tensors
        for name, value in self._end.items():
            own[name][rows_of(tuple(value.shape))] = value.to(own[name].device)
        self._first, self._end = first, {}

    def after_task(self, ctx: TaskContext) -> None:
        own = ctx.student.state_dict()
        end = {name: value.clone() for name, value in own.items() if value.is_floating_point()}
        if ctx.teacher is not None:
            _keep_farthest(ctx.student, ctx.teacher, self._first)
            if self.batch_norm_mixtures:
                reestimate_batch_norm(ctx.student, ctx.data, self.batch_norm_mixtures)
        self.load_state_dict({} if ctx.is_last else {"first": self._first, "end": end})

    def state_dict(self) -> dict[str, Any]:
        parts = {"first": self._first, "end": self._end}
        return {name: dict(values) for name, values in parts.items() if values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._end = dict(state.get("first", {})), dict(state.get("end", {}))


@torch.no_grad()
def _keep_farthest(student: Separator, kept: Separator, first: Mapping[str, Tensor]) -> None:
    before = dict(kept.named_parameters())
    for name, p in student.named_parameters():
        if name in before and name in first:
            rows = rows_of(tuple(before[name].shape))
            p[rows] = farthest(p[rows], before[name], first[name].to(p.device)[rows])


def farthest(new: Tensor, old: Tensor, first: Tensor) -> Tensor:
    """Of ``new`` and ``old`` the element that is farther from ``first``; of equals the old one."""
    return new.where((new - first).abs() > (old - first).abs(), old)

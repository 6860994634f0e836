"""An average of the weights along a task's training is what is validated, stored and learned from on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext, TaskData
from avsep.strategies.teaching import reestimate_batch_norm, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["WeightAverage"]


@STRATEGIES.register(
    "weight_average",
    source="Zheng et al., ZSCL, ICCV 2023: the weight ensemble; decay: Tarvainen and Valpola, NIPS 2017",
    example={"every": 1, "batch_norm_mixtures": 2},
)
class WeightAverage(Strategy):
    """Average the weights every ``every`` steps; combine it with any method.

    average <- (n average + theta) / (n + 1), with the weights at the task's beginning as the first member; with a
    ``decay`` d it is the exponential moving average, d average + (1 - d) theta. Rows that new classes brought have
    their first member at the first average. ``start_fraction`` of the task's steps pass before the first member is
    taken, which then are the weights of that moment. The average is what is validated and selected, so the next task
    begins from it; training itself goes on from its own weights. Running statistics of batch normalisation are
    estimated anew for it on ``batch_norm_mixtures`` training mixtures (0: those of training).
    """

    differs = (
        "The paper also holds the weights to the previous model's; combine it with l2_anchor for that. Running "
        "statistics are estimated anew."
    )

    across_ranks = True

    def __init__(
        self,
        *,
        every: int = 100,
        start_fraction: float = 0.0,
        batch_norm_mixtures: int = 200,
        decay: float | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not 0 <= start_fraction < 1:
            raise ValueError(f"start_fraction must be from 0 to below 1, got {start_fraction}")
        if batch_norm_mixtures < 0:
            raise ValueError(f"batch_norm_mixtures must be 0 or more, got {batch_norm_mixtures}")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1, or null for the running mean, got {decay}")
        self.every = every
        self.decay = decay
        self.start_fraction = start_fraction
        self.batch_norm_mixtures = batch_norm_mixtures
        self._average: dict[str, Tensor] = {}
        self._members = 0
        self._start = 0
        self._data: TaskData | None = None
        self._old_shapes: Mapping[str, tuple[int, ...]] = {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._data, self._old_shapes = ctx.data, ctx.old_shapes
        self._start = int(self.start_fraction * ctx.steps)
        if not ctx.resumed:
            self._average, self._members = {}, 0
            if self._start == 0:
                self._add(ctx.student)

    def after_step(self, step: Step) -> None:
        done = step.number + 1
        if done >= max(self._start, 1) and (done - self._start) % self.every == 0:
            self._add(step.student)

    @torch.no_grad()
    def _add(self, student: Separator) -> None:
        own = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if self._members == 0:
            self._average = {name: p.detach().clone() for name, p in own.items()}
        else:
            for name, average in self._average.items():
                new = own[name].to(average.device)
                old = rows_of(self._old_shapes.get(name, tuple(average.shape)))
                kept = self._joined(average[old], new[old], self._members)
                # at the beginning there was no weight of a new class to be averaged
                average.copy_(self._joined(average, new, self._members - (self._start == 0)))
                average[old] = kept
        self._members += 1

    def _joined(self, average: Tensor, new: Tensor, members: int) -> Tensor:
        """The average of so many members, and another one as one."""
        if self.decay is None or members == 0:
            return (members * average + new) / (members + 1)
        return self.decay * average + (1 - self.decay) * new

    @contextlib.contextmanager
    def eval_weights(self, student: Separator) -> Iterator[None]:
        if not self._average:
            yield
            return
        training = {name: value.detach().clone() for name, value in student.state_dict().items()}
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name in self._average:
                    parameter.copy_(self._average[name])
        if self.batch_norm_mixtures and self._data is not None:
            reestimate_batch_norm(student, self._data, self.batch_norm_mixtures)
        try:
            yield
        finally:
            student.load_state_dict(training)

    def after_task(self, ctx: TaskContext) -> None:
        self._average, self._members, self._data = {}, 0, None

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self._average), "members": self._members} if self._average else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average, self._members = dict(state.get("average", {})), int(state.get("members", 0))

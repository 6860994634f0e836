"""Synaptic intelligence: weights whose way through training lowered the loss are held where they ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.anchor import Anchor
from avsep.strategies.base import Step, TaskContext
from avsep.strategies.teaching import largest_is_one, rows_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SI", "path_importance"]


@STRATEGIES.register("si", source="Zenke et al., Continual Learning Through Synaptic Intelligence, ICML 2017")
class SI(Anchor):
    """Quadratic pull of every weight to its value after the previous task, by what its way there lowered the loss.

    L = L_sep + (``weight``/2) sum_i Omega_i (theta_i - theta*_i)^2

    - Along the steps of a task, path_i <- path_i - g_i (change of theta_i), with g the gradient without the penalty's.
    - After it, Omega_i grows by max(path_i, 0) / ((theta_i - theta_i at the task's beginning)^2 + ``xi``), divided by
      the largest of these (:func:`path_importance`).

    It costs no pass over the data. Anchored tensors have no weight decay. Terms of methods beside it count as loss. The
    penalty's gradient is taken off as it is at the student's weights: where a method beside it changes gradients (agem,
    grad_surgery) or takes them at other weights (perturb_and_merge), a part of it stays in the path.
    """

    keeps = "the importance, 4 bytes a weight; within a task also its path and first weights, 8 more"
    differs = (
        "Each task's largest Omega is made 1. The path goes on to the task's last step, also where an earlier epoch's "
        "weights were selected; the distance is to those that are kept."
    )

    def __init__(self, *, weight: float = 1.0, xi: float = 0.1) -> None:
        super().__init__(weight)
        if not xi > 0:
            raise ValueError(f"xi must be above 0, got {xi}")
        self.xi = xi
        self._path: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # weights and gradients of the step that is being made
        self._gradients: dict[str, Tensor] = {}

    def first_task(self) -> dict[str, Any] | None:
        return None if self.weight > 0 else {}  # its path must be followed, so it is not taken from another run

    def begin_task(self, ctx: TaskContext) -> None:
        if self.weight == 0:
            return
        own = {name: p.detach() for name, p in ctx.student.named_parameters() if p.requires_grad}
        if not ctx.resumed:
            self._path = {name: torch.zeros_like(value) for name, value in own.items()}
            self._start = {name: value.clone() for name, value in own.items()}
        self._path = {name: value.to(own[name].device) for name, value in self._path.items()}
        self._before = {name: value.clone() for name, value in own.items()}

    @torch.no_grad()
    def after_backward(self, step: Step) -> None:
        own = {name: p for name, p in step.student.named_parameters() if name in self._path}
        self._gradients = {name: p.grad.clone() for name, p in own.items() if p.grad is not None}
        if step.teacher is None:
            return
        anchor = dict(step.teacher.named_parameters())
        for name, omega in self._omega.items():
            if omega is not None and name in self._gradients:
                old = rows_of(omega.shape)
                self._gradients[name][old] -= self.weight * omega * (own[name][old] - anchor[name])

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        own = dict(step.student.named_parameters())
        for name, before in self._before.items():
            moved = own[name] - before
            if name in self._gradients:  # what did not move may have a gradient that is not finite: a skipped step
                self._path[name] -= (self._gradients[name] * moved).where(moved != 0, 0)
            before.copy_(own[name])
        self._gradients = {}

    def measure(self, ctx: TaskContext) -> dict[str, Tensor]:
        own = dict(ctx.student.named_parameters())
        found = {}
        for name, path in self._path.items():
            path = path.to(own[name].device)
            found[name] = path_importance(path, own[name].detach() - self._start[name].to(path.device), self.xi)
        return largest_is_one(found)

    def state_dict(self) -> dict[str, Any]:
        parts = {"omega": self._importance, "path": self._path, "start": self._start}
        return {name: dict(values) for name, values in parts.items() if values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state.get("omega", {}))
        self._path, self._start = dict(state.get("path", {})), dict(state.get("start", {}))
        self._before, self._gradients = {}, {}

    def after_task(self, ctx: TaskContext) -> None:
        if self.weight == 0 or ctx.is_last:
            self.load_state_dict({})
            return
        self.load_state_dict({"omega": self.joined(self._importance, self.measure(ctx))})


def path_importance(path: Tensor, moved: Tensor, xi: float) -> Tensor:
    """max(path, 0) / (moved^2 + xi): what a weight's way lowered the loss, by the square of its length."""
    return path.clamp(min=0) / (moved.square() + xi)

"""What methods share that pull weights back to where the previous task left them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import check_weights, rows_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avsep.separator import Separator

__all__ = ["Anchor", "quadratic_distance"]


class Anchor(Strategy):
    """Base of methods with a quadratic pull of every weight to its value after the previous task.

    L = L_sep + (``weight``/2) sum_i Omega_i (theta_i - theta*_i)^2

    A subclass says in :meth:`measure` how much each weight matters to the task that has just been learned. The sum over
    tasks is Omega, and all that is kept: theta* are the teacher's weights. Frozen weights, running statistics, and rows
    that a new class has brought are left out.

    Anchored tensors have no weight decay, which would pull them to 0 instead.
    """

    across_ranks = True

    def __init__(self, weight: float) -> None:
        check_weights(weight=weight)
        self.weight = weight
        self.needs_teacher = weight > 0
        self._importance: dict[str, Tensor] = {}
        self._omega: Mapping[str, Tensor | None] = {}  # where the weights are, made when first needed

    def first_task(self) -> dict[str, Any] | None:
        return {}

    def measure(self, ctx: TaskContext) -> dict[str, Tensor]:
        """How much the weights matter to the task, by name, 0 or more; those that do not are left out."""
        raise NotImplementedError

    def omega(self, student: Separator) -> Mapping[str, Tensor | None]:
        """Omega by name, in the shapes before the task's classes were added; None: 1 for all."""
        own = dict(student.named_parameters())
        return {name: value.to(own[name].device) for name, value in self._importance.items()}

    def weight_decay(self, name: str) -> float:
        return 0.0 if self.weight > 0 and name in self._importance else 1.0

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.teacher is not None and self.weight > 0:
            if not self._omega:
                self._omega = self.omega(step.student)
            if self._omega:
                terms["penalty"] = self.weight / 2 * quadratic_distance(step.student, step.teacher, self._omega)
        return terms

    def after_task(self, ctx: TaskContext) -> None:
        if self.weight == 0 or ctx.is_last:
            self.load_state_dict({})
            return
        self.load_state_dict(self.joined(self._importance, self.measure(ctx)))

    def joined(self, before: dict[str, Tensor], measured: dict[str, Tensor]) -> dict[str, Tensor]:
        """The importance of earlier tasks and of the latest as one; rows of new classes have that of the latest."""
        for name, old in before.items():
            total = measured.setdefault(name, torch.zeros_like(old))
            total[rows_of(old.shape)] += old.to(total.device)
        return measured

    def state_dict(self) -> dict[str, Any]:
        return dict(self._importance)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._importance, self._omega = dict(state), {}


def quadratic_distance(student: nn.Module, anchor: nn.Module, omega: Mapping[str, Tensor | None]) -> Tensor:
    """sum_i omega_i (theta_i - anchor_i)^2 over the parameters that ``omega`` names, as far as the anchor's rows go.

    ``omega`` None of a parameter: 1 for all of it.
    """
    own, theirs = dict(student.named_parameters()), dict(anchor.named_parameters())
    parts = []
    for name, share in omega.items():
        shape = theirs[name].shape if share is None else share.shape
        moved = own[name][rows_of(shape)] - theirs[name]
        parts.append(moved.square().sum() if share is None else (share * moved.square()).sum())
    return torch.stack(parts).sum()

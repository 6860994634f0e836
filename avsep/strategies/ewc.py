"""Elastic weight consolidation: weights that mattered to earlier tasks are held where they were.

Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avsep.losses import separation_loss
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import check_weights, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from avsep.separator import Separator
    from avsep.types import Batch

__all__ = ["EWC", "fisher_diagonal"]


@STRATEGIES.register(
    "ewc",
    source="Kirkpatrick et al., EWC, PNAS 2017; one running Fisher: Schwarz et al., ICML 2018",
    example={"fisher_samples": 2},
)
class EWC(Strategy):
    """Quadratic pull of every weight to its value after the previous task, by the Fisher information so far.

    L = L_sep + (``weight``/2) sum_i (F_i / max F) (theta_i - theta*_i)^2

    - F <- ``decay`` F + F_t after each task t, F_t being :func:`fisher_diagonal` of ``fisher_samples`` random mixtures
      of its training set (exemplars included) at the selected weights. A loss that is a mean over pixels has a tiny
      Fisher information: its largest element is made 1, or ``weight`` would mean another thing for every separator.
    - theta*: the weights after the previous task. They are the teacher's, read from the stored separator, so they are
      the same after a resume and no second copy is kept: what persists is F alone.
    - Frozen weights, running statistics, weights that never get a gradient, and rows that a new class has brought are
      left out.

    The paper keeps F and theta* of every task apart; as later continual-learning suites do, one running sum and the
    latest weights stand for them.
    """

    across_ranks = True

    def __init__(self, *, weight: float = 100.0, decay: float = 1.0, fisher_samples: int = 1000) -> None:
        check_weights(weight=weight)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        if fisher_samples < 1:
            raise ValueError(f"fisher_samples must be at least 1, got {fisher_samples}")
        self.weight = weight
        self.decay = decay
        self.fisher_samples = fisher_samples
        self.needs_teacher = weight > 0
        self._fisher: dict[str, Tensor] = {}
        self._shares: dict[str, Tensor] = {}  # F / max F where the weights are, made when first needed

    def first_task(self) -> dict[str, Any]:
        return {}

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.teacher is not None and self.weight > 0:
            terms["penalty"] = self.weight / 2 * self._distance(step.student, step.teacher)
        return terms

    def _distance(self, student: Separator, teacher: Separator) -> Tensor:
        own, anchor = dict(student.named_parameters()), dict(teacher.named_parameters())
        if not self._shares:
            largest = torch.stack([f.max() for f in self._fisher.values()]).max().clamp(min=torch.finfo().tiny)
            self._shares = {name: (f / largest).to(own[name].device) for name, f in self._fisher.items()}
        parts = []
        for name, share in self._shares.items():
            moved = own[name][rows_of(share.shape)] - anchor[name]
            parts.append((share * moved.square()).sum())
        return torch.stack(parts).sum()

    def after_task(self, ctx: TaskContext) -> None:
        if self.weight == 0 or ctx.is_last:
            self.load_state_dict({})
            return
        fisher = fisher_diagonal(ctx.student, ctx.data.batches(self.fisher_samples))
        for name, old in self._fisher.items():
            total = fisher.setdefault(name, torch.zeros_like(old))
            total[rows_of(old.shape)] += self.decay * old.to(total.device)
        self.load_state_dict(fisher)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._fisher)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._fisher, self._shares = dict(state), {}


def fisher_diagonal(separator: Separator, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The mean over batches of the squared gradient of L_sep, in evaluation mode and float32.

    With one mixture a batch it is the diagonal of the empirical Fisher information; squared gradients of larger batches
    are not (their mixtures' gradients cancel before they are squared).

    Returns:
        By name, in the shapes of the parameters; those that are frozen or get no gradient are left out.
    """
    parameters = {name: p for name, p in separator.named_parameters() if p.requires_grad}
    training = separator.training
    separator.eval()
    sums: dict[str, Tensor] = {}
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        found = separator.predict(batch)
        loss = separation_loss(found.output, found.spectrograms)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums.setdefault(name, torch.zeros_like(gradient)).addcmul_(gradient, gradient)
    separator.train(training)
    return {name: total / count for name, total in sums.items()}

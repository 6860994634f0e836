"""Elastic weight consolidation: weights that mattered to earlier tasks are held where they were.

Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from avsep.registry import STRATEGIES
from avsep.strategies.anchor import Anchor
from avsep.strategies.base import TaskContext
from avsep.strategies.importance import fisher_diagonal
from avsep.strategies.teaching import largest_is_one

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["EWC", "fisher_diagonal"]


@STRATEGIES.register(
    "ewc",
    source="Kirkpatrick et al., EWC, PNAS 2017; one running Fisher: Schwarz et al., ICML 2018",
    example={"fisher_samples": 2},
)
class EWC(Anchor):
    """Quadratic pull of every weight to its value after the previous task, by the Fisher information so far.

    L = L_sep + (``weight``/2) sum_i (F_i / max F) (theta_i - theta*_i)^2

    - F <- ``decay`` F + F_t after each task t, F_t being :func:`fisher_diagonal` of ``fisher_samples`` random mixtures
      of its training set (exemplars included) at the selected weights. A loss that is a mean over pixels has a tiny
      Fisher information: its largest element is made 1, or ``weight`` would mean another thing for every separator.
    - theta*: the weights after the previous task. They are the teacher's, read from the stored separator, so they are
      the same after a resume and no second copy is kept: what persists is F alone.
    - Frozen weights, running statistics, weights that never get a gradient, and rows that a new class has brought are
      left out.
    """

    keeps = "the Fisher information, 4 bytes a weight"
    differs = (
        "The paper keeps F and theta* of every task apart; as later continual-learning suites do, one running sum and "
        "the latest weights stand for them."
    )

    def __init__(self, *, weight: float = 100.0, decay: float = 1.0, fisher_samples: int = 1000) -> None:
        super().__init__(weight)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        if fisher_samples < 1:
            raise ValueError(f"fisher_samples must be at least 1, got {fisher_samples}")
        self.decay = decay
        self.fisher_samples = fisher_samples

    def measure(self, ctx: TaskContext) -> dict[str, Tensor]:
        return fisher_diagonal(ctx.student, ctx.data.batches(self.fisher_samples))

    def joined(self, before: dict[str, Tensor], measured: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().joined({name: self.decay * old for name, old in before.items()}, measured)

    def omega(self, student: Separator) -> Mapping[str, Tensor | None]:
        """F / max F."""
        own = dict(student.named_parameters())
        return {name: share.to(own[name].device) for name, share in largest_is_one(self._importance).items()}

    def weight_decay(self, name: str) -> float:
        return 1.0  # as in all results that were published with this library

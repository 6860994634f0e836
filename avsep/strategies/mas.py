"""Memory aware synapses: weights that the masks depend on are held where they were."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avsep.registry import STRATEGIES
from avsep.strategies.anchor import Anchor
from avsep.strategies.base import TaskContext
from avsep.strategies.importance import logit_sensitivity
from avsep.strategies.teaching import largest_is_one

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAS"]


@STRATEGIES.register("mas", source="Aljundi et al., Memory Aware Synapses, ECCV 2018", example={"samples": 2})
class MAS(Anchor):
    """Quadratic pull of every weight to its value after the previous task, by how much the masks depend on it.

    L = L_sep + (``weight``/2) sum_i Omega_i (theta_i - theta*_i)^2

    Omega is a sum over tasks, of :func:`~avsep.strategies.importance.logit_sensitivity` of ``samples`` random training
    mixtures at the selected weights, divided by its largest element. It needs no targets. Anchored tensors have no
    weight decay.
    """

    keeps = "the importance, 4 bytes a weight"
    differs = (
        "The output whose squared norm is differentiated is the mask's logit, weighted as the loss is: the norm of a "
        "sigmoid would mostly measure where it saturates. Each task's largest element is made 1."
    )

    def __init__(self, *, weight: float = 1.0, samples: int = 1000) -> None:
        super().__init__(weight)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.samples = samples

    def measure(self, ctx: TaskContext) -> dict[str, Tensor]:
        return largest_is_one(logit_sensitivity(ctx.student, ctx.data.batches(self.samples)))

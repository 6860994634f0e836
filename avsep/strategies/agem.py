"""A-GEM: new classes are learned along gradients that do not raise the loss of the exemplars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from avsep.losses import separation_loss
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["AGEM", "conflict", "project"]


@STRATEGIES.register("agem", source="Chaudhry et al., Efficient Lifelong Learning with A-GEM, ICLR 2019")
class AGEM(Strategy):
    """Project the gradient of the new classes so that it does not raise the loss of the exemplars; needs a memory.

    With g the gradient of L_sep over the sources of the current task and r that over the sources of earlier tasks in
    the same mixtures (:func:`project`),

        g <- g - (g . r) / (r . r) r    where g . r < 0.

    Exemplars bound the direction and are not learned from; the logged ``separation`` is that of new sources alone,
    where there are old ones. The gradient reaches Adam projected; what Adam makes of it
    is bounded by nothing. With 16-bit floats r is computed without loss scaling and may vanish.
    """

    differs = (
        "The paper projects on a loss over a memory's own batch; here it is the old sources of the same mixtures, and "
        "Adam takes the projected gradient."
    )

    needs_memory = True
    across_ranks = True
    changes_separation = True

    def __init__(self) -> None:
        self._reference: list[tuple[nn.Parameter, Tensor]] = []

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._reference = []

    def loss(self, step: Step) -> dict[str, Tensor]:
        self._reference = []
        if not step.any_old:
            return super().loss(step)
        old, new = (
            step.mean_over(sources, separation_loss(step.output, step.spectrograms, counted=sources))
            for sources in (step.is_old, ~step.is_old)
        )
        if torch.is_grad_enabled():
            parameters = [p for p in step.student.parameters() if p.requires_grad]
            found = torch.autograd.grad(old, parameters, retain_graph=True, allow_unused=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                whole = torch.zeros_like(parameter) if gradient is None else gradient
                self._reference.append((parameter, step.ranks.mean(whole)))
        return {"separation": new}

    def after_backward(self, step: Step) -> None:
        project(self._reference)
        self._reference = []


@torch.no_grad()
def project(reference: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Remove from the parameters' gradients, in place, what points against the reference gradients beside them.

    Of all gradients as one vector; without a wait for the device.
    """
    share = conflict([p.grad for p, _ in reference], [r for _, r in reference])
    if share is None:
        return
    for parameter, r in reference:
        if parameter.grad is None:
            parameter.grad = -share * r
        else:
            parameter.grad.sub_(share * r)


@torch.no_grad()
def conflict(gradients: Sequence[Tensor | None], references: Sequence[Tensor | None]) -> Tensor | None:
    """(g . r) / (r . r) where g . r < 0, else 0: what times r is taken from g so that it does not point against r.

    Args:
        gradients: the parts of the vector g; None stands for zeros.
        references: the parts of the vector r, in the same order.

    Returns:
        A scalar; None where the two have no part in common.
    """
    pairs = [(g, r) for g, r in zip(gradients, references, strict=True) if g is not None and r is not None]
    if not pairs:
        return None
    along = torch.stack([(r * g).sum() for g, r in pairs]).sum()
    squared = torch.stack([r.square().sum() for r in references if r is not None]).sum()
    return along.clamp(max=0) / squared.clamp(min=torch.finfo(squared.dtype).tiny)

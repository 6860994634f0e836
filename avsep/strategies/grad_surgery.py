"""Gradient surgery: terms of the loss whose gradients point against each other are each turned aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from avsep.losses import separation_loss
from avsep.registry import STRATEGIES
from avsep.strategies.agem import conflict
from avsep.strategies.base import Step, Strategy, TaskContext

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["GradSurgery", "harmonised"]


@STRATEGIES.register(
    "grad_surgery",
    source="Wu et al., Cross-Modality Gradient Harmonization, NeurIPS 2022; Yu et al., PCGrad, NeurIPS 2020",
)
class GradSurgery(Strategy):
    """Turn aside the gradients of loss terms that point against each other; combine it with any method.

    With the gradients g_1, ..., g_n of all terms of the loss, also of the methods beside this one, each term i takes
    for every other j in their order

        g'_i <- g'_i - (g'_i . g_j) / (g_j . g_j) g_j    where g'_i . g_j < 0,

    beginning with g'_i = g_i, and the sum of all g'_i is learned from. The separation loss is two terms: the share of
    the sources of the current task (``separation``) and of those of earlier ones (``separation_old``), where there are
    any. In logs ``separation`` is then that share alone: the two add up to what other methods log under this name.
    Alone and with a memory it is so A-GEM made symmetric, with which it is not combined. ``separate`` does this for the
    audio encoder, the visual encoders and the mask decoder each by itself, else for all of them as one vector.

    From the second task on. A step costs a backward pass more for every term. The optimiser gets the gradients so
    changed; what Adam makes of them is bounded by nothing. With 16-bit floats the terms' gradients are computed without
    loss scaling and may vanish: use bfloat16 or 32 bits.
    """

    across_ranks = True
    changes_separation = True
    differs = (
        "The terms are those of continual learning in place of contrastive pairs of modalities. Where there are more "
        "than two, each meets the others in a fixed order (PCGrad: in a random one), and samples are not ranked by "
        "their conflicts."
    )

    def __init__(self, *, separate: bool = True) -> None:
        self.separate = separate
        self._changes: list[tuple[nn.Parameter, Tensor]] = []

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._changes = []

    def loss(self, step: Step) -> dict[str, Tensor]:
        self._changes = []
        if step.num_old > 0 and torch.is_grad_enabled():
            step.before_backward(self._turn_aside)
        if not step.any_old:
            return super().loss(step)
        old, new = (
            sources.float().mean() * separation_loss(step.output, step.spectrograms, counted=sources)
            for sources in (step.is_old, ~step.is_old)
        )
        return {"separation": new, "separation_old": old}

    def _turn_aside(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        if len(terms) < 2:
            return
        groups = [group for group in step.student.parameter_groups().values() if group]
        parameters = [p for group in groups for p in group]
        found = [_gradients(step, term, parameters) for term in terms.values()]
        first = 0
        for group in groups if self.separate else [parameters]:
            own = [one[first : first + len(group)] for one in found]
            first += len(group)
            changed = harmonised(own)
            for number, parameter in enumerate(group):
                parts = [c[number] - g[number] for c, g in zip(changed, own, strict=True)]
                self._changes.append((parameter, sum(parts[1:], parts[0])))

    @torch.no_grad()
    def after_backward(self, step: Step) -> None:
        for parameter, change in self._changes:
            if parameter.grad is not None:  # else no term reaches it
                parameter.grad = parameter.grad + change
        self._changes = []


def _gradients(step: Step, term: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """A term's gradient by each parameter, of the whole batch."""
    found: Sequence[Tensor | None] = [None] * len(parameters)
    if term.requires_grad:
        found = torch.autograd.grad(term, list(parameters), retain_graph=True, allow_unused=True)
    return [
        step.ranks.mean(torch.zeros_like(p) if gradient is None else gradient)
        for p, gradient in zip(parameters, found, strict=True)
    ]


@torch.no_grad()
def harmonised(gradients: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Each term's gradient without what points against those of the others, as they were (:func:`.agem.conflict`).

    Args:
        gradients: for each term the parts of one vector.
    """
    changed = []
    for number, own in enumerate(gradients):
        mine = list(own)
        for other, reference in enumerate(gradients):
            share = None if other == number else conflict(mine, reference)
            if share is not None:
                mine = [m - share * r for m, r in zip(mine, reference, strict=True)]
        changed.append(mine)
    return changed

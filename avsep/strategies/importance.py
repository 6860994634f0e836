"""How much a separator's weights matter, measured by gradients over training mixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from avsep.losses import separation_loss

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator
    from avsep.types import Batch, Prediction

__all__ = ["fisher_diagonal", "logit_sensitivity"]


def fisher_diagonal(separator: Separator, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The mean over batches of the squared gradient of L_sep, in evaluation mode and float32.

    With one mixture a batch it is the diagonal of the empirical Fisher information; squared gradients of larger batches
    are not (their mixtures' gradients cancel before they are squared).

    Returns:
        By name, in the shapes of the parameters; those that are frozen or get no gradient are left out.
    """

    def loss(found: Prediction) -> Tensor:
        return separation_loss(found.output, found.spectrograms)

    return _mean(separator, batches, loss, lambda total, gradient: total.addcmul_(gradient, gradient))


def logit_sensitivity(separator: Separator, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The mean over batches of |d/d theta mean(w logit^2)|, in evaluation mode and float32; without targets.

    The mean in it is over sources and pixels, and w is the weight of L_sep. Of one mixture a batch, for the same reason
    as in :func:`fisher_diagonal`, which also says what is returned.
    """

    def energy(found: Prediction) -> Tensor:
        return (found.spectrograms.weight * found.output.logits.square()).mean()

    return _mean(separator, batches, energy, lambda total, gradient: total.add_(gradient.abs()))


def _mean(
    separator: Separator,
    batches: Iterable[Batch],
    value: Callable[[Prediction], Tensor],
    add: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The mean over batches of what ``add`` adds up of the gradient of ``value``."""
    parameters = {name: p for name, p in separator.named_parameters() if p.requires_grad}
    training = separator.training
    separator.eval()
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        count += 1
        found = value(separator.predict(batch))
        gradients = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                add(sums.setdefault(name, torch.zeros_like(gradient)), gradient)
    separator.train(training)
    return {name: total / count for name, total in sums.items()}

"""Optimisers: one for each parameter group, with settings and a schedule of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from avsep.errors import ConfigError
from avsep.separator import Separator
from avsep.spec import OptimizerSpec

if TYPE_CHECKING:
    from avsep.strategies.base import Strategy

__all__ = ["lay_out_state", "learning_rate_factor", "make_optimizer", "make_optimizers", "set_learning_rates"]

_FACTOR = "lr_factor"  # in an optimiser's own groups: what the schedule's rate is multiplied by


def learning_rate_factor(spec: OptimizerSpec, *, step: int, epoch: int, total_steps: int) -> float:
    """What the base learning rate is multiplied by at a 0-based step.

    ``one_cycle`` rises from 1/25 to 1 over the first 30 % and falls to 1/250,000, both along a cosine (Smith and Topin,
    arXiv 1708.07120, with PyTorch's defaults); ``step`` multiplies by gamma from each milestone epoch on.
    """
    if spec.schedule == "constant":
        return 1.0
    if spec.schedule == "step":
        return float(spec.gamma ** sum(epoch >= m for m in spec.milestones))
    peak = max(0.3 * total_steps - 1, 1.0)

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    if step <= peak:
        return cosine(1 / 25, 1.0, step / peak)
    return cosine(1.0, 1 / 250_000, min(1.0, (step - peak) / max(total_steps - 1 - peak, 1)))


def make_optimizers(
    student: Separator, specs: Mapping[str, OptimizerSpec], strategy: Strategy | None = None
) -> dict[str, torch.optim.Optimizer]:
    """An optimiser for each group that has a parameter to train, by the group's name.

    Within a group the ``strategy`` may give parameters another learning rate or weight decay
    (:meth:`~avsep.strategies.Strategy.learning_rate`).

    Raises:
        ConfigError: nothing is to be trained, or a group has no settings.
    """
    made: dict[str, torch.optim.Optimizer] = {}
    factors = {} if strategy is None else _factors(student, strategy)
    for group, parameters in student.parameter_groups().items():
        if parameters:
            if group not in specs:
                raise ConfigError(f"parameter group '{group}' has no optimiser: set train.groups.{group}")
            spec = specs[group]
            made[group] = make_optimizer(parameters, spec, factors)
    if not made:
        raise ConfigError("nothing to train: every part of the separator is frozen")
    return made


def _factors(student: Separator, strategy: Strategy) -> dict[nn.Parameter, tuple[float, float]]:
    """What learning rate and weight decay of the trained parameters are multiplied by."""
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    return {p: (strategy.learning_rate(name), strategy.weight_decay(name)) for name, p in trained}


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    spec: OptimizerSpec,
    factors: Mapping[nn.Parameter, tuple[float, float]] | None = None,
) -> torch.optim.Optimizer:
    """Adam or AdamW with the settings of ``spec``; on CPUs PyTorch's fused form, a third of the time of its other.

    ``factors``: what learning rate and weight decay of a parameter are multiplied by, where that is not 1.
    """
    parameters = list(parameters)
    kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
    fused = True if all(p.device.type == "cpu" and p.is_floating_point() for p in parameters) else None
    optimizer = kind(_grouped(parameters, spec, factors or {}), lr=spec.lr, weight_decay=spec.weight_decay, fused=fused)
    if fused:
        optimizer.register_step_pre_hook(_lay_out_gradients)
    return optimizer


def _grouped(
    parameters: Sequence[nn.Parameter], spec: OptimizerSpec, factors: Mapping[nn.Parameter, tuple[float, float]]
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """The parameters as they are, or in groups of equal factors where some are not 1."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(factors.get(parameter, (1.0, 1.0)), []).append(parameter)
    if groups.keys() <= {(1.0, 1.0)}:
        return list(parameters)
    return [
        {"params": members, "lr": rate * spec.lr, _FACTOR: rate, "weight_decay": decay * spec.weight_decay}
        for (rate, decay), members in groups.items()
    ]


def _lay_out_gradients(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Give gradients their parameters' order in memory. Autograd does, but what changes gradients after it may not, and
    the fused form then pairs the wrong elements without a word."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give what an optimiser keeps of a parameter the parameter's order in memory, which files do not have and the
    fused form takes for granted."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter).copy_(value)


def set_learning_rates(
    optimizers: Mapping[str, Any], specs: Mapping[str, OptimizerSpec], *, step: int, epoch: int, total_steps: int
) -> dict[str, float]:
    """Set each group's learning rate for a 0-based step; returns them by group, without a strategy's factors."""
    rates = {}
    for group, optimizer in optimizers.items():
        factor = learning_rate_factor(specs[group], step=step, epoch=epoch, total_steps=total_steps)
        rates[group] = specs[group].lr * factor
        for parameters in optimizer.param_groups:
            parameters["lr"] = rates[group] * parameters.get(_FACTOR, 1.0)
    return rates

"""Perturb-and-merge: old and new weights are joined where the sum of all tasks' losses is expected to be lowest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy, TaskContext
from avsep.strategies.importance import fisher_diagonal
from avsep.strategies.teaching import reestimate_batch_norm, rows_of
from avsep.strategies.weight_fusion import fuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avsep.separator import Separator

__all__ = ["PerturbAndMerge", "merging_coefficient"]


@STRATEGIES.register(
    "perturb_and_merge",
    source="Qiu et al., Train with Perturbation, Infer after Merging (P&M), 2025",
    example={"fisher_samples": 2},
)
class PerturbAndMerge(Strategy):
    """Join old and new weights by a coefficient in closed form after each task; combine it with any method.

    With theta' the weights that were kept after the task before, d = theta_t - theta' and the Fisher information F_i of
    task i (:func:`~avsep.strategies.importance.fisher_diagonal`, ``fisher_samples`` mixtures) in place of its Hessian,

        theta <- theta' + a d,    a = sum_i d . F_i (theta_i - theta') / sum_i d . F_i d,    0 <= a <= 1,

    which is where the sum over tasks of (theta - theta_i) . F_i (theta - theta_i) is lowest on the way from theta' to
    theta_t. Two sums hold what it takes of earlier tasks: of F_i, and of F_i (theta_i - theta). What is joined is what
    ``weight_fusion`` joins: rows of new classes stay as learned. ``reestimate_batch_norm`` as there.

    Within a task the weights of a step's forward and backward pass are theta, theta + ``perturbation`` d or
    theta - ``perturbation`` d with equal chances, d being the way so far: this flattens the loss along it, at no cost.
    """

    keeps = "two sums over tasks, 8 bytes a weight"
    differs = (
        "The paper trains low-rank adapters and we all weights; we keep two sums in place of every task's weights and "
        "Fisher information, which gives the same coefficient. Size and odds of the perturbation are ours."
    )
    across_ranks = True
    sets_weights = ("after_task",)
    needs_teacher = True

    def __init__(
        self, *, fisher_samples: int = 1000, perturbation: float = 0.1, reestimate_batch_norm: bool = False
    ) -> None:
        if fisher_samples < 1:
            raise ValueError(f"fisher_samples must be at least 1, got {fisher_samples}")
        if not 0 <= perturbation < 1:
            raise ValueError(f"perturbation must be from 0 to below 1, got {perturbation}")
        self.fisher_samples = fisher_samples
        self.perturbation = perturbation
        self.reestimate_batch_norm = reestimate_batch_norm
        self._fisher: dict[str, Tensor] = {}  # sum_i F_i
        self._pull: dict[str, Tensor] = {}  # sum_i F_i (theta_i - theta), theta the weights that are kept
        self._ways: list[tuple[nn.Parameter, tuple[slice, ...], Tensor]] = []  # a weight, its old rows, their anchor

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._ways = []
        if ctx.teacher is not None and self.perturbation > 0:
            anchors = dict(ctx.teacher.named_parameters())
            for name, p in ctx.student.named_parameters():
                if p.requires_grad and name in anchors:
                    self._ways.append((p, rows_of(tuple(anchors[name].shape)), anchors[name].detach()))

    @contextlib.contextmanager
    def train_weights(self, student: Separator) -> Iterator[None]:
        # drawn alike on all ranks, whose generators stand alike; the checkpoint holds where
        sign = int(torch.randint(3, ())) - 1 if self._ways else 0
        if sign == 0:
            yield
            return
        before = [p.detach().clone() for p, _, _ in self._ways]
        with torch.no_grad():
            for p, rows, anchor in self._ways:
                p[rows] += sign * self.perturbation * (p[rows] - anchor)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _, _), value in zip(self._ways, before, strict=True):
                    p.copy_(value)

    def after_task(self, ctx: TaskContext) -> None:
        self._ways = []
        if ctx.teacher is None and ctx.is_last:
            return
        fisher = fisher_diagonal(ctx.student, ctx.data.batches(self.fisher_samples))
        own = dict(ctx.student.named_parameters())
        # some may have no gradient in this task: they tell of earlier ones all the same
        zeros = {name: torch.zeros_like(own[name]) for name in {**fisher, **self._fisher}}
        fisher = {**zeros, **fisher}
        before, pull = _in_rows(self._fisher, zeros), _in_rows(self._pull, zeros)
        factor, moved = 1.0, zeros
        if ctx.teacher is not None:
            moved = _moved(ctx.student, ctx.teacher, zeros)
            factor = merging_coefficient(moved, fisher, before, pull)
            fuse(ctx.student, ctx.teacher, factor)
            if self.reestimate_batch_norm:
                reestimate_batch_norm(ctx.student, ctx.data)
        if ctx.is_last:
            self.load_state_dict({})
            return
        for name, f in fisher.items():
            # the kept weights moved by a d away from those of earlier tasks, and stand (1 - a) d before the new ones
            pull[name] += moved[name] * ((1 - factor) * f - factor * before[name])
            before[name] += f
        self._fisher, self._pull = before, pull

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": dict(self._fisher), "pull": dict(self._pull)} if self._fisher else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._fisher, self._pull = dict(state.get("fisher", {})), dict(state.get("pull", {}))


def merging_coefficient(
    moved: Mapping[str, Tensor], fisher: Mapping[str, Tensor], before: Mapping[str, Tensor], pull: Mapping[str, Tensor]
) -> float:
    """a = sum_i d . F_i (theta_i - theta') / sum_i d . F_i d, within 0 and 1; 1 where nothing tells.

    Args:
        moved: d, by name.
        fisher: F of the latest task, whose theta_i - theta' is d.
        before: the sum of F_i over earlier tasks.
        pull: the sum of F_i (theta_i - theta') over earlier tasks.
    """
    along, total = 0.0, 0.0
    for name in moved:
        way, own, old, pulled = (x[name].cpu().double() for x in (moved, fisher, before, pull))
        along += float((way * (own * way + pulled)).sum())
        total += float((way.square() * (own + old)).sum())
    return min(max(along / total, 0.0), 1.0) if total > 0 else 1.0


@torch.no_grad()
def _moved(student: Separator, teacher: Separator, zeros: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the old rows moved since the task before, 0 of new rows."""
    own, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    found = {name: zero.clone() for name, zero in zeros.items()}
    for name, moved in found.items():
        if name in theirs:
            rows = rows_of(tuple(theirs[name].shape))
            moved[rows] = own[name][rows] - theirs[name]
    return found


def _in_rows(values: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values in the shapes that tensors have grown to, 0 in new rows."""
    found = {name: zero.clone() for name, zero in zeros.items()}
    for name, value in values.items():
        if name in found:
            found[name][rows_of(tuple(value.shape))] = value.to(found[name].device)
    return found

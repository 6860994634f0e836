"""Gated anchor: the weights that mattered most are held where they were, all others are free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.anchor import Anchor
from avsep.strategies.base import TaskContext
from avsep.strategies.importance import fisher_diagonal
from avsep.strategies.teaching import rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["GatedAnchor", "gates"]


@STRATEGIES.register(
    "gated_anchor",
    source="this library, with the Fisher information of Kirkpatrick et al., EWC, PNAS 2017",
    example={"samples": 2},
)
class GatedAnchor(Anchor):
    """Quadratic pull of the weights that mattered most to an earlier task, all alike; others move freely.

    L = L_sep + (``weight``/2) sum_i g_i (theta_i - theta*_i)^2

    g_i is 1 where F_i reached the ``quantile`` of all weights in one of the earlier tasks, else 0 (:func:`gates`). F is
    the Fisher information of ``samples`` mixtures (:func:`~avsep.strategies.importance.fisher_diagonal`). It is EWC at
    a 32nd of the bytes, and without a scale between weights. Tensors with an open gate have no weight decay.
    """

    keeps = "the gates, one bit a weight"
    differs = (
        "EWC multiplies the pull at every weight by its Fisher information; here that only says, by a quantile after "
        "each task, which weights are held."
    )

    def __init__(self, *, weight: float = 0.01, quantile: float = 0.9, samples: int = 1000) -> None:
        super().__init__(weight)
        if not 0 <= quantile < 1:
            raise ValueError(f"quantile must be from 0 to below 1, got {quantile}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.quantile = quantile
        self.samples = samples

    def measure(self, ctx: TaskContext) -> dict[str, Tensor]:
        return gates(fisher_diagonal(ctx.student, ctx.data.batches(self.samples)), self.quantile)

    def joined(self, before: dict[str, Tensor], measured: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, old in before.items():
            union = measured.setdefault(name, torch.zeros_like(old))
            union[rows_of(old.shape)] |= old.to(union.device)
        return {name: open_ for name, open_ in measured.items() if bool(open_.any())}

    def omega(self, student: Separator) -> Mapping[str, Tensor | None]:
        own = dict(student.named_parameters())
        return {name: open_.to(own[name]) for name, open_ in self._importance.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: {"bits": _packed(v), "shape": list(v.shape)} for name, v in self._importance.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(
            {name: v if isinstance(v, torch.Tensor) else _unpacked(v["bits"], v["shape"]) for name, v in state.items()}
        )


def gates(fisher: Mapping[str, Tensor], quantile: float) -> dict[str, Tensor]:
    """bool by name: which weights matter at least as much as the ``quantile`` of all, and at all."""
    every = torch.cat([f.flatten() for f in fisher.values()])
    threshold = every.kthvalue(min(int(quantile * len(every)) + 1, len(every))).values
    return {name: (f >= threshold) & (f > 0) for name, f in fisher.items()}


_PLACES = (1, 2, 4, 8, 16, 32, 64, 128)


def _packed(bits: Tensor) -> Tensor:
    """bool of any shape -> uint8 [ceil(n / 8)]."""
    flat = bits.flatten()
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).reshape(-1, 8)
    return (padded * torch.tensor(_PLACES, dtype=torch.uint8, device=bits.device)).sum(dim=1).to(torch.uint8)


def _unpacked(packed: Tensor, shape: Iterable[int]) -> Tensor:
    places = torch.tensor(_PLACES, dtype=torch.uint8, device=packed.device)
    flat = (packed[:, None] & places).flatten() != 0
    size = torch.Size(shape)
    return flat[: size.numel()].reshape(size)

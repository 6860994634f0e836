"""Low-rank adapters (LoRA) of linear maps and convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from avsep.adapters.base import Adapter
from avsep.registry import ADAPTERS
from avsep.types import AdapterPlace

__all__ = ["LowRank"]


class _Factors(nn.Module):
    """The factors of one task, by place: ``down`` [maps, rank, columns] and ``up`` [maps, rows, rank]."""

    def __init__(self, places: Sequence[AdapterPlace], ranks: Sequence[int]) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for place, rank in zip(places, ranks, strict=True):
            bound = 1 / math.sqrt(place.columns)
            self.down[_key(place)] = nn.Parameter(torch.empty(place.maps, rank, place.columns).uniform_(-bound, bound))
            self.up[_key(place)] = nn.Parameter(torch.zeros(place.maps, place.rows, rank))


def _key(place: AdapterPlace) -> str:
    return place.parameter.replace(".", "/")  # no dots in names of parameters


@ADAPTERS.register(
    "low_rank",
    source="Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, eq. 3",
    example={"rank": 2, "conv_rank": 1},
)
class LowRank(Adapter):
    """Every weight W becomes W + B_t A_t in task t, with factors of rank ``rank``; of convolutions ``conv_rank``.

    A_t starts as the released code has it, uniform within 1/sqrt(columns), and B_t as 0, so that a new task starts
    from the first task's weights. A convolution is taken as a matrix from its input channels and taps to its output
    channels, so that B_t A_t is a convolution to ``conv_rank`` channels followed by one of size 1. A rank of 0 leaves
    such weights alone. There is no factor alpha. With ``audio_encoder`` the audio encoder has adapters too.

    A place of n maps with ``rows`` outputs and ``columns`` inputs costs n rank (rows + columns) parameters a task.
    """

    def __init__(
        self,
        *,
        places: Sequence[AdapterPlace],
        rank: int = 8,
        conv_rank: int = 4,
        audio_encoder: bool = False,
    ) -> None:
        if rank < 0 or conv_rank < 0:
            raise ValueError(f"rank and conv_rank must be 0 or more, got {rank} and {conv_rank}")
        matrices = [place for place in places if place.kind in self.kinds]
        ranked = [(place, rank if place.kind == "linear" else conv_rank) for place in matrices]
        super().__init__([place for place, r in ranked if r])
        if not self.places:
            raise ValueError(
                f"rank {rank} and conv_rank {conv_rank} leave nothing to adapt among {len(matrices)} weights: raise one"
            )
        self.on_audio_encoder = audio_encoder
        self._ranks = tuple(r for _, r in ranked if r)

    def new_task(self) -> nn.Module:
        return _Factors(self.places, self._ranks)

    def weights(self, parameters: nn.Module, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert isinstance(parameters, _Factors)
        found: dict[str, Tensor] = {}
        for place in self.places:
            down, up = parameters.down[_key(place)], parameters.up[_key(place)]
            with torch.autocast(up.device.type, enabled=False):  # weights, not activations
                found[place.parameter] = own[place.parameter] + place.as_weight(up @ down)  # [maps, rows, columns]
        return found

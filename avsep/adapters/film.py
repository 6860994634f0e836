"""Scales and shifts of every task's own (FiLM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from avsep.adapters.base import Adapter
from avsep.registry import ADAPTERS
from avsep.types import AdapterPlace

__all__ = ["FiLM"]


@ADAPTERS.register(
    "film",
    source="Perez et al., FiLM, AAAI 2018; in continual learning: Panos et al., First Session Adaptation, ICCV 2023",
)
class FiLM(Adapter):
    """Every scale and shift, of a normalisation or of channels, becomes itself and a vector of task t.

    The vectors start as 0, so that a new task starts from the first task's scales and shifts, and weight decay leads
    back to them. Running statistics stay the first task's. With ``audio_encoder``, which is where most normalisations
    are, the audio encoder runs once for each task in a batch. A place costs as many parameters a task as it has
    channels: 7,810 in the published U-Net.
    """

    kinds = ("affine",)
    differs = "The vectors are a task's own parameters; the original makes them from an input."

    def __init__(self, *, places: Sequence[AdapterPlace], audio_encoder: bool = True) -> None:
        super().__init__(places)
        self.on_audio_encoder = audio_encoder

    def new_task(self) -> nn.Module:
        return nn.ParameterDict({_key(place): nn.Parameter(torch.zeros(place.shape)) for place in self.places})

    def weights(self, parameters: nn.Module, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert isinstance(parameters, nn.ParameterDict)
        return {place.parameter: own[place.parameter] + parameters[_key(place)] for place in self.places}


def _key(place: AdapterPlace) -> str:
    return place.parameter.replace(".", "/")  # no dots in names of parameters

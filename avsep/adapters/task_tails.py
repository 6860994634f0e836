"""Task tails: the last layers once for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from avsep.adapters.base import Adapter
from avsep.registry import ADAPTERS
from avsep.types import AdapterPlace

__all__ = ["TaskTails"]


@ADAPTERS.register(
    "task_tails",
    source="Zhou et al., A Model or 603 Exemplars (MEMO), ICLR 2023",
    example={"layers": 2},
)
class TaskTails(Adapter):
    """The last ``layers`` weights of the mask decoder, and of the audio encoder, are a task's own; the rest is shared.

    A task's weights are W + D_t, with D_t of the same shape, which begins as 0: so a task begins from the first one's.
    In iQuery with 3 layers they are the mask head and the last three convolutions of the U-Net, 913,408 parameters a
    task. In Co-Separation they are the last convolutions of the way up, each of which has two weights, and of the way
    down; in Sound of Pixels, whose decoder has one map, that of the object beside the U-Net's; where masks vary in
    time, the last convolutions of what makes their weights. With the strategy ``task_adapters`` what is shared is
    frozen after the first task. ``audio_encoder`` off leaves the audio encoder out.
    """

    differs = (
        "MEMO joins the features of all its tails in one classifier, and goes on training what they share. Here the "
        "class says which tail to take. Biases and normalisation are not among the places of adapters: they are shared."
    )

    def __init__(self, *, places: Sequence[AdapterPlace], layers: int = 3, audio_encoder: bool = True) -> None:
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        super().__init__(places[-layers:])
        self.on_audio_encoder = audio_encoder

    def new_task(self) -> nn.Module:
        return nn.ParameterList(torch.zeros(place.shape) for place in self.places)

    def weights(self, parameters: nn.Module, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        pairs = zip(self.places, parameters.parameters(), strict=True)
        return {place.parameter: own[place.parameter] + change for place, change in pairs}

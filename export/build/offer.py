"""A separator for some of its classes alone: those that whoever exports it offers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avsep.decoders.base import MaskDecoder
from avsep.errors import ConfigError, near_matches
from avsep.types import AudioFeatures, MaskOutput, VisualFeatures

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["without_classes"]


class _Offered(MaskDecoder):
    """A mask decoder whose class ids count the offered classes alone, so that no other can be asked for."""

    ids: Tensor

    def __init__(self, decoder: MaskDecoder, ids: Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        self.num_classes = len(ids)
        self.independent_sources, self.class_agnostic = decoder.independent_sources, decoder.class_agnostic
        self.tells_presence, self.takes_unseen = decoder.tells_presence, decoder.takes_unseen
        self.presence_threshold, self.causal = decoder.presence_threshold, decoder.causal
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        return self.decoder(audio, visual, self.ids[class_ids])

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.decoder.state_shapes()

    def advance(
        self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[MaskOutput, dict[str, Tensor]]:
        return self.decoder.advance(audio, visual, self.ids[class_ids], state)

    def grow(self, num_classes: int) -> None:
        raise NotImplementedError("what is exported learns no more classes")


def without_classes(separator: Separator, left_out: Collection[str]) -> Separator:
    """The separator without some of its classes: it separates the others as before, by ids that count them alone.
    Itself where none is left out.

    Raises:
        ConfigError: a class that it does not know is left out, or every one is.
    """
    if not left_out:
        return separator
    for name in left_out:
        if name not in separator.classes:
            raise ConfigError(f"class '{name}' cannot be left out: {near_matches(name, separator.classes)}")
    offered = [name for name in separator.classes if name not in left_out]
    if not offered:
        raise ConfigError("every class is left out: a bundle offers at least one")
    from avsep.separator import Separator as _Separator

    merged = separator.merged()  # what stands around a decoder no longer finds the adapter in it
    ids = torch.tensor([separator.class_index[name] for name in offered])
    made = _Separator(
        separator.spec.of_classes(offered),
        merged.audio_encoder,
        _Offered(merged.mask_decoder, ids),
        merged.object_encoder,
        merged.motion_encoder,
    )
    if separator.class_means is not None:
        made.class_means = {role: means[ids] for role, means in separator.class_means.items()}
    return made.train(separator.training)

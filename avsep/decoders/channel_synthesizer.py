"""Sound of Pixels' synthesizer: a mask is a weighted sum of the mask features, with weights read off the object."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from avsep.decoders.base import MaskDecoder
from avsep.encoders.base import weight_places
from avsep.errors import ConfigError
from avsep.kernels import mask_head
from avsep.registry import MASK_DECODERS
from avsep.types import AdapterPlace, AudioFeatures, MaskOutput, VisualFeatures

__all__ = ["ChannelSynthesizer"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


@MASK_DECODERS.register("channel_synthesizer", source="Zhao et al., The Sound of Pixels, ECCV 2018")
class ChannelSynthesizer(MaskDecoder):
    """Each mask is a weighted sum of the mask features, the object giving the weights; class-agnostic masks.

    logits = sum_c scale_c a(v_c) F_c + bias, where v is a linear map of the object feature to one value a channel, a
    the ``activation`` (sigmoid, relu, tanh or none), F the mask features; scale starts at 1 and bias at 0.

    For CrossSDC, which the paper does not have, f_o is v, and the audio embedding f_a is a linear map of the mean of F
    over time and frequency, weighted by the mask times log(1 + magnitude): those where the source has its energy.
    That map gets a gradient from contrastive terms only, and f_a is computed only where they ask for it.

    Shapes:
        mask features [B, mask_channels, F, T], spectrogram [B, 1, F, T], object [B, N, object_dim], class_ids not used
        -> logits [B, N, F, T], f_a and f_o [B, N, mask_channels].
    """

    needs = ("mask_features", "spectrogram", "object")
    class_agnostic = True
    independent_sources = True

    def __init__(
        self,
        *,
        num_classes: int,
        mask_channels: int,
        object_dim: int,
        activation: Literal["sigmoid", "relu", "tanh", "none"] = "sigmoid",
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be {', '.join(_ACTIVATIONS)}, got {activation!r}")
        self.num_classes = num_classes
        self.activation = activation
        self.object_proj = nn.Linear(object_dim, mask_channels)
        self.scale = nn.Parameter(torch.ones(mask_channels))
        self.bias = nn.Parameter(torch.zeros(1))
        self.audio_proj = nn.Linear(mask_channels, mask_channels)

    def grow(self, num_classes: int) -> None:
        """Note that there are more classes; nothing depends on them."""
        super().grow(num_classes)

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        if visual.object is None:
            raise ConfigError("channel_synthesizer needs object features, and none were given")
        features, spectrogram = audio.mask_features, audio.spectrogram
        assert features is not None
        assert spectrogram is not None
        object_embedding = self.object_proj(visual.object)  # f_o [B, N, C]
        weights = self.scale * _ACTIVATIONS[self.activation](object_embedding)
        logits = mask_head(weights, features.to(weights.dtype)) + self.bias
        return MaskOutput(
            logits=logits,
            audio=functools.partial(self._embed, features, spectrogram, logits),
            object=object_embedding,
        )

    def _embed(self, features: Tensor, spectrogram: Tensor, logits: Tensor) -> Tensor:
        """f_a [B, N, C]: the mask features, averaged over each source's masked spectrogram."""
        with torch.autocast(logits.device.type, enabled=False):  # sums over all of a spectrogram
            features = features.to(spectrogram.dtype)
            share = torch.sigmoid(logits.to(spectrogram.dtype)) * spectrogram  # [B, N, F, T]
            share = share / share.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6)
            average = torch.einsum("bnft,bcft->bnc", share, features)
        embedding: Tensor = self.audio_proj(average)
        return embedding

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        vectors = [AdapterPlace(n, tuple(self.get_parameter(n).shape), "affine") for n in ("scale", "bias")]
        return (*weight_places(self.object_proj, "object_proj"), *vectors)

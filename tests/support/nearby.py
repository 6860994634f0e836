"""A separator that hears a neighbourhood alone: what it makes of a whole recording, chunks must not differ from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from avsep.decoders import MaskDecoder
from avsep.encoders import AudioEncoder
from avsep.registry import AUDIO_ENCODERS, MASK_DECODERS
from avsep.types import AudioFeatures, MaskOutput

NEARBY, ONE_VECTOR = "test_nearby", "test_one_vector"


class Nearby(AudioEncoder):
    """An audio encoder that hears a few frames around each: what it gives of a moment does not depend on the chunk."""

    provides = ("mask_features", "latent", "skips")

    def __init__(self, *, channels: int = 6) -> None:
        super().__init__()
        self.mask_channels = self.latent_channels = channels
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, (5, 3), padding=(2, 1)), nn.Tanh(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, network_input):
        features = self.layers(network_input)
        return AudioFeatures(mask_features=features, latent=features)


class OneVector(MaskDecoder):
    """A mask decoder with a vector for each class, and no attention to the whole chunk."""

    needs = ("mask_features",)
    independent_sources = True

    def __init__(self, *, num_classes: int, mask_channels: int, latent_channels: int, object_dim: int, motion_dim=None):
        super().__init__()
        self.num_classes = num_classes
        self.vectors = nn.Parameter(6 * torch.randn(num_classes, mask_channels))

    def grow(self, num_classes):
        raise NotImplementedError

    def forward(self, audio, visual, class_ids):
        vectors = self.vectors[class_ids]  # [B, N, C]
        batch, channels, rows, frames = audio.mask_features.shape
        logits = vectors @ audio.mask_features.reshape(batch, channels, rows * frames)
        return MaskOutput(logits=logits.reshape(batch, -1, rows, frames), audio=vectors)


@contextlib.contextmanager
def nearby_parts() -> Iterator[None]:
    """The two are components inside."""
    AUDIO_ENCODERS.register(NEARBY, source="tests")(Nearby)
    MASK_DECODERS.register(ONE_VECTOR, source="tests")(OneVector)
    try:
        yield
    finally:
        AUDIO_ENCODERS._components.pop(NEARBY, None)
        MASK_DECODERS._components.pop(ONE_VECTOR, None)


def error_db(found: np.ndarray, expected: np.ndarray) -> float:
    return 10 * np.log10(np.sum((found - expected) ** 2) / np.sum(expected**2) + 1e-30)

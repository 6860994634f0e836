"""A mask decoder with all that one may declare: it tells presence, takes unseen sources, and looks in time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from avsep.decoders import MaskDecoder
from avsep.registry import MASK_DECODERS
from avsep.separator import Separator, build_separator
from avsep.types import MaskOutput
from support.tones import BUNDLE_CLASSES, TINY_FRONT_END

LISTENER = "test_listener"


class Listener(MaskDecoder):
    """Masks whose weights follow the motion, interpolated to the frames of the mask.

    Of a source without a picture learned vectors stand in place of what is seen. Presence is a linear map of the mean
    mask features and the class's vector.
    """

    needs = ("mask_features",)
    independent_sources = True
    tells_presence = takes_unseen = True
    presence_threshold = 0.4

    def __init__(
        self, *, num_classes: int, mask_channels: int, object_dim: int, motion_dim: int | None = None, dim: int = 8
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classes = nn.Embedding(num_classes, dim)
        self.object = nn.Linear(object_dim, dim)
        self.no_object = nn.Parameter(torch.randn(object_dim))
        self.motion = None if motion_dim is None else nn.Conv1d(motion_dim, dim, 3, padding=1)
        self.no_motion = nn.Parameter(torch.randn(motion_dim or 1))
        self.weights = nn.Conv1d(dim, mask_channels, 3, padding=1)
        self.hears = nn.Linear(mask_channels + dim, 1)

    def grow(self, num_classes):
        raise NotImplementedError

    def forward(self, audio, visual, class_ids):
        features = audio.mask_features  # [B, C, F, T]
        batch, sources = class_ids.shape
        frames = features.shape[-1]
        seen = visual.seen
        picture = visual.object  # [B, N, Do]
        if seen is not None:
            picture = torch.where(seen[..., None], picture, self.no_object)
        named = self.classes(class_ids)  # [B, N, dim]
        query = (named + self.object(picture))[..., None]  # [B, N, dim, 1]
        if self.motion is not None:
            movement = visual.motion
            if seen is not None:
                movement = torch.where(seen[..., None, None], movement, self.no_motion[:, None])
            moves = F.interpolate(self.motion(movement.flatten(0, 1)), size=frames, mode="linear", align_corners=False)
            query = query + torch.unflatten(moves, 0, (batch, sources))
        query = query.expand(batch, sources, query.shape[2], frames)
        weights = torch.unflatten(self.weights(query.flatten(0, 1)), 0, (batch, sources))  # [B, N, C, T]
        logits = (weights[:, :, :, None] * features[:, None]).sum(dim=2)  # [B, N, F, T]
        heard = features.mean(dim=(2, 3))[:, None].expand(batch, sources, features.shape[1])
        presence = self.hears(torch.cat((heard, named), dim=-1))[..., 0]
        return MaskOutput(logits=logits, audio=named, presence=presence)


@contextlib.contextmanager
def listener_part() -> Iterator[None]:
    """The decoder is a component inside."""
    MASK_DECODERS.register(LISTENER, source="tests")(Listener)
    try:
        yield
    finally:
        MASK_DECODERS._components.pop(LISTENER, None)


def listening_separator(*, frames: bool = False, classes=BUNDLE_CLASSES, **front_end) -> Separator:
    """A small separator with that decoder, of random weights, within :func:`listener_part`; of stored features, or of
    frames."""
    torch.manual_seed(0)
    separator = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 8}) if frames else ("precomputed", {"features": "o", "dim": 8}),
        motion_encoder=("motion_cnn", {"dim": 8, "steps": 6})
        if frames
        else ("precomputed", {"features": "m", "dim": 6}),
        mask_decoder=LISTENER,
        classes=classes,
        front_end={**TINY_FRONT_END, **front_end},
    )
    with torch.no_grad():
        separator.mask_decoder.weights.weight.mul_(8)  # masks that are far from one half
        separator.mask_decoder.hears.weight.mul_(6)
    return separator.eval()

"""What an audio encoder and a visual encoder declare: all that the rest of the library reads of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from avsep.encoders.hub import HubModel
from avsep.errors import ConfigError
from avsep.registry import Component
from avsep.types import AdapterPlace, AudioFeatures, VisualSource

__all__ = ["AudioEncoder", "VisualEncoder", "latest", "weight_places"]


class AudioEncoder(nn.Module, Component, ABC):
    """Base of audio encoders: a spectrogram in, feature maps out.

    ``provides`` names what a mask decoder finds among the features (see :class:`~avsep.registry.Component`).

    Attributes:
        size_multiple: the spectrogram's F must be a multiple of it, and T too unless ``any_frames``.
        any_frames: T may be any number.
        causal: in evaluation mode what it gives of a frame depends on no later one, and :meth:`advance` computes it
            from the frames as they come.
        frozen: it is not trained, and always in evaluation mode.
        tap_names: names of the maps that :meth:`taps` gives, from the finest of the way down; none of an encoder
            whose maps are not compared by methods that compare feature maps.
        mask_channels: C of the mask features; None of an encoder that gives none.
        latent_channels: D of the latent. Every encoder sets it.
        skip_channels: channels of the skip maps, finest first; none of an encoder that gives none.
    """

    size_multiple: int = 1
    any_frames: bool = False
    causal: bool = False
    frozen: bool = False
    tap_names: tuple[str, ...] = ()

    mask_channels: int | None = None
    latent_channels: int
    skip_channels: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, spectrogram: Tensor) -> AudioFeatures:
        """[B, 1, F, T], log1p of the warped mixture magnitude -> feature maps."""

    if TYPE_CHECKING:

        def __call__(self, spectrogram: Tensor) -> AudioFeatures: ...

    def state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """What :meth:`advance` carries from call to call of one mixture with F = ``rows``: the shape of each, by name.
        A stream begins with zeros.

        Raises:
            ConfigError: of an encoder that is not causal.
        """
        raise ConfigError(f"audio encoder {type(self).__name__} looks ahead: it keeps no state from frame to frame")

    def advance(self, spectrogram: Tensor, state: Mapping[str, Tensor]) -> tuple[AudioFeatures, dict[str, Tensor]]:
        """The next frames [B, 1, F, t], of any number, and the state [B, ...] that the frames before them left -> what
        :meth:`forward` gives of them in the whole, and the state after them.

        Raises:
            ConfigError: of an encoder that is not causal.
        """
        raise ConfigError(f"audio encoder {type(self).__name__} looks ahead: it cannot go frame by frame")

    def taps(self, audio: AudioFeatures) -> dict[str, Tensor]:
        """The maps [B, C, H, W] of ``tap_names``, of this encoder's own features."""
        return {}

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        """The weights that an adapter may change; none of an encoder that carries no adapter."""
        return ()


class VisualEncoder(nn.Module, Component, ABC):
    """Base of visual encoders: frames or stored features of a source in, its object or motion features out.

    ``provides`` holds ``object``, ``motion`` or both, the roles it can serve in.

    Attributes:
        frozen: it is not trained, and always in evaluation mode.
        extracts: the roles that its features can be stored in, for the ``precomputed`` encoder: those of an encoder
            with published weights. Of an object extractor :meth:`encode` takes single frames; a motion extractor
            takes frames of a whole video, ``frames`` of them.
        hub: where its published weights come from; None of an encoder without.
        dim: width D of its features. Every encoder sets it.
        frames: how many frames (or stored vectors) it takes; 0 where it takes as many as there are.
        size: side in pixels that frames are brought to; None of an encoder that takes any, or no frames.
        steps: steps in time Tm of its motion features; None of an encoder without, or where the input decides.
    """

    frozen: ClassVar[bool] = False
    extracts: ClassVar[tuple[str, ...]] = ()
    hub: ClassVar[HubModel | None] = None

    dim: int
    frames: int = 0
    size: int | None = None
    steps: int | None = None

    @abstractmethod
    def source(self) -> VisualSource:
        """What the encoder is to be fed with."""

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Frames or stored features of B sources -> [B, D] of an object, [B, D, Tm] of motion."""

    if TYPE_CHECKING:

        def __call__(self, inputs: Tensor) -> Tensor: ...

    def encode(self, frames: Tensor) -> Tensor:
        """Single frames [n, 3, H, W], uint8 0..255 or float 0..1 -> [n, D], of an object extractor."""
        raise NotImplementedError(f"{type(self).__name__} does not extract object features")


def latest(past: Tensor, x: Tensor) -> Tensor:
    """The last frames of ``past`` and x along the last axis, as many as there were in ``past``."""
    return torch.cat((past, x), dim=-1)[..., -past.shape[-1] :]


def weight_places(module: nn.Module, prefix: str = "") -> tuple[AdapterPlace, ...]:
    """The weights of a module's linear layers and convolutions, and the scales and shifts of its normalisations, for
    :meth:`AudioEncoder.adapter_places`; grouped convolutions are left out. Names begin with ``prefix``."""
    found = []
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    for name, part in module.named_modules(prefix=prefix):
        if isinstance(part, norms):
            for kept, vector in part.named_parameters(recurse=False):
                found.append(AdapterPlace(f"{name}.{kept}", tuple(vector.shape), "affine"))
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
        if isinstance(part, kinds) and (isinstance(part, nn.Linear) or part.groups == 1):
            kind: Literal["linear", "convolution", "transposed"] = "convolution"
            if isinstance(part, nn.Linear):
                kind = "linear"
            elif isinstance(part, nn.ConvTranspose2d):
                kind = "transposed"
            found.append(AdapterPlace(f"{name}.weight", tuple(part.weight.shape), kind))
    return tuple(found)

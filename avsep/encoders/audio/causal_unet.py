"""A U-Net that is strided in frequency alone and sees no later frame, for streams."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.encoders.base import AudioEncoder, latest, weight_places
from avsep.errors import ConfigError
from avsep.registry import AUDIO_ENCODERS
from avsep.types import AdapterPlace, AudioFeatures

__all__ = ["CausalUNet"]

_LEVELS = 5
_DILATIONS = (1, 2, 4, 8, 8)  # in time, of the levels from the finest


class _FrameConv2d(nn.Conv2d):
    """A convolution that keeps the number of time frames: at frame t it reads frames t, t - d, t - 2d, ... alone, or,
    where it is not ``causal``, as many before as after t."""

    def __init__(
        self, in_channels: int, out_channels: int, rows: int, frames: int, *, stride: int, dilation: int, causal: bool
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            (rows, frames),
            stride=(stride, 1),
            padding=(1, 0),
            dilation=(1, dilation),
            bias=False,
        )
        self.span = (frames - 1) * dilation
        self.causal = causal

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """[B, in, F, T] -> [B, out, F', T]; ``past`` the ``span`` frames before them, zeros when None."""
        if past is not None:
            return super().forward(torch.cat((past, x), dim=-1))
        ahead = 0 if self.causal else self.span // 2
        return super().forward(F.pad(x, (self.span - ahead, ahead)))


@AUDIO_ENCODERS.register(
    "causal_unet",
    source="this library; sized for two CPU cores",
    example={"base_channels": 4, "mask_channels": 4},
)
class CausalUNet(AudioEncoder):
    """U-Net of five levels whose frames depend on no later ones: for streams (:mod:`avsep.inference.streaming`).

    Down: convolution over 4 rows of frequency, stride 2, and ``kernel`` frames of time, stride 1; up: convolution over
    3 rows and ``kernel`` frames to two rows for each one (sub-pixel convolution along frequency). The dilations in time
    are 1, 2, 4, 8, 8 from the finest level, so that with ``kernel`` 3 a frame is computed from 93 frames, itself and
    those before it. None has a bias; all but the first, the deepest and the last are followed by batch normalisation.
    In training that takes its statistics over whole clips, in evaluation the running ones: what is computed of a frame
    then depends on no other.

    ``base_channels`` is the width of the first level, the others have 2, 4, 8 and 8 times as many; ``mask_channels`` is
    C of the mask features. ``causal`` off centres every kernel on its frame, with the same weights: the encoder that a
    causal one is to be compared with.

    Shapes:
        input [B, 1, F, T] with F a multiple of 32 and any T; ``mask_features`` [B, mask_channels, F, T]; ``latent``
        [B, 4*base_channels, F/8, T], after its normalisation and before the ReLU; ``skips`` the maps of the way down
        before their activations, from F/2 to F/32; ``ups`` those of the way up but the last.

    Source: the shape of a U-Net is that of ``unet7``; sub-pixel convolution: Shi et al., CVPR 2016.
    """

    provides = ("mask_features", "latent", "skips", "spectrogram")
    size_multiple = 2**_LEVELS
    any_frames = True
    tap_names = ("e3", "e4", "e5", "d4", "d2", "F")

    def __init__(
        self, *, base_channels: int = 16, mask_channels: int = 16, kernel: int = 3, causal: bool = True
    ) -> None:
        super().__init__()
        if base_channels < 1 or mask_channels < 1:
            raise ValueError(f"base_channels and mask_channels must be positive, got {base_channels}, {mask_channels}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.causal = causal
        self.mask_channels = mask_channels
        self.latent_channels = 4 * base_channels
        width = [1, *(base_channels * m for m in (1, 2, 4, 8, 8))]  # channels of e_0 (input) .. e_5
        self.input_norm = nn.BatchNorm2d(1)
        self.down = nn.ModuleList(
            _FrameConv2d(below, above, 4, kernel, stride=2, dilation=dilation, causal=causal)
            for (below, above), dilation in zip(pairwise(width), _DILATIONS, strict=True)
        )
        self.down_norm = nn.ModuleList(nn.BatchNorm2d(width[k]) for k in range(2, _LEVELS))  # not of e_1 and e_5
        # d_5 first, d_1 last; d_k has the channels of e_(k-1), and all but d_5 read [e_k, d_(k+1)]
        out = [*width[_LEVELS - 1 : 0 : -1], mask_channels]
        self.up = nn.ModuleList(
            _FrameConv2d(
                width[_LEVELS - i] * (1 if i == 0 else 2),
                2 * channels,
                3,
                kernel,
                stride=1,
                dilation=_DILATIONS[_LEVELS - 1 - i],
                causal=causal,
            )
            for i, channels in enumerate(out)
        )
        self.up_norm = nn.ModuleList(nn.BatchNorm2d(channels) for channels in out[:-1])

    def _convolutions(self) -> dict[str, _FrameConv2d]:
        """By the names of their states, in the order of their use."""
        found = {}
        for way in ("down", "up"):
            for number, layer in enumerate(getattr(self, way)):
                found[f"{way}{number}"] = layer
        return found

    def state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        if not self.causal:
            return super().state_shapes(rows)
        size = [rows // 2**k for k in range(_LEVELS + 1)]
        seen = [*size[:_LEVELS], *size[_LEVELS:0:-1]]  # rows that each convolution reads
        return {
            name: (layer.in_channels, seen[k], layer.span)
            for k, (name, layer) in enumerate(self._convolutions().items())
            if layer.span
        }

    def forward(self, spectrogram: Tensor) -> AudioFeatures:
        return self._run(spectrogram, None)[0]

    def advance(self, spectrogram: Tensor, state: Mapping[str, Tensor]) -> tuple[AudioFeatures, dict[str, Tensor]]:
        if not self.causal:
            return super().advance(spectrogram, state)
        return self._run(spectrogram, state)

    def _run(self, spectrogram: Tensor, state: Mapping[str, Tensor] | None) -> tuple[AudioFeatures, dict[str, Tensor]]:
        if (rows := spectrogram.shape[2]) % self.size_multiple:
            raise ConfigError(
                f"causal_unet halves its input five times in frequency and needs F in multiples of "
                f"{self.size_multiple}, got {rows}: change the front end's log_rows"
            )
        after: dict[str, Tensor] = {}

        def convolve(name: str, layer: _FrameConv2d, x: Tensor) -> Tensor:
            past = None if state is None or not layer.span else state[name]
            if past is not None:
                after[name] = latest(past, x)
            found: Tensor = layer(x, past)
            return found

        layers = self._convolutions()
        e = convolve("down0", layers["down0"], self.input_norm(spectrogram))
        skips = [e]
        for k in range(1, _LEVELS):
            e = convolve(f"down{k}", layers[f"down{k}"], F.leaky_relu(skips[-1], 0.2))
            skips.append(self.down_norm[k - 1](e) if k < _LEVELS - 1 else e)
        ups: list[Tensor] = []
        x = F.relu(skips[-1])
        for i in range(_LEVELS):
            d = _doubled(convolve(f"up{i}", layers[f"up{i}"], x))
            if i < _LEVELS - 1:
                d = self.up_norm[i](d)
                ups.append(d)
                x = F.relu(torch.cat((skips[_LEVELS - 2 - i], d), dim=1))
        features = AudioFeatures(
            mask_features=d,
            latent=ups[1],  # d_4
            skips=tuple(skips),
            ups=tuple(ups),
            spectrogram=spectrogram,
        )
        return features, after

    def taps(self, audio: AudioFeatures) -> dict[str, Tensor]:
        """The maps that :meth:`avsep.separator.Separator.taps` names, of this encoder's features."""
        assert audio.mask_features is not None
        named = {f"e{k}": audio.skips[k - 1] for k in (3, 4, 5)}
        named |= {f"d{k}": audio.ups[_LEVELS - k] for k in (4, 2)}
        return {**named, "F": audio.mask_features}

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        return weight_places(self)


def _doubled(x: Tensor) -> Tensor:
    """[B, 2 C, F, T] -> [B, C, 2 F, T]: two rows of every one, from its two halves of the channels."""
    return torch.unflatten(x, 1, (-1, 2)).transpose(2, 3).flatten(2, 3)

"""The seven-level U-Net of Sound of Pixels and iQuery, with the upsampling folded into its convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.convolution import Conv2d, upsample_convolve, upsampling_weight
from avsep.dsp import log_magnitude
from avsep.encoders.audio._sizes import check_size
from avsep.encoders.base import AudioEncoder, weight_places
from avsep.registry import AUDIO_ENCODERS
from avsep.types import AdapterPlace, AudioFeatures

__all__ = ["UNet7", "UpConv"]


class UpConv(nn.Module):
    """Nearest upsampling by 2, then a 3x3 convolution without bias; the 3x3 weights are the parameter.

    With ``fold`` they are one step (:func:`avsep.convolution.upsample_convolve`): less than half of the multiplications
    and no enlarged copy of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, fold: bool = True) -> None:
        super().__init__()
        self.fold = fold
        self.weight = upsampling_weight(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, 2H, 2W]"""
        if self.fold:
            return upsample_convolve(x, self.weight)
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.weight, padding=1)


@AUDIO_ENCODERS.register(
    "unet7",
    source="Chen et al., iQuery, CVPR 2023 (after Zhao et al., Sound of Pixels, ECCV 2018)",
    example={"base_channels": 4, "mask_channels": 4},
)
class UNet7(AudioEncoder):
    """Seven-level U-Net on the log-frequency magnitude: mask features at full size, latent at 1/8.

    Down: convolution 4x4, stride 2; up: nearest upsampling by 2 and convolution 3x3; none has a bias. At the defaults
    it has 30,274,178 parameters. ``base_channels`` is the width of the first level; ``mask_channels`` is C of the mask
    features. ``fold_upsampling`` computes each upsampling and its convolution in one step, which is exact and
    several times cheaper; the parameters are the 3x3 weights either way. The network sees log1p(X) of the
    magnitude X, as iQuery does; with ``log_floor`` above 0 it sees log(max(X, ``log_floor``)), as Sound of Pixels
    does (1e-10 there).

    Shapes:
        input [B, 1, F, T] with F and T multiples of 128; ``mask_features`` [B, mask_channels, F, T];
        ``latent`` [B, 4*base_channels, F/8, T/8], after its normalisation and before the ReLU; ``skips`` the seven
        encoder maps before their activations, from F/2 down to F/128; ``ups`` d_7 to d_2, after their normalisation and
        before the ReLU.
    """

    provides = ("mask_features", "latent", "skips", "spectrogram")
    size_multiple = 128
    tap_names = ("e3", "e4", "e5", "d4", "d2", "F")

    def __init__(
        self,
        *,
        base_channels: int = 64,
        mask_channels: int = 32,
        fold_upsampling: bool = True,
        log_floor: float = 0.0,
    ) -> None:
        super().__init__()
        if base_channels < 1 or mask_channels < 1:
            raise ValueError(f"base_channels and mask_channels must be positive, got {base_channels}, {mask_channels}")
        if not log_floor >= 0:
            raise ValueError(f"log_floor must be 0 (log1p) or more, got {log_floor}")
        self.log_floor = log_floor
        self.mask_channels = mask_channels
        self.latent_channels = 4 * base_channels
        width = [1, *(base_channels * m for m in (1, 2, 4, 8, 8, 8, 8))]  # channels of e_0 (input) .. e_7
        self.input_norm = nn.BatchNorm2d(1)
        self.down = nn.ModuleList(Conv2d(width[k], width[k + 1], 4, stride=2, padding=1, bias=False) for k in range(7))
        # e_1 and e_7 have no normalisation
        self.down_norm = nn.ModuleList(nn.BatchNorm2d(width[k]) for k in range(2, 7))
        # d_7 first, d_1 last; d_k has the channels of e_(k-1), and all but d_7 read [e_k, d_(k+1)]
        out = [*width[6:0:-1], mask_channels]
        self.up = nn.ModuleList(
            UpConv(width[7 - i] * (1 if i == 0 else 2), channels, fold=fold_upsampling)
            for i, channels in enumerate(out)
        )
        self.up_norm = nn.ModuleList(nn.BatchNorm2d(channels) for channels in out[:-1])

    def forward(self, spectrogram: Tensor) -> AudioFeatures:
        check_size(spectrogram, self.size_multiple, "unet7")
        x = log_magnitude(spectrogram, self.log_floor) if self.log_floor else spectrogram
        e = self.down[0](self.input_norm(x))  # e_1 [B, c, F/2, T/2]
        if not torch.compiler.is_exporting():
            # Channels last from here on: on two CPU cores the forward pass takes half the time, a training step 4/5.
            e = e.contiguous(memory_format=torch.channels_last)
        skips = [e]
        for k in range(1, 7):
            e = self.down[k](F.leaky_relu(skips[-1], 0.2))
            skips.append(self.down_norm[k - 1](e) if k < 6 else e)
        d = self.up_norm[0](self.up[0](F.relu(skips[6])))  # d_7
        ups = [d]
        for i in range(1, 7):
            d = self.up[i](F.relu_(torch.cat((skips[6 - i], d), dim=1)))  # skip first, as published
            if i < 6:
                d = self.up_norm[i](d)
                ups.append(d)
        return AudioFeatures(
            mask_features=d,
            latent=ups[3],  # d_4
            skips=tuple(skips),
            ups=tuple(ups),
            spectrogram=spectrogram,
        )

    def taps(self, audio: AudioFeatures) -> dict[str, Tensor]:
        """The maps that :meth:`avsep.separator.Separator.taps` names, of this encoder's features."""
        assert audio.mask_features is not None
        named = {f"e{k}": audio.skips[k - 1] for k in (3, 4, 5)}
        named |= {f"d{k}": audio.ups[7 - k] for k in (4, 2)}
        return {**named, "F": audio.mask_features}

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        up = self.up.named_parameters(prefix="up")
        return (
            *weight_places(self),
            *(AdapterPlace(name, tuple(weight.shape), "convolution") for name, weight in up),
        )

"""The way down of Co-Separation's U-Net; its mask decoder has the way up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.convolution import Conv2d
from avsep.dsp import log_magnitude
from avsep.encoders.audio._sizes import check_size
from avsep.encoders.base import AudioEncoder, weight_places
from avsep.registry import AUDIO_ENCODERS
from avsep.types import AdapterPlace, AudioFeatures

__all__ = ["Conv7", "init_as_published"]


def init_as_published(module: nn.Module) -> None:
    """Co-Separation's first weights: N(0, 0.02) of convolutions, N(1, 0.02) of normalisations; biases of these are 0,
    those of convolutions PyTorch's. For ``module.apply``."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


@AUDIO_ENCODERS.register(
    "conv7",
    source="Gao and Grauman, Co-Separating Sounds of Visual Objects, ICCV 2019",
    example={"base_channels": 4},
)
class Conv7(AudioEncoder):
    """Seven convolutions down to a bottleneck at 1/128, without a way up: for ``conditioned_unet``.

    Each is 4x4, stride 2, with a bias, a normalisation and a leaky ReLU (0.2). ``base_channels`` is the width of the
    first; the others have 2, 4, 8, 8, 8 and 8 times as many. The network sees log(max(X, ``log_floor``)) of the
    magnitude X.

    Shapes:
        input [B, 1, F, T] (log1p X) with F and T multiples of 128; ``skips`` the seven maps after their normalisation
        and before their activation, from F/2 down to F/128; ``latent`` the last of them, [B, 8*base_channels, F/128,
        T/128]. There are no mask features.
    """

    provides = ("latent", "bottleneck", "skips", "spectrogram")
    size_multiple = 128
    tap_names = ("e3", "e4", "e5")

    def __init__(self, *, base_channels: int = 64, log_floor: float = 1e-10) -> None:
        super().__init__()
        if base_channels < 1:
            raise ValueError(f"base_channels must be positive, got {base_channels}")
        if not log_floor > 0:
            raise ValueError(f"log_floor must be above 0, got {log_floor}")
        self.log_floor = log_floor
        self.skip_channels = tuple(base_channels * m for m in (1, 2, 4, 8, 8, 8, 8))
        self.latent_channels = self.skip_channels[-1]
        self.down = nn.ModuleList(
            Conv2d(below, above, 4, stride=2, padding=1)
            for below, above in zip((1, *self.skip_channels), self.skip_channels, strict=False)
        )
        self.down_norm = nn.ModuleList(nn.BatchNorm2d(channels) for channels in self.skip_channels)
        self.apply(init_as_published)

    def forward(self, spectrogram: Tensor) -> AudioFeatures:
        check_size(spectrogram, self.size_multiple, "conv7")
        x = log_magnitude(spectrogram, self.log_floor)
        skips: list[Tensor] = []
        for conv, norm in zip(self.down, self.down_norm, strict=True):
            e = conv(F.leaky_relu(skips[-1], 0.2) if skips else x)
            if not skips and not torch.compiler.is_exporting():
                e = e.contiguous(memory_format=torch.channels_last)  # as in unet7, for speed
            skips.append(norm(e))
        return AudioFeatures(mask_features=None, latent=skips[-1], skips=tuple(skips), spectrogram=spectrogram)

    def taps(self, audio: AudioFeatures) -> dict[str, Tensor]:
        """The maps that :meth:`avsep.separator.Separator.taps` names, of this encoder's features."""
        return {f"e{k}": audio.skips[k - 1] for k in (3, 4, 5)}

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        return weight_places(self)

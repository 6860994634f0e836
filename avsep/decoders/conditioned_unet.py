"""Co-Separation's mask decoder: a U-Net's way up for every source, conditioned on its object, and a classifier."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.convolution import ConvTranspose2d
from avsep.decoders._classifier import SpectrogramClassifier
from avsep.decoders.base import MaskDecoder
from avsep.dsp import magnitude
from avsep.encoders.audio.conv7 import init_as_published
from avsep.encoders.base import weight_places
from avsep.errors import ConfigError
from avsep.registry import MASK_DECODERS
from avsep.types import AdapterPlace, AudioFeatures, MaskOutput, Spectrograms, VisualFeatures

__all__ = ["ConditionedUNet", "SharedUpConv"]


class SharedUpConv(nn.Module):
    """Transposed convolution (4x4, stride 2) of a source's own maps beside maps that all sources of a mixture share.

    It is linear, so the shared maps go through it once a mixture and are added: [B*N, own, H, W] and [B, shared, H, W]
    -> [B*N, out, 2H, 2W], equal to the convolution of the two concatenated. With ``norm`` a normalisation follows.
    """

    def __init__(self, own: int, shared: int, out: int, *, norm: bool = True) -> None:
        super().__init__()
        self.own = ConvTranspose2d(own, out, 4, stride=2, padding=1)
        self.shared = ConvTranspose2d(shared, out, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out) if norm else nn.Identity()

    def forward(self, own: Tensor, shared: Tensor, shape: tuple[int, int]) -> Tensor:
        total = self.own(own).unflatten(0, shape) + self.shared(shared)[:, None]  # [B, N, out, 2H, 2W]
        maps: Tensor = self.norm(total.flatten(0, 1))
        return maps


@MASK_DECODERS.register(
    "conditioned_unet",
    source="Gao and Grauman, Co-Separating Sounds of Visual Objects, ICCV 2019; fed as by ContAV-Sep (NeurIPS 2024)",
    example={"dim": 16},
)
class ConditionedUNet(MaskDecoder):
    """A U-Net's way up for every source, with its object's vector at the bottleneck; class-agnostic masks.

    ``dim`` is the width of the object's vector, a linear map of the object feature (with ``project`` off the feature
    itself), which stands at every place of the bottleneck in front of the audio. Seven transposed convolutions 4x4
    follow, each but the last with normalisation and ReLU, each but the first with the encoder's map of its size behind
    the one below. With ``conv7`` the U-Net has 46,022,785 parameters at full size.

    The separated spectrogram, log(M X + ``log_floor``), is classified by a ResNet-18 of width ``dim`` / 8 with one
    output a class. Its cross-entropy with the source's class is the consistency loss, weighed by
    ``consistency_weight`` (:meth:`auxiliary_losses`); its last vector is the audio embedding f_a, as wide as f_o, the
    object's vector. The classifier runs only where one of the two is read: not at test time, and in no exported
    graph. At first all sources of a mixture have one mask and sound alike, and a term that compares f_a with f_o then
    pulls the sources together through their masks, whatever its weight, as long as nothing parts them. With
    ``detach_embedding`` f_a has no gradient to the masks (the consistency loss has, and pays for a second pass of the
    classifier): such terms teach the classifier and the object's vector, and the masks through that vector alone.

    The co-separation loss of the paper sums the masks of all objects of a video before they are compared with its ratio
    mask. Here a video has one object and there are no scene images, so it is the separation loss
    (:func:`avsep.losses.separation_loss`), which the strategy brings.

    Shapes:
        seven skips from F/2 down to F/128 before their activations, spectrogram [B, 1, F, T], object
        [B, N, object_dim], class_ids [B, N] (only their shape is used) -> logits [B, N, F, T], f_a and f_o [B, N, dim],
        class logits [B, N, num_classes], maps ``d4`` at 1/8 and ``d2`` at 1/2 after their normalisation and before the
        ReLU.
    """

    needs = ("bottleneck", "skips", "spectrogram", "object")
    class_agnostic = True
    independent_sources = True

    def __init__(
        self,
        *,
        num_classes: int,
        skip_channels: Sequence[int],
        object_dim: int,
        dim: int = 512,
        project: bool = True,
        consistency_weight: float = 0.05,
        log_floor: float = 1e-10,
        detach_embedding: bool = False,
    ) -> None:
        super().__init__()
        if dim < 8 or dim % 8:
            raise ValueError(f"dim must be a multiple of 8, the classifier's width times 8, got {dim}")
        if not project and object_dim != dim:
            raise ValueError(
                f"the object feature is {object_dim} wide and dim is {dim}: without project they must be the same"
            )
        if not consistency_weight >= 0:
            raise ValueError(f"consistency_weight must be 0 or more, got {consistency_weight}")
        if not log_floor > 0:
            raise ValueError(f"log_floor must be above 0, got {log_floor}")
        if len(skip_channels) != 7:
            raise ValueError(f"the audio encoder must give seven skips, got {len(skip_channels)}")
        self.num_classes = num_classes
        self.consistency_weight = consistency_weight
        self.log_floor = log_floor
        self.detach_embedding = detach_embedding
        self.object_proj = nn.Linear(object_dim, dim) if project else nn.Identity()
        # d_7 first, d_1 last; d_k has the channels of e_(k-1) and reads [d_(k+1), e_k]; in place of d_8 is the object
        out = (*reversed(skip_channels[:-1]), 1)
        self.up = nn.ModuleList(
            SharedUpConv(own, shared, channels, norm=i < 6)
            for i, (own, shared, channels) in enumerate(zip((dim, *out), reversed(skip_channels), out, strict=False))
        )
        self.up.apply(init_as_published)
        self.classifier = SpectrogramClassifier(num_classes=num_classes, width=dim // 8)

    def grow(self, num_classes: int) -> None:
        """Make room for ``num_classes`` classes in the classifier; the old rows stay, the masks do not change."""
        super().grow(num_classes)
        self.classifier.grow(num_classes)

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        if visual.object is None:
            raise ConfigError("conditioned_unet needs object features, and none were given")
        assert audio.spectrogram is not None
        batch, sources = class_ids.shape
        object_embedding = self.object_proj(visual.object)  # f_o [B, N, D]
        height, width = audio.skips[-1].shape[-2:]
        d = object_embedding.flatten(0, 1)[:, :, None, None].expand(-1, -1, height, width)
        maps: dict[str, Tensor] = {}
        for k, up in zip(range(7, 0, -1), self.up, strict=True):
            d = up(d, F.leaky_relu(audio.skips[k - 1], 0.2), (batch, sources))  # d_k [B*N, ., F/2^(k-1), T/2^(k-1)]
            if k > 1:
                if k in (4, 2):
                    maps[f"d{k}"] = d.unflatten(0, (batch, sources))
                d = F.relu(d)
        logits = d.unflatten(0, (batch, sources)).squeeze(2)  # [B, N, F, T]
        return MaskOutput(
            logits=logits,
            audio=functools.partial(
                self._embed, audio.spectrogram, logits.detach() if self.detach_embedding else logits
            ),
            object=object_embedding,
            classify=self.classifier.fc,
            maps=maps,
        )

    def _embed(self, spectrogram: Tensor, logits: Tensor) -> Tensor:
        """f_a [B, N, D]: what the classifier makes of the separated spectrograms."""
        mask = logits.to(spectrogram.dtype).sigmoid()
        separated = (magnitude(spectrogram) * mask + self.log_floor).log()  # [B, N, F, T]
        embedding: Tensor = self.classifier(separated.flatten(0, 1)[:, None])
        return torch.unflatten(embedding, 0, logits.shape[:2])

    def auxiliary_losses(self, output: MaskOutput, spectrograms: Spectrograms, class_ids: Tensor) -> dict[str, Tensor]:
        """The consistency loss, weighted: cross-entropy of each separated source with its class, the mean over
        sources. Empty where its weight is 0."""
        if self.consistency_weight == 0:
            return {}
        if self.detach_embedding:  # computed once more, with the masks' gradient
            class_logits = self.classifier.fc(self._embed(spectrograms.network_input, output.logits))
        else:
            assert output.class_logits is not None
            class_logits = output.class_logits
        loss = F.cross_entropy(class_logits.flatten(0, 1).float(), class_ids.flatten())
        return {"consistency": self.consistency_weight * loss}

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        """The object's map and the way up; the classifier learns from what is separated, and takes no part in it."""
        return (*weight_places(self.object_proj, "object_proj"), *weight_places(self.up, "up"))

"""Temporal pixel-wise audio-visual interaction, of a spectrogram with what is seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avsep.decoders._alignment import at_frames
from avsep.decoders.base import MaskDecoder
from avsep.encoders.base import weight_places
from avsep.errors import ConfigError
from avsep.registry import MASK_DECODERS
from avsep.types import AdapterPlace, AudioFeatures, MaskOutput, VisualFeatures

__all__ = ["TPAVI", "interaction"]


def interaction(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dot-product non-local interaction of a map with a guide that is the same at all places of a time step.

    y_i = (1 / HW) sum_j (query_i . key_t(j)) value_j over all places j, t(j) the time of j. The keys repeat along
    frequency, so the sum over j is one over times of sums along frequency, and no HW x HW matrix is formed.

    Args:
        query: [B, E, H, W], of the map (H along frequency, W along time).
        key: [B, N, E, W], of the guides of N sources.
        value: [B, E, H, W], of the map.

    Returns:
        [B, N, E, H, W].
    """
    height, width = query.shape[2:]
    kernel = key @ value.sum(dim=2).transpose(1, 2)[:, None]  # [B, N, E, W] x [B, 1, W, E]: sum over times
    flat = query.flatten(2)[:, None]  # [B, 1, E, HW]
    made = kernel.transpose(2, 3) @ flat / (height * width)  # [B, N, E, HW]
    return torch.unflatten(made, 3, (height, width))


@MASK_DECODERS.register(
    "tpavi",
    source="Zhou et al., Audio-Visual Segmentation, ECCV 2022 (AVSBench), with sound and sight exchanged",
    example={"dim": 8},
)
class TPAVI(MaskDecoder):
    """AVSBench's interaction between what is seen and a spectrogram; class-agnostic masks.

    There audio guides maps of pixels; here what is seen of a source guides the audio latent: its object and its motion,
    brought to the latent's columns, are the keys, the latent the queries and values (:func:`interaction`; of the
    original's forms its default, the dot product). The outcome goes through a 1x1 convolution and a normalisation that
    begins at zero, is added to the latent and normalised over its channels. A 1x1 convolution of that gives, for each
    place of the latent, the weights of the mask features and a bias, and so the mask of the 8 x 8 pixels below it.
    ``dim`` is the width of queries, keys and values. Its audio-visual matching loss, which assumes pixels, is left out.

    Shapes:
        latent [B, latent_channels, H, W], mask features [B, C, F, T] with F = H h and T = W w for whole h and w, object
        [B, N, object_dim], motion [B, N, motion_dim, Tm], class_ids [B, N] (only their shape is used) -> logits
        [B, N, F, T], f_a, f_o and f_m [B, N, dim].
    """

    needs = ("mask_features", "latent", "object")
    class_agnostic = True
    independent_sources = True

    def __init__(
        self,
        *,
        num_classes: int,
        mask_channels: int,
        latent_channels: int,
        object_dim: int,
        motion_dim: int | None = None,
        dim: int = 64,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.num_classes = num_classes
        self.query = nn.Conv2d(latent_channels, dim, 1)
        self.value = nn.Conv2d(latent_channels, dim, 1)
        self.object_proj = nn.Linear(object_dim, dim)
        self.motion_proj = None if motion_dim is None else nn.Conv1d(motion_dim, dim, 1)
        self.out = nn.Conv2d(dim, latent_channels, 1)
        self.out_norm = nn.BatchNorm2d(latent_channels)
        nn.init.zeros_(self.out_norm.weight)
        self.norm = nn.LayerNorm(latent_channels)
        self.embed = nn.Linear(latent_channels, dim)
        self.head = nn.Conv2d(latent_channels, mask_channels + 1, 1)

    def grow(self, num_classes: int) -> None:
        """Count more classes; nothing here depends on them."""
        super().grow(num_classes)

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        if visual.object is None:
            raise ConfigError("tpavi needs object features, and none were given")
        latent, features = audio.latent, audio.mask_features
        assert features is not None
        shape, width = class_ids.shape, latent.shape[3]
        object_embedding = self.object_proj(visual.object)  # f_o [B, N, E]
        key, motion_embedding = object_embedding[..., None].expand(-1, -1, -1, width), None
        if self.motion_proj is not None:
            if visual.motion is None:
                raise ConfigError("this separator has a motion encoder, and no motion features were given")
            valid = None if visual.motion_mask is None else visual.motion_mask.flatten(0, 1)
            motion = at_frames(self.motion_proj(visual.motion.flatten(0, 1)), width, valid)
            motion = torch.unflatten(motion, 0, shape)  # [B, N, E, W]
            motion_embedding = motion.mean(dim=-1)
            key = key + motion
        found = interaction(self.query(latent), key, self.value(latent)).flatten(0, 1)  # [B N, E, H, W]
        maps = torch.unflatten(self.out_norm(self.out(found)), 0, shape) + latent[:, None]  # [B, N, D, H, W]
        maps = self.norm(maps.movedim(2, -1)).movedim(-1, 2)
        made = torch.unflatten(self.head(maps.flatten(0, 1)), 0, shape)  # [B, N, C + 1, H, W]
        return MaskOutput(
            audio=self.embed(maps.mean(dim=(3, 4))),
            object=object_embedding,
            motion=motion_embedding,
            logits=_at_pixels(made[:, :, :-1], made[:, :, -1], features),
        )

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        """All but what contrastive losses alone are given."""
        return tuple(place for place in weight_places(self) if not place.parameter.startswith("embed."))


def _at_pixels(weights: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """sum_k w_k F_k + b with weights [B, N, C, H, W] and bias [B, N, H, W] that hold for all pixels below a place:
    features [B, C, F, T] -> [B, N, F, T]."""
    batch, sources, channels, height, width = weights.shape
    h, w = features.shape[2] // height, features.shape[3] // width
    pixels = features.reshape(batch, channels, height, h, width, w).permute(0, 2, 4, 1, 3, 5)  # [B, H, W, C, h, w]
    product = weights.permute(0, 3, 4, 1, 2) @ pixels.flatten(4)  # [B, H, W, N, h w]
    product = product + bias.permute(0, 2, 3, 1)[..., None]
    product = torch.unflatten(product, 4, (h, w)).permute(0, 3, 1, 4, 2, 5)
    return product.reshape(batch, sources, height * h, width * w)

"""A mask decoder whose queries follow their sources in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.decoders._alignment import (
    Presence,
    TimeVaryingHead,
    at_frames,
    is_present,
    time_varying_logits,
)
from avsep.decoders._contrast import ContrastEmbedding
from avsep.decoders.base import MaskDecoder
from avsep.encoders.base import weight_places
from avsep.errors import ConfigError
from avsep.registry import MASK_DECODERS
from avsep.types import AdapterPlace, AudioFeatures, MaskOutput, Spectrograms, VisualFeatures

__all__ = ["AlignedQuery"]

_SPREAD = 0.3  # of a class's vector at first: one of N(0, 1) would drown what is seen for hundreds of steps


@MASK_DECODERS.register(
    "aligned_query",
    source="this library",
    example={"dim": 16, "bands": 4, "layers": 1},
)
class AlignedQuery(MaskDecoder):
    """A mask is a weighted sum of the mask features whose weights change in time, with what moves and what sounds.

    A source's query is the sum of its object, its class and its motion, brought to the mask's time frames; beside it
    stands what the mixture is like at that time: its spectrum, and the mask features' means in ``bands`` parts of the
    frequency axis. ``layers`` convolutions in time (``kernel`` frames wide, with dilations 1, 3, 9, ..., each added to
    what it reads) make of both the source's state, and a linear map the weights of the mask features and a bias for
    every row of frequencies: M(f, t) = sigmoid(sum_k w_k(t) F_k(f, t) + b(f, t)). So two players of one instrument get
    different masks if they move at different times.

    ``class_given`` off leaves the class out: the decoder goes by the pictures alone (and then takes no class at all).
    Sources without a picture, or of unknown motion, get a learned vector in place of the object and of the motion.
    Whether a source sounds in the mixture is told beside its mask, learned by binary cross-entropy with the weight
    ``presence_weight`` against whether its magnitudes make up 1 % of the mixture's. ``causal`` makes a frame's mask
    depend on no later frame: the convolutions pad in the past, and there is no motion, whose encoders see a whole clip
    at once (for streams, :mod:`avsep.inference.streaming`). ``contrast_embedding`` says what
    CrossSDC is given of f_a (:class:`~avsep.decoders._contrast.ContrastEmbedding`).

    Shapes:
        mask_features [B, C, F, T] with F = ``log_rows`` a multiple of ``bands``, object [B, N, object_dim], motion
        [B, N, motion_dim, Tm] (where there is a motion encoder), class_ids [B, N] -> logits [B, N, F, T], presence
        [B, N], embeddings f_a (the state's mean in time), f_o and f_m [B, N, dim].
    """

    needs = ("mask_features", "spectrogram", "object")
    independent_sources = True
    tells_presence = True
    takes_unseen = True
    mask_head = "head"

    def __init__(
        self,
        *,
        num_classes: int,
        mask_channels: int,
        object_dim: int,
        log_rows: int,
        motion_dim: int | None = None,
        dim: int = 64,
        bands: int = 8,
        layers: int = 2,
        kernel: int = 5,
        class_given: bool = True,
        presence_weight: float = 0.1,
        causal: bool = False,
        contrast_embedding: Literal["shared", "detached", "projected"] = "shared",
    ) -> None:
        super().__init__()
        if not presence_weight >= 0:
            raise ValueError(f"presence_weight must be 0 or more, got {presence_weight}")
        if causal and motion_dim is not None:
            raise ValueError(
                "causal takes no motion features, which are of a whole clip and look ahead: leave the motion_encoder "
                "out"
            )
        self.causal = causal
        self.head = TimeVaryingHead(
            dim, mask_channels, log_rows, bands=bands, layers=layers, kernel=kernel, causal=causal
        )
        self.contrast = ContrastEmbedding(contrast_embedding, dim)
        self.num_classes = num_classes
        self.dim = dim
        self.class_agnostic = not class_given
        self.query_parameter = "class_queries" if class_given else ""
        self.presence_weight = presence_weight
        self.class_queries = nn.Parameter(_SPREAD * torch.randn(num_classes, dim)) if class_given else None
        self.object_proj = nn.Linear(object_dim, dim)
        self.no_object = nn.Parameter(_SPREAD * torch.randn(dim))
        self.motion_proj = self.no_motion = None
        if motion_dim is not None:
            self.motion_proj = nn.ModuleList(nn.Conv1d(width, dim, 3, padding=1) for width in (motion_dim, dim))
            self.motion_norm = nn.LayerNorm(dim)
            self.no_motion = nn.Parameter(torch.randn(dim))
        self.presence = Presence(dim)

    @property
    def presence_offsets(self) -> Tensor:  # type: ignore[override]
        return self.presence.offsets

    def grow(self, num_classes: int) -> None:
        """Make room for ``num_classes`` classes: old query rows stay, new ones are drawn from N(0, 0.3^2).

        The parameter is a new object afterwards: optimisers made before do not know it.

        Raises:
            ConfigError: when there would be fewer classes than now.
        """
        super().grow(num_classes)
        old = self.class_queries
        if old is not None:
            new = _SPREAD * torch.randn(num_classes - len(old), self.dim).to(old)
            self.class_queries = nn.Parameter(torch.cat((old.detach(), new)), requires_grad=old.requires_grad)

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        return self._run(audio, visual, class_ids, None)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**self.head.state_shapes(), **self.presence.state_shapes()} if self.causal else super().state_shapes()

    def advance(
        self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[MaskOutput, dict[str, Tensor]]:
        if not self.causal:
            return super().advance(audio, visual, class_ids, state)
        after = dict(state)
        return self._run(audio, visual, class_ids, after), after

    def _run(
        self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor, stream: dict[str, Tensor] | None
    ) -> MaskOutput:
        if visual.object is None:
            raise ConfigError("aligned_query needs object features, and none were given")
        features = audio.mask_features
        assert features is not None
        assert audio.spectrogram is not None
        frames = features.shape[3]
        object_embedding = self.object_proj(visual.object)  # f_o [B, N, D]
        if visual.seen is not None:
            object_embedding = object_embedding.where(visual.seen[..., None], self.no_object.to(object_embedding.dtype))
        query = object_embedding if self.class_queries is None else object_embedding + self.class_queries[class_ids]
        query = query[..., None]  # [B, N, D, 1]
        motion_embedding = None
        if self.motion_proj is not None:
            motion = self._motion(visual, frames)  # [B, N, D, T]
            motion_embedding = motion.mean(dim=-1)
            query = query + motion
        state, weights, bias = self.head(query.expand(-1, -1, -1, frames), features, audio.spectrogram, stream)
        logits = time_varying_logits(weights, bias, features)
        if stream is None:
            presence = self.presence(state, logits, audio.spectrogram, visual)
        else:
            presence = self.presence.advance(state, logits, audio.spectrogram, visual, stream)
        return MaskOutput(
            audio=self.contrast(state.mean(dim=-1)),
            object=object_embedding,
            motion=motion_embedding,
            logits=logits,
            presence=presence,
        )

    def _motion(self, visual: VisualFeatures, frames: int) -> Tensor:
        """The sources' motion at the mask's frames: [B, N, D, T]."""
        if visual.motion is None:
            raise ConfigError("this separator has a motion encoder, and no motion features were given")
        assert self.motion_proj is not None
        assert self.no_motion is not None
        valid = None if visual.motion_mask is None else visual.motion_mask.flatten(0, 1)
        motion = visual.motion.flatten(0, 1)
        for number, layer in enumerate(self.motion_proj):
            motion = F.relu(motion) if number else motion
            motion = layer(motion if valid is None else motion * valid[:, None].to(motion.dtype))
        motion = self.motion_norm(at_frames(motion, frames, valid).transpose(1, 2)).transpose(1, 2)
        motion = torch.unflatten(motion, 0, visual.motion.shape[:2])
        if (known := visual.moving) is None:
            return motion
        return motion.where(known[..., None, None], self.no_motion.to(motion.dtype)[:, None])

    def auxiliary_losses(self, output: MaskOutput, spectrograms: Spectrograms, class_ids: Tensor) -> dict[str, Tensor]:
        """The cross-entropy of the presence, weighted; nothing where its weight is 0."""
        if self.presence_weight == 0:
            return {}
        assert output.presence is not None
        target = is_present(spectrograms).to(torch.float32)
        loss = F.binary_cross_entropy_with_logits(output.presence.float(), target)
        return {"presence": self.presence_weight * loss}

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        """All but what tells the presence and what contrastive losses alone are given; the head, which ends the way to
        the masks, is last."""
        masks = [p for p in weight_places(self) if not p.parameter.startswith(("presence.", "contrast."))]
        return tuple(sorted(masks, key=lambda place: place.parameter.startswith("head.")))

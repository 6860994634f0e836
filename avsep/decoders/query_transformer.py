"""iQuery's audio-visual transformer: one learnable query a class, which starts from the object feature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.decoders._alignment import TimeVaryingHead, at_frames, time_varying_logits
from avsep.decoders._contrast import ContrastEmbedding
from avsep.decoders.base import MaskDecoder, tasks_of
from avsep.encoders.base import weight_places
from avsep.errors import ConfigError
from avsep.registry import MASK_DECODERS
from avsep.types import AdapterPlace, AudioFeatures, MaskOutput, VisualFeatures

__all__ = ["SLOT_ATTENTIONS", "Attention", "QueryTransformer", "positions_1d", "positions_2d"]

SLOT_ATTENTIONS = ("released", "causal", "self")
"""Which queries one attends to: all; those of its task and of earlier ones; itself."""


def _wave(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines, interleaved: [P] -> [P, dim], channel pair j at the rate 10000^(-2j/dim)."""
    pairs = torch.arange((dim + 1) // 2, device=positions.device, dtype=positions.dtype)
    angles = positions[:, None] * torch.exp(pairs * (-2.0 * math.log(10000.0) / dim))
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :dim]


def positions_1d(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal positions of a sequence, from 0: [length, dim] (Vaswani et al., 2017)."""
    return _wave(torch.arange(length, device=device, dtype=torch.float32), dim)


def positions_2d(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal positions of a map, row by row: [height*width, dim], first half from y, second from x.

    Coordinates count from 1 and are scaled to 2 pi at the last (Carion et al., DETR, ECCV 2020).
    """
    half = dim // 2
    rows, columns = (
        _wave(torch.arange(1, n + 1, device=device, dtype=torch.float32) * (2 * math.pi / (n + 1e-6)), half)
        for n in (height, width)
    )
    y = rows[:, None, :].expand(height, width, half)
    x = columns[None, :, :].expand(height, width, half)
    return torch.cat((y, x), dim=2).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention with query, key and value projections in one matrix [3D, D], as ``nn.MultiheadAttention``.

    The packed matrix keeps the published initialisation (Xavier over the whole of it).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_weight)
        nn.init.zeros_(self.out.bias)

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, h, T, D/h]

    def _project(self, x: Tensor, part: int) -> Tensor:
        """Part 0, 1 or 2 of the packed projection, query, key or value, by heads: [B, T, D] -> [B, h, T, D/h]."""
        return self._split(F.linear(x, self.in_weight.chunk(3)[part], self.in_bias.chunk(3)[part]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [B, Tq, D], key and value [B, Tk, D]; ``mask`` bool, True = take part, as wide as [B, 1, Tq, Tk]."""
        q, k, v = self._project(query, 0), self._project(key, 1), self._project(value, 2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, h, Tq, D/h]
        attended: Tensor = self.out(x.transpose(1, 2).flatten(2))
        return attended

    def alone(self, value: Tensor) -> Tensor:
        """:meth:`forward` where each query sees one key, its own, which then has the weight 1: [B, T, D] -> [B, T, D].

        Queries and keys play no part, so the gradient of their projections is zero.
        """
        dim = value.shape[-1]
        attended: Tensor = self.out(F.linear(value, self.in_weight[2 * dim :], self.in_bias[2 * dim :]))
        return attended

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """What :meth:`forward` weighs the values with: [B, h, Tq, Tk], fp32 (or float64), rows of sum 1."""
        q, k = self._project(query, 0), self._project(key, 1)
        scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[3])
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=3)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear2(F.relu(self.linear1(x)))
        return out


class EncoderLayer(nn.Module):
    """Self-attention over the audio tokens, post-norm."""

    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads)
        self.self_norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward)
        self.feedforward_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, HW, D], positions [HW, D] -> [B, HW, D]"""
        at = tokens + positions
        tokens = self.self_norm(tokens + self.self_attention(at, at, tokens))
        tokens = self.feedforward_norm(tokens + self.feedforward(tokens))
        return tokens


class MotionLayer(nn.Module):
    """Decoder layer 0: every query attends to its source's motion, and to nothing else."""

    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.motion_attention = Attention(dim, heads)
        self.motion_norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward)
        self.feedforward_norm = nn.LayerNorm(dim)

    def forward(self, states: Tensor, queries: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """states [B*N, Q, D], queries [Q, D] or [B*N, Q, D], key and value [B*N, Tm, D] -> [B*N, Q, D]"""
        states = self.motion_norm(states + self.motion_attention(states + queries, key, value, mask))
        states = self.feedforward_norm(states + self.feedforward(states))
        return states


class AudioLayer(nn.Module):
    """Further decoder layers: the queries of a source attend to each other, then to the mixture's audio tokens."""

    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads)
        self.self_norm = nn.LayerNorm(dim)
        self.audio_attention = Attention(dim, heads)
        self.audio_norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward)
        self.feedforward_norm = nn.LayerNorm(dim)

    def forward(
        self,
        states: Tensor,
        queries: Tensor,
        context: Tensor,
        context_queries: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Update ``states`` [B, N, S, D], a part (or all) of ``context`` [B, N, Q, D], the states before this layer.

        ``queries`` ([B, N, S, D] or [S, D]) and ``context_queries`` [Q, D] are the learned queries added to them;
        ``key`` and ``value`` [B, HW, D] the audio tokens with and without positions. The N sources of a mixture stand
        in the query axis of the audio attention, so that its tokens are projected once a mixture and never copied.
        ``visible``, bool [B*N, 1, S, Q] or as wide: the states of the context that each state attends to; None: all.
        """
        batch, sources = states.shape[:2]
        at = (states + queries).flatten(0, 1)  # [B*N, S, D]
        context_key = (context + context_queries).flatten(0, 1)  # [B*N, Q, D]
        update = self.self_attention(at, context_key, context.flatten(0, 1), visible).unflatten(0, (batch, sources))
        return self._hear(self.self_norm(states + update), queries, key, value)

    def alone(self, states: Tensor, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """:meth:`forward` where each of ``states`` [B, N, S, D] attends to itself in place of the context."""
        update = torch.unflatten(self.self_attention.alone(states.flatten(0, 1)), 0, states.shape[:2])
        return self._hear(self.self_norm(states + update), queries, key, value)

    def _hear(self, states: Tensor, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What follows the attention among the states: that to the audio, and the feed-forward layers."""
        batch, sources, count, dim = states.shape
        at = (states + queries).reshape(batch, sources * count, dim)
        update = self.audio_attention(at, key, value).reshape(batch, sources, count, dim)
        states = self.audio_norm(states + update)
        states = self.feedforward_norm(states + self.feedforward(states))
        return states


@MASK_DECODERS.register(
    "query_transformer",
    source="Chen et al., iQuery, CVPR 2023, as used by ContAV-Sep (NeurIPS 2024)",
    example={"dim": 16, "heads": 2, "feedforward": 16, "encoder_layers": 1, "layers": 2},
)
class QueryTransformer(MaskDecoder):
    """Transformer with one learnable query a class; a mask is its query's final state times the mask features.

    ``dim`` is the width, ``heads`` and ``feedforward`` those of every layer, ``encoder_layers`` act on the audio
    latent, ``layers`` is the number of decoder layers. With a motion encoder decoder layer 0 attends to motion only and
    the others to the queries' states and the audio; without one all are of the second kind.

    It computes what the published code computes, less what that code throws away: the audio encoder runs once a mixture
    rather than once a source, the last layer and the masks only for the queried classes, and attentions that are never
    called have no parameters.

    As released, every query sees all others, those of classes that came later too, so that adding classes changes the
    masks of old ones before anything is learned. With ``slot_attention="causal"`` a query attends to those of its own
    and of earlier tasks alone, a class's task being the step that added it; with ``"self"`` to itself alone, and what
    a class gets depends on no other query at all (the attention's query and key weights then play no part, and have
    the gradient zero). New classes then change old masks by nothing but rounding; what training does to shared
    weights is another matter. All three have the same parameters.

    With ``time_varying`` the published query is one in time: to its vector of weights, the
    same at all times, are added weights and a bias that vary with the source's motion and with what sounds
    (:class:`~avsep.decoders._alignment.TimeVaryingHead` of 8 bands and 2 layers); they begin at zero, so that a
    separator starts as the published one does. At the published setting (5 classes, 512-d objects, 768-d motion) it
    has 5,209,632 parameters, and 256 more for each further class.

    ``contrast_embedding`` says what CrossSDC is given of f_a, the vector that masks are made from
    (:class:`~avsep.decoders._contrast.ContrastEmbedding`).

    Shapes:
        audio latent [B, latent_channels, H, W], mask features [B, mask_channels, F, T], object [B, N, object_dim],
        motion [B, N, motion_dim, Tm], motion mask [B, N, Tm] (True = valid), class_ids [B, N] -> logits [B, N, F, T]
        and the embeddings f_a, f_o, f_m [B, N, dim] that CrossSDC compares.
    """

    needs = ("mask_features", "latent", "object")
    independent_sources = True
    query_parameter = "class_queries"
    mask_head = "head"

    def __init__(
        self,
        *,
        num_classes: int,
        mask_channels: int,
        latent_channels: int,
        object_dim: int,
        motion_dim: int | None = None,
        log_rows: int = 256,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        encoder_layers: int = 1,
        layers: int = 4,
        time_varying: bool = False,
        slot_attention: Literal["released", "causal", "self"] = "released",
        contrast_embedding: Literal["shared", "detached", "projected"] = "shared",
    ) -> None:
        super().__init__()
        if slot_attention not in SLOT_ATTENTIONS:
            raise ValueError(f"slot_attention must be one of {', '.join(SLOT_ATTENTIONS)}, got {slot_attention!r}")
        if dim < 4 or dim % 4 or heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of 4 and of heads, got dim {dim} and heads {heads}")
        if feedforward < 1 or encoder_layers < 0:
            raise ValueError(
                f"feedforward must be positive and encoder_layers not negative, got {feedforward} and {encoder_layers}"
            )
        fewest = 1 if motion_dim is None else 2
        if layers < fewest:
            raise ValueError(
                f"layers must be at least {fewest}, got {layers}"
                + ("" if motion_dim is None else ": with motion, layer 0 does not attend to the audio")
            )
        self.dim = dim
        self.num_classes = num_classes
        self.slot_attention = slot_attention
        self.task_sizes: tuple[int, ...] = (num_classes,)
        self.class_queries = nn.Parameter(torch.randn(num_classes, dim))
        self.input_proj: nn.Module = (
            nn.Identity() if latent_channels == dim else nn.Conv2d(latent_channels, dim, kernel_size=1)
        )
        self.object_proj = nn.Linear(object_dim, dim)
        self.motion_proj = None if motion_dim is None else nn.Linear(motion_dim, dim)
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, feedforward) for _ in range(encoder_layers))
        self.motion_layer = None if motion_dim is None else MotionLayer(dim, heads, feedforward)
        self.layers = nn.ModuleList(
            AudioLayer(dim, heads, feedforward) for _ in range(layers if motion_dim is None else layers - 1)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, mask_channels)
        )
        # Xavier for every matrix inside the transformer, PyTorch's defaults elsewhere, as published.
        for part in (self.encoder, self.motion_layer, self.layers):
            if part is not None:
                for parameter in part.parameters():
                    if parameter.ndim > 1:
                        nn.init.xavier_uniform_(parameter)
        self.contrast = ContrastEmbedding(contrast_embedding, dim)
        self.time_varying = None
        if time_varying:
            self.time_varying = TimeVaryingHead(dim, mask_channels, log_rows, bands=8, layers=2, kernel=5)
            nn.init.zeros_(self.time_varying.out.weight)
            assert self.time_varying.out.bias is not None
            nn.init.zeros_(self.time_varying.out.bias)

    def grow(self, num_classes: int) -> None:
        """Make room for ``num_classes`` classes: old query rows stay, new ones are drawn from N(0, 1).

        The parameter is a new object afterwards: optimisers made before do not know it.

        Raises:
            ConfigError: when there would be fewer classes than now.
        """
        super().grow(num_classes)
        old = self.class_queries
        if num_classes > len(old):
            self.task_sizes = (*self.task_sizes, num_classes - len(old))
        new = torch.randn(num_classes - len(old), self.dim).to(old)
        self.class_queries = nn.Parameter(torch.cat((old.detach(), new)), requires_grad=old.requires_grad)

    @classmethod
    def knows_tasks(cls, params: Mapping[str, Any]) -> bool:
        return params.get("slot_attention") == "causal"

    def set_tasks(self, sizes: Sequence[int]) -> None:
        self.task_sizes = tuple(sizes) or (self.num_classes,)

    def _visible(self) -> Tensor | None:
        """bool [Q, Q], by query and key: which queries attend to which; None: all to all."""
        if self.slot_attention != "causal" or len(self.task_sizes) == 1:
            return None
        ids = torch.arange(len(self.class_queries), device=self.class_queries.device)
        tasks = tasks_of(ids, self.task_sizes)
        return tasks[:, None] >= tasks

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        if visual.object is None:
            raise ConfigError("query_transformer needs object features, and none were given")
        latent = self.input_proj(audio.latent)  # [B, D, H, W]
        positions = positions_2d(latent.shape[2], latent.shape[3], self.dim, latent.device).to(latent.dtype)
        memory = latent.flatten(2).transpose(1, 2)  # [B, HW, D]
        for encoder_layer in self.encoder:
            memory = encoder_layer(memory, positions)
        key = memory + positions

        object_embedding = self.object_proj(visual.object)  # f_o [B, N, D]
        motion_embedding = None
        own_queries = self.class_queries[class_ids][:, :, None, :]  # [B, N, 1, D]
        if self.slot_attention == "self":  # no query sees another: the queried ones are all that is needed
            state = object_embedding[:, :, None, :]
            if self.motion_layer is not None:
                state, motion_embedding = self._attend_to_motion(state, own_queries.flatten(0, 1), visual)
            for layer in self.layers:
                assert isinstance(layer, AudioLayer)
                state = layer.alone(state, own_queries, key, memory)
        else:
            queries = self.class_queries  # [Q, D]
            is_queried = class_ids[..., None] == torch.arange(len(queries), device=class_ids.device)  # [B, N, Q]
            # Every state starts at zero but the queried class's, which holds the object: [B, N, Q, D]
            states = is_queried[..., None] * object_embedding[:, :, None, :]
            if self.motion_layer is not None:
                states, motion_embedding = self._attend_to_motion(states, queries, visual)
            visible = self._visible()
            for layer in self.layers[:-1]:
                states = layer(states, queries, states, queries, key, memory, visible)
            own = class_ids[..., None, None].expand(-1, -1, 1, self.dim)  # [B, N, 1, D], an index of the query axis
            seen = None if visible is None else visible[class_ids.flatten()][:, None, None, :]  # [B*N, 1, 1, Q]
            state = self.layers[-1](states.gather(2, own), own_queries, states, queries, key, memory, seen)
        embedding = self.norm(state.squeeze(2))  # f_a [B, N, D]
        if self.time_varying is not None:
            return MaskOutput(
                audio=self.contrast(embedding),
                object=object_embedding,
                motion=motion_embedding,
                logits=self._varied(embedding, visual, audio),
            )
        return MaskOutput(
            audio=self.contrast(embedding),
            object=object_embedding,
            motion=motion_embedding,
            embedding=self.head(embedding),
            mask_features=audio.mask_features,
        )

    def _varied(self, embedding: Tensor, visual: VisualFeatures, audio: AudioFeatures) -> Tensor:
        """Logits of weights that vary in time, from f_a [B, N, D]: [B, N, F, T]."""
        features = audio.mask_features
        assert features is not None
        assert self.time_varying is not None
        frames = features.shape[3]
        query = embedding[..., None].expand(-1, -1, -1, frames)
        if self.motion_proj is not None:
            assert visual.motion is not None
            motion = self.motion_proj(visual.motion.transpose(2, 3)).transpose(2, 3).flatten(0, 1)
            valid = None if visual.motion_mask is None else visual.motion_mask.flatten(0, 1)
            query = query + torch.unflatten(at_frames(motion, frames, valid), 0, embedding.shape[:2])
        if audio.spectrogram is None:
            raise ConfigError("time_varying needs an audio encoder that gives its spectrogram on (unet7 does)")
        _, weights, bias = self.time_varying(query, features, audio.spectrogram)
        return time_varying_logits(self.head(embedding)[..., None] + weights, bias, features)

    def motion_attention(self, visual: VisualFeatures, class_ids: Tensor) -> Tensor | None:
        """Attention weights of the queried class over its source's motion in decoder layer 0, the mean over heads.

        Computed anew on each call, from the visual features alone (layer 0 does not attend to the audio).

        Returns:
            [B, N, Tm], each row of sum 1 and zero at steps that are not valid; None where there is no motion encoder.
        """
        if self.motion_proj is None or self.motion_layer is None:
            return None
        if visual.object is None:
            raise ConfigError("query_transformer needs object features, and none were given")
        key, _, mask = self._motion_tokens(visual)
        query = (self.object_proj(visual.object) + self.class_queries[class_ids]).flatten(0, 1)[:, None, :]
        weights = self.motion_layer.motion_attention.weights(query, key.flatten(0, 1), mask)  # [B*N, h, 1, Tm]
        return torch.unflatten(weights.mean(dim=1).squeeze(1), 0, class_ids.shape)

    def _motion_tokens(self, visual: VisualFeatures) -> tuple[Tensor, Tensor, Tensor | None]:
        """Projected motion with and without positions, [B, N, Tm, D] each, and the attention's mask [B*N, 1, 1, Tm]."""
        assert self.motion_proj is not None
        if visual.motion is None:
            raise ConfigError("this separator has a motion encoder, and no motion features were given")
        motion = self.motion_proj(visual.motion.transpose(2, 3))
        key = motion + positions_1d(motion.shape[2], self.dim, motion.device).to(motion.dtype)
        if visual.motion_mask is None:
            return key, motion, None
        # A source without any valid step attends to all of them: a softmax over nothing would be NaN.
        valid = visual.motion_mask | ~visual.motion_mask.any(dim=2, keepdim=True)  # [B, N, Tm]
        return key, motion, valid.flatten(0, 1)[:, None, None, :]

    def _attend_to_motion(self, states: Tensor, queries: Tensor, visual: VisualFeatures) -> tuple[Tensor, Tensor]:
        """Layer 0: states [B, N, Q, D] and queries -> the states after motion attention, and f_m [B, N, D]."""
        assert self.motion_layer is not None
        key, motion, mask = self._motion_tokens(visual)
        if visual.motion_mask is None:
            embedding = motion.mean(dim=2)
        else:
            share = visual.motion_mask.to(motion.dtype)
            share = share / share.sum(dim=2, keepdim=True).clamp(min=1.0)
            embedding = (motion * share[..., None]).sum(dim=2)
        out = self.motion_layer(states.flatten(0, 1), queries, key.flatten(0, 1), motion.flatten(0, 1), mask)
        return out.unflatten(0, states.shape[:2]), embedding

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        """All but what contrastive losses alone are given."""
        alone = [layer.self_attention for layer in self.layers if isinstance(layer, AudioLayer)]
        alone = alone if self.slot_attention == "self" else []  # of which the values alone play a part
        packed = [
            AdapterPlace(f"{name}.in_weight", tuple(module.in_weight.shape), maps=3)
            if module not in alone
            else AdapterPlace(f"{name}.in_weight", tuple(module.in_weight.shape), maps=1, dead=2)
            for name, module in self.named_modules()
            if isinstance(module, Attention)
        ]
        return (*packed, *(place for place in weight_places(self) if not place.parameter.startswith("contrast.")))

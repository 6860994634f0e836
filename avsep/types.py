"""Containers that flow between the components; none is changed once it is made.

Dimensions: B batch, N sources, L samples, C channels, F frequency rows, T time frames, K object frames, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from avsep.export.runtime.timeline import VisualSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "AdapterPlace",
    "AudioFeatures",
    "Batch",
    "MaskOutput",
    "Prediction",
    "Spectrograms",
    "Task",
    "VisualFeatures",
    "VisualInputs",
    "VisualSource",
    "limit_mask_sum",
    "move_to",
]


@dataclass(frozen=True)
class AudioFeatures:
    """What an audio encoder gives: ``mask_features`` [B, C, F, T], ``latent`` [B, D, H, W] and the skip maps.

    ``mask_features`` are None of an encoder that leaves the way up to the mask decoder. ``ups`` are the maps of a
    U-Net's way up, coarsest first, that are neither: what methods that compare feature maps look at beside the others.
    ``spectrogram`` [B, 1, F, T] is what the encoder was given, log1p of the warped mixture magnitude, for decoders that
    listen to what they separate.
    """

    mask_features: Tensor | None
    latent: Tensor
    skips: tuple[Tensor, ...] = ()
    ups: tuple[Tensor, ...] = ()
    spectrogram: Tensor | None = None


@dataclass(frozen=True)
class VisualInputs:
    """What the visual encoders take, for N sources of B mixtures: frames (uint8) or stored features (float).

    ``object`` [B, N, K, ...], frames or vectors around the middle of the crop; ``motion`` [B, N, ...], frames in
    order of time or one feature sequence; ``motion_mask`` [B, N, M] bool over the input's time steps, True = valid, or
    None where all are. A role that no encoder asks for is None. ``seen`` [B, N] bool: False of a source of which there
    is no picture, whatever stands in its place; None where all are seen. ``motion_seen`` likewise: False of a source
    whose motion is not known; None where it is known of all that are seen.
    """

    object: Tensor | None = None
    motion: Tensor | None = None
    motion_mask: Tensor | None = None
    seen: Tensor | None = None
    motion_seen: Tensor | None = None

    def __getitem__(self, mixtures: Tensor | slice) -> VisualInputs:
        """The inputs of some of the mixtures."""
        parts = (self.object, self.motion, self.motion_mask, self.seen, self.motion_seen)
        return VisualInputs(*(None if part is None else part[mixtures] for part in parts))


@dataclass(frozen=True)
class VisualFeatures:
    """Encoded frames: ``object`` [B, N, Do]; ``motion`` [B, N, Dm, Tm]; ``motion_mask`` [B, N, Tm], True = valid;
    ``seen`` and ``motion_seen`` [B, N] as in :class:`VisualInputs`."""

    object: Tensor | None = None
    motion: Tensor | None = None
    motion_mask: Tensor | None = None
    seen: Tensor | None = None
    motion_seen: Tensor | None = None

    @property
    def moving(self) -> Tensor | None:
        """[B, N] bool, the sources whose motion is known; None where it is of all."""
        if self.seen is None or self.motion_seen is None:
            return self.seen if self.motion_seen is None else self.motion_seen
        return self.seen & self.motion_seen


@dataclass(frozen=True)
class AdapterPlace:
    """What an adapter may change: a weight of a component (a linear map, a convolution seen as one, a vector) or a map.

    ``parameter`` is its name in the component, ``shape`` its shape. ``kind`` linear is [maps rows, columns], ``maps``
    matrices one below the other (3 of a packed query, key and value projection); convolution [out, in, ...]; transposed
    (a transposed convolution) [in, out, ...]; affine [channels], the scale or the shift of channels, mostly of a
    normalisation's; map [channels] is no weight, but a field of :class:`AudioFeatures`, ``parameter`` its name.
    ``dead``: so many matrices above the ``maps`` play no part, and are left as they are.
    """

    parameter: str
    shape: tuple[int, ...]
    kind: Literal["linear", "convolution", "transposed", "affine", "map"] = "linear"
    maps: int = 1
    dead: int = 0

    @property
    def rows(self) -> int:
        """Outputs of a map."""
        return self.shape[1] if self.kind == "transposed" else self.shape[0] // (self.maps + self.dead)

    @property
    def columns(self) -> int:
        """Inputs of a map; of a convolution times the taps of its kernel."""
        return math.prod(self.shape) // ((self.maps + self.dead) * self.rows)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """[maps, rows, columns] -> the shape of the weight, 0 where nothing plays a part."""
        if self.dead:
            whole = matrix.new_zeros(self.dead + self.maps, self.rows, self.columns)
            whole[self.dead :] = matrix
            matrix = whole
        if self.kind != "transposed":
            return matrix.reshape(self.shape)
        return matrix.reshape(self.rows, self.shape[0], *self.shape[2:]).transpose(0, 1)


class MaskOutput:
    """What a mask decoder gives: the masks' logits and the embeddings [B, N, D] that CrossSDC compares.

    The ``logits`` [B, N, F, T] on the log-frequency grid are given as they are, or as the factors of a product over
    channels, ``embedding`` [B, N, C] and ``mask_features`` [B, C, F, T]. Then they are formed when first asked for,
    and a loss that is computed from the factors (:func:`avsep.losses.mask_losses`) never forms them. The ``audio``
    embedding may be given as a function without arguments, which is called when it is first asked for.

    ``presence`` [B, N] are the logits of whether each asked source sounds in the mixture at all, of decoders that tell.
    ``classify`` takes the audio embedding to :attr:`class_logits`, of decoders that recognise what they separate.
    ``maps`` [B, N, C, H, W] are the named maps, coarsest first, of a decoder that is itself a U-Net: its part of what
    methods that compare feature maps look at.

    Raises:
        ValueError: when there are neither logits nor both factors.
    """

    __slots__ = ("_audio", "_classify", "_logits", "embedding", "maps", "mask_features", "motion", "object", "presence")

    def __init__(
        self,
        *,
        audio: Tensor | Callable[[], Tensor],
        object: Tensor | None = None,
        motion: Tensor | None = None,
        logits: Tensor | None = None,
        embedding: Tensor | None = None,
        mask_features: Tensor | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        maps: Mapping[str, Tensor] | None = None,
        presence: Tensor | None = None,
    ) -> None:
        if logits is None and (embedding is None or mask_features is None):
            raise ValueError("a MaskOutput needs logits, or embedding and mask_features")
        self._audio = audio
        self.object = object
        self.motion = motion
        self.embedding = embedding
        self.mask_features = mask_features
        self.maps = dict(maps or {})
        self.presence = presence
        self._logits = logits
        self._classify = classify

    @classmethod
    def chosen(cls, outputs: Sequence[MaskOutput], masks: Sequence[Tensor]) -> MaskOutput:
        """Of each source the output whose mask [B, N] bool is True: the masks of several outputs tile the sources."""

        def choose(parts: Sequence[Tensor]) -> Tensor:
            found = parts[0]
            for part, mask in zip(parts[1:], masks[1:], strict=True):
                found = part.where(mask.reshape(*mask.shape, *(1,) * (part.ndim - 2)), found)
            return found

        def choose_all(parts: Sequence[Tensor | None]) -> Tensor | None:
            known = [part for part in parts if part is not None]
            return choose(known) if len(known) == len(parts) else None

        first = outputs[0]
        shared = all(o.mask_features is first.mask_features is not None for o in outputs)
        embedding = choose_all([o.embedding for o in outputs]) if shared else None
        return cls(
            audio=lambda: choose([o.audio for o in outputs]),
            object=choose_all([o.object for o in outputs]),
            motion=choose_all([o.motion for o in outputs]),
            logits=choose([o.logits for o in outputs]) if embedding is None else None,
            embedding=embedding,
            mask_features=None if embedding is None else first.mask_features,
            classify=first._classify,
            maps={name: choose([o.maps[name] for o in outputs]) for name in first.maps},
            presence=choose_all([o.presence for o in outputs]),
        )

    def with_limited_sum(self) -> MaskOutput:
        """The same with masks that sum up to at most 1 over the sources of a mixture, divided by their sum where that
        is more: what they leave of the mixture is the residual's."""
        return MaskOutput(
            audio=self._audio,
            object=self.object,
            motion=self.motion,
            logits=limit_mask_sum(self.logits),
            classify=self._classify,
            maps=self.maps,
            presence=self.presence,
        )

    @property
    def audio(self) -> Tensor:
        """f_a [B, N, D], the embedding of what is heard in each source."""
        if not callable(self._audio):
            return self._audio
        audio = self._audio()
        # formed under no_grad it would be of no use to a loss that comes later
        if audio.requires_grad or not self.logits.requires_grad:
            self._audio = audio
        return audio

    @property
    def class_logits(self) -> Tensor | None:
        """[B, N, Q], which of the Q classes is heard in each source; None of a decoder that has no classifier."""
        return None if self._classify is None else self._classify(self.audio)

    @property
    def logits(self) -> Tensor:
        """[B, N, F, T], before the sigmoid."""
        if self._logits is not None:
            return self._logits
        from avsep.kernels import mask_head

        assert self.embedding is not None
        assert self.mask_features is not None
        # the cast is autocast's, for who asks outside the decoder's autocast
        logits = mask_head(self.embedding, self.mask_features.to(self.embedding.dtype))
        # formed under no_grad they would be of no use to a loss that comes later
        if logits.requires_grad or not (self.embedding.requires_grad or self.mask_features.requires_grad):
            self._logits = logits
        return logits


@dataclass(frozen=True)
class Spectrograms:
    """The analysis of a batch of sources.

    ``network_input`` [B, 1, F, T] log1p of the warped mixture magnitude; ``mixture`` [B, n_fft/2+1, T], the complex
    STFT of the mixture. The targets of training: ``weight`` [B, 1, F, T]; ``ratio`` [B, N, F, T], the clamped ratio
    masks ([B, 0, F, T] where only sounds are to be separated).
    """

    network_input: Tensor
    weight: Tensor
    ratio: Tensor
    mixture: Tensor

    def __getitem__(self, mixtures: Tensor | slice) -> Spectrograms:
        """Those of some of the mixtures."""
        parts = (self.network_input, self.weight, self.ratio, self.mixture)
        return Spectrograms(*(part[mixtures] for part in parts))


@dataclass(frozen=True)
class Batch:
    """A batch of mixtures as the data pipeline gives it.

    ``sources`` [B, N, L] float32, already scaled by 1/N, so that their sum is the mixture; ``class_ids`` [B, N]
    int64; ``video_ids`` [B, N] int64, equal exactly where two sources come from the same video; ``is_memory`` [B, N]
    bool; ``visual``, the inputs of the visual encoders; ``clips`` the ids of the clips, by mixture and source.
    A source that is asked for and not in the mixture is all zeros. ``background`` [B, L] is what sounds beside the
    sources and was not asked for, None where nothing does.
    """

    sources: Tensor
    class_ids: Tensor
    video_ids: Tensor
    is_memory: Tensor
    visual: VisualInputs = VisualInputs()
    clips: tuple[tuple[str, ...], ...] = ()
    background: Tensor | None = None

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, which a GPU reads without waiting; PyTorch's DataLoader calls it."""
        return _mapped(self, lambda tensor: tensor.pin_memory())

    @property
    def mixture(self) -> Tensor:
        """[B, L]"""
        mixture = self.sources.sum(dim=1)
        return mixture if self.background is None else mixture + self.background


@dataclass(frozen=True)
class Prediction:
    """What a separator makes of a batch (:meth:`avsep.Separator.predict`): the analysis, the encoders' features and
    the masks of the classes that were asked for."""

    spectrograms: Spectrograms
    audio: AudioFeatures
    visual: VisualFeatures
    output: MaskOutput


@dataclass(frozen=True)
class Task:
    """One step of the stream: its index, its own new classes and all classes seen up to and including it."""

    index: int
    classes: tuple[str, ...]
    seen: tuple[str, ...]

    @property
    def old(self) -> tuple[str, ...]:
        return self.seen[: len(self.seen) - len(self.classes)]


_C = TypeVar("_C")


def limit_mask_sum(logits: Tensor) -> Tensor:
    """Logits [B, N, F, T] of masks m -> those of m / max(1, sum of m over N); unchanged where the sum is at most 1.

    With m = sigmoid(l) and the sum S, logit(m / S) = -log(S (1 + e^-l) - 1), and l itself where S = 1. Beyond +-30 a
    mask is 0 or 1 in single precision anyway.
    """
    kept = logits.clamp(-30.0, 30.0).float()
    total = kept.sigmoid().sum(dim=1, keepdim=True)
    above = total > 1.0
    scaled = -(total * (1.0 + (-kept).exp()) - 1.0).clamp(min=1e-12).log()
    return scaled.to(logits.dtype).where(above, logits)


def move_to(container: _C, device: torch.device | str, **kwargs: Any) -> _C:
    """A copy of a container of this module with every tensor on ``device``."""
    return _mapped(container, lambda tensor: tensor.to(device, **kwargs))


def _mapped(container: _C, change: Callable[[Tensor], Tensor]) -> _C:
    """A copy of a container of this module, and of those in it, with every tensor changed."""
    changed: dict[str, Any] = {}
    for field in fields(container):  # type: ignore[arg-type]
        value = getattr(container, field.name)
        if hasattr(value, "data_ptr"):  # a tensor, without importing torch
            changed[field.name] = change(value)
        elif is_dataclass(value):
            changed[field.name] = _mapped(value, change)
    return replace(container, **changed)  # type: ignore[type-var]

"""The separator: a front end, an audio encoder, visual encoders and a mask decoder, as one module."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from avsep.adapters.base import Adapter
from avsep.decoders.base import MaskDecoder
from avsep.dsp import FrontEnd
from avsep.encoders.base import AudioEncoder, VisualEncoder
from avsep.errors import ConfigError
from avsep.separator.adapted import AdaptedDecoder, AdaptedEncoder
from avsep.spec import SeparatorSpec
from avsep.types import (
    AudioFeatures,
    Batch,
    MaskOutput,
    Prediction,
    Spectrograms,
    VisualFeatures,
    VisualInputs,
    VisualSource,
)

__all__ = ["Separator"]


class Separator(nn.Module):
    """Waveforms and frames in, waveforms out. Build one with :func:`build_separator` or :func:`build_from_spec`.

    Dimensions: B mixtures, N sources in each, L samples, F log-frequency rows, T frames.
    """

    audio_encoder: AudioEncoder
    object_encoder: VisualEncoder | None
    motion_encoder: VisualEncoder | None
    mask_decoder: MaskDecoder
    class_means: dict[str, Tensor] | None
    """The classes' mean visual features by role, [Q, ...], which stand in for pictures that are not there, of a
    separator whose mask decoder cannot do without (``takes_unseen``), once it is trained. Not of the ``state_dict``."""

    def __init__(
        self,
        spec: SeparatorSpec,
        audio_encoder: AudioEncoder,
        mask_decoder: MaskDecoder,
        object_encoder: VisualEncoder | None = None,
        motion_encoder: VisualEncoder | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.front_end = FrontEnd(spec.front_end)
        self.audio_encoder = audio_encoder
        self.object_encoder = object_encoder
        self.motion_encoder = motion_encoder
        self.mask_decoder = mask_decoder
        self.class_means = None
        self._held = False
        self._freeze()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in query order; empty when only their number is known."""
        return self.spec.classes

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    def _frozen(self) -> Iterator[nn.Module]:
        for encoder in (self.audio_encoder, self.object_encoder, self.motion_encoder):
            if encoder is not None and encoder.frozen:
                yield encoder

    def _freeze(self) -> None:
        for encoder in self._frozen():
            encoder.requires_grad_(False)
            encoder.eval()

    def freeze(self) -> None:
        """Learn nothing from here on, and stay in evaluation mode, so that running statistics do not change either.

        Parameters that get ``requires_grad_(True)`` afterwards do learn.
        """
        self._held = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Separator:
        """As ``nn.Module.train``, but frozen encoders, and a frozen separator, stay in evaluation mode."""
        super().train(mode and not self._held)
        for encoder in self._frozen():
            encoder.eval()
        return self

    def visual_sources(self) -> tuple[VisualSource, ...]:
        """What the visual encoders want to be fed with, object before motion."""
        encoders = (self.object_encoder, self.motion_encoder)
        return tuple(encoder.source() for encoder in encoders if encoder is not None)

    def adapters(self) -> list[Adapter]:
        """What the mask decoder and the audio encoder carry for each task; none without ``spec.adapter``."""
        return [module for module in self.modules() if isinstance(module, Adapter)]

    def merged(self) -> Separator:
        """A copy without adapters: with the parts that carried one once for each task, in weights of their own.

        It separates as this one does, and is what graphs are made of.
        """
        made = copy.deepcopy(self)
        if isinstance(made.audio_encoder, AdaptedEncoder):
            made.audio_encoder = made.audio_encoder.merged()
        if isinstance(made.mask_decoder, AdaptedDecoder):
            made.mask_decoder = made.mask_decoder.merged()
        return made

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters as ``audio``, ``visual`` and ``decoder``; frozen encoders are left out."""
        parts: dict[str, tuple[nn.Module | None, ...]] = {
            "audio": (self.audio_encoder,),
            "visual": (self.object_encoder, self.motion_encoder),
            "decoder": (self.mask_decoder,),
        }
        return {
            name: [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
            for name, modules in parts.items()
        }

    @property
    def can_go_unseen(self) -> bool:
        """Whether sources without a picture (``visual.seen`` False) may be asked for: by their class alone."""
        told = self.mask_decoder.takes_unseen and not self.mask_decoder.class_agnostic
        return told or self.class_means is not None

    @property
    def takes_photos(self) -> bool:
        """Whether sources may be asked for whose motion is not known (``visual.motion_seen`` False)."""
        return self.mask_decoder.takes_unseen or self.class_means is not None

    @property
    def class_index(self) -> dict[str, int]:
        """The class id of each class name."""
        return {name: number for number, name in enumerate(self.classes)}

    def predict(
        self,
        batch: Batch,
        *,
        class_ids: Tensor | None = None,
        spectrograms: Spectrograms | None = None,
        mixtures: Tensor | None = None,
    ) -> Prediction:
        """Analyse a batch, encode what is in it, and decode the masks of its classes.

        Args:
            batch: B mixtures of N sources, on the separator's device.
            class_ids: [B, N], the classes to decode in place of the batch's own.
            spectrograms: the analysis of the whole batch, where it has been made already; returned as it is.
            mixtures: int64 [M], the mixtures to take; all B when None.

        Raises:
            ConfigError: when an input that an encoder needs is missing, or a class id is out of range.
        """
        rows = slice(None) if mixtures is None else mixtures
        ids = (batch.class_ids if class_ids is None else class_ids)[rows]
        self._check_class_ids(ids)
        if spectrograms is None:
            background = None if batch.background is None else batch.background[rows]
            spectrograms = self.analyse(batch.sources[rows], background)
            network_input = spectrograms.network_input
        else:
            network_input = spectrograms.network_input[rows]
        visual = self.encode_visual(batch.visual[rows])
        audio = self.audio_encoder(network_input)
        return Prediction(spectrograms, audio, visual, self.decode(audio, visual, ids))

    def encode_visual(self, inputs: VisualInputs) -> VisualFeatures:
        """Encode the frames or stored features of each source.

        Where the motion encoder gives fewer steps than its input has, a step is valid when any of its input steps is.

        Raises:
            ConfigError: when an input that an encoder needs is missing.
        """
        motion, mask = _encode(self.motion_encoder, inputs.motion, "motion"), inputs.motion_mask
        return VisualFeatures(
            object=_encode(self.object_encoder, inputs.object, "object"),
            motion=motion,
            motion_mask=None if motion is None or mask is None else _fit_mask(mask, motion.shape[-1]),
            seen=inputs.seen,
            motion_seen=inputs.motion_seen,
        )

    def forward(self, network_input: Tensor, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        """Masks for the asked classes.

        Args:
            network_input: [B, 1, F, T], as :meth:`analyse` gives it.
            visual: encoded frames of the N sources.
            class_ids: [B, N] int64, each below ``num_classes``.

        Raises:
            ConfigError: when a class id is out of range (looked at where it costs nothing: ids on the CPU).
        """
        self._check_class_ids(class_ids)
        return self.decode(self.audio_encoder(network_input), visual, class_ids.to(network_input.device))

    def decode(
        self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor, *, together: bool = True
    ) -> MaskOutput:
        """Masks of B mixtures from their features, for the classes [B, N] that are asked for.

        The last step of :meth:`predict`, for callers that have the features already and ask for other classes or
        sources. Without ``together`` the N are not sources of one mixture, and the sum of their masks has no limit,
        whatever ``spec.front_end`` says.
        """
        if visual.moving is not None and not self.mask_decoder.takes_unseen:
            visual = self._with_means(visual, class_ids)
        output = self.mask_decoder(audio, visual, class_ids)
        return output.with_limited_sum() if together and self.spec.front_end.limit_mask_sum else output

    @property
    def causal(self) -> bool:
        """Whether, in evaluation mode, its masks of a moment depend on nothing later than the moment's STFT frame, so
        that it separates streams (:mod:`avsep.inference.streaming`). What else looks ahead is refused when it is built.
        """
        return self.audio_encoder.causal and self.mask_decoder.causal

    def state_shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """What :meth:`advance` carries from call to call: shapes by name, of each mixture and of each source.

        Raises:
            ConfigError: of a separator that is not causal.
        """
        of_mixture = self.audio_encoder.state_shapes(self.spec.front_end.log_rows)
        return of_mixture, self.mask_decoder.state_shapes()

    def advance(
        self, network_input: Tensor, visual: VisualFeatures, class_ids: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[MaskOutput, dict[str, Tensor]]:
        """Masks of the next frames [B, 1, F, t] of a stream, t >= 1, those that :meth:`forward` gives of them in the
        whole; and the state after them. A stream begins with zeros, of the shapes of :meth:`state_shapes`.

        Raises:
            ConfigError: of a separator that is not causal; or as :meth:`forward`.
        """
        self._check_class_ids(class_ids)
        ids = class_ids.to(network_input.device)
        audio, of_mixture = self.audio_encoder.advance(network_input, state)
        own = {name: state[name] for name in self.mask_decoder.state_shapes()}
        output, of_sources = self.mask_decoder.advance(audio, visual, ids, own)
        if self.spec.front_end.limit_mask_sum:
            output = output.with_limited_sum()
        return output, {**of_mixture, **of_sources}

    def _with_means(self, visual: VisualFeatures, class_ids: Tensor) -> VisualFeatures:
        """The features, with those of the class's mean where there is no picture."""
        if self.class_means is None:
            raise ConfigError(
                f"mask decoder '{self.spec.mask_decoder.name}' needs a picture of every source, and this separator "
                "keeps no mean pictures of its classes: give a picture of each, or train it with this version"
            )
        found: dict[str, Tensor] = {}
        for role, given, seen in (
            ("object", visual.object, visual.seen),
            ("motion", visual.motion, visual.moving),
        ):
            if given is not None:
                found[role] = given
            if given is not None and seen is not None:
                means = self.class_means[role].to(given)[class_ids]  # [B, N, ...]
                if means.shape != given.shape:  # stored motion of another length
                    means = nn.functional.interpolate(means.flatten(0, 1), size=given.shape[-1], mode="linear")
                    means = torch.unflatten(means, 0, class_ids.shape)
                found[role] = given.where(seen.reshape(*seen.shape, *(1,) * (given.ndim - 2)), means)
        mask = visual.motion_mask
        if mask is not None and visual.moving is not None:
            mask = mask | ~visual.moving[..., None]
        return VisualFeatures(**found, motion_mask=mask)

    @property
    def has_taps(self) -> bool:
        """Whether :meth:`taps` gives maps."""
        return bool(self.audio_encoder.tap_names)

    def taps(self, audio: AudioFeatures, output: MaskOutput | None = None) -> dict[str, Tensor]:
        """Feature maps by name, for methods that compare those of two separators of one spec.

        They come before their activations, from the finest of the way down to the mask features; in a U-Net of seven
        levels e3, e4, e5, d4, d2 and F (the mask features). Where the way up is the mask decoder's, there is no F: the
        logits take its place.

        Args:
            audio: of the audio encoder.
            output: of the mask decoder; without it the maps of sources are left out.

        Returns:
            [B, C, H, W] each, or [B*N, C, H, W] where each source has maps of its own.

        Raises:
            ConfigError: when the separator's parts give no maps.
        """
        if not self.has_taps:
            raise ConfigError(f"audio encoder '{self.spec.audio_encoder.name}' has no taps, which give feature maps")
        named = self.audio_encoder.taps(audio)
        of_sources = {} if output is None else output.maps
        return {**named, **{name: maps.flatten(0, 1) for name, maps in of_sources.items()}}

    def analyse(self, sources: Tensor, background: Tensor | None = None) -> Spectrograms:
        """sources [B, N, L], already scaled so that they and the ``background`` [B, L], if any, sum up to the mixture
        -> the network's input and its targets."""
        if background is None:
            return self.front_end.analyse(sources)
        made = self.front_end.analyse(torch.cat((sources, background[:, None]), dim=1))
        return replace(made, ratio=made.ratio[:, :-1])

    def separate(
        self, mixture: Tensor, visual: VisualFeatures, class_ids: Tensor, *, limit_mask_sum: bool = False
    ) -> Tensor:
        """mixture [B, L] or [B, C, L] with L = ``spec.front_end.clip_samples`` -> sources [B, N, L] or [B, N, C, L].

        Of several channels the masks are found once, from their mean, and applied to each. Gradients flow unless the
        caller stops them; dropout and normalisation follow the module's mode.

        Args:
            mixture: float, full scale at 1.
            visual: encoded frames of the N sources.
            class_ids: [B, N] int64.
            limit_mask_sum: divide the masks by their sum where that is above 1, whatever ``spec.front_end`` says.

        Raises:
            ConfigError: when L is another length (long audio: ``avsep.inference.chunking``), or a class id is out of
                range.
        """
        return self.separate_and_tell(mixture, visual, class_ids, limit_mask_sum=limit_mask_sum)[0]

    def separate_and_tell(
        self, mixture: Tensor, visual: VisualFeatures, class_ids: Tensor, *, limit_mask_sum: bool = False
    ) -> tuple[Tensor, MaskOutput]:
        """:meth:`separate`, and what the mask decoder gave beside the masks (:attr:`MaskOutput.presence`)."""
        length = self.spec.front_end.clip_samples
        if mixture.ndim not in (2, 3) or mixture.shape[-1] != length:
            raise ConfigError(
                f"separate takes a mixture [B, {length}] or [B, channels, {length}], got {list(mixture.shape)}: longer "
                "audio is cut into overlapping chunks by avsep.inference.chunking.separate_long"
            )
        mono = mixture if mixture.ndim == 2 else mixture.mean(dim=1)
        spectrograms = self.front_end.analyse(mono[:, None, :], targets=False)
        output = self(spectrograms.network_input, visual, class_ids)
        if limit_mask_sum and not self.spec.front_end.limit_mask_sum:
            output = output.with_limited_sum()
        logits, spectrum = output.logits, spectrograms.mixture
        if mixture.ndim == 2:
            return self.front_end.synthesise(logits, spectrum, length=length), output
        batch, channels = mixture.shape[:2]
        spectrum = self.front_end.stft(mixture).flatten(0, 1)  # [B C, bins, T]
        waveforms = self.front_end.synthesise(logits.repeat_interleave(channels, 0), spectrum, length=length)
        return torch.unflatten(waveforms, 0, (batch, channels)).transpose(1, 2), output

    def grow(self, num_classes: int, classes: Sequence[str] | None = None) -> None:
        """Make room for more classes; what is known of the old ones stays.

        Args:
            num_classes: the new number of classes.
            classes: their names in query order; the old names must come first.

        Raises:
            ConfigError: when there would be fewer classes, or the names do not continue the old ones.
        """
        names = self.classes if classes is None and num_classes == self.num_classes else tuple(classes or ())
        if num_classes < self.num_classes:
            raise ConfigError(f"cannot go from {self.num_classes} classes to {num_classes}: classes are only added")
        if self.classes and names[: len(self.classes)] != self.classes:
            raise ConfigError(
                f"the classes {', '.join(names) or '(none given)'} do not continue those already learned: name "
                f"{', '.join(self.classes)} first, in this order"
            )
        spec = self.spec.grown(num_classes, names)
        self.mask_decoder.grow(num_classes)
        self.mask_decoder.set_tasks(spec.task_sizes)
        if isinstance(self.audio_encoder, AdaptedEncoder):
            self.audio_encoder.set_tasks(spec.task_sizes)
        self.spec = spec

    def _check_class_ids(self, class_ids: Tensor) -> None:
        if class_ids.device.type != "cpu" or torch.compiler.is_compiling() or class_ids.numel() == 0:
            return
        low, high = int(class_ids.min()), int(class_ids.max())
        if low < 0 or high >= self.num_classes:
            raise ConfigError(
                f"class id {low if low < 0 else high} is out of range: this separator knows {self.num_classes} classes "
                f"(0 to {self.num_classes - 1}); grow() adds more"
            )


def _encode(encoder: VisualEncoder | None, inputs: Tensor | None, role: str) -> Tensor | None:
    """[B, N, ...] -> [B, N, D] or [B, N, D, Tm]; None without an encoder."""
    if encoder is None:
        return None
    if inputs is None:
        article = "an" if role == "object" else "a"
        raise ConfigError(f"this separator has {article} {role} encoder: give encode_visual its {role} input")
    with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder.frozen):
        return torch.unflatten(encoder(inputs.flatten(0, 1)), 0, inputs.shape[:2])


def _fit_mask(mask: Tensor, steps: int) -> Tensor:
    """[B, N, M] -> [B, N, steps]: a step is valid when any input step it is pooled from is."""
    if mask.shape[-1] == steps:
        return mask
    return nn.functional.adaptive_max_pool1d(mask.float(), steps) > 0.5

"""Separators composed by name: from a spec, a preset or named parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avsep.adapters.base import Adapter, FeatureAdapter
from avsep.decoders.base import MaskDecoder
from avsep.encoders.base import AudioEncoder
from avsep.environment import seeded
from avsep.errors import ConfigError, UnknownNameError, near_matches
from avsep.registry import ADAPTERS, AUDIO_ENCODERS, MASK_DECODERS, REGISTRIES, VISUAL_ENCODERS, ComponentSpec
from avsep.separator.adapted import AdaptedDecoder, AdaptedEncoder, ProjectedEncoder
from avsep.separator.module import Separator
from avsep.spec import ComponentRef, FrontEndSpec, SeparatorSpec, load_preset, validated
from avsep.types import AdapterPlace

__all__ = ["build_from_spec", "build_separator", "list_components"]


def build_from_spec(spec: SeparatorSpec) -> Separator:
    """Build a separator with fresh weights.

    Raises:
        ConfigError: when a name, parameter or combination is wrong; nothing has been built then.
    """
    spec.check()
    _check_sizes(spec)
    audio_encoder = AUDIO_ENCODERS.create(spec.audio_encoder.name, spec.audio_encoder.params)
    visual = {
        role: None if ref is None else VISUAL_ENCODERS.create(ref.name, ref.params, role=role)
        for role, ref in (("object", spec.object_encoder), ("motion", spec.motion_encoder))
    }
    mask_decoder = MASK_DECODERS.create(
        spec.mask_decoder.name,
        spec.mask_decoder.params,
        num_classes=spec.num_classes,
        mask_channels=audio_encoder.mask_channels,
        latent_channels=audio_encoder.latent_channels,
        skip_channels=audio_encoder.skip_channels,
        object_dim=None if visual["object"] is None else visual["object"].dim,
        motion_dim=None if visual["motion"] is None else visual["motion"].dim,
        log_rows=spec.front_end.log_rows,
    )
    if mask_decoder.causal:
        _check_causal(spec, audio_encoder)
    if spec.adapter is not None:
        audio_encoder, mask_decoder = _with_adapters(spec, spec.adapter, audio_encoder, mask_decoder)
    mask_decoder.set_tasks(spec.task_sizes)
    return Separator(spec, audio_encoder, mask_decoder, visual["object"], visual["motion"])


def _with_adapters(
    spec: SeparatorSpec, ref: ComponentRef, audio_encoder: AudioEncoder, mask_decoder: MaskDecoder
) -> tuple[AudioEncoder, MaskDecoder]:
    """The components with what they carry for each of the spec's tasks."""
    if issubclass(ADAPTERS.get(ref.name).factory, FeatureAdapter):
        projections = ADAPTERS.create(ref.name, ref.params, places=_maps_to_project(spec, ref, audio_encoder))
        assert isinstance(projections, FeatureAdapter)
        projected = ProjectedEncoder(audio_encoder, projections)
        projected.set_tasks(spec.task_sizes)
        return projected, AdaptedDecoder(mask_decoder, None)

    def adapter_of(component: AudioEncoder | MaskDecoder, kind: str, name: str) -> Adapter:
        if not (places := component.adapter_places()):
            raise ConfigError(f"{kind} '{name}' declares no place for an adapter: leave the adapter '{ref.name}' out")
        kinds = ADAPTERS.get(ref.name).factory.kinds
        return ADAPTERS.create(ref.name, ref.params, places=[place for place in places if place.kind in kinds])

    adapter = adapter_of(mask_decoder, "mask decoder", spec.mask_decoder.name)
    adapted = AdaptedDecoder(mask_decoder, adapter)
    if not adapter.on_audio_encoder:
        return audio_encoder, adapted
    encoder = AdaptedEncoder(audio_encoder, adapter_of(audio_encoder, "audio encoder", spec.audio_encoder.name))
    encoder.set_tasks(spec.task_sizes)
    return encoder, adapted


def _maps_to_project(spec: SeparatorSpec, ref: ComponentRef, audio_encoder: AudioEncoder) -> list[AdapterPlace]:
    """The maps of the audio encoder that the mask decoder reads, as places of an adapter that changes them."""
    decoder = spec.mask_decoder.name
    needs = MASK_DECODERS.get(decoder).needs
    channels = {"mask_features": audio_encoder.mask_channels, "latent": audio_encoder.latent_channels}
    found = {name: size for name, size in channels.items() if size is not None and name in needs}
    # the spectrogram is the encoder's input: it does not change as the encoder learns
    others = (needs & AUDIO_ENCODERS.get(spec.audio_encoder.name).provides) - found.keys() - {"spectrogram"}
    if others or not found:
        raise ConfigError(
            f"adapter '{ref.name}' projects {' and '.join(channels)}, and mask decoder '{decoder}' reads "
            f"{' and '.join(sorted(others)) or 'neither'}: leave the adapter out, or choose query_transformer"
        )
    return [AdapterPlace(name, (size,), "map") for name, size in found.items()]


def _check_sizes(spec: SeparatorSpec) -> None:
    encoder = AUDIO_ENCODERS.get(spec.audio_encoder.name).factory
    multiple = encoder.size_multiple
    rows, frames = spec.front_end.log_rows, spec.front_end.frames
    if rows % multiple:
        raise ConfigError(
            f"audio encoder '{spec.audio_encoder.name}' needs log_rows in multiples of {multiple}, got {rows}: "
            f"try front_end.log_rows={max(1, round(rows / multiple)) * multiple}"
        )
    if frames % multiple and not encoder.any_frames:
        hop = spec.front_end.hop
        samples = max(1, round(frames / multiple)) * multiple * hop - 1
        raise ConfigError(
            f"audio encoder '{spec.audio_encoder.name}' needs time frames in multiples of {multiple}, and clip_samples="
            f"{spec.front_end.clip_samples} at hop {hop} gives {frames}: try front_end.clip_samples={samples}"
        )


def _check_causal(spec: SeparatorSpec, audio_encoder: AudioEncoder) -> None:
    """Refuse what looks ahead beside a causal mask decoder."""
    front_end, decoder = spec.front_end, spec.mask_decoder.name
    reasons = {
        f"audio encoder '{spec.audio_encoder.name}'": None if audio_encoder.causal else "choose causal_unet",
        "front_end.level_db": None if front_end.level_db is None else "leave it out",
        "front_end.align_corners=false": None if front_end.align_corners else "set it to true",
        "front_end.padding=reflect": None if front_end.padding == "zeros" else "set it to zeros",
    }
    for what, way_out in reasons.items():
        if way_out is not None:
            raise ConfigError(
                f"mask decoder '{decoder}' is causal, and {what} looks ahead: {way_out}, or set the decoder's causal "
                "to false"
            )


class _Unset:
    """Stands for "not given" where None means "without"."""

    def __repr__(self) -> str:
        return "unset"


_UNSET = _Unset()


def build_separator(
    preset: str | None = None,
    *,
    num_classes: int | None = None,
    audio_encoder: Any = _UNSET,
    object_encoder: Any = _UNSET,
    motion_encoder: Any = _UNSET,
    mask_decoder: Any = _UNSET,
    adapter: Any = _UNSET,
    classes: Sequence[str] = (),
    front_end: FrontEndSpec | dict[str, Any] | None = None,
    seed: int | None = None,
) -> Separator:
    """Build a separator from a preset, from named parts, or from a preset with some parts exchanged.

    Args:
        preset: a preset's name or the path of a YAML file like one; None to name the parts.
        num_classes: number of classes; may be left out when ``classes`` are given.
        audio_encoder: a component is a name, ``(name, {parameter: value})`` or ``{"name": ..., "params": {...}}``;
            without a preset the audio encoder is ``unet7`` and the mask decoder ``query_transformer``.
        object_encoder: a component; None leaves the part out, also where a preset has it.
        motion_encoder: the same.
        mask_decoder: a component.
        adapter: a component; there is none unless one is given.
        classes: class names in query order.
        front_end: settings of the front end (:class:`avsep.spec.FrontEndSpec`) that replace the preset's one by one.
        seed: of the first weights, which then do not depend on the global random state, nor change it.

    Raises:
        ConfigError: for a wrong name, parameter or combination, before anything is built.

    Examples:
        >>> separator = build_separator("iquery_small", num_classes=5)
        >>> separator = build_separator(object_encoder="frame_cnn", mask_decoder=("query_transformer", {"dim": 64}),
        ...                             num_classes=5)
    """
    if num_classes is None:
        if not classes:
            raise ConfigError("build_separator needs num_classes, or classes")
        num_classes = len(classes)
    data: dict[str, Any] = {"audio_encoder": "unet7", "mask_decoder": "query_transformer"}
    if preset is not None:
        data = dict(load_preset(preset)["separator"])
    given = {
        "audio_encoder": audio_encoder,
        "object_encoder": object_encoder,
        "motion_encoder": motion_encoder,
        "mask_decoder": mask_decoder,
        "adapter": adapter,
    }
    data.update({name: value for name, value in given.items() if value is not _UNSET})
    if front_end is not None:
        settings = front_end.model_dump() if isinstance(front_end, FrontEndSpec) else dict(front_end)
        data["front_end"] = {**(data.get("front_end") or {}), **settings}
    data.update(num_classes=num_classes, classes=tuple(classes))
    where = "build_separator" if preset is None else f"preset '{preset}'"
    with seeded(seed):
        return build_from_spec(validated(SeparatorSpec, data, where))


def list_components(kind: str | None = None) -> list[ComponentSpec[Any]]:
    """Every registered component, or those of one kind (such as ``mask_decoders``).

    Raises:
        UnknownNameError: for a kind that does not exist.
    """
    if kind is None:
        return [spec for registry in REGISTRIES.values() for spec in registry]
    if kind not in REGISTRIES:
        raise UnknownNameError(f"no kind of component named '{kind}': {near_matches(kind, REGISTRIES)}")
    return list(REGISTRIES[kind])

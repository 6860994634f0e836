"""Small separators of registered components: each component with the parameters of its registration's example."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from avsep.errors import ConfigError
from avsep.registry import AUDIO_ENCODERS, MASK_DECODERS, VISUAL_ENCODERS, ComponentSpec
from avsep.separator import Separator
from avsep.spec import ComponentRef, SeparatorSpec, validated
from avsep.types import Batch, VisualInputs

FRONT_END = {"clip_samples": 8191, "n_fft": 254, "hop": 64, "log_rows": 128}


def small_ref(spec: ComponentSpec[Any], weights: Path | None = None) -> ComponentRef:
    """The component as its registration's example has it; encoders of published weights get small random ones, which
    are written below ``weights``."""
    params = dict(spec.example)
    if spec in list(VISUAL_ENCODERS) and spec.factory.hub is not None and weights is not None:
        from support.small_weights import SMALL

        if spec.name in SMALL:
            folder = weights / spec.name
            if not folder.exists():
                torch.manual_seed(0)
                SMALL[spec.name]().save_pretrained(folder)
            params["weights"] = str(folder)
    return ComponentRef(name=spec.name, params=params)


def fitting_spec(part: str, ref: ComponentRef) -> SeparatorSpec:
    """The spec of a separator of three classes around one component as ``part``, with the first that go with it.

    ``part`` is a field of the spec, such as ``motion_encoder``. Only what the mask decoder needs stands beside it.
    """
    audio_encoders, decoders = (
        [ref] if part == own else [small_ref(spec) for spec in registry]
        for own, registry in (("audio_encoder", AUDIO_ENCODERS), ("mask_decoder", MASK_DECODERS))
    )
    for audio, decoder in itertools.product(audio_encoders, decoders):
        takes_object = "object" in MASK_DECODERS.get(decoder.name).needs
        if part == "object_encoder" and not takes_object:
            continue
        data = {
            "audio_encoder": audio,
            "mask_decoder": decoder,
            "object_encoder": small_ref(VISUAL_ENCODERS.get("precomputed")) if takes_object else None,
            part: ref,
            "front_end": FRONT_END,
            "num_classes": 3,
        }
        if part == "adapter":
            data["task_sizes"] = (1, 2)
        spec = validated(SeparatorSpec, data, ref.name)
        try:
            spec.check()
        except ConfigError:
            continue
        return spec
    raise AssertionError(f"no separator can be composed with '{ref.name}' as {part}")


def random_batch(separator: Separator, batch: int = 2, sources: int = 2) -> Batch:
    """Noise, with random frames or features of the kind that the separator's visual encoders take."""
    torch.manual_seed(1)
    count = batch * sources
    ids = torch.arange(count).reshape(batch, sources)
    return Batch(
        sources=0.1 * torch.randn(batch, sources, separator.spec.front_end.clip_samples),
        class_ids=ids % separator.num_classes,
        video_ids=ids,
        is_memory=torch.zeros(batch, sources, dtype=torch.bool),
        visual=visual_inputs(separator, batch, sources),
    )


def visual_inputs(separator: Separator, batch: int = 2, sources: int = 2) -> VisualInputs:
    """Random inputs of the kind that the separator's visual encoders take."""
    inputs: dict[str, torch.Tensor | None] = {"object": None, "motion": None}
    for source in separator.visual_sources():
        if source.kind == "features":
            shape = (source.frames, source.dim) if source.role == "object" else (source.dim, 8)
            inputs[source.role] = torch.randn(batch, sources, *shape)
        else:
            shape = (source.frames, 3, 32, 32) if source.role == "object" else (6, 1, 32, 32)
            inputs[source.role] = torch.randint(0, 256, (batch, sources, *shape), dtype=torch.uint8)
    return VisualInputs(inputs["object"], inputs["motion"])

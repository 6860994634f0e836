"""The manifest of a bundle as models: its published schema is generated from them, and ``avsep`` holds bundles to them.

The runtime, which has no pydantic, checks for itself what running a bundle depends on, and what no schema can say
(:mod:`avsep.export.runtime.manifest`).
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from avsep.errors import ExportError
from avsep.export.runtime import reader, verify
from avsep.export.runtime.errors import one_line
from avsep.export.runtime.manifest import MANIFEST, VERSIONS

__all__ = ["Manifest", "check_manifest", "open_bundle", "schema_text", "verify_bundle"]

_MOST = 2**31 - 1
Size = Annotated[int, Field(ge=1, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Text = Annotated[str, Field(min_length=1)]
Shape = list[Size]


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name stands there twice")
    return names


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Transform(_Part):
    """The STFT and the log-frequency grid."""

    n_fft: int = Field(ge=2, le=_MOST)
    hop: Size
    window: str
    padding: Literal["zeros", "reflect"]
    log_rows: Size
    frames: Size
    align_corners: bool
    clip_samples: Size


class Chunking(_Part):
    """How recordings longer than one call are cut, in samples."""

    clip_samples: Size
    context_samples: Count
    crossfade_samples: Count
    align_samples: Size


class Visual(_Part):
    """What the separator sees of each class."""

    role: Literal["object", "motion"]
    kind: Literal["frames", "features"]
    name: str
    dim: Count
    frames: Count
    graph: str | None = Field(description="The graph that computes the features; null where they are stored.")
    steps: Size | None = Field(description="Steps in time of motion features.")
    rate_hz: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="Motion frames a second. Where it is missing, as many as a video file has (8)."
    )


class Tensor(_Part):
    """An input or output of a graph."""

    name: Text
    dtype: Literal["float32", "float16", "int64", "int32", "uint8", "bool"]
    shape: list[Size | Literal["batch", "sources"]]


class Bounds(_Part):
    """The least, usual and largest shape of an input."""

    min: Shape
    opt: Shape
    max: Shape


class Drift(_Part):
    """The largest change of a source's scores, in dB."""

    sdr: float
    sir: float
    sar: float


class Gate(_Part):
    """Drift of the graph's scores from PyTorch's, the largest of any source; null where nothing was scored."""

    mixtures: Count
    max_drift_db: Drift
    limit_db: float = Field(gt=0)
    passed: bool
    overridden: bool
    on: Literal["held-out", "synthetic"] = Field(
        description="Mixtures of the run's store that were not trained on, or chords made up where there was no store."
    )


class Quantised(_Part):
    """Of an INT8 graph: how many convolutions are in INT8, and the mixtures, not the gate's, that chose them."""

    layers: Size
    of: Size
    on: Literal["validation", "calibration"]
    mixtures: Count
    max_drift_db: Drift


class State(_Part):
    """What a graph carries from call to call: an input, and the output of the same shape that the next call is given.
    A stream begins with zeros."""

    name: Text
    input: Text
    output: Text


class Along(_Part):
    """How far a graph in a lower precision is from the fp32 graph along a stream of so many calls: energy of the
    difference of the sources relative to them, in dB, near the beginning and at the end."""

    calls: Size
    first_db: float
    last_db: float


class Stream(_Part):
    """Of a graph that goes frame by frame: how many STFT frames a call takes, and what it carries. Its golden arrays
    hold a sequence of calls: the mixture and what comes out of each, [calls, ...], the states before the first and
    after the last."""

    frames: Annotated[int, Field(ge=1, le=1024)]
    golden_calls: Annotated[int, Field(ge=1, le=1024)]
    states: list[State] = Field(min_length=1)
    along: Along | None = None


class Parity(_Part):
    """How far the graph's output is from PyTorch's, where it was exported."""

    max_error: float = Field(ge=0)
    error_db: float
    provider: str
    seconds: float = Field(ge=0)


class GraphEntry(_Part):
    """One graph: what it computes and takes, and what was measured."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*[.]onnx$")
    kind: Literal["separator", "spectral", "stream", "object_encoder", "motion_encoder"]
    precision: Literal["fp32", "fp16", "int8"]
    inputs: list[Tensor] = Field(min_length=1)
    outputs: list[Tensor] = Field(min_length=1)
    profiles: list[dict[str, Bounds]] = Field(description="By input name.")
    opset: Size
    operators: dict[str, Size]
    least_tensorrt: str = Field(pattern=r"^[0-9]+[.][0-9]+$")
    golden: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*[.]npz$")
    tolerance: float = Field(gt=0, le=1000, description="Largest absolute difference from the golden output.")
    parity: Parity
    gate: Gate | None
    quantised: Quantised | None = None
    stream: Stream | None = None


class Manifest(_Part):
    """manifest.json of a bundle: what its graphs compute, how they were made, what was measured, and the SHA-256 of
    every other file."""

    format: Literal["avsep-bundle"]
    version: Literal[2, 3, 4]
    name: Text
    made_from: str = Field(description="Where the separator comes from: its run and task.")
    created: str = Field(
        pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$", description="A moment in UTC."
    )
    licence: str = Field(description="Of avsep and its files in the bundle.")
    weights_licence: str = Field(
        description="Of the trained weights, the trainer's to state, empty where nobody did; and of published weights "
        "in the encoders."
    )
    separator: dict[str, Any] = Field(description="The SeparatorSpec that builds the separator again.")
    classes: Annotated[list[Text], AfterValidator(_each_once)] = Field(
        description="Names in the order of class ids; empty where only numbers are known.",
        json_schema_extra={"uniqueItems": True},
    )
    independent_sources: bool = Field(
        True,
        description="Whether the estimate of a source depends on nothing else that is asked for, so that any number of "
        "sources can be separated in groups. Where it is missing they do not depend on each other.",
    )
    sample_rate_hz: Size
    channels: Annotated[int, Field(ge=1, le=256)] = Field(
        1,
        description="Of the mixture and of each source. Where it is missing, or 1, the graphs have no such dimension.",
    )
    presence_threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Probability from which a source counts as present, of graphs with an output `presence`.",
    )
    transform: Transform
    chunking: Chunking
    visual: list[Visual] = Field(max_length=2)
    graphs: list[GraphEntry] = Field(min_length=1)
    plan: dict[str, Any] = Field(description="The ExportPlan.")
    made_with: dict[str, str] = Field(description="Package versions.")
    files: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(
        description="SHA-256 of every file of the bundle but manifest.json."
    )
    manifest_sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of all the rest of the manifest, as JSON in ASCII with sorted keys and without spaces. It "
        "finds damage and is no signature. Where it is missing an earlier avsep made the bundle.",
    )


def schema_text() -> str:
    """The published JSON schema, as it lies in each bundle."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Manifest.model_json_schema(),
        "title": f"Manifest of an avsep bundle, version {', '.join(map(str, VERSIONS))}",
    }
    return json.dumps(schema, indent=1) + "\n"


def check_manifest(manifest: Any, where: str) -> None:
    """Raise :class:`ExportError`, in one line, where a manifest is not whole or says what is not known."""
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        reason = {
            "extra_forbidden": "is a key that no bundle has",
            "missing": "is missing",
        }.get(first["type"], f"= {json.dumps(first['input'], default=str)[:60]}: {first['msg']}")
        raise ExportError(
            f"{where} is damaged: {one_line(f'{place} {reason}', 200)}; copy the bundle again or export it again"
        ) from None


def open_bundle(path: str | os.PathLike[str], *, hashes: bool = True) -> reader.Bundle:
    """As :func:`avsep.export.runtime.reader.open_bundle`, and the whole manifest is held to its schema."""
    bundle = reader.open_bundle(path, hashes=hashes)
    check_manifest(bundle.manifest, f"{bundle.path}: {MANIFEST}")
    return bundle


def verify_bundle(
    path: str | os.PathLike[str], provider: str | None = None, *, tolerance: float | None = None
) -> verify.Verification:
    """As :func:`avsep.export.runtime.verify.verify_bundle`, and the whole manifest is held to its schema."""
    return verify.verify_bundle(open_bundle(path), provider, tolerance=tolerance)

"""What running a bundle takes for granted of its manifest, checked before anything is run.

The whole manifest, with what only people and ``avsep export`` read, is held against its models in
:mod:`avsep.export.bundle.manifest`, which need pydantic.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ExportError, one_line
from .strict_json import load_json
from .timeline import is_rate

__all__ = [
    "BUILD_SCRIPT",
    "FORMAT",
    "MANIFEST",
    "PRESENCE",
    "SCHEMA_FILE",
    "SEAL",
    "VERSION",
    "VERSIONS",
    "check_manifest",
    "is_plain_name",
    "parse",
    "sealed",
]

FORMAT = "avsep-bundle"
VERSION = 4
# 2 knows one channel and one output, 3 graphs that take a chunk. Bundles that have no more are still written as 2 or 3:
# earlier runtimes run them.
VERSIONS = (2, 3, VERSION)
MANIFEST = "manifest.json"
SCHEMA_FILE = "manifest.schema.json"
BUILD_SCRIPT = "build_engine.py"
PRESENCE = "presence"  # a graph's output that says whether a source sounds at all; its other one is what is separated
SEAL = "manifest_sha256"  # the last key: the SHA-256 of the others (see sealed)
REQUIRED_FILES = (SCHEMA_FILE, "README.md", BUILD_SCRIPT, "LICENSE")

_MOST_TOLERANCE = 1000.0

# A value's form is a type, a range, a pattern that matches it whole, a list of one form, a dictionary of forms by name
# (or of one form, by `str`), or a tuple of the forms and constants that it may have.
_SIZE, _COUNT = range(1, 2**31), range(2**31)
_RATE_HZ = range(1, 768_001)
_CHANNELS = range(1, 257)
_WIDTH, _FRAMES = range(1 << 20), range(1 << 12)  # of visual features and of frames around a moment: they take memory
_FLAG = (True, False)
_TEXT = re.compile(r"(?s).+")
_SHAPES = {"min": [_SIZE], "opt": [_SIZE], "max": [_SIZE]}
_TENSOR = {
    "name": _TEXT,
    "dtype": ("float32", "float16", "int64", "int32", "uint8", "bool"),
    "shape": [(_SIZE, "batch", "sources")],
}
_GRAPH = {
    "file": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*[.]onnx"),
    "kind": ("separator", "spectral", "stream", "object_encoder", "motion_encoder"),
    "precision": ("fp32", "fp16", "int8"),
    "inputs": [_TENSOR],
    "outputs": [_TENSOR],
    "profiles": [{str: _SHAPES}],
    "least_tensorrt": re.compile(r"[0-9]+[.][0-9]+"),
    "golden": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*[.]npz"),
    "tolerance": float,
}
_STREAM = {
    "frames": range(1, 1025),
    "golden_calls": range(1, 1025),
    "states": [{"name": _TEXT, "input": _TEXT, "output": _TEXT}],
}
_TRANSFORM = {
    "n_fft": _SIZE,
    "hop": _SIZE,
    "padding": ("zeros", "reflect"),
    "log_rows": _SIZE,
    "align_corners": _FLAG,
    "clip_samples": _SIZE,
}
_ENCODER = {"name": _TEXT, "params": dict}
_MANIFEST = {
    "name": _TEXT,
    "separator": {
        "num_classes": _SIZE,
        "classes": [_TEXT],
        "front_end": {"sample_rate_hz": _RATE_HZ, **_TRANSFORM},
        "object_encoder": (None, _ENCODER),
        "motion_encoder": (None, _ENCODER),
    },
    "classes": [_TEXT],
    "sample_rate_hz": _RATE_HZ,
    "transform": {**_TRANSFORM, "frames": _SIZE},
    "chunking": {
        "clip_samples": _SIZE,
        "context_samples": _COUNT,
        "crossfade_samples": _COUNT,
        "align_samples": _SIZE,
    },
    "visual": [
        {
            "role": ("object", "motion"),
            "kind": ("frames", "features"),
            "name": str,
            "dim": _WIDTH,
            "frames": _FRAMES,
            "graph": (str, None),
        }
    ],
    "graphs": [_GRAPH],
    "files": {str: re.compile("[0-9a-f]{64}")},
}


def parse(data: bytes, where: str) -> Any:
    """Strict JSON (:func:`load_json`).

    Raises:
        ExportError: one line that begins with ``where``.
    """
    try:
        return load_json(data)
    except ValueError as error:
        raise ExportError(f"{where} is not valid JSON ({one_line(error, 200)}): copy the bundle again") from None


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the SHA-256 of all else in it as its last key, by which damage is told from another version.

    The hash is of the JSON of the other keys in ASCII, sorted, without spaces, numbers as Python writes them.
    """
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**rest, SEAL: hashlib.sha256(text.encode("ascii")).hexdigest()}


def check_manifest(manifest: Any, where: str) -> None:
    """Raise :class:`ExportError` where a manifest is not one that a bundle can be run by; ``where`` names its file.

    One without a hash of its own, of an earlier avsep, is taken.
    """
    if isinstance(manifest, dict) and SEAL in manifest and sealed(manifest)[SEAL] != manifest[SEAL]:
        raise ExportError(
            f"{where} is damaged: it is not what was exported (its {SEAL} differs); copy the bundle again"
        )
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f"{where} is not of an avsep bundle (it has no format '{FORMAT}')")
    if (found := manifest.get("version")) not in VERSIONS or isinstance(found, bool):
        way_out = "export it again" if found == 1 else "update avsep, or export it again"
        reads = f"{', '.join(map(str, VERSIONS[:-1]))} and {VERSIONS[-1]}"
        raise ExportError(f"{where} is of bundle version {one_line(found, 40)}, this avsep reads {reads}: {way_out}")
    mistakes = (mistake for check in (_inconsistencies, _contradictions) for mistake in check(manifest))
    if mistake := _mistake(manifest, _MANIFEST, "") or next(mistakes, ""):
        raise ExportError(f"{where} is damaged: {one_line(mistake, 200)}; copy the bundle again or export it again")


def is_plain_name(name: str) -> bool:
    """Whether a file of a bundle can have this name, which leads nowhere else."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None


def _mistake(value: Any, form: Any, where: str) -> str:
    """The first place where a value has not its form, in words; empty where it has."""
    if isinstance(form, dict) and isinstance(value, dict):
        for name, inner in form.items():
            if name is str:
                mistakes = (_mistake(child, inner, f"{where}[{json.dumps(key)}]") for key, child in value.items())
                return next((mistake for mistake in mistakes if mistake), "")
            place = f"{where}.{name}".lstrip(".")
            if name not in value:
                return f"{place} is missing"
            if mistake := _mistake(value[name], inner, place):
                return mistake
        return ""
    if isinstance(form, list) and isinstance(value, list):
        mistakes = (_mistake(child, form[0], f"{where}[{index}]") for index, child in enumerate(value))
        return next((mistake for mistake in mistakes if mistake), "")
    if isinstance(form, tuple):
        fits = any(option is value or value == option or not _mistake(value, option, where) for option in form)
    elif isinstance(form, range):
        fits = isinstance(value, int) and not isinstance(value, bool) and value in form
    elif isinstance(form, re.Pattern):
        fits = isinstance(value, str) and form.fullmatch(value) is not None
    elif form is float:
        fits = _is_number(value)
    else:
        fits = isinstance(form, type) and isinstance(value, form)
    return "" if fits else f"{where or 'it'} = {one_line(json.dumps(value), 60)} is not what stands there in a bundle"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _inconsistencies(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the forms of single values cannot say."""
    files, graphs, chunking = manifest["files"], manifest["graphs"], manifest["chunking"]
    for name in files:
        if not is_plain_name(name) or name == MANIFEST:
            yield f"{json.dumps(name)} is not the name of a file of a bundle"
    if len(set(manifest["classes"])) < len(manifest["classes"]):
        yield "classes names one class twice"
    plan = manifest.get("plan", {})
    if mistake := _mistake(plan, {}, "plan") or _mistake(plan.get("left_out", {}), {str: _TEXT}, "plan.left_out"):
        yield mistake
        return
    if mistake := _mistake(plan.get("by_name", False), _FLAG, "plan.by_name"):
        yield mistake
    if both := [name for name in plan.get("left_out", {}) if name in manifest["classes"]]:
        yield f"class {_short(both[0])} is offered and left out"
    if not isinstance(manifest.get("independent_sources", True), bool):
        yield "independent_sources is neither true nor false"
    if mistake := _mistake(manifest.get("channels", 1), _CHANNELS, "channels"):
        yield mistake
    threshold = manifest.get("presence_threshold")
    if threshold is not None and not (_is_number(threshold) and 0 <= threshold <= 1):
        yield f"presence_threshold = {_short(threshold)} is no probability"
    for name in (*REQUIRED_FILES, *(g["file"] for g in graphs), *(g["golden"] for g in graphs)):
        if name not in files:
            yield f"it has no hash of a file {name}"
    kinds = Counter((g["kind"], g["precision"]) for g in graphs)
    for (kind, precision), count in kinds.items():
        if count > 1:
            yield f"there are two graphs {kind} in {precision}"
    if len({g["file"] for g in graphs}) < len(graphs):
        yield "two graphs are one file"
    if not any(kind in ("separator", "spectral", "stream") for kind, _ in kinds):
        yield "there is none among its graphs that separates"
    if any(kind == "stream" for kind, _ in kinds) and manifest["version"] < 4:
        yield "it has a graph that goes frame by frame, which its version does not know"
    if chunking["clip_samples"] != manifest["transform"]["clip_samples"]:
        yield "chunking.clip_samples is not transform.clip_samples"
    if 4 * chunking["context_samples"] > chunking["clip_samples"]:
        yield "chunking.context_samples is more than a quarter of chunking.clip_samples"
    if chunking["crossfade_samples"] > chunking["context_samples"]:
        yield "chunking.crossfade_samples is more than chunking.context_samples"
    for source in manifest["visual"]:
        if (rate_hz := source.get("rate_hz")) is not None and not is_rate(rate_hz):
            yield f"the {source['role']} source has {_short(rate_hz)} frames a second"
    roles = [source["role"] for source in manifest["visual"]]
    if len(set(roles)) < len(roles):
        yield "two visual sources have one role"
    by_file = {g["file"]: g for g in graphs}
    for source in manifest["visual"]:
        if source["graph"] is not None and by_file.get(source["graph"], {}).get("kind") != f"{source['role']}_encoder":
            yield f"the {source['role']} source names a graph {json.dumps(source['graph'])} that encodes nothing of it"
        elif source["graph"] is not None and source["role"] == "object":  # frames [1, K, channels, height, width]
            shape = by_file[source["graph"]]["inputs"][0]["shape"] if by_file[source["graph"]]["inputs"] else []
            if len(shape) != 5 or shape[1] != source["frames"]:
                yield f"{source['graph']} takes frames {json.dumps(shape)}, the object source has {source['frames']}"
    for graph in graphs:
        yield from _graph_inconsistencies(graph, roles, manifest)


def _contradictions(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the manifest says otherwise than the copy of the separator's spec in it."""
    spec, transform = manifest["separator"], manifest["transform"]
    front_end = spec["front_end"]
    stated = {
        "sample_rate_hz": (manifest["sample_rate_hz"], front_end["sample_rate_hz"]),
        "classes": (manifest["classes"], spec["classes"]),
        **{f"transform.{key}": (transform[key], front_end[key]) for key in _TRANSFORM},
        "transform.frames": (transform["frames"], 1 + front_end["clip_samples"] // front_end["hop"]),
        "chunking.align_samples": (manifest["chunking"]["align_samples"], front_end["hop"]),
    }
    encoders = {role: spec[f"{role}_encoder"] for role in ("object", "motion") if spec[f"{role}_encoder"] is not None}
    stated["the roles of visual"] = ([source["role"] for source in manifest["visual"]], list(encoders))
    for source in manifest["visual"]:
        encoder = encoders.get(source["role"])
        if encoder is None:
            continue
        params = encoder["params"]
        if encoder["name"] == "precomputed":  # others say themselves what they look at
            stated[f"{source['role']}.kind"] = (source["kind"], "features")
            stated[f"{source['role']}.name"] = (source["name"], params.get("features"))
            stated[f"{source['role']}.dim"] = (source["dim"], params.get("dim"))
            if source["role"] == "object" and "frames" in params:
                stated["object.frames"] = (source["frames"], params["frames"])
    for place, (told, wanted) in stated.items():
        if told != wanted:
            yield f"{place} = {_short(told)}, and its separator says {_short(wanted)}"
    if spec["classes"] and len(spec["classes"]) != spec["num_classes"]:
        yield f"separator.num_classes = {spec['num_classes']}, of {len(spec['classes'])} classes"


def _short(value: Any) -> str:
    return one_line(json.dumps(value), 60)


def _graph_inconsistencies(graph: Mapping[str, Any], roles: list[str], manifest: Mapping[str, Any]) -> Iterator[str]:
    inputs = {tensor["name"]: tensor["shape"] for tensor in graph["inputs"]}
    names = [tensor["name"] for tensor in (*graph["inputs"], *graph["outputs"])]
    if not graph["inputs"] or not graph["outputs"]:
        yield f"{graph['file']} has no inputs or no outputs"
    if len(set(names)) < len(names):
        yield f"two tensors of {graph['file']} have one name"
    if not 0 < graph["tolerance"] <= _MOST_TOLERANCE:
        yield f"the tolerance {graph['tolerance']} of {graph['file']} is none"
    if graph["kind"] in ("separator", "spectral"):
        first = "mixture" if graph["kind"] == "separator" else "spectrum"
        expected = {first, "class_ids", *(f"{role}_features" for role in roles)}
        # which steps are valid, where it was planned; and whether a source and its motion are seen, where they need not
        optional = {"seen", "motion_seen", "motion_mask"} if "motion" in roles else {"seen"}
        if set(inputs) - optional != expected:
            yield f"{graph['file']} takes {', '.join(inputs)} instead of {', '.join(sorted(expected))}"
        told = {tensor["name"] for tensor in graph["outputs"]} & {PRESENCE}
        if len(graph["outputs"]) - len(told) != 1:
            given = ", ".join(tensor["name"] for tensor in graph["outputs"])
            yield f"{graph['file']} gives {given}: one of them is what is separated, and none but {PRESENCE} beside it"
        if told and manifest.get("presence_threshold") is None:
            yield f"{graph['file']} tells presence, and there is no presence_threshold"
        channels, shape = manifest.get("channels", 1), inputs.get(first, [])
        axes = 2 if graph["kind"] == "separator" else 4
        if channels > 1 and (len(shape) != axes + 1 or shape[1] != channels):
            yield f"{graph['file']} takes {first} {_short(shape)}, and the bundle has {channels} channels"
    elif graph["kind"] == "stream":
        yield from _stream_inconsistencies(graph, roles, manifest)
    for profile in graph["profiles"]:
        for name, bounds in profile.items():
            if name not in inputs:
                yield f"a profile of {graph['file']} names an input {json.dumps(name)} that it does not have"
                continue
            shape = inputs[name]
            if any(len(bounds[b]) != len(shape) for b in ("min", "opt", "max")):
                yield f"a profile of {graph['file']} gives {name} another number of dimensions"
            elif any(
                not low <= usual <= high
                for low, usual, high in zip(bounds["min"], bounds["opt"], bounds["max"], strict=True)
            ):
                yield f"a profile of {graph['file']} has min, opt and max of {name} out of order"
            elif any(
                isinstance(size, int) and not size == low == high
                for size, low, high in zip(shape, bounds["min"], bounds["max"], strict=True)
            ):
                yield f"a profile of {graph['file']} gives {name} shapes that the graph does not take"


def _stream_inconsistencies(graph: Mapping[str, Any], roles: list[str], manifest: Mapping[str, Any]) -> Iterator[str]:
    """Of a graph that goes frame by frame."""
    if mistake := _mistake(graph.get("stream"), _STREAM, f"{graph['file']}: stream"):
        yield mistake
        return
    stream, transform, channels = graph["stream"], manifest["transform"], manifest.get("channels", 1)
    inputs, outputs = ({tensor["name"]: tensor for tensor in graph[side]} for side in ("inputs", "outputs"))
    hop, held = transform["hop"], transform["n_fft"] - transform["hop"]
    if 2 * hop >= transform["n_fft"]:
        yield f"transform.hop = {hop} is no less than half of n_fft, and a stream overlaps more"
    states = {state["name"]: state for state in stream["states"]}
    if len(states) < len(stream["states"]):
        yield f"two states of {graph['file']} have one name"
    counted = {"counted"} if stream["frames"] > 1 else set()
    expected = {"mixture", "class_ids", *counted, *(f"{role}_features" for role in roles)}
    named = {state["input"] for state in states.values()}
    if set(inputs) - {"seen"} != expected | named or expected & named:
        yield f"{graph['file']} takes {', '.join(inputs)} instead of {', '.join(sorted(expected))} and its states"
        return
    gives = {"sources", *({PRESENCE} & set(outputs))}
    if set(outputs) != gives | {state["output"] for state in states.values()}:
        yield f"{graph['file']} gives {', '.join(outputs)} instead of sources, {PRESENCE} and its states"
        return
    if PRESENCE in outputs and manifest.get("presence_threshold") is None:
        yield f"{graph['file']} tells presence, and there is no presence_threshold"
    sources = (inputs["class_ids"]["shape"] or [0])[-1]
    layout = [] if channels == 1 else [channels]
    shapes = {
        "mixture": (inputs["mixture"], [1, *layout, hop * stream["frames"]]),
        "class_ids": (inputs["class_ids"], [1, sources]),
        "sources": (outputs["sources"], [1, sources, *layout, hop * stream["frames"]]),
        **({"counted": (inputs["counted"], [1, stream["frames"]])} if counted else {}),
    }
    own = {"samples": [1, channels, held], "overlap": [1, sources, channels, held], "envelope": [1, held]}
    for name, state in states.items():
        if (state["input"], state["output"]) != (f"state_{name}", f"next_{name}"):
            yield f"state {_short(name)} of {graph['file']} has tensors of other names"
        taken, given = inputs[state["input"]], outputs[state["output"]]
        if (taken["shape"], taken["dtype"]) != (given["shape"], given["dtype"]):
            yield f"state {_short(name)} of {graph['file']} is given as {_short(given)} and taken as {_short(taken)}"
        if "batch" in taken["shape"] or taken["shape"][:1] != [1]:
            yield f"state {_short(name)} of {graph['file']} is not of one stream"
    for name, shape in own.items():
        if name not in states:
            yield f"{graph['file']} has no state {name}"
        else:
            shapes[name] = (inputs[states[name]["input"]], shape)
    for name, (tensor, shape) in shapes.items():
        if tensor["shape"] != shape:
            yield f"{graph['file']}: {name} is {_short(tensor['shape'])} instead of {_short(shape)}"

#!/usr/bin/env python3
"""Build TensorRT engines from an avsep bundle, on the device that runs them.

This one file is both ``avsep.export.targets.tensorrt`` and, copied as it is, the ``build_engine.py`` of each bundle. It
needs Python 3.8 or later, the standard library, and ``tensorrt`` (10.3 and later, 11) or ``tensorrt_rtx``; nothing of
avsep.

    python build_engine.py                      every graph of the bundle that this file lies in
    python build_engine.py --graph separator.fp16.onnx --workspace-mib 512
    python build_engine.py --target tensorrt-rtx --sm 86 89     ahead of time, on a machine without a GPU
    python build_engine.py --check              builds nothing: verify, parse, and say which engines are good

Precision is in the graph's types, since TensorRT 11 has no precision flags any more: the networks are strongly typed
on every version. TF32 stays allowed for float32 tensors of such networks unless its flag is cleared, and it would
round the transforms to 10 bits (73 dB for a round trip), so it is always cleared; half-precision layers are not
touched by that.

An engine is good for one graph, TensorRT version, GPU, platform and profile. Each has a sidecar (``NAME.plan.json``)
that states them; an engine whose sidecar is missing, says otherwise, or does not fit its bytes is never loaded. The
sidecar is no signature: an engine can hold code, so take engines from nobody but this script.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Report = Callable[[str, float], None]  # what is being done, and how much of the build is done, 0 to 1

__all__ = [
    "DEFAULT_WORKSPACE_MIB",
    "ENGINES",
    "TARGETS",
    "BuildCancelled",
    "BuildError",
    "Built",
    "EngineMismatch",
    "Gpu",
    "Machine",
    "build",
    "build_bundle",
    "check_engine",
    "engine_key",
    "engine_of",
    "find_engine",
    "find_gpu",
    "load_tensorrt",
    "main",
    "plan_version",
]

# target -> Python module
TARGETS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

# TensorRT's own default is all of the GPU's memory, which a Jetson shares with the system: builds there end by running
# out (NVIDIA/TensorRT#3355). A full-size separator needs a small part of this, on the 4 GB Orin Nano as well.
DEFAULT_WORKSPACE_MIB = 1024

ENGINES = "engines"  # folder of the engines in a bundle's folder
FORMAT, VERSION = "avsep-engine", 1
_BUNDLE_FORMAT, _BUNDLE_VERSION = "avsep-bundle", 2
_LEAST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 0)}

# First bytes of a plan; after them, from byte 24, major, minor, patch and build of what made it, in layout 0.
# Source: NVIDIA/TensorRT samples/common/sampleEngines.cpp (trtexec --getPlanVersionOnly); RTX: plans of 1.7.1.
_PLAN_TAGS = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}


class BuildError(Exception):
    """An engine cannot be built or used; one line with the way out."""


class EngineMismatch(BuildError):
    """An engine on disk is not one for this graph on this machine."""


class BuildCancelled(BuildError):
    """The user stopped the build."""


class Gpu(NamedTuple):
    """A GPU: its name, compute capability ("8.7"), memory and the newest CUDA that its driver takes ("12.6")."""

    name: str
    capability: str
    memory_mib: int
    cuda: str


class Machine(NamedTuple):
    """What an engine is built with and for. ``gpu`` is None where it is built ahead of time."""

    module: Any
    target: str
    version: str
    gpu: Gpu | None


class Built(NamedTuple):
    """An engine: its file and sidecar, whether it was built just now, and what it was built for ("sm87")."""

    graph: str
    plan: Path
    sidecar: dict[str, Any]
    new: bool
    device: str


# ---------------------------------------------------------------- this machine


def find_gpu() -> tuple[Gpu | None, str]:
    """The first GPU, from the driver itself, or None and why there is none.

    TensorRT is not asked: without a driver some of its calls end the process.
    """
    library = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None, f"there is no NVIDIA driver ({library})"
    try:
        status = cuda.cuInit(0)
        if status != 0:
            return None, f"the NVIDIA driver finds no GPU (cuInit: error {status})"
        count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
            return None, "the NVIDIA driver finds no GPU"
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        statuses = [
            cuda.cuDeviceGet(ctypes.byref(device), 0),
            cuda.cuDeviceGetName(name, len(name), device),
            cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        ]
        capability = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            statuses.append(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
            capability.append(str(value.value))
        statuses.append(cuda.cuDriverGetVersion(ctypes.byref(value)))
    except AttributeError as error:
        return None, f"{library} is not an NVIDIA driver ({error})"
    if any(statuses):
        return None, f"the NVIDIA driver cannot be asked about its GPU (error {max(statuses)})"
    version = f"{value.value // 1000}.{value.value % 1000 // 10}"
    return Gpu(name.value.decode("utf-8", "replace"), ".".join(capability), memory.value >> 20, version), ""


def load_tensorrt(target: str = "auto") -> tuple[Any, str]:
    """The TensorRT module of a target, and which it is; ``auto`` takes TensorRT, else TensorRT-RTX.

    Raises:
        BuildError: it is not installed, or what is installed is empty (``tensorrt-stubs``) or too old.
    """
    if target != "auto" and target not in TARGETS:
        raise BuildError(f"unknown target '{target}': choose auto, {' or '.join(TARGETS)}")
    wanted = list(TARGETS) if target == "auto" else [target]
    reasons = []
    for name in wanted:
        try:
            module = importlib.import_module(TARGETS[name])
        except ModuleNotFoundError as error:
            missing = "" if error.name == TARGETS[name] else f" ({_line(error)})"
            reasons.append(f"{TARGETS[name]} is not installed{missing}")
            continue
        except Exception as error:  # a broken library, or a package that only tells how to install the real one
            reasons.append(f"{TARGETS[name]} cannot be imported ({_line(error)})")
            continue
        # tensorrt-stubs makes an empty namespace importable: only a real attribute tells.
        if not (hasattr(module, "Builder") and hasattr(module, "OnnxParser") and hasattr(module, "__version__")):
            reasons.append(f"{TARGETS[name]} is installed without its library (pip uninstall tensorrt-stubs)")
            continue
        if _numbers(str(module.__version__)) < _LEAST[name]:
            least = ".".join(map(str, _LEAST[name]))
            reasons.append(f"{TARGETS[name]} is version {module.__version__}, {least} is needed")
            continue
        return module, name
    way_out = {
        "tensorrt": "on a Jetson it comes with JetPack 6 (sudo apt install python3-libnvinfer), elsewhere: "
        "pip install tensorrt",
        "tensorrt-rtx": "pip install tensorrt_rtx_cu13",
    }
    raise BuildError(f"{'; '.join(reasons)}: {' or '.join(way_out[name] for name in wanted)}")


def this_machine(target: str = "auto", *, to_build: bool = False) -> Machine:
    """TensorRT and the GPU here.

    Raises:
        BuildError: one of them is missing.
    """
    module, found = load_tensorrt(target)
    gpu, reason = find_gpu()
    if gpu is None:
        ahead = to_build and found == "tensorrt-rtx"
        hint = "say for which GPU with --sm 86" if ahead else "run this on the device"
        raise BuildError(f"{reason}, and {TARGETS[found]} {module.__version__} cannot do without: {hint}")
    return Machine(module, found, str(module.__version__), gpu)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 10.3.0.26 -> (10, 3, 0, 26)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _line(error: object) -> str:
    """A message in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:397] + "..."


# ---------------------------------------------------------------- the identity of an engine


def engine_key(
    onnx_sha256: str,
    target: str,
    version: str,
    capability: str,
    *,
    gpu: str = "",
    profiles: Sequence[Mapping[str, Any]] = (),
    precision: str = "fp32",
) -> dict[str, Any]:
    """What an engine is good for.

    TensorRT's engines are made for one GPU and platform; those of TensorRT-RTX for a compute capability, whatever the
    GPU's name and the platform (they are finished where they are loaded).
    """
    portable = target == "tensorrt-rtx"
    return {
        "onnx_sha256": onnx_sha256,
        "target": target,
        "tensorrt": version,
        "compute_capability": capability,
        "gpu": "" if portable else gpu,
        "platform": "" if portable else f"{platform.system()} {platform.machine()}",
        "profiles": [{k: {b: list(p[k][b]) for b in ("min", "opt", "max")} for k in sorted(p)} for p in profiles],
        "precision": precision,
    }


_KEY_WORDS = {
    "onnx_sha256": "another graph",
    "target": "another kind of TensorRT",
    "tensorrt": "another TensorRT version",
    "compute_capability": "another compute capability",
    "gpu": "another GPU",
    "platform": "another platform",
    "profiles": "other shapes",
    "precision": "another precision",
}


def check_engine(plan: str | os.PathLike[str], key: Mapping[str, Any]) -> dict[str, Any]:
    """The sidecar of an engine that is whole and good for ``key``.

    Raises:
        EngineMismatch: there is none, or it is another's; says why.
    """
    path = Path(plan)
    if not path.is_file():
        raise EngineMismatch(f"there is no engine {path}")
    side = _sidecar_path(path)
    if not side.is_file():
        raise EngineMismatch(f"{path} has no {side.name}, so nothing says what it was built for")
    try:
        sidecar = json.loads(side.read_text(encoding="utf-8"))
        known = sidecar["format"] == FORMAT and sidecar["version"] == VERSION
        stated, digest = dict(sidecar["key"]), str(sidecar["plan_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EngineMismatch(f"{side} is damaged ({type(error).__name__}: {_line(error)})") from None
    if not known:
        raise EngineMismatch(f"{side} is not of an engine that this avsep builds")
    for field, words in _KEY_WORDS.items():
        if stated.get(field) != key[field]:
            values = ""
            if field not in ("onnx_sha256", "profiles"):
                values = f" ({_line(stated.get(field))}; here {key[field]})"
            raise EngineMismatch(f"{path} was built for {words}{values}")
    if _sha256(path) != digest:
        raise EngineMismatch(f"{path} is damaged: it is not the file that {side.name} was written for")
    with open(path, "rb") as file:
        found = plan_version(file.read(28))
    if found is not None:
        target, version = found
        here = _numbers(str(key["tensorrt"]))[:3]
        if target != key["target"] or version[: len(here)] != here:
            made = ".".join(map(str, version))
            raise EngineMismatch(f"{path} was built by {target} {made} (here {key['target']} {key['tensorrt']})")
    return dict(sidecar)


def plan_version(head: bytes) -> tuple[str, tuple[int, ...]] | None:
    """What made a plan, from its first 28 bytes: the target, and major, minor and patch; None in an unknown layout."""
    target = _PLAN_TAGS.get(bytes(head[:4]))
    if target is None or len(head) < 28 or head[4:8] != b"\0\0\0\0":
        return None
    return target, tuple(head[24:27])


def _sidecar_path(plan: Path) -> Path:
    return plan.with_name(plan.name + ".json")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- building one engine


def build(
    onnx_path: str | os.PathLike[str],
    plan_path: str | os.PathLike[str],
    *,
    target: str = "auto",
    profiles: Sequence[Mapping[str, Mapping[str, Sequence[int]]]] = (),
    precision: str = "fp32",
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    timing_cache: str | os.PathLike[str] | None = None,
    compute_capability: int | str | None = None,
    progress: bool | Report = True,
    verbose: bool = False,
) -> dict[str, Any]:
    """Build the engine of one graph; the plan and its sidecar are there when it is done, and not before.

    Args:
        profiles: by profile and input name the least, usual and largest shape; needed where the graph has open shapes.
        precision: the graph's, for the record: it is in the graph's types.
        workspace_mib: most scratch memory that a layer may take.
        timing_cache: file that keeps measured times between builds (TensorRT alone; TensorRT-RTX has none).
        compute_capability: 86 or "8.6": for a GPU that is not here (TensorRT-RTX alone). None: for the GPU here.
        progress: a bar on the standard error, none, or a function of (what is being done, share of it done).

    Returns:
        The sidecar.

    Raises:
        BuildError: one line: TensorRT or the GPU is missing, the graph or a profile is refused, or the build failed.
        BuildCancelled: Ctrl-C during the build; nothing was written.
    """
    graph, plan = Path(onnx_path), Path(plan_path)
    if not graph.is_file():
        raise BuildError(f"no such graph: {graph}")
    if workspace_mib < 1:
        raise BuildError(f"the workspace must be at least 1 MiB, got {workspace_mib}")
    machine = _machine_for(target, compute_capability)
    key = _key_of(graph, _sha256(graph), machine, compute_capability, profiles, precision)
    started = time.monotonic()
    with _made_parent(plan):
        data, new_cache = _compile(
            machine,
            graph,
            profiles,
            workspace_mib=workspace_mib,
            compute_capability=compute_capability,
            old_cache=_read_cache(timing_cache) if machine.target == "tensorrt" else None,
            progress=progress,
            verbose=verbose,
        )
        sidecar = {
            "format": FORMAT,
            "version": VERSION,
            "key": key,
            "graph": graph.name,
            "plan_sha256": hashlib.sha256(data).hexdigest(),
            "plan_bytes": len(data),
            "workspace_mib": workspace_mib,
            "tf32": False,
            "seconds": round(time.monotonic() - started, 3),
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            # A kill between the two leaves a plan that does not fit its sidecar: refused, and built again.
            _write(plan, data)
            _write(_sidecar_path(plan), (json.dumps(sidecar, indent=2) + "\n").encode())
            if timing_cache is not None and new_cache:
                _write(Path(timing_cache), new_cache)
        except OSError as error:
            raise BuildError(f"{plan} cannot be written ({_line(error)})") from None
    return sidecar


def _machine_for(target: str, compute_capability: int | str | None) -> Machine:
    if compute_capability is None:
        return this_machine(target, to_build=True)
    module, found = load_tensorrt("tensorrt-rtx" if target == "auto" else target)
    if found != "tensorrt-rtx":
        raise BuildError("TensorRT builds for the GPU it runs on: leave --sm out, or use --target tensorrt-rtx")
    _member_rtx(module, compute_capability)
    return Machine(module, found, str(module.__version__), None)


def _capability(value: int | str) -> str:
    """86 or "8.6" -> "8.6"."""
    text = str(value)
    if re.fullmatch(r"\d{2,3}", text):
        text = f"{text[:-1]}.{text[-1]}"
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise BuildError(f"'{value}' is no compute capability: write it as 86")
    return text


def _key_of(
    graph: Path,
    sha256: str,
    machine: Machine,
    compute_capability: int | str | None,
    profiles: Sequence[Mapping[str, Any]],
    precision: str,
) -> dict[str, Any]:
    gpu = machine.gpu
    if compute_capability is None:
        assert gpu is not None
        capability = gpu.capability
    else:
        capability = _capability(compute_capability)
    name = gpu.name if gpu is not None else ""
    try:
        return engine_key(
            sha256, machine.target, machine.version, capability, gpu=name, profiles=profiles, precision=precision
        )
    except (KeyError, TypeError) as error:
        raise BuildError(f"a profile of {graph.name} is damaged: {type(error).__name__} at {error}") from None


def _member_rtx(trt: Any, compute_capability: int | str) -> Any:
    """The target of TensorRT-RTX for a compute capability."""
    capability = _capability(compute_capability)
    members = {name: value for name, value in trt.ComputeCapability.__members__.items() if re.match(r"SM\d", name)}
    name = "SM" + capability.replace(".", "")
    if name not in members:
        known = ", ".join(sorted((n[2:] for n in members), key=int))
        hint = " (a Jetson Orin: build there, with TensorRT)" if name == "SM87" else ""
        raise BuildError(
            f"TensorRT-RTX {trt.__version__} builds nothing for SM {name[2:]}{hint}: it has {known}; "
            "use TensorRT on that device"
        )
    return members[name]


def _compile(
    machine: Machine,
    graph: Path,
    profiles: Sequence[Mapping[str, Any]],
    *,
    workspace_mib: int,
    compute_capability: int | str | None,
    old_cache: bytes | None,
    progress: bool | Report,
    verbose: bool,
) -> tuple[bytes, bytes]:
    """The plan and, for TensorRT, the timing cache."""
    trt = machine.module
    bar = _Bar() if progress is True else None
    report = bar or progress or (lambda phase, share: None)
    assert callable(report)
    logger = make_logger(trt, verbose)
    builder = trt.Builder(logger)
    network, _parser = _parse(trt, builder, logger, graph)  # the parser owns the weights that the network points to
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    # On by default in strongly typed networks too, and on every version: what float32 means is still the builder's say.
    config.clear_flag(trt.BuilderFlag.TF32)
    cache = None
    if machine.target == "tensorrt-rtx":
        _aim_rtx(trt, config, machine, compute_capability)
    else:
        cache = _attach_cache(config, old_cache or b"")
    _add_profiles(builder, network, config, graph, profiles)
    cancel = threading.Event()
    failures: list[BaseException] = []
    monitor = _monitor(trt, report, cancel, failures)
    config.progress_monitor = monitor  # TensorRT keeps no reference: `monitor` outlives the build
    try:
        plan = _cancellable(lambda: builder.build_serialized_network(network, config), cancel)
    finally:
        if bar is not None:
            bar.clear()
    if failures:
        raise failures[0]
    if cancel.is_set():
        raise BuildCancelled("cancelled; nothing was written")
    if plan is None:
        raise BuildError(f"{TARGETS[machine.target]} {machine.version} built no engine: {why_failed(logger.errors)}")
    data = bytes(memoryview(plan))
    kept = b""
    if cache is not None:
        cache = config.get_timing_cache()
        kept = bytes(memoryview(cache.serialize())) if cache is not None else b""
    return data, kept


def _parse(trt: Any, builder: Any, logger: Any, graph: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, and the parser, which must live as long.

    Raises:
        BuildError: names every node that the parser refused.
    """
    _check_onnx(graph)
    # Needed on 10; ignored on 11, where the flag has another number: it must come from the module.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph))
    errors = []
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        # The reason of an operator that there is none for reads 'false'; the rest is C++ that failed.
        reason = _line(fault.desc())
        reason = "not supported" if reason == "false" else reason
        operator, name = fault.node_operator(), fault.node_name()
        errors.append(f"{operator} '{name}': {reason}" if operator else reason)
    if not parsed or errors:
        reasons = "; ".join(errors) or why_failed(logger.errors)
        raise BuildError(f"{trt.__name__} {trt.__version__} does not take {graph.name}: {reasons}")
    if network.num_inputs == 0 or network.num_outputs == 0:
        raise BuildError(f"{graph} has no inputs or no outputs: copy the bundle again")
    return network, parser


def _check_onnx(graph: Path) -> None:
    """Raise where a file is not a whole ONNX model.

    TensorRT's parser calls an empty file and some texts a success, and gives no reason for others. A model is a
    protobuf message: a key, a length and as many bytes, again and again to the end; field 7 is its graph, 8 its opsets.
    """

    def number(file: Any) -> int:
        value = shift = 0
        while True:
            byte = file.read(1)
            if not byte or shift > 63:
                raise ValueError("it ends within a number")
            value |= (byte[0] & 127) << shift
            shift += 7
            if byte[0] < 128:
                return value

    size, fields = graph.stat().st_size, set()
    try:
        with open(graph, "rb") as file:
            while file.tell() < size:
                key = number(file)
                fields.add(key >> 3)
                if key & 7 == 0:
                    number(file)
                elif key & 7 in (1, 2, 5):
                    file.seek({1: 8, 5: 4}.get(key & 7) or number(file), os.SEEK_CUR)
                else:
                    raise ValueError("it is no protobuf message")
            if file.tell() != size:
                raise ValueError("it is truncated")
        if not {7, 8} <= fields:
            raise ValueError("it holds no graph")
    except (ValueError, OverflowError, OSError) as error:
        raise BuildError(f"{graph} is not an ONNX graph ({_line(error)}): copy the bundle again") from None


def _add_profiles(
    builder: Any, network: Any, config: Any, graph: Path, profiles: Sequence[Mapping[str, Mapping[str, Sequence[int]]]]
) -> None:
    """Add the profiles of the inputs with open shapes; those of fixed inputs must be their shapes."""
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes[str(tensor.name)] = tuple(tensor.shape)
    # 'Open' as TensorRT has it: -1.
    opened = sorted(name for name, shape in shapes.items() if any(size < 0 for size in shape))
    if opened and not profiles:
        raise BuildError(f"{graph.name} has open shapes ({', '.join(opened)}): give a profile with their bounds")
    for bounds in profiles:
        for name in sorted(bounds.keys() - shapes.keys()):
            raise BuildError(f"a profile names an input '{name}' that {graph.name} has not: it has {', '.join(shapes)}")
        for name in opened:
            if name not in bounds:
                raise BuildError(f"a profile of {graph.name} lacks the input '{name}', whose shape is open")
        profile = builder.create_optimization_profile() if opened else None
        for name, sizes in bounds.items():
            low, usual, high = (tuple(int(size) for size in sizes[bound]) for bound in ("min", "opt", "max"))
            _check_bounds(graph, name, shapes[name], low, usual, high)
            if profile is not None and name in opened:
                try:
                    profile.set_shape(name, low, usual, high)
                except (ValueError, RuntimeError) as error:
                    raise BuildError(
                        f"the profile of {graph.name}, input '{name}', is refused: {_line(error)}"
                    ) from None
        if profile is not None and config.add_optimization_profile(profile) < 0:
            raise BuildError(f"the profile of {graph.name} is refused: {json.dumps(bounds, default=list)}")


def _check_bounds(
    graph: Path, name: str, shape: tuple[int, ...], low: tuple[int, ...], usual: tuple[int, ...], high: tuple[int, ...]
) -> None:
    where = f"the profile of {graph.name}, input '{name}' of shape {list(shape)},"
    if not len(shape) == len(low) == len(usual) == len(high):
        raise BuildError(f"{where} has another number of dimensions: {list(low)}, {list(usual)}, {list(high)}")
    for axis, size in enumerate(shape):
        if not 1 <= low[axis] <= usual[axis] <= high[axis]:
            raise BuildError(f"{where} is out of order: {list(low)}, {list(usual)}, {list(high)}")
        if size >= 0 and not low[axis] == high[axis] == size:
            raise BuildError(f"{where} asks for other sizes: {list(low)} to {list(high)}")


def _aim_rtx(trt: Any, config: Any, machine: Machine, compute_capability: int | str | None) -> None:
    """Build for one compute capability: the given one, or that of the GPU here."""
    if compute_capability is None:
        assert machine.gpu is not None
        compute_capability = machine.gpu.capability
    member = _member_rtx(trt, compute_capability)
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(member, 0):
        raise BuildError(f"TensorRT-RTX {machine.version} refuses to build for {member}")


def _attach_cache(config: Any, old: bytes) -> Any:
    """Give the builder the timing cache; one of another GPU or version is dropped, since its times are not ours."""
    cache = config.create_timing_cache(old)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache
    cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)
    return cache


def _read_cache(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise BuildError(f"the timing cache {path} cannot be read ({_line(error)}): remove it") from None


def why_failed(errors: Sequence[str]) -> str:
    """The reason of a failed build from what TensorRT logged."""
    if not errors:
        return "it gives no reason (--verbose shows its log)"
    text = "; ".join(dict.fromkeys(errors[-3:]))
    if re.search(r"out ?of ?memory|insufficient memory|bad_alloc|std::bad|workspace", " ".join(errors), re.IGNORECASE):
        text += ". Too little memory: --workspace-mib 512, stop other programs, or add swap"
    if "for Turing" in text:
        text += ". SM 75 takes the graph in half precision (*.fp16.onnx)"
    return text


_loggers: dict[Any, Any] = {}  # TensorRT's module -> its logger


def make_logger(trt: Any, verbose: bool) -> Any:
    """A logger that keeps errors for the message, and prints when asked to; what it kept before is dropped.

    There is one in a process and it is never released: TensorRT makes the first logger that it meets its global one,
    for as long as any of its objects lives, and holds no reference to it.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.verbose = False

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(_line(message))
            if self.verbose:
                print(f"[{severity}] {message}", file=sys.stderr)

    if trt not in _loggers:
        _loggers[trt] = Log()
    logger = _loggers[trt]
    logger.errors.clear()
    logger.verbose = verbose
    return logger


# ---------------------------------------------------------------- progress and cancelling


class _Bar:
    """A bar in plain text: redrawn on a terminal, a line every tenth elsewhere."""

    def __init__(self) -> None:
        self.stream = sys.stderr
        self.terminal = self.stream is not None and self.stream.isatty()
        self.drawn_s, self.tenth = 0.0, -1

    def __call__(self, phase: str, share: float) -> None:
        if self.stream is None:
            return
        if self.terminal:
            now = time.monotonic()
            if now - self.drawn_s < 0.1:
                return
            self.drawn_s = now
            filled = int(30 * share)
            self.stream.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {share:4.0%} {phase[:38]:<38}")
        elif int(10 * share) > self.tenth:
            self.tenth = int(10 * share)
            self.stream.write(f"{share:4.0%} {phase}\n")
        self.stream.flush()

    def clear(self) -> None:
        if self.terminal:
            self.stream.write("\r" + " " * 78 + "\r")
            self.stream.flush()


def _monitor(trt: Any, report: Report, cancel: threading.Event, failures: list[BaseException]) -> Any:
    """What TensorRT calls, from any of its threads, as the build goes on. An exception may not reach it."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()
            self.phases: dict[str, list[Any]] = {}  # name -> [parent, steps, steps done]
            self.most = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases[phase_name] = [parent_phase, max(1, num_steps), 0]
            self.tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                phase = self.phases.get(phase_name)
                if phase is not None:
                    phase[2] = min(phase[1], step + 1)
            self.tell(phase_name)
            return not cancel.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases.pop(phase_name, None)

        def tell(self, phase_name: str) -> None:
            try:
                with self.lock:
                    self.most = max(self.most, self.share())
                    report(phase_name, self.most)
            except BaseException as error:
                failures.append(error)
                cancel.set()

        def share(self) -> float:
            """How much of the oldest phase is done, what is under way in the phases under it counted in."""
            share, name = 0.0, next((n for n, phase in self.phases.items() if phase[0] is None), None)
            width = 1.0
            for _ in range(len(self.phases)):
                if name is None:
                    break
                phase = self.phases[name]
                share += width * min(phase[2], phase[1]) / phase[1]
                width /= phase[1]
                if phase[2] >= phase[1]:
                    break
                name = next((n for n, other in self.phases.items() if other[0] == name and n != name), None)
            return min(share, 1.0)

    return Monitor()


def _cancellable(work: Callable[[], Any], cancel: threading.Event) -> Any:
    """Run ``work`` so that Ctrl-C sets ``cancel`` at once; a second one ends the process.

    Python handles signals in its main thread, between two of its own steps. A build called there would not see one
    until it is over, so it runs in a thread of its own, and the main one waits.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    result: list[Any] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failures.append(error)

    def interrupted(*_: object) -> None:
        if cancel.is_set():
            os._exit(130)
        cancel.set()

    before = signal.signal(signal.SIGINT, interrupted)
    old_size = threading.stack_size(64 << 20)  # compilers recurse; a thread has less than the main one by default
    try:
        thread = threading.Thread(target=run, name="tensorrt-build", daemon=True)
        thread.start()
        threading.stack_size(old_size)
        while thread.is_alive():
            thread.join(0.1)
    finally:
        threading.stack_size(old_size)
        signal.signal(signal.SIGINT, before)
    if failures:
        raise failures[0]
    return result[0]


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def _made_parent(path: Path) -> Iterator[None]:
    """The folder of a file, made before and, if it is new, removed again when nothing came into it."""
    folder = path.absolute().parent
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{folder} cannot be made ({_line(error)}): choose another with --out") from None
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder} cannot be written to: choose another with --out")
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _write(path: Path, data: bytes) -> None:
    """Write under another name and rename; a name that a kill leaves behind goes with a later build."""
    for left in path.parent.glob(f".partial-*-{path.name}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    handle, name = tempfile.mkstemp(prefix=".partial-", suffix=f"-{path.name}", dir=str(path.absolute().parent))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's are for the owner alone
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


# ---------------------------------------------------------------- a bundle's engines


def read_manifest(bundle: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a bundle's folder, as far as building needs it.

    Raises:
        BuildError: it is no bundle, or damaged.
    """
    folder = Path(bundle)
    path = folder / "manifest.json"
    if folder.is_file():
        raise BuildError(f"{folder} is a file: unpack it first (mkdir bundle && tar -xf {folder.name} -C bundle)")
    if not path.is_file():
        raise BuildError(f"{folder} is not a bundle: it has no manifest.json; name one with --bundle")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BuildError(f"{path} is damaged ({_line(error)}): copy the bundle again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _BUNDLE_FORMAT:
        raise BuildError(f"{path} is not of an avsep bundle")
    if manifest.get("version") != _BUNDLE_VERSION:
        raise BuildError(
            f"{path} is of bundle version {manifest.get('version')}, this script builds from {_BUNDLE_VERSION}: "
            "export it again"
        )
    try:
        names = [str(name) for name in manifest["files"]]
        for graph in manifest["graphs"]:
            least = str(graph.get("least_tensorrt", "10.3"))
            if graph["file"] not in names or not _numbers(least):
                raise ValueError(f"graph {graph['file']!r}")
            for bounds in graph["profiles"]:
                for sizes in bounds.values():
                    [int(size) for bound in ("min", "opt", "max") for size in sizes[bound]]
            str(graph["precision"])
        plain = all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) for name in names)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BuildError(f"{path} is damaged ({type(error).__name__}: {_line(error)}): copy the bundle again") from None
    if not plain or not manifest["graphs"]:
        raise BuildError(f"{path} is damaged (a file's name, or no graph): copy the bundle again")
    return manifest


def _verified(folder: Path, manifest: Mapping[str, Any], name: str) -> str:
    """The SHA-256 of a graph, held against the manifest, as are files of its weights."""
    for other, stated in manifest["files"].items():
        if other != name and not other.startswith(name + "."):
            continue
        path = folder / other
        if not path.is_file():
            raise BuildError(f"{folder} lacks the file {other}: copy the bundle again")
        if _sha256(path) != stated:
            raise BuildError(f"{path} is not the file that was exported (its SHA-256 differs): copy the bundle again")
    return str(manifest["files"][name])


def _chosen(manifest: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    graphs = {graph["file"]: graph for graph in manifest["graphs"]}
    for name in names:
        if name not in graphs:
            raise BuildError(f"the bundle has no graph {name}: it has {', '.join(graphs)}")
    return [graphs[name] for name in dict.fromkeys(names or graphs)]


def _check_least(graph: Mapping[str, Any], machine: Machine) -> None:
    least = str(graph.get("least_tensorrt", "10.3"))
    if machine.target == "tensorrt" and _numbers(machine.version) < _numbers(least):
        raise BuildError(f"{graph['file']} needs TensorRT {least}, this is {machine.version}: update it")


def _plan_path(place: str | os.PathLike[str], graph: str, target: str, capability: str) -> Path:
    """In the folder of the engines, or what is a plan's name itself."""
    place = Path(place)
    if place.suffix == ".plan":
        return place
    return place / f"{Path(graph).stem}.{target}-sm{capability.replace('.', '')}.plan"


def find_engine(
    bundle: str | os.PathLike[str],
    graph: str = "separator.onnx",
    *,
    target: str = "auto",
    out: str | os.PathLike[str] | None = None,
) -> Built:
    """The engine of a graph for this machine, if it was built; builds nothing.

    Args:
        out: the folder of the engines, or the plan; ``engines`` in the bundle's folder when None.

    Raises:
        EngineMismatch: there is none, or it is of another graph, TensorRT, GPU, platform or profile, or damaged.
        BuildError: no bundle, no such graph, or no TensorRT or GPU here.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    entry = _chosen(manifest, [graph])[0]
    sha256 = _verified(folder, manifest, graph)
    return engine_of(entry, sha256, this_machine(target), folder / ENGINES if out is None else out)


def engine_of(entry: Mapping[str, Any], sha256: str, machine: Machine, place: str | os.PathLike[str]) -> Built:
    """The same for a graph's entry in a manifest that was read, its verified hash, and the engines' folder (or the
    plan)."""
    graph = str(entry["file"])
    key = _key_of(Path(graph), sha256, machine, None, entry["profiles"], str(entry["precision"]))
    plan = _plan_path(place, graph, machine.target, key["compute_capability"])
    try:
        sidecar = check_engine(plan, key)
    except EngineMismatch as error:
        raise EngineMismatch(
            f"{error}: build it here (avsep export build, or python build_engine.py --graph {graph})"
        ) from None
    return Built(graph, plan, sidecar, False, _sm(key))


def build_bundle(
    bundle: str | os.PathLike[str],
    *,
    graphs: Sequence[str] = (),
    target: str = "auto",
    sm: Sequence[int | str] = (),
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool | Report = True,
    verbose: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Built]:
    """Build the engines of a bundle that are not there yet, for the GPU here or for each of ``sm``.

    An engine that cannot be built does not keep the others from it: what failed is raised at the end.

    Args:
        graphs: file names; all when empty.
        out: as for :func:`find_engine`.
        force: build again what is good already.
        tell: is given a line on each engine, before it is built and when it is there.

    Raises:
        BuildError, BuildCancelled: as :func:`build`; engines that were finished stay.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    chosen = _chosen(manifest, graphs)
    place = folder / ENGINES if out is None else Path(out)
    devices: list[int | str | None] = list(dict.fromkeys(sm)) or [None]
    if place.suffix == ".plan" and len(chosen) * len(devices) > 1:
        raise BuildError(f"{out} is one file for {len(chosen) * len(devices)} engines: give a folder, or one --graph")
    # All that can be refused is refused before the first engine takes its minutes.
    machines = {device: _machine_for(target, device) for device in devices}
    hashes = {entry["file"]: _verified(folder, manifest, entry["file"]) for entry in chosen}
    for entry in chosen:
        for machine in machines.values():
            _check_least(entry, machine)
    built = []
    failed = []
    for entry in chosen:
        name = entry["file"]
        for device, machine in machines.items():
            key = _key_of(folder / name, hashes[name], machine, device, entry["profiles"], str(entry["precision"]))
            plan = _plan_path(place, name, machine.target, key["compute_capability"])
            if not force:
                try:
                    sidecar = check_engine(plan, key)
                except EngineMismatch as error:
                    if plan.exists():
                        tell(f"{error}: building it again")
                else:
                    tell(f"{plan} is good for {name} on {_sm(key)}")
                    built.append(Built(name, plan, sidecar, False, _sm(key)))
                    continue
            tell(f"building {name} for {_sm(key)} with {machine.target} {machine.version}")
            try:
                sidecar = build(
                    folder / name,
                    plan,
                    target=machine.target,
                    profiles=entry["profiles"],
                    precision=str(entry["precision"]),
                    workspace_mib=workspace_mib,
                    timing_cache=plan.parent / f"{machine.target}-{_sm(key)}.timing",
                    compute_capability=device,
                    progress=progress,
                    verbose=verbose,
                )
            except BuildCancelled:
                raise
            except BuildError as error:
                tell(f"{name} for {_sm(key)}: {error}")
                failed.append(f"{name} for {_sm(key)}: {error}")
                continue
            tell(f"{plan}: {sidecar['plan_bytes'] / 1e6:.1f} MB in {sidecar['seconds']:.1f} s")
            built.append(Built(name, plan, sidecar, True, _sm(key)))
    if failed:
        kept = f" ({len(built)} of {len(built) + len(failed)} are good)" if built else ""
        raise BuildError("; ".join(failed) + kept)
    return built


def _sm(key: Mapping[str, Any]) -> str:
    return "sm" + str(key["compute_capability"]).replace(".", "")


def check_bundle(
    bundle: str | os.PathLike[str],
    *,
    graphs: Sequence[str] = (),
    target: str = "auto",
    sm: Sequence[int | str] = (),
    out: str | os.PathLike[str] | None = None,
) -> Iterator[str]:
    """Verify and parse the graphs of a bundle and look at its engines; a line for each finding.

    Raises:
        BuildError: a graph is damaged or refused, or TensorRT is missing.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    chosen = _chosen(manifest, graphs)
    place = folder / ENGINES if out is None else Path(out)
    gpu, reason = find_gpu()
    yield f"GPU: {gpu.name}, SM {gpu.capability}, {gpu.memory_mib} MiB, CUDA {gpu.cuda}" if gpu else f"no GPU: {reason}"
    if not sm and gpu is None:
        target = "tensorrt-rtx" if target == "auto" else target
    module, found = load_tensorrt("tensorrt-rtx" if sm and target == "auto" else target)
    yield f"{found} {module.__version__}"
    if found == "tensorrt" and gpu is None:
        raise BuildError(
            f"{reason}: TensorRT needs a GPU, also to parse; TensorRT-RTX does not (--target tensorrt-rtx)"
        )
    devices: list[int | str | None] = list(dict.fromkeys(sm)) or ([None] if gpu else [])
    for entry in chosen:
        name = entry["file"]
        sha256 = _verified(folder, manifest, name)
        _check_least(entry, Machine(module, found, str(module.__version__), gpu))
        logger = make_logger(module, False)
        builder = module.Builder(logger)
        network, _parser = _parse(module, builder, logger, folder / name)
        config = builder.create_builder_config()
        _add_profiles(builder, network, config, folder / name, entry["profiles"])
        yield f"{name}: whole, and {found} {module.__version__} takes it"
        for device in devices:
            machine = _machine_for(found, device)
            key = _key_of(folder / name, sha256, machine, device, entry["profiles"], str(entry["precision"]))
            plan = _plan_path(place, name, found, key["compute_capability"])
            try:
                check_engine(plan, key)
                yield f"{plan}: good"
            except EngineMismatch as error:
                yield f"{error}"


# ---------------------------------------------------------------- command line


def _arguments() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    arguments.add_argument("--bundle", metavar="DIR", help="the bundle's folder (default: where this file is)")
    arguments.add_argument("--graph", action="append", default=[], metavar="FILE", help="a graph of it; default: all")
    arguments.add_argument("--target", choices=["auto", *TARGETS], default="auto")
    arguments.add_argument(
        "--sm",
        nargs="+",
        default=[],
        metavar="SM",
        help="compute capabilities to build for without a GPU, as 75 86 120",
    )
    arguments.add_argument(
        "--workspace-mib",
        type=int,
        default=DEFAULT_WORKSPACE_MIB,
        metavar="MIB",
        help=f"most scratch memory of a layer (default {DEFAULT_WORKSPACE_MIB}; less where memory is short)",
    )
    arguments.add_argument("--out", metavar="PATH", help=f"folder for the engines (default: {ENGINES} in the bundle)")
    arguments.add_argument("--check", action="store_true", help="build nothing: verify, parse, look at the engines")
    arguments.add_argument("--force", action="store_true", help="build again what is good already")
    arguments.add_argument("--verbose", action="store_true", help="TensorRT's own log")
    return arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; 2 with one line on the standard error; 130 after Ctrl-C."""
    options = _arguments().parse_args(arguments)
    folder = Path(options.bundle) if options.bundle else Path(__file__).absolute().parent
    try:
        if options.check:
            for line in check_bundle(
                folder, graphs=options.graph, target=options.target, sm=options.sm, out=options.out
            ):
                print(line)
            return 0
        build_bundle(
            folder,
            graphs=options.graph,
            target=options.target,
            sm=options.sm,
            workspace_mib=options.workspace_mib,
            out=options.out,
            force=options.force,
            verbose=options.verbose,
            tell=lambda line: print(line, flush=True),
        )
    except (BuildCancelled, KeyboardInterrupt) as error:
        print(f"error: {error or 'cancelled'}", file=sys.stderr)
        return 130
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""TensorRT engines: what one is good for, finding the one for this machine, and running it on the GPU.

An engine is good for one graph, TensorRT version, GPU, platform and profile. Each has a sidecar (``NAME.plan.json``)
that states them; an engine whose sidecar is missing, says otherwise, or does not fit its bytes is never loaded. The
sidecar is no signature: an engine can hold code, so take engines from nobody but the bundle's build script.

What was run of it, and on what, is told in README.md: not on a device.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cuda import Cuda, find_gpu
from .errors import ExportError, one_line
from .files import sha256_file
from .reader import Bundle, Graph

__all__ = [
    "DeviceEngine",
    "EngineFile",
    "EngineMismatch",
    "Machine",
    "check_engine",
    "engine_key",
    "engines_folder",
    "find_engine",
    "find_gpu",
    "load_tensorrt",
    "make_logger",
    "open_engine",
    "plan_path",
    "plan_version",
    "this_machine",
    "why_failed",
]

Array = NDArray[Any]

# target -> Python module
TARGETS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
ENGINES = "engines"  # folder of the engines in a bundle's folder
FORMAT, VERSION = "avsep-engine", 1  # of a sidecar
_LEAST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 0)}

# First bytes of a plan; after them, from byte 24, major, minor, patch and build of what made it, in layout 0.
# Source: NVIDIA/TensorRT samples/common/sampleEngines.cpp (trtexec --getPlanVersionOnly); RTX: plans of 1.7.1.
_PLAN_TAGS = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}

# TensorRT's name of an element type -> NumPy's: those of a separator's inputs and outputs.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class EngineMismatch(ExportError):
    """An engine on disk is not one for this graph on this machine."""


class Machine(NamedTuple):
    """What an engine is built with and for; ``gpu`` is a name, and empty where it is built ahead of time."""

    module: Any
    target: str
    version: str
    capability: str
    gpu: str = ""


class EngineFile(NamedTuple):
    """An engine on disk: its graph's file, its own, its sidecar, and what it was built for ("sm87")."""

    graph: str
    plan: Path
    sidecar: dict[str, Any]
    device: str
    new: bool = False


# ---------------------------------------------------------------- this machine


def load_tensorrt(target: str = "auto") -> tuple[Any, str]:
    """The TensorRT module of a target, and which it is; ``auto`` takes TensorRT, else TensorRT-RTX.

    Raises:
        ExportError: it is not installed, or what is installed is empty (``tensorrt-stubs``) or too old.
    """
    if target != "auto" and target not in TARGETS:
        raise ExportError(f"unknown target '{target}': choose auto, {' or '.join(TARGETS)}")
    wanted = list(TARGETS) if target == "auto" else [target]
    reasons = []
    for name in wanted:
        try:
            module = importlib.import_module(TARGETS[name])
        except ModuleNotFoundError as error:
            missing = "" if error.name == TARGETS[name] else f" ({one_line(error)})"
            reasons.append(f"{TARGETS[name]} is not installed{missing}")
            continue
        except Exception as error:  # a broken library, or a package that only tells how to install the real one
            reasons.append(f"{TARGETS[name]} cannot be imported ({one_line(error)})")
            continue
        # tensorrt-stubs makes an empty namespace importable: only a real attribute tells.
        if not (hasattr(module, "Builder") and hasattr(module, "OnnxParser") and hasattr(module, "__version__")):
            reasons.append(f"{TARGETS[name]} is installed without its library (pip uninstall tensorrt-stubs)")
            continue
        if version_numbers(str(module.__version__)) < _LEAST[name]:
            least = ".".join(map(str, _LEAST[name]))
            reasons.append(f"{TARGETS[name]} is version {module.__version__}, {least} is needed")
            continue
        return module, name
    way_out = {
        "tensorrt": "on a Jetson it comes with JetPack 6 (sudo apt install python3-libnvinfer), elsewhere: "
        "pip install tensorrt",
        "tensorrt-rtx": "pip install tensorrt_rtx_cu13",
    }
    raise ExportError(f"{'; '.join(reasons)}: {' or '.join(way_out[name] for name in wanted)}")


def this_machine(target: str = "auto", *, to_build: bool = False) -> Machine:
    """TensorRT and the GPU here.

    Raises:
        ExportError: one of them is missing.
    """
    module, found = load_tensorrt(target)
    gpu, reason = find_gpu()
    if gpu is None:
        ahead = to_build and found == "tensorrt-rtx"
        hint = "say for which GPU with --sm 86" if ahead else "run this on the device"
        raise ExportError(f"{reason}, and {TARGETS[found]} {module.__version__} cannot do without: {hint}")
    return Machine(module, found, str(module.__version__), gpu.capability, gpu.name)


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 10.3.0.26 -> (10, 3, 0, 26)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


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
                self.errors.append(one_line(message))
            if self.verbose:
                print(f"[{severity}] {message}", file=sys.stderr)

    if trt not in _loggers:
        _loggers[trt] = Log()
    logger = _loggers[trt]
    logger.errors.clear()
    logger.verbose = verbose
    return logger


def why_failed(errors: Sequence[str]) -> str:
    """The reason of a failed build or call from what TensorRT logged."""
    if not errors:
        return "it gives no reason (--verbose shows its log)"
    text = "; ".join(dict.fromkeys(errors[-3:]))
    if re.search(r"out ?of ?memory|insufficient memory|bad_alloc|std::bad|workspace", " ".join(errors), re.IGNORECASE):
        text += ". Too little memory: --workspace-mib 512, stop other programs, or add swap"
    if "for Turing" in text:
        text += ". SM 75 takes the graph in half precision (*.fp16.onnx)"
    return text


# ---------------------------------------------------------------- the identity of an engine


def engine_key(
    sha256: str, machine: Machine, profiles: Sequence[Mapping[str, Any]] = (), precision: str = "fp32"
) -> dict[str, Any]:
    """What an engine is good for: the graph of this hash on this machine, with these profiles.

    TensorRT's engines are made for one GPU and platform; those of TensorRT-RTX for a compute capability, whatever the
    GPU's name and the platform (they are finished where they are loaded).
    """
    portable = machine.target == "tensorrt-rtx"
    return {
        "onnx_sha256": sha256,
        "target": machine.target,
        "tensorrt": machine.version,
        "compute_capability": machine.capability,
        "gpu": "" if portable else machine.gpu,
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
    side = sidecar_path(path)
    if not side.is_file():
        raise EngineMismatch(f"{path} has no {side.name}, so nothing says what it was built for")
    try:
        sidecar = json.loads(side.read_text(encoding="utf-8"))
        known = sidecar["format"] == FORMAT and sidecar["version"] == VERSION
        stated, digest = dict(sidecar["key"]), str(sidecar["plan_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EngineMismatch(f"{side} is damaged ({type(error).__name__}: {one_line(error)})") from None
    if not known:
        raise EngineMismatch(f"{side} is not of an engine that this avsep builds")
    for field, words in _KEY_WORDS.items():
        if stated.get(field) != key[field]:
            values = ""
            if field not in ("onnx_sha256", "profiles"):
                values = f" ({one_line(stated.get(field))}; here {key[field]})"
            raise EngineMismatch(f"{path} was built for {words}{values}")
    if sha256_file(path) != digest:
        raise EngineMismatch(f"{path} is damaged: it is not the file that {side.name} was written for")
    with open(path, "rb") as file:
        found = plan_version(file.read(28))
    if found is not None:
        target, version = found
        here = version_numbers(str(key["tensorrt"]))[:3]
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


def sidecar_path(plan: Path) -> Path:
    """Where a plan's sidecar lies."""
    return plan.with_name(plan.name + ".json")


def engines_folder(bundle: Bundle) -> Path:
    """Where the engines of a bundle lie: ``engines`` in its folder; beside a tar, in ``NAME.engines``."""
    return bundle.path.with_suffix(".engines") if bundle.is_tar else bundle.path / ENGINES


def plan_path(place: str | os.PathLike[str], graph: str, key: Mapping[str, Any]) -> Path:
    """The file of a graph's engine: in the folder ``place``, or ``place`` itself where it is a plan's name."""
    place = Path(place)
    return place if place.suffix == ".plan" else place / f"{Path(graph).stem}.{key['target']}-{device_of(key)}.plan"


def device_of(key: Mapping[str, Any]) -> str:
    """What an engine is built for, such as "sm87"."""
    return "sm" + str(key["compute_capability"]).replace(".", "")


def find_engine(
    bundle: Bundle, graph: Graph, target: str = "auto", *, out: str | os.PathLike[str] | None = None
) -> EngineFile:
    """The engine of a graph for this machine, if it was built; builds nothing.

    Args:
        out: the folder of the engines, or the plan; the bundle's own folder of engines when None.

    Raises:
        EngineMismatch: there is none, or it is of another graph, TensorRT, GPU, platform or profile, or damaged.
        ExportError: the graph is damaged, or there is no TensorRT or GPU here.
    """
    machine = this_machine(target)
    bundle.check(graph.file)  # where it lies: a tar need not be unpacked for that
    key = engine_key(bundle.manifest["files"][graph.file], machine, graph.profiles, graph.precision)
    plan = plan_path(engines_folder(bundle) if out is None else out, graph.file, key)
    try:
        return EngineFile(graph.file, plan, check_engine(plan, key), device_of(key))
    except EngineMismatch as error:
        raise EngineMismatch(
            f"{error}: build it here (avsep export build, or python build_engine.py --graph {graph.file})"
        ) from None


def open_engine(
    bundle: Bundle, graph: Graph, target: str = "auto", *, out: str | os.PathLike[str] | None = None
) -> DeviceEngine:
    """The engine of a graph for this machine, ready to run. Arguments and errors: :func:`find_engine`."""
    return DeviceEngine(find_engine(bundle, graph, target, out=out))


# ---------------------------------------------------------------- running


class EngineTensor(NamedTuple):
    """An input or output of an engine; an open dimension is -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class DeviceEngine:
    """An engine on the GPU, with device buffers that are kept between calls. One call at a time; threads wait.

    ``inputs`` and ``outputs`` are its tensors; ``provider`` what runs it, ``tensorrt`` or ``tensorrt-rtx``.

    Args:
        built: of :func:`find_engine`, which has checked that it is good for this machine.

    Raises:
        EngineMismatch: the file is no longer the one that was checked, or the runtime says it is not for this machine.
        ExportError: TensorRT cannot load it, and why; or the GPU failed.
    """

    def __init__(self, built: EngineFile) -> None:
        self.built = built
        self.provider = str(built.sidecar["key"]["target"])
        trt, _ = load_tensorrt(self.provider)
        data = built.plan.read_bytes()
        if hashlib.sha256(data).hexdigest() != built.sidecar["plan_sha256"]:
            raise EngineMismatch(f"{built.plan} was changed since it was checked: build it again")
        self._lock = threading.Lock()
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, bytes
        self._shapes: dict[str, tuple[int, ...]] = {}  # inputs' shapes as the context has them
        self._cuda: Cuda | None = Cuda()
        try:
            with self._cuda.current():
                self._load(trt, data)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any, data: bytes) -> None:
        # TensorRT uses the logger as long as any of the three lives.
        self._logger = logger = make_logger(trt, False)
        self._runtime = self._engine = self._context = None
        self._runtime = runtime = trt.Runtime(logger)
        if self.provider == "tensorrt-rtx":
            _check_validity_rtx(trt, runtime, data, self.built.plan)
        self._engine = engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise ExportError(f"{self.built.plan} cannot be loaded: {why_failed(logger.errors)}")
        inputs: list[EngineTensor] = []
        outputs: list[EngineTensor] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            if kind not in _DTYPES or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise ExportError(f"{self.built.plan}: tensor '{name}' is a {kind} that avsep does not pass")
            tensor = EngineTensor(name, _DTYPES[kind], tuple(engine.get_tensor_shape(name)))
            (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(tensor)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._context = engine.create_execution_context()
        if self._context is None:
            raise ExportError(f"{self.built.plan} gets no execution context: {why_failed(logger.errors)}")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in new arrays.

        Args:
            inputs: by name, with the element types and shapes of :attr:`inputs`.

        Raises:
            ExportError: an input is missing, too many, or does not fit; or the GPU failed.
        """
        arrays = self._checked(inputs)
        with self._lock, self._opened() as (cuda, context):
            self._set_shapes(context, arrays)
            results = {}
            for tensor in self.outputs:
                shape = tuple(context.get_tensor_shape(tensor.name))
                if any(size < 0 for size in shape):
                    raise ExportError(f"{self.built.plan}: the shape of '{tensor.name}' stays open: {list(shape)}")
                results[tensor.name] = np.empty(shape, tensor.dtype)
            for name, array in (*arrays.items(), *results.items()):
                self._reserve(cuda, context, name, array.nbytes)
            try:
                for name, array in arrays.items():
                    cuda.upload(array, self._buffers[name][0])
                self._logger.errors.clear()
                if not context.execute_async_v3(cuda.stream):
                    raise ExportError(f"{self.built.plan} failed: {why_failed(self._logger.errors)}")
                for name, array in results.items():
                    cuda.download(self._buffers[name][0], array)
            finally:
                cuda.synchronize()  # the arrays may go only when no copy is under way
        return results

    @contextmanager
    def _opened(self) -> Iterator[tuple[Cuda, Any]]:
        cuda, context = self._cuda, self._context
        if cuda is None or context is None:
            raise ExportError(f"{self.built.plan} was closed")
        with cuda.current():
            yield cuda, context

    def _checked(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = [tensor.name for tensor in self.inputs]
        if sorted(inputs) != sorted(names):
            raise ExportError(f"{self.built.graph} takes {', '.join(names)}, got {', '.join(inputs)}")
        arrays = {}
        for name, dtype, shape in self.inputs:
            array = np.asarray(inputs[name])
            fits = array.ndim == len(shape) and all(w in (-1, g) for w, g in zip(shape, array.shape, strict=True))
            if array.dtype != np.dtype(dtype) or not fits:
                raise ExportError(
                    f"{self.built.graph}: '{name}' is {array.dtype} {list(array.shape)}, it takes {dtype} {list(shape)}"
                )
            arrays[name] = np.ascontiguousarray(array)
        return arrays

    def _set_shapes(self, context: Any, arrays: Mapping[str, Array]) -> None:
        if all(self._shapes.get(name) == array.shape for name, array in arrays.items()):
            return
        self._shapes = {}
        for name, array in arrays.items():
            if not context.set_input_shape(name, array.shape):
                raise ExportError(
                    f"{self.built.graph}: '{name}' of shape {list(array.shape)} is outside the engine's profile "
                    f"{self.built.sidecar['key']['profiles']}"
                )
        missing = context.infer_shapes()
        if missing:
            raise ExportError(f"{self.built.plan}: the shapes of {', '.join(missing)} stay open")
        self._shapes = {name: array.shape for name, array in arrays.items()}

    def _reserve(self, cuda: Cuda, context: Any, name: str, size: int) -> None:
        """A buffer of at least ``size`` bytes whose address the context has."""
        address, held = self._buffers.get(name, (0, 0))
        if held >= max(size, 1):
            return
        if held:
            del self._buffers[name]
            cuda.free(address)
        size = max(size, 1)
        address = cuda.allocate(size)
        if not context.set_tensor_address(name, address):
            cuda.free(address)
            raise ExportError(f"{self.built.plan} takes no buffer for '{name}'")
        self._buffers[name] = (address, size)

    def close(self) -> None:
        """Give back the device's memory. Closing twice does nothing."""
        with self._lock:
            cuda, self._cuda = self._cuda, None
            if cuda is None:
                return
            try:
                with cuda.current():
                    # in this order: a context uses its engine, and that its runtime
                    self._context = None
                    self._engine = None
                    self._runtime = None
                    buffers, self._buffers = self._buffers, {}
                    for address, _ in buffers.values():
                        cuda.free(address)
            finally:
                cuda.close()

    def __del__(self) -> None:
        with suppress(Exception):  # also of one that was never made, and when Python or the driver are going
            self.close()

    def __enter__(self) -> DeviceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_validity_rtx(trt: Any, runtime: Any, data: bytes, plan: Path) -> None:
    """Ask TensorRT-RTX whether it would run this plan here."""
    validity, diagnostics = runtime.get_engine_validity(data)
    if validity == trt.EngineValidity.INVALID:
        found = int(diagnostics)
        members = trt.EngineInvalidityDiagnostics.__members__
        reasons = [name.lower().replace("_", " ") for name, flag in members.items() if found & int(flag)]
        raise EngineMismatch(
            f"{plan} is not for this machine ({', '.join(reasons) or 'no reason given'}): build it again"
        )

"""Stand-ins for ``tensorrt`` 10 and 11 that know no more than those versions: any other member raises AttributeError.

Members come from ``tensorrt_members.json``. They behave as far as building and running an engine needs: a "graph" is
JSON (inputs and outputs with shapes, faults of the parser), a plan has TensorRT's header and then what was built, and
an engine writes twice its first input to each output.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

TABLE = json.loads((Path(__file__).parent / "tensorrt_members.json").read_text(encoding="utf-8"))


def members(version: str) -> dict[str, set[str]]:
    """By class the members that a version ("10.3", "10.16", "11.4" or "rtx") has, without the classes it lacks."""
    found = {}
    for name, groups in TABLE["classes"].items():
        here = {member for versions, names in groups.items() if version in versions.split() for member in names}
        if here:
            found[name] = here
    return found


def as_model(graph: dict[str, Any]) -> bytes:
    """A "graph" in the frame of an ONNX model: field 7, the graph, has it as its text (10), field 8 is an opset."""
    data = json.dumps(graph).encode()
    data += b" " * max(0, 128 - len(data))
    for key in (b"\x52", b"\x3a"):
        assert len(data) < 1 << 14
        data = key + bytes([len(data) & 127 | 128, len(data) >> 7]) + data
    return data + b"\x42\x00"


class Strict:
    """Has the members of its class in one version of TensorRT, as far as they are written here; records their use."""

    _known: ClassVar[set[str]] = set()
    _touched: ClassVar[set[tuple[str, str]]] = set()
    _name = ""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name in type(self)._known:
            type(self)._touched.add((type(self)._name, name))
        elif not name.startswith("_") and not type(self)._foreign(name):
            raise AttributeError(f"this TensorRT's {type(self)._name} has no '{name}'")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            if name not in type(self)._known and not type(self)._foreign(name):
                raise AttributeError(f"this TensorRT's {type(self)._name} has no '{name}'")
            type(self)._touched.add((type(self)._name, name))
        super().__setattr__(name, value)

    @classmethod
    def _foreign(cls, name: str) -> bool:
        """Subclasses in Python (loggers, monitors) add what they like."""
        return cls.__module__ != __name__


def make(version: str, *, log: tuple[str, ...] = (), fail: bool = False, steps: int = 3) -> ModuleType:
    """A fake ``tensorrt``.

    Args:
        version: of the table.
        log: what it logs as errors while it builds.
        fail: build nothing.
        steps: of each phase of the build.
    """
    known = members(version)
    number = TABLE["versions"][version]
    touched: set[tuple[str, str]] = set()
    module: Any = ModuleType("tensorrt")
    module.__version__ = number
    module.touched, module.built = touched, []
    strongly_typed = TABLE["strongly_typed"][version]

    def strict(cls: type) -> Any:
        name = cls.__name__
        assert name in known, f"TensorRT {version} has no {name}"
        written = {member for member in vars(cls) if not member.startswith("_")}
        assert written <= known[name], f"TensorRT {version}: {name} has no {written - known[name]}"
        cls._known, cls._touched, cls._name = known[name], touched, name  # type: ignore[attr-defined]
        setattr(module, name, cls)
        return cls

    def enumeration(name: str, **values: int) -> Any:
        wanted = known[name] - {"name", "value"}
        numbers = {member: values.get(member, 100 + i) for i, member in enumerate(sorted(wanted))}
        setattr(module, name, enum.IntEnum(name, numbers))
        return getattr(module, name)

    for name in ("BuilderFlag", "MemoryPoolType", "TensorIOMode", "TensorLocation", "DataType"):
        enumeration(name)
    enumeration("NetworkDefinitionCreationFlag", STRONGLY_TYPED=strongly_typed)
    severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    @strict
    class ILogger(Strict):
        Severity = severity

        def __init__(self) -> None:
            self._ready = True

        def log(self, severity: Any, message: str) -> None:
            raise NotImplementedError

    @strict
    class IProgressMonitor(Strict):
        def __init__(self) -> None:
            self._ready = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            raise NotImplementedError

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise NotImplementedError

        def phase_finish(self, phase_name: str) -> None:
            raise NotImplementedError

    @strict
    class ITensor(Strict):
        def __init__(self, name: str, shape: list[int]) -> None:
            self._values = name, tuple(shape)

        name = property(lambda self: self._values[0])
        shape = property(lambda self: self._values[1])

    @strict
    class INetworkDefinition(Strict):
        def __init__(self) -> None:
            self._graph: dict[str, Any] = {"inputs": {}, "outputs": {}}

        num_inputs = property(lambda self: len(self._graph["inputs"]))
        num_outputs = property(lambda self: len(self._graph["outputs"]))

        def get_input(self, index: int) -> Any:
            return ITensor(*list(self._graph["inputs"].items())[index])

    @strict
    class ParserError(Strict):
        def __init__(self, fault: dict[str, str]) -> None:
            self._fault = fault

        def desc(self) -> str:
            return self._fault["desc"]

        def node_name(self) -> str:
            return self._fault.get("name", "")

        def node_operator(self) -> str:
            return self._fault.get("operator", "")

    @strict
    class OnnxParser(Strict):
        def __init__(self, network: Any, logger: Any) -> None:
            assert isinstance(network, INetworkDefinition)
            assert isinstance(logger, ILogger)
            assert logger._ready
            self._network, self._faults = network, []

        num_errors = property(lambda self: len(self._faults))

        def parse_from_file(self, path: str) -> bool:
            assert isinstance(path, str)
            graph = json.loads(Path(path).read_bytes()[6:-2])
            self._faults = graph.pop("faults", [])
            self._network._graph = graph
            return not self._faults

        def get_error(self, index: int) -> Any:
            return ParserError(self._faults[index])

    @strict
    class IOptimizationProfile(Strict):
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, name: str, low: tuple[int, ...], usual: tuple[int, ...], high: tuple[int, ...]) -> None:
            assert all(isinstance(shape, tuple) for shape in (low, usual, high))
            self._shapes[name] = [low, usual, high]

    class HostMemory(bytes):
        """A buffer, as IHostMemory is one."""

    @strict
    class ITimingCache(Strict):
        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> Any:
            return HostMemory(self._data + b"+")

    @strict
    class IBuilderConfig(Strict):
        def __init__(self) -> None:
            self._flags = {module.BuilderFlag.TF32}
            self._pools: dict[Any, int] = {}
            self._profiles: list[Any] = []
            self._cache: Any = None
            self._progress: Any = None

        @property
        def progress_monitor(self) -> Any:
            return self._progress

        @progress_monitor.setter
        def progress_monitor(self, monitor: Any) -> None:
            assert isinstance(monitor, IProgressMonitor)
            assert monitor._ready
            self._progress = monitor

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            assert isinstance(pool, module.MemoryPoolType)
            self._pools[pool] = size

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag)

        def create_timing_cache(self, data: bytes) -> Any:
            return ITimingCache(bytes(data))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            if cache._data.startswith(b"foreign"):
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

        def add_optimization_profile(self, profile: Any) -> int:
            assert isinstance(profile, IOptimizationProfile)
            if any(high[0] > 1000 for _, _, high in profile._shapes.values()):
                return -1
            self._profiles.append(profile._shapes)
            return len(self._profiles) - 1

    @strict
    class Builder(Strict):
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, ILogger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> Any:
            assert flags == 1 << strongly_typed, "the network is not strongly typed"
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            opened = [n for n, shape in network._graph["inputs"].items() if -1 in shape]
            assert not opened or config._profiles, "open shapes without a profile"
            assert not opened or set(config._profiles[0]) == set(opened)
            for message in log:
                self._logger.log(severity.ERROR, message)
            if fail or not self._phases(config._progress):
                return None
            built = {
                "graph": network._graph,
                "profiles": config._profiles,
                "tf32": module.BuilderFlag.TF32 in config._flags,
                "workspace": config._pools.get(module.MemoryPoolType.WORKSPACE),
                "cache": config._cache._data.decode() if config._cache is not None else None,
            }
            module.built.append(built)
            numbers = [int(part) for part in number.split(".")]
            head = b"ftrt" + bytes(20) + bytes([*numbers, 0][:4])
            return HostMemory(head + json.dumps(built).encode())

        def _phases(self, monitor: Any) -> bool:
            """Two phases, one in the other, the inner one told from another thread."""
            going = []

            def inner() -> None:
                monitor.phase_start("inner", "outer", steps)
                going.extend(monitor.step_complete("inner", step) for step in range(steps))
                monitor.phase_finish("inner")

            monitor.phase_start("outer", None, steps)
            thread = threading.Thread(target=inner)
            thread.start()
            thread.join()
            for step in range(steps):
                if not all(going):
                    break
                going.append(monitor.step_complete("outer", step))
            monitor.phase_finish("outer")
            return all(going)

    @strict
    class IExecutionContext(Strict):
        def __init__(self, built: dict[str, Any]) -> None:
            self._built = built
            self._shapes = {n: tuple(s) for n, s in built["graph"]["inputs"].items() if -1 not in s}
            self._addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert isinstance(shape, tuple)
            declared = self._built["graph"]["inputs"][name]
            if -1 in declared:
                low, _, high = self._built["profiles"][0][name]
                fits = all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
            else:
                fits = list(shape) == declared
            if fits:
                self._shapes[name] = shape
            return fits

        def infer_shapes(self) -> list[str]:
            return [name for name in self._built["graph"]["inputs"] if name not in self._shapes]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            first = next(iter(self._built["graph"]["inputs"]))
            return self._shapes[first]

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert isinstance(address, int)
            self._addresses[name] = address
            return address != 0

        def execute_async_v3(self, stream: int) -> bool:
            assert isinstance(stream, int)
            assert stream != 0
            first = next(iter(self._built["graph"]["inputs"]))
            size = 1
            for length in self._shapes[first]:
                size *= length
            source = (ctypes.c_float * size).from_address(self._addresses[first])
            for name in self._built["graph"]["outputs"]:
                target = (ctypes.c_float * size).from_address(self._addresses[name])
                for index in range(size):
                    target[index] = 2 * source[index]
            return True

    @strict
    class ICudaEngine(Strict):
        def __init__(self, built: dict[str, Any]) -> None:
            self._built = built

        num_io_tensors = property(lambda self: len(self._io()))

        def _io(self) -> list[tuple[str, list[int]]]:
            return [*self._built["graph"]["inputs"].items(), *self._built["graph"]["outputs"].items()]

        def get_tensor_name(self, index: int) -> str:
            return self._io()[index][0]

        def get_tensor_mode(self, name: str) -> Any:
            inputs = self._built["graph"]["inputs"]
            return module.TensorIOMode.INPUT if name in inputs else module.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return module.DataType.INT64 if name == "class_ids" else module.DataType.FLOAT

        def get_tensor_shape(self, name: str) -> Any:
            return tuple(dict(self._io())[name])

        def get_tensor_location(self, name: str) -> Any:
            return module.TensorLocation.DEVICE

        def create_execution_context(self) -> Any:
            return IExecutionContext(self._built)

    @strict
    class Runtime(Strict):
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, ILogger)
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if plan[28:29] != b"{":
                self._logger.log(severity.ERROR, "the plan is of another version")
                return None
            return ICudaEngine(json.loads(plan[28:]))

    return module

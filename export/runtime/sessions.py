"""Running a bundle's graphs: what all ways have in common, ONNX Runtime, and the choice among the ways.

NumPy and the standard library; onnxruntime, openvino and TensorRT are imported when they are asked for.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import ExportError, UnknownNameError, one_line
from .onnx_file import check_onnx
from .reader import Bundle, Graph

__all__ = [
    "ENGINES",
    "GRAPH_PROVIDERS",
    "ONNX_PROVIDERS",
    "OPENVINO",
    "PROVIDERS",
    "Engine",
    "OnnxSession",
    "check_provider",
    "open_session",
    "start_onnx",
]

Array = NDArray[Any]

# what may be asked for -> ONNX Runtime's name of it
ONNX_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
OPENVINO = "openvino"
GRAPH_PROVIDERS = (*ONNX_PROVIDERS, OPENVINO)  # run the bundle's graphs as they are
ENGINES = ("tensorrt", "tensorrt-rtx")  # run what was built from them
PROVIDERS = ("auto", *GRAPH_PROVIDERS, *ENGINES)

# Shapes for which buffers are kept; a stream and whole files use one or two.
_MOST_SHAPES = 4


class Engine(Protocol):
    """A graph, ready to run. ``provider`` is what really runs it."""

    provider: str

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by name. They may lie in buffers that the next call overwrites.

        Raises :class:`ExportError` where it does not take the inputs.
        """
        ...

    def close(self) -> None:
        """Give back what it holds of a device. It cannot be run afterwards; closing twice does nothing."""
        ...


def _output_shapes(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shape of each output by name: open dimensions have the sizes that they have in the inputs."""
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        for declared, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True):
            if isinstance(declared, str):
                sizes[declared] = size
    return {
        tensor.name: tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        for tensor in graph.outputs
    }


def check_provider(name: str, known: Sequence[str] = PROVIDERS) -> None:
    """Raise :class:`UnknownNameError` for an unknown provider; all are named, since the nearest to 'gpu' is 'cpu'."""
    if name not in known:
        raise UnknownNameError(f"unknown provider '{name}': choose one of {', '.join(known)}")


def start_onnx(
    model: bytes | Path, where: str = "", provider: str = "cpu", threads: int = 0, *, fall_back: bool = False
) -> tuple[Any, str]:
    """Load a graph in ONNX Runtime: the session, and the provider that really runs it.

    ONNX Runtime lists providers that it was built with, whether or not they can load, and takes the CPU in their place
    with a warning at most. Here that is an error, or, with ``fall_back``, told by the second result.

    Args:
        model: the graph, or its path.
        where: names it in errors; the name of its file when empty.
        provider: a key of :data:`ONNX_PROVIDERS`.
        threads: of one operator; 0 leaves it to ONNX Runtime.
        fall_back: go on where another provider runs than the one asked for.

    Raises:
        ExportError: onnxruntime is missing, the provider cannot run here, or the graph is damaged or takes weights from
            other files.
    """
    ort = _onnxruntime()
    check_onnx(model, where)
    graph, name = (str(model), model.name) if isinstance(model, Path) else (model, "the graph")
    where = where or name
    wanted, cpu = ONNX_PROVIDERS[provider], ONNX_PROVIDERS["cpu"]
    available = ort.get_available_providers()
    if wanted not in available and not fall_back:
        raise ExportError(
            f"this ONNX Runtime has no {wanted}: it has {', '.join(available)}; --provider cpu runs everywhere"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    options.intra_op_num_threads = threads
    session, reason = None, "its libraries or device are missing"
    if wanted != cpu and wanted in available:
        ort.set_default_logger_severity(4)  # a provider that cannot load would print lines of its own
        banner = io.StringIO()  # and ONNX Runtime's own retry one on the output; old ones know no enable_fallback
        try:
            with contextlib.redirect_stdout(banner):
                session = ort.InferenceSession(graph, options, providers=[wanted], enable_fallback=0)
            if told := re.search(r"^EP Error (.*?) when using", banner.getvalue(), re.DOTALL | re.MULTILINE):
                reason = one_line(told[1])
        except Exception as error:  # onnxruntime raises classes of its C++ module that share no base but this one
            reason = one_line(error)
        finally:
            ort.set_default_logger_severity(2)  # its default
    if session is None:  # the CPU, where it was asked for; else to tell a damaged graph from a provider that fails
        try:
            session = ort.InferenceSession(graph, options, providers=[cpu])
        except Exception as error:  # as above
            raise ExportError(f"ONNX Runtime cannot load {where} ({one_line(error)}): export it again") from None
    session.disable_fallback()  # a failing call is an error, not a slow answer
    ran = str(session.get_providers()[0])
    if ran != wanted and not fall_back:
        raise ExportError(
            f"ONNX Runtime runs {ran} instead of {wanted} ({reason}): install what it needs, or --provider cpu"
        )
    return session, ran


class OnnxSession:
    """A graph in ONNX Runtime, with buffers that are bound once for each shape and used again.

    Args:
        bundle, graph: what to run.
        provider, threads, fall_back: as for :func:`start_onnx`; the attribute ``provider`` tells what really runs.

    Raises:
        ExportError: as :func:`start_onnx`, or the graph's file is damaged.
    """

    def __init__(
        self, bundle: Bundle, graph: Graph, provider: str = "cpu", threads: int = 0, *, fall_back: bool = False
    ) -> None:
        self._ort = _onnxruntime()
        self._where = f"{bundle.path}: {graph.file}"
        self.session, self.provider = start_onnx(
            bundle.read(graph.file), self._where, provider, threads, fall_back=fall_back
        )
        self.graph = graph
        self._device = "cpu" if self.provider == ONNX_PROVIDERS["cpu"] else "cuda"
        self._bound: dict[tuple[tuple[int, ...], ...], _Buffers] = {}
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See :class:`Engine`. The outputs on the CPU lie in buffers that the next call overwrites."""
        self.graph.check(inputs, self._where)  # a buffer would take another element type in silence, cut to its own
        key = tuple(inputs[tensor.name].shape for tensor in self.graph.inputs)
        with self._lock:
            if self.session is None:
                raise ExportError(f"{self._where} was closed")
            buffers = self._bound.get(key)
            try:
                if buffers is None:
                    buffers = _Buffers(self._ort, self.session, self.graph, inputs, self._device)
                    while len(self._bound) >= _MOST_SHAPES:
                        self._bound.pop(next(iter(self._bound)))
                    self._bound[key] = buffers
                return buffers.run(inputs)
            except Exception as error:  # as in start_onnx
                raise ExportError(
                    f"ONNX Runtime cannot run {self._where} ({one_line(error)}): export it again"
                ) from None

    def close(self) -> None:
        """See :class:`Engine`."""
        with self._lock:
            self._bound.clear()  # before the session that they are bound to
            self.session = None


class _Buffers:
    """Inputs and outputs of one set of shapes, bound to a session. On a GPU they lie in its memory."""

    def __init__(self, ort: Any, session: Any, graph: Graph, inputs: Mapping[str, Array], device: str) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._host: dict[str, Array] = {}  # on the CPU the values are views of these
        self._values: dict[str, Any] = {}
        self._outputs = tuple(tensor.name for tensor in graph.outputs)
        shapes = {tensor.name: inputs[tensor.name].shape for tensor in graph.inputs}
        for tensor in (*graph.inputs, *graph.outputs):
            shape = shapes.get(tensor.name) or _output_shapes(graph, inputs)[tensor.name]
            if device == "cpu":
                self._host[tensor.name] = np.zeros(shape, dtype=tensor.dtype)
                value = ort.OrtValue.ortvalue_from_numpy(self._host[tensor.name])
            else:
                value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(tensor.dtype), device, 0)
            self._values[tensor.name] = value
            bind = self._binding.bind_ortvalue_output if tensor in graph.outputs else self._binding.bind_ortvalue_input
            bind(tensor.name, value)
        self._inputs = tuple(shapes)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name in self._inputs:
            if name in self._host:
                self._host[name][...] = inputs[name]
            else:
                self._values[name].update_inplace(np.ascontiguousarray(inputs[name]))
        self._session.run_with_iobinding(self._binding)
        return {name: self._host[name] if name in self._host else self._values[name].numpy() for name in self._outputs}


def open_session(
    bundle: Bundle,
    graphs: Sequence[Graph],
    provider: str = "auto",
    threads: int = 0,
    engines: str | os.PathLike[str] | None = None,
) -> tuple[list[Engine], tuple[str, ...]]:
    """Make graphs ready, all in the same way.

    ``auto`` takes engines that were built here, CUDA, or the CPU by ONNX Runtime, in this order. ``engines`` is the
    folder of the engines, where it is not the bundle's own.

    Returns:
        An engine for each graph, and for each way that ``auto`` passed over the reason in a line.

    Raises:
        UnknownNameError: an unknown provider.
        ExportError: the provider does not run here; another one never runs in its place.
    """
    check_provider(provider)
    if provider != "auto":
        return _opened(bundle, graphs, provider, threads, engines), ()
    passed_over: list[str] = []
    for candidate in (*ENGINES, "cuda", "cpu"):
        try:
            return _opened(bundle, graphs, candidate, threads, engines), tuple(passed_over)
        except ExportError as error:
            if candidate == "cpu":
                raise
            passed_over.append(f"{candidate}: {error}")
    raise AssertionError("unreachable: the last candidate returns or raises")


def _opened(
    bundle: Bundle, graphs: Sequence[Graph], provider: str, threads: int, engines: str | os.PathLike[str] | None
) -> list[Engine]:
    opened: list[Engine] = []
    try:
        for graph in graphs:
            if provider in ONNX_PROVIDERS:
                opened.append(OnnxSession(bundle, graph, provider, threads))
            elif provider == OPENVINO:
                from .openvino_session import OpenvinoSession

                opened.append(OpenvinoSession(bundle, graph, threads))
            else:
                from .engines import open_engine

                opened.append(open_engine(bundle, graph, provider, out=engines))
    except BaseException:
        for engine in opened:  # one graph has no engine: the others must not keep the device's memory
            engine.close()
        raise
    return opened


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ExportError(
            "ONNX Runtime is missing: pip install onnxruntime (on an NVIDIA GPU onnxruntime-gpu), choose --provider "
            "openvino where that is installed, or build an engine with the bundle's build_engine.py and choose "
            "--provider tensorrt"
        ) from None
    return onnxruntime

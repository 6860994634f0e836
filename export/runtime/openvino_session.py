"""Running a bundle's graphs with OpenVINO, on the CPU. NumPy and, when a graph is opened, the package openvino.

OpenVINO reads the bundle's ONNX as it is. Three of its habits are turned off: on processors with bfloat16 it computes
fp32 graphs in that type without being asked, which the golden outputs would refuse; its import reports itself to its
maker over the network, where no one has said that it shall not; and what it loads for the CPU is never unloaded, since
that may take away the stack on which the main thread handles signals: the next Ctrl-C would be a segmentation fault.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ExportError, one_line
from .onnx_file import check_onnx
from .reader import Bundle, Graph

__all__ = ["OpenvinoSession", "load_openvino"]

Array = NDArray[Any]

_CONVERTER = "openvino.tools.ovc"  # of other formats, which nothing here needs; it is what reports
_TYPES = {"float32": "f32", "float16": "f16", "int64": "i64", "int32": "i32", "uint8": "u8", "bool": "boolean"}


class OpenvinoSession:
    """A graph in OpenVINO. ``provider`` is ``openvino``; it computes fp32 graphs in fp32.

    Args:
        bundle, graph: what to run.
        threads: of the processor; 0 leaves the number to OpenVINO.

    Raises:
        ExportError: openvino is missing, the graph's file is damaged or takes weights from other files, or the graph
            is not what the manifest says.
    """

    provider = "openvino"

    def __init__(self, bundle: Bundle, graph: Graph, threads: int = 0) -> None:
        load_openvino()
        self._where = f"{bundle.path}: {graph.file}"
        data = bundle.read(graph.file)
        check_onnx(data, self._where)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = _core()
            self._request = core.compile_model(core.read_model(data), "CPU", settings).create_infer_request()
        except Exception as error:  # openvino raises RuntimeError for all that can go wrong, and others for some
            raise ExportError(
                f"OpenVINO cannot load {self._where} ({one_line(error, 300)}): export it again, or --provider cpu"
            ) from None
        self.graph = graph
        self._check_interface()
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See :class:`~.sessions.Engine`. The outputs lie in buffers that the next call overwrites."""
        self.graph.check(inputs, self._where)
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        with self._lock:
            if self._request is None:
                raise ExportError(f"{self._where} was closed")
            try:
                found = self._request.infer(given, share_inputs=True, share_outputs=True)
                return {tensor.name: found[tensor.name] for tensor in self.graph.outputs}
            except Exception as error:  # as in __init__
                raise ExportError(f"OpenVINO cannot run {self._where} ({one_line(error)}): export it again") from None

    def close(self) -> None:
        """See :class:`~.sessions.Engine`."""
        with self._lock:
            self._request = None

    def _check_interface(self) -> None:
        """Refuse a graph whose inputs and outputs are not those that the manifest tells of."""
        model = self._request.get_compiled_model()
        for side, stated, ports in (
            ("takes", self.graph.inputs, model.inputs),
            ("gives", self.graph.outputs, model.outputs),
        ):
            has = {port.get_any_name(): port for port in ports}
            if has.keys() != {tensor.name for tensor in stated}:
                says = ", ".join(tensor.name for tensor in stated)
                raise ExportError(
                    f"{self._where} {side} {', '.join(has)}, the manifest says {says}: it is another graph, copy or "
                    "export the bundle again"
                )
            for tensor in stated:
                port = has[tensor.name]
                kind, shape = port.get_element_type().get_type_name(), port.get_partial_shape()
                sizes = [size.get_length() if size.is_static else None for size in shape]
                fits = len(sizes) == len(tensor.shape) and all(
                    size is None if isinstance(want, str) else size == want or (side == "gives" and size is None)
                    for size, want in zip(sizes, tensor.shape, strict=True)
                )
                if kind != _TYPES[tensor.dtype] or not fits:
                    raise ExportError(
                        f"{self._where} {side} {tensor.name} as {kind} {shape}, the manifest says {tensor.dtype} "
                        f"{list(tensor.shape)}: it is another graph, copy or export the bundle again"
                    )


_making = threading.Lock()  # two at once would make two, of which one dies


def _core() -> Any:
    """One for the whole process, which keeps what is loaded for the CPU.

    That (2026.4, ``SigAltStackSetup``) gives the thread that loads it another stack for signals, and frees it with the
    last session, in whatever thread that ends. A thread's stack can be taken back by itself alone.
    """
    with _making:
        return _made_core()


@cache
def _made_core() -> Any:
    return load_openvino().Core()


def load_openvino() -> Any:
    """The package openvino.

    Raises:
        ExportError: it is not installed, or does not load here.
    """
    try:
        with _unreported():
            import openvino
    except ImportError as error:
        raise ExportError(
            f"OpenVINO does not load here ({one_line(error)}): pip install openvino, or --provider cpu, which is ONNX "
            "Runtime"
        ) from None
    if not hasattr(openvino, "Core"):  # before 2023.1 it lay in openvino.runtime
        raise ExportError("this OpenVINO is too old: pip install --upgrade openvino, or --provider cpu")
    return openvino


@contextmanager
def _unreported() -> Iterator[None]:
    """Import openvino without its converter, unless someone has imported that already.

    ``import openvino`` tries ``openvino.tools.ovc`` and goes on where that cannot be imported; a None in
    ``sys.modules`` says so, and is taken away again for those who want it.
    """
    if "openvino" in sys.modules or _CONVERTER in sys.modules:
        yield
        return
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_CONVERTER]

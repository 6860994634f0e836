"""Running an engine on the GPU, and the library's side of building and finding engines.

:mod:`avsep.export.targets.tensorrt` is the builder, which also runs without avsep; here its errors become the
library's, tars get a place for their engines, and :class:`DeviceEngine` runs an engine that was found to be good.

Device memory, streams and copies come from the CUDA driver itself, through ctypes: it is there wherever a GPU can be
used, under one name on Linux and Jetson (``libcuda.so.1``) and one on Windows (``nvcuda.dll``), whichever CUDA toolkit
TensorRT was built for, and its functions keep their signatures (a changed one gets a new name, ``_v2``). The CUDA
runtime library would have to be found in its version (``libcudart.so.12``, ``.13``, ``cudart64_12.dll``), and
``cuda-python``, CuPy and PyCUDA are packages of some hundred megabytes or that compile on a Jetson. TensorRT works in
the device's primary context, and so does this.

What was run of it, and on what, is told in README.md: not on a device.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ExportError
from avsep.export.targets import tensorrt as builder
from avsep.export.targets.tensorrt import BuildCancelled, BuildError, Built, EngineMismatch

if TYPE_CHECKING:
    from avsep.export.runtime.reader import Bundle, Graph

__all__ = [
    "Cuda",
    "DeviceEngine",
    "EngineTensor",
    "build_engines",
    "check_machine",
    "engines_folder",
    "open_engine",
]

Array = NDArray[Any]

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


def engines_folder(bundle: Bundle) -> Path:
    """Where the engines of a bundle lie: ``engines`` in its folder; beside a tar, in ``NAME.engines``."""
    return bundle.path.with_suffix(".engines") if bundle.is_tar else bundle.path / builder.ENGINES


def build_engines(
    bundle: Bundle,
    *,
    graphs: Sequence[str] = (),
    target: str = "auto",
    sm: Sequence[int | str] = (),
    workspace_mib: int = builder.DEFAULT_WORKSPACE_MIB,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool | builder.Report = True,
    tell: Any = lambda line: None,
) -> list[Built]:
    """As :func:`avsep.export.targets.tensorrt.build_bundle`, for a bundle that was opened, its tar form too.

    Raises:
        ExportError: one line, as ``BuildError`` there.
        KeyboardInterrupt: Ctrl-C during a build, which left nothing behind.
    """
    try:
        return builder.build_bundle(
            bundle.folder(),
            graphs=graphs,
            target=target,
            sm=sm,
            workspace_mib=workspace_mib,
            out=engines_folder(bundle) if out is None else out,
            force=force,
            progress=progress,
            tell=tell,
        )
    except BuildCancelled:
        raise KeyboardInterrupt from None
    except BuildError as error:
        raise ExportError(str(error)) from None


def check_machine(target: str, sm: Sequence[int | str] = ()) -> None:
    """Raise :class:`ExportError` where engines cannot be built here, for the GPU here or for each of ``sm``."""
    try:
        for capability in sm or (None,):
            builder._machine_for(target, capability)
    except BuildError as error:
        raise ExportError(str(error)) from None


def open_engine(
    bundle: Bundle, graph: Graph, target: str = "auto", *, out: str | os.PathLike[str] | None = None
) -> DeviceEngine:
    """The engine of a graph that was built for this machine, ready to run.

    Raises:
        ExportError: there is no GPU or TensorRT, no engine, or one that is of another graph, TensorRT, GPU, platform or
            profile, or damaged; says which.
    """
    try:
        machine = builder.this_machine(target)
        bundle.check(graph.file)  # where it lies: a tar need not be unpacked for that
        place = engines_folder(bundle) if out is None else out
        return DeviceEngine(builder.engine_of(graph.entry, bundle.manifest["files"][graph.file], machine, place))
    except BuildError as error:
        raise ExportError(str(error)) from None


class EngineTensor(NamedTuple):
    """An input or output of an engine; an open dimension is -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]


# ---------------------------------------------------------------- CUDA


class Cuda:
    """The few functions of the CUDA driver that running an engine takes, on the first GPU.

    Signatures: cuda.h (CUDA driver API). CUdevice is an int, CUdeviceptr 64 bits, CUcontext and CUstream pointers.

    Raises:
        ExportError: no driver, or a call failed; names the call and the driver's reason.
    """

    _SIGNATURES: Mapping[str, tuple[Any, ...]] = {
        "cuInit": (ctypes.c_uint,),
        "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
        "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
        "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
        "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
        "cuCtxPopCurrent_v2": (ctypes.POINTER(ctypes.c_void_p),),
        "cuMemAlloc_v2": (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t),
        "cuMemFree_v2": (ctypes.c_uint64,),
        "cuMemGetInfo_v2": (ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)),
        "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
        "cuMemcpyDtoHAsync_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p),
        "cuStreamCreate": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint),
        "cuStreamSynchronize": (ctypes.c_void_p,),
        "cuStreamDestroy_v2": (ctypes.c_void_p,),
        "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    }
    _NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for the default stream of others

    def __init__(self, library: str | None = None) -> None:
        name = library or ("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        try:
            self._library = ctypes.CDLL(name)
            for function, arguments in self._SIGNATURES.items():
                entry = getattr(self._library, function)
                entry.argtypes, entry.restype = list(arguments), ctypes.c_int
        except (OSError, AttributeError) as error:
            raise ExportError(f"there is no NVIDIA driver ({name}: {error})") from None
        self._call("cuInit", 0)
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._device, self._context, self._stream = device, context, stream
        try:
            with self.current():
                self._call("cuStreamCreate", ctypes.byref(stream), self._NON_BLOCKING)
        except BaseException:
            self._call("cuDevicePrimaryCtxRelease_v2", device)
            raise

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode("utf-8", "replace")
            hint = ": too little memory, stop other programs" if status == 2 else ""  # CUDA_ERROR_OUT_OF_MEMORY
            raise ExportError(f"the GPU failed in {function}: {reason} (error {status}){hint}")

    @contextmanager
    def current(self) -> Iterator[None]:
        """The device's context is this thread's, and afterwards again what was."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    @property
    def stream(self) -> int:
        """Handle of the stream that copies and executions are queued on."""
        return int(self._stream.value or 0)

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes of device memory."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def unused_bytes(self) -> int:
        """Device memory that nobody holds, of this process or another."""
        unused, whole = ctypes.c_size_t(), ctypes.c_size_t()
        with self.current():
            self._call("cuMemGetInfo_v2", ctypes.byref(unused), ctypes.byref(whole))
        return unused.value

    def upload(self, array: Array, address: int) -> None:
        """Queue a copy to the device. The array must stay as it is until :meth:`synchronize`."""
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, address: int, array: Array) -> None:
        """Queue a copy from the device into ``array``."""
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for what was queued."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        try:
            with self.current():
                self._call("cuStreamDestroy_v2", self._stream)
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)


# ---------------------------------------------------------------- the engine


class DeviceEngine:
    """An engine on the GPU, with device buffers that are kept between calls. One call at a time; threads wait.

    ``inputs`` and ``outputs`` are its tensors; ``provider`` what runs it, ``tensorrt`` or ``tensorrt-rtx``.

    Args:
        built: of :func:`avsep.export.targets.tensorrt.find_engine`, which has checked that it is good for this machine.

    Raises:
        EngineMismatch: the file is no longer the one that was checked, or the runtime says it is not for this machine.
        BuildError: TensorRT cannot load it; says why.
        ExportError: the GPU failed.
    """

    def __init__(self, built: Built) -> None:
        self.built = built
        self.provider = str(built.sidecar["key"]["target"])
        trt, _ = builder.load_tensorrt(self.provider)
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
        self._logger = logger = builder.make_logger(trt, False)
        self._runtime = self._engine = self._context = None
        self._runtime = runtime = trt.Runtime(logger)
        if self.provider == "tensorrt-rtx":
            _check_validity_rtx(trt, runtime, data, self.built.plan)
        self._engine = engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BuildError(f"{self.built.plan} cannot be loaded: {builder.why_failed(logger.errors)}")
        inputs: list[EngineTensor] = []
        outputs: list[EngineTensor] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            if kind not in _DTYPES or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise BuildError(f"{self.built.plan}: tensor '{name}' is a {kind} that avsep does not pass")
            tensor = EngineTensor(name, _DTYPES[kind], tuple(engine.get_tensor_shape(name)))
            (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(tensor)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._context = engine.create_execution_context()
        if self._context is None:
            raise BuildError(f"{self.built.plan} gets no execution context: {builder.why_failed(logger.errors)}")

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
                    raise ExportError(f"{self.built.plan} failed: {builder.why_failed(self._logger.errors)}")
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

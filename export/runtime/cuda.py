"""The GPU by its driver alone: which one is here, and the memory, copies and stream that running an engine takes.

The driver is there wherever a GPU can be used, under one name on Linux and Jetson (``libcuda.so.1``) and one on Windows
(``nvcuda.dll``), whichever CUDA toolkit TensorRT was built for, and its functions keep their signatures (a changed one
gets a new name, ``_v2``). The CUDA runtime library would have to be found in its version (``libcudart.so.12``, ``.13``,
``cudart64_12.dll``), and ``cuda-python``, CuPy and PyCUDA are packages of some hundred megabytes or that compile on a
Jetson. TensorRT works in the device's primary context, and so does this.

Signatures: cuda.h (CUDA driver API). CUdevice is an int, CUdeviceptr 64 bits, CUcontext and CUstream pointers.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from numpy.typing import NDArray

from .errors import ExportError

__all__ = ["Cuda", "Gpu", "find_gpu"]

_INT, _POINTER = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_void_p)
_SIGNATURES: Mapping[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (_INT,),
    "cuDeviceGet": (_INT, ctypes.c_int),
    "cuDeviceGetName": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceTotalMem_v2": (ctypes.POINTER(ctypes.c_size_t), ctypes.c_int),
    "cuDeviceGetAttribute": (_INT, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_POINTER, ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuMemAlloc_v2": (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemGetInfo_v2": (ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
    "cuMemcpyDtoHAsync_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p),
    "cuStreamCreate": (_POINTER, ctypes.c_uint),
    "cuStreamSynchronize": (ctypes.c_void_p,),
    "cuStreamDestroy_v2": (ctypes.c_void_p,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for the default stream of others
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class _Driver:
    """The driver's functions; a call that fails is an :class:`ExportError` with its name and the driver's reason."""

    def __init__(self, library: str | None = None) -> None:
        name = library or ("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        try:
            self._library = ctypes.CDLL(name)
            for function, arguments in _SIGNATURES.items():
                entry = getattr(self._library, function)
                entry.argtypes, entry.restype = list(arguments), ctypes.c_int
        except (OSError, AttributeError) as error:
            raise ExportError(f"there is no NVIDIA driver ({name}: {error})") from None
        self("cuInit", 0)

    def __call__(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode("utf-8", "replace")
            hint = ": too little memory, stop other programs" if status == _OUT_OF_MEMORY else ""
            raise ExportError(f"the GPU failed in {function}: {reason} (error {status}){hint}")

    def first_gpu(self) -> ctypes.c_int:
        device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(device), 0)
        return device


class Gpu(NamedTuple):
    """A GPU: its name, compute capability ("8.7"), memory and the newest CUDA that its driver takes ("12.6")."""

    name: str
    capability: str
    memory_mib: int
    cuda: str


def find_gpu() -> tuple[Gpu | None, str]:
    """The first GPU, from the driver itself, or None and why there is none.

    TensorRT is not asked: without a driver some of its calls end the process.
    """
    name, memory, value = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
    try:
        call = _Driver()
        device = call.first_gpu()
        call("cuDeviceGetName", name, len(name), device)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        capability = []
        for attribute in _CAPABILITY:
            call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            capability.append(str(value.value))
        call("cuDriverGetVersion", ctypes.byref(value))
    except ExportError as error:
        return None, str(error)
    version = f"{value.value // 1000}.{value.value % 1000 // 10}"
    return Gpu(name.value.decode("utf-8", "replace"), ".".join(capability), memory.value >> 20, version), ""


class Cuda:
    """What running an engine needs of the first GPU: device memory, copies, and a stream that they are queued on.

    Raises:
        ExportError: there is no driver, or a call failed; names the call and the driver's reason.
    """

    def __init__(self, library: str | None = None) -> None:
        self._call = _Driver(library)
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._device = self._call.first_gpu()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._context, self._stream = context, stream
        try:
            with self.current():
                self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        except BaseException:
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)
            raise

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
        """Give back device memory."""
        self._call("cuMemFree_v2", address)

    def unused_bytes(self) -> int:
        """Device memory that nobody holds, of this process or another."""
        unused, whole = ctypes.c_size_t(), ctypes.c_size_t()
        with self.current():
            self._call("cuMemGetInfo_v2", ctypes.byref(unused), ctypes.byref(whole))
        return unused.value

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy to the device. The array must stay as it is until :meth:`synchronize`."""
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy from the device into ``array``."""
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for what was queued."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Destroy the stream and release the context."""
        try:
            with self.current():
                self._call("cuStreamDestroy_v2", self._stream)
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)

"""Parts of files: memory maps, reads by position, and where in a WAV or NumPy file the numbers begin.

A map that stays is the quickest to read from, but a store of files has more of them than a process may hold; a file
that would be mapped for one read alone is read by position instead, at half the cost.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from avsep.errors import DataError
from avsep.export.runtime.arrays import ArrayHeader, header_bytes, read_header

__all__ = [
    "ArrayOnDisk",
    "FileMaps",
    "MappedFile",
    "OpenFile",
    "PcmLayout",
    "array_header",
    "array_in",
    "load_array",
    "pcm_layout",
    "room_for_maps",
]

_HEAD = 128  # bytes of a file that hold the header of most arrays, and of every WAV file written here


class FileMaps:
    """Files as read-only byte arrays, mapped when first asked for; the ``limit`` last used stay open.

    Each holds a file descriptor. An array of a map that is closed stays valid as long as somebody holds it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._maps)

    def get_if_room(self, path: str) -> np.ndarray | None:
        """As :meth:`get`, but None where the file is not mapped and the limit is reached: then nothing is closed."""
        with self._lock:
            found = self._maps.get(path)
            if found is None and len(self._maps) < self.limit:
                found = self._maps[path] = _mapped(path)
            return found

    def get(self, path: str) -> np.ndarray:
        """uint8 [size of the file]. Raises :class:`DataError` where it is missing or cannot be read."""
        with self._lock:
            found = self._maps.get(path)
            if found is not None:
                self._maps.move_to_end(path)
                return found
            found = self._maps[path] = _mapped(path)
            while len(self._maps) > self.limit:
                self._maps.popitem(last=False)
            return found


def room_for_maps(most: int) -> int:
    """How many files may be held open for maps: ``most``, or a quarter of what the system lets a process open."""
    try:
        import resource
    except ImportError:  # Windows
        return most
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft // 4))


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: make the store again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _mapped(path: str) -> np.ndarray:
    handle = _opened(path)
    try:
        return np.frombuffer(mmap.mmap(handle, 0, access=mmap.ACCESS_READ), np.uint8)
    except ValueError:  # a map cannot be empty
        return np.empty(0, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)


class MappedFile:
    """A file as the bytes (uint8 [n]) of a map, or a part of one; a context manager like :class:`OpenFile`."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def numbers(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """``count`` numbers from byte ``start`` on, as a view; fewer where the file ends before."""
        data = self._data[start : start + count * dtype.itemsize]
        return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)

    def pcm_layout(self) -> PcmLayout:
        """As :func:`pcm_layout`."""
        return pcm_layout(self._data)

    def array(self) -> np.ndarray:
        """As :func:`array_in`."""
        return array_in(self._data)


class OpenFile:
    """A file, opened to read some bytes of it by position. A context manager."""

    def __init__(self, path: str) -> None:
        self._handle = _opened(path)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def _read(self, start: int, count: int) -> np.ndarray:
        out = np.empty(count, np.uint8)
        done = _read_into(self._handle, out, start)
        while 0 < done < count and (got := _read_into(self._handle, out[done:], start + done)):
            done += got
        return out if done == count else out[:done]

    def numbers(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """``count`` numbers from byte ``start`` on; fewer where the file ends before."""
        data = self._read(start, count * dtype.itemsize)
        if len(data) % dtype.itemsize:
            data = data[: len(data) // dtype.itemsize * dtype.itemsize]
        return data.view(dtype)

    def pcm_layout(self) -> PcmLayout:
        """As :func:`pcm_layout`."""
        try:
            return pcm_layout(self._read(0, _HEAD))
        except ValueError:  # a long header, or none
            return pcm_layout(self._read(0, os.fstat(self._handle).st_size))

    def array(self) -> ArrayOnDisk:
        """The array of a .npy file, of which only what is asked for is read; raises ValueError as :func:`array_in`."""
        head = self._read(0, _HEAD).tobytes()
        if (end := header_bytes(head)) > len(head):
            head = self._read(0, end).tobytes()
        header = read_header(head[:end])
        _check_length(header, os.fstat(self._handle).st_size)
        return ArrayOnDisk(self, header)


def _read_into(handle: int, out: np.ndarray, start: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(handle, [out.data], start)
    os.lseek(handle, start, os.SEEK_SET)  # Windows
    data = os.read(handle, len(out))
    out[: len(data)] = np.frombuffer(data, np.uint8)
    return len(data)


class ArrayOnDisk:
    """An array in an open file: its shape, and rows of it by slice."""

    def __init__(self, file: OpenFile, header: ArrayHeader) -> None:
        self.header = header
        self.dtype, self.shape, self._order, self._offset = header
        self.ndim = len(self.shape)
        self._file = file

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, step = rows.indices(len(self))
        if self._order != "C" or step != 1:
            return np.asarray(self)[rows]
        each = math.prod(self.shape[1:])
        count = (last - first) * each
        found = self._file.numbers(self.dtype, self._offset + first * each * self.dtype.itemsize, count)
        if len(found) != count:
            raise ValueError("it ends early")
        return found.reshape(last - first, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self._file.numbers(self.dtype, self._offset, math.prod(self.shape))
        if len(whole) != math.prod(self.shape):
            raise ValueError("it ends early")
        return whole.reshape(self.shape, order=self._order).astype(dtype or self.dtype, copy=False)


def load_array(path: str) -> np.ndarray:
    """The array of a .npy file. Raises :class:`DataError` where it is missing or damaged."""
    with OpenFile(path) as file:
        try:
            return np.asarray(file.array())
        except ValueError as error:
            raise DataError(f"{path} is not a readable array ({error}): delete it and run again") from None


def array_header(path: str) -> ArrayHeader:
    """Type and shape of a .npy file's array; errors as of :func:`load_array`."""
    with OpenFile(path) as file:
        try:
            return file.array().header
        except ValueError as error:
            raise DataError(f"{path} is not a readable array ({error}): delete it and run again") from None


class PcmLayout(NamedTuple):
    """What a WAV file says of itself; its samples are ``frames`` times ``channels`` from byte ``offset`` on."""

    rate_hz: int
    channels: int
    bits: int
    frames: int
    offset: int


_CANONICAL = struct.Struct("<4s4x4s4sIHHI4xHH4sI")  # RIFF header, a format chunk of 16 bytes, the data chunk's header


def pcm_layout(data: np.ndarray) -> PcmLayout:
    """The layout of a PCM WAV file's bytes (uint8 [n]); raises ValueError with what is wrong."""
    if len(data) >= _CANONICAL.size:
        riff, wave, form, size, tag, channels, rate_hz, frame, bits, name, length = _CANONICAL.unpack_from(data.data)
        if (riff, wave, form, size, tag, name) == (b"RIFF", b"WAVE", b"fmt ", 16, 1, b"data") and frame:
            return PcmLayout(rate_hz, channels, bits, length // frame, _CANONICAL.size)
    if bytes(data[:4]) != b"RIFF" or bytes(data[8:12]) != b"WAVE":
        raise ValueError("it does not start with RIFF and WAVE")
    place, found = 12, None
    while place + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data.data, place)
        place += 8
        if name == b"fmt " and place + 16 <= len(data):
            tag, channels, rate_hz, frame, bits = struct.unpack_from("<HHI4xHH", data.data, place)
            if tag != 1 or not frame:
                raise ValueError(f"its samples are of format {tag}, not PCM")
            found = (rate_hz, channels, bits, frame)
        elif name == b"data" and found is not None:
            rate_hz, channels, bits, frame = found
            return PcmLayout(rate_hz, channels, bits, length // frame, place)
        place += length + length % 2
    raise ValueError("it has no format or no data chunk")


def array_in(data: np.ndarray) -> np.ndarray:
    """The array in a .npy file's bytes (uint8 [n]), without a copy; raises ValueError with what is wrong."""
    header = read_header(bytes(data[: header_bytes(bytes(data[:_HEAD]))]))
    _check_length(header, len(data))
    array: np.ndarray = np.ndarray(header.shape, header.dtype, buffer=data, offset=header.offset, order=header.order)
    return array


def _check_length(header: ArrayHeader, size: int) -> None:
    """Before memory is given to what the header says."""
    if header.offset + header.nbytes > size:
        raise ValueError("it ends early")

"""NumPy's files, .npy and .npz, from anybody: what they hold is known, and bounded, before any of it is unpacked.

Nothing is ever unpickled. A .npz is a zip of .npy members; a few of its bytes can say that they unpack to gigabytes, so
the header of every member is held against what it may be first. Whatever is wrong is a ValueError that says it in words
for a line; who reads adds the file's name and the way out.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import one_line

__all__ = ["ArrayHeader", "Npz", "header_bytes", "read_header"]

Array = NDArray[Any]

MAGIC = b"\x93NUMPY"
START = 12  # bytes of a .npy file that say how long its header is
_MOST_HEADER = 10_000  # bytes, as NumPy's own limit
_MOST_DIMENSIONS = 32
_MOST_LIST_BYTES = 4 << 20  # of a zip's list of members: some ten thousands of them
_BLOCK = 1 << 20

# A header is a Python dictionary with three keys, read here as text: nothing parses it as a program.
_PAIR = r"""\s*['"](descr|fortran_order|shape)['"]\s*:\s*('[^']*'|"[^"]*"|True|False|\([\d\sL,]*\))\s*"""
_HEADER = re.compile(rf"\{{{_PAIR},{_PAIR},{_PAIR},?\s*\}}\s*")
_NUMBERS = re.compile(r"[<>|=]?([biufc]\d{1,2}|\?)")


class ArrayHeader(NamedTuple):
    """What a .npy file says of its array; the numbers begin at byte ``offset``."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def header_bytes(start: bytes) -> int:
    """How many bytes the header of a .npy file takes, by the first :data:`START` of them.

    Raises:
        ValueError: it is no .npy file, or the header is longer than any.
    """
    if start[:6] != MAGIC or len(start) < START or start[6] not in (1, 2, 3):
        raise ValueError("it is no .npy file")
    begin = 10 if start[6] == 1 else 12
    length = int.from_bytes(start[8:begin], "little")
    if length > _MOST_HEADER:
        raise ValueError(f"its header is said to take {length} bytes")
    return begin + length


@functools.lru_cache(maxsize=1024)  # arrays of one shape have one header
def read_header(head: bytes) -> ArrayHeader:
    """The header of a .npy file of numbers, from at least as many of its first bytes as :func:`header_bytes` says.

    Raises:
        ValueError: it is damaged, or the array is not of numbers (pickled objects, text, records).
    """
    end = header_bytes(head)
    if len(head) < end:
        raise ValueError("it ends within its header")
    text = head[10 if head[6] == 1 else 12 : end].decode("latin-1")
    match = _HEADER.fullmatch(text.strip())
    found = dict(zip(match.groups()[::2], match.groups()[1::2], strict=True)) if match else {}
    kind, order, sizes = found.get("descr", ""), found.get("fortran_order"), found.get("shape", "")
    if re.search(r"""['"][<>|=]?O\d*['"]""", text):
        raise ValueError("it holds pickled objects")
    if kind[:1] not in ("'", '"') or order not in ("True", "False") or not sizes.startswith("("):
        raise ValueError(f"its header is damaged: {one_line(text, 100)}")
    if not _NUMBERS.fullmatch(kind[1:-1]):
        raise ValueError(f"it holds {one_line(kind[1:-1], 40)} and no numbers")
    try:
        dtype = np.dtype(kind[1:-1])
        shape = tuple(int(size.strip().rstrip("L")) for size in sizes[1:-1].split(",") if size.strip())
    except (TypeError, ValueError):
        raise ValueError(f"its header is damaged: {one_line(text, 100)}") from None
    if len(shape) > _MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**62:
        raise ValueError(f"an array of shape {one_line(list(shape), 60)} fits nowhere")
    return ArrayHeader(dtype, shape, "F" if order == "True" else "C", end)


class Npz:
    """The arrays of a .npz file, by name: all headers are read on opening, numbers when asked for. A context manager.

    Args:
        file: its path, or its bytes.
        most_bytes: what all its members may unpack to, those included that nobody asks for.

    Raises:
        ValueError: it is no .npz of numbers, damaged, encrypted, packed in another way than NumPy packs, or larger.
        OSError: it cannot be read at all.
    """

    headers: dict[str, ArrayHeader]

    def __init__(self, file: str | os.PathLike[str] | bytes, most_bytes: int) -> None:
        self._file: IO[bytes] = io.BytesIO(file) if isinstance(file, bytes) else open(Path(file), "rb")  # noqa: SIM115
        try:
            size = self._file.seek(0, os.SEEK_END)
            if size > most_bytes + (16 << 20):  # what a zip adds to what it holds is far less
                raise ValueError(f"it has {size / 1e6:.0f} MB, more than the {most_bytes / 1e6:.0f} MB that are read")
            try:
                if not zipfile.is_zipfile(self._file):
                    raise ValueError("it is no .npz, or was cut short")
                self._archive = zipfile.ZipFile(_InBlocks(self._file))
                self._members = self._checked(most_bytes)
                self.headers = {name: self._header(info) for name, info in self._members.items()}
            except _DAMAGE as error:
                raise _in_words(error) from None
        except BaseException:
            self._file.close()
            raise

    def _checked(self, most_bytes: int) -> dict[str, zipfile.ZipInfo]:
        """The members by their arrays' names, none of them read yet."""
        found: dict[str, zipfile.ZipInfo] = {}
        infos = self._archive.infolist()
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                raise ValueError(f"its member {one_line(info.filename, 60)} is no array")
            if name in found:
                raise ValueError(f"it holds {one_line(name, 60)} twice")
            # LZMA and bzip2, which NumPy does not write, may ask for any memory of their own
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{one_line(name, 60)} is encrypted, or packed as NumPy never does")
            found[name] = info
        total = sum(info.file_size for info in infos)
        if total > most_bytes:
            raise ValueError(f"it unpacks to more than the {most_bytes / 1e6:.1f} MB it may: to {total / 1e6:.1f} MB")
        return found

    def _header(self, info: zipfile.ZipInfo) -> ArrayHeader:
        with self._archive.open(info) as member:
            start = member.read(START)
            header = read_header(start + member.read(header_bytes(start) - len(start)))
        if header.offset + header.nbytes != info.file_size:
            raise ValueError(f"{one_line(info.filename, 60)} has {info.file_size} bytes, and its header says {header}")
        return header

    def read(self, name: str) -> Array:
        """One array, of the shape and type of its header; raises ValueError where its bytes are damaged."""
        header = self.headers[name]
        try:
            data = np.empty(header.nbytes, np.uint8)
            with self._archive.open(self._members[name]) as member:
                member.read(header.offset)
                for start in range(0, header.nbytes, _BLOCK):
                    want = min(_BLOCK, header.nbytes - start)
                    block = member.read(want)  # the last one compares the checksum
                    if len(block) != want:
                        raise ValueError(f"{one_line(name, 60)} ends early")
                    data[start : start + want] = np.frombuffer(block, np.uint8)
        except _DAMAGE as error:
            raise _in_words(error) from None
        return data.view(header.dtype).reshape(header.shape, order=header.order)

    def __enter__(self) -> Npz:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()
        self._file.close()


class _InBlocks:
    """A file that gives no more at once than the longest list of members, which zipfile reads and parses whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file = file

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(_MOST_LIST_BYTES + 1 if count < 0 else min(count, _MOST_LIST_BYTES + 1))
        if len(data) > _MOST_LIST_BYTES:
            raise ValueError("its list of members is too long")
        return data


# what a damaged zip raises, of the modules that read it
_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,  # NotImplementedError too
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


def _in_words(error: BaseException) -> ValueError:
    if isinstance(error, MemoryError):
        return ValueError("there is not enough memory for it")
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return ValueError(one_line(error, 200) or type(error).__name__)

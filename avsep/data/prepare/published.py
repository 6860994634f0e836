"""Lists that others have published as pickles (.pkl, .npy), JSON or CSV, read without running anything of them.

A pickle is a program. Here it is given nothing that it could call but stand-ins that build plain data, under the names
that NumPy and Python use for arrays, numbers and sets; any other name ends the reading. What would take much more
memory than the file has bytes ends it as well: a few bytes can ask for gigabytes.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from avsep.errors import DataError

__all__ = ["PICKLES", "read_published"]

PICKLES = (".npy", ".pkl", ".pickle")
_MOST_BYTES = 1 << 26
_MOST_VALUES = 1_000_000
_PLAIN = re.compile(r"[<>|=]?[biufSU]\d+")


def read_published(path: str | os.PathLike[str]) -> Any:
    """The plain data in a .pkl, .npy or .json file: containers, strings, numbers; arrays and tuples become lists.

    Raises:
        DataError: it is missing, damaged, of another kind, too large (64 MB), or holds or asks for anything else.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no such file: {file}")
    if file.stat().st_size > _MOST_BYTES:
        raise DataError(f"{file} has {file.stat().st_size / 1e6:.0f} MB: that is no list of videos")
    data = file.read_bytes()
    try:
        if file.suffix.lower() not in PICKLES:
            return json.loads(data.decode("utf-8-sig"))
        if file.suffix.lower() == ".npy":
            return _read_npy(data)
        return _unpickle(data)
    except _RefusedError as error:
        raise DataError(
            f"{file} asks for {error}, which no list of videos needs: nothing of it was run; get it from where it was "
            "published, or give the lists as JSON or CSV"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its bytes ask for
        what = "JSON" if file.suffix.lower() not in PICKLES else file.suffix
        raise DataError(
            f"{file} is not a readable {what} of lists ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:100]}): copy it again, or give JSON or CSV"
        ) from None


def _read_npy(data: bytes) -> Any:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    rest = stream.read()
    if dtype.hasobject:
        return _unpickle(rest)
    if dtype.kind not in "biufSU" or dtype.names or not dtype.itemsize:
        raise _RefusedError(f"an array of {str(dtype)[:40]}")
    if math.prod(max(side, 1) for side in shape) > _MOST_VALUES:
        raise _RefusedError("an array of so many values")
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"{len(rest)} bytes for an array of {list(shape)}")
    return _plain(np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C").tolist())


def _unpickle(data: bytes) -> Any:
    """The plain data of a pickle, after a look at what it asks for."""
    for opcode, value, _ in pickletools.genops(data):
        # places in the memo are numbered from 0 on; the unpickler makes room for as many as the highest says
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(value or 0) > len(data):
            raise _RefusedError(f"{value} values")
    return _plain(_Reader(io.BytesIO(data)).load())


class _RefusedError(Exception):
    """What a pickle asked for and may not have."""


class _Reader(pickle.Unpickler):
    """Knows stand-ins only; no name is ever looked up in a module."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._left = [_MOST_VALUES]  # shared by all stand-ins: what they may copy together

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return _StandIn(name, self._left)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return _StandIn(name, self._left)
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return _StandIn(name, self._left)
        if (module, name) == ("numpy._core.numeric", "_frombuffer"):
            return _StandIn(name, self._left)
        if (module, name) in (("collections", "OrderedDict"), ("_codecs", "encode")):
            return _StandIn(name, self._left)
        raise _RefusedError(f"{module}.{name}"[:80])

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("an object outside of it")


class _StandIn:
    """What a pickle may call. It has no attributes that a pickle could set."""

    __slots__ = ("_left", "_name")

    def __init__(self, name: str, left: list[int]) -> None:
        self._name = name
        self._left = left

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"a change of {self._name}")

    def __call__(self, *values: Any) -> Any:
        for value in values:
            _spend(self._left, value)
        if self._name == "_reconstruct":
            return _Array(self._left)
        if self._name == "dtype":
            return _DType(values[0])
        if self._name == "_frombuffer":
            array = _Array(self._left)
            array.values = _numbers(values[1], values[0])
            return array
        if self._name == "encode" and values[1:] == ("latin1",):  # how old protocols write bytes
            return _text(values[0]).encode("latin1")
        if self._name == "scalar":
            return _numbers(values[0], values[1])[0]
        if self._name in ("set", "frozenset"):
            return list(values[0]) if values else []
        if self._name == "OrderedDict" and not values:
            return {}
        raise _RefusedError(f"{self._name}{len(values)}")


class _DType:
    __slots__ = ("kind", "order")

    def __init__(self, kind: Any) -> None:
        self.kind = _text(kind)
        self.order = ""

    def __setstate__(self, state: Any) -> None:
        order = _text(state[1])
        self.order = order if order in ("<", ">", "|", "=") else ""


class _Array:
    __slots__ = ("_left", "values")

    def __init__(self, left: list[int]) -> None:
        self.values: Any = None
        self._left = left

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, data = state
        _spend(self._left, data)
        if isinstance(data, bytes):
            self.values = _numbers(dtype, data)
        else:
            self.values = list(data)
        if shape == ():
            self.values = self.values[0]


def _text(value: Any) -> str:
    """``str`` of anything else would write it out, however often it holds the same list."""
    if not isinstance(value, str):
        raise _RefusedError(f"a {type(value).__name__} for a name")
    return value


def _spend(left: list[int], value: Any) -> None:
    """Count what is about to be copied."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        left[0] -= len(value)
    elif isinstance(value, (str, bytes, bytearray)):
        left[0] -= len(value) // 16
    if left[0] < 0:
        raise _RefusedError("copies without end")


def _numbers(dtype: Any, data: Any) -> list[Any]:
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)):
        raise _RefusedError(f"an array of {type(data).__name__}")
    text = dtype.order + dtype.kind
    if not _PLAIN.fullmatch(text):
        raise _RefusedError(f"an array of {text[:40]}")
    return list(np.frombuffer(data, np.dtype(text)).tolist())


def _plain(value: Any, left: list[int] | None = None, depth: int = 0) -> Any:
    """Containers of strings and numbers, or a refusal; ``left``: how many more there may be."""
    left = [_MOST_VALUES] if left is None else left
    left[0] -= 1 + (len(value) // 16 if isinstance(value, bytes) else 0)  # the same bytes are decoded each time
    if depth > 20 or left[0] < 0:  # lists that hold each other
        raise _RefusedError("lists in lists without end")
    if isinstance(value, _Array):
        return _plain(value.values, left, depth + 1)
    if isinstance(value, dict):
        return {_key(k): _plain(v, left, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v, left, depth + 1) for v in value]
    if isinstance(value, int) and value.bit_length() > 64:
        raise _RefusedError(f"a number of {value.bit_length()} bits")
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8")
    raise _RefusedError(f"an object ({type(value).__name__})")


def _key(key: Any) -> str | int:
    if isinstance(key, str) or (isinstance(key, int) and key.bit_length() <= 64):
        return key
    raise _RefusedError(f"keys of kind {type(key).__name__}")

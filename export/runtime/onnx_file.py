"""A graph's file, looked through before ONNX Runtime or TensorRT is given it. The standard library alone.

An ONNX file may say that its weights lie in other files, which both read from the current folder or beside the graph:
files that no hash of a bundle covers. Such a graph is refused, wherever in it the word stands.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ExportError, one_line

__all__ = ["check_onnx"]

# The fields of ONNX's messages that hold other messages, down to tensors (onnx/onnx.proto; the numbers never change).
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_GRAPH, _OPSETS = 7, 8  # of the model
_OPERATOR = 4  # of a node: its type
_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14  # of a tensor
_MOST_DEPTH = 100  # as protobuf's own limit

_Data = bytes | mmap.mmap


def check_onnx(model: bytes | str | os.PathLike[str], where: str = "") -> None:
    """Raise where a graph is no whole ONNX model, or takes anything from another file.

    Args:
        model: its bytes, or its path.
        where: names it in errors; its path when empty.

    Raises:
        ExportError: it is damaged, of ONNX Runtime's own format, or has a tensor of external data or a node that loads
            a compiled graph (``EPContext``), in its graph, in a graph within it, in a function or in a sparse tensor.
    """
    if isinstance(model, bytes):
        _check(model, where or "the graph")
        return
    where = where or str(model)
    try:
        with open(Path(model), "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                _check(b"", where)
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check(data, where)
    except OSError as error:
        raise ExportError(f"{where} cannot be read ({error.strerror}): copy the bundle again") from None


def _check(data: _Data, where: str) -> None:
    try:
        if data[4:8] == b"ORTM":
            raise ValueError("it is in ONNX Runtime's own format")
        top = {number for number, *_ in _fields(data, 0, len(data))}
        if not {_GRAPH, _OPSETS} <= top:
            raise ValueError("it holds no graph")
        foreign = _outside(data)
    except ValueError as error:
        raise ExportError(
            f"{where} is not an ONNX graph ({one_line(error)}): copy or export the bundle again"
        ) from None
    if foreign:
        raise ExportError(
            f"{where} takes {foreign} from another file, which no bundle may: export it again, with all in one file"
        )


def _outside(data: _Data) -> str:
    """What the model takes from outside, in words; empty where it takes nothing."""
    left = [("model", 0, len(data), 0)]
    while left:
        kind, start, end, depth = left.pop()
        if depth > _MOST_DEPTH:
            raise ValueError("it is nested too deeply")
        inner = _MESSAGES[kind]
        external, name = False, ""
        for number, wire, first, last in _fields(data, start, end):
            if wire == 2 and number in inner:
                left.append((inner[number], first, last, depth + 1))
            elif kind == "tensor":
                # the location is a number, 0 where the data is in the tensor; a list of where to find it is enough
                external |= number == _EXTERNAL_DATA or (number == _DATA_LOCATION and (wire != 0 or first != 0))
                if number == _NAME and wire == 2:
                    name = data[first:last].decode("utf-8", "replace")
            elif kind == "node" and number == _OPERATOR and wire == 2 and data[first:last] == b"EPContext":
                return "a compiled graph (EPContext)"
        if external:
            return f"the tensor '{one_line(name, 80)}'" if name else "a tensor"
    return ""


def _fields(data: _Data, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a protobuf message: number, wire type, and of a number its value, of anything else its bounds.

    Raises:
        ValueError: the bytes are no whole message.
    """
    place = start
    while place < end:
        key, place = _number(data, place, end)
        number, wire = key >> 3, key & 7
        if not number or key >= 2**32:
            raise ValueError("it is no protobuf message")
        if wire == 0:
            value, place = _number(data, place, end)
            yield number, wire, value, place
            continue
        if wire == 2:
            size, place = _number(data, place, end)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:  # groups, which ONNX has none of
            raise ValueError("it is no protobuf message")
        if size > end - place:
            raise ValueError("it is truncated")
        yield number, wire, place, place + size
        place += size


def _number(data: _Data, place: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while place < end and shift < 70:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("it ends within a number" if shift < 70 else "it is no protobuf message")

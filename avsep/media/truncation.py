"""Whether a file is whole, by what its own outer structure says; decoders read a part in silence."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["missing_part"]

_OGG_TAIL = 1 << 17  # two of the largest pages
_MOST_PARTS = 1_000_000  # hours of a live stream; a file of nothing but headers would take as long to walk through


def missing_part(path: str | os.PathLike[str]) -> str:
    """What a file lacks of what it states, such as "it states 900 bytes and has 600"; empty where nothing is known.

    Knows Matroska and WebM (the size of the segment, or in a live stream those of its parts), MP4 and MOV (boxes), AVI,
    and Ogg (its last page). Of MPEG streams no part can be told from the whole.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(12)
        find: Callable[[BinaryIO, int], int]
        if head[:4] == b"\x1a\x45\xdf\xa3":
            find = _end_of_matroska
        elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            find = _end_of_mp4
        elif head[:4] == b"OggS":
            find = _end_of_ogg
        elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            find = _end_of_avi
        else:
            return ""
        stated = find(file, size)
    return f"it states {stated} bytes and has {size}" if stated > size else ""


def _end_of_matroska(file: BinaryIO, size: int) -> int:
    place = 0
    for _ in range(_MOST_PARTS):
        file.seek(place)
        head = file.read(12)
        if not head:
            break
        id_length = 9 - head[0].bit_length()
        if id_length > 4 or len(head) <= id_length:
            break
        length = 9 - head[id_length].bit_length()  # bytes of the size, whose first bits tell their number
        if length > 8 or len(head) < id_length + length:
            break
        most = (1 << 7 * length) - 1
        value = int.from_bytes(head[id_length : id_length + length], "big") & most
        place += id_length + length
        if value != most:  # else unknown, in a live stream: its parts follow
            place += value
            if place > size:
                return place
    return 0


def _end_of_mp4(file: BinaryIO, size: int) -> int:
    place = 0
    for _ in range(_MOST_PARTS):
        if place + 8 > size:
            return 0
        file.seek(place)
        head = file.read(16)
        length, name = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack(">Q", head[8:])
        if length < 8:  # 0: up to the end
            return 0
        place += length
        if place > size:
            return place if name in (b"mdat", b"moov", b"moof") else 0
    return 0


def _end_of_avi(file: BinaryIO, size: int) -> int:
    file.seek(4)
    stated: int = struct.unpack("<I", file.read(4))[0]
    return 8 + stated if stated < 0x7FFFF000 else 0


def _end_of_ogg(file: BinaryIO, size: int) -> int:
    begin = max(size - _OGG_TAIL, 0)
    file.seek(begin)
    tail = file.read()
    at = tail.rfind(b"OggS\0")
    if at < 0:
        return 0
    if len(tail) < at + 27 or len(tail) < at + 27 + tail[at + 26]:
        return size + 1  # within the header of a page
    segments = tail[at + 27 : at + 27 + tail[at + 26]]
    return begin + at + 27 + len(segments) + sum(segments)

"""WAV files in and out with NumPy alone, for devices without libsndfile. (The library's ``wave`` reads no floats.)"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError, ConfigError
from .files import atomic_path

__all__ = ["FORMATS", "read_wav", "write_wav"]

Audio = NDArray[np.float32]

FORMATS = ("PCM_16", "FLOAT")
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
# Chunk sizes that a recorder writes when it cannot know the length (it writes to a pipe).
_UNKNOWN_SIZE = 0x7FFFF000


def read_wav(path: str | os.PathLike[str]) -> tuple[Audio, int]:
    """Read a WAV file of 8, 16, 24 or 32-bit integers or 32 or 64-bit floats: float32 [C, L] and its rate in Hz.

    Raises:
        AudioError: it is missing, no such file, truncated, empty, or holds NaN.
    """
    file = Path(path)
    if not file.is_file():
        raise AudioError(f"no such audio file: {file}")
    data = file.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise AudioError(f"{file} is not a WAV file: convert it first (ffmpeg -i {file.name} OUT.wav)")
    form: tuple[int, int, int, int] | None = None
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        body = place + 8
        if name == b"fmt ":
            if size < 16 or body + size > len(data):
                raise AudioError(f"{file} is damaged: its format is cut short")
            kind, channels, rate_hz, _, _, bits = struct.unpack_from("<HHIIHH", data, body)
            if kind == _EXTENSIBLE and size >= 26:
                kind = struct.unpack_from("<H", data, body + 24)[0]
            form = kind, channels, rate_hz, bits
        elif name == b"data":
            if form is None:
                raise AudioError(f"{file} is damaged: its samples stand before their format")
            there = len(data) - body
            if size > there and size < _UNKNOWN_SIZE:
                raise AudioError(
                    f"{file} is truncated: its header promises {size} bytes and {there} are there; copy it again"
                )
            return _samples(memoryview(data)[body : body + min(size, there)], form, file), form[2]
        place = body + size + size % 2
    raise AudioError(f"{file} holds no samples: it is empty or truncated")


def _samples(data: memoryview, form: tuple[int, int, int, int], file: Path) -> Audio:
    kind, channels, rate_hz, bits = form
    known = (kind == _PCM and bits in (8, 16, 24, 32)) or (kind == _FLOAT and bits in (32, 64))
    if not known or channels < 1 or rate_hz < 1:
        raise AudioError(
            f"{file} has samples of WAV format {kind} with {bits} bits, {channels} channels and {rate_hz} Hz: "
            f"convert it first (ffmpeg -i {file.name} -c:a pcm_s16le OUT.wav)"
        )
    width = bits // 8 * channels
    data = data[: len(data) // width * width]
    if not data:
        raise AudioError(f"{file} holds no samples: it is empty or truncated")
    if kind == _FLOAT:
        flat: NDArray[Any] = np.frombuffer(data, dtype=f"<f{bits // 8}")
    elif bits == 8:
        flat = (np.frombuffer(data, dtype=np.uint8).astype(np.float32) - 128) / 128
    elif bits == 24:
        parts = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3)
        whole = np.zeros((len(parts), 4), dtype=np.uint8)
        whole[:, 1:] = parts  # the low byte is zero: 24 bits at the top of 32
        flat = whole.view("<i4")[:, 0] / 2.0**31
    else:
        flat = np.frombuffer(data, dtype=f"<i{bits // 8}") / 2.0 ** (bits - 1)
    samples = np.ascontiguousarray(flat.astype(np.float32).reshape(-1, channels).T)
    if not np.isfinite(samples).all():
        count = int(samples.size - np.isfinite(samples).sum())
        raise AudioError(f"{file} has {count} NaN or infinite samples: write it again without them")
    return samples


def write_wav(path: str | os.PathLike[str], audio: Audio, rate_hz: int, subtype: str = "PCM_16") -> int:
    """Write mono samples [L] whole or not at all. Returns how many were beyond full scale and are clipped (PCM_16)."""
    if subtype not in FORMATS:
        raise ConfigError(f"unknown sample format '{subtype}': one of {', '.join(FORMATS)}")
    if audio.ndim != 1 or not audio.size or not np.isfinite(audio).all():
        raise AudioError(f"cannot write {path}: audio must be finite samples [L], got shape {list(audio.shape)}")
    clipped = 0
    if subtype == "PCM_16":
        clipped = int((np.abs(audio) > 1).sum())
        data = np.clip(np.round(audio.astype(np.float64) * 2**15), -(2**15), 2**15 - 1).astype("<i2").tobytes()
        header = struct.pack("<HHIIHH", _PCM, 1, rate_hz, 2 * rate_hz, 2, 16)
    else:
        data = audio.astype("<f4").tobytes()
        header = struct.pack("<HHIIHH", _FLOAT, 1, rate_hz, 4 * rate_hz, 4, 32)
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(data)) + data
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return clipped

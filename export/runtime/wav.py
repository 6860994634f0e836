"""WAV and RF64 files in and out with NumPy alone, for devices without libsndfile. (The library's ``wave`` reads no
floats.) What every reader of sound asks of rates and samples stands here too."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError, ConfigError
from .files import atomic_path

__all__ = [
    "FORMATS",
    "HIGHEST_RATE_HZ",
    "LOWEST_RATE_HZ",
    "RIFF_LIMIT",
    "WavSamples",
    "check_rate",
    "check_samples",
    "find_samples",
    "is_unknown_size",
    "is_wav",
    "read_wav",
    "wav_bytes",
    "write_wav",
]

Audio = NDArray[np.float32]

FORMATS = ("PCM_16", "FLOAT")
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1000, 768_000
# The bytes that a RIFF's 32-bit sizes can count; what is longer is written as RF64 (EBU Tech 3306).
RIFF_LIMIT = 0xFFFFFFFF
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_IN_DS64 = 0xFFFFFFFF  # an RF64's 32-bit sizes: the true ones stand in its chunk ds64
# Samples beyond this are no audio in +-1, but integers that somebody made floats of, or damage.
_LARGEST_SAMPLE = 100.0
# Chunks that stand behind the samples; others are known by their filling the rest of the file exactly.
_BEHIND = frozenset(
    b"LIST,id3 ,ID3 ,bext,cue ,smpl,inst,fact,PEAK,JUNK,junk,PAD ,FLLR,iXML,axml,chna,_PMX,cart,afsp,acid,plst,umid,"
    b"DISP".split(b",")
)
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # appended bare, as to an MP3


@dataclass(frozen=True)
class WavSamples:
    """Where a WAV file has its samples.

    ``kind`` 1 integer, 3 float, others are compressed; ``bits`` of a sample. ``start`` and ``size`` in bytes: of what
    is there. ``stated``: the size by the header, which may be smaller.
    """

    kind: int
    channels: int
    rate_hz: int
    bits: int
    start: int
    size: int
    stated: int

    @property
    def is_plain(self) -> bool:
        """Whether :func:`read_wav` reads them: integers of 8, 16, 24 or 32 bits, floats of 32 or 64."""
        return (self.kind == _PCM and self.bits in (8, 16, 24, 32)) or (self.kind == _FLOAT and self.bits in (32, 64))


def check_rate(path: str | os.PathLike[str], rate_hz: int) -> None:
    """Raise :class:`AudioError` of a rate that no recording has; resampling from it would fill the memory."""
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise AudioError(
            f"{path} states a sample rate of {rate_hz} Hz, and recordings have {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} "
            "Hz: its header is damaged, or it is no sound"
        )


def check_samples(name: str | os.PathLike[str], samples: Audio) -> None:
    """Raise :class:`AudioError` of samples that are NaN, infinite or far beyond full scale.

    ``name``: what the message calls them, such as the file's path.
    """
    peak = float(max(samples.max(initial=0), -samples.min(initial=0)))  # NaN where a sample is
    if not np.isfinite(peak):
        count = int(samples.size - np.isfinite(samples).sum())
        raise AudioError(f"{name} has {count} NaN or infinite samples: write it again without them")
    if peak > _LARGEST_SAMPLE:
        raise AudioError(f"{name} reaches {peak:.6g}, and full scale is 1: divide 16-bit samples by 32768")


def is_wav(head: bytes) -> bool:
    """Whether a file that begins with these 12 bytes is WAV or RF64 (also called BW64)."""
    return head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE"


def is_unknown_size(size: int) -> bool:
    """Whether a 32-bit size is one that a recorder writes when it cannot know the length (it writes to a pipe)."""
    return 0x7FFFF000 <= size <= 0x80000000 or 0xFFFFFF00 <= size <= 0xFFFFFFFF


def find_samples(path: str | os.PathLike[str]) -> WavSamples:
    """Look where a WAV or RF64 file has its samples.

    A header may state less than there is: it wraps where a file without 64-bit sizes is over 4 GB, and is stale where
    the recorder stopped early. What follows then counts as samples, unless it can be other chunks.

    Raises:
        AudioError: it is missing, no such file, damaged or truncated.
    """
    file = Path(path)
    if not file.is_file():
        raise AudioError(f"no such audio file: {file}")
    end = file.stat().st_size
    with open(file, "rb") as opened:
        if not is_wav(opened.read(12)):
            raise AudioError(f"{file} is not a WAV file: convert it first (ffmpeg -i {file.name} OUT.wav)")
        form: tuple[int, int, int, int] | None = None
        size_64: int | None = None
        place = 12
        while place + 8 <= end:
            opened.seek(place)
            name, size = struct.unpack("<4sI", opened.read(8))
            body = place + 8
            if name == b"ds64" and size >= 16:
                _, size_64 = _unpack("<QQ", opened, file)
            elif name == b"fmt ":
                if size < 16 or body + size > end:
                    raise AudioError(f"{file} is damaged: its format is cut short")
                kind, channels, rate_hz, _, _, bits = _unpack("<HHIIHH", opened, file)
                if kind == _EXTENSIBLE and size >= 26:
                    opened.seek(body + 24)
                    (kind,) = _unpack("<H", opened, file)
                form = kind, channels, rate_hz, bits
            elif name == b"data":
                if form is None:
                    raise AudioError(f"{file} is damaged: its samples stand before their format")
                in_ds64 = size == _IN_DS64 and size_64 is not None
                stated = size_64 if in_ds64 and size_64 is not None else size
                unknown = stated >= 2**62 if in_ds64 else is_unknown_size(stated)
                there = _size_there(opened, body, end, stated, unknown, file)
                return WavSamples(*form, start=body, size=there, stated=stated)
            place = body + size + size % 2
    raise AudioError(f"{file} holds no samples: it is empty or truncated")


def _unpack(form: str, file: BinaryIO, path: Path) -> tuple[int, ...]:
    data = file.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
        raise AudioError(f"{path} is damaged: its header is cut short")
    return struct.unpack(form, data)


def _size_there(file: BinaryIO, body: int, end: int, stated: int, unknown: bool, path: Path) -> int:
    there = end - body
    if stated > there and not unknown:
        raise AudioError(
            f"{path} is truncated: its header promises {stated} bytes and {there} are there; copy it again"
        )
    ends = {body + stated, body + stated + stated % 2}  # not every writer pads an odd size
    return stated if not unknown and any(_is_other(file, place, end) for place in ends) else there


def _is_other(file: BinaryIO, place: int, end: int) -> bool:
    """Whether what follows the samples is nothing, other chunks or a tag."""
    file.seek(min(place, end))
    head = file.read(11)
    if len(head) < 8 or head[:4] in _BEHIND or any(head.startswith(tag) for tag in _TAGS):
        return True
    for _ in range(1000):
        file.seek(place)
        name, size = struct.unpack("<4sI", file.read(8))
        if not all(32 <= letter < 127 for letter in name):
            return False
        place += 8 + size + size % 2
        if place + 8 > end:
            return place <= end + 1  # the last one may lack its padding
    return False


def read_wav(path: str | os.PathLike[str]) -> tuple[Audio, int]:
    """Read a WAV or RF64 file of 8, 16, 24 or 32-bit integers or 32 or 64-bit floats: float32 [C, L], its rate in Hz.

    Raises:
        AudioError: it is missing, no such file, truncated or empty, its rate is none that recordings have, or its
            samples are NaN, infinite or far beyond full scale.
    """
    file = Path(path)
    found = find_samples(file)
    if not found.is_plain or found.channels < 1:
        raise AudioError(
            f"{file} has samples of WAV format {found.kind} with {found.bits} bits, {found.channels} channels and "
            f"{found.rate_hz} Hz: convert it first (ffmpeg -i {file.name} -c:a pcm_s16le OUT.wav)"
        )
    check_rate(file, found.rate_hz)
    width = found.bits // 8 * found.channels
    with open(file, "rb") as opened:
        opened.seek(found.start)
        data = opened.read(found.size // width * width)
    if len(data) < width:
        raise AudioError(f"{file} holds no samples: it is empty or truncated")
    return _samples(memoryview(data)[: len(data) // width * width], found, file), found.rate_hz


def _samples(data: memoryview, found: WavSamples, file: Path) -> Audio:
    bits = found.bits
    if found.kind == _FLOAT:
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
    samples = np.ascontiguousarray(flat.astype(np.float32).reshape(-1, found.channels).T)
    check_samples(file, samples)
    return samples


def write_wav(path: str | os.PathLike[str], audio: Audio, rate_hz: int, subtype: str = "PCM_16") -> int:
    """Write samples [L] or [C, L] whole or not at all; what WAV cannot count (4 GB) as RF64.

    Returns how many samples were beyond full scale and are clipped (PCM_16).
    """
    if subtype not in FORMATS:
        raise ConfigError(f"unknown sample format '{subtype}': one of {', '.join(FORMATS)}")
    if audio.ndim not in (1, 2) or not audio.size or not np.isfinite(audio).all():
        raise AudioError(
            f"cannot write {path}: audio must be finite samples [L] or [channels, L], got shape {list(audio.shape)}"
        )
    start, data, clipped = _encoded(audio, rate_hz, subtype)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(start)
        file.write(data)
    return clipped


def wav_bytes(audio: Audio, rate_hz: int) -> bytes:
    """What :func:`write_wav` writes of [L] or [C, L] in 16 bits."""
    start, data, _ = _encoded(audio, rate_hz, "PCM_16")
    return start + data


def _encoded(audio: Audio, rate_hz: int, subtype: str) -> tuple[bytes, bytes, int]:
    """The header, the samples, and how many of them are clipped."""
    channels = audio.shape[0] if audio.ndim == 2 else 1
    interleaved = np.ascontiguousarray(audio.T)  # [L, C]
    clipped = 0
    if subtype == "PCM_16":
        clipped = int((np.abs(audio) > 1).sum())
        data = np.clip(np.round(interleaved.astype(np.float64) * 2**15), -(2**15), 2**15 - 1).astype("<i2").tobytes()
        kind, width = _PCM, 2
    else:
        data = interleaved.astype("<f4").tobytes()
        kind, width = _FLOAT, 4
    frame = width * channels
    header = struct.pack("<HHIIHH", kind, channels, rate_hz, frame * rate_hz, frame, 8 * width)
    head = b"fmt " + struct.pack("<I", len(header)) + header + b"data"
    size = 4 + len(head) + 4 + len(data)
    if size <= RIFF_LIMIT:
        start = b"RIFF" + struct.pack("<I", size) + b"WAVE" + head + struct.pack("<I", len(data))
    else:
        sizes = struct.pack("<IQQQI", 28, size + 36, len(data), audio.shape[-1], 0)
        start = b"RF64" + struct.pack("<I", _IN_DS64) + b"WAVE" + b"ds64" + sizes + head + struct.pack("<I", _IN_DS64)
    return start, data, clipped

"""Audio files in and out, and resampling.

Formats are libsndfile's (WAV, FLAC, OGG, MP3, AIFF and more; not MP4). A file that cannot be used ends in one
:class:`~avsep.errors.AudioError`; what is written is whole or absent.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import AudioError, ConfigError
from avsep.files import atomic_path

__all__ = ["SUBTYPES", "level_db", "read_audio", "resample", "to_mono", "write_audio"]

Audio = NDArray[np.float32]

# libsndfile's names of the sample formats write_audio offers, and the largest value each can hold
SUBTYPES = {"PCM_16": 1 - 2.0**-15, "PCM_24": 1 - 2.0**-23, "FLOAT": float("inf")}

# Chunk sizes that a recorder writes when it cannot know the length (it writes to a pipe); not a sign of truncation.
_UNKNOWN_SIZE = 0x7FFFF000


def read_audio(path: str | os.PathLike[str]) -> tuple[Audio, int]:
    """Read a whole file as float32 [C, L] in +-1 (float files may exceed it) with its rate in Hz.

    Raises:
        AudioError: the file is missing, not audio, corrupt, truncated, has no samples, or has NaN or infinite ones.
    """
    import soundfile

    file = Path(path)
    if not file.exists():
        raise AudioError(f"no such audio file: {file}")
    if not file.is_file():
        raise AudioError(f"{file} is not a file: give an audio file (WAV, FLAC, OGG, MP3)")
    if file.stat().st_size == 0:
        raise AudioError(f"{file} is empty (0 bytes): record or copy it again")
    try:
        with soundfile.SoundFile(file) as source:
            rate_hz, stated, log, format_name = source.samplerate, source.frames, source.extra_info, source.format
            samples: NDArray[Any] = source.read(dtype="float32", always_2d=True)  # [L, C]
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise AudioError(
            f"{file} cannot be read as audio ({reason}): it is damaged, truncated or not WAV, FLAC, OGG or MP3"
        ) from None
    if samples.shape[0] and (missing := _missing(log, format_name, stated, samples.shape[0])):
        raise AudioError(f"{file} is truncated: {missing}; copy it again")
    if samples.shape[0] == 0:
        raise AudioError(f"{file} holds no samples: it is empty or truncated")
    if not np.isfinite(samples).all():
        count = int(np.size(samples) - np.isfinite(samples).sum())
        raise AudioError(f"{file} has {count} NaN or infinite samples: write it again without them")
    return np.ascontiguousarray(samples.T), rate_hz


def _missing(log: str, format_name: str, stated: int, read: int) -> str:
    """What a file lacks of what its header promises, or nothing. libsndfile itself reads such a file in silence."""
    for promised, found in re.findall(r"^\s*(?:data|SSND|riff)\s*:\s*(\d+)\s+\(should be (\d+)\)", log, re.MULTILINE):
        if int(found) < int(promised) < _UNKNOWN_SIZE:
            return f"its header promises {promised} bytes and {found} are there"
    # a compressed file's length is an estimate where it has no index
    if stated - read > (stated // 50 if format_name == "MP3" else 0):
        return f"its header promises {stated} samples and {read} can be read"
    return ""


def to_mono(audio: Audio) -> Audio:
    """The mean of the channels: [C, L] to [L]."""
    if audio.ndim != 2:
        raise AudioError(f"audio must be [channels, samples], got shape {list(audio.shape)}")
    mono: Audio = audio[0].copy() if audio.shape[0] == 1 else audio.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mono


def resample(audio: Audio, from_hz: int, to_hz: int) -> Audio:
    """Resample [L] or [C, L] (soxr, high quality: linear phase, 20 bits). The length becomes round(L * to / from)."""
    if from_hz <= 0 or to_hz <= 0:
        raise AudioError(f"sample rates must be positive, got {from_hz} and {to_hz} Hz")
    if from_hz == to_hz:
        return audio
    import soxr

    length = max(round(audio.shape[-1] * to_hz / from_hz), 1)
    converted = soxr.resample(np.ascontiguousarray(audio.T), from_hz, to_hz, quality="HQ").T
    result = np.zeros((*audio.shape[:-1], length), dtype=np.float32)
    shared = min(length, converted.shape[-1])  # soxr's own length may differ by one sample
    result[..., :shared] = converted[..., :shared]
    return result


def write_audio(path: str | os.PathLike[str], audio: Audio, rate_hz: int, subtype: str = "PCM_16") -> int:
    """Write [L] or [C, L] atomically; the suffix chooses the format.

    Integer formats hold +-1: what is beyond is clipped, never wrapped and never scaled, since scaled files would no
    longer add up to their mixture. ``subtype="FLOAT"`` keeps every value.

    Returns:
        The number of samples that were clipped.

    Raises:
        AudioError: the audio is empty, not finite or of a wrong shape, or the disk is full.
        ConfigError: unknown subtype, or one that the suffix's format cannot hold.
    """
    import soundfile

    file = Path(path)
    if subtype not in SUBTYPES:
        raise ConfigError(f"unknown sample format '{subtype}': one of {', '.join(SUBTYPES)}")
    format_name = file.suffix.lstrip(".").upper()
    if format_name not in soundfile.available_formats() or not soundfile.check_format(format_name, subtype):
        raise ConfigError(f"cannot write {file} as {subtype}: use the suffix .wav (or .flac with PCM)")
    audio = np.asarray(audio, dtype=np.float32)
    if audio.ndim not in (1, 2) or audio.size == 0:
        raise AudioError(
            f"cannot write {file}: audio must be [L] or [C, L] with samples, got shape {list(audio.shape)}"
        )
    if not np.isfinite(audio).all():
        raise AudioError(f"cannot write {file}: the audio has NaN or infinite samples")
    top = np.float32(SUBTYPES[subtype])
    clipped = 0
    if np.isfinite(top):
        clipped = int((np.abs(audio) > 1).sum())
        audio = np.clip(audio, np.float32(-1), top)
    with atomic_path(file) as temporary:
        try:
            soundfile.write(temporary, audio.T, rate_hz, format=format_name, subtype=subtype)
        except soundfile.LibsndfileError as error:  # it keeps the system's reason to itself
            raise AudioError(
                f"cannot write {file} ({error.error_string.rstrip('.')}): if no space is left, free some and run again"
            ) from None
    return clipped


def level_db(audio: Audio) -> float:
    """Root-mean-square level in dB relative to full scale; -inf for silence."""
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    return 10 * float(np.log10(power)) if power > 0 else float("-inf")

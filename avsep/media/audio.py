"""Audio files in and out, and resampling.

Formats are those of libsndfile that tell whether a file is whole (WAV, RF64, W64, FLAC, OGG, MP3, AIFF, AU, CAF; not
MP4). A file that cannot be used ends in one :class:`~avsep.errors.AudioError`; what is written is whole or absent.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import AudioError, ConfigError
from avsep.export.runtime import wav
from avsep.files import atomic_path
from avsep.media.truncation import missing_part

__all__ = ["SUBTYPES", "level_db", "read_audio", "resample", "to_mono", "write_audio"]

Audio = NDArray[np.float32]

# libsndfile's names of the sample formats write_audio offers, and the largest value each can hold
SUBTYPES = {"PCM_16": 1 - 2.0**-15, "PCM_24": 1 - 2.0**-23, "FLOAT": float("inf")}
_SAMPLE_BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}

# What is read. libsndfile knows more, of which many do not say how long they are: a part would pass as the whole.
_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"}
# Those whose sizes have 32 bits and that have no larger form; WAV has RF64.
_SMALL_FORMATS = {"AIFF", "AU", "WAVEX"}
_BLOCK = 1 << 20  # frames read at once: memory is taken for those that are there, not for those that a header states


def read_audio(path: str | os.PathLike[str]) -> tuple[Audio, int]:
    """Read a whole file as float32 [C, L] in +-1 (float files may exceed it) with its rate in Hz.

    Of a WAV file whose header states less than there is, all is read.

    Raises:
        AudioError: the file is missing, not audio, corrupt, truncated, has no samples, or has NaN or infinite ones or
            some far beyond full scale; or its rate is none that recordings have.
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
        with soundfile.SoundFile(file.absolute()) as source:  # absolute: a file named - is no standard input
            rate_hz, stated, log, format_name = source.samplerate, source.frames, source.extra_info, source.format
            wav.check_rate(file, rate_hz)
            if format_name not in _FORMATS:
                raise AudioError(
                    f"{file} is of the format {format_name}, of which a part can pass for the whole: convert it first "
                    f"(ffmpeg -i {file.name} OUT.wav)"
                )
            if stated >= 2**62:  # a FLAC file that was written to a pipe; libsndfile cannot read it
                raise AudioError(f"{file} does not state its length: write it again (ffmpeg -i {file.name} OUT.wav)")
            if _states_less(file):
                return wav.read_wav(file)
            blocks: list[NDArray[Any]] = []
            while not blocks or len(blocks[-1]) == _BLOCK:
                blocks.append(source.read(_BLOCK, dtype="float32", always_2d=True))  # [L, C]
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise AudioError(
            f"{file} cannot be read as audio ({reason}): it is damaged, truncated or not WAV, FLAC, OGG or MP3"
        ) from None
    samples = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    missing = missing_part(file) or _missing(log, format_name, stated, samples.shape[0])
    if samples.shape[0] and missing:
        raise AudioError(f"{file} is truncated: {missing}; copy it again")
    if samples.shape[0] == 0:
        raise AudioError(f"{file} holds no samples: it is empty or truncated")
    wav.check_samples(file, samples)
    return np.ascontiguousarray(samples.T), rate_hz


def _states_less(file: Path) -> bool:
    """Whether a WAV file has more samples than its header states, which libsndfile would leave out.

    Raises:
        AudioError: it is truncated, or has more, but in an encoding that only libsndfile reads.
    """
    with open(file, "rb") as opened:
        if not wav.is_wav(opened.read(12)):
            return False
    found = wav.find_samples(file)
    if found.size <= found.stated:
        return False
    if not found.is_plain:
        raise AudioError(
            f"{file} has {found.size} bytes of samples, and its header states {found.stated}: decode it anew "
            f"(ffmpeg -ignore_length 1 -i {file.name} OUT.wav)"
        )
    return True


def _missing(log: str, format_name: str, stated: int, read: int) -> str:
    """What a file lacks of what its header promises, or nothing. libsndfile itself reads such a file in silence."""
    sizes = r"^\s*(?:data|SSND|riff|Data Size)\s*:\s*(\d+)\s+\(should be (\d+)\)"
    for promised, found in re.findall(sizes, log, re.MULTILINE):
        unknown = format_name != "W64" and wav.is_unknown_size(int(promised))
        if int(found) < int(promised) and not unknown:
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
    """Resample [..., L] (soxr, high quality: linear phase, 20 bits). The length becomes round(L * to / from)."""
    if from_hz <= 0 or to_hz <= 0:
        raise AudioError(f"sample rates must be positive, got {from_hz} and {to_hz} Hz")
    if from_hz == to_hz:
        return audio
    import soxr

    length = max(round(audio.shape[-1] * to_hz / from_hz), 1)
    flat = np.ascontiguousarray(audio.reshape(-1, audio.shape[-1]).T)  # [L, channels]
    converted = soxr.resample(flat, from_hz, to_hz, quality="HQ").T.reshape(*audio.shape[:-1], -1)
    result = np.zeros((*audio.shape[:-1], length), dtype=np.float32)
    shared = min(length, converted.shape[-1])  # soxr's own length may differ by one sample
    result[..., :shared] = converted[..., :shared]
    return result


def write_audio(path: str | os.PathLike[str], audio: Audio, rate_hz: int, subtype: str = "PCM_16") -> int:
    """Write [L] or [C, L] atomically; the suffix chooses the format. A WAV file beyond 4 GB becomes an RF64 one.

    Integer formats hold +-1: what is beyond is clipped, never wrapped and never scaled, since scaled files would no
    longer add up to their mixture. ``subtype="FLOAT"`` keeps every value.

    Returns:
        The number of samples that were clipped.

    Raises:
        AudioError: the audio is empty, not finite, of a wrong shape or too long for the format, or the disk is full.
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
    if audio.size * _SAMPLE_BYTES[subtype] + 1024 > wav.RIFF_LIMIT:  # with room for the header
        if format_name in _SMALL_FORMATS:
            raise AudioError(f"cannot write {file}: {format_name} holds no more than 4 GB; use the suffix .wav")
        format_name = "RF64" if format_name == "WAV" else format_name
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

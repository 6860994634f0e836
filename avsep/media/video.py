"""Videos and compressed audio in: their sound, and their frames at a steady rate, without a system ffmpeg (PyAV).

Times are seconds from the beginning of the file as a player shows it: a stream that begins later is preceded by silence
or by its first frame. Frames come upright, as a player turns them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import AudioError, DataError, MissingExtraError
from avsep.export.runtime.wav import check_rate, check_samples, is_wav
from avsep.media.audio import read_audio
from avsep.media.truncation import missing_part

__all__ = ["MediaInfo", "cut_frame", "is_video", "iter_frames", "probe", "read_media_audio", "read_sound"]

Audio = NDArray[np.float32]
Frame = NDArray[np.uint8]

# What libsndfile is asked for; anything else goes to PyAV (videos, and audio that libsndfile does not know).
_SOUND_FILES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64"}

# Bare streams and broadcasts, which state no duration: FFmpeg reckons one from their size.
_ESTIMATED = {
    "aac",
    "ac3",
    "amr",
    "dts",
    "eac3",
    "h264",
    "hevc",
    "loas",
    "mp3",
    "mpeg",
    "mpegts",
    "mpegvideo",
    "truehd",
}
# Time stamps are rounded (to 1 ms in Matroska) and those of live encoders jitter: sound that is late by less than what
# a person may notice beside the picture (45 ms, ITU-R BT.1359) is not moved.
_ALIGNED_S = 0.04
_MOST_SILENCE_S = 3600  # in gaps, all together; one damaged time stamp could ask for years
_WAY_OUT = "copy it again, or take what is there (ffmpeg -i IN -c copy OUT)"
# How far FFmpeg looks for the first packets of a stream that it found none of at first: bytes and microseconds.
_LOOK_FAR = {"probesize": "200000000", "analyzeduration": "3600000000"}


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds. ``width`` and ``height`` are those of the upright frame; ``rotation`` degrees, clockwise,
    that a player turns it by; ``duration_s`` as the file states it, 0 where it does not."""

    duration_s: float
    sample_rate_hz: int = 0
    channels: int = 0
    width: int = 0
    height: int = 0
    frames_hz: float = 0.0
    rotation: int = 0

    @property
    def has_audio(self) -> bool:
        return self.channels > 0

    @property
    def has_video(self) -> bool:
        return self.width > 0


def probe(path: str | os.PathLike[str]) -> MediaInfo:
    """Look at a file's streams; the first frames are decoded to learn how they are turned.

    Raises:
        DataError: the file is missing, empty, or no audio or video.
        MissingExtraError: PyAV is not installed.
    """
    with _opened(path) as container:
        duration = (container.duration or 0) / 1_000_000
        found: dict[str, Any] = {"duration_s": duration}
        if (stream := _audio(container)) is not None:
            found |= {"sample_rate_hz": stream.rate or 0, "channels": stream.channels or 0}
        if (video := _video(container)) is not None:
            frame = next(_frames(container, video, path), None)
            if frame is not None:
                turn = _rotation(frame)
                sides = (frame.width, frame.height) if turn % 180 == 0 else (frame.height, frame.width)
                rate = float(video.average_rate or video.guessed_rate or 0)
                found |= {"width": sides[0], "height": sides[1], "frames_hz": rate, "rotation": turn}
        return MediaInfo(**found)


def read_media_audio(path: str | os.PathLike[str], *, mono: bool = True) -> tuple[Audio, int]:
    """The first audio stream as float32 mono [1, L] with its rate in Hz: the mean of its channels, less the
    low-frequency one (LFE), which a speaker for effects plays. Without ``mono`` these channels themselves, [C, L];
    of a stream that changes their number midway the mean.

    Where packets are missing, as in a captured stream, there is silence, so that sound and frames stay aligned.

    Raises:
        AudioError: there is no audio stream, it cannot be decoded, has no samples, NaN ones, some far beyond full scale
            or a rate that recordings have not; or the file is truncated.
    """
    av = _av()
    with _opened(path, AudioError) as container:
        if not container.streams.audio:
            raise AudioError(f"{path} has no audio stream: there is nothing to separate")
        if (stream := _audio(container)) is None:
            raise AudioError(f"{path}: its sound is damaged, or encoded in a way that FFmpeg does not know")
        if missing := missing_part(path):
            raise AudioError(f"{path} is truncated: {missing}; {_WAY_OUT}")
        start_s = _start_s(container)
        sound = _Sound(path, mono)
        last_s = start_s  # of all streams: the sound may end before the frames
        try:
            for packet in container.demux():
                first = packet.pts if packet.pts is not None else packet.dts
                if first is not None and packet.time_base is not None:
                    last_s = max(last_s, float((first + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == stream.index:
                    for frame in packet.decode():
                        sound.add(frame, start_s)
            samples = sound.joined()
        except av.FFmpegError as error:
            raise AudioError(
                f"{path}: its sound cannot be decoded beyond {sound.seconds:.1f} s ({_reason(error)}): "
                "the file is damaged"
            ) from None
        stated_s = 0.0 if container.format.name in _ESTIMATED else (container.duration or 0) / 1_000_000
    if stated_s - (last_s - start_s) > max(0.5, 0.05 * stated_s):
        raise AudioError(
            f"{path} is truncated: it states {stated_s:.1f} s and {last_s - start_s:.1f} s are there; {_WAY_OUT}"
        )
    if not samples.shape[1]:
        raise AudioError(f"{path} holds no samples: its audio stream is empty or damaged")
    check_samples(path, samples)
    return samples, sound.rate_hz


class _Sound:
    """The samples of one audio stream, each at its time."""

    def __init__(self, path: str | os.PathLike[str], mono: bool) -> None:
        self.path = path
        self.mono = mono
        self.rate_hz = 0  # of the first frame
        self.parts: list[Audio] = []  # [C, l], of silence [1, l]
        self._counts: set[int] = set()  # of channels, in the parts that are no silence
        self.length = 0  # samples so far, from the beginning of the file on
        self.silence = 0  # samples of it that fill gaps
        self._before = 0  # samples before that beginning
        self._resampler: Any = None
        self._form: tuple[str, str, int] | None = None

    @property
    def seconds(self) -> float:
        return self.length / self.rate_hz if self.rate_hz else 0.0

    def add(self, frame: Any, start_s: float) -> None:
        """Append a decoded frame, after silence where its time asks for some."""
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self._form:  # a stream may change it, such as one recorded from a broadcast
            check_rate(self.path, frame.sample_rate)
            self.rate_hz = self.rate_hz or frame.sample_rate
            self._flush()
            self._resampler = _av().AudioResampler(format="fltp", rate=self.rate_hz)
            self._form = form
        late = 0 if frame.time is None else round((frame.time - start_s) * self.rate_hz) - self.length
        if not self.parts and late < 0:  # it begins before the file does, as a player shows it
            self.length, self._before = late, -late
        elif late > (_ALIGNED_S * self.rate_hz if self.parts else 0):
            self._fill(late)
        frame.pts = None  # the resampler would fill gaps of its own
        self._append(self._resampler.resample(frame))

    def joined(self) -> Audio:
        """All samples [C, L]."""
        self._flush()
        if len(self._counts) > 1:
            self.parts = [_mean(part) for part in self.parts]
        count = max((len(part) for part in self.parts), default=1)
        parts = [np.broadcast_to(part, (count, part.shape[1])) for part in self.parts]
        return np.concatenate([np.zeros((count, 0), np.float32), *parts], axis=1)[:, self._before :]

    def _fill(self, samples: int) -> None:
        self.silence += samples
        if self.silence > _MOST_SILENCE_S * self.rate_hz:
            raise AudioError(
                f"{self.path}: its time stamps leave {self.silence / self.rate_hz:.0f} s without sound, more than "
                f"{_MOST_SILENCE_S} s: they are damaged or jump; encode it again"
            )
        self.parts.append(np.zeros((1, samples), np.float32))
        self.length += samples

    def _append(self, frames: Sequence[Any]) -> None:
        for frame in frames:
            channels = _channels(frame)
            self.parts.append(_mean(channels) if self.mono else channels)
            self._counts.add(len(self.parts[-1]))
            self.length += channels.shape[1]

    def _flush(self) -> None:
        if self._resampler is not None:
            self._append(self._resampler.resample(None))
        self._resampler = self._form = None


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds a video stream; a file with the suffix of a sound is not opened."""
    if Path(path).suffix.lower() in _SOUND_FILES:
        return False
    return probe(path).has_video


def read_sound(path: str | os.PathLike[str], *, mono: bool = True) -> tuple[Audio, int]:
    """The sound of an audio or video file as float32 [C, L] with its rate in Hz; that of a video comes mono, unless
    ``mono`` is False.

    Raises:
        AudioError: as :func:`avsep.media.audio.read_audio` and :func:`read_media_audio`.
        MissingExtraError: the file is a video, and PyAV is not installed.
    """
    if Path(path).suffix.lower() in _SOUND_FILES or not Path(path).is_file() or _begins_as_sound(path):
        return read_audio(path)
    return read_media_audio(path, mono=mono)


def _begins_as_sound(path: str | os.PathLike[str]) -> bool:
    """Whether a file of any name is of a kind that libsndfile is asked for: it is told there whether it is whole."""
    with open(path, "rb") as file:
        head = file.read(12)
    return is_wav(head) or head[:4] in (b"fLaC", b".snd", b"caff") or (head[:4] == b"FORM" and head[8:11] == b"AIF")


def iter_frames(
    path: str | os.PathLike[str],
    rate_hz: float,
    *,
    short_side: int | None = None,
    grey: bool = False,
    span: tuple[float, float] | None = None,
) -> Iterator[Frame]:
    """Frames at a steady rate: uint8 [3, H, W], or [1, H, W] with ``grey``.

    Frame i is the one on display in the middle of the seconds [i, i + 1) / rate_hz, whatever the file's rate, also
    where that varies. ``short_side`` brings the shorter side to so many pixels. At least one frame comes. Memory does
    not grow with the length. ``span``, two seconds, takes that part of the video as if it were the whole.

    Raises:
        DataError: there is no video stream, or it cannot be decoded.
    """
    if not rate_hz > 0:
        raise ValueError(f"rate_hz must be above 0, got {rate_hz}")
    first, last_s = span or (0.0, math.inf)
    with _opened(path) as container:
        video = _video(container)
        if video is None:
            raise DataError(f"{path} has no video stream: there is nothing to see")
        start = _start_s(container) + first
        shown: Any = None
        count = 0
        last = 0.0
        for frame in _frames(container, video, path):
            begins = (frame.time if frame.time is not None else last) - start
            if shown is not None:
                while (count + 0.5) / rate_hz < min(begins, last_s - first):
                    yield _converted(shown, short_side, grey)
                    count += 1
            shown, last = frame, begins + start
            if begins >= last_s - first:
                break
        if shown is None:
            raise DataError(f"{path}: its video stream has no frame that can be decoded: the file is damaged")
        step = float(shown.duration * shown.time_base) if getattr(shown, "duration", None) else 0.0
        stated_s = float(video.duration * video.time_base) if video.duration else 0.0
        ends = min(max(last - start + step, stated_s - first), last_s - first)
        while count == 0 or (count + 0.5) / rate_hz < ends:
            yield _converted(shown, short_side, grey)
            count += 1


def cut_frame(frame: Frame, box: Sequence[float], size: tuple[int, int] | None = None) -> Frame:
    """What lies within ``box`` (left, top, right, bottom as fractions of the frame) of uint8 [C, H, W], C 1 or 3.

    With ``size`` it is brought to that height and width, whatever its shape: nothing of the object is cut off. A box
    has at least two pixels on each side.
    """
    height, width = frame.shape[1:]
    left, right = _pixels(box[0], box[2], width)
    top, bottom = _pixels(box[1], box[3], height)
    part = np.ascontiguousarray(frame[:, top:bottom, left:right])
    if size is None or part.shape[1:] == size:
        return part
    form = "gray" if part.shape[0] == 1 else "rgb24"
    pixels = part[0] if part.shape[0] == 1 else np.ascontiguousarray(part.transpose(1, 2, 0))
    image = _av().VideoFrame.from_ndarray(pixels, format=form)
    array = image.to_ndarray(format=form, width=size[1], height=size[0], interpolation="AREA")
    return np.ascontiguousarray(array[None] if part.shape[0] == 1 else array.transpose(2, 0, 1))


def _pixels(low: float, high: float, count: int) -> tuple[int, int]:
    first, last = round(low * count), round(high * count)
    if last - first < 2:
        first = max(min(first, count - 2), 0)
        last = min(first + 2, count)
    return first, last


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "media", "reading a video") from None
    return av


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], kind: type[DataError] = DataError) -> Iterator[Any]:
    av = _av()
    file = Path(path)
    if not file.exists():
        raise kind(f"no such file: {file}")
    if not file.is_file():
        raise kind(f"{file} is not a file: give a video or audio file")
    if file.stat().st_size == 0:
        raise kind(f"{file} is empty (0 bytes): record or copy it again")
    # Absolute: FFmpeg takes the beginning of file:a.mp4, concat:a.mp4 or http:a.mp4 for a protocol.
    name = str(file.absolute())
    try:
        container = av.open(name, mode="r", metadata_errors="ignore")
        if (stream := _audio(container)) is not None and not stream.rate:  # it begins late
            container.close()
            container = av.open(name, mode="r", metadata_errors="ignore", options=_LOOK_FAR)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise kind(
            f"{file} cannot be read as video or audio ({_reason(error)}): it is damaged, truncated or of another kind"
        ) from None
    with container:
        yield container


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).strip().rstrip(".")


def _audio(container: Any) -> Any:
    """The first stream of sound that there is a decoder for."""
    return next((stream for stream in container.streams.audio if stream.codec_context is not None), None)


def _video(container: Any) -> Any:
    """The first moving stream; a cover picture in an audio file is none."""
    attached = _av().stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & attached and stream.codec_context is not None:
            stream.thread_type = "AUTO"
            return stream
    return None


def _frames(container: Any, stream: Any, path: str | os.PathLike[str]) -> Iterator[Any]:
    """Decoded frames; single ones that are damaged are passed over, as players do."""
    av = _av()
    broken = 0
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                broken += 1
                if broken > 100:
                    raise
    except av.FFmpegError as error:  # too many of them, or the file cannot be read on
        raise DataError(f"{path}: its frames cannot be decoded ({_reason(error)}): the file is damaged") from None


def _start_s(container: Any) -> float:
    return (container.start_time or 0) / 1_000_000


def _channels(frame: Any) -> Audio:
    """[C, n], without the low-frequency one."""
    channels: Audio = frame.to_ndarray()
    kept = [i for i, channel in enumerate(frame.layout.channels) if not channel.name.startswith("LFE")]
    found: Audio = channels[kept or slice(None)]
    return found


def _mean(channels: Audio) -> Audio:
    """[C, n] -> [1, n]"""
    mean: Audio = channels.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
    return mean


def _rotation(frame: Any) -> int:
    """Degrees, clockwise, that the frame is to be turned by: 0, 90, 180 or 270."""
    return round(-(frame.rotation or 0) / 90) * 90 % 360


def _converted(decoded: Any, short_side: int | None, grey: bool) -> Frame:
    width, height = decoded.width, decoded.height
    if short_side is not None:
        scale = short_side / min(width, height)
        width, height = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    array = decoded.to_ndarray(format="gray" if grey else "rgb24", width=width, height=height, interpolation="AREA")
    array = np.rot90(array, -(_rotation(decoded) // 90))
    if grey:
        return np.ascontiguousarray(array[None])
    return np.ascontiguousarray(array.transpose(2, 0, 1))

"""One HTML page of what a recording was separated into: to hear and to see, in one file that needs no network."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from avsep.evaluation.av_align import LEAST_RATE_HZ, av_align
from avsep.evaluation.drawing import (
    PAGE_BYTES,
    SignalView,
    log_spectrogram,
    modules,
    page_environment,
    pretty,
    styles,
)
from avsep.export.runtime.wav import wav_bytes
from avsep.inference.recordings import SeparatedSignals
from avsep.media.audio import to_mono
from avsep.media.timeline import VisualTimeline

__all__ = ["Boxes", "render_separated"]

_PICTURES = 6
# What browsers play, and as what a page has it.
_PLAYED = {"mp4": "video/mp4", "m4v": "video/mp4", "mov": "video/mp4", "webm": "video/webm", "ogv": "video/ogg"}
_PLAYED |= {"mkv": "video/webm"}
_FLOOR_DB = -90.0  # cells of the mixture below it are silence, and nothing is kept of silence


@dataclass(frozen=True)
class _Heard(SignalView):
    """What is seen is the mean of the channels [2, L], what is heard are the channels."""

    channels: np.ndarray | None = None


@dataclass(frozen=True)
class Boxes:
    """Boxes over a video, to be corrected: by the sources' names (second, box), and the name of a file to save."""

    tracks: Mapping[str, Sequence[tuple[float, Sequence[float]]]]
    file: str


@dataclass(frozen=True)
class _File:
    """A file beside the page, and what the page's own copy of it is saved as."""

    name: str

    @property
    def href(self) -> str:
        return quote(self.name)

    @property
    def saved(self) -> str:
        return f"{Path(self.name).stem}.wav"


@dataclass(frozen=True)
class _Video:
    src: str
    inside: bool


@dataclass(frozen=True)
class _Source:
    class_name: str
    signal: SignalView
    mask: np.ndarray
    frames: np.ndarray | None
    presence: str
    absent: bool
    rules: Sequence[str]
    file: _File | None


@dataclass(frozen=True)
class _Page:
    title: str
    lead: str
    note: str
    mixture: SignalView
    sources: Sequence[_Source]
    residual: SignalView
    residual_file: _File | None
    video: _Video | None
    boxes: Boxes | None
    gain: float
    channels: int
    whole: bool
    rate_hz: int
    version: str


def render_separated(
    title: str,
    classes: Sequence[str],
    signals: SeparatedSignals,
    timelines: Mapping[str, VisualTimeline] | None = None,
    rules: Mapping[str, Sequence[str]] | None = None,
    *,
    files: Sequence[str] = (),
    video: Path | None = None,
    place: Path | None = None,
    boxes: Boxes | None = None,
) -> str:
    """The page as one HTML text.

    The masks are those that the result amounts to: how much of the mixture's magnitude each source has. Two channels
    are heard, of more their mean. What there is to say of the result (:class:`avsep.inference.recordings.Findings`)
    stands above it and beside each source. Where the page would become larger than
    :data:`avsep.evaluation.drawing.PAGE_BYTES`, it shows the beginning and says so. A video that no longer fits in
    beside the sounds is played from its own file.

    Args:
        title: the recording's name.
        classes: the N sources' names, in their order: those of classes, or names of their own.
        timelines: what the separator saw of each source, by name, for a few frames of it.
        rules: of each source, by name, how its object was found, in a few words each.
        files: names of the files beside the page, one a source and the residual's.
        video: the recording, where it has pictures to be watched.
        place: the folder that the page will lie in, from where a video that is not in the page is found.
        boxes: what the separator saw of the video, to be corrected.

    Raises MissingExtraError without jinja2 or matplotlib.
    """
    import avsep

    environment = page_environment(signals.rate_hz)
    environment.globals["audio"] = _playing(environment.globals["audio"], signals.rate_hz)
    environment.globals.update(modules=modules, styles=styles)
    count = 1 if signals.mixture.ndim == 1 else len(signals.mixture)
    findings = signals.findings
    total = signals.mixture.shape[-1]
    shown = min(total, _fitting(len(classes), 2 if count == 2 else 1))

    def heard(signal: np.ndarray, label: str) -> _Heard:
        part = signal[..., :shown]
        mono = part if part.ndim == 1 else to_mono(part)
        return _Heard(mono, label, part if count == 2 else None)

    mixture = heard(signals.mixture, "mixture")
    of_mixture = log_spectrogram(mixture.audio, signals.rate_hz)
    seconds, all_seconds = shown / signals.rate_hz, total / signals.rate_hz
    kind = {1: "mono", 2: "stereo"}.get(count, f"{count} channels, of which the page plays the mean")
    note = f"{_time(all_seconds)}, {kind}, {signals.rate_hz:,} Hz."
    if shown < total:
        note += f" The page holds the first {_time(seconds)}; the files hold all of it."
    if findings.limited:
        note += " The parts and the residual add up to the mixture, and no part is louder than it."
    note, watched = _watched(note, video, place, _room(len(classes), 2 if count == 2 else 1, shown))
    note = " ".join([note, *(f"Note: {pretty(line)}." for line in findings.lines())])
    sources = []
    paths: Sequence[_File | None] = [_File(name) for name in files] or [None] * (len(classes) + 1)
    for name, source, path in zip(classes, signals.sources, paths, strict=False):
        signal = heard(source, f"{pretty(name)}, separated")
        sources.append(
            _Source(
                class_name=name,
                signal=signal,
                mask=_mask(log_spectrogram(signal.audio, signals.rate_hz), of_mixture),
                frames=_spread((timelines or {}).get(name)),
                presence=pretty(findings.presence_of(name)),
                absent=name in findings.absent,
                file=path,
                rules=[
                    *(rules or {}).get(name, ()),
                    *(pretty(tag) for tag in findings.tags(name) if tag != findings.presence_of(name)),
                    *_aligned((timelines or {}).get(name), source, signals.mixture, signals.rate_hz),
                ],
            )
        )
    loudest = max(float(np.abs(s[..., :shown]).max()) for s in (signals.mixture, *signals.sources, signals.residual))
    page = _Page(
        title=title,
        lead=f"Separated into {', '.join(map(pretty, classes))}, and what is left.",
        note=note,
        mixture=mixture,
        sources=sources,
        residual=heard(signals.residual, "residual"),
        residual_file=paths[-1],
        video=watched,
        boxes=boxes if watched is not None else None,
        channels=2 if count == 2 else 1,
        whole=shown == total and count <= 2,
        gain=0.9 / loudest if loudest > 0 else 1.0,
        rate_hz=signals.rate_hz,
        version=avsep.__version__,
    )
    return str(environment.get_template("separated.html").render(page=page))


def _playing(mono: Any, rate_hz: int) -> Any:
    """The template's function that makes an address of a signal's sound, of two channels where there are two."""

    def address(signal: SignalView, gain: float) -> str:
        if isinstance(signal, _Heard) and signal.channels is not None:
            sound = wav_bytes(signal.channels * np.float32(gain), rate_hz)
            return f"data:audio/wav;base64,{base64.b64encode(sound).decode('ascii')}"
        return str(mono(signal, gain))

    return address


def _fitting(sources: int, channels: int = 1) -> int:
    """Samples that fit in a page: 16 bits, a third more as text; of the frames an upper estimate."""
    signals = 2 + sources
    return int((PAGE_BYTES - 500_000 - 2 * signals * 400_000) // (signals * channels * 2 * 4 / 3))


def _room(sources: int, channels: int, samples: int) -> int:
    """Bytes of a video that fit in beside the sounds."""
    signals = 2 + sources
    taken = 500_000 + signals * (2 * min(400_000, samples) + samples * channels * 2 * 4 / 3)
    return int(max(0.0, PAGE_BYTES - taken) * 3 / 4)


def _watched(note: str, video: Path | None, place: Path | None, room: int) -> tuple[str, _Video | None]:
    """The video for the page: in it, or where it lies; and what the page says of it."""
    if video is None:
        return note, None
    suffix = video.suffix[1:].lower()
    if suffix not in _PLAYED:
        return f"{note} Browsers do not play .{suffix} files, so the video is not shown.", None
    size = video.stat().st_size
    if size <= room:
        content = base64.b64encode(video.read_bytes()).decode("ascii")
        return note, _Video(f"data:{_PLAYED[suffix]};base64,{content}", True)
    try:
        path = Path(os.path.relpath(video.resolve(), (place or Path()).resolve()))
        src = quote(path.as_posix())
    except ValueError:  # on another drive of Windows
        src = video.resolve().as_uri()
    left = f"The video ({size / 1e6:.0f} MB) is not in the page, which plays it from its own file: leave both in place."
    return f"{note} {left}", _Video(src, False)


def _mask(source_db: np.ndarray, mixture_db: np.ndarray) -> np.ndarray:
    """[rows, T] in 0..1."""
    share = 10.0 ** ((source_db - mixture_db) / 20.0)
    return np.where(mixture_db > _FLOOR_DB, np.clip(share, 0.0, 1.0), 0.0)


def _spread(timeline: VisualTimeline | None) -> np.ndarray | None:
    """A few frames from all of the time."""
    if timeline is None or timeline.object is None:
        return None
    count = len(timeline.object)
    chosen: np.ndarray = timeline.object[
        np.unique(np.linspace(0, count - 1, min(count, _PICTURES)).round().astype(int))
    ]
    return chosen


def _aligned(timeline: VisualTimeline | None, source: np.ndarray, mixture: np.ndarray, rate_hz: int) -> list[str]:
    """AV-Align of a source beside that of the recording, in a few words; nothing where its motion is not known."""
    if timeline is None or timeline.motion is None or not timeline.moves or timeline.motion_rate_hz < LEAST_RATE_HZ:
        return []
    mono = [sound if sound.ndim == 1 else to_mono(sound) for sound in (source, mixture)]
    own, of_all = (av_align(sound, rate_hz, timeline.motion, timeline.motion_rate_hz) for sound in mono)
    if not (np.isfinite(own) and np.isfinite(of_all)):
        return []
    return [f"sound and motion agree: {own:.2f} (the recording: {of_all:.2f})"]


def _time(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{rest:.1f} s"

"""One HTML page of what a recording was separated into: to hear and to see, in one file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from avsep.evaluation.av_align import LEAST_RATE_HZ, av_align
from avsep.evaluation.drawing import PAGE_BYTES, SignalView, log_spectrogram, page_environment, pretty
from avsep.export.runtime.wav import wav_bytes
from avsep.inference.recordings import SeparatedSignals
from avsep.media.audio import to_mono
from avsep.media.timeline import VisualTimeline

__all__ = ["render_separated"]

_PICTURES = 6
_FLOOR_DB = -90.0  # cells of the mixture below it are silence, and nothing is kept of silence


@dataclass(frozen=True)
class _Heard(SignalView):
    """What is seen is the mean of the channels [2, L], what is heard are the channels."""

    channels: np.ndarray | None = None


@dataclass(frozen=True)
class _Source:
    class_name: str
    signal: SignalView
    mask: np.ndarray
    frames: np.ndarray | None
    rules: Sequence[str]


@dataclass(frozen=True)
class _Page:
    title: str
    lead: str
    note: str
    mixture: SignalView
    sources: Sequence[_Source]
    residual: SignalView
    gain: float
    rate_hz: int
    version: str


def render_separated(
    title: str,
    classes: Sequence[str],
    signals: SeparatedSignals,
    timelines: Mapping[str, VisualTimeline] | None = None,
    rules: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The page as one HTML text.

    The masks are those that the result amounts to: how much of the mixture's magnitude each source has. Two channels
    are heard, of more their mean. What there is to say of the result (:class:`avsep.inference.recordings.Findings`)
    stands above it and beside each source. Where the page would become larger than
    :data:`avsep.evaluation.drawing.PAGE_BYTES`, it shows the beginning and says so.

    Args:
        title: the recording's name.
        classes: the N sources' names, in their order: those of classes, or names of their own.
        timelines: what the separator saw of each source, by name, for a few frames of it.
        rules: of each source, by name, how its object was found, in a few words each.

    Raises MissingExtraError without jinja2 or matplotlib.
    """
    import avsep

    environment = page_environment(signals.rate_hz)
    environment.globals["audio"] = _playing(environment.globals["audio"], signals.rate_hz)
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
    note = " ".join([note, *(f"Note: {pretty(line)}." for line in findings.lines())])
    sources = []
    for name, source in zip(classes, signals.sources, strict=True):
        signal = heard(source, f"{pretty(name)}, separated")
        sources.append(
            _Source(
                class_name=name,
                signal=signal,
                mask=_mask(log_spectrogram(signal.audio, signals.rate_hz), of_mixture),
                frames=_spread((timelines or {}).get(name)),
                rules=[
                    *(rules or {}).get(name, ()),
                    *map(pretty, findings.tags(name)),
                    *_aligned((timelines or {}).get(name), source, signals.mixture, signals.rate_hz),
                ],
            )
        )
    loudest = max(float(np.abs(s[..., :shown]).max()) for s in (signals.mixture, *signals.sources))
    page = _Page(
        title=title,
        lead=f"Separated into {', '.join(map(pretty, classes))}, and what is left.",
        note=note,
        mixture=mixture,
        sources=sources,
        residual=heard(signals.residual, "residual"),
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

"""Separate recordings of any length, rate and channel count with a trained separator.

A recording keeps its channels: the masks are found once, from their mean, and applied to each. It is brought to the
separator's rate and fed as it is: training mixtures are sums of N sources scaled by 1/N, so a recording at an ordinary
level lies within what was trained on (and a separator with a reference level brings any level there by itself).

torch is loaded by what runs a separator in PyTorch; reading, writing and checking is shared with the runtime of
exported bundles, which has none.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from avsep.errors import AudioError, ConfigError, NumericalError
from avsep.export.runtime.chunking import context_in_samples, separate_long
from avsep.export.runtime.files import staged_files
from avsep.export.runtime.recordings import (
    PresenceOfChunks,
    Separated,
    absent,
    by_name,
    check_names,
    check_rescale,
    check_targets,
    fitting_gain,
    ids_of_classes,
    output_paths,
    sources_of,
)
from avsep.export.runtime.timeline import VisualTimeline
from avsep.export.runtime.wav import HIGHEST_RATE_HZ, LOWEST_RATE_HZ, check_samples
from avsep.files import refuse_file, write_text
from avsep.inference.looking import encode_chunks, known_timelines
from avsep.media.audio import SUBTYPES, level_db, resample, to_mono, write_audio
from avsep.media.video import is_video, read_sound

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = [
    "Findings",
    "Recording",
    "Separated",
    "SeparatedFile",
    "SeparatedSignals",
    "check_recordings",
    "check_targets",
    "check_timelines",
    "class_ids_of",
    "encode_chunks",
    "findings_of",
    "ids_of_classes",
    "is_video",
    "known_timelines",
    "output_paths",
    "read_mixture",
    "read_mono",
    "read_recording",
    "read_sound",
    "separate_and_tell",
    "separate_audio",
    "separate_file",
    "separate_files",
    "separate_recordings",
    "sources_of",
]

Audio = NDArray[np.float32]

# Below this peak (-100 dB of full scale) a recording is silent: 16-bit noise lies above it.
SILENT_PEAK = 1e-5
SUFFIXES = ("wav", "flac")
# Two sources of more correlation are nearly the same sound.
ALIKE = 0.95
# A source whose level is so near to the mixture's, and that sounds like it, is the mixture.
UNSEPARATED_DB = 0.5


@dataclass(frozen=True)
class Findings:
    """What there is to say of a result beside its sounds; sources go by their names.

    Attributes:
        presence: by source the probability that it sounds in the recording at all
            (:class:`avsep.export.runtime.recordings.PresenceOfChunks`); empty of a separator that does not tell.
        threshold: from which a source counts as present.
        alike: pairs of sources whose sounds are nearly the same, with the correlation of their mono signals.
        unseparated: sources that got the mixture itself, with their level to it in dB.
        unseen: sources of which the separator saw no picture.
        limited: the parts and the residual add up to the mixture, and no part is louder than it.
    """

    presence: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None
    alike: tuple[tuple[str, str, float], ...] = ()
    unseparated: Mapping[str, float] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    limited: bool = False

    @property
    def absent(self) -> tuple[str, ...]:
        """The sources that are probably not in the recording."""
        return tuple(name for name, p in self.presence.items() if self.threshold is not None and p < self.threshold)

    def presence_of(self, name: str) -> str:
        """What the separator tells of a source's presence, in a few words."""
        if name not in self.presence:
            return "presence not told"
        if name in self.absent:
            return absent(self.presence[name])
        return f"present (presence {100 * self.presence[name]:.0f} %)"

    def lines(self) -> list[str]:
        """What a person should know of the result, a line each."""
        found = [f"{name}: {absent(self.presence[name])}" for name in self.absent]
        found += [
            f"{one} and {other} are nearly the same sound (correlation {correlation:.2f}): they were not told apart"
            for one, other, correlation in self.alike
        ]
        found += [
            f"{name} hardly differs from the recording itself ({level:+.1f} dB): nothing was taken away from it"
            for name, level in self.unseparated.items()
        ]
        return found

    def tags(self, name: str) -> list[str]:
        """The same of one source, in a few words each."""
        found = ["no picture"] if name in self.unseen else []
        found += [absent(self.presence[name])] if name in self.absent else []
        for one, other, _ in self.alike:
            if name in (one, other):
                found.append(f"nearly the same sound as {other if name == one else one}")
        return [*found, "hardly differs from the recording"] if name in self.unseparated else found


def findings_of(
    recording: Recording, mixture: Audio, separated: Separated, threshold: float | None, limited: bool
) -> Findings:
    """Look at a mixture [L] or [C, L] and what became of it."""
    names, sources = recording.classes, separated.sources
    whole = level_db(mixture)
    parts = dict(zip(names, sources, strict=True))
    sounds = {name: _unit(_mono(part)) for name, part in parts.items()}
    alike = []
    for one, other in itertools.combinations(names, 2):
        correlation = float(sounds[one] @ sounds[other])
        alike += [(one, other, correlation)] if correlation > ALIKE else []
    near = {name: level for name, part in parts.items() if abs(level := level_db(part) - whole) <= UNSEPARATED_DB}
    mixed = _unit(mixture)
    presence = () if separated.presence is None else map(float, separated.presence)
    return Findings(
        presence=dict(zip(names, presence, strict=False)),
        threshold=threshold,
        alike=tuple(alike),
        unseparated={name: level for name, level in near.items() if float(_unit(parts[name]) @ mixed) > ALIKE},
        unseen=recording.unseen,
        limited=limited,
    )


def _unit(audio: Audio) -> NDArray[np.float64]:
    """A signal of any shape as one vector without a mean, of length 1: the product of two is their correlation. Zeros
    of silence, which is like nothing."""
    flat = audio.astype(np.float64).reshape(-1)
    if float(np.abs(flat).max()) < SILENT_PEAK:
        return np.zeros_like(flat)
    flat -= flat.mean()
    return flat / max(float(np.linalg.norm(flat)), 1e-12)


@dataclass(frozen=True)
class SeparatedFile:
    """What :func:`separate_file` wrote.

    ``files`` by the sources' names, in the order asked for; ``levels_db`` their root-mean-square levels, and those of
    ``residual`` and ``mixture``, before any are clipped or rescaled; ``clipped`` the number of samples beyond full
    scale in all channels of all files together; ``beside`` further files (a page, boxes). ``gain``: with ``rescale``
    the one factor that all files are scaled by, which add up to the mixture times it. ``channels`` of each file;
    ``findings`` what else there is to say.
    """

    source: Path
    files: dict[str, Path]
    residual: Path
    rate_hz: int
    seconds: float
    levels_db: dict[str, float]
    clipped: int
    beside: tuple[Path, ...] = ()
    gain: float = 1.0
    channels: int = 1
    findings: Findings = Findings()


def class_ids_of(separator: Separator, classes: Sequence[str]) -> list[int]:
    """The class id of each of ``classes``; raises as :func:`avsep.export.runtime.recordings.sources_of`."""
    return ids_of_classes(separator.classes, classes)


def read_mono(path: str | os.PathLike[str]) -> tuple[Audio, int]:
    """The sound of a file as float32 mono [L] with its rate in Hz.

    Raises:
        AudioError: the file cannot be used (:func:`read_sound`) or is silent.
    """
    return read_recording(path, mono=True)


def read_recording(path: str | os.PathLike[str], *, mono: bool = False) -> tuple[Audio, int]:
    """The sound of a file as float32 [C, L], or [L] where it has one channel (or ``mono``), with its rate in Hz.

    Raises:
        AudioError: the file cannot be used (:func:`read_sound`), or is silent where its channels are mixed to mono,
            which is what masks are found from.
    """
    audio, rate_hz = read_sound(path, mono=mono)
    mixed = to_mono(audio)
    if float(np.abs(mixed).max()) < SILENT_PEAK:
        when = "" if audio.shape[0] == 1 else f" when its {audio.shape[0]} channels are mixed to mono"
        raise AudioError(f"{path} is silent{when}: there is nothing to separate")
    return (mixed if mono or audio.shape[0] == 1 else audio), rate_hz


def _mono(audio: Audio) -> Audio:
    """[L] or [C, L] -> [L]"""
    return audio if audio.ndim == 1 else to_mono(audio)


def read_mixture(path: str | os.PathLike[str], rate_hz: int, *, mono: bool = True) -> tuple[Audio, Audio, int]:
    """Read a recording: mono [L'] at its own rate, mono [L] at ``rate_hz``, and its own rate in Hz. Without ``mono``
    its channels are kept (:func:`read_recording`).

    Raises:
        AudioError: the file cannot be used (:func:`read_sound`) or is silent.
    """
    own, own_rate_hz = read_recording(path, mono=mono)
    return own, resample(own, own_rate_hz, rate_hz), own_rate_hz


def check_timelines(separator: Separator, timelines: Mapping[str, VisualTimeline], classes: Sequence[str]) -> None:
    """Raise what :func:`separate_audio` would raise of these frames or features and classes."""
    known_timelines(separator, timelines, sources_of(separator.classes, classes))


def separate_audio(
    separator: Separator,
    mixture: Audio,
    timelines: Mapping[str, VisualTimeline],
    classes: Sequence[str],
    *,
    batch: int = 4,
    context_s: float | None = None,
    limit_mask_sum: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Audio:
    """Separate a mixture [L] at the separator's rate into [N, L], a row for each of ``classes``, in their order; or one
    of several channels [C, L] into [N, C, L].

    Runs on the separator's device, in evaluation mode (its mode is restored), ``batch`` chunks at a time.

    Args:
        timelines: frames or features by name or class, on the recording's time axis. Where the separator can go unseen,
            sources without any may be left out.
        classes: class names, or ``NAME=CLASS`` of sources with names of their own: ``left=violin`` and
            ``right=violin`` are two of one class, told apart by what is seen of each
            (:func:`avsep.export.runtime.recordings.sources_of`).
        limit_mask_sum: divide the masks by their sum where that is above 1, whatever the separator's setting.
        context_s: seconds thrown away on each side of a chunk; an eighth of the chunk when None. A causal separator
            needs none, and takes the recording as one stream unless a context is given.
        progress: called with (chunks done, chunks in all).

    Raises:
        ConfigError, UnknownNameError: classes, as ``sources_of``; or two of one class that nothing tells apart.
        AudioError: the mixture has NaN or infinite samples, or some far beyond full scale.
        DataError: a source without frames, or with frames that the separator's encoders do not take.
        NumericalError: the separator answers NaN or infinite.
    """
    return separate_and_tell(
        separator,
        mixture,
        timelines,
        classes,
        batch=batch,
        context_s=context_s,
        limit_mask_sum=limit_mask_sum,
        progress=progress,
    ).sources


def separate_and_tell(
    separator: Separator,
    mixture: Audio,
    timelines: Mapping[str, VisualTimeline],
    classes: Sequence[str],
    *,
    batch: int = 4,
    context_s: float | None = None,
    limit_mask_sum: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Separated:
    """As :func:`separate_audio`, and what the separator tells of each source's presence."""
    import torch

    check_samples("the mixture", mixture)
    if separator.causal and context_s is None:
        return _streamed(separator, mixture, timelines, classes, limit_mask_sum, progress)
    asked = sources_of(separator.classes, classes)
    ids = [source.class_id for source in asked]
    lines = known_timelines(separator, timelines, asked)
    spec = separator.spec.front_end
    device = next(separator.parameters()).device
    total = int(mixture.shape[-1])
    presence = PresenceOfChunks()

    def run(chunks: Audio, starts: Sequence[int]) -> Audio:
        visual = encode_chunks(separator, lines, starts, total)
        class_ids = torch.tensor(ids).expand(len(starts), -1)  # [b, N]
        waveforms, output = separator.separate_and_tell(
            torch.from_numpy(chunks).to(device), visual, class_ids, limit_mask_sum=limit_mask_sum
        )
        estimates: Audio = waveforms.float().cpu().numpy()
        told = None if output.presence is None else torch.sigmoid(output.presence.float()).cpu().numpy()
        presence.add(told)
        if not np.isfinite(estimates).all() or (told is not None and not np.isfinite(told).all()):
            raise NumericalError(
                f"the separator answers NaN or infinite samples near {starts[0] / spec.sample_rate_hz:.1f} s: its "
                "weights are damaged, or its training diverged"
            )
        return estimates

    training = separator.training
    separator.eval()
    try:
        with torch.inference_mode():
            sources = separate_long(
                run,
                mixture,
                clip_samples=spec.clip_samples,
                context_samples=context_in_samples(
                    context_s, clip_samples=spec.clip_samples, sample_rate_hz=spec.sample_rate_hz
                ),
                align_samples=spec.hop,
                batch=batch,
                progress=progress,
            )
    finally:
        separator.train(training)
    return Separated(sources, presence.value)


def _streamed(
    separator: Separator,
    mixture: Audio,
    timelines: Mapping[str, VisualTimeline],
    classes: Sequence[str],
    limit_mask_sum: bool,
    progress: Callable[[int, int], None] | None,
) -> Separated:
    """All of a mixture by a causal separator, which needs no chunks and leaves no seams."""
    from avsep.inference.streaming import StreamingSeparator

    training = separator.training
    separator.eval()
    try:
        channels = None if mixture.ndim == 1 else len(mixture)
        stream = StreamingSeparator(separator, classes, timelines, channels=channels, limit_mask_sum=limit_mask_sum)
        clip = separator.spec.front_end.clip_samples
        starts = range(0, mixture.shape[-1], clip)
        parts = []
        for done, start in enumerate(starts):
            parts.append(stream.push(mixture[..., start : start + clip]))
            if progress is not None:
                progress(done + 1, len(starts))
        parts.append(stream.flush())
        return Separated(np.concatenate(parts, axis=-1), stream.presence)
    finally:
        separator.train(training)


def _output_rate(rate: str | int, model_hz: int, input_hz: int) -> int:
    if rate == "model":
        return model_hz
    if rate == "input":
        return input_hz
    try:
        hertz = int(rate)
    except ValueError:
        hertz = 0
    if not LOWEST_RATE_HZ <= hertz <= HIGHEST_RATE_HZ:
        raise ConfigError(
            f"rate {rate!r} must be 'model', 'input' or a number of Hz from {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ}"
        )
    return hertz


def separate_files(
    separator: Separator,
    audio_paths: Sequence[str | os.PathLike[str]],
    timelines: Mapping[str, VisualTimeline],
    classes: Sequence[str],
    out_dir: str | os.PathLike[str],
    *,
    rate: str | int = "model",
    subtype: str = "PCM_16",
    rescale: bool = False,
    overwrite: bool = False,
    batch: int = 4,
    context_s: float | None = None,
    mono: bool = False,
    limit_mask_sum: bool = False,
    progress: Callable[[Path, int, int], None] | None = None,
) -> list[SeparatedFile]:
    """Separate audio files and write one WAV per source and the residual of each, with the file's channels.

    Everything is checked before the first chunk is separated, and the files appear together at the end: a mistake or a
    kill leaves ``out_dir`` as it was. The residual is the mixture minus the sum of the sources, at the output's
    rate, so that all files of a recording add up to it; at the input's rate it also holds what lies above the
    separator's band. Integer samples beyond full scale are clipped and counted, or ``rescale`` prevents that.

    Args:
        audio_paths: files in any format of libsndfile, any rate and channel count.
        timelines: frames or features by name or class (:func:`avsep.media.timeline.read_visual_file`), for all files.
        classes: as :func:`separate_audio`'s; files go by the sources' names.
        out_dir: made when it is not there.
        rate: of the files written: ``model`` (the separator's), ``input`` (each file's own) or a number of Hz.
        subtype: ``PCM_16``, ``PCM_24`` or ``FLOAT``.
        rescale: where a sample would be clipped, scale all files of that recording, the residual too, by one factor
            (``gain`` of the result); not with ``FLOAT``, which clips nothing.
        overwrite: replace files that are there; otherwise that is refused.
        mono: mix the channels of each file to mono first.
        limit_mask_sum: as :func:`separate_audio`'s.
        progress: called with (file, chunks done, chunks in all).

    Raises:
        AudioError, ConfigError, DataError, UnknownNameError, NumericalError: one line each; nothing is written then.
    """
    check_timelines(separator, timelines, classes)

    def run(mixture: Audio, report: Callable[[int, int], None] | None) -> Separated:
        return separate_and_tell(
            separator,
            mixture,
            timelines,
            classes,
            batch=batch,
            context_s=context_s,
            limit_mask_sum=limit_mask_sum,
            progress=report,
        )

    front_end, decoder = separator.spec.front_end, separator.mask_decoder
    asked = sources_of(separator.classes, classes)
    names, seen = tuple(source.name for source in asked), by_name(timelines, asked)
    unseen = tuple(name for name in names if name not in seen) if separator.visual_sources() else ()
    return separate_recordings(
        [Recording(Path(path), names, run, mono=mono, unseen=unseen) for path in audio_paths],
        out_dir,
        sample_rate_hz=front_end.sample_rate_hz,
        threshold=float(decoder.presence_threshold) if decoder.tells_presence else None,
        limited=limit_mask_sum or front_end.limit_mask_sum,
        rate=rate,
        subtype=subtype,
        rescale=rescale,
        overwrite=overwrite,
        progress=progress,
    )


@dataclass(frozen=True)
class SeparatedSignals:
    """A mixture [L], its sources [N, L] and what is left of it [L], at the separator's rate; of a recording of several
    channels [C, L], [N, C, L] and [C, L]."""

    mixture: Audio
    sources: Audio
    residual: Audio
    rate_hz: int
    findings: Findings = Findings()


@dataclass(frozen=True)
class Recording:
    """A file to be separated.

    ``separate`` is called with the mixture at the separator's rate, [L] of a file of one channel (or ``mono``), else
    [C, L], and a function to report (chunks done, chunks in all) to, or None, and gives the sources [N, L] or
    [N, C, L], one for each of ``classes``, which are the sources' names. ``beside``: names of further text files, each
    with what makes its content of the result. ``mono``: mix the channels first. ``unseen``: names of sources that
    nothing is seen of.
    """

    path: Path
    classes: tuple[str, ...]
    separate: Callable[[Audio, Callable[[int, int], None] | None], Separated]
    beside: Mapping[str, Callable[[SeparatedSignals], str]] = field(default_factory=dict)
    mono: bool = False
    unseen: tuple[str, ...] = ()

    def targets(self, out: Path, suffix: str) -> list[Path]:
        """The files that come of it: :func:`output_paths`, then those beside."""
        return [*output_paths(self.path, self.classes, out, suffix), *(out / name for name in self.beside)]


def check_recordings(
    recordings: Sequence[Recording],
    out: Path,
    *,
    rate: str | int = "model",
    subtype: str = "PCM_16",
    suffix: str = "wav",
    rescale: bool = False,
    overwrite: bool = False,
) -> None:
    """Raise what :func:`separate_recordings` would raise of names and settings, before anything is read."""
    if not recordings:
        raise ConfigError("no audio files given")
    if subtype not in SUBTYPES:
        raise ConfigError(f"unknown sample format '{subtype}': one of {', '.join(SUBTYPES)}")
    if suffix not in SUFFIXES:
        raise ConfigError(f"unknown suffix '{suffix}': one of {', '.join(SUFFIXES)}")
    if suffix == "flac" and subtype == "FLOAT":
        raise ConfigError("FLAC holds no FLOAT samples: use --format PCM_24, or --suffix wav")
    check_rescale(rescale, subtype)
    for recording in recordings:
        check_names(recording.classes)
    _output_rate(rate, 1000, 1000)
    refuse_file(out)
    place = next(p for p in (out, *out.parents) if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{place} cannot be written: choose another output folder")
    check_targets([r.path for r in recordings], [r.targets(out, suffix) for r in recordings], out, overwrite)


def separate_recordings(
    recordings: Sequence[Recording],
    out_dir: str | os.PathLike[str],
    *,
    sample_rate_hz: int,
    rate: str | int = "model",
    subtype: str = "PCM_16",
    suffix: str = "wav",
    rescale: bool = False,
    overwrite: bool = False,
    threshold: float | None = None,
    limited: bool = False,
    progress: Callable[[Path, int, int], None] | None = None,
) -> list[SeparatedFile]:
    """What :func:`separate_files` does around the separator, which may be of any kind.

    Args:
        sample_rate_hz: the separator's.
        suffix: ``wav`` or ``flac``.
        threshold: presence from which a class counts as present.
        limited: the separator's masks sum up to at most 1.

    Raises:
        AudioError, ConfigError: one line each; nothing is written then. And whatever a recording's functions raise.
    """
    out = Path(out_dir)
    check_recordings(recordings, out, rate=rate, subtype=subtype, suffix=suffix, rescale=rescale, overwrite=overwrite)
    for recording in recordings:
        read_recording(recording.path, mono=recording.mono)
    targets = [recording.targets(out, suffix) for recording in recordings]
    results = []
    with staged_files(out, [name for names in targets for name in names]) as staging:
        for recording, names in zip(recordings, targets, strict=True):
            path, classes = recording.path, recording.classes
            own, mixture, own_hz = read_mixture(path, sample_rate_hz, mono=recording.mono)
            separated = recording.separate(mixture, None if progress is None else functools.partial(progress, path))
            estimates = separated.sources
            findings = findings_of(recording, mixture, separated, threshold, limited)
            rate_hz = _output_rate(rate, sample_rate_hz, own_hz)
            whole = resample(own, own_hz, rate_hz)  # [(C,) L'], straight from its own rate
            length = whole.shape[-1]
            sources = _fit(resample(estimates, sample_rate_hz, rate_hz), length)  # [N, (C,) L']
            signals = {**dict(zip(classes, sources, strict=True)), "residual": whole - sources.sum(axis=0)}
            clipped, gain = 0, fitting_gain(signals.values()) if rescale else 1.0
            for name, signal in zip(names[: len(signals)], signals.values(), strict=True):
                clipped += write_audio(staging / name.name, signal * np.float32(gain), rate_hz, subtype)
            left = mixture - estimates.sum(axis=0)
            result = SeparatedSignals(mixture, estimates, left, sample_rate_hz, findings)
            for text_file, make in recording.beside.items():
                write_text(staging / text_file, make(result))
            results.append(
                SeparatedFile(
                    source=path,
                    files=dict(zip(classes, names, strict=False)),
                    residual=names[len(classes)],
                    rate_hz=rate_hz,
                    seconds=length / rate_hz,
                    levels_db={k: level_db(v) for k, v in {"mixture": whole, **signals}.items()},
                    clipped=clipped,
                    beside=tuple(names[len(signals) :]),
                    gain=gain,
                    channels=1 if whole.ndim == 1 else len(whole),
                    findings=findings,
                )
            )
    return results


def _fit(audio: Audio, length: int) -> Audio:
    """[..., L'] cut or filled up to ``length``: a length that was rounded twice may be off by a sample or two."""
    around = [(0, 0)] * (audio.ndim - 1)
    return np.pad(audio[..., :length], [*around, (0, max(length - audio.shape[-1], 0))])


def separate_file(
    separator: Separator,
    audio_path: str | os.PathLike[str],
    timelines: Mapping[str, VisualTimeline],
    classes: Sequence[str],
    out_dir: str | os.PathLike[str],
    *,
    rate: str | int = "model",
    subtype: str = "PCM_16",
    rescale: bool = False,
    overwrite: bool = False,
    batch: int = 4,
    context_s: float | None = None,
    mono: bool = False,
    limit_mask_sum: bool = False,
    progress: Callable[[Path, int, int], None] | None = None,
) -> SeparatedFile:
    """Separate one audio file: :func:`separate_files` of one."""
    (result,) = separate_files(
        separator,
        [audio_path],
        timelines,
        classes,
        out_dir,
        rate=rate,
        subtype=subtype,
        rescale=rescale,
        overwrite=overwrite,
        batch=batch,
        context_s=context_s,
        mono=mono,
        limit_mask_sum=limit_mask_sum,
        progress=progress,
    )
    return result

"""Separate recordings of any length, rate and channel count with a trained separator.

A recording is mixed to mono, brought to the separator's rate and fed as it is, without any change of level: training
mixtures are sums of N sources scaled by 1/N, so a recording at an ordinary level lies within what was trained on.

torch is loaded by what runs a separator in PyTorch; reading, writing and checking is shared with the runtime of
exported bundles, which has none.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import AudioError, ConfigError, DataError, NumericalError
from avsep.export.runtime.chunking import context_in_samples, separate_long
from avsep.export.runtime.files import staged_files
from avsep.export.runtime.recordings import (
    check_rescale,
    check_targets,
    fitting_gain,
    ids_of_classes,
    output_paths,
)
from avsep.export.runtime.timeline import VisualSource, VisualTimeline, timeline_of
from avsep.export.runtime.wav import HIGHEST_RATE_HZ, LOWEST_RATE_HZ, check_samples
from avsep.files import refuse_file, write_text
from avsep.media.audio import SUBTYPES, level_db, resample, to_mono, write_audio
from avsep.media.video import is_video, read_sound
from avsep.types import VisualFeatures, VisualInputs

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = [
    "Recording",
    "SeparatedFile",
    "SeparatedSignals",
    "check_recordings",
    "check_targets",
    "check_timelines",
    "class_ids_of",
    "ids_of_classes",
    "is_video",
    "output_paths",
    "read_mixture",
    "read_mono",
    "read_sound",
    "separate_audio",
    "separate_file",
    "separate_files",
    "separate_recordings",
]

Audio = NDArray[np.float32]

# Below this peak (-100 dB of full scale) a recording is silent: 16-bit noise lies above it.
SILENT_PEAK = 1e-5
SUFFIXES = ("wav", "flac")


@dataclass(frozen=True)
class SeparatedFile:
    """What :func:`separate_file` wrote.

    ``files`` by class name, in the order asked for; ``levels_db`` the root-mean-square levels by class, and of
    ``residual`` and ``mixture``, before any are clipped or rescaled; ``clipped`` the number of samples beyond full
    scale in all files together; ``beside`` further files (a page, boxes). ``gain``: with ``rescale`` the one factor
    that all files are scaled by, which add up to the mixture times it.
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


def class_ids_of(separator: Separator, classes: Sequence[str]) -> list[int]:
    """Class ids of class names; raises as :func:`avsep.export.runtime.recordings.ids_of_classes`."""
    return ids_of_classes(separator.classes, classes)


def read_mono(path: str | os.PathLike[str]) -> tuple[Audio, int]:
    """The sound of a file as float32 mono [L] with its rate in Hz.

    Raises:
        AudioError: the file cannot be used (:func:`read_sound`) or is silent.
    """
    audio, rate_hz = read_sound(path)
    mono = to_mono(audio)
    if float(np.abs(mono).max()) < SILENT_PEAK:
        mixed = "" if audio.shape[0] == 1 else f" when its {audio.shape[0]} channels are mixed to mono"
        raise AudioError(f"{path} is silent{mixed}: there is nothing to separate")
    return mono, rate_hz


def read_mixture(path: str | os.PathLike[str], rate_hz: int) -> tuple[Audio, Audio, int]:
    """Read a recording: mono [L'] at its own rate, mono [L] at ``rate_hz``, and its own rate in Hz.

    Raises:
        AudioError: the file cannot be used (:func:`read_sound`) or is silent.
    """
    mono, own_rate_hz = read_mono(path)
    return mono, resample(mono, own_rate_hz, rate_hz), own_rate_hz


def _read_checked(timeline: VisualTimeline, source: VisualSource, centre_s: float, duration_s: float) -> NDArray[Any]:
    array = timeline.read(source, centre_s=centre_s, duration_s=duration_s)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise DataError(f"{timeline.where}: the {source.role} features hold NaN or infinite values: extract them again")
    return np.ascontiguousarray(array)


def _encode(
    separator: Separator, timelines: Sequence[VisualTimeline], starts: Sequence[int], samples: int
) -> VisualFeatures:
    """The visual features of b chunks and N sources: object [b, N, Do], motion [b, N, Dm, Tm].

    Each source is encoded on its own, since frames of different files may differ in size and rate; motion sequences
    of different lengths are filled up and masked.
    """
    import torch

    spec = separator.spec.front_end
    device = next(separator.parameters()).device
    encoded: list[VisualFeatures] = []
    for timeline in timelines:
        inputs: dict[str, Tensor] = {}
        for source in separator.visual_sources():
            rows = []
            for start in starts:
                centre_s = source.middle_s(start, spec.clip_samples, samples, spec.sample_rate_hz)
                rows.append(torch.from_numpy(_read_checked(timeline, source, centre_s, spec.clip_s)))
            inputs[source.role] = torch.stack(rows)[:, None].to(device)  # [b, 1, ...]
        encoded.append(separator.encode_visual(VisualInputs(**inputs)))
    objects = [v.object for v in encoded if v.object is not None]
    motions = [v.motion for v in encoded if v.motion is not None]
    motion = mask = None
    if motions:
        steps = [m.shape[-1] for m in motions]
        motion = torch.cat([torch.nn.functional.pad(m, (0, max(steps) - m.shape[-1])) for m in motions], dim=1)
        if len(set(steps)) > 1:
            valid = torch.arange(max(steps), device=device) < torch.tensor(steps, device=device)[:, None]  # [N, Tm]
            mask = valid.expand(len(starts), -1, -1)
    return VisualFeatures(object=torch.cat(objects, dim=1) if objects else None, motion=motion, motion_mask=mask)


def _timelines(
    separator: Separator, timelines: Mapping[str, VisualTimeline], classes: Sequence[str]
) -> list[VisualTimeline]:
    """The timelines of ``classes``, each read once for what the separator wants, so that mistakes show at once."""
    sources = separator.visual_sources()
    if not sources:
        return [VisualTimeline()] * len(classes)
    spec = separator.spec.front_end
    found = []
    for name in classes:
        found.append(timeline_of(timelines, name))
        for source in sources:
            _read_checked(found[-1], source, spec.clip_s / 2, spec.clip_s)
    return found


def check_timelines(separator: Separator, timelines: Mapping[str, VisualTimeline], classes: Sequence[str]) -> None:
    """Raise what :func:`separate_audio` would raise of these frames or features and classes."""
    class_ids_of(separator, classes)
    _timelines(separator, timelines, classes)


def separate_audio(
    separator: Separator,
    mixture: Audio,
    timelines: Mapping[str, VisualTimeline],
    classes: Sequence[str],
    *,
    batch: int = 4,
    context_s: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Audio:
    """Separate a mono mixture [L] at the separator's rate into [N, L], one row a class, in the order of ``classes``.

    Runs on the separator's device, in evaluation mode (its mode is restored), ``batch`` chunks at a time.

    Args:
        timelines: frames or features by class name, on the recording's time axis.
        context_s: seconds thrown away on each side of a chunk; an eighth of the chunk when None.
        progress: called with (chunks done, chunks in all).

    Raises:
        ConfigError, UnknownNameError: classes, as :func:`class_ids_of`.
        AudioError: the mixture has NaN or infinite samples, or some far beyond full scale.
        DataError: a class without frames, or with frames that the separator's encoders do not take.
        NumericalError: the separator answers NaN or infinite.
    """
    import torch

    check_samples("the mixture", mixture)
    ids = class_ids_of(separator, classes)
    lines = _timelines(separator, timelines, classes)
    spec = separator.spec.front_end
    device = next(separator.parameters()).device
    total = int(mixture.shape[0])

    def run(chunks: Audio, starts: Sequence[int]) -> Audio:
        visual = _encode(separator, lines, starts, total)
        class_ids = torch.tensor(ids).expand(len(starts), -1)  # [b, N]
        estimates = separator.separate(torch.from_numpy(chunks).to(device), visual, class_ids).float().cpu().numpy()
        if not np.isfinite(estimates).all():
            raise NumericalError(
                f"the separator answers NaN or infinite samples near {starts[0] / spec.sample_rate_hz:.1f} s: its "
                "weights are damaged, or its training diverged"
            )
        return estimates

    training = separator.training
    separator.eval()
    try:
        with torch.inference_mode():
            return separate_long(
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
    progress: Callable[[Path, int, int], None] | None = None,
) -> list[SeparatedFile]:
    """Separate audio files and write one mono WAV per class and the residual of each.

    Everything is checked before the first chunk is separated, and the files appear together at the end: a mistake or a
    kill leaves ``out_dir`` as it was. The residual is the mono mixture minus the sum of the sources, at the output's
    rate, so that all files of a recording add up to it; at the input's rate it also holds what lies above the
    separator's band. Integer samples beyond full scale are clipped and counted, or ``rescale`` prevents that.

    Args:
        audio_paths: files in any format of libsndfile, any rate and channel count.
        timelines: frames or features by class (:func:`avsep.media.timeline.read_visual_file`), for all the files.
        out_dir: made when it is not there.
        rate: of the files written: ``model`` (the separator's), ``input`` (each file's own) or a number of Hz.
        subtype: ``PCM_16``, ``PCM_24`` or ``FLOAT``.
        rescale: where a sample would be clipped, scale all files of that recording, the residual too, by one factor
            (``gain`` of the result); not with ``FLOAT``, which clips nothing.
        overwrite: replace files that are there; otherwise that is refused.
        progress: called with (file, chunks done, chunks in all).

    Raises:
        AudioError, ConfigError, DataError, UnknownNameError, NumericalError: one line each; nothing is written then.
    """
    check_timelines(separator, timelines, classes)

    def run(mixture: Audio, report: Callable[[int, int], None] | None) -> Audio:
        return separate_audio(separator, mixture, timelines, classes, batch=batch, context_s=context_s, progress=report)

    return separate_recordings(
        [Recording(Path(path), tuple(classes), run) for path in audio_paths],
        out_dir,
        sample_rate_hz=separator.spec.front_end.sample_rate_hz,
        rate=rate,
        subtype=subtype,
        rescale=rescale,
        overwrite=overwrite,
        progress=progress,
    )


@dataclass(frozen=True)
class SeparatedSignals:
    """A mixture [L], its sources [N, L] and what is left of it [L], at the separator's rate."""

    mixture: Audio
    sources: Audio
    residual: Audio
    rate_hz: int


@dataclass(frozen=True)
class Recording:
    """A file to be separated.

    ``separate`` is called with the mixture [L] at the separator's rate and a function to report (chunks done, chunks in
    all) to, or None, and gives [N, L], a row for each of ``classes``. ``beside``: names of further text files, each
    with what makes its content of the result.
    """

    path: Path
    classes: tuple[str, ...]
    separate: Callable[[Audio, Callable[[int, int], None] | None], Audio]
    beside: Mapping[str, Callable[[SeparatedSignals], str]] = field(default_factory=dict)

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
    progress: Callable[[Path, int, int], None] | None = None,
) -> list[SeparatedFile]:
    """What :func:`separate_files` does around the separator, which may be of any kind.

    Args:
        sample_rate_hz: the separator's.
        suffix: ``wav`` or ``flac``.

    Raises:
        AudioError, ConfigError: one line each; nothing is written then. And whatever a recording's functions raise.
    """
    out = Path(out_dir)
    check_recordings(recordings, out, rate=rate, subtype=subtype, suffix=suffix, rescale=rescale, overwrite=overwrite)
    for recording in recordings:
        read_mono(recording.path)
    targets = [recording.targets(out, suffix) for recording in recordings]
    results = []
    with staged_files(out, [name for names in targets for name in names]) as staging:
        for recording, names in zip(recordings, targets, strict=True):
            path, classes = recording.path, recording.classes
            own, mixture, own_hz = read_mixture(path, sample_rate_hz)
            estimates = recording.separate(mixture, None if progress is None else functools.partial(progress, path))
            rate_hz = _output_rate(rate, sample_rate_hz, own_hz)
            whole = resample(own, own_hz, rate_hz)  # [L'], straight from its own rate
            sources = _fit(resample(estimates, sample_rate_hz, rate_hz), len(whole))  # [N, L']
            signals = {**dict(zip(classes, sources, strict=True)), "residual": whole - sources.sum(axis=0)}
            clipped, gain = 0, fitting_gain(signals.values()) if rescale else 1.0
            for name, signal in zip(names[: len(signals)], signals.values(), strict=True):
                clipped += write_audio(staging / name.name, signal * np.float32(gain), rate_hz, subtype)
            result = SeparatedSignals(mixture, estimates, mixture - estimates.sum(axis=0), sample_rate_hz)
            for text_file, make in recording.beside.items():
                write_text(staging / text_file, make(result))
            results.append(
                SeparatedFile(
                    source=path,
                    files=dict(zip(classes, names, strict=False)),
                    residual=names[len(classes)],
                    rate_hz=rate_hz,
                    seconds=len(whole) / rate_hz,
                    levels_db={k: level_db(v) for k, v in {"mixture": whole, **signals}.items()},
                    clipped=clipped,
                    beside=tuple(names[len(signals) :]),
                    gain=gain,
                )
            )
    return results


def _fit(audio: Audio, length: int) -> Audio:
    """[N, L'] cut or filled up to ``length``: a length that was rounded twice may be off by a sample or two."""
    return np.pad(audio[:, :length], ((0, 0), (0, max(length - audio.shape[1], 0))))


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
        progress=progress,
    )
    return result

"""One call from a recording to its sources, with a separator that comes with the library or one of your own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ConfigError
from avsep.export.runtime.names import names_in
from avsep.export.runtime.timeline import VisualTimeline
from avsep.files import made_folder

if TYPE_CHECKING:
    from avsep.inference.recordings import Findings
    from avsep.separator import Separator

__all__ = ["Separation", "separate"]

Audio = NDArray[np.float32]


@dataclass(frozen=True)
class Separation:
    """What :func:`separate` returns.

    Attributes: ``sources`` by name, float32 [L], or [C, L] of a recording of several channels, at ``rate_hz``;
    ``residual``, what is left of the ``mixture``, both of the same shape; ``findings``, what else there is to say.
    """

    sources: dict[str, Audio]
    residual: Audio
    mixture: Audio
    rate_hz: int
    findings: Findings

    def save(self, folder: str | os.PathLike[str], *, suffix: str = "wav", overwrite: bool = False) -> dict[str, Path]:
        """Write ``NAME.wav`` of each source, and ``residual.wav``; returns the files by name.

        Raises:
            ConfigError: a file is there already, and ``overwrite`` is not given.
        """
        from avsep.media.audio import write_audio

        files = {name: Path(folder) / f"{name}.{suffix}" for name in (*self.sources, "residual")}
        if not overwrite and (there := [file for file in files.values() if file.exists()]):
            raise ConfigError(f"{there[0]} is there already: give overwrite=True, or another folder")
        with made_folder(folder):
            for name, file in files.items():
                write_audio(file, self.residual if name == "residual" else self.sources[name], self.rate_hz)
        return files


def separate(
    recording: str | os.PathLike[str] | tuple[Audio, int],
    classes: str | Sequence[str],
    *,
    model: str | os.PathLike[str] | Separator | None = None,
    timelines: Mapping[str, VisualTimeline] | None = None,
    mono: bool = False,
    limit_mask_sum: bool = False,
    device: str = "auto",
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Separation:
    """Separate a recording: ``avsep.separate("duet.mp4", classes=["violin", "flute"])``.

    Args:
        recording: a file, sound or video, of any rate, length and number of channels; or its samples [L] or [C, L] with
            their rate in Hz.
        classes: what to take out, in a list or with commas between; ``left=violin`` and ``right=violin`` are two of one
            class, told apart by their ``timelines``.
        model: a name of ``avsep models``, a run, a saved separator, or a separator; the model that comes with the
            library when None.
        timelines: what is seen of each, by name or class (:func:`avsep.media.footage.timelines_of_video`, or
            :func:`avsep.media.timeline.read_visual_file`). Without them a source is asked for by its name alone; a
            video is only listened to.
        mono: mix the channels first.
        limit_mask_sum: divide the masks by their sum where that is above 1, whatever the separator's setting.
        progress: called with (chunks done, chunks in all).

    Returns:
        The sources at the separator's rate (``avsep.Separation``).

    Raises:
        AudioError: the file cannot be read, or is silent.
        ConfigError, UnknownNameError: classes that the separator does not know.
        DataError: a separator that must see something was shown nothing.
    """
    from avsep.environment import pick_device
    from avsep.inference.recordings import Recording, findings_of, read_mixture, separate_and_tell, sources_of
    from avsep.media.audio import resample, to_mono
    from avsep.models import model_at
    from avsep.separator import Separator, load_separator

    found = None if isinstance(model, Separator) else model_at(model)
    if isinstance(model, Separator):
        separator = model
    else:
        separator = load_separator(found.separator if found is not None else model or "").to(pick_device(device))
    asked = names_in(classes, separator.classes) if isinstance(classes, str) else [str(name) for name in classes]
    if found is not None:
        found.refuse_left_out(asked)
    names = tuple(source.name for source in sources_of(separator.classes if found is None else found.classes, asked))
    rate_hz = separator.spec.front_end.sample_rate_hz
    if isinstance(recording, tuple):
        samples, own_hz = np.asarray(recording[0], np.float32), recording[1]
        mixture = resample(to_mono(samples) if mono and samples.ndim > 1 else samples, own_hz, rate_hz)
        path = Path("recording")
    else:
        path = Path(recording)
        _, mixture, _ = read_mixture(path, rate_hz, mono=mono)
    shown = dict(timelines or {})
    separated = separate_and_tell(
        separator, mixture, shown, asked, batch=batch, limit_mask_sum=limit_mask_sum, progress=progress
    )
    decoder = separator.mask_decoder
    about = Recording(path, names, lambda *_: separated)
    threshold = float(decoder.presence_threshold) if decoder.tells_presence else None
    limited = limit_mask_sum or separator.spec.front_end.limit_mask_sum
    findings = findings_of(about, mixture, separated, threshold, limited)
    sources = dict(zip(names, separated.sources, strict=True))
    return Separation(sources, mixture - separated.sources.sum(axis=0), mixture, rate_hz, findings)

"""Frames or stored visual features beside a recording: how they are cut for a separator, and the file they travel in.

:class:`VisualTimeline` holds what there is of one video; the store and the visual file read through it, so training,
testing and ``avsep separate`` cut frames in one and the same way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import MAGIC, ArrayHeader, Npz
from .errors import DataError, one_line
from .files import atomic_path

__all__ = [
    "MOST_RATE_HZ",
    "MOTION_STEPS",
    "VisualSource",
    "VisualTimeline",
    "is_rate",
    "read_visual_file",
    "write_visual_file",
]

MOST_RATE_HZ = 1000.0  # of frames and features: no camera that sees sounds is quicker
MOTION_STEPS = 8  # of motion features whose length nothing else says: VideoMAE's
_MOST_BYTES = 1 << 30  # of the arrays in a visual file: half an hour of frames of 224 x 224, or weeks of features

Array = NDArray[Any]


@dataclass(frozen=True)
class VisualSource:
    """What a visual encoder wants to be fed with, asked of the store.

    ``role`` object or motion; ``kind`` frames (uint8 images) or features (stored vectors, by ``name`` and width
    ``dim``). An object source takes ``frames`` = K consecutive frames or vectors around the crop's centre; a motion
    source all frames of the crop (``frames`` = 0), ``rate_hz`` of them a second (0: as many as there are), or the
    video's stored sequence.
    """

    role: str
    kind: str
    name: str = ""
    dim: int = 0
    frames: int = 0
    rate_hz: float = 0.0

    def middle_s(self, start: int, clip_samples: int, total_samples: int, rate_hz: int) -> float:
        """The moment that a chunk from sample ``start`` on is looked up at, in seconds of the recording.

        Of an object the middle of what the chunk holds of the recording, of motion that of the whole chunk.
        """
        length = min(clip_samples, total_samples - start) if self.role == "object" else clip_samples
        return (start + length // 2) / rate_hz


@dataclass(frozen=True)
class VisualTimeline:
    """What is known of one video, as arrays, memory maps or open files.

    ``object`` uint8 [n, 3, H, W] frames at ``object_rate_hz``, ``motion`` uint8 [m, c, h, w] at ``motion_rate_hz``;
    frame i covers the seconds [i, i + 1) / rate. ``features``: by name, object features [n, D] (one row a frame,
    at ``object_rate_hz``) or motion features [D, T] (one sequence for the whole video). ``moves``: False of a picture
    that is held, whose motion says nothing. ``where`` names the video in error messages.
    """

    object: Array | None = None
    motion: Array | None = None
    object_rate_hz: float = 1.0
    motion_rate_hz: float = 8.0
    features: Mapping[str, Array] = field(default_factory=dict)
    where: str = "the video"
    moves: bool = True

    def read(self, source: VisualSource, centre_s: float, duration_s: float, *, copy: bool = True) -> Array:
        """Cut what ``source`` asks for around ``centre_s``, ``duration_s`` seconds long.

        Returns uint8 [K, 3, H, W] (object frames: ``source.frames`` consecutive ones, the middle one covers
        ``centre_s``), float32 [K, D] (object features, likewise), uint8 [M, c, h, w] (motion frames: M =
        round(duration_s * rate) from round((centre_s - duration_s / 2) * rate) on, at the source's rate where it has
        one: each the frame that is there at its middle) or float32 [D, T] (motion features). Beyond the ends the border
        frame repeats. Without ``copy`` what is given may be a view of the
        memory map, not to be written to.

        Raises :class:`DataError` when the video lacks the kind or the feature, or the width differs.
        """
        if source.kind == "frames":
            array = {"object": self.object, "motion": self.motion}.get(source.role)
            if array is None:
                raise DataError(f"{self.where} has no {source.role} frames; it has {self._has()}")
            if source.role == "motion":
                rate_hz = source.rate_hz or self.motion_rate_hz
                count = max(1, _round(duration_s * rate_hz))
                first = _round((centre_s - duration_s / 2) * rate_hz)
                if rate_hz == self.motion_rate_hz:
                    return _clamped(array, first, count, copy)  # [M, c, h, w]
                middles_s = (np.arange(first, first + count) + 0.5) / rate_hz
                index = np.floor(middles_s * self.motion_rate_hz + 1e-9).astype(np.int64)
                return _picked(array, np.clip(index, 0, len(array) - 1))
            return self._around(array, source, centre_s, copy)  # [K, 3, H, W]
        if source.kind != "features":
            raise DataError(f"a visual source is of kind frames or features, not '{source.kind}'")
        if source.name not in self.features:
            raise DataError(
                f"{self.where} has no features '{source.name}'; it has {self._has()}: add them (avsep.data.store.files."
                f"add_features), or use a separator whose {source.role}_encoder takes what there is"
            )
        array = self.features[source.name]
        width = array.shape[1] if source.role == "object" else array.shape[0]
        if source.dim and width != source.dim:
            raise DataError(
                f"{self.where}: features '{source.name}' are {width} wide, but the separator takes {source.dim}: use "
                f"the extractor that it was trained with"
            )
        if source.role == "object":
            return self._around(array, source, centre_s, False).astype(np.float32)  # [K, D]
        return np.array(array, dtype=np.float32)  # [D, T]

    def _around(self, array: Array, source: VisualSource, centre_s: float, copy: bool) -> Array:
        count = max(1, source.frames)
        middle = math.floor(centre_s * self.object_rate_hz + 1e-9)
        return _clamped(array, middle - count // 2, count, copy)

    def _has(self) -> str:
        kinds = [f"{name} frames" for name in ("object", "motion") if getattr(self, name) is not None]
        kinds += [f"features '{name}'" for name in self.features]
        return ", ".join(kinds) or "nothing to see"


def _round(value: float) -> int:
    """Halves go up, unlike Python's round, so that neighbouring crops are cut alike."""
    return math.floor(value + 0.5)


def _clamped(array: Array, first: int, count: int, copy: bool) -> Array:
    """``count`` rows of ``array`` from ``first`` on, the border row standing for those beyond the ends."""
    low, high = max(first, 0), min(first + count, len(array))
    if high - low == count:
        return np.array(array[low:high]) if copy else array[low:high]
    return _picked(array, np.clip(np.arange(first, first + count), 0, len(array) - 1))


def _picked(array: Array, index: Array) -> Array:
    """The rows of an array at the places ``index``, which rise."""
    start = int(index[0])
    picked: Array = np.asarray(array[start : int(index[-1]) + 1])[index - start]
    return picked


def write_visual_file(path: str | Path, timelines: Mapping[str, VisualTimeline]) -> None:
    """Write what ``avsep separate --features`` reads: a plain .npz, by class name.

    Keys: ``CLASS/object``, ``CLASS/motion``, ``CLASS/object_rate_hz``, ``CLASS/motion_rate_hz`` and
    ``CLASS/features/NAME``.
    """
    if not timelines:
        raise DataError(f"{path}: there is no clip to write frames or features of: name at least one")
    arrays: dict[str, Any] = {}
    for name, timeline in timelines.items():
        if not name or "/" in name:
            raise DataError(f"'{name}' cannot be a class name in a visual file: it is empty or holds a slash")
        if timeline.object is not None:
            arrays[f"{name}/object"] = np.asarray(timeline.object)
        if timeline.motion is not None:
            arrays[f"{name}/motion"] = np.asarray(timeline.motion)
        for rate_hz in (timeline.object_rate_hz, timeline.motion_rate_hz):
            if not is_rate(rate_hz):
                raise DataError(f"'{name}': {rate_hz} frames a second cannot be: at most {MOST_RATE_HZ:g} are read")
        arrays[f"{name}/object_rate_hz"] = np.float64(timeline.object_rate_hz)
        arrays[f"{name}/motion_rate_hz"] = np.float64(timeline.motion_rate_hz)
        for feature, array in timeline.features.items():
            arrays[f"{name}/features/{feature}"] = np.asarray(array)
    if (total := sum(np.asarray(array).nbytes for array in arrays.values())) > _MOST_BYTES - (1 << 20):
        raise DataError(
            f"{path} would hold {total / 1e6:.0f} MB of frames and features, more than the {_MOST_BYTES / 1e6:.0f} MB "
            "that are read again: write fewer clips, or smaller or shorter ones"
        )
    target = Path(path)
    # a file object: numpy would append .npz to another suffix
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_visual_file(path: str | Path) -> dict[str, VisualTimeline]:
    """Read a file of :func:`write_visual_file`; returns the timelines by class name, in the file's order.

    Raises :class:`DataError` when it is missing, damaged or of over 1 GiB unpacked, or an array has a wrong shape or
    type. Nothing is unpacked before that is known of all of its arrays.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, false for a name that no file can have
        raise DataError(
            f"no such file: {path}; make one with avsep data features STORE --clips ID,ID --out {path.name}"
        )
    found: dict[str, dict[str, Any]] = {}
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                raise DataError(f"{path} holds one bare array, not a visual file (.npz with CLASS/object, ...)")
        with Npz(path, _MOST_BYTES) as arrays:
            for key, header in arrays.headers.items():
                _check_entry(path, key, header)
            for key in arrays.headers:
                name, _, rest = key.partition("/")
                shown = one_line(key, 100)
                entry = found.setdefault(name, {"features": {}, "where": f"{path.name}: '{one_line(name, 100)}'"})
                array = arrays.read(key)
                if rest in ("object", "motion"):
                    entry[rest] = array
                elif rest in _RATES:
                    entry[rest] = float(array.reshape(-1)[0])
                    if not is_rate(entry[rest]):
                        raise DataError(f"{path}: {shown} must be one positive number, at most {MOST_RATE_HZ:g}")
                else:
                    if not np.isfinite(array).all():
                        raise DataError(f"{path}: {shown} must be of finite numbers: it holds NaN or infinity")
                    entry["features"][rest.removeprefix("features/")] = array
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        reason = one_line(error, 200)
        raise DataError(f"{path} is not a readable visual file (.npz): {reason}; write it again") from None
    timelines = {name: VisualTimeline(**entry) for name, entry in found.items()}
    if not timelines:
        raise DataError(f"{path} is an empty visual file")
    return timelines


_RATES = ("object_rate_hz", "motion_rate_hz")


def is_rate(value: object) -> bool:
    """Whether frames or features can come at this rate (in a second)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MOST_RATE_HZ


def _check_entry(path: Path, key: str, header: ArrayHeader) -> None:
    """Refuse what has no place in a visual file, by its name, type and shape."""
    shown = one_line(key, 100)
    _, _, rest = key.partition("/")
    kind, shape = header.dtype.kind, header.shape
    if rest in ("object", "motion"):
        if len(shape) != 4 or 0 in shape or header.dtype != np.uint8:
            raise DataError(f"{path}: {shown} must be uint8 [frames, channels, height, width], not {header}")
        if rest == "object" and shape[1] != 3:
            raise DataError(f"{path}: {shown} has {shape[1]} channels, not 3")
    elif rest in _RATES:
        if math.prod(shape) != 1 or kind not in "fiu":
            raise DataError(f"{path}: {shown} must be one positive number, not {header}")
    elif rest.startswith("features/") and rest != "features/":
        if len(shape) != 2 or 0 in shape or kind != "f":
            raise DataError(f"{path}: {shown} must be a non-empty matrix of finite numbers, not {header}")
    else:
        raise DataError(f"{path}: unknown entry '{shown}'; entries are CLASS/object, CLASS/motion, CLASS/features/NAME")

"""From a video to what a separator looks at: objects over time, and their frames or features by source.

Frames are taken at the rates of a store (1 a second of an object, 8 grey ones of its movement, or as many as the
separator takes), cut out by the object's box, and brought to one size. torch is loaded only where features are
extracted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import DataError
from avsep.media.detection import (
    THRESHOLD,
    WHOLE_FRAME,
    BoxTrack,
    Detector,
    Found,
    find_objects,
    find_several,
    follow,
)
from avsep.media.timeline import VisualTimeline
from avsep.media.video import cut_frame, iter_frames, probe
from avsep.types import VisualSource

if TYPE_CHECKING:
    from avsep.encoders.base import VisualEncoder
    from avsep.registry import ComponentSpec

__all__ = [
    "MOTION_RATE_HZ",
    "OBJECT_RATE_HZ",
    "Encoders",
    "extractors",
    "sample_frames",
    "timelines_of_video",
    "track_objects",
    "whole_frame",
]

OBJECT_RATE_HZ, MOTION_RATE_HZ = 1.0, 8.0
SIZES = {"object": (112, 112), "motion": (48, 48)}  # height and width in pixels, as in the offline benchmark
_TOGETHER = 8  # frames that the detector is given at once

# Called with how many frames are done, and of about how many.
Report = Callable[[int, int], None]


def whole_frame(classes: Sequence[str]) -> BoxTrack:
    """Every class is the whole frame, at all times."""
    return BoxTrack({name: [(0.0, Found((0.0, 0.0, 1.0, 1.0), 0.0, WHOLE_FRAME))] for name in classes})


def sample_frames(path: str | os.PathLike[str], most: int = 12) -> list[NDArray[np.uint8]]:
    """At most ``most`` frames [3, H, W] spread over a video."""
    seconds = max(probe(path).duration_s, 1.0)
    frames = []
    for frame in iter_frames(path, most / seconds):
        frames.append(frame)
        if len(frames) == most:
            break
    return frames


def track_objects(
    path: str | os.PathLike[str],
    classes: Sequence[str] | Mapping[str, str],
    detector: Detector,
    *,
    every_s: float = 1.0,
    threshold: float = THRESHOLD,
    span: tuple[float, float] | None = None,
    report: Report | None = None,
) -> BoxTrack:
    """Look for the classes in a frame every ``every_s`` seconds (:func:`avsep.media.detection.find_objects`).

    A frame stands for the ``every_s`` seconds around it. Memory holds a few frames at a time. Of a ``span`` (two
    seconds) the seconds count from its beginning.

    Args:
        classes: names of classes; or, by the names of sources, their classes. Sources of one class are its surest
            objects, from left to right in the order of their names, and followed from there
            (:func:`avsep.media.detection.follow`).

    Raises:
        DataError: there is no video stream, or it cannot be decoded; or it shows fewer objects of a class than there
            are sources of it.
    """
    if not every_s > 0:
        raise ValueError(f"every_s must be above 0, got {every_s}")
    of = dict(classes) if isinstance(classes, Mapping) else {name: name for name in classes}
    named: dict[str, list[str]] = {}
    for name, class_name in of.items():
        named.setdefault(class_name, []).append(name)
    single = [class_name for class_name, names in named.items() if len(names) == 1]
    counts = {class_name: len(names) for class_name, names in named.items() if len(names) > 1}
    alone: list[tuple[float, dict[str, Found]]] = []
    several: list[tuple[float, dict[str, list[Found]]]] = []
    total = _about(path, 1 / every_s, span)
    group: list[NDArray[np.uint8]] = []

    def detect() -> None:
        times = [(len(alone) + k) * every_s for k in range(len(group))]
        found = find_objects(detector, group, single, threshold=threshold)
        if counts:
            more = find_several(detector, group, counts, threshold=threshold, others=found)
            several.extend(zip(times, more, strict=True))
        alone.extend(zip(times, found, strict=True))
        group.clear()
        if report is not None:
            report(len(alone), max(len(alone), total))

    for frame in iter_frames(path, 1 / every_s, span=span):
        group.append(frame)
        if len(group) == _TOGETHER:
            detect()
    if group:
        detect()
    entries = {}
    for class_name, names in named.items():
        if len(names) == 1:
            entries[names[0]] = [(second, objects[class_name]) for second, objects in alone]
            continue
        places = follow([(second, objects[class_name]) for second, objects in several], names)
        if places is None:
            seen = sum(len(objects[class_name]) >= len(names) for _, objects in several)
            raise DataError(
                f"{Path(path).name}: {len(names)} of {class_name} are asked for ({', '.join(names)}), and they are "
                f"found in {seen} of {len(several)} frames: give their boxes (--boxes)"
            )
        entries |= places
    return BoxTrack({name: entries[name] for name in of})


def extractors(role: str) -> dict[str, ComponentSpec[VisualEncoder]]:
    """The registered encoders that make features to be stored, by name: frozen ones of published weights."""
    from avsep.registry import VISUAL_ENCODERS

    return {spec.name: spec for spec in VISUAL_ENCODERS if role in spec.factory.extracts}


class Encoders:
    """Extractors of stored features, by their name, each made when it is first asked for.

    ``weights``: as the encoders' parameter of that name, for all or by name; ``device``: where they run.
    """

    def __init__(self, weights: str | Mapping[str, str] = "auto", device: Any = "cpu") -> None:
        self._weights = weights
        self._device = device
        self._made: dict[str, VisualEncoder] = {}

    def get(self, source: VisualSource) -> VisualEncoder:
        """The encoder that makes features of this name.

        Raises:
            DataError: there is none: the features come from elsewhere, and must be given.
            MissingWeightsError: its weights are not here and cannot be downloaded.
        """
        from avsep.registry import VISUAL_ENCODERS

        if source.name not in self._made:
            spec = extractors(source.role).get(source.name)
            if spec is None:
                raise DataError(
                    f"this separator looks at {source.role} features '{source.name}', which avsep has no extractor "
                    "for: give them with --features FILE.npz"
                )
            options = {}
            if "weights" in {p.name for p in spec.parameters}:
                weights = self._weights
                options["weights"] = weights if isinstance(weights, str) else weights.get(source.name, "auto")
            self._made[source.name] = VISUAL_ENCODERS.create(source.name, options).to(self._device)
        encoder = self._made[source.name]
        if source.dim and encoder.dim != source.dim:
            raise DataError(
                f"this separator takes features '{source.name}' that are {source.dim} wide, and the weights at hand "
                f"give {encoder.dim}: use those that it was trained with"
            )
        return encoder

    def object(self, source: VisualSource, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[3, h, w] -> [D]"""
        import torch

        with torch.inference_mode():
            frames = torch.from_numpy(crop)[None].to(self._device)
            features: torch.Tensor = self.get(source).encode(frames)[0]
            return features.float().cpu().numpy()

    def motion(self, source: VisualSource, crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """M frames [3, S, S] in order of time -> [D, T]"""
        import torch

        with torch.inference_mode():
            frames = torch.from_numpy(np.stack(crops))[None].to(self._device)
            features: torch.Tensor = self.get(source)(frames)[0]
            return features.float().cpu().numpy()


def timelines_of_video(
    path: str | os.PathLike[str],
    classes: Sequence[str],
    sources: Sequence[VisualSource],
    track: BoxTrack,
    *,
    encoders: Encoders | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    span: tuple[float, float] | None = None,
    report: Report | None = None,
) -> dict[str, VisualTimeline]:
    """What a separator's ``sources`` ask for of each of ``classes``, which are names of the ``track``, on the time axis
    of the video, or of a ``span`` of it.

    Frames are cut out by the boxes of ``track`` and brought to the heights and widths ``sizes`` by role. Features of a
    registered encoder's name are extracted by it: of an object, one row a second from what lies within the box, in its
    own shape; of movement, one sequence for the whole video, from as many frames as the encoder looks at.

    Raises:
        DataError: no video stream, a class without boxes, or features that no encoder here makes.
        MissingWeightsError: an encoder's weights are not here and cannot be downloaded.
    """
    if not sources:
        return {name: VisualTimeline() for name in classes}
    for name in classes:
        if name not in track.classes:
            raise DataError(f"there are no boxes of class '{name}': there are those of {', '.join(track.classes)}")
    made = encoders or Encoders()
    side = {**SIZES, **(sizes or {})}
    wanted = {(s.role, s.kind): s for s in sources}
    for source in sources:
        if source.kind == "features":
            made.get(source)  # what is missing shows before the video is decoded
    crops: dict[str, list[Any]] = {name: [] for name in classes}
    rows: dict[str, list[Any]] = {name: [] for name in classes}
    movement: dict[str, list[Any]] = {name: [] for name in classes}
    features: dict[str, dict[str, Any]] = {name: {} for name in classes}

    count = 0
    by_features, of_motion = wanted.get(("object", "features")), wanted.get(("motion", "features"))
    if by_features or of_motion or ("object", "frames") in wanted:
        for second, frame in _timed_frames(path, OBJECT_RATE_HZ, report, span):
            count += 1
            for name in classes:
                box = track.at(name, second)
                if ("object", "frames") in wanted:
                    crops[name].append(cut_frame(frame, box, side["object"]))
                if by_features:
                    rows[name].append(made.object(by_features, cut_frame(frame, box)))
    if of_motion:
        found = _motion_features(path, classes, track, made, of_motion, count, report, span)
        for name in classes:
            features[name][of_motion.name] = found[name]
    motion_rate_hz = MOTION_RATE_HZ
    if moving := wanted.get(("motion", "frames")):
        motion_rate_hz = moving.rate_hz or MOTION_RATE_HZ
        for second, frame in _timed_frames(path, motion_rate_hz, report, span, grey=True):
            for name in classes:
                movement[name].append(cut_frame(frame, track.at(name, second), side["motion"]))
    timelines = {}
    for name in classes:
        if by_features:
            features[name][by_features.name] = np.stack(rows[name])
        timelines[name] = VisualTimeline(
            object=np.stack(crops[name]) if crops[name] else None,
            motion=np.stack(movement[name]) if movement[name] else None,
            object_rate_hz=OBJECT_RATE_HZ,
            motion_rate_hz=motion_rate_hz,
            features=features[name],
            where=f"{Path(path).name}: '{name}'",
        )
    return timelines


def _motion_features(
    path: str | os.PathLike[str],
    classes: Sequence[str],
    track: BoxTrack,
    encoders: Encoders,
    source: VisualSource,
    count: int,
    report: Report | None,
    span: tuple[float, float] | None,
) -> dict[str, NDArray[np.float32]]:
    """Of each class the features of frames spread over all ``count`` ones, one a second."""
    from avsep.encoders.visual.videomae import spread_frames

    picked = set(spread_frames(count, encoders.get(source).frames).tolist())
    crops: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in classes}
    for number, (second, frame) in enumerate(_timed_frames(path, OBJECT_RATE_HZ, report, span)):
        if number in picked:
            for name in classes:
                crops[name].append(cut_frame(frame, track.at(name, second)))
    for name, parts in crops.items():
        if len({part.shape for part in parts}) > 1:  # a box that moves: one shape for all
            crops[name] = [cut_frame(part, (0.0, 0.0, 1.0, 1.0), (224, 224)) for part in parts]
    return {name: encoders.motion(source, crops[name]) for name in classes}


def _timed_frames(
    path: str | os.PathLike[str],
    rate_hz: float,
    report: Report | None,
    span: tuple[float, float] | None,
    grey: bool = False,
) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Frames with the middle of their time, reported as they come."""
    total = _about(path, rate_hz, span)
    for number, frame in enumerate(iter_frames(path, rate_hz, grey=grey, span=span)):
        yield (number + 0.5) / rate_hz, frame
        if report is not None:
            report(number + 1, max(number + 1, total))


def _about(path: str | os.PathLike[str], rate_hz: float, span: tuple[float, float] | None) -> int:
    """How many frames come, by what the file says of its length."""
    seconds = probe(path).duration_s
    if span is not None:
        seconds = min(seconds, span[1]) - span[0]
    return max(1, round(seconds * rate_hz))

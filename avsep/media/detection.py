"""Where the sounding objects are in a frame: an open-vocabulary detector, its prompts, and boxes over time.

The paper's detector (Detic) has no installable package; OWLv2 of the ``transformers`` library stands in for it. A class
is looked for by one prompt after the other, and each prompt finds its own box; where none does, the whole frame is the
object. torch is loaded by the detector alone.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ConfigError, DataError, MissingExtraError
from avsep.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.encoders.hub import HubModel

__all__ = [
    "GIVEN",
    "HELD",
    "PROMPTS",
    "THRESHOLD",
    "WHOLE_FRAME",
    "Box",
    "BoxTrack",
    "Detector",
    "Found",
    "OWLv2Detector",
    "find_objects",
    "find_several",
    "follow",
    "owlv2_hub",
    "prepare_square",
    "propose_classes",
    "read_boxes",
]

Frame = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom as fractions of the frame's width and height."""

THRESHOLD = 0.1
PROMPTS = ("a {class}", "a person playing the {class}", "a musical instrument")
"""Tried in this order; the first is the paper's."""
WHOLE_FRAME = "whole frame"
GIVEN = "given"
HELD = "not found, as before"
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_SAME_OBJECT = 0.5  # boxes that overlap more (intersection over union) are of one object
_APART = 0.3  # boxes of two objects of one class overlap no more
_INSIDE = 0.7  # a box of which more lies within another is a part of that object
_SHARE = 1 / 3  # of the frames in which something must be seen to be there


@dataclass(frozen=True)
class Found:
    """An object: its box, the detector's score, and the rule that applied: a prompt, ``whole frame`` or ``given``."""

    box: Box
    score: float
    rule: str


class Detector(Protocol):
    """What looks for objects."""

    def best(self, frames: Sequence[Frame], prompts: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The best box of each prompt in each frame [3, H, W]: scores [n, Q] in 0..1 and boxes [n, Q, 4], corners as
        :data:`Box`. A score does not depend on the other prompts."""

    def several(
        self, frames: Sequence[Frame], prompts: Sequence[str], most: int, threshold: float
    ) -> list[list[list[tuple[float, Box]]]]:
        """Of each frame and prompt up to ``most`` boxes of different objects (:func:`keep_apart`) that score at least
        ``threshold``, with their scores, the surest first. Asked only where several of one class are looked for."""


def prompt_of(template: str, class_name: str) -> str:
    return template.replace("{class}", class_name.replace("_", " "))


def find_objects(
    detector: Detector,
    frames: Sequence[Frame],
    classes: Sequence[str],
    *,
    threshold: float = THRESHOLD,
    prompts: Sequence[str] = PROMPTS,
) -> list[dict[str, Found]]:
    """The object of each class in each frame.

    Of each class the ``prompts`` are tried in order, and the best box of the first one that scores at least
    ``threshold`` is taken; where none does, the whole frame. A prompt that does not name the class may not take an
    object that another class was found at by its name.

    Returns:
        For each frame the objects by class, in the order of ``classes``.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in 0..1, got {threshold}")
    queries = list(dict.fromkeys(prompt_of(p, name) for name in classes for p in prompts))
    if not frames or not queries:
        return [{name: Found(_WHOLE, 0.0, WHOLE_FRAME) for name in classes} for _ in frames]
    scores, boxes = detector.best(frames, queries)
    places = {prompt: k for k, prompt in enumerate(queries)}
    found = []
    for score, box in zip(scores, boxes, strict=True):
        objects: dict[str, Found] = {}
        for template in prompts:
            named = [o.box for o in objects.values()]
            for name in classes:
                k = places[prompt_of(template, name)]
                place = _box(box[k])
                taken = "{class}" not in template and any(overlap(place, other) > _SAME_OBJECT for other in named)
                if name not in objects and score[k] >= threshold and not taken:
                    objects[name] = Found(place, float(score[k]), queries[k])
        found.append({name: objects.get(name, Found(_WHOLE, 0.0, WHOLE_FRAME)) for name in classes})
    return found


def find_several(
    detector: Detector,
    frames: Sequence[Frame],
    counts: Mapping[str, int],
    *,
    threshold: float = THRESHOLD,
    prompts: Sequence[str] = PROMPTS,
    others: Sequence[Mapping[str, Found]] = (),
) -> list[dict[str, list[Found]]]:
    """Several objects of each class in each frame.

    Of each class the ``prompts`` that name it are tried in order, and the first one with as many boxes as ``counts``
    says is taken, or the one with the most. A box belongs to the class that scores highest there.

    Args:
        counts: by class, how many are looked for.
        others: for each frame the objects found of other classes (:func:`find_objects`).

    Returns:
        For each frame the objects by class, the surest first: as many as there are, at most as many as are looked for.
    """
    templates = [template for template in prompts if "{class}" in template]
    queries = [prompt_of(template, name) for name in counts for template in templates]
    most = sum(counts.values()) + max((len(one) for one in others), default=0)
    seen = detector.several(frames, queries, most, threshold)
    found = []
    for n, of_frame in enumerate(seen):
        boxes = dict(zip(queries, of_frame, strict=True))
        named = [o for o in others[n].values() if o.rule != WHOLE_FRAME] if others else []
        best: dict[str, list[Found]] = {name: [] for name in counts}
        for template in templates:
            ranked = [(score, name, box) for name in counts for score, box in boxes[prompt_of(template, name)]]
            here: dict[str, list[Found]] = {name: [] for name in counts}
            taken = [(o.box, o.score, "") for o in named]
            for score, name, box in sorted(ranked, key=lambda r: -r[0]):
                if any(of != name and s > score and overlap(box, place) > _SAME_OBJECT for place, s, of in taken):
                    continue
                if len(here[name]) < counts[name]:
                    here[name].append(Found(box, score, prompt_of(template, name)))
                    taken.append((box, score, name))
            for name, objects in here.items():
                if len(objects) > len(best[name]):
                    best[name] = objects
        found.append(best)
    return found


def follow(
    frames: Sequence[tuple[float, Sequence[Found]]], names: Sequence[str]
) -> dict[str, list[tuple[float, Found]]] | None:
    """Which object is whose over time: ``names`` go from left to right in the first frame that shows all of them, and
    from there each goes to the object nearest to where it was. Where fewer are found, the others stay where they are.

    Args:
        frames: seconds, each with the objects that are seen then (:func:`find_several`).

    Returns:
        (second, object) by name; None where less than a third of the frames shows all of them.
    """
    whole = [n for n, (_, objects) in enumerate(frames) if len(objects) >= len(names)]
    if not whole or len(whole) < _SHARE * len(frames):
        return None
    first = whole[0]
    ordered = sorted(frames[first][1][: len(names)], key=lambda o: _centre(o.box))
    last = dict(zip(names, ordered, strict=True))
    entries: dict[str, list[tuple[float, Found]]] = {name: [] for name in names}
    for number, (second, objects) in enumerate(frames):
        now: dict[str, Found] = {}
        if number >= first:
            pairs = [
                (math.dist(_centre(last[name].box), _centre(o.box)), name, k)
                for name in names
                for k, o in enumerate(objects)
            ]
            taken: set[int] = set()
            for _, name, k in sorted(pairs):
                if name not in now and k not in taken:
                    now[name] = objects[k]
                    taken.add(k)
        for name in names:
            entries[name].append((second, now.get(name) or Found(last[name].box, 0.0, HELD)))
        last |= now
    return entries


def keep_apart(ranked: Iterable[tuple[float, Box]], most: int) -> list[tuple[float, Box]]:
    """The first ``most`` boxes of different objects: their intersection over union is at most 0.3, and none lies
    mostly within another. ``ranked``: scores and boxes, the surest first."""
    kept: list[tuple[float, Box]] = []
    for score, box in ranked:
        if len(kept) == most:
            break
        if all(overlap(box, other) <= _APART and _within(box, other) <= _INSIDE for _, other in kept):
            kept.append((score, box))
    return kept


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def propose_classes(
    detector: Detector,
    frames: Sequence[Frame],
    known: Sequence[str],
    *,
    threshold: float = THRESHOLD,
    share: float = _SHARE,
) -> list[str]:
    """The classes among the ``known`` that are seen in at least a ``share`` of the frames, the surest first.

    They are looked for by their names alone. Of two classes found at one place (boxes that overlap by more than half)
    the better scored one counts.
    """
    total = dict.fromkeys(known, 0.0)
    seen = dict.fromkeys(known, 0)
    scores, boxes = detector.best(frames, [prompt_of(PROMPTS[0], name) for name in known])
    for score, box in zip(scores, boxes, strict=True):
        kept: list[Box] = []
        for k in np.argsort(-np.asarray(score), kind="stable"):
            place = _box(box[k])
            if score[k] < threshold or any(overlap(place, other) > _SAME_OBJECT for other in kept):
                continue
            kept.append(place)
            total[known[k]] += float(score[k])
            seen[known[k]] += 1
    chosen = [name for name in known if seen[name] and seen[name] >= share * len(frames)]
    return sorted(chosen, key=lambda name: -total[name])


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, 0..1."""
    shared = _shared(a, b)
    return shared / (_area(a) + _area(b) - shared) if shared else 0.0


def _within(a: Box, b: Box) -> float:
    """How much of the smaller one lies within the other, 0..1."""
    shared = _shared(a, b)
    return shared / min(_area(a), _area(b)) if shared else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _box(values: Any) -> Box:
    left, top, right, bottom = (float(v) for v in values)
    return left, top, right, bottom


# --- OWLv2 ------------------------------------------------------------------------------------------------------------

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_GREY = 0.5  # as the authors pad (google-research/scenic); transformers pads with black


def prepare_square(frame: Tensor, size: int, *, fill: float = _GREY) -> Tensor:
    """A frame [3, H, W] (uint8) as OWLv2 takes it: [3, size, size], filled up to a square at the right and the
    bottom, smoothed before it is made smaller, its colours normalised."""
    import torch
    import torch.nn.functional as F

    side = max(frame.shape[-2:])
    x = frame.float() / 255.0
    x = F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2]), value=fill)[:, None]  # [3, 1, side, side]
    sigma = (side / size - 1) / 2  # scikit-image's choice, which the published preprocessing follows
    if sigma > 0:
        radius = min(int(4 * sigma + 0.5), side - 1)
        steps = torch.arange(-radius, radius + 1, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
        kernel = kernel / kernel.sum()
        x = F.conv2d(F.pad(x, (0, 0, radius, radius), mode="reflect"), kernel[None, None, :, None])
        x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="reflect"), kernel[None, None, None, :])
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))
    return (x - mean) / std


def owlv2_hub() -> HubModel:
    """Where OWLv2's weights are published."""
    from avsep.encoders.hub import HubModel

    return HubModel("google/owlv2-base-patch16-ensemble", "cfd3195ba4ea9592eec887ded089f4c08eff231d", "Apache-2.0")


class OWLv2Detector:
    """OWLv2 base (ensemble), which finds what a text names; needs the extra ``vision``.

    ``weights`` is a folder of them or ``auto`` (``AVSEP_WEIGHTS``, the hub's cache, a download at a pinned revision);
    ``batch`` frames go through the network at once. Source: Minderer et al., Scaling Open-Vocabulary Object Detection,
    NeurIPS 2023.

    Raises:
        MissingExtraError: without the ``transformers`` library.
        MissingWeightsError: where the weights are not here and cannot be downloaded.
        CheckpointError: where they, or the tokenizer's files, are of something else.
    """

    def __init__(self, *, weights: str | os.PathLike[str] = "auto", batch: int = 4, device: Any = "cpu") -> None:
        try:
            import transformers
        except ImportError:
            raise MissingExtraError("transformers", "vision", "finding objects") from None
        from avsep.encoders.visual._pretrained import read_weights
        from avsep.errors import CheckpointError

        if batch < 1:
            raise ValueError(f"batch must be positive, got {batch}")
        self.hub = owlv2_hub()
        self.batch = batch
        folder = self.hub.locate(weights)
        kind = transformers.Owlv2ForObjectDetection
        model = read_weights(kind, transformers.Owlv2Config.from_pretrained(folder), folder)
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.device = device
        try:
            if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
                raise FileNotFoundError("no tokenizer.json")  # transformers would make an empty one
            self._tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a missing or damaged file raises
            raise CheckpointError(
                f"{folder} has no readable tokenizer ({type(error).__name__}: {' '.join(str(error).split())[:120]}): "
                f"fetch it again with '{self.hub.command()}'"
            ) from None

    @property
    def size(self) -> int:
        """The side of the square that the model looks at, in pixels."""
        return int(self.model.config.vision_config.image_size)

    def _tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[Q, T] ids and their mask, filled up with zeros as published."""
        import torch

        length = int(self.model.config.text_config.max_position_embeddings)
        rows = self._tokenizer(list(prompts), truncation=True, max_length=length)["input_ids"]
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
            mask[k, : len(row)] = 1
        return ids.to(self.device), mask.to(self.device)

    def best(self, frames: Sequence[Frame], prompts: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """As :meth:`Detector.best`; a place that lies beyond the frame, in what fills it up, is no object."""
        scores: list[NDArray[Any]] = []
        boxes: list[NDArray[Any]] = []
        for chance, inside in self._places(frames, prompts):
            top = chance.argmax(dim=0)  # [Q]
            scores.append(chance.gather(0, top[None])[0].numpy())
            boxes.append(inside[top].numpy())
        return np.stack(scores), np.stack(boxes)

    def several(
        self, frames: Sequence[Frame], prompts: Sequence[str], most: int, threshold: float
    ) -> list[list[list[tuple[float, Box]]]]:
        """As :meth:`Detector.several`; places as :meth:`best`'s."""
        found = []
        for chance, inside in self._places(frames, prompts):
            ranked = chance.sort(dim=0, descending=True, stable=True)
            of_frame = []
            for k in range(len(prompts)):
                sure = int((ranked.values[:, k] >= threshold).sum())
                scores, boxes = ranked.values[:sure, k].tolist(), inside[ranked.indices[:sure, k]].tolist()
                of_frame.append(keep_apart(zip(scores, map(_box, boxes), strict=True), most))
            found.append(of_frame)
        return found

    def _places(self, frames: Sequence[Frame], prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each frame the score of every prompt at every place [places, Q], and the places' boxes [places, 4]."""
        import torch

        ids, mask = self._tokens(prompts)
        for first in range(0, len(frames), self.batch):
            group = frames[first : first + self.batch]
            ready = torch.stack([prepare_square(torch.from_numpy(np.ascontiguousarray(p)), self.size) for p in group])
            with torch.inference_mode():
                output = self.model(
                    input_ids=ids.repeat(len(group), 1),
                    attention_mask=mask.repeat(len(group), 1),
                    pixel_values=ready.to(self.device),
                )
            likely = output.logits.float().sigmoid().cpu()  # [b, places, Q]
            centre, extent = output.pred_boxes.float().cpu().split(2, dim=-1)
            for frame, chance, corners in zip(
                group, likely, torch.cat((centre - extent / 2, centre + extent / 2), dim=-1), strict=True
            ):
                height, width = frame.shape[-2:]
                scale = torch.tensor([max(height, width) / width, max(height, width) / height]).repeat(2)
                inside = (corners * scale).clamp(0.0, 1.0)  # [places, 4]; boxes are relative to the square
                there = ((inside[:, 2:] - inside[:, :2]) * torch.tensor([width, height]) >= 1).all(dim=-1)
                yield chance.masked_fill(~there[:, None], 0.0), inside


# --- boxes over time --------------------------------------------------------------------------------------------------


class BoxTrack:
    """The objects of each source over time. One holds until the next of its source; the first holds before, too.

    ``entries``: by the source's name, which is its class's or one of its own, (second, object) in order of time.
    ``classes`` are these names.
    """

    def __init__(self, entries: Mapping[str, Sequence[tuple[float, Found]]]) -> None:
        self.entries = {name: tuple(sorted(track, key=lambda e: e[0])) for name, track in entries.items()}
        self._times = {name: [second for second, _ in track] for name, track in self.entries.items()}

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def at(self, class_name: str, time_s: float) -> Box:
        """The box of a class at a moment."""
        track = self.entries[class_name]
        return track[max(bisect.bisect_right(self._times[class_name], time_s + 1e-9) - 1, 0)][1].box

    def rules(self, class_name: str) -> dict[str, int]:
        """How often each rule applied."""
        counts: dict[str, int] = {}
        for _, found in self.entries[class_name]:
            counts[found.rule] = counts.get(found.rule, 0) + 1
        return counts

    def changes(self, class_name: str) -> list[tuple[float, Box]]:
        """The seconds from which a class has another box, with it."""
        track = [(second, found.box) for second, found in self.entries[class_name]]
        return track[:1] + [entry for before, entry in itertools.pairwise(track) if entry[1] != before[1]]

    def as_json(self) -> str:
        """As :func:`read_boxes` reads it; a box that does not change is not repeated."""
        seconds: dict[float, dict[str, list[float]]] = {}
        for name in self.entries:
            for second, box in self.changes(name):
                seconds.setdefault(second, {})[name] = [round(v, 4) for v in box]
        lines = [f'"{second:g}": {json.dumps(seconds[second])}' for second in sorted(seconds)]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def read_boxes(path: str | os.PathLike[str]) -> BoxTrack:
    """Read boxes over time: JSON of seconds, each with boxes by class, or by the name of a source.

    ``{"0": {"violin": [0.05, 0.1, 0.45, 0.9], "flute": [0.5, 0, 1, 1]}, "12.5": {"violin": [...]}}``: left, top, right
    and bottom as fractions of the upright frame's width and height. A box holds until the next of its name. Edges up
    to 0.05 beyond the frame are cut.

    Raises:
        DataError: the file is missing or no such JSON, or a box is empty or outside the frame.
    """
    file = Path(path)
    try:
        data = read_json(file)
    except ConfigError as error:
        raise DataError(str(error)) from None
    form = '{"0": {"violin": [left, top, right, bottom]}, ...}'
    if not isinstance(data, dict) or not data:
        raise DataError(f"{file} holds no boxes: write seconds with boxes by class, {form}")
    entries: dict[str, list[tuple[float, Found]]] = {}
    for key, boxes in data.items():
        try:
            second = float(key)
        except ValueError:
            second = math.nan
        if not (math.isfinite(second) and second >= 0) or not isinstance(boxes, dict):
            raise DataError(f"{file}: '{key}' is not a second with its boxes: write {form}")
        for name, values in boxes.items():
            entries.setdefault(name, []).append((second, Found(_given(file, name, key, values), 1.0, GIVEN)))
    if not entries:
        raise DataError(f"{file} holds no boxes: write seconds with boxes by class, {form}")
    return BoxTrack(entries)


def _given(file: Path, name: str, key: str, values: Any) -> Box:
    where = f"{file}: the box of '{name}' at {key} s"
    numbers = isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not numbers or len(values) != 4:
        raise DataError(f"{where} is {json.dumps(values)[:60]}: write [left, top, right, bottom]")
    if not all(-0.05 <= v <= 1.05 for v in values):
        raise DataError(
            f"{where}, {values}, lies outside the frame: give fractions of its width and height, from 0 to 1"
        )
    left, top, right, bottom = (min(max(float(v), 0.0), 1.0) for v in values)
    if right <= left or bottom <= top:
        raise DataError(
            f"{where}, {values}, is empty: write [left, top, right, bottom] with left < right, top < bottom"
        )
    return left, top, right, bottom

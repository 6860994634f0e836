"""Stores made of clips of other stores: whole, or as the crops that a memory keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avsep.data.store.files import Clip, Store, StoreWriter
from avsep.data.store.parts import joined_parts
from avsep.errors import DataError
from avsep.spec import FrontEndSpec
from avsep.types import VisualSource

__all__ = ["Selected", "sizes_of", "write_selection"]

_OWN = ("id", "class", "split", "samples", "files", "parts", "rows")


@dataclass(frozen=True)
class Selected:
    """A clip of ``store`` under an id of the new one. ``starts``: the first samples of the crops that are kept of it;
    None: all of it is kept."""

    store: Store
    clip: Clip
    id: str
    starts: tuple[int, ...] | None = None


def write_selection(
    path: Path,
    selected: Sequence[Selected],
    *,
    classes: Sequence[str],
    sources: Sequence[VisualSource],
    front_end: FrontEndSpec,
    origin: Mapping[str, Any],
    licence: str = "",
) -> Store:
    """Write the clips, in this order, with what a separator with these visual ``sources`` reads of them.

    A killed call is continued by the same one, and a finished store is returned as it is.

    Raises:
        DataError: the stores' rates differ, or one lacks what a source asks for.
    """
    first = next((s.store for s in selected if s.store.has_pictures(s.clip)), selected[0].store)
    for other in {id(s.store): s.store for s in selected}.values():
        rates = [(s.sample_rate_hz, s.object_rate_hz, s.motion_rate_hz) for s in (other, first)]
        count = 3 if sources and other.shows_anything else 1  # a sound without pictures has no rate of frames
        if rates[0][:count] != rates[1][:count]:
            raise DataError(
                f"{other.path} holds sound, object and motion at {', '.join(f'{r:g}' for r in rates[0])} Hz, and "
                f"{first.path} at {', '.join(f'{r:g}' for r in rates[1])} Hz: make the store at those rates"
            )
    roles = {s.name: s.role for s in sources if s.kind == "features"}
    with StoreWriter(
        path,
        classes=classes,
        sample_rate_hz=first.sample_rate_hz,
        object_rate_hz=first.object_rate_hz,
        motion_rate_hz=first.motion_rate_hz,
        origin=origin,
        licence=licence,
    ) as writer:
        if writer.finished:
            return Store.open(path)
        for one in selected:
            if not writer.is_done(one.id):
                _write(writer, one, sources, front_end)
        return writer.finish([one.id for one in selected], roles=roles)


def _write(writer: StoreWriter, one: Selected, sources: Sequence[VisualSource], front_end: FrontEndSpec) -> None:
    store, clip = one.store, one.clip
    entry = store.manifest["clips"][clip.index]
    about = {key: value for key, value in entry.items() if key not in _OWN}
    starts = one.starts
    timeline = store.timeline(clip)
    arrays: dict[str, Any] = {}
    if not (store.shows_anything and store.has_pictures(clip)):
        sources = ()
    for source in sources:
        kind = source.role if source.kind == "frames" else f"features/{source.name}"
        array = {"object": timeline.object, "motion": timeline.motion}.get(kind, timeline.features.get(source.name))
        if array is None:
            store.read_visual(clip, source, centre_s=0.0, duration_s=1.0)  # raises, naming what there is
        arrays[kind] = array
    if starts is None:
        audio = store.read_pcm(clip, 0, clip.samples)
        kept = {kind: np.asarray(array[:]) for kind, array in arrays.items()}
    else:
        length = min(clip.samples, front_end.clip_samples)
        parts = {"audio": joined_parts((start, length) for start in starts)}
        audio = np.concatenate([store.read_pcm(clip, begin, count) for begin, count in parts["audio"]])
        kept = {}
        for source in sources:
            kind = source.role if source.kind == "frames" else f"features/{source.name}"
            if source.kind == "features" and source.role == "motion":
                kept[kind] = np.asarray(arrays[kind][:])  # one sequence, which every crop takes whole
                continue
            asked = _Asked(arrays[kind])
            given = {"features": {source.name: asked}} if source.kind == "features" else {source.role: asked}
            for start in starts:
                centre_s = (start + front_end.clip_samples // 2) / front_end.sample_rate_hz
                dataclasses.replace(timeline, **given).read(source, centre_s, front_end.clip_s)
            parts[kind] = joined_parts(asked.runs)
            kept[kind] = np.concatenate([np.asarray(arrays[kind][a : a + n]) for a, n in parts[kind]])
        about |= {
            "samples": clip.samples,
            "parts": parts,
            "rows": {kind: len(arrays[kind]) for kind in parts if kind != "audio"},
        }
    writer.write_clip(
        one.id,
        clip.class_name,
        clip.split,
        audio,
        object_frames=kept.get("object"),
        motion_frames=kept.get("motion"),
        features={k.removeprefix("features/"): v for k, v in kept.items() if k.startswith("features/")},
        about=about,
    )


class _Asked:
    """An array that notes which of its rows are read."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype
        self.runs: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(len(self))
        self.runs.append((first, last - first))
        return np.asarray(self._array[rows])


def sizes_of(store: Store, clips: Iterable[Clip]) -> int:
    """The bytes of samples, frames and features of clips, without the headers of files."""
    total = 0
    for clip in clips:
        entry = store.manifest["clips"][clip.index]
        total += 2 * sum(count for _, count in store.kept_samples(clip))
        timeline = store.timeline(clip)
        for kind in entry["files"]:
            if kind == "audio":
                continue
            array = {"object": timeline.object, "motion": timeline.motion}.get(
                kind, timeline.features.get(kind.removeprefix("features/"))
            )
            assert array is not None
            parts = entry.get("parts", {}).get(kind)
            rows = len(array) if parts is None else sum(count for _, count in parts)
            total += rows * int(np.prod(array.shape[1:])) * array.dtype.itemsize
    return total

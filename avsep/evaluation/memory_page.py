"""One HTML page of the exemplars that a run carries: to hear and to see, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from avsep.data.store import Clip, Store
from avsep.evaluation.drawing import PAGE_BYTES, SignalView, page_environment

__all__ = ["render_memory"]

_MOST_SECONDS = 20.0  # that are heard of one exemplar


@dataclass(frozen=True)
class _Shown:
    id: str
    signal: SignalView
    gain: float
    caption: str
    frame: np.ndarray | None


@dataclass(frozen=True)
class _Group:
    class_name: str
    note: str
    shown: Sequence[_Shown]


@dataclass(frozen=True)
class _Page:
    title: str
    lead: str
    groups: Sequence[_Group]
    version: str


def render_memory(title: str, store: Store, ids: dict[str, Sequence[str]]) -> str:
    """The page as one HTML text: of each class the recordings ``ids`` of a store, or those parts of them that it has.

    Where the page would become larger than :data:`avsep.evaluation.drawing.PAGE_BYTES`, each class shows its first ones
    and says so.

    Raises MissingExtraError without jinja2 or matplotlib.
    """
    import avsep

    environment = page_environment(store.sample_rate_hz)
    room = int(PAGE_BYTES / (_MOST_SECONDS * store.sample_rate_hz * 2 * 4 / 3))  # players, at their largest
    each = max(1, room // max(1, len(ids)))
    groups = []
    for name, of_class in ids.items():
        clips = store.clips_by_id(list(of_class))
        note = f"{len(clips)} recordings" if len(clips) != 1 else "1 recording"
        note = "No exemplars." if not clips else f"Exemplars of {note}."
        if len(clips) > each:
            note += f" The first {each} are shown."
        groups.append(_Group(name, note, [_shown(store, clip) for clip in clips[:each]]))
    count = sum(map(len, ids.values()))
    lead = f"What the run remembers of {len(ids)} classes: exemplars of {count} recordings, from which it learns again."
    page = _Page(title, lead, groups, avsep.__version__)
    return str(environment.get_template("memory.html").render(page=page))


def _shown(store: Store, clip: Clip) -> _Shown:
    runs = store.kept_samples(clip)
    kept = sum(count for _, count in runs)
    sound = np.concatenate([store.read_audio(clip, first, count) for first, count in runs])
    most = int(_MOST_SECONDS * store.sample_rate_hz)
    loudest = float(np.abs(sound[:most]).max(initial=0.0))
    caption = f"{kept / store.sample_rate_hz:.1f} s"
    if kept < clip.samples:
        caption += f" of {clip.samples / store.sample_rate_hz:.1f} s are kept"
    if kept > most:
        caption += f"; the first {_MOST_SECONDS:.0f} are played"
    frames: Any = store.timeline(clip).object
    frames = getattr(frames, "kept", frames)
    frame = None if frames is None or not len(frames) else np.asarray(frames[len(frames) // 2 :][0])
    return _Shown(clip.id, SignalView(sound[:most], clip.id), 0.9 / loudest if loudest else 1.0, f"{caption}.", frame)

"""Look through a store before a long training does: hashes, levels, what is there for whom, and contact sheets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avsep.data.store.files import SPLITS, Clip, Store
from avsep.data.store.official import OFFICIAL, OfficialCounts
from avsep.errors import DataError, MissingExtraError
from avsep.files import atomic_path
from avsep.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Availability",
    "ClassSummary",
    "FeatureSummary",
    "StoreCheck",
    "availability",
    "check_store",
    "contact_sheet",
]

SILENT_DB = -60.0  # a clip below this is reported as silent
_BLOCK = 1 << 18  # samples read at a time


@dataclass
class ClassSummary:
    """One class in one split: clips, seconds, and how loud the clips are in dB below full scale (RMS)."""

    clips: int = 0
    seconds: float = 0.0
    levels_db: list[float] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass
class FeatureSummary:
    """Statistics of stored features over all clips; an extractor that differs shows here first."""

    role: str
    dim: int
    mean: float
    std: float
    norm: float
    dead: int
    """Dimensions that never change."""


@dataclass
class Availability:
    """Of a store prepared from videos: how many there are of how many.

    ``there`` and ``listed`` count the clips and the videos of the data set's own list by (class, split); ``reasons``
    the videos that are not there by status; ``official`` are published counts, or None where none are known.
    ``comparable`` says whether the store's splits are the published ones.
    """

    dataset: str
    there: dict[tuple[str, str], int]
    listed: dict[tuple[str, str], int]
    reasons: dict[str, int]
    official: OfficialCounts | None
    comparable: bool

    def split(self, counts: dict[tuple[str, str], int], split: str) -> int:
        """The sum over the classes."""
        return sum(n for (_, s), n in counts.items() if s == split)


@dataclass
class StoreCheck:
    """What :func:`check_store` found. ``problems`` are lines about single clips: silent, clipped, still frames.
    ``availability`` is None of a store that was not prepared from videos."""

    classes: dict[str, dict[str, ClassSummary]]
    features: dict[str, FeatureSummary]
    problems: list[str]
    availability: Availability | None = None


def availability(store: Store) -> Availability | None:
    """How much of its data set a store has; None of a store that was not prepared from videos."""
    origin = store.manifest.get("origin", {})
    if origin.get("generator") != "avsep data prepare":
        return None
    skipped = store.manifest.get("skipped", [])
    there = Counter((c.class_name, c.split) for c in store.clips)
    return Availability(
        dataset=origin.get("dataset", ""),
        there=dict(there),
        listed=dict(there + Counter((e["class"], e["split"]) for e in skipped)),
        reasons=dict(Counter(e["status"] for e in skipped)),
        official=OFFICIAL.get(origin.get("dataset", "")),
        comparable=origin.get("splits", {}).get("by") == "published lists",
    )


def check_store(path: str | Path, bars: Progress | None = None) -> StoreCheck:
    """Read everything in a store once, block by block.

    Raises :class:`DataError` at the first file that is missing, damaged or non-finite.
    """
    bars = bars or Progress()
    store = Store.open(path, verify=True)
    result = StoreCheck({n: {s: ClassSummary() for s in SPLITS} for n in store.classes}, {}, [], availability(store))
    bar = bars.add("checking clips", len(store.clips))
    for clip in store.clips:
        summary = result.classes[clip.class_name][clip.split]
        summary.clips += 1
        summary.seconds += clip.samples / store.sample_rate_hz
        for kind in store.manifest["clips"][clip.index]["files"]:
            summary.kinds[kind] = summary.kinds.get(kind, 0) + 1
        if "audio" in store.manifest["clips"][clip.index]["files"]:
            level_db, clipped = _level(store, clip)
            summary.levels_db.append(level_db)
            if level_db < SILENT_DB:
                result.problems.append(f"clip '{clip.id}' is silent ({level_db:.0f} dB)")
            if clipped > 1e-3:
                result.problems.append(f"clip '{clip.id}' is clipped ({100 * clipped:.1f} % of its samples)")
        motion: Any = store.timeline(clip).motion
        motion = getattr(motion, "kept", motion)  # of an exemplar its crops
        if motion is not None and len(motion) > 1 and not np.any(np.asarray(motion[1:]) != np.asarray(motion[:-1])):
            result.problems.append(f"clip '{clip.id}': its motion frames never change")
        bars.advance(bar)
    for name, record in store.features.items():
        result.features[name] = _feature_summary(store, name, record["role"])
    for name, splits in result.classes.items():
        for split, summary in splits.items():
            if not summary.clips:
                result.problems.append(f"class '{name}' has no {split} clip")
    return result


def _level(store: Store, clip: Clip) -> tuple[float, float]:
    """RMS level in dB below full scale and the share of samples at full scale."""
    power, clipped = 0.0, 0
    runs = store.kept_samples(clip)
    for first, length in runs:
        for start in range(first, first + length, _BLOCK):
            block = store.read_audio(clip, start, min(_BLOCK, first + length - start)).astype(np.float64)
            power += float(block @ block)
            clipped += int(np.count_nonzero(np.abs(block) >= 32766 / 32768))
    count = max(sum(length for _, length in runs), 1)
    return 10 * float(np.log10(max(power / count, 1e-12))), clipped / count


def _feature_summary(store: Store, name: str, role: str) -> FeatureSummary:
    rows = 0
    total = squares = norm = 0.0
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    for clip in store.clips:
        stored = store.timeline(clip).features[name]
        array = np.asarray(getattr(stored, "kept", stored), dtype=np.float64)
        vectors = array if role == "object" else array.T  # [n, D]
        if not np.isfinite(vectors).all():
            raise DataError(f"features '{name}' of clip '{clip.id}' hold NaN or infinite values: extract them again")
        rows += len(vectors)
        total += float(vectors.sum())
        squares += float((vectors**2).sum())
        norm += float(np.linalg.norm(vectors, axis=1).sum())
        low = vectors.min(axis=0) if low is None else np.minimum(low, vectors.min(axis=0))
        high = vectors.max(axis=0) if high is None else np.maximum(high, vectors.max(axis=0))
    if low is None or high is None:
        raise DataError(f"{store.path} holds no clips")
    count = rows * len(low)
    mean = total / count
    variance = max(squares / count - mean**2, 0.0)
    return FeatureSummary(role, len(low), mean, float(np.sqrt(variance)), norm / rows, int(np.sum(high == low)))


def contact_sheet(store: Store, out: str | Path, per_class: int = 6, tile: int = 96) -> Path:
    """Write an image of a store's frames: a row a class; object frames of ``per_class`` clips at their middle,
    then eight consecutive motion frames of the first one."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise MissingExtraError("Pillow", "synth", "a contact sheet") from None
    label, motions = 14, 8
    sheet = Image.new("RGB", ((per_class + motions) * tile, len(store.classes) * (tile + label)), (20, 20, 20))
    write = ImageDraw.Draw(sheet)
    for row, name in enumerate(store.classes):
        top = row * (tile + label)
        clips = store.select(classes=[name])
        # clips from all over the class, so that every split is seen
        chosen = [clips[i * len(clips) // per_class] for i in range(per_class)] if len(clips) > per_class else clips
        write.text(
            (3, top), f"{name}: {', '.join(c.id.removeprefix(name + '-') for c in chosen)}", fill=(230, 230, 230)
        )
        for column, clip in enumerate(chosen):
            frames = store.timeline(clip).object
            if frames is not None:
                sheet.paste(_tile(frames[len(frames) // 2], tile), (column * tile, top + label))
        motion = store.timeline(chosen[0]).motion if chosen else None
        if motion is not None:
            for column, frame in enumerate(motion[len(motion) // 2 :][:motions]):
                sheet.paste(_tile(frame, tile), ((per_class + column) * tile, top + label))
    target = Path(out)
    target = target if target.suffix else target.with_suffix(".png")
    with atomic_path(target) as temporary:
        try:
            sheet.save(temporary)
        except ValueError:
            raise DataError(f"{target}: a contact sheet is an image, such as contact.png") from None
    return target


def _tile(frame: np.ndarray, size: int) -> Image.Image:
    """A frame [C, H, W] with one or three channels as a square tile."""
    from PIL import Image

    channels = np.asarray(frame).transpose(1, 2, 0)  # [H, W, C]
    image = Image.fromarray(np.ascontiguousarray(channels if channels.shape[2] == 3 else channels[..., 0]))
    return image.convert("RGB").resize((size, size))

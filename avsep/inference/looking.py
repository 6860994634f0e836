"""What is seen of the sources of a recording, as a separator's features, moment by moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import DataError
from avsep.export.runtime.recordings import Source, by_name, check_moves, check_told_apart, nothing_of
from avsep.export.runtime.timeline import MOTION_STEPS, VisualSource, VisualTimeline
from avsep.types import VisualFeatures, VisualInputs

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["encode_chunks", "known_timelines"]


def _read_checked(timeline: VisualTimeline, source: VisualSource, centre_s: float, duration_s: float) -> NDArray[Any]:
    array = timeline.read(source, centre_s=centre_s, duration_s=duration_s)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise DataError(f"{timeline.where}: the {source.role} features hold NaN or infinite values: extract them again")
    return np.ascontiguousarray(array)


def encode_chunks(
    separator: Separator, timelines: Sequence[VisualTimeline | None], starts: Sequence[int], samples: int
) -> VisualFeatures:
    """The visual features of b chunks and N sources: object [b, N, Do], motion [b, N, Dm, Tm].

    Each source is encoded on its own, since frames of different files may differ in size and rate; motion sequences
    of different lengths are filled up and masked. Of a source without a timeline there are zeros, and it is unseen.
    """
    import torch

    spec = separator.spec.front_end
    device = next(separator.parameters()).device
    known: list[VisualFeatures] = []
    for timeline in timelines:
        if timeline is None:
            continue
        inputs: dict[str, Tensor] = {}
        for source in separator.visual_sources():
            rows = []
            for start in starts:
                centre_s = source.middle_s(start, spec.clip_samples, samples, spec.sample_rate_hz)
                rows.append(torch.from_numpy(_read_checked(timeline, source, centre_s, spec.clip_s)))
            inputs[source.role] = torch.stack(rows)[:, None].to(device)  # [b, 1, ...]
        known.append(separator.encode_visual(VisualInputs(**inputs)))
    lengths = [v.motion.shape[-1] for v in known if v.motion is not None]
    unseen = _unseen(separator, len(starts), max(lengths, default=0)) if len(known) < len(timelines) else None
    of_seen = iter(known)
    encoded = [next(of_seen) if unseen is None or timeline is not None else unseen for timeline in timelines]
    objects = [v.object for v in encoded if v.object is not None]
    motions = [v.motion for v in encoded if v.motion is not None]
    motion = mask = None
    if motions:
        steps = [m.shape[-1] for m in motions]
        motion = torch.cat([torch.nn.functional.pad(m, (0, max(steps) - m.shape[-1])) for m in motions], dim=1)
        if len(set(steps)) > 1:
            valid = torch.arange(max(steps), device=device) < torch.tensor(steps, device=device)[:, None]  # [N, Tm]
            mask = valid.expand(len(starts), -1, -1)
    seen = None
    if any(timeline is None for timeline in timelines):
        seen = torch.tensor([timeline is not None for timeline in timelines], device=device).expand(len(starts), -1)
    motion_seen = None
    moves = [timeline is None or timeline.moves for timeline in timelines]
    if separator.takes_photos and not all(moves):
        motion_seen = torch.tensor(moves, device=device).expand(len(starts), -1)
    return VisualFeatures(torch.cat(objects, dim=1) if objects else None, motion, mask, seen, motion_seen)


def _unseen(separator: Separator, count: int, steps: int) -> VisualFeatures:
    """Zeros as the features of one source of which there is no picture, as many steps of motion as others have."""
    import torch

    like = next(separator.parameters())
    dims = {role: getattr(separator, f"{role}_encoder") for role in ("object", "motion")}
    made = {}
    for role, encoder in dims.items():
        if encoder is not None:
            shape = (encoder.dim,) if role == "object" else (encoder.dim, steps or encoder.steps or MOTION_STEPS)
            made[role] = torch.zeros(count, 1, *shape, device=like.device, dtype=like.dtype)
    return VisualFeatures(**made)


def known_timelines(
    separator: Separator, timelines: Mapping[str, VisualTimeline], asked: Sequence[Source]
) -> list[VisualTimeline | None]:
    """What is seen of each source, each timeline read once for what the separator wants, so that mistakes show at once;
    None of a source that has none, where the separator can go unseen."""
    looks_at = separator.visual_sources()
    check_moves(asked, looks_at)
    if not looks_at:
        return [VisualTimeline()] * len(asked)
    spec = separator.spec.front_end
    shown = by_name(timelines, asked)
    found: list[VisualTimeline | None] = []
    for one in asked:
        timeline = shown.get(one.name)
        found.append(timeline)
        if timeline is None:
            if not separator.can_go_unseen:
                raise DataError(nothing_of(one, timelines))
            continue
        for source in looks_at:
            _read_checked(timeline, source, spec.clip_s / 2, spec.clip_s)
    check_told_apart(asked, shown)
    return found

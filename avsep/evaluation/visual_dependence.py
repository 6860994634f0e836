"""How much a separator's result hangs on the pictures: the change of SDR when they are other ones.

The sounds stay as they are; the pictures become those of another clip of the same class, of a clip of another class,
those of the mixture's other source, those of the same clip at rest, or none. A separator that is told the class and
does not look loses nothing by any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from avsep.data.mixing import load_mixtures
from avsep.data.protocol import TestMixture, centre_start, evenly
from avsep.data.store import Clip, Store
from avsep.errors import NumericalError
from avsep.evaluation.bss import sdr_alone
from avsep.evaluation.scores import batches, can_go_unseen, is_headline
from avsep.types import VisualInputs, move_to

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["CHANGES", "HEADINGS", "visual_dependence"]

CHANGES = {
    "other_clip": "the pictures are those of another clip of the class",
    "other_class": "of a clip of another class",
    "exchanged": "exchanged between the sources",
    "still": "without motion: the first moment is held",
    "none": "there are none",
}
HEADINGS = {
    "other_clip": "other clip",
    "other_class": "other class",
    "exchanged": "exchanged",
    "still": "still",
    "none": "none",
}
_LISTS = ("headline", "same-class")


def visual_dependence(
    separator: Separator,
    store: Store,
    mixtures: Sequence[TestMixture],
    *,
    split: str = "test",
    count: int = 60,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """By list (``headline``: the lists of the means over all; ``same-class``, where there is one) the number of
    ``mixtures``, the mean ``sdr`` in dB with the right pictures, and its ``changes`` (:data:`CHANGES`).

    On at most ``count`` mixtures a list, evenly chosen; the other clips are of ``split`` and always the same. A change
    is a mean over the sources that have a score both ways, and None where it cannot be made: without motion of a
    separator that has no motion encoder, with no pictures of one that needs them. Empty for a separator that takes no
    pictures.
    """
    if not separator.visual_sources():
        return {}
    members = {
        "headline": [m for m in mixtures if is_headline({"list": m.list_name}) and m.counted],
        "same-class": [m for m in mixtures if m.list_name == "same-class"],
    }
    shown = {clip.id for clip in store.clips if store.has_pictures(clip)}
    for name, of_list in members.items():
        members[name] = [m for m in of_list if shown.issuperset(m.clips)]
    chosen = {name: evenly(members[name], count) for name in _LISTS if members[name]}
    total = sum(map(len, chosen.values()))
    done = 0
    clips = {
        name: [clip for clip in store.select(classes=[name], split=split) if clip.id in shown]
        for name in separator.classes
        if name in store.classes
    }
    was_training = separator.training
    separator.to(device).eval()
    found = {}
    try:
        with torch.no_grad():
            for name, of_list in chosen.items():
                parts = []
                for first, group in batches(of_list, batch_size):
                    parts.append(_scores(separator, store, group, first, clips, device).flatten(1))
                    done += len(group)
                    if progress is not None:
                        progress(done, total)
                found[name] = _summary(torch.cat([p.T for p in parts]).T, len(of_list))
    finally:
        separator.train(was_training)
    return found


def _summary(scores: torch.Tensor, mixtures: int) -> dict[str, Any]:
    """[1 + changes, sources] -> plain numbers."""
    right = scores[0]
    changes: dict[str, float | None] = {}
    for name, changed in zip(CHANGES, scores[1:], strict=True):
        both = torch.isfinite(right) & torch.isfinite(changed)
        changes[name] = float((changed - right)[both].mean()) if bool(both.any()) else None
    known = right[torch.isfinite(right)]
    return {"mixtures": mixtures, "sdr": float(known.mean()) if len(known) else None, "changes": changes}


def _scores(
    separator: Separator,
    store: Store,
    group: Sequence[TestMixture],
    first: int,
    clips: dict[str, list[Clip]],
    device: str | torch.device,
) -> torch.Tensor:
    """SDR in dB with the right pictures and with each of the others, [1 + changes, B, N]; NaN where there is none."""
    spec = separator.spec.front_end
    length = (spec.frames - 1) * spec.hop
    sources = separator.visual_sources()

    def load(mixtures: Sequence[TestMixture]) -> Any:
        return load_mixtures(store, mixtures, spec, sources, separator.class_index)

    batch = load(group)
    right = batch.visual
    inputs: list[VisualInputs | None] = [right]
    missing: list[list[int]] = [[]]
    for kind in ("other_clip", "other_class"):
        shown, lacking = [], []
        for b, mixture in enumerate(group):
            other = _others(mixture, first + b, kind, clips, store.sample_rate_hz, spec.clip_samples)
            if other is None:
                lacking.append(b)
            shown.append(_silent(mixture, "moving") if other is None else other)
        inputs.append(None if len(lacking) == len(group) else load(shown).visual)
        missing.append(lacking)
    inputs.append(_each(right, lambda part: part.roll(1, dims=1)))
    still = None if separator.motion_encoder is None else load([_silent(m, "still") for m in group]).visual
    inputs.append(still)
    if can_go_unseen(separator):
        seen = torch.zeros(batch.class_ids.shape, dtype=torch.bool)
        inputs.append(replace(_each(right, torch.zeros_like), motion_mask=right.motion_mask, seen=seen))
    else:
        inputs.append(None)
    missing += [[], [], []]

    moved = move_to(batch, device)
    estimates = []
    for visual in inputs:
        if visual is None:
            continue
        features = separator.encode_visual(move_to(visual, device))
        separated = separator.separate_and_tell(moved.mixture, features, moved.class_ids)[0]
        estimates.append(separated[..., :length].float().cpu().clamp(-1.0, 1.0))
        if not bool(torch.isfinite(estimates[-1]).all()):
            raise NumericalError(
                f"the separator gave NaN or infinite samples for one of the mixtures from {' + '.join(group[0].clips)} "
                "on, with other pictures: its weights are damaged or have diverged"
            )
    scored = iter(sdr_alone(batch.sources[..., :length], torch.stack(estimates, dim=1)).transpose(0, 1))
    found = torch.full((len(inputs), *batch.class_ids.shape), math.nan, dtype=torch.float64)
    for place, (visual, lacking) in enumerate(zip(inputs, missing, strict=True)):
        if visual is not None:
            found[place] = next(scored)
            found[place, lacking] = math.nan
    return found


def _each(inputs: VisualInputs, change: Callable[[torch.Tensor], torch.Tensor]) -> VisualInputs:
    parts = (inputs.object, inputs.motion, inputs.motion_mask, inputs.seen)
    return VisualInputs(*(None if part is None else change(part) for part in parts))


def _silent(mixture: TestMixture, role: str) -> TestMixture:
    """The same clips, of which only the pictures are read."""
    return replace(mixture, roles=(role,) * len(mixture.clips))


def _others(
    mixture: TestMixture, number: int, kind: str, clips: dict[str, list[Clip]], rate_hz: int, length: int
) -> TestMixture | None:
    """A mixture of the clips whose pictures are shown; None where there is none to take."""
    chosen: list[Clip] = []
    for place, (clip_id, own) in enumerate(zip(mixture.clips, mixture.classes, strict=True)):
        taken = {*mixture.clips, *(c.id for c in chosen)}
        if kind == "other_clip":
            members = clips.get(own, [])
            at = next((i for i, c in enumerate(members) if c.id == clip_id), 0)
            candidates = members[at + 1 :] + members[:at]
        else:
            strange = [n for n in clips if n != own and clips[n] and n not in mixture.classes]
            strange = strange or [n for n in clips if n != own and clips[n]]
            if not strange:
                return None
            members = clips[strange[(number + place) % len(strange)]]
            candidates = members[number % len(members) :] + members[: number % len(members)]
        free = [c for c in candidates if c.id not in taken] or [c for c in candidates if c.id not in mixture.clips]
        if not free:
            return None
        chosen.append(free[0])
    return replace(
        mixture,
        clips=tuple(c.id for c in chosen),
        classes=tuple(c.class_name for c in chosen),
        starts=tuple(centre_start(c, rate_hz, length) for c in chosen),
        roles=("moving",) * len(chosen),
    )

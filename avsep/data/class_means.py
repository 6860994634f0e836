"""What the classes look like to a separator: the mean visual features of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avsep.data.codecs import CodedCrops
from avsep.data.mixing import collate, load_source
from avsep.data.protocol import centre_start, evenly
from avsep.data.store import Clip, Store
from avsep.types import VisualFeatures, move_to

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["mean_pictures"]

_MOST_CLIPS = 8  # of a class whose pictures are averaged


@torch.no_grad()
def mean_pictures(
    separator: Separator,
    store: Store,
    clips: Mapping[str, Sequence[tuple[Clip, int | None]]],
    device: torch.device | str = "cpu",
    *,
    coded: CodedCrops | None = None,
) -> dict[str, Tensor]:
    """The mean visual features of each class, for decoders that cannot do without: by role [Q, ...], in class order.

    Args:
        separator: in evaluation mode.
        clips: those that are at hand of each class, each with the first sample of the crop to look at, the middle one
            when None; at most eight, evenly chosen, are read. A class without any keeps the mean that the separator
            has of it, or gets zeros.
        coded: what codecs make of the crops whose first sample is given, those of exemplars.
    """
    found: dict[str, list[Tensor | None]] = {"object": [], "motion": []}
    for number, name in enumerate(separator.classes):
        of_class = evenly([one for one in clips.get(name, ()) if store.has_pictures(one[0])], _MOST_CLIPS)
        encoded = [_encoded(separator, store, *one, number, device, coded) for one in of_class]
        for role, means in found.items():
            parts = [part for features in encoded if (part := getattr(features, role)) is not None]
            means.append(_mean(parts) if parts else None)
    kept: dict[str, Tensor] = {}
    for role, means in found.items():
        known = next((mean for mean in means if mean is not None), None)
        if known is None:
            continue
        old = (separator.class_means or {}).get(role)
        rows = []
        for number, mean in enumerate(means):
            if mean is None and old is not None and number < len(old):
                mean = old[number].float().cpu()
            rows.append(torch.zeros_like(known) if mean is None else _with_steps(mean, known.shape[1:]))
        kept[role] = torch.stack(rows)
    return kept


def _encoded(
    separator: Separator,
    store: Store,
    clip: Clip,
    start: int | None,
    class_id: int,
    device: torch.device | str,
    coded: CodedCrops | None,
) -> VisualFeatures:
    front_end = separator.spec.front_end
    if start is None:
        start, coded = centre_start(clip, store.sample_rate_hz, front_end.clip_samples), None
    source = load_source(store, clip, start, front_end, separator.visual_sources(), class_id, coded=coded)
    return separator.encode_visual(move_to(collate([[source]]).visual, device))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean of features [1, 1, ...] of clips, whose motion may have different numbers of steps: [...]."""
    first = parts[0][0, 0].float().cpu()
    return torch.stack([_with_steps(part[0, 0].float().cpu(), first.shape[1:]) for part in parts]).mean(dim=0)


def _with_steps(features: Tensor, steps: torch.Size) -> Tensor:
    """[D] as it is; motion [D, Tm] with as many steps as are given."""
    if features.shape[1:] == steps:
        return features
    return torch.nn.functional.interpolate(features[None], size=steps[0], mode="linear")[0]

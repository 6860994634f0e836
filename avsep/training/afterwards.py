"""What a separator is given once a task is learned: mean pictures of its classes, and the threshold of presence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from avsep.data.mixing import collate, load_mixtures, load_source
from avsep.data.protocol import TestMixture, centre_start
from avsep.data.store import Clip, Store
from avsep.separator import Separator
from avsep.types import VisualFeatures, move_to

__all__ = ["best_threshold", "choose_presence_threshold", "mean_pictures"]

_MOST_CLIPS = 8  # of a class whose pictures are averaged
_MOST_MIXTURES = 60  # validation mixtures that the threshold is chosen on
_BATCH = 4


@torch.no_grad()
def mean_pictures(
    separator: Separator, store: Store, clips: Mapping[str, Sequence[Clip]], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The mean visual features of each class, for decoders that cannot do without: by role [Q, ...], in class order.

    Args:
        separator: in evaluation mode.
        clips: those that are at hand of each class; at most eight, evenly chosen, are read. A class without any keeps
            the mean that the separator has of it, or gets zeros.
    """
    found: dict[str, list[Tensor | None]] = {"object": [], "motion": []}
    for number, name in enumerate(separator.classes):
        of_class = list(clips.get(name, ()))
        of_class = of_class[:: max(1, -(-len(of_class) // _MOST_CLIPS))]
        encoded = [_encoded(separator, store, clip, number, device) for clip in of_class]
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
    separator: Separator, store: Store, clip: Clip, class_id: int, device: torch.device | str
) -> VisualFeatures:
    front_end = separator.spec.front_end
    start = centre_start(clip, store.sample_rate_hz, front_end.clip_samples)
    source = load_source(store, clip, start, front_end, separator.visual_sources(), class_id)
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


@torch.no_grad()
def choose_presence_threshold(
    separator: Separator, store: Store, mixtures: Sequence[TestMixture], device: torch.device | str = "cpu"
) -> float | None:
    """The probability from which a source counts as present, chosen on validation mixtures, and set in the decoder.

    Each mixture of different classes is asked for its sources and for a class that is not in it, whose player (of the
    next mixture's first clip) is in turn seen at rest, seen playing something else, and not seen. The threshold is the
    one at which the mean of the two shares that are right, of present and of absent sources, is largest, half-way
    between two probabilities.

    Returns:
        The threshold; None where the decoder does not tell, or nothing can be asked in vain, and nothing is set.
    """
    decoder = separator.mask_decoder
    if not decoder.tells_presence:
        return None
    usable = [m for m in mixtures if not m.degenerate and not m.roles][:_MOST_MIXTURES]
    asked: list[TestMixture] = []
    for number, mixture in enumerate(usable):
        for other in (*usable[number + 1 :], *usable[:number]):
            if other.classes[0] not in mixture.classes:
                role = ("still", "moving", "unseen")[number % 3]
                asked.append(
                    replace(
                        mixture,
                        clips=(*mixture.clips, other.clips[0]),
                        classes=(*mixture.classes, other.classes[0]),
                        starts=(*mixture.starts, other.starts[0]),
                        roles=(*("source",) * len(mixture.clips), role),
                    )
                )
                break
    if not asked:
        return None
    there: list[Tensor] = []
    absent: list[Tensor] = []
    for first in range(0, len(asked), _BATCH):
        group = [m for m in asked[first : first + _BATCH] if len(m.clips) == len(asked[first].clips)]
        batch = load_mixtures(store, group, separator.spec.front_end, separator.visual_sources(), separator.class_index)
        presence = separator.predict(move_to(batch, device)).output.presence
        assert presence is not None
        probabilities = presence.float().sigmoid().cpu()
        there.append(probabilities[:, :-1].flatten())
        absent.append(probabilities[:, -1])
    threshold = best_threshold(torch.cat(there), torch.cat(absent))
    decoder.presence_threshold.fill_(threshold)
    return threshold


def best_threshold(present: Tensor, absent: Tensor) -> float:
    """The threshold with the largest mean of P(present >= threshold) and P(absent < threshold); of several the middle
    one's place, half-way between two values."""
    values = torch.cat((present, absent)).unique()  # sorted
    places = torch.cat((values[:1] - 1e-3, (values[1:] + values[:-1]) / 2, values[-1:] + 1e-3)).clamp(0.0, 1.0)
    right = (present[:, None] >= places).float().mean(dim=0) + (absent[:, None] < places).float().mean(dim=0)
    best = (right == right.max()).nonzero().flatten()
    return float(places[best[len(best) // 2]])

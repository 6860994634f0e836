"""What a separator is given once a task is learned: mean pictures of its classes, and the threshold of presence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from avsep.data.class_means import mean_pictures
from avsep.data.mixing import load_mixtures
from avsep.data.protocol import APART, TestMixture, evenly
from avsep.data.store import Store
from avsep.evaluation.scores import batches
from avsep.separator import Separator
from avsep.types import move_to

__all__ = ["best_threshold", "calibrate_presence", "mean_pictures"]

_MOST_MIXTURES = 60  # validation mixtures that presence is calibrated on
_BATCH = 4


@torch.no_grad()
def calibrate_presence(
    separator: Separator, store: Store, mixtures: Sequence[TestMixture], device: torch.device | str = "cpu"
) -> dict[str, float] | None:
    """Set the decoder's ``presence_offsets``, so that its threshold parts the sources that sound in validation mixtures
    from those that do not, whether they are seen moving, in one picture, or not at all.

    Mixtures of different classes, spread evenly over all of them, are asked for their sources and for one class more
    that is not in them, each class in turn; one that is seen moving is seen at rest in every second mixture, in the
    others playing something else. The threshold of each way of being seen is the probability at which the mean of the
    two shares that are right, of present and of absent sources, is largest, half-way between two probabilities.

    Returns:
        The thresholds by way of being seen, before the offsets; None where the decoder is not calibrated, or no class
        can be asked for that does not sound, and nothing is set.
    """
    decoder = separator.mask_decoder
    offsets = decoder.presence_offsets
    if not decoder.tells_presence or offsets is None:
        return None
    usable = evenly([m for m in mixtures if m.list_name not in APART and not m.degenerate], _MOST_MIXTURES)
    questions = list(_asked_in_vain(usable, separator.classes))
    if not questions:
        return None
    found = {}
    shown = {clip.id for clip in store.clips if store.has_pictures(clip)}
    for place, (way, (there, *not_there)) in enumerate(_SEEN.items()):
        if way == "unseen" and decoder.class_agnostic:
            continue  # nothing would tell what is asked for
        asked = [
            replace(m, roles=(*(there,) * (len(m.clips) - 1), not_there[number % len(not_there)]))
            for number, m in enumerate(questions)
            if way == "unseen" or shown.issuperset(m.clips)
        ]
        if not asked:
            continue  # nothing is seen of the classes that were learned: what was found before holds
        offsets[place] = 0.0
        found[way] = best_threshold(*_told(separator, store, asked, device))
        offsets[place] = torch.logit(torch.tensor(found[way]), eps=1e-6) - math.log(
            decoder.presence_threshold / (1 - decoder.presence_threshold)
        )
    return found


# what is said of the sources that sound, and of those that do not (avsep.data.protocol.ROLES), by what is seen of them
_SEEN = {
    "moving": ("source", "still", "moving"),
    "photo": ("photo_source", "photo"),
    "unseen": ("unseen_source", "unseen"),
}


def _asked_in_vain(mixtures: Sequence[TestMixture], classes: Sequence[str]) -> Iterator[TestMixture]:
    """Each mixture with one clip more, of a class that is not in it: the classes in turn, and the clips of each."""
    clips: dict[str, list[tuple[str, int]]] = {}
    for mixture in mixtures:
        for clip, name, start in zip(mixture.clips, mixture.classes, mixture.starts, strict=True):
            if (clip, start) not in clips.setdefault(name, []):
                clips[name].append((clip, start))
    known = [name for name in classes if name in clips]
    turn = 0
    for mixture in mixtures:
        for ahead in range(len(known)):
            name = known[(turn + ahead) % len(known)]
            if name not in mixture.classes:
                clip, start = clips[name][(turn + ahead) // len(known) % len(clips[name])]
                turn += ahead + 1
                yield replace(
                    mixture,
                    clips=(*mixture.clips, clip),
                    classes=(*mixture.classes, name),
                    starts=(*mixture.starts, start),
                )
                break


def _told(
    separator: Separator, store: Store, asked: Sequence[TestMixture], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The probabilities of the sources that sound, and of each mixture's last one, which does not."""
    there: list[Tensor] = []
    absent: list[Tensor] = []
    for _, group in batches(asked, _BATCH):
        batch = load_mixtures(store, group, separator.spec.front_end, separator.visual_sources(), separator.class_index)
        presence = separator.predict(move_to(batch, device)).output.presence
        assert presence is not None
        probabilities = presence.float().sigmoid().cpu()
        there.append(probabilities[:, :-1].flatten())
        absent.append(probabilities[:, -1])
    return torch.cat(there), torch.cat(absent)


def best_threshold(present: Tensor, absent: Tensor) -> float:
    """The threshold with the largest mean of P(present >= threshold) and P(absent < threshold); of several the middle
    one's place, half-way between two values."""
    values = torch.cat((present, absent)).unique()  # sorted
    places = torch.cat((values[:1] - 1e-3, (values[1:] + values[:-1]) / 2, values[-1:] + 1e-3)).clamp(0.0, 1.0)
    right = (present[:, None] >= places).float().mean(dim=0) + (absent[:, None] < places).float().mean(dim=0)
    best = (right == right.max()).nonzero().flatten()
    return float(places[best[len(best) // 2]])

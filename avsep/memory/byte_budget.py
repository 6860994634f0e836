"""A memory of so many bytes, filled with short crops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from avsep.data.codecs import CODECS, PICTURE_CODECS, Codec, PictureCodec, check_pictures
from avsep.errors import ConfigError
from avsep.memory.base import Candidates, Exemplar, Memory, MemoryPolicy
from avsep.memory.herding import herd
from avsep.memory.reconstruction import reconstruct
from avsep.registry import MEMORIES

__all__ = ["ByteBudget", "cover"]

Select = Literal["random", "herding", "reconstruction", "coverage"]
_SELECT = ("random", "herding", "reconstruction", "coverage")


@MEMORIES.register(
    "byte_budget",
    source="Zhou et al., A Model or 603 Exemplars, ICLR 2023: a memory is counted in bytes; the rest of this library",
    example={"budget_bytes": 50_000},
)
class ByteBudget(MemoryPolicy):
    """Keep as many crops as fit into ``budget_bytes``, in the same bytes for every class seen.

    An exemplar is one crop of the front end's length: its sound as ``codec`` writes it
    (:data:`avsep.data.codecs.CODECS`), its frames as ``pictures`` does
    (:data:`avsep.data.codecs.PICTURE_CODECS`; training hears and sees what the codecs give back), and features as
    :mod:`avsep.evaluation.budget` counts them. A class's crops are ranked when its task ends: first one of every
    recording, then a second of each, as far as they are long enough. Of the ranking as many are kept as fit into the
    class's share, which shrinks with every task; the last are given up first. To mixers a recording is one exemplar;
    each time it is drawn, one of its crops is taken. The default is the size of 15 crops of 6 seconds in 16-bit
    integers.

    ``select`` ranks the recordings: ``random``; ``herding`` and ``reconstruction`` as the policies of these names do,
    by the separator's features; ``coverage`` so that the crops' energies together reach far over the frequency axis
    (:func:`cover`). All but the first look at the centre crop, and keep that one; further crops are random ones.
    """

    differs = (
        "The paper trades exemplars for model weights; this policy bounds the exemplars alone, and avsep budget adds "
        "the model. Crops, codecs and coverage are additions."
    )

    by_class = False
    by_bytes = True

    def __init__(
        self,
        *,
        budget_bytes: int = 2_200_000,
        codec: Codec = "vorbis",
        pictures: PictureCodec = "raw",
        select: Select = "random",
    ) -> None:
        super().__init__(keep="clip")
        if budget_bytes < 1:
            raise ValueError(
                f"budget_bytes must be at least 1, got {budget_bytes}; for no memory use the policy 'none'"
            )
        for name, value, known in (
            ("codec", codec, CODECS),
            ("pictures", pictures, PICTURE_CODECS),
            ("select", select, _SELECT),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.budget_bytes = budget_bytes
        self.codec = codec
        self.pictures = pictures
        self.select = select
        self.uses_separator = select != "random"

    def check(self, candidates: Mapping[str, int]) -> None:
        check_pictures(self.pictures)

    def update(
        self, held: Mapping[str, Sequence[Exemplar]], candidates: Candidates, rng: np.random.Generator
    ) -> Memory:
        classes = len({*held, *candidates.earlier, *candidates.ids})
        order = {name: self._order(ids, candidates, rng) for name, ids in candidates.ids.items()}
        ranked: dict[str, Iterator[Exemplar]] = {name: iter(kept) for name, kept in held.items()}
        ranked.update((name, self._crops(ids, candidates, rng)) for name, ids in order.items())
        share = self.budget_bytes // max(classes, 1)
        return {name: self._fitting(name, crops, share, classes, candidates) for name, crops in ranked.items()}

    def _order(self, ids: Sequence[str], candidates: Candidates, rng: np.random.Generator) -> list[str]:
        if self.select == "herding":
            return [ids[i] for i in herd(candidates.features(ids), len(ids))]
        if self.select == "reconstruction":
            return [ids[i] for i in reconstruct(candidates.features(ids), len(ids))]
        if self.select == "coverage":
            return [ids[i] for i in cover(candidates.profiles(ids), len(ids))]
        return [str(i) for i in rng.permutation(np.asarray(ids))]

    def _crops(self, ids: Sequence[str], candidates: Candidates, rng: np.random.Generator) -> Iterator[Exemplar]:
        """The crops of a class, best first."""
        yield from self.kept(candidates, ids, rng)
        length, number = candidates.front_end.clip_samples, 2
        while long := [i for i in ids if candidates.clips[i].samples >= number * length]:
            yield from (Exemplar(i, candidates.random_start(i, rng)) for i in long)
            number += 1

    def _fitting(
        self, name: str, ranked: Iterator[Exemplar], share: int, classes: int, candidates: Candidates
    ) -> list[Exemplar]:
        """The first of the ranked that fit into the share. Those that are larger than it are passed over."""
        if candidates.weigh is None:
            raise ConfigError("memory 'byte_budget' needs to know how many bytes an exemplar takes: give weigh")
        found: list[Exemplar] = []
        ids: set[str] = set()
        used, smallest = 0, 0
        for exemplar in ranked:
            size = candidates.weigh(
                exemplar, keep=self.keep, codec=self.codec, pictures=self.pictures, again=exemplar.id in ids
            )
            if size > share and not found:
                smallest = min(size, smallest or size)
            elif used + size > share:
                break
            else:
                found.append(exemplar)
                ids.add(exemplar.id)
                used += size
        if not found:
            raise ConfigError(
                f"memory of {self.budget_bytes:,} bytes gives each of {classes} classes {share:,}, and the smallest "
                f"exemplar of class '{name}' takes {smallest:,}: raise budget_bytes to {classes * smallest:,} or more"
            )
        return found


def cover(profiles: np.ndarray, count: int) -> list[int]:
    """The rows of ``profiles`` [n, F] that are chosen one by one so that sum_f max_j E_jf over the chosen is largest;
    the first of equals."""
    reached = np.zeros(profiles.shape[1])
    chosen: list[int] = []
    while len(chosen) < count:
        value = np.maximum(profiles, reached).sum(axis=1)  # [n]
        value[chosen] = -np.inf
        chosen.append(int(np.argmax(value)))
        reached = np.maximum(reached, profiles[chosen[-1]])
    return chosen

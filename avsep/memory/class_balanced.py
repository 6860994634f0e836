"""One budget, shared equally among the classes seen so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avsep.errors import ConfigError
from avsep.memory.base import Candidates, Exemplar, Memory, Total
from avsep.registry import MEMORIES

__all__ = ["ClassBalanced", "equal_shares"]


def equal_shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Share ``total`` among classes that have ``sizes`` clips: as equally as these allow, the remainder to the first.

    Shares only shrink when classes are added at the end.
    """
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        open_ = [i for i, size in enumerate(sizes) if shares[i] < size]
        level, extra = divmod(left, len(open_))
        for place, i in enumerate(open_):
            given = min(level + (not level and place < extra), sizes[i] - shares[i])
            shares[i] += given
            left -= given
    return shares


@MEMORIES.register(
    "class_balanced",
    source="Rebuffi et al., iCaRL, CVPR 2017: a fixed memory shared by all classes; random exemplars",
    example={"total": 3},
)
class ClassBalanced(Total):
    """Keep ``total`` random clips, shared equally among the classes seen; old classes give up clips as new ones come.

    A class with fewer clips than its share leaves the rest to the others. Each class's exemplars are drawn in a random
    order when its task ends, and the last are given up first, so that what stays is a random sample too.

    ``keep``: ``recording``, ``clip`` (a random crop of each) or ``id``.
    """

    def check(self, candidates: Mapping[str, int]) -> None:
        if len(candidates) > self.total:
            raise ConfigError(
                f"memory of {self.total} clips cannot give one to each of the {len(candidates)} classes before the "
                f"last task: raise total to {len(candidates)} or more"
            )
        super().check(candidates)

    def update(
        self, held: Mapping[str, Sequence[Exemplar]], candidates: Candidates, rng: np.random.Generator
    ) -> Memory:
        sizes = [len(kept) for kept in held.values()] + [len(ids) for ids in candidates.ids.values()]
        shares = dict(zip([*held, *candidates.ids], equal_shares(self.total, sizes), strict=True))
        chosen = {
            name: [str(i) for i in rng.permutation(np.asarray(ids))[: shares[name]]]
            for name, ids in candidates.ids.items()
        }
        return {
            **{name: list(kept[: shares[name]]) for name, kept in held.items()},
            **{name: self.kept(candidates, ids, rng) for name, ids in chosen.items()},
        }

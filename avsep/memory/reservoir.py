"""A uniform sample of the stream, whatever its classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avsep.memory.base import Candidates, Exemplar, Memory, Total
from avsep.registry import MEMORIES

__all__ = ["Reservoir"]


@MEMORIES.register("reservoir", source="Vitter, ACM TOMS 1985, algorithm R", example={"total": 3})
class Reservoir(Total):
    """Keep ``total`` clips of all that were seen, each with the same probability; a class may have many or none.

    The i-th clip of the stream (1-based) is kept if i <= ``total``; else it takes the place of a random exemplar with
    the probability ``total`` / i. How many clips went before is known from the earlier tasks' sizes.

    ``keep``: ``recording``, ``clip`` (a random crop of each) or ``id``.
    """

    by_class = False

    def update(
        self, held: Mapping[str, Sequence[Exemplar]], candidates: Candidates, rng: np.random.Generator
    ) -> Memory:
        slots: list[tuple[str, str | Exemplar]] = [(name, e) for name, kept in held.items() for e in kept]
        seen = sum(candidates.earlier.values())
        for name, ids in candidates.ids.items():
            for clip_id in ids:
                seen += 1
                if len(slots) < self.total:
                    slots.append((name, clip_id))
                elif (place := int(rng.integers(seen))) < self.total:
                    slots[place] = (name, clip_id)
        memory: Memory = {}
        for name in [*held, *candidates.ids]:
            old = [e for n, e in slots if n == name and isinstance(e, Exemplar)]
            new = [e for n, e in slots if n == name and isinstance(e, str)]
            if old or new:
                memory[name] = [*old, *self.kept(candidates, new, rng)]
        return memory

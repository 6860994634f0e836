"""GDumb: a fresh network after every task, trained on the memory alone."""

from __future__ import annotations

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy

__all__ = ["GDumb"]


@STRATEGIES.register("gdumb", source="Prabhu et al., GDumb, ECCV 2020")
class GDumb(Strategy):
    """Train at every task from fresh weights on the exemplars of all classes seen so far alone; a control.

    The exemplars of a task are chosen from its clips before it is trained, by a memory policy that does not ask the
    separator, and its other clips are never used. Each exemplar counts ``train.memory_repeats`` times an epoch. What a
    method with the same memory scores above it is what it has learned continually.
    """

    needs_memory = True
    memory_only = True
    restarts = True
    across_ranks = True
    differs = (
        "The balanced memory is the run's policy (random_per_class is the paper's balance, with a number for each "
        "class), and optimiser, schedule and augmentation are the run's own: no CutMix."
    )

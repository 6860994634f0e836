"""Validation of a task, by which its weights are selected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from avsep.data.protocol import TestMixture, evenly
from avsep.data.tasks import TaskStream
from avsep.distributed.ranks import ALONE, Ranks
from avsep.evaluation.scores import evaluate_separator, mean_sdr
from avsep.separator import Separator
from avsep.spec import TrainSpec
from avsep.training.log import TaskLog, chosen_mixtures
from avsep.types import Task

if TYPE_CHECKING:
    from avsep.evaluation.scores import MixtureScore

__all__ = ["Validation", "pair_scores"]


class Validation:
    """The validation mixtures of all classes seen up to a task (data of old classes too, as published)."""

    def __init__(
        self, stream: TaskStream, task: Task, train: TrainSpec, ranks: Ranks = ALONE, device: torch.device | str = "cpu"
    ) -> None:
        self._stream = stream
        self._all = stream.validation.selecting(task.index)
        self._mixtures = _thinned(self._all, train.validation_pairs)
        self._batch_size = train.batch_size
        self._ranks = ranks
        self._device = device
        self.tasks = stream.validation.tasks[: task.index + 1]

    def score(self, student: Separator) -> tuple[float, list[MixtureScore]]:
        """The mean SDR in dB, and the scores of the mixtures."""
        ranks, count = self._ranks, len(self._mixtures)
        first, last = (count * r // ranks.world for r in (ranks.rank, ranks.rank + 1))
        student.eval()
        own = evaluate_separator(
            student,
            self._stream.store,
            self._mixtures[first:last],
            batch_size=max(1, self._batch_size // ranks.world),
            device=self._device,
            interference=False,  # nobody looks at SIR and SAR here
        )
        scores = [score for part in ranks.all_gather(own) for score in part]
        return mean_sdr(scores, degenerate=self._stream.validation.name == "paper"), scores

    def log_media(self, log: TaskLog, student: Separator, step: int, *, sounds: bool = False) -> None:
        """Log the masks of a few mixtures, and with ``sounds`` what is separated."""
        mixtures = chosen_mixtures(self._all)
        log.media(
            student,
            self._stream.store,
            mixtures,
            step,
            batch_size=self._batch_size,
            device=self._device,
            sounds=sounds,
        )


def pair_scores(scores: Sequence[MixtureScore]) -> dict[tuple[str, str], float]:
    """The mean improvement of SDR in dB, over the sources of all mixtures of a pair of classes, by their names in the
    order of the alphabet."""
    found: dict[tuple[str, str], list[float]] = {}
    for score in scores:
        sources = [s for s in score.sources if s.role == "source" and math.isfinite(s.sdri)] if score.counted else []
        for one, other in itertools.combinations(sources, 2):
            if one.class_name != other.class_name:
                first, second = sorted((one.class_name, other.class_name))
                found.setdefault((first, second), []).extend((one.sdri, other.sdri))
    return {pair: sum(values) / len(values) for pair, values in sorted(found.items())}


def _thinned(mixtures: list[TestMixture], per_list: int | None) -> list[TestMixture]:
    """At most ``per_list`` mixtures of each list, spread evenly over it."""
    if per_list is None:
        return mixtures
    kept = []
    for name in dict.fromkeys(m.list_name for m in mixtures):
        members = [m for m in mixtures if m.list_name == name]
        kept += evenly(members, per_list)
    return kept

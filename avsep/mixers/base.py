"""What a mixer is: it draws the clips of each training mixture of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from avsep.data.protocol import second_start, seconds_of
from avsep.data.store import Clip
from avsep.registry import Component
from avsep.spec import FrontEndSpec, TrainSpec

__all__ = ["Draw", "Mixer", "Pool"]


class Draw(NamedTuple):
    """One source of a mixture: the number of its clip in the pool, the first sample of its crop, its gain, and its role
    (:data:`avsep.data.protocol.ROLES`).

    All mixtures of an epoch have ``train.sources`` sources that are asked for, and any number in the background.
    """

    clip: int
    start: int
    gain: float
    role: str = "source"


@dataclass(frozen=True)
class Pool:
    """What an epoch's mixtures are drawn from: the current task's ``clips``, and the ``exemplars`` of earlier ones
    (of all, where a strategy trains on the memory alone; then there are no other clips).

    ``crops``: the first sample of those exemplars of which one crop alone was kept, by clip id, or of each of several.
    ``task`` is the task's index, for messages. ``scores``: how well two classes, their names in the order of the
    alphabet, were separated from each other in the last validation, as the mean improvement of SDR in dB; given to
    mixers that ask for it (``uses_scores``), and empty before the first validation of a task. ``heard``: the ids of
    the clips that are sounds without pictures, which can only be asked for as unseen.
    """

    clips: Sequence[Clip]
    exemplars: Sequence[Clip]
    train: TrainSpec
    front_end: FrontEndSpec
    task: int
    crops: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    scores: Mapping[tuple[str, str], float] = field(default_factory=dict)
    heard: frozenset[str] = frozenset()

    def __getitem__(self, number: int) -> Clip:
        """By number: the current clips first, then the exemplars."""
        current = len(self.clips)
        return self.clips[number] if number < current else self.exemplars[number - current]

    @property
    def items(self) -> int:
        """Mixtures of an epoch of ``train.current_repeats`` for each current clip; where there is none, of
        ``train.memory_repeats`` for each exemplar."""
        train = self.train
        return train.current_repeats * len(self.clips) or train.memory_repeats * len(self.exemplars)

    def __len__(self) -> int:
        return len(self.clips) + len(self.exemplars)

    def is_exemplar(self, number: int) -> bool:
        return number >= len(self.clips)

    def draw(self, number: int, rng: np.random.Generator) -> Draw:
        """A clip with a random gain and a random crop, drawn in this order."""
        clip = self[number]
        gain = float(rng.uniform(*self.train.gain))
        start = self._start(clip, rng)  # drawn for a kept crop too: how exemplars are kept changes no other draw
        if self.is_exemplar(number):
            kept = self.crops.get(clip.id, start)
            start = kept if isinstance(kept, int) else kept[int(rng.integers(len(kept)))]
        return Draw(number, start, gain)

    def _start(self, clip: Clip, rng: np.random.Generator) -> int:
        """The first sample of a crop. ``crop="any"``: anywhere inside the clip; a clip shorter than the crop is entered
        anywhere, since it repeats. ``crop="published"``: around the middle of a whole second from the 9th to the
        (count - 8)th, of a clip of at most 17 seconds from the (count - 8)th to the 9th, as far as the clip goes."""
        length = self.front_end.clip_samples
        if self.train.crop == "published":
            count = seconds_of(clip, self.front_end.sample_rate_hz, length)
            low, high = sorted((9, count - 8))
            second = int(rng.integers(max(low, 1), min(high, count) + 1))
            return second_start(second, self.front_end.sample_rate_hz, length)
        room = clip.samples - length
        return int(rng.integers(room + 1 if room >= 0 else clip.samples))


class Mixer(Component, ABC):
    """Base of mixers. Random numbers come from generators that depend on (seed, task, epoch, item) alone, so that the
    mixtures do not depend on who reads them, nor on what was read before.

    ``uses_scores``: it looks at the pool's ``scores``, which checkpoints then keep. The number of mixtures must not
    depend on them.
    """

    uses_scores: bool = False

    @abstractmethod
    def begin_epoch(self, pool: Pool, rng: np.random.Generator) -> int:
        """Get ready for an epoch; returns the number of its mixtures.

        Raises:
            ConfigError: the pool cannot give such mixtures.
        """

    @abstractmethod
    def draw(self, rng: np.random.Generator, item: int, pool: Pool) -> list[Draw]:
        """The sources of mixture number ``item``, ``train.sources`` of them."""

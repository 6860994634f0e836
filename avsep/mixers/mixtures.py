"""The training mixtures of an epoch, drawn by a mixer and read from a store.

Every random choice depends on (seed, task, epoch, item) alone: the number of reader processes, the order of reading and
a resume in mid-epoch cannot change it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from avsep.data.augment import Change, draw_change
from avsep.data.codecs import CodedCrops
from avsep.data.mixing import Source, load_source
from avsep.data.store import Clip, Store
from avsep.errors import ConfigError, DataError
from avsep.mixers.base import Mixer, Pool
from avsep.registry import MIXERS
from avsep.spec import ComponentRef, FrontEndSpec, TrainSpec
from avsep.types import VisualSource

__all__ = ["TrainingMixtures", "epoch_steps"]

_SEEN = {"unseen_source": "source", "photo_source": "source", "unseen": "moving", "photo": "still"}
_CHANGES = 2**32  # added to an item's number, for the random numbers of its changes
_STAND_INS = 2**33  # and for those of what stands in for pictures


class TrainingMixtures(Dataset[list[Source]]):
    """The mixtures of one epoch of one task, drawn by ``train.mixer`` from the current clips and the exemplars.

    ``crops``: the first sample of those exemplars of which one crop alone was kept, by clip id, or of each of several;
    ``coded``: what codecs make of these, of their sound and of their frames. Where the mask decoder does not take
    sources without a picture (``takes_unseen``), a mixer's are seen all the same. ``scores`` as :class:`Pool` has them.

    Raises:
        ConfigError: the mixer cannot make such mixtures of these clips, or they do not fill one batch.
    """

    def __init__(
        self,
        store: Store,
        clips: Sequence[Clip],
        exemplars: Sequence[Clip],
        train: TrainSpec,
        front_end: FrontEndSpec,
        visual_sources: Sequence[VisualSource],
        class_index: dict[str, int],
        *,
        task: int,
        epoch: int,
        crops: Mapping[str, int | Sequence[int]] | None = None,
        coded: CodedCrops | None = None,
        scores: Mapping[tuple[str, str], float] | None = None,
        takes_unseen: bool = True,
    ) -> None:
        self.takes_unseen = takes_unseen
        self.store = store
        self.coded = coded
        self.train = train
        self.front_end = front_end
        self.visual_sources = tuple(visual_sources)
        self.class_index = class_index
        self.key = (train.seed, task, epoch)
        every = [*clips, *exemplars]
        heard = frozenset(c.id for c in every if not store.has_pictures(c)) if self.visual_sources else frozenset()
        if heard and not takes_unseen:
            raise DataError(
                f"clip '{min(heard)}' of {store.path} is a sound without pictures, and the separator's mask decoder "
                "needs pictures of every source: give videos, or compose it with aligned_query"
            )
        self.pool = Pool(
            list(clips), list(exemplars), train, front_end, task, dict(crops or {}), dict(scores or {}), heard
        )
        self._shown = [number for number in range(len(self.pool)) if self.pool[number].id not in heard]
        ref = train.mixer or ComponentRef(name="as_published")
        self.mixer: Mixer = MIXERS.create(ref.name, ref.params)
        self.items = self.mixer.begin_epoch(self.pool, self._rng(2**31))
        if self.items < train.batch_size:
            raise ConfigError(
                f"batch size {train.batch_size} is larger than the epoch's {self.items} mixtures: lower "
                f"train.batch_size or raise train.{'current' if clips else 'memory'}_repeats"
            )

    def _rng(self, item: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([*self.key, item])))

    @property
    def steps(self) -> int:
        """Batches an epoch, the last incomplete one dropped."""
        return epoch_steps(self.items, self.train)

    def __len__(self) -> int:
        return self.steps * self.train.batch_size

    def __getitems__(self, items: Sequence[int]) -> Collection[list[Source]]:
        """The items of a batch, each loaded as it is asked for; a DataLoader calls this."""
        return _Loaded(self, items)

    def __getitem__(self, item: int) -> list[Source]:
        drawn = self.mixer.draw(self._rng(item), item, self.pool)
        changes: list[Change | None] = [None] * len(drawn)
        if self.train.augment is not None:
            rng = self._rng(item + _CHANGES)  # not the mixer's: what is drawn does not depend on how it is changed
            changes = [draw_change(self.train.augment, rng) for _ in drawn]
        if not self.takes_unseen:
            drawn = [one._replace(role=_SEEN.get(one.role, one.role)) for one in drawn]
        return [self._load(*one, change, item) for one, change in zip(drawn, changes, strict=True)]

    def _load(self, number: int, start: int, gain: float, role: str, change: Change | None, item: int) -> Source:
        clip = self.pool[number]
        is_memory = self.pool.is_exemplar(number)
        if change is not None and is_memory and clip.id in self.pool.crops:
            change = replace(change, speed=1.0)  # what lies beyond the kept crop is not at hand
        return load_source(
            self.store,
            clip,
            start,
            self.front_end,
            self.visual_sources,
            self.class_index[clip.class_name],
            gain=gain,
            is_memory=is_memory,
            role=role,
            change=change,
            coded=self._codec_of(number),
            stand_in=self._stand_in(item) if clip.id in self.pool.heard else None,
        )

    def _codec_of(self, number: int) -> CodedCrops | None:
        """Of those exemplars of which crops were kept: recordings that are kept whole are kept as they are."""
        return self.coded if self.pool.is_exemplar(number) and self.pool[number].id in self.pool.crops else None

    def _stand_in(self, item: int) -> tuple[Clip, int, CodedCrops | None] | None:
        """A crop whose pictures the encoders see for a clip that has none: blank ones would change the statistics that
        their normalisations keep."""
        if not self._shown:
            return None
        rng = self._rng(item + _STAND_INS)
        number = self._shown[int(rng.integers(len(self._shown)))]
        return self.pool[number], self.pool.draw(number, rng).start, self._codec_of(number)


class _Loaded(Collection[list[Source]]):
    def __init__(self, data: TrainingMixtures, items: Sequence[int]) -> None:
        self._data = data
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[list[Source]]:
        return (self._data[item] for item in self._items)

    def __contains__(self, item: object) -> bool:
        return item in list(self)


def epoch_steps(items: int, train: TrainSpec) -> int:
    """Batches of an epoch of ``items`` mixtures."""
    full = items // train.batch_size
    return min(full, train.steps_per_epoch or full)

"""Mixtures from a store: frozen test mixtures, and training mixtures drawn by a counter-based generator.

Every random choice of training depends on (seed, task, epoch, item) alone: the number of reader processes, the order
of reading and a resume in mid-epoch cannot change it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from avsep.data.protocol import TestMixture, second_start, seconds_of
from avsep.data.store import Clip, Store
from avsep.errors import ConfigError, DataError
from avsep.spec import FrontEndSpec, TrainSpec
from avsep.types import Batch, VisualInputs, VisualSource

__all__ = ["Slot", "TrainingMixtures", "collate", "epoch_steps", "load_mixtures", "load_slot"]


@dataclass(frozen=True)
class Slot:
    """One source of one mixture, as arrays: ``audio`` [L] float32 before scaling by 1/N; visual inputs by role."""

    audio: np.ndarray
    visual: dict[str, np.ndarray]
    clip: Clip
    class_id: int
    is_memory: bool = False


def load_slot(
    store: Store,
    clip: Clip,
    start: int,
    front_end: FrontEndSpec,
    visual_sources: Sequence[VisualSource],
    class_id: int,
    *,
    gain: float = 1.0,
    is_memory: bool = False,
) -> Slot:
    """Read the crop of ``clip`` that begins at sample ``start`` (zeros outside the clip; its last sample is zero, as
    published), apply the gain, clip to ±1, and read the pictures of the same seconds.

    A clip shorter than the crop is repeated until it fills it.
    """
    length = front_end.clip_samples
    if clip.samples == 0:
        raise DataError(f"clip '{clip.id}' has no samples: run avsep data check on the store")
    audio = store.read_crop(clip, start, length, gain)
    centre_s = (start + length // 2) / front_end.sample_rate_hz
    visual = {
        source.role: store.read_visual(clip, source, centre_s=centre_s, duration_s=front_end.clip_s, copy=False)
        for source in visual_sources
    }
    return Slot(audio=audio, visual=visual, clip=clip, class_id=class_id, is_memory=is_memory)


def collate(mixtures: Collection[Sequence[Slot]]) -> Batch:
    """Stack mixtures of N slots each into a :class:`Batch`; sources are scaled by 1/N (1/2 for the published pairs).

    A mixture that is loaded as it is asked for (:class:`TrainingMixtures`) goes to its place while it is still in the
    processor's cache. In a reader process the tensors are made in shared memory, where the training process finds them
    without a copy.
    """
    sources = torch.empty(0)
    visual: dict[str, torch.Tensor] = {}
    labels: list[list[tuple[int, int, bool, str]]] = []
    first: Slot | None = None
    for b, mixture in enumerate(mixtures):
        if first is None:
            first = mixture[0]
            shape = (len(mixtures), len(mixture))
            sources = _empty((*shape, len(first.audio)), first.audio)  # [B, N, L]
            visual = {role: _empty((*shape, *array.shape), array) for role, array in first.visual.items()}
        for n, slot in enumerate(mixture):
            np.divide(slot.audio, np.float32(len(mixture)), out=sources.numpy()[b, n])
            for role, batch in visual.items():
                if slot.visual[role].shape != batch.shape[2:]:
                    raise DataError(
                        f"clips '{first.clip.id}' and '{slot.clip.id}' have {role} inputs of different shapes, "
                        f"{list(batch.shape[2:])} and {list(slot.visual[role].shape)}: they cannot be in one batch"
                    )
                batch.numpy()[b, n] = slot.visual[role]
        labels.append([(s.class_id, s.clip.index, s.is_memory, s.clip.id) for s in mixture])
    return Batch(
        sources=sources,
        class_ids=torch.tensor([[label[0] for label in m] for m in labels], dtype=torch.int64),
        video_ids=torch.tensor([[label[1] for label in m] for m in labels], dtype=torch.int64),
        is_memory=torch.tensor([[label[2] for label in m] for m in labels], dtype=torch.bool),
        visual=VisualInputs(object=visual.get("object"), motion=visual.get("motion")),
        clips=tuple(tuple(label[3] for label in m) for m in labels),
    )


def _empty(shape: Sequence[int], like: np.ndarray) -> torch.Tensor:
    dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype
    if get_worker_info() is None:
        return torch.empty(*shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * like.itemsize)  # as PyTorch's own collation does
    return torch.empty(0, dtype=dtype).set_(storage).view(*shape)


def load_mixtures(
    store: Store,
    mixtures: Sequence[TestMixture],
    front_end: FrontEndSpec,
    visual_sources: Sequence[VisualSource],
    class_index: dict[str, int],
) -> Batch:
    """Read frozen test mixtures as one batch. ``class_index`` maps class names to the separator's slots."""
    by_id = {c.id: c for c in store.clips}
    rows = []
    for mixture in mixtures:
        slots = []
        for clip_id, name, start in zip(mixture.clips, mixture.classes, mixture.starts, strict=True):
            if clip_id not in by_id:
                raise DataError(f"the protocol names clip '{clip_id}', which {store.path} does not have")
            if name not in class_index:
                raise DataError(f"the protocol names class '{name}', which the separator has not learned")
            slots.append(load_slot(store, by_id[clip_id], start, front_end, visual_sources, class_index[name]))
        rows.append(slots)
    return collate(rows)


class _Loaded(Collection[list[Slot]]):
    def __init__(self, data: TrainingMixtures, items: Sequence[int]) -> None:
        self._data = data
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[list[Slot]]:
        return (self._data[item] for item in self._items)

    def __contains__(self, item: object) -> bool:
        return item in list(self)


class TrainingMixtures(Dataset[list[Slot]]):
    """The mixtures of one epoch of one task.

    The epoch's list holds each current clip ``current_repeats`` times and each exemplar ``memory_repeats`` times
    (``memory_share="constant"``: divided by the number of its class's exemplars), in a shuffled order; an item is the
    list's clip with N - 1 partners drawn uniformly from the same list (published rule; ``partner="different_class"``
    and ``"different_video"`` redraw until the classes or the clips differ). ``crops``: the first sample of those
    exemplars of which one crop alone was kept, by clip id.
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
        crops: Mapping[str, int] | None = None,
    ) -> None:
        self.store = store
        self.clips = [*clips, *exemplars]
        self.crops = dict(crops or {})
        self.current = len(clips)
        self.train = train
        self.front_end = front_end
        self.visual_sources = tuple(visual_sources)
        self.class_index = class_index
        self.key = (train.seed, task, epoch)
        repeats = [train.current_repeats] * len(clips) + _memory_repeats(train, exemplars)
        self.list = np.repeat(np.arange(len(self.clips)), repeats)
        classes = {c.class_name for c in self.clips}
        if train.partner == "different_class" and len(classes) < train.sources:
            raise ConfigError(
                f"partner=different_class needs {train.sources} classes, but task {task} trains on {len(classes)}: "
                f"use partner=any or more classes"
            )
        if train.partner == "different_video" and len(self.clips) < train.sources:
            raise ConfigError(
                f"partner=different_video needs {train.sources} clips, but task {task} trains on {len(self.clips)}: "
                f"use partner=any or more clips"
            )
        if len(self.list) < train.batch_size:
            raise ConfigError(
                f"batch size {train.batch_size} is larger than the epoch's {len(self.list)} mixtures: lower "
                f"train.batch_size or raise train.current_repeats"
            )
        self.order = self._rng(2**31).permutation(len(self.list))

    def _rng(self, item: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([*self.key, item])))

    @property
    def steps(self) -> int:
        """Batches an epoch, the last incomplete one dropped."""
        return epoch_steps(len(self.list), self.train)

    def __len__(self) -> int:
        return self.steps * self.train.batch_size

    def __getitems__(self, items: Sequence[int]) -> Collection[list[Slot]]:
        """The items of a batch, each loaded as it is asked for; a DataLoader calls this."""
        return _Loaded(self, items)

    def __getitem__(self, item: int) -> list[Slot]:
        rng = self._rng(item)
        chosen = [int(self.list[self.order[item]])]
        while len(chosen) < self.train.sources:
            candidate = int(self.list[rng.integers(len(self.list))])
            if self.train.partner == "different_video" and candidate in chosen:
                continue
            if self.train.partner == "different_class" and self.clips[candidate].class_name in {
                self.clips[c].class_name for c in chosen
            }:
                continue
            chosen.append(candidate)
        return [self._slot(number, rng) for number in chosen]

    def _slot(self, number: int, rng: np.random.Generator) -> Slot:
        clip = self.clips[number]
        gain = float(rng.uniform(*self.train.gain))
        start = self._start(clip, rng)  # drawn for a kept crop too: how exemplars are kept changes no other draw
        if number >= self.current:
            start = self.crops.get(clip.id, start)
        return load_slot(
            self.store,
            clip,
            start,
            self.front_end,
            self.visual_sources,
            self.class_index[clip.class_name],
            gain=gain,
            is_memory=number >= self.current,
        )

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


def epoch_steps(items: int, train: TrainSpec) -> int:
    """Batches of an epoch whose list has ``items`` entries."""
    full = items // train.batch_size
    return min(full, train.steps_per_epoch or full)


def _memory_repeats(train: TrainSpec, exemplars: Sequence[Clip]) -> list[int]:
    """Times that each exemplar stands in the list."""
    if train.memory_share == "grow":
        return [train.memory_repeats] * len(exemplars)
    of_class = Counter(clip.class_name for clip in exemplars)
    return [max(1, train.memory_repeats // of_class[clip.class_name]) for clip in exemplars]

"""Batches of a task's training mixtures, on the training device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from avsep.data.codecs import Codec, CodedCrops, PictureCodec
from avsep.data.mixing import collate
from avsep.data.tasks import TaskStream
from avsep.distributed.ranks import ALONE, Ranks
from avsep.errors import AvsepError
from avsep.memory.base import Memory
from avsep.mixers.mixtures import TrainingMixtures
from avsep.progress import Progress
from avsep.registry import MIXERS
from avsep.separator import Separator
from avsep.spec import TrainSpec
from avsep.types import Batch, Task, move_to

__all__ = ["TaskMixtures"]

_AFTER = 2**30  # no epoch of training: the first of those that a strategy draws from


class TaskMixtures:
    """The training mixtures of one task, epoch by epoch.

    Args:
        exemplars: the memory of earlier tasks; ``all_data`` takes all training clips of all classes seen in its place.
        memory_only: take the exemplars of all classes seen, the task's own too, and no other clips.
        codec, pictures: how the exemplars' sound and frames are kept.
        ranks: of several processes each reads its equal part of every batch.
        workers: reader processes.
    """

    def __init__(
        self,
        stream: TaskStream,
        task: Task,
        exemplars: Memory,
        train: TrainSpec,
        separator: Separator,
        *,
        all_data: bool = False,
        memory_only: bool = False,
        codec: Codec = "int16",
        pictures: PictureCodec = "raw",
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        remembered = () if all_data else task.seen if memory_only else task.old
        kept = [e for name in remembered for e in exemplars.get(name, ())]
        self._store = stream.store
        self._clips = [] if memory_only else stream.train_clips(task, all_seen=all_data)
        starts: dict[str, list[int]] = {e.id: [] for e in kept}
        for exemplar in kept:
            if exemplar.start is not None:
                starts[exemplar.id].append(exemplar.start)
        self._starts = starts
        self._exemplars = stream.store.clips_by_id(list(starts))
        self._crops: dict[str, int | Sequence[int]] = {
            name: of[0] if len(of) == 1 else of for name, of in starts.items() if of
        }
        self._train = train
        self._front_end = separator.spec.front_end
        coded = CodedCrops(stream.store, codec, self._front_end.clip_samples, pictures)
        self._coded = coded if coded.loses else None
        self._visual_sources = separator.visual_sources()
        self._takes_unseen = separator.mask_decoder.takes_unseen
        self._task = task
        self._ranks = ranks
        self._device = torch.device(device)
        self._workers = workers
        self.uses_scores = train.mixer is not None and MIXERS.get(train.mixer.name).factory.uses_scores
        self.scores: dict[tuple[str, str], float] = {}  # of the last validation, for mixers that look at them
        self._shown: tuple[Progress, str] | None = None

    def epoch(self, epoch: int) -> TrainingMixtures:
        """The mixtures of one epoch.

        Raises:
            ConfigError: the task has too few clips for a batch, or for the mixer.
        """
        return TrainingMixtures(
            self._store,
            self._clips,
            self._exemplars,
            self._train,
            self._front_end,
            self._visual_sources,
            {name: number for number, name in enumerate(self._task.seen)},
            task=self._task.index,
            epoch=epoch,
            crops=self._crops,
            coded=self._coded,
            scores=self.scores if epoch < _AFTER else None,
            takes_unseen=self._takes_unseen,
        )

    def training_batches(self, data: TrainingMixtures, done: int = 0) -> Iterator[Batch]:
        """An epoch's batches from the ``done``-th on; of several processes, this one's part of each."""
        size, ranks = self._train.batch_size, self._ranks
        part = size // ranks.world
        begins = range(done * size + ranks.rank * part, len(data), size)
        return self._read(data, [item for begin in begins for item in range(begin, begin + part)], part)

    def show(self, bars: Progress, label: str) -> None:
        """Show a bar for what :meth:`batches` gives from now on."""
        self._shown = (bars, label)

    def batches(self, count: int, *, batch_size: int = 1) -> Iterator[Batch]:
        """As :meth:`avsep.strategies.TaskData.batches`: the same ones on every rank and on every call."""
        bars, label = self._shown or (Progress(), "")
        bar = bars.add(label, total=count)
        epoch = _AFTER
        while count > 0:
            data = self.epoch(epoch)
            take = min(count, len(data))
            for batch in self._read(data, range(take), batch_size):
                yield batch
                bars.advance(bar, len(batch.sources))
            count -= take
            epoch += 1

    def _read(self, data: TrainingMixtures, items: Sequence[int], batch_size: int) -> Iterator[Batch]:
        if self._coded is not None and self._workers:  # readers are started anew for every epoch
            by_id = {clip.id: clip for clip in self._exemplars}
            kept = ((by_id[name], start) for name, of in self._starts.items() for start in of)
            self._coded.prepare(kept, self._visual_sources)
        loader: DataLoader[Any] = DataLoader(
            Subset(data, items),
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
        )
        batches = iter(loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except AvsepError as error:
                # from a reader process it comes with that process's traceback around it
                if not str(error).startswith("Caught "):
                    raise
                kind = type(error)
                raise kind(str(error).rstrip().splitlines()[-1].partition(f"{kind.__name__}: ")[2]) from None
            yield move_to(batch, self._device, non_blocking=True)

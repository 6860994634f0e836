"""What a continual strategy is: it sees masks and features, never class logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from avsep.distributed.ranks import ALONE, Ranks
from avsep.losses import separation_loss
from avsep.registry import Component

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from avsep.separator import Separator
    from avsep.types import AudioFeatures, Batch, MaskOutput, Spectrograms, Task, VisualFeatures

__all__ = ["Step", "Strategy", "TaskData"]


@dataclass(frozen=True)
class Step:
    """One training step after the student's forward pass, for a strategy's loss.

    ``batch`` the mixtures; ``spectrograms`` their analysis; ``audio``, ``visual`` and ``output`` the student's
    features and masks; ``num_old`` the number of classes of earlier tasks, which occupy the first slots. Where several
    processes train together all of this is of one of their equal parts of the batch, and ``ranks`` leads to the others.
    """

    batch: Batch
    spectrograms: Spectrograms
    audio: AudioFeatures
    visual: VisualFeatures
    output: MaskOutput
    num_old: int
    ranks: Ranks = ALONE

    @property
    def is_old(self) -> Tensor:
        """[B, N] bool: slots of classes of earlier tasks (the set O of memory slots)."""
        return self.batch.class_ids < self.num_old

    @cached_property
    def all_old(self) -> Tensor:
        """:attr:`is_old` of all ranks, in their order."""
        return self.ranks.gather(self.is_old)

    def any_old(self, here: bool) -> bool:
        """Whether any rank has a slot of an earlier task, given whether this one has."""
        return bool(self.all_old.any()) if self.ranks.several else here

    def of_old(self, mean: Tensor) -> Tensor:
        """A mean over this rank's old slots (0 if it has none), weighed so that its mean over the ranks is the mean
        over the old slots of all."""
        if not self.ranks.several:
            return mean
        return mean * (self.is_old.sum() * self.ranks.world / self.all_old.sum().clamp_min(1))


class TaskData(Protocol):
    """The training mixtures of a task that has just been learned, for what a strategy computes after it.

    ``is_last``: no task follows, so that what only later ones would use need not be computed.
    """

    @property
    def is_last(self) -> bool: ...

    def batches(self, count: int, *, batch_size: int = 1) -> Iterator[Batch]:
        """``count`` random mixtures, drawn as in training (exemplars included), on the training device.

        They depend on the run's seed and the task alone, so that a resume computes the same from them.
        """


class Strategy(Component):
    """Base: trains on the current task (and exemplars, if the memory gives any) with the separation loss alone.

    Class attributes say what the learner prepares: ``needs_teacher`` a frozen copy of the previous task's separator;
    ``uses_all_data`` the training clips of all seen classes in place of exemplars; ``restarts`` fresh weights for
    every task; ``needs_memory`` refuses the memory policy ``none``; ``across_ranks`` states that the mean over the
    ranks of :meth:`loss`, each with its part of the batch, is the loss of the whole batch
    (:mod:`avsep.distributed.ranks`): without it training with more than one process is refused.
    """

    needs_teacher = False
    uses_all_data = False
    restarts = False
    needs_memory = False
    across_ranks = False

    def check(self, separator: Separator) -> None:
        """Raise :class:`~avsep.errors.ConfigError` with the reason where the separator lacks what the strategy needs.

        Called before anything is trained.
        """

    def first_task(self) -> dict[str, Any]:
        """What decides how the first task is trained, as plain data; empty: the separation loss alone.

        Runs that agree in this (and in everything that is not the strategy) have equal first tasks, and may share one.
        """
        return {}

    def before_task(self, student: Separator, teacher: Separator | None, task: Task) -> None:
        """Called when a task starts, after the student has grown and before the optimisers are made.

        A resume within the task does not call it again (what it prepares belongs into :meth:`state_dict`), and a first
        task that was taken from another run does not call it at all.
        """

    def freeze(self, student: Separator, task: Task) -> None:
        """Set ``requires_grad_`` where not everything is to learn (see also :meth:`~avsep.Separator.freeze`).

        Called before the optimisers are made: when a task starts, after :meth:`before_task`, and on every resume
        within it, after the student's weights have been loaded.
        """

    def loss(self, student: Separator, teacher: Separator | None, step: Step) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; their sum is what is minimised.

        The mask decoder's own terms (``auxiliary_losses``), where it has any, are added by the learner. On several
        ranks all must give terms of the same names.
        """
        return {"separation": separation_loss(step.output, step.spectrograms)}

    def after_step(self, student: Separator) -> None:
        """Called after every step of the optimisers, to put back what they moved and should not."""

    def after_task(self, student: Separator, teacher: Separator | None, task: Task, data: TaskData) -> None:
        """Called with the task's selected weights, in evaluation mode, before they are stored.

        It may change the student in place. Every rank calls it with the same data, and rank 0's outcome is kept. A run
        that is killed within it, or before the next task's first checkpoint, calls it again from the same weights and
        state.
        """

    def state_dict(self) -> dict[str, Any]:
        """What must survive between tasks and across a resume: tensors and plain values, in flat form."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint has {sorted(state)}")

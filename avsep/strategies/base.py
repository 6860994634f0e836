"""The contract of continual strategies: they see masks and features, never class logits.

A strategy is one class on one page. The learner calls, in this order,

- ``begin_task(ctx)`` when a task starts, and again on every resume within it, and then ``learning_rate(name)`` and
  ``weight_decay(name)`` of every parameter that is trained;
- in every step ``train_weights(student)`` around the forward and backward pass, and in it ``loss(step)``; then
  ``after_backward(step)``, the clipping of gradients and the optimisers, then
  ``after_step(step)``;
- ``eval_weights(student)`` around every validation;
- ``after_task(ctx)`` with the selected weights, before they are stored.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from avsep.distributed.ranks import ALONE, Ranks
from avsep.errors import ConfigError
from avsep.losses import separation_loss
from avsep.registry import Component

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator
    from avsep.types import AudioFeatures, Batch, MaskOutput, Prediction, Spectrograms, Task, VisualFeatures

__all__ = ["Step", "Strategy", "TaskContext", "TaskData", "TeacherOutput", "check_contract"]


class TaskData(Protocol):
    """The training mixtures of a task."""

    def batches(self, count: int, *, batch_size: int = 1) -> Iterator[Batch]:
        """``count`` random mixtures, drawn as in training (exemplars included), on the training device.

        They depend on the run's seed and the task alone, so that a resume computes the same from them.
        """


@dataclass(frozen=True)
class TaskContext:
    """What a strategy is given at the beginning and at the end of a task.

    ``student`` has the task's classes already; ``teacher``, the frozen separator of the task before, is there where
    ``needs_teacher`` is set and there was one. ``old_shapes`` are the shapes of the student's tensors before the
    classes of this task were added (empty in the first task): what is new of a tensor lies beyond them. ``steps``: of
    the task, in all. ``resumed``: a run goes on within the task, with the weights and the state of its last checkpoint.
    ``is_last``: no task is known to follow, so that :meth:`Strategy.after_task` need not compute what only later ones
    would use. When the run is extended, it is called once more, from the task's last checkpoint and without
    ``is_last``: while a task is being trained nothing may be left out.
    """

    task: Task
    student: Separator
    teacher: Separator | None
    data: TaskData
    ranks: Ranks = ALONE
    steps: int = 0
    resumed: bool = False
    is_last: bool = False
    old_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One training step after the student's forward pass.

    ``batch`` the mixtures; ``spectrograms`` their analysis; ``audio``, ``visual`` and ``output`` the student's features
    and masks; ``num_old`` the number of classes of earlier tasks, which have the first class ids; ``number`` the steps
    of this task before this one. Where several processes train together, all of this is of one of their equal parts of
    the batch: :meth:`gather` and :meth:`mean_over` own what that takes.
    """

    batch: Batch
    spectrograms: Spectrograms
    audio: AudioFeatures
    visual: VisualFeatures
    output: MaskOutput
    num_old: int
    student: Separator
    teacher: Separator | None = None
    ranks: Ranks = ALONE
    number: int = 0
    _answers: dict[tuple[int | None, bool, bool], TeacherOutput] = field(default_factory=dict, init=False, repr=False)
    _calls: list[Callable[[Step, Mapping[str, Tensor]], None]] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def is_old(self) -> Tensor:
        """[B, N] bool: the sources whose class is of an earlier task (the set O of memory sources)."""
        return self.batch.class_ids < self.num_old

    @cached_property
    def old_mixtures(self) -> Tensor:
        """int64 [M]: the mixtures with a source of an earlier task."""
        return torch.nonzero(self.is_old.any(dim=1)).squeeze(1)

    @cached_property
    def known_class_ids(self) -> Tensor:
        """[B, N]: the class ids where the teacher knows them, elsewhere 0, since it has no query for a new class."""
        return self.batch.class_ids.where(self.is_old, 0)

    @cached_property
    def separation(self) -> Tensor:
        """The separation loss, a scalar (:func:`avsep.losses.separation_loss`)."""
        return separation_loss(self.output, self.spectrograms)

    @cached_property
    def all_old(self) -> Tensor:
        """:attr:`is_old` of all ranks, in their order."""
        return self.ranks.gather(self.is_old)

    @property
    def any_old(self) -> bool:
        """Whether a source of an earlier task is in the batch, on any rank."""
        return bool(self.all_old.any()) if self.ranks.several else len(self.old_mixtures) > 0

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] of this rank -> [world n, ...] of all, in their order; gradients come back."""
        return self.ranks.gather(x)

    def mean_over(self, sources: Tensor, mean: Tensor) -> Tensor:
        """``mean``, taken over this rank's chosen ``sources`` [B, N] bool (0 if it has none), weighted so that its mean
        over the ranks is the mean over the chosen sources of all."""
        if not self.ranks.several:
            return mean
        everywhere = self.all_old if sources is self.is_old else self.gather(sources)
        return mean * (sources.sum() * self.ranks.world / everywhere.sum().clamp_min(1))

    def before_backward(self, call: Callable[[Step, Mapping[str, Tensor]], None]) -> None:
        """Have ``call(step, terms)`` called with all terms that are summed up, while their graph is there: also those
        of strategies beside the one that asks in its :meth:`Strategy.loss`, of the mask decoder and of the training."""
        self._calls.append(call)

    def show_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Make the calls that :meth:`before_backward` was asked for."""
        for call in self._calls:
            call(self, terms)

    def teacher_output(
        self,
        class_ids: Tensor | None = None,
        *,
        old_mixtures: bool = False,
        batch_statistics: bool = False,
        teacher: Separator | None = None,
    ) -> TeacherOutput:
        """What the teacher makes of the mixtures: computed when it is first read, once for all that ask alike.

        Args:
            class_ids: [B, N], the classes to decode, each below the teacher's ``num_classes``;
                :attr:`known_class_ids` when None.
            old_mixtures: decode :attr:`old_mixtures` alone, in place of all.
            batch_statistics: let the teacher normalise with the statistics of the batch, as the published code does.
            teacher: another separator to ask.
        """
        teacher = self.teacher if teacher is None else teacher
        if teacher is None:
            raise ConfigError("there is no teacher: set needs_teacher, and the first task never has one")
        key = (None if class_ids is None else id(class_ids), old_mixtures, batch_statistics)
        found = self._answers.get(key) if teacher is self.teacher else None
        if found is None:
            ids = self.known_class_ids if class_ids is None else class_ids
            found = TeacherOutput(self, teacher, ids, self.old_mixtures if old_mixtures else None, batch_statistics)
            if teacher is self.teacher:
                self._answers[key] = found
        return found


class TeacherOutput:
    """The teacher's features and masks of a step's mixtures, without gradients, computed when they are first read.

    ``mixtures`` int64 [M]: which of the batch's B mixtures it is about; None: all. Sources of new classes were decoded
    with a class id of their own choosing: never read their masks.
    """

    def __init__(
        self, step: Step, teacher: Separator, class_ids: Tensor, mixtures: Tensor | None, batch_statistics: bool
    ) -> None:
        self.mixtures = mixtures
        self.class_ids = class_ids  # also keeps the tensor, and so its id, alive
        # not the step itself, which holds this: tensors in a circle would wait for the garbage collector
        self._batch = step.batch
        self._spectrograms = step.spectrograms
        self._teacher = teacher
        self._batch_statistics = batch_statistics

    @cached_property
    def _prediction(self) -> Prediction:
        self._teacher.train(self._batch_statistics)
        with torch.no_grad():
            return self._teacher.predict(
                self._batch, class_ids=self.class_ids, spectrograms=self._spectrograms, mixtures=self.mixtures
            )

    @property
    def output(self) -> MaskOutput:
        return self._prediction.output

    @property
    def visual(self) -> VisualFeatures:
        return self._prediction.visual

    @cached_property
    def audio(self) -> AudioFeatures:
        """The audio features of the mixtures; read after :attr:`output`, where both are, it costs nothing."""
        if "_prediction" in self.__dict__:
            return self._prediction.audio
        rows = slice(None) if self.mixtures is None else self.mixtures
        self._teacher.train(self._batch_statistics)
        with torch.no_grad():
            found: AudioFeatures = self._teacher.audio_encoder(self._spectrograms.network_input[rows])
        return found

    def spread(self, x: Tensor) -> Tensor:
        """[M, N, ...] of :attr:`mixtures` -> [B, N, ...] of the batch, 0 elsewhere."""
        if self.mixtures is None:
            return x
        whole = x.new_zeros(len(self._batch.class_ids), *x.shape[1:])
        whole[self.mixtures] = x
        return whole


class Strategy(Component):
    """Base: trains on the current task (and exemplars, if the memory gives any) with the separation loss alone.

    Class attributes say what the learner prepares: ``needs_teacher`` a frozen copy of the previous task's separator;
    ``uses_all_data`` the training clips of all seen classes in place of exemplars; ``memory_only`` the exemplars of all
    seen classes in place of the task's clips, chosen from them before the task is trained; ``restarts`` fresh weights
    for every task; ``needs_memory`` refuses the memory policy ``none``; ``across_ranks`` states that the mean over the
    ranks of :meth:`loss`, each with its part of the batch, is the loss of the whole batch
    (:mod:`avsep.distributed.ranks`): without it training with more than one process is refused;
    ``changes_separation`` that the term ``separation`` of its :meth:`loss` is not the separation loss of the whole
    batch, which matters where strategies are combined: the others' is left out, and no two may do so.

    Four more matter where strategies are combined. ``sets_weights`` names which of ``begin_task`` and ``after_task``
    change the student's weights: there it is called before the others, which may take note of the weights. ``freezes``:
    from the second task on most of what was learned stays as it is. ``unlearns``: it begins a task with less than was
    learned; as ``restarts``, this is not combined with a strategy that freezes. ``fits_weights``: what it learns holds
    for the weights that training ends with alone, so that it is not combined with one that stores others, by setting
    them in ``after_task`` or by ``eval_weights``.
    """

    needs_teacher = False
    uses_all_data = False
    memory_only = False
    restarts = False
    needs_memory = False
    across_ranks = False
    changes_separation = False
    sets_weights: tuple[str, ...] = ()
    freezes = False
    unlearns = False
    fits_weights = False

    def check(self, separator: Separator) -> None:
        """Raise :class:`~avsep.errors.ConfigError` with the reason where the separator lacks what the strategy needs.

        Called before anything is trained.
        """

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise :class:`~avsep.errors.ConfigError` where the strategy lacks something for one of the classes, which are
        those of all tasks. Called before anything is trained."""

    def first_task(self) -> dict[str, Any] | None:
        """What decides how the first task is trained, as plain data; empty: the separation loss alone.

        Runs that agree in this (and in everything that is not the strategy) have equal first tasks, and may share one.
        None, which is the default: the first task is never shared.
        """
        return None

    def begin_task(self, ctx: TaskContext) -> None:
        """Called when a task starts, before the optimisers are made, and on every resume within it, after the
        student's weights and the strategy's state have been loaded.

        The place for what a task needs, and for ``requires_grad_`` where not everything is to learn (see also
        :meth:`avsep.Separator.freeze`). A first task that was taken from another run does not call it.
        """

    def learning_rate(self, name: str) -> float:
        """What a parameter's learning rate is multiplied by throughout the task. Asked after :meth:`begin_task`, of
        every parameter of the student that is trained, by its name."""
        return 1.0

    def weight_decay(self, name: str) -> float:
        """What a parameter's weight decay is multiplied by; asked as :meth:`learning_rate` is."""
        return 1.0

    def train_weights(self, student: Separator) -> contextlib.AbstractContextManager[None]:
        """A context in which the student has the weights of a step's forward and backward pass: its own by default.

        The gradient is then taken at those weights, and the optimisers apply it to the student's own.
        """
        return contextlib.nullcontext()

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; their sum is what is minimised.

        The mask decoder's own terms (``auxiliary_losses``), where it has any, are added by the learner. On several
        ranks all must give terms of the same names.
        """
        return {"separation": step.separation}

    def after_backward(self, step: Step) -> None:
        """Called with the gradients in place, averaged over the ranks and unscaled, before they are clipped."""

    def after_step(self, step: Step) -> None:
        """Called after every step of the optimisers, to put back what they moved and should not."""

    def eval_weights(self, student: Separator) -> contextlib.AbstractContextManager[None]:
        """A context in which the student has the weights that are validated, selected and stored: its own by default.

        Outside of it the student goes on training with the weights that it had before.
        """
        return contextlib.nullcontext()

    def after_task(self, ctx: TaskContext) -> None:
        """Called with the task's selected weights, in evaluation mode, before they are stored.

        It may change the student in place. Every rank calls it with the same data, and rank 0's outcome is kept. A run
        that is killed within it, or before the next task's first checkpoint, calls it again from the same weights and
        state.
        """

    @property
    def keeps_state(self) -> bool:
        """Whether the strategy may have something in its :meth:`state_dict`."""
        return type(self).state_dict is not Strategy.state_dict

    def state_dict(self) -> dict[str, Any]:
        """What must survive between tasks and across a resume: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint has {sorted(state)}")


# What a strategy of version 0.1 has -> what it is now.
_RENAMED = {"before_task": "begin_task(ctx)", "freeze": "begin_task(ctx), which a resume calls too"}
_ARGUMENTS = {"loss": "step", "after_step": "step", "after_task": "ctx"}


def check_contract(strategy: Strategy, name: str) -> None:
    """Raise :class:`~avsep.errors.ConfigError` for a strategy that was written for an earlier version, with the line
    that says what to rename."""
    kind = type(strategy)
    where = f"strategy '{name}' ({kind.__module__}.{kind.__qualname__}) is written for an earlier version of avsep"
    for old, new in _RENAMED.items():
        if hasattr(strategy, old):
            raise ConfigError(f"{where}: its {old} is now {new}; rename it (CONTRIBUTING.md has an example)")
    for method, argument in _ARGUMENTS.items():
        parameters = inspect.signature(getattr(kind, method)).parameters.values()
        takes = [p.name for p in parameters if p.name != "self" and p.default is p.empty]
        if len(takes) != 1 or (method == "after_step" and takes[0] == "student"):
            raise ConfigError(
                f"{where}: {method}({', '.join(takes)}) is now {method}({argument}), and student, teacher, task and "
                f"data are attributes of {argument}; rename them (CONTRIBUTING.md has an example)"
            )

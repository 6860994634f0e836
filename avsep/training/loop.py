"""The training loop of one task: the only place where an optimiser steps.

The losses stay on the device; every ``LOG_EVERY`` steps, and before anything is stored, they are read, checked and
logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from avsep.distributed.ranks import ALONE, Ranks
from avsep.errors import LostRankError, NumericalError
from avsep.losses import mask_cross_entropy
from avsep.progress import Progress
from avsep.runs.checkpoint import rng_state, save_latest, set_rng_state, taking_state
from avsep.runs.folder import RunFolder
from avsep.separator import Separator
from avsep.spec import TrainSpec
from avsep.strategies.base import Step, Strategy
from avsep.training.loader import TaskMixtures
from avsep.training.log import NORM_EVERY, TaskLog, gradient_norm, is_pictured
from avsep.training.optim import lay_out_state, make_optimizers, set_learning_rates
from avsep.training.validation import Validation, pair_scores
from avsep.types import Batch, Task

__all__ = ["LOG_EVERY", "StepInputs", "TaskLoop", "TaskRecord", "TrainingStep"]

LOG_EVERY = 10


@dataclass
class TaskRecord:
    """Where a task stands. ``seconds``: spent on it, in all sessions, up to the last checkpoint."""

    epoch: int = 0
    step: int = 0
    best_sdr_db: float | None = None
    best_epoch: int = 0
    best_step: int = 0
    seconds: float = 0.0

    @property
    def note(self) -> str:
        return "" if self.best_sdr_db is None else f", best {self.best_sdr_db:.1f} dB"


class StepInputs:
    """What a training step takes. A plain object, since Fabric looks into containers, and would cast the waveforms and
    the stored features to half precision before the STFT (it cannot do even that to a frozen dataclass)."""

    def __init__(self, batch: Batch, teacher: Separator | None, num_old: int, number: int = 0) -> None:
        self.batch = batch
        self.teacher = teacher
        self.num_old = num_old
        self.number = number


class TrainingStep(nn.Module):
    """Forward pass and loss as one module, so that mixed precision wraps both. ``step`` is the last one's."""

    def __init__(
        self, student: Separator, strategy: Strategy, ranks: Ranks = ALONE, cross_entropy_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.student = student
        self.strategy = strategy
        self.ranks = ranks
        self.cross_entropy_weight = cross_entropy_weight
        self.step: Step | None = None

    def forward(self, inputs: StepInputs) -> dict[str, Tensor]:
        student, batch = self.student, inputs.batch
        found = student.predict(batch)
        self.step = Step(
            batch,
            found.spectrograms,
            found.audio,
            found.visual,
            found.output,
            inputs.num_old,
            student,
            inputs.teacher,
            self.ranks,
            inputs.number,
        )
        terms = dict(self.strategy.loss(self.step))
        if self.cross_entropy_weight > 0:
            weight = self.ranks.mean(found.spectrograms.weight.mean())
            cross_entropy = mask_cross_entropy(found.output, found.spectrograms, weight)
            terms = {**terms, "cross_entropy": self.cross_entropy_weight * cross_entropy}
        # a decoder may bring terms of its own
        terms |= student.mask_decoder.auxiliary_losses(found.output, found.spectrograms, batch.class_ids)
        self.step.show_terms(terms)
        return terms


@dataclass(frozen=True)
class _Pending:
    """A step that is not logged yet: its loss terms [K] are still on the device."""

    step: int
    epoch: int
    names: tuple[str, ...]
    terms: Tensor
    rates: dict[str, float]
    norm: Tensor | None
    seconds: float
    clips: tuple[tuple[str, ...], ...]


class TaskLoop:
    """Trains the student on one task, from its beginning or from a checkpoint.

    The student has the task's classes, the strategy has begun the task, and both have the checkpoint's weights and
    state, where there is a ``state``.
    """

    def __init__(
        self,
        fabric: Fabric,
        ranks: Ranks,
        folder: RunFolder,
        train: TrainSpec,
        strategy: Strategy,
        student: Separator,
        teacher: Separator | None,
        task: Task,
        mixtures: TaskMixtures,
        exemplars: dict[str, list[Any]],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._fabric = fabric
        self._ranks = ranks
        self._folder = folder
        self._train = train
        self._strategy = strategy
        self._student = student
        self._teacher = teacher
        self._task = task
        self._mixtures = mixtures
        self._exemplars = exemplars  # in plain form, for the checkpoint
        self._inner = TrainingStep(student, strategy, ranks, train.cross_entropy_weight)
        optimizers = make_optimizers(student, train.optimizers, strategy)
        self._module, *ready = fabric.setup(self._inner, *optimizers.values())
        self._optimizers = dict(zip(optimizers, ready, strict=True))
        self._precision = fabric.strategy.precision
        self._pending: list[_Pending] = []
        self.record = TaskRecord()
        self._best: dict[str, Tensor] = {}
        if state is not None:
            taking_state(folder.state)(self._restore)(state)
        self._started = time.perf_counter() - self.record.seconds

    def _restore(self, state: Mapping[str, Any]) -> None:
        for group, optimizer in self._optimizers.items():
            if group in state["optimizers"]:
                optimizer.load_state_dict(state["optimizers"][group])
                lay_out_state(optimizer)
        set_rng_state(state["random"])
        if state.get("precision"):
            self._precision.load_state_dict(state["precision"])
        self.record = TaskRecord(**state["progress"]["record"])
        self._best = state.get("best") or {}
        self._mixtures.scores = {(a, b): score for a, b, score in state["progress"].get("scores", [])}

    def checkpoint(self) -> None:
        """Store where the task stands, once its weights are known to be finite."""
        _check_finite(self._student, self._task, self.record.step, self._folder)
        self.record.seconds = time.perf_counter() - self._started
        if not self._ranks.first:
            return
        save_latest(
            self._folder.state,
            f"task-{self._task.index:02d}-step-{self.record.step:07d}",
            {
                "student": self._student.state_dict(),
                "best": self._best,
                "optimizers": {group: o.state_dict() for group, o in self._optimizers.items()},
                "strategy": self._strategy.state_dict(),
                "random": rng_state(),
                "precision": self._precision.state_dict(),
                "progress": {
                    "task": self._task.index,
                    "exemplars": self._exemplars,
                    "record": asdict(self.record),
                    **(
                        {"scores": [[*pair, s] for pair, s in self._mixtures.scores.items()]}
                        if self._mixtures.scores
                        else {}
                    ),
                },
            },
        )

    def run(self, validation: Validation, log: TaskLog, bars: Progress, label: str) -> TaskRecord:
        """Train to the end of the task; the student then has the selected weights."""
        train, record = self._train, self.record
        steps = self._mixtures.epoch(0).steps
        total = steps * train.epochs
        bar = bars.add(label, total=total, done=record.step)
        while record.epoch < train.epochs:
            data = self._mixtures.epoch(record.epoch)
            for batch in self._mixtures.training_batches(data, record.step - record.epoch * steps):
                self._step(batch, total)
                bars.advance(bar)
                stores = record.step % train.checkpoint_every == 0 and record.step % steps != 0
                if stores or record.step % LOG_EVERY == 0:
                    self._flush(log, bars, bar)
                if stores:
                    self.checkpoint()
            record.epoch += 1
            self._flush(log, bars, bar)
            if record.epoch % train.validate_every == 0 or record.epoch == train.epochs:
                self._validate(validation, log)
            self.checkpoint()
        if self._best:
            self._student.load_state_dict(self._best)
        return record

    def _step(self, batch: Batch, total: int) -> None:
        """One step of all optimisers; nothing here waits for the device."""
        record, train = self.record, self._train
        self._student.train()
        rates = set_learning_rates(
            self._optimizers, train.optimizers, step=record.step, epoch=record.epoch, total_steps=total
        )
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()
        inputs = StepInputs(batch, self._teacher, len(self._task.old), record.step)
        with self._strategy.train_weights(self._student):
            terms: dict[str, Tensor] = self._module(inputs)
            loss = torch.stack([t.float() for t in terms.values()]).sum()
            self._fabric.backward(loss)
        step = self._inner.step
        assert step is not None
        scaler = getattr(self._precision, "scaler", None)  # of 16-mixed
        if scaler is not None:
            for optimizer in self._optimizers.values():
                scaler.unscale_(optimizer.optimizer)
        norm = gradient_norm(self._student) if record.step % NORM_EVERY == 0 else None
        self._strategy.after_backward(step)
        if train.gradient_clip is not None:
            for optimizer in self._optimizers.values():  # one not finite: the scaler skips, or the next loss shows it
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(parameters, train.gradient_clip, error_if_nonfinite=False)
        for optimizer in self._optimizers.values():
            if scaler is None:
                optimizer.step()
            else:  # one update a step: Fabric's own follows each optimizer, and the next would unscale by another scale
                scaler.step(optimizer.optimizer)
        if scaler is not None:
            scaler.update()
        self._strategy.after_step(step)
        self._inner.step = None  # its tensors are not needed any more
        own = torch.stack([t.detach().float() for t in terms.values()])
        record.step += 1
        seconds = time.perf_counter() - self._started
        self._pending.append(_Pending(record.step, record.epoch, tuple(terms), own, rates, norm, seconds, batch.clips))

    def _flush(self, log: TaskLog, bars: Progress, bar: Any) -> None:
        """Read the losses of the steps since the last time, stop where one is not finite, and log them."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        own = torch.cat([entry.terms for entry in pending])
        values = self._ranks.mean(own).tolist()
        mine = own.isfinite().tolist() if self._ranks.several else []
        for entry in pending:
            count = len(entry.names)
            named = dict(zip(entry.names, values[:count], strict=True))
            if not all(map(math.isfinite, named.values())):
                self._refuse(entry, named, not self._ranks.several or not all(mine[:count]))
            del values[:count], mine[:count]
            loss = sum(named.values())
            row = {"task": self._task.index, "epoch": entry.epoch, "step": entry.step, "loss": loss, **named}
            row |= {"lr": next(iter(entry.rates.values())), "seconds": entry.seconds}
            log.train(row, entry.rates, None if entry.norm is None else float(entry.norm))
        bars.advance(bar, 0, note=f"loss {loss:.3f}{self.record.note}")

    def _refuse(self, entry: _Pending, named: dict[str, float], here: bool) -> None:
        at = f"the loss is not finite at task {self._task.index} step {entry.step - 1}"
        if not here:  # the rank whose clips they are names them
            raise LostRankError(f"{at} on another process")
        terms = ", ".join(f"{name} {value:.4g}" for name, value in named.items())
        raise NumericalError(
            f"{at} ({terms}); the batch: {', '.join('+'.join(clips) for clips in entry.clips)}; the last good "
            f"checkpoint is in {self._folder.state}: look at those clips (and the batch before, whose gradient may "
            f"have broken the weights) or lower the learning rate, then resume"
        )

    def _validate(self, validation: Validation, log: TaskLog) -> None:
        record, train, student = self.record, self._train, self._student
        with self._strategy.eval_weights(student):
            score, scores = validation.score(student)
            row = {"task": self._task.index, "epoch": record.epoch, "step": record.step, "sdr_db": score}
            log.validation(row, scores, validation.tasks)
            if self._mixtures.uses_scores:
                self._mixtures.scores = pair_scores(scores)
            if is_pictured(-(-record.epoch // train.validate_every), -(-train.epochs // train.validate_every)):
                validation.log_media(log, student, record.step)
            if record.best_sdr_db is None or score > record.best_sdr_db:
                record.best_sdr_db, record.best_epoch, record.best_step = score, record.epoch, record.step
                self._best = {k: v.detach().to("cpu", copy=True) for k, v in student.state_dict().items()}


def _check_finite(student: Separator, task: Task, step: int, folder: RunFolder) -> None:
    for name, value in student.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NumericalError(
                f"'{name}' is not finite after task {task.index} step {step}; the last good checkpoint is in "
                f"{folder.state}: lower the learning rate or set train.gradient_clip, then start again"
            )

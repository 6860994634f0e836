"""The task loop: the only place where an optimiser steps.

A run folder holds ``run.yaml`` (the :class:`~avsep.spec.RunSpec`), for every finished task ``tasks/TT/separator`` with
``tasks/TT/task.json`` and, where the strategy keeps something for the next task, ``tasks/TT/strategy.safetensors``,
``state/`` (the resume checkpoint), ``logs/``, ``protocol.json`` and, once evaluated and reported,
``evaluation.json`` and ``report.html``.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from avsep.data.mixing import TrainingMixtures, collate, epoch_steps
from avsep.data.protocol import TestMixture
from avsep.data.store import Clip
from avsep.data.tasks import TaskStream
from avsep.distributed.ranks import ALONE, Ranks, is_lost, synchronise_batch_norm
from avsep.environment import local_world_size, pick_device, refuse_number, seeded, world_size
from avsep.errors import AvsepError, CheckpointError, ConfigError, LostRankError, NumericalError, RunError
from avsep.files import FolderLock, read_json, write_json, write_yaml
from avsep.memory.base import (
    Candidates,
    Memory,
    MemoryPolicy,
    exemplars_from_plain,
    exemplars_to_plain,
    memory_rng,
)
from avsep.memory.candidates import JudgedCandidates
from avsep.memory.none import NoMemory
from avsep.progress import Progress, progress_bar
from avsep.registry import MEMORIES, STRATEGIES
from avsep.runs.checkpoint import load_latest, load_state, rng_state, save_latest, save_state, set_rng_state
from avsep.runs.folder import STRATEGY_FILE, finished_tasks, read_exemplars, read_run_spec, separator_folder
from avsep.separator import Separator, build_from_spec, load_separator, save_separator
from avsep.spec import ComponentRef, OptimizerSpec, RunSpec, TrainSpec, validated
from avsep.strategies.base import Step, Strategy
from avsep.training.log import NORM_EVERY, TaskLog, chosen_mixtures, gradient_norm, is_pictured
from avsep.training.loggers import choose_loggers, closing
from avsep.types import Batch, Task, move_to

if TYPE_CHECKING:
    from avsep.evaluation.evaluate import MixtureScore

__all__ = ["ContinualLearner", "learning_rate_factor"]

_Component = str | tuple[str, dict[str, Any]] | ComponentRef


def learning_rate_factor(spec: OptimizerSpec, *, step: int, epoch: int, total_steps: int) -> float:
    """What the base learning rate is multiplied by at a 0-based step.

    ``one_cycle`` rises from 1/25 to 1 over the first 30 % and falls to 1/250,000, both along a cosine (Smith and Topin,
    arXiv 1708.07120, with PyTorch's defaults); ``step`` multiplies by gamma from each milestone epoch on.
    """
    if spec.schedule == "constant":
        return 1.0
    if spec.schedule == "step":
        return float(spec.gamma ** sum(epoch >= m for m in spec.milestones))
    peak = max(0.3 * total_steps - 1, 1.0)

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    if step <= peak:
        return cosine(1 / 25, 1.0, step / peak)
    return cosine(1.0, 1 / 250_000, min(1.0, (step - peak) / max(total_steps - 1 - peak, 1)))


class _Inputs:
    """What a training step takes. A plain object, since Fabric looks into containers, and would cast the waveforms and
    the stored features to half precision before the STFT (it cannot do even that to a frozen dataclass)."""

    def __init__(self, batch: Batch, teacher: Separator | None, num_old: int) -> None:
        self.batch = batch
        self.teacher = teacher
        self.num_old = num_old


class _TrainingStep(nn.Module):
    """Forward pass and loss as one module, so that mixed precision wraps both."""

    def __init__(self, student: Separator, strategy: Strategy, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.student = student
        self.strategy = strategy
        self.ranks = ranks

    def forward(self, inputs: _Inputs) -> dict[str, Tensor]:
        student, batch = self.student, inputs.batch
        found = student.predict(batch)
        spectrograms, output = found.spectrograms, found.output
        step = Step(batch, spectrograms, found.audio, found.visual, output, inputs.num_old, self.ranks)
        terms = self.strategy.loss(student, inputs.teacher, step)
        return {**terms, **student.mask_decoder.auxiliary_losses(output, spectrograms, batch.class_ids)}


class ContinualLearner:
    """Trains a separator on one task after another.

    In processes that torchrun started, one a device, each makes the same learner and calls :meth:`fit` alike: they
    share every batch of ``train.batch_size`` in equal parts, and rank 0 alone writes. The mixtures of a step do not
    depend on the number of processes, nor does what is computed of them, but for rounding.

    Args:
        separator: a :class:`~avsep.separator.Separator`; it grows with the classes. Build it with as many classes as
            the first task has, or fewer.
        strategy: name, or (name, parameters), from :data:`~avsep.registry.STRATEGIES`.
        memory: likewise from :data:`~avsep.registry.MEMORIES`.
        train: a :class:`~avsep.spec.TrainSpec` or its plain data; the published settings when omitted.
        accelerator: Lightning Fabric's: ``auto``, ``cpu``, ``cuda``, ``mps``.
        workers: reader processes; by default none on a CPU, where they would compete with training, and where they
            cannot be forked (they would import the caller's script again), else 4. The result does not depend on it.
        loggers: beside the CSV logs, by name, dotted path or made already
            (:func:`avsep.training.loggers.choose_loggers`); TensorBoard where it is
            installed when omitted. The result does not depend on them.
    """

    def __init__(
        self,
        separator: Separator,
        *,
        strategy: _Component = "contavsep",
        memory: _Component = "none",
        train: TrainSpec | dict[str, Any] | None = None,
        accelerator: str = "auto",
        workers: int | None = None,
        loggers: Sequence[Any] | None = None,
    ) -> None:
        self.separator = separator
        self._loggers = choose_loggers(loggers)
        self._strategy_ref = _ref(strategy, "strategy")
        self._memory_ref = _ref(memory, "memory")
        self.strategy: Strategy = STRATEGIES.create(self._strategy_ref.name, self._strategy_ref.params)
        self.memory: MemoryPolicy = MEMORIES.create(self._memory_ref.name, self._memory_ref.params)
        self.train = train if isinstance(train, TrainSpec) else validated(TrainSpec, train or {}, "train")
        self.exemplars: Memory = {}
        self._gradient_norm: float | None = None  # of the last step, and the last validation's scores: for the logs
        self._scores: list[MixtureScore] = []
        if accelerator != "auto":
            pick_device(accelerator)  # refuses one that is not here
            refuse_number(accelerator)
        self.fabric = _fabric(accelerator, self.train.precision)
        self.ranks = Ranks(self.fabric.global_rank, self.fabric.world_size)
        forks = multiprocessing.get_start_method() == "fork"
        self.workers = workers if workers is not None else (4 if forks and self.fabric.device.type != "cpu" else 0)

    @classmethod
    def from_spec(cls, spec: RunSpec, **kwargs: Any) -> ContinualLearner:
        """A learner as a run spec describes it; the separator's first weights come from ``spec.train.seed``."""
        spec.check()
        separator = _seeded_build(spec, 0)
        return cls(separator, strategy=spec.strategy, memory=spec.memory, train=spec.train, **kwargs)

    # ------------------------------------------------------------------ the stream

    def fit(
        self,
        stream: TaskStream,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        progress: bool | Progress = True,
        preset: str = "",
        first_task: str | Path | None = None,
    ) -> list[dict[str, Any]]:
        """Learn every task of ``stream`` and return one record a task.

        Args:
            out: the run folder; a temporary one, removed at the end, when omitted.
            resume: go on from the folder's last checkpoint; on the CPU the result is an uninterrupted run's.
            progress: show a bar on standard error, or report to the given :class:`~avsep.progress.Progress`.
            preset: the preset's name, for the record.
            first_task: another run's folder, whose finished first task is taken over instead of being trained anew.
                That run must agree in all that decides it (:meth:`~avsep.strategies.Strategy.first_task`), and the
                result is then the same.

        Raises:
            RunError: the folder holds another run, or is being written by another process.
            LostRankError: another of the processes that train together is gone.
            CheckpointError: the folder's run has another spec, or a file of it is damaged.
            ConfigError: the stream, the strategy and the separator do not go together, or ``first_task`` is of a run
                whose first task would be another.
            NumericalError: the loss became NaN or infinite.
        """
        try:
            if out is not None:
                return self._fit(stream, Path(out), resume, progress, preset, first_task)
            with tempfile.TemporaryDirectory(prefix="avsep-run-") as folder:
                return self._fit(stream, Path(self.ranks.broadcast(folder)), False, progress, preset, first_task)
        except RuntimeError as error:
            if self.ranks.several and is_lost(error):
                raise LostRankError(
                    f"process {self.ranks.rank} of {self.ranks.world} waited for another that is gone "
                    f"({str(error).splitlines()[0][:120]}): start all of them again with --resume"
                ) from None
            raise

    def _fit(
        self,
        stream: TaskStream,
        out: Path,
        resume: bool,
        progress: bool | Progress,
        preset: str,
        first_task: str | Path | None,
    ) -> list[dict[str, Any]]:
        self._check(stream)
        if self.ranks.first:
            self._check_folder(out, resume)
        spec = RunSpec(
            separator=self.separator.spec,
            strategy=self._strategy_ref,
            memory=self._memory_ref,
            train=self.train,
            tasks=tuple(t.classes for t in stream.tasks),
            protocol=stream.protocol.name,
            validation_protocol=stream.validation.name,
            store=str(Path(stream.store.path).resolve()),
            store_hash=stream.store.content_hash,
            preset=preset,
        )
        if first_task is not None:
            self._check_first_task(Path(first_task), spec, stream)
        self._check_agreement(spec, resume)
        progress = progress if self.ranks.first else False
        with FolderLock(out) if self.ranks.first else contextlib.nullcontext(), closing(self._loggers):
            state = self._open_run(out, spec, resume)
            if self.ranks.first:
                stream.protocol.save(out / "protocol.json")
            self.ranks.wait()  # nobody writes before all have read
            first = int(state["progress"]["task"]) if state else self._restore(stream, out)
            if first_task is not None and not state and first == 0:
                self._take_first_task(Path(first_task), stream, out, progress)
                first = 1
                self.ranks.wait()
            for task in stream.tasks[first:]:
                with seeded(self.train.seed, task.index):  # so that what a task draws depends on nothing before it
                    self._learn(task, stream, out, state, progress)
                state = None
                self.ranks.wait()  # for what rank 0 has written
        records = [read_json(out / "tasks" / f"{t.index:02d}" / "task.json") for t in stream.tasks]
        self.ranks.wait()  # a temporary folder goes with rank 0
        return records

    def _restore(self, stream: TaskStream, out: Path) -> int:
        """Stand where the last finished task ended, without a checkpoint; returns the number of finished tasks.

        A task begins from the separator and the exemplars that the one before left, and from what its strategy keeps,
        so this is where a run goes on whose ``state`` was lost.
        """
        done = 0
        while done < len(stream) and separator_folder(out, done).with_name("task.json").is_file():
            done += 1
        if done:
            record = separator_folder(out, done - 1).with_name("task.json")
            found = read_json(record)
            if kept := found.get("strategy_state"):
                way_out = f"remove {record.parent} to learn that task again"
                self.strategy.load_state_dict(load_state(record.with_name(STRATEGY_FILE), kept, way_out))
            elif "strategy_state" not in found and type(self.strategy).state_dict is not Strategy.state_dict:
                raise CheckpointError(
                    f"{out / 'state'} is gone, and with it what strategy '{self._strategy_ref.name}' keeps between "
                    f"tasks (this run's version of avsep kept it nowhere else): remove {out} and start the run again"
                )
            self.separator = load_separator(out, task=done - 1)
            self.exemplars = read_exemplars(out, done - 1)
        return done

    def _check_first_task(self, other: Path, spec: RunSpec, stream: TaskStream) -> None:
        """Refuse a run whose first task is not, to the last bit, the one that would be trained here."""
        finished_tasks(other)
        theirs = read_run_spec(other)
        facts: list[dict[str, Any]] = []
        for one in (spec, theirs):
            strategy: Strategy = STRATEGIES.create(one.strategy.name, one.strategy.params)
            data = one.model_dump(mode="json", exclude={"store", "preset", "strategy", "memory", "protocol"})
            data["tasks"] = data["tasks"][:1]
            items = len(stream.train_clips(stream.tasks[0])) * one.train.current_repeats
            data["train"]["steps_per_epoch"] = epoch_steps(items, one.train)  # a limit above the list's is none
            for name in ("memory_repeats", "memory_share"):  # there are no exemplars yet
                data["train"].pop(name)
            facts.append({**data, "strategy": strategy.first_task()})
        if difference := _difference(facts[0], facts[1]):
            key, now, then = difference
            raise ConfigError(
                f"the first task of {other} is not this run's: {key} is {then!r} there, {now!r} here; leave first_task "
                "out, or give a run that agrees"
            )

    def _take_first_task(self, other: Path, stream: TaskStream, out: Path, progress: bool | Progress) -> None:
        """Stand where another run's first task ended, and do what this run's strategy and memory do after it."""
        task = stream.tasks[0]
        found = read_json(separator_folder(other, 0).with_name("task.json"))
        record = _Progress(
            step=found["steps"],
            best_sdr_db=found["validation_sdr_db"],
            best_epoch=found["best_epoch"],
            best_step=found["best_step"],
            seconds=found["seconds"],
        )
        self.separator = load_separator(other, task=0).to(self.fabric.device)
        with (
            seeded(self.train.seed, task.index),
            contextlib.nullcontext(progress) if isinstance(progress, Progress) else progress_bar(progress) as bars,
        ):
            self._finish(task, stream, out, record, None, bars)

    def _check_agreement(self, spec: RunSpec, resume: bool) -> None:
        """Refuse ranks that were not started alike."""
        mine = {**spec.model_dump(mode="json", exclude={"store", "preset"}), "resume": resume}
        for rank, theirs in enumerate(self.ranks.all_gather(mine)):
            if difference := _difference(mine, theirs):
                key, here, there = difference
                raise ConfigError(
                    f"process {self.ranks.rank} was started with {key} = {here!r} and process {rank} with {there!r}: "
                    "start all processes with the same command, on the same store"
                )

    def _check_ranks(self) -> None:
        ranks, size = self.ranks.world, self.train.batch_size
        if not self.strategy.across_ranks:
            raise ConfigError(
                f"strategy '{self._strategy_ref.name}' does not state that its loss holds over several processes "
                f"(across_ranks), of which there are {ranks}: train with one"
            )
        if size % ranks:
            raise ConfigError(
                f"train.batch_size is the whole batch of a step, and {size} mixtures cannot be shared equally by "
                f"{ranks} processes: set a multiple of {ranks} (train.batch_size={-(-size // ranks) * ranks}), or take "
                "another number of processes"
            )
        synchronise_batch_norm(self.separator, self.ranks)

    def _check(self, stream: TaskStream) -> None:
        first = stream.tasks[0]
        if self.ranks.several:
            self._check_ranks()
        if self.strategy.needs_memory and isinstance(self.memory, NoMemory):
            raise ConfigError(
                f"strategy '{self._strategy_ref.name}' learns from exemplars, and the memory is "
                f"'{self._memory_ref.name}': choose another memory (see: avsep list memories)"
            )
        self.strategy.check(self.separator)
        spec = self.separator.spec
        if spec.num_classes > len(first.classes):
            raise ConfigError(
                f"the separator has {spec.num_classes} class slots but the first task only {len(first.classes)} "
                f"classes: build it with num_classes={len(first.classes)}"
            )
        stream.store.require_rate(spec.front_end.sample_rate_hz)
        if stream.protocol.clip_samples != spec.front_end.clip_samples:
            raise ConfigError(
                f"the stream's test mixtures are {stream.protocol.clip_samples} samples long but the separator's clips "
                f"{spec.front_end.clip_samples}: pass clip_samples={spec.front_end.clip_samples} to task_stream"
            )
        for mixtures in (stream.validation.at(0), stream.protocol.at(0)):
            if not mixtures:
                raise ConfigError(
                    f"the first task, {', '.join(first.classes)}, has no mixture to be validated or tested on: these "
                    "pair different classes, so give it two or more"
                )
        if not self.strategy.uses_all_data:
            old = stream.tasks[-1].old
            self.memory.check({name: len(self._clips(stream, [name])) for name in old})
        clip = stream.train_clips(first)[0]
        for source in self.separator.visual_sources():  # a missing feature or a wrong width shows here, not in an hour
            stream.store.read_visual(clip, source, centre_s=0.0, duration_s=spec.front_end.clip_s)
        remembered: Memory = {}
        for task in stream.tasks:  # likewise a batch or partners that some task has too few clips for
            self._epoch(stream, task, 0, remembered)
            remembered = self._remember(stream, task, remembered, judge=False)

    @staticmethod
    def _check_folder(out: Path, resume: bool) -> None:
        """Refuse a folder that is not this run's, and leave nothing in it."""
        if (out / "run.yaml").is_file():
            if not resume:
                raise RunError(f"{out} holds a run already: resume it with --resume, or choose another folder")
            return
        if resume:
            raise RunError(f"nothing to resume in {out}: it has no run.yaml; start it without --resume")
        foreign = [p.name for p in out.iterdir() if p.name != ".lock"] if out.is_dir() else []
        if foreign:
            raise RunError(f"{out} is not empty and not a run folder (it has {foreign[0]}): choose another folder")

    @staticmethod
    def _clips(stream: TaskStream, classes: Sequence[str]) -> list[Clip]:
        return stream.store.select(classes=list(classes), split="train")

    def _open_run(self, out: Path, spec: RunSpec, resume: bool) -> dict[str, Any] | None:
        if not self.ranks.first:
            self.ranks.wait()
            if not (out / "run.yaml").is_file():
                raise RunError(
                    f"process {self.ranks.rank} does not see {out}, which process 0 writes: give a folder that all "
                    "machines share"
                )
            return load_latest(out / "state") if resume else None
        self._check_folder(out, resume)  # once more: another process may have been there before the lock was ours
        if not resume:
            write_yaml(out / "run.yaml", spec.model_dump(mode="json"))
            self.ranks.wait()
            return None
        for leftover in out.glob("tasks/*/.separator-*"):  # of a kill while a separator was being written
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in out.glob("tasks/*/.strategy-*"):
            leftover.unlink()
        stored = read_run_spec(out)
        # where the store lies may change between machines; what it holds may not
        mine, theirs = (s.model_dump(mode="json", exclude={"store", "preset"}) for s in (spec, stored))
        if difference := _difference(mine, theirs):
            key, now, then = difference
            raise CheckpointError(
                f"{out} was started with another spec: {key} was {then!r}, now {now!r}; resume with the same settings, "
                f"or choose another folder"
            )
        self.ranks.wait()
        return load_latest(out / "state")

    # ------------------------------------------------------------------ one task

    def _learn(
        self, task: Task, stream: TaskStream, out: Path, state: dict[str, Any] | None, progress: bool | Progress
    ) -> None:
        self._prepare_student(task)
        student = self.separator
        if state:
            self._load_student(state["student"], out)
            self.exemplars = exemplars_from_plain(state["progress"]["exemplars"], str(out / "state"))
            self.strategy.load_state_dict(state["strategy"])
        teacher = self._teacher(task, out)
        if not state:
            self.strategy.before_task(student, teacher, task)
        self.strategy.freeze(student, task)
        optimizers = self._optimizers(student)
        roles = list(optimizers)
        setup = self.fabric.setup(_TrainingStep(student, self.strategy, self.ranks), *optimizers.values())
        module, ready = setup[0], dict(zip(roles, setup[1:], strict=True))
        precision = self.fabric.strategy.precision
        if state:
            for role, optimizer in ready.items():
                if role in state["optimizers"]:
                    optimizer.load_state_dict(state["optimizers"][role])
            set_rng_state(state["random"])
            if state.get("precision"):
                precision.load_state_dict(state["precision"])
        record = _Progress(**state["progress"]["record"]) if state else _Progress()
        best: dict[str, Tensor] | None = state.get("best") or None if state else None
        started = time.perf_counter() - record.seconds

        def checkpoint() -> None:
            _check_finite(student, task, record.step, out)
            record.seconds = time.perf_counter() - started
            if not self.ranks.first:
                return
            save_latest(
                out / "state",
                f"task-{task.index:02d}-step-{record.step:07d}",
                {
                    "student": student.state_dict(),
                    "best": best or {},
                    "optimizers": {role: o.state_dict() for role, o in ready.items()},
                    "strategy": self.strategy.state_dict(),
                    "random": rng_state(),
                    "precision": precision.state_dict(),
                    "progress": {
                        "task": task.index,
                        "exemplars": exemplars_to_plain(self.exemplars),
                        "record": vars(record),
                    },
                },
            )

        if not state:
            checkpoint()
        spec = self.train
        epoch_data = self._epoch(stream, task, 0)
        total = epoch_data.steps * spec.epochs
        label = f"{self._strategy_ref.name} {task.index + 1}/{len(stream)}"
        with (
            contextlib.nullcontext(progress) if isinstance(progress, Progress) else progress_bar(progress) as bars,
            self._log(task, out, record, bars) as log,
        ):
            bar = bars.add(label, total=total, done=record.step)
            while record.epoch < spec.epochs:
                epoch_data = self._epoch(stream, task, record.epoch)
                done = record.step - record.epoch * epoch_data.steps
                for batch in self._batches(epoch_data, done):
                    terms, rate = self._step(module, ready, batch, teacher, task, record, total, out)
                    record.step += 1
                    loss = sum(terms.values())
                    row = {"task": task.index, "epoch": record.epoch, "step": record.step, "loss": loss, **terms}
                    rates = {role: o.param_groups[0]["lr"] for role, o in ready.items()}
                    row |= {"lr": rate, "seconds": time.perf_counter() - started}
                    log.train(row, rates, self._gradient_norm)
                    bars.advance(bar, note=f"loss {loss:.3f}" + _best_note(record))
                    if record.step % spec.checkpoint_every == 0 and record.step % epoch_data.steps:
                        checkpoint()
                record.epoch += 1
                if record.epoch % spec.validate_every == 0 or record.epoch == spec.epochs:
                    score = self._validate(stream, task, bars)
                    told = {"task": task.index, "epoch": record.epoch, "step": record.step, "sdr_db": score}
                    log.validation(told, self._scores, [t.classes for t in stream.tasks[: task.index + 1]])
                    if is_pictured(-(-record.epoch // spec.validate_every), -(-spec.epochs // spec.validate_every)):
                        self._picture(log, stream, task, record.step)
                    if record.best_sdr_db is None or score > record.best_sdr_db:
                        record.best_sdr_db, record.best_epoch, record.best_step = score, record.epoch, record.step
                        best = {k: v.detach().to("cpu", copy=True) for k, v in student.state_dict().items()}
                checkpoint()
            if best is not None:
                student.load_state_dict(best)
            self._finish(task, stream, out, record, teacher, bars)
            self._picture(log, stream, task, record.step + 1, sounds=True)  # a step on: a resume strikes it out

    def _log(self, task: Task, out: Path, record: _Progress, bars: Progress) -> TaskLog:
        before = [read_json(out / "tasks" / f"{t:02d}" / "task.json")["steps"] + 1 for t in range(task.index)]
        return TaskLog(
            self._loggers,
            out / "logs",
            task=task.index,
            step=record.step,
            offset=sum(before),
            bars=bars,
            run=read_run_spec(out).model_dump(mode="json"),
            enabled=self.fabric.is_global_zero,
        )

    def _picture(self, log: TaskLog, stream: TaskStream, task: Task, step: int, *, sounds: bool = False) -> None:
        log.media(
            self.separator,
            stream.store,
            chosen_mixtures(stream.validation.at(task.index)),
            step,
            batch_size=self.train.batch_size,
            device=self.fabric.device,
            sounds=sounds,
        )

    def _prepare_student(self, task: Task) -> None:
        spec = self.separator.spec
        seen = tuple(task.seen)
        if self.strategy.restarts and task.index > 0:
            fresh = spec.model_copy(update={"num_classes": len(seen), "classes": seen})
            with seeded(self.train.seed, task.index):
                self.separator = build_from_spec(fresh)
        elif spec.num_classes < len(seen) or spec.classes != seen:
            with seeded(self.train.seed, task.index):
                self.separator.grow(len(seen), classes=seen)
        self.separator.to(self.fabric.device)
        synchronise_batch_norm(self.separator, self.ranks)

    def _load_student(self, tensors: dict[str, Tensor], out: Path) -> None:
        try:
            self.separator.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(f"{out}/state does not fit the separator: {str(error).splitlines()[-1]}") from None

    def _teacher(self, task: Task, out: Path) -> Separator | None:
        if not self.strategy.needs_teacher or task.index == 0:
            return None
        teacher = load_separator(out, task=task.index - 1).to(self.fabric.device)
        synchronise_batch_norm(teacher, self.ranks)
        return teacher.requires_grad_(False).eval()

    def _optimizers(self, student: Separator) -> dict[str, torch.optim.Optimizer]:
        made: dict[str, torch.optim.Optimizer] = {}
        for role, parameters in student.parameter_groups().items():
            if parameters:
                spec: OptimizerSpec = getattr(self.train, role)
                kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
                made[role] = kind(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
        if not made:
            raise ConfigError("nothing to train: every part of the separator is frozen")
        return made

    def _epoch(self, stream: TaskStream, task: Task, epoch: int, exemplars: Memory | None = None) -> TrainingMixtures:
        everything = self.strategy.uses_all_data
        exemplars = self.exemplars if exemplars is None else exemplars
        kept = [] if everything else [e for name in task.old for e in exemplars.get(name, ())]
        return TrainingMixtures(
            stream.store,
            stream.train_clips(task, all_seen=everything),
            stream.store.clips_by_id([e.id for e in kept]),
            self.train,
            self.separator.spec.front_end,
            self.separator.visual_sources(),
            {name: number for number, name in enumerate(task.seen)},
            task=task.index,
            epoch=epoch,
            crops={e.id: e.start for e in kept if e.start is not None},
        )

    def _batches(self, data: TrainingMixtures, done: int) -> Iterator[Batch]:
        """The epoch's batches from the ``done``-th on, on the training device."""
        size, ranks = self.train.batch_size, self.ranks
        if not ranks.several:
            return self._read(data, range(done * size, len(data)), size)
        part = size // ranks.world
        begins = range(done * size + ranks.rank * part, len(data), size)
        return self._read(data, [item for begin in begins for item in range(begin, begin + part)], part)

    def _read(self, data: TrainingMixtures, items: Sequence[int], batch_size: int) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            Subset(data, items),
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=self.workers,
            pin_memory=self.fabric.device.type == "cuda",
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
            yield move_to(batch, self.fabric.device, non_blocking=True)

    def _step(
        self,
        module: nn.Module,
        optimizers: dict[str, Any],
        batch: Batch,
        teacher: Separator | None,
        task: Task,
        record: _Progress,
        total: int,
        out: Path,
    ) -> tuple[dict[str, float], float]:
        """One optimisation step; returns the loss terms and the audio encoder's learning rate."""
        self.separator.train()
        rate = 0.0
        for role, optimizer in optimizers.items():
            spec: OptimizerSpec = getattr(self.train, role)
            factor = learning_rate_factor(spec, step=record.step, epoch=record.epoch, total_steps=total)
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * factor
            rate = rate or spec.lr * factor
            optimizer.zero_grad()
        terms: dict[str, Tensor] = module(_Inputs(batch, teacher, len(task.old)))
        loss = torch.stack([t.float() for t in terms.values()]).sum()
        own = torch.stack([t.detach().float() for t in terms.values()])
        values = [float(v) for v in self.ranks.mean(own).tolist()]
        named = dict(zip(terms, values, strict=True))
        if not all(map(math.isfinite, values)):
            if self.ranks.several and bool(own.isfinite().all()):  # the rank whose clips they are tells more
                raise LostRankError(
                    f"the loss is not finite at task {task.index} step {record.step} on another process"
                )
            raise NumericalError(
                f"the loss is not finite at task {task.index} step {record.step} ({_format(named)}); the batch: "
                f"{', '.join('+'.join(clips) for clips in batch.clips)}; the last good checkpoint is in "
                f"{out / 'state'}: look at those clips (and the batch before, whose gradient may have broken the "
                f"weights) or lower the learning rate, then resume"
            )
        self.fabric.backward(loss)
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)  # of 16-mixed
        self._gradient_norm = None
        if record.step % NORM_EVERY == 0:
            self._gradient_norm = gradient_norm(self.separator, 1.0 if scaler is None else scaler.get_scale())
        if (limit := self.train.gradient_clip) is not None:
            for optimizer in optimizers.values():  # one not finite: the scaler skips, or the next loss tells
                self.fabric.clip_gradients(module, optimizer, max_norm=limit, error_if_nonfinite=False)
        if scaler is None:
            for optimizer in optimizers.values():
                optimizer.step()
        else:  # one update a step: Fabric's own follows each optimizer, and the next one would unscale by another scale
            for optimizer in optimizers.values():
                scaler.step(optimizer.optimizer)
            scaler.update()
        self.strategy.after_step(self.separator)
        return named, rate

    # ------------------------------------------------------------------ after

    def _validate(self, stream: TaskStream, task: Task, bars: Progress) -> float:
        """Mean SDR in dB over the validation mixtures of all classes seen (data of old classes too, as published)."""
        from avsep.evaluation.evaluate import evaluate_separator, mean_sdr

        mixtures = _thinned(stream.validation.at(task.index), self.train.validation_pairs)
        ranks = self.ranks
        first, last = (len(mixtures) * r // ranks.world for r in (ranks.rank, ranks.rank + 1))
        self.separator.eval()
        own = evaluate_separator(
            self.separator,
            stream.store,
            mixtures[first:last],
            batch_size=max(1, self.train.batch_size // ranks.world),
            device=self.fabric.device,
        )
        scores = [score for part in ranks.all_gather(own) for score in part]
        self._scores = scores
        return mean_sdr(scores, degenerate=stream.validation.name == "paper")

    def _finish(
        self,
        task: Task,
        stream: TaskStream,
        out: Path,
        record: _Progress,
        teacher: Separator | None,
        bars: Progress,
    ) -> None:
        student = self.separator
        student.eval()
        for module in (student, teacher):  # from here on every rank computes the same from the same data
            if module is not None:
                synchronise_batch_norm(module, ALONE)
        label = f"{self._strategy_ref.name} after task {task.index}"
        started = time.perf_counter()
        self.strategy.after_task(student, teacher, task, _TaskData(self, stream, task, bars, label))
        student.eval()
        if self.ranks.several:  # computed alike everywhere; devices may differ in the last bit
            self.ranks.broadcast_tensors(student.state_dict())
            self.strategy.load_state_dict(self.ranks.broadcast(_on_cpu(self.strategy.state_dict())))
        self.exemplars = self._remember(stream, task, self.exemplars)
        if self.ranks.several:
            chosen = self.ranks.broadcast(exemplars_to_plain(self.exemplars))
            self.exemplars = exemplars_from_plain(chosen, "process 0")
        seconds_after = time.perf_counter() - started
        if not self.ranks.first:
            return
        target = separator_folder(out, task.index)
        save_separator(student, target)
        kept = self.strategy.state_dict()
        strategy_state = save_state(target.with_name(STRATEGY_FILE), kept) if kept else None
        write_json(
            target.with_name("task.json"),
            {
                "index": task.index,
                "classes": list(task.classes),
                "seen": list(task.seen),
                "strategy": self._strategy_ref.name,
                "steps": record.step,
                "best_epoch": record.best_epoch,
                "best_step": record.best_step,
                "validation_sdr_db": record.best_sdr_db,
                "exemplars": exemplars_to_plain(self.exemplars),
                "parameters": sum(p.numel() for p in student.parameters()),
                "seconds": round(record.seconds, 1),
                "seconds_after": round(seconds_after, 1),  # what strategy and memory did once the task was learned
                "strategy_state": strategy_state,
            },
        )

    def _remember(self, stream: TaskStream, task: Task, held: Memory, *, judge: bool = True) -> Memory:
        """The memory after a task; nothing is added after the last one. Without ``judge`` the separator is not asked,
        and only the number of exemplars means something."""
        if task.index == len(stream) - 1 or self.strategy.uses_all_data:
            return held
        clips = {name: self._clips(stream, [name]) for name in task.classes}
        earlier = {name: len(self._clips(stream, [name])) for name in task.old}
        candidates = (
            JudgedCandidates(clips, self.separator, stream.store, earlier=earlier, device=self.fabric.device)
            if judge
            else Candidates(clips, self.separator.spec.front_end, earlier=earlier)
        )
        memory = self.memory.update(held, candidates, memory_rng(self.train.seed, task.index))
        return {name: list(kept) for name, kept in memory.items() if kept}


class _TaskData:
    """:class:`~avsep.strategies.TaskData` of the learner's stream, with a bar of its own."""

    _EPOCH = 2**30  # no epoch of training

    def __init__(self, learner: ContinualLearner, stream: TaskStream, task: Task, bars: Progress, label: str) -> None:
        self._learner = learner
        self._stream = stream
        self._task = task
        self._bars = bars
        self._label = label

    @property
    def is_last(self) -> bool:
        return self._task.index == len(self._stream) - 1

    def batches(self, count: int, *, batch_size: int = 1) -> Iterator[Batch]:
        bar = self._bars.add(self._label, total=count)
        epoch = self._EPOCH
        while count > 0:
            data = self._learner._epoch(self._stream, self._task, epoch)
            take = min(count, len(data))
            for batch in self._learner._read(data, range(take), batch_size):
                yield batch
                self._bars.advance(bar, len(batch.sources))
            count -= take
            epoch += 1


class _Progress:
    """Where a task stands."""

    def __init__(
        self,
        epoch: int = 0,
        step: int = 0,
        best_sdr_db: float | None = None,
        best_epoch: int = 0,
        best_step: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self.epoch = epoch
        self.step = step
        self.best_sdr_db = best_sdr_db
        self.best_epoch = best_epoch
        self.best_step = best_step
        self.seconds = seconds  # spent on the task, in all sessions, up to the last checkpoint


def _best_note(record: _Progress) -> str:
    return "" if record.best_sdr_db is None else f", best {record.best_sdr_db:.1f} dB"


def _ref(value: _Component, where: str) -> ComponentRef:
    if isinstance(value, ComponentRef):
        return value
    return validated(
        ComponentRef,
        {"name": value} if isinstance(value, str) else dict(zip(("name", "params"), value, strict=False)),
        where,
    )


def _precision(precision: str, accelerator: str) -> Any:
    if precision != "auto":
        return precision
    if accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "32-true"


def _fabric(accelerator: str, precision: str) -> Fabric:
    """One device; in processes that torchrun started, one a process, with DDP between them."""
    if world_size() == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=_precision(precision, accelerator))
    import inspect
    import logging

    from lightning_fabric.strategies import DDPStrategy
    from torch.nn.parallel import DistributedDataParallel

    here, kind = local_world_size(), pick_device(accelerator).type
    if kind == "mps":
        if accelerator != "auto":
            raise ConfigError("several processes cannot train on mps: --device cpu")
        kind = "cpu"
    if kind == "cuda" and torch.cuda.device_count() < here:
        raise ConfigError(
            f"{here} processes on this machine and {torch.cuda.device_count()} CUDA device(s): start as many processes "
            "as there are devices, or train on the CPU (--device cpu)"
        )
    if world_size() % here:
        raise ConfigError(f"{world_size()} processes are not spread evenly over the machines ({here} on this one)")
    # Buffers are running statistics, equal on all ranks since batch normalisation is synchronised. PyTorch 2.13 has
    # renamed the switch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it greets with a box of lines
    fabric = Fabric(
        accelerator=kind,
        devices=here,
        num_nodes=world_size() // here,
        precision=_precision(precision, kind),
        # Which parameters a loss reaches depends on strategy, decoder and batch. The buckets then also keep their
        # order, so that a resume adds up gradients as before.
        strategy=DDPStrategy(find_unused_parameters=True, **options),
    )
    fabric.launch()
    return fabric


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def _seeded_build(spec: RunSpec, task: int) -> Separator:
    names = spec.tasks[0] if spec.tasks else spec.separator.classes
    with seeded(spec.train.seed, task):
        return build_from_spec(
            spec.separator.model_copy(
                update={"num_classes": len(names) or spec.separator.num_classes, "classes": tuple(names)}
            )
        )


def _thinned(mixtures: list[TestMixture], per_list: int | None) -> list[TestMixture]:
    """At most ``per_list`` mixtures of each list, spread evenly over it."""
    if per_list is None:
        return mixtures
    kept = []
    for name in dict.fromkeys(m.list_name for m in mixtures):
        members = [m for m in mixtures if m.list_name == name]
        count = min(per_list, len(members))
        kept += [members[i * len(members) // count] for i in range(count)]
    return kept


def _check_finite(student: Separator, task: Task, step: int, out: Path) -> None:
    for name, value in student.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NumericalError(
                f"'{name}' is not finite after task {task.index} step {step}; the last good checkpoint is in "
                f"{out / 'state'}: lower the learning rate or set train.gradient_clip, then start again"
            )


def _format(terms: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in terms.items())


def _difference(mine: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key at which two plain values differ, with both values."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            if found := _difference(mine.get(key), theirs.get(key), f"{path}.{key}" if path else str(key)):
                return found
        return None
    return None if mine == theirs else (path, mine, theirs)

"""The learner: one task after another, from a stream of tasks into a run folder."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avsep.data.codecs import CodedCrops
from avsep.data.store import Clip
from avsep.data.tasks import TaskStream
from avsep.distributed.ranks import ALONE, Ranks, is_lost, synchronise_batch_norm
from avsep.environment import MOST_PROCESSES, seeded
from avsep.errors import CheckpointError, ConfigError, LostRankError, RunError
from avsep.evaluation.budget import ExemplarScale
from avsep.files import FolderLock
from avsep.memory.base import (
    Candidates,
    Memory,
    MemoryPolicy,
    exemplars_from_plain,
    exemplars_to_plain,
    memory_rng,
    read_exemplars,
)
from avsep.memory.candidates import ScoredCandidates
from avsep.memory.none import NoMemory
from avsep.mixers.mixtures import epoch_steps
from avsep.progress import Progress, progress_bar
from avsep.registry import MEMORIES
from avsep.runs.checkpoint import load_latest, load_state, save_state, taking_state
from avsep.runs.folder import RunFolder
from avsep.separator import Separator, build_from_spec, load_separator, save_separator
from avsep.separator.weights import load_class_means, weight_shapes
from avsep.spec import ComponentRef, RunSpec, TrainSpec, first_difference, validated
from avsep.strategies import build_strategy
from avsep.strategies.base import TaskContext
from avsep.training.afterwards import calibrate_presence, mean_pictures
from avsep.training.loader import TaskMixtures
from avsep.training.log import TaskLog
from avsep.training.loggers import choose_loggers, closing
from avsep.training.loop import TaskLoop, TaskRecord
from avsep.training.setup import make_fabric
from avsep.training.validation import Validation
from avsep.types import Task

__all__ = ["ContinualLearner"]

_Component = str | tuple[str, dict[str, Any]] | ComponentRef


class ContinualLearner:
    """Trains a separator on one task after another.

    In processes that torchrun started, one a device, each makes the same learner and calls :meth:`fit` alike: they
    share every batch of ``train.batch_size`` in equal parts, and rank 0 alone writes. The mixtures of a step do not
    depend on the number of processes, nor does what is computed of them, but for rounding.

    Args:
        separator: a :class:`~avsep.separator.Separator`; it grows with the classes. Build it with as many classes as
            the first task has, or fewer.
        strategy: name, or (name, parameters), from :data:`~avsep.registry.STRATEGIES`; a list of several combines them.
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
        strategy: _Component | Sequence[_Component] = "contavsep",
        memory: _Component = "none",
        train: TrainSpec | dict[str, Any] | None = None,
        accelerator: str = "auto",
        workers: int | None = None,
        loggers: Sequence[Any] | None = None,
    ) -> None:
        self.separator = separator
        self._loggers = choose_loggers(loggers)
        self._strategy_refs = _refs(strategy)
        self._memory_ref = _ref(memory, "memory")
        self.strategy = build_strategy(self._strategy_refs)
        self.memory: MemoryPolicy = MEMORIES.create(self._memory_ref.name, self._memory_ref.params)
        self.train = train if isinstance(train, TrainSpec) else validated(TrainSpec, train or {}, "train")
        self.exemplars: Memory = {}
        self._open_ended = False
        size = sum(parameter.numel() for parameter in separator.parameters())
        self.fabric = make_fabric(accelerator, self.train.precision, size)
        self.ranks = Ranks(self.fabric.global_rank, self.fabric.world_size)
        if workers is not None and not 0 <= workers <= MOST_PROCESSES:
            raise ConfigError(f"workers must be 0 to {MOST_PROCESSES}, got {workers}")
        forks = multiprocessing.get_start_method() == "fork"
        self.workers = workers if workers is not None else (4 if forks and self.fabric.device.type != "cpu" else 0)

    @classmethod
    def from_spec(cls, spec: RunSpec, **kwargs: Any) -> ContinualLearner:
        """A learner as a run spec describes it; the separator's first weights come from ``spec.train.seed``."""
        spec.check()
        separator = _seeded_build(spec, 0)
        return cls(separator, strategy=spec.strategies, memory=spec.memory, train=spec.train, **kwargs)

    @staticmethod
    def extend(run: str | Path, source: str | Path, classes: Sequence[str], **how: Any) -> Any:
        """Add a task to a finished run: :func:`avsep.training.extending.extend`, which says what ``how`` takes and what
        comes back."""
        # by name, for that module stands on this one
        return importlib.import_module("avsep.training.extending").extend(run, source, classes, **how)

    @property
    def _strategy_name(self) -> str:
        return "+".join(ref.name for ref in self._strategy_refs)

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
        open_ended: bool = False,
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
            open_ended: another task may follow the last one (:func:`avsep.training.extending.extend`), so that strategy
                and memory do after it what they do after the others. A finished run that is resumed so does it now.

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
                return self._fit(stream, RunFolder(out), resume, progress, preset, first_task, open_ended)
            with tempfile.TemporaryDirectory(prefix="avsep-run-") as folder:
                own = RunFolder(self.ranks.broadcast(folder))
                return self._fit(stream, own, False, progress, preset, first_task, open_ended)
        except RuntimeError as error:
            if self.ranks.several and is_lost(error):
                raise LostRankError(
                    f"process {self.ranks.rank} of {self.ranks.world} waited for another that is gone "
                    f"({str(error).splitlines()[0][:120]}): start all of them again with --resume"
                ) from None
            if str(error).startswith("DataLoader worker") and "signal: Terminated" in str(error):
                # whoever ends a whole group, as clusters do, ends the readers at the same time
                raise KeyboardInterrupt from None
            raise

    def _fit(
        self,
        stream: TaskStream,
        run: RunFolder,
        resume: bool,
        progress: bool | Progress,
        preset: str,
        first_task: str | Path | None,
        open_ended: bool,
    ) -> list[dict[str, Any]]:
        self._open_ended = open_ended
        self._check(stream, run)
        if self.ranks.first:
            _check_folder(run, resume)
        refs = self._strategy_refs
        spec = RunSpec(
            separator=self.separator.spec,
            strategy=refs[0] if len(refs) == 1 else refs,
            memory=self._memory_ref,
            train=self.train,
            tasks=tuple(t.classes for t in stream.tasks),
            protocol=stream.protocol.name,
            validation_protocol=stream.validation.name,
            store=str(Path(stream.store.path).resolve()),
            store_hash=stream.store.content_hash,
            preset=preset,
            blurry=stream.blurry,
        )
        other = None if first_task is None else RunFolder(first_task)
        if other is not None:
            self._check_first_task(other, spec, stream)
        self._check_agreement(spec, resume)
        progress = progress if self.ranks.first else False
        with FolderLock(run) if self.ranks.first else contextlib.nullcontext(), closing(self._loggers):
            state = self._open_run(run, spec, resume)
            if self.ranks.first:
                stream.protocol.save(run.protocol_file)
            self.ranks.wait()  # nobody writes before all have read
            if state:
                with taking_state(run.state):
                    first = int(state["progress"]["task"])
                    stream.tasks[first]
            else:
                first = self._restore(stream, run)
            if first < stream.carried:
                raise RunError(
                    f"of the recordings of task {first} only the exemplars are left, and it cannot be learned again: "
                    f"restore {run.task(first).path} from a copy"
                )
            if other is not None and not state and first == 0:
                self._take_first_task(other, stream, run, progress)
                first = 1
                self.ranks.wait()
            for task in stream.tasks[first:]:
                with seeded(self.train.seed, task.index):  # so that what a task draws depends on nothing before it
                    self._learn(task, stream, run, state, progress)
                state = None
                self.ranks.wait()  # for what rank 0 has written
        records = [run.task(t.index).record() for t in stream.tasks]
        self.ranks.wait()  # a temporary folder goes with rank 0
        return records

    def _open_run(self, run: RunFolder, spec: RunSpec, resume: bool) -> dict[str, Any] | None:
        if not self.ranks.first:
            self.ranks.wait()
            if not run.is_run:
                raise RunError(
                    f"process {self.ranks.rank} does not see {run}, which process 0 writes: give a folder that all "
                    "machines share"
                )
            return load_latest(run.state) if resume else None
        _check_folder(run, resume)  # once more: another process may have been there before the lock was ours
        if not resume:
            run.write_spec(spec)
            self.ranks.wait()
            return None
        run.remove_leftovers()
        # where the store lies may change between machines; what it holds may not
        mine, theirs = (s.model_dump(mode="json", exclude={"store", "preset"}) for s in (spec, run.spec()))
        if difference := first_difference(mine, theirs):
            key, now, then = difference
            raise CheckpointError(
                f"{run} was started with another spec: {key} was {then!r}, now {now!r}; resume with the same settings, "
                f"or choose another folder"
            )
        self.ranks.wait()
        return load_latest(run.state)

    def _restore(self, stream: TaskStream, run: RunFolder) -> int:
        """Stand where the last finished task ended, without a checkpoint; returns the number of finished tasks.

        A task begins from the separator and the exemplars that the one before left, and from what its strategy keeps,
        so this is where a run goes on whose ``state`` was lost.
        """
        done = min(run.begun_tasks(), len(stream))
        if done:
            folder = run.task(done - 1)
            found = folder.record()
            if kept := found.get("strategy_state"):
                way_out = f"remove {folder.path} to learn that task again"
                self.strategy.load_state_dict(load_state(folder.strategy_file, kept, way_out))
            elif "strategy_state" not in found and self.strategy.keeps_state:
                raise CheckpointError(
                    f"{run.state} is gone, and with it what strategy '{self._strategy_name}' keeps between tasks (this "
                    f"run's version of avsep kept it nowhere else): remove {run} and start the run again"
                )
            self.separator = load_separator(run, task=done - 1)
            self.exemplars = read_exemplars(run, done - 1)
        return done

    def take_over(self, stream: TaskStream, run: str | Path, *, progress: bool | Progress = True) -> None:
        """Stand where another strategy's finished run ended: after its last task, do what this one's strategy and
        memory do after a first task of all the classes that the run knows. The separator stays as it is.

        The memory adds exemplars of the last task, unless the other's has done so.

        Raises:
            ConfigError: the strategy would not be where it could go on.
        """
        folder, last = RunFolder(run), stream.tasks[-1]
        self._open_ended = True
        found = folder.task(last.index).record()
        self.separator = load_separator(folder, task=last.index).to(self.fabric.device).eval()
        self.strategy.check(self.separator)
        self.exemplars = read_exemplars(folder, last.index)
        before = _on_cpu(dict(self.separator.state_dict()))
        before = {name: value.clone() for name, value in before.items()}
        with seeded(self.train.seed, last.index), _bars(progress) as bars:
            mixtures = self._mixtures(stream, last)
            mixtures.show(bars, f"{self._strategy_name} takes over")
            whole = Task(last.index, last.seen, last.seen)
            ctx = TaskContext(whole, self.separator, None, mixtures, self.ranks, mixtures.epoch(0).steps)
            self.strategy.begin_task(ctx)
            self.separator.eval()
            self.strategy.after_task(ctx)
            if not found.get("open"):
                self.exemplars = self._remember(stream, last, self.exemplars)
        after = self.separator.state_dict()
        if any(not torch.equal(value, after[name].cpu()) for name, value in before.items()):
            raise ConfigError(
                f"strategy '{self._strategy_name}' would change what {run} has learned before anything new is begun: "
                "choose another"
            )
        kept = self.strategy.state_dict()
        place = folder.task(last.index)
        state = save_state(place.strategy_file, kept) if kept else None
        if not kept:
            place.strategy_file.unlink(missing_ok=True)
        plain = exemplars_to_plain(self.exemplars)
        place.write_record({**found, "exemplars": plain, "strategy_state": state, "open": True})

    def _check_first_task(self, other: RunFolder, spec: RunSpec, stream: TaskStream) -> None:
        """Refuse a run whose first task is not, to the last bit, the one that would be trained here."""
        other.finished_tasks()
        theirs = other.spec()
        facts: list[dict[str, Any]] = []
        for one in (spec, theirs):
            mine = build_strategy(one.strategies).first_task()
            if mine is None:
                raise ConfigError(
                    f"the first task of strategy '{one.strategy_name}' is not to be shared: leave first_task out"
                )
            data = one.model_dump(mode="json", exclude={"store", "preset", "strategy", "memory", "protocol"})
            data["tasks"] = data["tasks"][:1]
            items = len(stream.train_clips(stream.tasks[0])) * one.train.current_repeats
            data["train"]["steps_per_epoch"] = epoch_steps(items, one.train)  # a limit above the list's is none
            for name in ("memory_repeats", "memory_share"):  # there are no exemplars yet
                data["train"].pop(name)
            facts.append({**data, "strategy": mine})
        if difference := first_difference(facts[0], facts[1]):
            key, now, then = difference
            raise ConfigError(
                f"the first task of {other} is not this run's: {key} is {then!r} there, {now!r} here; leave first_task "
                "out, or give a run that agrees"
            )

    def _take_first_task(self, other: RunFolder, stream: TaskStream, run: RunFolder, progress: bool | Progress) -> None:
        """Stand where another run's first task ended, and do what this run's strategy and memory do after it."""
        task = stream.tasks[0]
        found = other.task(0).record()
        record = TaskRecord(
            step=found["steps"],
            best_sdr_db=found["validation_sdr_db"],
            best_epoch=found["best_epoch"],
            best_step=found["best_step"],
            seconds=found["seconds"],
        )
        self.separator = load_separator(other, task=0).to(self.fabric.device)
        with seeded(self.train.seed, task.index), _bars(progress) as bars:
            mixtures = self._mixtures(stream, task)
            self._finish(self._context(stream, task, run, None, mixtures), stream, run, record, bars)

    # ------------------------------------------------------------------ checks

    def _check_agreement(self, spec: RunSpec, resume: bool) -> None:
        """Refuse ranks that were not started alike."""
        mine = {**spec.model_dump(mode="json", exclude={"store", "preset"}), "resume": resume}
        for rank, theirs in enumerate(self.ranks.all_gather(mine)):
            if difference := first_difference(mine, theirs):
                key, here, there = difference
                raise ConfigError(
                    f"process {self.ranks.rank} was started with {key} = {here!r} and process {rank} with {there!r}: "
                    "start all processes with the same command, on the same store"
                )

    def _check_ranks(self) -> None:
        ranks, size = self.ranks.world, self.train.batch_size
        if not self.strategy.across_ranks:
            raise ConfigError(
                f"strategy '{self._strategy_name}' does not state that its loss holds over several processes "
                f"(across_ranks), of which there are {ranks}: train with one"
            )
        if size % ranks:
            raise ConfigError(
                f"train.batch_size is the whole batch of a step, and {size} mixtures cannot be shared equally by "
                f"{ranks} processes: set a multiple of {ranks} (train.batch_size={-(-size // ranks) * ranks}), or take "
                "another number of processes"
            )
        synchronise_batch_norm(self.separator, self.ranks)

    def _check(self, stream: TaskStream, run: RunFolder) -> None:
        first = stream.tasks[0]
        if self.ranks.several:
            self._check_ranks()
        if self.strategy.needs_memory and isinstance(self.memory, NoMemory):
            raise ConfigError(
                f"strategy '{self._strategy_name}' learns from exemplars, and the memory is "
                f"'{self._memory_ref.name}': choose another memory (see: avsep list memories)"
            )
        if self.strategy.memory_only and self.memory.uses_separator:
            raise ConfigError(
                f"strategy '{self._strategy_name}' trains on exemplars that are chosen before, and memory "
                f"'{self._memory_ref.name}' chooses them by what the trained separator makes of them: use another, "
                "such as random_per_class"
            )
        self.strategy.check(self.separator)
        self.strategy.check_classes(stream.tasks[-1].seen)
        spec = self.separator.spec
        if spec.num_classes > len(first.classes):
            raise ConfigError(
                f"the separator has {spec.num_classes} classes but the first task only {len(first.classes)} "
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
            kept_last = self.strategy.memory_only or self._open_ended
            self.memory.check(stream.counts(stream.tasks if kept_last else stream.tasks[:-1]))
        to_learn = stream.tasks[stream.carried :]
        for task in to_learn[:1]:  # a missing feature or a wrong width shows here, not in an hour
            for clip in list(filter(stream.store.has_pictures, stream.train_clips(task)))[:1]:
                for source in self.separator.visual_sources():
                    stream.store.read_visual(clip, source, centre_s=0.0, duration_s=spec.front_end.clip_s)
        remembered: Memory = read_exemplars(run, stream.carried - 1) if stream.carried else {}
        for task in to_learn:  # likewise a batch or partners that some task has too few clips for
            chosen = self._remember(stream, task, remembered, scored=False)
            self._mixtures(stream, task, chosen if self.strategy.memory_only else remembered).epoch(0)
            remembered = chosen

    # ------------------------------------------------------------------ one task

    def _learn(
        self,
        task: Task,
        stream: TaskStream,
        run: RunFolder,
        state: dict[str, Any] | None,
        progress: bool | Progress,
    ) -> None:
        self._prepare_student(task)
        student = self.separator
        if state:
            with taking_state(run.state):
                _load_student(student, state["student"], run)
                self.exemplars = exemplars_from_plain(state["progress"]["exemplars"], str(run.state))
                self.strategy.load_state_dict(state["strategy"])
        elif self.strategy.memory_only:
            self.exemplars = self._remember(stream, task, self.exemplars, scored=False)
        mixtures = self._mixtures(stream, task)
        ctx = self._context(stream, task, run, self._teacher(task, run), mixtures, resumed=state is not None)
        self.strategy.begin_task(ctx)
        loop = TaskLoop(
            self.fabric,
            self.ranks,
            run,
            self.train,
            self.strategy,
            student,
            ctx.teacher,
            task,
            mixtures,
            exemplars_to_plain(self.exemplars),
            state,
        )
        if not state:
            loop.checkpoint()
        validation = self._validation(stream, task)
        with _bars(progress) as bars, self._log(task, run, loop.record.step, bars) as log:
            label = f"{self._strategy_name} task {task.index} (0 to {len(stream) - 1})"
            record = loop.run(validation, log, bars, label)
            self._finish(ctx, stream, run, record, bars)
            validation.log_media(log, student, record.step + 1, sounds=True)  # a step on: a resume strikes it out

    def _context(
        self,
        stream: TaskStream,
        task: Task,
        run: RunFolder,
        teacher: Separator | None,
        mixtures: TaskMixtures,
        *,
        resumed: bool = False,
    ) -> TaskContext:
        return TaskContext(
            task=task,
            student=self.separator,
            teacher=teacher,
            data=mixtures,
            ranks=self.ranks,
            steps=mixtures.epoch(0).steps * self.train.epochs,
            resumed=resumed,
            is_last=self._is_last(stream, task),
            old_shapes=weight_shapes(run.task(task.index - 1).separator) if task.index else {},
        )

    def _is_last(self, stream: TaskStream, task: Task) -> bool:
        return task.index == len(stream) - 1 and not self._open_ended

    def _log(self, task: Task, run: RunFolder, step: int, bars: Progress) -> TaskLog:
        return TaskLog(
            self._loggers,
            run.logs,
            task=task.index,
            step=step,
            offset=sum(run.task(t).record()["steps"] + 1 for t in range(task.index)),
            bars=bars,
            run=run.spec().model_dump(mode="json"),
            enabled=self.fabric.is_global_zero,
        )

    def _prepare_student(self, task: Task) -> None:
        spec = self.separator.spec
        seen = tuple(task.seen)
        if self.strategy.restarts and task.index > 0:
            with seeded(self.train.seed, task.index):
                self.separator = build_from_spec(spec.of_classes(seen))
        elif spec.num_classes < len(seen) or spec.classes != seen:
            with seeded(self.train.seed, task.index):
                self.separator.grow(len(seen), classes=seen)
        self.separator.to(self.fabric.device)
        synchronise_batch_norm(self.separator, self.ranks)

    def _teacher(self, task: Task, run: RunFolder) -> Separator | None:
        if not self.strategy.needs_teacher or task.index == 0:
            return None
        teacher = load_separator(run, task=task.index - 1).to(self.fabric.device)
        synchronise_batch_norm(teacher, self.ranks)
        return teacher.requires_grad_(False).eval()

    def _validation(self, stream: TaskStream, task: Task) -> Validation:
        return Validation(stream, task, self.train, self.ranks, self.fabric.device)

    def _mixtures(self, stream: TaskStream, task: Task, exemplars: Memory | None = None) -> TaskMixtures:
        return TaskMixtures(
            stream,
            task,
            self.exemplars if exemplars is None else exemplars,
            self.train,
            self.separator,
            all_data=self.strategy.uses_all_data,
            memory_only=self.strategy.memory_only,
            codec=self.memory.codec,
            pictures=self.memory.pictures,
            ranks=self.ranks,
            device=self.fabric.device,
            workers=self.workers,
        )

    # ------------------------------------------------------------------ after

    def _finish(self, ctx: TaskContext, stream: TaskStream, run: RunFolder, record: TaskRecord, bars: Progress) -> None:
        """Let the strategy and the memory do what they do after a task, and store it."""
        student, task = self.separator, ctx.task
        student.eval()
        for module in (student, ctx.teacher):  # from here on every rank computes the same from the same data
            if module is not None:
                synchronise_batch_norm(module, ALONE)
        started = time.perf_counter()
        if isinstance(ctx.data, TaskMixtures):
            ctx.data.show(bars, f"{self._strategy_name} after task {task.index}")
        self.strategy.after_task(ctx)
        student.eval()
        if self.ranks.several:  # computed alike everywhere; devices may differ in the last bit
            self.ranks.broadcast_tensors(student.state_dict())
            self.strategy.load_state_dict(self.ranks.broadcast(_on_cpu(self.strategy.state_dict())))
        if not self.strategy.memory_only:  # which had them chosen before
            self.exemplars = self._remember(stream, task, self.exemplars)
        self._complete(stream, task, run)
        if self.ranks.several:
            chosen = self.ranks.broadcast(exemplars_to_plain(self.exemplars))
            self.exemplars = exemplars_from_plain(chosen, "process 0")
        seconds_after = time.perf_counter() - started
        if not self.ranks.first:
            return
        folder = run.task(task.index)
        save_separator(student, folder.separator)
        kept = self.strategy.state_dict()
        folder.write_record(
            {
                "index": task.index,
                "classes": list(task.classes),
                "seen": list(task.seen),
                "strategy": self._strategy_name,
                "steps": record.step,
                "best_epoch": record.best_epoch,
                "best_step": record.best_step,
                "validation_sdr_db": record.best_sdr_db,
                "exemplars": exemplars_to_plain(self.exemplars),
                "parameters": sum(p.numel() for p in student.parameters()),
                "seconds": round(record.seconds, 1),
                "seconds_after": round(seconds_after, 1),  # what strategy and memory did once the task was learned
                "strategy_state": save_state(folder.strategy_file, kept) if kept else None,
                **({} if self._is_last(stream, task) else {"open": True}),  # another task may follow
            }
        )

    def _complete(self, stream: TaskStream, task: Task, run: RunFolder) -> None:
        """What the separator gets beside what it has learned: a presence threshold, or mean pictures of its classes."""
        student, device = self.separator, self.fabric.device
        calibrate_presence(student, stream.store, stream.validation.at(task.index), device)
        if student.mask_decoder.takes_unseen or not student.visual_sources():
            return
        everything = self.strategy.uses_all_data
        names = task.seen if everything else {*task.classes, *stream.protocol.tasks[task.index]}
        at_hand: dict[str, list[tuple[Clip, int | None]]] = {}
        for clip in () if self.strategy.memory_only else stream.train_clips(task, all_seen=everything):
            if clip.class_name in names:
                at_hand.setdefault(clip.class_name, []).append((clip, None))
        by_id = {clip.id: clip for clip in stream.store.clips}
        if task.index:  # from the file, so that a resumed run goes on from the same
            before = run.task(task.index - 1).separator
            student.class_means = load_class_means(before, student.spec.of_classes(task.old))
        kept = {name: [(by_id[one.id], one.start) for one in ones] for name, ones in self.exemplars.items()}
        policy, samples = self.memory, student.spec.front_end.clip_samples
        coded = CodedCrops(stream.store, policy.codec, samples, policy.pictures)
        student.class_means = mean_pictures(
            student, stream.store, {**kept, **at_hand}, device, coded=coded if coded.loses else None
        )

    def _remember(self, stream: TaskStream, task: Task, held: Memory, *, scored: bool = True) -> Memory:
        """The memory after a task; nothing is added after the last one, unless it is what that is trained on. Where
        candidates are not ``scored``, the separator does not run: of a policy that asks it only the number of exemplars
        means something."""
        if self.strategy.uses_all_data or (self._is_last(stream, task) and not self.strategy.memory_only):
            return held
        clips = stream.candidates(task)
        earlier = stream.counts(stream.tasks[: task.index])
        front_end, sources = self.separator.spec.front_end, self.separator.visual_sources()
        weigh = ExemplarScale(stream.store, sources, front_end)
        candidates = (
            ScoredCandidates(
                clips, self.separator, stream.store, earlier=earlier, weigh=weigh, device=self.fabric.device
            )
            if scored
            else Candidates(clips, front_end, earlier=earlier, weigh=weigh)
        )
        memory = self.memory.update(held, candidates, memory_rng(self.train.seed, task.index))
        return {name: list(kept) for name, kept in memory.items() if kept}


def _bars(progress: bool | Progress) -> contextlib.AbstractContextManager[Progress]:
    return contextlib.nullcontext(progress) if isinstance(progress, Progress) else progress_bar(progress)


def _check_folder(run: RunFolder, resume: bool) -> None:
    """Refuse a folder that is not this run's, and leave nothing in it."""
    if run.is_run:
        if not resume:
            raise RunError(f"{run} holds a run already: resume it with --resume, or choose another folder")
        return
    if resume:
        raise RunError(f"nothing to resume in {run}: it has no run.yaml; start it without --resume")
    if foreign := run.foreign_entry():
        raise RunError(f"{run} is not empty and not a run folder (it has {foreign}): choose another folder")


def _load_student(student: Separator, tensors: dict[str, Tensor], run: RunFolder) -> None:
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{run.state} does not fit the separator: {str(error).splitlines()[-1]}") from None


def _refs(value: _Component | Sequence[_Component]) -> tuple[ComponentRef, ...]:
    """One strategy, or several in a list or joined by ``+``."""
    if isinstance(value, str):
        return tuple(_ref(name, "strategy") for name in value.split("+"))
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)
    if isinstance(value, ComponentRef) or pair:
        return (_ref(value, "strategy"),)  # type: ignore[arg-type]
    return tuple(_ref(one, "strategy") for one in value)  # type: ignore[arg-type]


def _ref(value: _Component, where: str) -> ComponentRef:
    if isinstance(value, ComponentRef):
        return value
    return validated(
        ComponentRef,
        {"name": value} if isinstance(value, str) else dict(zip(("name", "params"), value, strict=False)),
        where,
    )


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A strategy's state with its tensors on the CPU, nested ones too."""
    return {
        name: value.cpu() if isinstance(value, Tensor) else _on_cpu(value) if isinstance(value, dict) else value
        for name, value in state.items()
    }


def _seeded_build(spec: RunSpec, task: int) -> Separator:
    names = spec.tasks[0] if spec.tasks else spec.separator.classes
    with seeded(spec.train.seed, task):
        return build_from_spec(
            spec.separator.model_copy(
                update={"num_classes": len(names) or spec.separator.num_classes, "classes": tuple(names)}
            )
        )

"""The logs of a training while it runs: curves, masks and sounds, in CSV files and through Lightning's loggers.

Logging never changes a result: it draws from no generator of the training (the global ones are put back), and a logger
that fails is left alone from then on, with one line that says so. It is bounded: pictures of ``MIXTURES`` fixed
validation mixtures at ``PICTURES`` validations of a task, spread evenly, and of the selected weights at its end;
sounds at the end alone; gradient norms every ``NORM_EVERY`` steps.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avsep.data.protocol import TestMixture
from avsep.data.store import Store
from avsep.progress import Progress
from avsep.runs.csv_log import CsvLog
from avsep.training.loggers import LoggerChoice

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger

    from avsep.evaluation.scores import Kept, MixtureScore
    from avsep.separator import Separator

__all__ = ["TaskLog", "chosen_mixtures", "gradient_norm", "mask_picture"]

MIXTURES = 3
PICTURES = 4
NORM_EVERY = 10


class TaskLog:
    """The logs of one task of a run; a context manager.

    ``train.csv`` and ``validation.csv`` have a row a step and a validation. Opened at ``step`` of a resumed task,
    whatever was written after it goes: rows from the CSV files, events from TensorBoard's; loggers that cannot strike
    out (their steps count through all tasks, from ``offset`` on) get only what they did not get before.
    Without ``enabled`` (the other ranks) nothing is written anywhere.
    """

    def __init__(
        self,
        choices: Sequence[LoggerChoice],
        logs: Path,
        *,
        task: int,
        step: int,
        offset: int = 0,
        bars: Progress | None = None,
        run: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self._task = task
        self._offset = offset
        self._bars = bars
        self._stopped: set[str] = set()
        self._csv: dict[str, CsvLog] = {}
        self._logged: dict[str, tuple[int, int]] = {}
        self._choices: list[tuple[LoggerChoice, Logger]] = []
        if not enabled:
            return
        for name in ("train", "validation"):
            with self._guarded(f"{name}.csv"):
                self._csv[name] = log = CsvLog(logs / f"{name}.csv", until=(task, step))
                self._logged[name] = log.found
        for choice in choices:
            if choice.failed:
                continue
            with self._guarded(choice.name, choice), _undisturbed():
                logger = choice.open(logs, task, step)
                if run is not None and not choice.begun and not choice.per_task:
                    logger.log_hyperparams(_flat(run))
                choice.begun = True
                self._choices.append((choice, logger))

    def __enter__(self) -> TaskLog:
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for choice, logger in self._choices:
            if choice.per_task and not choice.failed:
                with self._guarded(choice.name, choice):
                    logger.finalize("success" if kind is None else "failed")
        threading.excepthook = self._hook

    def _thread_failed(self, arguments: Any) -> None:
        """TensorBoard writes in a thread of its own, whose error the next call raises too: once is enough."""
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            self._hook(arguments)

    @contextlib.contextmanager
    def _guarded(self, name: str, choice: LoggerChoice | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._stopped.add(name)
            if choice is not None:
                choice.failed = True
            cause = error.__cause__ or error  # Fabric's loggers wrap what went wrong
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            text = f"logging to {name} has stopped ({reason}); the training goes on without it"
            if self._bars is not None and self._bars.shown:
                self._bars.say(text)
            else:
                warnings.warn(text, stacklevel=3)

    def _each(self, call: Callable[[Logger, int], Any], step: int, kind: str = "train") -> None:
        """``call`` with each logger and the step it counts by."""
        for choice, logger in self._choices:
            logged = not choice.per_task and (self._task, step) <= self._logged.get(kind, (-1, -1))
            if choice.failed or logged:
                continue
            with self._guarded(choice.name, choice), _undisturbed():
                call(logger, step if choice.per_task else self._offset + step)

    def _row(self, name: str, row: dict[str, Any]) -> None:
        if name in self._csv and f"{name}.csv" not in self._stopped:
            with self._guarded(f"{name}.csv"):
                self._csv[name].write(row)

    def train(self, row: dict[str, Any], rates: Mapping[str, float], norm: float | None) -> None:
        """One step: ``row`` has task, epoch, step, loss, its terms, lr and seconds; ``rates`` by parameter group."""
        more = {} if norm is None else {"gradient_norm": norm}
        self._row("train", {**row, **{f"lr_{role}": rate for role, rate in rates.items()}, **more})
        left_out = ("task", "epoch", "step", "lr", "seconds")
        metrics = {k: v for k, v in row.items() if k not in left_out}
        metrics |= {f"lr/{role}": rate for role, rate in rates.items()} | more
        self._each(lambda logger, step: logger.log_metrics(metrics, step), row["step"])

    def validation(self, row: dict[str, Any], scores: Sequence[MixtureScore], tasks: Sequence[Sequence[str]]) -> None:
        """One validation: ``row`` has task, epoch, step and sdr_db; ``scores`` give means by class and by task."""
        parts = _means(scores, tasks)
        self._row("validation", {**row, **{f"sdr_db/{name}": value for name, value in parts.items()}})
        metrics = {"validation_sdr_db": row["sdr_db"]}
        metrics |= {f"validation_sdr_db/{name}": value for name, value in parts.items()}
        self._each(lambda logger, step: logger.log_metrics(metrics, step), row["step"], "validation")

    def media(
        self,
        separator: Separator,
        store: Store,
        mixtures: Sequence[TestMixture],
        step: int,
        *,
        batch_size: int,
        device: str | torch.device,
        sounds: bool = False,
    ) -> None:
        """Masks of a few mixtures as pictures, and with ``sounds`` the mixtures, references and what was separated."""
        if "pictures" in self._stopped or all(choice.failed for choice, _ in self._choices):
            return
        from avsep.evaluation.scores import evaluate_separator

        rate_hz = separator.spec.front_end.sample_rate_hz
        with self._guarded("pictures"), _undisturbed():
            scores = evaluate_separator(
                separator,
                store,
                mixtures,
                batch_size=batch_size,
                device=device,
                keep=range(len(mixtures)),
                interference=False,
            )
            for score in scores:
                kept = score.kept
                assert kept is not None
                name = "+".join(score.mixture.clips)
                image = mask_picture(separator, kept, score.mixture.classes)
                self._each(functools.partial(_picture, f"masks/{name}", image), step)
                if not sounds:
                    continue
                parts = {"mixture": kept.mixture}
                for place, of in enumerate(score.mixture.classes):
                    parts[f"{place + 1}-{of}-separated"] = kept.estimates[place]
                    parts[f"{place + 1}-{of}-reference"] = kept.references[place]
                for part, audio in parts.items():
                    self._each(functools.partial(_sound, f"sounds/{name}/{part}", audio, rate_hz), step)


def is_pictured(number: int, validations: int) -> bool:
    """Whether validation ``number`` (from 1 on) of a task's is one of the ``PICTURES`` that pictures are made at."""
    return number * PICTURES // validations > (number - 1) * PICTURES // validations


def chosen_mixtures(mixtures: Sequence[TestMixture]) -> list[TestMixture]:
    """The first mixture of each list, those of the latest lists first, then more of the latest; none degenerate."""
    lists: dict[str, list[TestMixture]] = {}
    for mixture in mixtures:
        if not mixture.degenerate:
            lists.setdefault(mixture.list_name, []).append(mixture)
    latest = sorted(lists.values(), key=lambda members: -members[0].task)
    return [*(members[0] for members in latest), *(m for members in latest for m in members[1:])][:MIXTURES]


def gradient_norm(separator: torch.nn.Module) -> torch.Tensor:
    """L2 norm of all gradients together, a scalar on their device."""
    gradients = [p.grad for p in separator.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def mask_picture(separator: Separator, kept: Kept, names: Sequence[str]) -> np.ndarray:
    """uint8 [H, W, 3]: the mixture's spectrogram, then each source's predicted and ideal mask on the same grid.

    Low frequencies are at the bottom, and colours are those of the pages (:mod:`avsep.evaluation.drawing`).
    """
    from PIL import Image, ImageDraw

    from avsep.dsp import magnitude
    from avsep.evaluation.drawing import RANGE_DB, palette

    device = next(separator.buffers()).device
    mixture = torch.from_numpy(kept.mixture).to(device)[None, None]
    level = 20 * torch.log10(magnitude(separator.analyse(mixture).network_input[0, 0]).clamp(min=1e-10)).cpu().numpy()
    values = [("mixture", "spectrogram", 1 + (level - level.max()) / RANGE_DB)]
    for place, name in enumerate(names):
        for what, masks in (("predicted", kept.masks), ("ideal", kept.ratios)):
            values.append((f"{name}, {what}", "mask", masks[place]))
    panels = [(text, palette(kind)[(np.clip(v, 0, 1) * 255).round().astype(int)]) for text, kind, v in values]
    height, width = panels[0][1].shape[:2]
    label, gap = 14, 6
    picture = Image.new("RGB", (len(panels) * (width + gap) - gap, height + label), (255, 255, 255))
    write = ImageDraw.Draw(picture)
    for number, (text, pixels) in enumerate(panels):
        left = number * (width + gap)
        write.text((left + 1, 1), text, fill=(0, 0, 0))
        picture.paste(Image.fromarray(np.ascontiguousarray(pixels[::-1])), (left, label))
    return np.asarray(picture)


def _picture(key: str, image: np.ndarray, logger: Any, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        logger.log_image(key=key, images=[image], step=step)
    elif experiment is not None and hasattr(experiment, "add_image"):
        experiment.add_image(key, image, step, dataformats="HWC")
    elif hasattr(logger, "run_id"):  # MLflow's client
        experiment.log_image(logger.run_id, image, artifact_file=f"{key}-{step:06d}.png")


def _sound(key: str, audio: np.ndarray, rate_hz: int, logger: Any, step: int) -> None:
    audio = np.clip(audio, -1, 1)
    experiment = getattr(logger, "experiment", None)
    if hasattr(logger, "log_audio"):
        logger.log_audio(key=key, audios=[audio], step=step, sample_rate=[rate_hz])
    elif experiment is not None and hasattr(experiment, "add_audio"):
        experiment.add_audio(key, torch.from_numpy(audio)[None], step, sample_rate=rate_hz)


def _means(scores: Sequence[MixtureScore], tasks: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean SDR in dB by class, then by task, of the sources that count."""
    of_class: dict[str, list[float]] = {name: [] for names in tasks for name in names}
    for score in scores:
        if score.counted:
            for source in score.sources:
                of_class[source.class_name].append(source.sdr)
    means = {name: float(np.mean(values)) for name, values in of_class.items() if values}
    for number, names in enumerate(tasks):
        if values := [v for name in names for v in of_class[name]]:
            means[f"task-{number}"] = float(np.mean(values))
    return means


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The global generators stay where they are, whatever a logger draws."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002

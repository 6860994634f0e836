"""Loggers by name: Lightning's, and any class of the same kind by its dotted path.

``tensorboard`` (a folder a task in ``logs/tensorboard``), ``files`` (pictures and sounds as PNG and WAV in
``logs/files``), ``wandb``, ``mlflow``, or ``package.module.Class``, a :class:`lightning_fabric.loggers.Logger` or one
of ``lightning.pytorch.loggers``. The CSV logs are written whatever is chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from avsep.errors import ConfigError, MissingExtraError, UnknownNameError, near_matches
from avsep.files import atomic_path, parse_yaml, read_json, write_json

__all__ = ["FilesLogger", "LoggerChoice", "choose_loggers", "closing"]


class FilesLogger(Logger):
    """Pictures as ``root_dir/NAME-STEP.png`` and sounds as WAV; numbers are left to the CSV logs."""

    def __init__(self, *, root_dir: str) -> None:
        self._root_dir = root_dir

    @property
    def root_dir(self) -> str:
        return self._root_dir

    @property
    def name(self) -> str:
        return "files"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def _path(self, key: str, step: int, suffix: str) -> Path:
        return Path(self._root_dir) / f"{key}-{step:06d}{suffix}"

    def log_image(self, key: str, images: Sequence[np.ndarray], step: int) -> None:
        from PIL import Image

        for image in images:
            with atomic_path(self._path(key, step, ".png")) as temporary:
                Image.fromarray(image).save(temporary)

    def log_audio(self, key: str, audios: Sequence[np.ndarray], step: int, sample_rate: Sequence[int]) -> None:
        from avsep.media.audio import write_audio

        for audio, rate_hz in zip(audios, sample_rate, strict=True):
            write_audio(self._path(key, step, ".wav"), audio, rate_hz)


@dataclass(frozen=True)
class _Known:
    """A logger with a short name: its dotted path, the packages it needs and the extra that brings them.

    ``defaults`` and ``renamed`` are of its parameters; ``resumes_by`` is the one for the id of a run to go on with.
    """

    path: str
    packages: tuple[str, ...]
    extra: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    resumes_by: str | None = None


_KNOWN = {
    "tensorboard": _Known("lightning_fabric.loggers.TensorBoardLogger", ("tensorboard",), "tensorboard"),
    "files": _Known("avsep.training.loggers.FilesLogger", ("matplotlib",), "report"),
    "wandb": _Known(
        "lightning.pytorch.loggers.WandbLogger",
        ("wandb", "lightning"),
        "wandb",
        defaults={"project": "avsep"},
        resumes_by="version",
    ),
    "mlflow": _Known(
        "lightning.pytorch.loggers.MLFlowLogger",
        ("mlflow", "lightning"),
        "mlflow",
        defaults={"experiment_name": "avsep"},
        renamed={"experiment": "experiment_name"},
        resumes_by="run_id",
    ),
}
_METHODS = ("log_metrics", "log_hyperparams", "finalize")


class LoggerChoice:
    """A logger that was chosen: made for a run's folder, with its ``name`` for messages."""

    def __init__(self, name: str, kind: type[Any], params: Mapping[str, Any]) -> None:
        self.name = name
        self.kind = kind
        self.params = dict(params)
        self.logger: Any = None
        self.begun = False
        self.failed = False

    @property
    def per_task(self) -> bool:
        """TensorBoard: a folder and a step count of its own for each task, from which steps can be struck out."""
        return issubclass(self.kind, TensorBoardLogger)

    def open(self, logs: Path, task: int, step: int) -> Any:
        """The logger for a run's ``logs`` folder. Of TensorBoard, events after ``step`` of ``task`` are struck out.

        A service that knows a run by an id goes on with the one in ``run.json``.
        """
        if self.per_task:
            place = {"root_dir": str(logs / "tensorboard"), "name": "", "version": f"task-{task:02d}"}
            return self.kind(**{**place, "purge_step": step + 1, "default_hp_metric": False, **self.params})
        if self.logger is not None:
            return self.logger
        folder = logs / self.name.rpartition(".")[2]
        taken = inspect.signature(self.kind).parameters
        options: dict[str, Any] = {key: str(folder) for key in ("root_dir", "save_dir") if key in taken}
        known, kept = _KNOWN.get(self.name), folder / "run.json"
        resumes_by = None if known is None else known.resumes_by
        if resumes_by is not None and kept.is_file():
            options[resumes_by] = str(read_json(kept)["id"])
        self.logger = self.kind(**{**options, **self.params})
        if resumes_by is not None and not kept.is_file():
            folder.mkdir(parents=True, exist_ok=True)  # where the run writes, which begins with its experiment
            _ = self.logger.experiment
            write_json(kept, {"id": self.logger.version})
        return self.logger


@contextlib.contextmanager
def closing(choices: Sequence[LoggerChoice]) -> Iterator[None]:
    """Finish the loggers of a whole run with how it ended; one that fails at that is no reason to fail."""
    status = "failed"
    try:
        yield
        status = "success"
    finally:
        for choice in choices:
            if choice.logger is not None and not choice.failed:
                with contextlib.suppress(Exception):
                    choice.logger.finalize(status)
                    if choice.name == "wandb":  # Lightning leaves that to the end of the process
                        choice.logger.experiment.finish(0 if status == "success" else 1)


def choose_loggers(names: Sequence[Any] | None) -> list[LoggerChoice]:
    """The loggers of ``--logger``: names or dotted paths with parameters (``wandb:project=mine,mode=offline``), or
    loggers that are made already. None: TensorBoard where it is installed. ``none`` or ``csv``: the CSV logs alone.

    Raises :class:`UnknownNameError`, :class:`ConfigError` for parameters that do not fit, :class:`MissingExtraError`.
    """
    if names is None:
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
    chosen = []
    for text in names:
        if not isinstance(text, str):
            chosen.append(LoggerChoice(type(text).__name__, type(text), {}))
            chosen[-1].logger = text
            continue
        name, _, rest = text.partition(":")
        if name in ("none", "csv") and not rest:
            continue
        kind, known = _class_of(name), _KNOWN.get(name)
        params = _params(text, rest)
        if known is not None:
            params = {**known.defaults, **{known.renamed.get(key, key): value for key, value in params.items()}}
        if name == "mlflow" and "tracking_uri" not in params:  # Lightning's default is a store that MLflow has given up
            import mlflow

            params["tracking_uri"] = mlflow.get_tracking_uri()
        try:
            inspect.signature(kind).bind_partial(**params)
        except TypeError as error:
            raise ConfigError(f"logger '{text}': {error}") from None
        chosen.append(LoggerChoice(name, kind, params))
    return chosen


def _class_of(name: str) -> type[Any]:
    known = _KNOWN.get(name)
    if known is not None:
        for package in known.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, known.extra, f"the logger '{name}'")
    module, dot, attribute = (name if known is None else known.path).rpartition(".")
    if not dot:
        raise UnknownNameError(
            f"no logger '{name}': {near_matches(name, [*_KNOWN, 'csv', 'none'])} (or give the dotted path of a class)"
        )
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"logger '{name}' cannot be imported: {error}") from None
    if not (isinstance(found, type) and all(hasattr(found, method) for method in _METHODS)):
        raise ConfigError(f"'{name}' is not a lightning_fabric.loggers.Logger: give the dotted path of such a class")
    return found


def _params(text: str, rest: str) -> dict[str, Any]:
    params = {}
    for part in filter(None, rest.split(",")):
        key, sign, value = part.partition("=")
        if not sign or not key.isidentifier():
            raise ConfigError(f"logger '{text}': parameters are NAME:key=value,key=value")
        try:
            params[key] = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"logger '{text}': {json.dumps(value)} is not a YAML value ({error})") from None
    return params

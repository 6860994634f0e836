"""Loggers by name: Lightning Fabric's, thin ones of other services, and any by its dotted path.

``tensorboard`` (a folder a task in ``logs/tensorboard``), ``files`` (pictures and sounds as PNG and WAV in
``logs/files``), ``wandb``, ``mlflow``, or ``package.module.Class``, a :class:`lightning_fabric.loggers.Logger`. The CSV
logs are written whatever is chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning_fabric.loggers import Logger, TensorBoardLogger

from avsep.errors import ConfigError, MissingExtraError, UnknownNameError, near_matches
from avsep.files import atomic_path, read_json, write_json

__all__ = ["FilesLogger", "LoggerChoice", "MlflowLogger", "WandbLogger", "choose_loggers", "closing"]


class FilesLogger(Logger):
    """Pictures as ``root_dir/NAME-STEP.png`` (needs Pillow) and sounds as WAV; numbers are left to the CSV logs."""

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


class _Kept(Logger):
    """A logger of a service that knows a run by an id, kept in ``save_dir`` so that a resume goes on with it."""

    def __init__(self, save_dir: str) -> None:
        self.save_dir = save_dir
        self._run: Any = None

    @property
    def version(self) -> str | None:
        file = Path(self.save_dir) / "run.json"
        return str(read_json(file)["id"]) if file.is_file() else None

    def _keep(self, run_id: str) -> str:
        write_json(Path(self.save_dir) / "run.json", {"id": run_id})
        return run_id


class WandbLogger(_Kept):
    """Weights & Biases. ``params``: of ``wandb.init`` (project, name, entity, mode, ...)."""

    def __init__(self, *, save_dir: str, **params: Any) -> None:
        super().__init__(save_dir)
        self._params = params

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def experiment(self) -> Any:
        if self._run is None:
            import wandb

            Path(self.save_dir).mkdir(parents=True, exist_ok=True)
            run_id = self.version or self._keep(uuid.uuid4().hex[:12])
            options = {"project": "avsep", **self._params}
            self._run = wandb.init(dir=self.save_dir, id=run_id, resume="allow", **options)
        return self._run

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(params, allow_val_change=True)

    def log_image(self, key: str, images: Sequence[np.ndarray], step: int) -> None:
        import wandb

        self.experiment.log({key: [wandb.Image(image) for image in images]}, step=step)

    def log_audio(self, key: str, audios: Sequence[np.ndarray], step: int, sample_rate: Sequence[int]) -> None:
        import wandb

        sounds = [wandb.Audio(a, sample_rate=r) for a, r in zip(audios, sample_rate, strict=True)]
        self.experiment.log({key: sounds}, step=step)

    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(0 if status == "success" else 1)


class MlflowLogger(_Kept):
    """MLflow, at ``tracking_uri`` (default: MLflow's own, such as MLFLOW_TRACKING_URI)."""

    def __init__(self, *, save_dir: str, experiment: str = "avsep", tracking_uri: str | None = None) -> None:
        super().__init__(save_dir)
        self._experiment = experiment
        self._tracking_uri = tracking_uri

    @property
    def name(self) -> str:
        return "mlflow"

    @property
    def experiment(self) -> Any:
        if self._run is None:
            from mlflow.tracking import MlflowClient

            self._run = client = MlflowClient(tracking_uri=self._tracking_uri)
            if self.version is None:
                found = client.get_experiment_by_name(self._experiment)
                number = found.experiment_id if found else client.create_experiment(self._experiment)
                self._keep(client.create_run(number).info.run_id)
        return self._run

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.experiment.log_metric(self.version, name, value, step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        client, run = self.experiment, self.version
        for name, value in params.items():
            client.log_param(run, name, str(value)[:500])

    def log_image(self, key: str, images: Sequence[np.ndarray], step: int) -> None:
        for image in images:
            self.experiment.log_image(self.version, image, artifact_file=f"{key}-{step:06d}.png")

    def finalize(self, status: str) -> None:
        if self._run is not None and self.version is not None:
            self._run.set_terminated(self.version, "FINISHED" if status == "success" else "FAILED")


# name -> (class, package that must be there, extra that brings it)
_KNOWN: dict[str, tuple[type[Logger], str | None, str]] = {
    "tensorboard": (TensorBoardLogger, "tensorboard", "tensorboard"),
    "files": (FilesLogger, "PIL", "report"),
    "wandb": (WandbLogger, "wandb", "wandb"),
    "mlflow": (MlflowLogger, "mlflow", "mlflow"),
}


class LoggerChoice:
    """A logger that was asked for: made for a run's folder, with its ``name`` for messages."""

    def __init__(self, name: str, kind: type[Logger], params: Mapping[str, Any]) -> None:
        self.name = name
        self.kind = kind
        self.params = dict(params)
        self.logger: Logger | None = None
        self.begun = False
        self.failed = False

    @property
    def per_task(self) -> bool:
        """TensorBoard: a folder and a step count of its own for each task, from which steps can be struck out."""
        return issubclass(self.kind, TensorBoardLogger)

    def open(self, logs: Path, task: int, step: int) -> Logger:
        """The logger for a run's ``logs`` folder. Of TensorBoard, events after ``step`` of ``task`` are struck out."""
        if self.per_task:
            options = {"root_dir": str(logs / "tensorboard"), "name": "", "version": f"task-{task:02d}"}
            return self.kind(**{**options, "purge_step": step + 1, "default_hp_metric": False, **self.params})
        if self.logger is None:
            place, known = str(logs / self.name.rpartition(".")[2]), inspect.signature(self.kind).parameters
            folders = {key: place for key in ("root_dir", "save_dir") if key in known}
            self.logger = self.kind(**{**folders, **self.params})
        return self.logger


@contextlib.contextmanager
def closing(choices: Sequence[LoggerChoice]) -> Iterator[None]:
    """Tells the loggers of a whole run how it ended; one that fails at that is no reason to fail."""
    status = "failed"
    try:
        yield
        status = "success"
    finally:
        for choice in choices:
            if choice.logger is not None and not choice.failed:
                with contextlib.suppress(Exception):
                    choice.logger.finalize(status)


def choose_loggers(names: Sequence[str | Logger] | None) -> list[LoggerChoice]:
    """The loggers of ``--logger``: names or dotted paths with parameters (``wandb:project=mine,mode=offline``), or
    loggers that are made already. None: TensorBoard where it is installed. ``none`` or ``csv``: the CSV logs alone.

    Raises :class:`UnknownNameError`, :class:`ConfigError` for parameters that do not fit, :class:`MissingExtraError`.
    """
    if names is None:
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
    chosen = []
    for text in names:
        if isinstance(text, Logger):
            chosen.append(LoggerChoice(type(text).__name__, type(text), {}))
            chosen[-1].logger = text
            continue
        name, _, rest = text.partition(":")
        if name in ("none", "csv") and not rest:
            continue
        kind = _class_of(name)
        params = _params(text, rest)
        try:
            inspect.signature(kind).bind_partial(**params)
        except TypeError as error:
            raise ConfigError(f"logger '{text}': {error}") from None
        chosen.append(LoggerChoice(name, kind, params))
    return chosen


def _class_of(name: str) -> type[Logger]:
    if name in _KNOWN:
        kind, package, extra = _KNOWN[name]
        if package is not None and importlib.util.find_spec(package) is None:
            raise MissingExtraError({"PIL": "Pillow"}.get(package, package), extra, f"the logger '{name}'")
        return kind
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise UnknownNameError(
            f"no logger '{name}': {near_matches(name, [*_KNOWN, 'csv', 'none'])} (or give the dotted path of a class)"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"logger '{name}' cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Logger)):
        raise ConfigError(f"'{name}' is not a lightning_fabric.loggers.Logger: give the dotted path of such a class")
    return found


def _params(text: str, rest: str) -> dict[str, Any]:
    params = {}
    for part in filter(None, rest.split(",")):
        key, sign, value = part.partition("=")
        if not sign or not key.isidentifier():
            raise ConfigError(f"logger '{text}': parameters are NAME:key=value,key=value")
        try:
            params[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"logger '{text}': {json.dumps(value)} is not a YAML value") from None
    return params

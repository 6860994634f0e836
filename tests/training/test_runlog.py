"""Logging: what is told, bounded and struck out on resume; a result that never depends on it; loggers that fail."""

from __future__ import annotations

import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from lightning_fabric.loggers import Logger
from safetensors.torch import load_file

from avsep.cli import main
from avsep.data.protocol import TestMixture
from avsep.errors import ConfigError, MissingExtraError, UnknownNameError
from avsep.evaluation.drawing import palette
from avsep.training.learner import ContinualLearner
from avsep.training.log import PICTURES, TaskLog, _picture, chosen_mixtures, gradient_norm, is_pictured
from avsep.training.loggers import choose_loggers, closing
from support.tones import TINY_FRONT_END, dies_at_step, stream_of, tiny_run_spec

SHORT = {"epochs": 1, "checkpoint_every": 1000}


class Recorder(Logger):
    """Keeps what it is told, disturbs every global generator, and may fail."""

    def __init__(self, fails: bool = False) -> None:
        self.metrics: list[tuple[int, dict]] = []
        self.media: list[tuple[str, int]] = []
        self.params: dict = {}
        self.calls = 0
        self.fails = fails

    name = "recorder"
    version = ""

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(3)
        if self.fails:
            raise OSError(28, "No space left on device")
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.params = params

    def log_image(self, key, images, step):
        assert images[0].dtype == np.uint8
        self.media.append((key, step))

    def log_audio(self, key, audios, step, sample_rate):
        assert sample_rate == [TINY_FRONT_END["sample_rate_hz"]]
        self.media.append((key, step))


def learner(loggers, **train):
    return ContinualLearner.from_spec(tiny_run_spec("finetune", "none", **train), accelerator="cpu", loggers=loggers)


@pytest.fixture(scope="module")
def silent(tone_store, tmp_path_factory):
    """A short run without loggers."""
    out = tmp_path_factory.mktemp("silent") / "run"
    learner(["none"], **SHORT).fit(stream_of(tone_store), out, progress=False)
    return out


def saved(run):
    """The last separator's weights, to the last bit."""
    tensors = load_file(run / "tasks" / "01" / "separator" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_loggers_hear_everything_and_change_nothing(tone_store, silent, tmp_path):
    recorder, broken = Recorder(), Recorder(fails=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner([recorder, broken], **SHORT).fit(stream_of(tone_store), tmp_path / "run", progress=False)
    assert saved(tmp_path / "run") == saved(silent)
    told = [str(w.message) for w in caught if "logging to" in str(w.message)]
    assert told == [
        "logging to Recorder has stopped ([Errno 28] No space left on device); the training goes on without it"
    ]
    assert broken.calls == 1
    steps = [s for s, m in recorder.metrics if "loss" in m]
    assert steps == [1, 2, 3, 5, 6, 7]  # the step after a task's last is that of its selected weights
    first = recorder.metrics[0][1]
    assert {"loss", "separation", "lr/audio", "lr/visual", "lr/decoder", "gradient_norm"} <= set(first)
    assert first["gradient_norm"] > 0
    assert "gradient_norm" not in recorder.metrics[1][1]
    (before, after) = (m for _, m in recorder.metrics if "validation_sdr_db" in m)
    assert {"validation_sdr_db/ding", "validation_sdr_db/hum", "validation_sdr_db/task-0"} <= set(before)
    assert {"validation_sdr_db/ding", "validation_sdr_db/peep", "validation_sdr_db/task-1"} <= set(after)
    pictures = [m for m in recorder.media if m[0].startswith("masks/")]
    assert {s for _, s in pictures} == {3, 4, 7, 8}
    assert len(pictures) == 12
    sounds = [m for m in recorder.media if m[0].startswith("sounds/")]
    assert {s for _, s in sounds} == {4, 8}
    assert len(sounds) == 2 * 3 * 5
    assert recorder.params["train.batch_size"] == 2


def test_tensorboard_is_read_back(tone_store, silent, tmp_path, monkeypatch):
    """Killed in the second task and resumed: the same result, and no step twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dies_at_step(monkeypatch, 6)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        learner(["tensorboard"], **SHORT).fit(stream_of(tone_store), out, progress=False)
    monkeypatch.undo()
    learner(["tensorboard"], **SHORT).fit(stream_of(tone_store), out, resume=True, progress=False)
    assert saved(out) == saved(silent)
    for task in (0, 1):
        size = {"images": 0, "audio": 0, "scalars": 0}
        events = EventAccumulator(str(out / "logs" / "tensorboard" / f"task-{task:02d}"), size).Reload()
        for name in ("loss", "lr/decoder"):
            assert [e.step for e in events.Scalars(name)] == [1, 2, 3]
        assert [e.step for e in events.Scalars("gradient_norm")] == [1]
        assert [e.step for e in events.Scalars("validation_sdr_db/ding")] == [3]
        images, sounds = events.Tags()["images"], events.Tags()["audio"]
        assert len(images) == 3
        assert len(sounds) == 15
        for name in images:
            assert [e.step for e in events.Images(name)] == [3, 4]
            assert events.Images(name)[0].encoded_image_string.startswith(b"\x89PNG")
        for name in sounds:
            assert [e.step for e in events.Audio(name)] == [4]
            assert events.Audio(name)[0].sample_rate == TINY_FRONT_END["sample_rate_hz"]


def test_a_full_disk_under_tensorboard_is_said_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with TaskLog(choose_loggers(["tensorboard"]), tmp_path, task=0, step=0) as log:
            monkeypatch.setattr(RecordWriter, "write", full)
            for number in range(1, 60):  # more than its queue holds
                log.train({"task": 0, "epoch": 0, "step": number, "loss": 1.0, "lr": 0.1, "seconds": 0.0}, {}, None)
    assert len([w for w in caught if "No space left" in str(w.message)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert len((tmp_path / "train.csv").read_text().splitlines()) == 60


def test_what_cannot_be_struck_out_is_not_told_twice(tmp_path):
    def told(step, *numbers):
        recorder = Recorder()
        with TaskLog(choose_loggers([recorder]), tmp_path, task=1, step=step, offset=50) as log:
            for number in numbers:
                log.train({"task": 1, "epoch": 0, "step": number, "loss": 0.5, "lr": 0.1, "seconds": 0.0}, {}, None)
        return [s for s, _ in recorder.metrics]

    assert told(0, 1, 2, 3, 4) == [51, 52, 53, 54]
    assert told(2, 3, 4, 5) == [55]
    assert [line.split(",")[2] for line in (tmp_path / "train.csv").read_text().splitlines()[1:]] == list("12345")


def test_files_and_a_rank_that_writes_nothing(tone_store, silent, tmp_path):
    from avsep.separator import load_separator

    stream = stream_of(tone_store)
    mixtures = chosen_mixtures(stream.validation.at(1))
    assert len({m.clips for m in mixtures}) == 3
    assert mixtures[0].task == 1
    separator = load_separator(silent, task=1)
    for folder, enabled in (("a", True), ("b", False)):
        with TaskLog(choose_loggers(["files"]), tmp_path / folder, task=1, step=0, enabled=enabled) as log:
            log.media(separator, stream.store, mixtures, 7, batch_size=2, device="cpu", sounds=True)
            log.train({"task": 1, "epoch": 0, "step": 1, "loss": 0.5, "lr": 0.1, "seconds": 0.0}, {}, None)
    assert not (tmp_path / "b").exists()
    pictures = sorted((tmp_path / "a" / "files").rglob("*.png"))
    assert len(pictures) == 3
    assert len(list((tmp_path / "a" / "files").rglob("*.wav"))) == 15
    from PIL import Image

    with Image.open(pictures[0]) as image:
        assert image.size == (5 * 128 + 4 * 6, 128 + 14)
        pixels = np.asarray(image)[14:]
    for panel, kind in ((pixels[:, :128], "spectrogram"), (pixels[:, -128:], "mask")):
        assert set(map(tuple, panel.reshape(-1, 3).tolist())) <= set(map(tuple, palette(kind).tolist()))


def test_how_often():
    assert sum(is_pictured(n, 100) for n in range(1, 101)) == PICTURES
    assert is_pictured(100, 100)
    assert [n for n in range(1, 4) if is_pictured(n, 3)] == [1, 2, 3]
    same = TestMixture(("a", "a"), ("x", "x"), (0, 0), 0, "paper-0", "self")
    assert chosen_mixtures([same]) == []


def test_gradient_norm():
    module = torch.nn.Linear(2, 1)
    module.weight.grad, module.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert gradient_norm(module) == 5.0
    assert gradient_norm(torch.nn.Linear(1, 1)) == 0.0


def log_twice(text, folder):
    """What a run and its resume do with a logger: its two versions, as the service has named them."""
    versions = []
    for step in (5, 6):
        choices = choose_loggers([text])
        with closing(choices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger = choices[0].open(folder, 0, 0)
            logger.log_hyperparams({"a": 1})
            logger.log_metrics({"loss": float(step)}, step)
            _picture("masks/k", np.zeros((2, 2, 3), np.uint8), logger, step)
            versions.append(logger.version)
    return versions


def test_wandb_and_mlflow_go_on_with_their_run(tmp_path, monkeypatch):
    """Against stand-ins of Lightning's classes that keep what they are given."""
    made, said = [], []

    class Stub:
        def __init__(self, save_dir=".", version=None, run_id=None, **params):
            made.append({"save_dir": save_dir, "id": version or run_id, **params})
            self.version = version or run_id or "0123"
            self.run_id = self.version
            self.experiment = types.SimpleNamespace(
                log_image=lambda run, image, artifact_file: said.append((run, artifact_file)),
                finish=lambda code: said.append(("finished", code)),
            )

        def log_metrics(self, metrics, step=None):
            said.append((metrics, step))

        def log_hyperparams(self, params):
            pass

        def finalize(self, status):
            pass

    class WandbLogger(Stub):
        def log_image(self, key, images, step):
            said.append((key, step))

    stand_in = types.SimpleNamespace(WandbLogger=WandbLogger, MLFlowLogger=Stub)
    service = types.SimpleNamespace(get_tracking_uri=lambda: "http://there")
    monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers", stand_in)
    monkeypatch.setitem(sys.modules, "mlflow", service)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert log_twice("wandb:project=mine,mode=offline", tmp_path) == ["0123", "0123"]
    place = {"save_dir": str(tmp_path / "wandb")}
    assert made == [{**place, "id": known, "project": "mine", "mode": "offline"} for known in (None, "0123")]
    assert said[:3] == [({"loss": 5.0}, 5), ("masks/k", 5), ("finished", 0)]
    assert len(said) == 6
    made.clear(), said.clear()
    assert log_twice("mlflow:experiment=e", tmp_path) == ["0123", "0123"]
    place = {"save_dir": str(tmp_path / "mlflow"), "tracking_uri": "http://there"}
    assert made == [{**place, "id": known, "experiment_name": "e"} for known in (None, "0123")]
    assert said[:2] == [({"loss": 5.0}, 5), ("0123", "masks/k-000005.png")]


def test_wandb_itself(tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("lightning")
    first, second = log_twice("wandb:mode=offline", tmp_path)
    assert first == second
    assert len(list(tmp_path.rglob(f"run-{first}.wandb"))) == 2  # parts of one run


def test_mlflow_itself(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("lightning")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    where = f"file:{tmp_path / 'service'}"
    first, second = log_twice(f"mlflow:tracking_uri={where}", tmp_path)
    assert first == second
    client = MlflowClient(where)
    assert [(m.step, m.value) for m in client.get_metric_history(first, "loss")] == [(5, 5.0), (6, 6.0)]
    assert len(client.list_artifacts(first, "masks")) == 2
    assert client.get_run(first).info.status == "FINISHED"
    assert client.get_experiment_by_name("avsep") is not None


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("tensorbord", UnknownNameError, "no logger 'tensorbord': did you mean 'tensorboard'"),
        ("no_such.module.Logger", ConfigError, "cannot be imported"),
        ("avsep.training.log.NoLogger", ConfigError, "cannot be imported"),
        ("avsep.training.log.TaskLog", ConfigError, "is not a lightning_fabric.loggers.Logger"),
        ("mlflow", MissingExtraError, 'pip install "avsep\\[mlflow\\]"'),
        ("files:colour=red", ConfigError, "unexpected keyword argument 'colour'"),
        ("files:colour", ConfigError, "NAME:key=value"),
        ("files:root_dir=[", ConfigError, "is not a YAML value"),
    ],
)
def test_wrong_loggers(text, kind, message, tone_store, tmp_path, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mlflow" else found(name, *a))
    with pytest.raises(kind, match=message):
        choose_loggers([text])
    with pytest.raises(SystemExit) as stop:
        main(["train", str(tone_store), "--out", str(tmp_path / "run"), "--logger", text])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_any_logger_by_its_path(tmp_path):
    (choice,) = choose_loggers(["lightning_fabric.loggers.CSVLogger:name=mine"])
    logger = choice.open(tmp_path, 0, 0)
    assert choice.open(tmp_path, 1, 0) is logger  # one for all tasks
    assert str(tmp_path) in str(logger.root_dir)
    assert choose_loggers(["none"]) == []

"""Runs over tasks that overlap: what is learned, kept and tested, and a kill in the middle."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from unittest import mock

import pytest

import avsep.training.loop
from avsep.cli.train_command import command
from avsep.data.tasks import task_stream
from avsep.errors import ConfigError
from avsep.evaluation.evaluate import evaluate_run
from avsep.files import read_json
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from avsep.spec import BlurrySpec, RunSpec, validated
from avsep.training.learner import ContinualLearner
from support.continual_runs import SEPARATORS, Unscored, differing, weights
from support.tones import TINY_FRONT_END, TINY_TASKS, TINY_TRAIN


def stream_of(store):
    blurry = BlurrySpec(disjoint=50, blurry=70, seed=1)
    return task_stream(store, TINY_TASKS, blurry=blurry, clip_samples=TINY_FRONT_END["clip_samples"])


def learner_of(stream, strategy, separator):
    spec = {
        "separator": SEPARATORS[separator],
        "strategy": strategy,
        "memory": "random_per_class",
        "train": {**TINY_TRAIN, "epochs": 1, "checkpoint_every": 2},
        "tasks": [list(task.classes) for task in stream.tasks],
    }
    learner = ContinualLearner.from_spec(validated(RunSpec, spec, "test"), accelerator="cpu", loggers=())
    learner._validation = lambda stream, task: Unscored(stream, task, learner.train, learner.ranks)
    return learner


@pytest.mark.parametrize(
    ("strategy", "separator"),
    [
        ("contavsep", "iquery"),
        pytest.param("task_adapters", "iquery_adapters", marks=pytest.mark.slow),
        pytest.param("drift_compensation", "iquery_projection", marks=pytest.mark.slow),
        pytest.param("joint", "sound_of_pixels", marks=pytest.mark.slow),
    ],
)
def test_a_run_over_overlapping_tasks(tone_store, tmp_path, monkeypatch, strategy, separator):
    stream, out, killed = stream_of(tone_store), tmp_path / "run", tmp_path / "killed"
    save = avsep.training.loop.save_latest

    def saves(folder, name, state):
        save(folder, name, state)
        if name == "task-01-step-0000002":
            shutil.copytree(out, killed)

    with mock.patch.object(avsep.training.loop, "save_latest", saves):
        learner_of(stream, strategy, separator).fit(stream, out, progress=False)
    first = RunFolder(out).task(0).record()
    assert first["classes"] == list(stream.tasks[0].classes)
    assert len(first["classes"]) > 2  # one of the second task's own comes already
    assert load_separator(out, task=1).classes == stream.tasks[1].seen
    kept = first["exemplars"]
    assert sorted(kept) == (sorted(TINY_TASKS[0]) if strategy != "joint" else [])
    assert {clip for clips in kept.values() for clip in clips} <= {c.id for c in stream.train_clips(stream.tasks[0])}

    spec = RunFolder(out).spec()
    assert spec.blurry == stream.blurry
    assert spec.tested == tuple(map(tuple, TINY_TASKS))
    again = task_stream(tone_store, spec.tested, blurry=spec.blurry, clip_samples=TINY_FRONT_END["clip_samples"])
    assert again.shares == stream.shares
    learner_of(again, strategy, separator).fit(again, killed, progress=False, resume=True)
    assert differing(weights(out), weights(killed)) == []

    streams = []
    monkeypatch.setattr(ContinualLearner, "fit", lambda self, stream, *a, **k: streams.append(stream) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(SimpleNamespace(obj=()), None, out=out, resume=True, device="cpu")
    assert (streams[0].shares, streams[0].tasks) == (stream.shares, stream.tasks)
    with pytest.raises(ConfigError, match="leave --blurry out to resume"):
        command(SimpleNamespace(obj=()), None, out=out, resume=True, blurry="50:10", device="cpu")

    result = evaluate_run(out, yardsticks=False, forward_transfer=True)
    assert result["tasks"] == TINY_TASKS
    assert [step["task"] for step in result["after"]] == [0, 1]
    assert set(result["forward_transfer"]) == {"1"}
    assert read_json(out / "evaluation.json")["protocol_hash"] == stream.protocol.hash


def test_the_command_makes_the_stream(tone_store, tmp_path, monkeypatch):
    specs = []
    monkeypatch.setattr(ContinualLearner, "from_spec", lambda spec, **k: specs.append(spec) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(SimpleNamespace(obj=()), tone_store, out=tmp_path / "new", blurry="50:70:1", classes_per_task=2)
    stream = stream_of(tone_store)
    assert (specs[0].blurry, specs[0].tasks) == (stream.blurry, tuple(task.classes for task in stream.tasks))

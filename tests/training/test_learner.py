"""The task loop: growth, memory, resume, guards."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from safetensors.torch import load_file

import avsep
from avsep.data.tasks import task_stream
from avsep.errors import AvsepError, CheckpointError, ConfigError, DataError, NumericalError, RunError, UnknownNameError
from avsep.runs.folder import RunFolder
from avsep.spec import OptimizerSpec
from avsep.training import loop
from avsep.training.learner import ContinualLearner
from avsep.training.loop import TaskLoop
from avsep.training.optim import learning_rate_factor
from avsep.training.validation import Validation, _thinned
from support.tones import (
    TINY_FRONT_END,
    TINY_SEPARATOR,
    TINY_TASKS,
    TINY_TRAIN,
    dies_at_step,
    tiny_learner,
    tiny_run_spec,
)

CLIP = TINY_FRONT_END["clip_samples"]


def _stream(store, tasks=TINY_TASKS):
    return task_stream(store, tasks, clip_samples=CLIP)


def _weights(run, task):
    return load_file(run / "tasks" / f"{task:02d}" / "separator" / "model.safetensors")


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _rows(path):
    with open(path, newline="") as file:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(file)]


def test_a_run_folder_has_what_it_should(tone_run):
    records = [json.loads((tone_run / "tasks" / t / "task.json").read_text()) for t in ("00", "01")]
    assert [r["classes"] for r in records] == TINY_TASKS
    assert records[0]["steps"] == 6
    # one exemplar of each class of the first task, none is chosen after the last
    assert {k: len(v) for k, v in records[1]["exemplars"].items()} == {"ding": 1, "hum": 1}
    assert all(i.startswith(f"{k}-train") for k, v in records[1]["exemplars"].items() for i in v)
    first, last = avsep.load_separator(tone_run, task=0), avsep.load_separator(tone_run)
    assert first.classes == ("ding", "hum")
    assert last.classes == ("ding", "hum", "peep", "whirr")
    rows = _rows(tone_run / "logs" / "train.csv")
    assert len(rows) == 12
    assert all(float(r["separation"]) > 0 and float(r["instance"]) > 0 and float(r["class"]) > 0 for r in rows)
    assert all(r.get("mask", "") == "" for r in rows if r["task"] == "0")
    assert any(float(r["mask"] or 0) > 0 for r in rows if r["task"] == "1")
    assert (tone_run / "protocol.json").is_file()
    assert yaml.safe_load((tone_run / "run.yaml").read_text())["strategy"]["name"] == "contavsep"


def test_training_changes_every_part_and_keeps_the_store_small(tone_run):
    first, last = _weights(tone_run, 0), _weights(tone_run, 1)
    for part in ("audio_encoder", "object_encoder", "motion_encoder", "mask_decoder"):
        changed = [
            k
            for k in first
            if k.startswith(part) and first[k].shape == last[k].shape and not torch.equal(first[k], last[k])
        ]
        assert changed, part


# before the first step, in mid-epoch between checkpoints, at the end of a task, in the second task
@pytest.mark.parametrize("deaths", [(3, 4), pytest.param((0, 3, 4, 3), marks=pytest.mark.slow)])
def test_resume_after_kills_gives_the_uninterrupted_result(deaths, tone_run, tone_store, tmp_path):
    """A process that dies without warning at several steps of both tasks, resumed each time."""
    run = tmp_path / "run"
    script = tmp_path / "victim.py"
    script.write_text(
        "import os, sys\n"
        "sys.path.insert(0, sys.argv[4])\n"
        "from support.tones import *\n"
        "from avsep.data.tasks import task_stream\n"
        "from avsep.training.loop import TaskLoop\n"
        "die_after = int(sys.argv[3])\n"
        "step = TaskLoop._step\n"
        "count = 0\n"
        "def counted(self, *args):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count > die_after:\n"
        "        os._exit(9)\n"
        "    return step(self, *args)\n"
        "TaskLoop._step = counted\n"
        "stream = task_stream(sys.argv[1], TINY_TASKS, clip_samples=TINY_FRONT_END['clip_samples'])\n"
        "from pathlib import Path\n"
        "tiny_learner().fit(stream, sys.argv[2], resume=Path(sys.argv[2], 'run.yaml').exists(), progress=False)\n"
    )
    codes = []
    for die_after in (*deaths, 100):
        tests = Path(__file__).parents[1]
        command = [sys.executable, str(script), str(tone_store), str(run), str(die_after), str(tests)]
        codes.append(subprocess.run(command, capture_output=True, timeout=240).returncode)
    assert codes == [*(9 for _ in deaths), 0]
    for task in (0, 1):
        assert _equal(_weights(run, task), _weights(tone_run, task))
    assert _rows(run / "logs" / "train.csv") == _rows(tone_run / "logs" / "train.csv")
    assert _rows(run / "logs" / "validation.csv") == _rows(tone_run / "logs" / "validation.csv")


def test_resuming_a_finished_run_changes_nothing(tone_run, tone_store, tmp_path):
    run = shutil.copytree(tone_run, tmp_path / "run")
    tiny_learner().fit(_stream(tone_store), run, resume=True, progress=False)
    assert _equal(_weights(run, 1), _weights(tone_run, 1))


def test_composed_in_three_lines_gives_what_the_spec_gives(tone_run, tone_store, tmp_path):
    separator = avsep.build_separator(
        **{k: TINY_SEPARATOR[k] for k in TINY_SEPARATOR if k != "front_end"},
        front_end=TINY_FRONT_END,
        classes=TINY_TASKS[0],
        seed=1234,
    )
    learner = avsep.ContinualLearner(
        separator, strategy="contavsep", memory=("random_per_class", {"per_class": 1}), train=TINY_TRAIN
    )
    learner.fit(_stream(tone_store), tmp_path / "run", progress=False)
    assert _equal(_weights(tmp_path / "run", 1), _weights(tone_run, 1))


@pytest.mark.parametrize("strategy", ["finetune", "joint"])
def test_other_strategies_learn_both_tasks(strategy, tone_store, tmp_path):
    learner = tiny_learner(strategy, "none", epochs=1)
    records = learner.fit(_stream(tone_store), tmp_path / "run", progress=False)
    assert [r["strategy"] for r in records] == [strategy] * 2
    assert learner.separator.classes == tuple(TINY_TASKS[0] + TINY_TASKS[1])
    assert all(r["exemplars"] == {} for r in records)
    clips = {c for e in (0, 1) for m in _drawn(learner, _stream(tone_store), 1, e) for c in m}
    assert {c.split("-")[0] for c in clips} == (
        set(TINY_TASKS[1]) if strategy == "finetune" else {"ding", "hum", "peep", "whirr"}
    )


def _drawn(learner, stream, task, epoch):
    data = learner._mixtures(stream, stream.tasks[task]).epoch(epoch)
    return [[s.clip.id for s in data[i]] for i in range(len(data))]


def test_it_learns_in_mixed_precision(tone_run, tone_store, tmp_path):
    learner = tiny_learner(precision="bf16-mixed")
    seen = []
    learner.separator.mask_decoder.register_forward_hook(
        lambda module, inputs, output: seen.append(output.logits.dtype)
    )
    learner.fit(_stream(tone_store), tmp_path / "run", progress=False)
    assert torch.bfloat16 in seen
    state = _weights(tmp_path / "run", 1)
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}
    mixed, full = (_rows(run / "logs" / "train.csv") for run in (tmp_path / "run", tone_run))
    assert "mask" in mixed[-1]  # a teacher took part
    # the first step sees the same weights and mixtures
    assert float(mixed[0]["separation"]) == pytest.approx(float(full[0]["separation"]), rel=0.02)
    assert mixed[0]["separation"] != full[0]["separation"]


@pytest.mark.parametrize("from_scratch", [True, False])
def test_joint_starts_from_fresh_weights_or_goes_on(from_scratch, tone_store, tmp_path, monkeypatch):
    strategy = ("joint", {"from_scratch": from_scratch})
    learner = tiny_learner(strategy, "none", epochs=1, steps_per_epoch=1)
    before = {}
    original = loop.make_optimizers

    def spy(student, specs, strategy=None):
        before[student.num_classes] = student.audio_encoder.state_dict()["down.0.weight"].clone()
        return original(student, specs, strategy)

    monkeypatch.setattr(loop, "make_optimizers", spy)
    learner.fit(_stream(tone_store), tmp_path / "run", progress=False)
    trained = _weights(tmp_path / "run", 0)["audio_encoder.down.0.weight"]
    assert torch.equal(before[4], trained) != from_scratch
    assert not torch.equal(before[4], before[2])


def test_reader_processes_do_not_change_the_result(tone_run, tone_store, tmp_path):
    learner = ContinualLearner.from_spec(tiny_run_spec(), accelerator="cpu", workers=1)
    learner.fit(_stream(tone_store), tmp_path / "run", progress=False)
    assert _equal(_weights(tmp_path / "run", 1), _weights(tone_run, 1))


def test_nan_stops_with_step_clips_and_checkpoint(tone_store, tmp_path):
    learner = tiny_learner("finetune", "none")
    original = learner.strategy.loss
    calls = []

    def broken(step):
        calls.append(step.batch.clips)
        terms = original(step)
        return {**terms, "separation": terms["separation"] * float("nan")} if len(calls) == 4 else terms

    learner.strategy.loss = broken
    with pytest.raises(NumericalError) as caught:
        learner.fit(_stream(tone_store), tmp_path / "run", progress=False)
    message = str(caught.value)
    assert "task 0 step 3" in message
    assert "+".join(calls[-1][0]) in message
    assert str(tmp_path / "run" / "state") in message
    # the checkpoint before is good: resumed with the fault gone, the run is the one that never failed
    tiny_learner("finetune", "none").fit(_stream(tone_store), tmp_path / "run", resume=True, progress=False)
    tiny_learner("finetune", "none").fit(_stream(tone_store), tmp_path / "whole", progress=False)
    assert _equal(_weights(tmp_path / "run", 1), _weights(tmp_path / "whole", 1))


def test_a_strategy_gets_the_task_before_as_a_frozen_teacher(tone_store, tmp_path):
    learner = tiny_learner("finetune", "none", epochs=1)
    learner.strategy.needs_teacher = True
    original = learner.strategy.loss
    taught = []

    def spy(step):
        teacher = step.teacher
        if teacher is not None:
            assert teacher is not step.student
            assert not any(m.training for m in teacher.modules())
            assert not any(p.requires_grad for p in teacher.parameters())
            taught.append({k: v.clone() for k, v in teacher.state_dict().items()})
        return original(step)

    learner.strategy.loss = spy
    learner.fit(_stream(tone_store), tmp_path / "run", progress=False)
    assert len(taught) == 3  # the steps of the second task, and none of the first
    assert all(_equal(t, _weights(tmp_path / "run", 0)) for t in taught)


def test_the_best_validation_is_kept_and_the_first_of_equals(tone_store, tmp_path, monkeypatch):
    scores = iter([1.0, 3.0, 3.0, 2.0, 4.0, 1.0, 2.0, 3.0])
    seen = []

    def score(self, student):
        seen.append({k: v.clone() for k, v in student.state_dict().items()})
        return next(scores), []

    monkeypatch.setattr(Validation, "score", score)
    records = tiny_learner("finetune", "none", epochs=4).fit(_stream(tone_store), tmp_path / "run", progress=False)
    assert [(r["best_epoch"], r["best_step"], r["validation_sdr_db"]) for r in records] == [(2, 6, 3.0), (1, 3, 4.0)]
    assert _equal(_weights(tmp_path / "run", 0), seen[1])
    assert _equal(_weights(tmp_path / "run", 1), seen[4])


def test_another_spec_is_refused(tone_run, tone_store, tmp_path):
    run = shutil.copytree(tone_run, tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"train\.batch_size was 2, now 3"):
        tiny_learner(batch_size=3).fit(_stream(tone_store), run, resume=True, progress=False)
    with pytest.raises(CheckpointError, match=r"strategy\.name was 'contavsep', now 'finetune'"):
        tiny_learner("finetune").fit(_stream(tone_store), run, resume=True, progress=False)
    with pytest.raises(RunError, match="holds a run already"):
        tiny_learner().fit(_stream(tone_store), run, progress=False)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_is_named(tone_run, tone_store, tmp_path):
    run = shutil.copytree(tone_run, tmp_path / "run")
    file = next((run / "state").rglob("student.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"student\.safetensors"):
        tiny_learner().fit(_stream(tone_store), run, resume=True, progress=False)


def test_a_lost_checkpoint_costs_the_unfinished_task_only(tone_run, tone_store, tmp_path):
    run = shutil.copytree(tone_run, tmp_path / "run")
    shutil.rmtree(run / "state")
    shutil.rmtree(run / "tasks" / "01")
    first = (run / "tasks" / "00" / "separator" / "model.safetensors").stat().st_mtime_ns
    records = tiny_learner().fit(_stream(tone_store), run, resume=True, progress=False)
    assert (run / "tasks" / "00" / "separator" / "model.safetensors").stat().st_mtime_ns == first
    assert _equal(_weights(run, 1), _weights(tone_run, 1))
    assert records[1]["exemplars"] == json.loads((tone_run / "tasks" / "01" / "task.json").read_text())["exemplars"]
    assert _rows(run / "logs" / "train.csv") == _rows(tone_run / "logs" / "train.csv")


def test_a_lost_checkpoint_goes_on_from_the_latest_of_several_tasks(tone_store, tmp_path):
    stream = _stream(tone_store, [["ding", "hum"], ["peep"], ["whirr"]])
    tiny_learner(epochs=1).fit(stream, tmp_path / "whole", progress=False)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(run / "state")
    shutil.rmtree(run / "tasks" / "02")
    records = tiny_learner(epochs=1).fit(stream, run, resume=True, progress=False)
    assert set(records[2]["exemplars"]) == {"ding", "hum", "peep"}
    assert _equal(_weights(run, 2), _weights(tmp_path / "whole", 2))


def test_what_a_strategy_keeps_is_stored_with_each_task(tone_store, tmp_path, monkeypatch):
    """A lost checkpoint then costs a strategy with a state of its own no more than another one."""
    from avsep.strategies.finetune import FineTune

    def after_task(self, ctx):
        self.count = getattr(self, "count", 0) + 1
        self.sum = ctx.student.mask_decoder.class_queries.detach().sum() + getattr(self, "sum", 0.0)

    def loss(self, step, original=FineTune.loss):
        terms = original(self, step)
        return {**terms, "kept": terms["separation"] * getattr(self, "sum", 0.0)}

    monkeypatch.setattr(FineTune, "after_task", after_task)
    monkeypatch.setattr(FineTune, "loss", loss)
    monkeypatch.setattr(FineTune, "state_dict", lambda self: dict(vars(self)))
    monkeypatch.setattr(FineTune, "load_state_dict", lambda self, state: vars(self).update(state))
    tasks = [["ding", "hum"], ["peep"], ["whirr"]]
    monkeypatch.setattr(Validation, "score", lambda *_: (0.0, []))

    def fit(out, **how):
        learner = tiny_learner("finetune", "none", epochs=1, steps_per_epoch=2)
        learner.fit(_stream(tone_store, tasks), out, progress=False, **how)
        return learner

    whole, run = tmp_path / "whole", tmp_path / "run"
    fit(whole)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "state")
    shutil.rmtree(run / "tasks" / "02")
    (run / "tasks" / "01" / ".strategy-ab12.safetensors").write_bytes(b"of a kill")
    assert fit(run, resume=True).strategy.count == 3
    assert _equal(_weights(run, 2), _weights(whole, 2))
    assert {p.name for p in (run / "tasks" / "01").iterdir()} == {"separator", "strategy.safetensors", "task.json"}

    kept = run / "tasks" / "01" / "strategy.safetensors"
    shutil.rmtree(run / "state")
    shutil.rmtree(run / "tasks" / "02")
    for message, damage in (("damaged", lambda: kept.write_bytes(kept.read_bytes()[:-1])), ("missing", kept.unlink)):
        damage()
        with pytest.raises(
            CheckpointError, match=rf"is {message}: .*safetensors; remove .*01 to learn that task again"
        ):
            fit(run, resume=True)
    shutil.rmtree(run / "tasks" / "01")
    fit(run, resume=True)
    assert _equal(_weights(run, 2), _weights(whole, 2))


def test_a_strategy_with_a_state_of_its_own_does_not_go_on_without_it(tone_run, tone_store, tmp_path):
    """Runs of the first version kept the state in the checkpoint alone."""
    run = shutil.copytree(tone_run, tmp_path / "run")
    shutil.rmtree(run / "state")
    record = json.loads((run / "tasks" / "01" / "task.json").read_text())
    assert record.pop("strategy_state") is None
    assert not (run / "tasks" / "01" / "strategy.safetensors").exists()
    (run / "tasks" / "01" / "task.json").write_text(json.dumps(record))
    learner = tiny_learner()

    class Keeping(type(learner.strategy)):
        def state_dict(self):
            return {"fisher": torch.ones(1)}

    learner.strategy.__class__ = Keeping
    with pytest.raises(CheckpointError, match="state is gone, and with it what strategy 'contavsep' keeps"):
        learner.fit(_stream(tone_store), run, resume=True, progress=False)


def test_two_writers_of_one_run(tone_store, tmp_path):
    from avsep.files import FolderLock

    with FolderLock(tmp_path / "run"), pytest.raises(RunError, match="being written by another process"):
        tiny_learner().fit(_stream(tone_store), tmp_path / "run", progress=False)


def test_wrong_inputs_fail_before_training(tone_store, tmp_path):
    stream = _stream(tone_store)
    with pytest.raises(ConfigError, match="memory of 5 clips per class is larger than class 'ding', which has 3"):
        tiny_learner(memory={"name": "random_per_class", "params": {"per_class": 5}}).fit(stream, tmp_path / "a")
    with pytest.raises(UnknownNameError, match="no strategy named 'contavsepp': did you mean 'contavsep'"):
        tiny_learner("contavsepp")
    with pytest.raises(ConfigError, match="test mixtures are 65535 samples long"):
        tiny_learner().fit(task_stream(tone_store, TINY_TASKS), tmp_path / "b")
    with pytest.raises(AvsepError, match="no class 'gong'"):
        _stream(tone_store, [["ding", "gong"]])
    with pytest.raises(ConfigError, match="larger than the epoch's 24 mixtures"):
        tiny_learner(batch_size=25).fit(stream, tmp_path / "c", progress=False)
    alone = tiny_run_spec().separator.model_copy(update={"num_classes": 1})
    with pytest.raises(ConfigError, match="the first task, ding, has no mixture"):
        ContinualLearner(avsep.separator.build_from_spec(alone), train=TINY_TRAIN).fit(
            _stream(tone_store, [["ding"], ["hum"]])
        )
    with pytest.raises(RunError, match="nothing to resume"):
        tiny_learner().fit(stream, tmp_path / "d", resume=True)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"thesis\.txt"):
        tiny_learner().fit(stream, tmp_path / "e")
    separator = avsep.build_separator(
        **{k: v for k, v in TINY_SEPARATOR.items() if k != "front_end"}, front_end=TINY_FRONT_END, num_classes=3
    )
    with pytest.raises(ConfigError, match="3 classes but the first task only 2 classes"):
        ContinualLearner(separator, train=TINY_TRAIN).fit(stream)
    needs = avsep.build_separator(
        **{
            **{k: v for k, v in TINY_SEPARATOR.items() if k != "front_end"},
            "object_encoder": ("precomputed", {"features": "clip", "dim": 8}),
        },
        front_end=TINY_FRONT_END,
        num_classes=2,
    )
    with pytest.raises(DataError, match="clip"):
        ContinualLearner(needs, train=TINY_TRAIN).fit(stream)


def test_mixed_precision_analyses_the_very_waveforms(tone_store, tmp_path):
    seen = {}
    for precision in ("32-true", "bf16-mixed"):
        learner = tiny_learner("finetune", "none", precision=precision, epochs=1, steps_per_epoch=1, gradient_clip=10.0)
        loss, steps = learner.strategy.loss, seen.setdefault(precision, [])
        learner.strategy.loss = lambda step, loss=loss, steps=steps: steps.append(step) or loss(step)
        learner.fit(_stream(tone_store), tmp_path / precision, progress=False)
    full, mixed = seen["32-true"][0], seen["bf16-mixed"][0]
    assert torch.equal(mixed.batch.sources, full.batch.sources)  # cast to bfloat16 they would be 50 dB coarser
    assert torch.equal(mixed.spectrograms.ratio, full.spectrograms.ratio)
    assert mixed.output.logits.dtype == torch.bfloat16


def test_the_cross_entropy_of_the_masks_stands_beside_the_loss_where_it_is_asked_for(tone_store, tmp_path):
    weighted = tiny_learner("finetune", "none", epochs=1, steps_per_epoch=1, cross_entropy_weight=0.5)
    weighted.fit(_stream(tone_store), tmp_path / "weighted", progress=False)
    row = _rows(tmp_path / "weighted" / "logs" / "train.csv")[0]
    plain = tiny_learner("finetune", "none", epochs=1, steps_per_epoch=1)
    plain.fit(_stream(tone_store), tmp_path / "plain", progress=False)
    before = _rows(tmp_path / "plain" / "logs" / "train.csv")[0]
    assert row["separation"] == before["separation"]
    assert float(row["loss"]) == pytest.approx(float(row["separation"]) + float(row["cross_entropy"]), rel=1e-5)
    assert float(row["cross_entropy"]) > 0
    assert "cross_entropy" not in (tmp_path / "plain" / "run.yaml").read_text()  # specs of before stay as they are


def test_the_loss_scale_moves_once_a_step_and_survives_a_resume(tone_store, tmp_path, monkeypatch):
    def learner():
        made = tiny_learner("finetune", "none", epochs=1, gradient_clip=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        made.fabric = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
        return made, scaler

    stream = _stream(tone_store)
    whole, scaler = learner()
    whole.fit(stream, tmp_path / "whole", progress=False)
    assert len(loop.make_optimizers(whole.separator, whole.train.optimizers)) == 3
    assert scaler.state_dict()["_growth_tracker"] == 6  # two tasks of three steps

    broken, _ = learner()
    dies_at_step(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(stream, tmp_path / "run", progress=False)
    monkeypatch.undo()
    resumed, scaler = learner()
    resumed.fit(stream, tmp_path / "run", resume=True, progress=False)
    assert scaler.state_dict()["_growth_tracker"] == 6
    assert _equal(_weights(tmp_path / "run", 1), _weights(tmp_path / "whole", 1))


def test_tensorboard_has_every_step_once_also_after_a_resume(tone_store, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step, calls = TaskLoop._step, []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == 6:  # steps 1 and 2 of the second task are done again
            raise KeyboardInterrupt
        return step(self, *args)

    settings = {"epochs": 1, "checkpoint_every": 1000, "loggers": None}
    monkeypatch.setattr(TaskLoop, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        tiny_learner("finetune", "none", **settings).fit(_stream(tone_store), tmp_path / "run", progress=False)
    monkeypatch.undo()
    learner = tiny_learner("finetune", "none", **settings)
    learner.fit(_stream(tone_store), tmp_path / "run", resume=True, progress=False)
    for task in (0, 1):
        events = EventAccumulator(str(tmp_path / "run" / "logs" / "tensorboard" / f"task-{task:02d}")).Reload()
        assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
        assert [e.step for e in events.Scalars("validation_sdr_db")] == [3]
        rows = [r for r in _rows(tmp_path / "run" / "logs" / "train.csv") if r["task"] == str(task)]
        assert [e.value for e in events.Scalars("loss")] == pytest.approx([float(r["loss"]) for r in rows], rel=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_went_missing_is_one_line(workers, tone_store, tmp_path):
    store = shutil.copytree(tone_store, tmp_path / "store")
    stream = _stream(store)
    for audio in (store / "audio").glob("*-train-*.wav"):
        audio.unlink()
    learner = ContinualLearner.from_spec(tiny_run_spec(), accelerator="cpu", workers=workers)
    with pytest.raises(DataError) as caught:
        learner.fit(stream, tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(store / "audio"))
    assert "is missing" in str(caught.value)


@pytest.mark.parametrize("setting", ["tasks=[[ding],[hum]]", "separator.num_classes=9", "store=elsewhere"])
def test_a_setting_that_would_do_nothing_is_refused(setting, tone_store, tmp_path, capsys):
    from avsep.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["train", str(tone_store), "--out", str(tmp_path / "run"), "--set", setting])
    assert stop.value.code == 2
    assert f"--set {setting} would have no effect" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gradients_are_clipped(tone_store, tmp_path):
    """Adam's steps are of the learning rate's size, whatever the gradient's, until its eps of 1e-8 outweighs it."""
    largest = {}
    for name, limit in (("free", None), ("clipped", 1e-10)):
        learner = tiny_learner("finetune", "none", epochs=1, steps_per_epoch=1, gradient_clip=limit)
        before = {k: v.detach().clone() for k, v in learner.separator.audio_encoder.named_parameters()}
        learner.fit(_stream(tone_store, [["ding", "hum"]]), tmp_path / name, progress=False)
        after = dict(learner.separator.audio_encoder.named_parameters())
        largest[name] = max(float((after[k].detach() - before[k]).abs().max()) for k in before)
    rate = TINY_TRAIN["audio"]["lr"]
    assert largest["free"] == pytest.approx(rate, rel=0.05)
    assert largest["clipped"] < 0.05 * rate


def test_each_part_has_the_optimiser_it_was_given():
    roles = {
        "audio": {"name": "adam", "lr": 1e-3, "weight_decay": 0.0},
        "visual": {"name": "adam", "lr": 2e-3, "weight_decay": 0.1},
        "decoder": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.2},
    }
    learner = tiny_learner(**roles)
    made = loop.make_optimizers(learner.separator, learner.train.optimizers)
    parts = learner.separator.parameter_groups()
    for role, wanted in roles.items():
        (group,) = made[role].param_groups
        assert type(made[role]).__name__.lower() == wanted["name"]
        assert (group["lr"], group["weight_decay"]) == (wanted["lr"], wanted["weight_decay"])
        assert {id(p) for p in group["params"]} == {id(p) for p in parts[role]}


def test_fewer_validation_pairs_are_spread_over_each_list(tone_store):
    mixtures = _stream(tone_store).validation.at(1)
    lists = {name: [m for m in mixtures if m.list_name == name] for name in ("task-0", "task-1", "cross")}
    kept = _thinned(mixtures, 2)
    assert kept == [m for name in dict.fromkeys(m.list_name for m in mixtures) for m in _spread(lists[name])]
    assert _thinned(mixtures, None) == mixtures
    assert _thinned(mixtures, 10**6) == mixtures


def test_models_are_selected_on_the_validation_protocol_that_was_asked_for(tone_store, tmp_path, monkeypatch):
    from avsep.evaluation import evaluate
    from avsep.training import validation

    seen = []
    real = evaluate.evaluate_separator
    monkeypatch.setattr(validation, "evaluate_separator", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    stream = task_stream(
        tone_store, TINY_TASKS, validation_protocol="paper", clip_samples=TINY_FRONT_END["clip_samples"]
    )
    spec = tiny_run_spec("finetune", "none", epochs=1, steps_per_epoch=1)
    learner = ContinualLearner.from_spec(spec, accelerator="cpu", loggers=[])  # frames are scored too
    records = learner.fit(stream, tmp_path / "run", progress=False)
    assert RunFolder(tmp_path / "run").spec().validation_protocol == "paper"
    for task, (record, scores) in enumerate(zip(records, seen, strict=True)):
        assert [s.mixture.list_name for s in scores] == [f"paper-{task}"] * len(stream.validation.at(task))
        assert any(s.mixture.degenerate for s in scores)
        everything = np.mean([np.mean([x.sdr for x in s.sources]) for s in scores])
        assert record["validation_sdr_db"] == pytest.approx(everything)
        assert evaluate.mean_sdr(scores) != pytest.approx(everything, abs=1e-6)
    assert _stream(tone_store).validation.name == "fixed"


def _spread(members):
    return [members[0], members[len(members) // 2]]


def test_learning_rate_schedules():
    step = OptimizerSpec(schedule="step", milestones=(31, 51), gamma=0.1)
    found = [learning_rate_factor(step, step=0, epoch=e, total_steps=1) for e in (0, 30, 31, 50, 51, 99)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    total = 40
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=2e-3)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=total, cycle_momentum=False)
    cycle = OptimizerSpec(schedule="one_cycle", lr=2e-3)
    for i in range(total):
        factor = learning_rate_factor(cycle, step=i, epoch=0, total_steps=total)
        assert 2e-3 * factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
        optimizer.step()
        if i + 1 < total:
            oracle.step()


def test_a_first_task_taken_from_another_run_is_the_one_trained(tone_run, tone_store, tmp_path):
    taken, whole = tmp_path / "taken", tone_run
    learner = tiny_learner(("contavsep", {"weight_mask": 0.9}))
    learner.fit(_stream(tone_store), tmp_path / "other", progress=False)
    # the mask distillation does not act in the first task: the run above shares it with the ordinary one
    records = tiny_learner().fit(_stream(tone_store), taken, progress=False, first_task=tmp_path / "other")
    for task in (0, 1):
        assert _equal(_weights(taken, task), _weights(whole, task))
    assert records[0]["exemplars"] == json.loads((whole / "tasks" / "00" / "task.json").read_text())["exemplars"]
    assert {r["task"] for r in _rows(taken / "logs" / "train.csv")} == {"1"}


def test_a_limit_above_the_first_tasks_list_is_none(tone_store, tmp_path):
    """Six clips are three batches of two: a limit of three steps acts in the second task alone."""
    limited = {"epochs": 1, "current_repeats": 1, "steps_per_epoch": 3}
    tiny_learner("finetune", "none", **limited).fit(_stream(tone_store), tmp_path / "other", progress=False)
    learner = tiny_learner("joint", "none", **{**limited, "steps_per_epoch": None})
    records = learner.fit(_stream(tone_store), tmp_path / "run", progress=False, first_task=tmp_path / "other")
    assert [r["steps"] for r in records] == [3, 6]
    learner = tiny_learner("joint", "none", **{**limited, "steps_per_epoch": 2})
    with pytest.raises(ConfigError, match=r"train.steps_per_epoch is 3 there, 2 here"):
        learner.fit(_stream(tone_store), tmp_path / "no", progress=False, first_task=tmp_path / "other")


def test_a_first_task_of_another_kind_is_refused(tone_run, tone_store, tmp_path):
    for learner, key in (
        (tiny_learner("finetune", "none"), "strategy.weight_instance"),
        (tiny_learner(epochs=3), "train.epochs"),
    ):
        with pytest.raises(ConfigError, match=f"first task .* {key} is"):
            learner.fit(_stream(tone_store), tmp_path / "run", progress=False, first_task=tone_run)
        assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="not a run folder"):
        tiny_learner().fit(_stream(tone_store), tmp_path / "run", progress=False, first_task=tmp_path / "nothing")


def test_after_a_task_a_strategy_sees_its_mixtures_the_same_in_every_run(tone_store, tmp_path, monkeypatch):
    seen = []

    def after_task(self, ctx):
        assert not ctx.student.training
        assert (ctx.teacher is None) == (ctx.task.index == 0)
        batches = list(ctx.data.batches(7, batch_size=2))
        assert [len(b.sources) for b in batches] == [2, 2, 2, 1]
        seen.append([clips for b in batches for clips in b.clips])

    monkeypatch.setattr("avsep.strategies.contavsep.ContAVSep.after_task", after_task)
    for name in ("one", "other"):
        tiny_learner(epochs=1).fit(_stream(tone_store), tmp_path / name, progress=False)
    assert seen[:2] == seen[2:]
    assert len(set(seen[0])) > 3  # random, not one mixture again and again
    assert any(c.split("-")[0] in TINY_TASKS[0] for clips in seen[1] for c in clips)  # exemplars take part


def test_a_strategy_that_needs_a_memory_or_another_separator_says_so(tone_store, tmp_path, monkeypatch):
    from avsep.strategies.contavsep import ContAVSep

    monkeypatch.setattr(ContAVSep, "needs_memory", True)
    with pytest.raises(ConfigError, match="'contavsep' learns from exemplars, and the memory is 'none'"):
        tiny_learner("contavsep", "none").fit(_stream(tone_store), tmp_path / "run", progress=False)

    def check(self, separator):
        raise ConfigError(f"cannot use {separator.spec.mask_decoder.name}")

    monkeypatch.setattr(ContAVSep, "check", check)
    with pytest.raises(ConfigError, match="cannot use query_transformer"):
        tiny_learner().fit(_stream(tone_store), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_mask_decoder_brings_terms_of_its_own(tone_store, tmp_path, monkeypatch):
    from avsep.decoders.query_transformer import QueryTransformer

    def auxiliary_losses(self, output, spectrograms, class_ids):
        assert class_ids.shape == output.embedding.shape[:2]
        return {"size": 0.25 * output.embedding.square().mean()}

    monkeypatch.setattr(QueryTransformer, "auxiliary_losses", auxiliary_losses, raising=False)
    tiny_learner("finetune", "none", epochs=1).fit(_stream(tone_store), tmp_path / "run", progress=False)
    rows = _rows(tmp_path / "run" / "logs" / "train.csv")
    assert all(float(r["loss"]) == pytest.approx(float(r["separation"]) + float(r["size"]), rel=1e-6) for r in rows)
    assert all(float(r["size"]) > 0 for r in rows)

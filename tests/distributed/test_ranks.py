"""Several processes that train together: equal to one, in one line when something is wrong. On the CPU, with gloo."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from avsep.distributed.launch import launch
from avsep.distributed.ranks import ALONE, Ranks, synchronise_batch_norm
from avsep.errors import ConfigError
from support import rank_checks
from support.continual_runs import differing, first_task, weights
from support.rank_checks import STEPS, kill, one_step
from support.tones import TINY_SEPARATOR, TINY_TRAIN, stream_of, tiny_learner

SCRIPT = Path(rank_checks.__file__)
LAUNCH = "import sys; from avsep.distributed.launch import launch; sys.exit(launch(2, [sys.executable, *sys.argv[1:]]))"


def started(*arguments, **how):
    """Two processes that run ``rank_checks.py``, as ``avsep train --devices 2`` starts them."""
    command = [sys.executable, "-c", LAUNCH, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, **how)


def write_preset(folder):
    train = {**TINY_TRAIN, "validation_pairs": 1, "epochs": 1}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"summary": "", "separator": TINY_SEPARATOR, "train": train}))
    return folder


@pytest.fixture(scope="module")
def found(tone_store, tmp_path_factory):
    """The folder that two processes have left their results in."""
    folder = write_preset(tmp_path_factory.mktemp("ranks"))
    (folder / "first").symlink_to(first_task(tone_store, "contavsep"))
    kill(tone_store, folder / "killed_by_one", folder / "first")
    result = started("several", folder, tone_store)
    assert (folder / "facts.json").is_file(), result.stderr
    (folder / "end.json").write_text(json.dumps([result.returncode, result.stderr]))
    return folder


@pytest.mark.slow  # minutes of two processes, one after the other
@pytest.mark.parametrize("name", STEPS)
def test_two_ranks_take_the_step_of_one(name, found):
    """Terms, gradients and running statistics; one of the ranks has no source of an old class."""
    one, two = one_step(name), load_file(found / f"{name}.safetensors")
    assert one.keys() == two.keys()
    assert any(k.startswith("gradient") for k in one)
    # the terms themselves, and PLOP's distances, pass through float32
    for key, value in one.items():
        double = value.dtype == torch.float64 and not key.startswith("term")
        limits = {"rtol": 1e-8, "atol": 1e-10} if double else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(two[key], value, **limits, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow  # minutes of two processes, one after the other
def test_mixtures_and_metrics_do_not_depend_on_the_number_of_ranks(found, tone_store):
    facts = json.loads((found / "facts.json").read_text())
    learner, stream = tiny_learner(validation_pairs=3), stream_of(tone_store)
    mixtures = learner._mixtures(stream, stream.tasks[0])
    batches = mixtures.training_batches(mixtures.epoch(0), 1)
    assert facts["drawn"] == [[c for m in batch.clips for c in m] for batch in batches]
    learner = tiny_learner(validation_pairs=3)
    assert facts["sdr"] == pytest.approx(
        learner._validation(stream, stream.tasks[0]).score(learner.separator)[0], abs=1e-5
    )


def _rows(run):
    with open(run / "logs" / "train.csv", newline="") as file:
        return [{k: float(v or 0) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow  # minutes of two processes, one after the other
def test_a_resume_with_as_many_ranks_is_the_same_to_the_last_bit(found):
    assert differing(weights(found / "whole"), weights(found / "killed")) == []
    assert _rows(found / "whole") == _rows(found / "killed")


@pytest.mark.slow  # minutes of two processes, one after the other
def test_a_resume_with_another_number_of_ranks_goes_on_alike(found, tone_store):
    assert len(_rows(found / "killed_for_one")) == 2
    rank_checks.fit(tone_store, found / "killed_for_one", resume=True)
    whole = _rows(found / "whole")
    for run in (found / "killed_for_one", found / "killed_by_one"):
        rows = _rows(run)
        assert [r["step"] for r in rows] == [1, 2, 3]
        for mine, theirs in zip(rows, whole, strict=True):
            # Adam makes of rounding in a gradient near 0 a step of the learning rate's size
            assert mine == pytest.approx(theirs, rel=1e-5 if mine["step"] == 1 else 1e-2)
        records = [json.loads((r / "tasks" / "00" / "task.json").read_text()) for r in (run, found / "whole")]
        assert records[0]["exemplars"] == records[1]["exemplars"] != {}
    # the step after the change is taken from the very weights of the checkpoint
    assert _rows(found / "killed_for_one")[:2] == whole[:2]
    assert _rows(found / "killed_for_one")[2] == pytest.approx(whole[2], rel=1e-5)


@pytest.mark.slow  # minutes of two processes, one after the other
def test_an_error_on_one_rank_is_one_line_and_ends_all(found):
    code, error = json.loads((found / "end.json").read_text())
    assert code == 2
    assert error.strip().splitlines()[-1] == "avsep: clip 'x' is gone"
    assert error.count("avsep:") == 1
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_rank_that_is_killed_is_told_of_and_ends_all(tone_store, tmp_path):
    result = started("broken", write_preset(tmp_path), tone_store, "kill")
    assert result.returncode == 1
    assert "avsep: process 1 of 2 was ended by signal 9 (out of memory?); go on with --resume" in result.stderr
    assert "Traceback" not in result.stderr
    run = tmp_path / "run-kill"
    assert list((run / "state").iterdir())  # of the start; the losses since the last log go with the process
    assert not list(run.glob("tasks/*/task.json"))
    rank_checks.go_on(run)
    assert len(list(run.glob("tasks/*/task.json"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_of_two_ranks_that_is_stopped_goes_on_with_one(number, tone_store, tmp_path):
    run = tmp_path / "run"
    command = f"-m avsep train {tone_store} --preset {write_preset(tmp_path) / 'tiny.yaml'} --out {run} --device cpu"
    process = subprocess.Popen(
        [sys.executable, *command.split(), "--devices", "2", "--set", "train.steps_per_epoch=30"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 200
    while not (run / "logs" / "train.csv").is_file() or len(_rows(run)) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    way_on = f"avsep train --out {run} --resume"
    said = f": go on with: {way_on}" if number == signal.SIGINT else " by SIGTERM; go on with --resume"
    assert [line for line in error.splitlines() if "avsep" in line] == [f"avsep: stopped{said}"]
    assert "Traceback" not in error
    rank_checks.go_on(run)
    assert len(list(run.glob("tasks/*/task.json"))) == 2


def test_what_several_ranks_cannot_do_is_refused(monkeypatch):
    learner = tiny_learner(batch_size=3)
    learner.ranks = Ranks(0, 2)
    with pytest.raises(ConfigError, match=r"3 mixtures cannot be shared equally by 2 processes.*train\.batch_size=4"):
        learner._check_ranks()
    learner = tiny_learner()
    learner.ranks = Ranks(1, 2)
    monkeypatch.setattr(type(learner.strategy), "across_ranks", False)
    with pytest.raises(ConfigError, match="strategy 'contavsep' does not state that its loss holds over several"):
        learner._check_ranks()

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return x

    with pytest.raises(ConfigError, match="Own normalises a batch in its own way"):
        synchronise_batch_norm(nn.Sequential(Own(3)), Ranks(0, 2))


def test_ranks_that_were_started_differently_are_refused(monkeypatch):
    learner = tiny_learner()
    monkeypatch.setattr(Ranks, "all_gather", lambda self, value: [value, {**value, "resume": True}])
    spec = learner.train  # any settings will do

    with pytest.raises(ConfigError, match="process 0 was started with resume = False and process 1 with True"):
        learner._check_agreement(spec, False)


def test_one_process_synchronises_nothing():
    norm, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    synchronise_batch_norm(norm, ALONE)
    assert type(norm) is nn.BatchNorm2d
    assert ALONE.gather(x) is x
    assert ALONE.part(x) is x


def test_synchronising_changes_a_class_and_nothing_else():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    parts, parameters, state = list(module.modules()), list(module.parameters()), module.state_dict()
    x = torch.randn(2, 3, 4, 4)
    for ranks, own in ((Ranks(0, 2), False), (ALONE, True)):
        for _ in range(2):  # the second time changes nothing
            synchronise_batch_norm(module, ranks)
            assert isinstance(module[1], nn.BatchNorm2d)
            assert (type(module[1]) is nn.BatchNorm2d) is own
            assert all(a is b for a, b in zip(module.modules(), parts, strict=True))
            assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
            assert module.state_dict().keys() == state.keys()
        assert torch.equal(module[1].eval()(x), nn.BatchNorm2d(3).eval()(x))


def test_accelerators_normalise_as_pytorch_does():
    """Its own forward pass, here without other ranks."""
    norm, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    synchronise_batch_norm(norm, Ranks(0, 2))
    assert torch.equal(nn.SyncBatchNorm.forward(norm, x), nn.BatchNorm2d(3)(x))
    assert norm.num_batches_tracked == 1


# what a rank does that notes its process id, and no more
_NOTE = "import os, sys, time; rank = os.environ['RANK']; open(f'{sys.argv[1]}/{rank}', 'w').write(str(os.getpid()));"


def _is_gone(pid):
    """Whether a process has ended, also where nobody has taken note of its end yet."""
    try:
        os.kill(pid, 0)
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def _wait_for_notes(folder):
    until = time.monotonic() + 60
    while len([note for note in folder.iterdir() if note.stat().st_size]) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)


def _ends(folder, code):
    """The exit code of two ranks that run ``code``, once both are seen to be gone."""
    started_s = time.monotonic()
    try:
        return launch(2, [sys.executable, "-c", f"{_NOTE}{code}", str(folder)])
    finally:
        assert time.monotonic() - started_s < 60
        assert all(_is_gone(int(note.read_text().split()[0])) for note in folder.iterdir())


def test_ranks_end_together(tmp_path, capfd):
    assert _ends(tmp_path, "print(rank + os.environ['WORLD_SIZE'])") == 0
    said = capfd.readouterr()
    assert sorted(said.out.split()) == ["02", "12"]
    assert said.err == ""
    assert _ends(tmp_path, "sys.exit(3) if rank == '1' else time.sleep(100)") == 3
    assert capfd.readouterr().err == "avsep: process 1 of 2 ended with exit code 3\n"
    assert _ends(tmp_path, "os.kill(os.getpid(), 9) if rank == '1' else time.sleep(100)") == 1
    line = "avsep: process 1 of 2 was ended by signal 9 (out of memory?); go on with --resume\n"
    assert capfd.readouterr().err == line


def test_the_error_of_the_rank_that_failed_first_is_printed(tmp_path, capfd):
    """Rank 0 fails only since rank 1 did, and records that in the same second."""
    code = """
from avsep.distributed.launch import record_error
while not os.path.exists(f"{sys.argv[1]}/1"):
    time.sleep(0.01)
record_error("avsep: clip 'x' is gone" if rank == "1" else "avsep: the other is gone")
sys.exit(2) if rank == "1" else time.sleep(100)
"""
    assert _ends(tmp_path, code) == 2
    assert capfd.readouterr().err == "avsep: clip 'x' is gone\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_all_ranks(number, tmp_path, capfd):
    def send():
        _wait_for_notes(tmp_path)
        time.sleep(1)  # in which the ranks come to what they catch the signal in
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send, daemon=True).start()
    code = """
try:
    time.sleep(100)
except KeyboardInterrupt:  # a rank ends in order
    open(f"{sys.argv[1]}/{rank}", "a").write(" ended")
"""
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            _ends(tmp_path, code)
        assert capfd.readouterr().err == ""
        assert all(note.read_text().endswith(" ended") for note in tmp_path.iterdir())
    else:
        assert _ends(tmp_path, code) == 128 + number
        name = signal.Signals(number).name
        assert capfd.readouterr().err == f"avsep: stopped by {name}; go on with --resume\n"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("file", ["error.json", ""])
def test_a_rank_records_wrong_usage_for_torchrun(file, tmp_path):
    """Which prints it once; where it gave no file, the rank does."""
    path = str(tmp_path / file) if file else ""
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_ERROR_FILE": path}
    command = [sys.executable, "-m", "avsep", "train", "--bogus"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **torchrun})
    assert result.returncode == 2
    recorded = json.loads(Path(path).read_text())["message"]["message"] if file else result.stderr.strip()
    assert recorded.startswith("avsep: No such option: --bogus")
    assert result.stderr == ("" if file else f"{recorded}\n")


@pytest.mark.slow
def test_a_mistake_under_torchrun_stands_in_its_summary(tone_store, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "avsep"]
    train = ["train", str(tone_store), "--out", str(tmp_path / "run"), "--strategy", "ewk"]
    result = subprocess.run([*run, *train], capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert "traceback : avsep: no strategy named 'ewk': did you mean" in result.stderr
    assert 'File "' not in result.stderr.partition("Root Cause")[2]


def test_ranks_do_not_outlive_their_launcher(tmp_path):
    code = f"{_NOTE}from avsep.environment import die_with_parent as f; f(); time.sleep(100)"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, "-c", code, str(tmp_path)])
    _wait_for_notes(tmp_path)
    time.sleep(5)  # in which the ranks begin to watch, on a busy machine too
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 30
    while not all(_is_gone(int(note.read_text().split()[0])) for note in tmp_path.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("devices", ["2", "0"])
def test_wrong_numbers_of_devices(devices, tone_store, tmp_path, capsys, monkeypatch):
    from avsep.cli import main

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit) as stop:
        main(f"train {tone_store} --out {tmp_path / 'run'} --devices {devices} --device cuda".split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert ("--devices 2 and 1 CUDA device(s) here" if devices == "2" else "greater than or equal to 1") in error
    assert not (tmp_path / "run").exists()

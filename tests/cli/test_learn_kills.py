"""``avsep learn`` as a whole process, killed at random moments: the run stays usable, and ends as if undisturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from avsep.data.store import Store
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from avsep.training.extending import kept_exemplars
from support.continual_runs import make_learner
from support.tones import TINY_TASKS, stream_of

KILLS = 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_twenty_kills_change_nothing(tone_store, tmp_path):
    learner = make_learner("contavsep", ("random_per_class", {"per_class": 2, "keep": "clip"}), checkpoint_every=2)
    learner.fit(stream_of(tone_store, TINY_TASKS[:1]), tmp_path / "calm", progress=False)
    shutil.copytree(tmp_path / "calm", tmp_path / "killed")
    settings = ["--set", "train.epochs=12", "--set", "train.steps_per_epoch=6", "--max-loss-db", "inf"]

    def start(run):
        command = [sys.executable, "-m", "avsep", "learn", run, "--from", str(tone_store), "--classes", "peep,whirr"]
        return subprocess.Popen(
            [*command, "--device", "cpu", "--quiet", *settings],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    started = time.monotonic()
    calm = start("calm")
    assert calm.wait(timeout=600) == 0, calm.communicate()
    seconds = time.monotonic() - started
    rng, kills = random.Random(5), 0
    while True:
        process = start("killed")
        # at any moment of a call, those of its beginning and of its end included
        if kills < KILLS:
            time.sleep(rng.uniform(0.1, 1.05) * seconds)
        if kills < KILLS and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            assert load_separator(tmp_path / "killed").classes[:2] == ("ding", "hum")
            RunFolder(tmp_path / "killed").spec()
            continue
        told = process.communicate(timeout=600)
        # killed when all was done, but for the end of the process: there is nothing left to learn
        assert process.returncode == 0 or "knows 'peep' already" in told[1], told
        if kills < KILLS:  # it had ended before: once more from the beginning
            assert _differing(tmp_path) == []
            shutil.rmtree(tmp_path / "killed")
            learner = make_learner(
                "contavsep", ("random_per_class", {"per_class": 2, "keep": "clip"}), checkpoint_every=2
            )
            learner.fit(stream_of(tone_store, TINY_TASKS[:1]), tmp_path / "killed", progress=False)
            continue
        break
    print(f"{kills} kills")
    assert _differing(tmp_path) == []
    assert [len(one.ids) for one in kept_exemplars(tmp_path / "killed")[1]] == [2, 2, 2, 2]
    Store.open(tmp_path / "killed" / "memory", verify=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _differing(folder):
    one, other = (
        load_file(folder / name / "tasks" / "01" / "separator" / "model.safetensors") for name in ("calm", "killed")
    )
    return [name for name in one if not torch.equal(one[name], other[name])]

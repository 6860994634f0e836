"""Run folders: what a finished task's files are held against, and what a run that lost some of them says."""

from __future__ import annotations

import json
import shutil

import pytest

import avsep
from avsep.errors import CheckpointError, RunError
from avsep.evaluation.evaluate import evaluate_run
from avsep.files import sha256_file
from avsep.runs.folder import RunFolder
from avsep.training.learner import ContinualLearner
from support.tones import stream_of, tiny_learner


@pytest.fixture
def run(tone_run, tmp_path):
    return shutil.copytree(tone_run, tmp_path / "run")


def test_the_record_has_the_hash_of_every_file(tone_run):
    for index in (0, 1):
        folder = RunFolder(tone_run).task(index)
        files = {p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file()}
        hashes = folder.record()["files"]
        names = ("model.safetensors", "separator.yaml", "class_means.safetensors")
        assert set(hashes) == files - {"task.json"} == {f"separator/{name}" for name in names}
        assert all(sha256_file(folder.path / name) == value for name, value in hashes.items())


@pytest.mark.parametrize("name", ["model.safetensors", "separator.yaml"])
def test_the_newest_task_without_its_files_is_named_not_passed_over(run, name):
    file = run / "tasks" / "01" / "separator" / name
    file.unlink()
    for use in (avsep.load_separator, evaluate_run):
        with pytest.raises((CheckpointError, RunError), match=f"{name}") as caught:
            use(run)
        assert "01" in str(caught.value)
    assert RunFolder(run).finished_tasks() == [0, 1]
    assert avsep.load_separator(run, task=0).num_classes == 2
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError, match="a file of a finished task is missing"):
        avsep.load_separator(run)


@pytest.mark.parametrize("at", [-1, -1000, 200])
def test_a_flipped_bit_is_found(run, at):
    """In the tensors, and in the spec within the file's header."""
    file = run / "tasks" / "01" / "separator" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    for where in (run, file.parent):
        with pytest.raises(CheckpointError, match="damaged"):
            avsep.load_separator(where)


def test_a_flipped_bit_of_a_separator_that_stands_alone_is_found(run, tmp_path):
    alone = shutil.copytree(run / "tasks" / "01" / "separator", tmp_path / "alone")
    avsep.load_separator(alone)
    file = alone / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="its tensors are not those that were saved"):
        avsep.load_separator(alone)


def test_runs_of_0_1_have_no_hashes_and_load(run):
    record = run / "tasks" / "01" / "task.json"
    found = json.loads(record.read_text())
    del found["files"]
    record.write_text(json.dumps(found))
    avsep.load_separator(run)


@pytest.mark.parametrize("files", [["a"], {"../../run.yaml": "0"}, {"/etc/passwd": "0"}])
def test_a_record_whose_files_are_none_is_damaged(run, files):
    record = run / "tasks" / "01" / "task.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "files": files}))
    with pytest.raises(CheckpointError, match=r"task.json is damaged"):
        avsep.load_separator(run)


def test_the_same_run_gives_the_same_bytes(tone_run, tone_store, tmp_path):
    learner: ContinualLearner = tiny_learner()
    learner.fit(stream_of(tone_store), tmp_path / "again", progress=False)
    for index in (0, 1):
        one, other = (RunFolder(r).task(index).separator for r in (tone_run, tmp_path / "again"))
        for name in ("model.safetensors", "separator.yaml"):
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_kill_before_the_spec_has_its_name_leaves_a_folder_that_can_be_started(tone_run, tone_store, tmp_path):
    """The temporary file of run.yaml is nobody's: neither a run nor somebody else's file."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".staging-0a1b2c3d-4194303-abcd-run.yaml").write_text("half")
    tiny_learner().fit(stream_of(tone_store), out, progress=False)
    assert RunFolder(out).finished_tasks() == [0, 1]

"""Checkpoint files, logs and atomic writing."""

from __future__ import annotations

import csv
import errno
import json

import pytest
import torch

from avsep.errors import AvsepError, CheckpointError, ConfigError, RunError
from avsep.files import FolderLock, atomic_path, read_json, sha256_file, write_json
from avsep.runs.checkpoint import flatten_state, load_latest, load_state, save_latest, save_state, unflatten_state
from avsep.runs.csv_log import CsvLog
from support.tones import dies_at_step, stream_of, tiny_learner


def _state(value=1.0):
    return {
        "student": {"weight": torch.full((2, 3), value), "count": torch.tensor(4)},
        "optimizers": {"audio": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]}},
        "progress": {"task": 1, "none": None, "text": "x"},
    }


def test_nested_state_round_trip():
    tensors, skeleton = flatten_state(_state())
    back = unflatten_state(tensors, json.loads(json.dumps(skeleton)))
    assert back["optimizers"]["audio"]["state"][0]["step"] == 3.0  # integer keys survive JSON
    assert back["optimizers"]["audio"]["param_groups"][0]["betas"] == [0.9, 0.999]
    assert back["progress"] == _state()["progress"]
    assert torch.equal(back["student"]["weight"], _state()["student"]["weight"])
    with pytest.raises(TypeError, match="a set cannot be stored"):
        flatten_state({"a": {1, 2}})
    with pytest.raises(ValueError, match=r"share the path 'a\.b'"):
        flatten_state({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)})


def test_latest_wins_and_older_ones_go(tmp_path):
    assert load_latest(tmp_path / "state") is None
    for value in (1.0, 2.0):
        save_latest(tmp_path / "state", f"step-{int(value)}", _state(value))
    assert load_latest(tmp_path / "state")["student"]["weight"][0, 0] == 2.0
    assert [p.name for p in (tmp_path / "state").iterdir() if p.is_dir()] == ["step-2"]
    save_latest(tmp_path / "state", "step-2", _state(3.0))  # the same step again, after a resume
    assert load_latest(tmp_path / "state")["student"]["weight"][0, 0] == 3.0


def test_a_state_in_one_file_round_trip_and_damage(tmp_path):
    path = tmp_path / "kept" / "state.safetensors"
    digest = save_state(path, _state())
    back = load_state(path, digest, "start again")
    assert torch.equal(back["student"]["weight"], _state()["student"]["weight"])
    assert back["progress"] == _state()["progress"]
    assert load_state(path, save_state(path, {"count": 3}), "start again") == {"count": 3}  # without any tensor
    with pytest.raises(CheckpointError, match=r"is damaged: .*state\.safetensors; start again"):
        load_state(path, digest, "start again")
    with pytest.raises(CheckpointError, match=r"is missing: .*other; start again"):
        load_state(tmp_path / "other", digest, "start again")
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_a_bad_byte_in_a_log_costs_its_row(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b"task,step,loss\n0,1,0.5\n0,2,0.\xff\n0,3,\x00\n0,\xc2\xb2,1\n0,4,0.25\n")
    log = CsvLog(path, (0, 9))
    assert log.found == (0, 4)
    log.write({"task": 0, "step": 5, "loss": 1.0, "more": 2})
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [r["step"] for r in rows if r["loss"]] == ["1", "4", "5"]
    path.write_bytes(b"\xff\xfe\x00")
    CsvLog(path, (0, 9)).write({"task": 0, "step": 1})


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "1",
        "null",
        '{"student": {"$tensor": "none"}}',
        '{"student": {"$dict": [1]}}',
        '{"student": {"$list": 3}}',
        '{"student": {"other": 1}}',
        "{",
        '{"a": ' * 100 + "1" + "}" * 100,
    ],
    ids=str,
)
def test_a_state_of_another_form_is_damage_though_its_hash_is_right(text, tmp_path):
    save_latest(tmp_path / "state", "step-1", _state())
    file = tmp_path / "state" / "step-1" / "state.json"
    file.write_text(text)
    pointer = tmp_path / "state" / "latest.json"
    latest = json.loads(pointer.read_text())
    latest["sha256"]["state.json"] = sha256_file(file)
    pointer.write_text(json.dumps(latest))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: remove .*state to go on"):
        load_latest(tmp_path / "state")


@pytest.mark.parametrize("key", ["progress", "student", "optimizers", "random", "strategy"])
def test_a_state_that_lacks_a_part_is_told_when_a_run_takes_it_up(key, tone_store, tmp_path, monkeypatch):
    dies_at_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        tiny_learner(checkpoint_every=1).fit(stream_of(tone_store), tmp_path / "run", progress=False)
    monkeypatch.undo()
    state = load_latest(tmp_path / "run" / "state")
    save_latest(tmp_path / "run" / "state", "damaged", {k: v for k, v in state.items() if k != key})
    with pytest.raises(CheckpointError, match=r"does not fit (this run: remove it|the separator)"):
        tiny_learner(checkpoint_every=1).fit(stream_of(tone_store), tmp_path / "run", resume=True, progress=False)


def test_a_failed_write_leaves_the_last_one(tmp_path, monkeypatch):
    save_latest(tmp_path / "state", "step-1", _state(1.0))

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("avsep.runs.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_latest(tmp_path / "state", "step-2", _state(2.0))
    monkeypatch.undo()
    assert load_latest(tmp_path / "state")["student"]["weight"][0, 0] == 1.0
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["latest.json", "step-1"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_named(tmp_path, damage):
    save_latest(tmp_path, "step-1", _state())
    file = tmp_path / "step-1" / "student.safetensors"
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[:-3] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"student\.safetensors"):
        load_latest(tmp_path)


def test_log_drops_what_came_after_the_checkpoint_and_cut_lines(tmp_path):
    path = tmp_path / "train.csv"
    log = CsvLog(path, (0, 0))
    for task, step in ((0, 1), (0, 2), (1, 1)):
        log.write({"task": task, "step": step, "loss": 0.5})
    with open(path, "a") as file:
        file.write("1,2")  # killed while writing
    log = CsvLog(path, (1, 0))
    log.write({"task": 1, "step": 1, "loss": 0.25, "mask": 2.0})
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["task"], r["step"], r["loss"], r["mask"]) for r in rows] == [
        ("0", "1", "0.5", ""),
        ("0", "2", "0.5", ""),
        ("1", "1", "0.25", "2"),
    ]


def test_atomic_write_keeps_the_old_file_on_any_error(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})

    def write_half(error):
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(RuntimeError, match="stop"):
        write_half(RuntimeError("stop"))
    with pytest.raises(AvsepError, match=r"no space left to write .*a\.json"):
        write_half(OSError(errno.ENOSPC, "No space left on device"))
    assert read_json(target) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(target, {"a": float("nan")})


def test_truncated_json_and_missing_file(tmp_path):
    (tmp_path / "b.json").write_text('{"a": [1,')
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "c.json")


def test_folder_lock_is_released(tmp_path):
    with FolderLock(tmp_path), pytest.raises(RunError, match="another process"):
        FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        pass

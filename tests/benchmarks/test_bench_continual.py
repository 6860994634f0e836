"""``avsep bench continual``: two tasks with and without memory, on a store that needs no sampled instruments."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import yaml

from avsep.benchmarks import continual
from avsep.benchmarks.continual import COLUMNS, made_up_store, run
from avsep.data.store import Store
from avsep.errors import ConfigError, UnknownNameError
from support.commands import csv_rows
from support.commands import run as avsep
from support.tones import TINY_SEPARATOR, TINY_TRAIN


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "tiny.yaml"
    train = {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 2, "validation_pairs": 1}
    path.write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": train}))
    return str(path)


def test_a_row_a_task_says_what_was_learned_and_kept(tone_store, preset, monkeypatch, tmp_path):
    pytest.importorskip("PIL")  # of the module, for made-up stores
    monkeypatch.setattr(continual, "RUNS", {"contavsep": "random_per_class"})  # both: the suite's dry run
    said, out = [], tmp_path / "continual.csv"
    options = {"seeds": (3,), "settings": ["train.precision=32-true"], "out": out}
    found = run(tone_store, tmp_path / "runs", preset=preset, write=said.append, **options)
    rows = csv_rows(out, COLUMNS)
    assert [(r["strategy"], r["memory"], r["task"]) for r in rows] == [
        ("contavsep", "random_per_class", "0"),
        ("contavsep", "random_per_class", "1"),
    ]
    for row, kept in zip(found, rows, strict=True):
        run_folder = tmp_path / "runs" / f"{row['strategy']}-3"
        evaluation = json.loads((run_folder / "evaluation.json").read_text())
        task, matrix = row["task"], evaluation["matrix"]
        assert row["learned_sdr_db"] == pytest.approx(matrix[task][task], abs=5.1e-4)
        assert row["final_sdr_db"] == pytest.approx(matrix[1][task], abs=5.1e-4)
        assert row["classes"] == ("ding hum", "peep whirr")[task]
        assert np.isfinite(row["mixture_sdr_db"])
        assert (kept["seed"], kept["steps"], kept["precision"]) == ("3", "2", "32-true")
        assert float(kept["run_s"]) > float(kept["train_s"]) > 0
        assert kept["settings"] == "tiny train.precision=32-true"
    assert [line.split(":")[0] for line in said] == ["contavsep, memory random_per_class, seed 3"]


def test_runs_that_are_done_stay_when_the_next_is_stopped(tone_store, preset, monkeypatch, tmp_path):
    pytest.importorskip("PIL")
    number = itertools.count()

    def one(job):
        if next(number) == 3:
            raise KeyboardInterrupt
        row = dict.fromkeys(COLUMNS, 0)
        return [{**row, "strategy": job.strategy, "memory": "", "seed": job.seed, "task": task} for task in (0, 1)]

    monkeypatch.setattr(continual, "_one", one)
    out = tmp_path / "continual.csv"
    with pytest.raises(KeyboardInterrupt):
        run(tone_store, tmp_path / "runs", preset=preset, out=out, write=lambda _: None)
    runs = [(r["seed"], r["strategy"]) for r in csv_rows(out, COLUMNS)]
    assert runs == [("0", "finetune")] * 2 + [("0", "contavsep")] * 2 + [("1", "finetune")] * 2  # a whole seed first


def test_mistakes_are_said_before_anything_is_trained(tone_store, preset, monkeypatch, tmp_path):
    pytest.importorskip("PIL")
    monkeypatch.setattr(continual, "_one", lambda job: pytest.fail("it was trained"))
    other = tmp_path / "notes.csv"
    other.write_text("a,b\n")
    three = made_up_store(tmp_path / "three", clips=(1, 0, 0), clip_s=0.5, classes=("flute", "piano", "drum"))
    for store, changed, error, message in (
        (tone_store, {"out": other}, ConfigError, "not a file of benchmark results"),
        (tone_store, {"settings": ["train.epoch=2"]}, ConfigError, "epoch"),
        (tone_store, {"preset": "aligned_tiny"}, ConfigError, "aligned_tiny"),
        (tone_store, {"jobs": 0}, ConfigError, "jobs = 0"),
        (three, {}, ConfigError, "has 3 classes, and two tasks need two each"),
    ):
        with pytest.raises(error, match=message):
            run(store, tmp_path / "runs", **{"preset": preset, **changed})
    with pytest.raises(UnknownNameError, match="violin"):
        made_up_store(tmp_path / "none", classes=("violin",))


def test_a_made_up_store_has_the_demos_classes_and_depends_on_its_seed_alone(tmp_path):
    pytest.importorskip("PIL")
    sizes = {"clip_s": 2.0}
    stores = {
        "one": made_up_store(tmp_path / "one", clips=(1, 1, 1), **sizes),
        "more": made_up_store(tmp_path / "more", clips=(2, 1, 1), **sizes),
        "other": made_up_store(tmp_path / "other", clips=(1, 1, 1), seed=1, **sizes),
    }
    from avsep.cli.demo_command import CLASSES

    assert stores["one"].classes == CLASSES
    sounds = {name: {c.id: store.read_audio(c) for c in store.clips} for name, store in stores.items()}
    assert len(sounds["one"]) == 18
    for clip, sound in sounds["one"].items():
        assert np.array_equal(sound, sounds["more"][clip])
        assert not np.array_equal(sound, sounds["other"][clip])
        assert 0.02 < np.abs(sound).max() <= 1
    firsts = [sounds["one"][f"{name}-train-000"] for name in CLASSES]
    # a drum's noise is flat where a flute's few partials are peaks
    flatness = {
        name: np.exp(np.log(np.abs(np.fft.rfft(s)) + 1e-9).mean()) / np.abs(np.fft.rfft(s)).mean()
        for name, s in zip(CLASSES, firsts, strict=True)
    }
    assert flatness["drum"] > 3 * flatness["flute"]
    assert made_up_store(tmp_path / "one", clips=(1, 1, 1), **sizes).content_hash == stores["one"].content_hash


def test_the_command_makes_a_store_where_none_is_given(tone_store, monkeypatch, tmp_path, capsys):
    pytest.importorskip("PIL")
    asked = []
    monkeypatch.setattr(continual, "run", lambda store, folder, **options: asked.append((store, options)) or [])
    out = tmp_path / "rows.csv"
    sizes = ("--clips", 1, 0, 1, "--seeds", 3, "--set", "train.epochs=1", "--jobs", 2, "--out", out)
    assert avsep("bench", "continual", *sizes) == 0
    assert avsep("bench", "continual", tone_store, "--out", out) == 0
    (made, options), (given, _) = asked
    assert isinstance(made, Store)
    assert len(made.clips) == 12
    assert (list(options["seeds"]), options["jobs"], options["settings"]) == ([0, 1, 2], 2, ["train.epochs=1"])
    assert given == tone_store
    assert f"results appended to {out}" in capsys.readouterr().out.replace("\n", "")

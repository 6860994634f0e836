"""Presets side by side on a store."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import yaml

from avsep.benchmarks.separators import _interval, evaluations_in, facts_of, measure, report, run_presets
from avsep.data.store import Store
from support.commands import run
from support.tones import TINY_FRONT_END, make_tone_store

pytestmark = pytest.mark.slow  # trains

SMALL = {
    "separator": {
        "audio_encoder": {"name": "unet7", "params": {"base_channels": 4, "mask_channels": 4}},
        "object_encoder": {"name": "frame_cnn", "params": {"dim": 8, "size": 16, "channels": 4, "frames": 1}},
        "motion_encoder": {"name": "motion_cnn", "params": {"dim": 8, "steps": 4, "size": 16, "channels": 4}},
        "mask_decoder": {"name": "aligned_query", "params": {"dim": 8, "bands": 4, "layers": 1}},
        "front_end": {**TINY_FRONT_END, "level_db": -20.0},
    },
    "train": {"batch_size": 2, "epochs": 1, "steps_per_epoch": 2, "mixer": "varied", "current_repeats": 2},
}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("presets") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="module")
def found(tone_store, preset, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return runs, run_presets(tone_store, runs, [str(preset)], [0, 1], dependence=2, progress=False)


def test_every_measure_is_there_with_its_interval(found, preset, tone_store):
    _, evaluations = found
    numbers = {one.measure: one for one in measure(evaluations, without="ding")}
    for name in (
        "different classes",
        "different classes, above the static filter",
        "different classes, without ding",
        "same class",
        "three sources",
        "no pictures",
        "no pictures, change",
        "in a room, change",
        "absent sources, median level",
        "presence, area under the curve",
        "different classes, change with pictures: exchanged",
        "same class, change with pictures: still",
    ):
        assert name in numbers, name
        one = numbers[name]
        assert len(one.seeds) == 2
        assert one.value.low <= one.value.mean <= one.value.high
        assert one.value.mean == pytest.approx(np.mean(one.seeds))
    rows = next(iter(evaluations.values()))["after"][-1]["rows"]
    of_list = [r["sdri"] for r in rows if r["list"] == "same-class" and r["sdri"] is not None]
    assert numbers["same class"].seeds[0] == pytest.approx(np.mean(of_list), abs=1e-5)
    quieter = numbers["20 dB quieter, change"]  # against the same clips: the separator brings all to one level
    assert max(map(abs, quieter.seeds)) < 0.01
    assert abs(numbers["no pictures, change"].value.mean) > 0.01


def test_the_interval_is_of_seeds_and_mixtures():
    value, seeds = _interval(np.array([[0.0, 2.0, 4.0], [2.0, 4.0, 6.0]]))
    assert value.mean == 3.0
    assert seeds == (2.0, 4.0)
    assert value.low == pytest.approx(0.67, abs=0.4)
    assert value.high == pytest.approx(5.33, abs=0.4)
    same, _ = _interval(np.full((3, 5), 1.5))
    assert (same.low, same.mean, same.high) == (1.5, 1.5, 1.5)


def test_the_report_is_written_and_runs_are_found_again(found, preset, tone_store, tmp_path, capsys):
    runs, evaluations = found
    again = evaluations_in(Store.open(tone_store), runs, [str(preset)], [0, 1, 2])
    assert again.keys() == evaluations.keys()
    report(measure(again), tmp_path / "out.csv", facts_of(Store.open(tone_store), [0, 1]))
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert {row["seed_numbers"] for row in rows} == {"0 1"}
    assert any(row["measure"] == "same class" and row["unit"] == "dB" for row in rows)
    command = ["bench", "separators", str(tone_store), "--preset", str(preset), "--seeds", "2", "--runs", str(runs)]
    pytest.importorskip("matplotlib")
    run(*command, "--no-train", "--out", tmp_path / "more.csv", "--plot", tmp_path / "more.png")
    assert (tmp_path / "more.png").stat().st_size > 10_000
    assert "| same class, dB |" in capsys.readouterr().out
    assert (tmp_path / "more.md").read_text().startswith(f"| | {preset.stem} |")
    assert run(*command[:-1], tmp_path / "none", "--no-train", "--out", tmp_path / "x.csv") == 2
    assert "holds no evaluated run" in capsys.readouterr().err


def test_only_the_runs_that_are_asked_for_are_reported(found, preset, tone_store, tmp_path, capsys):
    runs, _ = found
    other = make_tone_store(tmp_path / "other", seconds=1.2)
    command = ["--seeds", "2", "--runs", runs, "--no-train", "--out", tmp_path / "x.csv"]
    longer = preset.parent / "longer.yaml"
    longer.write_text(preset.read_text().replace("clip_samples: 8191", "clip_samples: 16383"))
    (tmp_path / "twin").mkdir()
    twin = shutil.copy(preset, tmp_path / "twin" / preset.name)
    for store, presets, settings, told in (
        (other, [preset], [], "was trained on another store than"),
        (tone_store, [preset], ["--set", "train.epochs=3"], "epochs is 1 there, 3 here"),
        (tone_store, [preset], ["--set", "separator.mask_decoder.params.dim=12"], "dim is 8 there, 12 here"),
        (tone_store, [preset, twin], [], "have one name, small: rename one of the two"),
        (tone_store, [preset, longer], [], "of different lengths in samples are not compared ("),
    ):
        chosen = [word for name in presets for word in ("--preset", name)]
        assert run("bench", "separators", store, *chosen, *settings, *command) == 2
        assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "x.csv").exists()

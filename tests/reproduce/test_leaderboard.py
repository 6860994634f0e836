"""Boards: which cells are run, what is left out and why, the page, sweeps, and packages of others."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from avsep.data.store import Store
from avsep.errors import ConfigError, UnknownNameError
from avsep.registry import MEMORIES, MIXERS, STRATEGIES
from avsep.reproduce.board_page import _papers
from avsep.reproduce.grid import Grid, Row
from avsep.reproduce.leaderboard import (
    BoardPreset,
    board_tuning,
    build_board,
    list_board_presets,
    load_board_preset,
    next_round,
    parse_component,
    sweep_of,
    tables_of,
)
from avsep.reproduce.preset import load_grid_preset
from avsep.reproduce.results import ResultStore
from avsep.reproduce.tables import markdown
from avsep.reproduce.tuning import next_round as next_candidates
from avsep.spec import ComponentRef
from support import commands
from support.made_cells import finished
from support.source_tree import ROOT
from support.tones import TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN

ENTRIES = [
    {"name": "replay", "strategies": ["finetune"]},
    {"name": "lwf", "label": "LwF", "strategies": ["lwf"], "tuning": [{"weight_mask": 0.1}, {"weight_mask": 0.5}]},
    {"name": "none", "strategies": ["finetune"], "memory": "none"},
    {"name": "ewc", "strategies": [{"name": "ewc", "params": {"fisher_samples": 2}}], "memory": "none"},
    {"name": "adapters", "strategies": ["task_adapters"]},
    {"name": "joint", "strategies": ["joint"], "reference": True},
]


@pytest.fixture(scope="module")
def store(tone_store):
    return Store.open(tone_store)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    data = {"tasks": [list(n) for n in TINY_TASKS], "bases": {"iquery": {"preset": str(folder / "tiny.yaml")}}}
    (folder / "grid.yaml").write_text(yaml.safe_dump(data))
    return load_grid_preset(str(folder / "grid.yaml"))


PACKAGE = '''
from avsep.registry import MEMORIES, MIXERS, STRATEGIES
from avsep.strategies import Strategy


@STRATEGIES.register("of_a_package", source="somebody else")
class OfAPackage(Strategy):
    """Fine-tuning by another name."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "their_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_package"
    STRATEGIES._components.pop("of_a_package", None)
    sys.modules.pop("their_package", None)


def board(**changes):
    return BoardPreset.model_validate(
        {"entries": ENTRIES, "control": "replay", "screening": 2, "seeds": 3, "budgets": {"room": 200_000}} | changes
    )


def names(part: Grid | None):
    return sorted((cell.row.name, cell.seed) for cell in part.cells.values()) if part else []


def test_entries_fill_the_budget_with_exemplars(grid, store):
    made = build_board(board(), store, grid=grid)
    rows = {row.name: row for row in made.rows["room"]["iquery"]}
    assert set(rows) == {"replay", "lwf", "none", "joint"}
    assert rows["none"].memory is rows["joint"].memory is None
    assert rows["replay"].memory == rows["lwf"].memory
    assert rows["replay"].memory.params["total"] > 4
    assert rows["replay"].train == {"memory_share": "constant"}
    said = "\n".join(made.notes["room"])
    assert "ewc is left out on iquery: it keeps" in said  # its Fisher information alone is larger
    assert (
        "adapters is left out on iquery: strategy 'task_adapters' trains adapters, and the separator has none" in said
    )
    assert "0.20 MB beside the separator's" in said


def test_the_best_third_the_control_and_the_references_run_all_seeds(grid, store):
    given = board(entries=[*ENTRIES[:3], {"name": "two", "strategies": ["plop"]}, ENTRIES[-1]], share=0.25)
    made = build_board(given, store, grid=grid)
    first, second, third = made.seeds
    assert names(next_round(given, made, {})) == sorted(
        (name, seed) for name in ("replay", "lwf", "none", "two", "joint") for seed in (first, second)
    )
    level = {"replay": 3.0, "lwf": 5.0, "none": 1.0, "two": 4.0, "joint": 9.0}

    def scored(seeds):
        return {
            cell.key: SimpleNamespace(validation=level[cell.row.name])
            for cell in made.cells.values()
            if cell.seed in seeds
        }

    assert names(next_round(given, made, scored((first, second)))) == [
        ("joint", third),
        ("lwf", third),
        ("replay", third),
    ]
    assert next_round(given, made, scored(made.seeds)) is None
    # a row of which a cell cannot be had keeps the others from nothing
    found = scored((first, second))
    gone = [k for k, c in made.cells.items() if c.row.name == "two" and c.seed == second]
    for key in gone:
        del found[key]
    assert names(next_round(given, made, found)) == [("two", second)]
    assert ("lwf", third) in names(next_round(given, made, found, gone))


def test_what_keeps_all_data_is_no_competitor(grid, store):
    given = board(entries=[*ENTRIES[:2], {"name": "joint", "strategies": ["joint"]}])
    made = build_board(given, store, grid=grid)
    assert {row.name for row in made.rows["room"]["iquery"]} == {"replay", "lwf"}
    assert "joint is left out on iquery: it keeps all data, which no budget bounds" in "\n".join(made.notes["room"])


def test_rows_stand_in_the_order_of_what_pairs(grid, store, tmp_path, monkeypatch):
    """A row with fewer seeds is held against the control of the same ones: here its seeds are the easy ones."""
    given = board(entries=ENTRIES[:3], seeds=3, screening=1, share=0.01)
    made = build_board(given, store, grid=grid)
    easy = {seed: 4.0 * (number == 0) for number, seed in enumerate(made.seeds)}
    gained = {"replay": 0.0, "lwf": -0.5, "none": 0.5}
    kept = {k: c for k, c in made.cells.items() if c.row.name == "replay" or c.seed == made.seeds[0]}
    part = replace(made, cells=kept)
    results = finished(part, tmp_path / "cells", lambda cell: 5.0 + easy[cell.seed] + gained[cell.row.name])
    (table,) = tables_of(given, made, results, data_set="tones", preset="tiny", title=lambda name: name)
    lines = table.lines["iquery"]
    assert [line.row for line in lines] == ["none", "replay", "lwf"]
    assert lines[2].ours.values["sdr"].mean > lines[1].ours.values["sdr"].mean  # which says nothing
    assert not any("not run" in line for line in markdown(table).splitlines())
    assert "All rows have 1 seeds; the best 1% of them on validation pairs" in markdown(table)
    # before the control has all its seeds the table says what is missing
    kept = {k: c for k, c in kept.items() if c.row.name != "replay" or c.seed != made.seeds[-1]}
    results = finished(replace(made, cells=kept), tmp_path / "fewer", lambda cell: 5.0)
    (table,) = tables_of(given, made, results, data_set="tones", preset="tiny", title=lambda name: name)
    assert "All rows have" not in markdown(table)
    assert f"Missing: iQuery, replay, seed {made.seeds[-1]}: not run" in markdown(table)


def test_a_changed_package_is_another_cell(grid, store, package, tmp_path, monkeypatch):
    importlib.import_module(package)
    entries = [ENTRIES[0], {"name": "theirs", "strategies": ["of_a_package"]}]

    def keys():
        made = build_board(board(entries=entries, budgets={}), store, grid=grid)
        return {cell.row.name: cell.key for cell in made.cells.values() if cell.seed == made.seeds[0]}

    before = keys()
    (tmp_path / "their_package.py").write_text(PACKAGE + "# changed\n")
    after = keys()
    assert before["replay"] == after["replay"]
    assert before["theirs"] != after["theirs"]


def test_without_budgets_every_entry_has_the_boards_memory(grid, store):
    memory = {"name": "random_per_class", "params": {"per_class": 2}}
    made = build_board(board(budgets={}, memory=memory), store, grid=grid)
    rows = {row.name: row for row in made.rows["board"]["iquery"]}
    assert set(rows) == {"replay", "lwf", "none", "ewc", "joint"}
    assert rows["replay"].memory == ComponentRef(name="random_per_class", params={"per_class": 2})
    assert rows["replay"].train == {}


def test_settings_of_a_base_are_those_that_were_chosen(grid, store):
    chosen = {"iquery": {"lwf": {"weight_mask": 0.5}}}
    made = build_board(board(settings=chosen), store, grid=grid, entries=["lwf"])
    assert {row.name: row.params for row in made.rows["room"]["iquery"]} == {"replay": {}, "lwf": {"weight_mask": 0.5}}
    tuning = board_tuning(board(), store, grid=grid)
    assert [row.name for row in tuning.rows["tune"]["iquery"]] == ["lwf:weight_mask=0.1", "lwf:weight_mask=0.5"]
    assert all(not cell.tested and cell.spec.memory.name == "class_balanced" for cell in tuning.cells.values())
    assert {len(cell.spec.tasks) for cell in tuning.cells.values()} == {2}
    with pytest.raises(ConfigError, match="no entry of the board has 'tuning'"):
        board_tuning(board(entries=ENTRIES[:1]), store, grid=grid)


def test_a_slip_in_an_entry_ends_the_command_and_what_does_not_fit_is_told(grid, store):
    memory = {"name": "class_balanced", "params": {"keeps": "clip"}}
    with pytest.raises(ConfigError, match=r"entry 'two' of the board: .*'keeps'"):
        build_board(
            board(entries=[*ENTRIES, {"name": "two", "strategies": ["lwf"], "memory": memory}]), store, grid=grid
        )
    tuning = board_tuning(board(), store, grid=grid)
    assert any(note.startswith("ewc is left out on iquery: it keeps") for note in tuning.notes["tune"])


def test_a_board_may_be_tuned_on_more_tasks_and_seeds(grid, store, tmp_path):
    single = grid.model_copy(update={"tasks": tuple((name,) for task in TINY_TASKS for name in task)})
    given = board(tuning_tasks=3, tuning_seeds=5)
    tuning = board_tuning(given, store, grid=single)
    assert {len(cell.spec.tasks) for cell in tuning.cells.values()} == {3}
    part = next_candidates(tuning, ResultStore(tmp_path), (), given.tuning_seeds)
    assert len(part.cells) == 2 * 5
    assert len(next_candidates(tuning, ResultStore(tmp_path)).cells) == 2 * 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"control": "relpay"}, UnknownNameError, "no entry named 'relpay' to compare with: did you mean 'replay'"),
        ({"entries": ENTRIES[:1] * 2}, ConfigError, "two entries are called 'replay'"),
        ({"settings": {"iqery": {}}}, UnknownNameError, "settings of 'iqery', which is no base of the board: did you"),
        ({"settings": {"iquery": {"lfw": {}}}}, UnknownNameError, "settings of 'lfw', which is no entry: did you mean"),
        ({"budgets": {"small": 10}, "control": "ewc"}, ConfigError, "the control 'ewc' cannot be run: ewc is left out"),
    ],
)
def test_mistakes_in_a_board(changes, error, message, grid, store):
    with pytest.raises(error, match=message):
        build_board(board(**changes), store, grid=grid)


def test_hypotheses_of_a_board_are_said_with_what_was_found(grid, store, tmp_path):
    predicted = {"row": "lwf", "against": "replay", "predicted": "0", "why": "no reason"}
    given = board(seeds=2, hypotheses=[{"name": "A", **predicted}, {"name": "B", **predicted, "row": "none"}])
    made = build_board(given, store, grid=grid)
    level = {"lwf": 6.0, "none": 5.0}
    results = finished(made, tmp_path / "cells", lambda cell: level.get(cell.row.name, 5.0))
    (table,) = tables_of(given, made, results, data_set="tones", preset="tiny", title=str)
    said = [note for note in table.notes if "predicted" in note]
    assert said[0].startswith("iQuery, A, lwf against replay: predicted 0 (no reason); found +1.00 dB [+1.00, +1.00]")
    assert said[0].endswith("2 seeds: not as predicted.")
    assert said[1].endswith("2 seeds: not told from 0.")
    wrong = {"name": "C", **predicted, "against": "replai"}
    with pytest.raises(UnknownNameError, match="hypothesis 'C' is of 'replai', which is no entry: did you mean"):
        build_board(board(hypotheses=[wrong]), store, grid=grid)


def test_differences_are_to_the_control_that_is_asked_for(grid, store, tone_store, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid.model_dump(mode="json", exclude_defaults=True)))
    data = {
        "entries": ENTRIES[:3],
        "control": "replay",
        "grid": str(tmp_path / "grid.yaml"),
        "screening": 2,
        "seeds": 2,
    }
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(data))
    made = build_board(load_board_preset(str(tmp_path / "board.yaml")), store, grid=grid)
    level = {"lwf": 6.0, "none": 5.5, "replay": 5.0}
    finished(made, tmp_path / "cells", lambda cell: level[cell.row.name])
    options = ["leaderboard", "--preset", tmp_path / "board.yaml", "--dataset", tone_store, "--device", "cpu"]
    options += ["--finished", "--results", tmp_path / "cells"]
    assert commands.run(*options, "--out", tmp_path / "usual") == 0
    assert commands.run(*options, "--control", "lwf", "--out", tmp_path / "other") == 0
    usual, other = ((tmp_path / name / "leaderboard.md").read_text() for name in ("usual", "other"))
    assert "SDR less that of replay" in usual
    assert "SDR less that of LwF" in other
    assert "| LwF | crops, class balanced | 0.00 | 6.00 [6.00, 6.00] | +1.00 [1.00, 1.00]** |" in usual
    assert "| replay | crops, class balanced | 0.00 | 5.00 [5.00, 5.00] | -1.00 [-1.00, -1.00]** |" in other
    assert "told from LwF" in (tmp_path / "other" / "leaderboard.html").read_text()
    assert "no differences" not in usual + other
    for file in (tmp_path / "cells").glob("*-lwf-*.json"):
        file.unlink()
    assert commands.run(*options, "--control", "lwf", "--out", tmp_path / "none") == 0
    said = (tmp_path / "none" / "leaderboard.md").read_text()
    assert "iQuery: no differences, as no cell of the control, lwf, is there.\n" in said
    assert "SDR less that of" not in said


def test_hypotheses_stand_in_the_docs_as_they_are_tested():
    page = (ROOT / "docs" / "hypotheses.md").read_text(encoding="utf-8")
    found = [one for name in list_board_presets() for one in load_board_preset(name).hypotheses]
    assert len(found) == 18
    for one in found:
        line = next(x for x in page.splitlines() if x.startswith(f"| {one.name} |"))
        assert line.endswith(f"| {one.predicted} | {one.why} |")


def test_the_presets_are_sound():
    for name in list_board_presets():
        preset = load_board_preset(name)
        assert len(preset.entries) >= (25 if name == "small" else 1)
        for entry in preset.entries:
            for number, ref in enumerate(entry.strategies):
                for settings in (*(entry.tuning if number == 0 else ()), {}):
                    STRATEGIES.create(ref.name, {**ref.params, **settings})
    with pytest.raises(UnknownNameError, match="no preset of avsep leaderboard named 'smal': did you mean 'small'"):
        load_board_preset("smal")


def test_a_row_names_the_papers_of_what_it_adds_to_the_control():
    def papers(strategy="finetune", *, memory="class_balanced", **more):
        return _papers(Row("r", "r", strategy, memory=ComponentRef(name=memory), **more), "class_balanced")

    replay, confusable = papers(), MIXERS.get("confusable").source
    assert replay == STRATEGIES.get("finetune").source
    assert papers(train={"mixer": {"name": "confusable"}}) == confusable
    assert papers(memory="byte_budget") == MEMORIES.get("byte_budget").source
    both = papers("lwf", beside=(ComponentRef(name="lwf"),), train={"mixer": {"name": "confusable"}})
    assert both == f"{STRATEGIES.get('lwf').source}; {confusable}"


# ---------------------------------------------------------------------- sweeps


def test_a_component_is_a_name_with_settings():
    assert parse_component("lwf") == ComponentRef(name="lwf")
    found = parse_component("lwf(weight_mask=0.1, variant=grown_teacher)")
    assert found == ComponentRef(name="lwf", params={"weight_mask": 0.1, "variant": "grown_teacher"})
    assert parse_component("x(a=[1, 2], b={c: 3, d: 4})").params == {"a": [1, 2], "b": {"c": 3, "d": 4}}
    for text in ("lwf(", "lwf)", "", "lwf(0.1)"):
        with pytest.raises(ConfigError):
            parse_component(text)


def test_a_sweep_is_every_method_with_every_memory():
    methods = ["finetune", "lwf(weight_mask=0.1)+weight_average(every=1)", "agem", "joint"]
    made, grid = sweep_of(methods, ["none", "random_per_class(per_class=2)"], preset="iquery_small", tasks=3, updates=8)
    kept = "random_per_class(per_class=2)"
    both = "lwf(weight_mask=0.1)+weight_average(every=1)"
    assert [entry.name for entry in made.entries] == [
        "finetune, none",
        f"{both}, none",
        "joint",
        f"finetune, {kept}",
        f"{both}, {kept}",
        f"agem, {kept}",
    ]
    assert [ref.name for ref in made.entries[1].strategies] == ["lwf", "weight_average"]
    assert (made.control, grid.tasks, grid.updates, grid.orders) == ("finetune, none", 3, 8, "rotated")
    with pytest.raises(ConfigError, match="the first method, 'agem', is what the others are held against and needs a"):
        sweep_of(["agem", "finetune"], ["none"], preset="iquery_small")
    with pytest.raises(UnknownNameError, match="did you mean 'lwf'"):
        sweep_of(["lfw"], ["none"], preset="iquery_small")


@pytest.mark.slow
def test_a_sweep_from_store_to_page(tone_store, tmp_path, package, monkeypatch, capsys):
    """Two seeds with their own orders, a strategy of another package, in processes of their own; then resumed."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    train = {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 2, "validation_pairs": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": train}))
    options = ["sweep", tone_store, "--preset", tmp_path / "tiny.yaml", "--tasks", 2, "--device", "cpu"]
    options += ["--method", "finetune", "--method", "of_a_package", "--with", package]
    out = tmp_path / "out"
    assert commands.run(*options, "--seeds", 1, "--out", out) == 0
    capsys.readouterr()
    assert commands.run(*options, "--seeds", 2, "--out", out, "--resume") == 0
    said = capsys.readouterr().out
    assert "sweep: 2 rows, 2 cells to be run now" in said
    page = (out / "sweep.md").read_text()
    (out / "sweep.md").unlink()
    assert commands.run(*options, "--seeds", 5, "--out", out, "--finished") == 0  # of five seeds two
    assert "sweep: 2 rows, 4 of 10 cells finished" in capsys.readouterr().out
    assert (out / "sweep.md").read_text() == page.replace(
        "\nCommit ", "\ntiny: 2 of 5 seeds, no cell of the others is finished.\nCommit "
    )
    assert commands.run(*options, "--out", tmp_path / "new", "--finished") == 2
    assert "no grid was begun in" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    assert len(cells) == 4
    assert len({json.dumps(cell["identity"]["spec"]["tasks"]) for cell in cells}) == 2
    page = (out / "sweep.html").read_text()
    rows = json.loads(re.search(r"const rows = (.*);\n", page)[1])
    assert {row["method"] for row in rows} == {"finetune", "of_a_package"}
    theirs = next(row for row in rows if row["name"] == "of_a_package")
    assert (theirs["source"], theirs["seeds"], theirs["full"]) == ("somebody else", 2, True)
    assert theirs["difference"] == pytest.approx(0, abs=1e-6)  # it is fine-tuning
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "of_a_package" in (out / "sweep.md").read_text()
    assert (out / "sweep.csv").is_file()
    assert (out / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lfw"], "did you mean 'lwf'"),
        (["--method", "lwf", "--orders", "rotatd"], "no class orders named 'rotatd': did you mean 'rotated'"),
        (["--method", "lwf", "--set", "memory.name=none"], "--set memory: a sweep sets separator.... and train...."),
        (["--method", "lwf", "--with", "no_such_package"], "--with no_such_package: it cannot be imported"),
        (["--method", "lwf", "--with", "json"], "--with json: it registers no strategy"),
    ],
)
def test_mistakes_are_one_line(options, message, tone_store, tmp_path, capsys):
    assert commands.run("sweep", tone_store, "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_board_is_planned_and_tuned_as_it_is_asked_for(grid, tone_store, tmp_path, capsys):
    """With the entries and the number of seeds that are given; and what does not go together is refused."""
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid.model_dump(mode="json", exclude_defaults=True)))
    data = {"entries": ENTRIES, "control": "replay", "grid": str(tmp_path / "grid.yaml"), "screening": 2, "seeds": 3}
    data |= {"budgets": {"small": 2_000_000, "one separator": "model"}}
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(data))
    options = ["leaderboard", "--preset", tmp_path / "board.yaml", "--dataset", tone_store, "--device", "cpu", "--plan"]
    assert commands.run(*options, "--entry", "lwf", "--budget", "small", "--out", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "leaderboard: 2 rows, 4 cells to be run now, and more seeds of the best then" in said
    assert "steps; no cell is finished yet to tell the time by" in said
    assert commands.run(*options, "--tune", "--seeds", 1, "--out", tmp_path / "b") == 0
    assert "leaderboard: 2 candidates, 2 cells to be run now" in capsys.readouterr().out
    assert commands.run(*options, "--finished", "--out", tmp_path / "b") == 2
    assert "leave out --plan, or --finished" in capsys.readouterr().err
    assert commands.run(*options, "--tune", "--screening", 3, "--out", tmp_path / "c") == 2
    assert "--screening 3 is of the board, and --tune makes none" in capsys.readouterr().err
    made = ["synth" if option == tone_store else option for option in options]
    assert commands.run(*made, "--entry", "lfw", "--out", tmp_path / "d") == 2  # before anything is made
    assert "no entry named 'lfw': did you mean 'lwf'" in capsys.readouterr().err
    assert commands.run(*options, "--budget", "smal", "--out", tmp_path / "d") == 2
    assert "no budget named 'smal': did you mean 'small'" in capsys.readouterr().err
    assert commands.run(*made, "--control", "lfw", "--out", tmp_path / "d") == 2
    assert "no entry named 'lfw' to compare with: did you mean 'lwf'" in capsys.readouterr().err
    assert commands.run(*options, "--tune", "--control", "lwf", "--out", tmp_path / "d") == 2
    assert "--control lwf is of the board, and --tune makes none" in capsys.readouterr().err
    assert (
        commands.run(*options, "--entry", "ewc", "--control", "lwf", "--budget", "small", "--out", tmp_path / "d") == 0
    )
    said = capsys.readouterr().out
    assert "leaderboard: 2 rows, 4 cells to be run now" in said
    assert "iquery-lwf-s1234: about 6 steps" in said
    assert "replay" not in said
    assert not [name for name in "abcd" if (tmp_path / name).exists()]

"""``--json``, ``--quiet`` and ``--verbose``: every command has them, and means the same by them."""

from __future__ import annotations

import json
import shutil

import pytest
import soundfile
import typer.main
import yaml

from avsep.cli.app import build_app
from avsep.data.store import Store
from avsep.data.synth.synthesis import find_banks
from support.commands import run
from support.tones import RATE, TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN

OPTIONS = {"json": ["--json"], "quiet": ["--quiet", "-q"], "verbose": ["--verbose", "-v"]}
WITHOUT = {"export schema": "what it prints is one JSON object already, and nothing else"}


def leaves(command, words=()):
    """All commands that do something, with the words by which they are called."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from leaves(inner, (*words, name))
    else:
        yield " ".join(words), command


COMMANDS = dict(leaves(typer.main.get_command(build_app())))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_three_options(name):
    found = {p.name: list(p.opts) for p in COMMANDS[name].params if p.name in OPTIONS}
    assert found == ({} if name in WITHOUT else OPTIONS)


def test_the_exceptions_are_commands():
    assert COMMANDS.keys() >= WITHOUT.keys()
    assert len(COMMANDS) > 40


# ---------------------------------------------------------------------- what is printed


def strict(text):
    """One JSON object and nothing else, of numbers that are numbers."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def desk(tone_store, tone_run, tmp_path, monkeypatch):
    """A folder to work in, with presets, a store and a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    grid = {"tasks": TINY_TASKS, "bases": {"iquery": {"preset": "tiny.yaml"}}, "train": {"epochs": 1}}
    grid["tuning"] = {"lwf": {"weight_mask": [0.1, 3.0]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    entries = [{"name": "replay", "strategies": ["finetune"]}, {"name": "lwf", "strategies": ["lwf"]}]
    board = {"entries": entries, "control": "replay", "grid": "grid.yaml", "screening": 1, "seeds": 2}
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(board))
    (tmp_path / "store").symlink_to(tone_store)
    (tmp_path / "run").symlink_to(tone_run)
    return tmp_path


def recordings(desk):
    store = Store.open("store")
    for name in ("ding", "hum"):
        (desk / "recordings" / name).mkdir(parents=True)
        for number, clip in enumerate(store.select(classes=[name])[:3]):
            soundfile.write(desk / "recordings" / name / f"{number}.wav", store.read_audio(clip), RATE)


GRID = ("--preset", "grid.yaml", "--dataset", "store", "--device", "cpu", "--plan", "--out", "cells")
# what is called -> its "format", and keys that scripts look for
QUICK = {
    "data info store": "avsep-data-info store clips classes seconds bytes rate_hz content_hash frames origin",
    "data check store": "avsep-data-check classes features availability problems silent",
    "data shard store --out shards": "avsep-data-shard store shards folders content_hash",
    "data sheet store --out sheet.png": "avsep-data-sheet file",
    "data features store --clips ding-test-0": "avsep-data-features file clips",
    "data mix store --clips ding-test-0,hum-test-0 --out duet": "avsep-data-mix mixture features references",
    "data prepare folder --root recordings --out made --sounds --object none --motion none --detector none": (
        "avsep-data-prepare store videos counts skipped lacking unlisted notes content_hash"
    ),
    "data banks": "avsep-data-banks banks",
    "data synth made --classes flute --clips 1,1,1 --clip-s 2 --workers 1": "avsep-data-synth store content_hash",
    "memory run": "avsep-memory run store carried classes all forgotten page",
    "budget run --align": "avsep-budget runs aligned",
    "sweep store --method finetune --method lwf --tasks 2 --preset tiny.yaml --plan": "avsep-sweep out rows plan",
    "leaderboard --preset board.yaml --dataset store --device cpu --plan": "avsep-leaderboard out rows plan",
    f"reproduce table1 {' '.join(GRID)}": "avsep-reproduce out data_set tables cells plan",
    f"reproduce table1 {' '.join(GRID)} --power 0.5": "avsep-reproduce power",
    f"reproduce tune {' '.join(GRID)}": "avsep-reproduce plan",
    "bench metrics --batch 1 --length 4096 --repeats 1": "avsep-bench-metrics rows out plot",
    "bench kernels --op mask_head --sizes tiny --no-compile --check-only": "avsep-bench-kernels rows out",
    "export verify bundle": "avsep-export-verify bundle files ran_on graphs",
    "export info bundle": "avsep-export-info path classes graphs manifest",
    "export build bundle --target onnxruntime": "avsep-export-build engines site ran",
    "models": "avsep-models models",
}
NEEDS = {"matplotlib": ("sweep", "leaderboard", "reproduce"), "mir_eval": ("bench metrics",), "PIL": ("data sheet",)}


@pytest.mark.parametrize("called", QUICK)
def test_json_is_all_of_it_and_quiet_is_nothing(called, desk, request, capfd):
    for package, names in NEEDS.items():
        if called.startswith(names):
            pytest.importorskip(package)
    if called.startswith(("data banks", "data synth")) and not find_banks():
        pytest.skip("no SoundFont bank here")
    if "bundle" in called.split():
        (desk / "bundle").symlink_to(request.getfixturevalue("tiny_bundle"))
    if "recordings" in called.split():
        recordings(desk)
    capfd.readouterr()

    assert run(*called.split(), "--json") == 0
    shown = capfd.readouterr()
    found = strict(shown.out)
    name, *keys = QUICK[called].split()
    assert found["format"] == name
    assert set(keys) <= found.keys()

    for made in ("made", "shards", "duet"):
        shutil.rmtree(desk / made, ignore_errors=True)
    assert run(*called.split(), "--quiet") == 0
    assert "".join(capfd.readouterr()) == ""


WRONG = (
    "data info nowhere",
    "data check nowhere",
    "data prepare folder --root nowhere --out made",
    "learn nowhere --from store --classes peep",
    "memory nowhere",
    "budget nowhere",
    "export nowhere --out bundle",
    "export verify nowhere",
    "sweep nowhere --method finetune",
    "reproduce tabel1",
    "leaderboard --preset bord",
    "bench separators nowhere --no-train",
    "demo --out .",
    "app nowhere --no-open",
)


@pytest.mark.parametrize("called", WRONG)
def test_a_mistake_is_one_line_with_json_too(called, desk, capfd):
    assert run(*called.split(), "--json") == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("avsep: ")
    assert run(*called.split(), "--quiet", "--verbose") == 2
    assert "--quiet and --verbose ask for opposite things" in capfd.readouterr().err


def test_verbose_says_where_a_mistake_was_found(desk, capfd):
    assert run("budget", "nowhere", "--verbose") == 2
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith("avsep: ")
    assert run("budget", "nowhere") == 2
    assert "Traceback" not in capfd.readouterr().err


def test_the_numbers_of_a_memory_and_of_a_budget(desk, capfd):
    from avsep.evaluation.budget import budget_of
    from avsep.training.extending import kept_exemplars

    opened, kept = kept_exemplars("run")
    assert run("memory", "run", "--json") == 0
    found = strict(capfd.readouterr().out)
    assert (found["store"], found["carried"]) == (str(opened.path), False)
    assert [(c["class"], c["count"], c["bytes"], c["ids"]) for c in found["classes"]] == [
        (one.class_name, one.count, one.bytes, list(one.ids)) for one in kept
    ]
    assert found["all"]["count"] == sum(one.count for one in kept) > 0

    budget = budget_of("run")
    assert run("budget", "run", "--align", "--to", budget.total, "--json") == 0
    found = strict(capfd.readouterr().out)
    (counted,) = found["runs"]
    assert (counted["total"], counted["model"], counted["task"]) == (budget.total, budget.model, budget.task)
    assert found["aligned"]["budget"] == budget.total
    assert found["aligned"]["runs"][0]["spare"] >= 0

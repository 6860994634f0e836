"""The README's code runs."""

from __future__ import annotations

import csv
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.tones import TINY_FRONT_END, TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN

README = Path(__file__).parents[1] / "README.md"


def _text():
    if not README.is_file():
        pytest.skip("the README is not beside the tests")
    return README.read_text(encoding="utf-8")


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", _text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("page", "tables"), [("README.md", ["table1"]), ("docs/reproduce.md", ["table2", "table3", "budget", "figure3"])]
)
def test_tables_are_those_that_were_measured(page, tables):
    text = (README.parent / page).read_text(encoding="utf-8") if _text() else ""
    for name in tables:
        file = README.parent / f"benchmarks/results/reproduce/{name}.md"
        measured = file.read_text(encoding="utf-8") if file.is_file() else "Not run under protocol version 2 yet.\n"
        assert f"<!-- reproduce:{name} -->\n{measured}<!-- /reproduce:{name} -->" in text


def test_composing():
    scope = {}
    exec(_blocks("python")[0], scope)
    assert scope["separator"].num_classes == 5


def test_training(tone_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    code = next(b for b in _blocks("python") if "learner.fit" in b)
    for text, stand_in in (
        (
            'task_stream("stores/full")',
            f"task_stream({str(tone_store)!r}, clip_samples={TINY_FRONT_END['clip_samples']})",
        ),
        ('"iquery_small"', '"tiny.yaml"'),
    ):
        assert text in code
        code = code.replace(text, stand_in)
    exec(code, {})
    assert Path("runs/mine/tasks/01/task.json").is_file()


def test_adding_a_method(tone_store, tmp_path):
    """The section's code as an installed package, its commands on a tiny store."""
    code = next(b for b in _blocks("python") if "STRATEGIES.register" in b)
    module = tmp_path / re.fullmatch(r"# (\S+)", code.splitlines()[0]).group(1)
    module.parent.mkdir()
    module.write_text(code)
    (module.parent / "__init__.py").touch()
    toml = next(b for b in _blocks("toml") if "entry-points" in b)
    group, entry = re.search(r'\[project\.entry-points\."(.+)"\]\n(.+)', toml).groups()
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    train = {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 2, "validation_pairs": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": train}))

    commands = next(b for b in _blocks("bash") if "--strategy anchored" in b).splitlines()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "200",
    }
    printed = []
    for command in commands:
        arguments = shlex.split(command.replace("stores/full", shlex.quote(str(tone_store))))
        assert arguments[0] == "avsep"
        if arguments[1] == "train":
            tasks = ";".join(",".join(t) for t in TINY_TASKS)
            arguments += ["--preset", "tiny.yaml", "--memory", "none", "--tasks", tasks, "--device", "cpu"]
        result = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    listed, _ = printed
    assert re.search(r"anchored +Fine-tuning with an L2 pull .* weight=0\.001 +ours \[package my_package\]", listed)
    with open(tmp_path / "runs" / "anchored" / "logs" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["anchor"]) for row in rows] == [False] * 2 + [True] * 2
    assert float(rows[-1]["anchor"]) > 0
    assert yaml.safe_load((tmp_path / "runs" / "anchored" / "run.yaml").read_text())["strategy"] == {
        "name": "anchored",
        "params": {"weight": 0.01},
    }


def test_the_hooks_named_exist():
    from avsep.strategies import Strategy

    text = _text()
    table = text[text.index("| hook | for |") : text.index("## Fidelity")]
    named = re.findall(
        r"`(\w+)(?:\(([^)]*)\))?`", "".join(row.split("|")[1] for row in table.splitlines()[2:] if row.startswith("|"))
    )
    assert len(named) > 9
    for name, arguments in named:
        found = getattr(Strategy, name)
        if callable(found):
            assert ", ".join(list(inspect.signature(found).parameters)[1:]) == arguments
    missing = {n for n in vars(Strategy) if not n.startswith("_")} - {name for name, _ in named}
    assert missing == set()


def test_every_command_named_exists():
    from avsep.cli.app import COMMANDS

    text = "\n".join(_blocks("bash"))
    named = set(re.findall(r"^avsep ([a-z]+)", text, flags=re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)

"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import TINY_FRONT_END, TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN, tiny_run_spec

from avsep.data.tasks import task_stream
from avsep.learner import ContinualLearner
from avsep.registry import STRATEGIES

README = Path(__file__).parents[1] / "README.md"


def _blocks(language):
    if not README.is_file():
        pytest.skip("the README is not beside the tests")
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


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


def test_adding_a_component(tone_store, tmp_path):
    code = next(b for b in _blocks("python") if "STRATEGIES.register" in b)
    try:
        exec(code, {"__name__": "my_package.components"})
        spec = tiny_run_spec({"name": "anchored", "params": {"weight": 0.5}}, "none", epochs=1)
        stream = task_stream(tone_store, TINY_TASKS, clip_samples=TINY_FRONT_END["clip_samples"])
        ContinualLearner.from_spec(spec, accelerator="cpu").fit(stream, tmp_path / "run", progress=False)
        header, *rows = (tmp_path / "run" / "logs" / "train.csv").read_text().splitlines()
        anchor = header.split(",").index("anchor")
        assert float(rows[-1].split(",")[anchor]) > 0
    finally:
        STRATEGIES._components.pop("anchored", None)


def test_every_command_named_exists():
    from avsep.cli.app import COMMANDS

    text = "\n".join(_blocks("bash"))
    named = set(re.findall(r"^avsep ([a-z]+)", text, flags=re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)

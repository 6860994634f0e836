"""The switches to the released code's behaviour, and the page that lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from avsep.errors import UnknownNameError
from avsep.presets.fidelity import apply_fidelity
from avsep.registry import MEMORIES, STRATEGIES
from avsep.spec import RunSpec, apply_settings, load_preset, validated
from support.tones import TINY_SEPARATOR, TINY_TRAIN

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"


def run_data(strategy="contavsep"):
    preset = load_preset("iquery")
    return {
        "separator": preset["separator"],
        "train": preset["train"],
        "strategy": strategy,
        "memory": "random_per_class",
        "preset": "iquery",
    }


def differences(one, two, path=""):
    if isinstance(one, dict) and isinstance(two, dict):
        return {
            key: value
            for name in {**one, **two}
            for key, value in differences(one.get(name), two.get(name), f"{path}.{name}" if path else name).items()
        }
    return {} if one == two else {path: two}


def test_released_turns_every_switch_on_and_nothing_else():
    plain = validated(RunSpec, run_data(), "run").model_dump(mode="json")
    released = validated(RunSpec, apply_fidelity(run_data(), "released"), "run")
    released.check()
    assert differences(plain, released.model_dump(mode="json")) == {
        "separator.front_end.align_corners": False,
        "strategy.params.teacher_batch_norm": "train",
        "strategy.params.instance": "features",
        "memory.params.short_class": "all",
        "train.crop": "published",
        "train.precision": "16-mixed",
        "protocol": "paper",
        "validation_protocol": "paper",
    }


def test_a_strategy_without_a_parameter_is_left_alone_and_its_own_settings_stay():
    assert apply_fidelity(run_data("finetune"), "released")["strategy"] == {"name": "finetune", "params": {}}
    own = apply_fidelity(run_data({"name": "contavsep", "params": {"weight_mask": 0.5}}), "released")
    assert own["strategy"]["params"] == {"weight_mask": 0.5, "teacher_batch_norm": "train", "instance": "features"}
    still = run_data()
    del still["separator"]["motion_encoder"]
    assert apply_fidelity(still, "released")["strategy"]["params"] == {"teacher_batch_norm": "train"}
    with pytest.raises(UnknownNameError, match="no fidelity 'relased': did you mean 'released'"):
        apply_fidelity(run_data(), "relased")


def switches():
    """(switch to the released behaviour, its value or None) for every row of the page's first table."""
    if not PAGE.is_file():
        pytest.skip("the docs are not beside the tests")
    table = PAGE.read_text(encoding="utf-8").split("\n## ")[1]
    rows = [line.split("|")[4] for line in table.splitlines() if line.startswith("| ")][1:]
    return [re.search(r"`([\w.]+)=([^`]+)`", row).groups() for row in rows]


def test_the_page_lists_the_switches_that_the_word_turns():
    listed = apply_settings(run_data(), [f"{key}={value}" for key, value in switches()])
    assert validated(RunSpec, listed, "run") == validated(RunSpec, apply_fidelity(run_data(), "released"), "run")


def test_every_setting_and_test_file_on_the_page_exists():
    text = PAGE.read_text(encoding="utf-8")
    data = validated(RunSpec, run_data(), "run").model_dump(mode="json")
    named = set(re.findall(r"`((?:train|separator|strategy\.params|memory\.params)\.[\w.]+)", text))
    assert len(named) > 8
    parameters = {
        f"{part}.params.{p.name}"
        for part, component in (
            ("strategy", STRATEGIES.get("contavsep")),
            ("memory", MEMORIES.get("random_per_class")),
        )
        for p in component.settings
    }
    for path in named:
        if path.startswith(("strategy.params.", "memory.params.")):
            assert path in parameters
            continue
        node = data
        for part in path.split("."):
            assert part in node, path
            node = node[part]
    for name in set(re.findall(r"`(test_\w+\.py)`", text)):
        assert list(Path(__file__).parents[1].rglob(name)), name


def test_from_the_command_line(tone_store, tmp_path, monkeypatch, capsys):
    import yaml

    from avsep.runs.folder import RunFolder
    from avsep.training.learner import ContinualLearner
    from support.commands import TASKS, run

    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    monkeypatch.setattr(ContinualLearner, "_learn", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    train = ["train", tone_store, "--preset", "tiny.yaml", "--tasks", TASKS, "--device", "cpu"]
    released = ["--fidelity", "released", "--set", "train.precision=32-true"]
    assert run(*train, *released, "--out", "a") == 130
    spec = RunFolder("a").spec()
    assert (spec.protocol, spec.validation_protocol, spec.train.crop) == ("paper", "paper", "published")
    assert spec.train.precision == "32-true"  # what is said beside it wins
    assert run(*train, *released, "--protocol", "fixed", "--out", "b") == 130
    assert (RunFolder("b").spec().protocol, RunFolder("b").spec().validation_protocol) == ("fixed", "paper")
    capsys.readouterr()
    assert run("train", "--out", "a", "--resume", "--fidelity", "released") == 2
    assert "leave --fidelity out to resume" in capsys.readouterr().err

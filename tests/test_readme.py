"""README.md: short, in its order, and every command in it is run here, or read by the command line where it is long."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
import yaml

from support.commands import parse, run
from support.pages_of_docs import blocks, command_lines, read
from support.source_tree import ROOT
from support.tones import TINY_SEPARATOR, TINY_TRAIN
from support.video_shelf import CLASSES, write_good

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the source tree")

LONG = ("avsep demo", "avsep app", "avsep reproduce", "avsep leaderboard")  # taken apart, and not run
OF_MODEL = ("avsep models", "avsep separate", "avsep learn")
OF_DATA = ("avsep data", "avsep train", "avsep evaluate", "avsep report", "avsep export", "avsep compare")


def lines(*beginnings: str) -> list[list[str]]:
    """The README's commands that begin so, in its order, as words without ``avsep``."""
    found = [line for line in command_lines("README.md") if line.startswith(beginnings)]
    assert found
    return [shlex.split(line)[1:] for line in found]


def test_it_is_short_and_in_order():
    text = read("README.md")
    assert len(text.splitlines()) < 150
    titles = ["Install", "Demo", "Your own recording", "Teach it an instrument", "Your own data", "Ship it"]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [*titles, "Compare methods", "Links"]
    assert text.index("docs/result.png") < text.index("## Install")


def test_extras_and_commands_outside_of_avsep_exist():
    extras = set(re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    asked = re.findall(r'pip install -e "\.\[([a-z,-]+)\]"', read("README.md"))
    assert asked
    assert {extra for names in asked for extra in names.split(",")} <= extras
    for block in blocks("README.md", "bash"):
        for line in block.splitlines():
            assert line.startswith(("avsep ", "python -m pip install -e ")), line


@pytest.mark.parametrize("line", command_lines("README.md"))
def test_every_command_can_be_typed(line):
    parse(*shlex.split(line)[1:])
    assert line.startswith((*LONG, *OF_MODEL, "avsep doctor", *OF_DATA)), f"no test runs {line}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_data_training_and_shipping(tmp_path, monkeypatch):
    """On tiny videos and with a tiny separator."""
    for package in ("av", "onnx", "onnxscript", "onnxruntime", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(CLASSES):
        for split, count in {"train": 3, "val": 2, "test": 2}.items():
            for take in range(count):
                write_good(tmp_path / "videos" / split / name / f"{name}-{split}-{take}.mp4", 4 * number + take)
    train = {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 2, "validation_pairs": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": train}))
    more = {
        "train": ["--preset", "tiny.yaml", "--device", "cpu"],
        "evaluate": ["--device", "cpu", "--dependence", "2"],
        "export": ["--allow-drift"],
    }
    for words in lines(*OF_DATA):
        if "--target" in words:  # fetches ONNX Runtime's build for browsers
            continue
        options = [] if words[1] == "verify" else more.get(words[0], [])
        assert run(*words, *options) == 0, words
    for made in ("stores/mine/manifest.json", "runs/contavsep/report.html", "runs/ewc/evaluation.json", "bundle.tar"):
        assert (tmp_path / made).is_file()


def test_the_separator_that_comes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in lines("avsep models", "avsep separate"):
        if "--run" not in words:
            assert run(*words) == 0, words
    assert (tmp_path / "duet_separated" / "duet_residual.wav").is_file()
    scope: dict[str, object] = {}
    exec(blocks("README.md", "python")[0], scope)
    assert (tmp_path / "separated" / "residual.wav").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_teaching_it(tmp_path, monkeypatch):
    """The sample stands in for recordings of the new instrument."""
    monkeypatch.chdir(tmp_path)
    assert run("models", "--sample", "duet.flac") == 0
    (tmp_path / "recordings" / "oboe").mkdir(parents=True)
    for take in range(5):
        shutil.copy("duet.flac", tmp_path / "recordings" / "oboe" / f"{take}.flac")
    quick = ["--set", "train.epochs=1", "--set", "train.steps_per_epoch=2", "--max-loss-db", "inf", "--device", "cpu"]
    for words in lines("avsep learn", "avsep separate"):
        if words[0] == "learn":
            assert run(*words, *quick) == 0
        elif "--run" in words:
            assert run(*words) == 0
    assert (tmp_path / "duet_separated" / "duet_oboe.wav").is_file()

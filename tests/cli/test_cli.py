"""The commands as a user types them, on tiny sizes; what goes wrong is in test_bad_input."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

import avsep
from avsep.cli.app import COMMANDS
from avsep.data.store import Store
from avsep.data.synth.synthesis import find_banks
from avsep.errors import MissingExtraError
from support.commands import TASKS, run
from support.tones import RATE, TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a preset of the tiny separator."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(store: Path, out: Path, *more: object) -> int:
    return run("train", store, "--preset", "tiny.yaml", "--tasks", TASKS, "--out", out, "--device", "cpu", *more)


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "tasks" / "01" / "separator" / "model.safetensors")


# ---------------------------------------------------------------------- what there is


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"avsep {avsep.__version__}\n"


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "avsep", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"avsep {avsep.__version__}\n", "")


def test_no_command_shows_help(capsys):
    assert run() == 2
    shown = "".join(capsys.readouterr())
    assert all(command in shown for command in COMMANDS)


DATA = ("synth", "check", "info", "banks", "sheet", "features", "mix")


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS), *(["data", c] for c in DATA)], ids=" ".join)
def test_help_of_every_command(command, option, capsys):
    assert run(*command, option) == 0
    shown, told = capsys.readouterr()
    assert "Usage" in shown
    assert told == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["nosuch"],
        ["train", "store", "--epochs", "3"],
        ["train", "a", "b"],
        ["train", "store", "--classes-per-task", "many"],
        ["export", "run"],
        ["data"],
        ["data", "nosuch"],
        ["evaluate", "run", "--task", "-1"],
        ["--epochs", "3", "train"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_without_a_traceback(argv, capsys, tiny):
    before = sorted(tiny.rglob("*"))
    assert run(*argv) == 2
    told = "".join(capsys.readouterr())
    assert "Usage" in told
    assert "Traceback" not in told
    assert sorted(tiny.rglob("*")) == before


@pytest.mark.parametrize("kind", ["audio_encoders", "visual_encoders", "mask_decoders", "strategies", "memories"])
def test_list_of_one_kind(kind, capsys, monkeypatch):
    from avsep.registry import REGISTRIES

    monkeypatch.setenv("COLUMNS", "200")
    assert run("list", kind) == 0
    shown = capsys.readouterr().out
    for component in REGISTRIES[kind]:
        assert component.name in shown
        assert all(str(parameter) in shown for parameter in component.settings)
    names = {component.name for other in REGISTRIES if other != kind for component in REGISTRIES[other]}
    listed = {line.split()[0] for line in shown.splitlines() if line[:1] == " " and line[1:2].strip()}  # first cells
    assert listed - {"name"} >= {component.name for component in REGISTRIES[kind]}
    assert not names & listed


def test_list_of_protocols(capsys, monkeypatch):
    from avsep.data.protocol import PROTOCOLS

    monkeypatch.setenv("COLUMNS", "200")
    assert run("list", "protocols") == 0
    shown = capsys.readouterr().out
    for name, kind in PROTOCOLS.items():
        assert re.search(rf"^ ?{name} +{kind.version} +{re.escape(kind.summary[:40])}", shown, re.MULTILINE)


def test_list_of_presets(capsys):
    assert run("list", "presets") == 0
    shown = capsys.readouterr().out
    assert "iquery_small" in shown
    assert "unet7" not in shown


def test_list_for_programs_and_for_scripts(capsys):
    from avsep.registry import REGISTRIES

    assert run("list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {*REGISTRIES, "presets", "protocols"}
    names = [component.name for component in REGISTRIES["memories"]]
    assert [row["name"] for row in found["memories"]] == names
    (drawn,) = [row for row in found["memories"] if row["name"] == "random_per_class"]
    assert {p["name"]: p["default"] for p in drawn["parameters"]}["per_class"] == 1
    assert run("list", "memories", "--quiet") == 0
    assert capsys.readouterr().out.split() == names
    assert run("list", "memory", "--json") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "nothing to list under 'memory'" in shown.err


def test_list_into_a_closed_pipe():
    """``avsep list | head -1``"""
    command = f"{sys.executable} -m avsep list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


# ---------------------------------------------------------------------- completion of the shell


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sep"], ["separate"]),
        (["separate", "--overw"], ["--overwrite"]),
        (["export", "ver"], ["verify"]),
        (["separate", "du"], []),  # files, which the shell knows
    ],
    ids=lambda words: " ".join(words),
)
def test_words_are_completed(words, offered):
    """As the script for bash asks, which `avsep --install-completion` installs; with the modules of one command."""
    code = (
        "import sys; sys.argv = ['avsep']\n"
        "from avsep.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted(m for m in sys.modules if m == 'torch' or m.endswith('_command')), file=sys.stderr)"
    )
    asked = {"COMP_WORDS": f"avsep {' '.join(words)}", "COMP_CWORD": str(len(words))}
    asked["_AVSEP_COMPLETE"] = "complete_bash"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == offered, done.stderr
    if len(words) > 1:
        assert done.stderr.split() == [f"avsep.cli.{words[0]}_command"]


def test_the_script_for_a_shell(capsys):
    """`avsep --show-completion`, of the shell that it is called from."""
    from typer.main import get_command

    from avsep.cli.app import build_app

    names = {option for parameter in get_command(build_app()).params for option in parameter.opts}
    assert {"--install-completion", "--show-completion"} <= names
    assert run("-h") == 0
    assert "--install-completion" in capsys.readouterr().out


# ---------------------------------------------------------------------- data


@pytest.mark.skipif(not find_banks(), reason="no SoundFont bank here")
def test_data_commands(tmp_path, capsys):
    store = tmp_path / "store"
    argv = ["data", "synth", store, "--classes", "flute,drum", "--clips", "2,1,2", "--clip-s", "2", "--workers", "1"]
    assert run(*argv) == 0
    content = Store.open(store).content_hash
    assert f"content hash {content}" in capsys.readouterr().out
    assert run(*argv) == 0  # again: nothing to do
    assert Store.open(store).content_hash == content
    capsys.readouterr()

    assert run("data", "info", store) == 0
    told = capsys.readouterr().out
    assert "10 clips of 2 classes" in told
    assert content in told
    assert run("data", "check", store) == 0
    assert "every file matches its hash" in capsys.readouterr().out
    assert run("data", "banks") == 0
    assert str(find_banks()[0]) in capsys.readouterr().out
    assert run("data", "sheet", store, "--out", tmp_path / "sheet") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'sheet.png'}\n"
    assert (tmp_path / "sheet.png").stat().st_size > 1000

    clips = "flute-test-000,drum-test-001"
    assert run("data", "mix", store, "--clips", clips, "--out", tmp_path / "duet") == 0
    assert sorted(str(p.relative_to(tmp_path / "duet")) for p in (tmp_path / "duet").rglob("*")) == [
        "duet.wav",
        "features.npz",
        "references",
        "references/drum.wav",
        "references/flute.wav",
    ]
    duet, parts = (soundfile.read(tmp_path / "duet" / n)[0] for n in ("duet.wav", "references/flute.wav"))
    parts = parts + soundfile.read(tmp_path / "duet" / "references" / "drum.wav")[0]
    np.testing.assert_allclose(duet, parts, atol=2 / 32768)


# ---------------------------------------------------------------------- a run from end to end


def test_train_with_resume_gives_what_python_gives(tone_store, tone_run, tiny, capsys):
    assert train(tone_store, tiny / "run") == 0
    assert f"next: avsep evaluate {tiny / 'run'}" in capsys.readouterr().out
    mine, theirs = weights(tiny / "run"), weights(tone_run)
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    before = (tiny / "run" / "logs" / "train.csv").read_bytes()
    # the store is the run's own
    assert run("train", "--out", tiny / "run", "--resume", "--json", "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert [task["index"] for task in json.loads(shown.out)["tasks"]] == [0, 1]
    assert (tiny / "run" / "logs" / "train.csv").read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "train.epochs=1", "--set", "memory.params.per_class=2"],
        ["--strategy", "finetune", "--memory", "none", "--seed", "7", "--set", "train.epochs=1"],
        ["--protocol", "paper", "--set", "train.epochs=1", "--set", "strategy.params.weight_mask=0"],
    ],
)
def test_options_reach_the_run(options, tone_store, tiny):
    assert train(tone_store, tiny / "run", *options) == 0
    spec = avsep.runs.folder.RunFolder(tiny / "run").spec()
    assert spec.train.epochs == 1
    assert spec.tasks == tuple(map(tuple, TINY_TASKS))
    assert spec.strategy.name == ("finetune" if "finetune" in options else "contavsep")
    assert spec.memory.params == ({"per_class": 2} if "memory.params.per_class=2" in options else {})
    assert spec.train.seed == (7 if "--seed" in options else 1234)
    assert spec.protocol == ("paper" if "paper" in options else "fixed")
    assert spec.strategy.params == ({"weight_mask": 0} if options[0] == "--protocol" else {})


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ([], [["ding", "hum"], ["peep", "whirr"]]),
        (["--classes-per-task", "4"], [["ding", "hum", "peep", "whirr"]]),
        (["--tasks", "whirr, ding; hum;"], [["whirr", "ding"], ["hum"]]),
    ],
)
def test_ways_to_name_the_tasks(options, tasks, tone_store, tiny):
    shorter = ["--set", "train.epochs=1", "--set", "train.steps_per_epoch=1"]
    assert run("train", tone_store, "--preset", "tiny.yaml", "--out", "run", *shorter, *options) == 0
    assert [list(names) for names in avsep.runs.folder.RunFolder("run").spec().tasks] == tasks


def test_evaluate_and_report(tone_run, tiny, capsys):
    import shutil

    folder = shutil.copytree(tone_run, tiny / "run")
    assert run("evaluate", folder) == 0
    shown = capsys.readouterr().out
    result = json.loads((folder / "evaluation.json").read_text())
    for row in result["matrix"]:
        for value in row:
            assert value is None or f"{value:.2f}" in shown
    assert "forgetting" in shown
    assert run("evaluate", folder, "--task", "0", "--json", "--quiet", "--dependence", "0") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    told = json.loads(shown.out)
    assert told["file"] == str(folder / "evaluation.json")
    assert told["after"][0]["all"]["mean"]["sdr"] == pytest.approx(result["after"][0]["all"]["mean"]["sdr"])
    assert "rows" not in told["after"][0]
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    assert run("report", folder, "--mixtures", "2", "--out", "page.html") == 0
    shown = capsys.readouterr().out
    assert "page.html" in shown
    assert f"next: avsep export {folder} --out run-bundle" in shown
    page = (tiny / "page.html").read_text()
    assert page.count("<audio") >= 2
    assert "http://" not in re.sub(r"http://www\.w3\.org/\S+", "", page)


def test_separate_a_long_stereo_recording(tone_store, tone_run, tiny, capsys):
    """48 kHz, two channels, three times as long as what the separator was trained on."""
    seconds, rate_hz = 3 * TINY_SEPARATOR["front_end"]["clip_samples"] / RATE, 48000
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    left = 0.2 * np.sin(2 * np.pi * 330 * time_s)
    right = 0.2 * np.sin(2 * np.pi * 830 * time_s)
    soundfile.write("long.wav", np.stack([left, right], axis=1), rate_hz)
    assert run("data", "features", tone_store, "--clips", "ding-test-0,peep-test-0", "--out", "f.npz") == 0
    argv = ["separate", "long.wav", "--run", tone_run, "--features", "f.npz", "--classes", "ding,peep"]
    assert run(*argv, "--out", "model") == 0
    assert "long_residual.wav" in capsys.readouterr().out
    assert (tiny / "model" / "long_separated.html").is_file()
    assert run(*argv, "--out", "input", "--rate", "input", "--format", "FLOAT", "--no-page") == 0
    names = ["long_ding.wav", "long_peep.wav", "long_residual.wav"]
    for folder, rate in (("model", RATE), ("input", rate_hz)):
        assert sorted(p.name for p in (tiny / folder).glob("*.wav")) == names
        found = [soundfile.read(tiny / folder / name, always_2d=True) for name in names]
        assert {(r, a.shape) for a, r in found} == {(rate, (round(len(time_s) * rate / rate_hz), 2))}
    total = sum(soundfile.read(tiny / "input" / name)[0] for name in names)
    np.testing.assert_allclose(total, np.stack([left, right], axis=1), atol=1e-4)


@pytest.fixture
def can_export():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


@pytest.mark.slow
def test_export_makes_bundles_that_verify(can_export, tone_run, tiny, capsys):
    assert run("export", tone_run, "--out", "last", "--precision", "fp32", "--precision", "fp16") == 0
    shown = capsys.readouterr()
    for file in ("separator.onnx", "separator.fp16.onnx", "object_encoder.onnx", "motion_encoder.onnx"):
        assert file in shown.out
    assert "exported to last" in shown.out
    assert "next: avsep export verify last" in shown.out
    assert "synthetic" not in shown.err
    manifest = json.loads((tiny / "last" / "manifest.json").read_text())
    assert manifest["made_from"] == "run, task 1"
    assert manifest["classes"] == ["ding", "hum", "peep", "whirr"]
    assert [v["graph"] for v in manifest["visual"]] == ["object_encoder.onnx", "motion_encoder.onnx"]
    gates = [graph["gate"] for graph in manifest["graphs"] if graph["kind"] == "separator"]
    assert [gate["on"] for gate in gates] == ["held-out", "held-out"]
    assert all(gate["passed"] and gate["mixtures"] > 4 and max(gate["max_drift_db"].values()) < 0.1 for gate in gates)

    assert run("export", "verify", "last") == 0
    shown = capsys.readouterr().out
    assert "every graph ran on CPUExecutionProvider within its tolerance" in shown
    assert run("export", "info", "last") == 0
    shown = capsys.readouterr().out
    for fact in ("ding, hum, peep, whirr", "11025 Hz", "mixture float32 [1, 8191]", "computed by object_encoder.onnx"):
        assert fact in shown
    assert run("export", "build", "last", "--target", "onnxruntime") == 0
    assert "every graph ran on CPUExecutionProvider" in capsys.readouterr().out


def test_a_path_is_a_link_on_a_terminal_alone(monkeypatch, tmp_path):
    from avsep.cli._output import link, next_command

    path = tmp_path / "my page.html"
    assert link(path) == str(path)
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setenv("TERM", "xterm")
    assert link(path) == f"\x1b]8;;{path.as_uri()}\x1b\\{path}\x1b]8;;\x1b\\"
    assert path.as_uri().endswith("my%20page.html")
    monkeypatch.setenv("TERM", "dumb")
    assert link(path) == str(path)
    assert next_command("report", path) == f"next: avsep report '{path}'"


def test_the_schema_is_printed(capsys):
    from avsep.export.bundle.manifest import schema_text

    assert run("export", "schema") == 0
    assert capsys.readouterr().out == schema_text()


def test_a_run_may_be_called_as_a_subcommand(tiny, capsys):
    """`avsep export run --out b` with a run folder called run, and `avsep export verify --out b` with one called so."""
    for name in ("run", "verify"):
        (tiny / name).mkdir()
        (tiny / name / "run.yaml").write_text("a run\n")
        assert run("export", name, "--out", "b") == 2
        assert f"{name} has no finished task yet" in capsys.readouterr().err
    assert run("export", "run", "--help") == 0
    assert "RUN" in capsys.readouterr().out


# ---------------------------------------------------------------------- Ctrl-C


def test_interrupted_training_says_how_to_go_on(tone_store, tone_run, tiny, capsys, monkeypatch):
    from avsep.training.loop import TaskLoop

    step, count = TaskLoop._step, 0

    def stopped(self, *args):
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(TaskLoop, "_step", stopped)
    assert train(tone_store, tiny / "run") == 130
    told = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert told[-1] == f"avsep: stopped: go on with: avsep train --out {tiny / 'run'} --resume"
    assert len(told) == 2  # the first is the bar of the task that was finished
    assert run("train", "--out", tiny / "run", "--resume") == 0
    mine, theirs = weights(tiny / "run"), weights(tone_run)
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_interrupted_before_the_run_began(tone_store, tiny, capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("avsep.data.tasks.task_stream", stopped)
    assert train(tone_store, tiny / "run") == 130
    assert capsys.readouterr().err == "avsep: stopped\n"
    assert not (tiny / "run").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.skipif(not find_banks(), reason="no SoundFont bank here")
def test_a_real_ctrl_c_reaches_the_workers_in_silence(tmp_path):
    """The signal goes to the whole group, as from a terminal."""
    store = tmp_path / "store"
    command = [sys.executable, "-m", "avsep", "data", "synth", str(store), "--clips", "60,1,1", "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(store.glob(".journal/*-train-*.json"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    told = [line for line in process.communicate(timeout=60)[1].splitlines() if line.strip()]
    assert (process.returncode, told) == (130, ["avsep: stopped: the same command goes on where it was"])


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_group_that_is_ended_with_its_readers_says_how_to_go_on(tone_store, tiny):
    """The signal goes to the readers too, as a cluster or ``timeout`` sends it."""
    command = [sys.executable, "-m", "avsep", "train", str(tone_store), "--preset", "tiny.yaml", "--workers", "1"]
    command += ["--out", "run", "--tasks", TASKS, "--device", "cpu", "--set", "train.epochs=400", "--logger", "none"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tiny
    )
    log, deadline = tiny / "run" / "logs" / "train.csv", time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size > 200):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    told = [
        line for line in process.communicate(timeout=60)[1].splitlines() if line.startswith("avsep") or "Error" in line
    ]
    assert told == ["avsep: stopped: go on with: avsep train --out run --resume"]
    assert process.returncode in (130, 143)  # as the readers' end or the signal is noticed first


def test_a_missing_extra_can_come_from_a_worker():
    error = MissingExtraError("Pillow", "synth", "the benchmark")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert 'the benchmark needs Pillow, which is not installed: pip install "avsep[synth]"' in str(error)


def test_defaults_in_brackets_are_shown(capsys):
    from typer.main import get_command

    from avsep.cli.app import build_app

    def commands(group, path):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, [*path, name])
            else:
                yield [*path, name], command

    checked = 0
    for path, command in commands(get_command(build_app()), []):
        texts = [getattr(p, "help", None) or "" for p in command.params]
        noted = [m for text in texts for m in re.findall(r"\[(default: [^\]]+)\]", text)]
        if noted:
            assert run(*path, "--help") == 0
            shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
            for note in noted:
                assert note.split()[1] in re.findall(r"\[default: ([^\s\]]+)", shown), (path, note)
                checked += 1
    assert checked > 20

"""The demo, at a fraction of its size, and at full size behind the slow marker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import yaml

from avsep.evaluation.yardsticks import sdr_by_task
from support.tones import TINY_SEPARATOR, TINY_TRAIN

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("onnxruntime")


def _demo(*arguments, timeout=280):
    return subprocess.run(
        [sys.executable, "-m", "avsep", "demo", *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo")
    (home / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    arguments = ("--out", home / "demo", "--preset", home / "tiny.yaml", "--clips", "2", "1", "2")
    return home / "demo", arguments, _demo(*arguments)


def test_it_leaves_what_it_says(small):
    out, _, done = small
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(out / "report.html") in done.stdout.replace("\n", "")
    assert 100_000 < (out / "report.html").stat().st_size < 6e6
    page = (out / "report.html").read_text(encoding="utf-8").partition("<nav")[0]
    assert "<h1>Does it still know its first instruments?</h1>" in page
    assert page.partition("<details>")[0].count("<audio") == 3
    for folder, names in (
        ("separated", ("accordion", "flute")),
        ("separated_xylophones", ("xylophone-1", "xylophone-2")),
    ):
        for name in (*names, "residual"):
            audio, rate = soundfile.read(out / folder / f"duet_{name}.wav")
            assert (len(audio), rate) == (8 * 11025, 11025)
        assert re.search(rf"SDR over the mixture: {names[0]} [+-]\d+\.\d dB, {names[1]} [+-]", done.stdout)
    assert "SoundFont" not in done.stderr  # one bank is enough here, and no warning
    assert {p.name for p in (out / "exported").iterdir()} == {"task-01"}
    evaluation = json.loads((out / "contavsep" / "evaluation.json").read_text())
    for name, (old, new) in sdr_by_task(evaluation).items():
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert [float(x) for x in re.findall(r"-?\d+\.\d+", row)] == pytest.approx([old, old, new], abs=0.0051)
    for run in ("finetune", "contavsep"):
        matrix = json.loads((out / run / "evaluation.json").read_text())["matrix"]
        (first, _), (kept, new) = matrix
        # the table shows what was measured
        row = next(line for line in done.stdout.splitlines() if re.match(rf"│ {run}\b", line))
        assert [float(x) for x in re.findall(r"-?\d+\.\d+", row)] == pytest.approx(
            [first, kept, first - kept, new], abs=0.0051
        )


@pytest.mark.slow
def test_a_second_call_goes_on_and_another_seed_is_refused(small):
    out, arguments, _ = small
    before = {p: p.stat().st_mtime_ns for p in (out / "store").rglob("*.wav")}
    again = _demo(*arguments, "--json")
    assert again.returncode == 0, again.stderr[-2000:]
    found = json.loads(again.stdout)
    assert (found["format"], found["report"]) == ("avsep-demo", str(out / "report.html"))
    assert {name: run["matrix"] for name, run in found["runs"].items()} == {
        name: json.loads((out / name / "evaluation.json").read_text())["matrix"] for name in ("finetune", "contavsep")
    }
    assert [list(one["gain_db"]) for one in found["recordings"]] == [list(one["files"]) for one in found["recordings"]]
    assert before == {p: p.stat().st_mtime_ns for p in (out / "store").rglob("*.wav")}
    other = _demo(*arguments, "--seed", 5)
    assert other.returncode == 2
    assert "holds a demo of seed 0: add --fresh" in other.stderr


def test_it_takes_no_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    refused = _demo("--out", tmp_path, "--fresh")
    assert refused.returncode == 2
    assert "is not empty and not a demo" in refused.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_fresh_removes_what_the_demo_made_and_nothing_else(tmp_path):
    from avsep.cli.demo_command import _claim

    _claim(tmp_path, 0, fresh=False)
    for name in ("store/manifest.json", "contavsep/run.yaml", "report.html", "thesis.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    _claim(tmp_path, 3, fresh=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "thesis.txt"]
    assert json.loads((tmp_path / "demo.json").read_text()) == {"seed": 3}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of a process group")
@pytest.mark.parametrize("kill", [True, False], ids=["kill", "ctrl-c"])
def test_training_ends_with_the_demo(kill, tmp_path):
    """A killed demo leaves no process that holds its runs; Ctrl-C ends in one line."""
    from avsep.errors import RunError
    from avsep.files import FolderLock

    endless = {**TINY_TRAIN, "epochs": 10_000}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": endless}))
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "avsep", "demo", "--out", out, "--preset", tmp_path / "tiny.yaml"]
    runs = [out / "finetune", out / "contavsep"]
    with open(tmp_path / "stderr", "w") as stderr:
        demo = subprocess.Popen(
            [*map(str, command), "--clips", "2", "1", "2"],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not all((run / "logs" / "train.csv").is_file() for run in runs) and time.monotonic() < deadline:
            time.sleep(0.1)
        if kill:
            demo.kill()
        else:
            os.killpg(demo.pid, signal.SIGINT)
        demo.wait(60)
        deadline = time.monotonic() + 20
        free = []
        while len(free) < 2 and time.monotonic() < deadline:
            free = []
            for run in runs:
                with contextlib.suppress(RunError), FolderLock(run):
                    free.append(run)
            time.sleep(0.1)
        assert free == runs
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)
    if not kill:
        assert demo.returncode == 130
        assert "Traceback" not in (tmp_path / "stderr").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_contavsep_beats_a_fixed_filter_on_both_tasks_for_every_seed(seed, tmp_path):
    done = _demo("--out", tmp_path / "demo", "--seed", seed, timeout=1400)
    assert done.returncode == 0, done.stderr[-2000:]
    results = {
        run: json.loads(Path(tmp_path, "demo", run, "evaluation.json").read_text()) for run in ("finetune", "contavsep")
    }
    old, new = sdr_by_task(results["contavsep"])["static filter"]
    assert results["contavsep"]["matrix"][1][0] > old
    for result in results.values():
        assert result["matrix"][1][1] > new + 2
    gains = [float(x) for x in re.findall(r"xylophone-\d ([+-]\d+\.\d) dB", done.stdout)]
    assert len(gains) == 2
    assert min(gains) > 1

"""``avsep separate`` as people type it: what they leave out, how they write names, and many recordings at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from avsep import cli
from avsep.export.runtime.names import names_in
from avsep.media.timeline import VisualTimeline, write_visual_file
from avsep.separator import build_separator, save_separator
from support.commands import run
from support.folders import contents
from support.tones import RATE, TINY_SEPARATOR

CLASSES = ("ding", "acoustic_guitar", "Male speech, man speaking")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A separator of random weights, what it sees, and a sound."""
    folder = tmp_path_factory.mktemp("shelf")
    torch.manual_seed(0)
    save_separator(build_separator(**TINY_SEPARATOR, classes=CLASSES), folder / "separator")
    shown = VisualTimeline(object=np.zeros((2, 3, 16, 16), np.uint8), motion=np.zeros((12, 1, 16, 16), np.uint8))
    write_visual_file(folder / "f.npz", dict.fromkeys(CLASSES, shown))
    soundfile.write(folder / "song.wav", 0.1 * np.sin(np.arange(RATE) * 0.2), RATE)
    return folder


@pytest.fixture
def desk(tmp_path, shelf, monkeypatch) -> Path:
    """A folder to work in, with one sound."""
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    shutil.copy(shelf / "song.wav", "song.wav")
    return tmp_path / "desk"


def separate(shelf: Path, *argv: object, classes: str | None = "ding,acoustic_guitar") -> int:
    chosen = [] if classes is None else ["--classes", classes]
    how = ["--run", shelf / "separator", "--features", shelf / "f.npz", "--no-page", "--device", "cpu"]
    return run("separate", *argv, *how, *chosen)


def told(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("avsep: ")]


SEPARATED = ["song_acoustic_guitar.wav", "song_ding.wav", "song_residual.wav"]


def test_what_comes_out_lies_beside_the_recording(shelf, desk, capsys):
    (desk / "music").mkdir()
    shutil.move("song.wav", "music/song.wav")
    assert separate(shelf, "music/song.wav") == 0
    assert sorted(p.name for p in (desk / "music/song_separated").iterdir()) == SEPARATED
    before = contents(desk)
    assert separate(shelf, "music/song.wav") == 2
    (line,) = told(capsys)
    assert "--overwrite" in line
    assert contents(desk) == before
    assert separate(shelf, "music/song.wav", "--overwrite") == 0


def test_all_that_is_missing_is_told_at_once(shelf, desk, capsys):
    assert run("separate") == 2
    (line,) = told(capsys)
    for part in ("a recording", "--classes", "it knows accordion, "):  # of the separator that comes along
        assert part in line
    assert separate(shelf, classes=None) == 2
    (line,) = told(capsys)
    assert "a recording" in line
    assert "it knows ding, acoustic_guitar, Male speech, man speaking" in line
    assert separate(shelf, "song.wav", classes=" , ") == 2
    (line,) = told(capsys)
    assert "a recording" not in line
    assert "it knows ding" in line
    assert separate(shelf, "song.wav", classes="dong,ding,tuba") == 2
    (line,) = told(capsys)
    assert "'dong' and 'tuba': did you mean 'ding'? it knows ding, acoustic_guitar" in line
    assert sorted(contents(desk)) == ["song.wav"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Ding, ACOUSTIC GUITAR", ["ding", "acoustic_guitar"]),
        ("ding acoustic-guitar", ["ding", "acoustic_guitar"]),
        ("acoustic guitar ding", ["acoustic_guitar", "ding"]),
        ("male speech, Man speaking ding", ["male speech", "Man speaking ding"]),  # nobody can tell
        ("male speech,man  speaking,DING", ["Male speech, man speaking", "ding"]),
        ("left=Ding right=ding", ["left=ding", "right=ding"]),
        ("Left One=acoustic guitar", ["Left One=acoustic_guitar"]),
        ("ding tuba", ["ding tuba"]),
        ("auto", ["auto"]),
    ],
)
def test_how_classes_may_be_written(text, names):
    assert names_in(text, CLASSES) == names


def test_names_that_differ_in_case_alone_are_written_as_they_are():
    assert names_in("Ding,ding,DING", ("ding", "Ding")) == ["Ding", "ding", "DING"]


def test_classes_in_several_options(shelf, desk):
    assert separate(shelf, "song.wav", "--classes", "Ding", "--classes", "Acoustic guitar", classes=None) == 0
    assert sorted(p.name for p in (desk / "song_separated").iterdir()) == SEPARATED


def test_of_a_folder_the_bad_recording_is_told_and_the_rest_is_done(shelf, desk, capsys):
    shutil.copy("song.wav", "other.WAV")
    (desk / "damaged.wav").write_text("la la la")
    (desk / "notes.txt").write_text("the recordings of today")
    (desk / ".hidden.wav").write_text("")
    assert separate(shelf, ".", "--json", "--out", "parts") == 2
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [Path(r["source"]).name for r in found["recordings"]] == ["other.WAV", "song.wav"]
    assert list(found["recordings"][1]["files"]) == ["ding", "acoustic_guitar"]
    assert Path(found["recordings"][1]["files"]["ding"]).is_file()
    ((source, error),) = [(f["source"], f["error"]) for f in found["failed"]]
    assert source == "damaged.wav"
    assert "not WAV" in error
    lines = [line for line in shown.err.splitlines() if line.startswith("avsep: ")]
    assert lines == [f"avsep: {error}", "avsep: 1 of 3 recordings could not be separated"]
    assert sorted(p.name for p in (desk / "parts").iterdir()) == sorted(
        [*SEPARATED, *(name.replace("song", "other") for name in SEPARATED)]
    )


def test_when_none_can_be_separated(shelf, desk, capsys):
    (desk / "damaged.wav").write_text("la la la")
    assert separate(shelf, "damaged.wav", "gone.wav", "--quiet") == 2
    lines = told(capsys)
    assert len(lines) == 2
    assert "damaged.wav" in lines[0]
    assert "no such audio file: gone.wav" in lines[1]
    assert sorted(contents(desk)) == ["damaged.wav", "song.wav"]


def test_a_recording_that_shows_too_little(shelf, desk, capsys):
    """Of two, told as the fault of each; of one, the only line."""
    shutil.copy("song.wav", "b.wav")
    how = ["--run", shelf / "separator", "--classes", "ding", "--no-page"]
    assert run("separate", "song.wav", "b.wav", *how) == 2
    lines = told(capsys)
    assert [("song.wav has none" in line, "b.wav has none" in line) for line in lines[:2]] == [
        (True, False),
        (False, True),
    ]
    assert lines[2] == "avsep: 2 of 2 recordings could not be separated"
    assert run("separate", "song.wav", *how) == 2
    assert len(told(capsys)) == 1


def test_an_address_is_no_file(shelf, desk, capsys):
    assert separate(shelf, "https://example.org/watch?v=1") == 2
    (line,) = told(capsys)
    assert "https://example.org/watch?v=1 is an address" in line
    assert "download it first" in line
    assert separate(shelf, (desk / "song.wav").as_uri(), "--out", "parts") == 0
    assert sorted(p.name for p in (desk / "parts").iterdir()) == SEPARATED


def test_an_empty_folder(shelf, desk, capsys):
    (desk / "nothing").mkdir()
    assert separate(shelf, "nothing") == 2
    (line,) = told(capsys)
    assert "nothing is not a file but a folder, and holds no recording" in line


def test_classes_that_were_taken_for_recordings(shelf, desk, capsys):
    """``--classes ding acoustic_guitar``: the shell parts what people mean as one."""
    assert separate(shelf, "song.wav", "Acoustic_Guitar", classes="ding") == 2
    assert "Acoustic_Guitar is a class" in (line := told(capsys)[-1])
    assert "write --classes ding,Acoustic_Guitar" in line
    assert sorted(contents(desk)) == ["song.wav"]


def test_quiet_and_verbose(shelf, desk, capsys):
    assert separate(shelf, "song.wav", "--quiet") == 0
    assert "".join(capsys.readouterr()) == ""
    assert separate(shelf, "song.wav", "--verbose", "--overwrite") == 0
    shown = capsys.readouterr()
    assert "song_residual.wav" in shown.out
    assert "PyTorch, cpu: it knows ding" in shown.err
    assert separate(shelf, "song.wav", "--verbose") == 2
    assert "Traceback" in (err := capsys.readouterr().err)  # for who asks
    assert err.splitlines()[-1].startswith("avsep: ")
    assert separate(shelf, "song.wav") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_whole(shelf, desk, capsys, monkeypatch):
    from avsep.inference import recordings

    shutil.copy("song.wav", "a.wav")
    real, calls = recordings.separate_and_tell, []

    def stopped(*args, **how):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(recordings, "separate_and_tell", stopped)
    assert separate(shelf, "a.wav", "song.wav") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "avsep: stopped: 1 of 2 recordings are separated"
    assert sorted(p.name for p in (desk / "a_separated").iterdir()) == [n.replace("song", "a") for n in SEPARATED]
    assert not (desk / "song_separated").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_sigterm_tidies_up(shelf, desk):
    soundfile.write("long.wav", np.tile(0.1 * np.sin(np.arange(RATE) * 0.2), 300), RATE)
    before = contents(desk)
    command = [sys.executable, "-m", "avsep", "separate", "long.wav", "--run", str(shelf / "separator"), "--no-page"]
    command += ["--features", str(shelf / "f.npz"), "--classes", "ding", "--batch", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(desk.glob("long_separated/.staging-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    lines = [line for line in process.communicate(timeout=60)[1].splitlines() if line.strip() and "━" not in line]
    assert (process.returncode, lines) == (143, ["avsep: stopped"])
    assert contents(desk) == before
    assert not (desk / "long_separated").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_sigterm_interrupts_once_and_is_as_before_afterwards():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while things are tidied up
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt), cli._sigterm_as_ctrl_c():
        work()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with cli._sigterm_as_ctrl_c():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM

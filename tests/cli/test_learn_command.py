"""``avsep learn`` and ``avsep memory``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import yaml

from avsep.data.store import Store
from avsep.runs.folder import RunFolder
from avsep.training.validation import Validation
from support.commands import run
from support.continual_runs import make_learner
from support.tones import RATE, TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN, stream_of


@pytest.fixture
def taught(tone_store, tmp_path, monkeypatch):
    """A run that has learned ding and hum, in a folder that the command works in, beside the store."""
    monkeypatch.setattr(Validation, "score", lambda self, student: (0.0, []))
    monkeypatch.setattr(Validation, "log_media", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    learner = make_learner("contavsep", ("random_per_class", {"per_class": 2, "keep": "clip"}))
    learner.fit(stream_of(tone_store, TINY_TASKS[:1]), "taught", progress=False)
    shutil.copytree(tone_store, "tones")
    return RunFolder("taught")


def learn(*more):
    return run("learn", "taught", "--device", "cpu", *more)


def test_classes_are_added_one_after_the_other(taught, capsys):
    any_loss = ("--max-loss-db", "inf")
    assert learn("--from", "tones", "--classes", "peep", *any_loss) == 0
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if "peep" in line and "new" in line]
    assert "validated and tested on their own recordings" in told
    code = learn("--from", "tones", "--classes", "whirr", "--max-loss-db", "0", "--set", "train.epochs=2", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["run"], found["task"]) == ("avsep-learn", "taught", 2)
    assert (found["classes"], list(found["changes"])) == (["whirr"], ["ding", "hum", "peep", "whirr"])
    assert found["changes"]["whirr"]["before"] is None
    changes = {name: of["change"] for name, of in found["changes"].items() if of["change"] is not None}
    assert found["lost"] == [name for name, change in changes.items() if change < 0]
    assert found["lost"]
    assert (code, found["learned"], found["max_loss_db"]) == (2, False, 0)
    assert learn("--from", "tones", "--classes", "whirr", "--set", "train.epochs=2", *any_loss) == 0
    assert taught.spec().tasks == (("ding", "hum"), ("peep",), ("whirr",))
    assert taught.spec().train.epochs == 2
    assert run("evaluate", "taught", "--device", "cpu") == 0
    assert run("data", "check", "taught/memory") == 0
    capsys.readouterr()
    assert run("memory", "taught", "--forget", "ding", "--page", "memory.html") == 0
    told = capsys.readouterr().out
    page = (taught.path.resolve().parent / "memory.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 6
    assert "0.7 s of 1.5 s are kept." in page
    assert "No exemplars." in page
    assert "2 exemplars of ding are removed" in told
    assert "peep-train-" in told
    assert "ding-train-" not in told
    assert run("memory", "taught", "--forget", "tuba") == 2


def test_what_is_wrong_is_told_in_a_line(taught, capsys):
    for more, text in (
        (("--from", "tones", "--classes", "hum"), "knows 'hum' already"),
        (("--from", "nowhere", "--classes", "tuba"), "no store or folder nowhere"),
        (("--from", "tones", "--classes", "tuba"), "no class 'tuba'"),
        (("--from", "tones", "--classes", "peep", "--max-loss-db", "-1"), "0 or more dB"),
        (("--from", "tones", "--classes", "peep", "--set", "train.batch_size=5000"), "batch"),
    ):
        assert learn(*more) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert [line for line in told if line.startswith("avsep:")] == told[-1:]  # beside bars of what was done before
        assert text in told[-1]
    assert run("memory", "taught") == 0  # lists what still lies in the store
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if "ding" in line]
    assert "avsep memory taught --carry copies them" in told
    assert run("memory", "taught", "--store", "tones") == 0


def test_a_saved_separator_is_taught(taught, capsys):
    saved = taught.task(0).separator.rename("saved")
    how = ("--from", "tones", "--classes", "peep", "--max-loss-db", "inf", "--device", "cpu")
    assert run("learn", "saved", *how) == 2
    told = capsys.readouterr().err
    assert all(option in told for option in ("--out", "--store", "--preset"))
    how_to_begin = ("--out", "none", "--store", "tones", "--preset", "aligned_small")
    assert run("learn", saved, "--from", "nowhere", "--classes", "peep", *how_to_begin, "--device", "cpu") == 2
    assert not Path("none").exists()
    Path("tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    assert run("learn", saved, *how, "--out", "mine", "--store", "tones", "--preset", "tiny.yaml") == 0
    assert RunFolder("mine").spec().tasks == (("ding", "hum"), ("peep",))
    assert run("memory", "mine") == 0
    assert run("learn", "mine", "--from", "tones", "--classes", "whirr", "--preset", "tiny.yaml") == 2
    assert "change them with --set" in capsys.readouterr().err


def test_a_class_is_learned_from_a_folder_of_videos(taught, tmp_path, capsys, monkeypatch):
    """The recordings are prepared as the run's own store was: here by a stand-in that gives sounds their pictures."""
    from avsep.data.prepare import videos
    from avsep.data.store import StoreWriter

    folder = tmp_path / "recordings" / "peep"
    folder.mkdir(parents=True)
    whole = Store.open("tones")
    clips = whole.select(classes=["peep"])
    for number, clip in enumerate(clips):
        soundfile.write(folder / f"{number}.wav", whole.read_audio(clip), RATE)
    listed = []

    def prepared(listing, out, recipe, **_):
        listed.append((listing, recipe))
        with StoreWriter(out, classes=listing.classes, sample_rate_hz=RATE, origin={}) as writer:
            for video, clip in zip(listing.videos, clips, strict=True):
                timeline = whole.timeline(clip)
                pcm = whole.read_pcm(clip, 0, clip.samples)
                writer.write_clip(
                    video.id, "peep", video.split, pcm, object_frames=timeline.object, motion_frames=timeline.motion
                )
            return videos.Prepared(writer.finish([v.id for v in listing.videos]), [])

    monkeypatch.setattr(videos, "prepare", prepared)
    assert learn("--from", "recordings", "--classes", "peep", "--max-loss-db", "inf") == 0
    listing, recipe = listed[0]
    assert [v.split for v in listing.videos] == ["test", "val", *["train"] * 5]
    assert (recipe.rate_hz, recipe.frames, recipe.frame_size, recipe.object) == (RATE, True, 32, None)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    for number in range(3, len(clips)):
        (folder / f"{number}.wav").unlink()
    (folder.parent / "chirp").mkdir()
    shutil.copy(folder / "0.wav", folder.parent / "chirp")
    capsys.readouterr()
    assert learn("--from", "recordings", "--classes", "chirp") == 2
    assert "too few recordings in recordings, 1: give 4 or more" in capsys.readouterr().err

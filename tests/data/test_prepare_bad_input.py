"""What people give ``avsep data prepare`` by mistake, each with what comes of it.

Refused: one clear line, exit code 2, and everything is byte for byte as it was. Or recorded: the video has a status and
a reason, and the others are prepared.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from avsep.cli import main
from avsep.data.prepare.listings import list_folder
from avsep.data.prepare.videos import make_recipe, prepare
from avsep.data.store import Store
from support.folders import contents
from support.media_files import tone, write_video
from support.tones import make_tone_store
from support.video_shelf import DAMAGED, write_damaged, write_good

pytest.importorskip("av")
SOUND = ("--object", "none", "--motion", "none")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    write_good(folder / "good.mp4", 1)
    make_tone_store(folder / "tones", seconds=0.2)
    return folder


@dataclass
class Desk:
    path: Path
    shelf: Path

    @property
    def root(self) -> Path:
        """A good data set: two classes, a video each."""
        for name in ("ding", "hum"):
            (self.path / "videos" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(self.shelf / "good.mp4", self.path / "videos" / name / "a.mp4")
        return self.path / "videos"

    def file(self, name: str, content: str | bytes = "") -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def argv(self, *more, dataset="folder", root=None, out=None, see=False) -> list:
        root = root or self.root
        return [
            "data",
            "prepare",
            dataset,
            "--root",
            root,
            "--out",
            out or self.path / "new",
            *(() if see else SOUND),
            *more,
        ]

    def table(self, text: str) -> list:
        return self.argv("--table", self.file("t.csv", text))

    def music(self, lists: object, *more) -> list:
        self.file("videos/MUSIC21_solo_videos.json", json.dumps(lists))
        return self.argv(*more, dataset="music21")

    def ave(self, lines: str, sets: str | None = None) -> list:
        self.file("videos/Annotations.txt", "Category&VideoID&Quality&StartTime&EndTime\n" + lines)
        for name in ("trainSet", "valSet", "testSet") if sets is not None else ():
            self.file(f"videos/{name}.txt", sets)
        return self.argv(dataset="ave")

    def splits(self, data: object, name: str = "lists.pkl") -> list:
        self.file(name)
        with open(self.path / name, "wb") as file:
            pickle.dump(data, file)
        return self.argv("--splits", self.path / name, dataset="music21")


class Evil:
    """A pickle that would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _hostile_array(d: Desk) -> list:
    np.save(d.path / "train_category_vids_dict.npy", {"ding": [Evil(d.path / "mark")]}, allow_pickle=True)
    return d.argv("--splits", d.path / "train_category_vids_dict.npy", dataset="music21")


def _other_settings(d: Desk) -> list:
    recipe = make_recipe(object=None, motion=None)
    prepare(list_folder(d.root), d.path / "new", recipe, jobs=0, progress=False)
    return d.argv("--rate", 16000)


def _synth_store(d: Desk) -> list:
    shutil.copytree(d.shelf / "tones", d.path / "new")
    return d.argv()


def _two_names(d: Desk) -> list:
    shutil.copy(d.shelf / "good.mp4", d.root / "ding" / "a.mkv")
    return d.argv()


def _latin_1(d: Desk) -> list:
    shutil.copy(d.shelf / "good.mp4", os.fsdecode(os.fsencode(d.root) + b"/ding/caf\xe9.mp4"))
    return d.argv()


def _all_damaged(d: Desk) -> list:
    return d.argv(root=d.file("dead/ding/a.mp4", b"no video").parents[1])


def _damaged_weights(d: Desk) -> list:
    d.file("w/clip-vit-base-patch32/config.json", "{}")
    return d.argv("--weights", d.path / "w", "--motion", "none", "--detector", "none", see=True)


LISTS = {"videos": {"violin": ["aaaaaaaaaaa"], "flute": ["bbbbbbbbbbb"]}}
REFUSED = {
    # where the videos are
    "no such root": (lambda d: d.argv(root=d.path / "no"), "desk/no", "--root"),
    "a file for the root": (lambda d: d.argv(root=d.shelf / "good.mp4"), "good.mp4 is a file", "--root"),
    "empty root": (lambda d: d.argv(root=d.file("e/x.txt").parent), "holds no videos", "a class"),
    "a video outside of the classes": (lambda d: [d.file("videos/b.mp4", b"x"), *d.argv()][1:], "b.mp4", "CLASS"),
    "splits and classes side by side": (
        lambda d: [d.file("videos/train/ding/b.mp4", b"x"), *d.argv()][1:],
        *("'train'", "'ding'"),
    ),
    "two videos of one name": (_two_names, "'ding-a'", "a.mkv", "rename"),
    "a name that is not UTF-8": (_latin_1, "caf\ufffd.mp4", "UTF-8", "rename"),
    "unknown data set": (lambda d: d.argv(dataset="music-21"), "'music-21'", "'music21'"),
    "unknown class": (lambda d: d.argv("--classes", "dign"), "'dign'", "'ding'"),
    "class twice": (lambda d: d.argv("--classes", "ding,ding"), "'ding'", "twice"),
    "an option of another data set": (lambda d: d.argv("--events"), "--events", "ave"),
    "shares that are none": (lambda d: d.argv("--shares", "80,20"), "80", "three numbers"),
    # tables
    "no such table": (lambda d: d.argv("--table", d.path / "no.csv"), "no.csv", "no such file"),
    "missing columns": (lambda d: d.table("file,label\na,b\n"), "t.csv", "'path'", "file, label"),
    "empty table": (lambda d: d.table("path,class,split\n"), "t.csv", "no videos"),
    "path outside": (lambda d: d.table("path,class\n../x.mp4,ding\n"), "line 2", "outside"),
    "absolute path outside": (lambda d: d.table("path,class\n/etc/passwd,ding\n"), "/etc/passwd", "outside"),
    "duplicate ids": (
        lambda d: d.table("path,class,split,id\nding/a.mp4,ding,train,x\nhum/a.mp4,hum,test,x\n"),
        *("'x'", "hum/a.mp4"),
    ),
    "unknown split": (lambda d: d.table("path,class,split\nding/a.mp4,ding,dev\n"), "line 2", "'dev'", "val"),
    "an end before the start": (
        lambda d: d.table("path,class,start,end\nding/a.mp4,ding,3,2\n"),
        *("line 2", "end"),
    ),
    "times that are no numbers": (
        lambda d: d.table("path,class,start,end\nding/a.mp4,ding,0:30,0:40\n"),
        *("'0:30'", "seconds"),
    ),
    "a frame for a table": (
        lambda d: d.argv("--table", d.file("t.csv", b"\x89PNG\xff\xfe\x00")),
        *("t.csv", "UTF-8"),
    ),
    "a table of videos that are all gone": (lambda d: d.table("path,class\nno.mp4,ding\n"), "none of the 1", "no.mp4"),
    # published lists
    "no annotation file": (lambda d: d.argv(dataset="music21"), "MUSIC21_solo_videos.json", "--annotations"),
    "annotations of another kind": (lambda d: d.music(["a", "b"]), "MUSIC21_solo_videos.json", "CLASS"),
    "damaged annotations": (
        lambda d: [d.file("videos/MUSIC21_solo_videos.json", "{"), *d.argv(dataset="music21")][1:],
        *("MUSIC21_solo_videos.json", "JSON"),
    ),
    "none of the listed videos": (lambda d: d.music(LISTS), "none of the 2", "bbbbbbbbbbb.mp4"),
    "AVE without its sets": (lambda d: d.ave("Violin&aaa&good&0&10\n"), "trainSet.txt", "--splits"),
    "AVE in another form": (lambda d: d.ave("Violin,aaa,good,0,10\n", ""), "Annotations.txt, line 2", "Category&"),
    "VGGSound without its list": (lambda d: d.argv(dataset="vggsound"), "vggsound.csv", "--annotations"),
    "VGGSound in another form": (
        lambda d: [d.file("videos/vggsound.csv", "a,b\n"), *d.argv(dataset="vggsound")][1:],
        *("vggsound.csv, line 1", "label"),
    ),
    "no such splits": (lambda d: d.argv("--splits", d.path / "no.npy", dataset="music21"), "no.npy", "splits"),
    "hostile pickle": (
        lambda d: d.splits({"train": {"ding": [Evil(d.path / "mark")]}}),
        "mkdir",
        "nothing of it was run",
    ),
    "hostile array": (_hostile_array, "mkdir", "nothing of it was run"),
    "annotations nested without end": (
        lambda d: [
            d.root,
            d.file("videos/MUSIC21_solo_videos.json", "[" * 100000),
            *d.argv(dataset="music21"),
        ][2:],
        *("MUSIC21_solo_videos.json", "JSON"),
    ),
    "truncated pickle": (
        lambda d: d.argv("--splits", d.file("l.pkl", pickle.dumps({"train": {"a": ["b"]}})[:-9]), dataset="music21"),
        *("l.pkl", "copy it again"),
    ),
    "splits that are none": (lambda d: d.splits({"ding": ["a"]}), "lists.pkl", "'ding'", "train, val and test"),
    "numbers for classes": (lambda d: d.splits({"train": {0: ["a"]}}), "class 0", "category_encode_dict"),
    "ids that lead out of the store": (
        lambda d: d.splits({"train": {"ding": ["a", "x/../../y"]}}),
        *("'x/../../y'", "'ding'", "correct the list"),
    ),
    "ids too long for a file": (lambda d: d.splits({"train": {"ding": ["a", "i" * 300]}}), "iii", "correct the list"),
    "ids that are no text": (lambda d: d.splits({"train": {"ding": ["a", "\ud800"]}}), "\\ud800", "correct the list"),
    "a class name of two lines": (lambda d: d.splits({"train": {"di\nng": ["a"]}}), r"'di\nng'", "class"),
    "one video in two splits": (lambda d: d.splits({"train": {"ding": ["a"]}, "test": {"ding": ["a"]}}), "a", "train"),
    # where the store goes
    "out is a file": (lambda d: d.argv(out=d.file("taken", "mine")), "taken", "is a file"),
    "out below a file": (lambda d: d.argv(out=d.file("taken", "mine") / "store"), "taken", "is a file"),
    "out holds something": (lambda d: [d.file("new/letter.txt", "dear"), *d.argv()][1:], "new", "letter.txt"),
    "out is another data set's store": (_synth_store, "other settings", "--force"),
    "out was made with other options": (_other_settings, "sample_rate_hz: 11025, now 16000", "--force"),
    "out in the root": (lambda d: d.argv(out=d.root / "store"), "one in the other"),
    "root in out": (lambda d: d.argv(out=d.path), "one in the other"),
    # what is made
    "no weights": (lambda d: d.argv(see=True), "hf download openai/clip-vit-base-patch32", "AVSEP_WEIGHTS"),
    "weights of the detector missing": (
        lambda d: _no_detector(d),
        *("owlv2-base-patch16-ensemble", "hf download google/owlv2"),
    ),
    "weights folder without weights": (_damaged_weights, "clip-vit-base-patch32", "model.safetensors"),
    "unknown extractor": (lambda d: d.argv("--object", "clip_vit_b16", "--motion", "none", see=True), "'clip_vit_b32'"),
    "an extractor of the other role": (
        lambda d: d.argv("--object", "videomae_base", "--motion", "none", see=True),
        *("object features 'videomae_base'", "clip_vit_b32"),
    ),
    "unknown detector": (lambda d: d.argv("--frames", "--detector", "detic"), "'detic'", "owlv2"),
    "unknown engine": (lambda d: d.argv("--engine", "spark"), "'spark'", "ray"),
    "a rate in kHz": (lambda d: d.argv("--rate", 11), "11", "Hz"),
    "negative seconds": (lambda d: d.argv("--min-seconds", -1), "-1", "above 0"),
}


def _no_detector(d: Desk) -> list:
    (d.path / "w").mkdir()
    return d.argv("--frames", "--weights", d.path / "w")


@pytest.fixture
def desk(tmp_path, shelf, nowhere):
    made = Desk(tmp_path / "desk", shelf)
    made.path.mkdir()
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_with_nothing_written(name, desk, capfd):
    make, *told = REFUSED[name]
    argv = make(desk)
    before = contents(desk.path)
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if line.strip() and not line.startswith("note: ")]
    assert len(lines) == 1, shown.err
    for text in told:
        assert text in lines[0]
    after = {k: v for k, v in contents(desk.path).items() if not k.endswith(".lock")}
    assert after == {k: v for k, v in before.items() if not k.endswith(".lock")}
    assert not (desk.path / "mark").exists()


# --- recorded ---------------------------------------------------------------------------------------------------------


def _garbled_sound(folder: Path, good: bytes) -> None:
    data = bytearray(good)
    begin = data.find(b"mdat") + 64
    data[begin : begin + 6000] = np.random.default_rng(0).bytes(6000)
    (folder / "noise.mp4").write_bytes(data)


RECORDED = {
    **{name: (lambda folder, good: write_damaged(folder, good), name, status) for name, status in DAMAGED.items()},
    "a link to nothing": (lambda f, g: (f / "link.mp4").symlink_to(f / "nowhere.mp4"), "link.mp4", "missing"),
    "noise in the middle": (_garbled_sound, "noise.mp4", "broken"),
    "a text called wav": (lambda f, g: (f / "x.wav").write_bytes(b"la" * 99), "x.wav", "broken"),
    "NaN samples": (lambda f, g: _nan(f / "nan.wav"), "nan.wav", "broken"),
}


def _nan(path: Path) -> None:
    import soundfile

    soundfile.write(path, np.full(16000, np.nan, np.float32), 8000, subtype="FLOAT")


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_with_its_reason_and_passed_over(name, shelf, tmp_path):
    make, file, status = RECORDED[name]
    folder = tmp_path / "videos" / "ding"
    folder.mkdir(parents=True)
    shutil.copy(shelf / "good.mp4", folder / "a.mp4")
    make(folder, (shelf / "good.mp4").read_bytes())
    (tmp_path / "t.csv").write_text(f"path,class,split\nding/a.mp4,ding,train\nding/{file},ding,test\n")
    listing = list_folder(tmp_path / "videos", table=tmp_path / "t.csv")
    recipe = make_recipe(object=None, motion=None, frames=status == "no_video", detector=None)
    result = prepare(listing, tmp_path / "store", recipe, jobs=0, progress=False)
    assert [c.id for c in Store.open(tmp_path / "store", verify=True).clips] == ["ding-a"]
    assert [(e["status"], e["split"]) for e in result.skipped] == [(status, "test")]
    assert file in result.skipped[0]["reason"]


def test_all_of_them_damaged_is_refused_and_told(desk, capfd):
    argv = _all_damaged(desk)
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    assert "none of the 1 videos" in capfd.readouterr().err
    assert "broken" in (desk.path / "new" / "videos.csv").read_text()


def test_they_are_at_least_twenty_five():
    assert len(REFUSED) + len(RECORDED) >= 25


def test_what_is_unusual_and_fine(tmp_path):
    """Names with spaces and dots, 5.1 sound, another suffix, a nested folder."""
    root = tmp_path / "videos"
    (root / "church bell" / "tower 1").mkdir(parents=True)
    surround = np.tile(tone(1.2, 16000), (6, 1))
    write_video(root / "church bell" / "my video.v2.mkv", None, surround, rate_hz=16000, layout="5.1")
    write_good(root / "church bell" / "tower 1" / "ü.mp4", 0)
    (root / "church bell" / "readme.txt").write_text("hello")
    listing = list_folder(root)
    assert listing.notes == ("1 files of other kinds are passed over",)
    store = prepare(listing, tmp_path / "store", make_recipe(object=None, motion=None), jobs=0, progress=False).store
    assert [c.id for c in store.clips] == ["church_bell-my_video.v2", "church_bell-tower_1-ü"]
    assert store.classes == ("church bell",)

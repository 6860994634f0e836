"""Layouts of data sets on disk, and lists that others have published, read without running anything of them."""

from __future__ import annotations

import codecs
import json
import os
import pickle
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest

from avsep.cli.data_command import _print_availability
from avsep.data.prepare import published
from avsep.data.prepare.listings import list_ave, list_folder, list_music21, list_vggsound, read_splits
from avsep.data.prepare.published import read_published
from avsep.data.store import StoreWriter
from avsep.data.store.checking import availability
from avsep.data.store.official import OFFICIAL
from avsep.errors import DataError

IDS = [f"{letter * 10}{n}" for letter in "abcdef" for n in range(4)]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"video")


def found(listing):
    return {v.id: (v.class_name, v.split, v.file) for v in listing.videos}


# --- one's own ------------------------------------------------------------------------------------------------------


def test_a_folder_a_class(tmp_path):
    touch(
        tmp_path,
        "hum/b.mp4",
        "hum/a.MKV",
        "hum/deep/c.wav",
        "ding/a.mp4",
        "hum/notes.txt",
        ".cache/x/z.mp4",
        "ding/.a.mp4",
    )
    (tmp_path / "empty").mkdir()
    listing = list_folder(tmp_path)
    assert listing.classes == ("ding", "hum")
    assert [v.id for v in listing.videos] == ["ding-a", "hum-a", "hum-b", "hum-deep-c"]
    assert listing.notes == (
        "1 files of other kinds are passed over",
        "the folder 'empty' holds no videos: it is no class",
    )
    assert listing.origin["splits"]["by"] == "hash of the id"
    before = {v.id: v.split for v in listing.videos}
    touch(tmp_path, *(f"hum/new{k}.mp4" for k in range(30)))
    after = list_folder(tmp_path)
    assert {v.id: v.split for v in after.videos if v.id in before} == before
    assert {v.split for v in after.videos} == {"train", "val", "test"}
    assert list_folder(tmp_path, classes=["hum", "ding"]).classes == ("hum", "ding")


def test_a_folder_a_split(tmp_path):
    touch(tmp_path, "train/hum/1.mp4", "validation/hum/1.mp4", "Test/ding/1.mp4")
    assert found(list_folder(tmp_path)) == {
        "hum-train-1": ("hum", "train", "train/hum/1.mp4"),
        "hum-val-1": ("hum", "val", "validation/hum/1.mp4"),
        "ding-test-1": ("ding", "test", "Test/ding/1.mp4"),
    }


def test_a_table(tmp_path):
    touch(tmp_path, "v/a.mp4", "v/b.mp4")
    table = tmp_path / "t.csv"
    table.write_text(
        "split,path,class,id\nval,v/a.mp4,hum,\n,v/b.mp4,hum,\ntest,v/c.mp4,ding,mine\n", encoding="utf-8-sig"
    )
    videos = list_folder(tmp_path, table=table).videos
    assert [(v.id, v.split, v.file, v.looked_for) for v in videos] == [
        ("mine", "test", "", "v/c.mp4"),
        ("hum-v-a", "val", "v/a.mp4", "v/a.mp4"),
        ("hum-v-b", videos[2].split, "v/b.mp4", "v/b.mp4"),
    ]


# --- published data sets --------------------------------------------------------------------------------------------


def music(folder, lists):
    (folder / "MUSIC21_solo_videos.json").write_text(json.dumps({"version": 2.0, "videos": lists}))


def test_music21_by_its_list_and_by_the_papers(tmp_path):
    root = tmp_path / "videos"
    touch(root, f"violin/{IDS[0]}.mp4", f"flat/{IDS[4]}.webm", f"flute/A title [{IDS[5]}].mp4", f"{IDS[8]}.mp4")
    music(root, {"violin": IDS[:4], "flute": [*IDS[4:8], IDS[4]], "congas": IDS[8:12], "tuba": [IDS[0]]})
    listing = list_music21(root)
    assert listing.classes == ("flute", "tuba", "violin")  # the order of the paper's tasks, without congas
    assert listing.notes == ("1 videos are listed twice and count once",)
    files = {v.id: v.file for v in listing.videos}
    assert files[f"{IDS[0]}-violin"] == f"violin/{IDS[0]}.mp4"  # in two classes
    assert (files[IDS[4]], files[IDS[5]], files[IDS[6]]) == (f"flat/{IDS[4]}.webm", f"flute/A title [{IDS[5]}].mp4", "")
    assert list_music21(root, classes=["congas"]).videos[0].file == f"{IDS[8]}.mp4"

    lists = tmp_path / "lists"
    lists.mkdir()
    for split, ids in (("train", IDS[:2]), ("val", IDS[2:3]), ("test", IDS[3:4])):
        np.save(lists / f"{split}_category_vids_dict.npy", {"violin": ids, "flute": [i + "x" for i in ids]})
    listing = list_music21(root, splits=lists)
    assert listing.classes == ("flute", "violin")
    assert [(v.id, v.split) for v in listing.videos if v.class_name == "violin"] == [
        *((i, "train") for i in IDS[:2]),
        (IDS[2], "val"),
        (IDS[3], "test"),
    ]
    assert listing.origin["splits"]["by"] == "published lists"
    assert sorted(listing.origin["splits"]["files"]) == [
        f"{s}_category_vids_dict.npy" for s in ("test", "train", "val")
    ]


def test_ave_as_published(tmp_path):
    root = tmp_path / "AVE_Dataset"
    touch(root, f"AVE/{IDS[0]}.mp4", f"AVE/{IDS[1]}.mp4")
    lines = [
        f"Church bell&{IDS[0]}&good&2&7",
        f"Violin, fiddle&{IDS[1]}&good&0&10",
        f"Violin, fiddle&{IDS[0]}&good&7&10",
    ]
    (root / "Annotations.txt").write_text(
        "\n".join(["Category&VideoID&Quality&StartTime&EndTime", *lines, f"Truck&{IDS[3]}&good&0&10"])
    )
    for name, line in zip(("trainSet", "valSet", "testSet"), lines, strict=True):
        (root / f"{name}.txt").write_text(line + "\n")
    listing = list_ave(tmp_path, events=True)
    assert {(v.id, v.class_name, v.split, v.span) for v in listing.videos} == {
        (f"{IDS[0]}-church_bell", "church_bell", "train", (2.0, 7.0)),
        (IDS[1], "violin_fiddle", "val", (0.0, 10.0)),
        (f"{IDS[0]}-violin_fiddle", "violin_fiddle", "test", (7.0, 10.0)),
    }
    assert listing.notes == ("1 annotations are in none of the lists of splits, and are left out",)
    assert all(v.span is None for v in list_ave(tmp_path).videos)


def test_vggsound_with_its_split_and_with_av_cils(tmp_path):
    touch(tmp_path, f"video/{IDS[0]}_000030.mp4", f"video/{IDS[1]}_5.mp4", f"video/{IDS[2]}.mp4")
    rows = [(IDS[0], 30, "train"), (IDS[1], 5, "test"), (IDS[2], 140, "train"), (IDS[3], 0, "test")]
    (tmp_path / "vggsound.csv").write_text("".join(f'{i},{s},"playing violin, fiddle",{p}\n' for i, s, p in rows))
    listing = list_vggsound(tmp_path)
    videos = {v.id: v for v in listing.videos}
    assert videos[f"{IDS[0]}_000030"].file.endswith("_000030.mp4")
    assert videos[f"{IDS[0]}_000030"].span is None
    assert videos[f"{IDS[1]}_000005"].split == "test"
    assert (videos[f"{IDS[2]}_000140"].span, videos[f"{IDS[2]}_000140"].only_longer) == ((140.0, 150.0), True)
    assert videos[f"{IDS[3]}_000000"].file == ""
    lists = tmp_path / "lists"
    lists.mkdir()
    splits = {"train": {0: [IDS[0]]}, "val": {0: [f"{IDS[1]}_000005"]}, "test": {0: []}}
    np.save(lists / "all_classId_vid_dict.npy", splits)
    np.save(lists / "category_encode_dict.npy", {"playing violin, fiddle": 0})
    assert [(v.id, v.split) for v in list_vggsound(tmp_path, splits=lists).videos] == [
        (f"{IDS[0]}_000030", "train"),
        (f"{IDS[1]}_000005", "val"),
    ]


def test_splits_of_two_names_and_json_as_windows_writes_it(tmp_path):
    (tmp_path / "a.csv").write_text(
        "id,class,split\na,hum,train\nb,hum,Train\nc,hum,training\nd,hum,val\na,hum,train\n"
    )
    assert read_splits(tmp_path / "a.csv") == {"train": {"hum": ["a", "b", "c"]}, "val": {"hum": ["d"]}}
    (tmp_path / "b.json").write_text('{"valid": {"hum": ["a"]}, "val": {"hum": ["b"]}}', encoding="utf-8-sig")
    assert read_splits(tmp_path / "b.json") == {"val": {"hum": ["a", "b"]}}


# --- what others have pickled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(tmp_path, protocol):
    lists = {"train": OrderedDict(violin=np.array(["a", "b"])), "val": {"violin": ("c",)}, "test": {"violin": ["d"]}}
    lists["test"]["flute"] = np.array(["é", "f"], dtype=object)
    other = {"n": np.int64(4), "s": {"x"}, 3: [1.5, None, True], "b": b"bytes", "t": np.str_("u")}
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump({**lists, "other": other}, file, protocol=protocol)
    assert read_published(tmp_path / "a.pkl") == {
        "train": {"violin": ["a", "b"]},
        "val": {"violin": ["c"]},
        "test": {"violin": ["d"], "flute": ["é", "f"]},
        "other": {"n": 4, "s": ["x"], 3: [1.5, None, True], "b": "bytes", "t": "u"},
    }
    with open(tmp_path / "b.pkl", "wb") as file:
        pickle.dump(lists, file, protocol=protocol)
    assert read_splits(tmp_path / "b.pkl")["train"] == {"violin": ["a", "b"]}


class Calls:
    def __init__(self, what, *arguments):
        self.what = (what, arguments)

    def __reduce__(self):
        return self.what


def bomb():
    value = ["x"]
    for _ in range(15):
        value = [value] * 10
    return value


HOSTILE = {
    "a command": lambda: Calls(os.system, "touch mark"),
    "eval": lambda: Calls(eval, "open('mark', 'w')"),
    "getattr": lambda: Calls(getattr, "", "join"),
    "a partial": lambda: Calls(__import__("functools").partial, os.mkdir, "mark"),
    "an unpickler": lambda: Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, "mark"))),
    "a class": lambda: DataError("x"),
    "lists in lists": bomb,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("suffix", [".pkl", ".npy"])
def test_hostile_ones_are_refused_and_nothing_of_them_is_run(name, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "_MOST_VALUES", 10_000)  # of lists in lists, the same in less time
    path = tmp_path / f"lists{suffix}"
    if suffix == ".npy":
        np.save(path, {"train": HOSTILE[name]()}, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps({"train": HOSTILE[name]()}))
    with pytest.raises(DataError, match="nothing of it was run") as error:
        read_published(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mark").exists()


def npy(descr, shape, body=b""):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def doubled(times):
    value = ["x"]
    for _ in range(times):
        value = [value, value]
    return value


GREEDY = {
    "a place far out in the memo": (".pkl", lambda: b"\x80\x02]r\x00\x00\x00\x08."),
    "the same in letters": (".pkl", lambda: b"]p134217728\n."),
    "a byte array that is not there": (".pkl", lambda: b"\x80\x05\x96" + (1 << 30).to_bytes(8, "little") + b"."),
    "bytes by their number": (
        ".pkl",
        lambda: pickle.dumps(Calls(np._core.numeric._frombuffer, 1 << 29, np.dtype("i1"), (1 << 29,), "C")),
    ),
    "the name of a type": (".pkl", lambda: pickle.dumps(Calls(np.dtype, doubled(22)))),
    "bytes in letters": (".pkl", lambda: pickle.dumps(Calls(codecs.encode, doubled(22), "latin1"))),
    "sets of one list": (
        ".pkl",
        lambda: b"(]q\x00(" + b"K\x01" * 50_000 + b"ecbuiltins\nset\nq\x01" + b"h\x01h\x00\x85R" * 900 + b"l.",
    ),
    "the same bytes again": (
        ".pkl",
        lambda: b"\x80\x03B" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x00](" + b"h\x00" * 200 + b"e.",
    ),
    "a number of a million digits": (".pkl", lambda: pickle.dumps({"train": {1 << 4_000_000: ["a"]}})),
    "an array that is not there": (".npy", lambda: npy("<f8", (1 << 27,))),
    "an array of nothing": (".npy", lambda: npy("<f8", (1 << 24, 0))),
    "a text of no letters": (".npy", lambda: npy("<U0", (1 << 24,))),
    "an array of times": (".npy", lambda: npy("<M8[s]", (1,), bytes(8))),
    "numbers without end": (".npy", lambda: npy("|i1", (8_000_000,), bytes(8_000_000))),
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_few_bytes_that_ask_for_much_memory_are_refused(name, tmp_path):
    suffix, make = GREEDY[name]
    path = tmp_path / f"lists{suffix}"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as error:
            read_published(path)
        assert tracemalloc.get_traced_memory()[1] < 48e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


def test_plain_arrays_are_read(tmp_path):
    for number, array in enumerate(
        (np.array(["a", "é"]), np.arange(6).reshape(2, 3), np.asfortranarray([[1, 2], [3, 4]]))
    ):
        np.save(tmp_path / f"{number}.npy", array)
        assert read_published(tmp_path / f"{number}.npy") == array.tolist()


def test_what_a_pickle_may_call_cannot_be_changed_by_it(tmp_path):
    """BUILD on a stand-in would set attributes for all pickles that come later."""
    from avsep.data.prepare.published import _StandIn

    for state in (b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x08\x00\x00\x00__call__K\x01s\x86"):
        (tmp_path / "a.pkl").write_bytes(b"\x80\x02cnumpy\nndarray\n" + state + b"b.")
        with pytest.raises(DataError, match="nothing of it was run"):
            read_published(tmp_path / "a.pkl")
    assert not hasattr(_StandIn("ndarray", [0]), "a")
    for data in (b"", b"\x80\x04", b"garbage", b"\x80\x02cnumpy\nndarray\n(tR."):
        (tmp_path / "a.pkl").write_bytes(data)
        with pytest.raises(DataError):
            read_published(tmp_path / "a.pkl")


# --- official counts ------------------------------------------------------------------------------------------------


def test_published_counts_add_up():
    counts = OFFICIAL["music21"]
    assert {s: sum(c[s] for c in counts.classes.values()) for s in counts.splits} == dict(counts.splits)
    assert counts.total == 1040
    assert len(counts.classes) == 20


def prepared(path, dataset, by):
    """A store as if prepared: two clips there, one broken and one gone."""
    origin = {"generator": "avsep data prepare", "dataset": dataset, "splits": {"by": by}}
    with StoreWriter(path, classes=["violin", "flute"], sample_rate_hz=8000, origin=origin) as writer:
        for clip, split in (("a", "train"), ("b", "test")):
            writer.write_clip(clip, "violin", split, np.full(8000, 900, np.int16), about={"status": "ok"})
        for clip, status in (("c", "broken"), ("d", "missing")):
            told = {"class": "flute", "split": "train", "status": status, "reason": "x", "source": None}
            writer.note_skipped(clip, told)
        return writer.finish(list("abcd"), roles={})


def test_availability_is_held_against_them(tmp_path, capsys):
    from rich.console import Console

    store = prepared(tmp_path / "a", "music21", "published lists")
    found = availability(store)
    assert (found.split(found.there, "train"), found.split(found.listed, "train")) == (1, 3)
    assert found.reasons == {"broken": 1, "missing": 1}
    _print_availability(Console(width=200), found, list(store.classes))
    text = " ".join(capsys.readouterr().out.split())
    assert "violin │ 1 of 1 (63) │ 0 of 0 (5) │ 1 of 1 (5)" in text
    assert "flute │ 0 of 2 (33)" in text
    assert "train 840, val 100, test 100" in text
    assert "1 broken, 1 missing" in text
    for number, (dataset, by, said) in enumerate(
        (
            ("ave", "published lists", "single classes are not known"),
            ("music21", "hash of the id", "not those lists'"),
            ("folder", "as given", "no published counts"),
        )
    ):
        store = prepared(tmp_path / f"b{number}", dataset, by)
        _print_availability(Console(width=200), availability(store), list(store.classes))
        out = capsys.readouterr().out
        assert said in out
        assert "(63)" not in out

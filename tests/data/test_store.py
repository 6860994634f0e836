"""The store: reads, the writer's resume and lock, damaged folders; and the visual file."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import subprocess
import sys
import tracemalloc
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsep.data.store import Store, StoreWriter, add_features, remove_store, timelines_of
from avsep.data.store.checking import availability, check_store
from avsep.errors import DataError, RunError, UnknownNameError
from avsep.media.timeline import VisualTimeline, read_visual_file, write_visual_file
from avsep.types import VisualSource
from support.folders import contents

RATE = 11025
SECONDS = 4
CLASSES = ["flute", "piano"]
ORIGIN = {"generator": "test"}
OBJECT = VisualSource("object", "frames", frames=3)
MOTION = VisualSource("motion", "frames")


def _ramp(number: int) -> np.ndarray:
    """Audio in which every sample tells its place, as int16."""
    return ((np.arange(SECONDS * RATE) + 7 * number) % 30000).astype(np.int16)


def _counted(count: int, *shape: int) -> np.ndarray:
    """Frames in which every pixel is the frame's number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, *(1 for _ in shape)), (count, *shape)).copy()


def _write(writer: StoreWriter, number: int) -> str:
    name, split = CLASSES[number % 2], ("train", "val", "test")[number // 2]
    clip_id = f"{name}-{split}"
    writer.write_clip(
        clip_id,
        name,
        split,
        _ramp(number),
        object_frames=_counted(SECONDS, 3, 6, 6),
        motion_frames=_counted(8 * SECONDS, 1, 4, 4),
    )
    return clip_id


def _make(path: Path) -> Store:
    with StoreWriter(path, classes=CLASSES, sample_rate_hz=RATE, origin=ORIGIN) as writer:
        return writer.finish([_write(writer, n) for n in range(6)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("store") / "store").path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def _edit(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    (path / "manifest.json").write_text(json.dumps(manifest))


# reading


def test_clips_keep_the_manifests_order_and_selection_filters(made: Path) -> None:
    store = Store.open(made, verify=True)
    assert [c.index for c in store.clips] == list(range(6))
    assert [c.id for c in store.select(classes=["piano"])] == ["piano-train", "piano-val", "piano-test"]
    assert [c.id for c in store.select(split="val")] == ["flute-val", "piano-val"]
    assert [c.id for c in store.clips_by_id(["piano-val", "flute-train"])] == ["piano-val", "flute-train"]
    with pytest.raises(UnknownNameError, match="did you mean 'flute'"):
        store.select(classes=["flut"])
    with pytest.raises(UnknownNameError, match="no split 'dev'"):
        store.select(split="dev")
    with pytest.raises(UnknownNameError, match="no clip 'flute-tran'"):
        store.clip("flute-tran")


def test_audio_is_exact_inside_and_silent_outside(made: Path) -> None:
    store = Store.open(made)
    clip = store.clips[3]
    expected = _ramp(3).astype(np.float32) / 32768
    assert np.array_equal(store.read_audio(clip), expected)
    assert np.array_equal(store.read_audio(clip, 1000, 50), expected[1000:1050])
    assert np.array_equal(store.read_audio(clip, -10, 30), np.concatenate([np.zeros(10), expected[:20]]))
    end = len(expected)
    assert np.array_equal(store.read_audio(clip, end - 5, 20), np.concatenate([expected[-5:], np.zeros(15)]))
    assert not store.read_audio(clip, 2 * end, 10).any()
    assert store.read_audio(clip, 0, 0).shape == (0,)
    wrapped = store.read_audio(clip, -3, end + 6, tile=True)
    assert np.array_equal(wrapped, np.concatenate([expected[-3:], expected, expected[:3]]))


def test_audio_reads_stream(tmp_path: Path) -> None:
    """A short read from a long file must not bring the file into memory."""
    with StoreWriter(tmp_path / "s", classes=["flute"], sample_rate_hz=RATE, origin=ORIGIN) as writer:
        motion = np.zeros((2000, 1, 48, 48), np.uint8)
        writer.write_clip("a", "flute", "train", np.ones(4_000_000, np.int16), motion_frames=motion)
        store = writer.finish(["a"])
    tracemalloc.start()
    store.read_audio(store.clips[0], 3_000_000, 1000)
    store.read_visual(store.clips[0], MOTION, centre_s=100, duration_s=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000, f"{peak} bytes were held for a read of 2,000"


@pytest.mark.parametrize(
    ("centre_s", "frames"),
    [(1.5, [0, 1, 2]), (2.0, [1, 2, 3]), (2.99, [1, 2, 3]), (0.2, [0, 0, 1]), (3.9, [2, 3, 3]), (99.0, [3, 3, 3])],
)
def test_object_frames_surround_the_centre(made: Path, centre_s: float, frames: list[int]) -> None:
    store = Store.open(made)
    found = store.read_visual(store.clips[0], OBJECT, centre_s=centre_s, duration_s=2.0)
    assert found.shape == (3, 3, 6, 6)
    assert found[:, 0, 0, 0].tolist() == frames


@pytest.mark.parametrize(
    ("centre_s", "first", "last"), [(2.0, 8, 23), (0.5, 0, 11), (3.5, 20, 31), (-9.0, 0, 0), (99.0, 31, 31)]
)
def test_motion_frames_cover_the_crop(made: Path, centre_s: float, first: int, last: int) -> None:
    store = Store.open(made)
    found = store.read_visual(store.clips[0], MOTION, centre_s=centre_s, duration_s=2.0)
    assert found.shape == (16, 1, 4, 4)
    start = round((centre_s - 1) * 8)
    assert found[:, 0, 0, 0].tolist() == np.clip(np.arange(start, start + 16), 0, 31).tolist()
    assert (found[0, 0, 0, 0], found[-1, 0, 0, 0]) == (first, last)


def test_motion_length_does_not_depend_on_the_place(made: Path) -> None:
    store = Store.open(made)
    lengths = {
        len(store.read_visual(store.clips[0], MOTION, centre_s=c, duration_s=65535 / RATE))
        for c in np.linspace(0, SECONDS, 57)
    }
    assert lengths == {48}


def test_pickled_store_reads_the_same(made: Path) -> None:
    store = Store.open(made)
    before = store.read_visual(store.clips[1], MOTION, centre_s=2, duration_s=1)
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read_visual(again.clips[1], MOTION, centre_s=2, duration_s=1), before)
    assert again.content_hash == store.content_hash


def test_open_maps_are_bounded(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avsep.data.store.files._OPEN_MAPS", 3)
    store = Store.open(made)
    timelines = [store.timeline(clip) for clip in store.clips * 2]
    assert len(store._maps) == 3
    for timeline in timelines:  # maps that were closed are read all the same
        assert timeline.read(MOTION, 1, 1)[0, 0, 0, 0] == 4


def test_files_beyond_those_held_are_read_by_position(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Store.open(made)
    monkeypatch.setattr("avsep.data.store.files._HELD_MAPS", 2)
    store = Store.open(made)
    for clip in store.clips * 2:
        for source in (OBJECT, MOTION):
            one, other = (s.read_visual(clip, source, centre_s=1, duration_s=1) for s in (store, held))
            assert np.array_equal(one, other)
        assert np.array_equal(store.read_crop(clip, -9, 700, 1.2), held.read_crop(clip, -9, 700, 1.2))
    assert (len(store._held), len(held._held)) == (2, 18)


def test_a_store_of_another_rate_is_refused(made: Path) -> None:
    store = Store.open(made)
    store.require_rate(RATE)
    with pytest.raises(DataError, match="11025 Hz, but the separator works at 16000 Hz"):
        store.require_rate(16000)


# features


def test_features_are_added_read_and_checked(copy: Path) -> None:
    store = Store.open(copy)
    before = store.content_hash
    store = add_features(store, "clip", "object", lambda c: np.full((SECONDS, 5), c.index, np.float16))
    store = add_features(store, "mae", "motion", ((c.id, np.full((7, 8), c.index, np.float32)) for c in store.clips))
    assert store.content_hash == before
    assert store.feature_hash("clip") != store.feature_hash("mae")
    assert store.features["mae"] == {"role": "motion", "dim": 7, "steps": 8}
    source = VisualSource("object", "features", "clip", 5, 3)
    found = store.read_visual(store.clips[4], source, centre_s=1, duration_s=2)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.full((3, 5), 4))
    motion = VisualSource("motion", "features", "mae", 7)
    assert store.read_visual(store.clips[2], motion, centre_s=1, duration_s=2).shape == (7, 8)
    with pytest.raises(DataError, match="5 wide, but the separator takes 512"):
        store.read_visual(store.clips[0], VisualSource("object", "features", "clip", 512, 3), centre_s=1, duration_s=2)
    with pytest.raises(DataError, match=r"no features 'dino'.*object frames, motion frames, features 'clip'"):
        store.read_visual(store.clips[0], VisualSource("object", "features", "dino", 5), centre_s=1, duration_s=2)
    with pytest.raises(DataError, match="describe the motion, not the object"):
        store.read_visual(store.clips[0], VisualSource("object", "features", "mae", 8), centre_s=1, duration_s=2)
    summary = check_store(copy).features["mae"]
    assert (summary.dim, summary.mean, summary.dead) == (7, 2.5, 0)
    Store.open(copy, verify=True)


def test_feature_extraction_continues_where_it_was_killed(copy: Path) -> None:
    calls: list[str] = []

    def extract(clip: object) -> np.ndarray:
        calls.append(clip.id)  # type: ignore[attr-defined]
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.ones((SECONDS, 2), np.float32)

    with pytest.raises(KeyboardInterrupt):
        add_features(Store.open(copy), "clip", "object", extract)
    assert Store.open(copy).features == {}
    add_features(Store.open(copy), "clip", "object", extract)
    assert len(calls) == 7  # six clips, one of them twice
    assert Store.open(copy, verify=True).features["clip"]["dim"] == 2


@pytest.mark.parametrize(
    ("array", "message"),
    [(np.full((2, 3), np.nan), "not a finite matrix"), (np.ones(3), "not a finite"), (np.ones((2, 3), int), "int64")],
)
def test_bad_features_are_refused(copy: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        add_features(Store.open(copy), "clip", "object", lambda _: array)
    assert Store.open(copy).features == {}


def test_features_of_differing_width_or_missing_clips_are_refused(copy: Path) -> None:
    store = Store.open(copy)
    with pytest.raises(DataError, match="differs in shape"):
        add_features(store, "a", "object", lambda c: np.ones((2, 3 + c.index)))
    with pytest.raises(DataError, match="nothing was given for clip 'piano-train'"):
        add_features(store, "b", "object", [("flute-train", np.ones((2, 3)))])
    with pytest.raises(DataError, match=r"which .* does not have"):
        add_features(store, "c", "object", [("nobody", np.ones((2, 3)))])


# damage


def test_not_a_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match=r"(is not a|there is no) store .*avsep data synth"):
            Store.open(path)


def test_missing_file(copy: Path) -> None:
    (copy / "object/piano-val.npy").unlink()
    with pytest.raises(DataError, match=r"piano-val\.npy is missing"):
        Store.open(copy)


def test_truncated_file(copy: Path) -> None:
    file = copy / "audio/flute-val.wav"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"flute-val\.wav has \d+ bytes instead of"):
        Store.open(copy)


def test_damaged_byte_shows_only_when_verified(copy: Path) -> None:
    file = copy / "motion/flute-val.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    Store.open(copy)
    with pytest.raises(DataError, match=r"flute-val\.npy does not match its hash"):
        Store.open(copy, verify=True)


def test_audio_of_another_rate(copy: Path) -> None:
    with wave.open(str(copy / "audio/flute-val.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(_ramp(2).tobytes())
    store = Store.open(copy)  # the size is as before
    with pytest.raises(DataError, match=r"is 8000 Hz, .* the manifest says 11025 Hz"):
        store.read_audio(store.clip("flute-val"), 0, 10)


def test_rubbish_of_the_right_size(copy: Path) -> None:
    for name in ("audio/flute-val.wav", "motion/flute-val.npy"):
        size = (copy / name).stat().st_size
        (copy / name).write_bytes(b"x" * size)
    store = Store.open(copy)
    with pytest.raises(DataError, match="not a readable WAV"):
        store.read_audio(store.clip("flute-val"), 0, 10)
    with pytest.raises(DataError, match="not a readable array"):
        store.read_visual(store.clip("flute-val"), MOTION, centre_s=1, duration_s=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "store version 2 is not 1"),
        ({"format": "other"}, "not the manifest of a store"),
        ({"sample_rate_hz": 0}, "sample_rate_hz = 0 is not a rate"),
        ({"sample_rate_hz": "fast"}, 'sample_rate_hz = "fast" is not a rate'),
        ({"sample_rate_hz": 8000.5}, r"sample_rate_hz = 8000\.5 is not a rate"),
        ({"sample_rate_hz": 10**9}, "up to 768000"),
        ({"object_rate_hz": 1e9}, "object_rate_hz = 1000000000.0 is not a rate, a number above 0 and up to 1000"),
        ({"motion_rate_hz": True}, "motion_rate_hz = true is not a rate"),
        ({"object_shape": [3, 10**9, 10**9]}, "object_shape .* is not"),
        ({"motion_shape": [1, 4]}, r"motion_shape = \[1, 4\] is not"),
        ({"classes": "flute"}, "not a list of names"),
        ({"classes": ["flute", "piano", 3]}, "not a list of names"),
        ({"features": {"clip": {"role": "object", "dim": 10**9}}}, "damaged record of features 'clip'"),
        ({"features": {"clip": {"role": "motion", "dim": 3, "steps": -1}}}, "damaged record of features 'clip'"),
        ({"features": {"clip": 3}}, "is damaged"),
        ({"origin": [1]}, r"origin = \[1\] does not say how a store was made"),
        ({"origin": {"banks": ["a.sf2"]}}, "does not say how"),
        ({"origin": {"test_banks": 3}}, "does not say how"),
        ({"origin": {"generator": "avsep data prepare", "dataset": ["music"]}}, "does not say how"),
        ({"origin": {"generator": "avsep data prepare", "splits": "published"}}, "does not say how"),
        ({"licence": {}}, "licence = {} is not a text"),
        ({"skipped": [{"id": "a", "class": "flute"}]}, "not the record of a skipped video"),
        ({"skipped": 3}, "not the record of a skipped video"),
        ({"shards": 3}, "must be"),
        ({"motion_rate_hz": -1}, "motion_rate_hz = -1 is not a rate"),
        ({"classes": ["flute"]}, "of class 'piano', which is not in the list"),
        ({"classes": ["flute", "piano", "piano"]}, "'piano' comes 2 times"),
        ({"clips": None}, "is damaged"),
        ({"clips": [{"id": "a"}]}, "is damaged: KeyError 'class'"),
    ],
)
def test_wrong_manifest(copy: Path, changes: dict[str, object], message: str) -> None:
    _edit(copy, **changes)
    with pytest.raises(DataError, match=message):
        Store.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(id="../../../x"), "cannot be a clip's id"),
        (lambda c: c.update(id=7), "7 cannot be a clip's id"),
        (lambda c: c.update(samples=True), "has true samples"),
        (lambda c: c.update(samples=1 << 60), "samples"),
        (lambda c: c["files"]["audio"].update(bytes=-1), "damaged record of its audio"),
        (lambda c: c["files"]["audio"].update(path="audio/\0.wav"), "names a file"),
        (lambda c: c["files"]["audio"].update(path="audio/" + "x" * 300), "cannot be read, File name too long"),
        (lambda c: c["files"]["audio"].update(path="audio"), "not a plain file"),
        (lambda c: c["files"].update(audio=3), "is damaged"),
        (lambda c: c.update(files=[]), "is damaged"),
    ],
)
def test_wrong_clips_in_a_manifest(copy: Path, change, message: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest["clips"][1])
    _edit(copy, **manifest)
    with pytest.raises(DataError, match=message):
        Store.open(copy)


def test_any_damage_to_a_manifest_is_told_or_harmless(copy: Path) -> None:
    """Whatever stands in its place, the store is refused in one line, or opens and can be told of."""
    add_features(Store.open(copy), "clip", "object", lambda clip: np.ones((4, 5), np.float32))
    text, rng, told = (copy / "manifest.json").read_text(), random.Random(0), []
    strange = [None, True, -1, 0, 10**30, 1e308, 0.5, "", "x", "\0", "../x", [], [[]], {}, {"path": 1}]
    for _ in range(600):
        manifest = json.loads(text)
        manifest["origin"] = {"generator": "avsep data prepare", "splits": {"by": "x"}}
        place: Any = manifest
        key: Any = rng.choice(list(place))
        while isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(strange)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        try:
            store = Store.open(copy)
            assert store.content_hash
            availability(store)
            for clip in store.clips:
                store.read_audio(clip, 0, 10)
                store.timeline(clip)
        except DataError as error:
            told.append(str(error))
    assert len(told) > 200
    assert not any("\n" in line for line in told)


def test_what_a_header_only_says_takes_no_memory(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = copy / "motion/flute-val.npy"
    size = file.stat().st_size
    heads = [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 1, 4, 4), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (32, 1, 4, 4), }",
    ]
    datas = [b"\x93NUMPY\x01\x00" + len(h).to_bytes(2, "little") + h.encode() for h in heads]
    datas.append(b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little"))
    for limit in (256, 0):  # mapped, and read by position
        monkeypatch.setattr("avsep.data.store.files._HELD_MAPS", limit)
        monkeypatch.setattr("avsep.data.store.files.room_for_maps", lambda most: most)
        for data in datas:
            file.write_bytes(data.ljust(size, b"\0"))
            store = Store.open(copy)
            tracemalloc.start()
            try:
                with pytest.raises(DataError, match="not a readable array"):
                    store.read_visual(store.clip("flute-val"), MOTION, centre_s=1, duration_s=1)
                assert tracemalloc.get_traced_memory()[1] < 1 << 20
            finally:
                tracemalloc.stop()


def test_duplicate_ids_paths_outside_and_cut_json(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    clips = manifest["clips"]
    _edit(copy, clips=[*clips, clips[0]])
    with pytest.raises(DataError, match="'flute-train' comes 2 times"):
        Store.open(copy)
    clips[0]["files"]["audio"]["path"] = "../../secret.wav"
    _edit(copy, clips=clips)
    with pytest.raises(DataError, match="names a file outside the store"):
        Store.open(copy)
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text()[:500])
    with pytest.raises(DataError, match="is it truncated"):
        Store.open(copy)


# writing


def test_stopped_writer_continues_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = StoreWriter(path, classes=CLASSES, sample_rate_hz=RATE, origin=ORIGIN)
    with writer:
        ids = [_write(writer, n) for n in range(3)]
    (path / "audio" / ".flute-x.wav").write_bytes(b"left by a killed process")
    (path / "motion" / "flute-val.npy").write_bytes(b"cut")  # journalled, but damaged since
    with pytest.raises(DataError, match="an unfinished store"):
        Store.open(path)
    with writer:
        assert [writer.is_done(i) for i in ids] == [True, True, False]
        ids += [_write(writer, n) for n in range(3, 6)]
        _write(writer, 2)
        writer.finish(ids)
    assert contents(path) == contents(made)


def test_two_writers_and_other_settings_are_refused(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with StoreWriter(path, classes=CLASSES, sample_rate_hz=RATE, origin={"seed": 1}) as writer:
        with (
            pytest.raises(RunError, match="being written by another process"),
            StoreWriter(path, classes=CLASSES, sample_rate_hz=RATE, origin={"seed": 1}),
        ):
            pass
        _write(writer, 0)
    with (
        pytest.raises(DataError, match=r"other settings \(seed: 1, now 2\)"),
        StoreWriter(path, classes=CLASSES, sample_rate_hz=RATE, origin={"seed": 2}),
    ):
        pass
    before = contents(made)
    with (
        pytest.raises(DataError, match="other settings"),
        StoreWriter(made, classes=CLASSES, sample_rate_hz=16000, origin=ORIGIN),
    ):
        pass
    assert contents(made) == before


def test_strange_folders_are_neither_filled_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(DataError, match=r"not a store \(it holds 'thesis.tex'\)"),
        StoreWriter(tmp_path, classes=CLASSES, sample_rate_hz=RATE, origin=ORIGIN),
    ):
        pass
    with pytest.raises(DataError, match="is not a store, so it is not deleted"):
        remove_store(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_remove_store_takes_only_the_store(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    remove_store(copy)
    assert sorted(p.name for p in copy.iterdir()) == [".lock", "notes.txt"]
    remove_store(copy / "nothing")


@pytest.mark.parametrize(
    ("clip_id", "split", "audio", "message"),
    [
        ("a/b", "train", np.zeros(5), "cannot be a clip's id"),
        ("", "train", np.zeros(5), "cannot be a clip's id"),
        ("a", "dev", np.zeros(5), "no split 'dev'"),
        ("a", "train", np.zeros((2, 5)), "not mono"),
        ("a", "train", np.array([0, np.nan]), "NaN or infinite"),
    ],
)
def test_bad_clips_are_refused(tmp_path: Path, clip_id: str, split: str, audio: np.ndarray, message: str) -> None:
    with (
        StoreWriter(tmp_path / "s", classes=["flute"], sample_rate_hz=RATE, origin=ORIGIN) as writer,
        pytest.raises(DataError, match=message),
    ):
        writer.write_clip(clip_id, "flute", split, audio)
    assert not list((tmp_path / "s").rglob("*.wav"))


def test_a_clip_never_written_is_named(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", classes=["flute"], sample_rate_hz=RATE, origin=ORIGIN) as writer:
        writer.write_clip("a", "flute", "train", np.zeros(5, np.float32))
        with pytest.raises(DataError, match="clip 'b' was not written"):
            writer.finish(["a", "b"])
    assert not (tmp_path / "s/manifest.json").exists()


def test_hash_covers_sound_frames_and_splits(made: Path, tmp_path: Path) -> None:
    hashes = {Store.open(made).content_hash}
    for change in ("split", "audio", "object"):
        with StoreWriter(tmp_path / change, classes=["flute"], sample_rate_hz=RATE, origin=ORIGIN) as writer:
            writer.write_clip(
                "a",
                "flute",
                "val" if change == "split" else "train",
                np.full(9, 5 if change == "audio" else 6, np.int16),
                object_frames=np.full((1, 3, 2, 2), change == "object", np.uint8),
            )
            hashes.add(writer.finish(["a"]).content_hash)
    assert len(hashes) == 4


def test_check_reports_levels_and_problems(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", classes=["flute", "piano"], sample_rate_hz=RATE, origin=ORIGIN) as writer:
        still = np.zeros((5, 1, 4, 4), np.uint8)
        writer.write_clip("quiet", "flute", "train", np.zeros(RATE, np.float32), motion_frames=still)
        writer.write_clip("loud", "flute", "train", np.full(RATE, 32767, np.int16))
        writer.write_clip("half", "flute", "val", np.full(RATE, 16384, np.int16))
        writer.finish(["quiet", "loud", "half"])
    result = check_store(tmp_path / "s")
    assert result.classes["flute"]["val"].levels_db == pytest.approx([-6.0206], abs=1e-3)
    text = "\n".join(result.problems)
    assert "'quiet' is silent" in text
    assert "'loud' is clipped (100.0 %" in text
    assert "'quiet': its motion frames never change" in text
    assert "class 'piano' has no train clip" in text
    assert "'half'" not in text


def _replace(path: Path, kind: str, array: np.ndarray) -> None:
    """Another array in the place of a clip's, with the size and hash that belong to it."""
    file = path / kind / "flute-val.npy"
    np.save(file, array)
    manifest = json.loads((path / "manifest.json").read_text())
    (clip,) = (c for c in manifest["clips"] if c["id"] == "flute-val")
    clip["files"][kind].update(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    _edit(path, **manifest)


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        ("object", np.zeros((4, 3, 6, 6), np.int8), r"int8 \[4, 3, 6, 6\] in place of uint8 \[n, 3, 6, 6\]"),
        ("object", np.zeros((4, 3, 6, 6), np.float32), "float32"),
        ("object", np.zeros((4, 1, 6, 6), np.uint8), r"\[4, 1, 6, 6\]"),
        ("object", np.zeros((4, 3, 9, 6), np.uint8), r"\[4, 3, 9, 6\]"),
        ("object", np.zeros((0, 3, 6, 6), np.uint8), r"\[0, 3, 6, 6\]"),
        ("object", np.zeros((432,), np.uint8), r"\[432\]"),
        ("motion", np.zeros((32, 1, 4, 4), np.uint16), "uint16"),
        ("motion", np.zeros((32, 4, 4), np.uint8), r"\[32, 4, 4\] in place of uint8 \[n, 1, 4, 4\]"),
        ("features/clip", np.zeros((4, 6), np.float32), r"\[4, 6\] in place of float \[n, 5\]"),
        ("features/clip", np.zeros((4, 5), np.int64), "int64"),
        ("features/clip", np.zeros(5, np.float32), r"\[5\]"),
        ("features/clip", np.zeros((4, 5), np.complex64), "complex64"),
    ],
)
def test_the_check_knows_arrays_of_another_type_or_shape(
    copy: Path, kind: str, array: np.ndarray, message: str
) -> None:
    """By the check, whose hashes are right, and by all that read them."""
    add_features(Store.open(copy), "clip", "object", lambda clip: np.ones((4, 5), np.float32))
    _replace(copy, kind, array)
    with pytest.raises(DataError, match=rf"flute-val\.npy is not a readable array \(it is .*{message}"):
        check_store(copy)
    source = {"object": OBJECT, "motion": MOTION}.get(kind, VisualSource("object", "features", name="clip", frames=3))
    store = Store.open(copy)
    with pytest.raises(DataError, match=message):
        store.read_visual(store.clip("flute-val"), source, centre_s=1, duration_s=1)


def test_a_check_needs_few_open_files(tmp_path: Path) -> None:
    """``ulimit -n 64``: fewer than the store has, and than the 64 maps that are held where the system allows."""
    pytest.importorskip("resource")
    ids = [f"c{number}" for number in range(80)]
    with StoreWriter(tmp_path / "s", classes=["flute"], sample_rate_hz=RATE, origin=ORIGIN) as writer:
        for clip_id in ids:
            frames = _counted(2, 1, 4, 4)
            writer.write_clip(clip_id, "flute", "train", _ramp(0)[:100], motion_frames=frames)
        writer.finish(ids)
    code = (
        "import resource, sys\nfrom avsep.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "main(['data', 'check', sys.argv[1]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "every file matches its hash" in done.stdout


# visual files


def test_visual_file_reads_as_the_store_does(copy: Path, tmp_path: Path) -> None:
    store = add_features(Store.open(copy), "clip", "object", lambda c: np.random.default_rng(c.index).random((4, 5)))
    ids = ["piano-val", "flute-test"]
    write_visual_file(tmp_path / "v.npz", timelines_of(store, ids))
    found = read_visual_file(tmp_path / "v.npz")
    assert list(found) == ["piano", "flute"]
    for clip in store.clips_by_id(ids):
        for source in (OBJECT, MOTION, VisualSource("object", "features", "clip", 5, 3)):
            expected = store.read_visual(clip, source, centre_s=1.3, duration_s=2.2)
            assert np.array_equal(found[clip.class_name].read(source, 1.3, 2.2), expected)
    assert list(timelines_of(store, ["piano-val", "flute-test", "piano-test"])) == ["piano-1", "flute", "piano-2"]
    with pytest.raises(DataError, match="'piano-val' is given twice"):
        timelines_of(store, ["piano-val", "piano-val"])


def test_visual_rates_are_kept(tmp_path: Path) -> None:
    timeline = VisualTimeline(motion=_counted(50, 1, 2, 2), motion_rate_hz=25.0)
    write_visual_file(tmp_path / "v.npz", {"flute": timeline})
    found = read_visual_file(tmp_path / "v.npz")["flute"]
    assert found.read(MOTION, 1.0, 0.4)[:, 0, 0, 0].tolist() == list(range(20, 30))
    with pytest.raises(DataError, match=r"'flute' has no object frames; it has motion frames"):
        found.read(OBJECT, 1.0, 0.4)


@pytest.mark.parametrize(
    ("rate_hz", "expected"),
    [
        (25.0, [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]),
        (50.0, [k for n in range(20, 30) for k in (n, n)]),
        (12.5, [21, 23, 25, 27, 29]),  # those at the middles
        (5.0, [22, 27]),
    ],
)
def test_motion_comes_at_the_rate_that_is_asked_for(rate_hz, expected):
    timeline = VisualTimeline(motion=_counted(50, 1, 2, 2), motion_rate_hz=25.0)
    source = replace(MOTION, rate_hz=rate_hz)
    assert timeline.read(source, 1.0, 0.4)[:, 0, 0, 0].tolist() == expected
    beyond = timeline.read(source, 2.0, 0.4)[:, 0, 0, 0]
    assert beyond[-1] == 49
    assert len(beyond) == len(expected)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"flute/object": np.zeros((2, 3, 4, 4))}, "must be uint8"),
        ({"flute/object": np.zeros((2, 1, 4, 4), np.uint8)}, "has 1 channels, not 3"),
        ({"flute/object": np.zeros((0, 3, 4, 4), np.uint8)}, "must be uint8"),
        ({"flute/motion": np.zeros((4, 4), np.uint8)}, "must be uint8"),
        ({"flute/motion_rate_hz": np.array(0.0)}, "one positive number"),
        ({"flute/features/clip": np.full((2, 3), np.inf)}, "finite numbers"),
        ({"flute/sound": np.zeros(3)}, "unknown entry 'flute/sound'"),
        ({"flute/object": np.array([None])}, "not a readable visual file"),
        ({}, "empty visual file"),
    ],
)
def test_wrong_visual_files(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "v.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        read_visual_file(tmp_path / "v.npz")


def test_damaged_visual_files(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    with pytest.raises(DataError, match="no such file"):
        read_visual_file(path)
    write_visual_file(path, {"flute": VisualTimeline(motion=_counted(9, 1, 8, 8))})
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="not a readable visual file"):
            read_visual_file(path)
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(DataError, match="one bare array"):
        read_visual_file(tmp_path / "bare.npy")

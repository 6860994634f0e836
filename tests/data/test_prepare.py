"""``avsep data prepare``: what becomes of videos, the same bytes however the work was cut up, and what is reported."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from avsep.data.prepare.listings import list_folder, list_vggsound, split_of
from avsep.data.prepare.videos import make_recipe, prepare
from avsep.data.store import Store
from avsep.data.store.checking import availability, check_store
from avsep.errors import DataError
from avsep.inference.recordings import read_mixture
from avsep.media.footage import Encoders, timelines_of_video, track_objects
from avsep.types import VisualSource
from support.commands import run
from support.folders import contents
from support.media_files import brightness_ramp, tone, write_video
from support.small_weights import write_owlv2, write_small
from support.tones import TINY_FRONT_END, TINY_TRAIN
from support.video_shelf import CLASSES, DAMAGED, write_collection, write_good

pytest.importorskip("av")
PICTURES = {"object": None, "motion": None, "frames": True, "frame_size": 32, "detector": None}
SOUND = {"object": None, "motion": None}
AS_OPTIONS = ["--object", "none", "--motion", "none", "--frames", "--frame-size", "32", "--detector", "none"]


def make(listing, out, jobs=0, recipe=PICTURES, **options):
    return prepare(listing, out, make_recipe(**recipe), jobs=jobs, progress=False, **options)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """24 videos, ten of them damaged, and a store of them made without a break in one process."""
    folder = tmp_path_factory.mktemp("shelf")
    table = write_collection(folder / "videos", 24)
    make(list_folder(folder / "videos", table=table), folder / "store")
    return folder


def listed(shelf):
    return list_folder(shelf / "videos", table=shelf / "videos.csv")


# --- the same bytes -------------------------------------------------------------------------------------------------


def killed_run(argv: list[str], out: Path, rng: np.random.Generator, more: int) -> bool:
    """Start the command, kill its process group when it has noted ``more`` further videos; whether it came to that."""
    journal = out / ".journal"
    begun = len(list(journal.glob("*.json"))) if journal.is_dir() else 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "avsep", *argv], start_new_session=True, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            if journal.is_dir() and len(list(journal.glob("*.json"))) >= begun + more:
                time.sleep(rng.uniform(0.0, 0.05))
                break
            time.sleep(0.01)
        else:
            return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode == -signal.SIGKILL


def command(root: Path, table: Path, out: Path, jobs: int) -> list[str]:
    argv = ["data", "prepare", "folder", "--root", root, "--table", table, "--out", out, "--jobs", jobs, *AS_OPTIONS]
    return [str(a) for a in argv]


def statuses(store: Path) -> dict[str, str]:
    with open(store / "videos.csv", newline="") as file:
        return {Path(row["id"]).name: row["status"] for row in csv.DictReader(file) if row["status"] != "ok"}


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_killed_and_resumed_it_is_the_same_store(shelf, tmp_path):
    out = tmp_path / "store"
    assert killed_run(command(shelf / "videos", shelf / "videos.csv", out, 2), out, np.random.default_rng(0), 6)
    assert not (out / "manifest.json").exists()
    noted = len(list((out / ".journal").glob("*.json"))) - 1
    assert 5 <= noted < 24
    # what a failing disk or a kill in the middle of a write may leave
    whole = next(
        p for p in sorted((out / "audio").glob("[!.]*.wav")) if (out / ".journal" / f"{p.stem}.json").is_file()
    )
    whole.write_bytes(whole.read_bytes()[:-2] + b"xx")
    (out / "audio" / ".half-written.wav").write_bytes(b"RIFF")
    (out / "motion" / "nobody's.npy").write_bytes(b"")
    result = make(listed(shelf), out)
    assert contents(out) == contents(shelf / "store")
    assert len(result.skipped) == 10
    assert sorted(statuses(out).values()) == sorted(DAMAGED.values())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_videos_killed_at_random(tmp_path, capsys):
    table = write_collection(tmp_path / "videos", 200, encodes=8)
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-m", "avsep", *command(tmp_path / "videos", table, tmp_path / "one", 1)])
    whole_s = time.monotonic() - begun
    rng = np.random.default_rng(int(time.time()))
    out = tmp_path / "killed"
    kills = 0
    begun = time.monotonic()
    while killed_run(
        command(tmp_path / "videos", table, out, int(rng.integers(1, 4))), out, rng, int(rng.integers(40))
    ):
        kills += 1
    with capsys.disabled():
        print(f"\n200 videos: {whole_s:.0f} s in one go, {kills} kills and {time.monotonic() - begun:.0f} s with them")
    assert kills >= 3, kills
    assert contents(out) == contents(tmp_path / "one")
    found = {
        entry["source"]["path"] if entry["source"] else "bad/gone.mp4": entry["status"]
        for entry in Store.open(out, verify=True).manifest["skipped"]
    }
    assert found == {f"bad/{name}": status for name, status in DAMAGED.items()}


def test_each_damage_is_told_with_its_reason(shelf):
    store = Store.open(shelf / "store", verify=True)
    assert len(store.clips) == 14
    skipped = {e["id"].rpartition("-")[2]: e for e in store.manifest["skipped"]}
    for name, status in DAMAGED.items():
        entry = skipped[Path(name).stem]
        assert entry["status"] == status, name
        assert name in entry["reason"]
        assert str(shelf) not in entry["reason"]
        assert entry["source"] is None if name == "gone.mp4" else entry["source"]["path"] == f"bad/{name}"
        assert "\n" not in entry["reason"]
    clip = store.manifest["clips"][0]
    assert clip["source"]["path"] == "ding/000.mp4"
    assert clip["status"] == "ok"
    assert clip["duration_s"] == pytest.approx(1.2, abs=0.1)
    assert str(shelf) not in (shelf / "store" / "manifest.json").read_text()
    found = availability(store)
    assert sum(found.there.values()) == 14
    assert sum(found.listed.values()) == 24
    assert found.reasons["broken"] == 5


def test_a_video_that_crashes_the_decoder_is_noted_and_the_rest_goes_on(tmp_path):
    for k in range(3):
        write_good(tmp_path / "videos" / "hum" / f"{k}.mp4", k)
    (tmp_path / "videos" / "hum" / "1.mp4").rename(tmp_path / "videos" / "hum" / "crash.mp4")
    script = tmp_path / "script.py"
    script.write_text(
        """
import os, sys
from avsep.data.prepare import videos as prepare
read = prepare._read_sound
prepare._read_sound = lambda path, *rest: os.abort() if path.stem == "crash" else read(path, *rest)
if __name__ == "__main__":
    from avsep.data.prepare.listings import list_folder
    recipe = prepare.make_recipe(object=None, motion=None)
    prepare.prepare(list_folder(sys.argv[1]), sys.argv[2], recipe, jobs=2, progress=False)
"""
    )
    done = subprocess.run([sys.executable, script, tmp_path / "videos", tmp_path / "store"], timeout=240)
    assert done.returncode == 0
    store = Store.open(tmp_path / "store")
    assert [c.id for c in store.clips] == ["hum-0", "hum-2"]
    assert [(e["id"], e["status"]) for e in store.manifest["skipped"]] == [("hum-crash", "crashed")]


# --- what is made ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Small random weights of the extractors and the detector."""
    folder = write_small(tmp_path_factory.mktemp("weights"))
    write_owlv2(folder / "owlv2-base-patch16-ensemble")
    return folder


@pytest.fixture(scope="module")
def seen(weights, tmp_path_factory):
    """Six videos, two of them damaged, and a store with frames and features made in this process."""
    folder = tmp_path_factory.mktemp("seen")
    for k in range(4):
        write_good(folder / "videos" / CLASSES[k % 2] / f"{k}.mp4", k)
    data = (folder / "videos" / CLASSES[0] / "0.mp4").read_bytes()
    (folder / "videos" / CLASSES[0] / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "videos" / CLASSES[1] / "text.mp4").write_bytes(b"la la la " * 99)
    made = make(list_folder(folder / "videos"), folder / "store", recipe={"weights": weights, "frames": True})
    assert [e["status"] for e in made.skipped] == ["broken", "broken"]
    assert sorted(made.store.features) == ["clip_vit_b32", "videomae_base"]
    return folder


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.slow
def test_features_are_the_same_bytes_in_other_processes(seen, weights, tmp_path, jobs):
    make(list_folder(seen / "videos"), tmp_path / "store", jobs, recipe={"weights": weights, "frames": True})
    assert contents(tmp_path / "store") == contents(seen / "store")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(seen, weights, tmp_path):
    pytest.importorskip("ray.data")
    recipe = {"weights": weights, "frames": True}
    make(list_folder(seen / "videos"), tmp_path / "store", jobs=2, recipe=recipe, engine="ray")
    assert contents(tmp_path / "store") == contents(seen / "store")


def test_it_is_what_separate_would_compute(weights, tmp_path, one_thread):  # as prepare does, for the last bits
    video = tmp_path / "videos" / "violin" / "one.mp4"
    video.parent.mkdir(parents=True)
    write_video(video, brightness_ramp(30), tone(3.0, channels=2), layout="stereo")
    recipe = make_recipe(weights=weights, frames=True, look_every_s=1.5)
    store = prepare(list_folder(tmp_path / "videos"), tmp_path / "store", recipe, jobs=0, progress=False).store
    from avsep.media.detection import OWLv2Detector

    track = track_objects(
        video, ["violin"], OWLv2Detector(weights=weights / "owlv2-base-patch16-ensemble"), every_s=1.5
    )
    sources = [
        VisualSource(role="object", kind="features", name="clip_vit_b32"),
        VisualSource(role="motion", kind="features", name="videomae_base"),
        VisualSource(role="object", kind="frames"),
        VisualSource(role="motion", kind="frames"),
    ]
    folders = {"clip_vit_b32": str(weights / "clip-vit-base-patch32"), "videomae_base": str(weights / "videomae-base")}
    want = timelines_of_video(video, ["violin"], sources, track, encoders=Encoders(folders))["violin"]
    have = store.timeline(store.clips[0])
    for name in ("clip_vit_b32", "videomae_base"):
        np.testing.assert_array_equal(have.features[name], want.features[name])
    assert have.features["clip_vit_b32"].shape == (3, 12)
    np.testing.assert_array_equal(have.object, want.object)
    np.testing.assert_array_equal(have.motion, want.motion)
    _, sound, _ = read_mixture(video, 11025)
    np.testing.assert_allclose(store.read_audio(store.clips[0]), sound, atol=0.6 / 32768)
    assert store.features["clip_vit_b32"] == {"role": "object", "dim": 12, "steps": None}
    assert store.manifest["origin"]["extractors"]["owlv2"]["revision"].startswith("cfd3195b")
    result = check_store(tmp_path / "store")
    assert result.features["videomae_base"].dim == 16


def test_other_weights_are_other_settings(weights, tmp_path):
    write_good(tmp_path / "videos" / "hum" / "a.mp4", 1)
    listing = list_folder(tmp_path / "videos")
    recipe = {"motion": None, "detector": None}
    make(listing, tmp_path / "store", recipe={**recipe, "weights": weights})
    other = write_small(tmp_path / "other", ("clip_vit_b32",))
    file = other / "clip-vit-base-patch32" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"other settings \(extractors: .*choose another folder"):
        make(listing, tmp_path / "store", recipe={**recipe, "weights": other})


def test_a_part_of_a_video(tmp_path):
    """Sound and frames of the seconds that a table names, as of a video cut there."""
    loud = np.concatenate([tone(2.0, hz=300.0), 0.3 * tone(2.0, hz=900.0)], axis=1)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "v.mp4", brightness_ramp(40), loud)
    (tmp_path / "t.csv").write_text("path,class,split,start,end\nv.mp4,hum,train,0,2\nv.mp4,hum,test,2.0,3.5\n")
    listing = list_folder(tmp_path / "videos", table=tmp_path / "t.csv")
    assert [v.id for v in listing.videos] == ["hum-v-0", "hum-v-2"]
    store = make(listing, tmp_path / "store").store
    first, second = store.clips
    assert (first.samples, second.samples) == (22050, 16538)
    level = [float(store.read_audio(c, 2000, 10000).std()) for c in store.clips]
    assert level == pytest.approx([0.3 / 2**0.5, 0.09 / 2**0.5], rel=0.1)
    bright = [store.timeline(c).object[:, 0, -4, -4].tolist() for c in store.clips]
    np.testing.assert_allclose(bright[0], [60, 100], atol=6)  # frames 5 and 15
    np.testing.assert_allclose(bright[1][:1], [140], atol=6)  # frame 25
    assert [len(store.timeline(c).motion) for c in store.clips] == [16, 12]
    assert store.manifest["clips"][1]["source"]["span_s"] == [2.0, 3.5]


def test_vggsound_cuts_whole_videos_and_leaves_clips(tmp_path, monkeypatch):
    from avsep.data.prepare import listings

    monkeypatch.setattr(listings, "_CLIP_S", 1.0)
    root = tmp_path / "videos"
    root.mkdir()
    for name, seconds in (("aaaaaaaaaaa", 4.0), ("bbbbbbbbbbb_000001", 1.2), ("ccccccccccc", 1.5)):
        write_video(root / f"{name}.mp4", brightness_ramp(round(seconds * 10)), tone(seconds))
    (root / "vggsound.csv").write_text(
        'aaaaaaaaaaa,2,"playing violin, fiddle",train\nbbbbbbbbbbb,1,"playing violin, fiddle",test\n'
        'ccccccccccc,30,"playing violin, fiddle",test\n'
    )
    listing = list_vggsound(root)
    assert listing.classes == ("playing_violin_fiddle",)
    store = make(listing, tmp_path / "store", recipe=SOUND).store
    seconds = {c.id: c.samples / 11025 for c in store.clips}
    assert seconds["aaaaaaaaaaa_000002"] == pytest.approx(1.0)
    assert seconds["bbbbbbbbbbb_000001"] == pytest.approx(1.2, abs=0.06)
    assert seconds["ccccccccccc_000030"] == pytest.approx(1.5, abs=0.06)  # too short to be the whole video


# --- resuming -------------------------------------------------------------------------------------------------------


def test_a_finished_store_takes_in_what_came_later_when_asked(tmp_path, capsys):
    root = tmp_path / "videos"
    for k in range(3):
        write_good(root / "hum" / f"{k}.mp4", k)
    late = (root / "hum" / "1.mp4").rename(tmp_path / "late.mp4")
    (root / "hum" / "0.mp4").rename(tmp_path / "whole.mp4")
    (root / "hum" / "0.mp4").write_bytes(b"damaged")
    make(list_folder(root), tmp_path / "store", recipe=SOUND)
    late.rename(root / "hum" / "1.mp4")
    (tmp_path / "whole.mp4").replace(root / "hum" / "0.mp4")
    again = make(list_folder(root), tmp_path / "store", recipe=SOUND)
    assert (again.unlisted, len(again.store.clips), len(again.skipped)) == (1, 1, 1)
    updated = make(list_folder(root), tmp_path / "store", recipe=SOUND, update=True)
    assert (len(updated.store.clips), updated.skipped) == (3, [])
    make(list_folder(root), tmp_path / "fresh", recipe=SOUND)
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")
    (root / "hum" / "2.mp4").unlink()  # what is no longer listed goes
    make(list_folder(root), tmp_path / "store", recipe=SOUND, update=True)
    make(list_folder(root), tmp_path / "fewer", recipe=SOUND)
    assert contents(tmp_path / "store") == contents(tmp_path / "fewer")


def test_a_video_replaced_by_one_of_its_size_is_made_again(tmp_path, monkeypatch):
    """Also where the new file keeps an old time; what nobody touched is not read again."""
    from avsep.data.prepare import videos as module

    root = tmp_path / "videos"
    for k in range(3):
        write_good(root / "hum" / f"{k}.mp4", k)
    size = max(p.stat().st_size for p in root.glob("*/*")) + 64
    for path in root.glob("*/*"):  # one size for all of them
        data = path.read_bytes()
        path.write_bytes(data + (size - len(data)).to_bytes(4, "big") + b"free" + bytes(size - len(data) - 8))
    make(list_folder(root), tmp_path / "store", recipe=SOUND)
    for found in ("manifest.json", "videos.csv"):
        os.utime(tmp_path / "store" / found, (time.time() + 60, time.time() + 60))  # as if finished a minute later
    read = []
    hashed = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: read.append(Path(path).name) or hashed(path))
    make(list_folder(root), tmp_path / "store", recipe=SOUND, update=True)
    assert read == []
    os.utime(tmp_path / "store" / "manifest.json", (time.time(), time.time()))
    old = (root / "hum" / "1.mp4").stat()
    (root / "hum" / "1.mp4").write_bytes((root / "hum" / "2.mp4").read_bytes())
    os.utime(root / "hum" / "1.mp4", (old.st_atime - 1000, old.st_mtime - 1000))
    updated = make(list_folder(root), tmp_path / "store", recipe=SOUND, update=True)
    entries = {e["id"]: e for e in updated.store.manifest["clips"]}
    assert entries["hum-1"]["files"]["audio"]["sha256"] == entries["hum-2"]["files"]["audio"]["sha256"]
    make(list_folder(root), tmp_path / "fresh", recipe=SOUND)
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


def test_other_options_are_refused_on_resuming(shelf, tmp_path, monkeypatch):
    from avsep.data.prepare import videos as module

    def stop(*_):
        raise KeyboardInterrupt

    done = module._make
    monkeypatch.setattr(module, "_make", lambda *a: stop() if a[3].id.endswith("003") else done(*a))
    with pytest.raises(KeyboardInterrupt):
        make(listed(shelf), tmp_path / "store")
    monkeypatch.undo()
    before = contents(tmp_path / "store")
    for change in ({"rate_hz": 16000}, {"frame_size": 48}, {"min_seconds": 0.5}, {"frames": False}):
        with pytest.raises(
            DataError, match=f"other settings.*{'sample_rate_hz' if 'rate_hz' in change else next(iter(change))}"
        ):
            make(listed(shelf), tmp_path / "store", recipe={**PICTURES, **change})
    assert contents(tmp_path / "store") == before
    make(listed(shelf), tmp_path / "store")
    assert contents(tmp_path / "store") == contents(shelf / "store")


def test_a_hash_splits_and_another_video_moves_none():
    ids = [f"clip-{k}" for k in range(2000)]
    splits = [split_of(i) for i in ids]
    assert [splits.count(s) / 2000 for s in ("train", "val", "test")] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert split_of("clip-7") == splits[7]
    assert [split_of(i, seed=1) for i in ids] != splits
    assert {split_of(i, shares=(0, 1, 0)) for i in ids} == {"val"}


# --- from a folder to sounds ----------------------------------------------------------------------------------------


def test_from_videos_to_a_trained_separator_and_its_sounds(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVSEP_WEIGHTS", str(weights))
    number = 0
    for name in CLASSES[:2]:
        for split, count in (("train", 2), ("val", 1), ("test", 1)):
            for _ in range(count):
                write_good(Path("videos", split, name, f"{number}.mp4"), number)
                number += 1
    recipe = make_recipe(detector=None)
    store = prepare(list_folder("videos"), "store", recipe, jobs=0, progress=False).store
    assert [len(store.select(split=s)) for s in ("train", "val", "test")] == [4, 2, 2]
    assert run("data", "check", "store") == 0
    assert "4 of 4" in capsys.readouterr().out
    separator = {
        "audio_encoder": {"name": "unet7", "params": {"base_channels": 4, "mask_channels": 4}},
        "object_encoder": {"name": "precomputed", "params": {"features": "clip_vit_b32", "dim": 12}},
        "motion_encoder": {"name": "precomputed", "params": {"features": "videomae_base", "dim": 16}},
        "mask_decoder": {
            "name": "query_transformer",
            "params": {"dim": 16, "heads": 2, "feedforward": 16, "encoder_layers": 1, "layers": 2},
        },
        "front_end": TINY_FRONT_END,
    }
    train = {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 2, "validation_pairs": 1}
    Path("tiny.yaml").write_text(yaml.safe_dump({"separator": separator, "train": train}))
    options = ["--preset", "tiny.yaml", "--strategy", "finetune", "--memory", "none", "--tasks", "ding,hum"]
    assert run("train", "store", *options, "--out", "run", "--device", "cpu") == 0
    video = next(Path("videos/test/ding").glob("*.mp4"))
    argv = ["--run", "run", "--classes", "ding,hum", "--whole-frame", "--no-page", "--out", "out", "--device", "cpu"]
    assert run("separate", video, *argv) == 0
    assert {p.name for p in Path("out").iterdir()} == {f"{video.stem}_{n}.wav" for n in ("ding", "hum", "residual")}

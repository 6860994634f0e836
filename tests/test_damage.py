"""Every reader of a user's file under random and structured damage: a value or one clear line, never anything else."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import avsep
from avsep.data.prepare.listings import list_folder, read_splits
from avsep.data.store import Store
from avsep.data.store.checking import check_store
from avsep.data.store.sharding import shard_store
from avsep.errors import AvsepError
from avsep.evaluation.evaluate import Protocol
from avsep.export.runtime.reader import open_bundle
from avsep.export.runtime.timeline import VisualTimeline, read_visual_file, write_visual_file
from avsep.export.runtime.verify import verify_bundle
from avsep.export.runtime.wav import read_wav
from avsep.files import write_json
from avsep.media.audio import read_audio
from avsep.media.detection import read_boxes
from avsep.media.video import iter_frames, read_media_audio
from avsep.runs.checkpoint import load_latest
from avsep.runs.folder import RunFolder
from avsep.spec import PRESETS, SeparatorSpec, TrainSpec, load_preset, validated
from support.damage import damaged_bytes, damaged_value
from support.media_files import brightness_ramp, tone, write_video

HAS_VIDEO = importlib.util.find_spec("av") is not None
VIDEOS = ("v.mp4", "v.mkv") if HAS_VIDEO else ()
SLOWEST_S = 20.0
MOST_MB = 700.0  # beyond what the process holds before


class Case:
    """A user's file: where it lies, and all that is done with it."""

    def __init__(self, file: Path, use: Callable[[], Any]) -> None:
        self.file = file
        self.use = use
        self.good = file.read_bytes()

    def survives(self, data: bytes) -> bool:
        """Whether damaged data was read all the same; anything but a value or an AvsepError is raised."""
        self.file.write_bytes(data)
        started = time.monotonic()
        try:
            self.use()
            return True
        except AvsepError as error:
            assert str(error).strip(), "an error without a word"  # noqa: PT017  (every kind of it is right)
            return False
        finally:
            self.file.write_bytes(self.good)
            assert time.monotonic() - started < SLOWEST_S


@pytest.fixture(scope="module")
def cases(tone_store: Path, tone_run: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("damage")
    store = shutil.copytree(tone_store, home / "store")
    shards = shard_store(Store.open(tone_store), home / "shards", shard_mb=1).path
    run = shutil.copytree(tone_run, home / "run")
    bundle = shutil.copytree(tiny_bundle, home / "bundle")
    videos = home / "videos"
    for name in ("flute", "violin"):
        (videos / name).mkdir(parents=True)
        (videos / name / "a.mp4").write_bytes(b"video")

    def read_store(path: Path) -> None:
        check_store(path)
        opened = Store.open(path)
        for clip in opened.clips[:2]:
            opened.read_audio(clip, 0, 4000)
            opened.timeline(clip)

    def read_spec(path: Path) -> None:
        found = load_preset(str(path))
        validated(SeparatorSpec, found["separator"], "separator").check()
        validated(TrainSpec, found.get("train", {}), "train")

    write_visual_file(
        home / "seen.npz",
        {
            "flute": VisualTimeline(
                object=np.zeros((3, 3, 8, 8), np.uint8), features={"clip": np.ones((3, 4), np.float32)}
            ),
            "violin": VisualTimeline(motion=np.zeros((8, 1, 6, 6), np.uint8)),
        },
    )
    rng = np.random.default_rng(0)
    for name, options in (
        ("a.wav", {}),
        ("b.wav", {"subtype": "FLOAT"}),
        ("c.flac", {}),
        ("d.ogg", {}),
        ("e.aiff", {}),
    ):
        soundfile.write(home / name, rng.uniform(-0.5, 0.5, (2000, 2)), 11025, **options)
    write_json(home / "boxes.json", {"0": {"flute": [0, 0, 0.5, 1]}, "2.5": {"violin": [0.5, 0, 1, 1]}})
    splits = {s: {"flute": [f"{s}{k}" for k in range(3)]} for s in ("train", "val", "test")}
    write_json(home / "splits.json", splits)
    (home / "lists").mkdir()
    for split, found in splits.items():
        pickled = np.array(found, dtype=object)
        np.save(home / "lists" / f"{split}_category_vids_dict.npy", pickled, allow_pickle=True)
    (home / "splits.csv").write_text("id,class,split\nx,flute,train\ny,flute,test\n")
    (home / "table.csv").write_text("path,class,start,end\nflute/a.mp4,flute,0,2\nviolin/a.mp4,violin,,\n")
    shutil.copy(PRESETS / "iquery_small.yaml", home / "spec.yaml")
    if HAS_VIDEO:
        write_video(home / "v.mp4", brightness_ramp(6), tone(0.6, 16000), fps=10, rate_hz=16000)
        write_video(home / "v.mkv", brightness_ramp(6), tone(0.6, 16000), fps=10, rate_hz=16000)
    shard = next((shards / "shards").glob("*.tar"))
    audio = next((store / "audio").glob("*.wav"))
    frames = next((store / "object").glob("*.npy"))
    record = run / "tasks" / "01" / "task.json"
    return {
        "store manifest": Case(store / "manifest.json", lambda: read_store(store)),
        "store audio": Case(audio, lambda: read_store(store)),
        "store frames": Case(frames, lambda: read_store(store)),
        "shards manifest": Case(shards / "manifest.json", lambda: read_store(shards)),
        "shard": Case(shard, lambda: read_store(shards)),
        "npz": Case(home / "seen.npz", lambda: read_visual_file(home / "seen.npz")),
        **{
            f"sound {name}": Case(home / name, lambda name=name: read_audio(home / name))
            for name in ("a.wav", "b.wav", "c.flac", "d.ogg", "e.aiff")
        },
        "wav on a device": Case(home / "a.wav", lambda: read_wav(home / "a.wav")),
        **{
            f"video {name}": Case(
                home / name, lambda name=name: (read_media_audio(home / name), list(iter_frames(home / name, 2.0)))
            )
            for name in VIDEOS
        },
        "boxes": Case(home / "boxes.json", lambda: read_boxes(home / "boxes.json")),
        "splits as JSON": Case(home / "splits.json", lambda: read_splits(home / "splits.json")),
        "splits as CSV": Case(home / "splits.csv", lambda: read_splits(home / "splits.csv")),
        "splits as a pickle": Case(
            home / "lists" / "train_category_vids_dict.npy", lambda: read_splits(home / "lists")
        ),
        "table": Case(home / "table.csv", lambda: list_folder(videos, table=home / "table.csv")),
        "spec": Case(home / "spec.yaml", lambda: read_spec(home / "spec.yaml")),
        "run.yaml": Case(run / "run.yaml", lambda: RunFolder(run).spec()),
        "task.json": Case(record, lambda: avsep.load_separator(run)),
        "weights": Case(run / "tasks/01/separator/model.safetensors", lambda: avsep.load_separator(run)),
        "protocol": Case(run / "protocol.json", lambda: Protocol.load(run / "protocol.json")),
        "checkpoint": Case(run / "state" / "latest.json", lambda: load_latest(run / "state")),
        "bundle manifest": Case(bundle / "manifest.json", lambda: open_bundle(bundle)),
        "bundle graph": Case(next(bundle.glob("*.onnx")), lambda: verify_bundle(bundle)),
    }


JSON = (
    "store manifest", "shards manifest", "boxes", "splits as JSON", "task.json", "protocol", "checkpoint",
    "bundle manifest",
)  # fmt: skip
NAMES = (
    *JSON, *(f"video {name}" for name in VIDEOS),
    "store audio", "store frames", "shard", "npz", "sound a.wav", "sound b.wav", "sound c.flac", "sound d.ogg",
    "sound e.aiff", "wav on a device", "splits as CSV", "splits as a pickle", "table", "spec", "run.yaml", "weights",
    "bundle graph",
)  # fmt: skip


def try_one(case: Case, seed: int, structured: bool) -> bool:
    rng = random.Random(seed)
    if structured:
        value = damaged_value(json.loads(case.good), rng)
        return case.survives(json.dumps(value).encode())
    return case.survives(damaged_bytes(case.good, rng))


def test_the_good_files_are_read(cases):
    assert set(cases) == set(NAMES)
    for name, case in cases.items():
        assert case.survives(case.good), name


QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(seed=st.integers(0, 2**32))
def test_damaged_bytes(cases, name, seed):
    try_one(cases[name], seed, structured=False)


@pytest.mark.parametrize("name", JSON)
@QUICK
@given(seed=st.integers(0, 2**32))
def test_damaged_values(cases, name, seed):
    try_one(cases[name], seed, structured=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_thousand_damaged_files(cases, record_property):
    """The same, long: its counts stand in the report (``--junitxml``) and on standard output."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = int(os.environ.get("AVSEP_DAMAGED_FILES", "20000"))
    ways = [(name, False) for name in NAMES] + [(name, True) for name in JSON]
    counts = {"read": 0, "refused": 0}
    failed: list[str] = []
    for number in range(total):
        name, structured = ways[number % len(ways)]
        try:
            counts["read" if try_one(cases[name], number, structured) else "refused"] += 1
        except Exception as error:
            failed.append(f"{name}, seed {number}, structured {structured}: {type(error).__name__}: {str(error)[:150]}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    record_property("counts", counts)
    print(
        f"{total} damaged files: {counts['read']} read all the same, {counts['refused']} refused, "
        f"{len(failed)} failed; memory grew by {grown:.0f} MB"
    )
    assert not failed, "\n".join(failed[:40])
    assert grown < MOST_MB

"""Stores in shards: the same samples, the same bytes each time, any folder of several, and damage said in one line."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from avsep.cli import main
from avsep.data.mixing import collate
from avsep.data.store import Store, StoreWriter, add_features
from avsep.data.store import sharding as shards
from avsep.data.store.checking import check_store
from avsep.data.store.sharding import shard_store
from avsep.errors import ConfigError, DataError, RunError
from avsep.files import FolderLock
from avsep.mixers.mixtures import TrainingMixtures
from avsep.spec import FrontEndSpec
from avsep.types import VisualSource
from support.folders import contents
from support.tones import RATE, TINY_FRONT_END, stream_of, tiny_run_spec

SHARD_MB = 0.2
OBJECT, MOTION = VisualSource("object", "frames", frames=3), VisualSource("motion", "frames")


@pytest.fixture(scope="module")
def source(tone_store, tmp_path_factory) -> Path:
    """The tones, with a clip whose id has dots and stored features."""
    copy = shutil.copytree(tone_store, tmp_path_factory.mktemp("source") / "store")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["clips"][0]["id"] = "ding.train.50%"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    add_features(Store.open(copy), "clip", "object", lambda c: np.full((2, 5), c.index, np.float16))
    return copy


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> Path:
    return shard_store(Store.open(source), tmp_path_factory.mktemp("made") / "shards", shard_mb=SHARD_MB).path


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def failure(argv: list[object], capsys: pytest.CaptureFixture) -> str:
    """The one line on standard error of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.strip() and "━" not in text]
    return line


def edit(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_everything_reads_the_same(source, made):
    plain, sharded = Store.open(source), Store.open(made, verify=True)
    assert len(sharded.manifest["shards"]) > 4
    assert sharded.content_hash == plain.content_hash
    assert sharded.feature_hash("clip") == plain.feature_hash("clip")
    assert sharded.clips == plain.clips
    features = VisualSource("object", "features", "clip", 5, 3)
    for clip in plain.clips:
        assert np.array_equal(sharded.read_audio(clip, -3, 999), plain.read_audio(clip, -3, 999))
        for start, samples in ((100, 5000), (-100, 500), (clip.samples - 50, 100), (9, clip.samples + 7)):
            one, other = (s.read_crop(clip, start, samples, 1.3) for s in (plain, sharded))
            assert np.array_equal(one, other)
            audio = plain.read_audio(clip, start, samples - 1, tile=clip.samples < samples)
            assert np.array_equal(one, np.append(np.clip(audio * np.float32(1.3), -1, 1), np.float32(0)))
        for what in (OBJECT, MOTION, features):
            one, other = (s.read_visual(clip, what, centre_s=0.7, duration_s=1.1) for s in (plain, sharded))
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
            one[0] = 0  # a copy, and not the file
        assert np.array_equal(sharded.timeline(clip).motion, plain.timeline(clip).motion)
    assert check_store(made) == check_store(source)


def test_mixtures_are_the_same_in_any_number_of_processes(source, made):
    from torch.utils.data import DataLoader

    front_end, train = FrontEndSpec(**TINY_FRONT_END), tiny_run_spec().train
    numbers = {name: n for n, name in enumerate(Store.open(source).classes)}
    batches = []
    for path, settings in (
        (source, {}),
        (made, {}),
        (made, {"num_workers": 1}),
        (made, {"num_workers": 1, "multiprocessing_context": "spawn"}),
    ):
        store = Store.open(path)
        data = TrainingMixtures(
            store, store.select(split="train"), [], train, front_end, [OBJECT, MOTION], numbers, task=0, epoch=1
        )
        batches.append(list(DataLoader(data, batch_size=train.batch_size, collate_fn=collate, **settings)))
    for other in batches[1:]:
        for one, another in zip(batches[0], other, strict=True):
            assert one.clips == another.clips
            for field in ("sources", "class_ids", "video_ids", "is_memory"):
                assert getattr(one, field).equal(getattr(another, field)), field
            assert one.visual.object.equal(another.visual.object)
            assert one.visual.motion.equal(another.visual.motion)


def test_training_on_shards_gives_the_same_weights(tone_store, tone_run, tmp_path):
    from avsep.training.learner import ContinualLearner

    sharded = shard_store(Store.open(tone_store), tmp_path / "shards", shard_mb=0.3)
    stream = stream_of(sharded)
    ContinualLearner.from_spec(tiny_run_spec(), accelerator="cpu").fit(stream, tmp_path / "run", progress=False)
    one, other = (load_file(r / "tasks/01/separator/model.safetensors") for r in (tmp_path / "run", tone_run))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_same_bytes_each_time_and_after_a_kill(source, made, tmp_path, monkeypatch):
    written, calls = shards._write_shard, []

    def dies(*args):
        calls.append(args[1].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return written(*args)

    monkeypatch.setattr(shards, "_write_shard", dies)
    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        shard_store(Store.open(source), out, shard_mb=SHARD_MB)
    with pytest.raises(DataError, match=r"an unfinished store: .* avsep data shard STORE --out"):
        Store.open(out)
    (out / "shards" / ".train-000002-x.tar").write_bytes(b"left by a killed process")
    first = out / "shards" / calls[0]
    first.write_bytes(first.read_bytes()[:-1] + b"x")  # finished, but damaged since
    noted = out / ".journal" / f"{calls[1]}.json"
    noted.write_text(noted.read_text().replace('"files"', '"fi1es"'))  # likewise
    with pytest.raises(DataError, match="another store or with other settings"):
        shard_store(Store.open(source), out, shard_mb=1)
    shard_store(Store.open(source), out, shard_mb=SHARD_MB)
    assert calls.count(calls[0]) == 2
    assert calls.count(calls[1]) == 2
    assert contents(out) == contents(made)
    before = contents(out)
    assert len(shard_store(Store.open(source), out, shard_mb=SHARD_MB).clips) == len(Store.open(source).clips)
    assert contents(out) == before


@pytest.mark.parametrize("at", ["before the header", "at the second disk"])
def test_killed_while_it_begins(at, source, made, tmp_path):
    """What is half-written then has a name of its own, which keeps nobody from beginning again."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    half = out / shards._JOURNAL if at == "before the header" else disk
    half.mkdir(parents=True)
    (half / ".staging-0a1b2c3d-4194303-x-half.json").write_text("{")
    store = shard_store(Store.open(source), out, shard_mb=SHARD_MB, folders=[disk])
    assert len(store.clips) == len(Store.open(made).clips)


def test_shards_of_shards_are_the_shards_of_the_files(source, made, tmp_path):
    large = shard_store(Store.open(made), tmp_path / "large", shard_mb=100)
    assert [s["name"] for s in large.manifest["shards"]] == ["train-000000.tar", "val-000000.tar", "test-000000.tar"]
    assert contents(shard_store(large, tmp_path / "small", shard_mb=SHARD_MB).path) == contents(made)


def test_several_disks_and_a_move(source, tmp_path):
    disks = [tmp_path / "disk1", tmp_path / "disk2"]
    store = shard_store(Store.open(source), tmp_path / "out", shard_mb=SHARD_MB, folders=disks)
    held = [len(list(f.glob("*.tar"))) for f in (tmp_path / "out" / "shards", *disks)]
    assert max(held) - min(held) <= 1
    assert sum(held) == len(store.manifest["shards"])
    for shard in disks[1].glob("*.tar"):  # from one disk to another: nothing is to be said
        shard.rename(disks[0] / shard.name)
    Store.open(tmp_path / "out", verify=True)
    disks[0].rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"tar is missing \(a shard\): put it back, or name its folder in shard_folders"
    ):
        Store.open(tmp_path / "out")
    edit(tmp_path / "out", lambda m: m.update(shard_folders=["shards", "../elsewhere"]))
    Store.open(tmp_path / "out", verify=True)
    with pytest.raises(DataError, match="holds the shards of another store"):
        shard_store(Store.open(source), tmp_path / "out2", shard_mb=1, folders=[tmp_path / "elsewhere"])


def test_features_can_be_added_to_shards(copy):
    store = add_features(Store.open(copy), "mae", "motion", lambda c: np.full((3, 4), c.index, np.float32))
    clip = store.clips[5]
    read = store.read_visual(clip, VisualSource("motion", "features", "mae", 3), centre_s=0, duration_s=1)
    assert np.array_equal(read, np.full((3, 4), 5))
    assert store.read_visual(clip, MOTION, centre_s=0.5, duration_s=1).shape == (8, 1, 16, 16)


def test_tar_and_webdataset_read_the_shards(source, made):
    store = Store.open(source)
    for shard in sorted((made / "shards").iterdir()):
        with tarfile.open(shard) as tar:
            assert all(member.mtime == 0 and member.uid == 0 for member in tar.getmembers())
    wds = pytest.importorskip("webdataset")
    urls = sorted(str(p) for p in (made / "shards").glob("*.tar"))
    seen = set()
    for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False):
        facts = json.loads(sample["json"])
        clip = store.clip(facts["id"])
        assert (facts["class"], facts["split"], facts["samples"]) == (clip.class_name, clip.split, clip.samples)
        assert Path(sample["__url__"]).name.startswith(clip.split)
        path = store.file(clip, "audio")
        assert path is not None
        assert sample["audio.wav"] == path.read_bytes()
        seen.add(clip.id)
        decoded = wds.autodecode.Decoder([wds.autodecode.basichandlers])(sample)
        assert np.array_equal(decoded["features.clip.npy"], np.full((2, 5), clip.index))
    assert seen == {c.id for c in store.clips}


def test_a_long_id_is_kept_whole(tmp_path):
    name = "ä" * 60 + "x" * 40  # too long for the plain form of a tar's names
    with StoreWriter(tmp_path / "s", classes=["a"], sample_rate_hz=RATE, origin={}) as writer:
        writer.write_clip(name, "a", "train", np.arange(50, dtype=np.int16))
        store = shard_store(writer.finish([name]), tmp_path / "shards")
    assert np.array_equal(store.read_audio(store.clips[0]) * 32768, np.arange(50))
    with tarfile.open(tmp_path / "shards" / "shards" / "train-000000.tar") as tar:
        assert tar.getnames() == [f"{name}.audio.wav", f"{name}.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "shards/val-000000.tar").unlink(), "val-000000.tar is missing (a shard)"),
        (lambda p: (p / "shards/val-000000.tar").write_bytes(b"x" * 1000), "val-000000.tar has 1000 bytes instead of"),
        (
            lambda p: edit(p, lambda m: m["clips"][3]["files"]["audio"].update(shard=99)),
            "clip 'ding-val-0': its audio is said to lie at",
        ),
        (
            lambda p: edit(p, lambda m: m["clips"][3]["files"]["audio"].update(offset=10**12)),
            "its audio is said to lie at 1000000000000 of shard",
        ),
        (lambda p: edit(p, lambda m: m["clips"][3]["files"]["audio"].pop("offset")), "is damaged: KeyError 'offset'"),
        (lambda p: edit(p, lambda m: m["shards"][0].update(name="../x.tar")), "damaged record of shard '../x.tar'"),
        (lambda p: edit(p, lambda m: m["shards"][0].update(name="a\0.tar")), "damaged record of shard"),
        (lambda p: edit(p, lambda m: m["shards"][0].update(bytes=-1)), "damaged record of shard"),
        (lambda p: edit(p, lambda m: m.update(shards={"a": 1})), "shards must be a list"),
        (lambda p: edit(p, lambda m: m.update(origin=["x"])), "does not say how a store was made"),
        (lambda p: edit(p, lambda m: m.update(origin={"banks": [{"name": "a"}]})), "does not say how a store was made"),
        (lambda p: edit(p, lambda m: m.update(shard_folders="here")), "shard_folders must be a list of folders"),
        (lambda p: edit(p, lambda m: m.pop("shard_folders")), "shard_folders must be a list of folders"),
        (lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text()[:900]), "is it truncated?"),
    ],
)
def test_damage_is_one_line(damage, message, copy, capsys):
    damage(copy)
    assert message in failure(["data", "info", copy], capsys)


def test_a_changed_byte_and_a_wrong_place_are_found_by_the_check(copy, capsys):
    shard = copy / "shards" / "test-000000.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    Store.open(copy)
    line = failure(["data", "check", copy], capsys)
    assert "test-000000.tar does not match its hash in the manifest" in line
    data[3000] ^= 1
    shard.write_bytes(data)
    edit(copy, lambda m: m["clips"][1]["files"]["object"].update(offset=0))
    assert ".object.npy in " in (line := failure(["data", "check", copy], capsys))
    assert "does not match its hash" in line
    store = Store.open(copy)
    with pytest.raises(DataError, match=r"ding-train-1\.object\.npy in .* is not a readable array \(it is no \.npy"):
        store.read_visual(store.clips[1], OBJECT, centre_s=0, duration_s=1)


def test_what_cannot_be_sharded(source, made, tmp_path, capsys):
    store = Store.open(source)
    assert "is the store itself" in failure(["data", "shard", source, "--out", source], capsys)
    assert "0 MB cannot be made" in failure(["data", "shard", source, "--out", tmp_path / "n", "--shard-mb", 0], capsys)
    assert not (tmp_path / "n").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    assert "thesis.tex" in failure(["data", "shard", source, "--out", tmp_path / "thesis"], capsys)
    line = failure(["data", "shard", source, "--out", tmp_path / "n", "--disk", tmp_path / "thesis"], capsys)
    assert "thesis.tex" in line
    with pytest.raises(DataError, match="shards of another store or with other settings"):
        shard_store(store, made, shard_mb=7)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        shard_store(store, tmp_path / "file")
    with FolderLock(tmp_path / "held"), pytest.raises(RunError, match="another process"):
        shard_store(store, tmp_path / "held")
    broken = shutil.copytree(source, tmp_path / "broken")
    clip = store.clips[4]
    file = broken / "audio" / f"{clip.id}.wav"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    line = failure(["data", "shard", broken, "--out", tmp_path / "m"], capsys)
    assert f"{clip.id}.wav does not match its hash" in line
    assert {p.name for p in (tmp_path / "m").rglob("*.tar")} < {
        p.name for p in made.rglob("*.tar")
    }  # none half-written
    assert not (tmp_path / "m" / "manifest.json").exists()

"""Stores whose labels expand: families first, instruments later."""

from __future__ import annotations

import json
import shutil

import pytest

import avsep.data.store.families as module
from avsep.data.store import SPLITS, Store
from avsep.data.store.families import family_shares, write_families
from avsep.data.store.sharding import shard_store
from avsep.data.tasks import task_stream
from avsep.errors import ConfigError, DataError
from support.commands import run
from support.folders import contents

FAMILIES = {"struck": ["ding", "hum"], "blown": ["whirr"]}


def test_half_of_the_clips_are_of_the_family_and_nothing_else_changes(store, tmp_path):
    made = write_families(store, tmp_path / "made", FAMILIES)
    assert made.classes == ("struck", "blown", *store.classes)
    assert made.content_hash != store.content_hash
    shares = family_shares(store, FAMILIES)
    for before, after in zip(store.clips, made.clips, strict=True):
        assert after.class_name == shares.get(before.id, before.class_name)
        assert (after.id, after.split, after.samples) == (before.id, before.split, before.samples)
    for name, members in FAMILIES.items():
        for split in SPLITS:
            counts = [len(store.select(classes=[member], split=split)) for member in members]
            left = [len(made.select(classes=[member], split=split)) for member in members]
            assert left == [count - count // 2 for count in counts]
            assert len(made.select(classes=[name], split=split)) == sum(count // 2 for count in counts) > 0
    assert made.select(classes=["peep"]) == store.select(classes=["peep"])  # of no family
    Store.open(made.path, verify=True)
    assert made.manifest["origin"]["families"] == FAMILIES


def test_a_stream_of_families_and_then_their_instruments(store, tmp_path):
    made = write_families(store, tmp_path / "made", FAMILIES)
    stream = task_stream(made, [["struck", "blown"], ["ding", "hum", "whirr"]], clip_samples=8191)
    first, second = stream.tasks
    coarse, fine = ({clip.id for clip in stream.train_clips(task)} for task in (first, second))
    assert coarse == {i for i in family_shares(store, FAMILIES) if store.clip(i).split == "train"}
    assert not coarse & fine
    pairs = {frozenset(mixture.classes) for mixture in stream.protocol.mixtures if mixture.task == 0}
    assert pairs == {frozenset(("struck", "blown"))}  # a partner is of another family


def test_the_choice_depends_on_the_seed_and_the_percentage_alone(store):
    assert family_shares(store, FAMILIES) == family_shares(store, FAMILIES)
    assert len({json.dumps(family_shares(store, FAMILIES, seed=seed)) for seed in range(6)}) > 3
    few, many = (family_shares(store, FAMILIES, percent=percent) for percent in (1, 99))
    sizes = [[len(store.select(classes=[c], split=s)) for s in SPLITS] for c in ("ding", "hum", "whirr")]
    assert len(few) == sum(1 for of_class in sizes for _ in of_class)
    assert len(many) == sum(count - 1 for of_class in sizes for count in of_class)


def test_what_cannot_be_is_told_in_a_line(store, tmp_path):
    for families, message in (
        ({}, "there are no families"),
        *(({name: ["ding"]}, "cannot be the name of a family") for name in ("", " a", "a,b", "a;b", "a\nb")),
        ({"struck": []}, "family 'struck' has no classes"),
        ({"ding": ["hum"]}, "family 'ding' is named like a class of the store"),
        ({"struck": ["dign"]}, "family 'struck' names class 'dign', which the store lacks: did you mean 'ding'"),
        ({"struck": ["ding"], "blown": ["ding"]}, "class 'ding' is named twice, in families 'struck' and 'blown'"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_families(store, tmp_path / "made", families)
    with pytest.raises(ConfigError, match="percent must be 1 to 99, got 100"):
        family_shares(store, FAMILIES, percent=100)
    shards = shard_store(store, tmp_path / "shards")
    with pytest.raises(DataError, match="are in shards: give the store that these were made of"):
        write_families(shards, tmp_path / "made", FAMILIES)
    assert not (tmp_path / "made").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty \(it holds 'notes.txt'\)"):
        write_families(store, tmp_path / "full", FAMILIES)
    assert contents(tmp_path / "full") == {"notes.txt": b"mine"}


def test_a_store_that_cannot_be_read_is_not_left_there(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "link_or_copy", lambda _, target: target.write_bytes(b"cut short"))
    with pytest.raises(DataError, match="it is truncated or was replaced"):
        write_families(store, tmp_path / "made", FAMILIES)
    assert list(tmp_path.iterdir()) == []


def test_linked_files_are_followed(tone_store, tmp_path):
    copy = shutil.copytree(tone_store, tmp_path / "copy")
    sound = copy / "audio" / "ding-test-0.wav"
    sound.rename(copy / "elsewhere.wav")
    sound.symlink_to("../elsewhere.wav")
    made = write_families(Store.open(copy), tmp_path / "made", FAMILIES)
    assert (made.path / "audio" / sound.name).read_bytes() == sound.read_bytes()
    assert not (made.path / "audio" / sound.name).is_symlink()


def test_the_command(tone_store, tmp_path, capsys):
    out = tmp_path / "made"
    out.mkdir()  # an empty folder is taken
    argv = ["data", "families", tone_store, "--out", out]
    assert run(*argv, "--family", "struck = ding, hum", "--family", "blown=whirr", "--json") == 0
    assert json.loads(capsys.readouterr().out)["families"] == FAMILIES
    assert Store.open(out).classes[:2] == ("struck", "blown")
    for families, message in (
        (("struck",), "--family struck: give FAMILY=CLASS,CLASS, such as bowed=violin,cello"),
        (("a=ding", "a=hum"), "--family a=hum: family 'a' is given twice; name all its classes at once"),
    ):
        given = [word for text in families for word in ("--family", text)]
        assert run("data", "families", tone_store, "--out", tmp_path / "other", *given) == 2
        assert message in " ".join(capsys.readouterr().err.split())

"""Sounds without pictures among clips that have some: in stores, mixtures, protocols and runs that learn from them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import soundfile

from avsep.data.codecs import CodedCrops
from avsep.data.mixing import collate, load_source
from avsep.data.protocol import build_protocol
from avsep.data.store import Store, StoreWriter, add_features
from avsep.data.tasks import task_stream
from avsep.errors import DataError
from avsep.evaluation.budget import exemplar_bytes
from avsep.mixers.base import Pool
from avsep.mixers.mixtures import TrainingMixtures
from avsep.mixers.varied import Varied
from avsep.separator import load_separator
from avsep.spec import FrontEndSpec, TrainSpec
from avsep.training.extending import extend
from avsep.types import VisualSource
from support.continual_runs import make_learner
from support.tones import RATE, TINY_FRONT_END, TINY_TASKS, TINY_TRAIN, stream_of

SOUNDS = ("peep", "whirr")
SOURCES = (VisualSource(role="object", kind="frames", frames=1), VisualSource(role="motion", kind="frames"))
FRONT_END = FrontEndSpec(**TINY_FRONT_END)


@pytest.fixture(scope="module")
def heard_store(tone_store, tmp_path_factory):
    """The tones; of peep and whirr there are the sounds alone."""
    whole = Store.open(tone_store)
    path = tmp_path_factory.mktemp("heard") / "store"
    with StoreWriter(path, classes=whole.classes, sample_rate_hz=RATE, origin={"generator": "tests"}) as writer:
        for clip in whole.clips:
            seen = whole.timeline(clip)
            frames = {} if clip.class_name in SOUNDS else {"object_frames": seen.object, "motion_frames": seen.motion}
            pcm = whole.read_pcm(clip, 0, clip.samples)
            writer.write_clip(clip.id, clip.class_name, clip.split, pcm, **frames)
        return writer.finish([clip.id for clip in whole.clips])


def test_a_store_says_which_clips_are_sounds_alone(heard_store, tone_store):
    heard = [clip.class_name for clip in heard_store.clips if not heard_store.has_pictures(clip)]
    assert set(heard) == set(SOUNDS)
    Store.open(heard_store.path, verify=True)
    peep = heard_store.select(classes=["peep"])[0]
    assert exemplar_bytes(heard_store, peep, SOURCES, FRONT_END).total == 2 * peep.samples
    whole = Store.open(tone_store)
    assert all(map(whole.has_pictures, whole.clips))


def test_features_are_added_to_what_can_be_seen(heard_store, tmp_path):
    store = Store.open(shutil.copytree(heard_store.path, tmp_path / "store"))
    asked = []

    def features(clip):
        asked.append(clip.class_name)
        return np.ones((2, 5), np.float32)

    found = add_features(store, "some", "object", features)
    assert not set(SOUNDS) & set(asked)
    assert len(found.feature_hash("some")) == 64
    source = VisualSource(role="object", kind="features", name="some")
    peep, ding = found.select(classes=["peep"])[0], found.select(classes=["ding"])[0]
    assert found.read_visual(peep, source, centre_s=0.5, duration_s=0.7).shape == (1, 5)
    assert found.read_visual(ding, source, centre_s=0.5, duration_s=0.7).max() == 1


def test_what_is_not_seen_is_asked_for_as_unseen(heard_store):
    peep, ding = heard_store.select(classes=["peep"])[0], heard_store.select(classes=["ding"])[0]

    def load(clip, role="source", **how):
        return load_source(heard_store, clip, 0, FRONT_END, SOURCES, 0, role=role, **how)

    batch = collate([[load(ding), load(peep)]])
    assert batch.visual.seen.tolist() == [[True, False]]
    assert float(batch.sources[0, 1].abs().max()) > 0
    assert int(batch.visual.object[0, 1].max()) == 0
    assert load(peep, "moving").role == "unseen"
    assert np.array_equal(load(peep, stand_in=(ding, 0, None)).visual["motion"], load(ding).visual["motion"])
    assert np.array_equal(load(peep, stand_in=(ding, 0, None)).audio, load(peep).audio)
    coded = CodedCrops(heard_store, "mulaw", FRONT_END.clip_samples, "jpeg")
    shown = load(peep, stand_in=(ding, 0, coded))  # an exemplar, of which no other frames are kept
    assert np.array_equal(shown.visual["motion"], load(ding, coded=coded).visual["motion"])
    assert not np.array_equal(shown.visual["motion"], load(ding).visual["motion"])
    assert np.array_equal(shown.audio, load(peep).audio)


def test_a_store_of_sounds_alone_is_read_by_who_goes_unseen(heard_store, tmp_path):
    with StoreWriter(tmp_path / "store", classes=SOUNDS, sample_rate_hz=RATE, origin={}) as writer:
        for clip in heard_store.select(classes=SOUNDS):
            writer.write_clip(clip.id, clip.class_name, clip.split, heard_store.read_pcm(clip, 0, clip.samples))
        store = writer.finish([clip.id for clip in heard_store.select(classes=SOUNDS)])
    clip = store.clips[0]
    found = load_source(store, clip, 0, FRONT_END, SOURCES, 0, role="unseen_source")
    assert found.visual["object"].shape[0] == 1
    assert not found.visual["motion"].any()
    with pytest.raises(DataError, match="has no object frames"):
        load_source(store, clip, 0, FRONT_END, SOURCES, 0)


def test_a_stand_in_that_is_an_exemplar_is_seen_through_its_codec(heard_store):
    clips = heard_store.select(split="train")
    own, old = ([c for c in clips if (c.class_name in SOUNDS) == sounds] for sounds in (True, False))
    coded = CodedCrops(heard_store, "int16", FRONT_END.clip_samples, "jpeg")
    index = {name: number for number, name in enumerate(heard_store.classes)}
    data = TrainingMixtures(
        heard_store,
        own,
        old,
        TrainSpec(**TINY_TRAIN),
        FRONT_END,
        SOURCES,
        index,
        task=1,
        epoch=0,
        crops={clip.id: 0 for clip in old},
        coded=coded,
    )
    kept = {
        load_source(heard_store, clip, 0, FRONT_END, SOURCES, 0, coded=coded).visual["motion"].tobytes() for clip in old
    }
    shown = [s.visual["motion"].tobytes() for item in range(12) for s in data[item]]
    assert set(shown) <= kept  # all there is to be seen are exemplars


def pool_of(store, current=("peep", "whirr")):
    clips = store.select(split="train")
    own = [c for c in clips if c.class_name in current]
    old = [c for c in clips if c.class_name not in current]
    heard = frozenset(c.id for c in clips if not store.has_pictures(c))
    return Pool(own, old, TrainSpec(**TINY_TRAIN), FRONT_END, 1, heard=heard)


def test_two_of_a_class_are_both_seen(heard_store):
    mixer, pool = Varied(same_class=0.5, absent=0.4), pool_of(heard_store)
    rng = np.random.default_rng(0)
    mixer.begin_epoch(pool, rng)
    twice = set()
    for item in range(400):
        drawn = [d for d in mixer.draw(rng, item, pool) if d.role != "background"]
        names = [pool[d.clip].class_name for d in drawn]
        if names[0] == names[1]:
            twice.add(names[0])
            assert not any(pool[d.clip].id in pool.heard for d in drawn)
    assert twice == {"ding", "hum"}


def test_new_classes_are_heard_as_often_as_is_asked(heard_store):
    pool = pool_of(heard_store, current=("peep",))
    shares = []
    for current in (0.0, 1.0):
        mixer, rng = Varied(same_class=0.0, absent=0.0, current=current), np.random.default_rng(1)
        mixer.begin_epoch(pool, rng)
        drawn = [mixer.draw(rng, item, pool) for item in range(300)]
        new = [any(pool[d.clip].class_name == "peep" for d in one if d.role != "background") for one in drawn]
        shares.append(sum(new) / len(new))
    assert shares[0] == pytest.approx(0.5, abs=0.1)  # two of four classes
    assert shares[1] == 1.0


def test_test_mixtures_show_nothing_that_is_not_there(heard_store):
    stream = task_stream(heard_store, TINY_TASKS, clip_samples=FRONT_END.clip_samples)
    protocol = build_protocol(
        "audiovisual", heard_store, stream.tasks, split="test", clip_samples=FRONT_END.clip_samples
    )
    of_list = {m.list_name for m in protocol.mixtures if set(m.classes) & set(SOUNDS)}
    assert {"task-1", "cross", "three", "unseen", "absent-unseen"} <= of_list
    assert not of_list & {"same-class", "absent-moving", "absent-still", "photo"}


def test_a_decoder_that_needs_pictures_says_so(heard_store, tmp_path):
    learner = make_learner("finetune", "random_per_class")
    with pytest.raises(DataError, match="sound without pictures"):
        learner.fit(stream_of(heard_store.path), tmp_path / "run", progress=False)


def test_a_class_is_learned_from_recordings_that_are_only_heard(tone_store, tmp_path):
    pytest.importorskip("av")
    crops = ("random_per_class", {"per_class": 2, "keep": "clip"})
    learner = make_learner(
        "contavsep", crops, separator="aligned", mixer={"name": "varied", "params": {"current": 0.5}}
    )
    learner.fit(stream_of(tone_store, TINY_TASKS[:1]), tmp_path / "run", progress=False)
    whole = Store.open(tone_store)
    for name in SOUNDS:
        (tmp_path / "recordings" / name).mkdir(parents=True)
        for number, clip in enumerate(whole.select(classes=[name])[:5]):
            soundfile.write(tmp_path / "recordings" / name / f"{number}.wav", whole.read_audio(clip), RATE)
    how = {"device": "cpu", "progress": False, "max_loss_db": None}
    found = extend(tmp_path / "run", tmp_path / "recordings", ["peep"], **how)
    assert [change.class_name for change in found.changes] == ["ding", "hum", "peep"]
    assert all(change.after is not None for change in found.changes)
    second = extend(tmp_path / "run", tmp_path / "recordings", ["whirr"], **how)  # two that are only heard
    assert second.task == 2
    memory = Store.open(tmp_path / "run" / "memory")
    assert {c.class_name for c in memory.clips if not memory.has_pictures(c)} == set(SOUNDS)
    assert load_separator(tmp_path / "run").classes == ("ding", "hum", "peep", "whirr")


def test_a_separator_that_needs_pictures_is_not_taught_by_sounds(tone_store, tmp_path):
    pytest.importorskip("av")
    learner = make_learner("finetune", ("random_per_class", {"per_class": 2, "keep": "clip"}))
    learner.fit(stream_of(tone_store, TINY_TASKS[:1]), tmp_path / "run", progress=False)
    (tmp_path / "recordings" / "peep").mkdir(parents=True)
    whole = Store.open(tone_store)
    for number, clip in enumerate(whole.select(classes=["peep"])):
        soundfile.write(tmp_path / "recordings" / "peep" / f"{number}.wav", whole.read_audio(clip), RATE)
    with pytest.raises(DataError, match="has no frames"):
        extend(tmp_path / "run", tmp_path / "recordings", ["peep"], device="cpu", progress=False)
    assert not (tmp_path / ".run.learning").exists()

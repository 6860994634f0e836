"""Mixtures: what is cut, scaled and drawn."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch

from avsep.data.augment import Change, draw_change, equalise, reverberate, with_speed
from avsep.data.mixing import collate, load_mixtures, load_source
from avsep.data.protocol import TestMixture, build_protocol
from avsep.data.store import Clip, Store, add_features
from avsep.data.tasks import make_tasks
from avsep.errors import ConfigError, DataError
from avsep.mixers.mixtures import TrainingMixtures
from avsep.spec import AugmentSpec, FrontEndSpec, TrainSpec
from avsep.types import VisualSource
from support.tones import RATE, TINY_FRONT_END, make_tone_store

FRONT_END = FrontEndSpec(**TINY_FRONT_END)
SOURCES = (VisualSource("object", "frames", frames=3), VisualSource("motion", "frames"))
CLASSES = {"ding": 0, "hum": 1, "peep": 2, "whirr": 3}


def _epoch(store, task=1, epoch=0, exemplars=("ding-train-0",), crops=None, **settings):
    train = TrainSpec(**{"batch_size": 4, "current_repeats": 4, "memory_repeats": 12, **settings})
    clips = store.select(classes=["peep", "whirr"], split="train")
    kept = [store.clip(e) for e in exemplars]
    return TrainingMixtures(store, clips, kept, train, FRONT_END, SOURCES, CLASSES, task=task, epoch=epoch, crops=crops)


def test_source_is_gain_then_clip_with_a_last_zero(store):
    clip = store.clip("ding-train-0")
    source = load_source(store, clip, 1000, FRONT_END, (), 0, gain=4.0)
    raw = store.read_audio(clip, 1000, FRONT_END.clip_samples)
    assert source.audio.shape == (8191,)
    assert source.audio[-1] == 0
    np.testing.assert_array_equal(source.audio[:-1], np.clip(4.0 * raw[:-1], -1, 1))
    assert np.abs(source.audio).max() == 1.0


def test_a_short_clip_repeats(tmp_path):
    store = Store.open(make_tone_store(tmp_path / "short", seconds=0.3))
    clip = store.clip("hum-train-1")
    whole = store.read_audio(clip)
    source = load_source(store, clip, 500, FRONT_END, SOURCES, 0)
    np.testing.assert_array_equal(source.audio[: len(whole)], np.roll(whole, -500))
    assert source.audio[len(whole)] == whole[500]


def test_batch_is_scaled_by_the_number_of_sources(store):
    clips = [store.clip(i) for i in ("ding-train-0", "hum-train-0", "peep-train-0")]
    sources = [load_source(store, c, 0, FRONT_END, SOURCES, k) for k, c in enumerate(clips)]
    batch = collate([sources, sources[::-1]])
    assert batch.sources.shape == (2, 3, 8191)
    torch.testing.assert_close(batch.sources[0, 1] * 3, torch.from_numpy(sources[1].audio))
    torch.testing.assert_close(batch.mixture, batch.sources.sum(1))
    assert batch.class_ids.tolist() == [[0, 1, 2], [2, 1, 0]]
    assert batch.video_ids[0].tolist() == [c.index for c in clips]
    assert batch.visual.object.shape[:3] == (2, 3, 3)
    assert batch.visual.object.dtype == torch.uint8
    assert batch.visual.motion.shape[:2] == (2, 3)


def test_a_batch_is_pinned_whole(store, monkeypatch):
    sources = [load_source(store, store.clip(i), 0, FRONT_END, SOURCES, 0) for i in ("ding-train-0", "hum-train-0")]
    batch = collate([sources])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    copy = torch.utils.data._utils.pin_memory.pin_memory(batch)  # what a DataLoader does
    assert len(pinned) == 6
    assert copy.sources is not batch.sources
    assert torch.equal(copy.sources, batch.sources)
    assert copy.clips == batch.clips


def test_items_depend_on_nothing_but_their_number(store):
    first, second = _epoch(store), _epoch(store)
    backwards = {i: first[i] for i in reversed(range(len(first)))}
    for i in range(len(second)):
        for a, b in zip(second[i], backwards[i], strict=True):
            assert a.clip == b.clip
            np.testing.assert_array_equal(a.audio, b.audio)
    other = _epoch(store, epoch=1)
    assert any(a.clip != b.clip for i in range(len(other)) for a, b in zip(other[i], first[i], strict=True))
    seeded = _epoch(store, seed=5)
    assert any(a.clip != b.clip for i in range(len(other)) for a, b in zip(seeded[i], first[i], strict=True))


def test_crops_move_and_gains_stay_in_range(store):
    data = _epoch(store, gain=(0.5, 1.5))
    starts = {float(s.audio[0]) for i in range(len(data)) for s in data[i]}
    assert len(starts) > 10
    peaks = [np.abs(s.audio).max() for i in range(len(data)) for s in data[i]]
    assert min(peaks) > 0.05
    assert max(peaks) <= 1


def test_published_oversampling():
    """Items an epoch and the share of memory sources of the published lists: 190/205/244/201 clips, 5 new classes."""
    per_task, memory = [190, 205, 244, 201], [0, 5, 10, 15]
    found, shares = [], []
    for task, (current, kept) in enumerate(zip(per_task, memory, strict=True)):
        clips = [Clip(f"c{i}", "a", "train", RATE, i) for i in range(current)]
        kept_clips = [Clip(f"m{i}", "b", "train", RATE, 1000 + i) for i in range(kept)]
        data = TrainingMixtures(
            None, clips, kept_clips, TrainSpec(), FRONT_END, (), {"a": 0, "b": 1}, task=task, epoch=0
        )
        found.append(len(data.mixer.entries))
        shares.append(float(np.mean(data.mixer.entries >= current)))
        assert data.steps == len(data.mixer.entries) // 32
    assert found == [7600, 12200, 17760, 20040]
    assert shares == pytest.approx([0, 0.328, 0.450, 0.599], abs=5e-4)


def test_memory_sources_are_marked_and_drawn_by_their_repeats(store):
    data = _epoch(store, steps_per_epoch=None, memory_repeats=24)
    sources = [s for i in range(len(data)) for s in data[i]]
    assert all(s.is_memory == (s.clip.class_name == "ding") for s in sources)
    share = Counter(s.is_memory for s in sources)[True] / len(sources)
    assert 0.3 < share < 0.7  # 24 of 48 items


def test_different_class_partners(store):
    data = _epoch(store, partner="different_class")
    assert all(len({s.clip.class_name for s in data[i]}) == 2 for i in range(len(data)))
    same = _epoch(store, partner="any")
    assert any(len({s.clip.class_name for s in same[i]}) == 1 for i in range(len(same)))
    with pytest.raises(ConfigError, match="partner=different_class needs 4 classes, but task 1 trains on 3"):
        _epoch(store, partner="different_class", sources=4)


def test_different_video_partners(store):
    data = _epoch(store, partner="different_video")
    items = [data[i] for i in range(len(data))]
    assert all(len({s.clip.id for s in item}) == 2 for item in items)
    assert any(len({s.clip.class_name for s in item}) == 1 for item in items)
    assert any(len({s.clip.id for s in item}) == 1 for item in map(_epoch(store).__getitem__, range(len(data))))
    with pytest.raises(ConfigError, match="partner=different_video needs 8 clips, but task 1 trains on 7"):
        _epoch(store, partner="different_video", sources=8)


def test_nothing_is_read_beyond_a_kept_crop(store, monkeypatch):
    read: dict[str, set[int]] = {}
    real = Store.read_crop

    def watch(self, clip, start, length, *rest):
        read.setdefault(clip.id, set()).add(length)
        return real(self, clip, start, length, *rest)

    monkeypatch.setattr(Store, "read_crop", watch)
    epoch = _epoch(store, crops={"ding-train-0": 5}, augment=AugmentSpec(detune_cents=100))
    for item in range(len(epoch)):
        epoch[item]
    assert read.pop("ding-train-0") == {FRONT_END.clip_samples}
    assert len(set().union(*read.values())) > 5


@pytest.mark.parametrize(
    ("seconds", "middles"),
    [(30, range(9, 23)), (18, (9, 10)), (17, (9,)), (12, range(4, 10)), (3, (1, 2, 3))],
)
def test_published_crops_are_around_the_middles_of_whole_seconds(seconds, middles):
    published = FrontEndSpec()
    clip = Clip("a", "a", "train", seconds * published.sample_rate_hz + 5, 0)
    train = TrainSpec(batch_size=1, crop="published")
    data = TrainingMixtures(None, [clip], [], train, published, (), {"a": 0}, task=0, epoch=0)
    rng = np.random.default_rng(0)
    found = {data.pool._start(clip, rng) for _ in range(400)}
    if seconds == 3:  # it repeats until it fills a crop of five whole seconds
        middles = (1, 2, 3, 4, 5)
    assert found == {int(11025 * (c - 0.5)) - 32767 for c in middles}
    anywhere = TrainingMixtures(None, [clip], [], TrainSpec(batch_size=1), published, (), {"a": 0}, task=0, epoch=0)
    assert len({anywhere.pool._start(clip, rng) for _ in range(50)}) > 40


def test_frozen_mixtures_load_as_a_batch(store):
    protocol = build_protocol(
        "fixed", store, make_tasks([["ding", "hum"], ["peep", "whirr"]]), split="test", clip_samples=8191
    )
    mixtures = protocol.at(1)[:5]
    batch = load_mixtures(store, mixtures, FRONT_END, SOURCES, CLASSES)
    assert batch.clips == tuple(m.clips for m in mixtures)
    assert batch.class_ids.tolist() == [[CLASSES[c] for c in m.classes] for m in mixtures]
    raw = store.read_audio(store.clip(mixtures[2].clips[1]), mixtures[2].starts[1], 8190)
    np.testing.assert_allclose(batch.sources[2, 1, :-1].numpy() * 2, raw, atol=1e-7)
    with pytest.raises(DataError, match="has not learned"):
        load_mixtures(store, mixtures, FRONT_END, SOURCES, {"ding": 0})


def test_a_kept_crop_is_always_the_same_and_changes_no_other_draw(store):
    free, kept = _epoch(store), _epoch(store, crops={"ding-train-0": 777, "peep-train-0": 5})
    length, seen = FRONT_END.clip_samples - 1, 0
    for i in range(len(free)):
        for a, b in zip(free[i], kept[i], strict=True):
            assert (a.clip, a.is_memory) == (b.clip, b.is_memory)
            if not b.is_memory:  # peep is no exemplar: its crop is free
                np.testing.assert_array_equal(a.audio, b.audio)
                continue
            seen += 1
            crop = store.read_audio(b.clip, 777, length)
            gain = float(b.audio[:-1] @ crop / (crop @ crop))
            np.testing.assert_allclose(b.audio[:-1], np.clip(gain * crop, -1, 1), atol=1e-6)
            np.testing.assert_array_equal(
                b.visual["motion"],
                store.read_visual(b.clip, SOURCES[1], centre_s=(777 + 4095) / RATE, duration_s=FRONT_END.clip_s),
            )
    assert seen > 3


def test_a_larger_memory_can_hold_its_share():
    """The published lists: 201 clips at task 3 and 15 old classes, of which two have fewer than 30 clips; 30 exemplars
    a class would be 0.977 of the list."""
    sizes = (47, 39, 32, 28, 44, 33, 54, 14, 41, 63, 32, 76, 41, 46, 49)
    clips = [Clip(f"c{i}", "a", "train", RATE, i) for i in range(201)]

    def share(per_class, **settings):
        kept = [
            Clip(f"m{c}-{i}", f"o{c}", "train", RATE, i) for c in range(15) for i in range(min(per_class, sizes[c]))
        ]
        names = {"a": 0, **{f"o{c}": c + 1 for c in range(15)}}
        data = TrainingMixtures(None, clips, kept, TrainSpec(**settings), FRONT_END, (), names, task=3, epoch=0)
        return round(float(np.mean(data.mixer.entries >= 201)), 3), len(data.mixer.entries)

    assert share(1) == share(1, memory_share="constant") == (0.599, 20040)
    assert share(30)[0] == 0.977
    assert share(30)[1] // 32 == 11051
    assert share(4, memory_share="constant") == (0.599, 20040)
    assert share(30, memory_share="constant") == (0.593, 201 * 40 + 13 * 30 * 26 + 28 * 28 + 14 * 57)
    assert share(3, memory_share="constant", memory_repeats=2)[1] == 201 * 40 + 45


def test_a_constant_share_is_of_each_class():
    clips = [Clip(f"c{i}", "a", "train", RATE, i) for i in range(4)]
    kept = [Clip(f"{name}{i}", name, "train", RATE, 9) for name, count in (("b", 1), ("c", 3)) for i in range(count)]
    train = TrainSpec(memory_share="constant", memory_repeats=12, batch_size=2)
    data = TrainingMixtures(None, clips, kept, train, FRONT_END, (), {"a": 0, "b": 1, "c": 2}, task=1, epoch=0)
    assert np.bincount(data.mixer.entries).tolist() == [40] * 4 + [12] + [4] * 3


# -------------------------------------------------------------------------------------------------------------- roles


def _mixture(store, roles, **settings):
    """Test clips of as many classes as there are roles."""
    names = list(CLASSES)[: len(roles)]
    clips = [store.select(classes=[name], split="test")[0].id for name in names]
    return TestMixture(tuple(clips), tuple(names), (0,) * len(names), 0, "roles", roles=tuple(roles), **settings)


def _load(store, *mixtures):
    return load_mixtures(store, mixtures, FRONT_END, SOURCES, CLASSES)


def test_absent_sources_are_silent_and_count_in_the_scale(store):
    plain = _load(store, _mixture(store, ["source", "source", "source"]))
    batch = _load(store, _mixture(store, ["source", "moving", "source"]))
    assert batch.sources.shape == (1, 3, FRONT_END.clip_samples)
    assert torch.equal(batch.sources[0, 1], torch.zeros(FRONT_END.clip_samples))
    assert torch.equal(batch.sources[0, [0, 2]], plain.sources[0, [0, 2]])
    assert torch.equal(batch.visual.motion, plain.visual.motion)  # it is seen all the same
    assert batch.visual.seen is None
    assert batch.background is None


def test_who_is_at_rest_holds_still(store):
    motion = _load(store, _mixture(store, ["source", "still"])).visual.motion
    assert torch.equal(motion[0, 1], motion[0, 1, :1].expand_as(motion[0, 1]))
    assert not torch.equal(motion[0, 0], motion[0, 0, :1].expand_as(motion[0, 0]))


def test_what_nobody_asked_for_is_in_the_mixture_alone(store):
    plain = _load(store, _mixture(store, ["source", "source", "source"]))
    batch = _load(store, _mixture(store, ["source", "source", "background"]), _mixture(store, ["source", "source"]))
    assert batch.sources.shape == (2, 2, FRONT_END.clip_samples)
    assert batch.class_ids.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(batch.mixture[0], plain.mixture[0] * 3 / 2)  # divided by those asked for
    torch.testing.assert_close(batch.mixture[1], batch.sources[1].sum(dim=0))


def test_sources_without_a_picture_are_marked(store):
    batch = _load(store, _mixture(store, ["unseen_source", "source"]), _mixture(store, ["source", "unseen"]))
    assert batch.visual.seen.tolist() == [[False, True], [True, False]]
    assert batch.visual.motion_seen is None
    photos = _load(store, _mixture(store, ["photo_source", "photo"]), _mixture(store, ["source", "source"]))
    assert photos.visual.seen is None
    assert photos.visual.motion_seen.tolist() == [[False, False], [True, True]]
    assert photos.sources[0, 0].abs().max() > 0
    assert photos.sources[0, 1].abs().max() == 0
    assert batch.sources[0, 0].abs().max() > 0
    assert batch.sources[1, 1].abs().max() == 0


def test_level_and_room_of_a_mixture(store):
    plain, quiet, room = (
        _load(store, _mixture(store, ["source", "source"], **settings)).sources
        for settings in ({}, {"gain_db": -20.0}, {"rt60_s": 0.3})
    )
    torch.testing.assert_close(quiet, plain / 10, rtol=1e-5, atol=1e-8)
    energy = plain.square().sum(dim=-1)
    torch.testing.assert_close(room.square().sum(dim=-1), energy, rtol=1e-3, atol=0)
    assert (room - plain).square().sum(dim=-1).min() > 0.05 * energy.min()


def test_reverberation_falls_by_60_db_in_its_time():
    click = np.zeros(4000, np.float32)
    click[0] = 1.0
    heard = reverberate(click, 0.2, 8000, seed=(3,))
    assert np.array_equal(heard, reverberate(click, 0.2, 8000, seed=(3,)))
    assert not np.array_equal(heard, reverberate(click, 0.2, 8000, seed=(4,)))
    early, late = (np.sqrt(np.mean(heard[a:b] ** 2)) for a, b in ((1, 161), (1281, 1441)))
    assert 20 * np.log10(early / late) == pytest.approx(48, abs=5)  # 0.16 s apart
    assert np.abs(heard[1700:]).max() < 1e-6


def test_hashes_of_lists_without_roles_stay_as_they_were(store):
    protocol = build_protocol("fixed", store, make_tasks([list(CLASSES)]), split="test", clip_samples=8191)
    plain = json.dumps(asdict(protocol), sort_keys=True)
    for text in (', "gain_db": 0.0', ', "roles": []', ', "rt60_s": 0.0'):
        assert text in plain
        plain = plain.replace(text, "")
    assert protocol.hash == hashlib.sha256(plain.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ changes


def _tone(hz, samples=8000, rate=8000):
    return np.sin(2 * np.pi * hz * np.arange(samples) / rate).astype(np.float32)


def test_speed_raises_the_pitch():
    change = Change(speed=2 ** (50 / 1200))
    length = 8000
    made = change.apply(_tone(400, change.samples(length)), length, 8000)
    assert len(made) == length
    spectrum = np.abs(np.fft.rfft(made[1000:7000] * np.hanning(6000)))
    assert np.argmax(spectrum) * 8000 / 6000 == pytest.approx(400 * change.speed, abs=1.4)
    assert np.abs(made[1000:7000]).max() == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(with_speed(_tone(400), 8000), _tone(400), atol=1e-6)


def test_the_equaliser_has_its_gains_at_its_bands():
    for hz, gain in ((60, -6.0), (4000, 6.0)):
        made = equalise(_tone(hz, 16000), (-6.0, 6.0), 8000)
        inner = slice(4000, 12000)
        level = 20 * np.log10(np.abs(made[inner]).max() / np.abs(_tone(hz, 16000)[inner]).max()) if hz < 4000 else gain
        assert level == pytest.approx(gain, abs=0.3)
    middle = equalise(_tone(490, 16000), (-6.0, 6.0), 8000)[4000:12000]
    assert 20 * np.log10(np.abs(middle).max()) == pytest.approx(0.0, abs=0.3)  # half-way in log frequency


def test_changes_depend_on_the_item_alone_and_change_no_draw(store):
    plain, changed, again = (
        _epoch(store, augment=augment)
        for augment in (None, AugmentSpec(equaliser_db=6, detune_cents=30, rooms=0.5), AugmentSpec(equaliser_db=6))
    )
    for item in (3, 0):
        one, two = plain[item], changed[item]
        assert [s.clip.id for s in one] == [s.clip.id for s in two]
        assert not any(np.array_equal(a.audio, b.audio) for a, b in zip(one, two, strict=True))
        assert all(np.array_equal(a.visual["motion"], b.visual["motion"]) for a, b in zip(one, two, strict=True))
        for a, b in zip(two, changed[item], strict=True):
            np.testing.assert_array_equal(a.audio, b.audio)
        assert all(len(s.audio) == FRONT_END.clip_samples for s in again[item])


def test_what_is_not_asked_for_is_not_changed():
    rng = np.random.default_rng(0)
    change = draw_change(AugmentSpec(), rng)
    assert change == Change(room=change.room)
    audio = _tone(300)
    assert change.apply(audio, 8000, 8000) is audio


def test_a_source_at_rest_shows_one_moment(tmp_path):
    store = Store.open(make_tone_store(tmp_path / "store"))
    steps = np.arange(6, dtype=np.float32).reshape(2, 3)  # two values at three moments
    store = add_features(store, "steps", "motion", ((c.id, steps) for c in store.clips))
    clip = store.clip("ding-test-0")
    for source, axis in ((SOURCES[1], 0), (VisualSource("motion", "features", "steps", dim=2), 1)):
        moving, still = (
            load_source(store, clip, 0, FRONT_END, (source,), 0, role=role).visual["motion"]
            for role in ("source", "still")
        )
        assert still.shape == moving.shape
        assert len(np.unique(moving, axis=axis).reshape(-1)) > len(np.unique(still, axis=axis).reshape(-1))
        np.testing.assert_array_equal(np.take(still, 0, axis), np.take(moving, 0, axis))
        np.testing.assert_array_equal(np.take(still, -1, axis), np.take(moving, 0, axis))

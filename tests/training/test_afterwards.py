"""What a separator gets once a task is learned: a presence threshold, or mean pictures of its classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from avsep.data.codecs import CodedCrops
from avsep.data.mixing import load_mixtures
from avsep.data.protocol import build_protocol
from avsep.data.store import Store
from avsep.data.tasks import make_tasks, task_stream
from avsep.errors import CheckpointError, ConfigError
from avsep.separator import build_separator, load_separator, save_separator, weights
from avsep.spec import FrontEndSpec
from avsep.training.afterwards import _asked_in_vain, best_threshold, calibrate_presence, mean_pictures
from avsep.training.learner import ContinualLearner
from avsep.types import VisualFeatures
from support.tones import TINY_FRONT_END, TINY_TASKS, TINY_TRAIN

NAMES = [name for task in TINY_TASKS for name in task]


@pytest.fixture(scope="module")
def store(tone_store):
    return Store.open(tone_store)


def small(decoder, classes=NAMES, **params):
    return build_separator(
        classes=classes,
        seed=0,
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 8, "size": 16, "channels": 4}),
        motion_encoder=("motion_cnn", {"dim": 8, "steps": 4, "size": 16, "channels": 4}),
        mask_decoder=(decoder, params),
        front_end=TINY_FRONT_END,
    ).eval()


def aligned():
    return small("aligned_query", dim=8, bands=4)


def iquery(classes=NAMES):
    return small("query_transformer", classes, dim=16, heads=2, feedforward=16, layers=2)


def validation(store):
    samples = FrontEndSpec(**TINY_FRONT_END).clip_samples
    return build_protocol("fixed", store, make_tasks([NAMES]), split="val", clip_samples=samples).mixtures


def test_the_threshold_is_half_way_between_those_that_part_best():
    assert best_threshold(torch.tensor([0.9, 0.7]), torch.tensor([0.1, 0.3])) == pytest.approx(0.5)
    assert best_threshold(torch.tensor([0.9, 0.7, 0.2]), torch.tensor([0.1, 0.3])) == pytest.approx(0.5)
    assert best_threshold(torch.tensor([0.9]), torch.tensor([0.9])) in (pytest.approx(0.899), pytest.approx(0.901))


def test_presence_is_calibrated_on_validation_mixtures_and_stored(store, tmp_path):
    separator = aligned()
    assert separator.mask_decoder.presence_offsets.tolist() == [0.0, 0.0, 0.0]
    mixtures = validation(store)
    found = calibrate_presence(separator, store, mixtures)
    assert list(found) == ["moving", "photo", "unseen"]
    offsets = separator.mask_decoder.presence_offsets
    torch.testing.assert_close(offsets.sigmoid(), torch.tensor(list(found.values())))
    assert calibrate_presence(separator, store, mixtures) == found  # from scratch, whatever was set before
    save_separator(separator, tmp_path / "separator")
    loaded = load_separator(tmp_path / "separator")
    assert torch.equal(loaded.mask_decoder.presence_offsets, offsets)


def test_the_offset_is_that_of_what_is_seen(store):
    separator = aligned()
    mixture = validation(store)[0]
    batch = load_mixtures(store, [mixture], separator.spec.front_end, separator.visual_sources(), separator.class_index)
    visual = separator.encode_visual(batch.visual)
    yes, no = torch.tensor([[True, True]]), torch.tensor([[False, True]])
    cases = {  # (seen, motion_seen) -> what is taken off both sources
        (None, None): (1.0, 1.0),
        (no, None): (3.0, 1.0),
        (None, no): (2.0, 1.0),
        (yes, no): (2.0, 1.0),
        (no, yes): (3.0, 1.0),
        (no, no): (3.0, 1.0),
    }
    with torch.no_grad():
        for (seen, motion_seen), off in cases.items():
            shown = replace(visual, seen=seen, motion_seen=motion_seen)
            spectrograms = separator.analyse(batch.sources)
            told = []
            for offsets in ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]):
                separator.mask_decoder.presence_offsets.copy_(torch.tensor(offsets))
                told.append(separator(spectrograms.network_input, shown, batch.class_ids).presence)
            torch.testing.assert_close(told[0] - told[1], torch.tensor([off]))
    separator.mask_decoder.train()
    learned = separator(spectrograms.network_input, shown, batch.class_ids).presence
    torch.testing.assert_close(learned, told[0])  # training knows of none


def test_classes_are_asked_in_vain_in_turn(store):
    mixtures = validation(store)
    asked = list(_asked_in_vain(mixtures, NAMES))
    assert all(m.classes[-1] not in m.classes[:-1] for m in asked)
    assert {m.clips[-1] for m in asked} <= {clip for m in mixtures for clip in m.clips}
    counts = Counter(m.classes[-1] for m in asked)
    assert set(counts) == set(NAMES)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_no_calibration_where_nothing_tells_or_nothing_can_be_asked_in_vain(store):
    mixtures = validation(store)
    assert calibrate_presence(iquery(), store, mixtures) is None
    two = [m for m in mixtures if set(m.classes) == {NAMES[0], NAMES[1]}]
    assert calibrate_presence(aligned(), store, two) is None
    blind = small("aligned_query", dim=8, bands=4, class_given=False)
    assert list(calibrate_presence(blind, store, mixtures)) == ["moving", "photo"]
    assert not blind.can_go_unseen
    assert blind.takes_photos


def test_means_are_those_of_the_clips_and_old_ones_stay(store):
    separator = iquery()
    clips = {name: [(c, None) for c in store.select(classes=[name], split="train")] for name in NAMES}
    means = mean_pictures(separator, store, clips)
    assert means["object"].shape == (len(NAMES), 8)
    assert means["motion"].shape == (len(NAMES), 8, 4)
    one = mean_pictures(separator, store, {name: group[:1] for name, group in clips.items()})
    batch_of = [one["object"][0]]
    for clip in clips[NAMES[0]][1:]:
        batch_of.append(mean_pictures(separator, store, {NAMES[0]: [clip]})["object"][0])
    torch.testing.assert_close(means["object"][0], torch.stack(batch_of).mean(dim=0))
    kept = mean_pictures(separator, store, {NAMES[0]: [(clips[NAMES[0]][0][0], 0)]})["motion"][0]
    assert not torch.allclose(kept, one["motion"][0])  # of a kept crop the pictures of its seconds
    separator.class_means = means
    later = mean_pictures(separator, store, {NAMES[-1]: clips[NAMES[-1]][:1]})
    torch.testing.assert_close(later["object"][:-1], means["object"][:-1])
    torch.testing.assert_close(later["object"][-1], one["object"][-1])


def test_old_means_go_with_the_weights_that_are_replaced_and_not_before(tmp_path, monkeypatch):
    separator = iquery()
    separator.class_means = {"object": torch.ones(len(NAMES), 8), "motion": torch.ones(len(NAMES), 8, 4)}
    save_separator(separator, tmp_path / "separator")
    separator.class_means = None
    monkeypatch.setattr(weights, "atomic_path", lambda path: pytest.fail("disk full"))
    with pytest.raises(pytest.fail.Exception):
        save_separator(separator, tmp_path / "separator")
    assert load_separator(tmp_path / "separator").class_means is not None
    monkeypatch.undo()
    save_separator(separator, tmp_path / "separator")
    assert load_separator(tmp_path / "separator").class_means is None


def _same(one, other):
    return all(torch.equal(one[role], other[role]) for role in ("object", "motion"))


def test_means_stand_in_where_there_is_no_picture(store, tmp_path):
    separator = iquery()
    batch = load_mixtures(
        store,
        validation(store)[:2],
        separator.spec.front_end,
        separator.visual_sources(),
        separator.class_index,
    )
    seen = torch.tensor([[True, False], [True, True]])
    unseen = replace(batch, visual=replace(batch.visual, seen=seen))
    with pytest.raises(ConfigError, match="'query_transformer' needs a picture of every source"):
        separator.predict(unseen)
    assert not separator.can_go_unseen
    clips = {name: [(c, None) for c in store.select(classes=[name], split="train")] for name in NAMES}
    separator.class_means = mean_pictures(separator, store, clips)
    coded = CodedCrops(store, "int16", separator.spec.front_end.clip_samples, "jpeg")
    assert _same(mean_pictures(separator, store, clips, coded=coded), separator.class_means)  # no crops of exemplars
    crops = {name: [(c, 0) for c, _ in ones] for name, ones in clips.items()}
    assert not _same(mean_pictures(separator, store, crops, coded=coded), mean_pictures(separator, store, crops))
    assert separator.can_go_unseen
    whole, partly = separator.predict(batch), separator.predict(unseen)
    visual = separator.encode_visual(batch.visual)
    means, class_id = separator.class_means, int(batch.class_ids[0, 1])
    filled = VisualFeatures(visual.object.clone(), visual.motion.clone())
    filled.object[0, 1], filled.motion[0, 1] = means["object"][class_id], means["motion"][class_id]
    expected = separator.mask_decoder(whole.audio, filled, batch.class_ids).logits
    torch.testing.assert_close(partly.output.logits, expected)
    assert not torch.equal(partly.output.logits[0, 1], whole.output.logits[0, 1])
    save_separator(separator, tmp_path / "separator")
    loaded = load_separator(tmp_path / "separator")
    assert all(torch.equal(loaded.class_means[role], means[role]) for role in ("object", "motion"))
    assert loaded.state_dict().keys() == separator.state_dict().keys()


def test_means_of_other_classes_are_refused(tmp_path):
    separator = iquery()
    separator.class_means = {"object": torch.zeros(len(NAMES) + 1, 8)}
    save_separator(separator, tmp_path / "separator")
    with pytest.raises(CheckpointError, match="'object' has 5 rows, and the separator 4 classes"):
        load_separator(tmp_path / "separator")


@pytest.mark.parametrize("decoder", ["aligned", "iquery"])
def test_a_run_gives_its_separators_what_they_need(tone_store, tmp_path, decoder):
    first = TINY_TASKS[0]
    separator = small("aligned_query", first, dim=8, bands=4) if decoder == "aligned" else iquery(first)
    learner = ContinualLearner(
        separator, strategy="finetune", memory="random_per_class", train=TINY_TRAIN, accelerator="cpu"
    )
    stream = task_stream(tone_store, TINY_TASKS, clip_samples=separator.spec.front_end.clip_samples)
    learner.fit(stream, tmp_path / "run", progress=False)
    for task, classes in ((0, 2), (1, 4)):
        loaded = load_separator(tmp_path / "run", task=task)
        assert loaded.can_go_unseen
        if decoder == "aligned":
            assert loaded.class_means is None
            assert task == 0 or loaded.mask_decoder.presence_offsets.abs().max() > 0
        else:
            assert len(loaded.class_means["object"]) == classes
            assert (loaded.class_means["object"].abs().amax(dim=1) > 0).all()

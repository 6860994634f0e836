"""Evaluation of mixtures in which sources are absent, unseen, or not asked for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from avsep.data.mixing import load_mixtures
from avsep.data.protocol import APART, build_protocol
from avsep.data.store import Store
from avsep.data.tasks import make_tasks, task_stream
from avsep.errors import ConfigError
from avsep.evaluation.bss import bss_eval
from avsep.evaluation.scores import (
    evaluate_separator,
    level_db,
    mean_sdr,
    presence_scores,
    rows_of,
    rows_of_task,
    summarise,
)
from avsep.separator import build_separator
from avsep.spec import TrainSpec
from avsep.training.validation import Validation
from support.answers import Stub
from support.tones import TINY_FRONT_END, TINY_TASKS, TONES_HZ

LENGTH = TINY_FRONT_END["clip_samples"]


@pytest.fixture(scope="module")
def store(tone_store):
    return Store.open(tone_store)


@pytest.fixture(scope="module")
def protocol(store):
    return build_protocol("audiovisual", store, make_tasks([list(TONES_HZ)]), split="test", clip_samples=LENGTH)


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    return build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 16}),
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 1}),
        classes=list(TONES_HZ),
        front_end=TINY_FRONT_END,
    ).eval()


def of_list(protocol, name):
    return [m for m in protocol.mixtures if m.list_name == name]


def by_pitch(mixture, visual, class_ids):
    """What lies around the harmonics of each class that is asked for."""
    spectrum = torch.fft.rfft(mixture)
    hz = torch.fft.rfftfreq(mixture.shape[1], 1 / TINY_FRONT_END["sample_rate_hz"])
    pitch = torch.tensor(list(TONES_HZ.values()))[class_ids]  # [B, N]
    near = [(hz / pitch[..., None] - harmonic).abs() * pitch[..., None] < 25 for harmonic in (1, 2, 3)]
    masks = torch.stack(near).any(dim=0)
    return torch.fft.irfft(spectrum[:, None] * masks, n=mixture.shape[1])


def tell(class_ids, answer):
    """Certain of what is loud."""
    power = answer.square().mean(dim=-1)
    return torch.where(power > 0.02 * power.amax(dim=1, keepdim=True), 3.0, -3.0)


@pytest.fixture(scope="module")
def scored(separator, store, protocol):
    stub = Stub(separator, by_pitch, presence=tell, takes_unseen=True)
    return evaluate_separator(stub, store, protocol.mixtures)


def test_absent_sources_have_a_level_and_no_score(scored):
    for score in scored:
        if not score.mixture.list_name.startswith("absent"):
            continue
        assert score.status == "ok"
        assert len(score.sources) == len(score.mixture.clips)
        for source in score.sources:
            absent = source.role in ("moving", "still", "unseen")
            assert math.isnan(source.sdr) == math.isnan(source.si_sdr) == math.isnan(source.sdr_mixture) == absent
            assert (source.level_db < -10) == absent
            assert (source.presence < 0.5) == absent
    rows = rows_of(scored)
    json.dumps(rows, allow_nan=False)
    summary = summarise([r for r in rows if r["list"] == "absent-pair"])
    assert summary["absent"]["sources"] == summary["mixtures"] == 8
    assert summary["absent"]["level_db"] < -15 < -8 < summary["absent"]["present_level_db"]
    assert summary["mean"]["sdr"] > 10
    assert "absent" not in summarise([r for r in rows if r["list"] == "three"])


def test_presence_is_told_over_the_lists_with_absent_sources(scored):
    rows = rows_of(scored)
    found = presence_scores(rows, 0.5)
    assert (found["auc"], found["right"]) == (1.0, 1.0)
    assert (found["present"], found["absent"]) == (8 * 5, 8 * 4)
    assert presence_scores(rows, 0.99)["right"] == pytest.approx(32 / 72)  # no present one is above
    silent = [r | {"presence": None} for r in rows]
    assert presence_scores(silent, 0.5) is None
    assert presence_scores([r for r in rows if r["list"] == "task-0"], 0.5) is None


@pytest.mark.parametrize(
    ("present", "absent", "auc"),
    [([0.9, 0.8], [0.1], 1.0), ([0.5], [0.5], 0.5), ([0.2, 0.8], [0.5], 0.5), ([0.5, 0.8], [0.5, 0.9], 0.375)],
)
def test_auc_counts_ties_half(present, absent, auc):
    rows = [{"list": "a", "role": "source", "presence": p} for p in present]
    rows += [{"list": "a", "role": "still", "presence": p} for p in absent]
    assert presence_scores(rows, 0.5)["auc"] == pytest.approx(auc)


def test_levels_are_of_the_mixtures_and_have_a_floor():
    mixture = torch.randn(1, 500)
    signals = torch.stack([mixture, 0.1 * mixture, 0 * mixture], dim=1)
    np.testing.assert_allclose(level_db(signals, mixture)[0], [0, -20, -120], atol=1e-5)


def test_a_background_is_one_more_reference_and_no_source(separator, store, protocol, scored):
    mixtures = of_list(protocol, "background")
    batch = load_mixtures(store, mixtures, separator.spec.front_end, (), separator.class_index)
    length = (separator.spec.front_end.frames - 1) * separator.spec.front_end.hop
    estimates = by_pitch(batch.mixture, None, batch.class_ids)[..., :length].clamp(-1, 1)
    mixed = batch.mixture[..., :length]
    references = torch.cat((batch.sources, batch.background[:, None]), dim=1)[..., :length]
    result = bss_eval(references, torch.cat((estimates, mixed[:, None]), dim=1), mixture=mixed)
    found = [s for s in scored if s.mixture.list_name == "background"]
    for b, score in enumerate(found):
        assert [s.clip for s in score.sources] == list(mixtures[b].clips[:2])
        for n, source in enumerate(score.sources):
            for metric in ("sdr", "sir", "sar", "sdr_mixture"):
                assert getattr(source, metric) == pytest.approx(getattr(result, metric)[b, n].item(), abs=1e-6)
            # without the background as a reference, its rest would be an artefact
            assert source.sar > bss_eval(batch.sources[..., :length], estimates).sar[b, n] + 0.1


def test_the_headline_takes_no_list_apart(store, protocol, separator, scored):
    fixed = build_protocol("fixed", store, make_tasks([list(TONES_HZ)]), split="test", clip_samples=LENGTH)
    alone = rows_of(evaluate_separator(Stub(separator, by_pitch), store, fixed.mixtures))
    rows = rows_of(scored)
    shared = [r for r in rows if r["list"] not in APART]
    for one, other in zip(alone, shared, strict=True):
        assert {**one, "presence": None, "mixture": 0} == {**other, "presence": None, "mixture": 0}
    assert [r["clip"] for r in rows_of_task(rows, 0)] == [r["clip"] for r in alone]
    lone = [r | {"list": "cross"} if r["list"] == "task-0" else r for r in rows]  # a task of one class has no own list
    assert len(rows_of_task(lone, 0)) == len(alone)
    same = summarise([r for r in rows if r["list"] == "same-class"])
    assert (same["scored"], same["degenerate"]) == (4, 0)
    assert same["mean"]["sdr"] is not None


def test_quiet_mixtures_are_quiet_and_reverberant_ones_are_heard(store, protocol, separator, scored):
    headline = {s.mixture.clips: s for s in scored if s.mixture.list_name == "task-0"}
    for score in scored:
        if score.mixture.list_name == "quiet":
            pair = headline[score.mixture.clips]
            for one, other in zip(score.sources, pair.sources, strict=True):
                assert one.sdr == pytest.approx(other.sdr, abs=0.05)  # this stub knows no level
    batch = load_mixtures(store, of_list(protocol, "quiet"), separator.spec.front_end, (), separator.class_index)
    loud = [headline[m.clips].mixture for m in of_list(protocol, "quiet")]
    other = load_mixtures(store, loud, separator.spec.front_end, (), separator.class_index)
    torch.testing.assert_close(batch.mixture * 10, other.mixture, atol=1e-4, rtol=1e-3)


def test_sources_without_a_picture_are_shown_as_such_or_refused(separator, store, protocol):
    seen = []

    def look(mixture, visual, class_ids):
        seen.append(visual.seen)
        return by_pitch(mixture, visual, class_ids)

    able = Stub(separator, look, takes_unseen=True)
    evaluate_separator(able, store, of_list(protocol, "unseen")[:2])
    evaluate_separator(able, store, of_list(protocol, "absent-unseen")[:2])
    evaluate_separator(able, store, of_list(protocol, "absent-still")[:2])
    assert seen[0].tolist() == [[False, False]] * 2
    assert seen[1].tolist() == [[True, False]] * 2
    assert seen[2] is None
    with pytest.raises(ConfigError, match="list 'unseen' has sources without a picture, which mask decoder 'query_tra"):
        evaluate_separator(separator, store, of_list(protocol, "unseen"))


def test_weights_are_selected_by_the_headline_and_same_class_pairs(tone_store, separator, monkeypatch):
    stream = task_stream(tone_store, TINY_TASKS, validation_protocol="audiovisual", clip_samples=LENGTH)
    validation = Validation(stream, stream.tasks[1], TrainSpec(batch_size=4))
    mean, scores = validation.score(Stub(separator, by_pitch))
    assert {s.mixture.list_name for s in scores} == {"task-0", "task-1", "cross", "same-class"}
    expected = [np.mean([s.sdr for s in score.sources]) for score in scores]
    assert mean == pytest.approx(np.mean(expected))
    assert mean == pytest.approx(mean_sdr(scores))
    assert mean != pytest.approx(mean_sdr([s for s in scores if s.mixture.list_name != "same-class"]), abs=1e-3)

"""Mixers: the balanced one's shares, and that every mixer draws the same from the same numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from avsep.data.protocol import TestMixture
from avsep.data.store import Clip
from avsep.errors import ConfigError, UnknownNameError
from avsep.evaluation.scores import MixtureScore, SourceScore
from avsep.mixers import Balanced, Confusable, Online, Pool, Varied
from avsep.mixers.mixtures import TrainingMixtures
from avsep.registry import MIXERS
from avsep.spec import FrontEndSpec, TrainSpec, validated
from avsep.training.validation import pair_scores
from support.continual_runs import Unscored, differing, resume_killed, train, weights

RATE = FrontEndSpec().sample_rate_hz


def _clips(classes, each, first=0):
    return [
        Clip(f"{name}-{k}", name, "train", 20 * RATE, first + n * each + k)
        for n, name in enumerate(classes)
        for k in range(each)
    ]


def _pool(new=5, old=15, per_class=1, **settings):
    """The fourth task of MUSIC-21: five new classes of 40 clips, an exemplar of each of fifteen old ones."""
    current = _clips([f"new{k}" for k in range(new)], 40)
    exemplars = _clips([f"old{k}" for k in range(old)], per_class, len(current))
    return Pool(current, exemplars, TrainSpec(**settings), FrontEndSpec(), task=3)


def _drawn(pool, count, mixer=None):
    mixer = mixer or Balanced()
    items = mixer.begin_epoch(pool, np.random.default_rng(0))
    for item in range(count):
        yield mixer.draw(np.random.default_rng([1, item]), item % items, pool)


# the bounds are three or more standard deviations of so many draws
@pytest.mark.parametrize(
    ("count", "share", "kind"), [(20_000, 0.006, 0.012), pytest.param(100_000, 0.003, 0.006, marks=pytest.mark.slow)]
)
def test_shares_at_the_fourth_task(count, share, kind):
    pool = _pool()
    old = same = 0
    kinds = Counter()
    for mixture in _drawn(pool, count):
        flags = [pool.is_exemplar(d.clip) for d in mixture]
        kinds[sum(flags)] += 1
        old += sum(flags)
        same += pool[mixture[0].clip].class_name == pool[mixture[1].clip].class_name
    assert old / (2 * count) == pytest.approx(0.3125, abs=share)
    assert [kinds[k] / count for k in range(3)] == pytest.approx([0.5, 0.375, 0.125], abs=kind)
    assert same == 0


def test_an_epoch_does_not_grow_with_the_memory():
    for per_class in (1, 4):
        assert Balanced().begin_epoch(_pool(per_class=per_class), np.random.default_rng(0)) == 40 * 200


def test_classes_are_uniform_whatever_their_clips():
    current = [*_clips(["many"], 90), *_clips(["few", "some"], 5, 90)]
    pool = Pool(current, [], TrainSpec(), FrontEndSpec(), task=0)
    counts = Counter(pool[d.clip].class_name for mixture in _drawn(pool, 6000) for d in mixture)
    assert [counts[name] / 12000 for name in ("many", "few", "some")] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_impossible_kinds_give_their_share_to_the_others():
    without_memory = _pool(old=0)
    assert not any(without_memory.is_exemplar(d.clip) for m in _drawn(without_memory, 500) for d in m)
    one_new = _pool(new=1, old=3)  # two sources of new classes there cannot be
    kinds = Counter(sum(one_new.is_exemplar(d.clip) for d in m) for m in _drawn(one_new, 4000))
    assert kinds[0] == 0
    assert kinds[1] / 4000 == pytest.approx(0.75, abs=0.03)
    with pytest.raises(ConfigError, match="mixes 2 sources of different classes, and task 3 trains on 1 new and 0 old"):
        Balanced().begin_epoch(_pool(new=1, old=0), np.random.default_rng(0))


def test_more_sources_are_all_of_other_classes():
    pool = _pool(new=3, old=2, sources=3)
    for mixture in _drawn(pool, 500):
        assert len({pool[d.clip].class_name for d in mixture}) == 3


@pytest.mark.parametrize("params", [{"new_old": -0.1}, {"old_old": 0.7, "new_old": 0.5}])
def test_wrong_shares(params):
    with pytest.raises(ConfigError, match="must be shares of 1"):
        MIXERS.create("balanced", params)


def test_confusable_shares_by_hand():
    """Beside a: b at 3 dB, c at 6, d not known and so at the mean 4.5; weights 1 : 1/e : 1/sqrt(e)."""
    scores = {("a", "b"): 3.0, ("a", "c"): 6.0}
    weight = np.array([1, np.exp(-1), np.exp(-0.5)])
    found = Confusable(uniform=0.0).shares(["a"], ["b", "c", "d"], scores)
    np.testing.assert_allclose(found, weight / weight.sum())
    half = Confusable(uniform=0.5).shares(["a"], ["b", "c", "d"], scores)
    np.testing.assert_allclose(half, 1 / 6 + found / 2)
    both = Confusable(uniform=0.0).shares(["b", "c"], ["a", "d"], scores)  # a and d are both at 4.5 beside the two
    np.testing.assert_allclose(both, [0.5, 0.5])
    for beside, known in (([], scores), (["a"], {})):
        np.testing.assert_array_equal(Confusable(uniform=0.0).shares(beside, ["b", "c"], known), [0.5, 0.5])


def test_confusable_classes_meet_more_often_and_kinds_keep_their_shares():
    pool = _pool(new=2, old=2)
    pool = replace(pool, scores={("new0", "old0"): -5.0, ("new0", "old1"): 10.0, ("new1", "old0"): 10.0,
                                 ("new1", "old1"): -5.0, ("new0", "new1"): 2.0, ("old0", "old1"): 2.0})  # fmt: skip
    pairs, flags = Counter(), Counter()
    for mixture in _drawn(pool, 4000, Confusable(uniform=0.2)):
        pairs[tuple(sorted(pool[d.clip].class_name for d in mixture))] += 1
        flags[sum(pool.is_exemplar(d.clip) for d in mixture)] += 1
    assert [flags[k] / 4000 for k in range(3)] == pytest.approx([0.5, 0.375, 0.125], abs=0.03)
    share = 0.1 + 0.8 / (1 + np.exp(-5))
    for new, old in ((0, 0), (1, 1)):
        assert pairs[f"new{new}", f"old{old}"] / flags[1] == pytest.approx(share / 2, abs=0.04)
    assert Confusable().begin_epoch(pool, np.random.default_rng(0)) == Balanced().begin_epoch(
        pool, np.random.default_rng(0)
    )


def test_scores_of_pairs_are_mean_improvements():
    def score(names, sdris, role="source", status="ok"):
        mixture = TestMixture(clips=names, classes=names, starts=(0,) * len(names), task=0, list_name="task-0")
        sources = tuple(
            SourceScore(n, n, 0, 1.0 + s, 0.0, 0.0, 0.0, 1.0, role=role) for n, s in zip(names, sdris, strict=True)
        )
        return MixtureScore(mixture, sources, status)

    found = pair_scores(
        [
            score(("b", "a"), (1.0, 3.0)),
            score(("a", "b"), (5.0, 7.0)),
            score(("a", "a"), (9.0, 9.0)),
            score(("b", "c"), (np.nan, 2.0)),
            score(("c", "a", "b"), (1.0, 2.0, 3.0)),
            score(("a", "b"), (99.0, 99.0), status="silent_estimate"),
            score(("a", "b"), (99.0, 99.0), role="still"),
        ]
    )
    assert found == {("a", "b"): pytest.approx(21 / 6), ("a", "c"): 1.5, ("b", "c"): 2.0}


def test_a_run_keeps_the_scores_it_draws_by(tone_store, tmp_path, monkeypatch):
    """The kill is after the second of three epochs, each with a validation of its own."""
    mixer = {"name": "confusable", "params": {"new_old": 0.99, "old_old": 0.0, "uniform": 0.0}}
    settings = {"mixer": mixer, "epochs": 3, "steps_per_epoch": 1}
    given = {"hum": 30.0, "ding": -30.0}  # of each new class beside these

    def score(self, student):
        level = float(student.audio_encoder.down_norm[0].num_batches_tracked)
        scores = [
            MixtureScore(
                TestMixture(clips=(a, b), classes=(a, b), starts=(0, 0), task=1, list_name="cross"),
                tuple(SourceScore(n, n, 1, level + value, 0.0, 0.0, 0.0, level) for n in (a, b)),
                "ok",
            )
            for a in ("peep", "whirr")
            for b, value in given.items()
        ]
        return level, scores if self.tasks[1:] else []  # the last weights are the best

    memory = "random_per_class"
    monkeypatch.setattr(Unscored, "score", score)
    monkeypatch.setattr(Unscored, "log_media", lambda *args, **how: None)
    run = train(tone_store, tmp_path / "run", "finetune", memory, **settings)
    resumed = resume_killed(tone_store, run, "finetune", memory, **settings)
    assert differing(weights(run), weights(resumed)) == []
    given.update(hum=-30.0, ding=30.0)
    other = train(tone_store, tmp_path / "other", "finetune", memory, **settings)
    assert differing(weights(run), weights(other))


@pytest.mark.parametrize("params", [{"scale_db": 0}, {"uniform": 1.5}, {"old_old": 2}])
def test_wrong_settings_of_confusable(params):
    with pytest.raises(ConfigError, match="must be"):
        MIXERS.create("confusable", params)


@pytest.mark.parametrize("mixer", MIXERS.names())
def test_draws_depend_on_the_item_alone(mixer):
    current, exemplars = _clips(["a", "b", "c"], 4), _clips(["x", "y"], 2, 12)
    train = validated(TrainSpec, {"batch_size": 2, "mixer": mixer}, "test")

    def mixtures(epoch):
        return TrainingMixtures(None, current, exemplars, train, FrontEndSpec(), (), {}, task=1, epoch=epoch)

    one, again, next_epoch = mixtures(0), mixtures(0), mixtures(1)
    draws = [one.mixer.draw(one._rng(i), i, one.pool) for i in range(20)]
    assert [again.mixer.draw(again._rng(i), i, again.pool) for i in reversed(range(20))] == draws[::-1]
    assert [next_epoch.mixer.draw(next_epoch._rng(i), i, next_epoch.pool) for i in range(20)] != draws
    assert all(len([one for one in d if one.role != "background"]) == 2 for d in draws)


def test_in_a_run(tone_store, tmp_path):
    plain = train(tone_store, tmp_path / "plain", "finetune", "random_per_class")
    run = train(tone_store, tmp_path / "run", "finetune", "random_per_class", mixer="balanced")
    assert differing(weights(run), weights(plain))


def test_a_spec_names_its_mixer_and_is_silent_of_the_default():
    assert "mixer" not in TrainSpec().model_dump(mode="json")
    spec = validated(TrainSpec, {"mixer": {"name": "balanced", "params": {"old_old": 0.25}}}, "test")
    assert spec.model_dump(mode="json")["mixer"] == {"name": "balanced", "params": {"old_old": 0.25}}
    with pytest.raises(UnknownNameError, match="no mixer named 'balancd'"):
        MIXERS.get("balancd")


# ------------------------------------------------------------------------------------------------------------- online


def test_online_takes_every_clip_in_its_turn_alone():
    pool = _pool(new=5, old=3, current_repeats=4)  # 200 clips: 12 windows of 16 or 17
    mixtures = list(_drawn(pool, 800, Online()))
    first_of = Counter(first.clip for first, _ in mixtures)
    assert first_of == dict.fromkeys(range(200), 4)
    items = {}
    for item, mixture in enumerate(mixtures):
        for one in mixture:
            items.setdefault(one.clip, []).append(item)
        assert len({pool[one.clip].class_name for one in mixture}) == 2
    window = np.repeat(np.arange(12), [len(part) * 4 for part in np.array_split(np.arange(200), 12)])
    assert all(len(set(window[items[clip]])) == 1 for clip in range(200))
    assert all(max(items[clip]) - min(items[clip]) > 400 for clip in range(200, 203))  # exemplars are there all along
    from_memory = sum(pool.is_exemplar(partner.clip) for _, partner in mixtures) / 800
    assert from_memory == pytest.approx(3 / (3 + 200 / 12 * 0.8), abs=0.05)


def test_online_takes_what_there_is():
    alone = Pool(_clips(["a"], 3), [], TrainSpec(batch_size=1, current_repeats=2), FrontEndSpec(), task=2)
    mixtures = list(_drawn(alone, 6, Online(window=50)))  # one class: other clips of it
    assert all(len({one.clip for one in mixture}) == 2 for mixture in mixtures)
    with pytest.raises(ConfigError, match="has 1 clips at hand at a time in task 2, and a mixture takes 2"):
        Online(window=1).begin_epoch(alone, np.random.default_rng(0))
    remembered = Pool([], _clips(["a", "b"], 3), TrainSpec(batch_size=1), FrontEndSpec(), task=1)  # as of gdumb
    with pytest.raises(ConfigError, match="and task 1 is trained on exemplars alone: take another mixer"):
        Online().begin_epoch(remembered, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="window must be at least 1"):
        MIXERS.create("online", {"window": 0})


# ------------------------------------------------------------------------------------------------------------- varied


def _kinds(mixtures, pool):
    """What the mixtures are, and how often: same_class, absent, different; and the share with a background."""
    counts = Counter()
    for mixture in mixtures:
        asked = [one for one in mixture if one.role != "background"]
        assert len(asked) == pool.train.sources
        roles = [one.role for one in asked]
        counts["background"] += len(mixture) > len(asked)
        names = [pool[one.clip].class_name for one in asked]
        if absent := [role for role in roles if role in ("moving", "still", "unseen", "photo")]:
            counts["absent"] += 1
            counts[absent[0]] += 1
            counts["absent of the class that sounds"] += len(set(names)) == 1
        elif len(set(names)) < len(names):
            counts["same_class"] += 1
            assert roles == ["source", "source"]  # a class that is there twice needs both pictures
        else:
            counts["different"] += 1
            unknown = [role for role in roles if role in ("unseen_source", "photo_source")]
            counts["nothing seen"] += len(unknown) == len(roles)
            counts["seen in part"] += 0 < len(unknown) < len(roles)
            counts.update(unknown)
        clips = [one.clip for one in mixture]
        assert len(set(clips)) == len(clips)
    return counts


def test_varied_keeps_its_shares():
    pool = _pool()
    count = 20_000
    found = _kinds(_drawn(pool, count, Varied()), pool)
    expected = {
        "same_class": 0.35,
        "absent": 0.25,
        "different": 0.4,
        "background": 0.15,
        "nothing seen": 0.4 * 0.25 * 1.25,
        "seen in part": 0.4 * 0.25 * 0.5,
        **dict.fromkeys(("unseen_source", "photo_source"), 0.4 * 0.25 * 1.5),
        **dict.fromkeys(("moving", "still", "unseen", "photo"), 0.25 / 4),
    }
    for name, share in expected.items():
        assert found[name] / count == pytest.approx(share, abs=0.015), name
    assert found["absent of the class that sounds"] > 0


def test_varied_draws_classes_evenly_exemplars_too():
    pool = _pool()
    drawn = Counter()
    for mixture in _drawn(pool, 20_000, Varied(same_class=0, absent=0, background=0)):
        drawn.update(pool[one.clip].class_name for one in mixture)
    assert len(drawn) == 20
    assert max(drawn.values()) < 1.1 * min(drawn.values())


def test_varied_with_one_clip_a_class_makes_no_pairs_of_a_class():
    pool = Pool(_clips(["a", "b", "c"], 1), [], TrainSpec(batch_size=1), FrontEndSpec(), task=0)
    found = _kinds(_drawn(pool, 500, Varied(same_class=1.0, absent=0.0)), pool)
    assert found["same_class"] == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"same_class": 0.8, "absent": 0.3}, "must be shares of 1, got 0.8 and 0.3"),
        ({"background": 1.5}, "background must lie between 0 and 1, got 1.5"),
        ({"unseen": 0.6}, "unseen must lie between 0 and 0.5, got 0.6"),
    ],
)
def test_varied_refuses_what_are_no_shares(params, message):
    with pytest.raises(ValueError, match=message):
        Varied(**params)


def test_varied_needs_two_classes():
    pool = Pool(_clips(["a"], 4), [], TrainSpec(batch_size=1), FrontEndSpec(), task=2)
    with pytest.raises(ConfigError, match="task 2 trains on 1"):
        Varied().begin_epoch(pool, np.random.default_rng(0))

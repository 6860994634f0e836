"""Memory policies, against literal forms, brute force and counts; what they choose from, and how exemplars are kept."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from avsep.data.mixing import collate, load_source
from avsep.data.store import Clip
from avsep.errors import CheckpointError, ConfigError, NumericalError, UnknownNameError
from avsep.losses import separation_loss
from avsep.memory.base import (
    Candidates,
    Exemplar,
    MemoryPolicy,
    exemplars_from_plain,
    exemplars_to_plain,
    memory_rng,
    read_exemplars,
)
from avsep.memory.candidates import ScoredCandidates
from avsep.memory.class_balanced import equal_shares
from avsep.memory.reconstruction import reconstruct
from avsep.registry import MEMORIES
from avsep.separator import build_separator
from avsep.spec import FrontEndSpec
from support.tones import TINY_FRONT_END, TINY_SEPARATOR, TINY_TASKS, stream_of, tiny_learner

FRONT_END = FrontEndSpec(**TINY_FRONT_END)
PER_CLASS = ("random_per_class", "herding", "k_center", "reconstruction", "hardest")
GLOBAL = ("reservoir", "class_balanced")


class Known(Candidates):
    """Candidates with features and errors that are given."""

    def __init__(self, sizes, *, earlier=None, features=None, errors=None, samples=20000):
        clips = {
            name: [Clip(f"{name}{i}", name, "train", samples, 100 * k + i) for i in range(count)]
            for k, (name, count) in enumerate(sizes.items())
        }
        super().__init__(clips, FRONT_END, earlier=earlier)
        self._features = features or {}
        self._errors = errors or {}

    def features(self, ids):
        return np.array([self._features[i] for i in ids], np.float32)

    def mask_error(self, ids):
        return np.array([self._errors[i] for i in ids])


def _random(sizes, dim=3, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    ids = [f"{name}{i}" for name, count in sizes.items() for i in range(count)]
    rows = rng.standard_normal((len(ids), dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Known(
        sizes, features=dict(zip(ids, rows, strict=True)), errors=dict(zip(ids, rows[:, 0], strict=True)), **kwargs
    )


def _ids(memory):
    return {name: [e.id for e in kept] for name, kept in memory.items()}


def _policy(name, number=2, **params):
    return MEMORIES.create(name, {"per_class" if name in PER_CLASS else "total": number, **params})


def test_none_keeps_nothing():
    assert MEMORIES.create("none").update({}, _random({"a": 6}), np.random.default_rng(0)) == {}


def test_the_published_draws_are_as_they_were():
    """As drawn by the first version, one generator for all classes; runs that were started then go on the same."""
    candidates = Known({"a": 6, "b": 3})
    memory = _policy("random_per_class", 2).update({}, candidates, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    drawn = {
        name: [str(i) for i in rng.choice(np.asarray(ids), size=2, replace=False)]
        for name, ids in candidates.ids.items()
    }
    assert _ids(memory) == drawn == {"a": ["a4", "a3"], "b": ["b1", "b2"]}
    draws = {
        _ids(_policy("random_per_class").update({}, candidates, np.random.default_rng(s)))["a"][0] for s in range(40)
    }
    assert len(draws) == 6


@pytest.mark.parametrize("name", [*PER_CLASS, *GLOBAL])
def test_every_policy_holds_distinct_clips_and_depends_on_seed_and_task_alone(name):
    policy = _policy(name, 4)
    first, second = _random({"a": 9, "b": 7}), _random({"c": 6}, seed=1, earlier={"a": 9, "b": 7})

    def run(seed):
        held = policy.update({}, first, memory_rng(seed, 0))
        return held, policy.update(held, second, memory_rng(seed, 1))

    held, memory = run(3)
    assert (held, memory) == run(3)
    for of, members in ((held, "ab"), (memory, "abc")):
        ids = [e.id for kept in of.values() for e in kept]
        assert len(set(ids)) == len(ids)
        assert all(i[0] == name and name in members for name, kept in _ids(of).items() for i in kept)
    if name in PER_CLASS:
        assert {k: len(v) for k, v in memory.items()} == {"a": 4, "b": 4, "c": 4}
        assert {k: memory[k] for k in held} == held
    else:
        assert sum(map(len, memory.values())) == 4
    if not policy.uses_separator:
        assert len({str(run(seed)) for seed in range(8)}) > 4


def test_a_policy_of_0_1_that_judges_uses_the_separator():
    assert not MemoryPolicy.uses_separator
    assert type("Old", (MemoryPolicy,), {"judges": True}).uses_separator


@pytest.mark.parametrize("name", [*PER_CLASS, *GLOBAL])
def test_how_exemplars_are_kept_changes_neither_which_nor_leaves_the_recording(name):
    clips, later = _random({"a": 9, "b": 7}), _random({"c": 6}, seed=1, earlier={"a": 9, "b": 7})
    found = {}
    for keep in ("recording", "clip", "id"):
        policy = _policy(name, 3, keep=keep)
        held = policy.update({}, clips, memory_rng(0, 0))
        found[keep] = policy.update(held, later, memory_rng(0, 1))
        if keep != "clip":
            assert all(e.start is None for kept in found[keep].values() for e in kept)
            assert found[keep] == found["recording"]
        else:  # once chosen, a crop stays
            assert all(e in held[k] for k, kept in found[keep].items() if k in held for e in kept)
    assert _ids(found["clip"]) == _ids(found["recording"])
    room = 20000 - FRONT_END.clip_samples
    starts = [e.start for kept in found["clip"].values() for e in kept]
    assert all(0 <= s <= room for s in starts)
    assert (set(starts) == {clips.centre("a0")}) == _policy(name).uses_separator


def test_crops_of_clips_shorter_and_hardly_longer_than_a_crop():
    short, tight = Known({"a": 1}, samples=5000), Known({"a": 1}, samples=FRONT_END.clip_samples + 3)
    rng = np.random.default_rng(0)
    assert short.centre("a0") == short.random_start("a0", rng) == 0
    assert {tight.random_start("a0", rng) for _ in range(60)} == {0, 1, 2, 3}
    assert 0 <= tight.centre("a0") <= 3


def test_herding_is_the_greedy_mean_of_icarl():
    """Algorithm 4, literally, over every subset it could extend to."""
    candidates = _random({"a": 8, "b": 5}, dim=4, seed=2)
    chosen = _ids(_policy("herding", 5).update({}, candidates, np.random.default_rng(0)))
    for name, ids in candidates.ids.items():
        rows = {i: candidates._features[i].astype(np.float32).astype(float) for i in ids}
        mean = sum(rows.values()) / len(rows)
        so_far = []
        for k in range(1, 6):
            distance = {
                i: float(np.linalg.norm(mean - (rows[i] + sum((rows[j] for j in so_far), np.zeros(4))) / k))
                for i in ids
                if i not in so_far
            }
            so_far.append(min(distance, key=distance.__getitem__))
        assert chosen[name] == so_far
    pair = min(itertools.combinations(candidates.ids["a"], 1), key=lambda c: _gap(candidates, "a", c))
    assert chosen["a"][:1] == list(pair)
    assert _gap(candidates, "a", chosen["a"]) < np.mean(
        [_gap(candidates, "a", c) for c in itertools.combinations(candidates.ids["a"], 5)]
    )


def _gap(candidates, name, ids):
    return float(np.linalg.norm(candidates.features(candidates.ids[name]).mean(0) - candidates.features(ids).mean(0)))


def test_herding_of_a_line():
    """Mean 3: first the point at 3, then the pair around it, worked by hand."""
    features = {f"a{i}": [v] for i, v in enumerate([0.0, 3.0, 2.0, 5.0, 5.0])}
    candidates = Known({"a": 5}, features=features)
    # after 3: the second x minimises |3 - (3 + x)/2|, which is 2; then |3 - (5 + x)/3|, which is 5 (the first of two)
    assert _ids(_policy("herding", 3).update({}, candidates, np.random.default_rng(0))) == {"a": ["a1", "a2", "a3"]}


def test_k_center_is_the_greedy_cover_and_within_twice_the_best_radius():
    candidates = _random({"a": 9}, dim=2, seed=5)
    rows = candidates.features(candidates.ids["a"]).astype(float)
    chosen = [candidates.ids["a"].index(i) for i in _ids(_policy("k_center", 3).update({}, candidates, None))["a"]]
    greedy = [min(range(9), key=lambda i: float(np.linalg.norm(rows[i] - rows.mean(0))))]
    while len(greedy) < 3:
        rest = [i for i in range(9) if i not in greedy]
        greedy.append(max(rest, key=lambda i: min(float(np.linalg.norm(rows[i] - rows[j])) for j in greedy)))
    assert chosen == greedy

    def radius(centres):
        return max(min(float(np.linalg.norm(rows[i] - rows[j])) for j in centres) for i in range(9))

    assert radius(chosen) <= 2 * min(radius(c) for c in itertools.combinations(range(9), 3))


def test_reconstruction_of_four_points():
    """Worked by hand: the gains are 1.36, 0.25, 2 and 1.64; of what (0.6, 0.8, 0) leaves 1, 0.25 and 1, as the two in
    the plane each give back the other; then 0.25 alone."""
    rows = np.array([(1, 0, 0), (0, 0, 0.5), (0.6, 0.8, 0), (0, 1, 0)])
    first, second, third, last = reconstruct(rows, 4)
    assert (first, third) == (2, 1)
    assert {second, last} == {0, 3}  # each once, though nothing is left to gain by the last


def test_reconstruction_takes_what_leaves_the_least():
    """Against least squares, literally, over every clip it could take."""
    rows = _random({"a": 9}, dim=5, seed=7).features([f"a{i}" for i in range(9)]).astype(float)
    rows *= np.linspace(0.3, 3, 9)[:, None]  # of several lengths, as what is left of rows of length 1 is

    def left(chosen):
        basis = rows[list(chosen)].T
        return float(np.square(rows.T - basis @ np.linalg.lstsq(basis, rows.T, rcond=None)[0]).sum())

    greedy = []
    while len(greedy) < 4:
        greedy.append(min((i for i in range(9) if i not in greedy), key=lambda i: left([*greedy, i])))
    assert reconstruct(rows, 4) == greedy
    assert left(greedy) < np.mean([left(c) for c in itertools.combinations(range(9), 4)])
    assert sorted(reconstruct(rows, 9)) == list(range(9))


def test_equal_features_and_errors_still_give_distinct_clips():
    same = Known({"a": 4}, features={f"a{i}": [1.0, 0.0] for i in range(4)}, errors={f"a{i}": 0.5 for i in range(4)})
    for name in ("herding", "k_center", "reconstruction", "hardest"):
        assert _ids(_policy(name, 3).update({}, same, np.random.default_rng(0)))["a"] == ["a0", "a1", "a2"]


def test_hardest_takes_the_largest_errors():
    errors = {"a0": 0.1, "a1": 0.7, "a2": 0.3, "a3": 0.7, "b0": 0.2, "b1": 0.1}
    memory = _policy("hardest", 2).update({}, Known({"a": 4, "b": 2}, errors=errors), np.random.default_rng(0))
    assert _ids(memory) == {"a": ["a1", "a3"], "b": ["b0", "b1"]}


def test_reservoir_holds_every_clip_of_the_stream_with_the_same_probability():
    policy, counts, trials = _policy("reservoir", 5), Counter(), 4000
    tasks = [Known({"a": 6, "b": 3}), Known({"c": 4}, earlier={"a": 6, "b": 3}),
             Known({"d": 7}, earlier={"a": 6, "b": 3, "c": 4})]  # fmt: skip
    for seed in range(trials):
        memory = {}
        for number, task in enumerate(tasks):
            memory = policy.update(memory, task, memory_rng(seed, number))
        assert sum(map(len, memory.values())) == 5
        counts.update(e.id for kept in memory.values() for e in kept)
    share, expected = np.array([counts[i] for task in tasks for ids in task.ids.values() for i in ids]) / trials, 5 / 20
    assert len(share) == 20
    assert np.abs(share - expected).max() < 4.5 * np.sqrt(expected * (1 - expected) / trials)


def test_reservoir_is_algorithm_r():
    """The literal algorithm on one list, with the draws of the same generator."""
    policy = _policy("reservoir", 3)
    rng, places = memory_rng(1, 0), []
    for i, clip in enumerate([f"a{i}" for i in range(8)], start=1):
        if i <= 3:
            places.append(clip)
        elif (j := int(rng.integers(i))) < 3:
            places[j] = clip
    assert sorted(_ids(policy.update({}, Known({"a": 8}), memory_rng(1, 0)))["a"]) == sorted(places)


def test_equal_shares_are_the_most_equal_ones():
    for total, sizes in itertools.product(range(12), itertools.product(range(1, 5), repeat=3)):
        shares = equal_shares(total, sizes)
        assert sum(shares) == min(total, sum(sizes))
        assert all(0 <= s <= size for s, size in zip(shares, sizes, strict=True))
        # no clip moved from a larger share to a smaller one that has room would make them more equal
        assert not any(shares[i] - shares[j] > 1 and shares[j] < sizes[j] for i in range(3) for j in range(3))
        assert all(now <= before for now, before in zip(shares[:2], equal_shares(total, sizes[:2]), strict=True))


def test_class_balanced_gives_up_old_exemplars_as_classes_arrive():
    policy = _policy("class_balanced", 7)
    first = policy.update({}, Known({"a": 9, "b": 2}), memory_rng(0, 0))
    assert {k: len(v) for k, v in first.items()} == {"a": 5, "b": 2}  # b cannot fill its share
    second = policy.update(first, Known({"c": 9}), memory_rng(0, 1))
    assert {k: len(v) for k, v in second.items()} == {"a": 3, "b": 2, "c": 2}
    third = policy.update(second, Known({"d": 9, "e": 9}), memory_rng(0, 2))
    assert {k: len(v) for k, v in third.items()} == {"a": 2, "b": 2, "c": 1, "d": 1, "e": 1}
    for before, after in ((first, second), (second, third)):
        assert all(after[k] == before[k][: len(after[k])] for k in before)
    kept = Counter()
    for seed in range(2000):  # what is left of a class is a uniform sample of it
        held = policy.update({}, Known({"a": 5, "b": 5}), memory_rng(seed, 0))
        kept.update(e.id for e in policy.update(held, Known({"c": 5, "d": 5}), memory_rng(seed, 1))["a"])
    share = np.array([kept[f"a{i}"] for i in range(5)]) / 2000
    assert np.abs(share - 2 / 5).max() < 4.5 * np.sqrt(0.4 * 0.6 / 2000)


def test_budgets_that_cannot_be_filled():
    for name in PER_CLASS:
        _policy(name, 4).check({"a": 4})
        with pytest.raises(ConfigError, match="memory of 4 clips per class is larger than class 'b', which has 3"):
            _policy(name, 4).check({"a": 6, "b": 3})
        with pytest.raises(ConfigError, match="per_class must be at least 1, got 0"):
            _policy(name, 0)
        fewer = _policy(name, 4, short_class="all")
        fewer.check({"a": 6, "b": 3})
        found = fewer.update({}, _random({"a": 6, "b": 3}), np.random.default_rng(0))
        assert {k: len(set(v)) for k, v in found.items()} == {"a": 4, "b": 3}
    for name in GLOBAL:
        _policy(name, 9).check({"a": 6, "b": 3})
        with pytest.raises(
            ConfigError, match="memory of 10 clips is larger than all tasks before the last, which have 9"
        ):
            _policy(name, 10).check({"a": 6, "b": 3})
        with pytest.raises(ConfigError, match="total must be at least 1, got 0"):
            _policy(name, 0)
        _policy(name, 9).check({})
    with pytest.raises(ConfigError, match="memory of 2 clips cannot give one to each of the 3 classes"):
        _policy("class_balanced", 2).check({"a": 6, "b": 3, "c": 3})
    _policy("reservoir", 2).check({"a": 6, "b": 3, "c": 3})
    with pytest.raises(UnknownNameError, match="no parameter 'perclass': did you mean 'per_class'"):
        MEMORIES.create("random_per_class", {"perclass": 4})
    with pytest.raises(ConfigError, match="keep must be one of recording, clip, id, got 'audio'"):
        MEMORIES.create("herding", {"keep": "audio"})
    with pytest.raises(ConfigError, match="short_class must be 'refuse' or 'all', got 'some'"):
        MEMORIES.create("hardest", {"short_class": "some"})


def test_exemplars_as_plain_data():
    memory = {"a": [Exemplar("a0"), Exemplar("a1", 77)], "b": [Exemplar("b0", 0)]}
    plain = exemplars_to_plain(memory)
    assert plain == {"a": ["a0", {"id": "a1", "start": 77}], "b": [{"id": "b0", "start": 0}]}
    assert exemplars_from_plain(plain, "here") == memory
    assert exemplars_from_plain({"a": ["a0", "a3"]}, "here") == {
        "a": [Exemplar("a0"), Exemplar("a3")]
    }  # of version 0.1
    for wrong in (["a0"], {"a": "a0"}, {"a": [3]}, {"a": [{"id": "a0"}]}, {"a": [{"id": "a0", "start": -1}]},
                  {"a": [{"id": "a0", "start": True}]}, {"a": [{"id": "a0", "start": 1, "end": 2}]}):  # fmt: skip
        with pytest.raises(ConfigError, match="task\\.json: "):
            exemplars_from_plain(wrong, "task.json")


# --- what the separator says of the candidates ------------------------------------------------------------------------


def _separator(seed=0, classes=("ding", "hum")):
    parts = {k: v for k, v in TINY_SEPARATOR.items() if k != "front_end"}
    return build_separator(**parts, front_end=TINY_FRONT_END, classes=classes, seed=seed)


def _scored(store, separator, classes=("ding", "hum")):
    return ScoredCandidates({c: store.select(classes=[c], split="train") for c in classes}, separator, store)


def test_features_and_errors_are_those_of_the_centre_crop_with_its_partner(store):
    separator = _separator()
    separator.train()
    before = {k: v.clone() for k, v in separator.state_dict().items()}
    candidates = _scored(store, separator)
    ids = ["hum-train-1", "ding-train-2"]
    features, errors = candidates.features(ids), candidates.mask_error(ids)
    assert features.dtype == np.float32
    assert features.shape == (2, 48)  # audio, object and motion of 16
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert separator.training
    assert all(torch.equal(v, before[k]) for k, v in separator.state_dict().items())  # no running statistics moved
    assert candidates.partner("hum-train-1") == "ding-train-1"
    assert candidates.partner("ding-train-2") == "hum-train-2"
    separator.eval()
    sources = [
        load_source(store, store.clip(i), candidates.centre(i), FRONT_END, separator.visual_sources(), number)
        for i, number in (("hum-train-1", 1), ("ding-train-1", 0))
    ]
    batch = collate([sources])
    with torch.no_grad():
        spectrograms = separator.analyse(batch.sources)
        visual = separator.encode_visual(batch.visual)
        output = separator(spectrograms.network_input, visual, batch.class_ids)
        error = separation_loss(output, spectrograms, counted=torch.tensor([[True, False]]))
    assert errors[0] == pytest.approx(float(error), rel=1e-5)
    parts = [e[0, 0] / e[0, 0].norm() for e in (output.audio, output.object, output.motion)]
    np.testing.assert_allclose(features[0], torch.cat(parts) / 3**0.5, atol=1e-5)


def test_what_is_asked_first_changes_nothing(store):
    one, other = _scored(store, _separator()), _scored(store, _separator())
    ids = one.ids["ding"] + one.ids["hum"]
    forward = one.features(ids)
    backward = np.stack([other.features([i])[0] for i in reversed(ids)])[::-1]
    np.testing.assert_array_equal(forward, backward)
    np.testing.assert_array_equal(one.mask_error(ids), other.mask_error(ids))
    assert not np.array_equal(forward, _scored(store, _separator(seed=1)).features(ids))


def test_a_task_of_one_class_is_mixed_with_itself(store):
    candidates = _scored(store, _separator(), ("ding",))
    assert [candidates.partner(i)[-1] for i in candidates.ids["ding"]] == ["1", "2", "0"]
    assert np.isfinite(candidates.mask_error(candidates.ids["ding"])).all()


def test_a_separator_that_answers_nan_is_told(store):
    separator = _separator()
    with torch.no_grad():
        separator.audio_encoder.down[0].weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="answer for clip 'ding-train-0' is not finite"):
        _scored(store, separator).features(["ding-train-0"])


# --- in a run ---------------------------------------------------------------------------------------------------------


def _fit(store, run, memory, *, tasks=TINY_TASKS, resume=False, **train):
    stream = stream_of(store, tasks)
    learner = tiny_learner("finetune", memory, epochs=1, **train)
    return learner, learner.fit(stream, run, resume=resume, progress=False)


def test_a_kept_clip_is_what_training_hears_and_a_resume_goes_on_with_it(store, tmp_path, monkeypatch):
    from avsep.training.loop import TaskLoop

    memory = {"name": "herding", "params": {"per_class": 2, "keep": "clip"}}
    step, calls = TaskLoop._step, []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == 4:  # the second of the second task
            raise KeyboardInterrupt
        return step(self, *args)

    whole, records = _fit(store, tmp_path / "whole", memory, steps_per_epoch=2)
    monkeypatch.setattr(TaskLoop, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        _fit(store, tmp_path / "run", memory, steps_per_epoch=2)
    monkeypatch.undo()
    learner, again = _fit(store, tmp_path / "run", memory, resume=True, steps_per_epoch=2)
    assert again[1]["exemplars"] == records[1]["exemplars"] == records[0]["exemplars"]
    assert all(torch.equal(v, learner.separator.state_dict()[k]) for k, v in whole.separator.state_dict().items())
    kept = read_exemplars(tmp_path / "run", 0)
    assert {k: len(v) for k, v in kept.items()} == {"ding": 2, "hum": 2}
    stream = stream_of(store)
    starts = {e.id: e.start for v in kept.values() for e in v}
    data = learner._mixtures(stream, stream.tasks[1]).epoch(0)
    heard = [s for i in range(len(data)) for s in data[i] if s.is_memory]
    assert heard
    for source in heard:
        crop = store.read_audio(source.clip, starts[source.clip.id], FRONT_END.clip_samples - 1)
        scale = np.abs(source.audio).max() / np.abs(crop).max()
        np.testing.assert_allclose(source.audio[:-1], crop * scale, atol=2e-4)


@pytest.mark.parametrize("memory", [{"name": "reservoir", "params": {"total": 2, "keep": "id"}}, "class_balanced"])
def test_a_global_memory_over_three_tasks(memory, store, tmp_path):
    memory = {"name": memory, "params": {"total": 3}} if isinstance(memory, str) else memory
    tasks = [["ding", "hum"], ["peep"], ["whirr"]]
    _, records = _fit(store, tmp_path / "run", memory, tasks=tasks, steps_per_epoch=1)
    counts = [sum(map(len, r["exemplars"].values())) for r in records]
    assert counts == [memory["params"]["total"]] * 3
    if memory["name"] == "class_balanced":
        assert [{k: len(v) for k, v in r["exemplars"].items()} for r in records] == [
            {"ding": 2, "hum": 1}, {"ding": 1, "hum": 1, "peep": 1}, {"ding": 1, "hum": 1, "peep": 1}
        ]  # fmt: skip


def test_a_global_budget_that_the_stream_cannot_fill_is_refused_before_training(store, tmp_path):
    with pytest.raises(ConfigError, match="memory of 7 clips is larger than all tasks before the last, which have 6"):
        _fit(store, tmp_path / "run", {"name": "reservoir", "params": {"total": 7}})
    assert not (tmp_path / "run").exists()


def test_a_damaged_list_of_exemplars_is_named(tone_run, tmp_path):
    import shutil

    run = shutil.copytree(tone_run, tmp_path / "run")
    (run / "tasks" / "00" / "task.json").write_text('{"exemplars": {"ding": [7]}}')
    with pytest.raises(CheckpointError, match=r"00/task\.json: 7 is no exemplar"):
        read_exemplars(run, 0)
    (run / "tasks" / "00" / "task.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"task\.json names no exemplars"):
        read_exemplars(run, 0)

"""A memory of so many bytes: what fits, what is given up, and what training hears of it."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from avsep.data.codecs import CodedCrops, encode_frames
from avsep.data.store import Clip, Store, StoreWriter
from avsep.errors import ConfigError
from avsep.evaluation.budget import ExemplarScale, align, budget_of, estimate, exemplar_bytes
from avsep.memory import ByteBudget
from avsep.memory.base import Candidates, Exemplar, memory_rng, read_exemplars
from avsep.memory.byte_budget import cover
from avsep.memory.candidates import ScoredCandidates
from avsep.memory.herding import herd
from avsep.memory.reconstruction import reconstruct
from avsep.separator import build_separator
from avsep.spec import ComponentRef, FrontEndSpec, RunSpec, validated
from avsep.training import learner
from avsep.training.loader import TaskMixtures
from avsep.types import VisualSource
from support.continual_runs import differing, make_learner, resume_killed, trained, weights
from support.tones import TINY_FRONT_END, TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN, make_tone_store, stream_of

FRONT_END = FrontEndSpec(**TINY_FRONT_END)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store.open(make_tone_store(tmp_path_factory.mktemp("bytes") / "store"))


def weigh(exemplar, *, keep, codec="int16", pictures="raw", again=False):
    """100 bytes a crop, of recording 0 of a class 150; 40 less for a further one."""
    assert (keep, codec) == ("clip", "vorbis")
    return (150 if exemplar.id.endswith("0") else 100) - 40 * again


def candidates(sizes, *, crops=1, earlier=None):
    clips = {
        name: [Clip(f"{name}{i}", name, "train", crops * FRONT_END.clip_samples + 5, 100 * k + i) for i in range(count)]
        for k, (name, count) in enumerate(sizes.items())
    }
    return Candidates(clips, FRONT_END, earlier=earlier, weigh=weigh)


def ids(memory):
    return {name: [e.id for e in kept] for name, kept in memory.items()}


def spent(kept):
    ids = [e.id for e in kept]
    return sum(weigh(e, keep="clip", codec="vorbis", again=e.id in ids[:i]) for i, e in enumerate(kept))


def test_every_class_seen_gets_the_same_bytes_and_gives_up_its_last():
    policy = ByteBudget(budget_bytes=1200)
    first = policy.update({}, candidates({"a": 9, "b": 3}), memory_rng(0, 0))
    assert 500 <= spent(first["a"]) <= 600
    assert len(first["b"]) == 3  # all it has
    second = policy.update(first, candidates({"c": 9, "d": 9}, earlier={"a": 9, "b": 3}), memory_rng(0, 1))
    assert list(second) == ["a", "b", "c", "d"]
    for name, kept in second.items():
        assert 200 <= spent(kept) <= 300
        if name in first:
            assert kept == first[name][: len(kept)]
            assert len(kept) == len(first[name]) or spent(first[name][: len(kept) + 1]) > 300
    drawn = Counter()
    for seed in range(200):
        drawn.update(ids(policy.update({}, candidates({"a": 9, "b": 3}), memory_rng(seed, 0)))["a"])
    assert len(drawn) == 9


def test_one_crop_of_each_recording_comes_before_further_ones():
    found = ByteBudget(budget_bytes=720).update({}, candidates({"a": 3}, crops=3), memory_rng(0, 0))["a"]
    assert 720 - 110 < spent(found) <= 720
    names = [e.id for e in found]
    assert sorted(names[:3]) == ["a0", "a1", "a2"]
    assert names[3:6] == names[:3]
    assert len({e.start for e in found}) == len(found)
    everything = ByteBudget(budget_bytes=10**6).update({}, candidates({"a": 3}, crops=3), memory_rng(0, 0))["a"]
    assert Counter(e.id for e in everything) == {"a0": 3, "a1": 3, "a2": 3}  # as many as fit side by side
    assert everything[: len(found)] == found


def test_a_recording_that_is_too_large_is_passed_over():
    for seed in range(8):
        found = ids(ByteBudget(budget_bytes=120).update({}, candidates({"a": 4}), memory_rng(seed, 0)))["a"]
        assert len(found) == 1
        assert found[0] in ("a1", "a2", "a3")


def test_budgets_and_settings_that_cannot_be():
    reason = "399 bytes gives each of 4 classes 99, and the smallest exemplar of class 'a' takes 100: raise .* to 400"
    earlier = {"c": 2, "d": 1, "e": 1}
    with pytest.raises(ConfigError, match=reason):
        ByteBudget(budget_bytes=399).update({}, candidates({"a": 9}, earlier=earlier), memory_rng(0, 0))
    with pytest.raises(ConfigError, match="how many bytes an exemplar takes"):
        ByteBudget().update({}, Candidates({"a": [Clip("a0", "a", "train", 9000, 0)]}, FRONT_END), memory_rng(0, 0))
    for settings, message in (
        ({"budget_bytes": 0}, "budget_bytes must be at least 1, got 0"),
        ({"codec": "mp3"}, "codec must be one of int16, mulaw, vorbis, got 'mp3'"),
        ({"select": "best"}, "select must be one of random, herding, reconstruction, coverage, got 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            ByteBudget(**settings)


# --- which recordings -------------------------------------------------------------------------------------------------


def test_herding_of_five_points():
    """Mean (1.2, 1.2): (1, 1) is the nearest; then (1, 0) and (0, 1) do as well, and the first of them is taken."""
    assert herd(np.array([(0, 0), (1, 0), (0, 1), (1, 1), (4, 4)]), 3) == [3, 1, 2]


def test_coverage_of_four_profiles():
    profiles = np.array([(1, 0), (0.8, 0.1), (0, 1), (0.5, 0.5)])
    assert cover(profiles, 2) == [0, 2]
    assert profiles[[0, 2]].max(axis=0).sum() == 2.0
    assert sorted(cover(profiles, 4)) == [0, 1, 2, 3]  # each once, though nothing is left to gain


def tiny_separator(classes):
    parts = {k: v for k, v in TINY_SEPARATOR.items() if k != "front_end"}
    return build_separator(**parts, front_end=TINY_FRONT_END, classes=classes, seed=0)


def test_profiles_are_where_the_energy_is(store):
    clips = {c: store.select(classes=[c], split="train") for c in ("ding", "whirr")}
    scored = ScoredCandidates(clips, tiny_separator(("ding", "whirr")), store)
    found = scored.profiles(["ding-train-0", "whirr-train-2"])
    assert found.shape == (2, 64)
    assert (found.max(axis=1) == 1).all()
    width = 11025 / 2 / 64
    assert list(found.argmax(axis=1)) == [int(330 / width), int(1310 / width)]
    names = scored.ids["ding"]
    for select, expected in (
        ("coverage", cover(scored.profiles(names), 3)),
        ("herding", herd(scored.features(names), 3)),
        ("reconstruction", reconstruct(scored.features(names), 3)),
    ):
        scale = ExemplarScale(store, (), FRONT_END)
        scored.weigh = scale
        kept = ByteBudget(select=select, codec="mulaw", budget_bytes=2 * 4 * 8191).update({}, scored, memory_rng(0, 0))
        assert [e.id for e in kept["ding"][:3]] == [names[i] for i in expected]
        assert [e.start for e in kept["ding"][:3]] == [scored.centre(i) for i in names[:3]]
        assert len(kept["ding"]) == 4


# --- in training ------------------------------------------------------------------------------------------------------


def run_spec(memory, strategy="finetune"):
    data = {"separator": TINY_SEPARATOR, "strategy": strategy, "memory": memory, "train": TINY_TRAIN}
    return validated(RunSpec, {**data, "tasks": TINY_TASKS}, "test")


def memory_of(codec="vorbis", budget_bytes=60_000):
    return {"name": "byte_budget", "params": {"codec": codec, "budget_bytes": budget_bytes}}


@pytest.mark.parametrize("codec", ["int16", "mulaw", "vorbis"])
def test_training_hears_what_the_codec_gives_back(store, codec):
    stream = stream_of(store.path)
    separator = tiny_separator(TINY_TASKS[0] + TINY_TASKS[1])
    clips = {name: store.select(classes=[name], split="train") for name in TINY_TASKS[0]}
    scale = ExemplarScale(store, separator.visual_sources(), FRONT_END)
    policy = ByteBudget(codec=codec, budget_bytes=200_000)
    memory = policy.update({}, Candidates(clips, FRONT_END, weigh=scale), memory_rng(0, 0))
    starts: dict[str, list[int]] = {}
    for exemplar in (e for of in memory.values() for e in of):
        starts.setdefault(exemplar.id, []).append(exemplar.start)
    assert max(map(len, starts.values())) == 2  # a recording of which two crops are kept
    data = TaskMixtures(stream, stream.tasks[1], memory, run_spec("none").train, separator, codec=codec).epoch(0)
    crops = CodedCrops(store, codec, FRONT_END.clip_samples)
    heard: Counter[tuple[str, int]] = Counter()
    for item in range(data.items):
        for draw, source in zip(data.mixer.draw(data._rng(item), item, data.pool), data[item], strict=True):
            expected = store.read_crop(source.clip, draw.start, FRONT_END.clip_samples, draw.gain)
            if source.is_memory:
                heard[source.clip.id, draw.start] += 1
                if codec != "int16":
                    assert not np.array_equal(source.audio, expected)
                    expected = crops.read(source.clip, draw.start, draw.gain)
            np.testing.assert_array_equal(source.audio, expected)
    assert set(heard) == {(name, start) for name, of in starts.items() for start in of}  # every crop has its turn


def test_reader_processes_hear_and_see_the_same(store):
    stream, separator = stream_of(store.path), tiny_separator(TINY_TASKS[0] + TINY_TASKS[1])
    memory = {
        "ding": [Exemplar("ding-train-0", 5), Exemplar("ding-train-0", 8000)],
        "hum": [Exemplar("hum-train-1", 0)],
    }
    found = []
    for workers in (0, 1):
        mixtures = TaskMixtures(
            stream,
            stream.tasks[1],
            memory,
            run_spec("none").train,
            separator,
            codec="vorbis",
            pictures="jpeg",
            workers=workers,
        )
        batches = list(mixtures.training_batches(mixtures.epoch(0)))
        found.append([part for batch in batches for part in (batch.sources, batch.visual.motion)])
        if workers:  # done before the readers start
            assert (len(mixtures._coded._encoded), len(mixtures._coded._frames)) == (3, 6)  # object and motion
    assert len(found[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_kept_whole_is_kept_as_it_is(store):
    """Exemplars that another policy chose before: a run that goes on with byte_budget has both."""
    stream, separator = stream_of(store.path), tiny_separator(TINY_TASKS[0] + TINY_TASKS[1])
    memory = {"ding": [Exemplar("ding-train-0")], "hum": [Exemplar("hum-train-1", 0)]}
    mixtures = TaskMixtures(
        stream, stream.tasks[1], memory, run_spec("none").train, separator, codec="mulaw", pictures="jpeg"
    )
    data = mixtures.epoch(0)
    for item in range(data.items):
        for draw, source in zip(data.mixer.draw(data._rng(item), item, data.pool), data[item], strict=True):
            expected = store.read_crop(source.clip, draw.start, FRONT_END.clip_samples, draw.gain)
            assert np.array_equal(source.audio, expected) == (source.clip.id != "hum-train-1")
    assert {key[0] for key in (*mixtures._coded._encoded, *mixtures._coded._frames)} == {"hum-train-1"}
    scale, sources = ExemplarScale(store, separator.visual_sources(), FRONT_END), separator.visual_sources()
    whole = exemplar_bytes(store, store.clip("ding-train-0"), sources, FRONT_END, keep="recording").total
    assert scale(Exemplar("ding-train-0"), keep="clip", codec="mulaw", pictures="jpeg") == whole


def test_a_learner_gives_its_mixtures_the_policys_codecs(tone_store):
    stream = stream_of(tone_store)
    for codec, pictures in (("int16", "jpeg"), ("mulaw", "raw")):
        policy = {"codec": codec, "pictures": pictures, "budget_bytes": 60_000}
        coded = make_learner("finetune", ("byte_budget", policy))._mixtures(stream, stream.tasks[1])._coded
        assert (coded.codec, coded.pictures) == (codec, pictures)
    policy = {"codec": "int16", "pictures": "deflate", "budget_bytes": 60_000}  # which lose nothing
    assert make_learner("finetune", ("byte_budget", policy))._mixtures(stream, stream.tasks[1])._coded is None


def test_mean_pictures_are_of_what_the_codec_gives_back(tone_store, monkeypatch):
    given = []
    monkeypatch.setattr(learner, "mean_pictures", lambda *_, coded, **__: given.append(coded))
    for pictures in ("jpeg", "raw"):
        policy = {"codec": "int16", "pictures": pictures, "budget_bytes": 60_000}
        made = make_learner("finetune", ("byte_budget", policy))
        stream = stream_of(tone_store)
        made._complete(stream, stream.tasks[0], None)
    assert given[0].pictures == "jpeg"
    assert given[1] is None


def test_a_run_keeps_what_the_budget_allows_and_goes_on_after_a_kill(tone_store):
    memory = ("byte_budget", {"codec": "vorbis", "pictures": "jpeg", "budget_bytes": 60_000})
    run = trained(tone_store, "finetune", memory)
    resumed = resume_killed(tone_store, run, "finetune", memory)
    assert differing(weights(run), weights(resumed)) == []
    found = budget_of(run, 0)
    assert found.exemplars == sum(map(len, read_exemplars(run, 0).values())) > 2
    assert 40_000 < found.exemplar_bytes <= 60_000


def test_it_is_estimated_exactly_and_resized_in_bytes(store):
    budgets = {c: estimate(run_spec(memory_of(c, 80_000)), store) for c in ("int16", "mulaw", "vorbis")}
    assert all(40_000 < b.exemplar_bytes <= 80_000 for b in budgets.values())
    assert budgets["int16"].exemplars < budgets["mulaw"].exemplars < budgets["vorbis"].exemplars
    bare = estimate(run_spec("none"), store)
    methods = {"a": run_spec(memory_of()), "b": run_spec("none")}
    found = align(methods, store, budget=bare.total + 80_000)
    assert found["a"].memory == ComponentRef(name="byte_budget", params={"codec": "vorbis", "budget_bytes": 80_000})
    assert found["a"].budget.total + found["a"].spare == bare.total + 80_000
    assert 0 <= found["a"].spare < 20_000
    small = align({"a": methods["a"]}, store, budget=bare.total + 100)["a"]
    assert (small.memory.name, small.spare) == ("none", 100)
    with pytest.raises(ConfigError, match="a needs a memory: memory of 100 bytes gives each of 2 classes 50"):
        align({"a": run_spec(memory_of(), "agem")}, store, budget=estimate(run_spec("none", "agem"), store).total + 100)


def test_the_sound_is_weighed_as_its_codec_writes_it(store):
    scale, exemplar = ExemplarScale(store, (), FRONT_END), Exemplar("hum-train-0", 3)
    size = CodedCrops(store, "vorbis", 8191).size(store.clip(exemplar.id), 3)
    found = [scale(exemplar, keep="clip", codec=codec) for codec in ("int16", "mulaw", "vorbis")]
    assert found == [2 * 8191, 8191, size]


def test_frames_are_weighed_as_they_are_packed(store, tmp_path):
    sources = [VisualSource("object", "frames", frames=1), VisualSource("motion", "frames")]
    scale, exemplar = ExemplarScale(store, sources, FRONT_END), Exemplar("hum-train-0", 3)
    centre_s = (3 + FRONT_END.clip_samples // 2) / FRONT_END.sample_rate_hz
    clip = store.clip(exemplar.id)
    seen = {s.role: store.read_visual(clip, s, centre_s=centre_s, duration_s=FRONT_END.clip_s) for s in sources}
    raw = scale.bytes_of(exemplar, keep="clip")
    packed = scale.bytes_of(exemplar, keep="clip", pictures="deflate")
    assert (raw.object, raw.motion) == (seen["object"].nbytes, seen["motion"].nbytes)
    for role, found in (("object", packed.object), ("motion", packed.motion)):
        data = encode_frames(seen[role], "deflate")
        assert found == len(data) < seen[role].nbytes
        assert zlib.decompress(data) == seen[role].tobytes()
    assert packed.audio == raw.audio
    assert scale.of_all({"hum": [exemplar]}, ByteBudget(codec="int16", pictures="deflate")) == packed
    whole = Exemplar(exemplar.id)
    assert scale.bytes_of(whole, keep="recording", pictures="deflate") == scale.bytes_of(whole, keep="recording")


def test_more_crops_fit_where_frames_are_packed():
    def pack(exemplar, *, keep, codec="int16", pictures="raw", again=False):
        return 40 if pictures == "deflate" else 100

    kept = {}
    for pictures in ("raw", "deflate"):
        given = candidates({"a": 9})
        given.weigh = pack
        kept[pictures] = ByteBudget(budget_bytes=240, pictures=pictures).update({}, given, memory_rng(0, 0))["a"]
    assert len(kept["raw"]) == 2
    assert len(kept["deflate"]) == 6
    assert kept["deflate"][:2] == kept["raw"]
    with pytest.raises(ValueError, match="pictures must be one of raw, deflate, jpeg, got 'png'"):
        ByteBudget(pictures="png")


def test_stored_motion_features_count_once_a_recording(tmp_path):
    with StoreWriter(tmp_path / "store", classes=["a"], sample_rate_hz=11025, origin={}) as writer:
        motion = np.zeros((9, 5), np.float16)
        writer.write_clip("x", "a", "train", np.zeros(30_000, np.float32), features={"moves": motion})
        writer.finish(["x"])
    source = VisualSource("motion", "features", name="moves", dim=5)
    scale = ExemplarScale(Store.open(tmp_path / "store"), [source], FRONT_END)
    exemplars = [Exemplar("x", 0), Exemplar("x", 9000)]
    found = [scale(e, keep="clip", again=again) for e in exemplars for again in (False, True)]
    assert found == [2 * 8191 + 2 * 9 * 5, 2 * 8191] * 2
    assert scale.of_all({"a": exemplars}, ByteBudget(codec="int16")).motion == 2 * 9 * 5

"""Tasks that overlap."""

from __future__ import annotations

import pytest

from avsep.cli.train_command import _blurry
from avsep.data.blurry import blurry_shares, check_shares, first_seen
from avsep.data.store import Store
from avsep.data.tasks import task_stream
from avsep.errors import ConfigError
from avsep.spec import BlurrySpec
from support.tones import TINY_FRONT_END, TINY_TASKS, tiny_run_spec

COUNTS = (31, 45, 52, 38, 40, 29, 61, 44, 37, 43, 50, 41, 36, 48, 33, 47, 42, 39, 46, 38)


@pytest.fixture(scope="module")
def many():
    """840 clips of 20 classes in 4 tasks."""
    clips = [[f"{number}-{k}" for k in range(count)] for number, count in enumerate(COUNTS)]
    return [{str(number): clips[number] for number in range(first, first + 5)} for first in range(0, 20, 5)]


def owners(tasks):
    return {clip: (task, name) for task, of in enumerate(tasks) for name, clips in of.items() for clip in clips}


def test_every_clip_comes_once_and_the_disjoint_classes_in_their_own_task(many):
    shares = blurry_shares(many, disjoint=50, blurry=10, seed=1)
    own = owners(many)
    assert sum(map(len, shares)) == 840
    assert frozenset().union(*shares) == set(own)
    moved = {clip for task, share in enumerate(shares) for clip in share if own[clip][0] != task}
    blurry = {own[clip][1] for clip in moved}
    assert len(blurry) <= 12  # of 20 classes, 50 % rounded down to a multiple of 4 are disjoint: 8
    of_tasks = [sum(name in blurry for name in of) for of in many]
    assert max(of_tasks) <= 3
    again = blurry_shares(many, disjoint=50, blurry=10, seed=1)
    assert (again, blurry_shares(many, disjoint=50, blurry=10, seed=2) == shares) == (shares, False)


def test_a_tenth_of_each_tasks_blurry_clips_is_dealt_to_all(many):
    shares = blurry_shares(many, disjoint=0, blurry=10, seed=3)
    own = owners(many)
    whole = [sum(map(len, of.values())) for of in many]
    taken = [size // 10 for size in whole]
    assert (whole, taken) == ([206, 214, 208, 212], [20, 21, 20, 21])
    dealt = [21, 21, 20, 20]  # 82 in turn
    sizes = [size - out + back for size, out, back in zip(whole, taken, dealt, strict=True)]
    assert [len(share) for share in shares] == sizes
    for task, share in enumerate(shares):
        stayed = sum(own[clip][0] == task for clip in share)
        assert whole[task] - taken[task] <= stayed < len(share)  # of what was dealt some is others'
    everything = blurry_shares(many, disjoint=0, blurry=100, seed=0)
    assert [len(share) for share in everything] == [210] * 4
    odd = blurry_shares([{"a": list("pqrst")}, {"b": list("uv")}], disjoint=0, blurry=100, seed=0)
    assert [len(share) for share in odd] == [4, 3]  # none is dropped


def test_nothing_moves_where_nothing_is_blurry(many):
    whole = tuple(frozenset(clip for clips in of.values() for clip in clips) for of in many)
    assert blurry_shares(many, disjoint=100, blurry=100, seed=0) == whole
    assert blurry_shares(many, disjoint=50, blurry=0, seed=0) == whole
    assert first_seen(many, whole) == [list(of) for of in many]


def test_a_class_is_new_where_its_first_clip_comes():
    clips = [{"a": ["a0", "a1"], "b": ["b0"]}, {"c": ["c0", "c1"], "d": ["d0"]}]
    shares = (frozenset(["a0", "b0", "c1"]), frozenset(["a1", "c0", "d0"]))
    assert first_seen(clips, shares) == [["a", "b", "c"], ["d"]]
    with pytest.raises(ConfigError, match="task 1 brings no new class"):
        first_seen(clips, (frozenset(["a0", "b0", "c1", "d0"]), frozenset(["a1", "c0"])))


def test_a_class_that_its_own_task_lacks_is_refused(tone_store):
    clips = [{"a": ["a0", "a1"], "b": ["b0"]}, {"c": ["c0", "c1"], "d": ["d0"]}]
    check_shares(clips, (frozenset(["a0", "b0", "c1"]), frozenset(["a1", "c0", "d0"])))
    for shares, name, count, task in (
        ((["b0", "c0"], ["a0", "a1", "c1", "d0"]), "a", 2, 0),  # task 0 would be tested on what comes later
        ((["a0", "a1", "b0", "d0"], ["c0", "c1"]), "d", 1, 1),  # task 1 would have no candidate of it
    ):
        with pytest.raises(ConfigError, match=f"all {count} training clips of class '{name}' .* than its own, {task},"):
            check_shares(clips, tuple(map(frozenset, shares)))
    store, how = Store.open(tone_store), {"clip_samples": TINY_FRONT_END["clip_samples"]}
    outcomes = set()
    for seed in range(40):
        try:
            stream = task_stream(store, TINY_TASKS, blurry=BlurrySpec(disjoint=0, blurry=100, seed=seed), **how)
        except ConfigError as error:
            outcomes.add("refused" if "come in other tasks than its own" in str(error) else str(error))
            continue
        outcomes.add("made")
        for task in stream.tasks:
            assert set(stream.protocol.tasks[task.index]) <= set(task.seen)
            assert all(stream.candidates(task).values())
    assert outcomes >= {"made", "refused"}


def test_a_stream_overlaps_and_is_tested_as_without(tone_store):
    store = Store.open(tone_store)
    how = {"clip_samples": TINY_FRONT_END["clip_samples"]}
    plain = task_stream(store, TINY_TASKS, **how)
    stream = task_stream(store, TINY_TASKS, blurry=BlurrySpec(disjoint=50, blurry=70, seed=1), **how)
    assert (stream.protocol, stream.validation) == (plain.protocol, plain.validation)
    assert stream.blurry.tasks == tuple(map(tuple, TINY_TASKS))
    first, second = stream.tasks
    assert set(first.classes) > set(TINY_TASKS[0])  # with this seed
    assert sorted(second.seen) == sorted(store.classes)
    of_first, of_second, both = stream.train_clips(first), stream.train_clips(second), None
    both = stream.train_clips(second, all_seen=True)
    assert {c.id for c in both} == {c.id for c in store.select(split="train")}
    assert len(of_first) + len(of_second) == len(both)
    assert {c.class_name for c in of_second} & set(first.classes)  # old classes go on
    for task in stream.tasks:
        candidates = stream.candidates(task)
        assert list(candidates) == TINY_TASKS[task.index]
        here = {c.id for c in stream.train_clips(task)}
        assert all(c.id in here and c.class_name == name for name, clips in candidates.items() for c in clips)
    assert plain.candidates(plain.tasks[0]) == {
        name: store.select(classes=[name], split="train") for name in TINY_TASKS[0]
    }


def test_specs_of_runs_without_it_stay_the_same_text():
    spec = tiny_run_spec()
    assert "blurry" not in spec.model_dump(mode="json")
    assert spec.tested == spec.tasks
    overlapping = spec.model_copy(update={"blurry": BlurrySpec(tasks=(("a",), ("b",)))})
    assert overlapping.model_dump(mode="json")["blurry"]["disjoint"] == 50
    assert overlapping.tested == (("a",), ("b",))


def test_mistakes_are_said(many):
    for disjoint, blurry in ((101, 10), (50, -1)):
        with pytest.raises(ConfigError, match="must be 0 to 100 percent"):
            blurry_shares(many, disjoint=disjoint, blurry=blurry, seed=0)
    with pytest.raises(ConfigError, match="2 classes of every task are to be disjoint, and task 1 has 1"):
        blurry_shares([{"a": [], "b": [], "c": []}, {"d": []}], disjoint=100, blurry=10, seed=0)
    assert _blurry("50:10:3") == {"disjoint": 50, "blurry": 10, "seed": 3}
    assert _blurry("50:10") == {"disjoint": 50, "blurry": 10}
    for text in ("50", "a:b", "50:10:1:1", ""):
        with pytest.raises(ConfigError, match="is not PERCENT:PERCENT"):
            _blurry(text)

"""Task streams and frozen test pairs."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from avsep.data.protocol import APART, PROTOCOLS, Protocol, build_protocol, centre_start
from avsep.data.store import Clip
from avsep.data.tasks import make_tasks, split_classes
from avsep.errors import ConfigError, DataError

RATE, LENGTH = 11025, 65535
CLASSES = [f"class{i:02d}" for i in range(20)]


class _Clips:
    """As much of a store as protocols read."""

    sample_rate_hz = RATE
    content_hash = "0" * 64

    def __init__(self, classes, per_class=5, seconds=20):
        self.clips = [
            Clip(id=f"{name}-{k}", class_name=name, split="test", samples=seconds * RATE, index=i * per_class + k)
            for i, name in enumerate(classes)
            for k in range(per_class)
        ]

    def has_pictures(self, clip):
        return True

    def select(self, *, classes=None, split=None):
        return [c for c in self.clips if c.class_name in classes and c.split == split]


@pytest.fixture
def protocols():
    store = _Clips(CLASSES)
    tasks = make_tasks(split_classes(CLASSES, 5))
    return (
        store,
        tasks,
        {n: build_protocol(n, store, tasks, split="test", clip_samples=LENGTH) for n in PROTOCOLS},
    )


def test_paper_pairs_are_the_published_ones(protocols):
    # first partners and degenerate counts as methods of the published evaluation give them
    store, _, made = protocols
    position = {c.id: i for i, c in enumerate(store.clips)}
    partners = [[position[m.clips[1]] for m in made["paper"].at(t)] for t in range(4)]
    assert [len(p) for p in partners] == [25, 50, 75, 100]
    assert partners[0][:10] == [12, 4, 1, 7, 7, 19, 18, 10, 7, 14]
    assert partners[3][:10] == [49, 17, 7, 30, 30, 79, 73, 41, 29, 59]
    counts = [Counter(m.degenerate for m in made["paper"].at(t)) for t in range(4)]
    assert [c["self"] for c in counts] == [0, 1, 1, 1]
    assert [c["same_class"] for c in counts] == [8, 4, 5, 5]
    assert [next(i for i, m in enumerate(made["paper"].at(t)) if m.degenerate == "self") for t in (1, 2, 3)] == [
        35,
        21,
        21,
    ]


def test_paper_cross_task_counts(protocols):
    _, tasks, made = protocols
    task_of = {name: t.index for t in tasks for name in t.classes}
    crossing = [sum(task_of[m.classes[0]] != task_of[m.classes[1]] for m in made["paper"].at(t)) for t in range(4)]
    assert crossing == [0, 23, 50, 77]


def test_fixed_pairs_never_change_and_never_repeat_a_class(protocols):
    _, tasks, made = protocols
    fixed = made["fixed"]
    for earlier, later in ((0, 1), (1, 3)):
        assert set(fixed.at(earlier)) < set(fixed.at(later))
    assert all(not m.degenerate and len(set(m.classes)) == 2 for m in fixed.mixtures)
    pairs = [frozenset(m.clips) for m in fixed.mixtures]
    assert len(pairs) == len(set(pairs))
    for task in tasks:
        within = fixed.within(task.index)
        assert {c for m in within for c in m.classes} == set(task.classes)
        uses = Counter(c for m in within for c in m.clips)
        assert min(uses.values()) >= 2
    cross = [m for m in fixed.mixtures if m.list_name == "cross"]
    assert len(cross) == 75
    assert all(fixed.task_of(m.classes[0]) > fixed.task_of(m.classes[1]) for m in cross)


def test_fixed_pairs_of_a_task_do_not_depend_on_later_tasks():
    store = _Clips(CLASSES)
    short = build_protocol("fixed", store, make_tasks([CLASSES[:5], CLASSES[5:10]]), split="test", clip_samples=LENGTH)
    long = build_protocol("fixed", store, make_tasks(split_classes(CLASSES, 5)), split="test", clip_samples=LENGTH)
    assert short.at(1) == long.at(1)


def test_protocol_file_round_trip_and_damage(protocols, tmp_path):
    path = tmp_path / "protocol.json"
    fixed = protocols[2]["fixed"]
    for made in (protocols[2]["audiovisual"], fixed):
        made.save(path)
        assert Protocol.load(path) == made
    data = json.loads(path.read_text())
    data["mixtures"][0]["starts"][0] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="does not match its hash"):
        Protocol.load(path)
    for change in ({"version": 99}, {"name": "mine", "version": 1}):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(DataError, match=r"protocol (fixed version 99|mine version 1) is not known here"):
            Protocol.load(path)


def test_the_lists_of_a_version_are_frozen(protocols):
    """Other lists are another version: raise it in PROTOCOLS, then write the new hash here."""
    assert {name: (p.version, p.hash[:16]) for name, p in protocols[2].items()} == {
        "fixed": (1, "7d6beed3bd247d73"),
        "paper": (1, "897da7834e05719f"),
        "audiovisual": (1, "ce6e155b37c1137b"),
    }


def by_list(protocol):
    lists = {}
    for mixture in protocol.mixtures:
        lists.setdefault(mixture.list_name, []).append(mixture)
    return lists


def test_audiovisual_has_the_pairs_of_fixed_and_lists_beside_them(protocols):
    _, _, made = protocols
    lists = by_list(made["audiovisual"])
    assert set(lists) == {*APART, *(f"task-{j}" for j in range(4)), "cross"}
    assert [m for m in made["audiovisual"].mixtures if m.list_name not in APART] == list(made["fixed"].mixtures)
    assert all(m.counted for m in made["audiovisual"].mixtures)
    roles = {
        "absent-moving": ("source", "moving"),
        "absent-still": ("source", "still"),
        "absent-unseen": ("source", "unseen"),
        "absent-pair": ("source", "source", "still"),
        "background": ("source", "source", "background"),
        "photo": ("photo_source", "photo_source"),
        "unseen": ("unseen_source", "unseen_source"),
    }
    for name in APART:
        for m in lists[name]:
            assert m.roles == roles.get(name, ())
            assert len(m.asked) == (3 if name in ("three", "absent-pair") else 2)
            assert (m.gain_db, m.rt60_s) == {"quiet": (-20, 0), "reverberant": (0, 0.5)}.get(name, (0, 0))
            assert (m.needs_photo, m.needs_unseen) == (name == "photo", name in ("unseen", "absent-unseen"))
            assert m.task == max(made["audiovisual"].task_of(c) for c in m.classes)
            if name == "same-class":
                assert m.degenerate == "same_class"
                assert len(set(m.classes)) == 1
            else:
                assert not m.degenerate
                assert len(set(m.classes)) == len(m.clips)


def test_audiovisual_lists_are_small_and_use_clips_evenly(protocols):
    store, _, made = protocols
    lists = by_list(made["audiovisual"])
    for name in APART:
        assert len(lists[name]) == len(store.clips), name  # one for each clip, which leads it
        assert [m.clips[0] for m in lists[name]] == [c.id for c in store.clips]
        assert len({frozenset(m.clips) for m in lists[name]}) == len(lists[name])
        uses = Counter(c for m in lists[name] for c in m.clips)
        assert max(uses.values()) - min(uses.values()) <= 3, name
    headline = {(m.clips, m.starts) for m in made["fixed"].mixtures}
    for name in ("quiet", "reverberant", "photo", "unseen"):  # what is lost is measured against the same pairs
        assert {(m.clips, m.starts) for m in lists[name]} <= headline


def test_audiovisual_lists_of_a_task_do_not_depend_on_later_tasks(protocols):
    store, _, made = protocols
    whole = made["audiovisual"]
    short = build_protocol(
        "audiovisual", store, make_tasks(split_classes(CLASSES, 5)[:2]), split="test", clip_samples=LENGTH
    )
    assert short.at(1) == whole.at(1)
    for earlier, later in ((0, 1), (1, 3)):
        assert whole.at(later)[: len(whole.at(earlier))] == whole.at(earlier)


def test_audiovisual_of_few_classes_and_clips_leaves_lists_out():
    def lists(classes, tasks, **store):
        made = build_protocol(
            "audiovisual", _Clips(classes, **store), make_tasks(tasks), split="test", clip_samples=LENGTH
        )
        return {name: len(members) for name, members in by_list(made).items()}

    alone = lists(["a"], [["a"]], per_class=1)
    assert alone == {}
    pair = lists(["a", "b"], [["a"], ["b"]], per_class=2)
    assert pair["same-class"] == 2  # two clips make one pair
    assert pair["cross"] == pair["quiet"] == 2  # a task of one class: its headline is the cross list
    assert "three" not in pair


def test_a_fixed_mixture_keeps_its_number_as_tasks_are_added(protocols):
    fixed = protocols[2]["fixed"]
    for earlier, later in ((0, 1), (1, 2), (2, 3)):
        assert fixed.at(later)[: len(fixed.at(earlier))] == fixed.at(earlier)


def test_centre_of_a_long_and_a_short_clip():
    def clip(samples):
        return Clip(id="a", class_name="b", split="test", samples=samples, index=0)

    # 20 s: second 10 of 20 (1-based), its middle at 9.5 s
    assert centre_start(clip(20 * RATE), RATE, LENGTH) == int(9.5 * RATE) - 32767
    assert centre_start(clip(2 * RATE), RATE, LENGTH) == int(1.5 * RATE) - 32767  # tiled: counted at the crop's length


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([], "no tasks"),
        ([["a"], []], "task 1 has no classes"),
        ([["a", "b"], ["b"]], "task 1 repeats class 'b'"),
        ([["a", "a"]], "task 0 repeats class 'a'"),
        (["flute"], "is the text 'flute'"),
    ],
)
def test_bad_task_lists(lists, message):
    with pytest.raises(ConfigError, match=message):
        make_tasks(lists)


def test_split_refuses_a_remainder():
    assert split_classes(list("abcd"), 2) == [["a", "b"], ["c", "d"]]
    with pytest.raises(ConfigError, match="4 classes do not divide into tasks of 3"):
        split_classes(list("abcd"), 3)


def test_unknown_protocol_names_the_known():
    with pytest.raises(ConfigError, match="known: fixed, paper, audiovisual"):
        build_protocol("mine", SimpleNamespace(), (), split="test", clip_samples=1)

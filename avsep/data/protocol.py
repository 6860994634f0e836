"""Test mixtures, frozen and versioned: who is mixed with whom, from where, and what is scored after each task.

``fixed`` (the default) pairs every clip with clips of other classes of its own task, and adds a list of cross-task
pairs; the lists never change with the task, so that a later score differs from an earlier one only by the model.
``paper`` redraws the pairs after every task as the published code does (sample i of the n clips seen so far meets
``random.seed(i); randint(0, n - 1)``), which lets a clip meet itself or its own class; such pairs are marked and
reported apart.
``audiovisual`` has the pairs of ``fixed``, whose mean stays the headline, and beside them lists that ask for more than
to be told the class (:data:`APART`): two players of one class, three sources, sources that are asked for and absent,
sounds that nobody asked for, quiet and reverberant mixtures, sources without a picture.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from avsep.data.store import Clip, Store
from avsep.errors import ConfigError, DataError
from avsep.files import read_json, write_json
from avsep.types import Task

__all__ = [
    "APART",
    "PARTNERS",
    "PROTOCOLS",
    "ROLES",
    "Protocol",
    "ProtocolKind",
    "TestMixture",
    "build_protocol",
    "centre_start",
    "evenly",
    "second_start",
    "seconds_of",
]

ROLES = {
    "source": "sounds, is seen, and is asked for",
    "unseen_source": "sounds and is asked for; there is no picture of it",
    "photo_source": "sounds and is asked for; there is a picture of it, and its motion is not known",
    "moving": "is asked for and not in the mixture; it is seen playing something that is not heard",
    "still": "is asked for and not in the mixture; it is seen at rest",
    "unseen": "is asked for and not in the mixture; there is no picture of it",
    "photo": "is asked for and not in the mixture; there is a picture of it, and its motion is not known",
    "background": "sounds, and is not asked for",
}
_T = TypeVar("_T")


def evenly(items: Sequence[_T], count: int) -> list[_T]:
    """At most ``count`` of the items, spread evenly over all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


APART = {
    "same-class": "two clips of one class",
    "three": "three sources of different classes",
    "absent-moving": "one source; a second that is asked for is silent, and seen playing",
    "absent-still": "one source; a second that is asked for is silent, and seen at rest",
    "absent-unseen": "one source; a second that is asked for is silent, and there is no picture of it",
    "absent-pair": "two sources; a third that is asked for is silent, and seen at rest",
    "background": "two sources that are asked for, and a third that is not",
    "quiet": "pairs of the headline, 20 dB quieter",
    "reverberant": "pairs of the headline in a room with a reverberation time of 0.5 s",
    "photo": "pairs of the headline with one picture of each source and no motion",
    "unseen": "pairs of the headline without any picture",
}
"""The lists of ``audiovisual`` beside those of ``fixed``: each has its own means and is in no mean over all lists."""

QUIET_DB = -20.0
ROOM_RT60_S = 0.5
PARTNERS = 2  # partners of each clip within its task
CROSS = 1  # partners of each clip of a later task among the clips of earlier tasks
_SEED = 20240901  # of the pair lists; part of the protocol, so never a setting


@dataclass(frozen=True)
class TestMixture:
    """Clips that are added up, each from sample ``starts`` on.

    ``task`` is the latest task among the sources; ``list_name`` the list it stands in; ``degenerate`` is ``"self"``
    where a clip meets itself, ``"same_class"`` where classes repeat, else empty. ``roles`` (:data:`ROLES`), one a clip,
    is empty where all are sources; ``gain_db`` applies to all, as does the reverberation time ``rt60_s`` of a room.
    """

    __test__ = False  # not a test case, whatever its name

    clips: tuple[str, ...]
    classes: tuple[str, ...]
    starts: tuple[int, ...]
    task: int
    list_name: str
    degenerate: str = ""
    roles: tuple[str, ...] = ()
    gain_db: float = 0.0
    rt60_s: float = 0.0

    @property
    def asked(self) -> tuple[int, ...]:
        """The places of those clips that are asked for: the mixture's N sources, in order."""
        return tuple(i for i in range(len(self.clips)) if self.role(i) != "background")

    def role(self, place: int) -> str:
        return self.roles[place] if self.roles else "source"

    @property
    def needs_unseen(self) -> bool:
        """Whether a source that is asked for has no picture."""
        return any(role in ("unseen_source", "unseen") for role in self.roles)

    @property
    def needs_photo(self) -> bool:
        """Whether of a source that is asked for there is one picture, and its motion is not known."""
        return any(role in ("photo_source", "photo") for role in self.roles)

    @property
    def counted(self) -> bool:
        """Whether the means of its list take it in: not a clip with itself, and with its own class only in the list
        of such pairs."""
        return not self.degenerate or self.list_name in APART


@dataclass(frozen=True)
class Protocol:
    """Named, versioned lists of test mixtures over one store's split."""

    name: str
    version: int
    split: str
    store_hash: str
    clip_samples: int
    tasks: tuple[tuple[str, ...], ...]
    mixtures: tuple[TestMixture, ...]

    @property
    def hash(self) -> str:
        """SHA-256 over everything that decides what is scored."""
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        """As plain data; what came with later versions is left out where it is unset, and hashes stay the same."""
        data = asdict(self)
        for mixture in data["mixtures"]:
            for key in ("roles", "gain_db", "rt60_s"):
                if not mixture[key]:
                    del mixture[key]
        return data

    def at(self, task: int) -> list[TestMixture]:
        """The mixtures to score after task ``task``."""
        if self.name == "paper":
            return [m for m in self.mixtures if m.list_name == f"paper-{task}"]
        return [m for m in self.mixtures if m.task <= task]

    def within(self, task: int) -> list[TestMixture]:
        """The mixtures of one task's own list (not of ``paper``)."""
        return [m for m in self.mixtures if m.list_name == f"task-{task}"]

    def selecting(self, task: int) -> list[TestMixture]:
        """The mixtures by whose mean weights are selected: of ``audiovisual`` the headline's and the same-class
        duets, else all."""
        return [m for m in self.at(task) if m.list_name not in APART or m.list_name == "same-class"]

    def task_of(self, class_name: str) -> int:
        for index, names in enumerate(self.tasks):
            if class_name in names:
                return index
        raise ConfigError(f"class '{class_name}' is in no task of the protocol")

    def save(self, path: str | Path) -> None:
        write_json(path, {"format": "avsep-protocol", "hash": self.hash, **self._plain()})

    @classmethod
    def load(cls, path: str | Path) -> Protocol:
        again = "avsep train --resume writes it again"
        try:
            data = read_json(path)
        except ConfigError as error:
            raise DataError(f"{error} ({again})") from None
        if not isinstance(data, dict) or data.pop("format", None) != "avsep-protocol":
            raise DataError(f"{path} is not a protocol file ({again})")
        stated = data.pop("hash", None)
        if not isinstance(data.get("name"), str) or not isinstance(data.get("version"), int):
            raise DataError(f"{path} is a damaged protocol: it says no name and version ({again})")
        kind = PROTOCOLS.get(str(data.get("name")))
        if kind is None or data.get("version") != kind.version:
            known = ", ".join(f"{name} version {k.version}" for name, k in PROTOCOLS.items())
            raise DataError(
                f"{path}: protocol {data.get('name')} version {data.get('version')} is not known here, where there are "
                f"{known}, and scores of different versions must not be mixed ({again})"
            )
        try:
            protocol = cls(
                **{
                    **data,
                    "tasks": tuple(tuple(t) for t in data["tasks"]),
                    "mixtures": tuple(_mixture(m) for m in data["mixtures"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged protocol file, {type(error).__name__} {error} ({again})") from None
        if protocol.hash != stated:
            raise DataError(f"{path}: its content does not match its hash; it was edited or damaged ({again})")
        return protocol


def _mixture(data: dict[str, Any]) -> TestMixture:
    lists: dict[str, Any] = {key: tuple(data[key]) for key in ("clips", "classes", "starts", "roles") if key in data}
    return TestMixture(**{**data, **lists})


def seconds_of(clip: Clip, sample_rate_hz: int, clip_samples: int) -> int:
    """Whole seconds of a clip, which one shorter than a crop fills by repeating: the frames it has at 1 frame/s."""
    return max(max(clip.samples, clip_samples) // sample_rate_hz, 1)


def second_start(second: int, sample_rate_hz: int, clip_samples: int) -> int:
    """First sample of the crop around the middle of a 1-based second; may lie before the clip."""
    return int(sample_rate_hz * (second - 0.5)) - clip_samples // 2


def centre_start(clip: Clip, sample_rate_hz: int, clip_samples: int) -> int:
    """First sample of the crop around the clip's middle second, count // 2 as published (iQuery adds 1)."""
    middle = max(seconds_of(clip, sample_rate_hz, clip_samples) // 2, 1)
    return second_start(middle, sample_rate_hz, clip_samples)


def build_protocol(name: str, store: Store, tasks: Sequence[Task], *, split: str, clip_samples: int) -> Protocol:
    """Build a protocol by name (:data:`PROTOCOLS`) for the tasks of a stream. Deterministic."""
    if name not in PROTOCOLS:
        raise ConfigError(f"no protocol '{name}': known: {', '.join(PROTOCOLS)}")
    kind = PROTOCOLS[name]

    def mixture(clips: Sequence[Clip], list_name: str, **more: Any) -> TestMixture:
        classes = [c.class_name for c in clips]
        degenerate = ""
        if len({c.id for c in clips}) < len(clips):
            degenerate = "self"
        elif len(set(classes)) < len(classes):
            degenerate = "same_class"
        return TestMixture(
            clips=tuple(c.id for c in clips),
            classes=tuple(classes),
            starts=tuple(centre_start(c, store.sample_rate_hz, clip_samples) for c in clips),
            task=max(t.index for t in tasks for c in classes if c in t.classes),
            list_name=list_name,
            degenerate=degenerate,
            **more,
        )

    mixtures = kind.build(store, tasks, split, mixture)
    return Protocol(
        name=name,
        version=kind.version,
        split=split,
        store_hash=store.content_hash,
        clip_samples=clip_samples,
        tasks=tuple(t.classes for t in tasks),
        mixtures=tuple(mixtures),
    )


def _rng(task: int, other: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_SEED, task, other])))


def _partners(
    clips: Sequence[Clip], pool: Sequence[Clip], count: int, rng: np.random.Generator
) -> list[tuple[Clip, Clip]]:
    """Pairs of different classes in which the partners are used evenly; no unordered pair comes twice."""
    used = {c.id: 0 for c in pool}
    taken: set[frozenset[str]] = set()
    pairs = []
    for clip in clips:
        for _ in range(count):
            open_ = [c for c in pool if c.class_name != clip.class_name and frozenset((c.id, clip.id)) not in taken]
            if not open_:
                break
            least = min(used[c.id] for c in open_)
            fair = [c for c in open_ if used[c.id] == least]
            partner = fair[int(rng.integers(len(fair)))]
            used[partner.id] += 1
            taken.add(frozenset((clip.id, partner.id)))
            pairs.append((clip, partner))
    return pairs


def _fixed(store: Store, tasks: Sequence[Task], split: str, mixture: Any) -> list[TestMixture]:
    return [found for task in tasks for found in _fixed_of(task, store, split, mixture)]


def _fixed_of(task: Task, store: Store, split: str, mixture: Any) -> list[TestMixture]:
    found = []
    clips = store.select(classes=list(task.classes), split=split)
    if len(task.classes) > 1:
        pairs = _partners(clips, clips, PARTNERS, _rng(task.index, 0))
        found += [mixture(p, f"task-{task.index}") for p in pairs]
    if task.old:
        old = store.select(classes=list(task.old), split=split)
        found += [mixture(p, "cross") for p in _partners(clips, old, CROSS, _rng(task.index, 1))]
    return found


def _audiovisual(store: Store, tasks: Sequence[Task], split: str, mixture: Any) -> list[TestMixture]:
    """Task after task, so that a mixture keeps its number when tasks are added."""
    found = []
    for task in tasks:
        headline = _fixed_of(task, store, split, mixture)
        clips = store.select(classes=list(task.classes), split=split)
        seen = store.select(classes=list(task.seen), split=split)
        by_id = {c.id: c for c in seen}
        shown = [c for c in clips if store.has_pictures(c)]  # others are not seen to move, nor to stand still
        shown_before = [c for c in seen if store.has_pictures(c)]
        found += headline
        for name in task.classes:
            own = [c for c in shown if c.class_name == name]
            rounds = len(own) if len(own) > 2 else len(own) - 1  # a ring: each clip leads one pair and follows in one
            found += [mixture((own[i], own[(i + 1) % len(own)]), "same-class") for i in range(max(rounds, 0))]

        for number, (name, roles) in enumerate(_ASKED.items(), start=2):
            size = len(roles) or 3
            leads, before = (shown, shown_before) if {"moving", "still"} & {*roles} else (clips, seen)
            pool = leads if len(task.classes) >= size else before  # the task's own, so that no clip is used more
            found += [mixture(g, name, roles=roles) for g in _groups(leads, pool, size, _rng(task.index, number))]
        firsts = {m.clips[0]: m for m in reversed(headline)}  # the first pair that each clip leads
        pairs = [tuple(by_id[c] for c in firsts[clip.id].clips) for clip in clips if clip.id in firsts]
        for name, more in (
            ("quiet", {"gain_db": QUIET_DB}),
            ("reverberant", {"rt60_s": ROOM_RT60_S}),
            ("photo", {"roles": ("photo_source",) * 2}),
            ("unseen", {"roles": ("unseen_source",) * 2}),
        ):
            found += [mixture(p, name, **more) for p in pairs if name != "photo" or all(map(store.has_pictures, p))]
    return found


_ASKED: dict[str, tuple[str, ...]] = {  # list -> roles; the first source is each clip in turn
    "three": (),
    "absent-moving": ("source", "moving"),
    "absent-still": ("source", "still"),
    "absent-unseen": ("source", "unseen"),
    "absent-pair": ("source", "source", "still"),
    "background": ("source", "source", "background"),
}


def _groups(clips: Sequence[Clip], pool: Sequence[Clip], size: int, rng: np.random.Generator) -> list[tuple[Clip, ...]]:
    """For each clip a group of ``size`` of different classes that it leads; the others are used evenly, and no group
    comes twice where there are others. None where there are fewer classes."""
    used = {c.id: 0 for c in pool}
    taken: set[frozenset[str]] = set()
    found = []
    for clip in clips:
        group = [clip]
        while len(group) < size:
            classes, ids = {c.class_name for c in group}, [c.id for c in group]
            open_ = [c for c in pool if c.class_name not in classes]
            if not open_:
                return []
            open_ = [c for c in open_ if frozenset([*ids, c.id]) not in taken] or open_
            least = min(used[c.id] for c in open_)
            fair = [c for c in open_ if used[c.id] == least]
            partner = fair[int(rng.integers(len(fair)))]
            used[partner.id] += 1
            group.append(partner)
        taken.add(frozenset(c.id for c in group))
        found.append(tuple(group))
    return found


def _paper(store: Store, tasks: Sequence[Task], split: str, mixture: Any) -> list[TestMixture]:
    found = []
    for task in tasks:
        clips = [c for name in task.seen for c in store.select(classes=[name], split=split)]  # in class order
        for index, clip in enumerate(clips):
            partner = clips[random.Random(index).randint(0, len(clips) - 1)]
            found.append(mixture((clip, partner), f"paper-{task.index}"))
    return found


@dataclass(frozen=True)
class ProtocolKind:
    """A way to make lists of test mixtures; ``version`` rises whenever the lists, or what is scored of them, change."""

    version: int
    summary: str
    build: Callable[[Store, Sequence[Task], str, Any], list[TestMixture]]


PROTOCOLS = {
    "fixed": ProtocolKind(
        1,
        f"{PARTNERS} partners of other classes of its own task for every clip, and a cross-task list; never redrawn, "
        "so that a later score differs by the model alone",
        _fixed,
    ),
    "paper": ProtocolKind(
        1,
        "as released: one partner among all clips seen so far, redrawn after every task; pairs of a clip with itself "
        "or its own class are reported apart",
        _paper,
    ),
    "audiovisual": ProtocolKind(
        1,
        "the pairs of fixed, and lists of their own for two players of one class, three sources, sources that are "
        "absent or in the background, quiet and reverberant mixtures, and sources without a picture",
        _audiovisual,
    ),
}

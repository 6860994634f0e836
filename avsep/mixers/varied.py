"""A mixer for separators that look: pairs of one class, sources asked for that do not sound, sounds not asked for."""

from __future__ import annotations

import numpy as np

from avsep.errors import ConfigError
from avsep.mixers.base import Draw, Mixer, Pool
from avsep.registry import MIXERS

__all__ = ["Varied"]

_ABSENT = ("moving", "still", "unseen", "photo")
_UNKNOWN = ("unseen_source", "photo_source")


@MIXERS.register("varied", source="this library")
class Varied(Mixer):
    """Mixtures of every kind that a person may ask to separate, in fixed shares.

    A mixture is ``same_class`` times of 1 one in which two sources are of one class, which only their pictures tell
    apart; ``absent`` times one in which a source is asked for and does not sound: its player is seen moving to music
    that is not heard, or at rest, or there is one picture and no motion, or no picture, as often each; and else one of
    different classes. In ``background`` times of 1, whatever the kind, something sounds beside them that nobody asked
    for. Where all classes differ, there is nothing seen of any source but its class, or one picture and no motion, as
    often each, in ``unseen`` times of 1; and in as many of only some of the sources. A mask decoder that needs pictures
    sees them all the same.

    Classes are drawn uniformly from all that are there, then their clips, exemplars like the others; in ``current``
    times of 1 the first class of a mixture is one of the task's own, so that one new class among many old ones is heard
    often enough. A sound without pictures is never one of two of a class, and is asked for as unseen. An epoch has
    ``train.current_repeats`` mixtures a current clip; ``train.memory_repeats``, ``memory_share`` and ``partner`` play
    no part.
    """

    def __init__(
        self,
        *,
        same_class: float = 0.35,
        absent: float = 0.25,
        background: float = 0.15,
        unseen: float = 0.25,
        current: float = 0.0,
    ) -> None:
        for name, value, most in (("background", background, 1), ("unseen", unseen, 0.5), ("current", current, 1)):
            if not 0 <= value <= most:
                raise ValueError(f"{name} must lie between 0 and {most}, got {value}")
        if not (same_class >= 0 and absent >= 0 and same_class + absent <= 1):
            raise ValueError(f"same_class and absent must be shares of 1, got {same_class} and {absent}")
        self.same_class = same_class
        self.absent = absent
        self.background = background
        self.unseen = unseen
        self.current = current

    def begin_epoch(self, pool: Pool, rng: np.random.Generator) -> int:
        self._of_class: dict[str, list[int]] = {}
        for number in range(len(pool)):
            self._of_class.setdefault(pool[number].class_name, []).append(number)
        self._names = sorted(self._of_class)
        self._seen = {
            name: [number for number in members if pool[number].id not in pool.heard]
            for name, members in self._of_class.items()
        }
        self._twice = [name for name in self._names if len(self._seen[name]) > 1]
        self._current = sorted({clip.class_name for clip in pool.clips}) if self.current else []
        sources = pool.train.sources
        if len(self._names) < sources:
            raise ConfigError(
                f"mixer 'varied' mixes {sources} sources of different classes, and task {pool.task} trains on "
                f"{len(self._names)}: give tasks more classes, or use mixer as_published"
            )
        if sources < 2 and self.same_class + self.absent > 0:
            raise ConfigError(f"mixer 'varied' needs train.sources of 2 or more, got {sources}")
        return pool.items

    def draw(self, rng: np.random.Generator, item: int, pool: Pool) -> list[Draw]:
        sources = pool.train.sources
        kind = float(rng.random())
        pair = kind < self.same_class and bool(self._twice)
        absent = self.same_class <= kind < self.same_class + self.absent
        names = [str(name) for name in rng.permutation(self._names)]
        if self._current and rng.random() < self.current:
            name = self._current[int(rng.integers(len(self._current)))]
            names = [name, *(other for other in names if other != name)]
        if pair:
            name = self._twice[int(rng.integers(len(self._twice)))]
            names = [name, name, *(other for other in names if other != name)]
        chosen: list[int] = []
        for name in names[:sources]:
            of_class = self._seen if pair else self._of_class  # two of a class are told apart by what is seen alone
            members = [number for number in of_class[name] or self._of_class[name] if number not in chosen]
            chosen.append(members[int(rng.integers(len(members)))])
        roles = ["source"] * sources
        if absent:
            # sometimes a second player of what does sound: who moves to something else is not heard either
            role = _ABSENT[int(rng.integers(len(_ABSENT)))]
            seen = self._seen[names[0]]
            heard = [number for number in seen if number != chosen[0]] if chosen[0] in seen else []
            if role in ("moving", "still") and heard and rng.random() < 0.3:
                chosen[-1] = heard[int(rng.integers(len(heard)))]
            roles[-1] = role
        elif not pair:
            share = float(rng.random())
            for place in range(sources):
                if share < self.unseen or (share < 2 * self.unseen and rng.random() < 0.5):
                    roles[place] = _UNKNOWN[int(rng.integers(2))]
        order = rng.permutation(sources)
        drawn = [pool.draw(chosen[place], rng)._replace(role=roles[place]) for place in order]
        if rng.random() < self.background:
            others = [name for name in self._names if name not in names[:sources]] or self._names
            members = self._of_class[others[int(rng.integers(len(others)))]]
            free = [number for number in members if number not in chosen] or members
            drawn.append(pool.draw(free[int(rng.integers(len(free)))], rng)._replace(role="background"))
        return drawn

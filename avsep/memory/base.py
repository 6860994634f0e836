"""What a memory policy is, what it chooses from and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from avsep.data.codecs import Codec, PictureCodec
from avsep.data.protocol import centre_start
from avsep.errors import CheckpointError, ConfigError
from avsep.registry import Component
from avsep.runs.folder import RunFolder

if TYPE_CHECKING:
    from avsep.data.store import Clip
    from avsep.spec import FrontEndSpec

__all__ = [
    "KEEPS",
    "Candidates",
    "Exemplar",
    "Keep",
    "Memory",
    "MemoryPolicy",
    "PerClass",
    "Total",
    "Weigh",
    "exemplars_from_plain",
    "exemplars_to_plain",
    "memory_rng",
    "read_exemplars",
]

Keep = Literal["recording", "clip", "id"]
KEEPS = ("recording", "clip", "id")
"""How exemplars are kept.

``recording``: the whole recording, as published; every mixture cuts another crop of it. ``clip``: one crop of the front
end's length, chosen with the exemplar; every mixture takes this one, with the frames of its seconds. ``id``: a
reference into a store that stays at hand; trained with as ``recording``, and no byte of it is counted.
"""


@dataclass(frozen=True)
class Exemplar:
    """A remembered clip. ``start``: the first sample of the kept crop; None: the whole recording."""

    id: str
    start: int | None = None


Memory = dict[str, list[Exemplar]]
"""Exemplars by class name; classes without any are left out."""


def exemplars_to_plain(memory: Mapping[str, Sequence[Exemplar]]) -> dict[str, list[Any]]:
    """Plain data for JSON: the id of a recording, ``{"id": ..., "start": ...}`` of a crop."""
    return {
        name: [e.id if e.start is None else {"id": e.id, "start": e.start} for e in kept]
        for name, kept in memory.items()
    }


def exemplars_from_plain(data: Any, where: str) -> Memory:
    """The inverse of :func:`exemplars_to_plain`. Raises :class:`ConfigError`, naming ``where``, for anything else."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: exemplars are a mapping from classes to lists, not {data!r}")
    return {str(name): [_exemplar(e, where) for e in _listed(name, kept, where)] for name, kept in data.items()}


def read_exemplars(run: str | Path | RunFolder, task: int) -> Memory:
    """The memory after a finished task, by class.

    Raises:
        CheckpointError: the task's record is missing or damaged.
    """
    folder = RunFolder(run).task(task)
    try:
        return exemplars_from_plain(folder.record()["exemplars"], str(folder.record_file))
    except KeyError:
        raise CheckpointError(f"{folder.record_file} names no exemplars: it is damaged; train the task again") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _listed(name: Any, kept: Any, where: str) -> list[Any]:
    if not isinstance(kept, (list, tuple)):
        raise ConfigError(f"{where}: the exemplars of class '{name}' are no list: {kept!r}")
    return list(kept)


def _exemplar(data: Any, where: str) -> Exemplar:
    if isinstance(data, str):
        return Exemplar(data)
    if isinstance(data, Mapping) and set(data) == {"id", "start"} and isinstance(data["id"], str):
        start = data["start"]
        if start is None or (isinstance(start, int) and not isinstance(start, bool) and start >= 0):
            return Exemplar(data["id"], start)
    raise ConfigError(f"{where}: {data!r} is no exemplar: an id, or {{id: ..., start: FIRST SAMPLE}}")


def memory_rng(seed: int, task: int) -> np.random.Generator:
    """The generator that a policy draws from after a task: of the run's seed and the task alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, task, 2**31 + 1])))


class Weigh(Protocol):
    """Says how many bytes an exemplar takes, that of an earlier task too.

    ``codec``: of its sound. ``pictures``: of its frames. ``again``: another crop of the same recording is kept too, and
    what comes once a recording is not to be counted again.
    """

    def __call__(
        self,
        exemplar: Exemplar,
        *,
        keep: Keep,
        codec: Codec = "int16",
        pictures: PictureCodec = "raw",
        again: bool = False,
    ) -> int: ...


class Candidates:
    """The training clips of a finished task, to choose exemplars from.

    Attributes: ``ids``, clip ids by class, in the order of tasks and manifest; ``earlier``, the number of training
    clips of every class of earlier tasks; ``weigh``, which gives the bytes of an exemplar (None where nobody asks).

    This class says nothing of what is in the clips: to :meth:`features`, :meth:`profiles` and :meth:`mask_error` all
    are alike, which is enough to count what a policy will keep before anything is trained. The learner's own,
    :class:`~avsep.memory.candidates.ScoredCandidates`, ask the separator that the task left.
    """

    def __init__(
        self,
        clips: Mapping[str, Sequence[Clip]],
        front_end: FrontEndSpec,
        *,
        earlier: Mapping[str, int] | None = None,
        weigh: Weigh | None = None,
    ) -> None:
        self.clips = {clip.id: clip for members in clips.values() for clip in members}
        self.ids = {name: [clip.id for clip in members] for name, members in clips.items()}
        self.front_end = front_end
        self.earlier = dict(earlier or {})
        self.weigh = weigh

    def features(self, ids: Sequence[str]) -> np.ndarray:
        """float32 [n, D], a row a clip, of length 1: how the separator sees its centre crop."""
        return np.zeros((len(ids), 1), np.float32)

    def profiles(self, ids: Sequence[str]) -> np.ndarray:
        """float64 [n, 64]: the energy of each clip's centre crop in bands of equal width, the largest 1."""
        return np.ones((len(ids), 64))

    def mask_error(self, ids: Sequence[str]) -> np.ndarray:
        """float64 [n]: the separation loss of each clip's centre crop."""
        return np.zeros(len(ids))

    def centre(self, clip_id: str) -> int:
        """First sample of the crop around a clip's middle second, moved inside the clip; 0 where the clip is shorter
        than a crop."""
        clip, length = self.clips[clip_id], self.front_end.clip_samples
        start = centre_start(clip, self.front_end.sample_rate_hz, length)
        return min(max(start, 0), self._room(clip_id))

    def random_start(self, clip_id: str, rng: np.random.Generator) -> int:
        """First sample of a random crop inside a clip; 0 where the clip is shorter than a crop."""
        return int(rng.integers(self._room(clip_id) + 1))

    def _room(self, clip_id: str) -> int:
        return max(self.clips[clip_id].samples - self.front_end.clip_samples, 0)


class MemoryPolicy(Component, ABC):
    """Chooses exemplars. Subclasses override :meth:`update`, and :meth:`check` where a budget can be unfillable.

    Class attributes: ``by_class``, how many exemplars each class has is settled by the sizes of the classes (False:
    chance decides); ``uses_separator``, the choice depends on the trained separator, by way of the clips' centre crops,
    which then are what ``keep="clip"`` keeps (else a random crop); ``by_bytes``, the budget is one of bytes, and each
    exemplar is weighed when it is chosen; ``codec`` and ``pictures``, how the sound and the frames of exemplars are
    kept.
    """

    by_class = True
    uses_separator = False
    by_bytes = False
    codec: Codec = "int16"
    pictures: PictureCodec = "raw"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "judges" in vars(cls):  # its name in 0.1
            cls.uses_separator = bool(vars(cls)["judges"])

    def __init__(self, *, keep: Keep = "recording") -> None:
        if keep not in KEEPS:
            raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
        self.keep = keep

    def check(self, candidates: Mapping[str, int]) -> None:
        """Raise :class:`~avsep.errors.ConfigError` if the budget cannot be filled.

        ``candidates``: training clips per class, of every task but the last. Called before anything is trained.
        """

    @abstractmethod
    def update(
        self, held: Mapping[str, Sequence[Exemplar]], candidates: Candidates, rng: np.random.Generator
    ) -> Memory:
        """The memory after a task: from what is held of earlier tasks and the clips of the finished one.

        Deterministic given ``rng``, of which each task has its own; a policy keeps nothing else between tasks.
        """

    def kept(self, candidates: Candidates, ids: Sequence[str], rng: np.random.Generator) -> list[Exemplar]:
        """Exemplars of chosen clips, kept as ``keep`` says. Call it once the ids are drawn, so that they are the same
        however they are kept."""
        if self.keep != "clip":
            return [Exemplar(i) for i in ids]
        return [
            Exemplar(i, candidates.centre(i) if self.uses_separator else candidates.random_start(i, rng)) for i in ids
        ]


class PerClass(MemoryPolicy):
    """The same number of exemplars for every class, chosen when its task ends and then fixed.

    A class with fewer clips than ``per_class`` is refused, or with ``short_class="all"`` gives all it has (as the
    published code does).
    """

    def __init__(
        self, *, per_class: int = 1, keep: Keep = "recording", short_class: Literal["refuse", "all"] = "refuse"
    ) -> None:
        super().__init__(keep=keep)
        if per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {per_class}; for no memory use the policy 'none'")
        if short_class not in ("refuse", "all"):
            raise ValueError(f"short_class must be 'refuse' or 'all', got {short_class!r}")
        self.per_class = per_class
        self.short_class = short_class

    def check(self, candidates: Mapping[str, int]) -> None:
        for name, count in candidates.items():
            if count < self.per_class and self.short_class == "refuse":
                raise ConfigError(
                    f"memory of {self.per_class} clips per class is larger than class '{name}', which has {count} "
                    f"training clips: lower per_class to {count} or less, or set short_class=all"
                )

    def update(
        self, held: Mapping[str, Sequence[Exemplar]], candidates: Candidates, rng: np.random.Generator
    ) -> Memory:
        chosen = {
            name: self.choose(ids, min(self.per_class, len(ids)), candidates, rng)
            for name, ids in candidates.ids.items()
        }
        return {
            **{name: list(kept) for name, kept in held.items()},
            **{name: self.kept(candidates, ids, rng) for name, ids in chosen.items()},
        }

    @abstractmethod
    def choose(self, ids: Sequence[str], count: int, candidates: Candidates, rng: np.random.Generator) -> list[str]:
        """``count`` of one class's ids."""


class Total(MemoryPolicy):
    """One number of exemplars for all classes together. The default is one a class of the paper's 15 old classes."""

    def __init__(self, *, total: int = 15, keep: Keep = "recording") -> None:
        super().__init__(keep=keep)
        if total < 1:
            raise ValueError(f"total must be at least 1, got {total}; for no memory use the policy 'none'")
        self.total = total

    def check(self, candidates: Mapping[str, int]) -> None:
        if candidates and (clips := sum(candidates.values())) < self.total:
            raise ConfigError(
                f"memory of {self.total} clips is larger than all tasks before the last, which have {clips} training "
                f"clips: lower total to {clips} or less"
            )

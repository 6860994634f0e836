"""What separating a recording takes, whatever separates it: the sources that are asked for, what is seen of each, and
the names of the files that come out."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, UnknownNameError, near_matches
from .timeline import VisualSource, VisualTimeline

__all__ = [
    "PresenceOfChunks",
    "Separated",
    "Source",
    "absent",
    "by_name",
    "check_moves",
    "check_names",
    "check_rescale",
    "check_targets",
    "check_told_apart",
    "fitting_gain",
    "ids_of_classes",
    "listed",
    "mixed_down",
    "nothing_of",
    "output_paths",
    "same_class",
    "sources_of",
    "together",
]

_T = TypeVar("_T")
_TOP = 1 - 2.0**-15  # the largest value that 16 bits hold; 24 bits hold more
_TAKEN = ("mixture", "residual")  # names that results have anyway


class Separated(NamedTuple):
    """What became of a mixture: ``sources`` [N, L] or [N, C, L]; ``presence`` [N], for each the probability that it
    sounds in the mixture at all (:class:`PresenceOfChunks`); None of a separator that does not tell."""

    sources: NDArray[np.float32]
    presence: NDArray[np.float32] | None = None


class PresenceOfChunks:
    """The presence of each source that one chunk in twenty reaches, the largest of up to twenty: who plays for a short
    time only is in a recording too, and one chunk that errs does not count in a long one."""

    def __init__(self) -> None:
        self._chunks: list[NDArray[np.float32]] = []

    @property
    def chunks(self) -> tuple[NDArray[np.float32], ...]:
        """[N] of each chunk so far."""
        return tuple(self._chunks)

    def add(self, presence: NDArray[np.float32] | None) -> None:
        """[b, N] of b chunks, or None where it is not told."""
        if presence is not None:
            self._chunks.extend(presence)

    @property
    def value(self) -> NDArray[np.float32] | None:
        """[N]; None before there is any."""
        if not self._chunks:
            return None
        in_order = np.sort(np.stack(self._chunks), axis=0)
        reached: NDArray[np.float32] = in_order[-1 - (len(in_order) - 1) // 20]
        return reached


def absent(probability: float) -> str:
    """What is said of a source whose presence is below the threshold."""
    return f"probably not in this recording (presence {100 * probability:.0f} %)"


def mixed_down(name: str, channels: int, takes: int) -> str:
    """What is said of a recording whose channels a bundle does not take."""
    kinds = "one channel" if takes == 1 else f"one channel or {takes}"
    return (
        f"{name}: its {channels} channels are mixed to mono, since this bundle takes {kinds}; to keep them, export it "
        f"with --channels {channels}"
    )


class Source(NamedTuple):
    """What is asked for: a sound of the class ``class_name``, whose place among the separator's classes is
    ``class_id``. It goes by ``name``, which is the class's or, where several are of one class, one of its own."""

    name: str
    class_name: str
    class_id: int

    @property
    def is_named(self) -> bool:
        """Whether the name is one of its own."""
        return _nfc(self.name) != _nfc(self.class_name)

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return f"'{self.name}' ({self.class_name})" if self.is_named else f"class '{self.name}'"

    @property
    def text(self) -> str:
        """As :func:`sources_of` reads it."""
        return f"{self.name}={self.class_name}" if self.is_named else self.name


def sources_of(known: Sequence[str], classes: Sequence[str]) -> list[Source]:
    """The sources that ``classes`` ask for: class names, or ``NAME=CLASS`` of sources with names of their own, such as
    ``left=violin`` and ``right=violin``. Names are unique, classes may repeat.

    Args:
        known: the separator's class names.

    Raises:
        UnknownNameError: a class the separator has not learned.
        ConfigError: no class, a name twice or one that results have anyway, or a separator without class names.
    """
    if isinstance(classes, str):
        raise ConfigError(f"classes must be a sequence of names, such as ['{classes}'], not one string")
    if not classes:
        raise ConfigError("no classes given: name the sounding objects, such as --classes flute,piano")
    if not known:
        raise ConfigError("this separator has no class names: build or save it with classes=(...)")
    # an umlaut may be one character or two
    places = {_nfc(name): place for place, name in enumerate(known)}
    sources: list[Source] = []
    unknown: list[str] = []
    for text in classes:
        name = class_name = text
        place = places.get(_nfc(text))  # a class's name may hold a "=" too
        if place is None and "=" in text:
            name, _, class_name = (part.strip() for part in text.partition("="))
            if not name or not class_name:
                raise ConfigError(f"'{text}' is not a name and its class: write it as left=violin")
            place = places.get(_nfc(class_name))
        if place is None:
            unknown.append(class_name)
            continue
        source = Source(name, known[place], place)
        if source.is_named:
            check_names([name])
        for other in sources:
            if _nfc(other.name) != _nfc(name):
                continue
            if source.is_named or other.is_named:
                raise ConfigError(f"two sources are named '{name}' ({other.text}, {text}): give each a name of its own")
            raise ConfigError(
                f"class '{name}' is given twice: name each of the two, such as left={name},right={name}, with boxes or "
                "features of left and of right"
            )
        sources.append(source)
    if unknown:
        raise UnknownNameError(_not_learned(list(dict.fromkeys(unknown)), known))
    return sources


def _not_learned(unknown: Sequence[str], known: Sequence[str]) -> str:
    """What is said of classes that are not known."""
    names = " and ".join(f"'{name}'" for name in unknown)
    hints = [hint for name in unknown if (hint := near_matches(name, known)).startswith("did you mean")]
    said = f"the separator has not learned {'class' if len(unknown) == 1 else 'the classes'} {names}"
    return f"{said}: {' '.join([*hints, listed(known)])}"


def listed(known: Sequence[str], most: int = 300) -> str:
    """``it knows flute, piano``, of about ``most`` characters."""
    shown = [name for at, name in enumerate(known) if len(", ".join(known[: at + 1])) <= most or at == 0]
    more = f" and {len(known) - len(shown)} more" if len(shown) < len(known) else ""
    return f"it knows {', '.join(shown)}{more}"


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def ids_of_classes(known: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The class ids of ``classes``; raises as :func:`sources_of`."""
    return [source.class_id for source in sources_of(known, classes)]


def check_names(names: Iterable[str]) -> None:
    """Raise :class:`ConfigError` of the name of a source that results have anyway."""
    for name in names:
        if name in _TAKEN:
            raise ConfigError(f"a source cannot be named '{name}', as results have one: name it, such as other=CLASS")


def same_class(sources: Sequence[Source]) -> list[list[Source]]:
    """The sources that share their class with another one, a list for each such class."""
    groups: dict[int, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.class_id, []).append(source)
    return [group for group in groups.values() if len(group) > 1]


def together(group: Sequence[Source]) -> str:
    """``left and right are both violin`` in messages."""
    *first, last = (source.name for source in group)
    return f"{', '.join(first)} and {last} are {'both' if len(group) == 2 else 'all'} {group[0].class_name}"


def by_name(given: Mapping[str, _T], sources: Sequence[Source]) -> dict[str, _T]:
    """What is ``given`` of each source, by the source's name: under that name or, where there is none, under its class,
    if that is asked for once and no other source's name. Sources of which nothing is given are left out."""
    keys = {_nfc(key): key for key in given}
    names = {_nfc(source.name) for source in sources}
    count = Counter(source.class_id for source in sources)
    found = {}
    for source in sources:
        key = keys.get(_nfc(source.name))
        of_class = _nfc(source.class_name)
        if key is None and count[source.class_id] == 1 and of_class not in names:
            key = keys.get(of_class)
        if key is not None:
            found[source.name] = given[key]
    return found


def nothing_of(source: Source, given: Iterable[str], what: str = "frames or features") -> str:
    """What is said of a source of which nothing is among the ``given``, which are names."""
    has = sorted(given)
    message = f"there are no {what} of {source.label}: there are those of {', '.join(has) or 'none'}"
    if source.is_named and source.class_name in has:
        message += f", and {source.class_name} does not say of which it is: write {source.name} instead"
    return message


def check_moves(sources: Sequence[Source], looks_at: Sequence[VisualSource]) -> None:
    """Refuse two sources of one class where the separator does not look at movement.

    Raises:
        ConfigError: one line.
    """
    if any(visual.role == "motion" for visual in looks_at):
        return
    for group in same_class(sources):
        looks = "looks at no movement" if looks_at else "looks at nothing"
        raise ConfigError(
            f"{together(group)}, and this separator {looks}, which alone tells two of a class apart: it would give "
            f"the same sound twice; ask for {group[0].class_name} once, or take a separator with a motion encoder"
        )


def check_told_apart(sources: Sequence[Source], shown: Mapping[str, VisualTimeline | Mapping[str, Any]]) -> None:
    """Refuse sources of one class that would be the same sound: no movement is seen of two of them, or the same is
    ``shown`` of both (by the sources' names).

    Raises:
        ConfigError: one line.
    """
    way_out = "give boxes of each in a video (--boxes), or features of each (--features)"
    for group in same_class(sources):
        still = [source for source in group if not _moves(shown.get(source.name))]
        if len(still) > 1:
            raise ConfigError(
                f"{together(still)}, and no movement is seen of them, which alone tells two of a class apart: {way_out}"
            )
        moving = [source for source in group if source not in still]
        for place, source in enumerate(moving):
            for other in moving[:place]:
                if _same(shown[source.name], shown[other.name]):
                    raise ConfigError(
                        f"{together([other, source])}, and both are shown the same, so that they would be the same "
                        f"sound: {way_out}"
                    )


def _moves(shown: VisualTimeline | Mapping[str, Any] | None) -> bool:
    return shown is not None and (not isinstance(shown, VisualTimeline) or shown.moves)


def _same(one: Any, other: Any) -> bool:
    """Whether the same is seen of two sources."""
    if one is other:
        return True
    if isinstance(one, VisualTimeline) and isinstance(other, VisualTimeline):
        arrays = ({"object": t.object, "motion": t.motion, **t.features} for t in (one, other))
        return _same(*arrays)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if callable(one) or callable(other) or one is None or other is None:
        return False
    return bool(np.array_equal(one, other))


def output_paths(audio_path: Path, names: Sequence[str], out_dir: Path, suffix: str = "wav") -> list[Path]:
    """``<stem>_<name>.wav`` for each source's name, then ``<stem>_residual.wav``; or with another suffix."""
    parts: list[str] = []
    for name in (*names, "residual"):
        part = _file_name(name)
        taken = [p.casefold() for p in parts]
        number = 2
        while part.casefold() in taken:  # `a:b` and `a b`
            part, number = f"{_file_name(name)}-{number}", number + 1
        parts.append(part)
    return [out_dir / f"{audio_path.stem}_{part}.{suffix}" for part in parts]


def _file_name(name: str) -> str:
    """A name as a part of a file name: what a file system may refuse becomes ``-``."""
    return re.sub(r'[<>:"/\\|?*\s\x00-\x1f]+', "-", name).strip(".") or "class"


def check_targets(paths: Sequence[Path], targets: Sequence[Sequence[Path]], out: Path, overwrite: bool) -> None:
    """Refuse names that collide with each other, with an input or, unless ``overwrite``, with what is there.

    Args:
        paths: the recordings.
        targets: the files that come of each.
        out: the folder of those files.

    Raises:
        ConfigError: one line with the name.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give a folder for the separated files")
    inputs = {path.resolve() for path in paths}
    seen: set[Path] = set()
    for path, names in zip(paths, targets, strict=True):
        for name in names:
            if name in seen:
                raise ConfigError(
                    f"two results would be named {name.name}: separate files of one name (and a class named "
                    "'residual') into different folders"
                )
            seen.add(name)
            if name.resolve() in inputs:
                raise ConfigError(f"separating {path} would replace the input {name}: choose another folder")
            if name.is_dir():
                raise ConfigError(f"{name} is a folder: choose another output folder")
            if name.exists() and not overwrite:
                raise ConfigError(f"{name} is there already: choose another folder, or --overwrite")


def check_rescale(rescale: bool, subtype: str) -> None:
    """Raise :class:`ConfigError` where rescaling is asked for and nothing can clip."""
    if rescale and subtype == "FLOAT":
        raise ConfigError("FLOAT keeps every sample, so that --rescale does nothing with it: leave it out")


def fitting_gain(signals: Iterable[NDArray[np.float32]]) -> float:
    """The one factor by which all ``signals`` [L] stay within full scale: 1 where they do as they are."""
    peak = max(float(np.abs(signal).max(initial=0)) for signal in signals)
    return _TOP / peak if peak > 1 else 1.0

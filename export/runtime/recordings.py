"""What separating a recording takes, whatever separates it: class names, and the names of the files that come out."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, UnknownNameError, near_matches

__all__ = [
    "LargestPresence",
    "Separated",
    "absent",
    "check_rescale",
    "check_targets",
    "fitting_gain",
    "ids_of_classes",
    "mixed_down",
    "names_in",
    "output_paths",
]

_TOP = 1 - 2.0**-15  # the largest value that 16 bits hold; 24 bits hold more


class Separated(NamedTuple):
    """What became of a mixture: ``sources`` [N, L] or [N, C, L]; ``presence`` [N], for each the probability that it
    sounds in the mixture at all, the largest of any chunk; None of a separator that does not tell."""

    sources: NDArray[np.float32]
    presence: NDArray[np.float32] | None = None


class LargestPresence:
    """The largest presence of each source in any chunk so far: who plays once in a long recording is in it."""

    def __init__(self) -> None:
        self.value: NDArray[np.float32] | None = None

    def add(self, presence: NDArray[np.float32] | None) -> None:
        """[b, N] of b chunks, or None where it is not told."""
        if presence is not None:
            largest = presence.max(axis=0)
            self.value = largest if self.value is None else np.maximum(self.value, largest)


def absent(probability: float) -> str:
    """What is said of a source whose presence is below the threshold."""
    return f"probably not in this recording ({100 * probability:.0f} %)"


def mixed_down(name: str, channels: int, takes: int) -> str:
    """What is said of a recording whose channels a bundle does not take."""
    kinds = "one channel" if takes == 1 else f"one channel or {takes}"
    return (
        f"{name}: its {channels} channels are mixed to mono, since this bundle takes {kinds}; to keep them, export it "
        f"with --channels {channels}"
    )


def names_in(text: str, known: Sequence[str] = ()) -> list[str]:
    """The names of a list with commas. A name that has commas itself stands in double quotes, or is one of the
    ``known`` ones: ``male speech, man speaking,violin`` are two of them.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        (parts,) = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"{text!r} is no list of names with commas: {error}") from None
    words = [part.strip() for part in parts]
    whole = {tuple(part.strip() for part in name.split(",")): name for name in known if "," in name}
    longest = max(map(len, whole), default=1)
    names, at = [], 0
    while at < len(words):
        for count in range(min(longest, len(words) - at), 1, -1):
            if (name := whole.get(tuple(words[at : at + count]))) is not None:
                names.append(name)
                at += count
                break
        else:
            names.append(words[at])
            at += 1
    return [name for name in names if name]


def ids_of_classes(known: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The class ids of ``classes``: their places among the ``known`` names.

    Raises:
        UnknownNameError: a class the separator has not learned.
        ConfigError: no class, a class twice, or a separator without class names.
    """
    if isinstance(classes, str):
        raise ConfigError(f"classes must be a sequence of names, such as ['{classes}'], not one string")
    if not classes:
        raise ConfigError("no classes given: name the sounding objects, such as --classes flute,piano")
    if not known:
        raise ConfigError("this separator has no class names: build or save it with classes=(...)")
    # an umlaut may be one character or two
    places = {unicodedata.normalize("NFC", name): place for place, name in enumerate(known)}
    found = [places.get(unicodedata.normalize("NFC", name)) for name in classes]
    ids = [place for place in found if place is not None]
    if len(ids) < len(classes):
        name = classes[found.index(None)]
        raise UnknownNameError(f"the separator has not learned class '{name}': {near_matches(name, known)}")
    if repeated := sorted(known[i] for i in set(ids) if ids.count(i) > 1):
        raise ConfigError(f"class '{repeated[0]}' is given twice: every class is separated once")
    return ids


def output_paths(audio_path: Path, classes: Sequence[str], out_dir: Path, suffix: str = "wav") -> list[Path]:
    """``<stem>_<class>.wav`` for each class, then ``<stem>_residual.wav``; or with another suffix."""
    parts: list[str] = []
    for name in (*classes, "residual"):
        part = _file_name(name)
        taken = [p.casefold() for p in parts]
        number = 2
        while part.casefold() in taken:  # `a:b` and `a b`
            part, number = f"{_file_name(name)}-{number}", number + 1
        parts.append(part)
    return [out_dir / f"{audio_path.stem}_{part}.{suffix}" for part in parts]


def _file_name(name: str) -> str:
    """A class name as a part of a file name: what a file system may refuse becomes ``-``."""
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

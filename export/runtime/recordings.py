"""What separating a recording takes, whatever separates it: class names, and the names of the files that come out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, UnknownNameError, near_matches

__all__ = ["check_rescale", "check_targets", "fitting_gain", "ids_of_classes", "output_paths"]

_TOP = 1 - 2.0**-15  # the largest value that 16 bits hold; 24 bits hold more


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
    for name in classes:
        if name not in known:
            raise UnknownNameError(f"the separator has not learned class '{name}': {near_matches(name, known)}")
    if repeated := sorted({name for name in classes if list(classes).count(name) > 1}):
        raise ConfigError(f"class '{repeated[0]}' is given twice: every class is separated once")
    return [list(known).index(name) for name in classes]


def output_paths(audio_path: Path, classes: Sequence[str], out_dir: Path, suffix: str = "wav") -> list[Path]:
    """``<stem>_<class>.wav`` for each class, then ``<stem>_residual.wav``; or with another suffix."""
    return [out_dir / f"{audio_path.stem}_{_file_name(name)}.{suffix}" for name in (*classes, "residual")]


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

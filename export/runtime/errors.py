"""Errors a user can act on: one line with the offending value and the way out.

The root of all errors of avsep and the kinds that separating with a bundle raises; :mod:`avsep.errors` adds the others.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AudioError",
    "AvsepError",
    "ConfigError",
    "DataError",
    "ExportError",
    "NumericalError",
    "UnknownNameError",
    "near_matches",
    "one_line",
]


class AvsepError(Exception):
    """Base of every error that is the input's fault, not the library's."""


class ConfigError(AvsepError):
    """A spec, preset or parameter is wrong."""


class UnknownNameError(ConfigError):
    """A name (component, parameter, class, preset) does not exist."""


class DataError(AvsepError):
    """A store, manifest or clip is damaged, missing or does not fit."""


class AudioError(DataError):
    """An audio file cannot be used."""


class ExportError(AvsepError):
    """A graph cannot be exported or run, or does not match the model."""


class NumericalError(AvsepError):
    """Training or a graph gave a NaN or an infinity."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'unet7'?``, or the full list when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + (", ".join(known) if known else "none")


def one_line(message: object, most: int = 400) -> str:
    """A message as one line of at most ``most`` printable characters; those of libraries and files hold anything."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
    return line if len(line) <= most else line[: most - 3] + "..."

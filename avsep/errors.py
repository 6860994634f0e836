"""Errors a user can act on: one line with the offending value and the way out.

The command line prints the message of any :class:`AvsepError` without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AudioError",
    "AvsepError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "LostRankError",
    "MissingExtraError",
    "MissingWeightsError",
    "NumericalError",
    "RunError",
    "UnknownNameError",
    "near_matches",
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


class RunError(AvsepError):
    """A run folder is not one, or is in use."""


class CheckpointError(RunError):
    """A checkpoint is damaged or belongs to another spec."""


class LostRankError(RunError):
    """Another of the processes that train together is gone, or has failed."""


class ExportError(AvsepError):
    """A graph cannot be exported, or does not match the model."""


class NumericalError(AvsepError):
    """Training met a NaN or an infinity and stopped."""


class MissingExtraError(AvsepError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(package, extra, purpose)  # all three, or it could not come back from another process

    def __str__(self) -> str:
        package, extra, purpose = self.args
        return f'{purpose} needs {package}, which is not installed: pip install "avsep[{extra}]"'


class MissingWeightsError(AvsepError):
    """Published weights are neither on this machine nor to be had."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'unet7'?``, or the full list when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + (", ".join(known) if known else "none")

"""Errors a user can act on: one line with the offending value and the way out.

The command line prints the message of any :class:`AvsepError` without a traceback and exits with code 2.
"""

from __future__ import annotations

from avsep.export.runtime.errors import (
    AudioError,
    AvsepError,
    ConfigError,
    DataError,
    ExportError,
    NumericalError,
    UnknownNameError,
    near_matches,
)

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


class RunError(AvsepError):
    """A run folder is not one, or is in use."""


class CheckpointError(RunError):
    """A checkpoint is damaged or belongs to another spec."""


class LostRankError(RunError):
    """Another of the processes that train together is gone, or has failed."""


class MissingExtraError(AvsepError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(package, extra, purpose)  # all three, or it could not come back from another process

    def __str__(self) -> str:
        package, extra, purpose = self.args
        return f'{purpose} needs {package}, which is not installed: pip install "avsep[{extra}]"'


class MissingWeightsError(AvsepError):
    """Published weights are neither on this machine nor to be had."""

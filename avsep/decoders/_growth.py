"""What the decoders share when classes are added."""

from __future__ import annotations

from avsep.errors import ConfigError

__all__ = ["check_growth"]


def check_growth(old: int, new: int, what: str) -> None:
    """Raise where there would be fewer classes than now."""
    if new < old:
        raise ConfigError(f"cannot go from {old} classes to {new}: {what} are only added")

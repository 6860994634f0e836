"""Separating with an exported bundle on the device: NumPy and one inference library, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avsep.export.runtime.separator import Separator, Stream, main

__all__ = ["Separator", "Stream", "main"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from avsep.export.runtime import separator

        return getattr(separator, name)
    raise AttributeError(f"module 'avsep.export.runtime' has no attribute '{name}'")

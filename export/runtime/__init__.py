"""Separating with an exported bundle on the device: NumPy and one inference library, nothing else.

The same files are ``avsep.export.runtime`` of avsep and ``avsep_runtime`` of the wheel that lies in every bundle: all
imports in here are relative, and none leads out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .command import main
    from .reader import Bundle, open_bundle
    from .separator import BundleSeparator, Stream
    from .timeline import VisualTimeline, read_visual_file, write_visual_file
    from .verify import verify_bundle

__version__ = "0.1.0"  # avsep's

# public name -> module that defines it
_PUBLIC = {
    "Bundle": "reader",
    "BundleSeparator": "separator",
    "Stream": "separator",
    "VisualTimeline": "timeline",
    "main": "command",
    "open_bundle": "reader",
    "read_visual_file": "timeline",
    "verify_bundle": "verify",
    "write_visual_file": "timeline",
}

__all__ = [
    "Bundle",
    "BundleSeparator",
    "Stream",
    "VisualTimeline",
    "main",
    "open_bundle",
    "read_visual_file",
    "verify_bundle",
    "write_visual_file",
]


def __getattr__(name: str) -> Any:
    name = {"Separator": "BundleSeparator"}.get(name, name)  # its name in bundles of 0.1
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

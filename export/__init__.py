"""From a trained separator to a verified ONNX bundle.

Light: torch, onnx and onnxruntime are loaded when a function is called that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avsep.export.bundle import Bundle, export_run, export_separator, verify_bundle
    from avsep.export.parity import Parity
    from avsep.export.plan import ExportPlan

# public name -> module that defines it
_PUBLIC = {
    "Bundle": "avsep.export.bundle",
    "ExportPlan": "avsep.export.plan",
    "Parity": "avsep.export.parity",
    "export_run": "avsep.export.bundle",
    "export_separator": "avsep.export.bundle",
    "verify_bundle": "avsep.export.bundle",
}

__all__ = ["Bundle", "ExportPlan", "Parity", "export_run", "export_separator", "verify_bundle"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'avsep.export' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

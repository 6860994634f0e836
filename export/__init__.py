"""From a trained separator to a verified ONNX bundle, and back to sound on any device.

Light: torch, onnx and onnxruntime are loaded when a function is called that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avsep.export.bundle import export, export_run
    from avsep.export.bundle_reader import Bundle, open_bundle
    from avsep.export.parity import Parity
    from avsep.export.plan import ExportPlan
    from avsep.export.verify import Verification, verify_bundle

# public name -> module that defines it
_PUBLIC = {
    "Bundle": "avsep.export.bundle_reader",
    "ExportPlan": "avsep.export.plan",
    "Parity": "avsep.export.parity",
    "Verification": "avsep.export.verify",
    "export": "avsep.export.bundle",
    "export_run": "avsep.export.bundle",
    "open_bundle": "avsep.export.bundle_reader",
    "verify_bundle": "avsep.export.verify",
}

__all__ = ["Bundle", "ExportPlan", "Parity", "Verification", "export", "export_run", "open_bundle", "verify_bundle"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'avsep.export' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

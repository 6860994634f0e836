"""From a trained separator to a verified ONNX bundle, and back to sound on any device.

Light: torch, onnx and onnxruntime are loaded when a function is called that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avsep.export.build.parity import Parity
    from avsep.export.build.plan import ExportPlan
    from avsep.export.bundle.export import export, export_model, export_run
    from avsep.export.bundle.manifest import open_bundle, verify_bundle
    from avsep.export.runtime.reader import Bundle
    from avsep.export.runtime.verify import Verification

# public name -> module that defines it
_PUBLIC = {
    "Bundle": "avsep.export.runtime.reader",
    "ExportPlan": "avsep.export.build.plan",
    "Parity": "avsep.export.build.parity",
    "Verification": "avsep.export.runtime.verify",
    "export": "avsep.export.bundle.export",
    "export_model": "avsep.export.bundle.export",
    "export_run": "avsep.export.bundle.export",
    "open_bundle": "avsep.export.bundle.manifest",
    "verify_bundle": "avsep.export.bundle.manifest",
}

__all__ = [
    "Bundle",
    "ExportPlan",
    "Parity",
    "Verification",
    "export",
    "export_model",
    "export_run",
    "open_bundle",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'avsep.export' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

"""avsep: continual audio-visual sound separation.

``import avsep`` is light: it touches no device and no file, and loads neither torch, triton nor onnxruntime. The names
below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from avsep import _moved

__version__ = "0.1.0"

_moved.install()

if TYPE_CHECKING:
    from avsep.data.store import Store
    from avsep.inference.once import Separation, separate
    from avsep.separator import Separator, build_separator, list_components, load_separator, save_separator
    from avsep.training.learner import ContinualLearner

# public name -> module that defines it
_PUBLIC = {
    "ContinualLearner": "avsep.training.learner",
    "Separation": "avsep.inference.once",
    "Separator": "avsep.separator",
    "Store": "avsep.data.store.files",
    "build_separator": "avsep.separator",
    "list_components": "avsep.separator",
    "load_separator": "avsep.separator",
    "save_separator": "avsep.separator",
    "separate": "avsep.inference.once",
}

__all__ = [
    "ContinualLearner",
    "Separation",
    "Separator",
    "Store",
    "__version__",
    "build_separator",
    "list_components",
    "load_separator",
    "save_separator",
    "separate",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'avsep' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Separators: composed by name from a spec, trained, saved and loaded."""

from avsep.separator.build import build_from_spec, build_separator, list_components
from avsep.separator.module import Separator
from avsep.separator.weights import load_separator, save_separator

__all__ = [
    "Separator",
    "build_from_spec",
    "build_separator",
    "list_components",
    "load_separator",
    "save_separator",
]

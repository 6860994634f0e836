"""The source tree, for tests of what is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import avsep

ROOT = Path(avsep.__file__).resolve().parents[1]

# folders at the top level, and the packages that they are installed as
FOLDERS = {"avsep": "avsep", "kernels": "avsep.kernels", "export": "avsep.export", "benchmarks": "avsep.benchmarks"}


def copy_sources(target: Path) -> Path:
    """What a wheel is built from, for setuptools leaves its own files beside what it builds."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target

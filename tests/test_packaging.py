"""What is installed: every folder of the library."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import avsep

ROOT = Path(avsep.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")

FOLDERS = {"avsep": "avsep", "kernels": "avsep.kernels", "export": "avsep.export", "benchmarks": "avsep.benchmarks"}


def test_every_folder_with_python_files_is_a_package_that_is_installed():
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    installed = set(re.findall(r'"([\w.]+)"', listed[1]))
    found = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py: no wheel would have it"
            found.add(".".join((package, *path.parent.relative_to(ROOT / folder).parts)))
    assert installed == found

"""Imports: light where people start, and from lower floors only."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.source_tree import FOLDERS, ROOT

HEAVY = (
    "torch",
    "triton",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tensorrt",
    "matplotlib",
    "lightning_fabric",
    "torchaudio",
)


@pytest.mark.parametrize(
    "modules",
    [
        "avsep",
        "avsep.errors, avsep.files, avsep.registry, avsep.spec, avsep.types",
        "avsep.cli.app; avsep.cli.app.build_app()",
    ],
)
def test_starting_is_light(modules):
    code = f"import {modules}\nimport sys\nprint(sorted(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_one_command_imports_no_other():
    code = (
        "import sys; from avsep.cli.app import build_app; build_app(['separate', '--help'])\n"
        "print(sorted(m for m in sys.modules if m.startswith('avsep.cli.') and m.endswith('_command')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "['avsep.cli.separate_command']", result.stderr


def test_importing_avsep_touches_no_accelerator():
    # Triton is looked for before the learner is imported: Lightning Fabric imports torch's compiler, and that Triton.
    code = (
        "import avsep, avsep.separator, avsep.kernels, torch, sys\n"
        "loaded = ['triton'] if 'triton' in sys.modules else []\n"
        "import avsep.training.learner\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(loaded + [m for m in ('onnxruntime', 'tensorrt', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="needs the source tree")
def test_every_room_imports_only_from_the_floors_below():
    """The contracts of [tool.importlinter] in pyproject.toml, over every file of the library."""
    pytest.importorskip("importlinter")
    tool = [sys.executable, str(ROOT / "scripts" / "as_installed.py"), "imports"]
    result = subprocess.run(tool, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    files = sum(1 for folder in FOLDERS for _ in (ROOT / folder).rglob("*.py"))
    assert f"Analyzed {files} files" in result.stdout
    assert " kept, 0 broken" in result.stdout


LATER = ("encoders", "decoders", "mixers", "memory", "strategies", "evaluation.scores", "training.learner")


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="needs the source tree")
@pytest.mark.parametrize(
    "module", ["avsep.separator.convert", *(pytest.param(f"avsep.{m}", marks=pytest.mark.slow) for m in LATER)]
)
def test_importing_modules_alone_works(module):
    """No module relies on another having been imported before it."""
    result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr

"""Imports: light where people start, and one way: kernels <- avsep <- export <- cli, benchmarks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import avsep

ROOT = Path(avsep.__file__).resolve().parents[1]
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


def layer(module: str) -> str:
    """kernels, avsep, export, cli or benchmarks."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in {"kernels", "export", "cli", "benchmarks"} else "avsep"


# what the modules of a layer may import; cli and benchmarks stand side by side at the end
ALLOWED = {
    "kernels": {"kernels"},
    "avsep": {"kernels", "avsep"},
    "export": {"kernels", "avsep", "export"},
    "cli": {"kernels", "avsep", "export", "cli", "benchmarks"},
    "benchmarks": {"kernels", "avsep", "export", "benchmarks"},
}
# small modules without imports of their own, open to every layer
OPEN = {"avsep.errors", "avsep.types"}


def sources():
    """(module name, path) of every module of the library."""
    for folder, package in (
        ("avsep", "avsep"),
        ("kernels", "avsep.kernels"),
        ("export", "avsep.export"),
        ("benchmarks", "avsep.benchmarks"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def imported(tree: ast.AST, package: str):
    """Names of the avsep modules that are imported anywhere in the file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="needs the source tree")
def test_imports_go_one_way():
    found = dict(sources())
    assert len(found) > 20
    wrong = []
    for module, path in found.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), package):
            if name.partition(".")[0] != "avsep" or any(name == o or name.startswith(o + ".") for o in OPEN):
                continue
            if module == "avsep.__main__":  # `python -m avsep` starts the command line
                continue
            if layer(name) not in ALLOWED[layer(module)]:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="needs the source tree")
def test_importing_modules_alone_works():
    """No module relies on another having been imported before it."""
    for module in ("avsep.separator.convert", "avsep.encoders", "avsep.decoders"):
        result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{module}: {result.stderr}"

"""Runs mypy or import-linter on avsep as it is installed, with kernels/, export/ and benchmarks/ inside it.

Usage: python scripts/as_installed.py {types,imports} [options of the tool]

Both tools read folders, and do not know that setuptools installs three top-level folders inside avsep. So they get a
copy of the tree that is laid out that way, in a temporary folder; paths in their answers are those of the tree here.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSIDE = ("kernels", "export", "benchmarks")  # as [tool.setuptools] package-dir says


def lay_out(target: Path) -> None:
    """Copy the package and the tools' settings to ``target``; times stay, so that caches hold."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "avsep", target / "avsep", ignore=skip)
    for name in INSIDE:
        shutil.copytree(ROOT / name, target / "avsep" / name, ignore=skip)
    shutil.copy2(ROOT / "pyproject.toml", target)


def types(options: list[str]) -> int:
    """Run mypy on the whole package; its exit code."""
    from mypy import api

    found, errors, code = api.run(["--package", "avsep", "--cache-dir", str(ROOT / ".mypy_cache"), *options])
    print(re.sub(rf"^avsep/({'|'.join(INSIDE)})/", r"\1/", found, flags=re.MULTILINE), end="")
    print(errors, end="", file=sys.stderr)
    return code


def imports(options: list[str]) -> int:
    """Check the contracts of [tool.importlinter]; the linter's exit code."""
    # The finder of an editable install knows avsep too, and would answer with the folder here.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
    from importlinter.cli import lint_imports_command

    result = lint_imports_command.main(["--no-cache", *options], standalone_mode=False)
    return int(result or 0)


def main() -> int:
    """Lay the tree out, and run the tool that is named."""
    tools = {"types": types, "imports": imports}
    if len(sys.argv) < 2 or sys.argv[1] not in tools:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="avsep-") as folder:
        lay_out(Path(folder))
        os.chdir(folder)
        try:
            return tools[sys.argv[1]](sys.argv[2:])
        finally:
            os.chdir(ROOT)  # Windows removes no folder that a process stands in


if __name__ == "__main__":
    sys.exit(main())

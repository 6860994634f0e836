"""Where a result comes from: commit, code, versions, machine."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["code_hash", "commit", "device_name", "version_of"]

# what decides a result; commands, pages, benchmarks, exports and drivers of grids do not
_DECIDES = ("data", "decoders", "encoders", "evaluation", "losses", "memory", "strategies")


def commit() -> str:
    """The commit of the source tree that avsep is in, ``-dirty`` when tracked files differ from it.

    Where there is no such tree, what the variable ``AVSEP_COMMIT`` says, or unknown.
    """
    elsewhere = os.environ.get("AVSEP_COMMIT") or "unknown"
    root = Path(__file__).resolve().parents[1]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:  # installed somewhere inside another repository
            return elsewhere
        return _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return elsewhere


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


@functools.cache
def code_hash() -> str:
    """SHA-256 over the source files that decide what a run gives, as they were when first asked for."""
    package = Path(__file__).resolve().parent
    kernels = package / "kernels" if (package / "kernels").is_dir() else package.parent / "kernels"
    files: Iterable[Path] = [
        *package.glob("*.py"),
        *(p for name in _DECIDES for p in (package / name).rglob("*.py")),
        *kernels.rglob("*.py"),
    ]
    digest = hashlib.sha256()
    for name, path in sorted((str(p.relative_to(package.parent)), p) for p in files):
        digest.update(name.removeprefix("avsep/").encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the platform's own name stands
    return f"{name}, {os.cpu_count()} cores"


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"

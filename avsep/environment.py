"""Where work runs: devices, random seeds, worker processes, and what a result came from (commit, code, versions).

Light, since every command starts with it: what takes time to load is loaded by what needs it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from avsep.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "MOST_PROCESSES",
    "arithmetic",
    "bf16_instructions",
    "code_hash",
    "commit",
    "device_name",
    "die_with_parent",
    "keep_memory",
    "local_world_size",
    "pick_device",
    "python_command",
    "refuse_number",
    "seeded",
    "torch_threads",
    "version_of",
    "world_size",
]

MOST_PROCESSES = 1024
"""Of one kind that a command may start on a machine: more is a slip of the finger."""


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: a device that does not exist here.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    kind = name.partition(":")[0]
    if kind not in there:
        raise ConfigError(f"unknown device '{name}': auto, cpu, cuda or mps")
    if not there[kind]:
        raise ConfigError(f"this machine has no {kind} device that PyTorch can use: --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}': auto, cpu, cuda or mps") from None


def refuse_number(name: str) -> None:
    """Raise :class:`ConfigError` for a device with a number: training chooses by kind."""
    if ":" in name:
        raise ConfigError(f"training takes no number of a device ('{name}'): choose one with CUDA_VISIBLE_DEVICES")


@contextlib.contextmanager
def seeded(seed: int | None, task: int = 0) -> Iterator[None]:
    """The global generators seeded from (seed, task) inside, and as they were outside. None seeds nothing."""
    if seed is None:
        yield
        return
    import numpy as np
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(np.random.SeedSequence([seed, task]).generate_state(1)[0]))
        yield


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch with ``count`` CPU threads inside, and with as many as before outside.

    Sums of several threads depend, in their last bits, on how many there are.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_BF16_SETS = ("amx_bf16", "avx512_bf16", "bf16")  # the one that PyTorch's products take comes first; the last is Arm's


@functools.cache
def bf16_instructions() -> str:
    """The instructions by which this processor multiplies bf16: ``amx_bf16``, ``avx512_bf16`` or ``bf16`` (Arm).

    Empty where it has none, or where that is not known (PyTorch before ``torch.cpu.get_capabilities``, and not Linux).
    """
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        known = {name for name, there in capabilities().items() if there}
    else:
        known = _flags_of_linux()
    return next((name for name in _BF16_SETS if name in known), "")


def _flags_of_linux() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def world_size() -> int:
    """How many processes torchrun has started with this one, on all machines; 1 for an ordinary process."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def python_command(code: str, *arguments: str) -> list[str]:
    """The command of a process of Python that runs ``code`` and looks for modules where this one does.

    Alone, ``-c`` looks in the current folder first, where a person's file may bear a library's name (``queue.py``).
    """
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}", *arguments]


def die_with_parent() -> None:
    """End this worker or rank when the process that started it is killed; it would otherwise wait for ever."""
    import multiprocessing.connection

    parent = multiprocessing.parent_process()

    def watch_worker(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    def watch_rank(starter: int) -> None:
        while os.getppid() == starter:
            time.sleep(1)
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch_worker, args=(parent.sentinel,), daemon=True).start()
    elif world_size() > 1:
        threading.Thread(target=watch_rank, args=(os.getppid(),), daemon=True).start()


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for its next step, where the C library can be told (glibc).

    Every step of a training frees tensors of many megabytes, which glibc gives back to the system one by one, to ask
    for them again, page by page, in the next step. For commands: a program that uses avsep decides for itself.
    """
    import ctypes

    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            mallopt(parameter, value)


# what decides a result; commands, pages, benchmarks, exports and drivers of grids do not
_DECIDES = (
    "adapters",
    "data",
    "decoders",
    "distributed",
    "encoders",
    "evaluation",
    "losses",
    "media",
    "memory",
    "mixers",
    "runs",
    "separator",
    "strategies",
    "training",
)


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
    import hashlib

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
    return f"{_cpu().get('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def arithmetic(device: torch.device) -> str:
    """What decides the last digits of a result beside the software: the GPU, or the processor and the widest
    instructions that PyTorch uses on it."""
    if device.type != "cpu":
        return device_name(device)
    import torch

    found = _cpu()
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = ", ".join(
        f"{key} {found[name]}" for key, name in (("family", "cpu family"), ("model", "model")) if name in found
    )
    return f"{name}{f' ({numbers})' if numbers else ''}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu() -> dict[str, str]:
    """What Linux says of the first processor; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def version_of(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"

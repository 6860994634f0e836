"""Which implementation of an operation runs: an explicit choice, or one table for ``auto``."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

from avsep.errors import ConfigError, near_matches

if TYPE_CHECKING:
    import torch

__all__ = ["BACKENDS", "OPERATIONS", "VARIABLE", "choose_backend", "interpreting"]

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "AVSEP_KERNELS"
OPERATIONS = ("similarity_distillation", "stft_masking", "mask_head")

# Operation -> the size from which "auto" takes Triton on an NVIDIA GPU, None where PyTorch always stays: because
# Triton lost, or because it has not been measured on a GPU. The size is what the operation's cost grows with: rows n
# for similarity_distillation, elements for the others. `benchmarks/gpu_suite.sh` measures what belongs here.
_TRITON_FROM: dict[str, int | None] = {
    "similarity_distillation": None,
    "stft_masking": None,
    "mask_head": None,
}


def interpreting() -> bool:
    """True where Triton runs kernels on the CPU, slowly and for checking: ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# Known when this module is imported, so that code compiled with torch.compile need not look for a package.
_HAS_TRITON = _has_triton()


def choose_backend(requested: str, op: str, size: int, device: torch.device | str, *, obstacle: str = "") -> str:
    """Resolve ``auto``, ``torch`` or ``triton`` to the backend that runs, ``torch`` or ``triton``.

    An explicit argument wins over ``AVSEP_KERNELS``, which wins over the table. What was asked for explicitly is never
    replaced in silence.

    Args:
        requested: the ``backend`` argument of the operation.
        op: the operation's name, such as ``similarity_distillation``.
        size: the problem's size, in the unit of the table above.
        device: of the tensors.
        obstacle: why the operation's kernels cannot take these tensors, as a predicate ("takes fp32, got ..."); empty
            where they can.

    Raises:
        ConfigError: for a name that is no backend, or Triton by name where it cannot run.
    """
    if op not in _TRITON_FROM:
        raise ConfigError(f"no operation named '{op}': {near_matches(op, _TRITON_FROM)}")
    origin = f"backend={requested!r}"
    if requested == "auto" and (value := os.environ.get(VARIABLE, "")):
        requested, origin = value, f"{VARIABLE}={value}"
    if requested not in BACKENDS:
        raise ConfigError(f"{origin} is no backend: {near_matches(str(requested), BACKENDS)}")
    if requested == "auto":
        smallest = _TRITON_FROM[op]
        fast = _device_type(device) == "cuda" and not _why_no_triton(device)
        return "triton" if fast and not obstacle and smallest is not None and size >= smallest else "torch"
    if requested == "triton":
        reason = _why_no_triton(device) or (obstacle and f"{op} in Triton {obstacle}")
        if reason:
            raise ConfigError(f"{origin}: {reason}; or use 'torch'")
    return requested


def _device_type(device: torch.device | str) -> str:
    return device.partition(":")[0] if isinstance(device, str) else device.type


def _why_no_triton(device: torch.device | str) -> str:
    """What keeps Triton from running on tensors of ``device``, with the way out; empty where it runs."""
    if not _HAS_TRITON:
        return "the package triton is not installed: pip install 'avsep[gpu]'"
    kind = _device_type(device)
    if kind != "cuda" and not (kind == "cpu" and interpreting()):
        return (
            f"Triton kernels run on NVIDIA GPUs and the tensors are on {kind}: move them to cuda, or set "
            "TRITON_INTERPRET=1 before Python starts to run them on the CPU for checking (slowly)"
        )
    return ""

"""Which implementation of an operation runs: an explicit choice, or one table for ``auto``."""

from __future__ import annotations

import os

from avsep.errors import ConfigError, near_matches

__all__ = ["BACKENDS", "VARIABLE", "available_backends", "choose_backend"]

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "AVSEP_KERNELS"

# Operation -> the size from which "auto" prefers Triton, None where there is no Triton kernel. The size is what the
# operation's cost grows with: rows n for similarity_distillation, elements for the others.
_TRITON_FROM: dict[str, int | None] = {
    "similarity_distillation": None,
    "stft_masking": None,
    "mask_head": None,
}


def available_backends(op: str) -> tuple[str, ...]:
    """The backends that an operation has, ``torch`` first."""
    _check_op(op)
    return ("torch",) if _TRITON_FROM[op] is None else ("torch", "triton")


def choose_backend(requested: str, op: str, size: int) -> str:
    """Resolve ``auto``, ``torch`` or ``triton`` to the backend that runs, ``torch`` or ``triton``.

    An explicit argument wins over ``AVSEP_KERNELS``, which wins over the table. What was asked for explicitly is never
    replaced in silence.

    Args:
        requested: the ``backend`` argument of the operation.
        op: the operation's name, such as ``similarity_distillation``.
        size: the problem's size, in the unit of the table above.

    Raises:
        ConfigError: for a name that is no backend, or a backend that this operation does not have.
    """
    _check_op(op)
    origin = f"backend={requested!r}"
    if requested == "auto" and (value := os.environ.get(VARIABLE, "")):
        requested, origin = value, f"{VARIABLE}={value}"
    if requested not in BACKENDS:
        raise ConfigError(f"{origin} is no backend: {near_matches(str(requested), BACKENDS)}")
    smallest = _TRITON_FROM[op]
    if requested == "triton" and smallest is None:
        raise ConfigError(f"{origin}: {op} has no Triton kernel in this version: use 'auto' or 'torch'")
    if requested == "auto":
        return "torch" if smallest is None or size < smallest else "triton"
    return requested


def _check_op(op: str) -> None:
    if op not in _TRITON_FROM:
        raise ConfigError(f"no operation named '{op}': {near_matches(op, _TRITON_FROM)}")

"""What the Triton kernels share: launching on the tensors' device, and compiling ahead of time for a named GPU.

Imported by the ``triton_kernel`` modules alone, which are imported when a Triton kernel is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["AotCase", "launch", "next_power_of_2", "torch_to_triton"]


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int, **constants: Any
) -> None:
    """Run a kernel on the device of its first tensor argument.

    Triton launches on the current device, which need not be the tensors'.
    """
    first = next(a for a in arguments if isinstance(a, torch.Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def torch_to_triton(dtype: torch.dtype) -> str:
    """The name that Triton's signatures use: ``torch.float16`` -> ``fp16``."""
    return _TYPES[dtype]


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration that the launchers really use, for compiling without a GPU.

    ``signature`` gives the type of every argument that is not a constant (``*fp32`` a pointer, ``i32``, ``fp32``);
    ``aligned`` names those that the launcher always passes divisible by 16 (pointers of fresh tensors, row lengths), as
    Triton would find out at the launch. ``architectures`` are those for which the launcher chooses it (90 for sm_90),
    all when empty.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    settings: str = ""
    architectures: tuple[int, ...] = ()

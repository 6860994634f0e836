"""Devices by name."""

from __future__ import annotations

import torch

from avsep.errors import ConfigError

__all__ = ["pick_device", "refuse_number"]


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: a device that does not exist here.
    """
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

"""Lightning Fabric, set up for one device or for several processes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning_fabric import Fabric

from avsep.environment import bf16_instructions, local_world_size, pick_device, refuse_number, world_size
from avsep.errors import ConfigError

__all__ = ["BF16_GAINS", "BF16_LEAST", "make_fabric"]

BF16_GAINS: dict[str, float] = {
    "avx512_bf16": 1.86,  # AMD EPYC, family 26, 2 cores, PyTorch 2.13: avsep bench train --form bf16
}
"""Instructions of a processor (:func:`~avsep.environment.bf16_instructions`) -> how many times as many training steps a
second of ``iquery`` ``bf16-mixed`` makes with them as full precision does, measured. ``auto`` takes ``bf16-mixed`` on a
CPU whose instructions stand here, for separators of :data:`BF16_LEAST` parameters and more. ``avsep bench train --form
bf16`` gives the line of another processor.
"""

BF16_LEAST = 10_000_000
"""Parameters from which on ``auto`` trains in ``bf16-mixed`` on a CPU: ``iquery`` has 35.5 million; small separators,
which gain nothing by it, 0.7 to 2 million."""


def make_fabric(accelerator: str, precision: str, parameters: int = 0) -> Fabric:
    """Fabric on one device; in processes that torchrun started, on one a process, with DDP between them.

    Args:
        accelerator: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: Fabric's, or ``auto``: mixed on a GPU, and on a CPU where it was measured to be faster
            (:data:`BF16_GAINS`); full elsewhere.
        parameters: how many the separator has.

    Warns where a CPU is to train in bf16, or in fp16, which is bf16 there, without instructions for it.

    Raises:
        ConfigError: the device is not here, or the processes do not fit the devices.
    """
    if accelerator != "auto":
        pick_device(accelerator)  # refuses one that is not here
        refuse_number(accelerator)
    if world_size() == 1:
        fabric = Fabric(accelerator=accelerator, devices=1, precision=_precision(precision, accelerator, parameters))
    else:
        fabric = _fabric_of_ranks(accelerator, precision, parameters)
    mixed = precision in ("bf16-mixed", "16-mixed")
    if mixed and fabric.device.type == "cpu" and fabric.is_global_zero and not bf16_instructions():
        warnings.warn(
            f"train.precision={precision} will be slow: this processor has no instructions for bf16 that PyTorch knows "
            "of; train.precision=auto trains in full precision here",
            stacklevel=3,
        )
    return fabric


def _precision(precision: str, accelerator: str, parameters: int) -> Any:
    if precision != "auto":
        return precision
    kind = pick_device(accelerator).type  # the one that Fabric takes
    if kind == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    gains = kind == "cpu" and parameters >= BF16_LEAST and bf16_instructions() in BF16_GAINS
    return "bf16-mixed" if gains else "32-true"


def _fabric_of_ranks(accelerator: str, precision: str, parameters: int) -> Fabric:
    import inspect
    import logging

    from lightning_fabric.strategies import DDPStrategy
    from torch.nn.parallel import DistributedDataParallel

    here, kind = local_world_size(), pick_device(accelerator).type
    if kind == "mps":
        if accelerator != "auto":
            raise ConfigError("several processes cannot train on mps: --device cpu")
        kind = "cpu"
    if kind == "cuda" and torch.cuda.device_count() < here:
        raise ConfigError(
            f"{here} processes on this machine and {torch.cuda.device_count()} CUDA device(s): start as many processes "
            "as there are devices, or train on the CPU (--device cpu)"
        )
    if world_size() % here:
        raise ConfigError(f"{world_size()} processes are not spread evenly over the machines ({here} on this one)")
    # Buffers are running statistics, equal on all ranks since batch normalisation is synchronised. PyTorch 2.13 has
    # renamed the switch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it greets with a box of lines
    fabric = Fabric(
        accelerator=kind,
        devices=here,
        num_nodes=world_size() // here,
        precision=_precision(precision, kind, parameters),
        # Which parameters a loss reaches depends on strategy, decoder and batch. The buckets then also keep their
        # order, so that a resume adds up gradients as before.
        strategy=DDPStrategy(find_unused_parameters=True, **options),
    )
    fabric.launch()
    return fabric

"""Random weights that depend on a seed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["seeded"]


@contextlib.contextmanager
def seeded(seed: int | None, task: int = 0) -> Iterator[None]:
    """The global generators seeded from (seed, task) inside, and as they were outside. None seeds nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(np.random.SeedSequence([seed, task]).generate_state(1)[0]))
        yield

"""Golden inputs: what a graph is compared with PyTorch on, here and on the device. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.export.build.plan import TensorSpec

__all__ = ["golden_inputs"]

Array = NDArray[Any]


def golden_inputs(
    specs: Sequence[TensorSpec],
    num_classes: int,
    sample_rate_hz: int,
    seed: int = 0,
    *,
    stft: dict[str, Any] | None = None,
) -> dict[str, Array]:
    """Inputs to compare with: chords of decaying tones in a little noise (other ones in every channel), features from
    N(0, 1), class ids in turn, every second source unseen, frames of random noise.

    Args:
        specs: the graph's inputs.
        stft: ``length``, ``n_fft``, ``hop`` and ``padding`` of a graph that takes the mixture's ``spectrum``.
    """
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in specs:
        if spec.name == "mixture":
            inputs[spec.name] = _chords(spec.shape, sample_rate_hz, rng)
        elif spec.name == "spectrum":
            from avsep.export.runtime.transforms import stft as transform

            assert stft is not None
            mixture = _chords((*spec.shape[:-3], int(stft["length"])), sample_rate_hz, rng)
            inputs[spec.name] = transform(
                mixture, n_fft=int(stft["n_fft"]), hop=int(stft["hop"]), padding=str(stft["padding"])
            )
        elif spec.name == "class_ids":
            size = spec.shape[0] * spec.shape[1]
            inputs[spec.name] = (np.arange(size, dtype=np.int64) % num_classes).reshape(spec.shape)
        elif spec.name in ("seen", "motion_seen"):
            every = 2 if spec.name == "seen" else 4  # so that of those that are seen every second moves
            inputs[spec.name] = (np.arange(int(np.prod(spec.shape))) % every == 0).reshape(spec.shape)
        elif spec.dtype == "bool":
            # each source's last steps are missing, of none, one, two, ... in turn; never all
            steps = spec.shape[-1]
            missing = np.arange(int(np.prod(spec.shape[:-1]))) % steps
            inputs[spec.name] = (np.arange(steps) < (steps - missing)[:, None]).reshape(spec.shape)
        elif spec.dtype == "uint8":
            inputs[spec.name] = rng.integers(0, 256, spec.shape, dtype=np.uint8)
        else:
            inputs[spec.name] = rng.standard_normal(spec.shape).astype(np.float32)
    return inputs


def _chords(shape: tuple[int, ...], sample_rate_hz: int, rng: np.random.Generator) -> Array:
    """[..., L]"""
    length = shape[-1]
    time_s = np.arange(length) / sample_rate_hz
    mixture = 0.002 * rng.standard_normal(shape)
    for row in mixture.reshape(-1, length):
        for _ in range(12):
            start_s, pitch_hz = rng.uniform(0, time_s[-1]), 110 * 2 ** rng.uniform(0, 3)
            age_s = np.maximum(time_s - start_s, 0)
            for harmonic in range(1, 7):
                row += 0.2 / harmonic * np.sin(2 * np.pi * harmonic * pitch_hz * age_s) * np.exp(-2.0 * age_s)
    return (mixture / max(1.0, float(np.abs(mixture).max()))).astype(np.float32)

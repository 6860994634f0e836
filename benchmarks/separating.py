"""Separating a long recording: the library against how other separators cut one up, with the same network.

The ways of others are written after what their public code does: Demucs's ``apply_model`` (chunk by chunk, a quarter of
a chunk apart from full overlap, triangular weights) and the ``demix`` of Music-Source-Separation-Training (several
chunks at a time, every sample covered by ``num_overlap`` of them, linear fades of a tenth of a chunk).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avsep.benchmarks.measure import Case, agree
from avsep.errors import ConfigError
from avsep.export.runtime.chunking import LongStream
from avsep.inference.recordings import encode_chunks, separate_audio
from avsep.separator import Separator, build_separator

__all__ = ["separate_cases"]

_CLASSES = ("a", "b", "c")
_ASKED = _CLASSES[:2]
_DEMUCS_OVERLAP = 0.25
_MSST_OVERLAPS = 4
_MSST_BATCH = 4
_TOLERANCE = 0.03
"""Relative in the L2 norm: chunks that begin elsewhere are separated otherwise, so the ways agree only roughly: to 0.01
as they are; a window that is not divided out makes 0.13."""

Network = Callable[[Tensor, list[int]], Tensor]
"""Chunks [b, L] that begin at these samples to estimates [b, N, L]."""


def separate_cases(
    preset: str = "aligned", *, minutes: float = 10.0, batch: int = 4, device: str = "cpu"
) -> Iterator[Case]:
    """Separating two sources of a recording, as a whole and until its first sample is there.

    Args:
        preset: one that can go unseen, so that the network of audio is all that is compared; untrained.
        minutes: of the recording, noise under moving envelopes.
        batch: chunks that the library separates at a time.
        device: of the network; the recording and its parts stay on the CPU.
    """
    separator = build_separator(preset, classes=_CLASSES, seed=0).eval().to(device)
    if not separator.can_go_unseen:
        raise ConfigError(f"preset '{preset}' cannot separate without pictures: take aligned, or one of its kind")
    spec = separator.spec.front_end
    samples = round(minutes * 60 * spec.sample_rate_hz)
    if samples < 2 * spec.clip_samples:
        raise ConfigError(f"{minutes} minutes are less than two chunks ({2 * spec.clip_s:.1f} s): take more")
    mixture = _recording(samples)
    network = _network(separator, samples)
    whole: dict[str, Callable[[], np.ndarray]] = {
        "as Demucs": lambda: demucs_like(network, torch.from_numpy(mixture), spec.clip_samples).numpy(),
        "as MSST": lambda: msst_like(network, torch.from_numpy(mixture), spec.clip_samples).numpy(),
        "avsep": lambda: separate_audio(separator, mixture, {}, _ASKED, batch=batch),
    }
    settings = f"{preset} (untrained), {minutes:g} minutes at {spec.sample_rate_hz} Hz, 2 sources"

    def check() -> str:
        estimates = {name: function() for name, function in whole.items()}
        mine = estimates.pop("avsep")
        size = np.linalg.norm(mine)
        worst = max(float(np.linalg.norm(other - mine) / size) for other in estimates.values())
        return agree("estimates", worst, _TOLERANCE)

    yield Case(
        name="separate",
        title="a long recording, whole",
        variants=whole,
        check=check,
        item="second of sound",
        items=round(minutes * 60),
        settings=settings,
        device=device,
    )

    def first() -> np.ndarray:
        stream = LongStream(
            lambda chunk, starts: network(torch.from_numpy(chunk), list(starts)).numpy(),
            len(_ASKED),
            clip_samples=spec.clip_samples,
            align_samples=spec.hop,
        )
        for begin in range(0, samples, spec.hop):
            out = stream.push(mixture[begin : begin + spec.hop])
            if out.shape[-1]:
                return out
        raise AssertionError("the stream gave nothing")

    def check_first() -> str:
        found = first()
        expected = separate_audio(separator, mixture[: 2 * spec.clip_samples], {}, _ASKED, batch=1)
        error = np.abs(found - expected[:, : found.shape[-1]]).max() / np.abs(expected).max()
        return agree("first samples", float(error), 1e-4)

    yield Case(
        name="first sound",
        title="computing until the first separated sample can be played",
        variants={"as Demucs, whole": whole["as Demucs"], "avsep, stream": first},
        check=check_first,
        item="recording",
        items=1,
        settings=settings,
        device=device,
    )


def demucs_like(network: Network, mixture: Tensor, segment: int) -> Tensor:
    """[L] -> [N, L]: one chunk after the other, weighed by a triangle."""
    total = mixture.shape[-1]
    half = torch.arange(1, segment // 2 + 1, dtype=torch.float32)
    weight = torch.cat((half, torch.arange(segment - segment // 2, 0, -1, dtype=torch.float32)))
    weight = weight / weight.max()
    summed, weights = torch.zeros(len(_ASKED), total), torch.zeros(total)
    for begin in range(0, total, int((1 - _DEMUCS_OVERLAP) * segment)):
        chunk = mixture[begin : begin + segment]
        count = len(chunk)
        with torch.no_grad():
            estimate = network(F.pad(chunk, (0, segment - count))[None], [begin])[0]
        summed[:, begin : begin + count] += weight[:count] * estimate[:, :count]
        weights[begin : begin + count] += weight[:count]
    return summed / weights


def msst_like(network: Network, mixture: Tensor, segment: int) -> Tensor:
    """[L] -> [N, L]: batches of chunks, a quarter of a chunk apart, with faded ends."""
    step = segment // _MSST_OVERLAPS
    border, fade = segment - step, segment // 10
    padded = F.pad(mixture[None], (border, border), mode="reflect")[0]
    window = torch.ones(segment)
    window[:fade], window[-fade:] = torch.linspace(0, 1, fade), torch.linspace(1, 0, fade)
    summed, weights = torch.zeros(len(_ASKED), len(padded)), torch.zeros(len(padded))
    begins = list(range(0, len(padded), step))
    with torch.inference_mode():
        for first in range(0, len(begins), _MSST_BATCH):
            group = begins[first : first + _MSST_BATCH]
            chunks = torch.stack([F.pad(c, (0, segment - len(c))) for c in (padded[b : b + segment] for b in group)])
            for begin, estimate in zip(group, network(chunks, group), strict=True):
                count = min(segment, len(padded) - begin)
                faded = window.clone()
                if begin == 0:
                    faded[:fade] = 1
                if begin + segment >= len(padded):
                    faded[-fade:] = 1
                summed[:, begin : begin + count] += estimate[:, :count] * faded[:count]
                weights[begin : begin + count] += faded[:count]
    return (summed / weights.clamp_min(1e-8))[:, border : border + len(mixture)]


def _network(separator: Separator, samples: int) -> Network:
    device = next(separator.parameters()).device
    ids = torch.tensor([separator.class_index[name] for name in _ASKED], device=device)

    def run(chunks: Tensor, starts: list[int]) -> Tensor:
        with torch.inference_mode():
            visual = encode_chunks(separator, [None] * len(ids), starts, samples)
            return separator.separate(chunks.to(device), visual, ids.expand(len(starts), -1)).cpu()

    return run


def _recording(samples: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    envelope = 0.55 + 0.45 * np.sin(np.arange(samples) * 2e-4)
    found: np.ndarray = (0.05 * envelope * rng.standard_normal(samples)).astype(np.float32)
    return found

"""Separation of recordings of any length with a network of fixed length: context-padded overlap-add.

The recording is cut into chunks of the network's length that overlap by two contexts. Of each chunk only the middle is
kept: the outer ``context_samples``, where the network sees no neighbourhood, are thrown away, but for half of a short
cross-fade at each seam. NumPy alone, so that a runtime without torch can use it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ConfigError

__all__ = ["Chunk", "default_context", "plan_chunks", "separate_long"]

Audio = NDArray[np.float32]


@dataclass(frozen=True)
class Chunk:
    """One chunk of a plan, in samples of the recording.

    The network reads [``start``, ``start`` + clip). The chunk is the sole source of the output where no cross-fade is;
    ``left`` and ``right`` are the centres of its seams, None at the ends of the recording.
    """

    start: int
    left: int | None
    right: int | None


def default_context(clip_samples: int) -> int:
    """An eighth of the chunk on each side: a third more work than without context."""
    return clip_samples // 8


def plan_chunks(total_samples: int, *, clip_samples: int, context_samples: int, align_samples: int = 1) -> list[Chunk]:
    """Where the chunks of a recording of ``total_samples`` lie.

    Every start is a multiple of ``align_samples`` (give the STFT's hop: then all chunks see the same frame grid). The
    last chunk ends with the recording, or less than ``align_samples`` after it, so that it has a full context too. A
    seam lies in the middle of the overlap of its two chunks, which is at least ``2 * context_samples - align_samples``
    long. A recording no longer than a chunk is one chunk without seams.

    Raises:
        ConfigError: a length is not positive, or the context does not leave at least half of a chunk.
    """
    if clip_samples < 1 or align_samples < 1:
        raise ConfigError(f"clip_samples {clip_samples} and align_samples {align_samples} must be positive")
    if total_samples < 1:
        raise ConfigError(f"a recording of {total_samples} samples cannot be separated: it has none")
    if not 0 <= 4 * context_samples <= clip_samples:
        raise ConfigError(
            f"context_samples {context_samples} must lie between 0 and a quarter of the chunk ({clip_samples // 4})"
        )
    hop = clip_samples - 2 * context_samples
    if align_samples > hop:
        raise ConfigError(f"align_samples {align_samples} is longer than what a chunk adds ({hop} samples)")
    hop -= hop % align_samples  # rounded down: never less context than asked for
    if total_samples <= clip_samples:
        return [Chunk(0, None, None)]
    last = -(-(total_samples - clip_samples) // align_samples) * align_samples
    starts = [*range(0, last, hop), last]
    seams = [(a + clip_samples + b) // 2 for a, b in itertools.pairwise(starts)]
    return [
        Chunk(start, left, right) for start, left, right in zip(starts, [None, *seams], [*seams, None], strict=True)
    ]


def _ramp(samples: int) -> Audio:
    """A rising cosine from just above 0 to just below 1; reversed, it is one minus itself."""
    return (0.5 - 0.5 * np.cos(np.pi * (np.arange(samples) + 0.5) / samples)).astype(np.float32)


def separate_long(
    separate_chunk: Callable[[Audio, Sequence[int]], Audio],
    mixture: Audio,
    *,
    clip_samples: int,
    context_samples: int | None = None,
    crossfade_samples: int | None = None,
    align_samples: int = 1,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Audio:
    """Separate a recording of any length chunk by chunk.

    Weights of neighbouring chunks add up to one at every sample, so a separator that treats every moment alike leaves
    no seam, and sources that add up to the mixture in every chunk do so in the whole. Besides the result, memory holds
    one batch of chunks.

    Args:
        separate_chunk: called with chunks [b, clip_samples] float32 (b <= ``batch``) and their b start samples, which
            is what pictures are looked up by; gives [b, N, clip_samples]. Beyond the recording's end a chunk is zero.
        mixture: [L] float32, L >= 1.
        clip_samples: length of a chunk.
        context_samples: thrown away on each side of a chunk; an eighth of the chunk when None.
        crossfade_samples: length of the cross-fade at a seam, at most ``context_samples``; a sixteenth of the
            context when None.
        align_samples: every chunk starts at a multiple of it.
        batch: most chunks a call.
        progress: called with (chunks done, chunks in all) after each call.

    Returns:
        [N, L] float32.

    Raises:
        ConfigError: lengths that do not fit together.
    """
    if mixture.ndim != 1:
        raise ConfigError(f"separate_long takes a mixture [L], got shape {list(mixture.shape)}")
    if batch < 1:
        raise ConfigError(f"batch {batch} must be at least 1")
    context = default_context(clip_samples) if context_samples is None else context_samples
    fade = max(context, 0) // 16 if crossfade_samples is None else crossfade_samples
    if not 0 <= fade <= max(context, 0):
        raise ConfigError(f"crossfade_samples {fade} must lie between 0 and the context ({context})")
    total = mixture.shape[0]
    chunks = plan_chunks(total, clip_samples=clip_samples, context_samples=context, align_samples=align_samples)
    ramp = _ramp(fade)
    result: Audio | None = None
    for first in range(0, len(chunks), batch):
        group = chunks[first : first + batch]
        block = np.zeros((len(group), clip_samples), dtype=np.float32)
        for row, chunk in zip(block, group, strict=True):
            piece = mixture[chunk.start : chunk.start + clip_samples]
            row[: piece.shape[0]] = piece
        estimates = np.asarray(separate_chunk(block, [chunk.start for chunk in group]), dtype=np.float32)
        if estimates.ndim != 3 or estimates.shape[0] != len(group) or estimates.shape[2] != clip_samples:
            raise ConfigError(
                f"the separator of a chunk gave shape {list(estimates.shape)} instead of "
                f"[{len(group)}, N, {clip_samples}]"
            )
        if result is None:
            result = np.zeros((estimates.shape[1], total), dtype=np.float32)
        for chunk, estimate in zip(group, estimates, strict=True):
            _add(result, estimate, chunk, ramp)
        if progress is not None:
            progress(first + len(group), len(chunks))
    assert result is not None  # a plan has at least one chunk
    return result


def _add(result: Audio, estimate: Audio, chunk: Chunk, ramp: Audio) -> None:
    """Add a chunk's part to ``result`` [N, L]: whole between its cross-fades, faded within them."""
    fade = ramp.shape[0]
    total, clip = result.shape[1], estimate.shape[1]
    begin, end = 0, total
    if chunk.left is not None:
        a = chunk.left - fade // 2
        result[:, a : a + fade] += ramp * estimate[:, a - chunk.start : a - chunk.start + fade]
        begin = a + fade
    if chunk.right is not None:
        b = chunk.right - fade // 2
        result[:, b : b + fade] += ramp[::-1] * estimate[:, b - chunk.start : b - chunk.start + fade]
        end = b
    end = min(end, chunk.start + clip)
    result[:, begin:end] = estimate[:, begin - chunk.start : end - chunk.start]

"""Separation of recordings of any length with a network of fixed length: context-padded overlap-add.

The recording is cut into chunks of the network's length that overlap by two contexts. Of each chunk only the middle is
kept: the outer ``context_samples``, where the network sees no neighbourhood, are thrown away, but for half of a short
cross-fade at each seam. NumPy alone, so that a runtime without torch can use it. A recording that is there as a whole
is separated by :func:`separate_long`, one that still arrives by :class:`LongStream`, into the same samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError

__all__ = [
    "Chunk",
    "LongStream",
    "context_in_samples",
    "default_context",
    "default_crossfade",
    "plan_chunks",
    "separate_long",
]

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


def default_crossfade(context_samples: int) -> int:
    """A sixteenth of the context: 46 ms for chunks of 5.9 s."""
    return max(context_samples, 0) // 16


def context_in_samples(context_s: float | None, *, clip_samples: int, sample_rate_hz: int) -> int:
    """The context of a chunk from seconds; :func:`default_context` when None.

    Raises:
        ConfigError: it is not between 0 and a quarter of the chunk.
    """
    if context_s is None:
        return default_context(clip_samples)
    clip_s = clip_samples / sample_rate_hz
    if not 0 <= context_s <= clip_s / 4:
        raise ConfigError(f"context {context_s} s must lie between 0 and a quarter of a chunk ({clip_s / 4:.2f} s)")
    return int(context_s * sample_rate_hz)


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
    hop = _hop(clip_samples, context_samples, align_samples)
    if total_samples <= clip_samples:
        return [Chunk(0, None, None)]
    last = -(-(total_samples - clip_samples) // align_samples) * align_samples
    starts = [*range(0, last, hop), last]
    seams = [(a + clip_samples + b) // 2 for a, b in itertools.pairwise(starts)]
    return [
        Chunk(start, left, right) for start, left, right in zip(starts, [None, *seams], [*seams, None], strict=True)
    ]


def _hop(clip_samples: int, context_samples: int, align_samples: int) -> int:
    """From one chunk's start to the next, but for the last chunk's."""
    hop = clip_samples - 2 * context_samples
    if align_samples > hop:
        raise ConfigError(f"align_samples {align_samples} is longer than what a chunk adds ({hop} samples)")
    return hop - hop % align_samples  # rounded down: never less context than asked for


def _context_and_fade(clip_samples: int, context_samples: int | None, crossfade_samples: int | None) -> tuple[int, int]:
    context = default_context(clip_samples) if context_samples is None else context_samples
    fade = default_crossfade(context) if crossfade_samples is None else crossfade_samples
    if not 0 <= fade <= max(context, 0):
        raise ConfigError(f"crossfade_samples {fade} must lie between 0 and the context ({context})")
    return context, fade


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
        separate_chunk: called with chunks [b, clip_samples] float32 (b <= ``batch``), or [b, C, clip_samples] of a
            mixture of C channels, and their b start samples, which is what frames are looked up by; gives
            [b, N, clip_samples] or [b, N, C, clip_samples]. Beyond the recording's end a chunk is zero.
        mixture: [L] or [C, L] float32, L >= 1.
        clip_samples: length of a chunk.
        context_samples: thrown away on each side of a chunk; an eighth of the chunk when None.
        crossfade_samples: length of the cross-fade at a seam, at most ``context_samples``; a sixteenth of the
            context when None.
        align_samples: every chunk starts at a multiple of it.
        batch: most chunks a call.
        progress: called with (chunks done, chunks in all) after each call.

    Returns:
        [N, L] or [N, C, L] float32.

    Raises:
        ConfigError: lengths that do not fit together.
    """
    if mixture.ndim not in (1, 2) or 0 in mixture.shape[:-1]:
        raise ConfigError(f"separate_long takes a mixture [L] or [channels, L], got shape {list(mixture.shape)}")
    if batch < 1:
        raise ConfigError(f"batch {batch} must be at least 1")
    context, fade = _context_and_fade(clip_samples, context_samples, crossfade_samples)
    *channels, total = mixture.shape
    chunks = plan_chunks(total, clip_samples=clip_samples, context_samples=context, align_samples=align_samples)
    ramp = _ramp(fade)
    result: Audio | None = None
    for first in range(0, len(chunks), batch):
        group = chunks[first : first + batch]
        block = np.zeros((len(group), *channels, clip_samples), dtype=np.float32)
        for row, chunk in zip(block, group, strict=True):
            piece = mixture[..., chunk.start : chunk.start + clip_samples]
            row[..., : piece.shape[-1]] = piece
        estimates = _separated(separate_chunk, block, [chunk.start for chunk in group])
        if result is None:
            result = np.zeros((estimates.shape[1], *channels, total), dtype=np.float32)
        for chunk, estimate in zip(group, estimates, strict=True):
            _add(result, estimate, chunk, ramp)
        if progress is not None:
            progress(first + len(group), len(chunks))
    assert result is not None  # a plan has at least one chunk
    return result


def _separated(separate_chunk: Callable[[Audio, Sequence[int]], Audio], block: Audio, starts: Sequence[int]) -> Audio:
    """[b, clip] -> [b, N, clip], or [b, C, clip] -> [b, N, C, clip]"""
    estimates = np.asarray(separate_chunk(block, starts), dtype=np.float32)
    if estimates.ndim != block.ndim + 1 or (estimates.shape[0], *estimates.shape[2:]) != block.shape:
        raise ConfigError(
            f"the separator of a chunk gave shape {list(estimates.shape)} instead of "
            f"[{', '.join([str(block.shape[0]), 'N', *map(str, block.shape[1:])])}]"
        )
    return estimates


def _add(result: Audio, estimate: Audio, chunk: Chunk, ramp: Audio) -> None:
    """Add a chunk's part to ``result`` [N, (C,) L]: whole between its cross-fades, faded within them."""
    fade = ramp.shape[0]
    total, clip = result.shape[-1], estimate.shape[-1]
    begin, end = 0, total
    if chunk.left is not None:
        a = chunk.left - fade // 2
        result[..., a : a + fade] += ramp * estimate[..., a - chunk.start : a - chunk.start + fade]
        begin = a + fade
    if chunk.right is not None:
        b = chunk.right - fade // 2
        result[..., b : b + fade] += ramp[::-1] * estimate[..., b - chunk.start : b - chunk.start + fade]
        end = b
    end = min(end, chunk.start + clip)
    result[..., begin:end] = estimate[..., begin - chunk.start : end - chunk.start]


class LongStream:
    """Separate a recording while it arrives, into the very samples that :func:`separate_long` gives of the whole.

    The plan of the chunks ends with the recording, whose length is not known yet. What comes out is what no later
    sample can change: a chunk is separated as soon as it is complete, and of it what lies before the earliest seam that
    it can still get. That costs nothing in the worst case: no sample comes out later than :attr:`latency_samples` after
    it went in (and the time that separating a chunk takes).

    Memory holds one chunk of the mixture, the samples of the next that are there, and one chunk of estimates.

    Args:
        separate_chunk: as :func:`separate_long`'s, called with one chunk at a time.
        sources: N.
        channels: C of a stream of several channels, whose blocks are [C, l]; None of one whose blocks are [l].
        clip_samples, context_samples, crossfade_samples, align_samples: as :func:`separate_long`'s.

    Raises:
        ConfigError: lengths that do not fit together, or no channels.
    """

    def __init__(
        self,
        separate_chunk: Callable[[Audio, Sequence[int]], Audio],
        sources: int,
        *,
        clip_samples: int,
        channels: int | None = None,
        context_samples: int | None = None,
        crossfade_samples: int | None = None,
        align_samples: int = 1,
    ) -> None:
        if channels is not None and channels < 1:
            raise ConfigError(f"channels must be at least 1, got {channels}")
        context, self._fade = _context_and_fade(clip_samples, context_samples, crossfade_samples)
        plan_chunks(clip_samples, clip_samples=clip_samples, context_samples=context, align_samples=align_samples)
        self._separate = separate_chunk
        self._sources = sources
        self._channels = () if channels is None else (channels,)
        self._clip, self._context, self._align = clip_samples, context, align_samples
        self._hop = _hop(clip_samples, context, align_samples)
        self._ramp = _ramp(self._fade)
        # What has arrived from sample `_begin` on lies at the front of `_buffer`; more than a chunk and what the next
        # one adds is never needed.
        self._buffer = np.zeros((*self._channels, clip_samples + self._hop), dtype=np.float32)
        self._begin = 0
        self._received = 0
        self._emitted = 0
        self._start: int | None = None  # of the last chunk that was separated
        self._estimate: Audio = np.zeros((sources, *self._channels, 0), dtype=np.float32)  # [N, (C,) clip], of that
        self._ended = ""  # how, in words

    @property
    def latency_samples(self) -> int:
        """The most samples between a sample's arrival and its being given out: a chunk, at the recording's beginning.

        After the first chunk it is a context less (but for half a cross-fade).
        """
        return self._clip

    @property
    def received_samples(self) -> int:
        return self._received

    @property
    def emitted_samples(self) -> int:
        return self._emitted

    def push(self, block: Audio) -> Audio:
        """Take the next samples [l] or [C, l] float32, of any number, and give what is ready: [N, l'] or [N, C, l'],
        l' >= 0.

        Whatever ``separate_chunk`` raises comes out, and ends the stream: samples of this block are lost then.

        Raises:
            ConfigError: the stream has ended, or the block is of another shape.
        """
        self._go_on()
        if not block.ndim or block.shape[:-1] != self._channels:
            takes = "".join(f"{size}, " for size in self._channels)
            raise ConfigError(f"a stream takes blocks [{takes}l], got shape {list(block.shape)}")
        ready: list[Audio] = []
        self._ended = "has failed"  # unless the end of this call is reached
        while block.shape[-1]:
            # up to the end of the next regular chunk, so that the buffer never holds more
            until = self._clip if self._start is None else self._start + self._hop + self._clip
            piece, block = block[..., : until - self._received], block[..., until - self._received :]
            held = self._received - self._begin
            self._buffer[..., held : held + piece.shape[-1]] = piece
            self._received += piece.shape[-1]
            if self._received == until:
                self._advance(until - self._clip, ready)
            if self._start is not None:
                # The next chunk starts at least so much later as there are samples beyond this one.
                beyond = self._received - self._start - self._clip
                self._emit(self._start + (self._clip + beyond) // 2 - self._fade // 2, ready)
        self._ended = ""
        return self._joined(ready)

    def flush(self) -> Audio:
        """The recording has ended: give the rest, [N, (C,) l']. Nothing can be pushed afterwards."""
        self._go_on()
        self._ended = "was flushed"
        if not self._received:
            return self._joined([])
        ready: list[Audio] = []
        plan = plan_chunks(
            self._received, clip_samples=self._clip, context_samples=self._context, align_samples=self._align
        )
        for chunk in plan[-1:]:
            if self._start is None or chunk.start > self._start:
                self._advance(chunk.start, ready)
        self._emit(self._received, ready)
        return self._joined(ready)

    def _go_on(self) -> None:
        if self._ended:
            raise ConfigError(f"this stream {self._ended}: begin another one")

    def _advance(self, start: int, ready: list[Audio]) -> None:
        """Separate the chunk at ``start``, and give out up to the end of its seam with the one before."""
        offset = start - self._begin
        chunk = np.zeros((1, *self._channels, self._clip), dtype=np.float32)
        held = self._buffer[..., offset : self._received - self._begin]
        chunk[0, ..., : held.shape[-1]] = held
        estimate = _separated(self._separate, chunk, [start])[0]  # [N, (C,) clip]
        if estimate.shape[0] != self._sources:
            raise ConfigError(f"the separator of a chunk gave {estimate.shape[0]} sources instead of {self._sources}")
        if self._start is not None:
            seam = (self._start + self._clip + start) // 2 - self._fade // 2
            self._emit(seam, ready)
            faded = self._ramp[::-1] * self._part(seam, seam + self._fade)
            faded += self._ramp * estimate[..., seam - start : seam - start + self._fade]
            ready.append(faded)
            self._emitted += self._fade
        self._start, self._estimate = start, estimate
        self._buffer[..., : held.shape[-1]] = held.copy()
        self._begin = start

    def _part(self, begin: int, end: int) -> Audio:
        """[N, (C,) end - begin] of the last chunk's estimate, in samples of the recording."""
        assert self._start is not None
        return self._estimate[..., begin - self._start : end - self._start]

    def _emit(self, until: int, ready: list[Audio]) -> None:
        if until > self._emitted:
            ready.append(self._part(self._emitted, until).copy())
            self._emitted = until

    def _joined(self, ready: list[Audio]) -> Audio:
        return np.concatenate([np.zeros((self._sources, *self._channels, 0), dtype=np.float32), *ready], axis=-1)

"""Overlap-add: exact where the separator treats every moment alike, whatever the length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from avsep.errors import ConfigError
from avsep.inference.chunking import LongStream, default_context, plan_chunks, separate_long
from support.nearby import error_db

CLIP, CONTEXT = 400, 64


def identity(chunks, starts):
    return np.stack([0.25 * chunks, 0.75 * chunks], axis=1)


def boundary_lengths():
    hop = CLIP - 2 * CONTEXT
    around = {CLIP, CLIP + hop, CLIP + 2 * hop, 2 * CLIP, CLIP + CONTEXT, 3 * CLIP + 17}
    return sorted({1, 2, CONTEXT, CLIP // 2} | {n + d for n in around for d in (-1, 0, 1)})


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("total", boundary_lengths())
def test_pointwise_separator_is_reproduced_and_sums_to_the_mixture(total, align):
    mixture = np.random.default_rng(total).standard_normal(total).astype(np.float32)
    sources = separate_long(identity, mixture, clip_samples=CLIP, context_samples=CONTEXT, align_samples=align)
    assert sources.shape == (2, total)
    assert sources.dtype == np.float32
    assert error_db(sources[0], 0.25 * mixture) < -120
    assert error_db(sources.sum(axis=0), mixture) < -120


@pytest.mark.parametrize("batch", [1, 3, 50])
@pytest.mark.parametrize("fade", [0, 1, 31, None])
def test_a_filter_shorter_than_the_context_leaves_no_seam(batch, fade):
    """Every chunk's filtering is wrong near its ends; the seams must not show it."""
    rng = np.random.default_rng(0)
    total = 3 * CLIP + 123
    mixture = rng.standard_normal(total).astype(np.float32)
    taps = rng.standard_normal(2 * 45 + 1)  # reaches 45 samples to both sides; 45 + 31/2 < 64

    def filtered(chunks, starts):
        return np.stack([np.convolve(row, taps, mode="same") for row in chunks])[:, None]

    whole = np.convolve(mixture, taps, mode="same")
    assert error_db(filtered(mixture[None, :CLIP], [0])[0, 0], whole[:CLIP]) > -60  # the ends do differ
    got = separate_long(
        filtered, mixture, clip_samples=CLIP, context_samples=CONTEXT, crossfade_samples=fade, batch=batch
    )
    assert error_db(got[0], whole) < -100
    naive = separate_long(filtered, mixture, clip_samples=CLIP, context_samples=0, batch=batch)
    assert error_db(naive[0], whole) > -60  # without context the seams are there: the test can fail


def test_context_is_really_thrown_away():
    """A separator that answers NaN in its outer context, except at the recording's ends, must not be heard."""
    total = 5 * CLIP + 7
    fade = 32
    margin = CONTEXT - fade // 2 - 16  # alignment to 16 may shift a seam by half of it

    def poisoned(chunks, starts):
        out = chunks[:, None].copy()
        for row, start in zip(out, starts, strict=True):
            if start > 0:
                row[:, :margin] = np.nan
            if start + CLIP < total:
                row[:, -margin:] = np.nan
        return out

    mixture = np.random.default_rng(1).standard_normal(total).astype(np.float32)
    got = separate_long(
        poisoned, mixture, clip_samples=CLIP, context_samples=CONTEXT, crossfade_samples=fade, align_samples=16
    )
    np.testing.assert_allclose(got[0], mixture, rtol=1e-6)


@pytest.mark.parametrize("total", boundary_lengths())
def test_plan_covers_the_recording_on_the_frame_grid(total):
    chunks = plan_chunks(total, clip_samples=CLIP, context_samples=CONTEXT, align_samples=16)
    assert chunks[0].start == 0
    assert all(chunk.start % 16 == 0 for chunk in chunks)
    end = chunks[-1].start + CLIP
    assert total <= end < total + 16 or total <= CLIP
    for before, after in itertools.pairwise(chunks):
        assert before.right == after.left
        assert before.start + CLIP - before.right >= CONTEXT - 16  # context beyond the seam, on both sides
        assert after.left - after.start >= CONTEXT - 16


def test_starts_and_batches_as_called():
    calls = []

    def record(chunks, starts):
        calls.append(list(starts))
        assert chunks.shape == (len(starts), CLIP)
        return identity(chunks, starts)

    done = []
    separate_long(
        record,
        np.ones(5 * CLIP, dtype=np.float32),
        clip_samples=CLIP,
        context_samples=100,
        batch=4,
        progress=lambda *at: done.append(at),
    )
    assert calls == [[0, 200, 400, 600], [800, 1000, 1200, 1400], [1600]]
    assert done == [(4, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize(
    ("kwargs", "fragment"),
    [
        ({"context_samples": 101}, "context_samples 101"),
        ({"context_samples": -1}, "context_samples -1"),
        ({"context_samples": 64, "crossfade_samples": 65}, "crossfade_samples 65"),
        ({"batch": 0}, "batch 0"),
        ({"align_samples": 401}, "align_samples 401"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(kwargs, fragment):
    with pytest.raises(ConfigError, match=fragment):
        separate_long(identity, np.ones(1000, dtype=np.float32), clip_samples=CLIP, **kwargs)


def test_empty_recording_and_wrong_shapes_are_refused():
    with pytest.raises(ConfigError, match="0 samples"):
        separate_long(identity, np.ones(0, dtype=np.float32), clip_samples=CLIP)
    with pytest.raises(ConfigError, match="shape"):
        separate_long(identity, np.ones((1, 2, 9), dtype=np.float32), clip_samples=CLIP)
    with pytest.raises(ConfigError, match=r"shape \[0, 9\]"):
        separate_long(identity, np.ones((0, 9), dtype=np.float32), clip_samples=CLIP)
    with pytest.raises(ConfigError, match=r"shape \[1, 2, 400\] instead of \[1, N, 2, 400\]"):
        separate_long(lambda c, s: identity(c, s)[:, :, 0], np.ones((2, 9), dtype=np.float32), clip_samples=CLIP)
    with pytest.raises(ConfigError, match=r"\[1, 2, 399\]"):
        separate_long(lambda c, s: identity(c, s)[..., 1:], np.ones(9, dtype=np.float32), clip_samples=CLIP)


def test_default_context_is_an_eighth():
    assert default_context(65535) == 8191


def wobble(chunks, starts):
    """Two sources that depend on where in the chunk a sample lies and on the chunk: every seam shows."""
    position = np.arange(chunks.shape[-1], dtype=np.float32) / chunks.shape[-1]
    tilt = np.asarray([1 + 0.1 * np.sin(start) for start in starts], dtype=np.float32)
    tilt = tilt.reshape(-1, *[1] * (chunks.ndim - 1))
    return np.stack([chunks * position * tilt, chunks * (1 - position) + tilt], axis=1)


@pytest.mark.parametrize("block", [1, 37, 400, 5000])
@pytest.mark.parametrize(("align", "fade"), [(1, None), (16, 0), (16, 64), (24, 31)])
def test_a_stream_gives_the_samples_of_the_whole(block, align, fade):
    """Bit for bit, in time, whatever the blocks: also where the last chunk lies close behind the one before."""
    options = {"clip_samples": CLIP, "context_samples": CONTEXT, "crossfade_samples": fade, "align_samples": align}
    for total in boundary_lengths() if block != 1 else (3 * CLIP + 17,):
        mixture = np.random.default_rng(total).standard_normal(total).astype(np.float32)
        stream = LongStream(wobble, 2, **options)
        parts, latest = [], 0
        for first in range(0, total, block):
            for sample in range(first, min(first + block, total)):  # what a sample waits for is the end of its block
                latest = max(latest, sample - stream.emitted_samples)
            parts.append(stream.push(mixture[first : first + block]))
        if block == 1:
            assert latest < stream.latency_samples
        assert stream.emitted_samples == sum(p.shape[1] for p in parts) <= total
        parts.append(stream.flush())
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), separate_long(wobble, mixture, **options))


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("block", [37, 5000])
def test_channels_are_separated_as_each_alone(channels, block):
    """Whole or as a stream, bit for bit."""
    options = {"clip_samples": CLIP, "context_samples": CONTEXT, "align_samples": 16}
    for total in (1, CLIP - 1, CLIP + 1, 3 * CLIP + 17):
        mixture = np.random.default_rng(total).standard_normal((channels, total)).astype(np.float32)
        whole = separate_long(wobble, mixture, batch=3, **options)
        assert whole.shape == (2, channels, total)
        for number, channel in enumerate(mixture):
            np.testing.assert_array_equal(whole[:, number], separate_long(wobble, channel, **options))
        stream = LongStream(wobble, 2, channels=channels, **options)
        parts = [stream.push(mixture[:, first : first + block]) for first in range(0, total, block)]
        np.testing.assert_array_equal(np.concatenate([*parts, stream.flush()], axis=-1), whole)


def test_a_stream_of_channels_takes_blocks_of_those_channels():
    stream = LongStream(identity, 2, channels=2, clip_samples=CLIP, context_samples=CONTEXT)
    for wrong in (np.zeros(5, np.float32), np.zeros((1, 5), np.float32), np.zeros((5, 2), np.float32), np.float32(1)):
        with pytest.raises(ConfigError, match=r"blocks \[2, l\], got shape"):
            stream.push(wrong)
    assert stream.push(np.zeros((2, 0), dtype=np.float32)).shape == (2, 2, 0)
    assert stream.flush().shape == (2, 2, 0)
    with pytest.raises(ConfigError, match="channels must be at least 1, got 0"):
        LongStream(identity, 2, channels=0, clip_samples=CLIP)


def test_a_stream_holds_no_more_than_two_chunks_and_gives_out_early():
    stream = LongStream(wobble, 2, clip_samples=CLIP, context_samples=CONTEXT)
    held = stream._buffer
    waiting = []
    for _ in range(3000):
        stream.push(np.ones(7, dtype=np.float32))
        waiting.append(stream.received_samples - stream.emitted_samples)
    assert stream._buffer is held
    assert held.shape[0] <= 2 * CLIP
    assert max(waiting) < CLIP + 7
    assert max(waiting[200:]) <= CLIP - CONTEXT + 7 + 4  # after the first chunk


def test_a_stream_is_used_once_and_takes_blocks():
    stream = LongStream(identity, 2, clip_samples=CLIP, context_samples=CONTEXT)
    with pytest.raises(ConfigError, match=r"blocks \[l\]"):
        stream.push(np.zeros((2, 5), dtype=np.float32))
    assert stream.push(np.zeros(0, dtype=np.float32)).shape == (2, 0)
    assert stream.flush().shape == (2, 0)
    with pytest.raises(ConfigError, match="was flushed"):
        stream.push(np.zeros(5, dtype=np.float32))
    with pytest.raises(ConfigError, match="was flushed"):
        stream.flush()
    with pytest.raises(ConfigError, match="2 sources instead of 3"):
        LongStream(identity, 3, clip_samples=CLIP, context_samples=CONTEXT).push(np.zeros(CLIP, dtype=np.float32))


def test_a_stream_whose_separator_failed_does_not_go_on_in_silence():
    """Of the block that failed some samples are lost: what came after them would stand in their place."""
    calls = []

    def fails_at_the_second(chunks, starts):
        calls.append(starts)
        if len(calls) == 2:
            raise ValueError("no such frame")
        return identity(chunks, starts)

    stream = LongStream(fails_at_the_second, 2, clip_samples=CLIP, context_samples=CONTEXT)
    with pytest.raises(ValueError, match="no such frame"):
        stream.push(np.ones(3 * CLIP, dtype=np.float32))
    for go_on in (lambda: stream.push(np.ones(1, dtype=np.float32)), stream.flush):
        with pytest.raises(ConfigError, match="has failed: begin another one"):
            go_on()
    fine = LongStream(identity, 2, clip_samples=CLIP, context_samples=CONTEXT)
    with pytest.raises(ConfigError, match="blocks"):
        fine.push(np.ones((1, 5), dtype=np.float32))
    assert fine.push(np.ones(2 * CLIP, dtype=np.float32)).shape[1] > CLIP  # refused before anything was taken

"""A causal separator on streams: equal to its pass over the whole, however the stream is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avsep.errors import AudioError, ConfigError, DataError, UnknownNameError
from avsep.inference.recordings import separate_and_tell
from avsep.inference.streaming import StreamingSeparator
from avsep.media.timeline import VisualTimeline
from avsep.separator import build_separator
from support.causal import FRONT_END, causal_separator, features, noise, whole_pass

CLASSES, IDS = ["flute", "violin"], [0, 2]
SAMPLES = 1900  # within one clip, and no whole number of hops


@pytest.fixture(scope="module")
def separator():
    return causal_separator()


@pytest.fixture(scope="module")
def whole(separator):
    return whole_pass(separator, noise(SAMPLES), features(), IDS)


def streamed(stream, mixture, sizes):
    """Push blocks of these sizes, in turn, and flush."""
    made, begin = [], 0
    for size in itertools.cycle(sizes):
        if begin >= mixture.shape[-1]:
            break
        made.append(stream.push(mixture[..., begin : begin + size]))
        begin += size
    return np.concatenate([*made, stream.flush()], axis=-1)


@pytest.mark.parametrize("sizes", [[1], [31], [32], [33, 1], [64], [500], [0, 128, 7], [SAMPLES]])
def test_a_stream_gives_the_samples_of_the_whole_pass(sizes, separator, whole):
    stream = StreamingSeparator(separator, CLASSES, visual=features())
    found = streamed(stream, noise(SAMPLES), sizes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, whole[0], atol=1e-5)
    np.testing.assert_allclose(stream.presence, whole[1], atol=1e-5)
    assert np.abs(whole[0]).max() > 0.1
    assert np.abs(whole[0][0] - whole[0][1]).max() > 0.01


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    samples=st.integers(1, 900),
    front_end=st.sampled_from([{}, {"n_fft": 126}, {"n_fft": 100, "hop": 49}, {"n_fft": 64, "hop": 10}]),
)
def test_any_split_of_any_length_gives_the_whole_pass(sizes, samples, front_end):
    separator = causal_separator(limit_mask_sum=True, **front_end)
    expected, presence = whole_pass(separator, noise(samples), features(), IDS)
    stream = StreamingSeparator(separator, CLASSES, visual=features())
    np.testing.assert_allclose(streamed(stream, noise(samples), sizes), expected, atol=1e-5)
    np.testing.assert_allclose(stream.presence, presence, atol=1e-5)


def test_whole_hops_come_back_as_many_samples_later(separator, whole):
    mixture = noise(SAMPLES)[: 59 * 32]
    expected, _ = whole_pass(separator, mixture, features(), IDS)
    stream = StreamingSeparator(separator, CLASSES, visual=features())
    assert (stream.delay_samples, stream.latency_samples) == (96, 128)
    assert stream.latency_s == 128 / 8000
    blocks = np.split(mixture, np.cumsum([32 * k for k in (1, 1, 3, 1, 10, 2)]))
    made = [stream.process(block) for block in blocks]
    assert [m.shape[-1] for m in made] == [len(b) for b in blocks]
    found = np.concatenate([*made, stream.flush()], axis=-1)
    np.testing.assert_array_equal(found[:, :96], 0)
    np.testing.assert_allclose(found[:, 96:], expected, atol=1e-5)


def test_no_sample_waits_longer_than_the_latency(separator):
    stream = StreamingSeparator(separator, CLASSES, visual=features())
    received = emitted = 0
    for size in [1] * 300:
        received += size
        emitted += stream.push(noise(size)).shape[-1]
        assert received - emitted < stream.latency_samples  # the oldest that is not out yet came so long ago
    assert emitted > 100


def test_channels_share_the_masks_of_their_mean(separator):
    mixture = noise(SAMPLES, 2)
    expected, _ = whole_pass(separator, mixture, features(), IDS)
    stream = StreamingSeparator(separator, CLASSES, visual=features(), channels=2)
    np.testing.assert_allclose(streamed(stream, mixture, [77]), expected, atol=1e-5)


def test_the_future_changes_nothing_in_the_past(separator, whole):
    changed = noise(SAMPLES)
    changed[1000:] = noise(SAMPLES, seed=9)[1000:]
    other, _ = whole_pass(separator, changed, features(), IDS)
    latest = 1000 - 128  # an STFT frame that covers a sample ends at most a window after it
    np.testing.assert_array_equal(other[:, : latest + 1], whole[0][:, : latest + 1])
    assert np.abs(other[:, 1000:] - whole[0][:, 1000:]).max() > 0.01


def test_a_separator_that_looks_ahead_does_change_the_past():
    torch.manual_seed(0)
    other = causal_separator(decoder={"causal": False})
    assert not other.causal
    mixture = noise(SAMPLES)
    before, _ = whole_pass(other, mixture, features(), IDS)
    mixture[1000:] *= -0.5
    after, _ = whole_pass(other, mixture, features(), IDS)
    assert np.abs(after[:, :800] - before[:, :800]).max() > 1e-4


def test_presence_of_a_long_stream_is_that_of_its_clips(separator):
    clip = 64 * 32  # whole frames of a clip
    mixture = noise(3 * clip)
    stream = StreamingSeparator(separator, CLASSES, visual=features())
    assert stream.presence is None
    stream.push(mixture[: clip + 64])
    first = stream.presence
    stream.push(mixture[clip + 64 :])
    stream.flush()
    assert first.shape == stream.presence.shape == (2,)
    assert ((stream.presence > 0) & (stream.presence < 1)).all()


def test_recordings_are_separated_as_one_stream(separator):
    """Without the seams of chunks, whatever their length."""
    mixture = noise(9000)
    rows = np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)
    timelines = {"flute": VisualTimeline(features={"clip": rows})}
    found = separate_and_tell(separator, mixture, timelines, CLASSES)
    stream = StreamingSeparator(separator, CLASSES, timelines)
    np.testing.assert_allclose(found.sources, streamed(stream, mixture, [640]), atol=1e-5)
    np.testing.assert_allclose(found.presence, stream.presence, atol=1e-5)
    assert found.sources.shape == (2, 9000)


def test_pictures_are_looked_at_as_each_clip_begins():
    separator = causal_separator()
    rows = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    mixture = noise(64 * 32 * 2)

    def separated(rows):
        timeline = VisualTimeline(features={"clip": rows}, object_rate_hz=4.0)
        stream = StreamingSeparator(separator, ["flute"], {"flute": timeline})
        return streamed(stream, mixture, [100])[0]

    changed = rows.copy()
    changed[1:] += 1.0  # from 250 ms on; the second clip begins at 256 ms
    one, other = separated(rows), separated(changed)
    np.testing.assert_array_equal(one[: 2048 - 64], other[: 2048 - 64])
    assert np.abs(one[2048 + 64 :] - other[2048 + 64 :]).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("front_end", "audio", "reason"),
    [
        ({"level_db": -20}, {}, "front_end.level_db looks ahead: leave it out"),
        ({"padding": "reflect"}, {}, "front_end.padding=reflect looks ahead: set it to zeros"),
        ({"align_corners": False}, {}, "front_end.align_corners=false looks ahead: set it to true"),
        ({}, {"causal": False}, "audio encoder 'causal_unet' looks ahead"),
    ],
)
def test_what_looks_ahead_is_refused_beside_a_causal_decoder(front_end, audio, reason):
    with pytest.raises(ConfigError, match=f"mask decoder 'aligned_query' is causal, and {reason}"):
        build_separator(
            audio_encoder=("causal_unet", {"base_channels": 2, **audio}),
            object_encoder=("precomputed", {"features": "clip", "dim": 8, "frames": 1}),
            mask_decoder=("aligned_query", {"dim": 8, "causal": True}),
            front_end={**FRONT_END, **front_end},
            num_classes=2,
        )


def test_a_causal_decoder_takes_no_motion():
    with pytest.raises(ConfigError, match="causal takes no motion features"):
        build_separator(
            audio_encoder="causal_unet",
            object_encoder=("frame_cnn", {"frames": 1}),
            motion_encoder="motion_cnn",
            mask_decoder=("aligned_query", {"dim": 8, "causal": True}),
            front_end=FRONT_END,
            num_classes=2,
        )


def test_streams_refuse_what_they_cannot_do(separator):
    with pytest.raises(ConfigError, match="its mask decoder 'aligned_query' is not causal as it is set"):
        StreamingSeparator(causal_separator(decoder={"causal": False}), CLASSES)
    with pytest.raises(UnknownNameError, match="harp"):
        StreamingSeparator(separator, ["harp"])
    with pytest.raises(ConfigError, match="channels must be at least 1"):
        StreamingSeparator(separator, CLASSES, channels=0)
    with pytest.raises(DataError):
        StreamingSeparator(separator, CLASSES, {"flute": VisualTimeline(features={"other": np.zeros((1, 8))})})
    stream = StreamingSeparator(separator, CLASSES, visual=features())
    with pytest.raises(ConfigError, match=r"takes blocks \[samples\], got shape \[2, 64\]"):
        stream.push(noise(64, 2))
    with pytest.raises(AudioError):
        stream.push(np.full(64, np.nan, np.float32))
    with pytest.raises(ConfigError, match="whole hops of 32 samples, got 33"):
        stream.process(noise(33))
    stream.push(noise(200))
    with pytest.raises(ConfigError, match="cannot be mixed"):
        stream.process(noise(32))
    stream.flush()
    with pytest.raises(ConfigError, match="was flushed"):
        stream.push(noise(32))
    training = causal_separator().train()
    with pytest.raises(ConfigError, match=r"separator\.eval\(\)"):
        StreamingSeparator(training, CLASSES, visual=features()).push(noise(32))


def test_an_empty_stream_gives_nothing(separator):
    assert StreamingSeparator(separator, CLASSES, visual=features()).flush().shape == (2, 0)

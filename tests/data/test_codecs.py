"""What codecs keep of sounds and frames, and crops of a store that are heard and seen through them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from avsep.data.codecs import CODECS, PICTURE_CODECS, CodedCrops, decode, decode_frames, encode, encode_frames
from avsep.data.mixing import load_source
from avsep.errors import MissingExtraError
from avsep.memory import ByteBudget
from avsep.spec import FrontEndSpec
from avsep.types import VisualSource
from support.tones import RATE, TINY_FRONT_END, make_tone_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from avsep.data.store import Store

    return Store.open(make_tone_store(tmp_path_factory.mktemp("codecs") / "store"))


def tone(samples):
    time_s = np.arange(samples) / RATE
    partials = sum(np.sin(2 * np.pi * 330 * h * time_s + h) / h for h in (1, 2, 3))
    return (0.2 * partials * (1 + 0.5 * np.sin(6 * time_s))).astype(np.float32)


def snr_db(sound, found):
    return 10 * np.log10(np.square(sound).sum() / np.square(sound - found).sum())


def test_mulaw_by_hand():
    """|x| = (256^n - 1) / 255 lies n of the way to full scale: half-way is 15/255. Byte 0 is -1, 127 is 0, 254 is 1."""
    sound = np.array([-1.0, 16 / 255, -16 / 255, 1.0, 1.5, 0.0])
    level = np.log(17) / np.log(256)  # .5109, which is 64.9 of 127 steps
    assert list(encode(sound, "mulaw", RATE)) == [0, 127 + round(127 * level), 127 - 65, 254, 254, 127]
    level = (191 - 127) / 127
    np.testing.assert_allclose(decode(bytes([254, 191]), "mulaw"), [1.0, (256**level - 1) / 255], rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_silence_stays_silent(codec):
    assert not decode(encode(np.zeros(4000, np.float32), codec, RATE), codec).any()


SIZES = [("int16", (2, 2), 70), ("mulaw", (1, 1), 35), ("vorbis", (0.1, 0.5), 20)]  # bytes a sample, fidelity in dB


@pytest.mark.parametrize(("codec", "size", "least_db"), SIZES)
def test_a_codec_gives_back_what_it_should(codec, size, least_db):
    sound = tone(65535)
    data = encode(sound, codec, RATE)
    found = decode(data, codec)
    assert found.dtype == np.float32
    assert found.shape == sound.shape
    assert size[0] <= len(data) / len(sound) <= size[1]
    assert least_db < snr_db(sound, found) < 110
    again = encode(sound, codec, RATE)
    assert len(again) == len(data)
    np.testing.assert_array_equal(decode(again, codec), found)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("samples", [8191, 30000])  # shorter and longer than the clip
def test_a_crop_is_the_stores_through_the_codec(store, codec, samples):
    clip, start = store.clip("hum-train-1"), 700 if samples < 10000 else 0
    crops = CodedCrops(store, codec, samples)
    plain, found = store.read_crop(clip, start, samples, 0.7), crops.read(clip, start, 0.7)
    assert found.shape == plain.shape
    assert found.dtype == np.float32
    assert found[-1] == 0
    if codec == "int16":
        np.testing.assert_allclose(found, plain, atol=1e-7)
    else:
        assert 15 < snr_db(plain, found) < 60
    assert crops.size(clip, start) == len(
        encode(store.read_audio(clip, start, min(samples, clip.samples)), codec, RATE)
    )
    assert np.abs(crops.read(clip, start, 50.0)).max() == 1


# --- frames -----------------------------------------------------------------------------------------------------------


def frames_of(shape):
    """Smooth frames that move, [n, C, H, W] uint8."""
    count, channels, height, width = shape
    n, c, y, x = np.ogrid[:count, :channels, :height, :width]
    return np.rint(127 + 60 * np.sin((x + 3 * n) / 9 + c) + 60 * np.cos((y - 2 * n) / 7)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(7, 3, 112, 112), (48, 1, 48, 48), (5, 1, 20, 33), (3, 2, 16, 16), (1, 3, 9, 7)])
@pytest.mark.parametrize("codec", PICTURE_CODECS)
def test_frames_come_back_in_their_places(shape, codec):
    frames = frames_of(shape)
    data = encode_frames(frames, codec)
    found = decode_frames(data, codec, frames.shape)
    assert found.dtype == np.uint8
    assert found.shape == frames.shape
    if codec == "jpeg":
        error = np.abs(found.astype(int) - frames).mean(axis=(1, 2, 3))
        assert 0 < error.max() < 3 + 6 * (shape[1] == 3)  # of each frame; colours have half the resolution
        assert encode_frames(frames, codec) == data
    else:
        np.testing.assert_array_equal(found, frames)


def test_what_frames_take_depends_on_them():
    drawn = frames_of((48, 1, 48, 48))
    noise = np.random.default_rng(0).integers(-4, 5, drawn.shape)
    noisy = np.clip(drawn + noise, 0, 255).astype(np.uint8)
    sizes = {c: [len(encode_frames(f, c)) / drawn.size for f in (drawn, noisy)] for c in PICTURE_CODECS}
    assert sizes["raw"] == [1, 1]
    assert sizes["jpeg"][0] < 0.5 < sizes["deflate"][1] < 1
    assert sizes["jpeg"][1] < sizes["deflate"][1]


def test_training_sees_the_frames_of_exemplars_through_the_codec(store):
    clip, front_end = store.clip("hum-train-1"), FrontEndSpec(**TINY_FRONT_END)
    sources = [VisualSource("object", "frames"), VisualSource("motion", "frames")]

    def seen(coded):
        return load_source(store, clip, 300, front_end, sources, 0, coded=coded).visual

    plain, kept = seen(None), seen(CodedCrops(store, "int16", front_end.clip_samples, "deflate"))
    lossy = CodedCrops(store, "int16", front_end.clip_samples, "jpeg")
    assert lossy.loses
    assert not CodedCrops(store, "int16", front_end.clip_samples, "deflate").loses
    found, again = seen(lossy), seen(lossy)
    for role in ("object", "motion"):
        np.testing.assert_array_equal(kept[role], plain[role])
        expected = decode_frames(encode_frames(plain[role], "jpeg"), "jpeg", plain[role].shape)
        assert (expected != plain[role]).any()
        np.testing.assert_array_equal(found[role], expected)
        np.testing.assert_array_equal(again[role], expected)


def test_without_pillow_it_is_told_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    ByteBudget(pictures="deflate").check({})
    with pytest.raises(MissingExtraError, match=r"keeping frames as JPEG needs Pillow.*avsep\[synth\]"):
        ByteBudget(pictures="jpeg").check({})

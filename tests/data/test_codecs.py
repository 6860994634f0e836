"""What codecs keep of a sound, and crops of a store that are heard through them."""

from __future__ import annotations

import numpy as np
import pytest

from avsep.data.codecs import CODECS, CodedCrops, decode, encode
from support.tones import RATE, make_tone_store


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

"""A separator of the whole band beside one at 11 kHz: the numbers that tell them apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from avsep.benchmarks import full_band
from avsep.data.synth.synthesis import find_banks, synthesise
from avsep.media.audio import resample
from avsep.separator import build_separator

RATE = 44100


@pytest.fixture(scope="module")
def sources():
    rng = np.random.default_rng(0)
    return 0.1 * rng.standard_normal((2, RATE)).astype(np.float32)


def test_a_source_that_ends_at_5_khz_is_told_from_the_whole(sources):
    mixture = sources.sum(axis=0)
    low = resample(resample(sources, RATE, 11025), 11025, RATE)[:, :RATE]
    found = full_band.score(sources, low, mixture, RATE)
    whole = full_band.score(sources, 0.99 * sources, mixture, RATE)
    assert (whole["sdr"] > 60).all()
    assert (found["sdr"] < 3).all()  # white noise: a quarter of it is there
    assert (found["sdr_below"] > 15).all()
    np.testing.assert_allclose(found["snr_above"], 0, atol=0.5)  # some of the resampling filter's slope
    np.testing.assert_allclose(whole["snr_above"], 40, atol=1e-3)
    half = full_band.score(sources, np.stack([mixture, mixture]) / 2, mixture, RATE)
    for name in ("sdr", "sdr_below"):
        np.testing.assert_allclose(half[name], 0, atol=1e-3)
    np.testing.assert_allclose(half["snr_above"], 3, atol=0.1)  # two alike and independent: half of each is missing


def test_what_has_nothing_above_is_not_scored_there(sources):
    spectrum = np.fft.rfft(sources[:1])
    spectrum[:, 5000:] = 0  # Hz: the sound is a second long
    low = np.fft.irfft(spectrum, RATE).astype(np.float32)
    both = np.concatenate([low, sources[1:]])
    found = full_band.score(both, both, both.sum(axis=0), RATE)
    assert np.isnan(found["snr_above"]).tolist() == [True, False]


def test_panning_keeps_power_and_sides(sources):
    parts = full_band.panned(sources)
    np.testing.assert_allclose((parts**2).sum(axis=1), sources**2, rtol=1e-5)
    power = (parts**2).sum(axis=2)
    assert power[0, 0] > 5 * power[0, 1]
    assert power[1, 1] > 5 * power[1, 0]


@pytest.mark.parametrize("preset", ["aligned", "iquery"])
def test_presets_of_the_whole_band_are_the_same_network(preset):
    """All of it in iQuery; of `aligned`, whose decoder has weights of the rows of frequency, all that stands before."""
    with torch.device("meta"):
        narrow, wide = (build_separator(name, num_classes=2) for name in (preset, f"{preset}_44k"))
    part = "audio_encoder" if preset == "aligned" else ""
    shapes = [{n: p.shape for n, p in one.named_parameters() if n.startswith(part)} for one in (narrow, wide)]
    assert len(shapes[0]) > 20
    assert shapes[0] == shapes[1]
    fronts = [one.spec.front_end for one in (narrow, wide)]
    assert fronts[0].frames == fronts[1].frames
    assert fronts[1].sample_rate_hz == 4 * fronts[0].sample_rate_hz
    assert fronts[1].n_fft / fronts[1].sample_rate_hz == pytest.approx(
        fronts[0].n_fft / fronts[0].sample_rate_hz, rel=0.01
    )


@pytest.mark.slow
@pytest.mark.skipif(len(find_banks()) == 0, reason="no SoundFont bank on this machine")
@pytest.mark.filterwarnings("ignore:.*is the only SoundFont bank")
def test_it_trains_both_and_compares(tmp_path):
    def make(out, **settings):
        few = {"classes": ("drum", "flute"), "clips_per_class": (4, 2, 2), "clip_s": 4.0, "workers": 1}
        return synthesise(out, progress=False, **{**settings, **few})

    settings = ("train.epochs=1", "train.steps_per_epoch=2", "train.validate_every=1", "train.validation_pairs=2")
    full_band.main([str(tmp_path), *(word for text in settings for word in ("--set", text))], make)
    found = json.loads((tmp_path / "full_band.json").read_text())
    assert set(found["rows"]) == {f"{p}, {k}" for p in full_band.PRESETS for k in ("mono", "stereo")}
    for row in found["rows"].values():
        assert row["sdr"]["low"] <= row["sdr"]["mean"] <= row["sdr"]["high"]
        assert row["real_time_factor"] > 0

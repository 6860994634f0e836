"""BSS-eval and SI-SDR against mir_eval, against dense least squares, and on signals with known scores."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from avsep.errors import DataError, NumericalError
from avsep.evaluation import bss
from avsep.evaluation.bss import bss_eval, mixture_baseline, sdr_alone, sdr_improvement, si_sdr

RATE = 11025


def mir(references: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """[3, N]: mir_eval's SDR, SIR, SAR of references and estimates [N, L]."""
    separation = pytest.importorskip("mir_eval.separation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return np.stack(separation.bss_eval_sources(references, estimates, compute_permutation=False)[:3])


def dense(references: np.ndarray, estimates: np.ndarray, taps: int) -> np.ndarray:
    """[3, N] by projection on an orthonormal basis of all delays: the definition, written out."""
    length = references.shape[1] + taps - 1

    def basis(signals: np.ndarray) -> np.ndarray:
        delays = np.zeros((length, len(signals) * taps))
        for n, signal in enumerate(signals):
            for k in range(taps):
                delays[k : k + len(signal), n * taps + k] = signal
        left, values, _ = np.linalg.svd(delays, full_matrices=False)
        return left[:, values > values[0] * 1e-12]

    everything = basis(references)
    scores = []
    for j, estimate in enumerate(estimates):
        signal = np.pad(estimate, (0, taps - 1))
        mine = basis(references[j : j + 1])
        target, spanned = mine @ (mine.T @ signal), everything @ (everything.T @ signal)

        def db(above: np.ndarray, below: np.ndarray) -> float:
            return 10 * np.log10((above @ above) / (below @ below))

        scores.append([db(target, signal - target), db(target, spanned - target), db(spanned, signal - spanned)])
    return np.array(scores).T


def ours(references: np.ndarray, estimates: np.ndarray, taps: int = 512) -> tuple[np.ndarray, bss.BssResult]:
    result = bss_eval(torch.from_numpy(references)[None], torch.from_numpy(estimates)[None], taps)
    return torch.stack([result.sdr[0], result.sir[0], result.sar[0]]).numpy(), result


def chords(rng: np.random.Generator, sources: int, length: int, floor: float = 1e-4) -> np.ndarray:
    time_s = np.arange(length) / RATE
    notes = [
        sum(np.sin(2 * np.pi * pitch * h * time_s + rng.uniform(0, 6)) / h for h in range(1, 6))
        for pitch in rng.uniform(110, 880, sources)
    ]
    return np.stack(notes) * 0.1 * np.exp(-((time_s * 2) % 1) * 3) + floor * rng.standard_normal((sources, length))


def leaky(rng: np.random.Generator, references: np.ndarray, leak: float = 0.3, noise: float = 0.01) -> np.ndarray:
    scale = np.abs(references).max()
    return references + leak * np.roll(references, 1, axis=0) + noise * scale * rng.standard_normal(references.shape)


@pytest.mark.parametrize("sources", [1, 2, 3])
@pytest.mark.parametrize("kind", ["noise", "chords", "silent_tail", "quantised"])
def test_equals_mir_eval(kind, sources):
    rng = np.random.default_rng(sources)
    length = 6000
    references = rng.standard_normal((sources, length)) if kind == "noise" else chords(rng, sources, length)
    if kind == "silent_tail":
        references[:, 3500:] = 0
    if kind == "quantised":
        references = np.round(references * 3000) / 32768
    estimates = leaky(rng, references) if sources > 1 else references + 0.05 * rng.standard_normal(references.shape)
    found, result = ours(references, estimates)
    assert result.status == ("ok",)
    expected = np.clip(mir(references, estimates), -100, 100)  # with one source SIR is infinite
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_equals_mir_eval_at_the_published_length_with_many_threads():
    """65,280 samples, batched; several threads, where LU solvers of some CPUs go wrong in silence."""
    rng = np.random.default_rng(0)
    references = np.stack([chords(rng, 2, 65280) for _ in range(2)])
    estimates = np.stack([leaky(rng, r) for r in references])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        result = bss_eval(torch.from_numpy(references), torch.from_numpy(estimates))
    finally:
        torch.set_num_threads(threads)
    for b in range(2):
        found = torch.stack([result.sdr[b], result.sir[b], result.sar[b]]).numpy()
        np.testing.assert_allclose(found, mir(references[b], estimates[b]), atol=1e-8)


@pytest.mark.parametrize("length", [200, 700, 1500])
def test_short_audio_equals_dense_least_squares(length):
    rng = np.random.default_rng(length)
    references = rng.standard_normal((2, length))
    estimates = leaky(rng, references)
    found, _ = ours(references, estimates, taps=64)
    np.testing.assert_allclose(found, dense(references, estimates, 64), atol=1e-9)


def test_pure_tones_equal_dense_least_squares():
    """Tones and a constant: the Gram matrix is all but singular, and mir_eval's own solver is at its limit."""
    rng = np.random.default_rng(5)
    time_s = np.arange(3000) / RATE
    references = np.stack([np.sin(2 * np.pi * 440 * time_s), np.sin(2 * np.pi * 523.25 * time_s + 1), np.ones(3000)])
    estimates = leaky(rng, references)
    found, _ = ours(references, estimates, taps=128)
    np.testing.assert_allclose(found, dense(references, estimates, 128), atol=1e-6)


def test_near_duplicates_are_scored_and_equal_mir_eval():
    rng = np.random.default_rng(6)
    first = rng.standard_normal(4000)
    references = np.stack([first, first + 5e-3 * rng.standard_normal(4000)])
    estimates = leaky(rng, references)
    found, result = ours(references, estimates)
    assert result.status == ("ok",)
    np.testing.assert_allclose(found, mir(references, estimates), atol=1e-6)


def test_band_limited_references_get_a_stated_jitter_and_stay_near_the_exact_projection():
    rng = np.random.default_rng(7)
    spectrum = np.fft.rfft(rng.standard_normal((2, 3000)))
    spectrum[:, 300:] = 0
    references = np.fft.irfft(spectrum, n=3000)
    estimates = leaky(rng, references)
    found, result = ours(references, estimates, taps=128)
    assert result.jitter[0] > 0
    expected = dense(references, estimates, 128)
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-2)
    np.testing.assert_allclose(found[2], expected[2], atol=0.1)


def test_a_blocked_factor_is_the_factor():
    rng = np.random.default_rng(8)
    matrix = torch.from_numpy(rng.standard_normal((300, 300)))
    matrix = matrix @ matrix.T + torch.eye(300)
    factor = matrix.clone()
    assert bss._cholesky_in_place(factor)
    torch.testing.assert_close(factor.triu(), torch.linalg.cholesky(matrix).T)
    matrix[250, 250] = -1
    assert not bss._cholesky_in_place(matrix)


def test_orthogonal_noise_gives_the_energy_ratio():
    rng = np.random.default_rng(9)
    reference = torch.from_numpy(rng.standard_normal((1, 1, 20000)))
    noise = torch.from_numpy(rng.standard_normal((1, 1, 20000)))
    noise -= (noise * reference).sum() / reference.square().sum() * reference
    noise *= reference.norm() / noise.norm() * 10 ** (-20 / 20)
    assert si_sdr(reference, reference + noise).item() == pytest.approx(20, abs=1e-9)
    assert si_sdr(reference, -3 * (reference + noise)).item() == pytest.approx(20, abs=1e-9)
    # one tap: the filter is a gain, so SDR is SI-SDR
    assert bss_eval(reference, reference + noise, 1).sdr.item() == pytest.approx(20, abs=1e-9)
    # 512 taps fit some of the noise
    assert 20 < bss_eval(reference, reference + noise).sdr.item() < 20.5


def test_scores_ignore_scale_and_delay_within_the_filter():
    rng = np.random.default_rng(10)
    references = chords(rng, 2, 5000)
    references[:, 4900:] = 0
    estimates = leaky(rng, references)
    estimates[:, 4900:] = 0
    plain, _ = ours(references, estimates, 64)
    scaled, _ = ours(references * 1e-3, estimates * 7, 64)
    np.testing.assert_allclose(scaled, plain, atol=1e-8)
    filtered, _ = ours(references, 0.5 * np.roll(references, 5, axis=1) - 0.2 * references, 64)
    assert (filtered == 100).all()


def test_a_perfect_estimate_is_clipped_at_100_db():
    references = torch.from_numpy(np.random.default_rng(11).standard_normal((1, 2, 3000)))
    result = bss_eval(references, references)
    for scores in (result.sdr, result.sir, result.sar, si_sdr(references, references)):
        assert scores.tolist() == [[100.0, 100.0]]
    assert bss_eval(references, references.flip(1)).sir.max() < 10


def test_silent_signals_are_nan_for_their_own_source_only():
    rng = np.random.default_rng(12)
    references = torch.from_numpy(rng.standard_normal((3, 2, 2000)))
    estimates = references + 0.1 * torch.from_numpy(rng.standard_normal((3, 2, 2000)))
    references[1, 0] *= 1e-9  # silent by the sum of its samples, though not zero
    estimates[2, 1] = 1e-10
    result = bss_eval(references, estimates, 32)
    assert result.status == ("ok", "silent", "silent")
    assert result.silent.tolist() == [[False, False], [True, False], [False, True]]
    for scores in (result.sdr, result.sir, result.sar, si_sdr(references, estimates)):
        assert torch.isnan(scores).tolist() == result.silent.tolist()
    # a silent reference spans nothing, so the other source is scored as if alone
    alone = bss_eval(references[1:2, 1:], estimates[1:2, 1:], 32)
    assert result.sdr[1, 1].item() == pytest.approx(alone.sdr.item(), abs=1e-9)


@pytest.mark.parametrize("copy", ["same", "scaled", "delayed"])
def test_duplicate_references_are_flagged_and_named(copy):
    rng = np.random.default_rng(13)
    references = torch.from_numpy(rng.standard_normal((2, 3, 3000)))
    references[:, :, 2900:] = 0
    twin = {"same": references[1, 0], "scaled": -0.5 * references[1, 0], "delayed": references[1, 0].roll(40)}[copy]
    references[1, 2] = twin
    estimates = references + 0.1 * torch.from_numpy(rng.standard_normal((2, 3, 3000)))
    result = bss_eval(references, estimates, 64)
    assert result.duplicates == ((1, 0, 2),)
    assert result.status == ("ok", "degenerate")
    assert torch.isnan(result.sir[1]).all()
    assert torch.isnan(result.sar[1]).all()
    assert torch.isfinite(result.sir[0]).all()
    # SDR compares no references: it stays what each source gives alone
    alone = bss_eval(references[1:2, 2:], estimates[1:2, 2:], 64).sdr.item()
    assert result.sdr[1, 2].item() == pytest.approx(alone, abs=1e-6)
    with pytest.raises(DataError, match="mixture 1: references 0 and 2"):
        bss_eval(references, estimates, 64, duplicates="raise")


def test_duplicates_are_numbered_across_chunks(monkeypatch):
    monkeypatch.setattr(bss, "_MEMORY_BYTES", 1)
    rng = np.random.default_rng(14)
    references = torch.from_numpy(rng.standard_normal((5, 2, 600)))
    references[3, 1] = references[3, 0]
    estimates = references + 0.1
    result = bss_eval(references, estimates, 16, mixture=references.sum(1))
    assert result.duplicates == ((3, 0, 1),)
    whole = [bss_eval(references[b : b + 1], estimates[b : b + 1], 16).sdr[0] for b in range(5)]
    torch.testing.assert_close(result.sdr, torch.stack(whole))


def test_mixture_baseline_and_improvement():
    rng = np.random.default_rng(15)
    references = chords(rng, 2, 4000)
    estimates = leaky(rng, references)
    mixture = references.sum(0)
    expected = mir(references, np.stack([mixture, mixture]))[0]
    torched = torch.from_numpy(references)[None], torch.from_numpy(estimates)[None]
    np.testing.assert_allclose(mixture_baseline(torched[0])[0], expected, atol=1e-8)
    gain = mir(references, estimates)[0] - expected
    np.testing.assert_allclose(sdr_improvement(*torched)[0], gain, atol=1e-8)
    assert bss_eval(*torched).sdr_mixture is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_signals_that_are_not_finite_are_named(value):
    references = torch.randn(2, 2, 100)
    estimates = references.clone()
    estimates[1, 0, 7] = value
    for function in (bss_eval, si_sdr):
        with pytest.raises(NumericalError, match=r"estimates\[1, 0\] holds (nan|inf) at sample 7"):
            function(references, estimates)
    with pytest.raises(NumericalError, match=r"mixture\[1\] holds"):
        bss_eval(references, references, mixture=estimates.sum(1))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="must both be"):
        bss_eval(torch.ones(2, 2, 9), torch.ones(2, 3, 9))
    with pytest.raises(ValueError, match="no sources or no samples"):
        bss_eval(torch.ones(2, 2, 0), torch.ones(2, 2, 0))
    with pytest.raises(ValueError, match="mixture must be"):
        bss_eval(torch.ones(2, 2, 9), torch.ones(2, 2, 9), mixture=torch.ones(2, 8))
    assert bss_eval(torch.ones(0, 2, 9), torch.ones(0, 2, 9)).sdr.shape == (0, 2)


def test_float32_input_is_computed_in_float64():
    rng = np.random.default_rng(16)
    references = chords(rng, 2, 3000).astype(np.float32)
    estimates = leaky(rng, references).astype(np.float32)
    found, result = ours(references, estimates)
    assert result.sdr.dtype == torch.float64
    np.testing.assert_allclose(found, mir(references.astype(float), estimates.astype(float)), atol=1e-6)


def test_sdr_alone_is_the_sdr_of_bss_eval():
    rng = np.random.default_rng(11)
    references = torch.from_numpy(np.stack([chords(rng, 3, 6000) for _ in range(2)]))
    sets = torch.stack([references + k * torch.from_numpy(rng.standard_normal(references.shape)) for k in (0.1, 1)], 1)
    sets[1, 0, 2] = 0
    references[0, 1] = 0
    found = sdr_alone(references, sets)
    assert found.shape == (2, 2, 3)
    for e in range(2):
        np.testing.assert_allclose(found[:, e], bss_eval(references, sets[:, e]).sdr, atol=1e-9)
    assert torch.isnan(found[0, :, 1]).all()
    assert torch.isnan(found[1, 0, 2])
    with pytest.raises(ValueError, match=r"estimates \[B, E, N, L\]"):
        sdr_alone(references, references)
    with pytest.raises(NumericalError, match="estimates"):
        sdr_alone(references, sets * torch.nan)


def test_without_interference_all_but_sir_and_sar_stays():
    rng = np.random.default_rng(3)
    references = torch.from_numpy(rng.standard_normal((3, 3, 2000)))
    references[1, 2] = 0.0
    references[2, 1] = references[2, 0]
    estimates = references + 0.3 * torch.from_numpy(rng.standard_normal((3, 3, 2000)))
    mixture = references.sum(dim=1)
    whole = bss_eval(references, estimates, 64, mixture=mixture)
    part = bss_eval(references, estimates, 64, mixture=mixture, interference=False)
    torch.testing.assert_close(part.sdr, whole.sdr, rtol=0, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(part.sdr_mixture, whole.sdr_mixture, rtol=0, atol=1e-9, equal_nan=True)
    assert part.status == whole.status == ("ok", "silent", "degenerate")
    assert part.duplicates == whole.duplicates
    assert part.sir.isnan().all()
    assert part.sar.isnan().all()
    assert whole.sir[0].isfinite().all()

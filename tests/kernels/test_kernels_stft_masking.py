"""The STFT masking path against the step-by-step reference in float64, in both conventions of the warp."""

from __future__ import annotations

import math

import pytest
import torch

from avsep import kernels
from avsep.kernels.stft_masking import reference

SMALL = {"n_fft": 62, "hop": 16, "log_rows": 24}
# samples, frames: ragged ends, a single frame, as many samples as fit into the frames
LENGTHS = [(16 * 9 - 1, 9), (16 * 9, 10), (200, 13), (33, 3), (5, 1)]


def signals(*shape, seed=0, dtype=torch.float64):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("samples", "frames", "padding"),
    [(*each, "zeros") for each in LENGTHS] + [(*each, "reflect") for each in LENGTHS if each[0] > SMALL["n_fft"] // 2],
)
@pytest.mark.parametrize("sources", [1, 2, 3])
def test_analysis(align_corners, padding, samples, frames, sources):
    options = {**SMALL, "align_corners": align_corners, "padding": padding}
    x = signals(2, sources, samples)
    got, want = kernels.analyse(x, **options), reference.analyse_reference(x, **options)
    assert got.ratio.shape == (2, sources, SMALL["log_rows"], frames)
    assert got.mixture_stft.shape == (2, SMALL["n_fft"] // 2 + 1, frames)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("length", [None, 1, 100, 12 * 16 + 15])
def test_synthesis_and_gradient(align_corners, length):
    logits = signals(2, 3, 24, 13, seed=1).mul(20).requires_grad_()
    mixture = reference.stft_reference(signals(2, 200), 62, 16).requires_grad_()
    options = {"n_fft": 62, "hop": 16, "length": length, "align_corners": align_corners}
    got = kernels.synthesise(logits, mixture, **options)
    want = reference.synthesise_reference(logits, mixture, **options)
    assert got.shape == (2, 3, 12 * 16 if length is None else length)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(got, (logits, mixture), upstream),
        torch.autograd.grad(want, (logits, mixture), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_analysis_has_the_references_gradient(align_corners):
    options = {**SMALL, "align_corners": align_corners}
    x = signals(1, 2, 150).requires_grad_()
    both = zip(kernels.analyse(x, **options), reference.analyse_reference(x, **options), strict=True)
    for k, (got, want) in enumerate(both):
        upstream = signals(*got.shape, seed=k).to(got.dtype)
        one, other = (torch.autograd.grad(of, x, upstream, retain_graph=True)[0] for of in (got, want))
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_the_analysis_without_targets():
    x = signals(2, 3, 200)
    whole, got = kernels.analyse(x, **SMALL), kernels.analyse(x, **SMALL, targets=False)
    assert got.ratio.shape == (2, 0, *whole.ratio.shape[2:])
    for name in ("network_input", "weight", "mixture_stft"):
        assert torch.equal(getattr(got, name), getattr(whole, name))


def test_analysis_has_finite_gradients_at_silence():
    x = torch.zeros(1, 2, 300, dtype=torch.float64)
    x[0, 0, :100] = signals(100)
    x.requires_grad_()
    got = kernels.analyse(x, **SMALL)
    assert got.ratio.isfinite().all()
    (got.network_input.sum() + got.mixture_stft.abs().sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("align_corners", [True, False])
def test_warp_and_unwarp(align_corners):
    tables = kernels.make_tables(1022, 256, dtype=torch.float64)
    spectrum = signals(2, 3, 512, 20).abs()
    torch.testing.assert_close(
        kernels.warp(spectrum, tables, align_corners=align_corners),
        reference.warp_reference(spectrum, 256, align_corners),
        rtol=1e-9,
        atol=1e-11,
    )
    mask = signals(2, 3, 256, 20).abs()
    torch.testing.assert_close(
        kernels.unwarp(mask, tables, align_corners=align_corners),
        reference.unwarp_reference(mask, 512, align_corners),
        rtol=1e-9,
        atol=1e-11,
    )


def test_the_published_convention_halves_the_borders():
    tables = kernels.make_tables(1022, 256)
    ones = kernels.unwarp(torch.ones(1, 1, 256, 256), tables, align_corners=False)[0, 0]
    # near the top four linear rows lie in the last half cell of the log grid
    torch.testing.assert_close(ones[1:-4, 1:-1], torch.ones(507, 254))
    for border in (ones[0, 1:-1], ones[-1, 1:-1], ones[1:-4, 0], ones[1:-4, -1]):
        torch.testing.assert_close(border, torch.full_like(border, 0.5), rtol=1e-4, atol=1e-4)
    corners = ones[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.full((4,), 0.25), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernels.unwarp(torch.ones(1, 1, 256, 256), tables), torch.ones(1, 1, 512, 256))


def test_stft_is_torchs_and_linear():
    x = signals(3, 2, 700)
    window = torch.hann_window(62, dtype=torch.float64)
    got = kernels.stft(x, hop=16, window=window)
    want = torch.stft(x.flatten(0, 1), 62, 16, window=window, pad_mode="constant", return_complex=True)
    torch.testing.assert_close(got.flatten(0, 1), want)
    torch.testing.assert_close(kernels.analyse(x, **SMALL).mixture_stft, kernels.stft(x.sum(1), hop=16, window=window))
    for length in (1, 43 * 16, 700):
        torch.testing.assert_close(kernels.istft(got, hop=16, window=window, length=length), x[..., :length])
    # one signal alone, without any dimension before its samples
    alone = kernels.stft(x[0, 0], hop=16, window=window)
    torch.testing.assert_close(alone, got[0, 0])
    torch.testing.assert_close(kernels.istft(alone, hop=16, window=window, length=700), x[0, 0])


def test_constants_in_double_precision():
    tables = kernels.make_tables(1022, 256, dtype=torch.float64)
    torch.testing.assert_close(tables.window, torch.hann_window(1022, dtype=torch.float64))
    for rows, size in ((tables.to_log, 512), (tables.to_linear, 256)):
        assert rows.low.min() == 0
        assert rows.high.max() == size - 1
        assert ((rows.high - rows.low) == 1).all()
        assert (rows.fraction >= 0).all()
        assert (rows.fraction <= 1).all()
    # the first and the last row are the borders; g(0) = (sqrt(21) - 11) / 10 lies in the middle of an odd grid
    assert kernels.make_tables(62, 5, dtype=torch.float64).log_grid.tolist() == pytest.approx(
        [-1, (21**0.25 - 11) / 10, (21**0.5 - 11) / 10, (21**0.75 - 11) / 10, 1]
    )


@pytest.mark.parametrize("align_corners", [True, False])
def test_half_input_and_autocast_are_computed_in_fp32(align_corners):
    x = signals(2, 2, 500, dtype=torch.float16)
    want = reference.analyse_reference(x.double(), **SMALL, align_corners=align_corners)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kernels.analyse(x, **SMALL, align_corners=align_corners)
        logits = signals(2, 2, 24, 32, dtype=torch.bfloat16)
        waveform = kernels.synthesise(logits, got.mixture_stft, n_fft=62, hop=16, align_corners=align_corners)
    assert {got.ratio.dtype, got.weight.dtype, waveform.dtype} == {torch.float32}
    torch.testing.assert_close(got.network_input.double(), want[0], rtol=1e-4, atol=1e-5)
    wanted = reference.synthesise_reference(logits.double(), want[3], n_fft=62, hop=16, align_corners=align_corners)
    torch.testing.assert_close(waveform.double(), wanted, rtol=1e-4, atol=1e-5)


def test_not_contiguous():
    x = signals(500, 2, 2, dtype=torch.float32).permute(1, 2, 0)
    for one, other in zip(kernels.analyse(x, **SMALL), kernels.analyse(x.contiguous(), **SMALL), strict=True):
        torch.testing.assert_close(one, other)


def test_no_graph_break():
    tables = kernels.make_tables(62, 24)

    def both(x):
        analysis = kernels.analyse(x, hop=16, tables=tables)
        return kernels.synthesise(analysis.ratio, analysis.mixture_stft, hop=16, tables=tables)

    x = signals(1, 2, 300, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="eager")(x), both(x))


def test_wrong_input():
    good = torch.zeros(1, 2, 300)
    spectrum = torch.zeros(1, 32, 19, dtype=torch.complex64)
    logits = torch.zeros(1, 2, 24, 19)
    cases = [
        (lambda: kernels.analyse(good[0], **SMALL), r"sources \[B, N, L\].*got \[2, 300\]"),
        (lambda: kernels.analyse(good[:0], **SMALL), r"at least 1, got \[0, 2, 300\]"),
        (lambda: kernels.analyse(good[..., :0], **SMALL), "0 samples is too short"),
        (lambda: kernels.analyse(good[..., :31], **SMALL, padding="reflect"), "at least 32 are needed"),
        (lambda: kernels.analyse(good, **SMALL, padding="edge"), "'zeros' or 'reflect', got 'edge'"),
        (lambda: kernels.analyse(good.int(), **SMALL), "floating point"),
        (lambda: kernels.make_tables(63, 24), "n_fft must be even"),
        (lambda: kernels.synthesise(logits[0], spectrum, n_fft=62, hop=16), r"logits \[B, N, F, T\]"),
        (lambda: kernels.synthesise(logits, spectrum, hop=16), r"of shape \[1, 512, 19\], got torch.complex64"),
        (lambda: kernels.synthesise(logits, spectrum.real, n_fft=62, hop=16), "must be complex"),
        (lambda: kernels.synthesise(logits, spectrum, n_fft=62, hop=16, length=304), "choose 1 to 303"),
        (lambda: kernels.synthesise(logits, spectrum, n_fft=62, hop=16, length=0), "length 0 does not fit"),
        (
            lambda: kernels.synthesise(logits, spectrum, hop=16, tables=kernels.make_tables(62, 25)),
            "24 rows, the tables 25",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_grids_invert_each_other_and_span_the_spectrum():
    rows = reference.log_frequency_grid(256)
    assert rows[0] == -1
    assert rows[-1] == 1
    middle = reference.log_frequency_grid(3)[1]
    assert float((middle + 1) / 2) == pytest.approx((21**0.5 - 1) / 20)
    back = 2 * torch.log(10 * rows + 11) / math.log(21) - 1
    torch.testing.assert_close(back, torch.linspace(-1, 1, 256, dtype=torch.float64))
    bins = reference.linear_frequency_grid(512)
    assert bins[0] == pytest.approx(-1)
    assert bins[-1] == pytest.approx(1)
    torch.testing.assert_close((21 ** ((bins + 1) / 2) - 11) / 10, torch.linspace(-1, 1, 512, dtype=torch.float64))

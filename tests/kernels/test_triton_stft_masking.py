"""The Triton kernels of the STFT masking path against the step-by-step reference in float64.

Without a GPU they run under Triton's interpreter (conftest.py); on a machine that has one, the same tests run on it.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from avsep import kernels
from avsep.dsp import FrontEnd
from avsep.errors import ConfigError
from avsep.kernels import _backend
from avsep.kernels.stft_masking import op, reference, triton_kernel
from avsep.spec import FrontEndSpec

# NumPy, in which the interpreter computes, warns of what lies outside a ragged edge and is never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = 3e-6  # relative, in the L2 norm: fp32 gives about 2e-7, and a missing tap or term much more
SMALL = {"n_fft": 62, "hop": 16, "log_rows": 24}
PAPER = {"n_fft": 1022, "hop": 256, "log_rows": 256}

# settings, mixtures, sources, samples: more than one tile and less than one along each axis; a bin more than a tile;
# one frame; frames that do not divide; more sources than one program has; more rows than bins
CASES = {
    "small": (SMALL, 2, 2, 200),
    "three sources": ({"n_fft": 62, "hop": 20, "log_rows": 17}, 1, 3, 500),
    "one frame": (SMALL, 1, 1, 15),
    "two frames": (SMALL, 1, 2, 31),
    "two tiles": ({"n_fft": 132, "hop": 30, "log_rows": 40}, 2, 1, 30 * 33 + 5),
    "nine sources": ({"n_fft": 30, "hop": 8, "log_rows": 8}, 1, 9, 60),
    "more rows than bins": ({"n_fft": 16, "hop": 5, "log_rows": 50}, 1, 5, 77),
    "little overlap": ({"n_fft": 40, "hop": 27, "log_rows": 9}, 1, 2, 300),
    "one row": ({"n_fft": 8, "hop": 2, "log_rows": 1}, 1, 2, 40),
}
LARGE = {"paper": (PAPER, 1, 2, 65535)}
# the interpreter takes half a minute for the gradients of all 256 frames
SHORTER = {"paper": (PAPER, 1, 2, 65535 if DEVICE == "cuda" else 256 * 34)}


class _Poisoned:
    """torch, but what ``empty`` gives is full of NaN."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*arguments, **options):
        return torch.full(*arguments, float("nan"), **options)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setattr(triton_kernel, "torch", _Poisoned())


def noise(*shape, seed=0, dtype=torch.float32):
    kind = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=kind)
    return values.to(dtype).to(DEVICE)


def signals(*shape, seed=0, dtype=torch.float32):
    return noise(*shape, seed=seed).mul_(0.1).to(dtype)


def error(got, want):
    """Relative in the L2 norm, computed in double precision; NaN anywhere is NaN."""
    assert got.shape == want.shape, (got.shape, want.shape)
    kind = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.detach().cpu().to(kind), want.detach().cpu().to(kind)
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def synthesis_inputs(case, *, dtype=torch.float32, seed=1):
    """Logits, the STFT of a mixture, and options."""
    settings, batch, sources, samples = case
    frames = 1 + samples // settings["hop"]
    logits = noise(batch, sources, settings["log_rows"], frames, seed=seed).mul_(3).to(dtype)
    mixture = noise(batch, settings["n_fft"] // 2 + 1, frames, seed=seed + 1, dtype=torch.complex64)
    options = {"n_fft": settings["n_fft"], "hop": settings["hop"]}
    return logits, mixture, options


def synthesis_reference(logits, mixture, upstream=None, **options):
    """In double precision on the CPU: the waveforms, and with ``upstream`` the gradient of the logits."""
    logits = logits.detach().cpu().double().requires_grad_()
    want = reference.synthesise_reference(logits, mixture.detach().cpu().to(torch.complex128), **options)
    if upstream is None:
        return want.detach()
    return (want.detach(), *torch.autograd.grad(want, logits, upstream.detach().cpu().double()))


# ---------------------------------------------------------------- against the reference


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_analysis(name, align_corners):
    settings, batch, sources, samples = {**CASES, **(LARGE if align_corners else SHORTER)}[name]
    x = signals(batch, sources, samples)
    paddings = ("zeros", "reflect") if samples > settings["n_fft"] // 2 and name != "paper" else ("zeros",)
    for padding in paddings:
        options = {**settings, "align_corners": align_corners, "padding": padding}
        got = kernels.analyse(x, **options, backend="triton")
        want = reference.analyse_reference(x.cpu().double(), **options)
        assert error(got.network_input, want[0]) < EXACT
        assert error(got.weight, want[1]) < EXACT
        assert error(got.ratio, want[2]) < 10 * EXACT  # a quotient, whose divisor may be small
        assert error(got.mixture_stft, want[3]) < EXACT
        # frame by frame, as the synthesis reads it
        assert got.mixture_stft.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n == "paper" else []) for n in [*CASES, *SHORTER]]
)
def test_synthesis_and_gradient(name, align_corners):
    case = {**CASES, **SHORTER}[name]
    logits, mixture, options = synthesis_inputs(case)
    frames, hop = logits.shape[3], options["hop"]
    # with so little overlap the last samples have no frame over them
    options["length"] = min(frames * hop - 1, (frames - 1) * hop + options["n_fft"] // 2)
    options["align_corners"] = align_corners
    a = logits.clone().requires_grad_()
    got = kernels.synthesise(a, mixture, **options, backend="triton")
    upstream = noise(*got.shape, seed=5)
    want, gradient = synthesis_reference(logits, mixture, upstream, **options)
    assert error(got, want) < EXACT
    assert error(torch.autograd.grad(got, a, upstream)[0], gradient) < EXACT


@pytest.mark.slow
def test_synthesis_at_the_papers_size():
    logits, mixture, options = synthesis_inputs(LARGE["paper"])
    got = kernels.synthesise(logits, mixture, **options, length=65535, backend="triton")
    assert got.shape == (1, 2, 65535)
    assert error(got, synthesis_reference(logits, mixture, **options, length=65535)) < EXACT


@pytest.mark.parametrize("length", [None, 1, 16, 100, 12 * 16 + 15])
def test_synthesis_of_any_length(length):
    logits, mixture, options = synthesis_inputs(CASES["small"])
    options["length"] = length
    a = logits.clone().requires_grad_()
    got = kernels.synthesise(a, mixture, **options, backend="triton")
    upstream = noise(*got.shape, seed=5)
    want = synthesis_reference(logits, mixture, upstream, **options)
    assert error(got, want[0]) < EXACT
    assert error(torch.autograd.grad(got, a, upstream)[0], want[1]) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("align_corners", [True, False])
def test_half_precision_input_is_computed_in_fp32(dtype, align_corners):
    x = signals(2, 2, 200, dtype=dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        analysis = kernels.analyse(x, **SMALL, align_corners=align_corners, backend="triton")
    want = reference.analyse_reference(x.cpu().double(), **SMALL, align_corners=align_corners)
    for one, other in zip(analysis, want, strict=True):
        assert one.dtype in (torch.float32, torch.complex64)
        assert error(one, other) < 10 * EXACT
    logits, mixture, options = synthesis_inputs(CASES["small"], dtype=dtype)
    a = logits.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = kernels.synthesise(a, mixture, **options, align_corners=align_corners, backend="triton")
    upstream = noise(*got.shape, seed=5)
    (gradient,) = torch.autograd.grad(got, a, upstream)
    want = synthesis_reference(logits, mixture, upstream, **options, align_corners=align_corners)
    assert got.dtype == torch.float32
    assert gradient.dtype == dtype
    assert error(got, want[0]) < EXACT
    assert error(gradient, want[1]) < (5e-4 if dtype == torch.float16 else 4e-3)  # rounded once, at the end


# ---------------------------------------------------------------- layouts


def test_not_contiguous():
    x = signals(500, 2, 3).permute(1, 2, 0)
    for one, other in zip(
        kernels.analyse(x, **SMALL, backend="triton"),
        kernels.analyse(x.contiguous(), **SMALL, backend="triton"),
        strict=True,
    ):
        assert torch.equal(one, other)
    one_for_all = signals(1, 1, 300).expand(2, 3, 300)
    assert torch.equal(
        kernels.analyse(one_for_all, **SMALL, backend="triton").ratio,
        kernels.analyse(one_for_all.contiguous(), **SMALL, backend="triton").ratio,
    )


@pytest.mark.slow
@pytest.mark.parametrize("align_corners", [True, False])
def test_synthesis_of_any_layout(align_corners):
    logits, mixture, options = synthesis_inputs(({"n_fft": 34, "hop": 8, "log_rows": 8}, 2, 2, 8 * 33))
    options["align_corners"] = align_corners
    upstream = noise(2, 2, 8 * 33, seed=5)
    want = synthesis_reference(logits, mixture, upstream, **options)
    wide = torch.zeros(*mixture.shape[:2], 2 * mixture.shape[2], dtype=torch.complex64, device=DEVICE)
    wide[..., ::2] = mixture
    layouts = {
        "frame by frame": mixture.transpose(1, 2).contiguous().transpose(1, 2),
        "with gaps": wide[..., ::2],
        "conjugated": mixture.conj().resolve_conj().conj(),
    }
    assert layouts["conjugated"].is_conj()
    turned = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for name, other in layouts.items():
        if name != "with gaps" and not align_corners:
            continue  # the same code, and slow
        a = turned.detach().requires_grad_()
        got = kernels.synthesise(a, other, **options, backend="triton")
        assert error(got, want[0]) < EXACT, name
        assert error(torch.autograd.grad(got, a, upstream)[0], want[1]) < EXACT, name
    # the gradient of a sum has no memory of its own
    a = logits.clone().requires_grad_()
    kernels.synthesise(a, mixture, **options, backend="triton").sum().backward()
    want = synthesis_reference(logits, mixture, torch.ones_like(upstream), **options)
    assert error(a.grad, want[1]) < EXACT


# ---------------------------------------------------------------- how it runs


def test_launches_and_bits(monkeypatch):
    """Few launches, and the same bits every time."""
    launched = []
    launch = triton_kernel.launch
    monkeypatch.setattr(
        triton_kernel, "launch", lambda kernel, *a, **k: launched.append(kernel) or launch(kernel, *a, **k)
    )
    logits, mixture, options = synthesis_inputs(CASES["small"])
    x = signals(2, 2, 200)
    found = []
    for _ in range(2):
        a = logits.clone().requires_grad_()
        analysis = kernels.analyse(x, **SMALL, backend="triton")
        assert len(launched) == 2
        waves = kernels.synthesise(a, mixture, **options, backend="triton")
        assert len(launched) == 4
        found.append([*analysis, waves, *torch.autograd.grad(waves, a, noise(*waves.shape, seed=3))])
        assert len(launched) == 6
        launched.clear()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_operators():
    logits, mixture, _ = synthesis_inputs(({"n_fft": 14, "hop": 4, "log_rows": 6}, 1, 2, 40))
    tables = kernels.make_tables(14, 6, device=DEVICE)
    x = signals(1, 2, 40)
    torch.library.opcheck(op._triton_analyse, (x, tables.window, tables.log_taps[0], 4, 6, False, True))
    taps = tables.linear_taps[1]
    rest = (tables.window, taps, 4)
    torch.library.opcheck(op._triton_synthesise, (logits.clone().requires_grad_(), mixture, *rest, 39, True))
    torch.library.opcheck(op._triton_synthesise_backward, (noise(1, 2, 39), logits, mixture, *rest, True))


@pytest.mark.parametrize("align_corners", [True, False])
def test_compiled_in_one_graph(align_corners):
    tables = kernels.make_tables(62, 24, device=DEVICE)
    options = {"hop": 16, "tables": tables, "align_corners": align_corners, "backend": "triton"}

    def both(x, gain):
        analysis = kernels.analyse(x, **options)
        return kernels.synthesise(analysis.ratio * gain, analysis.mixture_stft, **options)

    x = signals(1, 2, 300)
    found = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        gain = torch.tensor(1.5, device=DEVICE, requires_grad=True)
        out = function(x, gain)
        found.append((out, *torch.autograd.grad(out.square().sum(), gain)))
    for one, other in zip(*found, strict=True):
        assert error(one, other) < EXACT


def test_the_front_end_uses_them():
    spec = FrontEndSpec(sample_rate_hz=8000, clip_samples=500, n_fft=62, hop=16, log_rows=24)
    front_end = FrontEnd(spec).to(DEVICE)
    x = signals(1, 2, 500)
    found = []
    for backend in ("triton", "torch"):
        analysis = front_end.analyse(x, backend=backend)
        logits = analysis.ratio.clamp(1e-3, 1 - 1e-3).logit()
        found.append((analysis.ratio, front_end.synthesise(logits, analysis.mixture, 500, backend=backend)))
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 5e-5


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(("n_fft", "log_rows"), [(62, 24), (16, 50), (8, 1), (2, 3), (1022, 256)])
def test_taps_are_the_warp(n_fft, log_rows):
    """Applied to each unit vector; and the ranges hold the rows that start to read below a row."""
    tables, bins = kernels.make_tables(n_fft, log_rows), n_fft // 2 + 1
    for both, rows, size, warp in (
        (tables.log_taps, log_rows, bins, lambda x, a: reference.warp_reference(x, log_rows, a)),
        (tables.linear_taps, bins, log_rows, lambda x, a: reference.unwarp_reference(x, bins, a)),
    ):
        # both vectors begin where 16 bytes can be read at once
        assert both.shape == (2, -(-(2 * rows + size + 1) // 4) * 4)
        for align_corners in (True, False):
            taps = both[int(align_corners)]
            low, fraction = taps[:rows].long(), taps[rows : 2 * rows].view(torch.float32).double()
            first = taps[2 * rows : 2 * rows + size + 1].long()
            padded = torch.zeros(size + 2, rows, dtype=torch.float64)
            padded[low + 1, torch.arange(rows)] += 1 - fraction
            padded[low + 2, torch.arange(rows)] += fraction
            # a frame in the middle of three stays where it is in both conventions
            unit = torch.eye(size, dtype=torch.float64)[:, None, :, None].expand(-1, 1, -1, 3)
            want = warp(unit, align_corners)[:, 0, :, 1]  # [size, rows]
            torch.testing.assert_close(padded[1:-1], want, rtol=0, atol=1e-6)
            assert first.tolist() == [(low < s).sum().item() for s in range(size + 1)]


def test_tables_are_made_once():
    x = signals(1, 2, 200)
    with torch.inference_mode():
        kernels.analyse(x, **SMALL, backend="triton")
    once = op._tables_for(x, 62, 24, torch.float32)
    assert op._tables_for(x, 62, 24, torch.float32) is once
    assert not once.window.is_inference()


# ---------------------------------------------------------------- wrong and unusual input


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(value, align_corners):
    x = signals(2, 2, 300)
    x[0, 1, 150] = value
    logits, mixture, options = synthesis_inputs((SMALL, 2, 2, 300))
    logits[0, 1, 5, 9] = value
    mixture[1, 7, 4] = value
    options["align_corners"] = align_corners
    for one, other in zip(
        (
            *kernels.analyse(x, **SMALL, align_corners=align_corners, backend="triton"),
            kernels.synthesise(logits, mixture, **options, backend="triton"),
        ),
        (
            *kernels.analyse(x, **SMALL, align_corners=align_corners, backend="torch"),
            kernels.synthesise(logits, mixture, **options, backend="torch"),
        ),
        strict=True,
    ):
        if value == float("inf"):  # whether an FFT makes inf or NaN of it differs: it must not reach any further
            assert (one.isfinite() | ~other.isfinite()).all()
        else:
            assert not one.isfinite().all()
            assert torch.equal(one.isfinite(), other.isfinite())


def test_very_many_frames_over_a_sample_are_left_to_pytorch(auto_takes_triton):
    """The overlap-add unrolls over them."""
    logits, mixture = torch.zeros(1, 1, 24, 5, device=DEVICE), torch.zeros(1, 32, 5, device=DEVICE) + 1j
    with pytest.raises(ConfigError, match="up to 16 frames over one sample, but n_fft / hop is 21"):
        kernels.synthesise(logits, mixture, n_fft=62, hop=3, backend="triton")
    assert kernels.synthesise(logits, mixture, n_fft=62, hop=3, backend="auto").shape == (1, 1, 12)


def test_silence_and_clamps():
    silent = kernels.analyse(torch.zeros(1, 2, 200, device=DEVICE), **SMALL, backend="triton")
    assert silent.ratio.abs().max() == 0
    assert silent.network_input.cpu() == pytest.approx(1e-10, rel=1e-5)  # log1p, not log(1 + x)
    assert silent.weight.cpu().unique().tolist() == pytest.approx([1e-3])
    tone = signals(1, 1, 200)
    loud = kernels.analyse(torch.cat((tone, -0.999 * tone), dim=1) * 1e6, **SMALL, backend="triton")
    assert loud.ratio.max() == 5
    assert kernels.analyse(tone * 1e9, **SMALL, backend="triton").weight.max() == 10


def test_gradients_without_kernels_are_pytorchs(auto_takes_triton):
    """Of the sources, and of the mixture's STFT."""
    x = signals(1, 2, 200).requires_grad_()
    logits, mixture, options = synthesis_inputs(CASES["small"])
    mixture.requires_grad_()
    calls = {
        "the sources": (x, lambda **k: kernels.analyse(x, **SMALL, **k).network_input),
        "the mixture's STFT": (mixture, lambda **k: kernels.synthesise(logits, mixture, **options, **k)),
    }
    for name, (leaf, call) in calls.items():
        with pytest.raises(ConfigError, match=f"gives no gradient of {name}: detach it; or use 'torch'"):
            call(backend="triton")
        with torch.no_grad():
            call(backend="triton")
        call(backend="auto").sum().backward()
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_input_is_refused_alike(backend):
    good = torch.zeros(1, 2, 300, device=DEVICE)
    spectrum = torch.zeros(1, 32, 19, dtype=torch.complex64, device=DEVICE)
    logits = torch.zeros(1, 2, 24, 19, device=DEVICE)
    elsewhere = kernels.make_tables(62, 24, device="meta")
    some = {"n_fft": 62, "hop": 16}
    cases = [
        (lambda **k: kernels.analyse(good[0], **SMALL, **k), r"sources \[B, N, L\].*got \[2, 300\]"),
        (lambda **k: kernels.analyse(good[:0], **SMALL, **k), r"at least 1, got \[0, 2, 300\]"),
        (lambda **k: kernels.analyse(good[..., :0], **SMALL, **k), "0 samples is too short"),
        (lambda **k: kernels.analyse(good[..., :31], **SMALL, padding="reflect", **k), "at least 32 are needed"),
        (lambda **k: kernels.analyse(good, **SMALL, padding="edge", **k), "'zeros' or 'reflect', got 'edge'"),
        (lambda **k: kernels.analyse(good, n_fft=62, hop=0, **k), "hop must be at least 1, got 0"),
        (lambda **k: kernels.analyse(good.int(), **SMALL, **k), "floating point"),
        (lambda **k: kernels.analyse(good, hop=16, tables=elsewhere, **k), f"on {DEVICE}.* and the tables on meta"),
        (lambda **k: kernels.synthesise(logits[0], spectrum, **some, **k), r"logits \[B, N, F, T\]"),
        (lambda **k: kernels.synthesise(logits.int(), spectrum, **some, **k), "logits must be floating point"),
        (lambda **k: kernels.synthesise(logits, spectrum[:, 1:], **some, **k), r"of shape \[1, 32, 19\]"),
        (lambda **k: kernels.synthesise(logits, spectrum.real, **some, **k), "must be complex"),
        (lambda **k: kernels.synthesise(logits, spectrum.to("meta"), **some, **k), "and mixture_stft on meta"),
        (lambda **k: kernels.synthesise(logits, spectrum, **some, length=304, **k), "choose 1 to 303"),
        (lambda **k: kernels.synthesise(logits, spectrum, n_fft=62, hop=62, **k), "hop 62 does not suit n_fft 62"),
        (lambda **k: kernels.synthesise(logits, spectrum, hop=16, tables=elsewhere, **k), "the tables on meta"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call(backend=backend)


def test_double_precision_is_torchs(auto_takes_triton, monkeypatch):
    x = signals(1, 2, 200).double()
    logits, mixture, options = synthesis_inputs(CASES["small"])
    calls = [
        lambda **k: kernels.analyse(x, **SMALL, **k),
        lambda **k: kernels.synthesise(logits.double(), mixture, **options, **k),
        lambda **k: kernels.synthesise(logits, mixture.to(torch.complex128), **options, **k),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"computes in fp32.*; or use 'torch'"):
            call(backend="triton")
    assert calls[0]().ratio.dtype == torch.float64
    assert calls[2]().dtype == torch.float64
    monkeypatch.setenv(_backend.VARIABLE, "triton")
    with pytest.raises(ConfigError, match=r"AVSEP_KERNELS=triton: .*computes in fp32"):
        calls[0]()

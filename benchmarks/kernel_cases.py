"""What ``avsep bench kernels`` compares: every operation in every backend, and its peers.

Needs nothing but torch and NumPy (and Triton for its variants): no command line, no file formats. Cases are made one at
a time, so that the large ones do not hold each other's memory.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from avsep import kernels
from avsep.errors import ConfigError
from avsep.kernels._backend import OPERATIONS, interpreting
from avsep.kernels.mask_head.reference import mask_head_reference, mask_l1_reference
from avsep.kernels.similarity_distillation.reference import similarity_distillation_reference
from avsep.kernels.stft_masking.reference import (
    analyse_reference,
    linear_frequency_grid,
    log_frequency_grid,
    synthesise_reference,
)

__all__ = ["SIZES", "KernelCase", "Variant", "kernel_cases"]

SIZES = ("tiny", "paper", "large", "huge", "all")
"""``tiny`` runs every line in seconds, under Triton's interpreter too, and says nothing about speed; ``paper`` is what
the bars are about, ``large`` similarity_distillation beyond it, ``all`` both, and small batches, which the table of
backends is made from."""

Inputs = Mapping[str, Tensor]

TOLERANCE = 1e-4
"""Relative in the L2 norm, of every output: float32 stays far below, one pass of TF32 does not."""

GRADIENT_TOLERANCE = 1e-3
"""Likewise of every input's gradient."""

TF32_TOLERANCE = 1e-2
"""For peers that round their operands to TF32."""

L1_GRADIENT_TOLERANCE = 5e-3
"""Of a gradient through |x|, whose sign float32 gets wrong for the few differences that are zero but for rounding."""

BF16_TOLERANCE = 1e-3
"""Of losses that average bf16's rounding over many pixels."""

BF16_GRADIENT_TOLERANCE = 5e-2
"""Of their gradients in bf16, with the signs that it gets wrong."""


@dataclass(frozen=True)
class Variant:
    """One way of doing a case. ``run`` takes a set of inputs and returns the outputs.

    A peer that does a part only has inputs of its own (made by ``prepare`` from the case's), ``leaves`` among them, a
    ``reference`` and the ``flops`` and ``bytes`` that part needs. ``unavailable`` says why it cannot run here: it then
    gets a row without figures. ``ours`` marks the library's own, whose failing is an error of the run. One that is not
    ``timed`` is checked only.
    """

    name: str
    run: Callable[[Inputs], Sequence[Tensor]]
    ours: bool = False
    unavailable: str = ""
    tolerance: float = TOLERANCE
    gradient_tolerance: float = GRADIENT_TOLERANCE
    needs_bytes: float = 0.0
    prepare: Callable[[Inputs], Inputs] | None = None
    leaves: tuple[str, ...] | None = None
    reference: Callable[[Inputs], Sequence[Tensor]] | None = None
    moves_bytes: float | None = None
    timed: bool = True
    note: str = ""


@dataclass(frozen=True)
class KernelCase:
    """An operation at one size.

    ``inputs(seed)`` draws a set of inputs; ``leaves`` are those that get a gradient (none: only forward is timed);
    ``reference`` is asked in float64. ``forward_bytes`` and ``total_bytes`` are the fewest that a fused form reads and
    writes, without and with the backward pass; ``forward_flops`` and ``total_flops`` likewise, of the matrix products;
    ``launches`` the fewest kernels of both. ``size`` is in the unit of the backend table, None where the case says
    nothing about it. Where the mixtures of a batch are independent, ``checked_rows`` names those that are compared with
    the reference (of the others, that they are finite), which then runs on ``reference_device``. ``facts`` are for the
    bars. ``device_time``: on a GPU the calls are queued before the clock starts, so that Python's part does not count.
    """

    name: str
    op: str
    title: str
    size: int | None
    settings: str
    inputs: Callable[[int], Inputs]
    reference: Callable[[Inputs], Sequence[Tensor]]
    variants: Sequence[Variant]
    leaves: tuple[str, ...] = ()
    forward_bytes: float = 0.0
    total_bytes: float = 0.0
    forward_flops: float = 0.0
    total_flops: float = 0.0
    launches: tuple[int, int] = (1, 2)
    device: str = "cpu"
    checked_rows: tuple[int, ...] | None = None
    reference_device: str = ""
    facts: Mapping[str, float] = field(default_factory=dict)
    device_time: bool = False


def kernel_cases(
    ops: Sequence[str] = (), *, sizes: str = "paper", device: str = "cpu", compiled: bool | None = None
) -> Iterator[KernelCase]:
    """The cases of these operations (all when none is named).

    Args:
        ops: names of operations.
        sizes: one of :data:`SIZES`.
        device: cpu or cuda.
        compiled: whether torch.compile is among the peers; on a GPU by default.

    Raises:
        ConfigError: for an operation or sizes that do not exist.
    """
    if sizes not in SIZES:
        raise ConfigError(f"no sizes named '{sizes}': {', '.join(SIZES)}")
    for op in ops:
        if op not in OPERATIONS:
            raise ConfigError(f"no operation named '{op}': {', '.join(OPERATIONS)}")
    if compiled is None:
        compiled = device.startswith("cuda")
    for op, make in (
        ("similarity_distillation", _similarity_cases),
        ("stft_masking", _stft_cases),
        ("mask_head", _mask_head_cases),
    ):
        if not ops or op in ops:
            yield from make(sizes, device, compiled)


def triton_unavailable(op: str, device: str, sizes: str) -> str:
    """Why an operation's Triton kernels give no row on this device; empty where they do."""
    if importlib.util.find_spec(f"avsep.kernels.{op}.triton_kernel") is None:
        return "there is no Triton kernel"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not device.startswith("cuda"):
        if sizes != "tiny":
            return "needs an NVIDIA GPU"
        if not interpreting():
            return "needs an NVIDIA GPU, or TRITON_INTERPRET=1 to be checked on the CPU"
    return ""


def _triton(run: Callable[[Inputs], Sequence[Tensor]], unavailable: str = "", **others: Any) -> Variant:
    """The variant in Triton. The interpreter's speed says nothing, so under it the kernels are checked only."""
    if not interpreting():
        return Variant("triton", run, ours=True, unavailable=unavailable, **others)
    note = "checked only: the interpreter's speed says nothing"
    return Variant("triton, interpreted", run, ours=True, unavailable=unavailable, timed=False, note=note, **others)


def free_bytes(device: str) -> float:
    """Memory that is left on a device."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info()[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not known here
        return math.inf


# --- similarity_distillation ------------------------------------------------------------------------------------------

_TEMPERATURE = 0.05
_MODALITIES = ("a", "v", "m")
_PAIRS = ((0, 1), (0, 2), (1, 2))
# n x n values that the literal form needs at once: 17 were measured on the CPU at n = 4,096.
_LITERAL_SCORES = 20


def literal_similarity(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The equation as it is usually written: n x n masks, and a cross entropy for each pair, direction and term.

    Unlike the tests' reference it asks the device for no value, so that torch.compile takes it as one graph and eager
    is not held up.
    """
    teacher = inputs["teacher_rows"][:, None]
    rows = [F.normalize(torch.where(teacher, inputs[m].detach(), inputs[m]), dim=1) for m in _MODALITIES]
    terms = []
    for ids in (inputs["instance_ids"], inputs["class_ids"]):
        positives = (ids[:, None] == ids[None, :]).to(rows[0].dtype)  # [n, n]
        count = positives.sum(dim=1)
        losses = []
        for i, j in _PAIRS:
            scores = rows[i] @ rows[j].T / _TEMPERATURE
            for s in (scores, scores.T):
                losses.append(-((positives * F.log_softmax(s, dim=1)).sum(dim=1) / count).mean())
        terms.append(torch.stack(losses).mean())
    return terms[0], terms[1]


def log_sum_exps(inputs: Inputs) -> tuple[Tensor, ...]:
    """Of the rows of U V^T / temperature for every pair and direction, in blocks that backward computes again."""

    def block(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / _TEMPERATURE).logsumexp(dim=1)

    found = []
    for i, j in _PAIRS:
        for one, other in ((i, j), (j, i)):
            u, v = inputs[_MODALITIES[one]], inputs[_MODALITIES[other]]
            parts = [checkpoint(block, part, v, use_reentrant=False) for part in u.split(4096)]
            found.append(torch.cat([p for p in parts if p is not None]))
    return tuple(found)


def _inf_cl_log_sum_exps() -> tuple[Callable[[Inputs], Sequence[Tensor]], str]:
    """inf_cl's log-sum-exps for the same pairs and directions, and its version; ImportError where it is unusable."""
    from importlib import metadata

    from inf_cl.flash import FlashProb

    def run(inputs: Inputs) -> Sequence[Tensor]:
        found = []
        for i, j in _PAIRS:
            for one, other in ((i, j), (j, i)):
                u, v = inputs[_MODALITIES[one]], inputs[_MODALITIES[other]]
                # its heads are sums over parts of D: [n, heads, D / heads]; the scale goes into the query, as it does
                found.append(FlashProb.apply((u / _TEMPERATURE)[:, None, :], v[:, None, :]))
        return found

    try:
        return run, metadata.version("inf_cl")
    except metadata.PackageNotFoundError:
        return run, "of unknown version"


def _normalised(inputs: Inputs) -> Inputs:
    return {m: F.normalize(inputs[m].detach().float(), dim=1) for m in _MODALITIES}


def _similarity_cases(sizes: str, device: str, compiled: bool) -> Iterator[KernelCase]:
    known = {"tiny": (24,), "paper": (64, 128, 192), "large": (1024, 8192, 32768), "huge": (131072, 262144)}
    if not device.startswith("cuda"):
        known |= {"large": (1024, 4096), "huge": (16384,)}
    chosen = known[sizes] if sizes != "all" else known["paper"] + known["large"]
    # those with a bar first, where time is short
    chosen = tuple(sorted(chosen, key=lambda n: (n not in (128, 32768), n)))
    for n in chosen:
        yield _similarity_case(n, 32 if sizes == "tiny" else 256, device, sizes, compiled)


def _similarity_case(n: int, dim: int, device: str, sizes: str, compiled: bool) -> KernelCase:
    def inputs(seed: int) -> Inputs:
        rng = torch.Generator(device=device).manual_seed(seed)

        def ids(count: int) -> Tensor:
            return torch.randint(0, count, (n,), generator=rng, device=device)

        found = {m: torch.randn(n, dim, generator=rng, device=device) for m in _MODALITIES}
        # a third of the rows are the teacher's, videos come twice on average, classes as in MUSIC-21
        teacher = torch.rand(n, generator=rng, device=device) < 0.33
        return {**found, "instance_ids": ids(max(1, n // 2)), "class_ids": ids(21), "teacher_rows": teacher}

    def distil(inputs: Inputs, backend: str) -> Sequence[Tensor]:
        return kernels.similarity_distillation(
            [inputs[m] for m in _MODALITIES],
            inputs["instance_ids"],
            inputs["class_ids"],
            temperature=_TEMPERATURE,
            teacher_rows=inputs["teacher_rows"],
            backend=backend,
        )

    literal_bytes = _LITERAL_SCORES * 4.0 * n * n
    # in float64 it takes twice as much; beyond what fits the oracle is identity 2 in float64, in blocks
    literal_oracle = n <= 2048 or (device.startswith("cuda") and 2.2 * literal_bytes < free_bytes(device))

    def reference(inputs: Inputs) -> Sequence[Tensor]:
        if not literal_oracle:
            return distil(inputs, "torch")
        return similarity_distillation_reference(
            [inputs[m] for m in _MODALITIES],
            inputs["instance_ids"],
            inputs["class_ids"],
            temperature=_TEMPERATURE,
            teacher_rows=inputs["teacher_rows"],
        )

    no_compile = "not asked for (--compile)"
    if compiled:
        no_compile = "" if n <= 1024 else "left out at this size, for the time it takes to compile"
    variants = [
        Variant("eager", literal_similarity, needs_bytes=literal_bytes),
        Variant(
            "torch.compile",
            literal_similarity if no_compile else torch.compile(literal_similarity, dynamic=False, fullgraph=True),
            unavailable=no_compile,
            needs_bytes=literal_bytes,
        ),
        Variant("torch", lambda x: distil(x, "torch"), ours=True),
        _triton(lambda x: distil(x, "triton"), triton_unavailable("similarity_distillation", device, sizes)),
        _inf_cl_variant(n, dim, device),
    ]
    one_pass = 3.0 * n * dim * 4
    return KernelCase(
        name=f"similarity_distillation n={n}",
        op="similarity_distillation",
        title="CrossSDC's instance and class terms of three modalities, and their gradients",
        size=n,
        settings=f"n {n}, D {dim}, 3 modalities, fp32, float64 reference "
        + ("literal" if literal_oracle else "in blocks by identity 2"),
        inputs=inputs,
        reference=reference,
        variants=variants,
        leaves=_MODALITIES,
        forward_bytes=one_pass,
        total_bytes=3 * one_pass,  # forward reads; backward reads and writes
        forward_flops=2.0 * len(_PAIRS) * n * n * dim,
        total_flops=6.0 * len(_PAIRS) * n * n * dim,
        device=device,
        facts={"n": n, "score_bytes": 4.0 * n * n},
    )


def _inf_cl_variant(n: int, dim: int, device: str) -> Variant:
    unavailable, version = "", ""
    run: Callable[[Inputs], Sequence[Tensor]] = log_sum_exps
    if importlib.util.find_spec("inf_cl") is None:
        unavailable = "inf_cl is not installed"
    elif not device.startswith("cuda"):
        unavailable = "inf_cl needs an NVIDIA GPU"
    else:
        try:
            run, version = _inf_cl_log_sum_exps()
        except Exception as error:  # a package of others: whatever it raises is its row's note
            unavailable = f"inf_cl cannot be imported: {type(error).__name__}: {error}"
    return Variant(
        "inf_cl, log-sum-exps only",
        run,
        unavailable=unavailable,
        tolerance=TF32_TOLERANCE,
        gradient_tolerance=TF32_TOLERANCE,
        prepare=_normalised,
        leaves=_MODALITIES,
        reference=log_sum_exps,
        note=f"inf_cl {version}: six calls, normalised rows given, products in TF32" if version else "",
    )


# --- stft_masking -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FrontEnd:
    samples: int
    n_fft: int
    hop: int
    log_rows: int

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1

    @property
    def frames(self) -> int:
        return 1 + self.samples // self.hop


_PAPER_FRONT_END = _FrontEnd(65535, 1022, 256, 256)
_TINY_FRONT_END = _FrontEnd(2047, 126, 32, 64)
_SOURCES = 2


def _stft_cases(sizes: str, device: str, compiled: bool) -> Iterator[KernelCase]:
    front_end = _TINY_FRONT_END if sizes == "tiny" else _PAPER_FRONT_END
    for batch in _batches(sizes, device):
        yield _analysis_case(batch, front_end, device, sizes)
        yield _synthesis_case(batch, front_end, device, sizes)
        if batch == max(_batches(sizes, device)) and not triton_unavailable("stft_masking", device, sizes):
            yield from _pass_cases(batch, front_end, device)


def _batches(sizes: str, device: str) -> tuple[int, ...]:
    if sizes == "tiny":
        return (2,)
    largest = 32 if device.startswith("cuda") else 4
    return {"paper": (largest,), "large": (), "huge": (), "all": tuple(b for b in (32, 1, 2, 4, 8) if b <= largest)}[
        sizes
    ]


def _ends(batch: int) -> tuple[int, ...]:
    """The first and the last mixture: the reference's loops over frames are slow."""
    return tuple(sorted({0, batch - 1}))


def _grid(rows: Tensor, frames: int) -> Tensor:
    """Normalised row coordinates [R] -> the grid [1, R, T, 2] that grid_sample reads."""
    time = torch.linspace(-1, 1, frames, dtype=rows.dtype, device=rows.device)
    return torch.stack((time.expand(len(rows), -1), rows[:, None].expand(-1, frames)), dim=2)[None]


def _sampled(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=True)


def _analysis_case(batch: int, f: _FrontEnd, device: str, sizes: str) -> KernelCase:
    tables = kernels.make_tables(f.n_fft, f.log_rows, device=device)
    grid = _grid(log_frequency_grid(f.log_rows).float().to(device), f.frames)

    def inputs(seed: int) -> Inputs:
        rng = torch.Generator(device=device).manual_seed(seed)
        return {"sources": 0.1 * torch.randn(batch, _SOURCES, f.samples, generator=rng, device=device)}

    def literal(inputs: Inputs) -> Sequence[Tensor]:
        """As published: N + 1 transforms, grid_sample, one step at a time (the grid is kept, not made anew)."""
        sources = inputs["sources"]
        signals = torch.cat((sources.sum(dim=1, keepdim=True), sources), dim=1)  # [B, 1+N, L]
        spectra = torch.stft(
            signals.flatten(0, 1), f.n_fft, f.hop, window=tables.window, pad_mode="constant", return_complex=True
        ).unflatten(0, signals.shape[:2])  # [B, 1+N, bins, T]
        mixture = spectra[:, 0]
        magnitude = _sampled(mixture.abs()[:, None] + 1e-10, grid)
        ratio = (_sampled(spectra[:, 1:].abs(), grid) / magnitude).clamp(0, 5)
        network_input = torch.log1p(magnitude)
        return network_input, network_input.clamp(1e-3, 10), ratio, mixture

    def analyse(inputs: Inputs, backend: str) -> Sequence[Tensor]:
        return kernels.analyse(inputs["sources"], hop=f.hop, tables=tables, backend=backend)

    values = f.log_rows * f.frames
    moved = 4.0 * batch * (_SOURCES * f.samples + (2 + _SOURCES) * values + 2 * f.bins * f.frames)
    return KernelCase(
        name=f"stft analysis batch={batch}",
        op="stft_masking",
        title="waveforms to network input, loss weight, ratio masks and mixture STFT",
        size=batch * _SOURCES * f.samples,
        settings=f"batch {batch}, {_SOURCES} sources, {f.samples} samples, STFT {f.n_fft}/{f.hop}, {f.log_rows} rows",
        inputs=inputs,
        reference=lambda x: analyse_reference(x["sources"], n_fft=f.n_fft, hop=f.hop, log_rows=f.log_rows),
        variants=[
            Variant("eager", literal),
            Variant("torch", lambda x: analyse(x, "torch"), ours=True),
            _triton(lambda x: analyse(x, "triton"), triton_unavailable("stft_masking", device, sizes)),
        ],
        forward_bytes=moved,
        total_bytes=moved,
        device=device,
        checked_rows=_ends(batch),
        reference_device="cpu",
    )


def _synthesis_case(batch: int, f: _FrontEnd, device: str, sizes: str) -> KernelCase:
    tables = kernels.make_tables(f.n_fft, f.log_rows, device=device)
    grid = _grid(linear_frequency_grid(f.bins).float().to(device), f.frames)

    def inputs(seed: int) -> Inputs:
        rng = torch.Generator(device=device).manual_seed(seed)
        logits = torch.randn(batch, _SOURCES, f.log_rows, f.frames, generator=rng, device=device)
        signal = 0.1 * torch.randn(batch, f.samples, generator=rng, device=device)
        mixture = kernels.stft(signal, hop=f.hop, window=tables.window)
        return {"logits": logits, "mixture": mixture}

    def literal(inputs: Inputs) -> Sequence[Tensor]:
        """Sigmoid, grid_sample, the masks times the mixture, inverse STFT, one step at a time."""
        masks = _sampled(torch.sigmoid(inputs["logits"]), grid)  # [B, N, bins, T]
        estimate = masks * inputs["mixture"][:, None]
        waves = torch.istft(estimate.flatten(0, 1), f.n_fft, f.hop, window=tables.window, length=f.samples)
        return (waves.unflatten(0, (batch, _SOURCES)),)

    def synthesise(inputs: Inputs, backend: str) -> Sequence[Tensor]:
        return (
            kernels.synthesise(
                inputs["logits"], inputs["mixture"], hop=f.hop, length=f.samples, tables=tables, backend=backend
            ),
        )

    logits = 4.0 * batch * _SOURCES * f.log_rows * f.frames
    mixture = 8.0 * batch * f.bins * f.frames
    waves = 4.0 * batch * _SOURCES * f.samples
    return KernelCase(
        name=f"stft synthesis batch={batch}",
        op="stft_masking",
        title="mask logits and mixture STFT to waveforms, and the logits' gradient",
        size=batch * _SOURCES * f.log_rows * f.frames,
        settings=f"batch {batch}, {_SOURCES} sources, {f.samples} samples, STFT {f.n_fft}/{f.hop}, {f.log_rows} rows",
        inputs=inputs,
        reference=lambda x: (
            synthesise_reference(x["logits"], x["mixture"], n_fft=f.n_fft, hop=f.hop, length=f.samples),
        ),
        variants=[
            Variant("eager", literal),
            Variant("torch", lambda x: synthesise(x, "torch"), ours=True),
            _triton(lambda x: synthesise(x, "triton"), triton_unavailable("stft_masking", device, sizes)),
        ],
        leaves=("logits",),
        forward_bytes=logits + mixture + waves,
        total_bytes=(logits + mixture + waves) + (waves + logits + mixture + logits),
        launches=(2, 4),  # around an inverse FFT, both ways
        device=device,
        checked_rows=_ends(batch),
        reference_device="cpu",
    )


def _pass_cases(batch: int, f: _FrontEnd, device: str) -> Iterator[KernelCase]:
    """Each fused pass alone, beside a plain copy of as many bytes."""
    from avsep.kernels.stft_masking import triton_kernel as passes

    tables = kernels.make_tables(f.n_fft, f.log_rows, device=device)
    exact = kernels.make_tables(f.n_fft, f.log_rows, device=device, dtype=torch.float64)
    to_log, to_linear = tables.log_taps[1], tables.linear_taps[1]  # corners aligned

    def signal(seed: int, *shape: int) -> Tensor:
        rng = torch.Generator(device=device).manual_seed(seed)
        return 0.1 * torch.randn(batch, *shape, generator=rng, device=device)

    def frames_of(x: Tensor, window: Tensor) -> Tensor:
        padded = F.pad(x, (f.n_fft // 2, f.n_fft // 2))
        return padded.unfold(2, f.n_fft, f.hop) * window  # [B, N, T, n_fft]

    def spectra(x: Inputs) -> Tensor:
        spectrum: Tensor = torch.fft.rfft(frames_of(x["sources"], tables.window))
        return spectrum.contiguous()

    def logits_and_mixture(seed: int) -> Inputs:
        mixture = spectra({"sources": signal(seed, 1, f.samples)})[:, 0].transpose(1, 2)  # frame by frame, as analysed
        return {"logits": 10 * signal(seed + 1, _SOURCES, f.log_rows, f.frames), "mixture": mixture}

    def analysed(x: Inputs) -> Sequence[Tensor]:
        mixture = x["spectra"].sum(dim=1)
        magnitudes = torch.cat(((mixture.abs() + 1e-10)[:, None], x["spectra"].abs()), dim=1)
        warped = kernels.warp(magnitudes.transpose(2, 3), exact)
        network_input = torch.log1p(warped[:, :1])
        return network_input, network_input.clamp(1e-3, 10), (warped[:, 1:] / warped[:, :1]).clamp(0, 5), mixture

    def hartley(x: Inputs) -> Tensor:
        masks = kernels.unwarp(torch.sigmoid(x["logits"]), exact if x["logits"].dtype == torch.float64 else tables)
        half = (masks * x["mixture"][:, None]).transpose(2, 3)  # [B, N, T, bins]
        whole = torch.cat((half, half[..., 1:-1].flip(-1).conj()), dim=3)
        return whole.real - whole.imag

    def added(x: Inputs) -> Sequence[Tensor]:
        half = x["spectra"]
        whole = torch.cat((half, half[..., 1:-1].flip(-1).conj()), dim=3)
        pieces = torch.fft.rfft((whole.real - whole.imag) / f.n_fft)
        return (kernels.istft(pieces.transpose(2, 3), hop=f.hop, window=exact.window, length=f.samples),)

    Made = tuple[Callable[[int], Inputs], Callable[[Inputs], Sequence[Tensor]], Callable[[Inputs], Sequence[Tensor]]]
    made: dict[str, Made] = {
        "frame": (
            lambda seed: {"sources": signal(seed, _SOURCES, f.samples)},
            lambda x: (frames_of(x["sources"], exact.window),),
            lambda x: (passes.frame(x["sources"], tables.window, hop=f.hop, frames=f.frames),),
        ),
        "fused_analysis": (
            lambda seed: {"spectra": spectra({"sources": signal(seed, _SOURCES, f.samples)})},
            analysed,
            lambda x: passes.fused_analysis(x["spectra"], to_log, log_rows=f.log_rows, align_corners=True),
        ),
        "fused_masking": (
            logits_and_mixture,
            lambda x: (hartley(x),),
            lambda x: (passes.fused_masking(x["logits"], x["mixture"], to_linear, align_corners=True),),
        ),
        "overlap_add": (
            lambda seed: {"spectra": torch.fft.rfft(hartley(logits_and_mixture(seed))).contiguous()},
            added,
            lambda x: (passes.overlap_add(x["spectra"], tables.window, hop=f.hop, length=f.samples),),
        ),
    }
    for name, (inputs, reference, run) in made.items():
        example = inputs(0)
        moved = sum(t.numel() * t.element_size() for t in (*example.values(), *run(example)))
        del example
        count = math.ceil(moved / 8 / batch)  # values of a mixture that are read, and as many written

        def buffers(_: Inputs, count: int = count) -> Inputs:
            return {"from": torch.randn(batch, count, device=device), "to": torch.empty(batch, count, device=device)}

        yield KernelCase(
            name=f"stft pass {name} batch={batch}",
            device_time=True,
            op="stft_masking",
            title="one fused pass alone, beside a copy of as many bytes",
            size=None,
            settings=f"batch {batch}, {_SOURCES} sources, {f.samples} samples, {moved / 1e6:.1f} MB moved",
            inputs=inputs,
            reference=reference,
            variants=[
                Variant(
                    "copy",
                    lambda x: (x["to"].copy_(x["from"]),),
                    prepare=buffers,
                    reference=lambda x: (x["from"],),
                    moves_bytes=8.0 * batch * count,
                ),
                _triton(run),
            ],
            forward_bytes=moved,
            total_bytes=moved,
            device=device,
            checked_rows=_ends(batch),
        )


# --- mask_head --------------------------------------------------------------------------------------------------------


def _mask_head_cases(sizes: str, device: str, compiled: bool) -> Iterator[KernelCase]:
    channels, side = (8, 16) if sizes == "tiny" else (32, 256)
    for batch in _batches(sizes, device):
        largest = batch == max(_batches(sizes, device))  # compiling takes its time
        yield _mask_loss_case(batch, channels, side, device, sizes, compiled and largest)
        yield _mask_training_case(batch, channels, side, device, sizes)
        yield _mask_logits_case(batch, channels, side, device, sizes)


def _mask_logits_case(batch: int, channels: int, side: int, device: str, sizes: str) -> KernelCase:
    def inputs(seed: int) -> Inputs:
        rng = torch.Generator(device=device).manual_seed(seed)
        return {
            "embedding": torch.randn(batch, _SOURCES, channels, generator=rng, device=device) / math.sqrt(channels),
            "features": torch.randn(batch, channels, side, side, generator=rng, device=device),
        }

    def ours(inputs: Inputs, backend: str) -> Sequence[Tensor]:
        return (kernels.mask_head(inputs["embedding"], inputs["features"], backend=backend),)

    features = 4.0 * batch * channels * side * side
    logits = 4.0 * batch * _SOURCES * side * side
    return KernelCase(
        name=f"mask_head logits batch={batch}",
        op="mask_head",
        title="class vectors times mask features, and both gradients",
        size=batch * channels * side * side,
        settings=f"batch {batch}, {_SOURCES} sources, {channels} channels, {side} x {side}, fp32",
        inputs=inputs,
        reference=lambda x: (mask_head_reference(x["embedding"], x["features"]),),
        variants=[
            Variant("eager", lambda x: (mask_head_reference(x["embedding"], x["features"]),)),
            Variant("torch", lambda x: ours(x, "torch"), ours=True),
            _triton(lambda x: ours(x, "triton"), triton_unavailable("mask_head", device, sizes)),
        ],
        leaves=("embedding", "features"),
        forward_bytes=features + logits,
        total_bytes=(features + logits) + (logits + features + features),
        forward_flops=2.0 * batch * _SOURCES * channels * side * side,
        total_flops=6.0 * batch * _SOURCES * channels * side * side,
        device=device,
    )


def _mask_loss_case(batch: int, channels: int, side: int, device: str, sizes: str, compiled: bool) -> KernelCase:
    def inputs(seed: int) -> Inputs:
        rng = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, device=device)

        return {
            "embedding": normal(batch, _SOURCES, channels) / math.sqrt(channels),
            "features": normal(batch, channels, side, side),
            "target": (normal(batch, _SOURCES, side, side).abs() * 0.7).clamp(0, 5),
            "weight": normal(batch, 1, side, side).abs().clamp(1e-3, 10),
        }

    def literal(inputs: Inputs) -> Sequence[Tensor]:
        """The published loss: masks of all sources, then the mean of w |M^ - M| source by source."""
        masks = torch.sigmoid(mask_head_reference(inputs["embedding"], inputs["features"]))
        weight, target = inputs["weight"][:, 0], inputs["target"]
        losses = [(weight * (masks[:, n] - target[:, n]).abs()).mean() for n in range(_SOURCES)]
        return (torch.stack(losses).mean(),)

    def ours(inputs: Inputs, backend: str) -> Sequence[Tensor]:
        parts = (inputs["embedding"], inputs["features"], inputs["target"], inputs["weight"])
        return (kernels.mask_head_losses(*parts, backend=backend).separation,)

    pixels = 4.0 * batch * side * side
    read = pixels * (channels + _SOURCES + 1)
    return KernelCase(
        name=f"mask_head with loss batch={batch}",
        op="mask_head",
        title="class vectors times mask features, weighted L1 of the masks, and both gradients",
        size=batch * channels * side * side,
        settings=f"batch {batch}, {_SOURCES} sources, {channels} channels, {side} x {side}, fp32",
        inputs=inputs,
        reference=lambda x: (
            mask_l1_reference(mask_head_reference(x["embedding"], x["features"]), x["target"], x["weight"]),
        ),
        variants=[
            Variant("eager", literal, gradient_tolerance=L1_GRADIENT_TOLERANCE),
            Variant(
                "torch.compile",
                torch.compile(literal, dynamic=False, fullgraph=True) if compiled else literal,
                unavailable="" if compiled else "not asked for (--compile), or a smaller batch",
                gradient_tolerance=L1_GRADIENT_TOLERANCE,
            ),
            Variant("torch", lambda x: ours(x, "torch"), ours=True, gradient_tolerance=L1_GRADIENT_TOLERANCE),
            _triton(
                lambda x: ours(x, "triton"),
                triton_unavailable("mask_head", device, sizes),
                gradient_tolerance=L1_GRADIENT_TOLERANCE,
            ),
        ],
        leaves=("embedding", "features"),
        forward_bytes=read,
        total_bytes=2 * read + pixels * channels,
        forward_flops=2.0 * batch * _SOURCES * channels * side * side,
        total_flops=6.0 * batch * _SOURCES * channels * side * side,
        device=device,
    )


def _mask_training_case(batch: int, channels: int, side: int, device: str, sizes: str) -> KernelCase:
    """What a step of ContAV-Sep asks for under mixed precision: features in bf16 and channels last, as the U-Net leaves
    them, and a teacher of half of the mixtures."""
    teacher_mixtures = max(1, batch // 2)

    def inputs(seed: int) -> Inputs:
        rng = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, device=device)

        def features(count: int) -> Tensor:
            return normal(count, channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)

        return {
            "embedding": (normal(batch, _SOURCES, channels) / math.sqrt(channels)).bfloat16(),
            "features": features(batch),
            "teacher_embedding": (normal(teacher_mixtures, _SOURCES, channels) / math.sqrt(channels)).bfloat16(),
            "teacher_features": features(teacher_mixtures),
            "target": (normal(batch, _SOURCES, side, side).abs() * 0.7).clamp(0, 5),
            "weight": normal(batch, 1, side, side).abs().clamp(1e-3, 10),
            "mixtures": torch.randperm(batch, generator=rng, device=device)[:teacher_mixtures],
            "counted": torch.arange(batch * _SOURCES, device=device).view(batch, _SOURCES) % _SOURCES == 0,
        }

    def reference(inputs: Inputs) -> Sequence[Tensor]:
        rows, counted = inputs["mixtures"], inputs["counted"]
        logits = mask_head_reference(inputs["embedding"], inputs["features"])
        with torch.no_grad():
            teacher = mask_head_reference(inputs["teacher_embedding"], inputs["teacher_features"])
        separation = mask_l1_reference(logits, inputs["target"], inputs["weight"])
        distillation = mask_l1_reference(
            logits[rows], teacher, inputs["weight"][rows], counted=counted[rows], target_is_logits=True
        )
        return separation, distillation

    def ours(inputs: Inputs, backend: str) -> Sequence[Tensor]:
        teacher = kernels.MaskTeacher(inputs["teacher_embedding"], inputs["teacher_features"], inputs["mixtures"])
        parts = (inputs["embedding"], inputs["features"], inputs["target"], inputs["weight"])
        return tuple(kernels.mask_head_losses(*parts, teacher=teacher, counted=inputs["counted"], backend=backend))

    pixels = float(batch * side * side)
    features = 2.0 * pixels * channels
    read = features * (1 + teacher_mixtures / batch) + 4.0 * pixels * (_SOURCES + 1)
    return KernelCase(
        name=f"mask_head in training batch={batch}",
        op="mask_head",
        title="both losses of a training step with a teacher, and both gradients",
        size=None,  # another type and layout than the backend table's
        settings=f"batch {batch}, teacher {teacher_mixtures}, {_SOURCES} sources, {channels} channels, "
        f"{side} x {side}, bf16, channels last",
        inputs=inputs,
        reference=reference,
        variants=[
            Variant(
                "torch",
                lambda x: ours(x, "torch"),
                ours=True,
                tolerance=BF16_TOLERANCE,
                gradient_tolerance=BF16_GRADIENT_TOLERANCE,
            ),
            _triton(
                lambda x: ours(x, "triton"),
                triton_unavailable("mask_head", device, sizes),
                tolerance=BF16_TOLERANCE,
                gradient_tolerance=BF16_GRADIENT_TOLERANCE,
            ),
        ],
        leaves=("embedding", "features"),
        forward_bytes=read,
        total_bytes=2 * read + features,
        forward_flops=2.0 * pixels * _SOURCES * channels * (1 + teacher_mixtures / batch),
        total_flops=2.0 * pixels * _SOURCES * channels * (2 * (1 + teacher_mixtures / batch) + 2),
        device=device,
    )


def clone_inputs(inputs: Inputs, leaves: Sequence[str], dtype: Any = None) -> dict[str, Tensor]:
    """Copies of one set; real tensors as ``dtype``, complex ones likewise; ``leaves`` ask for a gradient."""
    found = {}
    for name, value in inputs.items():
        copy = value.detach().clone()
        if dtype is not None and (copy.is_floating_point() or copy.is_complex()):
            copy = copy.to(torch.complex128 if copy.is_complex() and dtype == torch.float64 else dtype)
        found[name] = copy.requires_grad_(name in leaves)
    return found

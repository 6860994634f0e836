"""Speeds of the operations of ``avsep.kernels`` in every backend, with their peers: ``avsep bench kernels``.

Also ``python -m avsep.benchmarks.kernels``, which needs nothing but torch, NumPy and, for its variants, Triton.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avsep.benchmarks.kernel_cases import SIZES, Inputs, KernelCase, Variant, clone_inputs, free_bytes, kernel_cases
from avsep.benchmarks.measure import (
    CheckFailed,
    Timing,
    append_rows,
    check_results,
    elapsed_s,
    environment,
    interleaved,
    measure_case,
    peak_memory_bytes,
    system_load,
)
from avsep.benchmarks.plot import plot_rows, require_matplotlib
from avsep.errors import AvsepError, ConfigError
from avsep.kernels._backend import OPERATIONS

__all__ = [
    "COLUMNS",
    "Bar",
    "Ceilings",
    "bars",
    "calls_of",
    "check_case",
    "measure_ceilings",
    "measure_kernel_case",
    "propose_table",
    "run",
]

_TIMES = ("forward", "backward", "total")
COLUMNS = (
    "case",
    "op",
    "size",
    "variant",
    *(f"{what}{key}_ms" for what in _TIMES for key in ("", "_p20", "_p80")),
    "repeats",
    "iterations",
    "ratio",
    "peak_memory_mb",
    "least_mb",
    "gb_per_s",
    "floor_ms",
    "floor_share",
    "copy_gb_per_s",
    "tflop_per_s",
    "launch_us",
    "settings",
    "check",
    "note",
    "device",
    "threads",
    "load",
    "python",
    "torch",
    "triton",
    "cuda",
    "numpy",
    "avsep",
    "commit",
    "date",
)
"""Of the CSV file: see README.md beside this file."""

_SAMPLE_S = 5e-3  # of repeated calls in one timed sample
_MOST_CALLS = 1000
_MOST_SETS = 16  # of inputs that take turns
_CPU_CACHE_BYTES = 32e6  # its size is not asked for; typical of a last level


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do: bytes copied a second (read and written), FLOP a second of a matrix product
    in float32 accuracy, seconds of the smallest kernel when many follow one another."""

    bytes_per_s: float
    flop_per_s: float
    launch_s: float

    def floor_s(self, moved: float, flops: float, launches: int) -> float:
        """No form can be much faster: the longest of moving the bytes, the products and the launches."""
        return max(moved / self.bytes_per_s, flops / self.flop_per_s, launches * self.launch_s)


def measure_ceilings(device: str) -> Ceilings:
    """Measure the ceilings of a device, in about a second.

    On a GPU the product runs in fp16 and counts a third: three such products of numbers split into two halves have
    about float32's accuracy, which no faster unit gives.
    """
    gpu = device.startswith("cuda")
    count = (1 << 28) if gpu else (1 << 24)  # 1 GiB and 64 MiB
    source = torch.empty(count, device=device).normal_()
    target = torch.empty_like(source)
    copy = _median_s(lambda: target.copy_(source), device)
    side, dtype = (8192, torch.float16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = _median_s(lambda: a @ b, device)
    one = torch.zeros(1, device=device)
    launch = _median_s(one.zero_, device, iterations=200)
    return Ceilings(8.0 * count / copy, 2.0 * side**3 / product / (3 if gpu else 1), launch)


def _median_s(function: Callable[[], object], device: str, repeats: int = 10, iterations: int = 1) -> float:
    for _ in range(3):
        function()
    return Timing(tuple(elapsed_s(function, device, iterations) for _ in range(repeats))).median_ms / 1e3


# --- checking ---------------------------------------------------------------------------------------------------------


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _rows(x: Tensor, rows: Sequence[int] | None) -> Tensor:
    return x if rows is None or x.ndim == 0 else x[list(rows)]


@dataclass(frozen=True)
class _Expected:
    """Float64 outputs and gradients for one set of inputs, and the upstream gradients that were drawn for them."""

    inputs: Inputs
    upstream: Sequence[Tensor]
    outputs: Sequence[Tensor]
    gradients: Sequence[Tensor]


def _expected(case: KernelCase, variant: Variant, inputs: Inputs) -> _Expected:
    """What a variant should compute; one with a reference of its own takes inputs of its own."""
    if variant.prepare is not None:
        inputs = variant.prepare(inputs)
    leaves = case.leaves if variant.leaves is None else variant.leaves
    reference = variant.reference or case.reference
    exact = clone_inputs({k: _rows(v, case.checked_rows) for k, v in inputs.items()}, (), torch.float64)
    home = next(iter(exact.values())).device
    exact = {k: v.to(case.reference_device or home).requires_grad_(k in leaves) for k, v in exact.items()}
    outputs = reference(exact)
    rng = torch.Generator().manual_seed(11)
    upstream = [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o.device) for o in outputs]
    gradients = _gradients(outputs, [exact[name] for name in leaves], upstream) if leaves else []
    return _Expected(
        inputs,
        [u.to(home) for u in upstream],
        [o.detach().to(home) for o in outputs],
        [g.to(home) for g in gradients],
    )


def check_variant(case: KernelCase, variant: Variant, expected: _Expected) -> str:
    """Compare outputs and gradients with the float64 reference, both relative in the L2 norm.

    Raises :class:`CheckFailed` where they differ by more than the variant's tolerances, or are not finite.
    """
    leaves = case.leaves if variant.leaves is None else variant.leaves
    inputs = clone_inputs(expected.inputs, leaves)
    outputs = variant.run(inputs)
    if len(outputs) != len(expected.outputs):
        raise CheckFailed(f"{len(outputs)} outputs instead of {len(expected.outputs)}")
    errors = [_error(o, e, case.checked_rows) for o, e in zip(outputs, expected.outputs, strict=True)]
    said = [_say("outputs", max(errors), variant.tolerance)]
    if leaves:
        upstream = []
        for output, wanted in zip(outputs, expected.upstream, strict=True):
            whole = torch.zeros_like(output)
            if case.checked_rows is None or output.ndim == 0:
                whole.copy_(wanted)
            else:
                whole[list(case.checked_rows)] = wanted.to(whole.dtype)
            upstream.append(whole)
        found = _gradients(outputs, [inputs[name] for name in leaves], upstream)
        worst = max(_error(g, e, case.checked_rows) for g, e in zip(found, expected.gradients, strict=True))
        said.append(_say("gradients", worst, variant.gradient_tolerance))
    return "; ".join(said)


def check_case(case: KernelCase, variant: Variant) -> str:
    """Check one variant alone, on inputs drawn for it; see :func:`check_variant`."""
    return check_variant(case, variant, _expected(case, variant, case.inputs(1000)))


def _say(what: str, error: float, tolerance: float) -> str:
    if not error <= tolerance:
        raise CheckFailed(f"{what} differ from float64 by {error:.2g}, which is more than {tolerance:g}")
    return f"{what} within {error:.1g} (tolerance {tolerance:g})"


def _error(found: Tensor, expected: Tensor, rows: Sequence[int] | None) -> float:
    found = found.detach()
    part = _rows(found, rows)
    if part.shape != expected.shape or not bool(
        torch.isfinite(torch.view_as_real(found) if found.is_complex() else found).all()
    ):
        return math.inf
    wanted = torch.linalg.vector_norm(expected)
    error = torch.linalg.vector_norm(part.to(expected.dtype) - expected) / wanted.clamp_min(1e-30)
    return float(error)


# --- timing -----------------------------------------------------------------------------------------------------------


class _Turns:
    """Calls of a variant over sets of inputs that take turns, so that no input stays in a cache that would not hold
    it in use."""

    def __init__(self, case: KernelCase, variant: Variant, sets: Sequence[Inputs]) -> None:
        prepare = variant.prepare
        leaves = case.leaves if variant.leaves is None else variant.leaves
        # detached copies share the memory; a prepared set is the variant's own
        self._sets = [
            {k: v.detach().requires_grad_(k in leaves) for k, v in (prepare(s) if prepare else s).items()} for s in sets
        ]
        self._leaves, self._run = leaves, variant.run
        self._count = 0
        self._upstream: list[Tensor] = []

    def _next(self) -> Inputs:
        self._count += 1
        return self._sets[self._count % len(self._sets)]

    def forward(self) -> object:
        return self._run(self._next())

    def total(self) -> object:
        inputs = self._next()
        outputs = self._run(inputs)
        if not self._upstream:
            self._upstream = [torch.ones_like(o) for o in outputs]
        return torch.autograd.grad(outputs, [inputs[name] for name in self._leaves], self._upstream, allow_unused=True)


def _input_sets(case: KernelCase) -> list[Inputs]:
    first = case.inputs(0)
    size = sum(v.numel() * v.element_size() for v in first.values())
    gpu = case.device.startswith("cuda")
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size if gpu else _CPU_CACHE_BYTES
    count = min(_MOST_SETS if gpu else 3, math.ceil(2 * cache / size) + 1)
    return [first, *(case.inputs(seed) for seed in range(1, count))]


def calls_of(case: KernelCase, variant: Variant) -> tuple[Callable[[], object], Callable[[], object]]:
    """Functions without arguments that do a variant's forward pass, and its forward and backward pass, once."""
    turns = _Turns(case, variant, _input_sets(case))
    return turns.forward, turns.total


def measure_kernel_case(
    case: KernelCase,
    ceilings: Ceilings | None,
    *,
    repeats: int,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Check every variant of a case and time those that pass; one row a variant with the keys of :data:`COLUMNS`.

    A variant that cannot run here, or that fails, has a row without figures that says so.

    Args:
        case: what to measure.
        ceilings: of the device; None checks only.
        repeats: timed samples of each variant.
        say: is told what is being done.

    Returns:
        The rows, and what went wrong with the library's own variants.
    """
    shared = {
        "case": case.name,
        "op": case.op,
        "size": "" if case.size is None else case.size,
        "settings": case.settings,
        "load": system_load(),
        **environment(case.device),
        **gpu_versions(),
    }
    if any(v.name == "torch.compile" and not v.unavailable for v in case.variants):
        torch.compiler.reset()  # it compiles one function for a few sizes only, and refuses after that
    rows: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    inputs = case.inputs(1000)  # others than those that are timed
    expected: _Expected | None = None
    runnable: list[Variant] = []
    for variant in case.variants:
        row = rows[variant.name] = {"variant": variant.name, "note": variant.note, **shared}
        if variant.unavailable:
            row["note"] = f"not run: {variant.unavailable}"
            continue
        free = free_bytes(case.device)
        if variant.needs_bytes > free:
            row["note"] = f"not run: needs about {variant.needs_bytes / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
            continue
        say(f"{case.name}: checking {variant.name}")
        try:
            if variant.reference is not None:
                row["check"] = check_variant(case, variant, _expected(case, variant, inputs))
            else:
                expected = expected or _expected(case, variant, inputs)
                row["check"] = check_variant(case, variant, expected)
        except Exception as error:  # one variant's failing (a compiler's, a peer's) must not take the others along
            row["note"] = f"refused: {_one_line(error)}"
            if variant.ours:
                wrong.append(f"no speed is given for '{case.name}', {variant.name}: {_one_line(error)}")
            continue
        if variant.timed:
            runnable.append(variant)
    del expected, inputs
    _free(case.device)
    if ceilings is not None and runnable:
        say(f"{case.name}: timing")
        wrong += _time_variants(case, runnable, ceilings, repeats, rows)
    return list(rows.values()), wrong


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    prefix = "" if isinstance(error, AvsepError) else f"{type(error).__name__}: "
    return prefix + (text if len(text) <= 200 else text[:200] + " ...")


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _time_variants(
    case: KernelCase, variants: Sequence[Variant], ceilings: Ceilings, repeats: int, rows: Mapping[str, dict[str, Any]]
) -> list[str]:
    """Fill in the figures of the variants' rows; returns what went wrong with the library's own (memory, say)."""
    wrong: list[str] = []
    sets = _input_sets(case)
    functions: dict[str, Callable[[], object]] = {}
    iterations: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    timed: list[Variant] = []
    for variant in variants:
        turns = _Turns(case, variant, sets)
        kinds = {"forward": turns.forward, **({"total": turns.total} if case.leaves else {})}
        try:
            for function in kinds.values():
                for _ in range(2):  # compiles, chooses algorithms, fills the allocator
                    function()
                peaks[variant.name] = peak_memory_bytes(function, case.device)  # of total, where there is one
            once = {kind: elapsed_s(function, case.device) for kind, function in kinds.items()}
        except Exception as error:  # as in the check
            rows[variant.name]["note"] = f"failed: {_one_line(error)}"
            if variant.ours:
                wrong.append(f"no speed is given for '{case.name}', {variant.name}: {_one_line(error)}")
            continue
        timed.append(variant)
        for kind, function in kinds.items():
            key = f"{variant.name}/{kind}"
            functions[key] = function
            iterations[key] = max(1, min(_MOST_CALLS, math.ceil(_SAMPLE_S / once[kind])))
    timings = interleaved(
        functions, repeats, device=case.device, iterations=iterations, pause_s=0.0, queued=case.device_time
    )
    slowest = "total" if case.leaves else "forward"
    baseline = timings.get(f"{case.variants[0].name}/{slowest}")
    for variant in timed:
        forward = timings[f"{variant.name}/forward"]
        total = timings.get(f"{variant.name}/total")
        found = {"forward": forward}
        if total is not None:
            # neighbours in time, so that both met the same machine
            both = zip(total.times_s, forward.times_s, strict=True)
            found |= {"backward": Timing(tuple(t - f for t, f in both)), "total": total}
        row = rows[variant.name]
        for kind, timing in found.items():
            for key, share in (("", 50), ("_p20", 20), ("_p80", 80)):
                row[f"{kind}{key}_ms"] = _figures(timing.percentile_ms(share))
        whole = total or forward
        peak = peaks[variant.name]
        row |= {
            "repeats": repeats,
            "iterations": iterations[f"{variant.name}/{slowest}"],
            "ratio": "" if baseline is None else _figures(baseline.median_ms / whole.median_ms),
            "peak_memory_mb": "" if peak is None else round(peak / 1e6, 1),
        }
        if variant.reference is not None and variant.moves_bytes is None:
            continue  # a part: the case's bytes and floor are not its own
        moved = variant.moves_bytes or (case.total_bytes if case.leaves else case.forward_bytes)
        flops = case.total_flops if case.leaves else case.forward_flops
        floor = ceilings.floor_s(moved, flops, case.launches[1 if case.leaves else 0])
        row |= {
            "least_mb": _figures(moved / 1e6),
            "gb_per_s": _figures(moved / 1e6 / whole.median_ms),
            "floor_ms": _figures(floor * 1e3),
            "floor_share": _figures(floor * 1e3 / whole.median_ms),
            "copy_gb_per_s": _figures(ceilings.bytes_per_s / 1e9),
            "tflop_per_s": _figures(ceilings.flop_per_s / 1e12),
            "launch_us": _figures(ceilings.launch_s * 1e6),
        }
    del sets, functions
    _free(case.device)
    return wrong


def _figures(value: float) -> float:
    return float(f"{value:.4g}")


def gpu_versions() -> dict[str, str]:
    """The columns ``triton`` and ``cuda``, empty where there is none."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {"triton": triton, "cuda": torch.version.cuda or ""}


def unet_rows(repeats: int, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """The U-Net's case (identity 1) of ``avsep bench train`` on the CPU, in this table's columns.

    Raises :class:`MissingExtraError` where what the library itself needs is not installed.
    """
    try:
        from avsep.benchmarks.cases import unet_case
    except ImportError as error:
        raise ConfigError(f"the U-Net's case needs the library's own dependencies: {_one_line(error)}") from None
    say("unet: checking and timing")
    rows = []
    for row in measure_case(unet_case(), repeats):
        found = {key: row[key] for key in row if key in COLUMNS}
        found |= {
            f"total{key}_ms": row[old] for key, old in (("", "median_ms"), ("_p20", "p20_ms"), ("_p80", "p80_ms"))
        }
        rows.append({**found, "op": "unet", "iterations": 1, **gpu_versions()})
    return rows


# --- what came out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One demand, what was measured, and whether it is met (None: not to be said from what ran)."""

    what: str
    demanded: str
    measured: str
    met: bool | None


def _number(row: Mapping[str, Any] | None, key: str) -> float | None:
    if row is None or row.get(key, "") in ("", None):
        return None
    return float(row[key])


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The project's demands on speed and memory, of those whose cases are among ``rows``. The last row of a case and
    variant counts."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {(r["case"], r["variant"]): r for r in rows}
    cuda = any(str(r.get("cuda", "")) and "cores" not in str(r["device"]) for r in rows)
    out: list[Bar] = []

    def faster(case: str, peer: str, times: float, what: str, key: str = "total_ms", ours: str = "triton") -> None:
        mine, theirs = _number(found.get((case, ours)), key), _number(found.get((case, peer)), key)
        demanded = f"at least {times:g}x faster than {peer}"
        if mine is not None and theirs is not None:
            ratio = theirs / mine
            out.append(Bar(what, demanded, f"{ratio:.2f}x", ratio >= times))
        elif (case, ours) in found or (case, peer) in found:  # it was asked for, and there is no figure
            notes = [str(found[(case, v)].get("note", "")) for v in (ours, peer) if (case, v) in found]
            out.append(Bar(what, demanded, "nothing: " + (next(filter(None, notes), "") or "no such row"), None))

    if cuda:
        case = "similarity_distillation n=128"
        faster(case, "eager", 10, f"{case}, forward + backward")
        faster(case, "torch.compile", 2, f"{case}, forward + backward")
        out += _large_similarity_bars(found)
        for part in ("analysis", "synthesis"):
            case = f"stft {part} batch=32"
            faster(case, "eager", 3, f"{case}, forward", "forward_ms")
        for (case, variant), row in found.items():
            if case.startswith("stft pass") and variant == "triton":
                rate, copy = _number(row, "gb_per_s"), _number(row, "copy_gb_per_s")
                demanded = "at least 70 % of copy bandwidth"
                if rate is not None and copy:
                    share = rate / copy
                    out.append(Bar(case, demanded, f"{share:.0%}", share >= 0.7))
                else:
                    out.append(Bar(case, demanded, f"nothing: {row.get('note', '')}", None))
        case = "mask_head with loss batch=32"
        faster(case, "eager", 3, f"{case}, forward + backward")
        mine = _number(found.get((case, "triton")), "peak_memory_mb")
        theirs = _number(found.get((case, "eager")), "peak_memory_mb")
        if mine is not None and theirs:
            share, returned = mine / theirs, 32 * 32 * 256 * 256 * 4 / 1e6  # the features' gradient, which all return
            beyond = f"without the {returned:.0f} MB gradient that both return "
            beyond += f"{mine - returned:,.0f} and {theirs - returned:,.0f}"
            measured = f"{mine:,.0f} of {theirs:,.0f} MB, {share:.2f} ({beyond})"
            out.append(Bar(f"{case}, peak memory", "at most 1/3 of eager's", measured, share <= 1 / 3))
    faster("unet", "literal", 1.8, "unet, forward + backward on the CPU, batch 4", ours="avsep")
    return out


def _large_similarity_bars(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Bar]:
    n, out = 32768, []
    case = f"similarity_distillation n={n}"
    peak = _number(found.get((case, "triton")), "peak_memory_mb")
    if peak is not None:
        # eager does not fit at this size: its memory grows with n^2, so the largest size at which it was measured tells
        known = [
            (int(row["size"]), memory)
            for (name, variant), row in found.items()
            if variant == "eager" and name.startswith("similarity_distillation n=")
            if (memory := _number(row, "peak_memory_mb")) is not None and int(row["size"]) >= 1024
        ]
        if known:
            size, memory = max(known)
            eager = memory * (n / size) ** 2
            share, origin = peak / eager, "measured" if size == n else f"extrapolated from {memory:,.0f} MB at n={size}"
            measured = f"{peak:,.0f} MB, {share:.2%} of {eager:,.0f} MB ({origin})"
            out.append(Bar(f"{case}, peak memory", "under 2 % of eager's n x n", measured, share < 0.02))
    mine, theirs = (_number(found.get((case, v)), "total_ms") for v in ("triton", "inf_cl, log-sum-exps only"))
    if mine is not None and theirs is not None:
        measured = f"{mine:.1f} ms against {theirs:.1f} ms"
        out.append(Bar(f"{case}, forward + backward", "at or under inf_cl's time", measured, mine <= theirs))
    return out


def propose_table(rows: Iterable[Mapping[str, Any]]) -> dict[str, int | None]:
    """What ``_TRITON_FROM`` should say: the smallest measured size from which Triton was never slower than PyTorch.

    An operation's cases are taken together (analysis and synthesis share a line); None where Triton lost at the
    largest size. Operations that were not measured in both backends are not in the result.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for row in rows:
        time = _number(row, "total_ms") or _number(row, "forward_ms")
        if row["variant"] == "triton" and str(row.get("note", "")).startswith(("refused", "failed")):
            time = math.inf  # what is wrong or does not run has lost
        if row["variant"] in ("torch", "triton") and time is not None and row.get("size", "") not in ("", None):
            key = (str(row["op"]), str(row["case"]))
            times.setdefault(key, {})[str(row["variant"])] = time
            sizes[key] = int(row["size"])
    table: dict[str, int | None] = {}
    for op in OPERATIONS:
        won: dict[int, bool] = {}
        for key, t in times.items():
            if key[0] == op and len(t) == 2:
                won[sizes[key]] = won.get(sizes[key], True) and t["triton"] <= t["torch"]
        if not won:
            continue
        table[op] = None
        for size in sorted(won, reverse=True):
            if not won[size]:
                break
            table[op] = size
        if all(won.values()):
            table[op] = 0  # nothing smaller was measured, and it won wherever it was
    return table


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file that this module wrote. Raises :class:`ConfigError` for another kind of file."""
    if not Path(path).exists():
        raise ConfigError(f"no such file: {path}")
    check_results(path, COLUMNS)
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One case as plain text: a line a variant."""
    head = ["variant", "forward ms (20-80 %)", "backward ms (20-80 %)", "total ms", "ratio", "peak MB", "GB/s", "floor"]
    lines = [head]
    for row in rows:

        def cell(key: str, pattern: str = "{:.4g}", row: Mapping[str, Any] = row) -> str:
            value = _number(row, key)
            return "" if value is None else pattern.format(value)

        def span(kind: str, cell: Callable[[str], str] = cell) -> str:
            middle, low, high = (cell(f"{kind}{key}_ms") for key in ("", "_p20", "_p80"))
            return f"{middle} ({low}-{high})" if middle else ""

        lines.append(
            [
                str(row["variant"]),
                span("forward"),
                span("backward"),
                cell("total_ms"),
                cell("ratio", "{:.2f}x"),
                cell("peak_memory_mb", "{:,.1f}"),
                cell("gb_per_s"),
                cell("floor_share", "{:.1%}"),
            ]
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    text = []
    for number, line in enumerate(lines):
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
        note = rows[number - 1].get("note", "") if number else ""
        if note:
            text.append(f"    {note}")
    return "\n".join(text)


def bars_text(found: Sequence[Bar]) -> str:
    said = {True: "met", False: "NOT MET", None: "not known"}
    return "\n".join(f"bar: {b.what}: {b.demanded}; measured {b.measured}: {said[b.met]}" for b in found)


def table_of_backends_text(table: Mapping[str, int | None]) -> str:
    return "\n".join(["_TRITON_FROM proposed by these rows:", *(f"    {op!r}: {size}," for op, size in table.items())])


def run(
    ops: Sequence[str] = (),
    *,
    sizes: str = "paper",
    device: str = "cpu",
    repeats: int | None = None,
    out: str | Path | None = None,
    plot: str | Path | None = None,
    compiled: bool | None = None,
    check_only: bool = False,
    write: Callable[[str], None] = print,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure, print and keep the cases of these operations (``unet`` among them on the CPU; all when none is named).

    Args:
        ops: names of operations, or ``unet``.
        sizes: one of ``SIZES``.
        device: cpu or cuda.
        repeats: timed samples of each variant; 20 on a GPU and 7 on the CPU when None.
        out: CSV file to append to, or None.
        plot: picture to draw, or None.
        compiled: whether torch.compile is a peer; on a GPU when None.
        check_only: compare with the references and time nothing.
        write: is given the text of the tables.
        say: is told what is being done.

    Raises:
        ConfigError: for a name or device that does not exist, or another kind of file as ``out``.
        MissingExtraError: for a plot without matplotlib, said before anything is measured.
        CheckFailed: at the end, where a variant of the library's own failed its check; it has no speed.
    """
    chosen = [op for op in ops if op != "unet"]
    with_unet = device == "cpu" and not check_only and sizes in ("paper", "all") and (not ops or "unet" in ops)
    if "unet" in ops and not with_unet:
        raise ConfigError("the U-Net's case runs on the CPU with the sizes paper or all")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("this machine has no cuda device that PyTorch can use: --device cpu")
    if out is not None:
        check_results(out, COLUMNS)
    if plot is not None:
        require_matplotlib()
    if repeats is None:
        repeats = 20 if device.startswith("cuda") else 7
    cases: Iterable[KernelCase] = ()
    if chosen or not ops:
        cases = kernel_cases(chosen, sizes=sizes, device=device, compiled=compiled)
    ceilings = None
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []

    def keep(found: list[dict[str, Any]], title: str) -> None:
        rows.extend(found)
        if out is not None and not check_only:
            append_rows(out, found, COLUMNS)
        write(f"\n{found[0]['case']}: {title}\n{found[0]['settings']}")
        write("\n".join(_check_text(r) for r in found) if check_only else table_text(found))

    for case in cases:
        if ceilings is None and not check_only:
            say("measuring the device's ceilings")
            ceilings = measure_ceilings(device)
            write(
                f"{environment(device)['device']}: copies {ceilings.bytes_per_s / 1e9:,.0f} GB/s (read and written), "
                f"products {ceilings.flop_per_s / 1e12:.3g} TFLOP/s in float32 accuracy, "
                f"{ceilings.launch_s * 1e6:.2g} us a launch"
            )
        found, failed = measure_kernel_case(case, ceilings, repeats=repeats, say=say)
        keep(found, case.title)
        wrong += failed
    if with_unet:
        try:
            keep(unet_rows(max(3, repeats // 2), say), "the U-Net alone, forward and backward")
        except (ConfigError, CheckFailed) as error:
            (wrong if isinstance(error, CheckFailed) else []).append(str(error))
            write(f"\nunet: {error}")
    if reached := bars(rows):
        write("\n" + bars_text(reached))
    if not check_only and (table := propose_table(rows)):
        write("\n" + table_of_backends_text(table))
    if plot is not None and rows:
        draw(rows, plot)
    if wrong:
        raise CheckFailed("; ".join(wrong))
    return rows


def _check_text(row: Mapping[str, Any]) -> str:
    return f"  {row['variant']}: {row.get('check') or row.get('note')}"


def draw(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """A panel a case with the medians of forward and backward together (forward where there is no backward)."""
    drawn = []
    for row in rows:
        kind = "total" if _number(row, "total_ms") is not None else "forward"
        if _number(row, f"{kind}_ms") is None:
            continue
        times = {
            old: row[f"{kind}{key}_ms"] for key, old in (("", "median_ms"), ("_p20", "p20_ms"), ("_p80", "p80_ms"))
        }
        drawn.append({**row, **times, "ratio": row["ratio"] or "nan"})
    if drawn:
        plot_rows(drawn, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line that needs no typer; the exit code is 2 for a mistake, 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m avsep.benchmarks.kernels", description=__doc__)
    parser.add_argument("--op", action="append", default=[], help="operation, or unet; again for more [default: all]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sizes", default="paper", choices=SIZES)
    parser.add_argument("--repeats", type=int, help="timed samples [default: 20 on a GPU, 7 on the CPU]")
    parser.add_argument("--out", help="CSV file to append to")
    parser.add_argument("--plot", help="picture to draw; needs matplotlib")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile as a peer [default: on a GPU]"
    )
    parser.add_argument("--check-only", action="store_true", help="compare with the references, time nothing")
    parser.add_argument("--from-csv", metavar="CSV", help="print bars and backend table of rows measured before")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.from_csv:
            rows = read_rows(chosen.from_csv)
            print(bars_text(bars(rows)) or "no bar is about what was measured")
            if table := propose_table(rows):
                print(table_of_backends_text(table))
            if chosen.plot:
                require_matplotlib()
                draw(rows, chosen.plot)
            return 0
        run(
            chosen.op,
            sizes=chosen.sizes,
            device=chosen.device,
            repeats=chosen.repeats,
            out=chosen.out,
            plot=chosen.plot,
            compiled=chosen.compile,
            check_only=chosen.check_only,
            write=lambda text: print(text, flush=True),
            say=lambda text: print(f"... {text}", file=sys.stderr, flush=True),
        )
    except CheckFailed as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except AvsepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Timing two ways of doing the same thing in one run, and the rows that keep what came out."""

from __future__ import annotations

import csv
import ctypes
import gc
import io
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from avsep.environment import commit, device_name
from avsep.errors import AvsepError, ConfigError
from avsep.files import write_text
from avsep.progress import Progress

__all__ = [
    "COLUMNS",
    "Case",
    "CheckFailed",
    "Timing",
    "agree",
    "append_rows",
    "check_results",
    "elapsed_s",
    "environment",
    "interleaved",
    "measure_case",
    "peak_memory_bytes",
    "system_load",
]

PAUSE_S = 0.3  # before each timed call
COLUMNS = (
    "case",
    "variant",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "repeats",
    "ratio",
    "peak_memory_mb",
    "per_second",
    "item",
    "settings",
    "check",
    "device",
    "threads",
    "load",
    "python",
    "torch",
    "numpy",
    "avsep",
    "commit",
    "date",
)
"""Of the CSV files. ``ratio`` is the baseline's median over the variant's, so more than 1 is faster; ``peak_memory_mb``
is what one call needs beyond what was held before it; ``per_second`` counts ``item`` s; ``load`` is the machine's load
average of the last minute when the case began."""


class CheckFailed(AvsepError):
    """Two variants of a case do not do the same, so their speeds cannot be compared."""


@dataclass(frozen=True)
class Case:
    """One thing done in several ways.

    ``variants`` by name, the baseline first, each a function without arguments that does the thing once. ``check``
    compares what the variants compute, raises :class:`CheckFailed` where they differ by more than the case's tolerance,
    and returns how near they are. ``items`` of kind ``item`` are done in one call.
    """

    name: str
    title: str
    variants: Mapping[str, Callable[[], object]]
    check: Callable[[], str]
    item: str
    items: int
    settings: str = ""
    device: str = "cpu"
    in_process: bool = True  # False: other processes do the work, and their memory is not known
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        return next(iter(self.variants))


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat."""

    times_s: tuple[float, ...]

    def percentile_ms(self, share: float) -> float:
        return float(np.percentile(self.times_s, share)) * 1e3

    @property
    def median_ms(self) -> float:
        return self.percentile_ms(50)


def agree(what: str, error: float, tolerance: float) -> str:
    """``what`` differs by ``error``: raise :class:`CheckFailed` above ``tolerance`` (or for NaN), else say so."""
    if not error <= tolerance:
        raise CheckFailed(f"{what} differ by {error:.2g}, which is more than {tolerance:g}")
    return f"{what} within {error:.1g} (tolerance {tolerance:g})"


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    device: str = "cpu",
    done: Callable[[], None] | None = None,
    iterations: Mapping[str, int] | None = None,
    pause_s: float = PAUSE_S,
    queued: bool = False,
) -> dict[str, Timing]:
    """Time the variants in turn (A, B, A, B, ...), so that what else the machine does meets them alike.

    ``done`` is called after each. The first call of a variant is timed too: call each once before. ``iterations`` by
    name: so many calls one after another are one repeat, which is their mean (1 where it is not given). ``queued`` as
    in :func:`elapsed_s`.
    """
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1, got {repeats}")
    times: dict[str, list[float]] = {name: [] for name in variants}
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a repeat would be charged to it
    try:
        for _ in range(repeats):
            gc.collect()
            for name, function in variants.items():
                _synchronise(device)
                # The threads of the library before (OpenBLAS's, under mir_eval) spin on for a while after its call and
                # would be charged to this one.
                if pause_s:
                    time.sleep(pause_s)
                calls = 1 if iterations is None else iterations.get(name, 1)
                times[name].append(elapsed_s(function, device, calls, queued=queued))
                if done is not None:
                    done()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in times.items()}


_QUEUED_CYCLES = 100_000_000  # of a GPU's clock: some 50 ms, in which hundreds of calls are issued
_QUEUED_CALLS = 300  # a GPU's queue holds about a thousand launches before it makes Python wait


def elapsed_s(
    function: Callable[[], object], device: str = "cpu", iterations: int = 1, *, queued: bool = False
) -> float:
    """Seconds a call when it is called ``iterations`` times one after another; on a GPU by its own events.

    The calls are issued without waiting in between, so on a GPU a call costs the longer of its issue by Python and its
    work, as it does in a training step. With ``queued`` (a GPU alone) they are issued while the GPU is kept busy,
    before its clock starts: then a call costs its work.
    """
    if device.startswith("cuda"):
        import torch

        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if queued:
            iterations = min(iterations, _QUEUED_CALLS)
            torch.cuda._sleep(_QUEUED_CYCLES)
        start.record()
        for _ in range(iterations):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / iterations
    begin = time.perf_counter()
    for _ in range(iterations):
        function()
    return (time.perf_counter() - begin) / iterations


def measure_case(case: Case, repeats: int, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Check a case, then time it; one row a variant with the keys of :data:`COLUMNS`.

    Raises :class:`CheckFailed`, before anything is timed, when the variants do not agree.
    """
    progress = progress or Progress()
    bar = progress.add(case.name, total=1 + len(case.variants) * (1 + repeats))
    load = system_load()
    try:
        found = case.check()
    except CheckFailed as error:
        raise CheckFailed(f"no speed is given for '{case.name}': {error}") from None
    progress.advance(bar)
    peaks = {}
    for name, function in case.variants.items():  # also the warm-up
        peak = peak_memory_bytes(function, case.device)
        peaks[name] = peak if case.in_process else None
        progress.advance(bar)
    timings = interleaved(case.variants, repeats, device=case.device, done=lambda: progress.advance(bar))
    reference = timings[case.baseline].median_ms
    shared = {
        "repeats": repeats,
        "item": case.item,
        "settings": case.settings,
        "check": found,
        "load": load,
        **environment(case.device),
    }
    if case.versions:
        shared["settings"] += "".join(f", {name} {version}" for name, version in case.versions.items())
    rows = []
    for name, timing in timings.items():
        peak = peaks[name]
        rows.append(
            {
                "case": case.name,
                "variant": name,
                "median_ms": round(timing.median_ms, 3),
                "p20_ms": round(timing.percentile_ms(20), 3),
                "p80_ms": round(timing.percentile_ms(80), 3),
                "ratio": round(reference / timing.median_ms, 3),
                "peak_memory_mb": "" if peak is None else round(peak / 1e6, 1),
                "per_second": float(f"{case.items * 1e3 / timing.median_ms:.4g}"),
                **shared,
            }
        )
    return rows


def peak_memory_bytes(function: Callable[[], object], device: str = "cpu") -> int | None:
    """What one call needs beyond what the process (or the accelerator) held before it; None where that is unknown.

    On the CPU it is the process's high-water mark, which Linux can reset; small allocations that reuse freed memory do
    not show in it.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is held now
        held = _status_bytes("VmRSS")
    except OSError:
        function()
        return None
    function()
    return max(0, _status_bytes("VmHWM") - held)


def _return_freed_memory() -> None:
    """Give freed heap pages back to the system (glibc keeps them), so that they count when they are used again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library
        return


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def append_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows to a CSV file with these columns, which is made where it is missing.

    Raises :class:`ConfigError` when the file there has other columns.
    """
    path = Path(path)
    before = ""
    if path.exists():
        check_results(path, columns)
        before = path.read_text(encoding="utf-8")
        before += "" if before.endswith("\n") else "\n"
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerows(rows)
    write_text(path, before + buffer.getvalue())


def check_results(path: str | Path, columns: Sequence[str] = COLUMNS) -> None:
    """Raise :class:`ConfigError` unless ``path`` is missing or a CSV file with these columns."""
    path = Path(path)
    if not path.exists():
        return
    try:
        with open(path, encoding="utf-8", newline="") as file:
            found = next(csv.reader(file), [])
    except (UnicodeDecodeError, IsADirectoryError, csv.Error):
        found = []
    if found != list(columns):
        raise ConfigError(f"{path} is not a file of benchmark results (its columns are others): choose another --out")


# --- where and with what ----------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, Any]:
    """The columns of a row that say where and with what it was measured."""
    import torch

    import avsep

    return {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "avsep": avsep.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def system_load() -> float | str:
    """The machine's load average of the last minute; empty where it is not known."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return ""

"""What a stream costs: how late a separated sample comes out, and how long it takes to compute.

``avsep bench stream`` pushes noise block by block through bundles in the runtime, as a sound card would, and times
every block in which something is computed. Separators that go frame by frame take blocks of their graph's length; those
that take chunks compute once a chunk, in blocks of :data:`BLOCK_S`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.benchmarks.measure import agree, append_rows, check_results, environment, system_load
from avsep.environment import version_of
from avsep.errors import ConfigError
from avsep.export.runtime.reader import open_bundle
from avsep.export.runtime.separator import BundleSeparator
from avsep.files import write_text

__all__ = ["BLOCK_S", "COLUMNS", "PRESETS", "run", "table"]

Audio = NDArray[np.float32]

PRESETS = ("causal_small", "aligned_1s", "aligned")
BLOCK_S = 0.01
"""Seconds of a block that is pushed to a separator of chunks."""
_WARM_UP = 3  # computed blocks that are not counted
_CALIBRATION = 8  # synthetic mixtures
_TOLERANCE = 1e-5
_SHARED_LOAD = 0.5  # load average a core above which others had the machine too
COLUMNS = (
    "stream",
    "way",
    "provider",
    "delay_ms",
    "computing_ms",
    "computing_p99_ms",
    "processor_ms",
    "processor_p99_ms",
    "real_time_factor",
    "processor_real_time_factor",
    "block_samples",
    "computed_blocks",
    "seconds",
    "settings",
    "check",
    "note",
    "device",
    "threads",
    "load",
    "python",
    "torch",
    "onnxruntime",
    "numpy",
    "avsep",
    "commit",
    "date",
)
"""Of the CSV file: ``delay_ms`` the algorithmic delay, the most time between a sample's arrival and its coming out
without the computing; ``computing_ms`` and ``computing_p99_ms`` median and 99th percentile of the time that a block
takes in which something is computed, by the clock, and ``processor_...`` by the processor time of the thread that
pushes, which other work on the machine does not count in (with one thread of ONNX Runtime it is all that computes);
``real_time_factor`` seconds of computing for a second of sound, over the whole stream."""


def run(
    bundles: Sequence[str | os.PathLike[str]] = (),
    *,
    presets: Sequence[str] = (),
    precision: Sequence[str] = ("fp32",),
    seconds: float = 60.0,
    sources: int = 2,
    provider: str = "cpu",
    threads: int = 1,
    out: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure streams, one after the other.

    Args:
        bundles: of ``avsep export``, whose classes can go unseen, in every precision that they hold; without any and
            without ``presets`` :data:`PRESETS`.
        presets: names or files whose untrained separators are exported and measured; weights do not change the time.
        precision: of the graphs of presets, ``fp32``, ``fp16`` and ``int8``, whose ranges come from synthetic mixtures.
        seconds: of sound in each stream.
        sources: that are asked for.
        provider: of the runtime.
        threads: of ONNX Runtime.
        out: CSV file to append to; :func:`table` of all its rows is written beside it.

    Returns:
        A row a stream with the keys of :data:`COLUMNS`.

    Raises:
        ConfigError: less sound than two chunks, a separator that needs pictures, or another kind of file as ``out``.
        CheckFailed: a stream does not give what the separator gives of the whole.
        ExportError, MissingExtraError: as the export and the runtime.
    """
    from avsep.progress import progress_bar

    if out is not None:
        check_results(out, COLUMNS)
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds must be positive, got {seconds}")
    if not bundles and not presets:
        presets = PRESETS
    rows = []
    with ExitStack() as stack:
        bars = stack.enter_context(progress_bar(progress))
        bar = bars.add("streams", total=len(bundles) + len(presets))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avsep-bench-")))
        for name, bundle in _all(bundles, presets, precision, folder, sources):
            bars.advance(bar, 0, note=name)
            kinds = ("separator", "spectral", "stream")
            with ExitStack() as opened:
                one = opened.enter_context(open_bundle(bundle))
                separators = [
                    opened.enter_context(BundleSeparator.load(one, provider, graph.precision, threads))
                    for graph in one.graphs
                    if graph.kind in kinds
                ]
                rows += _rows(name, separators, seconds, sources, threads)
            bars.advance(bar)
    if out is not None:
        append_rows(out, rows, COLUMNS)
        write_text(Path(out).with_suffix(".md"), table(rows))
    return rows


def _all(
    bundles: Sequence[str | os.PathLike[str]],
    presets: Sequence[str],
    precision: Sequence[str],
    folder: Path,
    sources: int,
) -> Iterator[tuple[str, Path]]:
    for bundle in bundles:
        yield Path(bundle).name, Path(bundle)
    for number, preset in enumerate(presets):
        from avsep.export.build.gate import synthetic_batches
        from avsep.export.build.plan import ExportPlan
        from avsep.export.bundle.export import export
        from avsep.separator import build_separator

        names = [f"class {k}" for k in range(max(sources, 2))]
        separator = build_separator(preset, classes=names, seed=0).eval().requires_grad_(False)
        plan = ExportPlan(sources=sources, precision=tuple(precision))
        made = export(
            separator, plan, folder / str(number), calibration=synthetic_batches(separator, plan, _CALIBRATION)
        )
        yield f"{Path(preset).stem} (untrained)", made.path


def _rows(
    name: str, separators: Sequence[BundleSeparator], seconds: float, sources: int, threads: int
) -> list[dict[str, Any]]:
    """A row for each precision of a bundle; each block goes through all of them in turn."""
    separator = separators[0]
    if not separator.can_go_unseen and separator.visual_sources:
        raise ConfigError(f"{name} needs pictures of every source: take a separator that can go without")
    rate = separator.sample_rate_hz
    total = round(seconds * rate)
    if total < 2 * separator.clip_samples:
        raise ConfigError(
            f"{seconds:g} s are less than two chunks of {name} ({2 * separator.clip_samples / rate:.1f} s)"
        )
    asked = separator.classes[:sources]
    block = separator.block_samples or max(1, round(BLOCK_S * rate))
    mixture = _noise(total)
    load = system_load()
    checks = [_checked(one, mixture, asked, block) for one in separators]
    streams = [one.stream(asked) for one in separators]
    spent: list[list[tuple[float, float]]] = [[] for _ in separators]
    computing: list[list[tuple[float, float]]] = [[] for _ in separators]
    for start in range(0, total, block):
        for k, (one, stream) in enumerate(zip(separators, streams, strict=True)):
            before = one.calls
            took, _ = _pushed(stream, mixture[start : start + block])
            spent[k].append(took)
            if one.calls > before:
                computing[k].append(took)
    return [
        _row(name, one, spent[k], computing[k], seconds, (checks[k], load, block, len(asked), threads))
        for k, one in enumerate(separators)
    ]


def _checked(separator: BundleSeparator, mixture: Audio, asked: Sequence[str], block: int) -> str:
    """That a stream gives what the separator gives of the whole, in words."""
    separator.warm_up()
    head = mixture[: 2 * separator.clip_samples + block]
    stream = separator.stream(asked)
    pieces = [head[start : start + block] for start in range(0, head.shape[-1], block)]
    found = np.concatenate([*(_pushed(stream, piece)[1] for piece in pieces), stream.flush()], axis=-1)
    error = float(np.abs(found - separator.separate(head, None, asked)).max())
    return agree("stream and whole", error, _TOLERANCE)


def _row(
    name: str,
    separator: BundleSeparator,
    spent: Sequence[tuple[float, float]],
    computing: Sequence[tuple[float, float]],
    seconds: float,
    about: tuple[str, Any, int, int, int],
) -> dict[str, Any]:
    """The row of a stream, of what its blocks took and those in which something was computed."""
    check, load, block, sources, threads = about
    rate = separator.sample_rate_hz
    total = round(seconds * rate)
    by_clock, by_processor = np.array(computing[min(_WARM_UP, len(computing) // 4) :]).T
    factors = np.array(spent).sum(axis=0) / (total / rate)
    note = ""
    cores = os.cpu_count() or 1
    if isinstance(load, float) and load > _SHARED_LOAD * cores:
        note = f"the machine was shared with other work (load {load:g} on {cores} cores)"
    settings = f"{rate} Hz, {sources} sources, "
    settings += "frame by frame" if separator.causal else f"chunks of {separator.clip_samples / rate:.2f} s"
    settings += f", {separator.precision}, {separator.bundle.size(separator.graph.file) / 1e6:.2f} MB"
    return {
        "stream": name,
        "way": "frame by frame" if separator.causal else "chunks",
        "provider": separator.provider,
        "delay_ms": round(1e3 * separator.latency_samples / rate, 1),
        "computing_ms": round(1e3 * float(np.median(by_clock)), 3),
        "computing_p99_ms": round(1e3 * float(np.percentile(by_clock, 99)), 3),
        "processor_ms": round(1e3 * float(np.median(by_processor)), 3),
        "processor_p99_ms": round(1e3 * float(np.percentile(by_processor, 99)), 3),
        "real_time_factor": float(f"{factors[0]:.4g}"),
        "processor_real_time_factor": float(f"{factors[1]:.4g}"),
        "block_samples": block,
        "computed_blocks": len(by_clock),
        "seconds": seconds,
        "settings": settings,
        "check": check,
        "note": note,
        "load": load,
        "onnxruntime": version_of("onnxruntime").replace("unknown", version_of("onnxruntime-gpu")),
        **{**environment("cpu"), "threads": threads},
    }


def _pushed(stream: Any, block: Audio) -> tuple[tuple[float, float], Audio]:
    """Seconds that a block took, by the clock and of this thread's processor time, and what came of it."""
    begin, used = time.perf_counter(), time.thread_time()
    out = stream.push(block)
    return (time.perf_counter() - begin, time.thread_time() - used), out


def _noise(samples: int) -> Audio:
    rng = np.random.default_rng(0)
    envelope = 0.55 + 0.45 * np.sin(np.arange(samples) * 2e-4)
    found: Audio = (0.05 * envelope * rng.standard_normal(samples)).astype(np.float32)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, with where they were measured."""
    lines = [
        "| stream | delay | a block by the clock: median, p99 | by processor time: median, p99 | real-time factor: "
        "clock, processor time |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['stream']}`, {row['settings']} | {row['delay_ms']:g} ms | {row['computing_ms']:.3g}, "
            f"{row['computing_p99_ms']:.3g} ms | {row['processor_ms']:.3g}, {row['processor_p99_ms']:.3g} ms | "
            f"{row['real_time_factor']:.3g}, {row['processor_real_time_factor']:.3g} |"
        )
    first = rows[0]
    threads = "1 thread" if first["threads"] == 1 else f"{first['threads']} threads"
    lines += [
        "",
        f"{first['device']}, {threads}, {first['provider']} of ONNX Runtime {first['onnxruntime']}, {first['date']}. "
        "The delay is the most time between a sample's arrival and its coming out, without the computing; a block "
        "counts in which something was computed.",
    ]
    if shared := [row for row in rows if row["note"]]:
        loads = ", ".join(f"{row['load']:g}" for row in shared)
        lines.append(f"The machine was shared with other work (load average before each stream: {loads}).")
    return "\n".join(lines) + "\n"

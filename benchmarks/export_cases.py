"""One exported bundle in every way that this machine can run it: ``avsep bench export [BUNDLE] [--run RUN]``.

Without a bundle it is an untrained separator of a preset, exported here where the exporter is installed; without that
its PyTorch forms remain. All ways get the same chunk of audio and must give the golden output within the graph's
tolerance, or have no speed. They are timed in turn, in one run, with one number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avsep.benchmarks.measure import (
    CheckFailed,
    append_rows,
    check_results,
    environment,
    interleaved,
    system_load,
)
from avsep.benchmarks.plot import plot_rows, require_matplotlib
from avsep.environment import version_of
from avsep.errors import AvsepError, ConfigError, ExportError, MissingExtraError
from avsep.export.runtime.calls import GraphCall
from avsep.export.runtime.manifest import PRESENCE
from avsep.export.runtime.reader import Bundle, Graph, open_bundle
from avsep.export.runtime.sessions import (
    ENGINES,
    GRAPH_PROVIDERS,
    ONNX_PROVIDERS,
    OPENVINO,
    Engine,
    OnnxSession,
    check_provider,
    open_session,
)
from avsep.export.runtime.transforms import istft
from avsep.export.runtime.verify import compare

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from avsep.export.build.plan import ExportPlan
    from avsep.separator import Separator
    from avsep.types import VisualFeatures

__all__ = ["COLUMNS", "run"]

Array = NDArray[Any]

_MIXTURES = 4  # that the drift of SDR is measured on, at most

COLUMNS = (
    "case",
    "variant",
    "provider",
    "precision",
    "median_ms",
    "p95_ms",
    "p20_ms",
    "p80_ms",
    "repeats",
    "ratio",
    "ratio_onnxruntime",
    "real_time_factor",
    "start_ms",
    "max_error",
    "error_db",
    "sdr_drift_db",
    "drift_on",
    "process_mb",
    "device_mb",
    "file_mb",
    "plan_mb",
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
"""Of the CSV file: ``provider`` is what really ran; ``ratio`` the first variant's median over this one's, and
``ratio_onnxruntime`` that of ONNX Runtime on the CPU with the fp32 graph; ``real_time_factor`` seconds of computing for
a second of audio, by the median; ``start_ms`` from importing the library to the first answer, in a process of its own;
``max_error`` and ``error_db`` the largest difference from the golden output, and its energy; ``sdr_drift_db`` the
largest change of a source's SDR from PyTorch's, and ``drift_on`` of what mixtures: ``held-out`` ones of the run, or
``synthetic`` ones; ``process_mb`` the most memory that a
process of its own held which loads the graph and runs it once (Linux alone tells), and ``device_mb`` the GPU's memory
that it holds after that, beyond what the CUDA context takes of itself; ``file_mb`` and ``plan_mb`` the sizes of the
graph (of PyTorch the weights) and of the engine; ``note`` why there is no speed, or what is odd."""


_OF_RUNTIME = (ONNX_PROVIDERS["cpu"], "fp32")


@dataclass
class _Variant:
    """One way: ``call`` takes the chunk to waveforms, ``process`` says how to do the same in another process."""

    name: str
    provider: str
    precision: str
    call: Callable[[], Array]
    tolerance: float
    process: Sequence[str] = ()
    file_mb: float | str = ""
    plan_mb: float | str = ""
    note: str = ""
    check: str = ""
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]] | None = None
    """Of a graph: from its inputs to its outputs, by name."""
    graph: Graph | None = None
    max_error: float | str = ""
    error_db: float | str = ""
    drift: tuple[float | str, str] = ("", "")


@dataclass(frozen=True)
class _Skipped:
    """A way that this machine cannot go, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class _OwnProcess:
    """What a variant took in a process of its own; empty where that is not known."""

    host_mb: float | str = ""
    device_mb: float | str = ""
    start_ms: float | str = ""


@dataclass(frozen=True)
class _Chunk:
    """What all variants compute: a golden mixture [B, L] or [B, C, L] with its features, and the waveforms due."""

    mixture: Array
    inputs: Mapping[str, Array]
    expected: Array
    seconds: float


def run(
    bundle: str | os.PathLike[str] | None = None,
    *,
    run: str | os.PathLike[str] | None = None,
    task: int | None = None,
    preset: str = "aligned",
    batch: int = 1,
    device: str | None = None,
    providers: Sequence[str] = (),
    threads: int = 0,
    repeats: int = 15,
    compiled: bool = True,
    memory: bool = True,
    out: str | Path | None = None,
    plot: str | Path | None = None,
    console: Console | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure, print and keep a bundle's speeds.

    Args:
        bundle: None for an untrained separator of ``preset``, of ``batch`` mixtures a call.
        run: the run (with ``task``) or saved separator that the bundle was made from, for PyTorch's rows.
        device: ``cpu`` or ``cuda``, the only one that PyTorch runs on, and ONNX Runtime by its provider; all that are
            here when None.
        providers: of ONNX Runtime and engines; those of ``device``, or all that are here, when empty.
        threads: of PyTorch, ONNX Runtime and OpenVINO; as many as the machine has cores when 0.
        repeats: timed calls of each variant.
        compiled: whether torch.compile is among them; compiling takes a minute or two.
        memory: whether to measure memory, each in a process of its own.
        out: CSV file to append to.
        plot: picture to draw.

    Returns:
        A row a variant with the keys of :data:`COLUMNS`; variants that did not run have a note and no numbers.

    Raises:
        ExportError: the bundle is damaged.
        ConfigError, UnknownNameError: an unknown provider, a run of another separator, or another kind of file as
            ``out``; a device that is not here.
        MissingExtraError: a plot without matplotlib.
        CheckFailed: after all, where a variant answered something else; it has no speed.
    """
    from avsep.progress import progress_bar, terminal

    if out is not None:
        check_results(out, COLUMNS)
    if plot is not None:
        require_matplotlib()
    for name in providers:
        check_provider(name, (*GRAPH_PROVIDERS, *ENGINES))
    if threads < 0 or repeats < 1:
        raise ConfigError(f"threads must not be negative and repeats at least 1, got {threads} and {repeats}")
    if bundle is None and run is not None:
        raise ConfigError("--run is what a bundle was made from: name the bundle too")
    devices, providers = _places(device, providers)
    threads = threads or os.cpu_count() or 1
    console = console or terminal()
    with contextlib.ExitStack() as stack:
        bars = stack.enter_context(progress_bar(progress))
        bar = bars.add("loading", total=None)
        found: list[_Variant | _Skipped] = []
        separator: Separator | None = None
        if bundle is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avsep-bench-")))
            separator, given, plan = _untrained(preset, batch)
            chunk = _own_chunk(separator, given, plan)
            name, rate_hz = f"{Path(preset).stem} (untrained)", separator.spec.front_end.sample_rate_hz
            found += _torch_variants(separator, chunk, devices, threads, compiled)
            bars.advance(bar, note="exporting")
            try:
                opened = stack.enter_context(open_bundle(_exported(separator, plan, folder / "bundle")))
                found += _graph_variants(opened, _graphs_of(opened), chunk, providers, threads)
            except (MissingExtraError, ExportError) as error:
                found.append(_Skipped("ONNX Runtime", str(error)))
        else:
            opened = stack.enter_context(open_bundle(bundle))
            graphs = _graphs_of(opened)
            chunk, name, rate_hz = _chunk(opened, graphs[0]), opened.name, opened.sample_rate_hz
            if run is None:
                found.append(_Skipped("PyTorch", "name what the bundle was made from (--run RUN)"))
            else:
                variants, separator = _torch_of_run(opened, chunk, run, task, devices, threads, compiled)
                found += variants
            found += _graph_variants(opened, graphs, chunk, providers, threads)
        load = system_load()
        good, refused = _checked(found, chunk, lambda name: bars.advance(bar, note=name))
        if separator is not None and any(variant.graph is None for variant in good):  # PyTorch has these weights
            bars.advance(bar, note="drift of SDR")
            _measure_drift(good, separator, run, task)
        if not good:
            reasons = "; ".join([*(f"{s.name}: {s.reason}" for s in found if isinstance(s, _Skipped)), *refused])
            raise CheckFailed(f"nothing here runs this bundle: {reasons}")
        peaks: dict[str, _OwnProcess] = {}
        for variant in good:
            bars.advance(bar, note=f"memory of {variant.name}")
            peaks[variant.name] = _peak_mb(variant.process) if memory else _OwnProcess()
        bars.update(bar, 1, 1)
        timed = bars.add("timing", total=len(good) * repeats)
        timings = interleaved({v.name: v.call for v in good}, repeats, done=lambda: bars.advance(timed))
        shared = {
            "case": f"export {name}",
            "repeats": repeats,
            "settings": _settings(chunk, rate_hz),
            "load": load,
            "threads": threads,
            "onnxruntime": version_of("onnxruntime").replace("unknown", version_of("onnxruntime-gpu")),
            **{name: value for name, value in _environment().items() if name != "threads"},
        }
    reference = timings[good[0].name].median_ms
    runtime = next((timings[v.name].median_ms for v in good if (v.provider, v.precision) == _OF_RUNTIME), None)
    rows: list[dict[str, Any]] = []
    for item in found:
        if isinstance(item, _Skipped):
            rows.append(
                {**dict.fromkeys(COLUMNS, ""), **shared, "variant": item.name, "note": f"skipped: {item.reason}"}
            )
            continue
        row = {**dict.fromkeys(COLUMNS, ""), **shared, "variant": item.name, "provider": item.provider}
        row.update(
            precision=item.precision, file_mb=item.file_mb, plan_mb=item.plan_mb, check=item.check, note=item.note
        )
        if item in good:
            timing = timings[item.name]
            row.update(
                median_ms=round(timing.median_ms, 3),
                p95_ms=round(timing.percentile_ms(95), 3),
                p20_ms=round(timing.percentile_ms(20), 3),
                p80_ms=round(timing.percentile_ms(80), 3),
                ratio=round(reference / timing.median_ms, 3),
                ratio_onnxruntime="" if runtime is None else round(runtime / timing.median_ms, 3),
                real_time_factor=float(f"{timing.median_ms / 1e3 / chunk.seconds:.4g}"),
                start_ms=peaks[item.name].start_ms,
                process_mb=peaks[item.name].host_mb,
                device_mb=peaks[item.name].device_mb,
                max_error=item.max_error,
                error_db=item.error_db,
                sdr_drift_db=item.drift[0],
                drift_on=item.drift[1],
            )
        rows.append(row)
    if out is not None:
        append_rows(out, rows, COLUMNS)
    _print(console, rows)
    if plot is not None:
        plot_rows([row for row in rows if row["median_ms"] != ""], plot)
    if refused:
        raise CheckFailed("; ".join(refused))
    return rows


def _places(device: str | None, providers: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """PyTorch's devices and the providers; empty for all that are here."""
    if device is None:
        return (), providers
    from avsep.environment import pick_device

    kind = pick_device(device).type
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"an exported bundle is compared on cpu or cuda, not on {kind}")
    return (kind,), providers or (kind,)


# --- what is computed -------------------------------------------------------------------------------------------------


def _graphs_of(bundle: Bundle) -> list[Graph]:
    found = [graph for graph in bundle.graphs if graph.kind in ("separator", "spectral")]
    if not found:
        raise ConfigError(f"{bundle.path} goes frame by frame: avsep bench stream measures it")
    return found


def _untrained(preset: str, batch: int) -> tuple[Separator, dict[str, Array], ExportPlan]:
    """A preset's separator of three classes with its first weights, and golden inputs of its graph."""
    from avsep.export.build.golden import golden_inputs
    from avsep.export.build.graph import fitted
    from avsep.export.build.plan import ExportPlan, tensor_specs
    from avsep.separator import build_separator

    plan = ExportPlan(batch=batch)
    separator = build_separator(preset, classes=("a", "b", "c"), seed=0).eval().requires_grad_(False)
    if separator.causal:
        raise ConfigError(f"preset '{preset}' goes frame by frame: avsep bench stream measures it")
    separator = fitted(separator, plan)
    inputs, _ = tensor_specs(separator, plan)
    given = golden_inputs(inputs, separator.num_classes, separator.spec.front_end.sample_rate_hz, plan.seed)
    return separator, given, plan


def _own_chunk(separator: Separator, given: Mapping[str, Array], plan: ExportPlan) -> _Chunk:
    """What the separator answers on the CPU, as it is."""
    import torch

    inputs = {name: array for name, array in given.items() if name != "mixture"}
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    mixture = given["mixture"]
    with torch.inference_mode():
        expected = separator.separate(torch.from_numpy(mixture), _visual(tensors), tensors["class_ids"]).numpy()
    return _Chunk(mixture, inputs, expected, plan.batch * mixture.shape[-1] / separator.spec.front_end.sample_rate_hz)


def _exported(separator: Separator, plan: ExportPlan, folder: Path) -> Path:
    from avsep.export.bundle.export import export

    return Path(export(separator, plan, folder).path)


def _chunk(bundle: Bundle, graph: Graph) -> _Chunk:
    inputs, outputs = bundle.golden(graph)
    (output,) = (array for name, array in outputs.items() if name != PRESENCE)
    transform = bundle.manifest["transform"]
    length = int(transform["clip_samples"])
    features = {name: array for name, array in inputs.items() if name not in ("mixture", "spectrum")}
    if graph.kind == "spectral":
        mixture = istft(inputs["spectrum"], hop=transform["hop"], length=length)
        expected = np.clip(istft(output, hop=transform["hop"], length=length), -1, 1)
    else:
        mixture, expected = inputs["mixture"], output
    return _Chunk(mixture, features, expected, mixture.shape[0] * length / bundle.sample_rate_hz)


def _graph_call(bundle: Bundle, graph: Graph, engine: Engine, chunk: _Chunk) -> Callable[[], Array]:
    """Waveform to waveforms, as the runtime calls a graph: the transforms of a spectral one in NumPy."""

    spectral, channels = graph.kind == "spectral", int(bundle.manifest.get("channels", 1))
    call = GraphCall(engine.run, spectral, bundle.manifest["transform"], channels=channels)
    return lambda: call(chunk.mixture, chunk.inputs)


def _graph_variants(
    bundle: Bundle, graphs: Iterable[Graph], chunk: _Chunk, providers: Sequence[str], threads: int
) -> list[_Variant | _Skipped]:
    """ONNX Runtime by every provider, OpenVINO and the engines that are here, each for every precision."""
    found: list[_Variant | _Skipped] = []
    others = (OPENVINO, *ENGINES)
    try:
        import onnxruntime

        here = onnxruntime.get_available_providers()
        providers = providers or [*(name for name, full in ONNX_PROVIDERS.items() if full in here), *others]
    except ImportError:
        found.append(_Skipped("ONNX Runtime", "onnxruntime is not installed"))
        providers = [name for name in providers or others if name in others]
    for provider in providers:
        for graph in graphs:
            label = f"{'ONNX Runtime ' if provider in ONNX_PROVIDERS else ''}{provider} {graph.precision}"
            note: str = ""
            plan_mb: float | str = ""
            try:
                if provider in ONNX_PROVIDERS:
                    session = OnnxSession(bundle, graph, provider, threads, fall_back=True)
                    engine: Engine = session
                    name = f"ONNX Runtime {session.provider.removesuffix('ExecutionProvider')} {graph.precision}"
                    if session.provider != ONNX_PROVIDERS[provider]:
                        note = f"{ONNX_PROVIDERS[provider]} was asked for and does not load here"
                        name += f", not {provider}"
                else:
                    ((engine,), _) = open_session(bundle, [graph], provider, threads)
                    name = f"{'OpenVINO CPU' if provider == OPENVINO else engine.provider} {graph.precision}"
                    built = getattr(engine, "built", None)
                    plan_mb = "" if built is None else round(built.plan.stat().st_size / 1e6, 1)
            except AvsepError as error:
                found.append(_Skipped(label, str(error)))
                continue
            found.append(
                _Variant(
                    name=name,
                    provider=engine.provider,
                    precision=graph.precision,
                    call=_graph_call(bundle, graph, engine, chunk),
                    tolerance=graph.tolerance,
                    process=("graph", str(bundle.path), graph.file, provider, str(threads)),
                    file_mb=round(bundle.size(graph.file) / 1e6, 1),
                    plan_mb=plan_mb,
                    note=note,
                    run=engine.run,
                    graph=graph,
                )
            )
    return found


def _torch_of_run(
    bundle: Bundle,
    chunk: _Chunk,
    run: str | os.PathLike[str],
    task: int | None,
    devices: Sequence[str],
    threads: int,
    compiled: bool,
) -> tuple[list[_Variant | _Skipped], Separator | None]:
    """PyTorch with the weights that the bundle has, and the separator."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return [_Skipped("PyTorch", "torch is not installed")], None
    process = ("torch", str(bundle.path), str(run), "" if task is None else str(task))
    separator = _separator(bundle, run, task)
    return _torch_variants(separator, chunk, devices, threads, compiled, process), separator


def _torch_variants(
    separator: Separator,
    chunk: _Chunk,
    devices: Sequence[str],
    threads: int,
    compiled: bool,
    process: Sequence[str] = (),
) -> list[_Variant | _Skipped]:
    """PyTorch as it is and compiled, on the CPU and on a GPU where one is, or on ``devices`` alone. ``process`` begins
    what :func:`_in_own_process` is to be told."""
    import torch

    torch.set_num_threads(threads)
    megabytes = sum(p.numel() * p.element_size() for p in separator.parameters()) / 1e6
    found: list[_Variant | _Skipped] = []
    for device in devices or ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        place = "" if device == "cpu" else f" {device}"
        eager = functools.partial(_Variant, precision="fp32", tolerance=1e-3, file_mb=round(megabytes, 1))
        own = (*process, device, str(threads)) if process else ()
        call = _torch_call(separator, chunk, device, False)
        found.append(eager(name=f"PyTorch eager{place}", provider=f"torch {device}", call=call, process=own))
        name = f"torch.compile{place}"
        if not compiled:
            found.append(_Skipped(name, "left out (--no-compile)"))
        elif device == "cpu" and not _has_compiler():
            found.append(_Skipped(name, "there is no C++ compiler here"))
        else:
            call = _torch_call(separator, chunk, device, True)
            found.append(eager(name=name, provider=f"torch {device}, compiled", call=call))
    return found


def _separator(bundle: Bundle, run: str | os.PathLike[str], task: int | None) -> Separator:
    """The run's separator, for the bundle's length, held against the bundle's spec."""
    from avsep.export.build.graph import with_length, with_limited_sum
    from avsep.separator import load_separator

    separator = load_separator(run, task)
    clip = int(bundle.manifest["transform"]["clip_samples"])
    separator = with_length(separator, clip / bundle.sample_rate_hz).eval().requires_grad_(False)
    if bundle.manifest["separator"]["front_end"].get("limit_mask_sum"):
        separator = with_limited_sum(separator)
    if separator.spec.model_dump(mode="json") != bundle.manifest["separator"]:
        raise ConfigError(
            f"{run} holds another separator than the bundle, which was made from {bundle.manifest['made_from'] or '?'}"
            ": name that run and task, or leave --run out"
        )
    return separator


def _torch_call(separator: Separator, chunk: _Chunk, device: str, compiled: bool) -> Callable[[], Array]:
    import copy

    import torch

    model = copy.deepcopy(separator).to(device)
    given = {name: torch.from_numpy(array).to(device) for name, array in chunk.inputs.items()}
    visual, ids = _visual(given), given["class_ids"]
    mixture = torch.from_numpy(chunk.mixture)

    def separate(mixture: torch.Tensor) -> torch.Tensor:
        return model.separate(mixture, visual, ids)

    function = torch.compile(separate) if compiled else separate

    def call() -> Array:
        with torch.inference_mode():
            return function(mixture.to(device)).cpu().numpy()

    return call


def _visual(given: Mapping[str, Tensor]) -> VisualFeatures:
    """A graph's inputs of the sources as the separator takes them."""
    from avsep.types import VisualFeatures

    return VisualFeatures(
        object=given.get("object_features"),
        motion=given.get("motion_features"),
        motion_mask=given.get("motion_mask"),
        seen=given.get("seen"),
        motion_seen=given.get("motion_seen"),
    )


def _has_compiler() -> bool:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    return any(name and shutil.which(name) for name in names)


# --- checks, memory and what comes out --------------------------------------------------------------------------------


def _checked(
    found: Iterable[_Variant | _Skipped], chunk: _Chunk, say: Callable[[str], None]
) -> tuple[list[_Variant], list[str]]:
    """Call each variant (twice, which warms it up too); the good ones, and a line for each that answered wrongly."""
    good: list[_Variant] = []
    refused: list[str] = []
    for variant in found:
        if isinstance(variant, _Skipped):
            continue
        say(variant.name)
        try:
            answer = np.array(variant.call())
            variant.call()
            largest, error_db = compare(answer, chunk.expected)
        except Exception as error:  # the compiler of torch.compile and its backends fail in many ways
            variant.note = f"skipped: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        variant.max_error, variant.error_db = float(f"{largest:.3g}"), round(error_db, 1)
        variant.check = f"within {largest:.1e} of the golden output ({error_db:.0f} dB)"
        if not largest <= variant.tolerance:
            variant.note = f"refused: {largest:.1e} from the golden output, more than {variant.tolerance:.0e}"
            refused.append(f"no speed is given for '{variant.name}': {variant.note.removeprefix('refused: ')}")
            continue
        good.append(variant)
    return good, refused


def _measure_drift(
    good: Iterable[_Variant], separator: Separator, run: str | os.PathLike[str] | None, task: int | None
) -> None:
    """The largest change of a source's SDR that each graph makes, on mixtures of the run where its store is there."""
    from avsep.export.build.gate import held_out_batches, measure_gate, references, separate_by, synthetic_batches
    from avsep.export.build.plan import ExportPlan
    from avsep.runs.folder import RunFolder

    graphs = [variant for variant in good if variant.graph is not None and variant.run is not None]
    if not graphs:
        return
    shapes = {tensor.name: tensor.shape for tensor in graphs[0].graph.inputs} if graphs[0].graph else {}
    batch, sources = shapes["class_ids"]
    open_shapes = isinstance(batch, str)
    plan = ExportPlan(dynamic=open_shapes, sources=2 if isinstance(sources, str) else sources)
    batches, on = None, "held-out"
    if run is not None:
        with contextlib.suppress(AvsepError, OSError, IndexError):  # no run, or its store is gone
            of = RunFolder(run).finished_tasks()[-1] if task is None else task
            batches = held_out_batches(Path(run), of, separator, limit=_MIXTURES)
    if not batches:
        batches, on = synthetic_batches(separator, plan, _MIXTURES), "synthetic"
    try:
        expected = references(separator, batches, plan)
        for variant in graphs:
            assert variant.graph is not None
            assert variant.run is not None
            inputs = {tensor.name: tensor.shape for tensor in variant.graph.inputs}
            separate = separate_by(variant.run, inputs, separator, variant.graph.file)
            gate = measure_gate(Path(variant.graph.file), separator, plan, expected, on=on, separate=separate)
            if gate.mixtures:
                variant.drift = (float(f"{gate.told_drift_db['sdr']:.3g}"), on)
    except AvsepError as error:  # such as motion features of another length: the speeds stand all the same
        for variant in graphs:
            variant.note = variant.note or f"no drift of SDR: {error}"


def _peak_mb(process: Sequence[str]) -> _OwnProcess:
    """The most memory that a process of its own holds, the GPU's that it holds, and how long it took to an answer."""
    if not process:
        return _OwnProcess()
    command = [sys.executable, "-m", "avsep.benchmarks.export_cases", *process]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        host, device, start_ms = (int(word) for word in done.stdout.split()[-3:])
    except (subprocess.SubprocessError, OSError, ValueError):
        return _OwnProcess()
    return _OwnProcess(round(host / 1e6, 1), round(device / 1e6, 1) if device > 0 else "", start_ms)


def _in_own_process(arguments: Sequence[str]) -> None:
    """Load what the arguments name, run it once and print the most bytes that this process held, the GPU's, and the
    milliseconds from here to the answer."""
    from avsep.benchmarks.measure import _status_bytes
    from avsep.export.runtime.cuda import Cuda

    start = time.perf_counter()
    kind, path, *rest = arguments
    try:
        cuda = Cuda()  # its context, which every library shares, is there from now on and not counted
        unused = cuda.unused_bytes()
    except ExportError:
        cuda, unused = None, 0
    with open_bundle(path, hashes=False) as bundle:
        if kind == "graph":
            file, provider, threads = rest
            graph = next(g for g in bundle.graphs if g.file == file)
            if provider in ONNX_PROVIDERS:
                engine: Engine = OnnxSession(bundle, graph, provider, int(threads), fall_back=True)
            else:
                ((engine,), _) = open_session(bundle, [graph], provider, int(threads))
            call = _graph_call(bundle, graph, engine, _chunk(bundle, graph))
        else:
            import torch

            run, task, device, threads = rest
            torch.set_num_threads(int(threads))
            separator = _separator(bundle, run, int(task) if task else None)
            graph = next(g for g in bundle.graphs if g.kind in ("separator", "spectral"))
            call = _torch_call(separator, _chunk(bundle, graph), device, False)
        call()
        took_ms = round(1e3 * (time.perf_counter() - start))
        held = 0 if cuda is None else unused - cuda.unused_bytes()
    print(_status_bytes("VmHWM"), held, took_ms)


def _settings(chunk: _Chunk, rate_hz: int) -> str:
    batch, sources, length = chunk.expected.shape
    mixtures = "" if batch == 1 else f"{batch} mixtures of "
    return f"{mixtures}{sources} sources, {length / rate_hz:.2f} s at {rate_hz} Hz"


def _environment() -> dict[str, Any]:
    try:
        return environment("cpu")
    except ImportError:  # a device has no torch
        import avsep

        return {
            "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "torch": "none",
            "numpy": np.__version__,
            "avsep": avsep.__version__,
            "commit": "unknown",
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


def _print(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    first = rows[0]
    console.print(f"\n{first['case']}: {first['settings']}; {first['repeats']} repeats", highlight=False, style="bold")
    speeds = {
        "ms": ("median_ms", "{:,.1f}"),
        "95 %": ("p95_ms", "{:,.1f}"),
        "RTF": ("real_time_factor", "{:.3g}"),
        "ratio": ("ratio", "{:.2f}x"),
        "peak MB": ("process_mb", "{:,.0f}"),
        "GPU MB": ("device_mb", "{:,.0f}"),
        "file MB": ("file_mb", "{:,.1f}"),
        "plan MB": ("plan_mb", "{:,.1f}"),
    }
    others = {
        "to ONNX Runtime": ("ratio_onnxruntime", "{:.2f}x"),
        "start ms": ("start_ms", "{:,.0f}"),
        "max error": ("max_error", "{:.1e}"),
        "drift dB": ("sdr_drift_db", "{:.2g}"),
    }
    for columns in (speeds, others):  # side by side they are wider than a terminal
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("variant", overflow="fold")
        shown = {h: (key, form) for h, (key, form) in columns.items() if any(row[key] != "" for row in rows)}
        for heading in shown:
            table.add_column(heading, justify="right")
        for row in rows:
            if row["median_ms"] != "":
                cells = [(row[key], form) for key, form in shown.values()]
                table.add_row(row["variant"], *("" if value == "" else form.format(value) for value, form in cells))
        console.print(table)
    for row in rows:
        if row["note"]:
            console.print(f"{row['variant']}: {row['note']}", highlight=False)
    console.print(
        f"{first['device']}, {first['threads']} threads, load {first['load']}; ms: median; RTF: seconds "
        "of computing for one of audio; peak MB: of a process that loads it and runs once, and what it holds of a GPU; "
        "start ms: of that process, from its imports to the answer",
        highlight=False,
    )


if __name__ == "__main__":
    _in_own_process(sys.argv[1:])

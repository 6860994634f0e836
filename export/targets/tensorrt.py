#!/usr/bin/env python3
"""Build TensorRT engines from an avsep bundle, on the device that runs them.

This one file is both ``avsep.export.targets.tensorrt`` and, copied as it is, the ``build_engine.py`` of each bundle. It
needs NumPy and ``tensorrt`` (10.3 and later, 11) or ``tensorrt_rtx``. What it shares with the runtime it takes from it:
in a bundle from the wheel that lies beside it, which need not be installed for that.

    python build_engine.py                      every graph of the bundle that this file lies in
    python build_engine.py --graph separator.fp16.onnx --workspace-mib 512
    python build_engine.py --target tensorrt-rtx --sm 86 89     ahead of time, on a machine without a GPU
    python build_engine.py --check              builds nothing: verify, parse, and say which engines are good

Precision is in the graph's types, since TensorRT 11 has no precision flags any more: the networks are strongly typed
on every version. TF32 stays allowed for float32 tensors of such networks unless its flag is cleared, and it would
round the transforms to 10 bits (73 dB for a round trip), so it is always cleared; half-precision layers are not
touched by that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def _runtime_beside() -> str:
    """The runtime's wheel in the folder of this file, if it is a bundle's: whole, since what is in it is run."""
    folder = Path(__file__).absolute().parent
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        name = next((name for name in files if re.fullmatch(r"avsep_runtime-[\w.]+-py3-none-any\.whl", name)), "")
        if name and hashlib.sha256((folder / name).read_bytes()).hexdigest() != files[name]:
            _refuse(f"{folder / name} is not the file that was exported: copy the bundle again")
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # an installed runtime, if there is one, says what is wrong with the bundle
    return str(folder / name) if name else ""


if TYPE_CHECKING or __package__:
    from avsep.export.runtime import engines
    from avsep.export.runtime.errors import AvsepError, ExportError, one_line
    from avsep.export.runtime.files import atomic_path, made_folder, sha256_file
    from avsep.export.runtime.onnx_file import check_onnx
    from avsep.export.runtime.reader import Bundle, Graph, open_bundle
else:  # the build_engine.py of a bundle
    sys.path[:0] = filter(None, [_runtime_beside()])
    try:
        from avsep_runtime import engines
        from avsep_runtime.errors import AvsepError, ExportError, one_line
        from avsep_runtime.files import atomic_path, made_folder, sha256_file
        from avsep_runtime.onnx_file import check_onnx
        from avsep_runtime.reader import Bundle, Graph, open_bundle
    except ImportError as error:
        _refuse(f"{error}: pip install numpy, and the avsep_runtime-*.whl of the bundle")

Report = Callable[[str, float], None]  # what is being done, and how much of the build is done, 0 to 1

__all__ = ["DEFAULT_WORKSPACE_MIB", "BuildCancelled", "build", "build_bundle", "check_bundle", "machine_for", "main"]

# TensorRT's own default is all of the GPU's memory, which a Jetson shares with the system: builds there end by running
# out (NVIDIA/TensorRT#3355). A full-size separator needs a small part of this, on the 4 GB Orin Nano as well.
DEFAULT_WORKSPACE_MIB = 1024


class BuildCancelled(KeyboardInterrupt):
    """The user stopped the build; nothing was written of the engine that was under way."""


# ---------------------------------------------------------------- building one engine


def build(
    onnx_path: str | os.PathLike[str],
    plan_path: str | os.PathLike[str],
    *,
    target: str = "auto",
    profiles: Sequence[Mapping[str, Mapping[str, Sequence[int]]]] = (),
    precision: str = "fp32",
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    timing_cache: str | os.PathLike[str] | None = None,
    compute_capability: int | str | None = None,
    progress: bool | Report = True,
    verbose: bool = False,
) -> dict[str, Any]:
    """Build the engine of one graph; the plan and its sidecar are there when it is done, and not before.

    Args:
        profiles: by profile and input name the least, usual and largest shape; needed where the graph has open shapes.
        precision: the graph's, for the record: it is in the graph's types.
        workspace_mib: most scratch memory that a layer may take.
        timing_cache: file that keeps measured times between builds (TensorRT alone; TensorRT-RTX has none).
        compute_capability: 86 or "8.6": for a GPU that is not here (TensorRT-RTX alone). None: for the GPU here.
        progress: a bar on the standard error, none, or a function of (what is being done, share of it done).

    Returns:
        The sidecar.

    Raises:
        ExportError: one line: TensorRT or the GPU is missing, the graph or a profile is refused, or the build failed.
        BuildCancelled: Ctrl-C during the build; nothing was written.
    """
    graph, plan = Path(onnx_path), Path(plan_path)
    if not graph.is_file():
        raise ExportError(f"no such graph: {graph}")
    if workspace_mib < 1:
        raise ExportError(f"the workspace must be at least 1 MiB, got {workspace_mib}")
    machine = machine_for(target, compute_capability)
    try:
        key = engines.engine_key(sha256_file(graph), machine, profiles, precision)
    except (KeyError, TypeError) as error:
        raise ExportError(f"a profile of {graph.name} is damaged: {type(error).__name__} at {error}") from None
    folder = plan.absolute().parent
    if not os.access(next(p for p in (folder, *folder.parents) if p.exists()), os.W_OK):
        raise ExportError(f"{folder} cannot be written to: choose another with --out")
    started = time.monotonic()
    with made_folder(folder):
        data, new_cache = _compile(
            machine,
            graph,
            profiles,
            workspace_mib=workspace_mib,
            old_cache=_read_cache(timing_cache) if machine.target == "tensorrt" else None,
            progress=progress,
            verbose=verbose,
        )
        sidecar = {
            "format": engines.FORMAT,
            "version": engines.VERSION,
            "key": key,
            "graph": graph.name,
            "plan_sha256": hashlib.sha256(data).hexdigest(),
            "plan_bytes": len(data),
            "workspace_mib": workspace_mib,
            "tf32": False,
            "seconds": round(time.monotonic() - started, 3),
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        # A kill between the two leaves a plan that does not fit its sidecar: refused, and built again.
        _write(plan, data)
        _write(engines.sidecar_path(plan), (json.dumps(sidecar, indent=2) + "\n").encode())
        if timing_cache is not None and new_cache:
            _write(Path(timing_cache), new_cache)
    return sidecar


def machine_for(target: str, compute_capability: int | str | None = None) -> engines.Machine:
    """What engines are built with here: for the GPU here, or ahead of time for a compute capability (86 or "8.6").

    Raises:
        ExportError: TensorRT or the GPU is missing, or nothing here builds for that one.
    """
    if compute_capability is None:
        return engines.this_machine(target, to_build=True)
    module, found = engines.load_tensorrt("tensorrt-rtx" if target == "auto" else target)
    if found != "tensorrt-rtx":
        raise ExportError("TensorRT builds for the GPU it runs on: leave --sm out, or use --target tensorrt-rtx")
    text = str(compute_capability)
    if re.fullmatch(r"\d{2,3}", text):
        text = f"{text[:-1]}.{text[-1]}"
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise ExportError(f"'{compute_capability}' is no compute capability: write it as 86")
    machine = engines.Machine(module, found, str(module.__version__), text)
    _member_rtx(machine)
    return machine


def _member_rtx(machine: engines.Machine) -> Any:
    """TensorRT-RTX's own name of a compute capability."""
    trt = machine.module
    members = {name: value for name, value in trt.ComputeCapability.__members__.items() if re.match(r"SM\d", name)}
    name = "SM" + machine.capability.replace(".", "")
    if name not in members:
        known = ", ".join(sorted((n[2:] for n in members), key=int))
        hint = " (a Jetson Orin: build there, with TensorRT)" if name == "SM87" else ""
        raise ExportError(
            f"TensorRT-RTX {machine.version} builds nothing for SM {name[2:]}{hint}: it has {known}; "
            "use TensorRT on that device"
        )
    return members[name]


def _compile(
    machine: engines.Machine,
    graph: Path,
    profiles: Sequence[Mapping[str, Any]],
    *,
    workspace_mib: int,
    old_cache: bytes | None,
    progress: bool | Report,
    verbose: bool,
) -> tuple[bytes, bytes]:
    """The plan and, for TensorRT, the timing cache."""
    trt = machine.module
    bar = _Bar() if progress is True else None
    report = bar or progress or (lambda phase, share: None)
    assert callable(report)
    logger = engines.make_logger(trt, verbose)
    builder = trt.Builder(logger)
    network, _parser = _parse(trt, builder, logger, graph)  # the parser owns the weights that the network points to
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    # On by default in strongly typed networks too, and on every version: what float32 means is still the builder's say.
    config.clear_flag(trt.BuilderFlag.TF32)
    cache = None
    if machine.target == "tensorrt-rtx":
        _aim_rtx(config, machine)
    else:
        cache = _attach_cache(config, old_cache or b"")
    _add_profiles(builder, network, config, graph, profiles)
    cancel = threading.Event()
    failures: list[BaseException] = []
    monitor = _monitor(trt, report, cancel, failures)
    config.progress_monitor = monitor  # TensorRT keeps no reference: `monitor` outlives the build
    try:
        plan = _cancellable(lambda: builder.build_serialized_network(network, config), cancel)
    finally:
        if bar is not None:
            bar.clear()
    if failures:
        raise failures[0]
    if cancel.is_set():
        raise BuildCancelled("cancelled; nothing was written")
    if plan is None:
        reason = engines.why_failed(logger.errors)
        raise ExportError(f"{engines.TARGETS[machine.target]} {machine.version} built no engine: {reason}")
    data = bytes(memoryview(plan))
    kept = b""
    if cache is not None:
        cache = config.get_timing_cache()
        kept = bytes(memoryview(cache.serialize())) if cache is not None else b""
    return data, kept


def _parse(trt: Any, builder: Any, logger: Any, graph: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, and the parser, which must live as long.

    Raises:
        ExportError: names every node that the parser refused.
    """
    check_onnx(graph)  # TensorRT calls an empty file and some texts a success, and gives no reason for others
    # Needed on 10; ignored on 11, where the flag has another number: it must come from the module.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph))
    errors = []
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        # The reason of an operator that there is none for reads 'false'; the rest is C++ that failed.
        reason = one_line(fault.desc())
        reason = "not supported" if reason == "false" else reason
        operator, name = fault.node_operator(), fault.node_name()
        errors.append(f"{operator} '{name}': {reason}" if operator else reason)
    if not parsed or errors:
        reasons = "; ".join(errors) or engines.why_failed(logger.errors)
        raise ExportError(f"{trt.__name__} {trt.__version__} does not take {graph.name}: {reasons}")
    if network.num_inputs == 0 or network.num_outputs == 0:
        raise ExportError(f"{graph} has no inputs or no outputs: copy the bundle again")
    return network, parser


def _add_profiles(
    builder: Any, network: Any, config: Any, graph: Path, profiles: Sequence[Mapping[str, Mapping[str, Sequence[int]]]]
) -> None:
    """Add the profiles of the inputs with open shapes; those of fixed inputs must be their shapes."""
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes[str(tensor.name)] = tuple(tensor.shape)
    # 'Open' as TensorRT has it: -1.
    opened = sorted(name for name, shape in shapes.items() if any(size < 0 for size in shape))
    if opened and not profiles:
        raise ExportError(f"{graph.name} has open shapes ({', '.join(opened)}): give a profile with their bounds")
    for bounds in profiles:
        for name in sorted(bounds.keys() - shapes.keys()):
            has = ", ".join(shapes)
            raise ExportError(f"a profile names an input '{name}' that {graph.name} has not: it has {has}")
        for name in opened:
            if name not in bounds:
                raise ExportError(f"a profile of {graph.name} lacks the input '{name}', whose shape is open")
        profile = builder.create_optimization_profile() if opened else None
        for name, sizes in bounds.items():
            low, usual, high = (tuple(int(size) for size in sizes[bound]) for bound in ("min", "opt", "max"))
            _check_bounds(graph, name, shapes[name], low, usual, high)
            if profile is not None and name in opened:
                try:
                    profile.set_shape(name, low, usual, high)
                except (ValueError, RuntimeError) as error:
                    raise ExportError(
                        f"the profile of {graph.name}, input '{name}', is refused: {one_line(error)}"
                    ) from None
        if profile is not None and config.add_optimization_profile(profile) < 0:
            raise ExportError(f"the profile of {graph.name} is refused: {json.dumps(bounds, default=list)}")


def _check_bounds(
    graph: Path, name: str, shape: tuple[int, ...], low: tuple[int, ...], usual: tuple[int, ...], high: tuple[int, ...]
) -> None:
    where = f"the profile of {graph.name}, input '{name}' of shape {list(shape)},"
    if not len(shape) == len(low) == len(usual) == len(high):
        raise ExportError(f"{where} has another number of dimensions: {list(low)}, {list(usual)}, {list(high)}")
    for axis, size in enumerate(shape):
        if not 1 <= low[axis] <= usual[axis] <= high[axis]:
            raise ExportError(f"{where} is out of order: {list(low)}, {list(usual)}, {list(high)}")
        if size >= 0 and not low[axis] == high[axis] == size:
            raise ExportError(f"{where} asks for other sizes: {list(low)} to {list(high)}")


def _aim_rtx(config: Any, machine: engines.Machine) -> None:
    """Build for the machine's compute capability."""
    member = _member_rtx(machine)
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(member, 0):
        raise ExportError(f"TensorRT-RTX {machine.version} refuses to build for {member}")


def _attach_cache(config: Any, old: bytes) -> Any:
    """Give the builder the timing cache; one of another GPU or version is dropped, since its times are not ours."""
    cache = config.create_timing_cache(old)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache
    cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)
    return cache


def _read_cache(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ExportError(f"the timing cache {path} cannot be read ({one_line(error)}): remove it") from None


# ---------------------------------------------------------------- progress and cancelling


class _Bar:
    """A bar in plain text: redrawn on a terminal, a line every tenth elsewhere."""

    def __init__(self) -> None:
        self.stream = sys.stderr
        self.terminal = self.stream is not None and self.stream.isatty()
        self.drawn_s, self.tenth = 0.0, -1

    def __call__(self, phase: str, share: float) -> None:
        if self.stream is None:
            return
        if self.terminal:
            now = time.monotonic()
            if now - self.drawn_s < 0.1:
                return
            self.drawn_s = now
            filled = int(30 * share)
            self.stream.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {share:4.0%} {phase[:38]:<38}")
        elif int(10 * share) > self.tenth:
            self.tenth = int(10 * share)
            self.stream.write(f"{share:4.0%} {phase}\n")
        self.stream.flush()

    def clear(self) -> None:
        if self.terminal:
            self.stream.write("\r" + " " * 78 + "\r")
            self.stream.flush()


def _monitor(trt: Any, report: Report, cancel: threading.Event, failures: list[BaseException]) -> Any:
    """What TensorRT calls, from any of its threads, as the build goes on. An exception may not reach it."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()
            self.phases: dict[str, list[Any]] = {}  # name -> [parent, steps, steps done]
            self.most = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases[phase_name] = [parent_phase, max(1, num_steps), 0]
            self.tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                phase = self.phases.get(phase_name)
                if phase is not None:
                    phase[2] = min(phase[1], step + 1)
            self.tell(phase_name)
            return not cancel.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases.pop(phase_name, None)

        def tell(self, phase_name: str) -> None:
            try:
                with self.lock:
                    self.most = max(self.most, self.share())
                    report(phase_name, self.most)
            except BaseException as error:
                failures.append(error)
                cancel.set()

        def share(self) -> float:
            """How much of the oldest phase is done, what is under way in the phases under it counted in."""
            share, name = 0.0, next((n for n, phase in self.phases.items() if phase[0] is None), None)
            width = 1.0
            for _ in range(len(self.phases)):
                if name is None:
                    break
                phase = self.phases[name]
                share += width * min(phase[2], phase[1]) / phase[1]
                width /= phase[1]
                if phase[2] >= phase[1]:
                    break
                name = next((n for n, other in self.phases.items() if other[0] == name and n != name), None)
            return min(share, 1.0)

    return Monitor()


def _cancellable(work: Callable[[], Any], cancel: threading.Event) -> Any:
    """Run ``work`` so that Ctrl-C sets ``cancel`` at once; a second one ends the process.

    Python handles signals in its main thread, between two of its own steps. A build called there would not see one
    until it is over, so it runs in a thread of its own, and the main one waits.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    result: list[Any] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failures.append(error)

    def interrupted(*_: object) -> None:
        if cancel.is_set():
            os._exit(130)
        cancel.set()

    before = signal.signal(signal.SIGINT, interrupted)
    old_size = threading.stack_size(64 << 20)  # compilers recurse; a thread has less than the main one by default
    try:
        thread = threading.Thread(target=run, name="tensorrt-build", daemon=True)
        thread.start()
        threading.stack_size(old_size)
        while thread.is_alive():
            thread.join(0.1)
    finally:
        threading.stack_size(old_size)
        signal.signal(signal.SIGINT, before)
    if failures:
        raise failures[0]
    return result[0]


def _write(path: Path, data: bytes) -> None:
    """Write a file whole."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


# ---------------------------------------------------------------- a bundle's engines


def build_bundle(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    graphs: Sequence[str] = (),
    target: str = "auto",
    sm: Sequence[int | str] = (),
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool | Report = True,
    verbose: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> list[engines.EngineFile]:
    """Build the engines of a bundle that are not there yet, for the GPU here or for each of ``sm``.

    An engine that cannot be built does not keep the others from it: what failed is raised at the end.

    Args:
        graphs: file names; all when empty.
        out: the folder of the engines, or the plan; the bundle's own folder of engines when None.
        force: build again what is good already.
        tell: is given a line on each engine, before it is built and when it is there.

    Raises:
        ExportError, BuildCancelled: as :func:`build`, or the bundle is damaged; engines that were finished stay.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, hashes=False)
    chosen = _chosen(opened, graphs)
    place = engines.engines_folder(opened) if out is None else Path(out)
    devices: list[int | str | None] = list(dict.fromkeys(sm)) or [None]
    if place.suffix == ".plan" and len(chosen) * len(devices) > 1:
        raise ExportError(f"{out} is one file for {len(chosen) * len(devices)} engines: give a folder, or one --graph")
    # All that can be refused is refused before the first engine takes its minutes.
    machines = {device: machine_for(target, device) for device in devices}
    for graph in chosen:
        opened.check(graph.file)
        for machine in machines.values():
            _check_least(graph, machine.target, machine.version)
    built = []
    failed = []
    for graph in chosen:
        for device, machine in machines.items():
            key = _key(opened, graph, machine)
            plan = engines.plan_path(place, graph.file, key)
            name = engines.device_of(key)
            if not force:
                try:
                    sidecar = engines.check_engine(plan, key)
                except engines.EngineMismatch as error:
                    if plan.exists():
                        tell(f"{error}: building it again")
                else:
                    tell(f"{plan} is good for {graph.file} on {name}")
                    built.append(engines.EngineFile(graph.file, plan, sidecar, name))
                    continue
            tell(f"building {graph.file} for {name} with {machine.target} {machine.version}")
            try:
                sidecar = build(
                    opened.folder() / graph.file,
                    plan,
                    target=machine.target,
                    profiles=graph.profiles,
                    precision=graph.precision,
                    workspace_mib=workspace_mib,
                    timing_cache=plan.parent / f"{machine.target}-{name}.timing",
                    compute_capability=device,
                    progress=progress,
                    verbose=verbose,
                )
            except ExportError as error:
                tell(f"{graph.file} for {name}: {error}")
                failed.append(f"{graph.file} for {name}: {error}")
                continue
            tell(f"{plan}: {sidecar['plan_bytes'] / 1e6:.1f} MB in {sidecar['seconds']:.1f} s")
            built.append(engines.EngineFile(graph.file, plan, sidecar, name, True))
    if failed:
        kept = f" ({len(built)} of {len(built) + len(failed)} are good)" if built else ""
        raise ExportError("; ".join(failed) + kept)
    return built


def _chosen(bundle: Bundle, names: Sequence[str]) -> list[Graph]:
    graphs = {graph.file: graph for graph in bundle.graphs}
    for name in names:
        if name not in graphs:
            raise ExportError(f"the bundle has no graph {name}: it has {', '.join(graphs)}")
    return [graphs[name] for name in dict.fromkeys(names or graphs)]


def _check_least(graph: Graph, target: str, version: str) -> None:
    least = str(graph.entry["least_tensorrt"])
    if target == "tensorrt" and engines.version_numbers(version) < engines.version_numbers(least):
        raise ExportError(f"{graph.file} needs TensorRT {least}, this is {version}: update it")


def _key(bundle: Bundle, graph: Graph, machine: engines.Machine) -> dict[str, Any]:
    return engines.engine_key(bundle.manifest["files"][graph.file], machine, graph.profiles, graph.precision)


def check_bundle(
    bundle: str | os.PathLike[str],
    *,
    graphs: Sequence[str] = (),
    target: str = "auto",
    sm: Sequence[int | str] = (),
    out: str | os.PathLike[str] | None = None,
) -> Iterator[str]:
    """Verify and parse the graphs of a bundle and look at its engines; a line for each finding.

    Raises:
        ExportError: a graph is damaged or refused, or TensorRT is missing.
    """
    opened = open_bundle(bundle, hashes=False)
    chosen = _chosen(opened, graphs)
    place = engines.engines_folder(opened) if out is None else Path(out)
    gpu, reason = engines.find_gpu()
    yield f"GPU: {gpu.name}, SM {gpu.capability}, {gpu.memory_mib} MiB, CUDA {gpu.cuda}" if gpu else f"no GPU: {reason}"
    if not sm and gpu is None:
        target = "tensorrt-rtx" if target == "auto" else target
    module, found = engines.load_tensorrt("tensorrt-rtx" if sm and target == "auto" else target)
    yield f"{found} {module.__version__}"
    if found == "tensorrt" and gpu is None:
        raise ExportError(
            f"{reason}: TensorRT needs a GPU, also to parse; TensorRT-RTX does not (--target tensorrt-rtx)"
        )
    devices: list[int | str | None] = list(dict.fromkeys(sm)) or ([None] if gpu else [])
    for graph in chosen:
        opened.check(graph.file)
        _check_least(graph, found, str(module.__version__))
        logger = engines.make_logger(module, False)
        builder = module.Builder(logger)
        path = opened.folder() / graph.file
        network, _parser = _parse(module, builder, logger, path)
        config = builder.create_builder_config()
        _add_profiles(builder, network, config, path, graph.profiles)
        yield f"{graph.file}: whole, and {found} {module.__version__} takes it"
        for device in devices:
            key = _key(opened, graph, machine_for(found, device))
            plan = engines.plan_path(place, graph.file, key)
            try:
                engines.check_engine(plan, key)
                yield f"{plan}: good"
            except engines.EngineMismatch as error:
                yield f"{error}"


# ---------------------------------------------------------------- command line


def _arguments() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    arguments.add_argument("--bundle", metavar="DIR", help="the bundle's folder (default: where this file is)")
    arguments.add_argument("--graph", action="append", default=[], metavar="FILE", help="a graph of it (default: all)")
    arguments.add_argument("--target", choices=["auto", *engines.TARGETS], default="auto")
    arguments.add_argument(
        "--sm",
        nargs="+",
        default=[],
        metavar="SM",
        help="compute capabilities to build for without a GPU, as 75 86 120",
    )
    arguments.add_argument(
        "--workspace-mib",
        type=int,
        default=DEFAULT_WORKSPACE_MIB,
        metavar="MIB",
        help=f"most scratch memory of a layer; less where memory is short (default: {DEFAULT_WORKSPACE_MIB})",
    )
    arguments.add_argument("--out", metavar="PATH", help="folder for the engines (default: engines in the bundle)")
    arguments.add_argument("--check", action="store_true", help="build nothing: verify, parse, look at the engines")
    arguments.add_argument("--force", action="store_true", help="build again what is good already")
    arguments.add_argument("--verbose", action="store_true", help="TensorRT's own log")
    return arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; 2 with one line on the standard error; 130 after Ctrl-C."""
    options = _arguments().parse_args(arguments)
    folder = Path(options.bundle) if options.bundle else Path(__file__).absolute().parent
    try:
        if options.check:
            for line in check_bundle(
                folder, graphs=options.graph, target=options.target, sm=options.sm, out=options.out
            ):
                print(line)
            return 0
        build_bundle(
            folder,
            graphs=options.graph,
            target=options.target,
            sm=options.sm,
            workspace_mib=options.workspace_mib,
            out=options.out,
            force=options.force,
            verbose=options.verbose,
            tell=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt as error:
        print(f"error: {error or 'cancelled'}", file=sys.stderr)
        return 130
    except (AvsepError, OSError) as error:
        print(f"error: {one_line(error, 2000)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``avsep export``: make bundles, check them, look into them, build engines from them.

``avsep export RUN ...`` is ``avsep export run RUN ...``: a first word that names no subcommand means ``run``.
"""

from __future__ import annotations

import contextlib
import shlex
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from avsep.cli._output import Json, Output, Quiet, Verbose, link, next_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avsep.export import Bundle

_DEFAULT = "run"


class _RunByDefault(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in ctx.help_option_names and (args[0] not in self.commands or _is_a_run(args)):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


def _is_a_run(args: list[str]) -> bool:
    """Whether the first word is a run folder that is called as a subcommand: ``avsep export run --out b``."""
    from avsep.runs.folder import RunFolder

    alone = len(args) == 1 or args[1].startswith("-")
    return alone and not {"-h", "--help"} & set(args[1:]) and RunFolder(args[0]).is_run


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Export separators as bundles for other machines: avsep export RUN --out BUNDLE (short for: export run).",
)

_Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder or .tar.")]
_ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
_WEB = "web"
_TARGETS = (*_ENGINE_TARGETS, "onnxruntime", _WEB)
_OrtWeb = Annotated[
    Path | None,
    typer.Option(
        "--ort-web",
        help="With --target web: folder of the unpacked npm package onnxruntime-web [default: the cache, or a "
        "download].",
    ),
]
_Sm = Annotated[
    list[str] | None,
    typer.Option(
        "--sm",
        help="Compute capabilities to build for without a GPU, such as 86,120 (tensorrt-rtx) [default: the GPU here].",
    ),
]
_Workspace = Annotated[
    int, typer.Option("--workspace-mib", min=1, help="Most scratch memory of a layer; less where memory is short.")
]


@app.command(_DEFAULT)
def run(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL", help="Run folder, or a separator that comes with avsep (avsep models)."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="The bundle: a folder, or a .tar; with several tasks a folder for task-00, ... With --target web the "
            "site's folder.",
        ),
    ],
    task: Annotated[
        list[int] | None,
        typer.Option(
            "--task",
            min=0,
            help="Export this task's separator (repeatable) [default: the last finished task's alone].",
        ),
    ] = None,
    all_tasks: Annotated[bool, typer.Option("--all-tasks", help="Export every finished task's separator.")] = False,
    tar: Annotated[bool, typer.Option("--tar", help="Write several tasks as task-00.tar, ...")] = False,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="fp32, fp16 or int8 (repeatable: a graph each) [default: fp32]."),
    ] = None,
    sources: Annotated[int, typer.Option("--sources", min=1, help="Sources separated in one call.")] = 2,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Mixtures in one call.")] = 1,
    length_s: Annotated[
        float | None,
        typer.Option("--length-s", help="Seconds of one call [default: the clip's that it was trained on]."),
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Leave the numbers of mixtures and sources open (slower in TensorRT).")
    ] = False,
    spectral: Annotated[
        bool, typer.Option("--spectral", help="Leave both transforms out of the graph (for DLA).")
    ] = False,
    frames: Annotated[
        int,
        typer.Option(
            "--frames",
            min=1,
            help="STFT frames in one call of a causal separator: more compute less a second and come out later.",
        ),
    ] = 1,
    channels: Annotated[
        int,
        typer.Option(
            "--channels", min=1, help="Channels of the mixture and of each source: 2 for stereo. Mono is always taken."
        ),
    ] = 1,
    limit_mask_sum: Annotated[
        bool,
        typer.Option(
            "--limit-mask-sum",
            help="Divide the masks by their sum where that is above 1: the parts and the residual add up to the "
            "mixture, and no part is louder than it.",
        ),
    ] = False,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", min=1, help="Most mixtures in one call of an engine (--dynamic) [default: 8]."),
    ] = None,
    max_sources: Annotated[
        int | None,
        typer.Option("--max-sources", min=1, help="Most sources in one call of an engine (--dynamic) [default: 8]."),
    ] = None,
    motion_steps: Annotated[
        int | None,
        typer.Option(
            "--motion-steps", min=1, help="Steps of stored motion features [default: those of the run's store; else 8]."
        ),
    ] = None,
    motion_mask: Annotated[
        bool,
        typer.Option(
            "--motion-mask", help="Add an input that says which motion steps are valid, for videos of several lengths."
        ),
    ] = False,
    motion_frames: Annotated[
        int | None,
        typer.Option(
            "--motion-frames",
            min=1,
            help="Frames in one call of the motion encoder [default: as the run's store has them; else 8 a second].",
        ),
    ] = None,
    frame_size: Annotated[
        str | None,
        typer.Option(
            "--frame-size",
            metavar="HxW",
            help="Pixels of the frames that the encoders take, such as a camera's 240x320; resized in the graph "
            "[default: as the run's store has them; else the encoders' own].",
        ),
    ] = None,
    opset: Annotated[int, typer.Option("--opset", help="ONNX operator set, 18 to 20.")] = 18,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", help="Largest difference from PyTorch in a sample (full scale is 1) [default: fp32: 0.001]."
        ),
    ] = None,
    gate_db: Annotated[
        float, typer.Option("--gate-db", help="Largest drift of SDR, SIR or SAR on held-out mixtures, in dB.")
    ] = 0.1,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Let a larger drift pass; the manifest says so.")
    ] = False,
    calibration: Annotated[
        int | None,
        typer.Option("--calibration", min=1, help="Training mixtures that INT8 ranges are measured on [default: 64]."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="The run's store, for held-out mixtures [default: where the run says]."),
    ] = None,
    licence: Annotated[
        str, typer.Option("--licence", help="Licence of the weights, noted in the bundle, such as CC-BY-4.0.")
    ] = "",
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="Build engines at once: tensorrt or tensorrt-rtx (onnxruntime needs none). web: write a static site "
            "that separates in the visitor's browser.",
        ),
    ] = None,
    sm: _Sm = None,
    workspace_mib: _Workspace = 1024,
    ort_web: _OrtWeb = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle or a site that is there; nothing else is replaced.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export a task's separator to ONNX as a bundle: graphs, manifest, golden inputs and outputs, device README.

    Without --task and --all-tasks it is the separator of the last finished task, which knows all classes so far.
    """
    from avsep.errors import ConfigError
    from avsep.export import ExportPlan, export_model, export_run
    from avsep.models import model_at
    from avsep.runs.folder import RunFolder

    output = Output(json=json, quiet=quiet, verbose=verbose)
    model = model_at(run)
    of_runs = {"--task": task, "--all-tasks": all_tasks, "--tar": tar, "--store": store}
    if model is not None and (given_of_runs := [option for option, value in of_runs.items() if value]):
        raise ConfigError(f"{given_of_runs[0]} is of a run, and '{run}' comes with avsep: leave it out")
    if all_tasks and task:
        raise ConfigError(f"--all-tasks and --task {task[0]} ask for different things: give one of them")
    for option, needs, there, value in (
        ("--max-batch", "--dynamic", dynamic, max_batch),
        ("--max-sources", "--dynamic", dynamic, max_sources),
        ("--calibration", "--precision int8", "int8" in (precision or ()), calibration),
        ("--sm", "--target tensorrt-rtx", target == "tensorrt-rtx", sm[0] if sm else None),
        ("--ort-web", "--target web", target == _WEB, ort_web),
    ):
        if value is not None and not there:
            raise ConfigError(f"{option} {value} does nothing without {needs}: give that too, or leave it out")
    if target is not None:
        _check_target(target)
    finished = RunFolder(run).finished_tasks() if model is None else [0]
    tasks: int | list[int] | None = None
    if not all_tasks:
        tasks = (task[0] if len(set(task)) == 1 else task) if task else finished[-1]
    if tar and isinstance(tasks, int) and out.suffix.lower() != ".tar":
        raise ConfigError(f"--tar is for several tasks: for a tar of one, name it so, such as --out {out}.tar")
    given: dict[str, Any] = {
        "max_batch": max_batch,
        "max_sources": max_sources,
        "calibration": calibration,
        "frame_size": None if frame_size is None else _frame_size(frame_size),
    }
    plan = ExportPlan(
        batch=batch,
        sources=sources,
        length_s=length_s,
        dynamic=dynamic,
        spectral=spectral,
        frames=frames,
        channels=channels,
        limit_mask_sum=limit_mask_sum,
        precision=tuple(dict.fromkeys(precision or ("fp32",))),
        motion_steps=motion_steps,
        motion_mask=motion_mask,
        motion_frames=motion_frames,
        opset=opset,
        tolerance=tolerance,
        gate_db=gate_db,
        allow_drift=allow_drift,
        **{name: value for name, value in given.items() if value is not None},  # the plan has the defaults
    )
    capabilities = _capabilities(sm)
    if target in _ENGINE_TARGETS:
        from avsep.export.targets.tensorrt import machine_for

        for capability in capabilities or (None,):
            machine_for(target, capability)  # before the export takes its minutes
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        place = out
        if target == _WEB:
            _before_a_site(out, tasks, spectral, ort_web, overwrite, output)
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avsep-site-"))) / "bundle"
        shown = f", task {tasks if tasks is not None else ', '.join(map(str, finished))}" if model is None else ""
        output.detail(f"{run}{shown}, to {out}")
        started = time.perf_counter()
        with output.bars() as bars:
            bar = bars.add("exporting", None)

            def progress(label: str, done: int, total: int) -> None:
                bars.advance(bar, 0, note=label)
                bars.update(bar, done, total)

            more: dict[str, Any] = {"plan": plan, "weights_licence": licence, "overwrite": overwrite}
            more["progress"] = progress
            if model is not None:
                bundles = [export_model(model, place, **more)]
            else:
                bundles = export_run(run, place, tasks=tasks, store=store, tar=tar, tell=said.append, **more)
        if target == _WEB:
            _site(bundles[0], out, ort_web, output)
        output.detail(f"took {time.perf_counter() - started:.1f} s")
        data = [bundle_as_data(bundle, out / "bundle" if target == _WEB else bundle.path) for bundle in bundles]
        _show(output, bundles, f"exported to {out}")
    for line in dict.fromkeys(said):
        output.note(line)
    engines = []
    if target in _ENGINE_TARGETS:
        for bundle in bundles:
            engines += _build(bundle, [], target, capabilities, workspace_mib, None, False, output)
    output.result(
        {
            "format": "avsep-export",
            "bundles": data,
            "notes": list(dict.fromkeys(said)),
            "engines": engines,
            "site": out if target == _WEB else None,
        }
    )
    if target == _WEB:
        _say_how_to_open(out, output)
    else:
        output.say(next_command("export", "verify", bundles[0].path))


def _before_a_site(
    out: Path, tasks: int | list[int] | None, spectral: bool, ort_web: Path | None, overwrite: bool, output: Output
) -> None:
    """What a site cannot be made of, and what it is made of, before the export takes its minutes."""
    from avsep.errors import ConfigError
    from avsep.export.targets.website import check_place, ort_web_files

    if not isinstance(tasks, int):
        raise ConfigError("a site is of one separator: name one --task with --target web")
    if out.suffix.lower() == ".tar":
        raise ConfigError(f"{out} is a tar, and a site is a folder: name a folder by --out")
    if spectral:
        raise ConfigError("--spectral leaves the transforms out of the graph, which no browser runs: leave it out")
    check_place(out)
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is a site already: --overwrite replaces it, or choose another folder")
    ort_web_files(ort_web, tell=output.note)


def _site(bundle: Bundle, out: Path, ort_web: Path | None, output: Output) -> None:
    from avsep.export.targets.website import write_site

    write_site(bundle, out, ort_web=ort_web, tell=output.note)


def _say_how_to_open(out: Path, output: Output) -> None:
    from avsep.progress import printable

    output.say(f"wrote the site {link(out)}: any web server of files serves it")
    served = shlex.join(["python", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(out)])
    output.say(f"{next_command('app', out / 'bundle')}, or {printable(served)}")


def _check_target(target: str) -> None:
    from avsep.errors import UnknownNameError, near_matches

    if target not in _TARGETS:
        raise UnknownNameError(f"unknown target '{target}': {near_matches(target, _TARGETS)}")


def _capabilities(sm: Sequence[str] | None) -> list[str]:
    """["86,sm_89", "120"] -> ["86", "89", "120"]"""
    parts = (part.strip() for given in sm or () for part in given.split(","))
    return [part.removeprefix("sm_") for part in parts if part]


def _frame_size(text: str) -> tuple[int, int]:
    from avsep.errors import ConfigError

    height, sign, width = text.lower().partition("x")
    if not (sign and height.strip().isdecimal() and width.strip().isdecimal()):
        raise ConfigError(f"--frame-size {text!r} is not a height and a width: write it as 240x320")
    return int(height), int(width)


def _build(
    bundle: Bundle,
    graphs: Sequence[str],
    target: str,
    capabilities: Sequence[str],
    workspace_mib: int,
    out: Path | None,
    force: bool,
    output: Output,
) -> list[dict[str, Any]]:
    """Build engines, say where they are, and return what ``--json`` prints of them."""
    from avsep.export.targets.tensorrt import build_bundle

    built = build_bundle(
        bundle,
        graphs=graphs,
        target=target,
        sm=capabilities,
        workspace_mib=workspace_mib,
        out=out,
        force=force,
        progress=not output.quiet,
        verbose=output.verbose,
        tell=output.note,
    )
    for engine in built:
        output.say(f"{engine.plan}: {engine.graph} on {engine.device}")
    return [
        {
            "graph": engine.graph,
            "file": engine.plan,
            "device": engine.device,
            "bytes": engine.sidecar.get("plan_bytes"),
            "seconds": engine.sidecar.get("seconds"),
            "new": engine.new,
        }
        for engine in built
    ]


def bundle_as_data(bundle: Bundle, path: Path) -> dict[str, Any]:
    """What ``--json`` prints of a bundle that lies, or will lie, at ``path``."""
    graphs = []
    for graph in bundle.graphs:
        parity, gate = graph.entry["parity"], graph.entry["gate"]
        graphs.append(
            {
                "file": graph.file,
                "bytes": bundle.size(graph.file),
                "max_error": parity["max_error"],
                "error_db": parity["error_db"],
                "drift_db": None if gate is None else max(gate["max_drift_db"].values()),
                "let_pass": gate is not None and gate["overridden"],
                "seconds": parity["seconds"],
                "ran_on": parity["provider"],
            }
        )
    return {"path": path, "name": bundle.name, "classes": list(bundle.classes), "graphs": graphs}


def _show(output: Output, bundles: Sequence[Bundle], title: str) -> None:
    """What the manifests say was measured when the bundles were made."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("graph", overflow="fold")
    for heading in ("MB", "max error", "dB", "drift dB", "ms"):
        table.add_column(heading, justify="right")
    table.add_column("ran on", no_wrap=True)
    let_pass = int8 = False
    for bundle in bundles:
        if len(bundles) > 1:
            table.add_section()
            table.add_row(bundle.path.name, style="bold")
        for graph in bundle.graphs:
            parity, gate = graph.entry["parity"], graph.entry["gate"]
            drift = "-" if gate is None else f"{max(gate['max_drift_db'].values()):.3f}"
            int8 = int8 or graph.precision == "int8"
            let_pass = let_pass or (gate is not None and gate["overridden"])
            table.add_row(
                graph.file,
                f"{bundle.size(graph.file) / 1e6:.1f}",
                f"{parity['max_error']:.1e}",
                f"{parity['error_db']:.0f}",
                drift + (" !" if gate is not None and gate["overridden"] else ""),
                f"{1e3 * parity['seconds']:.0f}",
                parity["provider"].removesuffix("ExecutionProvider"),
            )
    output.show(table)
    if let_pass:
        output.say("! more than the gate's limit, and let pass by --allow-drift")
    if int8:
        output.say(
            "int8 on CPUs: OpenVINO computes its convolutions in integers (--provider openvino); ONNX Runtime computes "
            "them in floating point, and was no faster than with fp32 where that was measured"
        )


@app.command("verify")
def verify(
    bundle: _Bundle,
    provider: Annotated[
        str,
        typer.Option(
            "--provider",
            help="What runs the graphs: cpu, cuda, onnxruntime-tensorrt, openvino, tensorrt, tensorrt-rtx.",
        ),
    ] = "cpu",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Largest difference from the golden outputs [default: each graph's own]."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a bundle's hashes and manifest, and run every graph on its golden inputs."""
    output = Output(json=json, quiet=quiet, verbose=verbose)
    output.result({"format": "avsep-export-verify", **_verified(output, bundle, provider, tolerance)})


def _verified(output: Output, bundle: Path, provider: str, tolerance: float | None = None) -> dict[str, Any]:
    """Check a bundle, show what its graphs did, and return what ``--json`` prints of it."""
    from dataclasses import asdict

    from rich.table import Table

    from avsep.export import verify_bundle

    started = time.perf_counter()
    result = verify_bundle(bundle, provider, tolerance=tolerance)
    table = Table(title=f"{bundle} holds")
    table.add_column("graph", overflow="fold")
    for heading in ("max error", "dB", "may be", "ms"):
        table.add_column(heading, justify="right")
    table.add_column("ran on", no_wrap=True)
    for check in result.graphs:
        table.add_row(
            check.file,
            f"{check.max_error:.1e}",
            f"{check.error_db:.0f}",
            f"{check.tolerance:.1e}",
            f"{1e3 * check.seconds:.0f}",
            check.provider.removesuffix("ExecutionProvider"),
        )
    output.show(table)
    count = len(result.bundle.files)
    output.say(f"all {count} files match the manifest; every graph ran on {result.provider} within its tolerance")
    output.detail(f"took {time.perf_counter() - started:.1f} s")
    return {
        "bundle": bundle,
        "files": count,
        "ran_on": result.provider,
        "graphs": [asdict(check) for check in result.graphs],
    }


@app.command("build")
def build(
    bundle: _Bundle,
    graph: Annotated[
        list[str] | None,
        typer.Option("--graph", help="A graph of it, such as separator.onnx (repeatable) [default: all]."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="auto, tensorrt or tensorrt-rtx; onnxruntime only runs the graphs; web writes a site that separates "
            "in the visitor's browser.",
        ),
    ] = "auto",
    sm: _Sm = None,
    workspace_mib: _Workspace = 1024,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for the engines [default: engines in the bundle; beside a tar], or the site."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is good already.")] = False,
    ort_web: _OrtWeb = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Build the engines of a bundle for the GPU here, or ahead of time for others.

    Without avsep on the device: python3 build_engine.py in the bundle's folder does the same.
    """
    from avsep.errors import ConfigError
    from avsep.export import open_bundle

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if target != "auto":
        _check_target(target)
    if ort_web is not None and target != _WEB:
        raise ConfigError(f"--ort-web {ort_web} does nothing without --target web: give that too, or leave it out")
    if target == _WEB:
        if out is None:
            raise ConfigError("--target web needs a folder for the site: name one by --out")
        with open_bundle(bundle) as opened:
            _site(opened, out, ort_web, output)
        output.result({"format": "avsep-export-build", "bundle": bundle, "engines": [], "site": out, "ran": None})
        _say_how_to_open(out, output)
        return
    if target == "onnxruntime":
        ran = _verified(output, bundle, "cpu")
        output.result({"format": "avsep-export-build", "bundle": bundle, "engines": [], "site": None, "ran": ran})
        return
    with open_bundle(bundle) as opened:
        built = _build(opened, graph or [], target, _capabilities(sm), workspace_mib, out, force, output)
    output.result({"format": "avsep-export-build", "bundle": bundle, "engines": built, "site": None, "ran": None})


@app.command("info")
def info(
    bundle: _Bundle,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What is in a bundle, from its manifest; hashes are checked, nothing is run."""
    from avsep.export import open_bundle
    from avsep.progress import printable

    output = Output(json=json, quiet=quiet, verbose=verbose)
    opened = open_bundle(bundle)
    manifest = opened.manifest
    facts = {**bundle_as_data(opened, bundle), "files": len(opened.files), "megabytes": opened.megabytes}
    output.result({"format": "avsep-export-info", **facts, "manifest": manifest})
    rate, clip = opened.sample_rate_hz, manifest["chunking"]["clip_samples"]
    rows = {
        "bundle": f"{opened.name}, {opened.megabytes:.1f} MB in {len(opened.files)} files",
        "made from": manifest["made_from"] or "not stated",
        "made": f"{manifest['created']} with " + ", ".join(f"{k} {v}" for k, v in manifest["made_with"].items()),
        "weights' licence": manifest["weights_licence"] or "not stated",
        "classes": ", ".join(opened.classes) or "not named",
        **{f"without {name}": why for name, why in opened.left_out.items()},
        "sample rate": f"{rate} Hz, chunks of {clip} samples ({clip / rate:.3f} s)",
    }
    if (channels := manifest.get("channels", 1)) > 1:
        rows["channels"] = f"{channels}, or mono"
    if manifest["separator"]["front_end"].get("limit_mask_sum"):
        rows["masks"] = "sum up to at most 1: the parts and the residual add up to the mixture"
    if (threshold := manifest.get("presence_threshold")) is not None:
        rows["presence"] = f"told of each source; from {threshold:.3g} on it counts as present"
    if any(tensor.name == "seen" for graph in opened.graphs for tensor in graph.inputs):
        rows["pictures"] = "looked at where it is asked for" if opened.by_name else "welcome, not required"
    for source in manifest["visual"]:
        what = "frames" if source["kind"] == "frames" else f"stored features '{source['name']}'"
        how = f", computed by {source['graph']}" if source["graph"] else ""
        rows[f"{source['role']} features"] = f"of {what}{how}"
    for graph in opened.graphs:
        for side, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            shapes = "; ".join(f"{t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors)
            rows[f"{graph.file} {side}"] = shapes
        rows[f"{graph.file} needs"] = f"opset {graph.entry['opset']}, TensorRT {graph.entry['least_tensorrt']} or later"
        if chosen := graph.entry.get("quantised"):
            rows[f"{graph.file} has"] = (
                f"{chosen['layers']} of {chosen['of']} convolutions in INT8, chosen on {chosen['mixtures']} "
                f"{chosen['on']} mixtures"
            )
    width = max(map(len, rows))
    for name, text in rows.items():
        output.say(f"{name:<{width}}  {printable(text)}")
    _show(output, [opened], "measured when it was made")


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a bundle's manifest."""
    from avsep.export.bundle.manifest import schema_text

    typer.echo(schema_text(), nl=False)

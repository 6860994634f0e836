"""``avsep export``: make bundles, check them, look into them, build engines from them.

``avsep export RUN ...`` is ``avsep export run RUN ...``: a first word that names no subcommand means ``run``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

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
    alone = len(args) == 1 or args[1].startswith("-")
    return alone and not {"-h", "--help"} & set(args[1:]) and (Path(args[0]) / "run.yaml").is_file()


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Export separators as bundles for other machines: avsep export RUN --out BUNDLE (short for: export run).",
)

_Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder or .tar.")]
_TARGETS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
_Sm = Annotated[
    list[str] | None,
    typer.Option(
        "--sm",
        help="Compute capabilities to build for without a GPU, such as 86,120 (tensorrt-rtx) (default: the GPU here).",
    ),
]
_Workspace = Annotated[
    int, typer.Option("--workspace-mib", min=1, help="Most scratch memory of a layer; less where memory is short.")
]


@app.command(_DEFAULT)
def run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="The bundle: a folder, or a .tar; with several tasks a folder for task-00, ..."),
    ],
    task: Annotated[
        list[int] | None,
        typer.Option("--task", min=0, help="Export this task's separator (repeatable) (default: the last finished)."),
    ] = None,
    all_tasks: Annotated[bool, typer.Option("--all-tasks", help="Export every finished task's separator.")] = False,
    tar: Annotated[bool, typer.Option("--tar", help="Write several tasks as task-00.tar, ...")] = False,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="fp32, fp16 or int8 (repeatable: a graph each) (default: fp32)."),
    ] = None,
    sources: Annotated[int, typer.Option("--sources", min=1, help="Sources separated in one call.")] = 2,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Mixtures in one call.")] = 1,
    length_s: Annotated[
        float | None,
        typer.Option("--length-s", help="Seconds of one call (default: the clip's that it was trained on)."),
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Leave the numbers of mixtures and sources open (slower in TensorRT).")
    ] = False,
    spectral: Annotated[
        bool, typer.Option("--spectral", help="Leave both transforms out of the graph (for DLA).")
    ] = False,
    motion_steps: Annotated[
        int | None,
        typer.Option(
            "--motion-steps", min=1, help="Steps of the motion features (default: the encoder's; 8 for stored ones)."
        ),
    ] = None,
    opset: Annotated[int, typer.Option("--opset", help="ONNX operator set, 18 to 20.")] = 18,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", help="Largest difference from PyTorch in a sample (full scale is 1) (default: fp32: 0.001)."
        ),
    ] = None,
    gate_db: Annotated[
        float, typer.Option("--gate-db", help="Largest drift of SDR, SIR or SAR on held-out mixtures, in dB.")
    ] = 0.1,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Let a larger drift pass; the manifest says so.")
    ] = False,
    calibration: Annotated[
        int, typer.Option("--calibration", min=1, help="Training mixtures that INT8 ranges are measured on.")
    ] = 64,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="The run's store, for held-out mixtures (default: where the run says)."),
    ] = None,
    licence: Annotated[
        str, typer.Option("--licence", help="Licence of the weights, noted in the bundle, such as CC-BY-4.0.")
    ] = "",
    target: Annotated[
        str | None,
        typer.Option("--target", help="Build engines at once: tensorrt or tensorrt-rtx (onnxruntime needs none)."),
    ] = None,
    sm: _Sm = None,
    workspace_mib: _Workspace = 1024,
) -> None:
    """Export a task's separator to ONNX as a bundle: graphs, manifest, golden inputs and outputs, device README."""
    from rich.console import Console

    from avsep.errors import ConfigError
    from avsep.export import ExportPlan, export_run
    from avsep.progress import progress_bar
    from avsep.runs import finished_tasks

    if all_tasks and task:
        raise ConfigError(f"--all-tasks and --task {task[0]} ask for different things: give one of them")
    if target is not None:
        _check_target(target)
    if sm and target != "tensorrt-rtx":
        raise ConfigError(f"--sm {sm[0]} is for engines that are built for another GPU: give --target tensorrt-rtx too")
    finished = finished_tasks(run)
    tasks: int | list[int] | None = None
    if not all_tasks:
        tasks = (task[0] if len(set(task)) == 1 else task) if task else finished[-1]
    if tar and isinstance(tasks, int) and out.suffix != ".tar":
        raise ConfigError(f"--tar is for several tasks: for a tar of one, name it so, such as --out {out}.tar")
    plan = ExportPlan(
        batch=batch,
        sources=sources,
        length_s=length_s,
        dynamic=dynamic,
        spectral=spectral,
        precision=tuple(dict.fromkeys(precision or ("fp32",))),
        motion_steps=motion_steps,
        opset=opset,
        tolerance=tolerance,
        calibration=calibration,
        gate_db=gate_db,
        allow_drift=allow_drift,
    )
    with progress_bar() as bars:
        bar = bars.add("exporting", None)

        def progress(label: str, done: int, total: int) -> None:
            bars.advance(bar, 0, note=label)
            bars.update(bar, done, total)

        bundles = export_run(
            run, out, tasks=tasks, plan=plan, store=store, weights_licence=licence, tar=tar, progress=progress
        )
    _show(Console(), bundles, f"exported to {out}")
    if synthetic := [b for b in bundles if any((g.entry["gate"] or {}).get("on") == "synthetic" for g in b.graphs)]:
        typer.echo(
            f"the run's store is not there: {synthetic[0].path} was scored on synthetic mixtures (--store gives the "
            "place of the store)",
            err=True,
        )
    if target is not None and target != "onnxruntime":
        for bundle in bundles:
            _build(bundle, [], target, sm, workspace_mib, None, False)
    typer.echo(f"next: avsep export verify {bundles[0].path}")


def _check_target(target: str) -> None:
    from avsep.errors import UnknownNameError, near_matches

    if target not in _TARGETS:
        raise UnknownNameError(f"unknown target '{target}': {near_matches(target, _TARGETS)}")


def _build(
    bundle: Bundle,
    graphs: Sequence[str],
    target: str,
    sm: Sequence[str] | None,
    workspace_mib: int,
    out: Path | None,
    force: bool,
) -> None:
    from avsep.export.engine import build_engines

    capabilities = [part.strip() for given in sm or () for part in given.split(",") if part.strip()]
    build_engines(
        bundle,
        graphs=graphs,
        target=target,
        sm=capabilities,
        workspace_mib=workspace_mib,
        out=out,
        force=force,
        tell=typer.echo,
    )


def _show(console: Any, bundles: Sequence[Bundle], title: str) -> None:
    """What the manifests say was measured when the bundles were made."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("graph", overflow="fold")
    for heading in ("MB", "max error", "dB", "drift dB", "ms"):
        table.add_column(heading, justify="right")
    table.add_column("ran on", no_wrap=True)
    for bundle in bundles:
        for graph in bundle.graphs:
            parity, gate = graph.entry["parity"], graph.entry["gate"]
            drift = "-" if gate is None else f"{max(gate['max_drift_db'].values()):.3f}"
            table.add_row(
                f"{bundle.path.name}/{graph.file}",
                f"{bundle.size(graph.file) / 1e6:.1f}",
                f"{parity['max_error']:.1e}",
                f"{parity['error_db']:.0f}",
                drift + (" !" if gate is not None and gate["overridden"] else ""),
                f"{1e3 * parity['seconds']:.0f}",
                parity["provider"].removesuffix("ExecutionProvider"),
            )
    console.print(table)


@app.command("verify")
def verify(
    bundle: _Bundle,
    provider: Annotated[
        str,
        typer.Option(
            "--provider", help="What runs the graphs: cpu, cuda, onnxruntime-tensorrt, tensorrt, tensorrt-rtx."
        ),
    ] = "cpu",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Largest difference from the golden outputs (default: each graph's own)."),
    ] = None,
) -> None:
    """Check a bundle's hashes and manifest, and run every graph on its golden inputs."""
    from rich.console import Console
    from rich.table import Table

    from avsep.export import verify_bundle

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
    Console().print(table)
    count = len(result.bundle.files)
    typer.echo(f"all {count} files match the manifest; every graph ran on {result.provider} within its tolerance")


@app.command("build")
def build(
    bundle: _Bundle,
    graph: Annotated[
        list[str] | None,
        typer.Option("--graph", help="A graph of it, such as separator.onnx (repeatable) (default: all)."),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="auto, tensorrt or tensorrt-rtx; onnxruntime only runs the graphs.")
    ] = "auto",
    sm: _Sm = None,
    workspace_mib: _Workspace = 1024,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the engines (default: engines in the bundle; beside a tar)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is good already.")] = False,
) -> None:
    """Build the engines of a bundle for the GPU here, or ahead of time for others.

    Without avsep on the device: python3 build_engine.py in the bundle's folder does the same.
    """
    from avsep.export import open_bundle

    if target != "auto":
        _check_target(target)
    if target == "onnxruntime":
        verify(bundle)
        return
    with open_bundle(bundle) as opened:
        _build(opened, graph or [], target, sm, workspace_mib, out, force)


@app.command("info")
def info(bundle: _Bundle) -> None:
    """What is in a bundle, from its manifest; hashes are checked, nothing is run."""
    from rich.console import Console

    from avsep.export import open_bundle

    opened = open_bundle(bundle)
    manifest = opened.manifest
    rate, clip = opened.sample_rate_hz, manifest["chunking"]["clip_samples"]
    rows = {
        "bundle": f"{opened.name}, {opened.megabytes:.1f} MB in {len(opened.files)} files",
        "made from": manifest["made_from"] or "not stated",
        "made": f"{manifest['created']} with " + ", ".join(f"{k} {v}" for k, v in manifest["made_with"].items()),
        "weights' licence": manifest["weights_licence"] or "not stated",
        "classes": ", ".join(opened.classes) or "not named",
        "sample rate": f"{rate} Hz, chunks of {clip} samples ({clip / rate:.3f} s)",
    }
    for source in manifest["visual"]:
        what = "pictures" if source["kind"] == "frames" else f"stored features '{source['name']}'"
        how = f", computed by {source['graph']}" if source["graph"] else ""
        rows[f"{source['role']} features"] = f"of {what}{how}"
    for graph in opened.graphs:
        for side, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            told = "; ".join(f"{t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors)
            rows[f"{graph.file} {side}"] = told
        rows[f"{graph.file} needs"] = f"opset {graph.entry['opset']}, TensorRT {graph.entry['least_tensorrt']} or later"
    width = max(map(len, rows))
    for name, told in rows.items():
        typer.echo(f"{name:<{width}}  {told}")
    _show(Console(), [opened], "measured when it was made")


@app.command("plugin")
def plugin(
    bundle: _Bundle,
    out: Annotated[Path, typer.Option("--out", help="Folder for the plugin's graph, kernels and definition.")],
    sm: _Sm = None,
) -> None:
    """Experimental: the fused mask synthesis as a TensorRT plugin (10.9 and later, not 10.14), compiled without a GPU.

    The plain graph stays the default; nothing else of a bundle needs this.
    """
    from avsep.errors import ConfigError
    from avsep.export import open_bundle
    from avsep.export.plugin import ARCHITECTURES, export_plugin
    from avsep.spec import FrontEndSpec

    wanted = [part.strip().removeprefix("sm_") for given in sm or () for part in given.split(",") if part.strip()]
    if bad := [part for part in wanted if not part.isdigit()]:
        raise ConfigError(f"--sm {bad[0]!r} is no compute capability: such as {', '.join(map(str, ARCHITECTURES))}")
    with open_bundle(bundle) as opened:
        spec = FrontEndSpec(**opened.manifest["separator"]["front_end"])
        graph = opened.folder() / opened.graph("separator").file
        folder = export_plugin(graph, spec, out, [int(part) for part in wanted] or ARCHITECTURES)
    typer.echo(f"plugin in {folder}; next, on the device: python3 build_engine.py --plugin {folder}")


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a bundle's manifest."""
    from avsep.export.schema import schema_text

    typer.echo(schema_text(), nl=False)

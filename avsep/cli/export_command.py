"""``avsep export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for task-00, task-01, ...: one bundle each.")],
    task: Annotated[
        list[int] | None,
        typer.Option("--task", min=0, help="Export this task's separator (repeatable) [all finished]."),
    ] = None,
    sources: Annotated[int, typer.Option("--sources", min=1, help="Sources separated in one call.")] = 2,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Mixtures in one call.")] = 1,
    motion_steps: Annotated[
        int | None,
        typer.Option("--motion-steps", min=1, help="Steps of the motion features [the encoder's; 8 for stored ones]."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest difference from PyTorch in a sample (full scale is 1).")
    ] = 1e-3,
) -> None:
    """Export the separator of each finished task to ONNX, verified in ONNX Runtime against PyTorch.

    A bundle holds separator.onnx (mixture and visual features in, waveforms out), manifest.json and golden.npz.
    """
    from rich.console import Console
    from rich.table import Table

    from avsep.export import export_run
    from avsep.progress import progress_bar
    from avsep.runs import finished_tasks

    count = len(set(task)) if task else len(finished_tasks(run))
    with progress_bar() as bars:
        bar = bars.add("exporting", count)
        bundles = export_run(
            run,
            out,
            tasks=task or None,
            batch=batch,
            sources=sources,
            tolerance=tolerance,
            motion_steps=motion_steps,
            progress=lambda done, total: bars.update(bar, done, total),
        )
    table = Table(title=f"exported to {out}")
    table.add_column("file", overflow="fold")
    for heading in ("MB", "max error", "dB", "ms"):
        table.add_column(heading, justify="right")
    table.add_column("ran on", no_wrap=True)
    for bundle in bundles:
        parity = bundle.parity
        table.add_row(
            f"{bundle.folder.name}/{bundle.graph.name}",
            f"{bundle.megabytes:.1f}",
            f"{parity.max_error:.1e}",
            f"{parity.error_db:.0f}",
            f"{1e3 * parity.seconds:.0f}",
            parity.provider.removesuffix("ExecutionProvider"),
        )
    Console().print(table)

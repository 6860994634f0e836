"""``avsep report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, link, next_command


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as avsep train writes it.", show_default=False)],
    compare: Annotated[
        list[Path] | None,
        typer.Option("--compare", help="Another run on the same tasks, shown beside it (repeatable)."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The page to write [default: RUN/report.html].")] = None,
    mixtures: Annotated[int, typer.Option("--mixtures", min=0, help="Test mixtures to hear.")] = 12,
    store: Annotated[Path | None, typer.Option("--store", help="Store folder [default: the run's own].")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write one HTML page of a run: scores, curves, and test mixtures to hear and to see."""
    from avsep.environment import pick_device
    from avsep.evaluation.report import write_report

    output = Output(json=json, quiet=quiet, verbose=verbose)
    with output.bars() as bars:
        state: dict[str, int] = {}

        def show(done: int, total: int) -> None:
            if not state:
                state.update(bar=bars.add("separating", total=total), done=0)
            bars.advance(state["bar"], done - state["done"])
            state["done"] = done

        page = write_report(
            run, out, mixtures=mixtures, compare=compare, store=store, device=pick_device(device), progress=show
        )
    size = page.stat().st_size
    output.result({"format": "avsep-report", "file": page, "bytes": size})
    output.say(f"report written to {link(page)} ({size / 1e6:.1f} MB): open it in a browser")
    output.say(next_command("export", run, "--out", f"{Path(run).name}-bundle"))

"""``avsep memory``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, link


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as avsep train or learn writes it.", show_default=False)],
    carry: Annotated[
        bool,
        typer.Option("--carry", help="Copy the exemplars into the run, so that its store may be deleted."),
    ] = False,
    forget: Annotated[str | None, typer.Option("--forget", help="Remove this class's exemplars from the run.")] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Write an HTML page to hear and to see the exemplars (extra report).")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Where the store lies of a run that has not its memory [default: where it was]."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Of --carry: auto, cpu, cuda or mps.")] = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List and play the exemplars that a run carries; copy them into the run; forget a class's."""
    from rich.table import Table

    from avsep.runs.folder import RunFolder
    from avsep.training import extending

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if carry:
        output.detail(f"{run}: its exemplars are copied, on {device}")
        try:
            extending.carry(run, store=store, device=device, progress=not quiet)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the run is as it was; the same command goes on where it stopped") from None
    forgotten = None
    if forget is not None:
        forgotten = {"class": forget, "count": (count := extending.forget(run, forget))}
        output.say(
            f"{count} exemplars of {forget} are removed. The separator still knows {forget}, and may lose it as more "
            "is learned; what the strategy keeps, and the recordings to validate and test on, are not changed"
        )
    opened, found = extending.kept_exemplars(run, store)
    carries = opened.path == RunFolder(run).memory
    output.detail(f"{run} has its exemplars in {opened.path}")
    whole = {
        "count": sum(one.count for one in found),
        "seconds": sum(one.seconds for one in found),
        "bytes": sum(one.bytes for one in found),
    }
    table = Table(title=f"exemplars in {run if carries else opened.path}")
    for heading in ("class", "exemplars", "seconds", "bytes", "recordings"):
        table.add_column(heading, justify="left" if heading in ("class", "recordings") else "right")
    for one in found:
        shown = ", ".join(one.ids[:3]) + (", ..." if len(one.ids) > 3 else "")
        table.add_row(one.class_name, str(one.count), f"{one.seconds:.1f}", f"{one.bytes:,}", shown)
    whole_row = (str(whole["count"]), f"{whole['seconds']:.1f}", f"{whole['bytes']:,}")
    table.add_row("all", *whole_row, "", end_section=True)
    output.show(table)
    if not carries:
        again = f"avsep memory {shlex.quote(str(run))} --carry"
        output.say(f"they lie in the run's store, which must stay; {again} copies them into the run")
    if page is not None:
        from avsep.evaluation.memory_page import render_memory
        from avsep.files import write_text

        write_text(page, render_memory(run.resolve().name, opened, {one.class_name: one.ids for one in found}))
        output.say(f"page written to {link(page)} ({page.stat().st_size / 1e6:.1f} MB)")
    output.result(
        {
            "format": "avsep-memory",
            "run": run,
            "store": opened.path,
            "carried": carries,
            "classes": [
                {"class": k.class_name, "count": k.count, "seconds": k.seconds, "bytes": k.bytes, "ids": k.ids}
                for k in found
            ],
            "all": whole,
            "forgotten": forgotten,
            "page": page,
        }
    )

"""``avsep sweep``: several methods on a store of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avsep.cli._grids import AnyCode, Device, Finished, Jobs, Plan, Resume
from avsep.cli._output import Json, Output, Quiet, Verbose


def command(
    store: Annotated[Path, typer.Argument(help="Store folder.", show_default=False)],
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            help="Strategy, with parameters and combined with others where wanted: lwf, 'lwf(weight_mask=0.1)', "
            "'gated_distillation+weight_average' (repeatable). The first one is the control.",
        ),
    ],
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            help="Memory policy of the methods, such as none or 'random_per_class(per_class=2)'; every method is run "
            "with each (repeatable) [default: random_per_class].",
        ),
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="Separator and training (see: avsep list presets).")] = (
        "iquery_small"
    ),
    tasks: Annotated[
        int | None, typer.Option("--tasks", min=1, help="Classes a task [default: 5, or halves].", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of every method.")] = 3,
    orders: Annotated[
        str, typer.Option("--orders", help="rotated: a class order of its own for every seed; store: one for all.")
    ] = "rotated",
    updates: Annotated[
        int | None,
        typer.Option("--updates", min=1, help="Steps of every task [default: the preset's epochs and lists]."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for cells, table, picture and the page.")] = Path(
        "avsep-sweep"
    ),
    jobs: Jobs = None,
    resume: Resume = False,
    package: Annotated[
        list[str] | None, typer.Option("--with", metavar="PACKAGE", help="Import it: it registers strategies.")
    ] = None,
    device: Device = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of a run.")] = 1,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting of all runs, e.g. train.epochs=2 (repeatable).")
    ] = None,
    any_code: AnyCode = False,
    plan: Plan = False,
    finished: Finished = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare methods on your own store: each with several seeds and class orders, on one page.

    For example: avsep sweep stores/mine --method finetune --method contavsep --tasks 3
    """
    from avsep.cli._grids import run_board
    from avsep.data.store import Store
    from avsep.errors import ConfigError, UnknownNameError, near_matches
    from avsep.reproduce.leaderboard import load_package, sweep_of
    from avsep.spec import apply_settings

    output = Output(json=json, quiet=quiet, verbose=verbose)
    known = ("rotated", "store")
    if orders not in known:
        raise UnknownNameError(f"no class orders named '{orders}': {near_matches(orders, known)}")
    for name in package or ():
        load_package(name)
    if tasks is None:  # as avsep train cuts them
        count = len(Store.open(store).classes)
        tasks = 5 if count % 5 == 0 else max(1, (count + 1) // 2)
    changes = apply_settings({}, settings or [])
    for key in changes:
        if key not in ("separator", "train"):
            raise ConfigError(f"--set {key}: a sweep sets separator.... and train...., the rest has options")
    board, grid = sweep_of(
        method,
        memory or ["random_per_class"],
        preset=preset,
        tasks=tasks,
        seeds=seeds,
        orders=orders,
        updates=updates,
        threads=threads,
        changes=changes,
    )
    run_board(
        board,
        output,
        grid=grid,
        dataset=str(store.resolve()),  # never the name of what is made
        preset=preset,
        out=out,
        jobs=jobs,
        resume=resume,
        bases=None,
        entries=None,
        packages=package or [],
        results=None,
        device=device,
        launcher="local",
        launcher_settings=[],
        any_code=any_code,
        plan=plan,
        finished=finished,
        name="sweep",
        title="Methods compared",
    )

"""``avsep leaderboard``: many methods at equal bytes and equal updates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from avsep.cli._grids import (
    AnyCode,
    Dataset,
    Device,
    Finished,
    Jobs,
    LauncherName,
    LauncherSettings,
    Plan,
    Results,
    Resume,
)
from avsep.cli._output import Json, Output, Quiet, Verbose


def command(
    dataset: Dataset = "synth",
    preset: Annotated[str, typer.Option("--preset", help="small, isomix, looking, or a YAML file.")] = "small",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for cells, tables, pictures and the page [default: avsep-leaderboard, with --tune "
            "avsep-leaderboard-tune].",
        ),
    ] = None,
    jobs: Jobs = None,
    resume: Resume = False,
    base: Annotated[
        list[str] | None, typer.Option("--base", help="Base separator (repeatable) [default: the preset's].")
    ] = None,
    entry: Annotated[
        list[str] | None, typer.Option("--entry", help="Only this entry and the control (repeatable) [default: all].")
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--control", help="The entry that differences are to, in all of --out's tables [default: the preset's]."
        ),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", help="Only this budget (repeatable) [default: the preset's].")
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PACKAGE", help="Import it, and add the strategies that it registers."),
    ] = None,
    screening: Annotated[
        int | None, typer.Option("--screening", min=1, help="Seeds of every entry [default: the preset's].")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds", min=1, help="Seeds of the best third, or of --tune the most [default: the preset's; 8]."
        ),
    ] = None,
    results: Results = None,
    device: Device = "auto",
    launcher: LauncherName = "local",
    launcher_settings: LauncherSettings = None,
    any_code: AnyCode = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose the entries' settings on validation pairs instead; before the board.")
    ] = False,
    plan: Plan = False,
    finished: Finished = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rank methods at equal bytes and equal updates; all with a few seeds, the best third with many.

    Writes Markdown, CSV, pictures and a page with filters. A board that was killed goes on with --resume.
    """
    from avsep.cli._grids import run_board
    from avsep.errors import ConfigError, UnknownNameError, near_matches
    from avsep.reproduce.leaderboard import load_board_preset, load_package

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if tune:
        for option, value in (("screening", screening), ("control", control)):
            if value is not None:
                raise ConfigError(f"--{option} {value} is of the board, and --tune makes none: leave it out")
    board = load_board_preset(preset)
    known = {one.name for one in board.entries}
    more = tuple(one for name in package or () for one in load_package(name) if one.name not in known)
    changes: dict[str, Any] = {"entries": (*board.entries, *more)}
    given = {"screening": screening, "seeds": None if tune else seeds, "control": control}
    changes |= {name: value for name, value in given.items() if value is not None}
    for name in budget or ():
        if name not in board.budgets:
            raise UnknownNameError(f"no budget named '{name}': {near_matches(name, board.budgets)}")
    if budget:
        changes["budgets"] = {name: size for name, size in board.budgets.items() if name in budget}
    board = board.model_copy(update=changes)
    board.check()
    run_board(
        board,
        output,
        grid=None,
        dataset=dataset,
        preset=preset,
        out=out or Path("avsep-leaderboard-tune" if tune else "avsep-leaderboard"),
        jobs=jobs,
        resume=resume,
        bases=base,
        entries=entry,
        packages=package or [],
        results=results,
        device=device,
        launcher=launcher,
        launcher_settings=launcher_settings or [],
        any_code=any_code,
        plan=plan,
        finished=finished,
        name="leaderboard",
        title="Methods at equal bytes and equal updates",
        tune=tune,
        tuning_seeds=seeds,
    )

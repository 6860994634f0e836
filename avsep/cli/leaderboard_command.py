"""``avsep leaderboard``: many methods at equal bytes and equal updates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from avsep.environment import MOST_PROCESSES


def command(
    dataset: Annotated[
        str, typer.Option("--dataset", help="A store's folder; synth: the offline benchmark, made if missing.")
    ] = "synth",
    preset: Annotated[str, typer.Option("--preset", help="small, or a YAML file.")] = "small",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for cells, tables, pictures and the page [default: avsep-leaderboard, with --tune "
            "avsep-leaderboard-tune].",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, max=MOST_PROCESSES, help="Cells at a time [default: the cores; 1 on a GPU]."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the board in --out was.")] = False,
    base: Annotated[
        list[str] | None, typer.Option("--base", help="Base separator (repeatable) [default: the preset's].")
    ] = None,
    entry: Annotated[
        list[str] | None, typer.Option("--entry", help="Only this entry and the control (repeatable) [default: all].")
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PACKAGE", help="Import it, and add the strategies that it registers."),
    ] = None,
    screening: Annotated[
        int | None, typer.Option("--screening", min=1, help="Seeds of every entry [default: the preset's].")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Seeds of the best third [default: the preset's].")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option("--results", help="Folder of finished cells, which then count as finished here (repeatable)."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    launcher: Annotated[str, typer.Option("--launcher", help="local; submitit, a Slurm cluster; inline.")] = "local",
    launcher_settings: Annotated[
        list[str] | None,
        typer.Option("--launcher-set", help="Of submitit, e.g. slurm_partition=gpu, timeout_min=600 (repeatable)."),
    ] = None,
    any_code: Annotated[
        bool, typer.Option("--any-code", help="With --resume: go on though the library has changed since.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose the entries' settings on validation pairs instead; before the board.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be run.")] = False,
) -> None:
    """Rank methods at equal bytes and equal updates; all with a few seeds, the best third with many.

    Writes Markdown, CSV, pictures and a page with filters. A board that was killed goes on with --resume.
    """
    from avsep.cli._grids import run_board
    from avsep.reproduce.leaderboard import load_board_preset, load_package

    board = load_board_preset(preset)
    known = {one.name for one in board.entries}
    more = tuple(one for name in package or () for one in load_package(name) if one.name not in known)
    changes: dict[str, Any] = {"entries": (*board.entries, *more)}
    changes |= {k: v for k, v in (("screening", screening), ("seeds", seeds)) if v is not None}
    run_board(
        board.model_copy(update=changes),
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
        name="leaderboard",
        title="Methods at equal bytes and equal updates",
        tune=tune,
    )

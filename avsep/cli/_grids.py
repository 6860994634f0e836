"""What commands that run grids of cells have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli._output import Output
from avsep.environment import MOST_PROCESSES

if TYPE_CHECKING:
    from avsep.reproduce import Cell, Grid, GridPreset, ResultStore
    from avsep.reproduce.leaderboard import BoardPreset
    from avsep.reproduce.runner import Launcher

Dataset = Annotated[
    str, typer.Option("--dataset", help="A store's folder; synth: the offline benchmark, made if missing.")
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, max=MOST_PROCESSES, help="Cells at a time [default: the cores; 1 on a GPU]."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the cells in --out were.")]
Results = Annotated[
    list[Path] | None,
    typer.Option("--results", help="Folder of finished cells, which then count as finished here (repeatable)."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
LauncherName = Annotated[str, typer.Option("--launcher", help="local; submitit, a Slurm cluster; inline.")]
LauncherSettings = Annotated[
    list[str] | None,
    typer.Option("--launcher-set", help="Of submitit, e.g. slurm_partition=gpu, timeout_min=600 (repeatable)."),
]
AnyCode = Annotated[bool, typer.Option("--any-code", help="With --resume: go on though the library has changed since.")]
Plan = Annotated[bool, typer.Option("--plan", help="Only say what would be run.")]
Finished = Annotated[
    bool,
    typer.Option("--finished", help="Run no cell: write the tables in --out from those that are finished so far."),
]

__all__ = [
    "device_of",
    "failures_of",
    "jobs_at_a_time",
    "launcher_of",
    "raise_failed",
    "run_board",
    "tell_choices",
    "tell_plan",
]


def check_finished(finished: bool, out: Path, results: Collection[Path] | None, others: Mapping[str, Any]) -> None:
    """Refuse ``--finished`` where there cannot be a cell, and beside options that show something else; ``others`` are
    by name what was given of these. Those of running cells may stand in the same command."""
    from avsep.errors import ConfigError, RunError
    from avsep.reproduce.runner import is_grid

    if not finished:
        return
    if given := next((name for name, value in others.items() if value), None):
        raise ConfigError(f"--finished writes tables of all that is finished: leave out --{given}, or --finished")
    if not results and not is_grid(out):
        raise RunError(
            f"no grid was begun in {out}, so nothing is finished: give another --out, or leave out --finished"
        )


def shown_part(grid: Grid, results: ResultStore, out: Path, title: str) -> Grid:
    """What is finished of a grid; raises where nothing is."""
    from avsep.errors import RunError
    from avsep.reproduce.grid import finished_part

    part = finished_part(grid, results)
    if not part.rows:
        others = results.passed_over(grid.cells.values())
        named = f" ({len(others)} with their names are of other settings, data or version)" if others else ""
        raise RunError(f"no cell of {title} is finished in {out}{named}: leave out --finished to run them")
    return part


def raise_failed(grid: Grid, failed: dict[str, str]) -> None:
    """Say that cells failed, if some did."""
    from avsep.errors import AvsepError

    if failed:
        first = next(iter(failed))
        raise AvsepError(
            f"{len(failed)} of {len(grid.cells)} cells failed, those of the others that are needed are finished; "
            f"{grid.cells[first].name}: "
            f"{failed[first]}"
        )


def failures_of(grid: Grid, failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """What ``--json`` prints of cells that failed."""
    return [{"cell": grid.cells[key].name, "key": key, "error": " ".join(text.split())} for key, text in failed.items()]


def device_of(name: str, launcher: str) -> str:
    """The kind of device that cells run on; on a cluster, whose machines may have others than this one, the name as it
    was given, which is resolved there."""
    from avsep.environment import pick_device, refuse_number

    refuse_number(name)
    if launcher == "submitit" and name in ("auto", "cpu", "cuda", "mps"):
        return name
    return pick_device(name).type


def jobs_at_a_time(accelerator: str, launcher: str, threads: int) -> int:
    """How many cells run at once where nobody says so: one on a GPU, else as many as the cores hold."""
    from avsep.reproduce.runner import cores

    return 1 if accelerator != "cpu" and launcher != "submitit" else max(1, cores() // threads)


def tell_plan(output: Output, cells: Sequence[Cell], grid: Grid, results: ResultStore) -> dict[str, Any]:
    """Say which cells would be run, and how many core hours they take, once one of their base is finished; returned is
    what ``--json`` prints of it."""
    from avsep.reproduce.power import hours_left

    console = output.console(highlight=False, soft_wrap=True)
    for cell in cells:
        problem = f" (cannot be run: {cell.problem})" if cell.problem else ""
        console.print(f"  {cell.name}: about {cell.steps} steps{problem}")
    hours = hours_left(cells, results, grid.cells.values(), grid.preset.seconds_per_step)
    steps = sum(cell.steps for cell in cells)
    said = "no cell is finished yet to tell the time by" if hours is None else f"about {hours:.1f} core hours"
    console.print(f"  in all {steps} steps; {said}")
    return {
        "cells": [{"cell": c.name, "key": c.key, "steps": c.steps, "problem": c.problem or None} for c in cells],
        "steps": steps,
        "core_hours": hours,
    }


def launcher_of(name: str, out: Path, settings: list[str]) -> Launcher:
    from avsep.errors import ConfigError, UnknownNameError, near_matches
    from avsep.reproduce.runner import LAUNCHERS, InlineJob, LocalJob, SubmititLauncher
    from avsep.spec import apply_settings

    if name not in LAUNCHERS:
        raise UnknownNameError(f"no launcher named '{name}': {near_matches(name, LAUNCHERS)}")
    if name != "submitit":
        if settings:
            raise ConfigError("--launcher-set is of --launcher submitit: leave it out")
        return InlineJob if name == "inline" else LocalJob
    parameters: dict[str, Any] = apply_settings({}, settings)
    return SubmititLauncher(out, parameters.pop("cluster", None), parameters)


def tell_choices(
    output: Output,
    grid: Grid,
    results: ResultStore,
    failed: Collection[str],
    where: str = "'strategies' of the preset's bases",
) -> list[dict[str, Any]]:
    """Show the scores of a tuning's candidates, and what is chosen as YAML for ``where``; returned is what ``--json``
    prints of them."""
    import json

    import yaml

    from avsep.reproduce import choices

    console = output.console(highlight=False)
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    rows = []
    for choice in choices(grid, results, failed):
        console.print(f"{choice.base}, {choice.row}")
        candidates = []
        for number, (settings, score, count) in enumerate(choice.candidates):
            said = ", ".join(f"{key} {_plain(value)}" for key, value in settings.items())
            mark = "chosen" if settings == choice.best else "" if number in choice.open else "given up"
            value = "not run" if score is None else f"{score:.2f} dB ({count} seed{'s' if count != 1 else ''})"
            console.print(f"  {said}: {value}{f', {mark}' if mark else ''}")
            given_up = number not in choice.open and settings != choice.best
            candidates.append({"settings": settings, "validation_sdr_db": score, "seeds": count, "given_up": given_up})
        if choice.best is None:
            console.print("  nothing is chosen yet")
        else:
            chosen.setdefault(choice.base, {})[choice.row] = choice.best
        rows.append({"base": choice.base, "row": choice.row, "candidates": candidates, "chosen": choice.best})
    console.print(f"\nmean SDR on validation pairs after task {len(grid.stream) - 1}; for {where}:")
    apart = json.loads(json.dumps(chosen))  # bases with equal settings share an object, which YAML would write once
    console.print(yaml.safe_dump(apart, sort_keys=False).rstrip())
    return rows


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def run_board(
    board: BoardPreset,
    output: Output,
    *,
    grid: GridPreset | None,
    dataset: str,
    preset: str,
    out: Path,
    jobs: int | None,
    resume: bool,
    bases: list[str] | None,
    entries: list[str] | None,
    packages: list[str],
    results: list[Path] | None,
    device: str,
    launcher: str,
    launcher_settings: list[str],
    any_code: bool,
    plan: bool,
    finished: bool,
    name: str,
    title: str,
    tune: bool = False,
    tuning_seeds: int | None = None,
) -> None:
    """Run a board round by round, and write it; ``grid`` stands for the preset that the board names."""
    import importlib.util
    from dataclasses import replace

    from avsep.errors import MissingExtraError
    from avsep.reproduce import ResultStore, run_grid
    from avsep.reproduce.board_page import board_rows, write_board
    from avsep.reproduce.dataset import open_dataset
    from avsep.reproduce.leaderboard import board_tuning, build_board, next_round, tables_of
    from avsep.reproduce.preset import load_grid_preset
    from avsep.reproduce.runner import Outcome, check_folder, claim, is_grid
    from avsep.reproduce.tuning import SEEDS as TUNING_SEEDS
    from avsep.reproduce.tuning import next_round as next_candidates

    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "reproduce", "the page and its pictures")
    loaded = grid if grid is not None else load_grid_preset(board.grid)
    loaded.check_bases(bases or ())
    board.check_entries(entries or ())  # before a data set is made
    check_finished(finished, out, results, {"plan": plan})
    check_folder(out, resume or (finished and is_grid(out)), preset=preset, given=board, tuning=tune)
    accelerator = device_of(device, launcher)
    started = launcher_of(launcher, out, launcher_settings)
    store, data_set = open_dataset(dataset, loaded, out / "store", progress=not output.quiet)
    claimed = ResultStore(out / "cells", results or [])
    if tune:
        most = tuning_seeds or TUNING_SEEDS
        whole = board_tuning(board, store, grid=loaded, bases=bases, entries=entries, seeds=most)
    else:
        whole = build_board(board, store, grid=loaded, bases=bases, entries=entries)
    count = len(whole.cells)
    if finished:
        there = shown_part(whole, claimed, out, name)
        whole = whole if tune else there  # who chooses sees what is not run too

    def next_cells() -> Grid:
        if finished:
            return replace(whole, cells={})
        if tune:
            more = next_candidates(whole, claimed, failed, board.tuning_seeds)
        else:
            more = next_round(board, whole, claimed, failed)
        return more or replace(whole, cells={})

    failed: dict[str, str] = {}
    part = next_cells()
    console = output.console(highlight=False, soft_wrap=True)
    rows = sum(len(of_base) for table in whole.rows.values() for of_base in table.values())
    done = sum(key in claimed for key in whole.cells)
    console.print(
        f"{name}: {rows} {'candidates' if tune else 'rows'}, "
        + (f"{done} of {count} cells finished" if finished else f"{len(part.cells)} cells to be run now")
        + f"{'' if tune or finished or board.screening >= board.seeds else ', and more seeds of the best then'}"
    )
    notes = list(dict.fromkeys(note for notes in whole.notes.values() for note in notes))
    for note in notes:
        console.print(f"  {note}")
    output.detail(f"{store.path}, {len(store.clips)} clips; cells and tables in {out}, on {accelerator}")
    data: dict[str, Any] = {"format": f"avsep-{name}", "out": out, "data_set": data_set, "rows": rows, "notes": notes}
    if plan:
        output.result({**data, "plan": tell_plan(output, list(part.cells.values()), whole, claimed)})
        return
    if not (finished and is_grid(out)):
        claim(out, whole, preset=preset, given=board, device=accelerator, any_code=any_code)

    def run(some: Grid) -> Outcome:
        return run_grid(
            some,
            out,
            results=claimed,
            jobs=jobs or jobs_at_a_time(accelerator, launcher, loaded.threads),
            device=accelerator,
            launcher=started,
            packages=packages,
            title=name,
            preset=Path(preset).stem,
            progress=not output.quiet,
        )

    try:
        while part.cells:
            failed |= run(part).failed
            part = next_cells()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("go on with the same command and --resume") from None
    if tune:
        chosen = tell_choices(output, whole, claimed, failed, "'settings' of the board's preset")
        output.result({**data, "choices": chosen, "failed": failures_of(whole, failed)})
        return raise_failed(whole, failed)
    budgets = {table: table if board.budgets else "all" for table in whole.rows}
    tables = tables_of(
        board,
        whole,
        claimed,
        data_set=data_set,
        preset=Path(preset).stem,
        title=lambda table: f"{title} ({table})" if board.budgets else title,
        failed=failed,
    )
    each = f"every row with {board.screening} seeds and the best with"
    said = {
        table.name: f"{data_set}, preset {Path(preset).stem}, {each} {table.most_seeds}"
        if table.screened
        else table.heading
        for table in tables
    }
    lead = [f"{rows} rows on {next(iter(said.values()))}."]
    if len(set(said.values())) > 1:
        lead = [f"{budgets[table]}: {text}." for table, text in said.items()]
    references = [entry.name for entry in board.entries if entry.reference]
    written = write_board(out, name, tables, whole, title=title, titles=budgets, lead=lead, references=references)
    output.result(
        {
            **data,
            "lines": board_rows(tables, whole, budgets, references),
            "failed": failures_of(whole, failed),
            "files": written,
        }
    )
    console.print()
    console.print((out / f"{name}.md").read_text(encoding="utf-8"))
    console.print(f"written to {', '.join(map(str, written))}")
    raise_failed(whole, failed)

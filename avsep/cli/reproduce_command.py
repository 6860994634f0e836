"""``avsep reproduce``: the paper's tables and figures."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from avsep.reproduce import Cell, Grid, ResultStore


def command(
    tables: Annotated[
        list[str],
        typer.Argument(
            metavar="TABLE...",
            help="table1, table2, table3, figure3, figure4, budget, or all of these; crosssdc, why CrossSDC costs "
            "or helps; or tune, which comes first.",
            show_default=False,
        ),
    ],
    dataset: Dataset = "synth",
    preset: Annotated[
        str, typer.Option("--preset", help="small (hours on two CPU cores), looking, paper, or a YAML file.")
    ] = "small",
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            min=1,
            help="Runs of every cell; of tune the most [default: the preset's; 8].",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for cells, tables and plots [default: avsep-reproduce; tune: avsep-tune]."),
    ] = None,
    jobs: Jobs = None,
    resume: Resume = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="iquery, coseparation, or both [default: as in the paper's table]."),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option("--row", help="Only this row, e.g. contavsep+memory (repeatable) [default: all]."),
    ] = None,
    results: Results = None,
    readme: Annotated[
        Path | None, typer.Option("--readme", help="Markdown page to put the tables into, between their markers.")
    ] = None,
    device: Device = "auto",
    launcher: LauncherName = "local",
    launcher_settings: LauncherSettings = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the run folders of finished cells.")] = False,
    any_code: AnyCode = False,
    plan: Plan = False,
    finished: Finished = False,
    power: Annotated[
        float | None,
        typer.Option(
            "--power",
            metavar="DB",
            help="Only say, from the cells so far, how many seeds it takes to tell rows by so many dB.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the grid behind tables and figures of the paper, and show ours beside the paper's.

    Cells that several tables share are run once. A grid that was killed goes on with --resume, and its result is the
    same to the last digit on the CPU, whatever --jobs.
    """
    from dataclasses import replace

    from avsep.cli._grids import (
        check_finished,
        device_of,
        failures_of,
        jobs_at_a_time,
        launcher_of,
        raise_failed,
        shown_part,
        tell_choices,
        tell_plan,
    )
    from avsep.errors import ConfigError, MissingExtraError
    from avsep.reproduce import (
        ResultStore,
        build_grid,
        build_table,
        build_tuning,
        load_grid_preset,
        run_grid,
        write_table,
    )
    from avsep.reproduce.dataset import BENCHMARK, SYNTH, open_dataset, planned_dataset
    from avsep.reproduce.grid import needs_data, selection
    from avsep.reproduce.runner import Outcome, check_folder, claim, is_grid
    from avsep.reproduce.tables import markdown, places_in, render_into, table_rows
    from avsep.reproduce.tuning import SEEDS as TUNING_SEEDS
    from avsep.reproduce.tuning import next_round

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "reproduce", "the plots")
    console = output.console(highlight=False, soft_wrap=True)
    loaded = load_grid_preset(preset)
    wanted = _tables(tables)
    if power is not None and (wanted == ["tune"] or not power > 0):
        raise ConfigError(
            "--power is of the tables' rows, and tune has none: leave it out"
            if power > 0
            else f"--power {power:g}: give a difference above 0, in dB"
        )
    if wanted == ["tune"] and readme is not None:
        raise ConfigError(f"--readme {readme} is of the tables, and tune makes none: leave it out")
    out = out or Path("avsep-tune" if wanted == ["tune"] else "avsep-reproduce")
    places = [] if readme is None else places_in(readme, wanted)
    bases = None if base is None else (["iquery", "coseparation"] if base == "both" else [base])
    loaded.check_bases(bases or ())
    check_finished(finished, out, results, {"plan": plan, "power": power, "row": row})
    check_folder(out, resume or (finished and is_grid(out)), preset=preset, given=loaded, tuning=wanted == ["tune"])
    accelerator = device_of(device, launcher)
    started = launcher_of(launcher, out, launcher_settings or [])
    if plan and dataset == SYNTH and not (out / "store" / "manifest.json").is_file() and not needs_data(wanted):
        store, data_set = planned_dataset(loaded), BENCHMARK  # a plan makes no data
    else:
        store, data_set = open_dataset(dataset, loaded, out / "store", progress=not quiet)
    if wanted == ["tune"]:
        grid = build_tuning(loaded, store, seeds=seeds or TUNING_SEEDS, bases=bases, rows=row)
    else:
        grid = build_grid(wanted, loaded, store, seeds=seeds or loaded.seeds, bases=bases, rows=row)
    claimed = ResultStore(out / "cells", results or [])
    asked = grid
    if finished:
        there = shown_part(grid, claimed, out, ", ".join(wanted))
        grid = grid if wanted == ["tune"] else there  # who chooses sees what is not run too
    part = (next_round(grid, claimed) or replace(grid, cells={})) if wanted == ["tune"] and not finished else grid
    missing = [cell for key, cell in part.cells.items() if key not in claimed]
    count = len(asked.cells)
    firsts = len({c.first_key for c in missing if c.shares_first})
    todo = (
        f"{sum(key in claimed for key in grid.cells)} of them finished"
        if finished
        else f"{len(missing)} to be run from {firsts} first task{'s' if firsts > 1 else ''}"
        if missing
        else "all finished"
    )
    console.print(f"{', '.join(wanted)}: {count} cell{'s' if count != 1 else ''}, {todo}")
    if not_taken := claimed.passed_over(asked.cells.values() if finished else missing):
        console.print(
            f"--results: {len(not_taken)} of cells with these names not taken, being of other settings, data or "
            f"version: {not_taken[0].name}{', ...' if len(not_taken) > 1 else ''}"
        )
    output.detail(f"{store.path}, {len(store.clips)} clips; cells and tables in {out}, on {accelerator}")
    data: dict[str, Any] = {
        "format": "avsep-reproduce",
        "out": out,
        "data_set": data_set,
        "tables": wanted,
        "cells": count,
        "not_taken": not_taken,
    }
    if power is not None:
        output.result({**data, "power": _tell_power(output, grid, wanted, claimed, power)})
        return
    if plan:
        output.result({**data, "plan": tell_plan(output, missing, grid, claimed)})
        return
    if not (finished and is_grid(out)):
        claim(out, grid, preset=preset, given=loaded, device=accelerator, any_code=any_code)
    name = Path(preset).stem

    def run(some: Grid) -> Outcome:
        return run_grid(
            some,
            out,
            results=claimed,
            jobs=jobs or jobs_at_a_time(accelerator, launcher, loaded.threads),
            device=accelerator,
            launcher=started,
            keep=keep,
            title=" ".join(wanted),
            preset=name,
            finished=lambda cell: _finished(cell, claimed, tuning=wanted == ["tune"]),
            progress=not quiet,
        )

    try:
        outcome = Outcome(()) if finished else run(part)  # a grid may be at work in the folder
        failed = dict(outcome.failed)
        while wanted == ["tune"] and not finished and (more := next_round(grid, claimed, failed)) is not None:
            failed |= run(more).failed
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with: {_again(tables, locals())}") from None
    if wanted == ["tune"]:
        chosen = tell_choices(output, grid, claimed, failed)
        output.result({**data, "choices": chosen, "failed": failures_of(grid, failed)})
        return raise_failed(grid, failed)
    whole = build_grid(wanted, loaded, store, seeds=seeds or loaded.seeds, bases=bases) if row else grid
    # a choice of rows adds to the tables that are there: rows finished before are shown with them
    shown = selection(whole, lambda line, keys: not row or line.name in row or any(key in claimed for key in keys))
    made: list[dict[str, Any]] = []
    for table_name in wanted:
        if table_name not in shown.rows:
            said = [f"{table_name}: no rows{' finished' if finished else ''}, not written.", *whole.notes[table_name]]
            console.print(" ".join(said))
            made.append({"table": table_name, "lines": [], "notes": whole.notes[table_name], "files": []})
            continue
        table = build_table(shown, table_name, claimed, data_set=data_set, preset=name, failed=outcome.failed)
        written = write_table(table, out)
        console.print()
        console.print(markdown(table))
        console.print(f"written to {', '.join(map(str, written))}")
        made.append({"table": table_name, "lines": table_rows(table), "notes": table.notes, "files": written})
        if readme is not None and table_name in places:
            render_into(readme, table)
    output.result({**data, "made": made, "failed": failures_of(grid, outcome.failed)})
    raise_failed(grid, outcome.failed)


def _tell_power(
    output: Output, grid: Grid, tables: list[str], results: ResultStore, difference: float
) -> dict[str, Any]:
    from dataclasses import asdict

    from avsep.reproduce.grid import BASE_TITLES
    from avsep.reproduce.power import LEAST, needs
    from avsep.reproduce.tables import CONTROL

    console = output.console(highlight=False, soft_wrap=True)
    seen: set[tuple[str, ...]] = set()
    rows = []
    left = 0.0
    console.print(
        f"seeds that find a true difference of {difference:g} dB in four of five times (two-sided t test at 5 %, "
        "without the correction for many rows)"
    )
    for table in tables:
        for need in needs(grid, table, results, difference):
            if (key := (need.base, need.row, need.label, CONTROL[table])) in seen:
                continue
            seen.add(key)
            rows.append({**asdict(need), "control": CONTROL[table]})
            where = f"  {BASE_TITLES.get(need.base, need.base)}, {need.label} ({need.row}): "
            if need.seeds is None or need.hours is None:
                said = f"{need.have} paired seed{'s' if need.have != 1 else ''}, {LEAST} are needed to say"
            else:
                left += need.hours
                said = (
                    f"{need.seeds} seeds; {need.have} so far, difference {need.mean:+.2f} dB with a deviation of "
                    f"{need.deviation:.2f} dB between seeds; {need.hours:.1f} core hours left"
                )
            console.print(where + said)
    console.print(f"{left:.1f} core hours left for the rows that can be told of")
    return {"difference_db": difference, "rows": rows, "core_hours": left}


def _tables(names: list[str]) -> list[str]:
    from avsep.errors import ConfigError, UnknownNameError, near_matches
    from avsep.reproduce import TABLES
    from avsep.reproduce.grid import CROSSSDC

    if "tune" in names:
        if len(names) > 1:
            other = next(name for name in names if name != "tune")
            raise ConfigError(f"tune chooses what the tables are then run with: leave {other} for another command")
        return ["tune"]
    for name in names:
        if name not in (*TABLES, CROSSSDC, "all"):
            raise UnknownNameError(f"no table named '{name}': {near_matches(name, (*TABLES, CROSSSDC, 'all'))}")
    chosen = [one for name in names for one in (TABLES if name == "all" else (name,))]
    return list(dict.fromkeys(chosen))


def _finished(cell: Cell, results: ResultStore, *, tuning: bool) -> str:
    result = results.get(cell.key)
    if result is None:
        return cell.name
    # who chooses by validation pairs is shown nothing of the test's
    score = result.validation if tuning else result.final("sdr")
    what = "validation SDR" if tuning else "SDR"
    return f"{cell.name}: {what} {'' if score is None else f'{score:.2f} dB'}, {result.seconds:.0f} s"


def _again(tables: list[str], given: dict[str, Any]) -> str:
    """The command that goes on with a grid."""
    defaults = {"dataset": "synth", "preset": "small", "device": "auto", "launcher": "local"}
    words = ["avsep", "reproduce", *tables, "--out", str(given["out"])]
    for name in ("dataset", "preset", "seeds", "jobs", "base", "device", "launcher", "readme"):
        if given[name] is not None and given[name] != defaults.get(name):
            words += [f"--{name}", str(given[name])]
    for name, values in (("row", given["row"]), ("results", given["results"])):
        words += [w for v in values or [] for w in (f"--{name}", str(v))]
    words += [w for v in given["launcher_settings"] or [] for w in ("--launcher-set", v)]
    words += [word for word, on in (("--keep", given["keep"]), ("--any-code", given["any_code"])) if on]
    return shlex.join([*words, "--resume"])

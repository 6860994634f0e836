"""``avsep learn``."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, next_command
from avsep.environment import MOST_PROCESSES

if TYPE_CHECKING:
    from rich.table import Table

    from avsep.training.extending import Extension


def command(
    run: Annotated[
        Path,
        typer.Argument(
            help="Run folder, as avsep train writes it; or with --out a model that comes with avsep (avsep models), or "
            "a saved separator.",
            show_default=False,
        ),
    ],
    source: Annotated[
        Path,
        typer.Option("--from", help="Store, or folder with recordings in a folder a class.", show_default=False),
    ],
    classes: Annotated[
        str, typer.Option("--classes", help="Classes to learn, such as cello or cello,viola.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Run folder to make of a model or a saved separator, which stay as they are."),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="Another strategy from here on [default: the run's].")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Another memory from here on [default: the run's].")
    ] = None,
    max_loss_db: Annotated[
        float,
        typer.Option(
            "--max-loss-db", help="Leave the run as it was if an old class's SDR improvement falls by more (inf: any)."
        ),
    ] = 0.5,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting from here on, e.g. train.epochs=10 (repeatable)."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            help="Where the run's own store lies now [default: where it was]; of a saved separator a store with all "
            "of its classes.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Of a saved separator: preset whose settings of the training it goes on with."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, max=MOST_PROCESSES, help="Reader processes; never changes the result."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=MOST_PROCESSES, help="Recordings prepared at once, from a folder.")
    ] = 1,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Teach a finished run, or a separator that comes with avsep, more classes. Continues a killed call; the run can be
    used at every moment.

    Where an old class loses too much, the changes are still told, also with --json; the exit code is 2 then.
    """
    from avsep.cli._text import names_in, warnings_in_a_line
    from avsep.environment import keep_memory
    from avsep.errors import AvsepError, ConfigError
    from avsep.training.extending import extend

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if not max_loss_db >= 0:
        raise ConfigError(f"--max-loss-db {max_loss_db:g}: give 0 or more dB")
    keep_memory()
    names = names_in(classes)
    made = out is not None and not out.exists()
    run = _begun(run, out, output, store=store, preset=preset, strategy=strategy, memory=memory, device=device)
    output.detail(f"{run} learns {', '.join(names)} from {source}, on {device}")
    started = time.perf_counter()
    try:
        with warnings_in_a_line():
            found = extend(
                run,
                source,
                names,
                strategy=strategy,
                memory=memory,
                store=store,
                max_loss_db=max_loss_db,
                settings=settings or (),
                device=device,
                workers=workers,
                jobs=jobs,
                progress=not quiet,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the run is as it was; the same command goes on where it stopped") from None
    except (AvsepError, OSError):
        if made and not (run.parent / f".{run.name}.learning").exists():  # nothing was learned
            shutil.rmtree(run, ignore_errors=True)
        raise
    output.detail(f"took {time.perf_counter() - started:.1f} s")
    output.result(
        {
            "format": "avsep-learn",
            "run": run,
            "task": found.task,
            "classes": names,
            "learned": not found.lost,
            "changes": {
                c.class_name: {"before": c.before, "after": c.after, "change": c.change} for c in found.changes
            },
            "lost": found.lost,
            "max_loss_db": max_loss_db,  # null: any
        }
    )
    output.show(_table(found))
    if found.lost:
        raise ConfigError(
            f"{', '.join(found.lost)} lost more than {max_loss_db:g} dB, so that {run} is left as it was: run the same "
            "command with a larger --max-loss-db to take what was learned, or with other settings"
        )
    output.say(
        "old classes were validated and tested on their own recordings, which the run carries with its exemplars"
    )
    output.say(f"{run} has learned {', '.join(names)} as task {found.task}; {next_command('evaluate', run)}")


def _begun(
    run: Path,
    out: Path | None,
    output: Output,
    *,
    store: Path | None,
    preset: str | None,
    strategy: str | None,
    memory: str | None,
    device: str,
) -> Path:
    """The run to be extended: what is given, or what is made of a model or a saved separator, in ``out``."""
    from avsep.errors import ConfigError
    from avsep.models import begin_run, model_at

    model = model_at(run)
    saved = model is None and (run / "model.safetensors").is_file()
    if preset is not None and not saved:
        raise ConfigError(f"--preset is of a saved separator, and {run} has its settings: change them with --set")
    if saved:
        if out is None or store is None or preset is None:
            raise ConfigError(
                f"{run} is a saved separator, which brings neither exemplars nor settings: give --out, a folder for a "
                "run of your own, --store, a store with all of its classes, and --preset, for the training"
            )
        if not (out / "run.yaml").is_file():
            _begin(run, out, store, preset, strategy, memory, device)
            output.note(f"{out} begins as {run}")
        return out
    if model is None:
        if out is not None:
            raise ConfigError(
                f"{run} is no model that comes with avsep: a run learns more in its own folder, without --out"
            )
        return run
    if out is None:
        raise ConfigError(
            f"'{run}' is a model that comes with avsep, and stays as it is: name the folder of a run of your own with "
            "--out"
        )
    if not (out / "run.yaml").is_file():
        begin_run(model, out)
        output.note(f"{out} begins as model '{model.name}'")
    return out


def _begin(
    saved: Path, out: Path, store: Path, preset: str, strategy: str | None, memory: str | None, device: str
) -> None:
    from avsep.spec import load_preset
    from avsep.training.extending import begin

    begin(
        saved,
        store,
        out,
        train=load_preset(preset).get("train", {}),
        strategy=(strategy or "contavsep").split("+"),
        memory=memory or {"name": "random_per_class", "params": {"keep": "clip"}},
        device=device,
    )


def _table(found: Extension) -> Table:
    from rich.table import Table

    table = Table(title="SDR improvement, dB")
    for heading in ("class", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for one in found.changes:
        before = "new" if one.before is None else f"{one.before:.2f}"
        change = "" if one.change is None else f"{one.change:+.2f}"
        table.add_row(one.class_name, before, "" if one.after is None else f"{one.after:.2f}", change)
    return table

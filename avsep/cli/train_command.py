"""``avsep train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, link, next_command
from avsep.environment import MOST_PROCESSES

# settings of a run.yaml that are derived -> what they are derived from
_ELSEWHERE = {
    "tasks": 'give the tasks as --tasks "a,b;c,d" or --classes-per-task N',
    "separator.classes": 'the classes come from --tasks "a,b;c,d"',
    "separator.num_classes": 'the number of classes comes from --tasks "a,b;c,d"',
    "store": "give the store's folder as the argument STORE",
    "store_hash": "it is computed from the store",
}


def command(
    context: typer.Context,
    store: Annotated[
        Path | None, typer.Argument(help="Store folder (with --resume: the run's own when omitted).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.")] = Path("runs/run"),
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Preset name or YAML file (see: avsep list presets) [default: iquery_small]."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", help="See: avsep list strategies; NAME+NAME combines them [default: contavsep]."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="See: avsep list memories [default: random_per_class].")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", help='Classes of each task: "flute,piano;cello,tuba" [default: the store\'s, by five].'
        ),
    ] = None,
    classes_per_task: Annotated[
        int | None, typer.Option("--classes-per-task", min=1, help="Cut the store's classes into tasks of this size.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            "--order",
            help="Of the store's classes, where the tasks are cut from them: store, near, far (chains from the most "
            "central class by what the classes look or sound like) or random:SEED [default: store].",
        ),
    ] = None,
    blurry: Annotated[
        str | None,
        typer.Option(
            "--blurry",
            help="Tasks that overlap (Si-Blurry): percent of the classes that come in one task alone, percent of the "
            "others' clips that come in any task, and a seed, as 50:10:1.",
        ),
    ] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(
            "--fidelity",
            help="released: do as the paper's released code does wherever avsep does otherwise (docs/fidelity.md).",
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="Test mixtures: fixed, paper or audiovisual [default: fixed].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same as --set train.seed=N.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting, e.g. train.batch_size=8, strategy.params.weight_mask=0 (repeatable)."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices", min=1, help="Processes on this machine that share every batch, one a GPU [default: 1]."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=0, max=MOST_PROCESSES, help="Reader processes (of each); never changes the result."
        ),
    ] = None,
    logger: Annotated[
        list[str] | None,
        typer.Option(
            "--logger",
            help="tensorboard, files, wandb, mlflow, package.module.Class or none; parameters as NAME:key=value,... "
            "(repeatable) [default: tensorboard where installed]. The CSV logs are always written.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out after a kill.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Learn a store's classes task after task."""
    from avsep.cli._text import warnings_in_a_line
    from avsep.data.store import Store
    from avsep.data.tasks import task_stream
    from avsep.environment import keep_memory, world_size
    from avsep.errors import CheckpointError, ConfigError
    from avsep.presets.fidelity import apply_fidelity
    from avsep.runs.folder import RunFolder
    from avsep.spec import RunSpec, apply_settings, load_preset, validated
    from avsep.training.learner import ContinualLearner
    from avsep.training.loggers import choose_loggers

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if resume:
        spec = RunFolder(out).spec()
        data = spec.model_dump(mode="json")
        if preset is not None and preset != spec.preset:
            raise ConfigError(
                f"{out} was started with preset '{spec.preset}', not '{preset}': leave --preset out to resume"
            )
        if fidelity is not None:
            raise ConfigError(f"{out} goes on with the settings it was started with: leave --fidelity out to resume")
        for name, value in (("order", order), ("blurry", blurry)):
            if value is not None:
                raise ConfigError(f"{out} goes on with the tasks it was started with: leave --{name} out to resume")
        store = store or RunFolder(out).store(spec)
    else:
        preset = preset or "iquery_small"
        loaded = load_preset(preset)
        data = {"separator": loaded["separator"], "train": loaded.get("train", {}), "preset": preset}
        names = (strategy or "contavsep").split("+")
        data["strategy"] = names if len(names) > 1 else names[0]
        data["memory"] = memory or "random_per_class"
        if fidelity is not None:
            apply_fidelity(data, fidelity)
    if store is None:
        raise ConfigError("no store given: avsep train STORE --out RUN (make one with: avsep data synth STORE)")
    if resume:
        for what, given, begun in (("strategy", strategy, spec.strategy_name), ("memory", memory, spec.memory.name)):
            if given is not None and given != begun:
                raise CheckpointError(
                    f"{out} was started with another spec: {what} was '{begun}', now '{given}'; resume "
                    f"without --{what}, or choose another folder"
                )
    if protocol is not None:
        data["protocol"] = protocol
    if blurry is not None:
        data["blurry"] = _blurry(blurry)
    for setting in settings or ():
        if way := _ELSEWHERE.get(setting.partition("=")[0]):
            raise ConfigError(f"--set {setting} would have no effect: {way}")
    apply_settings(data, [*(settings or []), *([f"train.seed={seed}"] if seed is not None else [])])

    choose_loggers(logger)  # a mistake in their names is said before anything begins
    opened = Store.open(store)
    if tasks is not None and classes_per_task is not None:
        raise ConfigError("give --tasks or --classes-per-task, not both")
    if tasks is not None and order is not None:
        raise ConfigError("--tasks says which classes are learned when: leave --order out")
    lists: Sequence[Sequence[str]] | int | None = classes_per_task
    if tasks is not None:
        lists = _tasks(tasks, opened.classes)
    preliminary = validated(RunSpec, data, "run")
    preliminary.check()
    lists = lists if lists is not None else preliminary.tested or None
    stream = task_stream(
        opened,
        lists,
        protocol=preliminary.protocol,
        validation_protocol=preliminary.validation_protocol,
        clip_samples=preliminary.separator.front_end.clip_samples,
        order=order or "store",
        blurry=preliminary.blurry,
    )
    spec = preliminary.model_copy(update={"tasks": tuple(t.classes for t in stream.tasks), "blurry": stream.blurry})
    try:
        if _launched(devices, device, context.obj):
            return
        keep_memory()
        with warnings_in_a_line():
            learner = ContinualLearner.from_spec(spec, accelerator=device, workers=workers, loggers=logger)
        records = learner.fit(stream, out, resume=resume, preset=spec.preset, progress=not quiet)
    except KeyboardInterrupt:
        way_on = f"go on with: avsep train --out {out} --resume" if RunFolder(out).is_run else ""
        if world_size() > 1 and devices is not None:
            way_on = ""  # the process that started this one prints it
        raise KeyboardInterrupt(way_on) from None
    if not learner.ranks.first:
        return

    from rich.table import Table

    output.result({"format": "avsep-train", "run": out, "tasks": records})
    table = Table(title=f"{spec.strategy_name}, memory {spec.memory.name}")
    for heading in ("task", "classes", "steps", "best epoch", "validation SDR dB", "minutes"):
        table.add_column(heading, justify="left" if heading == "classes" else "right")
    for record in records:
        score = record["validation_sdr_db"]
        table.add_row(
            str(record["index"]),
            ", ".join(record["classes"]),
            str(record["steps"]),
            str(record["best_epoch"]),
            "" if score is None else f"{score:.2f}",
            f"{record['seconds'] / 60:.1f}",
        )
    output.show(table)
    output.say(f"run written to {link(out)}; {next_command('evaluate', out)}")


def _launched(devices: int | None, device: str, arguments: Sequence[str]) -> bool:
    """Whether ``devices`` processes were to run the command; they have, then."""
    from avsep.distributed.launch import launch
    from avsep.environment import local_world_size, pick_device, world_size
    from avsep.errors import ConfigError

    if world_size() > 1:
        if devices not in (None, local_world_size()):
            raise ConfigError(
                f"torchrun has started {local_world_size()} processes on this machine already: leave --devices out"
            )
        return False
    if devices in (None, 1):
        return False
    assert devices is not None
    if pick_device(device).type == "cuda":
        import torch

        if torch.cuda.device_count() < devices:
            raise ConfigError(
                f"--devices {devices} and {torch.cuda.device_count()} CUDA device(s) here: lower it, or train on the "
                "CPU (--device cpu)"
            )
    elif devices > (most := max(8, 2 * (os.cpu_count() or 1))):
        raise ConfigError(f"--devices {devices} on a CPU of {os.cpu_count()} cores: {most} at most")
    if code := launch(devices, [*_this_program(), *arguments]):
        raise typer.Exit(code)
    return True


def _this_program() -> list[str]:
    """How this program was started, without its arguments."""
    import __main__

    if (
        getattr(__main__, "__spec__", None) is None
        and Path(sys.argv[0]).is_file()
        and Path(sys.argv[0]).stem == "avsep"
    ):
        return [sys.executable, sys.argv[0]]  # the installed script
    return [sys.executable, "-m", "avsep"]


def _tasks(text: str, known: Sequence[str]) -> list[list[str]]:
    """``a,b;c,d`` as lists of names."""
    from avsep.cli._text import names_in

    return [names_in(part, known) for part in text.strip().removesuffix(";").split(";")]


def _blurry(text: str) -> dict[str, int]:
    """``50:10`` or ``50:10:1`` as plain data of a :class:`~avsep.spec.BlurrySpec`."""
    from avsep.errors import ConfigError

    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--blurry {text!r} is not PERCENT:PERCENT or PERCENT:PERCENT:SEED, such as 50:10:1")
    return dict(zip(("disjoint", "blurry", "seed"), map(int, parts), strict=False))

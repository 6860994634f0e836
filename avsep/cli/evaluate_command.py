"""``avsep evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, link, next_command
from avsep.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as avsep train writes it.", show_default=False)],
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Store folder, the run's own or another [default: the run's own]."),
    ] = None,
    task: Annotated[
        list[int] | None,
        typer.Option("--task", min=0, help="Only after this task, from 0 on (repeatable) [default: all]."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="Lists of test mixtures, see: avsep list protocols [default: the run's]."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Clips that the test mixtures are of.")] = "test",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="File of the scores on another store, protocol or split [default: beside the run's own].",
        ),
    ] = None,
    dependence: Annotated[
        int,
        typer.Option(
            "--dependence", min=0, help="Mixtures of a list that are separated with other pictures too; 0: none."
        ),
    ] = 60,
    av_align: Annotated[
        int,
        typer.Option(
            "--av-align", min=0, help="Mixtures in which sounds are held against what moves (AV-Align); 0: none."
        ),
    ] = 0,
    forward_transfer: Annotated[
        bool,
        typer.Option(
            "--forward-transfer", help="Score every task's classes before they are learned too, in the run's own store."
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Mixtures separated at a time.")] = 4,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score a run beside fixed yardsticks: SDR, SIR, SAR, SDRi and SI-SDR after every task, average and forgetting.

    With another store, protocol or split the scores go into a file beside the run's own. With --json the scores are
    printed without those of each mixture, which are in the file.
    """
    from avsep.data.opening import open_run_store
    from avsep.data.protocol import Protocol
    from avsep.data.store import Store
    from avsep.environment import keep_memory, pick_device
    from avsep.evaluation.evaluate import evaluate_on, evaluate_run
    from avsep.progress import terminal
    from avsep.runs.folder import RunFolder

    output = Output(json=json, quiet=quiet, verbose=verbose)
    keep_memory()

    spec = RunFolder(run).spec()
    opened = None if store is None else Store.open(store)
    other = (protocol or spec.protocol) != spec.protocol or split != "test"
    if opened is not None:
        trained_on = spec.store_hash or Protocol.load(RunFolder(run).protocol_file).store_hash
        other = other or opened.content_hash != trained_on
    if out is not None and not other:
        raise ConfigError(f"--out {out} is for scores on another --store, --protocol or --split: these go into {run}")
    if forward_transfer and other:
        raise ConfigError("--forward-transfer is for the run's own test mixtures: leave it out on other ones")
    if other and opened is None:
        opened = open_run_store(run)
    chosen = pick_device(device)
    output.detail(f"{run} on {chosen}, batches of {batch_size}; tested on {opened.path if opened else spec.store}")
    with output.bars() as bars:
        known: dict[str, tuple[int, int]] = {}  # label -> (bar, mixtures done)

        def show(label: str, done: int, total: int) -> None:
            bar, before = known.get(label, (-1, 0))
            if label not in known:
                bar = bars.add(label, total=total)
            bars.advance(bar, done - before)
            known[label] = (bar, done)

        how: dict[str, Any] = {
            "tasks": task,
            "batch_size": batch_size,
            "device": chosen,
            "dependence": dependence,
            "av_align": av_align,
            "progress": lambda number, done, total: show(f"after task {number}", done, total),
            "more_progress": show,
        }
        if other and opened is not None:
            result, path = evaluate_on(run, opened, protocol=protocol, split=split, out=out, **how)
        else:
            result = evaluate_run(run, opened, forward_transfer=forward_transfer, **how)
            path = RunFolder(run).evaluation_file
    output.result(_without_rows({"file": path, **result}))
    if output.tells:
        print_evaluation(terminal(), result)
    onwards = "" if other else f"; {next_command('report', run)}"
    output.say(f"scores written to {link(path)}{onwards}")


def _without_rows(value: Any) -> Any:
    """An evaluation without the scores of each mixture, which are most of it."""
    if isinstance(value, dict):
        return {key: _without_rows(item) for key, item in value.items() if key not in ("rows", "columns")}
    return [_without_rows(item) for item in value] if isinstance(value, (list, tuple)) else value


def print_evaluation(console: Console, result: dict[str, Any]) -> None:
    """The matrix and the summaries of an ``evaluation.json`` as tables."""
    from rich import box
    from rich.table import Table

    from avsep.evaluation.scores import METRICS
    from avsep.evaluation.yardsticks import sdr_by_task

    if not result["after"]:
        console.print("No task that is scored has a test mixture here.")
        return
    if result.get("missing"):
        console.print(
            f"{result['store']} has no {result['split']} clip of {', '.join(result['missing'])}: mixtures of these are "
            "left out"
        )
    for name, why in ((result.get("yardsticks") or {}).get("left_out") or {}).items():
        console.print(f"No {name} beside the scores: {why}.")
    names = {"sdr": "SDR", "sir": "SIR", "sar": "SAR", "sdri": "SDRi", "si_sdr": "SI-SDR"}
    matrix = result.get("matrix")
    if matrix is not None:
        console.print("Mean SDR in dB on each task's test mixtures")
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("after task", justify="right")
        for j in range(len(matrix)):
            table.add_column(f"task {j}", justify="right")
        table.add_column("average", justify="right", style="bold")
        for t, line in enumerate(matrix):
            table.add_row(str(t), *[_number(v) for v in line], _number(result["average"][t]))
        table.add_section()
        for name, line in sdr_by_task(result).items():
            average = None if None in line else sum(v for v in line if v is not None) / len(line)
            table.add_row(name, *[_number(v) for v in line], _number(average))
        console.print(table)
        if result["forgetting"] is not None:  # there is none after one task alone
            gap = result.get("staleness")  # none where no mixture has sources of two tasks
            console.print(
                f"forgetting {_number(result['forgetting'])} dB, backward transfer {_number(result['bwt'])} dB"
                + ("" if gap is None else f", staleness {_number(gap)} dB (old sources beside newer ones)")
            )
    for number, found in (result.get("forward_transfer") or {}).items():
        if found["sdri"] is not None:
            console.print(f"task {number} before it was learned: {_signed(found['sdri'])} dB to the mixture")
    if result.get("fwt") is not None:
        console.print(f"forward transfer {_number(result['fwt'])} dB")
    console.print(
        f"Scores in dB by list of test mixtures (protocol {result['protocol']} version {result['protocol_version']}, "
        f"{result['protocol_hash'][:12]}); tasks count from 0"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
    for heading in ("after", "list", *[names[m] for m in METRICS], "scored", "skipped", "degen."):
        table.add_column(heading, justify="left" if heading == "list" else "right", no_wrap=True)
    for step in result["after"]:
        lists = {**step["lists"], **({"all": step["all"]} if len(step["lists"]) > 1 else {})}
        for place, (name, summary) in enumerate(lists.items()):
            table.add_row(
                f"task {step['task']}" if place == 0 else "",
                name,
                *[_number(summary["mean"][m]) for m in METRICS],
                *[str(summary[k]) for k in ("scored", "skipped", "degenerate")],
            )
            if summary["degenerate"]:  # as the published numbers are made
                means = summary["with_degenerate"]["mean"]
                table.add_row("", "with degen.", *[_number(means[m]) for m in METRICS], "", "", "")
        table.add_section()
    console.print(table)
    _print_yardsticks(console, result)
    _print_absent(console, result, result["after"][-1])
    print_dependence(console, result)
    _print_av_align(console, result)
    if all("seconds" in step for step in result["after"]):
        console.print(_costs(result["after"]))
    if left_out := result["after"][-1].get("left_out"):
        console.print(
            f"left out: {', '.join(left_out)}: the separator needs a picture of every source that is asked for"
        )
    last = result["after"][-1]["all"]
    if last["skipped"]:
        console.print(
            f"{last['skipped']} mixtures were skipped: a signal is silent ({last['silent_estimates']} estimates)"
        )
    if last["degenerate"]:
        console.print(
            f"{last['degenerate']} mixtures of a clip with itself or its own class count in the rows 'with degen.' "
            f"only, as in the published numbers"
        )


def _print_yardsticks(console: Console, result: dict[str, Any]) -> None:
    """The last step's mean SDR of each list beside what needs no training."""
    from rich import box
    from rich.table import Table

    from avsep.evaluation.yardsticks import YARDSTICKS, sdr_by_list

    step = result["after"][-1]
    found = sdr_by_list(result, step)
    if not found:
        return
    tested = result["yardsticks"]["identity"]["filter"]["whose"] == "tested"
    whose = f"the training clips of {result['store']}, the run's own not being at hand" if tested else "training clips"
    filter_of = f"; the static filter is of {whose}" if "static filter" in found else ""
    console.print(f"SDR in dB after task {step['task']} beside yardsticks{filter_of}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("list", "separator", *YARDSTICKS, "less filter"):
        table.add_column(heading, justify="left" if heading == "list" else "right", no_wrap=True)
    lists = {**step["lists"], **({"all": step["all"]} if len(step["lists"]) > 1 else {})}
    for name, summary in lists.items():
        own, static = summary["mean"]["sdr"], found.get("static filter", {}).get(name)
        gain = None if own is None or static is None else own - static
        table.add_row(
            name,
            _number(own),
            *[_number(found.get(y, {}).get(name)) for y in YARDSTICKS],
            "" if gain is None else f"{gain:+.2f}",
        )
    console.print(table)


def _print_absent(console: Console, result: dict[str, Any], step: dict[str, Any]) -> None:
    """What comes out for sources that are not in the mixture, and whether the separator knows."""
    from rich import box
    from rich.table import Table

    from avsep.evaluation.yardsticks import absent_levels

    absent = {name: summary["absent"] for name, summary in step["lists"].items() if "absent" in summary}
    if not absent:
        return
    console.print("Median level of what comes out, in dB of the mixture's")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    fixed = absent_levels(result, step, "static filter")
    for heading in ("list", "absent sources", "present sources", "absent, by the static filter"):
        table.add_column(heading, justify="left" if heading == "list" else "right", no_wrap=True)
    for name, levels in absent.items():
        own = (levels["level_db"], levels["present_level_db"])
        table.add_row(name, *map(_number, own), _number(fixed.get(name)))
    console.print(table)
    if presence := step.get("presence"):
        console.print(
            f"presence: AUC {presence['auc']:.3f}; {presence['right']:.1%} right at a probability of "
            f"{presence['threshold']:.2f} ({presence['present']} present, {presence['absent']} absent sources)"
        )
    else:
        console.print("presence: this separator's decoder does not tell")


def print_dependence(console: Console, result: dict[str, Any]) -> None:
    """How much the SDR changes when the pictures do."""
    from rich import box
    from rich.table import Table

    from avsep.evaluation.visual_dependence import HEADINGS

    for task, found in (result.get("visual_dependence") or {}).items():
        if not found["lists"]:
            console.print("other pictures: the separator takes none")
            continue
        console.print(f"Change of SDR in dB when the pictures are other ones, after task {task}")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("list", "mixtures", "SDR", *HEADINGS.values()):
            table.add_column(heading, justify="left" if heading == "list" else "right", no_wrap=True)
        for name, line in found["lists"].items():
            changes = [line["changes"][key] for key in HEADINGS]
            table.add_row(
                name,
                str(line["mixtures"]),
                _number(line["sdr"]),
                *map(_signed, changes),
            )
        console.print(table)


def _print_av_align(console: Console, result: dict[str, Any]) -> None:
    """Whether sounds begin when something moves."""
    for task, found in (result.get("av_align") or {}).items():
        if "mixtures" not in found:
            console.print("AV-Align: the store has no motion frames, or too few a second")
            continue
        means = {"separated": "separated", "mixture": "mixture", "reference": "true sources"}
        values = [f"{name} {found[key]:.3f}" for key, name in means.items() if found[key] is not None]
        console.print(f"AV-Align after task {task}, {found['mixtures']} mixtures: {', '.join(values)}")


def _costs(steps: list[dict[str, Any]]) -> str:
    minutes = ", ".join(f"{step['seconds'] / 60:.1f}" for step in steps)
    megabytes = ", ".join(f"{step['memory']['total'] / 1e6:.2f}" for step in steps)
    return f"minutes of training by task: {minutes}; MB kept after each: {megabytes} (more: avsep budget)"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:+.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before a zero

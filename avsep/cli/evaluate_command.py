"""``avsep evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as avsep train writes it.", show_default=False)],
    store: Annotated[Path | None, typer.Option("--store", help="Store folder [default: the run's own].")] = None,
    task: Annotated[
        list[int] | None,
        typer.Option("--task", min=0, help="Only after this task, from 0 on (repeatable) [default: all]."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Mixtures separated at a time.")] = 4,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Score a run: SDR, SIR, SAR, SDRi and SI-SDR after every task, average and forgetting."""
    from avsep.environment import pick_device
    from avsep.evaluation.evaluate import evaluate_run
    from avsep.progress import progress_bar, terminal

    with progress_bar() as bars:
        known: dict[int, tuple[int, int]] = {}  # task -> (bar, mixtures done)

        def show(number: int, done: int, total: int) -> None:
            bar, before = known.get(number, (-1, 0))
            if number not in known:
                bar = bars.add(f"after task {number}", total=total)
            bars.advance(bar, done - before)
            known[number] = (bar, done)

        result = evaluate_run(run, store, tasks=task, batch_size=batch_size, device=pick_device(device), progress=show)
    print_evaluation(terminal(), result)
    typer.echo(f"scores written to {run / 'evaluation.json'}; next: avsep report {run}")


def print_evaluation(console: Console, result: dict[str, Any]) -> None:
    """The matrix and the summaries of an ``evaluation.json`` as tables."""
    from rich import box
    from rich.table import Table

    from avsep.evaluation.evaluate import METRICS

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
        console.print(table)
        if result["forgetting"] is not None:  # there is none after one task alone
            console.print(
                f"forgetting {_number(result['forgetting'])} dB, backward transfer {_number(result['bwt'])} dB"
            )
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
    console.print(_costs(result["after"]))
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


def _costs(steps: list[dict[str, Any]]) -> str:
    minutes = ", ".join(f"{step['seconds'] / 60:.1f}" for step in steps)
    megabytes = ", ".join(f"{step['memory']['total'] / 1e6:.2f}" for step in steps)
    return f"minutes of training by task: {minutes}; MB kept after each: {megabytes} (more: avsep budget)"


def _number(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before a zero

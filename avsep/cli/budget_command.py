"""``avsep budget``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose

if TYPE_CHECKING:
    from rich.table import Table

    from avsep.evaluation.budget import Aligned, Budget
    from avsep.spec import RunSpec


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, as avsep train writes them.", show_default=False),
    ],
    task: Annotated[
        int | None,
        typer.Option("--task", min=0, help="What persists after this task [default: the last that one follows]."),
    ] = None,
    store: Annotated[Path | None, typer.Option("--store", help="Store folder [default: each run's own].")] = None,
    align: Annotated[
        bool, typer.Option("--align", help="Also say which memories would bring all to the budget of the largest.")
    ] = False,
    to: Annotated[int | None, typer.Option("--to", min=1, help="With --align: to this number of bytes.")] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="With --align: the policy of runs without a memory.")
    ] = "random_per_class",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Count the bytes that runs keep between tasks; align their memories to one budget."""
    from avsep.errors import ConfigError
    from avsep.evaluation.budget import align as aligned
    from avsep.evaluation.budget import budget_of
    from avsep.runs.folder import RunFolder

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if to is not None and not align:
        raise ConfigError(f"--to {to} says what to align to: give --align with it")
    names = _names(runs)
    specs = {name: RunFolder(run).spec() for name, run in names.items()}
    budgets = {name: budget_of(run, task, store=store) for name, run in names.items()}
    output.show(_kept(specs, budgets))
    found: dict[str, Aligned] = {}
    if align:
        places = {str(RunFolder(names[name]).store(spec) or "") for name, spec in specs.items()}
        if store is None and len(places) > 1:
            raise ConfigError(f"the runs are over {len(places)} stores ({', '.join(sorted(places))}): give --store")
        place = store or places.pop()
        output.detail(f"estimates by the clips of {place}")
        found = aligned(specs, place, budget=to, task=task, memory=memory)
        output.show(_memories(specs, found))
        output.say("estimates take the largest clips that could be drawn: no draw keeps more")
    output.result(
        {
            "format": "avsep-budget",
            "runs": [{"run": names[name], **_counted(specs[name], of)} for name, of in budgets.items()],
            "aligned": {
                "budget": _common(found),
                "runs": [
                    {
                        "run": names[name],
                        **_counted(specs[name], one.budget),
                        "memory": {"name": one.memory.name, "params": one.memory.params},
                        "spare": one.spare,
                        "full": one.full,
                    }
                    for name, one in found.items()
                ],
            }
            if align
            else None,
        }
    )


def _counted(spec: RunSpec, budget: Budget) -> dict[str, Any]:
    """What ``--json`` prints of a run: the bytes that it keeps."""
    from dataclasses import asdict

    sums = {"model": budget.model, "exemplar_bytes": budget.exemplar_bytes, "total": budget.total}
    memory = {"name": spec.memory.name, "params": spec.memory.params}
    return {"strategy": spec.strategy_name, "memory": memory, **asdict(budget), **sums}


def _common(found: dict[str, Aligned]) -> int:
    """The budget that memories were brought to."""
    return max(one.budget.total + one.spare for one in found.values())


def _names(runs: list[Path]) -> dict[str, Path]:
    """Runs by the shortest ends of their paths that tell them apart."""
    from avsep.errors import ConfigError

    resolved = [run.resolve() for run in runs]
    for run in resolved:
        if resolved.count(run) > 1:
            raise ConfigError(f"{run} is given twice")
    for parts in range(1, max(len(run.parts) for run in resolved) + 1):
        names = ["/".join(run.parts[-parts:]) for run in resolved]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    return table


def _kept(specs: dict[str, RunSpec], budgets: dict[str, Budget]) -> Table:
    table = _table(
        "MB (10⁶ bytes) that persist between tasks",
        *("run, strategy,\nmemory", "task", "model", "strategy", "clips", "audio", "seen", "total", "peak"),
    )
    for name, b in budgets.items():
        spec = specs[name]
        table.add_row(
            f"{name}\n{spec.strategy_name}\n{spec.memory.name}",
            str(b.task),
            _mb(b.model),
            _mb(b.strategy_state),
            str(b.exemplars),
            _mb(b.audio),
            _mb(b.object + b.motion),
            _mb(b.total),
            f"+{_mb(b.peak_extra)}",
        )
    if frozen := max(b.frozen for b in budgets.values()):
        table.caption = f"and up to {_mb(frozen)} MB of encoders that are never trained, the same for every method"
    return table


def _memories(specs: dict[str, RunSpec], found: dict[str, Aligned]) -> Table:
    table = _table(f"Memories for a budget of {_common(found):,} bytes", "run, memory", "clips", "MB", "spare bytes")
    for name, a in found.items():
        params = ", ".join(f"{k}={v}" for k, v in a.memory.params.items())
        table.add_row(
            f"{name}\n{a.memory.name}" + (f" ({params})" if params else ""),
            f"{a.budget.exemplars}{' (all)' if a.full else ''}",
            _mb(a.budget.total),
            f"{a.spare:,}",
        )
    return table


def _mb(count: int) -> str:
    return f"{count / 1e6:.3f}"

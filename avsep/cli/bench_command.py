"""``avsep bench``: the library against the way it is usually done, side by side in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose
from avsep.environment import MOST_PROCESSES

if TYPE_CHECKING:
    from avsep.benchmarks.measure import Case

app = typer.Typer(
    help="Compare the library's speed with a baseline's, in one run, after checking that both compute the same.",
    no_args_is_help=True,
)

_Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed calls of each variant.")]
_Out = Annotated[Path, typer.Option("--out", help="CSV file to append the results to.")]
_Plot = Annotated[Path | None, typer.Option("--plot", help="Picture to draw (.png, .svg, .pdf) [default: none].")]
_Preset = Annotated[str, typer.Option("--preset", help="iquery, or a YAML file of the same kind.")]
_Batch = Annotated[int, typer.Option("--batch", min=1, help="Mixtures of two sources in a step.")]
_Classes = Annotated[int, typer.Option("--classes", min=2, help="Classes seen so far; the last five are new.")]
_Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
_Store = Annotated[
    Path | None, typer.Argument(metavar="[STORE]", help="A store's folder [default: a temporary one, of noise].")
]

_OUT = Path("benchmarks-results.csv")
_KERNELS_OUT = Path("benchmarks-kernels.csv")
_AOT_OUT = Path("benchmarks/results/aot.csv")
_EXPORT_OUT = Path("benchmarks-export.csv")
_STREAM_OUT = Path("benchmarks-streams.csv")
_CONTINUAL_OUT = Path("benchmarks-continual.csv")


@app.command("train")
def train(
    preset: _Preset = "iquery",
    batch: _Batch = 4,
    classes: _Classes = 10,
    memory_share: Annotated[
        float | None,
        typer.Option(
            "--memory-share",
            min=0,
            max=1,
            help="Share of exemplars among the sources [default: as published for --classes].",
        ),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option("--form", help="Beside fp32: bf16, compiled; again for more [default: none]."),
    ] = None,
    device: _Device = "cpu",
    repeats: _Repeats = 5,
    out: _Out = _OUT,
    plot: _Plot = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """A ContAV-Sep training step, and its U-Net alone, against the literal published form.

    With --form bf16 a CPU also gets its line of the table by which train.precision=auto chooses, where bf16 is faster.
    """
    output = Output(json=json, quiet=quiet, verbose=verbose)
    rows = _run(output, _train(preset, batch, classes, memory_share, device, form or ()), repeats, out, plot)

    from avsep.benchmarks.cases import bf16_proposal
    from avsep.environment import bf16_instructions, pick_device

    proposed = bf16_proposal(rows, bf16_instructions()) if pick_device(device).type == "cpu" else ""
    _tell(output, "train", rows, out, plot, proposed=proposed or None)
    if proposed:
        output.say(f"\n{proposed}")


@app.command("data")
def data(
    store: _Store = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Mixtures of two sources in a batch.")] = 8,
    mixtures: Annotated[int, typer.Option("--mixtures", min=1, help="Mixtures read in one pass.")] = 256,
    workers: Annotated[
        int, typer.Option("--workers", min=0, max=MOST_PROCESSES, help="Reader processes, beside none.")
    ] = 2,
    clips: Annotated[int, typer.Option("--clips", min=2, help="Clips of a temporary store.")] = 160,
    clip_s: Annotated[float, typer.Option("--clip-s", min=0.1, help="Seconds of a temporary store's clips.")] = 20.0,
    shard_mb: Annotated[float, typer.Option("--shard-mb", help="Size of the shards.")] = 64,
    memory: Annotated[
        bool, typer.Option("--memory", help="Peak memory with temporary stores of 1, 4 and 16 times the clips (Linux).")
    ] = False,
    repeats: _Repeats = 9,
    out: _Out = _OUT,
    plot: _Plot = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reading training mixtures from a store and from shards, against loading whole files in the training process."""
    output = Output(json=json, quiet=quiet, verbose=verbose)
    if memory:
        rows, plot = _reading_memory(output, batch, mixtures, clip_s, shard_mb, out), None
    else:
        rows = _run(
            output,
            _data(store, batch, mixtures, clip_s, clips, shard_mb, (0, workers) if workers else (0,)),
            repeats,
            out,
            plot,
        )
    _tell(output, "data", rows, out, plot)


@app.command("metrics")
def metrics(
    batch: Annotated[int, typer.Option("--batch", min=1, help="Mixtures.")] = 4,
    sources: Annotated[int, typer.Option("--sources", min=2, help="Sources of each.")] = 2,
    length: Annotated[int, typer.Option("--length", min=2048, help="Samples of each.")] = 65280,
    repeats: _Repeats = 9,
    out: _Out = _OUT,
    plot: _Plot = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """SDR, SIR and SAR, against mir_eval."""
    output = Output(json=json, quiet=quiet, verbose=verbose)
    _tell(output, "metrics", _run(output, _metrics(batch, sources, length), repeats, out, plot), out, plot)


@app.command("separate")
def separate(
    preset: Annotated[str, typer.Option("--preset", help="Name or file of one that can go unseen.")] = "aligned",
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="Length of the recording.")] = 10.0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Chunks at a time.")] = 4,
    device: _Device = "cpu",
    repeats: _Repeats = 3,
    out: _Out = _OUT,
    plot: _Plot = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Separating a long recording, against how other separators cut one up, with the same network."""
    output = Output(json=json, quiet=quiet, verbose=verbose)
    rows = _run(output, _separate(preset, minutes, batch, device), repeats, out, plot)
    _tell(output, "separate", rows, out, plot)


@app.command("continual")
def continual(
    store: Annotated[
        Path | None, typer.Argument(metavar="[STORE]", help="A store's folder [default: a temporary one, made up].")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="Name or YAML file.")] = "aligned_small",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each strategy.")] = 2,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of every run, such as train.epochs=2.")
    ] = None,
    clips: Annotated[
        tuple[int, int, int], typer.Option("--clips", help="Training, validation and test clips of a made-up class.")
    ] = (24, 4, 4),
    device: _Device = "cpu",
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=MOST_PROCESSES, help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="CSV file to append the results to.")] = _CONTINUAL_OUT,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Two tasks learned by fine-tuning, and by ContAV-Sep with memory: the demo's result, without its sounds."""
    import tempfile

    from avsep.benchmarks.continual import made_up_store, run
    from avsep.environment import keep_memory

    output = Output(json=json, quiet=quiet, verbose=verbose)
    keep_memory()  # as `avsep train` does
    with tempfile.TemporaryDirectory(prefix="avsep-bench-") as folder:
        place = Path(folder)
        rows = run(
            made_up_store(place / "store", clips=clips) if store is None else store,
            place / "runs",
            preset=preset,
            seeds=range(seeds),
            settings=settings or (),
            device=device,
            jobs=jobs,
            out=out,
            write=output.say,
        )
    _tell(output, "continual", rows, out, None)
    output.say(f"\nresults appended to {out}")


@app.command("separators")
def separators(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder; its test split is scored.")],
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", help="Name or file; again for more [default: aligned, aligned_by_picture]."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each preset.")] = 3,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs, which go on where they were.")] = Path(
        "runs/separators"
    ),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of every run, such as train.epochs=2.")
    ] = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Train, or report the runs that are there.")] = True,
    out: Annotated[Path, typer.Option("--out", help="CSV file to write; a table in Markdown stands beside it.")] = Path(
        "separators.csv"
    ),
    plot: _Plot = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What presets reach on a store when they learn all of its classes at once, beside the static filter.

    Different classes, duets of one class, absent sources, rooms, other pictures: the lists of the protocol audiovisual.
    """
    from dataclasses import asdict

    from avsep.benchmarks.measure import check_results
    from avsep.benchmarks.plot import plot_presets, require_matplotlib
    from avsep.benchmarks.separators import COLUMNS, evaluations_in, facts_of, measure, report, run_presets
    from avsep.data.store import Store
    from avsep.environment import keep_memory
    from avsep.errors import ConfigError

    output = Output(json=json, quiet=quiet, verbose=verbose)
    keep_memory()
    check_results(out, COLUMNS)
    if plot is not None:
        require_matplotlib()
    presets = preset or ["aligned", "aligned_by_picture"]
    numbers = list(range(seeds))
    opened = Store.open(store)
    found = (
        run_presets(opened, runs, presets, numbers, settings=settings or (), progress=not quiet)
        if train
        else evaluations_in(opened, runs, presets, numbers, settings=settings or ())
    )
    if not found:
        raise ConfigError(f"{runs} holds no evaluated run of {', '.join(presets)}: leave --no-train out")
    numbers_of = measure(found)
    report(numbers_of, out, facts_of(opened, sorted({seed for _, seed in found})))
    if plot is not None:
        plot_presets(numbers_of, plot)
    _tell(output, "separators", [asdict(one) for one in numbers_of], out, plot, table=out.with_suffix(".md"))
    output.console(highlight=False).print(out.with_suffix(".md").read_text())


@app.command("export")
def export(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]", help="A bundle of avsep export, folder or tar [default: an untrained --preset's]."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="What it was made from, for PyTorch: a run or saved separator.")
    ] = None,
    task: Annotated[
        int | None, typer.Option("--task", min=0, help="Separator of this task [default: the last finished].")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="Name or file, where no bundle is given.")] = "aligned",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Mixtures a call, where no bundle is given.")] = 1,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda alone [default: all that are here].")
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider",
            help="cpu, cuda, onnxruntime-tensorrt, openvino, tensorrt, tensorrt-rtx; again for more [default: all "
            "here].",
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Of PyTorch, ONNX Runtime and OpenVINO [default: the cores].")
    ] = 0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile among them.")] = True,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure memory, each in its own process.")
    ] = True,
    repeats: _Repeats = 15,
    out: Annotated[Path, typer.Option("--out", help="CSV file to append the results to.")] = _EXPORT_OUT,
    plot: _Plot = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """An exported bundle in every way that this machine can run it, and PyTorch, eager and compiled.

    Without a bundle it is made from an untrained separator; where the exporter is missing, PyTorch's rows remain.
    """
    from avsep.benchmarks.export_cases import run as run_bundle

    output = Output(json=json, quiet=quiet, verbose=verbose)
    rows = run_bundle(
        bundle,
        run=run,
        task=task,
        preset=preset,
        batch=batch,
        device=device,
        providers=provider or (),
        threads=threads,
        repeats=repeats,
        compiled=compiled,
        memory=memory,
        out=out,
        plot=plot,
        console=output.console(),
        progress=not quiet,
    )
    _tell(output, "export", rows, out, plot)
    _say_where(output, out, plot)


@app.command("stream")
def stream(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BUNDLES]", help="Bundles of avsep export that can go unseen [default: --preset]."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            help="Untrained ones beside; again for more [default, without bundles: a causal one and two of chunks].",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            help="Of the presets' graphs: fp32, fp16 or int8 (repeatable); bundles are measured in all that they hold "
            "[default: fp32].",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Of sound in each stream.")] = 60.0,
    sources: Annotated[int, typer.Option("--sources", min=1, help="Sources that are separated.")] = 2,
    provider: Annotated[str, typer.Option("--provider", help="cpu, cuda or another of the runtime's.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of ONNX Runtime.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="CSV file to append to; a table in Markdown beside it.")] = (
        _STREAM_OUT
    ),
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What a stream costs: its delay in ms, a block's computing (median, 99th percentile), the real-time factor."""
    from avsep.benchmarks.streams import run, table

    output = Output(json=json, quiet=quiet, verbose=verbose)
    rows = run(
        bundles or (),
        presets=preset or (),
        precision=precision or ("fp32",),
        seconds=seconds,
        sources=sources,
        provider=provider,
        threads=threads,
        out=out,
        progress=not quiet,
    )
    _tell(output, "stream", rows, out, None)
    output.say(table(rows))
    output.say(f"results appended to {out}")


@app.command("all")
def everything(
    store: _Store = None,
    preset: _Preset = "iquery",
    batch: _Batch = 4,
    classes: _Classes = 10,
    device: _Device = "cpu",
    repeats: _Repeats = 5,
    out: _Out = _OUT,
    plot: _Plot = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Data, metrics and train, one after the other."""

    output = Output(json=json, quiet=quiet, verbose=verbose)

    def cases() -> Iterator[Case]:
        yield from _data(store, 8, 256, 20.0, 160, 64, (0, 2))
        yield from _metrics(4, 2, 65280)
        yield from _train(preset, batch, classes, None, device, ())

    _tell(output, "all", _run(output, cases(), repeats, out, plot), out, plot)


@app.command("kernels")
def kernels(
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op", help="similarity_distillation, stft_masking, mask_head or unet; again for more [default: all]."
        ),
    ] = None,
    device: _Device = "cpu",
    sizes: Annotated[str, typer.Option("--sizes", help="paper, large, huge, all (but huge), tiny.")] = "paper",
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", min=1, help="Timed samples of each variant [default: 20 on a GPU, 7 on the CPU]."),
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile among the peers [default: on a GPU].")
    ] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Compare with float64 and time nothing.")] = False,
    out: Annotated[Path, typer.Option("--out", help="CSV file to append the results to.")] = _KERNELS_OUT,
    plot: _Plot = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The fused operations in every backend, with their peers and the hardware's limits."""
    from avsep.benchmarks.kernels import run
    from avsep.environment import pick_device

    output = Output(json=json, quiet=quiet, verbose=verbose)
    chosen = str(pick_device(device))
    with output.bars() as bars:
        bar: int | None = None

        def say(text: str) -> None:
            nonlocal bar
            if bar is None:
                bar = bars.add("kernels", total=None)
            bars.advance(bar, note=text)

        rows = run(
            op or (),
            sizes=sizes,
            device=chosen,
            repeats=repeats,
            out=out,
            plot=plot,
            compiled=compiled,
            check_only=check_only,
            write=output.say,
            say=say,
        )
    _tell(output, "kernels", rows, None if check_only else out, plot)
    if not check_only:
        _say_where(output, out, plot)


@app.command("aot")
def aot(
    op: Annotated[list[str] | None, typer.Option("--op", help="Operation; again for more [default: all].")] = None,
    sm: Annotated[
        list[int] | None, typer.Option("--sm", help="Architecture such as 90; again for more [default: all].")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, max=MOST_PROCESSES, help="Processes [default: as many as cores].")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compile again what the file has.")] = False,
    out: Annotated[Path, typer.Option("--out", help="CSV file to write.")] = _AOT_OUT,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compile every Triton kernel for GPUs that are not here: registers, spills, shared memory."""
    from avsep.benchmarks.aot import ARCHITECTURES, compile_all, summary

    output = Output(json=json, quiet=quiet, verbose=verbose)
    with output.bars() as bars:
        bar: int | None = None

        def done(count: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = bars.add("kernels compiled", total=total)
            bars.update(bar, count, total)

        rows = compile_all(out, ops=op or (), architectures=sm or ARCHITECTURES, jobs=jobs, fresh=fresh, done=done)
    _tell(output, "aot", rows, out, None)
    output.say(summary(rows))
    output.say(f"written to {out}")


def _train(
    preset: str, batch: int, classes: int, memory_share: float | None, device: str, forms: Sequence[str]
) -> Iterator[Case]:
    from avsep.benchmarks.cases import train_cases
    from avsep.environment import keep_memory, pick_device

    keep_memory()  # as `avsep train` does; for both forms
    chosen = str(pick_device(device))
    yield from train_cases(preset, batch=batch, classes=classes, memory_share=memory_share, device=chosen, forms=forms)


def _separate(preset: str, minutes: float, batch: int, device: str) -> Iterator[Case]:
    from avsep.benchmarks.separating import separate_cases
    from avsep.environment import keep_memory, pick_device

    keep_memory()  # as `avsep separate` does; for all
    yield from separate_cases(preset, minutes=minutes, batch=batch, device=str(pick_device(device)))


def _data(
    store: Path | None,
    batch: int,
    mixtures: int,
    clip_s: float,
    clips: int,
    shard_mb: float,
    workers: tuple[int, ...],
) -> Iterator[Case]:
    import tempfile

    from avsep.benchmarks.cases import data_cases, temporary_store
    from avsep.data.store import Store
    from avsep.data.store.sharding import shard_store

    with tempfile.TemporaryDirectory(prefix="avsep-bench-") as folder:
        place = Path(folder)
        opened = temporary_store(place / "store", clips=clips, clip_s=clip_s) if store is None else Store.open(store)
        shards = shard_store(opened, place / "shards", shard_mb=shard_mb)
        yield from data_cases(opened, shards=shards, batch=batch, mixtures=mixtures, workers=workers)


def _reading_memory(
    output: Output, batch: int, mixtures: int, clip_s: float, shard_mb: float, out: Path
) -> list[dict[str, Any]]:
    import tempfile

    from avsep.benchmarks.cases import temporary_store
    from avsep.benchmarks.measure import append_rows, check_results
    from avsep.benchmarks.reading import memory_rows
    from avsep.benchmarks.run import print_rows
    from avsep.data.store.sharding import shard_store

    check_results(out)
    with tempfile.TemporaryDirectory(prefix="avsep-bench-") as folder, output.bars() as bars:
        bar = bars.add("reading in fresh processes", total=9)
        stores: dict[str, Path] = {}
        for times in (1, 4, 16):
            made = temporary_store(Path(folder) / f"clips-{times}", clips=12 * times, clip_s=clip_s)
            stores[f"store, {times}x the clips"] = made.path
            stores[f"shards, {times}x the clips"] = shard_store(
                made, Path(folder) / f"shards-{times}", shard_mb=shard_mb
            ).path
            longer = temporary_store(Path(folder) / f"longer-{times}", clips=12, clip_s=clip_s * times)
            stores[f"store, {times}x as long clips"] = longer.path
        rows = list(memory_rows(stores, batch=batch, mixtures=mixtures, done=lambda: bars.advance(bar)))
        append_rows(out, rows)
    print_rows(output.console(), "peak of a process's own memory while it reads", rows)
    output.say(f"\nresults appended to {out}")
    return rows


def _metrics(batch: int, sources: int, length: int) -> Iterator[Case]:
    from avsep.benchmarks.cases import metrics_cases

    yield from metrics_cases(batch=batch, sources=sources, length=length)


def _run(output: Output, cases: Iterator[Case], repeats: int, out: Path, plot: Path | None) -> list[dict[str, Any]]:
    from avsep.benchmarks.run import run_cases

    console = output.console()
    rows = run_cases(cases, repeats=repeats, out=out, plot=plot, console=console, progress=not output.quiet)
    _say_where(output, out, plot)
    return rows


def _say_where(output: Output, out: Path, plot: Path | None) -> None:
    output.say(f"\nresults appended to {out}" + ("" if plot is None else f", drawn in {plot}"))


def _tell(
    output: Output, name: str, rows: Sequence[Mapping[str, Any]], out: Path | None, plot: Path | None, **more: Any
) -> None:
    """Print what was measured, as the rows of the CSV file, if that is asked for."""
    plain = [{key: None if value == "" else value for key, value in row.items()} for row in rows]
    output.result({"format": f"avsep-bench-{name}", "rows": plain, "out": out, "plot": plot, **more})

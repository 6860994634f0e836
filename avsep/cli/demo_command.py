"""``avsep demo``: the whole of avsep in a few minutes on a laptop."""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose
from avsep.errors import AvsepError
from avsep.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from avsep.data.store import Clip, Store

RUNS = {"finetune": "none", "contavsep": "random_per_class"}  # strategy -> memory
CLASSES = ("accordion", "bassoon", "drum", "flute", "piano", "xylophone")
_PAGE_BYTES = 6 * 10**6  # of the report, which people send one another
ALIKE = "xylophone"  # of task 1, and struck: each of its onsets is heard and seen
# demo.json marks the rest: last
_OWN = (
    "store",
    *RUNS,
    "exported",
    "duet",
    "separated",
    "xylophones",
    "separated_xylophones",
    "report.html",
    "demo.json",
)


def command(
    out: Annotated[Path, typer.Option("--out", help="Folder for data, runs, sounds and the report.")] = Path(
        "avsep-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of data, weights and mixtures.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; remove what an earlier demo left there.")] = False,
    preset: Annotated[str, typer.Option("--preset", hidden=True)] = "aligned_small",
    clips: Annotated[tuple[int, int, int], typer.Option("--clips", hidden=True)] = (40, 6, 6),
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Learn new instruments without forgetting the old ones, and hear it: minutes on a CPU, no download.

    Makes a small benchmark from sampled instruments, learns two tasks of three classes by fine-tuning and by
    ContAV-Sep, scores both on held-out clips, exports ONNX, separates two duets, one of them of two xylophones, and
    writes one HTML page. A demo that was stopped goes on where it was.
    """
    from rich.text import Text

    output = Output(json=json, quiet=quiet, verbose=verbose)
    console = output.console()
    for package, extra, purpose in (
        ("PIL", "demo", "the benchmark's pictures"),
        ("matplotlib", "demo", "the report"),
        ("jinja2", "demo", "the report"),
        ("onnxruntime", "demo", "the ONNX export"),
        ("onnxscript", "demo", "the ONNX export"),
    ):
        _need(package, extra, purpose)
    _claim(out, seed, fresh)
    started = time.perf_counter()

    def section(title: str) -> None:
        console.print(Text.assemble("\n", (title, "bold"), (f" ({time.perf_counter() - started:.0f} s)", "dim")))

    from avsep.data.synth.synthesis import write_duet

    section("1/5 A benchmark of six sampled instruments with moving pictures")
    store = _benchmark(out / "store", seed, clips, output)
    half = len(store.classes) // 2
    tasks = [list(store.classes[:half]), list(store.classes[half:])]
    console.print(f"{len(store.clips)} clips; task 0: {', '.join(tasks[0])}; task 1: {', '.join(tasks[1])}")

    section("2/5 Learning both tasks twice: fine-tuning, and ContAV-Sep with one remembered clip a class")
    try:
        _train_both(out, preset, tasks, seed, output)
    except KeyboardInterrupt:
        again = shlex.join(["avsep", "demo", "--out", str(out), "--seed", str(seed)])
        raise KeyboardInterrupt(f"go on with: {again}") from None

    section("3/5 Held-out clips")
    runs = {strategy: out / strategy for strategy in RUNS}
    results = _results(runs)
    _print_scores(console, results)

    section("4/5 The last separator as ONNX, from waveform to waveform")
    graphs = _export(output, runs["contavsep"], out / "exported")

    section("5/5 Two duets, a remembered and a new instrument, and two xylophones; the report")
    apart = [store.select(classes=[names[0]], split="test")[0] for names in tasks]
    alike = store.select(classes=[ALIKE], split="test")[:2]
    recordings = []
    for clips_of, mixed, parts in ((apart, "duet", "separated"), (alike, "xylophones", "separated_xylophones")):
        files = write_duet(store, [c.id for c in clips_of], out / mixed)
        recordings.append(_separate(output, runs["contavsep"], files, clips_of, out / parts))

    from avsep.evaluation.report import write_report
    from avsep.evaluation.yardsticks import sdr_by_task

    with output.bars() as bars:
        bar = bars.add("report", total=None)
        page = write_report(
            runs["finetune"],
            out / "report.html",
            compare=[runs["contavsep"]],
            most_bytes=_PAGE_BYTES,
            progress=lambda done, total: bars.update(bar, done, total),
        )
    seconds = time.perf_counter() - started
    output.result(
        {
            "format": "avsep-demo",
            "out": out,
            "report": page,
            "seconds": seconds,
            "tasks": tasks,
            "yardsticks": sdr_by_task(results["contavsep"]),
            "runs": {
                name: {"run": runs[name], "matrix": found["matrix"], "forgetting": found["forgetting"]}
                for name, found in results.items()
            },
            "graphs": graphs,
            "recordings": recordings,
        }
    )
    console.print(f"\nDone in {seconds / 60:.1f} minutes. Listen and look: {page}")


def _benchmark(out: Path, seed: int, clips: tuple[int, int, int], output: Output) -> Store:
    """Version 2 of the benchmark, by one bank alone, so that it is the same wherever the demo runs."""
    import warnings

    from avsep.data.synth.synthesis import find_banks, synthesise

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*only SoundFont bank")
        return synthesise(
            out,
            version=2,
            size="tiny",
            classes=CLASSES,
            seed=seed,
            banks=find_banks()[:1],
            clips_per_class=clips,
            progress=not output.quiet,
        )


def _need(package: str, extra: str, purpose: str) -> None:
    import importlib.util

    from avsep.errors import MissingExtraError

    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)


def _claim(out: Path, seed: int, fresh: bool) -> None:
    """Take the folder for a demo of this seed; refuse one that holds anything else."""
    import shutil

    from avsep.files import entries, read_json, write_json

    mark = out / "demo.json"
    if mark.is_file():
        found = read_json(mark).get("seed")
        if fresh:
            for name in _OWN:  # what people keep beside it is theirs
                if (out / name).is_dir():
                    shutil.rmtree(out / name)
                else:
                    (out / name).unlink(missing_ok=True)
        elif found != seed:
            raise AvsepError(f"{out} holds a demo of seed {found}: add --fresh to replace it, or choose another --out")
    elif entries(out):
        raise AvsepError(f"{out} is not empty and not a demo: choose another folder with --out")
    write_json(mark, {"seed": seed})


# ---------------------------------------------------------------------- training, one process a strategy


class _QueueProgress(Progress):
    """Sends a bar's movements to the process that draws it."""

    def __init__(self, name: str, messages: Any) -> None:
        super().__init__()
        self._name = name
        self._messages = messages

    def add(self, label: str, total: int | None, done: int = 0) -> int:
        self._messages.put(("add", self._name, (label, total, done)))
        return 0

    def advance(self, bar: int, amount: int = 1, note: str | None = None) -> None:
        self._messages.put(("advance", self._name, (amount, note)))

    def update(self, bar: int, done: int, total: int) -> None:
        self._messages.put(("update", self._name, (done, total)))


def _work(strategy: str, out: str, name: str, tasks: list[list[str]], seed: int, threads: int, messages: Any) -> None:
    """Train and evaluate one run in a process of its own."""
    import signal

    from avsep.environment import die_with_parent, keep_memory

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that draws ends this one
    die_with_parent()  # else it would train on unseen, and hold the run's lock, after a kill
    try:
        import torch

        torch.set_num_threads(threads)
        keep_memory()
        from avsep.data.tasks import task_stream
        from avsep.evaluation.evaluate import evaluate_run
        from avsep.runs.folder import RunFolder
        from avsep.spec import RunSpec, load_preset, validated
        from avsep.training.learner import ContinualLearner

        preset = load_preset(name)
        spec = validated(
            RunSpec,
            {
                "separator": preset["separator"],
                "train": {**preset["train"], "seed": seed},
                "strategy": strategy,
                "memory": RUNS[strategy],
                "tasks": tasks,
                "preset": name,
            },
            "demo",
        )
        stream = task_stream(Path(out) / "store", tasks, clip_samples=spec.separator.front_end.clip_samples)
        run = Path(out) / strategy
        shown = _QueueProgress(strategy, messages)
        learner = ContinualLearner.from_spec(spec, accelerator="cpu")
        learner.fit(stream, run, resume=RunFolder(run).is_run, progress=shown, preset=name)
        for task in range(len(tasks)):
            shown.add(f"{strategy} test after task {task}", total=None)
            evaluate_run(run, tasks=[task], progress=lambda _task, done, total: shown.update(0, done, total))
        messages.put(("done", strategy, None))
    except AvsepError as error:
        messages.put(("error", strategy, str(error)))
    except Exception as error:
        messages.put(("error", strategy, f"{type(error).__name__}: {error}"))
        raise


def _train_both(out: Path, preset: str, tasks: list[list[str]], seed: int, output: Output) -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    threads = max(1, min(4, cores // len(RUNS)))
    workers = {
        name: context.Process(target=_work, args=(name, str(out), preset, tasks, seed, threads, messages), daemon=True)
        for name in RUNS
    }
    for worker in workers.values():
        worker.start()
    waiting = set(workers)
    bars_of: dict[str, int] = {}
    try:
        with output.bars() as bars:
            while waiting:
                try:
                    kind, name, value = messages.get(timeout=1.0)
                except queue.Empty:
                    for name in sorted(waiting):
                        if not workers[name].is_alive():
                            raise AvsepError(
                                f"training by {name} died (exit code {workers[name].exitcode}); is memory short? Run "
                                f"avsep demo again: it goes on where it was"
                            ) from None
                    continue
                if kind == "add":
                    bars_of[name] = bars.add(value[0], total=value[1], done=value[2])
                elif kind == "advance":
                    bars.advance(bars_of[name], *value)
                elif kind == "update":
                    bars.update(bars_of[name], *value)
                elif kind == "error":
                    raise AvsepError(f"{name}: {value}")
                else:
                    waiting.discard(name)
    finally:
        for worker in workers.values():
            if worker.is_alive() and waiting:
                worker.terminate()
            with contextlib.suppress(ValueError):
                worker.join(10)


# ---------------------------------------------------------------------- what came of it


def _results(runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    from avsep.files import read_json
    from avsep.runs.folder import RunFolder

    return {name: read_json(RunFolder(run).evaluation_file) for name, run in runs.items()}


def _print_scores(console: Console, results: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    from avsep.evaluation.yardsticks import sdr_by_task

    table = Table(title="SDR in dB on held-out clips, mean over sources: higher is better")
    for heading in ("", "task 0 learned", "after task 1", "forgotten", "task 1 learned"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (old, new) in sdr_by_task(results["contavsep"]).items():
        table.add_row(name, _db(old), _db(old), "", _db(new))
    table.add_section()
    for name, result in results.items():
        (first, _), (kept, new) = result["matrix"]
        table.add_row(name, f"{first:.2f}", f"{kept:.2f}", f"{result['forgetting']:.2f}", f"{new:.2f}")
    console.print(table)


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _export(output: Output, run: Path, out: Path) -> list[dict[str, Any]]:
    from avsep.export import export_run

    found = []
    with output.bars() as bars:
        bar = bars.add("export", total=None)
        bundles = export_run(run, out, tasks=[1], progress=lambda _, done, total: bars.update(bar, done, total))
    for bundle in bundles:
        for graph in bundle.graphs:
            parity, size = graph.entry["parity"], bundle.size(graph.file)
            file = bundle.path / graph.file
            found.append({"file": file, "bytes": size, "ran_on": parity["provider"], "max_error": parity["max_error"]})
            output.console().print(
                f"{file}: {size / 1e6:.1f} MB, {parity['provider']} differs from PyTorch by at most "
                f"{parity['max_error']:.1e}"
            )
    return found


def _separate(output: Output, run: Path, duet: dict[str, Path], clips: list[Clip], out: Path) -> dict[str, Any]:
    """Separate a duet of clips, and say how much better each part is than the mixture."""
    from avsep.data.store import source_names
    from avsep.inference.recordings import separate_file
    from avsep.media.timeline import read_visual_file
    from avsep.separator import load_separator

    classes = dict(zip(source_names(clips), (clip.class_name for clip in clips), strict=True))
    separated = separate_file(
        load_separator(run),
        duet["duet"],
        read_visual_file(duet["features"]),
        [name if name == of else f"{name}={of}" for name, of in classes.items()],
        out,
        overwrite=True,
    )
    gains = _gains(duet, separated.files, list(classes))
    notes = separated.findings.lines()  # such as two parts that are nearly the same sound
    console = output.console()
    console.print(f"{duet['duet']} separated into {', '.join(str(p) for p in separated.files.values())}")
    console.print(f"SDR over the mixture: {', '.join(f'{name} {gain:+.1f} dB' for name, gain in gains.items())}")
    for line in notes:
        console.print(line)
    return {
        "source": duet["duet"],
        "files": separated.files,
        "residual": separated.residual,
        "gain_db": gains,
        "notes": notes,
    }


def _gains(duet: dict[str, Path], files: Mapping[str, Path], names: list[str]) -> dict[str, float]:
    """How much SDR each part has over the mixture, in dB."""
    import soundfile
    import torch

    from avsep.evaluation.bss import sdr_alone

    def read(paths: list[Path]) -> torch.Tensor:
        sounds = [soundfile.read(path, dtype="float32")[0] for path in paths]
        length = min(len(sound) for sound in sounds)
        return torch.stack([torch.from_numpy(sound[:length]) for sound in sounds])

    count = len(names)
    sounds = read([*(duet[name] for name in names), *(files[name] for name in names), *[duet["duet"]] * count])
    references, separated, mixture = sounds.split(count)
    sdr = sdr_alone(references[None], torch.stack((separated, mixture))[None])[0]  # [2, N]
    return dict(zip(names, (sdr[0] - sdr[1]).tolist(), strict=True))

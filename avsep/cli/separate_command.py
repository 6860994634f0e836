"""``avsep separate``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    audio: Annotated[
        list[Path], typer.Argument(help="Recordings: WAV, FLAC, OGG, MP3; any rate, channels mixed to mono.")
    ],
    classes: Annotated[str, typer.Option("--classes", help="Classes to separate, such as flute,piano.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for <stem>_<class>.wav and <stem>_residual.wav.")],
    run: Annotated[Path | None, typer.Option("--run", help="Run folder, or a saved separator.")] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Exported bundle, in place of a run; needs no PyTorch.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", help="Pictures or features of each class (.npz, see: avsep data features)."),
    ] = None,
    task: Annotated[
        int | None, typer.Option("--task", min=0, help="Separator of this task [the last finished].")
    ] = None,
    rate: Annotated[
        str, typer.Option("--rate", help="Rate of the files written: model (the separator's), input, or Hz.")
    ] = "model",
    subtype: Annotated[str, typer.Option("--format", help="Samples as PCM_16, PCM_24 or FLOAT.")] = "PCM_16",
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Chunks separated at once [4; with --bundle as the graph is made]."),
    ] = None,
    context: Annotated[
        float | None,
        typer.Option("--context", help="Seconds of each side of a chunk that are thrown away [an eighth of it]."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Of a run: auto, cpu, cuda or mps.")] = "auto",
    provider: Annotated[
        str,
        typer.Option("--provider", help="Of a bundle: auto, cpu, cuda, onnxruntime-tensorrt, tensorrt, tensorrt-rtx."),
    ] = "auto",
    precision: Annotated[
        str | None, typer.Option("--precision", help="Of a bundle: fp32, fp16 or int8 [fp32 where it has it].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Separate recordings of any length into one WAV per class and the residual."""
    from rich.console import Console
    from rich.table import Table

    from avsep.audio import read_audio
    from avsep.data.visualfile import read_visual_file
    from avsep.errors import ConfigError
    from avsep.progress import Progress, progress_bar

    if (run is None) == (bundle is None):
        raise ConfigError("name one thing to separate with: --run RUN, or --bundle BUNDLE (of avsep export)")
    _refuse_the_others(run is None, task=task, device=device, provider=provider, precision=precision)
    names = [name.strip() for name in classes.split(",") if name.strip()]
    for path in audio:  # the likeliest mistakes first, before a network is loaded
        read_audio(path)
    timelines = {} if features is None else read_visual_file(features)
    separate: Any
    if run is not None:
        separate, sees, ran = _of_run(run, task, device, names, timelines, batch or 4, context)
    else:
        assert bundle is not None
        separate, sees, ran = _of_bundle(bundle, provider, precision, names, timelines, batch, context)
    if features is None and sees:
        raise ConfigError("this separator looks at pictures: give --features FILE.npz (see: avsep data features)")

    with contextlib.ExitStack() as stack:
        display: list[Progress] = []  # opened by the first chunk, so that a mistake found before is one line alone
        bar_of: dict[Path, int] = {}

        def progress(path: Path, done: int, total: int) -> None:
            if not display:
                display.append(stack.enter_context(progress_bar()))
            if path not in bar_of:
                bar_of[path] = display[0].add(f"separating {path.name}", total)
            display[0].update(bar_of[path], done, total)

        results = separate(audio, out, rate=rate, subtype=subtype, overwrite=overwrite, progress=progress)

    table = Table(title=f"separated into {out}, on {ran}")
    table.add_column("file", overflow="fold")
    for heading in ("level dB", "to mixture dB", "s", "Hz"):
        table.add_column(heading, justify="right")
    for result in results:
        whole = result.levels_db["mixture"]
        rows = {str(result.source): "mixture", **{f.name: c for c, f in result.files.items()}}
        for file, key in {**rows, result.residual.name: "residual"}.items():
            level = result.levels_db[key]
            table.add_row(file, f"{level:.1f}", f"{level - whole:+.1f}", f"{result.seconds:.2f}", str(result.rate_hz))
    Console().print(table)
    if clipped := sum(result.clipped for result in results):
        typer.echo(f"{clipped} samples were beyond full scale and are clipped; --format FLOAT keeps them", err=True)


def _refuse_the_others(with_bundle: bool, **options: Any) -> None:
    """Options that would do nothing are refused: those of a run with a bundle, and the other way round."""
    from avsep.errors import ConfigError

    others = {"task": None, "device": "auto"} if with_bundle else {"provider": "auto", "precision": None}
    for name, default in others.items():
        if options[name] != default:
            of, instead = ("--run", "--bundle") if with_bundle else ("--bundle", "--run")
            raise ConfigError(f"--{name} goes with {of}, and does nothing with {instead}: leave it out")


def _of_run(
    run: Path,
    task: int | None,
    device: str,
    names: list[str],
    timelines: Any,
    batch: int,
    context_s: float | None,
) -> tuple[Any, bool, str]:
    """What separates files with a trained separator, whether it looks at pictures, and where it runs."""
    from avsep.devices import pick_device
    from avsep.separate import class_ids_of, separate_files
    from avsep.separator import load_separator

    chosen = pick_device(device)
    separator = load_separator(run, task).to(chosen)
    class_ids_of(separator, names)

    def separate(audio: Any, out: Any, **options: Any) -> Any:
        return separate_files(separator, audio, timelines, names, out, batch=batch, context_s=context_s, **options)

    return separate, bool(separator.visual_sources()), f"PyTorch, {chosen}"


def _of_bundle(
    bundle: Path,
    provider: str,
    precision: str | None,
    names: list[str],
    timelines: Any,
    batch: int | None,
    context_s: float | None,
) -> tuple[Any, bool, str]:
    """The same with an exported bundle."""
    from avsep.export.runtime import Separator
    from avsep.separate import separate_recordings, slots_of

    separator = Separator.load(bundle, provider, precision, context_s=context_s)
    slots_of(separator.classes, names)
    if timelines or not separator.visual_sources:
        separator.check(timelines, names)
    for reason in separator.unused_engines:
        typer.echo(f"note: {reason}", err=True)

    def separate(audio: Any, out: Any, **options: Any) -> Any:
        def one(mixture: Any, report: Any) -> Any:
            return separator.separate(mixture, timelines, names, batch=batch, progress=report)

        with separator:
            return separate_recordings(one, audio, names, out, sample_rate_hz=separator.sample_rate_hz, **options)

    return separate, bool(separator.visual_sources), separator.provider

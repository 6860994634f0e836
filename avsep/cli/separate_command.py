"""``avsep separate``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer


def command(
    audio: Annotated[
        list[Path], typer.Argument(help="Recordings: WAV, FLAC, OGG, MP3; any rate, channels mixed to mono.")
    ],
    run: Annotated[Path, typer.Option("--run", help="Run folder, or a saved separator.")],
    classes: Annotated[str, typer.Option("--classes", help="Classes to separate, such as flute,piano.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for <stem>_<class>.wav and <stem>_residual.wav.")],
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
    batch: Annotated[int, typer.Option("--batch", min=1, help="Chunks separated at once.")] = 4,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Separate recordings of any length into one WAV per class and the residual."""
    from rich.console import Console
    from rich.table import Table

    from avsep.audio import read_audio
    from avsep.data.visualfile import read_visual_file
    from avsep.devices import pick_device
    from avsep.errors import ConfigError
    from avsep.progress import Progress, progress_bar
    from avsep.separate import class_ids_of, separate_files
    from avsep.separator import load_separator

    names = [name.strip() for name in classes.split(",") if name.strip()]
    for path in audio:  # the likeliest mistakes first, before a network is loaded
        read_audio(path)
    separator = load_separator(run, task).to(pick_device(device))
    class_ids_of(separator, names)
    if features is None and separator.visual_sources():
        raise ConfigError("this separator looks at pictures: give --features FILE.npz (see: avsep data features)")
    timelines = {} if features is None else read_visual_file(features)

    with contextlib.ExitStack() as stack:
        display: list[Progress] = []  # opened by the first chunk, so that a mistake found before is one line alone
        bar_of: dict[Path, int] = {}

        def progress(path: Path, done: int, total: int) -> None:
            if not display:
                display.append(stack.enter_context(progress_bar()))
            if path not in bar_of:
                bar_of[path] = display[0].add(f"separating {path.name}", total)
            display[0].update(bar_of[path], done, total)

        results = separate_files(
            separator,
            audio,
            timelines,
            names,
            out,
            rate=rate,
            subtype=subtype,
            overwrite=overwrite,
            batch=batch,
            progress=progress,
        )

    table = Table(title=f"separated into {out}")
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

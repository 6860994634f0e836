"""``avsep data``: make, check and look at stores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli import _prepare
from avsep.cli._output import Json, Output, Quiet, Verbose, next_command
from avsep.cli._text import extent, facts_of, names_in, warnings_in_a_line
from avsep.environment import MOST_PROCESSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from avsep.data.store.checking import Availability, StoreCheck
    from avsep.data.synth.recorded import LeftOut

app = typer.Typer(
    help="Make the offline benchmark or prepare your videos; check, shard and look at stores.", no_args_is_help=True
)
app.command("prepare")(_prepare.command)

_Rate = Annotated[int, typer.Option("--rate", help="Samples a second: 11025, 22050 or 44100.")]
_StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder.")]


@app.command("synth")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to make the store in.")],
    version: Annotated[int, typer.Option("--version", help="Of the benchmark: 1, or 2, which asks for eyes.")] = 1,
    size: Annotated[str, typer.Option("--size", help="tiny, small or full.")] = "tiny",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed gives other phrases and pictures.")] = 0,
    bank: Annotated[
        list[Path] | None,
        typer.Option("--bank", help="SoundFont (.sf2); again for more [default: the smallest; of version 2 all]."),
    ] = None,
    holdout_bank: Annotated[
        Path | None, typer.Option("--holdout-bank", help="SoundFont that plays the test split only.")
    ] = None,
    classes: Annotated[str | None, typer.Option("--classes", help="Classes to make, such as flute,piano.")] = None,
    clips: Annotated[
        str | None, typer.Option("--clips", help="Clips a class for train,val,test, such as 14,3,4.")
    ] = None,
    clip_s: Annotated[float | None, typer.Option("--clip-s", help="Seconds of a clip.")] = None,
    rate: _Rate = 11025,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, max=MOST_PROCESSES, help="Processes [default: one a CPU core].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Delete the store that is there and begin anew.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make the offline benchmark from sampled instruments and drawn players. Continues a killed run."""
    from avsep.data.synth.synthesis import synthesise

    output = Output(json=json, quiet=quiet, verbose=verbose)
    try:
        with warnings_in_a_line():
            store = synthesise(
                out,
                version=version,
                size=size,
                classes=None if classes is None else names_in(classes),
                seed=seed,
                banks=bank,
                holdout_bank=holdout_bank,
                workers=workers,
                clips_per_class=None if clips is None else _counts(clips),
                clip_s=clip_s,
                sample_rate_hz=rate,
                progress=not quiet,
                force=force,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    output.result({"format": "avsep-data-synth", **facts_of(store)})
    console = output.console(highlight=False)
    console.print(f"{store.path}: {extent(store)}")
    console.print(f"content hash {store.content_hash}")
    output.say(next_command("train", store.path, "--out", f"runs/{store.path.name}"))


@app.command("notes")
def notes(
    folder: Annotated[Path, typer.Argument(help="Folder with a folder of recorded single notes for each class.")],
    out: Annotated[Path, typer.Argument(help="Folder to make the store in.")],
    pictures: Annotated[
        list[str] | None,
        typer.Option("--as", help="Picture and phrasing of another class, such as viola=violin; repeat for more."),
    ] = None,
    split_by: Annotated[
        str, typer.Option("--split-by", help="recording: no test note is a training note; none: all splits share.")
    ] = "recording",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed gives other phrases and pictures.")] = 0,
    clips: Annotated[
        str | None, typer.Option("--clips", help="Clips a class for train,val,test [default: 100,8,10].")
    ] = None,
    clip_s: Annotated[float | None, typer.Option("--clip-s", help="Seconds of a clip [default: 8].")] = None,
    rate: _Rate = 11025,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, max=MOST_PROCESSES, help="Processes [default: one a CPU core].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Delete the store that is there and begin anew.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make version 2 of the offline benchmark from your recordings of single notes. Continues a killed run."""
    from avsep.data.synth.recorded import DIVIDED_FROM, find_notes, synthesise_notes
    from avsep.errors import ConfigError
    from avsep.progress import printable

    output = Output(json=json, quiet=quiet, verbose=verbose)
    drawn = {}
    for text in pictures or ():
        name, equals, picture = text.partition("=")
        if not (name and equals and picture):
            raise ConfigError(f"--as {text}: give CLASS=PICTURE, such as viola=violin")
        drawn[name] = picture
    with output.bars() as bars:
        found = find_notes(folder, pictures=drawn, bars=bars)
    console = output.console(highlight=False)
    for line in _left_out(found.left_out):
        console.print(printable(line))
    few = [name for name, there in found.recordings.items() if len(there) < DIVIDED_FROM]
    if few and split_by == "recording":
        console.print(f"fewer than {DIVIDED_FROM} notes, which all splits share: {', '.join(few)}")
    try:
        store = synthesise_notes(
            found,
            out,
            seed=seed,
            clips_per_class=None if clips is None else _counts(clips),
            clip_s=clip_s,
            sample_rate_hz=rate,
            split_by=split_by,
            workers=workers,
            progress=not quiet,
            force=force,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    used = {name: len(there) for name, there in found.recordings.items()}
    output.result(
        {
            "format": "avsep-data-notes",
            **facts_of(store),
            "notes": used,
            "left_out": [{"file": one.path, "reason": one.reason, "detail": one.detail} for one in found.left_out],
            "shared_by_all_splits": few if split_by == "recording" else list(used),
        }
    )
    console.print(f"notes used: {', '.join(f'{name} {count}' for name, count in used.items())}")
    console.print(f"{store.path}: {extent(store)}")
    console.print(f"content hash {store.content_hash}")
    output.say(next_command("train", store.path, "--out", f"runs/{store.path.name}"))


def _left_out(files: Sequence[LeftOut]) -> list[str]:
    """Lines that say how many recordings are left out and why, with an example of each reason."""
    by_reason: dict[str, list[LeftOut]] = {}
    for file in files:
        by_reason.setdefault(file.reason, []).append(file)
    return [
        f"left out {len(there)}: {reason}, such as {there[0].path} ({there[0].detail})"
        for reason, there in sorted(by_reason.items())
    ]


def _counts(text: str) -> tuple[int, int, int]:
    from avsep.errors import ConfigError

    try:
        train, val, test = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--clips {text}: give three whole numbers, for train, val and test, such as 14,3,4"
        ) from None
    return train, val, test


@app.command("check")
def check(
    store: _StoreArgument,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read a whole store: hashes, levels, what is there for each class and split, feature statistics."""
    from rich.text import Text

    from avsep.data.store.checking import check_store
    from avsep.errors import DataError
    from avsep.progress import printable

    output = Output(json=json, quiet=quiet, verbose=verbose)
    started = time.perf_counter()
    with output.bars() as bars:
        result = check_store(store, bars)
    output.detail(f"{store} was read in {time.perf_counter() - started:.1f} s")
    silent = [p for p in result.problems if "is silent" in p]
    output.result(_as_data(store, result, silent))
    console = output.console()
    _print_check(console, result)
    if result.availability is not None:
        _print_availability(console, result.availability, list(result.classes))
    for problem in result.problems:
        console.print(Text.assemble(("warning", "yellow"), f" {printable(problem)}"))
    if silent:
        raise DataError(
            f"{len(silent)} clips of {store} are silent; training on them would teach nothing: leave them out"
        )
    console.print("every file matches its hash")


def _as_data(store: Path, result: StoreCheck, silent: list[str]) -> dict[str, Any]:
    """What ``avsep data check --json`` prints."""
    from dataclasses import asdict

    classes: dict[str, dict[str, Any]] = {}
    for name, splits in result.classes.items():
        classes[name] = {}
        for split, summary in splits.items():
            levels = sorted(summary.levels_db)
            loud = [levels[i] for i in (0, len(levels) // 2, -1)] if levels else [None] * 3
            classes[name][split] = {
                "clips": summary.clips,
                "seconds": summary.seconds,
                "level_db": dict(zip(("min", "median", "max"), loud, strict=True)),
                "beside_audio": {kind: count for kind, count in summary.kinds.items() if kind != "audio"},
            }
    found = result.availability
    return {
        "format": "avsep-data-check",
        "store": store,
        "classes": classes,
        "features": {name: asdict(one) for name, one in result.features.items()},
        "availability": None if found is None else _availability(found),
        "problems": result.problems,
        "silent": silent,
    }


def _availability(found: Availability) -> dict[str, Any]:
    def by_class(counts: dict[tuple[str, str], int]) -> dict[str, dict[str, int]]:
        nested: dict[str, dict[str, int]] = {}
        for (name, split), count in counts.items():
            nested.setdefault(name, {})[split] = count
        return nested

    official = found.official
    return {
        "dataset": found.dataset,
        "there": by_class(found.there),
        "listed": by_class(found.listed),
        "reasons": found.reasons,
        "published": None
        if official is None
        else {
            "splits": official.splits,
            "classes": official.classes,
            "lists": official.lists,
            "source": official.source,
        },
        "comparable": found.comparable,
    }


def _print_check(console: Console, result: StoreCheck) -> None:
    from rich.table import Table

    table = Table("class", "split", "clips", "minutes", "dB: min", "median", "max", "beside audio")
    for name, splits in result.classes.items():
        for split, summary in splits.items():
            levels = sorted(summary.levels_db)
            loud = [f"{levels[i]:.1f}" for i in (0, len(levels) // 2, -1)] if levels else ["-"] * 3
            kinds = "\n".join(
                k if n == summary.clips else f"{k} ({n})" for k, n in summary.kinds.items() if k != "audio"
            )
            table.add_row(name, split, str(summary.clips), f"{summary.seconds / 60:.1f}", *loud, kinds)
    console.print(table)
    if result.features:
        features = Table("features", "role", "width", "mean", "std", "norm", "constant dimensions")
        for name, f in result.features.items():
            numbers = [f"{x:.4g}" for x in (f.mean, f.std, f.norm)]
            features.add_row(name, f.role, str(f.dim), *numbers, str(f.dead))
        console.print(features)


def _print_availability(console: Console, found: Availability, classes: list[str]) -> None:
    """Of each class and split: there / listed, and the published count where one is known."""
    from rich.table import Table

    from avsep.data.store import SPLITS

    official = found.official
    by_class = official.classes if official is not None and found.comparable else {}

    def cell(name: str, split: str) -> str:
        text = f"{found.there.get((name, split), 0)} of {found.listed.get((name, split), 0)}"
        return f"{text} ({by_class[name][split]})" if name in by_class else text

    title = f"{found.dataset}: there of listed" + (" (published)" if by_class else "")
    table = Table("class", *SPLITS, title=title)
    for name in classes:
        table.add_row(name, *(cell(name, split) for split in SPLITS))
    table.add_section()
    sums = [f"{found.split(found.there, split)} of {found.split(found.listed, split)}" for split in SPLITS]
    table.add_row("all", *sums)
    console.print(table)
    gone = sum(found.reasons.values())
    if gone:
        reasons = ", ".join(f"{n} {status}" for status, n in sorted(found.reasons.items()))
        console.print(f"{gone} listed videos are not there: {reasons} (videos.csv says why)", highlight=False)
    if official is None:
        console.print(f"no published counts are known of {found.dataset}", highlight=False)
        return
    counts = ", ".join(f"{split} {official.splits[split]}" for split in SPLITS)
    console.print(f"published: {counts} ({official.lists}; {official.source})", highlight=False, soft_wrap=True)
    if not official.classes:
        console.print("published counts of single classes are not known", highlight=False)
    if not found.comparable:
        console.print("its splits are not those lists': give them to avsep data prepare as --splits", highlight=False)


@app.command("shard")
def shard(
    store: _StoreArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder of the sharded store.")],
    shard_mb: Annotated[float, typer.Option("--shard-mb", help="Size of a shard in millions of bytes.")] = 512,
    disk: Annotated[
        list[Path] | None,
        typer.Option("--disk", help="Folder on another disk that takes its share of the shards; repeat for more."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a store's files into a few WebDataset tars, which are read like the store. Continues a killed run."""
    from avsep.data.store import Store
    from avsep.data.store.sharding import shard_store

    output = Output(json=json, quiet=quiet, verbose=verbose)
    try:
        with output.bars() as bars:
            made = shard_store(Store.open(store), out, shard_mb=shard_mb, folders=disk or (), bars=bars)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    shards, folders = made.manifest["shards"], made.manifest["shard_folders"]
    output.result({"format": "avsep-data-shard", **facts_of(made), "shards": len(shards), "folders": folders})
    output.say(f"{made.path}: {extent(made)} in {len(shards)} shards")


@app.command("families")
def families(
    store: _StoreArgument,
    family: Annotated[
        list[str],
        typer.Option("--family", help="A family and its classes, such as bowed=violin,cello; repeat for more."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new store.")],
    percent: Annotated[
        int, typer.Option("--percent", min=1, max=99, help="Of each class's clips that are labelled with the family.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of these clips.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Label some clips with their instrument's family, for a stream of families first and instruments later."""
    from avsep.data.store import Store
    from avsep.data.store.families import write_families
    from avsep.errors import ConfigError

    output = Output(json=json, quiet=quiet, verbose=verbose)
    named: dict[str, tuple[str, ...]] = {}
    for text in family:
        name, equals, classes = text.partition("=")
        name = name.strip()
        if not (name and equals and classes.strip()):
            raise ConfigError(f"--family {text}: give FAMILY=CLASS,CLASS, such as bowed=violin,cello")
        if name in named:
            raise ConfigError(f"--family {text}: family '{name}' is given twice; name all its classes at once")
        named[name] = tuple(names_in(classes))
    with output.bars() as bars:
        made = write_families(Store.open(store), out, named, percent=percent, seed=seed, bars=bars)
    output.result({"format": "avsep-data-families", **facts_of(made), "families": named})
    output.say(f"{made.path}: {extent(made)}; the families are its first {len(named)} classes")


@app.command("info")
def info(
    store: _StoreArgument,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What a store holds and where it comes from."""
    from avsep.data.store import SPLITS, Store

    output = Output(json=json, quiet=quiet, verbose=verbose)
    opened = Store.open(store)
    manifest = opened.manifest
    output.result(
        {
            "format": "avsep-data-info",
            **facts_of(opened),
            "frames": {
                kind: {"shape": shape, "a_second": rate} if (shape := manifest.get(f"{kind}_shape")) else None
                for kind, rate in (("object", opened.object_rate_hz), ("motion", opened.motion_rate_hz))
            },
            "features": {name: {"role": one["role"], "dim": one["dim"]} for name, one in opened.features.items()},
            "origin": manifest.get("origin", {}),
            "licence": manifest.get("licence", ""),
            "shards": len(manifest.get("shards") or ()),
            "folders": manifest.get("shard_folders") or [],
        }
    )
    lines = [
        ("store", str(opened.path)),
        ("extent", extent(opened)),
        ("clips", ", ".join(f"{split} {len(opened.select(split=split))}" for split in SPLITS)),
        ("classes", ", ".join(opened.classes)),
        ("audio", f"{opened.sample_rate_hz} Hz"),
    ]
    for kind, rate in (("object", opened.object_rate_hz), ("motion", opened.motion_rate_hz)):
        shape = manifest.get(f"{kind}_shape")
        lines.append((f"{kind} frames", f"{shape} at {rate:g} a second" if shape else "none"))
    lines += [("features", f"{n}: {r['role']}, {r['dim']} wide") for n, r in opened.features.items()]
    for key, value in manifest.get("origin", {}).items():
        if key in ("banks", "test_banks"):
            value = ", ".join(f"{bank['name']} (SHA-256 {bank['sha256'][:12]}...)" for bank in value)
        lines.append((key.replace("_", " "), str(value)))
    lines += [("licence", str(manifest.get("licence", ""))), ("content hash", opened.content_hash)]
    if manifest.get("shards"):
        lines.append(("shards", f"{len(manifest['shards'])} in {', '.join(manifest['shard_folders'])}"))
    for name, text in lines:
        output.say(f"{name:18} {text}")


@app.command("banks")
def banks(
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the SoundFont banks that are found on this machine, and what synth uses each for."""
    from avsep.data.synth.synthesis import NO_BANK, find_banks, held_out
    from avsep.errors import DataError

    output = Output(json=json, quiet=quiet, verbose=verbose)
    found = find_banks()
    if not found:
        raise DataError(NO_BANK)
    held = held_out(found)
    rows = []
    for number, path in enumerate(found):
        use = "plays the test split of version 2" if path == held else "trains version 2"
        if number == 0:
            use = f"plays version 1, {use}" if held else "plays both versions, the only bank"
        rows.append({"file": path, "bytes": (size := path.stat().st_size), "use": use})
        output.say(f"{path} ({size / 1e6:.0f} MB): {use}")
    output.result({"format": "avsep-data-banks", "banks": rows})


@app.command("sheet")
def sheet(
    store: _StoreArgument,
    out: Annotated[Path, typer.Option("--out", help="Image to write.")] = Path("contact.png"),
    per_class: Annotated[int, typer.Option("--per-class", min=1, max=20, help="Clips shown of each class.")] = 6,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a contact sheet of a store's frames."""
    from avsep.data.store import Store
    from avsep.data.store.checking import contact_sheet

    output = Output(json=json, quiet=quiet, verbose=verbose)
    file = contact_sheet(Store.open(store), out, per_class)
    output.result({"format": "avsep-data-sheet", "file": file})
    output.say(str(file))


@app.command("features")
def features(
    store: _StoreArgument,
    clips: Annotated[str, typer.Option("--clips", help="Ids of clips, such as flute-test-000,...")],
    out: Annotated[Path, typer.Option("--out", help="File to write (.npz).")] = Path("features.npz"),
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write clips' frames and features to a file for ``avsep separate --features``."""
    from avsep.data.store import Store, timelines_of
    from avsep.media.timeline import write_visual_file

    output = Output(json=json, quiet=quiet, verbose=verbose)
    write_visual_file(out, timelines_of(Store.open(store), names_in(clips)))
    output.result({"format": "avsep-data-features", "file": out, "clips": names_in(clips)})
    output.say(str(out))


@app.command("mix")
def mix(
    store: _StoreArgument,
    clips: Annotated[str, typer.Option("--clips", help="Ids of two or more clips.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for duet.wav, features.npz and references/.")],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Mix clips of a store to one recording, with the frames and the references beside it.

    Two clips of one class are named violin-1 and violin-2: ask for them with ``avsep separate
    --classes violin-1=violin,violin-2=violin``.
    """
    from avsep.data.store import Store
    from avsep.data.synth.synthesis import write_duet

    output = Output(json=json, quiet=quiet, verbose=verbose)
    written = write_duet(Store.open(store), names_in(clips), out)
    mixed = {"mixture": written.pop("duet"), "features": written.pop("features")}
    output.result({"format": "avsep-data-mix", "clips": names_in(clips), **mixed, "references": written})
    for path in (*written.values(), *mixed.values()):
        output.say(str(path))

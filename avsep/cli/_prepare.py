"""``avsep data prepare``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, link, next_command
from avsep.cli._text import extent, facts_of, names_in
from avsep.environment import MOST_PROCESSES

if TYPE_CHECKING:
    from avsep.data.prepare.listings import Listing
    from avsep.data.prepare.videos import Prepared

_SHOWN = 20  # skipped videos named one by one
_TOLD = ("id", "class", "split", "status", "reason")  # of each in JSON


def command(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="music21, ave, vggsound, or folder: your own.")],
    root: Annotated[Path, typer.Option("--root", help="Folder that holds the videos.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make the store in, outside of ROOT.")],
    table: Annotated[
        Path | None,
        typer.Option(
            "--table", help="Of folder: CSV with path,class and if wanted split,start,end,id [default: ROOT/CLASS/]."
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            "--annotations", help="MUSIC21_solo_videos.json, Annotations.txt or vggsound.csv [default: in ROOT]."
        ),
    ] = None,
    splits: Annotated[
        Path | None,
        typer.Option(
            "--splits",
            help="Published lists of train, val and test: folder, .npy, .pkl, .json, or CSV with id,class,split.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="Classes to take, in task order, such as flute,piano [default: all]."),
    ] = None,
    events: Annotated[bool, typer.Option("--events", help="Of ave: take the annotated seconds alone.")] = False,
    shares: Annotated[
        str, typer.Option("--shares", help="Per cent of train,val,test where a data set says none.")
    ] = "80,10,10",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed splits otherwise.")] = 0,
    rate: Annotated[int, typer.Option("--rate", help="Rate of the sound in Hz, the separator's.")] = 11025,
    object_features: Annotated[
        str, typer.Option("--object", help="Extractor of object features (avsep list), or none.")
    ] = "clip_vit_b32",
    motion_features: Annotated[
        str, typer.Option("--motion", help="Extractor of motion features, or none.")
    ] = "videomae_base",
    frames: Annotated[
        bool,
        typer.Option("--frames", help="Keep the frames, too: of the object 1 a second, of its movement 8 grey ones."),
    ] = False,
    frame_size: Annotated[int, typer.Option("--frame-size", help="Pixels of a side of the object's frames.")] = 112,
    motion_rate: Annotated[
        float, typer.Option("--motion-rate", help="Frames a second of the movement; separators that look ask for 16.")
    ] = 8.0,
    sounds: Annotated[
        bool,
        typer.Option("--sounds", help="Keep recordings without pictures, as sounds, and pass none over."),
    ] = False,
    detector: Annotated[
        str, typer.Option("--detector", help="owlv2, or none: the whole frame is the object.")
    ] = "owlv2",
    look_every: Annotated[float, typer.Option("--look-every", help="Seconds from one detection to the next.")] = 1.0,
    weights: Annotated[
        str,
        typer.Option("--weights", help="Folder of the extractors' folders; auto: AVSEP_WEIGHTS, cache, download."),
    ] = "auto",
    min_seconds: Annotated[float, typer.Option("--min-seconds", help="Shorter videos are passed over.")] = 1.0,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=MOST_PROCESSES, help="Videos worked on at once.")] = 1,
    engine: Annotated[str, typer.Option("--engine", help="processes, or ray (extra ray; RAY_ADDRESS).")] = "processes",
    device: Annotated[str, typer.Option("--device", help="Of the extractors: auto, cpu, cuda or mps.")] = "auto",
    update: Annotated[
        bool, typer.Option("--update", help="Take a finished store up again for videos that are new or have changed.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete the store that is there and begin anew.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a store of a data set's videos: sound, features, frames. Continues a killed run."""
    from avsep.data.prepare.videos import check_places, make_recipe, prepare

    output = Output(json=json, quiet=quiet, verbose=verbose)
    listing = _listing(
        dataset,
        root,
        table=table,
        annotations=annotations,
        splits=splits,
        classes=None if classes is None else names_in(classes),
        events=events,
        shares=_shares(shares),
        seed=seed,
    )
    for note in listing.notes:
        output.note(f"note: {note}")
    output.detail(f"{len(listing.videos)} listed in {listing.root}, {jobs} at once, by {engine}, on {device}")
    check_places(out, listing.root)  # before weights are looked for
    recipe = make_recipe(
        rate_hz=rate,
        object=_or_none(object_features),
        motion=_or_none(motion_features),
        frames=frames,
        frame_size=frame_size,
        detector=_or_none(detector),
        look_every_s=look_every,
        min_seconds=min_seconds,
        motion_rate_hz=motion_rate,
        sounds=sounds,
        weights=weights,
        device=device,
    )
    started = time.perf_counter()
    try:
        result = prepare(listing, out, recipe, jobs=jobs, engine=engine, update=update, progress=not quiet, force=force)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    output.detail(f"took {time.perf_counter() - started:.1f} s")
    _tell(output, result, [*listing.notes])


def _or_none(name: str) -> str | None:
    return None if name == "none" else name


def _shares(text: str) -> tuple[float, ...]:
    from avsep.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--shares {text}: give three numbers, for train, val and test, such as 80,10,10") from None


def _listing(dataset: str, root: Path, **options: Any) -> Listing:
    """Reads the layout; an option that would do nothing there is refused."""
    import inspect

    from avsep.data.prepare.listings import DATASETS, SHARES
    from avsep.errors import ConfigError, UnknownNameError, near_matches

    if dataset not in DATASETS:
        raise UnknownNameError(f"no data set '{dataset}': {near_matches(dataset, DATASETS)}")
    unset = {"table": None, "annotations": None, "splits": None, "classes": None, "events": False, "seed": 0}
    taken = inspect.signature(DATASETS[dataset]).parameters
    for name, value in options.items():
        if name not in taken and value != {**unset, "shares": tuple(map(float, SHARES))}[name]:
            of = ", ".join(d for d, read in DATASETS.items() if name in inspect.signature(read).parameters)
            raise ConfigError(f"--{name} goes with {of}, and does nothing with {dataset}: leave it out")
    return DATASETS[dataset](root, **{name: value for name, value in options.items() if name in taken})


def _tell(output: Output, result: Prepared, notes: list[str]) -> None:
    from collections import Counter

    from avsep.data.prepare.videos import STATUSES
    from avsep.data.store.files import SPLITS, VIDEOS_FILE

    store = result.store
    counts = Counter({"ok": len(store.clips)}) + Counter(e["status"] for e in result.skipped)
    lacking = [
        (name, split) for name in store.classes for split in SPLITS if not store.select(classes=[name], split=split)
    ]
    output.result(
        {
            "format": "avsep-data-prepare",
            **facts_of(store),
            "videos": store.path / VIDEOS_FILE,
            "counts": counts,
            "skipped": [{key: entry.get(key) for key in _TOLD} for entry in result.skipped],
            "lacking": [{"class": name, "split": split} for name, split in lacking],
            "unlisted": result.unlisted,
            "notes": notes,
        }
    )
    console = output.console(soft_wrap=True, highlight=False)
    console.print(f"{store.path}: {extent(store)}")
    for status, meaning in STATUSES.items():
        if counts[status]:
            console.print(f"{counts[status]:6} {status:9} {meaning}")
    for entry in result.skipped[:_SHOWN]:
        console.print(f"  {entry['id']}: {entry['status']}: {entry['reason']}")
    if len(result.skipped) > _SHOWN:
        console.print(f"  and {len(result.skipped) - _SHOWN} more")
    output.say(f"what became of each video: {link(store.path / VIDEOS_FILE)}")
    if lacking:
        texts = [f"{name} has no {split}" for name, split in lacking]
        named = "; ".join(texts[:4]) + ("; ..." if texts[4:] else "")
        output.note(
            f"note: {named}: a class is learned and tested where each split has a clip of it, so leave it out by "
            "--tasks, or split otherwise"
        )
    if result.unlisted:
        output.note(f"note: {result.unlisted} videos came since it was finished: --update takes them in")
    console.print(f"content hash {store.content_hash}")
    output.say(next_command("train", store.path, "--out", f"runs/{store.path.name}"))

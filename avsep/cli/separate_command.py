"""``avsep separate``."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, link

if TYPE_CHECKING:
    from avsep.export.runtime.recordings import Source
    from avsep.inference.page import Boxes
    from avsep.inference.recordings import Recording, SeparatedFile
    from avsep.media.detection import BoxTrack
    from avsep.media.timeline import VisualTimeline
    from avsep.models import Model
    from avsep.progress import Progress
    from avsep.types import VisualSource


def command(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="VIDEO|AUDIO|FOLDER...",
            help="Recordings, or folders of them: any rate, length and number of channels, which are kept. A video is "
            "looked at.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--classes",
            help="Classes to separate, such as flute,piano; auto: those that are seen. Two of one class by names of "
            "their own: left=violin,right=violin.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for FILE_NAME.wav, FILE_residual.wav and a page [default: FILE_separated beside each FILE].",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Run folder, saved separator, or a model that comes with avsep (avsep models) [default: instruments].",
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Exported bundle, in place of a run; needs no PyTorch.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", help="Frames or features by name or class (.npz, see: avsep data features)."),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(
            "--boxes",
            help='Where each source is in the video, as JSON: {"0": {"flute": [left, top, right, bottom]}, ...}, by '
            "second, by name or class, as fractions of the frame. Without it a detector looks.",
        ),
    ] = None,
    whole_frame: Annotated[
        bool, typer.Option("--whole-frame", help="Show the whole frame for every class; detect no objects.")
    ] = False,
    look: Annotated[
        bool | None,
        typer.Option(
            "--look/--no-look",
            help="Look at a video, or ask by name alone [default: look; models that come with avsep and bundles "
            "of them do not, for they learned from drawn players].",
            show_default=False,
        ),
    ] = None,
    detector: Annotated[
        str, typer.Option("--detector", help="Folder of the detector's weights; auto: AVSEP_WEIGHTS, cache, download.")
    ] = "auto",
    look_every: Annotated[
        float, typer.Option("--look-every", min=0.04, help="Seconds of video from one detection to the next.")
    ] = 1.0,
    picture: Annotated[
        list[str] | None,
        typer.Option(
            "--picture",
            metavar="NAME=PHOTO",
            help="One picture for a source or class, in place of what a video shows of it (repeatable). Some "
            "separators need neither.",
        ),
    ] = None,
    task: Annotated[
        int | None, typer.Option("--task", min=0, help="Separator of this task [default: the last finished].")
    ] = None,
    rate: Annotated[
        str, typer.Option("--rate", help="Rate of the files written: model (the separator's), input, or Hz.")
    ] = "model",
    subtype: Annotated[str, typer.Option("--format", help="Samples as PCM_16, PCM_24 or FLOAT.")] = "PCM_16",
    rescale: Annotated[
        bool,
        typer.Option("--rescale", help="Where samples would be clipped, scale all files of a recording by one factor."),
    ] = False,
    mono: Annotated[bool, typer.Option("--mono", help="Mix the channels to mono first.")] = False,
    limit_mask_sum: Annotated[
        bool,
        typer.Option(
            "--limit-mask-sum",
            help="Divide the masks by their sum where that is above 1: the parts and the residual add up to the "
            "mixture, and no part is louder than it.",
        ),
    ] = False,
    suffix: Annotated[str, typer.Option("--suffix", help="Files as wav or flac.")] = "wav",
    page: Annotated[bool, typer.Option("--page/--no-page", help="Write FILE_separated.html, to hear and see.")] = True,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Chunks separated at once [default: 4; of a bundle: as its graph takes]."),
    ] = None,
    context: Annotated[
        float | None,
        typer.Option("--context", help="Seconds of each side of a chunk thrown away [default: an eighth of it]."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Of a run: auto, cpu, cuda or mps.")] = "auto",
    provider: Annotated[
        str,
        typer.Option(
            "--provider", help="Of a bundle: auto, cpu, cuda, onnxruntime-tensorrt, openvino, tensorrt, tensorrt-rtx."
        ),
    ] = "auto",
    precision: Annotated[
        str | None, typer.Option("--precision", help="Of a bundle: fp32, fp16 or int8 [default: fp32 where it has it].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Separate videos or sounds of any length into one file per source and a residual, with a page to hear and see.

    Of several recordings each is written when it is separated. One that cannot be is told and left out; the exit code
    is 2 then.
    """
    from avsep.cli._text import names_in
    from avsep.errors import ConfigError
    from avsep.export.runtime.recordings import check_moves, listed, mixed_down, sources_of
    from avsep.inference.recordings import check_recordings, read_recording, separate_recordings
    from avsep.media.detection import read_boxes
    from avsep.media.timeline import read_visual_file

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if run is not None and bundle is not None:
        raise ConfigError("name one thing to separate with: --run RUN, or --bundle BUNDLE (of avsep export)")
    _refuse_the_others(bundle is not None, task=task, device=device, provider=provider, precision=precision)
    given = {"--features": features is not None, "--boxes": boxes is not None, "--whole-frame": whole_frame}
    if sum(given.values()) > 1:
        both = " and ".join(name for name, there in given.items() if there)
        raise ConfigError(f"{both} both say what is seen of the classes: leave all but one out")
    if look is False and (shown := [name for name, there in given.items() if there]):
        raise ConfigError(f"--no-look looks at nothing, and {shown[0]} says what is to be seen: leave one out")

    def load() -> _Engine:
        if bundle is None:
            return _of_run(run, task, device, batch or 4, context, limit_mask_sum)
        loaded = _of_bundle(bundle, provider, precision, batch, context, output.note)
        if limit_mask_sum and not loaded.limited:
            raise ConfigError(
                f"--limit-mask-sum is not in the graph of {bundle}: export it so (avsep export RUN --limit-mask-sum)"
            )
        return loaded

    written = ",".join(classes or ())
    _refuse_what_is_missing(files or [], written, load)
    failures = _Failures(output)
    paths = failures.expanded(files or [])
    channels: dict[Path, int] = {}
    for path in paths:  # the likeliest mistakes first
        with failures.of(path):
            channels[path] = _channels(read_recording(path)[0])
    if not channels:
        output.result(_as_data([], failures.told, ""))
        raise typer.Exit(2)
    photos = _photos(picture or [])
    timelines = {} if features is None else read_visual_file(features)
    track = None if boxes is None else read_boxes(boxes)
    engine = load()
    named = run or bundle if engine.model is None else engine.model.name
    output.detail(f"{named}, on {engine.ran}: {listed(engine.classes)}")
    failures.refuse_classes(engine.classes, written)
    chosen = names_in(written, engine.classes)
    auto = [name.casefold() for name in chosen] == ["auto"]
    looks_at_videos = engine.looks or any(given.values()) or detector != "auto" or auto if look is None else look
    if not looks_at_videos and not engine.can_go_unseen and engine.sources:
        raise ConfigError("--no-look asks by name alone, and this separator needs to see what it is asked for")
    mixed = {
        path: mono or (engine.channels is not None and n not in (1, engine.channels)) for path, n in channels.items()
    }
    results: list[SeparatedFile] = []
    with contextlib.ExitStack() as stack:
        display: list[Progress] = []  # opened by the first bar, so that a mistake found before is one line alone
        bar_of: dict[str, int] = {}

        def progress(label: str, done: int, total: int) -> None:
            if not display:
                display.append(stack.enter_context(output.bars()))
            if label not in bar_of:
                bar_of[label] = display[0].add(label, total)
            display[0].update(bar_of[label], done, total)

        looks = _Looks(
            engine,
            timelines,
            track,
            whole_frame,
            detector,
            look_every,
            "cpu" if bundle is not None else device,
            progress,
            output.note,
            looks_at_videos,
        )
        options: dict[str, Any] = {"rate": rate, "subtype": subtype, "suffix": suffix}
        options |= {"rescale": rescale, "overwrite": overwrite}
        engine.refuse_left_out(chosen)
        asked = None if auto else sources_of(engine.classes, chosen)
        if asked is not None:
            check_moves(asked, engine.sources)
        looks.show(photos, asked)
        if asked is not None and (timelines or not engine.sources):
            engine.check({**timelines, **looks.pictures}, chosen)
        looks.check(list(channels), asked)
        for path in list(channels):
            with failures.of(path):
                looks.check_file(path, asked)
        page = page and _can_draw(output.note)

        def planned(path: Path, sources: list[Source], seen: dict[str, VisualTimeline] | None) -> Recording:
            written = (_place(path, out), suffix) if page else None
            return _planned(path, sources, seen, engine, looks, written, mixed[path])

        places: dict[Path, list[Path]] = {}  # folder -> recordings
        for path in channels:
            if path not in failures:
                places.setdefault(_place(path, out), []).append(path)
        for place, inside in places.items():  # what can go wrong with the files, before a video is looked at
            check_recordings([planned(path, asked or [], None) for path in inside], place, **options)
        for path, count in channels.items():
            if mixed[path] and not mono and engine.channels is not None and path not in failures:
                output.note(mixed_down(path.name, count, engine.channels))
        try:
            with engine.opened():
                for place, path in ((place, path) for place, inside in places.items() for path in inside):
                    started = time.perf_counter()
                    with failures.of(path, *([ConfigError] if asked is None else [])):
                        sources = sources_of(engine.classes, looks.propose(path)) if asked is None else asked
                        results += separate_recordings(
                            [planned(path, sources, looks.timelines(path, sources))],
                            place,
                            sample_rate_hz=engine.rate_hz,
                            threshold=engine.threshold,
                            limited=engine.limited,
                            progress=lambda path, done, total: progress(f"separating {path.name}", done, total),
                            **options,
                        )
                        output.detail(f"{path}: {time.perf_counter() - started:.1f} s")
                    if len(paths) > _MOST_BARS:
                        while bar_of:
                            display[0].remove(bar_of.popitem()[1])
        except KeyboardInterrupt as stop:
            if len(paths) == 1:
                raise
            raise KeyboardInterrupt(f"{len(results)} of {len(paths)} recordings are separated", *stop.args) from None
        except Exception:
            if results:
                output.note(f"{len(results)} of {len(paths)} recordings were separated before")
            raise
    if output.json:
        output.result(_as_data(results, failures.told, engine.ran))
    elif results:
        _print(output, results, engine.ran, rescale, tells_unseen=engine.looks or bool(looks_at_videos))
    if failures.told:
        output.wrong(f"{len(failures.told)} of {len(paths) + failures.unopened} recordings could not be separated")
        raise typer.Exit(2)


_MOST_BARS = 4  # of finished recordings that stay to be seen
# What a folder is searched for, in lower case.
_SOUNDS = ("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "au", "caf", "w64", "rf64", "m4a", "aac", "wma")
_VIDEOS = ("mp4", "m4v", "mkv", "webm", "mov", "avi", "mpg", "mpeg", "ts", "mts", "m2ts", "3gp", "flv", "wmv", "ogv")


def _place(path: Path, out: Path | None) -> Path:
    """The folder for what comes of a recording."""
    return path.parent / f"{path.stem}_separated" if out is None else out


def _refuse_what_is_missing(files: list[Path], classes: str, load: Callable[[], _Engine]) -> None:
    """Raise :class:`ConfigError` with all that was not given, and the classes to choose from."""
    from avsep.cli._text import names_in
    from avsep.errors import ConfigError
    from avsep.export.runtime.recordings import listed

    missing = [] if files else ["a recording (a video, a sound or a folder of them)"]
    if not names_in(classes):
        missing.append(f"classes (--classes flute,piano, or auto: those that are seen; {listed(load().classes)})")
    if missing:
        raise ConfigError(f"avsep separate needs {' and '.join(missing)}: see avsep separate --help")


class _Failures:
    """The recordings that cannot be separated, and why. One that is alone ends the command."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.alone = True
        self.unopened = 0  # of those that were given, and are no files
        self.told: dict[Path, str] = {}

    def __contains__(self, path: Path) -> bool:
        return path in self.told

    def expanded(self, given: list[Path]) -> list[Path]:
        """The files among what was given, with those inside of folders."""
        found: list[Path] = []
        self.alone = len(given) == 1
        for path in given:
            with self.of(path):
                found += _files_of(path)
        self.unopened = len(self.told)
        found = list(dict.fromkeys(found))
        self.alone = len(found) + len(self.told) == 1
        return found

    @contextlib.contextmanager
    def of(self, path: Path, *also: Any) -> Iterator[None]:
        """What goes wrong inside is the fault of this recording: it is told, and the others go on."""
        from avsep.errors import DataError, NumericalError

        try:
            yield
        except (DataError, NumericalError, PermissionError, FileNotFoundError, *also) as error:
            if self.alone:
                raise
            text = str(error)
            if isinstance(error, OSError):
                text = f"{path}: {error.strerror or error}"
            self.told[path] = text
            self.output.wrong(text if path.name in text else f"{path}: {text}")

    def refuse_classes(self, known: tuple[str, ...], written: str) -> None:
        """Raise :class:`ConfigError` where classes were taken for recordings: ``--classes flute piano``."""
        from avsep.cli._text import names_in
        from avsep.errors import ConfigError

        stray = [p.name for p in self.told if not p.exists() and set(names_in(p.name, known)) <= set(known)]
        if stray:
            raise ConfigError(
                f"{' and '.join(stray)} {'is a class' if len(stray) == 1 else 'are classes'}, given in the place of a "
                f"recording: write --classes {','.join([written, *stray])}"
            )


def _files_of(path: Path) -> list[Path]:
    """A file as it is, and the recordings of a folder.

    Raises:
        AudioError: the folder has none.
        DataError: the address of something elsewhere.
    """
    from avsep.errors import AudioError, DataError

    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix[1:].lower() in (*_SOUNDS, *_VIDEOS) and p.is_file()]
        found = sorted(p for p in found if not p.name.startswith("."))
        if not found:
            raise AudioError(
                f"{path} is not a file but a folder, and holds no recording ({', '.join(_SOUNDS[:6])}, "
                f"{', '.join(_VIDEOS[:5])} or the like): give recordings, or the folder that they are in"
            )
        return found
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", str(path))
    if address is None or path.exists():
        return [path]
    rest = str(path)[address.end() :]
    if address[1].lower() == "file":  # as some terminals paste what is dropped on them
        from urllib.parse import unquote

        return [Path("/" + unquote(rest))]
    raise DataError(
        f"{address[1]}://{rest} is an address, and avsep separates files: download it first (such as with yt-dlp or "
        "curl -O), and give the file"
    )


def _channels(audio: Any) -> int:
    """Of sound [L] or [C, L]."""
    return 1 if audio.ndim == 1 else len(audio)


def _photos(given: list[str]) -> dict[str, Path]:
    """["violin=photo.jpg", ...] as paths by name or class."""
    from avsep.errors import ConfigError

    photos: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        name = name.strip()
        if not (name and sign and path):
            raise ConfigError(f"--picture {text!r} is not a class and its picture: write it as violin=photo.jpg")
        if name in photos:
            raise ConfigError(f"--picture gives two pictures of '{name}': one is shown of each")
        photos[name] = Path(path)
    return photos


def _refuse_the_others(with_bundle: bool, **options: Any) -> None:
    """Options that would do nothing are refused: those of a run with a bundle, and the other way round."""
    from avsep.errors import ConfigError

    others = {"task": None, "device": "auto"} if with_bundle else {"provider": "auto", "precision": None}
    for name, default in others.items():
        if options[name] != default:
            of, instead = ("--run", "--bundle") if with_bundle else ("--bundle", "--run")
            raise ConfigError(f"--{name} goes with {of}, and does nothing with {instead}: leave it out")


def _can_draw(tell: Callable[[str], None]) -> bool:
    """Whether a page can be drawn; says so in a line where it cannot."""
    from avsep.errors import MissingExtraError
    from avsep.evaluation.drawing import dependencies

    try:
        dependencies()
    except MissingExtraError as error:
        tell(f"no page is written: {error}")
        return False
    return True


@dataclass(frozen=True)
class _Engine:
    """What separates, of either kind.

    ``separate`` takes a mixture, timelines by name, classes and a function to report to; ``check`` raises what it would
    raise of timelines and classes; ``sizes`` are the heights and widths of frames by role, ``ran`` says where it runs.
    ``channels`` that it takes beside one, None: any number. ``threshold`` of presence, where it tells that. Whether its
    masks are ``limited`` to a sum of 1, and whether it ``can_go_unseen``. ``looks``: at a video, unless it is told not
    to. ``model``: that which comes with avsep, if it is one. ``refuse_left_out`` raises of classes that are known and
    not offered.
    """

    classes: tuple[str, ...]
    sources: tuple[VisualSource, ...]
    rate_hz: int
    sizes: dict[str, tuple[int, int]]
    ran: str
    separate: Callable[[Any, Any, list[str], Any], Any]
    check: Callable[[Any, list[str]], None]
    channels: int | None
    threshold: float | None
    limited: bool
    can_go_unseen: bool
    looks: bool = True
    model: Model | None = None
    refuse_left_out: Callable[[list[str]], None] = lambda chosen: None
    opened: Callable[[], Any] = field(default=contextlib.nullcontext)


def _of_run(
    run: Path | None, task: int | None, device: str, batch: int, context_s: float | None, limit_mask_sum: bool
) -> _Engine:
    """A trained separator; without a run the model that comes with avsep."""
    from avsep.environment import keep_memory, pick_device
    from avsep.inference.chunking import context_in_samples
    from avsep.inference.recordings import check_timelines, separate_and_tell
    from avsep.media.footage import SIZES
    from avsep.models import model_at
    from avsep.separator import load_separator

    keep_memory()

    chosen = pick_device(device)
    model = model_at(run)
    separator = load_separator(model.separator if model is not None else run or "", task).to(chosen)
    encoders = {"object": separator.object_encoder, "motion": separator.motion_encoder}
    spec, decoder = separator.spec.front_end, separator.mask_decoder
    context_in_samples(context_s, clip_samples=spec.clip_samples, sample_rate_hz=spec.sample_rate_hz)
    return _Engine(
        classes=separator.classes if model is None else model.classes,
        sources=separator.visual_sources(),
        looks=model is None,
        model=model,
        refuse_left_out=(lambda chosen: None) if model is None else model.refuse_left_out,
        rate_hz=spec.sample_rate_hz,
        sizes={role: _size(SIZES[role], None if e is None else e.size) for role, e in encoders.items()},
        ran=f"PyTorch, {chosen}",
        separate=lambda mixture, seen, names, report: separate_and_tell(
            separator,
            mixture,
            seen,
            names,
            batch=batch,
            context_s=context_s,
            limit_mask_sum=limit_mask_sum,
            progress=report,
        ),
        check=functools.partial(check_timelines, separator),
        channels=None,
        threshold=float(decoder.presence_threshold) if decoder.tells_presence else None,
        limited=limit_mask_sum or spec.limit_mask_sum,
        can_go_unseen=separator.can_go_unseen,
    )


def _size(usual: tuple[int, int], wanted: int | None) -> tuple[int, int]:
    """No smaller than what the encoder brings its frames to."""
    return max(usual[0], wanted or 0), max(usual[1], wanted or 0)


def _of_bundle(
    bundle: Path,
    provider: str,
    precision: str | None,
    batch: int | None,
    context_s: float | None,
    tell: Callable[[str], None],
) -> _Engine:
    """An exported bundle."""
    from avsep.export.runtime.separator import BundleSeparator

    separator = BundleSeparator.load(bundle, provider, precision, context_s=context_s)
    for reason in separator.unused_engines:
        tell(f"note: {reason}")
    return _Engine(
        classes=tuple(separator.classes),
        sources=separator.visual_sources,
        looks=not separator.by_name,
        refuse_left_out=separator.refuse_left_out,
        rate_hz=separator.sample_rate_hz,
        sizes=separator.frame_sizes,
        ran=separator.provider,
        separate=lambda mixture, seen, names, report: separator.separate_with_presence(
            mixture, seen, names, batch=batch, progress=report
        ),
        check=separator.check,
        channels=separator.channels,
        threshold=separator.presence_threshold,
        limited=separator.limits_mask_sum,
        can_go_unseen=separator.can_go_unseen,
        opened=lambda: separator,
    )


class _Looks:
    """What is seen of the classes in each file: given features or pictures, given boxes, a detector's, or the whole
    frame; nothing, where the separator can go unseen."""

    def __init__(
        self,
        engine: _Engine,
        given: dict[str, VisualTimeline],
        track: BoxTrack | None,
        whole_frame: bool,
        weights: str,
        every_s: float,
        device: str,
        progress: Callable[[str, int, int], None],
        tell: Callable[[str], None],
        look: bool = True,
    ) -> None:
        self.tell = tell
        self.look = look
        self.engine = engine
        self.given = given
        self.track = track
        self.whole_frame = whole_frame
        self.weights = weights
        self.every_s = every_s
        self.device = device
        self.progress = progress
        self.pictures: dict[str, VisualTimeline] = {}
        self.found: dict[Path, BoxTrack] = {}
        self.videos: set[Path] = set()
        self._detector: Any = None
        self._encoders: Any = None

    def show(self, photos: dict[str, Path], asked: list[Source] | None) -> None:
        """Read one picture for each of some sources; with ``asked`` None of classes."""
        from avsep.errors import ConfigError
        from avsep.export.runtime.recordings import by_name, sources_of
        from avsep.media.picture import timeline_of_picture

        if photos and not self.engine.sources:
            raise ConfigError("this separator looks at nothing, so that --picture does nothing: leave it out")
        sources = sources_of(self.engine.classes, list(photos)) if photos and asked is None else asked or []
        keys = by_name({key: key for key in photos}, sources)
        for key in photos:
            if key not in keys.values():
                if not any(source.is_named for source in sources):
                    sources_of(self.engine.classes, [key])  # an unknown class is told as such
                several = [source.name for source in sources if source.class_name == key]
                if several:
                    raise ConfigError(f"--picture {key}=... does not say of which {key}: name {' or '.join(several)}")
                has = ", ".join(source.name for source in sources)
                raise ConfigError(f"--picture {key}=... is of no class that is asked for: {has}")
        given = by_name(self.given, sources)
        for name, key in keys.items():
            if name in given:
                raise ConfigError(f"--picture and --features both say what is seen of '{name}': leave one out")
            self.pictures[name] = timeline_of_picture(photos[key], self.engine.sources, self.engine.sizes)

    def unshown(self, sources: list[Source]) -> list[Source]:
        """Those that no picture is given of."""
        return [source for source in sources if source.name not in self.pictures]

    def looks_at(self, path: Path, sources: list[Source]) -> bool:
        """Whether the file itself is looked at."""
        return bool(self.engine.sources) and not self.given and bool(self.unshown(sources)) and path in self.videos

    def check(self, files: list[Path], asked: list[Source] | None) -> None:
        """Raise where a source has no box, or nothing tells two of a class apart; ``asked`` None: auto."""
        from avsep.errors import ConfigError, DataError
        from avsep.export.runtime.recordings import by_name, nothing_of, same_class, together
        from avsep.media.video import is_video

        if self.engine.sources and not self.given:
            self.videos = {path for path in files if is_video(path)}
            if self.videos and not self.look:
                self.tell(f"{_names(self.videos)}: heard and not looked at (--look does)")
                self.videos = set()
        if asked is not None and self.track is not None:
            boxes = by_name(self.track.entries, asked)
            for source in self.unshown(asked):
                if source.name not in boxes:
                    raise DataError(nothing_of(source, self.track.classes, "boxes"))
        if self.given or not self.engine.sources:
            if asked is None and not self.given:
                raise ConfigError("this separator takes no video frames: name the classes instead of auto")
            return
        for group in same_class(self.unshown(asked or [])) if self.whole_frame else ():
            raise ConfigError(
                f"{together(group)}, and --whole-frame shows the same of each: give their boxes instead (--boxes)"
            )

    def check_file(self, path: Path, asked: list[Source] | None) -> None:
        """Raise :class:`DataError` where a file shows nothing that the separator needs; ``asked`` None: auto."""
        from avsep.errors import DataError
        from avsep.export.runtime.recordings import same_class

        if self.given or not self.engine.sources:
            return
        named = list(self.pictures) if asked is None else [source.name for source in asked]
        unshown = [name for name in named if name not in self.pictures]
        if path in self.videos or (named and not unshown):
            return
        if not self.engine.can_go_unseen:
            way_out = "give --features FILE.npz (see: avsep data features)"
            frames = all(source.kind == "frames" for source in self.engine.sources)
            if frames and not same_class(asked or []):  # two pictures do not tell two of a class apart
                way_out += f", or a picture of each class (--picture {(unshown or ['CLASS'])[0]}=photo.jpg)"
            raise DataError(f"this separator needs video frames, and {path} has none: {way_out}")
        if not named:
            raise DataError(f"{path} shows nothing: name the classes instead of auto")
        if self.track is not None or self.whole_frame:
            option = "--boxes" if self.track is not None else "--whole-frame"
            raise DataError(f"{option} is of a video, and {path} is none: leave it out")

    def propose(self, path: Path) -> list[str]:
        """The classes for ``--classes auto``: those of the given boxes or features, else those that are seen in a
        video; and those that a picture is given of."""
        from avsep.errors import DataError
        from avsep.media.detection import propose_classes
        from avsep.media.footage import sample_frames

        known = self.engine.classes
        if self.given or self.track is not None:
            named = self.track.classes if self.track is not None else tuple(self.given)
            names = [name for name in named if name in known]
            where = "the boxes" if self.track is not None else "the features"
        else:
            names = propose_classes(self._detect(), sample_frames(path), known) if path in self.videos else []
            where = str(path)
        names = list(dict.fromkeys([*names, *self.pictures]))
        if not names:
            raise DataError(
                f"{where} show none of the separator's classes ({', '.join(known)}): name them by --classes"
            )
        self.tell(f"{path.name}: {', '.join(names)}")
        return names

    def timelines(self, path: Path, sources: list[Source]) -> dict[str, VisualTimeline]:
        """What is seen of the sources in a file, by name."""
        from avsep.errors import DataError
        from avsep.export.runtime.recordings import by_name, nothing_of
        from avsep.media.footage import Encoders, timelines_of_video

        names, texts = [source.name for source in sources], [source.text for source in sources]
        pictures = {name: timeline for name, timeline in self.pictures.items() if name in names}
        if self.given or not self.engine.sources:
            found = {**by_name(self.given, sources), **pictures}
            for source in sources if self.given else ():
                if source.name not in found:  # what was forgotten in the file is not asked for by name alone
                    raise DataError(nothing_of(source, self.given))
            return found
        if not self.looks_at(path, sources):
            self.engine.check(pictures, texts)
            return pictures
        unshown = self.unshown(sources)
        if self._encoders is None and any(source.kind == "features" for source in self.engine.sources):
            self._encoders = Encoders(device=self._place())
        track = self._track(path, unshown)
        self.found[path] = track
        seen = timelines_of_video(
            path,
            [source.name for source in unshown],
            self.engine.sources,
            track,
            encoders=self._encoders,
            sizes=self.engine.sizes,
            report=functools.partial(self.progress, f"looking at {path.name}"),
        )
        seen.update(pictures)
        self.engine.check(seen, texts)
        return seen

    def _track(self, path: Path, sources: list[Source]) -> BoxTrack:
        """Where the sources are, by name."""
        from avsep.errors import ConfigError, MissingExtraError, MissingWeightsError
        from avsep.export.runtime.recordings import by_name, same_class, together
        from avsep.media.detection import BoxTrack
        from avsep.media.footage import track_objects, whole_frame

        if self.track is not None:
            return BoxTrack(by_name(self.track.entries, sources))
        groups = same_class(sources)
        if not self.whole_frame:
            try:
                detector = self._detect()
            except (MissingWeightsError, MissingExtraError) as error:
                if self.weights != "auto":
                    raise
                if groups:
                    raise ConfigError(
                        f"{together(groups[0])}: give their boxes (--boxes), for they cannot be looked for: {error}"
                    ) from None
                self.tell(f"every class is shown the whole frame, for no objects can be looked for: {error}")
                self.whole_frame = True
        if self.whole_frame:
            return whole_frame([source.name for source in sources])
        track = track_objects(
            path,
            {source.name: source.class_name for source in sources},
            detector,
            every_s=self.every_s,
            report=functools.partial(self.progress, f"finding objects in {path.name}"),
        )
        for group in groups:
            names = ", ".join(source.name for source in group)
            self.tell(
                f"{path.name}: {names} are the {len(group)} surest boxes of {group[0].class_name}, from left to right"
            )
        return track

    def to_correct(self, path: Path, sources: list[Source]) -> Boxes | None:
        """What was shown of the sources in a file, for its page; None where boxes would say nothing."""
        from avsep.inference.page import Boxes
        from avsep.media.footage import whole_frame

        if self.given or not self.engine.sources:
            return None
        names = [source.name for source in self.unshown(sources)]
        track = self.found.get(path) or whole_frame(names)
        tracks = {name: track.changes(name) for name in names}
        return Boxes(tracks, f"{path.stem}_boxes.json") if tracks else None

    def _detect(self) -> Any:
        from avsep.media.detection import OWLv2Detector

        if self._detector is None:
            self._detector = OWLv2Detector(weights=self.weights, device=self._place())
        return self._detector

    def _place(self) -> Any:
        from avsep.environment import pick_device

        return pick_device(self.device)


def _planned(
    path: Path,
    sources: list[Source],
    seen: dict[str, VisualTimeline] | None,
    engine: _Engine,
    looks: _Looks,
    page: tuple[Path, str] | None,
    mono: bool,
) -> Recording:
    """A file with all that is written of it; without ``seen`` only to check the names of the files. ``page``: the
    folder of a page, and the suffix of the files beside it; None: no page."""
    from avsep.inference.page import render_separated
    from avsep.inference.recordings import Recording, output_paths
    from avsep.media.detection import GIVEN
    from avsep.media.video import is_video

    names, texts = [source.name for source in sources], [source.text for source in sources]
    track = looks.found.get(path)
    beside: dict[str, Callable[[Any], str]] = {}
    if looks.looks_at(path, sources) and looks.track is None and not looks.whole_frame:
        beside[f"{path.stem}_boxes.json"] = lambda _: "" if track is None else track.as_json()
    if page is not None:
        place, suffix = page
        rules: dict[str, list[str]] = {source.name: [source.class_name] for source in sources if source.is_named}
        if track is not None:
            for name in (source.name for source in looks.unshown(sources)):
                counts = track.rules(name)
                total = sum(counts.values())
                rules.setdefault(name, []).extend(
                    "boxes given" if rule == GIVEN else f"{rule}: {count} of {total} frames" if total > 1 else rule
                    for rule, count in counts.items()
                )
        for name in names:
            if name in looks.pictures:
                rules.setdefault(name, []).append("picture given")
        beside[f"{path.stem}_separated.html"] = lambda signals: render_separated(
            path.name,
            names,
            signals,
            seen,
            rules,
            files=[file.name for file in output_paths(path, tuple(names), place, suffix)],
            video=path if is_video(path) else None,
            place=place,
            boxes=looks.to_correct(path, sources),
        )
    return Recording(
        path,
        tuple(names),
        lambda mixture, report: engine.separate(mixture, seen, texts, report),
        beside,
        mono,
        tuple(name for name in names if engine.sources and name not in (seen or {})),
    )


def _names(paths: set[Path]) -> str:
    names = sorted(path.name for path in paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _print(output: Output, results: list[SeparatedFile], ran: str, rescale: bool, *, tells_unseen: bool) -> None:
    from rich.table import Table

    folders = {result.residual.parent for result in results}
    into = f" into {folders.pop()}" if len(folders) == 1 else ", each beside its recording"
    table = Table(title=f"separated{into}, on {ran}")
    table.add_column("file", overflow="fold")
    tells = any(result.findings.presence for result in results)
    for heading in ("level dB", "to mixture dB", "s", "Hz", *(["presence"] if tells else [])):
        table.add_column(heading, justify="right")
    for result in results:
        whole = result.levels_db["mixture"]
        rows = {str(result.source): "mixture", **{f.name: c for c, f in result.files.items()}}
        for file, key in {**rows, result.residual.name: "residual"}.items():
            level = result.levels_db[key]
            cells = [file, f"{level:.1f}", f"{level - whole:+.1f}", f"{result.seconds:.2f}", str(result.rate_hz)]
            presence = result.findings.presence.get(key) if key in result.files else None
            table.add_row(*cells, *(["" if presence is None else f"{presence:.0%}"] if tells else []))
    output.show(table)
    if results[0].findings.limited:
        output.say("the parts and the residual add up to the mixture, and no part is louder than it")
    for result in results:
        for beside in result.beside:
            output.say(link(beside))
    for result in results:
        if result.findings.unseen and tells_unseen:
            unseen = ", ".join(result.findings.unseen)
            output.note(f"{result.source.name}: no picture of {unseen}: asked for by name alone")
        for line in result.findings.lines():
            output.note(f"{result.source.name}: {line}")
    for result in results if rescale else []:
        decibels = 20 * math.log10(result.gain)
        output.note(f"{result.source.name}: all files are scaled by {result.gain:.4f} ({decibels:+.1f} dB)")
    if clipped := sum(result.clipped for result in results):
        output.note(
            f"{clipped} samples were beyond full scale and are clipped: --rescale scales all files of a recording by "
            "one factor instead, --format FLOAT keeps every sample"
        )


def _as_data(results: list[SeparatedFile], failed: Mapping[Path, str], ran: str) -> dict[str, Any]:
    """What ``--json`` prints."""
    recordings = []
    for result in results:
        findings = result.findings
        recordings.append(
            {
                "source": result.source,
                "files": result.files,
                "residual": result.residual,
                "beside": result.beside,
                "seconds": result.seconds,
                "rate_hz": result.rate_hz,
                "channels": result.channels,
                "levels_db": result.levels_db,
                "clipped": result.clipped,
                "gain": result.gain,
                "presence": findings.presence,
                "unseen": findings.unseen,
                "notes": findings.lines(),
            }
        )
    return {
        "format": "avsep-separated",
        "ran": ran,
        "recordings": recordings,
        "failed": [{"source": path, "error": " ".join(text.split())} for path, text in failed.items()],
    }

"""From a data set's videos to a store: sound, frames and features of each, and what became of every one.

Each video is worked on alone, in one thread, and its files are whole or absent; the manifest is put together at the
end in the order of the listing. So a killed run goes on where it was, and its result is the same byte for byte, however
many processes worked on it.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from avsep.data.prepare.listings import Listing, Video
from avsep.data.store.checking import SILENT_DB
from avsep.data.store.files import VIDEOS_FILE, Store, StoreWriter, remove_store
from avsep.environment import die_with_parent, torch_threads
from avsep.errors import AvsepError, ConfigError, DataError, MissingExtraError, UnknownNameError, near_matches
from avsep.files import csv_cell, refuse_file, sha256_file, write_text
from avsep.media.audio import resample, to_mono
from avsep.media.footage import MOTION_RATE_HZ, OBJECT_RATE_HZ, SIZES
from avsep.progress import Progress, progress_bar
from avsep.types import VisualSource

__all__ = ["ENGINES", "STATUSES", "Prepared", "Recipe", "check_places", "make_recipe", "prepare"]

PREPARE_VERSION = 1  # changes with what is made of a video
LICENCE = "recordings and pictures are their makers'; the terms of the data set apply"
ENGINES = ("processes", "ray")
_CLOCKS_S = 5.0  # that those of two machines may differ
STATUSES = {
    "ok": "in the store",
    "missing": "no file of its name",
    "broken": "cannot be decoded",
    "crashed": "the decoder crashed on it",
    "no_audio": "no audio stream",
    "silent": f"sound below {SILENT_DB:.0f} dB",
    "short": "shorter than --min-seconds",
    "no_video": "no video stream, where frames or features are asked for (--sounds keeps it as a sound)",
}


@dataclass(frozen=True)
class Recipe:
    """What is made of each video. Plain data, the same in every process.

    ``object`` and ``motion`` name extractors of features or are None; ``frames`` keeps the frames, of the object
    ``frame_size`` pixels a side, of its movement ``motion_rate_hz`` a second; ``detector`` is ``owlv2`` or None (the
    whole frame); with ``sounds`` a recording without pictures is kept as a sound. ``extractors`` tell by name where the
    weights come from and their hash, ``folders`` where they lie on this machine. Made by :func:`make_recipe`.
    """

    rate_hz: int = 11025
    object: str | None = None
    motion: str | None = None
    frames: bool = False
    frame_size: int = SIZES["object"][0]
    detector: str | None = None
    look_every_s: float = 1.0
    min_seconds: float = 1.0
    device: str = "cpu"
    motion_rate_hz: float = MOTION_RATE_HZ
    sounds: bool = False
    extractors: dict[str, dict[str, str]] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)

    @property
    def takes_frames(self) -> bool:
        return bool(self.object or self.motion or self.frames)

    @property
    def sources(self) -> list[VisualSource]:
        found = []
        if self.object:
            found.append(VisualSource(role="object", kind="features", name=self.object))
        if self.motion:
            found.append(VisualSource(role="motion", kind="features", name=self.motion))
        if self.frames:
            found += [
                VisualSource(role="object", kind="frames", frames=1),
                VisualSource(role="motion", kind="frames", rate_hz=self.motion_rate_hz),
            ]
        return found

    @property
    def roles(self) -> dict[str, str]:
        """The role of each kind of features."""
        return {name: role for role, name in (("object", self.object), ("motion", self.motion)) if name}

    def origin(self) -> dict[str, Any]:
        """What the manifest says of it: nothing of this machine."""
        described = {k: v for k, v in asdict(self).items() if k not in ("rate_hz", "folders")}
        if not (self.roles or self.detector):
            described.pop("device")
        for later, default in (("motion_rate_hz", MOTION_RATE_HZ), ("sounds", False)):
            if described[later] == default:
                described.pop(later)  # stores made before they were there go on
        return described


@dataclass(frozen=True)
class Prepared:
    """A store that was prepared, and its videos that could not be used: manifest entries with status and reason.

    ``unlisted``: how many listed videos a finished store does not know of, since they were added later.
    """

    store: Store
    skipped: list[dict[str, Any]]
    unlisted: int = 0


def make_recipe(
    *,
    rate_hz: int = 11025,
    object: str | None = "clip_vit_b32",
    motion: str | None = "videomae_base",
    frames: bool = False,
    frame_size: int = SIZES["object"][0],
    detector: str | None = "owlv2",
    look_every_s: float = 1.0,
    min_seconds: float = 1.0,
    motion_rate_hz: float = MOTION_RATE_HZ,
    sounds: bool = False,
    weights: str | os.PathLike[str] = "auto",
    device: str = "cpu",
) -> Recipe:
    """Check what is to be made, and find the weights it needs, downloading them where that is possible.

    ``weights``: a folder that holds those of each extractor in a folder of their published name, or ``auto``
    (``AVSEP_WEIGHTS``, the hub's cache, a download).

    Raises:
        UnknownNameError: no extractor or detector of that name.
        ConfigError: a number is out of range.
        MissingWeightsError, MissingExtraError: what an extractor needs is not here.
    """
    if not 1000 <= rate_hz <= 192000:
        raise ConfigError(f"rate {rate_hz} must lie between 1000 and 192000 Hz")
    if not 16 <= frame_size <= 1024:
        raise ConfigError(f"frame_size {frame_size} must lie between 16 and 1024 pixels")
    if not (0.04 <= look_every_s < math.inf):
        raise ConfigError(f"look_every {look_every_s:g} must be at least 0.04 s")
    if not (0 < min_seconds < math.inf):
        raise ConfigError(f"min_seconds {min_seconds:g} must be above 0")
    if not (0 < motion_rate_hz <= 60):
        raise ConfigError(f"motion_rate {motion_rate_hz:g} must be above 0 and at most 60 frames a second")
    if detector not in (None, "owlv2"):
        raise UnknownNameError(f"no detector '{detector}': owlv2, or none for the whole frame")
    takes_frames = bool(object or motion or frames)
    kept = Recipe(
        rate_hz=rate_hz,
        object=object,
        motion=motion,
        frames=frames,
        frame_size=frame_size,
        detector=detector if takes_frames else None,  # there is nothing to cut out
        look_every_s=look_every_s,
        min_seconds=min_seconds,
        motion_rate_hz=motion_rate_hz,
        sounds=sounds,
    )
    if kept.roles or kept.detector:
        from avsep.environment import pick_device

        extractors, folders = _extractors(kept, weights)
        kept = Recipe(
            **{**asdict(kept), "device": str(pick_device(device)), "extractors": extractors, "folders": folders}
        )
    return kept


def _extractors(recipe: Recipe, weights: str | os.PathLike[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Where each extractor's weights come from, and the folders they lie in."""
    from avsep.media.footage import extractors

    hubs: dict[str, Any] = {}
    for name, role in recipe.roles.items():
        known = extractors(role)
        if name not in known:
            raise UnknownNameError(f"no extractor of {role} features '{name}' ({near_matches(name, known)}), or none")
        hubs[name] = known[name].factory.hub
    if recipe.detector:
        from avsep.media.detection import owlv2_hub

        hubs[recipe.detector] = owlv2_hub()
    provenance: dict[str, dict[str, str]] = {}
    folders: dict[str, str] = {}
    for name, hub in hubs.items():
        if hub is None:  # its weights come inside a package, which pins them
            provenance[name] = {}
            continue
        place = "auto" if str(weights) == "auto" else str(Path(weights) / hub.folder_name)
        folder = hub.locate(place)
        file = next(p for p in (folder / "model.safetensors", folder / "pytorch_model.bin") if p.is_file())
        provenance[name] = {"repository": hub.repository, "revision": hub.revision, "sha256": sha256_file(file)}
        folders[name] = str(folder)
    return provenance, folders


# --- one video ------------------------------------------------------------------------------------------------------


class _SkippedError(Exception):
    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


_looks: dict[str, tuple[Any, Any]] = {}  # the extractors of this process, by what they are


def _looking(recipe: Recipe) -> tuple[Any, Any]:
    """The encoders and the detector, made once a process."""
    from avsep.media.footage import Encoders

    key = repr(recipe)
    if key not in _looks:
        _looks.clear()
        detector = None
        if recipe.detector:
            from avsep.media.detection import OWLv2Detector

            detector = OWLv2Detector(weights=recipe.folders[recipe.detector], device=recipe.device)
        _looks[key] = (Encoders(recipe.folders, recipe.device), detector)
    return _looks[key]


def _make(out: str, root: str, recipe: Recipe, video: Video) -> str:
    """Write a video's files, or note why there are none; returns its status."""
    writer = StoreWriter.worker(out, recipe.rate_hz)
    source: dict[str, Any] | None = None
    row = {"class": video.class_name, "split": video.split}
    try:
        path = Path(root) / video.file
        if not video.file:
            raise _SkippedError("missing", f"there is no {video.looked_for}")
        source = {"path": video.file}  # all that is known of what cannot be read
        source = _source(path, video)
        mono, span, seconds, shows = _read_sound(path, recipe, video)
        about = {"duration_s": seconds, "status": "ok", "source": source}
        visual = _read_visual(path, recipe, video.class_name, span) if shows else {}
        writer.write_clip(video.id, video.class_name, video.split, mono, about=about, **visual)
        return "ok"
    except _SkippedError as stop:
        row |= {"status": stop.status, "reason": _without(stop.reason, root)}
        writer.note_skipped(video.id, {**row, "source": source})
        return stop.status


def _source(path: Path, video: Video) -> dict[str, Any]:
    """Where a video comes from, with its hash."""
    record: dict[str, Any] = {"path": video.file}
    try:
        record |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    except FileNotFoundError:
        raise _SkippedError("missing", f"{video.file} is a link to nothing, or was deleted") from None
    except OSError as error:
        reason = "it is a folder" if path.is_dir() else error.strerror or str(error)
        raise _SkippedError("broken", f"{video.file} cannot be read: {reason}") from None
    if video.span is not None:
        record["span_s"] = [video.span[0], None if math.isinf(video.span[1]) else video.span[1]]
    return record


def _without(reason: str, root: str) -> str:
    """One line without this machine's folders."""
    return " ".join(reason.replace(f"{root.rstrip('/')}/", "").split())


def _read_sound(path: Path, recipe: Recipe, video: Video) -> tuple[Any, tuple[float, float] | None, float, bool]:
    """The sound at the store's rate, the part that was taken, its seconds, and whether there are pictures, too."""
    from avsep.media.video import probe, read_sound

    span = video.span
    with _decoding():
        info = probe(path)
        if not info.has_audio:
            raise _SkippedError("no_audio", f"{video.file} has no audio stream")
        audio, own_hz = read_sound(path)
        mono = to_mono(audio)
    if span is not None and video.only_longer and len(mono) / own_hz <= span[1] - span[0] + 1.0:
        span = None  # cut out already
    if span is not None:
        mono = mono[round(span[0] * own_hz) : None if math.isinf(span[1]) else round(span[1] * own_hz)]
    seconds = len(mono) / own_hz
    if seconds < recipe.min_seconds:
        part = "" if span is None else f" from {span[0]:g} to {span[1]:g} s"
        raise _SkippedError("short", f"{video.file} has {seconds:.2f} s of sound{part}, below {recipe.min_seconds:g} s")
    power = float(np.mean(np.square(mono, dtype=np.float64)))
    level_db = 10 * math.log10(max(power, 1e-12))
    if level_db < SILENT_DB:
        raise _SkippedError("silent", f"{video.file} is silent ({level_db:.0f} dB)")
    if recipe.takes_frames and not info.has_video and not recipe.sounds:
        raise _SkippedError("no_video", f"{video.file} has no frames")
    return resample(mono, own_hz, recipe.rate_hz), span, round(seconds, 3), info.has_video


def _read_visual(path: Path, recipe: Recipe, class_name: str, span: tuple[float, float] | None) -> dict[str, Any]:
    """Frames and features, as ``avsep separate`` computes them."""
    from avsep.media.footage import timelines_of_video, track_objects, whole_frame

    if not recipe.takes_frames:
        return {}
    encoders, detector = _looking(recipe)
    sizes = {**SIZES, "object": (recipe.frame_size, recipe.frame_size)}
    try:
        if detector is None:
            track = whole_frame([class_name])
        else:
            track = track_objects(path, [class_name], detector, every_s=recipe.look_every_s, span=span)
        seen = timelines_of_video(path, [class_name], recipe.sources, track, encoders=encoders, sizes=sizes, span=span)[
            class_name
        ]
    except DataError as error:
        raise _SkippedError("broken", str(error)) from None
    return {"object_frames": seen.object, "motion_frames": seen.motion, "features": dict(seen.features)}


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a decoder makes of a damaged file is a reason to skip it; want of memory or of an extra is none."""
    try:
        yield
    except (_SkippedError, MemoryError):
        raise
    except DataError as error:
        raise _SkippedError("broken", str(error)) from None
    except AvsepError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
            raise
        raise _SkippedError("broken", f"{type(error).__name__}: {error}"[:300]) from None


# --- all of them ----------------------------------------------------------------------------------------------------


def prepare(
    listing: Listing,
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    jobs: int = 1,
    engine: str = "processes",
    update: bool = False,
    force: bool = False,
    progress: bool | Progress = True,
) -> Prepared:
    """Make a store of a data set's videos in folder ``out``. A killed run is continued by the same call.

    Args:
        jobs: processes that work in parallel; 0 works in this one (a video that crashes the decoder then ends it).
        engine: ``processes``, or ``ray``: the tasks of a Ray cluster, to which ``out`` and the videos are one folder.
        update: take a finished store up again for videos that were missing, are new or have changed.
        force: delete a store that is there first.

    A script that calls this with ``jobs`` above 0 needs the usual ``if __name__ == "__main__":``.

    Raises:
        DataError: ``out`` holds something else or a store made with other settings, or no video could be used.
        ConfigError: an unknown engine, or a number out of range.
        MissingExtraError: PyAV or Ray is not installed.
    """
    if engine not in ENGINES:
        raise UnknownNameError(f"no engine '{engine}': {near_matches(engine, ENGINES)}")
    if jobs < 0:
        raise ConfigError(f"jobs = {jobs}: give 0 or more")
    folder = Path(out)
    check_places(folder, listing.root)
    _check_installed(engine)
    origin = {
        "generator": "avsep data prepare",
        "generator_version": PREPARE_VERSION,
        "dataset": listing.dataset,
        **listing.origin,
        **recipe.origin(),
    }
    if force:
        remove_store(folder)
    with StoreWriter(
        folder,
        classes=listing.classes,
        sample_rate_hz=recipe.rate_hz,
        object_rate_hz=OBJECT_RATE_HZ,
        motion_rate_hz=recipe.motion_rate_hz,
        origin=origin,
        licence=LICENCE,
    ) as writer:
        if writer.finished:
            if not update:
                return _finished(Store.open(folder), listing)
            writer.reopen()
        with contextlib.ExitStack() as stack:
            bars = progress if isinstance(progress, Progress) else stack.enter_context(progress_bar(progress))
            todo = _todo(writer, listing, bars)
            bar = bars.add("preparing videos", len(listing.videos), done=len(listing.videos) - len(todo))
            counts: dict[str, int] = {}

            def done(status: str) -> None:
                if status != "ok":
                    counts[status] = counts.get(status, 0) + 1
                bars.advance(bar, note=", ".join(f"{n} {s}" for s, n in sorted(counts.items())) or None)

            run = {"processes": _run_processes, "ray": _run_ray}[engine] if jobs or engine == "ray" else _run_here
            if todo:
                run(str(folder), str(listing.root), recipe, todo, jobs, done)
        ids = [v.id for v in listing.videos]
        writer.forget_others(ids)
        entries = [writer.noted(i) or {} for i in ids]
        write_text(folder / VIDEOS_FILE, _table(entries))
        skipped = [e for e in entries if "files" not in e]
        if len(skipped) == len(entries):
            raise DataError(
                f"none of the {len(entries)} videos below {listing.root} could be used; the first: "
                f"{skipped[0]['reason']} (all of them: {folder / VIDEOS_FILE})"
            )
        shown = {kind for entry in entries for kind in entry.get("files", ())}
        roles = {name: role for name, role in recipe.roles.items() if f"features/{name}" in shown}
        return Prepared(writer.finish(ids, roles=roles), skipped)


def check_places(out: Path, root: Path) -> None:
    """Raise where a store cannot be made in ``out`` of what lies in ``root``."""
    refuse_file(out)
    inner, outer = out.resolve(), root.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise DataError(
            f"the store {out} and the videos {root} lie one in the other: choose a folder for the store outside of it"
        )


def _check_installed(engine: str) -> None:
    import importlib.util

    if importlib.util.find_spec("av") is None:
        raise MissingExtraError("av", "media", "reading a video")
    if engine == "ray" and any(importlib.util.find_spec(p) is None for p in ("ray", "pyarrow", "pandas")):
        raise MissingExtraError("ray[data]", "ray", "--engine ray")


def _finished(store: Store, listing: Listing) -> Prepared:
    known = {e["id"] for e in [*store.manifest["clips"], *store.manifest.get("skipped", ())]}
    return Prepared(store, store.manifest.get("skipped", []), sum(v.id not in known for v in listing.videos))


def _todo(writer: StoreWriter, listing: Listing, bars: Progress) -> list[Video]:
    """The videos that the journal does not have as they are now."""
    todo = []
    bar = None
    for number, video in enumerate(listing.videos):
        entry = writer.noted(video.id)
        if entry is not None and bar is None:  # a resumed run
            bar = bars.add("looking at what is there", len(listing.videos), done=number)
        if (
            entry is None
            or not _still(entry, writer.noted_at(video.id), video, listing.root)
            or ("files" in entry and not writer.is_done(video.id))
        ):
            todo.append(video)
        if bar is not None:
            bars.advance(bar)
    if bar is not None:
        bars.remove(bar)
    return todo


def _still(entry: dict[str, Any], noted_at: float, video: Video, root: Path) -> bool:
    """Whether a journal entry, of a time, is of this video and its file has not changed.

    A file that was touched since then, or put where it is, must have the same hash; of others the size is enough, since
    reading a large data set again takes hours.
    """
    source = entry.get("source")
    if (entry.get("class"), entry.get("split")) != (video.class_name, video.split):
        return False
    if not video.file or source is None:
        return not video.file and source is None
    if source.get("path") != video.file:
        return False
    try:
        found = (root / video.file).stat()
        if source.get("bytes") != found.st_size:
            return False
        touched = max(found.st_mtime, found.st_ctime)  # a file renamed or copied with its old time has a new ctime
        return touched < noted_at - _CLOCKS_S or source.get("sha256") == sha256_file(root / video.file)
    except OSError:
        return "bytes" not in source


def _table(entries: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "class", "split", "status", "seconds", "reason", "file", "sha256"))
    for entry in entries:
        source = entry.get("source") or {}
        row = [entry["id"], entry["class"], entry["split"], entry["status"], entry.get("duration_s", "")]
        row += [entry.get("reason", ""), source.get("path", ""), source.get("sha256", "")]
        writer.writerow(map(csv_cell, row))
    return text.getvalue()


_Run = Callable[[str], None]


def _run_here(out: str, root: str, recipe: Recipe, todo: Sequence[Video], jobs: int, done: _Run) -> None:
    with _one_thread(recipe):
        for video in todo:
            done(_make(out, root, recipe, video))


def _one_thread(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """The same bits on every machine, where something is computed at all."""
    return torch_threads(1) if recipe.roles or recipe.detector else contextlib.nullcontext()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that draws ends this one
    die_with_parent()


def _make_alone(out: str, root: str, recipe: Recipe, video: Video) -> str:
    with _one_thread(recipe):
        return _make(out, root, recipe, video)


def _run_processes(out: str, root: str, recipe: Recipe, todo: Sequence[Video], jobs: int, done: _Run) -> None:
    """Work in processes. Videos that were in work when one died are tried again alone, and noted if it dies again."""
    left = list(todo)
    while left:
        suspects = _run_pool(out, root, recipe, left, min(jobs, len(left)), done)
        for video in suspects:
            if _run_pool(out, root, recipe, [video], 1, done):
                writer = StoreWriter.worker(out, recipe.rate_hz)
                row = {"class": video.class_name, "split": video.split, "status": "crashed"}
                reason = f"the process that decoded {video.file} died, twice: the file is damaged, or memory is short"
                record: dict[str, Any] = {"path": video.file}
                with contextlib.suppress(_SkippedError):  # gone meanwhile
                    record = _source(Path(root) / video.file, video)
                writer.note_skipped(video.id, {**row, "reason": reason, "source": record})
                done("crashed")


def _run_pool(out: str, root: str, recipe: Recipe, left: list[Video], jobs: int, done: _Run) -> list[Video]:
    """Takes videos off ``left`` until none is left or a process died; returns those then in work."""
    # spawn, not fork: the caller may hold threads (torch), which a fork would leave locked
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    running: dict[Future[str], Video] = {}
    try:
        try:
            pool.submit(os.getpid).result()
        except BrokenProcessPool:
            raise AvsepError(
                'no worker process could be started: in a script, put the call under if __name__ == "__main__":'
            ) from None
        while left or running:
            while left and len(running) < jobs:  # no more than are worked on, so that a crash has few suspects
                video = left.pop(0)
                running[pool.submit(_make_alone, out, root, recipe, video)] = video
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                status = future.result()
                del running[future]
                done(status)
    except BrokenProcessPool:
        for future in [f for f in running if f.done() and f.exception() is None]:
            done(future.result())
            del running[future]
        return list(running.values())
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()  # what they were writing has a temporary name
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return []


class _RayWork:
    """What a Ray task does with a video."""

    def __init__(self, out: str, root: str, recipe: Recipe) -> None:
        self.of = (out, root, recipe)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        out, root, recipe = self.of
        try:
            return {"status": _make_alone(out, root, recipe, row["item"]), "error": ""}
        except AvsepError as error:
            return {"status": "", "error": str(error)}


def _run_ray(out: str, root: str, recipe: Recipe, todo: Sequence[Video], jobs: int, done: _Run) -> None:
    """Work in actors of Ray Data, on the cluster that ``RAY_ADDRESS`` names or on this machine."""
    import importlib
    import logging

    # an optional package, which type checkers are not to look for
    ray: Any = importlib.import_module("ray")
    importlib.import_module("ray.data")
    mine = not ray.is_initialized()
    if mine:
        here: dict[str, Any] = (
            {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(jobs, 1), "include_dashboard": False}
        )
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [{"item": video} for video in todo]
        videos = ray.data.from_items(items, override_num_blocks=min(len(todo), 50 * max(jobs, 1)))
        places = (os.path.abspath(out), os.path.abspath(root), recipe)
        work = videos.map(_RayWork, fn_constructor_args=places, concurrency=max(jobs, 1), num_cpus=1)
        for row in work.iter_rows():
            if row["error"]:
                raise AvsepError(row["error"])
            done(row["status"])
    finally:
        if mine:
            ray.shutdown()

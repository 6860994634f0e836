"""A store: one folder with a manifest, audio, frames and stored features of many clips, read by streaming.

Layout::

    manifest.json            what is there, with sizes and SHA-256 hashes
    audio/ID.wav             PCM 16 bit, mono, at the store's rate
    object/ID.npy            uint8 [n, 3, H, W], ``object_rate_hz`` frames a second
    motion/ID.npy            uint8 [m, c, h, w], ``motion_rate_hz`` frames a second
    features/NAME/ID.npy     float [n, D] (object) or [D, T] (motion)
    videos.csv               what became of each video (stores prepared from videos)

A clip may be a sound without pictures among others that have some: it has no file but its audio. The manifest is
written last, so a folder without one is unfinished. ``clips`` are what can be read; a store prepared
from videos also says of each clip where it comes from (``source``, with its hash), and lists under ``skipped`` the
videos that could not be used, with ``status`` and ``reason``. Of a clip that is an exemplar of a memory there may be
``parts`` alone (:mod:`avsep.data.store.parts`). Large data sets may have their files in shards instead
(:mod:`avsep.data.store.shards`); a store of either kind is opened and read alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avsep.data.store.maps import ArrayOnDisk, FileMaps, MappedFile, OpenFile, array_header, load_array, room_for_maps
from avsep.data.store.parts import ArrayInParts, check_parts, place_in_parts
from avsep.data.store.shards import check_shards, find_shards
from avsep.errors import ConfigError, DataError, UnknownNameError, near_matches
from avsep.export.runtime.errors import one_line
from avsep.export.runtime.timeline import MOST_RATE_HZ, is_rate
from avsep.files import FolderLock, atomic_path, entries, read_json, sha256_file, write_json
from avsep.media.timeline import VisualTimeline
from avsep.types import VisualSource

__all__ = [
    "SPLITS",
    "STORE_VERSION",
    "Clip",
    "OtherStoreError",
    "Store",
    "StoreWriter",
    "add_features",
    "remove_store",
    "timelines_of",
]

STORE_VERSION = 1
SPLITS = ("train", "val", "test")
_FORMAT = "avsep-store"
_JOURNAL = ".journal"
VIDEOS_FILE = "videos.csv"
_BYTE = np.dtype(np.uint8)
_PCM = np.dtype("<i2")
_MOST_SAMPLE_RATE_HZ = 768_000
_MOST_SIDE = 1 << 16  # of a frame, in pixels, and of features in numbers or steps
_MOST_BYTES = 1 << 40  # of one file
_OPEN_MAPS = 64  # memory maps kept open per process, beside those of shards; each holds a file descriptor
_OPEN_SHARDS = 128
_HELD_MAPS = 256  # of the files that training reads from; those beyond are read by position
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # of ids and names: no text, or no one line


class OtherStoreError(DataError):
    """A folder already holds a store made with other settings; ``fact`` says with which, without the way out."""

    def __init__(self, fact: str, way_out: str) -> None:
        self.fact = fact
        super().__init__(f"{fact}: {way_out}")


@dataclass(frozen=True)
class Clip:
    """One recording: ``samples`` long at the store's rate; ``index`` is its place in the manifest, its video id."""

    id: str
    class_name: str
    split: str
    samples: int
    index: int


class Store:
    """A store opened for reading. Cheap to open and to pickle; reads touch only the bytes that are asked for.

    Attributes: ``path``; ``manifest``, the parsed file; ``classes`` in task order; ``clips`` in manifest order;
    ``sample_rate_hz``; ``object_rate_hz``; ``motion_rate_hz``.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.sample_rate_hz: int = manifest["sample_rate_hz"]
        self.object_rate_hz: float = manifest["object_rate_hz"]
        self.motion_rate_hz: float = manifest["motion_rate_hz"]
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.clips: tuple[Clip, ...] = tuple(
            Clip(entry["id"], entry["class"], entry["split"], entry["samples"], index)
            for index, entry in enumerate(manifest["clips"])
        )
        self._maps = FileMaps(room_for_maps(_OPEN_MAPS))
        self._shards = find_shards(path, manifest)
        self._shard_maps = FileMaps(room_for_maps(_OPEN_SHARDS))
        self._held = FileMaps(room_for_maps(_HELD_MAPS))
        self._root = str(path)
        self._pictured = {i for i, entry in enumerate(manifest["clips"]) if entry["files"].keys() - {"audio"}}

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Store:
        """Open the store in folder ``path``.

        Sizes are always checked; ``verify=True`` also reads every file and compares its hash and rate. Raises
        :class:`DataError` for a folder without a manifest, an unknown version, a missing or damaged file.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            if (path / _JOURNAL).is_dir():
                raise DataError(f"{path} is an unfinished store: run the command that made it again, {_begun_by(path)}")
            way_out = "give the folder of one, or make one with avsep data synth FOLDER or avsep data prepare"
            if not path.exists():
                raise DataError(f"there is no store {path}: {way_out}")
            raise DataError(f"{path} is not a store (it has no manifest.json): {way_out}")
        try:
            manifest = read_json(path / "manifest.json")
        except ConfigError as error:
            raise DataError(f"{error} Make the store again") from None
        _check_manifest(path, manifest)
        store = cls(path, manifest)
        store._check_files(verify)
        return store

    def _check_files(self, verify: bool) -> None:
        for file, shard in zip(self._shards, self.manifest.get("shards", ()), strict=True):
            self._check_file(Path(file), "a shard", shard, verify)
        for entry in self.manifest["clips"]:
            for kind, record in entry["files"].items():
                if "shard" not in record:
                    self._check_file(self.path / record["path"], f"{kind} of clip '{entry['id']}'", record, verify)
                elif verify:
                    for _ in self.blocks(record, 1 << 20):
                        pass
        if verify:
            for clip in self.clips:
                self.read_audio(clip, 0, 0)

    @staticmethod
    def _check_file(file: Path, what: str, record: Mapping[str, Any], verify: bool) -> None:
        try:
            found = file.stat()
        except OSError as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read, {error.strerror}"
            way_out = "put it back, or name its folder in shard_folders of manifest.json, or " * (what == "a shard")
            raise DataError(f"{str(file)[:300]} {why} ({what}): {way_out}make the store again") from None
        except ValueError as error:  # a name that is none
            raise DataError(f"{str(file)[:200]!r} ({what}) cannot be read: {error}; make the store again") from None
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{file} is not a plain file ({what}): make the store again")
        size = found.st_size
        if size != record["bytes"]:
            raise DataError(
                f"{file} has {size} bytes instead of {record['bytes']}: it is truncated or was replaced; make the "
                f"store again"
            )
        if verify and sha256_file(file) != record["sha256"]:
            raise DataError(f"{file} does not match its hash in the manifest: it is damaged; make the store again")

    def blocks(self, record: Mapping[str, Any], size: int) -> Iterator[memoryview]:
        """The bytes of one of a clip's files, by its record in the manifest, at most ``size`` at a time.

        Raises :class:`DataError` at the end where they do not match their hash.
        """
        digest = hashlib.sha256()
        with self._opened(record) as file:
            for start in range(0, record["bytes"], size):
                block = file.numbers(_BYTE, start, min(size, record["bytes"] - start))
                digest.update(block.data)
                yield block.data
        if digest.hexdigest() != record["sha256"]:
            raise DataError(
                f"{self._name(record)} does not match its hash in the manifest: it is damaged; make the store again"
            )

    @property
    def content_hash(self) -> str:
        """SHA-256 over ids, classes, splits, lengths, rates and the hashes of audio and frames, in manifest order.

        Stored features are left out: they are derived, and adding some changes no mixture and no protocol. See
        :meth:`feature_hash`.
        """
        clips = [
            [e["id"], e["class"], e["split"], e["samples"]]
            + [[kind, e["files"][kind]["sha256"]] for kind in ("audio", "object", "motion") if kind in e["files"]]
            for e in self.manifest["clips"]
        ]
        rates = [self.sample_rate_hz, self.object_rate_hz, self.motion_rate_hz]
        return _digest([_FORMAT, STORE_VERSION, rates, list(self.classes), clips])

    def feature_hash(self, name: str) -> str:
        """SHA-256 over the hashes of one kind of stored features, in manifest order."""
        self._feature(name)
        kind = f"features/{name}"
        return _digest([name, [e["files"].get(kind, {}).get("sha256") for e in self.manifest["clips"]]])

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Stored features by name: ``{"role": ..., "dim": D, "steps": T or None}``."""
        features: dict[str, dict[str, Any]] = self.manifest["features"]
        return features

    def _feature(self, name: str) -> dict[str, Any]:
        if name not in self.features:
            raise UnknownNameError(f"{self.path} has no features '{name}': {near_matches(name, self.features)}")
        return self.features[name]

    def require_rate(self, sample_rate_hz: int) -> None:
        """Raise :class:`DataError` unless the store's audio has this rate, the separator's."""
        if sample_rate_hz != self.sample_rate_hz:
            raise DataError(
                f"{self.path} holds audio at {self.sample_rate_hz} Hz, but the separator works at {sample_rate_hz} Hz: "
                f"make the store at that rate, or train with separator.front_end.sample_rate_hz={self.sample_rate_hz}"
            )

    def select(self, *, classes: Sequence[str] | None = None, split: str | None = None) -> list[Clip]:
        """The clips of some classes and of one split, in manifest order (None: all)."""
        if split is not None and split not in SPLITS:
            raise UnknownNameError(f"no split '{split}': known: {', '.join(SPLITS)}")
        for name in classes or ():
            if name not in self.classes:
                raise UnknownNameError(f"no class '{name}' in {self.path}: {near_matches(name, self.classes)}")
        wanted = None if classes is None else set(classes)
        return [
            c for c in self.clips if (wanted is None or c.class_name in wanted) and (split is None or c.split == split)
        ]

    def clip(self, clip_id: str) -> Clip:
        """The clip with this id."""
        return self.clips_by_id([clip_id])[0]

    def clips_by_id(self, ids: Sequence[str]) -> list[Clip]:
        """The clips with these ids, in the order of ``ids``."""
        known = {c.id: c for c in self.clips}
        for clip_id in ids:
            if clip_id not in known:
                raise UnknownNameError(f"no clip '{clip_id}' in {self.path}: {near_matches(clip_id, known)}")
        return [known[clip_id] for clip_id in ids]

    def file(self, clip: Clip, kind: str) -> Path | None:
        """The path of one of a clip's files (``audio``, ``object``, ``motion``, ``features/NAME``), or None where it
        has none or keeps it in a shard."""
        record = self._records(clip).get(kind)
        return None if record is None or "shard" in record else self.path / record["path"]

    @property
    def shows_anything(self) -> bool:
        """Whether any clip has frames or features."""
        return bool(self._pictured)

    def has_pictures(self, clip: Clip) -> bool:
        """Whether there is anything to see of a clip: False of a sound among clips that have frames or features. Of a
        store without any it is not asked, and what reads them says that they are missing."""
        return clip.index in self._pictured or not self._pictured

    def read_audio(self, clip: Clip, start: int = 0, samples: int | None = None, *, tile: bool = False) -> np.ndarray:
        """Read float32 [samples] from sample ``start`` on (default: to the clip's end), ±1 full scale.

        Outside the clip there is silence; with ``tile=True`` the clip repeats instead. Only the samples asked for are
        read.
        """
        samples = clip.samples - start if samples is None else samples
        if samples < 0:
            raise DataError(f"clip '{clip.id}': cannot read {samples} samples")
        out = np.zeros(samples, np.float32)
        if tile and clip.samples and not 0 <= start <= clip.samples - samples:
            whole = self._pcm(clip, 0, clip.samples).astype(np.float32) / np.float32(32768)
            out[:] = np.take(whole, np.arange(start, start + samples), mode="wrap")
            return out
        low, high = max(start, 0), min(start + samples, clip.samples)
        if high > low:
            out[low - start : high - start] = self._pcm(clip, low, high - low)
        elif samples == 0:
            self._pcm(clip, 0, 0)
        out *= np.float32(1 / 32768)
        return out

    def read_crop(self, clip: Clip, start: int, samples: int, gain: float = 1.0) -> np.ndarray:
        """A crop as training takes it: float32 [samples] from sample ``start`` on, times ``gain``, clipped to ±1.

        As :meth:`read_audio` in one pass: silence outside the clip, and one that is shorter than the crop repeats. The
        last sample is zero, as published.
        """
        out = np.empty(samples, np.float32)
        out[-1:] = 0.0
        scale = np.float32(gain) / np.float32(32768)  # exact, so that the product is rounded once
        low, high = max(start, 0), min(start + samples - 1, clip.samples)
        if clip.samples < samples and high - low < samples - 1:
            wrapped = np.arange(start, start + samples - 1)
            out[:-1] = np.take(self._pcm(clip, 0, clip.samples), wrapped, mode="wrap")
        else:
            out[: max(low - start, 0)] = 0.0
            out[max(high - start, 0) : -1] = 0.0
            if high > low:
                out[low - start : high - start] = self._pcm(clip, low, high - low)
        out *= scale
        return np.clip(out, -1.0, 1.0, out=out) if abs(gain) > 1 else out

    def read_pcm(self, clip: Clip, start: int, samples: int) -> np.ndarray:
        """int16 [samples] from sample ``start`` on, all inside the clip, as they are stored."""
        return np.array(self._pcm(clip, start, samples))

    def _pcm(self, clip: Clip, start: int, samples: int) -> np.ndarray:
        """int16 [samples] from sample ``start`` on."""
        record = self._records(clip).get("audio")
        if record is None:
            raise DataError(f"clip '{clip.id}' of {self.path} has no audio: this store holds features only")
        place, length = start, clip.samples
        if (parts := self._parts(clip, "audio")) is not None:
            length = sum(count for _, count in parts)
            place = place_in_parts(parts, start, samples, self._partly(clip, "samples"))
        with self._opened(record) as file:
            try:
                layout = file.pcm_layout()
            except ValueError as error:
                where = self._name(record)
                raise DataError(f"{where} is not a readable WAV file ({error}): make the store again") from None
            if layout[:4] != (self.sample_rate_hz, 1, 16, length):
                raise DataError(
                    f"{self._name(record)} is {layout.rate_hz} Hz, {layout.channels} channels, {layout.bits} bit, "
                    f"{layout.frames} samples; the manifest says {self.sample_rate_hz} Hz, 1 channel, 16 bit, "
                    f"{length} samples"
                )
            pcm = file.numbers(_PCM, layout.offset + _PCM.itemsize * place, samples)
        if len(pcm) != samples:
            raise DataError(f"{self._name(record)} ends early: make the store again")
        return pcm

    def _opened(self, record: Mapping[str, Any]) -> MappedFile | OpenFile:
        """One of a clip's files, to be read from once."""
        if "shard" in record:
            return self._in_shard(record)
        path = f"{self._root}/{record['path']}"
        held = self._held.get_if_room(path)
        return OpenFile(path) if held is None else MappedFile(held)

    def _mapped(self, record: Mapping[str, Any]) -> MappedFile:
        """One of a clip's files, to be held."""
        if "shard" in record:
            return self._in_shard(record)
        return MappedFile(self._maps.get(f"{self._root}/{record['path']}"))

    def _in_shard(self, record: Mapping[str, Any]) -> MappedFile:
        start = record["offset"]
        return MappedFile(self._shard_maps.get(self._shards[record["shard"]])[start : start + record["bytes"]])

    def _name(self, record: Mapping[str, Any]) -> str:
        if "shard" in record:
            return f"{record['path']} in {self._shards[record['shard']]}"
        return str(self.path / record["path"])

    def _records(self, clip: Clip) -> dict[str, dict[str, Any]]:
        records: dict[str, dict[str, Any]] = self.manifest["clips"][clip.index]["files"]
        return records

    def kept_samples(self, clip: Clip) -> list[list[int]]:
        """Which of a clip's samples are there, as runs ``[first, count]``: all, but for an exemplar's crops."""
        return self._parts(clip, "audio") or [[0, clip.samples]]

    def _parts(self, clip: Clip, kind: str) -> list[list[int]] | None:
        parts: list[list[int]] | None = self.manifest["clips"][clip.index].get("parts", {}).get(kind)
        return parts

    def _partly(self, clip: Clip, what: str) -> str:
        return f"of clip '{clip.id}' of {self.path} only the crops of its exemplars are kept, and no other {what}"

    def _whole(self, clip: Clip, kind: str, array: Any) -> Any:
        """The array with its rows in their places, where only parts of it are kept."""
        if (parts := self._parts(clip, kind)) is None:
            return array
        return ArrayInParts(array, parts, self.manifest["clips"][clip.index]["rows"][kind], self._partly(clip, kind))

    def timeline(self, clip: Clip) -> VisualTimeline:
        """All that the store has to see of a clip, as memory maps."""
        arrays = {}
        for kind, record in self._records(clip).items():
            if kind != "audio":
                try:
                    arrays[kind] = self._whole(clip, kind, self._mapped(record).array())
                    self._check_array(kind, arrays[kind])
                except ValueError as error:
                    raise self._unreadable(record, error) from None
        return self._timeline(clip, arrays)

    def _timeline(self, clip: Clip, arrays: Mapping[str, Any]) -> VisualTimeline:
        return VisualTimeline(
            object=arrays.get("object"),
            motion=arrays.get("motion"),
            object_rate_hz=self.object_rate_hz,
            motion_rate_hz=self.motion_rate_hz,
            features={k.removeprefix("features/"): a for k, a in arrays.items() if k.startswith("features/")},
            where=f"clip '{clip.id}' of {self.path}",
        )

    def _check_array(self, kind: str, array: np.ndarray | ArrayOnDisk) -> None:
        """Raise ValueError where frames or features are not of the type and shape that the manifest says."""
        shape: Sequence[int | None]
        if kind in ("object", "motion"):
            fits, wanted = array.dtype == np.uint8, "uint8"
            shape = [None, *(self.manifest.get(f"{kind}_shape") or (3 if kind == "object" else None, None, None))]
        else:
            feature = self.features.get(kind.removeprefix("features/"), {})
            dim, steps = feature.get("dim"), feature.get("steps")
            fits, wanted = array.dtype.kind == "f", "float"
            shape = [dim, steps] if feature.get("role") == "motion" else [None, dim]
        if fits and len(array.shape) == len(shape) and 0 not in array.shape:
            fits = all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
        else:
            fits = False
        if not fits:
            told = ", ".join("n" if want is None else str(want) for want in shape)
            raise ValueError(f"it is {array.dtype} {list(array.shape)} in place of {wanted} [{told}]")

    def _unreadable(self, record: Mapping[str, Any], error: ValueError) -> DataError:
        return DataError(f"{self._name(record)} is not a readable array ({error}): make the store again")

    def read_visual(
        self,
        clip: Clip,
        source: VisualSource,
        *,
        centre_s: float,
        duration_s: float,
        copy: bool = True,
        unseen: bool = False,
    ) -> np.ndarray:
        """What ``source`` asks for around ``centre_s``; shapes and ``copy`` as in :meth:`VisualTimeline.read`.

        ``unseen``: it will not be looked at, so that zeros do where the store has nothing.
        """
        kind = source.role if source.kind == "frames" else f"features/{source.name}"
        if source.kind == "features" and source.name in self.features:
            role = self.features[source.name]["role"]
            if role != source.role:
                raise DataError(
                    f"features '{source.name}' of {self.path} describe the {role}, not the {source.role}: use them in "
                    f"the {role}_encoder"
                )
        record = self._records(clip).get(kind)
        if record is None:
            return self._blank(clip, source, unseen).read(
                source, centre_s, duration_s
            )  # may raise, naming what is there
        with self._opened(record) as file:
            copy = copy and isinstance(file, MappedFile)  # what is read by position is nobody else's
            try:
                array = self._whole(clip, kind, file.array())
                self._check_array(kind, array)
                return self._timeline(clip, {kind: array}).read(source, centre_s, duration_s, copy=copy)
            except ValueError as error:
                raise self._unreadable(record, error) from None

    def _blank(self, clip: Clip, source: VisualSource, unseen: bool) -> VisualTimeline:
        """Zeros of the others' shape for the pictures of a clip that has none; of one that has some, these."""
        if self.has_pictures(clip) and (self.shows_anything or not unseen):
            return self.timeline(clip)
        seconds = math.ceil(clip.samples / self.sample_rate_hz) + 1
        shape: list[int] | None
        if source.kind == "features":
            feature = self.features.get(source.name or "")
            if feature is None:
                return self.timeline(clip)
            dim, steps = feature["dim"], feature["steps"]
            shape = [dim, steps] if source.role == "motion" else [math.ceil(seconds * self.object_rate_hz), dim]
            return self._timeline(clip, {f"features/{source.name}": np.broadcast_to(np.float32(0), shape)})
        shape = self.manifest.get(f"{source.role}_shape") or ([3, 16, 16] if source.role == "object" else [1, 16, 16])
        rate_hz = self.object_rate_hz if source.role == "object" else self.motion_rate_hz
        rows = math.ceil(seconds * rate_hz)
        return self._timeline(clip, {source.role: np.broadcast_to(np.uint8(0), (rows, *shape))})

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["manifest"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self.clips)} clips, {len(self.classes)} classes)"


def timelines_of(store: Store, clip_ids: Sequence[str]) -> dict[str, VisualTimeline]:
    """The timelines of clips of a store, by the names of :func:`source_names`."""
    clips = store.clips_by_id(clip_ids)
    return {name: store.timeline(clip) for name, clip in zip(source_names(clips), clips, strict=True)}


def source_names(clips: Sequence[Clip]) -> list[str]:
    """A name for each of several clips: its class, or ``violin-1``, ``violin-2``, ... where a class is there twice.

    Raises :class:`DataError` for a clip that is there twice.
    """
    counts = Counter(clip.class_name for clip in clips)
    numbers: Counter[str] = Counter()
    names = []
    for place, clip in enumerate(clips):
        if clip in clips[:place]:
            raise DataError(f"clip '{clip.id}' is given twice: name each clip once")
        numbers[clip.class_name] += 1
        names.append(
            f"{clip.class_name}-{numbers[clip.class_name]}" if counts[clip.class_name] > 1 else clip.class_name
        )
    return names


def _begun_by(path: Path) -> str:
    """The command that made an unfinished store."""
    try:
        command = read_json(path / _JOURNAL / "header.json")["origin"]["generator"]
    except (ConfigError, OSError, KeyError, TypeError):
        command = "avsep data synth"
    return f"{command} ... {path}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_manifest(path: Path, manifest: Any) -> None:
    where = path / "manifest.json"
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise DataError(f"{where} is not the manifest of a store: give the folder of one")
    if manifest.get("version") != STORE_VERSION:
        raise DataError(
            f"{where}: store version {manifest.get('version')!r} is not {STORE_VERSION}, the one known here: update "
            f"avsep or make the store again"
        )
    rate_hz = manifest.get("sample_rate_hz")
    if not _is_size(rate_hz, _MOST_SAMPLE_RATE_HZ):
        raise DataError(
            f"{where}: sample_rate_hz = {_short(rate_hz)} is not a rate, a whole number up to {_MOST_SAMPLE_RATE_HZ}: "
            "make the store again"
        )
    for key in ("object_rate_hz", "motion_rate_hz"):
        if not is_rate(manifest.get(key)):
            raise DataError(
                f"{where}: {key} = {_short(manifest.get(key))} is not a rate, a number above 0 and up to "
                f"{MOST_RATE_HZ:g}: make the store again"
            )
    for key in ("object_shape", "motion_shape"):
        shape = manifest.get(key)
        whole = isinstance(shape, list) and len(shape) == 3 and all(_is_size(side, _MOST_SIDE) for side in shape)
        if shape is not None and not whole:
            raise DataError(f"{where}: {key} = {_short(shape)} is not [channels, height, width]: make the store again")
    _check_notes(where, manifest)
    try:
        classes, clips, features = manifest["classes"], manifest["clips"], manifest["features"]
        if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
            raise DataError(f"{where}: classes = {_short(classes)} is not a list of names: make the store again")
        ids = [entry["id"] for entry in clips]
        for clip_id in ids:
            if not isinstance(clip_id, str) or not is_clip_id(clip_id):
                raise DataError(f"{where}: {_short(clip_id)} cannot be a clip's id: it must serve as a file name")
        for name, count in [*Counter(classes).items(), *Counter(ids).items()]:
            if count > 1:
                raise DataError(f"{where}: '{name}' comes {count} times; ids and class names must be unique")
        for entry in clips:
            if entry["class"] not in classes:
                raise DataError(
                    f"{where}: clip '{entry['id']}' is of class '{entry['class']}', which is not in the list"
                )
            if entry["split"] not in SPLITS:
                raise DataError(
                    f"{where}: clip '{entry['id']}' is in split '{entry['split']}'; known: {', '.join(SPLITS)}"
                )
            if not _is_count(entry["samples"]):
                raise DataError(f"{where}: clip '{entry['id']}' has {_short(entry['samples'])} samples")
            check_parts(f"{where}: clip '{entry['id']}'", entry)
            for kind, record in entry["files"].items():
                relative = Path(record["path"])
                if UNFIT.search(record["path"]):
                    raise DataError(f"{where}: clip '{entry['id']}' names a file {_short(record['path'])}")
                if relative.is_absolute() or ".." in relative.parts:
                    raise DataError(f"{where}: clip '{entry['id']}' names a file outside the store: {record['path']}")
                if not _is_count(record["bytes"]) or not isinstance(record["sha256"], str):
                    raise DataError(f"{where}: clip '{entry['id']}': damaged record of its {kind}")
        for name, feature in features.items():
            steps = feature.get("steps")
            sizes = _is_size(feature["dim"], _MOST_SIDE) and (steps is None or _is_size(steps, _MOST_SIDE))
            if feature["role"] not in ("object", "motion") or not sizes:
                raise DataError(f"{where}: damaged record of features '{name}': make the store again")
            for entry in clips:
                if f"features/{name}" not in entry["files"] and entry["files"].keys() != {"audio"}:
                    raise DataError(f"{where}: clip '{entry['id']}' lacks the features '{name}'")
        check_shards(where, manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # of what is no list, record or path
        raise DataError(
            f"{where} is damaged: {type(error).__name__} {one_line(error, 100)}; make the store again"
        ) from None


def _check_notes(where: Path, manifest: Mapping[str, Any]) -> None:
    """Raise where what is told of a store (its origin, licence and skipped videos) is not what is written there."""
    origin = manifest.get("origin", {})
    whole = isinstance(origin, dict) and _texts(origin, "generator", "dataset", needed=False)
    whole = whole and isinstance(origin.get("splits", {}), dict)
    for key in ("banks", "test_banks"):
        banks = origin.get(key, []) if whole else None
        whole = isinstance(banks, list) and all(_texts(bank, "name", "sha256") for bank in banks)
    if not whole:
        raise DataError(f"{where}: origin = {_short(origin)} does not say how a store was made: make the store again")
    if not _texts(manifest, "licence", needed=False):
        raise DataError(f"{where}: licence = {_short(manifest['licence'])} is not a text: make the store again")
    skipped = manifest.get("skipped", [])
    for entry in skipped if isinstance(skipped, list) else [skipped]:
        if not _texts(entry, "id", "class", "split", "status"):
            raise DataError(f"{where}: {_short(entry)} is not the record of a skipped video: make the store again")


def _texts(record: Any, *keys: str, needed: bool = True) -> bool:
    """Whether it is a record that has texts under these keys, or (not ``needed``) nothing."""
    return isinstance(record, dict) and all(isinstance(record.get(key, None if needed else ""), str) for key in keys)


def _is_size(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_count(value: object) -> bool:
    """Of samples or bytes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_BYTES


def _record(root: Path, relative: str) -> dict[str, Any]:
    file = root / relative
    return {"path": relative, "sha256": sha256_file(file), "bytes": file.stat().st_size}


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)


class StoreWriter:
    """Write a store clip by clip. A killed run is continued by the same call and ends byte for byte the same.

    Finished clips are noted in a journal folder, which goes when the manifest is written. ``origin`` is plain data that
    says how the store is made; a folder begun or finished with another origin is refused. ``write_clip`` may be called
    in several processes for different clips (each with its own writer made by :meth:`worker`); ``finish`` by one.

    Use as a context manager: it holds the folder's lock.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        classes: Sequence[str],
        sample_rate_hz: int,
        object_rate_hz: float = 1.0,
        motion_rate_hz: float = 8.0,
        origin: Mapping[str, Any],
        licence: str = "",
    ) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = {
            "format": _FORMAT,
            "version": STORE_VERSION,
            "sample_rate_hz": sample_rate_hz,
            "object_rate_hz": object_rate_hz,
            "motion_rate_hz": motion_rate_hz,
            "classes": list(classes),
            "origin": json.loads(json.dumps(dict(origin))),
            "licence": licence,
        }
        self._folder_lock: FolderLock | None = None

    @classmethod
    def worker(cls, path: str | Path, sample_rate_hz: int) -> StoreWriter:
        """A writer for ``write_clip`` in another process, while the first one holds the lock."""
        return cls(path, classes=(), sample_rate_hz=sample_rate_hz, origin={})

    def __enter__(self) -> StoreWriter:
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path} is a file: choose another folder")
        strange = entries(self.path)
        begun = (self.path / _JOURNAL).is_dir() or (self.path / "manifest.json").is_file()
        if strange and not begun:
            raise DataError(
                f"{self.path} is not empty and not a store (it holds '{strange[0]}'): choose another folder"
            )
        self._folder_lock = FolderLock(self.path).__enter__()
        try:
            self._begin()
        except BaseException:
            self._folder_lock.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder_lock is not None:
            self._folder_lock.__exit__(*error)
            self._folder_lock = None

    @property
    def finished(self) -> bool:
        return (self.path / "manifest.json").is_file()

    def _begin(self) -> None:
        header_file = self.path / _JOURNAL / "header.json"
        found = None
        if self.finished:
            manifest = read_json(self.path / "manifest.json")
            _check_manifest(self.path, manifest)
            found = {k: v for k, v in manifest.items() if k in self.header}
        elif header_file.is_file():
            found = read_json(header_file)
        if found is not None and not isinstance(found, dict):
            raise DataError(f"{header_file} is damaged: make the store anew with --force")
        if found is not None and found != self.header:
            differs = sorted(k for k in self.header if found.get(k) != self.header[k])
            raise OtherStoreError(
                f"{self.path} holds a store made with other settings ({_difference(found, self.header, differs)})",
                "choose another folder, or make it anew with --force",
            )
        if self.finished:
            shutil.rmtree(self.path / _JOURNAL, ignore_errors=True)
            return
        write_json(header_file, self.header)
        for folder in ("audio", "object", "motion", "features", _JOURNAL):
            for leftover in (self.path / folder).rglob(".*"):  # temporary files of a killed run
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)

    def is_done(self, clip_id: str) -> bool:
        """Whether the journal has the clip and its files are whole."""
        try:
            entry = self.noted(clip_id)
            return entry is not None and all(_record(self.path, r["path"]) == r for r in entry["files"].values())
        except (OSError, KeyError, TypeError, AttributeError):
            return False

    def noted(self, clip_id: str) -> dict[str, Any] | None:
        """What the journal says of a clip, or None."""
        try:
            entry = read_json(self.path / _JOURNAL / f"{clip_id}.json")
            return entry if isinstance(entry, dict) else None
        except (ConfigError, OSError):
            return None

    def noted_at(self, clip_id: str) -> float:
        """When the journal was told of a clip: seconds, as of the file's change."""
        return (self.path / _JOURNAL / f"{clip_id}.json").stat().st_mtime

    def note_skipped(self, clip_id: str, entry: Mapping[str, Any]) -> None:
        """Note in the journal that a clip could not be made; ``entry`` is plain data without ``files``."""
        _check_id(clip_id)
        write_json(self.path / _JOURNAL / f"{clip_id}.json", {"id": clip_id, **entry})

    def reopen(self) -> None:
        """Take a finished store back to where clips are added: its manifest becomes a journal."""
        manifest = read_json(self.path / "manifest.json")
        if manifest.get("shards"):
            raise DataError(
                f"{self.path} is in shards, which take no more clips: add them to the store they are made of"
            )
        noted_ns = (self.path / "manifest.json").stat().st_mtime_ns
        for entry in [*manifest["clips"], *manifest.get("skipped", ())]:
            write_json(self.path / _JOURNAL / f"{entry['id']}.json", entry)
            os.utime(self.path / _JOURNAL / f"{entry['id']}.json", ns=(noted_ns, noted_ns))
        write_json(self.path / _JOURNAL / "header.json", self.header)
        (self.path / "manifest.json").unlink()

    def forget_others(self, ids: Iterable[str]) -> None:
        """Delete what there is of clips that are not among ``ids``."""
        kept = set(ids)
        for folder in ("audio", "object", "motion", "features", _JOURNAL):
            for file in (self.path / folder).rglob("*"):
                if file.is_file() and file.stem not in kept and file != self.path / _JOURNAL / "header.json":
                    file.unlink()

    def write_clip(
        self,
        clip_id: str,
        class_name: str,
        split: str,
        audio: np.ndarray,
        *,
        object_frames: np.ndarray | None = None,
        motion_frames: np.ndarray | None = None,
        features: Mapping[str, np.ndarray] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one clip's files and note it in the journal.

        ``audio`` [L] int16, or float in ±1 (clipped); ``object_frames`` uint8 [n, 3, H, W]; ``motion_frames`` uint8
        [m, c, h, w]; ``features`` by name, as :func:`add_features` takes them; ``about``, plain data, is kept with the
        clip in the manifest. Raises :class:`DataError` for an unknown split, an id that cannot be a file name, or
        non-finite samples or features.
        """
        _check_id(clip_id)
        if split not in SPLITS:
            raise DataError(f"clip '{clip_id}': no split '{split}'; known: {', '.join(SPLITS)}")
        if audio.ndim != 1:
            raise DataError(f"clip '{clip_id}': audio of shape {list(audio.shape)} is not mono")
        if audio.dtype != np.int16:
            if not np.isfinite(audio).all():
                raise DataError(f"clip '{clip_id}': NaN or infinite samples")
            audio = np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)
        files = {}
        with atomic_path(self.path / f"audio/{clip_id}.wav") as temporary, wave.open(str(temporary), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.header["sample_rate_hz"])
            file.writeframes(audio.astype("<i2").tobytes())
        files["audio"] = _record(self.path, f"audio/{clip_id}.wav")
        for kind, frames in (("object", object_frames), ("motion", motion_frames)):
            if frames is None:
                continue
            if frames.dtype != np.uint8 or frames.ndim != 4 or not frames.size:
                raise DataError(
                    f"clip '{clip_id}': {kind} frames are {frames.dtype} {list(frames.shape)}, not uint8 [n, c, h, w]"
                )
            _save_array(self.path / f"{kind}/{clip_id}.npy", frames)
            files[kind] = _record(self.path, f"{kind}/{clip_id}.npy")
        for name, array in (features or {}).items():
            _check_features(name, clip_id, array)
            _save_array(self.path / f"features/{name}/{clip_id}.npy", array)
            files[f"features/{name}"] = _record(self.path, f"features/{name}/{clip_id}.npy")
        entry = {"id": clip_id, "class": class_name, "split": split, "samples": len(audio), **(about or {})}
        write_json(self.path / _JOURNAL / f"{clip_id}.json", {**entry, "files": files})

    def finish(self, order: Sequence[str], *, roles: Mapping[str, str] | None = None) -> Store:
        """Write the manifest with the clips in this order; everything else of the run is then removed.

        ``roles`` of the features written with the clips, by name; with it the manifest lists what was skipped, too.
        """
        clips: list[dict[str, Any]] = []
        skipped: list[dict[str, Any]] = []
        for clip_id in order:
            entry = self.noted(clip_id)
            if entry is None:
                raise DataError(f"{self.path}: clip '{clip_id}' was not written")
            (clips if "files" in entry else skipped).append(entry)
        shapes = {}
        for kind in ("object", "motion"):
            files = [c["files"][kind]["path"] for c in clips if kind in c["files"]]
            found = {array_header(str(self.path / f)).shape[1:] for f in files}
            if len(found) > 1:
                raise DataError(f"{self.path}: the {kind} frames have different shapes: {sorted(found)}")
            shapes[kind] = list(found.pop()) if found else None
        manifest = {
            **self.header,
            "object_shape": shapes["object"],
            "motion_shape": shapes["motion"],
            "features": {name: self._feature_record(name, role, clips) for name, role in (roles or {}).items()},
            "clips": clips,
            **({} if roles is None else {"skipped": skipped}),
        }
        _check_manifest(self.path, manifest)
        write_json(self.path / "manifest.json", manifest)
        shutil.rmtree(self.path / _JOURNAL, ignore_errors=True)
        return Store.open(self.path)

    def _feature_record(self, name: str, role: str, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the manifest says of features."""
        kind = f"features/{name}"
        files = [c["files"][kind]["path"] for c in clips if kind in c["files"]]
        widths = {_width(role, array_header(str(self.path / file)).shape) for file in files}
        if len(widths) != 1:
            raise DataError(f"{self.path}: features '{name}' have different shapes: {sorted(widths, key=str)}")
        dim, steps = widths.pop()
        return {"role": role, "dim": dim, "steps": steps}


def is_clip_id(clip_id: str) -> bool:
    """Whether it can be a clip's id: it serves as a file name, with a suffix and while it is written a prefix."""
    if not clip_id or clip_id.startswith(".") or clip_id == "header" or any(c in clip_id for c in "/\\:"):
        return False
    return not UNFIT.search(clip_id) and len(clip_id.encode()) <= 200


def _check_id(clip_id: str) -> None:
    if not is_clip_id(clip_id):
        raise DataError(f"'{clip_id}' cannot be a clip's id: it must serve as a file name")


def _check_features(name: str, clip_id: str, array: np.ndarray) -> None:
    if array.ndim != 2 or not array.size or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DataError(
            f"features '{name}' of clip '{clip_id}': {array.dtype} {list(array.shape)} is not a finite matrix"
        )


def _width(role: str, shape: Sequence[int]) -> tuple[int, int | None]:
    """Dimensions and steps of stored features of this shape."""
    return (shape[1], None) if role == "object" else (shape[0], shape[1])


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first differing values, looking one level into mappings."""
    parts = []
    for key in keys:
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            parts += [f"{k}: {_short(old.get(k))}, now {_short(new.get(k))}" for k in inner]
        else:
            parts.append(f"{key}: {_short(old)}, now {_short(new)}")
    return "; ".join(parts[:3])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def add_features(
    store: Store, name: str, role: str, features: Callable[[Clip], np.ndarray] | Iterable[tuple[str, np.ndarray]]
) -> Store:
    """Add stored features to every clip: object features [n, D] or motion features [D, T] a clip.

    ``features`` is a function of a clip, called for the clips that lack their file (so a killed run continues), or an
    iterable of (clip id, array). The manifest is rewritten last. Raises :class:`DataError` for differing widths,
    non-finite values, or a clip left out. Returns the store opened anew.
    """
    if role not in ("object", "motion"):
        raise DataError(f"features describe the object or the motion, not '{role}'")
    if not name or any(c in name for c in "/\\:.") or name in store.features:
        raise DataError(f"'{name}' cannot be the name of new features: it is taken, empty, or holds one of / \\ : .")
    with FolderLock(store.path):
        folder = store.path / "features" / name
        widths: set[tuple[int, int | None]] = set()

        def keep(clip_id: str, array: np.ndarray) -> None:
            array = np.asarray(array)
            _check_features(name, clip_id, array)
            widths.add(_width(role, array.shape))
            if len(widths) > 1:
                raise DataError(
                    f"features '{name}': clip '{clip_id}' differs in shape from those before: {sorted(widths, key=str)}"
                )

        if callable(features):
            for clip in filter(store.has_pictures, store.clips):
                file = folder / f"{clip.id}.npy"
                there = file.is_file()
                array = load_array(str(file)) if there else features(clip)
                keep(clip.id, array)
                if not there:
                    _save_array(file, array)
        else:
            known = {c.id for c in store.clips}
            for clip_id, array in features:
                if clip_id not in known:
                    raise DataError(f"features '{name}' name clip '{clip_id}', which {store.path} does not have")
                keep(clip_id, array)
                _save_array(folder / f"{clip_id}.npy", array)
        manifest = json.loads(json.dumps(store.manifest))
        for entry in manifest["clips"]:
            relative = f"features/{name}/{entry['id']}.npy"
            if not (store.path / relative).is_file():
                if store.shows_anything and entry["files"].keys() == {"audio"}:
                    continue  # a sound without pictures
                raise DataError(f"features '{name}': nothing was given for clip '{entry['id']}'")
            entry["files"][f"features/{name}"] = _record(store.path, relative)
        dim, steps = widths.pop()
        manifest["features"][name] = {"role": role, "dim": dim, "steps": steps}
        write_json(store.path / "manifest.json", manifest)
    return Store.open(store.path)


def remove_store(path: str | Path) -> None:
    """Delete a store or what there is of an unfinished one; any other folder is refused, and a missing one is fine."""
    path = Path(path)
    if not path.exists():
        return
    begun = path / _JOURNAL / "header.json"
    manifest = path / "manifest.json"
    file = manifest if manifest.is_file() else begun
    found = read_json(file) if file.is_file() else None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise DataError(f"{path} is not a store, so it is not deleted: choose another folder")
    with FolderLock(path):
        # only what a store consists of: anything else in the folder is not ours to delete
        manifest.unlink(missing_ok=True)
        (path / VIDEOS_FILE).unlink(missing_ok=True)
        for folder in ("audio", "object", "motion", "features", "shards", _JOURNAL):
            shutil.rmtree(path / folder, ignore_errors=True)

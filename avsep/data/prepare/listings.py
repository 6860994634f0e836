"""What a data set on disk consists of: its videos with class and split, and which file is which.

Each function reads one layout and returns a :class:`Listing`. Files that are listed and not there are part of it, so
that what is gone is reported and not forgotten.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from avsep.data.prepare.published import PICKLES, read_published
from avsep.data.store.files import SPLITS, UNFIT, is_clip_id
from avsep.data.store.official import MUSIC21_CLASSES
from avsep.errors import ConfigError, DataError, UnknownNameError, near_matches
from avsep.files import sha256_file

__all__ = [
    "DATASETS",
    "Listing",
    "Video",
    "is_video",
    "list_ave",
    "list_folder",
    "list_music21",
    "list_vggsound",
    "read_splits",
    "split_of",
]

SHARES = (80, 10, 10)  # per cent of train, val and test where a data set has no split
_SPLIT_NAMES = {**{s: s for s in SPLITS}, "training": "train", "valid": "val", "validation": "val", "testing": "test"}
_VIDEO = "mp4 m4v mkv webm mov avi flv mpg mpeg ts 3gp wmv ogv"
_SOUND = "wav flac mp3 m4a ogg oga opus aac wma aif aiff"
_MEDIA = {f".{suffix}" for suffix in f"{_VIDEO} {_SOUND}".split()}
_CLIP_S = 10.0  # VGGSound's clips


@dataclass(frozen=True)
class Video:
    """One video of a data set: ``file`` below the root, or "" where none was found under the names ``looked_for``.

    ``span`` is the part to take, in seconds; with ``only_longer`` it counts only in a file that is longer than the
    part by more than a second (a shorter one is taken to have been cut already).
    """

    id: str
    class_name: str
    split: str
    file: str
    looked_for: str = ""
    span: tuple[float, float] | None = None
    only_longer: bool = False


@dataclass(frozen=True)
class Listing:
    """A data set on disk: ``videos`` in a fixed order, ``classes`` in task order. ``origin`` is plain data that tells
    where the lists come from; ``notes`` are lines for the user."""

    dataset: str
    root: Path
    classes: tuple[str, ...]
    videos: tuple[Video, ...]
    origin: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def is_video(file: str) -> bool:
    """Whether a file's name is that of a video, and not of a sound."""
    return Path(file).suffix.lower().lstrip(".") in _VIDEO.split()


def split_of(video_id: str, seed: int = 0, shares: Sequence[float] = SHARES) -> str:
    """The split of a video by a hash of its id: another video more or less moves none."""
    digest = hashlib.sha256(f"{seed}/{video_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares)
    if place < shares[2]:
        return "test"
    return "val" if place < shares[2] + shares[1] else "train"


def _check_root(root: str | os.PathLike[str]) -> Path:
    folder = Path(root)
    if not folder.exists():
        raise DataError(f"there is no folder {folder}: give the one that holds the videos as --root")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file: give the folder that holds the videos as --root")
    return folder


def _check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    if len(shares) != 3 or min(shares) < 0 or not all(map(math.isfinite, shares)) or sum(shares) <= 0:
        raise ConfigError(
            f"shares {','.join(map(str, shares))}: give three numbers from 0 on, of train, val and test, "
            "such as 80,10,10"
        )
    return tuple(float(s) for s in shares)


def _by_hash(seed: int, shares: Sequence[float]) -> dict[str, Any]:
    return {"by": "hash of the id", "seed": seed, "shares": list(shares)}


def _media_below(root: Path) -> tuple[list[str], int]:
    """Media files below ``root``, relative and sorted, and how many other files there are; hidden ones are no files."""
    found: list[str] = []
    others = 0
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link into itself
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        named = [f for f in folders if Path(f).suffix.lower() in _MEDIA]  # a folder called x.mp4 is reported as one
        folders[:] = [f for f in folders if f not in named]
        for name in [*files, *named]:
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in _MEDIA:
                found.append(Path(os.path.relpath(os.path.join(folder, name), root)).as_posix())
            else:
                others += 1
    return sorted(found), others


class _Files:
    """Finds videos by their name without suffix, in whatever folder below the root."""

    def __init__(self, root: Path) -> None:
        files, _ = _media_below(root)
        self.count = len(files)
        self._by_name: dict[str, list[str]] = {}
        for file in files:
            stem = Path(file).stem
            names = {stem, *re.findall(r"\[([\w-]{11})\]$", stem)}  # as yt-dlp names what it fetches: Title [ID].mp4
            for name in names:
                self._by_name.setdefault(name, []).append(file)

    def find(self, names: Iterable[str], class_name: str) -> str:
        """The first that there is; of several of one name that in its class's folder, else the alphabet's first."""
        for name in names:
            if files := self._by_name.get(name):
                return min(files, key=lambda f: (class_name not in Path(f).parts[:-1], f))
        return ""


def _listing(
    dataset: str,
    root: Path,
    videos: Sequence[Video],
    order: Sequence[str],
    chosen: Sequence[str] | None,
    origin: Mapping[str, Any],
    notes: Sequence[str],
) -> Listing:
    """Puts the classes in order, or takes those chosen, and holds that ids are unique."""
    there = {v.class_name for v in videos}
    if chosen is None:
        names = [n for n in order if n in there] + sorted(there - set(order))
    else:
        names = list(chosen)
        for name in names:
            if name not in there:
                raise UnknownNameError(f"no class '{name}' in {root}: {near_matches(name, there)}")
            if names.count(name) > 1:
                raise ConfigError(f"class '{name}' comes twice: name it once")
    place = {name: number for number, name in enumerate(names)}
    kept = sorted((v for v in videos if v.class_name in place), key=lambda v: place[v.class_name])
    if not kept:
        raise DataError(f"{root} lists no videos of {dataset}: look whether it is the right folder")
    for name in names:
        if not name.strip() or UNFIT.search(name):
            raise DataError(f"{name!r} cannot be the name of a class: write it in printed characters")
    for video in kept:
        if not is_clip_id(video.id):
            raise DataError(
                f"{video.id[:60]!r} of class '{video.class_name}' is listed and cannot be a video's id, which serves "
                "as a file name: correct the list"
            )
    for video_id, count in Counter(v.id for v in kept).items():
        if count > 1:
            files = [v.file or v.looked_for for v in kept if v.id == video_id]
            raise DataError(f"two videos would have the id '{video_id}', {files[0]} and {files[1]}: rename one of them")
    if not any(v.file for v in kept):
        raise DataError(
            f"none of the {len(kept)} videos that are listed is below {root} (looked for {kept[0].looked_for}, ...): "
            "give the folder that holds them as --root"
        )
    return Listing(dataset, root, tuple(names), tuple(kept), dict(origin), tuple(notes))


# --- a folder of one's own ----------------------------------------------------------------------------------------


# Windows has devices of these names, with any suffix.
_RESERVED = re.compile(r"(?i)con|prn|aux|nul|com[0-9]|lpt[0-9]")


def _usable_id(text: str) -> str:
    """A text as an id, which serves as a file name."""
    text = unicodedata.normalize("NFC", text)  # an umlaut is one character, however a system wrote it
    name = re.sub(rf"[/\\:\s]+|[<>\"|?*]|{UNFIT.pattern}", "_", text).strip(".") or "video"
    if _RESERVED.fullmatch(name.partition(".")[0]):
        name = f"_{name}"
    if len(name.encode()) > 180:
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


def list_folder(
    root: str | os.PathLike[str],
    *,
    table: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
) -> Listing:
    """Videos in ROOT/CLASS/ or ROOT/SPLIT/CLASS/ (SPLIT train, val or test), or as a table says.

    The table is CSV with the columns path (below ROOT) and class, and if wanted split, start and end (seconds) and id.
    Where there is no split a hash of the id decides (:func:`split_of`).

    Raises:
        DataError: ROOT or the table is missing or empty, a line is wrong, an id comes twice, a path lies outside.
        UnknownNameError: one of ``classes`` is not there.
    """
    folder = _check_root(root)
    shares = _check_shares(shares)
    if table is not None:
        videos, hashed = _read_table(folder, Path(table), seed, shares)
        origin: dict[str, Any] = {"layout": "table", "table": {"name": Path(table).name, "sha256": sha256_file(table)}}
        notes: list[str] = []
    else:
        videos, hashed, notes = _read_tree(folder, seed, shares)
        origin = {"layout": "ROOT/CLASS" if hashed else "ROOT/SPLIT/CLASS"}
    origin["splits"] = _by_hash(seed, shares) if hashed else {"by": "as given"}
    return _listing("folder", folder, videos, (), classes, origin, notes)


def _read_tree(root: Path, seed: int, shares: Sequence[float]) -> tuple[list[Video], bool, list[str]]:
    files, others = _media_below(root)
    if not files:
        raise DataError(f"{root} holds no videos: give the folder that holds them, one folder a class, as --root")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    named = [f for f in folders if f.lower() in _SPLIT_NAMES]
    if named and len(named) < len(folders):
        other = next(f for f in folders if f not in named)
        raise DataError(
            f"{root} holds the folder '{named[0]}' of a split and '{other}', which is none: let it hold a folder a "
            "class, or a folder a split (train, val, test) with a folder a class in each"
        )
    depth = 2 if named else 1
    videos = []
    for file in files:
        parts = Path(file).parts
        if re.search("[\ud800-\udfff]", file):
            shown = os.fsencode(file).decode(errors="replace")
            raise DataError(f"the name of {root / shown} is not written in UTF-8: rename it")
        if len(parts) <= depth:
            raise DataError(
                f"{root / file} lies in no class's folder: put it into {root / '/'.join((*parts[:-1], 'CLASS'))}, or "
                "give a --table"
            )
        class_name = unicodedata.normalize("NFC", parts[depth - 1])
        rest = "-".join((*parts[depth:-1], Path(file).stem))
        split = _SPLIT_NAMES[parts[0].lower()] if named else ""
        video_id = _usable_id("-".join(p for p in (class_name, split, rest) if p))
        videos.append(Video(video_id, class_name, split or split_of(video_id, seed, shares), file, file))
    notes = [f"{others} files of other kinds are passed over"] if others else []
    there = {v.class_name for v in videos}
    if not named:
        notes += [f"the folder '{f}' holds no videos: it is no class" for f in folders if f not in there]
    return videos, not named, notes


def _rows(table: Path, columns: Sequence[str]) -> Iterable[tuple[int, dict[str, str]]]:
    """Lines of a CSV file by their number."""
    if not table.is_file():
        raise DataError(f"no such file: {table}")
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [c for c in columns if c not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{table} has no column '{missing[0]}' (it has {', '.join(reader.fieldnames or ()) or 'none'}): "
                    f"begin it with the line {','.join(columns)}"
                )
            for row in reader:
                yield reader.line_num, {k: (v or "").strip() for k, v in row.items() if isinstance(k, str)}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is not a CSV table ({error}): write it as UTF-8 text with commas") from None


def _read_table(root: Path, table: Path, seed: int, shares: Sequence[float]) -> tuple[list[Video], bool]:
    videos: list[Video] = []
    hashed = False
    for line, row in _rows(table, ("path", "class")):
        where = f"{table}, line {line}"
        if not row["path"] or not row["class"]:
            raise DataError(f"{where}: path or class is empty")
        file = Path(os.path.normpath(row["path"]))
        if file.is_absolute():
            file = Path(os.path.relpath(file, os.path.abspath(root)))
        if ".." in file.parts:
            raise DataError(f"{where}: {row['path']} lies outside {root}: give paths below --root")
        span = _span(where, row.get("start", ""), row.get("end", ""))
        parts = file.with_suffix("").parts
        video_id = row.get("id") or "-".join(parts if parts[0] == row["class"] else (row["class"], *parts))
        if span is not None and not row.get("id"):
            video_id += f"-{span[0]:g}"
        video_id = _usable_id(video_id)
        split = row.get("split", "")
        if split and split.lower() not in _SPLIT_NAMES:
            raise DataError(f"{where}: no split '{split}': it is train, val or test")
        hashed = hashed or not split
        split = _SPLIT_NAMES[split.lower()] if split else split_of(video_id, seed, shares)
        found = file.as_posix() if os.path.lexists(root / file) else ""
        class_name = unicodedata.normalize("NFC", row["class"])
        videos.append(Video(video_id, class_name, split, found, file.as_posix(), span))
    if not videos:
        raise DataError(f"{table} lists no videos: write a line a video below path,class,split")
    return videos, hashed


_MOST_S = 1e7  # of a video: four months


def _span(where: str, start: str, end: str) -> tuple[float, float] | None:
    if not start and not end:
        return None
    try:
        span = float(start or 0.0), float(end or "inf")
    except ValueError:
        raise DataError(f"{where}: start '{start}' and end '{end}' are not both seconds") from None
    if not 0 <= span[0] < span[1]:
        raise DataError(f"{where}: start {start or 0} and end {end} are not a part of a video: the end comes after")
    if span[0] > _MOST_S or (end and not span[1] <= _MOST_S):
        raise DataError(f"{where}: start {start or 0} and end {end} are more seconds than a video has")
    return span


# --- published data sets --------------------------------------------------------------------------------------------


def read_splits(path: str | os.PathLike[str]) -> dict[str, dict[str, list[str]]]:
    """Published lists of ids by split and class.

    ``path`` is ContAV-Sep's folder (``{train,val,test}_category_vids_dict.npy``, classes with their ids), AV-CIL's
    (``all_classId_vid_dict.npy`` beside ``category_encode_dict.npy``), one such file as .npy, .pkl or .json that holds
    the splits, or CSV with the columns id, class and split. Pickles are read without running anything of them.

    Raises:
        DataError: nothing of these is there, or an id is in two splits.
    """
    place = Path(path)
    if not place.exists():
        raise DataError(f"there are no lists {place}: give the folder or file of the published splits")
    if place.is_dir():
        data = _split_folder(place)
    elif place.suffix.lower() == ".csv":
        data = {}
        for line, row in _rows(place, ("id", "class", "split")):
            if row["split"].lower() not in _SPLIT_NAMES:
                raise DataError(f"{place}, line {line}: no split '{row['split']}': it is train, val or test")
            data.setdefault(row["split"], {}).setdefault(row["class"], []).append(row["id"])
    else:
        data = read_published(place)
    names = _class_names(place if place.is_dir() else place.parent)
    result: dict[str, dict[str, list[str]]] = {}
    where: dict[tuple[str, str], str] = {}
    if not isinstance(data, dict) or not data:
        raise DataError(f"{place} holds no splits: it must be train, val and test, each with ids by class")
    for key, classes in data.items():
        split = _SPLIT_NAMES.get(str(key).lower())
        if split is None or not isinstance(classes, dict):
            raise DataError(f"{place}: '{key}' is not a split with ids by class: it must be train, val and test")
        for label, ids in classes.items():
            name = names.get(label) if isinstance(label, int) else str(label)
            if name is None:
                raise DataError(
                    f"{place}: class {label} is a number, and no category_encode_dict beside it tells its name"
                )
            if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
                raise DataError(f"{place}: {split} videos of '{name}' are not a list of ids")
            for video_id in ids:
                other = where.setdefault((name, video_id), split)
                if other != split:
                    raise DataError(f"{place}: video {video_id} of '{name}' is in {other} and in {split}")
            # "valid" and "val", or two names of a number, may say a class of one split in two parts
            listed = result.setdefault(split, {}).setdefault(name, [])
            result[split][name] = list(dict.fromkeys([*listed, *ids]))
    return result


def _split_folder(folder: Path) -> dict[str, Any]:
    whole = [p for p in sorted(folder.iterdir()) if p.stem == "all_classId_vid_dict" and _is_list(p)]
    if whole:
        splits: dict[str, Any] = read_published(whole[0])
        return splits
    data = {}
    for split in SPLITS:
        files = [
            p for p in sorted(folder.iterdir()) if p.stem in (f"{split}_category_vids_dict", split) and _is_list(p)
        ]
        if files:
            data[split] = read_published(files[0])
    if not data:
        raise DataError(
            f"{folder} holds no lists: give the folder of train_category_vids_dict.npy, val_... and test_..., or of "
            "all_classId_vid_dict.npy"
        )
    return data


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in (*PICKLES, ".json")


def _class_names(folder: Path) -> dict[int, str]:
    for path in sorted(folder.iterdir()):
        if path.stem == "category_encode_dict" and _is_list(path):
            data = read_published(path)
            if isinstance(data, dict):
                return {number: str(name) for name, number in data.items() if isinstance(number, int)}
    return {}


def _splits_origin(splits: str | os.PathLike[str] | None) -> dict[str, Any]:
    assert splits is not None
    place = Path(splits)
    files = [place] if place.is_file() else [p for p in sorted(place.iterdir()) if _is_list(p)]
    return {"by": "published lists", "files": {p.name: sha256_file(p) for p in files}}


def _annotations(root: Path, given: str | os.PathLike[str] | None, names: Sequence[str], from_where: str) -> Path:
    """The file that lists a data set."""
    if given is not None:
        if not Path(given).is_file():
            raise DataError(f"no such file: {given} ({from_where})")
        return Path(given)
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(f"{root} has no {names[0]}: get it from {from_where}, or give its path as --annotations")


def _slug(label: str) -> str:
    """A label as a class name: small letters, one word."""
    return re.sub(r"\W+", "_", label.lower()).strip("_")


def _alone(videos: Sequence[Video]) -> tuple[list[Video], list[str]]:
    """Videos listed twice in a class counted once; ids that several classes share get the class's name behind them."""
    once = list({(v.class_name, v.id): v for v in reversed(videos)}.values())[::-1]
    notes = [f"{len(videos) - len(once)} videos are listed twice and count once"] if len(once) < len(videos) else []
    shared = {i for i, count in Counter(v.id for v in once).items() if count > 1}
    return [replace(v, id=f"{v.id}-{v.class_name}") if v.id in shared else v for v in once], notes


def list_music21(
    root: str | os.PathLike[str],
    *,
    annotations: str | os.PathLike[str] | None = None,
    splits: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
) -> Listing:
    """MUSIC-21's solos: videos ID.mp4 (or Title [ID].mp4) anywhere below ROOT.

    With ``splits`` (:func:`read_splits`) they are the paper's, 20 classes without congas; without, those of
    MUSIC21_solo_videos.json, split by a hash of the id, congas left out unless named in ``classes``.
    """
    folder = _check_root(root)
    shares = _check_shares(shares)
    entries: list[tuple[str, str, str]] = []  # class, split, id
    if splits is not None:
        for split, by_class in read_splits(splits).items():
            entries += [(name, split, i) for name, ids in by_class.items() for i in ids]
        origin: dict[str, Any] = {"splits": _splits_origin(splits)}
    else:
        source = "github.com/roudimit/MUSIC_dataset"
        file = _annotations(folder, annotations, ("MUSIC21_solo_videos.json", "MUSIC_solo_videos.json"), source)
        data = read_published(file) if file.suffix.lower() == ".json" else None
        lists = data.get("videos") if isinstance(data, dict) else None
        if not isinstance(lists, dict) or not all(isinstance(ids, list) for ids in lists.values()):
            raise DataError(f'{file} is not MUSIC\'s list: it must be JSON, {{"videos": {{CLASS: [IDS]}}}}')
        for label, ids in lists.items():
            name = _slug(str(label))
            if name == "congas" and name not in (classes or ()):
                continue
            entries += [(name, split_of(str(i), seed, shares), str(i)) for i in ids]
        origin = {"annotations": {file.name: sha256_file(file)}, "splits": _by_hash(seed, shares)}
    files = _Files(folder)
    rank = {split: n for n, split in enumerate(SPLITS)}
    videos = [
        Video(i, name, split, files.find([i], name), f"{i}.mp4")
        for name, split, i in sorted(entries, key=lambda e: rank[e[1]])
    ]
    videos, notes = _alone(videos)
    return _listing("music21", folder, videos, MUSIC21_CLASSES, classes, origin, notes)


def list_ave(
    root: str | os.PathLike[str],
    *,
    annotations: str | os.PathLike[str] | None = None,
    splits: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    events: bool = False,
) -> Listing:
    """AVE as published: Annotations.txt with trainSet.txt, valSet.txt and testSet.txt beside it, videos ID.mp4 below.

    ``events`` takes of each video the annotated seconds alone. ``splits`` (:func:`read_splits`) replaces the three
    lists. Class names are the categories in small letters, one word.
    """
    folder = _check_root(root)
    source = "the AVE_Dataset archive of Tian et al., ECCV 2018"
    file = _annotations(folder, annotations, ("Annotations.txt", "AVE_Dataset/Annotations.txt"), source)
    lines = [line for line in _ave_lines(file) if line[0] != "Category"]
    origin: dict[str, Any] = {"annotations": {file.name: sha256_file(file)}, "events": events}
    order: list[str] = []
    split_by: dict[tuple[str, ...], str] = {}
    if splits is not None:
        for split, by_class in read_splits(splits).items():
            order += [_slug(n) for n in by_class if _slug(n) not in order]
            split_by |= {(_slug(name), i): split for name, ids in by_class.items() for i in ids}
        origin["splits"] = _splits_origin(splits)
    else:
        names = {"train": "trainSet.txt", "val": "valSet.txt", "test": "testSet.txt"}
        for split, name in names.items():
            if not (file.parent / name).is_file():
                raise DataError(f"{file.parent} has no {name}: get it from {source}, or give the lists as --splits")
            for fields in _ave_lines(file.parent / name):
                split_by[(_slug(fields[0]), fields[1])] = split
        hashes = {name: sha256_file(file.parent / name) for name in names.values()}
        origin["splits"] = {"by": "published lists", "files": hashes}
    files = _Files(folder)
    videos, unlisted = [], 0
    for category, video_id, _, start, end in lines:
        name = _slug(category)
        found = split_by.get((name, video_id))
        if found is None:
            unlisted += 1
            continue
        span = _span(f"{file}: {video_id}", start, end) if events else None
        videos.append(Video(video_id, name, found, files.find([video_id], name), f"{video_id}.mp4", span))
    videos, notes = _alone(videos)
    if unlisted:
        notes.append(f"{unlisted} annotations are in none of the lists of splits, and are left out")
    videos.sort(key=lambda v: (SPLITS.index(v.split), v.id))
    return _listing("ave", folder, videos, order, classes, origin, notes)


def _ave_lines(file: Path) -> list[list[str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{file} is not a text file: get it anew") from None
    found = [[part.strip() for part in line.split("&")] for line in lines if line.strip()]
    for number, fields in enumerate(found, 1):
        if len(fields) != 5 or not fields[0] or not fields[1]:
            raise DataError(f"{file}, line {number}: it must be Category&VideoID&Quality&StartTime&EndTime")
    return found


def list_vggsound(
    root: str | os.PathLike[str],
    *,
    annotations: str | os.PathLike[str] | None = None,
    splits: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
) -> Listing:
    """VGGSound: vggsound.csv (YouTube id, start in seconds, label, train or test) with videos anywhere below ROOT.

    A video is ID_000030.mp4 or ID_30.mp4, ten seconds cut out already, or ID.mp4, of which the ten seconds from the
    start on are taken if it is longer. The validation split, which it has not, is taken out of train by a hash of the
    id; ``splits`` (:func:`read_splits`) says all three, and which classes there are. Class names are the labels in
    small letters, one word.
    """
    folder = _check_root(root)
    shares = _check_shares(shares)
    source = "robots.ox.ac.uk/~vgg/data/vggsound"
    file = _annotations(folder, annotations, ("vggsound.csv",), source)
    order: list[str] = []
    given: dict[tuple[str, str], str] | None = None
    origin: dict[str, Any] = {"annotations": {file.name: sha256_file(file)}}
    if splits is not None:
        given = {}
        for split, by_class in read_splits(splits).items():
            order += [_slug(n) for n in by_class if _slug(n) not in order]
            given |= {(_slug(name), i): split for name, ids in by_class.items() for i in ids}
        origin["splits"] = _splits_origin(splits)
    else:
        origin["splits"] = {
            "by": "vggsound.csv, val out of train by hash of the id",
            "seed": seed,
            "shares": list(shares),
        }
    videos = []
    files = _Files(folder)
    for line, (youtube, start, label, published) in _vggsound_rows(file):
        name = _slug(label)
        video_id = f"{youtube}_{start:06d}"
        if given is not None:
            names = (video_id, f"{youtube}_{start}", youtube)
            split = next((given[(name, n)] for n in names if (name, n) in given), "")
            if not split:
                continue
        elif published not in ("train", "test"):
            raise DataError(f"{file}, line {line}: no split '{published}': it is train or test")
        else:
            # of train alone the hash decides, between train and val
            split = published if published == "test" else split_of(video_id, seed, (shares[0], shares[1], 0.0))
        cut = files.find([video_id, f"{youtube}_{start}"], name)
        whole = "" if cut else files.find([youtube], name)
        span = (float(start), start + _CLIP_S) if whole else None
        videos.append(
            Video(video_id, name, split, cut or whole, f"{video_id}.mp4 or {youtube}.mp4", span, only_longer=True)
        )
    videos, notes = _alone(videos)
    videos.sort(key=lambda v: (SPLITS.index(v.split), v.id))
    return _listing("vggsound", folder, videos, order, classes, origin, notes)


def _vggsound_rows(file: Path) -> Iterable[tuple[int, tuple[str, int, str, str]]]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            for row in reader:
                if not row:
                    continue
                if len(row) != 4 or not row[1].strip().isdigit():
                    raise DataError(
                        f"{file}, line {reader.line_num}: it must be YouTube id, start in whole seconds, label, split"
                    )
                youtube, start, label, split = (part.strip() for part in row)
                yield reader.line_num, (youtube, int(start), label, split.lower())
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a CSV table ({error}): get it anew") from None


DATASETS: dict[str, Callable[..., Listing]] = {
    "music21": list_music21,
    "ave": list_ave,
    "vggsound": list_vggsound,
    "folder": list_folder,
}

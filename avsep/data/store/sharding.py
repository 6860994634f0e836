"""Write a store's files into shards (:mod:`avsep.data.store.shards`)."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from avsep.data.store.files import SPLITS, VIDEOS_FILE, Clip, Store
from avsep.errors import ConfigError, DataError
from avsep.files import FolderLock, atomic_path, entries, read_json, refuse_file, sha256_file, write_json, write_text
from avsep.progress import Progress

__all__ = ["shard_store"]

_FOLDER = "shards"
_MARKER = "avsep-shards.json"  # in a folder beside the store's own: whose shards it holds
_JOURNAL = ".journal"
_OF_SHARD = ("name", "bytes", "sha256")
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20


def shard_store(
    store: Store,
    out: str | Path,
    *,
    shard_mb: float = 512,
    folders: Sequence[str | Path] = (),
    bars: Progress | None = None,
) -> Store:
    """Write a store's files into shards of about ``shard_mb`` million bytes; returns the sharded store.

    Args:
        store: of either kind; every file is checked against its hash on the way.
        out: the new store's folder. A killed run is continued by the same call, to the same bytes.
        folders: more folders, on other disks, that take turns with the one in ``out``. They may be moved later: a
            shard is looked for in every folder of ``shard_folders`` in the manifest (relative ones start at ``out``).

    Raises:
        ConfigError: ``shard_mb`` is not positive, or a file is in the way.
        DataError: a file of ``store`` is damaged, or a folder holds something else.
        RunError: another process writes there.
    """
    if not 0 < shard_mb < float("inf"):
        raise ConfigError(f"shards of {shard_mb:g} MB cannot be made: give a size above 0")
    out, bars = Path(out), bars or Progress()
    if out.resolve() == store.path.resolve():
        raise ConfigError(f"{out} is the store itself: choose another folder for its shards")
    for folder in (out, *map(Path, folders)):
        refuse_file(folder)
    header: dict[str, Any] = {
        "format": "avsep-store",
        "kind": "shards",
        "origin": {"generator": "avsep data shard STORE --out"},
        "content": store.content_hash,
        "features": {name: store.feature_hash(name) for name in store.features},
        "shard_mb": shard_mb,
        "shard_folders": [_FOLDER, *(str(Path(f).resolve()) for f in folders)],
    }
    begun = out / _JOURNAL / "header.json"
    there = [name for name in entries(out) if name != _JOURNAL or entries(out / _JOURNAL)]
    if there and not begun.is_file():
        if _FOLDER in there and (out / "manifest.json").is_file():
            return _finished(out, header)
        raise DataError(f"{out} is not empty (it holds '{there[0]}'): choose another folder")
    with FolderLock(out):
        if begun.is_file() and read_json(begun) != header:
            raise DataError(
                f"{out} holds shards begun from another store or with other settings: choose another folder, or "
                f"delete it"
            )
        write_json(begun, header)
        places = [out / folder for folder in header["shard_folders"]]
        for place in places[1:]:
            _take(place, header)
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            for leftover in place.glob(".*.tar"):  # temporary files of a killed run
                leftover.unlink()
        plan = list(_plan(store, shard_mb * 1e6))
        bar = bars.add("writing shards", total=len(store.clips))
        shards: list[dict[str, Any]] = []
        files: dict[str, dict[str, Any]] = {}
        for number, (name, clips) in enumerate(plan):
            target = places[number % len(places)] / name
            done = _done(out / _JOURNAL / f"{name}.json", target, clips)
            if done is None:
                done = _write_shard(store, target, number, clips)
                write_json(out / _JOURNAL / f"{name}.json", done)
            shards.append(done["shard"])
            files.update(done["files"])
            bars.advance(bar, len(clips), note=name)
        manifest = json.loads(json.dumps({k: v for k, v in store.manifest.items() if not k.startswith("shard")}))
        for entry in manifest["clips"]:
            entry["files"] = files[entry["id"]]
        manifest["shard_mb"] = shard_mb
        manifest["shard_folders"] = header["shard_folders"]
        manifest["shards"] = shards
        if (videos := store.path / VIDEOS_FILE).is_file():
            write_text(out / VIDEOS_FILE, videos.read_text(encoding="utf-8"))
        write_json(out / "manifest.json", manifest)
        for file in (out / _JOURNAL).iterdir():
            file.unlink()
        (out / _JOURNAL).rmdir()
    return Store.open(out)


def _finished(out: Path, header: Mapping[str, Any]) -> Store:
    """The store that is there, if it is the one that is asked for."""
    found = Store.open(out)
    same = found.content_hash == header["content"] and header["features"] == {
        name: found.feature_hash(name) for name in found.features
    }
    if not same or any(found.manifest.get(key) != header[key] for key in ("shard_mb", "shard_folders")):
        raise DataError(f"{out} holds shards of another store or with other settings: choose another folder")
    return found


def _take(folder: Path, header: Mapping[str, Any]) -> None:
    """Note in a folder whose shards it will hold; one that holds something else is refused."""
    mark = {key: header[key] for key in ("format", "kind", "content", "features", "shard_mb")}
    marker = folder / _MARKER
    if marker.is_file():
        if read_json(marker) != mark:
            raise DataError(f"{folder} holds the shards of another store: choose another folder")
        return
    if there := entries(folder):
        raise DataError(f"{folder} is not empty (it holds '{there[0]}'): choose another folder")
    write_json(marker, mark)


def _plan(store: Store, size: float) -> Iterator[tuple[str, list[Clip]]]:
    """Which clips go into which shard: (its name, its clips)."""
    for split in SPLITS:
        clips = sorted(store.select(split=split), key=lambda c: hashlib.sha256(c.id.encode()).digest())
        held: list[Clip] = []
        full, number = 0, 0
        for clip in clips:
            records = store.manifest["clips"][clip.index]["files"].values()
            need = sum(_BLOCK + _padded(record["bytes"]) for record in records) + 2 * _BLOCK
            if held and full + need > size:
                yield f"{split}-{number:06d}.tar", held
                held, full, number = [], 0, number + 1
            held.append(clip)
            full += need
        if held:
            yield f"{split}-{number:06d}.tar", held


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _done(journal: Path, shard: Path, clips: Sequence[Clip]) -> dict[str, Any] | None:
    """What an earlier run noted of a shard, if it is whole."""
    try:
        noted: dict[str, Any] = read_json(journal)
        whole = noted["files"].keys() == {clip.id for clip in clips} and noted["shard"].keys() == set(_OF_SHARD)
        return noted if whole and sha256_file(shard) == noted["shard"]["sha256"] else None
    except (ConfigError, OSError, KeyError, TypeError, AttributeError):
        return None


def _key(clip_id: str) -> str:
    return clip_id.replace("%", "%25").replace(".", "%2E")


def _member(clip_id: str, kind: str) -> str:
    """``ID.audio.wav``, ``ID.object.npy``, ``ID.features.NAME.npy``"""
    return f"{_key(clip_id)}.{kind.replace('/', '.')}.{'wav' if kind == 'audio' else 'npy'}"


def _write_shard(store: Store, target: Path, number: int, clips: Sequence[Clip]) -> dict[str, Any]:
    """Write one shard; returns its record and those of the files in it, by clip and kind."""
    files: dict[str, dict[str, Any]] = {}
    digest = hashlib.sha256()
    with atomic_path(target) as temporary, open(temporary, "wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        for clip in clips:
            of_clip = files[clip.id] = {}
            for kind, record in store.manifest["clips"][clip.index]["files"].items():
                name = _member(clip.id, kind)
                write(_tar_header(name, record["bytes"]))
                of_clip[kind] = {
                    "path": name,
                    "sha256": record["sha256"],
                    "bytes": record["bytes"],
                    "shard": number,
                    "offset": file.tell(),
                }
                for block in store.blocks(record, _CHUNK):
                    write(block)
                write(bytes(-record["bytes"] % _BLOCK))
            facts = {"id": clip.id, "class": clip.class_name, "split": clip.split, "samples": clip.samples}
            text = json.dumps({**facts, "sample_rate_hz": store.sample_rate_hz}).encode()
            write(_tar_header(f"{_key(clip.id)}.json", len(text)))
            write(text + bytes(-len(text) % _BLOCK))
        write(bytes(2 * _BLOCK))  # the end of a tar, which is filled up to a whole record
        write(bytes(-file.tell() % tarfile.RECORDSIZE))
        size = file.tell()
    return {"shard": {"name": target.name, "bytes": size, "sha256": digest.hexdigest()}, "files": files}


def _tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)  # no owner and no time: the same store gives the same bytes
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT)

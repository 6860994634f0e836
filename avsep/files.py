"""Files that are whole or absent: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avsep.errors import AvsepError, ConfigError, RunError

__all__ = [
    "FolderLock",
    "atomic_path",
    "give_usual_rights",
    "made_folder",
    "read_json",
    "read_yaml",
    "refuse_file",
    "sha256_file",
    "write_json",
    "write_text",
    "write_yaml",
]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it becomes ``path``, on any error it is removed.

    A full disk is reported with the target's name. The temporary name keeps the target's suffix, which some writers
    choose a format by.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        give_usual_rights(temporary)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # NumPy has no errno for an array cut short, only the words "N requested and M written"
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error)):
            raise AvsepError(
                f"no space left to write {target}: free some and run again (what was there is unchanged)"
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def give_usual_rights(path: Path) -> None:
    """Give what ``tempfile`` made private the rights that any other new file or folder gets."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def made_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder with its parents where it is missing; on any error those just made, if empty, are removed again.

    Raises :class:`ConfigError` where a file is in the way.
    """
    folder = Path(path)
    refuse_file(folder)
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        for made in missing:  # innermost first; one that meanwhile holds something stays, and so do those around it
            with contextlib.suppress(OSError):
                made.rmdir()
        raise


def refuse_file(folder: Path) -> None:
    """Raise :class:`ConfigError` where a file is in the way of a folder."""
    for place in (folder, *folder.parents):
        if place.is_file():
            raise ConfigError(f"{place} is a file, where a folder is needed: choose another name")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Strict JSON: a NaN is written as null by the caller or refused here, never as a bare ``NaN``."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_yaml(path: str | os.PathLike[str], value: Any) -> None:
    import yaml  # here, so that what writes no YAML (the kernels' benchmarks) needs no PyYAML

    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a text file: {error}") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(_read(Path(path)))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}); is it truncated?") from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
    import yaml

    try:
        return yaml.safe_load(_read(Path(path)))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def sha256_file(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class FolderLock:
    """Hold a folder for one writing process; the lock dies with the process, so a kill leaves nothing to clean up.

    Raises :class:`RunError` at once when another process holds it, :class:`ConfigError` where a file is in the way.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        from filelock import FileLock  # here, as PyYAML above

        self.folder = Path(folder)
        self._lock = FileLock(self.folder / ".lock", thread_local=False)

    def __enter__(self) -> FolderLock:
        from filelock import Timeout

        refuse_file(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RunError(
                f"{self.folder} is being written by another process: wait for it to end, or choose another folder"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

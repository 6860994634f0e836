"""Files that are whole or absent: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import AvsepError, ConfigError

__all__ = [
    "atomic_path",
    "exchange",
    "is_staging",
    "made_folder",
    "refuse_file",
    "sha256_file",
    "staged_files",
    "staging_folder",
    "sweep",
]


# The names of what is being written: `.staging-HOST-PID-...`. They tell whose it is.
_STAGING = ".staging-"


def _host() -> str:
    """This machine, or the container on it: the numbers of processes mean something in one of them alone."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.blake2b(f"{platform.node()} {space}".encode(), digest_size=4).hexdigest()


_HOST = _host()
_swept: set[str] = set()


def is_staging(name: str) -> bool:
    """Whether a file or folder of this name is one that is being written, or that a kill left while it was."""
    return name.startswith(_STAGING)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that are no more left half-written in a folder.

    Everything that writes calls it the first time it writes into a folder. What a living process is writing stays, and
    so does what another machine wrote.
    """
    place = os.path.abspath(folder)
    if place in _swept:
        return
    _swept.add(place)
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if is_staging(entry.name) and not _has_owner(entry):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def _has_owner(entry: os.DirEntry[str]) -> bool:
    host, _, rest = entry.name.removeprefix(_STAGING).partition("-")
    pid = rest.partition("-")[0]
    if host != _HOST or not pid.isdigit():
        return True  # of another machine, or nothing of ours
    if int(pid) == os.getpid():
        return True
    if os.name == "nt":  # where a process cannot be asked for without ending it
        return time.time() - entry.stat().st_mtime < 24 * 3600
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _staging_place(target: Path) -> Path:
    """A new temporary name beside the target; it keeps the target's suffix, which some writers choose a format by."""
    own = f"{_HOST}-{os.getpid()}-{secrets.token_hex(8)}"
    return target.parent / f"{_STAGING}{own}-{target.stem[:40]}{target.suffix}"


@contextlib.contextmanager
def staging_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``, which must be moved to its place inside the block; else it goes."""
    place = Path(target)
    sweep(place.parent)
    folder = _staging_place(place)
    try:  # from before it is made: an interrupt may come at any moment
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it becomes ``path``, on any error it is removed.

    A full disk is reported with the target's name.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    temporary = _staging_place(target)
    try:  # from before it is made: an interrupt may come at any moment
        temporary.touch(exist_ok=False)
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


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Swap two files or folders in one step, so that neither name is ever empty; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


@contextlib.contextmanager
def made_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder with its parents where it is missing; on any error those just made, if empty, are removed again.

    Raises :class:`ConfigError` where a file is in the way.
    """
    folder = Path(path)
    refuse_file(folder)
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException:
        for made in missing:  # innermost first; one that meanwhile holds something stays, and so do those around it
            with contextlib.suppress(OSError):
                made.rmdir()
        raise


@contextlib.contextmanager
def staged_files(folder: str | os.PathLike[str], names: Iterable[Path]) -> Iterator[Path]:
    """Files that appear together: yield a temporary folder inside ``folder``, from which they move at the end.

    Args:
        folder: made where it is missing; on any error nothing is left in it.
        names: the files; each is written under its own name into the temporary folder.
    """
    with made_folder(folder) as place, staging_folder(place / "files") as staging:
        yield staging
        for name in names:
            os.replace(staging / name.name, name)


def refuse_file(folder: Path) -> None:
    """Raise :class:`ConfigError` where a file is in the way of a folder."""
    for place in (folder, *folder.parents):
        if place.is_file():
            raise ConfigError(f"{place} is a file, where a folder is needed: choose another name")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Files that are whole or absent: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import AvsepError, ConfigError

__all__ = [
    "atomic_path",
    "give_usual_rights",
    "made_folder",
    "refuse_file",
    "sha256_file",
    "staged_files",
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


@contextlib.contextmanager
def staged_files(folder: str | os.PathLike[str], names: Iterable[Path]) -> Iterator[Path]:
    """Files that appear together: yield a temporary folder inside ``folder``, from which they move at the end.

    Args:
        folder: made where it is missing; on any error nothing is left in it.
        names: the files; each is written under its own name into the temporary folder.
    """
    with made_folder(folder) as place:
        staging = Path(tempfile.mkdtemp(prefix=".separating-", dir=place))
        try:
            yield staging
            for name in names:
                os.replace(staging / name.name, name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


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

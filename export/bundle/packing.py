"""Bundles on disk: whole or not there, the same bytes from the same files, and never in the place of anything else."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import AvsepError, ConfigError, ExportError
from avsep.export.runtime.manifest import FORMAT, MANIFEST
from avsep.export.runtime.reader import is_built_here, members_of_tar
from avsep.files import atomic_path, exchange, made_folder, read_json, staging_folder
from avsep.runs.folder import RunFolder

__all__ = ["check_target", "is_tar_name", "staged", "write_arrays", "write_tar"]

# 1980-01-01, the first moment that a zip archive can hold: the time of every file in tars and archives.
_EPOCH_S = 315532800
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")


def is_tar_name(path: Path) -> bool:
    """Whether a bundle of this name is a tar rather than a folder.

    Raises:
        ConfigError: the name asks for a compressed archive.
    """
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise ConfigError(
            f"{path} asks for a compressed bundle: weights hardly compress, name it .tar or give a folder"
        )
    return suffix == ".tar"


def check_target(out: str | os.PathLike[str]) -> Path:
    """The place of a new bundle, where it may be written: nothing is there, or a bundle, which will be replaced.

    Raises:
        ConfigError: something else is there, or the place lies inside a run or inside another bundle.
    """
    target = Path(out)
    if target.is_symlink():
        target = target.resolve()
    tar = is_tar_name(target)
    refuse_surroundings(target, "bundle")
    if not target.exists():
        return target
    if tar:
        _check_old_tar(target)
    else:
        _check_old_folder(target)
    return target


def refuse_surroundings(out: Path, what: str) -> None:
    """Raise :class:`ConfigError` where a place for ``what`` is a run, or lies inside a run or a bundle."""
    if RunFolder(out).is_run:
        raise ConfigError(f"{out} is a run: choose another place for the {what}")
    for around in out.absolute().resolve().parents:
        if RunFolder(around).is_run and RunFolder(around).tasks.is_dir():
            raise ConfigError(f"{out} lies inside the run {around}, which a {what} would spoil: choose another place")
        if _is_bundle_folder(around):
            raise ConfigError(f"{out} lies inside the bundle {around}: choose another place")


def _is_bundle_folder(folder: Path) -> bool:
    try:
        found = read_json(folder / MANIFEST)
    except (ConfigError, OSError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _check_old_folder(target: Path) -> None:
    if not target.is_dir():
        raise ConfigError(f"{target} is a file: give a folder for the bundle, or a name that ends in .tar")
    entries = sorted(p.name for p in target.iterdir())
    if not entries:
        return
    if MANIFEST not in entries:
        raise ConfigError(f"{target} holds other files ({entries[0]}) and no bundle: choose another folder")
    manifest = read_json(target / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"{target / MANIFEST} is not of a bundle: choose another folder")
    files = manifest.get("files")
    own = {MANIFEST, *(files if isinstance(files, dict) else ())}
    if foreign := [name for name in entries if name not in own and not is_built_here(name)]:
        raise ConfigError(f"{target} holds {foreign[0]} beside its bundle: move it away, or choose another folder")


def _check_old_tar(target: Path) -> None:
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: choose another name for the tar")
    try:
        offset, size = members_of_tar(target)[MANIFEST]
        with open(target, "rb") as file:
            file.seek(offset)
            found = file.read(min(size, 1 << 20))
    except (ExportError, KeyError, OSError):
        found = b""
    if FORMAT.encode() not in found:
        raise ConfigError(f"{target} is there and is not a bundle: choose another name")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``; when the block ends well its files become the bundle, or its tar.

    A bundle that is there is replaced at once, and kept when anything fails.
    """
    with made_folder(target.parent), staging_folder(target) as staging:
        yield staging
        if is_tar_name(target):
            write_tar(staging, target)
        else:
            _replace(staging, target)


def _replace(staging: Path, target: Path) -> None:
    """Put the finished folder in the target's place.

    It changes places with an older bundle in one step; where the system has no such step, the older one is moved aside
    for a moment, and back if anything fails.
    """
    if not target.exists():
        os.replace(staging, target)
        return
    if exchange(staging, target):
        return  # the older one goes with the temporary folder
    # a name that nobody has, and that is never swept: whatever happens now, the older bundle is there
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}-old-", dir=target.parent))
    old = aside / target.name
    try:
        os.replace(target, old)
        os.replace(staging, target)
    except BaseException:  # Ctrl-C too
        if not target.exists():
            os.replace(old, target)
        raise
    finally:
        if target.exists():  # else the older bundle is the only one there is
            shutil.rmtree(aside, ignore_errors=True)


def write_tar(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a folder's files as an uncompressed tar. The same files give the same bytes: sorted names, the manifest
    first, one time, no owner.

    Raises:
        AvsepError: no space is left; the target is as it was.
    """
    source = Path(folder)
    names = sorted((p.name for p in source.iterdir()), key=lambda name: (name != MANIFEST, name))
    with (
        atomic_path(target) as temporary,
        # USTAR: no extended headers, readable by every tar
        tarfile.open(temporary, "w:", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = (source / name).stat().st_size
            member.mtime, member.mode = _EPOCH_S, 0o644
            if member.size >= 8 << 30:
                raise AvsepError(f"{name} has {member.size} bytes, more than a tar of this form holds: use a folder")
            with open(source / name, "rb") as file:
                archive.addfile(member, file)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """``np.savez_compressed`` without the time of writing: the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asanyarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")  # its time is 1980
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, buffer.getvalue())

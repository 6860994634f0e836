"""Opening a bundle: a folder, or the same files in one tar. NumPy and the standard library alone.

What is read is not trusted: names cannot lead out of the bundle, links are refused, what the manifest says is checked
as far as it is used, and bytes are handed out only where their SHA-256 is the manifest's. (Whoever can write a bundle
can write a manifest to match: the hashes find damage and mix-ups; they are no signature.)
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import stat
import tarfile
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .arrays import ArrayHeader, Npz
from .errors import ExportError, one_line
from .manifest import MANIFEST, check_manifest, is_plain_name, parse
from .streaming import SEQUENCES

__all__ = ["MANIFEST", "Bundle", "Graph", "TensorInfo", "is_built_here", "members_of_tar", "open_bundle"]

# A manifest is some kilobytes and a bundle a handful of files; more is no bundle, and not worth the memory.
_MOST_MANIFEST_BYTES = 8 << 20
_MOST_FILES = 256
_MOST_FILE_BYTES = 1 << 31  # of an ONNX file; a hole in a file can be of any size
_MOST_EXTENSION_BYTES = 1 << 16
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd

# What building an engine leaves in a bundle's folder on the device: not the bundle's, and not in its way.
_BUILT_FOLDERS = ("engines", "__pycache__")
_BUILT_SUFFIXES = (".plan", ".plan.json", ".engine", ".engine.json", ".timing", ".timing-cache", ".lock")

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph; a dimension is a number, or ``"batch"`` or ``"sources"`` where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def fits(self, array: Array | ArrayHeader) -> bool:
        """Whether the array has this element type and shape."""
        return (
            array.dtype == np.dtype(self.dtype)
            and len(array.shape) == len(self.shape)
            and all(isinstance(want, str) or want == got for want, got in zip(self.shape, array.shape, strict=True))
        )


@dataclass(frozen=True)
class Graph:
    """One graph of a bundle, as its manifest describes it; ``entry`` is that part of the manifest."""

    file: str
    kind: str
    precision: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    golden: str
    tolerance: float
    entry: Mapping[str, Any]

    @property
    def profiles(self) -> list[dict[str, dict[str, list[int]]]]:
        """By profile and input name: the least, usual and largest shape."""
        return list(self.entry["profiles"])

    def check(self, inputs: Mapping[str, NDArray[Any]], where: str) -> None:
        """Raise :class:`ExportError`, naming ``where``, for inputs of other names, element types or shapes."""
        if inputs.keys() != {tensor.name for tensor in self.inputs}:
            takes = ", ".join(tensor.name for tensor in self.inputs)
            raise ExportError(f"{where} takes {takes}, got {', '.join(inputs)}")
        for tensor in self.inputs:
            array = inputs[tensor.name]
            if not tensor.fits(array):
                raise ExportError(
                    f"{where}: '{tensor.name}' is {array.dtype} {list(array.shape)}, it takes {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )

    @property
    def golden_tensors(self) -> tuple[TensorInfo, ...]:
        """Inputs and outputs as golden arrays hold them: a sequence of calls, of a graph that goes frame by frame."""
        tensors = (*self.inputs, *self.outputs)
        if self.kind != "stream":
            return tensors
        calls = int(self.entry["stream"]["golden_calls"])
        return tuple(TensorInfo(t.name, t.dtype, (calls, *t.shape)) if t.name in SEQUENCES else t for t in tensors)


@dataclass
class Bundle:
    """A bundle on disk whose manifest holds. ``path`` is its folder or its tar."""

    path: Path
    manifest: dict[str, Any]
    graphs: tuple[Graph, ...]
    _members: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)  # tar: name -> offset, size
    _temporary: Path | None = field(default=None, repr=False)

    @property
    def is_tar(self) -> bool:
        return self.path.is_file()

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def left_out(self) -> Mapping[str, str]:
        """Classes that its separator knows and the bundle does not offer, each with the reason."""
        return dict(self.manifest.get("plan", {}).get("left_out", {}))

    @property
    def by_name(self) -> bool:
        """Whether sources are asked for by name alone, also of a video, unless whoever asks says to look."""
        return bool(self.manifest.get("plan", {}).get("by_name", False))

    @property
    def sample_rate_hz(self) -> int:
        return int(self.manifest["sample_rate_hz"])

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the bundle, the manifest first."""
        return (MANIFEST, *sorted(self.manifest["files"]))

    @property
    def megabytes(self) -> float:
        """Size of all its files in MB (10^6 bytes)."""
        return sum(self.size(name) for name in self.files) / 1e6

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._members[name][1] if self.is_tar else (self.path / name).stat().st_size

    def graph(self, kind: str = "separator", precision: str | None = None) -> Graph:
        """The graph of a kind; without a precision the fp32 one, or the first where there is none.

        Raises:
            ExportError: the bundle has none such; says what it has.
        """
        found = [g for g in self.graphs if g.kind == kind and precision in (None, g.precision)]
        if not found:
            has = ", ".join(f"{g.kind} in {g.precision}" for g in self.graphs)
            wanted = kind if precision is None else f"{kind} in {precision}"
            raise ExportError(f"{self.path} holds no graph {wanted}: it has {has}")
        return next((g for g in found if g.precision == "fp32"), found[0])

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            ExportError: it is not in the bundle, or not what the manifest says it is.
        """
        if name not in self.files:
            raise ExportError(f"{self.path} has no file {_shown(name)}: it has {', '.join(self.files)}")
        with _opened(self, name) as file:
            data = file.read(self.size(name))
        if name != MANIFEST and hashlib.sha256(data).hexdigest() != self.manifest["files"][name]:
            raise ExportError(_differs(self.path, name))
        return data

    def check(self, name: str) -> None:
        """Hash a file without keeping it; raises as :meth:`read` does."""
        digest = hashlib.sha256()
        with _opened(self, name) as file:
            left = self.size(name)
            while left and (block := file.read(min(1 << 20, left))):
                digest.update(block)
                left -= len(block)
        if digest.hexdigest() != self.manifest["files"][name]:
            raise ExportError(_differs(self.path, name))

    def golden(self, graph: Graph) -> tuple[dict[str, Array], dict[str, Array]]:
        """Golden inputs and outputs of a graph, by name.

        Raises:
            ExportError: the file is damaged, or holds something else than the graph's inputs and outputs.
        """
        where = f"{self.path}: {graph.golden}"
        tensors = graph.golden_tensors
        most = _most_golden(graph)
        if self.size(graph.golden) > most + (1 << 20):
            raise ExportError(f"{where} unpacks to more than the graph takes and gives: export it again")
        data = self.read(graph.golden)
        try:
            with Npz(data, most) as archive:
                for tensor in tensors:
                    header = archive.headers.get(tensor.name)
                    if header is None:
                        raise ExportError(f"{where} has no array '{tensor.name}': export it again")
                    if not tensor.fits(header):
                        raise ExportError(
                            f"{where}: array '{tensor.name}' is {header}, the graph's is {tensor.dtype} "
                            f"{list(tensor.shape)}: export it again"
                        )
                arrays = {tensor.name: archive.read(tensor.name) for tensor in tensors}
        except ValueError as error:
            raise ExportError(f"{where} cannot be read ({_shown(error)}): export it again") from None
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ExportError(f"{where}: array '{name}' holds NaN or infinite values: export it again")
        return {t.name: arrays[t.name] for t in graph.inputs}, {t.name: arrays[t.name] for t in graph.outputs}

    def folder(self) -> Path:
        """A folder with the bundle's files: its own, or for a tar a temporary one, which :meth:`close` removes."""
        if not self.is_tar:
            return self.path
        if self._temporary is None:
            temporary = Path(tempfile.mkdtemp(prefix="avsep-bundle-"))
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)  # also when nobody closes it
            self.extract(temporary)
            self._temporary = temporary
        return self._temporary

    def extract(self, folder: str | os.PathLike[str]) -> Path:
        """Write the bundle's files, checked, into a folder that is there. Returns it."""
        target = Path(folder)
        for name in self.files:
            (target / name).write_bytes(self.read(name))
        return target

    def close(self) -> None:
        """Remove the temporary files of a tar, if any."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_built_here(name: str) -> bool:
    """Whether a name in a bundle's folder is of something that was built from it on this device."""
    return name in _BUILT_FOLDERS or name.endswith(_BUILT_SUFFIXES)


def open_bundle(path: str | os.PathLike[str], *, hashes: bool = True) -> Bundle:
    """Open a bundle and check it: names, manifest and (unless ``hashes`` is False) the SHA-256 of every file.

    Without ``hashes`` each file is still checked when it is read (:meth:`Bundle.read`).

    Raises:
        ExportError: one line with the file's name: it is no bundle, of another version, or a file is missing, changed,
            truncated, a link, or one too many.
    """
    place = Path(path)
    if not place.exists():
        raise ExportError(f"no such bundle: {_shown(place)}")
    if not place.is_dir() and not place.is_file():
        raise ExportError(f"{place} is neither a folder nor a file: give a bundle")
    members: dict[str, tuple[int, int]] = {}
    if place.is_dir():
        names = _names_in_folder(place)
    else:
        members = members_of_tar(place)
        names = set(members)
    if MANIFEST not in names:
        hint = _hint_for(place)
        raise ExportError(f"{place} is not a bundle: it has no {MANIFEST}{hint}")
    bundle = Bundle(place, {}, (), members)
    if bundle.size(MANIFEST) > _MOST_MANIFEST_BYTES:
        raise ExportError(f"{place}: {MANIFEST} is too long for a manifest: copy the bundle again")
    with _opened(bundle, MANIFEST) as file:
        manifest = parse(file.read(bundle.size(MANIFEST)), f"{place}: {MANIFEST}")
    check_manifest(manifest, f"{place}: {MANIFEST}")
    stated = set(manifest["files"])
    if missing := sorted(stated - names):
        raise ExportError(f"{place} lacks the file {missing[0]}: copy the bundle again")
    extra = sorted(n for n in names - stated - {MANIFEST} if not (place.is_dir() and is_built_here(n)))
    if extra:
        raise ExportError(f"{place} has a file {_shown(extra[0])} that is not of the bundle: remove it")
    for name in sorted(stated):
        if bundle.size(name) > _MOST_FILE_BYTES:
            raise ExportError(f"{place}: {name} has {bundle.size(name)} bytes, more than any file of a bundle")
    bundle.manifest = manifest
    bundle.graphs = tuple(_graph(entry) for entry in manifest["graphs"])
    if hashes:
        for name in sorted(stated):
            bundle.check(name)
    return bundle


def _hint_for(place: Path) -> str:
    if place.is_dir():
        inner = sorted(p.name for p in place.iterdir() if (p / MANIFEST).is_file() or p.suffix == ".tar")
        if inner:
            return f"; it holds {', '.join(_shown(n) for n in inner[:4])}: name one of them"
        if (place / "run.yaml").is_file():
            return "; it is a run: export it first (avsep export RUN --out BUNDLE)"
    return ""


def _shown(text: object) -> str:
    """A name or reason as it may stand in a line: names from an archive can hold anything."""
    return one_line(text, 200)


def _differs(path: Path, name: str) -> str:
    return f"{path}: {name} is not the file that was exported (its SHA-256 differs): copy the bundle again"


def _names_in_folder(folder: Path) -> set[str]:
    names: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if len(names) > _MOST_FILES:
                raise ExportError(f"{folder} holds more than {_MOST_FILES} files: it is not a bundle")
            if entry.is_symlink():
                raise ExportError(
                    f"{folder}: {_shown(entry.name)} is a link: a bundle holds plain files, copy it again"
                )
            if entry.is_dir(follow_symlinks=False):
                if entry.name in _BUILT_FOLDERS:
                    continue
                if not (folder / MANIFEST).exists():
                    continue  # no bundle at all; said by the caller
                raise ExportError(
                    f"{folder}: {_shown(entry.name)} is a folder, which a bundle does not have: remove it"
                )
            if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                raise ExportError(f"{folder}: {_shown(entry.name)} is not a plain file: copy the bundle again")
            names.add(entry.name)
    return names


def members_of_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Where each file of an uncompressed tar lies, as (offset, bytes). Nothing is unpacked.

    Raises :class:`ExportError` where it is no tar of plain files in one folder.

    Headers are read one by one and taken for what they say. :mod:`tarfile` would follow the extensions in them (sparse
    files, sizes and names elsewhere), which no bundle needs and which can send it anywhere.
    """
    members: dict[str, tuple[int, int]] = {}
    total, place = path.stat().st_size, 0
    with open(path, "rb") as file:
        start = file.read(6)
        while place < total:
            file.seek(place)
            block = file.read(tarfile.BLOCKSIZE)
            if not block.strip(b"\0"):
                break  # the end of a tar
            if place and len(block) < tarfile.BLOCKSIZE:
                raise ExportError(f"{path} is truncated: copy it again")
            try:
                member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.TarError, ValueError, LookupError) as error:
                if start.startswith(_COMPRESSED):
                    raise ExportError(f"{path} is compressed: uncompress it to a plain .tar first") from None
                raise ExportError(f"{path} is neither a bundle's folder nor a readable tar ({_shown(error)})") from None
            offset, name = place + tarfile.BLOCKSIZE, _shown(member.name)
            if not 0 <= member.size <= total - offset:
                raise ExportError(f"{path} is truncated within {name}: copy it again")
            place = offset + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
                _check_extension(path, file, member.size)
                continue
            if member.isdir() and member.name.strip("./") == "":
                continue  # `tar -cf bundle.tar -C bundle .` puts the folder itself in
            if len(members) >= _MOST_FILES:
                raise ExportError(f"{path} holds more than {_MOST_FILES} files: it is not a bundle")
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                kind = "a link" if member.issym() or member.islnk() else "not a plain file"
                raise ExportError(f"{path}: {name} is {kind}: a bundle holds plain files, copy it again")
            plain = member.name.removeprefix("./")
            if not is_plain_name(plain):
                out = "leads out of" if ".." in plain.split("/") or plain.startswith(("/", "\\")) else "is none of"
                raise ExportError(f"{path}: the name {name} {out} a bundle: tar its files alone, without a folder")
            if plain in members:
                raise ExportError(f"{path} holds the file {name} twice: it is not one that avsep made")
            members[plain] = (offset, member.size)
    return members


def _check_extension(path: Path, file: BinaryIO, size: int) -> None:
    """Let pass what a header adds to the next one (times, owners), unless it is another name, size or form."""
    data = file.read(size) if size <= _MOST_EXTENSION_BYTES else b" path="
    for key in (b"path", b"linkpath", b"size", b"GNU.sparse."):
        if b" " + key in data:
            raise ExportError(
                f"{path} holds a sparse file, or one with a name or size that takes an extension of tar: tar the "
                "bundle's files plainly (tar --format=ustar)"
            )


@contextlib.contextmanager
def _opened(bundle: Bundle, name: str) -> Iterator[BinaryIO]:
    """A file of the bundle, positioned at its first byte; read no more than its size."""
    if bundle.is_tar:
        with open(bundle.path, "rb") as whole:
            whole.seek(bundle._members[name][0])
            yield whole
        return
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(bundle.path / name, flags)
    except OSError as error:
        raise ExportError(f"{bundle.path}: {name} cannot be opened ({error.strerror}): copy the bundle again") from None
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _graph(entry: Mapping[str, Any]) -> Graph:
    return Graph(
        file=entry["file"],
        kind=entry["kind"],
        precision=entry["precision"],
        inputs=tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in entry["inputs"]),
        outputs=tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in entry["outputs"]),
        golden=entry["golden"],
        tolerance=float(entry["tolerance"]),
        entry=entry,
    )


# What a dynamic dimension of golden arrays may be at most, where no profile says what it is.
_MOST_DYNAMIC = 64
_MOST_GOLDEN_BYTES = 1 << 30  # of all arrays of a graph, whatever the manifest says of their shapes


def _most_golden(graph: Graph) -> int:
    """How many bytes the graph's golden arrays can take."""
    open_sizes: dict[str, int] = {}
    for profile in graph.profiles:
        for tensor in graph.inputs:
            for name, size in zip(tensor.shape, profile.get(tensor.name, {}).get("opt", ()), strict=False):
                if isinstance(name, str):
                    open_sizes[name] = size
    most = 0
    for tensor in graph.golden_tensors:
        sizes = [open_sizes.get(size, _MOST_DYNAMIC) if isinstance(size, str) else size for size in tensor.shape]
        most += math.prod(sizes) * 8 + 4096  # 8: a wrong element type is to be told as such
    return min(most, _MOST_GOLDEN_BYTES)

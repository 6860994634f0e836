"""Files that are whole or absent: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

from avsep.errors import ConfigError, RunError
from avsep.export.runtime.files import (
    atomic_path,
    exchange,
    is_staging,
    made_folder,
    refuse_file,
    sha256_file,
    staging_folder,
    sweep,
)
from avsep.export.runtime.strict_json import MOST_DEPTH, load_json

__all__ = [
    "FolderLock",
    "atomic_path",
    "csv_cell",
    "entries",
    "exchange",
    "is_staging",
    "link_or_copy",
    "made_folder",
    "parse_yaml",
    "read_json",
    "read_yaml",
    "refuse_file",
    "sha256_file",
    "staging_folder",
    "sweep",
    "write_json",
    "write_text",
    "write_yaml",
]


def entries(folder: str | os.PathLike[str]) -> list[str]:
    """Sorted names of what somebody put into a folder: without a lock, and without what a kill left half-written."""
    place = Path(folder)
    found = sorted(p.name for p in place.iterdir()) if place.is_dir() else []
    return [name for name in found if name != ".lock" and not is_staging(name)]


def link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file (of a link what it leads to) another name, or copy it where the disk cannot do that."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file as a spreadsheet may have it, which would take a text such as ``=1+1`` for a formula."""
    starts = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    if starts and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Strict JSON: a NaN is written as null by the caller or refused here, never as a bare ``NaN``."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_yaml(path: str | os.PathLike[str], value: Any) -> None:
    import yaml  # here, so that what writes no YAML (the kernels' benchmarks) needs no PyYAML

    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


_NUMBER = re.compile(r"[-+]?[0-9][0-9.,]*(e[-+]?[0-9]+)?|-")
# Manifests of large stores are tens of megabytes; a spec or a table written by a person is far below its limit.
_MOST_JSON_BYTES = 1 << 30
_MOST_YAML_BYTES = 16 << 20
_MOST_YAML_NODES = 200_000  # with every alias written out


def _read(path: Path, most: int) -> bytes:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except OSError as error:  # a name that is too long, a loop of links, a folder that may not be entered
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not the name of a file: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is not a text file: give a regular file")
    if found.st_size > most:
        raise ConfigError(
            f"{path} has {found.st_size / 1e6:.0f} MB, more than such a file may have ({most / 1e6:.0f} MB)"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        ConfigError: it is missing, no regular file, too large, or not strict JSON.
    """
    data = _read(Path(path), _MOST_JSON_BYTES)
    try:
        return load_json(data)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); is it truncated?") from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value in a YAML file.

    Raises:
        ConfigError: it is missing, no regular file, too large, or not YAML that :func:`parse_yaml` takes.
    """
    data = _read(Path(path), _MOST_YAML_BYTES)
    try:
        return parse_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML document: plain data, no deeper than JSON, its aliases written out of a sensible size.

    Raises:
        ValueError: it is none.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, OverflowError, KeyError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except ValueError as error:
        raise ValueError("a number has too many digits" if "int string" in str(error) else str(error)) from None
    _check_numbers(value)
    return value


def _check_nodes(root: Any) -> None:
    """Refuse what is too deep, and what a few aliases make huge."""
    sizes: dict[int, int] = {}

    def size(node: Any, depth: int, above: frozenset[int]) -> int:
        if id(node) in above:
            raise ValueError("an alias stands inside of what it names")
        if depth > MOST_DEPTH:
            raise ValueError("it is nested too deeply")
        if id(node) not in sizes:
            children = node.value if isinstance(node.value, list) else ()
            flat = [c for child in children for c in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(size(c, depth + 1, above | {id(node)}) for c in flat)
            if sizes[id(node)] > _MOST_YAML_NODES:
                raise ValueError("its aliases, written out, make it too large")
        return sizes[id(node)]

    size(root, 1, frozenset())


def _check_numbers(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    if isinstance(value, int) and abs(value) >= 10**40:
        raise ValueError(f"the number {str(value)[:40]}... is too large")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(key)
            _check_numbers(item)
    elif isinstance(value, (list, set, tuple)):
        for item in value:
            _check_numbers(item)


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
        sweep(self.folder)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RunError(
                f"{self.folder} is being written by another process: wait for it to end, or choose another folder"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

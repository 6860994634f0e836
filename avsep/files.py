"""Files that are whole or absent: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from avsep.errors import ConfigError, RunError
from avsep.export.runtime.files import atomic_path, give_usual_rights, made_folder, refuse_file, sha256_file

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

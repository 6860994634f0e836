"""Resume checkpoints: safetensors and JSON, written whole or not at all.

A checkpoint is a folder of ``*.safetensors`` and ``state.json``; ``latest.json`` names the newest one with the SHA-256
of its files and is replaced last, so that a kill at any moment leaves the previous one valid.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from avsep.errors import AvsepError, CheckpointError, ConfigError
from avsep.files import atomic_path, read_json, sha256_file, write_json

__all__ = [
    "flatten_state",
    "load_latest",
    "load_state",
    "load_tensors",
    "rng_state",
    "save_latest",
    "save_state",
    "save_tensors",
    "set_rng_state",
    "taking_state",
    "unflatten_state",
]


def flatten_state(value: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and tuples into tensors by path and a JSON skeleton that names those paths."""
    if isinstance(value, Tensor):
        return {prefix: value}, {"$tensor": prefix}
    if isinstance(value, dict):
        tensors: dict[str, Tensor] = {}
        pairs = []
        for key, item in value.items():
            found, skeleton = flatten_state(item, f"{prefix}.{key}" if prefix else str(key))
            _join(tensors, found)
            pairs.append([key, skeleton])
        return tensors, {"$dict": pairs}  # pairs keep integer keys, which JSON objects cannot
    if isinstance(value, (list, tuple)):
        tensors = {}
        items = []
        for number, item in enumerate(value):
            found, skeleton = flatten_state(item, f"{prefix}.{number}" if prefix else str(number))
            _join(tensors, found)
            items.append(skeleton)
        return tensors, {"$list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {}, value
    raise TypeError(f"{prefix or 'state'}: a {type(value).__name__} cannot be stored in a checkpoint")


def _join(tensors: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    if twice := tensors.keys() & found.keys():
        raise ValueError(f"two tensors of the state share the path '{min(twice)}': rename one of their keys")
    tensors |= found


def unflatten_state(tensors: dict[str, Tensor], skeleton: Any) -> Any:
    """The inverse of :func:`flatten_state`; tuples come back as lists."""
    if isinstance(skeleton, dict):
        if "$tensor" in skeleton:
            return tensors[skeleton["$tensor"]]
        if "$dict" in skeleton:
            return {key: unflatten_state(tensors, item) for key, item in skeleton["$dict"]}
        return [unflatten_state(tensors, item) for item in skeleton["$list"]]
    return skeleton


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write tensors to ``path`` (a name or a folder that is not yet visible). Shared storage is written out."""
    try:
        save_file({k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}, path, header)
        with open(path, "rb+") as file:  # before the pointer to it moves: it must outlive a power cut too
            os.fsync(file.fileno())
    except SafetensorError as error:  # a full disk surfaces here, not as OSError
        raise AvsepError(
            f"cannot write {path.name} in {path.parent.parent} ({error}): if no space is left, free some, then go on "
            f"with --resume; what was there before is unchanged"
        ) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file is missing: {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint file is damaged: {path} ({error})") from None


def save_latest(folder: Path, name: str, state: dict[str, dict[str, Any]]) -> None:
    """Write ``state`` (file stem -> nested state) as checkpoint ``name`` in ``folder`` and make it the latest.

    Earlier checkpoints are removed only after the new one is in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while (folder / name).exists():  # the same step again, after a resume: what latest.json names is never touched
        name += "+"
    temporary = folder / f".{name}.tmp"
    target = folder / name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        skeletons = {}
        for stem, value in state.items():
            tensors, skeletons[stem] = flatten_state(value)
            if tensors:
                save_tensors(temporary / f"{stem}.safetensors", tensors)
        with open(temporary / "state.json", "w", encoding="utf-8") as file:
            json.dump(skeletons, file)
            file.flush()
            os.fsync(file.fileno())
        hashes = {p.name: sha256_file(p) for p in sorted(temporary.iterdir())}
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    write_json(folder / "latest.json", {"checkpoint": name, "sha256": hashes})
    for other in folder.iterdir():
        if other.is_dir() and other.name != name:
            shutil.rmtree(other, ignore_errors=True)


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The latest checkpoint's state by file stem, or None where there is none. Damage raises with the file's name."""
    pointer = folder / "latest.json"
    if not pointer.exists():
        return None
    try:
        latest = read_json(pointer)
        target, hashes = folder / str(latest["checkpoint"]), dict(latest["sha256"])
        if not all(_is_plain(name) for name in (target.name, latest["checkpoint"], *hashes)):
            raise ValueError("a name leads elsewhere")
    except (ConfigError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{pointer} is damaged: remove {folder} to go on from the last finished task") from None
    for name, stated in hashes.items():
        if not (target / name).is_file():
            raise CheckpointError(
                f"checkpoint file is missing: {target / name}; remove {folder} to go on from the last finished task"
            )
        if sha256_file(target / name) != stated:
            raise CheckpointError(
                f"checkpoint file is damaged: {target / name}; remove {folder} to go on from the last finished task"
            )
    found = {}
    with _damage(f"{target / 'state.json'} is damaged: remove {folder} to go on from the last finished task"):
        for stem, skeleton in read_json(target / "state.json").items():
            path = target / f"{stem}.safetensors"
            found[stem] = unflatten_state(load_tensors(path) if path.exists() else {}, skeleton)
    return found


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", name) is not None


@contextlib.contextmanager
def _damage(message: str) -> Iterator[None]:
    """What a state of another form raises, as one line."""
    try:
        yield
    except CheckpointError:
        raise
    except (ConfigError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError):
        raise CheckpointError(message) from None


@contextlib.contextmanager
def taking_state(folder: Path) -> Iterator[None]:
    """Where a run takes up what :func:`load_latest` gave: what does not fit is damage, and is told as such."""
    with _damage(f"the checkpoint in {folder} does not fit this run: remove it to go on from the last finished task"):
        yield


def save_state(path: Path, state: Any) -> str:
    """Write a nested state as one safetensors file, whole or not at all; returns its SHA-256."""
    tensors, skeleton = flatten_state(state)
    with atomic_path(path) as temporary:
        save_tensors(temporary, tensors, {"skeleton": json.dumps(skeleton)})
    return sha256_file(path)


def load_state(path: Path, sha256: str, way_out: str) -> Any:
    """What :func:`save_state` wrote.

    Raises:
        CheckpointError: the file is missing, or is not the one with this hash; ``way_out`` says what to do then.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint file is missing: {path}; {way_out}")
    if sha256_file(path) != sha256:
        raise CheckpointError(f"checkpoint file is damaged: {path}; {way_out}")
    with _damage(f"checkpoint file is damaged: {path}; {way_out}"):
        with safe_open(path, framework="pt", device="cpu") as file:
            skeleton = json.loads(file.metadata()["skeleton"])
        return unflatten_state(load_tensors(path), skeleton)


def rng_state() -> dict[str, Any]:
    """The global torch generators' states, which strategies and third-party components may draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

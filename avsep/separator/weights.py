"""Saved separators: a folder with ``separator.yaml`` (the spec) and ``model.safetensors`` (the weights).

The weights file has the spec once more in its header, so that the two cannot be mixed up unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from avsep.encoders.visual._pretrained import weights_come_later
from avsep.errors import CheckpointError, ConfigError, RunError
from avsep.files import atomic_path, read_yaml, staging_folder, write_yaml
from avsep.runs.folder import RunFolder, TaskFolder
from avsep.separator.build import build_from_spec
from avsep.separator.module import Separator
from avsep.spec import SeparatorSpec, validated

__all__ = ["SPEC_FILE", "WEIGHTS_FILE", "load_separator", "save_separator", "weight_shapes"]

SPEC_FILE = "separator.yaml"
WEIGHTS_FILE = "model.safetensors"
_FORMAT = "avsep-separator-1"
MEANS_FILE = "class_means.safetensors"


def save_separator(separator: Separator, folder: str | os.PathLike[str], *, half: bool = False) -> None:
    """Write ``separator.yaml`` and ``model.safetensors``, each whole or not at all, and ``class_means.safetensors`` of
    a separator that keeps mean pictures of its classes.

    A new folder appears complete, and saving again under the same spec replaces the weights in one step. Where both
    files change in a folder that is there already, a kill between the two leaves whole weights beside the older yaml,
    which :func:`load_separator` reports; nothing is lost, for the weights file holds its own spec. With ``half``
    weights are rounded to half precision, which halves the file; running statistics, whose range is wider, are not.

    Raises:
        AvsepError: when the disk is full; what was there is unchanged.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file: a separator is saved as a folder, choose another name")
    spec = separator.spec.model_dump(mode="json")
    contents = {WEIGHTS_FILE: _weights_bytes(separator, spec, half)}
    if separator.class_means is not None:
        contents[MEANS_FILE] = _tensor_bytes(separator.class_means, spec)
    if _saved_spec(target) == spec:
        for name, content in contents.items():
            with atomic_path(target / name) as temporary:
                temporary.write_bytes(content)
        _without_old_means(target, contents)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # The pair changes together: write both beside the target before touching it.
    with staging_folder(target) as staging:
        for name, content in contents.items():
            with atomic_path(staging / name) as temporary:
                temporary.write_bytes(content)
        write_yaml(staging / SPEC_FILE, spec)
        if target.is_dir():
            for name in (*contents, SPEC_FILE):
                os.replace(staging / name, target / name)
            _without_old_means(target, contents)
        else:
            os.replace(staging, target)


def _without_old_means(target: Path, contents: Mapping[str, bytes]) -> None:
    """Mean pictures go with the weights that they were of, once these are replaced, and not before."""
    if MEANS_FILE not in contents:
        (target / MEANS_FILE).unlink(missing_ok=True)


def _weights_bytes(separator: Separator, spec: dict[str, Any], half: bool = False) -> bytes:
    """The weights file: the same bytes for the same weights and spec, with a hash of the tensors in its header."""
    state = separator.state_dict()
    if half:
        parameters = {name for name, _ in separator.named_parameters()}
        state = {n: v.half() if n in parameters and v.is_floating_point() else v for n, v in state.items()}
    return _tensor_bytes(state, spec)


def _tensor_bytes(state: Mapping[str, torch.Tensor], spec: dict[str, Any]) -> bytes:
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    plain = safetensors_bytes(tensors)
    size = int.from_bytes(plain[:8], "little")
    data = memoryview(plain)[8 + size :]
    metadata = {
        "format": _FORMAT,
        "spec": json.dumps(spec, sort_keys=True),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    # safetensors would write these keys in another order each time
    header = json.dumps({"__metadata__": metadata, **json.loads(plain[8 : 8 + size])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def _check_tensors_hash(path: Path) -> None:
    """Hold the tensors' bytes against the hash in the file's header; files of version 0.1 have none."""
    with _open_weights(path) as file:
        stated = (file.metadata() or {}).get("tensors_sha256")
    if stated is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != stated:
        raise CheckpointError(f"{path} is damaged: its tensors are not those that were saved; restore it from a copy")


def _saved_spec(folder: Path) -> Any:
    try:
        return read_yaml(folder / SPEC_FILE)
    except ConfigError:
        return None


def load_separator(folder_or_run: str | os.PathLike[str], task: int | None = None) -> Separator:
    """Load a saved separator, from its own folder or from a run (the last finished task, or ``task``), in eval mode.

    The global random state is left as it was.

    Raises:
        CheckpointError: when the folder is not a separator or a run, is damaged, or its two files do not belong
            together.
    """
    folder = _separator_folder(Path(folder_or_run), task)
    weights = folder / WEIGHTS_FILE
    of_task = TaskFolder(folder.parent)
    if folder.absolute() == of_task.separator.absolute() and of_task.is_finished:
        of_task.check_files()
    inside = _spec_in_weights(weights)
    spec = validated(SeparatorSpec, inside, str(weights))
    if (folder / SPEC_FILE).exists():
        _check_same_spec(folder, spec)
    with torch.random.fork_rng(devices=[]), weights_come_later():
        separator = build_from_spec(spec)
    _load_weights(separator, weights)
    separator.class_means = load_class_means(folder, spec)
    return separator.eval()


def load_class_means(folder: str | os.PathLike[str], spec: SeparatorSpec) -> dict[str, torch.Tensor] | None:
    """The mean pictures of the classes (``Separator.class_means``) of a saved separator; None where it keeps none.

    Raises:
        CheckpointError: the file is damaged, or of other classes.
    """
    path = Path(folder) / MEANS_FILE
    if not path.is_file():
        return None
    _spec_in_weights(path)
    with _open_weights(path) as file:
        means = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    for role, value in means.items():
        if role not in ("object", "motion") or len(value) != spec.num_classes:
            raise CheckpointError(
                f"{path}: '{role}' has {len(value)} rows, and the separator {spec.num_classes} classes"
            )
    _check_tensors_hash(path)
    return means or None


def _separator_folder(path: Path, task: int | None) -> Path:
    if not path.exists():
        raise CheckpointError(f"no such folder: {path}")
    if (path / SPEC_FILE).is_file() or (path / WEIGHTS_FILE).is_file():
        if task is not None:
            raise CheckpointError(f"{path} is one separator, not a run, so it has no task {task}: leave the task out")
        return path
    run = RunFolder(path)
    if not run.tasks.is_dir() and not run.is_run:
        raise CheckpointError(
            f"{path} is neither a separator ({SPEC_FILE} and {WEIGHTS_FILE}) nor a run (tasks/00/separator)"
        )
    folders = {int(entry.name): run.task(int(entry.name)) for entry in run.tasks.glob("*") if entry.name.isdigit()}
    finished = {number: folder.separator for number, folder in sorted(folders.items()) if folder.is_finished}
    if not finished:
        raise CheckpointError(f"{path} has no finished task yet: train it further (avsep train --resume)")
    if task is None:
        return finished[max(finished)]
    if task not in finished:
        raise CheckpointError(f"{path} has no finished task {task}: it has {', '.join(str(t) for t in finished)}")
    return finished[task]


@contextlib.contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({' '.join(str(error).split())}): restore it, or save it again"
        ) from None


def _spec_in_weights(path: Path) -> Any:
    with _open_weights(path) as file:
        header = file.metadata() or {}
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"{path} was not written by save_separator: its header does not say '{_FORMAT}'")
    try:
        return json.loads(header["spec"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{path} has no readable spec in its header: save it again") from None


def weight_shapes(folder: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a saved separator's tensors by name, without reading them."""
    with _open_weights(Path(folder) / WEIGHTS_FILE) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict)


def _check_same_spec(folder: Path, spec: SeparatorSpec) -> None:
    try:
        beside = validated(SeparatorSpec, read_yaml(folder / SPEC_FILE), str(folder / SPEC_FILE))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if beside != spec:
        one, other = spec.model_dump(), beside.model_dump()
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        raise CheckpointError(
            f"{folder / SPEC_FILE} and the spec inside {WEIGHTS_FILE} differ in {', '.join(keys)}: copy both files of "
            f"one save, or delete {SPEC_FILE} to go by the weights"
        )


def _load_weights(separator: Separator, path: Path) -> None:
    """Copy the file's tensors into the separator, or raise one line and change nothing."""
    with _open_weights(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    own = separator.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of its spec, among them '{missing[0]}'")
    if extra := sorted(state.keys() - own.keys()):
        raise CheckpointError(f"{path} has {len(extra)} tensors that its spec does not, among them '{extra[0]}'")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise CheckpointError(
                f"{path}: '{name}' has the shape {list(state[name].shape)}, the spec gives {list(value.shape)}"
            )
    _check_tensors_hash(path)
    separator.load_state_dict(state)

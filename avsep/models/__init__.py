"""Separators that come with the library: what they are, where they lie, and how a run of one's own begins with one.

A model is a folder of this package::

    card.json     what it knows, what it was trained on, what it reaches, and the SHA-256 of the other files
    separator/    as avsep.separator.save_separator writes it, with half-precision weights
    memory.zip    the rest of its run: the settings, the protocol, the record, and a store of its exemplars
    sample.flac   a mixture of two of its classes, to try it with

``scripts/ship_separator.py`` makes it.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from avsep.errors import CheckpointError, ConfigError, UnknownNameError, near_matches
from avsep.files import sha256_file, staging_folder

__all__ = ["DEFAULT", "Model", "begin_run", "find_model", "model_at", "models"]

DEFAULT = "instruments"
CARD_FILE = "card.json"
SAMPLE_FILE = "sample.flac"
_MEMORY_FILE = "memory.zip"
_MOST_BYTES = 1 << 28  # of what is unpacked


@dataclass(frozen=True)
class Model:
    """A separator that comes with the library, and its card.

    Attributes: ``name``; ``path``, its folder; ``classes`` that it is offered for, those of the card that beat a fixed
    filter on sounds of a bank that it was not trained with; ``card``, the whole of it.
    """

    name: str
    path: Path
    card: Mapping[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.card["classes"])

    @property
    def left_out(self) -> tuple[str, ...]:
        """Classes that it was trained on, and is not offered for."""
        return tuple(self.card["left_out"])

    @property
    def separator(self) -> Path:
        """The saved separator, as :func:`avsep.separator.load_separator` takes it."""
        return self.path / "separator"

    @property
    def sample(self) -> Path:
        """A mixture of two of its classes."""
        return self.path / SAMPLE_FILE

    @property
    def can_learn(self) -> bool:
        """Whether it brings exemplars, so that a run can begin with it."""
        return (self.path / _MEMORY_FILE).is_file()

    @property
    def why_left_out(self) -> str:
        """The reason that bundles give of those classes."""
        return "it is no better than a fixed filter there"

    def refuse_left_out(self, names: Iterable[str]) -> None:
        """Raise :class:`ConfigError` for a class, also as ``NAME=CLASS``, that it was trained on and is not offered
        for."""
        for name in names:
            if (of := name.rpartition("=")[2].strip()) in self.left_out:
                raise ConfigError(
                    f"model '{self.name}' does not separate '{of}' better than a fixed filter does, so it is not "
                    f"offered for it: train one of your own (avsep train), or ask for {', '.join(self.classes)}"
                )

    def check(self) -> None:
        """Hold its files against the hashes in its card.

        Raises:
            CheckpointError: a file is missing or was changed.
        """
        for name, stated in self.card["files"].items():
            file = self.path / name
            if not file.is_file() or sha256_file(file) != stated:
                raise CheckpointError(f"{file} is missing or damaged: install avsep again")


def models() -> list[Model]:
    """All that there are, by name."""
    found = [_read(path.parent) for path in Path(__file__).parent.glob(f"*/{CARD_FILE}")]
    return sorted(found, key=lambda model: model.name)


def _read(folder: Path) -> Model:
    return Model(folder.name, folder, json.loads((folder / CARD_FILE).read_text(encoding="utf-8")))


def find_model(name: str | None = None) -> Model:
    """A model by its name; without one the default.

    Raises:
        UnknownNameError: there is none of that name.
    """
    known = {model.name: model for model in models()}
    if (name or DEFAULT) not in known:
        raise UnknownNameError(f"no model '{name or DEFAULT}' comes with avsep: {near_matches(name or '', known)}")
    return known[name or DEFAULT]


def model_at(place: str | os.PathLike[str] | None) -> Model | None:
    """The model that is meant by what may also be a folder: without one the default, else that of this name, where
    there is no such folder. None of what is no model.

    Raises:
        UnknownNameError: there is no such folder, and the name is nearly a model's.
    """
    if place is None:
        return find_model()
    path = Path(place)
    if path.exists() or len(path.parts) != 1:
        return None
    known = {model.name: model for model in models()}
    if path.name not in known and get_close_matches(path.name, known):
        raise UnknownNameError(
            f"no folder '{path}' is here, and no model of that name: {near_matches(path.name, known)}"
        )
    return known.get(path.name)


def begin_run(model: Model, out: str | os.PathLike[str]) -> Path:
    """Make ``out`` a finished run of the model's, with its exemplars, which more can be taught.

    It appears whole or not at all. Returns the folder.

    Raises:
        ConfigError: ``out`` holds something already, or the model brings no exemplars.
        CheckpointError: a file of the model is damaged.
    """
    from avsep.files import entries

    target = Path(out)
    if not model.can_learn:
        raise ConfigError(f"model '{model.name}' brings no exemplars, without which nothing can be added to it")
    if target.is_file() or (target.is_dir() and entries(target)):
        raise ConfigError(f"{target} holds something already: choose another folder with --out")
    model.check()
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(model.path / _MEMORY_FILE) as archive, staging_folder(target) as staging:
        if sum(item.file_size for item in archive.infolist()) > _MOST_BYTES:
            raise CheckpointError(f"{model.path / _MEMORY_FILE} is damaged: install avsep again")
        archive.extractall(staging)  # leaves no member outside: zipfile takes '..' and roots away
        shutil.copytree(model.separator, staging / "tasks" / "00" / "separator", dirs_exist_ok=True)
        if target.is_dir():
            target.rmdir()
        os.replace(staging, target)
    return target

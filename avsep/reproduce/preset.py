"""Presets of grids: sizes of data, tasks, separators and training, as plain data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from avsep.errors import ConfigError, UnknownNameError, near_matches
from avsep.files import read_yaml
from avsep.spec import PRESETS, ComponentRef, SeparatorSpec, TrainSpec, load_preset, validated

__all__ = [
    "BasePreset",
    "GridPreset",
    "Hypothesis",
    "PresetModel",
    "SynthSettings",
    "list_grid_presets",
    "load_grid_preset",
    "presets_in",
    "read_preset",
]

_FOLDER = PRESETS / "reproduce"


class PresetModel(BaseModel):
    """Plain data with no keys that are not known."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Hypothesis(PresetModel):
    """What was predicted, before it was run, of a row's difference to another in SDR after the last task."""

    name: str
    row: str
    against: str
    predicted: Literal["+", "-", "0"]
    why: str


class SynthSettings(PresetModel):
    """What ``--dataset synth`` makes (:func:`avsep.data.synth.synthesis.synthesise`), and the frozen visual
    encoders whose object features are stored with it."""

    version: int = Field(1, description="of the offline benchmark; 2 asks for eyes")
    size: str = "small"
    classes: tuple[str, ...] | None = None
    clips_per_class: tuple[int, int, int] | None = None
    clip_s: float | None = None
    seed: int = Field(0, ge=0)
    features: tuple[str, ...] = ()


class BasePreset(PresetModel):
    """A base separator: a preset of ``avsep list presets``, and what is changed of it."""

    preset: str = Field(description="name, or the path of a YAML file")
    separator: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    strategies: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="over the grid's own, as what is tuned is tuned for each base"
    )


class GridPreset(PresetModel):
    """Everything that sizes a grid.

    ``strategies`` are parameters by strategy or, where both are there, by row (``lwf+memory``); those of a base go over
    them. ``strategy_train`` changes the training likewise. ``threads`` is the number of CPU threads of every cell,
    whatever runs beside it, since the last bits depend on it.

    ``orders="rotated"``: every seed has a class order of its own. The seeds go round in blocks of as many as there are
    tasks: the first block has the store's order, each other one a random order, and within a block the tasks move on by
    one place with each seed. So each class is equally often in the first task, in the second, and so on.

    ``updates``: optimisation steps of every task under every method, whatever its memory; the shares of current clips
    and exemplars in a batch stay as they are. None: as many as the clips and exemplars give, as published.
    """

    summary: str = ""
    source: str = ""
    measured: str = Field("", description="what the grid cost, where")
    dataset: SynthSettings = Field(default_factory=lambda: SynthSettings())
    tasks: int | tuple[tuple[str, ...], ...] = Field(5, description="classes a task, or the classes of each")
    orders: Literal["store", "rotated"] = "store"
    updates: int | None = Field(None, ge=1)
    protocol: str = "fixed"
    dependence: int = Field(
        0,
        ge=0,
        description="mixtures of each list that are separated once more with other pictures, after the last task",
    )
    bases: dict[str, BasePreset]
    train: dict[str, Any] = Field(default_factory=dict, description="for every base")
    memory: ComponentRef = Field(default_factory=lambda: ComponentRef(name="random_per_class", params={"per_class": 1}))
    budget_memory: ComponentRef = Field(
        default_factory=lambda: ComponentRef(name="random_per_class", params={"per_class": 1}),
        description="of the comparison at equal bytes, which sets its size",
    )
    memory_sizes: tuple[int, ...] = (1, 2, 3, 4, 10, 20, 30)
    strategies: dict[str, dict[str, Any]] = Field(default_factory=dict)
    strategy_train: dict[str, dict[str, Any]] = Field(default_factory=dict)
    tuning: dict[str, dict[str, tuple[float, ...]] | tuple[dict[str, float], ...]] = Field(
        default_factory=dict,
        description="what 'avsep reproduce tune' chooses from, by row: values of parameters, of which every "
        "combination is tried, or a list of settings",
    )
    seed: int = Field(1234, ge=0, description="of the first run; the others count on from it")
    seeds: int = Field(3, ge=1, description="of the tables, unless --seeds says otherwise")
    threads: int = Field(1, ge=1)
    seconds_per_step: dict[str, float] = Field(
        default_factory=dict, description="of a core, by base, scoring included, as they were measured: for --plan"
    )

    def separator(self, base: str, changes: Mapping[str, Any] | None = None) -> SeparatorSpec:
        """The base separator's spec, without classes, with ``changes`` put over it."""
        entry = self.bases[base]
        data = _merged(_merged(load_preset(entry.preset)["separator"], entry.separator), changes or {})
        return validated(SeparatorSpec, {"num_classes": 1, **data}, f"base '{base}'")

    def params(self, base: str, row: str, strategy: str) -> dict[str, Any]:
        """The strategy's parameters in a row of a base: the most specific that the preset has."""
        for found in (self.bases[base].strategies, self.strategies):
            for name in (row, strategy):
                if name in found:
                    return dict(found[name])
        return {}

    def candidates(self, row: str) -> list[dict[str, float]]:
        """The settings among which a row's are chosen."""
        found = self.tuning[row]
        if isinstance(found, tuple):
            return [dict(one) for one in found]
        return [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())]

    def train_spec(self, base: str, *changes: Mapping[str, Any]) -> TrainSpec:
        """The base separator's training, with ``changes`` put over it one after the other."""
        entry = self.bases[base]
        data = load_preset(entry.preset).get("train", {})
        for more in (self.train, entry.train, *changes):
            data = _merged(data, more)
        made: TrainSpec = validated(TrainSpec, data, f"base '{base}'")
        return made if self.updates is None else self._with_updates(made, base)

    def _with_updates(self, train: TrainSpec, base: str) -> TrainSpec:
        """Lists long enough for the steps of an epoch of the base's usual number of epochs: a row with more has more
        steps."""
        entry = self.bases[base]
        usual = _merged(_merged(load_preset(entry.preset).get("train", {}), self.train), entry.train)
        epochs = int(usual.get("epochs", train.epochs))
        if self.updates is None or self.updates % epochs:
            raise ConfigError(f"updates = {self.updates} do not divide into {epochs} epochs: choose a multiple")
        steps = self.updates // epochs
        times = -(-steps * train.batch_size // train.current_repeats)  # for one clip enough, and a longer list is cut
        return train.model_copy(
            update={
                "steps_per_epoch": steps,
                "current_repeats": train.current_repeats * times,
                "memory_repeats": train.memory_repeats * times,
            }
        )

    def check_bases(self, names: Iterable[str]) -> None:
        """Raise :class:`UnknownNameError` for a base separator that the preset does not have."""
        for name in names:
            if name not in self.bases:
                raise UnknownNameError(f"no base separator named '{name}': {near_matches(name, self.bases)}")


def _merged(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with ``changes`` put over it, mapping by mapping; None in ``changes`` takes a key away."""
    out = copy.deepcopy(dict(data))
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = _merged(out[key], value)
        else:
            out[key] = copy.deepcopy(value)
    return out


def presets_in(folder: Path) -> dict[str, str]:
    """Names and summaries of the presets in a folder."""
    return {p.stem: (read_yaml(p) or {}).get("summary", "") for p in sorted(folder.glob("*.yaml"))}


def list_grid_presets() -> dict[str, str]:
    """Names and summaries of the presets of ``avsep reproduce``."""
    return presets_in(_FOLDER)


def load_grid_preset(name: str) -> GridPreset:
    """A grid's preset by name, or from a YAML file.

    Raises:
        UnknownNameError: no such preset.
        ConfigError: the file is not one.
    """
    preset = read_preset(name, _FOLDER, GridPreset, needs="bases", command="avsep reproduce")
    if not preset.bases:
        raise ConfigError(f"{name}: 'bases' is empty: name at least one base separator")
    return preset


_P = TypeVar("_P", bound=PresetModel)


def read_preset(name: str, folder: Path, model: type[_P], *, needs: str, command: str) -> _P:
    """A preset of ``command`` by its name in ``folder``, or from a YAML file, which has the key ``needs``.

    Raises:
        UnknownNameError: no such preset.
        ConfigError: the file is not one.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise UnknownNameError(
                f"no preset of {command} named '{name}': {near_matches(name, presets_in(folder))} (a file of one's own "
                "ends in .yaml)"
            )
    data = read_yaml(path)
    if not isinstance(data, dict) or needs not in data:
        raise ConfigError(f"{path} is not a preset of {command}: it has no '{needs}' (for one that is, see {folder})")
    made: _P = validated(model, data, str(path))
    return made

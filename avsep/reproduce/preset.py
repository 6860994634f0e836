"""Presets of grids: sizes of data, tasks, separators and training, as plain data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from avsep.errors import ConfigError, UnknownNameError, near_matches
from avsep.files import read_yaml
from avsep.spec import PRESETS, ComponentRef, SeparatorSpec, TrainSpec, load_preset, validated

__all__ = ["BasePreset", "GridPreset", "SynthSettings", "list_grid_presets", "load_grid_preset"]

_FOLDER = PRESETS / "reproduce"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class SynthSettings(_Model):
    """What ``--dataset synth`` makes (:func:`avsep.data.synth.synthesis.synthesise`), and the frozen visual
    encoders whose object features are stored with it."""

    size: str = "small"
    classes: tuple[str, ...] | None = None
    clips_per_class: tuple[int, int, int] | None = None
    clip_s: float | None = None
    seed: int = Field(0, ge=0)
    features: tuple[str, ...] = ()


class BasePreset(_Model):
    """A base separator: a preset of ``avsep list presets``, and what is changed of it."""

    preset: str = Field(description="name, or the path of a YAML file")
    separator: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class GridPreset(_Model):
    """Everything that sizes a grid.

    ``strategies`` are parameters by strategy, each chosen once and used on both bases; ``strategy_train`` changes the
    training under a strategy. ``threads`` is the number of CPU threads of every cell, whatever runs beside it, since
    the last bits depend on it.
    """

    summary: str = ""
    source: str = ""
    measured: str = Field("", description="what the grid cost, where")
    dataset: SynthSettings = Field(default_factory=lambda: SynthSettings())
    tasks: int | tuple[tuple[str, ...], ...] = Field(5, description="classes a task, or the classes of each")
    protocol: str = "fixed"
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
    tuning: dict[str, dict[str, tuple[float, ...]]] = Field(
        default_factory=dict, description="values to choose from by 'avsep reproduce tune', by strategy and parameter"
    )
    seed: int = Field(1234, ge=0, description="of the first run; the others count on from it")
    threads: int = Field(1, ge=1)

    def separator(self, base: str) -> SeparatorSpec:
        """The base separator's spec, without classes."""
        entry = self.bases[base]
        data = {"num_classes": 1, **_merged(load_preset(entry.preset)["separator"], entry.separator)}
        return validated(SeparatorSpec, data, f"base '{base}'")

    def train_spec(self, base: str, *changes: Mapping[str, Any]) -> TrainSpec:
        """The base separator's training, with ``changes`` put over it one after the other."""
        entry = self.bases[base]
        data = load_preset(entry.preset).get("train", {})
        for more in (self.train, entry.train, *changes):
            data = _merged(data, more)
        return validated(TrainSpec, data, f"base '{base}'")

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


def list_grid_presets() -> dict[str, str]:
    """Names and summaries of the presets of ``avsep reproduce``."""
    return {p.stem: (read_yaml(p) or {}).get("summary", "") for p in sorted(_FOLDER.glob("*.yaml"))}


def load_grid_preset(name: str) -> GridPreset:
    """A grid's preset by name, or from a YAML file.

    Raises:
        UnknownNameError: no such preset.
        ConfigError: the file is not one.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = _FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise UnknownNameError(
                f"no preset of avsep reproduce named '{name}': {near_matches(name, list_grid_presets())} (a file of "
                "one's own ends in .yaml)"
            )
    data = read_yaml(path)
    if not isinstance(data, dict) or "bases" not in data:
        raise ConfigError(
            f"{path} is not a preset of avsep reproduce: it has no 'bases' (for one that is, see {_FOLDER})"
        )
    preset = validated(GridPreset, data, str(path))
    if not preset.bases:
        raise ConfigError(f"{path}: 'bases' is empty: name at least one base separator")
    return preset

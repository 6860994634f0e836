"""What the released code of ContAV-Sep does otherwise than avsep, as settings (docs/fidelity.md says why)."""

from __future__ import annotations

from typing import Any

from avsep.errors import UnknownNameError, near_matches
from avsep.registry import MEMORIES, STRATEGIES
from avsep.spec import ComponentRef, validated

__all__ = ["RELEASED", "RELEASED_MEMORY", "RELEASED_STRATEGY", "apply_fidelity"]

RELEASED: dict[str, Any] = {
    "separator": {"front_end": {"align_corners": False}},
    "train": {
        "partner": "any",
        "crop": "published",
        "gain": [0.5, 1.5],
        "current_repeats": 40,
        "memory_repeats": 800,
        "memory_share": "grow",
        "precision": "16-mixed",
    },
    "protocol": "paper",
    "validation_protocol": "paper",
}
"""Settings of a run, by their place in its spec."""

RELEASED_STRATEGY: dict[str, Any] = {"teacher_batch_norm": "train", "instance": "features"}
"""Parameters of whichever strategy has them; ``instance`` where there are motion features to compare."""

RELEASED_MEMORY: dict[str, Any] = {"short_class": "all"}
"""Parameters of whichever memory policy has them."""


def apply_fidelity(data: dict[str, Any], name: str) -> dict[str, Any]:
    """Put every setting of ``name``, which is ``released``, into a run spec's plain data, in place.

    Only what makes a difference in kind: sizes, rates and epochs stay the preset's. Raises :class:`UnknownNameError`
    for another name.
    """
    if name != "released":
        raise UnknownNameError(f"no fidelity '{name}': {near_matches(name, ['released'])}")
    _merge(data, RELEASED)
    for part, registry, values in (("strategy", STRATEGIES, RELEASED_STRATEGY), ("memory", MEMORIES, RELEASED_MEMORY)):
        ref = validated(ComponentRef, {"name": data[part]} if isinstance(data[part], str) else data[part], part)
        has = {parameter.name for parameter in registry.get(ref.name).settings}
        if not data["separator"].get("motion_encoder"):
            has -= {"instance"}
        released = {key: value for key, value in values.items() if key in has}
        data[part] = {"name": ref.name, "params": {**ref.params, **released}}
    return data


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value

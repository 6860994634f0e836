"""Writes docs/settings.md: every setting of a run, from the models in avsep/spec.py and what the registry knows.

python scripts/settings.py            # write it
python scripts/settings.py --check    # exit code 1 where it is not what they say
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from page import cell, main, prose
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from avsep.registry import REGISTRIES
from avsep.spec import ComponentRef, OptimizerSpec, RunSpec

HEAD = """# Settings

Every setting of a run stands in the `run.yaml` of its folder, and can be given to `avsep train` and `avsep learn` as
`--set KEY=VALUE`, such as `--set train.epochs=20`. A preset (`avsep list presets`) is a file with the keys
`separator` and `train`. A setting whose type is *component* is a name from the table that it links to, or
`{name: NAME, params: {...}}`.

This page is written by `scripts/settings.py`.
"""
# setting -> the registry of its components
COMPONENTS = {
    "separator.audio_encoder": "audio_encoders",
    "separator.mask_decoder": "mask_decoders",
    "separator.object_encoder": "visual_encoders",
    "separator.motion_encoder": "visual_encoders",
    "separator.adapter": "adapters",
    "strategy": "strategies",
    "memory": "memories",
    "train.mixer": "mixers",
}


def parts(annotation: Any) -> list[Any]:
    """The members of a union, or the one type."""
    if get_origin(annotation) is Annotated:
        return parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for member in get_args(annotation) for part in parts(member)]
    return [annotation]


def limits(field: FieldInfo) -> str:
    """The range of a number, such as ``1 to 256``."""
    found = {key: getattr(one, key) for one in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(one, key)}
    texts = {
        key: "2^63" if value == 2**63 else f"{value:,g}" if value < 1e5 else f"{int(value):,}"
        for key, value in found.items()
    }
    words = (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))
    return " ".join(f"{word} {texts[key]}" for key, word in words if key in texts)


def kind(key: str, field: FieldInfo) -> str:
    """The type of a setting, in a word or two."""
    texts = []
    for part in parts(field.annotation):
        if get_origin(part) is Literal:
            texts.append(", ".join(f"`{value}`" for value in get_args(part)))
        elif part is ComponentRef or (get_origin(part) is tuple and ComponentRef in get_args(part)):
            link = f"[component](#{COMPONENTS[key].replace('_', '-')})"
            texts.append(link if part is ComponentRef else "a list of them")
        elif get_origin(part) is tuple:
            inner = get_args(part)
            if get_origin(inner[0]) is tuple:
                texts.append("list of lists of names")
            elif inner[-1] is Ellipsis:
                texts.append(f"list of {'names' if inner[0] is str else 'whole numbers'}")
            else:
                texts.append(f"{len(inner)} numbers")
        elif part is not type(None):
            names = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
            texts.append(f"{names[part]} {limits(field)}".strip())
    return " or ".join(texts)


def default(field: FieldInfo) -> str:
    """The default of a setting as ``run.yaml`` has it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "must be given"
    if isinstance(value, ComponentRef):
        return f"`{value.name}`"
    if value is None or value == "" or value == ():
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


def rows(model: type[BaseModel], prefix: str, below: list[tuple[str, FieldInfo, type[BaseModel]]]) -> Iterator[str]:
    """A line for each setting of a group; the groups in it go to ``below``."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if inner := next((p for p in parts(field.annotation) if inspect.isclass(p) and group(p)), None):
            below.append((key, field, inner))
        elif get_origin(field.annotation) is dict:
            yield f"| `{key}.GROUP` | as `train.audio` | unset | {cell(field.description or '')} |"
        else:
            texts = [f"`{key}`", kind(key, field), default(field), cell(field.description or "")]
            yield "| " + " | ".join(texts) + " |"


def group(annotation: type) -> bool:
    return issubclass(annotation, BaseModel) and annotation is not ComponentRef


def of_model(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The table of a group, and those of the groups in it. All optimisers have the settings of the first."""
    below: list[tuple[str, FieldInfo, type[BaseModel]]] = []
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|", *rows(model, prefix, below)]
    optimisers = [key for key, _, inner in below if inner is OptimizerSpec]
    for key, field, inner in below:
        if key in optimisers[1:]:
            continue
        title = f"`{key}`" if inner is not OptimizerSpec else ", ".join(f"`{one}`" for one in optimisers)
        about = f"{(field.description or '').capitalize()}." if inner is not OptimizerSpec else inner.__doc__ or ""
        lines += [f"\n## {title}\n", f"{about}\n"]
        lines += of_model(inner, f"{key}.")
    return lines


def of_components() -> list[str]:
    """The components of every kind, with their parameters."""
    lines = []
    for key, registry in REGISTRIES.items():
        lines += [f"\n## {key.replace('_', ' ').capitalize()}\n"]
        settings = [one for one, of in COMPONENTS.items() if of == key]
        named = " or ".join(f"`{one}`" for one in settings)
        lines += [f"Of {named}; parameters are set by `--set {settings[0]}.params.NAME=VALUE`."]
        for spec in registry:
            if spec.package != "avsep":
                continue
            body = inspect.cleandoc(spec.factory.__doc__ or "").split("\nRaises:")[0]
            lines += [f"\n### `{spec.name}`\n", prose(body).strip()]
            if spec.settings:
                lines += ["\n| parameter | type | default |", "|---|---|---|"]
            for parameter in spec.settings:
                value = "must be given" if parameter.required else f"`{parameter.default!r}`"
                lines += [f"| `{parameter.name}` | {cell(f'`{parameter.annotation}`')} | {value} |"]
    return lines


def page() -> str:
    return "\n".join([HEAD, *of_model(RunSpec), *of_components()]) + "\n"


if __name__ == "__main__":
    sys.exit(main("settings.md", page()))

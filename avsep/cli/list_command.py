"""``avsep list [KIND]``: what a separator and a learner can be composed of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["command"]


def command(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="audio_encoders, visual_encoders, mask_decoders, adapters, strategies, memories, mixers, presets or "
            "protocols; all without it.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List components, presets and protocols: name, summary, parameters with their defaults, source.

    With --quiet the names alone, one a line.
    """
    from avsep.errors import UnknownNameError, near_matches
    from avsep.registry import REGISTRIES

    output = Output(json=json, quiet=quiet, verbose=verbose)
    other = {"presets": _presets, "protocols": _protocols}
    kinds = [*REGISTRIES, *other]
    if kind is not None and kind not in kinds:
        raise UnknownNameError(f"nothing to list under '{kind}': {near_matches(kind, kinds)}")
    chosen = kinds if kind is None else [kind]
    found = {key: other[key]() if key in other else _components(key) for key in chosen}
    output.result(found)
    for key, rows in found.items():
        output.show(_table(key, rows))
        if quiet and not json:
            typer.echo("\n".join(row["name"] for row in rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(rows[0] if rows else ("name",)):
        table.add_column(column, no_wrap=i == 0, overflow="fold", style="cyan" if i == 0 else None)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, list):  # parameters
        value = "\n".join(p["name"] + (" (required)" if p["required"] else f"={p['default']!r}") for p in value)
    return str(value) or "-"


def _components(key: str) -> list[dict[str, Any]]:
    from avsep.registry import REGISTRIES

    return [
        {
            "name": spec.name,
            "summary": spec.summary,
            "parameters": [
                {"name": p.name, "kind": p.annotation, "required": p.required}
                | ({} if p.required else {"default": p.default})
                for p in spec.settings
            ],
            "source": spec.source if spec.package == "avsep" else f"{spec.source} [package {spec.package}]".strip(),
        }
        for spec in REGISTRIES[key]
    ]


def _presets() -> list[dict[str, Any]]:
    from avsep.spec import list_presets, load_preset

    return [
        {"name": name, "summary": summary, "source": str(load_preset(name).get("source", ""))}
        for name, summary in list_presets().items()
    ]


def _protocols() -> list[dict[str, Any]]:
    from avsep.data.protocol import PROTOCOLS

    return [{"name": name, "version": kind.version, "summary": kind.summary} for name, kind in PROTOCOLS.items()]

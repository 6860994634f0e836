"""``avsep list [KIND]``: what a separator and a learner can be composed of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

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
) -> None:
    """List components, presets and protocols: name, summary, parameters with their defaults, source."""
    from avsep.errors import UnknownNameError, near_matches
    from avsep.progress import terminal
    from avsep.registry import REGISTRIES

    other = {"presets": _presets, "protocols": _protocols}
    kinds = [*REGISTRIES, *other]
    if kind is not None and kind not in kinds:
        raise UnknownNameError(f"nothing to list under '{kind}': {near_matches(kind, kinds)}")
    console = terminal()
    for key in kinds if kind is None else [kind]:
        console.print(other[key]() if key in other else _components(key))


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, overflow="fold", style="cyan" if i == 0 else None)
    return table


def _components(key: str) -> Table:
    from avsep.registry import REGISTRIES

    table = _table(key, "name", "summary", "parameters", "source")
    for spec in REGISTRIES[key]:
        parameters = "\n".join(str(p) + (" (required)" if p.required else "") for p in spec.settings)
        source = spec.source if spec.package == "avsep" else f"{spec.source} [package {spec.package}]".strip()
        table.add_row(spec.name, spec.summary, parameters or "-", source or "-")
    return table


def _presets() -> Table:
    from avsep.spec import list_presets, load_preset

    table = _table("presets", "name", "summary", "source")
    for name, summary in list_presets().items():
        table.add_row(name, summary, str(load_preset(name).get("source", "-")))
    return table


def _protocols() -> Table:
    from avsep.data.protocol import PROTOCOLS

    table = _table("protocols", "name", "version", "summary")
    for name, kind in PROTOCOLS.items():
        table.add_row(name, str(kind.version), kind.summary)
    return table

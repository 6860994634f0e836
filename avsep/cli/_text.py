"""Texts that several commands read and write alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from avsep.export.runtime.names import names_in

if TYPE_CHECKING:
    from avsep.data.store import Store

__all__ = ["extent", "facts_of", "names_in", "warnings_in_a_line"]


def extent(store: Store) -> str:
    """How much a store holds, in a line."""
    facts = facts_of(store)
    return (
        f"{len(store.clips)} clips of {len(store.classes)} classes, {facts['seconds'] / 60:.1f} minutes, "
        f"{facts['bytes'] / 1e6:.0f} MB"
    )


def facts_of(store: Store) -> dict[str, Any]:
    """What ``--json`` says of a store."""
    from avsep.data.store import SPLITS

    return {
        "store": store.path,
        "clips": {split: len(store.select(split=split)) for split in SPLITS},
        "classes": list(store.classes),
        "seconds": sum(c.samples for c in store.clips) / store.sample_rate_hz,
        "bytes": sum(r["bytes"] for e in store.manifest["clips"] for r in e["files"].values()),
        "rate_hz": store.sample_rate_hz,
        "content_hash": store.content_hash,
    }


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """What is warned of inside is told as a command tells things: in a line on standard error, without the code's."""
    import warnings

    import typer

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: typer.echo(f"avsep: {message}", err=True)
        yield

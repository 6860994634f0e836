"""Texts that several commands read and write alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avsep.export.runtime.names import names_in

if TYPE_CHECKING:
    from avsep.data.store import Store

__all__ = ["extent", "names_in"]


def extent(store: Store) -> str:
    """How much a store holds, in a line."""
    minutes = sum(c.samples for c in store.clips) / store.sample_rate_hz / 60
    size = sum(r["bytes"] for e in store.manifest["clips"] for r in e["files"].values())
    return f"{len(store.clips)} clips of {len(store.classes)} classes, {minutes:.1f} minutes, {size / 1e6:.0f} MB"

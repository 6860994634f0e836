"""Separation of recordings of any length with a network of fixed length; it lives in the runtime of bundles."""

from __future__ import annotations

from avsep.export.runtime.chunking import (
    Chunk,
    LongStream,
    context_in_samples,
    default_context,
    default_crossfade,
    plan_chunks,
    separate_long,
)

__all__ = [
    "Chunk",
    "LongStream",
    "context_in_samples",
    "default_context",
    "default_crossfade",
    "plan_chunks",
    "separate_long",
]

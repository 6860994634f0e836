"""Frames or stored visual features beside a recording, and their file; they live in the runtime of bundles."""

from __future__ import annotations

from avsep.export.runtime.timeline import VisualTimeline, read_visual_file, write_visual_file

__all__ = ["VisualTimeline", "read_visual_file", "write_visual_file"]

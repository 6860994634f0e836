"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest

from avsep.kernels import _backend


@pytest.fixture
def auto_takes_triton(monkeypatch):
    """``auto`` takes Triton wherever it can, as on a GPU on which it was measured to win."""
    monkeypatch.delenv(_backend.VARIABLE, raising=False)
    monkeypatch.setattr(_backend, "_device_type", lambda device: "cuda")
    monkeypatch.setattr(_backend, "_TRITON_FROM", dict.fromkeys(_backend.OPERATIONS, 0))

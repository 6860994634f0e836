"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

# OpenMP threads that wait by spinning make a busy machine many times slower; before torch is imported anywhere.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for every core: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from avsep.data.store import Store
from support.tones import bundle_separator, make_tone_store, stream_of, tiny_learner

# Without a GPU the Triton kernels run under Triton's interpreter, which must be known before Triton is imported. What
# does not ask for Triton by name is not touched by it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def threads_stay():
    """The last bits of a run depend on the number of threads: a test that left another would spoil those after it."""
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture
def one_thread():
    """PyTorch computes in one thread, and as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No published weights and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AVSEP_WEIGHTS", raising=False)


@pytest.fixture(scope="session")
def tone_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four classes of tones. Read only."""
    return make_tone_store(tmp_path_factory.mktemp("tones") / "store")


@pytest.fixture
def store(tone_store: Path) -> Store:
    """``tone_store``, open."""
    return Store.open(tone_store)


@pytest.fixture(scope="session")
def tone_run(tone_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished two-task ContAV-Sep run over ``tone_store``. Read only: copy it before changing it."""
    out = tmp_path_factory.mktemp("tone-run") / "run"
    tiny_learner().fit(stream_of(tone_store), out, progress=False)
    return out


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of :func:`bundle_separator`, as a folder. Read only: copy it before changing it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.export import export

    return export(bundle_separator(), None, tmp_path_factory.mktemp("bundles") / "tiny", made_from="a test").path

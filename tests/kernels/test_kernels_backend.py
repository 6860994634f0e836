from __future__ import annotations

import pytest
import torch

from avsep import kernels
from avsep.errors import ConfigError
from avsep.kernels import _backend


@pytest.fixture
def plain(monkeypatch):
    """As on a machine with Triton, without any variable set."""
    monkeypatch.delenv(_backend.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_backend, "_HAS_TRITON", True)
    return monkeypatch


def test_the_table_decides_by_size_on_a_gpu(plain):
    plain.setitem(_backend._TRITON_FROM, "mask_head", 100)
    assert _backend.choose_backend("auto", "mask_head", 99, "cuda") == "torch"
    assert _backend.choose_backend("auto", "mask_head", 100, "cuda:1") == "triton"
    assert _backend.choose_backend("auto", "mask_head", 100, torch.device("cuda", 1)) == "triton"
    assert _backend.choose_backend("auto", "mask_head", 100, "cpu") == "torch"
    assert _backend.choose_backend("triton", "mask_head", 1, "cuda") == "triton"
    plain.setitem(_backend._TRITON_FROM, "mask_head", None)
    assert _backend.choose_backend("auto", "mask_head", 1 << 40, "cuda") == "torch"


def test_every_operation_has_its_place_in_the_table():
    assert set(_backend._TRITON_FROM) == set(_backend.OPERATIONS)


def test_auto_never_interprets(plain):
    """The interpreter is for checking: only who asks for Triton gets it."""
    plain.setenv("TRITON_INTERPRET", "1")
    plain.setitem(_backend._TRITON_FROM, "mask_head", 0)
    assert _backend.choose_backend("auto", "mask_head", 5, "cpu") == "torch"
    assert _backend.choose_backend("triton", "mask_head", 5, "cpu") == "triton"


def test_triton_where_it_cannot_run_is_refused(plain):
    with pytest.raises(
        ConfigError, match="backend='triton': Triton kernels run on NVIDIA GPUs and the tensors are on cpu"
    ):
        _backend.choose_backend("triton", "mask_head", 1, "cpu")
    plain.setenv(_backend.VARIABLE, "triton")
    with pytest.raises(ConfigError, match=r"AVSEP_KERNELS=triton: Triton kernels run on NVIDIA GPUs.*or use 'torch'"):
        _backend.choose_backend("auto", "mask_head", 1, "cpu")
    plain.setattr(_backend, "_HAS_TRITON", False)
    with pytest.raises(ConfigError, match="the package triton is not installed"):
        _backend.choose_backend("auto", "mask_head", 1, "cuda")


def test_the_argument_wins_over_the_variable(plain):
    plain.setitem(_backend._TRITON_FROM, "mask_head", 0)
    plain.setenv(_backend.VARIABLE, "torch")
    assert _backend.choose_backend("auto", "mask_head", 5, "cuda") == "torch"
    assert _backend.choose_backend("triton", "mask_head", 5, "cuda") == "triton"


def test_wrong_names_are_named(plain):
    with pytest.raises(ConfigError, match=r"backend='tritn' is no backend: did you mean 'triton'\?"):
        _backend.choose_backend("tritn", "mask_head", 1, "cpu")
    with pytest.raises(ConfigError, match=r"no operation named 'mask_heat': did you mean 'mask_head'\?"):
        _backend.choose_backend("auto", "mask_heat", 1, "cpu")
    plain.setenv(_backend.VARIABLE, "cuda")
    with pytest.raises(ConfigError, match="AVSEP_KERNELS=cuda is no backend"):
        _backend.choose_backend("auto", "mask_head", 1, "cpu")


def test_every_operation_listens_to_the_variable(monkeypatch):
    monkeypatch.setenv(_backend.VARIABLE, "nonsense")
    ids = torch.arange(2)
    calls = (
        lambda: kernels.similarity_distillation([torch.eye(2)] * 2, ids, ids),
        lambda: kernels.analyse(torch.zeros(1, 1, 2048)),
        lambda: kernels.synthesise(torch.zeros(1, 1, 8, 3), torch.zeros(1, 512, 3, dtype=torch.complex64)),
        lambda: kernels.mask_head(torch.zeros(1, 1, 2), torch.zeros(1, 2, 3, 3)),
        lambda: kernels.mask_head_losses(
            torch.zeros(1, 1, 2), torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
        ),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="AVSEP_KERNELS=nonsense"):
            call()

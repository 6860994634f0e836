from __future__ import annotations

import pytest
import torch

from avsep import kernels
from avsep.errors import ConfigError
from avsep.kernels import _backend


def test_torch_is_the_choice_while_there_is_no_triton_kernel(monkeypatch):
    monkeypatch.delenv(_backend.VARIABLE, raising=False)
    for op in ("similarity_distillation", "stft_masking", "mask_head"):
        if "triton" not in kernels.available_backends(op):
            assert kernels.choose_backend("auto", op, 1 << 30) == "torch"
            with pytest.raises(ConfigError, match=f"{op} has no Triton kernel"):
                kernels.choose_backend("triton", op, 1)


def test_the_table_decides_by_size(monkeypatch):
    monkeypatch.delenv(_backend.VARIABLE, raising=False)
    monkeypatch.setitem(_backend._TRITON_FROM, "mask_head", 100)
    assert kernels.choose_backend("auto", "mask_head", 99) == "torch"
    assert kernels.choose_backend("auto", "mask_head", 100) == "triton"
    assert kernels.choose_backend("triton", "mask_head", 1) == "triton"
    assert kernels.available_backends("mask_head") == ("torch", "triton")


def test_the_argument_wins_over_the_variable(monkeypatch):
    monkeypatch.setitem(_backend._TRITON_FROM, "mask_head", 0)
    monkeypatch.setenv(_backend.VARIABLE, "torch")
    assert kernels.choose_backend("auto", "mask_head", 5) == "torch"
    assert kernels.choose_backend("triton", "mask_head", 5) == "triton"


def test_wrong_names_are_named(monkeypatch):
    monkeypatch.delenv(_backend.VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"backend='tritn' is no backend: did you mean 'triton'\?"):
        kernels.choose_backend("tritn", "mask_head", 1)
    with pytest.raises(ConfigError, match=r"no operation named 'mask_heat': did you mean 'mask_head'\?"):
        kernels.choose_backend("auto", "mask_heat", 1)
    monkeypatch.setenv(_backend.VARIABLE, "cuda")
    with pytest.raises(ConfigError, match="AVSEP_KERNELS=cuda is no backend"):
        kernels.choose_backend("auto", "mask_head", 1)


def test_every_operation_listens_to_the_variable(monkeypatch):
    monkeypatch.setenv(_backend.VARIABLE, "nonsense")
    ids = torch.arange(2)
    calls = (
        lambda: kernels.similarity_distillation([torch.eye(2)] * 2, ids, ids),
        lambda: kernels.analyse(torch.zeros(1, 1, 2048)),
        lambda: kernels.synthesise(torch.zeros(1, 1, 8, 3), torch.zeros(1, 512, 3, dtype=torch.complex64)),
        lambda: kernels.mask_head(torch.zeros(1, 1, 2), torch.zeros(1, 2, 3, 3)),
        lambda: kernels.mask_l1(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="AVSEP_KERNELS=nonsense"):
            call()

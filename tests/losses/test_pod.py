"""Local POD: the worked value, the literal loop over cells, sizes, layouts and gradients."""

from __future__ import annotations

import pytest
import torch

from avsep.losses import pod_distance, pod_embedding
from support.strategy_steps import literal_pod


def _maps(shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def test_the_worked_value():
    x, y = torch.full((1, 1, 4, 4), 2.0), torch.ones(1, 1, 4, 4)
    assert pod_embedding(x**2).shape == (1, 56)
    assert torch.equal(pod_embedding(x**2), torch.full((1, 56), 4.0))
    assert float(pod_distance(x, y)) == pytest.approx(22.4499, abs=5e-5)  # 3 sqrt(56)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 2, 8, 16), (2, 3, 7, 13), (1, 5, 16, 6)])
def test_equals_the_loop_over_cells(shape):
    x, y = _maps(shape)
    x.requires_grad_()
    expected = torch.linalg.vector_norm(literal_pod(x) - literal_pod(y), dim=1).mean()
    (gradient,) = torch.autograd.grad(expected, x)
    for student in (x, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        distance = pod_distance(student, y)
        torch.testing.assert_close(distance, expected.float())
        torch.testing.assert_close(torch.autograd.grad(distance, student)[0], gradient, rtol=1e-4, atol=1e-6)
    # the same numbers, in whatever order the cells come
    ours, theirs = pod_embedding(x.detach() ** 2), literal_pod(x.detach()).float()
    torch.testing.assert_close(ours.sort(dim=1).values, theirs.sort(dim=1).values, rtol=1e-5, atol=1e-6)


def test_the_norm_is_per_mixture():
    x, y = _maps((2, 3, 8, 8))
    each = [pod_distance(x[i : i + 1], y[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(pod_distance(x, y), (each[0] + each[1]) / 2)


def test_equal_maps_have_distance_and_gradient_zero():
    x = _maps((2, 3, 8, 8))[0].requires_grad_()
    distance = pod_distance(x, x.detach())
    distance.backward()
    assert distance.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_half_precision_maps_are_compared_in_single():
    x, y = (m.bfloat16() for m in _maps((2, 3, 8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = pod_distance(x, y)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, pod_distance(x.float(), y.float()))


def test_maps_too_small_for_the_finest_cells_are_refused():
    with pytest.raises(ValueError, match="up to 4 x 4 cells, and got one of 3 x 8"):
        pod_distance(torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8))

"""The divergence between similarities: values by hand, and what it does not see."""

from __future__ import annotations

import math

import pytest
import torch

from avsep.losses import relation_divergence

A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
M = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)


def _literal(rows, columns, teacher_rows, teacher_columns, temperature, include_self=True):
    """One row and one column at a time."""
    total = 0.0
    for p in range(len(rows)):
        places = [q for q in range(len(columns)) if include_self or q != p]
        shares = []
        for a, b in ((rows, columns), (teacher_rows, teacher_columns)):
            cosines = [float(a[p] @ b[q] / (a[p].norm() * b[q].norm())) / temperature for q in places]
            exponentials = [math.exp(c - max(cosines)) for c in cosines]
            shares.append([e / sum(exponentials) for e in exponentials])
        total += sum(t * math.log(t / s) for s, t in zip(*shares, strict=True) if t > 0)
    return total / len(rows)


def test_values_by_hand():
    """Only the third source differs: cosines (.6, .8, .8) in place of (0, 1, 1)."""
    for temperature, want in ((0.07, 0.00944), (1.0, 0.01667)):
        found = relation_divergence(A, M, M, M, temperature=temperature).item()
        assert found == pytest.approx(want, abs=5e-6)
        shares = []
        for one, others in ((0.6, 0.8), (0.0, 1.0)):
            e, f = math.exp((one - 1) / temperature), math.exp((others - 1) / temperature)
            shares.append((e / (e + 2 * f), f / (e + 2 * f)))
        (s, r), (t, u) = shares
        assert found == pytest.approx((t * math.log(t / s) + 2 * u * math.log(u / r)) / 3)


@pytest.mark.parametrize("include_self", [True, False])
def test_values_and_gradients_by_the_definition(include_self):
    rng = torch.Generator().manual_seed(0)
    rows, columns, theirs, others = (torch.randn(5, 3, generator=rng, dtype=torch.float64) for _ in range(4))
    if not include_self:
        columns, others = rows, theirs
    how = {"temperature": 0.5, "include_self": include_self}
    found = relation_divergence(rows, columns, theirs, others, **how)
    assert found.item() == pytest.approx(_literal(rows, columns, theirs, others, **how))
    rows.requires_grad_()
    columns.requires_grad_()
    theirs.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: relation_divergence(a, b, theirs, others, **how), (rows, columns))
    relation_divergence(rows, columns, theirs, others, **how).backward()
    assert theirs.grad is None


def test_a_rotation_of_all_costs_nothing_and_one_of_the_rows_does():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=rng), torch.randn(6, 4, generator=rng)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=rng))[0]
    assert relation_divergence(x @ turn, y @ turn, x, y).abs() < 1e-5
    assert relation_divergence(3 * x, y, x, y).abs() < 1e-5  # nor does length
    assert relation_divergence(x @ turn, y, x, y) > 0.1


def test_in_half_precision_it_is_computed_in_full():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=rng).bfloat16(), torch.randn(6, 4, generator=rng).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = relation_divergence(x, y, y, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, relation_divergence(x.float(), y.float(), y.float(), x.float()))


def test_one_source_alone_has_no_relations():
    x = torch.ones(1, 3, requires_grad=True)
    assert relation_divergence(x, x, -x, x).item() == 0.0
    assert relation_divergence(x, x, x, x, include_self=False).item() == 0.0

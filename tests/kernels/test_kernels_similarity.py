"""CrossSDC's kernel against the literal equation, its worked numbers and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from avsep.kernels import similarity_distillation
from avsep.kernels.similarity_distillation import op
from avsep.kernels.similarity_distillation.reference import cross_entropy, similarity_distillation_reference

OPTIONS = [
    {"symmetric": symmetric, "average_class": average_class}
    for symmetric, average_class in itertools.product((True, False), repeat=2)
]


def rows(n, d, count=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def ids(n, values, seed=1):
    """Arbitrary int64 values, negative and huge ones among them, with repetitions and some that stand alone."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(-(2**62), 2**62, (values,), generator=generator)
    return pool[torch.randint(values, (n,), generator=generator)]


def value_and_gradients(function, modalities, *args, term, **options):
    leaves = [m.clone().requires_grad_() for m in modalities]
    result = function(leaves, *args, **options)[term]
    gradients = torch.autograd.grad(result, leaves, allow_unused=True)
    return result.detach(), [torch.zeros_like(m) if g is None else g for g, m in zip(gradients, leaves, strict=True)]


def both_agree(modalities, instance, class_, tolerance=1e-12, **options):
    for term in range(2):
        want, want_gradients = value_and_gradients(
            similarity_distillation_reference, modalities, instance, class_, term=term, **options
        )
        got, got_gradients = value_and_gradients(
            similarity_distillation, modalities, instance, class_, term=term, **options
        )
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        for one, other in zip(got_gradients, want_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# the worked numbers


def test_orthogonal_rows():
    eye = torch.eye(2, dtype=torch.float64)
    result = similarity_distillation([eye] * 3, torch.tensor([7, 3]), torch.zeros(2, dtype=torch.long))
    assert result.instance.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)  # 2.06e-9
    assert result.class_.item() == pytest.approx(10.0, abs=1e-8)


def test_equal_rows_have_the_entropy_of_their_number():
    x = torch.tensor([[3.0, 4.0]] * 2, dtype=torch.float64)
    result = similarity_distillation([x, 2 * x, x], torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert result.instance.item() == pytest.approx(math.log(2), abs=1e-12)


def test_the_worked_example():
    a = torch.tensor([[1, 0], [0, 1], [0.6, 0.8]], dtype=torch.float64)
    m = torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    o = torch.tensor([[0.8, 0.6], [0, 1], [0, 1]], dtype=torch.float64)
    for scale in (1.0, 37.0):  # rows are brought to length 1
        result = similarity_distillation([scale * a, m, o], torch.tensor([4, 9, 9]), torch.zeros(3, dtype=torch.long))
        assert result.instance.item() == pytest.approx(1.08276, abs=5e-6)
        assert result.class_.item() == pytest.approx(6.59387, abs=5e-6)


def test_the_reference_cross_entropy_by_hand():
    scores = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
    e = math.e
    first = -(1 + 2 - 2 * math.log(e + e**2)) / 2
    second = -(3 - math.log(1 + e**3))
    positives = torch.tensor([[True, True], [False, True]])
    assert cross_entropy(scores, positives).item() == pytest.approx((first + second) / 2)
    assert cross_entropy(scores, positives, average=False).item() == pytest.approx((2 * first + second) / 4)
    # without the diagonal row 0 has one candidate, its positive, and row 1 has no positive
    assert cross_entropy(scores, positives, include_self=False).item() == pytest.approx(0.0)


# against the reference


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [2, 3])
def test_value_and_gradient(options, count):
    both_agree(rows(23, 9, count), ids(23, 8), ids(23, 4, seed=2), **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_unimodal(options, count):
    modalities = rows(17, 6, count)
    if count == 3:
        modalities[1] = rows(17, 4, 1)[0]  # widths may differ, since modalities are not compared
    both_agree(modalities, ids(17, 9), ids(17, 3, seed=2), unimodal=True, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_teacher_rows_carry_no_gradient(options):
    """Z = [N by the student; O by the student; O by the teacher]."""
    new, old = 6, 5
    n = new + 2 * old
    modalities = rows(n, 8)
    videos = torch.cat((ids(new, 4), torch.arange(old) // 2, torch.arange(old) // 2))
    classes = torch.cat((torch.arange(new) % 2, torch.arange(old) % 3 + 10, torch.arange(old) % 3 + 10))
    teacher = torch.arange(n) >= new + old
    both_agree(modalities, videos, classes, teacher_rows=teacher, **options)
    for term in range(2):
        _, gradients = value_and_gradients(
            similarity_distillation, modalities, videos, classes, term=term, teacher_rows=teacher, **options
        )
        for gradient in gradients:
            assert gradient[teacher].abs().max() == 0
            assert (gradient[~teacher].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("unimodal", [True, False])
def test_blocks_of_rows(options, unimodal, monkeypatch):
    monkeypatch.setattr(op, "_DENSE_ROWS", 4)
    monkeypatch.setattr(op, "_BLOCK_ELEMENTS", 1)  # blocks of 16 rows, the last one ragged
    teacher = torch.arange(41) >= 30
    groups = ids(41, 12), ids(41, 5, seed=2)
    both_agree(rows(41, 5), *groups, teacher_rows=teacher, unimodal=unimodal, **options)


def test_blocks_keep_no_square_tensor():
    n, d = 1500, 4
    assert n > op._DENSE_ROWS
    modalities = [m.requires_grad_() for m in rows(n, d, 2, dtype=torch.float32)]
    largest = 0

    def pack(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = similarity_distillation(modalities, ids(n, 700), ids(n, 20))
    assert largest <= 2 * n * d
    sum(result).backward()
    want = similarity_distillation_reference([m.detach().double() for m in modalities], ids(n, 700), ids(n, 20))
    assert [term.item() for term in result] == pytest.approx([term.item() for term in want], rel=1e-5)


def test_order_of_rows_does_not_matter():
    modalities, instance, class_ = rows(20, 6), ids(20, 6), ids(20, 3)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    one = similarity_distillation(modalities, instance, class_)
    other = similarity_distillation([m[order] for m in modalities], instance[order], class_[order])
    torch.testing.assert_close(one, other)


def test_not_contiguous():
    modalities = [m.T for m in rows(7, 12, 2)]  # [12, 7]
    both_agree(modalities, ids(24, 5)[::2], ids(24, 3)[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_computed_in_fp32_also_under_autocast(dtype):
    modalities = rows(32, 16, dtype=dtype)
    instance, class_ = ids(32, 10), ids(32, 4)
    want = similarity_distillation_reference([m.double() for m in modalities], instance, class_)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            leaves = [m.clone().requires_grad_() for m in modalities]
            got = similarity_distillation(leaves, instance, class_)
        assert got.instance.dtype == got.class_.dtype == torch.float32
        torch.testing.assert_close(torch.stack(list(got)).double(), torch.stack(want), rtol=2e-6, atol=2e-5)
        sum(got).backward()
        assert all(m.grad.dtype == dtype and m.grad.isfinite().all() for m in leaves)


# defined values and errors


def test_groups_without_positives_give_zero():
    modalities = [m.requires_grad_() for m in rows(5, 3, 2)]
    result = similarity_distillation(modalities, torch.arange(5), torch.arange(5), unimodal=True)
    assert result.instance.item() == result.class_.item() == 0
    sum(result).backward()
    assert all(m.grad.abs().max() == 0 for m in modalities)


def test_one_row():
    for unimodal in (True, False):
        modalities = [m.requires_grad_() for m in rows(1, 3)]
        result = similarity_distillation(modalities, torch.tensor([4]), torch.tensor([2]), unimodal=unimodal)
        assert [term.item() for term in result] == pytest.approx([0, 0], abs=1e-12)
        sum(result).backward()
        assert all(m.grad.isfinite().all() for m in modalities)


def test_a_row_of_zeros_gets_no_gradient():
    modalities = rows(6, 4)
    modalities[1][2] = 0
    both_agree(modalities, ids(6, 3), ids(6, 2))
    leaves = [m.clone().requires_grad_() for m in modalities]
    sum(similarity_distillation(leaves, ids(6, 3), ids(6, 2))).backward()
    assert leaves[1].grad[2].abs().max() == 0
    assert leaves[1].grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": rows(4, 3, 1)}, "compares modalities and got 1"),
        ({"modalities": []}, "compares modalities and got 0"),
        ({"modalities": [], "unimodal": True}, "compares modalities and got 0"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"modalities": [torch.ones(4, 3), torch.ones(4, 2)]}, r"got \[4, 3\], \[4, 2\]"),
        ({"modalities": [torch.ones(4, 3), torch.ones(5, 3)]}, "equal n and D"),
        ({"modalities": [torch.ones(4, 3, dtype=torch.long)] * 2}, "floating point"),
        ({"modalities": [torch.ones(0, 3)] * 2}, "empty batch"),
        ({"instance_ids": torch.arange(5)}, r"instance_ids must have the shape \[4\], got \[5\]"),
        ({"class_ids": torch.ones(4)}, "class_ids must be integers, got torch.float32"),
        ({"class_ids": torch.ones(4, dtype=torch.bool)}, "class_ids must be integers"),
        ({"teacher_rows": torch.zeros(4)}, "teacher_rows must be bool"),
        ({"class_ids": torch.ones(4, dtype=torch.long, device="meta")}, "class_ids must be on cpu"),
    ],
)
def test_wrong_input(change, message):
    arguments = {
        "modalities": rows(4, 3, 2),
        "instance_ids": torch.arange(4),
        "class_ids": torch.zeros(4, dtype=torch.long),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        similarity_distillation(**arguments)


def test_no_graph_break():
    modalities, instance, class_ = rows(12, 4), ids(12, 5), ids(12, 3)
    compiled = torch.compile(similarity_distillation, fullgraph=True, backend="eager")
    want = similarity_distillation(modalities, instance, class_)
    torch.testing.assert_close(compiled(modalities, instance, class_), want)

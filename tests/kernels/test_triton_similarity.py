"""The Triton path of similarity_distillation against the float64 reference; under the interpreter without a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from avsep.errors import ConfigError
from avsep.kernels import similarity_distillation
from avsep.kernels.similarity_distillation import triton_kernel
from avsep.kernels.similarity_distillation.reference import similarity_distillation_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Distance from the float64 reference on the same (rounded) input, relative to the norm. Tensor cores round sums of
# products towards zero, the interpreter to the nearest; without the low halves of fp32 rows it would be 1e-4.
EXACT = 2e-5 if DEVICE == "cuda" else 4e-6
GRADIENTS = {torch.float32: EXACT, torch.float16: 5e-4, torch.bfloat16: 5e-3}
OPTIONS = [
    {**way, "average_class": average_class}
    for way, average_class in itertools.product(({}, {"symmetric": False}, {"unimodal": True}), (True, False))
]


def rows(n, d, count=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE) for _ in range(count)]


def ids(n, values, seed=1):
    """Arbitrary int64 values that differ in their upper or lower half alone, negative and huge ones among them."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(-(2**30), 2**30, (values,), generator=generator)
    pool[::2] += 2**40
    pool[1::2] = pool[::2][: len(pool[1::2])] - 2**33
    return pool[torch.randint(values, (n,), generator=generator)].to(DEVICE)


def teachers(n, seed=2):
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.3).to(DEVICE)


def evaluated(function, modalities, *args, upstream=(0.7, -1.3), **options):
    """Terms, and the gradients of a random combination of them."""
    leaves = [m.clone(memory_format=torch.preserve_format).requires_grad_() for m in modalities]
    terms = function(leaves, *args, **options)
    gradients = torch.autograd.grad(sum(w * t for w, t in zip(upstream, terms, strict=True)), leaves)
    return torch.stack([t.detach() for t in terms]), gradients


def distance(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def assert_matches(modalities, instance, class_, *, slack=1.0, **options):
    want, want_gradients = evaluated(
        similarity_distillation_reference, [m.double() for m in modalities], instance, class_, **options
    )
    got, gradients = evaluated(similarity_distillation, modalities, instance, class_, backend="triton", **options)
    assert got.dtype == torch.float32
    assert (got.double() - want).abs().max() <= slack * EXACT * want.abs().max().clamp_min(1.0)
    for m, one, other in zip(modalities, gradients, want_gradients, strict=True):
        assert one.dtype == m.dtype
        assert one.shape == m.shape
        assert distance(one, other) <= slack * GRADIENTS[m.dtype]
    return gradients


@pytest.fixture(autouse=True)
def allocated(monkeypatch):
    """What the kernels write into starts as NaN (the ids' codes as -1), so that nothing may stay unwritten;
    all its tensors."""
    found = []

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(*args, **kwargs):
            tensor = torch.empty(*args, **kwargs)
            found.append(tensor.fill_(float("nan") if tensor.is_floating_point() else -1))
            return tensor

    monkeypatch.setattr(triton_kernel, "torch", Poisoned())
    return found


@pytest.fixture
def prepared(monkeypatch):
    """As for many rows."""
    monkeypatch.setattr(triton_kernel, "_DIRECT_ROWS", 0)


@pytest.fixture
def launches(monkeypatch):
    found = []
    launch = triton_kernel.launch

    def counted(kernel, grid, *args, **kwargs):
        found.append(kernel.fn.__name__)
        launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(triton_kernel, "launch", counted)
    return found


# against the reference


@pytest.mark.parametrize("options", OPTIONS)
def test_few_rows(options):
    n = 37
    count = 3 if options["average_class"] else 2
    assert_matches(rows(n, 20, count), ids(n, 12), ids(n, 4, seed=2), teacher_rows=teachers(n), **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_many_rows(options, prepared):
    n = 135  # ragged against every block
    assert_matches(rows(n, 20, 2), ids(n, 60), ids(n, 9, seed=2), teacher_rows=teachers(n), **options)


def test_at_the_size_of_the_paper():
    n = 72
    assert_matches(rows(n, 256), ids(n, 40), ids(n, 6, seed=2), teacher_rows=torch.arange(n, device=DEVICE) >= 48)


def test_more_rows_than_one_program_should_read_again(launches, monkeypatch):
    assert triton_kernel._DIRECT_ROWS == 512
    monkeypatch.setattr(triton_kernel, "_DIRECT_ROWS", 24)
    for n in (24, 25):
        assert_matches(rows(n, 8, 2), ids(n, 12), ids(n, 5, seed=2), symmetric=False)
        assert ("_prepare_kernel" in launches) == (n > 24)


@pytest.mark.parametrize("capability", [75, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 90, 120))])
def test_blocks_of_every_gpu(capability, prepared, monkeypatch):
    monkeypatch.setattr(triton_kernel, "_capability", lambda device: capability)
    n = 70 if capability == 75 else 135  # more than one block
    if DEVICE == "cuda" and capability != 10 * torch.cuda.get_device_capability()[0]:
        pytest.skip("the blocks are for another GPU")
    teacher = torch.arange(n, device=DEVICE) >= n - 15
    assert_matches(rows(n, 200, 2), ids(n, 70), ids(n, 9, seed=2), teacher_rows=teacher)
    if capability in (75, 90):
        assert_matches(rows(n, 70, 2, dtype=torch.float16), ids(n, 70), ids(n, 9, seed=2))


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_few_rows_are_prepared_too_before_sm_80(capability, launches, monkeypatch):
    monkeypatch.setattr(triton_kernel, "_capability", lambda device: capability)
    if DEVICE == "cuda" and capability != 10 * torch.cuda.get_device_capability()[0]:
        pytest.skip("the blocks are for another GPU")
    for d in (16, 64, 128, 256):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert triton_kernel._plan(rows(8, d, 2, dtype=dtype)).prepared == (capability < 80)
    n = 20
    assert_matches(rows(n, 16, 2), ids(n, 8), ids(n, 3, seed=2), teacher_rows=teachers(n))
    assert ("_prepare_kernel" in launches) == (capability < 80)


@pytest.mark.parametrize("d", [1, 16, 300])
def test_widths(d):
    n = 40
    gradients = assert_matches(rows(n, d, 2), ids(n, 15), ids(n, 3, seed=2), slack=1.0 if d > 1 else math.inf)
    if d == 1:  # at length 1 there is nothing left to change
        assert max(g.abs().max() for g in gradients) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    n = 37
    assert_matches(rows(n, 40, dtype=dtype), ids(n, 12), ids(n, 4, seed=2), teacher_rows=teachers(n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_many_rows(dtype, prepared):
    n = 150
    assert_matches(rows(n, 40, 2, dtype=dtype), ids(n, 60), ids(n, 4, seed=2), teacher_rows=teachers(n))


def test_computed_in_fp32_also_under_autocast():
    n = 20
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_matches(rows(n, 16, 2, dtype=torch.float16), ids(n, 8), ids(n, 3))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_temperatures(temperature, many, request):
    if many:
        request.getfixturevalue("prepared")
    n = 41
    # scores of up to 100: their rounding in fp32 is that much larger
    options = {"temperature": temperature, "unimodal": temperature == 0.01}
    slack = 4 if temperature < 0.05 else 1
    assert_matches(rows(n, 20, 2), ids(n, 12), ids(n, 4, seed=2), slack=slack, **options)


@pytest.mark.parametrize("widths", [(20, 20, 20), (20, 7), (9,)])
def test_unimodal(widths):
    n = 37
    modalities = [rows(n, d, 1, seed=d + k)[0] for k, d in enumerate(widths)]
    options = {"unimodal": True, "teacher_rows": teachers(n)}
    assert_matches(modalities, ids(n, 12), ids(n, 4, seed=2), **options)
    if len(widths) == 1:
        assert_matches(modalities, ids(n, 12), ids(n, 4, seed=2), symmetric=False, average_class=False, **options)


def test_unimodal_of_many_rows(prepared):
    n = 140
    assert_matches(rows(n, 20, 2), ids(n, 60), ids(n, 4, seed=2), unimodal=True)


def test_four_modalities_of_different_types():
    n = 33
    modalities = rows(n, 20, 4)
    modalities[1] = modalities[1].half()
    modalities[3] = modalities[3].bfloat16()
    assert_matches(modalities, ids(n, 12), ids(n, 4, seed=2), teacher_rows=teachers(n))
    assert_matches(modalities, ids(n, 12), ids(n, 4, seed=2), symmetric=False)


def test_codes_of_64_bits(prepared, monkeypatch):
    monkeypatch.setattr(triton_kernel, "_SHORT_CODE_ROWS", 16)
    n = 135
    assert_matches(rows(n, 20, 2), ids(n, 60), ids(n, 9, seed=2))


@pytest.mark.parametrize("many", [False, True])
def test_not_contiguous(many, request):
    if many:
        request.getfixturevalue("prepared")
    n, d = 34, 24
    transposed = rows(d, n, 1)[0].T
    apart = rows(n, 3 * d, 1)[0][:, 5 : 5 + d]
    expanded = rows(1, d, 1)[0].expand(n, d)
    instance, class_ = ids(2 * n, 12)[::2], ids(2 * n, 4, seed=2)[::2].to(torch.int32)
    teacher = teachers(2 * n)[::2]
    assert_matches([transposed, apart], instance, class_.long(), teacher_rows=teacher)
    for modalities in ([transposed, apart], [expanded, apart]):
        leaves = [m.detach().requires_grad_() for m in modalities]
        assert not all(m.is_contiguous() for m in leaves)
        found = similarity_distillation(leaves, instance, class_, teacher_rows=teacher, backend="triton")
        dense = [m.contiguous() for m in modalities]
        want, want_gradients = evaluated(
            similarity_distillation, dense, instance, class_, teacher_rows=teacher, upstream=(1, 1)
        )
        torch.testing.assert_close(torch.stack([t.detach() for t in found]), want, rtol=1e-5, atol=1e-5)
        for one, other in zip(torch.autograd.grad(sum(found), leaves), want_gradients, strict=True):
            assert distance(one, other.double()) < 10 * EXACT


def test_lengths_of_rows_do_not_matter():
    """Products are formed in half precision, of rows brought to one length first."""
    n, d = 40, 24
    modalities = rows(n, d, 2)
    length = 10.0 ** torch.linspace(-9, 15, n, device=DEVICE)[:, None]
    length[7] = 2.0**-20
    modalities = [modalities[0] * length, modalities[1] * length.flip(0)]
    modalities[0][3] *= 10.0 ** torch.linspace(-6, 0, d, device=DEVICE)  # and within a row
    instance, class_ = ids(n, 12), ids(n, 4)
    want, want_gradients = evaluated(
        similarity_distillation_reference, [m.double() for m in modalities], instance, class_
    )
    for size in (512, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_kernel, "_DIRECT_ROWS", size)
            got, gradients = evaluated(similarity_distillation, modalities, instance, class_, backend="triton")
        assert distance(got, want) < EXACT
        for m, one, other in zip(modalities, gradients, want_gradients, strict=True):
            size = m.double().norm(dim=1, keepdim=True)
            assert distance(one.double() * size, other * size) < 2 * EXACT


@pytest.mark.parametrize("upstream", [(65536.0, 0.0), (0.0, -1e-12), (3.0, -3.0)])
def test_sizes_of_upstream_gradients(upstream):
    n = 20
    arguments = rows(n, 16, 2), ids(n, 8), ids(n, 3)
    _, want = evaluated(
        similarity_distillation_reference, [m.double() for m in arguments[0]], *arguments[1:], upstream=upstream
    )
    _, got = evaluated(similarity_distillation, *arguments, upstream=upstream, backend="triton")
    for one, other in zip(got, want, strict=True):
        assert distance(one, other) < EXACT


def test_an_upstream_gradient_that_is_no_number_shows():
    n = 20
    for value in (math.inf, math.nan):
        _, got = evaluated(similarity_distillation, rows(n, 16, 2), ids(n, 8), ids(n, 3), upstream=(value, 0))
        assert not any(g.isfinite().all() for g in got)


def test_like_the_torch_path():
    n = 48
    arguments = rows(n, 32), ids(n, 20), ids(n, 4, seed=2)
    want, want_gradients = evaluated(similarity_distillation, *arguments, backend="torch", teacher_rows=teachers(n))
    got, gradients = evaluated(similarity_distillation, *arguments, backend="triton", teacher_rows=teachers(n))
    torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)
    for one, other in zip(gradients, want_gradients, strict=True):
        assert distance(one, other.double()) < 2 * EXACT


def test_only_some_modalities_want_a_gradient():
    n = 20
    modalities = rows(n, 16, 3)
    modalities[1].requires_grad_()
    similarity_distillation(modalities, ids(n, 8), ids(n, 3), backend="triton").class_.backward()
    want = evaluated(
        similarity_distillation_reference,
        [m.detach().double() for m in modalities],
        ids(n, 8),
        ids(n, 3),
        upstream=(0, 1),
    )[1][1]
    assert distance(modalities[1].grad, want) < EXACT
    assert modalities[0].grad is None


# defined values


@pytest.mark.parametrize("many", [False, True])
def test_teacher_rows_carry_no_gradient(many, request):
    if many:
        request.getfixturevalue("prepared")
    n = 300 if many else 50
    teacher = torch.arange(n, device=DEVICE) >= n // 3  # whole blocks are the teacher's
    _, gradients = evaluated(
        similarity_distillation, rows(n, 16, 2), ids(n, n // 2), ids(n, 4), teacher_rows=teacher, backend="triton"
    )
    for gradient in gradients:
        assert (gradient[teacher] == 0).all()
        assert (gradient[~teacher].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("many", [False, True])
def test_groups_without_positives_give_zero(many, request):
    if many:
        request.getfixturevalue("prepared")
    n = 21
    alone = torch.arange(n, device=DEVICE)
    terms, gradients = evaluated(similarity_distillation, rows(n, 8, 2), alone, alone, unimodal=True, backend="triton")
    assert (terms == 0).all()
    assert all((g == 0).all() for g in gradients)
    some = torch.arange(n, device=DEVICE).clamp_min(15)  # six rows have positives
    assert_matches(rows(n, 8, 2), alone, some, unimodal=True)


@pytest.mark.parametrize("unimodal", [True, False])
@pytest.mark.parametrize("many", [False, True])
def test_one_row(unimodal, many, request):
    if many:
        request.getfixturevalue("prepared")
    one = torch.tensor([4], device=DEVICE)
    terms, gradients = evaluated(
        similarity_distillation, rows(1, 3), one, one, unimodal=unimodal, temperature=0.005, backend="triton"
    )
    assert terms.abs().max() < 1e-4
    assert all(g.abs().max() < 1e-4 for g in gradients)


@pytest.mark.parametrize("many", [False, True])
def test_a_row_of_zeros_gets_no_gradient(many, request):
    if many:
        request.getfixturevalue("prepared")
    n = 20
    modalities = rows(n, 12, 2)
    modalities[1][5] = 0
    gradients = assert_matches(modalities, ids(n, 8), ids(n, 3))
    assert (gradients[1][5] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("many", [False, True])
def test_what_is_no_number_shows(value, many, request):
    if many:
        request.getfixturevalue("prepared")
    n = 40
    modalities = rows(n, 12, 2)
    modalities[0][35, 3] = value
    for backend in ("torch", "triton"):
        terms, gradients = evaluated(similarity_distillation, modalities, ids(n, 8), ids(n, 3), backend=backend)
        assert terms.isnan().all()
        assert not any(g.isfinite().all() for g in gradients)


# how it runs


def test_the_same_bits_every_time(prepared):
    n = 140
    arguments = rows(n, 24, 2), ids(n, 60), ids(n, 4)
    first, first_gradients = evaluated(similarity_distillation, *arguments, backend="triton")
    again, gradients = evaluated(similarity_distillation, *arguments, backend="triton")
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, gradients, strict=True))


def test_launches(launches):
    n = 20
    evaluated(similarity_distillation, rows(n, 16, 3), ids(n, 8), ids(n, 3), backend="triton")
    assert launches == ["_forward_kernel", "_reduce_kernel", "_backward_kernel"]


def test_memory_grows_with_the_rows_and_not_with_their_square(allocated, monkeypatch):
    monkeypatch.setattr(triton_kernel, "launch", lambda *_, **__: None)  # what is allocated is all that counts
    used = []
    for n in (1024, 2048):
        allocated.clear()
        arguments = rows(n, 8, 2), ids(n, 100), ids(n, 20)
        evaluated(similarity_distillation, *arguments, backend="triton", symmetric=False)
        used.append(sum(t.numel() * t.element_size() for t in allocated))
    assert used[1] <= 2 * used[0]


@pytest.mark.slow
def test_compiled_code_stays_in_torch(auto_takes_triton):
    """An autograd function that launches kernels is no part of a compiled graph."""
    n = 20
    arguments = rows(n, 16, 2), ids(n, n // 2), ids(n, 3)
    compiled = torch.compile(similarity_distillation, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=r"Triton does not run inside torch\.compile"):
        compiled(*arguments, backend="triton")
    got, gradients = evaluated(compiled, *arguments)
    want, want_gradients = evaluated(similarity_distillation, *arguments, backend="torch")
    torch.testing.assert_close(got, want)
    for one, other in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_float64_stays_in_torch(auto_takes_triton, monkeypatch):
    arguments = [m.double() for m in rows(8, 4, 2)], ids(8, 3), ids(8, 2)
    with pytest.raises(ConfigError, match=r"got torch\.float64; or use 'torch'"):
        similarity_distillation(*arguments, backend="triton")
    assert similarity_distillation(*arguments).instance.dtype == torch.float64
    monkeypatch.setenv("AVSEP_KERNELS", "triton")
    with pytest.raises(ConfigError, match=r"AVSEP_KERNELS=triton: .* got torch\.float64"):
        similarity_distillation(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": rows(4, 3, 1)}, "compares modalities and got 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"modalities": [torch.ones(4, 3, device=DEVICE), torch.ones(5, 3, device=DEVICE)]}, "equal n and D"),
        ({"modalities": [torch.ones(0, 3, device=DEVICE)] * 2}, "empty batch"),
        ({"class_ids": torch.ones(4, device=DEVICE)}, "class_ids must be integers"),
        ({"class_ids": torch.ones(4, dtype=torch.long, device="meta")}, "class_ids must be on"),
        ({"teacher_rows": torch.zeros(4, device=DEVICE)}, "teacher_rows must be bool"),
    ],
)
def test_wrong_input_is_refused_alike(change, message):
    arguments = {
        "modalities": rows(4, 3, 2),
        "instance_ids": torch.arange(4, device=DEVICE),
        "class_ids": torch.zeros(4, dtype=torch.long, device=DEVICE),
        **change,
    }
    for backend in ("torch", "triton"):
        with pytest.raises(ValueError, match=message):
            similarity_distillation(**arguments, backend=backend)


def test_every_kernel_is_compiled_ahead_of_time():
    cases = triton_kernel.aot_cases()
    names = {case.kernel.fn.__name__ for case in cases}
    assert names == {f"_{k}_kernel" for k in ("prepare", "identify", "forward", "reduce", "backward")}
    for case in cases:
        assert set(case.kernel.arg_names) == {*case.signature, *case.constants}, case.name
        assert set(case.aligned) <= set(case.signature)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    if DEVICE != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    for n in (96, 700):
        arguments = rows(n, 64), ids(n, 40), ids(n, 5)
        evaluated(similarity_distillation, *arguments, backend="triton")
        leaves = [m.clone().requires_grad_() for m in arguments[0]]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            sum(similarity_distillation(leaves, *arguments[1:], backend="triton")).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

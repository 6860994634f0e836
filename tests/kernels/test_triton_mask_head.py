"""The Triton mask head and its losses against the float64 reference; under the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from avsep import build_separator, kernels
from avsep.errors import ConfigError
from avsep.kernels import mask_head, mask_head_losses
from avsep.kernels.mask_head import op, triton_kernel
from avsep.kernels.mask_head.reference import mask_head_losses_reference, mask_head_reference
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step
from avsep.types import Batch, MaskOutput, VisualInputs
from support.tones import TINY_FRONT_END, TINY_SEPARATOR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Distance from the float64 reference on the same (rounded) input, relative to the norm: fp32 arithmetic, and the
# rounding of what is stored as half.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def random(*shape, seed=0, dtype=torch.float32, scale=1.0):
    values = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(DEVICE)


def lying(features, how):
    """The same features, otherwise in memory."""
    if how == "channels_last":
        return features.contiguous(memory_format=torch.channels_last)
    if how == "strided":
        return features.transpose(2, 3).contiguous().transpose(2, 3)
    return features.contiguous()


def distance(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the kernels are given to write into starts as NaN (-128 for signs), so that nothing may stay unwritten."""

    def fill(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -128)

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        empty = staticmethod(lambda *a, **k: fill(torch.empty(*a, **k)))
        empty_like = staticmethod(lambda *a, **k: fill(torch.empty_like(*a, **k)))

    monkeypatch.setattr(triton_kernel, "torch", Poisoned())


class Case:
    """Input of the losses; the teacher knows the mixtures ``taught`` (None: no teacher)."""

    def __init__(self, batch, sources, channels, rows, frames, *, dtype=torch.float32, how="plain", taught=None):
        scale = channels**-0.5
        self.embedding = random(batch, sources, channels, dtype=dtype, scale=2.0 * scale).requires_grad_()
        features = random(batch, channels, rows, frames, seed=1, dtype=dtype)
        self.features = lying(features, how).requires_grad_()
        self.ratio = (1.5 * random(batch, sources, rows, frames, seed=2).sigmoid()).contiguous()
        self.weight = random(batch, 1, rows, frames, seed=3).abs()
        self.teacher = None
        self.counted = None
        if taught is not None:
            m = len(taught)
            self.teacher = kernels.MaskTeacher(
                random(m, sources, channels, seed=4, dtype=dtype, scale=2.0 * scale),
                lying(random(m, channels, rows, frames, seed=5, dtype=dtype), how),
                torch.tensor(taught, device=DEVICE),
            )
            self.counted = random(batch, sources, seed=6) > -0.3

    def run(self, backend="triton"):
        return mask_head_losses(
            self.embedding,
            self.features,
            self.ratio,
            self.weight,
            teacher=self.teacher,
            counted=self.counted,
            backend=backend,
        )

    def reference(self):
        """Leaves in float64, and the losses from them."""
        embedding, features = (t.detach().double().requires_grad_() for t in (self.embedding, self.features))
        teacher = None
        if self.teacher is not None:
            teacher = (self.teacher[0].double(), self.teacher[1].double(), self.teacher[2])
        losses = mask_head_losses_reference(
            embedding, features, self.ratio.double(), self.weight.double(), teacher=teacher, counted=self.counted
        )
        return (embedding, features), losses


def check(case, upstream=(1.3, -0.7), tolerance=None):
    tolerance = tolerance or TOLERANCE[case.features.dtype]
    got = case.run()
    leaves, want = case.reference()
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        # half a unit in the last place of a mask, times the weight, does not shrink with the distance of two masks
        assert abs(one.item() - other.item()) <= 2e-6 * abs(other.item()) + 3e-7 * case.weight.mean().item()
    gradients = torch.autograd.grad(got[0] * upstream[0] + got[1] * upstream[1], (case.embedding, case.features))
    expected = torch.autograd.grad(want[0] * upstream[0] + want[1] * upstream[1], leaves)
    for name, one, other in zip(("embedding", "features"), gradients, expected, strict=True):
        assert one.isfinite().all(), name
        assert distance(one, other) < tolerance, (name, distance(one, other))
    assert gradients[0].dtype == case.embedding.dtype
    assert gradients[1].dtype == case.features.dtype
    return gradients


# Batch, sources, channels, rows, frames: ragged in every axis, one of everything, the limits, and the paper's tile.
SHAPES = [(3, 2, 32, 15, 13), (2, 3, 5, 9, 31), (1, 1, 1, 1, 1), (2, 8, 128, 3, 7), (4, 4, 24, 8, 8)]


@pytest.mark.parametrize("how", ["plain", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients(shape, how):
    check(Case(*shape, how=how))
    taught = [shape[0] - 1, *range(shape[0] - 2)]  # not in order, and not all
    gradients = check(Case(*shape, how=how, taught=taught))
    if how == "channels_last" and shape[2] > 1:
        assert gradients[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["plain", "channels_last"])
def test_half_precision(dtype, how):
    check(Case(3, 2, 32, 15, 13, dtype=dtype, how=how, taught=[2, 0]))


def test_many_tiles_a_program(monkeypatch):
    """As at the paper's size, where a program goes through 16 tiles; here the number of programs is cut instead."""
    monkeypatch.setattr(triton_kernel, "_PROGRAMS", 4)
    shape = (2, 2, 32, 29, 15)  # 435 pixels: 7 tiles of 64, three programs of which the last has only one
    assert triton_kernel._programs(2, 29 * 15, 64) == (3, 3)
    check(Case(*shape, taught=[1]))
    check(Case(*shape, how="channels_last"))


def test_the_papers_mixture(monkeypatch):
    """One mixture of the published size: 2 sources, 32 channels, 256 x 256."""
    if DEVICE == "cpu":  # the interpreter takes as long for a small tile as for a large one
        monkeypatch.setattr(triton_kernel, "_blocks", lambda *a, **k: triton_kernel._Blocks(2, 32, 2048, 4))
    check(Case(1, 2, 32, 256, 256, how="channels_last"))


def test_each_loss_alone_has_its_own_gradient():
    case = Case(3, 2, 6, 9, 11, taught=[2, 0])
    leaves, want = case.reference()
    for k in range(2):
        got = torch.autograd.grad(case.run()[k], (case.embedding, case.features))
        expected = torch.autograd.grad(want[k], leaves, retain_graph=True)
        for one, other in zip(got, expected, strict=True):
            assert distance(one, other) < 2e-6
    whole = torch.autograd.grad(sum(case.run()), case.embedding)[0]
    case.features.requires_grad_(False)  # a frozen audio encoder
    assert torch.equal(torch.autograd.grad(sum(case.run()), case.embedding)[0], whole)


def test_sources_and_teachers_that_do_not_count():
    case = Case(3, 2, 6, 9, 11, taught=[2, 0])
    case.counted[:] = False
    assert check(case)[0].abs().max() > 0
    assert case.run().distillation.item() == 0
    case.counted[0, 1] = case.counted[1, 0] = True  # mixture 1 has no teacher: its sources cannot count
    check(case)
    case.counted = None
    check(case)
    # mixtures without a teacher and sources that are not chosen never read what the teacher says
    case.counted = torch.tensor([[True, False], [True, True], [False, True]], device=DEVICE)
    want = [t.clone() for t in torch.autograd.grad(sum(case.run()), (case.embedding, case.features))]
    case.teacher.embedding[0, 0] = float("nan")  # of mixture 2
    case.teacher.embedding[1, 1] = float("nan")  # of mixture 0
    losses = case.run()
    assert losses.distillation.isfinite()
    for one, other in zip(torch.autograd.grad(sum(losses), (case.embedding, case.features)), want, strict=True):
        assert torch.equal(one, other)


def test_the_same_bits_every_time():
    for case in (Case(3, 2, 32, 15, 13, taught=[0, 2]), Case(2, 3, 5, 9, 31, how="channels_last")):
        runs = []
        for _ in range(2):
            losses = case.run()
            runs.append([*losses, *torch.autograd.grad(losses[0] + losses[1], (case.embedding, case.features))])
        assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["features", "embedding", "ratio", "weight", "teacher"])
def test_what_is_not_finite_comes_out_as_from_pytorch(where, bad):
    case = Case(2, 2, 6, 5, 7, taught=[1])
    case.counted = None
    with torch.no_grad():
        if where == "teacher":
            case.teacher.mask_features[0, 2, 3, 4] = bad
        else:
            target = getattr(case, where)
            target[1, 0].view(-1)[3] = bad
    found = []
    for backend in ("triton", "torch"):
        losses = case.run(backend)
        found.append([*losses, *torch.autograd.grad(losses[0] + 0.5 * losses[1], (case.embedding, case.features))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("how", ["plain", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients(shape, how):
    case = Case(*shape, how=how)
    got = mask_head(case.embedding, case.features, backend="triton")
    leaves = [t.detach().double().requires_grad_() for t in (case.embedding, case.features)]
    want = mask_head_reference(*leaves)
    assert distance(got, want) < 2e-6
    upstream = random(*got.shape[:2], *got.shape[:1:-1], seed=9).transpose(2, 3)  # not contiguous
    gradients = torch.autograd.grad(got, (case.embedding, case.features), upstream)
    expected = torch.autograd.grad(want, leaves, upstream.double())
    for one, other in zip(gradients, expected, strict=True):
        assert distance(one, other) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision(dtype):
    case = Case(2, 2, 32, 15, 13, dtype=dtype)
    got = mask_head(case.embedding, case.features, backend="triton")
    leaves = [t.detach().double().requires_grad_() for t in (case.embedding, case.features)]
    want = mask_head_reference(*leaves)
    assert got.dtype == dtype
    assert distance(got, want) < TOLERANCE[dtype]
    for one, other in zip(
        torch.autograd.grad(got.float().sum(), (case.embedding, case.features)),
        torch.autograd.grad(want.sum(), leaves),
        strict=True,
    ):
        assert one.dtype == dtype
        assert distance(one, other) < TOLERANCE[dtype]


@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_rounds_as_a_matrix_product_does(mixed):
    case = Case(2, 2, 8, 5, 7, taught=[0])
    with torch.no_grad():
        if mixed:
            case.embedding = case.embedding.bfloat16().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = case.run()
        logits = mask_head(case.embedding, case.features, backend="triton")
        assert logits.dtype == mask_head(case.embedding, case.features, backend="torch").dtype == torch.bfloat16
    gradients = torch.autograd.grad(sum(got), (case.embedding, case.features))
    case.embedding = case.embedding.detach().bfloat16().requires_grad_()
    case.features = case.features.detach().bfloat16().requires_grad_()
    case.teacher = kernels.MaskTeacher(case.teacher[0].bfloat16(), case.teacher[1].bfloat16(), case.teacher[2])
    rounded = case.run()
    assert torch.equal(torch.stack(got), torch.stack(rounded))
    for one, other in zip(gradients, torch.autograd.grad(sum(rounded), (case.embedding, case.features)), strict=True):
        assert torch.equal(one.float(), other.float())
    assert gradients[1].dtype == torch.float32


def test_operators_keep_pytorchs_rules():
    case = Case(2, 2, 6, 5, 7, how="channels_last", taught=[1])
    given = (case.embedding, case.features)
    torch.library.opcheck(torch.ops.avsep.mask_head, given)
    upstream = random(2, 2, 5, 7, seed=9)
    plain = tuple(t.detach() for t in given)
    for flag in (True, False):
        torch.library.opcheck(torch.ops.avsep.mask_head_backward, (upstream, *plain, flag))
    fixed = (case.ratio, case.weight)
    torch.library.opcheck(torch.ops.avsep.mask_head_losses, (*given, *fixed, *case.teacher, case.counted))
    torch.library.opcheck(torch.ops.avsep.mask_head_losses, (*given, *fixed, None, None, None, None))
    strided = (plain[0], lying(plain[1], "strided"))
    _, _, scale, signs = torch.ops.avsep.mask_head_losses(*strided, *fixed, *case.teacher, case.counted)
    one = torch.ones((), device=DEVICE)
    for first, second in ((one, one), (one, None), (None, one)):
        arguments = (first, second, *strided, *fixed, case.teacher.mixtures, scale, signs, True)
        torch.library.opcheck(torch.ops.avsep.mask_head_losses_backward, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_it_compiles_without_a_break(backend):
    case = Case(2, 2, 6, 5, 7, taught=[1])

    def both(embedding, features):
        losses = mask_head_losses(
            embedding, features, case.ratio, case.weight, teacher=case.teacher, counted=case.counted, backend=backend
        )
        return losses.separation + 0.3 * losses.distillation + mask_head(embedding, features, backend=backend).mean()

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    values = [f(case.embedding, case.features) for f in (both, compiled)]
    torch.testing.assert_close(*values)
    for one, other in zip(*(torch.autograd.grad(v, (case.embedding, case.features)) for v in values), strict=True):
        torch.testing.assert_close(one, other)


def test_an_exported_graph_has_no_operator_of_ours(monkeypatch):
    monkeypatch.setenv("AVSEP_KERNELS", "triton")

    class Head(torch.nn.Module):
        def forward(self, embedding, features):
            return MaskOutput(audio=embedding, embedding=embedding, mask_features=features).logits

    case = Case(2, 2, 6, 5, 7)
    graph = torch.export.export(Head(), (case.embedding.detach(), case.features.detach())).graph
    assert not any("avsep" in str(node.target) for node in graph.nodes)


def test_backends_agree_where_the_kernels_do_not_reach():
    """More sources or channels than the kernels take, and the PyTorch path itself."""
    for shape, dtype in (((2, 9, 4, 3, 5), torch.float32), ((1, 2, 129, 3, 5), torch.float32)):
        case = Case(*shape, dtype=dtype, taught=[0])
        assert not op.runs_fused(case.embedding, case.features, backend="triton")
        check(case)
    case = Case(3, 2, 6, 9, 11, taught=[2, 0])
    for one, other in zip(case.run("torch"), case.reference()[1], strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_input(backend):
    case = Case(2, 2, 6, 5, 7, taught=[1])
    e, f, r, w = case.embedding.detach(), case.features.detach(), case.ratio, case.weight
    t, s = case.teacher, case.counted

    def wrong(message, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            mask_head_losses(*arguments, **options, backend=backend)

    wrong(r"got \[2, 2, 6\] and \[2, 5, 5, 7\]", e, f[:, :5], r, w)
    wrong("of one type, got torch.float32 and torch.float16", e, f.half(), r, w)
    wrong("floating point", e.long(), f.long(), r, w)
    wrong("empty batch", e[:0], f[:0], r[:0], w[:0])
    wrong("empty batch", e, f[..., :0], r[..., :0], w[..., :0])
    wrong(r"ratio must have the shape \[2, 2, 5, 7\], got \[2, 2, 7, 5\]", e, f, r.transpose(2, 3), w)
    wrong(r"weight must have the shape \[2, 1, 5, 7\]", e, f, r, r)
    wrong(r"counted must be bool of shape \[2, 2\], got torch.float32", e, f, r, w, counted=s.float())
    wrong("a teacher of M mixtures has", e, f, r, w, teacher=(t[0], t[1][:, :5], t[2]))
    wrong("must be int64, got torch.int32", e, f, r, w, teacher=(t[0], t[1], t[2].int()))
    wrong("and weight on meta", e, f, r, w.to("meta"))
    if DEVICE == "cpu":
        wrong("teacher's mixture 2 is none of the batch's 2", e, f, r, w, teacher=(t[0], t[1], t[2] + 1))
        wrong("teacher's mixture -1", e, f, r, w, teacher=(t[0], t[1], t[2] - 2))
        twice = tuple(torch.cat((x, x)) for x in t)
        wrong(r"teacher's mixtures \[1, 1\] name one twice", e, f, r, w, teacher=twice)
        wrong(
            "a teacher of 3 mixtures knows more than the batch's 2",
            e,
            f,
            r,
            w,
            teacher=[torch.cat((x,) * 3) for x in t],
        )
    with pytest.raises(ValueError, match="of one type"):
        mask_head(e, f.half(), backend=backend)
    assert mask_head(e[:0], f[:0], backend=backend).shape == (0, 2, 5, 7)
    none = kernels.MaskTeacher(t[0][:0], t[1][:0], t[2][:0])
    assert mask_head_losses(e, f, r, w, teacher=none, counted=s, backend=backend).distillation.item() == 0


def test_float64_is_refused_by_triton_alone(auto_takes_triton, monkeypatch):
    case = Case(1, 2, 6, 5, 7, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"got torch\.float64; or use 'torch'"):
        case.run()
    with pytest.raises(ConfigError, match=r"got torch\.float64"):
        mask_head(case.embedding, case.features, backend="triton")
    assert case.run("auto").separation.dtype == torch.float64
    monkeypatch.setenv("AVSEP_KERNELS", "triton")
    with pytest.raises(ConfigError, match=r"got torch\.float64"):
        case.run("auto")


def test_what_every_kernel_is_compiled_for_is_what_it_is_launched_with():
    cases = triton_kernel.aot_cases()
    assert len({(c.name, c.settings) for c in cases}) == len(cases)
    for case in cases:
        assert set(case.signature) | set(case.constants) == set(case.kernel.arg_names), case.name


# --- through a strategy -----------------------------------------------------------------------------------------------

PARTS = {k: v for k, v in TINY_SEPARATOR.items() if k != "front_end"}
CLASS_IDS = torch.tensor([[1, 3], [2, 3], [0, 0]])  # classes 0-1 are old, 2-3 new


def _training_step(strategy, backend, monkeypatch):
    """Loss terms, and gradients of every parameter, of one step on three mixtures."""
    monkeypatch.setenv("AVSEP_KERNELS", "torch")
    student = build_separator(**PARTS, front_end=TINY_FRONT_END, num_classes=4, seed=1).train().to(DEVICE)
    teacher = build_separator(**PARTS, front_end=TINY_FRONT_END, num_classes=2, seed=2).to(DEVICE)
    rng = torch.Generator().manual_seed(0)
    batch = Batch(
        sources=0.2 * torch.randn(3, 2, TINY_FRONT_END["clip_samples"], generator=rng).to(DEVICE),
        class_ids=CLASS_IDS.to(DEVICE),
        video_ids=torch.tensor([[7, 1], [2, 3], [9, 9]], device=DEVICE),
        is_memory=CLASS_IDS.to(DEVICE) < 2,
        visual=VisualInputs(
            torch.randint(0, 255, (3, 2, 3, 3, 32, 32), dtype=torch.uint8, generator=rng).to(DEVICE),
            torch.randint(0, 255, (3, 2, 6, 1, 16, 16), dtype=torch.uint8, generator=rng).to(DEVICE),
        ),
    )
    spectrograms = student.analyse(batch.sources)
    visual = student.encode_visual(batch.visual)
    audio = student.audio_encoder(spectrograms.network_input)
    output = student.mask_decoder(audio, visual, batch.class_ids)
    monkeypatch.setenv("AVSEP_KERNELS", backend)
    teacher.requires_grad_(False).eval()
    step = Step(batch, spectrograms, audio, visual, output, num_old=2, student=student, teacher=teacher)
    terms = STRATEGIES.create(strategy).loss(step)
    sum(terms.values()).backward()
    return output, terms, {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("strategy", ["finetune", pytest.param("contavsep", marks=pytest.mark.slow)])
def test_a_training_step_is_the_same_on_both_backends(strategy, monkeypatch):
    calls = []
    fused = triton_kernel.losses
    monkeypatch.setattr(triton_kernel, "losses", lambda *a: calls.append(len(a)) or fused(*a))
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # the same U-Net twice
        (_, want, expected), (output, got, found) = (
            _training_step(strategy, backend, monkeypatch) for backend in ("torch", "triton")
        )
    assert len(calls) == 1  # both losses came from one launch
    assert output._logits is None  # and the logits never were
    assert got.keys() == want.keys()
    assert ("mask" in got) == (strategy == "contavsep")
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)
    norm = sum(g.double().square().sum() for g in expected.values() if g is not None).sqrt()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
        else:
            assert (found[name] - gradient).double().norm() < 1e-4 * gradient.double().norm() + 1e-6 * norm, name


def test_separating_is_the_same_on_both_backends(monkeypatch):
    """Where the logits are wanted, they come from the mask head alone."""
    case = Case(2, 2, 6, 9, 11)
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("AVSEP_KERNELS", backend)
        output = MaskOutput(audio=case.embedding, embedding=case.embedding, mask_features=case.features)
        found.append(output.logits)
        assert output.logits is found[-1]
    torch.testing.assert_close(*found)


def test_poison_works():
    """Of the poisoning itself."""
    assert triton_kernel.torch.empty(3).isnan().all()
    assert (triton_kernel.torch.empty_like(torch.zeros(2, dtype=torch.int8)) == -128).all()

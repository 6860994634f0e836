"""The convolutions that train faster: the same numbers as PyTorch's, in every form."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avsep.convolution import (
    WIDE,
    Conv2d,
    ConvTranspose2d,
    folded_kernel,
    upsample_convolve,
    upsampling_weight,
)
from avsep.spec import OptimizerSpec
from avsep.training.optim import lay_out_state, make_optimizer

LAYOUTS = (torch.channels_last, torch.contiguous_format)


def with_gradients(function, *tensors):
    """The result, and every tensor's gradient of a fixed random projection."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    upstream = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(1))
    return [result, *torch.autograd.grad(result, leaves, upstream)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels last", "contiguous"])
@pytest.mark.parametrize(
    ("kind", "published", "narrow", "wide", "kernel", "stride", "padding", "size"),
    [
        (Conv2d, nn.Conv2d, 3, WIDE, 4, 2, 1, (10, 6)),
        (Conv2d, nn.Conv2d, 3, WIDE, 4, 2, 1, (7, 9)),  # the last row and column meet no kernel
        (Conv2d, nn.Conv2d, 5, WIDE, 3, 1, 1, (4, 7)),
        (ConvTranspose2d, nn.ConvTranspose2d, 4, WIDE, 4, 2, 1, (5, 3)),
        (ConvTranspose2d, nn.ConvTranspose2d, 4, WIDE, 4, 2, 1, (1, 1)),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_wide_convolution_is_pytorchs(kind, published, narrow, wide, kernel, stride, padding, size, turned, layout):
    torch.manual_seed(0)
    channels = (wide, narrow) if turned else (narrow, wide)
    mine = kind(*channels, kernel, stride=stride, padding=padding).double()
    theirs = published(*channels, kernel, stride=stride, padding=padding).double()
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(3, channels[0], *size, dtype=torch.float64).contiguous(memory_format=layout)
    found, expected = ([], [])
    for module, kept in ((mine, found), (theirs, expected)):
        kept += with_gradients(module, x)
        module(x).square().mean().backward()
        kept += [p.grad for p in module.parameters()]
    for mine_, theirs_ in itertools.zip_longest(found, expected):
        torch.testing.assert_close(mine_, theirs_, rtol=1e-12, atol=1e-12)
    assert mine.weight.grad.stride() == mine.weight.stride()  # no copy when it is accumulated


def test_first_weights_are_pytorchs():
    for kind, published in ((Conv2d, nn.Conv2d), (ConvTranspose2d, nn.ConvTranspose2d)):
        modules = []
        for cls in (kind, published):
            torch.manual_seed(3)
            modules.append(cls(3, 5, 4))
        assert torch.equal(modules[0].weight, modules[1].weight)
    torch.manual_seed(3)
    weight = upsampling_weight(6, 5)
    torch.manual_seed(3)
    assert torch.equal(weight, nn.Conv2d(6, 5, 3, padding=1, bias=False).weight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels last", "contiguous"])
@pytest.mark.parametrize("channels", [6, WIDE])
def test_upsampling_and_a_convolution(channels, layout):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64).contiguous(memory_format=layout)
    weight = upsampling_weight(channels, 7).double().detach()

    def literal(x, w):
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, padding=1)

    expected = with_gradients(literal, x, weight)
    for found in (
        with_gradients(upsample_convolve, x, weight),
        with_gradients(lambda x, w: F.conv_transpose2d(x, folded_kernel(w), stride=2, padding=1), x, weight),
    ):
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(upsample_convolve(x, weight), expected[0], rtol=1e-12, atol=1e-12)


def test_many_pixels_are_taken_in_parts(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(5, WIDE, 6, 6, dtype=torch.float64), torch.randn(WIDE, 4, 3, 3, dtype=torch.float64)
    whole = with_gradients(upsample_convolve, x, weight.transpose(0, 1))
    monkeypatch.setattr("avsep.convolution._PATCH_BYTES", 2 * 36 * 9 * 4 * 8)  # two mixtures of five
    for part, all_ in zip(with_gradients(upsample_convolve, x, weight.transpose(0, 1)), whole, strict=True):
        torch.testing.assert_close(part, all_, rtol=1e-12, atol=1e-12)


def test_under_autocast_they_compute_in_bfloat16_and_give_gradients_in_float32():
    torch.manual_seed(0)
    conv, weight = Conv2d(WIDE, 8, 4, stride=2, padding=1), upsampling_weight(WIDE, 4)
    x = torch.randn(2, WIDE, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        results = conv(x), upsample_convolve(x, weight)
    plain = conv(x), upsample_convolve(x, weight)
    for found, exact in zip(results, plain, strict=True):
        assert found.dtype is torch.bfloat16
        assert (found.float() - exact).norm() < 0.02 * exact.norm()
        gradients = [torch.autograd.grad(r.float().sum(), x, retain_graph=True)[0] for r in (found, exact)]
        assert gradients[0].dtype is torch.float32
        assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_a_compiler_sees_plain_convolutions():
    """Graphs, and what ONNX makes of them, keep the one transposed convolution."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.weight = Conv2d(WIDE, WIDE, 4, stride=2, padding=1), upsampling_weight(WIDE, 4)

        def forward(self, x):
            return upsample_convolve(self.conv(x), self.weight)

    module, x = Both(), torch.randn(1, WIDE, 8, 8)
    graph = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-5)
    called = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    assert not any("pool" in name or "Convolution" in name for name in called), called


def test_an_optimiser_goes_on_from_a_file_that_forgot_the_order_in_memory():
    torch.manual_seed(0)
    start = Conv2d(WIDE, 3, 4, stride=2, padding=1)
    x = torch.randn(2, WIDE, 8, 8)

    def optimiser_of(module):
        return make_optimizer(module.parameters(), OptimizerSpec(name="adamw", lr=1e-2, weight_decay=1e-2))

    def steps(module, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()

    whole = copy.deepcopy(start)
    steps(whole, optimiser_of(whole), 4)
    first = copy.deepcopy(start)
    optimizer = optimiser_of(first)
    steps(first, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for kept in state["state"].values():
        kept.update({name: value.contiguous() for name, value in kept.items()})
    second = Conv2d(WIDE, 3, 4, stride=2, padding=1)
    second.load_state_dict({name: value.contiguous() for name, value in first.state_dict().items()})
    optimizer = optimiser_of(second)
    optimizer.load_state_dict(state)
    lay_out_state(optimizer)
    steps(second, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_gradient_in_another_order_of_memory_is_paired_with_the_right_elements():
    """PyTorch's fused form walks through memory: a strategy that assigns a gradient may not know of any order."""
    torch.manual_seed(0)
    module = Conv2d(WIDE, 3, 4, stride=2, padding=1)
    gradients = [torch.randn(p.shape) for p in module.parameters()]
    results = []
    for make in (lambda m: make_optimizer(m.parameters(), OptimizerSpec(name="adamw", lr=0.1)), plain_adamw):
        trained = copy.deepcopy(module)
        optimizer = make(trained)
        for parameter, gradient in zip(trained.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        results.append([p.detach() for p in trained.parameters()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def plain_adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=OptimizerSpec().weight_decay, fused=False)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding": (1, 0)}, {"padding_mode": "circular"}])
def test_what_it_does_not_compute_is_refused(options):
    with pytest.raises(ValueError, match=r"take torch\.nn's"):
        Conv2d(4, 4, 3, **options)

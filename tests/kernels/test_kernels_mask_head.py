from __future__ import annotations

import pytest
import torch

from avsep.kernels import mask_head, mask_l1
from avsep.kernels.mask_head.reference import mask_head_reference, mask_l1_reference


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "neither"])
def test_logits_and_gradients(layout):
    embedding = random(3, 2, 5).requires_grad_()
    features = random(3, 5, 7, 6, seed=1)
    if layout == "channels last":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout == "neither":
        features = features.transpose(2, 3).contiguous().transpose(2, 3)
    features.requires_grad_()
    upstream = random(3, 2, 7, 6, seed=2)
    got, want = mask_head(embedding, features), mask_head_reference(embedding, features)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got, (embedding, features), upstream),
        torch.autograd.grad(want, (embedding, features), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    if layout == "channels last":  # as the convolution below wants it
        (gradient,) = torch.autograd.grad(mask_head(embedding, features), features, upstream)
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_logits_follow_autocast_as_the_reference_does():
    embedding, features = random(2, 3, 4, dtype=torch.float32), random(2, 4, 8, 8, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = mask_head(embedding, features), mask_head_reference(embedding, features)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sources", [1, 2, 3])
@pytest.mark.parametrize("target_is_logits", [False, True])
@pytest.mark.parametrize("chosen", [None, "some", "none"])
def test_l1_and_gradient(sources, target_is_logits, chosen):
    logits = random(4, sources, 5, 6).requires_grad_()
    target = random(4, sources, 5, 6, seed=1).abs()
    weight = random(4, 1, 5, 6, seed=2).abs()
    counted = None
    if chosen is not None:
        counted = torch.zeros(4, sources, dtype=torch.bool)
        if chosen == "some":
            counted[0, -1] = counted[2] = True
    options = {"counted": counted, "target_is_logits": target_is_logits}
    got, want = mask_l1(logits, target, weight, **options), mask_l1_reference(logits, target, weight, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])
    if chosen == "none":
        assert got.item() == 0


def test_two_sources_are_half_the_sum():
    logits, target, weight = random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1).abs(), random(3, 1, 4, 4, seed=2).abs()
    each = [(weight[:, 0] * (logits[:, n].sigmoid() - target[:, n]).abs()).mean() for n in range(2)]
    torch.testing.assert_close(mask_l1(logits, target, weight), 0.5 * (each[0] + each[1]))


def test_l1_in_fp32_for_half_logits():
    logits = random(2, 2, 8, 8).half().requires_grad_()
    target, weight = random(2, 2, 8, 8, seed=1).abs().float(), random(2, 1, 8, 8, seed=2).abs().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mask_l1(logits, target, weight)
    assert got.dtype == torch.float32
    want = mask_l1_reference(logits.detach().double(), target.double(), weight.double())
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    got.backward()
    assert logits.grad.dtype == torch.float16


def test_wrong_input():
    masks, weight = torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5)
    with pytest.raises(ValueError, match=r"got \[2, 3, 4\] and \[2, 5, 6, 6\]"):
        mask_head(torch.zeros(2, 3, 4), torch.zeros(2, 5, 6, 6))
    with pytest.raises(ValueError, match=r"got \[2, 3, 4, 5\] and \[2, 3, 5, 4\]"):
        mask_l1(masks, masks.transpose(2, 3), weight)
    with pytest.raises(ValueError, match="empty"):
        mask_l1(masks[:0], masks[:0], weight[:0])
    with pytest.raises(ValueError, match=r"weight must have the shape \[2, 1, 4, 5\]"):
        mask_l1(masks, masks, masks)
    with pytest.raises(ValueError, match=r"counted must be bool of shape \[2, 3\]"):
        mask_l1(masks, masks, weight, counted=torch.ones(2, 3))

"""Analytic masks: the ridge regression, that sums do not mind their order, and what stays frozen."""

from __future__ import annotations

import itertools

import pytest
import torch

from avsep.decoders import RidgeFilters
from avsep.decoders.ridge_filters import ridge
from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.separator import build_separator, load_separator
from avsep.types import AudioFeatures, VisualFeatures
from support.continual_runs import differing, first_task, resume_killed, train, weights
from support.strategy_steps import student_and_teacher

STRATEGY = ("analytic_mask", {"mixtures": 4})


def test_the_regression_by_hand():
    """A = [[3, 2], [2, 6]] and b = (3, 2); with 1 on the diagonal the determinant is 24."""
    x = torch.tensor([(1.0, 0.0), (0.0, 2.0), (1.0, 1.0)], dtype=torch.float64)
    mask, weight = torch.tensor([1.0, 0.0, 1.0]).double(), torch.tensor([1.0, 1.0, 2.0]).double()
    gram, moment = (x * weight[:, None]).T @ x, x.T @ (weight * mask)
    found = ridge(gram, moment, 1.0)
    torch.testing.assert_close(found, torch.tensor([17.0, 2.0]).double() / 24, rtol=1e-14, atol=0)
    torch.testing.assert_close(found, torch.tensor([0.7083, 0.0833]).double(), rtol=0, atol=5e-5)


def mixtures(count, classes=3, channels=2, size=5):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.rand(*shape, generator=generator)

    ids = torch.randint(0, classes, (count, 2), generator=generator)
    return 2 * noise(count, channels, size, 4) - 1, noise(count, 1, size, 4), 1.3 * noise(count, 2, size, 4), ids


def solved(*parts, num_classes=3, strength=0.1):
    decoder = RidgeFilters(num_classes=num_classes, mask_channels=2)
    for part in parts:
        decoder.add(*part)
    decoder.solve(strength)
    return decoder


def test_a_class_is_solved_by_its_own_sources():
    features, weight, ratio, ids = mixtures(6)
    decoder = solved((features, weight, ratio, ids))
    for number in range(3):
        rows, targets, weights_ = [], [], []
        for b, n in itertools.product(range(6), range(2)):
            if ids[b, n] == number:
                rows.append(features[b].flatten(1).T.double())
                targets.append(ratio[b, n].flatten().clamp(max=1).double())
                weights_.append(weight[b, 0].flatten().double() / 20)
        x, m, w = torch.cat(rows), torch.cat(targets), torch.cat(weights_)
        gram = x.T @ (w[:, None] * x)
        expected = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(2), x.T @ (w * m))
        torch.testing.assert_close(decoder.solution[number].double(), expected, rtol=1e-5, atol=1e-6)


def test_sums_mind_neither_order_nor_batches():
    whole = mixtures(9)
    parts = [tuple(t[a:b] for t in whole) for a, b in ((6, 9), (0, 1), (1, 6))]
    one, other = solved(whole), solved(*parts)
    for name, value in one.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), value, rtol=1e-5, atol=1e-6)


def test_masks_before_and_after():
    whole = mixtures(9)
    decoder = solved(tuple(t[:9] for t in whole), num_classes=3)
    decoder.grow(4)
    assert decoder.solved.tolist() == [True, True, True, False]
    audio = AudioFeatures(mask_features=whole[0][:1], latent=torch.zeros(1, 1, 1, 1))
    masks = decoder(audio, VisualFeatures(), torch.tensor([[0, 3]])).logits.sigmoid()[0]
    flat = whole[0][0].flatten(1)
    expected = (decoder.solution[0] @ flat).clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(masks[0].flatten(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(masks[1].flatten(), (decoder.class_vectors[3] @ flat).sigmoid())
    decoder.forget()
    assert not decoder.solved.any()
    assert not decoder.gram.any()


def test_logits_and_gradients_are_finite_in_half_precision():
    """Class 0 is solved for and wants masks far above 1 and below 0; class 1 is not."""
    decoder = RidgeFilters(num_classes=2, mask_channels=2)
    decoder.solution[0], decoder.solved[0] = torch.tensor([9.0, 0.0]), True
    features = torch.linspace(-1, 1, 20).repeat(2).reshape(1, 2, 5, 4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        audio = AudioFeatures(mask_features=features, latent=torch.zeros(1, 1, 1, 1))
        logits = decoder(audio, VisualFeatures(), torch.tensor([[0, 1]])).logits
    assert logits.isfinite().all()
    masks = logits[0, 0].sigmoid()
    torch.testing.assert_close(torch.stack((masks.min(), masks.max())), torch.tensor([1e-3, 1 - 1e-3]))
    logits.square().sum().backward()
    assert features.grad.isfinite().all()
    assert decoder.class_vectors.grad.isfinite().all()
    assert not decoder.class_vectors.grad[0].any()
    assert decoder.class_vectors.grad[1].any()


def test_what_a_class_costs():
    decoder = RidgeFilters(num_classes=5, mask_channels=32)
    assert sum(b.numel() * b.element_size() for n, b in decoder.named_buffers() if n in ("gram", "moment")) == 5 * 4224


def test_a_run_freezes_all_but_what_is_solved_for(tone_store, tmp_path):
    run = train(tone_store, tmp_path / "run", STRATEGY, "random_per_class", separator="ridge_filters")
    resumed = resume_killed(tone_store, run, STRATEGY, "random_per_class", separator="ridge_filters")
    assert differing(weights(run), weights(resumed)) == []
    before, after = weights(first_task(tone_store, STRATEGY, "ridge_filters"), 0), weights(run)
    # taken from another run, and solved for once
    assert differing(before, weights(run, 0)) == []
    old = load_separator(run, 0).mask_decoder
    assert old.solved.all()
    for name, value in before.items():
        if not name.startswith("mask_decoder."):
            assert torch.equal(after[name], value), name
    new = load_separator(run, 1).mask_decoder
    assert new.solved.all()
    assert torch.equal(new.class_vectors[:2], old.class_vectors)
    assert (new.gram[:2].diagonal(dim1=1, dim2=2) >= old.gram.diagonal(dim1=1, dim2=2)).all()  # exemplars add to them


@pytest.mark.slow
def test_without_memory_old_classes_stay_as_they_are(tone_store, tmp_path):
    run = train(tone_store, tmp_path / "run", STRATEGY, separator="ridge_filters")
    before, after = weights(run, 0), weights(run)
    for name in ("gram", "moment", "solution"):
        assert torch.equal(after[f"mask_decoder.{name}"][:2], before[f"mask_decoder.{name}"]), name


def test_wrong_settings_and_separators():
    student, _ = student_and_teacher()
    with pytest.raises(ConfigError, match="mask decoder 'ridge_filters', not of 'query_transformer'"):
        STRATEGIES.create("analytic_mask").check(student)
    for params in ({"strength": 0}, {"mixtures": 0}):
        with pytest.raises(ConfigError, match="must be"):
            STRATEGIES.create("analytic_mask", params)
    with pytest.raises(ConfigError, match="makes no use of object features: leave the object_encoder out"):
        build_separator(mask_decoder="ridge_filters", object_encoder="frame_cnn", num_classes=2)

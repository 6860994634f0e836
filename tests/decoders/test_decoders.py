"""The query transformer: published size, what it reuses, masks, growth."""

from __future__ import annotations

import math

import pytest
import torch

from avsep.benchmarks.reference import _sine_map, _sine_sequence
from avsep.decoders import QueryTransformer
from avsep.decoders.query_transformer import positions_1d, positions_2d
from avsep.errors import ConfigError
from avsep.types import AudioFeatures, VisualFeatures

PUBLISHED = {"mask_channels": 32, "latent_channels": 256, "object_dim": 512, "motion_dim": 768}
SMALL = {
    "mask_channels": 3,
    "latent_channels": 12,
    "object_dim": 7,
    "dim": 16,
    "heads": 2,
    "feedforward": 24,
}


def small(num_classes=4, motion_dim=5, layers=3, **params):
    torch.manual_seed(0)
    return QueryTransformer(num_classes=num_classes, motion_dim=motion_dim, layers=layers, **{**SMALL, **params})


def inputs(batch=2, sources=2, steps=6, motion=True, classes=4):
    generator = torch.Generator().manual_seed(1)
    audio = AudioFeatures(
        torch.randn(batch, 3, 16, 24, generator=generator), torch.randn(batch, 12, 4, 6, generator=generator)
    )
    visual = VisualFeatures(
        torch.randn(batch, sources, 7, generator=generator),
        torch.randn(batch, sources, 5, steps, generator=generator) if motion else None,
    )
    return audio, visual, torch.randint(0, classes, (batch, sources), generator=generator)


def test_it_has_the_published_size_less_what_was_never_trained():
    count = {}
    with torch.device("meta"):
        for classes in (5, 6, 20):
            decoder = QueryTransformer(num_classes=classes, **PUBLISHED)
            count[classes] = sum(p.numel() for p in decoder.parameters())
    assert count[5] == 6_528_032 - 1_318_400 == 5_209_632
    assert count[6] - count[5] == 256
    # with the U-Net, and the dead tensors put back, the published total at 20 classes
    assert count[20] + 1_318_400 + 30_274_178 == 36_806_050


def test_positions_follow_the_formula():
    torch.testing.assert_close(positions_2d(5, 7, 16), _sine_map(5, 7, 16), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(positions_1d(9, 12), _sine_sequence(9, 12), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("motion", [True, False])
@pytest.mark.parametrize("sources", [1, 2, 3])
def test_every_parameter_gets_a_gradient(motion, sources):
    decoder = small(motion_dim=5 if motion else None)
    audio, visual, class_ids = inputs(sources=sources, motion=motion)
    output = decoder(audio, visual, class_ids)
    assert output.logits.shape == (2, sources, 16, 24)
    assert output.audio.shape == output.object.shape == (2, sources, 16)
    assert (output.motion is not None) == motion
    output.logits.square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_sources_do_not_see_each_other():
    decoder = small()
    audio, visual, class_ids = inputs(sources=3)
    together = decoder(audio, visual, class_ids)
    for n in range(3):
        one = VisualFeatures(visual.object[:, n : n + 1], visual.motion[:, n : n + 1])
        alone = decoder(audio, one, class_ids[:, n : n + 1])
        torch.testing.assert_close(alone.logits[:, 0], together.logits[:, n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.audio[:, 0], together.audio[:, n], rtol=1e-4, atol=1e-5)


def test_embeddings_are_the_projections():
    decoder = small()
    audio, visual, class_ids = inputs()
    output = decoder(audio, visual, class_ids)
    torch.testing.assert_close(output.object, decoder.object_proj(visual.object))
    torch.testing.assert_close(
        output.motion, decoder.motion_proj(visual.motion.mean(dim=3)), rtol=1e-4, atol=1e-5
    )  # mean and linear map commute


def test_padded_motion_steps_count_for_nothing():
    decoder = small()
    audio, visual, class_ids = inputs(steps=6)
    short = VisualFeatures(visual.object, visual.motion[..., :4])
    mask = torch.tensor([True] * 4 + [False] * 2).expand(2, 2, 6)
    padding = visual.motion.clone()
    padding[..., 4:] = 1e4
    padded = VisualFeatures(visual.object, padding, mask)
    a, b = decoder(audio, short, class_ids), decoder(audio, padded, class_ids)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.motion, b.motion, rtol=1e-4, atol=1e-4)
    nothing = VisualFeatures(visual.object, visual.motion, torch.zeros_like(mask))
    output = decoder(audio, nothing, class_ids)
    # layer 0 then looks at every step, as without a mask; the embedding is the mean of nothing
    torch.testing.assert_close(output.logits, decoder(audio, visual, class_ids).logits)
    assert (output.motion == 0).all()


def test_the_asked_class_decides():
    decoder = small()
    audio, visual, _ = inputs(batch=1, sources=2)
    same = VisualFeatures(visual.object[:, :1].expand(-1, 2, -1), visual.motion[:, :1].expand(-1, 2, -1, -1))
    logits = decoder(audio, same, torch.tensor([[0, 3]])).logits
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3
    logits = decoder(audio, same, torch.tensor([[2, 2]])).logits
    torch.testing.assert_close(logits[:, 0], logits[:, 1])


def test_grow_keeps_old_rows():
    decoder = small(num_classes=3)
    old = decoder.class_queries.detach().clone()
    decoder.grow(5)
    assert decoder.class_queries.shape == (5, 16)
    assert torch.equal(decoder.class_queries[:3], old)
    assert decoder.class_queries.requires_grad
    assert decoder.class_queries[3:].std() > 0.5
    audio, visual, _ = inputs()
    assert decoder(audio, visual, torch.tensor([[4, 0], [3, 1]])).logits.isfinite().all()
    with pytest.raises(ConfigError, match="from 5 classes to 4"):
        decoder.grow(4)


def test_transformer_matrices_start_as_published():
    torch.manual_seed(0)
    decoder = QueryTransformer(num_classes=5, **PUBLISHED)
    weight = decoder.encoder[0].self_attention.in_weight  # [768, 256]: Xavier over the packed matrix
    bound = (6 / (768 + 256)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert (decoder.encoder[0].self_attention.in_bias == 0).all()
    for part in (decoder.encoder[0], decoder.motion_layer, decoder.layers[0]):
        weight = part.feedforward.linear1.weight  # [1024, 256]; PyTorch's default would be within 1/16
        assert 0.99 * (6 / (1024 + 256)) ** 0.5 < weight.abs().max() <= (6 / (1024 + 256)) ** 0.5
    assert decoder.object_proj.weight.abs().max() <= 1 / 512**0.5  # PyTorch's default outside the transformer
    assert abs(decoder.class_queries.std() - 1) < 0.1


def test_it_runs_in_mixed_precision():
    decoder = small()
    audio, visual, class_ids = inputs()
    mask = torch.ones(2, 2, 6, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(audio, VisualFeatures(visual.object, visual.motion, mask), class_ids)
    exact = decoder(audio, visual, class_ids)
    assert (output.logits.float() - exact.logits).abs().max() < 0.2 * exact.logits.abs().max()


def test_missing_features_and_wrong_sizes_are_named():
    audio, visual, class_ids = inputs(motion=False)
    with pytest.raises(ConfigError, match="motion"):
        small()(audio, visual, class_ids)
    with pytest.raises(ConfigError, match="object"):
        small()(audio, VisualFeatures(), class_ids)
    with pytest.raises(ValueError, match="heads"):
        small(dim=16, heads=3)
    with pytest.raises(ValueError, match="layers must be at least 2"):
        small(layers=1)
    assert small(layers=1, motion_dim=None)(audio, visual, class_ids).logits.isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
def test_motion_attention_is_what_layer_0_does_to_the_class_query(padded):
    """The weights, times the projected values, are what the attention itself gave in the forward pass."""
    decoder = small()
    audio, visual, class_ids = inputs(sources=3)
    if padded:
        mask = torch.ones(2, 3, 6, dtype=torch.bool)
        mask[0, 1, 4:] = False
        mask[1, 2] = False  # nothing valid: looks at everything
        visual = VisualFeatures(visual.object, visual.motion, mask)
    attention = decoder.motion_layer.motion_attention
    calls = []
    attention.register_forward_hook(lambda module, args, out: calls.append((args, out)))
    decoder(audio, visual, class_ids)
    ((query, key, value, attention_mask), out) = calls[0]
    by_head = attention.weights(query, key, attention_mask)  # [B*N, h, Q, Tm]
    values = attention._project(value, 2)
    torch.testing.assert_close(attention.out((by_head @ values).transpose(1, 2).flatten(2)), out)
    own = by_head.mean(dim=1)[torch.arange(6), class_ids.flatten()].view(2, 3, 6)
    found = decoder.motion_attention(visual, class_ids)
    torch.testing.assert_close(found, own)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(2, 3))
    if padded:
        assert (found[0, 1, 4:] == 0).all()
        assert (found[1, 2] > 0).all()
    found[0, 0, 0].backward()
    assert all(
        p.grad.abs().max() > 0 for p in (decoder.class_queries, decoder.motion_proj.weight, decoder.object_proj.weight)
    )


def test_motion_attention_by_hand():
    """One head of width 4 with identity projections: softmax(q k / 2) over positions 0 and 1 of motion 0."""
    decoder = QueryTransformer(
        num_classes=1, mask_channels=1, latent_channels=4, object_dim=4, motion_dim=4, dim=4, heads=1, layers=2
    )
    attention = decoder.motion_layer.motion_attention
    with torch.no_grad():
        attention.in_weight.copy_(torch.eye(4).repeat(3, 1))
        decoder.object_proj.weight.copy_(torch.eye(4))
        decoder.object_proj.bias.zero_()
        decoder.class_queries.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
        decoder.motion_proj.weight.zero_()
        decoder.motion_proj.bias.zero_()
    visual = VisualFeatures(torch.tensor([[[2.0, 0.0, 0.0, 0.0]]]), torch.zeros(1, 1, 4, 2))
    found = decoder.motion_attention(visual, torch.zeros(1, 1, dtype=torch.int64))
    # keys are the positions (sin 0, cos 0, ...) = (0, 1, 0, 1) and (sin 1, cos 1, ...); the query is (2, 1, 0, 0)
    scores = torch.tensor([1.0, 2 * math.sin(1) + math.cos(1)]) / 2
    torch.testing.assert_close(found[0, 0], scores.softmax(0))


def test_without_motion_there_is_no_motion_attention():
    _, visual, class_ids = inputs(motion=False)
    assert small(motion_dim=None).motion_attention(visual, class_ids) is None
    with pytest.raises(ConfigError, match="no motion features were given"):
        small().motion_attention(visual, class_ids)
    with pytest.raises(ConfigError, match="needs object features"):
        small().motion_attention(VisualFeatures(), class_ids)

"""Decoders that follow their sources in time: aligned_query, tpavi, time-varying queries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avsep.decoders import TPAVI, AlignedQuery, QueryTransformer
from avsep.decoders._alignment import at_frames, is_present, time_varying_logits
from avsep.decoders.tpavi import interaction
from avsep.errors import ConfigError
from avsep.types import AudioFeatures, Spectrograms, VisualFeatures, limit_mask_sum

CHANNELS, LATENT, OBJECT, MOTION = 3, 12, 7, 5


def features(batch=2, sources=2, steps=6, frames=24):
    generator = torch.Generator().manual_seed(1)
    audio = AudioFeatures(
        torch.randn(batch, CHANNELS, 16, frames, generator=generator),
        torch.randn(batch, LATENT, 2, frames // 8, generator=generator),
        spectrogram=torch.rand(batch, 1, 16, frames, generator=generator),
    )
    visual = VisualFeatures(
        torch.randn(batch, sources, OBJECT, generator=generator),
        torch.randn(batch, sources, MOTION, steps, generator=generator),
    )
    return audio, visual, torch.tensor([[0, 1], [2, 2]])[:batch, :sources]


def aligned(**params):
    torch.manual_seed(0)
    sizes = {
        "mask_channels": CHANNELS,
        "object_dim": OBJECT,
        "motion_dim": MOTION,
        "log_rows": 16,
        "dim": 8,
        "bands": 4,
    }
    return AlignedQuery(num_classes=3, **{**sizes, **params}).eval()


def tpavi(**params):
    torch.manual_seed(0)
    sizes = {"mask_channels": CHANNELS, "latent_channels": LATENT, "object_dim": OBJECT, "motion_dim": MOTION}
    decoder = TPAVI(num_classes=3, **sizes, dim=4, **params)
    torch.nn.init.normal_(decoder.out_norm.weight)  # it begins at zero, without a say for what is seen
    return decoder.eval()


def varying():
    torch.manual_seed(0)
    sizes = {"mask_channels": CHANNELS, "latent_channels": LATENT, "object_dim": OBJECT, "motion_dim": MOTION}
    decoder = QueryTransformer(
        num_classes=3, **sizes, dim=8, heads=2, feedforward=8, layers=2, log_rows=16, time_varying=True
    )
    torch.nn.init.normal_(decoder.time_varying.out.weight)
    return decoder.eval()


# ------------------------------------------------------------------------------------------------------------ in time


def test_steps_are_interpolated_between_their_middles():
    steps = torch.tensor([[[0.0, 4.0]]])
    assert at_frames(steps, 4).tolist() == [[[0.0, 1.0, 3.0, 4.0]]]
    assert torch.equal(at_frames(steps, 2), steps)


def test_valid_steps_alone_span_the_clip():
    steps = torch.tensor([[[0.0, 4.0, 9.0]], [[7.0, 0.0, 4.0]], [[0.0, 4.0, 8.0]], [[1.0, 2.0, 3.0]]])
    valid = torch.tensor([[True, True, False], [False, True, True], [True, True, True], [False, False, False]])
    found = at_frames(steps, 4, valid)
    assert found[0, 0].tolist() == found[1, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
    torch.testing.assert_close(found[2:], at_frames(steps[2:], 4))  # none valid counts as all


def test_logits_are_the_weighted_sum_of_the_mask_features():
    weights, bias, maps = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 4, 5), torch.randn(2, 3, 4, 5)
    expected = torch.einsum("bnkt,bkft->bnft", weights, maps) + bias
    torch.testing.assert_close(time_varying_logits(weights, bias, maps), expected)


@pytest.mark.parametrize("make", [aligned, tpavi, varying])
def test_motion_at_a_time_changes_the_mask_there(make):
    decoder = make()
    audio, visual, ids = features()
    before = decoder(audio, visual, ids).logits
    moved = visual.motion.clone()
    moved[:, 0, :, -1] += 3.0  # the first source moves at the end
    change = (decoder(audio, replace(visual, motion=moved), ids).logits - before).abs().mean(dim=(0, 2))  # [N, T]
    assert change[1].max() == 0  # the sources do not depend on each other
    assert change[0, -4:].mean() > 0
    if make is aligned:  # the others mix all times somewhere
        assert change[0, :2].max() == 0


@pytest.mark.parametrize("make", [aligned, tpavi, varying])
def test_padding_of_motion_does_not_count(make):
    decoder = make()
    audio, visual, ids = features()
    padded = torch.cat((visual.motion, torch.full_like(visual.motion[..., :2], 50.0)), dim=-1)
    valid = torch.ones(2, 2, 8, dtype=torch.bool)
    valid[..., 6:] = False
    masked = decoder(audio, VisualFeatures(visual.object, padded, valid), ids).logits
    torch.testing.assert_close(masked, decoder(audio, visual, ids).logits)


# ------------------------------------------------------------------------------------------------------ aligned_query


def test_without_a_class_only_the_picture_counts():
    decoder = aligned(class_given=False)
    audio, visual, ids = features()
    assert torch.equal(decoder(audio, visual, ids).logits, decoder(audio, visual, 2 - ids).logits)
    assert decoder.class_agnostic
    assert decoder.query_parameter == ""
    assert not any(p.shape[0] == 3 and name == "class_queries" for name, p in decoder.named_parameters())
    decoder.grow(5)
    assert decoder.num_classes == 5
    with_class = aligned()
    assert not with_class.class_agnostic
    assert not torch.equal(with_class(audio, visual, ids).logits, with_class(audio, visual, 2 - ids).logits)


def test_new_classes_leave_the_old_ones_as_they_are():
    decoder = aligned()
    audio, visual, ids = features()
    before = decoder(audio, visual, ids).logits
    decoder.grow(5)
    assert torch.equal(decoder(audio, visual, ids).logits, before)
    assert decoder.class_queries.shape == (5, 8)
    with pytest.raises(ConfigError, match="cannot go from 5 classes to 2"):
        decoder.grow(2)


def test_what_stands_in_place_of_a_missing_picture_does_not_count():
    decoder = aligned()
    audio, visual, ids = features()
    seen = torch.tensor([[True, False], [True, True]])
    partly = decoder(audio, replace(visual, seen=seen), ids)
    noise = replace(visual, object=visual.object.clone(), motion=visual.motion.clone(), seen=seen)
    noise.object[0, 1], noise.motion[0, 1] = 9.0, -9.0
    assert torch.equal(decoder(audio, noise, ids).logits, partly.logits)
    whole = decoder(audio, visual, ids)
    assert torch.equal(whole.logits[1], partly.logits[1])
    assert not torch.equal(whole.logits[0, 1], partly.logits[0, 1])


def test_a_picture_alone_says_nothing_of_the_motion():
    decoder = aligned()
    audio, visual, ids = features()
    known = torch.tensor([[True, False], [True, True]])
    partly = decoder(audio, replace(visual, motion_seen=known), ids).logits
    moved = replace(visual, motion=visual.motion.clone(), motion_seen=known)
    moved.motion[0, 1] = -9.0
    assert torch.equal(decoder(audio, moved, ids).logits, partly)
    assert not torch.equal(decoder(audio, replace(visual, seen=known), ids).logits[0, 1], partly[0, 1])
    assert torch.equal(partly[1], decoder(audio, visual, ids).logits[1])


def test_presence_has_no_say_in_the_masks():
    decoder = aligned().train()
    audio, visual, ids = features()
    maps = audio.mask_features.clone().requires_grad_()
    output = decoder(replace(audio, mask_features=maps), visual, ids)
    assert output.presence.shape == (2, 2)
    weights = torch.autograd.grad(output.presence.sum(), decoder.head.out.weight, allow_unused=True)[0]
    assert weights is None  # of the mask's weights


def test_a_source_is_present_from_a_hundredth_of_the_mixture_on():
    level = torch.full((1, 1, 2, 2), 1.0).log1p()
    ratio = torch.tensor([0.0, 0.009, 0.011, 0.9])[None, :, None, None].expand(1, 4, 2, 2)
    found = is_present(Spectrograms(level, level, ratio, level))
    assert found.tolist() == [[False, False, True, True]]


def test_presence_is_learned_by_cross_entropy():
    decoder = aligned(presence_weight=0.5)
    audio, visual, ids = features()
    output = decoder(audio, visual, ids)
    ratio = torch.zeros(2, 2, 16, 24)
    ratio[:, 0] = 1.0
    spectrograms = Spectrograms(audio.spectrogram, audio.spectrogram, ratio, audio.spectrogram)
    loss = decoder.auxiliary_losses(output, spectrograms, ids)["presence"]
    p = output.presence.sigmoid()
    torch.testing.assert_close(loss, -0.25 * (p[:, 0].log().mean() + (1 - p[:, 1]).log().mean()))
    assert aligned(presence_weight=0.0).auxiliary_losses(output, spectrograms, ids) == {}


@pytest.mark.parametrize(
    ("params", "message"),
    [({"kernel": 4}, "kernel odd"), ({"dim": 0}, "must be positive"), ({"presence_weight": -1.0}, "0 or more")],
)
def test_wrong_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        aligned(**params)


@pytest.mark.parametrize("make", [aligned, tpavi])
def test_missing_features_are_named(make):
    decoder = make()
    audio, visual, ids = features()
    with pytest.raises(ConfigError, match="needs object features"):
        decoder(audio, VisualFeatures(motion=visual.motion), ids)
    with pytest.raises(ConfigError, match="no motion features were given"):
        decoder(audio, VisualFeatures(object=visual.object), ids)


# -------------------------------------------------------------------------------------------------- the other decoders


def test_interaction_equals_the_sum_over_all_places():
    query, key, value = (torch.randn(*size, dtype=torch.float64) for size in ((2, 5, 3, 4), (2, 2, 5, 4), (2, 5, 3, 4)))
    repeated = key[:, :, :, None].expand(-1, -1, -1, 3, -1)
    expected = torch.einsum("behw,bnexy,bfxy->bnfhw", query, repeated, value) / 12
    torch.testing.assert_close(interaction(query, key, value), expected, rtol=0, atol=1e-14)


def test_tpavi_begins_with_the_latent_alone():
    torch.manual_seed(0)
    decoder = TPAVI(num_classes=3, mask_channels=CHANNELS, latent_channels=LATENT, object_dim=OBJECT, dim=4).eval()
    audio, visual, ids = features()
    logits = decoder(audio, VisualFeatures(visual.object), ids).logits
    assert torch.equal(logits[:, 0], logits[:, 1])


def test_time_varying_queries_begin_as_the_published_ones():
    sizes = {"mask_channels": CHANNELS, "latent_channels": LATENT, "object_dim": OBJECT, "motion_dim": MOTION}
    made = {}
    for varying_in_time in (False, True):
        torch.manual_seed(0)
        made[varying_in_time] = QueryTransformer(
            num_classes=3, **sizes, dim=8, heads=2, feedforward=8, layers=2, log_rows=16, time_varying=varying_in_time
        )
    audio, visual, ids = features()
    plain, in_time = (decoder(audio, visual, ids).logits for decoder in made.values())
    torch.testing.assert_close(in_time, plain)


# --------------------------------------------------------------------------------------------------- masks that add up


def test_masks_are_divided_by_their_sum_where_it_is_above_one():
    logits = 4 * torch.randn(2, 3, 5, 5)
    masks = logits.sigmoid()
    limited = limit_mask_sum(logits)
    total = masks.sum(dim=1, keepdim=True)
    torch.testing.assert_close(limited.sigmoid(), masks / total.clamp(min=1.0), rtol=1e-5, atol=1e-6)
    below = (total <= 1).expand_as(masks)
    assert below.any()
    assert not below.all()
    assert torch.equal(limited[below], logits[below])


def test_extreme_masks_stay_finite():
    logits = torch.tensor([1e4, 1e4, -1e4])[None, :, None, None].requires_grad_()
    limited = limit_mask_sum(logits)
    torch.testing.assert_close(limited.sigmoid().flatten(), torch.tensor([0.5, 0.5, 0.0]))
    limited.sum().backward()
    assert logits.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- causal


def causal_parts():
    audio, visual, ids = features()
    return aligned(motion_dim=None, causal=True, layers=3), audio, replace(visual, motion=None), ids


def up_to(audio, frames):
    return replace(audio, mask_features=audio.mask_features[..., :frames], spectrogram=audio.spectrogram[..., :frames])


def test_a_causal_decoders_frames_do_not_know_later_ones():
    decoder, audio, visual, ids = causal_parts()
    whole = decoder(audio, visual, ids)
    torch.testing.assert_close(decoder(up_to(audio, 11), visual, ids).logits, whole.logits[..., :11])
    ahead = aligned(motion_dim=None, layers=3)
    ahead.load_state_dict(decoder.state_dict())
    centred = ahead(audio, visual, ids).logits
    assert (ahead(up_to(audio, 11), visual, ids).logits - centred[..., :11]).abs().max() > 1e-4
    # kernels that read no other frame are the same in both kinds
    assert torch.equal(
        aligned(motion_dim=None, kernel=1)(audio, visual, ids).logits,
        aligned(motion_dim=None, kernel=1, causal=True)(audio, visual, ids).logits,
    )


@pytest.mark.parametrize("sizes", [[1] * 24, [5, 19], [23, 1]])
def test_a_causal_decoder_goes_frame_by_frame(sizes):
    decoder, audio, visual, ids = causal_parts()
    whole = decoder(audio, visual, ids)
    state = {name: torch.zeros(2, 2, *shape) for name, shape in decoder.state_shapes().items()}
    logits, begin = [], 0
    for size in sizes:
        part = replace(
            audio,
            mask_features=audio.mask_features[..., begin : begin + size],
            spectrogram=audio.spectrogram[..., begin : begin + size],
        )
        output, after = decoder.advance(part, visual, ids, state)
        assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in state.items()}
        state = after
        logits.append(output.logits)
        begin += size
        if begin == 5:
            torch.testing.assert_close(output.presence, decoder(up_to(audio, 5), visual, ids).presence)
    torch.testing.assert_close(torch.cat(logits, dim=-1), whole.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.presence, whole.presence, rtol=1e-4, atol=1e-5)


def test_a_decoder_that_looks_ahead_keeps_no_state():
    audio, visual, ids = features()
    with pytest.raises(ConfigError, match="looks ahead"):
        aligned().state_shapes()
    with pytest.raises(ConfigError, match="looks ahead"):
        aligned().advance(audio, visual, ids, {})

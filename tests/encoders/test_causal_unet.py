"""causal_unet: its sizes, what it looks at, and its pass frame by frame."""

from __future__ import annotations

import pytest
import torch

from avsep.encoders import CausalUNet, UNet7
from avsep.errors import ConfigError


def encoder(**params):
    torch.manual_seed(0)
    made = CausalUNet(**{"base_channels": 3, "mask_channels": 5, **params}).eval()
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return made.requires_grad_(False)


def test_sizes():
    with torch.device("meta"):
        unet = CausalUNet(base_channels=8)
        features = unet(torch.empty(2, 1, 128, 37))
    assert sum(p.numel() for p in unet.parameters()) == 257_074
    assert features.mask_features.shape == (2, 16, 128, 37)
    assert features.latent.shape == (2, 32, 16, 37)
    assert [tuple(s.shape[1:]) for s in features.skips] == [
        (8, 64, 37),
        (16, 32, 37),
        (32, 16, 37),
        (64, 8, 37),
        (64, 4, 37),
    ]
    assert [tuple(u.shape[1:]) for u in features.ups] == [(64, 8, 37), (32, 16, 37), (16, 32, 37), (8, 64, 37)]
    assert (unet.mask_channels, unet.latent_channels) == (16, 32)
    assert {name: tuple(tap.shape[1:2]) for name, tap in unet.taps(features).items()} == {
        "e3": (32,),
        "e4": (64,),
        "e5": (64,),
        "d4": (32,),
        "d2": (8,),
        "F": (16,),
    }


def reach(unet, frames=260, place=130):
    """The frames that a change of one frame changes, from it on: the first and the last."""
    x = torch.rand(1, 1, 32, frames)
    changed = x.clone()
    changed[..., place] += 1.0
    moved = (unet(x).mask_features != unet(changed).mask_features).flatten(0, 2).any(dim=0).nonzero()
    return int(moved[0]) - place, int(moved[-1]) - place


def test_a_frame_depends_on_itself_and_92_before():
    assert reach(encoder()) == (0, 92)


def test_without_causality_it_looks_as_far_ahead_as_back():
    assert reach(encoder(causal=False)) == (-46, 46)
    assert reach(encoder(kernel=1)) == (0, 0)


def test_the_two_kinds_have_the_same_weights():
    assert {n: p.shape for n, p in encoder().state_dict().items()} == {
        n: p.shape for n, p in encoder(causal=False).state_dict().items()
    }


@pytest.mark.parametrize("sizes", [[1] * 21, [20, 1], [3, 18], [21]])
def test_frame_by_frame_it_gives_what_it_gives_of_the_whole(sizes):
    unet = encoder()
    x = torch.rand(2, 1, 64, 21)
    whole = unet(x)
    state = {name: torch.zeros(2, *shape) for name, shape in unet.state_shapes(64).items()}
    parts = []
    for piece in x.split(sizes, dim=-1):
        features, after = unet.advance(piece, state)
        assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in state.items()}
        parts.append(features)
        state = after
    for name in ("mask_features", "latent", "spectrogram"):
        found = torch.cat([getattr(part, name) for part in parts], dim=-1)
        torch.testing.assert_close(found, getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_kernels_of_one_frame_need_no_state():
    assert encoder(kernel=1).state_shapes(32) == {}
    assert encoder().state_shapes(32)["down4"] == (24, 2, 16)


def test_in_training_statistics_are_of_whole_clips():
    """They are not causal; in evaluation the running ones are used, which are."""
    unet = encoder().train()
    x = torch.rand(2, 1, 32, 40)
    changed = x.clone()
    changed[..., 30:] *= 3.0
    early = [unet(one).mask_features[..., :20].clone() for one in (x, changed)]
    assert not torch.equal(*early)
    unet.eval()
    assert torch.equal(*(unet(one).mask_features[..., :20] for one in (x, changed)))


@pytest.mark.parametrize("made", [CausalUNet(base_channels=2, causal=False), UNet7(base_channels=2)])
def test_an_encoder_that_looks_ahead_keeps_no_state(made):
    assert not made.causal
    with pytest.raises(ConfigError, match="looks ahead"):
        made.state_shapes(32)
    with pytest.raises(ConfigError, match="looks ahead"):
        made.advance(torch.zeros(1, 1, 32, 1), {})


def test_what_it_cannot_take():
    with pytest.raises(ConfigError, match="needs F in multiples of 32, got 40: change the front end's log_rows"):
        encoder()(torch.zeros(1, 1, 40, 3))
    with pytest.raises(ValueError, match="kernel must be odd, got 2"):
        CausalUNet(kernel=2)
    with pytest.raises(ValueError, match="must be positive, got 0, 16"):
        CausalUNet(base_channels=0)

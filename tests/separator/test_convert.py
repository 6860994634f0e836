"""Published checkpoints: the literal network and the converted one say the same."""

from __future__ import annotations

import re

import pytest
import torch

from avsep.benchmarks.reference import PublishedPredictor, PublishedSeparator, PublishedUNet
from avsep.errors import CheckpointError
from avsep.separator import build_separator
from avsep.separator.convert import convert_published, load_published, read_published
from avsep.types import VisualInputs

SIZES = {"object_dim": 6, "motion_dim": 5, "dim": 16, "heads": 4, "feedforward": 20, "mask_channels": 3}


@pytest.fixture
def published():
    torch.manual_seed(0)
    separator = PublishedSeparator(
        PublishedUNet(base_channels=4, mask_channels=3), PublishedPredictor(num_classes=4, **SIZES)
    )
    for module in separator.modules():  # normalisation that has seen something
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
        elif isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
        elif isinstance(module, torch.nn.MultiheadAttention):
            torch.nn.init.normal_(module.in_proj_bias, 0.0, 0.2)
            torch.nn.init.normal_(module.out_proj.bias, 0.0, 0.2)
    return separator.eval()


def files(published, folder, prefix=""):
    paths = []
    for name, module in (("sound", published.sound), ("predictor", published.predictor)):
        paths.append(folder / f"{name}.pth")
        torch.save({prefix + key: value for key, value in module.state_dict().items()}, paths[-1])
    return paths


def test_reference_has_the_published_layout_and_size():
    with torch.device("meta"):
        sound = PublishedUNet()
        predictor = PublishedPredictor(num_classes=5)
    assert sum(p.numel() for p in sound.parameters()) == 30_274_178
    assert sum(p.numel() for p in predictor.parameters()) == 6_528_032
    converted = convert_published(sound.state_dict(), predictor.state_dict())
    shapes = {name: value.shape for name, value in predictor.state_dict().items()}
    assert len(converted.dropped) == 30
    assert sum(shapes[name].numel() for name in converted.dropped) == 1_318_400
    assert converted.sizes["num_classes"] == 5


def test_converted_equals_published(published, tmp_path):
    classes = ("cello", "flute", "guzheng", "tuba")
    separator = load_published(*files(published, tmp_path, prefix="module."), classes=classes, heads=4)
    assert separator.classes == classes
    assert not separator.training
    torch.manual_seed(1)
    x, objects, motion = torch.rand(2, 1, 128, 128), torch.randn(2, 3, 3, 6), torch.randn(2, 3, 5, 8)
    class_ids = torch.tensor([[0, 1, 3], [2, 3, 0]])
    with torch.no_grad():
        expected = published(x, objects.amax(dim=2), motion, class_ids)
        output = separator(x, separator.encode_visual(VisualInputs(objects, motion)), class_ids)
    for mine, theirs in zip((output.logits, output.audio, output.object, output.motion), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert expected[0].std() > 0.01  # not a comparison of zeros


def test_every_converted_tensor_matters(published, tmp_path):
    """Spoil one published tensor at a time: the converted state changes where and only where it should."""
    sound, predictor = published.sound.state_dict(), published.predictor.state_dict()
    whole = convert_published(sound, predictor)
    for name in predictor:
        spoiled = convert_published(sound, {**predictor, name: predictor[name] + 1})
        changed = [key for key, value in whole.state.items() if not torch.equal(value, spoiled.state[key])]
        assert len(changed) == (0 if name in whole.dropped else 1), name


def test_a_missing_counter_is_filled_in(published):
    sound = {k: v for k, v in published.sound.state_dict().items() if "num_batches" not in k}
    assert (
        convert_published(sound, published.predictor.state_dict()).state["audio_encoder.input_norm.num_batches_tracked"]
        == 0
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s, p: s.pop("upconv3.weight"), "1 tensors are missing, among them 'upconv3.weight'"),
        (lambda s, p: p.pop("down.bias"), "missing, among them 'down.bias'"),
        (lambda s, p: s.update(downconv8=torch.ones(1)), "not part of the published network.*'downconv8'"),
        (lambda s, p: s.update({"bn0.weight": 3.0}), "'bn0.weight' is a float"),
        (lambda s, p: s.update({"downconv2.weight": torch.ones(3, 3)}), r"'down.1.weight' has the shape \[3, 3\]"),
        (lambda s, p: p.update({"objproj.weight": torch.ones(16)}), "no decoder layers, or a tensor is a scalar"),
        (
            lambda s, p: [p.pop(name) for name in list(p) if re.search(r"decoder\.layers\.[1-9]", name)],
            "published checkpoint: layers must be at least 2, got 1",
        ),
    ],
)
def test_what_is_wrong_is_named(published, spoil, message):
    sound, predictor = dict(published.sound.state_dict()), dict(published.predictor.state_dict())
    spoil(sound, predictor)
    with pytest.raises(CheckpointError, match=message):
        convert_published(sound, predictor)


def test_swapped_files_are_noticed(published, tmp_path):
    sound, predictor = files(published, tmp_path)
    with pytest.raises(CheckpointError, match="in the order net_sound, maskformer"):
        read_published(predictor, sound)


class _Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_not_tensors_are_refused(tmp_path, capsys):
    good = tmp_path / "good.pth"
    torch.save({"a": torch.ones(1)}, good)
    cases = {"absent": None, "empty": b"", "text": b"hello", "truncated": good.read_bytes()[:100]}
    for name, content in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_published(path, good)
    code = tmp_path / "code.pth"
    torch.save({"a": _Payload()}, code)
    with pytest.raises(CheckpointError, match="not a file of PyTorch tensors"):
        read_published(code, good)
    assert "executed" not in capsys.readouterr().out
    torch.save([1, 2], good)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_published(good, good)


@pytest.mark.parametrize("memory", ["some", "none"])
def test_the_library_trains_as_the_literal_step(published, memory):
    """One step of ContAV-Sep: the library's savings change neither the loss terms nor the updated weights."""
    from avsep.benchmarks.reference import LiteralBatch, literal_training_step
    from avsep.strategies import ContAVSep
    from avsep.strategies.base import Step
    from avsep.types import Batch, Spectrograms

    torch.manual_seed(2)
    old_classes, classes, batch, sources = 4, 6, 4, 2
    teacher = published.double()
    student = teacher.grown(classes).double().train()
    class_ids = torch.tensor([[0, 5], [4, 5], [4, 2], [1, 2]])
    if memory == "none":
        class_ids = torch.tensor([[5, 5], [4, 5], [4, 4], [4, 5]])
    video_ids = torch.tensor([[0, 1], [2, 1], [3, 4], [5, 4]])
    objects = torch.randn(batch, sources, 3, 6, dtype=torch.float64)
    motion = torch.randn(batch, sources, 5, 8, dtype=torch.float64)
    x, weight = (torch.rand(batch, 1, 128, 128, dtype=torch.float64) for _ in range(2))
    ratio = torch.rand(batch, sources, 128, 128, dtype=torch.float64)

    def ours(network):
        sizes = {key: SIZES[key] for key in ("dim", "heads", "feedforward")}
        separator = build_separator(
            num_classes=network.predictor.query_embed.num_embeddings,
            audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 3}),
            object_encoder=("precomputed", {"features": "o", "dim": 6}),
            motion_encoder=("precomputed", {"features": "m", "dim": 5}),
            mask_decoder=("query_transformer", sizes),
        ).double()
        separator.load_state_dict(convert(network))
        return separator

    def convert(network):
        converted = convert_published(network.sound.state_dict(), network.predictor.state_dict())
        return {name: value.clone() for name, value in converted.state.items()}

    mine, my_teacher = ours(student).train(), ours(teacher).eval()
    optimizer = torch.optim.SGD([p for group in mine.parameter_groups().values() for p in group], lr=0.1)
    visual = mine.encode_visual(VisualInputs(objects, motion))
    audio = mine.audio_encoder(x)
    step = Step(
        batch=Batch(torch.zeros(0), class_ids, video_ids, class_ids < old_classes, VisualInputs(objects, motion)),
        spectrograms=Spectrograms(x, weight, ratio, torch.zeros(0)),
        audio=audio,
        visual=visual,
        output=mine.mask_decoder(audio, visual, class_ids),
        num_old=old_classes,
        student=mine,
        teacher=my_teacher,
    )
    terms = ContAVSep().loss(step)
    total = sum(terms.values())
    total.backward()
    optimizer.step()

    literal = LiteralBatch(x, weight, ratio, objects.amax(dim=2), motion, class_ids, video_ids, class_ids < old_classes)
    expected = literal_training_step(student, teacher, literal, [torch.optim.SGD(student.parameters(), lr=0.1)])
    assert expected["instance"] > 0.1
    assert (expected["distillation"] > 0) == (memory == "some")
    assert total.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert terms["class"].item() == pytest.approx(0.3 * expected["class"], rel=1e-5)
    if memory == "some":
        assert terms["mask"].item() == pytest.approx(0.3 * expected["distillation"], rel=1e-5)
    updated, state = convert(student), mine.state_dict()
    for name, value in updated.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)

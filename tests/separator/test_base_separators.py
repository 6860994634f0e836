"""Co-Separation and Sound of Pixels from end to end: training, scores, commands, export, presets."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from avsep.cli import main
from avsep.export import ExportPlan, export, verify_bundle
from avsep.export.build.graph import WaveformSeparator
from avsep.separator import build_separator, load_separator
from avsep.spec import list_presets, load_preset
from avsep.types import VisualFeatures, VisualInputs
from support.continual_runs import SEPARATORS, differing, trained, weights

BASES = ("coseparation", "sound_of_pixels")


@pytest.mark.parametrize("base", [*BASES, "coseparation_detached"])
def test_contavsep_learns_in_every_part(base, tone_store):
    run = trained(tone_store, "contavsep", "random_per_class", separator=base)
    with open(run / "logs" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    terms = {"separation", "instance", "class", "mask"} | ({"consistency"} if base != "sound_of_pixels" else set())
    assert all(any(float(row[term] or 0) > 0 for row in rows if row["task"] == "1") for term in terms)
    first, last = weights(run, 0), weights(run, 1)
    same = {name for name in first if first[name].shape == last[name].shape} - set(differing(first, last))
    assert all(name.endswith("num_batches_tracked") for name in same), same


def test_joint_training_starts_over(tone_store):
    run = trained(tone_store, "joint", separator="coseparation")
    assert load_separator(run).classes == ("ding", "hum", "peep", "whirr")
    assert differing(weights(run, 0), weights(run, 1))


@pytest.mark.parametrize("base", BASES)
def test_the_teacher_has_embeddings_and_masks_of_every_class(base, tone_store):
    """Masks are class-agnostic: a separator of two classes answers for a source of a third."""
    separator = load_separator(trained(tone_store, "contavsep", "random_per_class", separator=base), task=0)
    separator.requires_grad_(False)
    frames = torch.randint(0, 256, (2, 2, 3, 3, 32, 32), dtype=torch.uint8)
    x = torch.rand(2, 1, 128, 128)
    visual = separator.encode_visual(VisualInputs(frames))
    with torch.no_grad():
        output = separator(x, visual, torch.tensor([[0, 1], [1, 0]]))
        other = separator(x, visual, torch.zeros(2, 2, dtype=torch.long))
    assert torch.equal(output.logits, other.logits)
    before = {name: value.clone() for name, value in separator.state_dict().items()}
    assert output.audio.shape == output.object.shape
    assert not output.audio.requires_grad
    # asked for in evaluation mode, they change no running statistics
    assert all(torch.equal(value, before[name]) for name, value in separator.state_dict().items())


@pytest.mark.parametrize("base", BASES)
def test_evaluate_and_separate_from_the_command_line(base, tone_store, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(tone_store, "contavsep", "random_per_class", separator=base), run)
    clips = "ding-test-0,whirr-test-0"
    duet, out = tmp_path / "duet", tmp_path / "out"
    features = ("--features", duet / "features.npz", "--classes", "ding,whirr")
    for command in (
        ("evaluate", run),
        ("data", "mix", tone_store, "--clips", clips, "--out", duet),
        ("separate", duet / "duet.wav", "--run", run, *features, "--out", out),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(part) for part in command])
        assert not stop.value.code, command[0]
    assert len(json.loads((run / "evaluation.json").read_text())["matrix"]) == 2
    for name in ("ding", "whirr"):
        audio, _ = soundfile.read(next(out.glob(f"*{name}*.wav")))
        assert np.isfinite(audio).all()
        assert np.abs(audio).max() > 0


def varied(base):
    """A tiny separator with stored features, whose masks vary and whose normalisations have seen spectrograms."""
    torch.manual_seed(0)
    parts = {name: part for name, part in SEPARATORS[base].items() if name != "object_encoder"}
    separator = build_separator(
        **parts, object_encoder=("precomputed", {"features": "o", "dim": 6}), classes=("a", "b", "c")
    )
    for module in separator.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
    heard = separator.analyse(0.1 * torch.randn(4, 2, 8191)).network_input
    with torch.no_grad():
        separator(heard, VisualFeatures(torch.randn(4, 2, 6)), torch.zeros(4, 2, dtype=torch.long))
    return separator.eval()


@pytest.mark.parametrize("base", BASES)
def test_the_exported_module_answers_as_the_separator(base):
    separator = varied(base)
    mixture = 0.3 * torch.randn(2, 8191)
    mixture[:, 3000:5000] = 0  # digital silence, whose logarithm is the floor's
    objects, class_ids = 3 * torch.randn(2, 3, 6), torch.tensor([[0, 1, 2], [2, 2, 0]])
    with torch.inference_mode():
        expected = separator.separate(mixture, VisualFeatures(objects), class_ids)
        got = WaveformSeparator(separator)(mixture, objects, class_ids)
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.01
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("base", ["coseparation", pytest.param("sound_of_pixels", marks=pytest.mark.slow)])
def test_a_bundle(base, tmp_path):
    """No operator that TensorRT lacks, no classifier, PyTorch's answer in single and half precision."""
    onnx = pytest.importorskip("onnx")
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    bundle = export(varied(base), ExportPlan(precision=("fp32", "fp16")), tmp_path / "bundle").path
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    assert [graph["precision"] for graph in graphs] == ["fp32", "fp16"]
    for graph, most_db in zip(graphs, (-90, -50), strict=True):
        assert graph["parity"]["error_db"] < most_db
        assert graph["gate"]["passed"]
        assert [given["name"] for given in graph["inputs"]] == ["mixture", "object_features", "class_ids"]
        model = onnx.load(str(bundle / graph["file"]))
        assert not [i.name for i in model.graph.initializer if "classifier" in i.name]
        if base == "coseparation":  # folded, also where it follows a sum
            assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert verify_bundle(bundle)


@pytest.mark.parametrize("base", BASES)
def test_presets(base):
    small, full = (load_preset(name) for name in (f"{base}_small", base))
    assert {base, f"{base}_small"} <= list_presets().keys()
    for data in (small, full):
        assert data["source"]
        separator = build_separator(**{**data["separator"], "num_classes": 5})
        groups = separator.parameter_groups()
        assert (sum(p.numel() for p in groups["visual"]) > 0) == (data is small)
        total = sum(p.numel() for p in separator.parameters())
        expected = {
            "coseparation": 46_022_785 + 512 * 513 + 11_180_500 - 15 * 513,
            "sound_of_pixels": 30_274_178 + 513 * 32 + 33 + 33 * 32,
        }[base]
        assert total < 4e6 if data is small else total == expected
    # as the paper trains the U-Net: all parts by one rule
    for role in ("audio", "visual", "decoder"):
        assert full["train"][role] == {
            "name": "adam", "lr": 1e-4, "schedule": "step", "milestones": [31, 51], "gamma": 0.1,
        }  # fmt: skip

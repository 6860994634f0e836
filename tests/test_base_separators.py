"""Co-Separation and Sound of Pixels from end to end: every strategy, kills, scores, commands, export."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from continual_runs import SEPARATORS, differing, make_learner, resume_killed, trained, weights

from avsep.cli import main
from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.separator import build_from_spec, build_separator, list_components, load_separator
from avsep.spec import SeparatorSpec, list_presets, load_preset, validated

BASES = ("coseparation", "sound_of_pixels")
# strategies that other tests run on each separator, or that take part in the tests below
ELSEWHERE = ("ewc", "plop", "contavsep", "query_extension", "anchored")


def _strategies():
    return [spec.name for spec in list_components("strategies") if spec.name not in ELSEWHERE]


@pytest.mark.parametrize("base", BASES)
def test_contavsep_learns_both_tasks_and_survives_a_kill(base, tone_store):
    run = trained(tone_store, "contavsep", "random_per_class", separator=base)
    resumed = resume_killed(tone_store, run, "contavsep", "random_per_class", separator=base)
    assert differing(weights(run), weights(resumed)) == []
    with open(run / "logs" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    terms = {"separation", "instance", "class", "mask"} | ({"consistency"} if base == "coseparation" else set())
    assert all(any(float(row[term] or 0) > 0 for row in rows if row["task"] == "1") for term in terms)
    first, last = weights(run, 0), weights(run, 1)
    still = [k for k in first if first[k].shape == last[k].shape and k not in differing(first, last)]
    assert not [name for name in still if not name.endswith("num_batches_tracked")]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("strategy", _strategies())
def test_every_strategy_runs_on_it(base, strategy, tone_store):
    memory = "random_per_class" if STRATEGIES.get(strategy).factory.needs_memory else "none"
    run = trained(tone_store, strategy, memory, separator=base)
    assert load_separator(run).classes == ("ding", "hum", "peep", "whirr")
    assert differing(weights(run, 0), weights(run, 1))


@pytest.mark.parametrize("base", BASES)
def test_query_extension_says_why_not(base, tone_store, tmp_path):
    separator = build_from_spec(
        validated(SeparatorSpec, {**SEPARATORS[base], "num_classes": 2}, "test"),
    )
    decoder = separator.spec.mask_decoder.name
    with pytest.raises(ConfigError, match=f"mask decoder '{decoder}' has no class_queries"):
        make_learner("query_extension", separator=base).strategy.check(separator)


@pytest.mark.parametrize("base", BASES)
def test_the_teacher_has_embeddings_and_masks_of_every_class(base, tone_store):
    """Masks are class-agnostic: a separator of two classes answers for a source of a third."""
    separator = load_separator(trained(tone_store, "contavsep", "random_per_class", separator=base), task=0)
    separator.requires_grad_(False)
    pictures = torch.randint(0, 256, (2, 2, 3, 3, 32, 32), dtype=torch.uint8)
    x = torch.rand(2, 1, 128, 128)
    visual = separator.encode_visual(pictures, None)
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
def test_evaluate_separate_and_export_from_the_command_line(base, tone_store, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    run = tmp_path / "run"
    shutil.copytree(trained(tone_store, "contavsep", "random_per_class", separator=base), run)
    clips = "ding-test-0,whirr-test-0"
    duet, out, bundle = tmp_path / "duet", tmp_path / "out", tmp_path / "bundle"
    features = ("--features", duet / "features.npz", "--classes", "ding,whirr")
    for command in (
        ("evaluate", run),
        ("data", "mix", tone_store, "--clips", clips, "--out", duet),
        ("separate", duet / "duet.wav", "--run", run, *features, "--out", out),
        ("export", "run", run, "--out", bundle, "--precision", "fp32", "--precision", "fp16"),
        ("export", "verify", bundle),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(part) for part in command])
        assert not stop.value.code, command[0]
    assert len(json.loads((run / "evaluation.json").read_text())["matrix"]) == 2
    for name in ("ding", "whirr"):
        audio, _ = soundfile.read(next(out.glob(f"*{name}*.wav")))
        assert np.isfinite(audio).all()
        assert np.abs(audio).max() > 0
    manifest = json.loads(next(bundle.rglob("manifest.json")).read_text())
    graphs = {graph["file"]: graph for graph in manifest["graphs"]}
    assert {"separator.onnx", "separator.fp16.onnx", "object_encoder.onnx"} <= graphs.keys()
    assert graphs["separator.onnx"]["parity"]["max_error"] < 1e-4


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

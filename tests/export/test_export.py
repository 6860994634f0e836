"""The exported graph: exact transforms, standard operators, parity with PyTorch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from avsep.errors import ConfigError, ExportError, MissingExtraError
from avsep.export import ExportPlan, export
from avsep.export.build.golden import golden_inputs
from avsep.export.build.graph import FactoredSTFT, PolyphaseSTFT, WaveformSeparator, transform_of, warp_matrices
from avsep.export.build.onnx import check_graph, write_onnx
from avsep.export.build.parity import compare, run_onnx
from avsep.separator import build_separator
from avsep.types import VisualFeatures
from support.tones import bundle_separator

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FRONT_END = {"clip_samples": 32767, "log_rows": 128}


def tiny(motion="motion_cnn", classes=("flute", "piano", "cello"), layers=2, **front_end):
    """A separator whose masks vary: every weight is random, and so are the running statistics."""
    torch.manual_seed(0)
    separator = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 8}),
        object_encoder=("precomputed", {"features": "o", "dim": 16}),
        motion_encoder=None
        if motion is None
        else (motion, {"dim": 12, "steps": 5})
        if motion == "motion_cnn"
        else ("precomputed", {"features": "m", "dim": 12}),
        mask_decoder=("query_transformer", {"dim": 32, "heads": 4, "feedforward": 64, "layers": layers}),
        classes=classes,
        front_end={**FRONT_END, **front_end},
    )
    for name, buffer in separator.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.05, 0.2)
    with torch.no_grad():
        separator.mask_decoder.head[-1].weight.mul_(10)
    return separator.eval()


def inputs_of(separator, batch=1, sources=2, steps=5, seed=0):
    from avsep.export.build.plan import tensor_specs

    steps = None if separator.motion_encoder is None else steps
    specs, _ = tensor_specs(separator, ExportPlan(batch=batch, sources=sources, motion_steps=steps))
    arrays = golden_inputs(specs, separator.num_classes, separator.spec.front_end.sample_rate_hz, seed)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def separate(separator, inputs):
    visual = VisualFeatures(object=inputs.get("object_features"), motion=inputs.get("motion_features"))
    with torch.inference_mode():
        return separator.separate(inputs["mixture"], visual, inputs["class_ids"])


@pytest.mark.parametrize(
    ("samples", "n_fft", "hop", "padding"),
    [
        (65535, 1022, 256, "zeros"),
        (65535, 1022, 256, "reflect"),
        (8192, 1022, 256, "reflect"),
        (47087, 1022, 184, "zeros"),
        (4000, 256, 128, "reflect"),
        (4001, 254, 100, "zeros"),
        (700, 100, 7, "reflect"),
    ],
)
@pytest.mark.parametrize("form", [PolyphaseSTFT, FactoredSTFT])
def test_transforms_equal_torch(form, samples, n_fft, hop, padding):
    torch.manual_seed(0)
    window = torch.hann_window(n_fft)
    stft = form(samples, n_fft, hop, padding)
    signal = 0.3 * torch.randn(2, samples)
    mode = {"zeros": "constant"}.get(padding, padding)
    expected = torch.stft(signal, n_fft, hop, window=window, center=True, pad_mode=mode, return_complex=True)
    got = stft.analyse(signal)
    spectrum = torch.complex(got[:, : stft.bins], got[:, stft.bins :])
    assert spectrum.shape == expected.shape
    assert (spectrum - expected).abs().max() < 1e-4
    assert (stft.synthesise(got) - signal).abs().max() < 2e-6
    masked = expected * torch.rand(expected.shape)
    whole = torch.istft(masked, n_fft, hop, window=window, center=True, length=samples)
    got = stft.synthesise(torch.cat([masked.real, masked.imag], dim=1))
    assert (got - whole).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("n_fft", "form"),
    [(254, PolyphaseSTFT), (258, PolyphaseSTFT), (1022, FactoredSTFT), (4094, FactoredSTFT), (4098, PolyphaseSTFT)],
)
def test_lengths_with_factors_are_transformed_in_two_steps(n_fft, form):
    stft = transform_of(4 * n_fft, n_fft, n_fft // 4)
    assert type(stft) is form
    if form is FactoredSTFT:
        one_step = 2 * n_fft**2  # numbers, analysis and synthesis
        assert sum(buffer.numel() for buffer in stft.buffers()) < one_step / 40
        signal = 0.3 * torch.randn(1, 4 * n_fft)
        assert (stft.synthesise(stft.analyse(signal)) - signal).abs().max() < 2e-6


@pytest.mark.parametrize("align_corners", [True, False])
def test_warp_matrices_equal_the_front_end(align_corners):
    separator = tiny(align_corners=align_corners)
    warp, unwarp, time = (
        None if m is None else torch.from_numpy(m).float() for m in warp_matrices(separator.spec.front_end)
    )
    assert (time is None) == align_corners
    along = torch.eye(128) if time is None else time.T
    torch.manual_seed(0)
    x = torch.rand(2, 512, 128)
    torch.testing.assert_close(warp @ x @ along, separator.front_end.warp(x[:, None])[:, 0], atol=2e-4, rtol=0)
    m = torch.rand(2, 128, 128)
    torch.testing.assert_close(unwarp @ m @ along, separator.front_end.unwarp(m[:, None])[:, 0], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "front_end", [{}, {"align_corners": False}, {"padding": "reflect"}, {"hop": 200, "clip_samples": 25450}]
)
@pytest.mark.parametrize("motion", ["motion_cnn", None])
def test_the_graph_module_equals_the_separator(front_end, motion):
    separator = tiny(motion=motion, **front_end)
    inputs = inputs_of(separator, batch=2, sources=3)
    expected = separate(separator, inputs)
    with torch.inference_mode():
        got = WaveformSeparator(separator)(*inputs.values())
    assert got.shape == expected.shape == (2, 3, separator.spec.front_end.clip_samples)
    assert expected.std() > 0.01
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.01  # the masks do differ
    assert (got - expected).abs().max() < 1e-4


def test_the_graph_module_clips_as_the_separator():
    separator = tiny(motion=None)
    inputs = inputs_of(separator)
    inputs["mixture"] = 20 * inputs["mixture"]
    expected = separate(separator, inputs)
    assert expected.abs().max() == 1
    with torch.inference_mode():
        got = WaveformSeparator(separator)(*inputs.values())
    assert (got - expected).abs().max() < 1e-3


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The graph of :func:`tiny`."""
    place = tmp_path_factory.mktemp("export") / "task-00"
    return export(tiny(), ExportPlan(), place).path / "separator.onnx"


def test_graph_has_plain_operators_and_constant_kernels(graph):
    operators = check_graph(graph, 18)
    with pytest.raises(ExportError, match="opset 18, 17 was asked for"):
        check_graph(graph, 17)
    assert not {"STFT", "DFT", "Attention", "GridSample", "Loop", "If", "Scan"} & operators.keys()
    model = onnx.load(str(graph))
    constants = {i.name for i in model.graph.initializer}
    transposed = [n for n in model.graph.node if n.op_type == "ConvTranspose"]
    assert len(transposed) == 7
    assert all(n.input[1] in constants for n in transposed)
    assert [i.name for i in model.graph.input] == ["mixture", "object_features", "motion_features", "class_ids"]


def test_graph_answers_as_pytorch_on_other_inputs(graph):
    separator = tiny()
    for seed, ids in ((1, [[2, 0]]), (2, [[1, 1]])):
        inputs = {**inputs_of(separator, seed=seed), "class_ids": torch.tensor(ids)}
        got, provider, _ = run_onnx(graph, {k: v.numpy() for k, v in inputs.items()})
        error, error_db = compare(got["sources"], separate(separator, inputs).numpy())
        assert provider == "CPUExecutionProvider"
        assert error < 1e-4
        assert error_db < -80


def test_a_graph_that_differs_leaves_nothing_behind(tmp_path, monkeypatch):
    original = PolyphaseSTFT.synthesise
    monkeypatch.setattr(PolyphaseSTFT, "synthesise", lambda self, spectrum: 1.1 * original(self, spectrum))
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export(bundle_separator(), None, tmp_path / "out" / "task-00")
    assert not (tmp_path / "out").exists()


class Complex(torch.nn.Module):
    def forward(self, mixture):
        return torch.stft(mixture, 64, 16, window=torch.hann_window(64), return_complex=True).abs()


class Attends(torch.nn.Module):
    def forward(self, mixture):
        if mixture.sum() > 0:
            return mixture
        return -mixture


def test_operators_and_code_that_cannot_leave_are_refused(tmp_path):
    signal = torch.randn(1, 512)
    with pytest.raises(ExportError, match="STFT"):
        write_onnx(Complex(), {"mixture": signal}, "out", tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="cannot be written as ONNX"):
        write_onnx(Attends(), {"mixture": signal}, "out", tmp_path / "b.onnx")


def test_weights_that_no_onnx_file_holds_are_refused(tmp_path, monkeypatch):
    from avsep.export.build import onnx as writing

    monkeypatch.setattr(writing, "_MOST_WEIGHT_BYTES", 100)
    with pytest.raises(ExportError, match="one ONNX file holds"):
        write_onnx(torch.nn.Linear(8, 8), {"x": torch.zeros(1, 8)}, "y", tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_compare_measures_and_refuses():
    reference = np.ones((2, 100), np.float32)
    assert compare(reference, reference) == (0.0, pytest.approx(-300))
    error, error_db = compare(reference + 0.01, reference)
    assert error == pytest.approx(0.01, rel=1e-4)
    assert error_db == pytest.approx(-40, abs=1e-3)
    with pytest.raises(ExportError, match="shape"):
        compare(reference[:1], reference)
    with pytest.raises(ExportError, match="NaN"):
        compare(reference * np.nan, reference)


def test_a_missing_runtime_is_said_with_the_way_out(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match="pip install onnxruntime"):
        run_onnx(graph, {})


def test_wrong_input_is_one_line(graph):
    inputs = {k: v.numpy() for k, v in inputs_of(tiny()).items()}
    inputs["mixture"] = inputs["mixture"][:, :-1]
    with pytest.raises(ExportError, match=r"separator\.onnx") as caught:
        run_onnx(graph, inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"sources": 0}, {"batch": -1}, {"opset": 23}, {"tolerance": 0.0}, {"motion_steps": 0}]
)
def test_plans_that_make_no_sense(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        ExportPlan(**values)


def test_missing_extra_is_named(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else found(name, *a))
    with pytest.raises(MissingExtraError, match=r"onnxscript.*avsep\[cpu\]"):
        export(tiny(motion=None, layers=1), None, tmp_path / "task-00")
    assert list(tmp_path.iterdir()) == []


def test_import_is_light():
    code = (
        "import sys, avsep.export, avsep.cli.export_command, avsep.cli.separate_command, avsep.inference.chunking\n"
        "import avsep.export.build.parity, avsep.export.build.plan\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', 'soundfile', 'soxr'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

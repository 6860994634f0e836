"""The exported graph: exact transforms, standard operators, parity with PyTorch; bundles that are whole or absent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from avsep.errors import AvsepError, ConfigError, ExportError, MissingExtraError, RunError
from avsep.export import ExportPlan, export_run, export_separator, verify_bundle
from avsep.export.bundle import golden_inputs
from avsep.export.graph import PolyphaseSTFT, WaveformSeparator, warp_matrices
from avsep.export.onnx import check_graph, write_onnx
from avsep.export.parity import compare, run_onnx
from avsep.separator import build_separator, save_separator
from avsep.types import VisualFeatures

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FRONT_END = {"clip_samples": 32767, "log_rows": 128}


def tiny(motion="motion_cnn", classes=("flute", "piano", "cello"), layers=4, **front_end):
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
    from avsep.export.plan import tensor_specs

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
def test_polyphase_transforms_equal_torch(samples, n_fft, hop, padding):
    torch.manual_seed(0)
    window = torch.hann_window(n_fft)
    stft = PolyphaseSTFT(samples, n_fft, hop, padding)
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
def bundle(tmp_path_factory):
    separator = tiny()
    separator.train()
    made = export_separator(separator, tmp_path_factory.mktemp("export") / "task-00", made_from="a test")
    assert separator.training  # left as it was
    return made


def test_bundle_holds_what_its_manifest_says(bundle):
    assert sorted(f.name for f in bundle.folder.iterdir()) == ["golden.npz", "manifest.json", "separator.onnx"]
    assert [f.name for f in bundle.folder.parent.iterdir()] == ["task-00"]
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    assert manifest["classes"] == ["flute", "piano", "cello"]
    assert manifest["sample_rate_hz"] == 11025
    assert [(i["name"], i["shape"]) for i in manifest["inputs"]] == [
        ("mixture", [1, 32767]),
        ("object_features", [1, 2, 16]),
        ("motion_features", [1, 2, 12, 5]),
        ("class_ids", [1, 2]),
    ]
    assert manifest["outputs"] == [{"name": "sources", "dtype": "float32", "shape": [1, 2, 32767]}]
    assert manifest["parity"]["provider"] == "CPUExecutionProvider"
    assert manifest["parity"]["max_error"] < 1e-3
    assert set(manifest["files"]) == {"golden.npz", "separator.onnx"}
    assert manifest["opset"] <= 20


def test_graph_has_plain_operators_and_constant_kernels(bundle):
    operators = check_graph(bundle.graph, 18)
    with pytest.raises(ExportError, match="opset 18, 17 was asked for"):
        check_graph(bundle.graph, 17)
    assert not {"STFT", "DFT", "Attention", "GridSample", "Loop", "If", "Scan"} & operators.keys()
    model = onnx.load(str(bundle.graph))
    constants = {i.name for i in model.graph.initializer}
    transposed = [n for n in model.graph.node if n.op_type == "ConvTranspose"]
    assert len(transposed) == 7
    assert all(n.input[1] in constants for n in transposed)
    assert [i.name for i in model.graph.input] == ["mixture", "object_features", "motion_features", "class_ids"]


def test_graph_answers_as_pytorch_on_other_inputs(bundle):
    separator = tiny()
    for seed, ids in ((1, [[2, 0]]), (2, [[1, 1]])):
        inputs = {**inputs_of(separator, seed=seed), "class_ids": torch.tensor(ids)}
        got, provider, _ = run_onnx(bundle.graph, {k: v.numpy() for k, v in inputs.items()})
        error, error_db = compare(got, separate(separator, inputs).numpy())
        assert provider == "CPUExecutionProvider"
        assert error < 1e-4
        assert error_db < -80


def test_golden_mixture_is_worth_comparing_with(bundle):
    with np.load(bundle.folder / "golden.npz", allow_pickle=False) as golden:
        assert 0.01 < golden["mixture"].std() < 0.5
        assert np.abs(golden["mixture"]).max() <= 1
        assert golden["sources"].std() > 0.01


def test_verify_finds_every_damage(bundle, tmp_path):
    assert verify_bundle(bundle.folder).parity.max_error < 1e-3

    def damaged(name, change):
        folder = tmp_path / name
        shutil.copytree(bundle.folder, folder)
        change(folder)
        return folder

    def truncate(file):
        file.write_bytes(file.read_bytes()[:-100])

    def forge(folder, **values):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))

    cases = {
        "graph": (lambda f: truncate(f / "separator.onnx"), "separator.onnx"),
        "golden": (lambda f: truncate(f / "golden.npz"), "golden.npz"),
        "gone": (lambda f: (f / "separator.onnx").unlink(), "lacks the file separator.onnx"),
        "manifest": (lambda f: truncate(f / "manifest.json"), "manifest.json"),
        "bare": (lambda f: (f / "manifest.json").unlink(), "not a bundle"),
        "version": (lambda f: forge(f, version=99), "version 1"),
        "hashes": (lambda f: forge(f, files={}), "no hash"),
        "plan": (lambda f: forge(f, plan=None), "damaged"),
        "hash": (
            lambda f: forge(f, files={"separator.onnx": "0" * 64, "golden.npz": "0" * 64}),
            "is not the file that was exported",
        ),
        "path": (
            lambda f: forge(f, files={"../separator.onnx": "0", "separator.onnx": "0", "golden.npz": "0"}),
            "no hash|SHA",
        ),
    }
    for name, (change, fragment) in cases.items():
        with pytest.raises(ExportError, match=fragment) as caught:
            verify_bundle(damaged(name, change))
        assert "\n" not in str(caught.value)


def test_verify_runs_the_graph(bundle, tmp_path):
    """Hashes alone do not pass a bundle: a golden output that the graph does not give is found."""
    from avsep.io import sha256_file

    folder = tmp_path / "forged"
    shutil.copytree(bundle.folder, folder)
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        arrays = dict(golden)
    arrays["sources"] = arrays["sources"] + 0.01
    np.savez_compressed(folder / "golden.npz", **arrays)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = sha256_file(folder / "golden.npz")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="differs"):
        verify_bundle(folder)


def test_a_graph_that_differs_leaves_nothing_behind(tmp_path, monkeypatch):
    original = PolyphaseSTFT.synthesise
    monkeypatch.setattr(PolyphaseSTFT, "synthesise", lambda self, spectrum: 1.1 * original(self, spectrum))
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export_separator(tiny(motion=None, layers=1), tmp_path / "out" / "task-00")
    assert not (tmp_path / "out").exists()


def test_an_older_bundle_is_replaced_and_other_folders_are_refused(bundle, tmp_path, monkeypatch):
    target = tmp_path / "task-00"
    shutil.copytree(bundle.folder, target)
    (target / "manifest.json").write_text((target / "manifest.json").read_text().replace("a test", "before"))
    export_separator(tiny(motion=None, layers=1), target, made_from="after")
    assert json.loads((target / "manifest.json").read_text())["made_from"] == "after"
    assert [f.name for f in tmp_path.iterdir()] == ["task-00"]

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="no bundle"):
        export_separator(tiny(motion=None, layers=1), other)
    with pytest.raises(ConfigError, match="is a file"):
        export_separator(tiny(motion=None, layers=1), tmp_path / "file")
    assert (other / "chapter.txt").read_text() == "mine"


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


def test_unavailable_provider_is_not_passed_over_in_silence(bundle, monkeypatch):
    inputs = {k: v.numpy() for k, v in inputs_of(tiny()).items()}
    with pytest.raises(ExportError, match="no QNNExecutionProvider"):
        run_onnx(bundle.graph, inputs, providers=("QNNExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match="onnxruntime"):
        run_onnx(bundle.graph, inputs)


def test_wrong_input_is_one_line(bundle):
    inputs = {k: v.numpy() for k, v in inputs_of(tiny()).items()}
    inputs["mixture"] = inputs["mixture"][:, :-1]
    with pytest.raises(ExportError, match=r"separator\.onnx") as caught:
        run_onnx(bundle.graph, inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"sources": 0}, {"batch": -1}, {"opset": 23}, {"tolerance": 0.0}, {"motion_steps": 0}]
)
def test_plans_that_make_no_sense(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        ExportPlan(**values)


def fake_run(folder, tasks=2):
    """A run folder as the learner leaves it; the last task is not finished."""
    names = ("flute", "piano", "cello")
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("stands in for a run's spec\n")
    for task in range(tasks + 1):
        home = folder / "tasks" / f"{task:02d}"
        save_separator(tiny(motion=None, layers=1, classes=names[: task + 1]), home / "separator")
        if task < tasks:
            (home / "task.json").write_text(json.dumps({"index": task}))
    return folder


def test_every_finished_task_of_a_run(tmp_path):
    run = fake_run(tmp_path / "run")
    done = []
    bundles = export_run(run, tmp_path / "out", sources=1, progress=lambda *at: done.append(at))
    assert [b.folder.name for b in bundles] == ["task-00", "task-01"]
    assert [b.manifest["classes"] for b in bundles] == [["flute"], ["flute", "piano"]]
    assert done == [(1, 2), (2, 2)]
    before = (tmp_path / "out" / "task-00" / "separator.onnx").read_bytes()
    export_run(run, tmp_path / "out", tasks=[1])
    assert (tmp_path / "out" / "task-00" / "separator.onnx").read_bytes() == before
    with pytest.raises(RunError, match=r"task 2.*0, 1"):
        export_run(run, tmp_path / "other", tasks=[2])
    assert not (tmp_path / "other").exists()


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "young" / "tasks" / "00").mkdir(parents=True)
    for name in ("empty", "missing", "young"):
        with pytest.raises(RunError, match=name):
            export_run(tmp_path / name, tmp_path / "out")


def test_missing_extra_is_named(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else found(name, *a))
    with pytest.raises(MissingExtraError, match=r"onnxscript.*avsep\[cpu\]"):
        export_separator(tiny(motion=None, layers=1), tmp_path / "task-00")
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    from avsep.cli.export_command import command

    run = fake_run(tmp_path / "run", tasks=1)
    command(run, tmp_path / "out", sources=1)
    shown = capsys.readouterr().out
    assert "task-00/separator.onnx" in shown
    assert "CPU" in shown
    assert verify_bundle(tmp_path / "out" / "task-00").manifest["classes"] == ["flute"]
    with pytest.raises(AvsepError):
        command(tmp_path / "nothing", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_import_is_light():
    code = (
        "import sys, avsep.export, avsep.cli.export_command, avsep.cli.separate_command, avsep.chunking\n"
        "import avsep.export.parity, avsep.export.plan\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', 'soundfile', 'soxr'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

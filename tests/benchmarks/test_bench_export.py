"""``avsep bench export``: every way once, named as what really ran, with no speed for what answers wrongly."""

from __future__ import annotations

import csv
import re
import shutil

import numpy as np
import pytest
import torch
import yaml

from avsep.benchmarks import export_cases
from avsep.benchmarks.export_cases import COLUMNS, run
from avsep.benchmarks.measure import CheckFailed
from avsep.cli import main as avsep_main
from avsep.errors import ConfigError, ExportError, UnknownNameError
from avsep.export.build.plan import ExportPlan
from avsep.export.bundle.export import export
from avsep.export.runtime import calls as calls_of_graphs
from avsep.separator import build_separator, save_separator

pytestmark = pytest.mark.slow  # exports in every form, and loads each in processes of their own
FRONT_END = {"sample_rate_hz": 11025, "clip_samples": 8191, "n_fft": 254, "hop": 64, "log_rows": 128}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what a machine without a GPU says")


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make(seed=0):
    torch.manual_seed(seed)
    return build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("precomputed", {"features": "o", "dim": 8}),
        motion_encoder=None,
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 2}),
        classes=("ding", "hum"),
        front_end=FRONT_END,
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle, its separator, and one of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("bench")
    separator = make()
    save_separator(separator, folder / "separator")
    save_separator(make(seed=1), folder / "other-weights")
    export(separator, ExportPlan(), folder / "bundle")
    export(separator, ExportPlan(spectral=True, batch=2), folder / "spectral.tar")
    return folder


def measure(folder, bundle="bundle", **arguments):
    arguments = {"threads": 1, "repeats": 3, "compiled": False, "memory": False, "progress": False, **arguments}
    return run(None if bundle is None else folder / bundle, **arguments)


def by_name(rows):
    return {row["variant"]: row for row in rows}


@NO_GPU
def test_one_table_of_all_ways(folder, tmp_path, capsys):
    out, plot = tmp_path / "out.csv", tmp_path / "plot.png"
    rows = measure(folder, run=folder / "separator", memory=True, out=out, plot=plot)
    rows_of = by_name(rows)
    eager, runtime = rows_of["PyTorch eager"], rows_of["ONNX Runtime CPU fp32"]
    assert eager["ratio"] == 1
    assert runtime["provider"] == "CPUExecutionProvider"
    for row in (eager, runtime):
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] <= row["p95_ms"]
        seconds = 8191 / 11025
        assert row["real_time_factor"] == pytest.approx(row["median_ms"] / 1e3 / seconds, rel=1e-3)
        assert row["threads"] == 1
        assert "golden output" in row["check"]
    assert runtime["ratio"] == pytest.approx(eager["median_ms"] / runtime["median_ms"], rel=1e-2)
    assert runtime["file_mb"] == round((folder / "bundle" / "separator.onnx").stat().st_size / 1e6, 1)
    assert runtime["process_mb"] != ""
    assert runtime["start_ms"] > 0
    assert runtime["ratio_onnxruntime"] == 1
    assert 0 <= runtime["max_error"] < 1e-4
    assert 0 <= runtime["sdr_drift_db"] < 1e-2
    assert runtime["drift_on"] == "synthetic"
    assert 20 < runtime["process_mb"] < eager["process_mb"]  # no torch in the process
    for skipped, reason in {
        "torch.compile": "--no-compile",
        "tensorrt fp32": "TensorRT|tensorrt",
        "tensorrt-rtx fp32": "NVIDIA driver|tensorrt",
    }.items():
        assert rows_of[skipped]["median_ms"] == ""
        assert re.search(reason, rows_of[skipped]["note"])
    with open(out, newline="") as file:
        kept = list(csv.DictReader(file))
    assert [row["variant"] for row in kept] == [row["variant"] for row in rows]
    assert tuple(kept[0]) == COLUMNS
    assert plot.stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "PyTorch eager" in printed
    assert "skipped: left out" in printed


@NO_GPU
def test_a_provider_that_fell_back_is_named_as_what_it_was(folder):
    rows = by_name(measure(folder, providers=["cuda", "cpu"]))
    fallen = rows["ONNX Runtime CPU fp32, not cuda"]
    assert fallen["provider"] == "CPUExecutionProvider"
    assert fallen["note"] == "CUDAExecutionProvider was asked for and does not load here"
    assert fallen["median_ms"] > 0
    assert rows["ONNX Runtime CPU fp32"]["note"] == ""
    assert "--run RUN" in rows["PyTorch"]["note"]


def test_a_spectral_tar_is_timed_with_its_transforms(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(export_cases, "_measure_drift", lambda *_: None)  # calls the graph too
    original = calls_of_graphs.stft
    monkeypatch.setattr(calls_of_graphs, "stft", lambda *a, **k: calls.append(1) or original(*a, **k))
    rows = by_name(measure(folder, "spectral.tar", run=folder / "separator", providers=["cpu"]))
    assert len(calls) == 2 + 3  # warm-up, then each repeat
    row = rows["ONNX Runtime CPU fp32"]
    assert row["settings"].startswith("2 mixtures of 2 sources")
    assert row["real_time_factor"] == pytest.approx(row["median_ms"] / 1e3 / (2 * 8191 / 11025), rel=1e-3)


def test_what_answers_wrongly_has_no_speed(folder, tmp_path, monkeypatch):
    """Another task's weights fit the spec; that they are others shows in what they answer."""
    with pytest.raises(CheckFailed, match="no speed is given for 'PyTorch eager'"):
        measure(folder, run=folder / "other-weights", providers=["cpu"], out=tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        kept = by_name(csv.DictReader(file))
    assert kept["PyTorch eager"]["median_ms"] == ""
    assert "refused" in kept["PyTorch eager"]["note"]
    assert kept["ONNX Runtime CPU fp32"]["ratio"] == "1.0"

    original = export_cases.OnnxSession.run
    monkeypatch.setattr(
        export_cases.OnnxSession, "run", lambda self, i: {k: v + np.float32(0.01) for k, v in original(self, i).items()}
    )
    with pytest.raises(CheckFailed, match=r"nothing here runs this bundle.*ONNX Runtime CPU fp32"):
        measure(folder, providers=["cpu"])


@pytest.mark.slow
def test_no_compiler_is_said(folder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    rows = by_name(measure(folder, run=folder / "separator", providers=["cpu"], compiled=True))
    assert rows["torch.compile"]["note"] == "skipped: there is no C++ compiler here"

    def fails(*args, **kwargs):
        raise RuntimeError("the backend\nhas no such thing")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda function: fails)
    rows = by_name(measure(folder, run=folder / "separator", providers=["cpu"], compiled=True))
    assert rows["torch.compile"]["note"] == "skipped: RuntimeError: the backend has no such thing"
    assert rows["PyTorch eager"]["median_ms"] > 0


def test_mistakes(folder, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown provider 'gpu'"):
        measure(folder, providers=["gpu"])
    with pytest.raises(ExportError, match="no such bundle"):
        measure(folder, "nowhere")
    with pytest.raises(ConfigError, match="threads"):
        measure(folder, threads=-1)
    with pytest.raises(ConfigError, match="name the bundle too"):
        measure(folder, None, run=folder / "separator")
    (tmp_path / "notes.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"notes\.csv is not a file of benchmark results"):
        measure(folder, out=tmp_path / "notes.csv")
    larger = build_separator(
        audio_encoder=("unet7", {"base_channels": 8, "mask_channels": 4}),
        object_encoder=("precomputed", {"features": "o", "dim": 8}),
        motion_encoder=None,
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 2}),
        classes=("ding", "hum"),
        front_end=FRONT_END,
    )
    save_separator(larger, tmp_path / "larger")
    with pytest.raises(ConfigError, match="another separator than the bundle"):
        measure(folder, run=tmp_path / "larger")


def test_command_line(folder, tmp_path, capsys):
    arguments = ["bench", "export", str(folder / "bundle"), "--provider", "cpu", "--threads", "1", "--repeats", "2"]
    arguments += ["--no-memory", "--out", str(tmp_path / "out.csv")]
    with pytest.raises(SystemExit) as stop:
        avsep_main(arguments)
    assert stop.value.code == 0
    assert "results appended" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        avsep_main([*arguments, "--provider", "gpu"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def preset(tmp_path):
    """A small separator that looks, takes photos and can go unseen: all that a graph can be given."""
    path = tmp_path / "small.yaml"
    small = {
        "audio_encoder": {"name": "unet7", "params": {"base_channels": 4, "mask_channels": 4}},
        "object_encoder": {"name": "frame_cnn", "params": {"dim": 16, "frames": 1}},
        "motion_encoder": {"name": "motion_cnn", "params": {"dim": 16, "steps": 4}},
        "mask_decoder": {"name": "aligned_query", "params": {"dim": 16, "layers": 1}},
        "front_end": FRONT_END,
    }
    path.write_text(yaml.safe_dump({"separator": small}))
    return str(path)


@NO_GPU
def test_without_a_bundle_it_is_made(preset, tmp_path):
    """The answers of PyTorch, as it is and with the weights of a run, and of the graph are one."""
    rows = by_name(measure(tmp_path, None, preset=preset, device="cpu", batch=2, out=tmp_path / "out.csv"))
    assert list(rows) == ["PyTorch eager", "torch.compile", "ONNX Runtime CPU fp32"]
    for name in ("PyTorch eager", "ONNX Runtime CPU fp32"):
        assert rows[name]["median_ms"] > 0, rows[name]["note"]
        assert rows[name]["settings"].startswith("2 mixtures of 2 sources, 0.74 s")
    assert rows["PyTorch eager"]["case"] == "export small (untrained)"
    separator = build_separator(preset, classes=("a", "b", "c"), seed=0).eval()
    save_separator(separator, tmp_path / "separator")
    export(separator, ExportPlan(), tmp_path / "bundle")
    rows = by_name(measure(tmp_path, run=tmp_path / "separator", device="cpu"))
    assert rows["PyTorch eager"]["median_ms"] > 0, rows["PyTorch eager"]["note"]

"""Bundles run by OpenVINO: the golden outputs, the samples that ONNX Runtime gives, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from avsep.errors import ExportError
from avsep.export.build.plan import ExportPlan
from avsep.export.bundle.export import export
from avsep.export.runtime.command import main as runtime_main
from avsep.export.runtime.reader import open_bundle
from avsep.export.runtime.separator import BundleSeparator
from avsep.export.runtime.verify import verify_bundle
from avsep.export.runtime.wav import read_wav, write_wav
from avsep.separator import build_separator
from support.commands import run

RATE, CLIP = 11025, 8191


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A small separator that looks, with its encoders' graphs; its masks are far from one half."""
    torch.manual_seed(0)
    made = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 8}),
        object_encoder=("frame_cnn", {"dim": 16, "frames": 1}),
        motion_encoder=("precomputed", {"features": "m", "dim": 12}),
        mask_decoder=("query_transformer", {"dim": 32, "heads": 4, "feedforward": 64}),
        classes=("flute", "piano"),
        front_end={"sample_rate_hz": RATE, "clip_samples": CLIP, "n_fft": 254, "hop": 64, "log_rows": 128},
    ).eval()
    with torch.no_grad():
        made.mask_decoder.head[-1].weight.mul_(20)
    plan = ExportPlan(frame_size=(32, 32), dynamic=True)
    return export(made, plan, tmp_path_factory.mktemp("openvino") / "bundle").path


def seen(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "object": rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
            "motion": rng.standard_normal((12, 8)).astype(np.float32),
        }
        for name in ("flute", "piano")
    }


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


# --- without the package ----------------------------------------------------------------------------------------------


def test_without_the_package_the_way_out_is_told(bundle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for load in (lambda: verify_bundle(bundle, "openvino"), lambda: BundleSeparator.load(bundle, "openvino")):
        with pytest.raises(ExportError, match=r"pip install openvino, or --provider cpu") as raised:
            load()
        assert "\n" not in str(raised.value)
    assert runtime_main([str(bundle), "no.wav", "--classes", "flute", "--out", "x", "--provider", "openvino"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- with it ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def openvino():
    from avsep.export.runtime.openvino_session import load_openvino

    try:
        return load_openvino()
    except ExportError:
        pytest.skip("openvino is not installed")


def test_golden_outputs_of_every_graph(openvino, bundle):
    """In fp32 also on processors with bfloat16, where OpenVINO would take that by itself."""
    result = verify_bundle(bundle, "openvino")
    assert result.provider == "openvino"
    assert {graph.file for graph in result.graphs} == {"separator.onnx", "object_encoder.onnx"}
    for graph in result.graphs:
        assert graph.max_error < 1e-4
        assert graph.error_db < -90


def test_the_samples_of_onnx_runtime(openvino, bundle):
    """Any length, one source and two, chunks at once: open shapes."""
    with (
        BundleSeparator.load(bundle, "cpu", threads=1) as one,
        BundleSeparator.load(bundle, "openvino", threads=1) as b,
    ):
        assert b.provider == "openvino"
        for samples, classes in ((3000, ["piano"]), (int(3.3 * CLIP), ["piano", "flute"])):
            expected = one.separate(noise(samples), seen(), classes)
            np.testing.assert_allclose(b.separate(noise(samples), seen(), classes), expected, atol=1e-5)
            assert np.abs(expected).max() > 0.05
        expected = one.separate(noise(4 * CLIP), seen(), ["flute"])
        np.testing.assert_allclose(b.separate(noise(4 * CLIP), seen(), ["flute"], batch=2), expected, atol=1e-5)
        b.warm_up()
    b.close()
    with pytest.raises(ExportError, match="was closed"):
        b.separate(noise(100), seen(), ["piano"])


def test_on_the_command_line(openvino, bundle, tmp_path, capsys):
    assert run("export", "verify", bundle, "--provider", "openvino") == 0
    assert "every graph ran on openvino" in capsys.readouterr().out
    from avsep.media.timeline import VisualTimeline, write_visual_file

    shown = {n: VisualTimeline(object=s["object"], features={"m": s["motion"]}) for n, s in seen().items()}
    write_visual_file(tmp_path / "seen.npz", shown)
    write_wav(tmp_path / "mixture.wav", noise(2 * CLIP), RATE, "FLOAT")
    files = ["--features", str(tmp_path / "seen.npz"), "--classes", "flute,piano"]
    for provider in ("cpu", "openvino"):
        given = [str(bundle), str(tmp_path / "mixture.wav"), *files, "--format", "FLOAT", "--provider", provider]
        assert runtime_main([*given, "--out", str(tmp_path / provider)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("on openvino")
    for name in ("mixture_flute.wav", "mixture_piano.wav", "mixture_residual.wav"):
        (one, _), (two, _) = read_wav(tmp_path / "cpu" / name), read_wav(tmp_path / "openvino" / name)
        np.testing.assert_allclose(two, one, atol=1e-5)


def test_inputs_of_another_kind_are_refused(openvino, bundle):
    from avsep.export.runtime.openvino_session import OpenvinoSession

    opened = open_bundle(bundle)
    graph = opened.graph()
    session = OpenvinoSession(opened, graph)
    inputs, _ = opened.golden(graph)
    with pytest.raises(ExportError, match="takes mixture"):
        session.run({"mixture": inputs["mixture"]})
    with pytest.raises(ExportError, match=r"'mixture' is float64"):
        session.run({**inputs, "mixture": inputs["mixture"].astype(np.float64)})


def test_a_graph_that_is_not_the_manifests_is_refused(openvino, bundle):
    import dataclasses

    from avsep.export.runtime.openvino_session import OpenvinoSession

    opened = open_bundle(bundle)
    graph = opened.graph()
    first, *rest = graph.inputs
    for change, says in (
        ({"name": "sound"}, "manifest says sound"),
        ({"dtype": "float16"}, "manifest says float16"),
        ({"shape": (1, 5)}, r"manifest says float32 \[1, 5\]"),
    ):
        other = dataclasses.replace(graph, inputs=(dataclasses.replace(first, **change), *rest))
        with pytest.raises(ExportError, match=says):
            OpenvinoSession(opened, other)


def test_a_damaged_graph_is_one_line(openvino, bundle, monkeypatch):
    from avsep.export.runtime import openvino_session

    opened = open_bundle(bundle)
    graph, data = opened.graph(), opened.read("separator.onnx")
    monkeypatch.setattr(type(opened), "read", lambda self, name: data[: len(data) // 2])
    with pytest.raises(ExportError) as raised:
        openvino_session.OpenvinoSession(opened, graph)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(openvino_session, "check_onnx", lambda *_: None)  # what it lets pass, OpenVINO may not
    with pytest.raises(ExportError, match=r"OpenVINO cannot load .*--provider cpu") as raised:
        openvino_session.OpenvinoSession(opened, graph)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a signal of POSIX systems")
def test_a_signal_is_handled_after_the_last_session_ended_in_another_thread(openvino, bundle):
    script = (
        "import os, signal, threading; from avsep.export.runtime.openvino_session import OpenvinoSession; "
        "from avsep.export.runtime.reader import open_bundle; "
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled')); "
        f"opened = open_bundle({str(bundle)!r}); "
        "sessions = [OpenvinoSession(opened, opened.graphs[0])]; "
        "ending = threading.Thread(target=sessions.clear); ending.start(); ending.join(); "
        "os.kill(os.getpid(), signal.SIGUSR1)"
    )
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr


def test_nothing_is_reported(openvino, bundle, tmp_path):
    """``import openvino`` alone would write a client's number into the home folder, and send it."""
    script = (
        "import sys; from avsep.export.runtime.verify import verify_bundle; "
        f"verify_bundle({str(bundle)!r}, 'openvino'); "
        "print(sorted(n for n in sys.modules if 'telemetry' in n or n.startswith('openvino.tools')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())

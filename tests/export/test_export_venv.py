"""A bundle survives: as one tar into a fresh environment without torch, and runs there."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from avsep.export.bundle.packing import write_tar
from avsep.inference.recordings import separate_audio
from avsep.media.timeline import VisualTimeline
from support.source_tree import ROOT, copy_sources
from support.tones import bundle_separator

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

SCRIPT = """
import sys
import numpy as np

for name in ("torch", "onnx", "pydantic", "typer", "rich", "yaml", "soundfile", "soxr", "safetensors"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is here: the environment is not bare")

from avsep.export import verify_bundle
from avsep.export.runtime.separator import Separator

assert verify_bundle(sys.argv[1]).provider == "CPUExecutionProvider"
given = np.load(sys.argv[2])
features = {name: {"object": given[name]} for name in ("flute", "cello")}
with Separator.load(sys.argv[1], provider="cpu") as separator:
    assert separator.provider == "CPUExecutionProvider"
    np.save(sys.argv[3], separator.separate(given["mixture"], features, ["flute", "cello"]))
assert "torch" not in sys.modules
"""


def built_wheel(folder):
    """A wheel of the tree, made of a copy: setuptools leaves its own files beside what it builds."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the source tree")
    tree = copy_sources(folder / "tree")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder)]
    try:
        major = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        major = 0
    if major >= 77:
        command.append("--no-build-isolation")  # nothing is fetched then
    made = subprocess.run([*command, str(tree)], capture_output=True, text=True, timeout=250)
    if made.returncode and major < 77:
        pytest.skip(f"no setuptools of version 77 here, and none to be had: {made.stderr[-200:]}")
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("avsep-*.whl")
    return wheel


def bare_environment(folder, wheel):
    """A virtual environment with NumPy, ONNX Runtime and the wheel: the first two are linked to from here."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    site = Path(found.stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in ("numpy", "onnxruntime"):
        home = Path(__import__(name).__file__).parent
        for part in (home, *home.parent.glob(f"{name}.libs")):
            (site / part.name).symlink_to(part, target_is_directory=True)
    return python


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_a_tar_runs_in_a_fresh_environment_without_torch(tiny_bundle, tmp_path):
    write_tar(tiny_bundle, tmp_path / "sent.tar")
    python = bare_environment(tmp_path / "device", built_wheel(tmp_path))
    arrived = tmp_path / "device" / "arrived.tar"
    shutil.copyfile(tmp_path / "sent.tar", arrived)

    rng = np.random.default_rng(0)
    time_s = np.arange(30000) / 11025
    mixture = (0.2 * np.sin(2 * np.pi * 440 * time_s) + 0.02 * rng.standard_normal(30000)).astype(np.float32)
    rows = {name: rng.standard_normal((4, 8)).astype(np.float32) for name in ("flute", "cello")}
    np.savez(tmp_path / "given.npz", mixture=mixture, **rows)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}

    def on_device(*argv):
        argv = [python, *argv]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, env=clean, cwd=tmp_path / "device")

    done = on_device("-c", SCRIPT, arrived, tmp_path / "given.npz", tmp_path / "found.npy")
    assert done.returncode == 0, done.stderr

    timelines = {name: VisualTimeline(features={"clip": row}) for name, row in rows.items()}
    expected = separate_audio(bundle_separator(), mixture, timelines, ["flute", "cello"])
    found = np.load(tmp_path / "found.npy")
    assert found.shape == expected.shape == (2, 30000)
    assert expected.std() > 0.005
    np.testing.assert_allclose(found, expected, atol=1e-3)

    # the commands of a device: verify, and the bundle's own build script, which finds no TensorRT there
    done = on_device("-m", "avsep.export.bundle.verify", arrived)
    assert (done.returncode, done.stderr) == (0, "")
    assert "separator.onnx: CPUExecutionProvider differs by" in done.stdout
    arrived.write_bytes(arrived.read_bytes()[:-20000])
    for argv, told in (
        (["-m", "avsep.export.bundle.verify", arrived], "truncated"),
        (["-m", "avsep.export.bundle.verify"], "usage"),
        ([tiny_bundle / "build_engine.py"], "tensorrt is not installed"),
    ):
        done = on_device(*argv)
        assert done.returncode == 2
        assert told in done.stderr
        assert len(done.stderr.splitlines()) == 1

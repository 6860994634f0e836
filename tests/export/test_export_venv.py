"""A bundle survives: as one tar into fresh environments without torch, and runs there by its own wheel alone."""

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

import avsep
from avsep.export.bundle.packing import write_tar
from avsep.export.runtime.wav import read_wav, write_wav
from avsep.inference.recordings import separate_audio
from avsep.media.timeline import VisualTimeline, write_visual_file
from support.source_tree import ROOT, copy_sources
from support.tones import bundle_separator

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)
if os.name == "nt":
    pytest.skip("needs symbolic links", allow_module_level=True)

BARE = """
for name in ("torch", "onnx", "pydantic", "typer", "rich", "yaml", "soundfile", "soxr", "safetensors", {more}):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{name}} is here: the environment is not bare")
"""
SCRIPT = """
import sys
import numpy as np
from avsep_runtime import BundleSeparator, read_visual_file, verify_bundle

assert verify_bundle(sys.argv[1]).provider == "CPUExecutionProvider"
mixture, features = np.load(sys.argv[2]), read_visual_file(sys.argv[3])
with BundleSeparator.load(sys.argv[1], provider="cpu") as separator:
    assert separator.provider == "CPUExecutionProvider"
    np.save(sys.argv[4], separator.separate(mixture, features, ["flute", "cello"]))
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


def bare_environment(folder):
    """A virtual environment with NumPy and ONNX Runtime, linked to from here: its Python and its site-packages."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    site = Path(found.stdout.strip())
    for name in ("numpy", "onnxruntime"):
        home = Path(__import__(name).__file__).parent
        for part in (home, *home.parent.glob(f"{name}.libs"), *home.parent.glob(f"{name}-*.dist-info")):
            (site / part.name).symlink_to(part, target_is_directory=True)
    return python, site


def device(folder):
    """Runs a command in ``folder``, without what is set for the Python here."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}

    def run(*argv):
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, env=clean, cwd=folder)

    return run


@pytest.mark.slow
def test_a_device_needs_the_bundle_alone(tiny_bundle, tmp_path):
    """NumPy, ONNX Runtime and the bundle's own wheel: golden outputs, a recording and the build script."""
    write_tar(tiny_bundle, tmp_path / "sent.tar")
    python, site = bare_environment(tmp_path / "device")
    on_device = device(tmp_path / "device")
    arrived = tmp_path / "device" / "arrived"
    arrived.mkdir()
    shutil.unpack_archive(tmp_path / "sent.tar", arrived)
    (wheel,) = arrived.glob("avsep_runtime-*.whl")
    # what the wheel demands must be there: nothing is fetched
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    done = on_device(*pip, "install", "--no-index", "-q", str(wheel))
    assert done.returncode == 0, done.stderr
    done = on_device(*pip, "show", "--files", "avsep-runtime")
    assert "Requires: numpy\n" in done.stdout
    assert "avsep_runtime/separator.py" in done.stdout
    metadata = (site / f"avsep_runtime-{avsep.__version__}.dist-info" / "METADATA").read_text()
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist")] == [
        "Requires-Dist: numpy>=1.21"
    ]

    rng = np.random.default_rng(0)
    time_s = np.arange(30000) / 11025
    mixture = (0.2 * np.sin(2 * np.pi * 440 * time_s) + 0.02 * rng.standard_normal(30000)).astype(np.float32)
    rows = {name: rng.standard_normal((4, 8)).astype(np.float32) for name in ("flute", "cello")}
    timelines = {name: VisualTimeline(features={"clip": row}) for name, row in rows.items()}
    expected = separate_audio(bundle_separator(), mixture, timelines, ["flute", "cello"])
    assert expected.std() > 0.005
    np.save(tmp_path / "mixture.npy", mixture)
    write_visual_file(tmp_path / "features.npz", timelines)
    write_wav(tmp_path / "duet.wav", mixture, 11025, "FLOAT")

    script = BARE.format(more="'avsep'") + SCRIPT
    given = [tmp_path / "mixture.npy", tmp_path / "features.npz", tmp_path / "found.npy"]
    done = on_device(python, "-c", script, arrived, *given)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-3)

    command = ["arrived", tmp_path / "duet.wav", "--classes", "flute,cello", "--format", "FLOAT"]
    command += ["--features", tmp_path / "features.npz"]
    for number, program in enumerate(([python.parent / "avsep-runtime"], [python, "-m", "avsep_runtime"])):
        done = on_device(*program, *command, "--out", f"separated{number}")
        assert done.returncode == 0, done.stderr
        assert "on CPUExecutionProvider" in done.stdout
        for name, row in zip(("flute", "cello"), expected, strict=True):
            found, _ = read_wav(tmp_path / "device" / f"separated{number}" / f"duet_{name}.wav")
            np.testing.assert_allclose(found[0], row, atol=1e-3)

    verify = [python, "-m", "avsep_runtime.verify"]
    done = on_device(*verify, tmp_path / "sent.tar")
    assert (done.returncode, done.stderr) == (0, "")
    assert "separator.onnx: CPUExecutionProvider differs by" in done.stdout
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "sent.tar").read_bytes()[:-20000])
    built = [python, "arrived/build_engine.py"]
    for argv, told in (
        ([*verify, cut], "truncated"),
        (verify, "usage: python -m avsep_runtime.verify"),
        (built, "tensorrt is not installed"),  # the builder and the runtime are there, TensorRT is not
        ([python, "-m", "avsep_runtime", "arrived", cut, "--classes", "flute", "--out", "x"], "is not a WAV file"),
    ):
        done = on_device(*argv)
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert len(done.stderr.splitlines()) == 1

    # the build script takes the runtime of its bundle, installed or not, and no other file than the one exported
    assert on_device(*pip, "uninstall", "-q", "-y", "avsep-runtime").returncode == 0
    assert "tensorrt is not installed" in on_device(*built).stderr
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    done = on_device(*built)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{wheel.name} is not the file that was exported" in done.stderr


def test_avseps_own_wheel_needs_no_more_either(tiny_bundle, tmp_path):
    """Installed with --no-deps it has the runtime too, and its old name answers."""
    python, site = bare_environment(tmp_path / "device")
    with zipfile.ZipFile(built_wheel(tmp_path)) as archive:
        archive.extractall(site)
    on_device = device(tmp_path / "device")
    for module in ("avsep.export.runtime.verify", "avsep.export.verify"):
        done = on_device(python, "-W", "ignore", "-m", module, tiny_bundle)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"all {len(list(tiny_bundle.iterdir()))} files match the manifest" in done.stdout
    code = BARE.format(more="'avsep_runtime'") + "from avsep.export.runtime import BundleSeparator, Separator, Stream\n"
    code += "assert Separator is BundleSeparator  # its name in bundles of 0.1\n"
    assert on_device(python, "-c", code).returncode == 0

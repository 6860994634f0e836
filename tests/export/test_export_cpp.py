"""The example in C++ gives the samples of the Python runtime.

It is built where a compiler, CMake and ONNX Runtime's headers are: those of a package (``libonnxruntime-dev``),
installed or unpacked into avsep's cache, or in the folder that ``ONNXRUNTIME_INCLUDE`` names. The library is that of
the Python package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from avsep.export.build.plan import ExportPlan
from avsep.export.bundle.export import export
from avsep.export.runtime.separator import BundleSeparator
from avsep.export.runtime.wav import read_wav, write_wav
from support.listeners import listener_part, listening_separator

SOURCE = Path(__file__).parents[2] / "export" / "examples" / "cpp"
RATE, CLIP = 11025, 8191
CLASSES = ("flute", "piano", "electric bass")
HEADER = "onnxruntime_cxx_api.h"
PLACES = (
    "/usr/include",
    "/usr/include/onnxruntime",
    "/usr/include/onnxruntime/core/session",
    "/usr/local/include",
    "/usr/local/include/onnxruntime",
)
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
# dpkg -x libonnxruntime-dev_*.deb ~/.cache/avsep/libonnxruntime-dev
UNPACKED = CACHE / "avsep" / "libonnxruntime-dev" / "usr" / "include" / "onnxruntime"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Path of the built example, and the environment it runs in."""
    import onnxruntime

    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    places = (os.environ.get("ONNXRUNTIME_INCLUDE", ""), str(UNPACKED), *PLACES)
    include = next((p for p in places if p and (Path(p) / HEADER).is_file()), "")
    if not include:
        pytest.skip(f"{HEADER} is not here: export/examples/cpp/README.md says how to get libonnxruntime-dev")
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this package of ONNX Runtime has no library for other programs")
    folder = tmp_path_factory.mktemp("cpp")
    lib = folder / "lib"
    lib.mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # the second is what it calls itself
        (lib / name).symlink_to(libraries[-1])
    given = [f"-DONNXRUNTIME_INCLUDE={include}", f"-DONNXRUNTIME_LIBRARY={lib / 'libonnxruntime.so'}"]
    for command in (["-S", SOURCE, "-B", folder / "build", *given], ["--build", folder / "build"]):
        done = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower()
    return folder / "build" / "separate", {**os.environ, "LD_LIBRARY_PATH": str(lib)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """By form: fixed shapes of two sources, and open ones. Masks are far from one half."""
    folder = tmp_path_factory.mktemp("bundles")
    plans = {"fixed": ExportPlan(batch=2), "open": ExportPlan(dynamic=True)}
    with listener_part():
        made = listening_separator(classes=CLASSES)
        return {form: export(made, plan, folder / form).path for form, plan in plans.items()}


def mixture(samples, channels=1):
    rng = np.random.default_rng(samples)
    time_s = np.arange(samples) / RATE
    tones = sum(np.sin(2 * np.pi * f * time_s) for f in (262, 440, 659)) * (1 + np.sin(5 * time_s)) / 8
    return (tones + 0.02 * rng.standard_normal((channels, samples))).astype(np.float32)


@pytest.mark.parametrize("form", ["fixed", "open"])
@pytest.mark.parametrize(
    ("samples", "channels", "kind"), [(int(3.3 * CLIP), 1, "FLOAT"), (CLIP + 1, 2, "PCM_16"), (3000, 1, "PCM_16")]
)
def test_it_gives_the_samples_of_the_runtime(program, bundles, tmp_path, form, samples, channels, kind):
    """Any number of chunks and of sources, of which a fixed graph takes two at once."""
    path, environment = program
    write_wav(tmp_path / "duet.wav", mixture(samples, channels), RATE, kind)
    audio = read_wav(tmp_path / "duet.wav")[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    with BundleSeparator.load(bundles[form], "cpu") as loaded:
        expected = loaded.separate(audio, None, CLASSES)
    command = [path, bundles[form], tmp_path / "duet.wav", ",".join(CLASSES), tmp_path / "out"]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    names = ["duet_flute.wav", "duet_piano.wav", "duet_electric-bass.wav", "duet_residual.wav"]
    assert done.stdout.split() == [str(tmp_path / "out" / name) for name in names]
    for name, samples_due in zip(names, [*expected, audio - expected.sum(axis=0)], strict=True):
        found, rate_hz = read_wav(tmp_path / "out" / name)
        assert rate_hz == RATE
        np.testing.assert_allclose(found[0], samples_due, atol=1e-5)
    assert np.abs(expected).max() > 0.01


def test_mistakes_are_one_line(program, bundles, tmp_path):
    path, environment = program
    write_wav(tmp_path / "duet.wav", mixture(3000), RATE, "FLOAT")
    write_wav(tmp_path / "fast.wav", mixture(3000), 2 * RATE, "FLOAT")
    (tmp_path / "no.wav").write_bytes(b"RIFF")
    for bundle, audio, classes, says in (
        (tmp_path, "duet.wav", "flute", "no manifest.json"),
        (bundles["open"], "none.wav", "flute", "no such audio file"),
        (bundles["open"], "no.wav", "flute", "is no WAV file"),
        (bundles["open"], "fast.wav", "flute", "22050 Hz, and this separator takes 11025 Hz"),
        (bundles["open"], "duet.wav", "flute,tuba", "no class 'tuba': it knows flute, piano, electric bass"),
    ):
        command = [str(w) for w in (path, bundle, tmp_path / audio, classes, tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert says in done.stderr
    assert not (tmp_path / "out").exists()

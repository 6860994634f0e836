"""Bundles and devices for the stand-in of TensorRT."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path

from avsep.export.runtime.cuda import Gpu
from avsep.export.runtime.manifest import REQUIRED_FILES
from support import fake_tensorrt

ORIN = Gpu("Orin", "8.7", 7620, "12.6")
PROFILE = [{"mixture": {"min": [1, 3], "opt": [2, 3], "max": [4, 3]}}]


def made_bundle(folder: Path, graphs: dict[str, list]) -> Path:
    """A bundle with graphs for the stand-in of TensorRT: by file name the mixture's shape, and "fixed" or "open"."""
    folder.mkdir(parents=True)
    for name, (shape, _) in graphs.items():
        graph = {"inputs": {"mixture": shape, "class_ids": [1, 2]}, "outputs": {"sources": shape}}
        (folder / name).write_bytes(fake_tensorrt.as_model(graph))
    write_manifest(folder, {name: PROFILE if kind == "open" else [] for name, (_, kind) in graphs.items()})
    return folder


def write_manifest(folder: Path, graphs: dict[str, list], least: str = "10.3") -> None:
    """The manifest, and the files that every bundle has, for graphs with these profiles.

    Of several graphs the first separates. Inputs are as the profile has them, or as :func:`made_bundle` makes them.
    """
    entries = []
    for number, (file, profiles) in enumerate(graphs.items()):
        shapes = {"mixture": [2, 3], "class_ids": [1, 2]}
        for name, bounds in (profiles[0] if profiles else {}).items():
            ends = zip(bounds["min"], bounds["max"], strict=True)
            shapes[name] = [low if low == high else "batch" for low, high in ends]
        golden = f"{file}.golden.npz"
        tensors = [{"name": n, "dtype": "float32", "shape": shape} for n, shape in shapes.items()]
        entries.append(
            {
                "file": file,
                "kind": ("separator", "object_encoder")[number],
                "precision": "fp32",
                "inputs": tensors,
                "outputs": [{"name": "sources", "dtype": "float32", "shape": shapes["mixture"]}],
                "profiles": profiles,
                "least_tensorrt": least,
                "golden": golden,
                "tolerance": 0.001,
            }
        )
        (folder / golden).write_bytes(b"not looked at")
    for name in REQUIRED_FILES:
        (folder / name).write_text("not looked at")
    own = [p for p in folder.iterdir() if p.is_file() and p.name != "manifest.json"]
    transform = {"n_fft": 254, "hop": 1, "padding": "zeros", "log_rows": 2, "align_corners": True, "clip_samples": 3}
    names, encoders = ["flute", "piano"], {"object_encoder": None, "motion_encoder": None}
    manifest = {
        "format": "avsep-bundle",
        "version": 2,
        "name": "made up",
        "separator": {
            "num_classes": 2,
            "classes": names,
            "front_end": {"sample_rate_hz": 11025, **transform},
            **encoders,
        },
        "classes": names,
        "sample_rate_hz": 11025,
        "transform": {**transform, "frames": 4},
        "chunking": {"clip_samples": 3, "context_samples": 0, "crossfade_samples": 0, "align_samples": 1},
        "visual": [],
        "graphs": entries,
        "files": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in own},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


class FakeCuda:
    """Device memory is host memory."""

    live = 0

    def __init__(self):
        self.held, self.stream, self.allocated = {}, 7, 0

    def current(self):
        import contextlib

        return contextlib.nullcontext()

    def allocate(self, size):
        buffer = ctypes.create_string_buffer(size)
        address = ctypes.addressof(buffer)
        self.held[address] = buffer
        self.allocated += 1
        FakeCuda.live += 1
        return address

    def free(self, address):
        del self.held[address]
        FakeCuda.live -= 1

    def upload(self, array, address):
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address, array):
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def synchronize(self):
        pass

    def close(self):
        assert not self.held

"""Bundles and devices for the stand-in of TensorRT."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path

from avsep.export.targets.tensorrt import Gpu
from support import fake_tensorrt

ORIN = Gpu("Orin", "8.7", 7620, "12.6")
PROFILE = [{"mixture": {"min": [1, 3], "opt": [2, 3], "max": [4, 3]}}]


def made_bundle(folder: Path, graphs: dict[str, list]) -> Path:
    """A bundle as far as building reads one, with graphs for the stand-in of TensorRT."""
    folder.mkdir(parents=True)
    entries = []
    for name, (shape, kind) in graphs.items():
        graph = {"inputs": {"mixture": shape, "class_ids": [1, 2]}, "outputs": {"sources": shape}}
        (folder / name).write_bytes(fake_tensorrt.as_model(graph))
        profiles = PROFILE if kind == "open" else []
        entries.append({"file": name, "precision": "fp32", "profiles": profiles, "least_tensorrt": "10.3"})
    write_manifest(folder, entries)
    return folder


def write_manifest(folder: Path, entries: list[dict]) -> None:
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix == ".onnx"}
    manifest = {"format": "avsep-bundle", "version": 2, "graphs": entries, "files": files}
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

"""Damage to a bundle or its inputs: one clear line that names what is wrong, exit code 2, nothing half-written."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import avsep
from avsep.export.bundle.packing import write_arrays, write_tar
from avsep.export.runtime.verify import main as verify_on_a_device
from avsep.media.timeline import VisualTimeline, write_visual_file
from support.bundles import write_sealed
from support.commands import run
from support.tones import bundle_separator

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

GRAPH, GOLDEN, MANIFEST = "separator.onnx", "separator.golden.npz", "manifest.json"
WHEEL = f"avsep_runtime-{avsep.__version__}-py3-none-any.whl"


def tree(folder):
    """Every path below, with what it holds."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def refused(argv, told, folder, capfd):
    """The command ends in one line that says all of ``told``, with exit code 2, and leaves ``folder`` as it was."""
    before = tree(folder)
    capfd.readouterr()
    code = run(*argv)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, (out, err)
    assert len(lines) == 1, err
    assert lines[0].startswith("avsep: ")
    assert "Traceback" not in out + err
    for word in told:
        assert word in lines[0], lines[0]
    assert out == ""
    assert tree(folder) == before


# ---------------------------------------------------------------------- ways to damage a bundle's folder


def truncate(name, by=100):
    return lambda b: (b / name).write_bytes((b / name).read_bytes()[:-by])


def flip(name):
    def damage(b):
        data = bytearray((b / name).read_bytes())
        data[len(data) // 2] ^= 1
        (b / name).write_bytes(bytes(data))

    return damage


def gone(name):
    return lambda b: (b / name).unlink()


def added(name, content="x"):
    return lambda b: (b / name).write_text(content)


def edited(change):
    """The manifest after ``change`` of its data, with the hash that belongs to it."""

    def damage(b):
        manifest = json.loads((b / MANIFEST).read_text())
        change(manifest)
        write_sealed(b, manifest, files=False)

    return damage


def unsealed(change):
    """The manifest after ``change`` of its data, as damage would leave it."""

    def damage(b):
        manifest = json.loads((b / MANIFEST).read_text())
        change(manifest)
        (b / MANIFEST).write_text(json.dumps(manifest))

    return damage


def contradicted(**values):
    """What belongs to its place, with every hash right, but not to the separator's spec in the manifest."""
    return edited(lambda m: m.update(values))


def of_graph(**values):
    return edited(lambda m: m["graphs"][0].update(values))


def forged(name, content):
    """Another content, with the hash that belongs to it: what a careless edit or a mix-up would not do."""

    def damage(b):
        data = content(b) if callable(content) else content
        (b / name).write_bytes(data)
        edited(lambda m: m["files"].update({name: hashlib.sha256(data).hexdigest()}))(b)

    return damage


def golden(**changes):
    """Golden arrays with some replaced (a function of the old one, or None to leave it out), the hash fitting."""

    def content(b):
        with np.load(b / GOLDEN, allow_pickle=False) as archive:
            arrays = dict(archive)
        for name, change in changes.items():
            value = change(arrays.pop(name)) if change is not None else arrays.pop(name) and None
            if value is not None:
                arrays[name] = value
        write_arrays(b / "new.npz", arrays)
        data = (b / "new.npz").read_bytes()
        (b / "new.npz").unlink()
        return data

    return forged(GOLDEN, content)


def without(name):
    def content(b):
        with np.load(b / GOLDEN, allow_pickle=False) as archive:
            arrays = {k: v for k, v in archive.items() if k != name}
        write_arrays(b / "new.npz", arrays)
        data = (b / "new.npz").read_bytes()
        (b / "new.npz").unlink()
        return data

    return forged(GOLDEN, content)


def pickled(b):
    buffer = io.BytesIO()
    np.savez(buffer, mixture=np.array([{}], dtype=object))
    return buffer.getvalue()


def bomb(b):
    """A few kilobytes that unpack to 64 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mixture.npy", bytes(64 << 20))
    return buffer.getvalue()


def another_graph(b):
    """A valid graph, of something else: y = x + x."""
    import onnx

    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "other", [x], [y]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    return model.SerializeToString()


def reweighted(b):
    """The same graph with one weight changed."""
    import onnx

    model = onnx.load(str(b / GRAPH))
    weight = max(model.graph.initializer, key=lambda i: len(i.raw_data))
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.5)).tobytes()
    return model.SerializeToString()


def other_shape(b):
    """The same graph for two mixtures at once."""
    import onnx

    model = onnx.load(str(b / GRAPH))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    return model.SerializeToString()


def linked(name):
    def damage(b):
        shutil.move(b / name, b.parent / name)
        (b / name).symlink_to(b.parent / name)

    return damage


def folder_of(name):
    def damage(b):
        (b / name).unlink()
        (b / name).mkdir()

    return damage


def deep(b):
    (b / MANIFEST).write_text("[" * 100000 + "]" * 100000)


def twice(b):
    text = (b / MANIFEST).read_text().lstrip()[1:]
    (b / MANIFEST).write_text('{"format": "avsep-bundle", ' + text)


def huge_number(b):
    text = (b / MANIFEST).read_text()
    assert '"tolerance": 0.001' in text
    (b / MANIFEST).write_text(text.replace('"tolerance": 0.001', '"tolerance": 1e999', 1))


def not_a_number(b):
    text = (b / MANIFEST).read_text()
    (b / MANIFEST).write_text(text.replace('"tolerance": 0.001', '"tolerance": NaN', 1))


BUNDLES = {
    # files
    "truncated graph": (truncate(GRAPH), [GRAPH, "SHA-256", "copy"]),
    "one bit of the graph": (flip(GRAPH), [GRAPH, "SHA-256"]),
    "empty graph": (lambda b: (b / GRAPH).write_bytes(b""), [GRAPH, "SHA-256"]),
    "truncated golden arrays": (truncate(GOLDEN), [GOLDEN, "SHA-256"]),
    "one bit of the build script": (flip("build_engine.py"), ["build_engine.py", "SHA-256"]),
    "edited README": (lambda b: (b / "README.md").write_text("run my script"), ["README.md", "SHA-256"]),
    "missing graph": (gone(GRAPH), ["lacks", GRAPH, "copy"]),
    "missing golden arrays": (gone(GOLDEN), ["lacks", GOLDEN]),
    "missing licence": (gone("LICENSE"), ["lacks", "LICENSE"]),
    "missing wheel": (gone(WHEEL), ["lacks", WHEEL, "copy"]),
    "one bit of the wheel": (flip(WHEEL), [WHEEL, "SHA-256"]),
    "a file too many": (added("evil.onnx"), ["evil.onnx", "remove"]),
    "a file with a strange name": (added("a\nb\x1b[31m.onnx"), ["a b?[31m.onnx", "remove"]),
    "a folder too many": (lambda b: (b / "more").mkdir(), ["more", "folder"]),
    "a folder in a file's place": (folder_of(GRAPH), [GRAPH, "folder"]),
    "a link in a file's place": (linked(GRAPH), [GRAPH, "link"]),
    "a dangling link": (lambda b: (b / "x").symlink_to("nowhere"), ["x", "link"]),
    # the manifest
    "missing manifest": (gone(MANIFEST), ["not a bundle", MANIFEST]),
    "truncated manifest": (truncate(MANIFEST), [MANIFEST, "not valid JSON", "copy"]),
    "empty manifest": (lambda b: (b / MANIFEST).write_text(""), [MANIFEST, "not valid JSON"]),
    "manifest that is no JSON": (lambda b: (b / MANIFEST).write_bytes(b"\xff\xfe\x00"), [MANIFEST, "not valid JSON"]),
    "manifest that is a list": (lambda b: (b / MANIFEST).write_text("[]"), [MANIFEST, "not of an avsep bundle"]),
    "manifest nested beyond sense": (deep, [MANIFEST]),
    "manifest with a key twice": (twice, [MANIFEST, "twice"]),
    "manifest with an endless number": (huge_number, [MANIFEST, "1e999"]),
    "manifest with NaN": (not_a_number, [MANIFEST, "NaN"]),
    "manifest of something else": (edited(lambda m: m.update(format="tarball")), [MANIFEST, "not of an avsep bundle"]),
    "version 1": (edited(lambda m: m.update(version=1)), ["version 1", "export it again"]),
    "version 99": (edited(lambda m: m.update(version=99)), ["version 99", "update avsep"]),
    "no version": (edited(lambda m: m.pop("version")), ["version None"]),
    "a key missing": (edited(lambda m: m.pop("classes")), [MANIFEST, "classes is missing"]),
    "a key too many": (edited(lambda m: m.update(clases=[])), [MANIFEST, "clases"]),
    "rate of nothing": (edited(lambda m: m.update(sample_rate_hz=0)), ["sample_rate_hz = 0"]),
    "class names that repeat": (edited(lambda m: m.update(classes=["flute", "flute"])), ["classes", "twice"]),
    "class names that are numbers": (edited(lambda m: m.update(classes=[1, 2, 3])), ["classes[0] = 1"]),
    "no graph": (edited(lambda m: m.update(graphs=[])), ["graphs"]),
    "graph without a hash": (edited(lambda m: m["files"].pop(GRAPH)), ["no hash", GRAPH]),
    "hash of another graph": (edited(lambda m: m["files"].update({GRAPH: "0" * 64})), [GRAPH, "SHA-256"]),
    "hash that is none": (edited(lambda m: m["files"].update({GRAPH: "abc"})), ["files", GRAPH]),
    "graph outside the bundle": (of_graph(file="../separator.onnx"), ["file", "../separator.onnx"]),
    "file outside the bundle": (edited(lambda m: m["files"].update({"../x": "0" * 64})), ["../x"]),
    "file at the root": (edited(lambda m: m["files"].update({"/etc/passwd": "0" * 64})), ["/etc/passwd"]),
    "two graphs of one kind": (edited(lambda m: m["graphs"].append(m["graphs"][0])), ["two graphs"]),
    "tolerance of all": (of_graph(tolerance=1e9), ["tolerance"]),
    "shape of nothing": (
        edited(lambda m: m["graphs"][0]["inputs"][0].update(shape=[1, 0])),
        ["inputs[0].shape[1]"],
    ),
    "chunks of another length": (edited(lambda m: m["chunking"].update(clip_samples=100)), ["clip_samples"]),
    "context of whole chunks": (edited(lambda m: m["chunking"].update(context_samples=8191)), ["context_samples"]),
    "profile of another input": (
        of_graph(profiles=[{"audio": {"min": [1], "opt": [1], "max": [1]}}]),
        ["profile", "audio"],
    ),
    "profile out of order": (
        of_graph(profiles=[{"mixture": {"min": [2, 8191], "opt": [1, 8191], "max": [4, 8191]}}]),
        ["profile", "mixture", "out of order"],
    ),
    "profile that the graph does not take": (
        of_graph(profiles=[{"mixture": {"min": [1, 8191], "opt": [1, 8191], "max": [1, 9000]}}]),
        ["profile", "mixture"],
    ),
    "encoder that is not there": (edited(lambda m: m["visual"][0].update(graph="object_encoder.onnx")), ["object"]),
    # what contradicts the separator's spec in the manifest
    "rate of 1 Hz": (contradicted(sample_rate_hz=1), ["sample_rate_hz = 1", "separator says 11025"]),
    "rate of 768 kHz": (contradicted(sample_rate_hz=768_000), ["sample_rate_hz = 768000", "separator says 11025"]),
    "rate of 1 GHz": (contradicted(sample_rate_hz=10**9), ["sample_rate_hz = 1000000000"]),
    "classes reversed": (contradicted(classes=["cello", "piano", "flute"]), ["classes", "separator says"]),
    "a class too many": (contradicted(classes=["flute", "piano", "cello", "drum"]), ["classes", "drum"]),
    "a class too few": (contradicted(classes=["flute", "piano"]), ["classes", "separator says"]),
    "no class": (contradicted(classes=[]), ["classes = []", "separator says"]),
    "number of classes": (edited(lambda m: m["separator"].update(num_classes=4)), ["num_classes = 4", "3 classes"]),
    "another hop": (edited(lambda m: m["transform"].update(hop=32)), ["transform.hop = 32", "separator says 64"]),
    "another window": (edited(lambda m: m["transform"].update(n_fft=256)), ["transform.n_fft = 256", "254"]),
    "another padding": (edited(lambda m: m["transform"].update(padding="reflect")), ["transform.padding", "zeros"]),
    "another grid": (edited(lambda m: m["transform"].update(log_rows=64)), ["transform.log_rows = 64", "128"]),
    "other corners": (edited(lambda m: m["transform"].update(align_corners=False)), ["transform.align_corners"]),
    "other frames": (edited(lambda m: m["transform"].update(frames=127)), ["transform.frames = 127", "128"]),
    "chunks off the hop": (edited(lambda m: m["chunking"].update(align_samples=1)), ["chunking.align_samples = 1"]),
    "no sight": (contradicted(visual=[]), [GRAPH, "object_features"]),
    "sight of another role": (edited(lambda m: m["visual"][0].update(role="motion")), [GRAPH, "motion_features"]),
    "other features": (edited(lambda m: m["visual"][0].update(name="clop")), ["object.name", "clop", "clip"]),
    "features of another width": (edited(lambda m: m["visual"][0].update(dim=9)), ["object.dim = 9", "says 8"]),
    "frames in place of features": (edited(lambda m: m["visual"][0].update(kind="frames")), ["object.kind"]),
    "a thousand million frames": (edited(lambda m: m["visual"][0].update(frames=10**9)), ["frames = 1000000000"]),
    "no spec of the separator": (edited(lambda m: m["separator"].pop("front_end")), ["front_end is missing"]),
    # damage that its own hash shows, whatever it looks like
    "damaged rate": (unsealed(lambda m: m.update(sample_rate_hz=11024)), ["damaged", "manifest_sha256", "copy"]),
    "damaged version": (unsealed(lambda m: m.update(version=3)), ["damaged", "manifest_sha256", "copy"]),
    "damaged format": (unsealed(lambda m: m.update(format="avsep-bundlf")), ["damaged", "manifest_sha256"]),
    "damaged on both sides": (
        unsealed(lambda m: (m.update(sample_rate_hz=11027), m["separator"]["front_end"].update(sample_rate_hz=11027))),
        ["damaged", "manifest_sha256"],
    ),
    "damaged notes": (unsealed(lambda m: m["made_with"].update(numpy="2.0")), ["damaged", "manifest_sha256"]),
    "damaged hash": (unsealed(lambda m: m.update(manifest_sha256="0" * 64)), ["damaged", "manifest_sha256"]),
    "hash that is a number": (unsealed(lambda m: m.update(manifest_sha256=0)), ["damaged", "manifest_sha256"]),
    # a content that fits its hash
    "graph that is no graph": (forged(GRAPH, b"not a graph at all"), [GRAPH, "not an ONNX graph", "export"]),
    "graph without anything in it": (forged(GRAPH, b"\x3a\x00\x42\x00"), [GRAPH, "cannot load", "export it again"]),
    "graph swapped for another": (forged(GRAPH, another_graph), [GRAPH, "takes x", "another graph"]),
    "graph of another shape": (forged(GRAPH, other_shape), [GRAPH, "mixture", "[2, 8191]"]),
    "graph with another weight": (forged(GRAPH, reweighted), [GRAPH, "differs from its golden output"]),
    "golden output changed": (golden(sources=lambda a: a + np.float32(0.01)), [GRAPH, "differs", "golden"]),
    "golden input changed": (golden(mixture=lambda a: a[:, ::-1].copy()), [GRAPH, "differs", "golden"]),
    "golden output of another shape": (golden(sources=lambda a: a[:, :1]), [GOLDEN, "sources", "[1, 1, 8191]"]),
    "golden output of another type": (golden(sources=lambda a: a.astype(np.float64)), [GOLDEN, "float64"]),
    "golden output of NaN": (golden(sources=lambda a: a * np.nan), [GOLDEN, "NaN"]),
    "golden class out of range": (golden(class_ids=lambda a: a + 1000), [GRAPH, "cannot run", "export it again"]),
    "golden output missing": (without("sources"), [GOLDEN, "no array 'sources'"]),
    "golden arrays that are a pickle": (forged(GOLDEN, pickled), [GOLDEN]),
    "golden arrays that are no archive": (forged(GOLDEN, b"PK\x03\x04 and then nothing"), [GOLDEN, "cannot be read"]),
    "golden arrays that explode": (forged(GOLDEN, bomb), [GOLDEN, "unpacks"]),
}  # fmt: skip


# What the runtime does not use it does not look at.
ONLY_AVSEP = {"a key too many"}


@pytest.mark.parametrize("name", BUNDLES)
def test_a_damaged_bundle_is_refused(name, tiny_bundle, tmp_path, capfd):
    damage, told = BUNDLES[name]
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    damage(bundle)
    refused(["export", "verify", bundle], told, tmp_path, capfd)
    if name in ONLY_AVSEP:
        return
    # and by the runtime alone, which has no models of the manifest
    assert verify_on_a_device([str(bundle)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("avsep: ")
    assert all(word in line for word in told), line


def test_every_command_refuses(tiny_bundle, tmp_path, capfd):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    truncate(GRAPH)(bundle)
    for command in (["info", bundle], ["verify", bundle]):
        refused(["export", *command], [GRAPH, "SHA-256"], tmp_path, capfd)


def test_there_are_enough_kinds():
    assert len(BUNDLES) + len(TARS) + len(INPUTS) >= 100


# ---------------------------------------------------------------------- tars


def member(name, content=b"x", **values):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in values.items():
        setattr(info, key, value)
    return info, content


def packed(*more, first=(), leave_out=()):
    """The bundle as a tar with further members."""

    def make(bundle, path):
        own = [
            member(f.name, f.read_bytes()) for f in sorted(bundle.iterdir()) if f.name not in leave_out
        ]  # fmt: skip
        with tarfile.open(path, "w:") as archive:
            for info, content in (*first, *own, *more):
                archive.addfile(info, io.BytesIO(content) if info.isreg() else None)

    return make


def extended(**headers):
    """The bundle as a tar whose manifest has further headers before it."""

    def make(bundle, path):
        with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
            for f in sorted(bundle.iterdir()):
                info, content = member(f.name, f.read_bytes())
                info.pax_headers = headers if f.name == MANIFEST else {}
                archive.addfile(info, io.BytesIO(content))

    return make


def sparse_1_0(bundle, path):
    extended(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9", "GNU.sparse.name": "x"})(
        bundle, path
    )


def old_sparse(bundle, path):
    """As GNU tar writes a file of 1 TB with nothing in it."""
    info = tarfile.TarInfo("README.md")
    info.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def sized(size):
    """A header with these bytes for its size."""

    def make(bundle, path):
        block = bytearray(tarfile.TarInfo("README.md").tobuf(tarfile.USTAR_FORMAT))
        block[124:136] = size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        path.write_bytes(bytes(block) * 3 + bytes(1024))

    return make


def endless_extensions(bundle, path):
    info, body = tarfile.TarInfo("x"), b"11 a=bbbbb\n"
    info.type, info.size = tarfile.XHDTYPE, len(body)
    path.write_bytes((info.tobuf() + body.ljust(512, b"\0")) * 3000)


def cut(share):
    def make(bundle, path):
        write_tar(bundle, path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return make


def compressed(kind):
    def make(bundle, path):
        with tarfile.open(path, f"w:{kind}") as archive:
            archive.add(bundle, arcname=".")

    return make


def in_a_folder(bundle, path):
    with tarfile.open(path, "w:") as archive:
        archive.add(bundle, arcname="bundle")


def link(name, target, kind):
    return member(name, b"", type=kind, linkname=target)


TARS = {
    "truncated tar": (cut(0.5), ["b.tar", "truncated", "copy"]),
    "tar cut within a header": (lambda b, p: p.write_bytes(b"manifest.json" + bytes(100)), ["b.tar"]),
    "empty tar": (lambda b, p: p.write_bytes(b""), ["b.tar"]),
    "no tar": (lambda b, p: p.write_text("I am a letter"), ["b.tar", "neither"]),
    "compressed tar": (compressed("gz"), ["b.tar", "compressed", "uncompress"]),
    "tar compressed by xz": (compressed("xz"), ["b.tar", "compressed"]),
    "tar of a folder": (in_a_folder, ["bundle"]),
    "name that leads out": (packed(member("../evil.sh")), ["../evil.sh", "leads out"]),
    "name that leads out in the middle": (packed(member("a/../../evil.sh")), ["a/../../evil.sh", "leads out"]),
    "absolute name": (packed(member("/evil.sh")), ["/evil.sh", "leads out"]),
    "name of Windows": (packed(member("..\\evil.sh")), ["evil.sh"]),
    "symbolic link": (packed(link("x", "/etc/passwd", tarfile.SYMTYPE)), ["x", "link"]),
    "hard link": (packed(link("x", MANIFEST, tarfile.LNKTYPE)), ["x", "link"]),
    "link in the graph's place": (
        packed(link(GRAPH, "/etc/passwd", tarfile.SYMTYPE), leave_out=(GRAPH,)),
        [GRAPH, "link"],
    ),
    "device": (packed(member("x", b"", type=tarfile.CHRTYPE)), ["x", "plain file"]),
    "pipe": (packed(member("x", b"", type=tarfile.FIFOTYPE)), ["x", "plain file"]),
    "folder": (packed(member("more", b"", type=tarfile.DIRTYPE)), ["more", "plain file"]),
    "name twice": (packed(member(GRAPH, b"another")), [GRAPH, "twice"]),
    "file too many": (packed(member("notes.txt")), ["notes.txt", "remove"]),
    "engine in a tar": (packed(member("separator.plan")), ["separator.plan", "remove"]),
    "file missing": (packed(leave_out=(GRAPH,)), ["lacks", GRAPH]),
    "manifest missing": (packed(leave_out=(MANIFEST,)), ["not a bundle", MANIFEST]),
    "thousands of files": (packed(*(member(f"f{i}") for i in range(300))), ["more than 256 files"]),
    "sparse map": (extended(**{"GNU.sparse.map": "a,b"}), ["b.tar", "sparse", "ustar"]),
    "sparse size": (extended(**{"GNU.sparse.size": "zz", "GNU.sparse.map": "0,1"}), ["b.tar", "sparse"]),
    "sparse file of version 1.0": (sparse_1_0, ["b.tar", "sparse"]),
    "sparse file of old GNU tar": (old_sparse, ["README.md", "plain file"]),
    "size below nothing elsewhere": (extended(size="-1024"), ["b.tar", "size"]),
    "size that is none elsewhere": (extended(size="zz"), ["b.tar", "size"]),
    "another name elsewhere": (extended(path="../evil.sh"), ["b.tar", "name"]),
    "size below nothing": (sized(b"\xff" * 10 + b"\xfc\0"), ["b.tar", "README.md"]),
    "size beyond everything": (sized(b"\x80" + b"\x7f" * 11), ["b.tar", "truncated", "README.md"]),
    "size that is none": (sized(b"twelve bytes"), ["b.tar", "neither"]),
    "thousands of extensions": (endless_extensions, ["not a bundle", MANIFEST]),
    "name that is none": (packed(member("a b\x1b[2J")), ["a b?[2J"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_a_damaged_tar_is_refused(name, tiny_bundle, tmp_path, capfd):
    make, told = TARS[name]
    make(tiny_bundle, tmp_path / "b.tar")
    refused(["export", "verify", tmp_path / "b.tar"], told, tmp_path, capfd)


def test_tars_of_other_programs_are_taken(tiny_bundle, tmp_path):
    """Times and owners in further headers change nothing; nor does a file with holes, of which a tar knows nothing."""
    from avsep.export import open_bundle

    extended(mtime="1.5", **{"SCHILY.xattr.user.note": "a"})(tiny_bundle, tmp_path / "b.tar")
    assert open_bundle(tmp_path / "b.tar").size(GRAPH) == (tiny_bundle / GRAPH).stat().st_size
    if shutil.which("tar") is not None:
        for form in ("gnu", "pax", "ustar"):
            subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "t.tar", "-C", tiny_bundle, "."], check=True)
            open_bundle(tmp_path / "t.tar")


def test_a_hole_of_terabytes_is_refused_at_once(tiny_bundle, tmp_path, capfd):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    try:
        os.truncate(bundle / "README.md", 1 << 40)
    except OSError:
        pytest.skip("no files with holes here")
    started = time.perf_counter()
    assert verify_on_a_device([str(bundle)]) == 2
    assert time.perf_counter() - started < 2
    assert "README.md has 1099511627776 bytes" in capfd.readouterr().err
    os.truncate(bundle / "README.md", 0)


def test_any_damage_to_a_tars_headers_is_refused_or_harmless(tiny_bundle, tmp_path):
    from avsep.errors import ExportError
    from avsep.export import open_bundle

    write_tar(tiny_bundle, tmp_path / "b.tar")
    whole, rng, told = (tmp_path / "b.tar").read_bytes(), random.Random(0), []
    manifest = (tiny_bundle / MANIFEST).stat().st_size
    headers = [0, 512 + -(-manifest // 512) * 512]
    for _ in range(300):
        data = bytearray(whole)
        start = rng.choice(headers)
        for _ in range(rng.choice([1, 2, 20])):
            data[start + rng.randrange(512)] = rng.randrange(256)
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        (tmp_path / "d.tar").write_bytes(data)
        try:
            open_bundle(tmp_path / "d.tar", hashes=False)
        except ExportError as error:
            told.append(str(error))
    assert len(told) > 100
    assert not any("\n" in line for line in told)


def test_a_tar_of_damaged_files_is_refused(tiny_bundle, tmp_path, capfd):
    for name in ("truncated graph", "golden output changed", "version 99", "golden arrays that explode"):
        damage, told = BUNDLES[name]
        bundle = shutil.copytree(tiny_bundle, tmp_path / name)
        damage(bundle)
        tar = tmp_path / f"{name}.tar"
        write_tar(bundle, tar)
        refused(["export", "verify", tar], told, tmp_path, capfd)


def test_any_cut_of_a_tar_is_refused(tiny_bundle, tmp_path):
    from avsep.errors import ExportError
    from avsep.export import open_bundle

    write_tar(tiny_bundle, tmp_path / "b.tar")
    whole = (tmp_path / "b.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    rng = random.Random(0)
    for length in [0, 1, 511, 512, 513, 1024, *(rng.randrange(end) for _ in range(40))]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ExportError):
            open_bundle(tmp_path / "cut.tar")


def test_any_flipped_bit_of_a_manifest_is_refused_or_harmless(tiny_bundle, tmp_path):
    """No other exception than the library's own comes out, whatever is in the manifest."""
    from avsep.errors import ExportError
    from avsep.export import open_bundle

    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    data = (bundle / MANIFEST).read_bytes()
    rng = random.Random(0)
    outcomes = []
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (bundle / MANIFEST).write_bytes(bytes(changed))
        try:
            opened = open_bundle(bundle)
            opened.golden(opened.graph())
            outcomes.append("taken")
        except ExportError as error:
            outcomes.append(str(error))
    assert all("\n" not in outcome for outcome in outcomes)
    assert len(outcomes) - outcomes.count("taken") > 50


# ---------------------------------------------------------------------- what is no bundle at all


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda d: None, ["x", "no such bundle"]),
        (lambda d: (d / "x").mkdir(), ["x", "not a bundle", MANIFEST]),
        (lambda d: (d / "x").symlink_to("nowhere"), ["x", "no such bundle"]),
        (lambda d: os.mkfifo(d / "x"), ["x", "neither"]),
        (lambda d: ((d / "x").mkdir(), (d / "x" / "run.yaml").write_text("a")), ["x", "run", "avsep export"]),
        (lambda d: ((d / "x" / "task-00").mkdir(parents=True), (d / "x" / "task-00" / MANIFEST).write_text("{}")),
         ["x", "task-00", "name one of them"]),
    ],
)  # fmt: skip
def test_what_is_no_bundle(make, told, tmp_path, capfd):
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    make(tmp_path)
    listing = sorted(p.name for p in tmp_path.rglob("*"))
    assert run("export", "verify", tmp_path / "x") == 2
    out, err = capfd.readouterr()
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert out == ""
    assert all(word in err for word in told), err
    assert sorted(p.name for p in tmp_path.rglob("*")) == listing


# ---------------------------------------------------------------------- what cannot be exported


@pytest.fixture
def one_run(tmp_path):
    from avsep.separator import save_separator

    folder = tmp_path / "run"
    home = folder / "tasks" / "00"
    home.mkdir(parents=True)
    (folder / "run.yaml").write_text("stands in for a run's spec\n")
    save_separator(bundle_separator(), home / "separator")
    (home / "task.json").write_text(json.dumps({"index": 0}))
    return folder


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--task", "3"], ["task 3", "0"]),
        (["--task", "0", "--all-tasks"], ["--all-tasks", "--task 0"]),
        (["--tar"], ["--tar", "out.tar"]),
        (["--precision", "fp8"], ["precision", "fp8", "fp16"]),
        (["--opset", "23"], ["opset", "23", "20"]),
        (["--tolerance", "0"], ["tolerance", "0.0"]),
        (["--tolerance", "nan"], ["tolerance", "nan"]),
        (["--gate-db", "-1"], ["gate_db", "-1"]),
        (["--length-s", "0"], ["length_s", "0"]),
        (["--length-s", "0.33"], ["length_s", "multiples"]),
    ],
)
def test_what_cannot_be_exported(options, told, one_run, tmp_path, capfd):
    refused(["export", one_run, "--out", tmp_path / "deep" / "out", *options], told, tmp_path, capfd)


@pytest.mark.parametrize(
    ("out", "told"),
    [("run/bundle", ["inside the run"]), ("run", ["is a run"]), ("out.tar.gz", ["compressed"]), ("x", ["letter.txt"])],
)
def test_where_nothing_is_exported_to(out, told, one_run, tmp_path, capfd):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "letter.txt").write_text("dear")
    refused(["export", one_run, "--out", tmp_path / out], told, tmp_path, capfd)
    assert Path(tmp_path / "x" / "letter.txt").read_text() == "dear"


# ---------------------------------------------------------------------- inputs of a bundle that is whole


def tone(seconds=0.5, rate_hz=11025):
    return 0.2 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz)


def sound(write):
    """Another recording in place of the good one."""

    def damage(d):
        write(d / "duet.wav")

    return damage


def seen(**timelines):
    """Other features in place of the good ones."""

    def damage(d):
        write_visual_file(d / "features.npz", {n: VisualTimeline(features={"clip": a}) for n, a in timelines.items()})

    return damage


ROWS = np.ones((3, 8), np.float32)


def with_hole(path):
    samples = tone()
    samples[100] = np.nan
    soundfile.write(path, samples, 11025, subtype="FLOAT")


INPUTS = {
    "NaN audio": (sound(with_hole), [], ["duet.wav", "NaN"]),
    "empty audio": (sound(lambda p: soundfile.write(p, np.zeros(0), 11025)), [], ["duet.wav"]),
    "silent audio": (sound(lambda p: soundfile.write(p, np.zeros(999), 11025)), [], ["duet.wav", "silent"]),
    "truncated audio": (sound(lambda p: p.write_bytes(p.read_bytes()[:20])), [], ["duet.wav"]),
    "audio that is a text": (sound(lambda p: p.write_text("la la la")), [], ["duet.wav"]),
    "no audio": (sound(lambda p: p.unlink()), [], ["duet.wav"]),
    "unknown class": (None, ["--classes", "flute,pian"], ["'pian'", "piano"]),
    "class twice": (None, ["--classes", "flute,flute"], ["'flute' is given twice"]),
    "0 sources": (None, ["--classes", ","], ["needs classes", "it knows flute, piano, cello"]),
    "class without features": (seen(flute=ROWS), [], ["'cello'", "flute"]),
    "no features": (None, ["--features", None], ["--features"]),
    "features of another width": (seen(flute=ROWS, cello=ROWS[:, :5]), [], ["5", "8"]),
    "features of NaN": (seen(flute=ROWS, cello=ROWS * np.nan), [], ["cello", "finite"]),
    "truncated features": (lambda d: truncate("features.npz", 40)(d), [], ["features.npz"]),
    "features that are a pickle": (lambda d: (d / "features.npz").write_bytes(pickled(d)), [], ["features.npz"]),
    "features that are no archive": (lambda d: (d / "features.npz").write_bytes(b"PK\x03\x04"), [], ["features.npz"]),
    "truncated graph": (lambda d: truncate(GRAPH)(d / "bundle"), [], [GRAPH, "SHA-256"]),
    "swapped graph": (lambda d: forged(GRAPH, another_graph)(d / "bundle"), [], [GRAPH]),
    "graph that is no graph": (lambda d: forged(GRAPH, b"no graph")(d / "bundle"), [], [GRAPH]),
    "missing graph": (lambda d: gone(GRAPH)(d / "bundle"), [], ["lacks", GRAPH]),
    "missing manifest": (lambda d: gone(MANIFEST)(d / "bundle"), [], ["not a bundle"]),
    "bundle of version 1": (lambda d: edited(lambda m: m.update(version=1))(d / "bundle"), [], ["version 1"]),
    "no bundle": (lambda d: shutil.rmtree(d / "bundle"), [], ["no such bundle"]),
    "unknown provider": (None, ["--provider", "gpu"], ["'gpu'", "cpu"]),
    "provider that is not here": (None, ["--provider", "tensorrt"], ["tensorrt"]),
    "precision that is not there": (None, ["--precision", "int8"], ["int8", "fp32"]),
    "a file that is there": (
        lambda d: ((d / "out").mkdir(), (d / "out" / "duet_flute.wav").write_text("mine")),
        [],
        ["duet_flute.wav", "--overwrite"],
    ),
}


@pytest.fixture
def desk(tiny_bundle, tmp_path):
    """A bundle, a recording, features of its sources."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    soundfile.write(tmp_path / "duet.wav", tone(), 11025)
    seen(flute=ROWS, cello=-ROWS)(tmp_path)
    return tmp_path


def separating(desk, options=()):
    chosen = {"--bundle": desk / "bundle", "--features": desk / "features.npz", "--classes": "flute,cello"}
    chosen |= {"--provider": "cpu", "--out": desk / "out", **dict(zip(options[::2], options[1::2], strict=True))}
    return ["separate", desk / "duet.wav", *(a for pair in chosen.items() if pair[1] is not None for a in pair)]


@pytest.mark.parametrize("name", INPUTS)
def test_damaged_inputs_are_refused(name, desk, capfd):
    damage, options, told = INPUTS[name]
    if name == "provider that is not here" and importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is here")
    if damage is not None:
        damage(desk)
    refused(separating(desk, options), told, desk, capfd)


@pytest.mark.parametrize(("rate_hz", "channels"), [(11025, 1), (96000, 2), (8000, 6)])
def test_other_rates_and_channels_are_taken(rate_hz, channels, desk, capfd):
    samples = tone(rate_hz=rate_hz)
    soundfile.write(desk / "duet.wav", np.stack([samples] * channels, axis=1), rate_hz)
    assert run(*separating(desk), "--no-page") == 0
    names = ["duet_cello.wav", "duet_flute.wav", "duet_residual.wav"]
    assert sorted(p.name for p in (desk / "out").iterdir()) == names
    total = sum(soundfile.read(desk / "out" / name)[0] for name in names)
    assert abs(np.std(total) - np.std(tone())) < 0.01

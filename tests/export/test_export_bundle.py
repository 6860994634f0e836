"""Bundles: what is in them, folder and tar, published schema, what may be replaced, the device's README."""

from __future__ import annotations

import ast
import base64
import copy
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import avsep
from avsep.errors import ConfigError, ExportError, UnknownNameError
from avsep.export import ExportPlan, export, export_run, open_bundle, verify_bundle
from avsep.export.bundle.device_readme import device_readme, trtexec_line
from avsep.export.bundle.manifest import check_manifest, schema_text
from avsep.export.bundle.packing import check_target, write_arrays, write_tar
from avsep.export.bundle.wheel import write_wheel
from avsep.export.runtime.manifest import MANIFEST
from support.bundles import write_sealed
from support.folders import contents
from support.tones import BUNDLE_CLASSES, TINY_FRONT_END, bundle_separator, tiny_learner

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------- what is in a bundle


def test_a_bundle_holds_what_it_says(tiny_bundle):
    manifest = manifest_of(tiny_bundle)
    names = {f.name for f in tiny_bundle.iterdir()}
    assert names == {
        "LICENSE",
        "README.md",
        "avsep_runtime-0.1.0-py3-none-any.whl",
        "build_engine.py",
        "manifest.json",
        "manifest.schema.json",
        "separator.golden.npz",
        "separator.onnx",
    }
    assert manifest["files"] == {name: sha256(tiny_bundle / name) for name in names - {MANIFEST}}
    assert manifest["classes"] == list(BUNDLE_CLASSES)
    assert manifest["independent_sources"] is True
    assert manifest["sample_rate_hz"] == TINY_FRONT_END["sample_rate_hz"]
    assert manifest["transform"]["clip_samples"] == manifest["chunking"]["clip_samples"] == 8191
    assert manifest["made_from"] == "a test"
    assert manifest["separator"]["front_end"]["hop"] == 64
    (graph,) = manifest["graphs"]
    assert graph["inputs"] == [
        {"name": "mixture", "dtype": "float32", "shape": [1, 8191]},
        {"name": "object_features", "dtype": "float32", "shape": [1, 2, 8]},
        {"name": "class_ids", "dtype": "int64", "shape": [1, 2]},
    ]
    assert graph["outputs"] == [{"name": "sources", "dtype": "float32", "shape": [1, 2, 8191]}]
    assert graph["parity"]["max_error"] < 1e-4
    assert graph["parity"]["provider"] == "CPUExecutionProvider"
    assert graph["operators"]["Conv"] > 0
    assert "MIT License" in (tiny_bundle / "LICENSE").read_text()
    assert (tiny_bundle / "manifest.schema.json").read_text() == schema_text()


def test_the_wheel_is_the_runtime_and_the_same_each_time(tiny_bundle, tmp_path, monkeypatch):
    from avsep.export import runtime

    licence = (tiny_bundle / "LICENSE").read_text()
    monkeypatch.setattr("time.time", lambda: 1e9)
    name = write_wheel(tmp_path, licence)
    assert (tmp_path / name).read_bytes() == (tiny_bundle / name).read_bytes()
    own = {f"avsep_runtime/{p.name}": p.read_bytes() for p in Path(runtime.__file__).parent.glob("*.py")}
    assert len(own) > 10
    info = f"avsep_runtime-{avsep.__version__}.dist-info"
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert archive.testzip() is None
        files = {n: archive.read(n) for n in archive.namelist()}
    assert {n: data for n, data in files.items() if n in own} == own
    record = [line.rsplit(",", 2) for line in files[f"{info}/RECORD"].decode().splitlines()]
    assert [n for n, _, _ in record] == list(files)
    for n, digest, size in record[:-1]:
        stated = base64.urlsafe_b64encode(hashlib.sha256(files[n]).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={stated}", len(files[n]))
    assert files[f"{info}/licenses/LICENSE"].decode() == licence


def test_the_runtime_imports_nothing_of_avsep():
    """Its imports are relative and stay inside it, or are NumPy, the standard library and libraries to infer."""
    from avsep.export import runtime

    for path in Path(runtime.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, path
                names = [] if node.level else [str(node.module)]
            roots = {name.split(".")[0] for name in names}
            assert roots <= {*sys.stdlib_module_names, "numpy", "onnxruntime", "openvino"}, path
    assert runtime.__version__ == avsep.__version__


def test_graphs_name_no_folder_of_the_machine_that_exported(tiny_bundle):
    here = str(Path(avsep.__file__).parents[1]).encode()
    site = str(Path(torch.__file__).parents[1]).encode()
    for file in tiny_bundle.glob("*.onnx"):
        written = file.read_bytes()
        assert here not in written
        assert site not in written


def test_golden_arrays_are_pytorchs(tiny_bundle):
    from avsep.types import VisualFeatures

    bundle = open_bundle(tiny_bundle)
    inputs, outputs = bundle.golden(bundle.graph())
    assert 0.01 < inputs["mixture"].std() < 0.5
    separator = bundle_separator()
    with torch.inference_mode():
        expected = separator.separate(
            torch.from_numpy(inputs["mixture"]),
            VisualFeatures(object=torch.from_numpy(inputs["object_features"])),
            torch.from_numpy(inputs["class_ids"]),
        )
    np.testing.assert_allclose(outputs["sources"], expected.numpy(), atol=1e-5)
    assert outputs["sources"].std() > 0.005
    assert np.abs(outputs["sources"][0, 0] - outputs["sources"][0, 1]).max() > 1e-3


def test_export_leaves_the_separator_as_it_was(quick, tmp_path, monkeypatch):
    import avsep.export.build.graphs

    write_graphs = avsep.export.build.graphs.write_graphs
    given = []

    def spoils(separator, *args):
        given.append(separator.training or any(p.requires_grad for p in separator.parameters()))
        for tensor in separator.state_dict().values():
            tensor.zero_()
        return write_graphs(separator, *args)

    monkeypatch.setattr(avsep.export.build.graphs, "write_graphs", spoils)
    separator = bundle_separator().train()
    before = {k: v.clone() for k, v in separator.state_dict().items()}
    bundle = export(separator, ExportPlan(), tmp_path / "b", weights_licence="CC-BY-4.0")
    assert given == [False]
    assert separator.training
    assert all(p.requires_grad for p in separator.mask_decoder.parameters())
    assert all(torch.equal(before[k], v) for k, v in separator.state_dict().items())
    assert bundle.manifest["weights_licence"] == "CC-BY-4.0"
    assert "CC-BY-4.0" in (tmp_path / "b" / "README.md").read_text()


def test_licences_of_published_weights_are_told(quick, tmp_path):
    from types import SimpleNamespace

    separator = bundle_separator()
    separator.object_encoder.hub = SimpleNamespace(licence="CC-BY-NC-4.0", repository="someone/eyes")
    export(separator, None, tmp_path / "b")
    told = "of what was trained: not stated; of the object encoder CC-BY-NC-4.0 (someone/eyes)"
    assert manifest_of(tmp_path / "b")["weights_licence"] == told
    assert told in (tmp_path / "b" / "README.md").read_text()
    export(separator, None, tmp_path / "b", weights_licence="MIT")
    assert manifest_of(tmp_path / "b")["weights_licence"].startswith("MIT; of the object encoder CC-BY-NC-4.0")


def test_source_date_epoch_sets_the_time(monkeypatch):
    from avsep.export.bundle.export import _now

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert _now() == "1970-01-02T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", _now())


# ---------------------------------------------------------------------- the schema


def test_the_published_schema_takes_the_manifest(tiny_bundle):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((tiny_bundle / "manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest_of(tiny_bundle), schema)


def places(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(manifest, rng):
    """The manifest with one random mutation: a value replaced, a key taken away or added, an item repeated."""
    result = copy.deepcopy(manifest)
    path = rng.choice([p for p in places(result) if p])
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent["surprise"] = rng.choice([1, "x", None, []])
    elif kind == 2 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[0]))
    else:
        parent[path[-1]] = rng.choice([None, True, 0, -1, 1.5, "", "x", [], {}, "a" * 64, 1 << 40, ["batch"]])
    return result


def test_the_models_and_the_published_schema_agree(tiny_bundle):
    """On a thousand manifests with one or two random mistakes each, which also show no other error than one line."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
    rng = random.Random(0)
    manifest = manifest_of(tiny_bundle)
    manifest["graphs"][0]["profiles"] = [{"mixture": {"min": [1], "opt": [1], "max": [2]}}]
    manifest["graphs"][0]["gate"] = {
        "mixtures": 4,
        "max_drift_db": {"sdr": 0.0, "sir": 0.01, "sar": 0.0},
        "limit_db": 0.1,
        "passed": True,
        "overridden": False,
        "on": "held-out",
    }
    manifest["graphs"][0]["quantised"] = {
        "layers": 3,
        "of": 12,
        "on": "validation",
        "mixtures": 4,
        "max_drift_db": {"sdr": 0.0, "sir": 0.01, "sar": 0.0},
    }
    refused = 0
    for _ in range(1000):
        damaged = changed(manifest, rng)
        if rng.random() < 0.3:
            damaged = changed(damaged, rng)
        mistake = ""
        try:
            check_manifest(damaged, "b")
        except ExportError as error:
            mistake = str(error)
            assert mistake.startswith("b is damaged: ")
            assert "\n" not in mistake
        assert (not mistake) == validator.is_valid(damaged), (mistake, list(validator.iter_errors(damaged)))
        refused += bool(mistake)
    assert 300 < refused < 1000


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
def test_only_a_whole_number_is_an_integer(tiny_bundle, value):
    """Of neither check: true is no 1, and 2.0 would be no index."""
    from avsep.export.runtime import manifest

    for check in (check_manifest, manifest.check_manifest):
        with pytest.raises(ExportError, match="sample_rate_hz"):
            check(manifest.sealed({**manifest_of(tiny_bundle), "sample_rate_hz": value}), "b")


@pytest.mark.parametrize("value", [0, "yes", None])
def test_whether_sources_are_independent_is_true_or_false(tiny_bundle, value):
    from avsep.export.runtime import manifest

    for check in (check_manifest, manifest.check_manifest):
        with pytest.raises(ExportError, match="independent_sources"):
            check(manifest.sealed({**manifest_of(tiny_bundle), "independent_sources": value}), "b")


def test_a_bundle_of_an_earlier_avsep_opens(tiny_bundle, tmp_path):
    """Without the wheel, the word on its sources, and the manifest's own hash."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "b")
    manifest = manifest_of(folder)
    (wheel,) = folder.glob("*.whl")
    wheel.unlink()
    del manifest["files"][wheel.name], manifest["independent_sources"], manifest["manifest_sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    verify_bundle(folder)


def test_the_manifests_hash_is_of_its_content(tiny_bundle):
    """Not of its layout; a few lines without avsep find it, as the bundle's README has them."""
    manifest = manifest_of(tiny_bundle)
    assert list(manifest)[-1] == "manifest_sha256"
    stated = manifest.pop("manifest_sha256")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == stated


def test_any_other_value_in_a_manifest_is_damage(tiny_bundle, tmp_path):
    """What no check could know of, too: notes, measurements, hashes."""
    from avsep.export.runtime import manifest

    whole, rng = manifest_of(tiny_bundle), random.Random(0)
    for _ in range(300):
        changed = copy.deepcopy(whole)
        place = changed
        key = rng.choice(list(place))
        while isinstance(place[key], (dict, list)) and place[key]:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place[key] = "other" if place[key] != "other" else "another"
        with pytest.raises(ExportError, match="damaged"):
            manifest.check_manifest(changed, "b")


# ---------------------------------------------------------------------- folder and tar


def test_a_tar_of_anything_else_is_not_replaced(tiny_bundle, tmp_path):
    """Nor one that Python's own reader of tars would stumble over."""
    target = tmp_path / "b.tar"
    write_tar(tiny_bundle, target)
    assert check_target(target) == target
    info, body = tarfile.TarInfo("x"), b"27 GNU.sparse.map=one,two\n"
    info.type, info.size = tarfile.XHDTYPE, len(body)
    extension = info.tobuf() + body.ljust(512, b"\0")
    for data in (b"", b"dear", extension + target.read_bytes(), extension * 3000, target.read_bytes()[512:]):
        target.write_bytes(data)
        with pytest.raises(ConfigError, match="not a bundle: choose another name"):
            check_target(target)


def test_a_tar_holds_the_same(tiny_bundle, tmp_path):
    write_tar(tiny_bundle, tmp_path / "b.tar")
    folder, tar = open_bundle(tiny_bundle), open_bundle(tmp_path / "b.tar")
    assert folder.manifest == tar.manifest
    assert folder.files == tar.files
    assert folder.megabytes == tar.megabytes
    assert all(folder.read(name) == tar.read(name) for name in folder.files)
    with tar:
        inner = tar.folder()
        assert {f.name for f in inner.iterdir()} == set(tar.files)
        assert (inner / "separator.onnx").read_bytes() == (tiny_bundle / "separator.onnx").read_bytes()
    assert not inner.exists()
    assert folder.folder() == tiny_bundle
    (graph,) = verify_bundle(tmp_path / "b.tar").graphs
    assert graph.max_error < 1e-4


def test_the_temporary_folder_goes_with_the_bundle(tiny_bundle, tmp_path):
    write_tar(tiny_bundle, tmp_path / "b.tar")
    bundle = open_bundle(tmp_path / "b.tar")
    folder = bundle.folder()
    assert folder.is_dir()
    del bundle
    assert not folder.exists()


def test_the_same_files_give_the_same_tar(tiny_bundle, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in sorted((f.name for f in tiny_bundle.iterdir()), reverse=True):  # another order, times and rights
        shutil.copyfile(tiny_bundle / name, other / name)
        os.utime(other / name, (1, 1))
        (other / name).chmod(0o600)
    write_tar(tiny_bundle, tmp_path / "a.tar")
    write_tar(other, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "r:") as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == [MANIFEST, *sorted(m.name for m in members[1:])]
    assert {(m.uid, m.gid, m.uname, m.mode, m.mtime) for m in members} == {(0, 0, "", 0o644, 315532800)}


def test_a_tar_made_by_hand_is_read_too(tiny_bundle, tmp_path):
    """`tar -cf b.tar -C bundle .` puts ./ before every name."""
    with tarfile.open(tmp_path / "b.tar", "w:") as archive:
        archive.add(tiny_bundle, arcname=".")
    assert open_bundle(tmp_path / "b.tar").files == open_bundle(tiny_bundle).files


def test_the_same_arrays_give_the_same_archive(tmp_path, monkeypatch):
    arrays = {"a": np.arange(3), "b": np.zeros((2, 2), np.float32)}
    write_arrays(tmp_path / "1.npz", arrays)
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2001, 1, 1, 0, 0, 0, 0, 1, 0))
    write_arrays(tmp_path / "2.npz", arrays)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    with np.load(tmp_path / "1.npz", allow_pickle=False) as archive:
        assert {k: (v.dtype, v.tolist()) for k, v in archive.items()} == {
            k: (v.dtype, v.tolist()) for k, v in arrays.items()
        }
    with pytest.raises(ValueError, match="allow_pickle"):
        write_arrays(tmp_path / "3.npz", {"o": np.array([{}], dtype=object)})


def test_engines_built_beside_a_bundle_are_not_in_its_way(tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_bundle, tmp_path / "b")
    (folder / "separator.plan").write_bytes(b"an engine")
    (folder / "engines").mkdir()
    (folder / "engines" / "one.plan").write_bytes(b"another")
    verify_bundle(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"):
        open_bundle(folder)


def test_golden_arrays_of_an_open_graph_may_be_as_large_as_its_profile_says(tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_bundle, tmp_path / "b")
    batch, rows = 100, {}
    inputs, outputs = open_bundle(tiny_bundle).golden(open_bundle(tiny_bundle).graph())
    many = {name: np.repeat(array, batch, axis=0) for name, array in {**inputs, **outputs}.items()}
    write_arrays(folder / "separator.golden.npz", many)
    manifest = manifest_of(folder)
    for tensor in (*manifest["graphs"][0]["inputs"], *manifest["graphs"][0]["outputs"]):
        rows[tensor["name"]] = tensor["shape"][1:]
        tensor["shape"] = ["batch", *rows[tensor["name"]]]
    profile = {n: {"min": [1, *rows[n]], "opt": [batch, *rows[n]], "max": [batch, *rows[n]]} for n in inputs}
    manifest["graphs"][0]["profiles"] = [profile]
    write_sealed(folder, manifest)
    bundle = open_bundle(folder)
    assert bundle.golden(bundle.graph())[1]["sources"].shape == (batch, 2, 8191)
    bundle.graph().entry["profiles"][0]["class_ids"]["opt"][0] = 1
    with pytest.raises(ExportError, match="unpacks to more"):
        bundle.golden(bundle.graph())


# ---------------------------------------------------------------------- what may be replaced


@pytest.fixture
def quick(tiny_bundle, monkeypatch):
    """Exports that take no time: the graph is the one of another export."""
    import avsep.export.build.graphs as graphs
    from avsep.export.build.gate import Gate

    ready = {}

    def write_graphs(separator, plan, folder, held_out, calibration, validation, progress):
        if progress is not None:
            progress("graphs written", 1, 1)
        if "made" not in ready:
            raise ExportError("the graph differs from PyTorch: nothing was written")
        shutil.copyfile(tiny_bundle / "separator.onnx", folder / "separator.onnx")
        return [ready["made"]]

    original = open_bundle(tiny_bundle)
    graph = original.graph()
    inputs, outputs = original.golden(graph)
    ready["made"] = graphs.GraphFile(
        file="separator.onnx",
        kind="separator",
        precision="fp32",
        inputs=tuple(graphs.TensorSpec(t.name, t.dtype, t.shape) for t in graph.inputs),
        outputs=tuple(graphs.TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in graph.outputs),
        profiles=[],
        opset=18,
        operators={"Conv": 1},
        golden={**inputs, **outputs},
        parity=graphs.Parity(0.0, -100.0, "CPUExecutionProvider", 0.1),
        tolerance=1e-3,
        gate=Gate(1, {"sdr": 0.0, "sir": 0.0, "sar": 0.0}, 0.1, on="synthetic"),
    )
    monkeypatch.setattr(graphs, "write_graphs", write_graphs)
    return ready


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", ["bundle", "bundle.tar"])
def test_an_older_bundle_is_replaced(name, quick, tmp_path):
    out = tmp_path / "deep" / name
    export(bundle_separator(), None, out, made_from="before")
    assert open_bundle(out).manifest["made_from"] == "before"
    export(bundle_separator(), None, out, made_from="after")
    assert open_bundle(out).manifest["made_from"] == "after"
    assert open_bundle(out).name == "bundle"
    assert [f.name for f in out.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["bundle", "bundle.tar"])
def test_an_export_that_fails_leaves_all_as_it_was(name, quick, tmp_path):
    export(bundle_separator(), None, tmp_path / "out" / name, made_from="before")
    before = tree(tmp_path)
    del quick["made"]
    for place in (tmp_path / "out" / name, tmp_path / "new" / "deep" / name):
        with pytest.raises(ExportError, match="differs"):
            export(bundle_separator(), None, place)
        assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (MemoryError(), ExportError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), ExportError),
        (RuntimeError("something else"), RuntimeError),
    ],
    ids=str,
)
def test_want_of_memory_is_told(raised, seen, quick, tmp_path, monkeypatch):
    import avsep.export.build.graphs

    def fails(*_):
        raise raised

    monkeypatch.setattr(avsep.export.build.graphs, "write_graphs", fails)
    with pytest.raises(seen, match="not enough memory" if seen is ExportError else "something else"):
        export(bundle_separator(), None, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_readers_refuse_is_never_written(quick, tmp_path):
    import dataclasses

    quick["made"] = dataclasses.replace(quick["made"], tolerance=-1.0)
    with pytest.raises(ExportError, match="tolerance"):
        export(bundle_separator(), None, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_a_stop_between_the_two_renames_loses_no_bundle(stop, quick, tmp_path, monkeypatch):
    """Where the system cannot exchange two folders."""
    out = tmp_path / "b"
    export(bundle_separator(), None, out, made_from="before")
    monkeypatch.setattr("avsep.export.bundle.packing.exchange", lambda *_: False)
    replace = os.replace

    def fails(source, target):
        if Path(target) == out and "old" not in str(source):
            raise stop
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(type(stop)):
        export(bundle_separator(), None, out, made_from="after")
    assert open_bundle(out).manifest["made_from"] == "before"
    assert [f.name for f in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("can", [True, False])
def test_an_older_bundle_stands_until_the_new_one_does(can, quick, tmp_path, monkeypatch):
    from avsep.export.bundle import packing
    from avsep.export.runtime.files import exchange

    out = tmp_path / "b"
    export(bundle_separator(), None, out, made_from="before")
    (tmp_path / "b.old").mkdir()  # somebody's own
    monkeypatch.setattr(packing, "exchange", exchange if can else lambda *_: False)
    moments = []
    for name in ("replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real: (real(*a), moments.append(out.exists()))[0])
    export(bundle_separator(), None, out, made_from="after")
    assert open_bundle(out).manifest["made_from"] == "after"
    if not can:
        assert moments.count(False) == 1
        assert sorted(f.name for f in tmp_path.iterdir()) == ["b", "b.old"]
    elif exchange(tmp_path / "b", tmp_path / "b.old"):
        assert all(moments)


def test_a_bundle_has_the_rights_of_any_new_folder(quick, tmp_path):
    tmp_path.chmod(0o777)  # a shared place, such as /tmp
    umask = os.umask(0o027)
    try:
        export(bundle_separator(), None, tmp_path / "b")
        export(bundle_separator(), None, tmp_path / "b.tar")
    finally:
        os.umask(umask)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "b").iterdir()} == {0o640}
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o640


def _file(path, content="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def _tar_of(path, name):
    _file(path.parent / "inner" / name)
    with tarfile.open(path, "w:") as archive:
        archive.add(path.parent / "inner" / name, arcname=name)


def _run_folder(path):
    _file(path / "run.yaml")
    (path / "tasks" / "00").mkdir(parents=True)


@pytest.mark.parametrize(
    ("prepare", "out", "told"),
    [
        (lambda d, b: _file(d / "x"), "x", "is a file"),
        (lambda d, b: _file(d / "x.tar"), "x.tar", "not a bundle"),
        (lambda d, b: _tar_of(d / "x.tar", "photo.jpg"), "x.tar", "not a bundle"),
        (lambda d, b: (d / "x.tar").mkdir(), "x.tar", "is a folder"),
        (lambda d, b: _file(d / "x" / "thesis.tex"), "x", "thesis.tex"),
        (lambda d, b: _file(d / "x" / "manifest.json", '{"format": "other"}'), "x", "not of a bundle"),
        (lambda d, b: _file(d / "x" / "manifest.json", "{"), "x", "not valid JSON"),
        (lambda d, b: (shutil.copytree(b, d / "x"), _file(d / "x" / "notes.txt")), "x", "notes.txt"),
        (lambda d, b: _run_folder(d / "x"), "x", "is a run"),
        (lambda d, b: _run_folder(d / "run"), "run/x", "inside the run"),
        (lambda d, b: _run_folder(d / "run"), "run/tasks/00/x.tar", "inside the run"),
        (lambda d, b: shutil.copytree(b, d / "b"), "b/x", "inside the bundle"),
        (lambda d, b: None, "x.tar.gz", "compressed"),
        (lambda d, b: None, "x.zip", "compressed"),
    ],
)
def test_nothing_else_is_replaced(prepare, out, told, quick, tiny_bundle, tmp_path):
    prepare(tmp_path, tiny_bundle)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        export(bundle_separator(), None, tmp_path / out)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_what_may_be_replaced(tiny_bundle, tmp_path):
    assert check_target(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    built = shutil.copytree(tiny_bundle, tmp_path / "built")
    (built / "separator.plan").write_bytes(b"an engine")
    check_target(built)
    # version 1: another layout, but a bundle
    old = tmp_path / "old"
    for name in ("separator.onnx", "golden.npz"):
        _file(old / name)
    _file(
        old / MANIFEST,
        json.dumps({"format": "avsep-bundle", "version": 1, "files": {"separator.onnx": "", "golden.npz": ""}}),
    )
    check_target(old)
    with pytest.raises(ExportError, match=r"version 1.*export it again"):
        open_bundle(old)


def test_a_link_to_a_bundle_is_followed(quick, tmp_path):
    export(bundle_separator(), None, tmp_path / "real", made_from="before")
    (tmp_path / "link").symlink_to("real")
    export(bundle_separator(), None, tmp_path / "link", made_from="after")
    assert open_bundle(tmp_path / "real").manifest["made_from"] == "after"
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "link").manifest["made_from"] == "after"


# ---------------------------------------------------------------------- verify


def test_verify_says_what_ran(tiny_bundle):
    result = verify_bundle(tiny_bundle)
    assert result.provider == "CPUExecutionProvider"
    (graph,) = result.graphs
    assert (graph.file, graph.kind, graph.precision, graph.tolerance) == ("separator.onnx", "separator", "fp32", 1e-3)
    assert 0 <= graph.max_error < 1e-4
    assert graph.error_db < -80
    assert graph.seconds > 0


def test_verify_runs_what_was_asked_for_or_refuses(tiny_bundle, monkeypatch):
    import onnxruntime

    with pytest.raises(UnknownNameError, match=r"'cpus': choose one of cpu, cuda"):
        verify_bundle(tiny_bundle, "cpus")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ExportError, match="no CUDAExecutionProvider"):
        verify_bundle(tiny_bundle, "cuda")
    # what onnxruntime-gpu does where no driver is: it lists CUDA, takes it, and runs on the CPU
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda data, options, **_: session(data, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(ExportError, match="runs CPUExecutionProvider instead of CUDAExecutionProvider"):
        verify_bundle(tiny_bundle, "cuda")


def test_verify_takes_another_tolerance(tiny_bundle):
    with pytest.raises(ExportError, match=r"separator\.onnx differs from its golden output"):
        verify_bundle(tiny_bundle, tolerance=1e-30)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="tolerance"):
            verify_bundle(tiny_bundle, tolerance=value)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("avsep.export", {"torch", "typer", "rich", "yaml", "soundfile", "onnx", "onnxscript"}),
        ("avsep.export.runtime", {"torch", "pydantic", "typer", "rich", "yaml", "soundfile", "onnx", "onnxscript"}),
    ],
)
def test_verify_needs_no_torch(tiny_bundle, module, absent):
    code = (
        "import sys\n"
        f"from {module} import verify_bundle\n"
        f"verify_bundle({str(tiny_bundle)!r})\n"
        f"assert not {absent!r} & set(sys.modules), {absent!r} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------- the device's README


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_readme_runs_on_the_device(tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_bundle, tmp_path / "b")
    text = (folder / "README.md").read_text()
    code = next(b for b in blocks(text, "python") if "get_providers" in b)
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    said = re.fullmatch(r"CPUExecutionProvider differs by (\S+) and may by 0.001\n", result.stdout)
    assert float(said[1]) < 1e-4

    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    check = next(b for b in blocks(text, "bash") if "sha256" in b).replace("python3", sys.executable)
    shown = subprocess.run(["bash", "-c", check], cwd=folder, capture_output=True, text=True, timeout=60).stdout
    assert "DAMAGED" not in shown
    assert shown.count("ok") == len(manifest_of(folder)["files"]) + 1
    (folder / "separator.onnx").write_bytes(b"cut")
    shown = subprocess.run(["bash", "-c", check], cwd=folder, capture_output=True, text=True, timeout=60).stdout
    assert "DAMAGED separator.onnx" in shown


def test_the_readme_has_the_bundles_facts(tiny_bundle):
    manifest = manifest_of(tiny_bundle)
    text = device_readme(manifest)
    assert "$" not in text
    for fact in (
        "11025 Hz",
        "8191 samples",
        "mixture float32 [1, 8191]",
        "- 2: cello",
        "a test",
        "'clip'",
        "on 4 synthetic mixtures",
    ):
        assert fact in text
    assert text == (tiny_bundle / "README.md").read_text()
    graph = copy.deepcopy(manifest["graphs"][0])
    graph["gate"] = {
        "mixtures": 3,
        "max_drift_db": {"sdr": 0.5, "sir": 0.25, "sar": 0.125},
        "limit_db": 0.1,
        "passed": False,
        "overridden": True,
        "on": "held-out",
    }
    told = device_readme({**manifest, "graphs": [graph], "classes": []})
    assert "0.500, 0.250, 0.125 dB" in told
    assert "let pass" in told
    assert "not named" in told


def test_trtexec_lines(tiny_bundle):
    graph = copy.deepcopy(manifest_of(tiny_bundle)["graphs"][0])
    ten, eleven, rtx = (trtexec_line(graph, v) for v in (10, 11, "rtx"))
    assert ten.startswith(
        "trtexec --onnx=separator.onnx --saveEngine=separator.plan --skipInference --stronglyTyped --noTF32 "
    )
    assert "--stronglyTyped" not in eleven + rtx
    for line in (ten, eleven, rtx):
        assert not re.search("--(fp16|int8|best|bf16)", line)
        assert "Shapes" not in line
    graph["profiles"] = [
        {
            "mixture": {"min": [1, 8191], "opt": [2, 8191], "max": [4, 8191]},
            "class_ids": {"min": [1, 1], "opt": [2, 2], "max": [4, 8]},
        }
    ]
    assert trtexec_line(graph, 11).endswith(
        "--minShapes=mixture:1x8191,class_ids:1x1 --optShapes=mixture:2x8191,class_ids:2x2 "
        "--maxShapes=mixture:4x8191,class_ids:4x8"
    )


# ---------------------------------------------------------------------- runs


def fake_run(folder, tasks=2):
    """A run folder as the learner leaves it; the last task is not finished."""
    from avsep.separator import save_separator

    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("stands in for a run's spec\n")
    for task in range(tasks + 1):
        home = folder / "tasks" / f"{task:02d}"
        save_separator(bundle_separator(), home / "separator")
        if task < tasks:
            (home / "task.json").write_text(json.dumps({"index": task}))
    return folder


def test_tasks_of_a_run(quick, tmp_path):
    run = fake_run(tmp_path / "run")
    labels = []
    bundles = export_run(run, tmp_path / "all", progress=lambda *at: labels.append(at))
    assert [b.path for b in bundles] == [tmp_path / "all" / "task-00", tmp_path / "all" / "task-01"]
    assert [b.manifest["made_from"] for b in bundles] == ["run, task 0", "run, task 1"]
    assert labels[-1][1:] == (2, 2)
    (tar,) = export_run(run, tmp_path / "one.tar", tasks=1)
    assert tar.is_tar
    assert tar.manifest["made_from"] == "run, task 1"
    tars = export_run(run, tmp_path / "tars", tasks=[1, 0, 1], tar=True)
    assert [b.path.name for b in tars] == ["task-01.tar", "task-00.tar"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--out", "b"], {"b": 1}),
        (["--out", "b.tar", "--task", "0"], {"b.tar": 0}),
        (["--out", "b", "--task", "1", "--task", "0"], {"b/task-00": 0, "b/task-01": 1}),
        (["--out", "b", "--all-tasks", "--tar"], {"b/task-00.tar": 0, "b/task-01.tar": 1}),
    ],
)
def test_tasks_on_the_command_line(options, names, quick, tmp_path, monkeypatch, capsys):
    from avsep.cli import main

    monkeypatch.chdir(tmp_path)
    fake_run(tmp_path / "run")
    for form, more in (("export", ()), ("export run", ("--overwrite",))):
        with pytest.raises(SystemExit) as stop:
            main([*form.split(), "run", *options, "--licence", "CC0-1.0", *more])
        assert stop.value.code == 0
        said = capsys.readouterr()
        assert "separator.on" in said.out  # a narrow terminal folds names
        assert all(f"{name} was gated on synthetic mixtures" in said.err for name in names)  # this run has no store
        assert "protocol.json" in said.err
        written = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:  # a second time
            main(["export", "run", *options])
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert any(f"{name} is a bundle already: --overwrite replaces it" in told for name in names)
        assert contents(tmp_path) == written
        assert {name: open_bundle(tmp_path / name).manifest["made_from"] for name in names} == {
            name: f"run, task {task}" for name, task in names.items()
        }
        assert all(open_bundle(tmp_path / name).manifest["weights_licence"] == "CC0-1.0" for name in names)


def test_every_choice_of_a_plan_has_an_option(tmp_path, monkeypatch, capsys):
    """But the seed of the golden inputs."""
    import dataclasses

    import avsep.export.bundle.export
    from avsep.cli import main

    asked = []

    def refuse(run, out, *, plan, **_):
        asked.append(plan)
        raise ExportError("enough")

    monkeypatch.setattr(avsep.export.bundle.export, "export_run", refuse)
    options = {
        "--batch": 3, "--sources": 4, "--length-s": 1.5, "--precision": "int8", "--motion-steps": 7,
        "--motion-frames": 9, "--frame-size": "24X32", "--opset": 19, "--tolerance": 0.25, "--calibration": 5,
        "--gate-db": 0.5, "--max-batch": 16, "--max-sources": 12, "--channels": 2, "--frames": 4,
    }  # fmt: skip
    flags = ["--dynamic", "--spectral", "--motion-mask", "--allow-drift", "--limit-mask-sum"]
    given = [str(word) for pair in options.items() for word in pair]
    for words in ([], [*given, *flags]):
        with pytest.raises(SystemExit):
            main(["export", str(fake_run(tmp_path / f"run{len(words)}")), "--out", str(tmp_path / "b"), *words])
    plain, full = (dataclasses.asdict(plan) for plan in asked)
    assert plain == dataclasses.asdict(ExportPlan())
    assert {name for name in plain if plain[name] == full[name]} == {"seed", "left_out", "by_name"}  # cards say two
    assert full["frame_size"] == (24, 32)
    assert (full["max_batch"], full["max_sources"], full["precision"]) == (16, 12, ("int8",))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sm", "86"], ["--sm 86", "--target tensorrt-rtx"]),
        (["--target", "tensort"], ["'tensort'", "tensorrt"]),
        (["--precision", "fp16"], ["protocol.json", "held-out"]),
        (["--precision", "int8"], ["protocol.json", "training mixtures"]),
        (["--precision", "int8", "--allow-drift"], ["protocol.json", "training mixtures"]),
        (["--max-batch", "4"], ["--max-batch 4", "--dynamic"]),
        (["--max-sources", "4"], ["--max-sources 4", "--dynamic"]),
        (["--calibration", "8", "--precision", "fp16"], ["--calibration 8", "--precision int8"]),
        (["--dynamic", "--sources", "9"], ["sources 9", "--max-sources 9"]),
        (["--frame-size", "240"], ["'240'", "240x320"]),
        (["--frame-size", "0x4"], ["frame_size", "[0, 4]"]),
        (["--frame-size", "8x8"], ["frame_size", "take frames", "leave it out"]),
        (["--motion-frames", "8"], ["motion_frames", "leave it out"]),
        (["--motion-mask"], ["motion_mask", "no motion encoder"]),
        (["--target", "tensorrt-rtx", "--sm", "86,abc"], ["'abc'", "86"]),
        (["--target", "tensorrt-rtx", "--sm", "sm_61"], ["SM 61"]),
    ],
)
def test_options_that_do_not_go_together(options, told, quick, tmp_path, capsys):
    from avsep.cli import main

    if "--sm" in options[1:]:
        pytest.importorskip("tensorrt_rtx")
    run = fake_run(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--out", str(tmp_path / "b"), *options])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert all(word in said for word in told), said
    assert tree(tmp_path) == before


def test_other_precisions_need_the_store(quick, tmp_path):
    from avsep.errors import DataError

    run = fake_run(tmp_path / "run")
    with pytest.raises(DataError, match="held-out"):
        export_run(run, tmp_path / "b", tasks=0, plan=ExportPlan(precision=("fp16",)))
    export_run(run, tmp_path / "b", tasks=0, plan=ExportPlan(precision=("fp16",), allow_drift=True))


@pytest.mark.parametrize(
    ("out", "kwargs", "told"),
    [
        ("new", {"tasks": 2}, r"task 2.*0, 1"),
        ("new", {"tasks": [0, 7]}, r"task 7.*0, 1"),
        ("new.tar", {}, "one tar"),
        ("new.TAR", {"tasks": [0, 1]}, "one tar"),
        ("new.tar.gz", {}, "compressed"),
        ("run/new", {"tasks": 0}, "inside the run"),
        ("run", {}, "inside the run"),
    ],
)
def test_tasks_that_cannot_be_exported(out, kwargs, told, quick, tmp_path):
    from avsep.errors import AvsepError

    run = fake_run(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(AvsepError, match=told):
        export_run(run, tmp_path / out, **kwargs)
    assert tree(tmp_path) == before


@pytest.mark.slow  # two exports of a run that goes on
def test_a_bundle_outlives_the_tasks_after_it(tone_store, tmp_path, monkeypatch):
    """Exported after task 1, it verifies and answers the same after tasks 2 and 3 were trained."""
    from avsep.data.tasks import task_stream
    from avsep.separator import load_separator
    from avsep.training.learner import ContinualLearner
    from avsep.types import VisualFeatures

    tasks = [["ding", "hum"], ["peep"], ["whirr"]]
    stream = task_stream(tone_store, tasks, clip_samples=TINY_FRONT_END["clip_samples"])
    run, bundles = tmp_path / "run", []
    finish = ContinualLearner._finish

    def export_after(self, ctx, *args):
        finish(self, ctx, *args)
        if ctx.task.index == 0:
            bundles.extend(export_run(run, tmp_path / "after-1.tar", tasks=0))

    monkeypatch.setattr(ContinualLearner, "_finish", export_after)
    tiny_learner(epochs=1, steps_per_epoch=1).fit(stream, run, progress=False)
    (bundle,) = bundles
    assert sorted(p.name for p in (run / "tasks").iterdir()) == ["00", "01", "02"]
    (graph,) = [g for g in verify_bundle(bundle.path).graphs if g.kind == "separator"]
    assert graph.max_error < 1e-3
    assert open_bundle(bundle.path).classes == ("ding", "hum")
    # and it is the network of task 1 that the run still has
    opened = open_bundle(bundle.path)
    inputs, outputs = opened.golden(opened.graph())
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    seen = {name: tensors[name] for name in ("seen", "motion_seen")}
    visual = VisualFeatures(object=tensors["object_features"], motion=tensors["motion_features"], **seen)
    with torch.inference_mode():
        now = load_separator(run, 0).eval().separate(tensors["mixture"], visual, tensors["class_ids"])
    np.testing.assert_allclose(outputs["sources"], now.numpy(), atol=1e-5)

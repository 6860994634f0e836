"""Graphs that take weights from other files are refused before anything that would read those is given them."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from avsep.errors import ExportError
from avsep.export.runtime.onnx_file import check_onnx
from avsep.export.runtime.sessions import start_onnx
from avsep.export.targets import tensorrt

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
h, FLOAT = onnx.helper, onnx.TensorProto.FLOAT


def inside(name: str = "w"):
    return onnx.numpy_helper.from_array(np.ones(4, np.float32), name)


def outside(name: str = "w"):
    """The same tensor, from a file beside the current folder."""
    tensor = onnx.TensorProto(name=name, data_type=FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def listed_only(name: str = "w"):
    """The list of where the data is, without the word that it is there."""
    tensor = outside(name)
    tensor.ClearField("data_location")
    return tensor


def values(name: str) -> list:
    return [h.make_tensor_value_info(name, FLOAT, [4])]


def graph(nodes, initializers=(), sparse=(), inputs="x", outputs="y"):
    given = values(inputs) if inputs else []
    return h.make_graph(nodes, "g", given, values(outputs), list(initializers), sparse_initializer=list(sparse))


def model(made, **more):
    opsets = [h.make_opsetid("", 18), *more.pop("opsets", ())]
    return h.make_model(made, opset_imports=opsets, ir_version=9, **more)


ADD = h.make_node("Add", ["x", "w"], ["y"])


def initializer(tensor):
    return model(graph([ADD], [tensor("w")]))


def constant(tensor):
    return model(graph([h.make_node("Constant", [], ["w"], value=tensor("w")), ADD]))


def nameless(tensor):
    return model(graph([ADD], [tensor("")]))


def sparse(part):
    def make(tensor):
        indices = onnx.numpy_helper.from_array(np.arange(4), "i")
        weights = tensor("w") if part == "values" else inside("w")
        if part == "indices":
            indices = tensor("i")
        return model(graph([ADD], sparse=[onnx.SparseTensorProto(values=weights, indices=indices, dims=[4])]))

    return make


def branch(depth):
    """Within the branches of an If, of an If, ..."""

    def make(tensor):
        inner = graph([h.make_node("Identity", ["w"], ["y"])], [tensor("w")], inputs="")
        for _ in range(depth):
            truth = h.make_node("Constant", [], ["t"], value=onnx.numpy_helper.from_array(np.array(True), "t"))
            choice = h.make_node("If", ["t"], ["y"], then_branch=inner, else_branch=inner)
            inner = graph([truth, choice], inputs="")
        return model(inner)

    return make


def attribute(**fields):
    def make(tensor):
        node = h.make_node("Thing", ["x"], ["y"])
        made = {
            "tensors": lambda: {"tensors": [inside(), tensor()]},
            "graphs": lambda: {"graphs": [graph([], [tensor()])]},
            "sparse": lambda: {"sparse_tensor": onnx.SparseTensorProto(values=tensor(), dims=[4])},
            "sparses": lambda: {"sparse_tensors": [onnx.SparseTensorProto(values=tensor(), dims=[4])]},
        }[fields["kind"]]()
        node.attribute.append(onnx.AttributeProto(name="a", **made))
        return model(graph([node]))

    return make


def function(default):
    def make(tensor):
        node = h.make_node("Constant", [], ["y"], value=inside() if default else tensor())
        made = h.make_function("mine", "Weights", [], ["y"], [node], [h.make_opsetid("", 18)])
        if default:
            made.attribute_proto.append(h.make_attribute("a", tensor()))
        call = h.make_node("Weights", [], ["y"], domain="mine")
        return model(graph([call]), functions=[made], opsets=[h.make_opsetid("mine", 1)])

    return make


def training(part):
    def make(tensor):
        made = model(graph([ADD], [inside()]))
        made.training_info.append(onnx.TrainingInfoProto(**{part: graph([], [tensor()])}))
        return made

    return make


PLACES = {
    "initialiser": initializer,
    "constant": constant,
    "nameless": nameless,
    "sparse values": sparse("values"),
    "sparse indices": sparse("indices"),
    "branch": branch(1),
    "branch of branches": branch(5),
    "list of tensors": attribute(kind="tensors"),
    "list of graphs": attribute(kind="graphs"),
    "sparse attribute": attribute(kind="sparse"),
    "list of sparse attributes": attribute(kind="sparses"),
    "function": function(False),
    "function's default": function(True),
    "training, start": training("initialization"),
    "training, step": training("algorithm"),
}


@pytest.mark.parametrize("place", PLACES)
def test_external_tensors_are_found_wherever_they_are(place: str, tmp_path: Path) -> None:
    make = PLACES[place]
    check_onnx(make(inside).SerializeToString())  # the same with its data inside is taken
    for tensor in (outside, listed_only):
        data = make(tensor).SerializeToString()
        (tmp_path / "graph.onnx").write_bytes(data)
        for given in (data, tmp_path / "graph.onnx"):
            with pytest.raises(ExportError, match="from another file, which no bundle may"):
                check_onnx(given)


def test_nothing_is_read_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights there ONNX Runtime itself would load it."""
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(np.ones(4, np.float32).tobytes())
    data = initializer(outside).SerializeToString()
    Path("graph.onnx").write_bytes(data)
    onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    start_onnx(initializer(inside).SerializeToString())
    for given in (data, tmp_path / "graph.onnx"):
        with pytest.raises(ExportError, match="the tensor 'w' from another file"):
            start_onnx(given)


def test_nor_at_export_nor_by_a_builder(tmp_path: Path) -> None:
    from avsep.export.build.onnx import check_graph

    (tmp_path / "weights.bin").write_bytes(np.ones(4, np.float32).tobytes())
    (tmp_path / "graph.onnx").write_bytes(initializer(outside).SerializeToString())
    with pytest.raises(ExportError, match="from another file"):
        check_graph(tmp_path / "graph.onnx", 18)
    with pytest.raises(ExportError, match="from another file"):
        tensorrt._parse(None, None, None, tmp_path / "graph.onnx")


def test_a_bundle_with_weights_elsewhere_is_refused(tiny_bundle: Path, tmp_path: Path, capfd) -> None:
    from avsep.export.runtime.verify import main
    from support.bundles import write_sealed

    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    made = onnx.load(str(bundle / "separator.onnx"))
    for one in made.graph.initializer:
        if len(one.raw_data) > 4096:
            onnx.external_data_helper.set_external_data(one, "weights.bin")
    # as a bundle's file with a hash, even
    onnx.save(made, str(bundle / "separator.onnx"))
    assert (bundle / "weights.bin").is_file()
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["weights.bin"] = ""
    write_sealed(bundle, manifest)
    assert main([str(bundle)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "separator.onnx takes the tensor" in line


def test_compiled_graphs_are_refused() -> None:
    node = h.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="engine.plan")
    with pytest.raises(ExportError, match="a compiled graph"):
        check_onnx(model(graph([node]), opsets=[h.make_opsetid("com.microsoft", 1)]).SerializeToString())
    with pytest.raises(ExportError, match="own format"):
        check_onnx(b"\x0a\x06\x00\x00ORTM" + initializer(inside).SerializeToString())


def test_damaged_graphs_are_told_and_end(tmp_path: Path) -> None:
    whole, rng, told = branch(3)(inside).SerializeToString(), random.Random(0), []
    cases = [whole[:length] for length in range(len(whole))] + [rng.randbytes(300) for _ in range(500)]
    for _ in range(2000):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        cases.append(bytes(data))
    cases += [b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x7f", b"\x3b\x3c\x42\x00", b"\x00" * 9, b"\x80" * 99]
    nested = b"\x42\x00"
    for _ in range(300):  # graphs in attributes of nodes
        for key in (b"\x32", b"\x2a", b"\x0a"):
            nested = key + _length(len(nested)) + nested
    cases.append(b"\x3a" + _length(len(nested)) + nested + b"\x42\x00")
    for data in cases:
        try:
            check_onnx(data, "g.onnx")
        except ExportError as error:
            told.append(str(error))
    assert len(told) > len(whole)
    assert any("nested too deeply" in line for line in told)
    assert not any("\n" in line for line in told)


def _length(size: int) -> bytes:
    return bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])


def test_a_large_graph_is_looked_through_quickly() -> None:
    weights = [onnx.numpy_helper.from_array(np.zeros(1 << 20, np.float32), f"w{i}") for i in range(16)]
    nodes = [h.make_node("Add", ["x", "x"], [f"y{i}"], name=f"n{i}") for i in range(3000)]
    data = model(graph(nodes, weights)).SerializeToString()
    started = time.perf_counter()
    check_onnx(data)
    assert time.perf_counter() - started < 1

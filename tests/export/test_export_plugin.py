"""The TensorRT plugin: what its kernel computes (in Triton's interpreter), its PTX, its graph, its definition."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from avsep.errors import ConfigError, ExportError
from avsep.export.build.graph import warp_matrices
from avsep.export.targets import plugin
from avsep.export.targets.plugin import export_plugin, interpolation_taps, plugin_graph, without_scratch
from avsep.spec import FrontEndSpec
from support.tones import TINY_FRONT_END

onnx = pytest.importorskip("onnx")
pytest.importorskip("triton")

ALIGNED = FrontEndSpec(**{**TINY_FRONT_END, "align_corners": True})
PUBLISHED = FrontEndSpec(**{**TINY_FRONT_END, "align_corners": False})


@pytest.mark.parametrize("front_end", [ALIGNED, PUBLISHED], ids=["aligned", "published"])
def test_the_kernel_is_the_graphs_mask_synthesis(front_end):
    """In the interpreter, against the matrices of the exported graph in float64; frames and bins fill no tile."""
    from avsep.export.targets.plugin_kernel import avsep_mask_spectrum as kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, unwarp, time = warp_matrices(front_end)
    bins, frames, rows = len(unwarp), front_end.frames, front_end.log_rows
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, rows, frames, generator=generator)
    spectrum = torch.randn(2, 2 * bins, frames, generator=generator)
    mask = torch.from_numpy(unwarp) @ torch.sigmoid(logits.double())  # [2, 3, bins, frames]
    if time is not None:
        mask = mask @ torch.from_numpy(time).T
    expected = torch.cat((mask, mask), 2) * spectrum.double()[:, None]
    taps = [*interpolation_taps(unwarp), *interpolation_taps(np.eye(frames) if time is None else time)]
    tensors = [torch.from_numpy(t).to(device) for t in taps]
    estimate = torch.full((2, 3, 2 * bins, frames), float("nan"), device=device)
    grid = (-(-frames // 32), -(-bins // 32), 6)
    constants = {"N": 3, "ROWS": rows, "BINS": bins, "TIME": time is not None, "KB": 32, "TT": 32}
    kernel[grid](logits.to(device), spectrum.to(device), *tensors, frames, estimate, **constants)
    torch.testing.assert_close(estimate.cpu().double(), expected, rtol=0, atol=2e-6)


def test_taps_refuse_a_matrix_that_is_no_interpolation():
    matrix = np.eye(4)
    matrix[2] = [0.5, 0, 0.5, 0]
    with pytest.raises(ConfigError, match="row 2"):
        interpolation_taps(matrix)
    low, shares = interpolation_taps(np.array([[0, 0.25, 0.75], [0, 0, 0.5], [0, 0, 0]]))
    assert low.tolist() == [1, 2, 0]
    assert shares.T.tolist() == [[0.25, 0.75], [0.5, 0], [0, 0]]


# ---------------------------------------------------------------- PTX

# In a process of its own: under the interpreter, which the tests run with, nothing is compiled.
COMPILE = """
import json, sys
from avsep.export.targets.plugin import export_plugin
from avsep.spec import FrontEndSpec
export_plugin(sys.argv[1], FrontEndSpec(**json.loads(sys.argv[2])), sys.argv[3], sm=[75, 87, 90])
"""


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("plugin") / "plugin"
    spec = json.loads((tiny_bundle / "manifest.json").read_text())["separator"]["front_end"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(tiny_bundle / "separator.onnx"), json.dumps(spec), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_ptx_is_what_a_jetsons_driver_takes(folder):
    manifest = json.loads((folder / "plugin.json").read_text())
    assert sorted(manifest["kernels"]) == ["7.5", "8.7", "9.0"]
    for capability, kernel in manifest["kernels"].items():
        ptx = (folder / kernel["file"]).read_text()
        assert ".version 8.5" in ptx
        assert f".target sm_{capability.replace('.', '')}" in ptx
        assert ptx.count(".entry") == 1
        head = ptx[ptx.index(".entry") : ptx.index(")", ptx.index(".entry"))]
        assert [line.split()[1] for line in head.splitlines() if ".param" in line] == [
            *[".u64"] * 6,
            ".u32",
            ".u64",
        ]  # six inputs, the frames, the output: no scratch
        assert f".reqntid {kernel['threads']}" in ptx
        assert ".extern .shared" not in ptx or kernel["shared_bytes"] > 0
        assert ".file" not in ptx  # it would name folders of the machine that made it
        assert "/" not in ptx.replace("//", "")
        assert kernel["entry"] == "avsep_mask_spectrum"


def test_ptx_still_assembles(folder, tmp_path):
    import triton

    assembler = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas"), None)
    if assembler is None:
        pytest.skip("this Triton ships no ptxas")
    for path, target in (("mask_spectrum.sm75.ptx", "sm_75"), ("mask_spectrum.sm87.ptx", "sm_87")):
        command = [str(assembler), f"-arch={target}", "-v", str(folder / path), "-o", str(tmp_path / "a.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores" in done.stderr


HEAD = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u32 f_param_1,\n\t.param .u64 f_param_2\n)\n{\n%s\n}"


def test_scratch_parameters_are_cut_only_where_nothing_reads_them():
    ptx, count = without_scratch(HEAD % "ld.param.b64 %rd1, [f_param_0];", "f", 2)
    assert count == 2
    assert "f_param_2" not in ptx
    assert "f_param_1\n)" in ptx
    with pytest.raises(ExportError, match="reads f_param_2"):
        without_scratch(HEAD % "ld.param.b64 %rd1, [f_param_2];", "f", 2)
    with pytest.raises(ExportError, match="no entry g"):
        without_scratch(HEAD % "", "g", 2)
    with pytest.raises(ExportError, match="takes 3 parameters, 4 are expected"):
        without_scratch(HEAD % "", "f", 4)


def test_an_architecture_that_is_not_compiled_for_is_refused():
    with pytest.raises(ConfigError, match="sm 120"):
        plugin.compile_kernel(ALIGNED, 2, 120)


# ---------------------------------------------------------------- graph and definition


def test_the_graph_with_the_node_separates_as_the_plain_one(tiny_bundle, folder):
    """The node is run as NumPy would, in the middle of the two halves of the graph."""
    ort = pytest.importorskip("onnxruntime")
    model = onnx.load(str(folder / "separator.plugin.onnx"))
    (node,) = [n for n in model.graph.node if n.domain == "avsep"]
    assert node.op_type == "mask_spectrum"
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"plugin_namespace": b"avsep", "plugin_version": b"1"}
    assert not [n for n in model.graph.node if n.op_type == "Sigmoid"]
    assert "unwarp" not in {i.name for i in model.graph.initializer}
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    shapes = {
        n.name: n
        for n in onnx.shape_inference.infer_shapes(onnx.load(str(tiny_bundle / "separator.onnx"))).graph.value_info
    }
    golden = dict(np.load(tiny_bundle / manifest["graphs"][0]["golden"]))
    output = golden.pop("sources")

    first = onnx.ModelProto()
    first.CopyFrom(model)
    _keep(first, [shapes[name] for name in node.input[:2]])
    logits, spectrum = ort.InferenceSession(first.SerializeToString()).run(None, golden)
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    low, share, t_low, t_share = (constants[name] for name in node.input[2:])
    estimate = _mask_spectrum(logits, spectrum, low, share, t_low, t_share)
    second = onnx.ModelProto()
    second.CopyFrom(model)
    second.graph.input.append(shapes[node.output[0]])
    _keep(second, list(second.graph.output), without=node.name)
    session = ort.InferenceSession(second.SerializeToString())
    (sources,) = session.run(
        None, {i.name: estimate if i.name == node.output[0] else golden[i.name] for i in session.get_inputs()}
    )
    np.testing.assert_allclose(sources, output, atol=1e-5)


def _keep(model, outputs, without="") -> None:
    """Cut a model down to what leads to the outputs."""
    graph = model.graph
    nodes = [n for n in graph.node if n.name != without]
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.ClearField("output")
    graph.output.extend(outputs)
    plugin._prune(graph)
    used = {name for n in graph.node for name in n.input}
    inputs = [i for i in graph.input if i.name in used]
    graph.ClearField("input")
    graph.input.extend(inputs)
    del model.opset_import[1:]


def _mask_spectrum(logits, spectrum, low, share, t_low, t_share):
    mask = 1 / (1 + np.exp(-logits.astype(np.float64)))
    mask = np.pad(mask, ((0, 0), (0, 0), (0, 1), (0, 1)))
    rows = mask[:, :, low] * share[0][:, None] + mask[:, :, low + 1] * share[1][:, None]
    both = rows[..., t_low] * t_share[0] + rows[..., t_low + 1] * t_share[1]
    return (np.concatenate((both, both), 2) * spectrum[:, None]).astype(np.float32)


def test_a_graph_without_mask_synthesis_is_refused():
    h, float32 = onnx.helper, onnx.TensorProto.FLOAT
    values = [h.make_tensor_value_info(n, float32, [1, 2]) for n in ("x", "y")]
    model = h.make_model(h.make_graph([h.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:]))
    with pytest.raises(ExportError, match="no masks times spectrum"):
        plugin_graph(model, ALIGNED)


def test_what_is_in_the_way_is_not_replaced(tiny_bundle, tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        export_plugin(tiny_bundle / "separator.onnx", ALIGNED, tmp_path / "here")


def loaded(folder, version="10.9.0"):
    """The definition, registered with a stand-in of tensorrt.plugin."""
    registered = {}

    def decorator(kind):
        def take(plugin_id):
            def keep(function):
                registered[kind] = plugin_id, function
                return function

            return keep

        return take

    trtp = types.ModuleType("tensorrt.plugin")
    trtp.TensorDesc = type("TensorDesc", (), {})
    trtp.register, trtp.autotune, trtp.aot_impl = map(decorator, ("register", "autotune", "aot_impl"))
    trtp.AutoTuneCombination = lambda *a: a
    trtp.KernelLaunchParams = types.SimpleNamespace
    trtp.cdiv = lambda a, b: -(-a // b)
    trtp.SymInt32 = lambda value: ("i32", value)
    trtp.SymIntExprs = type("SymIntExprs", (list,), {"__init__": lambda self, count: self.extend([None] * count)})
    trt = types.ModuleType("tensorrt")
    trt.__version__, trt.plugin = version, trtp
    before = {name: sys.modules.get(name) for name in ("tensorrt", "tensorrt.plugin")}
    sys.modules.update({"tensorrt": trt, "tensorrt.plugin": trtp})
    try:
        spec = importlib.util.spec_from_file_location("avsep_plugin", folder / "avsep_plugin.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old
    return module, registered


def test_the_definition_launches_the_kernel_as_it_was_compiled(folder):
    module, registered = loaded(folder)
    assert {plugin_id for plugin_id, _ in registered.values()} == {"avsep::mask_spectrum"}
    manifest = json.loads((folder / "plugin.json").read_text())
    logits = types.SimpleNamespace(shape_expr=[1, 2, 128, 130])
    aot = registered["aot_impl"][1]
    with pytest.raises(RuntimeError, match=r"compute_capability is ''.*one of 7\.5, 8\.7, 9\.0"):
        aot(logits, None, None, None, None, None, None, 0)
    module.compute_capability = "8.7"
    entry, ptx, launch, scalars = aot(logits, None, None, None, None, None, None, 0)
    assert entry == "avsep_mask_spectrum"
    assert hashlib.sha256(ptx).hexdigest() == manifest["files"]["mask_spectrum.sm87.ptx"]
    assert vars(launch) == {"grid_x": 5, "grid_y": 4, "grid_z": 2, "block_x": 128, "shared_mem": 0}
    assert scalars == [("i32", 130)]
    # TensorRT refuses functions whose arguments or result are otherwise (tensorrt.plugin, _validate.py, 10.16 and 11.4)
    inputs = ["logits", "spectrum", "row_low", "row_share", "time_low", "time_share"]
    assert list(inspect.signature(registered["register"][1]).parameters) == inputs
    assert list(inspect.signature(registered["autotune"][1]).parameters) == [*inputs, "outputs"]
    assert list(inspect.signature(aot).parameters) == [*inputs, "outputs", "tactic"]
    result = typing.get_args(inspect.signature(aot).return_annotation)
    assert [t.__name__ for t in result] == ["str", "bytes", "SimpleNamespace", "SymIntExprs"]
    assert all(
        p.annotation.__name__ == "TensorDesc" for p in inspect.signature(registered["register"][1]).parameters.values()
    )
    types_of = registered["autotune"][1](*[None] * 7)[0][0].split(", ")
    assert len(types_of) == 7  # six inputs and the output


@pytest.mark.parametrize("version", ["10.3.0", "10.8.1", "10.14.1"])
def test_the_definition_refuses_a_tensorrt_that_has_no_such_plugins(folder, version):
    with pytest.raises(RuntimeError, match=rf"TensorRT {version} takes no plugins"):
        loaded(folder, version)


def test_a_changed_ptx_is_not_handed_over(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "plugin")
    path = copy / "mask_spectrum.sm87.ptx"
    path.write_text(path.read_text() + "\n")
    module, registered = loaded(copy)
    module.compute_capability = "8.7"
    with pytest.raises(RuntimeError, match="not the file that was exported"):
        registered["aot_impl"][1](types.SimpleNamespace(shape_expr=[1, 2, 128, 130]), *[None] * 6, 0)


def test_on_the_command_line(tiny_bundle, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def run(*arguments):
        command = [sys.executable, "-m", "avsep", "export", "plugin", str(tiny_bundle), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)

    made = run("--out", str(tmp_path / "made"), "--sm", "80,sm_87")
    assert made.returncode == 0, made.stderr
    assert {p.name for p in (tmp_path / "made").iterdir()} == {
        "avsep_plugin.py",
        "mask_spectrum.sm80.ptx",
        "mask_spectrum.sm87.ptx",
        "plugin.json",
        "separator.plugin.onnx",
    }
    for wrong, said in (("120", "choose from 75, 80"), ("ampere", "'ampere' is no compute capability")):
        refused = run("--out", str(tmp_path / "not"), "--sm", wrong)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert said in refused.stderr
    assert not (tmp_path / "not").exists()

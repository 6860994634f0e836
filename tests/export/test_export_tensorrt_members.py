"""The contract with TensorRT: every member that the code touches is in the 10.3, 10.16 and 11.4 bindings.

The table and where it comes from: ``tensorrt_members.json``. The code is read, not run, so that no branch is missed;
which class a variable holds is told by its name, and the strict stand-ins of ``fake_tensorrt`` catch what names miss.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

from avsep.export.runtime import engines
from avsep.export.runtime.reader import open_bundle
from avsep.export.targets import tensorrt
from support import fake_tensorrt
from support.tensorrt_bundles import ORIN, FakeCuda, made_bundle

VERSIONS = ("10.3", "10.16", "11.4")
FILES = [Path(module.__file__) for module in (tensorrt, engines)]

# variable -> class of TensorRT that it holds. "" is the module itself.
VARIABLES = {
    "tensorrt.py": {
        "trt": "",
        "module": "",
        "builder": "Builder",
        "network": "INetworkDefinition",
        "tensor": "ITensor",
        "parser": "OnnxParser",
        "fault": "ParserError",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "cache": "ITimingCache",
    },
    "engines.py": {
        "trt": "",
        "module": "",
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "context": "IExecutionContext",
    },
}


def touched(path: Path) -> dict[tuple[str, str], str]:
    """(class, member) -> the function that touches it. A class itself is (module = "", class)."""
    variables = VARIABLES[path.name]
    found: dict[tuple[str, str], str] = {}

    def holder(node: ast.expr) -> str | None:
        """The class that an expression gives: "" the module, None anything else."""
        if isinstance(node, ast.Name):
            return variables.get(node.id)
        if isinstance(node, ast.Attribute) and (outer := holder(node.value)) is not None:
            name = f"{outer}.{node.attr}".lstrip(".")
            return name if name in fake_tensorrt.TABLE["classes"] else None
        return None

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        pairs = []
        if isinstance(node, ast.Attribute):
            pairs.append((node.value, node.attr))
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in ("getattr", "hasattr", "setattr"):
            name = node.args[1]  # type: ignore[attr-defined]
            if isinstance(name, ast.Constant):
                pairs.append((node.args[0], str(name.value)))  # type: ignore[attr-defined]
        for value, member in pairs:
            owner = holder(value)
            if owner is not None and not member.startswith("__"):
                found.setdefault((owner, member), function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def has(version: str, owner: str, member: str) -> bool:
    known = fake_tensorrt.members(version)
    return member in known if owner == "" else member in known.get(owner, set())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_member_is_in_every_version(path):
    uses = touched(path)
    assert len(uses) > 15
    for (owner, member), function in uses.items():
        if function.endswith("_rtx"):
            assert has("rtx", owner, member), f"{path.name}: {function} uses {owner}.{member}, which RTX 1.7.1 lacks"
            continue
        for version in (*VERSIONS, "rtx"):
            assert has(version, owner, member), f"{path.name}: {function} uses {owner}.{member}, not in {version}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_that_11_removed_is_named(path):
    """Whatever variable it may be called on, and in strings too."""
    kept = {m for names in fake_tensorrt.members("11.4").values() for m in names}
    old = {m for version in ("10.3", "10.16") for names in fake_tensorrt.members(version).values() for m in names}
    removed = old - kept
    assert {"platform_has_fast_fp16", "FP16", "int8_calibrator", "EXPLICIT_BATCH", "device_memory_size"} <= removed
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    named |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not named & removed


def test_the_walk_finds_what_the_contract_needs():
    """A member that does not exist, in each form that a use can take."""
    found = touched(FILES[0]) | touched(FILES[1])
    for use in [
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "progress_monitor"),
        ("BuilderFlag", "TF32"),
        ("ILogger.Severity", "ERROR"),
        ("", "IProgressMonitor"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("ParserError", "desc"),
    ]:
        assert use in found
    assert found[("IBuilderConfig", "set_compute_capability")].endswith("_rtx")
    assert not has("10.16", "IBuilderConfig", "set_compute_capability")


def test_table_is_what_tensorrt_rtx_has():
    """The one library that is here: the table's column against the module."""
    trt = pytest.importorskip("tensorrt_rtx")
    if trt.__version__ != fake_tensorrt.TABLE["versions"]["rtx"]:
        pytest.skip(f"tensorrt_rtx {trt.__version__} is not the one that the table is of")
    for name, expected in fake_tensorrt.members("rtx").items():
        value = trt
        for part in name.split("."):
            value = getattr(value, part)
        assert {m for m in dir(value) if not m.startswith("_")} == expected, name
    assert int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == fake_tensorrt.TABLE["strongly_typed"]["rtx"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_members_are_in_whatever_tensorrt_rtx_is_installed(path):
    trt = pytest.importorskip("tensorrt_rtx")
    for owner, member in touched(path):
        value = trt
        for part in [*owner.split("."), member]:
            if part:
                value = getattr(value, part)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_whole_sequence_on_a_strict_stand_in(version, tmp_path, monkeypatch):
    """Build with open and fixed shapes, check, find, load and run; the stand-in raises on any member it has not."""
    fake = fake_tensorrt.make(version)
    run_sequence(fake, tmp_path, monkeypatch)
    walked = set(touched(FILES[0])) | set(touched(FILES[1]))
    # own names of the logger and monitor aside, the walk missed nothing that ran
    assert {(o, m) for o, m in fake.touched if o not in ("ILogger", "IProgressMonitor")} <= walked


@pytest.mark.parametrize("version", VERSIONS)
def test_stand_ins_are_strict(version):
    fake = fake_tensorrt.make(version)
    config = fake.IBuilderConfig()
    with pytest.raises(AttributeError):
        config.set_compute_capability(86, 0)
    with pytest.raises(AttributeError):
        config.num_compute_capabilities = 1
    with pytest.raises(AttributeError):
        fake.BuilderFlag.NO_SUCH_FLAG  # noqa: B018
    assert hasattr(fake.BuilderFlag, "FP16") is (version != "11.4")


def run_sequence(fake, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(engines, "find_gpu", lambda: (ORIN, ""))
    monkeypatch.setattr(engines, "Cuda", FakeCuda)
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"], "open.onnx": [[-1, 3], "open"]})
    first = tensorrt.build_bundle(bundle, target="tensorrt", progress=False)
    assert [b.new for b in first] == [True, True]
    fixed, opened = fake.built
    assert fixed["tf32"] is opened["tf32"] is False
    assert fixed["workspace"] == tensorrt.DEFAULT_WORKSPACE_MIB << 20
    assert fixed["profiles"] == []
    assert opened["profiles"] == [{"mixture": [(1, 3), (2, 3), (4, 3)]}]
    assert (fixed["cache"], opened["cache"]) == ("", "+")  # the second build has the times of the first
    assert [b.new for b in tensorrt.build_bundle(bundle, target="tensorrt", progress=False)] == [False, False]
    opened = open_bundle(bundle)
    for graph, rows in zip(opened.graphs, (2, 4), strict=True):
        with engines.open_engine(opened, graph, "tensorrt") as running:
            mixture = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
            ids = np.zeros((1, 2), dtype=np.int64)
            result = running.run({"mixture": mixture, "class_ids": ids})
            np.testing.assert_array_equal(result["sources"], 2 * mixture)

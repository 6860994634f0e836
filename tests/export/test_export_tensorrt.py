"""Building engines, for real with TensorRT-RTX, which needs no GPU; refusals, engines made elsewhere, Ctrl-C."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from avsep.errors import ExportError
from avsep.export.runtime import engines
from avsep.export.runtime.cuda import Cuda, Gpu
from avsep.export.runtime.engines import EngineMismatch
from avsep.export.runtime.files import is_staging, sha256_file
from avsep.export.runtime.reader import open_bundle
from avsep.export.targets import tensorrt
from avsep.export.targets.tensorrt import BuildCancelled
from support import fake_tensorrt
from support.tensorrt_bundles import ORIN, PROFILE, FakeCuda, made_bundle, write_manifest

RTX_3060 = Gpu("NVIDIA GeForce RTX 3060", "8.6", 12288, "13.0")


@pytest.fixture
def jetson(monkeypatch):
    """TensorRT 10.3 on an Orin, as far as the stand-ins go."""
    fake = fake_tensorrt.make("10.3")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(engines, "find_gpu", lambda: (ORIN, ""))
    monkeypatch.setattr(engines, "Cuda", FakeCuda)
    return fake


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def own_bundle(tmp_path_factory):
    """A bundle with a graph that TensorRT-RTX builds in a tenth of a second."""
    onnx = pytest.importorskip("onnx")
    h, float32 = onnx.helper, onnx.TensorProto.FLOAT
    folder = tmp_path_factory.mktemp("small") / "bundle"
    folder.mkdir()
    graph = h.make_graph(
        [h.make_node("Conv", ["mixture", "w"], ["c"], name="filter"), h.make_node("Relu", ["c"], ["sources"])],
        "small",
        [h.make_tensor_value_info("mixture", float32, [1, 2, 16, 16])],
        [h.make_tensor_value_info("sources", float32, [1, 4, 14, 14])],
        [h.make_tensor("w", float32, [4, 2, 3, 3], np.linspace(-1, 1, 72).tolist())],
    )
    save_graph(graph, folder / "separator.onnx")
    write_manifest(folder, {"separator.onnx": []})
    return folder


@pytest.fixture
def small_graph(own_bundle):
    return own_bundle / "separator.onnx"


@pytest.fixture
def copied_bundle(tiny_bundle, tmp_path):
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    """A real separator's bundle in half precision: TensorRT-RTX has no fp32 matrix product for Turing (SM 75)."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.export import ExportPlan, export
    from support.tones import bundle_separator

    return export(bundle_separator(), ExportPlan(precision=("fp16",)), tmp_path_factory.mktemp("half") / "bundle").path


def files_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def find_engine(bundle: Path, file: str = "separator.onnx") -> engines.EngineFile:
    opened = open_bundle(bundle, hashes=False)
    return engines.find_engine(opened, next(graph for graph in opened.graphs if graph.file == file))


def one_line(error) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- real builds


def test_a_bundle_builds_for_five_gpus(rtx, half_bundle):
    """The bundle's own script, as a program, on a machine without a GPU."""
    command = [sys.executable, str(half_bundle / "build_engine.py"), "--target", "tensorrt-rtx"]
    done = subprocess.run(
        [*command, "--sm", "75", "80", "86", "89", "120"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    names = [f"separator.fp16.tensorrt-rtx-sm{sm}.plan" for sm in (75, 80, 86, 89, 120)]
    assert files_of(half_bundle / "engines") == sorted([*names, *(f"{n}.json" for n in names)])
    for name, capability in zip(names, ("7.5", "8.0", "8.6", "8.9", "12.0"), strict=True):
        plan = half_bundle / "engines" / name
        sidecar = json.loads((half_bundle / "engines" / f"{name}.json").read_text())
        assert sidecar["key"]["compute_capability"] == capability
        assert sidecar["plan_bytes"] == plan.stat().st_size > 10_000
        assert engines.plan_version(plan.read_bytes()[:28]) == ("tensorrt-rtx", (1, 7, 1))
    open_bundle(half_bundle)  # engines are no foreign files in it
    again = subprocess.run([*command, "--sm", "86"], capture_output=True, text=True, timeout=60, check=False)
    assert "is good for separator.fp16.onnx on sm86" in again.stdout
    checked = subprocess.run(
        [*command, "--check", "--sm", "86"], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0
    assert "takes it" in checked.stdout
    assert "sm86.plan: good" in checked.stdout


def test_what_cannot_be_built_for_turing_keeps_nothing_else_from_it(rtx, copied_bundle):
    told = []
    with pytest.raises(ExportError) as error:
        tensorrt.build_bundle(copied_bundle, target="tensorrt-rtx", sm=[75, 86], progress=False, tell=told.append)
    assert "separator.onnx for sm75" in one_line(error)
    assert "FP32 GEMM is not supported" in str(error.value)
    assert "half precision (*.fp16.onnx)" in str(error.value)
    assert files_of(copied_bundle / "engines") == [
        "separator.tensorrt-rtx-sm86.plan",
        "separator.tensorrt-rtx-sm86.plan.json",
    ]


def test_open_shapes_build_with_their_profile(rtx, tmp_path):
    graph = open_graph(tmp_path)
    profile = [{"x": {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}}]
    sidecar = tensorrt.build(graph, tmp_path / "a.plan", compute_capability=86, profiles=profile, progress=False)
    assert sidecar["key"]["profiles"] == profile
    assert sidecar["tf32"] is False


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([], "open shapes (x)"),
        ([{}], "lacks the input 'x'"),
        ([{"y": {"min": [1], "opt": [1], "max": [1]}}], "input 'y'"),
        ([{"x": {"min": [1, 4], "opt": [2, 4], "max": [8, 5]}}], "other sizes"),
        ([{"x": {"min": [3, 4], "opt": [2, 4], "max": [8, 4]}}], "out of order"),
        ([{"x": {"min": [0, 4], "opt": [2, 4], "max": [8, 4]}}], "out of order"),
        ([{"x": {"min": [1], "opt": [2], "max": [8]}}], "number of dimensions"),
        ([{"x": {"min": [1, 4]}}], "damaged"),
    ],
)
def test_wrong_profiles_are_refused(rtx, tmp_path, profiles, words):
    with pytest.raises(ExportError) as error:
        tensorrt.build(
            open_graph(tmp_path), tmp_path / "a.plan", compute_capability=86, profiles=profiles, progress=False
        )
    assert words in one_line(error)
    assert files_of(tmp_path) == ["open.onnx"]


def open_graph(folder: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    h, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = h.make_graph(
        [h.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "open",
        [h.make_tensor_value_info("x", float32, ["batch", 4])],
        [h.make_tensor_value_info("y", float32, ["batch", 3])],
        [h.make_tensor("w", float32, [4, 3], [1.0] * 12)],
    )
    return save_graph(graph, folder / "open.onnx")


def save_graph(graph, path: Path, domains=()) -> Path:
    import onnx

    opsets = [onnx.helper.make_opsetid("", 18), *(onnx.helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


def test_every_error_of_the_parser_is_in_the_line(rtx, tmp_path):
    onnx = pytest.importorskip("onnx")
    h, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = h.make_graph(
        [
            h.make_node("Det", ["x"], ["d"], name="first_wrong"),
            h.make_node("Nonsense", ["d"], ["y"], name="second_wrong", domain="nowhere"),
        ],
        "wrong",
        [h.make_tensor_value_info("x", float32, [2, 3, 3])],
        [h.make_tensor_value_info("y", float32, [2])],
    )
    path = save_graph(graph, tmp_path / "wrong.onnx", ["nowhere"])
    with pytest.raises(ExportError) as error:
        tensorrt.build(path, tmp_path / "a.plan", compute_capability=86, progress=False)
    line = one_line(error)
    assert "Det 'first_wrong': not supported" in line
    assert "Nonsense 'second_wrong'" in line
    assert files_of(tmp_path) == ["wrong.onnx"]


@pytest.mark.parametrize("content", ["truncated", "cut in a number", "empty", "text", "noise", "other message"])
def test_files_that_are_no_graph_are_refused(rtx, tmp_path, small_graph, content):
    """TensorRT-RTX's parser calls an empty file, and some texts, a success: none of these gets to it."""
    whole = small_graph.read_bytes()
    path = tmp_path / "broken.onnx"
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "cut in a number": whole + b"\x80",
            "empty": b"",
            "text": b"hello\n",
            "noise": np.random.default_rng(0).bytes(4096),
            "other message": b"\x0a\x02hi",
        }[content]
    )
    with pytest.raises(ExportError) as error:
        tensorrt.build(path, tmp_path / "out" / "a.plan", compute_capability=86, progress=False)
    assert "broken.onnx is not an ONNX graph" in one_line(error)
    assert files_of(tmp_path) == ["broken.onnx"]


@pytest.mark.parametrize(
    ("capability", "words"),
    [(87, "Orin: build there"), (90, "75, 80, 86, 89, 120"), ("13.7", "SM 137"), ("x", "no compute capability")],
)
def test_gpus_that_rtx_has_not_are_refused_with_the_list(rtx, tmp_path, small_graph, capability, words):
    with pytest.raises(ExportError) as error:
        tensorrt.build(small_graph, tmp_path / "a.plan", compute_capability=capability)
    assert words in one_line(error)


def test_all_is_refused_before_the_first_engine_is_built(rtx, own_bundle):
    with pytest.raises(ExportError):
        tensorrt.build_bundle(own_bundle, target="tensorrt-rtx", sm=[86, 87], progress=False)
    assert not (own_bundle / "engines").exists()


def test_progress_is_told_and_only_grows(rtx, tmp_path, small_graph):
    seen = []
    tensorrt.build(
        small_graph,
        tmp_path / "a.plan",
        compute_capability=86,
        progress=lambda phase, share: seen.append((phase, share)),
    )
    shares = [share for _, share in seen]
    assert len({phase for phase, _ in seen}) > 2
    assert len(set(shares)) > 10
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert 0.8 < shares[-1] <= 1.0


def test_ctrl_c_cancels_and_leaves_nothing(rtx, tmp_path, small_graph):
    before = signal.getsignal(signal.SIGINT)
    sent, after = [], []

    def interrupt(phase, share):
        if sent:
            after.append(phase)
        elif share > 0.2:
            sent.append(share)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    with pytest.raises(BuildCancelled) as error:
        tensorrt.build(small_graph, tmp_path / "out" / "a.plan", compute_capability=86, progress=interrupt)
    assert "nothing was written" in one_line(error)
    assert len(after) < 5  # TensorRT stopped; it was not waited for to the end
    assert files_of(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_in_the_progress_stops_the_build_and_comes_out(rtx, tmp_path, small_graph):
    def broken(phase, share):
        raise ValueError("the pipe is closed")

    with pytest.raises(ValueError, match="the pipe is closed"):
        tensorrt.build(small_graph, tmp_path / "out" / "a.plan", compute_capability=86, progress=broken)
    assert files_of(tmp_path) == []


def test_builds_outside_the_main_thread(rtx, tmp_path, small_graph):
    def work():
        tensorrt.build(small_graph, tmp_path / "a.plan", compute_capability=86, progress=False)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (tmp_path / "a.plan.json").is_file()


KILLED = """
import os, sys
from avsep.export.targets import tensorrt
at = sys.argv[3]
def kill(*_): os.kill(os.getpid(), 9)
if at == "write":
    os.replace = kill
tensorrt.build(sys.argv[1], sys.argv[2], compute_capability=86, progress=kill if at == "build" else False)
"""


@pytest.mark.parametrize("at", ["build", "write"])
def test_a_killed_build_leaves_no_engine(rtx, tmp_path, small_graph, at):
    plan = tmp_path / "a.plan"
    graph = small_graph
    done = subprocess.run([sys.executable, "-c", KILLED, str(graph), str(plan), at], timeout=60, check=False)
    assert done.returncode == -9
    left = files_of(tmp_path)
    assert not plan.exists()
    assert all(is_staging(name) for name in left)
    assert bool(left) is (at == "write")
    tensorrt.build(graph, plan, compute_capability=86, progress=False)
    assert files_of(tmp_path) == ["a.plan", "a.plan.json"]  # and what the killed one left is gone


# ---------------------------------------------------------------- engines on disk


@pytest.fixture
def built_for_3060(rtx, own_bundle, monkeypatch):
    """An engine that was built ahead of time, and the machine that it is for."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    tensorrt.build_bundle(own_bundle, target="tensorrt-rtx", sm=[86], progress=False)
    monkeypatch.setattr(engines, "find_gpu", lambda: (RTX_3060, ""))
    return own_bundle


def plan_of(bundle: Path) -> Path:
    return bundle / "engines" / "separator.tensorrt-rtx-sm86.plan"


def change_sidecar(bundle: Path, **changes) -> None:
    side = plan_of(bundle).with_name(plan_of(bundle).name + ".json")
    sidecar = json.loads(side.read_text())
    for name, value in changes.items():
        if name in sidecar["key"]:
            sidecar["key"][name] = value
        else:
            sidecar[name] = value
    side.write_text(json.dumps(sidecar))


def test_an_engine_built_ahead_of_time_is_found(built_for_3060):
    found = find_engine(built_for_3060)
    assert found.plan == plan_of(built_for_3060)
    assert found.device == "sm86"


def without_sidecar(bundle):
    Path(f"{plan_of(bundle)}.json").unlink()


def broken_sidecar(bundle):
    Path(f"{plan_of(bundle)}.json").write_text('{"format": "avsep-engine"')


def foreign_sidecar(bundle):
    change_sidecar(bundle, format="something else")


def other_version(bundle):
    change_sidecar(bundle, tensorrt="1.6.0.5")


def other_target(bundle):
    change_sidecar(bundle, target="tensorrt")


def other_shapes(bundle):
    change_sidecar(bundle, profiles=PROFILE)


def other_capability(bundle):
    change_sidecar(bundle, compute_capability="8.9")


def flipped_bit(bundle):
    data = bytearray(plan_of(bundle).read_bytes())
    data[len(data) // 2] ^= 1
    plan_of(bundle).write_bytes(data)


def truncated(bundle):
    plan_of(bundle).write_bytes(plan_of(bundle).read_bytes()[:5000])


def other_header(bundle):
    """A plan of another version with a sidecar that was edited to fit it."""
    data = bytearray(plan_of(bundle).read_bytes())
    data[25] = 3
    plan_of(bundle).write_bytes(data)
    change_sidecar(bundle, plan_sha256=hashlib.sha256(data).hexdigest())


def no_plan(bundle):
    plan_of(bundle).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_plan, "there is no engine"),
        (without_sidecar, "nothing says what it was built for"),
        (broken_sidecar, "is damaged"),
        (foreign_sidecar, "not of an engine"),
        (other_version, "another TensorRT version (1.6.0.5; here 1.7.1.116)"),
        (other_target, "another kind of TensorRT"),
        (other_shapes, "other shapes"),
        (other_capability, "another compute capability (8.9; here 8.6)"),
        (flipped_bit, "is damaged"),
        (truncated, "is damaged"),
        (other_header, "was built by tensorrt-rtx 1.3.1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_engine_that_is_not_ours_is_refused_and_built_again(built_for_3060, damage, words):
    damage(built_for_3060)
    with pytest.raises(EngineMismatch) as error:
        find_engine(built_for_3060)
    assert words in one_line(error)
    assert "build it here" in str(error.value)
    told = []
    (built,) = tensorrt.build_bundle(built_for_3060, progress=False, tell=told.append)
    assert built.new
    assert any(words in line for line in told) or damage is no_plan
    assert find_engine(built_for_3060).sidecar == built.sidecar


def test_an_engine_of_another_graph_is_refused(built_for_3060):
    manifest = json.loads((built_for_3060 / "manifest.json").read_text())
    graph = built_for_3060 / "separator.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    manifest["files"]["separator.onnx"] = hashlib.sha256(graph.read_bytes()).hexdigest()
    (built_for_3060 / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineMismatch, match="another graph"):
        find_engine(built_for_3060)


@pytest.mark.parametrize(
    ("field", "gpu", "words"),
    [
        ("gpu", ORIN._replace(name="Thor"), "another GPU (Orin; here Thor)"),
        ("compute_capability", ORIN._replace(capability="11.0"), "there is no engine"),
        ("version", ORIN, "another TensorRT version (10.3.0; here 10.16.1.11)"),
        ("platform", ORIN, "another platform (Linux riscv; here"),
    ],
)
def test_tensorrt_engines_belong_to_one_gpu_and_platform(jetson, tmp_path, monkeypatch, field, gpu, words):
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"]})
    with monkeypatch.context() as elsewhere:
        if field == "platform":
            elsewhere.setattr(engines.platform, "machine", lambda: "riscv")
            elsewhere.setattr(engines.platform, "system", lambda: "Linux")
        tensorrt.build_bundle(bundle, progress=False)
    if field == "version":
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make("10.16"))
    monkeypatch.setattr(engines, "find_gpu", lambda: (gpu, ""))
    with pytest.raises(EngineMismatch) as error:
        find_engine(bundle)
    assert words in one_line(error)


def test_key_holds_what_an_engine_depends_on():
    orin = engines.Machine(None, "tensorrt", "10.3.0", "8.7", "Orin")
    key = engines.engine_key("ab", orin, PROFILE, "fp16")
    changed = [
        engines.engine_key("ac", orin, PROFILE, "fp16"),
        engines.engine_key("ab", orin._replace(target="tensorrt-rtx"), PROFILE, "fp16"),
        engines.engine_key("ab", orin._replace(version="10.3.1"), PROFILE, "fp16"),
        engines.engine_key("ab", orin._replace(capability="8.9"), PROFILE, "fp16"),
        engines.engine_key("ab", orin._replace(gpu="Xavier"), PROFILE, "fp16"),
        engines.engine_key("ab", orin, [], "fp16"),
        engines.engine_key("ab", orin, PROFILE, "fp32"),
    ]
    assert all(other != key for other in changed)
    assert json.loads(json.dumps(key)) == key  # as a sidecar gives it back


# ---------------------------------------------------------------- TensorRT, by its stand-in


def test_timing_cache_is_kept_and_a_foreign_one_dropped(jetson, tmp_path):
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"]})
    cache = bundle / "engines" / "tensorrt-sm87.timing"
    tensorrt.build_bundle(bundle, progress=False)
    assert cache.read_bytes() == b"+"
    tensorrt.build_bundle(bundle, progress=False, force=True)
    assert cache.read_bytes() == b"++"
    cache.write_bytes(b"foreign")
    tensorrt.build_bundle(bundle, progress=False, force=True)
    assert cache.read_bytes() == b"+"


def test_a_refused_profile_and_a_failed_build_say_why(jetson, tmp_path, monkeypatch):
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[-1, 3], "open"]})
    profile = [{"mixture": {"min": [1, 3], "opt": [2, 3], "max": [4000, 3]}}]
    with pytest.raises(ExportError) as error:
        tensorrt.build(bundle / "separator.onnx", tmp_path / "a.plan", profiles=profile, progress=False)
    assert "is refused" in one_line(error)
    memory = fake_tensorrt.make("10.3", fail=True, log=("Requested\n amount of GPU memory: out of memory",))
    monkeypatch.setitem(sys.modules, "tensorrt", memory)
    with pytest.raises(ExportError) as error:
        tensorrt.build_bundle(bundle, progress=False)
    assert "Requested amount of GPU memory: out of memory" in one_line(error)
    assert "--workspace-mib 512" in str(error.value)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make("10.3", fail=True))
    with pytest.raises(ExportError, match="gives no reason"):
        tensorrt.build_bundle(bundle, progress=False)
    assert not (bundle / "engines").exists()


def test_tensorrt_builds_only_for_the_gpu_here(jetson, tmp_path):
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"]})
    with pytest.raises(ExportError, match="leave --sm out"):
        tensorrt.build_bundle(bundle, target="tensorrt", sm=[86])


def test_a_graph_that_needs_a_newer_tensorrt_is_refused(jetson, tmp_path):
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"]})
    write_manifest(bundle, {"separator.onnx": []}, least="10.5")
    with pytest.raises(ExportError, match=r"needs TensorRT 10\.5, this is 10\.3\.0"):
        tensorrt.build_bundle(bundle)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "is not installed"),
        (types.ModuleType("tensorrt"), "pip uninstall tensorrt-stubs"),
        (types.SimpleNamespace(Builder=1, OnnxParser=1, __version__="8.6.1"), "version 8.6.1, 10.3 is needed"),
    ],
    ids=["missing", "stubs", "old"],
)
def test_missing_empty_and_old_tensorrt_are_told_apart(monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(ExportError) as error:
        engines.load_tensorrt("tensorrt")
    assert words in one_line(error)
    assert "JetPack" in str(error.value)


def test_auto_takes_rtx_where_tensorrt_is_empty(rtx, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    assert engines.load_tensorrt() == (rtx, "tensorrt-rtx")
    with pytest.raises(ExportError, match="unknown target 'tensorflow'"):
        engines.load_tensorrt("tensorflow")


def test_tensorrt_is_not_called_without_a_driver(tmp_path, monkeypatch):
    """Some of its calls end the process then."""
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"]})
    fake = fake_tensorrt.make("10.3")

    def never(*_):
        raise AssertionError("called without a driver")

    fake.Builder = fake.Runtime = never
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(engines, "find_gpu", lambda: (None, "there is no NVIDIA driver (libcuda.so.1)"))
    for call in (
        tensorrt.build_bundle,
        find_engine,
        lambda b: list(tensorrt.check_bundle(b, target="tensorrt")),
    ):
        with pytest.raises(ExportError, match="no NVIDIA driver"):
            call(bundle)


# ---------------------------------------------------------------- running


def test_buffers_are_kept_between_calls_and_grow(jetson, tmp_path):
    bundle = made_bundle(tmp_path / "bundle", {"open.onnx": [[-1, 3], "open"]})
    tensorrt.build_bundle(bundle, progress=False)
    running = engines.DeviceEngine(find_engine(bundle, "open.onnx"))
    cuda, ids = running._cuda, np.zeros((1, 2), np.int64)
    counts = []
    for rows in (2, 2, 1, 4, 3):
        mixture = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
        result = running.run({"mixture": mixture, "class_ids": ids})
        np.testing.assert_array_equal(result["sources"], 2 * mixture)
        counts.append(cuda.allocated)
    assert counts == [3, 3, 3, 5, 5]  # three buffers, of which two grow once
    first = running.run({"mixture": mixture, "class_ids": ids})["sources"]
    running.run({"mixture": mixture + 1, "class_ids": ids})
    np.testing.assert_array_equal(first, 2 * mixture)  # a result is the caller's
    running.close()
    running.close()
    assert FakeCuda.live == 0
    with pytest.raises(ExportError, match="was closed"):
        running.run({"mixture": mixture, "class_ids": ids})


def test_a_second_output_comes_by_its_name(jetson, tmp_path):
    """Presence beside the sources, whichever of them the engine names first."""
    from avsep.export.runtime.calls import GraphCall

    folder = tmp_path / "bundle"
    folder.mkdir()
    graph = {"inputs": {"mixture": [1, 3], "class_ids": [1, 2]}, "outputs": {"presence": [1, 2], "sources": [1, 3]}}
    (folder / "separator.onnx").write_bytes(fake_tensorrt.as_model(graph))
    write_manifest(folder, {"separator.onnx": []})
    tensorrt.build_bundle(folder, progress=False)
    with engines.DeviceEngine(find_engine(folder)) as running:
        mixture = np.array([[0.1, 0.2, 0.3]], np.float32)
        found = running.run({"mixture": mixture, "class_ids": np.zeros((1, 2), np.int64)})
        np.testing.assert_array_equal(found["sources"], 2 * mixture)
        assert list(found) == ["presence", "sources"]

        def run(inputs):
            outputs = running.run(inputs)
            return {"presence": outputs["presence"][:, :2], "sources": outputs["sources"][:, None].repeat(2, axis=1)}

        call = GraphCall(run, False, {}, 1, 2)
        sources, presence = call.tell(mixture, {"class_ids": np.zeros((1, 2), np.int64)})
    np.testing.assert_array_equal(sources, np.stack([2 * mixture, 2 * mixture], axis=1))
    np.testing.assert_array_equal(presence, 2 * mixture[:, :2])


def test_threads_wait_for_each_other(jetson, tmp_path, monkeypatch):
    """They share the buffers: another's upload would replace the input before it was computed with."""
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"]})
    tensorrt.build_bundle(bundle, progress=False)
    upload = FakeCuda.upload
    monkeypatch.setattr(FakeCuda, "upload", lambda *given: (upload(*given), time.sleep(0.005)))
    results = {}
    with engines.DeviceEngine(find_engine(bundle)) as running:

        def work(k):
            for _ in range(5):
                inputs = {"mixture": np.full((2, 3), k, np.float32), "class_ids": np.zeros((1, 2), np.int64)}
                results.setdefault(k, []).append(running.run(inputs)["sources"])

        threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for k in range(3):
        np.testing.assert_array_equal(results[k], np.full((5, 2, 3), 2 * k, np.float32))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"mixture": np.zeros((5, 3), np.float32)}, "outside the engine's profile"),
        ({"mixture": np.zeros((2, 4), np.float32)}, "it takes float32 [-1, 3]"),
        ({"mixture": np.zeros((2, 3))}, "is float64"),
        ({"mixtures": np.zeros((2, 3), np.float32)}, "takes mixture, class_ids"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(jetson, tmp_path, inputs, words):
    bundle = made_bundle(tmp_path / "bundle", {"open.onnx": [[-1, 3], "open"]})
    tensorrt.build_bundle(bundle, progress=False)
    ids = np.zeros((1, 2), np.int64)
    with engines.DeviceEngine(find_engine(bundle, "open.onnx")) as running:
        with pytest.raises(ExportError) as error:
            running.run({**inputs, "class_ids": ids})
        assert words in one_line(error)
        good = np.ones((2, 3), np.float32)
        np.testing.assert_array_equal(running.run({"mixture": good, "class_ids": ids})["sources"], 2 * good)


def test_a_refused_shape_leaves_no_half_set_context(jetson, tmp_path):
    """The first input's shape was taken, the second's refused: the next call sets both again."""
    folder = made_bundle(tmp_path / "bundle", {"open.onnx": [[-1, 3], "open"]})
    graph = {"inputs": {"mixture": [-1, 3], "class_ids": [-1, 2]}, "outputs": {"sources": [-1, 3]}}
    (folder / "open.onnx").write_bytes(fake_tensorrt.as_model(graph))
    profile = {**PROFILE[0], "class_ids": {"min": [1, 2], "opt": [1, 2], "max": [4, 2]}}
    write_manifest(folder, {"open.onnx": [profile]})
    tensorrt.build_bundle(folder, progress=False)
    good = {"mixture": np.ones((2, 3), np.float32), "class_ids": np.zeros((1, 2), np.int64)}
    with engines.DeviceEngine(find_engine(folder, "open.onnx")) as running:
        running.run(good)
        with pytest.raises(ExportError, match="'class_ids' of shape"):
            running.run({"mixture": np.ones((4, 3), np.float32), "class_ids": np.zeros((9, 2), np.int64)})
        assert running.run(good)["sources"].shape == (2, 3)


def test_a_plan_changed_after_the_check_is_not_loaded(jetson, tmp_path):
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"]})
    tensorrt.build_bundle(bundle, progress=False)
    found = find_engine(bundle)
    found.plan.write_bytes(found.plan.read_bytes() + b" ")
    with pytest.raises(EngineMismatch, match="was changed since"):
        engines.DeviceEngine(found)
    assert FakeCuda.live == 0


DRIVER = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define EXPORT __attribute__((visibility("default")))
static int ready, depth, streams, retained; static long live;
static struct { int on; } stream_object; static int context_object;
EXPORT long fake_state(int what) { return what == 0 ? live : what == 1 ? depth : what == 2 ? streams : retained; }
EXPORT int cuInit(unsigned flags) { ready = flags == 0; return getenv("FAKE_NO_GPU") ? 100 : 0; }
EXPORT int cuDriverGetVersion(int *v) { *v = 12060; return 0; }
EXPORT int cuDeviceGetCount(int *n) { *n = 1; return ready ? 0 : 3; }
EXPORT int cuDeviceGet(int *d, int n) { *d = n; return ready ? 0 : 3; }
EXPORT int cuDeviceGetName(char *s, int n, int d) { strncpy(s, "Orin", n); return d; }
EXPORT int cuDeviceTotalMem_v2(size_t *m, int d) { *m = (size_t)7620 << 20; return d; }
EXPORT int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 7 : -1; return d; }
EXPORT int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context_object; retained++; return d; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int d) { retained--; return d; }
EXPORT int cuCtxPushCurrent_v2(void *c) { depth++; return c == &context_object ? 0 : 201; }
EXPORT int cuCtxPopCurrent_v2(void **c) { *c = &context_object; return depth-- > 0 ? 0 : 201; }
EXPORT int cuMemAlloc_v2(uint64_t *p, size_t n) {
  if (depth != 1) return 201;
  if (n > (size_t)1 << 40) return 2;
  *p = (uint64_t)malloc(n); live++; return 0; }
EXPORT int cuMemFree_v2(uint64_t p) { free((void *)p); live--; return depth == 1 ? 0 : 201; }
EXPORT int cuMemGetInfo_v2(size_t *u, size_t *t) {
  *u = (size_t)5 << 32; *t = (size_t)8 << 32; return depth == 1 ? 0 : 201; }
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t d, const void *s, size_t n, void *st) {
  if (st != &stream_object) return 400; memcpy((void *)d, s, n); return 0; }
EXPORT int cuMemcpyDtoHAsync_v2(void *d, uint64_t s, size_t n, void *st) {
  if (st != &stream_object) return 400; memcpy(d, (void *)s, n); return 0; }
EXPORT int cuStreamCreate(void **s, unsigned f) { *s = &stream_object; streams++; return f == 1 ? 0 : 1; }
EXPORT int cuStreamSynchronize(void *s) { return s == &stream_object ? 0 : 400; }
EXPORT int cuStreamDestroy_v2(void *s) { streams--; return s == &stream_object ? 0 : 400; }
EXPORT int cuGetErrorString(int e, const char **s) { *s = e == 2 ? "out of memory" : "some error"; return 0; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """A libcuda.so.1 that takes the host's memory for the device's, with the signatures of cuda.h."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(DRIVER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "cuda.c")], check=True
    )
    return folder / "libcuda.so.1"


def test_the_calls_of_the_driver_fit_its_signatures(driver):
    """A pointer cut to 32 bits, or a missing context, fails here."""
    cuda = Cuda(str(driver))
    state = ctypes.CDLL(str(driver)).fake_state
    array = np.arange(1000, dtype=np.float32)
    back = np.empty_like(array)
    with cuda.current():
        address = cuda.allocate(array.nbytes)
        assert address > 1 << 32  # where malloc's addresses are, which is what a cut pointer would lose
        cuda.upload(array, address)
        cuda.download(address, back)
        cuda.synchronize()
        cuda.free(address)
        with pytest.raises(ExportError, match=r"cuMemAlloc_v2: out of memory \(error 2\): too little memory"):
            cuda.allocate(1 << 50)
    np.testing.assert_array_equal(back, array)
    assert cuda.unused_bytes() == 5 << 32
    assert [state(i) for i in range(4)] == [0, 0, 1, 1]
    cuda.close()
    assert [state(i) for i in range(4)] == [0, 0, 0, 0]


def test_an_engine_runs_through_the_driver(driver, jetson, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make("11.4"))
    monkeypatch.setattr(engines, "find_gpu", lambda: (ORIN, ""))
    real = Cuda
    monkeypatch.setattr(engines, "Cuda", lambda: real(str(driver)))
    bundle = made_bundle(tmp_path / "bundle", {"separator.onnx": [[2, 3], "fixed"]})
    tensorrt.build_bundle(bundle, progress=False)
    mixture = np.arange(6, dtype=np.float32).reshape(2, 3)
    with engines.DeviceEngine(find_engine(bundle)) as running:
        result = running.run({"mixture": mixture, "class_ids": np.zeros((1, 2), np.int64)})
    np.testing.assert_array_equal(result["sources"], 2 * mixture)
    assert [ctypes.CDLL(str(driver)).fake_state(i) for i in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize("present", [True, False])
def test_the_gpu_is_read_from_the_driver(driver, present):
    code = "import json; from avsep.export.runtime.cuda import find_gpu; print(json.dumps(find_gpu()))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver.parent), **({} if present else {"FAKE_NO_GPU": "1"})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    gpu, reason = json.loads(done.stdout)
    assert gpu == (list(ORIN) if present else None)
    assert ("error 100" in reason) is not present


# ---------------------------------------------------------------- the file itself


def test_the_script_imports_numpy_the_runtime_and_tensorrt_alone():
    tree = ast.parse(Path(tensorrt.__file__).read_text(encoding="utf-8"), feature_version=(3, 10))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module))
    foreign = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.replace("avsep.export.runtime", "avsep_runtime") for name in foreign} == {
        name for name in foreign if name.startswith("avsep_runtime")
    }


def test_the_bundle_holds_the_very_file(tiny_bundle):
    assert (tiny_bundle / "build_engine.py").read_bytes() == Path(tensorrt.__file__).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bundle", "nowhere"], "no such bundle: nowhere"),
        (["--graph", "other.onnx"], "has no graph other.onnx: it has separator.onnx"),
        (["--sm", "87"], "it has 75, 80, 86, 89, 120"),
        (["--sm", "86", "--workspace-mib", "0"], "at least 1 MiB"),
        (["--sm", "86", "89", "--out", "a.plan"], "is one file for 2 engines"),
        (["--target", "tensorrt-rtx"], "say for which GPU with --sm"),
    ],
)
def test_the_command_line_ends_in_one_line_and_2(rtx, own_bundle, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(own_bundle)
    monkeypatch.setattr(engines, "find_gpu", lambda: (None, "there is no NVIDIA driver (libcuda.so.1)"))
    before = files_of(own_bundle)
    assert tensorrt.main(["--bundle", ".", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert files_of(own_bundle) == before


def damaged_graph(bundle):
    path = bundle / "separator.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def missing_graph(bundle):
    (bundle / "separator.onnx").unlink()


def broken_manifest(bundle):
    (bundle / "manifest.json").write_text('{"format": "avsep-bundle", "version": 2')


def old_manifest(bundle):
    (bundle / "manifest.json").write_text('{"format": "avsep-bundle", "version": 1}')


def bare_manifest(bundle):
    (bundle / "manifest.json").write_text('{"format": "avsep-bundle", "version": 2, "files": {}, "graphs": [{}]}')


def without_hash(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = {}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def leading_out(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["graphs"][0]["file"] = "../evil.onnx"
    manifest["files"]["../evil.onnx"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_graph, "SHA-256 differs"),
        (missing_graph, "lacks the file separator.onnx"),
        (broken_manifest, "is not valid JSON"),
        (old_manifest, "export it again"),
        (bare_manifest, "is damaged"),
        (leading_out, "is damaged"),
        (without_hash, "is damaged"),
    ],
)
def test_a_damaged_bundle_is_not_built(rtx, own_bundle, capsys, damage, words):
    damage(own_bundle)
    assert tensorrt.main(["--bundle", str(own_bundle), "--sm", "86"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not (own_bundle / "engines").exists()


def test_a_tar_gets_its_engines_beside_it(rtx, copied_bundle, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "flute.tar", "w") as archive:
        for path in copied_bundle.iterdir():
            archive.add(path, path.name)
    bundle = open_bundle(tmp_path / "flute.tar")
    (built,) = tensorrt.build_bundle(bundle, target="tensorrt-rtx", sm=[86], progress=False)
    assert built.plan == tmp_path / "flute.engines" / "separator.tensorrt-rtx-sm86.plan"
    with pytest.raises(ExportError, match="SM 99"):
        tensorrt.build_bundle(bundle, target="tensorrt-rtx", sm=[99], progress=False)


def test_the_engine_of_a_tar_runs_without_unpacking_it(jetson, copied_bundle, tmp_path, monkeypatch):
    from avsep.export.bundle.packing import write_tar
    from avsep.export.runtime.reader import Bundle, open_bundle

    write_tar(copied_bundle, tmp_path / "flute.tar")
    bundle = open_bundle(tmp_path / "flute.tar")
    machine = engines.Machine(jetson, "tensorrt", jetson.__version__, ORIN.capability, ORIN.name)
    key = engines.engine_key(bundle.manifest["files"]["separator.onnx"], machine)
    plan = engines.engines_folder(bundle) / "separator.tensorrt-sm87.plan"
    plan.parent.mkdir()
    built = {"graph": {"inputs": {"mixture": [2, 3]}, "outputs": {"sources": [2, 3]}}, "profiles": []}
    plan.write_bytes(b"ftrt" + bytes(20) + bytes([10, 3, 0, 0]) + json.dumps(built).encode())
    sidecar = {"format": "avsep-engine", "version": 1, "key": key, "plan_sha256": sha256_file(plan)}
    Path(f"{plan}.json").write_text(json.dumps(sidecar))
    monkeypatch.setattr(Bundle, "folder", None)
    mixture = np.ones((2, 3), np.float32)
    running = engines.open_engine(bundle, bundle.graph(), "tensorrt")
    np.testing.assert_array_equal(running.run({"mixture": mixture})["sources"], 2 * mixture)
    assert FakeCuda.live == 2
    from avsep.export.runtime.separator import BundleSeparator

    elsewhere = plan.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="there is no engine"):
        BundleSeparator.load(bundle, "tensorrt")
    assert BundleSeparator.load(bundle, "tensorrt", engines=elsewhere).provider == "tensorrt"
    elsewhere.rename(plan.parent)
    del running  # nobody closed it: the device's memory comes back all the same
    assert FakeCuda.live == 0
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(ExportError, match=r"is damaged.*avsep export build"):
        engines.open_engine(bundle, bundle.graph(), "tensorrt")
    data = bytearray((tmp_path / "flute.tar").read_bytes())
    data[bundle._members["separator.onnx"][0] + 500] ^= 1
    (tmp_path / "flute.tar").write_bytes(data)
    with pytest.raises(ExportError, match=r"separator\.onnx is not the file that was exported"):
        engines.open_engine(bundle, bundle.graph(), "tensorrt")


def test_one_logger_lives_as_long_as_tensorrt(jetson):
    """TensorRT holds the first one that it meets without a reference to it."""
    first = engines.make_logger(jetson, False)
    first.log(jetson.ILogger.Severity.ERROR, "of an earlier build")
    assert engines.make_logger(jetson, True) is first
    assert first.errors == []
    assert engines.make_logger(fake_tensorrt.make("11.4"), False) is not first


def test_opening_an_engine_without_a_gpu_is_one_line(tiny_bundle, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(engines, "find_gpu", lambda: (None, "there is no NVIDIA driver (libcuda.so.1)"))
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(ExportError) as error:
        engines.open_engine(bundle, bundle.graph(), "tensorrt-rtx")
    assert "no NVIDIA driver" in one_line(error)
    assert "run this on the device" in str(error.value)  # and nothing of --sm, which only building has

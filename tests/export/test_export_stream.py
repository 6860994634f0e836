"""Bundles of causal separators: one graph with states, run block by block without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from hypothesis import given, settings
from hypothesis import strategies as st

from avsep.cli import main
from avsep.errors import AvsepError, ConfigError, ExportError
from avsep.export import ExportPlan, export
from avsep.export.build.stream import GOLDEN_CALLS, Along, error_along
from avsep.export.bundle.manifest import check_manifest as check_schema
from avsep.export.bundle.manifest import verify_bundle
from avsep.export.runtime.manifest import VERSION, check_manifest
from avsep.export.runtime.reader import open_bundle
from avsep.export.runtime.separator import BundleSeparator
from avsep.export.runtime.wav import read_wav, write_wav
from avsep.export.targets.website import write_site
from avsep.inference.streaming import StreamingSeparator
from avsep.media.timeline import VisualTimeline
from avsep.types import Batch
from support.browsers import browser, chromium, opened_page, ort_web, separate_in_page, served
from support.causal import RATE_HZ, causal_separator, features, noise

CLASSES = ["flute", "violin"]
ROW = features().object[0, 0].numpy()
SEEN = {"flute": {"object": ROW}}
PLANS = {
    "one": ExportPlan(),
    "three_frames": ExportPlan(frames=3, dynamic=True),
    "stereo": ExportPlan(channels=2, sources=3),
}


@pytest.fixture(scope="module")
def separator():
    return causal_separator()


@pytest.fixture(scope="module")
def bundles(separator, tmp_path_factory):
    """By name, each made once."""
    made = {}

    def bundle(name):
        if name not in made:
            made[name] = export(separator, PLANS[name], tmp_path_factory.mktemp("bundles") / name).path
        return made[name]

    return bundle


@pytest.fixture(scope="module")
def running(bundles):
    opened = {}

    def load(name):
        if name not in opened:
            opened[name] = BundleSeparator.load(bundles(name), "cpu", threads=1)
        return opened[name]

    yield load
    for one in opened.values():
        one.close()


def wanted(separator, mixture):
    """What PyTorch's stream gives, and its presence."""
    timelines = {"flute": VisualTimeline(features={"clip": ROW[None]})}
    channels = None if mixture.ndim == 1 else len(mixture)
    stream = StreamingSeparator(separator, CLASSES, timelines, channels=channels)
    return np.concatenate([stream.push(mixture), stream.flush()], axis=-1), stream.presence


def in_blocks(stream, mixture, size):
    parts = [stream.push(mixture[..., k : k + size]) for k in range(0, mixture.shape[-1], size)]
    return np.concatenate([*parts, stream.flush()], axis=-1)


@pytest.mark.parametrize("name", list(PLANS))
def test_the_bundle_holds_and_says_what_it_carries(name, bundles):
    checked = verify_bundle(bundles(name))
    (check,) = checked.graphs
    assert (check.kind, check.file) == ("stream", "stream.onnx")
    assert check.max_error < 1e-3
    manifest = json.loads((bundles(name) / "manifest.json").read_text())
    assert manifest["version"] == VERSION == 4
    (graph,) = manifest["graphs"]
    frames, channels = PLANS[name].frames, PLANS[name].channels
    assert graph["stream"]["frames"] == frames
    shapes = {t["name"]: t["shape"] for t in graph["inputs"]}
    sources = "sources" if PLANS[name].dynamic else PLANS[name].sources
    assert shapes["mixture"] == ([1, 32 * frames] if channels == 1 else [1, channels, 32 * frames])
    assert shapes["state_samples"] == [1, channels, 96]
    assert shapes["state_overlap"] == [1, sources, channels, 96]
    assert shapes["state_envelope"] == [1, 96]
    assert shapes["state_down1"] == [1, 4, 16, 4]
    assert shapes["state_head1"] == [1, sources, 8, 12]
    names = [state["name"] for state in graph["stream"]["states"]]
    assert [state["output"] for state in graph["stream"]["states"]] == [f"next_{n}" for n in names]
    text = (bundles(name) / "README.md").read_text()
    assert "`state_...`: zeros at first" in text
    assert f"at most {128 + 32 * (frames - 1)} samples" in text


@pytest.mark.parametrize("name", ["one", "three_frames"])
@settings(max_examples=15, deadline=None)
@given(samples=st.integers(1, 1500), size=st.integers(1, 700))
def test_any_blocks_of_any_length_give_what_pytorch_streams(name, samples, size, separator, running):
    mixture = noise(samples)
    stream = running(name).stream(CLASSES, SEEN)
    expected, presence = wanted(separator, mixture)
    np.testing.assert_allclose(in_blocks(stream, mixture, size), expected, atol=1e-5)
    if name == "one":
        np.testing.assert_allclose(stream.presence, presence, atol=1e-5)


@pytest.mark.parametrize("name", list(PLANS))
def test_whole_recordings(name, separator, running):
    mixture = noise(6000)
    expected, presence = wanted(separator, mixture)
    found = running(name).separate_with_presence(mixture, SEEN, CLASSES)
    np.testing.assert_allclose(found.sources, expected, atol=1e-5)
    # of three frames a call clips end at the call, and the last frames are not whole
    np.testing.assert_allclose(found.presence, presence, atol=1e-5 if name != "three_frames" else 0.01)


def test_two_channels(separator, running):
    mixture = noise(2500, 2)
    expected, _ = wanted(separator, mixture)
    np.testing.assert_allclose(running("stereo").separate(mixture, SEEN, CLASSES), expected, atol=1e-5)
    stream = running("stereo").stream(CLASSES, SEEN, channels=2)
    np.testing.assert_allclose(in_blocks(stream, mixture, 50), expected, atol=1e-5)


def test_more_sources_than_the_graph_takes(separator, running):
    mixture = noise(1000)
    found = running("one").separate(mixture, SEEN, ["flute", "violin", "piano"])
    np.testing.assert_allclose(found[:2], wanted(separator, mixture)[0], atol=1e-5)
    alone = running("one").separate(mixture, {}, ["piano"])
    np.testing.assert_allclose(found[2:], alone, atol=1e-5)


def test_no_sample_waits_longer_than_told(running):
    for name, latency in (("one", 128), ("three_frames", 192)):
        separator = running(name)
        assert (separator.causal, separator.latency_samples) == (True, latency)
        stream = separator.stream(CLASSES, SEEN)
        emitted = 0
        for received in range(1, 401):
            emitted += stream.push(noise(1)).shape[-1]
            assert received - emitted < latency
        assert emitted > 100


def test_what_is_seen_is_asked_for_as_each_clip_begins(running):
    asked = []

    def look(middle_s, duration_s):
        asked.append(middle_s)
        return ROW

    stream = running("one").stream(["flute"], {"flute": {"object": look}})
    in_blocks(stream, noise(5000), 64)
    assert asked == [0.0, 64 * 32 / RATE_HZ, 2 * 64 * 32 / RATE_HZ]


def test_limited_masks_need_the_number_of_sources(tmp_path):
    separator = causal_separator(limit_mask_sum=True)
    bundle = export(separator, None, tmp_path / "bundle").path
    mixture = noise(1500)
    with BundleSeparator.load(bundle, "cpu", threads=1) as running:
        assert running.limits_mask_sum
        found = running.separate(mixture, SEEN, CLASSES)
        np.testing.assert_allclose(found, wanted(separator, mixture)[0], atol=1e-5)
        with pytest.raises(ConfigError, match="export it with --sources 1"):
            running.separate(mixture, SEEN, ["flute"])


def test_files_are_separated_by_the_command(bundles, running, tmp_path):
    mixture = noise(6000) * 0.9
    soundfile.write(tmp_path / "song.wav", mixture, RATE_HZ, subtype="FLOAT")
    files = [str(tmp_path / "song.wav"), "--bundle", str(bundles("one")), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["separate", *files, "--provider", "cpu", "--classes", "flute,violin", "--format", "FLOAT"])
    assert not stop.value.code
    expected = running("one").separate(mixture, {}, CLASSES)
    for name, one in zip(CLASSES, expected, strict=True):
        found, rate = soundfile.read(tmp_path / "out" / f"song_{name}.wav", dtype="float32")
        assert rate == RATE_HZ
        np.testing.assert_allclose(found, one, atol=1e-6)


def test_the_runtime_needs_no_torch(bundles, running, tmp_path):
    code = """
import sys
import numpy as np
from avsep_runtime import BundleSeparator
stream = BundleSeparator.load(sys.argv[1], "cpu", threads=1).stream(["flute", "violin"])
mixture = np.load(sys.argv[2])
parts = [stream.push(block) for block in np.array_split(mixture, 13)]
np.save(sys.argv[3], np.concatenate([*parts, stream.flush()], axis=-1))
assert not {"torch", "avsep"} & set(sys.modules), sorted(sys.modules)
"""
    mixture = noise(1200)
    np.save(tmp_path / "mixture.npy", mixture)
    (wheel,) = bundles("one").glob("*.whl")
    subprocess.run(
        [sys.executable, "-c", code, bundles("one"), tmp_path / "mixture.npy", tmp_path / "out.npy"],
        env={**os.environ, "PYTHONPATH": str(wheel)},
        check=True,
        timeout=300,
    )
    expected = running("one").separate(mixture, {}, CLASSES)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- lower precisions


def batches(count, seed):
    return [
        Batch(
            sources=torch.from_numpy(np.stack([noise(2047, seed=100 * seed + 2 * k + n) for n in range(2)]))[None] / 2,
            class_ids=torch.tensor([[k % 3, (k + 1) % 3]]),
            video_ids=torch.zeros(1, 2, dtype=torch.long),
            is_memory=torch.zeros(1, 2, dtype=torch.bool),
        )
        for k in range(count)
    ]


@pytest.fixture(scope="module")
def lower(separator, tmp_path_factory):
    plan = ExportPlan(precision=("fp16", "int8"))
    place = tmp_path_factory.mktemp("bundles") / "lower"
    return export(
        separator, plan, place, held_out=batches(2, 1), calibration=batches(3, 2), validation=batches(2, 3)
    ).path


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "most_db"), [("fp16", -60), ("int8", -40)])
def test_lower_precisions_stay_near_pytorch_along_a_stream(precision, most_db, separator, lower):
    """Over more than 500 calls, the last quarter of which is no worse than the first."""
    mixture = np.tile(noise(64 * 32), 8)
    expected, presence = wanted(separator, mixture)
    with BundleSeparator.load(lower, "cpu", precision, threads=1) as running:
        found = running.separate_with_presence(mixture, SEEN, CLASSES)
        assert running.calls > 500
    error = np.sum((found.sources - expected) ** 2, axis=0).reshape(8, -1).sum(axis=1)
    power = np.sum(expected**2, axis=0).reshape(8, -1).sum(axis=1)
    error_db = 10 * np.log10(error / power)
    assert error_db.max() < most_db
    assert error_db.max() > -140  # it is another precision
    assert error_db[-2:].mean() < error_db[1:3].mean() + 1
    np.testing.assert_allclose(found.presence, presence, atol=0.01)


@pytest.mark.slow
def test_lower_precisions_carry_their_states_in_fp32_and_are_smaller(lower, bundles):
    import onnx

    assert verify_bundle(lower).graphs[0].tolerance < 0.1
    manifest = json.loads((lower / "manifest.json").read_text())
    half, quantised = manifest["graphs"]
    assert (half["precision"], quantised["precision"], manifest["version"]) == ("fp16", "int8", 4)
    assert quantised["quantised"]["layers"] > 0
    for graph in (half, quantised):
        assert {t["dtype"] for t in (*graph["inputs"], *graph["outputs"])} == {"float32", "int64", "bool"}
        assert graph["stream"]["along"]["calls"] == 504
        model = onnx.load(str(lower / graph["file"]))
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        kinds = {v.type.tensor_type.elem_type for v in inferred.graph.value_info}
        wanted_kind = onnx.TensorProto.FLOAT16 if graph is half else onnx.TensorProto.INT8
        assert wanted_kind in kinds
    assert (lower / "stream.fp16.onnx").stat().st_size < (bundles("one") / "stream.onnx").stat().st_size


@pytest.mark.slow
def test_what_comes_out_is_held_to_the_tolerance_and_states_are_not(lower, tmp_path):
    from avsep.export.runtime.manifest import sealed
    from avsep.files import sha256_file

    copy = shutil.copytree(lower, tmp_path / "bundle")
    golden = copy / "stream.fp16.golden.npz"
    with np.load(golden) as archive:
        arrays = dict(archive)
    for name, passes in (("next_down1", True), ("sources", False)):
        arrays[name] = arrays[name] + 0.2
        np.savez(golden, **arrays)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"][golden.name] = sha256_file(golden)
        (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
        if passes:
            verify_bundle(copy)
        else:
            with pytest.raises(ExportError, match="differs from its golden output"):
                verify_bundle(copy)


@pytest.mark.parametrize("state", ["samples", "overlap", "down1"])
def test_a_graph_that_loses_a_state_is_refused(state, bundles, monkeypatch):
    """By what comes out of it: states themselves are not compared."""
    from avsep.export.runtime.sessions import OnnxSession

    run = OnnxSession.run

    def losing(self, inputs):
        found = {name: np.array(value) for name, value in run(self, inputs).items()}
        return {name: 0 * value if name == f"next_{state}" else value for name, value in found.items()}

    monkeypatch.setattr(OnnxSession, "run", losing)
    with pytest.raises(ExportError, match="differs from its golden output"):
        verify_bundle(bundles("one"), "cpu")


def test_an_error_that_is_no_number_is_refused():
    along = Along(504, -70.0, float("nan"))
    with pytest.raises(ExportError, match=r"stream\.fp16\.onnx: what is rounded adds up"):
        along.require("stream.fp16.onnx")


@pytest.mark.parametrize(("leak", "grows"), [(0.0, False), (1.0, True)])
def test_an_error_that_adds_up_along_a_stream_is_refused(leak, grows):
    """A state that is rounded again in every call, and one that is not."""

    def graph(rounding):
        def run(given):
            state = leak * given["state_sum"] + given["mixture"] + rounding
            return {"sources": given["mixture"] + rounding + 0.01 * leak * state, "next_sum": state}

        return run

    mixture = np.random.default_rng(0).standard_normal((GOLDEN_CALLS, 1, 32)).astype(np.float32)
    golden = {"mixture": mixture - mixture.mean(axis=0), "state_sum": np.zeros((1, 32), dtype=np.float32)}
    along = error_along(graph(0.0), graph(1e-3), golden)
    assert along.calls == 504
    if not grows:
        along.require("stream.fp16.onnx")
        assert along.last_db == pytest.approx(along.first_db, abs=0.1)
    else:
        with pytest.raises(ExportError, match=r"stream\.fp16\.onnx: what is rounded adds up along a stream"):
            along.require("stream.fp16.onnx")


def test_int8_of_a_stream_needs_mixtures(separator, tmp_path):
    with pytest.raises(ExportError, match="int8 needs training mixtures"):
        export(separator, ExportPlan(precision=("int8",)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


# ----------------------------------------------------------------------------------------------------------- a browser


def test_a_browser_separates_a_recording_as_one_stream(bundles, running, tmp_path):
    """The samples of the runtime, over several clips; the graph is held against its golden sequence before."""
    chromium()
    with open_bundle(bundles("stereo")) as bundle:
        site = write_site(bundle, tmp_path / "site", ort_web=ort_web(), pack=False)
    mixture = 0.9 * noise(9000, 2)
    write_wav(tmp_path / "song.wav", mixture, RATE_HZ, "FLOAT")
    with browser() as chrome, served(site) as address, opened_page(chrome, address) as page:
        files = separate_in_page(page, tmp_path / "song.wav", CLASSES, tmp_path)
        assert "the graphs compute what they should on WebAssembly" in page.inner_text("#engine")
        shown = page.locator("#tracks .track").all_inner_texts()
    expected = running("stereo").separate_with_presence(mixture, None, CLASSES)
    rest = mixture - expected.sources.sum(axis=0)
    for file, signal in zip(files, [*expected.sources, rest], strict=True):
        np.testing.assert_allclose(read_wav(file)[0], signal, rtol=0, atol=2e-5)
    for text, probability in zip(shown[1:3], expected.presence, strict=True):
        assert f"{100 * probability:.0f} %)" in text


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"spectral": True}, "spectral is of separators that take chunks"),
        ({"length_s": 0.2}, "length_s is of separators that take chunks"),
        ({"batch": 2}, "batch is of separators that take chunks"),
    ],
)
def test_plans_of_chunks_are_refused(plan, reason, separator, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        export(separator, ExportPlan(**plan), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_frames_are_of_causal_separators(tmp_path):
    with pytest.raises(ConfigError, match="frames 4 is of causal separators"):
        export(causal_separator(decoder={"causal": False}), ExportPlan(frames=4), tmp_path / "bundle")
    with pytest.raises(ConfigError, match="frames must be at least 1"):
        ExportPlan(frames=0)


def test_a_context_is_refused(bundles):
    with pytest.raises(ConfigError, match="cuts no chunks"):
        BundleSeparator.load(bundles("one"), "cpu", context_s=0.01)


def test_streams_refuse_blocks_that_are_not_theirs(running):
    stream = running("one").stream(CLASSES, SEEN)
    with pytest.raises(AvsepError, match="must be mono"):
        stream.push(noise(64, 2))
    stream.push(noise(300))
    stream.flush()
    with pytest.raises(ConfigError, match="was flushed"):
        stream.push(noise(3))
    assert running("one").stream(CLASSES, SEEN).flush().shape == (2, 0)


def _state(manifest, name):
    return next(t for t in manifest["graphs"][0]["inputs"] if t["name"] == f"state_{name}")


def _drop(manifest):
    manifest["graphs"][0]["stream"]["states"].pop(0)


def _reshape(manifest):
    _state(manifest, "envelope")["shape"] = [1, 95]


def _rename(manifest):
    manifest["graphs"][0]["stream"]["states"][1]["output"] = "next_samples"


def _older(manifest):
    manifest["version"] = 3


def _no_stream(manifest):
    del manifest["graphs"][0]["stream"]


def _hop(manifest):
    for shapes in (manifest["transform"], manifest["separator"]["front_end"]):
        shapes["hop"] = 16
    manifest["chunking"]["align_samples"] = 16
    manifest["transform"]["frames"] = 128


@pytest.mark.parametrize("damage", [_drop, _reshape, _rename, _older, _no_stream, _hop])
def test_a_manifest_that_contradicts_itself_is_refused(damage, bundles):
    manifest = json.loads((bundles("one") / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    check_manifest(manifest, "x")
    check_schema(manifest, "x")
    damage(manifest)
    with pytest.raises(ExportError, match=r"x is damaged: .*; copy the bundle again") as error:
        check_manifest(manifest, "x")
    assert "\n" not in str(error.value)


def test_a_graph_that_computes_something_else_is_found(bundles, tmp_path):
    from avsep.export.bundle.export import sealed
    from avsep.files import sha256_file

    copy = tmp_path / "bundle"
    shutil.copytree(bundles("one"), copy)
    (golden,) = copy.glob("*.npz")
    with np.load(golden) as archive:
        arrays = dict(archive)
    arrays["sources"][-1] += 0.01  # the last call of the sequence alone
    np.savez(golden, **arrays)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][golden.name] = sha256_file(golden)
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ExportError, match=r"differs from its golden output by 1\.0"):
        verify_bundle(copy)


def test_bundles_of_chunks_keep_their_version(tmp_path):
    torch.manual_seed(0)
    made = export(causal_separator(decoder={"causal": False}), None, tmp_path / "bundle")
    assert made.manifest["version"] == 3
    assert "frames" not in made.manifest["plan"]
    assert "stream" not in made.manifest["graphs"][0]

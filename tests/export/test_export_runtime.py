"""The edge runtime: the separator's own results without torch, whole or as they arrive, and no seams."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import torch

from avsep.cli import main as avsep_main
from avsep.errors import AudioError, AvsepError, ConfigError, DataError, ExportError, NumericalError, UnknownNameError
from avsep.export.build.plan import ExportPlan
from avsep.export.bundle.export import export
from avsep.export.runtime import engines
from avsep.export.runtime.command import main as runtime_main
from avsep.export.runtime.reader import Bundle, Graph, TensorInfo, open_bundle
from avsep.export.runtime.separator import BundleSeparator
from avsep.export.runtime.sessions import OnnxSession, open_session, start_onnx
from avsep.export.runtime.wav import read_wav, write_wav
from avsep.inference.chunking import default_context, plan_chunks
from avsep.inference.recordings import separate_audio
from avsep.media.audio import read_audio
from avsep.media.timeline import VisualTimeline, write_visual_file
from avsep.separator import build_separator, save_separator
from support.nearby import NEARBY, ONE_VECTOR, error_db, nearby_parts

RATE, CLIP, HOP = 11025, 8191, 64
CLASSES = ("flute", "piano", "cello")
FRONT_END = {"sample_rate_hz": RATE, "clip_samples": CLIP, "n_fft": 254, "hop": HOP, "log_rows": 128}


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    made = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 8}),
        object_encoder=("precomputed", {"features": "o", "dim": 16}),
        motion_encoder=("precomputed", {"features": "m", "dim": 12}),
        mask_decoder=("query_transformer", {"dim": 32, "heads": 4, "feedforward": 64}),
        classes=CLASSES,
        front_end=FRONT_END,
    ).eval()
    with torch.no_grad():
        made.mask_decoder.head[-1].weight.mul_(20)  # masks that are far from one half, and differ from chunk to chunk
    return made


@pytest.fixture(scope="module")
def timelines():
    rng = np.random.default_rng(1)
    return {
        name: VisualTimeline(
            features={
                "o": rng.standard_normal((9, 16)).astype(np.float32),
                "m": rng.standard_normal((12, 8)).astype(np.float32),
            },
            where=f"video of {name}",
        )
        for name in CLASSES
    }


# fixed shapes, open ones, and the transforms outside with several chunks at once
PLANS = {"fixed": {}, "open": {"dynamic": True, "batch": 2}, "spectral": {"spectral": True, "batch": 3}}


class _Bundles(dict):
    """By form, made when asked for."""

    def __init__(self, separator, folder):
        self.separator, self.folder = separator, folder

    def __missing__(self, form):
        self[form] = export(self.separator, ExportPlan(**PLANS[form]), self.folder / form).path
        return self[form]


@pytest.fixture(scope="module")
def bundles(separator, tmp_path_factory):
    return _Bundles(separator, tmp_path_factory.mktemp("bundles"))


FORMS = ["fixed", *(pytest.param(form, marks=pytest.mark.slow) for form in ("open", "spectral"))]


@pytest.fixture(scope="module")
def runtime(bundles):
    return BundleSeparator.load(bundles["fixed"], provider="cpu", threads=1)


def music(samples, seed=0, low_hz=80.0, high_hz=3000.0):
    rng = np.random.default_rng(seed)
    time_s = np.arange(samples) / RATE
    tones = zip(rng.uniform(low_hz, high_hz, 8), rng.uniform(0, 6, 8), rng.uniform(0.3, 3, 8), strict=True)
    return (
        0.05 * sum(np.sin(2 * np.pi * f * time_s + p) * (1 + 0.5 * np.sin(2 * np.pi * m * time_s)) for f, p, m in tones)
    ).astype(np.float32)


def streamed(stream, mixture, block):
    parts = [stream.push(mixture[first : first + block]) for first in range(0, len(mixture), block)]
    return np.concatenate([*parts, stream.flush()], axis=1)


# --- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [("cello",), ("piano", "flute"), ("cello", "flute", "piano")])
def test_it_answers_as_the_separator(separator, bundles, timelines, form, classes):
    """Any form of graph, and fewer or more sources than it was made for: what PyTorch gives, in the order asked for."""
    mixture = music(int(3.3 * CLIP))
    expected = separate_audio(separator, mixture, timelines, classes)
    loaded = BundleSeparator.load(bundles[form], provider="cpu", threads=1)
    assert loaded.provider == "CPUExecutionProvider"
    found = loaded.separate(mixture, timelines, classes, RATE)
    assert found.shape == (len(classes), len(mixture))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.abs(expected).max() > 0.05


@pytest.mark.parametrize("samples", [1, 3000, CLIP - 1, CLIP, CLIP + 1, 2 * CLIP])
def test_any_length(separator, runtime, timelines, samples):
    """Objects are looked up at the middle of what a chunk holds of the recording: here they change eight times a
    second, several times in a chunk."""
    mixture = music(samples)
    quick = {name: dataclasses.replace(t, object_rate_hz=8.0) for name, t in timelines.items()}
    expected = separate_audio(separator, mixture, quick, ["piano", "flute"])
    np.testing.assert_allclose(runtime.separate(mixture, quick, ["piano", "flute"]), expected, atol=2e-6)
    block = max(samples // 3, 1)
    np.testing.assert_allclose(streamed(runtime.stream(["piano", "flute"], quick), mixture, block), expected, atol=2e-6)


def test_integers_and_doubles_are_the_same_audio(runtime, timelines):
    quiet = np.round(music(CLIP) * 2**15)
    expected = runtime.separate((quiet / 2**15).astype(np.float32), timelines, ["piano"])
    for same in (quiet.astype(np.int16), quiet.astype(np.int32) * 2**16, quiet / 2**15):
        np.testing.assert_array_equal(runtime.separate(same, timelines, ["piano"]), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1000, 30000])
def test_a_stream_gives_the_samples_of_the_whole(bundles, timelines, form, block):
    loaded = BundleSeparator.load(bundles[form], provider="cpu", threads=1)
    mixture = music(int(3.3 * CLIP), seed=2)
    expected = loaded.separate(mixture, timelines, ["piano", "flute", "cello"])
    stream = loaded.stream(["piano", "flute", "cello"], timelines, RATE)
    np.testing.assert_allclose(streamed(stream, mixture, block), expected, atol=1e-6)


def test_threads_share_a_separator():
    """The engine's output is a buffer that its next call overwrites."""
    made, _ = made_up(halves)
    buffer = np.empty((1, 2, CLIP), dtype=np.float32)

    def slowly(inputs):
        buffer[...] = halves(inputs)
        time.sleep(0.002)
        return buffer

    made._engine = Recorder(slowly)
    mixtures = [music(3 * CLIP, seed) for seed in range(3)]
    found = {}
    threads = [
        threading.Thread(target=lambda k=k, m=m: found.update({k: made.separate(m, features_of(), ["flute", "cello"])}))
        for k, m in enumerate(mixtures)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, mixture in enumerate(mixtures):
        np.testing.assert_allclose(found[k], mixture * np.array([[0.1], [0.3]], np.float32), atol=1e-6)


def test_another_context_is_the_separators_own(separator, bundles, duet, timelines, tmp_path, capsys):
    mixture = music(int(3.3 * CLIP))
    usual = BundleSeparator.load(bundles["fixed"], "cpu", threads=1)
    assert usual.context_samples == CLIP // 8
    wider = BundleSeparator.load(bundles["fixed"], "cpu", threads=1, context_s=0.18)
    assert wider.context_samples == int(0.18 * RATE)
    found = wider.separate(mixture, timelines, ["piano", "flute"])
    expected = separate_audio(separator, mixture, timelines, ["piano", "flute"], context_s=0.18)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.abs(found - usual.separate(mixture, timelines, ["piano", "flute"])).max() > 1e-4
    np.testing.assert_allclose(
        streamed(wider.stream(["piano", "flute"], timelines), mixture, 1000), expected, atol=2e-6
    )
    with pytest.raises(ConfigError, match=r"context 0\.2 s must lie between 0 and a quarter of a chunk \(0\.19 s\)"):
        BundleSeparator.load(bundles["fixed"], context_s=0.2)
    arguments = [str(duet / "duet.wav"), "--classes", "flute", "--features", str(duet / "features.npz")]
    arguments += ["--format", "FLOAT", "--context", "0.18", "--provider", "cpu"]
    assert runtime_main([str(bundles["fixed"]), *arguments, "--out", str(tmp_path / "a")]) == 0
    with pytest.raises(SystemExit):
        avsep_main(
            ["separate", *arguments, "--no-page", "--bundle", str(bundles["fixed"]), "--out", str(tmp_path / "b")]
        )
    save_separator(separator, tmp_path / "saved")
    with pytest.raises(SystemExit):
        avsep_main(
            ["separate", *arguments[:-2], "--no-page", "--run", str(tmp_path / "saved"), "--out", str(tmp_path / "c")]
        )
    first, *others = (read_audio(tmp_path / name / "duet_flute.wav")[0] for name in "abc")
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)
    capsys.readouterr()
    assert runtime_main([str(bundles["fixed"]), *arguments, "--context", "-1", "--out", str(tmp_path / "d")]) == 2
    assert "context -1.0 s" in capsys.readouterr().err


def test_streams_of_one_separator_take_turns(runtime, timelines):
    """Buffers are kept between calls; what one stream holds back must not lie in them."""
    mixtures = [music(2 * CLIP + 500, seed) for seed in (3, 4)]
    expected = [runtime.separate(m, timelines, ["piano", "flute"]) for m in mixtures]
    streams = [runtime.stream(["piano", "flute"], timelines) for _ in mixtures]
    parts = [[], []]
    for first in range(0, len(mixtures[0]), 700):
        for stream, mixture, part in zip(streams, mixtures, parts, strict=True):
            part.append(stream.push(mixture[first : first + 700]))
    for stream, part, whole in zip(streams, parts, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate([*part, stream.flush()], axis=1), whole)


def test_a_stream_keeps_its_latency(runtime, timelines):
    stream = runtime.stream(["piano"], timelines)
    assert stream.latency_samples == runtime.latency_samples == CLIP
    taken = given = 0
    for first in range(0, 4 * CLIP, 64):
        given += stream.push(music(64, first)).shape[1]
        taken += 64
        assert taken - given < stream.latency_samples + 64
    assert given > 3 * CLIP - 64


def test_buffers_are_kept(runtime, timelines):
    runtime.warm_up()
    bound = dict(runtime._engine._bound)
    runtime.separate(music(3 * CLIP), timelines, ["piano", "flute"])
    assert runtime._engine._bound == bound
    assert len(bound) == 1


def test_features_as_arrays_and_functions(runtime, timelines):
    mixture = music(int(2.6 * CLIP), seed=5)
    expected = runtime.separate(mixture, timelines, ["piano", "flute"])
    arrays = {n: {"object": t.features["o"], "motion": t.features["m"]} for n, t in timelines.items()}
    np.testing.assert_array_equal(runtime.separate(mixture, arrays, ["piano", "flute"]), expected)

    asked = []

    def seen(name):
        def at(middle_s, duration_s):
            asked.append((name, round(middle_s, 2), round(duration_s, 3)))
            rows = timelines[name].features["o"]
            return rows[np.clip(np.arange(int(middle_s) - 1, int(middle_s) + 2), 0, len(rows) - 1)]

        return at

    functions = {n: {"object": seen(n), "motion": t.features["m"]} for n, t in timelines.items()}
    stream = runtime.stream(["piano", "flute"], functions)
    assert not asked  # not before its time
    np.testing.assert_array_equal(streamed(stream, mixture, 999), expected)
    clip_s = round(CLIP / RATE, 3)
    starts = [
        c.start for c in plan_chunks(len(mixture), clip_samples=CLIP, context_samples=CLIP // 8, align_samples=HOP)
    ]
    middles = [round((s + min(CLIP, len(mixture) - s) // 2) / RATE, 2) for s in starts]
    assert asked == [(n, m, clip_s) for m in middles for n in ("piano", "flute")]

    constant = {n: {"object": t.features["o"][2], "motion": t.features["m"]} for n, t in timelines.items()}
    rows = {n: {"object": np.tile(c["object"], (5, 1)), "motion": c["motion"]} for n, c in constant.items()}
    np.testing.assert_array_equal(
        runtime.separate(mixture, constant, ["piano"]), runtime.separate(mixture, rows, ["piano"])
    )


@pytest.mark.slow
def test_frames_of_a_trained_run(tone_run, tone_store, tmp_path):
    """The encoders' graphs, fed with the store's frames chunk by chunk, and no clicks of trained weights."""
    from avsep.data.store import Store, timelines_of
    from avsep.export.bundle.export import export_run
    from avsep.separator import load_separator

    (bundle,) = export_run(tone_run, tmp_path / "bundle", tasks=1)
    store = Store.open(tone_store)
    clips = ["ding-test-0", "whirr-test-1"]
    timelines = timelines_of(store, clips)
    found = [store.read_audio(clip, 0, clip.samples) for clip in store.clips_by_id(clips)]
    mixture = np.tile(sum(found) / 2, 3)
    classes = ["whirr", "ding"]
    expected = separate_audio(load_separator(tone_run, 1), mixture, timelines, classes)
    loaded = BundleSeparator.load(bundle.path, provider="cpu", threads=1)
    np.testing.assert_allclose(loaded.separate(mixture, timelines, classes), expected, atol=1e-4)
    assert len(loaded._encoded) < 2 * 2 * len(seams(len(mixture)))  # fewer than the chunks' frames
    np.testing.assert_allclose(streamed(loaded.stream(classes, timelines), mixture, 1111), expected, atol=1e-4)
    frames = {n: {"object": t.object, "motion": t.motion} for n, t in timelines.items()}
    np.testing.assert_allclose(loaded.separate(mixture, frames, classes), expected, atol=1e-4)
    with pytest.raises(DataError, match=r"motion_encoder\.onnx takes"):
        loaded.separate(mixture, {n: {**p, "motion": p["motion"][:, :, 1:]} for n, p in frames.items()}, classes)


# --- seams ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nearby(tmp_path_factory):
    """Bundles of one separator with weights that see a neighbourhood alone: for chunks, and for nine times as long.

    The graph that is nine times as long takes a whole recording at once: its answer is what chunks must not differ
    from. Of a separator that attends to its whole chunk there is no such answer: a longer graph is another function.
    """
    with nearby_parts():
        torch.manual_seed(3)
        made = build_separator(
            audio_encoder=NEARBY,
            object_encoder=("precomputed", {"features": "o", "dim": 4}),
            motion_encoder=None,
            mask_decoder=ONE_VECTOR,
            classes=CLASSES,
            front_end=FRONT_END,
        ).eval()
        folder = tmp_path_factory.mktemp("nearby")
        short = export(made, ExportPlan(), folder / "short").path
        long = export(made, ExportPlan(length_s=9 * CLIP / RATE), folder / "long").path
    return BundleSeparator.load(short, "cpu", threads=1), BundleSeparator.load(long, "cpu", threads=1)


def seams(samples):
    plan = plan_chunks(samples, clip_samples=CLIP, context_samples=default_context(CLIP), align_samples=HOP)
    return [chunk.right for chunk in plan[:-1]]


def test_seams_are_60_db_below_the_whole(nearby):
    short, long = nearby
    noise = np.random.default_rng(0).standard_normal(long.clip_samples).astype(np.float32)
    mixture = 0.1 * noise + music(long.clip_samples)
    features = {name: {"object": np.zeros(4)} for name in CLASSES}
    whole = long.separate(mixture, features, ["piano", "cello"])  # one call of the long graph
    found = short.separate(mixture, features, ["piano", "cello"])
    places = seams(len(mixture))
    assert len(places) > 8
    assert error_db(whole[:, :CLIP], mixture[None, :CLIP] / 2) > -20  # the masks do something
    assert error_db(found, whole) < -60
    for place in places:
        around = slice(place - 100, place + 100)
        assert error_db(found[:, around], whole[:, around]) < -60
    # without context the same chunks miss the bar, so it can be missed
    short._chunking.update(context_samples=0, crossfade_samples=0)
    try:
        cut = short.separate(mixture, features, ["piano", "cello"])
    finally:
        short._chunking.update(context_samples=CLIP // 8, crossfade_samples=CLIP // 8 // 16)
    assert error_db(cut, whole) > -40


def test_no_clicks_where_the_network_sees_the_whole_chunk(runtime, timelines):
    """Its masks do change from chunk to chunk; the change must be slow.

    The mixture has no sound above 300 Hz, so fourth differences of samples are tiny but where something jumps.
    """
    mixture = music(int(7.3 * CLIP), seed=6, high_hz=300)

    def jumps(context):
        runtime._chunking.update(context_samples=context, crossfade_samples=context // 16)
        sources = runtime.separate(mixture, timelines, ["piano", "flute"])
        plan = plan_chunks(len(mixture), clip_samples=CLIP, context_samples=context, align_samples=HOP)
        steps = np.abs(np.diff(sources, n=4, axis=1))
        at_seam = np.zeros(steps.shape[1], dtype=bool)
        for chunk in plan[:-1]:
            at_seam[chunk.right - 100 : chunk.right + 100] = True
        return steps[:, at_seam].max() / steps[:, ~at_seam].max()

    try:
        assert jumps(0) > 10  # chunks that are only put side by side do click
        assert jumps(CLIP // 8) < 1.5
    finally:
        runtime._chunking.update(context_samples=CLIP // 8, crossfade_samples=CLIP // 8 // 16)


# --- graphs that are made up ------------------------------------------------------------------------------------------


class Recorder:
    """An engine that notes its calls."""

    provider = "made up"

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def run(self, inputs):
        self.calls.append({name: np.array(value) for name, value in inputs.items()})
        return {"output": self.answer(inputs)}


def made_up(answer, *, sources=2, independent=None, encoders=(), motion_mask=False, precision="fp32"):
    """A separator around engines of Python functions, with graphs of these shapes."""
    inputs = [
        TensorInfo("mixture", "float32", (1, CLIP)),
        TensorInfo("object_features", "float32", (1, sources, 5)),
        TensorInfo("motion_features", "float32", (1, sources, 3, 4)),
        TensorInfo("class_ids", "int64", (1, sources)),
    ]
    if motion_mask:
        inputs.append(TensorInfo("motion_mask", "bool", (1, sources, 4)))
    output = (TensorInfo("sources", "float32", (1, sources, CLIP)),)
    graph = Graph("s.onnx", "separator", precision, tuple(inputs), output, "", 1e-3, {"profiles": []})
    kind = "frames" if encoders else "features"
    manifest = {
        **({} if independent is None else {"independent_sources": independent}),
        "separator": {},
        "classes": list(CLASSES),
        "sample_rate_hz": RATE,
        "transform": {},
        "chunking": {"clip_samples": CLIP, "context_samples": 1000, "crossfade_samples": 60, "align_samples": HOP},
        "visual": [
            {"role": "object", "kind": kind, "name": "o", "dim": 5, "frames": 2},
            {"role": "motion", "kind": kind, "name": "m", "dim": 3, "frames": 0},
        ],
    }
    engine = Recorder(answer)
    return BundleSeparator(Bundle(None, manifest, (graph,)), graph, engine, dict(encoders)), engine


def halves(inputs):
    share = (1 + inputs["class_ids"][..., None]) / 10
    return (inputs["mixture"][:, None] * share).astype(np.float32)


def features_of(classes=CLASSES, steps=4):
    return {name: {"object": np.ones(5), "motion": np.ones((3, steps))} for name in classes}


@pytest.mark.parametrize("independent", [True, None], ids=["stated", "not stated"])
def test_more_sources_than_the_graph_has_run_in_groups(independent):
    """A bundle of an earlier avsep does not say whether its sources are independent: all of its decoders' were."""
    made, engine = made_up(halves, independent=independent)
    mixture = music(CLIP)
    found = made.separate(mixture, features_of(), ["cello", "flute", "piano"])
    for row, share in zip(found, (0.3, 0.1, 0.2), strict=True):
        np.testing.assert_allclose(row, share * mixture, atol=1e-7)
    assert [call["class_ids"].tolist() for call in engine.calls] == [[[2, 0]], [[1, 1]]]
    coupled, _ = made_up(halves, independent=False)
    coupled.separate(mixture, features_of(), ["cello", "flute"])
    for classes in (["cello"], ["cello", "flute", "piano"]):
        with pytest.raises(ConfigError, match=f"--sources {len(classes)}"):
            coupled.separate(mixture, features_of(), classes)


def test_frames_are_encoded_once_a_second_not_once_a_chunk():
    """Object frames change once a second, chunks come every half second, and one engine call serves all groups."""
    object_graph = Graph(
        "o.onnx",
        "object_encoder",
        "fp32",
        (TensorInfo("frames", "uint8", (1, 2, 3, 8, 8)),),
        (TensorInfo("features", "float32", (1, 5)),),
        "",
        1e-3,
        {"profiles": []},
    )
    encoder = Recorder(lambda inputs: np.full((1, 5), inputs["frames"].astype(float).mean(), dtype=np.float32))
    made, engine = made_up(halves, encoders=[("object", (object_graph, encoder))])
    seconds = 6
    frames = np.zeros((seconds, 3, 8, 8), dtype=np.uint8) + np.arange(seconds, dtype=np.uint8)[:, None, None, None]
    features = {
        name: {"object": frames + np.uint8(50 * k), "motion": np.ones((3, 4))} for k, name in enumerate(CLASSES)
    }
    made.separate(music(seconds * RATE), features, ["cello", "flute", "piano"])
    chunks = len(engine.calls) // 2
    assert chunks > 10
    assert len(encoder.calls) == 3 * seconds
    seen = [call["object_features"][0, 0, 0] for call in engine.calls[::2]]
    assert seen == sorted(seen)
    assert len(set(seen)) == seconds
    with pytest.raises(DataError, match=r"o.onnx takes \[2, 3, 8, 8\]"):
        made.separate(
            music(99), {"flute": {"object": np.zeros((9, 3, 7, 8), np.uint8), "motion": np.ones((3, 4))}}, ["flute"]
        )
    with pytest.raises(DataError, match="no graph of a motion encoder"):
        made.separate(music(99), {"flute": {"object": frames, "motion": np.zeros((9, 1, 8, 8), np.uint8)}}, ["flute"])
    with pytest.raises(DataError, match="uint8"):
        made.separate(music(99), {"flute": {"object": frames / 255, "motion": np.ones((3, 4))}}, ["flute"])
    # features that were encoded elsewhere need no graph: a row a second
    rows = {"flute": {"object": np.arange(6)[:, None] * np.ones(5), "motion": np.ones((3, 4))}}
    engine.calls.clear()
    made.separate(music(seconds * RATE), rows, ["flute"])
    assert sorted({call["object_features"][0, 0, 0] for call in engine.calls}) == [0, 1, 2, 3, 4, 5]


def test_motion_that_is_shorter_is_masked_where_the_graph_can():
    made, engine = made_up(halves, motion_mask=True)
    made.separate(music(99), features_of(steps=3), ["flute", "piano"])
    assert engine.calls[0]["motion_mask"].tolist() == [[[True] * 3 + [False]] * 2]
    assert engine.calls[0]["motion_features"].shape == (1, 2, 3, 4)
    for steps, graph in ((5, made), (3, made_up(halves)[0])):
        with pytest.raises(DataError, match=f"--motion-steps {steps}"):
            graph.separate(music(99), features_of(steps=steps), ["flute"])


@pytest.mark.parametrize(("precision", "way_out"), [("fp32", "avsep export verify"), ("fp16", "use the fp32 graph")])
def test_nan_of_the_graph_is_not_passed_on(precision, way_out):
    made, _ = made_up(lambda inputs: halves(inputs) * np.float32(np.nan), precision=precision)
    with pytest.raises(NumericalError, match=way_out):
        made.separate(music(CLIP), features_of(), ["flute"])


# --- mistakes ---------------------------------------------------------------------------------------------------------

SILENCE = np.zeros(CLIP, dtype=np.float32)
FEATURES = {name: {"object": np.ones(16), "motion": np.ones((12, 8))} for name in CLASSES}
MISTAKES = {
    "unknown class": ({"classes": ["flut"]}, UnknownNameError, "did you mean 'flute'"),
    "a string": ({"classes": "flute"}, ConfigError, r"\['flute'\], not one string"),
    "class twice": ({"classes": ["flute", "flute"]}, ConfigError, "'flute' is given twice"),
    "no classes": ({"classes": []}, ConfigError, "no classes given"),
    "NaN": ({"mixture": np.full(9, np.nan)}, AudioError, "9 NaN or infinite"),
    "infinite": ({"mixture": np.array([0, np.inf])}, AudioError, "1 NaN or infinite"),
    "empty": ({"mixture": SILENCE[:0]}, AudioError, "empty"),
    "stereo": ({"mixture": np.zeros((2, 99))}, AudioError, r"mono, .*\[2, 99\]"),
    "bytes": ({"mixture": np.zeros(9, dtype=np.uint8)}, AudioError, "got uint8"),
    "integers as floats": ({"mixture": np.array([0.0, 32767.0])}, AudioError, "divide 16-bit samples by 32768"),
    "wrong rate": ({"rate_hz": 96000}, AudioError, "96000 Hz, and this separator takes 11025 Hz: resample"),
    "no features": ({"features": None}, DataError, "of class 'flute': there are those of none"),
    "of another class": ({"features": {"harp": {}}}, DataError, "those of harp"),
    "not by role": ({"features": {"flute": np.ones(16)}}, DataError, "by role"),
    "missing role": ({"features": {"flute": {"object": np.ones(16)}}}, DataError, "no motion features"),
    "unknown role": ({"features": {"flute": {**FEATURES["flute"], "smell": 1}}}, DataError, "'smell'"),
    "width": ({"features": {"flute": {**FEATURES["flute"], "object": np.ones(15)}}}, DataError, "15 wide.* takes 16"),
    "rows' width": ({"features": {"flute": {**FEATURES["flute"], "object": np.ones((4, 9))}}}, DataError, "takes 16"),
    "motion": ({"features": {"flute": {**FEATURES["flute"], "motion": np.ones((8, 12))}}}, DataError, r"\[12, 8\]"),
    "steps": ({"features": {"flute": {**FEATURES["flute"], "motion": np.ones((12, 9))}}}, DataError, "-steps 9"),
    "NaN seen": ({"features": {"flute": {**FEATURES["flute"], "object": np.full(16, np.nan)}}}, DataError, "NaN"),
    "words": ({"features": {"flute": {**FEATURES["flute"], "object": ["a"]}}}, DataError, "must be numbers"),
    "frames": (
        {"features": {"flute": {**FEATURES["flute"], "object": np.zeros((4, 3, 8, 8), np.uint8)}}},
        DataError,
        "was given frames",
    ),
    "rate of frames": ({"features": {"flute": {**FEATURES["flute"], "object_rate_hz": 0}}}, DataError, "positive"),
    "batch": ({"batch": 2}, ConfigError, "takes 1 chunks a call"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(runtime, name):
    change, kind, words = MISTAKES[name]
    arguments = {"mixture": SILENCE, "features": FEATURES, "classes": ["flute"], "rate_hz": RATE, **change}
    with pytest.raises(kind, match=words) as raised:
        runtime.separate(**arguments)
    assert "\n" not in str(raised.value)
    if "mixture" not in change and "batch" not in change:
        arguments.pop("mixture")
        with pytest.raises(kind, match=words):
            runtime.stream(**arguments)
    elif name not in ("empty", "batch"):
        with pytest.raises(kind, match=words):
            runtime.stream(["flute"], FEATURES).push(arguments["mixture"])


def test_silence_is_separated_into_silence(runtime):
    assert np.abs(runtime.separate(SILENCE, FEATURES, ["flute"])).max() < 1e-6


def test_what_runs_is_chosen_and_told(bundles, monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown provider 'gpu'"):
        BundleSeparator.load(bundles["fixed"], provider="gpu")
    with pytest.raises(ExportError, match="holds no graph separator in int8"):
        BundleSeparator.load(bundles["fixed"], provider="cpu", precision="int8")
    with pytest.raises(ConfigError, match="threads"):
        BundleSeparator.load(bundles["fixed"], threads=-1)
    if not torch.cuda.is_available():
        for provider in ("cuda", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx"):
            with pytest.raises(ExportError) as raised:
                BundleSeparator.load(bundles["fixed"], provider=provider)
            assert "\n" not in str(raised.value)
        loaded = BundleSeparator.load(bundles["fixed"])
        assert loaded.provider == "CPUExecutionProvider"
        assert [line.partition(":")[0] for line in loaded.passed_over] == ["tensorrt", "tensorrt-rtx", "cuda"]

    import onnxruntime

    # ONNX Runtime lists what its build knows, and runs the CPU where that cannot load
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    real = onnxruntime.InferenceSession

    def falls_back(data, options, providers, **_):
        return real(data, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    with pytest.raises(ExportError, match="runs CPUExecutionProvider instead of CUDAExecutionProvider"):
        BundleSeparator.load(bundles["fixed"], provider="cuda")
    assert BundleSeparator.load(bundles["fixed"]).provider == "CPUExecutionProvider"
    bundle = open_bundle(bundles["fixed"])
    assert OnnxSession(bundle, bundle.graph(), "cuda", fall_back=True).provider == "CPUExecutionProvider"


@pytest.mark.parametrize("old", [False, True], ids=["told not to fall back", "falls back in any case"])
def test_a_provider_that_raises_is_told_from_a_damaged_graph(bundles, monkeypatch, capfd, old):
    """As onnxruntime-gpu does with TensorRT's provider where its libraries are missing: it raises, and, unless it is
    told not to (1.22 cannot be), prints a banner and takes the CPU."""
    import onnxruntime

    real = onnxruntime.InferenceSession

    def raises(model, options, providers, enable_fallback=1):
        if providers == ["TensorrtExecutionProvider"]:
            if old or enable_fallback:
                print("*** EP Error ***\nEP Error Please install\nTensorRT libraries\n when using ['T']\nFalling back")
                return real(model, options, providers=["CPUExecutionProvider"])
            raise RuntimeError("Please install\nTensorRT libraries")
        return real(model, options, providers=providers)

    names = ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", raises)
    bundle = open_bundle(bundles["fixed"])
    with pytest.raises(
        ExportError, match=r"instead of TensorrtExecutionProvider \(Please install TensorRT libraries\)"
    ):
        OnnxSession(bundle, bundle.graph(), "onnxruntime-tensorrt")
    fallen = OnnxSession(bundle, bundle.graph(), "onnxruntime-tensorrt", fall_back=True)
    assert fallen.provider == "CPUExecutionProvider"
    for fall_back in (False, True):
        with pytest.raises(ExportError, match="cannot load a graph"):
            start_onnx(b"\x3a\x00\x42\x00", "a graph", "onnxruntime-tensorrt", fall_back=fall_back)
    assert capfd.readouterr().out == ""


def test_inputs_that_a_graph_does_not_take_are_refused(bundles):
    bundle = open_bundle(bundles["fixed"])
    session = OnnxSession(bundle, bundle.graph(), threads=1)
    inputs, _ = bundle.golden(bundle.graph())
    for wrong, words in (
        ({**inputs, "class_ids": inputs["class_ids"].astype(np.float32)}, "'class_ids' is float32 .* takes int64"),
        ({**inputs, "mixture": inputs["mixture"][:, 1:]}, r"'mixture' is float32 \[1, 8190\]"),
        ({"mixture": inputs["mixture"]}, "takes mixture, object_features, .*, got mixture$"),
    ):
        with pytest.raises(ExportError, match=words):
            session.run(wrong)
    assert session.run(inputs)["sources"].shape == (1, 2, CLIP)
    session.close()
    session.close()
    with pytest.raises(ExportError, match="was closed"):
        session.run(inputs)


def test_what_was_opened_is_closed(bundles, monkeypatch):
    """With the separator, and where only some of the graphs have an engine: the device's memory is given back."""
    closed = []
    monkeypatch.setattr(OnnxSession, "close", lambda self: closed.append(self.graph.file))
    bundle = open_bundle(bundles["fixed"])
    broken = dataclasses.replace(bundle.graph(), file="other.onnx")
    with pytest.raises(ExportError, match=r"no file other\.onnx"):
        open_session(bundle, [bundle.graph(), broken], "cpu", 1)
    assert closed == ["separator.onnx"]
    with BundleSeparator.load(bundle, "cpu", threads=1):
        closed.clear()
    assert closed == ["separator.onnx"]


def test_engines_that_auto_does_not_take_are_told(bundles, duet, tmp_path, monkeypatch, capsys):
    """Someone who built an engine should not find out by the clock that the CPU runs."""
    folder = shutil.copytree(bundles["fixed"], tmp_path / "bundle")
    monkeypatch.setattr(engines, "find_gpu", lambda: (None, "the NVIDIA driver finds no GPU"))
    assert BundleSeparator.load(folder, threads=1).unused_engines == ()
    (folder / "engines").mkdir()
    (folder / "engines" / "separator.tensorrt-sm87.plan").write_bytes(b"of an Orin")
    (reason,) = BundleSeparator.load(folder, threads=1).unused_engines
    assert reason.startswith("tensorrt: ")
    assert BundleSeparator.load(folder, "cpu", threads=1).unused_engines == ()
    arguments = [str(duet / "duet.wav"), "--classes", "flute", "--features", str(duet / "features.npz")]
    assert runtime_main([str(folder), *arguments, "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err == f"note: {reason}\n"
    with pytest.raises(SystemExit):
        avsep_main(["separate", *arguments, "--no-page", "--bundle", str(folder), "--out", str(tmp_path / "b")])
    assert f"note: {reason}\n" in capsys.readouterr().err


def test_a_damaged_graph_is_refused_with_its_name(bundles, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["fixed"], folder)
    data = bytearray((folder / "separator.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "separator.onnx").write_bytes(data)
    with pytest.raises(ExportError, match=r"separator\.onnx is not the file that was exported"):
        BundleSeparator.load(folder, provider="cpu")


# --- without torch, and the commands ----------------------------------------------------------------------------------

REFUSE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
"""
ABSENT_ON_THE_DEVICE = (
    "torch", "pydantic", "typer", "click", "rich", "soundfile", "soxr", "yaml", "safetensors", "onnx", "onnxscript",
    "lightning_fabric", "matplotlib", "triton", "scipy",
)  # fmt: skip


@pytest.fixture(scope="module")
def duet(timelines, tmp_path_factory):
    """A WAV file of some chunks and a file of features."""
    folder = tmp_path_factory.mktemp("duet")
    write_visual_file(folder / "features.npz", timelines)
    soundfile.write(folder / "duet.wav", music(int(2.3 * CLIP), seed=8), RATE, subtype="FLOAT")
    return folder


def test_it_runs_where_there_is_no_torch(bundles, duet, tmp_path, runtime, timelines):
    """Import, whole recordings, streams and the device's command, with an import of anything heavy refused."""
    command = [
        str(bundles["spectral"]),
        str(duet / "duet.wav"),
        "--classes",
        "piano,flute",
        "--out",
        str(tmp_path / "o"),
    ]
    command += ["--features", str(duet / "features.npz"), "--provider", "cpu", "--format", "FLOAT", "--threads", "1"]
    code = REFUSE.format(names=ABSENT_ON_THE_DEVICE) + (
        "import numpy as np\n"
        "import avsep.export.runtime as runtime\n"
        "assert 'onnxruntime' not in sys.modules\n"
        f"separator = runtime.BundleSeparator.load({str(bundles['fixed'])!r}, 'cpu')\n"
        "features = {'flute': {'object': np.ones(16), 'motion': np.ones((12, 8))}}\n"
        "assert separator.separate(np.zeros(9000), features, ['flute']).shape == (1, 9000)\n"
        "assert separator.stream(['flute'], features).push(np.zeros(9000)).shape[1] > 0\n"
        f"assert not [m for m in {ABSENT_ON_THE_DEVICE!r} if m in sys.modules]\n"
        f"sys.exit(runtime.main({command!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CPUExecutionProvider" in done.stdout
    assert done.stderr == ""
    mixture = read_audio(duet / "duet.wav")[0][0]
    found = [read_audio(tmp_path / "o" / f"duet_{name}.wav")[0][0] for name in ("piano", "flute", "residual")]
    np.testing.assert_allclose(found[:2], runtime.separate(mixture, timelines, ["piano", "flute"]), atol=2e-6)
    np.testing.assert_allclose(sum(found), mixture, atol=1e-6)


def test_the_command_of_a_bundles_readme_runs(bundles, duet, tmp_path, monkeypatch, capsys):
    shutil.copytree(bundles["fixed"], tmp_path / "fixed")
    shutil.copyfile(duet / "duet.wav", tmp_path / "recording.wav")
    shutil.copyfile(duet / "features.npz", tmp_path / "features.npz")
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "fixed" / "README.md").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("avsep-runtime ")]
    assert runtime_main(command.split()[1:]) == 0, capsys.readouterr().err
    names = ["recording_flute.wav", "recording_piano.wav", "recording_residual.wav"]
    assert sorted(p.name for p in (tmp_path / "separated").iterdir()) == names


DEVICE_MISTAKES = {
    "no bundle": ({0: "nowhere"}, "no such bundle"),
    "no audio": ({1: "nowhere.wav"}, "no such audio file"),
    "no wav": ({1: "features.npz"}, "is not a WAV file"),
    "96 kHz": ({1: "fast.wav"}, "96000 Hz, and this separator takes 11025"),
    "truncated": ({1: "short.wav"}, "truncated"),
    "class": ({3: "flute,harp"}, "has not learned class 'harp'"),
    "no features": ({5: None}, "give --features"),
    "provider": ({7: "gpu"}, "unknown provider 'gpu': choose one of auto, cpu, cuda"),
}


@pytest.mark.parametrize("name", DEVICE_MISTAKES)
def test_the_devices_command_ends_in_one_line(bundles, duet, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(duet)
    soundfile.write(duet / "fast.wav", np.zeros(500), 96000)
    (duet / "short.wav").write_bytes((duet / "duet.wav").read_bytes()[:2000])
    arguments = [
        str(bundles["fixed"]),
        "duet.wav",
        "--classes",
        "flute",
        "--features",
        "features.npz",
        "--provider",
        "cpu",
    ]
    change, words = DEVICE_MISTAKES[name]
    for place, value in change.items():
        arguments[place] = value
    if None in arguments:
        arguments = [a for a in arguments if a not in (None, "--features")]
    assert runtime_main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_devices_command_rescales(bundles, duet, tmp_path, capsys):
    loud = 12 * music(CLIP, seed=8)
    soundfile.write(tmp_path / "loud.wav", loud, RATE, subtype="FLOAT")
    arguments = [str(bundles["fixed"]), str(tmp_path / "loud.wav"), "--classes", "flute", "--provider", "cpu"]
    arguments += ["--features", str(duet / "features.npz")]
    assert runtime_main([*arguments, "--out", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "were clipped: --rescale scales all files by one factor instead, --format FLOAT keeps every sample" in told
    assert runtime_main([*arguments, "--rescale", "--out", str(tmp_path / "b")]) == 0
    told = capsys.readouterr().out
    assert "clipped" not in told
    gain = float(told.partition("all files are scaled by ")[2].split()[0])
    parts = [read_audio(tmp_path / "b" / f"loud_{name}.wav")[0][0] for name in ("flute", "residual")]
    np.testing.assert_allclose(sum(parts), gain * loud, atol=1e-3)
    assert max(np.abs(part).max() for part in parts) == pytest.approx(1, abs=1e-4)
    assert runtime_main([*arguments, "--rescale", "--format", "FLOAT", "--out", str(tmp_path / "c")]) == 2
    assert "--rescale does nothing" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_separate_with_a_bundle_and_with_its_separator(separator, bundles, duet, tmp_path, capsys):
    """``avsep separate`` gives the same files either way, at any rate of the recording."""
    save_separator(separator, tmp_path / "saved")
    soundfile.write(tmp_path / "duet.flac", np.stack([music(40000, 1), music(40000, 2)], axis=1), 44100)
    shared = [str(tmp_path / "duet.flac"), "--classes", "piano,cello", "--features", str(duet / "features.npz")]
    shared += ["--format", "FLOAT", "--no-page", "--mono"]
    for option, place, out in (("--run", tmp_path / "saved", "a"), ("--bundle", bundles["fixed"], "b")):
        with pytest.raises(SystemExit) as stop:
            avsep_main(["separate", *shared, option, str(place), "--out", str(tmp_path / out)])
        assert stop.value.code == 0
    assert "CPUExecutionProvider" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert len(names) == 3
    for name in names:
        first, second = (read_audio(tmp_path / folder / name) for folder in "ab")
        assert first[1] == second[1] == RATE
        np.testing.assert_allclose(first[0], second[0], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "features.npz: 'flute' has no object frames"),  # the separator that comes along takes frames
        (["--run", "x", "--bundle", "y"], "--run RUN, or --bundle BUNDLE"),
        (["--bundle", "BUNDLE", "--task", "1"], "--task goes with --run"),
        (["--bundle", "BUNDLE", "--device", "cpu"], "--device goes with --run"),
        (["--run", "x", "--provider", "cpu"], "--provider goes with --bundle"),
        (["--bundle", "BUNDLE", "--batch", "2"], "takes 1 chunks a call"),
        (["--bundle", "nowhere"], "no such bundle"),
        (["--bundle", "BUNDLE", "--classes", "harp"], "has not learned class 'harp'"),
    ],
)
def test_mistakes_of_separate_with_a_bundle(bundles, duet, tmp_path, capsys, options, words):
    options = [str(bundles["fixed"]) if o == "BUNDLE" else o for o in options]
    arguments = ["separate", str(duet / "duet.wav"), "--features", str(duet / "features.npz"), "--classes", "flute"]
    with pytest.raises(SystemExit) as stop:
        avsep_main([*arguments, "--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_separating_with_a_bundle_loads_no_torch(bundles, duet, tmp_path):
    code = (
        f"import sys, json\nfrom avsep.cli import main\n"
        f"sys.argv[1:] = json.loads({json.dumps(json.dumps(['separate', str(duet / 'duet.wav'), '--bundle', str(bundles['fixed']), '--features', str(duet / 'features.npz'), '--classes', 'flute', '--out', str(tmp_path / 'out')]))})\n"  # noqa: E501
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- WAV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
def test_wav_files_are_read_as_libsndfile_reads_them(tmp_path, subtype, kind):
    audio = 0.9 * np.random.default_rng(0).uniform(-1, 1, (1001, 2))
    soundfile.write(tmp_path / "a.wav", audio, 22050, subtype=subtype, format=kind)
    found, rate_hz = read_wav(tmp_path / "a.wav")
    expected, _ = read_audio(tmp_path / "a.wav")
    assert rate_hz == 22050
    np.testing.assert_array_equal(found, expected)


def test_wav_files_are_written_as_libsndfile_reads_them(tmp_path):
    audio = np.array([0, 0.5, -1, 1, 1.5, -2, 2**-15], dtype=np.float32)
    assert write_wav(tmp_path / "a.wav", audio, 8000, "FLOAT") == 0
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav")[0][0], audio)
    assert write_wav(tmp_path / "a.wav", audio, 8000) == 2
    top = 1 - 2.0**-15
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav")[0][0], [0, 0.5, -1, top, top, -1, 2**-15], atol=1e-7)
    both = np.stack([audio, -0.5 * audio])
    for subtype, clipped in (("FLOAT", 0), ("PCM_16", 2)):
        assert write_wav(tmp_path / "s.wav", both, 8000, subtype) == clipped
        for found, rate_hz in (read_audio(tmp_path / "s.wav"), read_wav(tmp_path / "s.wav")):
            assert rate_hz == 8000
            np.testing.assert_allclose(found, both if subtype == "FLOAT" else both.clip(-1, top), atol=2e-5)
    for wrong in (audio[:0], both[None], both[:0], both[:, :0], np.array([np.nan], dtype=np.float32)):
        with pytest.raises(AudioError, match="cannot write"):
            write_wav(tmp_path / "b.wav", wrong, 8000)
    with pytest.raises(ConfigError, match="PCM_24"):
        write_wav(tmp_path / "b.wav", audio, 8000, "PCM_24")
    assert not (tmp_path / "b.wav").exists()


@pytest.mark.parametrize("cut", [0, 4, 11, 12, 19, 30, 43, 44, 45, 60])
def test_damaged_wav_files_are_one_line(tmp_path, cut):
    write_wav(tmp_path / "a.wav", music(100), 8000)
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:cut])
    with pytest.raises(AvsepError) as raised:
        read_wav(tmp_path / "a.wav")
    assert "\n" not in str(raised.value)

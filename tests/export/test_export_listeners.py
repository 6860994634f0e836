"""Graphs and the runtime of separators that tell presence, go unseen, bring every level to one, and keep channels."""

from __future__ import annotations

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from avsep.errors import AudioError, ConfigError, DataError, ExportError
from avsep.export import ExportPlan, export, open_bundle, verify_bundle
from avsep.export.build import graphs
from avsep.export.build.gate import synthetic_batches
from avsep.export.build.graph import fitted, with_limited_sum
from avsep.export.runtime.calls import GraphCall
from avsep.export.runtime.command import main as runtime_main
from avsep.export.runtime.manifest import MANIFEST
from avsep.export.runtime.separator import BundleSeparator
from avsep.inference.recordings import separate_and_tell
from avsep.media.timeline import VisualTimeline, write_visual_file
from avsep.separator import build_separator, save_separator
from support.bundles import write_sealed
from support.commands import run
from support.listeners import listener_part, listening_separator
from support.tones import BUNDLE_CLASSES, RATE, TINY_FRONT_END

pytestmark = pytest.mark.slow

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

CLIP = 8191
LEVEL_DB = -25.0


@pytest.fixture(scope="module", autouse=True)
def part():
    with listener_part():
        yield


@pytest.fixture(scope="module")
def separator(part):
    return listening_separator(level_db=LEVEL_DB).requires_grad_(False)


@pytest.fixture(scope="module")
def timelines():
    rng = np.random.default_rng(1)
    return {
        name: VisualTimeline(
            features={
                "o": rng.standard_normal((9, 8)).astype(np.float32),
                "m": rng.standard_normal((6, 8)).astype(np.float32),
            },
            where=f"video of {name}",
        )
        for name in BUNDLE_CLASSES
    }


PLANS = {
    "mono": {},
    "stereo": {"channels": 2},
    "limited": {"spectral": True, "channels": 2, "dynamic": True, "batch": 2, "limit_mask_sum": True},
}


@pytest.fixture(scope="module")
def bundles(separator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {name: export(separator, ExportPlan(**plan), folder / name).path for name, plan in PLANS.items()}


@pytest.fixture(scope="module")
def runtimes(bundles):
    return {name: BundleSeparator.load(path, provider="cpu", threads=1) for name, path in bundles.items()}


def music(samples, seed=0):
    rng = np.random.default_rng(seed)
    time_s = np.arange(samples) / RATE
    tones = zip(rng.uniform(80, 3000, 8), rng.uniform(0, 6, 8), rng.uniform(0.3, 3, 8), strict=True)
    return (
        0.05 * sum(np.sin(2 * np.pi * f * time_s + p) * (1 + 0.5 * np.sin(2 * np.pi * m * time_s)) for f, p, m in tones)
    ).astype(np.float32)


def stereo(samples):
    return np.stack([music(samples), 0.3 * music(samples, 1)])


# --- bundles ----------------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_the_graphs_do(bundles, separator):
    tensors = {}
    for name, path in bundles.items():
        bundle = open_bundle(path)
        (graph,) = bundle.graphs
        tensors[name] = {t.name: t.shape for t in (*graph.inputs, *graph.outputs)}
        assert bundle.manifest["version"] == 3
        assert bundle.manifest["presence_threshold"] == pytest.approx(0.4)
        assert bundle.manifest["separator"]["front_end"]["level_db"] == LEVEL_DB
        assert graph.entry["parity"]["max_error"] < 1e-4
        assert graph.entry["gate"]["passed"]
        assert bundle.manifest["independent_sources"] is (name != "limited")
        assert verify_bundle(path).graphs[0].max_error < 1e-4
        for text in ("`seen`", "`presence`", "below 0.4 it probably does not"):
            assert text in (path / "README.md").read_text()
    assert list(tensors["mono"]) == [
        *("mixture", "object_features", "motion_features", "seen", "motion_seen", "class_ids", "sources", "presence")
    ]
    assert (tensors["mono"]["mixture"], tensors["mono"]["sources"]) == ((1, CLIP), (1, 2, CLIP))
    assert (tensors["stereo"]["mixture"], tensors["stereo"]["sources"]) == ((1, 2, CLIP), (1, 2, 2, CLIP))
    assert tensors["stereo"]["seen"] == tensors["stereo"]["presence"] == (1, 2)
    assert tensors["limited"]["spectrum"] == ("batch", 2, 2, 128, 128)
    assert tensors["limited"]["estimate"] == ("batch", "sources", 2, 2, 128, 128)
    assert tensors["limited"]["seen"] == tensors["limited"]["presence"] == ("batch", "sources")
    manifest = open_bundle(bundles["limited"]).manifest
    assert manifest["separator"]["front_end"]["limit_mask_sum"] is True
    assert manifest["channels"] == manifest["plan"]["channels"] == 2
    assert "channels" not in open_bundle(bundles["mono"]).manifest
    assert not separator.spec.front_end.limit_mask_sum  # left as it was


def test_golden_inputs_have_every_case(bundles):
    for name, path in bundles.items():
        bundle = open_bundle(path)
        inputs, outputs = bundle.golden(bundle.graphs[0])
        assert {True, False} == set(inputs["seen"].flatten().tolist())
        assert np.ptp(outputs["presence"]) > 0.01
        assert outputs["presence"].min() >= 0
        assert outputs["presence"].max() <= 1
        if name != "mono":
            mixture = inputs.get("mixture", inputs.get("spectrum"))
            assert np.abs(mixture[:, 0] - mixture[:, 1]).max() > 0.01  # the channels differ


def test_a_bundle_without_these_is_as_before(tiny_bundle):
    manifest = json.loads((tiny_bundle / MANIFEST).read_text())
    assert manifest["version"] == 2
    assert not {"channels", "presence_threshold"} & set(manifest)
    assert set(manifest["separator"]["front_end"]) == set(manifest["separator"]["front_end"]) - {"level_db"}
    assert [t["name"] for t in manifest["graphs"][0]["outputs"]] == ["sources"]
    loaded = BundleSeparator.load(tiny_bundle, provider="cpu", threads=1)
    assert (loaded.channels, loaded.can_go_unseen, loaded.tells_presence) == (1, False, False)
    assert loaded.presence_threshold is None
    assert not loaded.limits_mask_sum
    features = {name: {"object": np.ones(8, np.float32)} for name in ("flute", "piano")}
    found = loaded.separate_with_presence(music(3000), features, ["flute", "piano"])
    assert found.presence is None
    with pytest.raises(DataError, match="of class 'flute': there are those of none"):
        loaded.separate(music(3000), None, ["flute", "piano"])
    with pytest.raises(AudioError, match=r"must be mono, \[samples\] .*2 channels .*--channels 2"):
        loaded.separate(stereo(3000), features, ["flute", "piano"])


def _changed(manifest, **changes):
    manifest.update(changes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: _changed(m, channels=3), "takes mixture [1, 2, 8191], and the bundle has 3 channels"),
        (lambda m: _changed(m, channels=0), "channels = 0"),
        (lambda m: _changed(m, channels="2"), 'channels = "2"'),
        (lambda m: m.pop("presence_threshold"), "tells presence, and there is no presence_threshold"),
        (lambda m: _changed(m, presence_threshold=1.5), "presence_threshold = 1.5 is no probability"),
        (lambda m: _changed(m, presence_threshold=True), "presence_threshold = true"),
        (lambda m: _changed(m, version=5), "bundle version 5, this avsep reads 2, 3 and 4: update avsep"),
        (lambda m: m["graphs"][0]["outputs"].append(dict(m["graphs"][0]["outputs"][0], name="more")), "more: one of"),
        (lambda m: m["graphs"][0]["outputs"].pop(0), "gives presence: one of"),
        (lambda m: m["graphs"][0]["inputs"].append(dict(m["graphs"][0]["inputs"][0], name="loud")), "takes mixture"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(bundles, tmp_path, change, told):
    shutil.copytree(bundles["stereo"], tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / MANIFEST).read_text())
    change(manifest)
    write_sealed(tmp_path / "bundle", manifest)
    with pytest.raises(ExportError) as caught:
        BundleSeparator.load(tmp_path / "bundle")
    assert told in str(caught.value)


@pytest.mark.parametrize(("given", "told"), [({"channels": 0}, "at least 1, got 0"), ({"channels": 65}, "at most 64")])
def test_channels_that_are_none(given, told):
    with pytest.raises(ConfigError, match=f"channels must be {told}"):
        ExportPlan(**given)


def test_the_limit_changes_the_front_end_alone(separator):
    limited = with_limited_sum(separator)
    assert limited.spec.front_end.limit_mask_sum
    assert limited.mask_decoder is separator.mask_decoder
    assert with_limited_sum(limited) is limited
    assert fitted(separator, ExportPlan()) is separator


def test_the_info_tells_of_it(bundles, capfd):
    assert run("export", "info", bundles["limited"]) == 0
    shown = capfd.readouterr().out
    for words in ("2, or mono", "sum up to at most 1", "from 0.4 on it counts as present", "welcome, not required"):
        assert words in shown


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param({"limit_mask_sum": True}, marks=pytest.mark.slow),
        pytest.param({"dynamic": True, "batch": 2, "motion_mask": True}, marks=pytest.mark.slow),
    ],
)
def test_mean_pictures_go_into_the_graph(timelines, tmp_path, plan):
    """A decoder that needs pictures is shown the class's mean by the graph itself."""
    torch.manual_seed(3)
    separator = build_separator(
        num_classes=3,
        audio_encoder=("unet7", {"base_channels": 2, "mask_channels": 4}),
        object_encoder=("precomputed", {"features": "o", "dim": 8}),
        motion_encoder=("precomputed", {"features": "m", "dim": 6}),
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 2}),
        classes=BUNDLE_CLASSES,
        front_end=TINY_FRONT_END,
    ).eval()
    with torch.no_grad():
        separator.mask_decoder.head[-1].weight.mul_(10)
    separator.class_means = {"object": 2 * torch.randn(3, 8), "motion": 2 * torch.randn(3, 6, 4)}
    bundle = export(separator, ExportPlan(**plan), tmp_path / "bundle").path
    runtime = BundleSeparator.load(bundle, provider="cpu", threads=1)
    assert runtime.can_go_unseen
    assert open_bundle(bundle).manifest["version"] == 3
    found = []
    for shown in (("flute", "piano"), ("piano",), ()):
        seen = {name: timelines[name] for name in shown}
        expected = separate_and_tell(
            separator,
            music(CLIP + 900),
            seen,
            ["piano", "flute"],
            limit_mask_sum="limit_mask_sum" in plan,
        ).sources
        found.append(runtime.separate(music(CLIP + 900), seen or None, ["piano", "flute"]))
        np.testing.assert_allclose(found[-1], expected, atol=1e-4)
    assert np.abs(found[0] - found[2]).max() > 1e-3


# --- the same results as in PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("shown", [("flute", "piano"), ("piano",), ()])
def test_it_answers_as_the_separator(runtimes, separator, timelines, name, shown):
    """Long, mono and stereo, each source seen or not."""
    runtime, classes = runtimes[name], ["piano", "flute"]
    seen = {one: timelines[one] for one in shown}
    expected_of = {}
    for mixture in (music(int(2.6 * CLIP)), stereo(int(2.6 * CLIP))):
        if name == "mono" and mixture.ndim == 2:
            continue
        expected = separate_and_tell(separator, mixture, seen, classes, limit_mask_sum=name == "limited")
        found = runtime.separate_with_presence(mixture, seen or None, classes, RATE)
        assert found.sources.shape == (2, *mixture.shape)
        np.testing.assert_allclose(found.sources, expected.sources, atol=1e-4)
        np.testing.assert_allclose(found.presence, expected.presence, atol=1e-4)
        expected_of[mixture.ndim] = expected
    assert np.ptp(expected_of[1].presence) > 1e-3
    assert np.abs(expected_of[1].sources[0] - expected_of[1].sources[1]).max() > 1e-2


def test_a_picture_makes_a_difference(runtimes, timelines):
    mixture, classes = music(CLIP), ["piano", "flute"]
    with_both = runtimes["mono"].separate(mixture, timelines, classes)
    with_one = runtimes["mono"].separate(mixture, {"flute": timelines["flute"]}, classes)
    np.testing.assert_allclose(with_both[1], with_one[1], atol=1e-6)
    assert np.abs(with_both[0] - with_one[0]).max() > 1e-2


def test_channels_keep_their_places(runtimes, timelines):
    """A side that is silent stays so, and two that are equal come out equal."""
    runtime, classes = runtimes["stereo"], ["piano", "flute"]
    mixture = music(2 * CLIP)
    panned = runtime.separate(np.stack([mixture, 0 * mixture]), timelines, classes)
    assert np.abs(panned[:, 1]).max() == 0
    assert np.abs(panned[:, 0]).max() > 0.01
    same = runtime.separate(np.stack([mixture, mixture]), timelines, classes)
    np.testing.assert_array_equal(same[:, 0], same[:, 1])
    np.testing.assert_allclose(runtime.separate(mixture, timelines, classes), same[:, 0], atol=1e-6)
    one = runtime.separate(mixture[None], timelines, classes)
    np.testing.assert_array_equal(one[:, 0], runtime.separate(mixture, timelines, classes))


def test_the_level_does_not_matter(runtimes, separator, timelines, tiny_bundle):
    mixture, classes = music(2 * CLIP), ["piano", "flute"]
    loud = runtimes["mono"].separate_with_presence(mixture, timelines, classes)
    quiet = runtimes["mono"].separate_with_presence(0.05 * mixture, timelines, classes)
    np.testing.assert_allclose(quiet.sources, 0.05 * loud.sources, atol=1e-5)
    np.testing.assert_allclose(quiet.presence, loud.presence, atol=1e-4)
    other = BundleSeparator.load(tiny_bundle, provider="cpu", threads=1)  # without a reference level it does
    features = {name: {"object": np.ones(8, np.float32)} for name in classes}
    off = other.separate(0.05 * mixture, features, classes) - 0.05 * other.separate(mixture, features, classes)
    assert np.abs(off).max() > 1e-4
    silent = runtimes["mono"].separate_with_presence(0 * mixture, timelines, classes)
    assert not silent.sources.any()
    assert np.isfinite(silent.presence).all()


def test_limited_masks_leave_no_part_louder_than_the_mixture(runtimes, separator, timelines):
    mixture, classes = stereo(2 * CLIP), list(BUNDLE_CLASSES)
    limited = runtimes["limited"].separate(mixture, timelines, classes)
    free = separate_and_tell(separator, mixture, timelines, classes).sources
    energy = np.sum(mixture.astype(np.float64) ** 2)
    parts = [*limited, mixture - limited.sum(axis=0)]
    assert max(np.sum(part.astype(np.float64) ** 2) for part in parts) <= energy
    assert np.sum((mixture - free.sum(axis=0)) ** 2) > 1.01 * np.sum(parts[-1] ** 2)  # the limit did something


@pytest.mark.slow
def test_sources_of_limited_masks_depend_on_each_other(separator, tmp_path):
    """A graph of a fixed number would count a repeated source twice."""
    plan = ExportPlan(limit_mask_sum=True, sources=3)
    limited = fitted(copy.deepcopy(separator), plan)
    # the gate asks for two sources: PyTorch is asked as the graph is
    batches = list(synthetic_batches(limited, ExportPlan(sources=2), 2))
    made = graphs.write_graphs(limited, plan, tmp_path, batches)
    assert max(made[0].gate.max_drift_db.values()) < 0.01


def test_a_fixed_graph_of_limited_masks_takes_its_number_alone(bundles, runtimes, timelines, monkeypatch):
    runtime = BundleSeparator.load(bundles["stereo"], provider="cpu", threads=1)
    monkeypatch.setattr(runtime, "_independent", False)
    with pytest.raises(ConfigError, match="1 classes are asked for, and this bundle's graph takes 2"):
        runtime.separate(music(100), timelines, ["flute"])


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [997, 20000])
def test_a_stereo_stream_gives_the_samples_of_the_whole(runtimes, timelines, block):
    runtime, classes = runtimes["stereo"], ["piano", "flute"]
    seen = {"flute": timelines["flute"]}
    mixture = stereo(int(2.6 * CLIP))
    whole = runtime.separate_with_presence(mixture, seen, classes)
    stream = runtime.stream(classes, seen, RATE, channels=2)
    assert stream.presence is None
    parts, told = [], []
    for first in range(0, mixture.shape[1], block):
        parts.append(stream.push(mixture[:, first : first + block]))
        told += [] if stream.presence is None else [stream.presence]
    parts.append(stream.flush())
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), whole.sources)
    np.testing.assert_array_equal(stream.presence, whole.presence)
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(told))
    mono = runtime.stream(classes, seen)
    parts = [mono.push(mixture[0]), mono.flush()]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), runtime.separate(mixture[0], seen, classes))


def test_wrong_audio_is_one_line(runtimes, timelines):
    runtime, classes = runtimes["stereo"], ["piano", "flute"]
    for audio, told in (
        (np.zeros((3, 99)), r"must be mono or \[2, samples\] for this bundle, got 3 channels .*--channels 3"),
        (np.zeros((99, 2)), r"got 99 channels in shape \[99, 2\]"),
        (np.zeros((1, 2, 99)), r"\[channels, samples\], got shape \[1, 2, 99\]"),
        (np.zeros((0, 99)), r"got shape \[0, 99\]"),
        (np.zeros((2, 0)), "the mixture is empty"),
        (np.full((2, 9), np.nan), "18 NaN"),
    ):
        with pytest.raises(AudioError, match=told):
            runtime.separate(audio, timelines, classes)
    with pytest.raises(AudioError, match="3 channels"):
        runtime.stream(classes, timelines, channels=3)
    with pytest.raises(AudioError, match=r"must be mono, \[samples\], got shape \[2, 9\].*channels=C"):
        runtime.stream(classes, timelines).push(np.zeros((2, 9)))
    with pytest.raises(ConfigError, match=r"blocks \[2, l\]"):
        runtime.stream(classes, timelines, channels=2).push(np.zeros(9))


def test_half_a_picture_is_none(runtimes, timelines):
    """A class that has something, but not all that is looked at, is a mistake and not unseen."""
    with pytest.raises(DataError, match="class 'flute' has no motion features"):
        runtimes["mono"].separate(music(99), {"flute": {"object": np.ones(8)}}, ["flute"])
    with pytest.raises(DataError, match="'o'"):
        runtimes["mono"].separate(music(99), {"flute": VisualTimeline()}, ["flute"])


def test_graph_calls_refuse_other_channels():
    call = GraphCall(lambda inputs: {"sources": inputs["mixture"]}, False, {}, channels=2)
    with pytest.raises(ConfigError, match="takes 2 channels, not 3"):
        call(np.zeros((1, 3, 9), np.float32), {"class_ids": np.zeros((1, 1), np.int64)})


# --- lower precisions -------------------------------------------------------------------------------------------------


@pytest.mark.slow  # half a minute of calibration and compilation
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_pass_the_gate(separator, tmp_path, precision):
    plan = ExportPlan(precision=(precision,), channels=2, limit_mask_sum=True, calibration=2, gate_db=0.5)
    limited = fitted(copy.deepcopy(separator), plan)
    batches = synthetic_batches(limited, plan, 3)
    (made,) = graphs.write_graphs(limited, plan, tmp_path, batches[:1], batches[1:], batches[1:])
    assert [spec.name for spec in made.outputs] == ["sources", "presence"]
    assert made.gate.passed
    assert made.parity.max_error < 0.05
    if precision == "int8":
        assert made.quantised["layers"] >= 1


@pytest.mark.slow
def test_tensorrt_rtx_takes_them(separator, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from avsep.export.targets.tensorrt import build

    plan = ExportPlan(precision=("fp16",), channels=2, limit_mask_sum=True)
    limited = fitted(copy.deepcopy(separator), plan)
    (made,) = graphs.write_graphs(limited, plan, tmp_path)
    for target in (75, 86, 120):
        build(
            tmp_path / made.file, tmp_path / "x.plan", target="tensorrt-rtx", compute_capability=target, progress=False
        )


# --- the command lines ------------------------------------------------------------------------------------------------


def test_the_runtimes_command_keeps_what_the_bundle_takes(bundles, tmp_path, capfd):
    soundfile.write(tmp_path / "duet.wav", stereo(9000).T, RATE, subtype="FLOAT")

    def command(name, out, *more):
        return runtime_main(
            [
                str(bundles[name]),
                str(tmp_path / "duet.wav"),
                "--classes",
                "flute,piano",
                "--provider",
                "cpu",
                "--format",
                "FLOAT",
                "--out",
                str(tmp_path / out),
                *more,
            ]
        )

    assert command("stereo", "stereo") == 0
    assert capfd.readouterr().err == ""
    parts = [soundfile.read(tmp_path / "stereo" / f"duet_{name}.wav")[0] for name in ("flute", "piano", "residual")]
    assert parts[0].shape == (9000, 2)
    np.testing.assert_allclose(sum(parts), stereo(9000).T, atol=1e-6)
    assert command("stereo", "mixed", "--mono") == 0
    assert soundfile.info(tmp_path / "mixed" / "duet_flute.wav").channels == 1
    assert capfd.readouterr().err == ""
    assert command("mono", "mono") == 0
    told = capfd.readouterr().err
    assert "duet.wav: its 2 channels are mixed to mono" in told
    assert "--channels 2" in told
    assert soundfile.info(tmp_path / "mono" / "duet_flute.wav").channels == 1


def test_it_tells_who_is_not_there(bundles, tmp_path, capfd, monkeypatch):
    soundfile.write(tmp_path / "solo.wav", music(9000), RATE)
    loaded = BundleSeparator.load

    def sure(*given, **options):
        made = loaded(*given, **options)
        made.presence_threshold = 1.0
        return made

    monkeypatch.setattr(BundleSeparator, "load", sure)
    argv = [str(bundles["mono"]), str(tmp_path / "solo.wav"), "--classes", "flute,piano", "--out", str(tmp_path / "o")]
    assert runtime_main(argv) == 0
    shown = capfd.readouterr().out
    assert "flute: probably not in this recording (presence " in shown
    assert "piano: probably not in this recording (presence " in shown


def test_separate_with_a_bundle_and_with_its_separator(bundles, separator, tmp_path, capfd):
    save_separator(separator, tmp_path / "separator")
    soundfile.write(tmp_path / "song.wav", stereo(20000).T, RATE, subtype="FLOAT")
    argv = ["separate", tmp_path / "song.wav", "--classes", "flute,piano", "--format", "FLOAT", "--limit-mask-sum"]
    assert run(*argv, "--bundle", bundles["limited"], "--out", tmp_path / "b") == 0
    assert run(*argv, "--run", tmp_path / "separator", "--device", "cpu", "--out", tmp_path / "r") == 0
    for name in ("flute", "piano", "residual"):
        sounds = [soundfile.read(tmp_path / folder / f"song_{name}.wav")[0] for folder in ("b", "r")]
        assert sounds[0].shape == (20000, 2)
        np.testing.assert_allclose(*sounds, atol=1e-4)
    capfd.readouterr()
    assert run(*argv, "--bundle", bundles["mono"], "--out", tmp_path / "c") == 2
    assert "--limit-mask-sum is not in the graph" in capfd.readouterr().err
    assert not (tmp_path / "c").exists()
    assert run(*argv[:-1], "--bundle", bundles["mono"], "--out", tmp_path / "d", "--no-page") == 0
    captured = capfd.readouterr()
    assert "song.wav: its 2 channels are mixed to mono" in captured.err
    assert "no part is louder" not in captured.out
    assert soundfile.info(tmp_path / "d" / "song_flute.wav").channels == 1


def test_two_of_one_class_by_names_of_their_own(bundles, separator, timelines, tmp_path, capfd):
    """As PyTorch, whole and in a stream; files go by the names."""
    mixture, two = music(3 * CLIP), ["left=flute", "right=flute"]
    lines = {"left": timelines["flute"], "right": timelines["cello"]}
    expected = separate_and_tell(separator, mixture, lines, two)
    assert np.abs(expected.sources[0] - expected.sources[1]).max() > 1e-3
    loaded = BundleSeparator.load(bundles["mono"], "cpu")
    found = loaded.separate_with_presence(mixture, lines, two)
    np.testing.assert_allclose(found.sources, expected.sources, atol=1e-4)
    np.testing.assert_allclose(found.presence, expected.presence, atol=1e-4)
    np.testing.assert_array_equal(
        loaded.separate(mixture, {"flute": lines["left"]}, ["solo=flute"])[0], found.sources[0]
    )
    stream = loaded.stream(two, lines)
    parts = [stream.push(mixture[first : first + 5000]) for first in range(0, len(mixture), 5000)]
    np.testing.assert_allclose(np.concatenate([*parts, stream.flush()], axis=1), found.sources, atol=1e-5)
    for given, told in (
        ({}, "no movement is seen of them"),
        ({"left": lines["left"], "right": lines["left"]}, "both are shown the same"),
    ):
        with pytest.raises(ConfigError, match=f"left and right are both flute, and {told}"):
            loaded.stream(two, given)
    with pytest.raises(DataError, match=r"'left' \(flute\) has features 'smell'"):
        loaded.check({"left": {"smell": 1}, "right": lines["right"]}, two)
    write_visual_file(tmp_path / "f.npz", lines)
    soundfile.write(tmp_path / "duet.wav", mixture, RATE, subtype="FLOAT")
    argv = [
        str(bundles["mono"]),
        str(tmp_path / "duet.wav"),
        "--features",
        str(tmp_path / "f.npz"),
        "--format",
        "FLOAT",
    ]
    assert runtime_main([*argv, "--classes", ",".join(two), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "duet_left.wav", "duet_residual.wav", "duet_right.wav"
    ]  # fmt: skip
    np.testing.assert_allclose(soundfile.read(tmp_path / "out" / "duet_right.wav")[0], found.sources[1], atol=1e-5)
    own = ["separate", tmp_path / "duet.wav", "--bundle", bundles["mono"], "--features", tmp_path / "f.npz"]
    own += ["--classes", ",".join(two), "--format", "FLOAT", "--no-page"]
    assert run(*own, "--out", tmp_path / "own") == 0
    np.testing.assert_allclose(soundfile.read(tmp_path / "own" / "duet_left.wav")[0], found.sources[0], atol=1e-5)
    capfd.readouterr()
    for classes, told in (
        ("flute,flute", "'flute' is given twice: name each of the two, such as left=flute,right=flute"),
        ("left=flute,left=cello", "two sources are named 'left'"),
        ("x=flute,y=flute", "x and y are both flute, and no movement is seen of them"),
    ):
        assert runtime_main([*argv, "--classes", classes, "--out", str(tmp_path / "no")]) == 2
        error = capfd.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_a_bundle_that_looks_at_no_movement_gives_a_class_once(tiny_bundle):
    loaded = BundleSeparator.load(tiny_bundle, "cpu")
    seen = {"left": {"object": np.ones(8)}, "right": {"object": np.zeros(8)}}
    with pytest.raises(ConfigError, match="left and right are both flute, and this separator looks at no movement"):
        loaded.separate(music(CLIP), seen, ["left=flute", "right=flute"])
    assert loaded.separate(music(CLIP), seen, ["left=flute", "right=piano"]).shape == (2, CLIP)

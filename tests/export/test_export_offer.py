"""Bundles that offer some of a separator's classes, and those of the separators that come with avsep."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch

from avsep.errors import ConfigError, ExportError, UnknownNameError
from avsep.export import ExportPlan, export, verify_bundle
from avsep.export.build.offer import without_classes
from avsep.export.runtime.manifest import check_manifest
from avsep.export.runtime.separator import BundleSeparator
from avsep.models import find_model
from avsep.separator import build_separator, load_separator
from avsep.types import VisualFeatures
from support.causal import RATE_HZ, causal_separator, noise
from support.commands import run
from support.tones import TINY_FRONT_END

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

PLAN = ExportPlan(left_out={"piano": "it is worse than nothing"}, by_name=True)
MODEL = find_model()


def separators():
    return {"chunks": causal_separator(decoder={"causal": False}), "stream": causal_separator()}


@pytest.fixture(scope="module", params=["chunks", pytest.param("stream", marks=pytest.mark.slow)])
def made(request, tmp_path_factory):
    """A separator of flute, piano and violin, and its bundle without the piano."""
    separator = separators()[request.param]
    return separator, export(separator, PLAN, tmp_path_factory.mktemp("offered") / request.param).path


def test_a_bundle_names_what_is_offered_and_gives_each_class_its_own_sound(made):
    separator, bundle = made
    mixture = noise(2047)
    unseen = VisualFeatures(torch.zeros(1, 2, 8), seen=torch.zeros(1, 2, dtype=torch.bool))
    with torch.inference_mode():
        expected = separator.separate(torch.from_numpy(mixture)[None], unseen, torch.tensor([[0, 2]]))[0]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    with BundleSeparator.load(bundle, "cpu", threads=1) as running:
        assert running.classes == ("flute", "violin")
        found = running.separate(mixture, None, ["flute", "violin"])
    length = 1500  # a stream knows nothing beyond the end
    np.testing.assert_allclose(found[:, :length], expected[:, :length], atol=2e-5)
    verify_bundle(bundle)
    assert "piano" not in json.loads((bundle / "manifest.json").read_text())["classes"]


def test_a_class_that_is_left_out_is_refused_with_the_reason(made, tmp_path, capsys):
    _, bundle = made
    reason = r"does not know 'piano', which was left out \(it is worse than nothing\): it knows flute, violin"
    with BundleSeparator.load(bundle, "cpu", threads=1) as running:
        assert running.by_name
        for ask in (running.check, lambda _, names: running.separate(noise(2047), None, names)):
            with pytest.raises(UnknownNameError, match=reason):
                ask(None, ["left=piano"])
        with pytest.raises(UnknownNameError, match=reason):
            running.stream(["piano"])
        with pytest.raises(UnknownNameError, match="has not learned class 'drum'"):
            running.check(None, ["drum"])
    from avsep.export.runtime.command import main
    from avsep.export.runtime.wav import write_wav

    write_wav(tmp_path / "a.wav", noise(2047)[None], RATE_HZ)
    assert main([str(bundle), str(tmp_path / "a.wav"), "--classes", "piano", "--out", str(tmp_path / "out")]) == 2
    assert run("separate", tmp_path / "a.wav", "--bundle", bundle, "--classes", "piano", "--out", tmp_path / "o") == 2
    assert capsys.readouterr().err.count("which was left out (it is worse than nothing)") == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "o").exists()


def test_what_cannot_be_left_out_is_refused(tmp_path):
    separator = causal_separator()
    for left_out, reason in (
        ({"drum": "no"}, "'drum' cannot be left out"),
        (dict.fromkeys(separator.classes, "no"), "every class is left out"),
    ):
        with pytest.raises(ConfigError, match=reason):
            export(separator, ExportPlan(left_out=left_out), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert without_classes(separator, {}) is separator


@pytest.mark.parametrize(
    "damage",
    [{"left_out": ["piano"]}, {"left_out": {"piano": 1}}, {"left_out": {"flute": "why"}}, {"by_name": 1.5}],
    ids=["a list", "no reason", "offered too", "no flag"],
)
def test_a_manifest_that_says_it_otherwise_is_refused(damage, made):
    manifest = json.loads((made[1] / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    check_manifest(manifest, "x")
    manifest["plan"].update(damage)
    with pytest.raises(ExportError, match="x is damaged"):
        check_manifest(manifest, "x")


def test_classes_of_several_tasks_keep_the_weights_of_theirs():
    torch.manual_seed(0)
    separator = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 1}),
        object_encoder=("precomputed", {"features": "clip", "dim": 8}),
        adapter=("low_rank", {"rank": 2, "audio_encoder": True, "conv_rank": 2}),
        classes=("a", "b"),
        front_end=TINY_FRONT_END,
    )
    separator.grow(4, ("a", "b", "c", "d"))
    with torch.no_grad():
        for parameter in separator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    separator.eval()
    offered = without_classes(separator, ["b", "c"])
    assert (offered.classes, offered.num_classes) == (("a", "d"), 2)
    heard, seen = torch.rand(1, 1, 128, 128), VisualFeatures(torch.randn(1, 2, 8))
    with torch.inference_mode():
        expected = separator(heard, seen, torch.tensor([[0, 3]])).logits
        found = offered(heard, seen, torch.tensor([[0, 1]])).logits
        other = separator(heard, seen, torch.tensor([[0, 1]])).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other, expected, atol=1e-2)
    with pytest.raises(ConfigError, match="class id 2 is out of range"):
        offered(heard, seen, torch.tensor([[0, 2]]))


# ------------------------------------------------------------------------------------- what comes with avsep


@pytest.mark.parametrize("left_out", [["piano"], {"piano": ""}, {"piano": 3}])
def test_a_class_is_left_out_for_a_reason(left_out):
    with pytest.raises(ConfigError, match="left_out must give a reason for each class"):
        ExportPlan(left_out=left_out)


def test_int8_of_a_model_is_refused_since_it_has_no_recordings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("export", "instruments", "--precision", "int8", "--out", "bundle") == 2
    assert "int8 needs training recordings" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_options_of_runs_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option in (["--task", 0], ["--all-tasks"], ["--tar"], ["--store", "s"]):
        assert run("export", "instruments", "--out", "b", *option) == 2
        assert f"{option[0]} is of a run, and 'instruments' comes with avsep" in capsys.readouterr().err
    assert run("app", "instruments", "--task", 0, "--no-open") == 2
    assert "--task 0 is of a run, and instruments is none" in capsys.readouterr().err
    (tmp_path / "instruments").mkdir()  # a folder goes before a model
    assert run("export", "instruments", "--out", "b") == 2
    assert run("app", "instruments", "--no-open") == 2
    assert "instruments is no run, bundle or site" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "bundle"
    assert run("export", "instruments", "--out", place, "--quiet") == 0
    return place


@pytest.mark.slow
def test_the_model_s_bundle_offers_its_card_s_classes_and_separates_alike(bundle, tmp_path, capsys):
    import avsep

    found = verify_bundle(bundle).bundle
    assert found.classes == tuple(name for name in load_separator(MODEL.separator).classes if name in MODEL.classes)
    assert set(found.left_out) == set(MODEL.left_out)
    assert (found.by_name, found.manifest["weights_licence"]) == (True, "MIT")
    assert found.manifest["made_from"].startswith("instruments, which comes with avsep")
    assert found.graph().entry["gate"]["on"] == "held-out"
    expected = avsep.separate(MODEL.sample, ["flute", "xylophone", "trumpet"])
    with BundleSeparator.load(bundle, "cpu") as running:
        separated = running.separate(expected.mixture[:65_000], None, ["flute", "xylophone", "trumpet"][:2])
        with pytest.raises(UnknownNameError, match="no better than a fixed filter"):
            running.check(None, ["violin"])
    for name, sound in zip(("flute", "xylophone"), separated, strict=True):
        alone = avsep.separate((expected.mixture[:65_000], expected.rate_hz), ["flute", "xylophone"]).sources[name]
        np.testing.assert_allclose(sound, alone, atol=1e-4)
    sample = shutil.copy(MODEL.sample, tmp_path)
    assert run("separate", sample, "--bundle", bundle, "--classes", "cello", "--out", tmp_path / "o") == 2
    assert "which was left out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("named", [[], ["instruments"]], ids=["none", "name"])
def test_the_app_opens_it_where_nothing_else_is_named(named, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"}
    process = subprocess.Popen(
        [sys.executable, "-m", "avsep", "app", *named, "--no-open", "--provider", "cpu", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
        with urllib.request.urlopen(f"{address}bundle/manifest.json", timeout=30) as answer:
            manifest = json.loads(answer.read())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert set(manifest["classes"]) == set(MODEL.classes)
    assert (manifest["plan"]["by_name"], manifest["channels"]) == (True, 2)

"""The separators that come along: whole, honest about what they are offered for, used where no other is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile

import avsep
from avsep.data.store import Store
from avsep.errors import CheckpointError, ConfigError, UnknownNameError
from avsep.models import Model, begin_run, find_model, model_at, models
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from support.commands import run

MODEL = find_model()


@pytest.fixture
def duet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copy(MODEL.sample, tmp_path / "duet.flac")


@pytest.mark.parametrize("model", models(), ids=lambda model: model.name)
def test_it_is_whole_and_offers_what_beats_the_filter(model):
    model.check()
    rows = {row["class"]: row for row in model.card["scores"]}
    assert set(rows) == {*model.classes, *model.left_out}
    assert all((rows[name]["low"] > 0) == (name in model.classes) for name in rows)
    assert set(model.card["sample_classes"]) <= set(model.classes)
    assert set(load_separator(model.separator).classes) == set(rows)
    trained = {bank["name"] for bank in model.card["trained_on"]}
    assert model.card["tested_on"]["name"] not in trained
    assert not any(bank["licence"].startswith("see") for bank in model.card["trained_on"])


def test_what_is_damaged_is_refused(tmp_path):
    copy = shutil.copytree(MODEL.path, tmp_path / "instruments")
    (copy / "sample.flac").write_bytes(b"another")
    broken = Model("instruments", copy, json.loads((copy / "card.json").read_text()))
    with pytest.raises(CheckpointError, match=r"sample\.flac is missing or damaged"):
        broken.check()
    with pytest.raises(CheckpointError):
        begin_run(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_it(tmp_path):
    made = RunFolder(begin_run(MODEL, tmp_path / "run"))
    made.task(0).check_files()
    memory = Store.open(made.memory, verify=True)
    assert set(memory.classes) == set(load_separator(made).classes)
    splits = {(c.split, memory.has_pictures(c)) for c in memory.clips}
    assert splits == {("train", True), ("val", False), ("test", False)}
    with pytest.raises(ConfigError, match="holds something already"):
        begin_run(MODEL, made)


def test_a_folder_goes_before_a_model_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert model_at(None) == MODEL
    assert model_at("instruments") == MODEL
    assert model_at("nothing") is None
    for words in (
        ["export", "instrument", "--out", "b"],
        ["app", "instrument"],
        ["learn", "instrument", "--from", ".", "--classes", "oboe"],
    ):
        assert run(*words) == 2
        assert (
            "no folder 'instrument' is here, and no model of that name: did you mean 'instruments'"
            in capsys.readouterr().err
        )
    (tmp_path / "instruments").mkdir()
    assert model_at("instruments") is None
    with pytest.raises(UnknownNameError, match="did you mean 'instruments'"):
        find_model("instrument")


def test_one_call_gives_what_the_command_writes(duet):
    found = avsep.separate("duet.flac", classes="Flute, piano")
    assert list(found.sources) == ["flute", "piano"]
    np.testing.assert_allclose(sum(found.sources.values()) + found.residual, found.mixture, atol=1e-6)
    correlation = np.corrcoef(*found.sources.values())[0, 1]
    assert abs(correlation) < 0.3  # two sounds, and not one twice
    assert min(found.findings.presence.values()) > found.findings.threshold
    assert run("separate", "duet.flac", "--classes", "flute,piano", "--no-page") == 0
    for name, samples in found.sources.items():
        written, rate_hz = soundfile.read(f"duet_separated/duet_{name}.wav", dtype="float32")
        assert rate_hz == found.rate_hz
        np.testing.assert_allclose(written, samples, atol=1.01 / 32768)


def test_samples_channels_and_separators_of_ones_own_are_taken(duet):
    sound, rate_hz = soundfile.read("duet.flac", dtype="float32")
    separator = load_separator(MODEL.separator)
    whole = avsep.separate("duet.flac", ["flute"])
    for given, shape in ((sound, whole.mixture.shape), (np.stack([sound, sound]), (2, *whole.mixture.shape))):
        found = avsep.separate((given, rate_hz), ["flute"], model=separator)
        assert found.sources["flute"].shape == shape
        np.testing.assert_allclose(np.atleast_2d(found.sources["flute"])[-1], whole.sources["flute"], atol=1e-5)
    assert avsep.separate((np.stack([sound, sound]), rate_hz), ["flute"], mono=True).residual.ndim == 1
    files = whole.save("out")
    assert sorted(path.name for path in files.values()) == ["flute.wav", "residual.wav"]
    with pytest.raises(ConfigError, match="is there already"):
        whole.save("out")


def test_what_it_is_not_offered_for_is_refused_alike(duet, capsys):
    name = MODEL.left_out[0]
    with pytest.raises(ConfigError, match=f"does not separate '{name}' better"):
        avsep.separate("duet.flac", [f"left={name}"])
    assert run("separate", "duet.flac", "--classes", name) == 2
    assert f"does not separate '{name}' better" in capsys.readouterr().err
    with pytest.raises(UnknownNameError, match="has not learned class 'theremin'"):
        avsep.separate("duet.flac", ["theremin"])


def test_the_command_shows_cards_and_writes_the_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("models", "--sample", "mine.flac") == 0
    assert (tmp_path / "mine.flac").read_bytes() == MODEL.sample.read_bytes()
    assert "next: avsep separate mine.flac --classes flute,piano" in capsys.readouterr().out
    assert run("models", "--sample", "mine.flac") == 2
    assert run("models", "--sample", "mine.wav") == 2
    capsys.readouterr()
    assert run("models", "instruments") == 0
    told = capsys.readouterr().out
    assert all(name in told for name in (*MODEL.classes, *MODEL.left_out))
    assert run("models", "nothing") == 2

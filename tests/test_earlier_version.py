"""What this library wrote on 22 November 2026 (commit df3876b) still opens, and answers as it did then.

``fixtures/november_22`` holds a run of two tasks over the tones of ``support.tones`` (0.8 s), without its checkpoint,
the sources that its separator found in a mixture then, and its bundle, whose graphs have lost the names of folders.
"""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest

from avsep.data.store import Store, timelines_of
from avsep.evaluation.evaluate import evaluate_run
from avsep.export.runtime.separator import BundleSeparator
from avsep.inference.recordings import separate_audio
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from support.commands import run
from support.tones import make_tone_store

EARLIER = Path(__file__).parent / "fixtures" / "november_22"
SAMPLES = 8191


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The run beside the store that it names."""
    folder = tmp_path_factory.mktemp("earlier")
    shutil.copytree(EARLIER / "run", folder / "run")
    make_tone_store(folder / "store", seconds=0.8)
    (folder / "bundle.tar").write_bytes(lzma.decompress((EARLIER / "bundle.tar.xz").read_bytes()))
    return folder


@pytest.fixture(scope="module")
def duet(place):
    """A mixture, and what is seen of its two sources."""
    store = Store.open(place / "store")
    clips = [store.clip("ding-test-0"), store.clip("peep-test-0")]
    mixture = (store.read_audio(clips[0], 0, SAMPLES) + store.read_audio(clips[1], 0, SAMPLES)) / 2
    return mixture, timelines_of(store, [clip.id for clip in clips])


def test_its_separator_answers_as_it_did(place, duet):
    separator = load_separator(place / "run")
    assert separator.classes == ("ding", "hum", "peep", "whirr")
    found = separate_audio(separator, *duet, ["ding", "peep"])
    np.testing.assert_allclose(found, np.load(EARLIER / "separated.npy"), atol=1e-5)


def test_its_run_is_read_scored_and_taught(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    folder = RunFolder("run")
    assert folder.spec().tasks == (("ding", "hum"), ("peep", "whirr"))
    found = evaluate_run("run", yardsticks=False)
    assert [step["task"] for step in found["after"]] == [0, 1]
    assert run("memory", "run") == 0
    assert "ding" in capsys.readouterr().out
    assert run("learn", "run", "--from", "store", "--classes", "buzz", "--device", "cpu") == 2
    assert "buzz" in capsys.readouterr().err


def test_its_bundle_verifies_and_separates(place, duet, capsys):
    pytest.importorskip("onnxruntime")
    assert run("export", "verify", place / "bundle.tar") == 0
    with BundleSeparator.load(place / "bundle.tar", provider="cpu") as separator:
        found = separator.separate(*duet, ["ding", "peep"])
    np.testing.assert_allclose(found, np.load(EARLIER / "separated.npy"), atol=1e-3)

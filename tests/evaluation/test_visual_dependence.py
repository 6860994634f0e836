"""How much of a result hangs on the pictures, on separators of which that is known."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from avsep.data.protocol import build_protocol, evenly
from avsep.data.store import Store
from avsep.data.tasks import make_tasks
from avsep.evaluation import evaluate
from avsep.evaluation import visual_dependence as module
from avsep.evaluation.evaluate import evaluate_run
from avsep.evaluation.visual_dependence import CHANGES, visual_dependence
from avsep.separator import build_separator, load_separator
from support.answers import Stub
from support.tones import TINY_FRONT_END, TONES_HZ

LENGTH = TINY_FRONT_END["clip_samples"]
PITCHES = torch.tensor(list(TONES_HZ.values()))


@pytest.fixture(scope="module")
def store(tone_store):
    return Store.open(tone_store)


@pytest.fixture(scope="module")
def mixtures(store):
    tasks = make_tasks([list(TONES_HZ)])
    return build_protocol("audiovisual", store, tasks, split="test", clip_samples=LENGTH).mixtures


@pytest.fixture(scope="module")
def separator():
    return build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 16}),
        motion_encoder=("motion_cnn", {"dim": 16}),
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 2}),
        classes=list(TONES_HZ),
        front_end=TINY_FRONT_END,
    ).eval()


def harmonics(mixture, pitch):
    spectrum = torch.fft.rfft(mixture)
    hz = torch.fft.rfftfreq(mixture.shape[1], 1 / TINY_FRONT_END["sample_rate_hz"])
    near = [(hz / pitch[..., None] - harmonic).abs() * pitch[..., None] < 25 for harmonic in (1, 2, 3)]
    return torch.fft.irfft(spectrum[:, None] * torch.stack(near).any(dim=0), n=mixture.shape[1])


def looks_at_the_object(mixture, visual, class_ids):
    """The class is the quarter of the picture that is bright; without a picture everything is kept."""
    rows = visual.object.float().mean(dim=(2, 3, 5))  # [B, N, 32]
    shown = rows.unflatten(-1, (4, 8)).mean(dim=-1).argmax(dim=-1)
    made = harmonics(mixture, PITCHES[shown])
    return made if visual.seen is None else torch.where(visual.seen[..., None], made, mixture[:, None])


def looks_at_motion(mixture, visual, class_ids):
    """Right where something moves."""
    moves = visual.motion.float().std(dim=2).mean(dim=(2, 3, 4)) > 1
    return torch.where(moves[..., None], harmonics(mixture, PITCHES[class_ids]), mixture[:, None])


def test_each_kind_of_looking_shows_where_it_should(separator, store, mixtures):
    def changes(answer):
        stub = Stub(separator, answer, takes_unseen=True, looks_itself=True)
        found = visual_dependence(stub, store, mixtures, count=8)
        assert set(found) == {"headline", "same-class"}
        assert [line["mixtures"] for line in found.values()] == [8, 4]
        return found

    objects = changes(looks_at_the_object)
    headline = objects["headline"]["changes"]
    assert tuple(headline) == tuple(CHANGES)
    assert (headline["other_clip"], headline["still"]) == pytest.approx((0, 0), abs=1e-9)
    assert headline["other_class"] < -10
    assert headline["exchanged"] < -10
    assert headline["none"] < -10
    same = objects["same-class"]["changes"]
    assert (same["exchanged"], same["still"]) == pytest.approx(
        (0, 0), abs=1e-9
    )  # two clips of a class look alike to it
    assert same["other_clip"] is None  # the class has no third clip
    assert same["other_class"] < 0

    motion = changes(looks_at_motion)["headline"]["changes"]
    assert motion["still"] < -10
    assert [motion[k] for k in ("exchanged", "other_clip", "other_class")] == pytest.approx([0] * 3, abs=1e-9)

    told = changes(lambda mixture, visual, class_ids: harmonics(mixture, PITCHES[class_ids]))
    assert list(told["headline"]["changes"].values()) == pytest.approx([0] * 5, abs=1e-9)


def test_what_cannot_be_shown_is_left_out(separator, store, mixtures):
    found = visual_dependence(separator, store, mixtures, count=2)
    assert found["headline"]["changes"]["none"] is None
    assert found["headline"]["changes"]["still"] is not None
    sound = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 16}),
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 1}),
        classes=list(TONES_HZ),
        front_end=TINY_FRONT_END,
    )
    line = visual_dependence(sound, store, mixtures[:2], count=2)["headline"]
    assert line["changes"]["still"] is None
    assert line["changes"]["exchanged"] is not None
    blind = Stub(separator, None)
    blind.visual_sources = lambda: ()
    assert visual_dependence(blind, store, mixtures) == {}
    assert sound.training


def test_the_choice_is_even_and_always_the_same(separator, store, mixtures):
    first, second = (visual_dependence(separator, store, mixtures, count=3, batch_size=n) for n in (1, 3))
    for name, line in first.items():
        assert line["mixtures"] == 3
        assert line["sdr"] == pytest.approx(second[name]["sdr"], abs=1e-3)
        for key, change in line["changes"].items():
            assert change == pytest.approx(second[name]["changes"][key], abs=1e-3)
    members = [m for m in mixtures if m.list_name == "task-0"]
    assert evenly(members, 4) == members[::4]
    clips = {name: store.select(classes=[name], split="test") for name in TONES_HZ}
    for kind in ("other_clip", "other_class"):
        for number, mixture in enumerate(members):
            other = module._others(mixture, number, kind, clips, store.sample_rate_hz, LENGTH)
            assert not set(other.clips) & set(mixture.clips)
            same = [a == b for a, b in zip(other.classes, mixture.classes, strict=True)]
            assert all(same) if kind == "other_clip" else not any(same)
    few = {name: clips[name] for name in members[0].classes}  # no third class: that of the other source
    other = module._others(members[0], 0, "other_class", few, store.sample_rate_hz, LENGTH)
    assert other.classes == members[0].classes[::-1]


def test_a_run_keeps_it_for_its_last_task(tone_run, tmp_path, monkeypatch):
    run = shutil.copytree(tone_run, tmp_path / "run")
    calls = []
    real = evaluate.visual_dependence
    monkeypatch.setattr(evaluate, "visual_dependence", lambda *a, **k: calls.append(k["count"]) or real(*a, **k))
    assert "visual_dependence" not in evaluate_run(run, yardsticks=False)
    result = evaluate_run(run, yardsticks=False, dependence=3)
    (task, found), *more = result["visual_dependence"].items()
    assert (task, more, found["count"], found["lists"]["headline"]["mixtures"]) == ("1", [], 3, 3)
    separator = load_separator(run)
    protocol_mixtures = [m for m in _protocol(run).at(1) if m.list_name != "same-class"]
    again = visual_dependence(separator, Store.open(_store(run)), protocol_mixtures, count=3)
    for key, change in again["headline"]["changes"].items():
        assert change == pytest.approx(found["lists"]["headline"]["changes"][key], abs=1e-6)
    evaluate_run(run, yardsticks=False, dependence=3)
    evaluate_run(run, yardsticks=False)  # does not take it away
    assert calls == [3]
    assert evaluate_run(run, yardsticks=False, dependence=2)["visual_dependence"]["1"]["count"] == 2
    assert np.isfinite(found["lists"]["headline"]["sdr"])


def _protocol(run):
    from avsep.data.protocol import Protocol

    return Protocol.load(run / "protocol.json")


def _store(run):
    from avsep.runs.folder import RunFolder

    return RunFolder(run).spec().store

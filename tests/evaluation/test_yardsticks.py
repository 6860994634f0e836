"""What a separator is held against: the mixture, the static filter, the ideal mask."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from avsep.cli.evaluate_command import command
from avsep.data.protocol import Protocol, build_protocol
from avsep.data.store import Clip, Store
from avsep.data.tasks import make_tasks, task_stream
from avsep.dsp import FrontEnd
from avsep.errors import DataError
from avsep.evaluation import evaluate, yardsticks
from avsep.evaluation.evaluate import current_evaluation, evaluate_run, evaluate_separator
from avsep.evaluation.yardsticks import (
    YARDSTICKS,
    StaticFilter,
    absent_levels,
    measure,
    rows_of_yardstick,
    sdr_by_list,
    sdr_by_task,
)
from avsep.files import read_json
from avsep.separator import Separator, load_separator
from avsep.spec import FrontEndSpec
from support.answers import Stub
from support.tones import TINY_FRONT_END, TINY_TASKS, TONES_HZ

SPEC = FrontEndSpec(**TINY_FRONT_END)


@pytest.fixture(scope="module")
def store(tone_store):
    return Store.open(tone_store)


@pytest.fixture(scope="module")
def static(store):
    return StaticFilter.fit(store, list(TONES_HZ), FrontEnd(SPEC))


@pytest.fixture
def run(tone_run, tmp_path):
    return shutil.copytree(tone_run, tmp_path / "run")


def test_masks_are_shares_of_the_mean_spectra_and_constant_in_time(static):
    masks = static.logits([["ding", "hum", "peep"], ["ding", "hum", "whirr"]], 7).sigmoid()
    assert masks.shape == (2, 3, SPEC.log_rows, 7)
    assert (masks == masks[..., :1]).all()
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(2, SPEC.log_rows, 7), atol=1e-5, rtol=0)
    spectra = np.stack([static.spectra[name] for name in ("ding", "hum", "peep")])
    np.testing.assert_allclose(masks[0, :, :, 0], spectra / spectra.sum(0), atol=2e-6)
    alike = static.logits([["hum", "hum"]], 3).sigmoid()
    np.testing.assert_allclose(alike, 0.5)


def test_the_filter_is_of_training_clips_evenly_chosen(store, static, monkeypatch):
    read = []
    real = Store.read_crop
    monkeypatch.setattr(Store, "read_crop", lambda self, clip, *a: read.append((clip, *a)) or real(self, clip, *a))
    again = StaticFilter.fit(store, list(TONES_HZ), FrontEnd(SPEC))
    assert {clip.split for clip, *_ in read} == {"train"}
    for name, spectrum in static.spectra.items():
        np.testing.assert_array_equal(spectrum, again.spectra[name])
    monkeypatch.setattr(Store, "select", lambda self, **k: [])
    with pytest.raises(DataError, match=r"class 'hum' has no test clip in .* a static filter needs one"):
        StaticFilter.fit(store, ["hum"], FrontEnd(SPEC), split="test")

    def clips(count, seconds):
        return [Clip(f"c{k}", "a", "train", seconds * 100, k) for k in range(count)]

    assert [c.index for c, _ in yardsticks._even_crops(clips(100, 9), 100, 300, 4)] == [0, 25, 50, 75]
    assert len(yardsticks._even_crops(clips(5, 1), 100, 300, 24)) == 5  # shorter than a crop: one of each
    crops = yardsticks._even_crops(clips(2, 9), 100, 300, 24)
    assert [start for c, start in crops if c.index == 0] == [0, 300, 600]


def test_they_are_scored_as_a_separator_is(store, static, tone_run):
    """Answers of the filter and of the ideal mask, given by a separator, get the same scores."""
    protocol = build_protocol("audiovisual", store, make_tasks([list(TONES_HZ)]), split="test", clip_samples=8191)
    chosen = [m for m in protocol.mixtures if m.list_name in ("task-0", "background", "absent-pair", "same-class")][::3]
    rows = measure(chosen, store, SPEC, static)
    assert {r["yardstick"] for r in rows} == set(YARDSTICKS)
    front_end, names = FrontEnd(SPEC), np.array(list(TONES_HZ))
    separator = load_separator(tone_run)

    def filtered(mixture, visual, class_ids):
        spectrum = front_end.analyse(mixture[:, None], targets=False).mixture
        logits = static.logits(names[class_ids.numpy()].tolist(), spectrum.shape[-1])
        return front_end.synthesise(logits, spectrum, length=mixture.shape[1])

    scores = evaluate_separator(Stub(separator, filtered), store, chosen)
    mine = [r for r in rows if r["yardstick"] == "static filter"]
    for score_row, row in zip(evaluate.rows_of(scores), mine, strict=True):
        for key in ("list", "mixture", "source", "clip", "class", "task", "role", "degenerate", "status"):
            assert score_row[key] == row[key]
        for key in ("sdr", "si_sdr", "sdr_mixture", "sdri", "level_db"):
            assert row[key] == pytest.approx(score_row[key], abs=1e-4)
        assert row["sir"] is row["sar"] is None
    for of_mixture, ideal in zip(
        (r for r in rows if r["yardstick"] == "mixture"),
        (r for r in rows if r["yardstick"] == "ideal mask"),
        strict=True,
    ):
        if of_mixture["sdr"] is not None:
            assert of_mixture["sdri"] == 0
            assert ideal["sdr"] > of_mixture["sdr"]
    json.dumps(rows, allow_nan=False)


def test_a_run_has_them_once_and_its_own_rows_stay(run, monkeypatch):
    plain = evaluate_run(run, yardsticks=False)
    assert "yardsticks" not in plain
    assert sdr_by_list(plain, plain["after"][-1]) == sdr_by_task(plain) == {}
    calls = []
    real = evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda *a, **k: calls.append(a) or real(*a, **k))
    monkeypatch.setattr(evaluate, "evaluate_separator", lambda *a, **k: pytest.fail("scored again"))
    seen = []
    result = evaluate_run(run, more_progress=lambda *state: seen.append(state))  # a file of before is completed
    assert {k: v for k, v in result.items() if k != "yardsticks"} == plain
    assert result == read_json(run / "evaluation.json") == current_evaluation(run)
    assert seen[-1] == ("yardsticks", 12, 12)
    assert evaluate_run(run) == evaluate_run(run, tasks=[0]) == result
    assert len(calls) == 1
    (run / "tasks" / "01" / "task.json").unlink()  # other mixtures are the last ones
    assert len(evaluate_run(run)["yardsticks"]["rows"]) == 3 * 2 * 4
    assert len(calls) == 2


def test_those_of_a_run_of_another_seed_are_taken_over(run, tmp_path, monkeypatch):
    first = evaluate_run(run)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "evaluation.json").unlink()
    monkeypatch.setattr(evaluate, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert evaluate_run(other, like=first) == first
    (other / "evaluation.json").unlink()
    monkeypatch.setattr(evaluate, "measure", lambda *a, **k: [])
    moved = {**first, "store_hash": "of another store"}
    grid = {**first, "yardsticks": {**first["yardsticks"], "identity": {"front_end": "another"}}}
    for like in (moved, grid):
        assert evaluate_run(other, like=like)["yardsticks"]["rows"] == []
        (other / "evaluation.json").unlink()


def test_they_stand_beside_the_lists_and_the_matrix(run):
    result = evaluate_run(run)
    step = result["after"][-1]
    mixed = sdr_by_list(result, step)["mixture"]
    for name, summary in {**step["lists"], "all": step["all"]}.items():
        own = [r["sdr_mixture"] for r in step["rows"] if name in (r["list"], "all")]
        assert mixed[name] == pytest.approx(np.mean(own), abs=1e-5)
        assert sdr_by_list(result, step)["ideal mask"][name] > summary["mean"]["sdr"] + 5
    lines = sdr_by_task(result)
    assert lines["mixture"] == pytest.approx([mixed["task-0"], mixed["task-1"]])
    first = result["after"][0]
    assert {r["list"] for r in rows_of_yardstick(result, "static filter", first)} == {"task-0"}
    assert len(rows_of_yardstick(result, "static filter")) == len(step["rows"])


def test_paper_pairs_have_them_for_the_last_list(tone_store, run):
    stream = task_stream(tone_store, TINY_TASKS, protocol="paper", clip_samples=TINY_FRONT_END["clip_samples"])
    stream.protocol.save(run / "protocol.json")
    result = evaluate_run(run)
    assert set(sdr_by_list(result, result["after"][-1])["mixture"]) == {"paper-1", "all"}
    assert sdr_by_list(result, result["after"][0]) == {}


def test_tables_of_an_audiovisual_run_fit_120_columns(tone_store, run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for ability in ("can_go_unseen", "takes_photos"):  # as one that keeps no mean pictures
        monkeypatch.setattr(Separator, ability, False)
    stream = task_stream(tone_store, TINY_TASKS, protocol="audiovisual", clip_samples=TINY_FRONT_END["clip_samples"])
    stream.protocol.save(run / "protocol.json")
    command(run, dependence=2)
    shown = capsys.readouterr().out
    result = read_json(run / "evaluation.json")
    step = result["after"][-1]
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines() if "scores written" not in line) <= 120
    for text in (
        "static filter",
        "ideal mask",
        "less filter",
        "absent-still",
        "left out: absent-unseen, photo, unseen:",
    ):
        assert text in shown
    assert "presence: this separator's decoder does not tell" in shown
    assert step["left_out"] == ["absent-unseen", "photo", "unseen"]
    assert step["all"]["mixtures"] == 12
    assert set(step["by_task"]) == {"0", "1"}
    filtered = absent_levels(result, step, "static filter")["absent-still"]
    line = next(line for line in shown.splitlines() if line.startswith(" absent-still") and f"{filtered:.2f}" in line)
    assert f"{step['lists']['absent-still']['absent']['level_db']:.2f}" in line
    # numbers are places in the protocol, whatever was left out
    protocol = Protocol.load(run / "protocol.json")
    for row in step["rows"]:
        assert protocol.at(1)[row["mixture"]].list_name == row["list"]

"""Evaluation of separators and of runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from avsep.cli.evaluate_command import command
from avsep.data.protocol import Protocol
from avsep.data.store import Store
from avsep.data.tasks import task_stream
from avsep.errors import DataError, NumericalError, RunError
from avsep.evaluation import evaluate as module
from avsep.evaluation.bss import bss_eval, si_sdr
from avsep.evaluation.budget import budget_of
from avsep.evaluation.evaluate import (
    METRICS,
    evaluate_run,
    evaluate_separator,
    interference_matrix,
    mean_sdr,
    rows_of,
    summarise,
    task_matrix,
)
from avsep.files import read_json
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from support.answers import Stub
from support.tones import TINY_FRONT_END, TINY_TASKS, make_tone_store


@pytest.fixture(scope="module")
def protocol(tone_run):
    return Protocol.load(tone_run / "protocol.json")


@pytest.fixture(scope="module")
def store(tone_store):
    return Store.open(tone_store)


@pytest.fixture
def run(tone_run, tmp_path):
    return shutil.copytree(tone_run, tmp_path / "run")


def test_scores_are_those_of_the_clipped_and_cut_estimates(tone_run, store, protocol):
    separator = load_separator(tone_run)
    mixtures = protocol.at(1)[:3]
    scores = evaluate_separator(separator, store, mixtures, batch_size=2, keep=[0, 2])
    assert [s.kept is not None for s in scores] == [True, False, True]
    hop = TINY_FRONT_END["hop"]
    length = TINY_FRONT_END["clip_samples"] // hop * hop
    for score in (scores[0], scores[2]):
        kept = score.kept
        assert kept.estimates.shape == (2, length)
        assert np.abs(kept.estimates).max() <= 1
        np.testing.assert_allclose(kept.references.sum(0), kept.mixture, atol=1e-6)
        assert kept.masks.shape == kept.ratios.shape == (2, 128, 128)
        assert 0 <= kept.masks.min() <= kept.masks.max() <= 1
        assert kept.object.dtype == np.uint8
        references, estimates = (torch.from_numpy(a)[None] for a in (kept.references, kept.estimates))
        result = bss_eval(references, estimates, mixture=torch.from_numpy(kept.mixture)[None])
        for n, source in enumerate(score.sources):
            assert source.sdr == pytest.approx(result.sdr[0, n].item(), abs=1e-4)
            assert source.sir == pytest.approx(result.sir[0, n].item(), abs=1e-4)
            assert source.sdri == pytest.approx((result.sdr - result.sdr_mixture)[0, n].item(), abs=1e-4)
            assert source.si_sdr == pytest.approx(si_sdr(references, estimates)[0, n].item(), abs=1e-4)
            assert source.class_name == score.mixture.classes[n]


def test_batch_size_does_not_matter(tone_run, store, protocol):
    separator = load_separator(tone_run)
    done = []
    one = evaluate_separator(separator, store, protocol.at(1), batch_size=1, progress=done.append)
    five = evaluate_separator(separator, store, protocol.at(1), batch_size=5)
    assert sum(done) == len(protocol.at(1))
    for a, b in zip(one, five, strict=True):
        assert a.mixture == b.mixture
        np.testing.assert_allclose([s.sdr for s in a.sources], [s.sdr for s in b.sources], atol=1e-3)


def test_the_mode_of_the_separator_is_left_alone(tone_run, store, protocol):
    separator = load_separator(tone_run).train()
    evaluate_separator(separator, store, protocol.at(0)[:1])
    assert separator.training


def test_silent_estimates_are_skipped_and_counted(tone_run, store, protocol):
    mute = Stub(load_separator(tone_run), lambda x, visual, ids: torch.zeros(len(x), ids.shape[1], x.shape[1]))
    scores = evaluate_separator(mute, store, protocol.at(0))
    assert {s.status for s in scores} == {"silent_estimate"}
    summary = summarise(rows_of(scores))
    assert summary["scored"] == 0
    assert summary["skipped"] == summary["silent_estimates"] == len(scores)
    assert summary["mean"]["sdr"] is None
    with pytest.raises(DataError, match="none of the"):
        mean_sdr(scores)


def test_estimates_that_are_not_finite_name_the_clips(tone_run, store, protocol):
    broken = Stub(
        load_separator(tone_run), lambda x, visual, ids: torch.full((len(x), ids.shape[1], x.shape[1]), torch.nan)
    )
    with pytest.raises(NumericalError, match=protocol.at(0)[0].clips[0]):
        evaluate_separator(broken, store, protocol.at(0))


def test_estimates_are_clipped_before_scoring(tone_run, store, protocol):
    def loud(mixture, visual, class_ids):
        return 100 * mixture[:, None].expand(-1, class_ids.shape[1], -1)

    score = evaluate_separator(Stub(load_separator(tone_run), loud), store, protocol.at(0)[:1], keep=[0])[0]
    assert np.abs(score.kept.estimates).max() == 1
    assert score.sources[0].sdri < -0.01  # a mixture scaled alone would give exactly 0


def test_pairs_of_a_clip_with_itself_are_kept_out_of_the_means(tone_run, store, protocol):
    separator = load_separator(tone_run)
    fair = protocol.at(0)[0]
    doubled = replace(
        fair, clips=fair.clips[:1] * 2, classes=fair.classes[:1] * 2, starts=fair.starts[:1] * 2, degenerate="self"
    )
    scores = evaluate_separator(separator, store, [fair, doubled])
    assert [s.status for s in scores] == ["ok", "degenerate"]
    assert [s.counted for s in scores] == [True, False]
    assert not replace(scores[0], mixture=replace(fair, degenerate="same_class")).counted
    summary = summarise(rows_of(scores))
    assert (summary["mixtures"], summary["scored"], summary["degenerate"], summary["skipped"]) == (2, 1, 1, 0)
    fair_sdr = np.mean([s.sdr for s in scores[0].sources])
    assert summary["mean"]["sdr"] == pytest.approx(fair_sdr, abs=1e-5)
    assert mean_sdr(scores) == pytest.approx(fair_sdr)
    assert summary["with_degenerate"]["mean"]["sdr"] > summary["mean"]["sdr"]
    assert summary["only_degenerate"]["mean"]["sir"] is None
    json.dumps(rows_of(scores), allow_nan=False)


def row(task, sdr, name, mixture=0, status="ok", degenerate=""):
    values = dict.fromkeys(METRICS, sdr)
    return {
        **values,
        "task": task,
        "list": name,
        "mixture": mixture,
        "status": status,
        "degenerate": degenerate,
        "ill_conditioned": False,
    }


def test_task_matrix_takes_each_tasks_own_list_and_sources():
    cross = [row(0, -50.0, "cross"), row(1, 50.0, "cross")]
    first = [row(0, 4.0, "task-0"), row(0, 6.0, "task-0")]
    second = [row(0, 1.0, "task-0"), row(1, 8.0, "task-1"), row(1, None, "task-1", status="silent_estimate"), *cross]
    assert task_matrix([first, second]) == [[5.0, None], [1.0, 8.0]]
    paper = [row(0, 2.0, "paper-1"), row(1, 4.0, "paper-1"), row(0, 90.0, "paper-1", degenerate="self")]
    assert task_matrix([first, paper]) == [[5.0, None], [2.0, 4.0]]
    assert task_matrix([[row(0, 1.0, "task-0", status="silent_reference")]]) == [[None]]


def test_interference_is_by_the_task_of_the_other_source():
    scores = [((0, 0), (6, 8)), ((0, 1), (2, 5)), ((1, 0), (7, 4)), ((1, 1), (9, 9))]
    rows = [
        row(task, sdr, "cross" if tasks[0] != tasks[1] else f"task-{task}", mixture=number)
        for number, (tasks, values) in enumerate(scores)
        for task, sdr in zip(tasks, values, strict=True)
    ]
    left_out = [
        *(row(task, 90.0, "cross", mixture=9, status="silent_estimate") for task in (0, 1)),
        *(row(0, 90.0, "task-0", mixture=10, degenerate="self") for _ in range(2)),
        *(row(task, 90.0, "three", mixture=11) for task in (0, 1, 1)),
        *(row(task, 90.0, "quiet", mixture=12) for task in (0, 1)),
        row(0, 90.0, "cross", mixture=13),
    ]
    assert interference_matrix([*rows, *left_out], 2) == [[7.0, 3.0], [6.0, 9.0]]
    rows[2]["sdr"] = None  # a NaN
    assert interference_matrix(rows, 3) == [[7.0, 4.0, None], [6.0, 9.0, None], [None, None, None]]


def test_a_run_is_scored_task_by_task_and_only_once(run, protocol, monkeypatch):
    seen = []
    result = evaluate_run(run, progress=lambda *state: seen.append(state))
    assert read_json(run / "evaluation.json") == result
    assert [step["task"] for step in result["after"]] == [0, 1]
    assert set(result["after"][0]["lists"]) == {"task-0"}
    assert set(result["after"][1]["lists"]) == {"task-0", "task-1", "cross"}
    assert seen[-1] == (1, len(protocol.at(1)), len(protocol.at(1)))
    rows = result["after"][1]["rows"]
    assert len(rows) == 2 * len(protocol.at(1))
    for r in rows:
        assert r["task"] == protocol.task_of(r["class"])
    mine = [r["sdr"] for r in rows if r["list"] == "task-0"]
    assert result["matrix"][1][0] == pytest.approx(np.mean(mine))
    assert result["matrix"][0][1] is None
    matrix = result["matrix"]
    assert result["forgetting"] == pytest.approx(matrix[0][0] - matrix[1][0])
    assert result["bwt"] == pytest.approx(matrix[1][0] - matrix[0][0])
    assert result["average"] == pytest.approx([matrix[0][0], (matrix[1][0] + matrix[1][1]) / 2])
    old = [r for r in rows if r["task"] == 0]
    beside = {kind: np.mean([r["sdr"] for r in old if r["list"] == kind]) for kind in ("cross", "task-0")}
    assert result["interference"]["sdr"][0] == pytest.approx([beside["task-0"], beside["cross"]])
    assert result["staleness"] == pytest.approx(beside["cross"] - beside["task-0"])
    assert result["continual"]["si_sdr"]["staleness"] != pytest.approx(result["staleness"])
    assert (result["protocol"], result["protocol_version"], result["protocol_hash"]) == ("fixed", 1, protocol.hash)
    for step in result["after"]:
        assert step["seconds"] == read_json(run / "tasks" / f"{step['task']:02d}" / "task.json")["seconds"]
        assert step["memory"] == budget_of(run, step["task"]).plain()
    assert result["after"][0]["memory"]["exemplars"] == 2

    monkeypatch.setattr(module, "evaluate_separator", lambda *a, **k: pytest.fail("scored again"))
    assert evaluate_run(run) == result


def test_a_changed_separator_is_scored_again_and_the_others_are_not(run, monkeypatch):
    before = evaluate_run(run)
    weights = run / "tasks" / "00" / "separator" / "model.safetensors"
    other = run / "tasks" / "01" / "separator"
    data = read_json(run / "evaluation.json")
    data["after"][0]["separator"] = "0" * 64
    (run / "evaluation.json").write_text(json.dumps(data))
    calls = []
    real = module.evaluate_separator
    monkeypatch.setattr(module, "evaluate_separator", lambda *a, **k: calls.append(a) or real(*a, **k))
    after = evaluate_run(run)
    assert len(calls) == 1
    assert after["after"][1] == before["after"][1]
    (run / "evaluation.json").write_text('{"damaged":')
    assert evaluate_run(run)["matrix"][1] == pytest.approx(before["matrix"][1])
    weights.unlink()
    with pytest.raises(RunError, match="has no model"):
        evaluate_run(run)
    assert other.is_dir()


@pytest.mark.parametrize("change", [{"protocol_version": 0}, {"version": 0}, {"protocol": "paper"}])
def test_scores_under_another_version_are_made_again(run, change, monkeypatch):
    result = evaluate_run(run)
    (run / "evaluation.json").write_text(json.dumps({**result, **change}))
    assert module.current_evaluation(run) is None
    calls = []
    monkeypatch.setattr(module, "evaluate_separator", lambda *a, **k: calls.append(a) or [])
    monkeypatch.setattr(module, "_summaries", lambda rows: {"rows": []})
    evaluate_run(run)
    assert len(calls) == 2


def test_one_task_alone(run):
    result = evaluate_run(run, tasks=[1])
    assert [step["task"] for step in result["after"]] == [1]
    assert "matrix" not in result  # a row is missing
    assert "matrix" in evaluate_run(run, tasks=[0])
    with pytest.raises(RunError, match=r"task 5 of .* is not finished; finished: 0, 1"):
        evaluate_run(run, tasks=[5])


def test_an_unfinished_run_is_scored_as_far_as_it_goes(run):
    (run / "tasks" / "01" / "task.json").unlink()
    assert RunFolder(run).finished_tasks() == [0]
    result = evaluate_run(run)
    assert result["forgetting"] is None
    assert len(result["matrix"]) == 1
    (run / "tasks" / "00" / "task.json").unlink()
    with pytest.raises(RunError, match="no finished task"):
        evaluate_run(run)


def test_paper_protocol_is_scored_on_its_own_lists(tone_store, run, store, capsys):
    stream = task_stream(tone_store, TINY_TASKS, protocol="paper", clip_samples=TINY_FRONT_END["clip_samples"])
    stream.protocol.save(run / "protocol.json")
    result = evaluate_run(run)
    assert set(result["after"][1]["lists"]) == {"paper-1"}
    degenerate = sum(bool(m.degenerate) for m in stream.protocol.at(1))
    assert degenerate > 0
    assert result["after"][1]["all"]["degenerate"] == degenerate
    command(run, store=None, task=None, batch_size=4, device="cpu")
    shown = capsys.readouterr().out
    released = result["after"][1]["all"]["with_degenerate"]["mean"]["sdr"]
    assert any("with degen." in line and f"{released:.2f}" in line for line in shown.splitlines())
    assert released != pytest.approx(result["after"][1]["all"]["mean"]["sdr"], abs=1e-3)


def test_mistakes_are_one_clear_line(run, tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        evaluate_run(tmp_path)
    other = make_tone_store(tmp_path / "other", seconds=1.2)
    with pytest.raises(DataError, match="is not the store"):
        evaluate_run(run, other)
    spec = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**spec, "store": str(tmp_path / "moved")}))
    with pytest.raises(DataError, match="--store"):
        evaluate_run(run)
    assert not (run / "evaluation.json").exists()


def test_command_prints_the_matrix_and_the_counts(run, protocol, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command(run, store=None, task=None, batch_size=4, device="cpu")
    shown = capsys.readouterr().out
    for text in ("after task", "average", "forgetting", "SI-SDR", "skipped", "degen.", "cross", "evaluation.json"):
        assert text in shown
    assert ", staleness " in shown
    assert f"protocol fixed version 1, {protocol.hash[:12]}" in shown
    kept = [budget_of(run, t).total / 1e6 for t in (0, 1)]
    assert f"MB kept after each: {kept[0]:.2f}, {kept[1]:.2f}" in shown
    (run / "tasks" / "01" / "task.json").unlink()  # one task alone: nothing can be forgotten yet
    command(run, store=None, task=None, batch_size=4, device="cpu")
    assert "forgetting" not in capsys.readouterr().out
    with pytest.raises(RunError):
        command(run / "tasks", store=None, task=None, batch_size=4, device="cpu")

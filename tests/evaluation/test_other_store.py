"""A run scored on data that it was not trained with."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml

from avsep.data.store import Store, StoreWriter
from avsep.errors import AvsepError, DataError, RunError
from avsep.evaluation.evaluate import evaluate_on, evaluate_run
from avsep.files import read_json
from support.commands import run as avsep
from support.tones import RATE, TONES_HZ, make_tone_store


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_tone_store(tmp_path_factory.mktemp("others") / "bank two", seconds=1.2)


@pytest.fixture
def run(tone_run, tmp_path):
    return shutil.copytree(tone_run, tmp_path / "run")


def few_classes(path, names, rate=RATE):
    """Classes of the tones' names, in an order of their own, with test clips alone."""
    order = []
    with StoreWriter(path, classes=names, sample_rate_hz=rate, origin={"generator": "tests"}) as writer:
        for number, name in enumerate(names):
            for k in range(2):
                time_s = np.arange(int(1.5 * rate)) / rate
                audio = 0.2 * np.sin(2 * np.pi * TONES_HZ.get(name, 700.0 + 90 * number) * (1 + k / 20) * time_s)
                order.append(f"{name}-{k}")
                writer.write_clip(
                    order[-1],
                    name,
                    "test",
                    audio.astype(np.float32),
                    object_frames=np.full((2, 3, 32, 32), 30 * number, np.uint8),
                    motion_frames=np.full((12, 1, 16, 16), 9 * k, np.uint8),
                )
        writer.finish(order)
    return path


def test_another_store_has_a_file_of_its_own(run, other, tone_store, monkeypatch):
    own = evaluate_run(run)
    result, path = evaluate_on(run, other, dependence=2)
    store = Store.open(other)
    assert path == run / f"evaluation-bank two-{store.content_hash[:8]}.json"
    assert read_json(path) == result
    assert read_json(run / "evaluation.json") == own
    assert (result["store"], result["split"], result["missing"]) == ("bank two", "test", [])
    assert result["store_hash"] == store.content_hash != own["store_hash"]
    assert result["matrix"][1][0] is not None
    assert "seconds" not in result["after"][0]
    assert result["visual_dependence"]["1"]["lists"]["headline"]["mixtures"] == 2
    filter_of = result["yardsticks"]["identity"]["filter"]
    assert (filter_of["whose"], filter_of["store_hash"]) == ("run", own["store_hash"])
    again, _ = evaluate_on(run, other)  # nothing is computed twice
    assert again == result
    by_kind, kind_path = evaluate_on(run, other, protocol="audiovisual", split="val", yardsticks=False)
    assert kind_path.name == f"evaluation-bank two-{store.content_hash[:8]}-audiovisual-val.json"
    assert by_kind["protocol"] == "audiovisual"
    assert "same-class" in by_kind["after"][1]["lists"]


def test_without_the_own_store_the_filter_is_of_the_other(run, other):
    spec = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**spec, "store": str(run / "gone")}))
    result, _ = evaluate_on(run, other)
    found = result["yardsticks"]["identity"]["filter"]
    assert (found["whose"], found["store_hash"]) == ("tested", result["store_hash"])


def test_without_training_clips_there_is_no_filter(run, tmp_path, capsys):
    spec = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**spec, "store": str(run / "gone")}))
    tests = few_classes(tmp_path / "tests", ["ding", "hum"])
    assert avsep("evaluate", run, "--store", tests, "--dependence", "0") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "No static filter beside the scores: no training clip of ding, hum is at hand." in shown
    assert "ideal mask" in shown
    (path,) = run.glob("evaluation-tests-*.json")
    assert {row["yardstick"] for row in read_json(path)["yardsticks"]["rows"]} == {"mixture", "ideal mask"}


def test_nothing_else_is_written_over(run, other, tmp_path):
    (tmp_path / "mine.json").write_text('{"my": "notes"}')
    (tmp_path / "photo.jpg").write_text("x")
    before = (run / "protocol.json").read_text()
    for out, told in (
        (run / "protocol.json", "is there and holds no scores"),
        (tmp_path / "mine.json", "is there and holds no scores"),
        (tmp_path / "photo.jpg", "is there and holds no scores"),
        (tmp_path / "photo.jpg" / "x.json", r"photo.jpg is a file, so that .*x.json cannot be written"),
    ):
        with pytest.raises(AvsepError, match=told):
            evaluate_on(run, other, out=out)
    assert (run / "protocol.json").read_text() == before
    assert (tmp_path / "mine.json").read_text() == '{"my": "notes"}'
    result, path = evaluate_on(run, other, out=tmp_path / "new" / "scores.json", tasks=[0])
    assert evaluate_on(run, other, out=path, tasks=[0])[0] == result


def test_classes_are_known_by_name_and_missing_ones_are_left_out(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    store = few_classes(tmp_path / "few", ["whirr", "oboe", "hum", "peep"])
    assert avsep("evaluate", run, "--store", store, "--dependence", "2") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "few has no test clip of ding: mixtures of these are left out" in shown
    assert "scores written to" in shown
    assert "avsep report" not in shown
    (path,) = run.glob("evaluation-few-*.json")
    result = read_json(path)
    assert result["missing"] == ["ding"]
    assert result["tasks"] == [["hum"], ["peep", "whirr"]]
    assert [step["task"] for step in result["after"]] == [1]  # task 0 has one class left
    assert set(result["after"][0]["lists"]) == {"task-1", "cross"}
    assert {r["class"] for r in result["after"][0]["rows"]} == {"hum", "peep", "whirr"}
    assert result["yardsticks"]["identity"]["filter"]["whose"] == "run"


def test_what_cannot_be_scored_is_one_line(run, other, tmp_path):
    strange = few_classes(tmp_path / "strange", ["oboe", "tuba"])
    with pytest.raises(DataError, match=r"strange has no test clip of a class that .* has learned \(ding, hum, peep"):
        evaluate_on(run, strange)
    with pytest.raises(DataError, match="no train clip of a class"):
        evaluate_on(run, few_classes(tmp_path / "tests", ["ding", "hum"]), split="train")
    with pytest.raises(DataError, match="holds audio at 8000 Hz, but the separator works at 11025 Hz"):
        evaluate_on(run, few_classes(tmp_path / "slow", ["ding", "hum"], rate=8000))
    with pytest.raises(DataError, match="protocol 'fixed' has no mixture over the test clips of ding in"):
        evaluate_on(run, few_classes(tmp_path / "one", ["ding", "oboe"]))
    with pytest.raises(RunError, match="holds the scores of the run's own test mixtures: give another file with --out"):
        evaluate_on(run, other, out=run / "evaluation.json")
    with pytest.raises(AvsepError, match="is a folder: name the file"):
        evaluate_on(run, other, out=tmp_path)
    with pytest.raises(RunError, match=r"task 5 of .* is not finished"):
        evaluate_on(run, other, tasks=[5])
    assert not list(run.glob("evaluation*.json"))


def test_the_command_tells_one_store_from_another(run, other, tone_store, tmp_path, capsys):
    moved = shutil.copytree(tone_store, tmp_path / "moved")
    assert avsep("evaluate", run, "--store", moved, "--dependence", "0", "--task", "0") == 0
    assert "next: avsep report" in capsys.readouterr().out
    assert (run / "evaluation.json").exists()
    out = tmp_path / "scores.json"
    assert avsep("evaluate", run, "--protocol", "audiovisual", "--out", out, "--dependence", "0", "--task", "0") == 0
    assert read_json(out)["protocol"] == "audiovisual"
    for arguments, said in (
        (["--out", out], "is for scores on another --store, --protocol or --split"),
        (["--store", other, "--split", "tset"], "no split 'tset': known: train, val, test"),
        (["--store", other, "--protocol", "papre"], "no protocol 'papre'"),
    ):
        assert avsep("evaluate", run, *arguments) == 2
        assert said in capsys.readouterr().err

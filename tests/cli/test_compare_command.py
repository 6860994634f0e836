"""``avsep compare``: from run folders to tables, a picture and a page."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import yaml

from avsep.data.tasks import task_stream
from avsep.errors import RunError
from avsep.evaluation import comparison_page
from avsep.evaluation.budget import budget_of
from avsep.evaluation.comparison import cells_of_runs, compare, with_enough_mixtures
from avsep.evaluation.evaluate import evaluate_run
from avsep.evaluation.yardsticks import YARDSTICKS, sdr_by_task
from avsep.files import read_json
from support.commands import run
from support.evaluations import cells
from support.pages import Page
from support.tones import TINY_FRONT_END, TINY_TASKS


@pytest.fixture(scope="module")
def scored(tone_run, tmp_path_factory):
    folder = shutil.copytree(tone_run, tmp_path_factory.mktemp("compare") / "scored")
    evaluate_run(folder)
    return folder


@pytest.fixture
def variant(scored, tmp_path):
    """A copy of the run that says of itself that it had other settings, and scores that lie ``shift`` dB higher."""

    def make(name, shift=0.0, evaluation=None, **settings):
        folder = shutil.copytree(scored, tmp_path / name)
        spec = yaml.safe_load((folder / "run.yaml").read_text())
        seed = settings.pop("seed", None)
        spec |= settings
        spec["train"]["seed"] = spec["train"]["seed"] if seed is None else seed
        (folder / "run.yaml").write_text(yaml.safe_dump(spec))
        scores = read_json(folder / "evaluation.json") | (evaluation or {})
        for step in scores["after"]:
            for row in step["rows"]:
                if row["sdr"] is not None:
                    row["sdr"] += shift
        (folder / "evaluation.json").write_text(json.dumps(scores))
        return folder

    return make


FINETUNE = {"strategy": "finetune", "memory": "none"}


def test_runs_become_methods_by_what_they_differ_in(variant):
    first, again = variant("first"), variant("again", seed=7)
    plain = variant("plain", **FINETUNE)
    found = cells_of_runs([first, again, plain])
    assert [(c.method, c.seed) for c in found] == [
        ("contavsep + random_per_class", 1234),
        ("contavsep + random_per_class", 7),
        ("finetune", 1234),
    ]
    assert found[0].name == str(first)
    records = [read_json(first / "tasks" / t / "task.json") for t in ("00", "01")]
    assert found[0].seconds == pytest.approx(sum(r["seconds"] for r in records))
    assert found[0].memory_bytes == budget_of(first, 0).total  # what the last task begins with

    default = variant("default", strategy={"name": "contavsep", "params": {"weight_mask": 0.3}}, seed=8)
    lighter = variant("lighter", strategy={"name": "contavsep", "params": {"weight_mask": 0.0}})
    names = [c.method for c in cells_of_runs([first, default, lighter, plain])]
    assert names[0] == names[1] == "contavsep + random_per_class (weight_mask 0.3)"  # a default said aloud is no other
    assert names[2:] == ["contavsep + random_per_class (weight_mask 0.0)", "finetune"]

    presets = [variant("a", preset="a"), variant("b", preset="b")]
    spec = yaml.safe_load((presets[1] / "run.yaml").read_text())
    spec["train"]["epochs"] = 50
    (presets[1] / "run.yaml").write_text(yaml.safe_dump(spec))
    assert [c.method.partition("(")[2] for c in cells_of_runs(presets)] == ["preset a)", "preset b)"]


def test_tables_files_and_picture(variant, tmp_path, capsys, monkeypatch):
    for package in ("matplotlib", "jinja2"):
        pytest.importorskip(package)
    from PIL import Image

    monkeypatch.setenv("COLUMNS", "160")
    runs = [
        variant("p0", **FINETUNE),
        variant("p1", seed=7, **FINETUNE),
        variant("c0", 1.5),
        variant("c1", 1.5, seed=7),
    ]
    runs += [variant("j0", 2.0, strategy="joint", memory="none")]
    files = [tmp_path / name for name in ("all.csv", "all.png", "all.html")]
    outputs = [o for option, path in zip(("--csv", "--plot", "--html"), files, strict=True) for o in (option, path)]
    assert run("compare", *runs, "--baseline", "finetune", *outputs) == 0
    shown = capsys.readouterr().out
    for text in ("less finetune", "+1.50 [+1.50, +1.50] *", "forgetting", "intransig.", "SI-SDR", "protocol", "task 1"):
        assert text.lower() in shown.lower()

    rows = {(r["method"], r["measure"]): r for r in csv.DictReader(files[0].read_text().splitlines())}
    mine = rows["contavsep + random_per_class", "average"]
    assert (mine["seeds"], float(mine["difference"]), mine["significant"]) == ("2", pytest.approx(1.5), "true")
    assert rows["joint", "intransigence"]["seeds"] == rows["finetune", "intransigence"]["seeds"] == "1"
    assert float(rows["finetune", "intransigence"]["mean"]) == pytest.approx(2.0)
    assert float(rows["finetune", "seconds"]["mean"]) > 0
    assert rows["finetune", "average"]["difference"] == ""
    result = compare(cells_of_runs(runs), baseline="finetune")
    assert float(mine["mean"]) == pytest.approx(result["contavsep + random_per_class"].values["average"].mean, abs=1e-6)

    with Image.open(files[1]) as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(2**20)) > 20
    page = Page(files[2].read_text(encoding="utf-8"))
    # 10 measures, and as many differences, do not fit side by side: two tables each
    assert len(page.all("table")) == 2 + 2 + 1 + 1
    assert len(page.all("source")) == 3  # the picture for a narrow screen, a dark one, and both
    assert [i["src"][:22] for i in page.all("img")] == ["data:image/png;base64,"]
    assert not [a for tag in ("script", "link") for a in page.all(tag) if "http" in str(a)]


def test_yardsticks_stand_beside_methods_and_pair_with_the_baseline(variant, tmp_path, capsys, monkeypatch):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "120")
    runs = [variant("p0", **FINETUNE), variant("p1", 1.0, seed=7, **FINETUNE), variant("c0", 2.0)]
    page = tmp_path / "page.html"
    assert run("compare", *runs, "--baseline", "finetune", "--csv", tmp_path / "all.csv", "--html", page) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120
    assert [sum(line.split()[:1] == [name] for line in shown.splitlines()) for name in ("mixture", "static")] == [3, 3]
    result = compare(cells_of_runs(runs), baseline="finetune")
    evaluation = read_json(runs[0] / "evaluation.json")
    assert [m.method for m in result.methods] == ["finetune", "contavsep + random_per_class"]
    assert [m.method for m in result.yardsticks] == list(YARDSTICKS)
    for name, (first, second) in sdr_by_task(evaluation).items():
        values = result[name].values
        assert (values["task-0"].mean, values["task-1"].mean) == pytest.approx((first, second))
        assert not {"forgetting", "bwt"} & set(values)
        own = result["finetune"].values["average"]
        assert result[name].differences["average"].mean == pytest.approx((first + second) / 2 - own.mean)
        assert len(result[name].differences["average"].per_seed) == 2  # each of the baseline's seeds
    rows = {(r["method"], r["measure"]): r for r in csv.DictReader((tmp_path / "all.csv").read_text().splitlines())}
    assert float(rows["ideal mask", "sdr"]["mean"]) == pytest.approx(result["ideal mask"].values["sdr"].mean, abs=1e-6)
    assert page.read_text().count("static filter") == 2 + 2 + 1

    for folder in runs:  # of an earlier version: no yardsticks, and all else as it is
        old = read_json(folder / "evaluation.json")
        del old["yardsticks"]
        (folder / "evaluation.json").write_text(json.dumps(old))
    without = compare(cells_of_runs(runs), baseline="finetune")
    assert without.yardsticks == ()
    assert without.methods == result.methods


@pytest.mark.slow
def test_lists_apart_and_other_pictures_are_compared(tone_store, tone_run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "120")
    stream = task_stream(tone_store, TINY_TASKS, protocol="audiovisual", clip_samples=TINY_FRONT_END["clip_samples"])
    one = shutil.copytree(tone_run, tmp_path / "one")
    stream.protocol.save(one / "protocol.json")
    evaluation = evaluate_run(one, dependence=2)
    two = shutil.copytree(one, tmp_path / "two")
    spec = yaml.safe_load((two / "run.yaml").read_text())
    (two / "run.yaml").write_text(yaml.safe_dump({**spec, "strategy": "finetune"}))
    scores = read_json(two / "evaluation.json")
    rows = scores["after"][-1]["rows"]  # of a separator that cannot be asked for one of the lists
    scores["after"][-1]["rows"] = [r for r in rows if r["list"] != "three"]
    scores["visual_dependence"]["1"]["lists"]["headline"]["changes"]["still"] = -4.25
    (two / "evaluation.json").write_text(json.dumps(scores))
    assert run("compare", two, one, "--html", tmp_path / "page.html", "--csv", tmp_path / "all.csv") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120
    assert "-4.25" in shown
    assert "1: same-class" in shown
    result = compare(cells_of_runs([two, one]))
    step = evaluation["after"][-1]
    for name in ("same-class", "three", "absent-pair", "background"):
        value = result["contavsep + random_per_class"].values[f"list:{name}"].mean
        assert value == pytest.approx(step["lists"][name]["mean"]["sdr"])
        assert f"list:{name}" in result["static filter"].values
    first = result["finetune + random_per_class"]
    assert "list:three" not in first.values
    assert first.values["sdr"].mean == pytest.approx(step["all"]["mean"]["sdr"])
    assert first.counts["scored"] == step["all"]["scored"] == 12
    assert "released_sdr" not in first.values  # pairs of one class are a list of their own
    assert first.dependence["headline"]["still"] == -4.25
    text = (tmp_path / "page.html").read_text()
    assert "Lists apart" in text
    assert "−4.25" in text or "-4.25" in text
    assert "pictures:headline:still" in (tmp_path / "all.csv").read_text()


def test_joint_runs_bound_the_methods_of_their_separator(variant, capsys):
    plain, joint = variant("plain", **FINETUNE), variant("joint", 3.0, strategy="joint", memory="none")
    assert run("compare", plain, "--joint", joint) == 0
    assert "3.00" in capsys.readouterr().out
    spec = yaml.safe_load((joint / "run.yaml").read_text())
    spec["separator"]["front_end"]["align_corners"] = False
    (joint / "run.yaml").write_text(yaml.safe_dump(spec))
    assert run("compare", plain, "--joint", joint) == 2
    assert "trained another separator than" in capsys.readouterr().err
    assert run("compare", plain, joint) == 0  # beside it, but no bound of it
    assert "intransig" not in capsys.readouterr().out


def test_the_settings_in_which_runs_differ_are_said(variant, capsys):
    train = yaml.safe_load((variant("as-it-is") / "run.yaml").read_text())["train"]
    plain, longer = variant("plain", **FINETUNE), variant("longer", train={**train, "epochs": 50}, seed=7)
    record = read_json(longer / "tasks/01/task.json")
    (longer / "tasks/01/task.json").write_text(json.dumps(record | {"steps": record["steps"] + 30}))
    steps = sum(read_json(plain / "tasks" / t / "task.json")["steps"] for t in ("00", "01"))
    assert run("compare", plain, longer, "--json", "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(shown.out)
    own, other = "finetune", "contavsep + random_per_class"
    assert found["differing_settings"] == {
        "steps": {own: str(steps), other: str(steps + 30)},
        "memory.name": {own: "none", other: "random_per_class"},
        "train.epochs": {own: str(train["epochs"]), other: "50"},
    }
    assert [m["method"] for m in found["methods"]] == [own, other]
    assert run("compare", plain, longer) == 0
    assert "train.epochs: 2 (finetune); 50 (contavsep + random_per_class)" in capsys.readouterr().out
    assert run("compare", plain) == 0
    assert "differ" not in capsys.readouterr().out


def test_there_is_no_interval_where_there_are_too_few_mixtures(tmp_path):
    result = compare([*cells("a", [0]), *cells("b", [0])], baseline="a", resamples=50)
    scored = int(min(method.counts["scored"] for method in result.methods))
    assert with_enough_mixtures(result, scored) is result
    few = with_enough_mixtures(result, scored + 1)
    assert few["b"].values["average"].mean == result["b"].values["average"].mean
    assert not few["b"].differences["average"].significant
    assert comparison_page.interval_text(few["b"].values["average"]) == f"{few['b'].values['average'].mean:.2f}"
    assert f"No intervals: {scored} scored test mixtures are too few" in comparison_page.caption(few)
    rows = {(r["method"], r["measure"]): r for r in csv.DictReader(comparison_page.csv_text(few).splitlines())}
    row = rows["b", "average"]
    assert row["mean"]
    assert row["difference"]
    assert [row[key] for key in ("low", "high", "difference_low", "difference_high", "significant")] == [""] * 5
    json.dumps(few.as_dict(), allow_nan=False)
    for package in ("matplotlib", "jinja2"):
        pytest.importorskip(package)
    assert not re.search(r"[>\[ ]nan[,\] <]", comparison_page.render_page(few))


def test_what_cannot_be_compared_is_said_in_one_line(variant, tmp_path, capsys):
    one, alike = variant("one"), variant("alike")
    assert run("compare", one, alike) == 2
    assert "are both method 'contavsep + random_per_class' with seed 1234" in capsys.readouterr().err
    assert run("compare", one, variant("two", seed=7), "--baseline", "finetune") == 2
    assert "no method 'finetune'" in capsys.readouterr().err
    assert run("compare", one, "--plot", tmp_path / "a.gif") == 2
    assert "name it a.png, a.svg, a.pdf" in capsys.readouterr().err
    assert run("compare", one, "--html", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err
    assert run("compare", tmp_path) == 2
    assert "is not a run folder" in capsys.readouterr().err

    other = variant("other", seed=7)
    from avsep.data.protocol import Protocol

    protocol = Protocol.load(other / "protocol.json")
    fewer = Protocol(**{**vars(protocol), "mixtures": protocol.mixtures[1:]})
    fewer.save(other / "protocol.json")
    assert run("compare", one, other) == 2
    assert f"run avsep evaluate {other}" in capsys.readouterr().err  # its scores are of other mixtures than its own
    scores = read_json(other / "evaluation.json") | {"protocol_hash": fewer.hash}
    (other / "evaluation.json").write_text(json.dumps(scores))
    assert run("compare", one, other) == 2
    assert "were tested on different mixtures" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"protocol_version": 0}, {"version": 0}, {"store_hash": "0" * 64}])
def test_scores_of_another_version_are_scored_again_and_never_mixed(change, variant):
    old = variant("old", evaluation=change)
    with pytest.raises(RunError, match="has no scores of its last task as it is now: run avsep evaluate"):
        cells_of_runs([old])


def test_many_methods_have_styles_of_their_own():
    styles = [comparison_page._style(number) for number in range(24)]
    assert len(set(styles)) == 24
    places = [comparison_page._offset(number, 24) for number in range(24)]
    assert max(map(abs, places)) < 0.2
    assert comparison_page._offset(0, 1) == 0


def test_a_table_of_many_columns_is_written_as_several():
    for count in (1, 6, 7, 12, 13, 30):
        columns = {f"task-{k}": f"task {k}" for k in range(count)}
        groups = comparison_page._apart(columns)
        assert {key: of for group in groups for key, of in group.items()} == columns
        assert all(0 < len(group) <= comparison_page._MOST_COLUMNS for group in groups)
        assert len(groups) == -(-count // comparison_page._MOST_COLUMNS)


def test_names_on_the_page_are_text():
    for package in ("matplotlib", "jinja2"):
        pytest.importorskip(package)
    result = compare([*cells("<script>a</script>", [0]), *cells("b", [0])], baseline="<script>a</script>", resamples=50)
    text = comparison_page.render_page(result)
    assert "<script" not in text
    assert "&lt;script&gt;a" in text
    Page(text)


def test_one_seed_and_paper_pairs_are_said():
    result = compare(cells("m", [0], paper=True), resamples=50)
    assert "with one seed they cover the choice of test clips alone" in comparison_page.caption(result)
    assert "protocol paper version 1" in comparison_page.caption(result).lower()
    for package in ("matplotlib", "jinja2"):
        pytest.importorskip(package)
    assert "SDR+d" in comparison_page.render_page(result)

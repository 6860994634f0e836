"""Tables of made-up results: what must be said of a row stands in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from avsep.evaluation.comparison import Difference, Estimate, MethodResult
from avsep.reproduce import dataset, load_grid_preset
from avsep.reproduce.board_page import _row
from avsep.reproduce.dataset import BENCHMARK
from avsep.reproduce.plots import _dots, _sizes
from avsep.reproduce.tables import Line, Table, _over_memory, csv_rows, markdown


def table(data_set=BENCHMARK, *, silent=0.0, both=3):
    ours = MethodResult(
        method="m",
        seeds=(0, 1, 2),
        values={"sdr": Estimate(5.0, 4.0, 6.0, (4.5, 5.0, 5.5))},
        differences={"sdr": Difference(1.0, 0.5, 1.5, (1.0,) * both)},
        curves={},
        matrix=((5.0,),),
        counts={"scored": 10.0, "skipped": silent, "silent_estimates": silent, "degenerate": 0.0},
        memory_bytes=2_000_000,
    )
    lines = (
        Line("m", "method", "1 a class", ours, (7.0, 8.0, 9.0), commits=("aaa",)),
        Line("control", "plain", "1 a class", None, None, commits=("bbb", "aaa")),
    )
    return Table(
        "table1", "Table 1", data_set, "small", {"iquery": (0, 1, 2)}, {"iquery": lines}, "control", "fixed version 1"
    )


def row(made):
    return next(line for line in markdown(made).splitlines() if line.startswith("| method | 2.00"))


def test_silent_estimates_are_marked():
    assert "5.00 [4.00, 6.00] |" in row(table())
    assert "5.00 [4.00, 6.00] (1.5 silent) |" in row(table(silent=1.5))
    assert "silent: mixtures" in markdown(table(silent=1.5))
    assert "silent" not in markdown(table())
    assert csv_rows(table(silent=1.5))[0]["silent_estimates"] == 1.5


def test_a_difference_of_fewer_seeds_says_so():
    assert "| +1.00 [0.50, 1.50]* |" in row(table())
    assert "| +1.00 [0.50, 1.50]* (1 of 3 seeds) |" in row(table(both=1))


def test_a_picture_shows_the_differences_beside_the_scores():
    figure_of = pytest.importorskip("matplotlib.figure").Figure
    made = table()
    (line, control) = made.lines["iquery"]
    again = replace(line, row="again", memory="none")
    figure = _dots(figure_of, replace(made, lines={"iquery": (line, again, control)}), ["iquery"], True)
    scores, differences, paper = figure.axes
    assert [text.get_text() for text in scores.get_yticklabels()] == ["method, memory", "method", "plain"]
    assert differences.get_title(loc="left") == "less plain, by seed and mixture"
    drawn = [one.get_xdata() for one in differences.lines if list(one.get_ydata()) == [0, 0]]
    assert [list(x) for x in drawn if len(x) == 2] == [[0.5, 1.5]]
    assert [list(one.get_xdata()) for one in paper.lines] == [[7.0], [7.0]]


def test_a_row_of_the_board_has_the_interval_of_its_difference():
    found = _row(table().lines["iquery"][0])
    assert (found["difference"], found["least"], found["most"]) == (1.0, 0.5, 1.5)


def test_a_table_names_its_protocol_and_each_row_its_commits():
    assert "Protocol fixed version 1." in markdown(table())
    assert markdown(table()).endswith("Commit aaa, bbb.\n")
    assert [r["commit"] for r in csv_rows(table())] == ["aaa", "bbb aaa"]


def test_only_the_benchmark_is_said_to_be_other_data():
    assert "different data and sizes" in markdown(table())
    assert "different data and sizes" not in markdown(table("music21"))


def test_a_picture_of_sizes_shows_the_differences_too():
    figure_of = pytest.importorskip("matplotlib.figure").Figure
    (line, _) = table().lines["iquery"]
    least = replace(line, row="K=1", label="K = 1", ours=replace(line.ours, differences={}))
    lines = (least, replace(line, row="K=4", label="K = 4"))
    made = replace(table(), name="table3", lines={"iquery": lines}, control="K=1")
    scores, differences, _paper = _sizes(figure_of, made, ["iquery"], True).axes
    assert differences.get_title(loc="left") == "less K = 1, by seed and mixture"
    assert [list(map(float, drawn.get_xdata())) for drawn in (scores.lines[0], differences.lines[1])] == [[1, 4], [4]]
    assert list(differences.lines[1].get_ydata()) == [1.0]
    assert list(differences.get_xticks()) == [1, 4]
    assert len(_sizes(figure_of, made, ["iquery"], False).axes) == 2
    assert (
        len(_sizes(figure_of, replace(made, control="K=2"), ["iquery"], True).axes) == 2
    )  # nothing to be held against


def test_sizes_of_memory_come_to_one_number():
    (line, unfinished) = table().lines["iquery"]
    larger = replace(line.ours, memory_bytes=8_000_000, values={"sdr": Estimate(6.0, 5.0, 7.0, (6.0,))})
    (note,) = _over_memory({"iquery": [line, unfinished, replace(line, ours=larger)]})
    assert note.startswith(
        "iQuery: the mean of the SDR over the logarithm of the bytes kept, from 2.00 to 8.00 MB, is 5.50 dB"
    )
    assert _over_memory({"iquery": [line, unfinished]}) == _over_memory({"iquery": [line, line]}) == []


def test_what_else_is_known_of_a_row_stands_in_a_second_block():
    made = table()
    (line, control) = made.lines["iquery"]
    values = {**line.ours.values, "list:same-class": Estimate(1.5, 1, 2), "staleness": Estimate(-0.25, -1, 0)}
    ours = replace(line.ours, values=values, dependence={"headline": {"exchanged": -7.5}}, seconds=123.4)
    full = replace(made, lines={"iquery": (replace(line, ours=ours), control)})
    text = markdown(full)
    assert "| method | staleness | same class | exchanged pictures | core s |" in text
    assert "| method | -0.25 | 1.50 | -7.50 | 123 |" in text
    assert "| plain |  |  |  |  |" in text
    row = csv_rows(full)[0]
    assert (row["sdr_of_same-class"], row["exchanged_pictures_headline"]) == ("1.5000", "-7.5000")
    for told in (
        "same class, three, background: SDR of separate lists",
        "pictures: the change of SDR with such pictures",
    ):
        assert told in text
        assert told not in markdown(made)
    assert "exchanged" not in markdown(made)


def test_a_preset_says_which_benchmark_it_is_of(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(dataset, "synthesise", lambda folder, **settings: asked.update(settings))
    monkeypatch.setattr(dataset.VISUAL_ENCODERS, "create", lambda name: None)
    preset = load_grid_preset("looking")
    dataset.open_dataset("synth", preset, tmp_path)
    assert (asked["version"], asked["clips_per_class"]) == (2, (40, 8, 5))
    assert preset.separator("aligned_by_picture").mask_decoder.params["class_given"] is False
    assert preset.separator("aligned").mask_decoder.params["layers"] == 3
    assert load_grid_preset("small").dataset.version == 1

"""What makes rows of a grid comparable: class orders, updates, settings chosen alike, one arithmetic; and power."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import yaml

from avsep.data.store import Store
from avsep.errors import ConfigError, UnknownNameError
from avsep.reproduce import build_grid, build_table, build_tuning, load_grid_preset
from avsep.reproduce.grid import HYPOTHESES, rotated
from avsep.reproduce.power import hours_left, needs, seeds_needed
from avsep.reproduce.tuning import FIRST, LEAST, choices, next_round
from support.made_cells import finished
from support.source_tree import ROOT
from support.tones import TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN

TASKS = [list(names) for names in TINY_TASKS]


@pytest.fixture(scope="module")
def store(tone_store):
    return Store.open(tone_store)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))

    def of(**changes):
        data = {"tasks": TASKS, "bases": {"iquery": {"preset": str(folder / "tiny.yaml")}}, **changes}
        (folder / "grid.yaml").write_text(yaml.safe_dump(data))
        return load_grid_preset(str(folder / "grid.yaml"))

    return of


def test_every_class_is_equally_often_in_every_task():
    tasks = [[f"{t}{i}" for i in range(3)] for t in range(4)]
    orders = [rotated(tasks, number) for number in range(12)]
    assert orders[0] == tasks
    assert orders[1] == tasks[1:] + tasks[:1]
    assert len({str(order) for order in orders}) == 12
    places = Counter((name, place) for order in orders for place, names in enumerate(order) for name in names)
    assert set(places.values()) == {3}
    assert len(places) == 12 * 4
    assert orders[4] != tasks
    assert sorted(map(sorted, orders[4])) != sorted(map(sorted, tasks))  # the classes of a task are others too


def test_seeds_have_orders_of_their_own_and_rows_of_a_seed_share_it(load, store):
    grid = build_grid(["table1"], load(orders="rotated"), store, seeds=3)
    by_seed = {}
    for cell in grid.cells.values():
        by_seed.setdefault(cell.seed, set()).add(cell.spec.tasks)
    assert [len(tasks) for tasks in by_seed.values()] == [1, 1, 1]
    assert len(set.union(*by_seed.values())) == len({stream.protocol.hash for stream in grid.streams.values()}) == 2
    same = build_grid(["table1"], load(), store, seeds=3)
    assert len({cell.spec.tasks for cell in same.cells.values()}) == 1


def test_every_row_has_the_same_updates_but_the_one_that_has_more(load, store):
    preset = load(updates=6, train={"epochs": 2}, strategy_train={"joint-long": {"epochs": 6}})
    grid = build_grid(["table1"], preset, store, seeds=1)
    steps = {cell.row.name: (cell.first_steps, cell.steps) for cell in grid.cells.values()}
    assert steps.pop("joint-long") == (18, 18)
    assert set(steps.values()) == {(6, 6)}
    assert len(steps) == 13
    trains = {cell.row.name: cell.spec.train for cell in grid.cells.values()}
    usual = TINY_TRAIN["current_repeats"], TINY_TRAIN["memory_repeats"]
    assert trains["finetune"].current_repeats * usual[1] == trains["finetune"].memory_repeats * usual[0]
    with pytest.raises(ConfigError, match="updates = 7 do not divide into 2 epochs"):
        build_grid(["table1"], load(updates=7, train={"epochs": 2}), store, seeds=1)


def test_a_row_with_every_weight_at_zero_is_plain_replay(load, store):
    chosen = {"lwf+memory": {"weight_mask": 0}, "ewc": {"weight": 0}, "lwf": {"weight_mask": 0.5}}
    grid = build_grid(["table1"], load(bases={**load().model_dump()["bases"]}, strategies=chosen), store, seeds=1)

    def key(row):
        return grid.keys("table1", "iquery", row)[0]

    assert key("lwf+memory") == key("finetune+memory")
    assert key("ewc") == key("finetune")
    assert key("ewc+memory") == key("finetune+memory")  # the strategy's settings, where the row has none of its own
    assert grid.cells[key("lwf")].spec.strategy.params == {"weight_mask": 0.5}


def test_settings_of_a_base_go_over_those_of_the_grid(load, store):
    preset = load(strategies={"contavsep": {"weight_mask": 0.1}})
    own = preset.bases["iquery"].model_copy(update={"strategies": {"contavsep+memory": {"weight_mask": 0.2}}})
    preset = preset.model_copy(update={"bases": {"iquery": own, "other": preset.bases["iquery"]}})
    assert preset.params("iquery", "contavsep+memory", "contavsep") == {"weight_mask": 0.2}
    assert preset.params("other", "contavsep+memory", "contavsep") == {"weight_mask": 0.1}
    rows = {
        r.name: r.params
        for r in build_grid(["table1"], preset, store, seeds=1, bases=["iquery"]).rows["table1"]["iquery"]
    }
    assert rows["contavsep-published+memory"] == {}  # beside what was chosen


# ---------------------------------------------------------------------- choosing settings


def results_of(grid, score):
    """Finished cells whose validation SDR is ``score(row, number of the seed)``; a row's first seeds alone where it
    is None."""
    made = {}
    for cell in grid.cells.values():
        value = score(cell.row.name, cell.seed - min(grid.seeds))
        if value is not None:
            made[cell.key] = SimpleNamespace(validation=value)
    return made


@pytest.fixture(scope="module")
def tuning(load, store):
    preset = load(tuning={"lwf+memory": {"weight_mask": [0, 0.1, 0.3]}})
    return build_tuning(preset, store, seeds=8)


def candidates(part):
    return Counter(cell.row.name.partition("=")[2] for cell in part.cells.values())


def test_seeds_are_spent_where_candidates_are_close(tuning):
    grid = tuning
    assert candidates(next_round(grid, {})) == {"0": FIRST, "0.1": FIRST, "0.3": FIRST}
    level = {"0": 5.0, "0.1": 5.05, "0.3": 2.0}
    noise = [0.3, -0.2, 0.1, 0.4, -0.1, 0.0, 0.2, -0.3]

    def score(row, number, known):
        name = row.partition("=")[2]
        wobble = {"0": 0.1, "0.1": -0.1, "0.3": 0.0}[name] * (-1) ** number
        return level[name] + noise[number] + wobble if number < known[name] else None

    known = dict.fromkeys(level, FIRST)
    found = results_of(grid, lambda row, n: score(row, n, known))
    (choice,) = choices(grid, found)
    assert choice.open == (0, 1)
    assert choice.best is None  # fewer than LEAST seeds of two that are left
    assert candidates(next_round(grid, found)) == {"0": 1, "0.1": 1}
    for count in range(FIRST + 1, 9):
        known |= {"0": count, "0.1": count}
        found = results_of(grid, lambda row, n, known=known: score(row, n, known))
        (choice,) = choices(grid, found)
        assert (choice.best is not None) == (count >= LEAST)
    assert choice.best == {"weight_mask": 0.1}
    assert [count for _, _, count in choice.candidates] == [8, 8, FIRST]
    assert next_round(grid, found) is None


def test_one_that_is_left_needs_no_more_seeds(tuning):
    grid = tuning
    level = {"0": 1.0, "0.1": 5.0, "0.3": 2.0}
    found = results_of(grid, lambda row, n: level[row.partition("=")[2]] + 0.01 * n if n < FIRST else None)
    (choice,) = choices(grid, found)
    assert (choice.open, choice.best) == ((1,), {"weight_mask": 0.1})
    assert next_round(grid, found) is None


def test_what_seeds_do_not_tell_apart_is_not_given_up(tuning):
    """0.6 dB behind, with differences of 2 dB between seeds; 0.6 dB in every seed is given up."""
    grid = tuning
    lost = {"0": (0.0, 0.0, 0.0), "0.1": (2.6, -1.4, 0.6), "0.3": (0.6, 0.6, 0.6)}
    found = results_of(grid, lambda row, n: 5.0 - lost[row.partition("=")[2]][n] if n < FIRST else None)
    (choice,) = choices(grid, found)
    assert choice.open == (0, 1)


def test_a_candidate_that_fails_is_given_up(tuning):
    grid = tuning
    level = {"0": 1.0, "0.1": 5.0, "0.3": 2.0}
    bad = [key for key, cell in grid.cells.items() if cell.row.name.endswith("=0.1") and cell.seed == grid.seeds[1]]
    found = results_of(grid, lambda row, n: level[row.partition("=")[2]] + 0.01 * n if n < LEAST else None)
    del found[bad[0]]
    (choice,) = choices(grid, found)
    assert choice.best is None
    assert candidates(next_round(grid, found)) == {"0.1": 1}
    (choice,) = choices(grid, found, bad)
    assert (choice.open, choice.best) == ((2,), {"weight_mask": 0.3})
    assert next_round(grid, found, bad) is None


def test_the_choice_is_of_the_seeds_that_all_have(tuning):
    """One candidate has an easy seed more; it is worse in every seed that both have."""
    grid = tuning

    def score(row, number):
        name = row.partition("=")[2]
        if number >= (LEAST + 1 if name == "0.1" else LEAST):
            return None
        return {"0": 5.1, "0.1": 5.0, "0.3": 1.0}[name] + 0.1 * (number % 2) + 20.0 * (number == LEAST)

    (choice,) = choices(grid, results_of(grid, score))
    assert choice.open == (0, 1)
    assert choice.best == {"weight_mask": 0.0}


def test_a_round_that_was_cut_off_gives_nothing_up(tuning):
    grid = tuning
    found = results_of(grid, lambda row, n: 5.0 if n < (FIRST + 1 if row.endswith("=0") else FIRST) else None)
    (choice,) = choices(grid, found)
    assert choice.open == (0, 1, 2)
    assert candidates(next_round(grid, found)) == {"0.1": 1, "0.3": 1}


def test_candidates_are_combinations_or_a_list(load, store):
    preset = load(
        tuning={"plop": {"weight_features": [0.1, 1], "weight_logits": [0, 2]}, "ewf+memory": [{"distillation": 0.5}]}
    )
    pairs = [(0.1, 0), (0.1, 2), (1, 0), (1, 2)]
    assert preset.candidates("plop") == [{"weight_features": f, "weight_logits": w} for f, w in pairs]
    assert preset.candidates("ewf+memory") == [{"distillation": 0.5}]
    with pytest.raises(UnknownNameError, match=r"no row named 'avcil' to tune: did you mean 'avcil\+memory'"):
        build_tuning(load(tuning={"avcil": {"weight_class": [1]}}), store)


# ---------------------------------------------------------------------- what is set beside what


ROWS = ["finetune+memory", "lwf+memory", "ewc+memory"]


def test_cells_of_another_processor_are_not_set_beside_the_others(load, store, tmp_path):
    grid = build_grid(["table1"], load(orders="rotated"), store, seeds=3, rows=ROWS)
    odd = grid.keys("table1", "iquery", "lwf+memory")[1]

    def score(cell):
        return 5.0 + (cell.row.strategy == "ewc") + 100.0 * (cell.key == odd)

    results = finished(grid, tmp_path / "cells", score, lambda cell: "other" if cell.key == odd else "one kind")
    table = build_table(grid, "table1", results, data_set="tones", preset="tiny", resamples=200)
    lines = {line.row: line for line in table.lines["iquery"]}
    lwf = lines["lwf+memory"]
    assert lwf.ours.values["sdr"].mean == pytest.approx(5.0)
    assert len(lwf.ours.seeds) == 2
    (said,) = lwf.missing
    assert said.startswith(f"seed {grid.cells[odd].seed}: it is of other, torch unknown, and the seed's others of one")
    assert lines["ewc+memory"].ours.differences["sdr"].mean == pytest.approx(1.0)
    assert lines["ewc+memory"].p_holm == pytest.approx(2 * lines["ewc+memory"].ours.differences["sdr"].p)
    assert lwf.updates == 6


def test_power_is_that_of_the_paired_t_test():
    """34 pairs for half a deviation and 199 for a fifth, as in Cohen, Statistical Power Analysis, 1988."""
    assert [seeds_needed(1.0, d) for d in (0.5, 0.2, 1.0)] == [34, 199, 10]
    assert seeds_needed(0.0, 0.5) == 2
    counts = [seeds_needed(deviation, 0.5) for deviation in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)]
    assert counts == sorted(counts)  # less needs no more
    with pytest.raises(ValueError, match="difference must be above 0"):
        seeds_needed(1.0, 0.0)


def test_what_is_left_to_run_for_a_difference(load, store, tmp_path):
    grid = build_grid(["table1"], load(orders="rotated"), store, seeds=4, rows=ROWS)

    def score(cell):
        number = cell.seed - grid.seeds[0]
        return {"finetune": 5.0, "lwf": 5.0 + (-1) ** number, "ewc": 6.0}[cell.row.strategy]

    results = finished(grid, tmp_path / "cells", score)
    found = {need.row: need for need in needs(grid, "table1", results, 0.5)}
    assert set(found) == {"lwf+memory", "ewc+memory"}
    lwf = found["lwf+memory"]
    assert (lwf.have, lwf.mean) == (4, 0)
    assert lwf.deviation == pytest.approx((4 / 3) ** 0.5)
    assert lwf.seeds == seeds_needed((4 / 3) ** 0.5, 0.5)
    assert lwf.hours == pytest.approx((lwf.seeds - 4) * 2)
    assert (found["ewc+memory"].seeds, found["ewc+memory"].hours) == (2, 0)
    more = build_grid(["table1"], load(orders="rotated"), store, seeds=5, rows=ROWS)
    missing = [cell for key, cell in more.cells.items() if key not in results]
    assert len(missing) == 3
    assert hours_left(missing, results, more.cells.values()) == pytest.approx(3 * 2)
    assert hours_left(missing, {}, more.cells.values()) is None


# ---------------------------------------------------------------------- hypotheses


def test_hypotheses_are_said_with_what_was_found(load, store, tmp_path):
    grid = build_grid(["crosssdc"], load(orders="rotated"), store, seeds=4)
    rows = {row.name: row for row in grid.rows["crosssdc"]["iquery"]}
    assert {name for h in HYPOTHESES for name in (h.row, h.against)} <= set(rows)
    assert rows["x0.1"].params == {"weight_instance": pytest.approx(0.01), "weight_class": pytest.approx(0.03)}
    specs = {c.row.name: c.spec for c in grid.cells.values()}
    decoder = specs["projected"].separator.mask_decoder
    assert decoder.params["contrast_embedding"] == "projected"
    assert specs["published-longer"].train.epochs == 3 * specs["published"].train.epochs
    assert specs["mask-batch"].train.batch_size == 4 * specs["mask"].train.batch_size
    level = {"mask": 5.0, "published": 4.0, "x0.1": 5.0, "detached": 3.5, "projected": 4.5}

    def score(cell):  # seeds differ more where the contrast is weak
        wobble = 2.0 * (-1) ** cell.seed if cell.row.name == "x0.1" else 0.0
        return level.get(cell.row.name, 5.0) + wobble

    results = finished(grid, tmp_path / "cells", score)
    table = build_table(grid, "crosssdc", results, data_set="tones", preset="tiny", resamples=400)
    said = {line.split(", ")[1]: line for line in table.notes}
    ends = "found -1.00 dB [-1.00, -1.00] at the end and -1.00 [-1.00, -1.00] after the first task, 4 seeds"
    assert said["H1"].endswith(f"{ends}: as predicted.")
    assert said["H3"].endswith("4 seeds: not told from 0.")
    assert said["H4"].endswith("4 seeds: the opposite.")
    assert len(said) == len(HYPOTHESES) == 8
    page = (ROOT / "docs" / "hypotheses.md").read_text(encoding="utf-8")
    for one in HYPOTHESES:
        line = next(x for x in page.splitlines() if x.startswith(f"| {one.name} |"))
        assert line.endswith(f"| {one.predicted} | {one.why} |")


def test_whole_numbers_are_tried_as_such(load, store):
    grid = build_tuning(load(tuning={"ewc": [{"weight": 1, "fisher_samples": 4}]}), store, seeds=3)
    for cell in grid.cells.values():
        assert cell.problem == ""
        assert cell.spec.strategies[0].params == {"weight": 1.0, "fisher_samples": 4}
    assert all(choice.open for choice in choices(grid, {}))


def test_what_cannot_be_run_is_refused_at_once(load, store):
    with pytest.raises(ConfigError, match=r"cannot be run, iquery-ewc:.*fisher_samples = 0\.5"):
        build_tuning(load(tuning={"ewc": [{"weight": 1, "fisher_samples": 0.5}]}), store, seeds=3)

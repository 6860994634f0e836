"""Measures of continual learning on matrices worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from avsep.evaluation import continual

NAN = math.nan
MATRIX = [[10.0, NAN, NAN], [6.0, 9.0, NAN], [7.0, 5.0, 8.0]]


def test_worked_matrix():
    # A = 10, (6 + 9) / 2, (7 + 5 + 8) / 3; lost: max(10, 6) - 7 = 3 and 9 - 5 = 4; transfer: 7 - 10 and 5 - 9
    np.testing.assert_allclose(continual.average(MATRIX), [10, 7.5, 20 / 3])
    assert continual.mean_average(MATRIX) == pytest.approx((10 + 7.5 + 20 / 3) / 3)
    np.testing.assert_allclose(continual.forgetting_per_task(MATRIX), [3, 4])
    assert continual.forgetting(MATRIX) == pytest.approx(3.5)
    assert continual.backward_transfer(MATRIX) == pytest.approx(-3.5)


def test_forgetting_is_from_the_best_moment_and_transfer_from_the_first():
    matrix = [[4.0, NAN, NAN], [9.0, 5.0, NAN], [6.0, 7.0, 8.0]]
    np.testing.assert_allclose(continual.forgetting_per_task(matrix), [9 - 6, 5 - 7])
    assert continual.forgetting(matrix) == pytest.approx(0.5)
    assert continual.backward_transfer(matrix) == pytest.approx(((6 - 4) + (7 - 5)) / 2)


def test_intransigence_needs_a_joint_matrix():
    joint = [[11.0, NAN, NAN], [10.0, 9.5, NAN], [9.0, 9.0, 8.0]]
    np.testing.assert_allclose(continual.intransigence(MATRIX, joint), [1, 0.5, 0])
    with pytest.raises(ValueError, match="different shapes"):
        continual.intransigence(MATRIX, [[1.0]])


def test_staleness_is_what_old_sources_lose_beside_newer_ones():
    np.testing.assert_allclose(continual.staleness_per_task([[7, 3], [6, 9]]), [-4])
    three = [[8.0, 5.0, 2.0], [7.0, 9.0, NAN], [1.0, 1.0, 1.0]]  # tasks 1 and 2 do not meet
    np.testing.assert_allclose(continual.staleness_per_task(three), [3.5 - 8, NAN])
    assert continual.staleness(three) == pytest.approx(-4.5)
    known = [[8.0, 5.0, 2.0], [7.0, 9.0, 6.0], [1.0, 1.0, 1.0]]
    np.testing.assert_allclose(continual.staleness_per_task(known), [-4.5, 6 - (7 + 9) / 2])
    both = continual.staleness([known, three])
    np.testing.assert_allclose(both, [(-4.5 - 2) / 2, -4.5])
    scores = continual.continual_scores(MATRIX, interference=known).as_dict()
    assert (scores["staleness"], scores["staleness_per_task"]) == (pytest.approx(-3.25), [-4.5, -2.0])
    assert continual.continual_scores(MATRIX).as_dict()["staleness"] is None
    alone = continual.continual_scores([[5.0]], interference=[[5.0]]).as_dict()
    assert (alone["staleness"], alone["staleness_per_task"]) == (None, [])


def test_area_under_the_memory_curve_is_a_mean_over_log_bytes():
    area = continual.area_under_memory_curve
    assert area([1e3, 1e6], [4.0, 4.0]) == pytest.approx(4)
    assert area([1e3, 1e6], [2.0, 8.0]) == pytest.approx(5)
    # decades: 3 to 4 at a mean of 1.5, 4 to 6 at 4.5; thus (1.5 + 2 * 4.5) / 3, whatever the order and the unit
    assert area([1e4, 1e3, 1e6], [3.0, 0.0, 6.0]) == pytest.approx(3.5)
    assert area([10, 1, 1000], [3.0, 0.0, 6.0]) == pytest.approx(3.5)
    assert area([10, 1, 1000, 10], [2.0, 0.0, 6.0, 4.0]) == pytest.approx(3.5)  # two seeds at one budget
    assert math.isnan(area([1, 10], [NAN, 1.0]))
    for wrong in ([1e3], [1e3, 1e3], [0, 1e3], [-1, 1e3]):
        with pytest.raises(ValueError, match="two different budgets above 0 bytes"):
            area(wrong, [1.0] * len(wrong))
    with pytest.raises(ValueError, match="2 budgets cannot be paired with 1 scores"):
        area([1, 2], [1.0])


def test_one_task_has_no_forgetting():
    scores = continual.continual_scores([[5.0]])
    assert scores.average == (5.0,)
    assert math.isnan(scores.forgetting)
    assert scores.as_dict()["forgetting"] is None
    assert scores.as_dict()["intransigence"] is None
    json.dumps(scores.as_dict(), allow_nan=False)


def test_an_unscored_cell_does_not_pass_for_a_number():
    scores = continual.continual_scores([[NAN, NAN], [1.0, 2.0]]).as_dict()
    assert scores["forgetting"] is None
    assert scores["average"] == [None, 1.5]


@pytest.mark.parametrize("bad", [[], [1.0, 2.0], [[1.0, 2.0]]])
def test_matrices_that_are_not_square_are_refused(bad):
    with pytest.raises(ValueError, match="square"):
        continual.average(bad)


def test_bootstrap_interval_of_a_known_spread():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(400)
    interval = continual.paired_bootstrap(2 + noise)
    assert interval.mean == pytest.approx(2 + noise.mean())
    # about ±1.96 standard errors
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * noise.std() / 20, rel=0.1)
    assert interval.low < interval.mean < interval.high


def test_bootstrap_is_paired():
    rng = np.random.default_rng(1)
    hard = 10 * rng.standard_normal(100)  # mixtures differ far more than systems do
    interval = continual.paired_bootstrap(hard + 1 + 0.1 * rng.standard_normal(100), hard)
    assert 0.9 < interval.low < interval.high < 1.1


def test_bootstrap_resamples_whole_groups():
    values = np.repeat([0.0, 1.0] * 20, 10)  # ten equal scores a mixture tell no more than one
    groups = np.repeat(np.arange(40), 10)
    alone = continual.paired_bootstrap(values)
    grouped = continual.paired_bootstrap(values, groups=groups)
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_bootstrap_is_deterministic_and_skips_missing_pairs():
    scores, baseline = [1.0, NAN, 3.0, 4.0], [0.0, 1.0, NAN, 2.0]
    first, second = (continual.paired_bootstrap(scores, baseline, seed=3) for _ in range(2))
    assert first == second
    assert first.mean == pytest.approx(1.5)
    with pytest.raises(ValueError, match="no pair"):
        continual.paired_bootstrap([NAN])
    with pytest.raises(ValueError, match="cannot be paired"):
        continual.paired_bootstrap([1.0, 2.0], [1.0])

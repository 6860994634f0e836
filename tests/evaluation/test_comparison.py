"""Comparison of methods over seeds: on made-up scores whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from avsep.errors import RunError, UnknownNameError
from avsep.evaluation.comparison import Cell, _Spread, _student, compact_evaluation, compare, holm
from avsep.evaluation.continual import continual_scores, paired_bootstrap
from avsep.evaluation.evaluate import METRICS, interference_matrix, task_matrix
from support.evaluations import FEW, TASKS, cells, evaluation, noise


def test_means_are_those_of_the_evaluations():
    runs = cells("m", [0, 1, 2], spread=1.0)
    result = compare(runs, resamples=FEW)["m"]
    matrices = [task_matrix([step["rows"] for step in c.evaluation["after"]]) for c in runs]
    filled = [np.array(m, dtype=float) for m in matrices]
    scores = [continual_scores(m) for m in filled]
    assert result.values["average"].per_seed == pytest.approx([s.average[-1] for s in scores])
    assert result.values["average"].mean == pytest.approx(np.mean([s.average[-1] for s in scores]))
    assert result.values["forgetting"].mean == pytest.approx(np.mean([s.forgetting for s in scores]))
    assert result.values["bwt"].mean == pytest.approx(np.mean([s.backward_transfer for s in scores]))
    for j in range(3):
        assert result.values[f"task-{j}"].mean == pytest.approx(np.mean([m[2, j] for m in filled]))
    for metric in METRICS:
        steps = [np.mean([c.evaluation["after"][t]["all"]["mean"][metric] for c in runs]) for t in range(3)]
        assert result.values[metric].mean == pytest.approx(steps[-1])
        assert [e.mean for e in result.curves[metric]] == pytest.approx(steps)
    assert [e.mean for e in result.curves["average"]] == pytest.approx(np.mean([s.average for s in scores], axis=0))
    assert np.array(result.matrix, dtype=float) == pytest.approx(np.mean(filled, axis=0), nan_ok=True)
    assert result.seeds == (0, 1, 2)
    assert (result.memory_bytes, result.seconds) == (1001, 10)
    assert result.counts == {"scored": 48, "skipped": 0, "silent_estimates": 0, "degenerate": 0}
    assert not any("released" in name for name in result.values)


def test_staleness_has_an_interval_and_needs_no_class_names():
    """Of made-up pairs: old sources lose 3 dB beside those of the last task, and 1 dB more with the second method."""

    def scores(more):
        made = evaluation(lambda t, j, key: 10 + noise(*key))
        for number, r in enumerate(r for r in made["after"][-1]["rows"] if r["list"] == "cross"):
            if number % 2 == 0:  # the first of each pair is of the first task
                r["sdr"] -= 3.0 + more if r["task"] == 2 else 1.0
                r["task"] = 0
        return made

    runs = [Cell(name, 0, scores(more)) for name, more in (("m", 0.0), ("n", 1.0))]
    result = compare(runs, baseline="m", resamples=FEW)
    rows = runs[0].evaluation["after"][-1]["rows"]
    matrix = np.array(interference_matrix(rows, 3), dtype=float)
    assert np.isnan(matrix).tolist() == [[False, False, False], [False, False, True], [False, True, False]]
    value = result["m"].values["staleness"]
    assert value.mean == pytest.approx((matrix[0, 1] + matrix[0, 2]) / 2 - matrix[0, 0])
    assert value.low < value.mean < value.high
    difference = result["n"].differences["staleness"]
    assert (difference.mean, difference.low, difference.high) == pytest.approx((-0.5, -0.5, -0.5))
    small = [Cell(c.method, 0, compact_evaluation(c.evaluation)) for c in runs]
    assert compare(small, baseline="m", resamples=FEW)["m"].values["staleness"] == value
    assert "staleness" not in compare(cells("m", [0]), resamples=FEW)["m"].values  # no two tasks meet


def test_the_compact_form_compares_alike():
    runs = cells("m", [0, 1], spread=1.0)
    small = [Cell(c.method, c.seed, json.loads(json.dumps(compact_evaluation(c.evaluation)))) for c in runs]
    whole = [Cell(c.method, c.seed, c.evaluation) for c in runs]
    first, second = (compare(c, resamples=FEW).as_dict() for c in (whole, small))
    assert first == second


def test_one_seed_and_one_list_is_the_plain_paired_bootstrap():
    """The same draws, hence the same interval."""
    one, two = (
        Cell(name, 0, evaluation(lambda t, j, key, k=k: k + noise(k, *key), steps=1)) for k, name in enumerate("mn")
    )
    result = compare([one, two], baseline="m", resamples=500, seed=3)
    rows = [c.evaluation["after"][0]["rows"] for c in (one, two)]
    groups = [r["mixture"] for r in rows[0]]
    alone = paired_bootstrap([r["sdr"] for r in rows[0]], groups=groups, resamples=500, seed=3)
    pair = paired_bootstrap(
        [r["sdr"] for r in rows[1]], [r["sdr"] for r in rows[0]], groups=groups, resamples=500, seed=3
    )
    for mine, theirs in ((result["m"].values["sdr"], alone), (result["n"].differences["sdr"], pair)):
        assert (mine.mean, mine.low, mine.high) == pytest.approx((theirs.mean, theirs.low, theirs.high))


def width(runs, **kwargs):
    value = compare(runs, resamples=2000, **kwargs)["m"].values["sdr"]
    return value.high - value.low


def test_seeds_widen_the_interval_and_mixtures_are_not_counted_again():

    alone, alike, apart = (width(cells("m", *a)) for a in (([1],), ([0, 1, 2],), ([0, 1, 2], 0.0, 3.0)))
    # three seeds that agree on every mixture say nothing new of the mixtures: the draw of these is shared
    assert alike == pytest.approx(alone, rel=0.1)
    # seeds of means -3, 0, 3: their mean has the standard error 3 / sqrt(3), and t(2)'s 97.5 % quantile is 4.303
    assert apart == pytest.approx(2 * 4.303 * np.sqrt(3), rel=0.15)


def clips_and_scores(count=12, seed=0):
    """Every pair of ``count`` clips of each of two classes is a mixture, whose score is what its clips add up to."""
    rng = np.random.default_rng(seed)
    effects = {(name, f"{name}{i}"): rng.standard_normal() for name in "ab" for i in range(count)}
    pairs = [(("a", f"a{i}"), ("b", f"b{(i + k) % count}")) for i in range(count) for k in range(4)]
    clips = {("task-0", number): pair for number, pair in enumerate(pairs)}
    scores = evaluation(lambda t, j, key: sum(effects[c] for c in clips[key]), per_task=len(pairs), steps=1, cross=0)
    return scores, clips


def test_clips_that_are_in_several_mixtures_count_once():
    scores, clips = clips_and_scores()
    known, unknown = (width([Cell("m", 0, scores)], clips=given) for given in ({scores["protocol_hash"]: clips}, None))
    # 24 clips with a spread of 1: each class's mean has the standard error 1 / sqrt(12); the mixture adds the two
    true = 2 * 1.96 * np.sqrt(2 / 12)
    assert 0.75 * true < known < 1.4 * true
    assert unknown < 0.6 * true  # 48 mixtures taken for independent ones
    rows = scores["after"][0]["rows"]
    for row in rows:
        place = sum(1 for other in rows[: rows.index(row)] if other["mixture"] == row["mixture"])
        row["class"], row["clip"] = clips["task-0", row["mixture"]][place]
    assert width([Cell("m", 0, scores)]) == known  # whole evaluations tell of their clips themselves


def test_a_class_of_one_clip_is_resampled_with_others_like_it():
    scores, _ = clips_and_scores()
    clips = {("task-0", k): ((f"one {k}", f"a{k}"), (f"other {k}", f"b{k}")) for k in range(48)}
    assert width([Cell("m", 0, scores)], clips={scores["protocol_hash"]: clips}) > 0.5


def test_a_star_is_rare_where_nothing_differs():
    """Seeds that differ by chance alone."""
    rng = np.random.default_rng(5)
    stars = 0
    for _ in range(60):
        levels = rng.standard_normal(6).tolist()
        runs = [
            Cell(("base", "m")[n // 3], n % 3, evaluation(lambda t, j, key, x=x: x, per_task=2, steps=1))
            for n, x in enumerate(levels)
        ]
        stars += compare(runs, baseline="base", resamples=400)["m"].differences["sdr"].significant
    assert stars <= 7  # of 60, 3 are expected; a bootstrap over the seeds gave 21


def test_differences_are_paired_by_seed_and_mixture():
    runs = [*cells("base", [0, 1, 2], spread=5.0), *cells("better", [0, 1, 2], 0.5, 5.0)]
    result = compare(runs, baseline="base", resamples=FEW)
    value, difference = result["better"].values["average"], result["better"].differences["average"]
    assert value.high - value.low > 3
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert difference.significant
    assert difference.per_seed == pytest.approx((0.5, 0.5, 0.5))
    assert not result["better"].differences["forgetting"].significant
    assert result["base"].differences == {}
    assert result.as_dict()["methods"][1]["differences"]["average"]["significant"] is True
    with pytest.raises(UnknownNameError, match="no method 'bettr' to compare with: did you mean 'better'"):
        compare(runs, baseline="bettr")


def test_a_difference_taken_the_other_way_round_is_mirrored():
    """Else a method could be told from another, and that one not from it."""
    rng = np.random.default_rng(3)
    runs = []
    for n, level in enumerate(rng.standard_normal(8).tolist()):
        wobble = rng.standard_normal(100).tolist()
        scores = evaluation(lambda t, j, key, x=level, w=wobble: x + w[9 * t + 3 * j + key[1]], per_task=4, steps=2)
        runs.append(Cell(("a", "b")[n // 4], n % 4, scores))
    one, other = (compare(runs, baseline=name, resamples=1200) for name in "ab")  # more than there are knots
    for key, there in one["b"].differences.items():
        back = other["a"].differences[key]
        assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low), abs=1e-9)
        assert back.p == pytest.approx(there.p)
    assert one["b"].differences["sdr"].high > one["b"].differences["sdr"].low


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 29])
def test_students_t(freedom):
    stats = pytest.importorskip("scipy.stats")
    x = np.linspace(-60, 60, 1001)
    np.testing.assert_allclose(_student(x, freedom), stats.t.cdf(x, freedom), rtol=0, atol=1e-15)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_what_seeds_add_is_as_if_very_much_were_drawn(seeds):
    """The interval and p value of resamples of clips with a draw of t for every one, many times over."""
    rng = np.random.default_rng(seeds)
    drawn, of_seeds = rng.normal(0.4, 0.2, 2000), rng.normal(0.4, 0.3, seeds)
    spread = _Spread(drawn, of_seeds)
    width = of_seeds.std(ddof=1) / np.sqrt(seeds)
    many = np.concatenate([drawn + width * rng.standard_t(seeds - 1, drawn.shape) for _ in range(500)])
    low, high = np.quantile(many, [0.025, 0.975])
    assert spread.interval(0.95) == pytest.approx((low, high), abs=0.02 * (high - low))
    assert spread.p_value() == pytest.approx(2 * min(np.mean(many < 0), np.mean(many > 0)), rel=0.03)


@pytest.mark.parametrize(("seeds", "resamples", "within"), [(2, 300, 1e-9), (4, 300, 1e-9), (3, 10_000, 3e-4)])
def test_outside_an_interval_lie_the_tails(seeds, resamples, within):
    """A resample in which nothing could be scored is left out. Of many the interval takes quantiles."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seeds)
    drawn, of_seeds = rng.normal(3, 2, resamples), rng.normal(3, 1, seeds)
    width = of_seeds.std(ddof=1) / np.sqrt(seeds)
    low, high = _Spread(np.append(drawn, np.nan), of_seeds).interval(0.9)
    assert stats.t.cdf((low - drawn) / width, seeds - 1).mean() == pytest.approx(0.05, abs=within)
    assert stats.t.sf((high - drawn) / width, seeds - 1).mean() == pytest.approx(0.05, abs=within)


def test_a_p_value_is_never_below_that_of_one_resample():
    assert _Spread(np.full(100, 2.0), np.array([2.0, 2.0, 2.0001])).p_value() == pytest.approx(0.02)
    assert _Spread(np.full(100, 2.0), np.array([2.0])).p_value() == pytest.approx(0.02)
    assert _Spread(np.full(100, np.nan), np.array([2.0, 3.0])).p_value() == 1.0
    assert np.isnan(_Spread(np.full(100, np.nan), np.array([2.0, 3.0])).interval(0.95)).all()


@pytest.mark.parametrize("of_seeds", [[0.1], [0.1, 0.1, 0.1]])  # of the three numpy's deviation is not 0
def test_without_what_seeds_add_the_resamples_are_counted(of_seeds):
    drawn = np.array([-1.0] * 10 + [0.0] * 10 + [1.0] * 80)
    spread = _Spread(drawn, np.array(of_seeds))
    assert spread.p_value() == pytest.approx(2 * 0.2)
    assert _Spread(-drawn, -np.array(of_seeds)).p_value() == pytest.approx(2 * 0.2)
    assert spread.interval(0.95) == (-1.0, 1.0)
    assert spread.interval(0.7) == pytest.approx(tuple(np.quantile(drawn, [0.15, 0.85])))


def test_a_difference_is_over_the_seeds_both_have():
    runs = [*cells("base", [0, 1]), *cells("other", [1, 2], spread=1.0)]
    result = compare(runs, baseline="base", resamples=FEW)
    assert len(result["other"].differences["sdr"].per_seed) == 1
    assert compare(runs[:1] + runs[3:], baseline="base", resamples=FEW)["other"].differences == {}


def test_what_only_one_method_has_a_score_of_is_in_no_difference():
    def hard(t, j, key):
        return -50.0 if key == ("task-0", 3) else 5.0

    runs = [
        Cell("base", 0, evaluation(hard)),
        Cell("mute", 0, evaluation(hard, skipped={(2, "task-0", 3)})),
    ]
    result = compare(runs, baseline="base", resamples=FEW)
    assert result["mute"].values["sdr"].mean > result["base"].values["sdr"].mean + 0.5
    assert result["mute"].differences["sdr"].mean == pytest.approx(0)
    assert result["mute"].differences["task-0"].mean == pytest.approx(0)
    assert result["mute"].counts["skipped"] == result["mute"].counts["silent_estimates"] == 1


def test_intransigence_is_to_the_joint_run_of_the_same_seed():
    runs, joint = cells("m", [0, 1, 2]), cells("joint", [0, 1], 2.0, 1.0)
    result = compare([*runs, *joint], joint=joint, resamples=FEW)
    assert result["m"].values["intransigence"].per_seed == pytest.approx((1.0, 2.0))
    assert result["joint"].values["intransigence"].mean == pytest.approx(0)
    assert "intransigence" not in compare(runs, resamples=FEW)["m"].values


def test_paper_pairs_are_given_with_and_without_the_degenerate_ones():
    runs = cells("m", [0], paper=True)
    result = compare(runs, resamples=FEW)["m"]
    last = runs[0].evaluation["after"][-1]["all"]
    assert result.values["sir"].mean == pytest.approx(last["mean"]["sir"])
    assert result.values["released_sir"].mean == pytest.approx(last["with_degenerate"]["mean"]["sir"])
    assert result.values["sir"].mean != pytest.approx(result.values["released_sir"].mean, abs=1e-3)
    assert result.counts["degenerate"] == last["degenerate"] > 0


def test_one_task_has_no_forgetting_and_json_no_nan():
    result = compare(cells("m", [0], steps=1), resamples=FEW)
    assert "forgetting" not in result["m"].values
    json.dumps(result.as_dict(), allow_nan=False)
    json.dumps(compare(cells("m", [0]), resamples=FEW).as_dict(), allow_nan=False)


def test_the_same_every_time():
    runs = [*cells("a", [0, 1]), *cells("b", [0, 1], 0.2, 1.0)]
    first, second = (compare(runs, baseline="a", resamples=FEW, seed=4) for _ in range(2))
    assert first == second
    other = compare(list(reversed(runs)), baseline="a", resamples=FEW, seed=4)
    assert other["b"] == first["b"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"store_hash": "9" * 64}, r"different stores \(222222222222 and 999999999999\)"),
        ({"tasks": TASKS[::-1]}, r"another order \(a, b; c, d; e, f and e, f; c, d; a, b\)"),
        ({"protocol": "paper"}, r"different protocols \(fixed and paper\)"),
        ({"protocol_version": 2}, r"versions of the protocol .* \(1 and 2\)"),
        ({"protocol_hash": "7" * 64}, r"different mixtures \(111111111111 and 777777777777\)"),
    ],
)
def test_runs_tested_on_something_else_are_refused(change, reason):
    one, two = cells("m", [0]), cells("n", [0], **change)
    with pytest.raises(RunError, match=f"m with seed 0 and n with seed 0 cannot be compared: .*{reason}"):
        compare([*one, *two])
    with pytest.raises(RunError, match="cannot be compared"):
        compare(one, joint=two)


def test_other_mistakes():
    with pytest.raises(RunError, match="nothing to compare"):
        compare([])
    with pytest.raises(RunError, match="are both method 'm' with seed 0"):
        compare([*cells("m", [0]), *cells("m", [0])])
    (short,) = cells("m", [0])
    short.evaluation["after"].pop()
    with pytest.raises(RunError, match="scored after 2 of its 3 tasks"):
        compare([short])
    for wrong in ({"confidence": 1.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="must"):
            compare(cells("m", [0]), **wrong)


# ---------------------------------------------------------------------- class orders, many comparisons


def of_order(method, seed, level, order):
    """A run with another class order: the same clips, other mixtures of them."""
    names = TASKS if order == 0 else TASKS[::-1]
    scores = evaluation(lambda t, j, key: level + noise(order, *key), steps=3)
    return Cell(method, seed, scores | {"tasks": names, "protocol_hash": str(order) * 64})


def clips_of_orders():
    """Of two orders: mixture k of a list has clips k and k + 1 of two classes."""
    rows = evaluation(lambda t, j, key: 0.0)["after"][-1]["rows"]
    keys = {(row["list"], row["mixture"]) for row in rows}
    return {
        str(order) * 64: {key: (("a", f"a{key[1] % 7 + order}"), ("b", f"b{key[1] % 5}")) for key in keys}
        for order in (0, 1)
    }


def test_seeds_with_class_orders_of_their_own_pair():
    runs = [of_order(m, s, level + 3.0 * s, s) for m, level in (("base", 5.0), ("better", 5.5)) for s in (0, 1)]
    result = compare(runs, baseline="base", clips=clips_of_orders(), orders=True, resamples=FEW)
    difference = result["better"].differences["average"]
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert difference.p == pytest.approx(2 / FEW)
    assert result["base"].values["average"].high - result["base"].values["average"].low > 10  # t(1) of 3 dB apart
    with pytest.raises(RunError, match="they learned different classes, or in another order"):
        compare(runs, clips=clips_of_orders(), resamples=FEW)
    with pytest.raises(RunError, match="are compared by the clips of their mixtures: give clips"):
        compare(runs, orders=True, resamples=FEW)


def test_runs_of_one_seed_must_have_one_order():
    runs = [of_order("base", 0, 5.0, 0), of_order("other", 0, 5.0, 1)]
    with pytest.raises(RunError, match="they learned different classes, or in another order"):
        compare(runs, clips=clips_of_orders(), orders=True, resamples=FEW)


def test_holms_correction():
    """Of .01, .03, .04: 3 x .01; 2 x .03; and the last is not below the one before."""
    found = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.9})
    assert holm({}) == {}
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_a_p_value_goes_with_the_interval():
    runs = [*cells("base", [0, 1, 2], spread=1.0), *cells("better", [0, 1, 2], 4.0, 1.3)]
    difference = compare(runs, baseline="base", resamples=2000)["better"].differences["sdr"]
    assert difference.significant == (difference.p < 0.05)
    same = compare([*cells("base", [0, 1]), *cells("same", [0, 1])], baseline="base", resamples=FEW)
    assert same["same"].differences["sdr"].p == 1.0

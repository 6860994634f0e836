"""Weights joined after a task, or before it: the rules by hand and against a search, and what they do to a run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.separator import build_from_spec
from avsep.strategies.base import TaskContext
from avsep.strategies.low_rank_step import truncated
from avsep.strategies.magmax import farthest
from avsep.strategies.perturb_and_merge import merging_coefficient
from avsep.types import Task
from support.continual_runs import differing, first_task, make_learner, trained, weights
from support.strategy_steps import GivenData, student_and_teacher
from support.tones import stream_of

QUERIES = "mask_decoder.class_queries"
MAGMAX = ("magmax", {"batch_norm_mixtures": 0})
LOW_RANK = ("low_rank_step", {"rank": 1, "batch_norm_mixtures": 0})
MERGED = ("perturb_and_merge", {"fisher_samples": 3, "perturbation": 0.0})


class Toy(nn.Module):
    """One vector."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(values, dtype=torch.float32).clone())


def _task(index):
    names = tuple("abcdef")
    return Task(index, names[index : index + 1], names[: index + 1])


def test_the_coefficient_by_hand():
    values = {"moved": (2.0, 1.0), "fisher": (1.0, 3.0), "before": (1.0, 1.0), "pull": (0.5, -1.0)}

    def found(**other):
        return merging_coefficient(**{k: {"w": torch.tensor(v)} for k, v in {**values, **other}.items()})

    assert found() == pytest.approx((2 * 2.5 + 1 * 2) / (4 * 2 + 1 * 4))
    assert found(pull=(-10.0, 0.0)) == 0.0  # further back than the old weights
    assert found(pull=(99.0, 0.0)) == 1.0
    assert found(fisher=(0.0, 0.0), before=(0.0, 0.0)) == 1.0  # nothing tells


def test_the_two_sums_stand_for_all_tasks(monkeypatch):
    """Against the minimum over all tasks' own weights and Fisher information, with rows that come later."""
    rng = torch.Generator().manual_seed(3)
    fishers, ends, kept, factors = [], [], None, []
    strategy = STRATEGIES.create("perturb_and_merge")
    monkeypatch.setattr("avsep.strategies.perturb_and_merge.fisher_diagonal", lambda *_: {"w": fishers[-1].clone()})
    for index, rows in enumerate((3, 3, 4, 4, 5)):
        step = torch.randn(rows, generator=rng)
        old = torch.zeros(0) if kept is None else kept.w.detach()
        end = step.clone()
        end[: len(old)] += old
        fishers.append(torch.rand(rows, generator=rng))
        ends.append(end)
        student = Toy(end)
        strategy.after_task(TaskContext(_task(index), student, kept, GivenData([])))
        # the search: old rows alone, in each task's shape
        n = len(old)
        candidates = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None]
        way = (end[:n] - old).double()
        points = old.double() + candidates * way
        loss = sum(
            (f[:n].double() * (points[:, : len(f[:n])] - e[:n].double()) ** 2).sum(dim=1)
            for f, e in zip(fishers, ends, strict=True)
        )
        best = points[loss.argmin()] if n else points[0]
        torch.testing.assert_close(student.w[:n].detach(), best.float(), rtol=0, atol=2e-4)
        assert torch.equal(student.w[n:].detach(), end[n:])
        if n:
            factors.append(float(candidates[loss.argmin()]))
        kept = Toy(student.w.detach()).requires_grad_(False)
        loaded = STRATEGIES.create("perturb_and_merge")
        loaded.load_state_dict(strategy.state_dict())
        strategy = loaded
    assert any(0 < factor < 1 for factor in factors[1:])
    strategy.after_task(TaskContext(_task(5), Toy(ends[-1]), kept, GivenData([]), is_last=True))
    assert strategy.state_dict() == {}


def test_what_has_no_gradient_in_a_later_task_tells_of_earlier_ones(monkeypatch):
    """A second vector, which the second task does not reach: F = 1 and then 0 of it."""
    fishers = [{"w": torch.ones(2), "other": torch.ones(2)}, {"w": torch.ones(2)}]
    strategy = STRATEGIES.create("perturb_and_merge")
    monkeypatch.setattr("avsep.strategies.perturb_and_merge.fisher_diagonal", lambda *_: fishers.pop(0))
    first, student = Toy([0.0, 0.0]), Toy([1.0, 0.0])
    first.other, student.other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.tensor([0.0, 1.0]))
    strategy.after_task(TaskContext(_task(0), first, None, GivenData([])))
    strategy.after_task(TaskContext(_task(1), student, first, GivenData([])))
    # a = d F d over d (F + F') d: 1 of w, over 2 of w and 1 of the other
    torch.testing.assert_close(student.w.detach(), torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(student.other.detach(), torch.tensor([0.0, 1 / 3]))
    state = strategy.state_dict()
    torch.testing.assert_close(state["fisher"]["other"], torch.ones(2))
    torch.testing.assert_close(state["pull"]["other"], torch.tensor([0.0, -1 / 3]))
    torch.testing.assert_close(state["pull"]["w"], torch.tensor([2 / 3 - 1 / 3, 0.0]))


def test_the_perturbation_is_along_the_way_and_put_back():
    student, teacher = Toy([1.0, 2.0, 5.0]), Toy([0.0, 4.0]).requires_grad_(False)
    strategy = STRATEGIES.create("perturb_and_merge", {"perturbation": 0.5})
    before = student.w.detach().clone()
    seen = set()
    torch.manual_seed(0)
    strategy.begin_task(TaskContext(_task(1), student, teacher, None))
    for _ in range(20):
        with strategy.train_weights(student):
            seen.add(tuple(student.w.tolist()))
            (student.w**2).sum().backward()
        assert torch.equal(student.w, before)
    assert seen == {(1.0, 2.0, 5.0), (1.5, 1.0, 5.0), (0.5, 3.0, 5.0)}
    strategy.begin_task(TaskContext(_task(0), student, None, None))  # nothing was learned before
    state = torch.get_rng_state()
    with strategy.train_weights(student):
        assert torch.equal(student.w, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_takes_its_gradient_at_the_perturbed_weights(tone_store, tmp_path, monkeypatch):
    """Of every step of the second task: the weights in the backward pass, and those that the optimisers then move."""
    learner = make_learner(("perturb_and_merge", {"fisher_samples": 1, "perturbation": 0.5}))
    signs, drawn, randint = iter([2, 0, 1]), [], torch.randint  # forwards, backwards, not at all

    def given(*args, **kwargs):
        return torch.tensor(next(signs)) if args == (3, ()) else randint(*args, **kwargs)

    def backward(loss, call=learner.fabric.backward):
        if learner.strategy._ways:
            drawn.append([(anchor.clone(), p.detach().clone()) for p, _, anchor in learner.strategy._ways])
        call(loss)

    def after_backward(step):
        if learner.strategy._ways:
            now = [p.detach().clone() for p, _, _ in learner.strategy._ways]
            drawn[-1] = [(*seen, p) for seen, p in zip(drawn[-1], now, strict=True)]

    monkeypatch.setattr(torch, "randint", given)
    monkeypatch.setattr(learner.fabric, "backward", backward)
    monkeypatch.setattr(learner.strategy, "after_backward", after_backward)
    first = first_task(tone_store, "finetune")
    learner.fit(stream_of(tone_store), tmp_path / "run", progress=False, first_task=first)
    assert len(drawn) == 3
    for ways, sign in zip(drawn, (1, -1, 0), strict=True):
        for anchor, used, kept in ways:
            old = kept[tuple(slice(n) for n in anchor.shape)]
            expected = kept.clone()
            expected[tuple(slice(n) for n in anchor.shape)] += sign * 0.5 * (old - anchor)
            torch.testing.assert_close(used, expected, rtol=0, atol=1e-6)
    assert any((used - kept).abs().max() > 1e-5 for _, used, kept in drawn[1])  # at the first step the way is 0


def test_the_merged_weights_are_between_the_two_ends(tone_store):
    start = weights(first_task(tone_store, "finetune"), 0)
    end, found = weights(trained(tone_store, "finetune")), weights(trained(tone_store, MERGED))
    name = "audio_encoder.up.3.weight"
    way = (end[name] - start[name]).flatten().double()
    factor = float(way @ (found[name] - start[name]).flatten().double() / way.square().sum())
    assert 0 < factor < 1
    for key, value in start.items():
        if value.is_floating_point() and key != QUERIES:
            torch.testing.assert_close(found[key], value + factor * (end[key] - value), rtol=1e-4, atol=1e-6)
    assert torch.equal(found[QUERIES][2:], end[QUERIES][2:])


def test_the_farthest_of_several_tasks_by_hand():
    assert farthest(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([1.0, -4.0, -2.0]), torch.zeros(3)).tolist() == [
        3,
        -4,
        -2,
    ]
    strategy, student = STRATEGIES.create(*MAGMAX), Toy([1.0, 1.0])
    kept = None
    for index, (begins, ends, stores) in enumerate(
        (
            ([1.0, 1.0], [2.0, -2.0], [2.0, -2.0]),
            ([2.0, -2.0], [3.0, 0.0], [3.0, -2.0]),  # from 1 they went 2 and 1, before 1 and 3
            ([3.0, 0.0, 7.0], [-1.0, 5.0, 9.0], [3.0, 5.0, 9.0]),  # as far as before: the old one; from its own end on
            ([-1.0, 5.0, 9.0], [0.0, 0.0, 4.0], [3.0, 5.0, 4.0]),  # a row that came later, from its own beginning
        )
    ):
        if index:
            grown = [*kept.w.tolist(), 7.0][: len(begins)]
            student = Toy(grown)
        strategy.begin_task(TaskContext(_task(index), student, kept, None))
        assert student.w.tolist() == begins
        with torch.no_grad():
            student.w.copy_(torch.tensor(ends))
        resumed = STRATEGIES.create(*MAGMAX)
        resumed.load_state_dict(strategy.state_dict())
        resumed.begin_task(TaskContext(_task(index), student, kept, None, resumed=True))
        assert student.w.tolist() == ends
        resumed.after_task(TaskContext(_task(index), student, kept, None))
        assert student.w.tolist() == stores
        strategy, kept = resumed, Toy(student.w.detach()).requires_grad_(False)
    assert strategy.first_task() is None  # which no other run has recorded


def test_the_farthest_in_a_run(tone_store):
    start, end = (weights(trained(tone_store, "finetune"), task) for task in (0, 1))
    run = trained(tone_store, MAGMAX)
    assert differing(weights(run, 0), start) == []
    found, chosen = weights(run), [0, 0]
    for name, value in start.items():
        if value.is_floating_point() and "running" not in name:
            new, kept = end[name][: len(value)], found[name][: len(value)]
            assert ((kept == value) | (kept == new)).all(), name
            chosen[0] += int((kept == value).sum())
            chosen[1] += int((kept == new).sum())
            assert torch.equal(found[name][len(value) :], end[name][len(value) :])
    assert all(chosen)


def test_truncation_by_hand():
    diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    torch.testing.assert_close(truncated(diagonal, 2), torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    step = torch.outer(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5, 4.0]))
    torch.testing.assert_close(truncated(step, 1), step)
    assert not truncated(step, 0).any()


def test_a_low_rank_step_in_a_run(tone_store):
    start, end = (weights(trained(tone_store, "finetune"), task) for task in (0, 1))
    found = weights(trained(tone_store, LOW_RANK))
    changed = 0
    for name, value in start.items():
        rows = slice(len(value)) if value.ndim else ...
        if value.ndim < 2:
            assert torch.equal(found[name], end[name]), name
            continue
        step, whole = ((of[name][rows] - value).flatten(1).double() for of in (found, end))
        if min(step.shape) > 1 and bool(whole.any()):
            values = torch.linalg.svdvals(step)
            assert values[1] < 1e-3 * values[0], name
            torch.testing.assert_close(values[0], torch.linalg.svdvals(whole)[0], rtol=1e-3, atol=1e-7)
            changed += not torch.equal(found[name], end[name])
    assert changed > 20
    assert torch.equal(found[QUERIES][2:], end[QUERIES][2:])


@pytest.mark.slow
def test_a_rank_above_all_is_fine_tuning(tone_store):
    whole = trained(tone_store, ("low_rank_step", {"rank": 10**6, "batch_norm_mixtures": 0}))
    assert differing(weights(whole), weights(trained(tone_store, "finetune"))) == []


def test_fresh_weights_are_mixed_in_before_a_task():
    student, teacher = student_and_teacher()
    shapes = {name: tuple(v.shape) for name, v in teacher.state_dict().items()}
    before = {k: v.clone() for k, v in student.state_dict().items()}
    strategy = STRATEGIES.create("shrink_and_perturb", {"inherited": 0.75})
    torch.manual_seed(5)
    strategy.begin_task(TaskContext(_task(1), student, teacher, None, old_shapes=shapes))
    torch.manual_seed(5)
    fresh = build_from_spec(student.spec).state_dict()
    trained_names = {name for name, _ in student.named_parameters()}
    for name, value in student.state_dict().items():
        expected = before[name].clone()
        if name in trained_names:
            old = tuple(slice(n) for n in shapes[name])
            expected[old] = 0.75 * before[name][old] + 0.25 * fresh[name][old]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert differing(student.state_dict(), before)
    for ctx in (
        TaskContext(_task(0), student, None, None),
        TaskContext(_task(1), student, teacher, None, old_shapes=shapes, resumed=True),
    ):
        before = {k: v.clone() for k, v in student.state_dict().items()}
        strategy.begin_task(ctx)
        assert differing(student.state_dict(), before) == []


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("perturb_and_merge", {"fisher_samples": 0}, "fisher_samples must be at least 1, got 0"),
        ("perturb_and_merge", {"perturbation": 1.0}, "perturbation must be from 0 to below 1, got 1.0"),
        ("magmax", {"batch_norm_mixtures": -1}, "batch_norm_mixtures must be 0 or more, got -1"),
        ("low_rank_step", {"batch_norm_mixtures": -1}, "batch_norm_mixtures must be 0 or more, got -1"),
        ("low_rank_step", {"rank": -1}, "rank must be 0 or more, got -1"),
        ("shrink_and_perturb", {"inherited": 1.5}, "inherited must be between 0 and 1, got 1.5"),
    ],
)
def test_wrong_settings(name, params, message):
    with pytest.raises(ConfigError, match=message):
        STRATEGIES.create(name, params)

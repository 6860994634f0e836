"""Slow learner: the first steps of what is old and what is new, schedules, and a run."""

from __future__ import annotations

import pytest
import torch

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.spec import OptimizerSpec
from avsep.strategies import Composition
from avsep.strategies.base import TaskContext
from avsep.training.optim import make_optimizers, set_learning_rates
from avsep.types import Task
from support.continual_runs import trained, weights
from support.strategy_steps import student_and_teacher

TASK = Task(1, ("c", "d"), ("a", "b", "c", "d"))
QUERIES = "mask_decoder.class_queries"
SPECS = {
    "audio": OptimizerSpec(lr=1e-4),
    "visual": OptimizerSpec(lr=1e-4),
    "decoder": OptimizerSpec(lr=1e-4, name="adamw", schedule="step", milestones=(3,), gamma=0.5),
}


def _begun(strategy, task=TASK):
    student, teacher = student_and_teacher()
    shapes = {name: tuple(v.shape) for name, v in teacher.state_dict().items()} if task.index else {}
    strategy.begin_task(TaskContext(task, student, teacher, None, old_shapes=shapes))
    return student, make_optimizers(student, SPECS, strategy)


def test_the_first_steps_of_old_and_new():
    """Adam's first step has the size of the learning rate, wherever there is a gradient."""
    strategy = STRATEGIES.create("slow_learner", {"factor": 0.1})
    student, optimizers = _begun(strategy)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers.values():
        optimizer.step()
    strategy.after_step(None)
    for name, parameter in student.named_parameters():
        moved = (before[name] - parameter).detach()
        slow = moved[:2] if name == QUERIES else moved
        torch.testing.assert_close(slow, torch.full_like(slow, 1e-5), rtol=0.05, atol=3e-7)
    new = before[QUERIES][2:] - student.mask_decoder.class_queries[2:].detach()
    torch.testing.assert_close(new, torch.full_like(new, 1e-4), rtol=0.05, atol=3e-7)
    # rows are slowed from where the last step left them
    rows = student.mask_decoder.class_queries
    last = rows.detach().clone()
    with torch.no_grad():
        rows += 1.0
    strategy.after_step(None)
    torch.testing.assert_close(rows[:2], last[:2] + 0.1)
    torch.testing.assert_close(rows[2:], last[2:] + 1.0)


def test_schedules_go_on():
    _, optimizers = _begun(STRATEGIES.create("slow_learner", {"factor": 0.1}))
    for epoch, factor in ((0, 1.0), (3, 0.5)):
        rates = set_learning_rates(optimizers, SPECS, step=0, epoch=epoch, total_steps=10)
        assert rates["decoder"] == pytest.approx(1e-4 * factor)
        found = sorted(group["lr"] for group in optimizers["decoder"].param_groups)
        assert found == pytest.approx([1e-5 * factor, 1e-4 * factor])
    assert [group["lr"] for group in optimizers["audio"].param_groups] == pytest.approx([1e-5])


def test_the_first_task_and_a_factor_of_one_change_nothing():
    for strategy, task in (
        (STRATEGIES.create("slow_learner"), Task(0, TASK.seen, TASK.seen)),
        (STRATEGIES.create("slow_learner", {"factor": 1.0}), TASK),
    ):
        _, optimizers = _begun(strategy, task)
        assert all("lr_factor" not in group for o in optimizers.values() for group in o.param_groups)


def test_factors_of_several_strategies_multiply():
    both = Composition({"slow": STRATEGIES.create("slow_learner"), "l2": STRATEGIES.create("l2_anchor")})
    _begun(both)
    name = "audio_encoder.down.0.weight"
    assert (both.learning_rate(name), both.weight_decay(name)) == (0.1, 0.0)
    assert both.learning_rate(QUERIES) == 1.0


def test_in_a_run_only_what_is_new_moves_far(tone_store):
    start = weights(trained(tone_store, "finetune"), 0)
    plain, slow = (weights(trained(tone_store, s)) for s in ("finetune", ("slow_learner", {"factor": 0.01})))
    for name, value in start.items():
        if value.is_floating_point() and "running" not in name and bool((plain[name][: len(value)] != value).any()):
            own, others = (float((w[name][: len(value)] - value).abs().max()) for w in (slow, plain))
            assert own < 0.1 * others, name


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_wrong_settings(factor):
    with pytest.raises(ConfigError, match=f"factor must be above 0 and at most 1, got {factor}"):
        STRATEGIES.create("slow_learner", {"factor": factor})

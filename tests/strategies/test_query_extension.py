"""Query extension: what may change from the second task on, and what may not, to the last bit."""

from __future__ import annotations

import pytest
import torch

from avsep.decoders import QueryTransformer
from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import TaskContext
from avsep.types import Task
from support.continual_runs import differing, first_task, train, weights
from support.strategy_steps import make_step, student_and_teacher, with_teacher

TASK = Task(1, ("peep", "whirr"), ("ding", "hum", "peep", "whirr"))
QUERIES = "mask_decoder.class_queries"
HEAVY = {"decoder": {"lr": 1e-2, "name": "adamw", "weight_decay": 1.0}, "audio": {"lr": 1e-2, "weight_decay": 1.0}}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("memory", ["none", "random_per_class"])
def test_nothing_but_the_new_queries_changes(head, memory, tone_store, tmp_path):
    """Under heavy weight decay, of AdamW, and with batch normalisation in what is frozen."""
    strategy = ("query_extension", {"head": head})
    run = train(tone_store, tmp_path / "run", strategy, memory, **HEAVY)
    before = weights(first_task(tone_store, strategy, **HEAVY), 0)
    after = weights(run)
    rows = after.pop(QUERIES)
    assert torch.equal(rows[:2], before.pop(QUERIES))
    changed = differing(before, after)
    assert all(name.startswith("mask_decoder.head") for name in changed)
    assert bool(changed) == head


def test_the_new_queries_learn_and_the_old_get_no_gradient():
    student, _ = student_and_teacher()
    strategy = STRATEGIES.create("query_extension")
    strategy.begin_task(TaskContext(TASK, student, None, None))
    student.train()
    assert not any(m.training for m in student.modules())
    statistics = {k: v.clone() for k, v in student.state_dict().items() if "running" in k}
    terms = strategy.loss(with_teacher(make_step(student), None))
    assert list(terms) == ["separation"]
    terms["separation"].backward()
    assert [name for name, p in student.named_parameters() if p.grad is not None] == [QUERIES]
    gradient = student.mask_decoder.class_queries.grad
    assert (gradient[:2] == 0).all()
    assert (gradient[2:].abs().amax(dim=1) > 0).all()
    assert all(torch.equal(student.state_dict()[k], v) for k, v in statistics.items())


def test_old_rows_are_put_back_after_a_step():
    student, _ = student_and_teacher()
    strategy = STRATEGIES.create("query_extension")
    strategy.begin_task(TaskContext(TASK, student, None, None))
    rows = student.mask_decoder.class_queries
    before = rows.detach().clone()
    with torch.no_grad():
        rows.mul_(0.5)
    strategy.after_step(make_step(student))
    assert torch.equal(rows[:2], before[:2])
    assert torch.equal(rows[2:], before[2:] / 2)


def test_the_first_task_trains_everything():
    student, _ = student_and_teacher()
    strategy = STRATEGIES.create("query_extension")
    strategy.begin_task(TaskContext(Task(0, TASK.seen, TASK.seen), student, None, None))
    assert all(p.requires_grad for p in student.parameters())
    step = make_step(student)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    strategy.after_step(step)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.train().training
    assert strategy.first_task() == {}


def test_a_decoder_without_class_queries_is_refused(monkeypatch):
    student, _ = student_and_teacher()
    strategy = STRATEGIES.create("query_extension", {"head": True})
    strategy.check(student)
    monkeypatch.setattr(QueryTransformer, "mask_head", "")
    with pytest.raises(ConfigError, match="'query_transformer' has none: leave head out"):
        strategy.check(student)
    monkeypatch.setattr(QueryTransformer, "query_parameter", "")
    with pytest.raises(ConfigError, match="queries of new classes, and mask decoder 'query_transformer' has none"):
        strategy.check(student)

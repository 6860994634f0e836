"""The average of weights: its values, what is validated and stored, and what it does to a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import TaskContext
from avsep.types import Task
from support.continual_runs import differing, make_learner, resume_killed, train, weights
from support.strategy_steps import GivenData, make_step, student_and_teacher
from support.tones import stream_of

TASK = Task(1, ("c", "d"), ("a", "b", "c", "d"))
QUERIES = "mask_decoder.class_queries"


def _set(student, value):
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(value)


def _averaged(strategy, student, values, data=None, steps=100):
    """The strategy after steps that left these weights, and the task's first weights before them."""
    old_shapes = {name: tuple(v.shape) for name, v in student.state_dict().items()}
    old_shapes[QUERIES] = (2, old_shapes[QUERIES][1])
    _set(student, values[0])
    strategy.begin_task(TaskContext(TASK, student, None, data, steps=steps, old_shapes=old_shapes))
    step = make_step(student)
    for number, value in enumerate(values[1:]):
        _set(student, value)
        strategy.after_step(dataclasses.replace(step, number=number))
    return strategy


def test_values_by_hand():
    student, _ = student_and_teacher()
    strategy = STRATEGIES.create("weight_average", {"every": 1, "batch_norm_mixtures": 0})
    _averaged(strategy, student, [10.0, 1.0, 2.0, 3.0, 6.0])
    with strategy.eval_weights(student):
        own = dict(student.named_parameters())
        for name, value in own.items():
            old = value[:2] if name == QUERIES else value
            torch.testing.assert_close(old, torch.full_like(old, 4.4))  # (10 + 1 + 2 + 3 + 6) / 5
        # a new class's rows were not there at the beginning
        torch.testing.assert_close(own[QUERIES][2:], torch.full_like(own[QUERIES][2:], 3.0))
    assert all((p == 6.0).all() for p in student.parameters())  # training goes on from its own


def test_the_exponential_average_by_hand():
    student, _ = student_and_teacher()
    params = {"every": 1, "batch_norm_mixtures": 0, "decay": 0.75}
    strategy = _averaged(STRATEGIES.create("weight_average", params), student, [8.0, 4.0, 1.0])
    with strategy.eval_weights(student):
        for name, value in student.named_parameters():
            old = value[:2] if name == QUERIES else value
            torch.testing.assert_close(old, torch.full_like(old, 5.5))  # 8 -> 7 -> 5.25 + .25
            if name == QUERIES:  # of a new class's rows 4 is the first member
                torch.testing.assert_close(value[2:], torch.full_like(value[2:], 3.25))
    late = STRATEGIES.create("weight_average", {**params, "start_fraction": 0.5})
    _averaged(late, student, [9.0, 4.0, 8.0], steps=2)
    with late.eval_weights(student):
        torch.testing.assert_close(student.mask_decoder.class_queries, torch.full((4, 16), 5.0))


def test_every_and_the_start():
    student, _ = student_and_teacher()
    values = [10.0, 1.0, 2.0, 3.0, 6.0]
    for params, want in (
        ({"every": 2}, (10 + 2 + 6) / 3),
        ({"every": 1, "start_fraction": 0.5}, (2 + 3 + 6) / 3),  # of four steps, from the second on
        ({"every": 2, "start_fraction": 0.5}, (2 + 6) / 2),
    ):
        strategy = STRATEGIES.create("weight_average", {**params, "batch_norm_mixtures": 0})
        _averaged(strategy, student, values, steps=4)
        with strategy.eval_weights(student):
            bias = student.mask_decoder.head[-1].bias
            torch.testing.assert_close(bias, torch.full_like(bias, want))


def test_statistics_are_estimated_for_the_average_and_put_back():
    student, _ = student_and_teacher()
    data = GivenData([make_step(student).batch])
    strategy = STRATEGIES.create("weight_average", {"every": 1, "batch_norm_mixtures": 7})
    strategy.begin_task(TaskContext(TASK, student, None, data))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with strategy.eval_weights(student):
        changed = differing(student.state_dict(), before)
        assert changed
        assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed)
        assert not any(m.training for m in student.modules())
    assert data.asked == [(7, 16)]
    assert differing(student.state_dict(), before) == []


def test_in_a_run_it_is_what_is_stored_and_resumes(tone_store, tmp_path):
    strategy = ("weight_average", {"every": 1, "batch_norm_mixtures": 4})
    plain = train(tone_store, tmp_path / "plain", "finetune")
    first = make_learner(strategy)
    first.fit(stream_of(tone_store), tmp_path / "run", progress=False)
    assert differing(weights(tmp_path / "run", 0), weights(plain, 0))
    assert not list((tmp_path / "run").glob("tasks/*/strategy.safetensors"))  # nothing for the next task


def test_killed_in_mid_task_it_goes_on_with_its_average(tone_store, tmp_path, monkeypatch):
    from support.tones import dies_at_step

    strategy = ("weight_average", {"every": 1, "batch_norm_mixtures": 4})
    make_learner(strategy).fit(stream_of(tone_store), tmp_path / "whole", progress=False)
    dies_at_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        make_learner(strategy).fit(stream_of(tone_store), tmp_path / "run", progress=False)
    monkeypatch.undo()
    make_learner(strategy).fit(stream_of(tone_store), tmp_path / "run", resume=True, progress=False)
    for task in (0, 1):
        assert differing(weights(tmp_path / "run", task), weights(tmp_path / "whole", task)) == []


def test_with_another_method_and_a_kill(tone_store, tmp_path):
    strategy = [("lwf", {"weight_mask": 1.0}), ("weight_fusion", {})]
    run = train(tone_store, tmp_path / "run", strategy)
    ewf = train(tone_store, tmp_path / "ewf", ("ewf", {"distillation": 1.0}))
    assert differing(weights(run), weights(ewf)) == []  # EWF is the two of them
    assert differing(weights(resume_killed(tone_store, run, strategy)), weights(run)) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"start_fraction": 1.0}, "start_fraction must be from 0 to below 1, got 1.0"),
        ({"batch_norm_mixtures": -1}, "batch_norm_mixtures must be 0 or more, got -1"),
        ({"decay": 1.0}, "decay must be between 0 and 1, or null for the running mean, got 1.0"),
    ],
)
def test_wrong_settings(params, message):
    with pytest.raises(ConfigError, match=message):
        STRATEGIES.create("weight_average", params)


def test_its_first_task_is_its_own():
    assert STRATEGIES.create("weight_average").first_task() is None

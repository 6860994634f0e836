"""First-session adaptation: what may change from the second task on, and what may not, to the last bit."""

from __future__ import annotations

import pytest
import torch

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import TaskContext
from avsep.types import Task
from support.continual_runs import differing, first_task, make_learner, trained, weights
from support.strategy_steps import make_step, student_and_teacher

TASK = Task(1, ("c", "d"), ("a", "b", "c", "d"))
QUERIES = "mask_decoder.class_queries"
HEAVY = {"decoder": {"lr": 1e-2, "name": "adamw", "weight_decay": 1.0}, "audio": {"lr": 1e-2, "weight_decay": 1.0}}
CASES = [
    ("film", "iquery"),
    ("head", "sound_of_pixels"),
    pytest.param("film", "sound_of_pixels", marks=pytest.mark.slow),
    pytest.param("film", "coseparation", marks=pytest.mark.slow),
    pytest.param("head", "coseparation", marks=pytest.mark.slow),
]


def _may_change(name, adapt, separator):
    if adapt == "film":
        norm = "norm" in name or name.startswith(("object_encoder.body", "motion_encoder.body"))
        return (norm or "mask_decoder.up" in name or "mask_decoder.classifier" in name) and "conv" not in name
    return name.startswith("mask_decoder")


@pytest.mark.parametrize(("adapt", "separator"), CASES)
def test_the_body_stays_as_the_first_session_left_it(adapt, separator, tone_store):
    """Under heavy weight decay, and with batch normalisation in what is frozen."""
    strategy = ("first_session", {"adapt": adapt})
    run = trained(tone_store, strategy, separator=separator, **HEAVY)
    before, after = weights(first_task(tone_store, strategy, separator, **HEAVY), 0), weights(run)
    grown = {name for name, value in before.items() if after[name].shape != value.shape}
    for name in grown:
        old = len(before[name])
        assert torch.equal(after[name][:old], before[name]), name
        before[name] = after[name]
    changed = differing(before, after)
    assert changed
    assert all(_may_change(name, adapt, separator) for name in changed), changed
    assert not any("running" in name for name in changed)
    audio = [name for name in changed if name.startswith("audio_encoder")]
    assert bool(audio) == (adapt == "film")
    assert all(after[name].ndim == 1 for name in audio)


def test_frozen_weights_get_no_gradient():
    student, teacher = student_and_teacher()
    shapes = {name: tuple(v.shape) for name, v in teacher.state_dict().items()}
    strategy = STRATEGIES.create("first_session", {"adapt": "film"})
    strategy.check(student)
    strategy.begin_task(TaskContext(TASK, student, teacher, None, old_shapes=shapes))
    student.train()
    assert not any(m.training for m in student.modules())
    strategy.loss(make_step(student))["separation"].backward()
    having = {name for name, p in student.named_parameters() if p.grad is not None}
    affine = {
        f"{name}.{kind}"
        for name, module in student.named_modules()
        for kind in ("weight", "bias")
        if type(module).__name__ in ("BatchNorm2d", "LayerNorm", "GroupNorm")
    }
    assert having == {QUERIES} | affine
    gradient = student.mask_decoder.class_queries.grad
    assert (gradient[:2] == 0).all()
    assert (gradient[2:] != 0).any()


def test_the_first_session_trains_everything():
    student, _ = student_and_teacher()
    strategy = STRATEGIES.create("first_session")
    strategy.begin_task(TaskContext(Task(0, TASK.seen, TASK.seen), student, None, None))
    assert all(p.requires_grad for p in student.parameters())
    assert student.train().training
    assert strategy.first_task() == {}


@pytest.mark.slow
def test_with_queries_the_head_is_that_of_query_extension(tone_store):
    run = trained(tone_store, ("first_session", {"adapt": "head"}))
    assert differing(weights(run), weights(trained(tone_store, ("query_extension", {"head": True})))) == []


def test_wrong_settings(monkeypatch):
    with pytest.raises(ConfigError, match="adapt must be 'head' or 'film', got 'body'"):
        STRATEGIES.create("first_session", {"adapt": "body"})
    monkeypatch.setattr("avsep.strategies.first_session._NORMS", ())
    learner = make_learner(("first_session", {"adapt": "film"}))
    with pytest.raises(
        ConfigError, match=r"adapt=film finds nothing to train in mask decoder 'query_transformer' .*: set"
    ):
        learner.strategy.check(learner.separator)
    frozen = learner.separator.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"adapt=head finds nothing to train .*: use another strategy"):
        STRATEGIES.create("first_session").check(frozen)

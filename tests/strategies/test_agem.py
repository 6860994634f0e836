"""A-GEM: the projection by hand, the gradients of one step, and what it does to a run."""

from __future__ import annotations

import pytest
import torch

from avsep.errors import ConfigError
from avsep.losses import separation_loss
from avsep.registry import STRATEGIES
from avsep.strategies.agem import project
from support.continual_runs import differing, resume_killed, train, weights
from support.strategy_steps import make_step, student_and_teacher, with_teacher


def _gradients(g, r):
    """The gradient g beside the reference r, in two parameters."""
    parameters = [torch.nn.Parameter(torch.zeros(len(g) - 1)), torch.nn.Parameter(torch.zeros(1))]
    for parameter, part in zip(parameters, (g[:-1], g[-1:]), strict=True):
        parameter.grad = torch.tensor(part)
    references = [torch.tensor(r[:-1]), torch.tensor(r[-1:])]
    project(list(zip(parameters, references, strict=True)))
    return torch.cat([p.grad for p in parameters]).tolist()


def test_the_projection_by_hand():
    # g.r = -2, r.r = 2: g + r
    assert _gradients([1.0, -2.0, 0.0], [0.0, 1.0, 1.0]) == pytest.approx([1.0, -1.0, 1.0])
    assert _gradients([1.0, 2.0, 0.0], [0.0, 1.0, 1.0]) == [1.0, 2.0, 0.0]  # they agree: as it was
    assert _gradients([1.0, -2.0, 0.0], [0.0, 0.0, 0.0]) == [1.0, -2.0, 0.0]


def test_a_parameter_that_only_the_exemplars_reach_gets_its_share():
    one, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    one.grad = torch.tensor([-1.0])
    project([(one, torch.tensor([1.0])), (other, torch.tensor([1.0]))])
    assert (one.grad.item(), other.grad.item()) == (-0.5, 0.5)


def test_new_sources_are_learned_along_what_does_not_harm_the_old():
    student, teacher = student_and_teacher()
    step = with_teacher(make_step(student), teacher)
    parameters = list(student.parameters())

    def gradient(counted):
        loss = separation_loss(step.output, step.spectrograms, counted=counted)
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
        )

    g, r = gradient(~step.is_old), gradient(step.is_old)
    strategy = STRATEGIES.create("agem")
    terms = strategy.loss(step)
    assert list(terms) == ["separation"]
    torch.testing.assert_close(
        terms["separation"], separation_loss(step.output, step.spectrograms, counted=~step.is_old)
    )
    for sign in (1.0, -1.0):  # the second time the gradient is turned round, against the exemplars'
        student.zero_grad()
        again = with_teacher(make_step(student), teacher)
        strategy.loss(again)["separation"].backward()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(sign)
        strategy.after_backward(again)
        own = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
        along = sign * float(g @ r)
        want = sign * g - (min(along, 0.0) / float(r @ r)) * r
        torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-7)
        assert float(own @ r) >= -1e-6 * float(r @ r)


def test_without_an_old_source_it_is_fine_tuning():
    student, _ = student_and_teacher()
    step = make_step(student, num_old=0)
    strategy = STRATEGIES.create("agem")
    assert strategy.loss(step)["separation"] is step.separation
    strategy.after_backward(step)
    assert all(p.grad is None for p in student.parameters())
    assert strategy.first_task() == {}


def test_in_a_run_it_changes_the_weights_and_resumes(tone_store, tmp_path):
    run = train(tone_store, tmp_path / "run", "agem", "random_per_class")
    plain = train(tone_store, tmp_path / "plain", "finetune", "random_per_class")
    assert differing(weights(run), weights(plain))
    assert differing(weights(resume_killed(tone_store, run, "agem", "random_per_class")), weights(run)) == []


def test_it_needs_a_memory(tone_store, tmp_path):
    from support.tones import stream_of, tiny_learner

    with pytest.raises(ConfigError, match="'agem' learns from exemplars, and the memory is 'none'"):
        tiny_learner("agem", "none").fit(stream_of(tone_store), tmp_path / "run", progress=False)

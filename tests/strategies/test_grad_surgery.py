"""Gradient surgery: the projection by hand, the gradients of one step, and whose terms it sees."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from avsep.errors import ConfigError
from avsep.losses import separation_loss
from avsep.registry import STRATEGIES
from avsep.spec import ComponentRef
from avsep.strategies import build_strategy
from avsep.strategies.agem import conflict
from avsep.strategies.grad_surgery import harmonised
from avsep.training.loop import StepInputs, TrainingStep
from support.continual_runs import SEPARATORS
from support.strategy_steps import make_step, student_and_teacher

SOUND_OF_PIXELS = {"motion_encoder": None, **SEPARATORS["sound_of_pixels"]}
del SOUND_OF_PIXELS["front_end"]

OTHERS = (("lwf", {"weight_mask": 30.0}), ("contavsep", {"weight_mask": 0.0}))


def _built(*refs):
    return build_strategy([ComponentRef.model_validate(ref) for ref in refs])


def _harmonised(*vectors):
    """Each vector in two parts, the first entry and the others."""
    found = harmonised([[torch.tensor(v[:1]), torch.tensor(v[1:])] for v in vectors])
    return [torch.cat(parts).tolist() for parts in found]


def test_the_projection_by_hand():
    # g1.g2 = -1: g1 + g2/2 and g2 + g1, of which the sum is (.5, 1.5)
    assert _harmonised([1.0, 0.0], [-1.0, 1.0]) == [[0.5, 0.5], [0.0, 1.0]]
    assert _harmonised([1.0, 0.0], [1.0, 1.0]) == [[1.0, 0.0], [1.0, 1.0]]  # they agree: as they were
    assert _harmonised([1.0, -2.0, 0.0], [0.0, 1.0, 1.0])[0] == [1.0, -1.0, 1.0]
    assert _harmonised([1.0, 0.0], [0.0, 0.0]) == [[1.0, 0.0], [0.0, 0.0]]


def test_three_terms_in_their_order():
    # the first takes -(1,0).(-1,1)/2 (-1,1) = (.5,.5), which then points against (0,-1): (.5,.5) - .5 (0,1) = (.5,0)
    found = _harmonised([1.0, 0.0], [-1.0, 1.0], [0.0, -1.0])
    assert found[0] == [0.5, 0.0]
    assert found[1] == [0.0, 0.0]  # (-1,1) + (1,0) = (0,1), and + (0,-1)
    assert found[2] == [-0.5, -0.5]  # only against the second: (0,-1) + (-1,1)/2


def test_a_conflict_of_vectors_without_a_common_part_is_none():
    assert conflict([None, torch.ones(1)], [torch.ones(1), None]) is None
    # what the other vector has elsewhere still counts in its length
    assert conflict([torch.tensor([-1.0]), None], [torch.ones(1), torch.ones(1)]).item() == -0.5


def _gradient(student, term):
    parameters = [p for group in student.parameter_groups().values() for p in group]
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _reference(student, terms, separate):
    """The changed gradients, in float64, one vector for each group."""
    groups = [g for g in student.parameter_groups().values() if g]
    every = [[g.double().flatten() for g in _gradient(student, term)] for term in terms]
    vectors, at = [], 0
    for group in groups if separate else [[p for g in groups for p in g]]:
        own = [torch.cat(one[at : at + len(group)]) for one in every]
        at += len(group)
        total = torch.zeros_like(own[0])
        for i, g in enumerate(own):
            for j, r in enumerate(own):
                if i != j and g @ r < 0:
                    g = g - (g @ r) / (r @ r) * r
            total += g
        vectors.append(total)
    return torch.cat(vectors), torch.cat([torch.stack(parts).sum(0) for parts in zip(*every, strict=True)])


@pytest.mark.parametrize(("others", "separate"), [((), False), (OTHERS, True)])
def test_what_is_learned_from(others, separate):
    student, teacher = student_and_teacher()
    strategy = _built(*others, ("grad_surgery", {"separate": separate}))
    inner = TrainingStep(student, strategy)
    batch = make_step(student).batch
    loudness = torch.where(batch.is_memory, 1.0, 0.01)[:, :, None]  # old masks are to rise and new ones to fall
    batch = dataclasses.replace(batch, sources=loudness * batch.sources)
    torch.manual_seed(0)
    terms = inner(StepInputs(batch, teacher, 2))
    names = {"separation", "separation_old"} | ({"mask", "instance", "class"} if others else set())
    assert set(terms) == names
    step = inner.step
    torch.testing.assert_close(
        terms["separation"] + terms["separation_old"], separation_loss(step.output, step.spectrograms)
    )
    torch.testing.assert_close(
        terms["separation_old"], separation_loss(step.output, step.spectrograms, counted=step.is_old) / 2
    )
    want, plain = _reference(student, terms.values(), separate)
    torch.stack(list(terms.values())).sum().backward(retain_graph=True)
    strategy.after_backward(step)
    parameters = [p for group in student.parameter_groups().values() for p in group]
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).double()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-6 * float(want.abs().max()))
    assert (want - plain).norm() > 1e-3 * plain.norm()  # there were conflicts
    strategy.after_backward(step)  # nothing is left for another step
    again = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).double()
    assert torch.equal(again, found)


def test_a_parameter_that_no_term_reaches_stays_without_a_gradient():
    student, _ = student_and_teacher(**SOUND_OF_PIXELS)
    strategy = STRATEGIES.create("grad_surgery")
    inner = TrainingStep(student, strategy)
    terms = inner(StepInputs(make_step(student).batch, None, 2))
    torch.stack(list(terms.values())).sum().backward()
    strategy.after_backward(inner.step)
    without = {name for name, p in student.named_parameters() if p.grad is None}
    assert without == {"mask_decoder.audio_proj.weight", "mask_decoder.audio_proj.bias"}


def test_the_first_task_is_as_without_it():
    student, _ = student_and_teacher()
    strategy = _built("contavsep", "grad_surgery")
    inner = TrainingStep(student, strategy)
    terms = inner(StepInputs(make_step(student).batch, None, 0))
    assert set(terms) == {"separation", "instance", "class"}
    torch.stack(list(terms.values())).sum().backward()
    before = {name: p.grad for name, p in student.named_parameters()}
    strategy.after_backward(inner.step)
    assert all(p.grad is before[name] for name, p in student.named_parameters())
    assert strategy.first_task() == STRATEGIES.create("contavsep").first_task()


def test_it_is_not_combined_with_agem():
    with pytest.raises(ConfigError, match="agem and grad_surgery each change the separation loss"):
        _built("agem", "grad_surgery")

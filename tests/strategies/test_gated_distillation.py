"""Gated distillation: the gate and the term by hand, its gradient, and what it is without the gate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from avsep.errors import ConfigError
from avsep.kernels.mask_head.reference import mask_l1_reference
from avsep.losses import source_errors
from avsep.registry import STRATEGIES
from avsep.strategies.gated_distillation import open_gates
from support.strategy_steps import gradients, make_step, step_of_masks, student_and_teacher, with_teacher

# Two pixels a source, all true masks 1/2. Errors of the student .15, .10 and .20, of the teacher .10, .20 and .25;
# their distances .08, .12 and .05.
MASKS = [[0.65, 0.65], [0.6, 0.6], [0.7, 0.7]]
TEACHER_MASKS = [[0.52, 0.68], [0.58, 0.82], [0.75, 0.75]]


def _values(rows):
    """Rows of pixels -> [1, N, 1, pixels]"""
    return torch.tensor(rows, dtype=torch.float64)[None, :, None]


def _step(class_ids, masks=MASKS, teacher_masks=TEACHER_MASKS):
    masks, teacher_masks = _values(masks), _values(teacher_masks)
    return step_of_masks(masks, torch.full_like(masks, 0.5), torch.tensor([class_ids]), 2, teacher_masks)


def test_the_values_are_what_the_tests_say():
    masks, teacher_masks = _values(MASKS), _values(TEACHER_MASKS)
    half, one = torch.full_like(masks, 0.5), torch.ones(1, 1, 1, 2)
    for a, b, want in (
        (masks, half, [0.15, 0.10, 0.20]),
        (teacher_masks, half, [0.10, 0.20, 0.25]),
        (masks, teacher_masks, [0.08, 0.12, 0.05]),
    ):
        torch.testing.assert_close(source_errors(a, b, one), torch.tensor([want], dtype=torch.float64))
        torch.testing.assert_close(source_errors(a, b, 3 * one), 3 * torch.tensor([want], dtype=torch.float64))


@pytest.mark.parametrize(("gate", "want"), [(True, 0.08 / 3), (False, 0.25 / 3)])
def test_the_term_by_hand(gate, want):
    step, logits = _step([0, 1, 0])
    terms = STRATEGIES.create("gated_distillation", {"weight": 1.0, "gate": gate}).loss(step)
    assert terms["mask"].item() == pytest.approx(want)
    assert terms["separation"].item() == pytest.approx((0.15 + 0.10 + 0.20) / 3)
    terms["mask"].backward()
    slope = logits.sigmoid() * (1 - logits.sigmoid())  # of the sigmoid; half of the mean of two pixels, a third of O
    sign = torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)[None, :, None]
    counted = torch.tensor([1.0, 0.0, 0.0] if gate else [1.0, 1.0, 1.0], dtype=torch.float64)[None, :, None, None]
    torch.testing.assert_close(logits.grad, counted * sign * slope / 6)


def test_new_sources_do_not_count():
    """The first source is new: one closed gate and one tie are left, then one open gate of one old source."""
    step, _ = _step([2, 1, 3])
    assert STRATEGIES.create("gated_distillation", {"weight": 1.0}).loss(step)["mask"].item() == 0.0
    step, _ = _step([0, 2, 3])
    assert STRATEGIES.create("gated_distillation", {"weight": 1.0}).loss(step)["mask"].item() == pytest.approx(0.08)


def test_a_tie_is_not_distilled():
    masks, teacher_masks = _values([[0.75, 0.75], [0.75, 0.75]]), _values([[0.625, 0.875], [0.625, 0.75]])
    half, one = torch.full_like(masks, 0.5), torch.ones(1, 1, 1, 2)
    assert source_errors(masks, half, one)[0, 0] == source_errors(teacher_masks, half, one)[0, 0] == 0.25
    assert open_gates(masks, teacher_masks, half, one).tolist() == [[False, True]]


def test_a_teacher_that_is_the_student_teaches_nothing():
    for gate in (True, False):
        step, _ = _step([0, 1, 0], teacher_masks=MASKS)
        assert STRATEGIES.create("gated_distillation", {"gate": gate}).loss(step)["mask"].item() == 0.0


def test_on_separators_by_the_definition(separators):
    student, teacher = separators
    step = with_teacher(make_step(student), teacher)
    masks = step.output.logits.sigmoid().detach()
    taught = teacher(step.spectrograms.network_input, teacher.encode_visual(step.batch.visual), step.known_class_ids)
    weight, ratio = step.spectrograms.weight, masks.clone()
    ratio[0], ratio[2, 1] = taught.logits[0].sigmoid(), taught.logits[2, 1].sigmoid()  # there the teacher is right
    step = dataclasses.replace(step, spectrograms=dataclasses.replace(step.spectrograms, ratio=ratio))
    total, opened = torch.zeros(()), 0
    for b, n in step.is_old.nonzero().tolist():
        own, theirs = ((weight[b, 0] * (m[b, n] - ratio[b, n]).abs()).mean() for m in (masks, taught.logits.sigmoid()))
        if theirs < own:
            one = (slice(b, b + 1), slice(n, n + 1))
            total = total + mask_l1_reference(
                step.output.logits[one], taught.logits[one], weight[b : b + 1], target_is_logits=True
            )
            opened += 1
    assert opened == 2  # of three old sources
    term = STRATEGIES.create("gated_distillation").loss(step)["mask"]
    torch.testing.assert_close(term, 0.3 * total / 3)
    got, want = gradients(term, student), gradients(0.3 * total / 3, student)
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-7)
    assert not teacher.training


def test_without_the_gate_it_is_the_mask_term_of_contavsep(separators):
    student, teacher = separators
    step = with_teacher(make_step(student), teacher)
    got = STRATEGIES.create("gated_distillation", {"gate": False}).loss(step)
    want = STRATEGIES.create("contavsep", {"weight_instance": 0.0, "weight_class": 0.0}).loss(step)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_first_task_no_old_source_and_weight_0_are_fine_tuning():
    student, teacher = student_and_teacher()
    step = make_step(student)
    strategy = STRATEGIES.create("gated_distillation")
    assert list(strategy.loss(with_teacher(step, None))) == ["separation"]
    assert list(strategy.loss(with_teacher(make_step(student, num_old=0), teacher))) == ["separation"]
    off = STRATEGIES.create("gated_distillation", {"weight": 0.0})
    assert list(off.loss(with_teacher(step, teacher))) == ["separation"]
    assert not off.needs_teacher
    assert strategy.first_task() == {}


def test_wrong_settings():
    with pytest.raises(ConfigError, match="weight must be 0 or more, got -1"):
        STRATEGIES.create("gated_distillation", {"weight": -1.0})

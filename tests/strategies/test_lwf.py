"""LwF: what is distilled, on which sources, by which teacher."""

from __future__ import annotations

import math

import pytest
import torch

from avsep.errors import CheckpointError, ConfigError
from avsep.kernels.mask_head.reference import mask_l1_reference
from avsep.registry import STRATEGIES
from avsep.runs.checkpoint import flatten_state, unflatten_state
from avsep.strategies.base import Step, TaskContext
from avsep.types import Batch, MaskOutput, Prediction, Spectrograms, Task, VisualFeatures
from support.strategy_steps import CLASS_IDS, gradients, make_step, student_and_teacher, with_teacher

TASK = Task(1, ("peep", "whirr"), ("ding", "hum", "peep", "whirr"))


class _Constant:
    """A separator, and its mask decoder, whose masks are one logit a class: a decoder with queries, by hand."""

    def __init__(self, logits, class_agnostic=False):
        self.logits = torch.tensor(logits, requires_grad=True)
        self.class_agnostic = class_agnostic
        self.asked = []
        self.mask_decoder = self

    def train(self, mode):
        assert not mode

    def encode_visual(self, *_):
        return VisualFeatures()

    def predict(self, batch, *, class_ids, spectrograms, mixtures=None):
        assert mixtures is None
        return Prediction(spectrograms, None, VisualFeatures(), self(None, None, class_ids))

    def __call__(self, audio, visual, class_ids):
        self.asked.append(class_ids)
        found = self.logits[class_ids * (not self.class_agnostic)]
        return MaskOutput(audio=torch.zeros(*class_ids.shape, 1), logits=found[..., None, None].expand(-1, -1, 2, 2))

    decode = __call__


def _by_hand(student, class_ids, num_old):
    batch = Batch(torch.zeros(1, 2, 4), class_ids, class_ids, class_ids < num_old)
    spectrograms = Spectrograms(
        torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0), torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2)
    )
    return Step(batch, spectrograms, None, VisualFeatures(), student(None, None, class_ids), num_old, student)


def test_the_mask_term_by_hand():
    """One old class, so that every source is queried as class 0: masks 1/2 and 3/4, weight 2, lambda .3."""
    student, teacher = _Constant([0.0, 5.0]), _Constant([math.log(3.0)])
    step = _by_hand(student, torch.tensor([[1, 0]]), num_old=1)
    term = STRATEGIES.create("lwf").loss(with_teacher(step, teacher))["mask"]
    assert term.item() == pytest.approx(0.3 * 2 * 0.25)
    term.backward()
    # lambda w sign(M - M') M (1 - M), and nothing for the new class
    torch.testing.assert_close(student.logits.grad, torch.tensor([-0.3 * 2 * 0.25, 0.0]))
    assert teacher.logits.grad is None


def test_masks_that_know_no_class_are_distilled_as_they_are():
    student, teacher = _Constant([0.0], class_agnostic=True), _Constant([math.log(3.0)], class_agnostic=True)
    for variant in ("old_query", "grown_teacher"):
        step = _by_hand(student, torch.tensor([[3, 1]]), num_old=2)
        student.asked.clear()
        strategy = STRATEGIES.create("lwf", {"variant": variant})
        assert strategy.loss(with_teacher(step, teacher))["mask"].item() == pytest.approx(0.15)
        assert student.asked == []  # no second pass
        assert int(teacher.asked[-1].max()) < 2


def test_new_classes_answer_as_drawn_old_classes_in_both_models(separators, monkeypatch):
    student, teacher = separators
    step = make_step(student)
    torch.manual_seed(3)
    drawn = torch.randint(2, (3, 2))
    torch.manual_seed(3)
    terms = STRATEGIES.create("lwf").loss(with_teacher(step, teacher))
    queried = torch.where(CLASS_IDS < 2, CLASS_IDS, drawn)
    output = student.mask_decoder(step.audio, step.visual, queried)
    taught = teacher(step.spectrograms.network_input, teacher.encode_visual(step.batch.visual), queried)
    weight = step.spectrograms.weight
    want = 0.3 * mask_l1_reference(output.logits, taught.logits, weight, target_is_logits=True)
    torch.testing.assert_close(terms["mask"], want)
    separation = mask_l1_reference(step.output.logits, step.spectrograms.ratio, weight)
    torch.testing.assert_close(terms["separation"], separation)
    got, wanted = gradients(terms["mask"], student), gradients(want, student)
    assert got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-6)
    # the new classes' own query rows take no part in what an old query gives
    assert any(name.startswith("audio_encoder") for name in got)


def test_the_draw_is_uniform_over_the_old_classes_and_leaves_old_sources_alone():
    asked = []
    torch.manual_seed(0)
    for _ in range(200):
        student, teacher = _Constant([0.0] * 8), _Constant([0.0] * 5)
        step = _by_hand(student, torch.tensor([[6, 2]]), num_old=5)
        STRATEGIES.create("lwf").loss(with_teacher(step, teacher))
        assert torch.equal(student.asked[-1], teacher.asked[-1])
        asked.append(student.asked[-1])
    queried = torch.cat(asked)
    assert (queried[:, 1] == 2).all()
    counts = torch.bincount(queried[:, 0], minlength=5)
    assert len(counts) == 5
    assert counts.min() > 20  # 40 expected


def test_a_grown_teacher_starts_as_the_student(separators):
    _, teacher = separators
    student, _ = student_and_teacher()
    student.load_state_dict(
        {**student.state_dict(), **{k: v for k, v in teacher.state_dict().items() if k != "mask_decoder.class_queries"}}
    )
    with torch.no_grad():
        student.mask_decoder.class_queries[:2] = teacher.mask_decoder.class_queries
    student.eval()  # as the teacher is: batch statistics would differ
    strategy = STRATEGIES.create("lwf", {"variant": "grown_teacher"})
    assert strategy.state_dict() == {}
    old_shapes = {name: tuple(value.shape) for name, value in teacher.state_dict().items()}
    ctx = TaskContext(TASK, student, teacher, None, old_shapes=old_shapes)
    strategy.begin_task(ctx)
    random = torch.get_rng_state()
    assert strategy.loss(with_teacher(make_step(student), teacher))["mask"].item() < 1e-6
    assert torch.equal(torch.get_rng_state(), random)
    assert teacher.num_classes == 2

    start = {k: v.clone() for k, v in student.state_dict().items()}
    with torch.no_grad():
        student.mask_decoder.class_queries.add_(0.5)
        student.mask_decoder.head[-1].weight.mul_(20)
    step = make_step(student)
    term = strategy.loss(with_teacher(step, teacher))["mask"]
    grown, _ = student_and_teacher()
    grown.load_state_dict(start)
    grown.eval()
    target = grown(step.spectrograms.network_input, grown.encode_visual(step.batch.visual), CLASS_IDS).logits
    want = 0.3 * mask_l1_reference(step.output.logits, target, step.spectrograms.weight, target_is_logits=True)
    assert want > 1e-3
    torch.testing.assert_close(term, want)
    # the rows survive a checkpoint, and are gone after the task
    again = STRATEGIES.create("lwf", {"variant": "grown_teacher"})
    again.load_state_dict(unflatten_state(*flatten_state(strategy.state_dict())))
    assert again.loss(with_teacher(step, teacher))["mask"].item() == term.item()
    strategy.after_task(ctx)
    assert strategy.state_dict() == {}


def test_first_task_and_weight_0_are_fine_tuning(separators):
    student, teacher = separators
    step = make_step(student)
    assert list(STRATEGIES.create("lwf").loss(with_teacher(step, None))) == ["separation"]
    assert list(STRATEGIES.create("lwf", {"weight_mask": 0}).loss(with_teacher(step, teacher))) == ["separation"]
    assert STRATEGIES.create("lwf").first_task() == {}


def test_the_name_of_0_1_for_old_query_still_works():
    assert STRATEGIES.create("lwf", {"variant": "old_slot"}).variant == "old_query"


def test_wrong_settings():
    with pytest.raises(ConfigError, match="weight_mask must be 0 or more, got -1"):
        STRATEGIES.create("lwf", {"weight_mask": -1})
    with pytest.raises(ConfigError, match="variant must be 'old_query' or 'grown_teacher', got 'new'"):
        STRATEGIES.create("lwf", {"variant": "new"})
    with pytest.raises(CheckpointError, match="keeps no state, but the checkpoint has \\['x'\\]"):
        STRATEGIES.create("lwf").load_state_dict({"x": torch.zeros(1)})

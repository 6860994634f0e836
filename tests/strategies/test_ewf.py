"""Endpoints weight fusion: the factors, what is fused, what is not."""

from __future__ import annotations

import pytest
import torch

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import TaskContext
from avsep.strategies.teaching import reestimate_batch_norm
from avsep.strategies.weight_fusion import fuse, fusion_factor
from avsep.types import Task
from support.continual_runs import SEPARATORS
from support.strategy_steps import GivenData, make_step, student_and_teacher, with_teacher

TASK = Task(1, ("peep", "whirr"), ("ding", "hum", "peep", "whirr"))


def _copy(separator):
    return {k: v.detach().clone() for k, v in separator.state_dict().items()}


def test_factors_of_tasks_of_equal_size():
    assert [fusion_factor(5, 5 * t) for t in (1, 2, 3)] == pytest.approx([0.7071, 0.5774, 0.5], abs=5e-5)
    assert fusion_factor(1, 3) == 0.5


def test_floating_tensors_of_the_old_state_are_fused_and_nothing_else():
    student, teacher = student_and_teacher()
    with torch.no_grad():
        for separator, value in ((student, 3.0), (teacher, 1.0)):
            for tensor in separator.state_dict().values():
                tensor.fill_(value)
    fuse(student, teacher, 0.25)
    known = teacher.state_dict()
    kinds = set()
    for name, value in student.state_dict().items():
        if not value.is_floating_point():
            assert (value == 3).all(), name  # batches counted
        elif value.shape == known[name].shape:
            assert (value == 1.5).all(), name  # 3/4 of 1 and 1/4 of 3
            kinds.add(name.rpartition(".")[2])
        else:
            assert name == "mask_decoder.class_queries"
            assert (value[:2] == 1.5).all()
            assert (value[2:] == 3.0).all()
    assert {"weight", "running_mean", "running_var"} <= kinds
    assert all((value == 1).all() for value in known.values())


def test_after_a_task_the_student_is_the_fused_model():
    student, teacher = student_and_teacher()
    before, old = _copy(student), teacher.state_dict()
    STRATEGIES.create("ewf").after_task(TaskContext(TASK, student, teacher, None))
    factor = 0.5**0.5
    name = "audio_encoder.down.0.weight"
    torch.testing.assert_close(student.state_dict()[name], (1 - factor) * old[name] + factor * before[name])
    again = _copy(student)
    first = TaskContext(Task(0, ("a",), ("a",)), student, None, None)
    STRATEGIES.create("ewf").after_task(first)  # the first task has no endpoint
    assert all(torch.equal(v, again[k]) for k, v in student.state_dict().items())


def test_it_trains_with_lwfs_loss():
    student, teacher = student_and_teacher()
    step = make_step(student)
    found = []
    for name, params in (("ewf", {"distillation": 0.7}), ("lwf", {"weight_mask": 0.7})):
        torch.manual_seed(0)
        found.append(STRATEGIES.create(name, params).loss(with_teacher(step, teacher)))
    assert found[0] == found[1]
    assert set(found[0]) == {"separation", "mask"}
    assert list(STRATEGIES.create("ewf", {"distillation": 0}).loss(with_teacher(step, teacher))) == ["separation"]
    assert STRATEGIES.create("ewf").parts["lwf"].weight_mask == 0.3
    with pytest.raises(ConfigError, match="distillation must be 0 or more, got -1"):
        STRATEGIES.create("ewf", {"distillation": -1})


def test_batch_norm_is_estimated_anew_from_training_mixtures():
    student, teacher = student_and_teacher()
    batches = [make_step(student, rows=rows).batch for rows in (slice(0, 2), slice(1, 3))]
    data = GivenData(batches)
    before = _copy(student)
    STRATEGIES.create("ewf", {"reestimate_batch_norm": True}).after_task(
        TaskContext(TASK, student.eval(), teacher, data)
    )
    assert data.asked == [(256, 16)]
    inputs = [student.analyse(batch.sources).network_input for batch in batches]
    norm = student.audio_encoder.input_norm
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean() for x in inputs]).mean()[None])
    torch.testing.assert_close(norm.running_var, torch.stack([x.var() for x in inputs]).mean()[None])
    assert norm.momentum == 0.1
    assert not any(m.training for m in student.modules())
    # weights and everything else are the fused ones
    other, _ = student_and_teacher()
    other.load_state_dict(before)
    fuse(other, teacher, fusion_factor(2, 2))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in _copy(student).items() if not k.endswith(statistics))


def test_a_part_that_masks_do_not_need_keeps_its_statistics():
    parts = {k: v for k, v in SEPARATORS["coseparation"].items() if k != "front_end"}
    student, _ = student_and_teacher(**parts, motion_encoder=None)
    data = GivenData([make_step(student).batch])
    with torch.no_grad():
        student.mask_decoder.classifier.bn1.running_mean.fill_(3.0)
    before = _copy(student)
    reestimate_batch_norm(student, data)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("mask_decoder.up") for k in changed)
    assert not any(k.startswith("mask_decoder.classifier") for k in changed)


def test_frozen_statistics_are_not_estimated_anew():
    student, _ = student_and_teacher()
    student.object_encoder.frozen = True
    data = GivenData([make_step(student).batch])
    before = _copy(student)
    reestimate_batch_norm(student, data)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("audio_encoder") for k in changed)
    assert not any(k.startswith("object_encoder") for k in changed)

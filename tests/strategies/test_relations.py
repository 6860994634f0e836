"""Topology and prototype relations: what is compared, what is kept, and where the two differ."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from avsep.errors import ConfigError
from avsep.losses import relation_divergence
from avsep.registry import STRATEGIES
from avsep.strategies.base import TaskContext
from avsep.types import MaskOutput, Task
from support.strategy_steps import GivenData, gradients, make_step, student_and_teacher, with_teacher

TASK = Task(1, ("c", "d"), ("a", "b", "c", "d"))
NAMES = ("object", "motion")
PROTOTYPES = dict(zip(NAMES, torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1)), strict=True))


def _relations(**parameters):
    strategy = STRATEGIES.create("prototype_relations", parameters)
    strategy.load_state_dict(PROTOTYPES)
    return strategy


def _embeddings(step, teacher):
    """The student's and the teacher's, [6, 16] by name."""
    taught = teacher(step.spectrograms.network_input, teacher.encode_visual(step.batch.visual), step.known_class_ids)
    outputs = (step.output, taught)
    return [{name: getattr(one, name).flatten(0, 1) for name in NAMES} for one in outputs]


def _matches(term, want, student):
    torch.testing.assert_close(term, want)
    got, wanted = gradients(term, student), gradients(want, student)
    assert got.keys() == wanted.keys()
    assert {name.split(".")[0] for name in got} == {"object_encoder", "motion_encoder", "mask_decoder"}
    for name in got:
        # sums in another order: single precision, of processors with AVX-512 too
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=5e-7)


def test_topology_by_the_definition(separators):
    student, teacher = separators
    step = make_step(student)
    own, theirs = _embeddings(step, teacher)

    def divergence(x, y):
        return relation_divergence(own[x], own[y], theirs[x], theirs[y], temperature=0.2, include_self=x != y)

    cross = divergence("motion", "object") + divergence("object", "motion")
    within = divergence("motion", "motion") + divergence("object", "object")
    strategy = STRATEGIES.create("topology", {"weight": 3.0, "temperature": 0.2})
    term = strategy.loss(with_teacher(step, teacher))["topology"]
    assert term > 0
    _matches(term, 3.0 * (cross + within) / 2, student)


def test_topology_without_motion_is_of_objects_alone():
    student, teacher = student_and_teacher(motion_encoder=None)
    step = make_step(student)
    taught = teacher(step.spectrograms.network_input, teacher.encode_visual(step.batch.visual), step.known_class_ids)
    own, theirs = step.output.object.flatten(0, 1), taught.object.flatten(0, 1)
    want = relation_divergence(own, own, theirs, theirs, include_self=False)
    torch.testing.assert_close(STRATEGIES.create("topology").loss(with_teacher(step, teacher))["topology"], want)


def test_prototype_relations_by_the_definition(separators):
    student, teacher = separators
    step = make_step(student)
    own, theirs = _embeddings(step, teacher)
    total = 0.0
    for name, prototypes in PROTOTYPES.items():
        shares = [
            (F.normalize(prototypes, dim=1) @ F.normalize(x[name], dim=1).T / 0.2).softmax(dim=1) for x in (own, theirs)
        ]
        assert shares[0].shape == (2, 6)  # over the sources, for each class
        total = total + (shares[1] * (shares[1] / shares[0]).log()).sum(dim=1).mean()
    term = _relations(weight=3.0, temperature=0.2).loss(with_teacher(step, teacher))["relations"]
    assert term > 0
    _matches(term, 3.0 * (total / 2).float(), student)


def test_where_the_two_differ(separators):
    """If all embeddings turn together, topology does not see it, and prototypes do."""
    _, teacher = separators
    step = with_teacher(make_step(teacher, class_ids=torch.tensor([[1, 0], [0, 0], [1, 1]])), teacher)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    for turned in (False, True):
        embeddings = {name: getattr(step.output, name) for name in NAMES}
        if turned:
            embeddings = {name: value @ turn for name, value in embeddings.items()}
        output = MaskOutput(audio=step.output.audio, logits=step.output.logits, **embeddings)
        one = dataclasses.replace(step, output=output)
        assert STRATEGIES.create("topology").loss(one)["topology"].abs() < 1e-5
        found = _relations().loss(one)["relations"]
        assert (found > 0.01) if turned else (found.abs() < 1e-6)


def test_prototypes_are_mean_directions_of_the_tasks_own_classes(separators):
    student, teacher = separators
    batch = make_step(student).batch
    strategy = _relations(mixtures=7)
    student.eval()
    data = GivenData([batch, batch])
    strategy.after_task(TaskContext(TASK, student, teacher, data))
    kept = strategy.state_dict()
    with torch.no_grad():
        output = student.predict(batch).output
    student.train()
    assert data.asked == [(7, 16)]
    for name, old in PROTOTYPES.items():
        assert torch.equal(kept[name][:2], old)
        units = F.normalize(getattr(output, name), dim=2)
        for number in (2, 3):
            mean = units[batch.class_ids == number].mean(dim=0)
            torch.testing.assert_close(kept[name][number], mean / mean.norm())
    last = _relations()
    last.after_task(TaskContext(TASK, student, teacher, None, is_last=True))
    assert last.state_dict() == {}


@pytest.mark.parametrize("name", ["topology", "prototype_relations"])
def test_first_task_weight_0_and_wrong_settings(name, separators):
    student, teacher = separators
    step = make_step(student)
    assert list(STRATEGIES.create(name).loss(with_teacher(step, None))) == ["separation"]
    off = STRATEGIES.create(name, {"weight": 0.0})
    assert not off.needs_teacher
    assert list(off.loss(with_teacher(step, teacher))) == ["separation"]
    assert off.first_task() == {}
    for parameters, message in (
        ({"weight": -1.0}, "weight must be 0 or more, got -1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            STRATEGIES.create(name, parameters)
    with pytest.raises(ConfigError, match="mixtures must be at least 1, got 0"):
        STRATEGIES.create("prototype_relations", {"mixtures": 0})

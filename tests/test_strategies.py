"""Strategies: which slots each term sees, what a switch switches off, what the teacher is and is not."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_FRONT_END, TINY_SEPARATOR

from avsep import build_separator
from avsep.errors import ConfigError, UnknownNameError
from avsep.kernels.mask_head.reference import mask_l1_reference
from avsep.kernels.similarity_distillation.reference import similarity_distillation_reference
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step
from avsep.types import Batch

PARTS = {k: v for k, v in TINY_SEPARATOR.items() if k != "front_end"}
# mixtures: old + new, new + new, old + old of one video; slots 0-1 are old classes, 2-3 new
CLASS_IDS = torch.tensor([[1, 3], [2, 3], [0, 0]])
VIDEO_IDS = torch.tensor([[7, 1], [2, 3], [9, 9]])


@pytest.fixture(scope="module")
def separators():
    student = build_separator(**PARTS, front_end=TINY_FRONT_END, num_classes=4, seed=1).train()
    teacher = build_separator(**PARTS, front_end=TINY_FRONT_END, num_classes=2, seed=2).requires_grad_(False).eval()
    return student, teacher


def _step(student, num_old=2, class_ids=CLASS_IDS, rows=slice(None)):
    rng = torch.Generator().manual_seed(0)
    batch = Batch(
        sources=0.2 * torch.randn(3, 2, TINY_FRONT_END["clip_samples"], generator=rng)[rows],
        class_ids=class_ids[rows],
        video_ids=VIDEO_IDS[rows],
        is_memory=class_ids[rows] < num_old,
        object=torch.randint(0, 255, (3, 2, 3, 3, 32, 32), dtype=torch.uint8, generator=rng)[rows],
        motion=torch.randint(0, 255, (3, 2, 6, 1, 16, 16), dtype=torch.uint8, generator=rng)[rows],
    )
    spectrograms = student.analyse(batch.sources)
    visual = student.encode_visual(batch.object, batch.motion)
    audio = student.audio_encoder(spectrograms.network_input)
    return Step(batch, spectrograms, audio, visual, student.mask_decoder(audio, visual, batch.class_ids), num_old)


def _rows(output):
    return [x.flatten(0, 1) for x in (output.audio, output.motion, output.object)]


def test_registered_defaults_are_the_published_weights():
    strategy = STRATEGIES.create("contavsep")
    weights = (strategy.weight_instance, strategy.weight_class, strategy.weight_mask, strategy.temperature)
    assert weights == (0.1, 0.3, 0.3, 0.05)


def test_finetuning_has_the_separation_loss_alone(separators):
    step = _step(separators[0])
    terms = STRATEGIES.create("finetune").loss(*separators, step)
    assert list(terms) == ["separation"]
    expected = mask_l1_reference(step.output.logits, step.spectrograms.ratio, step.spectrograms.weight)
    torch.testing.assert_close(terms["separation"], expected)


def test_contavsep_is_the_literal_sum_over_the_right_rows(separators):
    """All four terms against references that are told by hand which slots are old."""
    student, teacher = separators
    step = _step(student)
    terms = STRATEGIES.create("contavsep").loss(student, teacher, step)

    mixtures = [0, 2]
    visual = teacher.encode_visual(step.batch.object[mixtures], step.batch.motion[mixtures])
    taught = teacher(step.spectrograms.network_input[mixtures], visual, torch.tensor([[1, 0], [0, 0]]))
    old_of_taught, old_of_batch = [0, 2, 3], [0, 4, 5]  # slots counted along mixtures
    z = [torch.cat([s, t[old_of_taught]]) for s, t in zip(_rows(step.output), _rows(taught), strict=True)]
    class_ids, video_ids = CLASS_IDS.flatten(), VIDEO_IDS.flatten()
    instance, class_, _ = similarity_distillation_reference(
        z,
        torch.cat([video_ids, video_ids[old_of_batch]]),
        torch.cat([class_ids, class_ids[old_of_batch]]),
        teacher_rows=torch.arange(9) >= 6,
    )
    torch.testing.assert_close(terms["instance"], 0.1 * instance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["class"], 0.3 * class_, rtol=1e-4, atol=1e-5)
    distilled = mask_l1_reference(
        step.output.logits[mixtures],
        taught.logits,
        step.spectrograms.weight[mixtures],
        slots=torch.tensor([[True, False], [True, True]]),
        target_is_logits=True,
    )
    torch.testing.assert_close(terms["mask"], 0.3 * distilled)
    assert terms["mask"] > 0
    separation = mask_l1_reference(step.output.logits, step.spectrograms.ratio, step.spectrograms.weight)
    torch.testing.assert_close(terms["separation"], separation)


@pytest.mark.parametrize(
    ("weight", "term"), [("weight_instance", "instance"), ("weight_class", "class"), ("weight_mask", "mask")]
)
def test_a_weight_of_zero_removes_its_term_and_no_other(separators, weight, term):
    student, teacher = separators
    step = _step(student)
    whole = STRATEGIES.create("contavsep").loss(student, teacher, step)
    without = STRATEGIES.create("contavsep", {weight: 0.0}).loss(student, teacher, step)
    assert set(whole) - set(without) == {term}
    for name in without:
        torch.testing.assert_close(without[name], whole[name])
    doubled = STRATEGIES.create("contavsep", {weight: 2.0}).loss(student, teacher, step)
    default = getattr(STRATEGIES.create("contavsep"), weight)
    torch.testing.assert_close(doubled[term] / 2.0, whole[term] / default)


def test_first_task_and_batches_without_memory_contrast_the_student_alone(separators):
    student, teacher = separators
    strategy = STRATEGIES.create("contavsep")
    first = strategy.loss(student, None, _step(student, num_old=0))
    assert set(first) == {"separation", "instance", "class"}
    step = _step(student, rows=slice(1, 2))  # both of its slots are new
    later = strategy.loss(student, teacher, step)
    assert set(later) == {"separation", "instance", "class"}
    instance, class_, _ = similarity_distillation_reference(
        _rows(step.output), step.batch.video_ids.flatten(), step.batch.class_ids.flatten()
    )
    torch.testing.assert_close(later["instance"], 0.1 * instance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(later["class"], 0.3 * class_, rtol=1e-4, atol=1e-5)


def test_the_teacher_stays_frozen(separators):
    student, teacher = separators
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    terms = STRATEGIES.create("contavsep").loss(student, teacher, _step(student))
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    student.zero_grad()


def test_as_released_the_teacher_normalises_by_the_whole_batch(separators):
    student, teacher = separators
    step = _step(student)
    faithful = STRATEGIES.create("contavsep", {"teacher_batch_norm": "train"})
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    terms = faithful.loss(student, teacher, step)
    assert any(not torch.equal(v, before[k]) for k, v in teacher.state_dict().items() if "running" in k)
    teacher.load_state_dict(before)
    frozen = STRATEGIES.create("contavsep").loss(student, teacher, step)
    assert not torch.allclose(terms["mask"], frozen["mask"])
    # mask distillation still counts old slots only
    assert terms["mask"].isfinite()
    teacher.load_state_dict(before)
    teacher.eval()


def test_the_class_asked_of_the_teacher_in_new_slots_does_not_matter(separators):
    student, teacher = separators
    terms = [
        STRATEGIES.create("contavsep", {"weight_instance": 0, "weight_class": 0}).loss(student, teacher, step)["mask"]
        for step in (_step(student), _step(student, class_ids=torch.tensor([[1, 2], [2, 3], [0, 0]])))
    ]
    torch.testing.assert_close(*terms)


def test_wrong_settings():
    with pytest.raises(ConfigError, match="weight_mask must be 0 or more, got -1"):
        STRATEGIES.create("contavsep", {"weight_mask": -1})
    with pytest.raises(ConfigError, match="weight_class must be 0 or more, got nan"):
        STRATEGIES.create("contavsep", {"weight_class": float("nan")})
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        STRATEGIES.create("contavsep", {"temperature": 0})
    with pytest.raises(ConfigError, match="teacher_batch_norm must be 'eval' or 'train', got 'off'"):
        STRATEGIES.create("contavsep", {"teacher_batch_norm": "off"})
    with pytest.raises(UnknownNameError, match="did you mean 'temperature'"):
        STRATEGIES.create("contavsep", {"temprature": 1})

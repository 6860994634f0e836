"""Strategies: which sources each term sees, what a switch switches off, what the teacher is and is not."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch

from avsep.errors import ConfigError, UnknownNameError
from avsep.kernels.mask_head.reference import mask_l1_reference
from avsep.kernels.similarity_distillation.reference import (
    cross_entropy,
    normalise,
    similarity_distillation_reference,
)
from avsep.registry import STRATEGIES
from avsep.strategies.base import TaskContext
from avsep.types import Task, VisualInputs
from support.continual_runs import REFUSED, SEPARATORS, make_learner
from support.strategy_steps import (
    CLASS_IDS,
    VIDEO_IDS,
    GivenData,
    gradients,
    make_step,
    student_and_teacher,
    with_teacher,
)

LOOKS_AT_NOTHING = {k: v for k, v in SEPARATORS["ridge_filters"].items() if k != "front_end"} | {
    "object_encoder": None,
    "motion_encoder": None,
}


def _rows(output):
    return [x.flatten(0, 1) for x in (output.audio, output.motion, output.object)]


def test_registered_defaults_are_the_published_weights():
    strategy = STRATEGIES.create("contavsep")
    weights = (strategy.weight_instance, strategy.weight_class, strategy.weight_mask, strategy.temperature)
    assert weights == (0.1, 0.3, 0.3, 0.05)


def test_finetuning_has_the_separation_loss_alone(separators):
    step = make_step(separators[0])
    terms = STRATEGIES.create("finetune").loss(with_teacher(step, separators[1]))
    assert list(terms) == ["separation"]
    expected = mask_l1_reference(step.output.logits, step.spectrograms.ratio, step.spectrograms.weight)
    torch.testing.assert_close(terms["separation"], expected)


def test_contavsep_is_the_literal_sum_over_the_right_rows(separators):
    """All four terms against references that are told by hand which sources are old."""
    student, teacher = separators
    step = make_step(student)
    terms = STRATEGIES.create("contavsep").loss(with_teacher(step, teacher))

    mixtures = [0, 2]
    visual = teacher.encode_visual(step.batch.visual[mixtures])
    taught = teacher(step.spectrograms.network_input[mixtures], visual, torch.tensor([[1, 0], [0, 0]]))
    old_of_taught, old_of_batch = [0, 2, 3], [0, 4, 5]  # sources counted along mixtures
    z = [torch.cat([s, t[old_of_taught]]) for s, t in zip(_rows(step.output), _rows(taught), strict=True)]
    class_ids, video_ids = CLASS_IDS.flatten(), VIDEO_IDS.flatten()
    instance, class_ = similarity_distillation_reference(
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
        counted=torch.tensor([[True, False], [True, True]]),
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
    step = make_step(student)
    whole = STRATEGIES.create("contavsep").loss(with_teacher(step, teacher))
    without = STRATEGIES.create("contavsep", {weight: 0.0}).loss(with_teacher(step, teacher))
    assert set(whole) - set(without) == {term}
    for name in without:
        torch.testing.assert_close(without[name], whole[name])
    doubled = STRATEGIES.create("contavsep", {weight: 2.0}).loss(with_teacher(step, teacher))
    default = getattr(STRATEGIES.create("contavsep"), weight)
    torch.testing.assert_close(doubled[term] / 2.0, whole[term] / default)


def test_first_task_and_batches_without_memory_contrast_the_student_alone(separators):
    student, teacher = separators
    strategy = STRATEGIES.create("contavsep")
    first = strategy.loss(with_teacher(make_step(student, num_old=0), None))
    assert set(first) == {"separation", "instance", "class"}
    step = make_step(student, rows=slice(1, 2))  # both of its sources are new
    later = strategy.loss(with_teacher(step, teacher))
    assert set(later) == {"separation", "instance", "class"}
    instance, class_ = similarity_distillation_reference(
        _rows(step.output), step.batch.video_ids.flatten(), step.batch.class_ids.flatten()
    )
    torch.testing.assert_close(later["instance"], 0.1 * instance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(later["class"], 0.3 * class_, rtol=1e-4, atol=1e-5)


def test_the_teacher_stays_frozen(separators):
    student, teacher = separators
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    terms = STRATEGIES.create("contavsep").loss(with_teacher(make_step(student), teacher))
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    student.zero_grad()


def test_as_released_the_teacher_normalises_by_the_whole_batch(separators):
    student, teacher = separators
    step = make_step(student)
    faithful = STRATEGIES.create("contavsep", {"teacher_batch_norm": "train"})
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    terms = faithful.loss(with_teacher(step, teacher))
    assert any(not torch.equal(v, before[k]) for k, v in teacher.state_dict().items() if "running" in k)
    teacher.load_state_dict(before)
    frozen = STRATEGIES.create("contavsep").loss(with_teacher(step, teacher))
    assert not torch.allclose(terms["mask"], frozen["mask"])
    # mask distillation still counts old sources only
    assert terms["mask"].isfinite()
    teacher.load_state_dict(before)
    teacher.eval()


def test_the_class_asked_of_the_teacher_in_new_sources_does_not_matter(separators):
    student, teacher = separators
    terms = [
        STRATEGIES.create("contavsep", {"weight_instance": 0, "weight_class": 0}).loss(with_teacher(step, teacher))[
            "mask"
        ]
        for step in (make_step(student), make_step(student, class_ids=torch.tensor([[1, 2], [2, 3], [0, 0]])))
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
    with pytest.raises(ConfigError, match="instance must be 'id' or 'features', got 'video'"):
        STRATEGIES.create("contavsep", {"instance": "video"})
    with pytest.raises(ConfigError, match="modality_pairs must be 'cross' or 'within', got 'all'"):
        STRATEGIES.create("contavsep", {"modality_pairs": "all"})


@pytest.mark.parametrize("term", ["instance", "class", "mask"])
def test_every_term_pulls_at_the_student(separators, term):
    student, teacher = separators
    found = gradients(STRATEGIES.create("contavsep").loss(with_teacher(make_step(student), teacher))[term], student)
    for part in ("audio_encoder", "object_encoder", "motion_encoder", "mask_decoder"):
        assert any(name.startswith(part) for name in found)


def test_instances_by_equal_motion_features():
    """As released: which sources are of one video is read off the projected motion features, bit by bit."""
    student, teacher = student_and_teacher()
    strategy = STRATEGIES.create("contavsep", {"instance": "features"})
    step = make_step(student, video_ids=torch.arange(6).view(3, 2))  # ids that say nothing
    motion = step.batch.visual.motion.clone()
    motion[0, 1] = motion[1, 0]  # two new sources
    motion[2, 1] = motion[0, 0]  # two old ones
    motion[2, 0] = motion[1, 1]  # an old one and a new one: never of one video
    batch = dataclasses.replace(step.batch, visual=VisualInputs(step.batch.visual.object, motion))
    visual = student.encode_visual(batch.visual)
    output = student.mask_decoder(step.audio, visual, batch.class_ids)
    step = dataclasses.replace(step, batch=batch, visual=visual, output=output)
    videos = torch.tensor([[0, 1], [1, 2], [3, 0]])
    named = dataclasses.replace(step, batch=dataclasses.replace(batch, video_ids=videos))
    by_id = STRATEGIES.create("contavsep")
    for given in (teacher, None):
        one, other = strategy.loss(with_teacher(step, given)), by_id.loss(with_teacher(named, given))
        torch.testing.assert_close(one, other)
        assert one["instance"] != by_id.loss(with_teacher(step, given))["instance"]


def test_instances_of_old_sources_are_the_teachers():
    """Motion that the teacher cannot tell apart is one video, whatever the student makes of it."""
    student, teacher = student_and_teacher()
    with torch.no_grad():
        teacher.mask_decoder.motion_proj.weight.zero_()
    step = make_step(student, video_ids=torch.arange(6).view(3, 2))
    one = STRATEGIES.create("contavsep", {"instance": "features"}).loss(with_teacher(step, teacher))
    videos = torch.tensor([[0, 1], [2, 3], [0, 0]])
    named = dataclasses.replace(step, batch=dataclasses.replace(step.batch, video_ids=videos))
    torch.testing.assert_close(one, STRATEGIES.create("contavsep").loss(with_teacher(named, teacher)))


def test_without_motion_instances_cannot_be_told_by_it():
    student, teacher = student_and_teacher(motion_encoder=None)
    strategy = STRATEGIES.create("contavsep", {"instance": "features"})
    with pytest.raises(ConfigError, match="no motion encoder: use instance=id"):
        strategy.check(student)
    with pytest.raises(ConfigError, match="the mask decoder gives none"):
        strategy.loss(with_teacher(make_step(student), teacher))
    STRATEGIES.create("contavsep").check(student)
    # where the instance term is off nothing is compared
    STRATEGIES.create("contavsep", {"instance": "features", "weight_instance": 0}).check(student)


def test_without_motion_the_one_pair_left_counts_whole():
    student, teacher = student_and_teacher(motion_encoder=None)
    step = make_step(student)
    terms = STRATEGIES.create("contavsep").loss(with_teacher(step, teacher))
    visual = teacher.encode_visual(VisualInputs(step.batch.visual.object))
    taught = teacher(step.spectrograms.network_input, visual, CLASS_IDS.where(CLASS_IDS < 2, 0))
    old = [0, 4, 5]
    z = [
        torch.cat([s.flatten(0, 1), t.flatten(0, 1)[old]])
        for s, t in ((step.output.audio, taught.audio), (step.output.object, taught.object))
    ]
    ids = [torch.cat([x.flatten(), x.flatten()[old]]) for x in (VIDEO_IDS, CLASS_IDS)]
    scores = normalise(z[0]) @ normalise(z[1]).T / 0.05
    for name, weight, i in (("instance", 0.1, ids[0]), ("class", 0.3, ids[1])):
        positives = i[:, None] == i[None, :]
        pair = (cross_entropy(scores, positives) + cross_entropy(scores.T, positives)) / 2
        torch.testing.assert_close(terms[name], weight * pair, rtol=1e-4, atol=1e-5)


def test_within_modalities(separators):
    student, teacher = separators
    step = make_step(student, rows=slice(0, 3))
    terms = STRATEGIES.create("contavsep", {"modality_pairs": "within"}).loss(with_teacher(step, None))
    instance, class_ = similarity_distillation_reference(
        _rows(step.output), VIDEO_IDS.flatten(), CLASS_IDS.flatten(), unimodal=True
    )
    torch.testing.assert_close(terms["instance"], 0.1 * instance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["class"], 0.3 * class_, rtol=1e-4, atol=1e-5)
    assert set(STRATEGIES.create("contavsep", {"modality_pairs": "within"}).loss(with_teacher(step, teacher))) == {
        "separation",
        "instance",
        "class",
        "mask",
    }


def test_what_looks_at_nothing_is_refused_or_trained():
    """Every method either says at once that it needs something that is seen, or learns two tasks without it."""
    refused = []
    for spec in STRATEGIES:
        student, teacher = student_and_teacher(**LOOKS_AT_NOTHING)
        strategy = STRATEGIES.create(spec.name, dict(spec.example))
        try:
            strategy.check(student)
        except ConfigError:
            refused.append(spec.name)
            continue
        first = copy.deepcopy(teacher).requires_grad_(True)
        known = GivenData([make_step(first, num_old=0, class_ids=CLASS_IDS % 2).batch])
        tasks = Task(0, ("a", "b"), ("a", "b")), Task(1, ("c", "d"), ("a", "b", "c", "d"))
        shapes = {name: tuple(value.shape) for name, value in teacher.state_dict().items()}
        strategy.begin_task(TaskContext(tasks[0], first, None, known))
        strategy.after_task(TaskContext(tasks[0], first, None, known))
        step = make_step(student)
        data = GivenData([step.batch])
        strategy.begin_task(TaskContext(tasks[1], student, teacher, data, old_shapes=shapes))
        step = with_teacher(make_step(student), teacher)
        torch.stack(list(strategy.loss(step).values())).sum().backward()
        strategy.after_backward(step)
        strategy.after_step(step)
        strategy.after_task(TaskContext(tasks[1], student, teacher, data, old_shapes=shapes))
    seeing = {"topology", "prototype_relations", "slot_span", "reference", "similar_queries", "contavsep", "avcil"}
    assert seeing <= set(refused)
    assert not set(refused) & {"finetune", "lwf", "ewc", "analytic_mask"}
    without, _ = student_and_teacher(**LOOKS_AT_NOTHING)
    for name, params in (
        ("slot_span", {"conditioning": "own"}),
        ("contavsep", {"modality_pairs": "within"}),
        ("contavsep", {"weight_instance": 0.0, "weight_class": 0.0}),
        ("avcil", {"weight_instance": 0.0, "weight_class": 0.0}),
    ):
        with pytest.raises(ConfigError, match="this separator has no object encoder: add one, with a mask decoder"):
            STRATEGIES.create(name).check(without)
        STRATEGIES.create(name, params).check(without)


def test_the_first_task_is_decided_by_what_acts_in_it():
    def first(**params):
        return STRATEGIES.create("contavsep", params).first_task()

    assert first() == first(weight_mask=0.0) == first(teacher_batch_norm="train")
    # Table 2's row with mask distillation alone begins as fine-tuning does
    assert first(weight_instance=0, weight_class=0) == {} == STRATEGIES.create("finetune").first_task()
    others = [
        first(weight_instance=0.2),
        first(weight_class=0),
        first(temperature=0.1),
        first(instance="features"),
        first(modality_pairs="within"),
    ]
    assert all(other != first() for other in others)
    assert first(weight_instance=0, instance="features") == first(weight_instance=0)


def test_a_step_goes_without_the_garbage_collector(separators):
    """Its tensors are most of a step's memory: in a circle of references they would wait for the collector."""
    student, teacher = separators
    gc.collect()
    gc.disable()
    try:
        step = with_teacher(make_step(student), teacher)
        sum(STRATEGIES.create("contavsep").loss(step).values()).backward()
        gone = weakref.ref(step)
        del step
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("separator", SEPARATORS)
def test_which_separators_a_strategy_is_for(separator):
    """Refused are those that are known to be, in a line, and no others: tests on a GPU leave out no more."""
    refused = set()
    for spec in STRATEGIES:
        learner = make_learner((spec.name, dict(spec.example)), "random_per_class", separator=separator)
        try:
            learner.strategy.check(learner.separator)
        except ConfigError:
            refused.add(spec.name)
    assert refused == {name for name, separators in REFUSED.items() if separator in separators}

"""AV-CIL: its four terms against references that are told by hand which sources are old."""

from __future__ import annotations

import pytest
import torch

from avsep.errors import ConfigError
from avsep.kernels.mask_head.reference import mask_l1_reference
from avsep.kernels.similarity_distillation.reference import cross_entropy, normalise
from avsep.registry import STRATEGIES
from support.continual_runs import make_learner
from support.strategy_steps import CLASS_IDS, VIDEO_IDS, gradients, make_step, student_and_teacher, with_teacher
from support.tones import stream_of


def test_registered_defaults_are_the_published_weights():
    made = STRATEGIES.create("avcil")
    weights = (made.weight_mask, made.weight_instance, made.weight_class, made.weight_attention, made.temperature)
    assert weights == (0.3, 0.1, 1.0, 0.5, 0.05)


def _contrast(output, partners):
    audio = normalise(output.audio.flatten(0, 1))
    terms = []
    for ids, average in ((VIDEO_IDS, True), (CLASS_IDS, False)):
        positives = ids.flatten()[:, None] == ids.flatten()[None, :]
        scores = [audio @ normalise(v.flatten(0, 1)).T / 0.05 for v in partners]
        terms.append(sum(cross_entropy(s, positives, average=average) for s in scores) / len(scores))
    return terms


def test_the_literal_sum_and_its_gradient(separators):
    student, teacher = separators
    step = make_step(student)
    terms = STRATEGIES.create("avcil").loss(with_teacher(step, teacher))
    mixtures, class_ids, old = [0, 2], torch.tensor([[1, 0], [0, 0]]), torch.tensor([[True, False], [True, True]])
    visual = teacher.encode_visual(step.batch.visual[mixtures])
    taught = teacher(step.spectrograms.network_input[mixtures], visual, class_ids)
    instance, class_ = _contrast(step.output, (step.output.motion, step.output.object))
    mask = mask_l1_reference(
        step.output.logits[mixtures],
        taught.logits,
        step.spectrograms.weight[mixtures],
        counted=old,
        target_is_logits=True,
    )
    looks = student.mask_decoder.motion_attention(step.visual, CLASS_IDS)[mixtures]
    looked = teacher.mask_decoder.motion_attention(visual, class_ids)
    attention = (looked * (looked.log() - looks.log())).sum(dim=2)[old].mean()
    want = {"instance": 0.1 * instance, "class": 1.0 * class_, "mask": 0.3 * mask, "attention": 0.5 * attention}
    assert set(terms) == {"separation", *want}
    for name, value in want.items():
        assert value > 0
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6)
        got, wanted = gradients(terms[name], student), gradients(value, student)
        assert got.keys() == wanted.keys()
        for parameter in got:
            torch.testing.assert_close(got[parameter], wanted[parameter], rtol=1e-3, atol=1e-5)
    # attention is the visual side's alone
    assert not any(name.startswith("audio_encoder") for name in gradients(terms["attention"], student))


@pytest.mark.parametrize(
    ("weight", "term"),
    [
        ("weight_instance", "instance"),
        ("weight_class", "class"),
        ("weight_mask", "mask"),
        ("weight_attention", "attention"),
    ],
)
def test_a_weight_of_zero_removes_its_term_and_no_other(separators, weight, term):
    student, teacher = separators
    step = make_step(student)
    whole = STRATEGIES.create("avcil").loss(with_teacher(step, teacher))
    without = STRATEGIES.create("avcil", {weight: 0.0}).loss(with_teacher(step, teacher))
    assert set(whole) - set(without) == {term}
    for name in without:
        torch.testing.assert_close(without[name], whole[name])
    with pytest.raises(ConfigError, match=f"{weight} must be 0 or more, got -1"):
        STRATEGIES.create("avcil", {weight: -1})


def test_without_an_old_source_only_the_similarity_terms_act_and_in_the_first_task_nothing(separators):
    student, teacher = separators
    plain, strategy = STRATEGIES.create("avcil"), STRATEGIES.create("avcil", {"contrast_first": True})
    first, later = make_step(student, num_old=0), with_teacher(make_step(student, rows=slice(1, 2)), teacher)
    assert set(plain.loss(first)) == {"separation"}
    assert plain.first_task() == {}
    assert set(plain.loss(later)) == {"separation", "instance", "class"}
    assert set(strategy.loss(first)) == {"separation", "instance", "class"}
    assert strategy.first_task() == {
        "weight_instance": 0.1,
        "weight_class": 1.0,
        "temperature": 0.05,
        "contrast": "avcil",
    }
    switched_off = {"weight_instance": 0, "weight_class": 0, "contrast_first": True}
    assert STRATEGIES.create("avcil", switched_off).first_task() == {}
    assert strategy.first_task() != STRATEGIES.create("contavsep", {"weight_class": 1.0}).first_task()


def test_without_motion_its_partner_and_the_attention_drop_out():
    student, teacher = student_and_teacher(motion_encoder=None)
    step = make_step(student)
    terms = STRATEGIES.create("avcil").loss(with_teacher(step, teacher))
    assert set(terms) == {"separation", "instance", "class", "mask"}
    instance, class_ = _contrast(step.output, (step.output.object,))
    torch.testing.assert_close(terms["instance"], 0.1 * instance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["class"], class_, rtol=1e-4, atol=1e-6)


def test_without_a_memory_it_is_refused(tone_store, tmp_path):
    stream = stream_of(tone_store)
    with pytest.raises(ConfigError, match="'avcil' learns from exemplars, and the memory is 'none'"):
        make_learner("avcil").fit(stream, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="temperature must be above 0, got 0"):
        make_learner(("avcil", {"temperature": 0}), "random_per_class")

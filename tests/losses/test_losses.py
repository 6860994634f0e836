"""The losses against ContAV-Sep's equations written out source by source."""

from __future__ import annotations

import math

import pytest
import torch

from avsep.errors import ConfigError
from avsep.kernels.similarity_distillation.reference import (
    cross_entropy,
    normalise,
    similarity_distillation_reference,
)
from avsep.losses import (
    attention_distillation,
    audio_visual_contrast,
    cross_sdc,
    mask_cross_entropy,
    mask_distillation,
    mask_losses,
    separation_loss,
)
from avsep.types import MaskOutput, Spectrograms

CLASSES = torch.tensor([5, 0, 6, 1, 0, 7])  # classes below 5 are old
VIDEOS = torch.tensor([11, 3, 12, 4, 3, 11])
OLD = torch.tensor([1, 3, 4])
NEW = torch.tensor([0, 2, 5])
NAMES = ("audio", "motion", "object")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def embeddings(n, seed, names=NAMES):
    return {name: random(n, 8, seed=seed + k).requires_grad_() for k, name in enumerate(names)}


def masks(batch=3, seed=0):
    """Masks of a decoder that gives logits, and of one that gives their factors; two sources, 4 x 5 pixels."""
    embedding, features = random(batch, 2, 6, seed=seed), random(batch, 6, 4, 5, seed=seed + 1)
    audio = torch.zeros(batch, 2, 8)
    factors = MaskOutput(audio=audio, embedding=embedding.requires_grad_(), mask_features=features.requires_grad_())
    return MaskOutput(audio=audio, logits=factors.logits.detach().requires_grad_()), factors


def analysis(batch=3):
    weight = random(batch, 1, 4, 5, seed=2).abs()
    return Spectrograms(weight, weight, random(batch, 2, 4, 5, seed=3).abs(), torch.zeros(batch, 6, 5))


def test_masks_learn_by_weighted_cross_entropy_too():
    logits = torch.tensor([0.0, 2.0])[None, :, None, None].expand(1, 2, 1, 2)
    output = MaskOutput(audio=torch.zeros(1, 2, 4), logits=logits)
    weight, ratio = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[1.0, 1.4]], [[0.0, 0.5]]]])
    found = mask_cross_entropy(output, Spectrograms(weight, weight, ratio, weight))
    of = [math.log(2), math.log(2), 2 + math.log1p(math.exp(-2)), 1 + math.log1p(math.exp(-2))]
    torch.testing.assert_close(found, torch.tensor((0.5 * of[0] + 1.5 * of[1] + 0.5 * of[2] + 1.5 * of[3]) / 4))


@pytest.mark.parametrize("kind", [0, 1])
def test_separation_loss(kind):
    output, spectrograms = masks()[kind], analysis()
    mask, ratio, weight = output.logits.sigmoid(), spectrograms.ratio, spectrograms.weight[:, 0]
    each = [(weight * (mask[:, n] - ratio[:, n]).abs()).mean(dim=(1, 2)) for n in range(2)]
    torch.testing.assert_close(separation_loss(output, spectrograms), 0.5 * (each[0] + each[1]).mean())
    counted = torch.tensor([[True, False], [False, False], [True, True]])
    chosen = (each[0][0] + each[0][2] + each[1][2]) / 3
    torch.testing.assert_close(separation_loss(output, spectrograms, counted=counted), chosen)


@pytest.mark.parametrize("kind", [0, 1])
def test_mask_distillation_is_normalised_by_the_old_sources(kind):
    output, taught, spectrograms = masks()[kind], masks(seed=7)[1 - kind], analysis()
    counted = CLASSES.view(3, 2) < 5
    got = mask_distillation(output, taught, spectrograms, counted=counted)
    mask, target = output.logits.sigmoid(), taught.logits.sigmoid()
    want = sum(
        (spectrograms.weight[b, 0] * (mask[b, n] - target[b, n]).abs()).mean() for b, n in ((0, 1), (1, 1), (2, 0))
    )
    torch.testing.assert_close(got, want / 3)
    (gradient,) = torch.autograd.grad(got, output.logits, retain_graph=True)
    assert gradient[~counted].abs().max() == 0
    assert gradient[counted].abs().min() > 0
    got.backward()
    leaves = [taught.logits] if taught.embedding is None else [taught.embedding, taught.mask_features]
    assert all(t.grad is None for t in leaves)
    assert mask_distillation(output, taught, spectrograms, counted=torch.zeros_like(counted)).item() == 0


def test_both_mask_losses_in_one_call():
    output, spectrograms = masks()[1], analysis()
    taught, mixtures, counted = masks(batch=2, seed=7)[1], torch.tensor([2, 0]), CLASSES.view(3, 2) < 5
    got = mask_losses(output, spectrograms, teacher_output=taught, mixtures=mixtures, counted=counted)
    assert got.separation.item() == separation_loss(output, spectrograms).item()
    mask, target = output.logits.sigmoid(), taught.logits.sigmoid()
    want = sum(
        (spectrograms.weight[b, 0] * (mask[b, n] - target[m, n]).abs()).mean() for b, m, n in ((2, 0, 0), (0, 1, 1))
    )
    torch.testing.assert_close(got.distillation, want / 2)
    alone = mask_distillation(output, taught, spectrograms, mixtures=mixtures, counted=counted)
    assert got.distillation.item() == alone.item()
    whole = mask_losses(output, spectrograms, teacher_output=masks(seed=7)[1])
    assert whole.distillation.item() == mask_distillation(output, masks(seed=7)[1], spectrograms).item() > 0
    assert mask_losses(output, spectrograms).distillation.item() == 0


def test_logits_are_formed_once_and_not_lost_to_a_look_without_gradients():
    factors = masks()[1]
    output = MaskOutput(audio=factors.audio, embedding=factors.embedding, mask_features=factors.mask_features)
    with torch.no_grad():
        assert not output.logits.requires_grad
    assert output.logits.requires_grad
    assert output.logits is output.logits
    with pytest.raises(ValueError, match="logits, or embedding and mask_features"):
        MaskOutput(audio=torch.zeros(1, 2, 3), embedding=torch.zeros(1, 2, 3))


@pytest.mark.parametrize("names", [NAMES, ("audio", "object"), ("motion", "audio")])
def test_cross_sdc_rows(names):
    """Z = [N by the student; O by the student; O by the teacher], and nothing flows into the teacher."""
    student, teacher = embeddings(6, 0, names), embeddings(3, 10, names)
    got = cross_sdc(student, CLASSES, VIDEOS, teacher=teacher, teacher_rows_index=OLD)
    order = torch.cat((NEW, OLD, OLD))
    z = [torch.cat((student[k][NEW], student[k][OLD], teacher[k].detach())) for k in NAMES if k in names]
    want = similarity_distillation_reference(z, VIDEOS[order], CLASSES[order])
    gradients = torch.autograd.grad(0.1 * got[0] + 0.3 * got[1], list(student.values()), retain_graph=True)
    wanted = torch.autograd.grad(0.1 * want[0] + 0.3 * want[1], list(student.values()))
    for one, other in zip((*got, *gradients), (*want, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert all(
        g is None
        for g in torch.autograd.grad(
            got[0] + got[1], list(teacher.values()), allow_unused=True, materialize_grads=False
        )
    )


def test_without_a_teacher_the_rows_are_the_students():
    student = embeddings(6, 0)
    got = cross_sdc(student, CLASSES, VIDEOS)
    want = similarity_distillation_reference([student[k] for k in NAMES], VIDEOS, CLASSES)
    torch.testing.assert_close(torch.stack(got), torch.stack(want))
    empty = {k: v[:0] for k, v in embeddings(3, 1).items()}
    none_old = cross_sdc(student, CLASSES, VIDEOS, teacher=empty, teacher_rows_index=OLD[:0])
    torch.testing.assert_close(torch.stack(none_old), torch.stack(got))


def test_only_the_anchors_and_candidates_of_the_student_move():
    """A student that already equals its teacher is still pulled together across modalities."""
    student = embeddings(6, 0)
    same = {k: v.detach()[OLD] for k, v in student.items()}
    instance, class_ = cross_sdc(student, CLASSES, VIDEOS, teacher=same, teacher_rows_index=OLD)
    (instance + class_).backward()
    assert all(v.grad.abs().amax(dim=1).min() > 0 for v in student.values())


def test_temperature():
    student = embeddings(6, 0)
    got = cross_sdc(student, CLASSES, VIDEOS, temperature=0.1)
    want = similarity_distillation_reference([student[k] for k in NAMES], VIDEOS, CLASSES, temperature=0.1)
    torch.testing.assert_close(got, want)
    assert got[0].item() != cross_sdc(student, CLASSES, VIDEOS)[0].item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {"audio": torch.ones(6, 2)}}, "needs two or more, got audio"),
        ({"student": {"audio": torch.ones(6, 2), "smell": torch.ones(6, 2)}}, "no modality 'smell'"),
        ({"teacher": {"audio": torch.ones(3, 8)}}, "teacher has the modalities audio"),
        ({"teacher_rows_index": None}, "without teacher_rows_index"),
        ({"teacher_rows_index": OLD[:2]}, "have 3 rows for 2 indices"),
    ],
)
def test_wrong_input(change, message):
    arguments = {
        "student": embeddings(6, 0),
        "class_ids": CLASSES,
        "instance_ids": VIDEOS,
        "teacher": embeddings(3, 1),
        "teacher_rows_index": OLD,
        **change,
    }
    with pytest.raises(ConfigError, match=message):
        cross_sdc(**arguments)


def test_attention_distillation_by_hand():
    attention = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]], requires_grad=True)
    taught = torch.tensor([[[0.75, 0.25, 0.0], [0.25, 0.5, 0.25]]], requires_grad=True)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # 0.130812
    second = 0.25 * math.log(0.5) + 0.5 * math.log(2)
    both = attention_distillation(attention, taught)
    assert both.item() == pytest.approx((first + second) / 2)
    one = attention_distillation(attention, taught, counted=torch.tensor([[True, False]]))
    assert one.item() == pytest.approx(first) == pytest.approx(0.130812, abs=1e-6)
    (gradient,) = torch.autograd.grad(one, attention, retain_graph=True)
    # -taught / attention; the step of weight 0 in both has none
    torch.testing.assert_close(gradient, torch.tensor([[[-1.5, -0.5, 0.0], [0.0, 0.0, 0.0]]]))
    assert torch.autograd.grad(both, taught, allow_unused=True) == (None,)
    assert attention_distillation(attention, taught, counted=torch.zeros(1, 2, dtype=torch.bool)).item() == 0
    assert attention_distillation(taught, taught).item() == pytest.approx(0, abs=1e-7)


def test_attention_distillation_survives_an_underflow():
    attention = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    loss = attention_distillation(attention, torch.tensor([[[0.5, 0.5]]]))
    loss.backward()
    assert loss.isfinite()
    assert attention.grad.isfinite().all()


def test_audio_visual_contrast_by_hand():
    """Two rows, A = V = I, temperature 1: log softmax is -ln(1 + 1/e) on the diagonal and 1 less beside it."""
    eye = torch.eye(2, dtype=torch.float64)
    hit = -math.log(1 + 1 / math.e)
    ids, same = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    for visual in ({"object": eye}, {"motion": eye}, {"object": eye, "motion": eye}):
        instance, class_ = audio_visual_contrast({"audio": eye, **visual}, same, ids, temperature=1.0)
        assert instance.item() == pytest.approx(-hit)
        assert class_.item() == pytest.approx(-(2 * hit + 2 * (hit - 1)) / 4)  # by n^2, not by the positives
    # both visual partners count half
    apart = {"audio": eye, "object": eye, "motion": eye.flip(0)}
    instance, _ = audio_visual_contrast(apart, same, ids, temperature=1.0)
    assert instance.item() == pytest.approx(-(hit + (hit - 1)) / 2)


def test_audio_visual_contrast_goes_one_way_and_object_and_motion_do_not_meet():
    x = embeddings(6, 0)
    got = audio_visual_contrast(x, CLASSES, VIDEOS)
    want = []
    for ids, average in ((VIDEOS, True), (CLASSES, False)):
        positives = ids[:, None] == ids[None, :]
        each = [
            cross_entropy(normalise(x["audio"]) @ normalise(x[name]).T / 0.05, positives, average=average)
            for name in ("motion", "object")
        ]
        want.append(sum(each) / 2)
    gradients = torch.autograd.grad(0.1 * got[0] + got[1], list(x.values()), retain_graph=True)
    wanted = torch.autograd.grad(0.1 * want[0] + want[1], list(x.values()))
    for one, other in zip((*got, *gradients), (*want, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    with pytest.raises(ConfigError, match="no motion or object"):
        audio_visual_contrast({"audio": x["audio"]}, CLASSES, VIDEOS)


def test_the_published_contrastive_case():
    """Three rows and modalities in two dimensions, worked out by hand: 1.08276 and, with one class for all, 6.59387."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    m = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    o = torch.tensor([[0.8, 0.6], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    instance, class_ = cross_sdc(
        {"audio": a, "motion": m, "object": o}, torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 1])
    )
    assert instance.item() == pytest.approx(1.08276, abs=1e-5)
    assert class_.item() == pytest.approx(6.59387, abs=1e-5)


def test_a_missing_modality_drops_its_pairs_and_no_share_of_the_others():
    student = embeddings(6, 0, ("audio", "object"))
    got = cross_sdc(student, CLASSES, VIDEOS)
    scores = normalise(student["audio"]) @ normalise(student["object"]).T / 0.05
    for term, ids in zip(got, (VIDEOS, CLASSES), strict=True):
        positives = ids[:, None] == ids[None, :]
        pair = (cross_entropy(scores, positives) + cross_entropy(scores.T, positives)) / 2
        torch.testing.assert_close(term, pair, rtol=1e-10, atol=1e-10)


def test_within_compares_each_modality_with_itself():
    student, teacher = embeddings(6, 0), embeddings(3, 10)
    got = cross_sdc(student, CLASSES, VIDEOS, teacher=teacher, teacher_rows_index=OLD, modality_pairs="within")
    order = torch.cat((torch.arange(6), OLD))
    for term, ids in zip(got, (VIDEOS[order], CLASSES[order]), strict=True):
        positives = ids[:, None] == ids[None, :]
        each = []
        for name in NAMES:
            rows = normalise(torch.cat((student[name], teacher[name])))
            each.append(cross_entropy(rows @ rows.T / 0.05, positives, include_self=False))
        torch.testing.assert_close(term, sum(each) / 3, rtol=1e-10, atol=1e-10)
    alone = cross_sdc({"audio": student["audio"]}, CLASSES, VIDEOS, modality_pairs="within")
    assert all(term.isfinite() for term in alone)


def test_within_by_hand():
    """Rows e1, e1, e2 at temperature 1; the first two are positives, the third has none and is skipped."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1])
    instance, _ = cross_sdc({"audio": x, "object": x}, ids, ids, temperature=1.0, modality_pairs="within")
    assert instance.item() == pytest.approx(math.log(1 + 1 / math.e))  # -(1 - ln(e + 1)), the diagonal left out

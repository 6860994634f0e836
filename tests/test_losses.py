"""The losses against ContAV-Sep's equations written out slot by slot."""

from __future__ import annotations

import pytest
import torch

from avsep.errors import ConfigError
from avsep.kernels.similarity_distillation.reference import similarity_distillation_reference
from avsep.losses import CrossSDC, cross_sdc, mask_distillation, mask_losses, separation_loss
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


@pytest.mark.parametrize("kind", [0, 1])
def test_separation_loss(kind):
    output, spectrograms = masks()[kind], analysis()
    mask, ratio, weight = output.logits.sigmoid(), spectrograms.ratio, spectrograms.weight[:, 0]
    each = [(weight * (mask[:, n] - ratio[:, n]).abs()).mean(dim=(1, 2)) for n in range(2)]
    torch.testing.assert_close(separation_loss(output, spectrograms), 0.5 * (each[0] + each[1]).mean())
    slots = torch.tensor([[True, False], [False, False], [True, True]])
    chosen = (each[0][0] + each[0][2] + each[1][2]) / 3
    torch.testing.assert_close(separation_loss(output, spectrograms, slots=slots), chosen)


@pytest.mark.parametrize("kind", [0, 1])
def test_mask_distillation_is_normalised_by_the_old_slots(kind):
    output, taught, spectrograms = masks()[kind], masks(seed=7)[1 - kind], analysis()
    slots = CLASSES.view(3, 2) < 5
    got = mask_distillation(output, taught, spectrograms, slots=slots)
    mask, target = output.logits.sigmoid(), taught.logits.sigmoid()
    want = sum(
        (spectrograms.weight[b, 0] * (mask[b, n] - target[b, n]).abs()).mean() for b, n in ((0, 1), (1, 1), (2, 0))
    )
    torch.testing.assert_close(got, want / 3)
    (gradient,) = torch.autograd.grad(got, output.logits, retain_graph=True)
    assert gradient[~slots].abs().max() == 0
    assert gradient[slots].abs().min() > 0
    got.backward()
    leaves = [taught.logits] if taught.embedding is None else [taught.embedding, taught.mask_features]
    assert all(t.grad is None for t in leaves)
    assert mask_distillation(output, taught, spectrograms, slots=torch.zeros_like(slots)).item() == 0


def test_both_mask_losses_in_one_call():
    output, spectrograms = masks()[1], analysis()
    taught, mixtures, slots = masks(batch=2, seed=7)[1], torch.tensor([2, 0]), CLASSES.view(3, 2) < 5
    got = mask_losses(output, spectrograms, taught=taught, mixtures=mixtures, slots=slots)
    assert got.separation.item() == separation_loss(output, spectrograms).item()
    mask, target = output.logits.sigmoid(), taught.logits.sigmoid()
    want = sum(
        (spectrograms.weight[b, 0] * (mask[b, n] - target[m, n]).abs()).mean() for b, m, n in ((2, 0, 0), (0, 1, 1))
    )
    torch.testing.assert_close(got.distillation, want / 2)
    alone = mask_distillation(output, taught, spectrograms, mixtures=mixtures, slots=slots)
    assert got.distillation.item() == alone.item()
    whole = mask_losses(output, spectrograms, taught=masks(seed=7)[1])
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
    wanted = torch.autograd.grad(want[2], list(student.values()))
    for one, other in zip((*got, *gradients), (*want[:2], *wanted), strict=True):
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
    torch.testing.assert_close(torch.stack(got), torch.stack(want[:2]))
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


def test_module_form():
    student, teacher = embeddings(6, 0), embeddings(3, 10)
    got = CrossSDC(temperature=0.1)(student, CLASSES, VIDEOS, teacher, OLD)
    want = cross_sdc(student, CLASSES, VIDEOS, teacher=teacher, teacher_rows_index=OLD, temperature=0.1)
    torch.testing.assert_close(got, want)
    assert got[0].item() != cross_sdc(student, CLASSES, VIDEOS, teacher=teacher, teacher_rows_index=OLD)[0].item()


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

"""One training step for tests of strategies: a student of four classes, a teacher of two, and three mixtures."""

from __future__ import annotations

import dataclasses

import torch

from avsep import build_separator
from avsep.strategies.base import Step
from avsep.types import Batch, MaskOutput, Prediction, Spectrograms, VisualFeatures, VisualInputs
from support.tones import TINY_FRONT_END, TINY_SEPARATOR

PARTS = {k: v for k, v in TINY_SEPARATOR.items() if k != "front_end"}
# mixtures: old + new, new + new, old + old of one video; classes 0-1 are old, 2-3 new
CLASS_IDS = torch.tensor([[1, 3], [2, 3], [0, 0]])
VIDEO_IDS = torch.tensor([[7, 1], [2, 3], [9, 9]])


def student_and_teacher(**parts):
    parts = {**PARTS, **parts}
    student = build_separator(**parts, front_end=TINY_FRONT_END, num_classes=4, seed=1).train()
    teacher = build_separator(**parts, front_end=TINY_FRONT_END, num_classes=2, seed=2).requires_grad_(False).eval()
    return student, teacher


def make_step(student, num_old=2, class_ids=CLASS_IDS, rows=slice(None), video_ids=VIDEO_IDS):
    rng = torch.Generator().manual_seed(0)
    sources = 0.2 * torch.randn(3, 2, TINY_FRONT_END["clip_samples"], generator=rng)[rows]
    frames = torch.randint(0, 255, (3, 2, 3, 3, 32, 32), dtype=torch.uint8, generator=rng)[rows]
    motion = torch.randint(0, 255, (3, 2, 6, 1, 16, 16), dtype=torch.uint8, generator=rng)[rows]
    batch = Batch(
        sources=sources,
        class_ids=class_ids[rows],
        video_ids=video_ids[rows],
        is_memory=class_ids[rows] < num_old,
        visual=VisualInputs(frames, None if student.motion_encoder is None else motion),
    )
    spectrograms = student.analyse(batch.sources)
    visual = student.encode_visual(batch.visual)
    audio = student.audio_encoder(spectrograms.network_input)
    output = student.mask_decoder(audio, visual, batch.class_ids)
    return Step(batch, spectrograms, audio, visual, output, num_old, student)


class GivenData:
    """In the place of a task's data: these batches, whatever is asked for; ``asked`` are (count, batch size)."""

    def __init__(self, batches):
        self._batches = batches
        self.asked = []

    def batches(self, count, *, batch_size=1):
        self.asked.append((count, batch_size))
        return iter(self._batches)


def with_teacher(step, teacher):
    """The step as the learner makes it where there is a teacher."""
    return dataclasses.replace(step, teacher=teacher)


def gradients(term, student):
    """{name: gradient} of a term by every parameter of the student that it reaches with something other than 0."""
    names, parameters = zip(*student.named_parameters(), strict=True)
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None and bool((g != 0).any())}


def literal_pod(x, scales=(1, 2, 4)):
    """PLOP's embedding, cell by cell."""
    squares = x.double() ** 2
    height, width = (n // 4 * 4 for n in x.shape[-2:])
    parts = []
    for s in scales:
        h, w = height // s, width // s
        for i in range(s):
            for j in range(s):
                cell = squares[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w]
                parts += [cell.mean(dim=3).flatten(1), cell.mean(dim=2).flatten(1)]
    return torch.cat(parts, dim=1)


class GivenMasks:
    """In the place of a teacher: one whose masks [B, N, F, T] of a batch are given."""

    def __init__(self, masks):
        self._logits = torch.logit(masks)

    def train(self, mode):
        assert not mode  # as a frozen teacher stays

    def predict(self, batch, *, class_ids, spectrograms, mixtures=None):
        output = MaskOutput(audio=torch.zeros(0), logits=self._logits if mixtures is None else self._logits[mixtures])
        return Prediction(spectrograms, None, VisualFeatures(), output)


def step_of_masks(masks, targets, class_ids, num_old, teacher_masks=None):
    """A step with these masks and ratio masks [B, N, F, T] and weight 1, and its logits, which want a gradient."""
    logits = torch.logit(masks).requires_grad_()
    spectrograms = Spectrograms(
        torch.zeros_like(targets[:, :1]), torch.ones_like(targets[:, :1]), targets, torch.zeros(len(targets), 1, 1)
    )
    batch = Batch(torch.zeros(*class_ids.shape, 4), class_ids, class_ids, class_ids < num_old)
    output = MaskOutput(audio=torch.zeros(0), logits=logits)
    teacher = None if teacher_masks is None else GivenMasks(teacher_masks)
    return Step(batch, spectrograms, None, VisualFeatures(), output, num_old, None, teacher), logits

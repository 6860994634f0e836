"""Reference: what old classes would answer to made-up notes is kept; needs no recording and no exemplar."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from avsep.registry import STRATEGIES
from avsep.strategies.slot_span import SlotSpan

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.strategies.base import Step
    from avsep.types import AudioFeatures, Spectrograms

__all__ = ["Reference", "harmonic_tones", "random_notes"]

_HARMONICS = 12
_LOWEST_HZ, _OCTAVES = 55.0, 5.0
_NOTE_S = (0.15, 1.2)


@STRATEGIES.register(
    "reference",
    source="after Zheng et al., ZSCL, ICCV 2023: distillation on reference data; the questions are those of slot_span",
    example={"mixtures": 16},
)
class Reference(SlotSpan):
    """Distil the masks of old classes on mixtures of made-up notes; needs no exemplars and no recordings.

    L = L_sep + ``weight`` mean w |M_c - M'_c|: as many mixtures as the batch has, each of two lines of harmonic notes
    (:func:`random_notes`), are heard by student and teacher, and both are asked for ``classes`` different old classes
    c, on one condition as ``slot_span`` makes it (``conditioning``). What an old class answers is then held over notes
    of every height and colour, and not only over the sounds of the new classes. The notes are made anew in every step
    and take no bytes; they are drawn by PyTorch's global generator. Encoder and decoder hear them in evaluation mode,
    so that no running statistics do. A step takes about as long as two.

    It brings in what a harmonic note is, which no other method here is told: compare it with that in mind.
    """

    _name = "reference"
    differs = (
        "ZSCL distils the similarities of images and texts of another data set, which it has to keep; here masks are "
        "distilled, on notes that are made up."
    )

    def _heard(self, step: Step) -> tuple[Spectrograms, AudioFeatures, AudioFeatures]:
        front_end = step.student.spec.front_end
        mixtures = len(step.batch.class_ids)
        # every rank draws for all
        notes = random_notes(step.ranks.world * mixtures * 2, front_end.clip_samples, front_end.sample_rate_hz)
        sources = step.ranks.part(notes.reshape(-1, 2, front_end.clip_samples)) / 2  # [B, 2, L]
        with torch.no_grad():
            spectrograms = step.student.analyse(sources.to(step.batch.sources))
        encoder = step.student.audio_encoder
        training = encoder.training
        encoder.eval()
        try:
            heard = encoder(spectrograms.network_input)
        finally:
            encoder.train(training)
        assert step.teacher is not None
        with torch.no_grad():
            return spectrograms, heard, step.teacher.eval().audio_encoder(spectrograms.network_input)


def random_notes(count: int, samples: int, sample_rate_hz: float) -> Tensor:
    """[count, samples] lines of harmonic notes, each of a peak of 0.5, drawn by PyTorch's global generator.

    Of each line: notes of 0.15 to 1.2 s between 55 Hz and 1760 Hz, struck or held; the levels of 12 harmonics fall with
    a power of their number between 0.5 and 2, those of even number are left out in one of four; a vibrato of at most
    a third of a semitone.
    """
    shortest, longest = (max(1, round(s * sample_rate_hz)) for s in _NOTE_S)
    most = samples // shortest + 1
    lengths = shortest + ((longest - shortest) * torch.rand(count, most)).long()  # [count, notes]
    ends = lengths.cumsum(dim=1)
    at = torch.searchsorted(ends, torch.arange(samples).expand(count, samples).contiguous(), right=True)
    at = at.clamp(max=most - 1)  # [count, L] which note sounds
    since = torch.arange(samples) - (ends - lengths).gather(1, at)
    seconds = since / sample_rate_hz
    pitches = _LOWEST_HZ * 2 ** (_OCTAVES * torch.rand(count, most))
    rate_hz, depth = 4 + 3 * torch.rand(count, 1), (2 ** (1 / 36) - 1) * torch.rand(count, 1)
    vibrato = 1 + depth * torch.sin(2 * math.pi * rate_hz * torch.arange(samples) / sample_rate_hz)
    numbers = torch.arange(1, _HARMONICS + 1)
    levels = numbers ** -(0.5 + 1.5 * torch.rand(count, 1))  # [count, harmonics]
    hollow = torch.rand(count, 1) < 0.25
    levels = levels.masked_fill(hollow & (numbers % 2 == 0), 0.0)
    fall = torch.rand(count, 1).round() * 6 * torch.rand(count, 1)  # per second; 0 where notes are held
    left = (lengths.gather(1, at) - since) / sample_rate_hz
    envelope = (seconds / 0.01).clamp(max=1) * (left / 0.01).clamp(max=1) * torch.exp(-fall * seconds)
    found = envelope * harmonic_tones(pitches.gather(1, at) * vibrato, levels, sample_rate_hz)
    return 0.5 * found / found.abs().amax(dim=1, keepdim=True).clamp(min=1e-8)


def harmonic_tones(frequency_hz: Tensor, levels: Tensor, sample_rate_hz: float) -> Tensor:
    """sum_h levels_h sin(h phase) [S, L], the phase being the integral of ``frequency_hz`` [S, L]; ``levels`` [S, H].

    A harmonic is silent where it lies above half the sample rate.
    """
    phase = 2 * math.pi * (frequency_hz.double() / sample_rate_hz).cumsum(dim=1)
    total = torch.zeros_like(frequency_hz)
    for number, level in enumerate(levels.unbind(dim=1), start=1):
        audible = number * frequency_hz < sample_rate_hz / 2
        total += level[:, None] * audible * torch.sin(number * phase).to(total)
    return total

"""Reference: made-up notes, and what both models are asked about them."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from avsep.evaluation.budget import estimate
from avsep.kernels.mask_head.reference import mask_l1_reference
from avsep.registry import STRATEGIES
from avsep.runs.folder import RunFolder
from avsep.strategies.reference import harmonic_tones, random_notes
from support.continual_runs import trained
from support.strategy_steps import gradients, make_step, student_and_teacher, with_teacher

STATE = {
    "object": torch.linspace(-1, 1, 32).reshape(2, 16).half(),
    "object_deviation": torch.zeros(2, 16).half(),
    "counts": torch.tensor([3, 5]),
}


@pytest.fixture
def asked():
    """Student, teacher, a step of theirs and the strategy with statistics of the old classes."""
    student, teacher = student_and_teacher()
    step = with_teacher(make_step(student), teacher)
    strategy = STRATEGIES.create("reference", {"classes": 1, "weight": 0.5})
    strategy.load_state_dict({**STATE, "motion": torch.zeros(2, *step.visual.motion.shape[2:]).half()})
    return student, teacher, step, strategy


def test_harmonics_by_hand():
    """100 Hz at 800 samples a second: the third harmonic is heard, the fourth lies at half the rate and is not."""
    found = harmonic_tones(torch.full((1, 80), 100.0), torch.tensor([[1.0, 0.5, 0.25, 7.0]]), 800.0)
    phase = 2 * math.pi * torch.arange(1, 81, dtype=torch.float64) / 8
    want = phase.sin() + 0.5 * (2 * phase).sin() + 0.25 * (3 * phase).sin()
    torch.testing.assert_close(found[0], want.float(), rtol=0, atol=1e-5)


def test_notes_are_drawn_anew_and_again_from_the_same_seed():
    torch.manual_seed(3)
    first, second = random_notes(6, 16_000, 8_000.0), random_notes(6, 16_000, 8_000.0)
    torch.manual_seed(3)
    assert torch.equal(random_notes(6, 16_000, 8_000.0), first)
    assert not torch.equal(first, second)
    assert first.shape == (6, 16_000)
    torch.testing.assert_close(first.abs().amax(dim=1), torch.full((6,), 0.5))
    spectra = torch.fft.rfft(torch.cat((first, second))).abs()  # half a hertz a bin
    for spectrum in spectra:
        share = spectrum.square().sort(descending=True).values[:400].sum() / spectrum.square().sum()
        assert share > 0.7  # lines, not noise: of 8,001 bins these would have a twentieth
    assert len({int(spectrum.argmax()) for spectrum in spectra}) > 8


def test_the_levels_of_harmonics_fall_and_even_ones_may_be_missing(monkeypatch):
    found = {}

    def tones(frequency_hz, levels, sample_rate_hz):
        found.update(frequency_hz=frequency_hz, levels=levels)
        return harmonic_tones(frequency_hz, levels, sample_rate_hz)

    monkeypatch.setattr("avsep.strategies.reference.harmonic_tones", tones)
    torch.manual_seed(0)
    random_notes(200, 800, 8_000.0)
    levels, frequency_hz = found["levels"], found["frequency_hz"]
    assert bool((levels[:, 0] == 1).all())
    hollow = levels[:, 1] == 0
    assert 0.15 < hollow.float().mean() < 0.35
    assert bool((levels[hollow][:, 1::2] == 0).all())
    assert bool((levels[~hollow].diff(dim=1) < 0).all())
    assert 53 < frequency_hz.min() < 70
    assert 1500 < frequency_hz.max() < 1800


def test_both_hear_the_same_notes_and_not_the_batch(asked, monkeypatch):
    student, teacher, step, strategy = asked
    heard, answers = [], []
    for separator in (student, teacher):
        encode, decode = separator.audio_encoder.forward, separator.decode

        def hear(x, encode=encode, encoder=separator.audio_encoder):
            heard.append((x, encoder.training))
            return encode(x)

        def answer(audio, visual, class_ids, decode=decode, **how):
            output = decode(audio, visual, class_ids, **how)
            answers.append((visual, class_ids, output))
            return output

        monkeypatch.setattr(separator.audio_encoder, "forward", hear)
        monkeypatch.setattr(separator, "decode", answer)
    torch.manual_seed(5)
    term = strategy.loss(step)["span"]
    (own, own_training), (theirs, _) = heard
    assert torch.equal(own, theirs)
    assert own.shape == step.spectrograms.network_input.shape
    assert not torch.equal(own, step.spectrograms.network_input)
    assert not own_training
    assert student.audio_encoder.training
    (condition, classes, taught), (condition_too, classes_too, answered) = answers
    assert torch.equal(classes, classes_too)
    assert torch.equal(condition.object, condition_too.object)
    torch.manual_seed(5)
    strategy._drawn_classes(step)
    spectrograms, *_ = strategy._heard(step)
    assert not torch.equal(spectrograms.weight, step.spectrograms.weight)
    want = 0.5 * mask_l1_reference(answered.logits, taught.logits, spectrograms.weight, target_is_logits=True)
    torch.testing.assert_close(term, want)
    assert any(name.startswith("audio_encoder") for name in gradients(term, student))


def test_an_unchanged_student_has_nothing_to_give_back(asked):
    student, _, step, strategy = asked
    before = {name: value.clone() for name, value in student.named_buffers()}
    assert strategy.loss(step)["span"].item() > 1e-4
    same = dataclasses.replace(step, teacher=copy.deepcopy(student).eval())
    assert strategy.loss(same)["span"].item() < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in student.named_buffers())


def test_it_keeps_what_slot_span_keeps(tone_store):
    run = trained(tone_store, ("reference", {"mixtures": 16}), "none")
    kept = RunFolder(run)
    stored = (run / "tasks" / "00" / "strategy.safetensors").stat().st_size
    assert 0 < estimate(kept.spec(), tone_store, task=0).strategy_state < stored

"""PLOP: which maps and sources it compares, its weights, and what it does to a run."""

from __future__ import annotations

import math

import pytest
import torch

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.types import VisualInputs
from support.continual_runs import RUNS, differing, resume_killed, train, weights
from support.strategy_steps import literal_pod, make_step, student_and_teacher, with_teacher

TAPS = ("e3", "e4", "e5", "d4", "d2", "F")


def _pod(x, y):
    return float(torch.linalg.vector_norm(literal_pod(x) - literal_pod(y), dim=1).mean())


def test_it_is_the_literal_sum_over_maps_and_old_sources(separators):
    student, teacher = separators
    step = make_step(student)
    terms = STRATEGIES.create("plop").loss(with_teacher(step, teacher))
    audio = teacher.audio_encoder(step.spectrograms.network_input)
    own, taught = student.taps(step.audio, step.output), teacher.taps(audio)
    assert tuple(own) == TAPS
    scale = math.sqrt(4 / 2) / 7
    expected = 0.01 * scale * sum(_pod(own[name].detach(), taught[name]) for name in TAPS)
    assert terms["features"].item() == pytest.approx(expected, rel=1e-4)

    # old sources: the first of mixture 0 and both of mixture 2
    visual = teacher.encode_visual(step.batch.visual)
    taught = teacher.mask_decoder(audio, visual, torch.tensor([[1, 0], [0, 0], [0, 0]])).logits
    sources = [(0, 0), (2, 0), (2, 1)]
    old, theirs = (torch.stack([m[b, n] for b, n in sources])[:, None] for m in (step.output.logits.detach(), taught))
    assert terms["logits"].item() == pytest.approx(0.0005 * scale * _pod(old, theirs), rel=1e-4)
    assert terms["logits"] > 0


def test_masks_that_do_not_depend_on_the_class_are_compared_in_all_sources():
    """Co-Separation: the way up is the decoder's, with maps a source, and the teacher answers for new classes too."""
    student, teacher = student_and_teacher(
        audio_encoder=("conv7", {"base_channels": 4}),
        motion_encoder=None,
        mask_decoder=("conditioned_unet", {"dim": 16}),
    )
    step = make_step(student)
    terms = STRATEGIES.create("plop").loss(with_teacher(step, teacher))
    audio = teacher.audio_encoder(step.spectrograms.network_input)
    taught = teacher.mask_decoder(
        audio, teacher.encode_visual(VisualInputs(step.batch.visual.object)), step.batch.class_ids
    )
    scale = math.sqrt(4 / 2) / 6
    pairs = [(step.audio.skips[k - 1], audio.skips[k - 1]) for k in (3, 4, 5)]
    pairs += [(step.output.maps[name].flatten(0, 1), taught.maps[name].flatten(0, 1)) for name in ("d4", "d2")]
    assert [len(own) for own, _ in pairs] == [3, 3, 3, 6, 6]
    expected = 0.01 * scale * sum(_pod(own.detach(), theirs) for own, theirs in pairs)
    assert terms["features"].item() == pytest.approx(expected, rel=1e-4)
    logits, theirs = (output.logits.flatten(0, 1)[:, None] for output in (step.output, taught))
    assert terms["logits"].item() == pytest.approx(0.0005 * scale * _pod(logits.detach(), theirs), rel=1e-4)


def test_every_map_gets_a_gradient_and_the_teacher_none(separators):
    student, teacher = separators
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    step = make_step(student)
    terms = STRATEGIES.create("plop").loss(with_teacher(step, teacher))
    maps = student.taps(step.audio, step.output)
    gradients = torch.autograd.grad(terms["features"], list(maps.values()), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in gradients)
    (logits,) = torch.autograd.grad(terms["logits"], step.output.logits)
    assert [(b, n) for b in range(3) for n in range(2) if logits[b, n].abs().sum() > 0] == [(0, 0), (2, 0), (2, 1)]
    assert not teacher.training
    assert differing(teacher.state_dict(), before) == []


def test_the_weight_rises_with_the_classes(separators):
    """sqrt(|C_0:t| / |C_t|): of 4 classes with 2 and with 1 of them new."""
    strategy = STRATEGIES.create("plop", {"weight_logits": 0.0})
    ids = torch.tensor([[1, 3], [1, 3], [0, 0]])
    two, one = (
        strategy.loss(with_teacher(make_step(separators[0], n, ids), separators[1]))["features"] for n in (2, 3)
    )
    torch.testing.assert_close(one / two, torch.tensor(2.0 / math.sqrt(2.0)))


def test_terms_by_task_batch_and_switch(separators):
    student, teacher = separators
    plop = STRATEGIES.create("plop")
    assert set(plop.loss(with_teacher(make_step(student, num_old=0), None))) == {"separation"}
    assert set(plop.loss(with_teacher(make_step(student, rows=slice(1, 2)), teacher))) == {"separation", "features"}
    step = make_step(student)
    for params, terms in (
        ({"weight_features": 0.0}, {"separation", "logits"}),
        ({"weight_logits": 0.0}, {"separation", "features"}),
        ({"weight_features": 0.0, "weight_logits": 0.0}, {"separation"}),
    ):
        strategy = STRATEGIES.create("plop", params)
        assert set(strategy.loss(with_teacher(step, teacher))) == terms
        assert strategy.needs_teacher == (len(terms) > 1)
    assert plop.first_task() == {}


def test_wrong_settings_and_separators(separators, monkeypatch):
    with pytest.raises(ConfigError, match="weight_features must be 0 or more, got -1"):
        STRATEGIES.create("plop", {"weight_features": -1.0})
    student = separators[0]
    STRATEGIES.create("plop").check(student)
    monkeypatch.setattr("avsep.encoders.audio.unet7.UNet7.tap_names", ())
    with pytest.raises(ConfigError, match=r"audio encoder 'unet7' has no taps, .* with taps \(causal_unet, conv7\)"):
        STRATEGIES.create("plop").check(student)


@pytest.mark.parametrize(("separator", "memory"), RUNS)
def test_in_a_run_it_changes_the_weights_and_resumes(separator, memory, tone_store, tmp_path):
    run = train(tone_store, tmp_path / "run", "plop", memory, separator=separator)
    nothing = ("plop", {"weight_features": 0.0, "weight_logits": 0.0})
    without = train(tone_store, tmp_path / "without", nothing, memory, separator=separator)
    assert differing(weights(run), weights(without))
    resumed = resume_killed(tone_store, tmp_path / "run", "plop", memory, separator=separator)
    assert differing(weights(run), weights(resumed)) == []

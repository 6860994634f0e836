"""Slot span: what both models are asked, on which conditions, and what the answers hold of the mask features."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from avsep.errors import ConfigError
from avsep.evaluation.budget import estimate
from avsep.kernels.mask_head.reference import mask_l1_reference
from avsep.registry import STRATEGIES
from avsep.runs.folder import RunFolder
from avsep.strategies.base import TaskContext
from avsep.strategies.slot_span import _nearest, class_statistics, translated
from avsep.types import Task, VisualFeatures
from support.continual_runs import SEPARATORS, trained
from support.strategy_steps import GivenData, gradients, make_step, student_and_teacher, with_teacher

TASK = Task(1, ("c", "d"), ("a", "b", "c", "d"))
COSEPARATION = {k: v for k, v in SEPARATORS["coseparation"].items() if k != "front_end"} | {"motion_encoder": None}


def _strategy(step, student, teacher, **parameters):
    """The strategy in its second task, with statistics of the old classes that are drawn at random."""
    strategy = STRATEGIES.create("slot_span", parameters)
    if strategy.conditioning != "own":
        rng = torch.Generator().manual_seed(4)
        state = {
            "object": torch.randn(2, 16, generator=rng).half(),
            "object_deviation": torch.rand(2, 16, generator=rng).half(),
            "counts": torch.tensor([3, 5]),
        }
        if step.visual.motion is not None:
            state["motion"] = torch.randn(2, *step.visual.motion.shape[2:], generator=rng).half()
        strategy.load_state_dict(state)
    strategy.begin_task(TaskContext(TASK, student, teacher, GivenData([step.batch])))
    return strategy


class _Asked:
    """Records what a separator is asked beside the sources of a mixture, and its answers."""

    def __init__(self, separator, monkeypatch):
        self.calls = []
        decode = separator.decode

        def recorded(audio, visual, class_ids, **how):
            output = decode(audio, visual, class_ids, **how)
            self.calls.append((audio, visual, class_ids, output, separator.mask_decoder.training))
            return output

        monkeypatch.setattr(separator, "decode", recorded)


def _asked(step, student, teacher, monkeypatch, **parameters):
    """The strategy, its term, and the last call of each model."""
    with monkeypatch.context() as patch:
        asked = [_Asked(separator, patch) for separator in (student, teacher)]
        strategy = _strategy(step, student, teacher, **parameters)
        term = strategy.loss(with_teacher(step, teacher))["span"]
    return strategy, term, *(one.calls[-1] for one in asked)


@pytest.mark.parametrize("conditioning", ["own", "gaussian", "translated", "neighbour"])
def test_both_are_asked_for_the_same_and_their_masks_compared(conditioning, separators, monkeypatch):
    student, teacher = separators
    step = make_step(student)
    how = {"conditioning": conditioning, "classes": 5, "weight": 0.7}
    _, term, own, theirs = _asked(step, student, teacher, monkeypatch, **how)
    assert own[2].sort(dim=1).values.tolist() == [[0, 1]] * 3  # of five there are two, each once
    assert torch.equal(own[2], theirs[2])
    assert own[0] is step.audio  # the U-Net is not asked again
    assert not own[4]
    assert student.mask_decoder.training
    same = torch.equal(own[1].object, theirs[1].object) and torch.equal(own[1].motion, theirs[1].motion)
    assert same == (conditioning != "own")
    weight = step.spectrograms.weight
    want = 0.7 * mask_l1_reference(own[3].logits, theirs[3].logits, weight, target_is_logits=True)
    torch.testing.assert_close(term, want)
    got, wanted = gradients(term, student), gradients(want, student)
    assert got.keys() == wanted.keys()
    assert any(name.startswith("audio_encoder") for name in got)
    assert any(name.startswith("object_encoder") for name in got) == (conditioning == "own")
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-6)


def test_classes_that_are_not_there_share_nothing(monkeypatch):
    """A limit of the masks' sum is one of a mixture's sources: of absent classes each is asked for by itself."""
    limited, plain = {}, {}
    for found, front_end in ((limited, {"limit_mask_sum": True}), (plain, {})):
        student, teacher = student_and_teacher()
        for one in (student, teacher):
            one.spec = one.spec.model_copy(update={"front_end": one.spec.front_end.model_copy(update=front_end)})
        step = make_step(student)
        torch.manual_seed(0)
        _, found["term"], own, theirs = _asked(step, student, teacher, monkeypatch, conditioning="own")
        found["sums"] = [call[3].logits.sigmoid().sum(dim=1).max() for call in (own, theirs)]
        found["together"] = student.decode(step.audio, step.visual, own[2]).logits.sigmoid().sum(dim=1).max()
    assert limited["term"] == plain["term"]
    assert min(*limited["sums"], plain["together"]) > 1.01
    assert limited["together"] < 1.001


def test_own_sources_are_asked_on_in_turn(separators, monkeypatch):
    student, teacher = separators
    step = make_step(student)
    _, _, own, theirs = _asked(step, student, teacher, monkeypatch, conditioning="own")
    expected = teacher.encode_visual(step.batch.visual)
    for n in (0, 1):
        assert torch.equal(own[1].object[:, n], step.visual.object[:, n])
        assert torch.equal(theirs[1].object[:, n], expected.object[:, n])
        assert torch.equal(theirs[1].motion[:, n], expected.motion[:, n])


def test_gaussian_conditions_have_the_mean_and_deviation_of_their_class(separators):
    student, teacher = separators
    step = make_step(student)
    strategy = _strategy(step, student, teacher)
    state, drawn = strategy.state_dict(), torch.tensor([[0], [1], [1]])
    mean, deviation = (state[name].float()[drawn] for name in ("object", "object_deviation"))
    torch.manual_seed(0)
    conditions = [strategy._condition(step, drawn, None) for _ in range(100)]
    assert all(torch.equal(one.motion, state["motion"].float()[drawn]) for one in conditions)
    noise = torch.cat([(one.object - mean) / deviation for one in conditions])
    assert noise.mean().abs() < 0.06  # of 4,800 numbers: four of its deviations
    assert abs(noise.std() - 1) < 0.05


def test_translated_conditions_are_moved_from_class_to_class(separators, monkeypatch):
    student, teacher = separators
    step = make_step(student)
    strategy, _, own, _ = _asked(step, student, teacher, monkeypatch, conditioning="translated")
    features, state = teacher.encode_visual(step.batch.visual), strategy.state_dict()
    new = [features.object[step.batch.class_ids == c].mean(dim=0) for c in (2, 3)]
    means = torch.stack([*state["object"].float(), *new])
    for b in range(3):
        for n in range(2):
            want = features.object[b, n] - means[step.batch.class_ids[b, n]] + means[own[2][b, n]]
            torch.testing.assert_close(own[1].object[b, n], want, rtol=0, atol=2e-3)  # means in half precision


def test_neighbour_conditions_lie_on_the_near_half_of_the_way(separators, monkeypatch):
    student, teacher = separators
    step = make_step(student)
    strategy, _, own, _ = _asked(step, student, teacher, monkeypatch, conditioning="neighbour")
    state = strategy.state_dict()
    shares = []
    for b, r in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        c = int(own[2][b, r])
        a, other = state["object"][c].float(), state["object"][1 - c].float()
        share = ((own[1].object[b, r] - other) @ (a - other)) / (a - other).square().sum()
        torch.testing.assert_close(own[1].object[b, r], share * a + (1 - share) * other)
        motion = share * state["motion"][c].float() + (1 - share) * state["motion"][1 - c].float()
        torch.testing.assert_close(own[1].motion[b, r], motion)
        shares.append(float(share))
    assert 0.5 <= min(shares) < max(shares) <= 1.0


def test_the_nearest_class_of_those_that_are_known():
    means = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
    assert _nearest(means, torch.tensor([True] * 4)).tolist() == [1, 2, 1, 2]
    assert _nearest(means, torch.tensor([True, False, True, True])).tolist() == [2, 2, 0, 2]
    assert _nearest(means[:1], torch.tensor([True])).tolist() == [0]


def test_translation_by_hand():
    features, to = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 1.0])
    assert translated(features, features.mean(dim=0), to).tolist() == [[-1.0, 0.0], [1.0, 2.0]]


class _Seeing:
    """A separator of which only what it sees is given."""

    training = True

    def __init__(self, features):
        self._features = features

    def train(self, mode):
        self.training = mode

    def eval(self):
        self.training = False

    def encode_visual(self, inputs):
        assert not self.training
        return self._features


def test_statistics_by_hand():
    """Class 1 twice, class 2 once seen and once not, class 0 is of another task; one step of motion is not valid."""
    features = VisualFeatures(
        object=torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[5.0, 5.0], [7.0, 0.0]], [[9.0, 9.0], [8.0, 8.0]]]),
        motion=torch.arange(12.0).reshape(3, 2, 1, 2),
        motion_mask=torch.tensor([[[True, True], [True, False]]] + [[[True, True]] * 2] * 2),
        seen=torch.tensor([[True, True], [True, True], [False, True]]),
    )
    batch = SimpleNamespace(class_ids=torch.tensor([[1, 1], [0, 2], [2, 0]]), visual=None)
    separator = _Seeing(features)
    found = class_statistics(separator, [batch, batch], 1, 4)
    assert separator.training
    assert found["counts"].tolist() == [4, 2, 0]
    assert found["object"].tolist() == [[2.0, 4.0], [7.0, 0.0], [0.0, 0.0]]
    assert found["object_deviation"].tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert found["motion"].tolist() == [[[1.0, 1.0]], [[6.0, 7.0]], [[0.0, 0.0]]]
    assert {v.dtype for k, v in found.items() if k != "counts"} == {torch.float16}


def test_a_class_that_was_never_seen_is_not_asked_for(separators, monkeypatch):
    student, teacher = separators
    step = make_step(student)
    strategy = _strategy(step, student, teacher)
    strategy.load_state_dict({**strategy.state_dict(), "counts": torch.tensor([0, 5])})
    with monkeypatch.context() as patch:
        asked = _Asked(student, patch)
        assert "span" in strategy.loss(with_teacher(step, teacher))
    assert asked.calls[-1][2].tolist() == [[1]] * 3
    strategy.load_state_dict({**strategy.state_dict(), "counts": torch.tensor([0, 0])})
    assert list(strategy.loss(with_teacher(step, teacher))) == ["separation"]


def test_every_old_class_is_drawn_as_often(separators):
    student, _ = separators
    step = dataclasses.replace(make_step(student), num_old=5)
    strategy = STRATEGIES.create("slot_span", {"conditioning": "own", "classes": 2})
    torch.manual_seed(0)
    counts = torch.bincount(torch.cat([strategy._drawn_classes(step).flatten() for _ in range(100)]), minlength=5)
    assert counts.sum() == 600
    assert counts.min() > 80  # 120 expected


def test_what_old_classes_do_not_read_is_free(separators):
    """Two old classes on the condition of their means read two directions of the four channels of F: a shift of F along
    the others moves no old logit, one along these does."""
    teacher = copy.deepcopy(separators[0]).eval()
    student = copy.deepcopy(teacher)
    step = make_step(student)
    strategy = _strategy(step, student, teacher)
    state = strategy.state_dict()
    strategy.load_state_dict({**state, "object_deviation": torch.zeros_like(state["object_deviation"])})
    assert strategy.loss(with_teacher(step, teacher))["span"].item() < 1e-7
    drawn = torch.tensor([[0, 1]] * 3)
    with torch.no_grad():
        condition = strategy._condition(step, drawn, None)
        rows = student.decode(step.audio, condition, drawn).embedding  # [3, 2, 4]
        directions = torch.linalg.svd(rows)[2]  # of each mixture, what is read first
        for number, moves in enumerate((True, True, False, False)):
            features = step.audio.mask_features + directions[:, number, :, None, None]
            shifted = dataclasses.replace(step, audio=dataclasses.replace(step.audio, mask_features=features))
            term = strategy.loss(with_teacher(shifted, teacher))["span"].item()
            assert (term > 1e-3) if moves else (term < 1e-6), (number, term)


def test_running_statistics_see_nothing_of_it():
    student, teacher = student_and_teacher(**COSEPARATION)
    step = make_step(student)
    strategy = _strategy(step, student, teacher)
    before = {name: value.clone() for name, value in student.named_buffers()}
    assert any(name.startswith("mask_decoder") and name.endswith("running_mean") for name in before)
    assert strategy.loss(with_teacher(step, teacher))["span"].item() > 0
    assert all(torch.equal(value, before[name]) for name, value in student.named_buffers())


def test_first_task_and_weight_0_are_fine_tuning(separators):
    student, teacher = separators
    step = make_step(student)
    assert list(STRATEGIES.create("slot_span").loss(with_teacher(step, None))) == ["separation"]
    off = STRATEGIES.create("slot_span", {"weight": 0.0})
    assert list(off.loss(with_teacher(step, teacher))) == ["separation"]
    assert not off.needs_teacher
    assert off.first_task() == {}


def test_what_a_run_keeps_and_its_estimate(tone_store):
    run = trained(tone_store, ("slot_span", {"mixtures": 16}), "none")
    kept = load_file(run / "tasks" / "00" / "strategy.safetensors")
    assert {name: list(value.shape) for name, value in kept.items() if name != "motion"} == {
        "object": [2, 16],
        "object_deviation": [2, 16],
        "counts": [2],
    }
    assert int(kept["counts"].sum()) == 32
    assert not (run / "tasks" / "01" / "strategy.safetensors").exists()
    size = sum(value.numel() * value.element_size() for value in kept.values())
    assert estimate(RunFolder(run).spec(), tone_store, task=0).strategy_state == size


def test_a_later_task_adds_its_classes(separators):
    student, teacher = separators
    step = make_step(student)
    strategy = _strategy(step, student, teacher)
    old = strategy.state_dict()
    strategy.after_task(TaskContext(TASK, student, teacher, GivenData([step.batch])))
    new = strategy.state_dict()
    assert new["counts"].tolist() == [3, 5, 1, 2]
    assert all(torch.equal(new[name][:2], old[name]) for name in old)
    student.train()
    own = STRATEGIES.create("slot_span", {"conditioning": "own"})
    own.after_task(TaskContext(TASK, student, teacher, None))
    assert own.state_dict() == {}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weight": -1.0}, "weight must be 0 or more, got -1"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"mixtures": 0}, "mixtures must be at least 1, got 0"),
        ({"conditioning": "mean"}, "conditioning must be own, gaussian, translated, neighbour, got 'mean'"),
    ],
)
def test_wrong_settings(parameters, message):
    with pytest.raises(ConfigError, match=message):
        STRATEGIES.create("slot_span", parameters)


def test_own_is_refused_where_the_class_does_not_matter():
    student, _ = student_and_teacher(**COSEPARATION)
    with pytest.raises(ConfigError, match="masks of decoder 'conditioned_unet' do not depend: choose another"):
        STRATEGIES.create("slot_span", {"conditioning": "own"}).check(student)
    STRATEGIES.create("slot_span").check(student)

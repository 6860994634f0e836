"""DER++: the terms by hand, what is stored and drawn, how much it weighs, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from avsep.distributed.ranks import Ranks
from avsep.errors import ConfigError
from avsep.evaluation.budget import estimate
from avsep.kernels import mask_l1
from avsep.registry import STRATEGIES
from avsep.runs.checkpoint import flatten_state, unflatten_state
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from avsep.strategies.base import Step, TaskContext
from avsep.strategies.derpp import _batch, _stored
from avsep.types import Batch, MaskOutput, Prediction, Spectrograms, Task, VisualFeatures, VisualInputs
from support.continual_runs import trained
from support.strategy_steps import GivenData, gradients, make_step, student_and_teacher

NAMES = ("a", "b", "c", "d")


def _strategy(state=None, **parameters):
    strategy = STRATEGIES.create("derpp", parameters)
    strategy.load_state_dict(state or {})
    return strategy


class _Half:
    """A student whose masks are 1/2 everywhere, where the true ones are 0 and 1."""

    def __init__(self):
        self.asked = []

    def predict(self, batch):
        self.asked.append(batch)
        ones = torch.ones(len(batch.sources), 1, 1, 2)
        spectrograms = Spectrograms(ones, ones, ones * torch.tensor([0.0, 1.0]), ones)
        output = MaskOutput(audio=torch.zeros(0), logits=0 * ones)
        return Prediction(spectrograms, None, VisualFeatures(), output)


def _given(student, masks, class_ids=(0,)):
    n = len(class_ids)
    state = {
        "sounds": torch.tensor([[32767, -32767, 0], [0, 16384, 0]], dtype=torch.int16).expand(n, 2, 3),
        "masks": torch.tensor(masks, dtype=torch.uint8).expand(n, 1, 2),
        "class_ids": torch.tensor(class_ids),
        "video_ids": torch.arange(n),
    }
    batch = Batch(*[torch.zeros(1, 2, 3)], *[torch.zeros(1, 2, dtype=torch.int64)] * 2, torch.zeros(1, 2))
    output = MaskOutput(audio=torch.zeros(0), logits=torch.zeros(1, 2, 1, 2))
    spectrograms = Spectrograms(*[torch.ones(1, 1, 1, 2)] * 2, torch.ones(1, 2, 1, 2), torch.ones(1, 1, 1))
    return state, Step(batch, spectrograms, None, VisualFeatures(), output, 1, student)


def test_the_terms_by_hand():
    """Masks (1/2, 1/2), stored (.2, .8), true (0, 1): .3 x .3 and .5 x .5."""
    student = _Half()
    state, step = _given(student, [[51, 204]])
    terms = _strategy(state, batch_size=3).loss(step)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"separation": 0.5, "stored_masks": 0.09, "replay": 0.25}
    )
    (batch,) = student.asked  # one pass for both draws
    assert batch.sources.shape == (6, 1, 3)
    assert batch.sources[0, 0].tolist() == [1.0, -1.0, 0.0]
    assert batch.mixture[0].tolist() == pytest.approx([1.0, -1.0 + 16384 / 32767, 0.0])
    # rounded to 8 bits the specification's (.25, .75) is (64, 191) / 255
    state, step = _given(student, [[64, 191]])
    assert _strategy(state).loss(step)["stored_masks"].item() == pytest.approx(0.075, abs=4e-4)


def test_a_weight_of_0_leaves_out_its_draw():
    for weight, left in (("alpha", "replay"), ("beta", "stored_masks")):
        student = _Half()
        state, step = _given(student, [[51, 204]])
        assert list(_strategy(state, batch_size=3, **{weight: 0.0}).loss(step)) == ["separation", left]
        assert len(student.asked[0].sources) == 3
    state, step = _given(_Half(), [[51, 204]])
    assert list(_strategy(state, alpha=0.0, beta=0.0).loss(step)) == ["separation"]
    assert list(_strategy().loss(step)) == ["separation"]  # the first task


def test_draws_are_uniform_over_what_is_stored_and_leave_out_empty_places():
    torch.manual_seed(0)
    student = _Half()
    state, step = _given(student, [[51, 204]], class_ids=(0, 1, -1, 2, -1))
    strategy = _strategy(state, batch_size=100)
    for _ in range(3):
        strategy.loss(step)
    drawn = torch.cat([batch.class_ids.flatten() for batch in student.asked])
    counts = torch.bincount(drawn)
    assert len(drawn) == 600
    assert len(counts) == 3
    assert counts.min() > 150  # 200 expected


def test_the_two_draws_are_apart_in_values_and_gradients():
    student, _ = student_and_teacher()
    step = make_step(student)
    state = _learned(student, [step.batch], per_class=2).state_dict()
    strategy = _strategy(state, batch_size=3)
    torch.manual_seed(5)
    terms = strategy.loss(step)
    torch.manual_seed(5)
    rows = torch.randint(int((state["class_ids"] >= 0).sum()), (3, 2))
    assert not torch.equal(rows[:, 0], rows[:, 1])
    both = rows.T.flatten()
    frames, motion = state["object"][both][:, None], state["motion"][both][:, None]
    sounds = state["sounds"][both] / 32767
    batch = Batch(
        sources=sounds[:, :1],
        class_ids=state["class_ids"][both][:, None],
        video_ids=both[:, None],
        is_memory=torch.ones(6, 1, dtype=torch.bool),
        visual=VisualInputs(frames, motion),
        background=sounds[:, 1],
    )
    found = student.predict(batch)  # batch statistics of both draws
    weight, logits = found.spectrograms.weight, found.output.logits
    want = {
        "stored_masks": 0.3 * mask_l1(logits[:3], state["masks"][rows[:, 0]][:, None] / 255, weight[:3]),
        "replay": 0.5 * mask_l1(logits[3:], found.spectrograms.ratio[3:], weight[3:]),
    }
    for name, value in want.items():
        torch.testing.assert_close(terms[name], value)
        got, wanted = gradients(terms[name], student), gradients(value, student)
        assert got.keys() == wanted.keys()
        for parameter in got:
            torch.testing.assert_close(got[parameter], wanted[parameter], rtol=1e-3, atol=1e-6)


def _learned(student, batches, *, old=0, is_last=False, state=None, **parameters):
    """The strategy after a task whose training mixtures were these, one in each batch."""
    singles = [
        dataclasses.replace(
            batch,
            sources=batch.sources[b : b + 1],
            class_ids=batch.class_ids[b : b + 1],
            video_ids=batch.video_ids[b : b + 1],
            visual=batch.visual[slice(b, b + 1)],
        )
        for batch in batches
        for b in range(len(batch.sources))
    ]
    strategy = _strategy(state, **parameters)
    task = Task(int(old > 0), NAMES[old:], NAMES)
    student.eval()
    strategy.after_task(TaskContext(task, student, None, GivenData(singles), is_last=is_last))
    student.train()
    return strategy


def test_what_is_stored():
    """Two of the mixtures are of different recordings; classes that get none have an empty place."""
    student, _ = student_and_teacher()
    batch = make_step(student).batch
    state = _learned(student, [batch], per_class=1).state_dict()
    assert state["class_ids"].tolist() == [1, 2, -1, -1]
    assert state["video_ids"][:2].tolist() == [7, 2]
    for number in (0, 1):
        source, whole = batch.sources[number, 0], batch.mixture[number]
        sounds = state["sounds"][number].float() / 32767
        torch.testing.assert_close(sounds[0], source.clamp(-1, 1), rtol=0, atol=0.51 / 32767)
        torch.testing.assert_close(sounds[1], (whole - source).clamp(-1, 1), rtol=0, atol=0.51 / 32767)
        assert torch.equal(state["object"][number], batch.visual.object[number, 0])
    # the masks are those of the separator in evaluation mode, of the stored mixture
    student.eval()
    sounds = state["sounds"][:1].float() / 32767
    made = student.predict(
        Batch(
            sounds[:, :1],
            state["class_ids"][:1, None],
            state["video_ids"][:1, None],
            torch.ones(1, 1, dtype=torch.bool),
            VisualInputs(state["object"][:1, None], state["motion"][:1, None]),
            background=sounds[:, 1],
        )
    )
    masks = made.output.logits[0, 0].sigmoid()
    torch.testing.assert_close(state["masks"][0].float() / 255, masks, rtol=0, atol=0.5001 / 255)
    assert masks.std() > 1e-3
    # empty places weigh as much as full ones
    assert not any(value[2:].any() for name, value in state.items() if name != "class_ids")


def test_a_later_task_adds_its_own_and_touches_nothing():
    student, _ = student_and_teacher()
    batch = make_step(student).batch
    first = _learned(student, [batch], per_class=1).state_dict()
    kept = {name: value.clone() for name, value in first.items()}
    later = _learned(student, [batch], old=2, per_class=2, state=first).state_dict()
    assert later["class_ids"].tolist() == [1, 2, -1, -1, 2, -1, -1, -1]  # old + new is not of this task alone
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    assert all(torch.equal(later[name][:4], kept[name]) for name in kept)
    assert _learned(student, [batch], is_last=True, state=first).state_dict() == {}


def test_silent_and_unseen_sources_are_not_stored():
    student, _ = student_and_teacher()
    batch = make_step(student).batch
    sources = batch.sources.clone()
    sources[1, 0] = 0
    state = _learned(student, [dataclasses.replace(batch, sources=sources)], per_class=1).state_dict()
    assert state["class_ids"].tolist() == [1, 3, -1, -1]
    for seen in ("seen", "motion_seen"):
        unseen = torch.tensor([[True, True], [False, True], [True, True]])
        visual = dataclasses.replace(batch.visual, **{seen: unseen})
        state = _learned(student, [dataclasses.replace(batch, visual=visual)], per_class=1).state_dict()
        assert state["class_ids"].tolist() == [1, 3, -1, -1], seen


def test_floats_are_stored_in_half_precision():
    student, _ = student_and_teacher()
    batch = make_step(student).batch
    visual = VisualInputs(batch.visual.object / 255, batch.visual.motion / 255)
    state = _learned(student, [dataclasses.replace(batch, visual=visual)], per_class=1).state_dict()
    assert {name: state[name].dtype for name in ("sounds", "masks", "object", "motion")} == {
        "sounds": torch.int16,
        "masks": torch.uint8,
        "object": torch.float16,
        "motion": torch.float16,
    }
    strategy = _strategy(unflatten_state(*flatten_state(state)), batch_size=1)
    assert strategy.loss(make_step(student))["replay"].isfinite()


def test_the_bytes_of_the_specification():
    """65,535 samples, 256 x 256 pixels, three object vectors of 512 and eight of motion of 768: 343,036 bytes."""
    batch = Batch(
        sources=torch.zeros(1, 2, 65535),
        class_ids=torch.zeros(1, 2, dtype=torch.int64),
        video_ids=torch.zeros(1, 2, dtype=torch.int64),
        is_memory=torch.zeros(1, 2, dtype=torch.bool),
        visual=VisualInputs(torch.zeros(1, 2, 3, 512), torch.zeros(1, 2, 768, 8)),
    )
    item = {**_stored(batch, 0), "masks": torch.zeros(1, 256, 256, dtype=torch.uint8)}
    numbers = ("class_ids", "video_ids")
    assert sum(v.numel() * v.element_size() for k, v in item.items() if k not in numbers) == 343036


def test_in_a_run_every_class_has_its_mixtures_and_the_estimate_is_exact(tone_store):
    run = trained(tone_store, ("derpp", {"per_class": 2, "batch_size": 2}), "none")
    kept = load_file(run / "tasks" / "00" / "strategy.safetensors")
    assert sorted(kept["class_ids"].tolist()) == [0, 0, 1, 1]
    assert not (run / "tasks" / "01" / "strategy.safetensors").exists()  # nothing follows
    size = sum(value.numel() * value.element_size() for value in kept.values())
    assert estimate(RunFolder(run).spec(), tone_store, task=0).strategy_state == size
    # its masks are those of the separator that the task left
    item = {name: value[:1] for name, value in kept.items()}
    separator = load_separator(run, task=0).eval()
    with torch.no_grad():
        found = separator.predict(_batch(item, torch.zeros(0))).output.logits.sigmoid()
    torch.testing.assert_close(item["masks"][:, None] / 255, found, rtol=0, atol=0.51 / 255)


def test_what_it_refuses():
    for name in ("alpha", "beta"):
        with pytest.raises(ConfigError, match=f"{name} must be 0 or more, got -1"):
            STRATEGIES.create("derpp", {name: -1.0})
    for name in ("per_class", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            STRATEGIES.create("derpp", {name: 0})
    student, _ = student_and_teacher()
    with pytest.raises(ConfigError, match="batch_size, 3, cannot be shared equally by 2 processes"):
        _strategy(batch_size=3).begin_task(TaskContext(Task(0, NAMES, NAMES), student, None, None, Ranks(0, 2)))
    with pytest.warns(UserWarning, match="of 1024 mixtures of task 1 none has all its sources of this task"):
        strategy = _learned(student, [make_step(student, rows=slice(0, 1)).batch], old=2, per_class=8)
    assert strategy.state_dict() == {}

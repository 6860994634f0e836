"""GDumb: the memory is all that it depends on."""

from __future__ import annotations

import pytest
import torch

from avsep.data.store import StoreWriter
from avsep.errors import ConfigError
from avsep.evaluation.budget import budget_of, estimate
from avsep.memory.base import read_exemplars
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from avsep.spec import ComponentRef
from avsep.strategies import build_strategy
from support.continual_runs import differing, first_task, make_learner, resume_killed, train, trained, weights
from support.tones import TINY_TASKS, make_tone_store, stream_of


@pytest.fixture(scope="module")
def other_store(tone_store, tmp_path_factory):
    """The store with other sounds in the training clips that no memory of GDumb holds."""
    kept = {e.id for ones in read_exemplars(trained(tone_store, "gdumb", "random_per_class"), 1).values() for e in ones}
    assert {clip_id.split("-")[0] for clip_id in kept} == {name for task in TINY_TASKS for name in task}
    write = StoreWriter.write_clip

    def writes(self, clip_id, name, split, audio, **features):
        changed = split == "train" and clip_id not in kept
        write(self, clip_id, name, split, audio[::-1].copy() * 0.5 if changed else audio, **features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "write_clip", writes)
        return make_tone_store(tmp_path_factory.mktemp("other") / "store")


def test_clips_outside_the_memory_change_nothing(tone_store, other_store):
    runs = [trained(store, "gdumb", "random_per_class") for store in (tone_store, other_store)]
    assert read_exemplars(runs[0], 1) == read_exemplars(runs[1], 1)
    for task in (0, 1):
        assert differing(*(weights(run, task) for run in runs)) == []
    plain = [weights(first_task(store, "finetune"), 0) for store in (tone_store, other_store)]
    assert differing(*plain)  # while they do change what others learn
    assert differing(plain[0], weights(runs[0], 0))


@pytest.mark.slow
def test_the_second_task_begins_from_fresh_weights(tone_store, tmp_path):
    """Whatever the first one left: its memory is all that comes through."""
    one, other = make_learner("gdumb", "random_per_class"), make_learner("gdumb", "random_per_class")
    learn = type(other)._learn

    def spoiled(self, task, *rest):
        if task.index == 1:
            with torch.no_grad():
                for parameter in self.separator.parameters():
                    parameter.add_(1.0)
        return learn(self, task, *rest)

    one.fit(stream_of(tone_store), tmp_path / "one", progress=False)
    other._learn = spoiled.__get__(other)
    other.fit(stream_of(tone_store), tmp_path / "other", progress=False)
    assert differing(weights(tmp_path / "one"), weights(tmp_path / "other")) == []


BALANCED = {"name": "balanced", "params": {}}


@pytest.mark.parametrize("mixer", [None, pytest.param(BALANCED, marks=pytest.mark.slow)], ids=["published", "balanced"])
def test_a_killed_run_goes_on_with_the_memory_it_chose(mixer, tone_store):
    settings = {} if mixer is None else {"mixer": mixer}
    memory = ("random_per_class", {"per_class": 2, "keep": "clip"})
    run = trained(tone_store, "gdumb", memory, **settings)
    resumed = resume_killed(tone_store, run, "gdumb", memory, **settings)
    assert differing(weights(run), weights(resumed)) == []
    assert read_exemplars(run, 1) == read_exemplars(resumed, 1)
    assert {name: len(kept) for name, kept in read_exemplars(run, 1).items()} == dict.fromkeys(
        [*TINY_TASKS[0], *TINY_TASKS[1]], 2
    )
    # the old classes keep what was chosen for them
    assert all(read_exemplars(run, 1)[name] == kept for name, kept in read_exemplars(run, 0).items())


def test_its_batches_are_of_exemplars_alone(tone_store, tmp_path, monkeypatch):
    seen = []
    from avsep.training.loop import TrainingStep

    forward = TrainingStep.forward

    def spies(self, inputs):
        seen.append((bool(inputs.batch.is_memory.all()), inputs.batch.clips))
        return forward(self, inputs)

    monkeypatch.setattr(TrainingStep, "forward", spies)
    run = train(tone_store, tmp_path / "run", "gdumb", "random_per_class")
    assert all(memory for memory, _ in seen)
    kept = {e.id for ones in read_exemplars(run, 1).values() for e in ones}
    assert {clip for _, clips in seen for mixture in clips for clip in mixture} <= kept


def test_the_budget_counts_the_exemplars_of_the_last_task_too(tone_store):
    run = trained(tone_store, "gdumb", "random_per_class")
    for task in (0, 1):
        told, found = estimate(RunFolder(run).spec(), tone_store, task=task), budget_of(run, task, store=tone_store)
        assert (told.exemplars, told.total) == (found.exemplars, found.total)
        assert found.exemplars == 2 * (task + 1)


def test_an_engine_is_calibrated_on_the_memory_it_was_trained_on(tone_store):
    from avsep.export.build.gate import calibration_batches

    run = trained(tone_store, "gdumb", "random_per_class")
    for task in (0, 1):
        kept = {e.id for ones in read_exemplars(run, task).values() for e in ones}
        batches = list(calibration_batches(run, task, load_separator(run, task), count=12))
        assert {clip for batch in batches for mixture in batch.clips for clip in mixture} == kept


def test_what_it_cannot_do_is_refused(tone_store, tmp_path):
    for memory, message in (
        ("none", "learns from exemplars, and the memory is 'none'"),
        ("herding", "memory 'herding' chooses them by what the trained separator makes of them: use another"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_learner("gdumb", memory).fit(stream_of(tone_store), tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="gdumb, joint: one trains on all data, another on the memory alone"):
        build_strategy([ComponentRef(name="gdumb"), ComponentRef(name="joint")])
    few = make_learner("gdumb", "random_per_class", memory_repeats=1, batch_size=4)
    with pytest.raises(ConfigError, match=r"larger than the epoch's 2 mixtures: .* or raise train\.memory_repeats"):
        few.fit(stream_of(tone_store), tmp_path / "run", progress=False)

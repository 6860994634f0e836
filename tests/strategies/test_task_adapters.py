"""Task adapters: what learns, what stays, in a run and across a kill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avsep.errors import ConfigError
from avsep.evaluation.budget import estimate
from avsep.registry import STRATEGIES
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from support.components import random_batch
from support.continual_runs import differing, make_learner, resume_killed, trained, weights
from support.strategy_steps import student_and_teacher

SEPARATOR = "iquery_adapters"
RUNS = [
    (SEPARATOR, "none"),
    (SEPARATOR, "random_per_class"),
    pytest.param("iquery_tails", "none", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("separator", "memory"), RUNS)
def test_old_classes_are_separated_as_when_their_task_ended(separator, memory, tone_store):
    run = trained(tone_store, "task_adapters", memory, separator=separator)
    before, after = (load_separator(run, task=task) for task in (0, 1))
    assert after.spec.task_sizes == (2, 2)
    batch = random_batch(after)
    old = replace(batch, class_ids=torch.tensor([[0, 1], [1, 0]]))
    mixed = replace(batch, class_ids=torch.tensor([[0, 2], [1, 3]]))
    with torch.no_grad():
        expected = before.predict(old).output.logits
        assert torch.equal(after.predict(old).output.logits, expected)
        found = after.predict(mixed).output.logits
        assert torch.equal(found[:, 0], expected[:, 0])
        assert not torch.equal(found[:, 1], expected[:, 1])


def test_without_adapters_new_queries_change_what_old_classes_get(tone_store):
    """Query extension trains new queries alone, and old ones look at them."""
    run = trained(tone_store, "query_extension")
    before, after = (load_separator(run, task=task) for task in (0, 1))
    old = replace(random_batch(after), class_ids=torch.tensor([[0, 1], [1, 0]]))
    with torch.no_grad():
        change = (after.predict(old).output.logits - before.predict(old).output.logits).abs().max()
    assert change > 1e-4


def test_nothing_else_changes(tone_store):
    run = trained(tone_store, "task_adapters", "random_per_class", separator=SEPARATOR)
    before, after = weights(run, 0), weights(run, 1)
    new = {name for name in after if name not in before}
    assert new
    assert all(name.startswith("mask_decoder.adapter.tasks.0.") for name in new)
    assert all(after[name].any() for name in new if ".up." in name)  # which start as 0
    for name, value in before.items():
        rows = slice(len(value)) if name == "mask_decoder.decoder.class_queries" else ...
        assert torch.equal(after[name][rows], value), name


def test_a_killed_run_goes_on_to_the_same_weights(tone_store):
    run = trained(tone_store, "task_adapters", separator=SEPARATOR)
    resumed = resume_killed(tone_store, run, "task_adapters", separator=SEPARATOR)
    assert differing(weights(run), weights(resumed)) == []


def test_a_separator_without_adapter_is_refused():
    student, _ = student_and_teacher()
    with pytest.raises(ConfigError, match=r"has none: add one, such as separator\.adapter=low_rank"):
        STRATEGIES.create("task_adapters").check(student)
    learner = make_learner("task_adapters", separator=SEPARATOR)
    learner.strategy.check(learner.separator)


def test_the_budget_counts_the_adapter_of_every_task(tone_store):
    run = trained(tone_store, "task_adapters", separator=SEPARATOR)
    for task in (0, 1):
        separator = load_separator(run, task)
        expected = sum(p.numel() * p.element_size() for p in separator.parameters())
        assert estimate(RunFolder(run).spec(), tone_store, task=task).parameters == expected

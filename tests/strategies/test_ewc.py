"""EWC: the penalty by hand, the Fisher information by a literal loop, growth, and what it does to a run."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from avsep import build_separator
from avsep.errors import ConfigError
from avsep.kernels.mask_head.reference import mask_l1_reference
from avsep.registry import STRATEGIES
from avsep.strategies.base import TaskContext
from avsep.strategies.ewc import fisher_diagonal
from avsep.types import Task
from support.continual_runs import RUNS, differing, make_learner, resume_killed, train, weights
from support.strategy_steps import PARTS, GivenData, make_step, with_teacher
from support.tones import TINY_FRONT_END, stream_of

BIAS, QUERIES = "mask_decoder.head.4.bias", "mask_decoder.class_queries"


def _separator(num_classes, seed=1):
    return build_separator(**PARTS, front_end=TINY_FRONT_END, num_classes=num_classes, seed=seed)


def _mixtures(separator):
    """Three batches of one mixture of old and new classes."""
    batch = make_step(separator, num_old=0, class_ids=torch.tensor([[1, 0], [0, 1], [1, 1]])).batch
    return [
        replace(batch, **{k: getattr(batch, k)[i : i + 1] for k in ("sources", "class_ids", "visual")})
        for i in range(3)
    ]


def test_the_penalty_and_its_gradient_by_hand():
    teacher, student = _separator(2).requires_grad_(False), _separator(2)
    student.grow(4)
    with torch.no_grad():
        own = dict(student.named_parameters())
        own[BIAS] += torch.tensor([0.5, -1.0, 2.0, 0.25])
        own[QUERIES][:2, 0] += torch.tensor([3.0, -2.0])  # rows 2 and 3 are new
    fisher = {BIAS: torch.tensor([1.0, 2.0, 0.0, 8.0]), QUERIES: torch.zeros(2, 16)}
    fisher[QUERIES][:, 0] = torch.tensor([0.5, 1.0])
    strategy = STRATEGIES.create("ewc", {"weight": 10.0})
    strategy.load_state_dict(fisher)
    terms = strategy.loss(with_teacher(make_step(student.eval()), teacher))
    # F / 8 is .125 .25 0 1 and .0625 .125; times the squares .25 1 4 .0625 and 9 4; times 10 / 2
    assert terms["penalty"].item() == pytest.approx(5 * (0.03125 + 0.25 + 0 + 0.0625 + 0.5625 + 0.5), rel=1e-6)
    terms["penalty"].backward()
    torch.testing.assert_close(own[BIAS].grad, 10 * torch.tensor([0.0625, -0.25, 0.0, 0.25]))
    expected = torch.zeros(4, 16)
    expected[:2, 0] = 10 * torch.tensor([0.1875, -0.25])
    torch.testing.assert_close(own[QUERIES].grad, expected)
    assert {n for n, p in own.items() if p.grad is not None} == {BIAS, QUERIES}
    strategy.load_state_dict({BIAS: torch.tensor([1.0, 0.0, 0.0, 0.0])})  # as after the next task
    assert strategy.loss(with_teacher(make_step(student), teacher))["penalty"].item() == pytest.approx(
        5 * 0.25, rel=1e-6
    )


def test_the_fisher_information_is_the_mean_of_squared_gradients_of_single_mixtures():
    separator = _separator(2).train()
    separator.motion_encoder.requires_grad_(False)
    mixtures = _mixtures(separator)
    before = {k: v.clone() for k, v in separator.state_dict().items()}
    fisher = fisher_diagonal(separator, mixtures)
    assert separator.training
    assert differing(separator.state_dict(), before) == []  # in evaluation mode: the running statistics stand still
    assert all(p.grad is None for p in separator.parameters())

    separator.eval()
    expected = {}
    for batch in mixtures:
        separator.zero_grad()
        spectrograms = separator.analyse(batch.sources)
        visual = separator.encode_visual(batch.visual)
        logits = separator(spectrograms.network_input, visual, batch.class_ids).logits
        mask_l1_reference(logits, spectrograms.ratio, spectrograms.weight).backward()
        for name, p in separator.named_parameters():
            if p.grad is not None:
                expected[name] = expected.get(name, 0) + p.grad**2 / 3
    assert fisher.keys() == expected.keys()
    assert not any(name.startswith("motion_encoder") for name in fisher)
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-3, atol=1e-6 * float(value.max()))
    assert max(float(v.max()) for v in fisher.values()) > 0


def test_the_sum_over_tasks_leaves_new_rows_to_the_new_task():
    separator = _separator(2)
    strategy = STRATEGIES.create("ewc", {"decay": 0.5, "fisher_samples": 3})
    mixtures = _mixtures(separator)
    data = GivenData(mixtures)
    strategy.after_task(TaskContext(Task(0, ("a", "b"), ("a", "b")), separator, None, data))
    first = {k: v.clone() for k, v in strategy.state_dict().items()}
    assert data.asked == [(3, 1)]
    assert first[QUERIES].shape == (2, 16)
    separator.grow(3)
    strategy.after_task(TaskContext(Task(1, ("c",), ("a", "b", "c")), separator, None, data))
    second, alone = strategy.state_dict(), fisher_diagonal(separator, mixtures)
    torch.testing.assert_close(second[BIAS], 0.5 * first[BIAS] + alone[BIAS])
    torch.testing.assert_close(second[QUERIES][:2], 0.5 * first[QUERIES] + alone[QUERIES][:2])
    assert torch.equal(second[QUERIES][2:], alone[QUERIES][2:])
    assert strategy.state_dict().keys() == first.keys()


@pytest.mark.parametrize(("weight", "is_last"), [(0.0, False), (100.0, True)])
def test_what_no_later_task_needs_is_not_computed(weight, is_last):
    strategy = STRATEGIES.create("ewc", {"weight": weight})
    data = GivenData([])
    strategy.after_task(TaskContext(Task(0, ("a",), ("a",)), None, None, data, is_last=is_last))
    assert data.asked == []
    assert strategy.state_dict() == {}
    assert strategy.needs_teacher == (weight > 0)


def test_wrong_settings():
    for params, message in (
        ({"weight": -1.0}, "weight must be 0 or more, got -1"),
        ({"decay": 1.5}, "decay must be between 0 and 1, got 1.5"),
        ({"fisher_samples": 0}, "fisher_samples must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            STRATEGIES.create("ewc", params)
    default = STRATEGIES.create("ewc")
    assert (default.weight, default.decay, default.fisher_samples) == (100.0, 1.0, 1000)
    assert default.first_task() == {}


@pytest.mark.parametrize(("separator", "memory"), RUNS)
def test_in_a_run_it_changes_the_weights_and_resumes(separator, memory, tone_store, tmp_path):
    strategy = ("ewc", {"fisher_samples": 3, "weight": 1e4})
    run = train(tone_store, tmp_path / "run", strategy, memory, separator=separator)
    without = train(tone_store, tmp_path / "without", "finetune", memory, separator=separator)
    assert differing(weights(run), weights(without))
    assert differing(weights(run, 0), weights(without, 0)) == []
    resumed = resume_killed(tone_store, tmp_path / "run", strategy, memory, separator=separator)
    assert differing(weights(run), weights(resumed)) == []
    # what is kept between the tasks is one Fisher information, nothing after the last
    fisher = load_file(run / "tasks" / "00" / "strategy.safetensors")
    first = weights(run, 0)
    assert fisher
    assert all(value.shape == first[name].shape for name, value in fisher.items())
    assert not (run / "tasks" / "01" / "strategy.safetensors").exists()
    assert json.loads((run / "tasks" / "01" / "task.json").read_text())["strategy_state"] is None


def test_killed_while_it_measures_and_with_its_checkpoint_lost(tone_store, tmp_path, monkeypatch):
    strategy = ("ewc", {"fisher_samples": 5, "weight": 1e4})
    whole = train(tone_store, tmp_path / "whole", strategy)
    stream = stream_of(tone_store)
    run = tmp_path / "run"

    def dies(separator, batches):
        fisher_diagonal(separator, itertools.islice(batches, 2))
        raise KeyboardInterrupt

    monkeypatch.setattr("avsep.strategies.ewc.fisher_diagonal", dies)
    with pytest.raises(KeyboardInterrupt):
        make_learner(strategy).fit(stream, run, progress=False)
    monkeypatch.undo()
    assert not (run / "tasks").exists()  # what was learned is in the checkpoint
    make_learner(strategy).fit(stream, run, resume=True, progress=False)
    assert differing(weights(run), weights(whole)) == []
    shutil.rmtree(run / "state")
    shutil.rmtree(run / "tasks" / "01")
    make_learner(strategy).fit(stream, run, resume=True, progress=False)
    assert differing(weights(run), weights(whole)) == []


def test_at_weight_zero_it_is_fine_tuning(tone_store, tmp_path):
    nothing = train(tone_store, tmp_path / "zero", ("ewc", {"weight": 0.0}))
    without = train(tone_store, tmp_path / "without", "finetune")
    assert differing(weights(nothing), weights(without)) == []

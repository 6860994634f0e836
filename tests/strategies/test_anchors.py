"""Anchors other than EWC: their values by hand, what they leave to weight decay, and what they do to a run."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.spec import OptimizerSpec
from avsep.strategies.anchor import quadratic_distance
from avsep.strategies.base import TaskContext
from avsep.strategies.gated_anchor import gates
from avsep.strategies.importance import fisher_diagonal, logit_sensitivity
from avsep.strategies.si import path_importance
from avsep.training.optim import make_optimizers
from avsep.types import Task
from support.continual_runs import SEPARATORS, differing, trained, weights
from support.strategy_steps import GivenData, gradients, make_step, student_and_teacher, with_teacher

FIRST, SECOND = Task(0, ("a", "b"), ("a", "b")), Task(1, ("c", "d"), ("a", "b", "c", "d"))
QUERIES, BIAS = "mask_decoder.class_queries", "mask_decoder.head.4.bias"
MEASURED = [("gated_anchor", {"samples": 2, "weight": 10.0}), ("mas", {"samples": 2, "weight": 1e3})]
ANCHORS = [("l2_anchor", {"weight": 1.0}), *MEASURED, ("si", {"weight": 1e3})]


class Toy(nn.Module):
    """One parameter; as a separator its only logit is the product with what it is given."""

    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))

    def predict(self, f):
        logits = (self.w * f).sum().reshape(1, 1, 1, 1)
        return SimpleNamespace(
            output=SimpleNamespace(logits=logits), spectrograms=SimpleNamespace(weight=torch.ones(1, 1, 1, 1))
        )


def test_all_alike_by_hand():
    moved, anchor = Toy(2.0, -1.0, 1.5), Toy(1.0, 1.0, 1.0)
    distance = quadratic_distance(moved, anchor, {"w": None})
    assert (0.1 / 2 * distance).item() == pytest.approx(0.2625)  # .05 (1 + 4 + .25)


def test_gates_by_hand():
    found = gates({"a": torch.tensor([0.9, 0.2]), "b": torch.tensor([0.6, 0.05])}, 0.5)
    assert found["a"].tolist() == found["b"].tolist() == [True, False]
    moved = quadratic_distance(Toy(1.0, 2.0, 3.0, 4.0), Toy(0.0, 0.0, 0.0, 0.0), {"w": torch.tensor([1.0, 0, 1, 0])})
    assert (moved / 2).item() == 5.0  # (1 + 9) / 2
    # what never got a gradient is free, whatever the quantile says
    assert not gates({"a": torch.zeros(4)}, 0.5)["a"].any()
    assert gates({"a": torch.arange(100.0)}, 0.9)["a"].sum() == 10


def test_sensitivity_by_hand():
    """d/dw (w.f)^2 = 2 (w.f) f: 0 where the logit is 0, and (0, -.5) of the other; their mean size."""
    toy = Toy(0.5, -0.25)
    found = logit_sensitivity(toy, [torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])])
    torch.testing.assert_close(found["w"], torch.tensor([0.0, 0.25]))


def _descend(strategy, toy, steps, teacher=None, pull=0.0):
    """Gradient descent on w^2 / 2 and the penalty ``pull`` (w - teacher's), as the loop calls the strategy."""
    step = SimpleNamespace(student=toy, teacher=teacher)
    for _ in range(steps):
        anchored = pull * (toy.w.detach() - teacher.w) if teacher is not None else 0.0
        toy.w.grad = toy.w.detach().clone() + anchored
        strategy.after_backward(step)
        with torch.no_grad():
            toy.w -= 0.1 * toy.w.grad
        toy.w.grad.zero_()  # as clipping may change it
        strategy.after_step(step)


def test_path_by_hand():
    toy, strategy = Toy(2.0), STRATEGIES.create("si")
    ctx = TaskContext(FIRST, toy, None, GivenData([]))
    strategy.begin_task(ctx)
    _descend(strategy, toy, 50)
    # w_k = 2 (.9)^k, and each step adds .1 w_k^2: .4 (1 - .81^50) / .19
    path, end = 0.4 * (1 - 0.81**50) / 0.19, 2 * 0.9**50
    assert strategy.state_dict()["path"]["w"].item() == pytest.approx(path, rel=1e-5)
    assert path == pytest.approx(2.1052, abs=5e-5)
    omega = path_importance(torch.tensor(path), torch.tensor(2 - end), 0.1).item()
    assert omega == pytest.approx(path / ((2 - end) ** 2 + 0.1))
    assert omega == pytest.approx(0.5187, abs=5e-5)
    strategy.after_task(ctx)
    assert strategy.state_dict() == {"omega": {"w": torch.ones(1)}}  # the largest is 1, and the path is done with
    assert path_importance(torch.tensor(-1.0), torch.tensor(1.0), 0.1) == 0


def test_the_path_is_without_the_penalty_and_goes_on_after_a_resume():
    strategy = STRATEGIES.create("si", {"weight": 3.0})
    strategy.load_state_dict({"omega": {"w": torch.tensor([0.5])}})
    toy, teacher = Toy(2.0), Toy(1.0).requires_grad_(False)
    strategy.begin_task(TaskContext(SECOND, toy, teacher, GivenData([])))
    strategy._omega = strategy.omega(toy)  # as the loss makes it
    values = [2.0]
    for steps in (2, 2):
        if len(values) > 1:
            resumed = STRATEGIES.create("si", {"weight": 3.0})
            resumed.load_state_dict(strategy.state_dict())
            strategy = resumed
            strategy.begin_task(TaskContext(SECOND, toy, teacher, GivenData([]), resumed=True))
            strategy._omega = strategy.omega(toy)
        for _ in range(steps):
            _descend(strategy, toy, 1, teacher, pull=1.5)
            values.append(toy.w.item())
    expected = -sum(w * (after - w) for w, after in itertools.pairwise(values))  # the gradient of w^2 / 2 alone
    assert strategy.state_dict()["path"]["w"].item() == pytest.approx(expected, rel=1e-5)
    assert strategy.state_dict()["start"]["w"].item() == 2.0


def test_new_rows_are_free_and_old_ones_are_pulled():
    student, teacher = student_and_teacher()
    step = with_teacher(make_step(student), teacher)
    strategy = STRATEGIES.create("l2_anchor", {"weight": 2.0})
    strategy.begin_task(TaskContext(SECOND, student, teacher, None))
    terms = strategy.loss(step)
    own, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    expected = sum((own[n][tuple(slice(k) for k in p.shape)] - p).square().sum() for n, p in theirs.items())
    torch.testing.assert_close(terms["penalty"], expected)
    pulled = gradients(terms["penalty"], student)
    assert (pulled[QUERIES][2:] == 0).all()
    torch.testing.assert_close(pulled[QUERIES][:2], 2 * (own[QUERIES][:2] - theirs[QUERIES]))
    attention = STRATEGIES.create("l2_anchor", {"scope": "attention"})
    attention.check(student)
    attention.begin_task(TaskContext(SECOND, student, teacher, None))
    reached = gradients(attention.loss(step)["penalty"], student)
    assert reached
    assert all("attention" in name for name in reached)


def test_attention_is_asked_for_where_there_is_none():
    from avsep import build_separator

    separator = build_separator(**SEPARATORS["sound_of_pixels"], num_classes=2)
    with pytest.raises(ConfigError, match="mask decoder 'channel_synthesizer' has none: use scope=all"):
        STRATEGIES.create("l2_anchor", {"scope": "attention"}).check(separator)


def test_weight_decay_does_not_pull_anchored_weights():
    student, teacher = student_and_teacher()
    strategy = STRATEGIES.create("l2_anchor", {"scope": "attention"})
    specs = {g: OptimizerSpec(name="adamw", lr=0.1, weight_decay=0.5) for g in ("audio", "visual", "decoder")}
    strategy.begin_task(TaskContext(SECOND, student, teacher, None))
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    for optimizer in make_optimizers(student, specs, strategy).values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, parameter in student.named_parameters():
        factor = 1.0 if "attention" in name else 0.95
        torch.testing.assert_close(parameter, factor * before[name], rtol=1e-6, atol=0)
    # nothing is anchored in the first task, nor at weight 0, and nothing is grouped then
    for idle, ctx in (
        (strategy, TaskContext(FIRST, student, None, None)),
        (STRATEGIES.create("l2_anchor", {"weight": 0.0}), TaskContext(SECOND, student, teacher, None)),
    ):
        idle.begin_task(ctx)
        assert [len(o.param_groups) for o in make_optimizers(student, specs, idle).values()] == [1, 1, 1]
    ewc = STRATEGIES.create("ewc")
    ewc.load_state_dict({BIAS: torch.ones(4)})
    assert ewc.weight_decay(BIAS) == 1.0  # as published
    mas = STRATEGIES.create("mas")
    mas.load_state_dict({BIAS: torch.ones(4)})
    assert (mas.weight_decay(BIAS), mas.weight_decay(QUERIES)) == (0.0, 1.0)


def _batches(separator):
    batch = make_step(separator, num_old=0, class_ids=torch.tensor([[1, 0], [0, 1], [1, 1]])).batch
    names = ("sources", "class_ids", "visual")
    return [dataclasses.replace(batch, **{k: getattr(batch, k)[i : i + 1] for k in names}) for i in range(2)]


def test_a_gate_stays_open_and_takes_a_bit():
    _, separator = student_and_teacher()
    separator.requires_grad_(True)
    mixtures = _batches(separator)
    strategy = STRATEGIES.create("gated_anchor", {"samples": 2, "quantile": 0.75})
    strategy.after_task(TaskContext(FIRST, separator, None, GivenData(mixtures)))
    wanted = gates(fisher_diagonal(separator, mixtures), 0.75)
    first = dict(strategy.omega(separator))
    for name, open_ in wanted.items():
        assert torch.equal(first.get(name, torch.zeros_like(open_).float()) > 0, open_), name
    numbers = sum(p.numel() for p in separator.parameters())
    packed = sum(v["bits"].numel() for v in strategy.state_dict().values())
    assert numbers / 8 * 0.5 < packed < numbers / 8 + len(wanted)
    again = STRATEGIES.create("gated_anchor")
    again.load_state_dict(strategy.state_dict())
    assert all(torch.equal(v, first[n]) for n, v in again.omega(separator).items())

    separator.grow(4)
    with torch.no_grad():
        for parameter in separator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter, generator=torch.Generator().manual_seed(1)))
    strategy.after_task(TaskContext(SECOND, separator, None, GivenData(mixtures)))
    second, latest = strategy.omega(separator), gates(fisher_diagonal(separator, mixtures), 0.75)
    grew = 0
    for name, open_ in latest.items():
        union = open_.clone()
        if name in first:
            union[tuple(slice(n) for n in first[name].shape)] |= first[name] > 0
        assert torch.equal(second.get(name, torch.zeros_like(open_).float()) > 0, union), name
        grew += int((union & ~open_).sum())
    assert grew > 0


def test_importance_of_tasks_adds_up():
    _, separator = student_and_teacher()
    separator.requires_grad_(True)
    data = GivenData(_batches(separator))
    strategy = STRATEGIES.create("mas", {"samples": 2})
    strategy.after_task(TaskContext(FIRST, separator, None, data))
    first = {n: v.clone() for n, v in strategy.state_dict().items()}
    assert max(float(v.max()) for v in first.values()) == 1
    separator.grow(4)
    strategy.after_task(TaskContext(SECOND, separator, None, data))
    alone = logit_sensitivity(separator, data.batches(2))
    largest = max(float(v.max()) for v in alone.values())
    found = strategy.state_dict()
    torch.testing.assert_close(found[BIAS], first[BIAS] + alone[BIAS] / largest)
    torch.testing.assert_close(found[QUERIES][:2], first[QUERIES] + alone[QUERIES][:2] / largest)
    torch.testing.assert_close(found[QUERIES][2:], alone[QUERIES][2:] / largest)
    strategy.after_task(TaskContext(SECOND, separator, None, data, is_last=True))
    assert strategy.state_dict() == {}


@pytest.mark.parametrize("strategy", ANCHORS, ids=[name for name, _ in ANCHORS])
def test_in_a_run_weights_stay_closer_to_the_task_before(strategy, tone_store):
    run, plain = trained(tone_store, strategy), trained(tone_store, "finetune")
    start = weights(run, 0)
    assert differing(start, weights(plain, 0)) == []  # also where the first task was not shared
    names = [name for name, v in start.items() if v.is_floating_point() and "running" not in name and name != QUERIES]

    def moved(of):
        end = weights(of)
        return sum(float((end[name] - start[name]).square().sum()) for name in names)

    assert moved(run) < 0.999 * moved(plain)
    kept = run / "tasks" / "00" / "strategy.safetensors"
    assert kept.exists() == (strategy[0] != "l2_anchor")
    if strategy[0] == "si":
        assert all(name.startswith("omega") for name in load_file(kept))
    assert not (run / "tasks" / "01" / "strategy.safetensors").exists()


def test_features_by_hand():
    student, teacher = student_and_teacher()
    step = with_teacher(make_step(student), teacher)
    terms = STRATEGIES.create("feature_distillation", {"weight": 3.0}).loss(step)
    with torch.no_grad():
        theirs = teacher.audio_encoder(step.spectrograms.network_input).mask_features
    torch.testing.assert_close(terms["audio_features"], 3 * (step.audio.mask_features - theirs).square().mean())
    reached = gradients(terms["audio_features"], student)
    assert reached
    assert all(name.startswith("audio_encoder") for name in reached)
    off = STRATEGIES.create("feature_distillation", {"weight": 0.0})
    assert list(off.loss(step)) == ["separation"]
    assert not off.needs_teacher


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("l2_anchor", {"weight": -1.0}, "weight must be 0 or more, got -1"),
        ("l2_anchor", {"scope": "head"}, "scope must be 'all' or 'attention', got 'head'"),
        ("gated_anchor", {"quantile": 1.0}, "quantile must be from 0 to below 1, got 1.0"),
        ("gated_anchor", {"samples": 0}, "samples must be at least 1, got 0"),
        ("mas", {"samples": 0}, "samples must be at least 1, got 0"),
        ("si", {"xi": 0.0}, "xi must be above 0, got 0.0"),
        ("feature_distillation", {"weight": -1.0}, "weight must be 0 or more, got -1"),
    ],
)
def test_wrong_settings(name, params, message):
    with pytest.raises(ConfigError, match=message):
        STRATEGIES.create(name, params)

"""Strategies that are combined, and strategies of earlier versions."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from avsep.errors import CheckpointError, ConfigError, UnknownNameError
from avsep.registry import STRATEGIES
from avsep.runs.folder import RunFolder
from avsep.spec import ComponentRef, RunSpec, apply_settings, validated
from avsep.strategies import Composition, Strategy, TaskContext, build_strategy
from avsep.strategies.base import check_contract
from avsep.types import Task
from support.commands import TASKS, run
from support.continual_runs import SEPARATORS, differing
from support.strategy_steps import CLASS_IDS, GivenData, make_step, student_and_teacher, with_teacher
from support.tones import TINY_SEPARATOR, tiny_run_spec

FIRST = Task(0, ("ding", "hum"), ("ding", "hum"))
SECOND = Task(1, ("peep", "whirr"), ("ding", "hum", "peep", "whirr"))
TEXT = ("text_queries", dict(STRATEGIES.get("text_queries").example))


def _built(*refs):
    return build_strategy([ComponentRef.model_validate(ref) for ref in refs])


def test_terms_merge_by_name_and_separation_enters_once():
    student, teacher = student_and_teacher()
    step = with_teacher(make_step(student), teacher)
    both = _built("contavsep", ("plop", {"weight_features": 0.1})).loss(step)
    one, other = (
        STRATEGIES.create(n, p).loss(step) for n, p in (("contavsep", {}), ("plop", {"weight_features": 0.1}))
    )
    assert set(both) == {"separation", "instance", "class", "mask", "features", "logits"}
    for name, value in both.items():
        torch.testing.assert_close(value, one[name] if name in one else other[name], rtol=0, atol=0)


def test_a_method_that_changes_the_separation_loss_brings_it():
    student, teacher = student_and_teacher()
    step = with_teacher(make_step(student), teacher)
    for order in (("agem", "plop"), ("plop", "agem")):
        terms = _built(*order).loss(step)
        torch.testing.assert_close(terms["separation"], STRATEGIES.create("agem").loss(step)["separation"])
        assert set(terms) == {"separation", "features", "logits"}


def test_a_term_that_two_give_is_refused():
    student, teacher = student_and_teacher()
    step = with_teacher(make_step(student), teacher)
    with pytest.raises(ConfigError, match="'contavsep' and 'lwf' both give a term 'mask': leave one of them out"):
        _built("contavsep", "lwf").loss(step)


def test_what_it_asks_for_is_what_its_parts_ask_for():
    combined = _built("agem", "weight_fusion")
    assert combined.needs_memory
    assert combined.needs_teacher
    assert combined.across_ranks
    assert combined.first_task() == {}
    assert _built("contavsep", "weight_average").first_task() is None
    assert _built("contavsep", "ewc").first_task() == STRATEGIES.create("contavsep").first_task()
    assert isinstance(_built("lwf"), Strategy)
    assert not isinstance(_built("lwf"), Composition)


def _copy(student):
    return {name: value.clone() for name, value in student.state_dict().items()}


@functools.cache
def _batch(classes, moving):
    """Mixtures of the first two classes, or of all four."""
    parts = {} if moving else {"motion_encoder": None}
    student, _ = student_and_teacher(**parts)
    return make_step(student, num_old=classes - 2, class_ids=CLASS_IDS % classes).batch


class _Two:
    """Two tasks of two classes, as the learner begins and ends them; ``changed`` are the hooks that moved a weight."""

    def __init__(self, strategy, **parts):
        self.strategy, self.changed = strategy, set()
        self.student, self.teacher = student_and_teacher(**parts)
        first = copy.deepcopy(self.teacher).requires_grad_(True)
        data = GivenData([_batch(2, first.motion_encoder is not None)])
        for hook in ("begin_task", "after_task"):
            self._call(hook, TaskContext(FIRST, first, None, data, steps=4))
        with torch.no_grad():  # the second task begins at what was kept, which is not quite where the first ended
            for name, p in self.student.named_parameters():
                old = first.get_parameter(name)
                p[tuple(slice(n) for n in old.shape)] = old + 0.01
        self.data = GivenData([_batch(4, self.student.motion_encoder is not None)])
        self.shapes = {name: tuple(value.shape) for name, value in self.teacher.state_dict().items()}

    def _call(self, hook, ctx):
        ctx.student.train(hook == "begin_task")
        before = _copy(ctx.student)
        getattr(self.strategy, hook)(ctx)
        if differing(before, _copy(ctx.student)):
            self.changed.add(hook)

    def call(self, hook):
        teacher = self.teacher if self.strategy.needs_teacher else None
        self._call(hook, TaskContext(SECOND, self.student, teacher, self.data, steps=4, old_shapes=self.shapes))


def test_what_changes_the_weights_when_a_task_begins_or_ends_says_so():
    ridge = {**{k: v for k, v in SEPARATORS["ridge_filters"].items() if k != "front_end"}, "object_encoder": None}
    found, stated = {}, {}
    for spec in STRATEGIES:
        parts = {
            "analytic_mask": {**ridge, "motion_encoder": None},
            "task_adapters": {"adapter": ("low_rank", {})},
            "drift_compensation": {"adapter": "projection"},
        }
        two = _Two(STRATEGIES.create(spec.name, dict(spec.example)), **parts.get(spec.name, {}))
        two.call("begin_task")
        with torch.no_grad():  # as if it had been trained
            for number, p in enumerate(two.student.parameters()):
                p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        two.call("after_task")
        found[spec.name] = sorted(two.changed)
        stated[spec.name] = sorted(two.strategy.sets_weights)
    assert found == stated


class _Noting(Strategy):
    """Takes note of the weights when a task begins and ends."""

    def begin_task(self, ctx):
        self.begun = _copy(ctx.student)

    def after_task(self, ctx):
        self.ended = _copy(ctx.student)


@pytest.mark.parametrize("last", [True, False])
def test_what_takes_note_of_the_weights_sees_those_that_are_set(last):
    noting = _Noting()
    setting = {n: STRATEGIES.create(n, p) for n, p in (("magmax", {"batch_norm_mixtures": 0}), ("weight_fusion", {}))}
    two = _Two(Composition({**setting, "noting": noting} if last else {"noting": noting, **setting}))
    two.call("begin_task")
    assert differing(noting.begun, _copy(two.student)) == []
    with torch.no_grad():
        for p in two.student.parameters():
            p.mul_(0.9)
    two.call("after_task")
    assert differing(noting.ended, _copy(two.student)) == []
    assert two.changed == {"begin_task", "after_task"}


@pytest.mark.parametrize("other", ["query_extension", "first_session", "task_adapters", "drift_compensation"])
@pytest.mark.parametrize("text_first", [True, False])
def test_frozen_queries_stay_frozen_beside_what_trains_new_rows(other, text_first):
    frozen = (TEXT[0], {**TEXT[1], "frozen": True})
    strategy = _built(frozen, other) if text_first else _built(other, frozen)
    two = _Two(strategy, adapter=("low_rank", {}))
    two.call("begin_task")
    decoder = two.student.mask_decoder
    assert not decoder.get_parameter(decoder.query_parameter).requires_grad
    alone = _Two(_built(other), adapter=("low_rank", {}))
    alone.call("begin_task")
    decoder = alone.student.mask_decoder
    assert decoder.get_parameter(decoder.query_parameter).requires_grad


def test_states_are_kept_apart():
    combined = _built("ewc", ("lwf", {"variant": "grown_teacher"}))
    assert combined.keeps_state
    combined.load_state_dict({"ewc": {"x": torch.ones(2)}, "lwf": {"y": torch.zeros(1)}})
    assert combined.parts["ewc"].state_dict()["x"].tolist() == [1.0, 1.0]
    assert combined.state_dict().keys() == {"ewc", "lwf"}
    combined.load_state_dict({})
    assert combined.state_dict() == {}
    with pytest.raises(CheckpointError, match="state of strategy 'plop', and the run combines ewc, lwf"):
        combined.load_state_dict({"plop": {}})
    assert not _built("finetune", "weight_fusion").keeps_state


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        (["lwf", "lwf"], "'lwf' is named twice"),
        (["agem", "changing"], "agem and changing each change the separation loss"),
        (["shrink_and_perturb", "query_extension"], "query_extension freezes what was learned, and shrink_and_perturb"),
        (["task_adapters", "gdumb"], "task_adapters freezes what was learned, and gdumb begins every task with less"),
        (["weight_average", "drift_compensation"], "drift_compensation learns fits the weights .* and weight_average"),
        (["drift_compensation", "ewf"], "drift_compensation learns fits the weights that training ends with, and ewf"),
        ([], "no strategy: name at least one"),
    ],
)
def test_wrong_combinations(refs, message, monkeypatch):
    class Changing(Strategy):
        """Another loss."""

        changes_separation = True

    monkeypatch.setitem(STRATEGIES._components, "changing", STRATEGIES.get("finetune"))
    create = STRATEGIES.create
    monkeypatch.setattr(
        STRATEGIES, "create", lambda n, p=None, **w: Changing() if n == "changing" else create(n, p, **w)
    )
    with pytest.raises(ConfigError, match=message):
        _built(*refs)


def test_a_run_spec_with_a_list():
    spec = tiny_run_spec([{"name": "contavsep", "params": {"weight_mask": 1}}, "weight_average"])
    assert spec.strategy_name == "contavsep+weight_average"
    assert [ref.name for ref in spec.strategies] == ["contavsep", "weight_average"]
    again = validated(RunSpec, spec.model_dump(mode="json"), "again")
    assert again == spec
    one = tiny_run_spec(["lwf"])
    assert one.model_dump(mode="json")["strategy"] == {"name": "lwf", "params": {}}
    assert tiny_run_spec(("lwf", {"weight_mask": 1})).strategies[0].params == {"weight_mask": 1}
    with pytest.raises(ConfigError, match="strategy"):
        tiny_run_spec([])
    data = apply_settings({"strategy": ["lwf", "ewc"]}, ["strategy.ewc.params.weight=7"])
    assert data["strategy"] == ["lwf", {"name": "ewc", "params": {"weight": 7}}]
    with pytest.raises(UnknownNameError, match="no 'plop' in the list"):
        apply_settings({"strategy": ["lwf", "ewc"]}, ["strategy.plop.params.weight=7"])


def test_from_the_command_line(tone_store, tmp_path, monkeypatch, capsys):
    import yaml

    from support.tones import TINY_TRAIN

    monkeypatch.chdir(tmp_path)
    train = {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": train}))
    begin = ("train", tone_store, "--preset", "tiny.yaml", "--tasks", TASKS, "--out", "run", "--device", "cpu")
    assert run(*begin, "--strategy", "ewc+weight_fusion", "--set", "strategy.ewc.params.fisher_samples=1") == 0
    assert RunFolder("run").spec().strategy_name == "ewc+weight_fusion"
    assert RunFolder("run").task(0).record()["strategy"] == "ewc+weight_fusion"
    assert run("budget", "run") == 0
    assert "ewc+weight_fusion" in capsys.readouterr().out.replace("\n", "")
    assert run(*begin, "--out", "other", "--strategy", "ewc+nothing") == 2
    assert "no strategy named 'nothing'" in capsys.readouterr().err


class _Old(Strategy):
    """Of version 0.1."""

    def loss(self, student, teacher, step):
        return {}


class _OldHooks(Strategy):
    """Of version 0.1, with the base's loss."""

    def before_task(self, student, teacher, task):
        pass


class _OldStep(Strategy):
    """Of version 0.1."""

    def after_step(self, student):
        pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Old, r"loss\(student, teacher, step\) is now loss\(step\)"),
        (_OldHooks, r"its before_task is now begin_task\(ctx\); rename it"),
        (_OldStep, r"after_step\(student\) is now after_step\(step\)"),
    ],
)
def test_a_strategy_of_an_earlier_version_is_told_what_to_rename(kind, message):
    with pytest.raises(ConfigError, match=message):
        check_contract(kind(), "mine")


def test_every_strategy_that_is_registered_has_the_contract():
    for spec in STRATEGIES:
        check_contract(STRATEGIES.create(spec.name, dict(spec.example)), spec.name)

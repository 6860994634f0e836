"""Drift compensation: its term by hand, what learns and what stays, in a run and across a kill."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from avsep import build_separator
from avsep.environment import seeded
from avsep.errors import ConfigError
from avsep.evaluation.budget import estimate
from avsep.registry import ADAPTERS, STRATEGIES
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from avsep.spec import ComponentRef
from avsep.strategies import build_strategy
from avsep.strategies.base import Step, TaskContext
from avsep.types import AdapterPlace, AudioFeatures, Task
from support.components import random_batch
from support.continual_runs import SEPARATORS, differing, make_learner, resume_killed, trained, weights
from support.strategy_steps import CLASS_IDS, PARTS, gradients, make_step, student_and_teacher, with_teacher
from support.tones import TINY_FRONT_END

SEPARATOR = "iquery_projection"
PROJECTION = {
    f"audio_encoder.adapter.tasks.0.{name}.{kind}"
    for name in ("latent", "mask_features")
    for kind in ("weight", "bias")
}
QUERIES = "mask_decoder.decoder.class_queries"
SECOND = Task(1, ("c", "d"), ("a", "b", "c", "d"))


def _student_and_teacher():
    """Of two tasks and of one, with other weights each."""
    parts = {**PARTS, "adapter": "projection", "front_end": TINY_FRONT_END}
    student, teacher = (build_separator(**parts, classes=("a", "b"), seed=seed) for seed in (1, 2))
    student.grow(4, tuple("abcd"))
    return student.train(), teacher.requires_grad_(False).eval()


def _begun(strategy, student, teacher):
    shapes = {name: tuple(value.shape) for name, value in teacher.state_dict().items()}
    strategy.begin_task(TaskContext(SECOND, student, teacher, None, old_shapes=shapes))
    return student


# ------------------------------------------------------------------------------------------------------------- the term


class _Encoder:
    """In the place of a teacher whose encoder gives these features."""

    def __init__(self, audio):
        self.audio_encoder = lambda _: audio

    def train(self, mode):
        assert not mode


def test_the_term_by_hand():
    """Two channels at two points: 3 and 4 apart at one, 0 at the other; and of the latent one point, 6 and 8 apart."""
    places = [AdapterPlace(name, (2,), "map") for name in ("mask_features", "latent")]
    adapter = ADAPTERS.create("projection", places=places)
    adapter.add_task(torch.zeros(()))
    adapter.add_task(torch.zeros(()))  # the term is of the newest
    own = AudioFeatures(torch.tensor([[[[1.0, 2.0]], [[1.0, 5.0]]]]), torch.tensor([[[[1.0]], [[1.0]]]]))
    theirs = AudioFeatures(torch.tensor([[[[4.0, 2.0]], [[-3.0, 5.0]]]]), torch.tensor([[[[7.0]], [[9.0]]]]))
    student = SimpleNamespace(adapters=lambda: [adapter])
    spectrograms = SimpleNamespace(network_input=torch.zeros(1, 1, 1, 2))
    batch = SimpleNamespace(class_ids=torch.tensor([[2, 3]]))
    step = Step(batch, spectrograms, own, None, None, 2, student, _Encoder(theirs))
    step.__dict__["separation"] = torch.tensor(1.0)

    def term(weight):
        terms = STRATEGIES.create("drift_compensation", {"weight": weight}).loss(step)
        assert list(terms) == ["separation", "drift_compensation"]
        return terms["drift_compensation"]

    assert term(1.0).item() == pytest.approx((5 + 0) / 2 + 10)
    assert term(0.001).item() == pytest.approx(0.0125)
    newest = adapter.tasks[-1]["latent"]
    with torch.no_grad():  # (1, 1) -> (1 + 2 + 3, 1 + 7)
        newest.weight[:, :, 0, 0] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        newest.bias.copy_(torch.tensor([3.0, 7.0]))
    assert term(1.0).item() == pytest.approx(2.5 + 2**0.5)  # (6, 8) to (7, 9)
    term(1.0).backward()
    half = -(0.5**0.5)  # from the older to the newer of a point, over the norm
    assert newest.bias.grad.tolist() == pytest.approx([half, half])


def test_the_first_task_and_a_weight_of_zero_have_the_separation_loss_alone():
    student, teacher = _student_and_teacher()
    step = make_step(student)
    strategy = STRATEGIES.create("drift_compensation")
    assert strategy.needs_teacher
    assert strategy.first_task() == {}
    assert list(strategy.loss(with_teacher(step, None))) == ["separation"]
    off = STRATEGIES.create("drift_compensation", {"weight": 0.0})
    assert not off.needs_teacher
    assert list(off.loss(with_teacher(step, teacher))) == ["separation"]
    with pytest.raises(ConfigError, match="weight must be 0 or more, got -1"):
        STRATEGIES.create("drift_compensation", {"weight": -1})


def test_the_term_pulls_at_the_projection_and_the_audio_encoder():
    student, teacher = _student_and_teacher()
    strategy = STRATEGIES.create("drift_compensation")
    step = with_teacher(make_step(student), teacher)
    found = gradients(strategy.loss(step)["drift_compensation"], student)
    assert {name.split(".")[0] for name in found} == {"audio_encoder"}
    assert {name for name in found if ".adapter." in name} == PROJECTION
    assert any(name.startswith("audio_encoder.encoder.down.0") for name in found)


def test_the_teachers_features_are_those_of_its_newest_task():
    """With a third task: of a teacher that has a projection itself, what its encoder gives."""
    student, teacher = _student_and_teacher()
    teacher.grow(4, tuple("abcd"))
    student.grow(6, tuple("abcdef"))
    with torch.no_grad():
        for separator in (student, teacher):
            for parameter in separator.adapters()[0].tasks[0].parameters():
                parameter.fill_(0.3)
    strategy = STRATEGIES.create("drift_compensation", {"weight": 1.0})
    step = with_teacher(make_step(student, num_old=4), teacher)
    raw = teacher.audio_encoder.encoder(step.spectrograms.network_input)
    wanted = sum(
        (getattr(step.audio, name) - getattr(raw, name)).square().sum(dim=1).sqrt().mean()
        for name in ("mask_features", "latent")
    )
    torch.testing.assert_close(strategy.loss(step)["drift_compensation"], wanted)


# ---------------------------------------------------------------------------------------------------------- what learns


def test_what_learns():
    student, teacher = _student_and_teacher()
    _begun(STRATEGIES.create("drift_compensation"), student, teacher)
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    audio = {name for name, _ in student.named_parameters() if name.startswith("audio_encoder.")}
    assert learning == {*audio, QUERIES}
    student.grow(6, tuple("abcdef"))
    shapes = {
        name: (4, *p.shape[1:]) if "queries" in name else tuple(p.shape) for name, p in student.named_parameters()
    }
    third = Task(2, ("e", "f"), tuple("abcdef"))
    STRATEGIES.create("drift_compensation").begin_task(TaskContext(third, student, None, None, old_shapes=shapes))
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    new = {name.replace("tasks.0", "tasks.1") for name in audio}
    assert learning == {*new, QUERIES}


def test_at_the_start_of_a_task_nothing_has_drifted():
    """Student and teacher have equal encoders then, in the same mode: the term is 0, and its gradient finite."""
    teacher = build_separator(**{**SEPARATORS[SEPARATOR], "classes": ("a", "b")}, seed=1)
    student = build_separator(**{**SEPARATORS[SEPARATOR], "classes": ("a", "b")}, seed=1).train()
    make_step(student, num_old=0, class_ids=CLASS_IDS % 2)  # moves the running statistics
    teacher.load_state_dict(student.state_dict())
    student.grow(4, tuple("abcd"))
    strategy = STRATEGIES.create("drift_compensation")
    student = _begun(strategy, student, teacher.requires_grad_(False).eval()).train()
    term = strategy.loss(with_teacher(make_step(student), teacher))["drift_compensation"]
    assert term.item() == 0
    term.backward()
    assert all(p.grad.isfinite().all() for p in student.adapters()[0].newest())


@pytest.mark.parametrize("memory", ["none", "random_per_class"])
def test_two_tasks(memory, tone_store):
    strategy = ("drift_compensation", {"weight": 1.0})
    decay = {"weight_decay": 0.1}  # which moves old rows too, unless they are put back
    run = trained(tone_store, strategy, memory, separator=SEPARATOR, decoder=decay)
    separator = load_separator(run)
    assert separator.spec.task_sizes == (2, 2)
    before, after = weights(run, 0), weights(run, 1)
    new = after.keys() - before.keys()
    assert new == PROJECTION
    assert all(after[name].any() for name in new)  # which start as 0
    for name, value in before.items():
        if name.startswith("audio_encoder.") and not name.endswith(("running_mean", "running_var", "tracked")):
            assert not torch.equal(after[name], value), name
        else:
            rows = slice(len(value)) if name == QUERIES else ...
            assert torch.equal(after[name][rows], value), name
    start = load_separator(run, 0)
    with seeded(RunFolder(run).spec().train.seed, 1):  # as the run begins its second task
        start.grow(4, separator.classes)
    assert not (after[QUERIES][2:] == start.state_dict()[QUERIES][2:]).any()
    batch = replace(random_batch(separator), class_ids=torch.tensor([[0, 2], [3, 1]]))
    with torch.no_grad():
        found = separator.predict(batch).output.logits
        for parameter in separator.adapters()[0].parameters():
            parameter.zero_()
        unprojected = separator.predict(batch).output.logits
    changed = (found != unprojected).flatten(2).any(dim=2)
    assert changed.tolist() == [[True, False], [False, True]]


def test_a_killed_run_goes_on_to_the_same_weights(tone_store):
    strategy = ("drift_compensation", {"weight": 1.0})
    run = trained(tone_store, strategy, separator=SEPARATOR)
    resumed = resume_killed(tone_store, run, strategy, separator=SEPARATOR)
    assert differing(weights(run), weights(resumed)) == []


def test_the_weight_acts_on_the_encoder(tone_store):
    one, off = (
        weights(trained(tone_store, ("drift_compensation", {"weight": w}), separator=SEPARATOR)) for w in (1.0, 0.0)
    )
    changed = differing(one, off)
    assert "audio_encoder.encoder.up.6.weight" in changed
    assert not any(off[name].any() for name in off if ".adapter." in name)  # the identity still


def test_training_learns_to_lead_a_drift_back():
    """The last layer has turned: the strategy's own steps on the projection alone give the old features again."""
    student, teacher = _student_and_teacher()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in dict(teacher.named_parameters()) and name.startswith("audio_encoder."):
                parameter.copy_(teacher.get_parameter(name))
        last = student.audio_encoder.encoder.up[6].weight
        drift = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        last.copy_(torch.einsum("ij,jklm->iklm", drift, last))
    strategy = STRATEGIES.create("drift_compensation", {"weight": 1.0})
    _begun(strategy, student, teacher)
    student.audio_encoder.encoder.requires_grad_(False)
    optimizer = torch.optim.Adam(list(student.adapters()[0].newest()), lr=0.05)
    found = []
    for _ in range(60):
        optimizer.zero_grad()
        term = strategy.loss(with_teacher(make_step(student), teacher))["drift_compensation"]
        term.backward()
        optimizer.step()
        found.append(term.item())
    assert found[-1] < 0.2 * found[0]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_separator_without_projections_is_refused():
    student, _ = student_and_teacher()
    line = "strategy 'drift_compensation' trains projections of features, and the separator has none: set "
    for separator in (student, make_learner("task_adapters", separator="iquery_adapters").separator):
        with pytest.raises(ConfigError) as caught:
            STRATEGIES.create("drift_compensation").check(separator)
        assert str(caught.value) == f"{line}separator.adapter=projection"
    learner = make_learner("drift_compensation", separator=SEPARATOR)
    learner.strategy.check(learner.separator)


def test_task_adapters_has_no_use_for_projections():
    learner = make_learner("drift_compensation", separator=SEPARATOR)
    with pytest.raises(ConfigError, match=r"adapters that change weights, .*: use drift_compensation, or another"):
        STRATEGIES.create("task_adapters").check(learner.separator)


def test_what_unlearns_is_refused_beside_it():
    with pytest.raises(ConfigError, match="drift_compensation freezes what was learned, and gdumb begins every task"):
        build_strategy([ComponentRef(name="drift_compensation"), ComponentRef(name="gdumb")])


def test_the_budget_counts_the_projections(tone_store):
    run = trained(tone_store, ("drift_compensation", {"weight": 1.0}), separator=SEPARATOR)
    for task in (0, 1):
        separator = load_separator(run, task)
        expected = sum(p.numel() * p.element_size() for p in separator.parameters())
        assert estimate(RunFolder(run).spec(), tone_store, task=task).parameters == expected

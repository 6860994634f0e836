"""Where queries of new classes begin: near those of old classes that look alike, at a vector of their name, or at the
query of their family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.separator import build_separator
from avsep.strategies import Composition
from avsep.strategies.base import TaskContext
from avsep.strategies.similar_queries import class_means, similar_query
from avsep.strategies.text_queries import projection
from avsep.types import Task
from support.continual_runs import (
    SEPARATORS,
    differing,
    first_task,
    make_learner,
    resume_killed,
    train,
    trained,
    weights,
)
from support.strategy_steps import CLASS_IDS, GivenData, make_step, student_and_teacher
from support.tones import TINY_FRONT_END, stream_of

TASK = Task(1, ("peep", "whirr"), ("ding", "hum", "peep", "whirr"))
FIRST = Task(0, ("ding", "hum"), ("ding", "hum"))
QUERIES = "mask_decoder.class_queries"
FAMILIES = {"ding": ["peep"], "peep": ["whirr"]}
VECTORS = STRATEGIES.get("text_queries").example["vectors"]


def test_a_similar_query_by_hand():
    """exp(9.6) : exp(12.8) = .0392 : .9608; of length 1 that is (.0407, .9992)."""
    mean = torch.tensor([0.6, 0.8])
    found = similar_query(16 * mean, mean, 16 * torch.eye(2), torch.eye(2), 0.1)
    torch.testing.assert_close(found, torch.tensor([8.847, 13.332]), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.norm(), torch.tensor(16.0))
    assert torch.equal(similar_query(16 * mean, mean, 16 * torch.eye(2), torch.eye(2), 0), 16 * mean)
    alone = similar_query(16 * mean, mean, 5 * torch.eye(2), torch.eye(2), 1.0)
    torch.testing.assert_close(alone, 16 * torch.tensor([0.0407, 0.9992]), atol=2e-3, rtol=0)


def test_means_are_those_of_the_sources_of_a_class():
    student, _ = student_and_teacher()
    batch = make_step(student).batch
    found = class_means(student, [batch, batch], 5)
    assert student.training
    student.eval()
    features = student.encode_visual(batch.visual).object
    for number in range(4):
        torch.testing.assert_close(found[number], features[number == CLASS_IDS].mean(dim=0))
    assert found[4].isnan().all()


def test_new_queries_are_set_once_and_old_ones_stay():
    student, _ = student_and_teacher()
    strategy = STRATEGIES.create("similar_queries", {"blend": 0.5, "mixtures": 7})
    data = GivenData([make_step(student).batch])
    rows = student.mask_decoder.class_queries
    before = rows.detach().clone()
    strategy.begin_task(TaskContext(FIRST, student, None, data))  # nothing is known to be like
    assert torch.equal(rows, before)
    learned = GivenData([make_step(student, class_ids=CLASS_IDS % 2).batch])
    strategy.after_task(TaskContext(FIRST, student, None, learned))
    state = strategy.state_dict()
    assert state["means"].dtype == torch.float16
    assert state["means"].shape == (2, 16)
    resumed = STRATEGIES.create("similar_queries", {"blend": 0.5, "mixtures": 7})
    resumed.load_state_dict(state)
    resumed.begin_task(TaskContext(TASK, student, None, data, resumed=True))
    assert torch.equal(rows, before)
    resumed.begin_task(TaskContext(TASK, student, None, data))
    means = class_means(student, [make_step(student).batch], 4)
    for number in (2, 3):
        expected = similar_query(before[number], means[number], before[:2], state["means"], 0.5)
        torch.testing.assert_close(rows[number], expected)
        assert not torch.allclose(rows[number], before[number])
    assert torch.equal(rows[:2], before[:2])
    assert rows.requires_grad
    assert data.asked == learned.asked == [(7, 8)]
    resumed.after_task(TaskContext(TASK, student, None, data))
    assert torch.equal(resumed.state_dict()["means"][:2], state["means"])
    resumed.after_task(TaskContext(TASK, student, None, data, is_last=True))
    assert resumed.state_dict() == {}


def test_text_queries_are_projections_of_the_vectors(tmp_path):
    save_file({name: torch.tensor(v, dtype=torch.float32) for name, v in VECTORS.items()}, tmp_path / "t.safetensors")
    inline, from_file = (
        STRATEGIES.create("text_queries", {"vectors": v}) for v in (VECTORS, str(tmp_path / "t.safetensors"))
    )
    assert inline.first_task() == from_file.first_task() != {}
    student, _ = student_and_teacher()
    rows = student.mask_decoder.class_queries
    before = rows.detach().clone()
    from_file.begin_task(TaskContext(TASK, student, None, None))
    assert torch.equal(rows[:2], before[:2])  # of the task before
    mean = torch.tensor([1.0, 0.75, 1.0])
    for number, name in ((2, "peep"), (3, "whirr")):
        target = projection(16, 3) @ (torch.tensor(VECTORS[name], dtype=torch.float32) - mean)
        torch.testing.assert_close(rows[number], before[number].norm() * target / target.norm())
    after = rows.detach().clone()
    for frozen in (False, True):
        strategy = STRATEGIES.create("text_queries", {"vectors": VECTORS, "frozen": frozen})
        strategy.begin_task(TaskContext(TASK, student, None, None, resumed=True))
        assert torch.equal(rows, after)
        assert rows.requires_grad is not frozen


def test_family_queries_are_those_of_families_learned_before():
    strategy = STRATEGIES.create("family_queries", {"families": FAMILIES})
    assert strategy.first_task() == {}
    student, _ = student_and_teacher()
    rows = student.mask_decoder.class_queries
    before = rows.detach().clone()
    strategy.begin_task(TaskContext(FIRST, student, None, None))
    strategy.begin_task(TaskContext(TASK, student, None, None, resumed=True))
    assert torch.equal(rows, before)
    strategy.begin_task(TaskContext(TASK, student, None, None))
    assert torch.equal(rows[2], before[0])  # peep's is ding's
    assert torch.equal(rows[[0, 1, 3]], before[[0, 1, 3]])  # whirr's family comes with it
    assert rows.requires_grad


def test_the_projection_keeps_angles():
    torch.testing.assert_close(projection(3, 5) @ projection(3, 5).T, torch.eye(3))
    torch.testing.assert_close(projection(5, 3).T @ projection(5, 3), torch.eye(3))
    assert torch.equal(projection(3, 5), projection(3, 5))


def test_wrong_settings_and_separators(tone_store, tmp_path):
    (tmp_path / "text").write_text("no tensors")
    for name, params, message in (
        ("similar_queries", {"blend": 2}, "blend must be between 0 and 1, got 2"),
        ("similar_queries", {"mixtures": 0}, "mixtures must be at least 1, got 0"),
        ("family_queries", {"families": {}}, "must name at least one family"),
        ("family_queries", {"families": {"a": "bc"}}, "the classes of 'a' must be a list of names, got 'bc'"),
        ("family_queries", {"families": {"a": ["c"], "b": ["c"]}}, "class 'c' is in two, 'a' and 'b'"),
        ("text_queries", {"vectors": {"a": [1], "b": [1, 2]}}, "all of one length, got shapes"),
        ("text_queries", {"vectors": {}}, "one for each class"),
        ("text_queries", {"vectors": {"a": [float("nan")]}}, "must be finite"),
        ("text_queries", {"vectors": str(tmp_path / "none")}, "there is no file /"),
        ("text_queries", {"vectors": "elsewhere/none"}, f"there is no file {Path.cwd() / 'elsewhere' / 'none'}"),
        ("text_queries", {"vectors": "~/none.safetensors"}, f"there is no file {Path.home()}"),
        ("text_queries", {"vectors": str(tmp_path)}, "is no safetensors file"),
        ("text_queries", {"vectors": [1, 2]}, "must be the path of a file, or numbers by class name, got"),
        ("text_queries", {"vectors": {"a": "high"}}, "the vector of class 'a' must be numbers, got 'high'"),
        ("text_queries", {"vectors": str(tmp_path / "text")}, "is no safetensors file"),
    ):
        with pytest.raises(ConfigError, match=message):
            STRATEGIES.create(name, params)
    student, _ = student_and_teacher()
    strategy = STRATEGIES.create("text_queries", {"vectors": {"ding": [1], "hum": [2]}})
    message = "has no vector of 2 of the 4 classes, such as 'peep': add them .* those of ding, hum"
    for ask in (
        lambda: strategy.begin_task(TaskContext(TASK, student, None, None)),
        lambda: Composition({"text_queries": strategy}).check_classes(TASK.seen),
        # a later task's, before anything is trained
        lambda: make_learner(("text_queries", {"vectors": {"ding": [1], "hum": [2]}})).fit(
            stream_of(tone_store), tmp_path / "run", progress=False
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            ask()
    assert not (tmp_path / "run").exists()
    for families, missing in (({"ding": ["plop"]}, "plop"), ({"clang": ["hum"]}, "clang")):
        with pytest.raises(ConfigError, match=f"'{missing}' is no class of any task: correct families"):
            STRATEGIES.create("family_queries", {"families": families}).check_classes(TASK.seen)
    parts = {k: v for k, v in SEPARATORS["coseparation"].items() if k != "front_end"}
    without = build_separator(**parts, front_end=TINY_FRONT_END, num_classes=2)
    for name, params in (
        ("similar_queries", {}),
        ("text_queries", {"vectors": VECTORS}),
        ("family_queries", {"families": FAMILIES}),
    ):
        with pytest.raises(ConfigError, match="mask decoder 'conditioned_unet' has none: use query_transformer, or"):
            STRATEGIES.create(name, params).check(without)


def test_a_run_begins_at_similar_queries_and_goes_on_after_a_kill(tone_store):
    strategy = ("similar_queries", {"blend": 0.9, "mixtures": 4})
    run = trained(tone_store, strategy)
    assert differing(weights(run), weights(resume_killed(tone_store, run, strategy))) == []
    plain = trained(tone_store, "finetune")
    assert first_task(tone_store, strategy) == first_task(tone_store, "finetune")
    assert QUERIES in differing(weights(run), weights(plain))


def test_a_run_begins_at_family_queries_and_goes_on_after_a_kill(tone_store):
    strategy = ("family_queries", {"families": FAMILIES})
    run = trained(tone_store, strategy)
    assert differing(weights(run), weights(resume_killed(tone_store, run, strategy))) == []
    plain = trained(tone_store, "finetune")
    assert first_task(tone_store, strategy) == first_task(tone_store, "finetune")
    own, other = weights(run)[QUERIES], weights(plain)[QUERIES]
    assert (own[2] - own[0]).norm() < 0.5 * (other[2] - other[0]).norm()  # peep's and ding's


@pytest.mark.slow
def test_frozen_text_queries_stay_where_they_are(tone_store, tmp_path):
    run = train(tone_store, tmp_path / "run", ("text_queries", {"vectors": VECTORS, "frozen": True}))
    first, last = weights(run, 0)[QUERIES], weights(run)[QUERIES]
    assert torch.equal(first, last[:2])
    mean = torch.tensor([1.0, 0.75, 1.0])
    for row, vector in zip(last, VECTORS.values(), strict=True):
        target = projection(16, 3) @ (torch.tensor(vector, dtype=torch.float32) - mean)
        torch.testing.assert_close(row / row.norm(), target / target.norm())

"""A finished run learns more: as if its tasks had been known, from a memory that it carries, killed at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avsep.data.store import Store
from avsep.errors import AvsepError, ConfigError, DataError, RunError
from avsep.evaluation.budget import budget_of
from avsep.runs.folder import RunFolder
from avsep.separator import load_separator
from avsep.training import extending
from avsep.training.extending import begin, carry, extend, forget, kept_exemplars
from avsep.training.validation import Validation
from support.continual_runs import make_learner
from support.tones import TINY_TASKS, dies_at_step, stream_of

NEW = TINY_TASKS[1]
CROPS = ("random_per_class", {"per_class": 2, "keep": "clip"})
# (strategy, memory): what is kept from task to task differs, and so does what the last task leaves out
EXTENDED = [
    ("contavsep", CROPS),
    ([("si", {"weight": 1e3}), ("ewf", {})], "none"),
    *(
        pytest.param(strategy, memory, marks=pytest.mark.slow)
        for strategy, memory in (
            ("contavsep", "random_per_class"),
            ("magmax", "none"),
            ([("ewf", {}), ("ewc", {"fisher_samples": 2})], "none"),
            (("ewc", {"fisher_samples": 2}), ("reservoir", {"total": 3})),
            (("derpp", {"per_class": 2, "batch_size": 2}), "random_per_class"),
            (("slot_span", {"mixtures": 16}), "none"),
            (("similar_queries", {"mixtures": 16}), "herding"),
            (("weight_average", {"every": 1, "decay": 0.5, "batch_norm_mixtures": 4}), "none"),
            (("perturb_and_merge", {"fisher_samples": 3}), "none"),
            (("prototype_relations", {"mixtures": 16}), "none"),
            ("ewf", CROPS),
            ("joint", "none"),
            ("gdumb", "random_per_class"),
        )
    ),
]


@pytest.fixture(autouse=True)
def _unscored(monkeypatch):
    monkeypatch.setattr(Validation, "score", lambda self, student: (0.0, []))
    monkeypatch.setattr(Validation, "log_media", lambda *_, **__: None)


@pytest.fixture
def unchanged(monkeypatch):
    """No class is scored."""
    monkeypatch.setattr(extending, "_changes", lambda *_: ())


def first_run(store, out, strategy="contavsep", memory=CROPS):
    """A run of the first task alone, trained once."""
    kept = store.parent / f"first-{strategy}-{memory}"
    if not kept.exists():
        make_learner(strategy, memory).fit(stream_of(store, TINY_TASKS[:1]), kept, progress=False)
    return shutil.copytree(kept, out)


def knew(store, strategy="contavsep", memory=CROPS):
    """A run that knew both tasks, trained once."""
    kept = store.parent / f"knew-{strategy}-{memory}"
    if not kept.exists():
        make_learner(strategy, memory).fit(stream_of(store), kept, progress=False, open_ended=True)
    return kept


def left(run, task=1):
    """The separator, the exemplars and what the strategy keeps after a task."""
    folder = RunFolder(run).task(task)
    kept = load_file(folder.strategy_file) if folder.strategy_file.is_file() else {}
    kept = {name: value for name, value in kept.items() if "video_ids" not in name}  # places in the store
    return load_file(folder.separator / "model.safetensors"), folder.record()["exemplars"], kept


def same(one, other):
    assert one[1] == other[1]
    for a, b in ((one[0], other[0]), (one[2], other[2])):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(("strategy", "memory"), EXTENDED)
def test_it_learns_as_if_the_tasks_had_been_known(strategy, memory, tone_store, tmp_path, unchanged):
    run = first_run(tone_store, tmp_path / "run", strategy, memory)
    (run / "notes.txt").write_text("mine")
    extend(run, tone_store, NEW, device="cpu", progress=False)
    same(left(run), left(knew(tone_store, strategy, memory)))
    assert (run / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_memory_is_in_the_run_and_as_large_as_is_counted(tone_store, tmp_path, unchanged):
    store = shutil.copytree(tone_store, tmp_path / "store")
    run = first_run(tone_store, tmp_path / "run")
    assert budget_of(run, 0).exemplar_bytes == 0  # nothing is chosen after a last task
    carry(run, store=store, device="cpu", progress=False)
    budget = budget_of(run, 0)
    found = kept_exemplars(run)[1]
    assert budget.exemplars == sum(len(one.ids) for one in found) == 4
    assert sum(one.bytes for one in found) == budget.exemplar_bytes > 0
    moved = tmp_path / "moved"
    run.rename(moved)
    shutil.rmtree(store)
    assert str(store) not in RunFolder(moved).spec_file.read_text()
    extend(moved, tone_store, NEW, device="cpu", progress=False)
    same(left(moved), left(knew(tone_store)))
    budget = budget_of(moved, 1)
    assert sum(one.bytes for one in kept_exemplars(moved)[1]) == budget.exemplar_bytes
    assert budget_of(moved, 0).exemplar_bytes == budget_of(knew(tone_store), 0).exemplar_bytes


def test_what_is_beyond_a_kept_crop_is_not_at_hand(tone_store, tmp_path):
    run = first_run(tone_store, tmp_path / "run")
    carry(run, device="cpu", progress=False)
    store, whole = Store.open(RunFolder(run).memory, verify=True), Store.open(tone_store)
    clip = store.select(split="train")[0]
    start, count = store.manifest["clips"][clip.index]["parts"]["audio"][0]
    original = whole.clip(clip.id)
    assert clip.samples == original.samples > count
    assert (store.read_pcm(clip, start, count) == whole.read_pcm(original, start, count)).all()
    with pytest.raises(DataError, match="only the crops of its exemplars"):
        store.read_audio(clip)


def test_a_class_is_forgotten(tone_store, tmp_path, unchanged):
    run = first_run(tone_store, tmp_path / "run")
    carry(run, device="cpu", progress=False)
    before = left(run, 0)
    assert forget(run, "hum") == 2
    assert [(one.class_name, len(one.ids)) for one in kept_exemplars(run)[1]] == [("ding", 2), ("hum", 0)]
    store = Store.open(RunFolder(run).memory)
    assert store.select(classes=["hum"], split="train") == []
    assert list(store.path.glob("audio/hum-train*")) == []
    after = left(run, 0)
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    with pytest.raises(ConfigError, match="knows no class 'tuba'"):
        forget(run, "tuba")
    extend(run, tone_store, NEW, device="cpu", progress=False)
    assert set(RunFolder(run).task(1).record()["exemplars"]) == {"ding", "peep", "whirr"}


def test_too_great_a_loss_is_refused_and_taken_with_a_larger_bound(tone_store, tmp_path):
    run = first_run(tone_store, tmp_path / "run")
    files = sorted((p.relative_to(run), p.read_bytes()) for p in run.rglob("*") if p.is_file())
    found = extend(run, tone_store, NEW, max_loss_db=-1000.0, device="cpu", progress=False)
    assert found.lost == ("ding", "hum")
    assert files == sorted((p.relative_to(run), p.read_bytes()) for p in run.rglob("*") if p.is_file())
    again = extend(run, tone_store, NEW, max_loss_db=None, device="cpu", progress=False)
    assert again.changes == found.changes
    assert [c.class_name for c in again.changes] == ["ding", "hum", "peep", "whirr"]
    assert again.changes[0].change is not None
    assert again.changes[2].before is None
    assert RunFolder(run).spec().tasks == (("ding", "hum"), ("peep", "whirr"))


@pytest.mark.parametrize(
    "moment", ["training", *(pytest.param(m, marks=pytest.mark.slow) for m in ("carrying", "moving", "moved"))]
)
def test_it_goes_on_after_a_kill(moment, tone_store, tmp_path, unchanged, monkeypatch):
    run = first_run(tone_store, tmp_path / "run")
    with monkeypatch.context() as patched:

        def dies(*_):
            raise KeyboardInterrupt

        if moment == "training":
            dies_at_step(patched, 3)
        elif moment == "carrying":
            patched.setattr(extending, "_weigh", dies)
        elif moment == "moving":
            patched.setattr(extending, "exchange", dies)
        else:
            patched.setattr(extending._Work, "clean", dies)
        with pytest.raises(KeyboardInterrupt):
            extend(run, tone_store, NEW, device="cpu", progress=False)
    assert len(RunFolder(run).finished_tasks()) == (2 if moment == "moved" else 1)
    assert budget_of(run).model > 0
    extend(run, tone_store, NEW, device="cpu", progress=False)
    same(left(run), left(knew(tone_store)))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("first", "then", "settings", "is_carried"),
    [
        ("finetune", "ewc+ewf", ["strategy.ewc.params.fisher_samples=2"], False),
        pytest.param("contavsep", "si", ["strategy.params.weight=1000"], True, marks=pytest.mark.slow),
    ],
)
def test_another_strategy_and_memory_go_on(first, then, settings, is_carried, tone_store, tmp_path, unchanged):
    run = first_run(tone_store, tmp_path / "run", first, CROPS if is_carried else "none")
    before = left(run, 0)
    if is_carried:
        carry(run, device="cpu", progress=False)
    settings = [*settings, "memory.params.per_class=2"]
    how = {"strategy": then, "memory": "random_per_class", "settings": settings}
    extend(run, tone_store, NEW[:1], device="cpu", progress=False, **how)
    spec = RunFolder(run).spec()
    assert (spec.strategy_name, spec.memory.name) == (then, "random_per_class")
    kept, after = left(run, 0), left(run)
    assert all(torch.equal(kept[0][name], value) for name, value in before[0].items())
    assert kept[2].keys()  # what the new strategy goes on from
    assert {name: len(of) for name, of in after[1].items()} == {"ding": 2, "hum": 2, "peep": 2}
    with pytest.raises(ConfigError, match="learns from all recordings"):
        extend(run, tone_store, NEW[1:], strategy="joint", device="cpu", progress=False)


@pytest.mark.slow
def test_it_goes_on_after_kills_at_random(tone_store, tmp_path, unchanged):
    """As it is killed by the system: in processes of its own, at any moment."""
    run = first_run(tone_store, tmp_path / "run")
    whole = knew(tone_store)
    moments = np.random.default_rng(5)
    kills, places = 0, set()
    while True:
        child = os.fork()
        if child == 0:
            try:
                extend(run, tone_store, NEW, device="cpu", progress=False)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.02, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder, work = RunFolder(run), tmp_path / ".run.learning"
        places.add(tuple(sorted(p.name for p in work.rglob("*") if p.is_dir())) if work.is_dir() else ())
        same((*left(run, 0)[:1], [], {}), (*left(whole, 0)[:1], [], {}))
        assert all(
            torch.isfinite(p).all() for p in load_separator(folder, task=folder.finished_tasks()[-1]).parameters()
        )
        if len(folder.finished_tasks()) == 2:
            break
        kills += 1
    same(left(run), left(whole))
    print(f"{kills} kills, in {len(places)} places")


def test_what_cannot_be_learned_is_said(tone_store, tmp_path):
    run = first_run(tone_store, tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, classes, kind, text in (
        (tone_store, ["ding"], ConfigError, "knows 'ding' already"),
        (tone_store, ["tuba"], AvsepError, "no class 'tuba'"),
        (tone_store, [], ConfigError, "give the classes"),
        (empty, ["tuba"], DataError, "no folder 'tuba' with recordings"),
        (tmp_path / "nowhere", ["tuba"], DataError, "no store or folder"),
    ):
        with pytest.raises(kind, match=text):
            extend(run, source, classes, device="cpu", progress=False)
    for setting in ("separator.num_classes=2", "train.seed=4"):
        with pytest.raises(ConfigError, match=r"only train\.\*"):
            extend(run, tone_store, NEW, settings=[setting], device="cpu", progress=False)
    with pytest.raises(RunError, match="does not carry"):
        forget(run, "ding")
    shutil.rmtree(run / "state")
    with pytest.raises(AvsepError, match="is gone"):
        extend(run, tone_store, NEW, device="cpu", progress=False)
    shutil.rmtree(run / "tasks" / "00")
    with pytest.raises(RunError, match="has finished 0 of its 1"):
        extend(run, tone_store, NEW, device="cpu", progress=False)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_saved_separator_becomes_a_run_that_learns(tone_store, tmp_path, unchanged):
    saved = first_run(tone_store, tmp_path / "first") / "tasks" / "00" / "separator"
    before = load_file(saved / "model.safetensors")
    train = RunFolder(tmp_path / "first").spec().train
    run = begin(saved, tone_store, tmp_path / "run", train=train, strategy="contavsep", memory=CROPS, progress=False)
    assert [len(one.ids) for one in kept_exemplars(run)[1]] == [2, 2]
    extend(run.path, tone_store, NEW, device="cpu", progress=False)
    assert load_separator(run).classes == ("ding", "hum", "peep", "whirr")
    after = load_file(saved / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(ConfigError, match="holds something already"):
        begin(saved, tone_store, run.path, train=train, progress=False)
    only = Store.open(tone_store)
    only.classes = ("ding",)
    with pytest.raises(DataError, match="no recordings of 'hum'"):
        begin(saved, only, tmp_path / "other", train=train, progress=False)
    assert not (tmp_path / "other").exists()

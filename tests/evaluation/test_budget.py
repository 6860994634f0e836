"""Bytes that persist between tasks, and methods aligned to one budget of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from avsep.cli import main
from avsep.data.store import Store, StoreWriter, add_features
from avsep.errors import ConfigError, DataError
from avsep.evaluation.budget import ExemplarBytes, _Estimator, align, budget_of, estimate, exemplar_bytes
from avsep.runs.folder import RunFolder
from avsep.spec import ComponentRef, FrontEndSpec, RunSpec, load_preset, validated
from avsep.strategies import FineTune
from avsep.types import VisualSource
from support.tones import RATE, TINY_FRONT_END, stream_of, tiny_learner, tiny_run_spec

CLIP_VISION = VisualSource("object", "features", name="clip_vit_b32", dim=512, frames=3)
VIDEOMAE = VisualSource("motion", "features", name="videomae_base", dim=768)
FRAMES = (VisualSource("object", "frames", frames=3), VisualSource("motion", "frames"))
FRONT_END = FrontEndSpec(**TINY_FRONT_END)
# of a clip of the tone store: 1.5 s, two object frames and twelve motion frames
RECORDING = ExemplarBytes(2 * 16537, 2 * 3 * 32 * 32, 12 * 16 * 16)
CROP = ExemplarBytes(2 * 8191, 2 * 3 * 32 * 32, 6 * 16 * 16)


def _spec(strategy="finetune", memory="none", **train):
    return tiny_run_spec(strategy, memory, **train)


@pytest.fixture(scope="module")
def minutes(tmp_path_factory):
    """A store of one recording of three minutes with CLIP and VideoMAE features."""
    path = tmp_path_factory.mktemp("minutes") / "store"
    with StoreWriter(path, classes=["flute"], sample_rate_hz=RATE, origin={}) as writer:
        writer.write_clip("flute", "flute", "train", np.zeros(180 * RATE, np.int16))
        writer.finish(["flute"])
    made = add_features(Store.open(path), "clip_vit_b32", "object", lambda clip: np.zeros((180, 512), np.float32))
    return add_features(made, "videomae_base", "motion", lambda clip: np.zeros((768, 8), np.float32))


def test_the_published_model_and_exemplars(minutes):
    """147,224,200 bytes of parameters and 31 kB of buffers; a three-minute recording of 4.17 MB, a crop of 0.146 MB:
    a model is worth 35 of the one or 1,005 of the other. ``avsep.separator.convert`` says which parameters are dead."""
    preset = load_preset("iquery")
    spec = validated(RunSpec, {"separator": preset["separator"], "strategy": "finetune"}, "test").separator
    separator = _Estimator(minutes, None, "largest")._separator(spec.of_classes([f"c{i}" for i in range(20)]))
    parameters = 4 * sum(p.numel() for p in separator.parameters())
    assert parameters + 4 * 1_318_400 == 147_224_200
    state = separator.state_dict()
    assert sum(v.numel() * v.element_size() for v in state.values()) - parameters == 31_336
    clip, front_end = minutes.clips[0], FrontEndSpec()
    recording = exemplar_bytes(minutes, clip, (CLIP_VISION, VIDEOMAE), front_end)
    crop = exemplar_bytes(minutes, clip, (CLIP_VISION, VIDEOMAE), front_end, keep="clip")
    assert recording == ExemplarBytes(22_050 * 180, 1_024 * 180, 12_288)
    assert crop == ExemplarBytes(131_070, 3_072, 12_288)
    assert (147_224_200 // recording.total, 147_224_200 // crop.total) == (35, 1005)
    assert 15 * recording.total == pytest.approx(63e6, rel=0.01)
    assert 15 * crop.total == pytest.approx(2.2e6, rel=0.01)
    assert exemplar_bytes(minutes, clip, (CLIP_VISION,), front_end, keep="id").total == 0
    with pytest.raises(DataError, match="has no object frames"):
        exemplar_bytes(minutes, clip, FRAMES, front_end)


def test_exemplars_of_frame_encoders(store):
    clip = store.clip("ding-train-0")
    assert exemplar_bytes(store, clip, FRAMES, FRONT_END) == RECORDING
    assert exemplar_bytes(store, clip, FRAMES, FRONT_END, keep="clip") == CROP
    assert exemplar_bytes(store, clip, FRAMES[:1], FRONT_END).motion == 0
    longer = FrontEndSpec(**{**TINY_FRONT_END, "clip_samples": 4 * RATE})  # than the clip, which is kept whole then
    assert exemplar_bytes(store, clip, FRAMES, longer, keep="clip") == RECORDING


def test_a_run_and_its_estimate(tone_run, store):
    found = budget_of(tone_run)
    state = load_file(tone_run / "tasks" / "00" / "separator" / "model.safetensors")
    assert found.task == 0  # what the second task starts from
    assert found.model == sum(v.numel() * v.element_size() for v in state.values())
    assert found.buffers == sum(
        v.numel() * v.element_size() for k, v in state.items() if "running" in k or "num_batches" in k
    )
    assert (found.exemplars, found.audio, found.object, found.motion) == (
        2, 2 * RECORDING.audio, 2 * RECORDING.object, 2 * RECORDING.motion
    )  # fmt: skip
    assert found.strategy_state == 0
    assert found.total == found.model + 2 * RECORDING.total
    assert found.peak_extra == found.model  # the teacher
    assert found.plain()["total"] == found.total
    for sizes in ("largest", "mean"):
        guess = estimate(RunFolder(tone_run).spec(), store, sizes=sizes)
        assert guess.plain() == {**found.plain(), "basis": sizes}
    later = budget_of(tone_run, 1, store=store)
    assert later.exemplars == 2
    assert later.parameters - found.parameters == 2 * 16 * 4  # two rows more of queries, 16 wide
    assert estimate(RunFolder(tone_run).spec(), store, task=1).total == later.total


def test_what_the_strategy_keeps_is_counted(store, tone_store, tmp_path):
    ewc = {"name": "ewc", "params": {"fisher_samples": 2}}
    memory = {"name": "random_per_class", "params": {"per_class": 2, "keep": "clip"}}
    stream = stream_of(tone_store)
    learner = tiny_learner(ewc, memory, epochs=1, steps_per_epoch=1)
    learner.fit(stream, tmp_path / "run", progress=False)
    found = budget_of(tmp_path / "run")
    kept = load_file(tmp_path / "run" / "tasks" / "00" / "strategy.safetensors")
    assert found.strategy_state == sum(4 * v.numel() for v in kept.values()) > found.parameters / 2
    assert (found.exemplars, found.exemplar_bytes) == (4, 4 * CROP.total)
    assert found.total == found.model + found.strategy_state + 4 * CROP.total
    assert budget_of(tmp_path / "run", 1).strategy_state == 0  # nothing follows
    assert estimate(RunFolder(tmp_path / "run").spec(), store).plain() == {**found.plain(), "basis": "largest"}


def test_ids_cost_nothing_and_joint_training_keeps_everything(store):
    ids = estimate(_spec("finetune", {"name": "reservoir", "params": {"total": 4, "keep": "id"}}), store)
    assert (ids.exemplars, ids.exemplar_bytes, ids.peak_extra) == (4, 0, 0)
    joint = estimate(_spec("joint"), store, task=1)
    assert (joint.exemplars, joint.exemplar_bytes) == (12, 12 * RECORDING.total)
    assert estimate(_spec("joint"), store).exemplars == 6


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A store whose clips differ in length: a, b, c and d with 3, 4, 5 and 3 clips of 1, 2, ... seconds."""
    path = tmp_path_factory.mktemp("uneven") / "store"
    order = []
    with StoreWriter(path, classes=list("abcd"), sample_rate_hz=RATE, origin={}) as writer:
        for name, count in zip("abcd", (3, 4, 5, 3), strict=True):
            for k in range(count):
                order.append(f"{name}{k}")
                frame, motion = np.zeros((1, 3, 8, 8), np.uint8), np.zeros((2, 1, 8, 8), np.uint8)
                audio = np.zeros((k + 1) * RATE, np.int16)
                writer.write_clip(order[-1], name, "train", audio, object_frames=frame, motion_frames=motion)
        writer.finish(order)
    return Store.open(path)


def _uneven(memory, **more):
    return _spec(memory=memory).model_copy(update={"tasks": (("a",), ("b", "c"), ("d",)), **more})


@pytest.mark.parametrize(
    ("memory", "largest", "mean"),
    [
        ({"name": "random_per_class", "params": {"per_class": 2}}, (3 + 2) + (4 + 3) + (5 + 4), 2 * (2 + 2.5 + 3)),
        # 12 clips in all, and five of them, whichever
        ({"name": "reservoir", "params": {"total": 5}}, 5 + 4 + 4 + 3 + 3, 5 * (6 + 10 + 15) / 12),
        # after task 1 a has 2, b 2, c 1
        ({"name": "class_balanced", "params": {"total": 5}}, (3 + 2) + (4 + 3) + 5, 2 * 2 + 2 * 2.5 + 3),
        ({"name": "hardest", "params": {"per_class": 4, "short_class": "all"}}, 6 + 10 + 14, 6 + 10 + 12),
    ],
)
def test_estimates_of_uneven_clips(memory, largest, mean, uneven):
    """In seconds of sound; the estimate by the largest is the most that any draw could keep."""
    spec = validated(RunSpec, {**_uneven("none").model_dump(), "memory": memory}, "test")
    assert estimate(spec, uneven).audio == largest * 2 * RATE
    assert estimate(spec, uneven, sizes="mean").audio == pytest.approx(mean * 2 * RATE, abs=1)
    assert estimate(spec, uneven).motion % (2 * 8 * 8) == 0


def _resized(spec, memory):
    return validated(RunSpec, {**spec.model_dump(), "memory": memory}, "test")


def test_methods_meet_one_budget(store):
    """The spare bytes of each become as many exemplars as fit, one more of which would not."""
    crops = {"per_class": 2, "keep": "clip"}
    specs = {
        "plain": _spec("finetune"),
        "ewc": _spec({"name": "ewc", "params": {"fisher_samples": 1}}),
        "replay": _spec("contavsep", {"name": "random_per_class", "params": crops}),
        "pool": _spec("finetune", {"name": "class_balanced", "params": {"total": 2}}),
    }
    budget = max(estimate(spec, store).total for spec in specs.values())
    assert budget == estimate(specs["ewc"], store).total
    found = align(specs, store)
    assert (found["ewc"].memory.name, found["ewc"].spare, found["ewc"].full) == ("none", 0, False)
    assert found["replay"].memory.params == {**crops, "per_class": 3}
    assert found["plain"].memory.name == "random_per_class"
    for name, unit, counts in (("plain", "per_class", range(1, 4)), ("replay", "per_class", range(1, 4)),
                               ("pool", "total", range(2, 7))):  # fmt: skip
        result = found[name]
        sized = {n: {"name": result.memory.name, "params": {**result.memory.params, unit: n}} for n in counts}
        totals = {n: estimate(_resized(specs[name], sized[n]), store).total for n in counts}
        best = max(n for n, total in totals.items() if total <= budget)
        assert result.memory.params[unit] == best
        assert result.budget.total == totals[best] == budget - result.spare
        assert result.full == (best == max(counts))


def test_a_given_budget_and_its_remainder(store):
    spec = _spec("finetune")
    bare = estimate(spec, store).total
    one = 2 * RECORDING.total  # a clip of each of the two classes
    for budget, memory, spare in (
        (bare, {}, 0),
        (bare + one - 1, {}, one - 1),
        (bare + one, {"per_class": 1}, 0),
        (bare + 2 * one + 7, {"per_class": 2}, 7),
        (bare + 10 * one, {"per_class": 3}, 7 * one),
    ):
        result = align({"m": spec}, store, budget=budget)["m"]
        assert (result.memory.params, result.spare) == (memory, spare)
        assert result.memory.name == ("random_per_class" if memory else "none")
        assert result.full == (spare == 7 * one)
    crops = ComponentRef(name="herding", params={"keep": "clip"})
    result = align({"m": spec}, store, budget=bare + 2 * CROP.total + 3, memory=crops)["m"]
    assert result.memory == ComponentRef(name="herding", params={"keep": "clip", "per_class": 1})
    assert result.spare == 3


def test_an_impossible_alignment_is_refused(store, monkeypatch):
    spec = _spec("finetune")
    bare = estimate(spec, store).total
    cases = [
        ({"m": spec}, {"budget": bare - 1}, rf"m keeps {bare:,} bytes without any exemplar, more than the budget of"),
        ({}, {}, "no method to align"),
        ({"m": spec}, {"budget": 0}, "a budget of 0 bytes is none"),
        ({"up": _spec("joint")}, {}, r"up \('joint'\) keeps all data"),
        ({"m": spec}, {"memory": "nonesuch", "budget": bare * 2}, "no memory policy named 'nonesuch'"),
        ({"m": spec}, {"memory": "none", "budget": bare * 2}, "'none' has neither per_class nor total"),
        ({"m": spec}, {"sizes": "median"}, "sizes must be 'largest' or 'mean', got 'median'"),
        ({"m": spec}, {"task": 2}, "m has 2 tasks and no task 2"),
        ({"m": spec.model_copy(update={"tasks": ()})}, {}, "the spec of m names no tasks"),
        ({"m": spec.model_copy(update={"tasks": (("ding", "hum"),)})}, {}, "m has one task alone"),
        (
            {"m": _spec("finetune", {"name": "reservoir", "params": {"total": 2, "keep": "id"}})},
            {},
            "exemplars kept as ids cost no bytes",
        ),
        (
            {"m": _spec("finetune", {"name": "random_per_class", "params": {"per_class": 4}})},
            {},
            "memory of 4 clips per class is larger than class 'ding'",
        ),
    ]
    for methods, settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            align(methods, store, **settings)
    monkeypatch.setattr(FineTune, "needs_memory", True)
    with pytest.raises(ConfigError, match=rf"m needs a memory, and per_class=1 takes it beyond the budget of {bare:,}"):
        align({"m": spec}, store, budget=bare)


# --- the command ------------------------------------------------------------------------------------------------------


def _run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def test_the_command_prints_and_aligns(tone_run, tmp_path, capsys):
    other = shutil.copytree(tone_run, tmp_path / "other" / "run")
    assert _run("budget", tone_run, other) == 0
    shown = capsys.readouterr().out
    found = budget_of(tone_run)
    assert f"{found.model / 1e6:.3f}" in shown
    assert f"{found.total / 1e6:.3f}" in shown
    assert "other/run" in shown
    assert _run("budget", tone_run, "--align", "--to", found.total + 2 * RECORDING.total + 5) == 0
    shown = capsys.readouterr().out
    assert "random_per_class (per_class=2)" in " ".join(shown.split())
    assert any(line.split()[-1:] == ["5"] for line in shown.splitlines())  # spare


def _without_memory(run, copy):
    """A run that remembers nothing, so that its store need not be opened."""
    shutil.copytree(run, copy)
    for record in copy.glob("tasks/*/task.json"):
        record.write_text(json.dumps({**json.loads(record.read_text()), "exemplars": {}}))
    return copy


def test_wrong_input_of_the_command_is_one_line(tone_run, tone_store, tmp_path, capsys):
    unfinished = shutil.copytree(tone_run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "tasks")
    gone = shutil.copytree(tone_run, tmp_path / "gone")
    spec = (gone / "run.yaml").read_text()
    (gone / "run.yaml").write_text(spec.replace(str(tone_store), str(tmp_path / "nowhere")))
    assert (gone / "run.yaml").read_text() != spec
    spoilt = shutil.copytree(tone_run, tmp_path / "spoilt")
    (spoilt / "tasks" / "00" / "task.json").write_text("{")
    bare, elsewhere = (_without_memory(tone_run, tmp_path / name) for name in ("bare", "elsewhere"))
    text = (elsewhere / "run.yaml").read_text()
    (elsewhere / "run.yaml").write_text(text.replace(str(tone_store), str(tmp_path / "nowhere")))
    cases = [
        ((tmp_path / "nothing",), "not a run folder"),
        ((tone_run, tone_run), "given twice"),
        ((unfinished,), "no finished task yet"),
        ((tone_run, "--task", 7), "no finished task 7: it has 0, 1"),
        ((tone_run, "--to", 5), "give --align"),
        ((tone_run, "--align", "--to", 5), "more than the budget of 5"),
        ((gone,), "--store"),
        ((gone, "--store", tmp_path), "not a store"),
        ((spoilt,), "truncated"),
        ((tone_run, "--align", "--memory", "non", "--to", 10**9), "'non'"),
        ((bare, elsewhere, "--align"), "over 2 stores"),
    ]
    for arguments, message in cases:
        assert _run("budget", *arguments) == 2, arguments
        told = capsys.readouterr().err.strip()
        assert message in told, arguments
        assert "\n" not in told
    assert _run("budget", gone, "--store", tone_store) == 0

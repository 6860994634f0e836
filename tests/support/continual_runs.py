"""Two tiny tasks for tests of strategies: a run, its weights, and the same run killed in mid-task and resumed.

    run = trained(store, "lwf", "random_per_class")
    resumed = resume_killed(store, run, "lwf", "random_per_class")
    assert differing(weights(run), weights(resumed)) == []

A run is two tasks of three steps with a checkpoint after the second step; its validation is left out. Runs with equal
first tasks share one, which is trained when first needed and kept beside the store, as are the runs themselves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import avsep.training.loop
from avsep.spec import RunSpec, validated
from avsep.training.learner import ContinualLearner
from avsep.training.validation import Validation
from support.tones import TINY_FRONT_END, TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN, stream_of

_QUERIES = TINY_SEPARATOR["mask_decoder"]


def _with_queries(**settings: Any) -> dict[str, Any]:
    return {**TINY_SEPARATOR, "mask_decoder": {**_QUERIES, "params": {**_QUERIES["params"], **settings}}}


# Base separators by name, each small enough for a step to take a few hundredths of a second.
SEPARATORS: dict[str, dict[str, Any]] = {
    "iquery": TINY_SEPARATOR,
    "iquery_object": {**TINY_SEPARATOR, "motion_encoder": None},
    "iquery_adapters": {**TINY_SEPARATOR, "adapter": {"name": "low_rank", "params": {"rank": 2, "conv_rank": 1}}},
    "iquery_tails": {**TINY_SEPARATOR, "adapter": {"name": "task_tails", "params": {"layers": 2}}},
    "iquery_projection": {**TINY_SEPARATOR, "adapter": "projection"},
    "iquery_causal": _with_queries(slot_attention="causal"),
    "iquery_self": _with_queries(slot_attention="self"),
    "aligned": {**TINY_SEPARATOR, "mask_decoder": {"name": "aligned_query", "params": {"dim": 16, "layers": 1}}},
    "causal": {
        "audio_encoder": {"name": "causal_unet", "params": {"base_channels": 4, "mask_channels": 4}},
        "object_encoder": {"name": "frame_cnn", "params": {"dim": 16, "frames": 1}},
        "mask_decoder": {"name": "aligned_query", "params": {"dim": 16, "layers": 1, "causal": True}},
        "front_end": TINY_FRONT_END,
    },
    "coseparation": {
        "audio_encoder": {"name": "conv7", "params": {"base_channels": 4}},
        "object_encoder": {"name": "frame_cnn", "params": {"dim": 16}},
        "mask_decoder": {"name": "conditioned_unet", "params": {"dim": 16}},
        "front_end": TINY_FRONT_END,
    },
    "coseparation_detached": {
        "audio_encoder": {"name": "conv7", "params": {"base_channels": 4}},
        "object_encoder": {"name": "frame_cnn", "params": {"dim": 16}},
        "mask_decoder": {"name": "conditioned_unet", "params": {"dim": 16, "detach_embedding": True}},
        "front_end": TINY_FRONT_END,
    },
    "ridge_filters": {
        "audio_encoder": {"name": "unet7", "params": {"base_channels": 4, "mask_channels": 4}},
        "mask_decoder": "ridge_filters",
        "front_end": TINY_FRONT_END,
    },
    "sound_of_pixels": {
        "audio_encoder": {"name": "unet7", "params": {"base_channels": 4, "mask_channels": 4, "log_floor": 1e-10}},
        "object_encoder": {"name": "frame_cnn", "params": {"dim": 16}},
        "mask_decoder": "channel_synthesizer",
        "front_end": TINY_FRONT_END,
    },
}
SEPARATORS |= {
    f"{name}_film": {**SEPARATORS[name], "adapter": "film"} for name in ("iquery", "coseparation", "sound_of_pixels")
}

_WITHOUT_QUERIES = {
    name for name in SEPARATORS if name.startswith(("coseparation", "sound_of_pixels", "ridge_filters"))
}
_START_QUERIES = ("family_queries", "query_extension", "similar_queries", "text_queries")
_LOOK = ("avcil", "contavsep", "prototype_relations", "reference", "slot_span", "topology")
# The separators that a strategy is not for, as its check says; those that are not named here are for all.
REFUSED: dict[str, set[str]] = {
    **dict.fromkeys(_START_QUERIES, _WITHOUT_QUERIES),
    **{name: {"ridge_filters"} for name in _LOOK},
    "analytic_mask": {*SEPARATORS} - {"ridge_filters"},
    "drift_compensation": {*SEPARATORS} - {"iquery_projection"},
    "task_adapters": {name for name, parts in SEPARATORS.items() if parts.get("adapter", "projection") == "projection"},
}

# (separator, memory) that a test of one strategy goes through: every separator, and both memories
RUNS = [
    ("iquery", "none"),
    ("iquery", "random_per_class"),
    pytest.param("iquery_object", "none", marks=pytest.mark.slow),
    pytest.param("coseparation", "random_per_class", marks=pytest.mark.slow),
    pytest.param("sound_of_pixels", "none", marks=pytest.mark.slow),
]

_TRAIN = {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 3, "checkpoint_every": 2}
_MIDDLE = "task-01-step-0000002"


def make_learner(strategy, memory="none", *, separator="iquery", accelerator="cpu", **settings) -> ContinualLearner:
    """A learner over ``TINY_TASKS``. ``strategy`` and ``memory`` are names or (name, parameters), ``separator`` one of
    ``SEPARATORS``, ``settings`` of the training."""
    spec = {
        "separator": SEPARATORS[separator],
        "strategy": strategy,
        "memory": memory,
        "train": {**_TRAIN, **settings},
        "tasks": TINY_TASKS,
    }
    learner = ContinualLearner.from_spec(validated(RunSpec, spec, "test"), accelerator=accelerator)
    learner._validation = lambda stream, task: Unscored(stream, task, learner.train, learner.ranks)
    return learner


class Unscored(Validation):
    """Costs nothing; the last weights are kept."""

    def score(self, student):
        return 0.0, []


def _fit(learner: ContinualLearner, store: Path, out: Path, tasks=TINY_TASKS, **how) -> None:
    stream = stream_of(store, tasks)
    learner.fit(stream, out, progress=False, **how)


def first_task(store: Path, strategy, separator="iquery", **settings) -> Path:
    """A run of the first task alone, as ``strategy``, which lets it be shared, trains it; trained once."""
    learner = make_learner(strategy, separator=separator, **settings)
    out = _folder(store, separator, learner.strategy.first_task(), settings)
    if not (out / "tasks" / "00" / "task.json").exists():
        learner.strategy.needs_memory = False  # there is nothing to remember yet
        _fit(learner, store, out, TINY_TASKS[:1])
    return out


def _folder(store: Path, *key: Any) -> Path:
    return store.parent / f"run-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def train(store: Path, out: Path, strategy, memory="none", *, separator="iquery", **settings) -> Path:
    """Learn both tasks into ``out``. Beside it stays ``killed_folder(out)``, the run as a kill -9 right after the
    checkpoint in the middle of the second task would leave it."""
    save = avsep.training.loop.save_latest

    def saves(folder, name, state):
        save(folder, name, state)
        if name == _MIDDLE:
            shutil.copytree(out, killed_folder(out))

    shared = make_learner(strategy, separator=separator, **settings).strategy.first_task() is not None
    first = first_task(store, strategy, separator, **settings) if shared else None
    with mock.patch.object(avsep.training.loop, "save_latest", saves):
        _fit(make_learner(strategy, memory, separator=separator, **settings), store, out, first_task=first)
    assert killed_folder(out).is_dir()
    return out


def trained(store: Path, strategy, memory="none", *, separator="iquery", **settings) -> Path:
    """As :func:`train`, into a folder beside the store; trained once. Read only."""
    out = _folder(store, separator, strategy, memory, settings)
    if not out.exists():
        train(store, out, strategy, memory, separator=separator, **settings)
    return out


def killed_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-killed")


def resume_killed(store: Path, out: Path, strategy, memory="none", *, separator="iquery", **settings) -> Path:
    """Resume what :func:`train` left as if killed, once, in a new learner whose global generators stand elsewhere."""
    torch.manual_seed(20)
    killed = killed_folder(out)
    assert not (killed / "tasks" / "01").exists()
    _fit(make_learner(strategy, memory, separator=separator, **settings), store, killed, resume=True)
    return killed


def weights(out: Path, task: int = 1) -> dict[str, Tensor]:
    """What a finished task left."""
    return load_file(out / "tasks" / f"{task:02d}" / "separator" / "model.safetensors")


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit by bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]

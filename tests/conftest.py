"""Shared fixtures: a store of tones made in a second, and a separator small enough to train in a test."""

from __future__ import annotations

import os
from pathlib import Path

# OpenMP threads that wait by spinning make a busy machine many times slower; before torch is imported anywhere.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run under Triton's interpreter, which must be known before Triton is imported. What
# does not ask for Triton by name is not touched by it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def threads_stay():
    """The last bits of a run depend on the number of threads: a test that left another would spoil those after it."""
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture
def one_thread():
    """PyTorch computes in one thread, and as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No published weights and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AVSEP_WEIGHTS", raising=False)


def dies_at_step(monkeypatch, number):
    """A stand-in for a kill: training is interrupted before its ``number``-th step, until ``monkeypatch.undo()``."""
    from avsep.learner import ContinualLearner

    step, calls = ContinualLearner._step, []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(ContinualLearner, "_step", dies)


RATE = 11025
TONES_HZ = {"ding": 330.0, "hum": 520.0, "peep": 830.0, "whirr": 1310.0}
COUNTS = {"train": 3, "val": 2, "test": 2}

TINY_FRONT_END = {"sample_rate_hz": RATE, "clip_samples": 8191, "n_fft": 254, "hop": 64, "log_rows": 128}
TINY_SEPARATOR = {
    "audio_encoder": {"name": "unet7", "params": {"base_channels": 4, "mask_channels": 4}},
    "object_encoder": {"name": "frame_cnn", "params": {"dim": 16}},
    "motion_encoder": {"name": "motion_cnn", "params": {"dim": 16}},
    "mask_decoder": {
        "name": "query_transformer",
        "params": {"dim": 16, "heads": 2, "feedforward": 16, "encoder_layers": 1, "layers": 2},
    },
    "front_end": TINY_FRONT_END,
}
TINY_TRAIN = {
    "batch_size": 2,
    "epochs": 2,
    "steps_per_epoch": 3,
    "current_repeats": 4,
    "memory_repeats": 8,
    "checkpoint_every": 2,
    "audio": {"lr": 1e-3},
    "visual": {"lr": 1e-3},
    "decoder": {"lr": 1e-3, "name": "adamw", "schedule": "one_cycle"},
}
TINY_TASKS = [["ding", "hum"], ["peep", "whirr"]]


def make_tone_store(path: Path, seconds: float = 1.5) -> Path:
    """Classes are harmonic tones of different pitch with a tremolo; pictures are bright in the class's quarter."""
    from avsep.data.store import StoreWriter

    order = []
    with StoreWriter(path, classes=list(TONES_HZ), sample_rate_hz=RATE, origin={"generator": "tests"}) as writer:
        for number, (name, pitch) in enumerate(TONES_HZ.items()):
            for split, count in COUNTS.items():
                for k in range(count):
                    rng = np.random.default_rng([number, k, len(split)])
                    time_s = np.arange(int(seconds * RATE)) / RATE
                    tone = sum(np.sin(2 * np.pi * pitch * h * time_s + rng.uniform(0, 6)) / h for h in (1, 2, 3))
                    audio = 0.2 * tone * (1 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 4) * time_s))
                    object_frames = rng.integers(0, 40, (2, 3, 32, 32), dtype=np.uint8)
                    object_frames[:, :, number * 8 : number * 8 + 8] += 200
                    motion = rng.integers(0, 60, (int(seconds * 8), 1, 16, 16), dtype=np.uint8)
                    clip_id = f"{name}-{split}-{k}"
                    writer.write_clip(
                        clip_id,
                        name,
                        split,
                        audio.astype(np.float32),
                        object_frames=object_frames,
                        motion_frames=motion,
                    )
                    order.append(clip_id)
        writer.finish(order)
    return path


@pytest.fixture(scope="session")
def tone_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four classes of tones. Read only."""
    return make_tone_store(tmp_path_factory.mktemp("tones") / "store")


@pytest.fixture(scope="session")
def tone_run(tone_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished two-task ContAV-Sep run over ``tone_store``. Read only: copy it before changing it."""
    from avsep.data.tasks import task_stream

    out = tmp_path_factory.mktemp("tone-run") / "run"
    stream = task_stream(tone_store, TINY_TASKS, clip_samples=TINY_FRONT_END["clip_samples"])
    tiny_learner().fit(stream, out, progress=False)
    return out


def tiny_run_spec(strategy="contavsep", memory="random_per_class", **train):
    from avsep.spec import RunSpec, validated

    return validated(
        RunSpec,
        {
            "separator": TINY_SEPARATOR,
            "strategy": strategy,
            "memory": memory,
            "train": {**TINY_TRAIN, **train},
            "tasks": TINY_TASKS,
        },
        "test",
    )


def tiny_learner(strategy="contavsep", memory="random_per_class", **train):
    from avsep.learner import ContinualLearner

    return ContinualLearner.from_spec(tiny_run_spec(strategy, memory, **train), accelerator="cpu")


BUNDLE_CLASSES = ("flute", "piano", "cello")


def bundle_separator():
    """A separator with stored object features, small enough to be exported in a few seconds; all weights random."""
    from avsep.separator import build_separator

    torch.manual_seed(0)
    separator = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("precomputed", {"features": "clip", "dim": 8}),
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 1}),
        classes=BUNDLE_CLASSES,
        front_end=TINY_FRONT_END,
    )
    with torch.no_grad():
        separator.mask_decoder.head[-1].weight.mul_(10)  # so that the masks vary
    return separator.eval()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of :func:`bundle_separator`, as a folder. Read only: copy it before changing it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.export import export

    return export(bundle_separator(), None, tmp_path_factory.mktemp("bundles") / "tiny", made_from="a test").path

"""A store of tones made in a second, and separators small enough to train or export in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

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
    """Classes are harmonic tones of different pitch with a tremolo; frames are bright in the class's quarter."""
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


def stream_of(store, tasks=TINY_TASKS):
    """The tasks over a store of tones, whole clips in the front end's length."""
    from avsep.data.tasks import task_stream

    return task_stream(store, tasks, clip_samples=TINY_FRONT_END["clip_samples"])


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


def tiny_learner(strategy="contavsep", memory="random_per_class", loggers=(), **train):
    """``loggers``: none beside the CSV logs unless a test is about them, since pictures take most of a tiny run."""
    from avsep.training.learner import ContinualLearner

    return ContinualLearner.from_spec(tiny_run_spec(strategy, memory, **train), accelerator="cpu", loggers=loggers)


def dies_at_step(monkeypatch, number):
    """A stand-in for a kill: training is interrupted before its ``number``-th step, until ``monkeypatch.undo()``."""
    from avsep.training.loop import TaskLoop

    step, calls = TaskLoop._step, []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(TaskLoop, "_step", dies)


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

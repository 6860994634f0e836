"""A causal separator learns tasks, resumes and grows as the others do, and separates files from its run."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from avsep.cli import main
from avsep.inference.streaming import StreamingSeparator
from avsep.media.timeline import read_visual_file
from avsep.separator import build_separator, load_separator
from support.continual_runs import differing, resume_killed, trained, weights
from support.tones import TINY_FRONT_END


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in arguments])
    return stop.value.code


def test_a_killed_run_goes_on_to_the_same_weights_and_grows(tone_store):
    run = trained(tone_store, "contavsep", "random_per_class", separator="causal")
    resumed = resume_killed(tone_store, run, "contavsep", "random_per_class", separator="causal")
    assert differing(weights(run), weights(resumed)) == []
    old, new = (load_separator(run, task=task) for task in (0, 1))
    assert (old.num_classes, new.num_classes) == (2, 4)
    assert new.causal
    with torch.inference_mode():
        old.grow(4, new.classes)
    assert old.mask_decoder.class_queries.shape == new.mask_decoder.class_queries.shape


def test_the_preset_is_trained_and_separates_files_as_one_stream(tone_store, tmp_path):
    settings = {
        "separator.audio_encoder.params.base_channels": 2,
        "separator.object_encoder.params.dim": 8,
        "separator.mask_decoder.params.dim": 8,
        "separator.front_end": "{" + ", ".join(f"{k}: {v}" for k, v in TINY_FRONT_END.items()) + "}",
        "train.epochs": 1,
        "train.steps_per_epoch": 2,
        "train.batch_size": 2,
        "train.current_repeats": 4,
        "train.validation_pairs": 2,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run, duet, out = tmp_path / "run", tmp_path / "duet", tmp_path / "out"
    tasks = ("--tasks", "ding,hum,peep,whirr")
    preset = ("--preset", "causal_small", "--strategy", "finetune", "--memory", "none")
    assert not call("train", tone_store, "--out", run, *preset, *tasks, *options, "--device", "cpu")
    assert not call("data", "mix", tone_store, "--clips", "ding-test-0,whirr-test-0", "--out", duet)
    features = ("--features", duet / "features.npz", "--classes", "ding,whirr")
    assert not call(
        "separate", duet / "duet.wav", "--run", run, *features, "--out", out, "--format", "FLOAT", "--limit-mask-sum"
    )
    mixture, _ = soundfile.read(duet / "duet.wav", dtype="float32")
    separator = load_separator(run).eval()
    stream = StreamingSeparator(
        separator, ["ding", "whirr"], read_visual_file(duet / "features.npz"), limit_mask_sum=True
    )
    expected = np.concatenate([*(stream.push(part) for part in np.array_split(mixture, 9)), stream.flush()], axis=-1)
    for name, wanted in zip(("ding", "whirr"), expected, strict=True):
        found, _ = soundfile.read(out / f"duet_{name}.wav", dtype="float32")
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_delays_of_the_presets():
    causal = build_separator("causal_small", num_classes=2)
    stream_ms = 1e3 * causal.spec.front_end.n_fft / causal.spec.front_end.sample_rate_hz
    assert causal.causal
    assert stream_ms <= 50
    chunked = build_separator("aligned_1s", num_classes=2)
    assert not chunked.causal
    assert chunked.spec.front_end.clip_s <= 1

"""AV-Align: on moments, sounds and pictures made by hand."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from avsep.cli.evaluate_command import print_evaluation
from avsep.data.protocol import build_protocol
from avsep.data.store import Store, StoreWriter
from avsep.data.tasks import make_tasks
from avsep.evaluation import evaluate as module
from avsep.evaluation.av_align import agreement, av_align, mean_agreement, motion_peaks, onsets
from avsep.evaluation.evaluate import evaluate_run
from avsep.inference.page import _aligned
from avsep.media.timeline import VisualTimeline
from avsep.separator import build_separator
from support.answers import Stub
from support.tones import RATE, TINY_FRONT_END

BEATS_S = (0.5, 1.0, 1.75, 2.4)


def plucked(beats_s, seconds=3.0, pitch_hz=440.0):
    time_s = np.arange(int(seconds * RATE)) / RATE
    after = [time_s - beat for beat in beats_s]
    return sum(0.3 * (t >= 0) * np.sin(2 * np.pi * pitch_hz * t) * np.exp(-8 * t.clip(0)) for t in after)


def jumps(beats_s, rate_hz=16.0, seconds=3.0):
    """A bar that jumps to another place with each beat, in a frame of grey."""
    frames = np.full((int(seconds * rate_hz), 1, 8, 8), 40, dtype=np.uint8)
    for number in range(len(frames)):
        frames[number, 0, :, 2 * sum(number >= round(beat * rate_hz) for beat in beats_s) % 8] = 220
    return frames


def test_agreement_is_intersection_over_union():
    assert agreement([1.0, 2.0, 3.0], [1.05, 2.5], 0.125) == pytest.approx(1 / 4)
    assert agreement([3.0, 1.0, 2.0], [2.1, 3.1, 1.1], 0.125) == 1
    assert agreement([0.95, 1.0, 1.05], [1.0], 0.125) == pytest.approx(1 / 3)  # one onset takes it
    assert agreement([1.0, 1.2], [1.1, 1.3], 0.15) == 1  # two and two, though the first is near to one alone
    assert agreement([1.0], [1.125], 0.125) == 0  # a frame apart is another moment
    assert agreement([1.0], [], 0.125) == agreement([], [1.0], 0.125) == 0
    assert math.isnan(agreement([], [], 0.125))


def test_onsets_are_where_sounds_begin():
    for audio in (plucked(BEATS_S), plucked(BEATS_S) + 0.003 * np.random.default_rng(0).standard_normal(3 * RATE)):
        assert onsets(audio, RATE).tolist() == pytest.approx(BEATS_S, abs=0.015)
    time_s = np.arange(RATE) / RATE
    for steady in (np.zeros(RATE), np.sin(2 * np.pi * 300 * time_s), np.zeros(3)):
        assert len(onsets(steady, RATE)) == 0
    assert onsets(1e-3 * plucked(BEATS_S), RATE).tolist() == onsets(plucked(BEATS_S), RATE).tolist()


def test_peaks_of_motion_are_where_frames_change_most():
    assert motion_peaks(jumps(BEATS_S), 16).tolist() == pytest.approx([0.5, 1.0, 1.75, 2.375])
    levels = np.array([0, 0, 10, 40, 50, 50, 90, 90], dtype=np.uint8)  # changes 0, 10, 30, 10, 0, 40, 0
    frames = np.broadcast_to(levels[:, None, None, None], (8, 1, 2, 2))
    assert motion_peaks(frames, 8).tolist() == [3 / 8, 6 / 8]
    assert motion_peaks(frames[::-1], 8).tolist() == [2 / 8, 5 / 8]  # no wrap of bytes where it darkens
    assert len(motion_peaks(frames[:3], 8)) == len(motion_peaks(np.zeros((9, 1, 2, 2), np.uint8), 8)) == 0


def test_a_sound_agrees_with_its_own_motion():
    later = tuple(beat + 0.25 for beat in BEATS_S)
    assert av_align(plucked(BEATS_S), RATE, jumps(BEATS_S), 16) == 1
    assert av_align(plucked(BEATS_S), RATE, jumps(later), 16) == 0
    assert av_align(plucked(BEATS_S), RATE, jumps(later), 16, window_s=0.3) == 1
    assert av_align(plucked((*BEATS_S, 1.4, 2.1)), RATE, jumps(BEATS_S), 16) == pytest.approx(4 / 6)
    assert math.isnan(av_align(np.zeros(RATE), RATE, np.zeros((16, 1, 8, 8), np.uint8), 16))
    with pytest.raises(ValueError, match="8 frames a second or more, got 4"):
        av_align(plucked(BEATS_S), RATE, jumps(BEATS_S), 4)


@pytest.fixture(scope="module")
def beaten(tmp_path_factory):
    """A store of two classes that beat at different times, each pictured by its beats."""
    front_end = {**TINY_FRONT_END, "clip_samples": 32767}
    writer = StoreWriter(
        tmp_path_factory.mktemp("beats") / "store",
        classes=["a", "b"],
        sample_rate_hz=RATE,
        motion_rate_hz=16.0,
        origin={},
    )
    with writer:
        order = [f"{name}-{split}" for name in "ab" for split in ("train", "test")]
        for clip_id in order:
            beats = BEATS_S if clip_id[0] == "a" else (0.75, 1.35, 2.05)
            writer.write_clip(
                clip_id,
                clip_id[0],
                clip_id[2:],
                plucked(beats, pitch_hz=330.0 if clip_id[0] == "a" else 810.0).astype(np.float32),
                object_frames=np.zeros((3, 3, 32, 32), np.uint8),
                motion_frames=jumps(beats),
            )
        store = writer.finish(order)
    separator = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 8}),
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16, "layers": 1}),
        classes=["a", "b"],
        front_end=front_end,
    ).eval()
    tasks = make_tasks([["a", "b"]])
    return store, separator, build_protocol("fixed", store, tasks, split="test", clip_samples=32767).mixtures


def test_true_sources_agree_more_than_the_mixture(beaten):
    store, separator, mixtures = beaten
    nothing = Stub(separator, lambda mixture, visual, ids: mixture[:, None].expand(-1, ids.shape[1], -1))
    done = []
    found = mean_agreement(nothing, store, mixtures, progress=lambda *state: done.append(state))
    assert (found["mixtures"], done[-1]) == (len(mixtures), (len(mixtures),) * 2)
    assert found["reference"] == 1
    assert found["separated"] == found["mixture"] == pytest.approx((4 / 7 + 3 / 7) / 2)
    silent = Stub(separator, lambda mixture, visual, ids: torch.zeros(len(mixture), ids.shape[1], mixture.shape[1]))
    assert mean_agreement(silent, store, mixtures)["separated"] == 0
    slow = Store.open(store.path)
    slow.motion_rate_hz = 4.0
    assert mean_agreement(nothing, slow, mixtures) == {}


def test_a_run_keeps_it_for_its_last_task(tone_run, tmp_path, monkeypatch, capsys):
    from rich.console import Console

    run = shutil.copytree(tone_run, tmp_path / "run")
    result = evaluate_run(run, yardsticks=False, tasks=[1], av_align=2)
    (task, found), *more = result["av_align"].items()
    assert (task, more, found["count"], found["mixtures"]) == ("1", [], 2, 2)
    assert all(0 <= found[name] <= 1 for name in ("separated", "mixture", "reference"))
    print_evaluation(Console(width=160), result)
    assert f"AV-Align after task 1, 2 mixtures: separated {found['separated']:.3f}, mixture" in capsys.readouterr().out
    monkeypatch.setattr(module, "mean_agreement", lambda *a, **k: pytest.fail("measured again"))
    assert evaluate_run(run, yardsticks=False, tasks=[1], av_align=2) == result
    assert evaluate_run(run, yardsticks=False, tasks=[1]) == result  # does not take it away


def test_the_page_of_a_separated_recording_tells_it():
    seen = VisualTimeline(motion=jumps(BEATS_S), motion_rate_hz=16.0)
    own, all_of_it = plucked(BEATS_S), plucked((*BEATS_S, 1.4, 2.1))
    assert _aligned(seen, own, all_of_it, RATE) == ["sound and motion agree: 1.00 (the recording: 0.67)"]
    assert _aligned(seen, np.stack([own, own]), all_of_it, RATE) == _aligned(seen, own, all_of_it, RATE)
    held = VisualTimeline(motion=jumps(BEATS_S), motion_rate_hz=16.0, moves=False)
    slow = VisualTimeline(motion=jumps(BEATS_S), motion_rate_hz=4.0)
    for unknown in (None, VisualTimeline(), held, slow):
        assert _aligned(unknown, own, all_of_it, RATE) == []

"""A video of two players side by side, made of the offline benchmark's sampled instruments and frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from avsep.data.synth.phrases import compose, instrument
from avsep.data.synth.pictures import draw, look_of, poses
from avsep.data.synth.soundfont import SoundFont
from avsep.data.synth.synthesis import SAMPLE_RATE_HZ, _Clip, _perform, find_banks
from avsep.media.audio import resample
from support.media_files import write_video

SIDE = 112
VIDEO_HZ = 44100


def write_duet_video(
    path: Path, names: tuple[str, str], *, seconds: float = 30.0, fps: int = 16, seed: int = 77
) -> np.ndarray:
    """An h264/aac mp4, the first class at the left; returns the sources [2, L] at 11,025 Hz, which sum to its sound."""
    bank = SoundFont(str(find_banks()[0]))
    halves, sounds = [], []
    for number, name in enumerate(names):
        player = instrument(name)
        music, sight = (np.random.default_rng([seed, number, k]) for k in range(2))
        notes = compose(player, seconds, music)
        clip = _Clip(name, name, "test", number, seconds, seed, ())
        sounds.append(_perform(player, notes, bank, clip, -20.0) / 32768 / len(names))
        times = [(i + 0.5) / fps for i in range(round(seconds * fps))]
        halves.append(draw(player, look_of(player, sight), poses(player, notes, times), SIDE))
    frames = np.concatenate(halves, axis=3).transpose(0, 2, 3, 1)  # [n, H, 2 W, 3]
    sources = np.stack(sounds).astype(np.float32)
    mixture = resample(sources.sum(axis=0), SAMPLE_RATE_HZ, VIDEO_HZ)
    write_video(path, frames, mixture[None], fps=fps, rate_hz=VIDEO_HZ)
    return sources


def write_halves(path: Path, names: tuple[str, str]) -> Path:
    """The boxes of such a video."""
    path.write_text(json.dumps({"0": {names[0]: [0, 0, 0.5, 1], names[1]: [0.5, 0, 1, 1]}}))
    return path

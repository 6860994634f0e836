"""A video of two sampled instruments goes through ``avsep separate`` with the offline benchmark's model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from avsep.evaluation.bss import bss_eval
from avsep.media.audio import read_audio
from support.commands import run
from support.duet_video import write_duet_video, write_halves

pytest.importorskip("av")


def improvement_db(sources: np.ndarray, files: list[Path]) -> list[float]:
    """SDR of each file over that of the mixture."""
    estimates = np.stack([read_audio(path)[0][0] for path in files])
    length = min(sources.shape[1], estimates.shape[1])
    references = torch.from_numpy(sources[:, :length])[None]
    scores = bss_eval(references, torch.from_numpy(estimates[:, :length])[None], mixture=references.sum(dim=1))
    assert scores.sdr_mixture is not None
    return [round(float(v), 2) for v in (scores.sdr - scores.sdr_mixture)[0]]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_both_instruments_come_out_better_than_the_mixture(tmp_path, capsys):
    """The demo's benchmark and training (ContAV-Sep, two tasks), then 30 s of h264 and AAC of what it never heard."""
    assert run("data", "synth", tmp_path / "store", "--size", "tiny", "--workers", "2") == 0
    train = ["--preset", "iquery_small", "--strategy", "contavsep", "--memory", "random_per_class"]
    more = ("--classes-per-task", "3", "--seed", "0", "--out", tmp_path / "run")
    assert run("train", tmp_path / "store", *train, *more) == 0
    found = {}
    for names in (("drum", "violin"), ("piano", "accordion")):  # an old and a new class each
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        sources = write_duet_video(folder / "duet.mp4", names, seconds=30.0)
        boxes = write_halves(folder / "halves.json", names)
        argv = ["separate", folder / "duet.mp4", "--run", tmp_path / "run", "--classes", ",".join(names)]
        assert run(*argv, "--boxes", boxes, "--out", folder / "out") == 0
        assert (folder / "out" / "duet_separated.html").stat().st_size > 1_000_000
        found[names] = improvement_db(sources, [folder / "out" / f"duet_{name}.wav" for name in names])
    with capsys.disabled():
        print(f"\nSDR over the mixture, dB: {found}")
    assert min(v for pair in found.values() for v in pair) > 3.0, found


def test_the_same_way_with_a_separator_that_learned_nothing(tmp_path):
    """What the slow test does, but for the training: the sources are in time with their video, and the files add up."""
    from avsep.separator import build_separator, save_separator
    from support.tones import TINY_SEPARATOR

    names = ("drum", "violin")
    save_separator(build_separator(**TINY_SEPARATOR, classes=names, seed=0), tmp_path / "separator")
    sources = write_duet_video(tmp_path / "duet.mp4", names, seconds=4.0, fps=8)
    boxes = write_halves(tmp_path / "halves.json", names)
    argv = ["separate", tmp_path / "duet.mp4", "--run", tmp_path / "separator", "--classes", ",".join(names)]
    assert run(*argv, "--boxes", boxes, "--out", tmp_path / "out") == 0
    files = [tmp_path / "out" / f"duet_{name}.wav" for name in (*names, "residual")]
    assert improvement_db(sources, files[:2]) == pytest.approx([0, 0], abs=3.0)
    total = sum(read_audio(path)[0][0] for path in files)[: sources.shape[1]]
    mixture = sources.sum(axis=0)
    inside = slice(2000, -2000)  # aac has its lead-in and its end
    error = total[inside] - mixture[inside]
    assert 10 * np.log10(np.mean(error**2) / np.mean(mixture[inside] ** 2)) < -12

"""Twenty-five and more things that people give ``avsep separate``, each with what comes of it.

Refused: one clear line, exit code 2, and the folder holds byte for byte what it held. Or what a person would expect:
the files, and of a video that is unusual what makes it so is seen to have been understood.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from avsep.media.timeline import VisualTimeline, write_visual_file
from avsep.separator import build_separator, save_separator
from support.commands import run
from support.folders import contents
from support.media_files import copy_packets, tone, write_video
from support.tones import TINY_SEPARATOR

pytest.importorskip("av")
PICTURES = [np.full((32, 48, 3), (k * 10, 90, 200 - k * 10), np.uint8) for k in range(15)]  # 1.5 s
BOXES = {"0": {"ding": [0, 0, 0.5, 1], "peep": [0.5, 0, 1, 1]}}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Made once: a separator, one that looks at unknown features, a deaf-to-frames one, and good files."""
    folder = tmp_path_factory.mktemp("shelf")
    torch.manual_seed(0)
    classes = ("ding", "hum", "peep")
    save_separator(build_separator(**TINY_SEPARATOR, classes=classes), folder / "separator")
    other = {"motion_encoder": None, "object_encoder": ("precomputed", {"features": "detic", "dim": 4})}
    save_separator(build_separator(**{**TINY_SEPARATOR, **other}, classes=classes), folder / "features")
    write_video(folder / "good.mp4", PICTURES, tone(1.5))
    (folder / "boxes.json").write_text(json.dumps(BOXES))
    return folder


@dataclass
class Desk:
    path: Path
    shelf: Path

    def video(self, frames=PICTURES, sound=None, name="clip.mp4", **options) -> Path:
        sound = tone(1.5, channels=6 if options.get("layout") == "5.1" else 1) if sound is None else sound
        return write_video(self.path / name, frames, sound, **options)

    def silent_film(self) -> Path:
        return write_video(self.path / "clip.mp4", PICTURES, None)

    def file(self, name: str, content: bytes) -> Path:
        (self.path / name).write_bytes(content)
        return self.path / name

    def boxes(self, boxes: object) -> Path:
        return self.file("mine.json", json.dumps(boxes).encode())

    def damaged(self, keep: float, name: str = "clip.mp4") -> Path:
        data = (self.shelf / "good.mp4").read_bytes()
        return self.file(name, data[: int(keep * len(data))])

    def features(self, classes=("ding", "peep")) -> Path:
        timeline = VisualTimeline(object=np.zeros((2, 3, 16, 16), np.uint8), motion=np.zeros((12, 1, 16, 16), np.uint8))
        write_visual_file(self.path / "f.npz", dict.fromkeys(classes, timeline))
        return self.path / "f.npz"

    def argv(self, *files, classes="ding,peep", run=None, more=(), boxes=None) -> list:
        how = ["--boxes", boxes or self.shelf / "boxes.json"] if not {"--features", "--whole-frame"} & set(more) else []
        return [
            *("separate", *(files or [self.shelf / "good.mp4"]), "--run", run or self.shelf / "separator"),
            *("--classes", classes, "--out", self.path / "out", "--no-page", *how, *more),
        ]


@pytest.fixture
def desk(tmp_path, shelf, nowhere):
    made = Desk(tmp_path / "desk", shelf)
    made.path.mkdir()
    return made


def _link_away(d: Desk) -> list:
    (d.path / "gone.mp4").symlink_to(d.path / "nowhere.mp4")
    return d.argv(d.path / "gone.mp4")


def _separated_before(d: Desk) -> list:
    (d.path / "out").mkdir()
    d.file("out/good_peep.wav", b"from yesterday")
    return d.argv()


def _film_only(d: Desk) -> list:
    return d.argv(d.silent_film())


REFUSED = {
    "no such file": (lambda d: d.argv(d.path / "no.mp4"), "no.mp4", "no such"),
    "link to nothing": (_link_away, "gone.mp4", "no such"),
    "folder for a video": (lambda d: d.argv(d.path), "desk", "not a file"),
    "zero bytes": (lambda d: d.argv(d.file("clip.mp4", b"")), "clip.mp4", "empty (0 bytes)"),
    "no audio stream": (_film_only, "clip.mp4", "no audio stream"),
    "an audio stream without samples": (lambda d: d.argv(d.file("a.wav", _wav_without_samples())), "no samples"),
    "silent track": (lambda d: d.argv(d.video(sound=np.zeros((1, 66150), np.float32))), "clip.mp4", "silent"),
    "no video, and nothing to see": (
        lambda d: d.argv(d.video(frames=None, name="clip.m4a"), more=("--whole-frame",)),
        *("clip.m4a", "--features"),
    ),
    "a sound with boxes": (lambda d: d.argv(_sound(d)), "sound.wav", "--features"),
    "text called a video": (lambda d: d.argv(d.file("clip.mp4", b"la la la " * 99)), "clip.mp4", "damaged"),
    "corrupt: half of the file is missing": (lambda d: d.argv(d.damaged(0.5)), "clip.mp4", "damaged"),
    "corrupt: zeros in place of the sound": (lambda d: d.argv(_holes(d)), "clip.mp4", "damaged"),
    "a part of a WebM": (lambda d: d.argv(_part_of_webm(d)), "clip.webm", "truncated"),
    "a rate of 1 Hz": (lambda d: d.argv(_slow(d), more=("--whole-frame",)), "sound.wav", "sample rate of 1 Hz"),
    "samples of 1e30": (lambda d: d.argv(_loud(d), more=("--whole-frame",)), "sound.wav", "reaches 1e+30"),
    "rescaling of floats": (lambda d: d.argv(more=("--format", "FLOAT", "--rescale")), "FLOAT", "--rescale"),
    "a frame": (lambda d: d.argv(_png(d)), "clip.png", "no audio stream"),
    "unknown class": (lambda d: d.argv(classes="ding,peeep"), "'peeep'", "'peep'"),
    "class twice": (lambda d: d.argv(classes="ding,ding"), "'ding' is given twice", "left=ding,right=ding"),
    "no class": (lambda d: d.argv(classes=" , "), "--classes"),
    "auto without weights": (
        lambda d: [a for a in d.argv(classes="auto") if a not in ("--boxes", d.shelf / "boxes.json")],
        *("hf download google/owlv2", "AVSEP_WEIGHTS"),
    ),
    "detector's folder that holds none": (
        lambda d: [a for a in d.argv(more=("--detector", d.path)) if a not in ("--boxes", d.shelf / "boxes.json")],
        *("desk", "not a folder of weights", "hf download"),
    ),
    "features missing": (
        lambda d: d.argv(more=("--features", d.path / "no.npz")),
        *("no.npz", "avsep data features"),
    ),
    "features of one class only": (lambda d: d.argv(more=("--features", d.features(("ding",)))), "'peep'", "ding"),
    "features that avsep cannot extract": (lambda d: d.argv(run=d.shelf / "features"), "'detic'", "--features"),
    "features and boxes": (
        lambda d: [*d.argv(more=("--features", d.features())), "--boxes", d.shelf / "boxes.json"],
        *("--features and --boxes", "leave all but one out"),
    ),
    "boxes missing": (lambda d: d.argv(boxes=d.path / "no.json"), "no.json", "no such file"),
    "boxes that are no JSON": (
        lambda d: d.argv(boxes=d.file("mine.json", b"left half")),
        "mine.json",
        "not valid JSON",
    ),
    "boxes in pixels": (
        lambda d: d.argv(boxes=d.boxes({"0": {"ding": [10, 4, 300, 200], "peep": [0, 0, 1, 1]}})),
        *("'ding'", "outside the frame", "from 0 to 1"),
    ),
    "empty box": (
        lambda d: d.argv(boxes=d.boxes({"0": {"ding": [0.4, 0, 0.4, 1], "peep": [0, 0, 1, 1]}})),
        *("'ding'", "empty"),
    ),
    "boxes of another class": (
        lambda d: d.argv(boxes=d.boxes({"0": {"ding": [0, 0, 1, 1], "hum": [0, 0, 1, 1]}})),
        *("'peep'", "ding, hum"),
    ),
    "same output twice": (lambda d: d.argv(d.shelf / "good.mp4", d.video(name="good.mov")), "good_ding.wav", "named"),
    "separated before": (_separated_before, "good_peep.wav", "--overwrite"),
    "file for a folder": (lambda d: [*d.argv(), "--out", d.file("taken", b"mine")], "taken", "folder"),
    "unknown rate": (lambda d: d.argv(more=("--rate", "cd")), "'cd'", "input"),
    "unknown suffix": (lambda d: d.argv(more=("--suffix", "mp3")), "'mp3'", "flac"),
    "FLAC of floats": (lambda d: d.argv(more=("--suffix", "flac", "--format", "FLOAT")), "FLAC", "PCM_24"),
}


def _wav_without_samples() -> bytes:
    import io

    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(0, np.float32), 11025, format="WAV")
    return buffer.getvalue()


def _sound(d: Desk) -> Path:
    soundfile.write(d.path / "sound.wav", tone(1.0, 11025)[0], 11025)
    return d.path / "sound.wav"


def _part_of_webm(d: Desk) -> Path:
    path = copy_packets(d.video(name="whole.mp4"), d.path / "clip.mkv")
    data = path.read_bytes()
    return d.file("clip.webm", data[: 2 * len(data) // 3])


def _slow(d: Desk) -> Path:
    data = bytearray(_sound(d).read_bytes())
    data[24:28] = (1).to_bytes(4, "little")
    return d.file("sound.wav", bytes(data))


def _loud(d: Desk) -> Path:
    soundfile.write(d.path / "sound.wav", np.full(9000, 1e30), 11025, subtype="FLOAT")
    return d.path / "sound.wav"


def _png(d: Desk) -> Path:
    from PIL import Image

    Image.fromarray(PICTURES[3]).save(d.path / "clip.png")
    return d.path / "clip.png"


def _holes(d: Desk) -> Path:
    """Its index is whole, its frames are zeros."""
    data = bytearray((d.shelf / "good.mp4").read_bytes())
    at = data.find(b"mdat") + 4
    size = int.from_bytes(data[at - 8 : at - 4], "big") - 8
    data[at : at + size] = bytes(size)
    return d.file("clip.mp4", bytes(data))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_with_nothing_written(name, desk, capfd):
    make, *told = REFUSED[name]
    argv = make(desk)
    before = contents(desk.path)
    assert run(*argv) == 2
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if line.strip() and "━" not in line]
    assert len(lines) == 1, shown.err
    assert "Traceback" not in shown.err
    for part in told:
        assert part in lines[0], lines[0]
    assert contents(desk.path) == before


def test_a_folder_that_cannot_be_written(desk, capfd, monkeypatch):
    desk.path.chmod(0o500)
    if os.access(desk.path, os.W_OK):  # root may write anywhere: the system's answer is made up
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and Path(path) != desk.path)
    try:
        assert run(*desk.argv()) == 2
        assert "desk cannot be written: choose another output folder" in capfd.readouterr().err
        assert not (desk.path / "out").exists()
    finally:
        desk.path.chmod(0o700)


# --- what a person would expect ---------------------------------------------------------------------------------------


def _five_one(d: Desk):
    """The low-frequency channel is for effects: the mono mixture is the mean of the other five."""
    sound = np.concatenate([tone(1.5, hz=440.0 * (c != 3) + 40.0 * (c == 3)) for c in range(6)])
    return d.argv(d.video(sound=sound, layout="5.1"))


def _with_gap(d: Desk) -> Path:
    return copy_packets(d.video(name="whole.mp4"), d.path / "clip.ts", without_s=(0.5, 1.0))


def _short(d: Desk):
    return d.argv(d.video(frames=PICTURES[:1], sound=tone(0.1)))


def _clipped_boxes(d: Desk):
    return d.argv(boxes=d.boxes({"0": {"ding": [-0.02, 0, 0.5, 1.01], "peep": [0.5, 0, 1, 1]}}))


def _overwritten(d: Desk):
    return [*_separated_before(d), "--overwrite"]


EXPECTED = {  # name -> (how, seconds of each file)
    "5.1 sound": (_five_one, 1.5),
    "variable frame rate": (lambda d: d.argv(d.video(times_s=[0, *np.linspace(0.6, 1.45, 14)])), 1.5),
    "rotated phone video": (lambda d: d.argv(d.video(rotation=90)), 1.5),
    "sound that begins later": (lambda d: d.argv(d.video(sound=tone(1.0), audio_starts_s=0.5)), 1.5),
    "a tenth of a second": (_short, 0.1),
    "frames that end before the sound": (lambda d: d.argv(d.video(frames=PICTURES[:5])), 1.5),
    "a video without frames, with features": (
        lambda d: d.argv(d.video(frames=None), more=("--features", d.features())),
        1.5,
    ),
    "boxes that are a little outside": (_clipped_boxes, 1.5),
    "another sample rate": (lambda d: d.argv(d.video(sound=tone(1.5, 48000), rate_hz=48000)), 1.5),
    "separated before, and --overwrite": (_overwritten, 1.5),
    "a name like a protocol": (lambda d: d.argv(d.video().rename(d.path / "file:clip.mp4")), 1.5),
    "sound that is missing for a while": (lambda d: d.argv(_with_gap(d)), 1.5),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_person_would_expect(name, desk):
    make, seconds = EXPECTED[name]
    argv = make(desk)
    assert run(*argv) == 0
    sounds = {p.stem.rpartition("_")[2]: soundfile.read(p) for p in (desk.path / "out").glob("*.wav")}
    assert sorted(sounds) == ["ding", "peep", "residual"]
    for sound, rate in sounds.values():
        assert rate == 11025
        assert len(sound) / rate == pytest.approx(seconds, abs=0.06)
    total = sum(sound for sound, _ in sounds.values())
    assert total.shape[1:] == ((5,) if name == "5.1 sound" else ())  # but for the effects' channel
    total = total.mean(axis=1) if total.ndim == 2 else total
    spectrum = np.abs(np.fft.rfft(total))
    loudest = np.fft.rfftfreq(len(total), 1 / 11025)[spectrum.argmax()]
    assert loudest == pytest.approx(440, abs=12)
    if name == "5.1 sound":
        low = spectrum[np.abs(np.fft.rfftfreq(len(total), 1 / 11025) - 40) < 5].max()
        assert low < 0.02 * spectrum.max()
    if name == "sound that begins later":
        assert np.abs(total[: int(0.4 * 11025)]).max() < 0.01


def test_they_are_at_least_twenty_five():
    assert len(REFUSED) + len(EXPECTED) + 1 >= 25

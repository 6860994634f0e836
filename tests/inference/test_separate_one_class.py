"""Two players of one instrument: sources with names of their own, told apart by who moves when."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch

import avsep.inference.recordings as recordings
from avsep.errors import ConfigError, DataError
from avsep.inference.recordings import separate_and_tell, separate_audio, separate_file
from avsep.media import detection
from avsep.media.detection import keep_apart, read_boxes
from avsep.media.timeline import VisualTimeline, write_visual_file
from avsep.separator import build_separator, save_separator
from support.commands import run
from support.listeners import listener_part, listening_separator
from support.media_files import tone, write_video
from support.tones import BUNDLE_CLASSES, RATE, TINY_SEPARATOR, bundle_separator

pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")
CLASSES = ("ding", "hum", "peep")
HALVES = {"left": [0, 0, 0.5, 1], "right": [0.5, 0, 1, 1]}
TWO = "left=ding,right=ding"


def two_players(moves_left=range(15), moves_right=range(15, 30)):
    """Three seconds of two players, of whom each is seen to move in one half of the time."""
    rng = np.random.default_rng(0)
    frames = []
    for k in range(30):
        frame = np.full((48, 96, 3), 90, np.uint8)
        for half, moving in ((slice(0, 48), moves_left), (slice(48, 96), moves_right)):
            if k in moving:
                frame[:, half] = np.kron(rng.integers(0, 2, (6, 6, 1)), np.ones((8, 8, 3), int)) * 200 + 20
        frames.append(frame)
    return frames


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    save_separator(build_separator(**TINY_SEPARATOR, classes=CLASSES), folder / "separator")
    still = {**TINY_SEPARATOR, "motion_encoder": None}
    save_separator(build_separator(**still, classes=CLASSES), folder / "still")
    sound = tone(3.0, hz=330.0) + tone(3.0, hz=830.0)
    write_video(folder / "duet.mp4", two_players(), sound)
    soundfile.write(folder / "duet.wav", sound[0][:30000], RATE)
    (folder / "halves.json").write_text(json.dumps({"0": HALVES}))
    Image.fromarray(two_players()[0][:, :48]).save(folder / "photo.png")
    with listener_part():
        save_separator(listening_separator(frames=True, classes=CLASSES), folder / "listener")
        yield folder


@pytest.fixture
def argv(home):
    return [
        *("separate", home / "duet.mp4", "--run", home / "separator", "--device", "cpu", "--classes", TWO),
        *("--format", "FLOAT"),
    ]


@pytest.fixture
def shown(monkeypatch):
    """What the separator was shown, by name, in each separation."""
    kept = []
    original = recordings.separate_and_tell

    def remembers(separator, mixture, timelines, classes, **options):
        kept.append((dict(timelines), list(classes)))
        return original(separator, mixture, timelines, classes, **options)

    monkeypatch.setattr(recordings, "separate_and_tell", remembers)
    return kept


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def read(folder, *names):
    return [soundfile.read(folder / f"duet_{name}.wav")[0] for name in names]


def swapped(argv, home, name="separator", classes=TWO):
    given = [*argv]
    given[given.index("--run") + 1], given[given.index("--classes") + 1] = home / name, classes
    return given


# --- the functions ----------------------------------------------------------------------------------------------------


def seen_of(seed):
    rng = np.random.default_rng(seed)
    return VisualTimeline(
        features={
            "o": rng.standard_normal((3, 8)).astype(np.float32),
            "m": rng.standard_normal((6, 8)).astype(np.float32),
        },
        where=f"player {seed}",
    )


def music(samples=9000):
    return (0.1 * np.random.default_rng(5).standard_normal(samples)).astype(np.float32)


def test_each_name_is_what_its_class_is_with_its_picture():
    separator, left, right = listening_separator(), seen_of(0), seen_of(1)
    lines, mixture = {"left": left, "right": right, "piano": seen_of(2)}, music()
    both, presence = separate_and_tell(separator, mixture, lines, ["left=flute", "piano", "right=flute"])
    for row, (name, line) in enumerate((("flute", left), ("piano", lines["piano"]), ("flute", right))):
        alone = separate_audio(separator, mixture, {name: line}, [name])
        np.testing.assert_allclose(both[row], alone[0], atol=1e-5)
    assert np.abs(both[0] - both[2]).max() > 1e-3
    assert presence.shape == (3,)
    of_class = separate_audio(separator, mixture, {"flute": left}, ["solo=flute", "piano"])
    np.testing.assert_allclose(of_class[0], both[0], atol=1e-5)


def test_files_and_findings_go_by_the_names(tmp_path):
    soundfile.write(tmp_path / "duet.wav", music(), RATE, subtype="FLOAT")
    lines = {"L\u00e4rm/1": seen_of(0), "right": seen_of(1)}
    found = separate_file(
        listening_separator(), tmp_path / "duet.wav", lines, ["L\u00e4rm/1=flute", "right=flute"], tmp_path / "out"
    )
    assert files(tmp_path / "out") == ["duet_L\u00e4rm-1.wav", "duet_residual.wav", "duet_right.wav"]
    assert list(found.files) == ["L\u00e4rm/1", "right"]
    assert set(found.levels_db) == {"mixture", "L\u00e4rm/1", "right", "residual"}
    assert list(found.findings.presence) == ["L\u00e4rm/1", "right"]
    assert found.findings.unseen == ()


def test_two_that_would_be_one_sound_are_refused(tmp_path):
    separator, line = listening_separator(), seen_of(0)
    soundfile.write(tmp_path / "duet.wav", music(), RATE)
    two = ["left=flute", "right=flute"]
    same = {"left": line, "right": seen_of(0)}
    for lines, told in (
        (same, "shown the same"),
        ({}, "no movement is seen"),
        ({"flute": line}, "no movement is seen"),
    ):
        with pytest.raises(ConfigError, match=f"left and right are both flute, and .*{told}"):
            separate_file(separator, tmp_path / "duet.wav", lines, two, tmp_path / "out")
    assert separate_audio(separator, music(), {"left": line}, two).shape == (2, 9000)  # of the other nothing is seen
    with pytest.raises(ConfigError, match="looks at no movement"):
        separate_audio(bundle_separator(), music(), {"left": line, "right": line}, two)
    with pytest.raises(ConfigError, match=r"'flute' is given twice: .*left=flute,right=flute"):
        separate_audio(separator, music(), {"flute": line}, ["flute", "flute"])
    for classes in (["residual"], ["mixture"]):
        with pytest.raises(ConfigError, match=f"cannot be named '{classes[0]}'"):
            separate_file(listening_separator(classes=classes), tmp_path / "duet.wav", {}, classes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_two_boxes_of_one_class_are_two_players(home, argv, tmp_path, shown, capfd):
    assert run(*argv, "--boxes", home / "halves.json", "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["duet_left.wav", "duet_residual.wav", "duet_right.wav", "duet_separated.html"]
    (timelines, classes), *_ = shown
    assert classes == ["left=ding", "right=ding"]
    moves = {n: np.abs(np.diff(t.motion.astype(int), axis=0)).mean(axis=(1, 2, 3)) for n, t in timelines.items()}
    half = len(moves["left"]) // 2
    assert moves["left"][: half - 1].mean() > 5 * moves["left"][half + 1 :].mean()
    assert moves["right"][half + 1 :].mean() > 5 * moves["right"][: half - 1].mean()
    left, right = read(tmp_path / "out", "left", "right")
    assert np.abs(left - right).max() > 1e-4
    page = (tmp_path / "out" / "duet_separated.html").read_text()
    assert "Separated into left, right, and what is left" in page
    assert page.count("boxes given") == 2
    assert "duet_left.wav" in capfd.readouterr().out.replace("\n", "")
    for name in ("left", "right"):  # each is what the class alone is with that box
        (tmp_path / "one.json").write_text(json.dumps({"0": {"ding": HALVES[name]}}))
        alone = swapped(argv, home, classes="ding")
        assert run(*alone, "--boxes", tmp_path / "one.json", "--out", tmp_path / name, "--no-page") == 0
        np.testing.assert_allclose(read(tmp_path / name, "ding")[0], read(tmp_path / "out", name)[0], atol=1e-6)


class FindsTwo:
    """A detector that knows where two dings are, the right one surer; of anything else it finds nothing."""

    boxes = ((0.9, (0.5, 0.0, 1.0, 1.0)), (0.8, (0.0, 0.0, 0.5, 1.0)), (0.7, (0.05, 0.0, 0.5, 0.9)))

    def __init__(self, *, weights="auto", device="cpu", batch=4):
        pass

    def best(self, frames, prompts):
        scores, boxes = np.full((len(frames), len(prompts)), 0.02), np.full((len(frames), len(prompts), 4), 0.2)
        boxes[..., 2:] = 0.4
        for q, prompt in enumerate(prompts):
            if prompt == "a ding" and self.boxes:
                scores[:, q], boxes[:, q] = self.boxes[0]
        return scores, boxes

    def several(self, frames, prompts, most, threshold):
        return [[keep_apart(self.boxes if prompt == "a ding" else (), most) for prompt in prompts] for _ in frames]


class FindsOne(FindsTwo):
    boxes = FindsTwo.boxes[:1]


def test_without_boxes_the_detectors_go_to_the_names_from_left_to_right(home, argv, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(detection, "OWLv2Detector", FindsTwo)
    given = swapped(argv, home, classes=f"{TWO},peep")
    assert run(*given, "--out", tmp_path / "found") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "surest" in line]
    assert said == ["duet.mp4: left, right are the 2 surest boxes of ding, from left to right"]
    track = read_boxes(tmp_path / "found" / "duet_boxes.json")
    assert {name: list(track.at(name, 1.0)) for name in HALVES} == HALVES
    page = (tmp_path / "found" / "duet_separated.html").read_text()
    assert page.count("a ding: 3 of 3 frames") == 2
    assert "whole frame: 3 of 3 frames" in page
    assert run(*given, "--boxes", tmp_path / "found" / "duet_boxes.json", "--out", tmp_path / "given", "--no-page") == 0
    for name in ("left", "right", "peep", "residual"):
        np.testing.assert_array_equal(read(tmp_path / "found", name)[0], read(tmp_path / "given", name)[0])
    assert run(*swapped(argv, home, classes="auto"), "--out", tmp_path / "auto", "--no-page") == 0
    assert "duet_ding.wav" in files(tmp_path / "auto")  # one source a class, as ever


def test_a_picture_of_one_and_the_video_of_the_other(home, argv, tmp_path, shown):
    given = [*argv, "--picture", f"left={home / 'photo.png'}", "--no-page"]
    (tmp_path / "boxes.json").write_text(json.dumps({"0": {"right": HALVES["right"]}}))
    assert run(*given, "--boxes", tmp_path / "boxes.json", "--out", tmp_path / "out") == 0
    timelines = shown[0][0]
    assert (timelines["left"].moves, timelines["right"].moves) == (False, True)


def test_features_are_looked_up_by_name_then_by_class(home, argv, tmp_path, shown):
    rng = np.random.default_rng(0)
    lines = {
        name: VisualTimeline(
            object=rng.integers(0, 255, (3, 3, 32, 32), dtype=np.uint8),
            motion=rng.integers(0, 255, (24, 1, 16, 16), dtype=np.uint8),
        )
        for name in ("left", "right", "peep")
    }
    write_visual_file(tmp_path / "f.npz", lines)
    given = swapped(argv, home, classes=f"{TWO},solo=peep")
    assert run(*given, "--features", tmp_path / "f.npz", "--out", tmp_path / "out") == 0
    assert list(shown[0][0]) == ["left", "right", "solo"]
    for name, key in (("left", "left"), ("right", "right"), ("solo", "peep")):
        np.testing.assert_array_equal(shown[0][0][name].motion, lines[key].motion)
    page = (tmp_path / "out" / "duet_separated.html").read_text()
    assert page.count("data:image/jpeg") == 9  # the frames of each, also of who goes by another name


REFUSED = {
    "a class twice": (
        {"classes": "ding,ding"},
        "class 'ding' is given twice: name each of the two, such as left=ding,right=ding, with boxes",
    ),
    "a name twice": ({"classes": "left=ding,left=peep"}, "two sources are named 'left'"),
    "no name": ({"classes": "=ding"}, "'=ding' is not a name and its class"),
    "an unknown class": ({"classes": "left=dong"}, "has not learned class 'dong': did you mean 'ding'"),
    "the residual": ({"classes": "residual=ding"}, "cannot be named 'residual'"),
    "no movement": ({"name": "still"}, "left and right are both ding, and this separator looks at no movement"),
    "the whole frame": ({"more": ["--whole-frame"]}, "--whole-frame shows the same of each: give their boxes"),
    "boxes of the class": (
        {"boxes": {"ding": [0, 0, 1, 1]}},
        "there are no boxes of 'left' (ding): there are those of ding, and ding does not say of which it is",
    ),
    "one box": ({"boxes": {"left": [0, 0, 1, 1]}}, "there are no boxes of 'right' (ding): there are those of left"),
    "the same box": ({"boxes": {"left": [0, 0, 1, 1], "right": [0, 0, 1, 1]}}, "both are shown the same"),
    "a picture of the class": (
        {"more": ["--picture", "ding={home}/photo.png"]},
        "does not say of which ding: name left",
    ),
    "a picture of nobody": (
        {"more": ["--picture", "lft={home}/photo.png"]},
        "of no class that is asked for: left, right",
    ),
    "two pictures": (
        {"more": ["--picture", "left={home}/photo.png", "--picture", "right={home}/photo.png"]},
        "no movement is seen of them",
    ),
    "one of two found": (
        {"detector": FindsOne},
        "duet.mp4: 2 of ding are asked for (left, right), and they are found in 0 of 3 frames: give their boxes (--box",
    ),
    "no detector": ({}, "left and right are both ding: give their boxes (--boxes), for they cannot be looked for"),
    "only a sound": (
        {"file": "duet.wav"},
        "needs video frames, and {home}/duet.wav has none: give --features FILE.npz",
    ),
    "only a sound, and none is needed": ({"file": "duet.wav", "name": "listener"}, "no movement is seen of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(home, argv, tmp_path, capfd, monkeypatch, nowhere, name):
    how, told = REFUSED[name]
    given = swapped(argv, home, how.get("name", "separator"), how.get("classes", TWO))
    given[1] = home / how.get("file", "duet.mp4")
    if "boxes" in how:
        (tmp_path / "boxes.json").write_text(json.dumps({"0": how["boxes"]}))
        given += ["--boxes", tmp_path / "boxes.json"]
    if "detector" in how:
        monkeypatch.setattr(detection, "OWLv2Detector", how["detector"])
    given += [text.format(home=home) for text in how.get("more", ())]
    assert run(*given, "--out", tmp_path / "out", "--no-page") == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "\u2501" not in line]
    assert len(error) == 1, error
    assert told.format(home=home) in error[0]
    assert "photo.jpg" not in error[0]  # two pictures would be refused, too
    assert not (tmp_path / "out").exists()


def test_of_features_of_neither_it_is_said_which_are_missing():
    line = VisualTimeline(object=np.zeros((1, 3, 32, 32), np.uint8), motion=np.zeros((8, 1, 16, 16), np.uint8))
    separator = build_separator(**TINY_SEPARATOR, classes=BUNDLE_CLASSES)
    with pytest.raises(DataError, match=r"of 'left' \(flute\): there are those of flute, and flute does not say"):
        separate_audio(separator, music(), {"flute": line}, ["left=flute", "right=flute"])

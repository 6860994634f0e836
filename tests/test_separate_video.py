"""``avsep separate`` of videos: objects by boxes, by a detector or the whole frame; pages; several files at once."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_SEPARATOR
from media_files import tone, write_video

from avsep import detection
from avsep.cli import main
from avsep.data.visualfile import VisualTimeline
from avsep.detection import BoxTrack, Found, read_boxes
from avsep.errors import DataError
from avsep.footage import sample_pictures, timelines_of_video, track_objects, whole_frame
from avsep.media import read_media_audio
from avsep.separator import build_separator, save_separator
from avsep.types import VisualSource

pytest.importorskip("av")
CLASSES = ("ding", "hum", "peep")
OBJECT = VisualSource(role="object", kind="frames", frames=3)
MOTION = VisualSource(role="motion", kind="frames")
HALVES = {"0": {"ding": [0, 0, 0.5, 1], "peep": [0.5, 0, 1, 1]}}
RED, BLUE = np.array([200, 30, 30]), np.array([30, 30, 200])


def picture(left, right, height=48, width=96):
    frame = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2], frame[:, width // 2 :] = left, right
    return frame


def run(*argv) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A separator that looks at pictures, and a video of two players who change places after three seconds."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    save_separator(build_separator(**TINY_SEPARATOR, classes=CLASSES), folder / "separator")
    pictures = [picture(RED, BLUE) if k < 30 else picture(BLUE, RED) for k in range(50)]
    sound = np.concatenate([tone(5.0, 44100, 330.0), tone(5.0, 44100, 830.0)])
    write_video(folder / "duet.mp4", pictures, sound, layout="stereo")
    (folder / "halves.json").write_text(json.dumps(HALVES))
    return folder


@pytest.fixture
def argv(home):
    return ["separate", home / "duet.mp4", "--run", home / "separator", "--device", "cpu", "--classes", "ding,peep"]


class Finds:
    """A detector that knows red from blue: ding is red, peep is blue."""

    made = 0

    def __init__(self, *, weights="auto", device="cpu", batch=4):
        type(self).made += 1

    def best(self, pictures, prompts):
        scores, boxes = np.full((len(pictures), len(prompts)), 0.02), np.zeros((len(pictures), len(prompts), 4))
        boxes[..., 2:] = 0.3
        for n, shown in enumerate(pictures):
            red_left = shown[0, 5, 5] > shown[2, 5, 5]
            for q, prompt in enumerate(prompts):
                for name, red in (("ding", True), ("peep", False)):
                    if prompt == f"a {name}":
                        scores[n, q] = 0.8
                        boxes[n, q] = (0, 0, 0.5, 1) if red == red_left else (0.5, 0, 1, 1)
        return scores, boxes


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_each_class_is_cut_out_of_its_place_and_time(home):
    track = BoxTrack(
        {
            "ding": [(0.0, Found((0, 0, 0.5, 1), 1, "given")), (3.0, Found((0.5, 0, 1, 1), 1, "given"))],
            "peep": [(0.0, Found((0.5, 0, 1, 1), 1, "given")), (3.0, Found((0, 0, 0.5, 1), 1, "given"))],
        }
    )
    reports = []
    seen = timelines_of_video(
        home / "duet.mp4",
        ["ding", "peep"],
        [OBJECT, MOTION],
        track,
        sizes={"object": 32},
        report=lambda *r: reports.append(r),
    )
    for name, colour in (("ding", RED), ("peep", BLUE)):
        timeline = seen[name]
        assert timeline.object.shape == (5, 3, 32, 32)
        assert timeline.motion.shape == (40, 1, 48, 48)
        assert (timeline.object_rate_hz, timeline.motion_rate_hz) == (1.0, 8.0)
        np.testing.assert_allclose(
            timeline.object[:, :, 8:24, 8:24].mean(axis=(2, 3)), np.tile(colour, (5, 1)), atol=12
        )
        grey = timeline.motion[:, 0, 8:40, 8:40].mean(axis=(1, 2))
        assert np.ptp(grey) < 4
        assert timeline.read(MOTION, centre_s=2.5, duration_s=1.0).shape == (8, 1, 48, 48)
    assert seen["ding"].motion.mean() > seen["peep"].motion.mean() + 10  # red is brighter
    assert reports[-1][0] == 40
    assert all(done <= total for done, total in reports)
    (whole,) = timelines_of_video(home / "duet.mp4", ["ding"], [OBJECT], whole_frame(["ding"])).values()
    assert abs(whole.object[0, 0, 50, 10].astype(int) - whole.object[0, 0, 50, 100]) > 100
    assert whole.motion is None


def test_a_detector_is_asked_once_a_second_and_a_box_holds_for_its_second(home):
    track = track_objects(home / "duet.mp4", ["ding", "hum"], Finds())
    assert [found.box[0] for _, found in track.entries["ding"]] == [0, 0, 0, 0.5, 0.5]
    assert [second for second, _ in track.entries["ding"]] == [0, 1, 2, 3, 4]
    assert track.rules("ding") == {"a ding": 5}
    assert track.rules("hum") == {detection.WHOLE_FRAME: 5}
    assert track.at("ding", 2.9)[0] == 0
    assert track.at("ding", 3.0)[0] == 0.5
    seldom = track_objects(home / "duet.mp4", ["ding"], Finds(), every_s=2.5)
    assert len(seldom.entries["ding"]) == 2
    assert len(sample_pictures(home / "duet.mp4", 12)) == 12
    with pytest.raises(ValueError, match="every_s"):
        track_objects(home / "duet.mp4", ["ding"], Finds(), every_s=0)


def test_a_class_without_boxes_is_refused(home):
    with pytest.raises(DataError, match="no boxes of class 'hum': there are those of ding"):
        timelines_of_video(home / "duet.mp4", ["hum"], [OBJECT], whole_frame(["ding"]))


# --- the command ------------------------------------------------------------------------------------------------------


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_boxes_given(home, argv, tmp_path, capfd):
    assert run(*argv, "--boxes", home / "halves.json", "--out", tmp_path / "out", "--rate", "input") == 0
    assert files(tmp_path / "out") == [
        "duet_ding.wav",
        "duet_peep.wav",
        "duet_residual.wav",
        "duet_separated.html",
    ]
    sounds = [soundfile.read(p) for p in sorted((tmp_path / "out").glob("*.wav"))]
    assert {rate for _, rate in sounds} == {44100}
    total = sum(sound for sound, _ in sounds)
    np.testing.assert_allclose(total, read_media_audio(home / "duet.mp4")[0][0], atol=1e-4)
    page = (tmp_path / "out" / "duet_separated.html").read_text()
    assert page.count("<audio") == 4
    assert page.count("data:image/png") == 6  # four spectrograms, two masks
    assert page.count("data:image/jpeg") == 10
    assert page.count("boxes given") == 2
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "http" not in page.replace("http-equiv", "")
    shown = capfd.readouterr()
    assert "duet_separated.html" in shown.out.replace("\n", "")
    assert "looking at duet.mp4" in shown.err
    assert "separating duet.mp4" in shown.err


def test_what_is_in_the_box_matters(home, argv, tmp_path):
    swapped = tmp_path / "swapped.json"
    swapped.write_text(json.dumps({"0": {"ding": HALVES["0"]["peep"], "peep": HALVES["0"]["ding"]}}))
    found = {}
    for name, path in (("as it is", home / "halves.json"), ("again", home / "halves.json"), ("swapped", swapped)):
        assert run(*argv, "--boxes", path, "--out", tmp_path / name, "--format", "FLOAT", "--no-page") == 0
        found[name] = soundfile.read(tmp_path / name / "duet_ding.wav")[0]
    np.testing.assert_array_equal(found["as it is"], found["again"])
    assert np.abs(found["as it is"] - found["swapped"]).max() > 1e-4


def test_objects_are_found_and_written_down_as_boxes_to_correct(home, argv, tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "OWLv2Detector", Finds)
    assert run(*argv, "--out", tmp_path / "found") == 0
    track = read_boxes(tmp_path / "found" / "duet_boxes.json")
    assert track.at("ding", 0.0) == (0.0, 0.0, 0.5, 1.0)
    assert track.at("ding", 4.0) == (0.5, 0.0, 1.0, 1.0)
    page = (tmp_path / "found" / "duet_separated.html").read_text()
    assert "a ding: 5 of 5 pictures" in page
    assert run(*argv, "--boxes", tmp_path / "found" / "duet_boxes.json", "--out", tmp_path / "given") == 0
    for name in ("duet_ding.wav", "duet_peep.wav", "duet_residual.wav"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()


def test_without_weights_the_whole_frame_is_shown_and_said_in_one_line(argv, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AVSEP_WEIGHTS", raising=False)
    assert run(*argv, "--out", tmp_path / "out") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "whole frame" in line]
    assert len(said) == 1
    assert "hf download google/owlv2-base-patch16-ensemble" in said[0]
    assert "duet_boxes.json" not in files(tmp_path / "out")
    assert run(*argv, "--whole-frame", "--out", tmp_path / "asked") == 0
    assert "whole frame" not in capfd.readouterr().err
    for name in ("duet_ding.wav", "duet_peep.wav"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "asked" / name).read_bytes()


def test_several_files_with_classes_of_their_own(home, argv, tmp_path, monkeypatch, capfd):
    write_video(tmp_path / "solo.mp4", [picture(RED, RED)] * 20, tone(2.0, hz=330.0))
    monkeypatch.setattr(detection, "OWLv2Detector", Finds)
    Finds.made = 0
    argv[argv.index("ding,peep")] = "auto"
    argv.insert(2, tmp_path / "solo.mp4")
    assert run(*argv, "--out", tmp_path / "out", "--suffix", "flac", "--no-page") == 0
    assert Finds.made == 1
    assert files(tmp_path / "out") == [
        *("duet_boxes.json", "duet_ding.flac", "duet_peep.flac", "duet_residual.flac"),
        *("solo_boxes.json", "solo_ding.flac", "solo_peep.flac", "solo_residual.flac"),
    ]
    assert "duet.mp4: ding, peep" in capfd.readouterr().err
    assert soundfile.info(tmp_path / "out" / "duet_ding.flac").format == "FLAC"


def test_auto_takes_the_classes_of_given_boxes(home, argv, tmp_path):
    argv[argv.index("ding,peep")] = "auto"
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"0": {"peep": [0, 0, 1, 1], "tuba": [0, 0, 1, 1]}}))
    assert run(*argv, "--boxes", path, "--out", tmp_path / "out", "--no-page") == 0
    assert files(tmp_path / "out") == ["duet_peep.wav", "duet_residual.wav"]


def test_the_sound_of_a_video_is_enough_where_features_are_given(home, tmp_path):
    from avsep.data.visualfile import write_visual_file

    write_video(tmp_path / "dark.mp4", None, tone(1.0))
    rng = np.random.default_rng(0)
    frames = VisualTimeline(
        object=rng.integers(0, 255, (1, 3, 32, 32), dtype=np.uint8),
        motion=rng.integers(0, 255, (8, 1, 16, 16), dtype=np.uint8),
    )
    write_visual_file(tmp_path / "f.npz", {"ding": frames})
    base = ["separate", tmp_path / "dark.mp4", "--run", home / "separator", "--classes", "auto", "--no-page"]
    assert run(*base, "--features", tmp_path / "f.npz", "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["dark_ding.wav", "dark_residual.wav"]


def test_nothing_is_left_where_the_page_fails(home, argv, tmp_path, monkeypatch):
    def fails(*_):
        raise DataError("the page fails")

    monkeypatch.setattr("avsep.evaluation.separated_page.render_separated", fails)
    assert run(*argv, "--boxes", home / "halves.json", "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()

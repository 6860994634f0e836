"""``avsep separate`` of videos: objects by boxes, by a detector or the whole frame; pages; several files at once."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import soundfile
import torch

from avsep.encoders import VisualEncoder
from avsep.errors import DataError
from avsep.inference.chunking import default_context, plan_chunks
from avsep.media import detection
from avsep.media.detection import BoxTrack, Found, read_boxes
from avsep.media.footage import sample_frames, timelines_of_video, track_objects, whole_frame
from avsep.media.timeline import VisualTimeline
from avsep.media.video import iter_frames, read_media_audio
from avsep.registry import VISUAL_ENCODERS
from avsep.separator import build_separator, save_separator
from avsep.types import VisualSource
from support.commands import run
from support.media_files import tone, write_video
from support.nearby import NEARBY, ONE_VECTOR, error_db, nearby_parts
from support.tones import TINY_FRONT_END, TINY_SEPARATOR, bundle_separator

pytest.importorskip("av")
CLASSES = ("ding", "hum", "peep")
OBJECT = VisualSource(role="object", kind="frames", frames=3)
MOTION = VisualSource(role="motion", kind="frames")
HALVES = {"0": {"ding": [0, 0, 0.5, 1], "peep": [0.5, 0, 1, 1]}}
RED, BLUE = np.array([200, 30, 30]), np.array([30, 30, 200])


def frame(left, right, height=48, width=96):
    frame = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2], frame[:, width // 2 :] = left, right
    return frame


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A separator that looks at frames, and a video of two players who change places after three seconds."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    save_separator(build_separator(**TINY_SEPARATOR, classes=CLASSES), folder / "separator")
    frames = [frame(RED, BLUE) if k < 30 else frame(BLUE, RED) for k in range(50)]
    sound = np.concatenate([tone(5.0, 44100, 330.0), tone(5.0, 44100, 830.0)])
    write_video(folder / "duet.mp4", frames, sound, layout="stereo")
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

    def best(self, frames, prompts):
        scores, boxes = np.full((len(frames), len(prompts)), 0.02), np.zeros((len(frames), len(prompts), 4))
        boxes[..., 2:] = 0.3
        for n, shown in enumerate(frames):
            red_left = shown[0, 5, 5] > shown[2, 5, 5]
            for q, prompt in enumerate(prompts):
                for name, red in (("ding", True), ("peep", False)):
                    if prompt == f"a {name}":
                        scores[n, q] = 0.8
                        boxes[n, q] = (0, 0, 0.5, 1) if red == red_left else (0.5, 0, 1, 1)
        return scores, boxes


# --- frames ---------------------------------------------------------------------------------------------------------


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
        sizes={"object": (32, 24)},
        report=lambda *r: reports.append(r),
    )
    for name, colour in (("ding", RED), ("peep", BLUE)):
        timeline = seen[name]
        assert timeline.object.shape == (5, 3, 32, 24)
        assert timeline.motion.shape == (40, 1, 48, 48)
        assert (timeline.object_rate_hz, timeline.motion_rate_hz) == (1.0, 8.0)
        np.testing.assert_allclose(
            timeline.object[:, :, 8:24, 6:18].mean(axis=(2, 3)), np.tile(colour, (5, 1)), atol=12
        )
        grey = timeline.motion[:, 0, 8:40, 8:40].mean(axis=(1, 2))
        assert np.ptp(grey) < 4
        assert timeline.read(MOTION, centre_s=2.5, duration_s=1.0).shape == (8, 1, 48, 48)
    assert seen["ding"].motion.mean() > seen["peep"].motion.mean() + 10  # red is brighter
    assert reports[-1][0] == 40
    assert all(done <= total for done, total in reports)
    fast = VisualSource("motion", "frames", rate_hz=16.0)
    (often,) = timelines_of_video(home / "duet.mp4", ["ding"], [fast], whole_frame(["ding"])).values()
    assert often.motion_rate_hz == 16.0
    assert often.read(fast, centre_s=2.5, duration_s=1.0).shape == (16, 1, 48, 48)
    (whole,) = timelines_of_video(home / "duet.mp4", ["ding"], [OBJECT], whole_frame(["ding"])).values()
    assert abs(whole.object[0, 0, 50, 10].astype(int) - whole.object[0, 0, 50, 100]) > 100
    assert whole.motion is None


def test_boxes_are_those_of_the_upright_frame(tmp_path):
    """A phone held upright: what its sensor has at the left a player shows at the top."""
    video = write_video(tmp_path / "phone.mp4", [frame(RED, BLUE)] * 10, None, rotation=90)
    halves = {"ding": (0, 0, 1, 0.5), "peep": (0, 0.5, 1, 1)}
    track = BoxTrack({name: [(0.0, Found(box, 1, "given"))] for name, box in halves.items()})
    seen = timelines_of_video(video, ["ding", "peep"], [OBJECT], track)
    means = {name: timeline.object[0].mean(axis=(1, 2)) for name, timeline in seen.items()}
    np.testing.assert_allclose(means["ding"], RED, atol=12)
    np.testing.assert_allclose(means["peep"], BLUE, atol=12)


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
    assert len(sample_frames(home / "duet.mp4", 12)) == 12
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
    np.testing.assert_allclose(total, read_media_audio(home / "duet.mp4", mono=False)[0].T, atol=1e-4)
    page = (tmp_path / "out" / "duet_separated.html").read_text()
    assert page.count("<audio") == 4
    assert page.count("data:image/png") == 6  # four spectrograms, two masks
    assert page.count("data:image/jpeg") == 10
    assert page.count("boxes given") == 2
    links = re.findall(r'(?:src|href)="(?!data:|#)([^"]*)', page)
    assert links == ["duet_ding.wav", "duet_peep.wav", "duet_residual.wav"]  # what lies beside it
    assert "data:video/mp4" in page
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
    assert "a ding: 5 of 5 frames" in page
    assert run(*argv, "--boxes", tmp_path / "found" / "duet_boxes.json", "--out", tmp_path / "given") == 0
    for name in ("duet_ding.wav", "duet_peep.wav", "duet_residual.wav"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()


def test_without_weights_the_whole_frame_is_shown_and_said_in_one_line(argv, tmp_path, nowhere, capfd):
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
    write_video(tmp_path / "solo.mp4", [frame(RED, RED)] * 20, tone(2.0, hz=330.0))
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
    from avsep.media.timeline import write_visual_file

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


def test_features_are_extracted_by_the_encoders_of_their_names(home, tmp_path, monkeypatch):
    """CLIP of each box, in its own shape, one row a second; VideoMAE of frames from all of the video."""
    pytest.importorskip("transformers")
    from support.small_weights import write_small

    monkeypatch.setenv("AVSEP_WEIGHTS", str(write_small(tmp_path / "weights")))
    parts = {
        "object_encoder": ("precomputed", {"features": "clip_vit_b32", "dim": 12}),
        "motion_encoder": ("precomputed", {"features": "videomae_base", "dim": 16}),
    }
    separator = build_separator(**{**TINY_SEPARATOR, **parts}, classes=CLASSES)
    save_separator(separator, tmp_path / "separator")
    track = read_boxes(home / "halves.json")
    seen = timelines_of_video(home / "duet.mp4", ["ding", "peep"], separator.visual_sources(), track)
    clip, videomae = (VISUAL_ENCODERS.create(name, {}) for name in ("clip_vit_b32", "videomae_base"))
    frames = np.stack(list(iter_frames(home / "duet.mp4", 1.0)))  # [5, 3, 48, 96]
    for name, part in (("ding", frames[..., :48]), ("peep", frames[..., 48:])):
        features = seen[name].features
        with torch.inference_mode():
            rows = clip.encode(torch.from_numpy(part.copy())).numpy()
            sequence = videomae(torch.from_numpy(part.copy())[None])[0].numpy()
        np.testing.assert_allclose(features["clip_vit_b32"], rows, atol=1e-5)
        np.testing.assert_allclose(features["videomae_base"], sequence, atol=1e-5)
        assert seen[name].object is None
    assert np.abs(seen["ding"].features["clip_vit_b32"] - seen["peep"].features["clip_vit_b32"]).max() > 0.01
    argv = ["separate", home / "duet.mp4", "--run", tmp_path / "separator", "--classes", "ding,peep", "--no-page"]
    assert run(*argv, "--boxes", home / "halves.json", "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["duet_ding.wav", "duet_peep.wav", "duet_residual.wav"]
    monkeypatch.setenv("AVSEP_WEIGHTS", str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run(*argv, "--boxes", home / "halves.json", "--out", tmp_path / "other") == 2


def test_a_box_that_moves_gives_motion_features_too(home, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from support.small_weights import write_small

    monkeypatch.setenv("AVSEP_WEIGHTS", str(write_small(tmp_path / "weights", ("videomae_base",))))
    track = BoxTrack({"ding": [(0.0, Found((0, 0, 0.5, 1), 1, "given")), (3.0, Found((0.2, 0, 1, 1), 1, "given"))]})
    motion = VisualSource(role="motion", kind="features", name="videomae_base", dim=16)
    seen = timelines_of_video(home / "duet.mp4", ["ding"], [motion], track)
    assert seen["ding"].features["videomae_base"].shape == (16, 2)
    for source, told in (
        (VisualSource(role="motion", kind="features", name="i3d", dim=9), "'i3d', which avsep has no extractor for"),
        (VisualSource(role="motion", kind="features", name="clip_vit_b32", dim=9), "no extractor"),
        (VisualSource(role="motion", kind="features", name="videomae_base", dim=768), "768 wide, and the weights"),
    ):
        with pytest.raises(DataError, match=told):
            timelines_of_video(home / "duet.mp4", ["ding"], [source], track)


def test_a_bundle_sees_what_the_run_sees(home, tiny_bundle, tmp_path, monkeypatch):
    """Features extracted for its graph; the same sounds as with the separator itself."""

    class Colours(VisualEncoder):
        """Stands for an extractor: means of the colours, and their squares."""

        provides, extracts, dim = ("object",), ("object",), 8

        def __init__(self, *, weights: str = "auto") -> None:
            super().__init__()

        def encode(self, frames):
            mean = frames.float().mean(dim=(2, 3)) / 255
            return torch.cat((mean, mean**2, mean[:, :2] ** 3), dim=1)

        def source(self):
            return VisualSource(role="object", kind="frames", frames=1)

        def forward(self, inputs):
            return self.encode(inputs[:, 0])

    monkeypatch.setitem(VISUAL_ENCODERS._components, "clip", None)  # put back afterwards
    del VISUAL_ENCODERS._components["clip"]
    VISUAL_ENCODERS.register("clip", source="tests")(Colours)
    (tmp_path / "boxes.json").write_text(json.dumps({"0": {"flute": [0, 0, 0.5, 1], "cello": [0.5, 0, 1, 1]}}))
    save_separator(bundle_separator(), tmp_path / "separator")
    options = ["--boxes", tmp_path / "boxes.json", "--classes", "flute,cello"]
    options += ["--format", "FLOAT", "--no-page", "--mono"]
    assert run("separate", home / "duet.mp4", "--bundle", tiny_bundle, "--out", tmp_path / "b", *options) == 0
    assert files(tmp_path / "b") == ["duet_cello.wav", "duet_flute.wav", "duet_residual.wav"]
    assert run("separate", home / "duet.mp4", "--run", tmp_path / "separator", "--out", tmp_path / "r", *options) == 0
    for name in ("duet_flute.wav", "duet_cello.wav"):
        sounds = [soundfile.read(tmp_path / folder / name)[0] for folder in ("b", "r")]
        np.testing.assert_allclose(*sounds, atol=1e-4)


def test_seams_of_a_video_are_60_db_below_the_whole(tmp_path):
    """Of a separator that hears a neighbourhood: the chunks' result against the whole recording at once."""
    rng = np.random.default_rng(0)
    sound = 0.1 * rng.standard_normal((1, 6 * 44100)).astype(np.float32) + tone(6.0)
    video = write_video(tmp_path / "noise.mp4", [frame(RED, BLUE)] * 60, sound)
    found = {}
    with nearby_parts():
        for name, samples, more in (
            ("chunks", 8191, ()),
            ("whole", 9 * 8192 - 1, ()),
            ("cut", 8191, ("--context", "0")),
        ):
            torch.manual_seed(3)
            separator = build_separator(
                audio_encoder=NEARBY,
                object_encoder=("frame_cnn", {"dim": 4}),
                mask_decoder=ONE_VECTOR,
                classes=CLASSES,
                front_end={**TINY_FRONT_END, "clip_samples": samples},
            )
            save_separator(separator, tmp_path / name)
            argv = ["separate", video, "--run", tmp_path / name, "--classes", "ding,peep", "--whole-frame"]
            assert run(*argv, "--out", tmp_path / f"{name}-out", "--format", "FLOAT", "--no-page", *more) == 0
            found[name] = np.stack(
                [soundfile.read(tmp_path / f"{name}-out" / f"noise_{c}.wav")[0] for c in ("ding", "peep")]
            )
    chunks, whole = found["chunks"], found["whole"]
    assert chunks.shape[1] > 8 * 8191 * 3 // 4
    assert error_db(whole, np.full_like(whole, 0.5) * whole.sum(axis=0)) > -20  # the masks do something
    assert error_db(chunks, whole) < -60
    assert error_db(found["cut"], whole) > -40  # without context the same chunks miss the bar
    plan = plan_chunks(chunks.shape[1], clip_samples=8191, context_samples=default_context(8191), align_samples=64)
    for chunk in plan[:-1]:
        around = slice(chunk.right - 100, chunk.right + 100)
        assert error_db(chunks[:, around], whole[:, around]) < -60


def test_nothing_is_left_where_the_page_fails(home, argv, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise DataError("the page fails")

    monkeypatch.setattr("avsep.inference.page.render_separated", fails)
    assert run(*argv, "--boxes", home / "halves.json", "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()

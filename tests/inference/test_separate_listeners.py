"""``avsep separate``: channels, presence, pictures or none, limited masks, and results that are of no use."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
import soundfile
import torch

from avsep.errors import DataError
from avsep.inference.recordings import (
    Findings,
    Recording,
    Separated,
    separate_and_tell,
    separate_audio,
    separate_recordings,
)
from avsep.media.timeline import VisualTimeline, write_visual_file
from avsep.separator import build_separator, save_separator
from support.commands import run
from support.listeners import listener_part, listening_separator
from support.media_files import tone, write_video
from support.tones import BUNDLE_CLASSES, RATE, TINY_SEPARATOR, bundle_separator

CLIP = 8191
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Separators of frames and of stored features, one that needs frames, and a stereo song."""
    folder = tmp_path_factory.mktemp("home")
    with listener_part():
        save_separator(listening_separator(frames=True, level_db=-25.0), folder / "frames")
        save_separator(listening_separator(), folder / "features")
        torch.manual_seed(0)
        save_separator(build_separator(**TINY_SEPARATOR, classes=BUNDLE_CLASSES), folder / "needy")
        soundfile.write(folder / "song.wav", stereo(1.5).T, RATE, subtype="FLOAT")
        soundfile.write(folder / "solo.wav", stereo(1.5)[0], RATE, subtype="FLOAT")
        pixels = np.zeros((40, 60, 3), np.uint8)
        pixels[:, :30] = 220
        Image.fromarray(pixels).save(folder / "photo.png")
        Image.fromarray(255 - pixels).save(folder / "other.png")
        yield folder


def stereo(seconds):
    rng = np.random.default_rng(0)
    time_s = np.arange(int(seconds * RATE)) / RATE
    tones = [sum(np.sin(2 * np.pi * f * time_s) for f in rng.uniform(100, 3000, 5)) for _ in range(2)]
    return (0.06 * np.stack(tones)).astype(np.float32)


@pytest.fixture
def argv(home):
    return [
        *("separate", home / "song.wav", "--run", home / "frames", "--device", "cpu", "--format", "FLOAT"),
        *("--classes", "flute,piano"),
    ]


def read(folder, *names):
    return [soundfile.read(folder / f"song_{name}.wav")[0] for name in names or ("flute", "piano", "residual")]


# --- the functions ----------------------------------------------------------------------------------------------------


def test_masks_are_found_once_and_applied_to_each_channel():
    separator = listening_separator(level_db=-25.0)
    mixture = stereo(2.0)
    both, presence = separate_and_tell(separator, mixture, {}, ["flute", "piano"])
    assert both.shape == (2, *mixture.shape)
    assert presence.shape == (2,)
    panned = separate_audio(separator, np.stack([mixture[0], 0 * mixture[0]]), {}, ["flute", "piano"])
    assert np.abs(panned[:, 1]).max() == 0
    np.testing.assert_allclose(panned[:, 0], separate_audio(separator, mixture[0], {}, ["flute", "piano"]), atol=1e-4)
    mono, told = separate_and_tell(separator, mixture.mean(axis=0), {}, ["flute", "piano"])
    np.testing.assert_allclose(both.mean(axis=1), mono, atol=1e-5)
    np.testing.assert_allclose(presence, told, atol=1e-5)


def test_presence_is_the_largest_of_any_chunk(monkeypatch):
    separator = listening_separator()
    told = iter([[0.0, -9.0], [-9.0, 1.0], [-9.0, -9.0]])
    original = separator.separate_and_tell

    def answers(mixture, visual, ids, **options):
        sources, output = original(mixture, visual, ids, **options)
        output.presence = torch.tensor([next(told)])
        return sources, output

    monkeypatch.setattr(separator, "separate_and_tell", answers)
    found = separate_and_tell(separator, stereo(1.8)[0], {}, ["flute", "piano"], batch=1)
    np.testing.assert_allclose(found.presence, torch.sigmoid(torch.tensor([0.0, 1.0])))
    assert next(told, None) is None


def test_seen_and_unseen_go_together():
    """Motion of several lengths beside a source without a picture."""
    separator = listening_separator()
    rng = np.random.default_rng(0)
    lines = {
        name: VisualTimeline(
            features={
                "o": rng.standard_normal((3, 8)).astype(np.float32),
                "m": rng.standard_normal((6, steps)).astype(np.float32),
            }
        )
        for name, steps in (("flute", 8), ("piano", 8))
    }
    mixture = stereo(1.0)[0]
    alone = separate_audio(separator, mixture, {"flute": lines["flute"]}, ["flute"])
    beside = separate_audio(separator, mixture, {"flute": lines["flute"]}, ["cello", "flute"])
    np.testing.assert_allclose(beside[1], alone[0], atol=1e-5)
    np.testing.assert_allclose(beside[0], separate_audio(separator, mixture, {}, ["cello"])[0], atol=1e-5)
    shown = separate_audio(separator, mixture, {"cello": lines["piano"]}, ["cello"])
    assert np.abs(beside[0] - shown[0]).max() > 1e-3
    with torch.no_grad():
        separator.mask_decoder.no_object.add_(3.0)  # what stands for a picture where there is none
    changed = separate_audio(separator, mixture, {"flute": lines["flute"]}, ["cello", "flute"])
    np.testing.assert_allclose(changed[1], beside[1], atol=1e-5)
    assert np.abs(changed[0] - beside[0]).max() > 1e-3
    with pytest.raises(DataError, match="of class 'flute': there are those of none"):
        separate_audio(bundle_separator(), mixture, {}, ["flute"])


def test_limited_masks_add_up_for_any_separator():
    separator = listening_separator()
    mixture, classes = stereo(1.4), list(BUNDLE_CLASSES)
    free = separate_audio(separator, mixture, {}, classes)
    limited = separate_audio(separator, mixture, {}, classes, limit_mask_sum=True)
    assert np.abs(free - limited).max() > 1e-3
    energy = np.sum(mixture**2)
    for part in (*limited, mixture - limited.sum(axis=0)):
        assert np.sum(part**2) <= energy


def _recording(path, make, classes=("a", "b", "c")):
    return Recording(path, classes, lambda mixture, report: make(mixture))


def test_results_of_no_use_are_found(home, tmp_path):
    def bad(mixture):
        return Separated(np.stack([0.5 * mixture, 0.3 * mixture, 0.97 * mixture]), np.float32([0.9, 0.2, 0.5]))

    (found,) = separate_recordings(
        [_recording(home / "song.wav", bad)], tmp_path / "out", sample_rate_hz=RATE, threshold=0.5
    )
    findings = found.findings
    assert [(one, other) for one, other, _ in findings.alike] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert findings.alike[0][2] == pytest.approx(1.0)
    assert findings.unseparated == {"c": pytest.approx(20 * np.log10(0.97), abs=0.01)}
    assert findings.absent == ("b",)
    assert findings.presence == {"a": pytest.approx(0.9), "b": pytest.approx(0.2), "c": 0.5}
    assert found.channels == 2
    lines = findings.lines()
    assert len(lines) == 5
    assert lines[0] == "b: probably not in this recording (presence 20 %)"
    assert "a and b are nearly the same sound (correlation 1.00)" in lines[1]
    assert "c hardly differs from the recording itself (-0.3 dB)" in lines[-1]
    assert findings.tags("b") == [
        "probably not in this recording (presence 20 %)",
        "nearly the same sound as a",
        "nearly the same sound as c",
    ]


def test_results_of_use_are_not(home, tmp_path):
    def good(mixture):
        rng = np.random.default_rng(0)
        noise = 0.1 * rng.standard_normal(mixture.shape).astype(np.float32)
        return Separated(np.stack([0.5 * mixture, noise, 0 * mixture]))

    (found,) = separate_recordings([_recording(home / "song.wav", good)], tmp_path / "out", sample_rate_hz=RATE)
    assert found.findings == Findings()
    assert found.findings.lines() == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_stereo_file_gives_stereo_files(home, argv, tmp_path, capfd):
    assert run(*argv, "--out", tmp_path / "a") == 0
    parts = read(tmp_path / "a")
    assert {part.shape for part in parts} == {stereo(1.5).T.shape}
    np.testing.assert_allclose(sum(parts), stereo(1.5).T, atol=1e-6)
    page = (tmp_path / "a" / "song_separated.html").read_text()
    assert "stereo, 11,025 Hz" in page
    sounds = [base64.b64decode(text) for text in re.findall(r"data:audio/wav;base64,([A-Za-z0-9+/=]+)", page)]
    assert [soundfile.info(io.BytesIO(sound)).channels for sound in sounds] == [2] * 4
    assert "add up" not in page
    assert "add up" not in capfd.readouterr().out
    assert run(*argv, "--out", tmp_path / "b", "--mono") == 0
    parts = read(tmp_path / "b")
    np.testing.assert_allclose(sum(parts), stereo(1.5).mean(axis=0), atol=1e-6)
    assert ", mono, 11,025 Hz" in (tmp_path / "b" / "song_separated.html").read_text()


def test_without_any_picture(home, argv, tmp_path, capfd):
    assert run(*argv, "--out", tmp_path / "a") == 0
    told = capfd.readouterr()
    assert "song.wav: no picture of flute, piano: asked for by name alone" in told.err
    assert "presence" in told.out
    assert (tmp_path / "a" / "song_separated.html").read_text().count("no picture") == 2
    assert not (tmp_path / "a" / "song_boxes.json").exists()
    assert run(*argv, "--out", tmp_path / "b", "--boxes", home / "boxes.json") == 2
    (tmp_path / "boxes.json").write_text(json.dumps({"0": {"flute": [0, 0, 1, 1], "piano": [0, 0, 1, 1]}}))
    capfd.readouterr()
    for option in (["--boxes", tmp_path / "boxes.json"], ["--whole-frame"]):
        assert run(*argv, "--out", tmp_path / "b", *option) == 2
        assert f"{option[0]} is of a video" in capfd.readouterr().err
    argv[argv.index("flute,piano")] = "auto"
    assert run(*argv, "--out", tmp_path / "b") == 2
    assert "name the classes instead of auto" in capfd.readouterr().err
    assert not (tmp_path / "b").exists()


def test_one_picture_a_class(home, argv, tmp_path, capfd):
    found = {}
    for name, more in (
        ("none", []),
        ("flute", ["--picture", f"flute={home / 'photo.png'}"]),
        ("other", ["--picture", f"flute={home / 'other.png'}"]),
        ("both", ["--picture", f"flute={home / 'photo.png'}", "--picture", f"piano={home / 'photo.png'}"]),
    ):
        assert run(*argv, "--out", tmp_path / name, *more) == 0
        found[name] = read(tmp_path / name)
    np.testing.assert_allclose(found["flute"][1], found["none"][1], atol=1e-6)  # the piano is as it was
    np.testing.assert_allclose(found["flute"][0], found["both"][0], atol=1e-6)
    assert np.abs(found["flute"][0] - found["none"][0]).max() > 1e-4
    assert np.abs(found["flute"][0] - found["other"][0]).max() > 1e-4
    page = (tmp_path / "flute" / "song_separated.html").read_text()
    assert page.count("picture given") == 1
    assert page.count("data:image/jpeg") == 1
    needy = [*argv[:3], home / "needy", *argv[4:]]
    assert run(*needy, "--out", tmp_path / "needy", *more) == 0  # one that cannot go unseen
    capfd.readouterr()
    argv[argv.index("flute,piano")] = "auto"
    assert run(*argv, "--out", tmp_path / "auto", "--no-page", *more) == 0
    np.testing.assert_array_equal(read(tmp_path / "auto")[0], found["both"][0])


@pytest.mark.parametrize(
    ("separator", "more", "told"),
    [
        ("needy", [], "needs video frames, and {home}/song.wav has none: give --features FILE.npz (see: avsep data "
         "features), or a picture of each class (--picture flute=photo.jpg)"),
        ("needy", ["--picture", "flute={home}/photo.png"], "(--picture piano=photo.jpg)"),
        ("frames", ["--picture", "photo.png"], "'photo.png' is not a class and its picture"),
        ("frames", ["--picture", "flute="], "is not a class and its picture"),
        ("frames", ["--picture", "flute={home}/no.png"], "no such picture: {home}/no.png"),
        ("frames", ["--picture", "flute={home}/song.wav"], "cannot be read as a picture"),
        ("frames", ["--picture", "harp={home}/photo.png"], "has not learned class 'harp'"),
        ("frames", ["--picture", "cello={home}/photo.png"], "of no class that is asked for: flute, piano"),
        ("frames", ["--picture", "flute={home}/photo.png", "--picture", "flute=x"], "two pictures of 'flute'"),
        ("features", ["--picture", "flute={home}/photo.png"], "looks at object features 'o', and a picture gives"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(home, argv, tmp_path, capfd, separator, more, told):
    given = [*argv[:3], home / separator, *argv[4:], *(text.format(home=home) for text in more)]
    assert run(*given, "--out", tmp_path / "out", "--no-page") == 2
    error = capfd.readouterr().err
    assert told.format(home=home) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_picture_and_features_of_one_class(home, argv, tmp_path, capfd):
    timeline = VisualTimeline(object=np.zeros((2, 3, 16, 16), np.uint8), motion=np.zeros((12, 1, 16, 16), np.uint8))
    write_visual_file(tmp_path / "f.npz", {"flute": timeline})
    more = ["--features", tmp_path / "f.npz", "--picture"]
    assert run(*argv, "--out", tmp_path / "a", "--no-page", *more, f"piano={home / 'photo.png'}") == 0
    assert "no picture of" not in capfd.readouterr().err
    assert run(*argv, "--out", tmp_path / "b", "--no-page", *more, f"flute={home / 'photo.png'}") == 2
    assert "--picture and --features both say what is seen of 'flute'" in capfd.readouterr().err


def test_a_video_is_looked_at_for_the_others_alone(home, argv, tmp_path):
    pytest.importorskip("av")
    frames = [np.full((32, 48, 3), 90, np.uint8)] * 15
    video = write_video(tmp_path / "song.mp4", frames, tone(1.5, channels=2), layout="stereo")
    (tmp_path / "boxes.json").write_text(json.dumps({"0": {"piano": [0, 0, 1, 1]}}))
    given = [argv[0], video, *argv[2:], "--picture", f"flute={home / 'photo.png'}", "--boxes", tmp_path / "boxes.json"]
    assert run(*given, "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "song_separated.html").read_text()
    assert page.count("picture given") == 1
    assert page.count("boxes given") == 1
    assert soundfile.info(tmp_path / "out" / "song_flute.wav").channels == 2


def test_the_page_and_the_terminal_say_that_the_parts_add_up_where_they_do(home, argv, tmp_path, capfd):
    words = "the parts and the residual add up to the mixture, and no part is louder than it"
    assert run(*argv, "--out", tmp_path / "a", "--limit-mask-sum") == 0
    assert words in capfd.readouterr().out.replace("\n", "")
    assert words in (tmp_path / "a" / "song_separated.html").read_text().replace("The parts", "the parts")
    for part in read(tmp_path / "a"):
        assert np.sum(part**2) <= np.sum(stereo(1.5) ** 2)


def test_the_page_and_the_terminal_tell_what_is_of_no_use(home, argv, tmp_path, capfd, monkeypatch):
    import avsep.inference.recordings as recordings

    def bad(separator, mixture, *_, **__):
        return Separated(np.stack([0.99 * mixture, 0.5 * mixture]), np.float32([0.01, 0.9]))

    monkeypatch.setattr(recordings, "separate_and_tell", bad)
    assert run(*argv, "--out", tmp_path / "a") == 0
    told = capfd.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("song.wav: ") and "no picture" not in line]
    assert len(lines) == 3
    page = (tmp_path / "a" / "song_separated.html").read_text()
    for words in (
        "probably not in this recording (presence 1 %)",
        "nearly the same sound",
        "hardly differs from the recording",
    ):
        assert sum(words in line for line in lines) == 1
        assert words in page
    assert "90%" in told.out


def test_more_channels_than_two_are_kept_and_the_page_plays_their_mean(home, argv, tmp_path):
    soundfile.write(tmp_path / "song.wav", np.concatenate([stereo(1.0), stereo(1.0)[:1]]).T, RATE, subtype="FLOAT")
    assert run(argv[0], tmp_path / "song.wav", *argv[2:], "--out", tmp_path / "out") == 0
    assert {part.shape[1] for part in read(tmp_path / "out")} == {3}
    assert "3 channels, of which the page plays the mean" in (tmp_path / "out" / "song_separated.html").read_text()


def test_clipped_samples_of_all_channels_are_counted(tmp_path):
    loud = np.stack([1.5 * np.ones(4000), 0.1 * np.ones(4000)]).astype(np.float32)
    soundfile.write(tmp_path / "loud.wav", loud.T, RATE, subtype="FLOAT")

    def same(mixture):
        return Separated(np.stack([mixture, mixture[::-1]]))

    (found,) = separate_recordings(
        [_recording(tmp_path / "loud.wav", same, ("a", "b"))], tmp_path / "out", sample_rate_hz=RATE
    )
    assert found.clipped == 12000  # of one channel in each of two sources and the residual
    assert found.levels_db["a"] == pytest.approx(10 * np.log10((1.5**2 + 0.1**2) / 2), abs=0.01)

"""Separating recordings: any rate, length and channel count; every mistake is one line and leaves the folder alone."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from avsep.cli.separate_command import command
from avsep.environment import pick_device
from avsep.errors import AudioError, AvsepError, ConfigError, DataError, NumericalError, UnknownNameError
from avsep.inference.recordings import read_mixture, separate_audio, separate_file, separate_files
from avsep.media.audio import read_audio
from avsep.media.timeline import VisualTimeline, write_visual_file
from avsep.separator import build_separator, save_separator

CLASSES = ("flute", "piano", "acoustic guitar")
RATE = 11025
CLIP = 32767


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    return build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 8}),
        object_encoder=("frame_cnn", {"dim": 16}),
        motion_encoder=("precomputed", {"features": "m", "dim": 12}),
        mask_decoder=("query_transformer", {"dim": 32, "heads": 4, "feedforward": 64}),
        classes=CLASSES,
        front_end={"clip_samples": CLIP, "log_rows": 128},
    ).eval()


@pytest.fixture(scope="module")
def timelines():
    """Frames of different sizes and motion of different lengths: every source has its own video."""
    rng = np.random.default_rng(0)
    return {
        name: VisualTimeline(
            object=rng.integers(0, 256, (6, 3, 32 + 8 * n, 40), dtype=np.uint8),
            features={"m": rng.standard_normal((12, 5 + n)).astype(np.float32)},
            where=f"video of {name}",
        )
        for n, name in enumerate(CLASSES)
    }


def music(seconds, rate_hz=RATE, seed=0):
    rng = np.random.default_rng(seed)
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    tones = sum(
        np.sin(2 * np.pi * f * time_s + p) for f, p in zip(rng.uniform(100, 3000, 8), rng.uniform(0, 6, 8), strict=True)
    )
    return (0.08 * tones).astype(np.float32)


@pytest.fixture
def all_pass(monkeypatch, separator):
    """Masks of one half for the first source and one quarter for the second, whatever is heard."""

    def halves(network_input, visual, class_ids):
        from avsep.types import MaskOutput

        shares = torch.tensor([0.5, 0.25])[: class_ids.shape[1]]
        logits = torch.log(shares / (1 - shares))[None, :, None, None]
        size = (*class_ids.shape, *network_input.shape[2:])
        return MaskOutput(logits=logits.expand(size), audio=torch.zeros(*class_ids.shape, 1))

    monkeypatch.setattr(separator, "forward", halves)
    return separator


@pytest.mark.parametrize("seconds", [0.001, 0.5, 2.972, 2.98, 7.0])
def test_constant_masks_leave_no_seam(all_pass, timelines, seconds):
    mixture = music(seconds)
    sources = separate_audio(all_pass, mixture, timelines, ["flute", "piano"], batch=2)
    assert sources.shape == (2, len(mixture))
    for source, share in zip(sources, (0.5, 0.25), strict=True):
        error_db = 10 * np.log10(np.mean((source - share * mixture) ** 2) / np.mean((share * mixture) ** 2))
        assert error_db < -100


@pytest.mark.parametrize(("rate_hz", "channels"), [(44100, 2), (8000, 1), (11025, 3), (96000, 1)])
@pytest.mark.parametrize("rate", ["model", "input", "16000"])
def test_files_add_up_to_the_mixture_with_its_channels(all_pass, timelines, tmp_path, rate_hz, channels, rate):
    audio = np.stack([music(1.3, rate_hz, seed) for seed in range(channels)])
    soundfile.write(tmp_path / "duet.wav", audio.T, rate_hz, subtype="FLOAT")
    result = separate_file(
        all_pass,
        tmp_path / "duet.wav",
        timelines,
        ["flute", "acoustic guitar"],
        tmp_path / "out",
        rate=rate,
        subtype="FLOAT",
    )
    expected_hz = {"model": RATE, "input": rate_hz, "16000": 16000}[rate]
    assert result.rate_hz == expected_hz
    names = ["duet_acoustic-guitar.wav", "duet_flute.wav", "duet_residual.wav"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == names
    total = sum(read_audio(f)[0] for f in (tmp_path / "out").iterdir())
    assert read_audio(result.residual)[1] == expected_hz
    assert total.shape == (channels, round(audio.shape[1] * expected_hz / rate_hz))
    assert result.channels == channels
    if expected_hz == rate_hz:
        np.testing.assert_allclose(total, audio, atol=1e-6)
    assert result.levels_db["flute"] == pytest.approx(result.levels_db["acoustic guitar"] + 6.02, abs=0.1)
    assert result.clipped == 0


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_rescaling_scales_all_files_of_a_recording_by_one_factor(all_pass, timelines, tmp_path, subtype):
    loud, quiet = (write(tmp_path, f"{name}.wav", level * music(1.3)) for name, level in (("loud", 8), ("quiet", 1)))
    classes = ["flute", "acoustic guitar"]
    clipped, _ = separate_files(all_pass, [loud, quiet], timelines, classes, tmp_path / "a", subtype=subtype)
    assert clipped.clipped > 0
    assert clipped.gain == 1.0
    fitted, same = separate_files(
        all_pass, [loud, quiet], timelines, classes, tmp_path / "b", subtype=subtype, rescale=True
    )
    assert same.gain == 1.0
    assert fitted.clipped == same.clipped == 0
    assert fitted.gain < 0.9
    for result, level in ((fitted, 8 * fitted.gain), (same, 1)):
        parts = [read_audio(f)[0][0] for f in (*result.files.values(), result.residual)]
        np.testing.assert_allclose(sum(parts), level * music(1.3), atol=2e-4)
        assert max(np.abs(part).max() for part in parts) == pytest.approx(1 if result is fitted else 0.3, abs=0.1)
    assert fitted.levels_db == clipped.levels_db  # as separated
    with pytest.raises(ConfigError, match="FLOAT keeps every sample"):
        separate_file(all_pass, loud, timelines, classes, tmp_path / "c", subtype="FLOAT", rescale=True)
    assert not (tmp_path / "c").exists()


def test_the_way_out_of_clipping_is_told(all_pass, timelines, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("avsep.separator.load_separator", lambda run, task=None: all_pass)
    write_visual_file(tmp_path / "f.npz", timelines)
    loud = write(tmp_path, "loud.wav", 8 * music(0.4))
    arguments = {"run": tmp_path, "classes": ["flute"], "features": tmp_path / "f.npz", "device": "cpu", "page": False}
    command([loud], out=tmp_path / "a", **arguments)
    told = capsys.readouterr().err
    assert "beyond full scale and are clipped: --rescale scales all files of a recording by one factor" in told
    assert "--format FLOAT" in told
    command([loud], out=tmp_path / "b", rescale=True, **arguments)
    told = capsys.readouterr().err
    assert "clipped" not in told
    gain = float(told.partition("loud.wav: all files are scaled by ")[2].split()[0])
    parts = [soundfile.read(tmp_path / "b" / f"loud_{name}.wav")[0] for name in ("flute", "residual")]
    np.testing.assert_allclose(sum(parts), 8 * gain * music(0.4), atol=1e-3)
    with pytest.raises(ConfigError, match="--rescale does nothing"):
        command([loud], out=tmp_path / "c", rescale=True, subtype="FLOAT", **arguments)


@pytest.mark.parametrize("value", [1e30, 32768.0, np.nan])
def test_samples_that_no_recording_has_are_not_the_separators_fault(separator, timelines, tmp_path, value):
    mixture = music(0.4)
    mixture[7] = value
    with pytest.raises(AudioError, match=r"the mixture (reaches|has 1 NaN)"):
        separate_audio(separator, mixture, timelines, ["flute"])
    with pytest.raises(AudioError, match=r"a\.wav (reaches|has 1 NaN)"):
        separate_file(separator, write(tmp_path, "a.wav", mixture), timelines, ["flute"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_chunk_gets_the_frames_of_its_time(separator, timelines, monkeypatch):
    """The object is looked up at the chunk's middle, motion over the chunk."""
    asked = []
    original = VisualTimeline.read

    def spy(self, source, centre_s, duration_s):
        asked.append((source.role, round(centre_s, 2), round(duration_s, 2)))
        return original(self, source, centre_s=centre_s, duration_s=duration_s)

    monkeypatch.setattr(VisualTimeline, "read", spy)
    separate_audio(separator, music(6.0), timelines, ["flute"], batch=1)
    clip_s = CLIP / RATE
    objects = [centre for role, centre, _ in asked[2:] if role == "object"]  # the first two are the check beforehand
    assert len(objects) == 3
    assert objects[0] == pytest.approx(clip_s / 2, abs=0.01)
    assert objects[-1] == pytest.approx(6.0 - clip_s / 2, abs=0.03)
    assert {duration for _, _, duration in asked} == {round(clip_s, 2)}
    asked.clear()
    separate_audio(separator, music(1.0), timelines, ["flute"])  # shorter than a chunk: the middle of what there is
    assert asked[2:] == [("object", 0.5, round(clip_s, 2)), ("motion", round(clip_s / 2, 2), round(clip_s, 2))]


def test_batches_do_not_change_the_result_and_the_order_of_classes_is_kept(separator, timelines):
    mixture = music(8.0)
    one = separate_audio(separator, mixture, timelines, list(CLASSES), batch=1)
    many = separate_audio(separator, mixture, timelines, list(CLASSES), batch=8)
    np.testing.assert_allclose(one, many, atol=1e-5)
    turned = separate_audio(separator, mixture, timelines, ["piano", "flute"])
    np.testing.assert_allclose(turned[0], one[1], atol=1e-4)
    np.testing.assert_allclose(turned[1], one[0], atol=1e-4)
    assert np.abs(one[0] - one[1]).max() > 1e-3


def test_mode_is_restored(separator, timelines):
    separator.train()
    try:
        separate_audio(separator, music(0.2), timelines, ["flute"])
        assert separator.training
    finally:
        separator.eval()


def write(folder, name, samples, rate_hz=RATE):
    soundfile.write(folder / name, samples, rate_hz, subtype="FLOAT")
    return folder / name


def test_mistakes_are_one_line_and_nothing_is_written(separator, timelines, tmp_path):
    good = write(tmp_path, "good.wav", music(0.3))
    silent = write(tmp_path, "silent.wav", np.zeros(500))
    opposite = write(tmp_path, "opposite.wav", np.stack([music(0.3), -music(0.3)], axis=1))
    nan = write(tmp_path, "nan.wav", np.full(100, np.nan))
    lone = {"flute": timelines["flute"]}
    narrow = {
        "flute": VisualTimeline(
            object=timelines["flute"].object, features={"m": np.ones((9, 5), np.float32)}, where="f"
        )
    }
    frameless = {"flute": VisualTimeline(features=timelines["flute"].features, where="f")}
    broken = {
        "flute": VisualTimeline(
            object=timelines["flute"].object, features={"m": np.full((12, 5), np.nan, np.float32)}, where="f"
        )
    }
    out = tmp_path / "out"
    (tmp_path / "taken").write_text("mine")
    flute = ["flute"]
    cases = [
        (AudioError, "silent", [silent], timelines, flute, out, {}),
        (AudioError, "2 channels are mixed", [good, opposite], timelines, flute, out, {}),
        (AudioError, "NaN", [good, nan], timelines, flute, out, {}),
        (AudioError, "no such", [tmp_path / "no.wav"], timelines, flute, out, {}),
        (UnknownNameError, "did you mean 'flute'", [good], timelines, ["flue"], out, {}),
        (ConfigError, "given twice", [good], timelines, ["flute", "flute"], out, {}),
        (ConfigError, "no classes", [good], timelines, [], out, {}),
        (DataError, "'piano'.*flute", [good], lone, ["flute", "piano"], out, {}),
        (DataError, "9 wide.*12", [good], narrow, flute, out, {}),
        (DataError, "no object frames", [good], frameless, flute, out, {}),
        (DataError, "NaN", [good], broken, flute, out, {}),
        (ConfigError, "is a file", [good], timelines, flute, tmp_path / "taken", {}),
        (ConfigError, "named good_flute.wav", [good, good], timelines, flute, out, {}),
        (ConfigError, "'loud'", [good], timelines, flute, out, {"rate": "loud"}),
        (ConfigError, "'7'", [good], timelines, flute, out, {"rate": "7"}),
        (ConfigError, "PCM_8", [good], timelines, flute, out, {"subtype": "PCM_8"}),
        (ConfigError, "no audio", [], timelines, flute, out, {}),
        (ConfigError, "context", [good], timelines, flute, out, {"context_s": 2.0}),
    ]
    for error, fragment, paths, lines, classes, folder, options in cases:
        with pytest.raises(error, match=fragment) as caught:
            separate_files(separator, paths, lines, classes, folder, **options)
        assert "\n" not in str(caught.value)
        assert not out.exists(), fragment
    assert (tmp_path / "taken").read_text() == "mine"


def test_existing_files_are_kept_unless_asked(separator, timelines, tmp_path):
    good = write(tmp_path, "good.wav", music(0.3))
    (tmp_path / "good_flute.wav").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        separate_file(separator, good, timelines, ["flute"], tmp_path)
    assert (tmp_path / "good_flute.wav").read_bytes() == b"mine"
    separate_file(separator, good, timelines, ["flute"], tmp_path, overwrite=True)
    assert read_audio(tmp_path / "good_flute.wav")[0].shape == (1, int(0.3 * RATE))
    clash = write(tmp_path, "good_piano.wav", music(0.3))
    with pytest.raises(ConfigError, match="replace the input"):
        separate_files(separator, [good, clash], timelines, ["piano"], tmp_path, overwrite=True)


def test_failure_in_the_second_file_writes_nothing_of_the_first(separator, timelines, tmp_path, monkeypatch):
    first, second = write(tmp_path, "a.wav", music(0.3)), write(tmp_path, "b.wav", 2 * music(0.3))
    original = separator.separate_and_tell
    calls = []

    def fails(*given, **options):
        calls.append(1)
        result, output = original(*given, **options)
        return (result * torch.nan if len(calls) == 2 else result), output

    monkeypatch.setattr(separator, "separate_and_tell", fails)
    with pytest.raises(NumericalError, match=r"0\.0 s"):
        separate_files(separator, [first, second], timelines, ["flute"], tmp_path / "out")
    assert len(calls) == 2
    assert not (tmp_path / "out").exists()


def test_separator_without_names(timelines, tmp_path):
    separator = build_separator(
        audio_encoder=("unet7", {"base_channels": 2, "mask_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 8}),
        mask_decoder=("query_transformer", {"dim": 16, "heads": 2, "feedforward": 16}),
        num_classes=2,
        front_end={"clip_samples": CLIP, "log_rows": 128},
    )
    with pytest.raises(ConfigError, match="no class names"):
        separate_audio(separator, music(0.1), timelines, ["flute"])


def test_read_mixture_and_device(tmp_path):
    path = write(tmp_path, "st.wav", np.stack([music(0.5, 44100), music(0.5, 44100, 1)], axis=1), 44100)
    own, mixture, rate_hz = read_mixture(path, RATE)
    assert (own.shape, mixture.shape, rate_hz) == ((22050,), (5512,), 44100)
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="'tpu'"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no cuda"):
            pick_device("cuda:1")


def test_command_line(separator, timelines, tmp_path, capsys):
    save_separator(separator, tmp_path / "saved")
    write_visual_file(tmp_path / "f.npz", timelines)
    first = write(tmp_path, "a.wav", music(0.4))
    second = write(tmp_path, "b.flac.wav", music(3.5, 22050), 22050)
    arguments = {
        "run": tmp_path / "saved",
        "classes": ["flute, piano"],
        "features": tmp_path / "f.npz",
        "device": "cpu",
    }
    command([first, second], out=tmp_path / "out", **arguments)
    shown = capsys.readouterr().out
    names = [f"{stem}_{c}.wav" for stem in ("a", "b.flac") for c in ("flute", "piano", "residual")]
    names += [f"{stem}_separated.html" for stem in ("a", "b.flac")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(names)
    assert "a_flute.wav" in shown
    assert "b.flac_residual.wav" in shown
    for change in (
        {"classes": ["flute,harp"]},
        {"classes": ","},
        {"features": tmp_path / "a.wav"},
        {"features": None},
        {"run": tmp_path},
        {"task": 3},
        {"device": "warp"},
    ):
        with pytest.raises(AvsepError) as caught:
            command([first], out=tmp_path / "other", **{**arguments, **change})
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()

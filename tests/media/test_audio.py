"""Audio files: what is read back is what was written; what cannot be used is one clear line."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import soundfile

from avsep.errors import AudioError, AvsepError, ConfigError
from avsep.export.runtime import wav
from avsep.media.audio import level_db, read_audio, resample, to_mono, write_audio
from avsep.media.video import read_sound


def tone(seconds=0.5, rate_hz=11025, frequency_hz=440.0):
    return (0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_formats_and_channels(tmp_path, name, channels):
    channels = min(channels, 2) if name == "a.mp3" else channels  # MP3 holds no more
    audio = np.stack([tone(frequency_hz=220 * (c + 1)) for c in range(channels)])
    soundfile.write(tmp_path / name, audio.T, 11025)
    got, rate_hz = read_audio(tmp_path / name)
    assert rate_hz == 11025
    assert got.shape == audio.shape
    assert got.dtype == np.float32
    assert np.abs(got - audio).max() < (0.1 if name in {"a.ogg", "a.mp3"} else 1e-4)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_written_file_reads_back(tmp_path, subtype):
    audio = np.stack([tone(), -tone()])
    assert write_audio(tmp_path / "new" / "b.wav", audio, 8000, subtype) == 0
    got, rate_hz = read_audio(tmp_path / "new" / "b.wav")
    assert rate_hz == 8000
    np.testing.assert_allclose(got, audio, atol={"PCM_16": 2**-15, "PCM_24": 2**-22, "FLOAT": 0}[subtype])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b.wav"]


def test_integer_formats_clip_and_never_wrap(tmp_path):
    audio = np.array([1.5, -1.5, 1.0, -1.0, 0.25], dtype=np.float32)
    assert write_audio(tmp_path / "c.wav", audio, 8000) == 2
    got, _ = read_audio(tmp_path / "c.wav")
    np.testing.assert_allclose(got[0], [1, -1, 1, -1, 0.25], atol=1e-4)
    assert write_audio(tmp_path / "c.wav", audio, 8000, "FLOAT") == 0
    np.testing.assert_array_equal(read_audio(tmp_path / "c.wav")[0][0], audio)


def bad_files(folder):
    whole = folder / "whole.wav"
    soundfile.write(whole, tone(), 11025)
    data = whole.read_bytes()
    (folder / "truncated.wav").write_bytes(data[: len(data) // 2])
    soundfile.write(folder / "whole.flac", tone(), 11025)
    flac = (folder / "whole.flac").read_bytes()
    (folder / "truncated.flac").write_bytes(flac[: len(flac) // 2])
    soundfile.write(folder / "whole.mp3", tone(3.0), 11025)
    mp3 = (folder / "whole.mp3").read_bytes()
    (folder / "truncated.mp3").write_bytes(mp3[: len(mp3) // 2])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "header.wav").write_bytes(data[:20])
    (folder / "text.wav").write_text("not audio at all")
    soundfile.write(folder / "zero.wav", np.zeros(0), 11025)
    broken = tone()
    broken[7] = np.nan
    broken[9] = np.inf
    soundfile.write(folder / "nan.wav", broken, 11025, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    return {
        "truncated.wav": "truncated",
        "truncated.flac": "truncated",
        "truncated.mp3": "truncated",
        "empty.wav": "0 bytes",
        "header.wav": "cannot be read",
        "text.wav": "cannot be read",
        "zero.wav": "no samples",
        "nan.wav": "2 NaN or infinite",
        "folder.wav": "not a file",
        "missing.wav": "no such",
    }


def test_every_bad_file_is_one_clear_line(tmp_path):
    for name, fragment in bad_files(tmp_path).items():
        with pytest.raises(AudioError, match=fragment) as caught:
            read_audio(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_streamed_wav_without_a_known_length_is_not_truncated(tmp_path):
    """Recorders that write to a pipe leave the largest size in the header."""
    soundfile.write(tmp_path / "s.wav", tone(), 11025)
    data = bytearray((tmp_path / "s.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "s.wav").write_bytes(data)
    got, _ = read_audio(tmp_path / "s.wav")
    np.testing.assert_allclose(got[0], tone(), atol=1e-4)


@pytest.mark.parametrize("kept", [0.5, 0.95])
@pytest.mark.parametrize(
    "kind", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "OPUS", "MP3", "MAT5", "IRCAM", "NIST"]
)
def test_no_part_passes_for_the_whole(tmp_path, kind, kept):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 48000)  # noise: of the compressed ones many pages
    form, subtype = ("OGG", "OPUS") if kind == "OPUS" else (kind, None)
    soundfile.write(tmp_path / "whole", sound, 24000, format=form, subtype=subtype)
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(data[: int(kept * len(data))])
    if kind in ("WAV", "RF64", "FLAC", "AIFF", "AU", "CAF"):  # of whatever name
        assert read_sound(tmp_path / "whole")[0].shape == (1, 48000)
        with pytest.raises(AudioError, match="truncated"):
            read_sound(tmp_path / "cut")
    if kind in ("MAT5", "IRCAM", "NIST"):  # nothing tells, so that they are not read at all
        with pytest.raises(AudioError, match=f"format {kind}.*convert it first"):
            read_audio(tmp_path / "whole")
    else:
        assert read_audio(tmp_path / "whole")[0].shape[1] == pytest.approx(48000, abs=2500)
        with pytest.raises(AudioError, match="truncated"):
            read_audio(tmp_path / "cut")


def test_the_size_of_a_large_file_is_no_sign_of_a_pipe(tmp_path):
    """Sizes over 2 GB were taken for those of a recorder that cannot know the length."""
    write_audio(tmp_path / "a.wav", tone(), 11025)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[40:44] = struct.pack("<I", 3_000_000_000)
    (tmp_path / "a.wav").write_bytes(data)
    for read in (read_audio, wav.read_wav):
        with pytest.raises(AudioError, match="promises 3000000000 bytes"):
            read(tmp_path / "a.wav")


def with_size(path, size):
    data = bytearray(path.read_bytes())
    at = data.find(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("stated", [0, 2000, 5512])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_header_that_states_less_than_there_is(tmp_path, stated, subtype):
    """As that of a file over 4 GB does, whose 32 bits wrap: all samples are read."""
    soundfile.write(tmp_path / "a.wav", tone(), 11025, subtype=subtype)
    whole, _ = read_audio(tmp_path / "a.wav")
    with_size(tmp_path / "a.wav", stated)
    for read in (read_audio, wav.read_wav):
        found, rate_hz = read(tmp_path / "a.wav")
        assert rate_hz == 11025
        np.testing.assert_array_equal(found, whole)


def test_an_encoding_that_only_libsndfile_reads_is_refused_where_its_header_states_less(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 11025, subtype="ULAW")
    with_size(tmp_path / "a.wav", 1000)
    with pytest.raises(AudioError, match="its header states 1000: decode it anew"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(
    "behind",
    [
        b"LIST" + struct.pack("<I", 4) + b"INFO",
        b"LIST" + struct.pack("<I", 400) + b"INFO",  # cut short: the samples are whole
        b"abcd" + struct.pack("<I", 6) + b"\0" * 6 + b"efgh" + struct.pack("<I", 3) + b"\1\2\3",
        b"TAG" + b"a song".ljust(125, b"\0"),
        b"\0\0\0",
    ],
)
@pytest.mark.parametrize("samples", [5000, 5001])
def test_what_stands_behind_the_samples_is_no_sound(tmp_path, behind, samples):
    sound = tone()[:samples]
    for subtype, padding in (("PCM_U8", b""), ("PCM_U8", b"\0"), ("PCM_16", b"")):  # not every writer pads
        soundfile.write(tmp_path / "a.wav", sound, 11025, subtype=subtype)
        whole, _ = read_audio(tmp_path / "a.wav")
        data = (tmp_path / "a.wav").read_bytes()
        size = samples * (1 if subtype == "PCM_U8" else 2)
        (tmp_path / "a.wav").write_bytes(data[: data.find(b"data") + 8 + size] + padding * (size % 2) + behind)
        for read in (read_audio, wav.read_wav):
            np.testing.assert_array_equal(read(tmp_path / "a.wav")[0], whole)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_what_is_too_long_for_wav_becomes_rf64(tmp_path, monkeypatch, subtype):
    """With a limit of 9000 bytes in place of 4 GB."""
    write_audio(tmp_path / "usual.wav", tone(), 11025, subtype)
    expected, _ = read_audio(tmp_path / "usual.wav")
    assert (tmp_path / "usual.wav").read_bytes()[:4] == b"RIFF"
    monkeypatch.setattr(wav, "RIFF_LIMIT", 9000)
    write_audio(tmp_path / "long.wav", tone(), 11025, subtype)
    writers = [tmp_path / "long.wav"]
    if subtype != "PCM_24":
        wav.write_wav(tmp_path / "runtime.wav", tone(), 11025, subtype)
        writers.append(tmp_path / "runtime.wav")
    for path in writers:
        data = path.read_bytes()
        assert data[:4] == b"RF64"
        assert struct.unpack("<Q", data[20:28])[0] == len(data) - 8
        for read in (read_audio, wav.read_wav, soundfile.read):
            found, rate_hz = read(path)
            assert rate_hz == 11025
            np.testing.assert_allclose(np.squeeze(found), expected[0], atol=2**-15)
        path.write_bytes(data[: len(data) // 2])
        for read in (read_audio, wav.read_wav):
            with pytest.raises(AudioError, match="truncated"):
                read(path)
    with pytest.raises(AudioError, match=r"AIFF holds no more than 4 GB; use the suffix \.wav"):
        write_audio(tmp_path / "long.aiff", tone(), 11025)
    write_audio(tmp_path / "long.flac", tone(), 11025)


@pytest.mark.parametrize("rate_hz", [1, 999, 768_001, 2**31 - 1])
def test_a_rate_that_no_recording_has(tmp_path, rate_hz):
    wav.write_wav(tmp_path / "a.wav", tone(), 11025)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = struct.pack("<I", rate_hz)
    (tmp_path / "a.wav").write_bytes(data)
    for read in (read_audio, wav.read_wav):
        with pytest.raises(AudioError, match=f"states a sample rate of {rate_hz} Hz.*1000 to 768000"):
            read(tmp_path / "a.wav")


def test_samples_far_beyond_full_scale_are_the_files_fault(tmp_path):
    for value, ok in ((1.5, True), (99.0, True), (32768.0, False), (-1e30, False)):
        sound = tone()
        sound[5] = value
        soundfile.write(tmp_path / "a.wav", sound, 11025, subtype="FLOAT")
        for read in (read_audio, wav.read_wav):
            if ok:
                assert np.abs(read(tmp_path / "a.wav")[0]).max() == value
            else:
                with pytest.raises(AudioError, match=r"a\.wav reaches (32768|1e\+30), and full scale is 1"):
                    read(tmp_path / "a.wav")


def test_a_header_that_states_far_more_takes_no_memory(tmp_path):
    """FLAC states 2**36 samples at most: 256 GiB. And 0 where the encoder could not know."""
    soundfile.write(tmp_path / "a.flac", tone(), 11025)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] |= 0x0F
    data[22:26] = b"\xff\xff\xff\xff"
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(AudioError, match="truncated"):
        read_audio(tmp_path / "a.flac")
    data[21] &= 0xF0
    data[22:26] = b"\0\0\0\0"
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(AudioError, match="does not state its length"):
        read_audio(tmp_path / "a.flac")


@pytest.mark.parametrize("name", ["-", "a.raw", "file:a.wav"])
def test_a_name_is_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "plain.wav", tone(), 11025)
    (tmp_path / name).write_bytes((tmp_path / "plain.wav").read_bytes())
    if name == "a.raw":  # libsndfile goes by this suffix
        with pytest.raises(AudioError, match="cannot be read"):
            read_audio(name)
    else:
        np.testing.assert_allclose(read_audio(name)[0][0], tone(), atol=1e-4)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44100, 11025), (8000, 11025), (11025, 48000), (96000, 11025)])
def test_resampling_keeps_a_tone(from_hz, to_hz):
    audio = np.stack([tone(1.0, from_hz), tone(1.0, from_hz, 300)])
    got = resample(audio, from_hz, to_hz)
    assert got.shape == (2, to_hz)
    middle = slice(to_hz // 10, -to_hz // 10)
    assert np.abs(got[0] - tone(1.0, to_hz))[middle].max() < 1e-3
    np.testing.assert_allclose(resample(audio[1], from_hz, to_hz), got[1], atol=1e-6)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    assert level_db(resample(tone(1.0, 44100, 9000.0), 44100, 11025)[1000:-1000]) < -80


def test_resampling_lengths():
    for length in (1, 2, 99, 11025, 65535):
        for from_hz, to_hz in ((44100, 11025), (11025, 44100), (22050, 16000), (11025, 11025)):
            assert resample(np.ones(length, np.float32), from_hz, to_hz).shape == (
                max(round(length * to_hz / from_hz), 1),
            )
    with pytest.raises(AudioError, match="0 and 8000"):
        resample(np.ones(4, np.float32), 0, 8000)


def test_mono_is_the_mean_and_level_is_in_db():
    np.testing.assert_allclose(to_mono(np.array([[1.0, 0.0], [0.0, 0.5]], np.float32)), [0.5, 0.25])
    assert level_db(np.ones(5, np.float32)) == 0
    assert level_db(np.full(5, 0.1, np.float32)) == pytest.approx(-20, abs=1e-5)
    assert level_db(np.zeros(5, np.float32)) == -np.inf


def test_nothing_is_half_written(tmp_path):
    write_audio(tmp_path / "d.wav", tone(), 11025)
    before = (tmp_path / "d.wav").read_bytes()
    for bad, error in (
        (np.full(9, np.nan, np.float32), AudioError),
        (np.zeros(0, np.float32), AudioError),
        (np.zeros((1, 2, 3), np.float32), AudioError),
    ):
        with pytest.raises(error):
            write_audio(tmp_path / "d.wav", bad, 11025)
    with pytest.raises(ConfigError, match="PCM_7"):
        write_audio(tmp_path / "d.wav", tone(), 11025, "PCM_7")
    with pytest.raises(ConfigError, match=r"\.wav"):
        write_audio(tmp_path / "d.xyz", tone(), 11025)
    with pytest.raises(ConfigError, match="FLOAT"):
        write_audio(tmp_path / "d.flac", tone(), 11025, "FLOAT")
    with pytest.raises((AvsepError, OSError)):
        write_audio(tmp_path / "d.wav" / "e.wav", tone(), 11025)
    assert [p.name for p in tmp_path.iterdir()] == ["d.wav"]
    assert (tmp_path / "d.wav").read_bytes() == before

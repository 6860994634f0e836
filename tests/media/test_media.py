"""Reading videos: sound and frames in time, turned upright; damaged files in one line."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from avsep.errors import AudioError, DataError
from avsep.media.video import iter_frames, probe, read_media_audio
from support.media_files import brightness_ramp, copy_packets, tone, write_video

RATE = 44100


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "ramp.mp4"
    return write_video(path, brightness_ramp(40), tone(4.0, channels=2), layout="stereo")


def _levels(frames):
    return [int(p[0, -4, -4]) for p in frames]


def test_what_a_video_holds(video):
    info = probe(video)
    assert (info.sample_rate_hz, info.channels, info.width, info.height, info.rotation) == (RATE, 2, 64, 48, 0)
    assert info.frames_hz == pytest.approx(10)
    assert info.duration_s == pytest.approx(4.0, abs=0.1)
    assert info.has_audio
    assert info.has_video


def test_frames_are_those_on_display_in_the_middle_of_their_time(video):
    for rate, shown in ((1.0, [5, 15, 25, 35]), (2.0, [2, 7, 12, 17, 22, 27, 32, 37]), (10.0, range(40))):
        frames = list(iter_frames(video, rate))
        assert all(p.shape == (3, 48, 64) and p.dtype == np.uint8 for p in frames)
        np.testing.assert_allclose(_levels(frames), [40 + 4 * f for f in shown], atol=3)
    grey = list(iter_frames(video, 1.0, short_side=24, grey=True))
    assert grey[0].shape == (1, 24, 32)
    np.testing.assert_allclose(_levels(grey), [60, 100, 140, 180], atol=3)


def test_a_rate_that_varies(tmp_path):
    times = [0.0, 0.1, 0.2, 1.4, 1.5, 3.2, 3.9]  # a phone in the dark
    path = write_video(tmp_path / "vfr.mp4", brightness_ramp(len(times), step=25), tone(4.0), times_s=times)
    frames = np.array([2, 2, 2, 4, 4, 4, 5, 5])  # on display at 0.25, 0.75, ... s
    np.testing.assert_allclose(_levels(iter_frames(path, 2.0)), 40 + 25 * frames, atol=8)


@pytest.mark.parametrize(("degrees", "mark"), [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_a_turned_phone_video_comes_upright(tmp_path, degrees, mark):
    path = write_video(tmp_path / "turned.mp4", brightness_ramp(5), None, rotation=degrees)
    frame = next(iter_frames(path, 1.0))
    sides = (48, 64) if degrees % 180 == 0 else (64, 48)
    assert frame.shape == (3, *sides)
    assert (probe(path).height, probe(path).width) == sides
    corners = {(y, x): int(frame[0, (2, -3)[y], (2, -3)[x]]) for y in (0, 1) for x in (0, 1)}
    assert min(corners, key=corners.get) == mark


def test_sound_in_time_at_its_rate(video, tmp_path):
    audio, rate = read_media_audio(video)
    assert rate == RATE
    assert audio.shape[0] == 1
    assert abs(audio.shape[1] - 4 * RATE) < 2048
    want = tone(4.0)[0]
    middle = slice(RATE, 3 * RATE)
    assert np.corrcoef(audio[0, middle], want[middle])[0, 1] > 0.999
    assert np.abs(audio[0, middle]).max() == pytest.approx(0.3, abs=0.02)
    late = write_video(tmp_path / "late.mp4", brightness_ramp(30), tone(2.0), audio_starts_s=1.0)
    audio, _ = read_media_audio(late)
    assert np.abs(audio[0, : int(0.95 * RATE)]).max() < 1e-3  # silence where the sound has not begun
    assert np.abs(audio[0, int(1.1 * RATE) : int(2.9 * RATE)]).max() == pytest.approx(0.3, abs=0.02)


def test_surround_is_the_mean_without_the_effects_channel(tmp_path):
    audio = np.zeros((6, 2 * RATE), np.float32)
    audio[2] = tone(2.0)[0]  # the centre, where the voice is
    audio[3] = tone(2.0, hz=60.0)[0] * 3  # LFE
    path = write_video(tmp_path / "surround.mp4", None, audio, layout="5.1")
    mono, _ = read_media_audio(path)
    middle = mono[0, RATE // 2 : 3 * RATE // 2]
    assert np.abs(middle).max() == pytest.approx(0.06, abs=0.01)
    spectrum = np.abs(np.fft.rfft(middle))
    assert np.argmax(spectrum) == round(440 * len(middle) / RATE)


def test_a_cover_picture_is_no_video(tmp_path):
    import av

    path = tmp_path / "song.m4a"
    write_video(tmp_path / "plain.mp4", None, tone(1.0))
    frame = brightness_ramp(1)[0]
    with av.open(str(path), "w", format="mp4") as out, av.open(str(tmp_path / "plain.mp4")) as source:
        sound = out.add_stream_from_template(source.streams.audio[0])
        cover = out.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = sound
                out.mux(packet)
        out.mux(cover.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(cover.encode())
    assert not probe(path).has_video
    assert probe(path).has_audio
    with pytest.raises(DataError, match="has no video stream"):
        next(iter_frames(path, 1.0))


def test_damage_ends_in_one_line(video, tmp_path):
    data = video.read_bytes()
    cases = {
        "cut.mp4": (data[: len(data) // 2], "cannot be read as video or audio"),  # the index is at the end
        "text.mp4": (b"no video at all" * 100, "cannot be read as video or audio"),
        "empty.mp4": (b"", "is empty"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (probe, read_media_audio, lambda p: next(iter_frames(p, 1.0))):
            with pytest.raises(DataError, match=message) as error:
                read(path)
            assert "\n" not in str(error.value)
            assert str(path) in str(error.value)
    with pytest.raises(AudioError, match="no such file"):
        read_media_audio(tmp_path / "none.mp4")
    with pytest.raises(DataError, match="is not a file"):
        probe(tmp_path)
    silent = write_video(tmp_path / "silent.mp4", brightness_ramp(5), None)
    with pytest.raises(AudioError, match="has no audio stream"):
        read_media_audio(silent)
    noise = bytearray(data)
    begin = data.find(b"mdat") + 64
    noise[begin : begin + 30_000] = np.random.default_rng(0).bytes(30_000)
    (tmp_path / "noise.mp4").write_bytes(bytes(noise))
    with pytest.raises(AudioError, match=r"damaged|truncated"):
        read_media_audio(tmp_path / "noise.mp4")


CUT = {
    "faststart.mp4": {"movflags": "faststart"},
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "plain.mkv": {},
    "live.mkv": {"live": "1"},
    "plain.flv": {},
    "plain.nut": {},
}


@pytest.mark.parametrize("kept", [0.5, 0.67, 0.95])
@pytest.mark.parametrize("name", CUT)
def test_no_part_passes_for_the_whole(video, tmp_path, name, kept):
    path = copy_packets(video, tmp_path / name, **CUT[name])
    assert read_media_audio(path)[0].shape[1] == pytest.approx(4.0 * RATE, abs=0.25 * RATE)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(AudioError, match=r"is truncated: it states|cannot be decoded beyond \d\.\d s"):
        read_media_audio(path)


@pytest.mark.parametrize("kept", [0.5, 0.67, 0.95])
def test_no_part_of_a_webm_or_an_avi_passes_for_the_whole(tmp_path, kept):
    import av

    for name, codec, form in (("a.webm", "libopus", "flt"), ("a.avi", "pcm_s16le", "s16")):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=48000, layout="mono")
            block = tone(4.0, 48000) if form == "flt" else (tone(4.0, 48000) * 32768).astype(np.int16)
            for start in range(0, block.shape[1], 960):
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(block[:, start : start + 960]), format=form, layout="mono"
                )
                frame.rate, frame.pts = 48000, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert read_media_audio(tmp_path / name)[0].shape[1] == pytest.approx(4.0 * 48000, abs=500)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(kept * len(data))])
        with pytest.raises(AudioError, match="is truncated: it states"):
            read_media_audio(tmp_path / name)


def test_a_stated_duration_that_nothing_reaches(tmp_path, video):
    """The parts are whole, and yet the header states more: as of fragments that were never fetched."""
    path = copy_packets(video, tmp_path / "a.mkv")
    data = bytearray(path.read_bytes())
    at = data.find(b"\x44\x89\x88") + 3  # Duration, a float of 8 bytes, in ms
    assert struct.unpack(">d", data[at : at + 8])[0] == pytest.approx(4000, abs=100)
    data[at : at + 8] = struct.pack(">d", 6000.0)
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"states 6\.0 s and 4\.0 s are there"):
        read_media_audio(path)


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """Ten seconds; the tone gets higher in the middle, so that its place in time can be heard."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return write_video(path, brightness_ramp(100, step=2), np.concatenate([tone(5.0), tone(5.0, hz=880.0)], axis=1))


def _hertz(sound):
    return np.abs(np.fft.rfft(sound * np.hanning(len(sound)))).argmax() * RATE / len(sound)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov", "ts", "flv"])
def test_a_gap_in_the_sound_is_silence(long_video, tmp_path, suffix):
    whole_path = copy_packets(long_video, tmp_path / f"whole.{suffix}")
    whole, _ = read_media_audio(whole_path)
    path = copy_packets(long_video, tmp_path / f"gap.{suffix}", without_s=(2, 7))
    found, rate = read_media_audio(path)
    assert rate == RATE
    assert found.shape[1] == pytest.approx(whole.shape[1], abs=0.001 * RATE)
    assert np.abs(found[0, int(2.1 * RATE) : int(6.9 * RATE)]).max() == 0
    assert _hertz(found[0, : int(1.9 * RATE)]) == pytest.approx(440, abs=1)
    late = slice(int(7.2 * RATE), int(9.8 * RATE))
    assert _hertz(found[0, late]) == pytest.approx(880, abs=1)
    shifts = [np.corrcoef(found[0, late], np.roll(whole[0], k)[late])[0, 1] for k in range(-25, 26)]  # half a wave
    assert abs(np.argmax(shifts) - 25) <= 0.001 * RATE
    np.testing.assert_array_equal(_levels(iter_frames(path, 1.0)), _levels(iter_frames(whole_path, 1.0)))


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_sound_that_begins_late_or_ends_early(long_video, tmp_path, suffix):
    path = copy_packets(long_video, tmp_path / f"late.{suffix}", without_s=(-1, 7))
    assert probe(path).has_audio
    assert probe(path).sample_rate_hz == RATE
    found, _ = read_media_audio(path)
    assert found.shape[1] == pytest.approx(10 * RATE, abs=0.05 * RATE)
    assert np.abs(found[0, : int(6.9 * RATE)]).max() < 0.01
    path = copy_packets(long_video, tmp_path / f"early.{suffix}", without_s=(3, 11))
    assert read_media_audio(path)[0].shape[1] == pytest.approx(3 * RATE, abs=0.05 * RATE)
    path = copy_packets(long_video, tmp_path / f"never.{suffix}", without_s=(-1, 11))
    with pytest.raises(AudioError, match=r"no samples|no audio stream"):
        read_media_audio(path)


def test_a_stream_is_looked_for_as_far_as_it_takes(tmp_path):
    """FFmpeg gives up after some seconds; a rate of 0 was divided by."""
    whole = write_video(tmp_path / "a.mp4", brightness_ramp(200, step=1), tone(20.0))
    path = copy_packets(whole, tmp_path / "a.ts", without_s=(-1, 18))
    assert probe(path).sample_rate_hz == RATE
    found, _ = read_media_audio(path)
    assert found.shape[1] == pytest.approx(20 * RATE, abs=0.05 * RATE)
    assert np.abs(found[0, : 17 * RATE]).max() < 0.01


def test_rounded_time_stamps_make_no_gaps(long_video, tmp_path):
    """Matroska rounds to 1 ms; a packet of AAC at 44100 Hz lasts 23.2."""
    expected, _ = read_media_audio(long_video)
    found, _ = read_media_audio(copy_packets(long_video, tmp_path / "a.mkv"))
    lead = found.shape[1] - expected.shape[1]  # what the encoder puts before the first sample
    assert 0 <= lead <= 2048
    np.testing.assert_array_equal(found[:, lead:], expected)


def test_time_stamps_that_jump_by_hours_are_refused(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for start in (0, 8000, 8000 * 3700):
            frame = av.AudioFrame.from_ndarray(np.ones((1, 8000), np.int16), format="s16", layout="mono")
            frame.rate, frame.pts = 8000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(AudioError, match="leave 3698 s without sound, more than 3600 s"):
        read_media_audio(tmp_path / "a.mkv")


def test_a_sound_that_nothing_decodes(tmp_path):
    """FFmpeg knows the kind of stream, and no decoder."""
    path = write_video(tmp_path / "a.mkv", brightness_ramp(10), tone(1.0))
    path.write_bytes(path.read_bytes().replace(b"A_AAC", b"A_XYZ"))
    assert not probe(path).has_audio
    with pytest.raises(AudioError, match="FFmpeg does not know"):
        read_media_audio(path)


@pytest.mark.parametrize(
    "name", ["file:v.mp4", "concat:v.mp4", "a:b.mp4", "-x.mp4", "http:v.mp4", "v%d.mp4", b"\xe9.mp4"]
)
def test_a_name_is_a_path(video, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(name)
    (tmp_path / "v.mp4").write_bytes(b"another")
    (tmp_path / name).write_bytes(video.read_bytes())
    for path in (name, Path(name), tmp_path / name):
        assert probe(path).has_video
        assert read_media_audio(path)[1] == RATE
        assert len(list(iter_frames(path, 1.0))) == 4


def test_an_index_in_front_and_the_end_missing(video, tmp_path):
    front = copy_packets(video, tmp_path / "front.mp4", movflags="faststart")
    data = front.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) - int(0.6 * (len(data) - data.find(b"mdat")))])
    with pytest.raises(AudioError, match=r"is truncated: it states \d+ bytes"):
        read_media_audio(tmp_path / "cut.mp4")


def test_the_channels_of_a_video_are_kept_where_they_are_asked_for(tmp_path):
    sides = np.concatenate([tone(2.0), tone(2.0, hz=880.0)])
    path = write_video(tmp_path / "stereo.mp4", brightness_ramp(25), sides, layout="stereo", audio_starts_s=0.5)
    both, rate = read_media_audio(path, mono=False)
    mono, _ = read_media_audio(path)
    assert both.shape[0] == 2
    np.testing.assert_allclose(both.mean(axis=0), mono[0], atol=1e-6)
    assert np.abs(both[:, : int(0.45 * RATE)]).max() < 1e-3  # silence in both where the sound has not begun
    middle = both[:, RATE : 2 * RATE]
    spectrum = np.abs(np.fft.rfft(middle, axis=1))
    assert [int(peak) for peak in spectrum.argmax(axis=1)] == [440, 880]
    surround = np.zeros((6, RATE), np.float32)
    surround[2] = tone(1.0)[0]
    surround[3] = tone(1.0, hz=60.0)[0]
    path = write_video(tmp_path / "surround.mp4", None, surround, layout="5.1")
    assert read_media_audio(path, mono=False)[0].shape[0] == 5  # without the effects' one
    assert rate == RATE


def test_a_sound_that_changes_its_channels_midway_is_mixed():
    from avsep.media.video import _Sound

    sound = _Sound("x", False)
    sound.parts = [np.ones((2, 3), np.float32), np.zeros((1, 2), np.float32), np.full((1, 4), 0.5, np.float32)]
    sound._counts = {1, 2}
    np.testing.assert_array_equal(sound.joined(), [[1, 1, 1, 0, 0, 0.5, 0.5, 0.5, 0.5]])
    sound.parts, sound._counts = sound.parts[:2], {2}
    sound.parts[0] = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    np.testing.assert_array_equal(sound.joined(), [[1, 2, 3, 0, 0], [4, 5, 6, 0, 0]])

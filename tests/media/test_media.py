"""Reading videos: sound and frames in time, turned upright; damaged files in one line."""

from __future__ import annotations

import numpy as np
import pytest

from avsep.errors import AudioError, DataError
from avsep.media.video import iter_frames, probe, read_media_audio
from support.media_files import brightness_ramp, tone, write_video

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


def test_an_index_in_front_and_the_end_missing(video, tmp_path):
    import av

    front = tmp_path / "front.mp4"
    with av.open(str(front), "w", options={"movflags": "faststart"}) as out, av.open(str(video)) as source:
        streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    data = front.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) - int(0.6 * (len(data) - data.find(b"mdat")))])
    with pytest.raises(AudioError, match=r"cannot be decoded beyond 1\.\d s|is truncated: it states 4\.\d s of sound"):
        read_media_audio(tmp_path / "cut.mp4")

"""Small videos for tests, written with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

MATRICES = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def write_video(
    path: Path,
    frames: Iterable[np.ndarray] | None,
    audio: np.ndarray | None,
    *,
    fps: int = 10,
    times_s: Sequence[float] | None = None,
    rate_hz: int = 44100,
    layout: str = "mono",
    audio_starts_s: float = 0.0,
    rotation: int = 0,
) -> Path:
    """An h264/aac file: ``frames`` uint8 [H, W, 3] of even sides, at ``fps`` or ``times_s``; ``audio`` [C, L]."""
    import av

    with av.open(str(path), "w") as container:
        video = sound = None
        frames = [] if frames is None else list(frames)
        if frames:
            video = container.add_stream("libx264", rate=1000 if times_s is not None else fps)
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = "yuv420p"
            video.options = {"crf": "10", "preset": "ultrafast"}
        if audio is not None:
            sound = container.add_stream("aac", rate=rate_hz, layout=layout)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts = number if times_s is None else round(times_s[number] * 1000)
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode())
        if sound is not None:
            first = round(audio_starts_s * rate_hz)
            for start in range(0, audio.shape[1], 1024):
                block = np.ascontiguousarray(audio[:, start : start + 1024], dtype=np.float32)
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
                frame.rate = rate_hz
                frame.pts = first + start
                container.mux(sound.encode(frame))
            container.mux(sound.encode())
    if rotation:
        _turn(path, rotation)
    return path


def copy_packets(source: Path, target: Path, *, without_s: tuple[float, float] = (0, 0), **options: str) -> Path:
    """The streams of ``source`` in the container that the suffix of ``target`` names, without the sound of that time.

    ``options`` are those of the container.
    """
    import av

    with av.open(str(source)) as read, av.open(str(target.absolute()), "w", options=options) as write:
        streams = {stream.index: write.add_stream_from_template(stream) for stream in read.streams}
        for packet in read.demux():
            if packet.dts is None:
                continue
            missing = without_s[0] <= packet.pts * packet.time_base < without_s[1]
            if packet.stream.type != "audio" or not missing:
                packet.stream = streams[packet.stream.index]
                write.mux(packet)
    return target


def _turn(path: Path, degrees: int) -> None:
    """Write the display matrix that a phone writes when it is held upright."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd")
    while at >= 0:
        matrix = at + 8 + (32 if data[at + 4] else 20) + 16
        if struct.unpack(">I", data[matrix + 36 : matrix + 40])[0]:  # a track with a width: the frames
            a, b, c, d = MATRICES[degrees]
            data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        at = data.find(b"tkhd", at + 4)
    path.write_bytes(data)


def brightness_ramp(count: int, step: int = 4, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames that get brighter one by one, with a dark mark in the upper left corner."""
    frames = []
    for number in range(count):
        frame = np.full((height, width, 3), 40 + step * number, np.uint8)
        frame[: height // 3, : width // 3] = 0
        frames.append(frame)
    return frames


def tone(seconds: float, rate_hz: int = 44100, hz: float = 440.0, channels: int = 1) -> np.ndarray:
    """A sine of amplitude 0.3, [C, L] float32."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    return np.tile((0.3 * np.sin(2 * np.pi * hz * t)).astype(np.float32), (channels, 1))

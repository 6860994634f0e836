"""The sound and the pictures of exemplars as a codec keeps them, and as it gives them back."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable
from typing import Literal

import numpy as np

from avsep.data.store import Clip, Store

__all__ = [
    "CODECS",
    "PICTURE_CODECS",
    "Codec",
    "CodedCrops",
    "PictureCodec",
    "decode",
    "encode",
    "encode_frames",
]

Codec = Literal["int16", "mulaw", "vorbis"]
CODECS = ("int16", "mulaw", "vorbis")
"""How the sound of a kept crop is written down.

``int16``: as stores have it, without loss, 2 bytes a sample. ``mulaw``: one byte a sample, spaced by the logarithm of
what lies between (companding with mu = 255), 0 among them. ``vorbis``: an Ogg Vorbis file at the usual quality, a third
of a byte a sample for crops of seconds; how much depends on the sound.
"""

PictureCodec = Literal["raw", "deflate"]
PICTURE_CODECS = ("raw", "deflate")
"""How the frames of a kept crop are written down, both without loss: ``raw``, one byte a value; ``deflate``, as in ZIP
files. How much that saves depends on the pictures: much where they are drawn, little where a camera's noise is in them.
Another zlib may write a few bytes more or fewer.
"""

_MU = 255
_STEPS = 127  # of mu-law's bytes to either side of the one for silence; 255 is not used


def encode(audio: np.ndarray, codec: Codec, sample_rate_hz: int) -> bytes:
    """Sound [samples] within ±1 as bytes."""
    if codec == "int16":
        return bytes(np.clip(np.rint(audio * 32768.0), -32768, 32767).astype("<i2").tobytes())
    if codec == "mulaw":
        level = np.sign(audio) * np.log1p(_MU * np.minimum(np.abs(audio), 1.0)) / np.log1p(_MU)
        return bytes((np.rint(level * _STEPS) + _STEPS).astype(np.uint8).tobytes())
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, audio, sample_rate_hz, format="OGG", subtype="VORBIS")
    return bytes(file.getvalue())


def decode(data: bytes, codec: Codec) -> np.ndarray:
    """What :func:`encode` has written down, float32 [samples]."""
    if codec == "int16":
        audio: np.ndarray = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
        return audio
    if codec == "mulaw":
        level = (np.frombuffer(data, np.uint8).astype(np.float64) - _STEPS) / _STEPS
        audio = (np.sign(level) * np.expm1(np.abs(level) * np.log1p(_MU)) / _MU).astype(np.float32)
        return audio
    import soundfile

    audio, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return np.asarray(audio)


def encode_frames(frames: np.ndarray, codec: PictureCodec) -> bytes:
    """Frames uint8 [n, C, H, W] as bytes."""
    data = np.ascontiguousarray(frames, np.uint8).tobytes()
    return data if codec == "raw" else zlib.compress(data, 9)


class CodedCrops:
    """Crops of a store's clips in the form of a codec. Each is encoded once; the bytes stay in memory."""

    def __init__(self, store: Store, codec: Codec, clip_samples: int) -> None:
        self.store = store
        self.codec: Codec = codec
        self.clip_samples = clip_samples
        self._encoded: dict[tuple[str, int], bytes] = {}

    def prepare(self, crops: Iterable[tuple[Clip, int]]) -> None:
        """Encode crops now, so that processes that get a copy of this find them done."""
        for clip, start in crops:
            self._bytes(clip, start)

    def size(self, clip: Clip, start: int) -> int:
        """Bytes of the crop from sample ``start`` on, or of the whole clip where it is shorter."""
        samples = min(clip.samples, self.clip_samples)
        if self.codec == "int16":
            return 2 * samples
        return samples if self.codec == "mulaw" else len(self._bytes(clip, start))

    def read(self, clip: Clip, start: int, gain: float = 1.0) -> np.ndarray:
        """As :meth:`~avsep.data.store.Store.read_crop` of the same crop, with what the codec has done to it."""
        sound = decode(self._bytes(clip, start), self.codec)
        out: np.ndarray = np.resize(sound, self.clip_samples) * np.float32(gain)  # a shorter clip repeats
        out[-1:] = 0.0
        np.clip(out, -1.0, 1.0, out=out)
        return out

    def _bytes(self, clip: Clip, start: int) -> bytes:
        key = (clip.id, start)
        if key not in self._encoded:
            sound = self.store.read_audio(clip, start, min(clip.samples, self.clip_samples), tile=True)
            self._encoded[key] = encode(sound, self.codec, self.store.sample_rate_hz)
        return self._encoded[key]

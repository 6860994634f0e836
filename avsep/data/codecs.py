"""The sound and the pictures of exemplars as a codec keeps them, and as it gives them back."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from avsep.data.store import Clip, Store
from avsep.errors import MissingExtraError
from avsep.types import VisualSource

__all__ = [
    "CODECS",
    "PICTURE_CODECS",
    "Codec",
    "CodedCrops",
    "PictureCodec",
    "check_pictures",
    "decode",
    "decode_frames",
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

PictureCodec = Literal["raw", "deflate", "jpeg"]
PICTURE_CODECS = ("raw", "deflate", "jpeg")
"""How the frames of a kept crop are written down: ``raw``, one byte a value; ``deflate``, as in ZIP files, without
loss; ``jpeg``, all frames of the crop side by side in one JPEG picture of quality 90. How much ``deflate`` saves
depends on the pictures: much where they are drawn, little where a camera's noise is in them. ``jpeg`` needs Pillow;
another zlib or libjpeg may write a few bytes more or fewer.
"""

_MU = 255
_STEPS = 127  # of mu-law's bytes to either side of the one for silence; 255 is not used
_QUALITY = 90
_BLOCK = 16  # pixels a side of what JPEG writes as one, with colours at half the resolution


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
    if codec == "jpeg":
        return _as_jpeg(frames)
    data = np.ascontiguousarray(frames, np.uint8).tobytes()
    return data if codec == "raw" else zlib.compress(data, 9)


def decode_frames(data: bytes, codec: PictureCodec, shape: tuple[int, ...]) -> np.ndarray:
    """What :func:`encode_frames` has made of frames of this shape [n, C, H, W], uint8."""
    if codec == "jpeg":
        return _from_jpeg(data, shape)
    return np.frombuffer(data if codec == "raw" else zlib.decompress(data), np.uint8).reshape(shape)


def _tiles(shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
    """How frames [n, C, H, W] lie side by side: rows and columns of tiles, height and width of one, colours of one."""
    count, channels, height, width = shape
    colours = 3 if channels == 3 else 1
    tiles = count * channels // colours
    columns = max(math.isqrt(tiles), 1)
    # whole blocks: brightness does not cross from frame to frame, and of the colours, which have half the resolution,
    # no more than a pixel
    return -(-tiles // columns), columns, -(-height // _BLOCK) * _BLOCK, -(-width // _BLOCK) * _BLOCK, colours


def _as_jpeg(frames: np.ndarray) -> bytes:
    image = _pillow()
    rows, columns, high, wide, colours = _tiles(frames.shape)
    height, width = frames.shape[2:]
    padded = np.pad(
        np.asarray(frames, np.uint8).reshape(-1, colours, height, width),
        ((0, 0), (0, 0), (0, high - height), (0, wide - width)),
        mode="edge",
    )
    missing = np.zeros((rows * columns - len(padded), colours, high, wide), np.uint8)
    grid = np.concatenate([padded, missing]).reshape(rows, columns, colours, high, wide)
    sheet = grid.transpose(0, 3, 1, 4, 2).reshape(rows * high, columns * wide, colours)
    file = io.BytesIO()
    image.fromarray(sheet if colours == 3 else sheet[..., 0]).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _from_jpeg(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    rows, columns, high, wide, colours = _tiles(shape)
    sheet = np.asarray(_pillow().open(io.BytesIO(data))).reshape(rows, high, columns, wide, colours)
    tiles = sheet.transpose(0, 2, 4, 1, 3).reshape(rows * columns, colours, high, wide)
    count, channels, height, width = shape
    return np.ascontiguousarray(tiles[: count * channels // colours, :, :height, :width]).reshape(shape)


def check_pictures(codec: PictureCodec) -> None:
    """Raise :class:`~avsep.errors.MissingExtraError` where a codec of frames is not installed."""
    if codec == "jpeg":
        _pillow()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("Pillow", "synth", "keeping frames as JPEG") from None
    return Image


class CodedCrops:
    """Crops of a store's clips in the form of codecs. Each is encoded once; the bytes stay in memory."""

    def __init__(self, store: Store, codec: Codec, clip_samples: int, pictures: PictureCodec = "raw") -> None:
        self.store = store
        self.codec: Codec = codec
        self.clip_samples = clip_samples
        self.pictures: PictureCodec = pictures
        self._encoded: dict[tuple[str, int], bytes] = {}
        self._frames: dict[tuple[str, int, str], tuple[bytes, tuple[int, ...]]] = {}

    @property
    def loses(self) -> bool:
        """Whether what is given back differs from what the store has."""
        return self.codec != "int16" or self.pictures == "jpeg"

    def prepare(self, crops: Iterable[tuple[Clip, int]], sources: Sequence[VisualSource] = ()) -> None:
        """Encode crops, and what these sources ask for, now: processes that get a copy of this find them done."""
        for clip, start in crops:
            self._bytes(clip, start)
            for source in sources:
                if self.loses_frames(source):
                    self._encoded_frames(clip, start, source)

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

    def loses_frames(self, source: VisualSource) -> bool:
        """Whether what the source asks for differs after the codec: frames may, stored features do not."""
        return self.pictures == "jpeg" and source.kind == "frames"

    def frames(self, clip: Clip, start: int, source: VisualSource) -> np.ndarray:
        """The frames of a crop, as :meth:`~avsep.data.store.Store.read_visual` gives them, after the codec."""
        data, shape = self._encoded_frames(clip, start, source)
        return decode_frames(data, self.pictures, shape)

    def _encoded_frames(self, clip: Clip, start: int, source: VisualSource) -> tuple[bytes, tuple[int, ...]]:
        key = (clip.id, start, source.role)
        if key not in self._frames:
            rate_hz = self.store.sample_rate_hz
            frames = self.store.read_visual(
                clip,
                source,
                centre_s=(start + self.clip_samples // 2) / rate_hz,
                duration_s=self.clip_samples / rate_hz,
                copy=False,
                unseen=True,
            )
            self._frames[key] = encode_frames(frames, self.pictures), frames.shape
        return self._frames[key]

    def _bytes(self, clip: Clip, start: int) -> bytes:
        key = (clip.id, start)
        if key not in self._encoded:
            sound = self.store.read_audio(clip, start, min(clip.samples, self.clip_samples), tile=True)
            self._encoded[key] = encode(sound, self.codec, self.store.sample_rate_hz)
        return self._encoded[key]

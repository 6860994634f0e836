"""What the HTML pages have in common: sounds, spectrograms, masks and pictures inside the page, and their templates."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import re
import wave
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np

from avsep.errors import MissingExtraError

__all__ = [
    "PAGE_BYTES",
    "RANGE_DB",
    "Drawing",
    "SignalView",
    "dependencies",
    "log_spectrogram",
    "markup",
    "modules",
    "page_environment",
    "palette",
    "pretty",
    "styles",
    "template_environment",
]

PAGE_BYTES = 24 * 10**6
"""Less is shown where a page would become larger than this."""

RANGE_DB = 70.0
"""From the darkest to the brightest colour of a spectrogram, here and in the logs of training."""

_LOWEST_HZ = 50.0
_ROWS = 160  # of a spectrogram picture
_COLUMNS = 3000  # at most; more than a screen shows


def dependencies() -> tuple[Any, Any, Any]:
    """jinja2, matplotlib and Pillow's Image (which matplotlib brings)."""
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("Jinja2", "report", "the report page") from None
    try:
        import matplotlib
        from PIL import Image
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "the report page") from None
    return jinja2, matplotlib, Image


@functools.cache
def palette(what: Literal["spectrogram", "mask"]) -> np.ndarray:
    """uint8 [256, 3]: the colours of a spectrogram or a mask from 0 to 1. MissingExtraError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "a picture of a spectrogram or a mask") from None
    colours = matplotlib.colormaps[{"spectrogram": "magma", "mask": "viridis"}[what]](np.arange(256))
    found: np.ndarray = (np.asarray(colours)[:, :3] * 255).round().astype(np.uint8)
    return found


@dataclass(frozen=True)
class SignalView:
    """A signal [L] in ±1 to hear and to see."""

    audio: np.ndarray
    label: str


class Drawing:
    """Signals and arrays as ``data:`` addresses."""

    def __init__(self, sample_rate_hz: int) -> None:
        _, _, self._image = dependencies()
        self.rate_hz = sample_rate_hz

    def audio(self, signal: SignalView, gain: float) -> str:
        """16-bit WAV."""
        pcm = np.round(np.clip(signal.audio * gain, -1, 1) * 32767).astype("<i2")
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.rate_hz)
            file.writeframes(pcm.tobytes())
        return _data("audio/wav", buffer.getvalue())

    def spectrogram(self, signal: SignalView, gain: float) -> str:
        """Log-frequency magnitude in dB below a full-scale sine, after ``gain``."""
        level = log_spectrogram(signal.audio * gain, self.rate_hz)
        return self._png(np.clip(1 + level / RANGE_DB, 0, 1), "spectrogram")

    def mask(self, mask: np.ndarray) -> str:
        return self._png(np.clip(mask, 0, 1), "mask")

    def picture(self, frame: np.ndarray) -> str:
        """uint8 [3, H, W] or [1, H, W]"""
        pixels = np.moveaxis(frame, 0, -1)
        pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
        buffer = io.BytesIO()
        self._image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=85)
        return _data("image/jpeg", buffer.getvalue())

    def _png(self, values: np.ndarray, what: Literal["spectrogram", "mask"]) -> str:
        """[rows from low to high, columns] in 0..1, drawn with the low rows at the bottom, as an indexed PNG."""
        if values.shape[1] > _COLUMNS:  # of several columns the loudest, as of several bins
            starts = np.linspace(0, values.shape[1], _COLUMNS, endpoint=False).astype(int)
            values = np.maximum.reduceat(values, starts, axis=1)
        # 64 levels are beyond what the eye tells apart here, and compress to half
        levels = (np.round(values[::-1] * 63) * (255 / 63)).astype(np.uint8)
        image = self._image.fromarray(np.ascontiguousarray(levels)).convert("P")
        image.putpalette(palette(what).tobytes())
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        return _data("image/png", buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def log_spectrogram(signal: np.ndarray, rate_hz: int, size: int = 1024, hop: int = 256) -> np.ndarray:
    """[_ROWS, T] in dB below a full-scale sine, rows from ``_LOWEST_HZ`` to half the rate in even steps of pitch."""
    padded = np.pad(np.asarray(signal, np.float64), size // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    window = np.hanning(size)
    magnitude = np.abs(np.fft.rfft(frames * window, axis=1)).T / (window.sum() / 2)  # [size / 2 + 1, T]
    edges = np.geomspace(min(_LOWEST_HZ, rate_hz / 8), rate_hz / 2, _ROWS + 1) * size / rate_hz  # in bins
    rows = np.empty((_ROWS, magnitude.shape[1]))
    for row, (low, high) in enumerate(itertools.pairwise(edges)):
        if high - low < 1:  # between bins: interpolate
            middle = (low + high) / 2
            lower = min(int(middle), len(magnitude) - 2)
            rows[row] = magnitude[lower] + (middle - lower) * (magnitude[lower + 1] - magnitude[lower])
        else:  # several bins: the loudest, so that no partial falls between rows
            rows[row] = magnitude[int(low) : int(np.ceil(high)) + 1].max(axis=0)
    return 20 * np.log10(np.maximum(rows, 1e-10))


def template_environment() -> Any:
    """A jinja2 environment for the pages here. Raises MissingExtraError without jinja2 or matplotlib."""
    jinja2, _, _ = dependencies()

    def load(name: str) -> str:
        return resources.files("avsep.evaluation").joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pretty"] = pretty
    return environment


def page_environment(sample_rate_hz: int) -> Any:
    """:func:`template_environment`, whose templates draw signals of one rate."""
    environment = template_environment()
    draw = Drawing(sample_rate_hz)
    environment.globals.update(
        audio=draw.audio,
        spectrogram=draw.spectrogram,
        mask=draw.mask,
        picture=draw.picture,
        seconds=lambda signal: len(signal.audio) / sample_rate_hz,
    )
    return environment


def markup(text: str) -> Any:
    """Text that a template takes as it is."""
    return dependencies()[0].utils.markupsafe.Markup(text)


def modules(*names: str) -> Any:
    """Modules of the site that avsep writes (``export/targets/web``) as one script, in an order in which none needs a
    later one: a page that is opened from disk loads no other file. They share one scope there."""
    texts = [_of_site(f"{name}.js") for name in names]
    return markup("".join(re.sub(r"^import\b[^;]*;\n|^export (?=\w)", "", text, flags=re.M) for text in texts))


def styles(name: str) -> Any:
    """A style sheet of that site."""
    return markup(_of_site(f"{name}.css"))


def _of_site(name: str) -> str:
    return resources.files("avsep.export").joinpath(f"targets/web/{name}").read_text(encoding="utf-8")


def pretty(name: str) -> str:
    """A class name as people write it."""
    return name.replace("_", " ")

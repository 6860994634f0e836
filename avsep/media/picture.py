"""One photo in place of a video: what a separator is shown of a class of which there is no more."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avsep.errors import DataError, MissingExtraError
from avsep.export.runtime.errors import one_line
from avsep.media.footage import MOTION_RATE_HZ, OBJECT_RATE_HZ, SIZES
from avsep.media.timeline import VisualTimeline
from avsep.types import VisualSource

__all__ = ["read_picture", "timeline_of_picture"]


def read_picture(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """A picture of any format that Pillow reads, upright: uint8 [3, H, W]. Of an animation the first frame.

    Raises:
        DataError: it is missing, no picture, damaged, or larger than pictures are.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtraError("Pillow", "vision", "a picture of a class") from None
    file = Path(path)
    if not os.path.isfile(file):  # unlike Path's, false for a name that no file can have
        raise DataError(f"no such picture: {file}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
                pixels = np.asarray(upright)  # [H, W, 3]
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{file} is too large for a picture ({one_line(error, 100)}): make it smaller") from None
    except Exception as error:  # what its readers of so many formats raise has no base of its own
        raise DataError(
            f"{file} cannot be read as a picture ({one_line(error, 100)}): it is damaged, or of a format that Pillow "
            "does not know"
        ) from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def timeline_of_picture(
    path: str | os.PathLike[str],
    sources: Sequence[VisualSource],
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> VisualTimeline:
    """What ``sources`` are shown of a picture: the picture at all times, and of movement one frame that is held, and is
    taken for unknown where the separator can do without.

    Frames are brought to the heights and widths ``sizes`` by role, as those of a video, whatever their shape.

    Raises:
        DataError: as :func:`read_picture`; or the separator looks at stored features.
        MissingExtraError: Pillow is not installed.
    """
    for source in sources:
        if source.kind == "features":
            raise DataError(
                f"this separator looks at {source.role} features '{source.name}', and a picture gives frames: give "
                "--features FILE.npz in place of --picture"
            )
    picture = read_picture(path)
    side = {**SIZES, **(sizes or {})}
    roles = {source.role for source in sources}
    return VisualTimeline(
        object=_sized(picture, side["object"])[None] if "object" in roles else None,
        motion=_sized(picture, side["motion"], grey=True)[None] if "motion" in roles else None,
        object_rate_hz=OBJECT_RATE_HZ,
        motion_rate_hz=MOTION_RATE_HZ,
        where=str(path),
        moves=False,
    )


def _sized(picture: NDArray[np.uint8], size: tuple[int, int], grey: bool = False) -> NDArray[np.uint8]:
    """uint8 [3, H, W] -> [3, h, w], or [1, h, w] of ``grey``; means of areas, as frames are sized."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    image = image.convert("L") if grey else image
    pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX))
    return np.ascontiguousarray(pixels[None] if grey else pixels.transpose(2, 0, 1))

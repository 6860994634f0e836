"""One photo of a class: any format, upright, brought to the size of frames; what is none is one line."""

from __future__ import annotations

import numpy as np
import pytest

from avsep.errors import DataError
from avsep.media.picture import read_picture, timeline_of_picture
from avsep.types import VisualSource

Image = pytest.importorskip("PIL.Image")
OBJECT = VisualSource(role="object", kind="frames", frames=3)
MOTION = VisualSource(role="motion", kind="frames")


def halves(width=60, height=40):
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 200
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_any_format(tmp_path, suffix):
    halves().save(tmp_path / f"a.{suffix}")
    found = read_picture(tmp_path / f"a.{suffix}")
    assert (found.shape, found.dtype) == ((3, 40, 60), np.uint8)
    np.testing.assert_allclose(found[:, 20, 5], [200, 0, 0], atol=12)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_any_colours(tmp_path, mode):
    image = (
        halves().convert("L").point(lambda v: v * 257, "I").convert("I;16")
        if mode == "I;16"
        else halves().convert(mode)
    )
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    assert read_picture(next(tmp_path.iterdir())).shape == (3, 40, 60)


def test_a_turned_photo_comes_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    halves().save(tmp_path / "a.jpg", exif=exif)
    found = read_picture(tmp_path / "a.jpg")
    assert found.shape == (3, 60, 40)
    np.testing.assert_allclose(found[:, 5, 20], [200, 0, 0], atol=12)


def test_what_a_separator_is_shown_of_it(tmp_path):
    halves().save(tmp_path / "a.png")
    seen = timeline_of_picture(tmp_path / "a.png", [OBJECT, MOTION], {"object": (16, 24), "motion": (8, 8)})
    frames = seen.read(OBJECT, centre_s=100.0, duration_s=3.0)
    assert frames.shape == (3, 3, 16, 24)
    np.testing.assert_array_equal(frames[0], frames[2])
    np.testing.assert_array_equal(frames[0, :, 8, 3], [200, 0, 0])
    motion = seen.read(MOTION, centre_s=100.0, duration_s=3.0)
    assert motion.shape == (24, 1, 8, 8)
    assert np.ptp(motion, axis=0).max() == 0
    lone = timeline_of_picture(tmp_path / "a.png", [OBJECT])
    assert lone.motion is None
    assert lone.object.shape == (1, 3, 112, 112)


def test_what_is_no_picture_is_one_line(tmp_path, monkeypatch):
    halves().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, told in (
        ("cut.png", "cannot be read as a picture"),
        ("text.jpg", "cannot be read as a picture"),
        ("empty.png", "cannot be read as a picture"),
        ("none.png", "no such picture"),
        (".", "no such picture"),
        ("a\0b", "no such picture"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            read_picture(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="too large for a picture"):
        read_picture(tmp_path / "a.png")


def test_stored_features_are_not_made_of_a_picture(tmp_path):
    halves().save(tmp_path / "a.png")
    stored = VisualSource(role="object", kind="features", name="clip", dim=8)
    with pytest.raises(DataError, match="object features 'clip', and a picture gives frames: give --features"):
        timeline_of_picture(tmp_path / "a.png", [stored])

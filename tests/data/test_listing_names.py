"""Names of videos and classes that systems write or read in different ways, and seconds beyond sense."""

from __future__ import annotations

import pytest

from avsep.data.prepare.listings import list_folder
from avsep.errors import DataError


def _videos(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"video")
    return root


def test_an_umlaut_is_one_class_however_it_was_written(tmp_path):
    root = _videos(tmp_path / "v", "fl\u00f6te/a.mp4", "flo\u0308te/b.mp4")
    found = list_folder(root)
    assert found.classes == ("fl\u00f6te",)
    assert len(found.videos) == 2


@pytest.mark.parametrize("name", ["con", "NUL.x", "aux", "LPT1"])
def test_names_that_windows_keeps_for_itself_are_no_ids(name, tmp_path):
    root = _videos(tmp_path / "v", "flute/a.mp4")
    (tmp_path / "t.csv").write_text(f"path,class,id\nflute/a.mp4,flute,{name}\n")
    assert list_folder(root, table=tmp_path / "t.csv").videos[0].id == f"_{name}"


def test_two_names_that_become_one_id_are_told(tmp_path):
    root = _videos(tmp_path / "v", "flute/a b.mp4", "flute/a?b.mp4")
    with pytest.raises(DataError, match=r"two videos would have the id 'flute-a_b', .*: rename one of them"):
        list_folder(root)


@pytest.mark.parametrize("span", ["0,1e308", "1e308,", "nan,1", "0,inf,", "1e9,2e9"])
def test_seconds_beyond_sense(span, tmp_path):
    root = _videos(tmp_path / "v", "flute/a.mp4")
    (tmp_path / "t.csv").write_text(f"path,class,start,end\nflute/a.mp4,flute,{span}\n")
    with pytest.raises(DataError, match="line 2"):
        list_folder(root, table=tmp_path / "t.csv")

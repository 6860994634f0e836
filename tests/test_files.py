"""Files: whole or absent, what a kill leaves is swept, and JSON and YAML of users end in a value or one clear line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avsep.errors import ConfigError
from avsep.export.runtime import files as runtime_files
from avsep.files import (
    FolderLock,
    atomic_path,
    csv_cell,
    entries,
    exchange,
    is_staging,
    made_folder,
    parse_yaml,
    read_json,
    read_yaml,
    staging_folder,
    sweep,
    write_json,
)

KILLED = """
import os, sys
from pathlib import Path
from avsep.files import atomic_path, staging_folder
folder = Path(sys.argv[1])
with atomic_path(folder / "table.csv") as temporary, staging_folder(folder / "bundle") as place:
    temporary.write_text("half")
    (place / "graph.onnx").write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""


def _killed(folder):
    folder.mkdir(exist_ok=True)
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], timeout=120).returncode == -9
    left = sorted(p.name for p in folder.iterdir())
    assert len(left) == 2
    assert all(is_staging(name) for name in left)
    return left


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_files, "_swept", set())
    return tmp_path / "folder"


@pytest.mark.skipif(os.name == "nt", reason="processes are not asked for there")
@pytest.mark.parametrize("how", ["atomic_path", "staging_folder", "FolderLock", "staged_files"])
def test_what_a_kill_left_goes_with_the_next_write(folder, how):
    _killed(folder)
    assert entries(folder) == []  # and until then it is nobody's
    if how == "atomic_path":
        with atomic_path(folder / "other.csv") as temporary:
            temporary.write_text("whole")
    elif how == "staging_folder":
        with staging_folder(folder / "other"):
            pass
    elif how == "FolderLock":
        with FolderLock(folder):
            pass
    else:
        with runtime_files.staged_files(folder, []):
            pass
    assert not [p.name for p in folder.iterdir() if is_staging(p.name)]


def test_what_is_being_written_stays(folder):
    folder.mkdir()
    mine = folder / f".staging-{runtime_files._HOST}-{os.getpid()}-x-a.csv"
    init = folder / f".staging-{runtime_files._HOST}-1-x-a.csv"  # a process that lives
    elsewhere = folder / f".staging-00000000-{2**22 - 1}-x-a.csv"  # on another machine
    persons = folder / ".staging-of-mine"
    for file in (mine, init, elsewhere, persons):
        file.write_text("half")
    sweep(folder)
    assert all(file.exists() for file in (mine, init, elsewhere, persons))


def test_a_folder_is_looked_through_once(folder, monkeypatch):
    folder.mkdir()
    seen = []
    real = os.scandir
    monkeypatch.setattr(runtime_files.os, "scandir", lambda place: (seen.append(place), real(place))[1])
    for _ in range(3):  # a store of 100,000 files writes each of them so
        with atomic_path(folder / "a.csv") as temporary:
            temporary.write_text("whole")
    assert len(seen) == 1


def test_long_names_leave_room_for_the_temporary_one(folder):
    with atomic_path(folder / ("n" * 240 + ".json")) as temporary:
        temporary.write_text("{}")
        assert temporary.suffix == ".json"
    assert len(entries(folder)) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has the call")
def test_two_folders_change_places_at_once(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    assert not exchange(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@sum", "\t=1", "-"])
def test_no_cell_is_a_formula(text):
    assert csv_cell(text) == (text if text == "-" else f"'{text}")
    for value in ("flute", "-1.5", "+2e-3", "", 3, None):
        assert csv_cell(value) == value


# --- JSON and YAML ---------------------------------------------------------------------------------------------------

BAD_JSON = {
    "not a number": '{"a": NaN}',
    "beyond a float": '{"a": 1e999}',
    "too many digits": '{"a": %s}' % ("9" * 5000),
    "a key twice": '{"a": 1, "a": 2}',
    "too deep": "[" * 70 + "]" * 70,
    "far too deep": "[" * 200_000,
    "cut short": '{"a": [1, 2',
    "nothing": "",
    "surrogates alone as bytes": b'{"a": "\xed\xa0\x80"}',
    "another encoding": '{"a": 1}'.encode("utf-16"),
    "half of a character": r'{"a": "\ud800"}',
}
BAD_YAML = {
    "not a number": "a: .nan",
    "infinite": "a: [1, .inf]",
    "too many digits": "a: " + "9" * 4000,
    "far too many digits": "a: " + "9" * 5000,
    "too deep": "[" * 70 + "]" * 70,
    "far too deep": "[" * 5000 + "]" * 5000,
    "cut short": "a: [1, 2",
    "aliases without end": "a: &a [1]\n"
    + "\n".join(f"b{i}: &b{i} [{', '.join(['*a'] * 9)}]" for i in range(1))
    + "".join(f"\nc{i}: &c{i} [{', '.join([f'*c{i - 1}' if i else '*b0'] * 9)}]" for i in range(12)),
    "an alias inside itself": "a: &a [*a]",
    "a tag that builds": "a: !!python/object/apply:os.system ['true']",
    "a date that is none": "a: 2001-13-45",
    "an unknown alias": "a: *b",
    "control characters": "a: \x00",
    "another encoding": "a: 1".encode("utf-16"),
    "a list as a key": "? [1, 2]\n: 3",
    "two documents": "a: 1\n---\nb: 2",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_none_is_one_line(name, tmp_path):
    text = BAD_JSON[name]
    file = tmp_path / "a.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="is not valid JSON") as caught:
        read_json(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(file))


@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml_that_is_none_is_one_line(name, tmp_path):
    text = BAD_YAML[name]
    file = tmp_path / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"is not (valid YAML|a text file)") as caught:
        read_yaml(file)
    assert time.monotonic() - started < 20  # no bomb went off
    assert "\n" not in str(caught.value)


def test_what_people_write_in_yaml_is_read():
    assert parse_yaml("") is None
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
    assert parse_yaml("1e-3") == "1e-3"  # as PyYAML has it
    assert parse_yaml("[1, 2.5, yes, ~]") == [1, 2.5, True, None]


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_only_regular_files_of_a_sensible_size_are_read(read, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "none")
    with pytest.raises(ConfigError, match="give a regular file"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be read: File name too long"):
        read(tmp_path / ("n" * 300))
    with pytest.raises(ConfigError, match="is not the name of a file"):
        read("a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigError, match="give a regular file"):  # and does not wait for a writer
            read(tmp_path / "pipe")
        with pytest.raises(ConfigError, match="give a regular file"):
            read("/dev/zero")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2 << 30)  # no blocks on disk
    with pytest.raises(ConfigError, match=r"has 2147 MB, more than such a file may have"):
        read(tmp_path / "large")


def test_json_that_is_written_is_read_again(tmp_path):
    value = {"a": [1, 2.5, None, True, "ü\u2028"], "b": {}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.text("[]{}:,-&*!'\"\\ \n\tab01.e~|>?#%@`<", max_size=120).map(str.encode))
def test_bytes_of_any_kind_end_in_a_value_or_one_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(data)
    for read in (read_json, read_yaml):
        with contextlib.suppress(ConfigError):
            read(file)


@pytest.mark.parametrize(
    ("maker", "method"), [(staging_folder, "mkdir"), (atomic_path, "touch"), (made_folder, "mkdir")]
)
def test_an_interrupt_as_soon_as_it_is_made_leaves_nothing(maker, method, tmp_path, monkeypatch):
    make = getattr(Path, method)

    def interrupted(self, *args, **how):
        make(self, *args, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, interrupted)
        with pytest.raises(KeyboardInterrupt), maker(tmp_path / "new"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_new_files_and_folders_have_the_usual_rights(tmp_path):
    umask = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("x")
        with staging_folder(tmp_path / "folder") as staging:
            os.replace(staging, tmp_path / "folder")
    finally:
        os.umask(umask)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder")] == [0o640, 0o750]

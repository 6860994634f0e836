"""Files of arrays from anybody: a clear word for every damage, and no memory given to what a header only says."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from avsep.errors import DataError
from avsep.export.runtime.arrays import Npz, header_bytes, read_header
from avsep.media.timeline import VisualTimeline, read_visual_file, write_visual_file

MB = 1 << 20


def npy(array: np.ndarray, **how: object) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **how)  # type: ignore[arg-type]
    return buffer.getvalue()


def headed(text: str, version: int = 1) -> bytes:
    """A .npy file's start with this header."""
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode("latin-1")


def said(shape: str, descr: str = "'|u1'") -> bytes:
    return headed(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(3.5),
        np.zeros((0, 4), np.int64),
        np.arange(5, dtype=">i4"),
        np.array([True, False]),
        np.arange(3, dtype=np.float16),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_read_as_numpy_reads_them(array: np.ndarray, version: tuple[int, int], tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", {"x.npy": npy(array, version=version), "y.npy": npy(np.ones(3))})
    with Npz(path, MB) as found, Npz(path.read_bytes(), MB) as again, np.load(path) as wanted:
        assert list(found.headers) == wanted.files
        for name in wanted.files:
            assert found.headers[name].nbytes == wanted[name].nbytes
            for read in (found.read(name), again.read(name)):
                assert read.dtype == wanted[name].dtype
                np.testing.assert_array_equal(read, wanted[name])


def test_headers_of_other_writers_are_read() -> None:
    for text in (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 2L), }      \n",
        '{"descr": "<f4","shape":(3,2),"fortran_order":False}',
    ):
        header = read_header(headed(text))
        assert (header.shape, header.dtype, header.order) == ((3, 2), np.dtype("<f4"), "C")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "no .npy file"),
        (b"\x93NUMPY\x09\x00" + bytes(20), "no .npy file"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "4294967295 bytes"),
        (said("(3,)", "'|O'"), "pickled objects"),
        (said("(3,)", "[('a', '|O'), ('b', '<f4')]"), "pickled objects"),
        (said("(3,)", "[('a', '<f4')]"), "header is damaged"),
        (said("(3,)", "'<U7'"), "<U7"),
        (said("(3,)", "'<f3'"), "header is damaged"),
        (said("(3,)", "'<m8[s]'"), "no numbers"),
        (said("(-3,)"), "header is damaged"),
        (said("(1e9,)"), "header is damaged"),
        (said("(__import__('os').abort(),)"), "header is damaged"),
        (said("(" + "(" * 9000), "header is damaged"),
        (said("(4611686018427387904, 4)"), "fits nowhere"),
        (said("(0, 4611686018427387904)"), "fits nowhere"),
        (said("(" + "1," * 40 + ")"), "fits nowhere"),
        (headed("{}"), "header is damaged"),
        (headed("\xff\x00{'shape'"), "header is damaged"),
        (said("(3,)")[:30], "ends within its header"),
    ],
)
def test_bad_headers_are_told(data: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("[", r"\[")):
        read_header(data[: header_bytes(data)])


def with_bytes(path: Path, change) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(bytes(data))


def encrypted(data: bytearray) -> None:
    """The flag of encryption in the local and in the central header."""
    data[6] |= 1
    data[data.rindex(b"PK\x01\x02") + 8] |= 1


def smaller(data: bytearray) -> None:
    """The list of members says that the member unpacks to less."""
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 200)


BAD = {
    "no array": ({"notes.txt": b"hello"}, "notes.txt is no array"),
    "pickle": ({"flute/object.npy": said("(1,)", "'|O'") + b"cos\nabort\n(tR."}, "pickled objects"),
    "more than it says": ({"flute/object.npy": said("(2, 3, 4, 4)") + bytes(97)}, "its header says"),
    "less than it says": ({"flute/object.npy": said("(2, 3, 4, 4)") + bytes(95)}, "its header says"),
    "terabytes": ({"flute/object.npy": said("(1000000, 3, 1000, 1000)")}, "its header says"),
    "endless features": ({"flute/features/x.npy": said("(1000000000000, 8)", "'<f8'")}, "its header says"),
    "another shape": ({"flute/object.npy": npy(np.zeros((3, 4), np.uint8))}, "must be uint8"),
    "text": ({"flute/object.npy": npy(np.array(["a"]))}, "no numbers"),
    "rate too high": ({"flute/object_rate_hz.npy": npy(np.float64(1001))}, "at most 1000"),
    "rate of infinity": ({"flute/object_rate_hz.npy": npy(np.float64(np.inf))}, "at most 1000"),
    "rate of NaN": ({"flute/motion_rate_hz.npy": npy(np.float64(np.nan))}, "at most 1000"),
    "rate below nothing": ({"flute/motion_rate_hz.npy": npy(np.float64(-1))}, "positive"),
    "names of several lines": ({"fl\nute\x1b/sound.npy": npy(np.ones(3))}, "fl ute"),
    "rates": ({"flute/motion_rate_hz.npy": npy(np.ones(3))}, "one positive number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_visual_files_are_told(name: str, tmp_path: Path) -> None:
    members, told = BAD[name]
    with pytest.raises(DataError, match=told):
        read_visual_file(zipped(tmp_path / "v.npz", members))


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_methods_that_take_memory_of_their_own_are_refused(method: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "v.npz", {"flute/object.npy": npy(np.zeros((1, 3, 4, 4), np.uint8))}, method)
    with pytest.raises(DataError, match="packed as NumPy never does"):
        read_visual_file(path)


@pytest.mark.parametrize(("change", "told"), [(encrypted, "encrypted"), (smaller, "CRC")])
def test_lists_of_members_that_lie_are_refused(change, told: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "v.npz", {"flute/object.npy": npy(np.zeros((1, 3, 9, 9), np.uint8))})
    with_bytes(path, change)
    with pytest.raises(DataError, match=told):
        read_visual_file(path)


def test_a_member_twice_and_a_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    data = npy(np.zeros((1, 3, 4, 4), np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flute/object.npy", data)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("flute/object.npy", data)
    with pytest.raises(DataError, match="twice"):
        read_visual_file(path)
    for name in (tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0.npz"):
        with pytest.raises(DataError, match="no such file"):
            read_visual_file(name)


@pytest.mark.parametrize("asked_for", [True, False])
def test_what_unpacks_to_gigabytes_takes_no_memory(asked_for: bool, tmp_path: Path) -> None:
    """2 MB that unpack to 2.1 GB, of an entry that is looked for and of one that nobody knows."""
    path, size = tmp_path / "v.npz", 2_100_000_000
    key = "flute/object" if asked_for else "flute/object_rate_hz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cello/object.npy", npy(np.zeros((1, 3, 4, 4), np.uint8)))
        archive.writestr(f"{key}.npy", bytes(4 * MB))
    # the list of members says what a long deflated stream would: making one takes seconds
    with_bytes(path, lambda data: struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, size))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"to 2100\.0 MB"):
            read_visual_file(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * MB
    finally:
        tracemalloc.stop()


def test_a_long_list_of_members_is_refused(tmp_path: Path) -> None:
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<HHH", 5, 0, 0) + bytes(12) + b"x.npy"
    count = 6 * MB // len(entry)
    listed = entry * count
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, len(listed), 0, 0)
    (tmp_path / "v.npz").write_bytes(listed + end)
    with pytest.raises(DataError, match="list of members is too long"):
        read_visual_file(tmp_path / "v.npz")


def test_any_damage_to_a_visual_file_is_told_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    seen = VisualTimeline(object=np.ones((2, 3, 4, 4), np.uint8), features={"clip": np.ones((2, 3))})
    write_visual_file(path, {"flute": seen})
    whole, rng, told = path.read_bytes(), random.Random(0), []
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data))
        try:
            read_visual_file(path)
        except DataError as error:
            told.append(str(error))
    assert len(told) > 750
    assert not any("\n" in line for line in told)


def test_what_is_not_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at most 1000"):
        write_visual_file(tmp_path / "v.npz", {"flute": VisualTimeline(object_rate_hz=1e9)})
    huge = np.broadcast_to(np.uint8(0), (8000, 3, 224, 224))
    with pytest.raises(DataError, match="1204 MB"):
        write_visual_file(tmp_path / "v.npz", {"flute": VisualTimeline(object=huge)})
    assert not list(tmp_path.iterdir())

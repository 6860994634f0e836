"""A data set of tiny videos, some of them damaged, each in its own way."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from support.media_files import tone, write_video

DAMAGED = {  # name -> status that it gets
    "cut.mp4": "broken",
    "text.mp4": "broken",
    "empty.mp4": "broken",
    "holes.mp4": "broken",
    "folder.mp4": "broken",
    "gone.mp4": "missing",
    "film.mp4": "no_audio",
    "hushed.mp4": "silent",
    "blink.mp4": "short",
    "sound.m4a": "no_video",
}
CLASSES = ("ding", "hum", "peep", "whirr")


def frames(count: int, hue: int) -> list[np.ndarray]:
    """48 x 64 pixels, a bar that moves."""
    found = []
    for number in range(count):
        frame = np.full((48, 64, 3), (hue, 90, 220 - hue), np.uint8)
        frame[:, 4 * number % 60 : 4 * number % 60 + 6] = 250
        found.append(frame)
    return found


def write_good(path: Path, number: int) -> Path:
    """A second and a bit of a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = tone(1.2, 16000, 300.0 + 70.0 * number)
    return write_video(path, frames(6, 20 + 20 * number), sound, fps=5, rate_hz=16000)


def write_damaged(folder: Path, good: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    (folder / "text.mp4").write_bytes(b"la la la " * 99)
    (folder / "empty.mp4").touch()
    holes = bytearray(good)
    at = holes.find(b"mdat") + 4
    size = int.from_bytes(holes[at - 8 : at - 4], "big") - 8
    holes[at : at + size] = bytes(size)
    (folder / "holes.mp4").write_bytes(holes)
    (folder / "folder.mp4").mkdir()
    write_video(folder / "film.mp4", frames(6, 50), None, fps=5)
    write_video(folder / "hushed.mp4", frames(6, 50), np.zeros((1, 20000), np.float32), fps=5, rate_hz=16000)
    write_video(folder / "blink.mp4", frames(1, 50), tone(0.3, 16000), fps=5, rate_hz=16000)
    write_video(folder / "sound.m4a", None, tone(1.2, 16000), rate_hz=16000)


def write_collection(root: Path, count: int, encodes: int = 4) -> Path:
    """``count`` videos in ``root``, ten of them damaged, and the table that lists them; returns the table.

    There are ``encodes`` different recordings; what is told apart by nothing else has a box of its own at its end.
    """
    originals = [write_good(root / f"original-{k}.mp4", k).read_bytes() for k in range(encodes)]
    rows = []
    for number in range(count - len(DAMAGED)):
        name = CLASSES[number % len(CLASSES)]
        split = ("train", "train", "val", "test")[number // len(CLASSES) % 4]
        note = f"video {number:06d}".encode()
        path = root / name / f"{number:03d}.mp4"
        path.parent.mkdir(exist_ok=True)
        box = (8 + len(note)).to_bytes(4, "big") + b"free" + note
        path.write_bytes(originals[number % encodes] + box)
        rows.append((path.relative_to(root).as_posix(), name, split))
    for k in range(encodes):
        (root / f"original-{k}.mp4").unlink()
    write_damaged(root / "bad", originals[0])
    for number, name in enumerate(DAMAGED):
        rows.insert(7 * number % len(rows), (f"bad/{name}", CLASSES[number % len(CLASSES)], "train"))
    table = root.parent / f"{root.name}.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("path", "class", "split"), *rows])
    return table

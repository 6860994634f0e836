"""SoundFont banks of one sine, written by the specification, so that what is heard can be computed."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from avsep.data.synth.soundfont import Note, SoundFont
from avsep.media.audio import write_audio

__all__ = ["LOOP", "bank_bytes", "bank_of", "record_notes"]

_SINE_RATE = 44100  # of a sine of 441 Hz: 100 samples a period
_ROOT = 69


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def bank_bytes(
    *zones: dict[int, int],
    preset: dict[int, int] | None = None,
    kind: int = 1,
    global_zone: dict[int, int] | None = None,
) -> bytes:
    """A SoundFont with one instrument of ``zones`` (generator: amount), each on the same looped sine."""
    sine = (16384 * np.sin(2 * np.pi * np.arange(4410) / 100)).round().astype("<i2")
    samples = _chunk(b"smpl", sine.tobytes() + bytes(92))
    generators, bags = b"", b""
    count = 0
    ranges = (43, 44)
    for zone in ([global_zone] if global_zone else []) + list(zones):
        bags += struct.pack("<HH", count, 0)
        # ranges come first and the sample last, as the specification asks
        entries = sorted(zone.items(), key=lambda e: (e[0] not in ranges, e[0]))
        if zone is not global_zone:
            entries.append((53, 0))
        for number, amount in entries:
            generators += struct.pack("<HH", number, amount & 0xFFFF)
            count += 1
    total = len(zones) + bool(global_zone)
    bags += struct.pack("<HH", count, 0)
    outer = [*sorted((preset or {}).items()), (41, 0)]
    pgen = b"".join(struct.pack("<HH", n, a & 0xFFFF) for n, a in outer)
    header = struct.pack("<20s5IBbHH", b"sine", 0, 4410, 1000, 1100, _SINE_RATE, _ROOT, 0, 0, kind)
    hydra = (
        _chunk(
            b"phdr",
            struct.pack("<20s3H3I", b"Test", 5, 0, 0, 0, 0, 0) + struct.pack("<20s3H3I", b"EOP", 0, 0, 1, 0, 0, 0),
        )
        + _chunk(b"pbag", struct.pack("<HHHH", 0, 0, len(outer), 0))
        + _chunk(b"pmod", bytes(10))
        + _chunk(b"pgen", pgen + bytes(4))
        + _chunk(b"inst", struct.pack("<20sH", b"Inst", 0) + struct.pack("<20sH", b"EOI", total))
        + _chunk(b"ibag", bags)
        + _chunk(b"imod", bytes(10))
        + _chunk(b"igen", generators + bytes(4))
        + _chunk(b"shdr", header + bytes(46))
    )
    body = b"sfbk" + _chunk(b"LIST", b"INFO") + _chunk(b"LIST", b"sdta" + samples) + _chunk(b"LIST", b"pdta" + hydra)
    return b"RIFF" + struct.pack("<I", len(body)) + body


LOOP = {54: 1}


def bank_of(tmp_path: Path, *zones: dict[int, int], **kwargs: object) -> SoundFont:
    path = tmp_path / "bank.sf2"
    path.write_bytes(bank_bytes(*zones, **kwargs))  # type: ignore[arg-type]
    return SoundFont(path)


def record_notes(bank: SoundFont, preset: tuple[int, int], folder: Path, keys: Iterable[int], style: str) -> None:
    """Write a WAV file of each key, after a moment of silence, as recordings of single notes are named.

    ``style`` holds ``{name}`` (As4), ``{key}`` (70) or both, without the suffix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        note = Note(0.15, 0.8, key, 100)
        sound = bank.render([note], bank=preset[0], program=preset[1], samples=26000, sample_rate_hz=22050)
        name = ["C", "Cs", "D", "Ds", "E", "F", "Fs", "G", "Gs", "A", "As", "B"][key % 12] + str(key // 12 - 1)
        write_audio(folder / f"{style.format(name=name, key=key)}.wav", 0.5 * sound / np.abs(sound).max(), 22050)

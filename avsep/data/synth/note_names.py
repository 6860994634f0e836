"""The pitch of a recorded note: from its file's name, or detected by librosa."""

from __future__ import annotations

import re

import numpy as np

from avsep.errors import DataError, MissingExtraError

__all__ = ["detect_key", "key_of_name", "piece_of_name"]

_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_SIGNS = {"": 0, "#": 1, "s": 1, "♯": 1, "sharp": 1, "b": -1, "♭": -1, "flat": -1}
_NOTE = re.compile(r"([A-Ga-g])(#|♯|♭|sharp|flat|s|b|)([0-9])")
_NSYNTH = re.compile(r"_(?:acoustic|electronic|synthetic)_\d{3}-(\d{3})-\d{3}$")
_MIDI = re.compile(r"(?:^|[^a-z])(?:midi|note|key|pitch)[ _-]?(\d{1,3})(?!\d)", re.IGNORECASE)
_LOWEST, _HIGHEST = 12, 120
_NUMBERS = range(21, 109)  # a number that stands alone is a key of the piano, or no pitch
# General MIDI keys of the pieces of a drum kit, by what their files are called
_PIECES = (
    (36, ("kick", "bass_drum", "bassdrum", "bass drum", "bd")),
    (38, ("snare", "rimshot", "side_stick", "sd")),
    (42, ("hihat", "hi_hat", "hi hat", "hh", "hat")),
    (47, ("tom", "conga", "bongo")),
    (49, ("crash", "ride", "cymbal", "splash", "china")),
)


def key_of_name(stem: str) -> int | None:
    """The MIDI key that a file's name (without its suffix) states, or None; C4 is key 60.

    Read are note names (``A4``, ``As4``, ``C#3``, ``Bb2``) that stand alone between dots, underscores, hyphens or
    spaces, as in ``violin_A3_1_forte_arco-normal`` and ``Horn.F.ff.A3.stereo``; ``midi60``; NSynth's
    ``guitar_acoustic_010-060-050``; and else a number from 21 to 108 that stands alone.

    Raises :class:`DataError` for a name that states several pitches: a scale, or one of two readings.
    """
    if found := _NSYNTH.search(stem):
        return _within(int(found[1]))
    words = [w for w in re.split(r"[\s._\-()\[\],]+", stem) if w]
    if any(len(_NOTE.findall(w)) > 1 and not _NOTE.sub("", w) for w in words):
        raise DataError("its name states several notes")
    notes = {w: _NOTE.fullmatch(w) for w in words}
    keys = {w: _within(12 * (int(m[3]) + 1) + _STEPS[m[1].upper()] + _SIGNS[m[2]]) for w, m in notes.items() if m}
    # a lower-case word may be a label, as in take_b2, where another word is a note
    stated = {key for w, key in keys.items() if w[0].isupper()} or set(keys.values())
    stated.discard(None)
    if not stated and (midi := _MIDI.findall(stem)):
        stated = {_within(int(number)) for number in midi} - {None}
    if not stated:
        stated = {int(w) for w in words if w.isdecimal() and int(w) in _NUMBERS}
    if len(stated) > 1:
        raise DataError("its name states several notes")
    return stated.pop() if stated else None


def _within(key: int) -> int | None:
    return key if _LOWEST <= key <= _HIGHEST else None


def piece_of_name(stem: str) -> int | None:
    """The General MIDI key of a piece of a drum kit, from a file's name: kick, snare, hi-hat, tom or cymbal."""
    name = " " + re.sub(r"[\s._\-()]+", "_", stem.lower()) + " "
    for key, words in _PIECES:
        if any(re.search(rf"(?<![a-z]){word}s?(?![a-z])", name) for word in (w.replace(" ", "_") for w in words)):
            return key
    return None


def detect_key(sound: np.ndarray, rate_hz: int) -> int | None:
    """The MIDI key of one note, [L] in any scale: librosa's pYIN; None where its frames do not agree.

    Raises :class:`MissingExtraError` without librosa.
    """
    try:
        import librosa
    except ImportError:
        raise MissingExtraError("librosa", "notes", "the pitch of notes whose names do not state it") from None
    part = sound[: int(0.8 * rate_hz)].astype(np.float32)
    highest_hz = min(4200.0, 0.45 * rate_hz)
    # coarse steps: the nearest key is asked for, and the search takes their number squared
    hz, voiced, _ = librosa.pyin(
        part, fmin=32.0, fmax=highest_hz, sr=rate_hz, frame_length=2048, hop_length=1024, resolution=0.25
    )
    hz = hz[voiced & np.isfinite(hz)]
    if len(hz) < 3:
        return None
    keys = 69 + 12 * np.log2(hz / 440)
    middle = float(np.median(keys))
    return round(middle) if np.mean(np.abs(keys - middle) < 0.6) >= 0.6 else None

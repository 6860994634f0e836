"""The offline benchmark's second version on recorded single notes, from folders of which each holds a class.

Phrases and pictures are those of version 2; each note of a phrase is played with the nearest recorded one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from avsep.data.store import SPLITS, Store, StoreWriter, remove_store
from avsep.data.synth.note_names import detect_key, key_of_name, piece_of_name
from avsep.data.synth.phrases import CLASSES, Instrument
from avsep.data.synth.phrases_v2 import INSTRUMENTS_V2, compose_v2
from avsep.data.synth.pictures import look_of, motion_frames, object_frames
from avsep.data.synth.soundfont import Note
from avsep.data.synth.synthesis import (
    LEVEL_JITTER_DB,
    LEVEL_V2_DB,
    MOTION_RATES_HZ,
    OBJECT_RATE_HZ,
    SAMPLE_RATE_HZ,
    SIZES_V2,
    active_rms,
    check_settings,
    finish_audio,
    run_all,
)
from avsep.errors import AudioError, ConfigError, DataError, MissingExtraError, UnknownNameError, near_matches
from avsep.files import sha256_file
from avsep.media.audio import read_audio, resample, to_mono
from avsep.progress import Progress, progress_bar

__all__ = ["LeftOut", "NoteFolders", "Recording", "divide", "find_notes", "synthesise_notes"]

FEWEST_NOTES = 4  # of a class
DIVIDED_FROM = 20  # recordings of a class; fewer would leave the test split a handful of pitches
FURTHEST = 3  # semitones that a recording is moved
SPLIT_BY = ("recording", "none")
_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".mp3", ".aif", ".aiff", ".aifc")
_PLAYED_AT = 2  # notes are kept and moved at so many times the store's rate
_KEPT_S = 5.0  # of each recording; no phrase holds a note longer
_SHORTEST_S = 0.05
_ONSET_DB, _BEFORE_S = 30.0, 0.01  # where a recording begins: this far below its loudest, and so much before
_SILENT_DB = -70.0
_FADE_S = {"plucked": 0.2, "struck": 0.2, "drums": 0.2}  # at the end of the written length; others 0.06
_DRUM_PIECES = (36, 38, 42, 47, 49)
LICENCE = "Made of the recordings named under origin, whose licence is theirs. Phrases and pictures: generated."


@dataclass(frozen=True)
class Recording:
    """One recorded note: its path within the folder, its MIDI key (of a drum kit: the piece's), its file's hash."""

    path: str
    key: int
    sha256: str


@dataclass(frozen=True)
class LeftOut:
    """A file that is not used, and why: ``reason`` is one of few, ``detail`` says more."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class NoteFolders:
    """What :func:`find_notes` found: recordings and picture (one of the 20 classes) by class, and what is left out."""

    folder: Path
    recordings: Mapping[str, tuple[Recording, ...]]
    pictures: Mapping[str, str]
    left_out: tuple[LeftOut, ...]


def find_notes(
    folder: str | Path, *, pictures: Mapping[str, str] | None = None, bars: Progress | None = None
) -> NoteFolders:
    """Read folders of recorded notes, one folder a class, at any depth below ``folder``.

    A folder's name is its class (in lower case, with underscores). ``pictures`` maps classes to those of the 20 whose
    pictures and phrasing they take; a class that is none of the 20 needs one. The pitch of a file is that of its name,
    or detected; a file without one, or that cannot be read, is left out.

    Raises :class:`DataError` for a folder without classes, or a class with fewer than four usable notes;
    :class:`UnknownNameError` for a class without a picture.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"no such folder: {root} (give one that holds a folder of notes for each class)")
    folders: dict[str, Path] = {}
    for path in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        name = re.sub(r"[^\w]+", "_", path.name.lower()).strip("_")
        if name in folders:
            raise DataError(f"{folders[name]} and {path} are both class '{name}': put their notes into one folder")
        folders[name] = path
    if not folders:
        raise DataError(f"{root} holds no folders: put the notes of each class into a folder of its own")
    asked = dict(pictures or {})
    for name, picture in asked.items():
        if name not in folders:
            raise UnknownNameError(
                f"--as {name}={picture}: no folder '{name}' in {root}: {near_matches(name, folders)}"
            )
        if picture not in CLASSES:
            raise UnknownNameError(f"--as {name}={picture}: no class '{picture}': {near_matches(picture, CLASSES)}")
    drawn = {name: asked.get(name, name) for name in folders}
    for name in folders:
        if drawn[name] not in CLASSES:
            raise UnknownNameError(
                f"{folders[name]}: nobody can draw '{name}': {near_matches(name, CLASSES)}; rename the folder, or give "
                f"it the picture of a class with --as {name}=CLASS"
            )

    names = sorted(folders, key=lambda n: (CLASSES.index(n) if n in CLASSES else len(CLASSES), n))
    files = {
        name: sorted(
            p for p in folders[name].rglob("*") if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")
        )
        for name in names
    }
    bars = bars or Progress()
    bar = bars.add("reading notes", sum(map(len, files.values())))
    recordings: dict[str, tuple[Recording, ...]] = {}
    left_out: list[LeftOut] = []
    for name in names:
        if not files[name]:
            raise DataError(f"{folders[name]} holds no recordings ({', '.join(_SUFFIXES)})")
        drums = _player(drawn[name]).play == "drums"
        found = []
        for path in files[name]:
            relative = path.relative_to(root).as_posix()
            result = _inspect(path, drums)
            if isinstance(result, int):
                found.append(Recording(relative, result, sha256_file(path)))
            else:
                left_out.append(LeftOut(relative, *result))
            bars.advance(bar)
        if len(found) < FEWEST_NOTES:
            reasons = Counter(lost.reason for lost in left_out if Path(lost.path).parts[0] == folders[name].name)
            why = "".join(f"; {count} left out: {reason}" for reason, count in reasons.items())
            raise DataError(
                f"{folders[name]} has {len(found)} usable notes of {len(files[name])}, and a class needs "
                f"{FEWEST_NOTES}{why}"
            )
        recordings[name] = tuple(found)
    return NoteFolders(root, recordings, drawn, tuple(left_out))


def _inspect(path: Path, drums: bool) -> int | tuple[str, str]:
    """A recording's key, or why it is left out: (reason, detail)."""
    try:
        key = (piece_of_name(path.stem) or key_of_name(path.stem)) if drums else key_of_name(path.stem)
    except DataError as error:
        return str(error), f"{path.name}: record or cut one note a file"
    try:
        sound = _sound(path)
    except AudioError as error:
        return "unreadable", str(error)
    except DataError as error:
        return str(error), path.name
    if key is not None:
        return key
    if drums:
        return "no piece of a drum kit in its name", f"{path.name}: name it kick, snare, hihat, tom or cymbal"
    try:
        key = detect_key(sound, _PLAYED_AT * SAMPLE_RATE_HZ)
    except MissingExtraError as error:
        return "no pitch in its name", str(error)
    return ("no pitch in its name or its sound", path.name) if key is None else key


def _sound(path: Path, rate_hz: int = _PLAYED_AT * SAMPLE_RATE_HZ) -> np.ndarray:
    """A recording as float32 [L] at ``rate_hz`` from its onset on, at a level of one (RMS)."""
    audio, native_hz = read_audio(path)
    mono = to_mono(audio)
    low_hz = _PLAYED_AT * SAMPLE_RATE_HZ  # its onset is the same at every rate
    low = resample(mono, native_hz, low_hz)
    block = low_hz // 200
    power = np.mean(np.pad(low, (0, -len(low) % block)).reshape(-1, block).astype(np.float64) ** 2, axis=1)
    if not power.max() > 10 ** (_SILENT_DB / 10):
        raise DataError("silent")
    first = int(np.argmax(power >= power.max() * 10 ** (-_ONSET_DB / 10)))
    begin = max(0, first * block - round(_BEFORE_S * low_hz)) * (rate_hz // low_hz)
    sound = low if rate_hz == low_hz else resample(mono, native_hz, rate_hz)
    sound = sound[begin : begin + round(_KEPT_S * rate_hz)]
    if len(sound) < _SHORTEST_S * rate_hz:
        raise DataError("too short")
    sound = sound / np.float32(active_rms(sound[:rate_hz], rate_hz))
    rise = min(round(0.002 * rate_hz), len(sound))
    sound[:rise] *= np.linspace(0, 1, rise, dtype=np.float32)
    return np.ascontiguousarray(sound, np.float32)


_kept_sound = lru_cache(maxsize=128)(_sound)


def _player(picture: str) -> Instrument:
    return INSTRUMENTS_V2[CLASSES.index(picture)]


def divide(recordings: Sequence[Recording], split_by: str = "recording") -> dict[str, tuple[Recording, ...]]:
    """A class's recordings by split, so that no test note is a training note.

    In order of pitch, of ten recordings the third goes to val, the fifth and the tenth go to test and the others to
    train: each split has notes from the whole register. Fewer than 20 different ones, or ``split_by="none"``: all
    splits share all.
    """
    ordered = sorted(recordings, key=lambda r: (r.key, r.sha256, r.path))
    # the same file twice must not stand on both sides
    unique = {r.sha256: number for number, r in enumerate({r.sha256: r for r in ordered}.values())}
    if split_by == "none" or len(unique) < DIVIDED_FROM:
        return dict.fromkeys(SPLITS, tuple(ordered))
    found: dict[str, list[Recording]] = {split: [] for split in SPLITS}
    for recording in ordered:
        number = unique[recording.sha256]
        found["val" if number % 10 == 2 else "test" if number % 5 == 4 else "train"].append(recording)
    return {split: tuple(found[split]) for split in SPLITS}


def choose(
    note: Note, recordings: Sequence[Recording], drums: bool, rng: np.random.Generator
) -> tuple[Note, Recording]:
    """The recording that plays a note, and the note as it is then heard.

    The nearest in pitch within three semitones, after a move by the fewest octaves that brings one so near; where none
    does, the nearest of all, moved by three semitones. Of several at one pitch, ``rng`` chooses. A drum kit's pieces
    are played as they are, a piece that is not there by another one.
    """
    keys = sorted({r.key for r in recordings})
    if drums:
        piece = min(_DRUM_PIECES, key=lambda p: (_piece(note.key) != p, p))
        wanted = min(keys, key=lambda k: (_piece(k) != piece, abs(k - note.key)))
        heard = note.key if _piece(wanted) == piece else wanted
    else:
        for octave in (0, 12, -12, 24, -24, 36, -36, 48, -48):
            heard = note.key + octave
            wanted = min(keys, key=lambda k: (abs(k - heard), k))
            if abs(wanted - heard) <= FURTHEST:
                break
        else:
            wanted = min(keys, key=lambda k: (abs(k - note.key), k))
            heard = wanted + (FURTHEST if note.key > wanted else -FURTHEST)
    there = [r for r in recordings if r.key == wanted]
    return replace(note, key=heard), there[int(rng.integers(len(there)))]


def _piece(key: int) -> int:
    """The piece of :data:`_DRUM_PIECES` that a General MIDI drum key belongs to."""
    if key in (35, 36):
        return 36
    if key in (37, 38, 39, 40):
        return 38
    if key in (42, 44, 46):
        return 42
    return 47 if key in (41, 43, 45, 47, 48, 50) else 49


def _play(
    player: Instrument, chosen: Sequence[tuple[Note, Recording]], root: Path, samples: int, rate_hz: int
) -> np.ndarray:
    """float32 [samples] at ``rate_hz``."""
    out = np.zeros(samples, np.float32)
    drums = player.play == "drums"
    fade = round(_FADE_S.get(player.play, 0.06) * rate_hz)
    for note, recording in chosen:
        sound = _kept_sound(root / recording.path, rate_hz)
        step = 1.0 if drums else 2.0 ** ((note.key - recording.key) / 12)
        begin = round(note.onset_s * rate_hz)
        held = len(sound) if drums else round(note.duration_s * rate_hz)
        total = min(held + fade, int((len(sound) - 1) / step), samples - begin)
        if total <= 0:
            continue
        voice = np.interp(np.arange(total) * step, np.arange(len(sound)), sound)
        voice *= np.clip((held + fade - np.arange(total)) / fade, 0, 1)
        end = min(round(0.01 * rate_hz), total)
        if begin + total < samples:  # where the recording ends before the note does
            voice[total - end :] *= np.linspace(1, 0, end)
        out[begin : begin + total] += (note.velocity / 127) ** 2 * voice
    return out


@dataclass(frozen=True)
class _Clip:
    """One clip to be made."""

    id: str
    class_name: str
    picture: str
    split: str
    number: int
    duration_s: float
    seed: int
    root: str
    recordings: tuple[Recording, ...]
    motion_rate_hz: float
    sample_rate_hz: int


def make_clip(clip: _Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make one clip: audio int16 [L], object frames uint8 [n, 3, 112, 112], motion frames uint8 [m, 1, 48, 48]."""
    player = _player(clip.picture)
    name = int.from_bytes(hashlib.sha256(clip.class_name.encode()).digest()[:4], "big")
    key = (clip.seed, name, SPLITS.index(clip.split), clip.number, 2)
    music, sight = (np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence(key).spawn(2))
    notes = compose_v2(player, clip.duration_s, music)
    chosen = [choose(note, clip.recordings, player.play == "drums", music) for note in notes]
    rate_hz = _PLAYED_AT * clip.sample_rate_hz
    sound = _play(player, chosen, Path(clip.root), round(clip.duration_s * rate_hz), rate_hz)
    level_db = LEVEL_V2_DB + float(music.uniform(-LEVEL_JITTER_DB, LEVEL_JITTER_DB))
    try:
        audio = finish_audio(sound, rate_hz, clip.sample_rate_hz, clip.duration_s, level_db, active=True)
    except DataError:
        raise DataError(f"the recordings of '{clip.class_name}' play nothing audible in clip {clip.id}") from None
    look = look_of(player, sight)
    heard = [note for note, _ in chosen]  # the picture shows the pitch that is heard
    return (
        audio,
        object_frames(player, look, heard, clip.duration_s, OBJECT_RATE_HZ, version=2),
        motion_frames(player, look, heard, clip.duration_s, clip.motion_rate_hz, version=2),
    )


def _make_and_write(out: str, clip: _Clip) -> str:
    audio, frames, motion = make_clip(clip)
    writer = StoreWriter.worker(out, clip.sample_rate_hz)
    writer.write_clip(clip.id, clip.class_name, clip.split, audio, object_frames=frames, motion_frames=motion)
    return clip.id


def synthesise_notes(
    notes: NoteFolders,
    out: str | Path,
    *,
    seed: int = 0,
    clips_per_class: tuple[int, int, int] | None = None,
    clip_s: float | None = None,
    split_by: str = "recording",
    motion_rate_hz: float = MOTION_RATES_HZ[2],
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    workers: int | None = None,
    progress: bool | Progress = True,
    force: bool = False,
) -> Store:
    """Make a store of recorded notes in folder ``out`` and open it: phrases and pictures as in version 2.

    ``clips_per_class`` (train, val, test) and ``clip_s`` are those of size tiny unless given. ``split_by``: see
    :func:`divide`. ``sample_rate_hz``, ``workers``, ``progress`` and ``force``, and how a killed run is continued: as
    in :func:`~avsep.data.synth.synthesis.synthesise`.

    Raises :class:`ConfigError` for wrong settings; :class:`DataError` when ``out`` holds something else or is within
    the folder of notes.
    """
    counts = tuple(clips_per_class or SIZES_V2["tiny"].clips_per_class)
    duration_s = SIZES_V2["tiny"].clip_s if clip_s is None else float(clip_s)
    if split_by not in SPLIT_BY:
        raise ConfigError(f"split_by = '{split_by}': known: {', '.join(SPLIT_BY)}")
    check_settings(counts, duration_s, seed, workers, motion_rate_hz, sample_rate_hz)
    if Path(out).resolve().is_relative_to(notes.folder.resolve()):
        raise DataError(f"{out} lies in the folder of notes, {notes.folder}: choose another folder for the store")
    divided = {name: divide(found, split_by) for name, found in notes.recordings.items()}
    origin = {
        "generator": "avsep data notes",
        "generator_version": 2,
        "seed": seed,
        "clips_per_class": list(counts),
        "clip_s": duration_s,
        "split_by": split_by,
        "recordings": {
            name: {
                "picture": notes.pictures[name],
                "notes": {split: len(divided[name][split]) for split in SPLITS},
                "shared": divided[name]["train"] == divided[name]["test"],
                "sha256": hashlib.sha256(
                    "\n".join(sorted(f"{r.sha256} {r.key} {r.path}" for r in found)).encode()
                ).hexdigest(),
            }
            for name, found in notes.recordings.items()
        },
    }
    clips = [
        _Clip(
            f"{name}-{split}-{number:03d}",
            name,
            notes.pictures[name],
            split,
            number,
            duration_s,
            seed,
            str(notes.folder),
            divided[name][split],
            motion_rate_hz,
            sample_rate_hz,
        )
        for name in notes.recordings
        for split, count in zip(SPLITS, counts, strict=True)
        for number in range(count)
    ]
    if force:
        remove_store(out)
    with StoreWriter(
        out,
        classes=list(notes.recordings),
        sample_rate_hz=sample_rate_hz,
        object_rate_hz=OBJECT_RATE_HZ,
        motion_rate_hz=motion_rate_hz,
        origin=origin,
        licence=LICENCE,
    ) as writer:
        if writer.finished:
            return Store.open(out)
        todo = [c for c in clips if not writer.is_done(c.id)]
        with contextlib.ExitStack() as stack:
            bars = progress if isinstance(progress, Progress) else stack.enter_context(progress_bar(progress))
            run_all(_make_and_write, str(out), todo, len(clips), workers or os.cpu_count() or 1, bars)
        return writer.finish([c.id for c in clips])

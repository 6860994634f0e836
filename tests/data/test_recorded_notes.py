"""Stores made of folders of recorded single notes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from avsep.data.store import Store
from avsep.data.synth import recorded
from avsep.data.synth.note_names import detect_key, key_of_name, piece_of_name
from avsep.data.synth.phrases import instrument
from avsep.data.synth.recorded import Recording, choose, divide, find_notes, synthesise_notes
from avsep.data.synth.soundfont import Note, SoundFont
from avsep.data.synth.synthesis import find_banks, preset_of
from avsep.errors import ConfigError, DataError, UnknownNameError
from avsep.media.audio import resample, write_audio
from support.folders import contents
from support.soundfonts import record_notes

needs_bank = pytest.mark.skipif(not find_banks(), reason="no SoundFont bank on this machine")
needs_librosa = pytest.mark.skipif(importlib.util.find_spec("librosa") is None, reason="librosa is not installed")

# names


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("A4", 69),
        ("As4", 70),
        ("C#3", 49),
        ("Bb2", 46),
        ("b2", 47),
        ("cello_take_b2_C4", 60),
        ("violin_A3_1_forte_arco-normal", 57),  # Philharmonia
        ("saxophone_Cs4_025_mezzo-piano_normal", 61),
        ("Horn.F.ff.Eb3.stereo", 51),  # Iowa
        ("Violin.arco.ff.sulG.G3.stereo", 55),
        ("guitar_acoustic_010-060-050", 60),  # NSynth
        ("brass_acoustic_006-101-127", 101),
        ("midi60", 60),
        ("flute-midi_072-ff", 72),
        ("flute 72", 72),
        ("04 flute 72", 72),
        ("flute 440", None),
        ("flute 3", None),
        ("loud", None),
    ],
)
def test_pitch_of_a_name(name: str, key: int | None) -> None:
    assert key_of_name(name) == key


@pytest.mark.parametrize("name", ["Violin.arco.ff.sulG.G3B3", "scale_C4-G4", "flute 60 72"])
def test_a_name_with_several_pitches_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="several notes"):
        key_of_name(name)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Kick_01", 36),
        ("snare-rim 2", 38),
        ("Closed HiHat", 42),
        ("tom-low", 47),
        ("ride cymbal", 49),
        ("bottom", None),
    ],
)
def test_piece_of_a_name(name: str, key: int | None) -> None:
    assert piece_of_name(name) == key


# which recording plays what


def _recordings(*keys: int) -> list[Recording]:
    return [Recording(f"{number}.wav", key, f"{number:064x}") for number, key in enumerate(keys)]


@pytest.mark.parametrize(
    ("keys", "wanted", "heard", "used"),
    [
        ((60, 64), 61, 61, 60),
        ((60, 64), 67, 67, 64),
        ((60, 64), 73, 61, 60),  # an octave lower
        ((60, 64), 40, 64, 64),  # two octaves higher
        ((60,), 66, 63, 60),  # nothing is near: as far as a recording is moved
        ((60,), 18, 57, 60),
    ],
)
def test_the_nearest_recording_plays(keys: tuple[int, ...], wanted: int, heard: int, used: int) -> None:
    note, recording = choose(Note(0, 1, wanted), _recordings(*keys), False, np.random.default_rng(0))
    assert (note.key, recording.key) == (heard, used)
    assert abs(note.key - recording.key) <= 3


def test_pieces_of_a_kit_are_played_as_they_are() -> None:
    rng = np.random.default_rng(0)
    for wanted, used, heard in ((36, 36, 36), (46, 42, 46), (51, 42, 42)):
        note, recording = choose(Note(0, 1, wanted), _recordings(36, 38, 42), True, rng)
        assert (recording.key, note.key) == (used, heard)


def test_test_notes_are_no_training_notes() -> None:
    found = divide(_recordings(*range(40, 80)))
    assert [len(found[s]) for s in ("train", "val", "test")] == [28, 4, 8]
    assert len({r.path for split in found.values() for r in split}) == 40
    for split in found.values():  # each from the whole register
        assert min(r.key for r in split) < 46
        assert max(r.key for r in split) > 70
    twice = [Recording(f"{n}.wav", 50 + n % 20, f"{n % 20:064x}") for n in range(40)]  # each file in two places
    found = divide(twice)
    assert not {r.sha256 for r in found["train"]} & {r.sha256 for r in found["test"]}
    few = divide(_recordings(*range(19)))
    assert few["train"] == few["test"] == few["val"]
    copies = [replace(one, path=f"{copy}-{one.path}") for one in _recordings(40, 50, 60) for copy in range(7)]
    assert all(len(part) == 21 for part in divide(copies).values())  # three different ones: shared by all
    shared = divide(_recordings(*range(40, 80)), "none")
    assert len(shared["test"]) == 40


# folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not find_banks():
        pytest.skip("no SoundFont bank on this machine")
    bank = SoundFont(find_banks()[0])
    root = tmp_path_factory.mktemp("notes")
    record_notes(bank, preset_of(instrument("flute"), bank), root / "Flute", range(60, 84), "flute_{name}_1_forte")
    record_notes(bank, preset_of(instrument("violin"), bank), root / "viola" / "arco", (50, 55, 61, 66), "midi{key}")
    for name, key in (("kick", 36), ("snare", 38), ("hihat", 42), ("crash", 49)):
        record_notes(bank, (128, 0), root / "drum", (key,), f"{name} 1")
    (root / "Flute" / "readme.txt").write_text("who played")
    (root / "Flute" / "flute_B7_broken.wav").write_bytes(b"RIFF not a sound")
    write_audio(root / "Flute" / "flute_C4_silent.wav", np.zeros(8000, np.float32), 22050)
    write_audio(root / "Flute" / "flute_C4D4.wav", np.ones(8000, np.float32), 22050)
    return root


SMALL = {"clips_per_class": (2, 1, 1), "clip_s": 3.0, "workers": 1, "progress": False}
AS = {"viola": "violin"}


def test_folders_are_read_and_what_is_left_out_is_told(folder: Path) -> None:
    found = find_notes(folder, pictures=AS)
    assert {name: len(there) for name, there in found.recordings.items()} == {"drum": 4, "flute": 24, "viola": 4}
    assert list(found.recordings) == ["drum", "flute", "viola"]
    assert found.pictures == {"drum": "drum", "flute": "flute", "viola": "violin"}
    assert [r.key for r in found.recordings["viola"]] == [50, 55, 61, 66]
    assert sorted((lost.path, lost.reason) for lost in found.left_out) == [
        ("Flute/flute_B7_broken.wav", "unreadable"),
        ("Flute/flute_C4D4.wav", "its name states several notes"),
        ("Flute/flute_C4_silent.wav", "silent"),
    ]


def test_a_store_of_recorded_notes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, set[str]] = {}
    make = recorded.make_clip

    def listen(clip: recorded._Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if clip.class_name == "flute":
            used.setdefault(clip.split, set()).update(r.path for r in clip.recordings)
        return make(clip)

    found = find_notes(folder, pictures=AS)
    monkeypatch.setattr(recorded, "make_clip", listen)
    store = synthesise_notes(found, tmp_path / "s", **SMALL)  # type: ignore[arg-type]
    assert store.classes == ("drum", "flute", "viola")
    assert (store.sample_rate_hz, store.motion_rate_hz, len(store.clips)) == (11025, 16, 12)
    assert [len(used[split]) for split in ("train", "val", "test")] == [17, 3, 4]
    assert not used["train"] & used["test"]
    origin = store.manifest["origin"]
    assert origin["generator"] == "avsep data notes"
    assert origin["recordings"]["flute"]["notes"] == {"train": 17, "val": 3, "test": 4}
    assert [origin["recordings"][n]["shared"] for n in store.classes] == [True, False, True]
    for clip in store.clips:
        audio = store.read_audio(clip)
        assert len(audio) == 33075
        assert 0.03 < np.abs(audio).max() < 0.99
    wide = synthesise_notes(found, tmp_path / "wide", **{**SMALL, "clips_per_class": (1, 0, 0)}, sample_rate_hz=44100)  # type: ignore[arg-type]
    for clip in wide.clips:
        brought_down = resample(wide.read_audio(clip), 44100, 11025)
        assert np.corrcoef(store.read_audio(store.clip(clip.id)), brought_down)[0, 1] > 0.95
    # a killed run goes on to the same bytes; other recordings are another store
    again = tmp_path / "again"
    left = [3]

    def until(clip: recorded._Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return make(clip)

    monkeypatch.setattr(recorded, "make_clip", until)
    with pytest.raises(KeyboardInterrupt):
        synthesise_notes(found, again, **SMALL)  # type: ignore[arg-type]
    assert not (again / "manifest.json").exists()
    left[0] = 9
    synthesise_notes(found, again, **SMALL)  # type: ignore[arg-type]
    assert contents(again) == contents(store.path)
    assert len(synthesise_notes(found, again, **SMALL).clips) == 12  # type: ignore[arg-type]
    with pytest.raises(DataError, match="other settings"):
        synthesise_notes(found, again, **{**SMALL, "split_by": "none"})  # type: ignore[arg-type]


@needs_bank
def test_what_is_played_has_the_written_pitch_and_ends(folder: Path) -> None:
    found = find_notes(folder, pictures=AS).recordings["flute"]
    note, recording = choose(Note(0.5, 0.4, 86), found, False, np.random.default_rng(0))
    assert (note.key, recording.key) == (86, 83)
    sound = recorded._play(instrument("flute"), [(note, recording)], folder, 22050, 22050)
    assert not sound[:11000].any()
    assert not sound[round(0.97 * 22050) :].any()
    part = sound[13000:18000] * np.hanning(5000)
    peak_hz = np.argmax(np.abs(np.fft.rfft(part, 1 << 16))) * 22050 / (1 << 16)
    assert abs(12 * np.log2(peak_hz / 440) + 69 - 86) < 0.4


def _copy(folder: Path, tmp_path: Path, *classes: str) -> Path:
    for name in classes:
        shutil.copytree(folder / name, tmp_path / "notes" / name)
    return tmp_path / "notes"


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder: .*nowhere"):
        find_notes(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no folders"):
        find_notes(tmp_path / "empty")
    with pytest.raises(UnknownNameError, match=r"nobody can draw 'viola'.*violin.*--as viola=CLASS"):
        find_notes(folder)
    with pytest.raises(UnknownNameError, match=r"--as viola=fiddle: no class 'fiddle'"):
        find_notes(folder, pictures={"viola": "fiddle"})
    with pytest.raises(UnknownNameError, match=r"--as vola=violin: no folder 'vola'.*viola"):
        find_notes(folder, pictures={"vola": "violin"})
    few = _copy(folder, tmp_path, "drum")
    (few / "drum" / "kick 1.wav").unlink()
    with pytest.raises(DataError, match=r"has 3 usable notes of 3, and a class needs 4"):
        find_notes(few)
    (few / "flute").mkdir()
    for file in (few / "drum").iterdir():
        shutil.copy(file, few / "drum" / f"{file.stem}b.wav")
    with pytest.raises(DataError, match=r"flute holds no recordings \(\.wav"):
        find_notes(few)
    found = find_notes(_copy(folder, tmp_path / "a", "drum"))
    with pytest.raises(DataError, match="lies in the folder of notes"):
        synthesise_notes(found, found.folder / "store", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="split_by = 'player'"):
        synthesise_notes(found, tmp_path / "s", **{**SMALL, "split_by": "player"})  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


@needs_bank
def test_notes_without_a_pitch_are_told_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = SoundFont(find_banks()[0])
    record_notes(bank, preset_of(instrument("flute"), bank), tmp_path / "flute", range(60, 66), "take x{key}x")
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(DataError, match=r"0 usable notes of 6.*6 left out: no pitch in its name"):
        find_notes(tmp_path)


def test_a_pitch_that_its_frames_do_not_agree_on_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(hz: list[float]) -> int | None:
        answer = np.array(hz), np.isfinite(hz), np.ones(len(hz))
        monkeypatch.setitem(sys.modules, "librosa", SimpleNamespace(pyin=lambda *_, **__: answer))
        return detect_key(np.zeros(100, np.float32), 22050)

    assert found([440, 441, np.nan, 439]) == 69
    assert found([440, 441, 880, 439]) == 69  # a frame an octave off
    assert found([440, 520, 600, 300]) is None
    assert found([440, np.nan, np.nan]) is None


@needs_bank
@needs_librosa
@pytest.mark.slow  # its compiler takes ten seconds
def test_pitch_is_detected_where_the_name_has_none(tmp_path: Path) -> None:
    bank = SoundFont(find_banks()[0])
    keys = (57, 62, 67, 72)
    record_notes(bank, preset_of(instrument("flute"), bank), tmp_path / "flute", keys, "take x{key}x")
    noise = np.random.default_rng(0).normal(0, 0.1, 22050).astype(np.float32)
    write_audio(tmp_path / "flute" / "noise.wav", noise, 22050)
    found = find_notes(tmp_path)
    assert [r.key for r in found.recordings["flute"]] == list(keys)
    assert [(lost.path, lost.reason) for lost in found.left_out] == [
        ("flute/noise.wav", "no pitch in its name or its sound")
    ]
    assert detect_key(np.zeros(22050, np.float32), 22050) is None


def test_the_command(folder: Path, tmp_path: Path) -> None:
    from avsep.cli.data_command import app

    out = tmp_path / "s"
    arguments = ("--as", "viola=violin", "--clips", "1,1,1", "--clip-s", "2", "--workers", "1")
    result = CliRunner().invoke(app, ["notes", str(folder), str(out), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = result.output.replace("\n", "")
    assert "left out 1: unreadable, such as Flute/flute_B7_broken.wav" in text
    assert "fewer than 20 notes, which all splits share: drum, viola" in text
    assert "notes used: drum 4, flute 24, viola 4" in text
    assert Store.open(out, verify=True).content_hash in text
    again = CliRunner().invoke(app, ["notes", str(folder), str(out), *arguments, "--json"], catch_exceptions=False)
    found = json.loads(again.stdout)
    assert (found["format"], found["content_hash"]) == ("avsep-data-notes", Store.open(out).content_hash)
    assert found["notes"] == {"drum": 4, "flute": 24, "viola": 4}
    assert found["shared_by_all_splits"] == ["drum", "viola"]
    assert "unreadable" in {one["reason"] for one in found["left_out"]}
    bad = CliRunner().invoke(app, ["notes", str(folder), str(out), "--as", "viola"])
    assert isinstance(bad.exception, ConfigError)
    assert "give CLASS=PICTURE" in str(bad.exception)

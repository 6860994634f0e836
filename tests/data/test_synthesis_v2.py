"""The offline benchmark's second version: movement that tells onsets, overlapping registers, a held-out bank."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from avsep.data.store import Store
from avsep.data.synth import synthesis
from avsep.data.synth.phrases import CLASSES, INSTRUMENTS, compose
from avsep.data.synth.phrases_v2 import INSTRUMENTS_V2, compose_v2
from avsep.data.synth.pictures import look_of, motion_frames, poses, poses_v2
from avsep.data.synth.soundfont import Note, SoundFont
from avsep.data.synth.synthesis import find_banks, held_out, synthesise
from avsep.errors import ConfigError, DataError
from avsep.media.audio import resample
from support.folders import contents
from support.soundfonts import LOOP, bank_of

RATE_HZ = 16
needs_bank = pytest.mark.skipif(not find_banks(), reason="no SoundFont bank on this machine")


def _notes(name: str, number: int, duration_s: float = 6.0) -> tuple[Note, ...]:
    return compose_v2(INSTRUMENTS_V2[CLASSES.index(name)], duration_s, np.random.default_rng([7, number]))


def test_version_1_composes_and_draws_as_ever() -> None:
    """Its phrases and pictures, pinned as they were before there was a second version."""
    digest, shades = hashlib.sha256(), []
    for player in INSTRUMENTS:
        rng = np.random.Generator(np.random.Philox(5))
        notes = compose(player, 4.0, rng)
        moments = poses(player, notes, [0.25 * i for i in range(16)])
        told: list[list[float]] = [[n.onset_s, n.duration_s, n.key, n.velocity] for n in notes]
        told += [[p.pitch, p.strike, p.stroke, *p.fingers, p.breath, *p.hits] for p in moments]
        digest.update(repr([[round(float(x), 6) for x in row] for row in told]).encode())
        shades.append(motion_frames(player, look_of(player, rng), notes, 1.0).mean())
    assert digest.hexdigest() == "9c3b51c2a0ea0c6dac0aa81ceb4dbcd51154bddc6a8c5df05cee628dd35789f3"
    expected = (
        *(128.7, 77.2, 74.6, 72.7, 127.9, 80.1, 115.1, 83.7, 94.2, 76.8),
        *(75.7, 141.1, 85.1, 67.7, 74.1, 75.1, 114.5, 134.7, 85.9, 134.5),
    )
    assert shades == pytest.approx(expected, abs=0.2)  # another Pillow may draw an edge otherwise


# the sampler's fast way


@pytest.mark.parametrize(
    "zone",
    [
        {},
        LOOP,
        {54: 3, 38: -1200},
        {**LOOP, 8: 6900, 9: 60},
        {**LOOP, 34: -2400, 36: 0, 37: 200, 38: -1200},
        {**LOOP, 57: 1, 38: 2400},
        {**LOOP, 48: 100, 51: 5},
    ],
    ids=["once", "loop", "until-release", "filter", "envelope", "exclusive", "tuned"],
)
def test_the_fast_way_plays_what_the_exact_one_plays(tmp_path: Path, zone: dict[int, int]) -> None:
    bank = bank_of(tmp_path, zone)
    notes = [Note(0.0, 0.4, 69, 127), Note(0.2, 0.2, 73, 90), Note(0.5, 0.4, 57, 110)]
    exact = bank.render(notes, bank=0, program=5, samples=44100)[::2]
    fast = bank.render_low(notes, bank=0, program=5, samples=22050)
    assert fast.shape == (22050,)
    assert np.abs(exact).max() > 0.05
    assert np.mean((fast - exact) ** 2) < 1e-3 * np.mean(exact**2)


def test_the_fast_way_folds_no_treble_back(tmp_path: Path) -> None:
    """A sine of 7,056 Hz, four octaves up: at 22,050 Hz its third harmonic would fold; the sine itself stays."""
    bank = bank_of(tmp_path, LOOP)
    above = bank.render_low([Note(0, 1, 69 + 60, 127)], bank=0, program=5, samples=22050)  # 14,112 Hz
    assert np.abs(above[2000:-2000]).max() < 1e-3
    below = bank.render_low([Note(0, 1, 69 + 36, 127)], bank=0, program=5, samples=22050)  # 3,528 Hz
    assert np.abs(below[2000:-2000]).max() > 0.4


# phrases


def test_registers_have_a_wide_common_part() -> None:
    pitched = [i for i in INSTRUMENTS_V2 if i.play != "drums"]
    assert [i.name for i in INSTRUMENTS_V2] == list(CLASSES)
    assert min(i.high for i in pitched) - max(i.low for i in pitched) >= 17
    assert max(i.low for i in pitched) - min(i.low for i in pitched) <= 12
    assert max(i.high for i in pitched) - min(i.high for i in pitched) <= 12


@pytest.mark.parametrize("name", CLASSES)
def test_phrases_pause_and_stay_in_the_register(name: str) -> None:
    player = INSTRUMENTS_V2[CLASSES.index(name)]
    pausing, gaps = 0, []
    for number in range(12):
        notes = _notes(name, number, 8.0)
        onsets = np.unique([n.onset_s for n in notes])
        assert 3 <= len(onsets) <= 100
        assert onsets[-1] < 8.0
        if player.play != "drums":
            assert all(player.low <= n.key <= player.high for n in notes)
        ends = np.maximum.accumulate([n.onset_s + n.duration_s for n in notes])
        pausing += bool((np.array([n.onset_s for n in notes[1:]]) - ends[:-1] > 0.5).any())
        gaps.append(np.median(np.diff(onsets[np.concatenate(([True], np.diff(onsets) > 0.05))])))
    assert pausing >= 8
    assert max(gaps) > 1.7 * min(gaps)  # players of one class move at their own pace


# movement


@pytest.mark.parametrize("name", CLASSES)
def test_movement_tells_whose_onsets_are_heard(name: str) -> None:
    """A clip's change of pictures goes with its own onsets, not with those of another clip of the class."""
    player = INSTRUMENTS_V2[CLASSES.index(name)]
    onsets, changes = [], []
    for number in range(4):
        notes = _notes(name, number)
        look = look_of(player, np.random.default_rng(number))
        frames = motion_frames(player, look, notes, 6.0, RATE_HZ, version=2).astype(float)
        assert frames.shape == (96, 1, 48, 48)
        change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
        begins = np.zeros(len(change) + 1)
        for note in notes:  # the first picture whose moment is not before the onset
            begins[min(int(np.ceil(note.onset_s * RATE_HZ - 0.5)), len(change))] = 1
        onsets.append(begins[1:] - begins[1:].mean())
        changes.append(np.sqrt(change) - np.sqrt(change).mean())
    table = np.corrcoef(onsets, changes)[:4, 4:]  # [heard, seen]
    own = np.diag(table)
    assert own.min() > 0.4
    assert (own[:, None] > table + 0.2)[~np.eye(4, dtype=bool)].all()


@pytest.mark.parametrize("name", CLASSES)
def test_a_player_at_rest_only_sways(name: str) -> None:
    player = INSTRUMENTS_V2[CLASSES.index(name)]
    notes = [Note(1.0, 0.3, 38 if name == "drum" else 60, 100)]
    look = replace(look_of(player, np.random.default_rng(1)), sway=(0.0, 0.1, 0.0))
    frames = motion_frames(player, look, notes, 3.5, RATE_HZ, version=2).astype(float)
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert not change[:15].any()  # pictures 0 to 15 show what is before 1 s
    assert change[15] == change.max() > 1  # the first of them after the onset shows all of it
    assert change[40:].max() < 0.02 * change[15]


def test_strokes_are_there_in_full_at_the_first_picture() -> None:
    player = INSTRUMENTS_V2[CLASSES.index("xylophone")]
    found = poses_v2(player, [Note(1.0, 0.5, 70, 127)], [0.95, 1.06, 1.12, 1.24], 1 / RATE_HZ)
    assert [p.strike for p in found] == pytest.approx([0, 1, *np.exp([-0.0575 / 0.12, -0.1775 / 0.12])])
    bow = poses_v2(INSTRUMENTS_V2[CLASSES.index("violin")], [Note(0, 1, 60), Note(1, 1, 62)], [0.5, 0.99, 1.5, 2], 0.1)
    assert bow[0].stroke > 0.9  # fast at first
    assert bow[1].stroke == pytest.approx(1, abs=0.01)
    assert bow[2].stroke < 0.1
    assert bow[3].stroke == pytest.approx(0, abs=0.01)


# banks


def test_which_bank_is_held_out(tmp_path: Path) -> None:
    small, second, general = Path("a.sf2"), Path("b.sf2"), Path("GeneralUser_GS_v1.471.sf2")
    assert held_out([]) is held_out([general]) is None
    assert held_out([small, second]) == second
    assert held_out([small, second, general]) == general
    files = []
    for number in range(3):
        files.append(tmp_path / f"bank{number}.sf2")
        files[-1].write_bytes(b"x" * (number // 2))  # the first two are the same bank in two places
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert synthesis._choose_banks_v2(files, None) == ((str(files[0]),), (str(files[2]),))
        assert synthesis._choose_banks_v2(files, files[1]) == ((str(files[2]),), (str(files[1]),))
    with pytest.warns(UserWarning, match=r"bank0\.sf2 is the only SoundFont bank: it plays the test split"):
        assert synthesis._choose_banks_v2(files[:2], None) == ((str(files[0]),), (str(files[0]),))
    with pytest.raises(DataError, match="no other bank"):
        synthesis._choose_banks_v2(files[:2], files[0])


SMALL = {"version": 2, "classes": ["drum", "flute"], "clips_per_class": (2, 1, 1), "clip_s": 2.0, "progress": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not find_banks():
        pytest.skip("no SoundFont bank on this machine")
    folder = tmp_path_factory.mktemp("v2")
    held = folder / "held.sf2"
    held.write_bytes(find_banks()[0].read_bytes() + b"\0\0")  # the same sound under another name and hash
    return synthesise(folder / "store", banks=[find_banks()[0]], holdout_bank=held, workers=1, **SMALL).path  # type: ignore[arg-type]


def test_a_store_says_its_version_rate_and_banks(made: Path) -> None:
    store = Store.open(made, verify=True)
    origin = store.manifest["origin"]
    assert (origin["generator_version"], store.motion_rate_hz) == (2, RATE_HZ)
    assert [b["name"] for b in origin["banks"]] == [find_banks()[0].name]
    assert [b["name"] for b in origin["test_banks"]] == ["held.sf2"]
    for clip in store.clips:
        timeline = store.timeline(clip)
        assert (len(timeline.object), len(timeline.motion)) == (2, 32)  # type: ignore[arg-type]
        assert 0.02 < np.abs(store.read_audio(clip)).max() < 0.99


@needs_bank
def test_loudness_is_that_of_what_sounds(made: Path) -> None:
    store = Store.open(made)
    levels = [20 * np.log10(synthesis.active_rms(store.read_audio(clip), store.sample_rate_hz)) for clip in store.clips]
    assert max(levels) < -19.5
    assert min(levels) > -27  # a drum's peaks may hold it back a little


def test_versions_do_not_continue_each_other(made: Path, tmp_path: Path) -> None:
    bank = find_banks()[0]
    settings = {**SMALL, "banks": [bank], "holdout_bank": made.parent / "held.sf2", "workers": 1}
    again = synthesise(tmp_path / "again", **{**settings, "workers": 2})  # type: ignore[arg-type]
    assert contents(again.path) == contents(made)
    with pytest.raises(DataError, match="other settings"):
        synthesise(made, **{**settings, "version": 1})  # type: ignore[arg-type]
    other = synthesise(tmp_path / "8", **{**settings, "classes": ["flute"], "motion_rate_hz": 8})  # type: ignore[arg-type]
    assert other.motion_rate_hz == 8
    with pytest.raises(ConfigError, match="version = 3"):
        synthesise(tmp_path / "x", **{**settings, "version": 3})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="motion_rate_hz = 0"):
        synthesise(tmp_path / "x", **{**settings, "motion_rate_hz": 0})  # type: ignore[arg-type]


@needs_bank
@pytest.mark.parametrize("version", [1, 2])
def test_another_rate_gives_the_same_clips_with_a_wider_band(tmp_path: Path, version: int) -> None:
    settings = {**SMALL, "version": version, "banks": [find_banks()[0]], "clips_per_class": (1, 0, 0), "workers": 1}
    if version == 2:
        settings["holdout_bank"] = find_banks()[0]
        settings["banks"] = [shutil.copy(find_banks()[0], tmp_path / "other.sf2")]
        with (tmp_path / "other.sf2").open("ab") as file:
            file.write(b"\0\0")
    low, high = (
        synthesise(tmp_path / str(rate), **settings, sample_rate_hz=rate)  # type: ignore[arg-type]
        for rate in (11025, 44100)
    )
    assert (low.sample_rate_hz, high.sample_rate_hz) == (11025, 44100)
    for one, other in zip(low.clips, high.clips, strict=True):
        assert other.samples == 4 * one.samples
        narrow, wide = low.read_audio(one), high.read_audio(other)
        brought_down = resample(wide, 44100, 11025)
        assert np.corrcoef(narrow, brought_down)[0, 1] > 0.99
        power = np.abs(np.fft.rfft(wide)) ** 2
        above = power[np.fft.rfftfreq(len(wide), 1 / 44100) > 6000].sum() / power.sum()
        assert above > (1e-3 if one.class_name == "drum" else 1e-6)
        for kind in ("object", "motion"):
            np.testing.assert_array_equal(getattr(low.timeline(one), kind), getattr(high.timeline(other), kind))
    with pytest.raises(DataError, match="other settings"):
        synthesise(tmp_path / "11025", **settings, sample_rate_hz=22050)  # type: ignore[arg-type]


@needs_bank
def test_the_command_makes_version_2_and_says_which_bank_is_held_out(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avsep.cli.data_command import app

    banks = [find_banks()[0], made.parent / "held.sf2"]
    monkeypatch.setattr(synthesis, "find_banks", lambda: banks)
    arguments = ("--version", "2", "--classes", "drum,flute", "--clips", "2,1,1", "--clip-s", "2", "--workers", "1")
    result = CliRunner().invoke(app, ["synth", str(tmp_path / "s"), *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert Store.open(tmp_path / "s").content_hash == Store.open(made).content_hash
    lines = CliRunner().invoke(app, ["banks"], catch_exceptions=False).output
    assert lines.count("plays the test split of version 2") == 1
    assert "plays the test split of version 2" in lines.splitlines()[1]


@needs_bank
def test_the_command_warns_in_one_line_of_a_bank_that_plays_all(tmp_path: Path) -> None:
    from avsep.cli.data_command import app

    arguments = ("--version", "2", "--bank", str(find_banks()[0]), "--classes", "flute", "--clips", "1,0,0")
    result = CliRunner().invoke(
        app, ["synth", str(tmp_path / "s"), *arguments, "--clip-s", "0.5", "--workers", "1"], catch_exceptions=False
    )
    assert result.exit_code == 0
    told = [line for line in result.output.splitlines() if "only SoundFont bank" in line]
    assert len(told) == 1
    assert told[0].startswith("avsep: ")


@needs_bank
def test_every_bank_found_plays_the_registers() -> None:
    for path in find_banks()[:2]:
        bank = SoundFont(path)
        for player in INSTRUMENTS_V2:
            preset = synthesis.preset_of(player, bank)
            for key in (player.low, player.high) if player.play != "drums" else (36, 38, 42):
                sound = bank.render_low([Note(0, 0.2, key)], bank=preset[0], program=preset[1], samples=4000)
                assert np.abs(sound).max() > 1e-4, (path, player.name, key)

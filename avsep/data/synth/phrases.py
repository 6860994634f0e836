"""The 20 instrument classes of the offline benchmark and seeded, procedural phrases for them.

The classes are those of MUSIC-21 without congas, in the order in which ContAV-Sep learns them (Pian et al., NeurIPS
2024, published code). What plays them are General MIDI stand-ins: the erhu is a fiddle, the guzheng a koto, the pipa a
shamisen, and the ukulele a nylon guitar where a bank has no ukulele. Registers and rhythms overlap between classes, so
that neither gives the class away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avsep.data.synth.soundfont import Note
from avsep.errors import UnknownNameError, near_matches

__all__ = ["CELLS", "CLASSES", "INSTRUMENTS", "MODES", "PENTATONIC", "Instrument", "compose", "drum_bars", "instrument"]


@dataclass(frozen=True)
class Instrument:
    """How a class sounds and is played.

    ``presets``: (bank, program) pairs, the first that a bank has is used (programs count from 0, drum kits are bank
    128). ``low`` and ``high``: MIDI keys. ``play``: bowed, bellows, wind, plucked, struck or drums. ``chords``: share
    of the phrases that are accompanied or chordal. ``pentatonic``: plays in pentatonic modes.
    """

    name: str
    presets: tuple[tuple[int, int], ...]
    low: int
    high: int
    play: str
    chords: float = 0.0
    pentatonic: bool = False


INSTRUMENTS: tuple[Instrument, ...] = (
    # task 0
    Instrument("accordion", ((0, 21),), 53, 84, "bellows", chords=0.6),
    Instrument("bagpipe", ((0, 109),), 60, 81, "wind"),
    Instrument("bassoon", ((0, 70),), 36, 67, "wind"),
    Instrument("clarinet", ((0, 71),), 50, 84, "wind"),
    Instrument("drum", ((128, 0),), 35, 57, "drums"),
    # task 1
    Instrument("flute", ((0, 73),), 60, 91, "wind"),
    Instrument("piano", ((0, 0),), 36, 88, "struck", chords=0.7),
    Instrument("saxophone", ((0, 66), (0, 65)), 46, 77, "wind"),
    Instrument("tuba", ((0, 58),), 30, 58, "wind"),
    Instrument("violin", ((0, 40),), 55, 91, "bowed"),
    # task 2
    Instrument("xylophone", ((0, 13),), 60, 93, "struck"),
    Instrument("acoustic_guitar", ((0, 25), (0, 24)), 45, 79, "plucked", chords=0.6),
    Instrument("banjo", ((0, 105),), 50, 81, "plucked"),
    Instrument("cello", ((0, 42),), 36, 72, "bowed"),
    Instrument("electric_bass", ((0, 33), (0, 34)), 30, 55, "plucked"),
    # task 3
    Instrument("erhu", ((0, 110),), 57, 86, "bowed", pentatonic=True),
    Instrument("guzheng", ((0, 107),), 45, 86, "plucked", chords=0.3, pentatonic=True),
    Instrument("pipa", ((0, 106),), 48, 84, "plucked", pentatonic=True),
    Instrument("trumpet", ((0, 56),), 54, 82, "wind"),
    Instrument("ukulele", ((8, 24), (0, 24)), 57, 81, "plucked", chords=0.6),
)
CLASSES: tuple[str, ...] = tuple(i.name for i in INSTRUMENTS)

MODES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 9, 10), (0, 2, 4, 5, 7, 9, 10))
PENTATONIC = ((0, 2, 4, 7, 9), (0, 3, 5, 7, 10), (0, 2, 5, 7, 9))
# one cell fills a beat or two; lengths in beats
CELLS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (0.5, 0.5),
    (0.5, 0.5),
    (1.5, 0.5),
    (2.0,),
    (0.25, 0.25, 0.5),
    (0.5, 0.25, 0.25),
    (0.25, 0.25, 0.25, 0.25),
    (1 / 3, 1 / 3, 1 / 3),
    (0.75, 0.25),
)
# share of the written length that a note is held: (shortest, longest)
_HELD = {"bowed": (0.85, 1.02), "bellows": (0.75, 1.0), "wind": (0.7, 1.0), "plucked": (0.9, 1.5), "struck": (0.7, 1.2)}
_KICK, _SNARE, _SIDE_STICK, _CLOSED_HAT, _OPEN_HAT, _CRASH, _RIDE = 36, 38, 37, 42, 46, 49, 51
_TOMS = (50, 48, 47, 45, 43, 41)


def instrument(name: str) -> Instrument:
    """The instrument of a class. Raises :class:`UnknownNameError` with near matches."""
    if name not in CLASSES:
        raise UnknownNameError(f"no instrument class '{name}': {near_matches(name, CLASSES)}")
    return INSTRUMENTS[CLASSES.index(name)]


def compose(player: Instrument, duration_s: float, rng: np.random.Generator) -> tuple[Note, ...]:
    """A phrase of ``duration_s`` seconds for an instrument, in order of onset. All chance comes from ``rng``."""
    beat_s = 60 / rng.uniform(72, 144)
    notes = drum_bars(duration_s, beat_s, rng) if player.play == "drums" else _melody(player, duration_s, beat_s, rng)
    notes = [n for n in notes if n.onset_s < duration_s]
    return tuple(sorted(notes, key=lambda n: (n.onset_s, n.key)))


def _melody(player: Instrument, duration_s: float, beat_s: float, rng: np.random.Generator) -> list[Note]:
    tonic = int(rng.integers(12))
    modes = PENTATONIC if player.pentatonic else MODES
    mode = modes[int(rng.integers(len(modes)))]
    # the phrase lives in a window of the register, about an octave and a half wide, somewhere in it
    width = min(player.high - player.low, int(rng.integers(12, 21)))
    bottom = int(rng.integers(player.low, player.high - width + 1))
    steps = [k for k in range(bottom, bottom + width + 1) if (k - tonic) % 12 in mode]
    place = int(rng.integers(len(steps) // 4, len(steps) - len(steps) // 4))

    weights = rng.dirichlet(np.full(len(CELLS), 0.7)) + 0.02
    weights /= weights.sum()
    rest = float(rng.uniform(0.0, 0.1))
    loud = float(rng.uniform(72, 104))
    held = _HELD[player.play]
    chordal = player.chords > 0 and rng.random() < player.chords
    tremolo = player.play == "plucked" and player.pentatonic and rng.random() < 0.4

    notes: list[Note] = []
    time_s = float(rng.uniform(0.02, 0.15))
    beat = 0.0
    while time_s < duration_s - 0.08:
        for length in CELLS[int(rng.choice(len(CELLS), p=weights))]:
            if time_s >= duration_s - 0.08:
                break
            span_s = length * beat_s
            strong = abs(beat - round(beat)) < 1e-6
            swell = 14 * np.sin(2 * np.pi * time_s / (8 * beat_s))  # a phrase every eight beats
            velocity = int(np.clip(loud + swell + (6 if strong else -4) + rng.normal(0, 4), 45, 122))
            if notes and length <= 1 and rng.random() < rest:
                time_s, beat = time_s + span_s, beat + length
                continue
            leap = rng.random() < 0.12
            move = int(rng.integers(-4, 5)) if leap else int(rng.choice((-2, -1, -1, 0, 1, 1, 2)))
            place += move
            if not 0 <= place < len(steps):
                place -= 2 * move
            place = int(np.clip(place, 0, len(steps) - 1))
            keys = [steps[place]]
            if chordal and strong and rng.random() < 0.7:
                below = [steps[j] for j in (place - 2, place - 4, place - 7) if j >= 0]
                keys += below[: int(rng.integers(1, 4))]
            held_s = span_s * float(rng.uniform(*held))
            if tremolo and span_s > 0.35:
                count = max(3, int(span_s / 0.09))
                for i in range(count):
                    at = time_s + i * span_s / count
                    notes.append(Note(at, span_s / count, keys[0], int(np.clip(velocity - 10 + i, 40, 122))))
            else:
                strum_s = 0.012 if player.play == "plucked" else 0.0
                for i, key in enumerate(sorted(keys)):
                    notes.append(Note(time_s + i * strum_s, held_s, key, velocity - (8 if len(keys) > 1 else 0)))
            time_s, beat = time_s + span_s, beat + length
    return notes


def drum_bars(duration_s: float, beat_s: float, rng: np.random.Generator) -> list[Note]:
    """A drum kit: a bar's pattern that repeats with small changes, and fills."""
    cells = 16  # sixteenths of a bar of four beats
    step_s = beat_s / 4
    kick = np.zeros(cells, bool)
    kick[[0, 8]] = True
    kick |= rng.random(cells) < 0.12
    snare = np.zeros(cells, bool)
    snare[[4, 12]] = True
    snare |= rng.random(cells) < 0.06
    every = int(rng.choice((1, 2, 2, 4)))  # sixteenths between two strokes on the hat or ride
    top = int(rng.choice((_CLOSED_HAT, _CLOSED_HAT, _RIDE)))
    back = int(rng.choice((_SNARE, _SNARE, _SNARE, _SIDE_STICK)))
    loud = float(rng.uniform(80, 108))
    fills = float(rng.uniform(0.1, 0.5))

    def hit(time_s: float, key: int, change: float) -> Note:
        return Note(time_s, 0.12, key, int(np.clip(loud + change + rng.normal(0, 5), 40, 125)))

    notes: list[Note] = []
    cell, filling = 0, False
    time_s = float(rng.uniform(0.02, 0.15))
    while time_s < duration_s - 0.05:
        at = cell % cells
        if at == 0 and (cell == 0 or filling):
            notes.append(hit(time_s, _CRASH, 0))
        if at == 12:
            filling = bool(rng.random() < fills)
        elif at == 0:
            filling = False
        if filling and at >= 12:
            notes.append(hit(time_s, _TOMS[int(rng.integers(len(_TOMS)))], 4))
        else:
            if kick[at] ^ (rng.random() < 0.04):
                notes.append(hit(time_s, _KICK, 6))
            if snare[at] ^ (rng.random() < 0.03):
                notes.append(hit(time_s, back, 2))
            if at % every == 0:
                open_hat = top == _CLOSED_HAT and rng.random() < 0.06
                notes.append(hit(time_s, _OPEN_HAT if open_hat else top, -16 if at % 4 else -8))
        cell, time_s = cell + 1, time_s + step_s
    return notes

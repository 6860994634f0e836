"""Phrases of the offline benchmark's second version, in which what a player does must be seen to be told.

The classes are those of version 1. Their registers are drawn together around C3 to C6, so that pitch does not give a
class away; tempo, articulation and note lengths differ from clip to clip, so that two players of one class are told
apart by when they move; and most clips hold pauses of about a second.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from avsep.data.synth.phrases import CELLS, INSTRUMENTS, MODES, PENTATONIC, Instrument, drum_bars
from avsep.data.synth.soundfont import Note

__all__ = ["INSTRUMENTS_V2", "compose_v2"]

# three registers that overlap by an octave and a half; no General MIDI bank at hand plays a tuba above key 72
_LOW, _MIDDLE, _HIGH = (43, 72), (48, 79), (55, 84)
_REGISTERS = {
    **dict.fromkeys(("bassoon", "tuba", "cello", "electric_bass"), _LOW),
    **dict.fromkeys(("flute", "violin", "xylophone", "erhu", "bagpipe", "banjo"), _HIGH),
}
INSTRUMENTS_V2: tuple[Instrument, ...] = tuple(
    i
    if i.play == "drums"
    else replace(i, low=_REGISTERS.get(i.name, _MIDDLE)[0], high=_REGISTERS.get(i.name, _MIDDLE)[1])
    for i in INSTRUMENTS
)

_SHORTEST_S = 0.14  # from onset to onset: what a player's movement can show, and an eye follow
_PLAYS_S = (1.6, 4.5)  # between two pauses
_PAUSE_S = (0.7, 1.6)


def compose_v2(player: Instrument, duration_s: float, rng: np.random.Generator) -> tuple[Note, ...]:
    """A phrase of ``duration_s`` seconds for an instrument, in order of onset. All chance comes from ``rng``."""
    beat_s = 60 / float(np.exp(rng.uniform(np.log(56), np.log(152))))
    spans = _spans(duration_s, rng)
    if player.play == "drums":
        notes = [n for n in drum_bars(duration_s, beat_s, rng) if _plays(spans, n.onset_s)]
    else:
        notes = _melody(player, spans, beat_s, rng)
    notes = [n for n in notes if n.onset_s < duration_s]
    return tuple(sorted(notes, key=lambda n: (n.onset_s, n.key)))


def _spans(duration_s: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """When the player plays: spans of a few seconds with pauses between them, and now and then a late beginning."""
    at = float(rng.uniform(0.02, 0.35) if rng.random() < 0.7 else rng.uniform(0.5, 1.3))
    at = min(at, 0.2 * duration_s)
    spans = []
    while at < duration_s - 0.1:
        end = at + float(rng.uniform(*_PLAYS_S))
        spans.append((at, min(end, duration_s)))
        at = end + float(rng.uniform(*_PAUSE_S))
    return spans


def _plays(spans: list[tuple[float, float]], time_s: float) -> bool:
    return any(low <= time_s < high for low, high in spans)


def _melody(
    player: Instrument, spans: list[tuple[float, float]], beat_s: float, rng: np.random.Generator
) -> list[Note]:
    tonic = int(rng.integers(12))
    modes = PENTATONIC if player.pentatonic else MODES
    mode = modes[int(rng.integers(len(modes)))]
    width = min(player.high - player.low, int(rng.integers(12, 21)))
    bottom = int(rng.integers(player.low, player.high - width + 1))
    steps = [k for k in range(bottom, bottom + width + 1) if (k - tonic) % 12 in mode]
    place = int(rng.integers(len(steps) // 4, len(steps) - len(steps) // 4))

    weights = rng.dirichlet(np.full(len(CELLS), 0.35)) + 0.01
    weights /= weights.sum()
    rest = float(rng.uniform(0.0, 0.15))
    loud = float(rng.uniform(78, 104))
    short = float(rng.uniform(0.45, 0.95))  # the clip's articulation, from detached to legato
    rings = player.play in ("plucked", "struck")
    chordal = player.chords > 0 and rng.random() < player.chords

    notes: list[Note] = []
    for begin_s, end_s in spans:
        time_s, beat = begin_s, 0.0
        while time_s < end_s - 0.05:
            for length in CELLS[int(rng.choice(len(CELLS), p=weights))]:
                if time_s >= end_s - 0.05:
                    break
                span_s = max(length * beat_s, _SHORTEST_S) * float(rng.uniform(0.94, 1.06))
                strong = abs(beat - round(beat)) < 1e-6
                swell = 8 * np.sin(2 * np.pi * time_s / (8 * beat_s))
                velocity = int(np.clip(loud + swell + (5 if strong else -3) + rng.normal(0, 3), 60, 120))
                silent = bool(notes) and length <= 1 and rng.random() < rest
                leap = rng.random() < 0.15
                move = int(rng.integers(-4, 5)) if leap else int(rng.choice((-2, -1, -1, 1, 1, 2)))
                place += move
                if not 0 <= place < len(steps):
                    place -= 2 * move
                place = int(np.clip(place, 0, len(steps) - 1))
                keys = [steps[place]]
                if chordal and strong and rng.random() < 0.7:
                    below = [steps[j] for j in (place - 2, place - 4, place - 7) if j >= 0]
                    keys += below[: int(rng.integers(1, 4))]
                held_s = span_s * min(1.0, short * float(rng.uniform(0.9, 1.1)))
                if rings:  # a string or a bar sounds on, but is damped where the player pauses
                    held_s = min(1.4 * span_s, max(end_s - time_s, 0.1))
                if not silent:
                    strum_s = 0.012 if player.play == "plucked" else 0.0
                    for i, key in enumerate(sorted(keys)):
                        notes.append(Note(time_s + i * strum_s, held_s, key, velocity - (6 if len(keys) > 1 else 0)))
                time_s, beat = time_s + span_s, beat + length
    return notes

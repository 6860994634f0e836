"""Animated pictures of the offline benchmark: drawn players whose movement follows the notes they play.

One recipe a class, in colours, pose, scale and background that differ from clip to clip. Bows and bellows go with the
note's phase, struck and plucked instruments jump at each onset and settle with exp(-dt / 0.12 s), winds show fingers
or valves, and the hand's place shows the pitch. Object pictures and motion pictures are the same scene in two sizes.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from avsep.data.synth.phrases import Instrument
from avsep.data.synth.soundfont import Note
from avsep.errors import MissingExtraError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

__all__ = [
    "MOTION_SIZE",
    "OBJECT_SIZE",
    "Look",
    "Pose",
    "draw",
    "look_of",
    "motion_frames",
    "object_frames",
    "poses",
    "poses_v2",
]

OBJECT_SIZE = 112  # pixels, RGB
MOTION_SIZE = 48  # pixels, gray
_DECAY_S = 0.12
_SUPERSAMPLING = 2
_TILT = 0.16  # radians from the lowest to the highest note
_LEAN_ANGLE, _LEAN_DOWN = 0.09, 0.045  # radians, and a share of the picture's height
_Colour = tuple[int, int, int]
_Point = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """What stays the same through a clip: colours, the camera's view and the backdrop.

    ``tones``: body, dark, light and accent colours; ``sway``: how far and how fast the picture drifts, which says
    nothing about the sound.
    """

    tones: tuple[_Colour, _Colour, _Colour, _Colour]
    skin: _Colour
    clothes: _Colour
    backdrop: tuple[_Colour, _Colour]
    blobs: tuple[tuple[float, float, float, float, _Colour], ...]
    angle: float
    scale: float
    shift: _Point
    mirrored: bool
    sway: tuple[float, float, float]


@dataclass(frozen=True)
class Pose:
    """The player at one moment; all numbers lie in [0, 1] where no other range is given.

    ``pitch``: the current note's place in the register; ``strike``: what is left of the last stroke; ``stroke``: where
    the bow or bellows are; ``fingers``: six booleans, the last three of which serve as valves; ``breath``: 1 while a
    note sounds; ``hits``: what is left of the last stroke on each piece of the drum kit (kick, snare, hat, toms,
    crash); ``nod`` and ``tilt``: in version 2, how far the player leans with the last onset, in
    [-1, 1], and how far a wind instrument is turned by the pitch, in radians.
    """

    time_s: float
    pitch: float = 0.5
    strike: float = 0.0
    stroke: float = 0.5
    fingers: tuple[bool, ...] = (False,) * 6
    breath: float = 0.0
    hits: tuple[float, ...] = (0.0,) * 5
    nod: float = 0.0
    tilt: float = 0.0


# movement

_PIECES = ({35, 36}, {37, 38, 40}, {42, 44, 46}, {41, 43, 45, 47, 48, 50}, {49, 51, 53, 57})
# valves pressed for 0 to 6 semitones below an open note, as on trumpet and tuba
_VALVES = ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))


def _events(notes: Sequence[Note]) -> list[list[Note]]:
    """The notes by strokes: chords and strums count as one."""
    events: list[list[Note]] = []
    for note in notes:
        if events and note.onset_s - events[-1][0].onset_s < 0.05:
            events[-1].append(note)
        else:
            events.append([note])
    return events


def poses(player: Instrument, notes: Sequence[Note], times_s: Sequence[float]) -> list[Pose]:
    """The player's pose at each moment of ``times_s`` while playing ``notes`` (in order of onset)."""
    events = _events(notes)
    onsets = np.array([e[0].onset_s for e in events])
    found = []
    for t in times_s:
        current = int(np.searchsorted(onsets, t, side="right")) - 1
        if current < 0:
            found.append(Pose(t))
        elif player.play == "drums":
            found.append(Pose(t, hits=tuple(_last_hit(notes, piece, t) for piece in _PIECES)))
        else:
            found.append(_pose(player, events[current], current, t))
    return found


def _pose(player: Instrument, event: Sequence[Note], number: int, t: float) -> Pose:
    top = max(event, key=lambda n: n.key)
    since = t - event[0].onset_s
    progress = min(since / max(top.duration_s, 1e-3), 1.0)
    pitch = (top.key - player.low) / max(player.high - player.low, 1)
    closed = 6 - (top.key % 12) * 7 // 12  # holes closed from the top, the more the lower the note in its octave
    valves = _VALVES[(-top.key - 2) % 7]  # B flat is open
    brass = player.name in ("trumpet", "tuba")
    sounding = progress < 1.0
    return Pose(
        t,
        pitch=min(max(pitch, 0.0), 1.0),
        strike=math.exp(-since / _DECAY_S) * (0.5 + 0.5 * top.velocity / 127),
        stroke=progress if number % 2 == 0 else 1 - progress,
        fingers=(False,) * 3 + tuple(bool(v) for v in valves)
        if brass
        else tuple(sounding and i < closed for i in range(6)),
        breath=float(sounding),
    )


# how far a player leans with each onset: those whose hands hardly move for one lean most
_LEAN = {"wind": 1.0, "bowed": 0.6, "bellows": 0.7, "plucked": 0.5, "struck": 0.5, "drums": 0.35}


def poses_v2(player: Instrument, notes: Sequence[Note], times_s: Sequence[float], frame_s: float) -> list[Pose]:
    """As :func:`poses`, with movement that tells each onset apart from what comes before and after it.

    At the first of the ``times_s``, which are ``frame_s`` seconds apart, after an onset a stroke is there in full; bows
    and bellows turn at each note and go fastest at its beginning; and every player leans to one side and the other, an
    onset each.
    """
    events = _events(notes)
    onsets = np.array([e[0].onset_s for e in events])
    pieces = [np.array([n.onset_s for n in notes if n.key in piece]) for piece in _PIECES]
    lean = _LEAN[player.play]
    found = []
    for t in times_s:
        current = int(np.searchsorted(onsets, t, side="right")) - 1
        if current < 0:
            found.append(Pose(t))
            continue
        left = _settled(t - float(onsets[current]), frame_s)
        nod = lean * left * (1 if current % 2 else -1)
        if player.play == "drums":
            last = [p[: int(np.searchsorted(p, t, side="right"))] for p in pieces]
            hits = tuple(_settled(t - float(p[-1]), frame_s) if len(p) else 0.0 for p in last)
            found.append(Pose(t, hits=hits, nod=nod))
            continue
        top = max(events[current], key=lambda n: n.key)
        since = t - float(onsets[current])
        # a bow that is fast at first and has crossed the string when the note ends
        settling = min(0.16, 0.5 * top.duration_s)
        way = -math.expm1(-min(since, top.duration_s) / settling) / -math.expm1(-top.duration_s / settling)
        pose = _pose(player, events[current], current, t)
        found.append(
            replace(
                pose,
                strike=left * (0.6 + 0.4 * top.velocity / 127),
                stroke=way if current % 2 == 0 else 1 - way,
                nod=nod,
                tilt=_TILT * (pose.pitch - 0.5) if player.play == "wind" else 0.0,
            )
        )
    return found


def _settled(since: float, frame_s: float) -> float:
    """What is left of a stroke; all of it at the first frame after it."""
    return math.exp(-max(since - frame_s, 0.0) / _DECAY_S)


def _last_hit(notes: Sequence[Note], piece: set[int], t: float) -> float:
    last = max((n.onset_s for n in notes if n.key in piece and n.onset_s <= t), default=None)
    return 0.0 if last is None else math.exp(-(t - last) / _DECAY_S)


# looks

# per class: hue (in turns), spread of hue, saturation, value of the body; hue of the accent
_PAINT: dict[str, tuple[float, float, float, float, float]] = {
    "accordion": (0.97, 0.06, 0.85, 0.65, 0.13),
    "bagpipe": (0.36, 0.10, 0.65, 0.45, 0.98),
    "bassoon": (0.02, 0.02, 0.75, 0.38, 0.12),
    "clarinet": (0.65, 0.20, 0.15, 0.14, 0.60),
    "drum": (0.58, 0.10, 0.75, 0.60, 0.12),
    "flute": (0.58, 0.06, 0.10, 0.88, 0.60),
    "piano": (0.65, 0.30, 0.10, 0.12, 0.05),
    "saxophone": (0.12, 0.02, 0.85, 0.88, 0.10),
    "tuba": (0.13, 0.02, 0.70, 0.78, 0.11),
    "violin": (0.05, 0.02, 0.80, 0.70, 0.08),
    "xylophone": (0.03, 0.02, 0.60, 0.55, 0.55),
    "acoustic_guitar": (0.10, 0.02, 0.55, 0.90, 0.06),
    "banjo": (0.08, 0.03, 0.15, 0.95, 0.07),
    "cello": (0.03, 0.02, 0.85, 0.48, 0.07),
    "electric_bass": (0.70, 0.12, 0.80, 0.70, 0.10),
    "erhu": (0.01, 0.02, 0.70, 0.30, 0.20),
    "guzheng": (0.07, 0.02, 0.60, 0.62, 0.14),
    "pipa": (0.09, 0.02, 0.60, 0.75, 0.03),
    "trumpet": (0.14, 0.02, 0.75, 0.95, 0.13),
    "ukulele": (0.10, 0.06, 0.70, 0.72, 0.45),
}


def _colour(hue: float, saturation: float, value: float) -> _Colour:
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(255 * r), round(255 * g), round(255 * b)


def look_of(player: Instrument, rng: np.random.Generator) -> Look:
    """A clip's look: the class's colours, jittered, and a random view."""
    hue, spread, saturation, value, accent = _PAINT[player.name]
    hue += float(rng.uniform(-spread, spread))
    s = float(np.clip(saturation + rng.uniform(-0.12, 0.12), 0, 1))
    v = float(np.clip(value + rng.uniform(-0.1, 0.1), 0.08, 1))
    wall = float(rng.random())
    brightness = float(rng.uniform(0.25, 0.85))
    blobs = tuple(
        (
            *(float(x) for x in rng.uniform((0, 0, 0.08, 0.08), (1, 1, 0.35, 0.35))),
            _colour(float(rng.random()), float(rng.uniform(0.1, 0.5)), float(rng.uniform(0.2, 0.9))),
        )
        for _ in range(int(rng.integers(2, 6)))
    )
    return Look(
        tones=(
            _colour(hue, s, v),
            _colour(hue, s, v * 0.5),
            _colour(hue, s * 0.45, min(1.0, v * 1.25 + 0.12)),
            _colour(accent + float(rng.uniform(-0.03, 0.03)), 0.7, 0.85),
        ),
        skin=_colour(float(rng.uniform(0.04, 0.08)), float(rng.uniform(0.3, 0.6)), float(rng.uniform(0.45, 0.95))),
        clothes=_colour(float(rng.random()), float(rng.uniform(0.1, 0.6)), float(rng.uniform(0.2, 0.8))),
        backdrop=(
            _colour(wall, 0.35, brightness),
            _colour(wall + float(rng.uniform(-0.15, 0.15)), 0.4, brightness * float(rng.uniform(0.4, 0.9))),
        ),
        blobs=blobs,  # type: ignore[arg-type]
        angle=float(rng.uniform(-0.21, 0.21)),
        scale=float(rng.uniform(0.36, 0.47)),
        shift=(float(rng.uniform(-0.07, 0.07)), float(rng.uniform(-0.06, 0.06))),
        mirrored=bool(rng.random() < 0.5),
        sway=(float(rng.uniform(0.0, 0.012)), float(rng.uniform(0.1, 0.3)), float(rng.uniform(0, 2 * math.pi))),
    )


# drawing


class _Canvas:
    """Draws shapes given in the scene's coordinates: x to the right and y down, about -1 to 1, origin in the middle."""

    def __init__(self, draw: ImageDraw.ImageDraw, size: int, look: Look, pose: Pose) -> None:
        self.draw = draw
        self.gray = draw.mode == "L"
        self.scale = look.scale * size
        drift = look.sway[0] * math.sin(2 * math.pi * look.sway[1] * pose.time_s + look.sway[2])
        angle = look.angle + drift + _LEAN_ANGLE * pose.nod + pose.tilt
        self.cos, self.sin = math.cos(angle) * self.scale, math.sin(angle) * self.scale
        self.sign = -1.0 if look.mirrored else 1.0
        self.at = (
            (0.5 + look.shift[0] + drift) * size,
            (0.5 + look.shift[1] + _LEAN_DOWN * abs(pose.nod)) * size,
        )

    def _map(self, points: Sequence[_Point]) -> list[_Point]:
        cos, sin, (x0, y0), sign = self.cos, self.sin, self.at, self.sign
        return [(x0 + sign * (x * cos - y * sin), y0 + x * sin + y * cos) for x, y in points]

    def _ink(self, colour: _Colour) -> _Colour | int:
        return _luma(colour) if self.gray else colour

    def polygon(self, points: Sequence[_Point], colour: _Colour) -> None:
        self.draw.polygon(self._map(points), fill=self._ink(colour))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: _Colour) -> None:
        self.polygon(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), colour)

    def line(self, points: Sequence[_Point], width: float, colour: _Colour) -> None:
        self.draw.line(
            self._map(points), fill=self._ink(colour), width=max(1, round(width * self.scale)), joint="curve"
        )

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: _Colour) -> None:
        self.polygon([(x + rx * c, y + ry * s) for c, s in _CIRCLE], colour)

    def dot(self, x: float, y: float, radius: float, colour: _Colour) -> None:
        (px, py), r = self._map(((x, y),))[0], radius * self.scale
        self.draw.ellipse((px - r, py - r, px + r, py + r), fill=self._ink(colour))


@lru_cache(maxsize=4096)
def _luma(colour: _Colour) -> int:
    """ITU-R BT.601, in 256ths."""
    return (77 * colour[0] + 150 * colour[1] + 29 * colour[2]) >> 8


_CIRCLE = tuple((math.cos(2 * math.pi * i / 20), math.sin(2 * math.pi * i / 20)) for i in range(20))
_BLACK: _Colour = (24, 22, 24)
_WHITE: _Colour = (240, 238, 230)
_STEEL: _Colour = (186, 190, 198)


def _person(c: _Canvas, look: Look, x: float = 0.0, y: float = -0.55) -> None:
    """Head and shoulders, behind the instrument."""
    c.polygon(
        (
            (x - 0.56, 1.7),
            (x - 0.42, y + 0.34),
            (x - 0.12, y + 0.2),
            (x + 0.12, y + 0.2),
            (x + 0.42, y + 0.34),
            (x + 0.56, 1.7),
        ),
        look.clothes,
    )
    c.box(x - 0.08, y + 0.1, x + 0.08, y + 0.26, look.skin)
    c.ellipse(x, y, 0.19, 0.23, look.skin)
    c.ellipse(x, y - 0.15, 0.2, 0.12, _BLACK)


def _hand(c: _Canvas, look: Look, x: float, y: float, size: float = 0.11) -> None:
    c.dot(x, y, size * 1.2, _BLACK)
    c.dot(x, y, size, look.skin)


def _along(a: _Point, b: _Point, u: float, off: float = 0.0) -> _Point:
    """The point at share ``u`` of the way from a to b, ``off`` to its left."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = math.hypot(dx, dy)
    return a[0] + u * dx - off * dy / length, a[1] + u * dy + off * dx / length


def _tube(c: _Canvas, a: _Point, b: _Point, wide_a: float, wide_b: float, colour: _Colour) -> None:
    c.polygon(
        (_along(a, b, 0, wide_a), _along(a, b, 1, wide_b), _along(a, b, 1, -wide_b), _along(a, b, 0, -wide_a)), colour
    )


def _keys_of(c: _Canvas, look: Look, pose: Pose, a: _Point, b: _Point, metal: _Colour, reach: float = 0.13) -> None:
    """Six holes along a tube, each with a finger that is down on it or lifted off, and the hands behind."""
    for i in range(6):
        u = (0.06 + 0.15 * i) if i < 3 else (0.16 + 0.15 * i)
        c.dot(*_along(a, b, u), 0.045, metal)
        c.dot(*_along(a, b, u, 0.0 if pose.fingers[i] else reach * 1.7), 0.085, look.skin)


def _bow(c: _Canvas, look: Look, pose: Pose, at: _Point, tilt: float, length: float) -> None:
    """A bow that crosses the string at ``at``; which part of it does is the stroke."""
    dx, dy = math.cos(tilt) * length, math.sin(tilt) * length
    x, y = at[0] - (pose.stroke - 0.5) * 1.1 * dx, at[1] - (pose.stroke - 0.5) * 1.1 * dy
    a, b = (x - dx / 2, y - dy / 2), (x + dx / 2, y + dy / 2)
    c.line((a, b), 0.06, _BLACK)
    c.line((_along(a, b, 0.0, 0.05), _along(a, b, 1.0, 0.05)), 0.025, _WHITE)
    _hand(c, look, *b)


def _accordion(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, accent = look.tones
    _person(c, look)
    half = 0.22 + 0.34 * pose.stroke  # half the bellows' width
    folds = 9
    for i in range(folds):
        x0, x1 = -half + 2 * half * i / folds, -half + 2 * half * (i + 1) / folds
        c.polygon(((x0, -0.22), (x1, -0.28), (x1, 0.62), (x0, 0.56)), dark if i % 2 else light)
    c.box(-half - 0.36, -0.32, -half, 0.66, body)
    c.box(half, -0.32, half + 0.36, 0.66, body)
    c.box(-half - 0.36, -0.26, -half - 0.2, 0.6, _WHITE)
    for i in range(7):
        c.box(-half - 0.36, -0.2 + 0.11 * i, -half - 0.27, -0.15 + 0.11 * i, _BLACK)
    for i in range(4):
        for j in range(2):
            c.dot(half + 0.12 + 0.12 * j, -0.15 + 0.2 * i, 0.035, accent)
    _hand(c, look, -half - 0.38, 0.55 - 0.75 * pose.pitch)
    _hand(c, look, half + 0.34, 0.2, 0.09)


def _bagpipe(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, accent = look.tones
    _person(c, look, -0.35, -0.5)
    for x in (0.1, 0.3, 0.5):
        c.line(((x, 0.05), (x + 0.25, -0.98)), 0.075, _BLACK)
        c.line(((x + 0.1, -0.38), (x + 0.13, -0.48)), 0.11, _WHITE)
    squeeze = 0.06 * pose.breath
    c.ellipse(0.15, 0.25, 0.56, 0.36 - squeeze, body)
    for i in range(4):
        c.line(((-0.25 + 0.25 * i, 0.02 + squeeze), (-0.2 + 0.25 * i, 0.5 - squeeze)), 0.05, accent)
    c.line(((-0.35, 0.2), (0.65, 0.25)), 0.05, light)
    c.line(((-0.3, -0.35), (-0.05, 0.05)), 0.05, dark)
    a, b = (-0.28, 0.36), (-0.5, 1.0)
    _tube(c, a, b, 0.05, 0.1, _BLACK)
    _keys_of(c, look, pose, a, b, _WHITE)


def _bassoon(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, _, _ = look.tones
    _person(c, look, -0.1, -0.5)
    a, b = (0.55, -1.0), (-0.35, 0.95)
    _tube(c, a, b, 0.085, 0.13, body)
    c.line((_along(a, b, 0.0, 0.04), _along(a, b, 1.0, 0.06)), 0.03, dark)
    c.line(((0.28, -0.42), (0.12, -0.62), (-0.06, -0.42)), 0.04, _STEEL)
    for u in (0.02, 0.3, 0.62, 0.97):
        c.line((_along(a, b, u, 0.14), _along(a, b, u, -0.14)), 0.05, _STEEL)
    _keys_of(c, look, pose, _along(a, b, 0.33), _along(a, b, 0.95), _STEEL, 0.16)


def _clarinet(c: _Canvas, look: Look, pose: Pose) -> None:
    body, _, _, _ = look.tones
    _person(c, look, 0.0, -0.58)
    a, b = (0.02, -0.4), (0.14, 0.78)
    _tube(c, a, b, 0.045, 0.07, body)
    _tube(c, b, (0.17, 0.98), 0.08, 0.2, body)
    for u in (0.15, 0.48, 0.9):
        c.line((_along(a, b, u, 0.08), _along(a, b, u, -0.08)), 0.035, _STEEL)
    c.line((_along(a, b, 0.2, -0.07), _along(a, b, 0.9, -0.09)), 0.03, _STEEL)
    _keys_of(c, look, pose, _along(a, b, 0.18), b, _STEEL)


def _drum(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, accent = look.tones
    kick, snare, hat, toms, crash = pose.hits
    _person(c, look, 0.0, -0.62)
    for x in (-0.75, 0.75):
        c.line(((x, -0.35), (x * 0.9, 1.0)), 0.03, _STEEL)
    c.ellipse(0.0, 0.5, 0.46 + 0.07 * kick, 0.46 + 0.07 * kick, dark)
    c.ellipse(0.0, 0.5, 0.38 + 0.07 * kick, 0.38 + 0.07 * kick, _WHITE if kick < 0.3 else accent)
    for x in (-0.3, 0.3):
        c.box(x - 0.24, -0.14 + 0.04 * toms, x + 0.24, 0.12 + 0.04 * toms, body)
        c.ellipse(x, -0.14 + 0.04 * toms, 0.24, 0.07, light if toms < 0.3 else accent)
    c.box(-0.82, 0.2 + 0.06 * snare, -0.4, 0.42 + 0.06 * snare, _STEEL)
    c.ellipse(-0.61, 0.2 + 0.06 * snare, 0.21, 0.07, _WHITE if snare < 0.3 else accent)
    c.box(0.45, 0.2, 0.9, 0.6, body)
    c.ellipse(0.675, 0.2, 0.225, 0.07, _WHITE)
    c.ellipse(-0.78, -0.3 + 0.08 * hat, 0.28, 0.06, (214, 178, 60))
    c.polygon(((0.48, -0.52 + 0.2 * crash), (1.0, -0.3 - 0.2 * crash), (0.76, -0.33)), (214, 178, 60))
    left = max(hat, crash)
    c.line(((-0.35, -0.45), (-0.68 + 0.3 * (1 - max(snare, hat)), 0.14 - 0.5 * (1 - snare))), 0.05, (200, 160, 110))
    c.line(((0.35, -0.45), (0.35 + 0.35 * left, -0.2 - 0.5 * (1 - max(toms, left)))), 0.05, (200, 160, 110))


def _flute(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, _ = look.tones
    _person(c, look, -0.45, -0.35)
    a, b = (-0.62, -0.26), (0.98, 0.06)
    _tube(c, a, b, 0.065, 0.065, dark)
    _tube(c, a, b, 0.05, 0.05, body)
    c.line((_along(a, b, 0.0, -0.02), _along(a, b, 1.0, -0.02)), 0.02, light)
    for u in (0.25, 0.78):
        c.line((_along(a, b, u, 0.08), _along(a, b, u, -0.08)), 0.04, dark)
    _keys_of(c, look, pose, _along(a, b, 0.32), _along(a, b, 0.98), dark, -0.13)


def _piano(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, _ = look.tones
    _person(c, look, 0.0, -0.62)
    c.polygon(((-0.95, -0.2), (0.95, -0.2), (1.05, 0.12), (-1.05, 0.12)), body)
    c.line(((-0.95, -0.2), (0.95, -0.2)), 0.03, light)
    c.box(-1.05, 0.1, 1.05, 0.5, _WHITE)
    pressed = int(pose.pitch * 13.99)
    for i in range(14):
        x = -1.05 + 2.1 * i / 14
        if i == pressed and pose.strike > 0.15:
            c.box(x, 0.1, x + 0.15, 0.5, (150, 150, 160))
        c.line(((x, 0.1), (x, 0.5)), 0.015, (120, 120, 120))
        if i % 7 not in (0, 3):
            c.box(x - 0.04, 0.1, x + 0.04, 0.34, _BLACK)
    c.box(-1.05, 0.5, 1.05, 0.72, body)
    for x in (-0.95, 0.85):
        c.box(x, 0.72, x + 0.1, 1.05, dark)
    _hand(c, look, -1.0 + 2.0 * pose.pitch, 0.22 + 0.2 * pose.strike, 0.13)
    _hand(c, look, -0.85 + 1.0 * pose.pitch * pose.pitch, 0.26 + 0.12 * pose.strike, 0.11)


def _saxophone(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, _ = look.tones
    _person(c, look, -0.15, -0.55)
    c.line(((-0.08, -0.4), (0.12, -0.5), (0.22, -0.35)), 0.06, body)
    a, b = (0.22, -0.38), (0.08, 0.6)
    _tube(c, a, b, 0.05, 0.12, body)
    bottom = [(0.32 + 0.32 * math.cos(t), 0.6 + 0.34 * math.sin(t)) for t in np.linspace(math.pi, 0, 9)]
    c.line(bottom, 0.26, body)
    _tube(c, (0.64, 0.62), (0.78, 0.02), 0.14, 0.27, body)
    c.ellipse(0.785, 0.02, 0.27, 0.1, dark)
    c.line((_along(a, b, 0.1, -0.02), _along(a, b, 0.95, -0.05)), 0.025, light)
    _keys_of(c, look, pose, _along(a, b, 0.08), b, dark)


def _tuba(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, _ = look.tones
    _person(c, look, -0.35, -0.45)
    for i, radius in enumerate((0.5, 0.36, 0.22)):
        ring = [(0.15 + radius * x, 0.48 + radius * y) for x, y in (*_CIRCLE, _CIRCLE[0])]
        c.line(ring, 0.15, dark)
        c.line(ring, 0.09, body if i % 2 == 0 else light)
    _tube(c, (0.5, 0.4), (0.42, -0.62), 0.12, 0.4, body)
    c.ellipse(0.42, -0.64, 0.43, 0.16 + 0.02 * pose.breath, dark)
    c.ellipse(0.42, -0.64, 0.36, 0.11 + 0.02 * pose.breath, light)
    c.line(((-0.28, -0.32), (-0.1, -0.15), (0.0, 0.1)), 0.05, body)
    for i in range(3):
        x, down = -0.14 + 0.19 * i, 0.22 * pose.fingers[3 + i]
        c.box(x - 0.06, 0.2, x + 0.06, 0.62, _STEEL)
        c.line(((x, 0.2), (x, -0.02 + down)), 0.04, _STEEL)
        c.dot(x, -0.05 + down, 0.09, look.skin)


def _fiddle(c: _Canvas, look: Look, size: float, at: _Point, neck: float) -> None:
    """Body of the violin family, upright, with f-holes and fingerboard."""
    body, dark, light, _ = look.tones
    x, y = at
    c.ellipse(x, y + 0.3 * size, 0.36 * size, 0.32 * size, dark)
    c.ellipse(x, y - 0.24 * size, 0.29 * size, 0.27 * size, dark)
    c.ellipse(x, y + 0.3 * size, 0.32 * size, 0.28 * size, body)
    c.ellipse(x, y - 0.24 * size, 0.25 * size, 0.23 * size, body)
    c.box(x - 0.17 * size, y - 0.2 * size, x + 0.17 * size, y + 0.2 * size, body)
    for side in (-1, 1):
        c.line(((x + side * 0.14 * size, y - 0.02 * size), (x + side * 0.18 * size, y + 0.24 * size)), 0.03, _BLACK)
    c.box(x - 0.055 * size, y - neck, x + 0.055 * size, y + 0.02 * size, _BLACK)
    c.box(x - 0.05 * size, y + 0.3 * size, x + 0.05 * size, y + 0.52 * size, _BLACK)
    c.line(((x, y - neck), (x, y + 0.4 * size)), 0.015, light)
    c.ellipse(x, y - neck, 0.08 * size, 0.1 * size, dark)


def _violin(c: _Canvas, look: Look, pose: Pose) -> None:
    _person(c, look, -0.4, -0.5)
    turned = _Turned(c, 1.05, (0.1, 0.05))
    _fiddle(turned, look, 0.85, (0.0, 0.0), 0.95)
    _hand(turned, look, 0.1, -0.92 + 0.6 * pose.pitch, 0.1)
    _bow(c, look, pose, (0.1, 0.05), 1.15, 1.2)


def _cello(c: _Canvas, look: Look, pose: Pose) -> None:
    _person(c, look, -0.12, -0.72)
    c.line(((0.1, 0.85), (0.1, 1.1)), 0.035, _STEEL)
    _fiddle(c, look, 1.25, (0.1, 0.2), 1.2)
    _hand(c, look, 0.02, -0.85 + 0.75 * pose.pitch)
    _bow(c, look, pose, (0.1, 0.3), 0.12, 1.3)


class _Turned(_Canvas):
    """A canvas turned and moved within another."""

    def __init__(self, base: _Canvas, angle: float, at: _Point) -> None:
        self.draw, self.scale, self.gray = base.draw, base.scale, base.gray
        self.base, self.angle, self.offset = base, (math.cos(angle), math.sin(angle)), at

    def _map(self, points: Sequence[_Point]) -> list[_Point]:
        (cos, sin), (x0, y0) = self.angle, self.offset
        return self.base._map([(x0 + x * cos - y * sin, y0 + x * sin + y * cos) for x, y in points])


def _xylophone(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, _, accent = look.tones
    _person(c, look, 0.0, -0.68)
    c.line(((-1.0, 0.15), (1.0, 0.3)), 0.06, dark)
    c.line(((-1.0, 0.7), (1.0, 0.55)), 0.06, dark)
    hit = int(pose.pitch * 10.99)
    for i in range(11):
        x, half = -1.0 + 2.0 * (i + 0.5) / 11, 0.42 - 0.02 * i
        struck = i == hit and pose.strike > 0.2
        c.box(x - 0.072, 0.42 - half, x + 0.072, 0.42 + half, accent if struck else body)
        c.dot(x, 0.42 - half + 0.08, 0.02, dark)
    at = -1.0 + 2.0 * (hit + 0.5) / 11
    lift = 0.45 * (1 - pose.strike)
    for x, y in ((at, 0.4 - lift), (at * 0.6 - 0.25, 0.25 - 0.5 * lift)):
        c.line(((x * 0.4, -0.4), (x, y)), 0.035, (214, 180, 130))
        c.dot(x, y, 0.095, accent)


def _lute(
    c: _Canvas, look: Look, pose: Pose, neck_end: float, hand_at: _Point, width: float = 0.1, pegs: int = 3
) -> None:
    """Neck to the left from the origin, both hands: one on the fingerboard by pitch, one that strums."""
    c.box(neck_end, -width / 2, 0.0, width / 2, look.tones[1])
    c.box(neck_end - 0.2, -width * 0.8, neck_end, width * 0.8, look.tones[1])
    for i in range(pegs):
        for side in (-1, 1):
            c.dot(neck_end - 0.04 - 0.06 * i, side * width * 1.05, 0.028, _STEEL)
    for i in range(-1, 2):
        c.line(((neck_end, i * width / 4), (hand_at[0] + 0.2, i * width / 4)), 0.012, _WHITE)
    _hand(c, look, neck_end + 0.1 + (-neck_end - 0.15) * pose.pitch, 0.04)
    _hand(c, look, hand_at[0], hand_at[1] - 0.12 + 0.34 * pose.strike, 0.125)


def _acoustic_guitar(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, _, _ = look.tones
    _person(c, look, 0.2, -0.6)
    t = _Turned(c, 0.2, (0.1, 0.28))
    t.ellipse(0.5, 0.0, 0.43, 0.42, dark)
    t.ellipse(0.06, 0.0, 0.32, 0.32, dark)
    t.ellipse(0.5, 0.0, 0.4, 0.39, body)
    t.ellipse(0.06, 0.0, 0.29, 0.29, body)
    t.dot(0.2, 0.0, 0.13, _BLACK)
    t.box(0.55, -0.12, 0.6, 0.12, dark)
    _lute(t, look, pose, -0.9, (0.36, 0.0))


def _banjo(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, _, accent = look.tones
    _person(c, look, 0.2, -0.6)
    t = _Turned(c, 0.25, (0.1, 0.25))
    t.dot(0.4, 0.0, 0.46, accent)
    t.dot(0.4, 0.0, 0.4, _STEEL)
    t.dot(0.4, 0.0, 0.36, body)
    for x, y in _CIRCLE[::2]:
        t.dot(0.4 + 0.43 * x, 0.43 * y, 0.03, _STEEL)
    t.box(0.5, -0.09, 0.54, 0.09, dark)
    t.dot(-0.55, -0.12, 0.04, _STEEL)
    _lute(t, look, pose, -1.0, (0.36, 0.0), 0.09, 2)


def _electric_bass(c: _Canvas, look: Look, pose: Pose) -> None:
    body, _, light, _ = look.tones
    _person(c, look, 0.25, -0.62)
    t = _Turned(c, 0.3, (0.15, 0.25))
    t.polygon(
        (
            (-0.3, -0.34),
            (0.05, -0.2),
            (0.35, -0.3),
            (0.75, -0.26),
            (0.82, 0.1),
            (0.6, 0.34),
            (0.25, 0.2),
            (-0.1, 0.32),
            (-0.05, 0.0),
        ),
        body,
    )
    t.polygon(((0.1, -0.16), (0.5, -0.12), (0.5, 0.16), (0.2, 0.12)), light)
    for x in (0.22, 0.4):
        t.box(x, -0.1, x + 0.07, 0.1, _BLACK)
    t.box(0.6, -0.1, 0.68, 0.1, _STEEL)
    _lute(t, look, pose, -1.1, (0.36, -0.02), 0.085, 2)


def _erhu(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, _, accent = look.tones
    _person(c, look, -0.1, -0.62)
    c.line(((0.2, -1.0), (0.2, 0.9)), 0.055, body)
    c.polygon(((0.2, -1.0), (0.32, -1.08), (0.3, -0.95)), body)
    for y in (-0.78, -0.6):
        c.line(((0.2, y), (0.42, y - 0.03)), 0.06, dark)
    hexagon = [(0.2 + 0.24 * math.cos(a), 0.72 + 0.24 * math.sin(a)) for a in np.arange(6) * math.pi / 3]
    c.polygon(hexagon, dark)
    c.polygon([(0.2 + (x - 0.2) * 0.75, 0.72 + (y - 0.72) * 0.75) for x, y in hexagon], accent)
    c.line(((0.24, -0.78), (0.24, 0.7)), 0.012, _WHITE)
    _hand(c, look, 0.16, -0.5 + 0.8 * pose.pitch, 0.1)
    _bow(c, look, pose, (0.25, 0.46), -0.05, 1.25)


def _guzheng(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, _ = look.tones
    _person(c, look, 0.0, -0.65)
    c.polygon(((-1.1, 0.1), (1.1, -0.12), (1.1, 0.5), (-1.1, 0.78)), dark)
    c.polygon(((-1.02, 0.16), (1.02, -0.04), (1.02, 0.42), (-1.02, 0.68)), body)
    for i in range(9):
        y0, y1 = 0.2 + 0.055 * i, 0.0 + 0.05 * i
        c.line(((-1.0, y0), (1.0, y1)), 0.012, light)
        u = 0.25 + 0.055 * i
        c.dot(-1.0 + 2.0 * u, y0 + u * (y1 - y0), 0.04, _WHITE)
    for x in (-0.8, 0.8):
        c.line(((x, 0.6), (x, 1.05)), 0.06, dark)
    x = 0.95 - 1.5 * pose.pitch
    _hand(c, look, x, 0.06 + 0.3 * pose.strike, 0.13)
    _hand(c, look, x - 0.45, 0.18 + 0.16 * (1 - pose.strike), 0.12)


def _pipa(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, _, accent = look.tones
    _person(c, look, -0.15, -0.62)
    outline = [
        (0.1, -0.55),
        (0.34, 0.05),
        (0.5, 0.5),
        (0.36, 0.85),
        (0.1, 0.95),
        (-0.16, 0.85),
        (-0.3, 0.5),
        (-0.14, 0.05),
    ]
    c.polygon([(0.1 + (x - 0.1) * 1.1, 0.3 + (y - 0.3) * 1.05) for x, y in outline], dark)
    c.polygon(outline, body)
    c.line(((0.1, -0.5), (0.13, -0.9), (0.3, -1.0)), 0.12, dark)
    for y in (-0.85, -0.7):
        c.line(((-0.05, y), (0.28, y)), 0.05, _BLACK)
    for i in range(6):
        c.line(((-0.02 - 0.012 * i, -0.3 + 0.12 * i), (0.22 + 0.012 * i, -0.3 + 0.12 * i)), 0.03, accent)
    c.box(-0.06, 0.72, 0.26, 0.78, _BLACK)
    _hand(c, look, -0.06, -0.6 + 0.75 * pose.pitch, 0.1)
    _hand(c, look, 0.2 - 0.3 * pose.strike, 0.58 + 0.12 * pose.strike, 0.13)


def _trumpet(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, light, _ = look.tones
    _person(c, look, -0.62, -0.4)
    c.line(((-0.45, -0.18), (0.6, -0.06)), 0.09, body)
    c.line(((-0.2, 0.2), (0.45, 0.28)), 0.08, body)
    c.line(((-0.2, 0.2), (-0.28, 0.02), (-0.18, -0.14)), 0.07, body)
    c.line(((0.45, 0.28), (0.54, 0.12), (0.45, -0.06)), 0.07, body)
    c.polygon(((0.5, -0.11), (0.8, -0.16), (1.02, -0.4), (1.0, 0.34), (0.78, 0.04), (0.5, -0.01)), body)
    c.ellipse(1.0, -0.03, 0.07 + 0.01 * pose.breath, 0.38, dark)
    c.line(((-0.4, -0.2), (0.55, -0.09)), 0.02, light)
    for i in range(3):
        x, down = -0.02 + 0.17 * i, 0.22 * pose.fingers[3 + i]
        c.box(x - 0.06, -0.16, x + 0.06, 0.34, _STEEL)
        c.line(((x, -0.16), (x, -0.42 + down)), 0.04, _STEEL)
        c.dot(x, -0.45 + down, 0.085, look.skin)


def _ukulele(c: _Canvas, look: Look, pose: Pose) -> None:
    body, dark, _, accent = look.tones
    _person(c, look, 0.1, -0.55)
    t = _Turned(c, 0.15, (0.1, 0.3))
    t.ellipse(0.34, 0.0, 0.28, 0.25, body)
    t.ellipse(0.06, 0.0, 0.22, 0.19, body)
    t.line(((0.62, -0.02), (0.62, 0.02)), 0.03, dark)
    t.dot(0.14, 0.0, 0.105, accent)
    t.dot(0.14, 0.0, 0.075, _BLACK)
    t.box(0.38, -0.09, 0.42, 0.09, dark)
    _lute(t, look, pose, -0.55, (0.24, 0.0), 0.085, 2)


_RECIPES: dict[str, Callable[[_Canvas, Look, Pose], None]] = {
    "accordion": _accordion,
    "bagpipe": _bagpipe,
    "bassoon": _bassoon,
    "clarinet": _clarinet,
    "drum": _drum,
    "flute": _flute,
    "piano": _piano,
    "saxophone": _saxophone,
    "tuba": _tuba,
    "violin": _violin,
    "xylophone": _xylophone,
    "acoustic_guitar": _acoustic_guitar,
    "banjo": _banjo,
    "cello": _cello,
    "electric_bass": _electric_bass,
    "erhu": _erhu,
    "guzheng": _guzheng,
    "pipa": _pipa,
    "trumpet": _trumpet,
    "ukulele": _ukulele,
}


def _backdrop(look: Look, size: int) -> Image.Image:
    from PIL import Image, ImageDraw

    top, bottom = np.array(look.backdrop[0]), np.array(look.backdrop[1])
    ramp = np.linspace(0, 1, size)[:, None]
    rows = np.rint(top + (bottom - top) * ramp).astype(np.uint8)  # [size, 3]
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows[:, None], (size, size, 3))))
    draw = ImageDraw.Draw(image)
    for x, y, width, height, colour in look.blobs:
        draw.rectangle((x * size, y * size, (x + width) * size, (y + height) * size), fill=colour)
    return image


def draw(player: Instrument, look: Look, moments: Sequence[Pose], size: int, *, gray: bool = False) -> np.ndarray:
    """Draw the scene at each pose; returns uint8 [n, 3, size, size] (RGB), or [n, 1, size, size] drawn in grays."""
    try:
        from PIL import ImageDraw
    except ImportError:
        raise MissingExtraError("Pillow", "synth", "drawing the offline benchmark") from None
    large = _SUPERSAMPLING * size
    backdrop = _backdrop(look, large)
    recipe = _RECIPES[player.name]
    if gray:
        backdrop = backdrop.convert("L")
    frames = np.empty((len(moments), 1 if gray else 3, size, size), np.uint8)
    for number, pose in enumerate(moments):
        image = backdrop.copy()
        recipe(_Canvas(ImageDraw.Draw(image), large, look, pose), look, pose)
        small = np.asarray(image.reduce(_SUPERSAMPLING))
        frames[number] = small if gray else small.transpose(2, 0, 1)  # [3, size, size]
    return frames


def _times(duration_s: float, rate_hz: float) -> list[float]:
    """The middle of each picture's span; a last part of a span gets a picture too."""
    return [(i + 0.5) / rate_hz for i in range(max(1, math.ceil(duration_s * rate_hz - 1e-6)))]


def _poses(player: Instrument, notes: Sequence[Note], duration_s: float, rate_hz: float, version: int) -> list[Pose]:
    times_s = _times(duration_s, rate_hz)
    if version == 1:
        return poses(player, notes, times_s)
    return poses_v2(player, notes, times_s, 1 / rate_hz)


def object_frames(
    player: Instrument,
    look: Look,
    notes: Sequence[Note],
    duration_s: float,
    rate_hz: float = 1.0,
    *,
    version: int = 1,
) -> np.ndarray:
    """uint8 [n, 3, 112, 112], one RGB picture for each 1 / ``rate_hz`` seconds."""
    return draw(player, look, _poses(player, notes, duration_s, rate_hz, version), OBJECT_SIZE)


def motion_frames(
    player: Instrument,
    look: Look,
    notes: Sequence[Note],
    duration_s: float,
    rate_hz: float = 8.0,
    *,
    version: int = 1,
) -> np.ndarray:
    """uint8 [m, 1, 48, 48], one gray picture for each 1 / ``rate_hz`` seconds."""
    moments = _poses(player, notes, duration_s, rate_hz, version)
    if version > 1:
        return draw(player, look, moments, MOTION_SIZE, gray=True)
    rgb = draw(player, look, moments, MOTION_SIZE)
    weights = np.array([77, 150, 29], np.uint32).reshape(3, 1, 1)  # ITU-R BT.601 luma, in 256ths
    gray: np.ndarray = ((rgb * weights).sum(axis=1, keepdims=True) >> 8).astype(np.uint8)  # [m, 1, 48, 48]
    return gray

"""Random changes of a training source: its tuning, its tone and its room. What is seen stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avsep.spec import AugmentSpec

__all__ = ["Change", "draw_change", "equalise", "reverberate", "with_speed"]

_BANDS = 6  # of the equaliser, evenly spaced in log frequency
_LOWEST_HZ = 60.0
_RT60_S = (0.1, 0.8)


@dataclass(frozen=True)
class Change:
    """What happens to one source: ``speed`` (and so pitch) times as fast, gains in dB at the equaliser's bands, and a
    room of reverberation time ``rt60_s`` (0: none) with the number ``room``."""

    speed: float = 1.0
    gains_db: tuple[float, ...] = ()
    rt60_s: float = 0.0
    room: int = 0

    def samples(self, length: int) -> int:
        """How many samples of a clip are read for ``length`` of the source."""
        return round(length * self.speed)

    def apply(self, audio: np.ndarray, length: int, sample_rate_hz: int) -> np.ndarray:
        """Sound [samples(length)] float32 -> [length] float32."""
        if self.speed != 1.0:
            audio = with_speed(audio, length)
        if self.gains_db:
            audio = equalise(audio, self.gains_db, sample_rate_hz)
        if self.rt60_s > 0:
            audio = reverberate(audio, self.rt60_s, sample_rate_hz, seed=(self.room,))
        return audio


def draw_change(spec: AugmentSpec, rng: np.random.Generator) -> Change:
    """All four numbers are drawn whatever the spec asks for, so that one setting does not move the others' draws."""
    cents = float(rng.uniform(-1.0, 1.0)) * spec.detune_cents
    gains = np.clip(rng.standard_normal(_BANDS) / 2, -1.0, 1.0) * spec.equaliser_db
    in_room, rt60_s, room = rng.random() < spec.rooms, float(rng.uniform(*_RT60_S)), int(rng.integers(2**31))
    return Change(
        speed=2.0 ** (cents / 1200),
        gains_db=tuple(gains.tolist()) if spec.equaliser_db > 0 else (),
        rt60_s=rt60_s if in_room else 0.0,
        room=room,
    )


def with_speed(audio: np.ndarray, length: int) -> np.ndarray:
    """Sound [L'] in ``length`` samples, by its spectrum: as many times faster and higher as L' is longer."""
    spectrum = np.fft.rfft(audio)
    made: np.ndarray = (np.fft.irfft(spectrum[: length // 2 + 1], length) * (length / len(audio))).astype(np.float32)
    return made


def equalise(audio: np.ndarray, gains_db: tuple[float, ...], sample_rate_hz: int) -> np.ndarray:
    """Sound [L] through a filter of zero phase with these gains at frequencies from 60 Hz to half the rate, evenly
    spaced and interpolated in log frequency."""
    size = len(audio)
    frequencies = np.fft.rfftfreq(size, 1 / sample_rate_hz)
    places = np.geomspace(_LOWEST_HZ, sample_rate_hz / 2, len(gains_db))
    gains = np.interp(np.log(np.maximum(frequencies, 1.0)), np.log(places), gains_db)
    made: np.ndarray = np.fft.irfft(np.fft.rfft(audio) * 10 ** (gains / 20), size).astype(np.float32)
    return made


def reverberate(audio: np.ndarray, rt60_s: float, sample_rate_hz: int, *, seed: tuple[int, ...]) -> np.ndarray:
    """Sound [L] as a room of reverberation time ``rt60_s`` returns it: the direct sound and a tail of noise that falls
    by 60 dB in that time, of equal energy, scaled to the level of the input. ``seed`` names the room."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))
    length = max(2, round(rt60_s * sample_rate_hz))
    tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail[0] = 0.0
    tail /= max(float(np.sqrt((tail**2).sum())), 1e-12)
    size = 1 << (len(audio) + length).bit_length()
    wet = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(tail, size), size)[: len(audio)]
    out = audio + wet
    before, after = float((audio.astype(np.float64) ** 2).sum()), float((out**2).sum())
    scaled: np.ndarray = (out * np.sqrt(before / after if after > 0 else 0.0)).astype(np.float32)
    return scaled

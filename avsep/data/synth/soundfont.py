"""A SoundFont 2 sampler in NumPy: reads a bank and plays notes from it.

Written from the SoundFont Technical Specification 2.04 (Creative/E-mu, 2006). Read and used: presets, instruments,
their zones with key and velocity ranges, sample loops, root keys and tuning, the volume envelope, attenuation, the
static part of the low-pass filter, exclusive classes. Left out: pan (the result is mono), modulation envelope and
LFOs on pitch, reverb and chorus, custom modulators.
"""

from __future__ import annotations

import itertools
import math
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from avsep.errors import DataError

__all__ = ["Note", "SoundFont"]

# generator numbers, section 8.1.2 of the specification
_START, _END, _LOOP_START, _LOOP_END, _START_COARSE = 0, 1, 2, 3, 4
_FILTER_HZ, _FILTER_Q, _MOD_TO_FILTER, _END_COARSE = 8, 9, 11, 12
_MOD_SUSTAIN = 29
_DELAY, _ATTACK, _HOLD, _DECAY, _SUSTAIN, _RELEASE = 33, 34, 35, 36, 37, 38
_KEY_TO_HOLD, _KEY_TO_DECAY = 39, 40
_INSTRUMENT, _KEYS, _VELOCITIES, _LOOP_START_COARSE = 41, 43, 44, 45
_FIXED_KEY, _FIXED_VELOCITY, _ATTENUATION, _LOOP_END_COARSE = 46, 47, 48, 50
_COARSE, _FINE, _SAMPLE, _MODES, _SCALE, _EXCLUSIVE, _ROOT = 51, 52, 53, 54, 56, 57, 58
_DEFAULTS = {
    _FILTER_HZ: 13500,
    **dict.fromkeys((_DELAY, _ATTACK, _HOLD, _DECAY, _RELEASE), -12000),
    _FIXED_KEY: -1,
    _FIXED_VELOCITY: -1,
    _SCALE: 100,
    _ROOT: -1,
}
# generators that a preset zone may not add to (section 9.4: indices, ranges, samples' addresses and substitutions)
_INSTRUMENT_ONLY = frozenset(
    (
        *(_START, _END, _LOOP_START, _LOOP_END, _START_COARSE, _END_COARSE, _LOOP_START_COARSE, _LOOP_END_COARSE),
        *(_FIXED_KEY, _FIXED_VELOCITY, _MODES, _EXCLUSIVE, _ROOT, _KEYS, _VELOCITIES, _INSTRUMENT, _SAMPLE),
    )
)
_SILENT_DB = 90.0  # a voice this far down is over
_FAINT_DB = 65.0  # the same where it has to be fast
_MARGIN = 256  # samples that a filter of a sample reaches
_PREPARED = 400  # samples that are kept filtered
_CUT_S = 0.01  # fade of a voice that another of its exclusive class cuts off


@dataclass(frozen=True)
class Note:
    """A note: when it starts and how long it is held, its MIDI key and velocity (1 to 127)."""

    onset_s: float
    duration_s: float
    key: int
    velocity: int = 96


@dataclass(frozen=True)
class _Sample:
    start: int
    end: int
    loop_start: int
    loop_end: int
    rate_hz: int
    root: int
    correction_cents: int


@dataclass(frozen=True)
class _Zone:
    keys: tuple[int, int]
    velocities: tuple[int, int]
    generators: dict[int, int]
    target: int  # instrument or sample


@dataclass(frozen=True)
class _Region:
    """One sample as one preset plays it within a range of keys and velocities; generators merged."""

    sample: _Sample
    keys: tuple[int, int]
    velocities: tuple[int, int]
    generators: dict[int, int]

    def value(self, generator: int) -> int:
        return self.generators.get(generator, _DEFAULTS.get(generator, 0))

    def seconds(self, generator: int) -> float:
        cents = self.value(generator)
        return 0.0 if cents <= -12000 else 2.0 ** (min(cents, 8000) / 1200)


class SoundFont:
    """A bank of sampled instruments. Sample data stay on disk until they are played.

    ``presets`` maps (bank, program) to the preset's name; drum kits have bank 128.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            data = np.memmap(self.path, np.uint8, mode="r")
        except FileNotFoundError:
            raise DataError(f"no such SoundFont: {self.path}") from None
        except (ValueError, IsADirectoryError) as error:
            raise DataError(f"{self.path} is not a SoundFont: {error}") from None
        chunks = self._chunks(data)
        self._pcm = chunks["smpl"].view("<i2")
        self._samples = self._read_samples(chunks["shdr"].tobytes())
        instruments = self._read_zones(chunks, "inst", 22, "i", _SAMPLE, len(self._samples))
        presets = self._read_zones(chunks, "phdr", 38, "p", _INSTRUMENT, len(instruments))
        self.presets: dict[tuple[int, int], str] = {}
        self._zones: dict[tuple[int, int], list[_Zone]] = {}
        headers = chunks["phdr"].tobytes()
        for index, zones in enumerate(presets):
            name, program, bank = struct.unpack_from("<20sHH", headers, 38 * index)
            self.presets.setdefault((bank, program), _text(name))
            self._zones.setdefault((bank, program), zones)
        self._instruments = instruments
        if not self.presets:
            raise DataError(f"{self.path} holds no presets")
        self._regions = lru_cache(maxsize=None)(self._build_regions)
        self._prepared = lru_cache(maxsize=_PREPARED)(self._build_prepared)

    # reading

    def _bad(self, why: str) -> DataError:
        return DataError(f"{self.path} is a damaged or truncated SoundFont: {why}")

    def _chunks(self, data: np.ndarray) -> dict[str, np.ndarray]:
        if len(data) < 12 or data[:4].tobytes() != b"RIFF" or data[8:12].tobytes() != b"sfbk":
            raise DataError(f"{self.path} is not a SoundFont 2 bank (it does not begin with RIFF ... sfbk)")
        found: dict[str, np.ndarray] = {}

        def walk(low: int, high: int, top: bool) -> None:
            while low + 8 <= high:
                name = data[low : low + 4].tobytes()
                size = int.from_bytes(data[low + 4 : low + 8].tobytes(), "little")
                if low + 8 + size > high:
                    raise self._bad(f"chunk {_text(name)!r} ends {low + 8 + size - high} bytes beyond its parent")
                if name == b"LIST" and top:
                    walk(low + 12, low + 8 + size, False)
                else:
                    found.setdefault(_text(name), data[low + 8 : low + 8 + size])
                low += 8 + size + size % 2

        walk(12, len(data), True)
        need = ("smpl", "phdr", "pbag", "pgen", "inst", "ibag", "igen", "shdr")
        lacking = [name for name in need if name not in found]
        if lacking:
            raise self._bad(f"no chunk {', '.join(lacking)}")
        sizes = {"phdr": 38, "pbag": 4, "pgen": 4, "inst": 22, "ibag": 4, "igen": 4, "shdr": 46, "smpl": 2}
        for name, size in sizes.items():
            if len(found[name]) % size or not len(found[name]):
                raise self._bad(f"chunk {name} has {len(found[name])} bytes, not a multiple of {size}")
        return found

    def _read_samples(self, data: bytes) -> list[_Sample | None]:
        """The sample headers; None for one in a ROM or without data."""
        found: list[_Sample | None] = []
        for offset in range(0, len(data) - 46, 46):  # the last record is the terminator
            _, start, end, loop_start, loop_end, rate, root, correction, _, kind = struct.unpack_from(
                "<20s5IBbHH", data, offset
            )
            if kind & 0x10:
                raise DataError(f"{self.path} holds compressed samples (SF3): convert it to an uncompressed .sf2 bank")
            if kind & 0x8000 or end <= start or not rate:
                found.append(None)
                continue
            if end > len(self._pcm):
                raise self._bad(f"sample {offset // 46} ends at {end}, the sample data at {len(self._pcm)}")
            found.append(_Sample(start, end, loop_start, loop_end, rate, root if root < 128 else 60, correction))
        return found

    def _read_zones(
        self, chunks: dict[str, np.ndarray], header: str, size: int, prefix: str, link: int, targets: int
    ) -> list[list[_Zone]]:
        """Per preset or instrument its zones, with its global zone merged in."""
        headers = chunks[header].tobytes()
        at = size - 14 if header == "phdr" else 20  # the field with the first zone's index: phdr at 24, inst at 20
        first = [struct.unpack_from("<H", headers, o + at)[0] for o in range(0, len(headers), size)]
        bags = chunks[f"{prefix}bag"].view("<u2").reshape(-1, 2)[:, 0].tolist()
        generators = chunks[f"{prefix}gen"].view("<u2").reshape(-1, 2)
        if first != sorted(first) or first[-1] >= len(bags):
            raise self._bad(f"{header} points outside {prefix}bag")
        if bags != sorted(bags) or bags[-1] > len(generators):
            raise self._bad(f"{prefix}bag points outside {prefix}gen")
        result = []
        for low, high in itertools.pairwise(first):
            common: dict[int, int] = {}
            zones = []
            for bag in range(low, high):
                values = dict(common)
                for number, amount in generators[bags[bag] : bags[bag + 1]].tolist():
                    values[number] = amount if number in (_KEYS, _VELOCITIES, link) else (amount ^ 0x8000) - 0x8000
                if link not in values:
                    if bag == low:
                        common = values
                    continue
                if values[link] >= targets:
                    raise self._bad(f"a zone of {header} points to {values[link]}, of {targets}")
                zones.append(_Zone(_range(values.get(_KEYS)), _range(values.get(_VELOCITIES)), values, values[link]))
            result.append(zones)
        return result

    def _build_regions(self, bank: int, program: int) -> tuple[_Region, ...]:
        """Merge preset and instrument zones: a preset's values are added to the instrument's (section 9.4)."""
        if (bank, program) not in self._zones:
            raise DataError(f"{self.path} has no preset at bank {bank}, program {program}")
        regions = []
        for outer in self._zones[bank, program]:
            for inner in self._instruments[outer.target]:
                keys, velocities = _overlap(outer.keys, inner.keys), _overlap(outer.velocities, inner.velocities)
                sample = self._samples[inner.target]
                if keys[0] > keys[1] or velocities[0] > velocities[1] or sample is None:
                    continue
                values = dict(inner.generators)
                for number, amount in outer.generators.items():
                    if number not in _INSTRUMENT_ONLY:
                        values[number] = values.get(number, _DEFAULTS.get(number, 0)) + amount
                regions.append(_Region(sample, keys, velocities, values))
        return tuple(regions)

    # playing

    def render(
        self, notes: Sequence[Note], *, bank: int, program: int, samples: int, sample_rate_hz: int = 44100
    ) -> np.ndarray:
        """Play notes with one preset; returns mono float32 [samples], not normalised.

        Raises :class:`DataError` when the bank lacks the preset. Notes outside the preset's keys are silent.
        """
        regions = self._regions(bank, program)
        voices = [
            (note, region)
            for note in notes
            for region in regions
            if region.keys[0] <= note.key <= region.keys[1]
            and region.velocities[0] <= note.velocity <= region.velocities[1]
        ]
        out = np.zeros(samples, np.float64)
        for note, region in voices:
            cut_s = math.inf
            if exclusive := region.value(_EXCLUSIVE):
                later = [n.onset_s for n, r in voices if r.value(_EXCLUSIVE) == exclusive and n.onset_s > note.onset_s]
                cut_s = min(later, default=math.inf)
            begin = round(note.onset_s * sample_rate_hz)
            if 0 <= begin < samples:
                voice = self._voice(note, region, samples - begin, sample_rate_hz, cut_s - note.onset_s)
                out[begin : begin + len(voice)] += voice
        return out.astype(np.float32)

    def _voice(self, note: Note, region: _Region, room: int, rate_hz: int, cut_s: float) -> np.ndarray:
        """One region sounding one note; at most ``room`` samples."""
        key, velocity, step = self._tuned(note, region, rate_hz)
        start, end, loop_start, loop_end, mode = self._addresses(region)
        loops = mode in (1, 3)
        if end - start < 2:
            return np.zeros(0)

        # how long the voice sounds
        held = round(note.duration_s * rate_hz)
        release = max(region.seconds(_RELEASE), 0.005)
        total = min(room, held + math.ceil(release * rate_hz * _SILENT_DB / 100))
        if cut_s < math.inf:
            total = min(total, round((cut_s + _CUT_S) * rate_hz))
        if not loops:
            total = min(total, int((end - start - 1) / step))
        if total <= 0:
            return np.zeros(0)

        # read the sample with linear interpolation; what that adds lies above what decimation keeps
        position = np.arange(total) * step
        if loops:
            into, length = loop_start - start, loop_end - loop_start
            # mode 3 leaves the loop at the release and plays on to the end
            looped = total if mode == 1 else min(held, total)
            wrapped = position[:looped]
            beyond = wrapped >= loop_end - start
            wrapped[beyond] = into + (wrapped[beyond] - into) % length
            if looped < total:
                position[looped:] = (wrapped[-1] if looped else 0.0) + step * np.arange(1, total - looped + 1)
                total = looped + int(np.searchsorted(position[looped:], end - start - 1))
                position = position[:total]
        index = position.astype(np.int64)
        fraction = position - index
        after = index + 1
        if loops:
            after[: min(looped, total)][index[: min(looped, total)] == loop_end - start - 1] = loop_start - start
        pcm = self._pcm[start : end + 1].astype(np.float64)
        after = np.minimum(after, len(pcm) - 1)
        voice = pcm[index]
        voice += fraction * (pcm[after] - voice)

        voice *= self._envelope(region, key, total, held, release, rate_hz)
        if cut_s < math.inf:
            fade = round(_CUT_S * rate_hz)
            tail = voice[max(0, total - fade) :]
            tail *= np.linspace(1, 0, len(tail))
        voice *= self._loudness(region, velocity)
        corner = self._filter(region, rate_hz)
        return voice if corner is None or not len(voice) else _two_poles(voice, *corner, rate_hz)

    def _tuned(self, note: Note, region: _Region, rate_hz: int) -> tuple[int, int, float]:
        """Key and velocity as the region plays them, and how far each output sample goes on in the sample."""
        sample = region.sample
        key = region.value(_FIXED_KEY) if region.value(_FIXED_KEY) >= 0 else note.key
        velocity = region.value(_FIXED_VELOCITY) if region.value(_FIXED_VELOCITY) > 0 else note.velocity
        root = region.value(_ROOT) if region.value(_ROOT) >= 0 else sample.root
        cents = (key - root) * region.value(_SCALE) + 100 * region.value(_COARSE) + region.value(_FINE)
        # no instrument is tuned by more than ten octaves: a damaged bank must not overflow
        cents = min(max(cents + sample.correction_cents, -12000), 12000)
        return key, velocity, 2.0 ** (cents / 1200) * sample.rate_hz / rate_hz

    def _addresses(self, region: _Region) -> tuple[int, int, int, int, int]:
        """Start, end, loop start and loop end within the sample data, and the loop's mode (0: none)."""
        sample = region.sample
        start = sample.start + region.value(_START) + 32768 * region.value(_START_COARSE)
        end = sample.end + region.value(_END) + 32768 * region.value(_END_COARSE)
        start, end = max(start, 0), min(end, len(self._pcm))
        loop_start = sample.loop_start + region.value(_LOOP_START) + 32768 * region.value(_LOOP_START_COARSE)
        loop_end = sample.loop_end + region.value(_LOOP_END) + 32768 * region.value(_LOOP_END_COARSE)
        mode = region.value(_MODES) & 3
        loops = mode in (1, 3) and start <= loop_start < loop_end <= end
        return start, end, loop_start, loop_end, mode if loops else 0

    def _loudness(self, region: _Region, velocity: int) -> float:
        """Factor from the samples' integers to the level at which a note sounds."""
        # section 8.4.1: the default modulator from velocity is concave, 40 log10(127 / v) dB
        attenuation_db = max(region.value(_ATTENUATION), 0) / 10 + 40 * math.log10(127 / max(velocity, 1))
        return float(10 ** (-attenuation_db / 20) / 32768)

    # playing fast

    def render_low(
        self, notes: Sequence[Note], *, bank: int, program: int, samples: int, sample_rate_hz: int = 22050
    ) -> np.ndarray:
        """As :meth:`render`, several times as fast, for a rate whose upper half the caller throws away.

        What a low rate would fold back is filtered off each sample once, where :meth:`render` has to be called at a
        high rate; voices whose low-pass filter is the same share it; and a voice ends 65 dB below its beginning.
        """
        regions = self._regions(bank, program)
        voices = [
            (note, region)
            for note in sorted(notes, key=lambda n: n.onset_s)
            for region in regions
            if region.keys[0] <= note.key <= region.keys[1]
            and region.velocities[0] <= note.velocity <= region.velocities[1]
        ]
        onsets: dict[int, list[float]] = {}  # by exclusive class
        for note, region in voices:
            if exclusive := region.value(_EXCLUSIVE):
                onsets.setdefault(exclusive, []).append(note.onset_s)
        buses: dict[tuple[float, float] | None, np.ndarray] = {}  # by filter
        for note, region in voices:
            cut_s = math.inf
            if exclusive := region.value(_EXCLUSIVE):
                later = bisect_right(onsets[exclusive], note.onset_s)
                cut_s = onsets[exclusive][later] if later < len(onsets[exclusive]) else math.inf
            begin = round(note.onset_s * sample_rate_hz)
            if 0 <= begin < samples:
                voice = self._low_voice(note, region, samples - begin, sample_rate_hz, cut_s - note.onset_s)
                bus = self._filter(region, 2 * sample_rate_hz)  # a corner above what is kept is heard below it
                if bus not in buses:
                    buses[bus] = np.zeros(samples, np.float32)
                buses[bus][begin : begin + len(voice)] += voice
        open_bus = buses.pop(None, None)
        out = np.zeros(samples, np.float32) if open_bus is None else open_bus
        if buses:
            size = _smooth_size(samples + 1023)
            hz = np.fft.rfftfreq(size, 1 / sample_rate_hz)
            spectrum = np.zeros(len(hz), np.complex128)
            for bus, sound in buses.items():
                if bus is not None:
                    spectrum += np.fft.rfft(sound, size) * _two_pole_response(hz, *bus)
            out += np.fft.irfft(spectrum, size)[:samples].astype(np.float32)
        return out

    def _low_voice(self, note: Note, region: _Region, room: int, rate_hz: int, cut_s: float) -> np.ndarray:
        """One region sounding one note, before its low-pass filter; at most ``room`` samples, float32."""
        nothing = np.zeros(0, np.float32)
        key, velocity, step = self._tuned(note, region, rate_hz)
        start, end, loop_start, loop_end, mode = self._addresses(region)
        if end - start < 2:
            return nothing
        # the octave in which the sample is played says what of it can be kept
        octave = round(math.log2(step * rate_hz / region.sample.rate_hz))
        loop = (loop_start - start, loop_end - start) if mode == 1 else None
        pcm, into, length = self._prepared(start, end, loop, region.sample.rate_hz, octave, rate_hz)

        held = round(note.duration_s * rate_hz)
        release = max(region.seconds(_RELEASE), 0.005)
        total = min(room, held + math.ceil(release * rate_hz * _FAINT_DB / 100))
        if cut_s < math.inf:
            total = min(total, round((cut_s + _CUT_S) * rate_hz))
        if mode == 0:
            total = min(total, int((end - start - 1) / step))
        if total <= 0:
            return nothing
        position = np.arange(total) * step
        if mode == 1:
            beyond = int(np.searchsorted(position, into + length))
            position[beyond:] = into + (position[beyond:] - into) % length
        elif mode == 3:  # a loop until the release, and on to the end
            first, width = loop_start - start, loop_end - loop_start
            looped = min(held, total)
            beyond = int(np.searchsorted(position[:looped], loop_end - start))
            position[beyond:looped] = first + (position[beyond:looped] - first) % width
            position[looped:] += (position[looped - 1] - (looped - 1) * step) if looped else 0.0
            total = looped + int(np.searchsorted(position[looped:], end - start - 1))
            position = position[:total]
        index = position.astype(np.intp)
        fraction = (position - index).astype(np.float32)
        voice = pcm[index]
        voice += fraction * (pcm[index + 1] - voice)
        voice *= self._low_envelope(region, key, total, held, release, rate_hz)
        if cut_s < math.inf:
            tail = voice[max(0, total - round(_CUT_S * rate_hz)) :]
            tail *= np.linspace(1, 0, len(tail), dtype=np.float32)
        voice *= np.float32(self._loudness(region, velocity))
        return voice

    def _build_prepared(
        self, start: int, end: int, loop: tuple[int, int] | None, native_hz: int, octave: int, rate_hz: int
    ) -> tuple[np.ndarray, int, int]:
        """A sample as float32 without the treble that ``rate_hz`` would fold back; where its loop begins, its length.

        A loop is unrolled until the filter no longer meets what stands before it.
        """
        into = length = 0
        pcm = self._pcm[start:end].astype(np.float32)
        if loop is not None:
            into, length = loop[0], loop[1] - loop[0]
            turns = 1 + -(-_MARGIN // length)
            pcm = np.concatenate((pcm[: loop[1]], np.tile(pcm[loop[0] : loop[1]], turns + 1)))
            into += turns * length
        corner_hz = 0.36 * rate_hz * 2.0**-octave
        if corner_hz < 0.45 * native_hz:
            size = _smooth_size(len(pcm) + _MARGIN)
            hz = np.fft.rfftfreq(size, 1 / native_hz)
            keep = 0.5 + 0.5 * np.cos(np.pi * np.clip((hz / corner_hz - 0.9) / 0.25, 0, 1))
            pcm = np.fft.irfft(np.fft.rfft(pcm, size) * keep, size)[: len(pcm)].astype(np.float32)
        return np.append(pcm, pcm[-1:]), into, length

    def _low_envelope(
        self, region: _Region, key: int, total: int, held: int, release: float, rate_hz: int
    ) -> np.ndarray:
        """As :meth:`_envelope`, in single precision."""
        delay, attack = region.seconds(_DELAY), region.seconds(_ATTACK)
        top = delay + attack + region.seconds(_HOLD) * _by_key(key, region.value(_KEY_TO_HOLD))
        decay = region.seconds(_DECAY) * _by_key(key, region.value(_KEY_TO_DECAY))
        sustain_db = min(max(region.value(_SUSTAIN) / 10, 0.0), 100.0)
        per_db = math.log2(10) / 20
        t = np.arange(min(total, held), dtype=np.float32) / np.float32(rate_hz)
        gain: np.ndarray = np.exp2(np.clip((t - top) * (-100 * per_db / max(decay, 1e-4)), -per_db * sustain_db, 0))
        rising = int(np.searchsorted(t, delay + attack))
        gain[:rising] = np.clip((t[:rising] - delay) / max(attack, 1e-9), 0, 1)
        if held >= total:
            return gain
        since = np.arange(total - held, dtype=np.float32) / np.float32(rate_hz)
        last = gain[-1] if held else 0
        return np.concatenate((gain, last * np.exp2(since * (-100 * per_db / release))), dtype=np.float32)

    def _envelope(self, region: _Region, key: int, total: int, held: int, release: float, rate_hz: int) -> np.ndarray:
        """Volume envelope: linear attack, then straight lines in dB down to the sustain level and in the release."""
        t = np.arange(total) / rate_hz
        delay, attack = region.seconds(_DELAY), region.seconds(_ATTACK)
        hold = region.seconds(_HOLD) * _by_key(key, region.value(_KEY_TO_HOLD))
        decay = region.seconds(_DECAY) * _by_key(key, region.value(_KEY_TO_DECAY))
        sustain_db = min(max(region.value(_SUSTAIN) / 10, 0.0), 100.0)
        top = delay + attack
        level_db = np.minimum(np.maximum(t - top - hold, 0.0) * 100 / max(decay, 1e-4), sustain_db)
        gain = 10 ** (-level_db / 20)
        rising = t < top
        gain[rising] = np.clip((t[rising] - delay) / max(attack, 1e-9), 0, 1)
        if held < total:
            last = gain[held - 1] if held else 0.0
            gain[held:] = last * 10 ** (-(t[held:] - held / rate_hz) * 5 / release)
        return gain

    def _filter(self, region: _Region, rate_hz: int) -> tuple[float, float] | None:
        """Corner (Hz) and Q of the two-pole filter, held still: where its envelope moves the corner, at the level that
        it settles on. None where it leaves all of it."""
        sustain = 1 - min(max(region.value(_MOD_SUSTAIN) / 1000, 0.0), 1.0)
        cents = region.value(_FILTER_HZ) + region.value(_MOD_TO_FILTER) * max(sustain, 0.5)
        corner_hz = 8.176 * 2.0 ** (min(max(cents, 1500), 13500) / 1200)
        if corner_hz > 0.3 * rate_hz:
            return None
        return corner_hz, 10 ** ((min(max(region.value(_FILTER_Q), 0), 960) / 10 - 3.01) / 20)


def _two_poles(sound: np.ndarray, corner_hz: float, q: float, rate_hz: int) -> np.ndarray:
    size = 1 << (len(sound) + 1023).bit_length()
    response = _two_pole_response(np.fft.rfftfreq(size, 1 / rate_hz), corner_hz, q)
    return np.fft.irfft(np.fft.rfft(sound, size) * response, size)[: len(sound)]


def _two_pole_response(hz: np.ndarray, corner_hz: float, q: float) -> np.ndarray:
    ratio = hz / corner_hz
    response: np.ndarray = 1 / (1 - ratio**2 + 1j * ratio / q) / max(1.0, math.sqrt(q))
    return response


def _smooth_size(length: int) -> int:
    """A size at or a little above it of which a Fourier transform is fast: 2, 3 and 5 are its only prime factors."""
    odds: list[int] = [3**a * 5**b for a in range(4) for b in range(4)]
    return min(odd << max(0, (-(-length // odd) - 1).bit_length()) for odd in odds)


def _text(name: bytes) -> str:
    return name.split(b"\0")[0].decode("latin-1")


def _range(value: int | None) -> tuple[int, int]:
    return (0, 127) if value is None else (value & 0xFF, value >> 8)


def _by_key(key: int, cents_per_key: int) -> float:
    """Factor on a duration for a key's distance from key 60; the specification's range is ±1200 cents a key."""
    return float(2.0 ** ((60 - key) * min(max(cents_per_key, -1200), 1200) / 1200))


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])

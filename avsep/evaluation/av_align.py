"""AV-Align: whether a sound begins when something moves. It needs no reference, only the pictures.

The score is the intersection over the union of two lists of moments: the onsets of the sound and the peaks of the
motion, which are the same moment where they lie closer than a frame. Source: Yariv et al., Diverse and Aligned
Audio-to-Video Generation via Text-to-Video Model Adaptation, AAAI 2024, where it is of videos made for a sound; here it
is of sounds that were separated by what is seen.

Unlike there, motion is the mean absolute difference of successive frames, no optical flow, and a peak of motion is
taken by one onset at most, so that the score cannot exceed 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avsep.errors import DataError

if TYPE_CHECKING:
    import torch

    from avsep.data.protocol import TestMixture
    from avsep.data.store import Store
    from avsep.separator import Separator

__all__ = ["LEAST_RATE_HZ", "agreement", "av_align", "mean_agreement", "motion_peaks", "onsets"]

LEAST_RATE_HZ = 8.0
"""Frames a second below which movements cannot be told apart."""

_Times = NDArray[np.float64]
_WINDOW_S, _HOP_S = 0.046, 0.01  # of the spectra
_BANDS, _LOWEST_HZ = 24, 60.0  # evenly spaced in log frequency
_FLOOR_DB = -60.0  # of a band's level, relative to the loudest
_LEAST_DB = 0.5  # that bands must rise by on average: a steady tone's do not
_NEAR_S, _AROUND_S, _ABOVE = 0.03, 0.1, 0.07  # of a peak: the largest so near, and so much above the mean around it


def onsets(audio: ArrayLike, rate_hz: int) -> _Times:
    """The moments in seconds at which sounds begin in ``audio`` [L].

    Peaks of the spectral flux: by how many dB 24 bands of frequencies rise from one moment to the next, on average,
    relative to the most that they do. A peak is the largest within 30 ms, and by 0.07 above the mean within 100 ms
    (Böck, Krebs and Schedl, Evaluating the Online Capabilities of Onset Detection Methods, ISMIR 2012). What sounds
    already when the recording begins has no onset.
    """
    samples = np.asarray(audio, dtype=np.float64)
    size, hop = max(2, round(_WINDOW_S * rate_hz)), max(1, round(_HOP_S * rate_hz))
    if len(samples) < size + 2 * hop:
        return np.empty(0)
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2
    edges = np.geomspace(_LOWEST_HZ, rate_hz / 2, _BANDS, endpoint=False) * size / rate_hz
    power = np.add.reduceat(power, np.unique(edges.astype(int)), axis=1)
    if not power.max() > 0:
        return np.empty(0)
    level = (10 * np.log10(np.maximum(power / power.max(), 1e-30))).clip(min=_FLOOR_DB)
    flux = np.maximum(np.diff(level, axis=0), 0).mean(axis=1)
    if flux.max() < _LEAST_DB:
        return np.empty(0)
    most = flux.max()
    flux = flux / most
    near, around = round(_NEAR_S / _HOP_S), round(_AROUND_S / _HOP_S)
    highest = _around(flux, near).max(axis=1)
    mean = np.nanmean(_around(flux, around, math.nan), axis=1)
    peaks = np.flatnonzero((flux >= highest) & (flux >= mean + _ABOVE) & (flux >= _LEAST_DB / most))
    peaks = peaks[np.diff(peaks, prepend=-near - 1) > near]  # of equal ones the first
    # in dB a sound shows as soon as a window reaches it: between the ends of windows k and k + 1
    return np.asarray(((peaks + 0.5) * hop + size) / rate_hz, dtype=np.float64)


def _around(values: NDArray[np.float64], reach: int, beyond: float = -math.inf) -> NDArray[np.float64]:
    """[n] -> [n, 2 reach + 1], each value with its neighbours."""
    padded = np.pad(values, reach, constant_values=beyond)
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)


def motion_peaks(frames: ArrayLike, rate_hz: float) -> _Times:
    """The moments in seconds at which frames [M, C, H, W] change most: every local maximum of the mean absolute
    difference of a frame and the one before it. Frame i covers the seconds [i, i + 1) / ``rate_hz``."""
    pictures = np.asarray(frames)
    change = np.array([np.abs(b.astype(np.float32) - a).mean() for a, b in itertools.pairwise(pictures)])
    inner = change[1:-1]
    peaks = np.flatnonzero((change[:-2] < inner) & (inner > change[2:])) + 1 if len(change) > 2 else np.empty(0)
    return np.asarray((peaks + 1) / rate_hz, dtype=np.float64)  # from frame i to i + 1: where the second begins


def agreement(first: ArrayLike, second: ArrayLike, window_s: float) -> float:
    """Intersection over union of two lists of moments in seconds, in any order; NaN where both are empty.

    Two moments less than ``window_s`` apart are the same; each is matched once at most, as many as can be.
    """
    ones, others = np.sort(np.asarray(first, dtype=np.float64)), np.sort(np.asarray(second, dtype=np.float64))
    if not len(ones) and not len(others):
        return math.nan
    matched = place = 0
    for moment in ones:
        while place < len(others) and others[place] <= moment - window_s:
            place += 1
        if place < len(others) and others[place] < moment + window_s:
            matched += 1
            place += 1
    return matched / (len(ones) + len(others) - matched)


def av_align(
    audio: ArrayLike, rate_hz: int, frames: ArrayLike, frame_rate_hz: float, *, window_s: float | None = None
) -> float:
    """How well the onsets of ``audio`` [L] agree with the motion in ``frames`` [M, C, H, W]: 0 to 1, NaN where nothing
    begins and nothing moves.

    ``window_s``: how far apart the same moment may lie (default: a frame). Raises ValueError below 8 frames a second.
    """
    if frame_rate_hz < LEAST_RATE_HZ:
        raise ValueError(f"motion takes {LEAST_RATE_HZ:g} frames a second or more, got {frame_rate_hz:g}")
    window = 1 / frame_rate_hz if window_s is None else window_s
    return agreement(onsets(audio, rate_hz), motion_peaks(frames, frame_rate_hz), window)


def mean_agreement(
    separator: Separator,
    store: Store,
    mixtures: Sequence[TestMixture],
    *,
    count: int = 60,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Mean AV-Align over the sources of at most ``count`` of the ``mixtures``, evenly chosen among those of the
    headline: of what is ``separated``, and beside it of the ``mixture`` and the true sources (``reference``).

    ``mixtures`` is their number. Empty for a store whose motion frames are too few a second or not there.
    """
    # here, so that the page of a bundle's user, who has no torch, can have the score of one sound
    from avsep.data.protocol import evenly
    from avsep.evaluation.scores import evaluate_separator, is_headline
    from avsep.types import VisualSource

    chosen = evenly([m for m in mixtures if is_headline({"list": m.list_name}) and m.counted], count)
    if store.motion_rate_hz < LEAST_RATE_HZ or not chosen:
        return {}
    front_end, by_id = separator.spec.front_end, {clip.id: clip for clip in store.clips}
    source = VisualSource(role="motion", kind="frames")
    found: dict[str, list[float]] = {"separated": [], "mixture": [], "reference": []}
    done = 0
    for first in range(0, len(chosen), batch_size):
        group = chosen[first : first + batch_size]
        scores = evaluate_separator(
            separator,
            store,
            group,
            batch_size=batch_size,
            device=device,
            keep=range(len(group)),
            interference=False,
        )
        for mixture, score in zip(group, scores, strict=True):
            assert score.kept is not None
            for n, place in enumerate(mixture.asked):
                centre_s = (mixture.starts[place] + front_end.clip_samples // 2) / front_end.sample_rate_hz
                if not store.has_pictures(by_id[mixture.clips[place]]):
                    continue
                try:
                    frames = store.read_visual(
                        by_id[mixture.clips[place]], source, centre_s=centre_s, duration_s=front_end.clip_s
                    )
                except DataError:
                    return {}
                sounds = (score.kept.estimates[n], score.kept.mixture, score.kept.references[n])
                for values, sound in zip(found.values(), sounds, strict=True):
                    values.append(av_align(sound, front_end.sample_rate_hz, frames, store.motion_rate_hz))
        done += len(group)
        if progress is not None:
            progress(done, len(chosen))
    means = {name: _mean(values) for name, values in found.items()}
    return {"mixtures": len(chosen), **means}


def _mean(values: Sequence[float]) -> float | None:
    known = [v for v in values if math.isfinite(v)]
    return float(np.mean(known)) if known else None

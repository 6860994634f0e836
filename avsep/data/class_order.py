"""Orders in which a store's classes are learned, by how much they are like each other.

What a method keeps depends on the order of the classes, and one order alone says little of it. Beside the store's own
and random ones there are two that differ on purpose: chains from the most central class to those like it (``near``),
and to those unlike it (``far``). Neither may be chosen by a test score.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avsep.data.protocol import centre_start, evenly
from avsep.data.store import Clip, Store
from avsep.errors import ConfigError, near_matches

__all__ = ["ORDERS", "chain", "class_order", "class_vectors", "cosine_distances"]

ORDERS = {
    "store": "the store's own",
    "near": "from the most central class on, always the one most like those before",
    "far": "from the most central class on, always the one least like those before",
    "random:SEED": "shuffled",
}
SPECTRUM = "spectrum"
"""The name under which classes are compared by what they sound like."""

_MOST_CLIPS = 24  # of a class
_SECONDS = 3
_WINDOW = 1024
_BANDS, _LOWEST_HZ = 64, 60.0


def class_order(store: Store, order: str = "store") -> tuple[str, ...]:
    """The store's classes in an order of :data:`ORDERS`.

    ``near`` and ``far`` compare the classes' mean features (:func:`class_vectors`), those that the store has of objects
    or, where it has none, its spectra; ``near:NAME`` says which, with ``near:spectrum`` the spectra.

    Raises:
        ConfigError: an unknown order or feature, a seed that is no whole number, or features of a motion.
    """
    kind, sign, detail = order.partition(":")
    if kind not in ("store", "near", "far", "random") or (kind == "store" and sign):
        raise ConfigError(f"no order of classes '{order}': {near_matches(order, ORDERS)}")
    if kind == "store":
        return store.classes
    if kind == "random":
        if not detail.isdecimal():
            raise ConfigError(f"'{order}' has no seed: write it as random:1")
        rng = np.random.Generator(np.random.Philox(int(detail)))
        return tuple(store.classes[number] for number in rng.permutation(len(store.classes)))
    of_objects = [name for name, feature in store.features.items() if feature["role"] == "object"]
    if detail and detail not in (*of_objects, SPECTRUM):
        raise ConfigError(
            f"{store.path} has no object features '{detail}' to compare its classes by: it has "
            f"{', '.join((*of_objects, SPECTRUM))}"
        )
    features = detail or (of_objects or [SPECTRUM])[0]
    distances = cosine_distances(class_vectors(store, features))
    return tuple(store.classes[number] for number in chain(distances, "near" if kind == "near" else "far"))


def chain(distances: ArrayLike, kind: Literal["near", "far"]) -> list[int]:
    """The numbers of the classes in a greedy chain by their ``distances`` [Q, Q].

    It begins with the class whose mean distance to all is least. Then follows always the one whose mean distance to
    those before it is least (``near``) or greatest (``far``); of equal ones the first.
    """
    matrix = np.asarray(distances, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"distances must be square [Q, Q], got {matrix.shape}")
    if not len(matrix):
        return []
    placed = [int(matrix.mean(axis=1).round(12).argmin())]  # rounded: the order of a sum decides no tie
    while len(placed) < len(matrix):
        means = matrix[:, placed].mean(axis=1).round(12) * (1 if kind == "near" else -1)
        means[placed] = np.inf
        placed.append(int(means.argmin()))
    return placed


def cosine_distances(vectors: ArrayLike) -> NDArray[np.float64]:
    """1 less the cosine similarity of every two rows, [Q, D] -> [Q, Q]; 1 to a row of zeros."""
    rows = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    distances: NDArray[np.float64] = 1 - unit @ unit.T
    np.fill_diagonal(distances, 0.0)
    return distances


def class_vectors(store: Store, features: str = SPECTRUM) -> NDArray[np.float64]:
    """The mean over training clips of each class, [Q, D], of at most 24 clips a class, evenly chosen.

    Of stored object ``features`` the mean over a clip's frames; of the ``spectrum`` the level in dB of 64 bands, evenly
    spaced in log frequency, in the clip's middle seconds, less the mean over classes.
    """
    rows = []
    for name in store.classes:
        clips = evenly(store.select(classes=[name], split="train"), _MOST_CLIPS)
        if not clips:
            raise ConfigError(f"class '{name}' has no training clip in {store.path}: nothing says what it is like")
        if features == SPECTRUM:
            rows.append(np.mean([_spectrum(store, clip) for clip in clips], axis=0))
        else:
            means = [np.asarray(store.timeline(clip).features[features], np.float64).mean(axis=0) for clip in clips]
            rows.append(np.mean(means, axis=0))
    vectors: NDArray[np.float64] = np.stack(rows)
    return vectors - vectors.mean(axis=0) if features == SPECTRUM else vectors


def _spectrum(store: Store, clip: Clip) -> NDArray[np.float64]:
    """[bands] in dB, relative to the loudest."""
    rate_hz = store.sample_rate_hz
    length = max(_WINDOW, _SECONDS * rate_hz)
    sound = store.read_crop(clip, centre_start(clip, rate_hz, length), length).astype(np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(sound, _WINDOW)[:: _WINDOW // 2] * np.hanning(_WINDOW)
    power = (np.abs(np.fft.rfft(frames, axis=1)) ** 2).mean(axis=0)
    edges = np.geomspace(_LOWEST_HZ, rate_hz / 2, _BANDS + 1) * _WINDOW / rate_hz
    bands = np.interp(edges, np.arange(len(power) + 1), np.concatenate(([0.0], np.cumsum(power))))
    level = np.diff(bands) / np.diff(edges)
    return np.asarray(10 * np.log10(np.maximum(level / max(level.max(), 1e-30), 1e-6)), dtype=np.float64)

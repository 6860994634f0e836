"""Measures of continual learning from the task matrix R, where R[t, j] is the score on task j after learning task t.

``matrix`` is [T, T], or [..., T, T] where several are given at once; entries above the diagonal (tasks not yet learned)
are NaN and are never read. Higher is better.
Staleness is of another matrix, I, where I[j, k] is the score of task j's sources beside sources of task k, after the
last task (:func:`avsep.evaluation.scores.interference_matrix`).
Sources: average and backward transfer, Lopez-Paz and Ranzato, NeurIPS 2017, equations 2 and 3 (the average here is over
the tasks seen); forgetting and intransigence, Chaudhry et al., ECCV 2018, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "ContinualScores",
    "Interval",
    "area_under_memory_curve",
    "average",
    "backward_transfer",
    "backward_transfer_per_task",
    "continual_scores",
    "forgetting",
    "forgetting_per_task",
    "intransigence",
    "mean_average",
    "paired_bootstrap",
    "percentile_interval",
    "resampling_weights",
    "staleness",
    "staleness_per_task",
]


def _matrix(matrix: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim < 2 or array.shape[-1] != array.shape[-2] or not array.size:
        raise ValueError(f"the task matrix must be square [T, T], got {array.shape}")
    return array


def average(matrix: ArrayLike) -> NDArray[np.float64]:
    """[..., T]: A_t = mean of R[t, j] over j <= t."""
    array = _matrix(matrix)
    return np.stack([array[..., t, : t + 1].mean(axis=-1) for t in range(array.shape[-1])], axis=-1)


def mean_average(matrix: ArrayLike) -> float:
    """The mean of A_t over all steps."""
    return float(average(matrix).mean())


def forgetting_per_task(matrix: ArrayLike) -> NDArray[np.float64]:
    """[..., T - 1]: for each earlier task j, max over j <= l < T-1 of R[l, j], less R[T-1, j]."""
    array = _matrix(matrix)
    last = array.shape[-1] - 1
    lost = np.empty((*array.shape[:-2], last))
    for j in range(last):
        lost[..., j] = array[..., j:last, j].max(axis=-1) - array[..., last, j]
    return lost


def forgetting(matrix: ArrayLike) -> float:
    """Mean of :func:`forgetting_per_task`; NaN with one task. Negative when old tasks improved."""
    lost = forgetting_per_task(matrix)
    return float(lost.mean()) if lost.size else math.nan


def backward_transfer_per_task(matrix: ArrayLike) -> NDArray[np.float64]:
    """[..., T - 1]: R[T-1, j] - R[j, j] for each earlier task j."""
    array = _matrix(matrix)
    learned = np.diagonal(array, axis1=-2, axis2=-1)
    return array[..., -1, :-1] - learned[..., :-1]


def backward_transfer(matrix: ArrayLike) -> float:
    """Mean of :func:`backward_transfer_per_task`; NaN with one task. Negative when old tasks got worse."""
    moved = backward_transfer_per_task(matrix)
    return float(moved.mean()) if moved.size else math.nan


def staleness_per_task(interference: ArrayLike) -> NDArray[np.float64]:
    """[..., T - 1]: for each task j but the last, the mean of I[j, k] over k > j, less that over k <= j.

    How much worse a task's sources are parted from those that were learned later than from those that were known by
    then. It also says what no method that leaves old parameters alone can gain: these have heard nothing of what came
    later. Some classes are hard beside others whatever was learned when, so it means something beside the gap of joint
    training, or of a yardstick, on the same mixtures. What was not scored (NaN) is left out of the means; NaN where
    nothing is left on a side.
    """
    array = _matrix(interference)
    tasks = range(array.shape[-1] - 1)
    gaps = [_known_mean(array[..., j, j + 1 :]) - _known_mean(array[..., j, : j + 1]) for j in tasks]
    return np.stack(gaps, axis=-1) if gaps else np.empty((*array.shape[:-2], 0))


def staleness(interference: ArrayLike) -> NDArray[np.float64]:
    """[...]: the mean of :func:`staleness_per_task` over the tasks that have a gap; NaN where none has."""
    return _known_mean(staleness_per_task(interference))


def _known_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the last axis of what is no NaN; NaN of nothing."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=-1) / known.sum(axis=-1), dtype=np.float64)


def intransigence(matrix: ArrayLike, joint: ArrayLike) -> NDArray[np.float64]:
    """[..., T]: R_joint[t, t] - R[t, t], what learning step by step costs on the newest task."""
    array, upper = _matrix(matrix), _matrix(joint)
    if array.shape != upper.shape:
        raise ValueError(f"the matrices have different shapes: {array.shape} and {upper.shape}")
    return np.diagonal(upper, axis1=-2, axis2=-1) - np.diagonal(array, axis1=-2, axis2=-1)


def area_under_memory_curve(memory_bytes: ArrayLike, scores: ArrayLike) -> float:
    """One number for a method at several budgets: its mean score over the logarithm of the bytes that it keeps.

    The area under the straight lines between the points, over log bytes, divided by their range, so that it is in the
    scores' own unit and does not depend on the base of the logarithm. Source: the memory-agnostic measure of Zhou et
    al., Class-Incremental Learning: A Survey, IEEE TPAMI 2024, where the area is not divided. Only areas over one range
    of bytes can be compared.

    Args:
        memory_bytes: [n], in any order, all positive and at least two of them different.
        scores: [n], the score at each budget; of several at one budget the mean counts.

    Raises:
        ValueError: the budgets are not such.
    """
    budgets, heights = np.asarray(memory_bytes, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if budgets.ndim != 1 or budgets.shape != heights.shape:
        raise ValueError(f"{budgets.size} budgets cannot be paired with {heights.size} scores")
    if not (budgets > 0).all() or len(np.unique(budgets)) < 2:
        raise ValueError(f"a curve takes at least two different budgets above 0 bytes, got {budgets.tolist()}")
    places, members = np.unique(np.log(budgets), return_inverse=True)
    means = np.bincount(members, weights=heights) / np.bincount(members)
    return float((np.diff(places) * (means[1:] + means[:-1]) / 2).sum() / (places[-1] - places[0]))


@dataclass(frozen=True)
class ContinualScores:
    """All measures of one matrix; ``intransigence`` is None without a joint run, the staleness without the scores by
    pairs of tasks."""

    average: tuple[float, ...]
    mean_average: float
    forgetting: float
    forgetting_per_task: tuple[float, ...]
    backward_transfer: float
    intransigence: tuple[float, ...] | None = None
    staleness: float | None = None
    staleness_per_task: tuple[float, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if value is None or math.isnan(value) else value


def continual_scores(
    matrix: ArrayLike, joint: ArrayLike | None = None, interference: ArrayLike | None = None
) -> ContinualScores:
    """Every measure of ``matrix`` [T, T] at once; of ``interference`` [T, T] the staleness."""
    return ContinualScores(
        average=tuple(average(matrix).tolist()),
        mean_average=mean_average(matrix),
        forgetting=forgetting(matrix),
        forgetting_per_task=tuple(forgetting_per_task(matrix).tolist()),
        backward_transfer=backward_transfer(matrix),
        intransigence=None if joint is None else tuple(intransigence(matrix, joint).tolist()),
        staleness=None if interference is None else float(staleness(interference)),
        staleness_per_task=None if interference is None else tuple(staleness_per_task(interference).tolist()),
    )


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def resampling_weights(sizes: Sequence[int], *, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each thing is drawn when every group is resampled with replacement to its own size.

    Yields blocks [r, sum of ``sizes``] of whole numbers, ``resamples`` rows in all, the groups side by side; no group
    may be empty.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    step = max(1, 2_000_000 // max(1, sum(sizes)))  # a bounded block
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        groups = []
        for size in sizes:
            drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
            groups.append(np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size))
        yield np.concatenate(groups, axis=1).astype(np.float64)


def percentile_interval(mean: float, resampled: ArrayLike, confidence: float) -> Interval:
    """``mean`` with the quantiles of ``resampled`` [n] that leave out (1 - ``confidence``) / 2 on either side.

    A resample in which nothing could be scored (NaN) is left out.
    """
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(np.asarray(resampled, dtype=np.float64), [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def paired_bootstrap(
    scores: ArrayLike,
    baseline: ArrayLike | None = None,
    *,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of mean(scores - baseline), resampling what was scored for both together.

    ``scores`` and ``baseline`` [n] are two systems' scores of the same things in the same order (no baseline: zero).
    ``groups`` [n] names the mixture each score comes from; whole mixtures are then resampled, for the sources of a
    mixture share their fate. Pairs with a NaN on either side are left out. Source: Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 13. Raises ValueError when the lengths differ or nothing is left.
    """
    difference = np.asarray(scores, dtype=np.float64)
    if difference.ndim != 1:
        raise ValueError(f"scores must be a list of numbers, got shape {difference.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if baseline is not None:
        other = np.asarray(baseline, dtype=np.float64)
        if other.shape != difference.shape:
            raise ValueError(f"{len(difference)} scores cannot be paired with {other.size}")
        difference = difference - other
    names = np.arange(len(difference)) if groups is None else np.asarray(groups)
    if len(names) != len(difference):
        raise ValueError(f"{len(difference)} scores but {len(names)} group names")
    kept = np.isfinite(difference)
    if not kept.any():
        raise ValueError("no pair of finite scores to resample")
    difference = difference[kept]
    _, members = np.unique(names[kept], return_inverse=True)
    sums = np.bincount(members, weights=difference)
    counts = np.bincount(members)
    drawn = resampling_weights([len(sums)], resamples=resamples, seed=seed)
    means = np.concatenate([(weights @ sums) / (weights @ counts) for weights in drawn])
    return percentile_interval(float(difference.mean()), means, confidence)

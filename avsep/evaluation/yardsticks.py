"""What any separator has to be held against: the mixture as it is, a fixed filter for each class, and the ideal mask.

The static filter knows how much of each frequency a class has on average and nothing else: its mask for the classes
that are asked for is the ratio of their mean magnitude spectra, the same at all times. It has no network and sees no
picture; two sources of one class get equal halves. What a separator gains over it is what it hears and sees in the
mixture at hand. The ideal mask is the ratio mask of the true sources, clamped into (0, 1), with the mixture's phase:
what masks on this grid can reach.

All are scored on the mixtures of the protocol, by the SDR of :func:`avsep.evaluation.bss.bss_eval` and the SI-SDR.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avsep.data.mixing import load_mixtures
from avsep.data.protocol import TestMixture, centre_start, evenly
from avsep.data.store import Clip, Store
from avsep.dsp import FrontEnd
from avsep.errors import DataError
from avsep.evaluation.bss import SILENCE, sdr_alone, si_sdr
from avsep.evaluation.scores import (
    METRICS,
    MixtureScore,
    SourceScore,
    batches,
    is_counted,
    is_headline,
    level_db,
    pattern,
    rows_of,
    rows_of_task,
    sounds,
)
from avsep.spec import FrontEndSpec

__all__ = [
    "YARDSTICKS",
    "StaticFilter",
    "absent_levels",
    "ideal_logits",
    "measure",
    "rows_of_yardstick",
    "sdr_by_list",
    "sdr_by_task",
    "yardstick_identity",
]

YARDSTICKS = {
    "mixture": "the mixture itself, taken for every source",
    "static filter": "a ratio mask from each class's mean spectrum over training clips: no network, no picture",
    "ideal mask": "the ratio mask of the true sources, with the mixture's phase",
}
VERSION = 1
CROPS = 24  # of a class's training clips
_EPSILON = 1e-6  # of masks before the logit


@dataclass(frozen=True)
class StaticFilter:
    """The mean magnitude spectrum [F] of each class on the log-frequency grid."""

    spectra: Mapping[str, np.ndarray]

    @classmethod
    def fit(
        cls,
        store: Store,
        classes: Sequence[str],
        front_end: FrontEnd,
        *,
        split: str = "train",
        crops: int = CROPS,
    ) -> StaticFilter:
        """Over at most ``crops`` crops a class, spread evenly over its clips of ``split`` and over each clip.

        Raises :class:`DataError` for a class without a clip.
        """
        length = front_end.spec.clip_samples
        spectra = {}
        for name in classes:
            clips = store.select(classes=[name], split=split)
            if not clips:
                raise DataError(f"class '{name}' has no {split} clip in {store.path}: a static filter needs one")
            total, count = torch.zeros(front_end.spec.log_rows, dtype=torch.float64), 0
            for clip, start in _even_crops(clips, store.sample_rate_hz, length, crops):
                crop = torch.from_numpy(store.read_crop(clip, start, length).copy())
                magnitude = front_end.warp(front_end.stft(crop[None, None]).abs())[0, 0]  # [F, T]
                total += magnitude.double().mean(dim=-1)
                count += 1
            spectra[name] = (total / count).numpy()
        return cls(spectra)

    def logits(self, classes: Sequence[Sequence[str]], frames: int) -> Tensor:
        """The logits [B, N, F, T] of the masks for the asked classes of B mixtures."""
        spectra = np.stack([np.stack([self.spectra[name] for name in names]) for names in classes])  # [B, N, F]
        total = spectra.sum(axis=1, keepdims=True)
        shares = np.divide(spectra, total, out=np.full_like(spectra, 1 / spectra.shape[1]), where=total > 0)
        logits = torch.logit(torch.from_numpy(shares).float(), eps=_EPSILON)
        return logits[..., None].expand(-1, -1, -1, frames)


def _even_crops(clips: Sequence[Clip], rate_hz: int, length: int, count: int) -> list[tuple[Clip, int]]:
    """At most ``count`` (clip, first sample), evenly over the clips; several of a clip do not overlap."""
    if len(clips) >= count:
        return [(c, centre_start(c, rate_hz, length)) for c in evenly(clips, count)]
    found = []
    for place, clip in enumerate(clips):
        share = (place + 1) * count // len(clips) - place * count // len(clips)
        fitting = max(1, min(share, clip.samples // length))
        if fitting == 1:
            found.append((clip, centre_start(clip, rate_hz, length)))
        else:
            found += [(clip, k * (clip.samples - length) // (fitting - 1)) for k in range(fitting)]
    return found


def ideal_logits(ratio: Tensor) -> Tensor:
    """Ratio masks [B, N, F, T] -> the logits of the masks clamped into (0, 1)."""
    return torch.logit(ratio, eps=_EPSILON)


def yardstick_identity(spec: FrontEndSpec, task: int, whose: str, store_hash: str) -> dict[str, Any]:
    """What two measurements must share for one to stand for the other. ``whose`` training clips the static filter is
    of: the ``run``'s or the ``tested`` store's."""
    grid = hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    return {
        "version": VERSION,
        "task": task,
        "front_end": grid,
        "filter": {"whose": whose, "store_hash": store_hash, "crops": CROPS},
    }


def measure(
    mixtures: Sequence[TestMixture],
    store: Store,
    spec: FrontEndSpec,
    static: StaticFilter | None,
    *,
    task_of: Mapping[str, int] | None = None,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """One row a yardstick and source (:func:`avsep.evaluation.scores.rows_of`, with ``yardstick``), numbered as
    ``mixtures`` are. SIR and SAR are left out, and without a ``static`` filter its rows."""
    front_end = FrontEnd(spec)
    length = (spec.frames - 1) * spec.hop
    classes = sorted({m.classes[place] for m in mixtures for place in m.asked})
    class_index = {name: number for number, name in enumerate(classes)}
    scores: dict[str, list[MixtureScore]] = {n: [] for n in YARDSTICKS if n != "static filter" or static is not None}
    with torch.no_grad():
        for _, group in batches(mixtures, batch_size):
            batch = load_mixtures(store, group, spec, (), class_index)
            _, sounding, background = pattern(group[0])
            parts = batch.sources
            if batch.background is not None:
                parts = torch.cat((parts, batch.background[:, None]), dim=1)
            made = front_end.analyse(parts)
            assert made.ratio is not None
            ratio = made.ratio[:, :-1] if background else made.ratio
            mixed = batch.mixture[..., :length]
            sounds_of = {
                "mixture": mixed[:, None].expand(-1, ratio.shape[1], -1),
                "ideal mask": front_end.synthesise(ideal_logits(ratio), made.mixture, length=length),
            }
            if static is not None:
                asked = [[m.classes[place] for place in m.asked] for m in group]
                filtered = static.logits(asked, made.mixture.shape[-1])
                sounds_of["static filter"] = front_end.synthesise(filtered, made.mixture, length=length)
            estimates = torch.stack([sounds_of[name] for name in scores], dim=1)  # [B, E, N, L]
            heard = batch.sources[:, sounding, :length]
            found = sdr_alone(heard, estimates[:, :, sounding])
            quiet = (heard.abs().sum(dim=-1, dtype=torch.float64) <= SILENCE).any(dim=1).tolist()
            for e, name in enumerate(scores):
                invariant = si_sdr(heard, estimates[:, e, sounding])
                levels = level_db(estimates[:, e], mixed)
                for b, mixture in enumerate(group):
                    sources = []
                    for n, place in enumerate(mixture.asked):
                        at = sounding.index(n) if n in sounding else None
                        sources.append(
                            SourceScore(
                                clip=mixture.clips[place],
                                class_name=mixture.classes[place],
                                task=mixture.task if task_of is None else task_of[mixture.classes[place]],
                                sdr=math.nan if at is None else found[b, e, at].item(),
                                sir=math.nan,
                                sar=math.nan,
                                si_sdr=math.nan if at is None else invariant[b, at].item(),
                                sdr_mixture=math.nan if at is None else found[b, 0, at].item(),
                                role=mixture.role(place),
                                level_db=levels[b, n].item(),
                            )
                        )
                    status = "silent_reference" if quiet[b] else "ok"
                    scores[name].append(MixtureScore(mixture, tuple(sources), status))
            if progress is not None:
                progress(len(group))
    return [{"yardstick": name, **row} for name, members in scores.items() for row in rows_of(members)]


# --- reading them -----------------------------------------------------------------------------------------------------


def rows_of_yardstick(
    evaluation: Mapping[str, Any], name: str, step: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A yardstick's rows in an ``evaluation.json``; with ``step``, one of its ``after``, those of the sources that were
    scored there. None of a file without yardsticks."""
    rows = [r for r in (evaluation.get("yardsticks") or {}).get("rows", ()) if r["yardstick"] == name]
    if step is None:
        return rows
    scored = {(r["list"], r["mixture"], r["clip"]) for r in step["rows"]}
    return [r for r in rows if (r["list"], r["mixture"], r["clip"]) in scored]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    columns = {m: [r[m] for r in rows if is_counted(r) and r[m] is not None] for m in METRICS}
    return {m: float(np.mean(v)) if v else None for m, v in columns.items()}


def sdr_by_list(evaluation: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Mean SDR in dB of each yardstick, by list of ``step`` and ``all`` over the headline; empty without any."""
    found = {}
    for name in YARDSTICKS:
        rows = rows_of_yardstick(evaluation, name, step)
        if rows:
            lists = dict.fromkeys(r["list"] for r in rows)
            found[name] = {key: _means([r for r in rows if r["list"] == key])["sdr"] for key in lists}
            found[name]["all"] = _means([r for r in rows if is_headline(r)])["sdr"]
    return found


def absent_levels(evaluation: Mapping[str, Any], step: Mapping[str, Any], name: str) -> dict[str, float]:
    """The median level in dB of what a yardstick gives for absent sources, by the lists of ``step`` that have any."""
    found: dict[str, list[float]] = {}
    for row in rows_of_yardstick(evaluation, name, step):
        if not sounds(row):
            found.setdefault(row["list"], []).append(row["level_db"])
    return {key: float(np.median(levels)) for key, levels in found.items()}


def sdr_by_task(evaluation: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Mean SDR in dB of each yardstick on the test mixtures of each scored task, as a line of the task matrix."""
    if not evaluation.get("after"):
        return {}
    step = evaluation["after"][-1]
    found = {}
    for name in YARDSTICKS:
        rows = rows_of_yardstick(evaluation, name, step)
        if rows:
            lines = [[r["sdr"] for r in rows_of_task(rows, j)] for j in range(step["task"] + 1)]
            found[name] = [float(np.mean(line)) if line else None for line in lines]
    return found

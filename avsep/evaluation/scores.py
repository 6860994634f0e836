"""Scores of a separator on frozen test mixtures, their rows and what they come to.

After the published evaluation (Pian et al., NeurIPS 2024): the mixture's phase, estimates clipped to ±1 and cut to
(frames - 1) x hop samples (65,280), references cut likewise, BSS-eval v3 without a search over permutations, mixtures
with a silent signal skipped. Unlike it, skipped mixtures are counted, and mixtures of a clip with itself or with its
own class are kept out of the means and reported beside them.

Of a mixture whose clips have roles (:data:`avsep.data.protocol.ROLES`) the sources that are asked for are separated.
Those that sound are scored against their references, with what sounds unasked as one more reference; of an absent one
the level of what comes out is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avsep.data.mixing import load_mixtures
from avsep.data.protocol import APART, TestMixture
from avsep.data.store import Store
from avsep.errors import ConfigError, DataError, NumericalError
from avsep.evaluation.bss import SILENCE, bss_eval, si_sdr
from avsep.types import Batch, move_to

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = [
    "METRICS",
    "Kept",
    "MixtureScore",
    "SourceScore",
    "batches",
    "beside_tasks",
    "can_be_asked",
    "can_go_unseen",
    "evaluate_separator",
    "interference_matrix",
    "is_counted",
    "is_headline",
    "level_db",
    "mean_sdr",
    "pattern",
    "presence_scores",
    "rows_of",
    "rows_of_task",
    "sounds",
    "summarise",
    "task_matrix",
]

LEVEL_FLOOR_DB = -120.0
_SOUNDING = ("source", "unseen_source", "photo_source")
METRICS = ("sdr", "sir", "sar", "sdri", "si_sdr")
"""The metrics of every source, in dB; ``sdri`` is the SDR less that of the mixture taken as the estimate."""


@dataclass(frozen=True)
class SourceScore:
    """One source that is asked for; dB, NaN where undefined (see :class:`avsep.evaluation.bss.BssResult`) and for one
    that is not in the mixture.

    ``role`` as in :data:`avsep.data.protocol.ROLES`; ``level_db``: the estimate's level relative to the mixture's;
    ``presence``: the probability that the source is in the mixture, None of a decoder that does not tell.
    """

    clip: str
    class_name: str
    task: int
    sdr: float
    sir: float
    sar: float
    si_sdr: float
    sdr_mixture: float
    role: str = "source"
    level_db: float = math.nan
    presence: float | None = None

    @property
    def sdri(self) -> float:
        return self.sdr - self.sdr_mixture


@dataclass(frozen=True)
class Kept:
    """What was heard and seen of one mixture, for a report.

    ``mixture`` [L]; ``references``, ``estimates`` [N, L]; ``masks``, ``ratios`` [N, F, T], predicted and ideal masks on
    the log-frequency grid; ``object`` [N, K, ...] and ``motion`` [N, ...] are the visual encoders' input, or None.
    """

    mixture: np.ndarray
    references: np.ndarray
    estimates: np.ndarray
    masks: np.ndarray
    ratios: np.ndarray
    object: np.ndarray | None = None
    motion: np.ndarray | None = None


@dataclass(frozen=True)
class MixtureScore:
    """The scores of one mixture.

    ``status`` is ``ok``; ``silent_reference`` or ``silent_estimate`` (skipped: a signal's absolute samples sum to no
    more than 1e-5); or ``degenerate`` (two references are the same signal). ``ill_conditioned``: the references were of
    low rank within rounding, so that the scores' last digits depend on the jitter (:mod:`avsep.evaluation.bss`).
    """

    mixture: TestMixture
    sources: tuple[SourceScore, ...]
    status: str
    ill_conditioned: bool = False
    kept: Kept | None = None

    @property
    def skipped(self) -> bool:
        """Whether a signal is silent, so that there is nothing to score."""
        return self.status.startswith("silent")

    @property
    def counted(self) -> bool:
        """Whether the mixture enters the means of its list."""
        return self.status == "ok" and self.mixture.counted


def can_go_unseen(separator: Separator) -> bool:
    """Whether the separator takes sources of which there is no picture."""
    return separator.can_go_unseen


def can_be_asked(separator: Separator, mixture: TestMixture) -> bool:
    """Whether the separator takes what is seen, and what is not, of a mixture's sources."""
    return (separator.can_go_unseen or not mixture.needs_unseen) and (separator.takes_photos or not mixture.needs_photo)


def pattern(mixture: TestMixture) -> tuple[int, tuple[int, ...], bool]:
    """The number of sources that are asked for, the places among them of those that sound, and whether there is a
    background: what the mixtures of one batch have in common."""
    roles = [mixture.role(place) for place in mixture.asked]
    sounding = tuple(n for n, role in enumerate(roles) if role in _SOUNDING)
    return len(roles), sounding, len(roles) < len(mixture.clips)


def level_db(signals: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """The level of ``signals`` [B, N, L] relative to that of ``mixture`` [B, L], [B, N] in dB, at least -120."""
    power = signals.double().square().mean(dim=-1)
    whole = mixture.double().square().mean(dim=-1, keepdim=True).clamp(min=1e-30)
    return (10 * (power / whole).clamp(min=1e-30).log10()).clamp(min=LEVEL_FLOOR_DB)


def evaluate_separator(
    separator: Separator,
    store: Store,
    mixtures: Sequence[TestMixture],
    *,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
    keep: Collection[int] = (),
    task_of: Mapping[str, int] | None = None,
    interference: bool = True,
) -> list[MixtureScore]:
    """Separate and score ``mixtures``, in their order.

    ``progress`` is called with the number of mixtures done since the last call; ``keep`` lists the positions whose
    signals are returned too; ``task_of`` gives each class's task (default: the mixture's own); without ``interference``
    SIR and SAR are left out, which is several times faster. The separator is left on ``device`` and in the mode it was
    in. Raises :class:`DataError` for a clip or class that is not there,
    :class:`NumericalError` where the separator gives a NaN or an infinity, :class:`ConfigError` for a source without a
    picture and a separator that needs one (:func:`can_be_asked`).
    """
    unseen = next((m for m in mixtures if not can_be_asked(separator, m)), None)
    if unseen is not None:
        raise ConfigError(
            f"list '{unseen.list_name}' has sources without a picture, which mask decoder "
            f"'{separator.spec.mask_decoder.name}' does not take: leave it out"
        )
    was_training = separator.training
    separator.to(device).eval()
    front_end = separator.spec.front_end
    sources_wanted = separator.visual_sources()
    scores: list[MixtureScore] = []
    try:
        with torch.no_grad():
            for first, group in batches(mixtures, batch_size):
                batch = load_mixtures(store, group, front_end, sources_wanted, separator.class_index)
                kept = [b for b in range(len(group)) if first + b in keep]
                scores += _score_batch(separator, batch, group, device, kept, task_of, interference)
                if progress is not None:
                    progress(len(group))
    finally:
        separator.train(was_training)
    return scores


def batches(mixtures: Sequence[TestMixture], size: int) -> Iterator[tuple[int, Sequence[TestMixture]]]:
    """Consecutive mixtures of one :func:`pattern`, at most ``size`` at a time, with the first one's position."""
    first = 0
    while first < len(mixtures):
        alike = pattern(mixtures[first])
        last = first + 1
        while last < min(first + size, len(mixtures)) and pattern(mixtures[last]) == alike:
            last += 1
        yield first, mixtures[first:last]
        first = last


def _score_batch(
    separator: Separator,
    batch: Batch,
    group: Sequence[TestMixture],
    device: str | torch.device,
    kept: Sequence[int],
    task_of: Mapping[str, int] | None,
    interference: bool,
) -> list[MixtureScore]:
    front_end = separator.spec.front_end
    length = (front_end.frames - 1) * front_end.hop
    moved = move_to(batch, device)
    visual = separator.encode_visual(moved.visual)
    # [B, N, L]; the last, incomplete hop is not scored
    separated, output = separator.separate_and_tell(moved.mixture, visual, moved.class_ids)
    estimates = separated[..., :length].float().cpu()
    presence = None if output.presence is None else torch.sigmoid(output.presence.float()).cpu()
    for b, mixture in enumerate(group):
        if not bool(torch.isfinite(estimates[b]).all()):
            raise NumericalError(
                f"the separator gave NaN or infinite samples for the mixture of {' + '.join(mixture.clips)}: "
                "its weights are damaged or have diverged"
            )
    estimates = estimates.clamp(-1.0, 1.0)
    references, mixed = batch.sources[..., :length], batch.mixture[..., :length]
    count, sounding, _ = pattern(group[0])
    heard, given = references, estimates
    if len(sounding) < count:
        heard, given = references[:, sounding], estimates[:, sounding]
    if batch.background is not None:  # its estimate is nobody's, and its score not looked at: the mixture stands in
        heard = torch.cat((heard, batch.background[:, None, :length]), dim=1)
        given = torch.cat((given, mixed[:, None]), dim=1)
    result = bss_eval(heard, given, mixture=mixed, interference=interference)
    invariant = si_sdr(heard, given)
    assert result.sdr_mixture is not None
    silent = result.silent[:, : len(sounding)].any(dim=1).tolist()
    silent_reference = (heard[:, : len(sounding)].abs().sum(dim=-1, dtype=torch.float64) <= SILENCE).any(dim=1).tolist()
    doubled = {b for b, *_ in result.duplicates}
    levels = level_db(estimates, mixed)

    found = []
    for b, mixture in enumerate(group):
        status = "degenerate" if b in doubled else "ok"
        if silent[b]:
            status = "silent_reference" if silent_reference[b] else "silent_estimate"
        sources = []
        for n, place in enumerate(mixture.asked):
            name = mixture.classes[place]
            at = sounding.index(n) if n in sounding else None
            sources.append(
                SourceScore(
                    clip=mixture.clips[place],
                    class_name=name,
                    task=mixture.task if task_of is None else task_of[name],
                    sdr=_at(result.sdr, b, at),
                    sir=_at(result.sir, b, at),
                    sar=_at(result.sar, b, at),
                    si_sdr=_at(invariant, b, at),
                    sdr_mixture=_at(result.sdr_mixture, b, at),
                    role=mixture.role(place),
                    level_db=levels[b, n].item(),
                    presence=None if presence is None else presence[b, n].item(),
                )
            )
        ill = bool(result.jitter[b] > 0)
        found.append(MixtureScore(mixture, tuple(sources), status, ill))
    if kept:
        rows = torch.tensor(kept)
        shown = separator.predict(moved, mixtures=rows)
        for place, b in enumerate(kept):
            found[b] = MixtureScore(
                found[b].mixture,
                found[b].sources,
                found[b].status,
                found[b].ill_conditioned,
                Kept(
                    mixture=mixed[b].numpy(),
                    references=references[b].numpy(),
                    estimates=estimates[b].numpy(),
                    masks=torch.sigmoid(shown.output.logits[place]).float().cpu().numpy(),
                    ratios=shown.spectrograms.ratio[place].float().cpu().numpy(),
                    object=None if batch.visual.object is None else batch.visual.object[b].numpy(),
                    motion=None if batch.visual.motion is None else batch.visual.motion[b].numpy(),
                ),
            )
    return found


def _at(scores: torch.Tensor, mixture: int, source: int | None) -> float:
    return math.nan if source is None else scores[mixture, source].item()


# --- rows and summaries -----------------------------------------------------------------------------------------------


def rows_of(scores: Iterable[MixtureScore], numbers: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """One plain row a source, as ``evaluation.json`` holds them; scores in dB, NaN becomes None.

    ``list``, ``mixture`` (its number among those scored together, or of ``numbers``), ``source`` (its place among
    those asked for), ``clip``, ``class``, ``task`` (the class's), ``status`` and ``ill_conditioned``
    (:class:`MixtureScore`), ``degenerate`` (:class:`~avsep.data.protocol.TestMixture`), the ``METRICS`` and
    ``sdr_mixture``, the mixture's own SDR; ``role``, ``level_db`` and ``presence`` (:class:`SourceScore`).
    """
    rows = []
    for number, score in enumerate(scores) if numbers is None else zip(numbers, scores, strict=True):
        for place, source in enumerate(score.sources):
            values = {m: getattr(source, m) for m in (*METRICS, "sdr_mixture", "level_db")}
            rows.append(
                {
                    "list": score.mixture.list_name,
                    "mixture": number,
                    "source": place,
                    "clip": source.clip,
                    "class": source.class_name,
                    "task": source.task,
                    "status": score.status,
                    "degenerate": score.mixture.degenerate,
                    "ill_conditioned": score.ill_conditioned,
                    **{m: round(v, 6) if math.isfinite(v) else None for m, v in values.items()},
                    "role": source.role,
                    "presence": None if source.presence is None else round(source.presence, 6),
                }
            )
    return rows


def is_counted(row: Mapping[str, Any]) -> bool:
    """Whether a row's mixture enters the means of its list: scored, and not a clip with itself, nor with its own class
    but in the list of such pairs."""
    return row["status"] == "ok" and (not row["degenerate"] or row["list"] in APART)


def is_headline(row: Mapping[str, Any]) -> bool:
    """Whether a row's list enters the means over all lists and the task matrix."""
    return row["list"] not in APART


def _statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    columns = {m: [r[m] for r in rows if r[m] is not None] for m in METRICS}
    return {
        "mean": {m: float(np.mean(v)) if v else None for m, v in columns.items()},
        "median": {m: float(np.median(v)) if v else None for m, v in columns.items()},
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and medians over the sources of ``rows`` (:func:`rows_of`), and counts of mixtures.

    ``mixtures`` = ``scored`` + ``skipped`` (a signal is silent; ``silent_estimates`` of them for what the separator
    gave) + ``degenerate`` (a clip with itself or its own class, or the same signal twice). Only scored ones enter
    ``mean`` and ``median``; ``with_degenerate`` adds the degenerate ones, as the published numbers do, but for the SIR
    and SAR of a pair of identical references, which do not exist. Where sources are asked for that are not in the
    mixture, ``absent`` has their number and the median levels of what came out for them and for the ``present`` ones,
    in dB of the mixture's.
    """

    def mixtures(chosen: Iterable[Mapping[str, Any]]) -> int:
        return len({r["mixture"] for r in chosen})

    scored = [r for r in rows if is_counted(r)]
    skipped = [r for r in rows if r["status"].startswith("silent")]
    degenerate = [r for r in rows if not r["status"].startswith("silent") and not is_counted(r)]
    summary: dict[str, Any] = {
        "mixtures": mixtures(rows),
        "scored": mixtures(scored),
        "skipped": mixtures(skipped),
        "silent_estimates": mixtures(r for r in rows if r["status"] == "silent_estimate"),
        "degenerate": mixtures(degenerate),
        "ill_conditioned": mixtures(r for r in scored if r["ill_conditioned"]),
        **_statistics(scored),
    }
    absent = [r["level_db"] for r in rows if not sounds(r)]
    if absent:
        present = [r["level_db"] for r in rows if sounds(r)]
        summary["absent"] = {
            "sources": len(absent),
            "level_db": float(np.median(absent)),
            "present_level_db": float(np.median(present)) if present else None,
        }
    if degenerate:
        summary["with_degenerate"] = _statistics([*scored, *degenerate])
        summary["only_degenerate"] = _statistics(degenerate)
    return summary


def sounds(row: Mapping[str, Any]) -> bool:
    """Whether a row's source is in the mixture."""
    return row.get("role", "source") in _SOUNDING


def presence_scores(rows: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, Any] | None:
    """How well the separator tells which sources are in the mixture, over the lists in which some are not.

    ``auc``: how often a present source has a higher probability than an absent one, ties half; ``right``: the share on
    the right side of ``threshold``. None where the decoder does not tell, or nothing absent was asked for.
    """
    lists = {r["list"] for r in rows if not sounds(r)}
    told = [r for r in rows if r["list"] in lists and r.get("presence") is not None]
    present = np.array([r["presence"] for r in told if sounds(r)])
    absent = np.array([r["presence"] for r in told if not sounds(r)])
    if not len(present) or not len(absent):
        return None
    above = (present[:, None] > absent).mean() + 0.5 * (present[:, None] == absent).mean()
    right = float((present >= threshold).sum() + (absent < threshold).sum()) / len(told)
    return {
        "auc": float(above),
        "right": right,
        "threshold": threshold,
        "present": len(present),
        "absent": len(absent),
    }


def mean_sdr(scores: Sequence[MixtureScore], *, degenerate: bool = False) -> float:
    """Mean SDR in dB over the sources in each mixture, then over the scored mixtures; with ``degenerate`` over those of
    a clip with itself or its own class too, as the released code selects its models.

    Raises :class:`DataError` when none is left to score.
    """
    values = [
        float(np.mean([s.sdr for s in m.sources if s.role in _SOUNDING]))
        for m in scores
        if m.counted or (degenerate and not m.skipped)
    ]
    if not values:
        raise DataError(f"none of the {len(scores)} mixtures can be scored: each has a silent or a repeated source")
    return float(np.mean(values))


def rows_of_task(rows: Iterable[Mapping[str, Any]], task: int, metric: str = "sdr") -> list[Mapping[str, Any]]:
    """The scored rows of sources of a task: those of its own list (``task-j``), which never changes with the step,
    where there is one; else all of them. Of lists apart none."""
    mine = [r for r in rows if r["task"] == task and is_headline(r)]
    own = [r for r in mine if r["list"] == f"task-{task}"]
    return [r for r in own or mine if is_counted(r) and r[metric] is not None]


def task_matrix(rows_after: Sequence[Sequence[Mapping[str, Any]]], metric: str = "sdr") -> list[list[float | None]]:
    """R[t][j]: mean ``metric`` of task j's sources after task t, from the rows of each t.

    Over the rows of :func:`rows_of_task`. None above the diagonal, and where nothing was scored.
    """
    steps = len(rows_after)
    matrix: list[list[float | None]] = [[None] * steps for _ in range(steps)]
    for t, rows in enumerate(rows_after):
        for j in range(t + 1):
            values = [r[metric] for r in rows_of_task(rows, j, metric)]
            matrix[t][j] = float(np.mean(values)) if values else None
    return matrix


def beside_tasks(
    rows: Iterable[Mapping[str, Any]], metric: str = "sdr"
) -> dict[tuple[int, int], list[Mapping[str, Any]]]:
    """The scored rows of sources in mixtures of two, by their own task and that of the source beside them.

    Of lists apart none.
    """
    mixtures: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if is_headline(row) and is_counted(row):
            mixtures.setdefault((row["list"], row["mixture"]), []).append(row)
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for pair in mixtures.values():
        for mine, other in zip(pair, reversed(pair), strict=True) if len(pair) == 2 else ():
            if mine[metric] is not None:
                found.setdefault((mine["task"], other["task"]), []).append(mine)
    return found


def interference_matrix(rows: Iterable[Mapping[str, Any]], tasks: int, metric: str = "sdr") -> list[list[float | None]]:
    """I[j][k]: mean ``metric`` of the sources of task j in mixtures of two with a source of task k, of the first
    ``tasks`` tasks; None where nothing was scored. For :func:`avsep.evaluation.continual.staleness`."""
    found = beside_tasks(rows, metric)
    return [
        [float(np.mean([r[metric] for r in found[j, k]])) if (j, k) in found else None for k in range(tasks)]
        for j in range(tasks)
    ]

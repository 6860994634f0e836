"""Scores of a separator on frozen test mixtures, and of a whole run, task after task.

After the published evaluation (Pian et al., NeurIPS 2024): the mixture's phase, estimates clipped to ±1 and cut to
(frames - 1) x hop samples (65,280), references cut likewise, BSS-eval v3 without a search over permutations, mixtures
with a silent signal skipped. Unlike it, skipped mixtures are counted, and mixtures of a clip with itself or with its
own class are kept out of the means and reported beside them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avsep.data.mixing import load_mixtures
from avsep.data.opening import open_run_store
from avsep.data.protocol import Protocol, TestMixture
from avsep.data.store import Store
from avsep.errors import AvsepError, DataError, NumericalError, RunError
from avsep.evaluation.bss import SILENCE, bss_eval, si_sdr
from avsep.evaluation.continual import continual_scores
from avsep.files import read_json, sha256_file, write_json
from avsep.runs.folder import RunFolder
from avsep.types import Batch, move_to

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = [
    "EVALUATION_VERSION",
    "METRICS",
    "Kept",
    "MixtureScore",
    "SourceScore",
    "current_evaluation",
    "evaluate_run",
    "evaluate_separator",
    "is_counted",
    "mean_sdr",
    "rows_of",
    "rows_of_task",
    "summarise",
    "task_matrix",
]

EVALUATION_VERSION = 1
METRICS = ("sdr", "sir", "sar", "sdri", "si_sdr")
"""The metrics of every source, in dB; ``sdri`` is the SDR less that of the mixture taken as the estimate."""


@dataclass(frozen=True)
class SourceScore:
    """One source of one mixture; dB, NaN where undefined (see :class:`avsep.evaluation.bss.BssResult`)."""

    clip: str
    class_name: str
    task: int
    sdr: float
    sir: float
    sar: float
    si_sdr: float
    sdr_mixture: float

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
        """Whether the mixture enters the means."""
        return self.status == "ok" and not self.mixture.degenerate


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
) -> list[MixtureScore]:
    """Separate and score ``mixtures``, in their order.

    ``progress`` is called with the number of mixtures done since the last call; ``keep`` lists the positions whose
    signals are returned too; ``task_of`` gives each class's task (default: the mixture's own). The separator is left on
    ``device`` and in the mode it was in. Raises :class:`DataError` for a clip or class that is not there,
    :class:`NumericalError` where the separator gives a NaN or an infinity.
    """
    was_training = separator.training
    separator.to(device).eval()
    front_end = separator.spec.front_end
    sources_wanted = separator.visual_sources()
    scores: list[MixtureScore] = []
    try:
        with torch.no_grad():
            for first, group in _batches(mixtures, batch_size):
                batch = load_mixtures(store, group, front_end, sources_wanted, separator.class_index)
                kept = [b for b in range(len(group)) if first + b in keep]
                scores += _score_batch(separator, batch, group, device, kept, task_of)
                if progress is not None:
                    progress(len(group))
    finally:
        separator.train(was_training)
    return scores


def _batches(mixtures: Sequence[TestMixture], size: int) -> Iterator[tuple[int, Sequence[TestMixture]]]:
    """Consecutive mixtures of the same number of sources, at most ``size`` at a time, with the first one's position."""
    first = 0
    while first < len(mixtures):
        count = len(mixtures[first].clips)
        last = first + 1
        while last < min(first + size, len(mixtures)) and len(mixtures[last].clips) == count:
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
) -> list[MixtureScore]:
    front_end = separator.spec.front_end
    length = (front_end.frames - 1) * front_end.hop
    moved = move_to(batch, device)
    visual = separator.encode_visual(moved.visual)
    # [B, N, L]; the last, incomplete hop is not scored
    estimates = separator.separate(moved.mixture, visual, moved.class_ids)[..., :length].float().cpu()
    for b, mixture in enumerate(group):
        if not bool(torch.isfinite(estimates[b]).all()):
            raise NumericalError(
                f"the separator gave NaN or infinite samples for the mixture of {' + '.join(mixture.clips)}: "
                "its weights are damaged or have diverged"
            )
    estimates = estimates.clamp(-1.0, 1.0)
    references, mixed = batch.sources[..., :length], batch.mixture[..., :length]
    result = bss_eval(references, estimates, mixture=mixed)
    invariant = si_sdr(references, estimates)
    assert result.sdr_mixture is not None
    silent_reference = (references.abs().sum(dim=-1, dtype=torch.float64) <= SILENCE).any(dim=1).tolist()

    found = []
    for b, (mixture, status) in enumerate(zip(group, result.status, strict=True)):
        if status == "silent":
            status = "silent_reference" if silent_reference[b] else "silent_estimate"
        sources = tuple(
            SourceScore(
                clip=clip,
                class_name=name,
                task=mixture.task if task_of is None else task_of[name],
                sdr=result.sdr[b, n].item(),
                sir=result.sir[b, n].item(),
                sar=result.sar[b, n].item(),
                si_sdr=invariant[b, n].item(),
                sdr_mixture=result.sdr_mixture[b, n].item(),
            )
            for n, (clip, name) in enumerate(zip(mixture.clips, mixture.classes, strict=True))
        )
        ill = bool(result.jitter[b] > 0)
        found.append(MixtureScore(mixture, sources, status, ill))
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


# --- rows and summaries -----------------------------------------------------------------------------------------------


def rows_of(scores: Iterable[MixtureScore]) -> list[dict[str, Any]]:
    """One plain row a source, as ``evaluation.json`` holds them; scores in dB, NaN becomes None.

    ``list``, ``mixture`` (its number among those scored together), ``source`` (its place in the mixture), ``clip``,
    ``class``, ``task`` (the class's), ``status`` and ``ill_conditioned`` (:class:`MixtureScore`), ``degenerate``
    (:class:`~avsep.data.protocol.TestMixture`), the ``METRICS`` and ``sdr_mixture``, the mixture's own SDR.
    """
    rows = []
    for number, score in enumerate(scores):
        for place, source in enumerate(score.sources):
            values = {m: getattr(source, m) for m in (*METRICS, "sdr_mixture")}
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
                }
            )
    return rows


def is_counted(row: Mapping[str, Any]) -> bool:
    """Whether a row's mixture enters the means: scored, and not a clip with itself or its own class."""
    return row["status"] == "ok" and not row["degenerate"]


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
    and SAR of a pair of identical references, which do not exist.
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
    if degenerate:
        summary["with_degenerate"] = _statistics([*scored, *degenerate])
        summary["only_degenerate"] = _statistics(degenerate)
    return summary


def mean_sdr(scores: Sequence[MixtureScore], *, degenerate: bool = False) -> float:
    """Mean SDR in dB over the sources of each mixture, then over the scored mixtures; with ``degenerate`` over those of
    a clip with itself or its own class too, as the released code selects its models.

    Raises :class:`DataError` when none is left to score.
    """
    values = [float(np.mean([s.sdr for s in m.sources])) for m in scores if m.counted or (degenerate and not m.skipped)]
    if not values:
        raise DataError(f"none of the {len(scores)} mixtures can be scored: each has a silent or a repeated source")
    return float(np.mean(values))


def rows_of_task(rows: Iterable[Mapping[str, Any]], task: int, metric: str = "sdr") -> list[Mapping[str, Any]]:
    """The scored rows of sources of a task: those of its own list (``task-j``), which never changes with the step,
    where there is one; else all of them."""
    mine = [r for r in rows if r["task"] == task]
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


# --- a run ------------------------------------------------------------------------------------------------------------


def _separator_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("separator.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise RunError(f"{folder} has no {name}: the task's separator is damaged; train the task again")
        digest.update(sha256_file(folder / name).encode())
    return digest.hexdigest()


def _previous(path: Path, identity: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What an earlier evaluation of the same protocol and store holds, by task. A damaged file is computed anew."""
    if not path.is_file():
        return {}
    try:
        data = read_json(path)
    except AvsepError:
        return {}
    if not isinstance(data, dict) or any(data.get(key) != value for key, value in identity.items()):
        return {}
    try:
        return {int(step["task"]): step for step in data["after"]}
    except (KeyError, TypeError, ValueError):
        return {}


def current_evaluation(run_folder: str | Path) -> dict[str, Any] | None:
    """What the run's ``evaluation.json`` holds; None where there is none, or where it is of other mixtures, of another
    version of the protocol or of this file, of an earlier task than the last finished one, or of weights that are no
    longer there."""
    run = RunFolder(run_folder)
    path = run.evaluation_file
    if not path.is_file():
        return None
    protocol = Protocol.load(run.protocol_file)
    last = run.finished_tasks()[-1]
    steps = _previous(path, _identity(protocol, run.spec().store_hash or protocol.store_hash))
    if last not in steps or steps[last].get("separator") != _separator_hash(run.task(last).separator):
        return None
    result: dict[str, Any] = read_json(path)
    return result


def _identity(protocol: Protocol, store_hash: str) -> dict[str, Any]:
    """What two evaluations must share for their scores to stand together."""
    return {
        "format": "avsep-evaluation",
        "version": EVALUATION_VERSION,
        "protocol": protocol.name,
        "protocol_version": protocol.version,
        "protocol_hash": protocol.hash,
        "store_hash": store_hash,
    }


def evaluate_run(
    run_folder: str | Path,
    store: Store | str | Path | None = None,
    *,
    tasks: Sequence[int] | None = None,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
    """Score the separator of every finished task (or of ``tasks``) on the run's frozen mixtures of the tasks it knows.

    Writes ``evaluation.json`` after each task and returns what it holds; a task whose separator has not changed since
    is not scored again. ``progress`` is called with (task, mixtures done, mixtures in all) of that task.

    The result: ``format`` (``avsep-evaluation``), ``version``, ``protocol``, ``protocol_version``, ``protocol_hash``,
    ``store_hash``; ``tasks``, the class names of each; ``after``, one entry a scored task with its ``task``,
    ``separator`` hash, the ``seconds`` it was trained for, the bytes it keeps as ``memory``
    (:meth:`avsep.evaluation.budget.Budget.plain`), ``lists`` (:func:`summarise` by list name), ``all`` (over all
    lists), ``by_task`` (by the sources' task over all lists) and ``rows`` (:func:`rows_of`); and, when no task up to
    the last scored one is missing, ``matrices`` by metric (:func:`task_matrix`) and ``continual``, the measures of each
    matrix (:class:`avsep.evaluation.continual.ContinualScores`), with the SDR's once more as ``matrix``, ``average``
    (by task), ``forgetting`` and ``bwt``.

    Raises:
        RunError: not a run folder, no finished task, or a task that is not finished.
        DataError: the store is not the one the run was trained on.
    """
    from avsep.separator import load_separator

    run = RunFolder(run_folder)
    finished = run.finished_tasks()
    for task in tasks or ():
        if task not in finished:
            raise RunError(f"task {task} of {run} is not finished; finished: {', '.join(map(str, finished))}")
    protocol = Protocol.load(run.protocol_file)
    opened = open_run_store(run, store, protocol)
    task_of = {name: index for index, names in enumerate(protocol.tasks) for name in names}
    identity = _identity(protocol, opened.content_hash)
    path = run.evaluation_file
    steps = {t: step for t, step in _previous(path, identity).items() if t in finished}
    hashes = {t: _separator_hash(run.task(t).separator) for t in finished}
    steps = {t: step for t, step in steps.items() if step.get("separator") == hashes[t]}

    result = _assemble(identity, steps, protocol)
    for task in finished if tasks is None else sorted(set(tasks)):
        mixtures = protocol.at(task)
        if not mixtures:
            raise DataError(f"the protocol of {run} has no mixture for task {task}")
        if task in steps:
            if progress is not None:
                progress(task, len(mixtures), len(mixtures))
            continue
        done = 0

        def advance(count: int, task: int = task, total: int = len(mixtures)) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(task, done, total)

        scores = evaluate_separator(
            load_separator(run.path, task=task),
            opened,
            mixtures,
            batch_size=batch_size,
            device=device,
            progress=advance,
            task_of=task_of,
        )
        steps[task] = {
            "task": task,
            "separator": hashes[task],
            **_costs(run, task, opened),
            **_summaries(rows_of(scores)),
        }
        result = _assemble(identity, steps, protocol)
        write_json(path, result)
    return result


def _costs(run: RunFolder, task: int, store: Store) -> dict[str, Any]:
    """What learning a finished task took, and what it keeps for the next."""
    from avsep.evaluation.budget import budget_of

    record = run.task(task).record()
    return {"seconds": record.get("seconds"), "memory": budget_of(run.path, task, store=store).plain()}


def _summaries(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lists = sorted({r["list"] for r in rows})
    owners = sorted({r["task"] for r in rows})
    return {
        "lists": {name: summarise([r for r in rows if r["list"] == name]) for name in lists},
        "by_task": {str(j): summarise([r for r in rows if r["task"] == j]) for j in owners},
        "all": summarise(rows),
        "rows": rows,
    }


def _assemble(identity: Mapping[str, Any], steps: Mapping[int, dict[str, Any]], protocol: Protocol) -> dict[str, Any]:
    result = {
        **identity,
        "tasks": [list(names) for names in protocol.tasks],
        "after": [steps[t] for t in sorted(steps)],
    }
    if steps and sorted(steps) == list(range(len(steps))):
        rows = [steps[t]["rows"] for t in sorted(steps)]
        matrices = {metric: task_matrix(rows, metric) for metric in METRICS}
        result["matrices"] = matrices
        result["continual"] = {
            metric: continual_scores([[math.nan if v is None else v for v in line] for line in matrix]).as_dict()
            for metric, matrix in matrices.items()
        }
        # the SDR's, which are what people ask for first
        continual = result["continual"]["sdr"]
        result["matrix"] = matrices["sdr"]
        result["average"] = continual["average"]
        result["forgetting"] = continual["forgetting"]
        result["bwt"] = continual["backward_transfer"]
    return result

"""Scores of a whole run, task after task, in ``evaluation.json``: on its own test mixtures, or on another store's.

What is scored of a mixture, and how, is in :mod:`avsep.evaluation.scores`, whose names can be had from here too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avsep.data.opening import open_run_store
from avsep.data.protocol import APART, Protocol, build_protocol
from avsep.data.store import Store
from avsep.data.tasks import training_clips
from avsep.dsp import FrontEnd
from avsep.errors import AvsepError, DataError, RunError
from avsep.evaluation.av_align import mean_agreement
from avsep.evaluation.continual import continual_scores
from avsep.evaluation.forward_transfer import forward_transfer as forward_transfer_rows
from avsep.evaluation.scores import (
    METRICS,
    Kept,
    MixtureScore,
    SourceScore,
    can_be_asked,
    can_go_unseen,
    evaluate_separator,
    interference_matrix,
    is_counted,
    is_headline,
    mean_sdr,
    presence_scores,
    rows_of,
    rows_of_task,
    summarise,
    task_matrix,
)
from avsep.evaluation.visual_dependence import visual_dependence
from avsep.evaluation.yardsticks import StaticFilter, measure, yardstick_identity
from avsep.files import read_json, sha256_file, write_json
from avsep.runs.folder import RunFolder
from avsep.types import Task

__all__ = [
    "EVALUATION_VERSION",
    "METRICS",
    "Kept",
    "MixtureScore",
    "SourceScore",
    "can_go_unseen",
    "current_evaluation",
    "evaluate_on",
    "evaluate_run",
    "evaluate_separator",
    "interference_matrix",
    "is_counted",
    "is_headline",
    "mean_sdr",
    "presence_scores",
    "rows_of",
    "rows_of_task",
    "summarise",
    "task_matrix",
]

EVALUATION_VERSION = 1
_FORMAT = "avsep-evaluation"
_BESIDE = (
    "yardsticks",
    "visual_dependence",
    "av_align",
    "forward_transfer",
)  # measured where it is asked for, and kept then


def _separator_hash(folder: Path) -> str:
    from avsep.separator.weights import MEANS_FILE

    digest = hashlib.sha256()
    for name in ("separator.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise RunError(f"{folder} has no {name}: the task's separator is damaged; train the task again")
        digest.update(sha256_file(folder / name).encode())
    if (folder / MEANS_FILE).is_file():
        digest.update(sha256_file(folder / MEANS_FILE).encode())
    return digest.hexdigest()


def _previous(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier evaluation of the same protocol and store holds. A damaged file is computed anew."""
    if not path.is_file():
        return {}
    try:
        data = read_json(path)
    except AvsepError:
        return {}
    return data if isinstance(data, dict) and _same(data, identity) else {}


def _same(evaluation: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    return all(evaluation.get(key) == value for key, value in identity.items())


def _steps(data: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The scored steps of an evaluation, by task."""
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
    steps = _steps(_previous(path, _identity(protocol, run.spec().store_hash or protocol.store_hash)))
    if last not in steps or steps[last].get("separator") != _separator_hash(run.task(last).separator):
        return None
    result: dict[str, Any] = read_json(path)
    return result


def _identity(protocol: Protocol, store_hash: str) -> dict[str, Any]:
    """What two evaluations must share for their scores to stand together."""
    return {
        "format": _FORMAT,
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
    yardsticks: bool = True,
    dependence: int = 0,
    av_align: int = 0,
    forward_transfer: bool = False,
    like: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    more_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Score the separator of every finished task (or of ``tasks``) on the run's frozen mixtures of the tasks it knows.

    Writes ``evaluation.json`` after each task and returns what it holds; a task whose separator has not changed since
    is not scored again. ``progress`` is called with (task, mixtures done, mixtures in all) of that task,
    ``more_progress`` with (what, done, in all) of the yardsticks and of the dependence on pictures.

    The result: ``format`` (``avsep-evaluation``), ``version``, ``protocol``, ``protocol_version``, ``protocol_hash``,
    ``store_hash``; ``tasks``, the class names of each; ``after``, one entry a scored task with its ``task``,
    ``separator`` hash, the ``seconds`` it was trained for, the bytes it keeps as ``memory``
    (:meth:`avsep.evaluation.budget.Budget.plain`), ``lists`` (:func:`summarise` by list name), ``all`` (over all
    lists but those apart, :data:`~avsep.data.protocol.APART`), ``by_task`` (by the sources' task over the same),
    ``rows`` (:func:`rows_of`) and, where they apply, ``presence`` (:func:`presence_scores`) and ``left_out``, the lists
    that the separator cannot be asked for; and, when no task up to the last scored one is missing, ``matrices`` by
    metric (:func:`task_matrix`), ``interference``, likewise by pairs of tasks after the last one
    (:func:`interference_matrix`), and ``continual``, the measures of each
    (:class:`avsep.evaluation.continual.ContinualScores`), with the SDR's once more as ``matrix``, ``average`` (by
    task), ``forgetting``, ``bwt`` and ``staleness``.

    With ``yardsticks`` it also holds the ``identity`` and the ``rows`` of :mod:`avsep.evaluation.yardsticks`, scored
    once on the mixtures of the last finished task; with ``dependence`` above 0 ``visual_dependence``, by the last
    scored task :func:`avsep.evaluation.visual_dependence.visual_dependence` over that many mixtures a list, and with
    ``av_align`` likewise :func:`avsep.evaluation.av_align.mean_agreement`. With ``forward_transfer`` it holds by task,
    the first left out, the ``rows`` of the task's sources before it was learned
    (:func:`avsep.evaluation.forward_transfer.forward_transfer`) and their mean ``sdri``; and as ``fwt`` the mean over
    tasks, where none is missing. An older file need not have any of these. ``like`` is another run's evaluation, as
    with another seed: its yardsticks are taken over where they are of the same mixtures, front end and training clips.

    Raises:
        RunError: not a run folder, no finished task, or a task that is not finished.
        DataError: the store is not the one the run was trained on.
        ConfigError: the separator cannot be asked for what ``forward_transfer`` asks it for; all else is written then.
    """
    run = RunFolder(run_folder)
    protocol = Protocol.load(_require_tasks(run, tasks).protocol_file)
    opened = open_run_store(run, store, protocol)
    return _evaluate(
        run,
        protocol,
        opened,
        run.evaluation_file,
        tasks=tasks,
        own_store=opened,
        batch_size=batch_size,
        device=device,
        yardsticks=yardsticks,
        dependence=dependence,
        av_align=av_align,
        forward_transfer=forward_transfer,
        progress=progress,
        more_progress=more_progress,
        like=like,
    )


def evaluate_on(
    run_folder: str | Path,
    store: Store | str | Path,
    *,
    protocol: str | None = None,
    split: str = "test",
    out: str | Path | None = None,
    tasks: Sequence[int] | None = None,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    yardsticks: bool = True,
    dependence: int = 0,
    av_align: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
    more_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Score a run on a store that it was not trained with, on a ``protocol`` (the run's kind by default) made over its
    ``split``, and return the result and the file it is in: ``out``, or one beside the run's own named after the store.

    Classes are known by their names. Those of the run that the store lacks are in no mixture and stand under
    ``missing``; ``store`` is the store's name. The rest is as in :func:`evaluate_run`, without ``seconds`` and
    ``memory``. The static filter is of the run's own training clips where they are at hand, else of the store's
    (``yardsticks.identity.filter.whose``: ``run`` or ``tested``); where these lack a class there is none, and
    ``yardsticks.left_out`` says why.

    Raises:
        RunError: as :func:`evaluate_run`; ``out`` is the run's own ``evaluation.json``.
        DataError: another sample rate, no class in common, or no mixture to score.
    """
    run = RunFolder(run_folder)
    _require_tasks(run, tasks)
    spec = run.spec()
    opened = store if isinstance(store, Store) else Store.open(store)
    opened.require_rate(spec.separator.front_end.sample_rate_hz)
    known = [name for names in spec.tested for name in names]
    there = [n for n in known if n in opened.classes and opened.select(classes=[n], split=split)]
    if not there:
        raise DataError(
            f"{opened.path} has no {split} clip of a class that {run} has learned ({', '.join(known)}): it has "
            f"{', '.join(opened.classes)}"
        )
    lists = [tuple(name for name in names if name in there) for names in spec.tested]
    made = [Task(t, names, tuple(n for before in lists[: t + 1] for n in before)) for t, names in enumerate(lists)]
    kind = protocol or spec.protocol
    tested = build_protocol(kind, opened, made, split=split, clip_samples=spec.separator.front_end.clip_samples)
    if not any(tested.at(task) for task in tasks or run.finished_tasks()):
        raise DataError(
            f"protocol '{kind}' has no mixture over the {split} clips of {', '.join(there)} in {opened.path}: it takes "
            f"two classes of a task"
        )
    name = f"evaluation-{opened.path.resolve().name}-{opened.content_hash[:8]}"
    name += "".join(f"-{part}" for part, usual in ((kind, spec.protocol), (split, "test")) if part != usual)
    path = run.path / f"{name}.json" if out is None else Path(out)
    if path.resolve() == run.evaluation_file.resolve():
        raise RunError(f"{path} holds the scores of the run's own test mixtures: give another file with --out")
    _check_place(path, f"{name}.json")
    try:
        own = open_run_store(run)
        own.require_rate(opened.sample_rate_hz)
    except AvsepError:
        own = None
    extra = {"store": opened.path.resolve().name, "split": split, "missing": [n for n in known if n not in there]}
    result = _evaluate(
        run,
        tested,
        opened,
        path,
        tasks=tasks,
        own_store=own,
        extra=extra,
        batch_size=batch_size,
        device=device,
        yardsticks=yardsticks,
        dependence=dependence,
        av_align=av_align,
        progress=progress,
        more_progress=more_progress,
    )
    return result, path


def _check_place(path: Path, name: str) -> None:
    """Refuse a file that scores cannot be written to, or that holds anything else, before anything is scored."""
    if path.is_dir():
        raise AvsepError(f"{path} is a folder: name the file, for example {path / name}")
    there = next(parent for parent in path.resolve().parents if parent.exists())
    if not there.is_dir():
        raise AvsepError(f"{there} is a file, so that {path} cannot be written: name another file")
    if not path.exists():
        return
    try:
        data = read_json(path)
    except AvsepError:
        data = None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise AvsepError(f"{path} is there and holds no scores: it is left as it is; name another file")


def _require_tasks(run: RunFolder, tasks: Sequence[int] | None) -> RunFolder:
    finished = run.finished_tasks()
    for task in tasks or ():
        if task not in finished:
            raise RunError(f"task {task} of {run} is not finished; finished: {', '.join(map(str, finished))}")
    return run


def _evaluate(
    run: RunFolder,
    protocol: Protocol,
    store: Store,
    path: Path,
    *,
    tasks: Sequence[int] | None,
    own_store: Store | None,
    batch_size: int,
    device: str | torch.device,
    yardsticks: bool,
    dependence: int,
    av_align: int,
    forward_transfer: bool = False,
    progress: Callable[[int, int, int], None] | None,
    more_progress: Callable[[str, int, int], None] | None,
    extra: Mapping[str, Any] | None = None,
    like: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score what is not scored yet, after every task into ``path``. ``own_store``: the one the run was trained on,
    None where it is not at hand; ``extra``: of another store, what is said of it; ``like``: of :func:`evaluate_run`."""
    from avsep.separator import load_separator

    finished = run.finished_tasks()
    task_of = {name: index for index, names in enumerate(protocol.tasks) for name in names}
    identity = {**_identity(protocol, store.content_hash), **(extra or {})}
    before = _previous(path, identity)
    hashes = {t: _separator_hash(run.task(t).separator) for t in finished}
    steps = {t: s for t, s in _steps(before).items() if t in finished and s.get("separator") == hashes[t]}
    beside = {key: before[key] for key in _BESIDE if isinstance(before.get(key), dict)}
    if unlearned := beside.pop("forward_transfer", None):  # of separators that have not changed since
        current = {later: of for later, of in unlearned.items() if of["separator"] == hashes.get(int(later) - 1)}
        beside |= {"forward_transfer": current} if current else {}

    result = _assemble(identity, steps, protocol, beside)
    for task in finished if tasks is None else sorted(set(tasks)):
        mixtures = protocol.at(task)
        if not mixtures:
            if extra is not None:
                continue  # of a task whose classes the store does not have
            raise DataError(f"the protocol of {run} has no mixture for task {task}")
        if task in steps:
            if progress is not None:
                progress(task, len(mixtures), len(mixtures))
            continue
        separator = load_separator(run.path, task=task)
        numbers = [number for number, m in enumerate(mixtures) if can_be_asked(separator, m)]
        done = 0

        def advance(count: int, task: int = task, total: int = len(numbers)) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(task, done, total)

        scores = evaluate_separator(
            separator,
            store,
            [mixtures[number] for number in numbers],
            batch_size=batch_size,
            device=device,
            progress=advance,
            task_of=task_of,
        )
        rows = rows_of(scores, numbers[: len(scores)])
        left_out = sorted({m.list_name for m in mixtures if not can_be_asked(separator, m)})
        presence = None
        if separator.mask_decoder.tells_presence:
            presence = presence_scores(rows, float(separator.mask_decoder.presence_threshold))
        steps[task] = {
            "task": task,
            "separator": hashes[task],
            **(_costs(run, task, store) if extra is None else {}),
            **_summaries(rows),
            **({} if presence is None else {"presence": presence}),
            **({"left_out": left_out} if left_out else {}),
        }
        result = _assemble(identity, steps, protocol, beside)
        write_json(path, result)
    if yardsticks:
        measured = [of["yardsticks"] for of in (before, like) if of and _same(of, identity) and of.get("yardsticks")]
        found = _yardsticks(run, protocol, store, own_store, measured, task_of, batch_size, more_progress)
        if found is not None:
            beside["yardsticks"] = found

    def measure_last(name: str, count: int, what: str, measured: Callable[..., dict[str, Any]], **more: Any) -> None:
        last = max(steps)
        kept = beside.get(name, {}).get(str(last))
        if not _is_current(kept, hashes[last], count):
            found = measured(
                load_separator(run.path, task=last),
                store,
                protocol.at(last),
                count=count,
                batch_size=batch_size,
                device=device,
                progress=None if more_progress is None else partial(more_progress, what),
                **more,
            )
            kept = {"separator": hashes[last], "count": count, **({"lists": found} if more else found)}
        beside[name] = {str(last): kept}

    if dependence > 0 and steps:
        measure_last("visual_dependence", dependence, "other pictures", visual_dependence, split=protocol.split)
    if av_align > 0 and steps:
        measure_last("av_align", av_align, "sound and motion", mean_agreement)
    if beside != {key: before.get(key) for key in beside}:
        result = _assemble(identity, steps, protocol, beside)
        write_json(path, result)
    for task in (finished if tasks is None else sorted(set(tasks))) if forward_transfer else ():
        known = beside.get("forward_transfer", {})
        later = task + 1
        if later == len(protocol.tasks) or str(later) in known:
            continue
        rows = forward_transfer_rows(
            load_separator(run.path, task=task),
            store,
            protocol,
            later,
            batch_size=batch_size,
            device=device,
            task_of=task_of,
            progress=None if more_progress is None else partial(more_progress, f"task {later} before it is learned"),
        )
        of_task = {"separator": hashes[task], "sdri": summarise(rows)["mean"]["sdri"], "rows": rows}
        beside["forward_transfer"] = {**known, str(later): of_task}
        result = _assemble(identity, steps, protocol, beside)
        write_json(path, result)
    return result


def _is_current(kept: Any, separator: str, count: int) -> bool:
    return isinstance(kept, dict) and (kept.get("separator"), kept.get("count")) == (separator, count)


def _yardsticks(
    run: RunFolder,
    protocol: Protocol,
    store: Store,
    own_store: Store | None,
    measured: Sequence[Mapping[str, Any]],
    task_of: Mapping[str, int],
    batch_size: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, Any] | None:
    """The yardsticks on the mixtures of the last finished task, or those ``measured`` that are of the same."""
    spec = run.spec().separator.front_end
    last = run.finished_tasks()[-1]
    mixtures = protocol.at(last)
    if not mixtures:
        return None
    trained = store if own_store is None else own_store
    wanted = yardstick_identity(spec, last, "tested" if own_store is None else "run", trained.content_hash)
    for known in measured:
        if known.get("identity") == wanted:
            return dict(known)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("yardsticks", done, len(mixtures))

    classes = sorted({m.classes[place] for m in mixtures for place in m.asked})
    gone = training_clips(trained)  # of classes of which there are exemplars at most
    lacking = [n for n in classes if n in gone or not trained.select(classes=[n], split="train")]
    static = None if lacking else StaticFilter.fit(trained, classes, FrontEnd(spec))
    rows = measure(mixtures, store, spec, static, task_of=task_of, batch_size=batch_size, progress=advance)
    why = {"left_out": {"static filter": f"no training clip of {', '.join(lacking)} is at hand"}} if lacking else {}
    return {"identity": wanted, "rows": rows, **why}


def _costs(run: RunFolder, task: int, store: Store) -> dict[str, Any]:
    """What learning a finished task took, and what it keeps for the next."""
    from avsep.evaluation.budget import budget_of

    record = run.task(task).record()
    return {"seconds": record.get("seconds"), "memory": budget_of(run.path, task, store=store).plain()}


def _summaries(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lists = sorted({r["list"] for r in rows}, key=lambda name: (name in APART, name))
    headline = [r for r in rows if is_headline(r)]
    owners = sorted({r["task"] for r in headline})
    return {
        "lists": {name: summarise([r for r in rows if r["list"] == name]) for name in lists},
        "by_task": {str(j): summarise([r for r in headline if r["task"] == j]) for j in owners},
        "all": summarise(headline),
        "rows": rows,
    }


def _assemble(
    identity: Mapping[str, Any], steps: Mapping[int, dict[str, Any]], protocol: Protocol, beside: Mapping[str, Any]
) -> dict[str, Any]:
    result = {
        **identity,
        "tasks": [list(names) for names in protocol.tasks],
        "after": [steps[t] for t in sorted(steps)],
        **beside,
    }
    if steps and sorted(steps) == list(range(len(steps))):
        rows = [steps[t]["rows"] for t in sorted(steps)]
        matrices = {metric: task_matrix(rows, metric) for metric in METRICS}
        beside_each = {metric: interference_matrix(rows[-1], len(rows), metric) for metric in METRICS}
        result["matrices"] = matrices
        result["interference"] = beside_each
        result["continual"] = {
            metric: continual_scores(_with_nan(matrix), interference=_with_nan(beside_each[metric])).as_dict()
            for metric, matrix in matrices.items()
        }
        # the SDR's, which are what people ask for first
        continual = result["continual"]["sdr"]
        result["matrix"] = matrices["sdr"]
        result["average"] = continual["average"]
        result["forgetting"] = continual["forgetting"]
        result["bwt"] = continual["backward_transfer"]
        result["staleness"] = continual["staleness"]
    before = [of.get("sdri") for of in (beside.get("forward_transfer") or {}).values()]
    if before and len(before) == len(protocol.tasks) - 1 and None not in before:
        result["fwt"] = float(np.mean(before))
    return result


def _with_nan(matrix: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[math.nan if v is None else v for v in line] for line in matrix]

"""Presets side by side on one store: trained jointly on all of its classes, seed after seed, and scored on its tests.

Each preset and seed is a run of its own in ``runs``, which goes on where it was stopped. The lists are those of the
protocol ``audiovisual``; intervals are of both the training seeds and the test mixtures, or, where a seed gives one
number alone, from the lowest to the highest of the seeds.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from avsep.data.store import Store
from avsep.errors import ConfigError, RunError
from avsep.evaluation.continual import Interval, percentile_interval, resampling_weights
from avsep.files import csv_cell, write_text
from avsep.progress import Progress

__all__ = ["COLUMNS", "MEASURES", "Found", "Measure", "evaluations_in", "facts_of", "measure", "report", "run_presets"]

_AS_THEY_ARE = "the same clips as they are"
_Rows = Sequence[Mapping[str, Any]]
_RESAMPLES = 10_000
_FACTS = ("store", "classes", "seed_numbers", "commit", "date")
COLUMNS = ("preset", "measure", "unit", "mean", "low", "high", "interval", "seeds", *_FACTS)


@dataclass(frozen=True)
class Measure:
    """A line of the report: its name, its unit, and what it takes of the rows of a run.

    ``pick``: which rows count. ``over``: what is taken off, a yardstick of the same rows or, with ``_AS_THEY_ARE``, the
    row of the same clips among the headline's; nothing when empty. ``column``: of the rows.
    """

    name: str
    pick: Callable[[Mapping[str, Any]], bool]
    column: str = "sdri"
    over: str = ""


def _in_list(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: row["list"] in names


def _headline(row: Mapping[str, Any]) -> bool:
    from avsep.evaluation.scores import is_headline

    return is_headline(row)


MEASURES = (
    Measure("different classes", _headline),
    Measure("different classes, above the static filter", _headline, over="static filter"),
    Measure("same class", _in_list("same-class")),
    Measure("three sources", _in_list("three")),
    Measure("something in the background", _in_list("background")),
    *(
        Measure(f"{title}{', change' if over else ''}", _in_list(name), over=over)
        for name, title in (
            ("quiet", "20 dB quieter"),
            ("reverberant", "in a room"),
            ("photo", "one picture each, no motion"),
            ("unseen", "no pictures"),
        )
        for over in ("", _AS_THEY_ARE)
    ),
)


def run_presets(
    store: Store | str | Path,
    runs: str | Path,
    presets: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: Sequence[str] = (),
    dependence: int = 60,
    accelerator: str = "auto",
    progress: Progress | bool = True,
) -> dict[tuple[str, int], dict[str, Any]]:
    """Train and evaluate every preset with every seed; the evaluations by preset and seed.

    Args:
        settings: of ``--set``, for all of the runs.
        dependence: mixtures a list of the measure of dependence on pictures.
    """
    from avsep.data.tasks import task_stream
    from avsep.evaluation.evaluate import evaluate_run
    from avsep.runs.folder import RunFolder
    from avsep.training.learner import ContinualLearner

    opened = store if isinstance(store, Store) else Store.open(store)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    specs = _specs(opened, presets, seeds, settings)
    for seed in seeds:
        for name in presets:
            spec = specs[name, seed]
            stream = task_stream(
                opened,
                spec.tasks,
                protocol=spec.protocol,
                validation_protocol=spec.validation_protocol,
                clip_samples=spec.separator.front_end.clip_samples,
            )
            folder = RunFolder(_folder(runs, name, seed))
            learner = ContinualLearner.from_spec(spec, accelerator=accelerator)
            learner.fit(stream, folder.path, resume=folder.is_run, progress=progress, preset=name)
            like = next((one for (other, _), one in reversed(found.items()) if other == name), None)
            found[name, seed] = evaluate_run(folder.path, opened, dependence=dependence, like=like)
    return found


# ------------------------------------------------------------------------------------------------------------ measures


@dataclass(frozen=True)
class Found:
    """A number of a preset: its mean with its interval, and that of each seed.

    ``interval``: ``95 %`` of seeds and mixtures, or from the lowest to the highest of the ``seeds``.
    """

    preset: str
    measure: str
    unit: str
    value: Interval
    seeds: tuple[float, ...]
    interval: Literal["95 %", "seeds"] = "95 %"


def measure(evaluations: Mapping[tuple[str, int], Mapping[str, Any]], *, without: str = "drum") -> list[Found]:
    """All numbers of all presets. ``without``: a class whose mixtures are left out of one more line a measure of
    different classes."""
    found = []
    for preset in dict.fromkeys(name for name, _ in evaluations):
        runs = [evaluation for (name, _), evaluation in evaluations.items() if name == preset]
        found += _of_preset(Path(preset).stem, runs, without)  # a preset may be a file
    return found


def _of_preset(preset: str, runs: Sequence[Mapping[str, Any]], without: str) -> list[Found]:
    steps = [run["after"][-1] for run in runs]
    found = []
    measures = list(MEASURES)
    if any(row["class"] == without for row in steps[0]["rows"]):
        for one in MEASURES[:2]:
            measures.append(
                Measure(f"{one.name}, without {without}", _without(steps[0]["rows"], one, without), over=one.over)
            )
    for one in measures:
        table = _table(one, runs)
        if table.size:
            found.append(Found(preset, one.name, "dB", *_interval(table)))
    found += _dependence(preset, steps, runs)
    for name, unit, values in (
        ("absent sources, median level", "dB", [_median_level(step["rows"]) for step in steps]),
        ("presence, area under the curve", "", [(step.get("presence") or {}).get("auc") for step in steps]),
        ("presence, share right", "", [(step.get("presence") or {}).get("right") for step in steps]),
        ("mixtures left out, since a part is silent", "%", [_left_out(step["rows"]) for step in steps]),
    ):
        known = [float(value) for value in values if value is not None]
        if known:
            found.append(Found(preset, name, unit, _over_seeds(known), tuple(known), "seeds"))
    return found


def _without(rows: _Rows, one: Measure, name: str) -> Callable[[Mapping[str, Any]], bool]:
    with_it = {(row["list"], row["mixture"]) for row in rows if row["class"] == name}
    return lambda row: one.pick(row) and (row["list"], row["mixture"]) not in with_it


def _table(one: Measure, runs: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The measure of each mixture, [seeds, mixtures]: the mean over its sources."""
    from avsep.evaluation.scores import sounds
    from avsep.evaluation.yardsticks import rows_of_yardstick

    lines: list[dict[tuple[str, int], float]] = []
    for run in runs:
        step = run["after"][-1]
        if one.over == _AS_THEY_ARE:
            base = _as_they_are(step["rows"], one.column)
        else:
            yardstick = rows_of_yardstick(run, one.over, step) if one.over else []
            base = {_key(row): row[one.column] for row in yardstick if row[one.column] is not None}
        sums: dict[tuple[str, int], list[float]] = {}
        for row in step["rows"]:
            key = _key(row)
            if not one.pick(row) or row["status"] != "ok" or not sounds(row) or row[one.column] is None:
                continue
            if not one.over or key in base:
                sums.setdefault(key[:2], []).append(row[one.column] - base.get(key, 0.0))
        lines.append({key: float(np.mean(values)) for key, values in sums.items()})
    shared = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
    return np.array([[line[key] for key in shared] for line in lines])


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["list"], row["mixture"], row["source"]


def _as_they_are(rows: _Rows, column: str) -> dict[tuple[str, int, int], float]:
    """The headline's value of the same source among the same clips, for every row that has one."""
    clips: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        clips.setdefault((row["list"], row["mixture"]), []).append(row["clip"])
    plain = {
        (*clips[row["list"], row["mixture"]], row["source"]): row[column]
        for row in rows
        if _headline(row) and row["status"] == "ok" and row[column] is not None
    }
    asked = ((_key(row), (*clips[row["list"], row["mixture"]], row["source"])) for row in rows)
    return {key: plain[name] for key, name in asked if name in plain}


def _interval(table: NDArray[np.float64]) -> tuple[Interval, tuple[float, ...]]:
    """The mean of [seeds, mixtures], with the interval over both, and the mean of each seed."""
    seeds, mixtures = table.shape
    drawn = []
    generators = (
        resampling_weights([size], resamples=_RESAMPLES, seed=number) for number, size in enumerate((seeds, mixtures))
    )
    whole = [np.concatenate(list(blocks)) for blocks in generators]  # [resamples, seeds], [resamples, mixtures]
    drawn = np.einsum("rs,sm,rm->r", whole[0], table, whole[1]) / (seeds * mixtures)
    return percentile_interval(float(table.mean()), drawn, 0.95), tuple(table.mean(axis=1).tolist())


def _over_seeds(values: Sequence[float]) -> Interval:
    """The mean with the least and the most of the seeds, where there is nothing else to resample."""
    return Interval(float(np.mean(values)), min(values), max(values))


def _median_level(rows: _Rows) -> float | None:
    from avsep.evaluation.scores import sounds

    levels = [row["level_db"] for row in rows if not sounds(row)]
    return float(np.median(levels)) if levels else None


def _left_out(rows: _Rows) -> float:
    """The percentage of the mixtures whose scores are not counted."""
    status = {(row["list"], row["mixture"]): row["status"] for row in rows}
    return 100 * len([one for one in status.values() if one != "ok"]) / len(status)


def _dependence(preset: str, steps: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> list[Found]:
    from avsep.evaluation.visual_dependence import HEADINGS

    found = []
    for list_name, title in (("headline", "different classes"), ("same-class", "same class")):
        for change, heading in HEADINGS.items():
            values = []
            for step, run in zip(steps, runs, strict=True):
                changes = (run.get("visual_dependence") or {}).get(str(step["task"]), {}).get("lists", {})
                value = (changes.get(list_name) or {}).get("changes", {}).get(change)
                if value is not None:
                    values.append(float(value))
            if values:
                what = f"{title}, change with pictures: {heading}"
                found.append(Found(preset, what, "dB", _over_seeds(values), tuple(values), "seeds"))
    return found


# -------------------------------------------------------------------------------------------------------------- report


def report(found: Sequence[Found], out: str | Path, facts: Mapping[str, Any]) -> None:
    """Write ``out`` (.csv) with a line a preset and measure, and the same beside it as a table in Markdown."""
    path = Path(out)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in found:
        numbers = [f"{x:.3f}" for x in (one.value.mean, one.value.low, one.value.high)]
        seeds = " ".join(f"{x:.3f}" for x in one.seeds)
        writer.writerow(
            [
                csv_cell(str(x))
                for x in (one.preset, one.measure, one.unit, *numbers, one.interval, seeds, *facts.values())
            ]
        )
    write_text(path, text.getvalue())
    presets = list(dict.fromkeys(one.preset for one in found))
    lines = [f"| | {' | '.join(presets)} |", f"|---|{'---|' * len(presets)}"]
    by_name: dict[str, dict[str, Found]] = {}
    for one in found:
        by_name.setdefault(one.measure + (f", {one.unit}" if one.unit else ""), {})[one.preset] = one
    for name, of_preset in by_name.items():
        cells = [_cell(of_preset.get(preset)) for preset in presets]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "In brackets 95 % intervals of seeds and mixtures; in parentheses the lowest and the highest seed."]
    write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")


def _cell(one: Found | None) -> str:
    if one is None:
        return ""
    digits = 2 if one.unit else 3
    mean, low, high = (f"{x:.{digits}f}" for x in (one.value.mean, one.value.low, one.value.high))
    return f"{mean} [{low}, {high}]" if one.interval == "95 %" else f"{mean} ({low} to {high})"


def evaluations_in(
    store: Store, runs: str | Path, presets: Sequence[str], seeds: Sequence[int], *, settings: Sequence[str] = ()
) -> dict[tuple[str, int], Any]:
    """The evaluations of finished runs, without training any.

    Raises :class:`ConfigError` for a run of another store or of other settings, :class:`RunError` for one whose scores
    are not those of its weights.
    """
    from avsep.evaluation.evaluate import current_evaluation
    from avsep.runs.folder import RunFolder
    from avsep.spec import first_difference

    found = {}
    for (name, seed), spec in _specs(store, presets, seeds, settings).items():
        run = RunFolder(_folder(runs, name, seed))
        if not run.is_run or not run.finished_tasks():
            continue
        theirs = run.spec()
        if theirs.store_hash != store.content_hash:
            raise ConfigError(f"{run} was trained on another store than {store.path}: give the right one")
        # the classes and sizes of a separator are written by training; where a store lies says nothing
        given = {"store", "store_hash", "preset", "separator"}
        facts = [
            {
                **one.model_dump(mode="json", exclude=given),
                **one.separator.model_dump(mode="json", exclude={"num_classes", "classes", "task_sizes"}),
            }
            for one in (spec, theirs)
        ]
        if other := first_difference(facts[0], facts[1]):
            key, wanted, there = other
            raise ConfigError(f"{run} is no run of {name} as it is now: {key} is {there!r} there, {wanted!r} here")
        evaluation = current_evaluation(run.path)
        if evaluation is None:
            raise RunError(f"the scores of {run} are not those of its separator: leave --no-train out")
        found[name, seed] = evaluation
    return found


def _folder(runs: str | Path, preset: str, seed: int) -> Path:
    return Path(runs) / f"{Path(preset).stem}-{seed}"


def _specs(
    store: Store, presets: Sequence[str], seeds: Sequence[int], settings: Sequence[str]
) -> dict[tuple[str, int], Any]:
    """The spec of every run. Raises :class:`ConfigError` where presets have one name, or are not to be compared."""
    from avsep.spec import RunSpec, apply_settings, load_preset, validated

    for number, name in enumerate(presets):
        for other in presets[:number]:
            if Path(other).stem == Path(name).stem:
                raise ConfigError(f"presets {other} and {name} have one name, {Path(name).stem}: rename one of the two")
    found = {}
    for seed in seeds:
        for name in presets:
            preset = load_preset(name)
            data = {
                "separator": dict(preset["separator"]),
                "train": {**preset["train"], "seed": seed},
                "strategy": "joint",
                "tasks": [list(store.classes)],
                "protocol": "audiovisual",
                "validation_protocol": "audiovisual",
                "preset": name,
            }
            found[name, seed] = validated(RunSpec, apply_settings(data, list(settings)), name)
    lengths = {name: spec.separator.front_end.clip_samples for (name, _), spec in found.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ConfigError(
            f"presets whose mixtures are of different lengths in samples are not compared ({told}): set "
            f"separator.front_end.clip_samples for all of them"
        )
    return found


def facts_of(store: Store, seeds: Sequence[int]) -> dict[str, Any]:
    """What stands beside every line."""
    from avsep.environment import commit

    date = time.strftime("%Y-%m-%d", time.gmtime())
    values = (store.content_hash[:12], len(store.classes), " ".join(map(str, seeds)), commit(), date)
    return dict(zip(_FACTS, values, strict=True))

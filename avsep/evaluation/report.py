"""One HTML page a run that needs no network: scores, curves, and test mixtures to hear and to see.

Gathering (:func:`gather`, which runs separators) and rendering (:func:`render_report`, which only formats) are apart.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avsep.data.opening import open_run_store
from avsep.data.protocol import APART
from avsep.errors import AvsepError, RunError
from avsep.evaluation.drawing import PAGE_BYTES, SignalView, dependencies, markup, page_environment, pretty
from avsep.evaluation.visual_dependence import CHANGES, HEADINGS
from avsep.evaluation.yardsticks import YARDSTICKS, rows_of_yardstick, sdr_by_list, sdr_by_task
from avsep.files import write_text
from avsep.runs.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from avsep.data.protocol import Protocol, TestMixture
    from avsep.data.store import Store
    from avsep.evaluation.scores import Kept, MixtureScore
    from avsep.spec import OptimizerSpec, TrainSpec

__all__ = [
    "QUESTION",
    "MixtureView",
    "Opening",
    "ReportContext",
    "RunView",
    "SeparatedView",
    "Series",
    "SignalView",
    "SourceView",
    "gather",
    "opening_of",
    "pick_mixtures",
    "render_report",
    "write_report",
]

_POINTS = 240  # of a curve; more cannot be told apart at the size it is drawn
_COLOURS = 6  # --c0 .. --c5 in the template
_UNFOLDED = 4  # mixtures that are open when the page is

QUESTION = "Does it still know its first instruments?"
"""What the page of a run of several tasks opens with."""


# --- what the page shows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A named curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class RunView:
    """One run: its name, settings, classes by task, the content of its ``evaluation.json`` (None where there is none of
    its last task as it is now) and its curves.

    ``losses`` over the step of the whole run, ``validation`` SDR in dB, ``boundaries`` the steps where a task ended.
    """

    name: str
    folder: str
    settings: Mapping[str, str]
    tasks: Sequence[Sequence[str]]
    evaluation: Mapping[str, Any] | None = None
    losses: Sequence[Series] = ()
    validation: Series | None = None
    boundaries: Sequence[float] = ()
    finished: int = 1


@dataclass(frozen=True)
class SeparatedView:
    """What one run made of one source: estimate [L], predicted mask [F, T] (low frequency first), scores in dB."""

    run: str
    signal: SignalView
    mask: np.ndarray | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class SourceView:
    """One source: the truth, its ideal mask [F, T], pictures [K, 3, H, W] uint8 and what every run made of it.

    ``mixture_sdr``: the SDR in dB of the mixture itself taken as the estimate; ``yardsticks``: that of the other
    yardsticks by name, where they were scored; ``said``: what is unusual about it.
    """

    class_name: str
    task: int
    reference: SignalView
    ideal_mask: np.ndarray | None
    pictures: np.ndarray | None
    separated: Sequence[SeparatedView]
    mixture_sdr: float | None = None
    yardsticks: Mapping[str, float] = field(default_factory=dict)
    said: str = ""


@dataclass(frozen=True)
class MixtureView:
    """One mixture with its sources. ``note`` says why it is worth hearing."""

    title: str
    note: str
    mixture: SignalView
    sources: Sequence[SourceView]
    warning: str = ""


@dataclass(frozen=True)
class ReportContext:
    """Everything on the page; the first run is the one the report is about."""

    title: str
    runs: Sequence[RunView]
    mixtures: Sequence[MixtureView]
    sample_rate_hz: int
    left_out: int = 0
    protocol: str = ""
    store: str = ""
    version: str = ""


@dataclass(frozen=True)
class Opening:
    """The mixture that the page opens with, and the source of the first task that is asked for there."""

    mixture: MixtureView
    source: SourceView


def opening_of(context: ReportContext) -> Opening | None:
    """The first mixture of instruments of the first task alone, else the first with one of them; None of runs that
    learned no further task, or without such a mixture. By place, never by score."""
    if not context.runs or min(run.finished for run in context.runs) < 2:
        return None
    found = []
    for mixture in context.mixtures:
        plain = not mixture.warning and not any(source.said for source in mixture.sources)
        first = [source for source in mixture.sources if source.task == 0 and source.separated]
        if plain and first:
            found.append((len(first) < len(mixture.sources), Opening(mixture, first[0])))
    return min(found, key=lambda pair: pair[0])[1] if found else None


# --- rendering --------------------------------------------------------------------------------------------------------


def render_report(context: ReportContext) -> str:
    """The page as one HTML text. Raises MissingExtraError without Jinja2 or matplotlib."""
    environment = page_environment(context.sample_rate_hz)
    environment.globals.update(
        line_chart=lambda *a, **k: markup(line_chart(*a, **k)),
        summary=_run_summary,
        db=_db,
        signed=_signed,
        shade=_shade,
        bar=_bar,
        validation_lines=_validation_lines,
        gain=_common_gain,
        yardsticks_of=_yardsticks_of,
        dependence_of=_dependence_of,
        run_lists_apart=_lists_apart,
        headings=HEADINGS,
        changes=CHANGES,
    )
    opening = opening_of(context)
    return str(
        environment.get_template("report.html").render(
            page=context,
            matrices=_matrices(context.runs),
            opening=opening,
            question=QUESTION,
            listed=[m for m in context.mixtures if opening is None or m is not opening.mixture],
            unfolded=_UNFOLDED - (opening is not None),
        )
    )


def _common_gain(view: MixtureView) -> float:
    """One volume for all players of a mixture: its loudest signal at 0.9."""
    signals = [view.mixture.audio, *(s.reference.audio for s in view.sources)]
    peak = max((float(np.abs(s).max()) if len(s) else 0.0) for s in signals)
    return 0.9 / peak if peak > 0 else 1.0


def _db(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")  # + 0.0: no minus before a zero


def _signed(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


def _run_summary(run: RunView) -> dict[str, float | None]:
    """The figures of a run's card: after the last scored task."""
    evaluation = run.evaluation
    if not evaluation or not evaluation.get("after"):
        return {}
    last = evaluation["after"][-1]["all"]
    mean = last["mean"]
    continual = evaluation.get("continual", {}).get("sdr", {})
    return {
        "average": (continual.get("average") or [None])[-1],
        "forgetting": continual.get("forgetting"),
        "bwt": continual.get("backward_transfer"),
        **{m: mean.get(m) for m in ("sdr", "sir", "sar", "sdri", "si_sdr")},
        **{k: last.get(k) for k in ("scored", "skipped", "degenerate")},
    }


def _yardsticks_of(run: RunView) -> dict[str, Any]:
    """The yardsticks' SDR as ``lines`` of the task matrix and by ``lists`` after the last step; {} without any."""
    evaluation = run.evaluation
    if not evaluation or not evaluation.get("after") or not evaluation.get("yardsticks"):
        return {}
    return {"lines": sdr_by_task(evaluation), "lists": sdr_by_list(evaluation, evaluation["after"][-1])}


def _lists_apart(runs: Sequence[RunView]) -> bool:
    """Whether a run was scored on lists that have means of their own."""
    steps = [step for run in runs for step in (run.evaluation or {}).get("after", ())]
    return any(name in APART for step in steps for name in step["lists"])


def _dependence_of(run: RunView) -> dict[str, Any]:
    """The changes of SDR with other pictures by list, of the last step that was measured; {} without any."""
    found = (run.evaluation or {}).get("visual_dependence") or {}
    lists: dict[str, Any] = found[max(found, key=int)]["lists"] if found else {}
    return lists


def _matrices(runs: Sequence[RunView]) -> dict[str, float]:
    """The range of all matrices, so that one colour means one value in each of them."""
    values = [
        v
        for run in runs
        for line in ((run.evaluation or {}).get("matrices", {}).get("sdr") or [])
        for v in line
        if v is not None
    ]
    return {"low": min(values), "high": max(values)} if values else {"low": 0.0, "high": 1.0}


def _shade(value: float | None, low: float, high: float) -> int:
    """Percentage of the accent colour behind a cell."""
    if value is None:
        return 0
    return round(6 + 54 * (value - low) / (high - low)) if high > low else 30


def _bar(value: float | None, key: str, runs: Sequence[RunView]) -> float:
    """Length of a bar in per cent of the longest among the runs, or of 1 dB; nothing for values of 0 and less."""
    longest = max([1.0, *(v for v in (_run_summary(run).get(key) for run in runs) if v is not None)])
    return round(100 * value / longest, 2) if value is not None and value > 0 else 0.0


def _validation_lines(runs: Sequence[RunView]) -> list[Series]:
    """One a run, in their order, so that the colours stay the runs'."""
    return [Series(run.name, *((run.validation.x, run.validation.y) if run.validation else ((), ()))) for run in runs]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    boundaries: Sequence[float] = (),
    markers: bool = False,
) -> str:
    """A line chart as SVG text.

    Not matplotlib's: this one takes its colours and its font from the page's style sheet, in both colour schemes, shows
    a point's value under the pointer, has no ids that would meet those of another chart, and a third of the size.
    """
    from html import escape

    from matplotlib.ticker import MaxNLocator

    width, height, left, right, top, bottom = 560, 250, 52, 14, 14, 40
    points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    x_low, x_high = min(p[0] for p in points), max([p[0] for p in points] + list(boundaries))
    y_low, y_high = min(p[1] for p in points), max(p[1] for p in points)
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1
    pad = (y_high - y_low) * 0.06 or 1.0
    y_low, y_high = y_low - pad, y_high + pad

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        down = height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)
        return round(across, 1), round(down, 1)

    out = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in MaxNLocator(5).tick_values(y_low, y_high):
        if y_low <= tick <= y_high:
            y = place(x_low, tick)[1]
            out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
            out.append(f'<text class="tick" x="{left - 7}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in MaxNLocator(6, integer=True).tick_values(x_low, x_high):
        if x_low <= tick <= x_high:
            x = place(tick, y_low)[0]
            out.append(f'<text class="tick" x="{x}" y="{height - bottom + 17}" text-anchor="middle">{tick:g}</text>')
    previous = x_low
    for number, boundary in enumerate(boundaries):
        x = place(boundary, y_low)[0]
        middle = (place(previous, y_low)[0] + x) / 2
        out.append(f'<text class="tick" x="{middle:.1f}" y="{top + 2}" text-anchor="middle">task {number}</text>')
        if number < len(boundaries) - 1:
            out.append(f'<line class="boundary" x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}"/>')
        previous = boundary
    for number, s in enumerate(series):
        path = " ".join("{},{}".format(*place(x, y)) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y))
        style = f"stroke:var(--c{number % _COLOURS})"
        out.append(
            f'<polyline class="curve" style="{style}" points="{path}"><title>{escape(s.name)}</title></polyline>'
        )
        if markers:
            fill = f"fill:var(--c{number % _COLOURS})"
            for x, y in zip(s.x, s.y, strict=True):
                if math.isfinite(y):
                    spot = place(x, y)
                    label = escape(f"{s.name}: {y:.2f} at {x:g}")
                    out.append(
                        f'<circle style="{fill}" cx="{spot[0]}" cy="{spot[1]}" r="3.5"><title>{label}</title></circle>'
                    )
    across, down = (left + width - right) / 2, (top + height - bottom) / 2
    out.append(f'<text class="axis" x="{across}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f"translate(13 {down}) rotate(-90)"
    out.append(f'<text class="axis" transform="{turned}" text-anchor="middle">{escape(y_label)}</text></svg>')
    return "".join(out)


# --- gathering --------------------------------------------------------------------------------------------------------


def pick_mixtures(mixtures: Sequence[TestMixture], count: int) -> list[TestMixture]:
    """``count`` mixtures spread over the lists and, within a list, over its length: by place, never by score.

    Degenerate ones are left out, but for the list of such pairs.
    """
    lists: dict[str, list[TestMixture]] = {}
    for mixture in mixtures:
        if mixture.counted:
            lists.setdefault(mixture.list_name, []).append(mixture)
    shares = dict.fromkeys(lists, 0)
    while sum(shares.values()) < min(count, sum(map(len, lists.values()))):
        open_ = [name for name in lists if shares[name] < len(lists[name])]
        shares[min(open_, key=lambda name: shares[name])] += 1
    picked = []
    for name, share in shares.items():
        places = np.linspace(0, len(lists[name]) - 1, share).round().astype(int) if share else []
        picked += [lists[name][i] for i in places]
    return picked


def write_report(
    run_folder: str | Path,
    out: str | Path | None = None,
    *,
    mixtures: int = 12,
    compare: Sequence[str | Path] | None = None,
    store: Store | str | Path | None = None,
    device: str | torch.device = "cpu",
    most_bytes: int = PAGE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the page of a run, beside those of the ``compare`` runs where given, and return its path.

    ``out`` is ``report.html`` in the run folder by default; ``mixtures`` the number of test mixtures to hear; ``store``
    replaces the run's own; ``most_bytes``: fewer are heard where the page would become larger; ``progress`` is called
    with (mixtures separated, mixtures to separate over all runs).

    Raises:
        RunError: a folder is not a run, has no finished task, or the runs were tested on different mixtures.
        DataError: the store is not the runs'.
        MissingExtraError: Jinja2 or matplotlib is not installed.
    """
    dependencies()
    target = Path(out) if out is not None else RunFolder(run_folder).report_file
    if target.is_dir():
        raise AvsepError(f"{target} is a folder: name the page, for example {target / 'report.html'}")
    context = gather(
        [run_folder, *(compare or ())],
        mixtures=mixtures,
        store=store,
        device=device,
        most_bytes=most_bytes,
        progress=progress,
    )
    text = render_report(context)
    while len(text.encode()) > most_bytes and len(context.mixtures) > 1:  # what was estimated was too little
        context = replace(context, mixtures=context.mixtures[:-1], left_out=context.left_out + 1)
        text = render_report(context)
    write_text(target, text)
    return target


def gather(
    runs: Sequence[str | Path],
    *,
    mixtures: int = 12,
    store: Store | str | Path | None = None,
    device: str | torch.device = "cpu",
    most_bytes: int = PAGE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ReportContext:
    """Read the runs and separate the page's test mixtures with each run's last separator; raises as write_report."""
    import avsep
    from avsep.data.protocol import Protocol
    from avsep.evaluation.scores import can_be_asked, evaluate_separator
    from avsep.separator import load_separator

    if mixtures < 0:
        raise AvsepError(f"the number of mixtures cannot be {mixtures}")
    folders = [Path(r) for r in runs]
    finished = {folder: RunFolder(folder).finished_tasks() for folder in folders}
    protocols = [Protocol.load(RunFolder(folder).protocol_file) for folder in folders]
    protocol = protocols[0]
    for folder, other in zip(folders, protocols, strict=True):
        if other.hash != protocol.hash:
            raise RunError(
                f"{folder} cannot be compared with {folders[0]}: they were tested on different mixtures (their stores, "
                "tasks or protocols differ)"
            )
    opened = open_run_store(folders[0], store, protocol)
    known = min(tasks[-1] for tasks in finished.values())
    task_of = {name: index for index, names in enumerate(protocol.tasks) for name in names}

    most_sources = max((len(m.clips) for m in protocol.mixtures), default=2)
    fitting = _fitting(protocol.clip_samples, most_sources, len(folders), most_bytes)
    separators = [load_separator(folder, task=finished[folder][-1]) for folder in folders]
    everything = protocol.at(known)
    fit = [m for m in everything if all(can_be_asked(separator, m) for separator in separators)]
    chosen = pick_mixtures(fit, min(mixtures, fitting))
    names = _run_names(folders)
    scored: list[list[MixtureScore]] = []
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(chosen) * len(folders))

    rate_hz = opened.sample_rate_hz
    for separator in separators:
        shown = range(len(chosen))
        scored.append(
            evaluate_separator(separator, opened, chosen, device=device, progress=advance, keep=shown, task_of=task_of)
        )
    run_views = [_run_view(f, n, len(finished[f])) for f, n in zip(folders, names, strict=True)]
    beside = _yardsticks_by_source(run_views[0].evaluation or {})
    place = {mixture: number for number, mixture in enumerate(everything)}
    views = [
        _mixture_view([scores[number] for scores in scored], names, opened, known, beside.get(place[mixture], {}))
        for number, mixture in enumerate(chosen)
    ]
    return ReportContext(
        title=names[0] if len(names) == 1 else f"{names[0]} against {', '.join(names[1:])}",
        runs=run_views,
        mixtures=views,
        sample_rate_hz=rate_hz,
        left_out=max(0, min(mixtures, len(protocol.at(known))) - len(chosen)) if fitting < mixtures else 0,
        protocol=_protocol_text(protocol),
        store=f"{opened.path.name} ({protocol.store_hash[:12]})",
        version=avsep.__version__,
    )


def _fitting(samples: int, sources: int, runs: int, most_bytes: int = PAGE_BYTES) -> int:
    """How many mixtures fit in a page: sounds are exact, pictures an estimate that few exceed."""
    signals = 1 + sources * (1 + runs)
    sounds = signals * (44 + 2 * samples) * 4 / 3
    drawn = min(40_000.0, 0.4 * samples)  # bytes of a spectrogram or a mask
    pictures = (signals + sources * (1 + runs)) * drawn + sources * 3 * 8_000
    return max(1, int((most_bytes - 500_000) // (sounds + pictures)))


def _run_names(folders: Sequence[Path]) -> list[str]:
    specs = [RunFolder(folder).spec() for folder in folders]
    names = [
        spec.strategy_name + ("" if spec.memory.name == "none" else f" + {spec.memory.name}").replace("_", " ")
        for spec in specs
    ]
    return [
        f"{name} ({folder.name})" if names.count(name) > 1 else name
        for name, folder in zip(names, folders, strict=True)
    ]


def _run_view(folder: Path, name: str, finished: int) -> RunView:
    from avsep.data.protocol import Protocol
    from avsep.evaluation.evaluate import current_evaluation

    spec = RunFolder(folder).spec()
    separator = spec.separator
    parts = {
        "strategy": " + ".join(_component(strategy) for strategy in spec.strategies),
        "memory": _component(spec.memory),
        "preset": spec.preset or "none",
        "audio encoder": _component(separator.audio_encoder),
        "object encoder": _component(separator.object_encoder),
        "motion encoder": _component(separator.motion_encoder),
        "mask decoder": _component(separator.mask_decoder),
        **({} if separator.adapter is None else {"adapter": _component(separator.adapter)}),
        **_training(spec.train),
        "test protocol": _protocol_text(Protocol.load(RunFolder(folder).protocol_file)),
        "validation": f"{spec.validation_protocol}, {spec.train.validation_pairs or 'all'} pairs of each list, every "
        f"{spec.train.validate_every} epochs",
    }
    losses, validation, boundaries = _curves(RunFolder(folder).logs)
    return RunView(
        name=name,
        folder=folder.name,
        settings=parts,
        tasks=spec.tested,
        evaluation=current_evaluation(folder),
        losses=losses,
        validation=validation,
        boundaries=boundaries,
        finished=finished,
    )


def _training(train: TrainSpec) -> dict[str, str]:
    """The settings of training, by what a reader looks for."""
    steps = "all batches" if train.steps_per_epoch is None else f"at most {train.steps_per_epoch} batches"
    low, high = train.gain
    return {
        "training": f"{train.epochs} epochs a task of {steps} of {train.batch_size} mixtures, seed {train.seed}",
        "mixtures": f"{train.sources} sources, partner {train.partner}, crop {train.crop}, gain {low:g} to {high:g}; "
        f"current clips ×{train.current_repeats}, exemplars ×{train.memory_repeats} ({train.memory_share})",
        **{f"{role} learning rate": _optimizer(getattr(train, role)) for role in ("audio", "visual", "decoder")},
        "gradients": "as they are" if train.gradient_clip is None else f"clipped to a norm of {train.gradient_clip:g}",
        "precision": train.precision,
    }


def _optimizer(spec: OptimizerSpec) -> str:
    text = f"{spec.lr:g}, {spec.name}, {spec.schedule}".replace("_", " ")
    if spec.schedule == "step" and spec.milestones:
        text += f" (×{spec.gamma:g} at epoch {', '.join(map(str, spec.milestones))})"
    return text + (f", weight decay {spec.weight_decay:g}" if spec.weight_decay else "")


def _protocol_text(protocol: Protocol) -> str:
    return f"{protocol.name} version {protocol.version} ({protocol.hash[:12]})"


def _component(ref: Any) -> str:
    if ref is None:
        return "none"
    inside = ", ".join(f"{key} {value}" for key, value in ref.params.items())
    return f"{ref.name} ({inside})" if inside else str(ref.name)


_NO_LOSS = {"task", "epoch", "step", "lr", "seconds", "gradient_norm"}  # columns of train.csv


def _curves(logs: Path) -> tuple[list[Series], Series | None, list[float]]:
    """Loss terms and validation over the step of the whole run, from the learner's logs; rows cut short are skipped."""
    train = _read_log(logs / "train.csv")
    offsets: dict[int, float] = {}
    boundaries = []
    total = 0.0
    for task in sorted({int(r["task"]) for r in train}):
        offsets[task] = total
        total += max(r["step"] for r in train if int(r["task"]) == task)
        boundaries.append(total)
    terms: list[str] = []
    for row in train:
        terms += [c for c in row if c not in terms and c not in _NO_LOSS and not c.startswith("lr_")]
    if len(terms) == 2:  # the loss and its only term are the same curve
        terms = ["loss"]
    losses = []
    for term in terms:
        rows = [r for r in train if math.isfinite(r.get(term, math.nan))]
        x = np.array([offsets[int(r["task"])] + r["step"] for r in rows])
        y = np.array([r[term] for r in rows])
        if len(x):
            blocks = np.array_split(np.arange(len(x)), min(_POINTS, len(x)))
            losses.append(Series(term, [float(x[b].mean()) for b in blocks], [float(y[b].mean()) for b in blocks]))
    checks = [r for r in _read_log(logs / "validation.csv") if int(r["task"]) in offsets and "sdr_db" in r]
    validation = None
    if checks:
        x_values = [offsets[int(r["task"])] + r["step"] for r in checks]
        validation = Series("validation SDR", x_values, [r["sdr_db"] for r in checks])
    return losses, validation, boundaries


def _read_log(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        for record in csv.DictReader(line.replace("\0", "") for line in file):
            try:
                row = {k: float(v) for k, v in record.items() if k is not None and v not in ("", None)}
            except ValueError:
                continue  # the line a kill cut short
            if all(math.isfinite(row.get(key, math.nan)) for key in ("task", "step")):
                rows.append(row)
    return rows


def _yardsticks_by_source(evaluation: Mapping[str, Any]) -> dict[int, dict[int, dict[str, float]]]:
    """SDR in dB of the yardsticks but the mixture, by the mixture's number, the source's place and the yardstick."""
    found: dict[int, dict[int, dict[str, float]]] = {}
    for name in list(YARDSTICKS)[1:]:
        for row in rows_of_yardstick(evaluation, name):
            if row["sdr"] is not None:
                found.setdefault(row["mixture"], {}).setdefault(row["source"], {})[name] = row["sdr"]
    return found


def _mixture_view(
    scores: Sequence[MixtureScore],
    names: Sequence[str],
    store: Store,
    known: int,
    beside: Mapping[int, Mapping[str, float]],
) -> MixtureView:
    first = scores[0]
    kept = first.kept
    assert kept is not None
    sources = []
    for n, source in enumerate(first.sources):
        separated = []
        for name, score in zip(names, scores, strict=True):
            own = score.kept
            assert own is not None
            result = score.sources[n]
            separated.append(
                SeparatedView(
                    run=name,
                    signal=SignalView(own.estimates[n], f"{pretty(source.class_name)}, separated by {name}"),
                    mask=own.masks[n],
                    scores={m: getattr(result, m) for m in ("sdr", "sdri", "sir", "sar", "si_sdr")},
                )
            )
        sources.append(
            SourceView(
                class_name=source.class_name,
                task=source.task,
                reference=SignalView(kept.references[n], f"{pretty(source.class_name)}, as recorded"),
                ideal_mask=kept.ratios[n],
                pictures=_pictures(kept, n, first, store),
                separated=separated,
                mixture_sdr=source.sdr_mixture if math.isfinite(source.sdr_mixture) else None,
                yardsticks=beside.get(n, {}),
                said=_SAID.get(source.role, ""),
            )
        )
    title = " + ".join(pretty(s.class_name) for s in sources)
    return MixtureView(
        title=title,
        note=_note([s.task for s in sources], known),
        mixture=SignalView(kept.mixture, f"mixture of {title}"),
        sources=sources,
        warning="" if all(s.status == "ok" for s in scores) else "A signal here is silent, so it has no score.",
    )


_SAID = {
    "unseen_source": "no picture",
    "photo_source": "one picture, no motion",
    "photo": "not in the mixture, one picture",
    "moving": "not in the mixture, seen playing",
    "still": "not in the mixture, seen at rest",
    "unseen": "not in the mixture, no picture",
}


def _note(tasks: Sequence[int], known: int) -> str:
    if known == 0:
        return "All were learned in the only task so far."
    if max(tasks) < known:
        return "Old instruments: learned earlier and not trained on as a task since. This is where forgetting is heard."
    if min(tasks) == known:
        return "New instruments: those of the last task."
    return "An old instrument with a new one, a pair that no task's own training data held."


def _pictures(kept: Kept, source: int, score: MixtureScore, store: Store) -> np.ndarray | None:
    """The object pictures the separator saw; where it saw stored features, the store's pictures of that moment."""
    seen = kept.object
    clip = store.clip(score.mixture.clips[score.mixture.asked[source]])
    if score.sources[source].role.startswith("unseen") or not store.has_pictures(clip):
        return None
    if seen is not None and seen.dtype == np.uint8 and seen.ndim == 5:  # [N, K, 3, H, W]
        shown: np.ndarray = seen[source][:3]
        return shown
    place = score.mixture.asked[source]
    frames = store.timeline(clip).object
    if frames is None or not len(frames):
        return None
    centre = (score.mixture.starts[place] + len(kept.mixture) / 2) / store.sample_rate_hz
    frame = int(np.clip(round(centre * store.object_rate_hz - 0.5), 0, len(frames) - 1))
    return np.asarray(frames[max(0, frame - 1) : frame + 2])

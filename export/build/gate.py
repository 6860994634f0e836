"""The quality gate: what an exported graph does to SDR, SIR and SAR, source by source, against PyTorch.

The scores are those of the evaluation (:mod:`avsep.evaluation.bss`), of the same mixtures. A drift is the absolute
difference of a source's score; the largest over all sources is held to the limit, since a mean hides a broken class.

The mixtures of a run come from its three splits, each for one purpose: ranges are measured on training mixtures,
layers are chosen on validation mixtures, and the gate is on test mixtures, which decided nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep.errors import ExportError
from avsep.export.build.plan import ExportPlan
from avsep.export.runtime.calls import GraphCall
from avsep.export.runtime.sessions import start_onnx
from avsep.types import Batch, VisualFeatures

if TYPE_CHECKING:
    from avsep.data.protocol import Protocol
    from avsep.data.store import Store
    from avsep.evaluation.bss import BssResult
    from avsep.separator import Separator

__all__ = [
    "METRICS",
    "MIXTURES",
    "Gate",
    "Reference",
    "calibration_batches",
    "encoded",
    "graph_separator",
    "held_out_batches",
    "measure_gate",
    "references",
    "separate_by",
    "source_inputs",
    "sources_are_independent",
    "synthetic_batches",
    "validation_batches",
]

METRICS = ("sdr", "sir", "sar")
# Mixtures of a run that are scored, at most.
MIXTURES = 16
Array = NDArray[Any]
# (mixture [B, L], features, class ids [B, N]) -> sources [B, N, L]
Separate = Callable[[Tensor, VisualFeatures, Tensor], Tensor]


@dataclass(frozen=True)
class Gate:
    """What the gate found.

    ``mixtures`` how many were scored; ``max_drift_db`` by metric the largest drift of any source; ``limit_db``;
    ``overridden``: it was let pass on demand; ``on`` the mixtures' kind, ``held-out`` ones of the run's store or
    ``synthetic`` ones, which say whether the graph computes the same but nothing of the separator's own sounds
    (``validation`` and ``calibration`` ones where layers are chosen); ``worst`` the source with the largest drift, in
    words.
    """

    mixtures: int
    max_drift_db: dict[str, float]
    limit_db: float
    overridden: bool = False
    on: str = "held-out"
    worst: str = ""

    @property
    def passed(self) -> bool:
        return self.within(self.limit_db)

    def within(self, limit_db: float) -> bool:
        return self.mixtures > 0 and all(drift <= limit_db for drift in self.max_drift_db.values())

    def require(self, name: str) -> None:
        """Raise :class:`ExportError` unless the gate was passed or overridden."""
        if self.passed or self.overridden:
            return
        if not self.mixtures:
            raise ExportError(f"{name} cannot be gated: none of the {self.on} mixtures can be scored (--allow-drift)")
        drifts = ", ".join(f"{m.upper()} {v:.3f}" for m, v in self.max_drift_db.items())
        raise ExportError(
            f"{name} drifts from PyTorch by {drifts} dB on {self.on} mixtures (worst: {self.worst}), more than "
            f"{self.limit_db:g} dB: export in a higher precision, or accept it with --allow-drift (allow_drift=True)"
        )

    @property
    def told_drift_db(self) -> dict[str, float]:
        """JSON has no infinity: a source that the graph silenced counts as the largest drift there can be, 999 dB."""
        return {metric: min(drift, 999.0) for metric, drift in self.max_drift_db.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "mixtures": self.mixtures,
            "max_drift_db": self.told_drift_db,
            "limit_db": self.limit_db,
            "passed": self.passed,
            "overridden": self.overridden and not self.passed,
            "on": self.on,
        }


# --- mixtures ---------------------------------------------------------------------------------------------------------


def held_out_batches(
    run: str | Path, task: int, separator: Separator, *, limit: int = MIXTURES, store: str | Path | None = None
) -> list[Batch]:
    """Held-out test mixtures of a run after ``task``, one a batch: spread evenly over its frozen protocol, without
    degenerate ones.

    Args:
        separator: the task's, of the length that the mixtures are to have.
        limit: most mixtures.
        store: the run's store, where it is not in the place that the run names.

    Raises:
        DataError, RunError: the store is gone, is not the one trained on, or there is no protocol.
    """
    opened, protocol = _opened(run, store)
    return _spread(opened, protocol, task, separator, limit)


def validation_batches(
    run: str | Path, task: int, separator: Separator, *, limit: int = MIXTURES, store: str | Path | None = None
) -> list[Batch]:
    """As :func:`held_out_batches`, of pairs of the validation split, by which the training chose its weights."""
    from avsep.data.protocol import build_protocol
    from avsep.data.tasks import make_tasks

    opened, protocol = _opened(run, store)
    tasks = make_tasks(protocol.tasks)
    validation = build_protocol("fixed", opened, tasks, split="val", clip_samples=protocol.clip_samples)
    return _spread(opened, validation, task, separator, limit)


def _opened(run: str | Path, store: str | Path | None) -> tuple[Store, Protocol]:
    from avsep.data.opening import open_run_store
    from avsep.data.protocol import Protocol
    from avsep.runs.folder import RunFolder

    protocol = Protocol.load(RunFolder(run).protocol_file)
    return open_run_store(Path(run), store, protocol), protocol


def _spread(store: Store, protocol: Protocol, task: int, separator: Separator, limit: int) -> list[Batch]:
    from avsep.data.mixing import load_mixtures

    sources, index = separator.visual_sources(), separator.class_index
    mixtures = [m for m in protocol.at(task) if not m.degenerate and index.keys() >= set(m.classes)]
    count = min(limit, len(mixtures))
    chosen = [mixtures[i * len(mixtures) // count] for i in range(count)]
    return [load_mixtures(store, [m], separator.spec.front_end, sources, index) for m in chosen]


def calibration_batches(
    run: str | Path, task: int, separator: Separator, *, count: int = 64, store: str | Path | None = None
) -> Iterator[Batch]:
    """Training mixtures of ``task``, one a batch, as the run drew them: of its clips and the exemplars that were
    remembered then, or of the clips of all classes so far or the exemplars alone, where the strategy trains on those.

    Args:
        separator: the task's, of the length that the mixtures are to have.
        store: as for :func:`held_out_batches`.

    Raises:
        DataError, RunError: the store is gone or is not the one trained on.
        UnknownNameError: the run's strategy is not registered here.
    """
    from avsep.data.mixing import collate
    from avsep.data.tasks import make_tasks
    from avsep.memory.base import read_exemplars
    from avsep.mixers.mixtures import TrainingMixtures
    from avsep.runs.folder import RunFolder
    from avsep.strategies import build_strategy

    spec = RunFolder(run).spec()
    opened, protocol = _opened(run, store)
    this = make_tasks(protocol.tasks)[task]
    strategy = build_strategy(spec.strategies)
    everything, alone = strategy.uses_all_data, strategy.memory_only
    index = separator.class_index  # of the classes that are offered
    classes = [] if alone else [name for name in (this.seen if everything else this.classes) if name in index]
    clips = opened.select(classes=classes, split="train") if classes else []
    memory = read_exemplars(run, task if alone else task - 1) if (this.old or alone) and not everything else {}
    remembered = [name for name in (this.seen if alone else this.old) if name in index]
    kept = [exemplar for name in remembered for exemplar in memory.get(name, ())]
    exemplars = opened.clips_by_id([exemplar.id for exemplar in kept])
    crops = {exemplar.id: exemplar.start for exemplar in kept if exemplar.start is not None}
    given, epoch = 0, 0
    while given < count:
        drawn = TrainingMixtures(
            opened,
            clips,
            exemplars,
            spec.train,
            separator.spec.front_end,
            separator.visual_sources(),
            index,
            task=task,
            epoch=epoch,
            crops=crops,
        )
        for item in range(min(len(drawn), count - given)):
            yield collate([drawn[item]])
            given += 1
        epoch += 1


def synthetic_batches(separator: Separator, plan: ExportPlan, count: int = 4) -> list[Batch]:
    """Chords as sources and random features: for a separator without a run. Each batch is one mixture."""
    from avsep.export.build.golden import golden_inputs
    from avsep.export.build.plan import TensorSpec

    front_end = separator.spec.front_end
    made = []
    for number in range(count):
        chords = TensorSpec("mixture", "float32", (plan.sources, front_end.clip_samples))
        sources = golden_inputs([chords], 1, front_end.sample_rate_hz, plan.seed + 1000 + number)["mixture"]
        ids = (np.arange(plan.sources, dtype=np.int64) + number) % separator.num_classes
        made.append(
            Batch(
                sources=torch.from_numpy(sources)[None] / plan.sources,
                class_ids=torch.from_numpy(ids)[None],
                video_ids=torch.arange(plan.sources)[None],
                is_memory=torch.zeros(1, plan.sources, dtype=torch.bool),
            )
        )
    return made


def encoded(separator: Separator, batch: Batch, plan: ExportPlan, number: int = 0) -> VisualFeatures:
    """The features of a batch; random ones for a synthetic batch, which has no frames."""
    from avsep.export.build.plan import tensor_specs

    if batch.visual.object is not None or batch.visual.motion is not None:
        with torch.inference_mode():
            return separator.encode_visual(batch.visual)
    rng = np.random.default_rng([plan.seed, number])
    specs, _ = tensor_specs(separator, plan)
    count, sources = batch.class_ids.shape
    seen = motion_seen = None
    number_of = torch.arange(count * sources).reshape(count, sources)
    if separator.can_go_unseen:
        seen = number_of % 3 > 0
    if separator.takes_photos:
        motion_seen = number_of % 4 > 0
    drawn = {
        s.name: torch.from_numpy(rng.standard_normal((count, sources, *s.shape[2:])).astype(np.float32))
        for s in specs
        if s.name.endswith("_features")
    }
    return VisualFeatures(
        drawn.get("object_features"), drawn.get("motion_features"), seen=seen, motion_seen=motion_seen
    )


# --- the graph as a function ------------------------------------------------------------------------------------------


def source_inputs(visual: VisualFeatures, class_ids: Tensor) -> dict[str, Array]:
    """What a graph can be given of each source, by input name; without a mask every motion step is valid, and without
    ``seen`` and ``motion_seen`` every source and its motion are."""
    given: dict[str, Array] = {"class_ids": class_ids.numpy()}
    for name, known in (("seen", visual.seen), ("motion_seen", visual.motion_seen)):
        given[name] = np.ones(class_ids.shape, dtype=bool) if known is None else known.numpy()
    if visual.object is not None:
        given["object_features"] = visual.object.numpy()
    if visual.motion is not None:
        given["motion_features"] = motion = visual.motion.numpy()
        every = np.ones(motion.shape[:2] + motion.shape[3:], dtype=bool)
        given["motion_mask"] = every if visual.motion_mask is None else visual.motion_mask.numpy()
    return given


def graph_separator(path: Path, separator: Separator) -> Separate:
    """The exported graph as a function of any number of mixtures and sources."""
    session, _ = start_onnx(path)
    inputs = {i.name: tuple(i.shape) for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return separate_by(
        lambda given: dict(zip(names, session.run(None, given), strict=True)), inputs, separator, path.name
    )


def separate_by(
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    inputs: Mapping[str, Sequence[int | str]],
    separator: Separator,
    name: str,
) -> Separate:
    """As :func:`graph_separator`, of whatever runs the graph ``name``, whose inputs have these shapes."""
    first = next(iter(inputs))
    batch, sources = (size if isinstance(size, int) else None for size in inputs["class_ids"])
    call = GraphCall(
        run,
        first == "spectrum",
        separator.spec.front_end.model_dump(),
        batch,
        sources,
        channels=int(inputs[first][1]) if len(inputs[first]) == (5 if first == "spectrum" else 3) else 1,
    )

    def separate(mixture: Tensor, visual: VisualFeatures, class_ids: Tensor) -> Tensor:
        given = source_inputs(visual, class_ids)
        takes = inputs["motion_features"][-1] if "motion_features" in inputs else None
        if takes is not None and (steps := given["motion_features"].shape[-1]) != takes:
            raise ExportError(
                f"{name} takes {takes} motion steps, and the mixtures have {steps}: export with motion_steps={steps}"
            )
        return torch.from_numpy(call(mixture.numpy(), {key: given[key] for key in inputs if key != first}))

    return separate


# --- the measure ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Mixtures and how PyTorch's answer to them scores: what any number of graphs are held against."""

    batch: Batch
    visual: VisualFeatures
    scores: BssResult


def references(separator: Separator, batches: Iterable[Batch], plan: ExportPlan) -> list[Reference]:
    """Run PyTorch on mixtures of the separator's length, on the CPU.

    Where sources depend on each other, it is asked for as many at once as a graph of fixed shapes is, which repeats the
    last one to fill them up.
    """
    made = []
    free = plan.dynamic or sources_are_independent(separator)
    for number, batch in enumerate(batches):
        visual = encoded(separator, batch, plan, number)
        sources = batch.class_ids.shape[1]
        width = sources if free else plan.sources
        parts = []
        for first in range(0, sources, width):
            of = torch.arange(first, first + width).clamp(max=sources - 1)
            with torch.inference_mode():
                parts.append(separator.separate(batch.mixture, _columns(visual, of), batch.class_ids[:, of]))
        estimate = torch.cat(parts, dim=1)[:, :sources]
        made.append(Reference(batch, visual, _scores(separator, batch, estimate)))
    return made


def measure_gate(
    path: Path,
    separator: Separator,
    plan: ExportPlan,
    expected: Iterable[Reference],
    *,
    on: str = "held-out",
    separate: Separate | None = None,
) -> Gate:
    """Score the graph at ``path`` on mixtures that PyTorch was scored on.

    Args:
        separator: the one that was exported, of the graph's length.
        expected: what PyTorch made of the mixtures.
        on: what they are, for the record.
        separate: the graph as a function; :func:`graph_separator` (ONNX Runtime on the CPU) when None.

    Raises:
        ExportError: the graph gives NaN, or does not fit the mixtures.
    """
    separate = separate or graph_separator(path, separator)
    scored: list[tuple[dict[str, Tensor], str]] = []
    for one in expected:
        estimate = separate(one.batch.mixture, one.visual, one.batch.class_ids)
        if not bool(torch.isfinite(estimate).all()):
            raise ExportError(f"{path.name} gives NaN or infinite samples for a mixture: export it in fp32")
        scored += _drifts(separator, one, _scores(separator, one.batch, estimate))
    return _summary(scored, plan, on)


def sources_are_independent(separator: Separator) -> bool:
    """Whether what a source gets depends on nothing else that is asked for."""
    return separator.mask_decoder.independent_sources and not separator.spec.front_end.limit_mask_sum


def _columns(visual: VisualFeatures, of: Tensor) -> VisualFeatures:
    """The features of some of the sources."""
    parts = (visual.object, visual.motion, visual.motion_mask, visual.seen, visual.motion_seen)
    return VisualFeatures(*(None if part is None else part[:, of] for part in parts))


def _scores(separator: Separator, batch: Batch, estimate: Tensor) -> BssResult:
    from avsep.evaluation.bss import bss_eval

    front_end = separator.spec.front_end
    length = (front_end.frames - 1) * front_end.hop  # as the evaluation: the last, incomplete hop is not scored
    return bss_eval(batch.sources[..., :length], estimate[..., :length])


def _drifts(separator: Separator, expected: Reference, got: BssResult) -> list[tuple[dict[str, Tensor], str]]:
    """Of each mixture that can be scored: the drifts of its sources by metric, and what they are."""
    batch = expected.batch
    found = []
    for b, (status, status_got) in enumerate(zip(expected.scores.status, got.status, strict=True)):
        if status != "ok":
            continue
        drifts = {}
        for metric in METRICS:
            one, other = getattr(expected.scores, metric)[b], getattr(got, metric)[b]
            same = (one == other) | (one.isnan() & other.isnan())  # also where a lone source has an infinite SIR
            drifts[metric] = torch.where(same, 0.0, (one - other).abs()).nan_to_num(math.inf, math.inf)
        if status_got != "ok":
            drifts = {metric: torch.full_like(value, math.inf) for metric, value in drifts.items()}
        names = separator.classes or tuple(f"class {i}" for i in range(separator.num_classes))
        words = " + ".join(names[i] for i in batch.class_ids[b].tolist())
        found.append((drifts, f"{words} of {' + '.join(batch.clips[b])}" if batch.clips else words))
    return found


def _summary(scored: Sequence[tuple[dict[str, Tensor], str]], plan: ExportPlan, on: str) -> Gate:
    largest = dict.fromkeys(METRICS, 0.0)
    worst, worst_drift = "", -1.0
    for drifts, words in scored:
        for metric, value in drifts.items():
            largest[metric] = max(largest[metric], float(value.max()))
        drift = max(float(value.max()) for value in drifts.values())
        if drift > worst_drift:
            worst, worst_drift = words, drift
    return Gate(len(scored), largest, plan.gate_db, plan.allow_drift, on, worst)

"""Making a bundle: the graphs of a separator, checked against PyTorch, with all that a device needs to trust them.

A folder or one tar: the graphs, golden inputs and outputs of each, ``manifest.json`` (``manifest.schema.json`` beside
it), a README for the device, the runtime's wheel, ``build_engine.py`` and the licence. It is whole and checked, or not
there.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avsep.errors import ConfigError, DataError, ExportError, RunError
from avsep.export.build.plan import ExportPlan, tensor_specs
from avsep.export.bundle.manifest import open_bundle, schema_text
from avsep.export.bundle.packing import check_target, is_tar_name, staged, write_arrays
from avsep.export.bundle.wheel import write_wheel
from avsep.export.runtime.manifest import BUILD_SCRIPT, FORMAT, MANIFEST, SCHEMA_FILE, VERSION, VERSIONS, sealed
from avsep.export.runtime.reader import Bundle
from avsep.files import sha256_file, write_json, write_text
from avsep.runs.folder import RunFolder

if TYPE_CHECKING:
    from avsep.export.build.graphs import GraphFile, Progress
    from avsep.models import Model
    from avsep.separator import Separator
    from avsep.types import Batch

__all__ = ["export", "export_model", "export_run"]


def export(
    separator: Separator,
    plan: ExportPlan | None = None,
    out: str | os.PathLike[str] = "bundle",
    *,
    made_from: str = "",
    weights_licence: str = "",
    held_out: Iterable[Batch] | None = None,
    calibration: Iterable[Batch] | None = None,
    validation: Iterable[Batch] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a separator as a bundle at ``out``: a folder, or one tar where the name ends in ``.tar``.

    Every graph is run in ONNX Runtime and compared with PyTorch. The bundle appears only when everything holds; one
    that is already there is replaced, anything else is refused.

    Args:
        separator: it is exported on the CPU in evaluation mode, and left as it was.
        made_from: where the separator comes from, noted in the manifest.
        weights_licence: under which licence the trained weights may be passed on, noted in the manifest, with those of
            encoders whose published weights the bundle holds.
        held_out: mixtures that the separator was not trained on, for the quality gate; without them it is measured on
            synthetic ones, and the manifest says so.
        calibration: training mixtures that the ranges of an INT8 graph are measured on.
        validation: mixtures that the layers of an INT8 graph are chosen on, none of them in ``held_out``, so that the
            gate stays a check of its own; without them some of ``calibration``.
        progress: called with (what is being done, steps done, steps in all).

    Raises:
        ExportError: the separator cannot be exported, its output differs by more than the tolerance, its scores drift
            by more than the gate lets pass, or memory does not suffice.
        ConfigError: ``out`` is something else than a bundle, or lies inside a run.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    import copy

    from avsep.export.build.graph import fitted
    from avsep.export.build.onnx import require_onnx

    plan = plan or ExportPlan()
    require_onnx()
    from avsep.export.build.graphs import write_graphs  # after that, since it imports what may be missing

    target = check_target(out)
    licence, script = _licence_text(), _build_script()
    fresh = copy.deepcopy(separator).cpu().float().eval().requires_grad_(False)
    fresh = fitted(fresh, plan)
    with staged(target) as folder, _memory_told():
        made = write_graphs(fresh, plan, folder, held_out, calibration, validation, progress)
        for graph in made:
            write_arrays(folder / graph.golden_file, graph.golden)
        write_text(folder / SCHEMA_FILE, schema_text())
        write_text(folder / "LICENSE", licence)
        shutil.copyfile(script, folder / BUILD_SCRIPT)
        write_wheel(folder, licence)
        manifest = _manifest(fresh, plan, made, target, made_from, weights_licence)
        write_text(folder / "README.md", _device_readme(manifest))
        manifest["files"] = {f.name: sha256_file(f) for f in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, sealed(manifest))
        written = open_bundle(folder)  # it must be what its readers take, before anything is replaced by it
        for one in written.graphs:
            written.golden(one)
    return open_bundle(target, hashes=False)


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
    """Want of memory in one line: PyTorch's allocator tells it by a RuntimeError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise ExportError(
            "there is not enough memory for an export of these sizes: choose a smaller batch, fewer sources, a shorter "
            "length_s or smaller frames"
        ) from None


def _device_readme(manifest: Mapping[str, Any]) -> str:
    from avsep.export.bundle.device_readme import device_readme

    return device_readme(manifest)


def _manifest(
    separator: Separator,
    plan: ExportPlan,
    made: Sequence[GraphFile],
    target: Path,
    made_from: str,
    weights_licence: str,
) -> dict[str, Any]:
    """All of the manifest but the hashes."""
    import avsep
    from avsep.export.build.gate import sources_are_independent
    from avsep.inference.chunking import default_context, default_crossfade

    front_end = separator.spec.front_end
    context = default_context(front_end.clip_samples)
    steps = {spec.name: spec.shape[-1] for graph in made for spec in graph.inputs if spec.name == "motion_features"}
    encoders = {graph.kind: graph.file for graph in made}
    new: dict[str, Any] = {} if plan.channels == 1 else {"channels": plan.channels}
    if separator.mask_decoder.tells_presence:
        new["presence_threshold"] = float(separator.mask_decoder.presence_threshold)
    return {
        "format": FORMAT,
        "version": VERSION if separator.causal else VERSIONS[1] if new or separator.takes_photos else VERSIONS[0],
        "name": target.name.removesuffix(".tar"),
        "made_from": made_from,
        "created": _now(),
        "licence": "MIT",
        "weights_licence": _all_licences(separator, weights_licence),
        "separator": separator.spec.model_dump(mode="json"),
        "classes": list(separator.classes),
        "independent_sources": sources_are_independent(separator),
        "sample_rate_hz": front_end.sample_rate_hz,
        **new,
        "transform": {
            "n_fft": front_end.n_fft,
            "hop": front_end.hop,
            "window": "hann, periodic",
            "padding": front_end.padding,
            "log_rows": front_end.log_rows,
            "frames": front_end.frames,
            "align_corners": front_end.align_corners,
            "clip_samples": front_end.clip_samples,
        },
        "chunking": {
            "clip_samples": front_end.clip_samples,
            "context_samples": context,
            "crossfade_samples": default_crossfade(context),
            "align_samples": front_end.hop,
        },
        "visual": [
            {
                # what came with later versions is left out where it is unset, and older ones read the rest
                **{key: value for key, value in asdict(source).items() if value or key != "rate_hz"},
                "graph": encoders.get(f"{source.role}_encoder"),
                "steps": steps.get("motion_features") if source.role == "motion" else None,
            }
            for source in separator.visual_sources()
        ],
        "graphs": [graph.to_dict() for graph in made],
        "plan": plan.to_dict(),
        "made_with": {"avsep": avsep.__version__, "python": platform.python_version(), **_versions()},
        "files": {},
    }


def _all_licences(separator: Separator, stated: str) -> str:
    """The licence that was stated, and those of published weights that are in the bundle's encoders."""
    known = []
    for role, encoder in (("object", separator.object_encoder), ("motion", separator.motion_encoder)):
        if encoder is not None and encoder.hub is not None:
            known.append(f"of the {role} encoder {encoder.hub.licence} ({encoder.hub.repository})")
    return "; ".join([stated or "of what was trained: not stated", *known]) if known else stated


def _now() -> str:
    """UTC, or the moment that SOURCE_DATE_EPOCH names (reproducible-builds.org)."""
    stated = os.environ.get("SOURCE_DATE_EPOCH", "")
    if stated.isdigit():
        moment = datetime.datetime.fromtimestamp(int(stated), datetime.timezone.utc)
    else:
        moment = datetime.datetime.now(datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _licence_text() -> str:
    """avsep's licence: of the installed package, or of the tree that it runs from."""
    from importlib.metadata import PackageNotFoundError, distribution

    import avsep

    tree = Path(avsep.__file__).resolve().parents[1] / "LICENSE"
    if tree.is_file() and (tree.parent / "pyproject.toml").is_file():
        return tree.read_text(encoding="utf-8")
    try:
        text = distribution("avsep").read_text("licenses/LICENSE")
    except PackageNotFoundError:
        text = None
    if not text:
        raise ExportError("avsep's licence is not beside its code: install avsep again (pip install avsep)")
    return text


def _build_script() -> Path:
    script = Path(__file__).parents[1] / "targets" / "tensorrt.py"
    if not script.is_file():
        raise ExportError(f"{script} is missing: install avsep again (pip install avsep)")
    return script


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tasks: int | Sequence[int] | None = None,
    plan: ExportPlan | None = None,
    store: str | os.PathLike[str] | None = None,
    weights_licence: str = "",
    tar: bool = False,
    overwrite: bool = True,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Bundle]:
    """Export separators of a run, gated on held-out mixtures of its store.

    Where the store is gone, an fp32 graph is gated on synthetic mixtures (its manifest says so, and ``tell`` why);
    fp16 is refused, unless the plan allows drift, and int8, whose ranges come from training mixtures.

    Args:
        tasks: one task's number: ``out`` is its bundle (a tar where it ends in ``.tar``). Several, or None for all
            finished ones: ``out`` is a folder for ``task-00``, ``task-01``, ... (The command line exports the last
            finished task where none is named.)
        store: the run's store, where it is not in the place that the run names.
        tar: write several bundles as tars: ``task-00.tar``, ``task-01.tar``, ...
        weights_licence: as for :func:`export`.
        overwrite: replace bundles that are there.
        progress: called with (what is being done, steps done, steps in all).
        tell: called with a line that whoever exports should read.

    Raises:
        RunError, CheckpointError: not a run, or a task that is not finished.
        DataError: ``store`` is not the run's; or there is none, for a precision other than fp32.
        ExportError, ConfigError, MissingExtraError: as :func:`export`. Of several tasks, those before stay exported.
    """
    from avsep.export.build.onnx import require_onnx

    require_onnx()
    plan = plan or ExportPlan()
    finished = RunFolder(run).finished_tasks()
    if isinstance(tasks, int):
        places = {tasks: Path(out)}
    else:
        chosen = finished if tasks is None else list(dict.fromkeys(tasks))
        if is_tar_name(Path(out)):
            raise ConfigError(f"{out} is one tar, and holds one bundle: name one task, or a folder for tars (--tar)")
        places = {task: Path(out) / f"task-{task:02d}{'.tar' if tar else ''}" for task in chosen}
    for task, place in places.items():
        if task not in finished:
            raise RunError(f"{run} has no finished task {task}: it has {', '.join(map(str, finished))}")
        _check_place(place, overwrite)
    bundles = []
    for done, (task, place) in enumerate(places.items()):

        def report(label: str, step: int, steps: int, task: int = task, done: int = done) -> None:
            if progress is not None:
                progress(f"task {task}: {label}", done * steps + step, len(places) * steps)

        try:
            bundles.append(_export_task(Path(run), task, place, plan, store, weights_licence, report, tell))
        except ExportError as error:
            which = f"task {task}: " if len(places) > 1 else ""
            left = f"{len(bundles)} before it are written" if bundles else "nothing was written"
            raise ExportError(f"{which}{error}; {left}") from None
    return bundles


def export_model(
    model: Model,
    out: str | os.PathLike[str],
    *,
    plan: ExportPlan | None = None,
    weights_licence: str = "",
    overwrite: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Export a separator that comes with avsep, gated on held-out mixtures that it brings along.

    The bundle offers the classes that the model's card offers, and says to ask for them by name alone.

    Args:
        model: of :func:`avsep.models.find_model`.
        out: the bundle; a tar where it ends in ``.tar``.
        plan: its ``left_out`` and ``by_name`` are the card's, whatever it says of them.
        weights_licence: as for :func:`export`; the card's where it is empty.
        overwrite, progress: as for :func:`export_run`.

    Raises:
        CheckpointError: a file of the model is damaged.
        ExportError, ConfigError, MissingExtraError: as :func:`export`; int8, for which it has no training recordings.
    """
    import avsep
    from avsep.export.build.onnx import require_onnx
    from avsep.models import begin_run

    require_onnx()
    if plan is not None and "int8" in plan.precision:
        raise ExportError(
            f"int8 needs training recordings to measure its ranges on, and {model.name} brings none along: "
            "--precision fp16, or export a run of your own"
        )
    place = Path(out)
    _check_place(place, overwrite)
    plan = replace(plan or ExportPlan(), left_out=dict.fromkeys(model.left_out, model.why_left_out), by_name=True)
    with tempfile.TemporaryDirectory(prefix="avsep-model-") as folder:
        run = begin_run(model, Path(folder) / model.name)
        return _export_task(
            run,
            RunFolder(run).finished_tasks()[-1],
            place,
            plan,
            None,
            weights_licence or str(model.card["licence"]),
            progress or (lambda label, done, steps: None),
            lambda line: None,
            made_from=f"{model.name}, which comes with avsep {avsep.__version__}",
        )


def _whole(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Raises :class:`ExportError` where they cannot be read, as of a run that carries crops of its exemplars alone."""
    try:
        yield from batches
    except DataError as error:
        raise ExportError(
            f"int8 measures its ranges on the run's training recordings, which cannot be read ({error}): "
            "--precision fp16 needs none"
        ) from None


def _check_place(place: Path, overwrite: bool) -> None:
    check_target(place)
    if not overwrite and place.exists() and (place.is_file() or any(place.iterdir())):
        raise ConfigError(f"{place} is a bundle already: --overwrite replaces it, or choose another place")


def _export_task(
    run: Path,
    task: int,
    place: Path,
    plan: ExportPlan,
    store: str | os.PathLike[str] | None,
    weights_licence: str,
    progress: Progress,
    tell: Callable[[str], None],
    made_from: str = "",
) -> Bundle:
    from avsep.export.build.gate import calibration_batches, held_out_batches, validation_batches
    from avsep.export.build.graph import fitted
    from avsep.separator import load_separator

    separator = load_separator(run, task)
    wanted = fitted(separator, plan)
    tensor_specs(wanted, plan)  # a plan that does not fit is refused before mixtures are read
    where = None if store is None else Path(store)
    held_out = calibration = validation = None
    try:
        held_out = held_out_batches(run, task, wanted, store=where)
    except (ConfigError, DataError, RunError) as error:  # the store or the run's own files are gone
        if "int8" in plan.precision:
            raise DataError(f"{error}; int8 needs the run's training mixtures") from None
        if store is not None or not (plan.precision == ("fp32",) or plan.allow_drift):
            raise DataError(
                f"{error}; the gate of {', '.join(plan.precision)} needs the run's held-out mixtures"
            ) from None
        tell(f"{place} was gated on synthetic mixtures and not on the run's own: {error}")
    stored = any(source.role == "motion" and source.kind == "features" for source in separator.visual_sources())
    if held_out and stored and plan.motion_steps is None:
        # stored features come in their own length, which is the data's and not the separator's
        motions = [batch.visual.motion for batch in held_out]
        steps = {int(motion.shape[-1]) for motion in motions if motion is not None}
        if len(steps) == 1:
            plan = replace(plan, motion_steps=steps.pop())
    if "int8" in plan.precision:
        calibration = _whole(calibration_batches(run, task, wanted, count=plan.calibration, store=where))
        validation = _whole(validation_batches(run, task, wanted, store=where))
    return export(
        separator,
        plan,
        place,
        made_from=made_from or f"{run.resolve().name}, task {task}",
        weights_licence=weights_licence,
        held_out=held_out,
        calibration=calibration,
        validation=validation,
        progress=progress,
    )

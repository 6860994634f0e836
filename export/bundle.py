"""A bundle: a folder with the graph, its manifest and golden inputs and outputs, whole and verified or not there.

``separator.onnx`` the graph; ``golden.npz`` inputs by name and the output that PyTorch gave; ``manifest.json`` what the
graph is (spec, classes, rate, shapes), how it was made, the SHA-256 of the other files and the measured parity.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ConfigError, ExportError, RunError
from avsep.export.parity import Parity, compare, run_onnx
from avsep.export.plan import ExportPlan, TensorSpec, tensor_specs
from avsep.io import made_folder, read_json, sha256_file, write_json
from avsep.runs import finished_tasks

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["FORMAT", "Bundle", "export_run", "export_separator", "golden_inputs", "verify_bundle"]

FORMAT = "avsep-bundle"
VERSION = 1
GRAPH, GOLDEN, MANIFEST = "separator.onnx", "golden.npz", "manifest.json"

Array = NDArray[Any]


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its folder, what its manifest says, and the parity that was measured."""

    folder: Path
    manifest: dict[str, Any]
    parity: Parity

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    @property
    def megabytes(self) -> float:
        """Size of all files in MB (10^6 bytes)."""
        return sum(f.stat().st_size for f in self.folder.iterdir()) / 1e6


def golden_inputs(
    specs: Sequence[TensorSpec], num_classes: int, sample_rate_hz: int, seed: int = 0
) -> dict[str, Array]:
    """Inputs to compare with: chords of decaying tones in a little noise, features from N(0, 1), class ids in turn."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in specs:
        if spec.name == "mixture":
            time_s = np.arange(spec.shape[1]) / sample_rate_hz
            mixture = 0.002 * rng.standard_normal(spec.shape)
            for row in mixture:
                for _ in range(12):
                    start_s, pitch_hz = rng.uniform(0, time_s[-1]), 110 * 2 ** rng.uniform(0, 3)
                    age_s = np.maximum(time_s - start_s, 0)
                    for harmonic in range(1, 7):
                        tone = np.sin(2 * np.pi * harmonic * pitch_hz * age_s) * np.exp(-2.0 * age_s)
                        row += 0.2 / harmonic * tone
            inputs[spec.name] = (mixture / max(1.0, float(np.abs(mixture).max()))).astype(np.float32)
        elif spec.name == "class_ids":
            inputs[spec.name] = (np.arange(spec.shape[0] * spec.shape[1], dtype=np.int64) % num_classes).reshape(
                spec.shape
            )
        else:
            inputs[spec.name] = rng.standard_normal(spec.shape).astype(np.float32)
    return inputs


def export_separator(
    separator: Separator, out: str | os.PathLike[str], plan: ExportPlan | None = None, *, made_from: str = ""
) -> Bundle:
    """Export a separator as a bundle in the folder ``out``, verified in ONNX Runtime against PyTorch.

    The folder appears only when everything holds. A bundle that is already there is replaced; anything else is refused.

    Args:
        separator: it is exported on the CPU in evaluation mode, and left as it was.
        made_from: where the separator comes from, noted in the manifest.

    Raises:
        ExportError: the separator cannot be exported, or the graph's output differs by more than the tolerance.
        ConfigError: ``out`` is something else than a bundle.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    import copy

    import torch

    import avsep
    from avsep.export.graph import WaveformSeparator
    from avsep.export.onnx import require_onnx, write_onnx

    plan = plan or ExportPlan()
    require_onnx()
    target = Path(out)
    _check_target(target)
    separator = copy.deepcopy(separator).cpu().float().eval().requires_grad_(False)
    inputs, output = tensor_specs(separator, plan)
    front_end = separator.spec.front_end
    golden = golden_inputs(inputs, separator.spec.num_classes, front_end.sample_rate_hz, plan.seed)
    tensors = {name: torch.from_numpy(array) for name, array in golden.items()}
    reference = _reference(separator, tensors)

    with made_folder(target.parent):
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            staging.chmod(target.parent.stat().st_mode & 0o777)  # mkdtemp makes it private
            operators = write_onnx(WaveformSeparator(separator), tensors, output.name, staging / GRAPH, plan.opset)
            estimate, provider, seconds = run_onnx(staging / GRAPH, golden)
            parity = Parity(*compare(estimate, reference), provider=provider, seconds=seconds)
            if not parity.max_error <= plan.tolerance:
                raise ExportError(
                    f"the graph differs from PyTorch by {parity.max_error:.2e} ({parity.error_db:.0f} dB), more than "
                    f"the tolerance {plan.tolerance:.0e} (--tolerance): nothing was written"
                )
            with open(staging / GOLDEN, "wb") as file:
                np.savez_compressed(file, **golden, **{output.name: reference})  # type: ignore[arg-type]
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "made_from": made_from,
                "separator": separator.spec.model_dump(mode="json"),
                "classes": list(separator.classes),
                "sample_rate_hz": front_end.sample_rate_hz,
                "transform": {
                    "n_fft": front_end.n_fft,
                    "hop": front_end.hop,
                    "window": "hann, periodic",
                    "padding": front_end.padding,
                    "log_rows": front_end.log_rows,
                    "frames": front_end.frames,
                    "align_corners": front_end.align_corners,
                },
                "inputs": [asdict(spec) for spec in inputs],
                "outputs": [asdict(output)],
                "visual_sources": [asdict(source) for source in separator.visual_sources()],
                "plan": plan.to_dict(),
                "opset": plan.opset,
                "operators": operators,
                "parity": parity.to_dict(),
                "made_with": {"avsep": avsep.__version__, "python": platform.python_version(), **_versions()},
                "files": {f.name: sha256_file(f) for f in sorted(staging.iterdir())},
            }
            write_json(staging / MANIFEST, manifest)
            _replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Bundle(target, manifest, parity)


def _reference(separator: Separator, inputs: dict[str, Any]) -> Array:
    """What PyTorch answers, by the path that training and evaluation use."""
    import torch

    from avsep.types import VisualFeatures

    visual = VisualFeatures(object=inputs.get("object_features"), motion=inputs.get("motion_features"))
    with torch.inference_mode():
        return separator.separate(inputs["mixture"], visual, inputs["class_ids"]).numpy()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file: give a folder for the bundle")
    entries = list(target.iterdir())
    if entries and not (target / MANIFEST).is_file():
        raise ConfigError(f"{target} holds other files and no bundle: choose another folder")
    if entries and read_json(target / MANIFEST).get("format") != FORMAT:
        raise ConfigError(f"{target / MANIFEST} is not of a bundle: choose another folder")


def _replace(staging: Path, target: Path) -> None:
    """Put the finished folder in the target's place; an older bundle is moved aside first and removed last."""
    if not target.exists():
        os.replace(staging, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    old = aside / target.name
    os.replace(target, old)
    try:
        os.replace(staging, target)
    except OSError:
        os.replace(old, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def verify_bundle(folder: str | os.PathLike[str], tolerance: float | None = None) -> Bundle:
    """Check a bundle's hashes and run its golden inputs in ONNX Runtime.

    Args:
        tolerance: largest absolute difference; the manifest's when None.

    Raises:
        ExportError: a file is missing, changed or truncated, or the output differs; names the file.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise ExportError(f"{path} is not a bundle: it has no {MANIFEST}")
    try:
        manifest = read_json(path / MANIFEST)
    except ConfigError as error:
        raise ExportError(str(error)) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ExportError(f"{path / MANIFEST} is not of a bundle of version {VERSION}")
    try:
        hashes = {str(name): str(stated) for name, stated in manifest["files"].items()}
        output_name = str(manifest["outputs"][0]["name"])
        limit = float(manifest["plan"]["tolerance"]) if tolerance is None else tolerance
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{path / MANIFEST} is damaged: {type(error).__name__} at {error}") from None
    for name in {GRAPH, GOLDEN} | hashes.keys():
        if name not in hashes or Path(name).name != name:
            raise ExportError(f"{path / MANIFEST} is damaged: it has no hash of a file {name}")
        if not (path / name).is_file():
            raise ExportError(f"{path} lacks the file {name}: copy the bundle again")
        if sha256_file(path / name) != hashes[name]:
            raise ExportError(f"{path / name} is not the file that was exported (its SHA-256 differs): copy it again")
    try:
        with np.load(path / GOLDEN, allow_pickle=False) as archive:
            golden = {name: archive[name] for name in archive.files}
        reference = golden.pop(output_name)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ExportError(f"{path / GOLDEN} cannot be read: {error}") from None
    estimate, provider, seconds = run_onnx(path / GRAPH, golden)
    parity = Parity(*compare(estimate, reference), provider=provider, seconds=seconds)
    if not parity.max_error <= limit:
        raise ExportError(
            f"{path / GRAPH} differs from its golden output by {parity.max_error:.2e} ({parity.error_db:.0f} dB), more "
            f"than {limit:.0e}, on {provider}"
        )
    return Bundle(path, manifest, parity)


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tasks: Sequence[int] | None = None,
    batch: int = 1,
    sources: int = 2,
    tolerance: float = 1e-3,
    motion_steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Bundle]:
    """Export the separator of each finished task of a run (or of ``tasks``) into ``out/task-TT``.

    Args:
        progress: called with (bundles done, bundles in all).

    Raises:
        RunError, CheckpointError: not a run, or a task that is not finished.
        ExportError, ConfigError, MissingExtraError: as :func:`export_separator`.
    """
    from avsep.export.onnx import require_onnx
    from avsep.separator import load_separator

    plan = ExportPlan(batch=batch, sources=sources, tolerance=tolerance, motion_steps=motion_steps)
    require_onnx()
    finished = finished_tasks(run)
    chosen = finished if tasks is None else list(dict.fromkeys(tasks))
    for task in chosen:
        if task not in finished:
            raise RunError(f"{run} has no finished task {task}: it has {', '.join(map(str, finished))}")
        _check_target(Path(out) / f"task-{task:02d}")
    bundles = []
    for done, task in enumerate(chosen):
        separator = load_separator(run, task)
        made_from = f"{Path(run).name}, task {task}"
        bundles.append(export_separator(separator, Path(out) / f"task-{task:02d}", plan, made_from=made_from))
        if progress is not None:
            progress(done + 1, len(chosen))
    return bundles

"""Writing a graph as ONNX, and what must hold of it before it may leave."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from avsep.errors import ExportError, MissingExtraError
from avsep.export.build.operators import audit
from avsep.export.runtime.onnx_file import check_onnx

__all__ = ["check_graph", "require_onnx", "write_onnx"]

# A protobuf holds at most 2 GiB, and some of it is not weights.
_STACK_TRACE = "pkg.torch.onnx.stack_trace"  # of each node, with the names of folders on the machine that exports
_MOST_WEIGHT_BYTES = 2**31 - 2**24


def require_onnx() -> None:
    """Raise :class:`MissingExtraError` where onnx, onnxscript or onnxruntime is missing."""
    import importlib.util

    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "cpu", "exporting to ONNX")


def write_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: str | Sequence[str],
    path: Path,
    opset: int = 18,
    *,
    open_axes: Mapping[str, Mapping[int, str]] | None = None,
) -> dict[str, int]:
    """Trace ``module`` with ``inputs`` (in the order of its arguments), write it and check it.

    Args:
        outputs: name of what it gives, or names where it gives several.
        open_axes: for each input the axes whose size stays open, with their names; None: all shapes are fixed. An open
            axis must be at least 2 in ``inputs``, since a size of 1 is taken for a constant; the graph takes 1 as well.

    Returns:
        How often each operator stands in the graph.

    Raises:
        ExportError: the module cannot be traced, is too large for one file, or the graph fails a check.
        MissingExtraError: onnx is not installed.
    """
    require_onnx()
    dynamic = None
    if open_axes and any(open_axes.values()):
        first, *rest = (dict(open_axes.get(name, {})) for name in inputs)
        dynamic = (first, tuple(rest)) if rest else (first,)  # the modules take one tensor, or one and any number more
    weights = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    if weights > _MOST_WEIGHT_BYTES:
        raise ExportError(
            f"the weights are {weights / 1e9:.1f} GB, and one ONNX file holds {_MOST_WEIGHT_BYTES / 1e9:.1f} GB: "
            "export a smaller separator"
        )
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=[outputs] if isinstance(outputs, str) else list(outputs),
                dynamic_shapes=dynamic,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            for graph in (program.model.graph, *(f.graph for f in program.model.functions.values())):
                for node in graph.all_nodes():
                    node.metadata_props.pop(_STACK_TRACE, None)
            program.save(str(path), external_data=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"the separator cannot be written as ONNX: {_first_line(error)}") from error
    return check_graph(path, opset)


def _first_line(error: BaseException) -> str:
    """The innermost cause in one line; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of its own internals; what concerns the user is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_graph(path: Path, opset: int) -> dict[str, int]:
    """All in one file, full checker, strict shape inference, and the audit of the operators.

    The audit is :mod:`avsep.export.build.operators`.

    Returns:
        How often each operator stands in the graph.

    Raises:
        ExportError: names the node or the reason.
    """
    import onnx

    check_onnx(path)  # first: the checker would look for the other files
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is not valid ONNX: {_first_line(error)}") from None
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version > opset:
        raise ExportError(f"the graph uses opset {version}, {opset} was asked for")
    return audit(model)

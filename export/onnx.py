"""Writing a graph as ONNX, and what must hold of it before it may leave."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avsep.errors import ExportError, MissingExtraError

__all__ = ["check_graph", "require_onnx", "write_onnx"]

# A protobuf holds at most 2 GiB; larger weights go into a file beside it.
_PROTOBUF_LIMIT = 2**31 - 2**24

# Operators that ONNX Runtime runs slowly or TensorRT 10.3 (JetPack 6) does not take. The graph is written without
# them; one of them in it means that a component brought it in.
_REFUSED = {
    "Attention": "it builds in TensorRT in half precision only",
    "DFT": "TensorRT has it from 11.2",
    "STFT": "TensorRT has it from 10.5, and ONNX Runtime runs it slowly",
}


def require_onnx() -> None:
    """Raise :class:`MissingExtraError` where onnx, onnxscript or onnxruntime is missing."""
    import importlib.util

    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "cpu", "exporting to ONNX")


def write_onnx(
    module: nn.Module, inputs: Mapping[str, Tensor], output: str, path: Path, opset: int = 18
) -> dict[str, int]:
    """Trace ``module`` with ``inputs`` (in the order of its arguments, all shapes fixed), write it and check it.

    Returns:
        How often each operator stands in the graph.

    Raises:
        ExportError: the module cannot be traced, or the graph fails a check.
        MissingExtraError: onnx is not installed.
    """
    require_onnx()
    weights = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=[output],
                external_data=False,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=weights > _PROTOBUF_LIMIT)
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
    """Checker with full check, strict shape inference, and the operators.

    Returns:
        How often each operator stands in the graph.

    Raises:
        ExportError: names the node or the reason.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is not valid ONNX: {_first_line(error)}") from None
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version > opset:
        raise ExportError(f"the graph uses opset {version}, {opset} was asked for")
    counts: Counter[str] = Counter()
    for node in _nodes(model.graph):
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(f"node '{node.name}' is {node.domain}.{node.op_type}, which is not standard ONNX")
        if node.op_type in _REFUSED:
            raise ExportError(f"node '{node.name}' is a {node.op_type}: {_REFUSED[node.op_type]}")
        counts[node.op_type] += 1
    complex_types = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in complex_types:
            raise ExportError(f"value '{value.name}' is complex, which TensorRT has no type for")
    return dict(sorted(counts.items()))


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes, those of subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
            for inner in attribute.graphs:
                yield from _nodes(inner)

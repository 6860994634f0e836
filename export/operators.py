"""Which ONNX operators TensorRT 10.3 takes, from the table ``trt_operators.json``, and the audit of a graph by it.

The table says for each operator since which TensorRT it is taken, with which element types, and where that was read.
The standard library alone at import.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from typing import Any

from avsep.errors import ExportError

__all__ = ["LEAST_TENSORRT", "audit", "nodes", "operator_table"]

LEAST_TENSORRT = "10.3"

# ONNX element types by the names of the table. INT8 and its like only pass through QuantizeLinear and DequantizeLinear.
_TYPES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "INT32": "INT32",
    "INT64": "INT64",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}


@functools.cache
def operator_table() -> dict[str, dict[str, Any]]:
    """The table: operator -> ``supported`` by 10.3, ``since``, ``types``, ``note``, ``source``."""
    text = resources.files("avsep.export").joinpath("trt_operators.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)["operators"]
    return table


def nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph, those of subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)
            for inner in attribute.graphs:
                yield from nodes(inner)


def audit(model: Any) -> dict[str, int]:
    """Check that TensorRT 10.3 takes every node of an ONNX model whose shapes were inferred.

    Returns:
        How often each operator stands in the graph.

    Raises:
        ExportError: names the node and its operator, and says why.
    """
    import onnx

    table = operator_table()
    counts: Counter[str] = Counter()
    types = _element_types(model, onnx)
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    producers = {output: node.op_type for node in nodes(model.graph) for output in node.output}
    for node in nodes(model.graph):
        where = f"node '{node.name}' is a {node.op_type}"
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(f"node '{node.name}' is {node.domain}.{node.op_type}, which is not standard ONNX")
        entry = table.get(node.op_type)
        if entry is None:
            raise ExportError(f"{where}, which the table of operators of TensorRT {LEAST_TENSORRT} does not know")
        if not entry["supported"]:
            reason = f": {entry['note']}" if entry["note"] else ""
            raise ExportError(f"{where}, which TensorRT {LEAST_TENSORRT} does not take{reason}")
        kind = types.get(node.input[0]) if node.input else None
        if kind is not None and entry["types"]:
            name = _TYPES.get(kind, kind)
            if name not in entry["types"]:
                raise ExportError(
                    f"{where} of {name} values, of which TensorRT {LEAST_TENSORRT} takes {', '.join(entry['types'])}"
                )
        _check_restrictions(node, where, constants, producers, onnx)
        counts[node.op_type] += 1
    for name, kind in types.items():
        if kind.startswith("COMPLEX"):
            raise ExportError(f"value '{name}' is complex, which TensorRT has no type for")
    return dict(sorted(counts.items()))


def _element_types(model: Any, onnx: Any) -> dict[str, str]:
    graph = model.graph
    types = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            types[value.name] = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return types


def _check_restrictions(node: Any, where: str, constants: Any, producers: dict[str, str], onnx: Any) -> None:
    """What the table's notes ask of single operators and a component could break."""
    refused = ""
    given = {a.name for a in node.attribute}
    if node.op_type in ("Conv", "ConvTranspose"):
        constant = node.input[1] in constants or producers.get(node.input[1]) == "Constant"
        # a quantised kernel comes out of a DequantizeLinear
        if not constant and producers.get(node.input[1]) != "DequantizeLinear" and node.op_type == "ConvTranspose":
            refused = "whose kernel is computed, and TensorRT takes constant ones only"
        elif not constant and "kernel_shape" not in given:
            refused = "without kernel_shape, which TensorRT before 10.4 cannot infer where the kernel is no constant"
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
        zero_point = constants.get(node.input[2])
        if zero_point is not None and onnx.numpy_helper.to_array(zero_point).any():
            refused = "with a zero point, and TensorRT takes symmetric quantisation only"
    elif node.op_type == "Pad" and len(node.input) > 3 and node.input[3]:
        refused = "with axes, which TensorRT has from 10.4"
    elif node.op_type == "ScatterND":
        refused = "of opset 18 or later, which TensorRT computes rightly from 10.9"
    elif node.op_type == "LayerNormalization" and len([o for o in node.output if o]) > 1:
        refused = "with more than one output, and TensorRT gives the first only"
    if refused:
        raise ExportError(f"{where} {refused}")

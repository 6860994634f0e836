"""Which ONNX operators TensorRT 10.3 takes, from the table ``trt_operators.json``, and the audit of a graph by it.

The table says for each operator since which TensorRT it is taken, with which element types, and where that was read.
The standard library alone at import.
"""

from __future__ import annotations

import functools
import json
import re
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
    text = resources.files("avsep.export.build").joinpath("trt_operators.json").read_text(encoding="utf-8")
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
        _check_restrictions(node, where, constants, producers, types, onnx)
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


# Inputs that must be constants, by their place.
_CONSTANT_INPUTS = {"Squeeze": (1, "axes"), "Unsqueeze": (1, "axes"), "CumSum": (1, "axis"), "OneHot": (1, "depth")}


def _check_restrictions(
    node: Any, where: str, constants: Any, producers: dict[str, str], types: Any, onnx: Any
) -> None:
    """What the table's notes ask of single operators and a component could break."""
    refused = ""
    kind = node.op_type
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type != a.GRAPH}

    def constant(place: int) -> bool:
        name = node.input[place] if len(node.input) > place else ""
        return not name or name in constants or producers.get(name) == "Constant"

    place, role = (1, "axes") if kind.startswith("Reduce") else _CONSTANT_INPUTS.get(kind, (0, ""))
    if role and not constant(place):
        refused = f"whose {role} are computed, and TensorRT takes constant ones only"
    elif kind in ("Conv", "ConvTranspose"):
        # a quantised kernel comes out of a DequantizeLinear
        if not constant(1) and producers.get(node.input[1]) != "DequantizeLinear" and kind == "ConvTranspose":
            refused = "whose kernel is computed, and TensorRT takes constant ones only"
        elif not constant(1) and "kernel_shape" not in given:
            refused = "without kernel_shape, which TensorRT before 10.4 cannot infer where the kernel is no constant"
    elif kind in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
        zero_point = constants.get(node.input[2])
        if zero_point is not None and onnx.numpy_helper.to_array(zero_point).any():
            refused = "with a zero point, and TensorRT takes symmetric quantisation only"
    elif kind in ("AveragePool", "MaxPool", "LpPool"):
        if len(given.get("kernel_shape", ())) == 1:
            refused = "over one dimension, and TensorRT pools over two or three"
        elif any(step != 1 for step in given.get("dilations", ())):
            refused = "with dilations, which TensorRT's pooling does not have"
        elif len([o for o in node.output if o]) > 1:
            refused = "with indices, which TensorRT does not give"
    elif kind == "Pad" and len(node.input) > 3 and node.input[3]:
        refused = "with axes, which TensorRT has from 10.4"
    elif kind == "Pow" and types.get(node.input[1], "FLOAT") not in ("FLOAT", "FLOAT16", "BFLOAT16"):
        refused = "with a whole number as exponent, which TensorRT takes from 10.8"
    elif kind == "Resize" and given.get("antialias"):
        refused = "with antialiasing, which TensorRT does not have"
    elif kind == "ScatterND":
        refused = "of opset 18 or later, which TensorRT computes rightly from 10.9"
    elif kind == "LayerNormalization" and len([o for o in node.output if o]) > 1:
        refused = "with more than one output, and TensorRT gives the first only"
    elif kind == "BatchNormalization" and given.get("training_mode"):
        refused = "in training mode: call eval() on the module that it comes from"
    elif kind == "TopK" and not given.get("sorted", 1):
        refused = "that does not sort, and TensorRT's does"
    elif kind == "Einsum" and not re.fullmatch(r"[a-z,> -]*", given["equation"].decode()):
        refused = "with an ellipsis or capital letters, which TensorRT announced for 10.12"
    if refused:
        raise ExportError(f"{where} {refused}")

"""Mixed precision in the dtypes of the graph itself, which is the only form that TensorRT 11 and strong typing know.

Convolutions and matrix products of the network run in half precision. The transforms, the magnitudes, logarithm and
mask, every normalisation, softmax, residual sums and the graph's inputs and outputs stay in single precision; Cast
nodes stand where the two meet.

It is done on the ONNX graph and not on the PyTorch module, because there batch normalisations are folded already and
any registered component is treated alike. ONNX Runtime's own converter (``onnxruntime.transformers.float16``, of
1.31) was tried: it rounds the graph's inputs to half precision even where only single-precision nodes read them, and
the file that it writes from this graph has two nodes of one name and does not load.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ExportError
from avsep.export.build.operators import nodes
from avsep.export.runtime.sessions import start_onnx

__all__ = ["HALF_MAX", "HALF_OPERATORS", "body_nodes", "check_activations", "to_half"]

Array = NDArray[Any]

HALF_MAX = 65504.0
HALF_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# Operators without arithmetic of their own, or so little that half precision does no harm: they run in half precision
# where everything computed that they read is in half precision already.
# fmt: off
_FOLLOWING = frozenset((
    "Add", "Clip", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "LeakyRelu",
    "Max", "MaxPool", "Min", "Mul", "Neg", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Tile",
    "Transpose", "Unsqueeze", "Where",
))
# fmt: on
_SCOPES = "pkg.torch.onnx.name_scopes"


def body_nodes(model: Any, module: str = "separator") -> frozenset[str]:
    """Names of the nodes that come from the submodule ``module`` of what was traced: the network without transforms.

    Raises:
        ExportError: the graph does not say where its nodes come from.
    """
    names = set()
    for node in nodes(model.graph):
        for entry in node.metadata_props:
            if entry.key == _SCOPES and module in (ast.literal_eval(entry.value) or ["", ""])[1:2]:
                names.add(node.name)
    if not names:
        raise ExportError(f"the graph does not say which of its nodes are of the {module}: it was not written by avsep")
    return frozenset(names)


def to_half(model: Any, body: Collection[str], operators: Collection[str] = HALF_OPERATORS) -> Any:
    """A copy of an fp32 ONNX model in which the ``operators`` among the ``body`` nodes run in half precision.

    Raises:
        ExportError: a weight does not fit into half precision; names the layer.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:], made.graph.value_info[:]
    writer = _Writer(onnx, made.graph, inferred.graph)
    for node in model.graph.node:
        writer.add(node, node.name in body, operators)
    for value in made.graph.output:
        writer.keep_output(value.name)
    used = {name for node in nodes(made.graph) for name in node.input} | {v.name for v in made.graph.output}
    kept = [i for i in made.graph.initializer if i.name in used]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made


class _Writer:
    """Copies nodes one by one, in order, and remembers the precision of every value on the way."""

    def __init__(self, onnx: Any, graph: Any, inferred: Any) -> None:
        self.onnx = onnx
        self.graph = graph
        single = onnx.TensorProto.FLOAT
        typed = (*inferred.value_info, *inferred.input, *inferred.output)
        self.floats = {v.name for v in typed if v.type.tensor_type.elem_type == single}
        self.constants = {i.name: i for i in graph.initializer if i.data_type == single}
        self.half: set[str] = set()  # values that are in half precision under their own name
        self.casts: dict[tuple[str, bool], str] = {}  # (value, to half) -> the value that holds it so

    def add(self, node: Any, in_body: bool, operators: Collection[str]) -> None:
        computed = [n for n in node.input if n in self.floats and n not in self.constants]
        if in_body and node.op_type in operators:
            half = True
        else:
            # What has lost its origin in the exporter's optimiser follows what it reads.
            half = node.op_type in _FOLLOWING and bool(computed) and all(n in self.half for n in computed)
        copied = self.onnx.NodeProto()
        copied.CopyFrom(node)
        for place, name in enumerate(node.input):
            if name in self.floats or name in self.constants:
                copied.input[place] = self._as(name, half)
        self.graph.node.append(copied)
        if half:
            self.half.update(name for name in node.output if name in self.floats)

    def keep_output(self, name: str) -> None:
        if name in self.half:
            raise ExportError(f"the graph's output '{name}' would be in half precision")

    def _as(self, name: str, half: bool) -> str:
        """The value in the precision asked for; a Cast or a rounded copy of a constant is added when first needed."""
        if (name in self.half) == half:
            return name
        if (name, half) not in self.casts:
            changed = f"{name}_fp16" if half else f"{name}_fp32"
            if name in self.constants:
                self.graph.initializer.append(self._rounded(self.constants[name], changed))
            else:
                to = self.onnx.TensorProto.FLOAT16 if half else self.onnx.TensorProto.FLOAT
                cast = self.onnx.helper.make_node("Cast", [name], [changed], name=f"{changed}_cast", to=to)
                self.graph.node.append(cast)
            self.casts[name, half] = changed
        return self.casts[name, half]

    def _rounded(self, constant: Any, name: str) -> Any:
        values = self.onnx.numpy_helper.to_array(constant)
        magnitude = np.abs(values[~np.isinf(values)])  # masks hold -inf, which half precision has
        largest = float(magnitude.max(initial=0.0))
        if not largest <= HALF_MAX:  # NaN is not either
            layer = constant.name.removeprefix("separator.")
            raise ExportError(
                f"layer '{layer}' has a weight of {largest:.3g} after folding its normalisation, and half precision "
                f"ends at {HALF_MAX:.0f}: export it in fp32"
            )
        return self.onnx.numpy_helper.from_array(values.astype(np.float16), name)


def check_activations(path: Path, model_half: Any, feeds: Iterable[Mapping[str, Array]]) -> float:
    """Run the fp32 graph at ``path`` on inputs of calls, and look at every value that ``model_half`` computes in half
    precision.

    Returns:
        The largest magnitude that was met.

    Raises:
        ExportError: a value leaves the range of half precision; names the node.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model_half, strict_mode=True, data_prop=True)
    half = onnx.TensorProto.FLOAT16
    wanted = {v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type == half}
    model = onnx.load(str(path))
    producers = {output: node for node in model.graph.node for output in node.output}
    names = [name for name in producers if name in wanted]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session, _ = start_onnx(model.SerializeToString())
    peak = 0.0
    values = ((name, value) for feed in feeds for name, value in zip(names, session.run(None, dict(feed)), strict=True))
    for name, value in values:
        finite = value[~np.isinf(value)] if producers[name].op_type == "Where" else value
        largest = float(np.abs(finite).max(initial=0.0))
        if not largest <= HALF_MAX:
            raise ExportError(
                f"node '{producers[name].name}' ({_layer(producers[name])}) gives {largest:.3g}, and half precision "
                f"ends at {HALF_MAX:.0f}: export the graph in fp32"
            )
        peak = max(peak, largest)
    return peak


def _layer(node: Any) -> str:
    """The module that a node comes from, as far as it is known."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = [s for s in ast.literal_eval(entry.value) if "." in s]
            if scopes:
                return f"{node.op_type} of {scopes[-1].removeprefix('separator.')}"
    return str(node.op_type)

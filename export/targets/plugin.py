"""The mask synthesis as one kernel in TensorRT: a plugin in Python whose Triton kernel is compiled ahead of time.

Optional and experimental; the plain graph is the default, and nothing else of a bundle needs this. What it gives is
a folder with

- ``separator.plugin.onnx``: the graph, in which the nodes from the masks' sigmoid to the estimated spectra are one node
  ``avsep::mask_spectrum``;
- ``mask_spectrum.smXX.ptx`` for each compute capability, and ``plugin.json``, which says how to launch them;
- ``avsep_plugin.py``, which tells TensorRT of the plugin and is to be imported before the graph is parsed. It needs
  TensorRT, no Triton and no avsep; the PTX goes into the plan, which then needs none of these files.

TensorRT takes such plugins from 10.9 on, not in 10.14 (so on no JetPack 6), and TensorRT-RTX never. One kernel a
plugin, no float scalars and no workspace (NVIDIA calls them experimental; they lose memory when shapes change,
NVIDIA/TensorRT#4849): export with fixed shapes.

Triton appends two pointers to scratch memory to each entry, which TensorRT does not pass: they are cut out of the PTX,
and a kernel that reads them is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ConfigError, ExportError, MissingExtraError
from avsep.export.bundle.packing import staged
from avsep.export.targets.tensorrt import PLUGIN_DEFINITION, PLUGIN_GRAPH

if TYPE_CHECKING:
    from avsep.spec import FrontEndSpec

__all__ = ["PluginKernel", "compile_kernel", "export_plugin", "interpolation_taps", "plugin_graph"]

NAME, NAMESPACE = "mask_spectrum", "avsep"
LEAST_TENSORRT = "10.9"
# What the driver of CUDA 12.6, which JetPack 6 has, assembles; Triton would write its own newest for sm_90 and up.
PTX_VERSION = 85
ARCHITECTURES = (75, 80, 86, 87, 89, 90)

_TILE_BINS, _TILE_FRAMES, _WARPS = 32, 32, 4

Array = NDArray[Any]


@dataclass(frozen=True)
class PluginKernel:
    """A compiled kernel: its entry, how many threads and how much shared memory a block takes, and the PTX."""

    entry: str
    sm: int
    threads: int
    shared_bytes: int
    parameters: int
    ptx: str


def interpolation_taps(matrix: Array) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """A matrix [R, S] that interpolates between neighbours as the column that row r reads first [R], and the shares
    [2, R] of it and the next.

    Raises:
        ConfigError: a row reads more than two neighbouring columns.
    """
    rows = np.arange(len(matrix))
    used = matrix != 0
    low = np.where(used.any(axis=1), used.argmax(axis=1), 0)
    following = np.minimum(low + 1, matrix.shape[1] - 1)
    shares = np.stack([matrix[rows, low], np.where(following > low, matrix[rows, following], 0.0)])
    rebuilt = np.zeros_like(matrix)
    rebuilt[rows, low] = shares[0]
    rebuilt[rows, following] += np.where(following > low, shares[1], 0.0)
    if not np.array_equal(rebuilt, matrix):
        row = int(np.flatnonzero((rebuilt != matrix).any(axis=1))[0])
        raise ConfigError(f"row {row} of the warp reads more than two neighbours: the plugin cannot do that")
    return low.astype(np.int32), shares.astype(np.float32)


# ---------------------------------------------------------------- PTX


def compile_kernel(front_end: FrontEndSpec, sources: int, sm: int, *, ptx_version: int = PTX_VERSION) -> PluginKernel:
    """Compile the kernel for a compute capability (86 for 8.6), without a GPU.

    Raises:
        MissingExtraError: Triton is not installed.
        ExportError: it does not compile, or wants scratch memory.
    """
    try:
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError:
        raise MissingExtraError("triton", "gpu", "compiling the TensorRT plugin") from None
    from avsep.export.targets.plugin_kernel import avsep_mask_spectrum as kernel

    if sm not in ARCHITECTURES:
        raise ConfigError(f"the plugin is not compiled for sm {sm}: choose from {', '.join(map(str, ARCHITECTURES))}")
    signature = {
        "logits": "*fp32",
        "spectrum": "*fp32",
        "row_low": "*i32",
        "row_share": "*fp32",
        "time_low": "*i32",
        "time_share": "*fp32",
        "frames": "i32",
        "estimate": "*fp32",
    }
    constants = {
        "N": sources,
        "ROWS": front_end.log_rows,
        "BINS": front_end.n_fft // 2 + 1,
        "TIME": not front_end.align_corners,
        "KB": _TILE_BINS,
        "TT": _TILE_FRAMES,
    }
    names = kernel.arg_names
    # No alignment is claimed: TensorRT may pass a tensor from the middle of a buffer.
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": _WARPS, "ptx_version": ptx_version, "enable_fp_fusion": True}
    try:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True  # it would name the folders of this machine
            compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # Triton, LLVM and ptxas raise classes of their own that share no base but this one
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"the plugin's kernel does not compile for sm {sm}: {reason}") from error
    meta = compiled.metadata
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if getattr(meta, kind, 0):
            raise ExportError(f"the plugin's kernel wants scratch memory ({kind}), which TensorRT does not give")
    ptx, parameters = without_scratch(compiled.asm["ptx"], meta.name, len(signature))
    return PluginKernel(meta.name, sm, 32 * meta.num_warps, int(meta.shared), parameters, ptx)


def without_scratch(ptx: str, entry: str, wanted: int) -> tuple[str, int]:
    """The PTX with the parameters after the first ``wanted`` cut out of its entry, and how many are left.

    Raises:
        ExportError: there is no such entry, or it reads what would be cut.
    """
    head = re.search(rf"\.entry\s+{re.escape(entry)}\s*\((.*?)\)", ptx, re.DOTALL)
    if head is None:
        raise ExportError(f"the PTX has no entry {entry}")
    parameters = [line.strip() for line in head.group(1).split(",") if line.strip()]
    if len(parameters) < wanted:
        raise ExportError(f"the PTX's entry takes {len(parameters)} parameters, {wanted} are expected")
    for parameter in parameters[wanted:]:
        name = parameter.split()[-1]
        if re.search(rf"\b{re.escape(name)}\b", ptx[head.end() :]):
            raise ExportError(f"the kernel reads {name}, which TensorRT does not pass")
    kept = ",\n\t".join(parameters[:wanted])
    return ptx[: head.start(1)] + "\n\t" + kept + "\n" + ptx[head.end(1) :], wanted


# ---------------------------------------------------------------- the graph


def plugin_graph(model: Any, front_end: FrontEndSpec) -> Any:
    """A copy of a waveform separator's ONNX model with the mask synthesis as one node of the plugin.

    Raises:
        ExportError: the model has no such part (the spectral form has none).
    """
    import onnx
    from onnx import numpy_helper

    from avsep.export.build.graph import warp_matrices

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    maker = {name: node for node in graph.node for name in node.output}
    logits, spectrum, estimate = _mask_synthesis(graph, maker)
    _, unwarp, time = warp_matrices(front_end)
    identity = np.eye(front_end.frames)
    inputs = [logits, spectrum]
    for prefix, matrix in (("row", unwarp), ("time", identity if time is None else time)):
        for suffix, array in zip(("low", "share"), interpolation_taps(matrix), strict=True):
            name = f"plugin.{prefix}_{suffix}"
            graph.initializer.append(numpy_helper.from_array(array, name))
            inputs.append(name)
    # TensorRT's parser looks for plugins by these two attributes and the operator's name; "1" is what its Python
    # plugins register as.
    node = onnx.helper.make_node(
        NAME, inputs, [estimate], name="mask_spectrum", domain=NAMESPACE, plugin_namespace=NAMESPACE, plugin_version="1"
    )
    place = next(i for i, old in enumerate(graph.node) if estimate in old.output)
    del graph.node[place]
    graph.node.insert(place, node)
    _prune(graph)
    changed.opset_import.append(onnx.helper.make_opsetid(NAMESPACE, 1))
    return changed


def _mask_synthesis(graph: Any, maker: Mapping[str, Any]) -> tuple[str, str, str]:
    """Names of the logits, the mixture's spectrum and the estimated spectra: a Concat of two products of the masks."""
    for node in graph.node:
        products = [maker.get(name) for name in node.input] if node.op_type == "Concat" else []
        if len(products) != 2 or any(p is None or p.op_type != "Mul" for p in products):
            continue
        masks = set(products[0].input) & set(products[1].input)  # type: ignore[union-attr]
        parts = [name for p in products for name in p.input if name not in masks]  # type: ignore[union-attr]
        slices = [_back(name, maker, "Slice") for name in parts]
        sigmoid = _back(next(iter(masks)), maker, "Sigmoid") if len(masks) == 1 else None
        if sigmoid is None or len(slices) != 2 or None in slices:
            continue
        spectra = {cut.input[0] for cut in slices}
        if len(spectra) == 1:
            return str(sigmoid.input[0]), str(spectra.pop()), str(node.output[0])
    raise ExportError("the graph has no masks times spectrum for the plugin: it takes the waveform form, in fp32")


def _back(name: str, maker: Mapping[str, Any], kind: str) -> Any:
    """The nearest node of a kind on the way up from a value, by first inputs; None where there is none."""
    node = maker.get(name)
    while node is not None and node.op_type != kind:
        if node.op_type not in ("Unsqueeze", "Reshape", "Squeeze", "Conv", "Transpose", "Cast"):
            return None
        node = maker.get(node.input[0])
    return node


def _prune(graph: Any) -> None:
    """Remove nodes and constants that lead to no output."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    nodes = list(reversed(kept))
    constants = [c for c in graph.initializer if c.name in needed]
    values = [v for v in graph.value_info if v.name in {name for node in nodes for name in node.output}]
    for field, content in (("node", nodes), ("initializer", constants), ("value_info", values)):
        graph.ClearField(field)
        getattr(graph, field).extend(content)


# ---------------------------------------------------------------- the folder


def export_plugin(
    graph: str | os.PathLike[str],
    front_end: FrontEndSpec,
    out: str | os.PathLike[str],
    sm: Sequence[int] = ARCHITECTURES,
) -> Path:
    """Write the plugin's folder for the graph of a waveform separator (see the module).

    Raises:
        ExportError: the graph has no mask synthesis, or the kernel does not compile.
        ConfigError: an sm that it is not compiled for, or ``out`` is in the way.
        MissingExtraError: Triton or onnx is not installed.
    """
    import onnx

    from avsep.export.build.onnx import require_onnx

    require_onnx()
    target = Path(out)
    if target.exists():
        raise ConfigError(f"{target} is there already: choose another folder for the plugin")
    model = plugin_graph(onnx.load(str(graph)), front_end)
    ids = next((i for i in model.graph.input if i.name == "class_ids"), None)
    sources = ids.type.tensor_type.shape.dim[1].dim_value if ids is not None else 0
    if sources < 1:
        raise ExportError(f"{graph} leaves the number of sources open: the plugin takes fixed shapes")
    kernels = [compile_kernel(front_end, sources, capability) for capability in dict.fromkeys(sm)]
    files: dict[str, bytes] = {
        PLUGIN_GRAPH: model.SerializeToString(),
        PLUGIN_DEFINITION: (Path(__file__).parent / "plugin_definition.py").read_bytes(),
    }
    table = {}
    for kernel in kernels:
        name = f"{NAME}.sm{kernel.sm}.ptx"
        files[name] = kernel.ptx.encode()
        entry = {k: v for k, v in asdict(kernel).items() if k != "ptx"}
        table[f"{kernel.sm // 10}.{kernel.sm % 10}"] = {"file": name, **entry}
    manifest = {
        "format": "avsep-tensorrt-plugin",
        "version": 1,
        "plugin": f"{NAMESPACE}::{NAME}",
        "least_tensorrt": LEAST_TENSORRT,
        "not_tensorrt": ["10.14"],
        "ptx_version": PTX_VERSION,
        "sources": sources,
        "bins": front_end.n_fft // 2 + 1,
        "tile": [_TILE_BINS, _TILE_FRAMES],
        "kernels": table,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files["plugin.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    with staged(target) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return target

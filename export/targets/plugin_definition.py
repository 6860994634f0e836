"""Tells TensorRT of the plugin ``avsep::mask_spectrum``: import this before ``separator.plugin.onnx`` is parsed.

Lies in the plugin's folder as ``avsep_plugin.py``, beside ``plugin.json`` and the PTX. TensorRT 10.9 and later, not
10.14. Importing it registers the plugin; it is needed while the engine is built, not when it runs.
"""

import hashlib
import json
import re
from pathlib import Path

import tensorrt as trt
import tensorrt.plugin as trtp

HERE = Path(__file__).resolve().parent
PLUGIN = json.loads((HERE / "plugin.json").read_text(encoding="utf-8"))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


if _version(trt.__version__) < _version(PLUGIN["least_tensorrt"]) or any(
    _version(trt.__version__) == _version(other) for other in PLUGIN["not_tensorrt"]
):
    raise RuntimeError(
        f"TensorRT {trt.__version__} takes no plugins compiled ahead of time: {PLUGIN['least_tensorrt']} or later "
        f"does, {' and '.join(PLUGIN['not_tensorrt'])} does not; build the plain graph instead"
    )

# The compute capability to build for, as "8.7"; whoever imports this sets it to the device's.
compute_capability = ""


@trtp.register(PLUGIN["plugin"])
def mask_spectrum(
    logits: trtp.TensorDesc,
    spectrum: trtp.TensorDesc,
    row_low: trtp.TensorDesc,
    row_share: trtp.TensorDesc,
    time_low: trtp.TensorDesc,
    time_share: trtp.TensorDesc,
) -> trtp.TensorDesc:
    """logits [B, N, rows, T], spectrum [B, 2 bins, T] -> [B, N, 2 bins, T]"""
    estimate = logits.like()
    estimate.shape_expr[2] = spectrum.shape_expr[1]
    return estimate


@trtp.autotune(PLUGIN["plugin"])
def mask_spectrum_types(logits, spectrum, row_low, row_share, time_low, time_share, outputs):
    """Everything in fp32, but the indices, and nothing but plain rows."""
    return [trtp.AutoTuneCombination("FP32, FP32, INT32, FP32, INT32, FP32, FP32", "LINEAR")]


@trtp.aot_impl(PLUGIN["plugin"])
def mask_spectrum_kernel(
    logits, spectrum, row_low, row_share, time_low, time_share, outputs, tactic
) -> tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:  # TensorRT reads these types
    """The PTX and how it is launched: blocks over frames, bins, and sources of all mixtures."""
    kernels = PLUGIN["kernels"]
    if compute_capability not in kernels:
        raise RuntimeError(
            f"avsep_plugin.compute_capability is {compute_capability!r}: set it to that of this GPU, which must be one "
            f"of {', '.join(kernels)}"
        )
    kernel = kernels[compute_capability]
    ptx = (HERE / kernel["file"]).read_bytes()
    if hashlib.sha256(ptx).hexdigest() != PLUGIN["files"][kernel["file"]]:
        raise RuntimeError(f"{HERE / kernel['file']} is not the file that was exported: copy the folder again")
    shape = logits.shape_expr
    tile_bins, tile_frames = PLUGIN["tile"]
    launch = trtp.KernelLaunchParams()
    launch.grid_x = trtp.cdiv(shape[3], tile_frames)
    launch.grid_y = (PLUGIN["bins"] + tile_bins - 1) // tile_bins
    launch.grid_z = shape[0] * shape[1]
    launch.block_x = kernel["threads"]
    launch.shared_mem = kernel["shared_bytes"]
    scalars = trtp.SymIntExprs(1)
    scalars[0] = trtp.SymInt32(shape[3])
    return kernel["entry"], ptx, launch, scalars

"""INT8 by explicit quantisation, through ONNX Runtime's static quantiser with the settings that TensorRT asks for.

Symmetric, activations per tensor, kernels of convolutions per output channel; biases and outputs are not quantised (an
INT32 bias is refused by TensorRT's parser); QuantizeLinear and DequantizeLinear stand directly before the convolution
that reads them. Kernels of transposed convolutions are per tensor: which axis a deconvolution kernel wants differs
between TensorRT's releases, and a build does not notice the wrong one.

NVIDIA's nvidia-modelopt does the same through the same quantiser, and pins other versions of onnx and onnxruntime.

Ranges come from training mixtures. Which layers are quantised is measured: the layers are ranked by the error that
each makes alone, and as many as stay within a drift are kept, the least harmful first. The mixtures that say so are not
those of the gate, which would be no check of its own then.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ExportError
from avsep.export.build.precision import body_nodes
from avsep.export.runtime.sessions import start_onnx

__all__ = ["Calibrated", "calibrate", "quantisable", "quantise", "rank_layers", "select_layers"]

Array = NDArray[Any]
_OPERATORS = ("Conv", "ConvTranspose")
_CHUNK = 4  # mixtures whose intermediate values are held at once


@dataclass(frozen=True)
class Calibrated:
    """An fp32 graph and the ranges of what its convolutions read; ``layers`` are the nodes that may be quantised."""

    path: Path
    ranges: Any
    layers: tuple[str, ...]


class _Reader:
    """What ONNX Runtime's calibrator draws feeds from."""

    def __init__(self, feeds: Sequence[Mapping[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


def quantisable(model: Any, network: str = "separator") -> tuple[str, ...]:
    """Names of the two-dimensional convolutions that may be quantised, in order, of the submodule ``network`` of what
    was traced: all but the first, which sees the spectrogram, and the last, which gives the mask features."""
    body = body_nodes(model, network)
    ranks = {i.name: len(i.dims) for i in model.graph.initializer}
    found = [n for n in model.graph.node if n.op_type in _OPERATORS and n.name in body and ranks.get(n.input[1]) == 4]
    wide = [n for n in found if any(size > 1 for size in _kernel(n))]  # a 1x1 projection belongs to the decoder
    return tuple(n.name for n in wide[1:-1])


def _kernel(node: Any) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "kernel_shape"), [])


def calibrate(
    path: Path,
    feeds: Iterable[Mapping[str, Array]],
    *,
    progress: Callable[[int], None] | None = None,
    network: str = "separator",
) -> Calibrated:
    """Measure the ranges of the activations of the fp32 graph at ``path`` on ``feeds``, its inputs by name.

    Raises:
        ExportError: there are no feeds, the graph has nothing to quantise, or a range is not finite.
    """
    import onnx
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    layers = quantisable(onnx.load(str(path)), network)
    if not layers:
        raise ExportError("int8 finds no convolution to quantise in this separator's network: export fp16")
    done = 0
    with tempfile.TemporaryDirectory(prefix="avsep-calibrate-") as folder, _quiet():
        calibrator = create_calibrator(
            path,
            list(_OPERATORS),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"symmetric": True},
        )
        chunk: list[Mapping[str, Array]] = []
        for feed in feeds:
            chunk.append(feed)
            done += 1
            if len(chunk) == _CHUNK:
                calibrator.collect_data(_Reader(chunk))
                chunk = []
                if progress is not None:
                    progress(done)
        if chunk:
            calibrator.collect_data(_Reader(chunk))
        if not done:
            raise ExportError("int8 needs mixtures to measure its ranges on: give calibration mixtures, or export fp16")
        ranges = calibrator.compute_data()
    for name, data in ranges.items():
        low, high = (np.asarray(v) for v in data.range_value)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ExportError(f"value '{name}' of the graph is not finite on the calibration mixtures")
    return Calibrated(path, ranges, layers)


def quantise(calibrated: Calibrated, layers: Collection[str]) -> Any:
    """The ONNX model with ``layers`` quantised.

    Raises:
        ExportError: a scale came out that TensorRT refuses; names the layer.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.load(str(calibrated.path))
    chosen = [n for n in model.graph.node if n.name in layers]
    per_tensor = {
        n.input[1]: [{"quant_type": QuantType.QInt8, "symmetric": True}] for n in chosen if n.op_type == "ConvTranspose"
    }
    with _quiet():
        quantizer = QDQQuantizer(
            model,
            True,  # per channel
            False,  # no reduced range
            QuantType.QInt8,
            QuantType.QInt8,
            calibrated.ranges,
            [n.name for n in chosen],
            [],
            list(_OPERATORS),
            {
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "AddQDQPairToWeight": True,
                "DedicatedQDQPair": False,
                "OpTypesToExcludeOutputQuantization": list(_OPERATORS),
                "QDQDisableWeightAdjustForInt32Bias": True,
                "TensorQuantOverrides": per_tensor,
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    made = quantizer.model.model
    # The quantiser names its own domains, of which no node is.
    used = {n.domain for n in made.graph.node} | {""}
    kept = [o for o in made.opset_import if o.domain in used or (o.domain == "ai.onnx" and "" not in used)]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    _check_scales(made, chosen)
    return made


def _check_scales(model: Any, chosen: Sequence[Any]) -> None:
    import onnx

    constants = {i.name: i for i in model.graph.initializer}
    quantised = 0
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        scale = onnx.numpy_helper.to_array(constants[node.input[1]])
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ExportError(
                f"node '{node.name}' would have a scale of {float(np.min(scale)):g}, and TensorRT takes positive ones "
                "only: its layer is silent on the calibration mixtures; give more of them, or export fp16"
            )
        quantised += 1
    if quantised < len(chosen):
        raise ExportError(f"only {quantised} tensors were quantised for {len(chosen)} layers")


def rank_layers(
    calibrated: Calibrated,
    feeds: Sequence[Mapping[str, Array]],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[str, float]]:
    """The layers with the error that each makes when quantised alone, the least harmful first: energy of the change
    in the output relative to the output's, in dB. ``progress`` is called with the number of layers done."""
    import onnx

    expected = _outputs(calibrated.path, feeds)
    found = []
    with tempfile.TemporaryDirectory(prefix="avsep-int8-") as folder:
        file = Path(folder) / "one.onnx"
        for number, layer in enumerate(calibrated.layers):
            if progress is not None:
                progress(number)
            onnx.save(quantise(calibrated, [layer]), str(file))
            error = sum(
                float(np.sum((got - want).astype(np.float64) ** 2))
                for got, want in zip(_outputs(file, feeds), expected, strict=True)
            )
            power = sum(float(np.sum(want.astype(np.float64) ** 2)) for want in expected)
            found.append((layer, 10 * float(np.log10((error + 1e-30) / (power + 1e-30)))))
    return sorted(found, key=lambda pair: pair[1])


def select_layers(names: Sequence[str], passes: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """As many of the layers as ``passes`` accepts together, from the first on; found by bisection.

    Empty when not even one layer passes.
    """
    low, high = 0, len(names)  # `low` layers are known to pass, none does trivially
    if passes(tuple(names)):
        return tuple(names)
    while high - low > 1:
        middle = (low + high) // 2
        if passes(tuple(names[:middle])):
            low = middle
        else:
            high = middle
    return tuple(names[:low])


def _outputs(path: Path, feeds: Sequence[Mapping[str, Array]]) -> list[Array]:
    session, _ = start_onnx(path)
    return [np.asarray(session.run(None, dict(feed))[0]) for feed in feeds]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises on the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

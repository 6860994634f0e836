"""Does the exported graph give what PyTorch gives? Measured in ONNX Runtime; no torch is needed here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.errors import ExportError
from avsep.export.runtime.errors import one_line
from avsep.export.runtime.sessions import start_onnx
from avsep.export.runtime.verify import compare

__all__ = ["Parity", "compare", "run_onnx"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """How far a graph's output is from the reference's.

    ``max_error`` the largest absolute difference in a sample; ``error_db`` the energy of the difference relative to
    the reference's, in dB; ``provider`` the execution provider that really ran; ``seconds`` of one run.
    """

    max_error: float
    error_db: float
    provider: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_onnx(path: Path, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], str, float]:
    """Run a graph in ONNX Runtime. Returns the outputs by name, in order, the provider that ran and the seconds.

    Raises:
        ExportError: as :func:`start_onnx`, or the graph does not take the inputs.
    """
    session, got = start_onnx(path)
    try:
        start = time.perf_counter()
        outputs = session.run(None, dict(inputs))
        seconds = time.perf_counter() - start
        names = (output.name for output in session.get_outputs())
        return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}, got, seconds
    except Exception as error:  # onnxruntime raises classes of its C++ module that share no base but this one
        raise ExportError(f"ONNX Runtime cannot run {path.name}: {one_line(error)}") from None

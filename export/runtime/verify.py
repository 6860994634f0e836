"""Is a bundle what was exported, and does it compute here what it computed there?

On the command line: ``python -m avsep_runtime.verify BUNDLE [PROVIDER]``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import AvsepError, ConfigError, ExportError, one_line
from .reader import Bundle, Graph, open_bundle
from .sessions import ENGINES, GRAPH_PROVIDERS, ONNX_PROVIDERS, Engine, OnnxSession, check_provider, open_session
from .streaming import SEQUENCES, run_sequence

__all__ = ["PROVIDERS", "GraphCheck", "Verification", "compare", "is_judged", "main", "verify_bundle"]

Array = NDArray[Any]

# what may be asked for: a provider that runs, or is refused; never whichever is there
PROVIDERS = (*GRAPH_PROVIDERS, *ENGINES)
_ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
}


@dataclass(frozen=True)
class GraphCheck:
    """One graph on its golden inputs. ``max_error`` the largest absolute difference from the golden outputs;
    ``error_db`` its energy relative to theirs; ``provider`` what really ran; ``seconds`` of one run, the first;
    of a graph that goes frame by frame of its whole golden sequence."""

    file: str
    kind: str
    precision: str
    provider: str
    max_error: float
    error_db: float
    tolerance: float
    seconds: float


@dataclass(frozen=True)
class Verification:
    """A bundle that holds, and what each of its graphs did."""

    bundle: Bundle
    graphs: tuple[GraphCheck, ...]

    @property
    def provider(self) -> str:
        """The provider that really ran, of all graphs: only one is ever asked for."""
        return self.graphs[0].provider


def verify_bundle(
    bundle: str | os.PathLike[str] | Bundle, provider: str | None = None, *, tolerance: float | None = None
) -> Verification:
    """Check a bundle's names, manifest and hashes, and run every graph on its golden inputs.

    Args:
        bundle: a folder or tar, or a bundle that was opened with its hashes checked.
        provider: ``cpu`` (when None), ``cuda`` or ``onnxruntime-tensorrt`` of ONNX Runtime, ``openvino``, ``tensorrt``
            or ``tensorrt-rtx`` for engines that were built here; it runs, or is refused.
        tolerance: largest absolute difference; each graph's own when None.

    Raises:
        ExportError: a file is missing, changed, truncated or one too many; or a graph is not what the manifest says, or
            computes something else. Names the file.
        UnknownNameError: an unknown provider.
    """
    name = "cpu" if provider is None else provider
    check_provider(name, PROVIDERS)
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise ConfigError(f"tolerance must be positive, got {tolerance}")
    with bundle if isinstance(bundle, Bundle) else open_bundle(bundle) as opened:
        checks = tuple(_check_graph(opened, graph, name, tolerance) for graph in opened.graphs)
    return Verification(opened, checks)


def compare(estimate: Array, reference: Array) -> tuple[float, float]:
    """Largest absolute difference, and the error's energy relative to the reference's in dB.

    Raises:
        ExportError: shapes differ, or a value is not finite.
    """
    if estimate.shape != reference.shape:
        raise ExportError(f"the graph gives the shape {list(estimate.shape)}, PyTorch {list(reference.shape)}")
    for name, array in (("the graph", estimate), ("PyTorch", reference)):
        if not np.isfinite(array).all():
            raise ExportError(f"{name} gives NaN or infinite samples")
    difference = estimate.astype(np.float64) - reference.astype(np.float64)
    power = float(np.sum(np.square(reference, dtype=np.float64)))
    error = float(np.sum(difference**2))
    floor = 1e-30
    error_db = 10 * float(np.log10((error + floor * power + 1e-300) / (power + 1e-300)))
    return float(np.abs(difference).max(initial=0.0)), error_db


def is_judged(kind: str, output: str) -> bool:
    """Whether a graph's tolerance is of this output too. What a stream carries has no full scale; where it is wrong, so
    is what comes out of the next calls."""
    return kind != "stream" or output in SEQUENCES


def _check_graph(bundle: Bundle, graph: Graph, provider: str, tolerance: float | None) -> GraphCheck:
    where = f"{bundle.path}: {graph.file}"
    limit = graph.tolerance if tolerance is None else tolerance
    inputs, golden = bundle.golden(graph)
    engine: Engine
    if provider in ONNX_PROVIDERS:
        engine = session = OnnxSession(bundle, graph, provider)
        _check_interface(session.session, graph, where)
    else:
        ((engine,), _) = open_session(bundle, [graph], provider)
    ran = engine.provider
    try:
        start = time.perf_counter()
        if graph.kind == "stream":
            outputs = run_sequence(engine.run, inputs, list(golden))
        else:
            outputs = {name: np.array(array) for name, array in engine.run(inputs).items()}
        seconds = time.perf_counter() - start
    finally:
        engine.close()
    worst = (0.0, float("-inf"))
    for name, reference in golden.items():
        try:
            found = compare(outputs[name], reference)
            worst = max(worst, found) if is_judged(graph.kind, name) else worst
        except ExportError as error:
            raise ExportError(f"{where}, on {ran}: {error}") from None
    max_error, error_db = worst
    if not max_error <= limit:
        raise ExportError(
            f"{where} differs from its golden output by {max_error:.2e} ({error_db:.0f} dB), more than {limit:.0e}, "
            f"on {ran}: {'export' if provider in GRAPH_PROVIDERS else 'build'} it again"
        )
    return GraphCheck(graph.file, graph.kind, graph.precision, ran, max_error, error_db, limit, seconds)


def _check_interface(session: Any, graph: Graph, where: str) -> None:
    """Refuse a graph whose inputs and outputs are not those that the manifest tells of."""
    for side, stated, found in (
        ("takes", graph.inputs, session.get_inputs()),
        ("gives", graph.outputs, session.get_outputs()),
    ):
        says = {
            t.name: (_ONNX_TYPES[t.dtype], tuple(s if isinstance(s, int) else None for s in t.shape)) for t in stated
        }
        has = {t.name: (t.type, tuple(s if isinstance(s, int) else None for s in t.shape)) for t in found}
        if says.keys() != has.keys():
            raise ExportError(
                f"{where} {side} {', '.join(has)}, the manifest says {', '.join(says)}: it is another graph, copy or "
                "export the bundle again"
            )
        for name, (kind, shape) in has.items():
            # an output's shape may stay open in a graph even where it is known
            fits = len(shape) == len(says[name][1]) and all(
                size == want or (side == "gives" and size is None)
                for size, want in zip(shape, says[name][1], strict=True)
            )
            if kind != says[name][0] or not fits:
                raise ExportError(
                    f"{where} {side} {name} as {kind} {_dims(shape)}, the manifest says {says[name][0]} "
                    f"{_dims(says[name][1])}: it is another graph, copy or export the bundle again"
                )


def _dims(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, with the standard library alone. Returns 0, or 2 with one line on the standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not 1 <= len(given) <= 2 or given[0].startswith("-"):
        print(f"usage: python -m {__package__}.verify BUNDLE [{'|'.join(PROVIDERS)}]", file=sys.stderr)
        return 2
    try:
        result = verify_bundle(*given)
    except (AvsepError, OSError) as error:
        print(f"avsep: {one_line(error, 1000)}", file=sys.stderr)
        return 2
    for check in result.graphs:
        print(
            f"{check.file}: {check.provider} differs by {check.max_error:.1e} ({check.error_db:.0f} dB), may by "
            f"{check.tolerance:.1e}; {1e3 * check.seconds:.0f} ms"
        )
    print(f"all {len(result.bundle.files)} files match the manifest")
    return 0


if __name__ == "__main__":
    sys.exit(main())

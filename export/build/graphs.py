"""The graphs of a bundle, one after another: written, audited, compared with PyTorch, gated.

What is written depends on the plan: the separator's graph in each precision, and one graph for each visual encoder that
computes. The lower precisions are made from the fp32 graph, whether it is kept or not.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from avsep.errors import ExportError
from avsep.export.build.encoders import EncoderGraph, encoder_specs, exported_roles
from avsep.export.build.gate import (
    MIXTURES,
    Gate,
    Reference,
    encoded,
    measure_gate,
    references,
    source_inputs,
    synthetic_batches,
)
from avsep.export.build.golden import golden_inputs
from avsep.export.build.graph import SpectralSeparator, WaveformSeparator
from avsep.export.build.onnx import check_graph, write_onnx
from avsep.export.build.operators import LEAST_TENSORRT
from avsep.export.build.parity import Parity, compare, run_onnx
from avsep.export.build.plan import TOLERANCE, ExportPlan, TensorSpec, profiles, tensor_specs
from avsep.export.build.precision import HALF_OPERATORS, body_nodes, check_activations, to_half
from avsep.export.build.quantise import calibrate, quantise, rank_layers, select_layers
from avsep.export.build.stream import (
    GOLDEN_CALLS,
    StreamGraph,
    error_along,
    golden_stream,
    reference_stream,
    stream_entry,
)
from avsep.export.runtime.sessions import start_onnx
from avsep.export.runtime.streaming import FrameStream, StreamLayout, layout_of, run_sequence
from avsep.export.runtime.transforms import istft, stft
from avsep.export.runtime.verify import is_judged
from avsep.types import Batch, VisualFeatures

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["GraphFile", "Progress", "write_graphs"]

Array = NDArray[Any]
# called with (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]

# The tolerance of a graph whose precision has none of its own: this many times what was measured when it was made, and
# no less than fp32's. Another processor rounds half precision otherwise.
_TOLERANCE_FACTOR = 4.0
# An encoder's features have no full scale: the tolerance is a share of the largest, or of this where all are near zero.
_LEAST_FEATURE = 1e-3
# Mixtures that layers are ranked on; the order matters, not the figures.
_RANKING = 4
# Calls of a mixture's stream that ranges are measured on.
_CALLS = 16
# The shares of the gate's limit that layers are chosen by, one after the other: the gate is on other mixtures, whose
# largest drift is another one.
_SHARES = (0.5, 1.0)


@dataclass(frozen=True)
class GraphFile:
    """A graph that was written, and what the manifest says of it.

    ``golden`` holds inputs and outputs by name; ``quantised`` says of an INT8 graph how its layers were chosen;
    ``stream`` of a graph that goes frame by frame what it carries from call to call.
    """

    file: str
    kind: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: list[dict[str, dict[str, list[int]]]]
    opset: int
    operators: dict[str, int]
    golden: dict[str, Array]
    parity: Parity
    tolerance: float
    gate: Gate | None
    quantised: dict[str, Any] | None = None
    stream: dict[str, Any] | None = None

    @property
    def golden_file(self) -> str:
        return f"{self.file.removesuffix('.onnx')}.golden.npz"

    def to_dict(self) -> dict[str, Any]:
        """The graph's entry in the manifest."""
        return {
            "file": self.file,
            "kind": self.kind,
            "precision": self.precision,
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
            "profiles": self.profiles,
            "opset": self.opset,
            "operators": self.operators,
            "least_tensorrt": LEAST_TENSORRT,
            "golden": self.golden_file,
            "tolerance": self.tolerance,
            "parity": self.parity.to_dict(),
            "gate": None if self.gate is None else self.gate.to_dict(),
            **({} if self.quantised is None else {"quantised": self.quantised}),
            **({} if self.stream is None else {"stream": self.stream}),
        }


def write_graphs(
    separator: Separator,
    plan: ExportPlan,
    folder: Path,
    held_out: Iterable[Batch] | None = None,
    calibration: Iterable[Batch] | None = None,
    validation: Iterable[Batch] | None = None,
    progress: Progress | None = None,
) -> list[GraphFile]:
    """Write the graphs of a separator into ``folder``; golden arrays are returned, not written.

    Args:
        separator: on the CPU, in evaluation mode, of the plan's length (:func:`avsep.export.build.graph.with_length`).
        held_out: mixtures for the gate, of that length. Without them synthetic ones show whether the graph computes
            the same, and the gate says so.
        calibration: training mixtures that INT8's ranges are measured on, of that length.
        validation: mixtures that INT8's layers are chosen on, of that length, none of them in ``held_out``; some of
            ``calibration`` where there are none.
        progress: called with (what is being done, steps done, steps in all).

    Raises:
        ExportError: a graph cannot be written, is refused by the audit, differs by more than its tolerance, or drifts.
    """
    if "int8" in plan.precision and calibration is None:
        raise ExportError("int8 needs training mixtures to measure its ranges on: export a run, or give calibration")
    batches = None if held_out is None else list(held_out)
    first = batches[0] if batches else None
    steps = len(plan.precision) + len(exported_roles(separator))

    def tell(done: int, label: str, what: str = "") -> None:
        if progress is not None:
            progress(f"{label}: {what}" if what else label, done, steps)

    for role in exported_roles(separator):
        encoder_specs(separator, role, plan, first)  # what cannot be exported is told before minutes are spent
    made: list[GraphFile] = []
    kind = _StreamWriter if separator.causal else _SeparatorWriter
    with tempfile.TemporaryDirectory(prefix="avsep-export-") as scratch:
        writer = kind(separator, plan, folder, Path(scratch), batches, calibration, validation)
        for done, precision in enumerate(plan.precision):
            label = f"{writer.kind} {precision}"
            tell(done, label)
            made.append(writer.write(precision, functools.partial(tell, done, label)))
    return _with_encoders(separator, plan, folder, first, made, tell)


def _with_encoders(
    separator: Separator,
    plan: ExportPlan,
    folder: Path,
    batch: Batch | None,
    made: list[GraphFile],
    tell: Callable[[int, str], None],
) -> list[GraphFile]:
    for done, role in enumerate(exported_roles(separator)):
        tell(len(plan.precision) + done, f"{role} encoder")
        made.append(_write_encoder(separator, role, plan, folder, batch))
    tell(len(made), "graphs written")
    return made


class _SeparatorWriter:
    """The separator's graph in the precisions of a plan."""

    network = "separator"  # the submodule of what is traced that lower precisions are of
    calibrates = "mixtures"

    def __init__(
        self,
        separator: Separator,
        plan: ExportPlan,
        folder: Path,
        scratch: Path,
        held_out: list[Batch] | None,
        calibration: Iterable[Batch] | None,
        validation: Iterable[Batch] | None,
    ) -> None:
        self.separator, self.plan, self.folder, self.scratch = separator, plan, folder, scratch
        self.kind = self._kind()
        self.on = "synthetic" if held_out is None else "held-out"
        self.held_out = references(
            separator, synthetic_batches(separator, plan) if held_out is None else held_out, plan
        )
        self.calibration, self.validation = calibration, validation
        self.inputs, self.outputs = tensor_specs(separator, plan)
        self.module = self._module().eval()
        self.golden = self._golden()
        self.reference = self._answer(self.golden)
        self.single: Path | None = None

    def _kind(self) -> str:
        return "spectral" if self.plan.spectral else "separator"

    def _module(self) -> torch.nn.Module:
        form = SpectralSeparator if self.plan.spectral else WaveformSeparator
        return form(self.separator, motion_mask=self.plan.motion_mask, channels=self.plan.channels)

    def _golden(self) -> dict[str, Array]:
        return self._drawn(self.inputs)

    def _drawn(self, specs: Iterable[TensorSpec]) -> dict[str, Array]:
        front_end = self.separator.spec.front_end
        stft = {"length": front_end.clip_samples}
        stft |= {name: getattr(front_end, name) for name in ("n_fft", "hop", "padding")}
        count = self.separator.spec.num_classes
        return golden_inputs(list(specs), count, front_end.sample_rate_hz, self.plan.seed, stft=stft)

    def _answer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What PyTorch answers, by output name, by the path that training and evaluation use."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        visual = VisualFeatures(
            tensors.get("object_features"),
            tensors.get("motion_features"),
            tensors.get("motion_mask"),
            tensors.get("seen"),
            tensors.get("motion_seen"),
        )
        ids, channels = tensors["class_ids"], self.plan.channels
        with torch.inference_mode():
            if not self.plan.spectral:
                estimate, output = self.separator.separate_and_tell(tensors["mixture"], visual, ids)
            else:
                front_end = self.separator.spec.front_end
                mixture = istft(inputs["spectrum"], hop=front_end.hop, length=front_end.clip_samples)
                mono = torch.from_numpy(mixture if channels == 1 else mixture.mean(axis=1))
                output = self.separator(self.separator.analyse(mono[:, None]).network_input, visual, ids)
                masks = self.separator.front_end.unwarp(torch.sigmoid(output.logits))  # [B, N, bins, T]
                masks = masks[:, :, None] if channels == 1 else masks[:, :, None, None]
                estimate = masks * tensors["spectrum"][:, None]
            answers = {self.outputs[0].name: estimate.numpy()}
            if output.presence is not None:
                answers["presence"] = torch.sigmoid(output.presence).numpy()
            return {spec.name: answers[spec.name] for spec in self.outputs}

    def write(self, precision: str, tell: Callable[[str], None] = lambda what: None) -> GraphFile:
        """Write, check, compare and gate one graph; ``tell`` is given what is being done, where it takes long."""
        file = f"{self.kind}{'' if precision == 'fp32' else '.' + precision}.onnx"
        path = self.folder / file
        if self.single is None:
            self.single = path if precision == "fp32" else self.scratch / "single.onnx"
            self._trace(self.single)
        elif precision == "fp32":
            shutil.copyfile(self.single, path)
        quantised = None
        if precision == "fp16":
            self._half(path)
        elif precision == "int8":
            quantised = self._int8(path, tell)
        operators = check_graph(path, self.plan.opset)
        limit = self.plan.tolerance_of(precision)
        parity, tolerance = _held_to(path, *self._run(path), self._judged(), limit, "--tolerance")
        gate = self._gate(path, self.held_out, self.on)
        gate.require(file)
        return GraphFile(
            file=file,
            kind=self.kind,
            precision=precision,
            inputs=self.inputs,
            outputs=self.outputs,
            profiles=profiles(self.inputs, self.plan),
            opset=self.plan.opset,
            operators=operators,
            golden={**self.golden, **self.reference},
            parity=parity,
            tolerance=tolerance,
            gate=gate,
            quantised=quantised,
            stream=self._stream(path, precision),
        )

    def _run(self, path: Path) -> tuple[dict[str, Array], str, float]:
        """What a graph gives for the golden inputs, what it ran on, and the seconds of a call."""
        return run_onnx(path, self.golden)

    def _judged(self) -> dict[str, Array]:
        """What of the reference a graph is held to."""
        return {name: value for name, value in self.reference.items() if is_judged(self.kind, name)}

    def _gate(self, path: Path, expected: Iterable[Reference], on: str) -> Gate:
        return measure_gate(path, self.separator, self.plan, expected, on=on)

    def _stream(self, path: Path, precision: str) -> dict[str, Any] | None:
        """Of a graph that goes frame by frame, what the manifest says of that."""
        return None

    def _examples(self) -> Iterable[Mapping[str, Array]]:
        """Inputs of single calls, with which the range of half precision is looked at."""
        return [self.golden]

    def _trace(self, path: Path) -> None:
        # A size of 1 would be taken for a constant of the graph, where it is to stay open.
        specs = [
            replace(s, shape=tuple(max(n, 2) if axis in s.open_axes else n for axis, n in enumerate(s.shape)))
            for s in self.inputs
        ]
        tensors = {name: torch.from_numpy(array) for name, array in self._drawn(specs).items()}
        open_axes = {s.name: s.open_axes for s in self.inputs}
        names = [spec.name for spec in self.outputs]
        write_onnx(self.module, tensors, names, path, self.plan.opset, open_axes=open_axes)

    def _half(self, path: Path) -> None:
        import onnx

        assert self.single is not None
        model = onnx.load(str(self.single))
        half = to_half(model, body_nodes(model, self.network), HALF_OPERATORS)
        check_activations(self.single, half, self._examples())
        onnx.save(half, str(path))

    def _int8(self, path: Path, tell: Callable[[str], None]) -> dict[str, Any]:
        """INT8 convolutions, as many as stay within a share of the gate's limit on mixtures that are not the gate's;
        the matrix products in half precision, since Turing has none in fp32 in TensorRT-RTX.

        Returns:
            How the layers were chosen, for the manifest.
        """
        import onnx

        assert self.single is not None
        assert self.calibration is not None
        body = body_nodes(onnx.load(str(self.single)), self.network)
        training = iter(self.calibration)
        first = list(itertools.islice(training, MIXTURES))
        tell("measuring ranges")
        calibrated = calibrate(
            self.single,
            self._feeds(itertools.chain(first, training)),
            progress=lambda done: tell(f"ranges of {done} {self.calibrates}"),
            network=self.network,
        )
        ranking = list(self._feeds(first[:_RANKING]))
        many = len(calibrated.layers)
        ranked = rank_layers(calibrated, ranking, progress=lambda done: tell(f"layer {done + 1} of {many} alone"))
        on, batches = ("calibration", first) if self.validation is None else ("validation", self.validation)
        expected = references(self.separator, batches, self.plan)

        def save(layers: tuple[str, ...]) -> None:
            onnx.save(to_half(quantise(calibrated, layers), body, ("Gemm", "MatMul")), str(path))

        @functools.cache
        def drift(layers: tuple[str, ...]) -> Gate:
            tell(f"{len(layers)} of {many} layers")
            save(layers)
            return self._gate(path, expected, on)

        names = [name for name, _ in ranked]
        layers: tuple[str, ...] = ()
        for share in _SHARES:
            within = functools.partial(_within, drift, share * self.plan.gate_db)
            layers = layers or select_layers(names, within)
        if not layers and self.plan.allow_drift:
            layers = tuple(names)
        if not layers:
            drift(tuple(names[:1])).require(f"{path.name} with one convolution in INT8")
        chosen = drift(layers)
        save(layers)
        return {
            "layers": len(layers),
            "of": many,
            "on": on,
            "mixtures": chosen.mixtures,
            "max_drift_db": chosen.told_drift_db,
        }

    def _feeds(self, batches: Iterable[Batch]) -> Iterator[dict[str, Array]]:
        """Batches as inputs of the graph, one mixture and the graph's number of sources at a time."""
        front_end = self.separator.spec.front_end
        first, *of_sources = (spec.name for spec in self.inputs)
        for number, batch in enumerate(batches):
            given = source_inputs(encoded(self.separator, batch, self.plan, number), batch.class_ids)
            rows = np.resize(np.arange(batch.class_ids.shape[0]), self.plan.batch)
            columns = np.resize(np.arange(batch.class_ids.shape[1]), self.plan.sources)
            mixture = batch.mixture.numpy()[rows]
            if self.plan.channels > 1:
                mixture = np.repeat(mixture[:, None], self.plan.channels, axis=1)
            if first == "spectrum":
                mixture = stft(mixture, n_fft=front_end.n_fft, hop=front_end.hop, padding=front_end.padding)
            yield {first: mixture, **{name: given[name][rows][:, columns] for name in of_sources}}


class _StreamWriter(_SeparatorWriter):
    """The graph of a causal separator, which takes the next frames of a stream. What it carries from call to call is in
    fp32 in every precision, as the transforms are."""

    network = "steps"
    calibrates = "calls"

    def _kind(self) -> str:
        return "stream"

    def _module(self) -> torch.nn.Module:
        return StreamGraph(self.separator, frames=self.plan.frames, channels=self.plan.channels)

    def _golden(self) -> dict[str, Array]:
        mixture, *others = self.inputs
        length = mixture.shape[-1]
        whole = replace(mixture, shape=(*mixture.shape[:-1], GOLDEN_CALLS * length))
        drawn = self._drawn([whole, *others])
        return golden_stream({**drawn, "mixture": drawn["mixture"][..., :length]}, drawn["mixture"])

    def _answer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        reference = reference_stream(self.separator, inputs)
        return {tensor.name: reference[tensor.name] for tensor in self.outputs}

    def _run(self, path: Path) -> tuple[dict[str, Array], str, float]:
        run, provider = self._started(path)
        began = time.perf_counter()
        estimates = run_sequence(run, self.golden, list(self.reference))
        return estimates, provider, (time.perf_counter() - began) / GOLDEN_CALLS

    def _started(self, path: Path) -> tuple[Callable[[Mapping[str, Array]], dict[str, Array]], str]:
        session, provider = start_onnx(path)
        names = [tensor.name for tensor in self.outputs]
        return lambda given: dict(zip(names, session.run(None, dict(given)), strict=True)), provider

    def _examples(self) -> Iterable[Mapping[str, Array]]:
        assert self.single is not None
        run, _ = self._started(self.single)
        calls: list[Mapping[str, Array]] = []

        def recorded(given: Mapping[str, Array]) -> dict[str, Array]:
            calls.append(dict(given))
            return run(given)

        run_sequence(recorded, self.golden, list(self.reference))
        return calls

    def _stream(self, path: Path, precision: str) -> dict[str, Any]:
        entry = stream_entry(self.plan, self.inputs)
        if precision == "fp32":
            return entry
        assert self.single is not None
        along = error_along(self._started(self.single)[0], self._started(path)[0], self.golden)
        along.require(path.name)
        return {**entry, "along": along.to_dict()}

    def _gate(self, path: Path, expected: Iterable[Reference], on: str) -> Gate:
        run, _ = self._started(path)
        layout = self._layout()

        def separate(mixtures: torch.Tensor, visual: VisualFeatures, class_ids: torch.Tensor) -> torch.Tensor:
            width = layout.sources or class_ids.shape[1]
            given = source_inputs(visual, class_ids)
            rows = [
                np.concatenate(
                    [
                        self._streamed(run, layout, mixture, self._part(given, row, slice(first, first + width)))
                        for first in range(0, class_ids.shape[1], width)
                    ]
                )
                for row, mixture in enumerate(mixtures.numpy())
            ]
            return torch.from_numpy(np.stack(rows))

        return measure_gate(path, self.separator, self.plan, expected, on=on, separate=separate)

    def _layout(self) -> StreamLayout:
        spec = self.separator.spec.front_end
        inputs = [tensor.to_dict() for tensor in self.inputs]
        return layout_of(
            spec.model_dump(), spec.frames, stream_entry(self.plan, self.inputs), inputs, self.plan.channels
        )

    def _part(self, given: Mapping[str, Array], row: int, columns: Any) -> dict[str, Array]:
        """The inputs of some sources of one mixture, [1, N, ...]."""
        taken = {spec.name for spec in self.inputs} & given.keys()
        return {name: given[name][row : row + 1][:, columns] for name in taken}

    def _streamed(
        self,
        run: Callable[[dict[str, Array]], Mapping[str, Array]],
        layout: StreamLayout,
        mixture: Array,
        sources: Mapping[str, Array],
    ) -> Array:
        """A mixture [L] as one stream: [N, L]"""
        flow = FrameStream(run, layout, sources["class_ids"].shape[1], lambda start: sources)
        return np.concatenate((flow.push(mixture), flow.flush()), axis=-1)

    def _feeds(self, batches: Iterable[Batch]) -> Iterator[dict[str, Array]]:
        """Calls of each mixture's stream, spread evenly over it, with the states that those before left."""
        assert self.single is not None
        run, _ = self._started(self.single)
        layout = self._layout()
        for number, batch in enumerate(batches):
            given = source_inputs(encoded(self.separator, batch, self.plan, number), batch.class_ids)
            columns = np.resize(np.arange(batch.class_ids.shape[1]), self.plan.sources)
            calls: list[dict[str, Array]] = []

            def recorded(inputs: dict[str, Array], calls: list[dict[str, Array]] = calls) -> dict[str, Array]:
                calls.append(dict(inputs))
                return run(inputs)

            self._streamed(recorded, layout, batch.mixture.numpy()[0], self._part(given, 0, columns))
            step = max(1, len(calls) // _CALLS)
            yield from calls[step // 2 :: step]


def _within(drift: Callable[[tuple[str, ...]], Gate], limit_db: float, layers: tuple[str, ...]) -> bool:
    return drift(layers).within(limit_db)


def _held_to(
    path: Path,
    estimates: Mapping[str, Array],
    provider: str,
    seconds: float,
    reference: Mapping[str, Array],
    limit: float | None,
    whose: str,
) -> tuple[Parity, float]:
    """Parity with the reference outputs, of that which differs most, and the tolerance for others to hold: ``limit``,
    or, without one, what was measured with some room.

    Raises :class:`ExportError` where the graph differs by more than the limit; ``whose`` limit it is, in words.
    """
    worst = max(compare(estimates[name], expected) for name, expected in reference.items())
    parity = Parity(*worst, provider=provider, seconds=seconds)
    if limit is None:
        return parity, max(TOLERANCE, _TOLERANCE_FACTOR * parity.max_error)
    if not parity.max_error <= limit:
        raise ExportError(
            f"{path.name} differs from PyTorch by {parity.max_error:.2e} ({parity.error_db:.0f} dB), more than the "
            f"tolerance {limit:.0e} ({whose})"
        )
    return parity, limit


def _write_encoder(separator: Separator, role: str, plan: ExportPlan, folder: Path, batch: Batch | None) -> GraphFile:
    """The graph of one visual encoder, in fp32. Its features may differ by a thousandth of the largest of them."""
    given, output = encoder_specs(separator, role, plan, batch)
    golden = golden_inputs([given], 1, 1, plan.seed)
    traced = replace(given, shape=(2 if given.open_axes else 1, *given.shape[1:]))
    example = torch.from_numpy(golden_inputs([traced], 1, 1, plan.seed)["frames"])
    module = EncoderGraph(separator, role).eval()
    module.prepare(example)
    encoder = separator.object_encoder if role == "object" else separator.motion_encoder
    assert encoder is not None
    with torch.inference_mode():
        reference = encoder(torch.from_numpy(golden["frames"])).numpy()
    path = folder / f"{role}_encoder.onnx"
    open_axes = {given.name: given.open_axes}
    operators = write_onnx(module, {given.name: example}, output.name, path, plan.opset, open_axes=open_axes)
    limit = TOLERANCE * max(float(np.abs(reference).max()), _LEAST_FEATURE)
    wanted = {output.name: reference}
    parity, tolerance = _held_to(path, *run_onnx(path, golden), wanted, limit, "a thousandth of its largest feature")
    return GraphFile(
        file=path.name,
        kind=f"{role}_encoder",
        precision="fp32",
        inputs=(given,),
        outputs=(output,),
        profiles=profiles((given,), plan),
        opset=plan.opset,
        operators=operators,
        golden={given.name: golden["frames"], output.name: reference},
        parity=parity,
        tolerance=tolerance,
        gate=None,
    )

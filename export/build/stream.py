"""A causal separator as a graph that takes the next block of a stream, and what the blocks before left.

All that is carried from call to call is an input ``state_...`` and an output ``next_...`` of the same shape; a stream
begins with zeros. So whoever runs it needs no transform: a block of samples in, a block of each source out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from avsep.errors import ExportError
from avsep.export.build.graph import FactoredSTFT, MaskedSeparator, PolyphaseSTFT, transform_of
from avsep.export.build.plan import ExportPlan, TensorSpec
from avsep.export.runtime.streaming import COUNTED, run_sequence
from avsep.kernels.stft_masking.reference import hann_window
from avsep.types import MaskOutput, VisualFeatures

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = [
    "ALONG_CALLS",
    "GOLDEN_CALLS",
    "Along",
    "StreamGraph",
    "error_along",
    "golden_stream",
    "reference_stream",
    "stream_entry",
]

Array = NDArray[Any]

GOLDEN_CALLS = 24
"""Blocks of the golden sequence: more than a window, so that every state has been used."""
ALONG_CALLS = 21 * GOLDEN_CALLS
"""Blocks over which the error of a graph in a lower precision is followed."""
_SETTLED = 2  # rounds of the golden sequence before the error is first looked at: at first all states are zeros
_MOST_GROWTH_DB = 3.0
_NO_ERROR_DB = -90.0  # below this growth is that of fp32's own rounding


class _Steps(nn.Module):
    """The network's own part of a step, as one module, so that all of it stands in one scope of the graph."""

    def __init__(self, network: Separator) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, network_input: Tensor, visual: VisualFeatures, class_ids: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        output: MaskOutput
        output, after = self.network.advance(network_input, visual, class_ids, state)
        return output.logits, output.presence, after


class StreamGraph(MaskedSeparator):
    """A causal separator for the next ``frames`` STFT frames of one stream. It holds a copy.

    Shapes:
        mixture [1, hop frames], the next samples, or [1, C, hop frames] with C > 1 ``channels``; what is seen of the
        sources and class_ids [1, N] as in :class:`avsep.export.build.graph.WaveformSeparator`; with several frames
        ``counted`` [1, frames], 0 of frames that the overlap-add is to leave out, else 1; the states, as
        :func:`avsep.export.build.plan.tensor_specs` has them -> sources [1, N, hop frames] or [1, N, C, hop frames],
        ``n_fft`` - ``hop`` samples behind the mixture; of a decoder that tells it presence [1, N] since its states were
        zeros; the states after.
    """

    first_input, first_output = "mixture", "sources"
    transform: PolyphaseSTFT | FactoredSTFT
    squared_windows: Tensor

    def __init__(self, separator: Separator, *, frames: int = 1, channels: int = 1) -> None:
        super().__init__(separator, channels=channels)
        spec = separator.spec.front_end
        self.steps = _Steps(self.separator.network)
        del self.separator
        self.frames, self.hop, self.n_fft = frames, spec.hop, spec.n_fft
        self.transform = transform_of(spec.n_fft, spec.n_fft, spec.hop)
        windows = np.zeros((frames, spec.n_fft + (frames - 1) * spec.hop))
        for frame in range(frames):
            windows[frame, frame * spec.hop : frame * spec.hop + spec.n_fft] = hann_window(spec.n_fft).numpy() ** 2
        self.register_buffer("squared_windows", torch.from_numpy(windows).float(), persistent=False)
        self.of_mixture, self.of_sources = (tuple(shapes) for shapes in separator.state_shapes())

    def state_names(self) -> tuple[str, ...]:
        return ("samples", "overlap", "envelope", *self.of_mixture, *self.of_sources)

    def input_names(self) -> tuple[str, ...]:
        counted = (COUNTED,) if self.frames > 1 else ()
        return (*super().input_names(), *counted, *(f"state_{name}" for name in self.state_names()))

    def output_names(self) -> tuple[str, ...]:
        return (*super().output_names(), *(f"next_{name}" for name in self.state_names()))

    def forward(self, mixture: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """What is given are the tensors of :meth:`input_names`, in that order; the results those of
        :meth:`output_names`."""
        named = dict(zip(self.input_names()[1:], given, strict=True))
        state = {name: named[f"state_{name}"] for name in self.state_names()}
        block = mixture if self.channels > 1 else mixture[:, None]  # [1, C, hop frames]
        samples = torch.cat((state["samples"], block), dim=-1)  # [1, C, n_fft + (frames - 1) hop]
        whole = (self.transform.taps + self.frames - 1) * self.hop
        filled = F.pad(samples[0], (0, whole - samples.shape[-1]))
        blocks = torch.unflatten(filled, 1, (-1, self.hop)).transpose(1, 2)  # [C, hop, taps + frames - 1]
        spectrum = self.transform.spectrum(blocks)  # [C, 2 bins, frames]
        mono = spectrum.mean(dim=0, keepdim=True) if self.channels > 1 else spectrum
        network_input = self.network_input(mono[:, : self.transform.bins], mono[:, self.transform.bins :])
        visual = VisualFeatures(object=named.get("object_features"), seen=named.get("seen"))
        own = {name: state[name] for name in (*self.of_mixture, *self.of_sources)}
        logits, presence, after = self.steps(network_input, visual, named["class_ids"], own)  # [1, N, F', frames]
        mask = self.unwarped(logits)[0]  # [N, bins, frames]
        estimate = torch.cat((mask, mask), dim=1)[:, None] * spectrum  # [N, C, 2 bins, frames]
        pieces = self.transform.pieces(estimate.flatten(0, 1))  # [N C, taps hop, frames]
        if self.frames > 1:
            pieces = pieces * named[COUNTED]
        total = self.transform.overlapped(pieces)  # [N C, whole]
        carried = F.pad(state["overlap"][0], (0, self.frames * self.hop))  # [N, C, n_fft + (frames - 1) hop]
        used = self.n_fft + (self.frames - 1) * self.hop
        total = torch.unflatten(total, 0, (-1, self.channels))[..., :used] + carried
        counted = self.squared_windows if self.frames == 1 else named[COUNTED] @ self.squared_windows  # [1, used]
        envelope = counted + F.pad(state["envelope"], (0, self.frames * self.hop))
        done = self.frames * self.hop
        sources = (total[..., :done] / envelope[:, :done].clamp(min=1e-11)).clamp(-1.0, 1.0)[None]
        after = {
            **after,
            "samples": samples[..., done:],
            "overlap": total[None, ..., done:],
            "envelope": envelope[:, done:],
        }
        results = [sources if self.channels > 1 else sources[:, :, 0]]
        if self.tells_presence:
            assert presence is not None
            results.append(torch.sigmoid(presence))
        return (*results, *(after[name] for name in self.state_names()))


def golden_stream(inputs: Mapping[str, Array], mixture: Array) -> dict[str, Array]:
    """The golden inputs of a graph with the blocks of a mixture in place of one, [calls, 1, (C,) hop frames], and
    states that are zeros."""
    length = inputs["mixture"].shape[-1]
    blocks = np.stack(np.split(mixture[..., : mixture.shape[-1] // length * length], mixture.shape[-1] // length, -1))
    zeros = {name: np.zeros_like(array) for name, array in inputs.items() if name.startswith("state_")}
    counted = {COUNTED: np.ones_like(inputs[COUNTED])} if COUNTED in inputs else {}
    return {**inputs, **zeros, **counted, "mixture": blocks}


def reference_stream(separator: Separator, golden: Mapping[str, Array]) -> dict[str, Array]:
    """What PyTorch gives of a golden sequence, by output name: what came out at every call, and the last states."""
    from avsep.inference.streaming import FrameStream

    spec = separator.spec.front_end
    blocks = torch.from_numpy(golden["mixture"])  # [calls, 1, (C,) l]
    channels = blocks.shape[2] if blocks.ndim == 4 else 1
    given = {name: torch.from_numpy(golden[name]) for name in ("object_features", "seen") if name in golden}
    visual = VisualFeatures(object=given.get("object_features"), seen=given.get("seen"))
    stream = FrameStream(separator, golden["class_ids"][0].tolist(), channels)
    samples = torch.zeros(channels, spec.n_fft - spec.hop)
    sources, presence = [], []
    for block in blocks:
        samples = torch.cat((samples, block.reshape(channels, -1)), dim=-1)
        done, told = stream.advance(samples, visual)
        samples = samples[:, -(spec.n_fft - spec.hop) :]
        sources.append(done[None] if blocks.ndim == 4 else done[None, :, 0])
        presence.append(None if told is None else told[None])
    found = {"sources": torch.stack(sources)}
    if all(told is not None for told in presence):
        found["presence"] = torch.stack([told for told in presence if told is not None])
    state = {**stream.state, "samples": samples[None]}
    state["overlap"], state["envelope"] = state["overlap"][None], state["envelope"][None]
    found |= {f"next_{name}": value for name, value in state.items()}
    return {name: value.numpy() for name, value in found.items()}


@dataclass(frozen=True)
class Along:
    """How far a graph is from the fp32 graph along a stream of ``calls`` that repeats the golden sequence: energy of
    the difference of the sources relative to them, in dB, in the first round that counts and in the last."""

    calls: int
    first_db: float
    last_db: float

    def require(self, name: str) -> None:
        """Raise :class:`ExportError` where the error grows."""
        if not self.last_db <= max(self.first_db + _MOST_GROWTH_DB, _NO_ERROR_DB):  # nor where it is not a number
            raise ExportError(
                f"{name}: what is rounded adds up along a stream, its error grows from {self.first_db:.0f} to "
                f"{self.last_db:.0f} dB in {self.calls} calls: export it in fp32"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def error_along(
    single: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    other: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    golden: Mapping[str, Array],
) -> Along:
    """Run the fp32 graph and another one on :data:`ALONG_CALLS` blocks, the golden ones again and again.

    Args:
        single, other: the graphs, inputs by name -> outputs by name.
        golden: the golden inputs of the sequence.
    """
    rounds = ALONG_CALLS // GOLDEN_CALLS
    sequence = {**golden, "mixture": np.concatenate([golden["mixture"]] * rounds)}
    names = ["sources", *(name.replace("state_", "next_", 1) for name in golden if name.startswith("state_"))]
    expected, found = (run_sequence(run, sequence, names)["sources"].astype(np.float64) for run in (single, other))

    def error_db(number: int) -> float:
        of = slice(number * GOLDEN_CALLS, (number + 1) * GOLDEN_CALLS)
        error, power = np.sum((found[of] - expected[of]) ** 2), np.sum(expected[of] ** 2)
        return 10 * float(np.log10((error + 1e-30) / (power + 1e-30)))

    return Along(ALONG_CALLS, error_db(_SETTLED), error_db(rounds - 1))


def stream_entry(plan: ExportPlan, inputs: tuple[TensorSpec, ...]) -> dict[str, Any]:
    """What the manifest says of a graph that goes frame by frame."""
    names = [spec.name.removeprefix("state_") for spec in inputs if spec.name.startswith("state_")]
    return {
        "frames": plan.frames,
        "golden_calls": GOLDEN_CALLS,
        "states": [{"name": name, "input": f"state_{name}", "output": f"next_{name}"} for name in names],
    }

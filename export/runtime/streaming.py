"""A graph that goes frame by frame, as a stream: samples of any number in, samples of each source out.

What a causal separator carries from call to call are inputs and outputs of its graph (``stream`` in the manifest). What
is left to do here is to cut the stream into the graph's blocks, to begin half a window before the first sample, and to
take the end out of the overlap-add. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .recordings import PresenceOfChunks

__all__ = ["COUNTED", "SEQUENCES", "FrameStream", "StreamLayout", "layout_of", "run_sequence"]

Array = NDArray[Any]
Audio = NDArray[np.float32]

COUNTED = "counted"
"""Input [1, frames] of a graph of several frames a call: 0 of those beyond the end of the stream, else 1."""
SEQUENCES = ("mixture", "sources", "presence")
"""Inputs and outputs whose golden arrays hold a sequence of calls, [calls, ...]; those of states the first and last."""
# States of the graph that are filled and read here.
_SAMPLES, _OVERLAP, _ENVELOPE = "samples", "overlap", "envelope"


@dataclass(frozen=True)
class StreamLayout:
    """What a graph that goes frame by frame takes and gives in a call.

    Attributes:
        hop, n_fft: of the STFT, in samples; frames are centred.
        frames: STFT frames a call.
        clip_frames: after so many presence is told anew, and pictures are looked at again.
        channels: C of the mixture.
        sources: N of a call; None where that is open.
        states: by name what is carried, shape and element type; ``sources`` stands for N.
    """

    hop: int
    n_fft: int
    frames: int
    clip_frames: int
    channels: int
    sources: int | None
    states: Mapping[str, tuple[tuple[int | str, ...], str]]

    @property
    def delay_samples(self) -> int:
        """By how many samples what comes out lies behind what went in, where blocks are the graph's own."""
        return self.latency_samples - self.frames * self.hop

    @property
    def latency_samples(self) -> int:
        """The most samples between a sample's arrival and its coming out, without the computing: from the first sample
        of a window to the last of the last frame of its call."""
        return self.n_fft + (self.frames - 1) * self.hop

    def zeros(self, sources: int) -> dict[str, Array]:
        """The states that a stream begins with."""
        return {
            name: np.zeros([sources if isinstance(size, str) else size for size in shape], dtype=dtype)
            for name, (shape, dtype) in self.states.items()
        }


def layout_of(
    transform: Mapping[str, Any],
    clip_frames: int,
    stream: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    channels: int = 1,
) -> StreamLayout:
    """From the manifest's ``transform``, the ``stream`` of a graph's entry and its ``inputs``."""
    by_name = {tensor["name"]: tensor for tensor in inputs}
    sources = by_name["class_ids"]["shape"][1]
    states = {state["name"]: by_name[state["input"]] for state in stream["states"]}
    return StreamLayout(
        hop=int(transform["hop"]),
        n_fft=int(transform["n_fft"]),
        frames=int(stream["frames"]),
        clip_frames=clip_frames,
        channels=channels,
        sources=sources if isinstance(sources, int) else None,
        states={name: (tuple(tensor["shape"]), str(tensor["dtype"])) for name, tensor in states.items()},
    )


def run_sequence(
    run: Callable[[dict[str, Array]], Mapping[str, Array]], golden: Mapping[str, Array], outputs: Sequence[str]
) -> dict[str, Array]:
    """A graph on its golden sequence, each call with the states that the one before left: what it gives, as the golden
    outputs hold it."""
    given = dict(golden)
    blocks = given.pop("mixture")
    made: dict[str, list[Array]] = {name: [] for name in outputs if name in SEQUENCES}
    last: dict[str, Array] = {}
    inputs = {name: value for name, value in given.items() if name not in outputs}
    for block in blocks:
        found = run({**inputs, "mixture": block})
        last = {name: np.array(found[name]) for name in outputs}
        for name, calls in made.items():
            calls.append(last[name])
        inputs |= {name.replace("next_", "state_", 1): last[name] for name in outputs if name not in made}
    return {name: np.stack(made[name]) if name in made else last[name] for name in outputs}


class FrameStream:
    """One stream through a graph that goes frame by frame.

    Args:
        run: the graph: inputs by name -> outputs by name, which the next call may overwrite.
        layout: what it takes.
        sources: N that are asked for; a graph of more is given the last one again.
        look: what is seen from a sample on, as the graph's inputs [1, N, ...] by name, class ids among them; called
            for each clip as it begins.
        channels: C of blocks [C, l]; None of a stream of blocks [l].

    Raises:
        ConfigError: the graph takes another number of channels, or fewer sources.
    """

    def __init__(
        self,
        run: Callable[[dict[str, Array]], Mapping[str, Array]],
        layout: StreamLayout,
        sources: int,
        look: Callable[[int], Mapping[str, Array]],
        *,
        channels: int | None = None,
    ) -> None:
        if channels not in (None, 1, layout.channels):
            raise ConfigError(f"the graph takes {layout.channels} channels, not {channels}")
        if layout.sources is not None and sources > layout.sources:
            raise ConfigError(f"the graph takes {layout.sources} sources, not {sources}")
        self._run, self._layout, self._look = run, layout, look
        self._count = sources
        self._channels = channels
        self._rows = layout.channels
        self._states = layout.zeros(layout.sources or sources)
        self._seen: dict[str, Array] = {}
        # The first frame ends half a window after the stream's first sample, and reads zeros before it. What of it the
        # graph does not take as a block lies in its state.
        self._first = layout.n_fft // 2 - layout.hop
        self._held = np.zeros((self._rows, 0), dtype=np.float32)
        self._frames = self._received = self._emitted = 0
        self._begun = False
        self._clips = 0
        self._told: Audio | None = None  # of the clip that is going on
        self._clips_told: list[Audio] = []
        self._ended = ""

    @property
    def latency_samples(self) -> int:
        """See :attr:`StreamLayout.latency_samples`."""
        return self._layout.latency_samples

    @property
    def received_samples(self) -> int:
        return self._received

    @property
    def emitted_samples(self) -> int:
        return self._emitted

    @property
    def presence(self) -> Audio | None:
        """[N] of what was separated so far, each clip of it counted as a chunk (:class:`PresenceOfChunks`); None before
        the first call, and of a graph that does not tell."""
        told = [*self._clips_told, *([] if self._told is None else [self._told])]
        whole = PresenceOfChunks()
        whole.add(np.stack(told) if told else None)
        return whole.value

    def push(self, block: Audio) -> Audio:
        """The next samples [l] or [C, l] float32, of any number -> what is ready of each source, [N, l'] or [N, C, l'].

        Raises:
            ConfigError: the stream has ended, or the block is of another shape.
        """
        self._go_on()
        leading = () if self._channels is None else (self._channels,)
        if not block.ndim or block.shape[:-1] != leading:
            takes = "".join(f"{size}, " for size in leading)
            raise ConfigError(f"a stream takes blocks [{takes}l], got shape {list(block.shape)}")
        self._received += block.shape[-1]
        rows = np.broadcast_to(block.reshape(len(block) if leading else 1, -1), (self._rows, block.shape[-1]))
        return self._shaped(self._advance(rows))

    def flush(self) -> Audio:
        """The audio has ended: give the rest, [N, l'] or [N, C, l']. Nothing can be pushed afterwards."""
        self._go_on()
        parts = [self._nothing()]
        if self._received:
            layout = self._layout
            last = self._received // layout.hop  # of the frames that the whole has
            calls = -(-(last + 1 - self._frames) // layout.frames)
            missing = (0 if self._begun else self._first) + calls * layout.frames * layout.hop - self._held.shape[-1]
            parts.append(self._advance(np.zeros((self._rows, max(missing, 0)), dtype=np.float32), last))
            envelope = np.maximum(self._states[_ENVELOPE][0], np.float32(1e-11))
            rest = np.clip(self._states[_OVERLAP][0] / envelope, -1, 1)  # [N, C, n_fft - hop]
            begin = self._emitted - (self._frames * layout.hop - layout.n_fft // 2)  # before lies nothing of the stream
            parts.append(rest[..., max(begin, 0) :][..., : self._received - self._emitted])
            self._emitted = self._received
        self._ended = "was flushed"
        return self._shaped(np.concatenate(parts, axis=-1))

    def _go_on(self) -> None:
        if self._ended:
            raise ConfigError(f"this stream {self._ended}: begin a new one")

    def _nothing(self) -> Audio:
        return np.zeros((self._layout.sources or self._count, self._rows, 0), dtype=np.float32)

    def _advance(self, samples: Audio, last: int | None = None) -> Audio:
        """Give the graph all whole blocks that there are: [N, C, l']; ``last`` is the last frame that counts."""
        layout = self._layout
        self._held = np.concatenate((self._held, samples), axis=-1)
        parts = [self._nothing()]
        if not self._begun:
            if self._held.shape[-1] < self._first:
                return parts[0]
            if self._first:
                self._states[_SAMPLES][0, :, -self._first :] = self._held[:, : self._first]
            self._held = self._held[:, self._first :]
            self._begun = True
        length = layout.frames * layout.hop
        self._ended = "has failed"  # unless the end of this call is reached
        while self._held.shape[-1] >= length:
            block, self._held = self._held[:, :length], self._held[:, length:]
            begin = self._frames * layout.hop - layout.n_fft // 2
            made = self._called(block, last)[..., max(-begin, 0) :]
            made = made[..., : self._received - self._emitted]
            parts.append(made)
            self._emitted += made.shape[-1]
        self._ended = ""
        return np.concatenate(parts, axis=-1)

    def _called(self, block: Audio, last: int | None) -> Audio:
        """One call of the graph, [C, hop frames] -> [N, C, hop frames]."""
        layout = self._layout
        if self._frames >= self._clips * layout.clip_frames:
            self._begin_clip()
        numbers = np.arange(self._frames, self._frames + layout.frames)
        counted = np.ones(len(numbers), dtype=bool) if last is None else numbers <= last
        inputs: dict[str, Array] = {"mixture": block[None] if layout.channels > 1 else block}
        if layout.frames > 1:
            inputs[COUNTED] = counted[None].astype(np.float32)
        inputs |= {f"state_{name}": value for name, value in self._states.items()}
        outputs = self._run({**inputs, **self._seen})
        self._states = {name: np.array(outputs[f"next_{name}"]) for name in self._states}
        if "presence" in outputs and (counted.all() or self._told is None):
            self._told = np.array(outputs["presence"][0, : self._count], dtype=np.float32)
        self._frames += layout.frames
        made = np.array(outputs["sources"][0], dtype=np.float32)
        return made if layout.channels > 1 else made[:, None]

    def _begin_clip(self) -> None:
        """Look at what is seen from here on, and tell presence anew."""
        if self._told is not None:
            self._clips_told.append(self._told)
        self._told = None
        for name, value in self._states.items():
            if name.startswith("presence"):
                self._states[name] = np.zeros_like(value)
        width = self._layout.sources or self._count
        of = np.minimum(np.arange(width), self._count - 1)  # the last one again, where the graph takes more
        seen = self._look(self._frames * self._layout.hop)
        self._seen = {name: np.ascontiguousarray(value[:, of]) for name, value in seen.items()}
        self._clips = self._frames // self._layout.clip_frames + 1

    def _shaped(self, waveforms: Audio) -> Audio:
        """[N, C, l] of the graph -> what was asked for"""
        kept = waveforms[: self._count]
        return kept[:, 0] if self._channels is None else kept[:, : self._channels]

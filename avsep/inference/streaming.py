"""Separation of a stream block by block, by a separator that is causal, into the samples of the whole-file pass.

What a sample costs in time is the window: it comes out when the last STFT frame that covers it is complete, at most
``n_fft`` samples after it went in (:attr:`StreamingSeparator.latency_samples`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from avsep.errors import ConfigError, NumericalError
from avsep.export.runtime.recordings import PresenceOfChunks, sources_of
from avsep.export.runtime.timeline import VisualTimeline
from avsep.export.runtime.wav import check_samples
from avsep.inference.looking import encode_chunks, known_timelines
from avsep.separator import Separator
from avsep.types import VisualFeatures

__all__ = ["FrameStream", "StreamingSeparator"]

Audio = NDArray[np.float32]


class FrameStream:
    """The frames of a stream, one after another: STFT, masks and overlap-add of a causal separator, with all that it
    carries from frame to frame in ``state``, by name.

    Beside the separator's own (:meth:`avsep.separator.Separator.state_shapes`) these are ``overlap`` [N, C, n_fft -
    hop], what the frames so far add to samples that later ones add to as well, and ``envelope`` [n_fft - hop], the sum
    of their squared windows there. All begin with zeros.

    Args:
        separator: causal, in evaluation mode.
        class_ids: of the N sources.
        channels: C.
        limit_mask_sum: divide the masks by their sum where that is above 1, whatever the separator's setting.
    """

    def __init__(
        self, separator: Separator, class_ids: Sequence[int], channels: int = 1, *, limit_mask_sum: bool = False
    ) -> None:
        spec, like = separator.spec.front_end, separator.front_end.window.float()
        self._separator = separator
        self._ids = torch.tensor([list(class_ids)])  # [1, N]
        self._limit = limit_mask_sum and not spec.limit_mask_sum
        self._window = like
        self._hop, self._n_fft = spec.hop, spec.n_fft
        count = len(class_ids)
        of_mixture, of_sources = separator.state_shapes()
        self.state: dict[str, Tensor] = {
            **{name: like.new_zeros(1, *shape) for name, shape in of_mixture.items()},
            **{name: like.new_zeros(1, count, *shape) for name, shape in of_sources.items()},
            "overlap": like.new_zeros(count, channels, spec.n_fft - spec.hop),
            "envelope": like.new_zeros(spec.n_fft - spec.hop),
        }

    def begin_clip(self) -> None:
        """Tell presence anew from here on."""
        for name, value in self.state.items():
            if name.startswith("presence"):
                self.state[name] = torch.zeros_like(value)

    @torch.inference_mode()
    def advance(self, samples: Tensor, visual: VisualFeatures) -> tuple[Tensor, Tensor | None]:
        """The next t frames, samples [C, n_fft + (t - 1) hop] -> the first t hop of these samples of each source,
        [N, C, t hop], which no later frame adds to; and the presence [N] since :meth:`begin_clip`, of a separator that
        tells."""
        front_end, hop, n_fft = self._separator.front_end, self._hop, self._n_fft
        frames = samples.unfold(-1, n_fft, hop) * self._window  # [C, t, n_fft]
        count = frames.shape[1]
        spectrum = torch.fft.rfft(frames).transpose(1, 2)  # [C, bins, t]
        magnitude = front_end.warp(spectrum.mean(dim=0, keepdim=True).abs() + 1e-10)  # [1, F, t]
        output, after = self._separator.advance(torch.log1p(magnitude)[:, None], visual, self._ids, self.state)
        if self._limit:
            output = output.with_limited_sum()
        masks = front_end.unwarp(torch.sigmoid(output.logits[0]))  # [N, bins, t]
        pieces = (
            torch.fft.irfft((masks[:, None] * spectrum).transpose(2, 3), n=n_fft) * self._window
        )  # [N, C, t, n_fft]
        overlap = F.pad(self.state["overlap"], (0, count * hop))
        envelope = F.pad(self.state["envelope"], (0, count * hop))
        for t in range(count):
            overlap[..., t * hop : t * hop + n_fft] += pieces[:, :, t]
            envelope[t * hop : t * hop + n_fft] += self._window**2
        done = _normalised(overlap, envelope)[..., : count * hop]
        self.state = {
            **after,
            "overlap": overlap[..., count * hop :].clone(),
            "envelope": envelope[count * hop :].clone(),
        }
        return done, None if output.presence is None else torch.sigmoid(output.presence[0].float())

    def rest(self) -> Tensor:
        """What the frames so far gave of the samples after those that came out: [N, C, n_fft - hop]."""
        return _normalised(self.state["overlap"], self.state["envelope"])


def _normalised(overlap: Tensor, envelope: Tensor) -> Tensor:
    return (overlap / envelope.clamp(min=1e-11)).clamp(-1.0, 1.0)


class StreamingSeparator:
    """A causal separator on audio that arrives block by block, on the separator's device.

    It carries the samples that the next STFT frame still needs, the frames that the convolutions look back at and the
    unfinished part of the overlap-add. What comes out are the samples that the separator gives of the whole stream at
    once (:meth:`avsep.separator.Separator.separate`, for a clip of that length), however the stream is cut into blocks.

    Pictures are looked at once for each ``clip_samples`` (rounded up to whole frames), at the moment that these begin.

    Args:
        separator: in evaluation mode, and :attr:`~avsep.separator.Separator.causal`.
        classes: what to separate, as for :func:`avsep.inference.recordings.separate_audio`.
        timelines: frames or features by name or class, on the stream's time axis; its first sample is at 0 s.
        channels: C of blocks [C, l]; None: blocks are mono, [l]. Masks are found from the channels' mean.
        visual: features of the N sources, [1, N, ...], in place of ``timelines``.
        limit_mask_sum: divide the masks by their sum where that is above 1, whatever the separator's setting.

    Raises:
        ConfigError: the separator looks ahead or is in training mode, or there are no channels.
        ConfigError, UnknownNameError, DataError: classes and timelines, as ``separate_audio``.
    """

    def __init__(
        self,
        separator: Separator,
        classes: Sequence[str],
        timelines: Mapping[str, VisualTimeline] | None = None,
        *,
        channels: int | None = None,
        visual: VisualFeatures | None = None,
        limit_mask_sum: bool = False,
    ) -> None:
        if not separator.causal:
            parts = {
                f"audio encoder '{separator.spec.audio_encoder.name}'": separator.audio_encoder.causal,
                f"mask decoder '{separator.spec.mask_decoder.name}'": separator.mask_decoder.causal,
            }
            looks = " and ".join(name for name, causal in parts.items() if not causal)
            raise ConfigError(
                f"this separator cannot go frame by frame, because its {looks} is not causal as it is set: take one "
                "like the preset causal_small (without an adapter), or separate chunk by chunk "
                "(avsep.inference.chunking.LongStream)"
            )
        if channels is not None and channels < 1:
            raise ConfigError(f"channels must be at least 1, got {channels}")
        asked = sources_of(separator.classes, classes)
        self._separator = separator
        self._timelines = None if visual is not None else known_timelines(separator, timelines or {}, asked)
        self._channels = channels
        spec, like = separator.spec.front_end, separator.front_end.window
        self._hop, self._n_fft, self._clip_frames = spec.hop, spec.n_fft, spec.frames
        self._visual = visual
        ids = [source.class_id for source in asked]
        self._stream = FrameStream(separator, ids, channels or 1, limit_mask_sum=limit_mask_sum)
        # from half a window before the stream's first sample on: frames are centred
        self._samples = like.new_zeros(channels or 1, self._n_fft // 2)
        self._frames = self._received = self._emitted = self._given = 0
        self._presence = PresenceOfChunks()
        self._told: Audio | None = None  # of the clip that is going on
        self._ended = False

    @property
    def delay_samples(self) -> int:
        """By how many samples what :meth:`process` gives lies behind what it is given."""
        half = self._n_fft // 2
        return (-(-half // self._hop) - 1) * self._hop + half

    @property
    def latency_samples(self) -> int:
        """The algorithmic delay: the most samples between a sample's arrival and its coming out, where blocks are one
        hop long, without the time of computing."""
        return self.delay_samples + self._hop

    @property
    def latency_s(self) -> float:
        return self.latency_samples / self._separator.spec.front_end.sample_rate_hz

    @property
    def presence(self) -> Audio | None:
        """For each source [N] the probability that it sounds in what was separated so far, as of a recording in chunks
        (:class:`avsep.export.runtime.recordings.PresenceOfChunks`); None before the first frame, and of a separator
        that does not tell."""
        if self._told is None:
            return self._presence.value
        whole = PresenceOfChunks()
        whole.add(np.stack([*self._presence.chunks, self._told]))
        return whole.value

    def process(self, block: Audio) -> Audio:
        """The next samples, whole hops of them, [hop k] or [C, hop k] -> as many of each source, :attr:`delay_samples`
        behind: [N, hop k] or [N, C, hop k]. The first ``delay_samples`` are zeros, and :meth:`flush` gives as many that
        are still to come.

        Raises:
            ConfigError: not whole hops; or as :meth:`push`.
        """
        length = block.shape[-1]
        if length % self._hop:
            raise ConfigError(f"process takes whole hops of {self._hop} samples, got {length}: push takes any number")
        if self._received % self._hop or self._given != self._emitted:
            raise ConfigError("process and push cannot be mixed in one stream")
        made = self.push(block)
        missing = length - made.shape[-1]
        self._given = self._emitted
        return np.pad(made, [(0, 0)] * (made.ndim - 1) + [(missing, 0)])

    def push(self, block: Audio) -> Audio:
        """The next samples [l] or [C, l] float32, of any number -> those that are ready, [N, l'] or [N, C, l'].

        Raises:
            ConfigError: the stream was flushed, the separator is in training mode, or the block is of another shape.
            AudioError: it holds NaN or infinite samples, or some far beyond full scale.
            NumericalError: the separator answers NaN or infinite.
        """
        self._check(block)
        given = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32)).to(self._samples)
        self._received += block.shape[-1]
        self._samples = torch.cat((self._samples, given.reshape(self._samples.shape[0], -1)), dim=-1)
        return self._advance()

    def flush(self) -> Audio:
        """The audio has ended: give the rest, [N, l'] or [N, C, l']. The stream is used up then."""
        self._check(None)
        self._ended = True
        if not self._received:
            return self._shaped(self._stream.rest()[..., :0])
        self._samples = F.pad(self._samples, (0, self._n_fft // 2))
        rest = self._advance()
        # the rest begins where the next frame would, which may lie before the stream
        begin = self._emitted - (self._frames * self._hop - self._n_fft // 2)
        tail = self._stream.rest()[..., begin:][..., : self._received - self._emitted]
        self._emitted = self._received
        return np.concatenate((rest, self._shaped(tail)), axis=-1)

    def _check(self, block: Audio | None) -> None:
        if self._ended:
            raise ConfigError("this stream was flushed: begin a new one")
        if self._separator.training:
            raise ConfigError("a stream needs a separator in evaluation mode: call separator.eval()")
        if block is None:
            return
        leading = () if self._channels is None else (self._channels,)
        if not block.ndim or block.shape[:-1] != leading:
            takes = "".join(f"{size}, " for size in leading)
            raise ConfigError(f"this stream takes blocks [{takes}samples], got shape {list(block.shape)}")
        check_samples("the block", block)

    def _advance(self) -> Audio:
        """Separate the frames that are complete, those of one clip at a time."""
        made = []
        while (ready := 1 + (self._samples.shape[-1] - self._n_fft) // self._hop) > 0:
            if self._frames % self._clip_frames == 0:
                self._begin_clip()
            count = min(ready, self._clip_frames - self._frames % self._clip_frames)
            waveforms = self._separated(count)  # from the first sample that frame `_frames` covers
            begin = self._frames * self._hop - self._n_fft // 2
            made.append(waveforms[..., max(-begin, 0) :])
            self._samples = self._samples[:, count * self._hop :].clone()
            self._frames += count
        whole = torch.cat(made, dim=-1) if made else self._stream.rest()[..., :0]
        whole = whole[..., : self._received - self._emitted]
        self._emitted += whole.shape[-1]
        return self._shaped(whole)

    @torch.inference_mode()
    def _begin_clip(self) -> None:
        if self._told is not None:
            self._presence.add(self._told[None])
        self._stream.begin_clip()
        if self._timelines is not None:
            start = self._frames * self._hop
            self._visual = encode_chunks(self._separator, self._timelines, [start], start)  # nothing later is there

    def _separated(self, count: int) -> Tensor:
        """The next ``count`` frames -> [N, C, count hop], from the first sample on that they cover."""
        assert self._visual is not None
        done, told = self._stream.advance(self._samples[:, : self._n_fft + (count - 1) * self._hop], self._visual)
        self._told = None if told is None else told.cpu().numpy()
        if not bool(torch.isfinite(done).all()):
            raise NumericalError(
                f"the separator answers NaN or infinite samples near {self._frames * self._hop / self._rate_hz:.1f} s: "
                "its weights are damaged, or its training diverged"
            )
        return done

    @property
    def _rate_hz(self) -> int:
        return self._separator.spec.front_end.sample_rate_hz

    def _shaped(self, waveforms: Tensor) -> Audio:
        """[N, C, l] -> [N, l] of a mono stream"""
        made: Audio = waveforms.float().cpu().numpy()
        return made if self._channels is not None else made[:, 0]

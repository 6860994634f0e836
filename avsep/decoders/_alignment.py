"""What decoders share that follow their sources in time: features brought to the mask's frames, and presence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.dsp import magnitude
from avsep.encoders.base import latest
from avsep.types import Spectrograms, VisualFeatures

__all__ = [
    "PRESENT_SHARE",
    "Presence",
    "TimeVaryingHead",
    "at_frames",
    "frequency_bands",
    "is_present",
    "time_varying_logits",
]

PRESENT_SHARE = 0.01
"""A source is present where its magnitudes sum up to more than this share of the mixture's (-40 dB)."""


def at_frames(features: Tensor, frames: int, valid: Tensor | None = None) -> Tensor:
    """Steps of a sequence, which span the clip, at its time frames: linear interpolation between their middles.

    Args:
        features: [M, D, steps].
        frames: T.
        valid: [M, steps] bool, the steps that are there; these alone span the clip. All when None; a sequence without
            any counts as one with all.

    Returns:
        [M, D, T].
    """
    if valid is None:
        return F.interpolate(features, size=frames, mode="linear")
    valid = valid | ~valid.any(dim=1, keepdim=True)
    order = torch.arange(valid.shape[1], device=valid.device) + (~valid).to(torch.int64) * valid.shape[1]
    features = features.gather(2, order.argsort(dim=1)[:, None, :].expand_as(features))  # the valid ones first
    count = valid.sum(dim=1, keepdim=True).to(torch.float32)  # [M, 1]
    middles = torch.arange(frames, device=features.device, dtype=torch.float32) + 0.5  # 8 bits hold no place
    place = (middles * count / frames - 0.5).clamp(min=0.0).minimum(count - 1)  # [M, T]
    low = place.floor()
    share = (place - low)[:, None, :].to(features.dtype)
    index = low.to(torch.int64)[:, None, :].expand(-1, features.shape[1], -1)
    above = (low + 1).minimum(count - 1).to(torch.int64)[:, None, :].expand(-1, features.shape[1], -1)
    return features.gather(2, index) * (1 - share) + features.gather(2, above) * share


def frequency_bands(mask_features: Tensor, bands: int) -> Tensor:
    """[B, C, F, T] -> [B, C * bands, T], the means over ``bands`` equal parts of the frequency axis."""
    rows = mask_features.permute(0, 2, 3, 1)  # channels last, as they lie in memory; so does then the gradient
    return torch.unflatten(rows, 1, (bands, -1)).mean(dim=2).permute(0, 3, 1, 2).flatten(1, 2)


def time_varying_logits(weights: Tensor, bias: Tensor, mask_features: Tensor) -> Tensor:
    """sum_k w_k(t) F_k(f, t) + b(f, t): weights [B, N, C, T], bias [B, N, F, T], mask features [B, C, F, T] -> logits
    [B, N, F, T]."""
    # channels stay last: turning the features around would cost more than the product
    product = mask_features.permute(0, 3, 2, 1) @ weights.permute(0, 3, 2, 1)  # [B, T, F, N]
    return product.permute(0, 3, 2, 1) + bias


def is_present(spectrograms: Spectrograms) -> Tensor:
    """[B, N] bool: the sources that sound, from their ratio masks (:data:`PRESENT_SHARE`)."""
    mixture = magnitude(spectrograms.network_input)  # [B, 1, F, T]
    heard = (spectrograms.ratio * mixture).sum(dim=(2, 3))
    return heard > PRESENT_SHARE * mixture.sum(dim=(2, 3))


class TimeVaryingHead(nn.Module):
    """The weights of the mask features at every time frame, from a query in time and from what sounds then.

    Beside the query stand the mask features' means in ``bands`` parts of the frequency axis and the mixture's spectrum.
    A linear map joins the two, and ``layers`` convolutions in time, ``kernel`` frames wide with dilations 1, 3, 9, ...,
    each added to what it reads, make of them the source's state. A linear map of that gives the weights and a bias for
    every frequency row, so that a mask can follow a pitch that it sees or hears. Where it is ``causal``, the
    convolutions read the frame itself and those before it, in place of as many before as after.

    Shapes:
        query [B, N, D, T], mask features [B, C, F, T] with F = ``rows`` a multiple of ``bands``, spectrogram
        [B, 1, F, T] -> state [B, N, D, T], weights [B, N, C, T] and bias [B, N, F, T].
    """

    def __init__(
        self, dim: int, mask_channels: int, rows: int, *, bands: int, layers: int, kernel: int, causal: bool = False
    ) -> None:
        super().__init__()
        if min(dim, bands, layers, kernel) < 1 or kernel % 2 == 0:
            raise ValueError(
                f"dim, bands and layers must be positive and kernel odd, got dim {dim}, bands {bands}, layers "
                f"{layers}, kernel {kernel}"
            )
        if rows % bands:
            raise ValueError(f"bands must divide the {rows} rows of the log-frequency grid, got {bands}")
        self.bands = bands
        self.channels = mask_channels
        self.heard = nn.Conv1d(mask_channels * bands + rows, dim, 1)
        self.join = nn.Conv1d(2 * dim, dim, 1)
        self.layers = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=0 if causal else 3**k * (kernel // 2), dilation=3**k)
            for k in range(layers)
        )
        self.causal = causal
        self.spans = tuple(3**k * (kernel - 1) for k in range(layers))  # frames before the first that a layer reads
        self.out = nn.Conv1d(dim, mask_channels + rows, 1)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one source: what :meth:`forward` takes and changes as ``state``, by name."""
        return {f"head{k}": (self.join.out_channels, span) for k, span in enumerate(self.spans) if span}

    def forward(
        self, query: Tensor, mask_features: Tensor, spectrogram: Tensor, state: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With ``state``, of a causal head, the frames are the next of a stream: each entry [B, N, ...] holds what the
        frames before them left, and is replaced."""
        shape = query.shape[:2]
        bands = frequency_bands(mask_features, self.bands)
        heard = self.heard(torch.cat((bands, spectrogram[:, 0].to(bands.dtype)), dim=1))  # [B, D, T]
        heard = heard[:, None].expand(-1, shape[1], -1, -1)
        x = F.relu(self.join(torch.cat((query, heard), dim=2).flatten(0, 1)))  # [B N, D, T]
        for k, (layer, span) in enumerate(zip(self.layers, self.spans, strict=True)):
            read = x
            if state is not None and span:
                past = state[f"head{k}"].flatten(0, 1)
                read = torch.cat((past, x), dim=-1)
                state[f"head{k}"] = torch.unflatten(latest(past, x), 0, shape)
            elif self.causal:
                read = F.pad(x, (span, 0))
            x = x + F.relu(layer(read))
        made = torch.unflatten(self.out(x), 0, shape)
        return torch.unflatten(x, 0, shape), made[:, :, : self.channels], made[:, :, self.channels :]


class Presence(nn.Module):
    """Whether a source sounds at all, from its states in time and from what its mask lets through.

    A source of which less is seen is told with less certainty. So that one half parts present from absent ones
    whatever is seen of them, ``offsets`` are taken off the logits outside of training: of sources that are seen moving,
    in one picture, and not at all (:func:`avsep.training.afterwards.calibrate_presence`).

    Shapes:
        states [B, N, D, T]; logits of masks [B, N, F, T]; spectrogram [B, 1, F, T] -> logits [B, N]. No gradient goes
        through the masks themselves: they learn from the targets of zero. It does go into the states.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * dim + 2, dim)
        self.out = nn.Linear(dim, 1)
        self.register_buffer("offsets", torch.zeros(3))  # in the state: what was chosen goes with the weights

    offsets: Tensor

    def forward(self, states: Tensor, logits: Tensor, spectrogram: Tensor, visual: VisualFeatures) -> Tensor:
        mixture = magnitude(spectrogram).to(states.dtype)
        mask = logits.detach().sigmoid().to(states.dtype)
        through = (mask * mixture).sum(dim=2) / mixture.sum(dim=2).amax(dim=-1, keepdim=True).clamp(min=1e-6)
        return self._answer(
            states.mean(dim=-1), states.amax(dim=-1), through.mean(dim=-1), through.amax(dim=-1), visual
        )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one source: what :meth:`advance` takes and gives, by name."""
        width = self.hidden.in_features // 2 - 1
        return {
            "presence_frames": (),
            "presence_sum": (width,),
            "presence_largest": (width,),
            "presence_through": (2,),
            "presence_mixture": (),
        }

    def advance(
        self, states: Tensor, logits: Tensor, spectrogram: Tensor, visual: VisualFeatures, state: dict[str, Tensor]
    ) -> Tensor:
        """As :meth:`forward`, of all frames since the ``state``, whose entries are replaced, was zeros: these and those
        of the calls before."""
        mixture = magnitude(spectrogram).to(states.dtype).sum(dim=2)  # [B, 1, T]
        through = (logits.sigmoid().to(states.dtype) * magnitude(spectrogram).to(states.dtype)).sum(dim=2)  # [B, N, T]
        frames = state["presence_frames"] + float(states.shape[-1])
        total = state["presence_sum"] + states.sum(dim=-1)
        largest = torch.maximum(state["presence_largest"], states.amax(dim=-1))  # states are not negative
        before = state["presence_through"]
        passed = torch.stack(
            (before[..., 0] + through.sum(dim=-1), torch.maximum(before[..., 1], through.amax(dim=-1))), dim=-1
        )
        loudest = torch.maximum(state["presence_mixture"], mixture.amax(dim=-1))  # [B, N]
        state.update(
            presence_frames=frames,
            presence_sum=total,
            presence_largest=largest,
            presence_through=passed,
            presence_mixture=loudest,
        )
        share = passed / loudest.clamp(min=1e-6)[..., None]
        return self._answer(total / frames[..., None], largest, share[..., 0] / frames, share[..., 1], visual)

    def _answer(self, mean: Tensor, largest: Tensor, through: Tensor, most: Tensor, visual: VisualFeatures) -> Tensor:
        """The states' mean and maximum in time [B, N, D], and those of what the masks let through [B, N] -> logits."""
        share = (through + 1e-4).log(), (most + 1e-4).log()
        found = torch.cat((mean, largest, torch.stack(share, dim=-1)), dim=-1)
        answer: Tensor = self.out(F.relu(self.hidden(found))).squeeze(-1)
        return answer if self.training else answer - self._offset(visual).to(answer.dtype)

    def _offset(self, visual: VisualFeatures) -> Tensor:
        moving, photo, unseen = self.offsets.unbind()
        if visual.moving is None:
            return moving
        still = photo if visual.seen is None else photo.where(visual.seen, unseen)
        return moving.where(visual.moving, still)

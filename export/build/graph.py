"""The exported computation: one real-valued graph from waveform to waveforms.

ONNX has no usable inverse STFT and TensorRT 10.3 neither STFT nor complex numbers, so both transforms are products with
fixed matrices: in two steps, as Cooley and Tukey's, where the window's length has factors for it, else convolutions in
polyphase form. There the padded signal is cut into blocks of one hop, and a frame is a convolution over the few blocks
that its window covers. The log-frequency warp, being linear and fixed, is a matrix along frequency (and, for the
published ``align_corners=False``, another along time).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from avsep.convolution import folded_kernel
from avsep.decoders.conditioned_unet import SharedUpConv
from avsep.dsp import reference_gain
from avsep.encoders.audio.unet7 import UpConv
from avsep.errors import ExportError
from avsep.kernels.stft_masking.reference import hann_window, linear_frequency_grid, log_frequency_grid
from avsep.spec import FrontEndSpec
from avsep.types import MaskOutput, VisualFeatures

if TYPE_CHECKING:
    from avsep.export.build.plan import ExportPlan
    from avsep.separator import Separator

__all__ = [
    "FactoredSTFT",
    "MaskedSeparator",
    "PolyphaseSTFT",
    "SpectralSeparator",
    "WaveformSeparator",
    "fitted",
    "transform_of",
    "warp_matrices",
    "with_length",
    "with_limited_sum",
]

Matrix = NDArray[np.float64]


def _angles(n_fft: int) -> Matrix:
    """2 pi k n / n_fft as [k, n]; the product is reduced modulo n_fft as integers, so that no digit is lost."""
    k = np.arange(n_fft // 2 + 1, dtype=np.int64)[:, None]
    n = np.arange(n_fft, dtype=np.int64)[None, :]
    return 2 * np.pi * ((k * n) % n_fft) / n_fft


def inverse_weights(n_fft: int) -> tuple[Matrix, Matrix]:
    """What the real and the imaginary parts of a real signal's bins count in its inverse, both [F, 1].

    Bins between the first and the last stand for two each; those two's imaginary parts are ignored, as in ``irfft``.
    """
    real = np.full((n_fft // 2 + 1, 1), 2.0 / n_fft)
    real[[0, -1]] = 1.0 / n_fft
    imaginary = real.copy()
    imaginary[[0, -1]] = 0
    return real, imaginary


class _Frames(nn.Module):
    """What transforms of a fixed length share: a signal cut into blocks of a hop, and windowed frames added up again.

    Args:
        samples: length L of the signals.
        n_fft: window and transform length, even.
        hop: frame advance, at most ``n_fft // 2``.
        padding: what lies beyond the ends, ``zeros`` or ``reflect``.
    """

    inverse_envelope: Tensor

    def __init__(self, samples: int, n_fft: int, hop: int, padding: str = "zeros") -> None:
        super().__init__()
        self.samples, self.n_fft, self.hop, self.padding = samples, n_fft, hop, padding
        self.bins = n_fft // 2 + 1
        self.frames = 1 + samples // hop
        self.taps = -(-n_fft // hop)
        power = hann_window(n_fft).numpy() ** 2
        envelope = np.zeros((self.frames + self.taps - 1) * hop)
        for frame in range(self.frames):
            envelope[frame * hop : frame * hop + n_fft] += power
        kept = envelope[n_fft // 2 : n_fft // 2 + samples]
        self.register_buffer(
            "inverse_envelope", torch.from_numpy(1 / np.maximum(kept, 1e-11)).float(), persistent=False
        )

    def blocks(self, signal: Tensor) -> Tensor:
        """[B, L] -> [B, hop, T + taps - 1]: frame t begins with block t."""
        left = self.n_fft // 2
        right = (self.frames + self.taps - 1) * self.hop - left - self.samples  # positive for hop <= n_fft / 2
        if self.padding == "reflect":
            mirrored = min(right, left)
            signal = F.pad(signal[:, None], (left, mirrored), mode="reflect")[:, 0]
            left, right = 0, right - mirrored
        signal = F.pad(signal, (left, right))
        return torch.unflatten(signal, 1, (-1, self.hop)).transpose(1, 2)

    def spectrum(self, blocks: Tensor) -> Tensor:
        """Blocks [B, hop, T + taps - 1] -> [B, 2F, T], the real parts of the F bins, then the imaginary parts."""
        raise NotImplementedError

    def pieces(self, spectrum: Tensor) -> Tensor:
        """[B, 2F, T] -> windowed frames [B, taps * hop, T]"""
        raise NotImplementedError

    def analyse(self, signal: Tensor) -> Tensor:
        """[B, L] -> [B, 2F, T], the real parts of the F bins, then the imaginary parts."""
        return self.spectrum(self.blocks(signal))

    def synthesise(self, spectrum: Tensor) -> Tensor:
        """[B, 2F, T] -> [B, L]"""
        signal = self.overlapped(self.pieces(spectrum))
        begin = self.n_fft // 2
        return signal[:, begin : begin + self.samples] * self.inverse_envelope

    def overlapped(self, pieces: Tensor) -> Tensor:
        """Windowed frames [B, taps * hop, T] -> their sum [B, (T + taps - 1) * hop], each a hop after the last."""
        total = F.pad(pieces[:, : self.hop], (0, self.taps - 1))
        for tap in range(1, self.taps):  # the tap-th hop of frame t lies in block t + tap
            piece = pieces[:, tap * self.hop : (tap + 1) * self.hop]
            total = total + F.pad(piece, (tap, self.taps - 1 - tap))
        return total.transpose(1, 2).flatten(1)


class PolyphaseSTFT(_Frames):
    """Centred STFT with a periodic Hann window and its inverse, for one fixed length, without complex numbers.

    Equal to ``torch.stft`` and ``torch.istft`` (both ``center=True``) up to rounding. The window is filled up with
    zeros to whole hops; bases are made in float64. Arguments: those of :class:`_Frames`.
    """

    analysis_basis: Tensor
    synthesis_basis: Tensor

    def __init__(self, samples: int, n_fft: int, hop: int, padding: str = "zeros") -> None:
        super().__init__(samples, n_fft, hop, padding)
        filled = self.taps * hop
        window = hann_window(n_fft).numpy()
        angles = _angles(n_fft)
        analysis = np.zeros((2 * self.bins, filled))
        analysis[:, :n_fft] = np.concatenate([np.cos(angles), -np.sin(angles)]) * window
        # [2F, taps * hop] -> [2F, taps, hop] -> [2F, hop, taps], a Conv1d over blocks
        self.register_buffer(
            "analysis_basis",
            torch.from_numpy(analysis.reshape(2 * self.bins, self.taps, hop).transpose(0, 2, 1).copy()).float(),
            persistent=False,
        )
        real, imaginary = inverse_weights(n_fft)
        synthesis = np.zeros((filled, 2 * self.bins))
        synthesis[:n_fft] = (np.concatenate([real * np.cos(angles), -imaginary * np.sin(angles)]) * window).T
        self.register_buffer("synthesis_basis", torch.from_numpy(synthesis[:, :, None]).float(), persistent=False)

    def spectrum(self, blocks: Tensor) -> Tensor:
        """Blocks [B, hop, T + taps - 1] -> [B, 2F, T]"""
        return F.conv1d(blocks, self.analysis_basis)

    def pieces(self, spectrum: Tensor) -> Tensor:
        """[B, 2F, T] -> windowed frames [B, taps * hop, T]"""
        return F.conv1d(spectrum, self.synthesis_basis)


class FactoredSTFT(_Frames):
    """The same as :class:`PolyphaseSTFT` by Cooley and Tukey's two steps, n_fft = P Q.

    With n = Q p + q and k = r + P s the transform is one of length P over p for each q, a turn by r q / n_fft, and one
    of length Q over q for each r. Both are convolutions of width one: Turing has no matrix product in fp32 in
    TensorRT-RTX. The matrices take 0.2 MB where the bases of the other one take 134 MB (n_fft = 4094),
    or 0.1 and 8 MB (1022).
    """

    window: Tensor
    first: Tensor
    turn: Tensor
    second: Tensor
    second_inverse: Tensor
    first_inverse: Tensor
    real_weight: Tensor
    imaginary_weight: Tensor

    def __init__(self, samples: int, n_fft: int, hop: int, padding: str = "zeros") -> None:
        super().__init__(samples, n_fft, hop, padding)
        self.outer, self.inner = factors(n_fft)  # P, Q
        self.rows = (self.bins - 1) // self.outer + 1  # values of s that bins up to the middle need

        def turns(count: int, *steps: NDArray[np.int64]) -> Matrix:
            """2 pi times the outer product of the steps over ``count``, reduced as integers."""
            return 2 * np.pi * (np.multiply.outer(*steps) % count) / count

        def keep(name: str, matrix: Matrix) -> None:
            self.register_buffer(name, torch.from_numpy(matrix).float(), persistent=False)

        p, q, s = (np.arange(count, dtype=np.int64) for count in (self.outer, self.inner, self.rows))
        first, turn, second = turns(self.outer, p, p), turns(n_fft, p, q), turns(self.inner, s, q)
        keep("window", hann_window(n_fft).numpy()[:, None])
        keep("first", np.concatenate([np.cos(first), -np.sin(first)])[..., None])  # [2 P, P, 1], of real signals
        keep("turn", np.stack([np.cos(turn), np.sin(turn)])[..., None])  # [2, P, Q, 1]
        rows = [[np.cos(second), np.sin(second)], [-np.sin(second), np.cos(second)]]
        keep("second", np.block(rows)[..., None])  # [2 S, 2 Q, 1]
        back = [[np.cos(second.T), -np.sin(second.T)], [np.sin(second.T), np.cos(second.T)]]
        keep("second_inverse", np.block(back)[..., None])  # [2 Q, 2 S, 1]
        real, imaginary = inverse_weights(n_fft)
        keep("real_weight", real)
        keep("imaginary_weight", imaginary)
        keep("first_inverse", np.concatenate([np.cos(first), -np.sin(first)], axis=1)[..., None])  # the real part

    def spectrum(self, blocks: Tensor) -> Tensor:
        """Blocks [B, hop, T + taps - 1] -> [B, 2F, T]"""
        count = blocks.shape[-1] - self.taps + 1
        frames = torch.cat([blocks[:, :, tap : tap + count] for tap in range(self.taps)], dim=1)[:, : self.n_fft]
        frames = frames * self.window  # [B, P Q, T]
        outer = F.conv1d(torch.unflatten(frames, 1, (self.outer, self.inner)).flatten(2), self.first)
        outer = torch.unflatten(outer, 2, (self.inner, count))  # [B, 2 P, Q, T]
        real, imaginary = outer[:, : self.outer], outer[:, self.outer :]
        cosine, sine = self.turn[0], self.turn[1]
        turned = torch.cat((real * cosine + imaginary * sine, imaginary * cosine - real * sine), dim=2)
        found = F.conv1d(turned.transpose(1, 2).flatten(2), self.second)  # [B, 2 S, P T]
        found = torch.unflatten(found, 2, (self.outer, count))  # [B, 2 S, P, T]
        parts = (found[:, : self.rows].flatten(1, 2), found[:, self.rows :].flatten(1, 2))
        return torch.cat([part[:, : self.bins] for part in parts], dim=1)

    def pieces(self, spectrum: Tensor) -> Tensor:
        """[B, 2F, T] -> windowed frames [B, taps * hop, T]"""
        count = spectrum.shape[-1]
        beyond = self.rows * self.outer - self.bins  # zeros, which fill up the last row
        parts = (spectrum[:, : self.bins] * self.real_weight, spectrum[:, self.bins :] * self.imaginary_weight)
        rows = [torch.unflatten(F.pad(part, (0, 0, 0, beyond)), 1, (self.rows, self.outer)) for part in parts]
        inner = F.conv1d(torch.cat(rows, dim=1).flatten(2), self.second_inverse)  # [B, 2 Q, P T]
        inner = torch.unflatten(inner, 2, (self.outer, count)).transpose(1, 2)  # [B, P, 2 Q, T]
        real, imaginary = inner[:, :, : self.inner], inner[:, :, self.inner :]
        cosine, sine = self.turn[0], self.turn[1]
        turned = torch.cat((real * cosine - imaginary * sine, imaginary * cosine + real * sine), dim=1)
        frames = F.conv1d(turned.flatten(2), self.first_inverse)  # [B, P, Q T]
        frames = torch.unflatten(frames, 2, (self.inner, count)).flatten(1, 2) * self.window
        return F.pad(frames, (0, 0, 0, self.taps * self.hop - self.n_fft))


def factors(n_fft: int) -> tuple[int, int]:
    """The two factors of a transform's length that are nearest to each other, the smaller one first."""
    smaller = next(one for one in range(math.isqrt(n_fft), 0, -1) if n_fft % one == 0)
    return smaller, n_fft // smaller


def transform_of(samples: int, n_fft: int, hop: int, padding: str = "zeros") -> PolyphaseSTFT | FactoredSTFT:
    """The form of the transforms that is the smaller and quicker one for a window's length.

    Two steps take more operators. With ONNX Runtime on one CPU core they are twice as fast at 1022 = 14 x 73 and eight
    times at 4094 = 46 x 89; a length without such factors, or a short one, is transformed in one.
    """
    two_steps = 8 * sum(factors(n_fft)) <= n_fft
    return (FactoredSTFT if two_steps else PolyphaseSTFT)(samples, n_fft, hop, padding)


def _interpolation(coordinates: Matrix, size: int, align_corners: bool, border: bool) -> Matrix:
    """Linear interpolation at normalised coordinates, as ``grid_sample`` does it: a matrix [len(coordinates), size]."""
    if align_corners:
        position = (coordinates + 1) / 2 * (size - 1)
    else:
        position = ((coordinates + 1) * size - 1) / 2
    if border:
        position = np.clip(position, 0, size - 1)
    low = np.floor(position).astype(np.int64)
    fraction = position - low
    matrix = np.zeros((len(coordinates), size))
    rows = np.arange(len(coordinates))
    for index, share in ((low, 1 - fraction), (low + 1, fraction)):
        inside = (index >= 0) & (index < size)
        matrix[rows[inside], index[inside]] += share[inside]
    return matrix


def warp_matrices(spec: FrontEndSpec) -> tuple[Matrix, Matrix, Matrix | None]:
    """The log-frequency warp as matrices: warp [F', F], unwarp [F, F'] and, unless it is the identity, time [T, T].

    A magnitude X [F, T] becomes ``warp @ X @ time.T``, a mask M [F', T] becomes ``unwarp @ M @ time.T``.
    """
    bins, rows, frames = spec.n_fft // 2 + 1, spec.log_rows, spec.frames
    border = spec.align_corners  # the published form reads zeros beyond the border
    warp = _interpolation(log_frequency_grid(rows).numpy(), bins, spec.align_corners, border)
    unwarp = _interpolation(linear_frequency_grid(bins).numpy(), rows, spec.align_corners, border)
    if spec.align_corners:
        return warp, unwarp, None
    return warp, unwarp, _interpolation(np.linspace(-1, 1, frames), frames, False, False)


def _constant_weights(module: nn.Module) -> None:
    """Replace, in place, layers that compute their weights in each call by layers that hold the computed ones.

    Runtimes would compute them once at best; TensorRT wants the kernel of a transposed convolution as a constant. Where
    a normalisation follows the sum of two convolutions, which no runtime folds, it goes into both of them.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, UpConv) and child.fold:
            kernel = folded_kernel(child.weight.detach())  # [in, out, 4, 4]
            layer = nn.ConvTranspose2d(kernel.shape[0], kernel.shape[1], 4, stride=2, padding=1, bias=False)
            layer.weight = nn.Parameter(kernel, requires_grad=False)
            setattr(module, name, layer)
        elif isinstance(child, SharedUpConv) and isinstance(child.norm, nn.BatchNorm2d):
            _fold_norm(child, child.norm)
        else:
            _constant_weights(child)


def _fold_norm(layer: SharedUpConv, norm: nn.BatchNorm2d) -> None:
    """Fold the normalisation that follows the layer's sum into its convolutions, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert layer.own.bias is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = (layer.own.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    with torch.no_grad():
        for convolution in (layer.own, layer.shared):
            convolution.weight.copy_(convolution.weight.double() * scale[:, None, None])  # [in, out, 4, 4]
        layer.own.bias.copy_(shift)
    layer.norm = nn.Identity()


def _mix_rows(x: Tensor, kernel: Tensor) -> Tensor:
    """The matrix ``kernel`` [rows', rows, 1, 1] times x: [M, rows, T] -> [M, rows', T]"""
    return F.conv2d(x.unsqueeze(2), kernel).squeeze(2)


class _Logits(nn.Module):
    """A separator up to its logits [B, N, F', T], which a decoder may leave to be formed outside of its own forward,
    and those of presence [B, N], of a decoder that tells it.

    As one module, so that all of the network stands in one scope of the graph, which half precision goes by.
    """

    def __init__(self, network: Separator) -> None:
        super().__init__()
        self.network = network

    def forward(self, network_input: Tensor, visual: VisualFeatures, class_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        output: MaskOutput = self.network(network_input, visual, class_ids)
        return output.logits, output.presence


class MaskedSeparator(nn.Module):
    """What both forms of the graph share: a copy of the separator, and masks [B, N, bins, T] from a spectrum."""

    warp: Tensor
    unwarp: Tensor
    time: Tensor | None
    window: Tensor
    first_input = ""
    first_output = ""

    def __init__(self, separator: Separator, *, motion_mask: bool = False, channels: int = 1) -> None:
        super().__init__()
        spec = separator.spec.front_end
        self.channels = channels
        self.level_db = spec.level_db
        self.tells_presence = separator.mask_decoder.tells_presence
        self.can_go_unseen = separator.can_go_unseen
        self.takes_photos = separator.takes_photos
        self.separator = _Logits(separator.merged())
        _constant_weights(self.separator)
        self.has_object = separator.object_encoder is not None
        self.has_motion = separator.motion_encoder is not None
        self.motion_mask = motion_mask
        # As kernels [out, in, 1, 1] of convolutions whose channels are the rows: TensorRT-RTX has no matrix product in
        # fp32 for Turing, and cannot fuse a one-dimensional convolution with the sum of the logarithm after it.
        for name, matrix in zip(("warp", "unwarp", "time"), warp_matrices(spec), strict=True):
            kernel = None if matrix is None else torch.from_numpy(matrix[:, :, None, None].copy()).float()
            self.register_buffer(name, kernel, persistent=False)
        if self.level_db is not None:
            self.register_buffer("window", hann_window(spec.n_fft).float(), persistent=False)

    def masks(self, real: Tensor, imaginary: Tensor, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """real and imaginary [B, bins, T] of the mono mixture -> masks [B, N, bins, T], and of a decoder that tells
        presence the probabilities [B, N]."""
        given = dict(zip(self.input_names()[1:], features, strict=True))
        visual = VisualFeatures(
            object=given.get("object_features"),
            motion=given.get("motion_features"),
            motion_mask=given.get("motion_mask"),
            seen=given.get("seen"),
            motion_seen=given.get("motion_seen"),
        )
        logits, presence = self.separator(self.network_input(real, imaginary), visual, given["class_ids"])
        return self.unwarped(logits), torch.sigmoid(presence) if self.tells_presence else None

    def network_input(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """[B, bins, T] each -> [B, 1, F', T]"""
        power = real * real + imaginary * imaginary
        magnitude = power.sqrt() + 1e-10
        warped = self._along_time(_mix_rows(magnitude, self.warp))  # [B, F', T]
        if self.level_db is not None:  # as FrontEnd.analyse
            warped = reference_gain(power.mean(dim=(1, 2)), self.window, self.level_db)[:, None, None] * warped
        return torch.log1p(warped)[:, None]

    def unwarped(self, logits: Tensor) -> Tensor:
        """Logits [B, N, F', T] -> masks [B, N, bins, T]"""
        masks = _mix_rows(torch.sigmoid(logits).flatten(0, 1), self.unwarp)  # [B * N, bins, T]
        return torch.unflatten(self._along_time(masks), 0, logits.shape[:2])

    def _along_time(self, x: Tensor) -> Tensor:
        """[M, rows, T] -> the same shape"""
        return x if self.time is None else _mix_rows(x.transpose(1, 2), self.time).transpose(1, 2)

    def input_names(self) -> tuple[str, ...]:
        names = [self.first_input]
        if self.has_object:
            names.append("object_features")
        if self.has_motion:
            names.append("motion_features")
            if self.motion_mask:
                names.append("motion_mask")
        if self.can_go_unseen:
            names.append("seen")
        if self.takes_photos and self.has_motion:
            names.append("motion_seen")
        return (*names, "class_ids")

    def output_names(self) -> tuple[str, ...]:
        return (self.first_output, "presence") if self.tells_presence else (self.first_output,)


class WaveformSeparator(MaskedSeparator):
    """A separator as one function of plain tensors, for a fixed length: what is exported. It holds a copy.

    Shapes:
        mixture [B, L]; object_features [B, N, Do] and motion_features [B, N, Dm, Tm], the outputs of the visual
        encoders, each only where the separator has that encoder; with ``motion_mask`` a bool [B, N, Tm] (True =
        valid); bool [B, N] ``seen`` of a separator that can go unseen and ``motion_seen`` of one that takes photos;
        class_ids int64 [B, N] -> sources [B, N, L], and of a decoder that tells it presence [B, N], probabilities. With
        C > 1 ``channels`` the mixture is [B, C, L] and the sources are [B, N, C, L]; the masks are those of the
        channels' mean.
    """

    first_input, first_output = "mixture", "sources"

    def __init__(self, separator: Separator, *, motion_mask: bool = False, channels: int = 1) -> None:
        super().__init__(separator, motion_mask=motion_mask, channels=channels)
        spec = separator.spec.front_end
        self.stft = transform_of(spec.clip_samples, spec.n_fft, spec.hop, spec.padding)

    def forward(self, mixture: Tensor, *features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The features are those of :meth:`input_names`, in that order; the results those of :meth:`output_names`."""
        if self.channels > 1:
            return self._of_channels(mixture, features)
        spectrum = self.stft.analyse(mixture)  # [B, 2F, T]
        real, imaginary = spectrum[:, : self.stft.bins], spectrum[:, self.stft.bins :]
        mask, presence = self.masks(real, imaginary, features)  # [B, N, F, T]
        # The mixture's phase: real and imaginary part scaled alike.
        estimate = torch.cat((mask * real[:, None], mask * imaginary[:, None]), dim=2)  # [B, N, 2F, T]
        waveforms = self.stft.synthesise(estimate.flatten(0, 1))  # [B * N, L]
        waveforms = torch.unflatten(waveforms, 0, (mixture.shape[0], mask.shape[1])).clamp(-1.0, 1.0)
        return waveforms if presence is None else (waveforms, presence)

    def _of_channels(self, mixture: Tensor, features: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor]:
        spectrum = self.stft.analyse(mixture.flatten(0, 1))  # [B * C, 2F, T]
        spectrum = torch.unflatten(spectrum, 0, (mixture.shape[0], self.channels))
        mono = spectrum.mean(dim=1)  # the transform of the channels' mean
        mask, presence = self.masks(mono[:, : self.stft.bins], mono[:, self.stft.bins :], features)  # [B, N, F, T]
        estimate = torch.cat((mask, mask), dim=2)[:, :, None] * spectrum[:, None]  # [B, N, C, 2F, T]
        waveforms = self.stft.synthesise(estimate.flatten(0, 2))  # [B * N * C, L]
        shape = (mixture.shape[0], mask.shape[1], self.channels)
        waveforms = torch.unflatten(waveforms, 0, shape).clamp(-1.0, 1.0)
        return waveforms if presence is None else (waveforms, presence)


class SpectralSeparator(MaskedSeparator):
    """The same without the transforms, which are left to the caller (:mod:`avsep.export.runtime.transforms`).

    It holds a copy.

    Shapes:
        spectrum [B, 2, bins, T], the mixture's real and imaginary part; the others as in :class:`WaveformSeparator`
        -> estimate [B, N, 2, bins, T], whose inverse transform is to be limited to +-1. With C > 1 ``channels``
        [B, C, 2, bins, T] -> [B, N, C, 2, bins, T].
    """

    first_input, first_output = "spectrum", "estimate"

    def forward(self, spectrum: Tensor, *features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The features are those of :meth:`input_names`, in that order; the results those of :meth:`output_names`."""
        mono = spectrum.mean(dim=1) if self.channels > 1 else spectrum
        mask, presence = self.masks(mono[:, 0], mono[:, 1], features)  # [B, N, bins, T]
        of_source = mask[:, :, None, None] if self.channels > 1 else mask[:, :, None]
        estimate = of_source * spectrum[:, None]
        return estimate if presence is None else (estimate, presence)


def fitted(separator: Separator, plan: ExportPlan) -> Separator:
    """The separator as a plan has it exported: :func:`with_length`, :func:`with_limited_sum` where it is asked for, and
    :func:`avsep.export.build.offer.without_classes`.

    Raises :class:`ExportError` and :class:`ConfigError` as these.
    """
    from avsep.export.build.offer import without_classes

    made = with_length(separator, plan.length_s)
    made = with_limited_sum(made) if plan.limit_mask_sum else made
    return without_classes(made, plan.left_out)


def with_limited_sum(separator: Separator) -> Separator:
    """The separator with masks that sum up to at most 1 (``front_end.limit_mask_sum``): the same modules. Itself where
    it has that setting."""
    if separator.spec.front_end.limit_mask_sum:
        return separator
    return _with_front_end(separator, "limit_mask_sum", limit_mask_sum=True)


def with_length(separator: Separator, length_s: float | None) -> Separator:
    """The separator for chunks of another length: the same modules, another front end. Itself where nothing changes.

    A length within half a millisecond of the trained clip's is the clip's.

    Raises:
        ExportError: the audio encoder cannot take so many frames; names the nearest lengths that it can.
    """
    front_end = separator.spec.front_end
    if length_s is None or abs(length_s - front_end.clip_s) < 5e-4:
        return separator
    rate, hop = front_end.sample_rate_hz, front_end.hop
    samples = round(length_s * rate)
    frames = 1 + samples // hop
    name = separator.spec.audio_encoder.name
    multiple = 1 if separator.audio_encoder.any_frames else separator.audio_encoder.size_multiple
    if frames % multiple or samples < 1:
        # T frames are given by (T - 1) hop to T hop - 1 samples; the longest of them is named
        below, above = frames // multiple * multiple, (frames // multiple + 1) * multiple
        near = " or ".join(f"{(f * hop - 1) / rate:.3f}" for f in (below, above) if f)
        raise ExportError(
            f"length_s {length_s:g} gives {frames} time frames, and audio encoder '{name}' takes multiples of "
            f"{multiple}: the nearest are {near} s"
        )
    if front_end.padding == "reflect" and samples <= front_end.n_fft // 2:
        raise ExportError(
            f"length_s {length_s:g} is too short to be reflected: at least {front_end.n_fft / rate:.3f} s"
        )
    return _with_front_end(separator, "length_s", clip_samples=samples)


def _with_front_end(separator: Separator, where: str, **settings: Any) -> Separator:
    """The same modules behind a front end with other settings; ``where`` stands before what is wrong with them."""
    from avsep.separator import Separator as _Separator
    from avsep.spec import SeparatorSpec, validated

    data = separator.spec.model_dump()
    data["front_end"].update(settings)
    spec = validated(SeparatorSpec, data, where)
    made = _Separator(
        spec,
        separator.audio_encoder,
        separator.mask_decoder,
        separator.object_encoder,
        separator.motion_encoder,
    )
    made.class_means = separator.class_means
    return made.train(separator.training)

"""The visual encoders as graphs of their own: they run about once a second, the separator once a chunk.

A graph takes one video's frames as bytes, of the size that they are stored in, and gives the features that the
separator's graph takes. Stored features (``precomputed``) need none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from avsep.errors import ExportError
from avsep.export.build.plan import ExportPlan, TensorSpec

if TYPE_CHECKING:
    from avsep.encoders.base import VisualEncoder
    from avsep.separator import Separator
    from avsep.types import Batch

__all__ = ["EncoderGraph", "encoder_specs", "exported_roles"]

_MOTION_RATE_HZ = 8.0  # frames a second of movement in the stores that avsep makes


def exported_roles(separator: Separator) -> tuple[str, ...]:
    """The roles whose encoder computes something: those that are fed with frames."""
    return tuple(source.role for source in separator.visual_sources() if source.kind == "frames")


def encoder_specs(
    separator: Separator, role: str, plan: ExportPlan, batch: Batch | None = None
) -> tuple[TensorSpec, TensorSpec]:
    """Input ``frames`` uint8 [B, K, channels, H, W] and output ``features`` of an encoder's graph, of B = 1 video.

    Sizes are those of the plan, else of the store's frames as ``batch`` holds them, else the encoder's own.

    Raises:
        ExportError: the encoder does not say its size, or how many steps it gives.
    """
    encoder = separator.object_encoder if role == "object" else separator.motion_encoder
    assert encoder is not None
    (source,) = (s for s in separator.visual_sources() if s.role == role)
    stored = None if batch is None else (batch.visual.object if role == "object" else batch.visual.motion)
    if plan.frame_size is not None:
        height, width = plan.frame_size
    elif stored is not None:
        height, width = (int(n) for n in stored.shape[-2:])
    else:
        height = width = _own(
            encoder.size, encoder, role, "size", "the side of its frames, in pixels (or --frame-size)"
        )
    frames, channels = source.frames, 3
    if role == "motion":
        seconds = separator.spec.front_end.clip_s
        frames = round((source.rate_hz or _MOTION_RATE_HZ) * seconds) if stored is None else int(stored.shape[2])
        frames, channels = max(1, plan.motion_frames or frames), 1
    if stored is not None:
        channels = int(stored.shape[-3])
    axes = {0: "batch"} if plan.dynamic else {}
    count = 1
    given = TensorSpec("frames", "uint8", (count, frames, channels, height, width), axes)
    shape: tuple[int, ...] = (count, encoder.dim)
    if role == "motion":
        shape = (*shape, _own(encoder.steps, encoder, role, "steps", "the steps in time that it gives"))
    return given, TensorSpec("features", "float32", shape, axes)


def _own(value: int | None, encoder: VisualEncoder, role: str, name: str, what: str) -> int:
    if value is None:
        raise ExportError(f"the {role} encoder {type(encoder).__name__} does not set '{name}', {what}")
    return value


class EncoderGraph(nn.Module):
    """A copy of a visual encoder, in operators that the exporter and TensorRT have.

    Averages over uneven bins and resizing are fixed linear maps of rows and columns, and become convolutions over
    them, as do the linear layers: TensorRT-RTX has no matrix product in fp32 for Turing.

    Shapes:
        frames uint8 [B, K, channels, H, W] -> features [B, D] or [B, D, steps].
    """

    def __init__(self, separator: Separator, role: str) -> None:
        super().__init__()
        encoder = separator.object_encoder if role == "object" else separator.motion_encoder
        assert encoder is not None
        self.encoder = copy.deepcopy(encoder).eval()
        _pointwise_linears(self.encoder)
        self.maps = _LinearMaps()

    def prepare(self, frames: Tensor) -> None:
        """Work out, on an example, the maps that the graph needs; call it once before exporting."""
        with torch.no_grad():
            self(frames)

    def forward(self, frames: Tensor) -> Tensor:
        # Floats of 0..1, which encoders take as well: TensorRT knows bytes only to be cast at the graph's border.
        with self.maps:
            features: Tensor = self.encoder(frames.to(torch.float32) / 255.0)
            return features


class _PointwiseLinear(nn.Module):
    """``nn.Linear`` as a 1x1 convolution."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach()[:, :, None, None].clone(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1], 1, 1)
        return F.conv2d(flat, self.weight, self.bias).reshape(*x.shape[:-1], -1)


def _pointwise_linears(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, _PointwiseLinear(child))
        elif not isinstance(child, nn.MultiheadAttention):  # which reads its layers' weights itself
            _pointwise_linears(child)


class _LinearMaps(TorchFunctionMode):
    """Replaces averages over bins and resizing by products with matrices, which are found on the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[Any, ...], list[list[float]]] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.adaptive_avg_pool1d or func is torch.adaptive_avg_pool1d:
            x, size = args
            steps = size if isinstance(size, int) else size[0]
            kernel = self._kernel(("area", int(x.shape[-1]), int(steps), False), x)
            return _mix_last(x, kernel)
        if func is F.interpolate and _resizes(args, kwargs):
            (x,), size = args, kwargs["size"]
            height, width = (size, size) if isinstance(size, int) else size
            smooth = bool(kwargs.get("antialias", False))
            columns = self._kernel((kwargs["mode"], int(x.shape[3]), int(width), smooth), x)
            rows = self._kernel((kwargs["mode"], int(x.shape[2]), int(height), smooth), x)
            lead = x.shape[:2]
            x = _mix_last(x.flatten(0, 1), columns)  # [M * C, H, width]
            return torch.unflatten(_mix_last(x.transpose(1, 2), rows).transpose(1, 2), 0, lead)
        return func(*args, **kwargs)

    def _kernel(self, key: tuple[Any, ...], like: Tensor) -> Tensor:
        """[out, in, 1, 1]"""
        if key not in self.found:
            mode, size, wanted, smooth = key
            # as frames of two equal columns, [size, 1, size, 2]: PyTorch's antialiasing is wrong for a single one
            eye = torch.eye(size, dtype=torch.float64)[:, None, :, None].expand(-1, -1, -1, 2).contiguous()
            with torch._C.DisableTorchFunction():
                extra = {} if mode == "area" else {"align_corners": False, "antialias": smooth}
                done = F.interpolate(eye, size=(wanted, 2), mode=mode, **extra)  # [size, 1, wanted, 2]
            self.found[key] = done[:, 0, :, 0].T.tolist()
        return torch.tensor(self.found[key], dtype=torch.float32)[:, :, None, None].to(like.dtype)


def _resizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``interpolate`` is one that is replaced; others are left to the exporter and the audit."""
    known = kwargs.get("mode") in ("area", "bilinear", "bicubic") and not kwargs.get("align_corners")
    return known and len(args) == 1 and kwargs.get("size") is not None


def _mix_last(x: Tensor, kernel: Tensor) -> Tensor:
    """[M, C, in] -> [M, C, out] by the matrix ``kernel`` [out, in, 1, 1]"""
    return F.conv2d(x.transpose(1, 2).unsqueeze(2), kernel).squeeze(2).transpose(1, 2)

"""Frozen visual encoders around published models of the ``transformers`` library.

No class here is registered. Weights are never unpickled: safetensors are preferred, and where a repository holds a
PyTorch file only, it is read with ``weights_only=True``, which runs no code of it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.encoders.base import VisualEncoder
from avsep.encoders.hub import HubModel
from avsep.encoders.visual._frames import check_frames
from avsep.errors import CheckpointError, MissingExtraError
from avsep.types import VisualSource

__all__ = ["FrozenFrameEncoder", "FrozenPretrained", "prepare_frames", "read_weights", "weights_come_later"]

_LATER: contextvars.ContextVar[bool] = contextvars.ContextVar("weights_come_later", default=False)


@contextlib.contextmanager
def weights_come_later() -> Iterator[None]:
    """Pretrained encoders built inside have fresh weights and look for none: a checkpoint will fill them."""
    token = _LATER.set(True)
    try:
        yield
    finally:
        _LATER.reset(token)


class FrozenPretrained(VisualEncoder):
    """Base of encoders around a model of the ``transformers`` library; frozen, always in evaluation mode.

    Subclasses name ``hub``, make the model's configuration in :meth:`_kind` and read the sizes off it in
    :meth:`_set_sizes`.
    """

    hub: ClassVar[HubModel]
    frozen = True

    def _load(self, weights: str) -> None:
        """Build ``self.model`` and fill it."""
        try:
            import transformers
        except ImportError:
            raise MissingExtraError("transformers", "vision", type(self).__name__) from None
        later = _LATER.get() and weights == "auto"
        folder = None if later else self.hub.locate(weights)
        kind, config = self._kind(transformers, folder)
        if folder is None:
            self.model = kind(config)
        else:
            self.model = read_weights(kind, config, folder)
        self._set_sizes(self.model.config)
        self.requires_grad_(False)
        self.train(False)

    def _kind(self, transformers: Any, folder: Path | None) -> tuple[Any, Any]:
        """The model's class and its configuration, the folder's or the published one."""
        raise NotImplementedError

    def _set_sizes(self, config: Any) -> None:
        """Set ``dim`` and ``size``, and of a motion encoder ``frames`` and ``steps``."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> FrozenPretrained:
        return super().train(False)


class FrozenFrameEncoder(FrozenPretrained):
    """K frames of an object, each encoded alone, and the maximum over them.

    Subclasses say how frames are prepared (see :func:`prepare_frames`) and give :meth:`_features`.
    """

    provides = ("object",)
    extracts = ("object",)
    size: int
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]
    resized: ClassVar[int | None] = None
    square: ClassVar[bool] = False
    mode: ClassVar[str] = "bicubic"

    def __init__(self, *, frames: int = 3, weights: str = "auto", batch: int = 64) -> None:
        super().__init__()
        if frames < 1 or batch < 1:
            raise ValueError(f"frames and batch must be positive, got {frames} and {batch}")
        self.frames = frames
        self.batch = batch
        self._load(weights)

    def source(self) -> VisualSource:
        return VisualSource(role="object", kind="frames", frames=self.frames)

    def encode(self, frames: Tensor) -> Tensor:
        how: dict[str, Any] = {"resized": self.resized, "square": self.square, "mode": self.mode}
        parts = torch.split(frames, self.batch)
        return torch.cat([self._features(prepare_frames(p, self.size, self.mean, self.std, **how)) for p in parts])

    def _features(self, frames: Tensor) -> Tensor:
        """[n, 3, size, size] -> [n, dim]."""
        raise NotImplementedError

    def forward(self, frames: Tensor) -> Tensor:
        check_frames(frames, 3, type(self).__name__)
        return torch.unflatten(self.encode(frames.flatten(0, 1)), 0, frames.shape[:2]).amax(dim=1)


def read_weights(kind: Any, config: Any, folder: Path) -> nn.Module:
    """A model of class ``kind`` with the weights of ``folder``; raises CheckpointError where they are not its own."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of reading a file; what takes long here has bars of its own
    try:
        model, report = kind.from_pretrained(
            folder, config=config, local_files_only=True, weights_only=True, output_loading_info=True
        )
    except Exception as error:  # a damaged file raises whatever its bytes ask for
        raise CheckpointError(
            f"the weights in {folder} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
            "fetch them again"
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"the weights in {folder} lack {len(missing)} tensors of {kind.__name__}, among them '{missing[0]}': they "
            "are of another model"
        )
    whole: nn.Module = model.float()
    return whole


def prepare_frames(
    frames: Tensor,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    resized: int | None = None,
    square: bool = False,
    mode: str = "bicubic",
) -> Tensor:
    """Frames [B, 3, H, W] (uint8 of 0..255, or float of 0..1) as the published models take them: [B, 3, size, size].

    The shorter side is brought to ``resized`` (default: ``size``) with antialiasing and the middle square cut out;
    with ``square`` both sides are, and nothing is cut. The colours are normalised.
    """
    x = frames if frames.is_floating_point() else frames.float() / 255.0
    height, width = x.shape[-2:]
    side = resized or size
    shape = (side, side)
    if not square:  # the longer side rounded down, as the published preprocessing does
        shape = (max(side, side * height // width), max(side, side * width // height))
    if shape != (height, width):
        x = F.interpolate(x, size=shape, mode=mode, align_corners=False, antialias=True).clamp(0.0, 1.0)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    x = x[..., top : top + size, left : left + size]
    centre, spread = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (mean, std))
    return (x - centre) / spread

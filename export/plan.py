"""What to export: the choices of the user and the shapes that follow from them. Plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from avsep.errors import ConfigError

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["ExportPlan", "TensorSpec", "tensor_specs"]

# The oldest operator set that torch.onnx writes without converting, and the newest before scaled dot-product attention
# becomes one operator, which TensorRT takes only in half precision.
OPSETS = (18, 20)


@dataclass(frozen=True)
class ExportPlan:
    """Fixed shapes of the graph and the precision that it must reach.

    ``batch`` mixtures at once, ``sources`` N in each; ``motion_steps`` Tm of the motion features (None: as the motion
    encoder gives them, and 8 for stored ones, which VideoMAE's are); ``opset`` of ONNX; ``tolerance`` the largest
    absolute difference from PyTorch in a sample; ``seed`` of the golden inputs.
    """

    batch: int = 1
    sources: int = 2
    motion_steps: int | None = None
    opset: int = 18
    tolerance: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "sources", "motion_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise ConfigError(f"opset must lie between {OPSETS[0]} and {OPSETS[1]}, got {self.opset}")
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance must be positive, got {self.tolerance}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of an input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def tensor_specs(separator: Separator, plan: ExportPlan) -> tuple[tuple[TensorSpec, ...], TensorSpec]:
    """The graph's inputs, in order, and its output."""
    batch, sources = plan.batch, plan.sources
    length = separator.spec.front_end.clip_samples
    inputs = [TensorSpec("mixture", "float32", (batch, length))]
    if separator.object_encoder is not None:
        width = int(separator.object_encoder.dim)  # type: ignore[arg-type]
        inputs.append(TensorSpec("object_features", "float32", (batch, sources, width)))
    if separator.motion_encoder is not None:
        encoder = separator.motion_encoder
        steps = plan.motion_steps or int(getattr(encoder, "steps", 8))
        inputs.append(TensorSpec("motion_features", "float32", (batch, sources, int(encoder.dim), steps)))  # type: ignore[arg-type]
    inputs.append(TensorSpec("class_ids", "int64", (batch, sources)))
    return tuple(inputs), TensorSpec("sources", "float32", (batch, sources, length))

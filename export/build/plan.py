"""What to export: the choices of the user and the shapes that follow from them. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from avsep.errors import ConfigError
from avsep.export.runtime.streaming import COUNTED
from avsep.export.runtime.timeline import MOTION_STEPS

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["PRECISIONS", "TOLERANCE", "ExportPlan", "TensorSpec", "profiles", "tensor_specs"]

# The oldest operator set that torch.onnx writes without converting, and the newest before scaled dot-product attention
# becomes one operator, which TensorRT takes only in half precision.
OPSETS = (18, 20)
PRECISIONS = ("fp32", "fp16", "int8")
# Largest absolute difference from PyTorch in a sample that an fp32 graph may have.
TOLERANCE = 1e-3
# More is a slip of the hand, and would end in want of memory after minutes.
_MOST = {
    "batch": 256,
    "sources": 256,
    "channels": 64,
    "frames": 1024,
    "max_batch": 256,
    "max_sources": 256,
    "motion_steps": 4096,
    "motion_frames": 4096,
}
_MOST_S = 600.0
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class ExportPlan:
    """The graphs to write, their shapes, and the quality that they must reach.

    Attributes:
        batch: mixtures at once, B.
        sources: sources in each, N.
        length_s: seconds of a chunk, at most 600; None for the clip that the separator was trained on.
        dynamic: leave B and N open in the graph (``batch`` and ``sources`` are then what an engine is tuned for); the
            length always is fixed.
        spectral: leave both transforms out of the graph: the mixture's spectrum in, the estimates' spectra out.
        frames: STFT frames in one call of a causal separator, which goes frame by frame: more compute less and come
            later. Of no meaning for others.
        channels: C of the mixture and of each source; the masks are found once, from the channels' mean. With 1 there
            is no such dimension.
        limit_mask_sum: divide the masks by their sum where that is above 1, whatever the separator's own setting: what
            comes out and the residual then add up to the mixture, and no part is louder than it.
        precision: one graph each, of ``fp32``, ``fp16`` (mixed) and ``int8`` (mixed).
        motion_steps: Tm of stored motion features; None: those of the mixtures, or 8. An encoder that computes has its
            own.
        motion_mask: give the graph an input that says which motion steps are valid, for videos of different lengths.
        motion_frames: frames of one chunk that the motion encoder's graph takes; None: as the mixtures have them, or
            8 a second.
        frame_size: height and width of the frames that the encoders' graphs take; None: as the mixtures have them, or
            the encoder's own size.
        opset: of ONNX, 18 to 20.
        tolerance: largest absolute difference from PyTorch in a sample; None: 1e-3 for fp32, while the others are
            measured and left to the gate.
        seed: of the golden inputs, not negative.
        calibration: training mixtures that the ranges of INT8 are measured on.
        gate_db: largest drift of SDR, SIR or SAR in any source, in dB.
        allow_drift: write a graph that drifts by more; its manifest says so.
        max_batch, max_sources: upper ends of the optimisation profile of a dynamic graph. They, ``batch`` and
            ``sources`` are at most 256, ``channels`` 64, ``frames`` 1024; ``motion_steps``, ``motion_frames`` and each
            side of a frame 4096.
        left_out: classes that the separator knows and the bundle does not offer, each with the reason, which whoever
            asks for it is told. The class ids of the graphs count the others alone.
        by_name: ask for sources by name alone, also of a video, unless whoever asks says to look.
    """

    batch: int = 1
    sources: int = 2
    length_s: float | None = None
    dynamic: bool = False
    spectral: bool = False
    frames: int = 1
    channels: int = 1
    limit_mask_sum: bool = False
    precision: tuple[str, ...] = ("fp32",)
    motion_steps: int | None = None
    motion_mask: bool = False
    motion_frames: int | None = None
    frame_size: tuple[int, int] | None = None
    opset: int = 18
    tolerance: float | None = None
    seed: int = 0
    calibration: int = 64
    gate_db: float = 0.1
    allow_drift: bool = False
    max_batch: int = 8
    max_sources: int = 8
    left_out: Mapping[str, str] = field(default_factory=dict, hash=False)
    by_name: bool = False

    def __post_init__(self) -> None:
        for name in (*_MOST, "calibration"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
            if value is not None and value > (most := _MOST.get(name, value)):
                raise ConfigError(f"{name} must be at most {most}, got {value}: longer work goes in several calls")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        reasons = self.left_out.values() if isinstance(self.left_out, Mapping) else [None]
        if not all(isinstance(reason, str) and reason for reason in reasons):
            raise ConfigError(
                f"left_out must give a reason for each class, such as {{'violin': 'too faint'}}: {self.left_out}"
            )
        for name in ("length_s", "tolerance", "gate_db"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be positive, got {value}")
        if self.length_s is not None and self.length_s > _MOST_S:
            raise ConfigError(
                f"length_s must be at most {_MOST_S:g}, got {self.length_s:g}: a graph takes a chunk, and longer "
                "recordings are cut into chunks where it runs"
            )
        if not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise ConfigError(f"opset must lie between {OPSETS[0]} and {OPSETS[1]}, got {self.opset}")
        precision = (self.precision,) if isinstance(self.precision, str) else tuple(self.precision)
        object.__setattr__(self, "precision", precision)
        for name in precision:
            if name not in PRECISIONS:
                raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got '{name}'")
        if not precision or len(set(precision)) < len(precision):
            raise ConfigError(f"precision must name one or more of {', '.join(PRECISIONS)}, each once")
        if self.frame_size is not None:
            object.__setattr__(self, "frame_size", tuple(self.frame_size))
            if len(self.frame_size) != 2 or not 1 <= min(self.frame_size) <= max(self.frame_size) <= _MOST_PIXELS:
                raise ConfigError(
                    f"frame_size must be a height and a width of 1 to {_MOST_PIXELS}, got {list(self.frame_size)}"
                )
        if self.dynamic:
            for name in ("batch", "sources"):
                value, largest = getattr(self, name), getattr(self, f"max_{name}")
                if value > largest:
                    raise ConfigError(
                        f"{name} {value} is above max_{name} {largest}: raise max_{name} (--max-{name} {value})"
                    )

    def tolerance_of(self, precision: str) -> float | None:
        """The tolerance that a graph is held to; None where the gate decides."""
        return TOLERANCE if self.tolerance is None and precision == "fp32" else self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """As it stands in manifests: what came with later versions only where it is not as it was before."""
        new = {"frames": 1, "left_out": {}, "by_name": False}
        return {name: value for name, value in asdict(self).items() if name not in new or value != new[name]}


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of an input or output of a graph.

    ``shape`` is what the graph is traced and measured with; ``open_axes`` names the axes that stay open in it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    open_axes: dict[int, str] = field(default_factory=dict)

    @property
    def declared(self) -> tuple[int | str, ...]:
        """The shape as the graph declares it, with a name for each open axis."""
        return tuple(self.open_axes.get(axis, size) for axis, size in enumerate(self.shape))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.declared)}


def tensor_specs(separator: Separator, plan: ExportPlan) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs of the separator's graph, in order, and its outputs, first what is separated. The separator has the
    plan's length already.

    Raises:
        ConfigError: the plan asks for what the separator's visual encoders do not have.
    """
    _check_visual(separator, plan)
    if separator.causal:
        return _stream_specs(separator, plan)
    if plan.frames > 1:
        raise ConfigError(f"frames {plan.frames} is of causal separators, which go frame by frame: leave it out")
    batch, sources = plan.batch, plan.sources
    front_end = separator.spec.front_end
    mixture_axes = {0: "batch"} if plan.dynamic else {}
    source_axes = {0: "batch", 1: "sources"} if plan.dynamic else {}
    bins, frames = front_end.n_fft // 2 + 1, front_end.frames
    channels = () if plan.channels == 1 else (plan.channels,)
    if plan.spectral:
        inputs = [TensorSpec("spectrum", "float32", (batch, *channels, 2, bins, frames), mixture_axes)]
        outputs = [TensorSpec("estimate", "float32", (batch, sources, *channels, 2, bins, frames), source_axes)]
    else:
        length = front_end.clip_samples
        inputs = [TensorSpec("mixture", "float32", (batch, *channels, length), mixture_axes)]
        outputs = [TensorSpec("sources", "float32", (batch, sources, *channels, length), source_axes)]
    if separator.object_encoder is not None:
        width = separator.object_encoder.dim
        inputs.append(TensorSpec("object_features", "float32", (batch, sources, width), source_axes))
    if separator.motion_encoder is not None:
        encoder = separator.motion_encoder
        steps = encoder.steps or plan.motion_steps or MOTION_STEPS
        shape = (batch, sources, encoder.dim, steps)
        inputs.append(TensorSpec("motion_features", "float32", shape, source_axes))
        if plan.motion_mask:
            inputs.append(TensorSpec("motion_mask", "bool", (batch, sources, steps), source_axes))
    flags = {
        "seen": separator.can_go_unseen,
        "motion_seen": separator.takes_photos and separator.motion_encoder is not None,
    }
    inputs += [TensorSpec(name, "bool", (batch, sources), source_axes) for name, there in flags.items() if there]
    inputs.append(TensorSpec("class_ids", "int64", (batch, sources), source_axes))
    if separator.mask_decoder.tells_presence:
        outputs.append(TensorSpec("presence", "float32", (batch, sources), source_axes))
    return tuple(inputs), tuple(outputs)


def _stream_specs(separator: Separator, plan: ExportPlan) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs of a causal separator's graph, in order, and its outputs: first the sources, and, of a decoder that
    tells it, presence; then the states.

    Raises:
        ConfigError: the plan asks for what a stream has not.
    """
    for name, wanted in (
        ("spectral", plan.spectral),
        ("length_s", plan.length_s is not None),
        ("batch", plan.batch > 1),
    ):
        if wanted:
            raise ConfigError(
                f"{name} is of separators that take chunks, and this one goes frame by frame: leave it out"
            )
    spec, count = separator.spec.front_end, plan.sources
    of_source = {1: "sources"} if plan.dynamic else {}
    channels = () if plan.channels == 1 else (plan.channels,)
    samples, held = plan.frames * spec.hop, spec.n_fft - spec.hop
    inputs = [TensorSpec("mixture", "float32", (1, *channels, samples))]
    if separator.object_encoder is not None:
        inputs.append(TensorSpec("object_features", "float32", (1, count, separator.object_encoder.dim), of_source))
    if separator.can_go_unseen:
        inputs.append(TensorSpec("seen", "bool", (1, count), of_source))
    inputs.append(TensorSpec("class_ids", "int64", (1, count), of_source))
    if plan.frames > 1:
        inputs.append(TensorSpec(COUNTED, "float32", (1, plan.frames)))
    outputs = [TensorSpec("sources", "float32", (1, count, *channels, samples), of_source)]
    if separator.mask_decoder.tells_presence:
        outputs.append(TensorSpec("presence", "float32", (1, count), of_source))
    of_mixture, of_sources = separator.state_shapes()
    states: dict[str, tuple[tuple[int, ...], dict[int, str]]] = {
        "samples": ((1, plan.channels, held), {}),
        "overlap": ((1, count, plan.channels, held), of_source),
        "envelope": ((1, held), {}),
        **{name: ((1, *shape), {}) for name, shape in of_mixture.items()},
        **{name: ((1, count, *shape), of_source) for name, shape in of_sources.items()},
    }
    for name, (shape, axes) in states.items():
        inputs.append(TensorSpec(f"state_{name}", "float32", shape, axes))
        outputs.append(TensorSpec(f"next_{name}", "float32", shape, axes))
    return tuple(inputs), tuple(outputs)


def _check_visual(separator: Separator, plan: ExportPlan) -> None:
    """Refuse choices of a plan that would do nothing, or that contradict the encoders."""
    motion = separator.motion_encoder
    if plan.by_name and separator.visual_sources() and not separator.can_go_unseen:
        raise ConfigError("by_name asks by name alone, and this separator needs to see what it is asked for")
    if motion is None and (plan.motion_mask or plan.motion_steps is not None):
        name = "motion_mask" if plan.motion_mask else "motion_steps"
        raise ConfigError(f"{name} is of motion features, but this separator has no motion encoder: leave it out")
    steps = None if motion is None else motion.steps
    if None not in (plan.motion_steps, steps) and plan.motion_steps != steps:
        raise ConfigError(
            f"motion_steps {plan.motion_steps} is not what this separator's motion encoder gives, which is {steps}: "
            "leave it out"
        )
    computing = {source.role for source in separator.visual_sources() if source.kind == "frames"}
    if plan.motion_frames is not None and "motion" not in computing:
        raise ConfigError(
            "motion_frames is of a motion encoder that takes frames, and this separator has none: leave it out"
        )
    if plan.frame_size is not None and not computing:
        raise ConfigError("frame_size is of encoders that take frames, and this separator has none: leave it out")


def profiles(specs: Sequence[TensorSpec], plan: ExportPlan) -> list[dict[str, dict[str, list[int]]]]:
    """Optimisation profiles of a graph: for each input the least, the usual and the largest shape; none if all is
    fixed."""
    if not any(spec.open_axes for spec in specs):
        return []
    largest = {"batch": plan.max_batch, "sources": plan.max_sources}

    def shape(spec: TensorSpec, sizes: dict[str, int]) -> list[int]:
        return [sizes.get(spec.open_axes.get(axis, ""), size) for axis, size in enumerate(spec.shape)]

    return [
        {
            spec.name: {
                "min": shape(spec, dict.fromkeys(largest, 1)),
                "opt": shape(spec, {}),
                "max": shape(spec, largest),
            }
            for spec in specs
        }
    ]

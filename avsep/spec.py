"""Specs: plain data that describes a separator or a run, in and out of YAML, validated before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from avsep.errors import ConfigError, UnknownNameError, near_matches
from avsep.files import parse_yaml, read_yaml
from avsep.registry import (
    ADAPTERS,
    AUDIO_ENCODERS,
    MASK_DECODERS,
    MEMORIES,
    MIXERS,
    STRATEGIES,
    VISUAL_ENCODERS,
    Registry,
)

__all__ = [
    "AugmentSpec",
    "ComponentRef",
    "FrontEndSpec",
    "OptimizerSpec",
    "RunSpec",
    "SeparatorSpec",
    "TrainSpec",
    "apply_settings",
    "first_difference",
    "list_presets",
    "load_preset",
    "validated",
]

PRESETS = Path(__file__).parent / "presets"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


_M = TypeVar("_M", bound=BaseModel)


def validated(model: type[_M], data: Any, where: str) -> _M:
    """Build ``model`` from plain data; a mistake becomes one line that names the key, the value and near matches."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        # of a value of several kinds pydantic names the kind too
        path = ".".join(str(p) for p in first["loc"] if not str(p).startswith(("ComponentRef", "tuple[")))
        if first["type"] == "extra_forbidden":
            owner: Any = model
            for part in first["loc"][:-1]:
                field = getattr(owner, "model_fields", {}).get(part)
                owner = field.annotation if field else None
            known = getattr(owner, "model_fields", None) or model.model_fields
            raise UnknownNameError(
                f"{where}: unknown key '{path}': {near_matches(str(first['loc'][-1]), known)}"
            ) from None
        if first["type"] == "missing":
            raise ConfigError(f"{where}: '{path}' is missing") from None
        raise ConfigError(f"{where}: {path or 'value'} = {first['input']!r}: {first['msg']}") from None


class ComponentRef(_Model):
    """A component by name with its parameters. In YAML: ``name``, or ``{name: ..., params: {...}}``."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, (tuple, list)):
            if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict):
                return {"name": value[0], "params": value[1]}
            raise ValueError("a component is a name, (name, {parameters}) or {name: ..., params: {...}}")
        return value

    def check(self, registry: Registry[Any]) -> None:
        registry.get(self.name).check(self.params)


class FrontEndSpec(_Model):
    """STFT and log-frequency grid (methods: Chen et al., iQuery, CVPR 2023, as ContAV-Sep uses it)."""

    sample_rate_hz: int = Field(11025, gt=0, description="samples a second of what the network hears, and of a store")
    clip_samples: int = Field(65535, gt=0, description="samples of one training clip and one inference chunk")
    n_fft: int = Field(1022, gt=0, description="samples of one window of the STFT; even")
    hop: int = Field(256, gt=0, description="samples from one window of the STFT to the next")
    log_rows: int = Field(256, gt=0, description="rows F of the log-frequency grid")
    align_corners: bool = Field(True, description="False reproduces the published code's warp")
    padding: Literal["zeros", "reflect"] = Field("zeros", description="what the STFT puts before and after a clip")
    level_db: float | None = Field(
        None,
        ge=-100,
        le=0,
        description="bring every mixture to this level (RMS, dB of full scale) before the network looks at it; the "
        "sources keep the mixture's own level; unset: as it is, as published",
    )
    limit_mask_sum: bool = Field(
        False, description="divide the masks of a mixture's sources by their sum where that is above 1"
    )

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As :class:`TrainSpec`'s."""
        data: dict[str, Any] = handler(self)
        new = ("level_db", "limit_mask_sum")
        return {key: value for key, value in data.items() if key not in new or value not in (None, False)}

    @model_validator(mode="after")
    def _consistent(self) -> FrontEndSpec:
        if self.n_fft % 2:
            raise ValueError(f"n_fft must be even, got {self.n_fft}")
        if self.hop * 2 >= self.n_fft:
            raise ValueError(
                f"hop {self.hop} is too long for n_fft {self.n_fft}: the inverse needs more than half overlap"
            )
        return self

    @property
    def frames(self) -> int:
        """Time frames T of one clip (centred STFT)."""
        return 1 + self.clip_samples // self.hop

    @property
    def clip_s(self) -> float:
        return self.clip_samples / self.sample_rate_hz


class SeparatorSpec(_Model):
    """A separator as data. ``classes`` are the names in query order (may be empty while only numbers are known).

    ``task_sizes``, of a separator that computes differently for classes of different tasks (with an ``adapter``, or a
    mask decoder that says so): how many classes each task brought; empty while all are of the first one.
    """

    audio_encoder: ComponentRef = Field(description="the part that hears: makes features of the mixture")
    mask_decoder: ComponentRef = Field(description="the part that makes a mask for each source")
    object_encoder: ComponentRef | None = Field(None, description="the part that sees what a source looks like")
    motion_encoder: ComponentRef | None = Field(None, description="the part that sees how a source moves")
    front_end: FrontEndSpec = Field(
        default_factory=lambda: FrontEndSpec(), description="from samples to spectrograms and back"
    )
    num_classes: int = Field(1, ge=1, description="classes that the separator knows; avsep train sets it")
    classes: tuple[str, ...] = Field(
        (), description="their names, in the order of their numbers; avsep train sets them"
    )
    adapter: ComponentRef | None = Field(None, description="weights of each task's own")
    task_sizes: tuple[int, ...] = Field((), description="classes that each task brought; avsep train sets them")

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As :class:`TrainSpec`'s."""
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if value or key not in ("adapter", "task_sizes")}

    @model_validator(mode="after")
    def _tasks(self) -> SeparatorSpec:
        if self.task_sizes and not self.knows_tasks:
            raise ValueError(f"task_sizes {list(self.task_sizes)} are of a separator with an adapter: add one")
        if self.task_sizes and (min(self.task_sizes) < 1 or sum(self.task_sizes) != self.num_classes):
            raise ValueError(f"task_sizes {list(self.task_sizes)} do not sum up to num_classes = {self.num_classes}")
        return self

    @model_validator(mode="after")
    def _names(self) -> SeparatorSpec:
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} class names for num_classes = {self.num_classes}")
        if len(set(self.classes)) != len(self.classes):
            repeated = sorted({c for c in self.classes if self.classes.count(c) > 1})
            raise ValueError(f"class names repeat: {', '.join(repeated)}")
        return self

    @property
    def knows_tasks(self) -> bool:
        """Whether the separator computes differently for classes of different tasks."""
        decoder = self.mask_decoder
        return self.adapter is not None or MASK_DECODERS.get(decoder.name).factory.knows_tasks(decoder.params)

    def of_classes(self, classes: Sequence[str]) -> SeparatorSpec:
        """The spec of a new separator of these classes, all of a first task."""
        new = {"num_classes": len(classes), "classes": tuple(classes), "task_sizes": ()}
        return validated(SeparatorSpec, {**self.model_dump(), **new}, "classes")

    def grown(self, num_classes: int, classes: Sequence[str] = ()) -> SeparatorSpec:
        """The spec with more classes. Where tasks are known they are a new one; names given to classes that had none
        are not, nor are those that come with the first names."""
        new: dict[str, Any] = {"num_classes": num_classes, "classes": tuple(classes)}
        if num_classes > self.num_classes and (self.classes or not classes) and self.knows_tasks:
            new["task_sizes"] = (*(self.task_sizes or (self.num_classes,)), num_classes - self.num_classes)
        return validated(SeparatorSpec, {**self.model_dump(), **new}, "grow")

    def check(self) -> None:
        """Raise when a name, a parameter or the combination is wrong; nothing is built."""
        parts: list[tuple[ComponentRef | None, Registry[Any]]] = [
            (self.audio_encoder, AUDIO_ENCODERS),
            (self.mask_decoder, MASK_DECODERS),
            (self.object_encoder, VISUAL_ENCODERS),
            (self.motion_encoder, VISUAL_ENCODERS),
            (self.adapter, ADAPTERS),
        ]
        for ref, registry in parts:
            if ref is not None:
                ref.check(registry)
        provided = set(AUDIO_ENCODERS.get(self.audio_encoder.name).provides)
        for role, ref in (("object", self.object_encoder), ("motion", self.motion_encoder)):
            if ref is None:
                continue
            gives = VISUAL_ENCODERS.get(ref.name).provides
            if role not in gives:
                raise ConfigError(
                    f"visual encoder '{ref.name}' gives {' and '.join(sorted(gives)) or 'nothing'} features and cannot "
                    f"be the {role}_encoder"
                )
            provided.add(role)
        decoder = MASK_DECODERS.get(self.mask_decoder.name)
        if self.motion_encoder is not None and "motion_dim" not in {p.name for p in decoder.parameters}:
            raise ConfigError(
                f"mask decoder '{decoder.name}' makes no use of motion features: leave the motion_encoder out"
            )
        takes_object = "object" in decoder.needs or "object_dim" in {p.name for p in decoder.parameters}
        if self.object_encoder is not None and not takes_object:
            raise ConfigError(
                f"mask decoder '{decoder.name}' makes no use of object features: leave the object_encoder out"
            )
        if missing := sorted(decoder.needs - provided):
            way_out = " and ".join(_way_out(m) for m in missing)
            raise ConfigError(f"mask decoder '{decoder.name}' needs {' and '.join(missing)} features: {way_out}")


def _way_out(feature: str) -> str:
    if feature in ("object", "motion"):
        return f"add {'an' if feature == 'object' else 'a'} {feature}_encoder"
    givers = ", ".join(spec.name for spec in AUDIO_ENCODERS if feature in spec.provides)
    return f"choose an audio encoder that gives {feature}" + (f" ({givers})" if givers else "")


class OptimizerSpec(_Model):
    """One parameter group's optimiser. Fresh for every task, as published."""

    name: Literal["adam", "adamw"] = Field("adam", description="the optimiser")
    lr: float = Field(1e-4, gt=0, le=1e3, description="learning rate")
    weight_decay: float = Field(0.0, ge=0, le=1e3, description="weight decay")
    schedule: Literal["step", "one_cycle", "constant"] = Field(
        "step", description="how the rate goes: step follows milestones, one_cycle rises once and falls to zero"
    )
    milestones: tuple[int, ...] = Field((), description="0-based epochs from which the rate is multiplied by gamma")
    gamma: float = Field(0.1, gt=0, le=1e3, description="factor at each milestone")


class AugmentSpec(_Model):
    """Random changes of every training source (:mod:`avsep.data.augment`)."""

    equaliser_db: float = Field(0.0, ge=0, le=24, description="largest gain or loss of a band, in dB")
    detune_cents: float = Field(
        0.0, ge=0, le=100, description="largest change of pitch, and with it of speed: 25 cents move 1.5 % in time"
    )
    rooms: float = Field(0.0, ge=0, le=1, description="share of the sources that sound in a room (RT60 .1 to .8 s)")


_CAME_LATER = ("groups", "mixer", "augment", "cross_entropy_weight")


class TrainSpec(_Model):
    """The training of one task (defaults: the published setting, batch 32, 100 epochs, seed 1234)."""

    batch_size: int = Field(32, ge=1, le=2**16, description="mixtures in a step, over all processes")
    sources: int = Field(2, ge=1, le=256, description="sources N in each training mixture")
    epochs: int = Field(100, ge=1, le=10**7, description="epochs of every task")
    steps_per_epoch: int | None = Field(
        None, ge=1, le=10**9, description="draw this many batches an epoch instead of all"
    )
    current_repeats: int = Field(
        40, ge=1, le=10**6, description="times each clip of the current task stands in an epoch's list"
    )
    memory_repeats: int = Field(800, ge=1, le=10**6, description="times each exemplar stands in an epoch's list")
    memory_share: Literal["grow", "constant"] = Field(
        "grow",
        description="constant divides memory_repeats by the exemplars of the class: a larger memory is then not seen "
        "more often; equal for one exemplar a class",
    )
    partner: Literal["any", "different_class", "different_video"] = Field(
        "any", description="what a clip may be mixed with; any: even with itself, as published"
    )
    crop: Literal["any", "published"] = Field(
        "any", description="published: middles of whole seconds, 8 or more from either end of a long clip"
    )
    gain: tuple[float, float] = Field((0.5, 1.5), description="range of the factor that each source is multiplied by")
    seed: int = Field(1234, ge=0, lt=2**63, description="of weights, mixtures and exemplars")
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = Field(
        "auto",
        description="of the network; auto: on a GPU bf16 where it has it, else fp16; on a CPU full precision, or bf16 "
        "where that was measured to be faster",
    )
    validate_every: int = Field(1, ge=1, description="epochs between validations")
    validation_pairs: int | None = Field(None, ge=1, description="validation mixtures per task; all when unset")
    checkpoint_every: int = Field(200, ge=1, description="steps between resume checkpoints")
    gradient_clip: float | None = Field(None, gt=0, description="largest norm of the gradient; no limit when unset")
    cross_entropy_weight: float = Field(
        0.0,
        ge=0,
        description="of the masks' cross-entropy, beside the method's L1 between masks; 0: none",
    )
    audio: OptimizerSpec = Field(default_factory=lambda: OptimizerSpec(), description="optimiser of the audio encoder")
    visual: OptimizerSpec = Field(
        default_factory=lambda: OptimizerSpec(), description="optimiser of the visual encoders"
    )
    decoder: OptimizerSpec = Field(default_factory=lambda: OptimizerSpec(), description="optimiser of the mask decoder")
    groups: dict[str, OptimizerSpec] = Field(
        default_factory=dict, description="optimisers of further parameter groups, by the group's name"
    )
    mixer: ComponentRef | None = Field(
        None, description="which clips meet in a training mixture: as_published when unset"
    )

    augment: AugmentSpec | None = Field(None, description="random changes of every source; none when unset")

    @property
    def optimizers(self) -> dict[str, OptimizerSpec]:
        """The settings of each parameter group (:meth:`avsep.Separator.parameter_groups`), by its name."""
        return {"audio": self.audio, "visual": self.visual, "decoder": self.decoder, **self.groups}

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came with later versions is left out where it is unset: specs of the same run stay the same text."""
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if value or key not in _CAME_LATER}

    @field_validator("gain")
    @classmethod
    def _gain(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1000:
            raise ValueError("gain must be (low, high) with 0 < low <= high <= 1000")
        return value


def _task_lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
    return value


def _strategies(value: Any) -> Any:
    """A list of components becomes a tuple of them; a list of one is the one, and ``(name, parameters)`` too."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict) and "name" not in value[1]:
        return value
    if not value:
        raise ValueError("name at least one strategy")
    return value[0] if len(value) == 1 else tuple(value)


class BlurrySpec(_Model):
    """A stream whose tasks overlap (:mod:`avsep.data.blurry`).

    ``tasks``: the classes that most clips of come in each task; the run's own ``tasks`` are those that each brings.
    """

    disjoint: int = Field(50, ge=0, le=100, description="percent of the classes that come in one task alone")
    blurry: int = Field(10, ge=0, le=100, description="percent of the others' clips that come in any task")
    seed: int = Field(1, ge=0, description="of what overlaps")
    tasks: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_task_lists)] = Field(
        (), description="classes that most clips of each task come from; avsep train sets them"
    )


class RunSpec(_Model):
    """Everything that decides a run's result: separator, strategy, memory, training, tasks, protocol and the store."""

    separator: SeparatorSpec = Field(description="the network")
    strategy: Annotated[ComponentRef | tuple[ComponentRef, ...], BeforeValidator(_strategies)] = Field(
        description="a component, or a list of several that are combined"
    )
    memory: ComponentRef = Field(
        default_factory=lambda: ComponentRef(name="none"), description="which exemplars of earlier tasks are kept"
    )
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(),
        description="the training of every task; defaults are the published setting",
    )
    tasks: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_task_lists)] = Field(
        (), description="classes of each task, in order (--tasks, --classes-per-task)"
    )
    protocol: Literal["fixed", "paper", "audiovisual"] = Field(
        "fixed", description="test mixtures that the run is scored by (--protocol; see avsep list protocols)"
    )
    validation_protocol: Literal["fixed", "paper", "audiovisual"] = Field(
        "fixed",
        description="paper: models are selected on pairs redrawn after every task, degenerate ones included; "
        "audiovisual: on pairs of different classes and of one class",
    )
    store: str = Field("", description="folder of the training data")
    store_hash: str = Field("", description="hash of its content; avsep train sets it")
    preset: str = Field("", description="the preset that the settings began with (--preset)")
    blurry: BlurrySpec | None = Field(None, description="tasks that overlap (--blurry); none when unset")

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As :class:`TrainSpec`'s."""
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if value is not None or key != "blurry"}

    def check(self) -> None:
        self.separator.check()
        for strategy in self.strategies:
            strategy.check(STRATEGIES)
        self.memory.check(MEMORIES)
        if self.train.mixer is not None:
            self.train.mixer.check(MIXERS)

    @property
    def tested(self) -> tuple[tuple[str, ...], ...]:
        """The classes that each task is tested on: those it brings, but where tasks overlap."""
        return (self.blurry.tasks if self.blurry is not None else ()) or self.tasks

    @property
    def strategies(self) -> tuple[ComponentRef, ...]:
        """The strategy, or all that are combined."""
        return self.strategy if isinstance(self.strategy, tuple) else (self.strategy,)

    @property
    def strategy_name(self) -> str:
        """The strategy's name; of several, their names with ``+`` between."""
        return "+".join(s.name for s in self.strategies)


def list_presets() -> dict[str, str]:
    """Preset names and their summaries."""
    return {p.stem: (read_yaml(p) or {}).get("summary", "") for p in sorted(PRESETS.glob("*.yaml"))}


def load_preset(name: str) -> dict[str, Any]:
    """A preset's plain data: ``summary``, ``source``, ``separator`` and ``train``. A path to a YAML file works too."""
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            raise UnknownNameError(
                f"no preset named '{name}': {near_matches(name, list_presets())} (see: avsep list presets; a file of "
                f"one's own ends in .yaml)"
            )
    data = read_yaml(path)
    if not isinstance(data, dict) or "separator" not in data:
        raise ConfigError(f"{path} is not a preset: it has no 'separator'")
    known = ("summary", "source", "separator", "train")
    for key in data:
        if key not in known:
            raise UnknownNameError(f"{path}: unknown key '{key}': {near_matches(str(key), known)}")
    return data


def apply_settings(data: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Apply ``key.path=value`` settings (values are YAML) to plain data, in place, and return it."""
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or not key:
            raise ConfigError(f"setting {setting!r} must be KEY=VALUE, such as train.batch_size=8")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"setting {setting[:80]!r}: the value is not valid YAML ({error})") from None
        node: Any = data
        *parents, last = key.split(".")
        for part in parents:
            if isinstance(node, list):
                node = _member(node, part, setting)
                continue
            child = node.get(part)
            if isinstance(child, str):  # a component given by bare name: open it up so that params can be set
                child = {"name": child}
            elif child is None:
                child = {}
            if not isinstance(child, (dict, list)):
                raise ConfigError(f"setting {setting!r}: '{part}' is a value, not a group")
            node[part] = child
            node = child
        if isinstance(node, list):
            raise ConfigError(f"setting {setting!r}: '{last}' is one of a list: set something of it")
        node[last] = value
    return data


def _member(members: list[Any], name: str, setting: str) -> dict[str, Any]:
    """The component called ``name`` in a list of components, opened up so that its parameters can be set."""
    for number, member in enumerate(members):
        if member == name:
            member = members[number] = {"name": member}
        if isinstance(member, dict) and member.get("name") == name:
            return member
    known = [m["name"] if isinstance(m, dict) else str(m) for m in members]
    raise UnknownNameError(f"setting {setting!r}: no '{name}' in the list: {near_matches(name, known)}")


def first_difference(mine: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key at which two plain values differ, with both values."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            if found := first_difference(mine.get(key), theirs.get(key), f"{path}.{key}" if path else str(key)):
                return found
        return None
    return None if mine == theirs else (path, mine, theirs)

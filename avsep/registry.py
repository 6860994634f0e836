"""Components by name: audio and visual encoders, mask decoders, strategies and memory policies.

A component is a class with keyword-only parameters, each typed and with a default from its source. It derives from the
base of its kind, which declares what the rest of the library reads of it::

    @MASK_DECODERS.register("query_transformer", source="Chen et al., iQuery, CVPR 2023")
    class QueryTransformer(MaskDecoder): ...

Packages outside avsep add components through the entry-point group ``avsep.components``: each entry point names a
module (or a callable without arguments) whose import registers what it brings.
"""

from __future__ import annotations

import importlib
import inspect
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from avsep.errors import ConfigError, UnknownNameError, near_matches

if TYPE_CHECKING:
    from avsep.adapters.base import Adapter
    from avsep.decoders.base import MaskDecoder
    from avsep.encoders.base import AudioEncoder, VisualEncoder
    from avsep.memory.base import MemoryPolicy
    from avsep.mixers.base import Mixer
    from avsep.strategies.base import Strategy

__all__ = [
    "ADAPTERS",
    "AUDIO_ENCODERS",
    "MASK_DECODERS",
    "MEMORIES",
    "MIXERS",
    "REGISTRIES",
    "STRATEGIES",
    "VISUAL_ENCODERS",
    "Component",
    "ComponentSpec",
    "Parameter",
    "Registry",
]

ENTRY_POINT_GROUP = "avsep.components"
_REQUIRED = inspect.Parameter.empty


class Component:
    """What a component of any kind declares at its class, so that it can be read before anything is built.

    ``needs`` and ``provides`` are names of tensors (``mask_features``, ``latent``, ``skips``, ``bottleneck``,
    ``spectrogram``, ``object``, ``motion``) that the composer checks against each other. ``bottleneck`` stands for the
    latent of an encoder that ends there, and leaves the way up to the decoder.

    ``keeps`` says in a few words what must be stored from task to task beside the separator and the exemplars (empty:
    nothing), ``differs`` in a sentence or two what was changed or left out of the method in ``source`` and why (empty:
    nothing). docs/methods.md is made of them.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[str] = ""
    differs: ClassVar[str] = ""


_C = TypeVar("_C", bound=Component)
_Class = TypeVar("_Class", bound=type[Component])


@dataclass(frozen=True)
class Parameter:
    """One keyword parameter of a component. ``wiring`` ones are filled in by the composer, not by people."""

    name: str
    annotation: str
    default: Any
    wiring: bool = False

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED

    def __str__(self) -> str:
        return self.name if self.required else f"{self.name}={self.default!r}"


@dataclass(frozen=True)
class ComponentSpec(Generic[_C]):
    """What the registry knows of a component before anything is built.

    ``factory`` is its class; ``example`` are parameters of a small one, which tests build.
    """

    kind: str
    name: str
    factory: type[_C]
    summary: str
    source: str
    parameters: tuple[Parameter, ...]
    package: str
    example: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the tensors that it takes (:class:`Component`)."""
        return frozenset(self.factory.needs)

    @property
    def provides(self) -> frozenset[str]:
        """Names of the tensors that it gives (:class:`Component`)."""
        return frozenset(self.factory.provides)

    @property
    def settings(self) -> tuple[Parameter, ...]:
        """The parameters that a person sets."""
        return tuple(p for p in self.parameters if not p.wiring)

    def check(self, params: dict[str, Any]) -> None:
        """Raise if ``params`` has a name or a kind of value this component does not take, or lacks one it must have."""
        settings = {p.name: p for p in self.settings}
        for name, value in params.items():
            if name not in settings:
                raise UnknownNameError(
                    f"{self.kind} '{self.name}' has no parameter '{name}': {near_matches(name, settings)}"
                )
            if not _fits(value, kind := settings[name].annotation):
                raise ConfigError(f"{self.kind} '{self.name}': {name} = {value!r} is not of the kind {kind}")
        for parameter in settings.values():
            if parameter.required and parameter.name not in params:
                raise ConfigError(f"{self.kind} '{self.name}' needs the parameter '{parameter.name}'")


# A bool is an int to Python, and a slip to people.
_PLAIN_KINDS = {"int": numbers.Integral, "float": numbers.Real, "str": str, "bool": bool}


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of a plain kind; of any other annotation the component itself must judge."""
    kind = _PLAIN_KINDS.get(annotation)
    return kind is None or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool))


def _first_line(factory: Callable[..., Any]) -> str:
    doc = (factory.__doc__ or "").strip()
    return doc.splitlines()[0].strip() if doc else ""


def _parameters(factory: Callable[..., Any], wiring: frozenset[str]) -> tuple[Parameter, ...]:
    found = []
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise TypeError(f"{factory!r}: parameter '{parameter.name}' must be keyword-only to be registered")
        annotation = parameter.annotation
        text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        found.append(Parameter(parameter.name, text, parameter.default, parameter.name in wiring))
    return tuple(found)


class Registry(Generic[_C]):
    """Names to component classes, of one kind."""

    def __init__(self, kind: str, key: str, wiring: frozenset[str] = frozenset(), *, base: str | None = None) -> None:
        self.kind = kind  # "mask decoder"
        self.key = key  # "mask_decoders", as in `avsep list mask_decoders`
        self._wiring = wiring
        # A dotted path: the bases are above this module, and their modules import it.
        self._base = f"{__name__}.{Component.__name__}" if base is None else base
        self._components: dict[str, ComponentSpec[_C]] = {}

    def _check_base(self, name: str, factory: object) -> None:
        module, _, base_name = self._base.rpartition(".")
        base = getattr(importlib.import_module(module), base_name)
        if not (inspect.isclass(factory) and issubclass(factory, base)):
            own = factory.__name__ if inspect.isclass(factory) else "..."
            raise TypeError(
                f"{self.kind} '{name}' must be a class that derives from {self._base}, which declares what is read of "
                f"it: write 'class {own}({base_name}):'"
            )

    def register(
        self, name: str, *, source: str = "", example: Mapping[str, Any] | None = None
    ) -> Callable[[_Class], _Class]:
        """Decorator of a component's class.

        Args:
            name: by which it is composed.
            source: the paper or library it comes from.
            example: parameters of a small one, which builds and runs within a second; the defaults when omitted. The
                test over every registered component takes them.

        Raises:
            ValueError: the name is taken (a second component never replaces a first), or there is no docstring.
            TypeError: it is no class of this kind, or takes a parameter by position.
        """

        def decorate(factory: _Class) -> _Class:
            if name in self._components:
                raise ValueError(f"{self.kind} '{name}' is registered already, by {self._components[name].package}")
            self._check_base(name, factory)
            summary = _first_line(factory)
            if not summary:
                raise ValueError(f"{self.kind} '{name}' needs a docstring: its first line is what `avsep list` shows")
            self._components[name] = ComponentSpec(
                kind=self.kind,
                name=name,
                factory=cast("type[_C]", factory),
                summary=summary,
                source=source,
                parameters=_parameters(factory, self._wiring),
                package=factory.__module__.partition(".")[0],
                example=dict(example or {}),
            )
            return factory

        return decorate

    def names(self) -> list[str]:
        load_components()
        return sorted(self._components)

    def __iter__(self) -> Iterator[ComponentSpec[_C]]:
        return iter([self._components[name] for name in self.names()])

    def __contains__(self, name: object) -> bool:
        load_components()
        return name in self._components

    def get(self, name: str) -> ComponentSpec[_C]:
        """The component's spec; an unknown name raises with the near matches."""
        load_components()
        if name not in self._components:
            hint = near_matches(name, self._components)
            broken = "".join(f"; {failure}" for failure in _failures)
            raise UnknownNameError(f"no {self.kind} named '{name}': {hint} (see: avsep list {self.key}){broken}")
        return self._components[name]

    def create(self, name: str, params: Mapping[str, Any] | None = None, **wiring: Any) -> _C:
        """Build a component from people's ``params`` and the composer's ``wiring``."""
        spec = self.get(name)
        params = dict(params or {})
        spec.check(params)
        takes = {p.name for p in spec.parameters if p.wiring}
        make: Callable[..., _C] = spec.factory
        try:
            return make(**params, **{k: v for k, v in wiring.items() if k in takes})
        except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:  # also torch's own
            raise ConfigError(f"{self.kind} '{name}': {error}") from error


# What a mask decoder is given of the encoders beside it, and of the classes; people never set these by hand.
_DECODER_WIRING = frozenset(
    {"num_classes", "mask_channels", "latent_channels", "skip_channels", "object_dim", "motion_dim", "log_rows"}
)

AUDIO_ENCODERS: Registry[AudioEncoder] = Registry(
    "audio encoder", "audio_encoders", base="avsep.encoders.base.AudioEncoder"
)
# A visual encoder that can serve as either is given which of the two it is.
VISUAL_ENCODERS: Registry[VisualEncoder] = Registry(
    "visual encoder", "visual_encoders", frozenset({"role"}), base="avsep.encoders.base.VisualEncoder"
)
MASK_DECODERS: Registry[MaskDecoder] = Registry(
    "mask decoder", "mask_decoders", _DECODER_WIRING, base="avsep.decoders.base.MaskDecoder"
)
STRATEGIES: Registry[Strategy] = Registry("strategy", "strategies", base="avsep.strategies.base.Strategy")
MEMORIES: Registry[MemoryPolicy] = Registry("memory policy", "memories", base="avsep.memory.base.MemoryPolicy")
MIXERS: Registry[Mixer] = Registry("mixer", "mixers", base="avsep.mixers.base.Mixer")

# An adapter is given the places that a component declares.
ADAPTERS: Registry[Adapter] = Registry("adapter", "adapters", frozenset({"places"}), base="avsep.adapters.base.Adapter")

REGISTRIES: dict[str, Registry[Any]] = {
    r.key: r for r in (AUDIO_ENCODERS, VISUAL_ENCODERS, MASK_DECODERS, ADAPTERS, STRATEGIES, MEMORIES, MIXERS)
}

_BUILTIN = (
    "avsep.encoders",
    "avsep.adapters",
    "avsep.decoders",
    "avsep.strategies",
    "avsep.memory",
    "avsep.mixers",
)
_loaded = False
_failures: list[str] = []  # what other packages' components failed with, for who misses one of them


def load_components() -> None:
    """Import the built-in components and those of installed packages, once. A broken third-party one only warns."""
    global _loaded
    if _loaded:
        return
    _loaded = True  # before the imports, which may look names up themselves
    try:
        for module in _BUILTIN:
            importlib.import_module(module)
    except BaseException:
        _loaded = False
        raise
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry.load()
            if callable(loaded) and not inspect.isclass(loaded):
                loaded()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            failure = f"components of '{entry.name}' ({entry.value}) could not be loaded: {reason}"
            _failures.append(failure)
            warnings.warn(failure, stacklevel=2)

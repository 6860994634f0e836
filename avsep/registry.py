"""Components by name: audio and visual encoders, mask decoders, strategies and memory policies.

A component is a plain class or function with keyword-only parameters, each typed and with a default from its source::

    @MASK_DECODERS.register("query_transformer", source="Chen et al., iQuery, CVPR 2023")
    class QueryTransformer(nn.Module): ...

Packages outside avsep add components through the entry-point group ``avsep.components``: each entry point names a
module (or a callable without arguments) whose import registers what it brings.
"""

from __future__ import annotations

import importlib
import inspect
import numbers
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

from avsep.errors import ConfigError, UnknownNameError, near_matches

__all__ = [
    "AUDIO_ENCODERS",
    "MASK_DECODERS",
    "MEMORIES",
    "REGISTRIES",
    "STRATEGIES",
    "VISUAL_ENCODERS",
    "ComponentSpec",
    "Parameter",
    "Registry",
]

ENTRY_POINT_GROUP = "avsep.components"
_T = TypeVar("_T", bound=Callable[..., Any])
_REQUIRED = inspect.Parameter.empty


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
class ComponentSpec:
    """What the registry knows of a component before anything is built.

    ``needs`` and ``provides`` are names of tensors (``mask_features``, ``latent``, ``skips``, ``bottleneck``,
    ``spectrogram``, ``object``, ``motion``) that the composer checks against each other. ``bottleneck`` stands for the
    latent of an encoder that ends there, and leaves the way up to the decoder.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    summary: str
    source: str
    parameters: tuple[Parameter, ...]
    package: str
    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()

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


class Registry:
    """Names to component factories, of one kind."""

    def __init__(self, kind: str, key: str, wiring: frozenset[str] = frozenset()) -> None:
        self.kind = kind  # "mask decoder"
        self.key = key  # "mask_decoders", as in `avsep list mask_decoders`
        self._wiring = wiring
        self._components: dict[str, ComponentSpec] = {}

    def register(self, name: str, *, source: str = "") -> Callable[[_T], _T]:
        """Decorator. Raises ``ValueError`` when the name is taken: a second component never replaces a first."""

        def decorate(factory: _T) -> _T:
            if name in self._components:
                raise ValueError(f"{self.kind} '{name}' is registered already, by {self._components[name].package}")
            summary = _first_line(factory)
            if not summary:
                raise ValueError(f"{self.kind} '{name}' needs a docstring: its first line is what `avsep list` shows")
            self._components[name] = ComponentSpec(
                kind=self.kind,
                name=name,
                factory=factory,
                summary=summary,
                source=source,
                parameters=_parameters(factory, self._wiring),
                package=factory.__module__.partition(".")[0],
                needs=frozenset(getattr(factory, "needs", ())),
                provides=frozenset(getattr(factory, "provides", ())),
            )
            return factory

        return decorate

    def names(self) -> list[str]:
        load_components()
        return sorted(self._components)

    def __iter__(self) -> Iterator[ComponentSpec]:
        return iter([self._components[name] for name in self.names()])

    def __contains__(self, name: object) -> bool:
        load_components()
        return name in self._components

    def get(self, name: str) -> ComponentSpec:
        """The component's spec; an unknown name raises with the near matches."""
        load_components()
        if name not in self._components:
            raise UnknownNameError(
                f"no {self.kind} named '{name}': {near_matches(name, self._components)} (see: avsep list {self.key})"
            )
        return self._components[name]

    def create(self, name: str, params: dict[str, Any] | None = None, **wiring: Any) -> Any:
        """Build a component from people's ``params`` and the composer's ``wiring``."""
        spec = self.get(name)
        params = dict(params or {})
        spec.check(params)
        takes = {p.name for p in spec.parameters if p.wiring}
        try:
            return spec.factory(**params, **{k: v for k, v in wiring.items() if k in takes})
        except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:  # also torch's own
            raise ConfigError(f"{self.kind} '{name}': {error}") from error


# What a mask decoder is told of the encoders beside it, and of the classes; people never set these by hand.
_DECODER_WIRING = frozenset(
    {"num_classes", "mask_channels", "latent_channels", "skip_channels", "object_dim", "motion_dim"}
)

AUDIO_ENCODERS = Registry("audio encoder", "audio_encoders")
# A visual encoder that can serve as either is told which of the two it is.
VISUAL_ENCODERS = Registry("visual encoder", "visual_encoders", wiring=frozenset({"role"}))
MASK_DECODERS = Registry("mask decoder", "mask_decoders", wiring=_DECODER_WIRING)
STRATEGIES = Registry("strategy", "strategies")
MEMORIES = Registry("memory policy", "memories")

REGISTRIES = {r.key: r for r in (AUDIO_ENCODERS, VISUAL_ENCODERS, MASK_DECODERS, STRATEGIES, MEMORIES)}

_BUILTIN = ("avsep.encoders", "avsep.decoders", "avsep.strategies", "avsep.memory")
_loaded = False


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
            warnings.warn(
                f"components of '{entry.name}' ({entry.value}) could not be loaded: {type(error).__name__}: {error}",
                stacklevel=2,
            )

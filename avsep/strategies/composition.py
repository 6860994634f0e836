"""Several strategies as one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avsep.errors import CheckpointError, ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext, check_contract

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator
    from avsep.spec import ComponentRef

__all__ = ["Composition", "build_strategy"]


def build_strategy(refs: ComponentRef | Sequence[ComponentRef]) -> Strategy:
    """The strategy that a run's spec names; a list of several becomes a :class:`Composition`.

    Raises:
        UnknownNameError, ConfigError: a name or parameter is wrong, a strategy is named twice, or one was written for
            an earlier version.
    """
    made: dict[str, Strategy] = {}
    for ref in refs if isinstance(refs, Sequence) else (refs,):
        if ref.name in made:
            raise ConfigError(f"strategy '{ref.name}' is named twice: name each one once")
        made[ref.name] = STRATEGIES.create(ref.name, ref.params)
        check_contract(made[ref.name], ref.name)
    if not made:
        raise ConfigError("no strategy: name at least one (see: avsep list strategies)")
    return next(iter(made.values())) if len(made) == 1 else Composition(made)


class Composition(Strategy):
    """Strategies side by side: their terms merge by name, and each keeps its own state.

    Each is called in the order of ``parts``, but when a task begins or ends those that change the weights come first
    (``sets_weights``), so that the others see the weights that are trained, or stored. The term ``separation`` enters
    once: that of the one strategy that changes it (``changes_separation``), else the separation loss. Any other name
    that two of them give is refused.
    """

    def __init__(self, parts: Mapping[str, Strategy]) -> None:
        self.parts = dict(parts)
        members = self.parts.values()
        self.needs_teacher = any(s.needs_teacher for s in members)
        self.uses_all_data = any(s.uses_all_data for s in members)
        self.memory_only = any(s.memory_only for s in members)
        if self.uses_all_data and self.memory_only:
            names = ", ".join(self.parts)
            raise ConfigError(f"{names}: one trains on all data, another on the memory alone; they cannot be combined")
        self.restarts = any(s.restarts for s in members)
        self.sets_weights = tuple({hook: None for s in members for hook in s.sets_weights})
        self.freezes = any(s.freezes for s in members)
        self.unlearns = any(s.unlearns for s in members)
        freezing = [name for name, s in self.parts.items() if s.freezes]
        losing = [name for name, s in self.parts.items() if s.restarts or s.unlearns]
        if freezing and losing:
            raise ConfigError(
                f"{freezing[0]} freezes what was learned, and {losing[0]} begins every task with less of it, which "
                "could not be learned again: they cannot be combined"
            )
        self.fits_weights = any(s.fits_weights for s in members)
        fitting = [name for name, s in self.parts.items() if s.fits_weights]
        # an average that is stored in the place of the weights is another set of weights too
        moving = [
            name
            for name, s in self.parts.items()
            if "after_task" in s.sets_weights or type(s).eval_weights is not Strategy.eval_weights
        ]
        if fitting and moving:
            raise ConfigError(
                f"what {fitting[0]} learns fits the weights that training ends with, and {moving[0]} stores others: "
                "they cannot be combined"
            )
        self.needs_memory = any(s.needs_memory for s in members)
        self.across_ranks = all(s.across_ranks for s in members)
        changing = [name for name, s in self.parts.items() if s.changes_separation]
        if len(changing) > 1:
            raise ConfigError(f"{' and '.join(changing)} each change the separation loss: they cannot be combined")
        self.changes_separation = bool(changing)
        with_terms = [name for name, s in self.parts.items() if type(s).loss is not Strategy.loss]
        self._with_terms = with_terms or [next(iter(self.parts))]
        self._separation = changing[0] if changing else self._with_terms[0]

    def check(self, separator: Separator) -> None:
        for strategy in self.parts.values():
            strategy.check(separator)

    def check_classes(self, names: Sequence[str]) -> None:
        for strategy in self.parts.values():
            strategy.check_classes(names)

    def first_task(self) -> dict[str, Any] | None:
        merged: dict[str, Any] = {}
        for strategy in self.parts.values():
            facts = strategy.first_task()
            if facts is None or merged.keys() & facts.keys():
                return None
            merged |= facts
        return merged

    def _setting_first(self, hook: str) -> list[Strategy]:
        """Those that change the weights in ``begin_task`` or ``after_task`` before all others."""
        return sorted(self.parts.values(), key=lambda strategy: hook not in strategy.sets_weights)

    def begin_task(self, ctx: TaskContext) -> None:
        for strategy in self._setting_first("begin_task"):
            strategy.begin_task(ctx)

    def learning_rate(self, name: str) -> float:
        return math.prod(strategy.learning_rate(name) for strategy in self.parts.values())

    def weight_decay(self, name: str) -> float:
        return math.prod(strategy.weight_decay(name) for strategy in self.parts.values())

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        owners: dict[str, str] = {}
        for name in self._with_terms:
            for term, value in self.parts[name].loss(step).items():
                if term == "separation" and name != self._separation:
                    continue
                if term in terms:
                    raise ConfigError(
                        f"strategies '{owners[term]}' and '{name}' both give a term '{term}': leave one of them out"
                    )
                terms[term], owners[term] = value, name
        return terms

    def after_backward(self, step: Step) -> None:
        for strategy in self.parts.values():
            strategy.after_backward(step)

    def after_step(self, step: Step) -> None:
        for strategy in self.parts.values():
            strategy.after_step(step)

    @contextlib.contextmanager
    def train_weights(self, student: Separator) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for strategy in self.parts.values():
                stack.enter_context(strategy.train_weights(student))
            yield

    @contextlib.contextmanager
    def eval_weights(self, student: Separator) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for strategy in self.parts.values():
                stack.enter_context(strategy.eval_weights(student))
            yield

    def after_task(self, ctx: TaskContext) -> None:
        for strategy in self._setting_first("after_task"):
            strategy.after_task(ctx)

    @property
    def keeps_state(self) -> bool:
        return any(strategy.keeps_state for strategy in self.parts.values())

    def state_dict(self) -> dict[str, Any]:
        states = {name: strategy.state_dict() for name, strategy in self.parts.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if unknown := sorted(state.keys() - self.parts.keys()):
            raise CheckpointError(
                f"the checkpoint has a state of strategy '{unknown[0]}', and the run combines {', '.join(self.parts)}"
            )
        for name, strategy in self.parts.items():
            strategy.load_state_dict(state.get(name, {}))

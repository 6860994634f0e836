"""The plainest anchor: every weight is held where the previous task left it, all alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.anchor import Anchor
from avsep.strategies.base import TaskContext

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["L2Anchor"]


@STRATEGIES.register("l2_anchor", source="Smith et al., A Closer Look at Rehearsal-Free Continual Learning, CVPRW 2023")
class L2Anchor(Anchor):
    """Quadratic pull of every weight to its value after the previous task, all alike.

    L = L_sep + (``weight``/2) sum_i (theta_i - theta*_i)^2

    ``scope=attention`` holds the weights of attention layers alone, where the source found it to work best. The penalty
    is a sum over all of these weights: try ``weight`` from 1e-5 to 1e-2. Anchored tensors have no weight decay.
    """

    differs = "The source starts from pre-trained transformers, and nothing here is pre-trained but frozen encoders."

    def __init__(self, *, weight: float = 1e-3, scope: Literal["all", "attention"] = "all") -> None:
        super().__init__(weight)
        if scope not in ("all", "attention"):
            raise ValueError(f"scope must be 'all' or 'attention', got {scope!r}")
        self.scope = scope
        self._anchored: tuple[str, ...] = ()

    def check(self, separator: Separator) -> None:
        if not self._in_scope(separator):
            raise ConfigError(
                "strategy 'l2_anchor' with scope=attention holds attention layers, and mask decoder "
                f"'{separator.spec.mask_decoder.name}' has none: use scope=all"
            )

    def _in_scope(self, separator: Separator) -> tuple[str, ...]:
        names = (name for name, p in separator.named_parameters() if p.requires_grad)
        return tuple(name for name in names if self.scope == "all" or "attention" in name)

    def begin_task(self, ctx: TaskContext) -> None:
        known = () if ctx.teacher is None else {name for name, _ in ctx.teacher.named_parameters()}
        self._anchored = tuple(name for name in self._in_scope(ctx.student) if name in known)
        self._omega = {}

    def omega(self, student: Separator) -> Mapping[str, Tensor | None]:
        return dict.fromkeys(self._anchored)

    def weight_decay(self, name: str) -> float:
        return 0.0 if self.weight > 0 and name in self._anchored else 1.0

    def after_task(self, ctx: TaskContext) -> None:
        """Nothing is measured, and nothing kept."""

    @property
    def keeps_state(self) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

"""First-session adaptation: the body learns from the first task alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import NewRows

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["FirstSession"]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@STRATEGIES.register("first_session", source="Panos et al., First Session Adaptation, ICCV 2023")
class FirstSession(Strategy):
    """Freeze the body after the first task; later ones train the new classes' rows and a small shared part.

    That part is, by ``adapt``,

    - ``head``: the layers that turn a query's state into its mask; of a mask decoder without queries all of it;
    - ``film``: scale and shift of every normalisation layer, and the new rows with them.

    All else keeps its values to the last bit, weight decay and running statistics included. What is trained is shared,
    so old classes can be forgotten by it. The new rows alone are ``query_extension``; scales and shifts of each task's
    own, which forget nothing, are ``task_adapters`` with the adapter ``film``.
    """

    differs = (
        "The paper's later sessions fit a linear discriminant to class scores in closed form, which masks have no "
        "counterpart of: a small part is trained. Nothing is pre-trained before the first session but frozen encoders."
    )
    across_ranks = True
    freezes = True

    def __init__(self, *, adapt: Literal["head", "film"] = "head") -> None:
        if adapt not in ("head", "film"):
            raise ValueError(f"adapt must be 'head' or 'film', got {adapt!r}")
        self.adapt = adapt
        self._rows: list[NewRows] = []

    def check(self, separator: Separator) -> None:
        if not any(p.requires_grad for p in self._adapted(separator)):
            way_out = "use another strategy" if self.adapt == "head" else "set adapt=head"
            raise ConfigError(
                f"strategy 'first_session' with adapt={self.adapt} finds nothing to train in mask decoder "
                f"'{separator.spec.mask_decoder.name}' and its encoders: {way_out}"
            )

    def _adapted(self, separator: Separator) -> Iterator[nn.Parameter]:
        decoder = separator.mask_decoder
        if self.adapt == "head":
            yield from (decoder.get_submodule(decoder.mask_head) if decoder.mask_head else decoder).parameters()
            return
        for module in separator.modules():
            if isinstance(module, _NORMS):
                yield from module.parameters()

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._rows = []
        if ctx.task.index == 0:
            return
        adapted = [p for p in self._adapted(ctx.student) if p.requires_grad]  # not of a frozen encoder
        learning = {name for name, p in ctx.student.named_parameters() if p.requires_grad}
        ctx.student.freeze()
        for parameter in adapted:
            parameter.requires_grad_(True)
        for name, parameter in ctx.student.named_parameters():
            old = ctx.old_shapes.get(name)
            if name in learning and old is not None and old != tuple(parameter.shape):
                self._rows.append(NewRows(parameter, old[0]))

    def after_step(self, step: Step) -> None:
        for rows in self._rows:
            rows.restore()

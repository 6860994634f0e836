"""Task adapters: every task has small weights of its own, and nothing that an earlier one learned is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avsep.adapters import FeatureAdapter
from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import NewRows

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["TaskAdapters"]


@STRATEGIES.register(
    "task_adapters", source="this library, with the adapters of Hu et al., LoRA, ICLR 2022; see low_rank"
)
class TaskAdapters(Strategy):
    """From the second task on train the newest adapter and the new classes' queries alone; forgets nothing.

    Needs a separator with an adapter (``separator.adapter=low_rank``, or ``film``). All else keeps its values to the
    last bit, weight decay and running statistics included, and queries of later tasks are hidden from a source
    (:class:`~avsep.separator.adapted.AdaptedDecoder`). So a source of an old class gets, in the same batch, what it got
    when its task ended, to the last bit. What is not promised: that new classes are learned as well as by training
    everything, nor that old ones are separated better from instruments that came later.
    """

    differs = (
        "LoRA adapts one pre-trained network to one task; here each task has an adapter, found by the class asked for."
    )

    across_ranks = True
    freezes = True

    def __init__(self) -> None:
        self._rows: NewRows | None = None

    def check(self, separator: Separator) -> None:
        found = separator.adapters()
        if found and all(isinstance(adapter, FeatureAdapter) for adapter in found):
            raise ConfigError(
                "strategy 'task_adapters' trains adapters that change weights, and this separator's changes features: "
                "use drift_compensation, or another adapter, such as separator.adapter=low_rank"
            )
        if not found:
            raise ConfigError(
                "strategy 'task_adapters' trains adapters, and the separator has none: add one, such as "
                "separator.adapter=low_rank (see: avsep list adapters)"
            )

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._rows = None
        if ctx.task.index == 0:
            return
        decoder = ctx.student.mask_decoder
        queries = decoder.get_parameter(decoder.query_parameter) if decoder.query_parameter else None
        learn = queries is not None and queries.requires_grad  # not where a method beside this one holds them
        ctx.student.freeze()
        for adapter in ctx.student.adapters():
            for parameter in adapter.newest():
                parameter.requires_grad_(True)
        if queries is not None and learn:
            self._rows = NewRows(queries, len(ctx.task.old))

    def after_step(self, step: Step) -> None:
        if self._rows is not None:
            self._rows.restore()

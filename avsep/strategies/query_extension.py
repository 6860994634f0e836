"""Query extension: new classes get new queries, and nothing else learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import NewRows, check_queries

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["QueryExtension"]


@STRATEGIES.register("query_extension", source="Chen et al., iQuery, CVPR 2023: extending the queries to new classes")
class QueryExtension(Strategy):
    """From the second task on train the new classes' queries alone, with the separation loss.

    Everything else keeps its values to the last bit, weight decay and running statistics included: what was learned
    cannot be forgotten, since only the queries of new classes, which the old ones attend to, are new. ``head=True``
    also trains the layers that turn a query's state into its mask; those are shared, so old masks then change.
    """

    differs = "The paper extends queries once, from one set of instruments to another; here every task does."

    across_ranks = True
    freezes = True

    def __init__(self, *, head: bool = False) -> None:
        self.head = head
        self._rows: NewRows | None = None

    def check(self, separator: Separator) -> None:
        check_queries(separator, "query_extension", "trains the queries of new classes")
        decoder, name = separator.mask_decoder, separator.spec.mask_decoder.name
        if self.head and not decoder.mask_head:
            raise ConfigError(
                f"strategy 'query_extension' with head=true trains the decoder's head, and mask decoder '{name}' has "
                "none: leave head out"
            )

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._rows = None
        if ctx.task.index == 0:
            return
        decoder = ctx.student.mask_decoder
        queries = decoder.get_parameter(decoder.query_parameter)
        learn = queries.requires_grad  # not where a method beside this one holds them
        ctx.student.freeze()
        if self.head:
            decoder.get_submodule(decoder.mask_head).requires_grad_(True)
        if learn:
            self._rows = NewRows(queries, len(ctx.task.old))

    def after_step(self, step: Step) -> None:
        if self._rows is not None:
            self._rows.restore()

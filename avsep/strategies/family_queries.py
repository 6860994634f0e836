"""Family queries: the query of a new instrument begins where that of its family is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy, TaskContext
from avsep.strategies.teaching import check_queries

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["FamilyQueries"]


@STRATEGIES.register(
    "family_queries",
    source="after Lee et al., Online Continual Learning on Hierarchical Label Expansion, ICCV 2023",
    example={"families": {"ding": ["hum", "whirr"]}},
)
class FamilyQueries(Strategy):
    """Start the query of every new class from that of its family, learned before; combine it with any method.

    ``families``: by the name of a family, which is a class too, the classes that are of it. ``avsep data families``
    makes a store with such classes. A class of no family, or of one that comes with it or later, starts as ever.
    Nothing else of the training changes.
    """

    across_ranks = True
    sets_weights = ("begin_task",)
    differs = (
        "The paper's classifier takes the family's class for a pseudo-label of what is not labelled finer, and chooses "
        "what it keeps by it. Here the class is asked for; what is left is where a query starts."
    )

    def __init__(self, *, families: Mapping[str, Sequence[str]]) -> None:
        self._family: dict[str, str] = {}
        for family, members in families.items():
            if isinstance(members, str):
                raise ValueError(f"families: the classes of '{family}' must be a list of names, got {members!r}")
            for name in members:
                if name in self._family:
                    raise ValueError(f"families: class '{name}' is in two, '{self._family[name]}' and '{family}'")
                self._family[name] = family
        if not self._family:
            raise ValueError("families must name at least one family with its classes")

    def check(self, separator: Separator) -> None:
        check_queries(separator, "family_queries", "starts the queries of classes")

    def check_classes(self, names: Sequence[str]) -> None:
        for name, family in self._family.items():
            for missing in (one for one in (family, name) if one not in names):
                raise ConfigError(
                    f"strategy 'family_queries' has class '{name}' in family '{family}', and '{missing}' is no class "
                    "of any task: correct families"
                )

    def first_task(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def begin_task(self, ctx: TaskContext) -> None:
        if ctx.task.index == 0 or ctx.resumed:
            return
        decoder, old = ctx.student.mask_decoder, ctx.task.old
        queries = decoder.get_parameter(decoder.query_parameter)
        for number, name in enumerate(ctx.task.seen):
            if name in ctx.task.classes and self._family.get(name) in old:
                queries[number] = queries[ctx.task.seen.index(self._family[name])]

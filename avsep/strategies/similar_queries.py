"""Similar queries: the query of a new class begins near those of old classes that look like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy, TaskContext
from avsep.strategies.teaching import check_objects, check_queries

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from avsep.separator import Separator
    from avsep.types import Batch

__all__ = ["SimilarQueries", "class_means", "similar_query"]

_SHARPNESS = 16.0  # of the softmax over cosines, as released


@STRATEGIES.register(
    "similar_queries",
    source="Wang et al., TEEN: Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration, "
    "NeurIPS 2023",
    example={"mixtures": 2},
)
class SimilarQueries(Strategy):
    """Start the queries of new classes from those of old classes that look alike; combine it with any method.

    With the mean object features m of the classes, w_c = softmax_c(16 cos(m_new, m_c)) over the old classes c and a
    fresh query n,

        q_new = |n| unit((1 - ``blend``) unit(n) + ``blend`` unit(sum_c w_c unit(q_c))).

    The means of a task's classes are taken over ``mixtures`` random training mixtures: of new classes when the task
    begins, of those it has learned when it ends. Nothing else of the training changes.
    """

    across_ranks = True
    sets_weights = ("begin_task",)
    keeps = "the mean object features of every class in half precision (1,024 bytes a class of 512 features)"
    differs = (
        "TEEN moves the prototypes that a classifier compares features with; here the same blend of old classes is "
        "only where a query's training starts."
    )

    def __init__(self, *, blend: float = 0.1, mixtures: int = 128) -> None:
        if not 0 <= blend <= 1:
            raise ValueError(f"blend must be between 0 and 1, got {blend}")
        if mixtures < 1:
            raise ValueError(f"mixtures must be at least 1, got {mixtures}")
        self.blend = blend
        self.mixtures = mixtures
        self._means: Tensor | None = None  # [Q, D] of the classes learned

    def check(self, separator: Separator) -> None:
        check_queries(separator, "similar_queries", "starts the queries of new classes")
        check_objects(separator, "similar_queries", "compares object features")

    def first_task(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def begin_task(self, ctx: TaskContext) -> None:
        if self._means is None or ctx.resumed:
            return
        queries = ctx.student.mask_decoder.get_parameter(ctx.student.mask_decoder.query_parameter)
        old = len(self._means)
        new = class_means(ctx.student, ctx.data.batches(self.mixtures, batch_size=8), len(queries))[old:]
        known = queries[:old].clone()
        for number, mean in enumerate(new, old):
            if mean.isfinite().all():  # else no mixture had the class
                queries[number] = similar_query(queries[number], mean, known, self._means, self.blend)
        ctx.ranks.broadcast_tensors({"queries": queries})

    def after_task(self, ctx: TaskContext) -> None:
        if ctx.is_last:
            self._means = None
            return
        found = class_means(ctx.student, ctx.data.batches(self.mixtures, batch_size=8), len(ctx.task.seen))
        found = found.nan_to_num()  # a class that no mixture had is like none
        if self._means is not None:
            found[: len(self._means)] = self._means.to(found)
        self._means = found.half()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._means is None else {"means": self._means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means = state.get("means")


def similar_query(fresh: Tensor, mean: Tensor, queries: Tensor, means: Tensor, blend: float) -> Tensor:
    """The first query [D] of a class with the ``mean`` object features [E], from a ``fresh`` one [D] and from the
    ``queries`` [Q, D] of classes with the ``means`` [Q, E]."""
    likeness = F.cosine_similarity(mean.float(), means.to(mean.device).float(), dim=1)  # [Q]
    mix = F.normalize((_SHARPNESS * likeness).softmax(dim=0) @ F.normalize(queries, dim=1), dim=0)
    made: Tensor = fresh.norm() * F.normalize((1 - blend) * F.normalize(fresh, dim=0) + blend * mix, dim=0)
    return made


@torch.no_grad()
def class_means(separator: Separator, batches: Iterable[Batch], num_classes: int) -> Tensor:
    """The mean object features of the seen sources of each class, [num_classes, E]; NaN where there are none."""
    training = separator.training
    separator.eval()
    total, count = None, None
    for batch in batches:
        features = separator.encode_visual(batch.visual).object  # [B, N, E]
        assert features is not None
        seen = torch.ones_like(batch.class_ids, dtype=torch.bool) if batch.visual.seen is None else batch.visual.seen
        if total is None or count is None:
            total = torch.zeros(num_classes, features.shape[2], device=features.device)
            count = torch.zeros(num_classes, device=features.device)
        ids = batch.class_ids[seen]
        total.index_add_(0, ids, features[seen].float())
        count.index_add_(0, ids, torch.ones(len(ids), device=features.device))
    separator.train(training)
    assert total is not None
    assert count is not None
    return total / count[:, None]

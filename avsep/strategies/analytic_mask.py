"""Analytic masks: after the first task nothing is learned, and the masks of classes are solved for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avsep.decoders.ridge_filters import RidgeFilters
from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import NewRows

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["AnalyticMask"]


@STRATEGIES.register(
    "analytic_mask",
    source="after Zhuang et al., G-ACIL: Analytic Learning for Exemplar-Free Generalized Class Incremental Learning, "
    "2024",
    example={"mixtures": 2},
)
class AnalyticMask(Strategy):
    """Freeze everything after the first task, and solve for one filter a class; without a memory forgets nothing.

    Needs the mask decoder ``ridge_filters``. The first task is trained as usual. At the end of each task its
    ``mixtures`` random training mixtures are added to the sums of the classes in them, those of exemplars too, and all
    classes are solved for, with the ridge ``strength`` times the mean of the diagonal. As the features are frozen, the
    outcome is that of all mixtures at once, in whatever order the tasks came. Without a memory the filter of an old
    class stays as it is to the last bit; with one it changes with the exemplars that are added.

    From the second task on, training steps move only vectors that the solution then replaces: one epoch will do.
    """

    across_ranks = True
    sets_weights = ("after_task",)
    freezes = True
    keeps = "the sums of every class, in the separator's buffers (4,224 bytes a class of 32 mask features)"
    differs = RidgeFilters.differs

    def __init__(self, *, strength: float = 0.1, mixtures: int = 1000) -> None:
        if not strength > 0:
            raise ValueError(f"strength must be above 0, got {strength}")
        if mixtures < 1:
            raise ValueError(f"mixtures must be at least 1, got {mixtures}")
        self.strength = strength
        self.mixtures = mixtures
        self._rows: NewRows | None = None

    def check(self, separator: Separator) -> None:
        if not isinstance(separator.mask_decoder, RidgeFilters):
            raise ConfigError(
                f"strategy 'analytic_mask' solves for masks of the mask decoder 'ridge_filters', not of "
                f"'{separator.spec.mask_decoder.name}': use that one, with an audio encoder that gives mask features"
            )

    def first_task(self) -> dict[str, Any]:
        return {"analytic_mask": [self.strength, self.mixtures]}

    def begin_task(self, ctx: TaskContext) -> None:
        self._rows = None
        if ctx.task.index == 0:
            return
        ctx.student.freeze()
        decoder = ctx.student.mask_decoder
        assert isinstance(decoder, RidgeFilters)
        self._rows = NewRows(decoder.class_vectors, len(ctx.task.old))

    def after_step(self, step: Step) -> None:
        if self._rows is not None:
            self._rows.restore()

    def after_task(self, ctx: TaskContext) -> None:
        student = ctx.student
        decoder = student.mask_decoder
        assert isinstance(decoder, RidgeFilters)
        if ctx.task.index == 0:
            decoder.forget()  # a first task that was taken from another run has been solved for there
        student.eval()
        for batch in ctx.data.batches(self.mixtures, batch_size=8):
            found = student.predict(batch)
            assert found.audio.mask_features is not None
            decoder.add(found.audio.mask_features, found.spectrograms.weight, found.spectrograms.ratio, batch.class_ids)
        decoder.solve(self.strength)

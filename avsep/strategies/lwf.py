"""Learning without Forgetting, with masks in place of class scores."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch

from avsep.errors import CheckpointError
from avsep.losses import mask_distillation, mask_losses
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import check_weights

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["LwF"]


@STRATEGIES.register(
    "lwf", source="Li and Hoiem, Learning without Forgetting, ECCV 2016; a row of ContAV-Sep's Table 1"
)
class LwF(Strategy):
    """Distil the previous task's masks on all mixtures of the current one.

    L = L_sep + ``weight_mask`` mean w |M - M'| over all sources and pixels, M the student's masks, M' the teacher's and
    w the weight of L_sep. The original distils the old head's class scores, softened by a temperature; masks need none.

    A mask decoder with a query for every class gives the teacher none for a new class. By ``variant``,

    - ``old_query``: the source is queried as an old class, drawn uniformly, in both models, and that mask is distilled
      (what an old head answers to new data; a second decoder pass over the same audio and visual features). Sources
      of old classes are queried as their own;
    - ``grown_teacher``: the teacher gets the new queries that the student begins the task with, and the masks of the
      sources' own classes are distilled.

    Where masks do not depend on the class (``class_agnostic`` decoders) they are distilled as they are. The draws come
    from PyTorch's global generator, whose state the learner sets from (seed, task) and keeps in its checkpoints.
    """

    differs = (
        "Masks of the previous task's separator take the place of class scores, asked with the classes that it knows."
    )

    across_ranks = True

    def __init__(
        self, *, weight_mask: float = 0.3, variant: Literal["old_query", "grown_teacher"] = "old_query"
    ) -> None:
        check_weights(weight_mask=weight_mask)
        chosen: str = {"old_slot": "old_query"}.get(variant, variant)  # its name in the specs of version 0.1
        if chosen not in ("old_query", "grown_teacher"):
            raise ValueError(f"variant must be 'old_query' or 'grown_teacher', got {variant!r}")
        self.weight_mask = weight_mask
        self.variant = chosen
        self.needs_teacher = weight_mask > 0
        self._new_rows: dict[str, Tensor] = {}  # the student's tensors that growth changed, as they were after it
        self._grown: Separator | None = None

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._grown = None
        if ctx.resumed:  # the rows of the task's beginning are in the state
            return
        self._new_rows = {}
        if ctx.teacher is not None and self.variant == "grown_teacher" and not _class_agnostic(ctx.student):
            self._new_rows = {
                name: value.detach().clone()
                for name, value in ctx.student.state_dict().items()
                if ctx.old_shapes.get(name) != tuple(value.shape)
            }

    def loss(self, step: Step) -> dict[str, Tensor]:
        student, teacher = step.student, step.teacher
        if teacher is None or not self.needs_teacher:
            return super().loss(step)
        class_ids = step.batch.class_ids
        agnostic = _class_agnostic(student)
        if agnostic or self.variant == "grown_teacher":
            if agnostic:
                teacher_output = step.teacher_output()
            else:
                teacher_output = step.teacher_output(class_ids, teacher=self._with_new_queries(teacher, student))
            losses = mask_losses(step.output, step.spectrograms, teacher_output=teacher_output.output)
            return {"separation": losses.separation, "mask": self.weight_mask * losses.distillation}
        whole = (step.ranks.world * len(class_ids), class_ids.shape[1])  # every rank draws for all
        drawn = step.ranks.part(torch.randint(step.num_old, whole)).to(class_ids.device)
        queried = class_ids.where(step.is_old, drawn)
        output = student.decode(step.audio, step.visual, queried)
        distillation = mask_distillation(output, step.teacher_output(queried).output, step.spectrograms)
        return {"separation": step.separation, "mask": self.weight_mask * distillation}

    def _with_new_queries(self, teacher: Separator, student: Separator) -> Separator:
        """A copy of the teacher with the queries that the student began the task with; made once a task and resume."""
        if self._grown is None:
            grown = copy.deepcopy(teacher)
            with torch.random.fork_rng(devices=[]):  # the rows drawn here are replaced: they take nothing from the run
                grown.grow(student.num_classes, student.classes)
            grown.load_state_dict({**grown.state_dict(), **self._new_rows})
            self._grown = grown.requires_grad_(False).eval()
        return self._grown

    def after_task(self, ctx: TaskContext) -> None:
        self._new_rows, self._grown = {}, None

    def state_dict(self) -> dict[str, Any]:
        return dict(self._new_rows)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self.variant != "grown_teacher":
            raise CheckpointError(
                f"lwf with variant 'old_query' keeps no state, but the checkpoint has {sorted(state)}"
            )
        self._new_rows, self._grown = dict(state), None


def _class_agnostic(separator: Separator) -> bool:
    return separator.mask_decoder.class_agnostic

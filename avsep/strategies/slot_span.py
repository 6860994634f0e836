"""Slot span: what old classes would answer to a new mixture is kept, by asking for classes that are not in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from avsep.errors import ConfigError
from avsep.losses import mask_distillation
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import check_objects, check_weights
from avsep.types import VisualFeatures

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator
    from avsep.types import AudioFeatures, Batch, MaskOutput, Spectrograms

__all__ = ["SlotSpan", "class_statistics"]

_CONDITIONINGS = ("own", "gaussian", "translated", "neighbour")


@STRATEGIES.register(
    "slot_span",
    source="this library; conditions after Ding et al., Don't Stop Learning (VR-LwF), 2022; Petit et al., FeTrIL, WACV "
    "2023; Malepathirana et al., NAPA-VQ, ICCV 2023",
    example={"mixtures": 16},
)
class SlotSpan(Strategy):
    """Distil the masks of old classes that are not in the mixture; needs no exemplars.

    L = L_sep + ``weight`` mean w |M_c - M'_c|: for every mixture ``classes`` different old classes c are drawn (all if
    there are fewer), student and teacher are both asked for each, on one condition (object o_c, motion m_c), and the
    mean is over mixtures, classes and pixels. Where logits are a linear map of the mask features F, with weights that
    depend on class and condition, this holds F along what old classes read of it and leaves it free elsewhere;
    distilling F itself would hold all of it. By ``conditioning``,

    - ``own``: the features of the mixture's own sources in turn, by each model's own encoders (as LwF);
    - ``gaussian``: o_c is drawn around the class's mean with its standard deviation, m_c is the mean motion;
    - ``translated``: those of the mixture's own sources in turn, less the mean of their class, plus that of c (FeTrIL);
    - ``neighbour``: g times the means of c plus 1 - g times those of the old class whose mean object is nearest, g
      uniform between 1/2 and 1 (NAPA-VQ).

    All but ``own`` give both models the same condition. The means are over the sources of a class in ``mixtures``
    training mixtures, by the separator that its task left; where the visual encoders learn, those of earlier classes
    stay as they were. Decoders are asked in evaluation mode, so that no running statistics see what is not there.
    Draws come from PyTorch's global generator, as those of LwF.

    What it cannot do: the class that is asked for is absent, so the teacher's mask is what a model says beyond its
    training. Where queries look at each other, new ones change old masks from the first step on.
    """

    across_ranks = True
    _name = "slot_span"
    keeps = (
        "Of every old class the mean object and the mean motion in half precision (13,312 bytes at the published "
        "features), and the objects' standard deviation (1,024 more) for conditioning=gaussian; nothing for own"
    )
    differs = (
        "VR-LwF asks with random texts, and FeTrIL and NAPA-VQ make old features for a classifier; here the class is "
        "given, and such features are what a mask is asked on. NAPA-VQ's learned graph of neighbours is the nearest "
        "mean."
    )

    def __init__(
        self,
        *,
        weight: float = 1.0,
        classes: int = 3,
        conditioning: Literal["own", "gaussian", "translated", "neighbour"] = "gaussian",
        mixtures: int = 256,
    ) -> None:
        check_weights(weight=weight)
        for name, value in (("classes", classes), ("mixtures", mixtures)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if conditioning not in _CONDITIONINGS:
            raise ValueError(f"conditioning must be {', '.join(_CONDITIONINGS)}, got {conditioning!r}")
        self.weight = weight
        self.classes = classes
        self.conditioning = conditioning
        self.mixtures = mixtures
        self.needs_teacher = weight > 0
        self._old: dict[str, Tensor] = {}  # by name a row for each class, as class_statistics gives them
        self._new: dict[str, Tensor] = {}  # likewise of the task's own classes, by the teacher

    def check(self, separator: Separator) -> None:
        if self.conditioning == "own" and separator.mask_decoder.class_agnostic:
            raise ConfigError(
                f"strategy '{self._name}' with conditioning=own asks for other classes, on which the masks of decoder "
                f"'{separator.spec.mask_decoder.name}' do not depend: choose another conditioning, or lwf"
            )

        if self.conditioning != "own":
            does = f"with conditioning={self.conditioning} makes object features of old classes"
            check_objects(separator, self._name, does, "set conditioning=own")

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        self._new = {}
        if ctx.teacher is not None and self.conditioning == "translated" and self.weight > 0:
            # by the teacher, which does not change: the same after a resume
            self._new = self._statistics(ctx, ctx.teacher)

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.teacher is None or not self.needs_teacher:
            return terms
        drawn = self._drawn_classes(step)  # [B, r]
        if drawn.shape[1] == 0:
            return terms
        spectrograms, heard, heard_by_teacher = self._heard(step)
        with torch.no_grad():
            theirs = step.teacher.eval().encode_visual(step.batch.visual) if self._takes_sources else None
            condition = self._condition(step, drawn, theirs)
            taught = _asked(step.teacher, heard_by_teacher, condition, drawn)
        if self.conditioning == "own":
            condition = _of_sources(step.visual, drawn.shape[1])
        answered = _asked(step.student, heard, condition, drawn)
        terms["span"] = self.weight * mask_distillation(answered, taught, spectrograms)
        return terms

    def _heard(self, step: Step) -> tuple[Spectrograms, AudioFeatures, AudioFeatures]:
        """The mixtures that both are asked about, and what student and teacher hear in them."""
        return step.spectrograms, step.audio, step.teacher_output().audio

    @property
    def _takes_sources(self) -> bool:
        return self.conditioning in ("own", "translated")

    def _drawn_classes(self, step: Step) -> Tensor:
        """[B, r] different old classes of each mixture, of those that a mean is known of."""
        known = torch.ones(step.num_old, dtype=torch.bool)
        if self.conditioning != "own":
            known = self._old["counts"].cpu() > 0
        count = min(self.classes, int(known.sum()))
        keys = torch.rand(step.ranks.world * len(step.batch.class_ids), len(known))  # every rank draws for all
        drawn = keys.masked_fill(~known, -1.0).topk(count, dim=1).indices
        return step.ranks.part(drawn).to(step.batch.class_ids.device)

    def _condition(self, step: Step, drawn: Tensor, theirs: VisualFeatures | None) -> VisualFeatures:
        """What the teacher is asked on, for ``drawn`` [B, r]; ``theirs`` are its features of the sources."""
        if self.conditioning == "own":
            of_sources: VisualFeatures = _of_sources(theirs, drawn.shape[1])
            return of_sources
        means = {name: value.to(step.spectrograms.weight) for name, value in self._old.items() if name != "counts"}
        chosen = {name: value[drawn] for name, value in means.items()}  # [B, r, ...]
        shape = (step.ranks.world * len(drawn), drawn.shape[1], 1)
        if self.conditioning == "gaussian":
            noise = step.ranks.part(torch.randn(*shape[:2], chosen["object"].shape[-1]))
            found = chosen["object"] + chosen["object_deviation"] * noise.to(chosen["object"])
            return VisualFeatures(object=found, motion=chosen.get("motion"))
        if self.conditioning == "neighbour":
            nearest = _nearest(means["object"], self._old["counts"].to(drawn.device) > 0)[drawn]
            share = 0.5 + 0.5 * step.ranks.part(torch.rand(shape)).to(means["object"])  # [B, r, 1]
            names = [name for name in ("object", "motion") if name in means]
            return VisualFeatures(**{name: _mixed(chosen[name], means[name][nearest], share) for name in names})
        assert theirs is not None
        own = _of_sources(theirs, drawn.shape[1])
        ids = _of_sources(step.batch.class_ids, drawn.shape[1])
        moved: dict[str, Tensor] = {}
        for name in ("object", "motion"):
            features = getattr(own, name)
            if features is not None:
                of_class = torch.cat((means[name], self._new[name].to(means[name])))[ids]
                moved[name] = translated(features, of_class, chosen[name])
        return VisualFeatures(**moved, motion_mask=own.motion_mask, seen=own.seen, motion_seen=own.motion_seen)

    def after_task(self, ctx: TaskContext) -> None:
        self._new = {}
        if ctx.is_last or self.weight == 0 or self.conditioning == "own":
            self._old = {}
            return
        found = self._statistics(ctx, ctx.student)
        if self.conditioning != "gaussian":
            del found["object_deviation"]
        self._old = {name: torch.cat((self._old[name], rows)) if self._old else rows for name, rows in found.items()}

    def _statistics(self, ctx: TaskContext, separator: Separator) -> dict[str, Tensor]:
        first, last = len(ctx.task.old), len(ctx.task.seen)
        return class_statistics(separator, ctx.data.batches(self.mixtures, batch_size=16), first, last)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._old)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._old = dict(state)


@torch.no_grad()
def class_statistics(separator: Separator, batches: Iterable[Batch], first: int, last: int) -> dict[str, Tensor]:
    """What the sources of the classes from ``first`` to below ``last`` look like, on the CPU and in half precision.

    Returns:
        ``object`` and ``object_deviation`` [classes, Do], ``motion`` [classes, Dm, Tm] where there is a motion encoder,
        and ``counts`` [classes] int64, how many sources were seen of each; where none was, the others are 0.
    """
    training = separator.training
    separator.eval()
    sums: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}

    def add(name: str, values: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Add ``weight * values`` of sources [n, ...] to the rows of their classes."""
        if name not in sums:
            sums[name] = values.new_zeros(last - first, *values.shape[1:], dtype=torch.float64)
            weights[name] = weight.new_zeros(last - first, *weight.shape[1:], dtype=torch.float64)
        sums[name].index_add_(0, rows, weight * values)
        weights[name].index_add_(0, rows, weight)

    for batch in batches:
        visual = separator.encode_visual(batch.visual)
        assert visual.object is not None
        chosen = (batch.class_ids >= first) & (batch.class_ids < last)
        if visual.seen is not None:
            chosen = chosen & visual.seen
        rows, objects = batch.class_ids[chosen] - first, visual.object[chosen].double().cpu()
        rows, ones = rows.cpu(), torch.ones(len(rows), 1, dtype=torch.float64)
        add("object", objects, ones, rows)
        add("object_squared", objects.square(), ones, rows)
        if visual.motion is not None:
            moving = torch.ones_like(visual.motion[:, :, :1], dtype=torch.bool)  # [B, N, 1, Tm]
            if visual.motion_mask is not None:
                moving = visual.motion_mask[:, :, None]
            if visual.moving is not None:
                moving = moving & visual.moving[:, :, None, None]
            add("motion", visual.motion[chosen].double().cpu(), moving[chosen].double().cpu(), rows)
    separator.train(training)
    means = {name: sums[name] / weights[name].clamp_min(1) for name in sums}
    squares = means.pop("object_squared")
    means["object_deviation"] = (squares - means["object"].square()).clamp_min(0).sqrt()
    return {
        **{name: value.half() for name, value in means.items()},
        "counts": weights["object"].squeeze(1).long(),
    }


def translated(features: Tensor, of_class: Tensor, to_class: Tensor) -> Tensor:
    """FeTrIL: features less the mean of their class, plus that of another."""
    return features - of_class + to_class


def _mixed(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """share own + (1 - share) other; features [B, r, ...], shares [B, r, 1]."""
    share = share.reshape(*share.shape[:2], *(1,) * (own.ndim - 2))
    return share * own + (1 - share) * other


def _nearest(means: Tensor, known: Tensor) -> Tensor:
    """[Q] the class whose mean [Q, D] is nearest to each; itself where no other is known."""
    distances = torch.cdist(means, means).masked_fill(~known, torch.inf)
    return distances.fill_diagonal_(torch.finfo(distances.dtype).max).argmin(dim=1)


def _of_sources(features: Any, count: int) -> Any:
    """Features (or anything else) of N sources [B, N, ...] -> of ``count`` [B, count, ...], the sources in turn."""
    if isinstance(features, VisualFeatures):
        return VisualFeatures(**{f.name: _of_sources(getattr(features, f.name), count) for f in fields(features)})
    return None if features is None else features[:, torch.arange(count) % features.shape[1]]


def _asked(separator: Separator, audio: AudioFeatures, condition: VisualFeatures, class_ids: Tensor) -> MaskOutput:
    """The masks of classes [B, r], each asked for by itself, with the decoder in evaluation mode."""
    decoder = separator.mask_decoder
    training = decoder.training
    decoder.eval()
    try:
        output = separator.decode(audio, condition, class_ids, together=False)
    finally:
        decoder.train(training)
    return output

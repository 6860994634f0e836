"""DER++: mixtures are kept with the masks that the separator of their own task gave, and both are learned again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from avsep.errors import ConfigError
from avsep.kernels import mask_l1
from avsep.losses import separation_loss
from avsep.registry import STRATEGIES
from avsep.strategies.base import Step, Strategy, TaskContext
from avsep.strategies.teaching import check_weights
from avsep.types import Batch, VisualInputs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DERpp"]

_FULL_SCALE = 32767  # of 16-bit sound
_TRIES = 64  # mixtures that are looked at for each that is to be kept
_PICTURES = ("object", "motion", "motion_mask")


@STRATEGIES.register(
    "derpp",
    source="Buzzega et al., Dark Experience for General Continual Learning, NeurIPS 2020: DER++",
    example={"per_class": 1, "batch_size": 1},
)
class DERpp(Strategy):
    """Replay stored mixtures: towards the masks that their own task's separator gave, and towards the true ones.

    L = L_sep + ``alpha`` mean w |M - M*| + ``beta`` L_sep', in every step over two draws of ``batch_size`` stored
    mixtures each: M are the masks of the first, M* those stored with them, and L_sep' is the separation loss of the
    second. The targets come from the separator that knew the class best, and not from one that has drifted since.

    A stored mixture is one source and what sounds beside it, as 16-bit sound; the source's pictures, floats in half
    precision; and its mask in 8 bits a pixel. With the published front end and features these are 343,036 bytes. After
    each task but the last ``per_class`` mixtures of each of its classes are taken from its training mixtures, in their
    random order: those in which all sources are of this task and of different recordings. Their masks are the selected
    separator's, in evaluation mode. Draws come from PyTorch's global generator, as those of LwF.

    As in the original, stored mixtures go through the separator in training mode: running statistics of batch
    normalisation see them too.

    A mixture that is stored has no crop, gain or partner but its own. So this memory stands beside that of exemplars
    (which ``memory=none`` leaves out), and is to be compared with it at equal bytes.
    """

    across_ranks = True
    keeps = (
        "per_class mixtures of every old class, each with one mask: 343 kB a mixture at the published setting (two "
        "clips of 16-bit sound, a mask of 8 bits a pixel, pictures in half precision)"
    )
    differs = (
        "Masks take the place of class scores, and their distance is that of the separation loss. Mixtures are stored "
        "when their task ends, a fixed number a class, in place of a reservoir along the way; what is not of this task "
        "cannot be its own separator's."
    )

    def __init__(self, *, alpha: float = 0.3, beta: float = 0.5, per_class: int = 4, batch_size: int = 16) -> None:
        check_weights(alpha=alpha, beta=beta)
        for name, value in (("per_class", per_class), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.alpha = alpha
        self.beta = beta
        self.per_class = per_class
        self.batch_size = batch_size
        self._kept: dict[str, Tensor] = {}  # by name [n, ...]; class -1 where a class had too few mixtures

    def first_task(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: TaskContext) -> None:
        if self.batch_size % ctx.ranks.world:
            raise ConfigError(
                f"strategy 'derpp': its batch_size, {self.batch_size}, cannot be shared equally by {ctx.ranks.world} "
                "processes"
            )

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        draws = [name for name in ("alpha", "beta") if getattr(self, name) > 0]
        if not self._kept or not draws:
            return terms
        rows = torch.nonzero(self._kept["class_ids"] >= 0).squeeze(1)
        drawn = rows[torch.randint(len(rows), (self.batch_size, len(draws)))]  # every rank draws for all
        drawn = step.ranks.part(drawn).T  # [draws, n]
        stored = {name: value[drawn.flatten()] for name, value in self._kept.items()}
        found = step.student.predict(_batch(stored, step.batch.sources))
        number = torch.arange(len(draws), device=step.batch.sources.device).repeat_interleave(drawn.shape[1])
        for place, name in enumerate(draws):
            counted = (number == place)[:, None]  # [draws n, 1]
            if name == "alpha":
                masks = _masks(stored, found.output.logits)
                distance = mask_l1(found.output.logits, masks, found.spectrograms.weight, counted=counted)
                terms["stored_masks"] = self.alpha * distance
            else:
                terms["replay"] = self.beta * separation_loss(found.output, found.spectrograms, counted=counted)
        return terms

    def after_task(self, ctx: TaskContext) -> None:
        if ctx.is_last:
            self._kept = {}
            return
        items = []
        for item, like in self._chosen(ctx):
            with torch.no_grad():  # of the mixture as it is stored
                masks = ctx.student.predict(_batch(item, like)).output.logits.float().sigmoid()
            items.append({**item, "masks": (255 * masks[:, 0]).round().to(torch.uint8).cpu()})
        if not items:
            warnings.warn(
                f"derpp: of {self._tries(ctx)} mixtures of task {ctx.task.index} none has all its sources of this task "
                "and of different recordings: none is stored, and its classes are not replayed",
                stacklevel=2,
            )
            return
        missing = self.per_class * len(ctx.task.classes) - len(items)
        empty = {name: torch.zeros_like(value) for name, value in items[0].items()}
        items += missing * [{**empty, "class_ids": torch.full_like(empty["class_ids"], -1)}]
        rows = [self._kept, *items] if self._kept else items
        self._kept = {name: torch.cat([row[name] for row in rows]) for name in items[0]}

    def _tries(self, ctx: TaskContext) -> int:
        return _TRIES * self.per_class * len(ctx.task.classes)

    def _chosen(self, ctx: TaskContext) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Sources to be stored, without their masks, and the sound they were made of."""
        wanted = dict.fromkeys(range(len(ctx.task.old), len(ctx.task.seen)), self.per_class)
        for batch in ctx.data.batches(self._tries(ctx)):
            classes, videos = batch.class_ids[0].tolist(), batch.video_ids[0].tolist()
            if min(classes) < len(ctx.task.old) or len(set(videos)) < len(videos):
                continue
            usable = _usable(batch)
            places = [n for n in range(len(classes)) if usable[n] and wanted[classes[n]] > 0]
            if places:
                place = max(places, key=lambda n: wanted[classes[n]])
                wanted[classes[place]] -= 1
                yield _stored(batch, place), batch.sources
            if not any(wanted.values()):
                return

    def state_dict(self) -> dict[str, Any]:
        return dict(self._kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = dict(state)


def _usable(batch: Batch) -> list[bool]:
    """Which sources of the first mixture sound and are seen."""
    usable = batch.sources[0].any(dim=1)
    for seen in (batch.visual.seen, batch.visual.motion_seen):
        if seen is not None:
            usable = usable & seen[0]
    found: list[bool] = usable.tolist()
    return found


def _stored(batch: Batch, place: int) -> dict[str, Tensor]:
    """One source of the first mixture, by name [1, ...], as it is stored."""
    source = batch.sources[0, place]
    sounds = torch.stack((source, batch.mixture[0] - source))  # what is asked for, and all else
    item = {
        "sounds": (_FULL_SCALE * sounds).round().clamp(-_FULL_SCALE, _FULL_SCALE).to(torch.int16),
        "class_ids": batch.class_ids[0, place],
        "video_ids": batch.video_ids[0, place],
    }
    for name in _PICTURES:
        picture = getattr(batch.visual, name)
        if picture is not None:
            picture = picture[0, place]
            item[name] = picture.half() if picture.is_floating_point() else picture
    return {name: value[None].cpu() for name, value in item.items()}


def _batch(stored: Mapping[str, Tensor], like: Tensor) -> Batch:
    """Stored sources as mixtures of one source each, and what else sounds as the background, where ``like`` is."""
    sounds = stored["sounds"].to(like) / _FULL_SCALE  # [n, 2, L]
    pictures = {name: stored[name][:, None].to(like.device) for name in _PICTURES if name in stored}
    class_ids = stored["class_ids"][:, None].to(like.device)
    return Batch(
        sources=sounds[:, :1],
        background=sounds[:, 1],
        class_ids=class_ids,
        video_ids=stored["video_ids"][:, None].to(like.device),
        is_memory=torch.ones_like(class_ids, dtype=torch.bool),
        visual=VisualInputs(**{k: v.to(like.dtype) if v.is_floating_point() else v for k, v in pictures.items()}),
    )


def _masks(stored: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The stored masks [n, 1, F, T]."""
    return stored["masks"][:, None].to(like.device).float() / 255

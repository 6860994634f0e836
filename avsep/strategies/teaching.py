"""What several strategies share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from avsep.errors import ConfigError
from avsep.registry import MASK_DECODERS

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator
    from avsep.strategies.base import Step, TaskData
    from avsep.types import MaskOutput

__all__ = [
    "NewRows",
    "check_objects",
    "check_queries",
    "check_temperature",
    "check_weights",
    "embeddings",
    "largest_is_one",
    "reestimate_batch_norm",
    "rows_of",
    "taught_embeddings",
    "visual_embeddings",
]


def embeddings(output: MaskOutput) -> dict[str, Tensor]:
    """Audio, motion and object embeddings [B, N, D]; a modality that the decoder does not have is left out."""
    named = {"audio": output.audio, "motion": output.motion, "object": output.object}
    return {name: value for name, value in named.items() if value is not None}


def visual_embeddings(output: MaskOutput) -> dict[str, Tensor]:
    """Of :func:`embeddings` those of what is seen, which do not depend on the class that is asked for."""
    return {name: value for name, value in embeddings(output).items() if name != "audio"}


def taught_embeddings(step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """:func:`visual_embeddings` of the student and of the teacher, of the sources of all ranks: [sources, D] each."""
    own, theirs = (
        {name: step.gather(value).flatten(0, 1) for name, value in visual_embeddings(output).items()}
        for output in (step.output, step.teacher_output().output)
    )
    return own, theirs


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature that is not above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def check_weights(**weights: float) -> None:
    """Raise ValueError for a weight that is negative or no number."""
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")


def largest_is_one(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of 0 and more, divided by the largest element of all of them."""
    largest = torch.stack([value.max() for value in values.values()]).max().clamp(min=torch.finfo().tiny)
    return {name: value / largest for name, value in values.items()}


def check_queries(separator: Separator, strategy: str, does: str) -> None:
    """Raise ConfigError where the mask decoder has no queries of classes; the strategy ``does`` something with them."""
    if not separator.mask_decoder.query_parameter:
        others = " or ".join(spec.name for spec in MASK_DECODERS if spec.factory.query_parameter)
        raise ConfigError(
            f"strategy '{strategy}' {does}, and mask decoder '{separator.spec.mask_decoder.name}' has none: use "
            f"{others}, or another strategy"
        )


def check_objects(separator: Separator, strategy: str, does: str, otherwise: str = "use another strategy") -> None:
    """Raise ConfigError where the separator looks at no objects; the strategy ``does`` something with what is seen."""
    if separator.object_encoder is None:
        raise ConfigError(
            f"strategy '{strategy}' {does}, and this separator has no object encoder: add one, with a mask decoder "
            f"that takes objects, or {otherwise}"
        )


class NewRows:
    """Trains the rows of a parameter that new classes brought; the ``old`` first ones keep their values."""

    def __init__(self, parameter: nn.Parameter, old: int) -> None:
        self._parameter = parameter.requires_grad_(True)
        self._old = parameter[:old].detach().clone()
        is_new = torch.arange(len(parameter), device=parameter.device) >= old
        is_new = is_new.reshape(-1, *(1,) * (parameter.ndim - 1))
        parameter.register_hook(lambda gradient: gradient * is_new)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the old rows back after a step: a gradient of zero does not stop weight decay."""
        self._parameter[: len(self._old)] = self._old


def rows_of(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a tensor that was there when it had this ``shape``, before classes were added."""
    return tuple(slice(n) for n in shape)


@torch.no_grad()
def reestimate_batch_norm(student: Separator, data: TaskData, mixtures: int = 256, batch_size: int = 16) -> None:
    """Set the running statistics of batch normalisation to their mean over batches of training mixtures, in place.

    Encoders that are frozen and parts that masks do not need (a classifier) keep theirs, and everything but batch
    normalisation is in evaluation mode meanwhile.
    """
    student.train()
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    student.eval()
    before = [(norm.momentum, {k: v.clone() for k, v in norm.named_buffers()}) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    for batch in data.batches(mixtures, batch_size=batch_size):
        student.predict(batch)
    for norm, (momentum, buffers) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if not norm.num_batches_tracked:
            norm.load_state_dict(buffers, strict=False)
    student.eval()

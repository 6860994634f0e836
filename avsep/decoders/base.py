"""What a mask decoder declares: all that the rest of the library reads of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avsep.errors import ConfigError
from avsep.registry import Component
from avsep.types import AdapterPlace, AudioFeatures, MaskOutput, Spectrograms, VisualFeatures

__all__ = ["MaskDecoder", "tasks_of"]


class MaskDecoder(nn.Module, Component, ABC):
    """Base of mask decoders: features of a mixture and of its sources in, a mask for each source out.

    ``needs`` names the features it takes (see :class:`~avsep.registry.Component`). Its constructor takes those of
    ``num_classes``, ``mask_channels``, ``latent_channels``, ``skip_channels``, ``object_dim``, ``motion_dim`` (None
    without a motion encoder) and ``log_rows`` (of the front end) that it has a use for; a decoder that takes
    ``motion_dim`` may stand beside a motion encoder.

    Attributes:
        class_agnostic: its masks do not depend on the class ids.
        independent_sources: the mask of one source does not depend on which others are separated beside it, so that
            many may be separated in groups. False where it is not known.
        query_parameter: name of the parameter with a row a class, the class's query, which the masks depend on; empty
            of a decoder without. :meth:`forward` takes as many classes as it has rows.
        mask_head: name of the submodule that turns a query's vector into its mask; empty of a decoder without.
        tells_presence: its output says of each source that is asked for whether it sounds in the mixture at all
            (:attr:`avsep.types.MaskOutput.presence`).
        takes_unseen: it takes sources without a picture (``visual.seen``); for others the mean features of the class
            stand in.
        presence_threshold: probability from which a source counts as present, of a decoder that tells.
        presence_offsets: what is taken off the presence's logit outside of training so that this threshold holds, [3],
            for sources seen moving, in one picture, and not at all: a buffer, which is chosen on validation data after
            each task and stored with the weights. None of a decoder that is not calibrated.
        causal: in evaluation mode the masks of a frame depend on no later one, and :meth:`advance` gives them as frames
            come.
        num_classes: classes known so far. Every decoder sets it, and :meth:`grow` changes it.
    """

    class_agnostic: bool = False
    independent_sources: bool = False
    query_parameter: str = ""
    mask_head: str = ""
    tells_presence: bool = False
    takes_unseen: bool = False
    causal: bool = False

    presence_threshold: float = 0.5
    presence_offsets: Tensor | None = None

    num_classes: int

    @abstractmethod
    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        """Features of B mixtures with N sources each, and class_ids [B, N] int64 -> masks and embeddings."""

    if TYPE_CHECKING:

        def __call__(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput: ...

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """What :meth:`advance` carries from call to call of each source: the shape of each, by name. A stream begins
        with zeros; those whose names begin with ``presence`` may be set to zeros again, to tell it anew.

        Raises:
            ConfigError: of a decoder that is not causal.
        """
        raise ConfigError(f"mask decoder {type(self).__name__} looks ahead: it keeps no state from frame to frame")

    def advance(
        self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[MaskOutput, dict[str, Tensor]]:
        """The next frames of a stream, of any number, and the state [B, N, ...] that those before them left -> what
        :meth:`forward` gives of them in the whole, and the state after them. Presence is that of all frames so far.

        Raises:
            ConfigError: of a decoder that is not causal.
        """
        raise ConfigError(f"mask decoder {type(self).__name__} looks ahead: it cannot go frame by frame")

    @abstractmethod
    def grow(self, num_classes: int) -> None:
        """Make room for ``num_classes`` classes; what is known of the old ones stays.

        A decoder calls this method of the base, which sets ``num_classes``, and then adds its own rows, if it has any.
        Parameters that get more rows are new objects afterwards: optimisers made before do not know them.

        Raises:
            ConfigError: when there would be fewer classes than now.
        """
        if num_classes < self.num_classes:
            raise ConfigError(f"cannot go from {self.num_classes} classes to {num_classes}: classes are only added")
        self.num_classes = num_classes

    @classmethod
    def knows_tasks(cls, params: Mapping[str, Any]) -> bool:
        """Whether a decoder with these parameters computes differently for classes of different tasks.

        A separator then keeps in its spec how many classes each task brought (``task_sizes``), and tells the decoder
        by :meth:`set_tasks`.
        """
        return False

    def set_tasks(self, sizes: Sequence[int]) -> None:
        """Take how many classes each task brought; empty: all are of the first."""

    def auxiliary_losses(self, output: MaskOutput, spectrograms: Spectrograms, class_ids: Tensor) -> dict[str, Tensor]:
        """Named scalar terms of the decoder's own, already weighted, that training adds to the strategy's."""
        return {}

    def motion_attention(self, visual: VisualFeatures, class_ids: Tensor) -> Tensor | None:
        """How each source's query attends to the steps of its motion, [B, N, Tm], each row of sum 1; None of a decoder
        without such an attention."""
        return None

    def adapter_places(self) -> tuple[AdapterPlace, ...]:
        """The weights that an adapter may change, of those that :meth:`forward` itself computes masks with, in the
        order of their use; none of a decoder that carries no adapter."""
        return ()


def tasks_of(class_ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """The task that each class came with, in the shape of ``class_ids``; all of the first where there are no sizes."""
    tasks = torch.zeros_like(class_ids)
    for first in accumulate(sizes[:-1]):
        tasks = tasks + (class_ids >= first)
    return tasks

"""What an adapter is: small parameters of a task's own, which change weights of a component.

A separator's spec names an adapter (``adapter``) and records how many classes each task brought (``task_sizes``). The
mask decoder, and the audio encoder where the adapter says so, then carry one: every source is computed with the weights
of the task that its class came with (:mod:`avsep.separator.adapted`). The first task has the component's own weights.

A :class:`FeatureAdapter` changes feature maps in place of weights: there the newest task has the component's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from avsep.registry import Component
from avsep.types import AdapterPlace

__all__ = ["Adapter", "FeatureAdapter"]


class Adapter(nn.Module, Component, ABC):
    """Base of adapters, each of one component.

    Attributes:
        places: the weights that it changes, of those that the component declares (the constructor's ``places``).
        tasks: a module of parameters for each task after the first, in order.
        kinds: of the places that a component declares those that it is given (:class:`~avsep.types.AdapterPlace`).
        on_audio_encoder: the audio encoder carries one too. It then runs once for each task in a batch.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "convolution", "transposed")
    on_audio_encoder: bool = False

    def __init__(self, places: Sequence[AdapterPlace]) -> None:
        super().__init__()
        self.places = tuple(places)
        self.tasks = nn.ModuleList()

    @abstractmethod
    def new_task(self) -> nn.Module:
        """The parameters of another task, on the CPU; they change nothing yet."""

    @abstractmethod
    def weights(self, parameters: nn.Module, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A task's weights, by the name that ``places`` have for them.

        Args:
            parameters: of the task, as :meth:`new_task` made them.
            own: the component's own weights, by the same names.
        """

    def add_task(self, like: Tensor) -> None:
        """Make room for another task, with the dtype and on the device of ``like``; earlier ones learn no more."""
        self.tasks.requires_grad_(False)
        self.tasks.append(self.new_task().to(like))

    def newest(self) -> Iterator[nn.Parameter]:
        """The parameters of the newest task; none while there is only the first."""
        return self.tasks[-1].parameters() if len(self.tasks) else iter(())


class FeatureAdapter(Adapter):
    """Base of adapters of an audio encoder that goes on learning: they lead its features back to earlier tasks.

    The audio encoder alone carries one, and its own features are those of the newest task. The module that
    :meth:`new_task` makes is called with the :class:`~avsep.types.AudioFeatures` of its task and gives those of the
    task before, at first the same. So the features of any task are found step by step, newest task first
    (:class:`~avsep.separator.adapted.ProjectedEncoder`).

    ``places``, of kind map, are those of its maps that the mask decoder reads.
    """

    kinds = ("map",)
    on_audio_encoder = True

    def weights(self, parameters: nn.Module, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """None: no weight is changed."""
        return {}

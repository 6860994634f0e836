"""Components that carry an adapter: every source is computed with the weights of the task that its class came with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from avsep.adapters.base import Adapter, FeatureAdapter
from avsep.decoders.base import MaskDecoder, tasks_of
from avsep.encoders.base import AudioEncoder
from avsep.types import AudioFeatures, MaskOutput, Spectrograms, VisualFeatures

__all__ = ["AdaptedDecoder", "AdaptedEncoder", "ProjectedEncoder"]


@dataclass(frozen=True)
class TaskFeatures(AudioFeatures):
    """The features that the encoder's own weights give, and by ``of_task`` those of any task, computed on first use."""

    of_task: Callable[[int], AudioFeatures] | None = None

    @classmethod
    def made(cls, own: AudioFeatures, of_task: Callable[[int], AudioFeatures]) -> TaskFeatures:
        return cls(**{f.name: getattr(own, f.name) for f in fields(own)}, of_task=of_task)


class AdaptedEncoder(AudioEncoder):
    """An audio encoder with an adapter. It knows no classes: the decoder takes the features of the tasks it needs."""

    def __init__(self, encoder: AudioEncoder, adapter: Adapter) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter
        self.size_multiple, self.frozen, self.tap_names = encoder.size_multiple, encoder.frozen, encoder.tap_names
        self.any_frames = encoder.any_frames
        self.mask_channels, self.latent_channels = encoder.mask_channels, encoder.latent_channels
        self.skip_channels = encoder.skip_channels

    def set_tasks(self, sizes: Sequence[int]) -> None:
        """Make room for as many tasks as there are sizes."""
        _add_tasks(self.adapter, self.encoder, len(sizes))

    def forward(self, spectrogram: Tensor) -> AudioFeatures:
        first = self.encoder(spectrogram)
        known = {0: first}

        def of_task(task: int) -> AudioFeatures:
            if task not in known:
                known[task] = functional_call(self.encoder, _weights(self.encoder, self.adapter, task), (spectrogram,))
            return known[task]

        return TaskFeatures.made(first, of_task)

    def taps(self, audio: AudioFeatures) -> dict[str, Tensor]:
        """Those of the encoder's own weights."""
        return self.encoder.taps(audio)

    def merged(self) -> AudioEncoder:
        """The same in plain modules, one for each task, with the task's weights."""
        tasks = range(1 + len(self.adapter.tasks))
        return _MergedEncoder([_merged(self.encoder, _weights(self.encoder, self.adapter, task)) for task in tasks])


class _MergedEncoder(AudioEncoder):
    def __init__(self, encoders: Sequence[AudioEncoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, spectrogram: Tensor) -> AudioFeatures:
        found: list[AudioFeatures] = [encoder(spectrogram) for encoder in self.encoders]
        return TaskFeatures.made(found[0], found.__getitem__)


class ProjectedEncoder(AdaptedEncoder):
    """An audio encoder that goes on learning, with an adapter that leads its features back to earlier tasks.

    Its own features are those of the newest task; those of an older one go through the projections of all later tasks,
    newest first. With one task alone it is the encoder, to the last bit.
    """

    def __init__(self, encoder: AudioEncoder, adapter: FeatureAdapter) -> None:
        super().__init__(encoder, adapter)

    def forward(self, spectrogram: Tensor) -> AudioFeatures:
        newest = self.encoder(spectrogram)
        return TaskFeatures.made(newest, _step_by_step(newest, self.adapter.tasks))

    def merged(self) -> AudioEncoder:
        """The same in plain modules."""
        return _MergedProjections(copy.deepcopy(self.encoder), copy.deepcopy(self.adapter.tasks))


class _MergedProjections(AudioEncoder):
    def __init__(self, encoder: AudioEncoder, steps: nn.ModuleList) -> None:
        super().__init__()
        self.encoder = encoder
        self.steps = steps

    def forward(self, spectrogram: Tensor) -> AudioFeatures:
        newest = self.encoder(spectrogram)
        return TaskFeatures.made(newest, _step_by_step(newest, self.steps))


def _step_by_step(newest: AudioFeatures, steps: nn.ModuleList) -> Callable[[int], AudioFeatures]:
    """``of_task``, where ``steps[t]`` takes the features of task t + 1 to those of task t."""
    known = [newest]  # of the newest task, the one before it, and so on

    def of_task(task: int) -> AudioFeatures:
        while len(known) <= len(steps) - task:
            known.append(steps[len(steps) - len(known)](known[-1]))
        return known[len(steps) - task]

    return of_task


class AdaptedDecoder(MaskDecoder):
    """A mask decoder with an adapter: the decoder runs once for each task among the sources, with that task's weights.
    Without one (None) tasks differ in their audio features alone.

    Sources of the first task get what the decoder alone gives, to the last bit. Queries of classes that came later than
    a source's are hidden from it. So what a source gets depends on nothing that a later task brings or learns, as long
    as the weights it shares with it are frozen (as ``task_adapters`` keeps them).
    """

    def __init__(self, decoder: MaskDecoder, adapter: Adapter | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.adapter = adapter
        self.num_classes = decoder.num_classes
        self.sizes: tuple[int, ...] = ()
        self.independent_sources = decoder.independent_sources
        self.class_agnostic = decoder.class_agnostic
        self.tells_presence = decoder.tells_presence
        self.presence_threshold = decoder.presence_threshold
        self.takes_unseen = decoder.takes_unseen
        if decoder.query_parameter:
            self.query_parameter = f"decoder.{decoder.query_parameter}"
        if decoder.mask_head:
            self.mask_head = f"decoder.{decoder.mask_head}"

    @property
    def presence_offsets(self) -> Tensor | None:  # type: ignore[override]
        return self.decoder.presence_offsets

    def grow(self, num_classes: int) -> None:
        """Make room in the decoder; :meth:`set_tasks` follows where the new classes are a new task."""
        super().grow(num_classes)
        self.decoder.grow(num_classes)

    def set_tasks(self, sizes: Sequence[int]) -> None:
        """Say how many classes each task brought, and make room for as many tasks."""
        self.sizes = tuple(sizes)
        self.decoder.set_tasks(sizes)
        if self.adapter is not None:
            _add_tasks(self.adapter, self.decoder, len(sizes))

    def tasks_of(self, class_ids: Tensor) -> Tensor:
        """The task that each class came with."""
        return tasks_of(class_ids, self.sizes)

    def _task_weights(self, task: int) -> dict[str, Tensor]:
        """What differs from the decoder's own weights for sources of a task."""
        weights = {} if self.adapter is None else _weights(self.decoder, self.adapter, task)
        if (name := self.decoder.query_parameter) and task + 1 < len(self.sizes):
            weights[name] = self.decoder.get_parameter(name)[: sum(self.sizes[: task + 1])]
        return weights

    def _each_task(self, call: Callable[[int, Tensor], Any], class_ids: Tensor) -> tuple[list[Any], list[Tensor]]:
        """``call(task, class_ids)`` for each task in the batch, and which sources are of it, [B, N] bool."""
        tasks = self.tasks_of(class_ids)
        present = tasks.unique().tolist() if self.sizes else [0]  # waits for the device, and may spare many passes
        masks = [tasks == task for task in present]
        # class 0, which every task knows, for sources whose result is not taken
        return [call(t, class_ids.where(m, 0)) for t, m in zip(present, masks, strict=True)], masks

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        def run(task: int, ids: Tensor) -> MaskOutput:
            weights = self._task_weights(task)
            return _call(self.decoder, weights, _features(audio, task), visual, ids)

        outputs, masks = self._each_task(run, class_ids)
        return outputs[0] if len(outputs) == 1 else MaskOutput.chosen(outputs, masks)

    def motion_attention(self, visual: VisualFeatures, class_ids: Tensor) -> Tensor | None:
        def run(task: int, ids: Tensor) -> Tensor | None:
            weights = {f"decoder.{name}": value for name, value in self._task_weights(task).items()}
            found: Tensor | None = functional_call(_MotionAttention(self.decoder), weights, (visual, ids))
            return found

        found, masks = self._each_task(run, class_ids)
        whole: Tensor | None = found[0]
        for part, mask in zip(found[1:], masks[1:], strict=True):
            whole = None if whole is None else part.where(mask[..., None], whole)
        return whole

    def auxiliary_losses(self, output: MaskOutput, spectrograms: Spectrograms, class_ids: Tensor) -> dict[str, Tensor]:
        return self.decoder.auxiliary_losses(output, spectrograms, class_ids)

    def merged(self) -> MaskDecoder:
        """The same in plain modules, one for each task, with the task's weights."""
        tasks = range(max(len(self.sizes), 1))
        return _MergedDecoder([_merged(self.decoder, self._task_weights(task)) for task in tasks], self.sizes)


class _MergedDecoder(MaskDecoder):
    """A decoder for each task; all of them run, whatever the classes are."""

    def __init__(self, decoders: Sequence[MaskDecoder], sizes: Sequence[int]) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        self.sizes = tuple(sizes)
        self.independent_sources = decoders[0].independent_sources
        self.class_agnostic = decoders[0].class_agnostic
        self.tells_presence = decoders[0].tells_presence
        self.presence_threshold = decoders[0].presence_threshold
        self.takes_unseen = decoders[0].takes_unseen

    def grow(self, num_classes: int) -> None:
        raise NotImplementedError

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        tasks = tasks_of(class_ids, self.sizes)
        masks = [tasks == task for task in range(len(self.decoders))]
        outputs: list[MaskOutput] = [
            decoder(_features(audio, task), visual, class_ids.where(mask, 0))
            for task, (decoder, mask) in enumerate(zip(self.decoders, masks, strict=True))
        ]
        return outputs[0] if len(outputs) == 1 else MaskOutput.chosen(outputs, masks)


class _MotionAttention(nn.Module):
    """A decoder's motion attention as the forward pass of a module, so that it can be called with other weights."""

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, visual: VisualFeatures, class_ids: Tensor) -> Tensor | None:
        return self.decoder.motion_attention(visual, class_ids)


def _features(audio: AudioFeatures, task: int) -> AudioFeatures:
    return audio.of_task(task) if isinstance(audio, TaskFeatures) and audio.of_task is not None else audio


def _add_tasks(adapter: Adapter, component: nn.Module, count: int) -> None:
    like = next(component.parameters())
    while len(adapter.tasks) < count - 1:
        adapter.add_task(like)


def _weights(component: nn.Module, adapter: Adapter, task: int) -> dict[str, Tensor]:
    """The component's weights that an adapter changes in a task; none in the first."""
    if task == 0:
        return {}
    own = {place.parameter: component.get_parameter(place.parameter) for place in adapter.places}
    return dict(adapter.weights(adapter.tasks[task - 1], own))


def _call(decoder: MaskDecoder, weights: dict[str, Tensor], *arguments: Any) -> MaskOutput:
    found: MaskOutput = functional_call(decoder, weights, arguments) if weights else decoder(*arguments)
    return found


def _merged(component: Any, weights: dict[str, Tensor]) -> Any:
    """A copy with these weights."""
    made = copy.deepcopy(component)
    for name, value in weights.items():
        owner, _, parameter = name.rpartition(".")
        setattr(made.get_submodule(owner), parameter, nn.Parameter(value.detach().clone(), requires_grad=False))
    return made

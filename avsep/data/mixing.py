"""Mixtures from a store: the sources of a mixture are loaded, stacked into a batch, and frozen test mixtures read."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import get_worker_info

from avsep.data.augment import Change, reverberate
from avsep.data.codecs import CodedCrops
from avsep.data.protocol import TestMixture
from avsep.data.store import Clip, Store
from avsep.errors import DataError
from avsep.spec import FrontEndSpec
from avsep.types import Batch, VisualInputs, VisualSource

__all__ = ["Source", "collate", "load_mixtures", "load_source"]

_ROOM_SEED = 20261129  # of the rooms of test mixtures; part of the protocol, so never a setting


@dataclass(frozen=True)
class Source:
    """One source of one mixture, as arrays: ``audio`` [L] float32 before scaling by 1/N; visual inputs by their role.

    ``role``: what it does in the mixture (:data:`avsep.data.protocol.ROLES`).
    """

    audio: np.ndarray
    visual: dict[str, np.ndarray]
    clip: Clip
    class_id: int
    is_memory: bool = False
    role: str = "source"


def load_source(
    store: Store,
    clip: Clip,
    start: int,
    front_end: FrontEndSpec,
    visual_sources: Sequence[VisualSource],
    class_id: int,
    *,
    gain: float = 1.0,
    is_memory: bool = False,
    role: str = "source",
    rt60_s: float = 0.0,
    change: Change | None = None,
    coded: CodedCrops | None = None,
    stand_in: tuple[Clip, int, CodedCrops | None] | None = None,
) -> Source:
    """Read the crop of ``clip`` that begins at sample ``start`` (zeros outside the clip; its last sample is zero, as
    published), apply the gain, clip to ±1, and read the frames of the same seconds.

    A clip shorter than the crop is repeated until it fills it. With ``rt60_s`` above 0 the sound is that of a room with
    this reverberation time, one room a clip; a ``change`` is one of :mod:`avsep.data.augment`. A source that is asked
    for and absent (``role``) is silent; ``still`` shows one frame all along. ``coded``: hear and see the crop as codecs
    give it back; a ``change`` then cannot be one of speed. A sound without pictures
    (:meth:`avsep.data.store.Store.has_pictures`) is ``unseen``, whatever its role; what the encoders look at in its
    place is the crop of ``stand_in``, as its own codec gives it back, or zeros.
    """
    length = front_end.clip_samples
    if clip.samples == 0:
        raise DataError(f"clip '{clip.id}' has no samples: run avsep data check on the store")
    sounds = role in ("source", "unseen_source", "photo_source", "background")
    audio = np.zeros(length, np.float32)
    if sounds:
        if coded is not None:
            audio = coded.read(clip, start, gain)
        else:
            audio = store.read_crop(clip, start, length if change is None else change.samples(length), gain)
    if sounds and change is not None:
        audio = change.apply(audio, length, front_end.sample_rate_hz)
    if sounds and rt60_s > 0:
        audio = reverberate(audio, rt60_s, front_end.sample_rate_hz, seed=(_ROOM_SEED, clip.index))
    shown = clip
    if visual_sources and role != "background" and not store.has_pictures(clip):
        role = "unseen_source" if sounds else "unseen"
        shown, start, coded = stand_in or (clip, start, coded)
    centre_s = (start + length // 2) / front_end.sample_rate_hz
    visual = {}
    for source in visual_sources if role != "background" else ():
        if coded is not None and coded.loses_frames(source):
            array = coded.frames(shown, start, source)
        else:
            array = store.read_visual(
                shown,
                source,
                centre_s=centre_s,
                duration_s=front_end.clip_s,
                copy=False,
                unseen=role.startswith("unseen"),
            )
        if role == "still" and source.role == "motion":
            array = np.repeat(array[:, :1], array.shape[1], 1) if source.kind == "features" else _held(array)
        visual[source.role] = array
    return Source(audio=audio, visual=visual, clip=clip, class_id=class_id, is_memory=is_memory, role=role)


def _held(frames: np.ndarray) -> np.ndarray:
    """Frames [n, C, H, W] -> as many of the first."""
    return np.repeat(frames[:1], len(frames), 0)


def collate(mixtures: Collection[Sequence[Source]]) -> Batch:
    """Stack mixtures of N sources each into a :class:`Batch`; sources are scaled by 1/N (1/2 for the published pairs).

    Those in the background are not among the N; they are scaled as the others and added up.

    A mixture that is loaded when it is read (:class:`avsep.mixers.mixtures.TrainingMixtures`) goes to its place while
    it is still in the processor's cache. In a reader process the tensors are made in shared memory, where the training
    process finds them without a copy.
    """
    sources = torch.empty(0)
    visual: dict[str, torch.Tensor] = {}
    labels: list[list[tuple[int, int, bool, str, str]]] = []
    first: Source | None = None
    background: torch.Tensor | None = None
    for b, whole in enumerate(mixtures):
        mixture = [source for source in whole if source.role != "background"]
        if first is None:
            first = mixture[0]
            shape = (len(mixtures), len(mixture))
            sources = _empty((*shape, len(first.audio)), first.audio)  # [B, N, L]
            visual = {role: _empty((*shape, *array.shape), array) for role, array in first.visual.items()}
        for n, source in enumerate(mixture):
            np.divide(source.audio, np.float32(len(mixture)), out=sources.numpy()[b, n])
            for role, batch in visual.items():
                if source.visual[role].shape != batch.shape[2:]:
                    raise DataError(
                        f"clips '{first.clip.id}' and '{source.clip.id}' have {role} inputs of different shapes, "
                        f"{list(batch.shape[2:])} and {list(source.visual[role].shape)}: they cannot be in one batch"
                    )
                batch.numpy()[b, n] = source.visual[role]
        for source in whole:
            if source.role == "background":
                if background is None:
                    background = torch.zeros(len(mixtures), len(source.audio))
                background[b] += torch.from_numpy(source.audio) / len(mixture)
        labels.append([(s.class_id, s.clip.index, s.is_memory, s.clip.id, s.role) for s in mixture])
    seen, motion_seen = (
        torch.tensor([[not label[4].startswith(kinds) for label in m] for m in labels], dtype=torch.bool)
        for kinds in ("unseen", "photo")
    )
    return Batch(
        sources=sources,
        class_ids=torch.tensor([[label[0] for label in m] for m in labels], dtype=torch.int64),
        video_ids=torch.tensor([[label[1] for label in m] for m in labels], dtype=torch.int64),
        is_memory=torch.tensor([[label[2] for label in m] for m in labels], dtype=torch.bool),
        visual=VisualInputs(
            object=visual.get("object"),
            motion=visual.get("motion"),
            seen=None if bool(seen.all()) else seen,
            motion_seen=None if bool(motion_seen.all()) else motion_seen,
        ),
        clips=tuple(tuple(label[3] for label in m) for m in labels),
        background=background,
    )


def _empty(shape: Sequence[int], like: np.ndarray) -> torch.Tensor:
    dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype
    if get_worker_info() is None:
        return torch.empty(*shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * like.itemsize)  # as PyTorch's own collation does
    return torch.empty(0, dtype=dtype).set_(storage).view(*shape)


def load_mixtures(
    store: Store,
    mixtures: Sequence[TestMixture],
    front_end: FrontEndSpec,
    visual_sources: Sequence[VisualSource],
    class_index: dict[str, int],
) -> Batch:
    """Read frozen test mixtures as one batch. ``class_index`` maps class names to their indices in the separator."""
    by_id = {c.id: c for c in store.clips}
    rows = []
    for mixture in mixtures:
        sources = []
        gain = 10 ** (mixture.gain_db / 20)
        for clip_id, name, start, role in zip(
            mixture.clips,
            mixture.classes,
            mixture.starts,
            mixture.roles or ("source",) * len(mixture.clips),
            strict=True,
        ):
            if clip_id not in by_id:
                raise DataError(f"the protocol names clip '{clip_id}', which {store.path} does not have")
            if name not in class_index and role != "background":
                raise DataError(f"the protocol names class '{name}', which the separator has not learned")
            sources.append(
                load_source(
                    store,
                    by_id[clip_id],
                    start,
                    front_end,
                    visual_sources,
                    class_index.get(name, -1),
                    gain=gain,
                    role=role,
                    rt60_s=mixture.rt60_s,
                )
            )
        rows.append(sources)
    return collate(rows)

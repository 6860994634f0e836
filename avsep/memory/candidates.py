"""Candidates as the trained separator scores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from avsep.data.mixing import collate, load_source
from avsep.data.store import Clip, Store
from avsep.errors import NumericalError
from avsep.losses import separation_loss
from avsep.memory.base import Candidates, Weigh
from avsep.separator import Separator
from avsep.types import MaskOutput, move_to

__all__ = ["ScoredCandidates"]

_BANDS = 64
_BATCH = 8  # mixtures at a time; fixed, so that rounding does not depend on the batch size of training


class ScoredCandidates(Candidates):
    """The training clips of a finished task, scored by the separator that the task left.

    Each clip is scored once, on first use: its centre crop, mixed (each halved, gain 1) with the centre
    crop of a fixed partner, by the separator in evaluation mode, without gradients and in full precision. The partner
    of the i-th clip of a class is the clip i, counted in a circle, of the task's next class; of the next clip of its
    own class where the task has one class alone.

    A clip's feature is what CrossSDC compares: the audio, object and motion embeddings that the mask decoder gives for
    its source, each brought to length 1, joined and brought to length 1 again. Its mask error is the separation loss of
    its source.
    """

    def __init__(
        self,
        clips: Mapping[str, Sequence[Clip]],
        separator: Separator,
        store: Store,
        *,
        earlier: Mapping[str, int] | None = None,
        weigh: Weigh | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(clips, separator.spec.front_end, earlier=earlier, weigh=weigh)
        self.separator = separator
        self.store = store
        self.device = torch.device(device)
        self._scored: dict[str, tuple[np.ndarray, float]] = {}

    def features(self, ids: Sequence[str]) -> np.ndarray:
        self._score(ids)
        return np.stack([self._scored[i][0] for i in ids])

    def mask_error(self, ids: Sequence[str]) -> np.ndarray:
        self._score(ids)
        return np.array([self._scored[i][1] for i in ids])

    def profiles(self, ids: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(ids), _BANDS))
        for row, clip_id in enumerate(ids):
            audio = self.store.read_crop(self.clips[clip_id], self.centre(clip_id), self.front_end.clip_samples)
            power = np.square(np.abs(np.fft.rfft(audio)))
            found[row] = [float(band.sum()) for band in np.array_split(power, _BANDS)]
        largest = found.max(axis=1, keepdims=True)
        profiles: np.ndarray = np.divide(found, largest, out=np.zeros_like(found), where=largest > 0)
        return profiles

    def partner(self, clip_id: str) -> str:
        """The clip that another is mixed with."""
        names = list(self.ids)
        number = names.index(self.clips[clip_id].class_name)
        place = self.ids[names[number]].index(clip_id) + (len(names) == 1)
        others = self.ids[names[(number + 1) % len(names)]]
        return others[place % len(others)]

    @torch.no_grad()
    def _score(self, ids: Sequence[str]) -> None:
        # whole classes at a time, in one order: the batches do not depend on which clip comes first
        wanted = {self.clips[i].class_name for i in ids if i not in self._scored}
        for name in self.ids:
            if name in wanted:
                members = self.ids[name]
                for first in range(0, len(members), _BATCH):
                    self._score_batch(members[first : first + _BATCH])

    def _score_batch(self, ids: Sequence[str]) -> None:
        separator, index = self.separator, self.separator.class_index
        was_training = separator.training
        sources = separator.visual_sources()
        batch = move_to(
            collate(
                [
                    [
                        load_source(
                            self.store,
                            self.clips[i],
                            self.centre(i),
                            self.front_end,
                            sources,
                            index[self.clips[i].class_name],
                        )
                        for i in (clip_id, self.partner(clip_id))
                    ]
                    for clip_id in ids
                ]
            ),
            self.device,
        )
        separator.eval()
        try:
            found = separator.predict(batch)
        finally:
            separator.train(was_training)
        output = found.output
        embeddings = [e[:, 0].float() for e in (output.audio, output.object, output.motion) if e is not None]  # [B, D]
        joined = F.normalize(torch.cat([F.normalize(e, dim=1) for e in embeddings], dim=1), dim=1)
        first = torch.tensor([[True, False]], device=self.device)
        for b, clip_id in enumerate(ids):
            one = slice(b, b + 1)
            masks = MaskOutput(audio=output.audio[one], logits=output.logits[one])
            error = float(separation_loss(masks, found.spectrograms[one], counted=first))
            feature = joined[b].cpu().numpy()
            if not (np.isfinite(error) and np.isfinite(feature).all()):
                raise NumericalError(f"the separator's answer for clip '{clip_id}' is not finite: look at that clip")
            self._scored[clip_id] = (feature, error)

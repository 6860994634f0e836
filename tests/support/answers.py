"""Separators that answer with what a test tells them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from avsep.types import MaskOutput


class Stub:
    """Answers with ``answer(mixture, visual features, class ids)`` [B, N, L] instead of separating, and with
    ``presence(class ids, answer)`` where it is given; everything else is a real separator's.

    ``takes_unseen``: as if its decoder took sources without a picture. ``looks_itself``: it is given the visual input
    as it is, not what the encoders make of it.
    """

    def __init__(self, separator, answer, *, presence=None, takes_unseen=False, looks_itself=False):
        self._separator, self._answer, self._presence = separator, answer, presence
        self._looks_itself = looks_itself
        self.training = False
        self.can_go_unseen = self.takes_photos = takes_unseen
        self.mask_decoder = SimpleNamespace(
            takes_unseen=takes_unseen, tells_presence=presence is not None, presence_threshold=0.5
        )

    def __getattr__(self, name):
        return getattr(self._separator, name)

    def __call__(self, *args):
        return self._separator(*args)

    def to(self, device):
        return self

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def encode_visual(self, inputs):
        return inputs if self._looks_itself else self._separator.encode_visual(inputs)

    def separate_and_tell(self, mixture, visual, class_ids):
        answer = self._answer(mixture, visual, class_ids)
        presence = None if self._presence is None else self._presence(class_ids, answer)
        return answer, MaskOutput(audio=None, logits=torch.zeros(1), presence=presence)

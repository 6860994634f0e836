"""The classifier of separated spectrograms that Co-Separation learns beside its masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avsep.encoders._resnet import ResNet18

__all__ = ["SpectrogramClassifier"]


class SpectrogramClassifier(ResNet18):
    """ResNet-18 on a spectrogram with the maximum over its last map, and one row of ``fc`` a class.

    With 20 classes at width 64 it has 11,180,500 parameters. ``fc`` starts as N(0, 0.02), as in Co-Separation.
    """

    def __init__(self, *, num_classes: int, width: int = 64) -> None:
        super().__init__(in_channels=1, width=width)
        self.fc = self._rows(num_classes)

    def _rows(self, count: int) -> nn.Linear:
        fc = nn.Linear(self.channels, count)
        nn.init.normal_(fc.weight, 0.0, 0.02)
        return fc

    def grow(self, num_classes: int) -> None:
        """Rows for more classes; the old ones stay. The parameters are new objects afterwards."""
        old, new = self.fc, self._rows(num_classes - self.fc.out_features).to(self.fc.weight)
        grown = nn.Linear(self.channels, num_classes, device="meta")
        for name, before in old.named_parameters():
            rows = torch.cat((before.detach(), new.get_parameter(name).detach()))
            grown.register_parameter(name, nn.Parameter(rows, requires_grad=before.requires_grad))
        self.fc = grown

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> the vector before ``fc``, [B, 8*width]"""
        return F.adaptive_max_pool2d(self.features(spectrogram), 1).flatten(1)

"""A separator's graph as a function of any number of mixtures and sources, whatever its fixed shapes are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .transforms import istft, stft

__all__ = ["GraphCall"]

Array = NDArray[Any]
Audio = NDArray[np.float32]


@dataclass(frozen=True)
class GraphCall:
    """Calls a graph as often as its shapes demand.

    A graph of fixed shapes is given as many mixtures and sources at a time as it takes; where some are missing the last
    one is repeated, and what comes of the copies is dropped.

    Attributes:
        run: the graph: inputs by name -> its one output, which the next call may overwrite.
        spectral: both transforms are outside of the graph.
        transform: ``n_fft``, ``hop``, ``padding`` and ``clip_samples`` of those.
        batch, sources: what it takes at once; None where that is open.
        most_sources: in one call of a graph that leaves their number open; None: any number.
    """

    run: Callable[[dict[str, Array]], Array]
    spectral: bool
    transform: Mapping[str, Any]
    batch: int | None = None
    sources: int | None = None
    most_sources: int | None = None

    def __call__(self, mixture: Audio, of_sources: Mapping[str, Array]) -> Audio:
        """mixture [B, L], and by name the inputs [B, N, ...] of each source -> [B, N, L], a new array."""
        count, sources = next(iter(of_sources.values())).shape[:2]
        rows, width = self.batch or count, self.sources or min(sources, self.most_sources or sources)
        result = np.empty((count, sources, mixture.shape[1]), dtype=np.float32)
        for row in range(0, count, rows):
            those = np.minimum(np.arange(row, row + rows), count - 1)
            shared = self._analysed(mixture[those])
            for column in range(0, sources, width):
                of = np.arange(column, column + width if self.sources else min(column + width, sources))
                inputs = {name: value[those][:, np.minimum(of, sources - 1)] for name, value in of_sources.items()}
                part = result[row : row + rows, column : column + width]
                part[...] = self._synthesised(self.run({**shared, **inputs}))[: part.shape[0], : part.shape[1]]
        return result

    def _analysed(self, mixture: Audio) -> dict[str, Array]:
        """[B, L] -> the graph's first input: the same, or [B, 2, bins, T]."""
        if not self.spectral:
            return {"mixture": mixture}
        n_fft, hop, padding = (self.transform[name] for name in ("n_fft", "hop", "padding"))
        return {"spectrum": stft(mixture, n_fft=n_fft, hop=hop, padding=padding)}

    def _synthesised(self, output: Array) -> Array:
        """[B, N, L], or [B, N, 2, bins, T] -> [B, N, L]"""
        if not self.spectral:
            return output
        hop, length = self.transform["hop"], self.transform["clip_samples"]
        return np.clip(istft(output, hop=hop, length=length), -1, 1)

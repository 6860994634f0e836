"""A separator's graph as a function of any number of mixtures and sources, whatever its fixed shapes are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .manifest import PRESENCE
from .transforms import istft, stft

__all__ = ["GraphCall"]

Array = NDArray[Any]
Audio = NDArray[np.float32]


@dataclass(frozen=True)
class GraphCall:
    """Calls a graph as often as its shapes demand.

    A graph of fixed shapes is given as many mixtures and sources at a time as it takes; where some are missing the last
    one is repeated, and what comes of the copies is dropped. A graph of several channels is given a mono mixture in
    all of them, and one comes back.

    Attributes:
        run: the graph: inputs by name -> its outputs by name, which the next call may overwrite.
        spectral: both transforms are outside of the graph.
        transform: ``n_fft``, ``hop``, ``padding`` and ``clip_samples`` of those.
        batch, sources: what it takes at once; None where that is open.
        most_sources: in one call of a graph that leaves their number open; None: any number.
        channels: of its mixture.
    """

    run: Callable[[dict[str, Array]], Mapping[str, Array]]
    spectral: bool
    transform: Mapping[str, Any]
    batch: int | None = None
    sources: int | None = None
    most_sources: int | None = None
    channels: int = 1

    def __call__(self, mixture: Audio, of_sources: Mapping[str, Array]) -> Audio:
        """As :meth:`tell`, without what it tells of presence."""
        return self.tell(mixture, of_sources)[0]

    def tell(self, mixture: Audio, of_sources: Mapping[str, Array]) -> tuple[Audio, Audio | None]:
        """mixture [B, L] or [B, C, L], and by name the inputs [B, N, ...] of each source -> [B, N, L] or [B, N, C, L],
        and the presence [B, N] of each, None of a graph that does not tell; new arrays.

        Raises:
            ConfigError: C is neither 1 nor the graph's.
        """
        *_, channels, length = (1, *mixture.shape[1:])
        if channels not in (1, self.channels):
            raise ConfigError(f"the graph takes {self.channels} channels, not {channels}")
        given = mixture.reshape(len(mixture), channels, length)
        if channels < self.channels:
            given = np.broadcast_to(given, (len(mixture), self.channels, length))
        count, sources = next(iter(of_sources.values())).shape[:2]
        rows, width = self.batch or count, self.sources or min(sources, self.most_sources or sources)
        result = np.empty((count, sources, *mixture.shape[1:]), dtype=np.float32)
        presence: Audio | None = None
        for row in range(0, count, rows):
            those = np.minimum(np.arange(row, row + rows), count - 1)
            shared = self._analysed(given[those] if self.channels > 1 else given[those, 0])
            for column in range(0, sources, width):
                of = np.arange(column, column + width if self.sources else min(column + width, sources))
                inputs = {name: value[those][:, np.minimum(of, sources - 1)] for name, value in of_sources.items()}
                part = result[row : row + rows, column : column + width]
                outputs = self.run({**shared, **inputs})
                (estimate,) = (array for name, array in outputs.items() if name != PRESENCE)
                waveforms = self._synthesised(estimate)[: part.shape[0], : part.shape[1]]
                if self.channels > 1:
                    waveforms = waveforms[:, :, :channels]
                part[...] = waveforms.reshape(part.shape)
                if PRESENCE in outputs:
                    presence = np.empty((count, sources), dtype=np.float32) if presence is None else presence
                    told = outputs[PRESENCE][: part.shape[0], : part.shape[1]]
                    presence[row : row + rows, column : column + width] = told
        return result, presence

    def _analysed(self, mixture: Audio) -> dict[str, Array]:
        """[B, L] or [B, C, L] -> the graph's first input: the same, or [B, (C,) 2, bins, T]."""
        if not self.spectral:
            return {"mixture": mixture}
        n_fft, hop, padding = (self.transform[name] for name in ("n_fft", "hop", "padding"))
        return {"spectrum": stft(mixture, n_fft=n_fft, hop=hop, padding=padding)}

    def _synthesised(self, output: Array) -> Array:
        """[B, N, (C,) L], or [B, N, (C,) 2, bins, T] -> [B, N, (C,) L]"""
        if not self.spectral:
            return output
        hop, length = self.transform["hop"], self.transform["clip_samples"]
        return np.clip(istft(output, hop=hop, length=length), -1, 1)

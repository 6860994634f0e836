"""What contrastive losses are given of the vector that masks are made from."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

__all__ = ["CONTRAST_EMBEDDINGS", "ContrastEmbedding"]

CONTRAST_EMBEDDINGS = ("shared", "detached", "projected")


class ContrastEmbedding(nn.Module):
    """f_a as CrossSDC compares it: [B, N, D] -> [B, N, D].

    ``shared``: the masks' own vector, as published, so that the contrast pulls at the masks too. ``detached``: the
    same values without a gradient to the masks; the contrast then teaches the visual side alone. ``projected``: the
    vector through two layers of its own, so that what the contrast wants need not be what the masks want.
    """

    def __init__(self, kind: Literal["shared", "detached", "projected"], dim: int) -> None:
        super().__init__()
        if kind not in CONTRAST_EMBEDDINGS:
            raise ValueError(f"contrast_embedding must be one of {', '.join(CONTRAST_EMBEDDINGS)}, got {kind!r}")
        self.kind = kind
        # no module without parameters: separators that were stored before have none
        self.layers = (
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)) if kind == "projected" else None
        )

    def forward(self, embedding: Tensor) -> Tensor:
        if self.layers is not None:
            projected: Tensor = self.layers(embedding)
            return projected
        return embedding.detach() if self.kind == "detached" else embedding

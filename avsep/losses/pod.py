"""Local POD: distances between feature maps that are pooled along their rows and columns, at several scales."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pod_distance", "pod_embedding"]

FINEST = 4  # cells along a side at the finest of the scales 1, 2, 4


def pod_embedding(squares: Tensor) -> Tensor:
    """The pooled statistics of maps that have been squared.

    At scale s = 1, 2, 4 the map is cut into s x s cells of equal size; each cell gives, per channel, the mean over its
    width (one value a row) and over its height (one value a column). Where 4 does not divide a side, up to three last
    rows or columns are left out (the published code leaves them out too, at each scale those that it must).

    Args:
        squares: [B, C, H, W], elementwise squares of maps, or a difference of such.

    Returns:
        [B, 7 C (H + W)] with H and W rounded down to multiples of 4.

    Raises:
        ValueError: for a map of fewer than 4 rows or columns.

    References:
        Douillard et al., PLOP, CVPR 2021, equation 5; means where the paper has sums, as in its code.
    """
    height, width = squares.shape[-2:]
    if min(height, width) < FINEST:
        raise ValueError(f"local POD cuts maps into up to {FINEST} x {FINEST} cells, and got one of {height} x {width}")
    cells = squares[..., : height // FINEST * FINEST, : width // FINEST * FINEST]
    across = cells.unflatten(-1, (FINEST, -1)).mean(-1)  # [B, C, H, 4]: means over a cell's width
    down = cells.unflatten(-2, (FINEST, -1)).mean(-2)  # [B, C, 4, W]: over its height
    parts = []
    while True:
        parts += [across.flatten(1), down.flatten(1)]
        if across.shape[-1] == 1:
            return torch.cat(parts, dim=1)
        # the mean over a cell of a coarser scale is that of the two cells in it
        across = across.unflatten(-1, (-1, 2)).mean(-1)
        down = down.unflatten(-2, (-1, 2)).mean(-2)


def pod_distance(x: Tensor, y: Tensor) -> Tensor:
    """Batch mean of ||p(x) - p(y)||_2, with p the :func:`pod_embedding` of the maps' squares; computed in float32.

    p is linear in the squares, so they are subtracted first and pooled once.

    Args:
        x, y: [B, C, H, W]; detach the one that gets no gradient.

    Returns:
        A scalar. Equal maps are at distance 0 with gradient 0.
    """
    with torch.autocast(x.device.type, enabled=False):
        difference = x.float().square() - y.float().square()
        distances: Tensor = torch.linalg.vector_norm(pod_embedding(difference), dim=1)
        return distances.mean()

"""A mask decoder with one filter a class, which is solved for rather than learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from avsep.decoders.base import MaskDecoder
from avsep.registry import MASK_DECODERS
from avsep.types import AudioFeatures, MaskOutput, VisualFeatures

__all__ = ["RidgeFilters", "ridge"]

_LEAST = 1e-3  # of a solved mask and of what it lacks to 1, so that its logit is finite


@MASK_DECODERS.register(
    "ridge_filters",
    source="after Zhuang et al., G-ACIL: Analytic Learning for Exemplar-Free Generalized Class Incremental Learning, "
    "2024",
)
class RidgeFilters(MaskDecoder):
    """A mask is the mask features' sum with one vector of weights a class; no pictures are looked at.

    Until a class is solved for, its mask is sigmoid(u_c F), with a vector u_c that is learned; then clamp(v_c F, 0, 1),
    where v_c is the ridge regression of the ratio masks M on the mask features F, both weighted as in the loss,

        v_c = (A_c + g I)^-1 b_c,    A_c = sum w F F^T,    b_c = sum w F M.

    The sums are buffers, so that more mixtures may be added at any time. The strategy ``analytic_mask`` does.
    They take 4,224 bytes a class of 32 mask features, and what follows from them 129.

    Shapes:
        mask features [B, C, F, T], class_ids [B, N] -> logits [B, N, F, T], the vectors [B, N, C] as f_a.
    """

    needs = ("mask_features",)
    independent_sources = True
    takes_unseen = True
    differs = (
        "The original classifies frozen features with one matrix for all classes, updated recursively; a mask needs a "
        "vector a class, so the sums themselves are kept and solved by Cholesky."
    )

    gram: Tensor
    moment: Tensor
    solution: Tensor
    solved: Tensor

    def __init__(self, *, num_classes: int, mask_channels: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_vectors = nn.Parameter(torch.randn(num_classes, mask_channels) / math.sqrt(mask_channels))
        self.register_buffer("gram", torch.zeros(num_classes, mask_channels, mask_channels))
        self.register_buffer("moment", torch.zeros(num_classes, mask_channels))
        self.register_buffer("solution", torch.zeros(num_classes, mask_channels))
        self.register_buffer("solved", torch.zeros(num_classes, dtype=torch.bool))

    def grow(self, num_classes: int) -> None:
        super().grow(num_classes)
        old = self.class_vectors
        new = torch.randn(num_classes - len(old), old.shape[1]).to(old) / math.sqrt(old.shape[1])
        self.class_vectors = nn.Parameter(torch.cat((old.detach(), new)), requires_grad=old.requires_grad)
        for name in ("gram", "moment", "solution", "solved"):
            buffer = self.get_buffer(name)
            setattr(self, name, torch.cat((buffer, buffer.new_zeros(len(new), *buffer.shape[1:]))))

    def forward(self, audio: AudioFeatures, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        features = audio.mask_features
        assert features is not None
        solved = self.solved[class_ids][..., None]  # [B, N, 1]
        vectors = self.solution[class_ids].where(solved, self.class_vectors[class_ids])
        product = torch.unflatten(vectors @ features.flatten(2), 2, features.shape[2:])  # [B, N, F, T]
        # 8 bits hold nothing between .996 and 1: in them the largest mask would be 1, and its logit infinite
        product = product.to(torch.promote_types(product.dtype, torch.float32))
        mask = product.clamp(_LEAST, 1 - _LEAST)
        logits = (mask.log() - (1 - mask).log()).where(solved[..., None], product)
        return MaskOutput(audio=vectors, logits=logits)

    @torch.no_grad()
    def forget(self) -> None:
        """Begin anew: nothing is added, and nothing solved for."""
        for name in ("gram", "moment", "solution", "solved"):
            self.get_buffer(name).zero_()

    @torch.no_grad()
    def add(self, features: Tensor, weight: Tensor, ratio: Tensor, class_ids: Tensor) -> None:
        """Add mixtures to the sums, each in the mean over its pixels.

        Args:
            features: F [B, C, F, T].
            weight: w [B, 1, F, T].
            ratio: M [B, N, F, T], taken as at most 1.
            class_ids: [B, N].
        """
        flat = features.flatten(2).double()  # [B, C, P]
        weighted = flat * weight.flatten(2).double() / flat.shape[2]
        gram = weighted @ flat.transpose(1, 2)  # [B, C, C]
        moment = ratio.flatten(2).clamp(0.0, 1.0).double() @ weighted.transpose(1, 2)  # [B, N, C]
        sums = self.gram.double(), self.moment.double()
        sums[0].index_add_(0, class_ids.flatten(), gram.repeat_interleave(class_ids.shape[1], 0))
        sums[1].index_add_(0, class_ids.flatten(), moment.flatten(0, 1))
        self.gram.copy_(sums[0])
        self.moment.copy_(sums[1])

    @torch.no_grad()
    def solve(self, strength: float) -> None:
        """Solve for every class that something was added of, with g = ``strength`` times the mean of A's diagonal."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2).double().mean(dim=1)  # [Q]
        for number in (diagonal > 0).nonzero().flatten().tolist():
            own = self.gram[number].double(), self.moment[number].double()
            self.solution[number] = ridge(*own, strength * float(diagonal[number])).to(self.solution)
            self.solved[number] = True


def ridge(gram: Tensor, moment: Tensor, strength: float) -> Tensor:
    """(A + g I)^-1 b by Cholesky: ``gram`` A [C, C], ``moment`` b [C] -> [C]."""
    whole = gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.cholesky_solve(moment[:, None], torch.linalg.cholesky(whole))[:, 0]
    return solution

"""The processes that train one separator together, each on a device of its own and with an equal part of every batch.

DDP averages the gradients of all, so a loss is right where the *mean over the ranks* of what each computes is the loss
of the whole batch:

- a mean over the mixtures or sources of a rank's part needs nothing more, since the parts are equal;
- what compares across the batch is computed by every rank from :meth:`Ranks.gather`, through which the gradients of all
  ranks come back;
- a mean over chosen sources, of which ranks have different numbers, is weighed by their share
  (:meth:`avsep.strategies.Step.of_old`).

Where there is one process every method returns its argument.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avsep.errors import ConfigError

__all__ = ["ALONE", "Ranks", "is_lost", "synchronise_batch_norm"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """This process, number ``rank`` of ``world``. All ranks must call the methods alike and in one order."""

    rank: int = 0
    world: int = 1

    @property
    def several(self) -> bool:
        return self.world > 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each rank, equally many -> [world n, ...], in the order of the ranks.

        Backward sums what all ranks have for a row. Half precision becomes float32, so that nothing is lost there.
        """
        if not self.several:
            return x
        if x.is_floating_point():
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        gathered: Tensor = _Gather.apply(x, self.rank, self.world)  # type: ignore[no-untyped-call]  # torch's
        return gathered

    def part(self, whole: Tensor) -> Tensor:
        """The rows of the whole batch [world n, ...] that are this rank's: [n, ...]."""
        return whole.chunk(self.world)[self.rank] if self.several else whole

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, without a gradient."""
        if not self.several:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def all_gather(self, value: _T) -> list[_T]:
        """The plain values of all ranks, in rank order."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: _T) -> _T:
        """Rank 0's value (plain data and tensors on the CPU) on every rank."""
        if not self.several:
            return value
        box: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(box, 0)
        found: _T = box[0]
        return found

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite tensors with rank 0's of the same names, in place."""
        if self.several:
            for tensor in tensors.values():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.detach().copy_(whole)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.all_gather(None)


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    """All ranks' rows. Backward is the adjoint: the sum over the ranks of the gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank, ctx.world = rank, world
        parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(world)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(ctx.world)[ctx.rank], None, None


def is_lost(error: BaseException) -> bool:
    """Whether an error only says that another rank went away while this one waited for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


# --- batch normalisation --------------------------------------------------------------------------------------------


def synchronise_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Compute the statistics of batch normalisation in training mode over the batches of all ranks, from here on.

    Changes the class of those parts of ``module`` and nothing else: objects, parameters and their names stay. With one
    rank (:data:`ALONE`) the parts get their own class back.

    Raises:
        ConfigError: for a normalisation with a forward pass of its own, which cannot be synchronised.
    """
    for part in module.modules():
        if not isinstance(part, _BatchNorm):
            continue
        if isinstance(part, _Synchronised):
            if not ranks.several:
                part.__class__ = type(part).__bases__[1]
        elif ranks.several and not isinstance(part, nn.SyncBatchNorm):
            kind: Any = type(part)
            if kind.forward is not _BatchNorm.forward:
                raise ConfigError(
                    f"{kind.__name__} normalises a batch in its own way, which cannot be done over "
                    "several ranks: train with one process, or use nn.BatchNorm"
                )
            part.__class__ = _synchronised(kind)


@functools.cache
def _synchronised(kind: type[Any]) -> type[Any]:
    return type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})


class _Synchronised(_BatchNorm):
    """PyTorch's, and on the CPU a plain form of it: PyTorch has none there, and DDP refuses its class."""

    process_group = None  # all ranks; here, since ``__init__`` does not run
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if input.device.type != "cpu":
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:  # the plain mean of all batches
                share = 1.0 / float(self.num_batches_tracked)
        result: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]  # torch's
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, share or 0.0
        )
        return result


class _Normalise(torch.autograd.Function):
    """(x - m) / sqrt(v + eps) w + b with the mean and variance of all ranks' x [B, C, ...]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        share: float,
    ) -> Tensor:
        over = [d for d in range(x.ndim) if d != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, over, correction=0)
        count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64)
        own = torch.cat((mean.double(), variance.double(), count))
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        channels = x.shape[1]
        means, variances, counts = torch.stack(parts).split((channels, channels, 1), dim=1)
        total = counts.sum()
        mean64 = (means * counts).sum(0) / total
        variance64 = ((variances + (means - mean64).square()) * counts).sum(0) / total
        if running_mean is not None:
            running_mean.lerp_(mean64.to(running_mean.dtype), share)
        if running_var is not None:
            running_var.lerp_((variance64 * total / (total - 1)).to(running_var.dtype), share)
        scale = (variance64 + eps).rsqrt().to(wide.dtype)
        shape = [1, -1, *[1] * (x.ndim - 2)]
        standard = (wide - mean64.to(wide.dtype).view(shape)) * scale.view(shape)
        ctx.save_for_backward(standard, scale, weight)
        ctx.over, ctx.shape, ctx.count, ctx.dtype = over, shape, float(total), x.dtype
        result = standard if weight is None else standard * weight.view(shape)
        if bias is not None:
            result = result + bias.view(shape)
        normalised: Tensor = result.to(x.dtype)
        return normalised

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        standard, scale, weight = ctx.saved_tensors
        gradient = gradient.to(standard.dtype)
        of_bias, of_weight = gradient.sum(ctx.over), (gradient * standard).sum(ctx.over)
        both = torch.stack((of_bias, of_weight)).double()
        dist.all_reduce(both)  # the weights' own gradients stay this rank's: DDP averages them
        sums = (both / ctx.count).to(standard.dtype)
        if weight is not None:
            scale = scale * weight
        inner = gradient - sums[0].view(ctx.shape) - standard * sums[1].view(ctx.shape)
        found = (inner * scale.view(ctx.shape)).to(ctx.dtype)
        some = weight is not None
        return found, of_weight if some else None, of_bias if some else None, None, None, None, None

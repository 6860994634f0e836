"""Convolutions that train faster on CPUs: the same layers and weights, with the sums taken in a better order.

PyTorch's own convolution computes the gradient of wide weights at half the speed of its other two products. Here it is
one product of matrices. :func:`upsample_convolve` adds pixels after the products in place of before them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Conv2d", "ConvTranspose2d", "folded_kernel", "upsample_convolve", "upsampling_weight"]

WIDE = 64
"""Channels of its wider side from which a convolution counts as wide. Below, PyTorch's own gradient of the weights is
as fast (two AMD EPYC cores; the same from 4 to 16 mixtures)."""

_PATCH_BYTES = 16 << 20
"""Of the patches that one product of matrices reads: few enough to stay near the processor, and never much memory."""


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with square kernels and zero padding, faster to train on CPUs where it is wide."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_plain(self)
        self.weight = _channels_last(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']"""
        if _is_wide(x, self.weight):
            return _in_one_type(
                _WideConvolution, x, self.weight, self.bias, self.stride[0], int(self.padding[0]), False
            )
        return super().forward(x)


class ConvTranspose2d(nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with square kernels and no output padding, faster to train on CPUs where it is
    wide."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_plain(self)
        self.weight = _channels_last(self.weight)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']"""
        if output_size is None and _is_wide(x, self.weight):
            return _in_one_type(_WideConvolution, x, self.weight, self.bias, self.stride[0], int(self.padding[0]), True)
        return super().forward(x, output_size)


def upsample_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Nearest upsampling by 2, then a 3x3 convolution with padding 1 and without bias, at a fraction of the products.

    As one transposed convolution (:func:`folded_kernel`) it takes 4/9 of the multiplications. On CPUs a wide one takes
    1/4: upsampling is a convolution of the zero-stuffed input with a 2x2 box, and the order of two convolutions does
    not matter, so the 3x3 kernel goes first (a transposed convolution, stride 2), and sums of 2x2 end it.

    Args:
        x: [B, in, H, W]
        weight: [out, in, 3, 3]

    Returns:
        [B, out, 2H, 2W]
    """
    if _is_on_cpu(x) and weight.shape[1] >= WIDE:
        kernel = weight.permute(1, 2, 3, 0).contiguous().flip(1, 2).permute(0, 3, 1, 2)
        return _in_one_type(_UpsampleConvolution, x, kernel)
    return F.conv_transpose2d(x, folded_kernel(weight), stride=2, padding=1)


def upsampling_weight(in_channels: int, out_channels: int) -> nn.Parameter:
    """First weights [out, in, 3, 3] for :func:`upsample_convolve`: PyTorch's for that convolution, as published.

    In memory they stand as (in, row, column, out), the order that both of its ways want them in, so that no step turns
    them around.
    """
    weight = nn.Conv2d(in_channels, out_channels, 3, bias=False).weight.detach()
    return nn.Parameter(weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2))


def folded_kernel(weight: Tensor) -> Tensor:
    """The kernel of the transposed convolution (4, stride 2, padding 1) equal to nearest upsampling by 2 and a 3x3 one.

    Args:
        weight: [out, in, 3, 3], of the 3x3 convolution (stride 1, padding 1).

    Returns:
        [in, out, 4, 4]. Along each axis an output pixel sees two input pixels, and the taps that fall on the same
        input pixel add up, so K = A w with the 4x3 matrix A of :func:`_fold_axis`.
    """
    # Made in the order in, row, column, out, which is the layout that a channels-last convolution asks for.
    return _fold_axis(_fold_axis(weight.permute(1, 2, 3, 0), 1), 2).permute(0, 3, 1, 2)


def _fold_axis(weight: Tensor, dim: int) -> Tensor:
    """Multiply one axis of length 3 by A = [[0,0,1],[0,1,1],[1,1,0],[1,0,0]]; as sums, which autocast leaves alone."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)


def _check_plain(module: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Raise ValueError for what :class:`_WideConvolution` does not compute."""
    square = all(len(set(pair)) == 1 for pair in (module.kernel_size, module.stride, module.padding))
    plain = module.groups == 1 and set(module.dilation) == {1} and not any(module.output_padding)
    if not square or not plain or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"{module} is not square, or has groups, dilation or another padding: take torch.nn's")


def _channels_last(weight: Tensor) -> nn.Parameter:
    """The same weights in the order of memory that a channels-last convolution wants, which would copy them in every
    step."""
    return nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))


def _is_on_cpu(x: Tensor) -> bool:
    """Whether plain CPU code runs here: no graph is being recorded, whose compiler has ways of its own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_wide(x: Tensor, weight: Tensor) -> bool:
    """Whether :class:`_WideConvolution` is worth its while."""
    return (
        max(weight.shape[:2]) >= WIDE
        and min(weight.shape[:2]) > 1
        and weight.requires_grad
        and torch.is_grad_enabled()
        and _is_on_cpu(x)
    )


def _in_one_type(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Apply a function to tensors of the type that autocast wants, since autocast does not reach into it."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        arguments = tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in arguments)
    result: Tensor = function.apply(*arguments)
    return result


class _WideConvolution(torch.autograd.Function):
    """A convolution (or a transposed one) whose weights' gradient is a product of matrices."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = (stride, padding, transposed)
        function = F.conv_transpose2d if transposed else F.conv2d
        return function(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, transposed = ctx.settings
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _input_gradient(gradient, x, weight, stride, padding, transposed)
        if ctx.needs_input_grad[1]:
            small, large = (x, gradient) if transposed else (gradient, x)
            for_weight = _weight_gradient(small, large, weight.shape[-1], stride, padding)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum((0, 2, 3))
        return for_x, for_weight, for_bias, None, None, None


class _UpsampleConvolution(torch.autograd.Function):
    """A transposed convolution 3x3 with stride 2, and the sums of 2x2 of its result; the adjoint of these sums are such
    sums again, which PyTorch computes faster than its gradient of a pooling."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _sums_2x2(F.conv_transpose2d(x, kernel, stride=2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        gradient = _sums_2x2(gradient.contiguous(memory_format=torch.channels_last), padding=1)
        return (
            _input_gradient(gradient, x, kernel, 2, 0, True) if ctx.needs_input_grad[0] else None,
            _weight_gradient(x, gradient, 3, 2, 0) if ctx.needs_input_grad[1] else None,
        )


def _sums_2x2(x: Tensor, padding: int = 0) -> Tensor:
    return F.avg_pool2d(x, 2, stride=1, padding=padding, divisor_override=1)


def _input_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool
) -> Tensor | None:
    """PyTorch's, without the other gradients."""
    found: Tensor | None = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        transposed,
        [0, 0],
        1,
        [True, False, False],
    )[0]
    return found


def _weight_gradient(small: Tensor, large: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Sums of products of every pixel of the ``small`` map with the patch of the ``large`` one that it meets.

    Args:
        small: [B, A, H, W]: the gradient of a convolution's output, or a transposed convolution's input.
        large: [B, C, H', W']: a convolution's input, or the gradient of a transposed convolution's output.

    Returns:
        [A, C, kernel, kernel]
    """
    batch, _, height, width = small.shape
    small, large = small.permute(0, 2, 3, 1), large.permute(0, 2, 3, 1)  # channels last, as they lie in memory
    patch_bytes = height * width * large.shape[-1] * kernel**2 * large.element_size()
    count = max(1, _PATCH_BYTES // patch_bytes)
    total: Tensor | None = None
    for first in range(0, batch, count):
        pixels = small[first : first + count].flatten(0, 2)
        maps = large[first : first + count]
        if padding:
            maps = F.pad(maps, (0, 0, padding, padding, padding, padding))
        patches = maps.unfold(1, kernel, stride).unfold(2, kernel, stride)  # [b, H'', W'', C, kernel, kernel]
        patches = patches[:, :height, :width].permute(0, 1, 2, 4, 5, 3).reshape(len(pixels), -1)
        total = pixels.T @ patches if total is None else total.addmm_(pixels.T, patches)
    assert total is not None
    return total.view(len(total), kernel, kernel, -1).permute(0, 3, 1, 2)

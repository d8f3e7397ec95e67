"""Convolutions and linear layers as products of weights with inputs.

Such a layer is y = W x + b, linear in its weights and in its input. With gy = ∂L/∂y its gradient is
∂L/∂W = gy ⊗ x, and an attack that weighs it by a cotangent V needs the derivative of
⟨∂L/∂W, V⟩ = ⟨gy, V x⟩ by both factors: V x by gy, and Vᵀ gy by x. These are the layer itself and
its adjoint, with V in the place of W. torch's own second derivative of a convolution computes Vᵀ gy
as a convolution whose kernel is gy, which is as large as the image.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_convolution_backward = torch.ops.aten.convolution_backward
#: On the CPU a convolution with at most so many output positions in the whole batch is one matrix
#: product; the kernels for convolutions then mostly rearrange weights. The second number is for
#: kernels of 1x1, whose inputs need not be unfolded.
FEW_POSITIONS = 16, 64
#: For so few input channels, as images have, the adjoint is a matrix product and a sum of its
#: columns; the kernels for convolutions take twice as long.
FEW_CHANNELS = 4


@dataclass(frozen=True)
class Product:
    """Multiplies weights (C', C, kernel) with inputs (B, C, H, W) of one size, as a convolution."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_shape: tuple[int, int, int, int]
    #: Whether it is computed as one matrix product of unfolded inputs; needs one group.
    unfolded: bool = False

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        high, wide = (
            (length + 2 * pad - spread * (kernel - 1) - 1) // step + 1
            for length, kernel, step, pad, spread in zip(
                self.input_shape[2:], self.kernel, self.stride, self.padding, self.dilation,
                strict=True,
            )
        )  # fmt: skip
        return high, wide

    def operands(self, x: Tensor) -> Tensor:
        """Return the input as `apply` and `outer` take it: one row per position, or as it is."""
        if not self.unfolded:
            return x
        if self._keeps_positions:
            return _rows(x)
        columns = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        return columns.transpose(1, 2).flatten(0, 1)

    def apply(self, operands: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return W x + b, (B, C', H', W')."""
        if not self.unfolded:
            return F.conv2d(
                operands, weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
        return self._images(F.linear(operands, weight.flatten(1), bias), *self.output_size)

    def adjoint(self, gy: Tensor, weight: Tensor) -> Tensor:
        """Return Wᵀ gy, shaped like the input."""
        if self.unfolded:
            rows = _rows(gy) @ weight.flatten(1)
            if self._keeps_positions:
                return self._images(rows, *self.input_shape[2:])
            columns = rows.view(len(gy), math.prod(self.output_size), rows.shape[1]).transpose(1, 2)
            return self._folded(columns)
        if self._few_channels(gy):
            return self._folded(weight.flatten(1).t() @ gy.flatten(2))
        return self._backward(gy, gy.new_empty(1).expand(self.input_shape), weight, 0)

    def _folded(self, columns: Tensor) -> Tensor:
        """Sum columns into images; `F.fold` would keep memory as large as the columns for them."""
        images = columns.new_empty(self.input_shape)
        return torch.ops.aten.col2im.out(
            columns, self.input_shape[2:], self.kernel, self.dilation, self.padding, self.stride,
            out=images,
        )  # fmt: skip

    def _few_channels(self, gy: Tensor) -> bool:
        few = self.input_shape[1] <= FEW_CHANNELS and self.groups == 1
        return few and gy.device.type != "cuda"

    def outer(self, operands: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
        """Return gy ⊗ x, the gradient by the weights, shaped like `weight`."""
        if not self.unfolded:
            return self._backward(gy, operands, weight, 1)
        return (_rows(gy).t() @ operands).view(weight.shape)

    @property
    def _keeps_positions(self) -> bool:
        """Whether every output position has one input position, the same."""
        return (*self.kernel, *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)

    def _images(self, rows: Tensor, high: int, wide: int) -> Tensor:
        """Return one row per position as images, in memory of their own."""
        images = rows.view(self.input_shape[0], high * wide, rows.shape[1]).transpose(1, 2)
        return images.unflatten(2, (high, wide)).clone(memory_format=torch.contiguous_format)

    def _backward(self, gy: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        return _convolution_backward(
            gy, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0],
            self.groups, [which == 0, which == 1, False],
        )[which]  # fmt: skip


def _rows(y: Tensor) -> Tensor:
    """Return (B, C, H, W) as one row of C values per position."""
    return y.flatten(2).transpose(1, 2).flatten(0, 1)


def product_of_linear(rows: int, inputs: int) -> Product:
    """Return how a linear layer multiplies `rows` vectors, as images of one pixel."""
    return Product((1, 1), (1, 1), (0, 0), (1, 1), 1, (rows, inputs, 1, 1), unfolded=True)


def product_of(layer: nn.Conv2d, x: Tensor) -> tuple[Product, tuple[slice, ...]]:
    """Return how a convolution multiplies inputs like `x`, and by which part of its weights.

    Where images are small a tap of the kernel may meet nothing but padding, at every position. Its
    weights take no part in the output and their gradient is 0: the product leaves them out.
    """
    assert not isinstance(layer.padding, str)
    batch, channels, high, wide = x.shape
    product = Product(
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
        (batch, channels, high, wide),
    )  # fmt: skip
    rows, columns = (_met(product, axis) for axis in (0, 1))
    start = (rows.start, columns.start)
    smaller = replace(
        product,
        kernel=(rows.stop - rows.start, columns.stop - columns.start),
        padding=tuple(
            pad - spread * first
            for pad, spread, first in zip(product.padding, product.dilation, start, strict=True)
        ),
    )
    part: tuple[slice, ...] = (slice(None), slice(None), rows, columns)
    if min(smaller.padding) < 0 or smaller.output_size != product.output_size:
        smaller, part = product, (slice(None),) * 4
    few = FEW_POSITIONS[smaller.kernel == (1, 1)]
    unfolded = (
        x.device.type != "cuda"
        and layer.groups == 1
        and batch * math.prod(smaller.output_size) <= few
    )
    return replace(smaller, unfolded=unfolded), part


def _met(product: Product, axis: int) -> slice:
    """Return which taps of the kernel meet the input along an axis, at some position."""
    length, step, spread = (
        product.input_shape[2 + axis], product.stride[axis], product.dilation[axis]
    )  # fmt: skip
    starts = [step * at - product.padding[axis] for at in range(product.output_size[axis])]
    met = [
        tap
        for tap in range(product.kernel[axis])
        if any(0 <= start + tap * spread < length for start in starts)
    ]
    return slice(met[0], met[-1] + 1) if met else slice(0, product.kernel[axis])

"""Gaussians over images whose precision matrices couple only pixels of nearby rows.

Three kinds of factors make the precision matrix: measurements of a convolution's outputs and of
single pixels, here, and of differences of neighbouring pixels, in `stencils.py`. With blocks of at
least k − 1 rows (k the height of the convolution's kernel) it is block tridiagonal. In the matrices
a row's channels stand beside each other, (H, C, W): the pixels of a block of rows are then
contiguous, and so are those that a row of outputs depends on. A `Geometry` says how the
convolution moves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inversion.layerwise.convolution import Geometry
from inversion.layerwise.stem.block_tridiagonal import BlockTridiagonal

#: The least rows of a block, and the farthest that a difference of pixels may reach down.
LEAST_BLOCK = 2


@dataclass(frozen=True)
class Grid:
    """Describes an image and its division into blocks of rows."""

    #: Height of the image.
    rows: int
    #: Channels of the image.
    channels: int
    #: Width of the image.
    columns: int
    #: Rows of a block; the last block may have fewer.
    block: int

    @property
    def row_size(self) -> int:
        """Return how many pixel values a row holds."""
        return self.channels * self.columns

    def height(self, j: int) -> int:
        """Return how many rows block j holds."""
        return min(self.block, self.rows - j * self.block)

    def sizes(self) -> list[int]:
        """Return how many pixel values each block holds."""
        count = -(-self.rows // self.block)
        return [self.height(j) * self.row_size for j in range(count)]


def grid_for(image_shape: tuple[int, int, int], conv: Geometry) -> Grid:
    """Divide images (C, H, W) for a convolution."""
    channels, rows, columns = image_shape
    return Grid(rows, channels, columns, min(rows, max(conv.kernel[0] - 1, LEAST_BLOCK)))


def _row_range(grid: Grid, conv: Geometry, i: int) -> tuple[int, int, int]:
    """Return what row i of the outputs sees: its first row, its last plus one, rows cut above."""
    top = i * conv.stride[0] - conv.padding[0]
    return max(top, 0), min(top + conv.kernel[0], grid.rows), max(-top, 0)


def _strip(grid: Grid, conv: Geometry, columns: int) -> tuple[tuple[int, int, int], list[slice]]:
    """Lay out all that a row of outputs sees: its shape (rows, C, columns), and each output's part.

    The columns of the image and of its padding; each output sees a slice of them.
    """
    height, width = conv.kernel
    starts = [j * conv.stride[1] for j in range(columns)]
    whole = max(starts[-1] + width, conv.padding[1] + grid.columns)
    return (height, grid.channels, whole), [slice(start, start + width) for start in starts]


def _pieces(
    matrix: BlockTridiagonal, grid: Grid, first: int, end: int
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Split rows first to end (of two adjacent blocks at most) of a matrix into its blocks.

    Yields (view of a block, row slice, column slice) with slices of pixel values counted from the
    first row: the parts on and below the diagonal.
    """
    j, size = first // grid.block, grid.row_size
    split = min(end, (j + 1) * grid.block)
    start = (first - j * grid.block) * size
    upper, lower = (split - first) * size, (end - split) * size
    yield matrix.diagonal[j][:, start:, start:][:, :upper, :upper], slice(upper), slice(upper)
    if lower:
        below = slice(upper, upper + lower)
        yield matrix.lower[j][:, :lower, start:], below, slice(upper)
        yield matrix.diagonal[j + 1][:, :lower, :lower], below, below


def _patch_weight(weight: Tensor) -> Tensor:
    """Return the weight (O, C, k, l) with a window's values in the order of a strip: (O, k·C·l)."""
    return weight.transpose(1, 2).flatten(1)


def add_convolution(
    matrix: BlockTridiagonal, grid: Grid, weight: Tensor, conv: Geometry, tau: Tensor
) -> None:
    """Add Jᵀ diag(τ) J to a precision matrix in place, J the Jacobian of the convolution.

    weight: (O, C, k, l); tau: (B, O, h, w) precisions of the outputs.
    """
    flat = _patch_weight(weight)
    batch, _, rows, columns = tau.shape
    side, parts = _strip(grid, conv, columns)
    inner = slice(conv.padding[1], conv.padding[1] + grid.columns)
    patch = (conv.kernel[0], grid.channels, conv.kernel[1])
    for i in range(rows):
        first, end, cut = _row_range(grid, conv, i)
        if end <= first:
            continue
        scaled = tau[:, :, i].mT.unsqueeze(2) * flat.T  # (B, w, k·C·l, O)
        products = (scaled.flatten(0, 2) @ flat).view(batch, columns, *patch, *patch)
        strip = tau.new_zeros(batch, *side, *side)
        for j, seen in enumerate(parts):
            strip[:, :, :, seen, :, :, seen] += products[:, j]
        kept = slice(cut, cut + end - first)
        part = strip[:, kept, :, inner, kept, :, inner].flatten(4).flatten(1, 3)
        for block, down, right in _pieces(matrix, grid, first, end):
            block += part[:, down, right]


def convolution_variance(
    covariance: BlockTridiagonal,
    grid: Grid,
    weight: Tensor,
    conv: Geometry,
    map_shape: tuple[int, int],
) -> Tensor:
    """Return the variance of each output of a convolution: (B, O, h, w).

    covariance: blocks of the pixels' covariance on and next to the diagonal; map_shape: (h, w).
    """
    flat = _patch_weight(weight)
    rows, columns = map_shape
    batch = len(covariance.diagonal[0])
    side, parts = _strip(grid, conv, columns)
    inner = slice(conv.padding[1], conv.padding[1] + grid.columns)
    variance = weight.new_zeros(batch, len(weight), rows, columns)
    for i in range(rows):
        first, end, cut = _row_range(grid, conv, i)
        if end <= first:
            continue
        count, size = end - first, (end - first) * grid.row_size
        part = weight.new_empty(batch, size, size)
        for block, down, right in _pieces(covariance, grid, first, end):
            part[:, down, right] = block
            part[:, right, down] = block.mT
        strip = weight.new_zeros(batch, *side, *side)
        kept = slice(cut, cut + count)
        own = (count, grid.channels, grid.columns)
        strip[:, kept, :, inner, kept, :, inner] = part.view(batch, *own, *own)
        patches = torch.stack([strip[:, :, :, seen, :, :, seen] for seen in parts], 1)
        products = patches.reshape(-1, flat.shape[1]) @ flat.T
        products = products.view(batch, columns, flat.shape[1], len(flat)) * flat.T
        variance[:, :, i] = products.sum(2).mT
    return variance


def flatten(images: Tensor) -> Tensor:
    """Return the pixels of images (B, C, H, W) in the order of the matrices: (B, H·C·W)."""
    return images.transpose(1, 2).flatten(1)


def unflatten(pixels: Tensor, grid: Grid) -> Tensor:
    """Return images (B, C, H, W) from pixels (B, H·C·W) in the order of the matrices."""
    return pixels.unflatten(1, (grid.rows, grid.channels, grid.columns)).transpose(1, 2)


def add_pixels(matrix: BlockTridiagonal, grid: Grid, precision: Tensor) -> None:
    """Add the precisions (B, C, H, W) of single pixels to a precision matrix in place."""
    parts = flatten(precision).split(grid.sizes(), 1)
    for block, part in zip(matrix.diagonal, parts, strict=True):
        block.diagonal(dim1=1, dim2=2).add_(part)


def pixel_variance(covariance: BlockTridiagonal, grid: Grid) -> Tensor:
    """Return the variances of single pixels: (B, C, H, W)."""
    parts = [block.diagonal(dim1=1, dim2=2) for block in covariance.diagonal]
    return unflatten(torch.cat(parts, 1), grid)

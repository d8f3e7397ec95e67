"""Gaussians over images whose precision matrices couple only pixels of nearby rows.

Three kinds of factors make the precision matrix: measurements of a convolution's outputs,
measurements of single pixels, and differences of neighbouring pixels. With blocks of at least
k − 1 rows (k the convolution's kernel) it is block tridiagonal. Images are (B, H, C, W) here: the
pixels of a block of rows are then contiguous, and so are those that a row of outputs depends on.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.layerwise import block_tridiagonal
from inversion.layerwise.block_tridiagonal import BlockTridiagonal

#: Rows down and columns right to a pixel's neighbours. Each pair of neighbours occurs once.
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class Convolution:
    """Describes a square convolution without dilation and groups, padded with zeros."""

    #: Distance between the windows of adjacent outputs.
    stride: int
    #: Rows and columns of zeros added at every border.
    padding: int


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


def grid_for(image_shape: tuple[int, int, int], kernel: int) -> Grid:
    """Divide images (C, H, W) for a convolution with the given kernel."""
    channels, rows, columns = image_shape
    return Grid(rows, channels, columns, min(rows, max(kernel - 1, 1)))


def _row_range(grid: Grid, conv: Convolution, kernel: int, i: int) -> tuple[int, int, int]:
    """Return what row i of the outputs sees: its first row, its last plus one, rows cut above."""
    top = i * conv.stride - conv.padding
    return max(top, 0), min(top + kernel, grid.rows), max(-top, 0)


def _pieces(matrix: BlockTridiagonal, grid: Grid, first: int, end: int):
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
    """Return the weight (O, C, k, k) with a window's values in the order of a strip: (O, k·C·k)."""
    return weight.transpose(1, 2).flatten(1)


def add_convolution(
    matrix: BlockTridiagonal, grid: Grid, weight: Tensor, conv: Convolution, tau: Tensor
) -> None:
    """Add Jᵀ diag(τ) J to a precision matrix in place, J the Jacobian of the convolution.

    weight: (O, C, k, k); tau: (B, O, h, w) precisions of the outputs.
    """
    kernel, flat = weight.shape[-1], _patch_weight(weight)
    batch, _, rows, columns = tau.shape
    width = max((columns - 1) * conv.stride + kernel, conv.padding + grid.columns)
    patch = (kernel, grid.channels, kernel)
    for i in range(rows):
        first, end, cut = _row_range(grid, conv, kernel, i)
        if end <= first:
            continue
        scaled = tau[:, :, i].mT.unsqueeze(2) * flat.T  # (B, w, k·C·k, O)
        products = (scaled.flatten(0, 2) @ flat).view(batch, columns, *patch, *patch)
        strip = tau.new_zeros(batch, kernel, grid.channels, width, kernel, grid.channels, width)
        for j in range(columns):
            seen = slice(j * conv.stride, j * conv.stride + kernel)
            strip[:, :, :, seen, :, :, seen] += products[:, j]
        kept, inner = slice(cut, cut + end - first), slice(conv.padding, conv.padding + grid.columns)
        part = strip[:, kept, :, inner, kept, :, inner].flatten(4).flatten(1, 3)
        for block, down, right in _pieces(matrix, grid, first, end):
            block += part[:, down, right]


def convolution_variance(
    covariance: BlockTridiagonal,
    grid: Grid,
    weight: Tensor,
    conv: Convolution,
    map_shape: tuple[int, int],
) -> Tensor:
    """Return the variance of each output of a convolution: (B, O, h, w).

    covariance: blocks of the pixels' covariance on and next to the diagonal; map_shape: (h, w).
    """
    kernel, flat = weight.shape[-1], _patch_weight(weight)
    rows, columns = map_shape
    batch = len(covariance.diagonal[0])
    width = max((columns - 1) * conv.stride + kernel, conv.padding + grid.columns)
    variance = weight.new_zeros(batch, len(weight), rows, columns)
    for i in range(rows):
        first, end, cut = _row_range(grid, conv, kernel, i)
        if end <= first:
            continue
        count, size = end - first, (end - first) * grid.row_size
        part = weight.new_empty(batch, size, size)
        for block, down, right in _pieces(covariance, grid, first, end):
            part[:, down, right] = block
            part[:, right, down] = block.mT
        strip = weight.new_zeros(batch, kernel, grid.channels, width, kernel, grid.channels, width)
        kept, inner = slice(cut, cut + count), slice(conv.padding, conv.padding + grid.columns)
        side = (count, grid.channels, grid.columns)
        strip[:, kept, :, inner, kept, :, inner] = part.view(batch, *side, *side)
        starts = [slice(j * conv.stride, j * conv.stride + kernel) for j in range(columns)]
        patches = torch.stack([strip[:, :, :, seen, :, :, seen] for seen in starts], 1)
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


def _entry_views(matrix: BlockTridiagonal, grid: Grid, step: tuple[int, int]):
    """Yield (first row, view) of a matrix' entries between pixels and their neighbours.

    A view is (B, C, C', rows, columns): the entries between channel C' of the pixels, from the
    first row on, and channel C of the pixels `step` (rows down, columns right) from them. Pixels
    without such a neighbour are left out.
    """
    down, right = step
    side = (grid.channels, grid.columns)

    def view(block: Tensor, offset: int) -> Tensor:
        split = block.unflatten(2, (-1, *side)).unflatten(1, (-1, *side))
        return split.diagonal(offset, 1, 4).diagonal(-right, 2, 4)

    for j, block in enumerate(matrix.diagonal):
        if grid.height(j) > down:
            yield j * grid.block, view(block, -down)
    if down:
        for j, block in enumerate(matrix.lower):
            yield (j + 1) * grid.block - 1, view(block, grid.height(j) - 1)


def _entries(matrix: BlockTridiagonal, grid: Grid, step: tuple[int, int]) -> Tensor:
    """Return a matrix' entries between all pixels and their neighbours: (B, C, C', rows, columns)."""
    down, right = step
    shape = (grid.channels, grid.channels, grid.rows - down, grid.columns - abs(right))
    found = matrix.diagonal[0].new_zeros(len(matrix.diagonal[0]), *shape)
    for first, view in _entry_views(matrix, grid, step):
        found[:, :, :, first : first + view.shape[3]] = view
    return found


def _ends(values: Tensor, step: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return (..., H, W) values at the neighbours and at the pixels of all pairs `step` apart."""
    down, right = step
    rows, columns = values.shape[-2:]
    columns -= abs(right)
    start, neighbour = max(-right, 0), max(right, 0)
    return (
        values[..., down:, neighbour : neighbour + columns],
        values[..., : rows - down, start : start + columns],
    )


def differences(images: Tensor, colours: Tensor, step: tuple[int, int]) -> Tensor:
    """Return each neighbour minus its pixel, in other colours: (B, C, rows, columns).

    images: (B, C, H, W); colours: (C, C), whose rows are the colours; step: see NEIGHBOURS.
    """
    neighbour, pixel = _ends(torch.einsum("kc,bchw->bkhw", colours, images), step)
    return neighbour - pixel


def difference_variance(
    covariance: BlockTridiagonal, grid: Grid, colours: Tensor, step: tuple[int, int]
) -> Tensor:
    """Return the variances of `differences`: (B, C, rows, columns)."""
    cross = _entries(covariance, grid, step)
    neighbour, pixel = _ends(_entries(covariance, grid, (0, 0)), step)
    total = neighbour + pixel - cross - cross.transpose(1, 2)
    return torch.einsum("kc,bcdrw,kd->bkrw", colours, total, colours)


def add_differences(
    matrix: BlockTridiagonal, grid: Grid, colours: Tensor, step: tuple[int, int], precision: Tensor
) -> None:
    """Add the precisions (B, C, rows, columns) of `differences` to a precision matrix in place."""
    coupling = torch.einsum("kc,bkrw,kd->bcdrw", colours, precision, colours)
    for first, view in _entry_views(matrix, grid, step):
        part = coupling[:, :, :, first : first + view.shape[3]]
        view -= part
    transposed = BlockTridiagonal(tuple(block.mT for block in matrix.diagonal), ())
    for first, view in _entry_views(transposed, grid, step):
        part = coupling[:, :, :, first : first + view.shape[3]]
        view -= part
    own = coupling.new_zeros(*coupling.shape[:3], grid.rows, grid.columns)
    for end in _ends(own, step):
        end += coupling
    for first, view in _entry_views(matrix, grid, (0, 0)):
        view += own[:, :, :, first : first + view.shape[3]]

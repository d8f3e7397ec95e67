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

#: Pixels that a difference combines: rows down (≥ 0), columns right, factor.
Stencil = tuple[tuple[int, int, float], ...]

#: The least rows of a block, which is also the farthest that a stencil may reach down.
LEAST_BLOCK = 2


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
    return Grid(rows, channels, columns, min(rows, max(kernel - 1, LEAST_BLOCK)))


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
    """Yield (first row, view) of a matrix' entries between pixels and others `step` from them.

    step: rows down (0 to LEAST_BLOCK), columns right. A view is (B, C, C', rows, columns): the
    entries between channel C' of the pixels, from the first row on, and channel C of the pixels
    `step` from them. Pixels whose partner lies outside the image are left out.
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
            yield (j + 1) * grid.block - down, view(block, grid.block - down)


def _entries(matrix: BlockTridiagonal, grid: Grid, step: tuple[int, int]) -> Tensor:
    """Return all entries of `_entry_views`: (B, C, C', rows, columns)."""
    down, right = step
    shape = (grid.channels, grid.channels, grid.rows - down, grid.columns - abs(right))
    found = matrix.diagonal[0].new_zeros(len(matrix.diagonal[0]), *shape)
    for first, view in _entry_views(matrix, grid, step):
        found[:, :, :, first : first + view.shape[3]] = view
    return found


def stencil_shape(grid: Grid, stencil: Stencil) -> tuple[int, int]:
    """Return in how many rows and columns of an image the stencil fits."""
    right = [tap[1] for tap in stencil]
    return grid.rows - max(tap[0] for tap in stencil), grid.columns - max(right) + min(right)


def differences(images: Tensor, grid: Grid, colours: Tensor, stencil: Stencil) -> Tensor:
    """Return the stencil's combinations of pixels, in other colours: (B, C, rows, columns).

    images: (B, C, H, W); colours: (C, C), whose rows are the colours.
    """
    rows, columns = stencil_shape(grid, stencil)
    leftmost = min(tap[1] for tap in stencil)
    total = images.new_zeros(*images.shape[:2], rows, columns)
    for down, right, factor in stencil:
        start = right - leftmost
        total += factor * images[:, :, down : down + rows, start : start + columns]
    return torch.einsum("kc,bchw->bkhw", colours, total)


def _pairs(grid: Grid, stencil: Stencil):
    """Yield, per pair of a stencil's taps, their step, product and place among the entries.

    The place is the rows and columns of `_entries` of that step. Of the two orders of different
    taps only the one with a step down, or right in the same row, occurs.
    """
    rows, columns = stencil_shape(grid, stencil)
    leftmost = min(tap[1] for tap in stencil)
    for down, right, factor in stencil:
        for other_down, other_right, other_factor in stencil:
            step = (other_down - down, other_right - right)
            if step >= (0, 0):
                start = right - leftmost - max(-step[1], 0)
                place = slice(down, down + rows), slice(start, start + columns)
                yield step, factor * other_factor, place


def difference_variance(
    covariance: BlockTridiagonal, grid: Grid, colours: Tensor, stencil: Stencil
) -> Tensor:
    """Return the variances of `differences`: (B, C, rows, columns)."""
    total: Tensor | float = 0.0
    for step, factor, (rows, columns) in _pairs(grid, stencil):
        entries = factor * _entries(covariance, grid, step)[..., rows, columns]
        total = total + (entries if step == (0, 0) else entries + entries.transpose(1, 2))
    return torch.einsum("kc,bcdrw,kd->bkrw", colours, total, colours)


def add_differences(
    matrix: BlockTridiagonal, grid: Grid, colours: Tensor, stencil: Stencil, precision: Tensor
) -> None:
    """Add the precisions (B, C, rows, columns) of `differences` to a precision matrix in place."""
    coupling = torch.einsum("kc,bkrw,kd->bcdrw", colours, precision, colours)
    sums: dict[tuple[int, int], Tensor] = {}
    for step, factor, (rows, columns) in _pairs(grid, stencil):
        shape = grid.rows - step[0], grid.columns - abs(step[1])
        total = sums.setdefault(step, coupling.new_zeros(*coupling.shape[:3], *shape))
        total[..., rows, columns] += factor * coupling
    transposed = BlockTridiagonal(tuple(block.mT for block in matrix.diagonal), ())
    for step, total in sums.items():
        # Blocks on the diagonal hold both orders of a pair, blocks below it only one.
        for part in (matrix,) if step == (0, 0) else (matrix, transposed):
            for first, view in _entry_views(part, grid, step):
                view += total[:, :, :, first : first + view.shape[3]]

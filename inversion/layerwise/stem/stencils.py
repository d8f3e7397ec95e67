"""Differences of neighbouring pixels under a Gaussian of `grid_gaussian.py`.

A stencil combines a pixel with others near it. Its combinations are taken at all places where it
fits into the image, and in a basis of colours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from inversion.layerwise.stem.block_tridiagonal import BlockTridiagonal
from inversion.layerwise.stem.grid_gaussian import Grid

#: The pixels that a difference combines: rows down (0 to LEAST_BLOCK), columns right, factor.
Stencil = tuple[tuple[int, int, float], ...]


def _entry_views(
    matrix: BlockTridiagonal, grid: Grid, step: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
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


def _pairs(
    grid: Grid, stencil: Stencil
) -> Iterator[tuple[tuple[int, int], float, tuple[slice, slice]]]:
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

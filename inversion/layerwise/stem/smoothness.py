"""What photographs are like: a prior on differences of neighbouring pixels.

Pixels run from 0 to 1. Differences are taken in a luminance and two opponent colours, which are
nearly independent in photographs, and follow a Student t distribution: most are small, edges are
large. Its variational approximation is a Gaussian per difference, whose precision is fitted to the
difference's posterior in every round.
"""

import torch
from torch import Tensor

from inversion.layerwise.stem.block_tridiagonal import BlockTridiagonal
from inversion.layerwise.stem.grid_gaussian import Grid
from inversion.layerwise.stem.stencils import (
    Stencil,
    add_differences,
    difference_variance,
    differences,
    stencil_shape,
)

#: Rows: luminance, red against blue, green against both; of images with three channels.
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
#: Differences to the neighbours right, below and on both diagonals, and their weights.
STENCILS: tuple[tuple[Stencil, float], ...] = (
    (((0, 0, -1.0), (0, 1, 1.0)), 1.0),
    (((0, 0, -1.0), (1, 0, 1.0)), 1.0),
    (((0, 0, -1.0), (1, 1, 1.0)), 0.5),
    (((0, 0, -1.0), (1, -1, 1.0)), 0.5),
)
#: Root mean square of the differences of the public photographs at 32 pixels, per colour.
DEVIATIONS = (0.18, 0.06, 0.03)
#: Scale of the Student t distributions, per colour.
SCALES = (0.011, 0.0045, 0.0045)
#: Factors of the precisions. Differences of four directions overlap, so each counts in part.
GAUSSIAN_FACTOR, STUDENT_FACTOR = 0.35, 0.7
#: How far a colour's squared difference is replaced by the mean over all colours, each relative to
#: its deviation: edges occur in all colours at the same places.
SHARED = 0.3
#: Mean and precision of single pixels, which hardly restrict them.
LEVEL, LEVEL_PRECISION = 0.45, 0.2


def colours(channels: int, like: Tensor) -> Tensor:
    """Return orthonormal colours (C, C) in rows; for other than three channels the channels."""
    if channels != len(COLOURS):
        return torch.eye(channels, dtype=like.dtype, device=like.device)
    rows = like.new_tensor(COLOURS)
    return rows / rows.norm(dim=1, keepdim=True)


def _per_colour(values: tuple[float, ...], grid: Grid, like: Tensor) -> Tensor:
    """Return values (1, C, 1, 1); without opponent colours all are the luminance's."""
    chosen = values if grid.channels == len(values) else values[:1] * grid.channels
    return like.new_tensor(chosen).view(1, -1, 1, 1)


def gaussian_precisions(batch: int, grid: Grid, like: Tensor) -> list[Tensor]:
    """Return precisions of differences before anything is known: per stencil (B, C, rows, columns).

    They are those of differences with the deviations of public photographs.
    """
    own = GAUSSIAN_FACTOR / _per_colour(DEVIATIONS, grid, like).square()
    return [
        (weight * own).expand(batch, -1, *stencil_shape(grid, stencil))
        for stencil, weight in STENCILS
    ]


def student_precisions(images: Tensor, covariance: BlockTridiagonal, grid: Grid) -> list[Tensor]:
    """Return precisions of differences d given their posterior: per stencil (B, C, rows, columns).

    They are factor / (scale² + E[d²]), which is the variational approximation of a Student t
    distribution, with E[d²] shared in part among the colours.
    images: (B, C, H, W), the posterior's mean; covariance: its covariance.
    """
    mix = colours(grid.channels, images)
    scale, typical = (_per_colour(values, grid, images) for values in (SCALES, DEVIATIONS))
    found = []
    for stencil, weight in STENCILS:
        variance = difference_variance(covariance, grid, mix, stencil).clamp_min(0)
        square = differences(images, grid, mix, stencil).square() + variance
        common = (square / typical.square()).mean(1, keepdim=True) * typical.square()
        square = torch.lerp(square, common, SHARED)
        found.append(weight * STUDENT_FACTOR / (scale.square() + square))
    return found


def add_smoothness(matrix: BlockTridiagonal, grid: Grid, precisions: list[Tensor]) -> None:
    """Add the precisions of all differences to a precision matrix in place."""
    mix = colours(grid.channels, precisions[0])
    for (stencil, _), precision in zip(STENCILS, precisions, strict=True):
        add_differences(matrix, grid, mix, stencil, precision)

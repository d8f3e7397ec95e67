"""Recovers photographs from the output of a network's stem: convolution, BatchNorm, ReLU, max-pool.

The rounds of the method, expectation propagation, are in `propagation.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.layerwise.convolution import Geometry
from inversion.layerwise.stem.grid_gaussian import grid_for
from inversion.layerwise.stem.propagation import problem_for, propagate
from inversion.layerwise.stem.windows import Pooling
from utils.journal import FORGETFUL, Journal

#: Bytes of the matrices that are in memory at once; more images are processed in turn.
MEMORY = 2**30


@dataclass(frozen=True)
class Stem:
    """Holds the recovered images and what tells right ones from wrong ones."""

    #: (B, C, H, W): the posterior's mean, clamped to the box.
    images: Tensor
    #: (B,): relative error of the images' own pooled values.
    residual: Tensor


def stem_posterior(
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    image_shape: tuple[int, int, int],
    *,
    conv: Geometry,
    pool: Pooling,
    low: Tensor,
    high: Tensor,
    error: float,
    should_stop: Callable[[], bool] = lambda: False,
    journal: Journal = FORGETFUL,
) -> Stem:
    """Recover images x from max_pool(ReLU(scale · conv(x) + shift)) by expectation propagation.

    pooled: (B, O, h, w) ≥ 0, float64; weight: (O, C, k, l); scale, shift: (O,), BatchNorm as an
    affine map; image_shape: (C, H, W); low, high: (C, 1, 1), the box of the normalised pixels;
    error: of the pooled values, relative to an image's largest; should_stop: asked between rounds,
    true ends with the best images until then; journal: where the rounds are saved, and from where
    killed ones go on. It uses no random numbers. Time grows linearly with the height of the images,
    and with the cube of k times their width.

    Raises ValueError if shapes do not fit or values are not finite, StateError where what the
    journal recalls does not fit.
    """
    _check(pooled, weight, image_shape, conv, pool)
    channels = image_shape[0]
    low, span = low.expand(channels, 1, 1), (high - low).expand(channels, 1, 1)
    grid = grid_for(image_shape, conv)
    inner = conv.forward(low.expand(1, *image_shape), weight)  # the output at the box's corner
    offset = scale.view(-1, 1, 1) * inner + shift.view(-1, 1, 1)
    scaled = weight * scale.view(-1, 1, 1, 1) * span
    # Matrix, factor and inverse: one block on and one beside the diagonal per row of blocks.
    at_once = max(1, MEMORY // (6 * 8 * sum(size * size for size in grid.sizes())))
    parts = []
    for number, part in enumerate(pooled.clamp_min(0).split(at_once)):
        problem = problem_for(part, grid, conv, pool, scaled, offset, error)
        images, residual = propagate(problem, should_stop, journal, f"stem-{number}")
        parts.append((low + span * images, residual))
    return Stem(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _check(
    pooled: Tensor,
    weight: Tensor,
    image_shape: tuple[int, int, int],
    conv: Geometry,
    pool: Pooling,
) -> None:
    blank = conv.forward(weight.new_zeros(1, *image_shape), weight)
    expected = F.max_pool2d(blank, pool.kernel, pool.stride, pool.padding).shape[1:]
    if pooled.shape[1:] != expected:
        raise ValueError(
            f"pooled values of shape {tuple(pooled.shape[1:])} per image, but the stem makes "
            f"{tuple(expected)} of images {image_shape}"
        )
    if not pooled.isfinite().all():
        raise ValueError("not all pooled values are finite")
